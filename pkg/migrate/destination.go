package migrate

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/zeebo/xxh3"
	"golang.org/x/sync/errgroup"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/wire"
)

// Receive takes a guest from the source at the other end of the streams. When it returns nil the guest runs here, and lacks
// nothing; with a [Postponer] it runs some time before: see [Begin]. When it returns an error nothing of it is left here,
// unless the error wraps [ErrUnsettled] (Report.Outcome "incomplete"): then the guest runs here and lacks content that is still
// at the source; or [ErrInDoubt] (Report.Outcome "failed"): then the guest belongs here, or may, and does not run.
//
// Cancelling ctx stops the migration and is told to the source, until commit has arrived: from DestinationCommitting on
// it has no effect, but for ending the search for a source whose link is gone.
//
// The streams must be those of one Send, in any order. They are taken over, as by Send. Of several that were dialed to a source
// of version 1 of the protocol one is used: Report.Streams says so.
func Receive(ctx context.Context, streams []io.ReadWriter, cfg DestinationConfig) (*Report, error) {
	return receive(ctx, streams, cfg, func() {})
}

// receive is Receive; running is called once the guest runs, by any goroutine.
func receive(ctx context.Context, streams []io.ReadWriter, cfg DestinationConfig, running func()) (*Report, error) {
	err := cfg.check()
	if err == nil {
		err = checkStreams(streams)
	}
	if err != nil {
		interruptAll(streams)
		err = fmt.Errorf("receive guest: %w", err)
		return &Report{Role: wire.RoleDestination.String(), Outcome: DestinationDiscarded.String(), Error: err.Error(), Streams: len(streams)}, err
	}
	d := newDestination(cfg, DestinationConnecting, running)
	return d.receive(len(streams), func() error { return d.run(ctx, streams) })
}

// newDestination has a configuration that was checked.
func newDestination(cfg DestinationConfig, first DestinationState, running func()) *destination {
	d := &destination{cfg: cfg, log: cfg.Logger.With("role", "destination"), onRunning: sync.OnceFunc(running),
		unpacker: newDecompressor(cfg.Concurrency)}
	d.asks.wake = make(chan struct{}, 1)
	d.began = time.Now()
	d.meter = &meter{tell: cfg.Progress, take: func() Progress {
		p := Progress{Role: wire.RoleDestination.String(), State: d.state.get().String(), Size: d.size.Load(),
			Data: d.dataBytes.Load(), Zero: d.zeroBytes.Load(), StateBytes: d.stateBytes.Load(), Elapsed: time.Since(d.began)}
		p.Dirty, p.Rest = d.missing()
		return p
	}}
	d.state = newMachine(first, func(st DestinationState) {
		d.log.Debug("migration state", "state", st)
		d.meter.report()
		if cfg.OnState != nil {
			cfg.OnState(st)
		}
	})
	return d
}

// receive runs f and reports.
func (d *destination) receive(streams int, f func() error) (*Report, error) {
	stop := d.meter.run()
	err := f()
	stop()
	if d.release != nil {
		d.release()
	}
	if d.streams > 0 {
		streams = d.streams
	}
	if err != nil {
		if d.manifest != nil {
			err = fmt.Errorf("receive guest, migration %s: %w", wire.PublicID(d.manifest.ID), err)
		} else {
			err = fmt.Errorf("receive guest: %w", err)
		}
	}
	return d.report(streams, err), err
}

// destination is one call of Receive.
type destination struct {
	cfg       DestinationConfig
	log       *slog.Logger
	state     *machine[DestinationState]
	meter     *meter
	link      *link // nil until connected, and between sessions
	manifest  *wire.Manifest
	workers   sync.WaitGroup
	onRunning func()

	began    time.Time
	downtime laps // begun by the first device state
	prepared bool // Prepare succeeded: a failure needs Discard
	promised bool // Prepared may have been sent: a failure needs the journal's Abort
	summary  *wire.Summary

	version  uint16
	streams  int // of the first session; 0 before it
	unpacker *decompressor
	devices  []*targetDevice
	lacks    bool                        // content was missing when the guest was started
	complete func(context.Context) error // makes what arrived late durable
	standing wire.Standing               // what the source is told when the two meet again
	served   bool                        // all that was missing is here, and both sides agree on it
	ran      chan error                  // result of Run, when it was called beside the filling
	ranErr   error                       // what came of it
	fresh    bool                        // this process does not remember what was received before
	asks     asks
	release  func() // of spare processors; nil without them

	unmet      bool // the latest attempt to meet the source again failed
	told       bool // the source has ended the conversation, so it knows
	untold     error
	lateBytes  int64
	reconnects int
	wireBytes  int64 // read from links that are gone

	size        atomic.Int64
	dataBytes   atomic.Int64
	zeroBytes   atomic.Int64
	storedBytes atomic.Int64 // fetched from a store
	stateBytes  atomic.Int64
	filling     atomic.Pointer[filling] // for the meter
}

