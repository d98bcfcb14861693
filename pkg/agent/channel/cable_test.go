package channel

import (
	"context"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"
)

// cable is a virtio-serial port with QEMU at one end: bytes are kept in bounded buffers, one host at a time can be
// connected, what is on its way to a host that disconnects is lost, and the guest's end lives on.
type cable struct {
	mu       sync.Mutex // guards everything below
	changed  sync.Cond
	toGuest  []byte
	toHost   []byte
	host     *hostEnd // nil: away
	awayTold bool
	guest    *guestEnd // nil: no process has the port open

	// damage, if set, is called with the bytes about to be put on the cable and returns what arrives instead.
	damage func(toGuest bool, p []byte) []byte
}

const cableSize = 64 << 10

func newCable() *cable {
	c := &cable{awayTold: true}
	c.changed.L = &c.mu
	return c
}

type deadline struct {
	at    time.Time
	timer *time.Timer
}

func (c *cable) setDeadline(d *deadline, at time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if d.timer != nil {
		d.timer.Stop()
	}
	d.at = at
	if !at.IsZero() {
		d.timer = time.AfterFunc(time.Until(at), func() { c.mu.Lock(); c.changed.Broadcast(); c.mu.Unlock() })
	}
	c.changed.Broadcast()
}

func (d *deadline) passed() bool { return !d.at.IsZero() && !time.Now().Before(d.at) }

// put appends p to a queue as room comes, until stop says otherwise.
func (c *cable) put(toGuest bool, p []byte, d *deadline, open func() bool) (n int, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for n < len(p) {
		queue := &c.toHost
		if toGuest {
			queue = &c.toGuest
		}
		room := cableSize - len(*queue)
		if !toGuest && c.host == nil {
			room = 0
		}
		switch {
		case !open():
			return n, os.ErrClosed
		case d.passed():
			return n, os.ErrDeadlineExceeded
		case room <= 0:
			c.changed.Wait()
		default:
			chunk := p[n:min(n+room, len(p))]
			n += len(chunk)
			if c.damage != nil {
				chunk = c.damage(toGuest, chunk)
			}
			*queue = append(*queue, chunk...)
			c.changed.Broadcast()
		}
	}
	return n, nil
}

type hostEnd struct {
	c *cable
	d deadline
}

// connect is what dialling channel.sock is to QEMU.
func (c *cable) connect(context.Context) (Pipe, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.host != nil {
		return nil, os.ErrExist
	}
	c.host = &hostEnd{c: c}
	c.changed.Broadcast()
	return c.host, nil
}

func (h *hostEnd) connected() bool                    { return h.c.host == h }
func (h *hostEnd) SetWriteDeadline(t time.Time) error { h.c.setDeadline(&h.d, t); return nil }
func (h *hostEnd) Write(p []byte) (int, error)        { return h.c.put(true, p, &h.d, h.connected) }
func (h *hostEnd) Read(p []byte) (int, error) {
	h.c.mu.Lock()
	defer h.c.mu.Unlock()
	for h.connected() && len(h.c.toHost) == 0 {
		h.c.changed.Wait()
	}
	if !h.connected() {
		return 0, io.EOF
	}
	n := copy(p, h.c.toHost)
	h.c.toHost = h.c.toHost[n:]
	h.c.changed.Broadcast()
	return n, nil
}
func (h *hostEnd) Close() error {
	h.c.mu.Lock()
	defer h.c.mu.Unlock()
	if h.connected() {
		h.c.host, h.c.toHost, h.c.awayTold = nil, nil, false
		h.c.changed.Broadcast()
	}
	return nil
}

type guestEnd struct {
	c *cable
	d deadline
}

// open is what opening the port is in the guest.
func (c *cable) open(ctx context.Context) (Pipe, error) {
	stop := context.AfterFunc(ctx, func() { c.mu.Lock(); c.changed.Broadcast(); c.mu.Unlock() })
	defer stop()
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.guest != nil && ctx.Err() == nil {
		c.changed.Wait()
	}
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	c.guest = &guestEnd{c: c}
	return c.guest, nil
}

func (g *guestEnd) isOpen() bool                       { return g.c.guest == g }
func (g *guestEnd) SetWriteDeadline(t time.Time) error { g.c.setDeadline(&g.d, t); return nil }
func (g *guestEnd) Write(p []byte) (int, error)        { return g.c.put(false, p, &g.d, g.isOpen) }
func (g *guestEnd) Read(p []byte) (int, error) {
	g.c.mu.Lock()
	defer g.c.mu.Unlock()
	for {
		switch {
		case !g.isOpen():
			return 0, os.ErrClosed
		case len(g.c.toGuest) > 0:
			n := copy(p, g.c.toGuest)
			g.c.toGuest = g.c.toGuest[n:]
			g.c.changed.Broadcast()
			return n, nil
		case g.c.host == nil && !g.c.awayTold:
			g.c.awayTold = true
			return 0, ErrHostAway
		}
		g.c.changed.Wait()
	}
}
func (g *guestEnd) Close() error {
	g.c.mu.Lock()
	defer g.c.mu.Unlock()
	if g.isOpen() {
		g.c.guest, g.c.toGuest = nil, nil // as the driver, which drops what it has received
		g.c.changed.Broadcast()
	}
	return nil
}

// rig is both ends over one cable.
type rig struct {
	t     *testing.T
	cable *cable
	dir   string // the host's VMPath
	guest string // the guest's socket
}

func newRig(t *testing.T) *rig {
	return &rig{t: t, cable: newCable(), dir: tempDir(t), guest: filepath.Join(tempDir(t), "guest.sock")}
}

func (r *rig) startHost() *Host {
	r.t.Helper()
	h, err := StartHost(HostConfig{Dir: r.dir, Dial: r.cable.connect, Logger: quiet()})
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { h.Close() })
	return h
}

func (r *rig) startGuest() *Guest {
	r.t.Helper()
	g, err := StartGuest(GuestConfig{Path: r.guest, Open: r.cable.open, Logger: quiet()})
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { g.Close() })
	return g
}

// tempDir is t.TempDir with a path short enough for sockets.
func tempDir(t testing.TB) string {
	dir, err := os.MkdirTemp("/tmp", "agent-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func quiet() *slog.Logger {
	if testing.Verbose() {
		return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	return slog.New(slog.DiscardHandler)
}

// testContext bounds a test that would hang.
func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// serveEcho answers every connection with what it sends, until the listener is closed.
func serveEcho(t testing.TB, ln net.Listener) {
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				io.Copy(conn, conn)
				conn.Close()
			})
		}
	})
	t.Cleanup(func() {
		ln.Close()
		wg.Wait()
	})
}
