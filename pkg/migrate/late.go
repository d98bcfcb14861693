package migrate

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/wire"
)

// asks are what somebody waits for here and the source was not asked for yet.
type asks struct {
	mu    sync.Mutex // guards what follows
	queue []want
	wake  chan struct{} // capacity 1
}

// list takes in a Missing frame.
func (d *destination) list(m message) error {
	if int(m.Device) >= len(d.devices) || d.devices[m.Device].lacking == nil {
		return fmt.Errorf("%w: missing list of device %d, which must be complete", wire.ErrMalformed, m.Device)
	}
	dev := d.devices[m.Device]
	if dev.listed {
		return fmt.Errorf("%w: second missing list of device %d", wire.ErrMalformed, m.Device)
	}
	dev.listed = m.Flags&wire.FlagLast != 0
	return dev.lacking.read(m)
}

// postpone hands what is missing over to the target, if anything is.
func (d *destination) postpone(c *content) error {
	missing := make([][]block.Range, len(c.devices))
	var g errgroup.Group
	for i, dev := range c.devices {
		if dev.lacking == nil || dev.lacking.count.Load() == 0 {
			continue
		}
		missing[i] = dev.lacking.ranges()
		d.lateBytes += measure(missing[i], block.PageSize).Bytes
		g.Go(func() error { // what has arrived counts as durable from the commit on
			if err := dev.Flush(); err != nil {
				return d.deviceError("flush", dev, 0, err)
			}
			return nil
		})
	}
	if d.lateBytes == 0 {
		return nil
	}
	if err := g.Wait(); err != nil {
		return err
	}
	late, err := d.cfg.Target.(Postponer).Postpone(c.link.ctx, missing, d.ask)
	if err != nil {
		if c.link.ctx.Err() != nil {
			err = context.Cause(c.link.ctx)
		}
		return fmt.Errorf("postpone what is missing: %w", err)
	}
	if len(late) != len(c.devices) {
		return fmt.Errorf("postpone what is missing: target speaks of %d devices, there are %d", len(late), len(c.devices))
	}
	for i, dev := range c.devices {
		if missing[i] == nil {
			continue
		}
		if late[i] == nil {
			return fmt.Errorf("postpone what is missing: target has nothing to fill device %q with", dev.name)
		}
		dev.late = late[i]
	}
	d.lacks = true
	d.filling.Store(&filling{d.devices, d.lateBytes})
	c.tally.hurry(ackEvery)
	d.makeRoom(c.link)
	c.phase.Store(contentLate)
	d.workers.Go(func() { d.demand(c.link) })
	return nil
}

// ask is told that somebody waits for content. It is called by any goroutine, and does not block.
func (d *destination) ask(device int, r block.Range) {
	d.asks.mu.Lock()
	defer d.asks.mu.Unlock()
	if device < 0 || device >= len(d.devices) {
		return
	}
	dev := d.devices[device]
	if dev.lacking == nil || r.Offset < 0 || r.Length <= 0 || r.Offset >= dev.size {
		return
	}
	r.Length = min(r.Length, dev.size-r.Offset)
	dev.lacking.each(r, func(page int64) {
		if len(d.asks.queue) >= maxDemands || !dev.lacking.has(page) || !dev.asked.put(page) {
			return
		}
		p := dev.lacking.rangeOf(page, 1)
		if n := len(d.asks.queue); n > 0 && d.asks.queue[n-1].device == device && d.asks.queue[n-1].End() == p.Offset {
			d.asks.queue[n-1].Length += p.Length
			return
		}
		d.asks.queue = append(d.asks.queue, want{device, p})
	})
	select {
	case d.asks.wake <- struct{}{}:
	default: // it is awake
	}
}

// demand asks the source, until the link ends.
func (d *destination) demand(l *link) {
	for {
		d.asks.mu.Lock()
		queue := d.asks.queue
		d.asks.queue = nil
		d.asks.mu.Unlock()
		for len(queue) > 0 {
			b := wire.NewBuffer()
			for len(queue) > 0 && b.N+wire.ZeroFrameSize <= wire.BufferSize {
				w := queue[0]
				queue = queue[1:]
				b.N = len(wire.AppendDemand(b.B[:b.N], uint16(w.device), w.Offset, w.Length))
			}
			if l.sendUrgent(b) != nil {
				return
			}
		}
		select {
		case <-d.asks.wake:
		case <-l.ctx.Done():
			return
		}
	}
}