// content takes in what one session brings.
type content struct {
	link    *link
	devices []*targetDevice
	tally   *tally
	jobs    chan *wire.Buffer // content frames on their way to a device
	phase   atomic.Uint32
	write   func(*wire.Buffer) error // content to a device
	ready   chan struct{}            // closed when content may come, in a session after the first
}

func (c *content) part(why error) { c.link.part(why) }

// Phases of content.
const (
	contentOpen   uint32 = iota // it goes to the devices
	contentClosed               // none is due
	contentLate                 // it is missing here, and goes where it is waited for
)

func (d *destination) newContent(l *link, window int64) *content {
	c := &content{link: l, devices: d.devices, tally: newTally(len(d.devices), window), jobs: make(chan *wire.Buffer, 2*d.cfg.Concurrency)}
	c.write = func(b *wire.Buffer) error { return d.write(c, b) }
	return c
}

// makeRoom has what is streamed step back behind what is demanded.
func (d *destination) makeRoom(l *link) {
	l.reserved.Store(true)
	l.aside.Store(d.cfg.OwnThreads)
	if d.release == nil && d.cfg.OwnThreads {
		d.release = spareProcessors(d.cfg.Concurrency + len(l.streams) + 1)
	}
}

// flow has content taken in until the link ends.
func (d *destination) flow(c *content) {
	context.AfterFunc(c.link.ctx, func() { c.tally.fail(context.Cause(c.link.ctx)) }) // which ends in any case
	for range d.cfg.Concurrency {
		d.workers.Go(func() { d.work(c) })
	}
	d.workers.Go(func() { d.acknowledge(c) })
}

// targetDevice is a device in the course of Receive.
type targetDevice struct {
	block.Device
	name   string
	size   int64
	digest *digest
	// blank: it held only zeros when it was handed over, so that a run of zeros that was never anything else here need
	// not be written. Free RAM then costs nothing.
	blank    bool
	based    bool          // it started as the base that the manifest names
	stored   *targetStored // what comes from a store; nil: nothing
	shared   bool          // it is the source's device itself, for which this stands
	flushing atomic.Bool

	// What is missing when the guest is started; nil where nothing is. A page leaves lacking when it was delivered.
	late    Late
	lacking *pageSet
	asked   *pageSet // of this session; guarded by asks.mu, but for looking at its pages
	listed  bool     // the list of it is complete
}

// afterCommitError is a failure after the source gave the guest away. neverRan says that the journal holds the promise
// never to run it here.
type afterCommitError struct {
	err        error
	neverRan   bool
	incomplete bool // the guest runs, or may, and lacks content
}

// farewell is what the source is told: nothing, when there is none but that the link is gone.
func (e *afterCommitError) farewell() error {
	if e.incomplete && severed(e.err) {
		return nil
	}
	return e.err
}

func (e *afterCommitError) Error() string { return e.err.Error() }
func (e *afterCommitError) Unwrap() error { return e.err }

func (d *destination) run(ctx context.Context, streams []io.ReadWriter) error {
	d.state.begin()
	return d.conclude(ctx, d.walk(ctx, streams))
}

// conclude ends the migration after a walk that ended with err.
func (d *destination) conclude(ctx context.Context, err error) error {
	after := context.WithoutCancel(ctx)
	if err == nil {
		if !d.cfg.Copy {
			d.tell(ctx)
		}
		if d.link != nil {
			d.link.goodbye(nil, false) // before the journal: the source waits for it
		}
		if !d.cfg.Copy {
			if err := d.cfg.Journal.Done(after, d.manifest.ID); err != nil {
				d.log.Warn("cannot record the end of the migration", "error", err)
			}
		}
		d.finish()
		return nil
	}

	var late *afterCommitError
	if errors.As(err, &late) && !late.neverRan {
		end, sentinel := DestinationFailed, ErrInDoubt
		if late.incomplete {
			end, sentinel = DestinationIncomplete, ErrUnsettled
		}
		d.state.set(end)
		if d.link != nil {
			d.link.goodbye(late.farewell(), false)
		}
		d.finish()
		return fmt.Errorf("%w: %w", sentinel, err)
	}
	return d.discard(ctx, err)
}

