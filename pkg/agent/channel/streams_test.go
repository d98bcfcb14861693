package channel

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/drafter-vm/drafter/pkg/agent/socket"
)

// connected is a rig with a session.
func connected(t *testing.T) (*rig, *Host, *Guest) {
	t.Helper()
	r := newRig(t)
	host, guest := r.startHost(), r.startGuest()
	if err := host.Wait(testContext(t)); err != nil {
		t.Fatal(err)
	}
	return r, host, guest
}

// listenGuest listens on a guest port.
func (r *rig) listenGuest(port uint32) *net.UnixListener {
	r.t.Helper()
	ln, err := socket.ListenUnix(socket.PortPath(r.guest, port), 0o600)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { ln.Close() })
	return ln
}

// pair is a connection from the host to the guest, both ends.
func (r *rig) pair(ctx context.Context, ln *net.UnixListener, port uint32) (host, guest *net.UnixConn) {
	r.t.Helper()
	accepted := make(chan *net.UnixConn, 1)
	go func() {
		conn, _ := ln.AcceptUnix()
		accepted <- conn
	}()
	host, err := socket.DialGuest(ctx, r.dir, port)
	if err != nil {
		r.t.Fatal(err)
	}
	guest = <-accepted
	r.t.Cleanup(func() { host.Close(); guest.Close() })
	return host, guest
}

// TestThousandsOfStreams has them all open at a time.
func TestThousandsOfStreams(t *testing.T) {
	checkGoroutines(t)
	var limit syscall.Rlimit
	syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit)
	n := min(2000, (int(limit.Cur)-100)/4) // each stream has four ends in this process
	r, _, _ := connected(t)
	ctx := testContext(t)
	serveEcho(t, r.listenGuest(7))
	conns := make([]*net.UnixConn, n)
	var wg sync.WaitGroup
	work := make(chan int)
	for range 64 {
		wg.Go(func() {
			for i := range work {
				for conns[i] == nil && ctx.Err() == nil {
					// The listener's backlog is short of so many at a time, and refuses.
					conns[i], _ = socket.DialGuest(ctx, r.dir, 7)
				}
			}
		})
	}
	for i := range n {
		work <- i
	}
	close(work)
	wg.Wait()
	if ctx.Err() != nil {
		t.Fatal("could not open all streams")
	}
	for i, conn := range conns {
		wg.Go(func() {
			defer conn.Close()
			want := fmt.Sprintf("stream %d", i)
			conn.Write([]byte(want))
			conn.CloseWrite()
			if got, err := io.ReadAll(conn); err != nil || string(got) != want {
				t.Errorf("echo: got %q, %v, want %q", got, err, want)
			}
		})
	}
	wg.Wait()
}

// TestSlowReader fills a stream that nobody reads, both ways, and sees another stream run.
func TestSlowReader(t *testing.T) {
	checkGoroutines(t)
	r, _, _ := connected(t)
	ctx := testContext(t)
	ln := r.listenGuest(7)
	host, guest := r.pair(ctx, ln, 7)
	for _, conn := range []*net.UnixConn{host, guest} {
		// Until nothing more goes in for a while.
		for {
			conn.SetWriteDeadline(time.Now().Add(200 * time.Millisecond))
			if _, err := conn.Write(make([]byte, 64<<10)); errors.Is(err, os.ErrDeadlineExceeded) {
				break
			} else if err != nil {
				t.Fatal(err)
			}
		}
	}
	serveEcho(t, ln)
	conn, err := socket.DialGuest(ctx, r.dir, 7)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	checkEcho(t, conn, 4<<20)
}

// TestHalfClose sends a request, ends it, and gets the whole answer, in both directions of dialling.
func TestHalfClose(t *testing.T) {
	checkGoroutines(t)
	r, _, _ := connected(t)
	host, guest := r.pair(testContext(t), r.listenGuest(7), 7)
	for _, c := range []struct{ from, to *net.UnixConn }{{host, guest}, {guest, host}} {
		go func() {
			c.from.Write([]byte("request"))
			c.from.CloseWrite()
		}()
		got, err := io.ReadAll(c.to)
		if err != nil || string(got) != "request" {
			t.Fatalf("got %q, %v", got, err)
		}
	}
}

// TestAbort closes one program's connection while the other sends: the sender must not be left hanging.
func TestAbort(t *testing.T) {
	checkGoroutines(t)
	r, _, _ := connected(t)
	ctx := testContext(t)
	ln := r.listenGuest(7)
	for _, side := range []string{"host", "guest"} {
		t.Run(side+" sends", func(t *testing.T) {
			sender, reader := r.pair(ctx, ln, 7)
			if side == "guest" {
				sender, reader = reader, sender
			}
			reader.Close()
			sender.SetWriteDeadline(time.Now().Add(30 * time.Second))
			for {
				if _, err := sender.Write(make([]byte, 64<<10)); err != nil {
					if errors.Is(err, os.ErrDeadlineExceeded) {
						t.Error("the sender hangs")
					}
					return
				}
			}
		})
	}
}

