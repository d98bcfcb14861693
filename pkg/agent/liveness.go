package agent

import (
	"context"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/drafter-vm/drafter/pkg/agent/internal/serve"
	"github.com/drafter-vm/drafter/pkg/agent/socket"
)

// Liveness waits for a guest's sign that it is up: any connection to a port of the host. Its methods may be called
// concurrently.
type Liveness struct {
	listener net.Listener
	alive    chan struct{} // closed at the first connection
	closed   chan struct{} // closed when accepting has ended
}

// ListenLiveness listens for the guest whose folder is vmPath. Port 0 means [DefaultLivenessPort]. The caller must Close
// the liveness.
func ListenLiveness(vmPath string, port uint32) (*Liveness, error) {
	if port == 0 {
		port = DefaultLivenessPort
	}
	ln, err := socket.ListenHost(vmPath, port)
	if err != nil {
		return nil, fmt.Errorf("listen for the guest's liveness: %w", err)
	}
	l := &Liveness{listener: ln, alive: make(chan struct{}), closed: make(chan struct{})}
	go l.accept()
	return l, nil
}

func (l *Liveness) accept() {
	defer close(l.closed)
	var once sync.Once
	for {
		conn, err := l.listener.Accept()
		if err != nil {
			return
		}
		conn.Close()
		once.Do(func() { close(l.alive) })
	}
}

// Wait returns nil once the guest has connected, which it may have done already.
func (l *Liveness) Wait(ctx context.Context) error {
	select {
	case <-l.alive:
		return nil
	default:
	}
	select {
	case <-l.alive:
		return nil
	case <-l.closed:
		return fmt.Errorf("wait for the guest to come up: %w", net.ErrClosed)
	case <-ctx.Done():
		return fmt.Errorf("wait for the guest to come up: %w", context.Cause(ctx))
	}
}

// Close stops listening. It is idempotent.
func (l *Liveness) Close() error {
	l.listener.Close()
	<-l.closed
	return nil
}

// SayAlive tells the host, from inside the guest, that the guest is up. It tries until the host has taken the connection
// or ctx is done. Port 0 means [DefaultLivenessPort], a nil dial [socket.Dial].
func SayAlive(ctx context.Context, port uint32, dial DialFunc) error {
	if port == 0 {
		port = DefaultLivenessPort
	}
	if dial == nil {
		dial = socket.Dial
	}
	for pause := serve.FirstPause; ; pause = min(2*pause, serve.LongPause) {
		conn, err := dial(ctx, port)
		if err == nil {
			return conn.Close()
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return fmt.Errorf("say alive: %w (last: %w)", context.Cause(ctx), err)
		}
	}
}
