package ram

import (
	"errors"
	"fmt"
	"os"
	"regexp"
	"strconv"

	"golang.org/x/sys/unix"
)

// A memory can be given to another process of this host as it is, without a copy: both map the same memfd. What makes that safe is
// the caller's: one of the two guests stands still, or has never run.

// ErrShared is wrapped by the errors of Handle and OpenHandle which say that a memory cannot be given, or taken, as it is.
var ErrShared = errors.New("memory cannot be shared")

var handlePattern = regexp.MustCompile(`^([0-9]{1,9}):([0-9]{1,20})$`)

// Handle names the memory for another process that knows this one's process id: the number of its descriptor, and that of its
// inode, by which the other makes sure that it has found what was meant. It is valid until Close. Memory that is not filled yet has
// none: its holes are pages that have not arrived.
func (m *Memory) Handle() (string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	whole := !m.unfilled.Load()
	if f := m.filler.Load(); f != nil {
		select {
		case <-f.Done():
			whole = whole && f.Err() == nil
		default: // what it has not brought yet is a hole, which would be zeros to the other
			whole = false
		}
	}
	if !whole {
		return "", fmt.Errorf("%w: not all of memory %q is there", ErrShared, m.name)
	}
	var handle string
	err := m.control(func(fd int) error {
		handle = fmt.Sprintf("%d:%d", fd, m.stat.Ino)
		return nil
	})
	return handle, err
}

// OpenHandle opens the memory of size bytes that process pid has named with a handle. The file is for [Open]. What the handle leads to
// is looked at before it is opened: anything but a memfd of that size, which nobody can change, is refused.
func OpenHandle(pid int, handle string, size int64) (_ *os.File, err error) {
	fail := func(why string, err error) error {
		return fmt.Errorf("%w: handle %.40q of process %d: %s: %w", ErrShared, handle, pid, why, err)
	}
	parts := handlePattern.FindStringSubmatch(handle)
	if parts == nil {
		return nil, fail("it is none", os.ErrInvalid)
	}
	ino, err := strconv.ParseUint(parts[2], 10, 64)
	if err != nil {
		return nil, fail("its inode", err)
	}
	// Not opened yet: a pipe would wait, and a device act.
	found, err := unix.Open(fmt.Sprintf("/proc/%d/fd/%s", pid, parts[1]), unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fail("find", err)
	}
	defer unix.Close(found)
	var stat unix.Stat_t
	var fs unix.Statfs_t
	if err := errors.Join(unix.Fstat(found, &stat), unix.Fstatfs(found, &fs)); err != nil {
		return nil, fail("look at", err)
	}
	if stat.Ino != ino || stat.Mode&unix.S_IFMT != unix.S_IFREG || stat.Nlink != 0 || fs.Type != unix.TMPFS_MAGIC || stat.Size != size {
		return nil, fail(fmt.Sprintf("it is not the memory of %d bytes that is meant", size), os.ErrInvalid)
	}
	fd, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", found), unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fail("open", err)
	}
	file := os.NewFile(uintptr(fd), "memory:"+handle)
	seals, err := unix.FcntlInt(file.Fd(), unix.F_GET_SEALS, 0)
	if err == nil && seals&(unix.F_SEAL_SHRINK|unix.F_SEAL_GROW) != unix.F_SEAL_SHRINK|unix.F_SEAL_GROW {
		err = errors.New("its size is not sealed")
	}
	if err != nil {
		file.Close()
		return nil, fail("its seals", err)
	}
	return file, nil
}