// askAgain begins anew with what is waited for now: a new session knows of no demand.
func (d *destination) askAgain() {
	d.asks.mu.Lock()
	d.asks.queue = nil
	for _, dev := range d.devices {
		if dev.lacking != nil {
			dev.asked = newPageSet(dev.size)
		}
	}
	d.asks.mu.Unlock()
	for i, dev := range d.devices {
		if dev.late == nil {
			continue
		}
		for _, r := range dev.late.Wanted() {
			d.ask(i, r)
		}
	}
}

// fill hands late content to where it is waited for.
func (d *destination) fill(dev *targetDevice, i int, r block.Range, b *wire.Buffer) error {
	if dev.late == nil {
		return fmt.Errorf("%w: %v for device %d, which misses nothing", wire.ErrMalformed, b.Header.Type, i)
	}
	due := true
	dev.lacking.each(r, func(page int64) {
		// A page that was demanded when it was on its way comes twice.
		due = due && (dev.lacking.has(page) || dev.asked.has(page))
	})
	if !due {
		return fmt.Errorf("%w: %v of %d bytes at %d in device %d, which are not missing", wire.ErrMalformed, b.Header.Type, r.Length, r.Offset, i)
	}
	var err error
	if b.Header.Type == wire.TypeData {
		dev.digest.write(r.Offset, b.Bytes())
		err = dev.late.Fill(r.Offset, b.Bytes())
		d.dataBytes.Add(r.Length)
	} else {
		dev.digest.zero(r.Offset, r.Length)
		err = dev.late.FillZero(r.Offset, r.Length)
		d.zeroBytes.Add(r.Length)
	}
	if err != nil {
		return d.deviceError("fill", dev, r.Offset, err)
	}
	dev.lacking.each(r, func(page int64) { dev.lacking.take(page) })
	return nil
}

// lacking is how many pages have not been delivered.
func (d *destination) lacking() (n int64) {
	for _, dev := range d.devices {
		if dev.lacking != nil {
			n += dev.lacking.count.Load()
		}
	}
	return n
}

// fillUp runs the guest, and takes in what it lacks, until that is nothing: over one session or several.
func (d *destination) fillUp(ctx context.Context, c *content) error {
	// Starting the guest may wait for content, so it is done beside.
	run, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	d.ran = make(chan error, 1)
	go func() { // ends with Run, whose result is awaited
		err := d.cfg.Target.Run(run)
		if err == nil {
			d.onRunning()
		}
		d.ran <- err
	}()
	err := d.takeIn(c)
	return d.settle(ctx, err, stop)
}

// settle goes on after a session that ended with err until nothing is missing. stop ends Run, if it goes on.
func (d *destination) settle(ctx context.Context, err error, stop func()) error {
	after := context.WithoutCancel(ctx)
	for {
		switch {
		case d.ranErr != nil:
			return d.notRun(after, d.ranErr)
		case err == nil:
			return nil
		case d.state.get() == DestinationRejoining || d.unmet || !d.mayReconnect(err):
			if d.ran != nil { // nothing will come that it could wait for
				stop()
				if err := <-d.ran; err != nil {
					return d.notRun(after, err)
				}
			}
			return &afterCommitError{err: err, incomplete: true}
		}
		if d.state.get() == DestinationFilling {
			d.state.set(DestinationRejoining)
		}
		err = d.reconnect(ctx, err)
	}
}

// takeIn takes in what is missing, in one session, and returns when it is durable and the source was told, or as much as can
// be.
func (d *destination) takeIn(c *content) error {
	l := c.link
	dead := l.ctx.Done()
	var arrived chan error   // what was served has
	var theirs *wire.Summary // of what was served
	for {
		if d.served && d.standing == wire.Runs {
			return d.completed(context.WithoutCancel(l.ctx), l)
		}
		select {
		case err := <-d.ran:
			d.ran = nil
			if err != nil {
				d.ranErr = err
				return err
			}
			d.standing = wire.Runs
			d.downtime.end(PartResume)
			d.state.set(DestinationFilling)
			_ = l.send(wire.Header{Type: wire.TypeRunning}, nil) // that it fails is told by dead
		case m := <-l.control:
			if m.Type != wire.TypeServed || theirs != nil {
				return unexpectedFrame(m.Type, "served")
			}
			var err error
			if theirs, err = wire.DecodeSummary(m.payload, len(c.devices)); err != nil {
				return err
			}
			arrived = make(chan error, 1)
			d.workers.Go(func() { arrived <- c.reach(theirs) })
		case err := <-arrived:
			arrived = nil
			if err == nil {
				err = d.checkServed(c, theirs)
			}
			if err != nil {
				return err
			}
		case <-dead:
			if !d.served {
				return context.Cause(l.ctx)
			}
			dead = nil // only the guest is waited for
		}
	}
}

