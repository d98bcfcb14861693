package block

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
)

// Tracked is a device that records which pages of it are written. While nothing is tracked, a write costs one atomic load
// more than it does without; while it is, one atomic load per 256 KiB, and a store for pages that were clean.
//
// The order in a write is: change the device, then mark. A page that is marked before it is changed could be collected
// and copied between the two, and the change would be lost. Marked after, the worst that happens is that a change is
// copied by chance and then again.
type Tracked struct {
	Device

	pages atomic.Pointer[bitmap] // nil: not tracking
}

var (
	_ Device  = (*Tracked)(nil)
	_ Extents = (*Tracked)(nil)
	_ Tracker = (*Tracked)(nil)
)

// NewTracked wraps d, which it owns: closing the Tracked closes d. From then on d must be written through it alone.
func NewTracked(d Device) *Tracked { return &Tracked{Device: d} }

// Unwrap returns the device that is tracked.
func (t *Tracked) Unwrap() Device { return t.Device }

// WriteAt implements [Device].
func (t *Tracked) WriteAt(p []byte, off int64) (int, error) {
	n, err := t.Device.WriteAt(p, off)
	t.mark(off, int64(len(p))) // all of it: a write that failed may have written any part
	return n, err
}

// Discard implements [Device].
func (t *Tracked) Discard(off, n int64) error {
	err := t.Device.Discard(off, n)
	t.mark(off, n)
	return err
}

// mark is called when the device has been changed. Bits go to the map that is current then: had it been replaced after the
// change but before mark, the change would be older than Start and there would be nothing to report.
func (t *Tracked) mark(off, n int64) {
	pages := t.pages.Load()
	if pages == nil || n <= 0 || checkRange("", "", off, n, t.Size()) != nil {
		return
	}
	pages.set(off/PageSize, (off+n-1)/PageSize)
}

// NextData implements [Extents].
func (t *Tracked) NextData(off int64) (Range, error) { return NextData(t.Device, off) }

// Start implements [Tracker]. It takes 32 KiB of memory per GiB of the device, until Stop.
func (t *Tracked) Start(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("start tracking writes: %w", err)
	}
	pages := newBitmap((t.Size() + PageSize - 1) / PageSize)
	if !t.pages.CompareAndSwap(nil, &pages) {
		return errors.New("start tracking writes: tracking already, stop it first")
	}
	return nil
}

// Collect implements [Tracker].
func (t *Tracked) Collect(ctx context.Context) ([]Range, error) {
	// Nothing is forgotten once the bits are being taken, so a cancelled context counts only before.
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("collect writes: %w", err)
	}
	pages := t.pages.Load()
	if pages == nil {
		return nil, errors.New("collect writes: not tracking, start it first")
	}
	var dirty []Range
	size := t.Size()
	pages.take(func(first, last int64) {
		off := first * PageSize
		dirty = append(dirty, Range{Offset: off, Length: min(size, (last+1)*PageSize) - off})
	})
	return dirty, nil
}

// Stop implements [Tracker].
func (t *Tracked) Stop() error {
	t.pages.Store(nil)
	return nil
}