// discard drops what was received after a failure, and returns the failure.
func (d *destination) discard(cancelable context.Context, failure error) error {
	ctx := context.WithoutCancel(cancelable)
	state := d.state.get()
	d.state.set(DestinationDiscarding)
	if d.link != nil {
		d.link.fail(failure) // workers end; the other side is told below
	}
	neverRan := state >= DestinationCommitting && !d.cfg.Copy // promised where the failure was found
	if d.promised && !neverRan {
		// The source may have committed. A durable word from us lets it take the guest back.
		if err := d.cfg.Journal.Abort(ctx, d.manifest.ID); err != nil {
			failure = fmt.Errorf("%w (and its end could not be recorded: %w)", failure, err)
		} else {
			neverRan = true
		}
	}
	// A guest whose devices are here goes on at the source only when nothing here can touch them any more.
	shared := len(d.shared()) > 0
	if d.link != nil && !neverRan && !shared {
		d.link.goodbye(failure, false)
	}
	d.workers.Wait()
	if d.prepared {
		if err := d.cfg.Target.Discard(ctx); err != nil {
			failure = fmt.Errorf("%w (and discard: %w)", failure, err)
			d.log.Error("cannot discard what was received", "error", err)
		}
	}
	if d.link != nil && (neverRan || shared) {
		d.link.goodbye(failure, neverRan)
	}
	if neverRan {
		d.standing = wire.NeverRan
	}
	d.finish()
	d.state.set(DestinationDiscarded)
	if neverRan {
		d.tell(cancelable)
		if d.link != nil {
			d.link.goodbye(nil, false)
		}
		d.finish()
		if f, ok := d.cfg.Target.(Forgetter); ok && d.told && d.prepared {
			if err := f.Forget(ctx); err != nil {
				d.log.Warn("cannot remove the record of a guest that never ran here", "error", err)
			}
		}
	}
	return failure
}

// finish ends everything that runs for this migration.
func (d *destination) finish() {
	if d.link == nil {
		return
	}
	d.workers.Wait()
	d.link.close()
	d.wireBytes += d.link.read.Load()
	d.told = d.told || d.link.told(d.standing)
	d.link = nil
}

// told reports whether the source has said that it knows how the guest stands. An abort of the source says that it has the guest.
func (l *link) told(standing wire.Standing) bool {
	return l.heardBye.Load() || l.heardAbort.Load() && standing == wire.NeverRan
}

// walk goes through the states until the guest runs here.
func (d *destination) walk(ctx context.Context, streams []io.ReadWriter) error {
	l, err := d.open(ctx, wire.PurposeMigrate, streams)
	if err != nil {
		return err
	}
	d.link, d.version, d.streams = l, l.version, len(l.streams)
	var taking atomic.Pointer[content] // nil until the devices are ready
	l.onBulk = func(h wire.Header, check wire.Check, r *wire.Reader) error {
		c := taking.Load()
		if c == nil {
			return unexpectedFrame(h.Type, "nothing before accept")
		}
		return c.receive(h, check, r)
	}
	ignoreCancel := l.start(ctx)
	defer ignoreCancel()

	d.state.set(DestinationWaiting)
	done := l.limit(d.cfg.HandshakeTimeout, "sending the manifest")
	msg, err := l.expect(wire.TypeManifest)
	if err != nil {
		return err
	}
	done()
	m, err := wire.DecodeManifest(msg.payload)
	if err != nil {
		return err
	}
	d.manifest = m
	d.log = d.log.With("migration", wire.PublicID(m.ID))

	d.state.set(DestinationPreparing)
	c, err := d.prepare(m)
	if err != nil {
		return err
	}

	d.state.set(DestinationReceiving)
	accept, err := d.offer(l.ctx, len(c.devices))
	if err != nil {
		return err
	}
	d.flow(c)
	taking.Store(c)
	if err := l.send(wire.Header{Type: wire.TypeAccept}, accept); err != nil {
		return err
	}
	d.fetchAll(c)
	state, theirs, err := d.collect(c)
	if err != nil {
		return err
	}

	d.downtime.end(PartTransfer)
	d.state.set(DestinationLoading)
	ours, err := d.load(c, state, theirs)
	if err != nil {
		return err
	}
	d.summary = ours

	d.state.set(DestinationPrepared)
	done = l.limit(d.cfg.CommitTimeout, "the commit")
	d.promised = !d.cfg.Copy
	if err := l.send(wire.Header{Type: wire.TypePrepared}, ours.Encode()); err != nil {
		return err
	}
	decision := wire.TypeCommit
	if d.cfg.Copy {
		decision = wire.TypeCopied
	}
	if _, err := l.expect(decision); err != nil {
		return err
	}
	done()
	if !ignoreCancel() {
		<-l.ctx.Done()
		return context.Cause(l.ctx)
	}
	if d.cfg.Copy {
		return d.keep(ctx, ours)
	}
	return d.own(ctx, c)
}