// reach waits until all that an account speaks of has been processed.
func (c *content) reach(account *wire.Summary) error {
	for i := range c.devices {
		if err := c.tally.reach(i, account.Devices[i].Total); err != nil {
			return err
		}
	}
	return nil
}

// checkServed holds the source's account of what was missing, all of which has been processed, against ours.
func (d *destination) checkServed(c *content, theirs *wire.Summary) error {
	ours := &wire.Summary{}
	for i, dev := range c.devices {
		ours.Devices = append(ours.Devices, wire.Part{Total: theirs.Devices[i].Total, Digest: dev.digest.sum()})
	}
	if n := d.lacking(); n > 0 {
		return fmt.Errorf("%w: served with %d pages missing", wire.ErrMalformed, n)
	}
	if err := compare(d.manifest.Devices, theirs, ours); err != nil {
		return err
	}
	c.phase.Store(contentClosed)
	d.served, d.summary = true, ours
	return nil
}

// completed makes what arrived durable, and tells the source over l, if it is not nil.
func (d *destination) completed(ctx context.Context, l *link) error {
	for _, dev := range d.devices {
		if dev.late == nil {
			continue
		}
		if r, err := dev.late.NextMissing(0); !errors.Is(err, io.EOF) {
			err := fmt.Errorf("device %q still misses %d bytes at %d after all was delivered (%v)", dev.name, r.Length, r.Offset, err)
			return tell(wire.CodeDevice, err, "device %q did not keep what was delivered", dev.name)
		}
	}
	if err := d.makeDurable(ctx); err != nil {
		return tell(wire.CodeDevice, fmt.Errorf("complete the guest: %w", err), "what was delivered cannot be made durable")
	}
	d.standing = wire.Settled
	d.state.set(DestinationRunning)
	if l == nil {
		return nil
	}
	if err := l.send(wire.Header{Type: wire.TypeSettled}, d.summary.Encode()); err != nil {
		d.log.Warn("nothing is missing any more, but the source cannot be told now", "error", err)
	}
	return nil
}

// makeDurable calls complete, and waits for it as long as that may take: what it waits for, an agent perhaps, must not hold the
// migration up for ever.
func (d *destination) makeDurable(ctx context.Context) error {
	limit := d.cfg.CompleteTimeout
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("it took longer than %v: %w", limit, os.ErrDeadlineExceeded))
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- d.complete(ctx) }() // waited for, or given up on
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (d *destination) mayReconnect(err error) bool {
	return d.cfg.Reconnect != nil && d.version >= 2 && severed(err)
}

// leaveSession ends what is left of a session whose link failed.
func (d *destination) leaveSession(why error) {
	if d.link == nil {
		return
	}
	d.link.part(why)
	d.workers.Wait()
	d.wireBytes += d.link.read.Load()
	d.link = nil
}

// reconnect looks for the source after a session that ended with lost, and has one or more sessions with it. The result is that
// of the last. d.unmet says that there was none.
func (d *destination) reconnect(ctx context.Context, lost error) error {
	d.log.Warn("the link to the source is gone; trying to meet again", "error", lost)
	d.leaveSession(lost)
	d.unmet = true
	return meet(ctx, seeker{d.cfg.Reconnect, d.cfg.Admit, d.cfg.RescueTimeout, d.log}, lost, d.prove, func(c *content) (bool, error) {
		d.unmet = true
		more, err := d.rejoin(c)
		if err != nil {
			d.leaveSession(err)
			return false, err
		}
		d.unmet = false
		if !more {
			return true, nil
		}
		return true, d.takeIn(c)
	})
}

