package migrate

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/zeebo/xxh3"
	"golang.org/x/sync/errgroup"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/wire"
)

// Send moves the guest to the destination at the other end of the streams. When it returns nil the guest runs there
// and needs nothing more from here; or, if the destination asked for a copy (Report.Outcome is "copied"), it has one, and the
// guest runs on here. When it returns an error the guest runs here, as it did before, unless the error wraps [ErrInDoubt] (it is
// paused, and must stay so) or [ErrUnsettled] (it runs there, and content of it is only here), or Report.Outcome is "stuck" (it
// could not be resumed).
//
// Cancelling ctx stops the migration and is told to the destination, until the decision falls: from SourceCommitting on
// it has no effect.
//
// Send takes the streams over: those that have a Close are closed when it returns, of others the deadline is set to the
// past, and the goroutines that read and write those that have neither end when the caller closes them.
func Send(ctx context.Context, streams []io.ReadWriter, cfg SourceConfig) (*Report, error) {
	err := cfg.check()
	if err == nil {
		err = checkStreams(streams)
	}
	if err != nil {
		interruptAll(streams)
		err = fmt.Errorf("send guest: %w", err)
		return &Report{ID: wire.PublicID(cfg.ID), Role: wire.RoleSource.String(), Outcome: SourceKept.String(), Error: err.Error(), Streams: len(streams)}, err
	}
	return newSource(cfg, SourceConnecting).send(len(streams), func(s *source) error { return s.run(ctx, streams) })
}

// RejoinSource is the source's part of a migration after the commit, in a process that was restarted: with the guest adopted,
// paused, and the devices as they were. Of cfg, ID, Devices, Guest, Journal and Reconnect are needed; the journal holds the
// commit. It looks for the destination, serves what is missing there, and returns as Send does: nil when the guest runs there and
// needs nothing more from here; ErrInDoubt; ErrUnsettled; any other error when the guest runs here again.
//
// Cancelling ctx ends the search for the destination, and has no effect while there is a link to it.
func RejoinSource(ctx context.Context, cfg SourceConfig) (*Report, error) {
	err := cfg.check()
	if err == nil && cfg.Reconnect == nil {
		err = errors.New("no way to reconnect: set SourceConfig.Reconnect")
	}
	if err != nil {
		err = fmt.Errorf("rejoin migration: %w", err)
		return &Report{ID: wire.PublicID(cfg.ID), Role: wire.RoleSource.String(), Outcome: SourceInDoubt.String(), Error: err.Error()}, fmt.Errorf("%w: %w", ErrInDoubt, err)
	}
	return newSource(cfg, SourceSeeking).send(0, func(s *source) error {
		s.disturbed, s.recorded, s.fresh, s.version = true, true, true, 2
		s.goal = Goal{}
		s.state.begin()
		return s.conclude(ctx, s.reconnect(ctx, errRestarted))
	})
}

// newSource has a configuration that was checked.
func newSource(cfg SourceConfig, first SourceState) *source {
	s := &source{cfg: cfg, log: cfg.Logger.With("migration", wire.PublicID(cfg.ID), "role", "source"), reasons: make(map[string]string)}
	s.goal = cfg.Goal
	if _, ok := cfg.Guest.(Throttler); !ok {
		s.goal.Throttle = false
	}
	var total int64
	for i, d := range cfg.Devices {
		s.devices = append(s.devices, &sourceDevice{SourceDevice: d, index: i, size: d.Device.Size()})
		total += d.Device.Size()
	}
	s.all, s.storing = s.devices, newStoring(s.devices)
	s.began = time.Now()
	s.meter = &meter{tell: cfg.Progress, take: func() Progress {
		p := Progress{Role: wire.RoleSource.String(), State: s.state.get().String(), Round: int(s.round.Load()), Size: total, Dirty: s.dirty.Load(),
			Data: s.dataBytes.Load(), Zero: s.zeroBytes.Load(), Same: s.sameBytes.Load(), StateBytes: s.stateBytes.Load(), Elapsed: time.Since(s.began)}
		p.Rest = max(0, p.Dirty+s.sentBefore.Load()-p.Data-p.Zero-p.Same)
		if d := s.decided.Load(); d != nil {
			p.DirtyRate, p.Throttle = d.DirtyRate, d.Share
			if d.Bandwidth > 0 {
				p.share = d.DirtyRate / d.Bandwidth
			}
		}
		return p
	}}
	s.state = newMachine(first, func(st SourceState) {
		s.log.Debug("migration state", "state", st)
		s.meter.report()
		if cfg.OnState != nil {
			cfg.OnState(st)
		}
	})
	return s
}

// send runs f and reports.
func (s *source) send(streams int, f func(*source) error) (*Report, error) {
	stop := s.meter.run()
	err := f(s)
	stop()
	if s.release != nil {
		s.release()
	}
	if err != nil {
		err = fmt.Errorf("send guest, migration %s: %w", wire.PublicID(s.cfg.ID), err)
	}
	return s.report(streams, err), err
}

