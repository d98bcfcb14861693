package expose

import (
	"bytes"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/block/blocktest"
)

// needFUSE skips a test where file systems cannot be mounted.
func needFUSE(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	if _, err := os.Stat(fuseDevice); err != nil {
		t.Skipf("there is no FUSE here: %v", err)
	}
}

// mounted mounts exports for the duration of a test.
func mounted(t testing.TB, exports ...Export) *Mount {
	t.Helper()
	needFUSE(t)
	m, err := MountFUSE(filepath.Join(t.TempDir(), "mnt"), exports, FUSEOptions{Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
		if _, err := os.Lstat(m.Dir()); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the folder that was made for the mount is still there: %v", err)
		}
	})
	// The Go runtime asks whether it can wait for a file with a call that keeps a processor: only in a test does a process
	// open its own mount, and this first question, from a call that keeps none, spares it that.
	if len(exports) > 0 {
		fd, err := unix.Open(m.Path(exports[0].Name), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0); err != nil {
			t.Fatal(err)
		}
		if err := unix.Close(fd); err != nil {
			t.Fatal(err)
		}
	}
	return m
}

// TestFUSEDevice runs the suite of block devices on a file of the mount.
func TestFUSEDevice(t *testing.T) {
	for _, size := range []int64{1 << 20, 1<<20 + 12345} {
		blocktest.Run(t, func(t *testing.T) block.Device {
			m := mounted(t, Export{Name: "disk", Device: block.NewMemory(size)})
			f, err := block.OpenFile(m.Path("disk"), block.FileOptions{})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = f.Close() })
			if f.Size() != size {
				t.Errorf("the file has %d bytes, want %d", f.Size(), size)
			}
			return f
		}, blocktest.Reopen(func(t *testing.T, d block.Device) block.Device {
			f, err := block.OpenFile(d.(*block.File).Path(), block.FileOptions{})
			if err != nil {
				t.Fatal(err)
			}
			return f
		}))
	}
}

// TestFUSEFolder looks at the folder as other programs do.
func TestFUSEFolder(t *testing.T) {
	d := block.NewMemory(3 << 20)
	var exports []Export
	var want []string
	for i := range 300 { // more than one answer holds
		name := "device-" + strings.Repeat("x", 60) + strconv.Itoa(i)
		want = append(want, name)
		exports = append(exports, Export{Name: name, Device: d, ReadOnly: i == 0})
	}
	m := mounted(t, exports...)
	for _, args := range [][]string{{"ls", m.Dir()}, {"ls", "-la", m.Dir()}} {
		out, err := exec.Command(args[0], args[1:]...).Output()
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{want[0], want[299]} {
			if !strings.Contains(string(out), name) {
				t.Errorf("%q does not list %q", args, name)
			}
		}
	}
	entries, err := os.ReadDir(m.Dir())
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range entries {
		got = append(got, e.Name())
	}
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("%d entries, want %d", len(got), len(want))
	}
	info, err := os.Stat(m.Path(want[1]))
	if err != nil || info.Size() != 3<<20 || info.Mode() != 0o600 {
		t.Errorf("stat: %v, %v; want a file of 3 MiB with mode 0600", info, err)
	}

	file := m.Path(exports[1].Name)
	for what, err := range map[string]error{
		"create":      os.WriteFile(m.Path("new"), nil, 0o600),
		"mkdir":       os.Mkdir(m.Path("new"), 0o700),
		"remove":      os.Remove(file),
		"rename":      os.Rename(file, m.Path("new")),
		"link":        os.Link(file, m.Path("new")),
		"symlink":     os.Symlink(file, m.Path("new")),
		"truncate":    os.Truncate(file, 1),
		"enlarge":     os.Truncate(file, 4<<20),
		"chmod":       os.Chmod(file, 0o644),
		"chmod a dir": os.Chmod(m.Dir(), 0o777),
	} {
		if !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.EACCES) {
			t.Errorf("%s: error %v, want EPERM", what, err)
		}
	}
	if err := os.Truncate(file, 3<<20); err != nil {
		t.Errorf("truncate to the size it has: %v", err)
	}
	if err := os.Chtimes(file, time.Now(), time.Now()); err != nil {
		t.Errorf("touch: %v", err)
	}
	if _, err := os.OpenFile(m.Path(exports[0].Name), os.O_RDWR, 0); !errors.Is(err, unix.EROFS) {
		t.Errorf("write to a read-only file: error %v, want EROFS", err)
	}
	if _, err := os.Stat(m.Path("missing")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a file that is not there: error %v", err)
	}
}

