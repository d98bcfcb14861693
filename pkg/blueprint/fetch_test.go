package blueprint

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/ProtonMail/go-crypto/openpgp"
	"github.com/ProtonMail/go-crypto/openpgp/armor"
	"github.com/ProtonMail/go-crypto/openpgp/clearsign"
)

func sumOf(data []byte) string {
	s := sha256.Sum256(data)
	return hex.EncodeToString(s[:])
}

// fakeArchive is a Debian archive of one suite, signed with a key of its own.
type fakeArchive struct {
	*httptest.Server
	key *openpgp.Entity

	mu    sync.Mutex // guards files
	files map[string][]byte
}

func newFakeArchive(t *testing.T) *fakeArchive {
	key, err := openpgp.NewEntity("Test Archive", "", "archive@example.org", nil)
	must(t, err)
	a := &fakeArchive{key: key, files: map[string][]byte{}}
	a.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		a.mu.Lock()
		data, ok := a.files[strings.TrimPrefix(r.URL.Path, "/debian/")]
		a.mu.Unlock()
		if !ok {
			http.NotFound(w, r)
			return
		}
		w.Write(data)
	}))
	t.Cleanup(a.Close)
	return a
}

// publish replaces the archive's content by the packages, name → version, all of them essential or wanted by every guest.
func (a *fakeArchive) publish(t *testing.T, versions map[string]string) {
	t.Helper()
	files := map[string][]byte{}
	var index strings.Builder
	for _, name := range slices.Sorted(maps.Keys(versions)) {
		body := []byte("deb of " + name + " " + versions[name])
		p := "pool/" + name + "_" + versions[name] + ".deb"
		files[p] = body
		depends := ""
		if name == "linux-image-cloud-amd64" {
			depends = "Depends: linux-image-1\n"
		}
		fmt.Fprintf(&index, "Package: %s\nVersion: %s\nArchitecture: all\n%sFilename: %s\nSize: %d\nSHA256: %s\n\n", name, versions[name], depends, p, len(body), sumOf(body))
	}
	var packed bytes.Buffer
	z := gzip.NewWriter(&packed)
	_, err := z.Write([]byte(index.String()))
	must(t, err)
	must(t, z.Close())
	files["dists/bookworm/main/binary-amd64/Packages.gz"] = packed.Bytes()
	var signed bytes.Buffer
	w, err := clearsign.Encode(&signed, a.key.PrivateKey, nil)
	must(t, err)
	fmt.Fprintf(w, "Suite: bookworm\nSHA256:\n %s %d main/binary-amd64/Packages.gz\n", sumOf(packed.Bytes()), packed.Len())
	must(t, w.Close())
	files["dists/bookworm/InRelease"] = signed.Bytes()
	a.mu.Lock()
	defer a.mu.Unlock()
	a.files = files
}

// aptDir writes an apt configuration that knows the archive and its key.
func (a *fakeArchive) aptDir(t *testing.T) string {
	t.Helper()
	var key bytes.Buffer
	w, err := armor.Encode(&key, openpgp.PublicKeyType, nil)
	must(t, err)
	must(t, a.key.Serialize(w))
	must(t, w.Close())
	dir := t.TempDir()
	must(t, os.Mkdir(filepath.Join(dir, "sources.list.d"), 0o755))
	lines := strings.ReplaceAll(strings.ReplaceAll(strings.TrimSpace(key.String()), "\n\n", "\n.\n"), "\n", "\n ")
	must(t, os.WriteFile(filepath.Join(dir, "sources.list.d", "x.sources"), []byte("Types: deb\nURIs: "+a.URL+"/debian\nSuites: bookworm\nComponents: main\nSigned-By:\n "+lines+"\n"), 0o644))
	return dir
}

func basics() map[string]string {
	v := map[string]string{"busybox-static": "1", "libarchive13": "1", "linux-image-cloud-amd64": "1", "linux-image-1": "1", "app": "1.0"}
	for _, name := range basePackages {
		v[name] = "1"
	}
	v["e2fsprogs"] = "1.47.2"
	return v
}

func newTestBuild(t *testing.T, a *fakeArchive, cfg Config) *build {
	t.Helper()
	c, err := newCache(t.TempDir())
	must(t, err)
	cfg.AptDir, cfg.Suite, cfg.Arch, cfg.KernelPackage, cfg.Packages = a.aptDir(t), "bookworm", "amd64", "linux-image-cloud-amd64", []string{"app"}
	cfg.Lock = "x.lock"
	return &build{cfg: cfg, cache: c, log: slog.New(slog.DiscardHandler)}
}

func versionOf(l *lockFile, name string) string {
	for _, p := range l.all() {
		if p.Name == name {
			return p.Version
		}
	}
	return ""
}

