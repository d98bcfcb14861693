package ram

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestHandle(t *testing.T) {
	const size = 1 << 20
	m, err := Create("handle-test", size)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if _, err := m.Device().WriteAt([]byte("here"), 4096); err != nil {
		t.Fatal(err)
	}
	handle, err := m.Handle()
	if err != nil {
		t.Fatal(err)
	}
	f, err := OpenHandle(os.Getpid(), handle, size)
	if err != nil {
		t.Fatal(err)
	}
	other, err := Open(f)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	p := make([]byte, 4)
	if _, err := other.Device().ReadAt(p, 4096); err != nil || string(p) != "here" {
		t.Errorf("it holds %q, %v", p, err)
	}
}

// Memory of which something has not arrived has no handle: to another process its holes would be zeros.
func TestHandleUnfilled(t *testing.T) {
	m, err := Create("handle-test", 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	check := func(when string, want bool) {
		t.Helper()
		if _, err := m.Handle(); (err == nil) != want || err != nil && !errors.Is(err, ErrShared) {
			t.Errorf("%s: %v", when, err)
		}
	}
	f := &Filler{done: make(chan struct{})}
	m.filler.Store(f)
	check("it is being filled", false)
	close(f.done)
	check("it was filled", true)
	f.err = os.ErrClosed
	check("filling has failed", false)
	m.filler.Store(nil)
	check("nothing is to come", true)
	m.unfilled.Store(true)
	check("an ended process has left it unfilled", false)
	m.unfilled.Store(false)
}

// What a handle leads to is not opened unless it is what it has to be.
func TestOpenHandleRefuses(t *testing.T) {
	const size = 1 << 20
	m, err := Create("handle-test", size)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	good, err := m.Handle()
	if err != nil {
		t.Fatal(err)
	}
	fd, _, _ := strings.Cut(good, ":")

	named := func(f *os.File) string {
		var stat unix.Stat_t
		if err := unix.Fstat(int(f.Fd()), &stat); err != nil {
			t.Fatal(err)
		}
		return fmt.Sprintf("%d:%d", f.Fd(), stat.Ino)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	file, err := os.Create(filepath.Join(t.TempDir(), "file"))
	if err == nil {
		err = file.Truncate(size)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	memfd, err := unix.MemfdCreate("unsealed", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err == nil {
		err = unix.Ftruncate(memfd, size)
	}
	if err != nil {
		t.Fatal(err)
	}
	unsealed := os.NewFile(uintptr(memfd), "unsealed")
	defer unsealed.Close()

	for _, tt := range []struct {
		name, handle string
		pid          int
		size         int64
	}{
		{"nothing", "", os.Getpid(), size},
		{"a path", "../../etc/passwd:1", os.Getpid(), size},
		{"a sign", "-1:1", os.Getpid(), size},
		{"no such descriptor", "99999:1", os.Getpid(), size},
		{"a huge inode", fd + ":99999999999999999999", os.Getpid(), size},
		{"another inode", fd + ":1", os.Getpid(), size},
		{"another size", good, os.Getpid(), 2 * size},
		{"another process", good, 1 << 22, size},
		{"a pipe", named(r), os.Getpid(), size},
		{"a file", named(file), os.Getpid(), size},
		{"unsealed", named(unsealed), os.Getpid(), size},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f, err := OpenHandle(tt.pid, tt.handle, tt.size)
			if !errors.Is(err, ErrShared) {
				t.Errorf("got %v", err)
			}
			if f != nil {
				f.Close()
			}
		})
	}
}
