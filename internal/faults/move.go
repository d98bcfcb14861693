package faults

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"time"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/migrate"
)

// Mode is how a guest is moved.
type Mode uint8

const (
	PreCopy  Mode = iota // everything arrives before the guest runs
	PostCopy             // the guest runs before
	Copying              // it stays, and a copy of it is made
	numModes
)

// Modes are all of them.
func Modes() (all []Mode) {
	for m := range numModes {
		all = append(all, m)
	}
	return all
}

func (m Mode) String() string { return [...]string{"pre-copy", "post-copy", "copy"}[m] }

// Migration is one attempt to move the guest from a host to another.
type Migration struct {
	ID      string
	Mode    Mode
	Streams int   // 0: 1
	Link    *Link // nil: one without faults
	// Reconnect has the two sides look for each other when the link dies after the commit.
	Reconnect bool
	// Restart has processes that are killed started again, which then go on with the migration.
	Restart bool

	// Track, if set, replaces the answers of the trackers of the source.
	Track func([]block.Range, error) ([]block.Range, error)

	Source, Destination       Plan
	OnSource                  func(migrate.SourceState)
	OnDestination             func(migrate.DestinationState)
	SourceCtx, DestinationCtx context.Context // nil: nobody cancels
}

// Result is what became of a migration, as the two sides say.
type Result struct {
	Source, Destination       *migrate.Report
	SourceErr, DestinationErr error
}

func (r Result) String() string {
	return fmt.Sprintf("source %s (%v); destination %s (%v)", r.Source.Outcome, r.SourceErr, r.Destination.Outcome, r.DestinationErr)
}

// Measures of a migration here. In fake time they cost nothing.
const (
	heartbeatTimeout = time.Second
	rescueTimeout    = 20 * time.Second
	bandwidth        = 40 << 20 // bytes per second: a guest that runs writes about 12 MiB
)

// Log is told what the engines log. Tests with -log show it.
var Log = slog.New(slog.DiscardHandler)

// Move moves the guest, or does not, and returns when both sides have ended.
func (w *World) Move(from, to *Host, m Migration) Result {
	if m.Link == nil {
		m.Link = NewLink()
	}
	if m.Link.Rate == 0 {
		m.Link.Rate = bandwidth
	}
	m.Streams = max(1, m.Streams)
	defer m.Link.Close()
	a, b := m.Link.Pipes(m.Streams)
	source, destination := from.Process(), to.Process()
	source.begin(&m.Source, a)
	destination.begin(&m.Destination, b)
	meet := newMeeting(m.Link, m.Streams)

	var r Result
	var wg sync.WaitGroup
	wg.Go(func() {
		r.Source, r.SourceErr = migrate.Send(source.during(m.SourceCtx), a, w.sourceConfig(source, m, meet))
	})
	wg.Go(func() {
		t := &target{Process: destination, copying: m.Mode == Copying, planted: w.Plant, postpone: m.Mode == PostCopy}
		r.Destination, r.DestinationErr = migrate.Receive(destination.during(m.DestinationCtx), b, w.destinationConfig(t, m, meet))
	})
	if m.Restart {
		done := make(chan struct{})
		defer func() { <-done }()
		over, end := context.WithCancel(context.Background())
		defer end()
		go func() {
			defer close(done)
			w.restart(over, from, to, m, meet)
		}()
	}
	wg.Wait()
	return r
}

// restartDelay is how long it takes an init system to start a process again.
const restartDelay = 300 * time.Millisecond

// restart starts processes of the two hosts that have died, until the migration is over for both sides, and has them go on with
// it.
func (w *World) restart(over context.Context, from, to *Host, m Migration, meet *meeting) {
	var wg sync.WaitGroup
	defer wg.Wait()
	for _, h := range []*Host{from, to} {
		p := h.Process()
		if p == nil {
			continue
		}
		wg.Go(func() {
			select {
			case <-p.ctx.Done():
			case <-over.Done():
				if !p.isDead() {
					return
				}
			}
			time.Sleep(restartDelay)
			if err := h.Start(); err != nil {
				return // its machine has died, too: Recover boots it
			}
			if m.Reconnect { // how it ends is in the records
				_ = w.rejoin(h, m, meet)
			}
		})
	}
}