// prove begins a session with somebody who may be the source, and returns when it has proven that it is. It changes nothing of d, and may be
// called concurrently.
func (d *destination) prove(ctx context.Context, streams []io.ReadWriter) (_ *content, err error) {
	ctx, cancel := limitProof(ctx, d.cfg.HandshakeTimeout)
	defer cancel()
	l, err := d.open(ctx, wire.PurposeRejoin, streams)
	if err != nil {
		return nil, err
	}
	c := d.newContent(l, 4*ackEvery)
	c.phase.Store(contentLate)
	c.ready = make(chan struct{})
	l.onBulk = func(h wire.Header, check wire.Check, r *wire.Reader) error {
		select {
		case <-c.ready: // content may overtake, on another stream, the word that it comes
			return c.receive(h, check, r)
		case <-l.ctx.Done():
			return nil
		}
	}
	goOn := l.begin(ctx)
	defer func() {
		if err != nil {
			goOn()
			l.part(err)
		}
	}()
	m, err := l.expect(wire.TypeSeek)
	if err == nil {
		err = l.sought(m, d.manifest.ID)
	}
	if err == nil && !goOn() {
		<-l.ctx.Done() // which follows
		err = context.Cause(l.ctx)
	}
	if err != nil {
		return nil, err
	}
	return c, nil
}

// rejoin begins a session after the first with the source. Where nothing is missing it is over when the source has understood that;
// otherwise there is more to it.
func (d *destination) rejoin(c *content) (more bool, err error) {
	l := c.link
	d.link, d.streams = l, cmp.Or(d.streams, len(l.streams))
	done := l.limit(d.cfg.HandshakeTimeout, "understanding where the guest stands")
	serve := d.standing == wire.Owned || d.standing == wire.Runs
	if serve {
		for _, dev := range d.devices {
			d.forgo(dev)
		}
	}
	say := wire.Rejoin{Standing: d.standing, Fresh: d.fresh}
	if serve {
		for _, dev := range d.devices {
			say.Devices = append(say.Devices, wire.RejoinDevice{Device: wire.Device{Name: dev.name, Size: dev.size}, Missing: dev.late != nil})
		}
	}
	payload, err := say.Encode(d.manifest.ID, l.meeting)
	if err != nil {
		return false, err
	}
	if err := l.send(wire.Header{Type: wire.TypeRejoin}, payload); err != nil {
		return false, err
	}
	if !serve {
		if _, err := l.next(); !errors.Is(err, errBye) {
			return false, fmt.Errorf("the source did not confirm: %w", err)
		}
		done()
		d.told = true
		return false, nil
	}
	for i, dev := range d.devices {
		if dev.late == nil {
			continue
		}
		if err := wire.EncodeMissing(uint16(i), dev.lacking.runs(), l.send); err != nil {
			return false, err
		}
	}
	m, err := l.expect(wire.TypeServe)
	if err != nil {
		return false, err
	}
	done()
	d.reconnects++
	if d.fresh = d.fresh || m.Flags&wire.FlagFresh != 0; d.fresh {
		for _, dev := range d.devices {
			dev.digest = newDigest(dev.size)
		}
	}
	d.askAgain()
	d.makeRoom(l)
	d.flow(c)
	d.workers.Go(func() { d.demand(l) })
	close(c.ready)
	d.unmet = false
	if d.standing == wire.Runs {
		d.state.set(DestinationFilling)
	}
	return true, nil
}

// Forgoer is a [Late] of which what is missing may come to be needed by nobody, as memory whose machine has ended.
type Forgoer interface {
	Late
	// Forgone reports whether it has. It stays so.
	Forgone() bool
}

// forgo asks for nothing more of a device that nobody needs any more. What the source has sent of it on its way here is in the
// source's digest and not in ours: both begin anew.
func (d *destination) forgo(dev *targetDevice) {
	if f, ok := dev.late.(Forgoer); ok && f.Forgone() && dev.lacking.count.Load() > 0 {
		dev.lacking.each(block.Range{Length: dev.size}, func(page int64) { dev.lacking.take(page) })
		d.fresh = true
	}
}

// tell makes sure that the source learns how the migration ended here: it waits for the source's last word, and meets it
// again if the link is gone before that.
func (d *destination) tell(ctx context.Context) {
	if l := d.link; l != nil {
		if l.version < 2 {
			return
		}
		done := l.limit(d.cfg.HandshakeTimeout, "the source's last word")
		<-l.ctx.Done()
		done()
		if d.told = d.told || l.told(d.standing); !d.told && !d.mayReconnect(context.Cause(l.ctx)) {
			d.untold = fmt.Errorf("%w: %w", errUntold, context.Cause(l.ctx))
		}
	}
	if d.told || d.untold != nil || d.version < 2 {
		return
	}
	if d.untold = d.reconnect(ctx, errUntold); d.untold != nil {
		d.log.Warn("the source could not be told how the migration ended: it may be in doubt", "standing", d.standing, "error", d.untold)
	}
}

var errUntold = errors.New("the link died before the source confirmed the end")
