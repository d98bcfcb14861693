package ram

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/drafter-vm/drafter/pkg/block"
)

// Tracker records which pages the VMM, the guest, and users of Device write. Only one tracker of a memory can run at a
// time. How it works is chosen by the capabilities of the VMM attached when it is started.
//
// By userfaultfd, Start write-protects every page, populated or not, so the first Collect reports what was written
// since Start and nothing else, but for these exaggerations: a page the VMM touched for the first time after Start and
// which is a hole in a memory that is still being filled, and pages the VMM unmapped (MADV_DONTNEED). Arrival of
// contents by a Filler is not a write: Device waits for them, and so shows the same before and after.
//
// By hashing, Collect compares each page with what Device delivered of it last. The user of the tracker must therefore
// be the only reader of Device, and read it in whole pages; a page he never read since Start is reported each time
// unless it was and is a hole. This exactness is needed because guests write the same values again: comparing with the
// previous Collect would miss a page that was copied between a change and its reversal.
//
// What neither sees as a write at the time it lands is data that a device puts by DMA into a page pinned before: a read
// with O_DIRECT that is in flight, or VFIO. Hashing finds it at the next Collect. userfaultfd has reported the page when
// it was pinned; if the page was collected before the data landed, it is missed. VMMs whose disks are sockets (NBD) or
// files read through the page cache do not pin.
func (m *Memory) Tracker() block.Tracker { return &tracker{m: m} }

type tracker struct {
	m   *Memory
	run trackingMethod // nil: not running
	// pending is what an earlier Collect that failed had taken from the kernel already.
	pending []block.Range
}

// trackingMethod is called with Memory.mu held, except collect of one that does not need it.
type trackingMethod interface {
	collect(ctx context.Context, found func(block.Range)) error
	stop() error
}

func (t *tracker) Start(ctx context.Context) error {
	m := t.m
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.closed:
		return fmt.Errorf("track memory %q: %w", m.name, os.ErrClosed)
	case m.tracking:
		return fmt.Errorf("track memory %q: it is tracked already, stop that first", m.name)
	case ctx.Err() != nil:
		return fmt.Errorf("track memory %q: %w", m.name, context.Cause(ctx))
	}
	var run trackingMethod
	var err error
	if m.handle != nil && m.handle.caps.Rung == Full {
		run, err = m.trackByProtection(ctx)
	} else {
		run, err = m.trackByHashing(ctx)
	}
	if err != nil {
		return fmt.Errorf("track memory %q: %w", m.name, err)
	}
	m.tracking = true
	m.method = run
	t.run, t.pending = run, nil
	return nil
}

func (t *tracker) Collect(ctx context.Context) ([]block.Range, error) {
	m := t.m
	m.mu.Lock()
	defer m.mu.Unlock()
	if t.run == nil || m.method != t.run {
		return nil, fmt.Errorf("collect writes of memory %q: its tracker does not run, start it first", m.name)
	}
	ranges := t.pending
	t.pending = nil
	err := t.run.collect(ctx, func(r block.Range) {
		if n := len(ranges); n > 0 && ranges[n-1].End() == r.Offset {
			ranges[n-1].Length += r.Length
			return
		}
		ranges = append(ranges, r)
	})
	ranges = merge(ranges)
	if err != nil {
		t.pending = ranges
		return nil, fmt.Errorf("collect writes of memory %q: %w", m.name, err)
	}
	return ranges, nil
}

func (t *tracker) Stop() error {
	m := t.m
	m.mu.Lock()
	defer m.mu.Unlock()
	if t.run == nil || m.method != t.run {
		t.run = nil
		return nil
	}
	t.run, t.pending = nil, nil
	if err := errors.Join(m.stopTracking(), m.settle()); err != nil {
		return fmt.Errorf("stop tracking memory %q: %w", m.name, err)
	}
	return nil
}