// rejoin has the process of a host go on with a migration after the commit, in the part that the record gives it.
func (w *World) rejoin(h *Host, m Migration, meet *meeting) (err error) {
	m.Source, m.Destination, m.OnSource, m.OnDestination = Plan{}, Plan{}, nil, nil
	switch p := h.Process(); {
	case p == nil:
	case h.Record() == Record{Moved, m.ID}:
		_, err = migrate.RejoinSource(p.ctx, w.sourceConfig(p, m, meet))
	case h.Record() == Record{Running, m.ID}:
		t := &target{Process: p}
		_, err = migrate.RejoinDestination(p.ctx, p.claim(m.ID), w.destinationConfig(t, m, meet))
	}
	return err
}

func (w *World) sourceConfig(p *Process, m Migration, meet *meeting) migrate.SourceConfig {
	policy := migrate.Policy{MaxDirtyBlocks: 4, MinCycles: 1, MaxCycles: 3, Expiry: time.Second}
	cfg := migrate.SourceConfig{
		ID: m.ID, Spec: []byte(`{"cpu":1}`), Guest: guest{p}, Journal: guest{p}, Concurrency: 2, Window: 1 << 18,
		HeartbeatTimeout: heartbeatTimeout, RescueTimeout: rescueTimeout, Logger: Log,
		OnState: func(s migrate.SourceState) {
			p.moment("state " + s.String())
			if m.OnSource != nil {
				m.OnSource(s)
			}
		},
	}
	if m.Mode == PostCopy {
		cfg.Goal = migrate.Goal{PostCopy: true, MaxDowntime: time.Nanosecond}
		policy = migrate.Policy{ByGoal: true}
	}
	cfg.Devices = p.devices(p.host.machine(), policy, m.Track)
	if m.Reconnect {
		cfg.Reconnect = func(ctx context.Context) ([]io.ReadWriter, error) { return p.reconnect(ctx, meet.source) }
	}
	return cfg
}

func (w *World) destinationConfig(t *target, m Migration, meet *meeting) migrate.DestinationConfig {
	cfg := migrate.DestinationConfig{
		Target: t, Journal: t, Concurrency: 2, HeartbeatTimeout: heartbeatTimeout, RescueTimeout: rescueTimeout,
		Copy: m.Mode == Copying, DisablePostCopy: m.Mode != PostCopy, Logger: Log,
		OnState: func(s migrate.DestinationState) {
			t.moment("state " + s.String())
			if m.OnDestination != nil {
				m.OnDestination(s)
			}
		},
	}
	if m.Reconnect {
		cfg.Reconnect = func(ctx context.Context) ([]io.ReadWriter, error) { return t.reconnect(ctx, meet.destination) }
	}
	return cfg
}

// begin gives the process a plan, and streams that die with it.
func (p *Process) begin(plan *Plan, streams []io.ReadWriter) {
	p.mu.Lock()
	p.plan = plan
	p.mu.Unlock()
	p.take(streams)
}

// during is a context that ends with ctx. The engine of a killed process is not told: it has to find out by what fails. But
// its search for the other side ends.
func (p *Process) during(ctx context.Context) context.Context {
	if ctx == nil {
		return context.Background()
	}
	return ctx
}

// reconnect is a Reconnect of either side.
func (p *Process) reconnect(ctx context.Context, how func(context.Context) ([]io.ReadWriter, error)) ([]io.ReadWriter, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(p.ctx, cancel)
	defer stop()
	streams, err := how(ctx)
	if err == nil {
		p.take(streams)
	}
	return streams, err
}

// meeting is where the two sides of a migration find each other again: the destination dials, the source listens.
type meeting struct {
	link    *Link
	streams int
	dialed  chan []io.ReadWriter
}

func newMeeting(l *Link, streams int) *meeting {
	return &meeting{link: l, streams: streams, dialed: make(chan []io.ReadWriter)}
}

