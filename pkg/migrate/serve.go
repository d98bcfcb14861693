package migrate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/wire"
)

const (
	// While somebody may wait for pages, less is on its way than otherwise: with one stream a demanded page stands in line
	// behind it, with more it may be part of it.
	serveWindow       = 4 << 20
	serveWindowSingle = 1 << 20
	// ackEvery is how often the destination acknowledges then, in bytes.
	ackEvery = 64 << 10

	// maxDemands is how many demands are remembered. What is dropped comes with the stream.
	maxDemands = 1 << 14
	maxHints   = 64

	// Around a page that was demanded, these pages are sent next: who touched one is likely to touch its neighbours.
	pagesBefore = 4
	pagesAfter  = 28
)

// serveLimit is the window while serving, over n streams.
func serveLimit(n int) int64 {
	if n == 1 {
		return serveWindowSingle
	}
	return serveWindow
}

// serving is what the source does for a guest whose pages are missing at the destination. There is one for each session.
//
//	reader ── demands ──► answer ───────────────► stream 0, ahead of everything
//	                        └─ hints ─┐
//	                  order of the ───┴─► stream ─► workers ─► other streams
//	                  likely use
//
// Each page is sent once by either, and once more if it was demanded when it was on its way.
type serving struct {
	s       *source
	devices []servedDevice // by position; left is nil where nothing is missing
	plan    []want         // everything, in the order of likely use

	mu      sync.Mutex // guards what follows
	demands []want
	hints   []want
	closed  bool // no more demands are answered
	wake    chan struct{}
	idle    sync.WaitGroup // answer
}

// servedDevice is what is to be sent of a device.
type servedDevice struct {
	*sourceDevice
	listed *pageSet // what was missing at the start; it does not change
	left   *pageSet // to be sent
	again  *pageSet // sent a second time
}

// want is content of a device that somebody wants, or may want.
type want struct {
	device int
	block.Range
}

// newServing prepares for sending what is listed for each device, nil where nothing is. Likely says what comes first: lists of all
// devices, the most likely one first; together they hold everything.
func (s *source) newServing(missing [][]block.Range, likely ...[][]block.Range) *serving {
	v := &serving{s: s, wake: make(chan struct{}, 1)}
	s.checking.Store(true)
	for i, d := range s.devices {
		sd := servedDevice{sourceDevice: d}
		if missing[i] != nil {
			d.digest.shared.Store(false) // it lacks what is listed, whatever it had
			sd.listed, sd.left, sd.again = newPageSetOf(d.size, missing[i]), newPageSetOf(d.size, missing[i]), newPageSet(d.size)
		}
		v.devices = append(v.devices, sd)
	}
	for _, lists := range likely {
		for i, list := range lists {
			for _, r := range list {
				v.plan = append(v.plan, want{i, r})
			}
		}
	}
	return v
}

// start answers demands from now on, until stop or the end of the link.
func (v *serving) start() {
	v.idle.Go(v.answer)
	v.s.serving.Store(v)
}

// demanded notes what somebody waits for. It is called by the link's readers.
func (s *source) demanded(v *serving, device int, r block.Range) error {
	if device >= len(v.devices) || v.devices[device].left == nil {
		return fmt.Errorf("%w: demand for device %d, which misses nothing", wire.ErrMalformed, device)
	}
	if d := v.devices[device]; r.Offset%wire.PageSize != 0 || r.Offset >= d.size || r.Length > d.size-r.Offset {
		return fmt.Errorf("%w: demand for %d bytes at %d of device %d of %d bytes", wire.ErrMalformed, r.Length, r.Offset, device, d.size)
	}
	s.demands.Add(1)
	v.mu.Lock()
	if !v.closed && len(v.demands) < maxDemands {
		v.demands = append(v.demands, want{device, r})
	}
	v.mu.Unlock()
	select {
	case v.wake <- struct{}{}:
	default: // it is awake
	}
	return nil
}

// answer sends what is demanded.
func (v *serving) answer() {
	ctx := v.s.link.ctx
	for {
		v.mu.Lock()
		if v.closed {
			v.mu.Unlock()
			return
		}
		var w want
		if len(v.demands) > 0 {
			w, v.demands = v.demands[0], v.demands[1:]
		}
		v.mu.Unlock()
		if w.Length > 0 {
			if err := v.send(w); err != nil {
				v.s.link.fail(err)
				return
			}
			continue
		}
		select {
		case <-v.wake:
		case <-ctx.Done():
			return
		}
	}
}

