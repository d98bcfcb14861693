package migrate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
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
	timeout   time.Duration
}

// meet calls session with new streams until it was of use, the time is over, or ctx ends. The error is the session's, or says
// why there was none. lost is why the session before ended.
func (k seeker) meet(ctx context.Context, lost error, session func(context.Context, []io.ReadWriter) (useful bool, err error)) error {
	if k.reconnect == nil {
		return lost
	}
	ctx, cancel := context.WithTimeoutCause(ctx, k.timeout, fmt.Errorf("the other side was not found again within %v: %w", k.timeout, os.ErrDeadlineExceeded))
	defer cancel()
	wait := retryMin
	pause := time.NewTimer(retryMin / 5) // sessions that die at once must not make us spin
	defer pause.Stop()
	select {
	case <-pause.C:
	case <-ctx.Done():
		return fmt.Errorf("%w (after: %w)", context.Cause(ctx), lost)
	}
	for said := error(nil); ; {
		streams, err := k.reconnect(ctx)
		if err == nil {
			if err = checkStreams(streams); err != nil {
				interruptAll(streams)
			}
		}
		if err == nil {
			var useful bool
			useful, err = session(ctx, streams)
			if useful {
				return err
			}
		}
		// What the other side says tells more than that it was not there the next time.
		var peer *PeerError
		if errors.As(err, &peer) {
			said = err
		} else if said != nil && ctx.Err() != nil {
			err = said
		}
		if ctx.Err() == nil {
			t := time.NewTimer(wait)
			select {
			case <-t.C:
				wait = min(2*wait, retryMax)
				continue
			case <-ctx.Done():
				t.Stop()
			}
		}
		return fmt.Errorf("%w (last: %w; after: %w)", context.Cause(ctx), err, lost)
	}
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
	return seeker{s.cfg.Reconnect, s.cfg.RescueTimeout}.meet(ctx, lost, func(ctx context.Context, streams []io.ReadWriter) (bool, error) {
		s.leaveSession(lost)
		err := s.rejoin(ctx, streams)
		var peer *PeerError
		if !s.proven && errors.As(err, &peer) && peer.NeverRan {
			err = fmt.Errorf("%w: it says that the guest never ran there", ErrUnproven) // from whichever call this came
		}
		useful := err == nil || s.met || s.proven && errors.As(err, &peer) && peer.NeverRan
		if !useful {
			s.log.Debug("the destination was not met", "error", err)
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

// rejoin is one session after the first. s.proven says whether it was with the destination, and s.met whether the two sides understood
// each other. What was heard in a session without proof may not change anything.
func (s *source) rejoin(ctx context.Context, streams []io.ReadWriter) error {
	s.met, s.proven = false, false
	l, err := s.open(ctx, wire.PurposeRejoin, streams)
	if err != nil {
		return err
	}
	s.begin(context.WithoutCancel(ctx), l)
	done := l.limit(min(s.cfg.HandshakeTimeout, proofTimeout), "proving what it is")
	if err := l.send(wire.Header{Type: wire.TypeSeek}, wire.EncodeSeek(s.cfg.ID, l.sessions)); err != nil {
		return err
	}
	m, err := l.expect(wire.TypeRejoin)
	if err != nil {
		return err
	}
	r, err := wire.DecodeRejoin(m.payload)
	if err != nil {
		return err
	}
	switch public := wire.PublicID(s.cfg.ID); {
	case r.ID != public:
		return tell(wire.CodeRefused, fmt.Errorf("destination speaks of migration %q, not of %q", r.ID, public), "this is another migration")
	case !wire.Proves(r.Proof, s.cfg.ID, wire.RoleDestination, l.sessions):
		s.log.Warn("refused a peer that calls itself the destination and cannot prove it", "standing", r.Standing)
		return tell(wire.CodeRefused, fmt.Errorf("%w: it calls itself the destination of migration %q", ErrUnproven, public), "this is not the destination of that migration")
	}
	s.proven = true
	done()
	done = l.limit(s.cfg.HandshakeTimeout, "saying what the destination misses")
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
	s.window.narrow(serveLimit(len(streams)))
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
