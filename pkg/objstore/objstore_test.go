package objstore

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/drafter-vm/drafter/internal/tests3"
	"github.com/drafter-vm/drafter/pkg/block"
)

var quiet = slog.New(slog.DiscardHandler)

func fill(p []byte, seed uint64) []byte {
	c := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), 1})
	_, _ = c.Read(p)
	return p
}

func testKey(t testing.TB, seed byte) *Key {
	k, err := NewKey(bytes.Repeat([]byte{seed}, keySize))
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func open(t testing.TB, endpoint string, change func(*Config)) *Store {
	t.Helper()
	cfg := Config{Location: Location{Endpoint: endpoint, Bucket: tests3.Bucket, Prefix: strings.ReplaceAll(t.Name(), "/", "-")},
		AccessKey: tests3.AccessKey, SecretKey: tests3.SecretKey, Timeout: 5 * time.Second, Logger: quiet}
	if change != nil {
		change(&cfg)
	}
	s, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

func memory(t testing.TB, size int64, data map[int64][]byte) *block.Memory {
	m := block.NewMemory(size)
	for off, p := range data {
		if _, err := m.WriteAt(p, off); err != nil {
			t.Fatal(err)
		}
	}
	return m
}

// The bytes of an object, and of a list, are for ever.
func TestGolden(t *testing.T) {
	content := bytes.Repeat([]byte("drafter "), 200)
	var k *Key
	if got, want := k.idOf([]byte("abc")).String(), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"; got != want {
		t.Errorf("name %s, want %s", got, want)
	}
	packed, err := k.pack("chunks/x", content)
	if err != nil {
		t.Fatal(err)
	}
	if packed[0] != 'D' || packed[1] != 1 || packed[2] != flagZstd || len(packed) > 100 {
		t.Errorf("packed as %x", packed)
	}
	old, err := hex.DecodeString("440100" + hex.EncodeToString([]byte("as it is")))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := k.unpack("chunks/x", old, 8); err != nil || string(got) != "as it is" {
		t.Errorf("got %q, error %v", got, err)
	}
	secret := testKey(t, 7)
	if secret.ID() == "" || secret.ID() == testKey(t, 8).ID() {
		t.Errorf("key %q", secret.ID())
	}
	if got := secret.idOf([]byte("x")).String(); got != goldenName {
		t.Errorf("name with a key: %s, want %s", got, goldenName)
	}
	sealed, err := hex.DecodeString(goldenSealed)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := secret.unpack("chunks/x", sealed, 100); err != nil || string(got) != "as it was" {
		t.Errorf("sealed: got %q, error %v", got, err)
	}
	l := &List{Size: 300 << 10, Chunks: []ID{{1}, Zeros}}
	want := "44524146544c5354 0000000000000001 000000000004b000 01" + strings.Repeat("00", 31) + strings.Repeat("00", 31) + "01"
	if got := hex.EncodeToString(l.encode()); got != strings.ReplaceAll(want, " ", "") {
		t.Errorf("list is %s", got)
	}
}

func TestPacked(t *testing.T) {
	for _, k := range []*Key{nil, testKey(t, 1)} {
		for _, content := range [][]byte{{1}, fill(make([]byte, 70_000), 1), bytes.Repeat([]byte("ab"), 1<<17), make([]byte, 4096)} {
			b, err := k.pack("lists/y", content)
			if err != nil {
				t.Fatal(err)
			}
			got, err := k.unpack("lists/y", b, len(content))
			if err != nil || !bytes.Equal(got, content) {
				t.Errorf("%d bytes: error %v", len(content), err)
			}
			if _, err := k.unpack("lists/y", b, len(content)-1); !errors.Is(err, ErrCorrupt) {
				t.Errorf("%d bytes where less were put: error %v", len(content), err)
			}
			for n := range min(len(b), 200) {
				damaged := bytes.Clone(b)
				damaged[n] ^= 1
				if got, err := k.unpack("lists/y", damaged, len(content)); err == nil && (k != nil || k.idOf(got) == k.idOf(content)) {
					t.Errorf("%d bytes: damage at %d was not noticed", len(content), n)
				}
			}
			if k != nil {
				for name, of := range map[string]*Key{"lists/z": k, "lists/y": testKey(t, 2)} {
					if _, err := of.unpack(name, b, len(content)); !errors.Is(err, ErrCorrupt) {
						t.Errorf("another key or place: error %v", err)
					}
				}
			}
			var other *Key
			if k == nil {
				other = testKey(t, 1)
			}
			if _, err := other.unpack("lists/y", b, len(content)); !errors.Is(err, ErrCorrupt) {
				t.Errorf("with and without a key: error %v", err)
			}
		}
	}
}

func FuzzUnpack(f *testing.F) {
	k := testKey(f, 1)
	for _, of := range []*Key{nil, k} {
		b, err := of.pack("chunks/x", bytes.Repeat([]byte("drafter "), 100))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, of := range []*Key{nil, k} {
			if got, err := of.unpack("chunks/x", b, 4096); err == nil && len(got) > 4096 {
				t.Errorf("got %d bytes", len(got))
			}
		}
	})
}