// open begins a session over streams.
func (d *destination) open(ctx context.Context, purpose wire.Purpose, streams []io.ReadWriter) (*link, error) {
	l, err := connect(ctx, greeting{wire.RoleDestination, purpose, d.cfg.newest, d.cfg.HandshakeTimeout}, streams)
	if err != nil {
		return nil, err
	}
	l.heartbeatTimeout = d.cfg.HeartbeatTimeout
	l.log = d.cfg.Logger
	return l, nil
}

// shared names the devices that are the source's own.
func (d *destination) shared() (names []string) {
	for _, dev := range d.devices {
		if dev.shared {
			names = append(names, dev.name)
		}
	}
	return names
}

// offer is what accept says to a manifest of n devices: what can be done here.
func (d *destination) offer(ctx context.Context, n int) ([]byte, error) {
	var a wire.Accept
	if t, ok := d.cfg.Target.(NetworkTarget); ok && !d.cfg.Copy {
		var err error
		if a.Network, err = t.Network(ctx, d.manifest.Network); err != nil {
			return nil, err
		}
	}
	if d.link.version < 2 {
		if d.cfg.Copy {
			err := errors.New("the source speaks version 1 of the protocol, which knows no copies")
			return nil, tell(wire.CodeRefused, err, "%v", err)
		}
		return nil, nil
	}
	a.Copy = d.cfg.Copy
	if slices.ContainsFunc(d.devices, func(dev *targetDevice) bool { return dev.stored != nil }) {
		for _, dev := range d.devices {
			a.Stored = append(a.Stored, dev.stored != nil)
		}
	}
	_, bases := d.cfg.Target.(BaseTarget)
	a.Bare = !bases
	if len(d.shared()) > 0 {
		for _, dev := range d.devices {
			a.Shared = append(a.Shared, dev.shared)
		}
	}
	if slices.ContainsFunc(d.devices, func(dev *targetDevice) bool { return dev.based }) {
		for _, dev := range d.devices {
			a.Based = append(a.Based, dev.based)
		}
	}
	if p, ok := d.cfg.Target.(Postponer); ok && !d.cfg.DisablePostCopy && !d.cfg.Copy {
		a.Postpone = p.CanPostpone()
		if len(a.Postpone) != n {
			return nil, fmt.Errorf("target speaks of %d devices to postpone, the manifest has %d", len(a.Postpone), n)
		}
		for i, dev := range d.devices {
			a.Postpone[i] = a.Postpone[i] && !dev.shared
			if a.Postpone[i] {
				dev.lacking, dev.asked = newPageSet(dev.size), newPageSet(dev.size)
			}
		}
		d.complete = p.Complete
	}
	return a.Encode()
}

// keep ends the making of a copy.
func (d *destination) keep(ctx context.Context, ours *wire.Summary) error {
	d.state.set(DestinationKeeping)
	if err := d.cfg.Target.(Keeper).Keep(context.WithoutCancel(ctx)); err != nil {
		return fmt.Errorf("keep the copy: %w", err)
	}
	d.state.set(DestinationCopied)
	if err := d.link.send(wire.Header{Type: wire.TypeSettled}, ours.Encode()); err != nil {
		d.log.Warn("the copy is here, but the source cannot be told", "error", err)
	}
	return nil
}