// send sends pages somebody waits for, at once.
func (v *serving) send(w want) error {
	d := v.devices[w.device]
	p := packer{s: v.s, device: d.sourceDevice, urgent: true, late: true}
	defer p.drop()
	var run block.Range
	var err error
	flush := func() {
		if err == nil && run.Length > 0 {
			err = p.add(run)
		}
		run = block.Range{}
	}
	d.left.each(w.Range, func(page int64) {
		// What is on its way already may be behind much else.
		if err != nil || !d.listed.has(page) || !d.left.take(page) && !d.again.put(page) {
			return
		}
		r := d.left.rangeOf(page, 1)
		if run.Length > 0 && run.End() == r.Offset {
			run.Length += r.Length
			return
		}
		flush()
		run = r
	})
	flush()
	if err == nil {
		err = p.flush()
	}
	near := block.Range{Offset: max(0, w.Offset-pagesBefore*block.PageSize)}
	near.Length = min(d.size, w.Offset+pagesAfter*block.PageSize) - near.Offset
	v.mu.Lock()
	if len(v.hints) < maxHints {
		v.hints = append(v.hints, want{w.device, near})
	}
	v.mu.Unlock()
	return err
}

// stop ends the answering of demands, and waits until the last answer is on its way.
func (v *serving) stop() {
	v.mu.Lock()
	v.closed = true
	v.mu.Unlock()
	select {
	case v.wake <- struct{}{}:
	default:
	}
	v.idle.Wait()
}

func (v *serving) hint() (want, bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if len(v.hints) == 0 {
		return want{}, false
	}
	w := v.hints[0]
	v.hints = v.hints[1:]
	return w, true
}

// stream sends all that nobody asked for, in the order of likely use, and returns when all of it is on its way.
func (v *serving) stream() error {
	p := &planner{s: v.s, job: job{round: newRoundWork()}}
	emit := func(w want) error {
		d := v.devices[w.device]
		if p.job.device != d.sourceDevice {
			if err := p.flush(); err != nil {
				return err
			}
			p.job.device = d.sourceDevice
		}
		return d.left.takeRuns(w.Range, p.add)
	}
	for _, w := range v.plan {
		for w.Length > 0 {
			for {
				near, ok := v.hint()
				if !ok {
					break
				}
				if err := emit(near); err != nil {
					return err
				}
				if err := p.flush(); err != nil {
					return err
				}
			}
			n := min(w.Length, jobBytes)
			if err := emit(want{w.device, block.Range{Offset: w.Offset, Length: n}}); err != nil {
				return err
			}
			w.Offset, w.Length = w.Offset+n, w.Length-n
		}
	}
	if err := p.flush(); err != nil {
		return err
	}
	p.job.round.finish()
	select {
	case <-p.job.round.done:
	case <-v.s.link.ctx.Done():
	}
	return context.Cause(v.s.link.ctx)
}

// deliver streams everything and gives account of it.
func (v *serving) deliver() error {
	s := v.s
	if err := v.stream(); err != nil {
		return err
	}
	v.stop() // what is demanded from now on is on its way
	if s.link.ctx.Err() != nil {
		return context.Cause(s.link.ctx)
	}
	sum := s.account()
	s.delivered.Store(sum)
	return s.link.send(wire.Header{Type: wire.TypeServed}, sum.Encode())
}

// account is what was sent of all devices.
func (s *source) account() *wire.Summary {
	sum := &wire.Summary{Devices: make([]wire.Part, len(s.devices))}
	for i, d := range s.devices {
		sum.Devices[i] = wire.Part{Total: s.window.total(i), Digest: d.digest.sum()}
	}
	return sum
}

// serve sends what is missing until the destination has settled. It reads what the destination says.
func (s *source) serve(v *serving) error {
	l := s.link
	var streaming sync.WaitGroup
	defer streaming.Wait()
	streaming.Go(func() {
		if err := v.deliver(); err != nil {
			l.fail(err)
		}
	})
	for {
		m, err := l.next()
		if err != nil {
			return err
		}
		switch m.Type {
		case wire.TypeRunning:
			if s.ran {
				return unexpectedFrame(m.Type, "settled")
			}
			s.isRunning()
			s.started()
			s.state.set(SourceServing)
			s.noteRuns()
		case wire.TypeSettled:
			ours := s.delivered.Load()
			if !s.ran || ours == nil {
				return unexpectedFrame(m.Type, "running, or a wish")
			}
			theirs, err := wire.DecodeSummary(m.payload, len(s.devices))
			if err != nil {
				return err
			}
			if err := compare(s.describe(), ours, theirs); err != nil {
				return err
			}
			s.summary = ours
			return nil
		default:
			return unexpectedFrame(m.Type, "running or settled")
		}
	}
}

