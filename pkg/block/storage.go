package block

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// storage is the part of a file system that an overlay stands on. The steps that change something carry a label, op, by
// which tests cut the power or fail exactly one step; the file system of the host ignores it.
type storage interface {
	open(op, path string, mode fileMode) (storedFile, error)
	// size is the length of the file at path, or an error that wraps os.ErrNotExist.
	size(path string) (int64, error)
	rename(op, from, to string) error
	remove(op, path string) error
	// modTime is when the file at path was last modified, in ns since 1970, or 0 for what does not tell: a block device.
	modTime(path string) (int64, error)
	// syncFile makes the contents of the file at path, and modTime, durable.
	syncFile(op, path string) error
	// syncDir makes the names in a folder durable.
	syncDir(op, path string) error
}

// fileMode says how a file of a storage is opened.
type fileMode int

const (
	fileRead   fileMode = iota // it is there, and is read alone
	fileWrite                  // it is there
	fileCreate                 // it is made if it is not there
	fileEmpty                  // it is made if it is not there, and emptied if it is
)

// storedFile is an open file of a storage.
type storedFile interface {
	// readAt fills p, or fails: io.ErrUnexpectedEOF when the file ends before.
	readAt(p []byte, off int64) error
	writeAt(op string, p []byte, off int64) error
	// punch makes [off, off+n) read as zeros, and frees its space where that can be done. The file keeps its length.
	punch(op string, off, n int64) error
	truncate(op string, size int64) error
	// sync makes what was written, punched and truncated durable.
	sync(op string) error
	size() (int64, error)
	// nextData returns the first range at or after off, and before end, that may hold non-zero bytes, or io.EOF.
	nextData(off, end int64) (Range, error)
	// lock takes the file for this process, shared with others that only read it or alone, or fails with errLocked at once. Closing
	// the file gives it back.
	lock(shared bool) error
	close() error
}

// errLocked is returned by storedFile.lock when the file is locked already.
var errLocked = errors.New("another process holds it: end that process, or give this instance overlays of its own")

// newSuffix is what a file that is to replace another is called, after the other's name.
const newSuffix = ".new"

// replaceFile makes the file at path, or replaces it, by one with these contents: whole and durable, or, after a crash or an
// error, not at all. The new file is locked before anybody can find it, and returned open. What names it in the steps.
func replaceFile(fs storage, what, path string, contents []byte) (_ storedFile, err error) {
	next := path + newSuffix
	f, err := fs.open("create "+what, next, fileEmpty)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.close())
		}
	}()
	if err := f.lock(false); err != nil {
		return nil, fmt.Errorf("lock %q: %w", next, err)
	}
	if err := f.writeAt("write "+what, contents, 0); err != nil {
		return nil, err
	}
	if err := f.sync("sync new " + what); err != nil {
		return nil, err
	}
	if err := fs.rename("rename "+what, next, path); err != nil {
		return nil, err
	}
	if err := fs.syncDir("sync folder of "+what, filepath.Dir(path)); err != nil {
		return nil, err
	}
	return f, nil
}

// hostStorage is the storage of the host.
type hostStorage struct{}

func (hostStorage) open(_, path string, mode fileMode) (storedFile, error) {
	return openHostFile(path, [...]int{
		fileRead: os.O_RDONLY, fileWrite: os.O_RDWR, fileCreate: os.O_RDWR | os.O_CREATE, fileEmpty: os.O_RDWR | os.O_CREATE | os.O_TRUNC,
	}[mode])
}

func (hostStorage) size(path string) (int64, error) {
	info, err := os.Stat(path)
	if err != nil {
		return 0, err
	}
	if !info.Mode().IsRegular() {
		return 0, fmt.Errorf("%q is not a regular file: %w", path, os.ErrInvalid)
	}
	return info.Size(), nil
}

func (hostStorage) rename(_, from, to string) error { return os.Rename(from, to) }

func (hostStorage) remove(_, path string) error { return os.Remove(path) }

func (hostStorage) modTime(path string) (int64, error) {
	info, err := os.Stat(path)
	if err != nil || !info.Mode().IsRegular() {
		return 0, err
	}
	return info.ModTime().UnixNano(), nil
}

