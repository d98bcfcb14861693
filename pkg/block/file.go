package block

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
)

// File is a device backed by a regular file or a host block device.
type File struct {
	file     *hostFile
	path     string
	size     int64
	readOnly bool
	closed   atomic.Bool
}

var (
	_ Device  = (*File)(nil)
	_ Extents = (*File)(nil)
)

// FileOptions say how [OpenFile] opens a file. The zero value opens it to read and write.
type FileOptions struct {
	// ReadOnly opens the file for reading alone. Writing to the device and discarding from it then fail with an error that
	// wraps syscall.EROFS; Flush does nothing.
	ReadOnly bool
}

// OpenFile opens the existing regular file or block device at path. The device has the size the file has now, and the
// file must keep it.
func OpenFile(path string, opts FileOptions) (*File, error) {
	flags := os.O_RDWR
	if opts.ReadOnly {
		flags = os.O_RDONLY
	}
	file, err := openHostFile(path, flags)
	if err != nil {
		return nil, fmt.Errorf("open device: %w", err)
	}
	size, err := file.size()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open device: find the size of %q: %w", path, err), file.close())
	}
	return &File{file: file, path: path, size: size, readOnly: opts.ReadOnly}, nil
}

// CreateFile makes a sparse file of size bytes at path, readable by its owner alone, and opens it to read and write. It
// fails if path exists. The file's name is durable after the first Flush only if its folder is synced, which is up to the caller.
func CreateFile(path string, size int64) (*File, error) {
	if size < 0 {
		return nil, fmt.Errorf("create device %q: size %d is negative: %w", path, size, os.ErrInvalid)
	}
	file, err := openHostFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL)
	if err != nil {
		return nil, fmt.Errorf("create device: %w", err)
	}
	if err := file.Truncate(size); err != nil {
		return nil, errors.Join(fmt.Errorf("create device of %d bytes: %w", size, err), file.close(), os.Remove(path))
	}
	return &File{file: file, path: path, size: size}, nil
}

// Path is the path the file was opened by.
func (f *File) Path() string { return f.path }

// Size implements [Device].
func (f *File) Size() int64 { return f.size }

// ReadAt implements [Device].
func (f *File) ReadAt(p []byte, off int64) (int, error) {
	if f.closed.Load() {
		return 0, errClosed("read", f.path)
	}
	p, eof := clipRead(f.path, p, off, f.size)
	if len(p) == 0 {
		return 0, eof
	}
	if err := f.file.readAt(p, off); err != nil {
		return 0, err
	}
	return len(p), eof
}

// WriteAt implements [Device].
func (f *File) WriteAt(p []byte, off int64) (int, error) {
	if err := f.writable("write", off, int64(len(p))); err != nil || len(p) == 0 {
		return 0, err
	}
	return f.file.WriteAt(p, off)
}

// Discard implements [Device]. It punches a hole; where the file system or driver cannot, it writes zeros.
func (f *File) Discard(off, n int64) error {
	if err := f.writable("discard", off, n); err != nil {
		return err
	}
	return f.file.punch("discard", off, n)
}

func (f *File) writable(verb string, off, n int64) error {
	if f.closed.Load() {
		return errClosed(verb, f.path)
	}
	if f.readOnly {
		return fmt.Errorf("%s %q: opened read-only: %w", verb, f.path, syscall.EROFS)
	}
	return checkRange(verb, f.path, off, n, f.size)
}

// Flush implements [Device], by fdatasync(2).
func (f *File) Flush() error {
	if f.closed.Load() {
		return errClosed("flush", f.path)
	}
	if f.readOnly {
		return nil
	}
	return f.file.sync("flush")
}

// NextData implements [Extents], by lseek(2). Block devices are all data.
func (f *File) NextData(off int64) (Range, error) {
	if f.closed.Load() {
		return Range{}, errClosed("find data in", f.path)
	}
	if off < 0 || off >= f.size {
		return restOf(f.size, off)
	}
	return f.file.nextData(off, f.size)
}

// Close implements [Device].
func (f *File) Close() error {
	if f.closed.Swap(true) {
		return nil
	}
	var flush error
	if !f.readOnly {
		flush = f.file.sync("close")
	}
	return errors.Join(flush, f.file.close())
}

// syncFolder makes the name of the file at path durable.
func syncFolder(path string) error {
	return hostStorage{}.syncDir("", filepath.Dir(path))
}