// TestDeadGuest has a guest whose process exists, holds the port open and reads nothing: requests fail in their time,
// Reset and Close do not hang, and a guest that comes to life works.
func TestDeadGuest(t *testing.T) {
	checkGoroutines(t)
	r := newRig(t)
	port, err := r.cable.open(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	host := r.startHost()
	ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
	defer cancel()
	if _, err := socket.DialGuest(ctx, r.dir, 7); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("dial: got %v, want deadline exceeded", err)
	}
	if err := host.Wait(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("wait: got %v, want deadline exceeded", err)
	}
	host.Reset()
	// The cable is filled to the brim, as by a host of long ago.
	r.cable.mu.Lock()
	r.cable.toGuest = append(r.cable.toGuest, noise(cableSize-len(r.cable.toGuest))...)
	r.cable.mu.Unlock()
	host.Close()
	host = r.startHost()
	port.Close()
	r.cable.mu.Lock()
	r.cable.toGuest = noise(cableSize) // what the driver buffered before the next process
	r.cable.mu.Unlock()
	r.startGuest()
	if err := host.Wait(testContext(t)); err != nil {
		t.Fatal(err)
	}
}

// TestCorruption damages bytes on the cable now and then: sessions end, but no program ever reads a wrong byte.
func TestCorruption(t *testing.T) {
	checkGoroutines(t)
	r, host, _ := connected(t)
	ctx := testContext(t)
	serveEcho(t, r.listenGuest(7))
	var mu sync.Mutex // guards seen and next
	seen, next := 0, 300_000
	r.cable.mu.Lock()
	r.cable.damage = func(toGuest bool, p []byte) []byte {
		mu.Lock()
		defer mu.Unlock()
		seen += len(p)
		if seen < next {
			return p
		}
		next += 300_000
		switch next / 300_000 % 3 {
		case 0:
			return p[:len(p)/2]
		case 1:
			return append(append([]byte{}, p...), noise(100)...)
		default:
			q := append([]byte{}, p...)
			q[len(q)/2] ^= 0x10
			return q
		}
	}
	r.cable.mu.Unlock()
	broken := 0
	for broken < 10 && ctx.Err() == nil {
		conn, err := socket.DialGuest(ctx, r.dir, 7)
		if err != nil {
			broken++
			continue
		}
		sent := noise(200_000)
		go func() {
			conn.Write(sent)
			conn.CloseWrite()
		}()
		got, err := io.ReadAll(conn)
		conn.Close()
		if !strings.HasPrefix(string(sent), string(got)) {
			t.Fatal("a program read a wrong byte")
		}
		if err != nil || len(got) < len(sent) {
			broken++
		}
	}
	if ctx.Err() != nil {
		t.Fatal("timed out")
	}
	r.cable.mu.Lock()
	r.cable.damage = nil
	r.cable.mu.Unlock()
	if err := host.Wait(ctx); err != nil {
		t.Fatal(err)
	}
}

// TestForeignPeer has something else at the other end of the port, and a version of the future.
func TestForeignPeer(t *testing.T) {
	checkGoroutines(t)
	r := newRig(t)
	port, err := r.cable.open(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	host := r.startHost()
	future, _ := appendFrame(nil, nil, frame{Version: 2, Type: frameWelcome, Nonce: 5})
	for _, p := range [][]byte{[]byte("login: \r\n\x00"), future} {
		if _, err := port.Write(p); err != nil {
			t.Fatal(err)
		}
	}
	port.Close()
	r.startGuest()
	if err := host.Wait(testContext(t)); err != nil {
		t.Fatal(err)
	}
}

func TestSocketInUse(t *testing.T) {
	r := newRig(t)
	r.startHost()
	_, err := StartHost(HostConfig{Dir: r.dir, Dial: r.cable.connect, Logger: quiet()})
	if !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("second host: got %v, want EADDRINUSE", err)
	}
	_, err = StartHost(HostConfig{Dir: filepath.Join(r.dir, strings.Repeat("x", 100)), Logger: quiet()})
	if err == nil || !strings.Contains(err.Error(), "use a folder with a shorter path") {
		t.Errorf("long path: got %v, want a remedy", err)
	}
}

// BenchmarkEcho is a stream through everything but a VMM.
func BenchmarkEcho(b *testing.B) {
	c := newCable()
	dir := tempDir(b)
	path := filepath.Join(dir, "guest.sock")
	host, err := StartHost(HostConfig{Dir: dir, Dial: c.connect, Logger: quiet()})
	if err != nil {
		b.Fatal(err)
	}
	defer host.Close()
	guest, err := StartGuest(GuestConfig{Path: path, Open: c.open, Logger: quiet()})
	if err != nil {
		b.Fatal(err)
	}
	defer guest.Close()
	ln, err := socket.ListenUnix(socket.PortPath(path, 7), 0o600)
	if err != nil {
		b.Fatal(err)
	}
	serveEcho(b, ln)
	conn, err := socket.DialGuest(testContext(b), dir, 7)
	if err != nil {
		b.Fatal(err)
	}
	defer conn.Close()
	for _, size := range []int{1, 64 << 10} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			b.SetBytes(int64(size))
			buf := make([]byte, size)
			for b.Loop() {
				conn.Write(buf)
				if _, err := io.ReadFull(conn, buf); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