// own makes the guest ours, after commit came: from here on the link may do what it wants.
func (d *destination) own(ctx context.Context, c *content) error {
	l := d.link
	d.downtime.end(PartDecision)
	d.state.set(DestinationCommitting)
	after := context.WithoutCancel(ctx)
	if err := d.cfg.Journal.Commit(after, d.manifest.ID); err != nil {
		return d.giveBack(after, fmt.Errorf("record the commit: %w", err))
	}
	d.downtime.end(PartCommit)
	d.standing = wire.Owned
	d.state.set(DestinationStarting)
	if d.lacks {
		return d.fillUp(ctx, c)
	}
	if err := d.cfg.Target.Run(after); err != nil {
		return d.notRun(after, err)
	}
	d.downtime.end(PartResume)
	d.standing = wire.Settled
	d.onRunning()
	d.state.set(DestinationRunning)
	if err := l.send(wire.Header{Type: wire.TypeRunning}, nil); err != nil {
		d.log.Warn("guest runs here, but the source cannot be told now: it will be in doubt", "error", err)
	}
	return nil
}

// notRun is the failure of Run.
func (d *destination) notRun(ctx context.Context, err error) error {
	err = fmt.Errorf("run guest: %w", err)
	if errors.Is(err, ErrNeverRan) {
		return d.giveBack(ctx, err)
	}
	return &afterCommitError{err: err}
}

// giveBack makes the promise that the guest will never run here, after the source gave it away.
func (d *destination) giveBack(ctx context.Context, failure error) error {
	if err := d.cfg.Journal.Abort(ctx, d.manifest.ID); err != nil {
		return &afterCommitError{err: fmt.Errorf("%w (and the guest cannot be given back: %w)", failure, err)}
	}
	return &afterCommitError{err: failure, neverRan: true}
}

// prepare has the target make the devices, and checks what it made.
func (d *destination) prepare(m *wire.Manifest) (*content, error) {
	devices, err := d.cfg.Target.Prepare(d.link.ctx, m)
	if err != nil {
		if d.link.ctx.Err() != nil {
			return nil, fmt.Errorf("prepare: %w", context.Cause(d.link.ctx))
		}
		return nil, fmt.Errorf("prepare: %w", err)
	}
	d.prepared = true
	if len(devices) != len(m.Devices) {
		return nil, fmt.Errorf("prepare: target made %d devices for a manifest of %d", len(devices), len(m.Devices))
	}
	shared := make([]bool, len(devices))
	if t, ok := d.cfg.Target.(SharedTarget); ok && d.link.version >= 2 && !d.cfg.Copy {
		if shared = t.Shared(); len(shared) != len(devices) {
			return nil, fmt.Errorf("prepare: target shares of %d devices, the manifest has %d", len(shared), len(devices))
		}
	}
	bases, err := d.bases(m, shared)
	if err != nil {
		return nil, err
	}
	for i, dev := range devices {
		want := m.Devices[i]
		if shared[i] {
			d.devices = append(d.devices, &targetDevice{Device: blank(want.Size), name: want.Name, size: want.Size, digest: newDigest(want.Size), blank: true, shared: true})
			d.size.Add(want.Size)
			continue
		}
		if dev.Size() != want.Size {
			err := fmt.Errorf("device %q has %d bytes here and %d at the source", want.Name, dev.Size(), want.Size)
			return nil, tell(wire.CodeRefused, err, "%v", err)
		}
		t := &targetDevice{Device: dev, name: want.Name, size: want.Size, digest: newDigest(want.Size)}
		if x := bases[i]; x != nil && x.Size() == want.Size && x.Digest().String() == want.Base {
			t.based, t.digest = true, x.pages.clone()
		} else if e, ok := dev.(block.Extents); ok {
			_, err := e.NextData(0)
			t.blank = errors.Is(err, io.EOF)
		}
		d.size.Add(t.size)
		d.devices = append(d.devices, t)
	}
	if err := d.stored(m); err != nil {
		return nil, err
	}
	return d.newContent(d.link, m.Window), nil
}

// bases asks the target which devices hold a base, if the source wants to know. What is shared does not become one: the source's guest
// uses it.
func (d *destination) bases(m *wire.Manifest, shared []bool) ([]*BaseIndex, error) {
	none := make([]*BaseIndex, len(m.Devices))
	asked := *m
	asked.Devices = slices.Clone(m.Devices)
	for i := range asked.Devices {
		if shared[i] {
			asked.Devices[i].Base = ""
		}
	}
	m = &asked
	t, ok := d.cfg.Target.(BaseTarget)
	if !ok || d.link.version < 2 || !slices.ContainsFunc(m.Devices, func(d wire.Device) bool { return d.Base != "" }) {
		return none, nil
	}
	bases, err := t.Bases(d.link.ctx, m)
	if err != nil {
		return nil, fmt.Errorf("prepare: find bases: %w", err)
	}
	if len(bases) != len(none) {
		return nil, fmt.Errorf("prepare: target knows the bases of %d devices for a manifest of %d", len(bases), len(none))
	}
	return bases, nil
}