// source is one call of Send.
type source struct {
	cfg     SourceConfig
	log     *slog.Logger
	state   *machine[SourceState]
	meter   *meter
	devices []*sourceDevice
	all     []*sourceDevice // devices is another order of some of them, after meeting a destination again
	link    *link           // nil until connected, and between sessions
	window  *window
	jobs    chan job
	workers sync.WaitGroup

	began      time.Time
	disturbed  bool              // BeforeSuspend was called: a rollback needs Resume
	recorded   bool              // the journal may hold a commit: a rollback needs Abort
	downtime   laps              // begun when the guest is paused
	agent      time.Duration     // that BeforeSuspend took
	stateSaved span              // by Guest.State
	copied     int64             // bytes of data sent while the guest ran
	goal       Goal              // with what can be had of it
	decisions  []Decision        // all of them
	share      float64           // of its time that the guest is held back
	busyBefore int64             // s.link.busy before this round
	reasons    map[string]string // per device, why the policy asked for the switch
	summary    *wire.Summary     // once compared
	late       []bool            // per device, whether it may be incomplete when the guest runs there
	copies     bool              // the destination wants a copy
	shared     []string          // devices that the destination has itself
	storing    *storing          // what the destination fetches from a store; nil: nothing
	ran        bool              // the destination said that it runs the guest
	still      bool              // the guest stands still: downtime goes on
	stuck      bool              // the guest could not be resumed after a copy
	confirmed  bool              // it is on record that the guest runs at the destination
	fresh      bool              // this process does not remember what was sent before; see wire.FlagFresh
	started    func()            // ends the time limit for starting the guest
	reconnects int
	release    func() // of spare processors; nil without them

	met       bool   // the latest attempt to meet the destination again succeeded
	version   uint16 // of the protocol
	wireBytes int64  // written to links that are gone
	streams   int    // of the first session; 0 before it

	current    atomic.Pointer[link]   // s.link, or one that has failed, for the readers of links
	checking   atomic.Bool            // what is sent from now on, the guest may run on as soon as it is there
	acked      atomic.Pointer[window] // s.window, for the link's readers
	serving    atomic.Pointer[serving]
	delivered  atomic.Pointer[wire.Summary] // what was served, once all of it was
	demands    atomic.Int64
	lateBytes  int64        // missing at the switch
	absent     atomic.Int64 // bytes that the destination could have fetched and did not
	roundTrip  atomic.Int64 // nanoseconds; 0: not measured yet
	round      atomic.Int64
	dirty      atomic.Int64
	sentBefore atomic.Int64 // data, zeros and same before this round
	decided    atomic.Pointer[Decision]
	dataBytes  atomic.Int64
	zeroBytes  atomic.Int64
	sameBytes  atomic.Int64 // not sent, as the destination holds them
	savedBytes atomic.Int64 // by compression
	stateBytes atomic.Int64
}

// sourceDevice is a device in the course of Send. Its fields belong to the goroutine that runs its rounds.
type sourceDevice struct {
	SourceDevice
	index   int
	size    int64
	digest  *digest
	tracked bool          // the tracker runs
	same    int64         // bytes of the last round that were not sent
	pending []block.Range // collected and not sent
	recent  []block.Range // sent by the last round after the first
	hot     []block.Range // of the collect before
	hotAt   time.Time
	rounds  []Round
}

func (s *source) run(ctx context.Context, streams []io.ReadWriter) error {
	s.state.begin()
	return s.conclude(ctx, s.walk(ctx, streams))
}

// conclude brings the migration to its end after a session that ended with err, by further sessions if need be.
func (s *source) conclude(ctx context.Context, err error) error {
	after := context.WithoutCancel(ctx)
	for {
		var peer *PeerError
		switch state := s.state.get(); {
		case err == nil && state == SourceChecking:
			s.end(SourceCopied)
			return nil
		case err == nil:
			// Before the last word: who has heard that need not be asked again.
			if err := s.cfg.Journal.Done(after, s.cfg.ID); err != nil {
				s.log.Warn("cannot record the end of the migration", "error", err)
				s.leaveSession(errUntold) // the destination keeps on record what a process that is started again here will ask for
			}
			s.end(SourceMoved)
			if goal, took := s.cfg.Goal.MaxDowntime, time.Duration(s.downtime.total()); goal > 0 && took > goal {
				s.log.Warn("the guest stood still for longer than the goal: the report says for what", "goal", goal, "downtime", took)
			}
			return nil
		case state < SourceCommitted, errors.As(err, &peer) && peer.NeverRan && !s.ran:
			return s.rollBack(after, err)
		case !s.met && (state == SourceSeeking || state == SourceRejoining) || !s.mayReconnect(err):
			if s.ran {
				s.end(SourceUnsettled)
				return fmt.Errorf("%w: %w", ErrUnsettled, err)
			}
			s.end(SourceInDoubt)
			return fmt.Errorf("%w: %w", ErrInDoubt, err)
		}
		err = s.reconnect(ctx, err)
	}
}

// end is an end of the migration that leaves the guest as it is. What the destination hears is no Abort: it has, or may get, the commit, and
// that stands. Where the source does not know how that ends, or has content that is missing there, the destination hears nothing: a last word
// would say that the source can do without it.
func (s *source) end(state SourceState) {
	s.state.set(state)
	switch {
	case s.link == nil:
	case state == SourceInDoubt || state == SourceUnsettled:
		s.leaveSession(errUntold)
	default:
		s.link.goodbye(nil, false)
	}
	s.stopTracking()
	s.finish()
}

// rollBack gives the guest its freedom back after a failure, and returns the failure.
func (s *source) rollBack(ctx context.Context, failure error) error {
	ctx, cancel := context.WithTimeout(ctx, s.cfg.ResumeTimeout)
	defer cancel()
	s.state.set(SourceRollingBack)
	if s.link != nil {
		s.link.fail(failure)
	}
	told := true
	if s.recorded {
		// The commit frame never left, or the destination promised never to run the guest: the guest is ours whether or
		// not this can be written. If it cannot, a crash from here on leaves a journal that says otherwise; then the destination hears
		// no last word, and keeps its promise on record for whoever asks again.
		if err := s.cfg.Journal.Abort(ctx, s.cfg.ID); err != nil {
			failure, told = fmt.Errorf("%w (and its end could not be recorded: %w)", failure, err), false
		}
	}
	if s.link != nil && told {
		s.link.goodbye(failure, false)
	} else {
		s.leaveSession(errUntold)
	}
	if err := s.unthrottle(ctx); err != nil {
		failure = fmt.Errorf("%w (and the guest is still held back: %w)", failure, err)
	}
	end := SourceKept
	if s.stuck {
		end = SourceStuck
	}
	if s.disturbed {
		if err := s.cfg.Guest.Resume(ctx); err != nil {
			end = SourceStuck
			failure = fmt.Errorf("resume guest: %w (after the migration failed: %w)", err, failure)
		}
	}
	if s.still {
		s.downtime.endAt(PartRollback, s.runsSince())
	}
	s.stopTracking()
	s.finish()
	s.state.set(end)
	return failure
}

