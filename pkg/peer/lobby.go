package peer

import (
	"bytes"
	"container/list"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/drafter-vm/drafter/pkg/transport"
	"github.com/drafter-vm/drafter/pkg/wire"
)

// Arrival is a group of connections that belong together: all of one session of a migration.
type Arrival struct {
	Streams []io.ReadWriter    // in the order in which the other side numbers them
	From    net.Addr           // of the first
	Peer    transport.Identity // who has proven to be there

	// Err says why nothing can be done with it: the other side is no peer that can receive, or did not bring all streams. It
	// wraps ErrStranger, and there are no streams.
	Err error
}

// Close closes the connections.
func (a Arrival) Close() {
	for _, s := range a.Streams {
		s.(io.Closer).Close()
	}
}

// Lobby accepts connections of peers that want to receive, or of those that bring a VM, and sorts out which belong together, and which of them go on with
// a migration that was begun before. Its methods may be called concurrently.
type Lobby struct {
	listener net.Listener
	role     wire.Role // of who comes
	log      *slog.Logger
	patience time.Duration // with each connection

	// New are those who want a migration to begin, and strangers. Nobody waits there for longer than a handshake may take.
	New    chan Arrival
	rejoin chan Arrival

	ctx    context.Context
	cancel context.CancelFunc
	tasks  sync.WaitGroup

	mu     sync.Mutex // guards what follows
	groups map[uint64]*group
	guests list.List // connections that nobody has taken yet, each a *visitor, the oldest first
	full   time.Time // when it was last said that there is no room
}

// visitor is a connection in the lobby.
type visitor struct {
	at    *list.Element // in guests; nil: it has left
	evict func()        // sends it away, after it has left
}

// maxGuests is how many connections may be in the lobby at a time, as they cost descriptors.
const maxGuests = 1024

// enter lets a connection in. Who has been here for longest makes room for it: a peer says what it is, brings all its streams and is taken
// within a round trip or two, so that those who only hold places, and prove nothing, keep nobody out.
func (b *Lobby) enter(conn net.Conn) *visitor {
	b.mu.Lock()
	evict := func() {}
	if b.guests.Len() == maxGuests {
		if time.Since(b.full) > handshakeTime {
			b.full = time.Now()
			b.log.Warn("too many connections wait: those that have waited for longest are closed", "from", conn.RemoteAddr(), "waiting", maxGuests)
		}
		oldest := b.guests.Front().Value.(*visitor)
		b.leave(oldest)
		evict = oldest.evict
	}
	v := &visitor{evict: func() { conn.Close() }}
	v.at = b.guests.PushBack(v)
	b.mu.Unlock()
	evict()
	return v
}

// here reports whether a connection may stay.
func (b *Lobby) here(v *visitor) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return v.at != nil
}

// stay has visitors, if they are still here, be sent away in another way from now on. It is called with mu held.
func (b *Lobby) stay(evict func(), visitors ...*visitor) bool {
	for _, v := range visitors {
		if v.at == nil {
			return false
		}
		v.evict = evict
	}
	return true
}

// leave is enter undone. It is called with mu held.
func (b *Lobby) leave(visitors ...*visitor) {
	for _, v := range visitors {
		if v.at != nil {
			b.guests.Remove(v.at)
			v.at = nil
		}
	}
}

// group is a session of which streams are missing.
type group struct {
	streams []io.ReadWriter // nil where one is missing
	guests  []*visitor      // that they are
	missing int
	from    net.Addr
	who     transport.Identity
	purpose wire.Purpose
	late    *time.Timer
}

// handshakeTime is how long a peer may take to say what it is, and to bring all its streams.
const handshakeTime = 10 * time.Second

// NewLobby accepts connections of l until Close, which closes l. A nil logger means slog.Default().
func NewLobby(l net.Listener, log *slog.Logger) *Lobby {
	return newLobby(l, wire.RoleDestination, log, handshakeTime)
}

// NewReception is NewLobby for peers that bring a VM, by dialling and calling Send, instead of waiting for one who wants it.
func NewReception(l net.Listener, log *slog.Logger) *Lobby {
	return newLobby(l, wire.RoleSource, log, handshakeTime)
}

func newLobby(l net.Listener, role wire.Role, log *slog.Logger, patience time.Duration) *Lobby {
	if log == nil {
		log = slog.Default()
	}
	b := &Lobby{listener: l, role: role, log: log, patience: patience, New: make(chan Arrival), rejoin: make(chan Arrival), groups: make(map[uint64]*group)}
	b.ctx, b.cancel = context.WithCancel(context.Background())
	b.tasks.Go(b.accept)
	return b
}