// stopTracking ends whatever tracks. m.mu is held.
func (m *Memory) stopTracking() error {
	if !m.tracking {
		return nil
	}
	err := m.method.stop()
	m.tracking, m.method = false, nil
	return err
}

// merge sorts ranges and joins those that overlap or touch.
func merge(ranges []block.Range) []block.Range {
	byOffset := func(a, b block.Range) int { return cmp.Compare(a.Offset, b.Offset) }
	if !slices.IsSortedFunc(ranges, byOffset) {
		slices.SortFunc(ranges, byOffset)
	}
	out := ranges[:0]
	for _, r := range ranges {
		if n := len(out); n > 0 && r.Offset <= out[n-1].End() {
			out[n-1].Length = max(out[n-1].End(), r.End()) - out[n-1].Offset
			continue
		}
		out = append(out, r)
	}
	return out
}

// protection tracks by userfaultfd write protection. Memory.mu guards all of it.
type protection struct {
	m       *Memory
	pagemap *os.File
	vec     []pageRegion
}

func (m *Memory) trackByProtection(ctx context.Context) (*protection, error) {
	// The open file stays bound to the address space it was opened on, even if the process id is used again.
	pagemap, err := os.Open(fmt.Sprintf("/proc/%d/pagemap", m.handle.pid))
	if err != nil {
		if m.ended() {
			err = fmt.Errorf("%w: %w", ErrProcessEnded, err)
		}
		return nil, err
	}
	m.marks.Store(newBitmap(m.size / pageSize))
	p := &protection{m: m, pagemap: pagemap, vec: make([]pageRegion, 4096)}
	if err = m.register(modeWP); err == nil {
		step := int64(scanStep)
		if m.collapsed || HugePages() == nil {
			// A huge page that is armed as one is written as one. Of a part of it, the kernel arms small ones.
			step = HugePage / 2
		}
		if err = p.scan(ctx, step, func(block.Range) {}); err == nil {
			m.collapsed = false
			return p, nil
		}
	}
	_ = p.stop() // the failure of Start tells more
	return nil, err
}

func (p *protection) collect(ctx context.Context, found func(block.Range)) error {
	// Our own writes are marked after they were done, so one that is not marked yet will be by the next time.
	p.m.marks.Load().drain(func(lo, hi int64) {
		found(block.Range{Offset: lo * pageSize, Length: (hi - lo) * pageSize})
	})
	return p.scan(ctx, scanStep, found)
}

// scanStep is how many bytes are scanned between two looks at the context.
const scanStep = 1 << 30

// scan tells what the kernel knows to be written, and arms the tracking of it again, step bytes at a time.
func (p *protection) scan(ctx context.Context, step int64, found func(block.Range)) error {
	m := p.m
	raw, err := p.pagemap.SyscallConn()
	if err != nil {
		return err
	}
	for _, mp := range m.maps {
		for done := int64(0); done < mp.length; done += step {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			start := mp.addr + uint64(done)
			end := mp.addr + uint64(min(done+step, mp.length))
			var inner error
			err := raw.Control(func(fd uintptr) {
				inner = scanWritten(int(fd), start, end, p.vec, func(r pageRegion) {
					found(block.Range{Offset: mp.offset + int64(r.start-mp.addr), Length: int64(r.end - r.start)})
				})
			})
			if err := cmp.Or(err, inner); err != nil {
				return m.explain(err)
			}
		}
	}
	// An address space that goes away looks clean. Registering once more what is registered changes nothing, but fails
	// when the address space has no users any more; if it has some now, it had them during the scan.
	for _, mp := range m.maps {
		if err := m.handle.uffd.register(mp.vma(), m.mode); err != nil {
			return m.explain(err)
		}
	}
	return nil
}

func (p *protection) stop() error {
	m := p.m
	m.marks.Store(nil)
	err := m.disarm()
	if errors.Is(err, ErrProcessEnded) {
		err = nil
	}
	return errors.Join(err, p.pagemap.Close())
}
