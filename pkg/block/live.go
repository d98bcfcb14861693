package block

import (
	"fmt"
	"os"
	"runtime"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A live file is what a device must remember between two processes that serve the same user one after the other, and
// nobody after a power cut: words of 64 bits in a memfd, mapped shared. Each is changed in one atomic step, so a process that
// is killed leaves them as they were between two instructions.

// grow gives an empty file its size, and reports whether it had it before.
func grow(f *os.File, size int64) (before bool, err error) {
	info, err := f.Stat()
	switch {
	case err != nil:
		return false, err
	case info.Size() == size:
		return size > 0, nil
	case info.Size() != 0:
		return false, fmt.Errorf("%q has %d bytes, this device needs %d: it belongs to another one", f.Name(), info.Size(), size)
	}
	return false, f.Truncate(size)
}

// mapWords maps a file of size bytes for as long as owner lives.
func mapWords[T any](owner *T, f *os.File, size int64) ([]atomic.Uint64, error) {
	m, err := unix.Mmap(int(f.Fd()), 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map %q: %w", f.Name(), err)
	}
	// Not at Close: a reader that came before it may still be looking.
	runtime.AddCleanup(owner, func(m []byte) { _ = unix.Munmap(m) }, m)
	return unsafe.Slice((*atomic.Uint64)(unsafe.Pointer(&m[0])), size/8), nil
}

// NewLive makes an empty live file, for [OverlayOptions] and [LazyOptions]. The name shows in /proc/PID/fd of whoever
// holds it, as "/memfd:NAME (deleted)", and may have 249 bytes.
func NewLive(name string) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make live file %q: %w", name, err)
	}
	return os.NewFile(uintptr(fd), "memfd:"+name), nil
}
