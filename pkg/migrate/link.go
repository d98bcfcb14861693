package migrate

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/wire"
)

const (
	// linger is how long the end of a migration waits for the other side's last frames before it lets go of the streams,
	// so that the reason of a failure is not lost in a reset connection.
	linger = time.Second
	// grace is how long a failed write waits for the read side to say why.
	grace = 250 * time.Millisecond
)

// link is the conversation with the other side over one or many streams. It starts two goroutines for each stream, a
// reader and a writer, and a watchdog for all; close ends and awaits them.
//
//	state machine ── send ──► stream.urgent ─┐
//	                                         ├─► writer ─► stream       stream ─► reader ─┬─► control ─► state machine
//	workers ──────────────► bulk ────────────┘   (urgent first)                           └─► onBulk, onAck
//
// All writers take from one bulk queue, which spreads content over the streams as fast as each takes it. A reader never
// waits for a writer, so that two sides which write at the same time cannot block each other.
type link struct {
	meeting wire.Meeting // what a proof in this session is good for
	role    wire.Role    // ours
	version uint16       // of the protocol, that both sides speak
	log     *slog.Logger

	// ctx ends when the migration has failed or is over; its cause is why.
	ctx  context.Context
	fail context.CancelCauseFunc // the first cause wins

	streams []*stream
	control chan message
	bulk    chan *wire.Buffer // whole frames; the writer releases the buffer

	// Called by readers, possibly several at a time; an error fails the link. Nil: such a frame is a protocol error.
	// onBulk reads the payload itself.
	onBulk   func(wire.Header, wire.Check, *wire.Reader) error
	onAck    func(device int, total int64) error
	onDemand func(device int, r block.Range) error
	onAbsent func(h wire.Header, payload []byte) error

	// reserved: stream 0 takes no more from bulk, unless it is the only one. What is urgent then has nothing in its way.
	reserved atomic.Bool

	// aside has the goroutines of the other streams, and those that work for them, step back.
	aside atomic.Bool

	heartbeatTimeout time.Duration

	compressor *compressor // of a source that may compress: it is told what the streams take

	heardBye, heardAbort atomic.Bool // the other side has said this last word on stream 0

	closing chan struct{} // closed by close: writers send last and end
	last    []byte        // the frame that ends each stream, nil if they end without one; set before closing is closed
	abort   bool          // last is an Abort, or nil: nothing queued is worth sending

	wg sync.WaitGroup // readers, writers, watchdog

	read, written atomic.Int64 // bytes, all streams
	busy          atomic.Int64 // nanoseconds in Write, all streams
}

// stream is one of a link's streams. index 0 carries the control frames.
type stream struct {
	rw     io.ReadWriter
	index  int
	urgent chan *wire.Buffer

	// For the watchdog. listening is true while the reader waits for the peer rather than for us; heard is set when
	// something arrived; ended when no more is expected.
	listening, heard, ended atomic.Bool

	readerDone chan struct{}
	link       *link
}

// message is a control frame.
type message struct {
	wire.Header
	payload []byte
}

// interrupt makes blocked reads and writes of rw return, if rw has a way to do that.
func interrupt(rw io.ReadWriter) {
	switch s := rw.(type) {
	case io.Closer:
		_ = s.Close() // whatever it says, nothing more is asked of it
	case interface{ SetDeadline(time.Time) error }:
		_ = s.SetDeadline(time.Unix(1, 0))
	}
}

func interruptAll(streams []io.ReadWriter) {
	for _, rw := range streams {
		interrupt(rw)
	}
}

// binding is what a stream calls the channel that it is, which nobody but its two ends can be at the end of; nil: nothing. Those of
// pkg/transport over TLS, QUIC and psk have it, and a caller's own may.
func binding(rw io.ReadWriter) []byte {
	if s, ok := rw.(interface{ ChannelBinding() []byte }); ok {
		return s.ChannelBinding()
	}
	return nil
}

// greeting is how a side introduces itself.
type greeting struct {
	role    wire.Role
	purpose wire.Purpose
	newest  uint16        // version
	timeout time.Duration // until the other has done so too
}