func (m *meeting) source(ctx context.Context) ([]io.ReadWriter, error) {
	select {
	case streams := <-m.dialed:
		return streams, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

func (m *meeting) destination(ctx context.Context) ([]io.ReadWriter, error) {
	a, b := m.link.Pipes(m.streams)
	select {
	case m.dialed <- a:
		return b, nil
	case <-ctx.Done():
		for i := range a {
			a[i].(io.Closer).Close()
			b[i].(io.Closer).Close()
		}
		return nil, context.Cause(ctx)
	}
}

// Recover does what init systems and operators do after a migration that failed: processes that died are started again, the two
// sides meet, and doubts are ended by what the destination's record says. After it the guest runs on exactly one host. What goes
// wrong meanwhile is repaired likewise.
func (w *World) Recover() (err error) {
	for range 3 {
		if err = w.recoverOnce(); err == nil && len(w.Runs()) > 0 {
			return nil
		}
	}
	return err
}

func (w *World) recoverOnce() error {
	for _, h := range w.Hosts {
		r := h.Record()
		idle := r.Status == Running && !h.runs() // by a process that could not go on, or a machine that died
		if idle {
			h.KillProcess()
		}
		if h.Process() == nil {
			if err := h.Start(); err != nil {
				return fmt.Errorf("start %s: %w", h, err)
			}
		}
	}
	for _, h := range w.Hosts {
		r := h.Record()
		if r.Status != Moved {
			continue
		}
		var other *Host // that the guest was given to
		for _, o := range w.Hosts {
			if o != h && o.Record() == (Record{Running, r.Migration}) {
				other = o
			}
		}
		if err := w.meet(h, other, r.Migration); err != nil {
			return err
		}
	}
	return nil
}

// meet ends the doubt of a source about a migration. Other has the guest by its record; nil: nobody, and nobody will.
func (w *World) meet(h, other *Host, id string) error {
	if other == nil && w.intN(2) == 0 {
		return h.TakeBack()
	}
	for _, x := range w.Hosts {
		if p := x.Process(); p != nil {
			p.begin(&Plan{}, nil) // what went wrong there does so no more
		}
	}
	m := Migration{ID: id, Reconnect: true, Streams: 1, Link: NewLink()}
	m.Link.Rate = bandwidth
	defer m.Link.Close()
	meet := newMeeting(m.Link, m.Streams)
	var wg sync.WaitGroup
	var there error
	if other == nil {
		wg.Go(func() { there = w.disclaim(h, m, meet) })
		if w.rejoin(h, m, meet) == nil {
			w.wrong("%s believes that the guest runs elsewhere, which nobody has", h)
		}
		wg.Wait()
		return there
	}
	if vm := other.machine(); vm != nil && vm.late("memory") != nil && vm.lacks() && h.machine() == nil {
		// What is missing of its memory is nowhere any more: it has lost its power, too. Its disk can be completed.
		other.KillProcess()
		other.KillVMM()
		if err := other.Start(); err != nil {
			return fmt.Errorf("start %s: %w", other, err)
		}
	}
	wg.Go(func() { there = w.rejoin(other, m, meet) })
	here := w.rejoin(h, m, meet)
	wg.Wait()
	if err := errors.Join(here, there); err != nil {
		return fmt.Errorf("%s and %s meet again: %w", h, other, err)
	}
	for n := 0; !other.runs() && n < 100; n++ {
		time.Sleep(tick) // it boots
	}
	return nil
}

// disclaim has some other host tell a source in doubt that the guest does not run there and never will.
func (w *World) disclaim(h *Host, m Migration, meet *meeting) error {
	other := w.Hosts[0]
	if other == h {
		other = w.Hosts[1]
	}
	t := &target{Process: other.Process()}
	cfg := w.destinationConfig(t, m, meet)
	cfg.Journal = deaf{}
	cfg.Reconnect = meet.destination
	return migrate.Disclaim(t.ctx, cfg, m.ID)
}

// deaf is the journal of a host that the guest was not given to.
type deaf struct{}

func (deaf) Commit(context.Context, string) error { return errors.ErrUnsupported }
func (deaf) Abort(context.Context, string) error  { return nil }
func (deaf) Done(context.Context, string) error   { return nil }