// receive takes a content frame from a stream and passes it to a worker. When the devices are slower than the streams,
// it waits, and so does the source.
func (c *content) receive(h wire.Header, check wire.Check, r *wire.Reader) error {
	if int(h.Device) >= len(c.devices) {
		return fmt.Errorf("%w: %v frame for device %d of %d", wire.ErrMalformed, h.Type, h.Device, len(c.devices))
	}
	b := wire.NewBuffer()
	b.Header, b.N, b.Check = h, int(h.Length), check
	if err := r.Payload(b.Bytes()); err != nil {
		b.Release()
		return err
	}
	if _, err := extentOf(b, c.devices[h.Device].size); err != nil {
		b.Release()
		return err
	}
	// What somebody waits for does not stand in line.
	if dev := c.devices[h.Device]; c.phase.Load() == contentLate && dev.late != nil && dev.asked.has(int64(h.Offset)/block.PageSize) {
		defer b.Release()
		return c.write(b)
	}
	select {
	case c.jobs <- b:
	case <-c.link.ctx.Done():
		b.Release()
	}
	return nil
}

// extentOf returns the range of the device that a content frame speaks of.
func extentOf(b *wire.Buffer, size int64) (block.Range, error) {
	h := b.Header
	r := block.Range{Offset: int64(h.Offset), Length: int64(h.Length)}
	switch {
	case h.Type == wire.TypeZero:
		n, err := wire.ParseZero(b.Bytes())
		if err != nil {
			return r, err
		}
		r.Length = n
	case h.Flags&wire.FlagZstd != 0:
		n, err := unpackedSize(b.Bytes())
		if err != nil {
			return r, err
		}
		r.Length = int64(n)
	}
	switch {
	case r.Offset > size || r.Length > size-r.Offset:
		return r, fmt.Errorf("%w: %v of %d bytes at %d in device %d of %d bytes", wire.ErrMalformed, h.Type, r.Length, r.Offset, h.Device, size)
	case r.Offset%wire.PageSize != 0 || r.Length%wire.PageSize != 0 && r.End() != size:
		return r, fmt.Errorf("%w: %v of %d bytes at %d in device %d is not whole pages of %d", wire.ErrMalformed, h.Type, r.Length, r.Offset, h.Device, wire.PageSize)
	}
	return r, nil
}

// work writes content to devices until the link ends.
func (d *destination) work(c *content) {
	var back background
	for {
		select {
		case b := <-c.jobs:
			if c.link.aside.Load() {
				back.stepBack()
			}
			err := d.write(c, b)
			b.Release()
			if err != nil {
				c.link.fail(err)
			}
		case <-c.link.ctx.Done():
			return
		}
	}
}

func (d *destination) write(c *content, b *wire.Buffer) error {
	i := int(b.Header.Device)
	dev := c.devices[i]
	r, err := extentOf(b, dev.size)
	if err != nil {
		return err
	}
	n := b.Check.Size() + wire.HeaderSize + int64(b.N)
	if c.phase.Load() == contentLate {
		// The guest may run on it at once: the digest at the end would come too late.
		if err := b.Check.Verify(b.Header, b.Bytes()); err != nil {
			return err
		}
	}
	if b.Header.Flags&wire.FlagZstd != 0 {
		plain := wire.NewBuffer()
		defer plain.Release()
		plain.Header, plain.N = b.Header, int(r.Length)
		if err := d.unpacker.unpack(plain.Bytes(), b.Bytes()); err != nil {
			return err
		}
		b = plain
	}
	switch c.phase.Load() {
	case contentClosed:
		return unexpectedFrame(b.Header.Type, "nothing after final")
	case contentLate:
		if err := d.fill(dev, i, r, b); err != nil {
			return err
		}
		c.tally.add(i, n)
		return nil
	}
	if dev.stored != nil {
		defer dev.stored.touch(r)()
	}
	if b.Header.Type == wire.TypeData {
		if err := d.storeData(dev, r.Offset, b.Bytes()); err != nil {
			return err
		}
		d.dataBytes.Add(r.Length)
	} else {
		if err := d.storeZeros(dev, r); err != nil {
			return err
		}
		d.zeroBytes.Add(r.Length)
	}
	c.tally.add(i, n)
	return nil
}