// finish ends everything that runs for this migration.
func (s *source) finish() {
	if s.link == nil {
		return
	}
	s.endSession()
	s.link.close()
}

// endSession waits for what runs beside a link that has failed or is over.
func (s *source) endSession() {
	if v := s.serving.Swap(nil); v != nil {
		v.stop()
	}
	s.workers.Wait()
	s.acked.Store(nil)
}

func (s *source) stopTracking() {
	for _, d := range s.devices {
		if d.tracked {
			if err := d.Tracker.Stop(); err != nil {
				s.log.Warn("cannot stop tracking", "device", d.Name, "error", err)
			}
			d.tracked = false
		}
	}
}

// open begins a session over streams.
func (s *source) open(ctx context.Context, purpose wire.Purpose, streams []io.ReadWriter) (*link, error) {
	l, err := connect(ctx, greeting{wire.RoleSource, purpose, s.cfg.newest, s.cfg.HandshakeTimeout}, streams)
	if err != nil {
		return nil, err
	}
	l.heartbeatTimeout = s.cfg.HeartbeatTimeout
	l.log = s.cfg.Logger
	l.bulk = make(chan *wire.Buffer, len(streams))
	if l.version >= 2 && !s.cfg.NoCompression {
		l.compressor = newCompressor(len(streams), s.cfg.Concurrency, &s.savedBytes, time.Now, s.log)
	}
	return l, nil
}

// begin lets frames flow over a link. The link fails when ctx is canceled, until the returned function is called.
func (s *source) begin(ctx context.Context, l *link) (ignoreCancel func() bool) {
	s.attach(l)
	s.enter(l)
	return l.start(ctx)
}

// enter makes a link that of the session.
func (s *source) enter(l *link) {
	s.link, s.streams = l, cmp.Or(s.streams, len(l.streams))
	s.current.Store(l)
}

// attach has what comes over a link count, once it is that of the session.
func (s *source) attach(l *link) {
	l.onDemand = func(device int, r block.Range) error {
		v := s.serving.Load()
		if v == nil || s.current.Load() != l {
			return unexpectedFrame(wire.TypeDemand, "nothing to demand")
		}
		return s.demanded(v, device, r)
	}
	l.onAbsent = s.notFetched
	l.onAck = func(device int, total int64) error {
		w := s.acked.Load()
		if w == nil || s.current.Load() != l {
			return unexpectedFrame(wire.TypeAck, "nothing to acknowledge")
		}
		return w.ack(device, total)
	}
}

// flow prepares for sending content of s.devices over the link, from the start.
func (s *source) flow() {
	l, w := s.link, newWindow(s.cfg.Window, len(s.devices))
	s.window, s.jobs = w, make(chan job)
	s.acked.Store(w)
	context.AfterFunc(l.ctx, func() { w.fail(context.Cause(l.ctx)) })
	for range s.cfg.Concurrency {
		s.workers.Go(s.work)
	}
}

// walk goes through the states up to the destination's word that the guest runs there, with all it needs.
func (s *source) walk(ctx context.Context, streams []io.ReadWriter) error {
	m := wire.Manifest{ID: s.cfg.ID, Window: s.cfg.Window, Spec: s.cfg.Spec, Network: s.cfg.Network, Devices: s.describe()}
	manifest, err := m.Encode()
	if err != nil {
		interruptAll(streams)
		return err
	}
	l, err := s.open(ctx, wire.PurposeMigrate, streams)
	if err != nil {
		return err
	}
	ignoreCancel := s.begin(ctx, l)
	defer ignoreCancel()
	s.flow()
	s.version = l.version

	s.state.set(SourceOffering)
	done := l.limit(s.cfg.PrepareTimeout, "preparing the destination")
	if err := l.send(wire.Header{Type: wire.TypeManifest}, manifest); err != nil {
		return err
	}
	reply, err := l.expect(wire.TypeAccept)
	if err != nil {
		return err
	}
	accept, err := wire.DecodeAccept(reply.payload, len(s.devices))
	if err != nil {
		return err
	}
	for i, d := range s.devices {
		if len(accept.Based) > 0 && accept.Based[i] && d.Base == nil {
			return fmt.Errorf("%w: accept says that device %q starts as a base that was not named", wire.ErrMalformed, d.Name)
		}
		if len(accept.Shared) > 0 && accept.Shared[i] && (d.Handle == "" || accept.Copy) {
			return fmt.Errorf("%w: accept says that the destination has device %q itself, which was not offered", wire.ErrMalformed, d.Name)
		}
		has := func(list []bool) bool { return len(list) > 0 && list[i] }
		if has(accept.Stored) && (d.Stored == nil || has(accept.Shared)) {
			return fmt.Errorf("%w: accept says that the destination fetches device %q, of which nothing is stored", wire.ErrMalformed, d.Name)
		}
		if d.RequireBase && !accept.Bare && !has(accept.Based) && !has(accept.Shared) {
			return Refuse("device %q: the destination does not have the base it is to have, of digest %s: bring it there, or let the device travel as a whole", d.Name, d.Base.Digest())
		}
	}
	done()
	s.agree(accept)
	if g, ok := s.cfg.Guest.(Lender); ok {
		g.Lend(s.shared)
	}
	if g, ok := s.cfg.Guest.(Networker); ok && len(s.cfg.Network) > 0 && !accept.Copy {
		g.Network(l.ctx, accept.Network)
	}

	s.state.set(SourceCopying)
	watched := s.watchAcks()
	err = s.copy()
	watched()
	if err != nil {
		return err
	}
	s.copied = s.dataBytes.Load()

	s.state.set(SourceSuspending)
	s.disturbed = true
	began := time.Now()
	if err := s.cfg.Guest.BeforeSuspend(l.ctx); err != nil {
		return s.because("prepare guest for the pause", err)
	}
	s.agent = time.Since(began)
	if err := s.settle(); err != nil {
		return err
	}

	s.state.set(SourcePausing)
	done = s.limitSwitch()
	s.downtime.begin()
	s.still = true
	if err := s.unthrottle(l.ctx); err != nil {
		return s.because("let the guest go before its pause", err)
	}
	if err := s.cfg.Guest.Pause(l.ctx); err != nil {
		return s.because("pause guest", err)
	}
	s.downtime.end(PartPause)

	s.state.set(SourceSwitching)
	// The first device state has no bytes, but comes at once: it tells the destination that the guest is paused.
	if err := l.send(wire.Header{Type: wire.TypeState}, nil); err != nil {
		return err
	}
	ours, serving, err := s.switchOver(done)
	if err != nil {
		return err
	}
	if s.copies {
		return s.leaveCopy(ctx, ours, done)
	}

	s.state.set(SourceConfirming)
	if err := s.confirm(ours); err != nil {
		return err
	}
	done()
	if !ignoreCancel() {
		<-l.ctx.Done()
		return context.Cause(l.ctx)
	}

	s.state.set(SourceCommitting)
	s.recorded = true
	if err := s.cfg.Journal.Commit(l.ctx, s.cfg.ID); err != nil {
		return s.because("record the commit", err)
	}
	if l.ctx.Err() != nil {
		return context.Cause(l.ctx) // the commit frame has not left, so the guest is still ours
	}
	s.downtime.end(PartCommit)

	s.state.set(SourceCommitted)
	if err := l.send(wire.Header{Type: wire.TypeCommit}, nil); err != nil {
		return err
	}
	return s.hand(serving)
}

