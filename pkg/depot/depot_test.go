package depot

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/drafter-vm/drafter/internal/tests3"
	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/migrate"
	"github.com/drafter-vm/drafter/pkg/objstore"
	"github.com/drafter-vm/drafter/pkg/peer"
	"github.com/drafter-vm/drafter/pkg/vmpackage"
)

var quiet = slog.New(slog.DiscardHandler)

func config(endpoint, prefix string) objstore.Config {
	return objstore.Config{
		Location:  objstore.Location{Endpoint: endpoint, Bucket: tests3.Bucket, Prefix: prefix},
		AccessKey: tests3.AccessKey, SecretKey: tests3.SecretKey, Timeout: 5 * time.Second, Logger: quiet,
	}
}

func openStore(t *testing.T, cfg objstore.Config) *objstore.Store {
	t.Helper()
	s, err := objstore.Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

func random(n int, seed byte) []byte {
	p := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{seed}).Read(p)
	return p
}

func newStorage(t *testing.T, devices map[string]DeviceConfig) *Storage {
	t.Helper()
	s, err := NewStorage(StorageConfig{Devices: devices, Logger: quiet})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

// keep has a disk be kept, and returns it when all of it is stored.
func keep(t *testing.T, s *Storage, content []byte) (*block.Tracked, peer.Syncing) {
	t.Helper()
	memory := block.NewMemory(int64(len(content)))
	if _, err := memory.WriteAt(content, 0); err != nil {
		t.Fatal(err)
	}
	disk := block.NewTracked(memory)
	index := migrate.NewIndexBuilder(disk.Size())
	syncing, err := s.Sync("disk", peer.SyncSource{Device: disk, Writes: disk, Stored: index.Write})
	if err != nil || syncing == nil {
		t.Fatal("the disk is not kept:", err)
	}
	t.Cleanup(func() { syncing.Close() })
	for range 500 {
		if st := s.Stats()["disk"]; st.Waiting == 0 {
			if x, err := migrate.IndexBase(t.Context(), disk); err != nil || x.Digest() != index.Index().Digest() {
				t.Errorf("what it says is stored is something else (%v)", err)
			}
			return disk, syncing
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Fatal("the disk is never stored: ", s.Stats()["disk"])
	return nil, nil
}

// One peer after the other keeps the disk, and each is told by the one before where it is: without a secret, and only if it is configured to listen.
func TestStorageChain(t *testing.T) {
	server := tests3.Start(t)
	content := random(1<<20, 1)
	const quietTime = 50 * time.Millisecond
	for name, value := range map[string]string{"AWS_ACCESS_KEY_ID": tests3.AccessKey, "AWS_SECRET_ACCESS_KEY": tests3.SecretKey} {
		t.Setenv(name, value)
	}
	inherits := map[string]DeviceConfig{"disk": {Quiet: quietTime}}
	first := newStorage(t, map[string]DeviceConfig{"disk": {Store: config(server.Endpoint, "chain"), Quiet: quietTime}})
	if err := first.Ping(t.Context()); err != nil {
		t.Fatal(err)
	}
	if s, err := newStorage(t, inherits).Sync("disk", peer.SyncSource{Device: block.NewMemory(4096)}); s != nil || err != nil {
		t.Errorf("a disk is kept, and nobody knows where: %v, %v", s, err)
	}
	at := first
	for n := range 3 {
		disk, syncing := keep(t, at, content)
		stored, err := syncing.Snapshot(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, secret := range []string{tests3.AccessKey, tests3.SecretKey} {
			if bytes.Contains(stored.Reference, []byte(secret)) {
				t.Errorf("a secret travels: %s", stored.Reference)
			}
		}
		if len(stored.Ranges) != 1 || stored.Ranges[0].Length != disk.Size() {
			t.Errorf("stored is %v", stored.Ranges)
		}
		next := newStorage(t, inherits)
		f, err := next.Find(t.Context(), "disk", disk.Size(), stored.Reference)
		if err != nil || f == nil {
			t.Fatalf("peer %d: %v", n, err)
		}
		var got []byte
		for i, r := range f.Chunks() {
			p := make([]byte, r.Length)
			if err := f.Fetch(t.Context(), i, p); err != nil {
				t.Fatal(err)
			}
			got = append(got, p...)
		}
		if !bytes.Equal(got, content) {
			t.Errorf("peer %d gets something else", n)
		}

		// Who is not to take it.
		var ref reference
		if err := json.Unmarshal(stored.Reference, &ref); err != nil {
			t.Fatal(err)
		}
		key, err := objstore.NewKey(bytes.Repeat([]byte{1}, 32))
		if err != nil {
			t.Fatal(err)
		}
		with := config(server.Endpoint, "chain")
		with.Key = key
		for want, c := range map[string]DeviceConfig{
			"here s3://vms/elsewhere": {Store: config(server.Endpoint, "elsewhere")},
			"here there is key":       {Store: with},
		} {
			if f, err := newStorage(t, map[string]DeviceConfig{"disk": c}).Find(t.Context(), "disk", disk.Size(), stored.Reference); f != nil || err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("got %v, error %v, want %q", f, err, want)
			}
		}
		if f, err := newStorage(t, nil).Find(t.Context(), "disk", disk.Size(), stored.Reference); f != nil || err != nil {
			t.Errorf("a device that is not configured is fetched: %v", err)
		}
		if _, err := next.Find(t.Context(), "disk", disk.Size()+1, stored.Reference); err == nil {
			t.Error("a disk of another size is fetched")
		}
		for _, bad := range []string{`{`, `{"list":"x"}`, `{"list":"` + strings.Repeat("0", 63) + `7","bucket":"vms","endpoint":"` + server.Endpoint + `"}`, `{"list":"` + strings.Repeat("0", 64) + `","bucket":"a/b"}`} {
			if f, err := next.Find(t.Context(), "disk", disk.Size(), []byte(bad)); err == nil {
				t.Errorf("reference %s: got %v", bad, f)
			}
		}
		if _, err := next.Find(t.Context(), "disk", disk.Size(), stored.Reference); err != nil {
			t.Fatal(err)
		}
		syncing.Resume()
		at = next
	}
	// What was found for one VM is nothing for the next.
	at.Reset()
	if s, err := at.Sync("disk", peer.SyncSource{Device: block.NewMemory(4096)}); s != nil || err != nil {
		t.Errorf("a disk is kept where another was: %v, %v", s, err)
	}
}

// What is on record goes with who has put it there.
func TestStorageClose(t *testing.T) {
	server := tests3.Start(t)
	proxy := server.Front(t)
	s := newStorage(t, map[string]DeviceConfig{"disk": {Store: config(proxy.Endpoint, "close"), Quiet: 20 * time.Millisecond}})
	disk, syncing := keep(t, s, random(300_000, 2))
	stored, err := syncing.Snapshot(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	syncing.Resume()
	store := openStore(t, config(server.Endpoint, "close"))
	// Who has taken the VM puts on record what there is.
	next := newStorage(t, map[string]DeviceConfig{"disk": {Store: config(proxy.Endpoint, "close")}})
	if _, err := next.Find(t.Context(), "disk", disk.Size(), stored.Reference); err != nil {
		t.Fatal(err)
	}
	taken, err := next.Sync("disk", peer.SyncSource{Device: disk, Still: true})
	if err != nil {
		t.Fatal(err)
	}
	for n := 0; ; n++ {
		roots, err := store.Roots(t.Context(), "sync")
		if err == nil && len(roots) == 1 {
			break
		}
		if n > 200 {
			t.Fatalf("on record is %v (%v)", roots, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
	// A store that hangs holds a migration up for no longer than it may.
	put := s.Stats()["disk"].Bytes
	if _, err := disk.WriteAt([]byte("something else"), 0); err != nil {
		t.Fatal(err)
	}
	for n := 0; s.Stats()["disk"].Bytes == put; n++ { // when it is put, the list is another
		if n > 500 {
			t.Fatal("what was written is never put")
		}
		time.Sleep(20 * time.Millisecond)
	}
	proxy.Set(&tests3.Fault{Hang: true, Match: tests3.Of(http.MethodPut, "lists")})
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := syncing.Snapshot(ctx); err == nil {
		t.Error("what could not be put on record is said to be stored")
	}
	proxy.Set(nil)
	for range 2 {
		if err := errors.Join(syncing.Close(), taken.Close()); err != nil {
			t.Error(err)
		}
	}
	if roots, err := store.Roots(t.Context(), "sync"); err != nil || len(roots) != 0 {
		t.Errorf("left on record: %v (%v)", roots, err)
	}
	if st := s.Stats(); len(st) != 0 {
		t.Errorf("stats of what is closed: %v", st)
	}
}

func TestStorageMistakes(t *testing.T) {
	with := config("http://127.0.0.1:1", "")
	with.Bucket = ""
	if _, err := NewStorage(StorageConfig{Devices: map[string]DeviceConfig{"disk": {Store: with}}}); err == nil || !strings.Contains(err.Error(), "no bucket") {
		t.Errorf("got error %v", err)
	}
	with.Bucket = "a/b"
	if _, err := NewStorage(StorageConfig{Devices: map[string]DeviceConfig{"disk": {Store: with}}}); err == nil || !strings.Contains(err.Error(), `"disk"`) {
		t.Errorf("got error %v", err)
	}
}

func TestImages(t *testing.T) {
	server := tests3.Start(t)
	ctx := t.Context()
	store := openStore(t, config(server.Endpoint, "images"))
	dir := t.TempDir()
	contents := map[string][]byte{"state": random(8192, 3), "memory": random(1<<20, 4), "config": append([]byte("{}"), bytes.Repeat([]byte("\n"), 4094)...), "disk": make([]byte, 600<<10)}
	var files []vmpackage.File
	for name, p := range contents {
		path := filepath.Join(dir, vmpackage.DefaultFile(name))
		if err := os.WriteFile(path, p, 0o600); err != nil {
			t.Fatal(err)
		}
		files = append(files, vmpackage.File{Name: name, Path: path})
	}
	if _, err := vmpackage.WriteManifest(ctx, dir, files, vmpackage.ManifestOptions{}); err != nil {
		t.Fatal(err)
	}
	put := func() (n int64) {
		sent := map[string]int64{}
		version, err := Push(ctx, store, dir, "web", PushOptions{Progress: func(device string, _, put int64) { sent[device] = put }})
		if err != nil || version == "" {
			t.Fatal(err)
		}
		for _, s := range sent {
			n += s
		}
		return n
	}
	if n := put(); n < 1<<20 || n > 1<<20+1<<16 {
		t.Errorf("put %d bytes", n)
	}
	if n := put(); n != 0 {
		t.Errorf("put %d bytes of what was there", n)
	}
	list, err := Images(ctx, store)
	if err != nil || len(list) != 1 || list[0].Name != "web" || len(list[0].Versions) != 2 {
		t.Fatalf("images %v (%v)", list, err)
	}
	v, err := Open(ctx, store, "web", "", quiet)
	if err != nil || v.ID != list[0].Versions[1] || time.Since(v.Taken) > time.Minute {
		t.Fatalf("got %+v (%v)", v, err)
	}
	devices, err := v.OpenDevices(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range devices {
		got := make([]byte, d.Device.Size())
		if _, err := d.Device.ReadAt(got, 0); err != nil || !bytes.Equal(got, contents[d.Name]) {
			t.Errorf("device %q is something else (%v)", d.Name, err)
		}
		d.Device.Close()
	}
	for _, c := range [][2]string{{"nothing", ""}, {"web", "yesterday"}} {
		if _, err := Open(ctx, store, c[0], c[1], quiet); !errors.Is(err, ErrNoImage) {
			t.Errorf("opening %v: error %v", c, err)
		}
	}
	if n, err := Remove(ctx, store, "web", list[0].Versions[0]); n != 1 || err != nil {
		t.Errorf("removed %d (%v)", n, err)
	}
	if n, err := Remove(ctx, store, "web", ""); n != 1 || err != nil {
		t.Errorf("removed %d (%v)", n, err)
	}
	if _, err := Remove(ctx, store, "web", ""); !errors.Is(err, ErrNoImage) {
		t.Errorf("removing what is not there: error %v", err)
	}
	if c, err := store.Collect(ctx, objstore.CollectOptions{Grace: time.Nanosecond}); err != nil || c.Chunks+c.Lists+c.Roots != 0 {
		t.Errorf("left after all: %+v (%v)", c, err)
	}
	if _, err := Push(ctx, store, t.TempDir(), "web", PushOptions{}); err == nil {
		t.Error("what is no package was pushed")
	}
	if _, err := Push(ctx, store, dir, "../x", PushOptions{}); err == nil {
		t.Error("an image has a name that leads elsewhere")
	}
}

// The newest version is the one that was put last, whatever clocks say; and only copies make room for copies.
func TestVersions(t *testing.T) {
	server := tests3.Start(t)
	ctx := t.Context()
	store := openStore(t, config(server.Endpoint, "versions"))
	put := func(taken time.Time, every string) string {
		t.Helper()
		v, err := putVersion(ctx, store, "web", &objstore.Root{}, body{Taken: taken, Every: every})
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	now := time.Now()
	all := []string{put(now, ""), put(now.Add(time.Hour), "1m0s"), put(now, "1m0s"), put(now, "1m0s"), put(now, ""), put(now, "1m0s")}
	for n, v := range all {
		if n > 0 && v <= all[n-1] {
			t.Errorf("version %q follows %q", v, all[n-1])
		}
	}
	b, err := NewBackup(BackupConfig{Store: store, Name: "web", Keep: 2, Logger: quiet})
	if err != nil {
		t.Fatal(err)
	}
	if err := b.prune(ctx); err != nil {
		t.Fatal(err)
	}
	left, err := versions(ctx, store, "web")
	if want := []string{all[0], all[3], all[4], all[5]}; err != nil || !slices.Equal(left, want) {
		t.Errorf("left are %q (%v), want %q", left, err, want)
	}
	v, err := Open(ctx, store, "web", all[0], quiet)
	if err != nil || v.Newest.Sub(now).Abs() > time.Second || v.Every != time.Minute {
		t.Errorf("of the oldest, it is said that the newest is of %v, every %v (%v)", v.Newest, v.Every, err)
	}
}
