package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"sync"
	"time"

	"github.com/drafter-vm/drafter/pkg/control"
	"github.com/drafter-vm/drafter/pkg/depot"
	"github.com/drafter-vm/drafter/pkg/migrate"
	"github.com/drafter-vm/drafter/pkg/peer"
	"github.com/drafter-vm/drafter/pkg/runner"
	"github.com/drafter-vm/drafter/pkg/transport"
)

// operator is what the control socket of a peer controls.
type operator struct {
	p       *peer.Peer
	links   links
	serving string // address at which the VM can be had
	watch   *watch
	stop    context.CancelFunc

	pushes chan push
	way    way
	backup *depot.Backup // nil: no copies are put into a store

	telling sync.Mutex // held while the metrics are told whether the guest is paused
}

// hold keeps copies for a store from being made until release is called, so that a migration finds the peer free.
func (o *operator) hold() (release func()) {
	if o.backup == nil {
		return func() {}
	}
	return o.backup.Hold()
}

// push is a migration that somebody here has asked for.
type push struct {
	to    named
	first find            // dials
	again find            // dials once more
	ctx   context.Context // of who asks
	end   chan<- pushed
}

type pushed struct {
	report *migrate.Report
	err    error
}

// way is how the other side of a migration is found again: it comes to this peer, it is dialled, or both are tried, where that side may do
// either: one that was pushed the VM waits for us, and one that has asked for it comes back.
type way struct {
	mu    sync.Mutex    // guards what follows
	home  find          // nil: nobody can come
	away  find          // nil: nobody is dialled
	other chan struct{} // closed and replaced when one of these is replaced
	call  *call         // the dial that is under way, or over and not taken yet; nil: there is none
}

// call is a dial. Those who come meanwhile, who can be anybody, do not end it.
type call struct {
	ctx     context.Context
	cancel  context.CancelCauseFunc
	done    chan struct{} // closed when what follows is set
	streams []io.ReadWriter
	err     error
	keep    func() bool // that they are not closed when ctx ends; false: they were
}

// find finds the other side once.
type find func(context.Context) ([]io.ReadWriter, error)

// wait has the other side come here, from now on.
func (w *way) wait(f find) { w.set(func() { w.home = f }) }

// dial has the other side dialled, from now on; nil: it is not.
func (w *way) dial(f find) { w.set(func() { w.away = f }) }

func (w *way) set(change func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	change()
	if w.other != nil {
		close(w.other)
		w.other = nil
	}
	if w.call != nil {
		w.call.cancel(errElsewhere)
		w.call = nil
	}
}

var errElsewhere = errors.New("the other side is looked for elsewhere now")

// known reports whether there is a way, and changed is closed when there is another.
func (w *way) known() (ok bool, changed <-chan struct{}) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.other == nil {
		w.other = make(chan struct{})
	}
	return w.home != nil || w.away != nil, w.other
}

// take is what migrate's Reconnect asks for.
func (w *way) take(ctx context.Context) ([]io.ReadWriter, error) {
	_, changed := w.known()
	w.mu.Lock()
	home, away := w.home, w.away
	var dial *call
	if home != nil && away != nil {
		dial = w.dialling(ctx)
	}
	w.mu.Unlock()
	if home == nil && away == nil {
		return nil, errors.New("there is no address at which the other side could be found, or find this one")
	}
	one, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() { // until one of the two
		select {
		case <-changed:
			cancel(errElsewhere)
		case <-one.Done():
		}
	}()
	switch {
	case away == nil:
		return home(one)
	case home == nil:
		return away(one)
	}
	return w.either(one, home, dial)
}

// dialling is the dial that is under way, or was and nobody has taken its end, or else one that begins. It ends with ctx. It is called with mu held.
func (w *way) dialling(ctx context.Context) *call {
	if w.call != nil && w.call.ctx.Err() == nil {
		return w.call
	}
	c := &call{done: make(chan struct{})}
	c.ctx, c.cancel = context.WithCancelCause(ctx)
	w.call = c
	away := w.away
	go func() { // it ends soon after c.ctx
		defer close(c.done)
		c.streams, c.err = away(c.ctx)
		c.keep = context.AfterFunc(c.ctx, peer.Arrival{Streams: c.streams}.Close)
	}()
	return c
}

// end takes the end of a dial that is over.
func (w *way) end(c *call) ([]io.ReadWriter, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.call == c {
		w.call = nil
	}
	defer c.cancel(nil)
	if kept := c.keep(); !kept && c.err == nil {
		return nil, context.Cause(c.ctx)
	}
	return c.streams, c.err
}

// visit is how long it is waited for a side that may come, after it could not be dialled. It is long enough for one that waits in the lobby,
// which stays there for longer.
const visit = time.Second

