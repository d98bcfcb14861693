package flow

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	handshakeTime = 5 * time.Second
	pingEvery     = 3 * time.Second
	silence       = 4 * pingEvery // after that a session is dead
	answerTime    = 5 * time.Second

	// maxHeld bounds what waits for the guest to arrive, in bytes for each tunnel. More is lost, as in a full queue.
	maxHeld = 4 << 20
)

// maxAsked bounds how many messages of a place are answered at a time.
const maxAsked = 16

// tunnel is the way to another place: an interface, and at most one session at a time. Without one, what goes into the interface is lost.
type tunnel struct {
	place uint32
	file  *os.File // of the interface
	log   *slog.Logger
	hear  func(*tunnel, message) message // answers; called by a goroutine of its own for each message
	down  func()                         // called when there is no session any more

	// guestThere: the guest is at that place, and not about to leave it: what comes from there for the guest was on its way here when that was
	// given up. It would only go back, be taken for a connection that begins, and be answered with a reset.
	guestThere atomic.Bool
	guests     []netip.Addr

	turn  <-chan struct{} // closed when what was to be done with the place has been; nil: nothing was. Guarded by Keeper.mu
	tasks sync.WaitGroup
	asked chan struct{} // a place for each message that is being answered

	mu      sync.Mutex // guards what follows
	session *session   // nil: none
	joined  chan struct{}
	holding bool     // packets for the guest wait
	held    [][]byte // packets that wait
	size    int      // of held, in bytes
	lost    int      // packets that found no room there
	closed  bool
}

// newTunnel begins to carry what comes out of an interface.
func newTunnel(place uint32, file *os.File, guests []netip.Addr, log *slog.Logger, hear func(*tunnel, message) message, down func()) *tunnel {
	t := &tunnel{place: place, file: file, guests: guests, log: log.With("place", place), hear: hear, down: down, asked: make(chan struct{}, maxAsked), joined: make(chan struct{})}
	t.tasks.Go(t.pump)
	return t
}

// close ends the tunnel; wait waits for what runs in it, which may be held up by whoever holds Keeper.step. The interface stays.
func (t *tunnel) close() {
	t.mu.Lock()
	t.closed = true
	s := t.session
	t.session = nil
	t.mu.Unlock()
	if s != nil {
		s.close()
	}
	t.file.Close()
}

func (t *tunnel) wait() { t.tasks.Wait() }

// batch is how many bytes are taken from an interface at a time.
const batch = 4 * maxFrame

// pump carries packets from the interface to the session.
func (t *tunnel) pump() {
	raw, err := t.file.SyscallConn()
	if err != nil {
		return
	}
	b := make([]byte, 0, batch)
	for {
		b = b[:0]
		err := raw.Read(func(fd uintptr) bool {
			for cap(b)-len(b) > frameHeader+maxFrame {
				n, err := syscall.Read(int(fd), b[len(b)+frameHeader:len(b)+frameHeader+maxFrame])
				if err == syscall.EINTR {
					continue
				}
				if err != nil || n <= 0 {
					break
				}
				at := len(b)
				b = b[:at+frameHeader+n]
				copy(b[at:], appendFrame(nil, framePacket, nil))
				b[at+1], b[at+2], b[at+3] = byte(n>>16), byte(n>>8), byte(n)
			}
			return len(b) > 0
		})
		if err != nil {
			return // closed
		}
		if s := t.present(); s != nil {
			_ = s.write(b) // its reader notices what ails it
		}
	}
}

func (t *tunnel) present() *session {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.session
}

// up reports whether there is a session.
func (t *tunnel) up() bool { return t.present() != nil }

// await waits for a session.
func (t *tunnel) await(ctx context.Context) error {
	for {
		t.mu.Lock()
		s, joined := t.session, t.joined
		t.mu.Unlock()
		if s != nil {
			return nil
		}
		select {
		case <-joined:
		case <-ctx.Done():
			return fmt.Errorf("no connection with place %d: %w", t.place, context.Cause(ctx))
		}
	}
}

// join makes a connection, whose other end has proven to be the place, the session, instead of what was there before.
func (t *tunnel) join(conn net.Conn, r *bufio.Reader) {
	s := &session{conn: conn, answers: make(map[uint64]chan message), ended: make(chan struct{})}
	t.mu.Lock()
	if t.closed {
		t.mu.Unlock()
		conn.Close()
		return
	}
	before := t.session
	t.session = s
	close(t.joined)
	t.joined = make(chan struct{})
	t.tasks.Go(func() { t.serve(s, r) })
	t.tasks.Go(s.ping)
	t.mu.Unlock()
	if before != nil {
		before.close()
	}
}