func FuzzList(f *testing.F) {
	f.Add((&List{Size: 300 << 10, Chunks: []ID{{1}, Zeros}}).encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		l, err := decodeList(b)
		if err == nil && !bytes.Equal(l.encode(), b) {
			t.Error("a list is not what it was")
		}
	})
}

func TestChunkSize(t *testing.T) {
	for size, want := range map[int64]int64{0: 256 << 10, 1: 256 << 10, 256 << 30: 256 << 10, 256<<30 + 1: 512 << 10, 16 << 40: 16 << 20} {
		if got := ChunkSize(size); got != want {
			t.Errorf("chunks of a device of %d bytes have %d, want %d", size, got, want)
		}
	}
	if _, err := NewList(16<<40 + 1); err == nil {
		t.Error("a device that is too large has a list")
	}
}

func TestStore(t *testing.T) {
	server := tests3.Start(t)
	for name, key := range map[string]*Key{"plain": nil, "sealed": testKey(t, 3)} {
		t.Run(name, func(t *testing.T) {
			ctx := t.Context()
			s := open(t, server.Endpoint, func(c *Config) { c.Key = key })
			if err := s.Ping(ctx); err != nil {
				t.Fatal(err)
			}
			size := int64(5<<20 + 4096)
			text := bytes.Repeat([]byte("a secret word "), 20_000)
			d := memory(t, size, map[int64][]byte{0: fill(make([]byte, 300_000), 1), 3 << 20: text, size - 10: []byte("0123456789")})
			l, err := s.PutDevice(ctx, d, PutOptions{})
			if err != nil {
				t.Fatal(err)
			}
			id, err := s.PutList(ctx, l)
			if err != nil {
				t.Fatal(err)
			}
			objects := server.Objects(filepath.Join(s.cfg.Prefix, "chunks"))
			if len(objects) != 5 {
				t.Errorf("%d chunks were put, want 5", len(objects))
			}
			for _, path := range objects {
				b, err := os.ReadFile(path)
				if err != nil {
					t.Fatal(err)
				}
				if len(b) < 10_000 && bytes.Contains(b, []byte("secret")) && key != nil {
					t.Error("an object shows what it holds")
				}
			}

			other := open(t, server.Endpoint, func(c *Config) { c.Key, c.Prefix = key, s.cfg.Prefix })
			got, err := other.GetList(ctx, id, size)
			if err != nil {
				t.Fatal(err)
			}
			image, err := other.OpenImage(t.Context(), got)
			if err != nil {
				t.Fatal(err)
			}
			defer image.Close()
			if equal, at, err := block.Equal(ctx, d, image); err != nil || !equal {
				t.Errorf("differs at %d (%v)", at, err)
			}
			if r, err := block.NextData(image, 2<<20); err != nil || r.Offset != 3<<20 {
				t.Errorf("data from 2 MiB on is at %d (%v)", r.Offset, err)
			}
			if _, err := other.GetList(ctx, id, size+1); err == nil {
				t.Error("a list is of a device of another size")
			}

			// A device that differs a little.
			if _, err := d.WriteAt([]byte("changed"), 1<<20); err != nil {
				t.Fatal(err)
			}
			put := int64(0)
			again, err := other.PutDevice(ctx, d, PutOptions{Before: l, Progress: func(_, n int64) { put = n },
				Changed: func(off int64) (block.Range, error) {
					if off > 1<<20 {
						return block.Range{}, io.EOF
					}
					return block.Range{Offset: 1 << 20, Length: 7}, nil
				}})
			if err != nil || put != 256<<10 {
				t.Errorf("%d bytes were put again (%v)", put, err)
			}
			whole, err := s.PutDevice(ctx, d, PutOptions{})
			if err != nil || fmt.Sprint(whole) != fmt.Sprint(again) {
				t.Errorf("what changed, and all, are two things (%v)", err)
			}
			if err := s.Get(ctx, ID{9}, make([]byte, 10)); !errors.Is(err, ErrNotFound) {
				t.Errorf("what is not there: error %v", err)
			}
		})
	}
}