// TestFUSEEnd has other programs write up to the end of a device, and over it.
func TestFUSEEnd(t *testing.T) {
	d := block.NewMemory(8192)
	m := mounted(t, Export{Name: "disk", Device: d})
	f, err := os.OpenFile(m.Path("disk"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if n, err := f.WriteAt(bytes.Repeat([]byte{1}, 8192), 4096); n != 0 || !errors.Is(err, unix.ENOSPC) {
		t.Errorf("a write over the end: %d bytes, %v; want ENOSPC", n, err)
	}
	if n, err := f.WriteAt(bytes.Repeat([]byte{1}, 4096), 4096); n != 4096 || err != nil {
		t.Errorf("a write up to the end: %d bytes, %v; want 4096", n, err)
	}
	if n, err := f.WriteAt([]byte{1}, 8192); n != 0 || !errors.Is(err, unix.ENOSPC) {
		t.Errorf("a write at the end: %d bytes, %v; want ENOSPC", n, err)
	}
	p := make([]byte, 8192)
	if n, err := f.ReadAt(p, 4096); n != 4096 || err != io.EOF {
		t.Errorf("a read over the end: %d bytes, %v; want 4096 and EOF", n, err)
	}
	if !bytes.Equal(p[:4096], bytes.Repeat([]byte{1}, 4096)) {
		t.Error("the end of the device was not written")
	}
	if err := syscall.Fallocate(int(f.Fd()), 0, 0, 8193); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("fallocate over the end: %v, want ENOSPC", err)
	}
	if err := syscall.Fallocate(int(f.Fd()), 0, 0, 8192); err != nil {
		t.Errorf("fallocate: %v", err)
	}
}

// failing is a device of which nothing works.
type failing struct{ block.Device }

func (failing) ReadAt([]byte, int64) (int, error)  { return 0, unix.EIO }
func (failing) WriteAt([]byte, int64) (int, error) { return 0, unix.ENOSPC }
func (failing) Flush() error                       { return errors.New("not that one") }

func TestFUSEErrors(t *testing.T) {
	m := mounted(t, Export{Name: "disk", Device: failing{block.NewMemory(8192)}})
	f, err := os.OpenFile(m.Path("disk"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.ReadAt(make([]byte, 10), 0); !errors.Is(err, unix.EIO) {
		t.Errorf("read: %v, want EIO", err)
	}
	if _, err := f.WriteAt(make([]byte, 10), 0); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("write: %v, want ENOSPC", err)
	}
	if err := f.Sync(); !errors.Is(err, unix.EIO) {
		t.Errorf("sync: %v, want EIO", err)
	}
}

// TestFUSECloseInUse unmounts while another program has a file open.
func TestFUSECloseInUse(t *testing.T) {
	needFUSE(t)
	dir := filepath.Join(t.TempDir(), "mnt")
	d := block.NewMemory(8192)
	m, err := MountFUSE(dir, []Export{{Name: "disk", Device: d}}, FUSEOptions{})
	if err != nil {
		t.Fatal(err)
	}
	// It says that it has it open, and then waits for its input to end.
	user := exec.Command("sh", "-c", `exec 3<>"$1"; printf x >&3; echo ready; cat >/dev/null; head -c 1 <&3 || echo gone`, "sh", m.Path("disk"))
	in, err := user.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := user.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := user.Start(); err != nil {
		t.Fatal(err)
	}
	ready := make([]byte, 6)
	if _, err := io.ReadFull(out, ready); err != nil {
		t.Fatal(err)
	}
	if err := m.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
	select {
	case <-m.Done():
	default:
		t.Error("Done is not closed after Close")
	}
	if err := m.Close(); err != nil {
		t.Errorf("a second Close: %v", err)
	}
	if _, err := os.Lstat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the folder is still there: %v", err)
	}
	_ = in.Close()
	rest, _ := io.ReadAll(out)
	if err := user.Wait(); err != nil || string(rest) != "gone\n" {
		t.Errorf("the program that had the file open: %v, says %q; want an error from its read", err, rest)
	}
	p := make([]byte, 1)
	if _, err := d.ReadAt(p, 0); err != nil || p[0] != 'x' {
		t.Errorf("the device holds %q, %v; want what was written", p, err)
	}
}

// TestFUSEUnmounted has somebody else unmount.
func TestFUSEUnmounted(t *testing.T) {
	m := mounted(t, Export{Name: "disk", Device: block.NewMemory(8192)})
	if err := unix.Unmount(m.Dir(), 0); err != nil {
		t.Fatal(err)
	}
	<-m.Done()
}

func TestMountFUSE(t *testing.T) {
	needFUSE(t)
	d := block.NewMemory(8192)
	full := t.TempDir()
	if err := os.WriteFile(filepath.Join(full, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	taken := mounted(t, Export{Name: "disk", Device: d}).Dir()
	for _, tt := range []struct {
		name    string
		dir     string
		exports []Export
		want    string
	}{
		{"not empty", full, nil, `not empty, it has "file"`},
		{"a file", filepath.Join(full, "file"), nil, "not a directory"},
		{"no parent", filepath.Join(full, "a", "b"), nil, "no such file"},
		{"mounted", taken, nil, "umount " + taken},
		{"no device", "new", []Export{{Name: "disk"}}, `"disk" has no device`},
		{"no name", "new", []Export{{Device: d}}, "cannot be the name"},
		{"dots", "new", []Export{{Name: "..", Device: d}}, "cannot be the name"},
		{"a path", "new", []Export{{Name: "a/b", Device: d}}, "cannot be the name"},
		{"long", "new", []Export{{Name: strings.Repeat("x", 256), Device: d}}, "cannot be the name"},
		{"twice", "new", []Export{{Name: "a", Device: d}, {Name: "a", Device: d}}, `two exports are named "a"`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m, err := MountFUSE(tt.dir, tt.exports, FUSEOptions{})
			if err == nil {
				_ = m.Close()
			}
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want %q", err, tt.want)
			}
		})
	}
	if _, err := os.Lstat("new"); err == nil {
		t.Error("a failed mount left its folder")
	}
	t.Run("empty folder", func(t *testing.T) {
		dir := t.TempDir()
		m, err := MountFUSE(dir, nil, FUSEOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if err := m.Close(); err != nil {
			t.Error(err)
		}
		if _, err := os.ReadDir(dir); err != nil {
			t.Errorf("a folder that was there before is not any more: %v", err)
		}
	})
}

func TestFUSEMissing(t *testing.T) {
	for _, tt := range []struct {
		err  error
		want string
	}{
		{unix.ENOENT, "modprobe fuse"}, {unix.ENODEV, "--device /dev/fuse"}, {unix.EACCES, "run as root"}, {unix.EPERM, "let this user and container"}, {unix.EMFILE, "too many open files"},
	} {
		if err := fuseMissing(tt.err); !errors.Is(err, tt.err) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%v: error %q, want %q", tt.err, err, tt.want)
		}
	}
}

// TestFUSEKilled kills a process that serves a mount: who looks at it gets an error, and the next one takes the folder over.
func TestFUSEKilled(t *testing.T) {
	needFUSE(t)
	if dir := os.Getenv("EXPOSE_TEST_MOUNT"); dir != "" {
		if _, err := MountFUSE(dir, []Export{{Name: "disk", Device: block.NewMemory(8192)}}, FUSEOptions{}); err != nil {
			t.Fatal(err)
		}
		// A program that it started must not keep the mount alive.
		child := exec.Command("sleep", "30")
		if err := child.Start(); err != nil {
			t.Fatal(err)
		}
		_, _ = os.Stdout.WriteString("pid " + strconv.Itoa(child.Process.Pid) + "\n")
		select {}
	}
	dir := filepath.Join(t.TempDir(), "mnt")
	server := exec.Command(os.Args[0], "-test.run=^TestFUSEKilled$", "-test.timeout=1m")
	server.Env = append(os.Environ(), "EXPOSE_TEST_MOUNT="+dir)
	out, err := server.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	var line []byte
	for one := make([]byte, 1); !bytes.HasSuffix(line, []byte("\n")); line = append(line, one...) {
		if _, err := out.Read(one); err != nil {
			t.Fatalf("the server ended: %v, %q", err, line)
		}
	}
	if child, err := strconv.Atoi(strings.TrimSpace(strings.TrimPrefix(string(line), "pid "))); err != nil {
		t.Errorf("the server says %q", line)
	} else {
		defer func() { _ = syscall.Kill(child, syscall.SIGKILL) }()
	}
	if _, err := os.Stat(filepath.Join(dir, "disk")); err != nil {
		t.Error(err)
	}
	_ = server.Process.Kill()
	_ = server.Wait()
	if _, err := os.ReadDir(dir); !errors.Is(err, unix.ENOTCONN) {
		t.Errorf("a mount whose server is dead: error %v, want ENOTCONN", err)
	}
	m, err := MountFUSE(dir, []Export{{Name: "disk", Device: block.NewMemory(8192)}}, FUSEOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(m.Path("disk")); err != nil {
		t.Error(err)
	}
	if err := m.Close(); err != nil {
		t.Error(err)
	}
}

// TestFUSEPrograms copies with the programs that people copy with.
func TestFUSEPrograms(t *testing.T) {
	const size = 4 << 20
	d := block.NewMemory(size)
	m := mounted(t, Export{Name: "disk", Device: d})
	image := filepath.Join(t.TempDir(), "image")
	data := make([]byte, size)
	rng := rand.New(rand.NewPCG(3, 4))
	for i := range size / 2 {
		data[i] = byte(rng.Uint32())
	}
	if err := os.WriteFile(image, data, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"dd", "if=" + image, "of=" + m.Path("disk"), "bs=64k", "conv=notrunc,fsync", "status=none"},
		{"dd", "if=" + image, "of=" + m.Path("disk"), "bs=1M", "oflag=direct", "conv=notrunc", "status=none"},
		{"cmp", image, m.Path("disk")},
		{"cp", "--sparse=always", m.Path("disk"), image + "2"},
		{"cmp", image, image + "2"},
		{"fallocate", "--punch-hole", "--offset", "4096", "--length", "1M", m.Path("disk")},
	} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%q: %v: %s", args, err, out)
		}
	}
	p := make([]byte, 1<<20)
	if _, err := d.ReadAt(p, 4096); err != nil || !block.IsZero(p) {
		t.Errorf("a hole that was punched is not zero (%v)", err)
	}
}

