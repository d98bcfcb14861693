package registry

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/drafter-vm/drafter/internal/testregistry"
	"github.com/drafter-vm/drafter/pkg/peer"
	"github.com/drafter-vm/drafter/pkg/vmpackage"
)

var quiet = Transport{Logger: slog.New(slog.DiscardHandler), StallTimeout: 2 * time.Second, backoff: 10 * time.Millisecond}

// alone keeps the credentials of whoever runs the tests out of them.
func alone(t *testing.T) {
	t.Helper()
	t.Setenv("DOCKER_CONFIG", t.TempDir())
	t.Setenv("XDG_RUNTIME_DIR", "")
	t.Setenv("REGISTRY_AUTH_FILE", "")
}

// text is n bytes that can be compressed by about half.
func text(n int, seed byte) []byte {
	p := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{seed}).Read(p)
	for i := range p {
		p[i] = "0123456789abcdef"[p[i]%16]
	}
	return p
}

// devices are what the devices of a package hold.
type devices map[string][]byte

// sample are devices of a package: compressible ones, zeros, a tail, and the same at two places.
func sample() devices {
	memory := make([]byte, 24<<20)
	copy(memory[1<<20:], text(9<<20, 1))
	copy(memory[16<<20:], text(1<<20, 1))
	disk := make([]byte, 12<<20+4096)
	copy(disk[3<<20:], text(5<<20, 2))
	copy(disk[12<<20:], text(4096, 3))
	return devices{"state": text(10000, 4), "memory": memory, "kernel": text(1<<20, 5), "disk": disk, "config": text(4096, 6)[:4096], "data": make([]byte, 3<<20)}
}

// clone are the same devices, to be changed.
func (d devices) clone() devices {
	c := devices{}
	for name, p := range d {
		c[name] = bytes.Clone(p)
	}
	return c
}