// Close closes the listener and all connections that nobody took.
func (b *Lobby) Close() error {
	b.cancel()
	err := b.listener.Close()
	b.tasks.Wait()
	b.mu.Lock()
	defer b.mu.Unlock()
	for id, g := range b.groups {
		g.drop()
		delete(b.groups, id)
	}
	return err
}

// Addr is where the lobby listens.
func (b *Lobby) Addr() net.Addr { return b.listener.Addr() }

// Rejoin waits for the other side of a migration that was begun before. It is what migrate's Reconnect asks for.
func (b *Lobby) Rejoin(ctx context.Context) ([]io.ReadWriter, error) {
	select {
	case a := <-b.rejoin:
		return a.Streams, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	case <-b.ctx.Done():
		return nil, net.ErrClosed
	}
}

func (b *Lobby) accept() {
	pause := time.Millisecond
	for {
		conn, err := b.listener.Accept()
		if b.ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
			if err == nil {
				conn.Close()
			}
			return
		}
		if err != nil { // out of descriptors, most likely
			b.log.Error("cannot accept a connection", "error", err)
			select {
			case <-time.After(pause):
			case <-b.ctx.Done():
			}
			pause = min(2*pause, time.Second)
			continue
		}
		pause = time.Millisecond
		v := b.enter(conn)
		b.tasks.Go(func() { b.meet(conn, v) })
	}
}

// spoken is a connection of which the first bytes were read already.
type spoken struct {
	net.Conn
	first io.Reader
	who   transport.Identity
	asked bool // it is the only one who can be meant
}

// Identity is for transport.IdentityOf.
func (h *spoken) Identity() transport.Identity { return h.who }

// ChannelBinding and Visits are for migrate: see its SourceConfig.Reconnect.
func (h *spoken) ChannelBinding() []byte {
	if c, ok := h.Conn.(interface{ ChannelBinding() []byte }); ok {
		return c.ChannelBinding()
	}
	return nil
}

func (h *spoken) Visits() bool { return !h.asked }

func (h *spoken) Read(p []byte) (int, error) {
	if n, err := h.first.Read(p); n > 0 || err != io.EOF {
		return n, err
	}
	return h.Conn.Read(p)
}

// meet hears what a connection is, and brings it to its group.
func (b *Lobby) meet(conn net.Conn, v *visitor) {
	leaving := []*visitor{v} // when it returns
	defer func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.leave(leaving...)
	}()
	stop := context.AfterFunc(b.ctx, func() { conn.Close() })
	defer stop()
	ctx, cancel := context.WithTimeout(b.ctx, b.patience)
	defer cancel()
	who, err := transport.Handshake(ctx, conn)
	if err != nil {
		conn.Close()
		if b.here(v) && b.ctx.Err() == nil {
			b.log.Warn("refused a connection", "from", conn.RemoteAddr(), "reason", err)
		}
		return
	}
	_ = conn.SetDeadline(time.Now().Add(b.patience)) // where there are none, Close ends it
	var said bytes.Buffer
	p, err := wire.ReadPreface(io.TeeReader(conn, &said))
	if !b.here(v) {
		conn.Close()
		return
	}
	if err == nil && p.Role != b.role {
		err = fmt.Errorf("it is a %s: %w", p.Role, wire.ErrMalformed)
	}
	if err == nil && (p.Streams > wire.MaxStreams || p.Streams > 0 && p.Stream >= p.Streams) {
		err = fmt.Errorf("it calls itself stream %d of %d: %w", p.Stream, p.Streams, wire.ErrMalformed)
	}
	if err == nil {
		err = conn.SetDeadline(time.Time{})
	}
	if err != nil {
		// Whoever it is may learn whom it has met.
		ours := wire.Preface{Newest: wire.Version, Oldest: wire.OldestVersion, Role: b.role.Opposite()}
		_, _ = conn.Write(ours.Append(nil))
		conn.Close()
		b.hand(wire.PurposeMigrate, Arrival{From: conn.RemoteAddr(), Err: fmt.Errorf("%w: %w", ErrStranger, err)}, v)
		return
	}
	stream := &spoken{Conn: conn, first: &said, who: who}
	if !stop() { // the lobby is closed; from here on, what ends it is not the lobby's end, but who waits for it
		return
	}
	if p.Streams <= 1 { // version 1 knows not how many it has, and has one
		b.hand(p.Purpose, Arrival{Streams: []io.ReadWriter{stream}, From: conn.RemoteAddr(), Peer: who}, v)
		return
	}
	b.mu.Lock()
	g := b.groups[p.Session]
	if g == nil {
		g = &group{streams: make([]io.ReadWriter, p.Streams), missing: int(p.Streams), from: conn.RemoteAddr(), who: who, purpose: p.Purpose}
	}
	contradicts := int(p.Streams) != len(g.streams) || g.streams[p.Stream] != nil || g.purpose != p.Purpose || !g.who.Equal(who)
	if contradicts || b.ctx.Err() != nil || !b.stay(func() { b.giveUp(p.Session, g, slog.LevelDebug) }, v) {
		b.mu.Unlock()
		if contradicts {
			b.log.Warn("refused a stream that contradicts others of its session", "from", conn.RemoteAddr())
		}
		conn.Close()
		return
	}
	if g.late == nil {
		b.groups[p.Session] = g
		g.late = time.AfterFunc(b.patience, func() { b.giveUp(p.Session, g, slog.LevelWarn) })
	}
	g.streams[p.Stream] = stream
	g.guests = append(g.guests, v)
	g.missing--
	leaving = nil
	if g.missing == 0 {
		leaving = g.guests
		g.late.Stop()
		delete(b.groups, p.Session)
	}
	b.mu.Unlock()
	if leaving != nil {
		b.hand(g.purpose, Arrival{Streams: g.streams, From: g.from, Peer: g.who}, g.guests...)
	}
}