// hand waits for the destination's word that the guest runs there, and serves what it misses.
func (s *source) hand(v *serving) error {
	s.started = func() {}
	if !s.ran {
		s.started = s.link.limit(s.cfg.CommitTimeout, "starting the guest at the destination")
	}
	defer s.started()
	if v != nil {
		return s.serve(v)
	}
	if _, err := s.link.expect(wire.TypeRunning); err != nil {
		return err
	}
	s.isRunning()
	s.logRound(s.tracked(), "paused")
	return nil
}

// agree settles what can be had of the goal, after the destination has said what it can do and wants.
func (s *source) agree(accept *wire.Accept) {
	s.late = make([]bool, len(s.devices))
	if s.copies = accept.Copy; s.copies {
		s.goal.PostCopy = false
	}
	for i, d := range s.devices {
		if len(accept.Shared) > 0 && accept.Shared[i] {
			// To all that follows it is a device of zeros, and the other side has it.
			s.shared = append(s.shared, d.Name)
			d.Device, d.Tracker, d.Base, d.Changed, d.digest = blank(d.size), nil, nil, nil, newDigest(d.size)
			d.digest.shared.Store(true)
			continue
		}
		s.late[i] = len(accept.Postpone) > 0 && accept.Postpone[i]
		if !s.late[i] && d.Tracker != nil {
			s.goal.PostCopy = false // it would have to be sent while the guest is paused, whatever is postponed
		}
	}
	for i, d := range s.devices {
		if s.goal.PostCopy && !s.late[i] && !d.Policy.precopies() {
			d.Policy.MaxDirtyBlocks = d.size // copied once
		}
		if slices.Contains(s.shared, d.Name) {
			continue
		}
		d.digest = newDigest(d.size)
		if len(accept.Based) > 0 && accept.Based[i] {
			d.digest = d.Base.pages.clone()
			d.digest.shared.Store(true)
		}
	}
	s.store(accept.Stored)
}

// confirm waits until the destination has what it needs to run the guest, and compares accounts.
func (s *source) confirm(ours *wire.Summary) error {
	reply, err := s.link.expect(wire.TypePrepared)
	if err != nil {
		return err
	}
	theirs, err := wire.DecodeSummary(reply.payload, len(s.devices))
	if err != nil {
		return err
	}
	if err := compare(s.describe(), ours, theirs); err != nil {
		return err
	}
	s.summary = ours
	if s.still {
		s.downtime.end(PartLoad)
	}
	return nil
}

// resumeCopied lets the guest run on of which a copy is made.
func (s *source) resumeCopied() error {
	s.state.set(SourceResuming)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(s.link.ctx), s.cfg.ResumeTimeout)
	defer cancel()
	s.disturbed = false // Resume is called once
	if err := s.unthrottle(ctx); err != nil {
		s.log.Warn("the guest is still held back", "error", err)
	}
	err := s.cfg.Guest.Resume(ctx)
	s.downtime.endAt(PartResume, s.runsSince())
	s.still = false
	s.stopTracking()
	if err != nil {
		s.stuck = true
		return fmt.Errorf("resume guest: %w", err)
	}
	return nil
}

// runsSince is when the guest ran after Resume, which does more than that.
func (s *source) runsSince() time.Time {
	if g, ok := s.cfg.Guest.(Runner); ok {
		if t := g.RunsSince(); t.After(s.downtime.at) {
			return t
		}
	}
	return time.Now()
}

// leaveCopy lets the guest run on, if it does not yet, all of whose content has left, and waits until the copy of it is safe.
func (s *source) leaveCopy(cancelable context.Context, ours *wire.Summary, done func()) error {
	if s.still {
		if err := s.resumeCopied(); err != nil {
			return err
		}
	} else {
		done = s.link.limit(s.cfg.SwitchTimeout, "the destination's check of the copy")
	}

	s.state.set(SourceChecking)
	if cancelable.Err() != nil { // what the destination has said meanwhile does not count more than that
		<-s.link.ctx.Done()
		return context.Cause(s.link.ctx)
	}
	if err := s.confirm(ours); err != nil {
		return err
	}
	done()
	if err := s.link.send(wire.Header{Type: wire.TypeCopied}, nil); err != nil {
		return err
	}
	_, err := s.link.expect(wire.TypeSettled)
	return err
}

