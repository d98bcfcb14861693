package channel

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"sync"
	"time"

	"github.com/drafter-vm/drafter/pkg/agent/socket"
)

// PipeFile is the name, in a VMPath, of the unix socket by which the VMM offers the host's end of the serial port.
const PipeFile = "channel.sock"

// HostConfig says where a guest is. Dir must be set.
type HostConfig struct {
	// Dir is the VMPath, a folder with mode 0700: vsock.sock is made there, and vsock.sock_PORT looked for.
	Dir string

	// Dial connects to the host's end of the guest's serial port, again and again until it succeeds and whenever the
	// connection is lost. Nil dials the unix socket channel.sock in Dir.
	Dial func(ctx context.Context) (Pipe, error)

	// Quiet, if not nil, keeps the host from greeting until it is closed. A guest that was moved here does not notice
	// before then: it finds a host connected as before, and its old sessions just silent. To notice is work, its
	// programs' too.
	Quiet <-chan struct{}

	// Logger receives events; nil means slog.Default().
	Logger *slog.Logger
}

// Host is the host's end of one guest's channel. Its methods may be called concurrently.
type Host struct {
	dial     func(ctx context.Context) (Pipe, error)
	quiet    <-chan struct{} // nil, or nothing is sent before it is closed
	logger   *slog.Logger
	endpoint *endpoint

	cancel context.CancelFunc
	done   chan struct{} // closed when run has returned

	mu   sync.Mutex // guards link
	link *hostLink  // nil while not connected to the VMM
}

// StartHost offers the guest's sockets in cfg.Dir and begins to look for the guest, which may come up at any time. It
// does not wait for it. The caller must Close the host.
func StartHost(cfg HostConfig) (*Host, error) {
	h := &Host{dial: cfg.Dial, quiet: cfg.Quiet, logger: cfg.Logger, done: make(chan struct{})}
	if h.logger == nil {
		h.logger = slog.Default()
	}
	if h.dial == nil {
		h.dial = func(ctx context.Context) (Pipe, error) {
			var d net.Dialer
			conn, err := d.DialContext(ctx, "unix", filepath.Join(cfg.Dir, PipeFile))
			if err != nil {
				return nil, err
			}
			return conn.(*net.UnixConn), nil
		}
	}
	var err error
	if h.endpoint, err = newEndpoint(socket.HostPath(cfg.Dir), 0o600, h.logger); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	h.cancel = cancel
	go func() {
		defer close(h.done)
		h.run(ctx)
	}()
	return h, nil
}

// Wait returns once a session with the guest exists, or with ctx's error.
func (h *Host) Wait(ctx context.Context) error {
	if _, err := h.endpoint.current(ctx); err != nil {
		return fmt.Errorf("wait for the guest's end of the channel: %w", err)
	}
	return nil
}

// Reset ends all connections on both sides and begins a new session, as a snapshot or a move does.
func (h *Host) Reset() {
	h.mu.Lock()
	link := h.link
	h.mu.Unlock()
	if link != nil {
		link.restart(nil, errors.New("reset by the host"))
	}
}

// Close ends all connections on both sides, tells the guest so if that takes no time, removes vsock.sock and waits for
// every goroutine. The guest's end goes on to wait for another host. Close is idempotent.
func (h *Host) Close() error {
	h.cancel()
	<-h.done
	h.endpoint.close()
	return nil
}

// run keeps connected to the VMM.
func (h *Host) run(ctx context.Context) {
	const longest = 500 * time.Millisecond
	pause := time.Millisecond
	for ctx.Err() == nil {
		pipe, err := h.dial(ctx)
		if err == nil {
			pause = time.Millisecond
			err = h.converse(ctx, pipe)
		}
		if ctx.Err() != nil {
			return
		}
		h.logger.Debug("channel is not connected to the machine", "error", err)
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
		pause = min(2*pause, longest)
	}
}

// hostLink is the host's end of one connection to the VMM: a sequence of sessions.
//
//	greeting ── WELCOME ──► open ── RESET, lost frame, yamux fails, Reset ──► greeting (new nonce)
//
// In greeting, HELLO is repeated until it is answered.
type hostLink struct {
	host *Host
	out  *sender
	kick chan struct{} // capacity 1: send HELLO now

	mu      sync.Mutex // guards nonce, session and over
	nonce   uint64
	session *session // nil while greeting
	over    bool     // no session may begin any more
}

