package channel

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/libp2p/go-yamux/v5"

	"github.com/drafter-vm/drafter/pkg/agent/socket"
)

const (
	// requestTimeout is how long a program may take to send its CONNECT line.
	requestTimeout = 30 * time.Second
	// connectTimeout is how long a request waits for a session, and for the other end's answer.
	connectTimeout = 10 * time.Second
	// firstPort is the first port number assigned to a dialling program, as Firecracker numbers them.
	firstPort = 1 << 30
)

// endpoint is what the two ends have in common: a unix socket for the programs on this side, whose requests become
// streams of the present session, and the streams of the other side, which become connections to this side's programs.
type endpoint struct {
	path     string
	listener *net.UnixListener
	logger   *slog.Logger

	ctx    context.Context // of everything below; done once close begins
	cancel context.CancelFunc
	wg     sync.WaitGroup // every goroutine of the endpoint
	ports  atomic.Uint32  // assigned so far

	mu      sync.Mutex // guards session and changed
	session *session   // nil while there is none
	changed chan struct{}
}

func newEndpoint(path string, mode fs.FileMode, logger *slog.Logger) (*endpoint, error) {
	ln, err := socket.ListenUnix(path, mode)
	if err != nil {
		return nil, fmt.Errorf("offer guest sockets: %w", err)
	}
	e := &endpoint{path: path, listener: ln, logger: logger, changed: make(chan struct{})}
	e.ctx, e.cancel = context.WithCancel(context.Background())
	e.wg.Go(e.accept)
	return e, nil
}

// close resets everything, removes the socket and waits for every goroutine.
func (e *endpoint) close() {
	e.cancel()
	e.listener.Close()
	if s := e.swap(nil); s != nil {
		s.end()
	}
	e.wg.Wait()
}

// swap makes s the present session and returns the one before, which the caller ends.
func (e *endpoint) swap(s *session) *session {
	e.mu.Lock()
	defer e.mu.Unlock()
	old := e.session
	e.session = s
	close(e.changed)
	e.changed = make(chan struct{})
	if s != nil {
		e.wg.Go(func() { e.serve(s) })
	}
	return old
}

// current returns the present session once there is one.
func (e *endpoint) current(ctx context.Context) (*session, error) {
	for {
		e.mu.Lock()
		s, changed := e.session, e.changed
		e.mu.Unlock()
		if s != nil {
			return s, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-e.ctx.Done():
			return nil, net.ErrClosed
		}
	}
}

// accept takes the connections of this side's programs.
func (e *endpoint) accept() {
	pause := time.Millisecond
	for {
		conn, err := e.listener.AcceptUnix()
		switch {
		case err == nil:
			pause = time.Millisecond
			e.wg.Go(func() { e.dialOther(conn) })
		case errors.Is(err, net.ErrClosed):
			return
		default: // too many open files: programs wait in the backlog meanwhile
			e.logger.Warn("accept guest socket connection", "socket", e.path, "error", err)
			select {
			case <-time.After(pause):
			case <-e.ctx.Done():
			}
			pause = min(2*pause, time.Second)
		}
	}
}

// dialOther connects a program of this side with one of the other.
func (e *endpoint) dialOther(conn *net.UnixConn) {
	defer conn.Close()
	// Close ends whatever conn is waiting for.
	defer context.AfterFunc(e.ctx, func() { conn.Close() })()

	conn.SetReadDeadline(time.Now().Add(requestTimeout))
	port, err := socket.ReadRequest(conn)
	if err != nil {
		if !errors.Is(err, io.EOF) && e.ctx.Err() == nil {
			e.logger.Warn("refuse guest socket request", "socket", e.path, "error", err)
		}
		return
	}
	conn.SetReadDeadline(time.Time{})

	ctx, cancel := context.WithTimeoutCause(e.ctx, connectTimeout, fmt.Errorf("no answer within %v", connectTimeout))
	defer cancel()
	stream, err := e.open(ctx, port)
	if err != nil {
		e.logger.Debug("guest socket request failed", "socket", e.path, "port", port, "error", err)
		return
	}
	if err := socket.WriteReply(conn, firstPort|e.ports.Add(1)&(firstPort-1)); err != nil {
		stream.Reset()
		return
	}
	splice(conn, stream)
}

// open opens a stream to a port of the other side.
func (e *endpoint) open(ctx context.Context, port uint32) (*yamux.Stream, error) {
	s, err := e.current(ctx)
	if err != nil {
		return nil, err
	}
	stream, err := s.mux.OpenStream(ctx)
	if err != nil {
		return nil, err
	}
	deadline, _ := ctx.Deadline()
	stream.SetDeadline(deadline)
	if err = socket.WriteRequest(stream, port); err == nil {
		_, err = socket.ReadReply(stream)
	}
	if err != nil {
		stream.Reset()
		return nil, err
	}
	stream.SetDeadline(time.Time{})
	return stream, nil
}

// serve takes the streams the other side opens, until the session ends.
func (e *endpoint) serve(s *session) {
	for {
		stream, err := s.mux.AcceptStream()
		if err != nil {
			return
		}
		e.wg.Go(func() { e.dialHere(stream) })
	}
}

// dialHere connects a program of the other side with one of this.
func (e *endpoint) dialHere(stream *yamux.Stream) {
	stream.SetDeadline(time.Now().Add(connectTimeout))
	port, err := socket.ReadRequest(stream)
	if err != nil {
		stream.Reset()
		return
	}
	ctx, cancel := context.WithTimeout(e.ctx, connectTimeout)
	defer cancel()
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", socket.PortPath(e.path, port))
	if err != nil {
		e.logger.Debug("nobody listens for a guest socket request", "port", port, "error", err)
		stream.Reset()
		return
	}
	defer conn.Close()
	if err := socket.WriteReply(stream, port); err != nil {
		stream.Reset()
		return
	}
	stream.SetDeadline(time.Time{})
	defer context.AfterFunc(e.ctx, func() { conn.Close() })()
	splice(conn.(*net.UnixConn), stream)
}

// splice copies both ways until both directions have ended, or either fails: an end of file is passed on as such, an
// error ends both directions on both sides.
func splice(conn *net.UnixConn, stream *yamux.Stream) {
	abort := func() {
		stream.Reset()
		conn.Close()
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := io.Copy(conn, stream); err != nil {
			abort()
			return
		}
		conn.CloseWrite()
	})
	_, err := io.Copy(stream, conn)
	if err == nil {
		err = stream.CloseWrite()
	}
	if err != nil {
		abort()
	}
	wg.Wait()
	conn.Close()
	stream.Close()
}

// newNonce is a session's number. It is never 0.
func newNonce() uint64 {
	for {
		var b [8]byte
		rand.Read(b[:]) // never fails
		if n := binary.BigEndian.Uint64(b[:]); n != 0 {
			return n
		}
	}
}

// muxLog passes yamux's complaints on. It has no levels of its own that matter here.
type muxLog struct{ logger *slog.Logger }

func (l muxLog) Write(p []byte) (int, error) {
	l.logger.Debug("yamux", "text", string(bytes.TrimSpace(p)))
	return len(p), nil
}