// unthrottle ends what holds the guest back.
func (s *source) unthrottle(ctx context.Context) error {
	if s.share == 0 {
		return nil
	}
	s.share = 0
	return s.cfg.Guest.(Throttler).Throttle(ctx, 0)
}

// because chooses between an error of a hook and the failure of the link that may have caused it.
func (s *source) because(what string, err error) error {
	if s.link.ctx.Err() != nil {
		return fmt.Errorf("%s: %w", what, context.Cause(s.link.ctx))
	}
	return fmt.Errorf("%s: %w", what, err)
}

// compare holds the two sides' accounts against each other.
func compare(devices []wire.Device, a, b *wire.Summary) error {
	check := func(name string, a, b wire.Part) error {
		if a == b {
			return nil
		}
		return tell(wire.CodeDigest, fmt.Errorf("content of %s differs between source and destination: %d bytes with digest %x and %d bytes with digest %x",
			name, a.Total, a.Digest, b.Total, b.Digest), "content of %s differs", name)
	}
	for i, d := range devices {
		if err := check(fmt.Sprintf("device %q", d.Name), a.Devices[i], b.Devices[i]); err != nil {
			return err
		}
	}
	return check("the device state", a.State, b.State)
}

// copy sends everything and then what was written meanwhile, in rounds, until it is decided to switch.
func (s *source) copy() error {
	ctx := s.link.ctx
	s.dirty.Store(0)
	for _, d := range s.devices {
		s.dirty.Add(d.size)
		if d.Tracker == nil {
			continue
		}
		if err := d.Tracker.Start(ctx); err != nil {
			return s.because(fmt.Sprintf("track device %q", d.Name), err)
		}
		d.tracked = true
	}
	defer s.limitTotal()()
	for {
		v, err := s.decide()
		for i, why := range v.Reasons {
			s.reasons[s.devices[i].Name] = why
		}
		if err == nil && v.Action != Continue && !s.fetched() { // nothing was copied yet, and nothing would be
			if err := s.awaitFetched(); err != nil {
				return err
			}
			continue
		}
		if err != nil || v.Action != Continue {
			return err
		}
		if v.Wait > 0 {
			t := time.NewTimer(time.Duration(v.Wait))
			select {
			case <-t.C:
			case <-ctx.Done():
				t.Stop()
				return context.Cause(ctx)
			}
			if err := s.collectFrom(v.Again); err != nil {
				return err
			}
		}
		if err := s.cycle(v.Again); err != nil {
			return err
		}
		if err := s.awaitFetched(); err != nil {
			return err
		}
	}
}

// limitTotal gives the migration up in the middle of a round when its time is over, until the returned function is called.
// With post-copy the round is cut short instead: see add.
func (s *source) limitTotal() (done func()) {
	if s.goal.MaxTotalTime == 0 || s.goal.PostCopy {
		return func() {}
	}
	t := time.AfterFunc(time.Until(s.began.Add(s.goal.MaxTotalTime)), func() {
		s.link.fail(gaveUp(fmt.Sprintf("the %v of a migration are over", s.goal.MaxTotalTime)))
	})
	return func() { t.Stop() }
}

// limitSwitch bounds the pause until the destination is prepared: by SwitchTimeout, and by the goal where that says that a
// guest must not stand still for long. Nobody can tell the length of a pause to the millisecond, and to go back costs another one:
// so the limit is far above the goal.
func (s *source) limitSwitch() (done func()) {
	limit, what := s.cfg.SwitchTimeout, "the switch"
	goal := s.cfg.Goal.MaxDowntime
	if bound := max(10*goal, leastSwitch); goal > 0 && bound < limit {
		limit, what = bound, fmt.Sprintf("the switch, with a downtime of at most %v as the goal,", goal)
	}
	return s.link.limit(limit, what)
}

const (
	leastSwitch = 5 * time.Second // for a switch, however short a downtime is the goal
	ackTimeout  = time.Minute     // until a destination has taken a part of what is on its way
)

// watchAcks ends the migration when the destination gives signs of life and yet takes nothing, until the returned function is
// called.
func (s *source) watchAcks() (done func()) {
	stop := make(chan struct{})
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		tick := time.NewTicker(ackTimeout)
		defer tick.Stop()
		for last := int64(-1); ; {
			select {
			case <-stop:
				return
			case <-s.link.ctx.Done():
				return
			case <-tick.C:
			}
			acked, inflight := s.window.state()
			if inflight > 0 && acked == last {
				s.link.fail(tell(wire.CodeTimeout, fmt.Errorf("the destination lives, but took nothing of %s on their way for %v: look at its disk and its log: %w", size(inflight), ackTimeout, os.ErrDeadlineExceeded),
					"nothing was acknowledged for %v", ackTimeout))
				return
			}
			last = acked
		}
	}()
	return func() { close(stop); <-stopped }
}

// cycle sends one more round of some devices: what is pending, or everything if nothing was sent yet.
func (s *source) cycle(positions []int) error {
	s.dirty.Store(0)
	var devices []*sourceDevice
	first := true
	for _, i := range positions {
		d := s.devices[i]
		devices = append(devices, d)
		if len(d.rounds) == 0 {
			s.dirty.Add(d.size)
			continue
		}
		first = false
		s.dirty.Add(measure(d.pending, d.Policy.BlockSize).Bytes)
	}
	if !first {
		s.round.Add(1)
	}
	began := s.beginRound()
	err := s.each(devices, func(d *sourceDevice) error {
		if len(d.rounds) == 0 {
			return s.sendRound(d, began, s.planAll)
		}
		return s.sendRound(d, began, s.planPending)
	})
	if err == nil {
		s.logRound(devices, "running")
	}
	return err
}

// beginRound notes what was sent before a round.
func (s *source) beginRound() time.Time {
	s.busyBefore = s.link.busy.Load()
	s.sentBefore.Store(s.dataBytes.Load() + s.zeroBytes.Load() + s.sameBytes.Load())
	return time.Now()
}