// isRunning notes that the guest runs at the destination.
func (s *source) isRunning() {
	s.ran = true
	if s.still {
		s.still = false
		s.downtime.end(PartResume)
	}
}

// noteRuns puts on record that the guest runs at the destination, which has not got everything.
func (s *source) noteRuns() {
	c, ok := s.cfg.Journal.(Confirmer)
	if !ok || s.confirmed {
		return
	}
	if err := c.Confirm(context.WithoutCancel(s.link.ctx), s.cfg.ID); err != nil {
		s.log.Error("cannot put on record that the guest runs at the destination", "error", err)
		return // and try again in the next session
	}
	s.confirmed = true
}

// describe lists the devices as the manifest does.
func (s *source) describe() []wire.Device {
	out := make([]wire.Device, len(s.devices))
	for i, d := range s.devices {
		out[i] = wire.Device{Name: d.Name, Size: d.size}
		if d.Base != nil {
			out[i].Base = d.Base.Digest().String()
		}
		if d.Stored != nil {
			out[i].Stored = d.Stored.Reference
		}
		out[i].Handle = d.Handle
	}
	return out
}

// postpone turns what is left of a device into a list of what will be missing. What is known to be zeros is sent, as runs.
func (s *source) postpone(d *sourceDevice) ([]block.Range, error) {
	if len(d.rounds) > 0 {
		list := d.pending
		d.pending = nil
		return list, nil
	}
	var list []block.Range
	d.pending = nil
	_, err := s.extents(d, func(r block.Range) error {
		list = append(list, r)
		return nil
	})
	return list, err
}

// extents passes on, in whole pages, where a device may hold something else than zeros, and than what it started as at the
// destination. It sends the other zeros as runs. It returns how much it passed on.
func (s *source) extents(d *sourceDevice, f func(block.Range) error) (int64, error) {
	if d.Changed == nil || !d.digest.shared.Load() {
		return s.extentsOf(d, block.Range{Length: d.size}, f)
	}
	var bytes int64
	for off := int64(0); off < d.size; {
		r, err := d.Changed(off)
		switch {
		case errors.Is(err, io.EOF):
			r = block.Range{Offset: d.size}
		case err != nil:
			return 0, tell(wire.CodeDevice, fmt.Errorf("find changes of device %q from %d: %w", d.Name, off, err), "device %q cannot be read", d.Name)
		case r.Offset < off || r.Length <= 0:
			return 0, fmt.Errorf("find changes of device %q from %d: got %d bytes at %d", d.Name, off, r.Length, r.Offset)
		default:
			r = aligned(r, d.size)
		}
		s.sameBytes.Add(max(0, r.Offset-off))
		if off = max(off, r.Offset); off < r.End() {
			n, err := s.extentsOf(d, block.Range{Offset: off, Length: r.End() - off}, f)
			if err != nil {
				return 0, err
			}
			bytes += n
			off = r.End()
		}
	}
	return bytes, nil
}

// extentsOf is extents for a part of the device, of whole pages.
func (s *source) extentsOf(d *sourceDevice, part block.Range, f func(block.Range) error) (int64, error) {
	var bytes int64
	for off := part.Offset; off < part.End(); {
		r := block.Range{Offset: part.End()} // what follows the hole at off, if there is one
		next, err := block.NextData(d.Device, off)
		switch {
		case errors.Is(err, io.EOF):
		case err != nil:
			return 0, tell(wire.CodeDevice, fmt.Errorf("find data of device %q from %d: %w", d.Name, off, err), "device %q cannot be read", d.Name)
		case next.Offset < off || next.Length <= 0 || next.Length > d.size-next.Offset:
			return 0, fmt.Errorf("find data of device %q of %d bytes from %d: got %d bytes at %d", d.Name, d.size, off, next.Length, next.Offset)
		default:
			next = aligned(next, d.size)
			r.Offset = min(next.Offset, part.End())
			r.Length = min(next.End(), part.End()) - r.Offset
		}
		if r.Offset > off {
			if err := s.sendHole(d, off, r.Offset-off); err != nil {
				return 0, err
			}
		}
		if r.Length > 0 {
			if err := f(r); err != nil {
				return 0, err
			}
		}
		bytes += r.Length
		off = r.End()
	}
	return bytes, nil
}