// slow is a device whose first block comes when it is released.
type slow struct {
	block.Device
	entered, release chan struct{}
}

func (d slow) ReadAt(p []byte, off int64) (int, error) {
	if off < 4096 {
		d.entered <- struct{}{}
		<-d.release
	}
	return d.Device.ReadAt(p, off)
}

// TestFUSESlow has many wait for a block that does not come: nobody else is delayed, and they are not kept when the folder is
// unmounted.
func TestFUSESlow(t *testing.T) {
	const readers = 40
	d := slow{block.NewMemory(8192), make(chan struct{}), make(chan struct{})}
	m := mounted(t, Export{Name: "disk", Device: d})
	fd, err := unix.Open(m.Path("disk"), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	failed := make(chan error, readers)
	for range readers {
		go func() {
			_, err := unix.Pread(fd, make([]byte, 512), 0)
			failed <- err
		}()
	}
	for range readers {
		<-d.entered
	}
	if n, err := unix.Pread(fd, make([]byte, 512), 4096); n != 512 || err != nil {
		t.Errorf("a read beside those that wait: %d bytes, %v", n, err)
	}
	closed := make(chan error, 1)
	go func() { closed <- m.Close() }()
	for range readers {
		if err := <-failed; err == nil {
			t.Error("a read succeeded that cannot have")
		}
	}
	select {
	case err := <-closed:
		t.Errorf("Close returned while the device was in use: %v", err)
	default:
	}
	close(d.release)
	if err := <-closed; err != nil {
		t.Error(err)
	}
}