// logRound says what the last round of some devices was.
func (s *source) logRound(devices []*sourceDevice, guest string) {
	var bytes int64
	var took Millis
	for _, d := range devices {
		r := d.rounds[len(d.rounds)-1]
		bytes, took = bytes+r.Bytes, max(took, r.Duration)
	}
	s.log.Info("migration round", "round", s.round.Load(), "guest", guest, "sent", size(bytes), "took", took)
}

// settle sends what the guest wrote while it got ready for the pause, once more, if that is more than should be sent
// during it: hooks may take their time.
func (s *source) settle() error {
	defer s.limitTotal()()
	v, err := s.decide() // why it switches was decided before
	if err != nil || v.Action != Continue {
		return err
	}
	return s.cycle(v.Again)
}

// decide collects from all trackers, and decides what to do next: Continue, Switch or PostCopy. The guest is slowed down
// and the migration given up here.
func (s *source) decide() (Decision, error) {
	var sent []int
	for i, d := range s.devices {
		if len(d.rounds) > 0 {
			sent = append(sent, i)
		}
	}
	if err := s.collectFrom(sent); err != nil {
		return Decision{}, err
	}
	history := make([]History, len(s.devices))
	for i, d := range s.devices {
		history[i] = History{Device: d.Name, Size: d.size, Policy: d.Policy, Whole: !s.late[i], Rounds: d.rounds, Dirty: measure(d.pending, d.Policy.BlockSize)}
	}
	v := Decide(s.aim(), time.Since(s.began), history)
	s.decisions = append(s.decisions, v)
	s.decided.Store(&v)
	s.log.Info("migration decision", "action", v.Action, "reason", v.Reason)
	switch v.Action {
	case GiveUp:
		return v, gaveUp(v.Reason)
	case Throttle:
		s.share = v.Share
		if err := s.cfg.Guest.(Throttler).Throttle(s.link.ctx, v.Share); err != nil {
			return v, s.because("slow the guest down", err)
		}
		v.Action = Continue
	}
	return v, nil
}

// gaveUp is the failure of a migration whose goal cannot be reached.
func gaveUp(reason string) error {
	return tell(wire.CodeCanceled, fmt.Errorf("%w: %s", ErrGaveUp, reason), "%v: %s", ErrGaveUp, reason)
}

// collectFrom collects from some of the devices, those that are tracked.
func (s *source) collectFrom(positions []int) error {
	for _, i := range positions {
		if d := s.devices[i]; d.tracked {
			if err := s.collect(s.link.ctx, d); err != nil {
				return err
			}
		}
	}
	return nil
}

// collect adds what was written since the last time to what is to be sent.
func (s *source) collect(ctx context.Context, d *sourceDevice) error {
	list, err := d.Tracker.Collect(ctx)
	if err != nil {
		return s.because(fmt.Sprintf("collect writes to device %q", d.Name), err)
	}
	for i, r := range list {
		if r.Offset < 0 || r.Length <= 0 || i > 0 && r.Offset < list[i-1].End() {
			return fmt.Errorf("collect writes to device %q: got %d bytes at %d, not in ascending order", d.Name, r.Length, r.Offset)
		}
	}
	d.pending = union(d.pending, normalize(list, d.size))
	return nil
}

// each runs f for all devices at the same time.
func (s *source) each(devices []*sourceDevice, f func(*sourceDevice) error) error {
	var g errgroup.Group
	for _, d := range devices {
		g.Go(func() error {
			err := f(d)
			if err != nil {
				s.link.fail(err) // so that the others stop
			}
			return err
		})
	}
	if err := g.Wait(); err != nil {
		if s.link.ctx.Err() != nil {
			return context.Cause(s.link.ctx) // what failed first
		}
		return err
	}
	return nil
}

// sendRound sends one round of a device, and waits until the destination has all of it: only then may a page be sent
// again, as two versions of it on two streams could arrive in any order.
func (s *source) sendRound(d *sourceDevice, began time.Time, plan func(*sourceDevice, *planner) (Dirty, error)) error {
	dirty, err := s.sendAll(d, plan)
	if err != nil {
		return err
	}
	s.noteRound(d, dirty, began)
	return nil
}

// sendAll is sendRound without a note of the round.
func (s *source) sendAll(d *sourceDevice, plan func(*sourceDevice, *planner) (Dirty, error)) (Dirty, error) {
	index := len(d.rounds)
	dirty, err := s.sendContent(d, plan)
	if err != nil {
		return dirty, err
	}
	// With less than this on its way, nothing but the end of the round makes the destination acknowledge it.
	tells := s.window.awaits(d.index, ackThreshold(s.cfg.Window))
	asked := time.Now()
	h := wire.Header{Type: wire.TypeRoundEnd, Device: uint16(d.index), Offset: uint64(s.window.total(d.index))}
	if err := s.link.send(h, []byte{byte(index >> 24), byte(index >> 16), byte(index >> 8), byte(index)}); err != nil {
		return dirty, err
	}
	if err := s.window.drained(d.index); err != nil {
		return dirty, err
	}
	if tells {
		s.noteRoundTrip(time.Since(asked))
	}
	return dirty, nil
}

// noteRoundTrip keeps the shortest of what was measured: the others had to wait for something besides.
func (s *source) noteRoundTrip(d time.Duration) {
	for {
		known := s.roundTrip.Load()
		if known > 0 && known <= int64(d) || s.roundTrip.CompareAndSwap(known, int64(d)) {
			return
		}
	}
}

// aim is the goal with what was measured of the link.
func (s *source) aim() Goal {
	g := s.goal
	if g.RoundTrip == 0 {
		g.RoundTrip = time.Duration(s.roundTrip.Load())
	}
	return g
}

func (s *source) noteRound(d *sourceDevice, dirty Dirty, began time.Time) {
	d.rounds = append(d.rounds, Round{Device: d.Name, Index: len(d.rounds), Start: Millis(began.Sub(s.began)), Blocks: dirty.Blocks,
		Bytes: dirty.Bytes, Duration: Millis(time.Since(began)), Throttle: s.share, Same: d.same, link: s.link.busyShare(s.busyBefore, began)})
}

