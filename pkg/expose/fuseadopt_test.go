package expose

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/drafter-vm/drafter/pkg/block"
)

// stuck is a device that answers nothing any more after so many writes.
type stuck struct {
	block.Device
	left atomic.Int64
}

func (s *stuck) WriteAt(p []byte, off int64) (int, error) {
	if s.left.Add(-1) < 0 {
		select {}
	}
	return s.Device.WriteAt(p, off)
}

const (
	userBlocks = 64
	userFD     = 3 // the connection, in the program that uses the file
)

// useFile is a program that writes to a file, and checks what it reads, for as long as it lives.
func useFile(path string) error {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	b, err := unix.Mmap(-1, 0, block.PageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON) // aligned
	if err != nil {
		return err
	}
	for n := uint64(1); ; n++ {
		off := int64(n%userBlocks) * block.PageSize
		if n > userBlocks {
			if _, err := unix.Pread(fd, b, off); err != nil {
				return fmt.Errorf("read: %w", err)
			}
			if got := binary.LittleEndian.Uint64(b); got != n-userBlocks {
				return fmt.Errorf("block %d has %d, and %d was written", n%userBlocks, got, n-userBlocks)
			}
		}
		binary.LittleEndian.PutUint64(b, n)
		if _, err := unix.Pwrite(fd, b, off); err != nil {
			return fmt.Errorf("write: %w", err)
		}
		if err := unix.Fsync(fd); err != nil {
			return fmt.Errorf("sync: %w", err)
		}
		fmt.Println(n)
	}
}

// TestAdoptFUSE: the process that serves a mount is killed in the middle of a write, and another takes over, which is abandoned for a third. Whoever
// writes meanwhile notices nothing.
func TestAdoptFUSE(t *testing.T) {
	needFUSE(t)
	if path := os.Getenv("EXPOSE_TEST_USER"); path != "" {
		fmt.Println(useFile(path))
		os.Exit(1)
	}
	image := func(dir string) block.Device {
		f, err := block.OpenFile(filepath.Join(dir, "image"), block.FileOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	if dir := os.Getenv("EXPOSE_TEST_SERVER"); dir != "" {
		s := &stuck{Device: image(dir)}
		s.left.Store(3 * userBlocks)
		m, err := MountFUSE(filepath.Join(dir, "mnt"), []Export{{Name: "disk", Device: s}}, FUSEOptions{})
		if err != nil {
			t.Fatal(err)
		}
		connection, err := m.Connection()
		if err != nil {
			fmt.Println("none:", err)
			os.Exit(1)
		}
		user := exec.Command(os.Args[0], "-test.run=^TestAdoptFUSE$")
		user.Env = append(os.Environ(), "EXPOSE_TEST_USER="+m.Path("disk"))
		user.Stdout, user.Stderr, user.ExtraFiles = os.Stdout, os.Stderr, []*os.File{connection}
		if err := user.Start(); err != nil {
			t.Fatal(err)
		}
		fmt.Println("user", user.Process.Pid)
		select {}
	}

	dir := t.TempDir()
	f, err := block.CreateFile(filepath.Join(dir, "image"), userBlocks*block.PageSize)
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	server := exec.Command(os.Args[0], "-test.run=^TestAdoptFUSE$", "-test.timeout=1m")
	server.Env = append(os.Environ(), "EXPOSE_TEST_SERVER="+dir)
	out, err := server.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	pid := 0
	// comesTo reads what is said until the user has come to n.
	comesTo := func(n int) {
		t.Helper()
		for lines.Scan() {
			if number, ok := strings.CutPrefix(lines.Text(), "user "); ok {
				pid, _ = strconv.Atoi(number)
				continue
			}
			if strings.HasPrefix(lines.Text(), "none: ") && strings.Contains(lines.Text(), ErrFleeting.Error()) {
				t.Skip(lines.Text())
			}
			at, err := strconv.Atoi(lines.Text())
			if err != nil {
				t.Fatal(lines.Text())
			}
			if at >= n && pid != 0 {
				return
			}
		}
		t.Fatalf("it ended before it came to %d", n)
	}
	t.Cleanup(func() {
		if pid != 0 {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
		_ = unix.Unmount(filepath.Join(dir, "mnt"), unix.MNT_DETACH)
	})
	comesTo(3 * userBlocks)
	_ = server.Process.Kill()
	_, _ = server.Process.Wait()

	take := func() *os.File {
		pidfd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(pidfd)
		fd, err := unix.PidfdGetfd(pidfd, userFD, 0)
		if err != nil {
			t.Fatal(err)
		}
		return os.NewFile(uintptr(fd), fuseDevice)
	}
	adopt := func(dev block.Device) *Mount {
		m, err := AdoptFUSE(filepath.Join(dir, "mnt"), take(), []Export{{Name: "disk", Device: dev}}, FUSEOptions{Logger: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	first := image(dir)
	m := adopt(first)
	comesTo(10 * userBlocks)
	if err := errors.Join(m.Abandon(), m.Close(), m.Close(), first.Close()); err != nil {
		t.Fatal(err)
	}
	second := image(dir)
	defer second.Close()
	m = adopt(second)
	comesTo(20 * userBlocks)
	if _, err := m.Connection(); err != nil {
		t.Errorf("what was taken over cannot be taken over: %v", err)
	}
	_ = unix.Kill(pid, unix.SIGKILL)
	if err := m.Close(); err != nil {
		t.Error(err)
	}
	select {
	case <-m.Done():
	case <-time.After(time.Minute):
		t.Error("it is closed, and serves")
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 1 {
		t.Errorf("it has left %v (%v)", left, err)
	}
}
