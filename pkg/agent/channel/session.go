package channel

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/libp2p/go-yamux/v5"
)

// Pipe carries the bytes of a channel: on the host the connection to the VMM's socket, in the guest a [Port]. Read and
// Write may be called concurrently; a write that exceeds its deadline may have written a part. Close ends both.
type Pipe interface {
	io.ReadWriteCloser
	SetWriteDeadline(time.Time) error
}

// Time limits of the layer. None is a promise to a program: they bound how long a dead other end is waited for.
const (
	controlTimeout = 500 * time.Millisecond // to write a frame other than DATA
	dataTimeout    = 10 * time.Second       // to write a DATA frame; then the session is given up
	pingInterval   = 10 * time.Second       // of silence, after which the host asks whether the guest's end lives
)

// maxStreams bounds the streams each end may have open to the other. A stream whose reader sleeps holds at most 256 KiB
// (yamux's window, which is not let grow): the memory one guest can make its host hold is the product, and is only used
// up if programs on the host accept that many connections and read none.
const maxStreams = 4096

var errGone = errors.New("session has ended")

// sender writes frames to a pipe.
type sender struct {
	pipe Pipe

	mu      sync.Mutex // orders the bytes of frames; guards buf and scratch
	buf     []byte
	scratch []byte
}

// send writes one frame. gone, if not nil, is asked once the frame's turn has come: a frame of a session that ended
// meanwhile is not written. A frame written in part is no harm: the next one begins with a delimiter.
func (s *sender) send(f frame, timeout time.Duration, gone func() bool) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	f.Version = Version
	s.buf, s.scratch = appendFrame(s.buf[:0], s.scratch, f)
	// The deadline first, then the question: who ends a session marks it, then expires the deadline.
	if err := s.pipe.SetWriteDeadline(time.Now().Add(timeout)); err != nil {
		return err
	}
	if gone != nil && gone() {
		return errGone
	}
	_, err := s.pipe.Write(s.buf)
	return err
}

// session is one life of the channel: the connection yamux runs on, between a HELLO and whatever ends it.
type session struct {
	nonce uint64
	out   *sender
	mux   *yamux.Session
	seq   uint32 // of the next DATA frame out; only yamux's sending goroutine writes
	next  uint32 // expected of the next DATA frame in; only the goroutine that calls deliver

	mu     sync.Mutex // guards in and closed
	wake   sync.Cond  // in or closed changed
	in     bytes.Buffer
	closed bool
}

// maxInbound is how much may wait for yamux, which takes it at once unless it cannot send.
const maxInbound = 256 << 10

// newSession starts a session. The host's end is yamux's client.
func newSession(nonce uint64, out *sender, host bool, logs io.Writer) (*session, error) {
	s := &session{nonce: nonce, out: out}
	s.wake.L = &s.mu
	cfg := yamux.DefaultConfig()
	cfg.LogOutput = logs
	cfg.ConnectionWriteTimeout = dataTimeout
	cfg.MaxIncomingStreams = maxStreams
	cfg.MaxStreamWindowSize = cfg.InitialStreamWindowSize
	cfg.MaxMessageSize = MaxPayload // one message, one frame
	cfg.ReadBufSize = MaxPayload
	cfg.MeasureRTTInterval = 24 * time.Hour // only of use to windows that grow
	// The host asks, the guest need not: it sees by the port when the host's end goes, and its clock stops with it.
	cfg.EnableKeepAlive = host
	cfg.KeepAliveInterval = pingInterval
	start := yamux.Server
	if host {
		start = yamux.Client
	}
	var err error
	if s.mux, err = start(s, cfg, nil); err != nil {
		return nil, fmt.Errorf("start yamux: %w", err)
	}
	return s, nil
}

// deliver hands the payload of a DATA frame to the session. An error means that the session cannot go on.
func (s *session) deliver(f frame) error {
	if f.Seq != s.next {
		return fmt.Errorf("frame %d is missing, got %d", s.next, f.Seq)
	}
	s.next++
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.in.Len() > maxInbound && !s.closed {
		s.wake.Wait()
	}
	if s.closed {
		return errGone
	}
	s.in.Write(f.Payload)
	s.wake.Broadcast()
	return nil
}

// end resets all streams and waits until nothing of the session writes to the pipe any more.
func (s *session) end() {
	s.Close()
	s.mux.Close()
}

// ended is closed once the session is over.
func (s *session) ended() <-chan struct{} { return s.mux.CloseChan() }

// The rest is the net.Conn that yamux needs.

func (s *session) Read(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.in.Len() == 0 && !s.closed {
		s.wake.Wait()
	}
	if s.closed {
		return 0, io.EOF
	}
	n, _ := s.in.Read(p)
	s.wake.Broadcast()
	return n, nil
}

func (s *session) Write(p []byte) (n int, err error) {
	for n < len(p) {
		chunk := p[n:min(n+MaxPayload, len(p))]
		f := frame{Type: frameData, Nonce: s.nonce, Seq: s.seq, Payload: chunk}
		if err := s.out.send(f, dataTimeout, s.isClosed); err != nil {
			return n, err
		}
		s.seq++
		n += len(chunk)
	}
	return n, nil
}

// Close stops reads, and the write under way, at once.
func (s *session) Close() error {
	s.mu.Lock()
	first := !s.closed
	s.closed = true
	s.wake.Broadcast()
	s.mu.Unlock()
	if first {
		s.out.pipe.SetWriteDeadline(time.Unix(1, 0))
	}
	return nil
}

func (s *session) isClosed() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.closed
}

func (s *session) LocalAddr() net.Addr              { return address{} }
func (s *session) RemoteAddr() net.Addr             { return address{} }
func (s *session) SetDeadline(time.Time) error      { return nil } // send has its own
func (s *session) SetReadDeadline(time.Time) error  { return nil }
func (s *session) SetWriteDeadline(time.Time) error { return nil }

type address struct{}

func (address) Network() string { return "channel" }
func (address) String() string  { return "channel" }

var _ net.Conn = (*session)(nil)