// giveUp ends a session whose streams did not all come: in time, or before many others came, of whom it is not said one by one.
func (b *Lobby) giveUp(session uint64, g *group, level slog.Level) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.groups[session] == g {
		delete(b.groups, session)
		b.leave(g.guests...)
		b.log.Log(b.ctx, level, "refused a peer that did not bring all its streams", "from", g.from, "missing", g.missing, "of", len(g.streams))
		g.drop()
	}
}

func (g *group) drop() {
	g.late.Stop()
	Arrival{Streams: g.has()}.Close()
}

func (g *group) has() (streams []io.ReadWriter) {
	for _, s := range g.streams {
		if s != nil {
			streams = append(streams, s)
		}
	}
	return streams
}

// hand gives an arrival to whoever waits for it. Who has waited in vain for as long as a handshake takes is sent away, and
// will come again. What was taken is the taker's, whatever becomes of the lobby.
func (b *Lobby) hand(purpose wire.Purpose, a Arrival, guests ...*visitor) {
	to := b.New
	if purpose == wire.PurposeRejoin {
		to = b.rejoin
	}
	ctx, evict := context.WithCancel(b.ctx)
	defer evict()
	b.mu.Lock()
	here := b.stay(evict, guests...)
	b.mu.Unlock()
	if !here {
		a.Close()
		return
	}
	t := time.NewTimer(b.patience / 2)
	defer t.Stop()
	select {
	case to <- a:
	case <-t.C:
		if to == b.rejoin { // it tries again by itself
			a.Close()
			return
		}
		refuse(a.Streams, b.role.Opposite(), wire.CodeCanceled, "this peer is busy: try again later") // who has not been asked about learns no more
	case <-ctx.Done():
		a.Close()
	}
}

// DialStreams dials n connections, which become the streams of one migration. All of them, with what dial does to make sure of the
// other side, must be there within 10 s, the time that a [Lobby] gives whoever comes to it: something that accepts connections and
// says nothing is no peer.
func DialStreams(ctx context.Context, n int, dial func(context.Context) (net.Conn, error)) ([]io.ReadWriter, error) {
	return dialStreams(ctx, n, handshakeTime, dial)
}

func dialStreams(ctx context.Context, n int, patience time.Duration, dial func(context.Context) (net.Conn, error)) ([]io.ReadWriter, error) {
	bounded, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	var streams []io.ReadWriter
	for range n {
		conn, err := dial(bounded)
		if err != nil {
			Arrival{Streams: streams}.Close()
			if bounded.Err() != nil && ctx.Err() == nil {
				err = fmt.Errorf("%w: %w within %s", err, transport.ErrNoAnswer, patience)
			}
			return nil, err
		}
		streams = append(streams, conn)
	}
	return streams, nil
}
