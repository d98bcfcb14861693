package migrate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/wire"
)

// A link that dies after the commit does not end a migration: the two sides meet again, in a new session over new streams.
// The source asks for the migration by its id; the destination says where the guest stands and what it misses, and the source
// goes on from there. Nothing that either side believed about the other before counts.

const (
	retryMin = 50 * time.Millisecond // between attempts to reconnect
	retryMax = time.Second

	// proofTimeout is how long whoever comes may take to prove that it is the other side, who waits for its turn meanwhile. It is
	// shorter than the time for which a peer.Lobby keeps one waiting.
	proofTimeout = 3 * time.Second
)

// limitProof bounds a proof, and all that precedes it in a session.
func limitProof(ctx context.Context, handshake time.Duration) (context.Context, context.CancelFunc) {
	limit := min(handshake, proofTimeout)
	return context.WithTimeoutCause(ctx, limit, fmt.Errorf("it has not proven within %v what it is: %w", limit, os.ErrDeadlineExceeded))
}

// errRestarted is why a process that was restarted looks for the other side.
var errRestarted = errors.New("this process was restarted")

// severed reports whether err ended no more than a session: the two sides may meet again.
func severed(err error) bool {
	var peer *PeerError
	var t *told
	switch {
	case errors.As(err, &peer):
		return peer.Code == wire.CodeTimeout || peer.Code == wire.CodeProtocol
	case errors.As(err, &t):
		return t.code == wire.CodeTimeout
	}
	return true
}

// seeker meets the other side again.
type seeker struct {
	reconnect func(context.Context) ([]io.ReadWriter, error)
	admit     func(context.Context, []io.ReadWriter) error
	timeout   time.Duration
	log       *slog.Logger
}

// proven is a session with somebody who has proven to be the other side.
type proven interface{ part(why error) }

// meet calls session with whoever has proven, to prove, to be the other side, until that was of use, the time is over, or ctx ends. The
// error is the session's, or says why there was none. lost is why the session before ended.
func meet[P proven](ctx context.Context, k seeker, lost error, prove func(context.Context, []io.ReadWriter) (P, error),
	session func(P) (useful bool, err error)) error {
	if k.reconnect == nil {
		return lost
	}
	ctx, cancel := context.WithTimeoutCause(ctx, k.timeout, fmt.Errorf("the other side was not found again within %v: %w", k.timeout, os.ErrDeadlineExceeded))
	defer cancel()
	f := &search[P]{seeker: k, prove: prove, found: make(chan P)}
	defer f.tasks.Wait()
	for wait := retryMin / 5; ; wait = min(max(2*wait, retryMin), retryMax) { // sessions that die at once must not make us spin
		if !sleep(ctx, wait) {
			break
		}
		p, ok := f.find(ctx)
		if !ok {
			break
		}
		useful, err := session(p)
		if useful {
			return err
		}
		f.note(err)
	}
	if err := f.heard(); err != nil {
		return fmt.Errorf("%w (last: %w; after: %w)", context.Cause(ctx), err, lost)
	}
	return fmt.Errorf("%w (after: %w)", context.Cause(ctx), lost)
}

// sleep reports whether ctx goes on after a while.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// search looks for the other side.
type search[P proven] struct {
	seeker
	prove func(context.Context, []io.ReadWriter) (P, error)
	found chan P
	tasks sync.WaitGroup // of those who are proving, or are sent away

	mu         sync.Mutex // guards what follows
	last, said error      // of attempts; said is what the other side has said, and tells more than that it was not there the next time
	warned     bool
}

// find returns the first who has proven to be the other side, and no other is looked for then. Otherwise ctx has ended.
func (f *search[P]) find(ctx context.Context) (p P, ok bool) {
	looking, stop := context.WithCancelCause(ctx)
	looked := make(chan struct{})
	go func() {
		defer close(looked)
		f.look(looking)
	}()
	select {
	case p = <-f.found:
		ok = true
	case <-ctx.Done():
	}
	stop(errFound)
	<-looked // the next session may be long: nobody takes streams meanwhile
	return p, ok
}

var errFound = errors.New("the other side was found, or is not looked for any more")

// visits reports whether streams are of somebody who came without having been asked, as through a peer.Lobby. That can be anybody, and many.
func visits(streams []io.ReadWriter) bool {
	s, ok := streams[0].(interface{ Visits() bool })
	return ok && s.Visits()
}

// maxVisitors is how many streams those may have who are proving at a time who they are. Whoever has been at it for longest makes room for
// the next: the other side needs a round trip or two for it.
const maxVisitors = 512