// converse runs sessions over pipe until it fails or ctx is done, and closes it.
func (h *Host) converse(ctx context.Context, pipe Pipe) error {
	l := &hostLink{host: h, out: &sender{pipe: pipe}, kick: make(chan struct{}, 1), nonce: newNonce()}
	h.mu.Lock()
	h.link = l
	h.mu.Unlock()

	failed := make(chan error, 1)
	go func() { failed <- l.receive(newDecoder(pipe)) }()
	err := l.greet(ctx, failed)

	h.mu.Lock()
	h.link = nil
	h.mu.Unlock()
	l.close()
	pipe.Close() // ends receive
	if err == nil {
		<-failed
	}
	return err
}

// greet says HELLO whenever there is no session, until ctx is done (and returns nil) or receiving failed.
func (l *hostLink) greet(ctx context.Context, failed <-chan error) error {
	if l.host.quiet != nil {
		select {
		case <-l.host.quiet:
		case err := <-failed:
			return err
		case <-ctx.Done():
			return nil
		}
	}
	const first, longest = 5 * time.Millisecond, time.Second
	pause := first
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
			pause = min(2*pause, longest)
		case <-l.kick:
			pause = first
		case err := <-failed:
			return err
		case <-ctx.Done():
			return nil
		}
		l.mu.Lock()
		nonce, greeting := l.nonce, l.session == nil
		l.mu.Unlock()
		if !greeting {
			continue // the timer rests until the next kick
		}
		// A guest that does not read costs this goroutine a timeout and nobody else anything.
		if err := l.out.send(frame{Type: frameHello, Nonce: nonce}, controlTimeout, nil); err != nil {
			l.host.logger.Debug("guest does not take a greeting", "error", err)
		}
		timer.Reset(pause)
	}
}

// receive handles what the guest sends.
func (l *hostLink) receive(d *decoder) error {
	logger := l.host.logger
	told := false
	for {
		f, err := d.next()
		if err != nil {
			return err
		}
		if f.Version != Version {
			if !told {
				told = true
				logger.Warn("guest speaks another version of the channel: its drafter-agent must be replaced", "guest_version", f.Version, "host_version", Version)
			}
			continue
		}
		l.mu.Lock()
		s, mine := l.session, f.Nonce == l.nonce
		l.mu.Unlock()
		switch {
		case f.Type == frameWelcome && mine && s == nil:
			if err := l.open(f.Nonce); err != nil {
				return err
			}
		case f.Type == frameData && mine && s != nil:
			if err := s.deliver(f); err != nil {
				l.restart(s, err)
			}
		case f.Type == frameReset && mine && s != nil:
			l.restart(s, errors.New("reset by the guest"))
		case f.Type == frameReset && f.Nonce == 0:
			if s != nil {
				l.restart(s, errors.New("the guest's end has started anew"))
			} else {
				l.hurry()
			}
		}
	}
}

// hurry makes greet act now.
func (l *hostLink) hurry() {
	select {
	case l.kick <- struct{}{}:
	default: // it will already
	}
}

// open begins the session that the guest has welcomed.
func (l *hostLink) open(nonce uint64) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.over || l.nonce != nonce || l.session != nil {
		return nil
	}
	s, err := newSession(nonce, l.out, true, muxLog{l.host.logger})
	if err != nil {
		return err
	}
	l.session = s
	l.host.endpoint.swap(s)
	l.host.endpoint.wg.Go(func() {
		<-s.ended()
		l.restart(s, errors.New("no answer from the guest"))
	})
	return nil
}

// restart ends session s (nil: whichever there is) and greets anew. It does nothing when s is not the present session.
func (l *hostLink) restart(s *session, why error) {
	if old := l.drop(s, false); old != nil {
		l.host.logger.Debug("channel session ended", "error", why)
		old.end()
		l.hurry()
	}
}

// close ends the session for good.
func (l *hostLink) close() {
	if old := l.drop(nil, true); old != nil {
		old.end()
		// As a courtesy: the guest's programs learn of it before the next host comes.
		l.out.send(frame{Type: frameReset, Nonce: old.nonce}, controlTimeout/5, nil)
	}
}

// drop takes the session away if it is s (nil: any), and returns it for the caller to end.
func (l *hostLink) drop(s *session, over bool) *session {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.over = l.over || over
	old := l.session
	if old == nil || s != nil && s != old {
		return nil
	}
	l.session = nil
	l.nonce = newNonce()
	l.host.endpoint.swap(nil)
	return old
}

var _ io.Closer = (*Host)(nil)
