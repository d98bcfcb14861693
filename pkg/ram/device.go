package ram

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/drafter-vm/drafter/pkg/block"
)

// Device is a view of the contents. Reads and writes of pages that are still being filled bring those pages first, and
// so wait for the source or fail with its error; they never see a page that is not there yet. Closing the device closes
// the view, not the memory.
//
// It goes through the memfd, never through a mapping: it populates nothing by reading, and the VMM never sees a page
// half written by it for the first time.
func (m *Memory) Device() block.Device { return &device{m: m} }

type device struct {
	m      *Memory
	closed atomic.Bool
}

var (
	_ block.Device  = (*device)(nil)
	_ block.Extents = (*device)(nil)
)

func (d *device) Size() int64  { return d.m.size }
func (d *device) Flush() error { return d.check("flush") }
func (d *device) Close() error { d.closed.Store(true); return nil }

func (d *device) check(verb string) error {
	if d.closed.Load() {
		return fmt.Errorf("%s memory %q: %w", verb, d.m.name, os.ErrClosed)
	}
	return nil
}

// within is check for a range that must lie in the device.
func (d *device) within(verb string, off, n int64) error {
	if err := d.check(verb); err != nil {
		return err
	}
	if off < 0 || n < 0 || off > d.m.size || n > d.m.size-off {
		return fmt.Errorf("%s memory %q: range %d+%d is outside its %d bytes", verb, d.m.name, off, n, d.m.size)
	}
	return nil
}

func (d *device) ReadAt(p []byte, off int64) (int, error) {
	if err := d.check("read"); err != nil {
		return 0, err
	}
	if off < 0 {
		return 0, fmt.Errorf("read memory %q: offset %d is negative", d.m.name, off)
	}
	if len(p) == 0 {
		return 0, nil
	}
	if off >= d.m.size {
		return 0, io.EOF
	}
	want := p[:min(int64(len(p)), d.m.size-off)]
	if err := d.m.ensure(off, int64(len(want))); err != nil {
		return 0, err
	}
	n, err := d.m.file.ReadAt(want, off)
	if err != nil {
		return n, fmt.Errorf("read memory %q: %w", d.m.name, err)
	}
	if t := d.m.hashes.Load(); t != nil {
		t.delivered(off, want)
	}
	if len(want) < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (d *device) WriteAt(p []byte, off int64) (int, error) {
	if err := d.within("write", off, int64(len(p))); err != nil {
		return 0, err
	}
	if len(p) == 0 {
		return 0, nil
	}
	if err := d.m.ensure(off, int64(len(p))); err != nil {
		return 0, err
	}
	n, err := d.m.file.WriteAt(p, off)
	d.m.mark(off, int64(len(p)))
	if err != nil {
		return n, fmt.Errorf("write memory %q: %w", d.m.name, err)
	}
	return n, nil
}

func (d *device) Discard(off, n int64) error {
	if err := d.within("discard", off, n); err != nil || n == 0 {
		return err
	}
	if err := d.m.ensure(off, n); err != nil {
		return err
	}
	err := d.m.punch(off, n)
	d.m.mark(off, n)
	return err
}

// NextData takes pages that are still to be filled for data.
func (d *device) NextData(off int64) (block.Range, error) {
	if err := d.check("find data of"); err != nil {
		return block.Range{}, err
	}
	if off < 0 {
		return block.Range{}, fmt.Errorf("find data of memory %q: offset %d is negative", d.m.name, off)
	}
	if off >= d.m.size {
		return block.Range{}, io.EOF
	}
	if d.m.unfilled.Load() {
		return block.Range{Offset: off, Length: d.m.size - off}, nil
	}
	// The filler is asked first: a page that arrives between the two is then seen by one of them at least.
	absent, pending := block.Range{}, false
	if f := d.m.filler.Load(); f != nil {
		absent, pending = f.nextAbsent(off)
	}
	r, err := d.m.nextData(off)
	if pending && (errors.Is(err, io.EOF) || err == nil && absent.Offset < r.Offset) {
		return absent, nil
	}
	return r, err
}

// nextData is NextData of what the memfd holds.
func (m *Memory) nextData(off int64) (block.Range, error) {
	var start, end int64
	err := m.control(func(fd int) (err error) {
		if start, err = unix.Seek(fd, off, unix.SEEK_DATA); err == nil {
			end, err = unix.Seek(fd, start, unix.SEEK_HOLE)
		}
		return err
	})
	if errors.Is(err, unix.ENXIO) { // lseek(2): no data after off
		return block.Range{}, io.EOF
	}
	if err != nil {
		return block.Range{}, fmt.Errorf("find data of memory %q: %w", m.name, err)
	}
	if end <= start { // punched out between the two calls: a harmless exaggeration
		end = (start/pageSize + 1) * pageSize
	}
	return block.Range{Offset: start, Length: end - start}, nil
}

// punch makes a range a hole.
func (m *Memory) punch(off, n int64) error {
	err := m.control(func(fd int) error {
		for {
			err := unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
			if !errors.Is(err, unix.EINTR) {
				return err
			}
		}
	})
	if err != nil {
		return fmt.Errorf("discard %d+%d of memory %q: %w", off, n, m.name, err)
	}
	return nil
}

// empty makes a range a hole, looking first: to punch one page takes 3 µs whether there is anything or not, and to find
// that there is nothing a tenth of that. (It does not ask how far the data goes, which takes as long as there is data.)
func (m *Memory) empty(r block.Range) error {
	off := r.Offset
	err := m.control(func(fd int) (err error) {
		off, err = unix.Seek(fd, r.Offset, unix.SEEK_DATA)
		return err
	})
	if errors.Is(err, unix.ENXIO) || err == nil && off >= r.End() {
		return nil
	}
	if err != nil {
		return fmt.Errorf("find data of memory %q: %w", m.name, err)
	}
	return m.punch(off, r.End()-off)
}

// control calls f with the descriptor of the memfd, which stays open meanwhile.
func (m *Memory) control(f func(fd int) error) error {
	raw, err := m.file.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	if raw.Control(func(fd uintptr) { inner = f(int(fd)) }) != nil {
		return os.ErrClosed // its only failure, for which package os has an error of its own
	}
	return inner
}

// ensure returns once a range holds its contents.
func (m *Memory) ensure(off, n int64) error {
	if m.unfilled.Load() {
		return fmt.Errorf("access memory %q: its filling must be resumed first: %w", m.name, ErrIncomplete)
	}
	if f := m.filler.Load(); f != nil {
		return f.ensure(off, n)
	}
	return nil
}

// mark records a write of our own, which the kernel's tracking does not see, after it was done.
func (m *Memory) mark(off, n int64) {
	if marks := m.marks.Load(); marks != nil {
		marks.add(off/pageSize, (off+n+pageSize-1)/pageSize)
	}
}