// look brings streams to whoever may be the other side, until ctx ends. Those that were dialled one after the other, and visitors, of whom any
// may be the one, all at a time.
func (f *search[P]) look(ctx context.Context) {
	type visitor struct {
		streams int
		end     context.CancelCauseFunc
	}
	var visitors []visitor
	total := 0 // of their streams
	for wait := retryMin; ; {
		streams, err := f.reconnect(ctx)
		if err == nil {
			if err = checkStreams(streams); err != nil {
				interruptAll(streams)
			}
		}
		if err == nil && ctx.Err() != nil {
			interruptAll(streams)
			return
		}
		if err == nil && visits(streams) {
			visit, end := context.WithCancelCause(ctx)
			visitors = append(visitors, visitor{len(streams), end})
			for total += len(streams); total > maxVisitors; visitors = visitors[1:] { // who may have left by itself long ago
				visitors[0].end(errors.New("it has not proven who it is, and others wait"))
				total -= visitors[0].streams
			}
			f.tasks.Go(func() {
				defer end(nil)
				if err := f.try(visit, streams); err != nil {
					f.note(err)
				}
			})
			continue
		}
		if err == nil {
			tried := make(chan error, 1)
			f.tasks.Go(func() { tried <- f.try(ctx, streams) })
			select {
			case err = <-tried:
			case <-ctx.Done(): // letting go of what was dialled may take a while
				return
			}
			if err == nil {
				return
			}
		}
		if ctx.Err() == nil || !errors.Is(err, context.Cause(ctx)) {
			f.note(err)
		}
		if !sleep(ctx, wait) {
			return
		}
		wait = min(2*wait, retryMax)
	}
}

// try has whoever is at the other end prove that it is the other side, and returns when it was found or has failed.
func (f *search[P]) try(ctx context.Context, streams []io.ReadWriter) error {
	if f.admit != nil {
		if err := f.admit(ctx, streams); err != nil {
			interruptAll(streams)
			return fmt.Errorf("%w: %w", errNotAdmitted, err)
		}
	}
	stop := context.AfterFunc(ctx, func() { interruptAll(streams) }) // also while a refusal is said
	p, err := f.prove(ctx, streams)
	switch stopped := stop(); {
	case err != nil:
		return err
	case !stopped:
		p.part(context.Cause(ctx))
		return context.Cause(ctx)
	}
	select {
	case f.found <- p:
		return nil
	case <-ctx.Done():
		p.part(context.Cause(ctx))
		return context.Cause(ctx)
	}
}

var errNotAdmitted = errors.New("somebody came who is not admitted")

// note remembers why an attempt failed. One of those who are refused is warned of, as they may be many.
func (f *search[P]) note(err error) {
	if errors.Is(err, errFound) {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	level := slog.LevelDebug
	if (errors.Is(err, ErrUnproven) || errors.Is(err, errNotAdmitted)) && !f.warned {
		f.warned, level = true, slog.LevelWarn
	}
	f.log.Log(context.Background(), level, "the other side was not met", "error", err)
	f.last = err
	var peer *PeerError
	if errors.As(err, &peer) {
		f.said = err
	}
}

// heard is the error of all attempts that tells most.
func (f *search[P]) heard() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.said != nil {
		return f.said
	}
	return f.last
}

func (s *source) mayReconnect(err error) bool {
	return s.cfg.Reconnect != nil && s.version >= 2 && severed(err)
}

// reconnect looks for the destination after a session that ended with lost, and has one or more sessions with it. The result
// is that of the last.
func (s *source) reconnect(ctx context.Context, lost error) error {
	next := SourceSeeking
	if s.ran {
		next = SourceRejoining
	}
	if s.state.get() != next { // a session may have ended before it changed anything
		s.state.set(next)
	}
	s.met = false
	s.log.Warn("the link to the destination is gone; trying to meet again", "error", lost)
	s.leaveSession(lost)
	return meet(ctx, seeker{s.cfg.Reconnect, s.cfg.Admit, s.cfg.RescueTimeout, s.log}, lost, s.prove, func(r *rejoined) (bool, error) {
		if s.cfg.Interruptible {
			defer context.AfterFunc(ctx, func() { r.fail(context.Cause(ctx)) })()
		}
		err := s.rejoin(r)
		var peer *PeerError
		useful := err == nil || s.met || errors.As(err, &peer) && peer.NeverRan
		if !useful {
			s.leaveSession(err)
		}
		return useful, err
	})
}

// leaveSession ends what is left of a session whose link failed.
func (s *source) leaveSession(why error) {
	if s.link == nil {
		return
	}
	s.link.part(why)
	s.endSession()
	s.wireBytes += s.link.written.Load()
	s.link = nil
}

// rejoined is a session with the destination after the first, of which it has said where the guest stands.
type rejoined struct {
	*link
	says *wire.Rejoin
}