// serve takes in what comes by a session.
func (t *tunnel) serve(s *session, r *bufio.Reader) {
	err := t.read(s, r)
	s.close()
	t.mu.Lock()
	down := t.session == s
	if down {
		t.session = nil
	}
	closed := t.closed
	t.mu.Unlock()
	if closed {
		return
	}
	t.log.Debug("the tunnel to another place is down", "error", err)
	if down {
		t.down()
	}
}

func (t *tunnel) read(s *session, r *bufio.Reader) error {
	b := make([]byte, maxFrame)
	for {
		if err := s.conn.SetReadDeadline(time.Now().Add(silence)); err != nil {
			return err
		}
		kind, payload, err := readFrame(r, b)
		if err != nil {
			return err
		}
		switch kind {
		case framePacket:
			t.deliver(payload)
		case frameSay:
			var m message
			if err := json.Unmarshal(payload, &m); err != nil {
				return fmt.Errorf("%w: %w", errMalformed, err)
			}
			if m.Answer {
				s.answered(m)
			} else {
				t.asked <- struct{}{}
				t.tasks.Go(func() {
					defer func() { <-t.asked }()
					answer := t.hear(t, m)
					answer.Number, answer.Answer = m.Number, true
					_ = s.say(answer)
				})
			}
		}
	}
}

// deliver brings a packet to the namespace, or keeps it for when the guest is there.
func (t *tunnel) deliver(packet []byte) {
	t.mu.Lock()
	defer t.mu.Unlock() // so that none overtakes those that are released
	if t.guestThere.Load() && slices.Contains(t.guests, destination(packet)) {
		return
	}
	if t.holding && slices.Contains(t.guests, destination(packet)) {
		if t.size+len(packet) > maxHeld {
			t.lost++
			return
		}
		t.size += len(packet)
		t.held = append(t.held, append([]byte(nil), packet...))
		return
	}
	t.write(packet)
}

// write gives a packet to the kernel, which refuses what is none.
func (t *tunnel) write(packet []byte) { _, _ = t.file.Write(packet) }

// destination is where a packet goes; the zero address, if it is none.
func destination(packet []byte) netip.Addr {
	const header = 10 // of virtio-net
	if len(packet) < header+20 {
		return netip.Addr{}
	}
	switch ip := packet[header:]; {
	case ip[0]>>4 == 4:
		return netip.AddrFrom4([4]byte(ip[16:]))
	case ip[0]>>4 == 6 && len(ip) >= 40:
		return netip.AddrFrom16([16]byte(ip[24:]))
	}
	return netip.Addr{}
}

// hold keeps packets for the guest from now on.
func (t *tunnel) hold() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.holding = true
}

// release delivers what was kept, or drops it, and keeps nothing any more. It returns how many packets found no room.
func (t *tunnel) release(deliver bool) (lost int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if deliver {
		for _, p := range t.held {
			t.write(p)
		}
	}
	lost = t.lost
	t.held, t.size, t.lost, t.holding = nil, 0, 0, false
	return lost
}

// errDown is returned where there is no session.
var errDown = errors.New("there is no connection with that place now")

// ask says something, and waits for the answer.
func (t *tunnel) ask(ctx context.Context, m message) (message, error) {
	s := t.present()
	if s == nil {
		return message{}, fmt.Errorf("%s: place %d: %w", m.Say, t.place, errDown)
	}
	ctx, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	answer, err := s.ask(ctx, m, t.run)
	if err == nil && answer.Error != "" {
		err = fmt.Errorf("it answers: %s", answer.Error)
	}
	if err != nil {
		return message{}, fmt.Errorf("%s: place %d: %w", m.Say, t.place, err)
	}
	return answer, nil
}

// run has f run as a task of the tunnel, unless it is closed.
func (t *tunnel) run(f func()) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.closed {
		t.tasks.Go(f)
	}
	return !t.closed
}

// session is a connection that has proven to be with a place.
type session struct {
	conn  net.Conn
	ended chan struct{}

	writing sync.Mutex // one frame, or batch of frames, at a time

	mu      sync.Mutex // guards what follows
	number  uint64
	answers map[uint64]chan message
	closed  bool
}