// storeData writes content to a device, before the guest uses it, and notes that.
func (d *destination) storeData(dev *targetDevice, off int64, p []byte) error {
	dev.digest.write(off, p)
	if _, err := dev.WriteAt(p, off); err != nil {
		return d.deviceError("write", dev, off, err)
	}
	return nil
}

// storeZeros is storeData of zeros.
func (d *destination) storeZeros(dev *targetDevice, r block.Range) error {
	if dev.blank && dev.digest.isZero(r.Offset, r.Length) {
		return nil
	}
	dev.digest.zero(r.Offset, r.Length)
	if err := dev.Discard(r.Offset, r.Length); err != nil {
		return d.deviceError("discard", dev, r.Offset, err)
	}
	return nil
}

// deviceError wraps an error of a device so that the source learns the device's name and, if it is one, the kernel's
// word for what is wrong ("no space left on device"), but no path.
func (d *destination) deviceError(what string, dev *targetDevice, off int64, err error) error {
	text := fmt.Sprintf("cannot %s device %q", what, dev.name)
	if errno, ok := errnoOf(err); ok {
		text += ": " + errno.Error()
	}
	return tell(wire.CodeDevice, fmt.Errorf("%s device %q at %d: %w", what, dev.name, off, err), "%s", text)
}

// acknowledge tells the source what was processed: when it is worth a frame, and after a while in any case, as a source to which
// nothing is acknowledged gives up.
func (d *destination) acknowledge(c *content) {
	tick := time.NewTicker(ackTimeout / 4)
	defer tick.Stop()
	for {
		select {
		case <-c.tally.signal:
		case <-tick.C:
		case <-c.link.ctx.Done():
			return
		}
		for i := range c.devices {
			if n, news := c.tally.take(i); news {
				if c.link.send(wire.Header{Type: wire.TypeAck, Device: uint16(i), Offset: uint64(n)}, nil) != nil {
					return
				}
			}
		}
	}
}

// collect receives until the source has sent everything and everything has been processed. It returns the device state
// and the source's account.
func (d *destination) collect(c *content) (state []byte, theirs *wire.Summary, err error) {
	last := false
	for theirs == nil {
		m, err := d.link.next()
		if err != nil {
			return nil, nil, err
		}
		switch m.Type {
		case wire.TypeRoundEnd:
			if int(m.Device) >= len(c.devices) {
				return nil, nil, fmt.Errorf("%w: round-end of device %d of %d", wire.ErrMalformed, m.Device, len(c.devices))
			}
			c.tally.roundEnd(int(m.Device), int64(m.Offset))
			d.flushLater(c, int(m.Device), int64(m.Offset))
		case wire.TypeState:
			switch {
			case last || int64(m.Offset) != int64(len(state)):
				return nil, nil, fmt.Errorf("%w: device state at %d after %d bytes (last: %t)", wire.ErrMalformed, m.Offset, len(state), last)
			case int64(len(state)+len(m.payload)) > d.cfg.MaxState:
				err := fmt.Errorf("device state is larger than %d bytes: raise DestinationConfig.MaxState", d.cfg.MaxState)
				return nil, nil, tell(wire.CodeRefused, err, "device state is larger than %d bytes", d.cfg.MaxState)
			}
			if !d.downtime.begun() {
				d.downtime.begin()
				if t, ok := d.cfg.Target.(ArrivalTarget); ok {
					t.Arriving()
				}
			}
			state = append(state, m.payload...)
			last = m.Flags&wire.FlagLast != 0
			d.stateBytes.Store(int64(len(state)))
		case wire.TypeIdle:
			if err := d.idle(c, m.Header); err != nil {
				return nil, nil, err
			}
		case wire.TypeMissing:
			if err := d.list(m); err != nil {
				return nil, nil, err
			}
		case wire.TypeFinal:
			if !last {
				return nil, nil, unexpectedFrame(m.Type, "the end of the device state")
			}
			for i, dev := range c.devices {
				if dev.lacking != nil && dev.lacking.count.Load() > 0 && !dev.listed {
					return nil, nil, unexpectedFrame(m.Type, fmt.Sprintf("more of what device %d is missing", i))
				}
				if dev.stored != nil && !dev.stored.over.Load() {
					return nil, nil, unexpectedFrame(m.Type, fmt.Sprintf("the rest of device %d, which is being fetched", i))
				}
			}
			if theirs, err = wire.DecodeSummary(m.payload, len(c.devices)); err != nil {
				return nil, nil, err
			}
		default:
			return nil, nil, unexpectedFrame(m.Type, "content, device state or final")
		}
	}
	for i := range c.devices {
		if err := c.tally.reach(i, theirs.Devices[i].Total); err != nil {
			return nil, nil, err
		}
	}
	c.phase.Store(contentClosed)
	return state, theirs, nil
}