// either is what home or a dial finds first. A dial that is over comes before who has come, and one that goes on is there the next time. When
// it has failed, home has a moment more, and its error counts.
func (w *way) either(ctx context.Context, home find, away *call) ([]io.ReadWriter, error) {
	type found struct {
		streams []io.ReadWriter
		err     error
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	came := make(chan found, 1)
	dialled := func() ([]io.ReadWriter, error) {
		streams, err := w.end(away)
		if err != nil {
			defer time.AfterFunc(visit, cancel).Stop()
			if c := <-came; c.err == nil {
				return c.streams, nil
			}
			return nil, err
		}
		cancel()
		peer.Arrival{Streams: (<-came).streams}.Close() // who came at the same time may come again
		return streams, nil
	}
	go func() {
		streams, err := home(ctx)
		came <- found{streams, err}
	}()
	select {
	case <-away.done:
		return dialled()
	default:
	}
	select {
	case <-away.done:
		return dialled()
	case c := <-came:
		if c.err == nil {
			return c.streams, nil
		}
		came <- c
		select {
		case <-away.done:
			return dialled()
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

var _ control.Controlled = (*operator)(nil)

func (o *operator) Status(context.Context) (control.Status, error) {
	s := control.Status{
		State: "running", VMPath: o.p.VMPath(), PID: o.p.Instance().Machine().PID(), Migratable: o.p.Migratable(), Serving: o.serving,
		Missing: o.p.Instance().Missing(), UnderWay: o.p.UnderWay(),
	}
	s.Busy = s.UnderWay != ""
	select {
	case <-o.p.Done():
		s.State = "ended"
	default:
		if id, ok := o.p.InDoubt(); ok {
			s.State, s.InDoubt = "in_doubt", id
		} else if o.p.Paused() {
			s.State = "paused"
		} else if !o.p.Running() {
			s.State = "suspended"
		}
	}
	if p := o.watch.latest(); p.Role != "" {
		s.Migration = control.MigrationOf(p)
	}
	return s, nil
}

// now makes a conflict of what is one.
func now(err error) error {
	for _, is := range []error{peer.ErrBusy, peer.ErrPaused, peer.ErrNotMigratable, peer.ErrNotSavable} {
		if errors.Is(err, is) {
			return fmt.Errorf("%w: %w", control.ErrConflict, err)
		}
	}
	return err
}

func (o *operator) Pause(ctx context.Context) error {
	err := o.p.Pause(ctx)
	if err == nil {
		o.tellPaused(true)
	}
	return now(err)
}

func (o *operator) Resume(ctx context.Context) error {
	paused := o.p.Paused() // or it does nothing, beside whatever else the peer does
	err := o.p.Unpause(ctx)
	if err == nil && paused {
		o.tellPaused(false)
	}
	return now(err)
}

// tellPaused tells the metrics of a pause or its end, unless that is no longer so: then whoever has changed it tells of that.
func (o *operator) tellPaused(paused bool) {
	o.telling.Lock()
	defer o.telling.Unlock()
	switch {
	case o.p.Paused() != paused:
	case paused:
		o.watch.metrics.State(control.Paused)
	default:
		o.watch.metrics.State(control.Running)
	}
}

func (o *operator) SetMigratable(_ context.Context, may bool) error {
	o.p.SetMigratable(may)
	return nil
}

// to is the way to an address that an operator names.
func (l links) to(address string) (links, error) {
	l.raddr, l.giving = address, true
	if err := l.options(true).Check(address); err != nil {
		return l, fmt.Errorf("%w: %w", control.ErrInvalid, err)
	}
	if transport.Single(address) {
		return l, fmt.Errorf("%w: address %q: it is this program's, and belongs to who has started it", control.ErrInvalid, transport.Redacted(address))
	}
	return l, nil
}

func (o *operator) Migrate(ctx context.Context, address string) (*migrate.Report, error) {
	if id, ok := o.p.InDoubt(); ok {
		return nil, lookAt(o.links, &o.way, id, address)
	}
	l, err := o.links.to(address)
	if err != nil {
		return nil, err
	}
	defer o.hold()()
	if what := o.p.UnderWay(); what != "" {
		return nil, now(fmt.Errorf("%w: a %s is under way", peer.ErrBusy, what))
	}
	end := make(chan pushed, 1)
	p := push{to: named(address), again: l.dial, ctx: ctx, end: end, first: func(ctx context.Context) ([]io.ReadWriter, error) {
		return l.dialOr(ctx, "start the peer that is to have the VM, with --accept")
	}}
	select {
	case o.pushes <- p:
	case <-time.After(time.Second):
		return nil, now(fmt.Errorf("%w: the peer was asked for the VM meanwhile, or is being closed", peer.ErrBusy))
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	r := <-end
	return r.report, now(r.err)
}

func (o *operator) Snapshot(ctx context.Context, dir string) (*migrate.Report, error) {
	defer o.hold()()
	_, report, err := o.p.Snapshot(ctx, dir)
	if errors.Is(err, fs.ErrExist) {
		return report, fmt.Errorf("%w: %w", control.ErrInvalid, err)
	}
	if err = now(err); !errors.Is(err, control.ErrConflict) {
		o.watch.metrics.SnapshotDone(report, err)
	}
	return report, err
}

func (o *operator) Balloon(ctx context.Context, size int64) (control.Balloon, error) {
	given, err := o.p.Instance().Balloon(ctx, size)
	switch {
	case errors.Is(err, runner.ErrSize):
		err = fmt.Errorf("%w: %w", control.ErrInvalid, err)
	case errors.Is(err, runner.ErrPhase), errors.Is(err, runner.ErrBalloon):
		err = fmt.Errorf("%w: %w", control.ErrConflict, err)
	}
	return control.Balloon{Given: given}, err
}

func (o *operator) Cancel(context.Context) error {
	what := o.p.UnderWay()
	switch {
	case o.p.Cancel():
		return nil
	case what != "":
		return fmt.Errorf("%w: a %s is under way, which cannot be cancelled", control.ErrConflict, what)
	}
	return fmt.Errorf("%w: nothing is under way", control.ErrConflict)
}

func (o *operator) Stop(context.Context) error {
	o.stop()
	return nil
}

// named is an address as it was given.
type named string

func (named) Network() string  { return "" }
func (a named) String() string { return transport.Redacted(string(a)) }
