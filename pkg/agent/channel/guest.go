package channel

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/drafter-vm/drafter/pkg/agent/socket"
)

// ErrHostAway is what a [Pipe] of the guest returns from Read, once each time, when no host is connected. The next Read
// waits for one.
var ErrHostAway = errors.New("no host is connected to the port")

// GuestConfig says how a guest reaches its host. The zero value is what a guest wants.
type GuestConfig struct {
	// Path is the socket to offer to the guest's programs; empty means [socket.GuestPath]. Its folder is made if missing.
	Path string

	// Mode are the permissions of that socket; 0 means 0600, root only. Who may connect to it may talk to every port
	// of the host.
	Mode fs.FileMode

	// Open opens the serial port, waiting for it until ctx is done. Nil waits for the virtio port [PortName].
	Open func(ctx context.Context) (Pipe, error)

	// Logger receives events; nil means slog.Default().
	Logger *slog.Logger
}

// Guest is the guest's end of its channel. Its methods may be called concurrently.
type Guest struct {
	open     func(ctx context.Context) (Pipe, error)
	logger   *slog.Logger
	endpoint *endpoint

	cancel context.CancelFunc
	done   chan struct{} // closed when run has returned
}

// StartGuest offers the host's sockets in the guest, and serves whatever host connects to the serial port. It does not
// wait for the port. The caller must Close the guest.
func StartGuest(cfg GuestConfig) (*Guest, error) {
	g := &Guest{open: cfg.Open, logger: cfg.Logger, done: make(chan struct{})}
	if g.logger == nil {
		g.logger = slog.Default()
	}
	if g.open == nil {
		g.open = func(ctx context.Context) (Pipe, error) { return OpenPort(ctx, PortName) }
	}
	if cfg.Path == "" {
		cfg.Path = socket.GuestPath
	}
	if cfg.Mode == 0 {
		cfg.Mode = 0o600
	}
	if err := os.MkdirAll(filepath.Dir(cfg.Path), 0o755); err != nil {
		return nil, err
	}
	var err error
	if g.endpoint, err = newEndpoint(cfg.Path, cfg.Mode, g.logger); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	g.cancel = cancel
	go func() {
		defer close(g.done)
		g.run(ctx)
	}()
	return g, nil
}

// Close ends all connections, closes the port, removes the socket and waits for every goroutine. It is idempotent.
func (g *Guest) Close() error {
	g.cancel()
	<-g.done
	g.endpoint.close()
	return nil
}

// run serves the port, and opens it again when it fails (it was unplugged, or its driver reloaded).
func (g *Guest) run(ctx context.Context) {
	const longest = time.Second
	pause := 10 * time.Millisecond
	for {
		pipe, err := g.open(ctx)
		if err == nil {
			began := time.Now()
			err = g.converse(ctx, pipe)
			if time.Since(began) > longest {
				pause = 10 * time.Millisecond
			}
		}
		if ctx.Err() != nil {
			return
		}
		g.logger.Warn("channel port failed", "error", err)
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return
		}
		pause = min(2*pause, longest)
	}
}

// guestLink is the guest's end of the port: a sequence of sessions, each begun by a HELLO.
//
//	idle ── HELLO ──► open ── HELLO with another nonce ──► open (that session)
//	open ── RESET, lost frame, yamux fails, host away ──► idle
type guestLink struct {
	guest *Guest
	out   *sender

	mu      sync.Mutex // guards session
	session *session   // nil while idle
}

// converse runs sessions over pipe until it fails or ctx is done, and closes it.
func (g *Guest) converse(ctx context.Context, pipe Pipe) error {
	l := &guestLink{guest: g, out: &sender{pipe: pipe}}
	stop := context.AfterFunc(ctx, func() { pipe.Close() })
	defer stop()
	defer pipe.Close()
	// The host may believe in a session with the process that had the port before. If no host is there, nobody is told.
	l.out.send(frame{Type: frameReset}, controlTimeout, nil)
	err := l.receive(newDecoder(pipe))
	l.endSession(nil)
	return err
}

// receive handles what hosts send, one host after the other.
func (l *guestLink) receive(d *decoder) error {
	logger := l.guest.logger
	var (
		told    bool   // of another version
		unknown uint64 // the last session that was answered with RESET
	)
	for {
		f, err := d.next()
		if errors.Is(err, ErrHostAway) {
			d.forget()
			l.endSession(nil)
			continue
		}
		if err != nil {
			return err
		}
		if f.Version != Version {
			if !told {
				told = true
				logger.Warn("host speaks another version of the channel: this drafter-agent must be replaced", "host_version", f.Version, "guest_version", Version)
			}
			continue
		}
		l.mu.Lock()
		s := l.session
		l.mu.Unlock()
		mine := s != nil && f.Nonce == s.nonce
		switch {
		case f.Type == frameHello && f.Nonce != 0:
			if !mine { // else the answer was lost, or is under way
				l.endSession(nil)
			}
			// The answer goes before the session's first frame. Without it the host asks again.
			if l.out.send(frame{Type: frameWelcome, Nonce: f.Nonce}, controlTimeout, nil) == nil && !mine {
				if err := l.begin(f.Nonce); err != nil {
					return err
				}
			}
		case f.Type == frameData && mine:
			if err := s.deliver(f); err != nil {
				logger.Debug("channel session ended", "error", err)
				l.endSession(s)
				l.out.send(frame{Type: frameReset, Nonce: s.nonce}, controlTimeout, nil)
			}
		case f.Type == frameData && f.Nonce != unknown:
			unknown = f.Nonce // once is enough, frames in flight may be many
			l.out.send(frame{Type: frameReset, Nonce: f.Nonce}, controlTimeout, nil)
		case f.Type == frameReset && mine:
			l.endSession(s)
		}
	}
}

// begin begins a session where there is none. It is called by receive only.
func (l *guestLink) begin(nonce uint64) error {
	s, err := newSession(nonce, l.out, false, muxLog{l.guest.logger})
	if err != nil {
		return err
	}
	l.mu.Lock()
	l.session = s
	l.mu.Unlock()
	l.guest.endpoint.swap(s)
	l.guest.endpoint.wg.Go(func() {
		<-s.ended()
		if l.endSession(s) {
			// It failed by itself, so the host does not know.
			l.out.send(frame{Type: frameReset, Nonce: s.nonce}, controlTimeout, nil)
		}
	})
	return nil
}

// endSession ends session s (nil: whichever there is) and reports whether it was the present one.
func (l *guestLink) endSession(s *session) bool {
	l.mu.Lock()
	old := l.session
	if old == nil || s != nil && s != old {
		l.mu.Unlock()
		return false
	}
	l.session = nil
	// Under mu, so that it does not take away a session that begins at the same time.
	l.guest.endpoint.swap(nil)
	l.mu.Unlock()
	old.end()
	return true
}

var _ io.Closer = (*Guest)(nil)