// sendContent hands what plan chooses to the workers, and waits until they have sent it.
func (s *source) sendContent(d *sourceDevice, plan func(*sourceDevice, *planner) (Dirty, error)) (Dirty, error) {
	p := &planner{s: s, job: job{device: d, round: newRoundWork()}}
	dirty, err := plan(d, p)
	if err == nil {
		err = p.flush()
	}
	if err != nil {
		return dirty, err
	}
	p.job.round.finish()
	select {
	case <-p.job.round.done:
	case <-s.link.ctx.Done():
	}
	same := p.job.round.same.Load()
	s.sameBytes.Add(same)
	d.same = min(same, dirty.Bytes)
	return dirty, context.Cause(s.link.ctx)
}

// planAll chooses the whole device. What it knows to be zeros goes as runs, unread; what it knows to be as in the base not
// at all.
func (s *source) planAll(d *sourceDevice, p *planner) (Dirty, error) {
	var left []block.Range
	bytes, err := s.extents(d, func(r block.Range) error { return s.add(d, p, r, &left) })
	bytes -= s.putOff(d, left).Bytes
	return Dirty{Blocks: (bytes + d.Policy.BlockSize - 1) / d.Policy.BlockSize, Bytes: bytes}, err
}

// add has a range sent, but for what is left of it when the time of the migration is over and post-copy can send it.
func (s *source) add(d *sourceDevice, p *planner, r block.Range, left *[]block.Range) error {
	may := s.goal.MaxTotalTime > 0 && s.goal.PostCopy && s.late[d.index] && !s.still
	for may && r.Length > 0 {
		if time.Since(s.began) >= s.goal.MaxTotalTime {
			*left = append(*left, r)
			return nil
		}
		n := min(r.Length, jobBytes)
		if err := p.add(block.Range{Offset: r.Offset, Length: n}); err != nil {
			return err
		}
		r = block.Range{Offset: r.Offset + n, Length: r.Length - n}
	}
	return p.add(r)
}

// putOff makes pending what a round has left.
func (s *source) putOff(d *sourceDevice, left []block.Range) Dirty {
	slices.SortFunc(left, func(a, b block.Range) int { return cmp.Compare(a.Offset, b.Offset) })
	d.pending = union(d.pending, left)
	return measure(left, d.Policy.BlockSize)
}

// sendHole sends what is known to be zeros, unless the destination holds it.
func (s *source) sendHole(d *sourceDevice, off, n int64) error {
	if !d.digest.shared.Load() {
		return s.sendZeros(d, off, n)
	}
	s.sameBytes.Add(n)
	return d.digest.nonZero(off, n, func(r block.Range) error {
		s.sameBytes.Add(-r.Length)
		return s.sendZeros(d, r.Offset, r.Length)
	})
}

func (s *source) sendZeros(d *sourceDevice, off, n int64) error {
	if err := s.window.acquire(d.index, wire.ZeroFrameSize); err != nil {
		return err
	}
	d.digest.zero(off, n)
	s.zeroBytes.Add(n)
	b := wire.NewBuffer()
	wire.PutZero(b.B[:], uint16(d.index), off, n)
	b.N = wire.ZeroFrameSize
	return s.link.sendBulk(b)
}

// planPending chooses what was collected, hot blocks last.
func (s *source) planPending(d *sourceDevice, p *planner) (Dirty, error) {
	list := d.pending
	d.pending, d.recent = nil, list
	dirty := measure(list, d.Policy.BlockSize)
	cold, hot := list, []block.Range(nil)
	if e := d.Policy.Expiry; e > 0 {
		if time.Since(d.hotAt) <= e {
			cold, hot = split(list, d.hot)
		}
		d.hot, d.hotAt = list, time.Now()
	}
	var left []block.Range
	for _, part := range [][]block.Range{cold, hot} {
		for _, r := range part {
			if err := s.add(d, p, r, &left); err != nil {
				return dirty, err
			}
		}
	}
	not := s.putOff(d, left)
	return Dirty{Blocks: dirty.Blocks - not.Blocks, Bytes: dirty.Bytes - not.Bytes}, nil
}

// switchOver sends the rest of a paused guest: content and device state at the same time, then the account of all. What
// would take too long is listed instead, and the returned serving sends it; nil when nothing is listed. A guest of which a copy is
// made runs on as soon as that can be; then the limit on its pause is done with.
func (s *source) switchOver(done func()) (*wire.Summary, *serving, error) {
	ctx := s.link.ctx
	s.round.Add(1)
	s.dirty.Store(0)
	var rest []*sourceDevice // devices with something left to send
	for _, d := range s.devices {
		if d.tracked || len(d.rounds) == 0 || len(d.pending) > 0 {
			rest = append(rest, d)
		}
	}
	var state wire.Part
	var serving *serving
	var g errgroup.Group
	g.Go(func() (err error) {
		state, err = s.sendState()
		return err
	})
	began := s.beginRound()
	err := s.each(rest, func(d *sourceDevice) error {
		if !d.tracked {
			return nil
		}
		return s.collect(ctx, d)
	})
	listed := time.Now()
	switch {
	case err != nil:
	case s.postCopy(rest):
		serving, err = s.announce(rest)
	default:
		if s.copies {
			if err = s.goOn(rest, span{PartFinalList, began, listed}, g.Wait); err != nil {
				break
			}
			if !s.still {
				done()
				defer s.watchAcks()()
			}
		}
		err = s.each(rest, func(d *sourceDevice) error {
			plan := s.planPending
			if len(d.rounds) == 0 {
				plan = s.planAll
			}
			dirty, err := s.sendContent(d, plan)
			if err != nil {
				return err
			}
			s.noteRound(d, dirty, began)
			return nil
		})
	}
	ended := time.Now()
	if err := errors.Join(g.Wait(), err); err != nil {
		if s.link.ctx.Err() != nil {
			return nil, nil, context.Cause(s.link.ctx)
		}
		return nil, nil, err
	}
	if s.still {
		s.downtime.endAll(span{PartFinalList, began, listed}, s.stateSaved, span{PartTransfer, listed, ended})
	}
	sum := s.account()
	sum.State = state
	if serving != nil {
		serving.start() // loading the device state may touch what is missing
	}
	return sum, serving, s.link.send(wire.Header{Type: wire.TypeFinal}, sum.Encode())
}

