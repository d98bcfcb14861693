package service

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/drafter-vm/drafter/pkg/agent/internal/serve"
	"github.com/drafter-vm/drafter/pkg/agent/socket"
)

// ErrUnknown is wrapped by the error of a call whose connection ended, or whose time was over, before it was answered: it may have
// been executed, or be executed still.
var ErrUnknown = errors.New("outcome of the call is unknown")

// Config is one side's part of a service.
type Config struct {
	// Port of the host, which the guest dials. Ports 25 and 26 are the liveness's and the agent's, if they are not configured
	// otherwise.
	Port uint32

	// Name of what the two sides agree on: at most 64 bytes.
	Name string

	// Version is the newest version that this side speaks, Oldest the oldest. Default: 1, and Version.
	Version, Oldest int

	// Register registers what this side serves. Nil: nothing.
	Register func(*ttrpc.Server)

	// Calls is how many calls of the other side are executed at a time. Default: 256.
	Calls int

	// Timeout bounds a call whose context has no deadline. Default: one minute.
	Timeout time.Duration

	// Dial connects the guest to the host; nil means [socket.Dial].
	Dial func(ctx context.Context, port uint32) (net.Conn, error)

	// Logger receives events; nil means slog.Default().
	Logger *slog.Logger
}

func (c Config) withDefaults() (Config, error) {
	if c.Version == 0 {
		c.Version = 1
	}
	if c.Oldest == 0 {
		c.Oldest = c.Version
	}
	if c.Calls == 0 {
		c.Calls = 256
	}
	if c.Timeout == 0 {
		c.Timeout = time.Minute
	}
	if c.Dial == nil {
		c.Dial = socket.Dial
	}
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	c.Logger = c.Logger.With("service", c.Name)
	switch {
	case c.Port == 0:
		return c, errors.New("no port: set Config.Port")
	case c.Name == "" || len(c.Name) > maxName:
		return c, fmt.Errorf("name %q: give one of 1 to %d bytes", c.Name, maxName)
	case c.Oldest < 1 || c.Version < c.Oldest:
		return c, fmt.Errorf("versions %d to %d: the oldest is at least 1, and no newer than the newest", c.Oldest, c.Version)
	case c.Calls < 0:
		return c, fmt.Errorf("%d calls: give at least one, or 0 for the default", c.Calls)
	case c.Timeout < 0:
		return c, fmt.Errorf("timeout %v is negative", c.Timeout)
	}
	return c, nil
}

const (
	maxName  = 64
	maxHello = 1024 // bytes, with its newline

	// introduction is how long a hello may take to be answered.
	introduction = 10 * time.Second

	// refusals is how many calls may wait to be answered beyond those that are executed: it has to be told to somebody that there are
	// too many.
	refusals = 64

	// lasting is how long a connection must last for the next to be made at once: of two that displace each other neither does.
	lasting = time.Second

	// complaint is how often it is logged that the other side is refused, at most.
	complaint = time.Minute

	// stuck is how long a call may take to return once its context is done, before its connection is ended for that.
	stuck = time.Second
)

// hello is the line by which each side begins a connection, the guest first.
type hello struct {
	Service string `json:"service"`
	Version int    `json:"version"`
	Oldest  int    `json:"oldest"`

	Calls bool   `json:"calls,omitempty"` // of a guest's: on this connection the guest calls, and the host serves
	Error string `json:"error,omitempty"` // of a host's: why it ends the connection
}

// agree returns the newest version of which both know.
func (c Config) agree(h hello) (int, error) {
	version := min(c.Version, h.Version)
	switch {
	case h.Service != c.Name:
		return 0, fmt.Errorf("the other side speaks of service %.64q, this one of %q", h.Service, c.Name)
	case h.Oldest < 1 || version < c.Oldest || version < h.Oldest:
		return 0, fmt.Errorf("service %q: the other side speaks versions %d to %d, this one %d to %d", c.Name, h.Oldest, h.Version, c.Oldest, c.Version)
	}
	return version, nil
}

func (c Config) hello() hello { return hello{Service: c.Name, Version: c.Version, Oldest: c.Oldest} }

func writeHello(conn net.Conn, h hello) error {
	b, err := json.Marshal(h)
	if err == nil {
		_, err = conn.Write(append(b, '\n'))
	}
	return err
}

