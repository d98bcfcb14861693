package testnet

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

const lockDir = "/run/drafter-testnet"

// lock is a locked file that lists the namespaces of a network, one a line. The kernel takes the lock back when the
// process ends, however it ends; then the list says what it left.
type lock struct{ file *os.File }

// acquire locks the network name, or fails with ErrBusy.
func acquire(name string) (*lock, error) {
	if err := os.MkdirAll(lockDir, 0o755); err != nil {
		return nil, err
	}
	path := filepath.Join(lockDir, name)
	for {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			return nil, err
		}
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			f.Close()
			if errors.Is(err, unix.EWOULDBLOCK) {
				return nil, fmt.Errorf("%q is locked by another process, or by another part of this one: %w", path, ErrBusy)
			}
			return nil, fmt.Errorf("lock %q: %w", path, err)
		}
		// Its last holder may have removed the file between our open and our lock: then the lock is worth nothing.
		ours, err := f.Stat()
		if err != nil {
			f.Close()
			return nil, err
		}
		if current, err := os.Stat(path); err == nil && os.SameFile(ours, current) {
			return &lock{f}, nil
		}
		f.Close()
	}
}

// read returns the list of the last holder.
func (l *lock) read() ([]string, error) {
	b, err := io.ReadAll(io.NewSectionReader(l.file, 0, 1<<16))
	if err != nil {
		return nil, err
	}
	var names []string
	for name := range strings.Lines(string(b)) {
		if name, whole := strings.CutSuffix(name, "\n"); whole && validName.MatchString(name) {
			names = append(names, name)
		}
	}
	return names, nil
}

func (l *lock) write(names []string) error {
	if err := l.file.Truncate(0); err != nil {
		return err
	}
	_, err := l.file.WriteAt([]byte(strings.Join(names, "\n")+"\n"), 0)
	return err
}

// make makes namespaces, after removing them and all others that are left of the last holder.
func (l *lock) make(namespaces []string) error {
	left, err := l.read()
	if err != nil {
		return err
	}
	for _, n := range append(left, namespaces...) {
		if err := removeNamespace(n); err != nil {
			return fmt.Errorf("remove what an earlier run left: %w", err)
		}
	}
	// Before there is anything to forget.
	if err := l.write(namespaces); err != nil {
		return err
	}
	for _, n := range namespaces {
		if err := newNamespace(n); err != nil {
			return err
		}
	}
	return nil
}

// remove removes namespaces, and ends the lock. With something left behind, the list stays, for the next run to try.
func (l *lock) remove(namespaces []string) error {
	var errs []error
	for _, n := range namespaces {
		errs = append(errs, removeNamespace(n))
	}
	err := errors.Join(errs...)
	return errors.Join(err, l.release(err == nil))
}

// release ends the lock, and removes the list if all on it is gone.
func (l *lock) release(remove bool) error {
	var err error
	if remove {
		err = os.Remove(l.file.Name()) // before the lock ends, so that nobody's file is removed
	}
	return errors.Join(err, l.file.Close())
}