// prove begins a session with somebody who may be the destination, and returns when it has proven that it is. It changes nothing of s, and
// may be called concurrently.
func (s *source) prove(ctx context.Context, streams []io.ReadWriter) (_ *rejoined, err error) {
	ctx, cancel := limitProof(ctx, s.cfg.HandshakeTimeout)
	defer cancel()
	l, err := s.open(ctx, wire.PurposeRejoin, streams)
	if err != nil {
		return nil, err
	}
	s.attach(l)
	goOn := l.begin(ctx)
	defer func() {
		if err != nil {
			goOn()
			l.part(err)
		}
	}()
	public := wire.PublicID(s.cfg.ID)
	if err := l.send(wire.Header{Type: wire.TypeSeek}, wire.EncodeSeek(s.cfg.ID, l.meeting)); err != nil {
		return nil, err
	}
	m, err := l.expect(wire.TypeRejoin)
	var peer *PeerError
	if errors.As(err, &peer) && peer.NeverRan {
		return nil, fmt.Errorf("%w: it says that the guest of migration %q never ran there", ErrUnproven, public) // from whichever call this came
	}
	if err != nil {
		return nil, err
	}
	r, err := wire.DecodeRejoin(m.payload)
	switch {
	case err != nil:
		return nil, err
	case r.ID != public:
		return nil, tell(wire.CodeRefused, fmt.Errorf("destination speaks of migration %q, not of %q", r.ID, public), "this is another migration")
	case !r.Proves(s.cfg.ID, l.meeting):
		return nil, tell(wire.CodeRefused, fmt.Errorf("%w: it calls itself the destination of migration %q, and says of the guest: %s", ErrUnproven, public, r.Standing), "this is not the destination of that migration")
	case !goOn():
		<-l.ctx.Done() // which follows
		return nil, context.Cause(l.ctx)
	}
	return &rejoined{l, r}, nil
}

// rejoin goes through a session after the first. s.met says whether the two sides understood each other.
func (s *source) rejoin(with *rejoined) error {
	s.met = false
	l, r := with.link, with.says
	s.enter(l)
	done := l.limit(s.cfg.HandshakeTimeout, "saying what the destination misses")
	s.log.Info("met the destination again", "standing", r.Standing)
	switch r.Standing {
	case wire.NeverRan:
		done()
		s.met = true
		return &PeerError{Role: wire.RoleDestination, Code: wire.CodeInternal, Reason: "the guest never ran there", NeverRan: true}
	case wire.Settled:
		done()
		s.met = true
		s.isRunning()
		return nil
	}
	if r.Standing == wire.Runs { // whatever comes of this session
		s.noteRuns()
	}
	missing, err := s.adopt(l, r)
	if err != nil {
		return err
	}
	done()
	s.met = true
	s.reconnects++
	if s.fresh = s.fresh || r.Fresh; s.fresh {
		for _, d := range s.devices {
			d.digest = newDigest(d.size)
		}
	}
	flags := uint8(0)
	if s.fresh {
		flags = wire.FlagFresh
	}
	s.delivered.Store(nil)
	s.flow()
	s.window.narrow(serveLimit(len(l.streams)))
	s.makeRoom()
	v := s.newServing(missing, missing)
	v.start() // before the destination hears that it may demand
	if err := l.send(wire.Header{Type: wire.TypeServe, Flags: flags}, nil); err != nil {
		return err
	}
	if r.Standing == wire.Runs {
		s.isRunning()
		s.state.set(SourceServing)
	} else {
		s.state.set(SourceCommitted)
	}
	return s.hand(v)
}

// adopt takes over the destination's view: its order of devices, and what it misses.
func (s *source) adopt(l *link, r *wire.Rejoin) ([][]block.Range, error) {
	devices := make([]*sourceDevice, len(r.Devices))
	missing := make([][]block.Range, len(r.Devices))
	for i, want := range r.Devices {
		for _, d := range s.all {
			if d.Name == want.Name {
				devices[i] = d
			}
		}
		switch d := devices[i]; {
		case d == nil:
			return nil, tell(wire.CodeRefused, fmt.Errorf("destination asks for device %q, which is not here", want.Name), "device %q is not here", want.Name)
		case d.size != want.Size:
			return nil, tell(wire.CodeRefused, fmt.Errorf("device %q has %d bytes here and %d at the destination", want.Name, d.size, want.Size),
				"device %q has %d bytes here", want.Name, d.size)
		}
	}
	for i, want := range r.Devices {
		if !want.Missing {
			continue
		}
		set := newPageSet(want.Size)
		for last := false; !last; {
			m, err := l.expect(wire.TypeMissing)
			if err != nil {
				return nil, err
			}
			if int(m.Device) != i {
				return nil, fmt.Errorf("%w: missing list of device %d where that of %d was due", wire.ErrMalformed, m.Device, i)
			}
			if err := set.read(m); err != nil {
				return nil, err
			}
			last = m.Flags&wire.FlagLast != 0
		}
		missing[i] = set.ranges()
		if lost := devices[i].Lost; lost != nil && len(missing[i]) > 0 {
			return nil, tell(wire.CodeRefused, fmt.Errorf("destination asks for device %q: %w", want.Name, lost), "device %q: %v", want.Name, lost)
		}
	}
	s.devices = devices
	for i, d := range devices {
		d.index = i
	}
	return missing, nil
}

// read adds the pages of a Missing frame to the set, behind those that are in.
func (s *pageSet) read(m message) error {
	return wire.DecodeMissing(m.Header, m.payload, func(r wire.Run) error {
		if r.Page < s.top || r.Page+r.Pages > s.pages {
			return fmt.Errorf("%w: missing list of device %d: %d pages from %d on, of %d, after %d", wire.ErrMalformed, m.Device, r.Pages, r.Page, s.pages, s.top)
		}
		for page := r.Page; page < r.Page+r.Pages; page++ {
			s.put(page)
		}
		s.top = r.Page + r.Pages
		return nil
	})
}