// readHello reads a line, and not one byte more than the reader buffers.
func readHello(r *bufio.Reader) (h hello, err error) {
	line, err := r.ReadSlice('\n')
	if errors.Is(err, bufio.ErrBufferFull) {
		return h, fmt.Errorf("the other side begins with a line of more than %d bytes", maxHello)
	}
	if err == nil {
		err = json.Unmarshal(line, &h)
	}
	return h, err
}

// Endpoint is one side of a service. Its methods may be called by any goroutine.
type Endpoint struct {
	cfg      Config
	listener net.Listener  // of a host; nil: a guest
	server   *ttrpc.Server // of all connections on which this side serves
	places   chan struct{} // for calls that are executed
	ctx      context.Context
	cancel   context.CancelFunc
	wg       sync.WaitGroup // everything that goes on

	mu      sync.Mutex    // guards what follows
	link    *link         // by which this side calls; nil: none
	changed chan struct{} // closed and replaced when there is another
	serving net.Conn      // by which a host serves
	refused error         // why there is none, as far as is known
	told    time.Time     // when that was logged
}

// link is a connection by which this side calls.
type link struct {
	conn    net.Conn
	client  *ttrpc.Client
	version int
}

// ListenHost offers a service to the guest whose folder is vmPath. It must be called before the guest is to find it; a guest that does
// not tries again. The caller must Close the endpoint.
func ListenHost(vmPath string, cfg Config) (*Endpoint, error) {
	e, err := newEndpoint(cfg)
	if err != nil {
		return nil, fmt.Errorf("offer service: %w", err)
	}
	if e.listener, err = socket.ListenHost(vmPath, e.cfg.Port); err != nil {
		e.cancel()
		return nil, fmt.Errorf("offer service %q: %w", e.cfg.Name, err)
	}
	e.wg.Go(e.accept)
	return e, nil
}

// StartGuest connects to the service of the host, from inside a guest, whenever it is there. The caller must Close the endpoint.
func StartGuest(cfg Config) (*Endpoint, error) {
	e, err := newEndpoint(cfg)
	if err != nil {
		return nil, fmt.Errorf("connect to service: %w", err)
	}
	e.wg.Go(func() { e.dial(true) })
	if e.cfg.Register != nil {
		e.wg.Go(func() { e.dial(false) })
	}
	return e, nil
}

func newEndpoint(cfg Config) (*Endpoint, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	e := &Endpoint{cfg: cfg, changed: make(chan struct{})}
	e.places = make(chan struct{}, e.cfg.Calls)
	if e.server, err = ttrpc.NewServer(ttrpc.WithUnaryServerInterceptor(e.execute)); err != nil {
		return nil, err
	}
	if cfg.Register != nil {
		cfg.Register(e.server)
	}
	e.ctx, e.cancel = context.WithCancel(context.Background())
	return e, nil
}

// execute executes a call of the other side: no longer than Config.Timeout if that side gave no deadline, and with no more than Config.Calls
// in all.
func (e *Endpoint) execute(ctx context.Context, unmarshal ttrpc.Unmarshaler, _ *ttrpc.UnaryServerInfo, method ttrpc.Method) (any, error) {
	select {
	case e.places <- struct{}{}:
		defer func() { <-e.places }()
	default:
		return nil, status.Errorf(codes.ResourceExhausted, "service %q: %d calls are being executed, the most there may be at a time: call again later", e.cfg.Name, e.cfg.Calls)
	}
	e.mu.Lock()
	closed := e.ctx.Err() != nil
	if !closed {
		e.wg.Add(1)
	}
	e.mu.Unlock()
	if closed {
		return nil, status.Error(codes.Unavailable, "the service is closed")
	}
	defer e.wg.Done()
	ctx, cancel := e.limit(ctx)
	defer cancel()
	defer context.AfterFunc(e.ctx, cancel)()
	return method(ctx, unmarshal)
}

// Close ends all connections and waits for everything that goes on: calls of this side fail, and those of the other side that are being
// executed see the end of their contexts. It is idempotent.
func (e *Endpoint) Close() error {
	e.mu.Lock()
	e.cancel()
	e.mu.Unlock()
	if e.listener != nil {
		e.listener.Close()
	}
	e.wg.Wait()
	return e.server.Close()
}