func (hostStorage) syncFile(_, path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

func (s hostStorage) syncDir(op, path string) error { return s.syncFile(op, path) }

// hostFile is a file or block device of the host. Its methods may be called concurrently; those called after close fail
// with os.ErrClosed.
type hostFile struct {
	*os.File
	raw         rawFile
	blockDevice bool
}

// rawFile is the part of syscall.RawConn used here. Unlike File.Fd it keeps the descriptor from being closed, and thus
// reused for something else, under a running system call.
type rawFile interface {
	Control(func(fd uintptr)) error
}

func openHostFile(path string, flags int) (*hostFile, error) {
	f, err := os.OpenFile(path, flags, 0o600)
	if err != nil {
		return nil, err
	}
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	info, err := f.Stat()
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	mode := info.Mode()
	h := &hostFile{File: f, raw: raw, blockDevice: mode&os.ModeDevice != 0 && mode&os.ModeCharDevice == 0}
	if !mode.IsRegular() && !h.blockDevice {
		return nil, errors.Join(fmt.Errorf("%q is neither a regular file nor a block device: %w", path, os.ErrInvalid), f.Close())
	}
	return h, nil
}

// call runs a system call on the descriptor, again when it was interrupted.
func (f *hostFile) call(verb string, call func(fd int) error) error {
	var err error
	if closed := f.raw.Control(func(fd uintptr) {
		for {
			if err = call(int(fd)); err != unix.EINTR {
				return
			}
		}
	}); closed != nil {
		err = os.ErrClosed
	}
	if err != nil {
		return &os.PathError{Op: verb, Path: f.Name(), Err: err}
	}
	return nil
}

func (f *hostFile) readAt(p []byte, off int64) error {
	_, err := f.ReadAt(p, off)
	if err == io.EOF {
		return fmt.Errorf("read %q: the file ends before offset %d, was it truncated? %w", f.Name(), off+int64(len(p)), io.ErrUnexpectedEOF)
	}
	return err
}

func (f *hostFile) writeAt(_ string, p []byte, off int64) error {
	_, err := f.WriteAt(p, off)
	return err
}

func (f *hostFile) truncate(_ string, size int64) error { return f.Truncate(size) }

func (f *hostFile) sync(string) error { return f.call("fdatasync", unix.Fdatasync) }

// size works for block devices too, whose stat size is 0. Nothing here uses the file position, so that moving it does
// not disturb anyone.
func (f *hostFile) size() (int64, error) { return f.Seek(0, io.SeekEnd) }

func (f *hostFile) close() error { return f.Close() }

func (f *hostFile) lock(shared bool) error {
	how := unix.LOCK_EX
	if shared {
		how = unix.LOCK_SH
	}
	err := f.call("flock", func(fd int) error { return unix.Flock(fd, how|unix.LOCK_NB) })
	if errors.Is(err, unix.EWOULDBLOCK) {
		return errLocked
	}
	return err
}

func (f *hostFile) punch(_ string, off, n int64) error {
	if n == 0 {
		return nil
	}
	if f.blockDevice {
		// Block devices punch whole logical blocks only: the edges are written.
		const align = 4096
		first, last := (off+align-1)/align*align, (off+n)/align*align
		if first >= last {
			return f.zero(off, n)
		}
		if err := errors.Join(f.zero(off, first-off), f.zero(last, off+n-last)); err != nil {
			return err
		}
		off, n = first, last-first
	}
	err := f.call("fallocate", func(fd int) error {
		return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	})
	if unsupported(err) {
		return f.zero(off, n)
	}
	return err
}

// zero writes zeros over what is not a hole in [off, off+n).
func (f *hostFile) zero(off, n int64) error {
	for end := off + n; off < end; {
		data, err := f.nextData(off, end)
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		for off = data.Offset; off < data.End(); {
			k := min(data.End()-off, int64(len(zeros)))
			if _, err := f.WriteAt(zeros[:k], off); err != nil {
				return err
			}
			off += k
		}
	}
	return nil
}

// nextData follows lseek(2), SEEK_DATA and SEEK_HOLE.
func (f *hostFile) nextData(off, end int64) (Range, error) {
	for off < end {
		start, stop := off, end
		err := f.call("lseek", func(fd int) error {
			var err error
			if start, err = unix.Seek(fd, off, unix.SEEK_DATA); err != nil {
				return err
			}
			stop, err = unix.Seek(fd, start, unix.SEEK_HOLE)
			return err
		})
		switch {
		case errors.Is(err, unix.ENXIO): // nothing but a hole up to the end of the file
			return Range{}, io.EOF
		case unsupported(err): // block devices, and file systems without holes
			return Range{Offset: off, Length: end - off}, nil
		case err != nil:
			return Range{}, err
		}
		if start >= end {
			break
		}
		if stop = min(stop, end); stop > start {
			return Range{Offset: start, Length: stop - start}, nil
		}
		off = start // punched between the two calls: look again
	}
	return Range{}, io.EOF
}

// unsupported reports whether a file system or driver does not have an operation.
func unsupported(err error) bool {
	return errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENODEV)
}
