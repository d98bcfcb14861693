package migrate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"sort"

	"golang.org/x/sync/errgroup"

	"github.com/drafter-vm/drafter/pkg/block"
)

// A copy of a guest needs the guest to stand still only for as long as it takes to know what it is at one moment: its device state, and
// what it has written since that was sent last. That rest is put aside, at the speed of memory, and sent when the guest runs again.

// maxAside is how much may be put aside, in bytes. A larger rest is sent while the guest stands still.
const maxAside = 256 << 20

// aside is a device of which some ranges are as they were at one moment. Nothing else of it may be read.
type aside struct {
	block.Device
	list []block.Range // ascending, disjoint
	at   []int64       // where each of them begins in data
	data []byte
}

// setAside reads ranges, which are normalized, into memory.
func setAside(ctx context.Context, dev block.Device, list []block.Range) (*aside, error) {
	a := &aside{Device: dev, list: list}
	size := int64(0)
	for _, r := range list {
		a.at = append(a.at, size)
		size += r.Length
	}
	a.data = make([]byte, size)
	g, ctx := errgroup.WithContext(ctx)
	share := size/int64(runtime.GOMAXPROCS(0)) + 1
	for first := 0; first < len(list); {
		last, bytes := first, int64(0)
		for ; last < len(list) && bytes < share; last++ {
			bytes += list[last].Length
		}
		from, to := first, last
		first = last
		g.Go(func() error {
			for i := from; i < to; i++ {
				p := a.data[a.at[i]:][:list[i].Length]
				if n, err := dev.ReadAt(p, list[i].Offset); n < len(p) {
					return fmt.Errorf("read %d bytes at %d: %w", len(p), list[i].Offset, err)
				}
				if ctx.Err() != nil {
					return context.Cause(ctx)
				}
			}
			return nil
		})
	}
	return a, g.Wait()
}

var errNotAside = errors.New("what was not put aside is not what it was")

// ReadAt implements block.Device.
func (a *aside) ReadAt(p []byte, off int64) (n int, err error) {
	for n < len(p) {
		if off == a.Size() {
			return n, io.EOF
		}
		i := sort.Search(len(a.list), func(i int) bool { return a.list[i].End() > off })
		if i == len(a.list) || a.list[i].Offset > off {
			return n, fmt.Errorf("read %d bytes at %d: %w", len(p)-n, off, errNotAside)
		}
		m := copy(p[n:], a.data[a.at[i]+off-a.list[i].Offset:a.at[i]+a.list[i].Length])
		n, off = n+m, off+int64(m)
	}
	return n, nil
}

// putAside puts what is left of a paused guest aside. It reports whether it has: not where that is too much, or was never sent.
func (s *source) putAside(rest []*sourceDevice) (bool, error) {
	total := int64(0)
	for _, d := range rest {
		if len(d.rounds) == 0 && d.Tracker != nil {
			return false, nil
		}
		total += measure(d.pending, block.PageSize).Bytes
	}
	if total > maxAside {
		return false, nil
	}
	return true, s.each(rest, func(d *sourceDevice) error {
		if len(d.rounds) == 0 { // nobody writes to it
			return nil
		}
		a, err := setAside(s.link.ctx, d.Device, d.pending)
		if err != nil {
			return fmt.Errorf("put device %q aside: %w", d.Name, err)
		}
		d.Device = a
		return nil
	})
}