// Wait waits until the other side can be called, and returns the version agreed on. It fails when ctx is done, with the reason why
// the other side was refused if there is one.
func (e *Endpoint) Wait(ctx context.Context) (version int, err error) {
	l, err := e.current(ctx)
	if err != nil {
		return 0, fmt.Errorf("service %q: %w", e.cfg.Name, err)
	}
	return l.version, nil
}

// Call has f call the other side, once there is a connection. What f returns is returned as it is, a ttrpc status among that, unless
// the connection ends or the time is over first: then the error wraps ErrUnknown if anything was sent. f must use the context that it
// is given, and return its errors.
func (e *Endpoint) Call(ctx context.Context, f func(context.Context, *ttrpc.Client) error) error {
	ctx, cancel := e.limit(ctx)
	defer cancel()
	err, _ := e.call(ctx, f)
	return err
}

// Retry is Call for what may be executed more than once: it is repeated on the next connection when one ends before the answer.
func (e *Endpoint) Retry(ctx context.Context, f func(context.Context, *ttrpc.Client) error) error {
	ctx, cancel := e.limit(ctx)
	defer cancel()
	for lost := error(nil); ; {
		err, cut := e.call(ctx, f)
		switch {
		case cut && ctx.Err() == nil && e.ctx.Err() == nil:
			lost = err
		case err == nil || lost == nil || status.Code(err) != codes.Unknown || errors.Is(err, ErrUnknown):
			return err // an answer, or what the attempts before did not change
		default:
			return fmt.Errorf("%w (before: %w)", err, lost)
		}
	}
}

func (e *Endpoint) limit(ctx context.Context) (context.Context, context.CancelFunc) {
	if _, ok := ctx.Deadline(); ok {
		return context.WithCancel(ctx)
	}
	return context.WithTimeoutCause(ctx, e.cfg.Timeout, fmt.Errorf("no answer within %v", e.cfg.Timeout))
}

// call is one attempt. cut says that the connection ended before the answer.
func (e *Endpoint) call(ctx context.Context, f func(context.Context, *ttrpc.Client) error) (err error, cut bool) {
	l, err := e.current(ctx)
	if err != nil {
		return fmt.Errorf("service %q: %w", e.cfg.Name, err), false
	}
	returned := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		select {
		case <-returned:
		case <-time.After(stuck): // a write to who does not read ends with the connection only
			l.conn.Close()
		}
	})
	err = f(ctx, l.client)
	close(returned)
	stop()
	switch {
	case err == nil:
		return nil, false
	case ctx.Err() != nil:
		return fmt.Errorf("service %q: %w: %w", e.cfg.Name, ErrUnknown, context.Cause(ctx)), false
	case severed(err):
		e.drop(l)
		return fmt.Errorf("service %q: %w: %w", e.cfg.Name, ErrUnknown, err), true
	}
	return err, false
}

// severed reports whether err is of a connection, not of a call.
func severed(err error) bool {
	for _, is := range []error{ttrpc.ErrClosed, ttrpc.ErrStreamClosed, io.EOF, io.ErrUnexpectedEOF, io.ErrClosedPipe, net.ErrClosed, ttrpc.ErrProtocol, ttrpc.ErrStreamFull,
		syscall.EPIPE, syscall.ECONNRESET, syscall.ENOTCONN, syscall.ETIMEDOUT, syscall.ECONNABORTED} {
		if errors.Is(err, is) {
			return true
		}
	}
	return false
}

// current returns the connection by which this side calls, once there is one.
func (e *Endpoint) current(ctx context.Context) (*link, error) {
	for {
		e.mu.Lock()
		l, changed := e.link, e.changed
		e.mu.Unlock()
		if l != nil {
			return l, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			e.mu.Lock()
			refused := e.refused
			e.mu.Unlock()
			if refused != nil {
				return nil, fmt.Errorf("%w (%w)", refused, context.Cause(ctx))
			}
			return nil, fmt.Errorf("the other side is not connected: %w", context.Cause(ctx))
		case <-e.ctx.Done():
			return nil, net.ErrClosed
		}
	}
}

// drop forgets l if it is the present one.
func (e *Endpoint) drop(l *link) {
	l.conn.Close()
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.link == l {
		e.link = nil
	}
}