func TestOpenMistakes(t *testing.T) {
	server := tests3.Start(t)
	for _, c := range []struct {
		change     func(*Config)
		open, ping string
	}{
		{func(c *Config) { c.Bucket = "" }, "there is no bucket", ""},
		{func(c *Config) { c.Bucket = "a/b" }, `bucket "a/b"`, ""},
		{func(c *Config) { c.Endpoint = "s3.example:9000" }, "http://HOST:PORT", ""},
		{func(c *Config) { c.Endpoint = "http://host/path" }, "without a path", ""},
		{func(c *Config) { c.SecretKey = "" }, "both the access key and the secret key", ""},
		{func(c *Config) { c.Concurrency = -1 }, "concurrency -1", ""},
		{func(c *Config) { c.Bucket = "nowhere" }, "", `there is no bucket "nowhere"`},
		{func(c *Config) { c.SecretKey = "wrong" }, "", "check the access key"},
		{func(c *Config) { c.Endpoint = "http://127.0.0.1:1" }, "", "refused"},
	} {
		cfg := Config{Location: Location{Endpoint: server.Endpoint, Bucket: tests3.Bucket}, AccessKey: tests3.AccessKey, SecretKey: tests3.SecretKey, Timeout: 5 * time.Second}
		c.change(&cfg)
		s, err := Open(cfg)
		if err == nil && c.ping != "" {
			err = s.Ping(t.Context())
		}
		if want := c.open + c.ping; err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got error %v, want %q", err, want)
		}
		if err != nil && strings.Contains(err.Error(), tests3.SecretKey) {
			t.Errorf("an error shows a secret: %v", err)
		}
	}
}