// closed reports whether the other side ended a stream before it had said anything of use.
func closed(err error) bool {
	return errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrClosedPipe) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

// connect exchanges prefaces on all streams and returns a link on which nothing runs yet. When it fails, the streams are
// interrupted. So are all but one, and the link has only that, where a source of version 1 knows of one.
func connect(ctx context.Context, g greeting, rws []io.ReadWriter) (_ *link, err error) {
	role, timeout := g.role, g.timeout
	ctx, cancel := context.WithTimeoutCause(ctx, timeout,
		fmt.Errorf("peer did not introduce itself within %v, so it is no Drafter, or hangs: %w", timeout, os.ErrDeadlineExceeded))
	defer cancel()

	type result struct {
		i   int
		p   wire.Preface
		err error
	}
	ours := wire.Preface{Newest: g.newest, Oldest: wire.OldestVersion, Role: role, Purpose: g.purpose, Capabilities: wire.CapBound}
	for _, rw := range rws {
		if binding(rw) == nil {
			ours.Capabilities &^= wire.CapBound
		}
	}
	session := rand.Uint64()
	version := g.newest
	var wg sync.WaitGroup
	reads := make(chan result, len(rws))
	writes := make(chan result, len(rws))
	for i, rw := range rws {
		p := ours
		if role == wire.RoleSource || g.newest >= 2 {
			p.Stream, p.Streams, p.Session = uint8(i), uint8(len(rws)), session
		}
		wg.Go(func() {
			theirs, err := wire.ReadPreface(rw)
			if err == nil {
				_, err = wire.Negotiate(ours, theirs)
			}
			reads <- result{i, theirs, err}
		})
		wg.Go(func() {
			_, err := rw.Write(p.Append(nil))
			writes <- result{i: i, err: err}
		})
	}
	defer func() {
		if err != nil {
			interruptAll(rws)
			waitFor(&wg, linger)
		}
	}()

	theirs := make([]wire.Preface, len(rws))
	var first error
	several := role == wire.RoleDestination && len(rws) > 1
	lone := -1                  // the only stream in use, of several
	var enough <-chan time.Time // to wait for the others, when one was closed
	for left := len(rws); left > 0; left-- {
		select {
		case r := <-reads:
			theirs[r.i] = r.p
			version = min(version, r.p.Newest)
			if several && r.err == nil && r.p.Newest < 2 && r.p.Streams == 1 {
				// To a source of version 1 that was dialed each connection is a migration: it may have no more of them.
				lone, first = r.i, nil
			} else if r.err != nil && first == nil {
				first = fmt.Errorf("stream %d: %w", r.i, r.err)
			}
			switch {
			case lone >= 0:
				left = 0
			case r.err != nil && several && closed(r.err): // perhaps a stream that it has no use for
				if enough == nil {
					enough = time.After(linger)
				}
			case r.err != nil:
				left = 0
			}
		case <-enough:
			left = 0
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	if lone >= 0 {
		for i, rw := range rws {
			if i != lone {
				interrupt(rw)
			}
		}
		version = min(g.newest, theirs[lone].Newest)
	}
	// Our own preface goes out whole even if theirs is refused: it tells them why.
	patience := time.NewTimer(linger)
	defer patience.Stop()
	for waiting := len(rws); waiting > 0; waiting-- {
		select {
		case r := <-writes:
			if lone >= 0 && r.i != lone {
				continue
			}
			if lone >= 0 {
				waiting = 1
			}
			if r.err != nil && first == nil {
				first = fmt.Errorf("stream %d: write preface: %w", r.i, r.err)
			}
		case <-patience.C:
			if first == nil {
				first = fmt.Errorf("write preface: peer does not read: %w", os.ErrDeadlineExceeded)
			}
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	if first != nil {
		return nil, first
	}

	if lone >= 0 {
		rws, theirs = rws[lone:lone+1], theirs[lone:lone+1]
	}
	l := &link{role: role, version: version, control: make(chan message, 8), closing: make(chan struct{})}
	for i, rw := range rws {
		s := &stream{rw: rw, index: i, urgent: make(chan *wire.Buffer, 16), readerDone: make(chan struct{}), link: l}
		if role == wire.RoleDestination {
			s.index = int(theirs[i].Stream)
			if int(theirs[i].Streams) != len(rws) || theirs[i].Session != theirs[0].Session {
				return nil, fmt.Errorf("stream %d: source uses %d streams in session %x, here are %d and stream 0 is in session %x: give Receive exactly the streams of one migration",
					i, theirs[i].Streams, theirs[i].Session, len(rws), theirs[0].Session)
			}
		}
		l.streams = append(l.streams, s)
	}
	slices.SortFunc(l.streams, func(a, b *stream) int { return cmp.Compare(a.index, b.index) })
	for i, s := range l.streams {
		if s.index != i {
			return nil, fmt.Errorf("%w: stream %d of the source is missing or came twice", wire.ErrMalformed, i)
		}
	}
	for i, p := range theirs {
		// What one of them says is proven for all.
		if p.Capabilities != theirs[0].Capabilities || version >= 2 && p.Session != theirs[0].Session {
			return nil, fmt.Errorf("%w: stream %d of the %v is in session %x with capabilities %x, stream 0 in %x with %x",
				wire.ErrMalformed, i, role.Opposite(), p.Session, p.Capabilities, theirs[0].Session, theirs[0].Capabilities)
		}
	}
	l.meeting = wire.Meeting{Source: wire.End{Session: session, Capabilities: ours.Capabilities}, Destination: wire.End{Session: theirs[0].Session, Capabilities: theirs[0].Capabilities}}
	if role == wire.RoleDestination {
		l.meeting.Source, l.meeting.Destination = l.meeting.Destination, l.meeting.Source
	}
	if ours.Capabilities&theirs[0].Capabilities&wire.CapBound != 0 {
		for _, s := range l.streams {
			l.meeting.Channels = append(l.meeting.Channels, binding(s.rw))
		}
	}
	return l, nil
}

// start lets frames flow. The link fails when ctx is canceled, until the returned function is called; that function
// returns false if it came too late.
func (l *link) start(ctx context.Context) (ignoreCancel func() bool) {
	// Cancellation of ctx is passed on by hand, so that it can be shut out at commit.
	l.ctx, l.fail = context.WithCancelCause(context.WithoutCancel(ctx))
	ignoreCancel = context.AfterFunc(ctx, func() {
		l.fail(tell(wire.CodeCanceled, context.Cause(ctx), "the %v was stopped", l.role))
	})
	for _, s := range l.streams {
		l.wg.Go(s.read)
		l.wg.Go(s.write)
	}
	l.wg.Go(l.watch)
	return ignoreCancel
}

// begin is start for a session in which nothing is at stake yet: when ctx ends before the returned function is called, the link fails, and
// the other side is not told why.
func (l *link) begin(ctx context.Context) (goOn func() bool) {
	l.start(context.WithoutCancel(ctx))
	return context.AfterFunc(ctx, func() { l.fail(context.Cause(ctx)) })
}

// send queues a control frame. It fails when the link does.
func (l *link) send(h wire.Header, payload []byte) error {
	b := wire.NewBuffer()
	b.Append(h, payload)
	select {
	case l.streams[0].urgent <- b:
		return nil
	case <-l.ctx.Done():
		b.Release()
		return context.Cause(l.ctx)
	}
}

// sendUrgent queues content that goes before all other. It takes the buffer.
func (l *link) sendUrgent(b *wire.Buffer) error {
	select {
	case l.streams[0].urgent <- b:
		return nil
	case <-l.ctx.Done():
		b.Release()
		return context.Cause(l.ctx)
	}
}

// sendBulk queues content. It takes the buffer.
func (l *link) sendBulk(b *wire.Buffer) error {
	select {
	case l.bulk <- b:
		return nil
	case <-l.ctx.Done():
		b.Release()
		return context.Cause(l.ctx)
	}
}

// next waits for a control frame. What has arrived counts more than that the link has failed since.
func (l *link) next() (message, error) {
	select {
	case m := <-l.control:
		return m, nil
	default:
	}
	select {
	case m := <-l.control:
		return m, nil
	case <-l.ctx.Done():
		select {
		case m := <-l.control:
			return m, nil
		default:
			return message{}, context.Cause(l.ctx)
		}
	}
}

// expect waits for a control frame of one type.
func (l *link) expect(t wire.Type) (message, error) {
	m, err := l.next()
	if err == nil && m.Type != t {
		err = unexpectedFrame(m.Type, t.String())
	}
	return m, err
}

func unexpectedFrame(got wire.Type, want string) error {
	return fmt.Errorf("%w: %v frame where %s was due", wire.ErrMalformed, got, want)
}

// limit fails the link if the returned function is not called within d.
func (l *link) limit(d time.Duration, what string) (done func()) {
	t := time.AfterFunc(d, func() {
		l.fail(tell(wire.CodeTimeout, fmt.Errorf("%s took longer than %v: %w", what, d, os.ErrDeadlineExceeded), "%s took longer than %v", what, d))
	})
	return func() { t.Stop() }
}

// Read implements io.Reader for the stream's wire.Reader, and takes the pulse.
func (s *stream) Read(p []byte) (int, error) {
	s.listening.Store(true)
	n, err := s.rw.Read(p)
	s.listening.Store(false)
	if n > 0 {
		s.heard.Store(true)
		s.link.read.Add(int64(n))
	}
	return n, err
}

func (s *stream) read() {
	defer close(s.readerDone)
	defer s.ended.Store(true)
	l := s.link
	if err := s.readFrames(); err != nil {
		if err == io.EOF || errors.Is(err, io.ErrUnexpectedEOF) {
			err = fmt.Errorf("peer closed the stream before it was done: %w", io.ErrUnexpectedEOF)
		}
		l.fail(fmt.Errorf("stream %d: %w", s.index, err))
	}
}

// readFrames returns nil when the peer has nothing more to say on this stream and that is fine.
func (s *stream) readFrames() error {
	l := s.link
	r := wire.NewReader(s)
	var b background
	var check wire.Check // of the frame that comes now
	for {
		if s.index > 0 && l.aside.Load() {
			b.stepBack()
		}
		h, err := r.Next()
		if err != nil {
			return err
		}
		if err := h.Check(l.version); err != nil {
			return err
		}
		if check != (wire.Check{}) && h.Type != wire.TypeData && h.Type != wire.TypeZero {
			return fmt.Errorf("%w: %v frame behind a check", wire.ErrMalformed, h.Type)
		}
		switch h.Type {
		case wire.TypeHeartbeat:
		case wire.TypeCheck:
			var b [8]byte
			if err := r.Payload(b[:]); err != nil {
				return err
			}
			if check, err = wire.ParseCheck(b[:]); err != nil {
				return err
			}
			if l.onBulk == nil {
				return fmt.Errorf("%w: %v frame from the %v", wire.ErrMalformed, h.Type, l.peer())
			}
		case wire.TypeBye:
			if s.index == 0 {
				// What it had to say before is queued. If we still wait for more, it will not come.
				l.heardBye.Store(true)
				l.fail(errBye)
			}
			return nil
		case wire.TypeAbort:
			b := make([]byte, h.Length)
			if err := r.Payload(b); err != nil {
				return err
			}
			a, err := wire.DecodeAbort(b)
			if err != nil {
				return err
			}
			if s.index == 0 {
				l.heardAbort.Store(true)
			}
			l.fail(&PeerError{Role: l.peer(), Code: a.Code, Reason: a.Reason, NeverRan: h.Flags&wire.FlagNeverRan != 0})
			return nil
		case wire.TypeData, wire.TypeZero:
			if l.onBulk == nil {
				return fmt.Errorf("%w: %v frame from the %v", wire.ErrMalformed, h.Type, l.peer())
			}
			of := check
			check = wire.Check{}
			if l.ctx.Err() != nil {
				continue // it no longer matters, but the peer may be waiting to get rid of it
			}
			if err := l.onBulk(h, of, r); err != nil {
				return err
			}
		case wire.TypeAck:
			if l.onAck == nil {
				return fmt.Errorf("%w: %v frame from the %v", wire.ErrMalformed, h.Type, l.peer())
			}
			if err := l.onAck(int(h.Device), int64(h.Offset)); err != nil {
				return err
			}
		case wire.TypeDemand:
			var b [8]byte
			if err := r.Payload(b[:]); err != nil {
				return err
			}
			n, err := wire.ParseDemand(b[:])
			if err != nil {
				return err
			}
			if l.onDemand == nil {
				return fmt.Errorf("%w: %v frame from the %v", wire.ErrMalformed, h.Type, l.peer())
			}
			if err := l.onDemand(int(h.Device), block.Range{Offset: int64(h.Offset), Length: n}); err != nil {
				return err
			}
		case wire.TypeAbsent:
			if l.onAbsent == nil || s.index != 0 {
				return fmt.Errorf("%w: %v frame from the %v on stream %d", wire.ErrMalformed, h.Type, l.peer(), s.index)
			}
			b := make([]byte, h.Length)
			if err := r.Payload(b); err != nil {
				return err
			}
			if err := l.onAbsent(h, b); err != nil {
				return err
			}
		default:
			if s.index != 0 {
				return fmt.Errorf("%w: %v frame, which belongs on stream 0", wire.ErrMalformed, h.Type)
			}
			m := message{Header: h, payload: make([]byte, h.Length)}
			if err := r.Payload(m.payload); err != nil {
				return err
			}
			// The state machine gets all control frames up to some point, never one after a gap.
			if l.ctx.Err() != nil {
				continue
			}
			select {
			case l.control <- m:
			case <-l.ctx.Done():
			}
		}
	}
}

func (l *link) peer() wire.Role { return l.role.Opposite() }

func (s *stream) write() {
	l := s.link
	if err := s.writeFrames(); err != nil {
		// The peer may have said why it no longer reads; that is the better error.
		t := time.NewTimer(grace)
		defer t.Stop()
		select {
		case <-s.readerDone:
		case <-t.C:
		case <-l.closing:
		}
		l.fail(fmt.Errorf("stream %d: write: %w", s.index, err))
	}
}

func (s *stream) writeFrames() error {
	l := s.link
	tick := time.NewTicker(wire.HeartbeatInterval / 2) // silent for a whole interval at most
	defer tick.Stop()
	silent := false
	var back background
	for {
		if s.index > 0 && l.aside.Load() {
			back.stepBack()
		}
		var b *wire.Buffer
		bulk := l.bulk
		if s.index == 0 && len(l.streams) > 1 && l.reserved.Load() {
			bulk = nil
		}
		select {
		case b = <-s.urgent:
		case <-l.closing:
			return s.writeLast()
		default:
			select {
			case b = <-s.urgent:
			case b = <-bulk:
			case <-tick.C:
				if !silent {
					silent = true
					continue
				}
				b = wire.NewBuffer()
				b.Append(wire.Header{Type: wire.TypeHeartbeat}, nil)
			case <-l.closing:
				return s.writeLast()
			}
		}
		silent = false
		if err := s.put(b); err != nil {
			return err
		}
	}
}

// put writes a buffer of frames and releases it.
func (s *stream) put(b *wire.Buffer) error {
	defer b.Release()
	began := time.Now()
	n, err := s.rw.Write(b.Bytes())
	ended := time.Now()
	s.link.busy.Add(int64(ended.Sub(began)))
	if c := s.link.compressor; c != nil {
		c.wrote(n, began, ended)
	}
	s.link.written.Add(int64(n))
	return err
}

// busyShare is the share of the time since then that writers spent in Write, given what busy was then.
func (l *link) busyShare(busy int64, then time.Time) float64 {
	all := time.Since(then) * time.Duration(len(l.streams))
	return min(1, float64(l.busy.Load()-busy)/float64(max(1, all)))
}

// writeLast ends our half of the stream.
func (s *stream) writeLast() error {
	for !s.link.abort {
		select {
		case b := <-s.urgent:
			if err := s.put(b); err != nil {
				return err
			}
			continue
		default:
		}
		break
	}
	if s.link.last == nil {
		return nil
	}
	n, err := s.rw.Write(s.link.last)
	s.link.written.Add(int64(n))
	return err
}

// watch fails the link when the peer is silent. It counts its own ticks rather than the time, so that a process that was
// itself stopped for a while does not blame its peer.
func (l *link) watch() {
	limit := int((l.heartbeatTimeout + wire.HeartbeatInterval - 1) / wire.HeartbeatInterval)
	quiet := make([]int, len(l.streams))
	tick := time.NewTicker(wire.HeartbeatInterval)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-l.ctx.Done():
			return
		}
		for i, s := range l.streams {
			if s.heard.Swap(false) || !s.listening.Load() || s.ended.Load() {
				quiet[i] = 0
			} else if quiet[i]++; quiet[i] >= limit {
				l.fail(tell(wire.CodeTimeout, fmt.Errorf("stream %d: no sign of life from the %v for %v: %w", i, l.peer(), l.heartbeatTimeout, os.ErrDeadlineExceeded),
					"no sign of life for %v", l.heartbeatTimeout))
				return
			}
		}
	}
}

// goodbye queues the last frame of each stream: an Abort with the reason, or a Bye. It does not wait. The link's ctx
// ends. It is called once.
func (l *link) goodbye(err error, neverRan bool) {
	var peer *PeerError
	h := wire.Header{Type: wire.TypeBye}
	var payload []byte
	if err != nil && !errors.As(err, &peer) {
		h.Type = wire.TypeAbort
		if neverRan {
			h.Flags = wire.FlagNeverRan
		}
		payload = abortFor(l.role, err).Encode()
	} else if err != nil && neverRan {
		// The peer has ended it already, but may want to know this.
		h = wire.Header{Type: wire.TypeAbort, Flags: wire.FlagNeverRan}
		payload = wire.Abort{Code: peer.Code, Reason: "discarded"}.Encode()
	}
	l.last = wire.Append(nil, h, payload)
	l.abort = h.Type == wire.TypeAbort
	if err == nil {
		err = errOver
	}
	l.fail(err)
	close(l.closing)
}

var errOver = errors.New("migration is over")

// errBye is the cause of a link's end when the other side has said all it had to say.
var errBye = fmt.Errorf("peer ended the conversation: %w", io.ErrUnexpectedEOF)

// close waits a while for the conversation to end by itself, after goodbye, and then lets go of the streams.
func (l *link) close() {
	ended := waitFor(&l.wg, linger)
	for _, s := range l.streams {
		interrupt(s.rw)
	}
	if !ended && !waitFor(&l.wg, linger) {
		// Those that could be interrupted were.
		l.log.Warn("a stream without Close or SetDeadline still blocks after the migration; its goroutines end when its owner closes it")
	}
}

// drop lets go of the streams of a link that has failed, at once: there is nobody to talk to.
func (l *link) drop(err error) {
	if l.ctx != nil {
		l.fail(err)
		l.abort = true // with nothing to say: a last word would say that all is well
		close(l.closing)
	}
	for _, s := range l.streams {
		interrupt(s.rw)
	}
	if !waitFor(&l.wg, linger) {
		l.log.Warn("a stream without Close or SetDeadline still blocks after the link failed; its goroutines end when its owner closes it")
	}
}

// part is drop, but for an error that was made for the other side to hear.
func (l *link) part(err error) {
	var t *told
	if l.ctx == nil || !errors.As(err, &t) || t.code == wire.CodeTimeout { // who let the time pass does not listen
		l.drop(err)
		return
	}
	l.goodbye(err, false)
	l.close()
}

// waitFor waits for wg, but no longer than d. It reports whether wg is done.
func waitFor(wg *sync.WaitGroup, d time.Duration) bool {
	done := make(chan struct{})
	go func() {
		wg.Wait()
		close(done)
	}()
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-done:
		return true
	case <-t.C:
		return false
	}
}