// makePackage makes the folder of a package.
func makePackage(t *testing.T, d devices) string {
	t.Helper()
	dir := t.TempDir()
	var files []vmpackage.File
	for name, p := range d {
		if name == "config" {
			continue // it would have to describe a machine
		}
		path := filepath.Join(dir, vmpackage.DefaultFile(name))
		f, err := os.Create(path)
		if err != nil {
			t.Fatal(err)
		}
		for off := 0; off < len(p); off += 4096 {
			if page := p[off:min(off+4096, len(p))]; bytes.Trim(page, "\x00") != nil {
				if _, err := f.WriteAt(page, int64(off)); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err := errors.Join(f.Truncate(int64(len(p))), f.Close()); err != nil {
			t.Fatal(err)
		}
		files = append(files, vmpackage.File{Name: name, Path: path})
	}
	if _, err := vmpackage.WriteManifest(t.Context(), dir, files, vmpackage.ManifestOptions{}); err != nil {
		t.Fatal(err)
	}
	return dir
}

func reference(t *testing.T, s string) Reference {
	t.Helper()
	r, err := ParseReference(Scheme + s)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func mustPush(t *testing.T, dir string, ref Reference, bases ...Reference) *Pushed {
	t.Helper()
	pushed, err := Push(t.Context(), dir, ref, PushOptions{packSize: 4 << 20, Transport: quiet, Platform: "linux/amd64", Bases: bases})
	if err != nil {
		t.Fatal(err)
	}
	return pushed
}

var onAMD64 = PullOptions{OpenOptions: OpenOptions{Transport: quiet, Platform: "linux/amd64"}}

// mustPull pulls a package, which must be the one in the folder was.
func mustPull(t *testing.T, ref Reference, was string) *Pulled {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "pulled")
	pulled, err := Pull(t.Context(), ref, dir, onAMD64)
	if err != nil {
		t.Fatal(err)
	}
	same(t, dir, was)
	return pulled
}

// same holds a package that was pulled against the one that was pushed.
func same(t *testing.T, dir, was string) {
	t.Helper()
	list, err := os.ReadDir(was)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range list {
		if e.Name() == originFile {
			continue
		}
		want, err := os.ReadFile(filepath.Join(was, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(filepath.Join(dir, e.Name())); err != nil || !bytes.Equal(got, want) {
			t.Errorf("pulled, %s is something else (%v)", e.Name(), err)
		}
	}
	if _, err := os.Stat(dir + partial); err == nil {
		t.Errorf("%s is left", dir+partial)
	}
	if _, err := vmpackage.Verify(t.Context(), dir, vmpackage.ExtractOptions{}); err != nil {
		t.Error(err)
	}
}

// A package that is pushed and pulled is the same; one that is like it sends only what differs, and so does one that was pulled; what a replaced one alone
// had is garbage then, and nothing else is.
func TestPushPull(t *testing.T) {
	alone(t)
	server := testregistry.Start(t, testregistry.Options{})
	front := server.Front(t)
	ref := reference(t, front.Address+"/vms/web:1")
	first := sample()
	dir := makePackage(t, first)
	var seen []Progress
	pushed, err := Push(t.Context(), dir, ref, PushOptions{packSize: 4 << 20, Transport: quiet, Platform: "linux/amd64", Progress: func(p Progress) { seen = append(seen, p) }})
	if err != nil {
		t.Fatal(err)
	}
	whole := front.BytesPut.Load()
	t.Logf("pushed %d bytes of devices, %d of content, as %d bytes; the registry got %d", pushed.Size, pushed.Data, pushed.Sent, whole)
	if pushed.Known != 0 || pushed.Sent > pushed.Data*3/4 || whole < pushed.Sent || whole > pushed.Sent+20000 {
		t.Errorf("pushed: %+v, the registry got %d bytes", pushed, whole)
	}
	if last := seen[len(seen)-1]; last.Stage != StageSend || last.Done != last.Total || seen[0].Stage != StageRead {
		t.Errorf("progress ends with %+v", last)
	}
	pulled := mustPull(t, ref, dir)
	if pulled.Present != 0 || pulled.Data != pushed.Data {
		t.Errorf("pulled: %+v", pulled)
	}
	mustPull(t, pushed.Reference, dir)
	mustPull(t, pushed.Manifest, dir)

	// The same again.
	again := mustPush(t, dir, ref)
	if again.Sent != 0 || again.Reference != pushed.Reference {
		t.Errorf("the same again: %+v, was %+v", again, pushed)
	}

	// One that differs in 3 of its chunks, over the first, beside it, and of another repository.
	second := first.clone()
	copy(second["memory"][4<<20:], text(100, 9))
	copy(second["memory"][9<<20:], text(64<<10, 10))
	copy(second["disk"][5<<20:], text(10, 11))
	other := makePackage(t, second)
	for name, at := range map[string]struct {
		to    string
		bases []Reference
	}{"over it": {to: "/vms/web:1"}, "beside it": {"/vms/web:2", []Reference{pushed.Reference}}, "elsewhere": {"/others/web:1", []Reference{pushed.Reference}}} {
		before := front.BytesPut.Load()
		p := mustPush(t, other, reference(t, front.Address+at.to), at.bases...)
		sent := front.BytesPut.Load() - before
		t.Logf("%s: sent %d bytes, of %d that the first took: 1/%d", name, sent, whole, whole/sent)
		if p.Known != p.Data-3*leastChunkSize || sent > 3*leastChunkSize+20000 {
			t.Errorf("%s: %+v, the registry got %d bytes", name, p, sent)
		}
		mustPull(t, p.Reference, other)
	}

	// What was pulled knows where it came from.
	mine := filepath.Join(t.TempDir(), "mine")
	if _, err := Pull(t.Context(), reference(t, front.Address+"/others/web:1"), mine, onAMD64); err != nil {
		t.Fatal(err)
	}
	before := front.BytesPut.Load()
	p := mustPush(t, mine, reference(t, front.Address+"/mine/web:1"))
	if sent := front.BytesPut.Load() - before; p.Known != p.Data || sent > 20000 {
		t.Errorf("what was pulled, pushed elsewhere: %+v, the registry got %d bytes", p, sent)
	}

	server.CollectGarbage()
	mustPull(t, reference(t, front.Address+"/vms/web:1"), other)
	mustPull(t, reference(t, front.Address+"/others/web:1"), other)
	mustPull(t, reference(t, front.Address+"/mine/web:1"), other)
	if _, err := Pull(t.Context(), reference(t, front.Address+"/vms/none:1"), filepath.Join(t.TempDir(), "x"), onAMD64); !errors.Is(err, ErrNotFound) {
		t.Errorf("pull of nothing: %v", err)
	}
	// A pack of which hardly anything is needed is not kept for that.
	third := devices{"disk": append(bytes.Clone(first["disk"][3<<20:3<<20+64<<10]), text(1<<20, 77)...)}
	if p := mustPush(t, makePackage(t, third), reference(t, front.Address+"/vms/third:1"), reference(t, front.Address+"/vms/web:1")); p.Known != 0 {
		t.Errorf("a pack is referred to for a chunk: %+v", p)
	}
}

// A push and a pull that are cut go on where they were.
func TestResume(t *testing.T) {
	alone(t)
	server := testregistry.Start(t, testregistry.Options{})
	front := server.Front(t)
	ref := reference(t, front.Address+"/vms/web:1")
	d := sample()
	d["disk"] = append(text(16<<20, 20), d["disk"]...)
	dir := makePackage(t, d)

	ctx, cancel := context.WithCancel(t.Context())
	front.Set(&testregistry.Fault{Match: func(r *http.Request) bool {
		if r.Method == http.MethodPut && r.ContentLength > 1<<20 && front.BytesPut.Load() > 6<<20 {
			cancel()
			return true
		}
		return false
	}, Cut: true})
	if _, err := Push(ctx, dir, ref, PushOptions{packSize: 4 << 20, Transport: quiet, Platform: "linux/amd64"}); !errors.Is(err, context.Canceled) {
		t.Fatalf("a push that is cut: %v", err)
	}
	front.Set(nil)
	if _, err := Pull(t.Context(), ref, filepath.Join(t.TempDir(), "x"), onAMD64); !errors.Is(err, ErrNotFound) {
		t.Errorf("half a push can be pulled: %v", err)
	}
	before := front.BytesPut.Load()
	pushed := mustPush(t, dir, ref)
	sent := front.BytesPut.Load() - before
	t.Logf("the first push sent %d bytes, the second %d", before, sent)
	if pushed.Present < 2<<20 || sent > pushed.Sent+20000 {
		t.Errorf("it goes on: %+v, the registry got %d bytes", pushed, sent)
	}

	for n, fault := range []testregistry.Fault{{Cut: true}, {Corrupt: true}, {Status: 502}, {Stall: true}, {Hang: true}} {
		to := filepath.Join(t.TempDir(), "pulled")
		start := front.BytesGot.Load()
		fault.Match = func(r *http.Request) bool {
			return r.Header.Get("Range") != "" && front.BytesGot.Load()-start > 5<<20
		}
		front.Set(&fault)
		opts := onAMD64
		if fault.Stall || fault.Hang { // else a busy machine would pass for such a registry
			opts.StallTimeout = 200 * time.Millisecond
		}
		_, err := Pull(t.Context(), ref, to, opts)
		if err == nil {
			t.Fatalf("%+v: pulled", fault)
		}
		if fault.Corrupt && (!errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), "pack sha256:")) {
			t.Errorf("corrupt: %v", err)
		}
		if _, err := os.Stat(to); err == nil {
			t.Error("half a package has its name")
		}
		t.Logf("fault %d: %v", n, err)
		front.Set(nil)
		if n == 0 { // what is left is not trusted
			for _, name := range []string{"memory.bin", "rootfs.ext4"} {
				f, err := os.OpenFile(filepath.Join(to+partial, name), os.O_RDWR, 0)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := f.WriteAt([]byte("not that"), 3<<20); err != nil {
					t.Fatal(err)
				}
				f.Close()
			}
			if err := os.WriteFile(filepath.Join(to+partial, "stranger"), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		before := front.BytesGot.Load()
		pulled, err := Pull(t.Context(), ref, to, onAMD64)
		if err != nil {
			t.Fatal(err)
		}
		same(t, to, dir)
		got := front.BytesGot.Load() - before
		if pulled.Present < 2<<20 || got > pushed.Sent+pushed.Present-2<<20 {
			t.Errorf("it goes on: %+v, %d bytes came", pulled, got)
		}
		if _, err := os.Stat(filepath.Join(to, "stranger")); err == nil {
			t.Error("a file that does not belong to the package is in it")
		}
	}

	// What fails once is done again.
	var mu sync.Mutex
	failed := map[string]bool{}
	front.Set(&testregistry.Fault{Match: func(r *http.Request) bool {
		mu.Lock()
		defer mu.Unlock()
		key := r.Method + r.URL.Path + r.Header.Get("Range")
		was := failed[key]
		failed[key] = true
		return !was && r.Method == http.MethodGet
	}, Cut: true})
	mustPull(t, ref, dir)
	front.Set(nil)
	if _, err := Pull(t.Context(), ref, t.TempDir(), onAMD64); err != nil {
		t.Errorf("to an empty folder: %v", err)
	}
	if _, err := Pull(t.Context(), ref, dir, onAMD64); !errors.Is(err, os.ErrExist) {
		t.Errorf("over another package: %v", err)
	}
}

// Several requests are under way at once.
func TestParallel(t *testing.T) {
	alone(t)
	server := testregistry.Start(t, testregistry.Options{})
	front := server.Front(t)
	ref := reference(t, front.Address+"/vms/web:1")
	dir := makePackage(t, devices{"disk": text(24<<20, 1)})
	var mu sync.Mutex
	var now, most int
	count := func(r *http.Request) bool {
		if r.Method != http.MethodPut && r.Header.Get("Range") == "" {
			return false
		}
		mu.Lock()
		now++
		most = max(most, now)
		mu.Unlock()
		time.Sleep(50 * time.Millisecond)
		mu.Lock()
		now--
		mu.Unlock()
		return false
	}
	front.Set(&testregistry.Fault{Match: count})
	mustPush(t, dir, ref)
	if most < 3 {
		t.Errorf("at most %d puts at once", most)
	}
	most = 0
	mustPull(t, ref, dir)
	if most < 3 {
		t.Errorf("at most %d gets at once", most)
	}
}

// A registry with TLS of an authority that nobody else knows, and with a password, from the configuration of docker, from that of podman, and from a helper.
func TestCredentials(t *testing.T) {
	alone(t)
	server := testregistry.Start(t, testregistry.Options{TLS: true, User: "joe", Password: "secret"})
	front := server.Front(t)
	ref := reference(t, front.Address+"/vms/web:1")
	dir := makePackage(t, devices{"disk": text(1<<20, 1)})
	opts := PushOptions{packSize: 4 << 20, Transport: quiet, Platform: "linux/amd64"}
	refused := func(what string, words ...string) {
		t.Helper()
		_, err := Push(t.Context(), dir, ref, opts)
		for _, w := range words {
			if err == nil || !strings.Contains(err.Error(), w) {
				t.Errorf("%s: %v, want %q", what, err, w)
			}
		}
	}
	refused("an unknown authority", "certificate", "--registry-ca")
	opts.CA = server.CA
	refused("no password", "docker login", front.Address)
	t.Setenv("DOCKER_CONFIG", testregistry.Start(t, testregistry.Options{User: "joe", Password: "wrong"}).DockerConfig(front.Address))
	refused("a wrong password", "docker login")
	yes, no := true, false
	opts.PlainHTTP = &yes
	refused("without TLS", "400")
	opts.PlainHTTP = &no

	t.Setenv("DOCKER_CONFIG", server.DockerConfig(front.Address))
	push, err := Push(t.Context(), dir, ref, opts)
	if err != nil {
		t.Fatal(err)
	}
	pulls := func(what string) {
		t.Helper()
		to := filepath.Join(t.TempDir(), "pulled")
		o := onAMD64
		o.CA = server.CA
		if _, err := Pull(t.Context(), push.Reference, to, o); err != nil {
			t.Errorf("%s: %v", what, err)
		} else {
			same(t, to, dir)
		}
	}
	pulls("the configuration of docker")
	podman := filepath.Join(server.DockerConfig(front.Address), "config.json")
	t.Setenv("DOCKER_CONFIG", t.TempDir())
	t.Setenv("REGISTRY_AUTH_FILE", podman)
	pulls("the configuration of podman")
	t.Setenv("REGISTRY_AUTH_FILE", "")

	config, bin := t.TempDir(), t.TempDir()
	helper := "#!/bin/sh\n[ \"$1\" = get ] || exit 1\nread -r server\n[ \"$server\" = " + front.Address + " ] || { echo credentials not found in native keychain; exit 1; }\n" +
		`echo '{"Username":"joe","Secret":"secret"}'` + "\n"
	if err := errors.Join(os.WriteFile(filepath.Join(bin, "docker-credential-drawer"), []byte(helper), 0o755),
		os.WriteFile(filepath.Join(config, "config.json"), []byte(`{"credHelpers":{"`+front.Address+`":"drawer"}}`), 0o600)); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	t.Setenv("DOCKER_CONFIG", config)
	pulls("a helper")
}

// A tag leads to a package for each platform; another one for the same replaces it.
func TestPlatforms(t *testing.T) {
	alone(t)
	server := testregistry.Start(t, testregistry.Options{})
	ref := reference(t, server.Address+"/vms/web:1")
	dirs := map[string]string{}
	pinned := map[string]*Pushed{}
	d := sample()
	for n, platform := range []string{"linux/amd64", "linux/arm64", "linux/arm/v7", "linux/amd64"} {
		d["kernel"] = text(1<<20, byte(n)+50)
		dirs[platform] = makePackage(t, d)
		var err error
		if pinned[platform], err = Push(t.Context(), dirs[platform], ref, PushOptions{packSize: 4 << 20, Transport: quiet, Platform: platform}); err != nil {
			t.Fatal(err)
		}
		if n > 0 && pinned[platform].Known == 0 {
			t.Errorf("%s borrows nothing of the others", platform)
		}
	}
	for platform, dir := range dirs {
		for _, from := range []Reference{ref, pinned[platform].Reference, pinned[platform].Manifest} {
			to := filepath.Join(t.TempDir(), "pulled")
			opts := onAMD64
			opts.Platform = platform
			if _, err := Pull(t.Context(), from, to, opts); err != nil {
				t.Errorf("%s from %s: %v", platform, from, err)
				continue
			}
			same(t, to, dir)
		}
	}
	opts := onAMD64
	opts.Platform = "linux/s390x"
	_, err := Pull(t.Context(), ref, filepath.Join(t.TempDir(), "x"), opts)
	if !errors.Is(err, ErrPlatform) || !strings.Contains(err.Error(), "linux/amd64, linux/arm64, linux/arm/v7") {
		t.Errorf("another platform: %v", err)
	}
	if _, err := Pull(t.Context(), pinned["linux/arm64"].Manifest, filepath.Join(t.TempDir(), "x"), opts); err != nil {
		t.Errorf("a package for one platform, by its digest: %v", err)
	}
	if _, err := Push(t.Context(), dirs["linux/amd64"], ref, PushOptions{packSize: 4 << 20, Transport: quiet, Platform: "amd64"}); err == nil || !strings.Contains(err.Error(), "linux/amd64") {
		t.Errorf("a platform that is none: %v", err)
	}
}

// Images read as the devices that were pushed do, whole and here and there, and fail, and recover, with the registry.
func TestImages(t *testing.T) {
	alone(t)
	server := testregistry.Start(t, testregistry.Options{})
	front := server.Front(t)
	ref := reference(t, front.Address+"/vms/web:1")
	d := sample()
	mustPush(t, makePackage(t, d), ref)
	transport := quiet
	transport.StallTimeout = 200 * time.Millisecond
	p, err := Open(t.Context(), ref, OpenOptions{Transport: transport, Platform: "linux/amd64"})
	if err != nil {
		t.Fatal(err)
	}
	images, err := p.Images(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range images {
		want := d[i.Name]
		got := make([]byte, len(want))
		if n, err := i.Device.ReadAt(got, 0); n != len(want) || err != nil || !bytes.Equal(got, want) {
			t.Errorf("device %q reads as something else: %d bytes, %v", i.Name, n, err)
		}
		var readers sync.WaitGroup
		for seed := range 4 {
			readers.Go(func() {
				r := rand.New(rand.NewPCG(1, uint64(seed)))
				for range 200 {
					off := r.IntN(len(want))
					got := make([]byte, r.IntN(300000))
					n, err := i.Device.ReadAt(got, int64(off))
					if err != nil && err != io.EOF || !bytes.Equal(got[:n], want[off:min(len(want), off+len(got))]) {
						t.Errorf("device %q at %d: %v", i.Name, off, err)
						return
					}
				}
			})
		}
		readers.Wait()
		for off := int64(0); ; {
			r, err := i.Device.(*device).NextData(off)
			end := int64(len(want))
			if err == nil {
				end = r.Offset
			}
			if bytes.Trim(want[off:end], "\x00") != nil && len(bytes.Trim(want[off:end], "\x00")) > 0 {
				t.Fatalf("device %q: there is data from %d to %d", i.Name, off, end)
			}
			if err != nil {
				break
			}
			off = r.End()
		}
	}
	for _, i := range images {
		if err := errors.Join(i.Device.Close(), i.Device.Close()); err != nil {
			t.Error(err)
		}
		if _, err := i.Device.ReadAt(make([]byte, 1), 0); !errors.Is(err, os.ErrClosed) {
			t.Errorf("closed, it reads with %v", err)
		}
	}

	images, err = p.Images(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	disk := images[slices.IndexFunc(images, func(i peer.Image) bool { return i.Name == "disk" })].Device
	got := make([]byte, 4096)
	for _, fault := range []testregistry.Fault{{Hang: true}, {Status: 500}, {Corrupt: true}} {
		front.Set(&fault)
		start := time.Now()
		if _, err := disk.ReadAt(make([]byte, demandChunks*leastChunkSize), 3<<20); err == nil || time.Since(start) > 20*time.Second {
			t.Errorf("%+v: read after %v: %v", fault, time.Since(start), err)
		}
	}
	front.Set(nil)
	if _, err := disk.ReadAt(got, 3<<20); err != nil || !bytes.Equal(got, d["disk"][3<<20:3<<20+4096]) {
		t.Errorf("afterwards: %v", err)
	}
	time.Sleep(time.Second) // what was asked for ahead comes
	before := front.BytesGot.Load()
	if _, err := disk.ReadAt(got, 7<<20); err != nil {
		t.Error(err)
	}
	if n := front.BytesGot.Load() - before; n > demandChunks*leastChunkSize {
		t.Errorf("for a page %d bytes came", n)
	}
	for _, i := range images {
		i.Device.Close()
	}
}

// Registries that have their blobs elsewhere, and lead there, or that know no ranges, or no blobs of others, will do.
func TestOtherRegistries(t *testing.T) {
	alone(t)
	server := testregistry.Start(t, testregistry.Options{User: "joe", Password: "secret"})
	target, err := url.Parse("http://" + server.Address)
	if err != nil {
		t.Fatal(err)
	}
	passOn := &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) {
		r.SetURL(target)
		r.Out.Host = r.In.Host
	}}
	var elsewhere atomic.Int64
	blobs := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { // as a content network, which knows nobody
		elsewhere.Add(1)
		http.ServeFile(w, r, server.Blob(strings.TrimPrefix(r.URL.Path, "/")))
	}))
	defer blobs.Close()
	dir := makePackage(t, sample())
	for name, other := range map[string]func(w http.ResponseWriter, r *http.Request) bool{
		"blobs elsewhere": func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method != http.MethodGet || !strings.Contains(r.URL.Path, "/blobs/") || r.Header.Get("Authorization") == "" {
				return false
			}
			http.Redirect(w, r, strings.Replace(blobs.URL, "127.0.0.1", "localhost", 1)+"/"+path.Base(r.URL.Path), http.StatusTemporaryRedirect)
			return true
		},
		"no ranges": func(_ http.ResponseWriter, r *http.Request) bool {
			r.Header.Del("Range")
			return false
		},
		"no mounts": func(_ http.ResponseWriter, r *http.Request) bool {
			r.URL.RawQuery = strings.ReplaceAll(r.URL.RawQuery, "mount=", "x=")
			return false
		},
	} {
		front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if !other(w, r) {
				passOn.ServeHTTP(w, r)
			}
		}))
		defer front.Close()
		address := strings.TrimPrefix(front.URL, "http://")
		t.Setenv("DOCKER_CONFIG", server.DockerConfig(address))
		tag := strings.ReplaceAll(name, " ", "-")
		first := mustPush(t, dir, reference(t, address+"/vms/"+tag+":1"))
		second := mustPush(t, dir, reference(t, address+"/others/"+tag+":1"), first.Reference)
		if lent := second.Known > 0; lent != (name != "no mounts") {
			t.Errorf("%s: %+v", name, second)
		}
		mustPull(t, second.Reference, dir)
	}
	if elsewhere.Load() == 0 {
		t.Error("nobody was led elsewhere")
	}
}