// Whatever the server does, what comes is what was put, or an error.
func TestFaults(t *testing.T) {
	server := tests3.Start(t)
	proxy := server.Front(t)
	s := open(t, proxy.Endpoint, func(c *Config) { c.Timeout = time.Second })
	ctx := t.Context()
	content := fill(make([]byte, 256<<10), 4)
	id, err := s.Put(ctx, content)
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, len(content))
	get := func() error {
		clear(p)
		err := s.Get(ctx, id, p)
		if err == nil && !bytes.Equal(p, content) {
			t.Error("got something else")
		}
		return err
	}
	if err := get(); err != nil {
		t.Fatal(err)
	}
	of := tests3.Of(http.MethodGet, "chunks")
	for name, f := range map[string]*tests3.Fault{
		"hangs": {Hang: true, Match: of}, "fails": {Status: 500, Match: of}, "is unavailable": {Status: 503, Match: of}, "corrupts": {Corrupt: true, Match: of},
		"cuts": {Cut: true, Match: of}, "forbids": {Status: 403, Match: of},
	} {
		proxy.Set(f)
		if err := get(); err == nil {
			t.Errorf("a server that %s: no error", name)
		} else {
			t.Logf("a server that %s: %v", name, err)
		}
	}
	proxy.Set(&tests3.Fault{Delay: 100 * time.Millisecond})
	if err := get(); err != nil {
		t.Errorf("a slow server: %v", err)
	}
	proxy.Set(nil)
	if err := os.Remove(server.Objects(filepath.Join(s.cfg.Prefix, "chunks"))[0]); err != nil {
		t.Fatal(err)
	}
	if err := get(); !errors.Is(err, ErrNotFound) {
		t.Errorf("what was removed: error %v", err)
	}
	proxy.Set(&tests3.Fault{Status: 500, Match: tests3.Of(http.MethodPut, "chunks")})
	if _, err := s.Put(ctx, fill(make([]byte, 4096), 5)); err == nil {
		t.Error("what could not be put was put")
	}
}