// goOn lets a guest run on whose rest could be put aside, once its device state is saved. s.still says whether it does not.
func (s *source) goOn(rest []*sourceDevice, listing span, saved func() error) error {
	began := time.Now()
	ok, err := s.putAside(rest)
	if err != nil || !ok {
		return err
	}
	ended := time.Now()
	if err := saved(); err != nil {
		return err
	}
	s.downtime.endAll(listing, s.stateSaved, span{PartAside, began, ended})
	return s.resumeCopied()
}

// sendState sends the device state.
func (s *source) sendState() (wire.Part, error) {
	w := &stateWriter{s: s}
	saving := span{name: PartState, begin: time.Now()}
	if err := s.cfg.Guest.State(s.link.ctx, w); err != nil {
		err = s.because("save device state", err)
		s.link.fail(err)
		return wire.Part{}, err
	}
	h := wire.Header{Type: wire.TypeState, Flags: wire.FlagLast, Offset: uint64(w.n)}
	err := s.link.send(h, nil)
	saving.end = time.Now()
	s.stateSaved = saving
	return wire.Part{Total: w.n, Digest: stateHash(&w.hash)}, err
}

// postCopy decides, now that the guest is paused and the rest is known, whether it is sent before the guest runs or after.
func (s *source) postCopy(rest []*sourceDevice) bool {
	var bytes int64
	for _, d := range rest {
		if len(d.rounds) == 0 {
			bytes += d.size
		} else {
			bytes += measure(d.pending, d.Policy.BlockSize).Bytes
		}
	}
	s.dirty.Store(bytes)
	var bandwidth float64
	if n := len(s.decisions); n > 0 {
		bandwidth = s.decisions[n-1].Bandwidth
	}
	return s.goal.PostCopy && !s.aim().fits(bytes, bandwidth)
}

// announce sends the lists of what will be missing.
func (s *source) announce(rest []*sourceDevice) (*serving, error) {
	missing := make([][]block.Range, len(s.devices))
	hot, cold := make([][]block.Range, len(s.devices)), make([][]block.Range, len(s.devices))
	for _, d := range rest {
		list, err := s.postpone(d)
		if err != nil {
			return nil, err
		}
		if len(list) == 0 {
			continue
		}
		missing[d.index] = list
		// What was written in both of the last rounds will be used first.
		cold[d.index], hot[d.index] = split(list, d.recent)
		s.lateBytes += measure(list, block.PageSize).Bytes
		if err := wire.EncodeMissing(uint16(d.index), runsOf(list), s.link.send); err != nil {
			return nil, err
		}
	}
	if s.lateBytes == 0 {
		return nil, nil
	}
	s.window.narrow(serveLimit(len(s.link.streams)))
	s.makeRoom()
	return s.newServing(missing, hot, cold), nil
}

// makeRoom has what is streamed step back behind what is demanded.
func (s *source) makeRoom() {
	s.link.reserved.Store(true)
	s.link.aside.Store(s.cfg.OwnThreads)
	if s.release == nil && s.cfg.OwnThreads {
		s.release = spareProcessors(s.cfg.Concurrency + len(s.link.streams) + 1)
	}
}

// tracked are the devices that the guest may write to.
func (s *source) tracked() (out []*sourceDevice) {
	for _, d := range s.devices {
		if d.tracked {
			out = append(out, d)
		}
	}
	return out
}

// stateWriter sends device state as it is written.
type stateWriter struct {
	s    *source
	n    int64
	hash xxh3.Hasher128
}

func (w *stateWriter) Write(p []byte) (int, error) {
	for done := 0; done < len(p); {
		part := p[done:min(len(p), done+wire.MaxPayload)]
		if err := w.s.link.send(wire.Header{Type: wire.TypeState, Offset: uint64(w.n)}, part); err != nil {
			return done, err
		}
		_, _ = w.hash.Write(part) // never fails
		done += len(part)
		w.n += int64(len(part))
		w.s.stateBytes.Add(int64(len(part)))
	}
	return len(p), nil
}

func (s *source) report(streams int, err error) *Report {
	r := &Report{
		ID: wire.PublicID(s.cfg.ID), Role: wire.RoleSource.String(), Outcome: s.state.get().String(), Streams: cmp.Or(s.streams, streams),
		Total: Millis(time.Since(s.began)), Downtime: s.downtime.total(), Parts: s.downtime.parts, AgentBefore: Millis(s.agent), Phases: s.state.history, Reasons: s.reasons, Decisions: s.decisions,
		DataBytes: s.dataBytes.Load(), ZeroBytes: s.zeroBytes.Load(), StateBytes: s.stateBytes.Load(),
		SameBytes: s.sameBytes.Load(), SavedBytes: s.savedBytes.Load(), AbsentBytes: s.absent.Load(),
	}
	if err != nil {
		r.Error = err.Error()
	}
	for _, d := range s.devices {
		r.Rounds = append(r.Rounds, d.rounds...)
	}
	if t := s.state.spent[SourceCopying]; t > 0 {
		r.Throughput = float64(s.copied) / t.Seconds()
	}
	r.WireBytes = s.wireBytes
	if s.link != nil {
		r.WireBytes += s.link.written.Load()
	}
	r.LateBytes, r.Demands, r.Reconnects = s.lateBytes, s.demands.Load(), s.reconnects
	r.Shared = s.shared
	if s.summary != nil && !s.fresh {
		r.Digests = digestsOf(s.describe(), s.summary, s.shared)
	}
	return r
}