// flushLater flushes a device, in the background, once its round is complete, so that little is left to flush while the
// guest is paused. A flush that is still going on when the next round ends is enough.
func (d *destination) flushLater(c *content, i int, total int64) {
	dev := c.devices[i]
	if !dev.flushing.CompareAndSwap(false, true) {
		return
	}
	d.workers.Go(func() {
		defer dev.flushing.Store(false)
		if c.tally.atLeast(i, total) != nil {
			return // the link has failed, which is known
		}
		if err := dev.Flush(); err != nil {
			d.link.fail(d.deviceError("flush", dev, 0, err))
		}
	})
}

// load compares the accounts, makes what was received durable, and gives the VMM its state. What the guest had flushed
// at the source must survive a power cut here before the source lets go of it.
func (d *destination) load(c *content, state []byte, theirs *wire.Summary) (*wire.Summary, error) {
	var h xxh3.Hasher128
	_, _ = h.Write(state) // never fails
	ours := &wire.Summary{State: wire.Part{Total: int64(len(state)), Digest: stateHash(&h)}}
	for i, dev := range c.devices {
		ours.Devices = append(ours.Devices, wire.Part{Total: theirs.Devices[i].Total, Digest: dev.digest.sum()})
	}
	if err := compare(d.manifest.Devices, theirs, ours); err != nil {
		return nil, err
	}
	d.downtime.end(PartVerify)
	if err := d.postpone(c); err != nil {
		return nil, err
	}
	var g errgroup.Group
	began := time.Now()
	var flushed atomic.Int64 // nanoseconds after began
	for _, dev := range c.devices {
		if dev.late != nil {
			continue
		}
		g.Go(func() error {
			if err := dev.Flush(); err != nil {
				return d.deviceError("flush", dev, 0, err)
			}
			atomicMax(&flushed, int64(time.Since(began)))
			return nil
		})
	}
	var loaded time.Time
	g.Go(func() error {
		defer func() { loaded = time.Now() }()
		if err := d.cfg.Target.Load(d.link.ctx, bytes.NewReader(state)); err != nil {
			return tell(wire.CodeInternal, fmt.Errorf("load device state: %w", err), "the VMM cannot load the device state")
		}
		return nil
	})
	if err := g.Wait(); err != nil {
		if d.link.ctx.Err() != nil {
			return nil, fmt.Errorf("load: %w", context.Cause(d.link.ctx))
		}
		return nil, err
	}
	d.downtime.endAll(span{PartFlush, began, began.Add(time.Duration(flushed.Load()))}, span{PartLoad, began, loaded})
	return ours, nil
}

func (d *destination) report(streams int, err error) *Report {
	r := &Report{
		Role: wire.RoleDestination.String(), Outcome: d.state.get().String(), Streams: streams,
		Total: Millis(time.Since(d.began)), Downtime: d.downtime.total(), Parts: d.downtime.parts, Phases: d.state.history,
		DataBytes: d.dataBytes.Load(), ZeroBytes: d.zeroBytes.Load(), StateBytes: d.stateBytes.Load(), StoredBytes: d.storedBytes.Load(),
	}
	if err != nil {
		r.Error = err.Error()
	}
	r.Shared = d.shared()
	if d.manifest != nil {
		r.ID = wire.PublicID(d.manifest.ID)
		if d.summary != nil && !d.fresh {
			r.Digests = digestsOf(d.manifest.Devices, d.summary, r.Shared)
		}
	}
	r.WireBytes, r.LateBytes, r.Reconnects, r.Untold = d.wireBytes, d.lateBytes, d.reconnects, d.untold
	if d.link != nil {
		r.WireBytes += d.link.read.Load()
	}
	return r
}