func (s *session) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed {
		s.closed = true
		s.conn.Close()
		close(s.ended)
	}
}

func (s *session) write(b []byte) error {
	s.writing.Lock()
	defer s.writing.Unlock()
	_ = s.conn.SetWriteDeadline(time.Now().Add(silence)) // where there are none, the silence of the other side ends it
	_, err := s.conn.Write(b)
	return err
}

func (s *session) say(m message) error {
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	return s.write(appendFrame(nil, frameSay, b))
}

// ask says something by a task, as what is written before it may take longer than ctx lasts.
func (s *session) ask(ctx context.Context, m message, run func(func()) bool) (message, error) {
	answer := make(chan message, 1)
	s.mu.Lock()
	s.number++
	m.Number = s.number
	s.answers[m.Number] = answer
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.answers, m.Number)
	}()
	failed := make(chan error, 1)
	if !run(func() {
		if err := s.say(m); err != nil {
			failed <- err
		}
	}) {
		return message{}, errDown
	}
	select {
	case err := <-failed:
		return message{}, err
	case a := <-answer:
		return a, nil
	case <-s.ended:
		return message{}, errDown
	case <-ctx.Done():
		return message{}, context.Cause(ctx)
	}
}

func (s *session) answered(m message) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c := s.answers[m.Number]; c != nil {
		select {
		case c <- m:
		default: // answered twice
		}
	}
}

// ping says that we are there, for a link that dies without a word.
func (s *session) ping() {
	tick := time.NewTicker(pingEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			if s.write(appendFrame(nil, framePing, nil)) != nil {
				s.close()
				return
			}
		case <-s.ended:
			return
		}
	}
}

// greet is the handshake of the side that has dialled.
func greet(conn net.Conn, vm, key string, from, to uint32) (*bufio.Reader, error) {
	_ = conn.SetDeadline(time.Now().Add(handshakeTime))
	defer conn.SetDeadline(time.Time{})
	r := bufio.NewReaderSize(conn, batch)
	ours := hello{Hello: helloText, VM: vm, From: from, To: to, Nonce: nonce()}
	if err := sayJSON(conn, ours); err != nil {
		return nil, err
	}
	var theirs struct {
		hello
		proof
		Error string `json:"error"`
	}
	if err := hearJSON(r, &theirs); err != nil {
		return nil, err
	}
	switch {
	case theirs.Error != "":
		return nil, fmt.Errorf("it answers: %s", theirs.Error)
	case theirs.hello.Hello != helloText:
		return nil, fmt.Errorf("it speaks %q, not %q", theirs.hello.Hello, helloText)
	case !proves(theirs.Proof, key, to, from, ours.Nonce, theirs.Nonce):
		return nil, errors.New("it has not proven to be a place of this VM")
	}
	return r, sayJSON(conn, proof{prove(key, from, to, theirs.Nonce, ours.Nonce)})
}

// welcome is the handshake of the side that was dialled. find says what key a VM has here.
func welcome(conn net.Conn, find func(vm string, from, to uint32) (key string, err error)) (from uint32, r *bufio.Reader, err error) {
	_ = conn.SetDeadline(time.Now().Add(handshakeTime))
	defer conn.SetDeadline(time.Time{})
	r = bufio.NewReaderSize(conn, batch)
	var theirs hello
	if err := hearJSON(r, &theirs); err != nil {
		return 0, nil, err
	}
	if theirs.Hello != helloText {
		return 0, nil, fmt.Errorf("it speaks %q, not %q", theirs.Hello, helloText)
	}
	key, err := find(theirs.VM, theirs.From, theirs.To)
	if err != nil {
		_ = sayJSON(conn, map[string]string{"error": err.Error()})
		return 0, nil, err
	}
	ours := struct {
		hello
		proof
	}{hello: hello{Hello: helloText, VM: theirs.VM, From: theirs.To, To: theirs.From, Nonce: nonce()}}
	ours.Proof = prove(key, theirs.To, theirs.From, theirs.Nonce, ours.Nonce)
	if err := sayJSON(conn, ours); err != nil {
		return 0, nil, err
	}
	var p proof
	if err := hearJSON(r, &p); err != nil {
		return 0, nil, err
	}
	if !proves(p.Proof, key, theirs.From, theirs.To, ours.Nonce, theirs.Nonce) {
		return 0, nil, errors.New("it has not proven to be a place of this VM")
	}
	return theirs.From, r, nil
}