func TestLockFollowsTheArchive(t *testing.T) {
	a := newFakeArchive(t)
	a.publish(t, basics())
	b := newTestBuild(t, a, Config{})
	first, err := b.settleLock(t.Context(), &lockFile{})
	must(t, err)
	if got := versionOf(first, "linux-image-1"); got != "1" {
		t.Errorf("the kernel behind the meta package has version %q", got)
	}

	newer := basics()
	newer["app"], newer["kmod"] = "1.1", "2"

	t.Run("what is in the cache needs no archive", func(t *testing.T) {
		a.publish(t, newer)
		again, err := b.settleLock(t.Context(), first)
		must(t, err)
		if !bytes.Equal(again.text(), first.text()) {
			t.Errorf("the lock changed:\n%s", again.text())
		}
	})
	t.Run("a stale lock is an error when locked", func(t *testing.T) {
		b := newTestBuild(t, a, Config{Locked: true})
		if _, err := b.settleLock(t.Context(), first); err == nil || !strings.Contains(err.Error(), "app 1.0") || !strings.Contains(err.Error(), "--locked") {
			t.Errorf("got error %v", err)
		}
	})
	t.Run("a stale lock is chosen anew", func(t *testing.T) {
		var log bytes.Buffer
		b := newTestBuild(t, a, Config{})
		b.log = slog.New(slog.NewTextHandler(&log, nil))
		again, err := b.settleLock(t.Context(), first)
		must(t, err)
		if versionOf(again, "app") != "1.1" || versionOf(again, "kmod") != "2" || versionOf(again, "apt") != "1" {
			t.Errorf("got\n%s", again.text())
		}
		if !strings.Contains(log.String(), "app 1.0") {
			t.Errorf("the warning names no package: %s", log.String())
		}
	})
	t.Run("another request keeps what it can", func(t *testing.T) {
		both := newer
		a.publish(t, both)
		b := newTestBuild(t, a, Config{Locked: true})
		b.cfg.Packages = []string{"app", "apt"}
		if _, err := b.settleLock(t.Context(), first); err == nil || !strings.Contains(err.Error(), "for the request") {
			t.Errorf("got error %v", err)
		}
	})
	t.Run("update", func(t *testing.T) {
		b.cfg.UpdateLock = true
		again, err := b.settleLock(t.Context(), first)
		must(t, err)
		if versionOf(again, "app") != "1.1" {
			t.Errorf("got\n%s", again.text())
		}
		b.cfg.UpdateLock = false
	})
}

func TestFetchErrors(t *testing.T) {
	a := newFakeArchive(t)
	a.publish(t, basics())
	b := newTestBuild(t, a, Config{})
	lock, err := b.settleLock(t.Context(), &lockFile{})
	must(t, err)

	t.Run("corrupt download", func(t *testing.T) {
		b := newTestBuild(t, a, Config{})
		a.mu.Lock()
		a.files["pool/app_1.0.deb"] = []byte("deb of app 6.6") // as long as it should be
		a.mu.Unlock()
		if _, err := b.settleLock(t.Context(), lock); err == nil || !strings.Contains(err.Error(), "is corrupt") || !strings.Contains(err.Error(), "app_1.0.deb") {
			t.Errorf("got error %v", err)
		}
		left, err := filepath.Glob(filepath.Join(b.cache.dir, "sha256", ".*"))
		must(t, err)
		if len(left) > 0 {
			t.Errorf("%q are left in the cache", left)
		}
		a.publish(t, basics())
	})
	t.Run("wrong key", func(t *testing.T) {
		other := newFakeArchive(t)
		other.files = a.files
		b := newTestBuild(t, other, Config{}) // other's key, a's signature
		if _, err := b.settleLock(t.Context(), &lockFile{}); err == nil || !strings.Contains(err.Error(), "bad signature") {
			t.Errorf("got error %v", err)
		}
	})
	t.Run("tampered index", func(t *testing.T) {
		a.mu.Lock()
		a.files["dists/bookworm/InRelease"] = bytes.Replace(a.files["dists/bookworm/InRelease"], []byte("Suite: bookworm"), []byte("Suite: evilsuit"), 1)
		a.mu.Unlock()
		b := newTestBuild(t, a, Config{})
		if _, err := b.settleLock(t.Context(), &lockFile{}); err == nil || !strings.Contains(err.Error(), "bad signature") {
			t.Errorf("got error %v", err)
		}
		a.publish(t, basics())
	})
	t.Run("login page", func(t *testing.T) {
		a.mu.Lock()
		a.files["dists/bookworm/InRelease"] = []byte("<html>please log in</html>")
		a.mu.Unlock()
		b := newTestBuild(t, a, Config{})
		if _, err := b.settleLock(t.Context(), &lockFile{}); err == nil || !strings.Contains(err.Error(), "not a signed file") {
			t.Errorf("got error %v", err)
		}
		a.publish(t, basics())
	})
	t.Run("unreachable", func(t *testing.T) {
		closed := httptest.NewServer(nil)
		closed.Close()
		b := newTestBuild(t, a, Config{Mirror: closed.URL + "/debian"})
		if _, err := b.settleLock(t.Context(), &lockFile{}); err == nil || !strings.Contains(err.Error(), "reach mirror") || !strings.Contains(err.Error(), "--mirror") {
			t.Errorf("got error %v", err)
		}
	})
	t.Run("cancelled", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		b := newTestBuild(t, a, Config{})
		if _, err := b.settleLock(ctx, &lockFile{}); !errors.Is(err, context.Canceled) {
			t.Errorf("got error %v", err)
		}
	})
	t.Run("unknown package", func(t *testing.T) {
		b := newTestBuild(t, a, Config{})
		b.cfg.Packages = []string{"appp"}
		if _, err := b.settleLock(t.Context(), &lockFile{}); err == nil || !strings.Contains(err.Error(), `did you mean "app"`) {
			t.Errorf("got error %v", err)
		}
	})
}