func TestRootsAndGarbage(t *testing.T) {
	server := tests3.Start(t)
	ctx := t.Context()
	key := testKey(t, 4)
	s := open(t, server.Endpoint, func(c *Config) { c.Key = key })
	root := func(seed uint64, expires *time.Time, name ...string) {
		d := memory(t, 1<<20, map[int64][]byte{0: fill(make([]byte, 4096), seed), 300 << 10: []byte("the same in all")})
		l, err := s.PutDevice(ctx, d, PutOptions{})
		if err != nil {
			t.Fatal(err)
		}
		id, err := s.PutList(ctx, l)
		if err != nil {
			t.Fatal(err)
		}
		r := &Root{Time: time.Now(), Expires: expires, Devices: []RootDevice{{"disk", 1 << 20, id.String()}}, Body: []byte(`{"a":1}`)}
		if err := s.PutRoot(ctx, r, name...); err != nil {
			t.Fatal(err)
		}
	}
	past := time.Now().Add(-time.Minute)
	root(1, nil, "backups", "a", "1")
	root(2, nil, "backups", "a", "2")
	root(3, nil, "backups", "b", "1")
	root(4, &past, "sync", "x")
	names, err := s.Roots(ctx, "backups")
	if err != nil || fmt.Sprint(names) != "[[a 1] [a 2] [b 1]]" {
		t.Errorf("roots %v (%v)", names, err)
	}
	if r, err := s.GetRoot(ctx, "backups", "a", "2"); err != nil || r.Device("disk").Size != 1<<20 || r.Device("other") != nil || string(r.Body) != `{"a":1}` {
		t.Errorf("got %+v (%v)", r, err)
	}
	if _, err := s.GetRoot(ctx, "backups", "..", "x"); err == nil {
		t.Error("a root has a name that leads elsewhere")
	}
	if err := s.RemoveRoot(ctx, "backups", "a", "1"); err != nil {
		t.Fatal(err)
	}
	c, err := s.Collect(ctx, CollectOptions{})
	if err != nil || c.Garbage != 0 || c.Expired != 1 || c.Young != 4 { // each a list and a chunk
		t.Errorf("collected %+v (%v)", c, err)
	}
	for _, dry := range []bool{true, false, false} {
		c, err = s.Collect(ctx, CollectOptions{Grace: time.Nanosecond, DryRun: dry})
		t.Logf("%+v", c)
		if err != nil {
			t.Fatal(err)
		}
	}
	if c.Garbage != 0 || c.Expired != 0 || c.Roots != 2 || c.Lists != 2 || c.Chunks != 3 {
		t.Errorf("in the end: %+v", c)
	}
	for _, name := range [][]string{{"a", "2"}, {"b", "1"}} {
		r, err := s.GetRoot(ctx, "backups", name[0], name[1])
		if err != nil {
			t.Fatal(err)
		}
		id, _ := ParseID(r.Devices[0].List)
		l, err := s.GetList(ctx, id, 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		image, err := s.OpenImage(t.Context(), l)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := image.ReadAt(make([]byte, 1<<20), 0); err != nil {
			t.Errorf("what is needed was removed: %v", err)
		}
		image.Close()
	}
	// What was removed is put again, though it was seen to be there.
	root(1, nil, "backups", "a", "3")
	if c, err := s.Collect(ctx, CollectOptions{}); err != nil || c.Chunks != 4 {
		t.Errorf("put again: %+v (%v)", c, err)
	}
	// Who cannot read the roots removes nothing.
	blind := open(t, server.Endpoint, func(c *Config) { c.Prefix = s.cfg.Prefix })
	before := len(server.Objects(s.cfg.Prefix))
	if _, err := blind.Collect(ctx, CollectOptions{Grace: time.Nanosecond}); !errors.Is(err, ErrCorrupt) || len(server.Objects(s.cfg.Prefix)) != before {
		t.Errorf("collected without the key: %v", err)
	}
}

// syncing runs a syncer until the test ends, or the returned function is called.
func syncing(t *testing.T, cfg SyncConfig) (*Syncer, func()) {
	t.Helper()
	cfg.Logger = quiet
	s, err := NewSyncer(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var g sync.WaitGroup
	g.Go(func() {
		if err := s.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	stop := func() { cancel(); g.Wait() }
	t.Cleanup(stop)
	return s, stop
}

func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	for range 500 {
		if f() {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Fatalf("never: %s", what)
}

func TestSyncer(t *testing.T) {
	server := tests3.Start(t)
	for _, tracked := range []bool{true, false} {
		t.Run(fmt.Sprintf("tracked=%t", tracked), func(t *testing.T) {
			proxy := server.Front(t)
			store := open(t, proxy.Endpoint, nil)
			const size = 4<<20 + 4096
			m := block.NewTracked(memory(t, size, map[int64][]byte{0: fill(make([]byte, 1<<20), 1), 2 << 20: fill(make([]byte, 9000), 2), size - 5: []byte("12345")}))
			held := block.NewMemory(size) // what the callback says
			cfg := SyncConfig{Store: store, Device: m, Quiet: 100 * time.Millisecond, Stored: func(off int64, p []byte) {
				if _, err := held.WriteAt(p, off); err != nil {
					t.Error(err)
				}
			}}
			if tracked {
				cfg.Writes = m
			}
			s, stop := syncing(t, cfg)
			all := func() bool { st := s.Stats(); return st.Stored == st.Chunks }
			eventually(t, "all is stored", all)
			if n := len(server.Objects(filepath.Join(store.cfg.Prefix, "chunks"))); n != 6 {
				t.Errorf("%d chunks were put, want 6", n)
			}

			// What is written all the time is not put; what is written once is.
			puts := proxy.Puts.Load()
			end := time.Now().Add(700 * time.Millisecond)
			for n := uint64(0); time.Now().Before(end); n++ {
				if _, err := m.WriteAt(fill(make([]byte, 100), n), 3<<20); err != nil {
					t.Fatal(err)
				}
				time.Sleep(5 * time.Millisecond)
			}
			if n := proxy.Puts.Load() - puts; n > 1 {
				t.Errorf("what was written for 700 ms was put %d times", n)
			}
			if _, err := m.WriteAt([]byte("once"), 100); err != nil {
				t.Fatal(err)
			}
			time.Sleep(50 * time.Millisecond) // or it is noticed after the next look
			eventually(t, "all is stored", func() bool { time.Sleep(300 * time.Millisecond); return all() })

			snap, err := s.Snapshot(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			id, err := store.PutList(t.Context(), snap.List)
			if err != nil {
				t.Fatal(err)
			}
			l, err := store.GetList(t.Context(), id, size)
			if err != nil {
				t.Fatal(err)
			}
			f := store.Fetch(l)
			for n, r := range f.Chunks() {
				p, want := make([]byte, r.Length), make([]byte, r.Length)
				if err := f.Fetch(t.Context(), n, p); err != nil {
					t.Fatal(err)
				}
				_, _ = m.ReadAt(want, r.Offset)
				if !bytes.Equal(p, want) || !f.Is(n, want) {
					t.Errorf("what is stored at %d is another", r.Offset)
				}
			}
			if equal, at, err := block.Equal(t.Context(), m, held); err != nil || !equal {
				t.Errorf("what it was told is stored differs at %d (%v)", at, err)
			}
			if tracked {
				if r, err := snap.Changed(0); !errors.Is(err, io.EOF) {
					t.Errorf("changed since: %v (%v)", r, err)
				}
				if _, err := m.WriteAt([]byte("late"), 2<<20+4); err != nil {
					t.Fatal(err)
				}
				if r, err := snap.Changed(5); err != nil || r != (block.Range{Offset: 2 << 20, Length: 256 << 10}) {
					t.Errorf("changed since: %v (%v)", r, err)
				}
			}
			puts = proxy.Puts.Load()
			time.Sleep(250 * time.Millisecond)
			if proxy.Puts.Load() != puts {
				t.Error("something was put after the snapshot")
			}
			s.Resume()

			// A store that fails delays nobody, and is caught up with.
			proxy.Set(&tests3.Fault{Status: 500})
			if _, err := m.WriteAt([]byte("meanwhile"), 1<<20); err != nil {
				t.Fatal(err)
			}
			eventually(t, "it says that it fails", func() bool { return s.Stats().Failing != nil })
			proxy.Set(nil)
			eventually(t, "it has caught up", func() bool { return s.Stats().Failing == nil && all() })
			stop()
		})
	}
}

// What has gone from the store, though it was there, is noticed by who is to refer to it, and put again by who has it.
func TestLost(t *testing.T) {
	server := tests3.Start(t)
	store := open(t, server.Endpoint, nil)
	ctx := t.Context()
	m := block.NewTracked(memory(t, 1<<20, map[int64][]byte{0: fill(make([]byte, 4096), 1), 600 << 10: fill(make([]byte, 4096), 2)}))
	before, err := store.PutDevice(ctx, m, PutOptions{})
	if err != nil {
		t.Fatal(err)
	}
	lose := func() {
		t.Helper()
		for _, path := range server.Objects(filepath.Join(store.cfg.Prefix, "chunks")) {
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
		}
		store.mu.Lock()
		clear(store.seen) // as after a while
		store.mu.Unlock()
	}
	nothing := func(int64) (block.Range, error) { return block.Range{}, io.EOF }
	if _, err := store.PutDevice(ctx, m, PutOptions{Before: before, Changed: nothing}); err != nil {
		t.Error(err)
	}
	lose()
	if _, err := store.PutDevice(ctx, m, PutOptions{Before: before, Changed: nothing}); !errors.Is(err, ErrNotFound) {
		t.Errorf("what is not there any more is referred to: %v", err)
	}
	s, _ := syncing(t, SyncConfig{Store: store, Device: m, Writes: m, Quiet: 20 * time.Millisecond})
	all := func() bool { st := s.Stats(); return st.Waiting == 0 }
	eventually(t, "all is stored", all)
	// What is found to be gone between a snapshot and the move that it is for is what has changed since then all the same.
	snap, err := s.Snapshot(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.WriteAt([]byte("a late write"), 4097); err != nil {
		t.Fatal(err)
	}
	lose()
	if err := s.Verify(ctx); err != nil {
		t.Fatal(err)
	}
	if r, err := snap.Changed(0); err != nil || r.Offset != 0 {
		t.Errorf("changed since the snapshot: %v (%v)", r, err)
	}
	s.Resume()
	eventually(t, "all is stored again", func() bool {
		return all() && len(server.Objects(filepath.Join(store.cfg.Prefix, "chunks"))) == 2
	})

	// One that is damaged was seen to be so, and is put again though it is there.
	path := server.Objects(filepath.Join(store.cfg.Prefix, "chunks"))[0]
	if err := os.WriteFile(path, []byte("something else"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, id := range s.List().Chunks {
		if id != Zeros {
			_ = store.Get(ctx, id, make([]byte, 256<<10))
		}
	}
	if _, err := store.Put(ctx, fill(make([]byte, 4096), 9)); err != nil { // it is not forgotten over that
		t.Fatal(err)
	}
	again, err := store.PutDevice(ctx, m, PutOptions{})
	if err != nil {
		t.Fatal(err)
	}
	image, err := store.OpenImage(ctx, again)
	if err != nil {
		t.Fatal(err)
	}
	defer image.Close()
	if equal, at, err := block.Equal(ctx, image, m); err != nil || !equal {
		t.Errorf("differs at %d (%v)", at, err)
	}
}

// A server that says more than there is to say is not listened to.
func TestEndless(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var sent atomic.Int64
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Query().Has("location") {
			w.WriteHeader(http.StatusForbidden)
		}
		for p := bytes.Repeat([]byte("<a>"), 10_000); r.Context().Err() == nil; {
			n, err := w.Write(p)
			if sent.Add(int64(n)); err != nil {
				return
			}
		}
	})}
	go func() { _ = server.Serve(l) }() // ends with Close
	defer server.Close()
	s := open(t, "http://"+l.Addr().String(), func(c *Config) { c.Timeout = 2 * time.Second })
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	if _, err := s.GetList(t.Context(), ID{1}, 4096); err == nil {
		t.Error("there is a list")
	}
	if err := s.Ping(t.Context()); err == nil {
		t.Error("there is a bucket")
	}
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; n > 1<<30 {
		t.Errorf("%d bytes were allocated for %d that were sent", n, sent.Load())
	}
}

// Nobody waits for what is being put when the VM is to move: that is cut short, and put later.
func TestSnapshotCuts(t *testing.T) {
	server := tests3.Start(t)
	for _, tracked := range []bool{true, false} {
		t.Run(fmt.Sprintf("tracked=%t", tracked), func(t *testing.T) {
			proxy := server.Front(t)
			store := open(t, proxy.Endpoint, func(c *Config) { c.Concurrency = 4 })
			if err := store.Ping(t.Context()); err != nil { // it knows the bucket's region from here on
				t.Fatal(err)
			}
			const size = 4 << 20
			m := block.NewTracked(memory(t, size, map[int64][]byte{0: fill(make([]byte, size), 3)}))
			cfg := SyncConfig{Store: store, Device: m, Quiet: 50 * time.Millisecond}
			if tracked {
				cfg.Writes = m
			}
			proxy.Set(&tests3.Fault{Hang: true, Match: tests3.Of(http.MethodPut, "chunks")})
			s, _ := syncing(t, cfg)
			eventually(t, "something is being put", func() bool { return proxy.Puts.Load() > 0 })
			began := time.Now()
			snap, err := s.Snapshot(t.Context())
			took := time.Since(began)
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("a snapshot took %v", took)
			if took > time.Second {
				t.Errorf("a snapshot took %v", took)
			}
			if tracked {
				for _, r := range snap.Stored {
					if c, err := snap.Changed(r.Offset); err == nil && c.Offset < r.End() {
						t.Errorf("%v is stored, and changed since: %v", r, c)
					}
				}
			}
			if err := s.Stats().Failing; err != nil {
				t.Errorf("it says that it fails: %v", err)
			}
			proxy.Set(nil)
			s.Resume()
			eventually(t, "all is stored", func() bool { st := s.Stats(); return st.Stored == st.Chunks })
		})
	}
}