// refuse notes why a connection came to nothing.
func (e *Endpoint) refuse(err error) {
	e.mu.Lock()
	e.refused = err
	again := time.Since(e.told) >= complaint
	if again {
		e.told = time.Now()
	}
	e.mu.Unlock()
	if again {
		e.cfg.Logger.Warn("a service cannot be used", "error", err)
	}
}

// calling has this side call by a connection, until it ends.
func (e *Endpoint) calling(conn net.Conn, version int) {
	gone := make(chan struct{})
	client := ttrpc.NewClient(serve.Answers(conn), ttrpc.WithOnClose(func() { close(gone) }))
	defer client.Close()
	l := &link{conn, client, version}
	e.mu.Lock()
	old := e.link
	e.link, e.refused = l, nil
	close(e.changed)
	e.changed = make(chan struct{})
	e.mu.Unlock()
	if old != nil {
		old.conn.Close() // the newest counts
	}
	e.cfg.Logger.Debug("service connected", "version", version)
	<-gone
	e.drop(l)
}

// accept takes the connections of the guest.
func (e *Endpoint) accept() {
	serve.Accept(e.ctx, e.listener, e.wg.Go, func(err error) { e.cfg.Logger.Warn("accept connection to a service", "error", err) }, e.welcome)
}

// welcome is a host's side of a connection.
func (e *Endpoint) welcome(conn net.Conn, introduced func()) {
	defer conn.Close()
	defer context.AfterFunc(e.ctx, func() { conn.Close() })()
	conn.SetDeadline(time.Now().Add(introduction))
	r := bufio.NewReaderSize(conn, maxHello)
	theirs, err := readHello(r)
	ours, version := e.cfg.hello(), 0
	if err == nil {
		if version, err = e.cfg.agree(theirs); err != nil {
			ours.Error = err.Error()
			e.refuse(err)
		}
		err = errors.Join(err, writeHello(conn, ours))
	}
	conn.SetDeadline(time.Time{})
	introduced()
	if err != nil {
		e.cfg.Logger.Debug("refuse a connection to a service", "error", err)
		return
	}
	if !theirs.Calls {
		e.calling(&buffered{conn, r}, version)
		return
	}
	e.mu.Lock()
	old := e.serving
	e.serving = conn
	e.mu.Unlock()
	if old != nil {
		old.Close()
	}
	e.serve(&buffered{conn, r})
}

// serve serves the calls of a connection, until it ends.
func (e *Endpoint) serve(conn net.Conn) {
	if err := serve.Conn(e.ctx, e.server, conn, serve.Limits{Calls: e.cfg.Calls + refusals}); err != nil {
		e.cfg.Logger.Debug("a connection to a service was closed", "error", err)
	}
}

// dial is a guest's side of connections on which it calls, or serves: one after the other, until Close.
func (e *Endpoint) dial(calls bool) {
	serve.Again(e.ctx, func() bool {
		attempt, cancel := context.WithTimeout(e.ctx, introduction)
		conn, err := e.cfg.Dial(attempt, e.cfg.Port)
		cancel()
		met := time.Now()
		return err == nil && e.join(conn, calls) && time.Since(met) >= lasting
	})
}

// join is a guest's side of a connection. It reports whether the two came to terms.
func (e *Endpoint) join(conn net.Conn, calls bool) bool {
	defer conn.Close()
	defer context.AfterFunc(e.ctx, func() { conn.Close() })()
	conn.SetDeadline(time.Now().Add(introduction))
	ours := e.cfg.hello()
	ours.Calls = calls
	r := bufio.NewReaderSize(conn, maxHello)
	err := writeHello(conn, ours)
	var theirs hello
	if err == nil {
		theirs, err = readHello(r)
	}
	conn.SetDeadline(time.Time{})
	version := 0
	if err == nil {
		if version, err = e.cfg.agree(theirs); err == nil && theirs.Error != "" {
			err = fmt.Errorf("the host refuses: %.200s", theirs.Error)
		}
		if err != nil {
			e.refuse(err)
		}
	}
	if err != nil {
		return false
	}
	if calls {
		e.calling(&buffered{conn, r}, version)
	} else {
		e.serve(&buffered{conn, r})
	}
	return true
}

// buffered is a connection of which something was read already.
type buffered struct {
	net.Conn
	r *bufio.Reader
}

func (b *buffered) Read(p []byte) (int, error) { return b.r.Read(p) }
