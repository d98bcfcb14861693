package channel

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/drafter-vm/drafter/pkg/agent/socket"
)

// checkGoroutines fails the test if it ends with more goroutines than it began with. Call it first: cleanups run last
// to first.
func checkGoroutines(t *testing.T) {
	before := runtime.NumGoroutine()
	t.Cleanup(func() {
		var n int
		for range 200 {
			if n = runtime.NumGoroutine(); n <= before {
				return
			}
			runtime.Gosched()
			<-time.After(10 * time.Millisecond) // goroutines of timers and of the network poller end by themselves
		}
		buf := make([]byte, 1<<20)
		t.Errorf("%d goroutines are left over:\n%s", n-before, buf[:runtime.Stack(buf, true)])
	})
}

func TestBothDirections(t *testing.T) {
	checkGoroutines(t)
	r := newRig(t)
	host := r.startHost()
	r.startGuest()
	ctx := testContext(t)
	if err := host.Wait(ctx); err != nil {
		t.Fatal(err)
	}
	inGuest, err := socket.ListenUnix(socket.PortPath(r.guest, 7), 0o600)
	if err != nil {
		t.Fatal(err)
	}
	serveEcho(t, inGuest)
	onHost, err := socket.ListenHost(r.dir, 8)
	if err != nil {
		t.Fatal(err)
	}
	serveEcho(t, onHost)

	for _, c := range []struct {
		name string
		path string
		port uint32
	}{{"host to guest", socket.HostPath(r.dir), 7}, {"guest to host", r.guest, 8}} {
		t.Run(c.name, func(t *testing.T) {
			conn, err := socket.Connect(ctx, c.path, c.port)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			checkEcho(t, conn, 1<<20)
		})
	}
	t.Run("refused", func(t *testing.T) {
		for _, path := range []string{socket.HostPath(r.dir), r.guest} {
			if _, err := socket.Connect(ctx, path, 99); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("connect to a port nobody listens on: got %v, want ECONNREFUSED", err)
			}
		}
	})
	t.Run("permissions", func(t *testing.T) {
		for _, path := range []string{socket.HostPath(r.dir), r.guest} {
			info, err := os.Stat(path)
			if err != nil || info.Mode().Perm() != 0o600 {
				t.Errorf("mode of %s: got %v, %v, want 0600", path, info.Mode(), err)
			}
		}
	})
}

// checkEcho sends n random bytes, closes for writing, and wants them back until the end of the file.
func checkEcho(t testing.TB, conn *net.UnixConn, n int) {
	t.Helper()
	sent := make([]byte, n)
	rng := rand.NewChaCha8([32]byte{1})
	rng.Read(sent)
	go func() {
		conn.Write(sent)
		conn.CloseWrite()
	}()
	got, err := io.ReadAll(conn)
	if err != nil || !bytes.Equal(got, sent) {
		t.Fatalf("echo: %d bytes and %v, want the %d bytes that were sent", len(got), err, n)
	}
}

// TestProtocolText speaks to vsock.sock as programs written for Firecracker do.
func TestProtocolText(t *testing.T) {
	checkGoroutines(t)
	r := newRig(t)
	host := r.startHost()
	r.startGuest()
	if err := host.Wait(testContext(t)); err != nil {
		t.Fatal(err)
	}
	ln, err := socket.ListenUnix(socket.PortPath(r.guest, 52), 0o600)
	if err != nil {
		t.Fatal(err)
	}
	serveEcho(t, ln)
	for _, c := range []struct{ send, want string }{
		{"CONNECT 52\nhello", "OK 1073741825\nhello"},
		{"connect\t52 \r\nhello", "OK 1073741826\nhello"},
		{"CONNECT 53\n", ""},
		{"CONNECT\n", ""},
		{"CONNECT 52 53\n", ""},
		{"CONNECT -1\n", ""},
		{"CONNECT 4294967296\n", ""},
		{"CONNECT 52", ""},
		{"GET / HTTP/1.1\n", ""},
		{strings.Repeat("C", 100), ""},
		{"\n", ""},
		{"", ""},
	} {
		t.Run(fmt.Sprintf("%.12q", c.send), func(t *testing.T) {
			conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: socket.HostPath(r.dir), Net: "unix"})
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if _, err := conn.Write([]byte(c.send)); err != nil {
				t.Fatal(err)
			}
			conn.CloseWrite()
			got, err := io.ReadAll(conn)
			if err != nil && !errors.Is(err, syscall.ECONNRESET) { // reset: closed with our bytes unread
				t.Fatal(err)
			}
			if string(got) != c.want {
				t.Errorf("answer to %q: got %q, want %q", c.send, got, c.want)
			}
		})
	}
}

// TestGuestLater starts the host long before the guest, and the other way round.
func TestGuestLater(t *testing.T) {
	checkGoroutines(t)
	r := newRig(t)
	host := r.startHost()
	// The host has greeted for a while when its cable is full of greetings.
	r.cable.mu.Lock()
	for len(r.cable.toGuest) == 0 {
		r.cable.changed.Wait()
	}
	r.cable.mu.Unlock()
	r.startGuest()
	if err := host.Wait(testContext(t)); err != nil {
		t.Fatal(err)
	}
}

// TestReplacement replaces one end after the other, gracefully and by cutting it off, while streams run in both
// directions: programs must see every connection end, and new ones must work.
// TestQuiet moves a guest to a host that is quiet: the guest notices when that has ended, and not before.
func TestQuiet(t *testing.T) {
	checkGoroutines(t)
	r := newRig(t)
	var moved atomic.Bool
	source, err := StartHost(HostConfig{Dir: r.dir, Logger: quiet(), Dial: func(ctx context.Context) (Pipe, error) {
		if moved.Load() {
			return nil, net.ErrClosed
		}
		return r.cable.connect(ctx)
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	defer r.startGuest().Close()
	ctx := testContext(t)
	if err := source.Wait(ctx); err != nil {
		t.Fatal(err)
	}
	onHost, err := socket.ListenHost(r.dir, 8)
	if err != nil {
		t.Fatal(err)
	}
	serveEcho(t, onHost)
	conn, err := socket.Connect(ctx, r.guest, 8)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Write([]byte("echo")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(conn, make([]byte, 4)); err != nil {
		t.Fatal(err)
	}

	moved.Store(true)
	r.cable.mu.Lock()
	end := &hostEnd{c: r.cable}
	r.cable.host, r.cable.toHost, r.cable.toGuest = end, nil, nil
	said, heard := 0, 0
	r.cable.damage = func(toGuest bool, p []byte) []byte {
		if toGuest {
			said += len(p)
		} else {
			heard += len(p)
		}
		return p
	}
	r.cable.changed.Broadcast()
	r.cable.mu.Unlock()
	hush := make(chan struct{})
	dials := make(chan Pipe, 1)
	dials <- end
	destination, err := StartHost(HostConfig{Dir: tempDir(t), Quiet: hush, Logger: quiet(), Dial: func(ctx context.Context) (Pipe, error) {
		select {
		case pipe := <-dials:
			return pipe, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer destination.Close()
	if _, err := conn.Write([]byte("to the old host")); err != nil {
		t.Fatal(err)
	}
	r.cable.mu.Lock()
	for heard == 0 || len(r.cable.toHost) > 0 { // until the new host has read what was for the old one
		r.cable.changed.Wait()
	}
	if said != 0 {
		t.Errorf("the quiet host said %d bytes", said)
	}
	r.cable.mu.Unlock()
	close(hush)
	io.Copy(io.Discard, conn) // until the stream to the old host ends
	if err := destination.Wait(ctx); err != nil {
		t.Fatal(err)
	}

	// Close does not wait for the end of quiet.
	never, err := StartHost(HostConfig{Dir: tempDir(t), Quiet: make(chan struct{}), Logger: quiet(), Dial: newCable().connect})
	if err != nil {
		t.Fatal(err)
	}
	never.Close()
}

func TestReplacement(t *testing.T) {
	for _, c := range []struct {
		name string
		act  func(r *rig, host **Host, guest **Guest)
	}{
		{"reset", func(r *rig, host **Host, guest **Guest) { (*host).Reset() }},
		{"host closed", func(r *rig, host **Host, guest **Guest) { (*host).Close(); *host = r.startHost() }},
		{"guest closed", func(r *rig, host **Host, guest **Guest) { (*guest).Close(); *guest = r.startGuest() }},
		{"machine's end cut", func(r *rig, host **Host, guest **Guest) {
			r.cable.mu.Lock()
			end := r.cable.host
			r.cable.mu.Unlock()
			if end != nil {
				end.Close()
			}
		}},
		{"restored elsewhere", func(r *rig, host **Host, guest **Guest) {
			// The host's end changes without the guest being told, and what is under way is cut anywhere.
			r.cable.mu.Lock()
			r.cable.host = nil
			r.cable.toHost = r.cable.toHost[rand.IntN(len(r.cable.toHost)+1):]
			r.cable.toGuest = r.cable.toGuest[:rand.IntN(len(r.cable.toGuest)+1)]
			r.cable.changed.Broadcast()
			r.cable.mu.Unlock()
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			checkGoroutines(t)
			r := newRig(t)
			host, guest := r.startHost(), r.startGuest()
			ctx := testContext(t)
			inGuest, err := socket.ListenUnix(socket.PortPath(r.guest, 7), 0o600)
			if err != nil {
				t.Fatal(err)
			}
			serveEcho(t, inGuest)
			onHost, err := socket.ListenHost(r.dir, 7)
			if err != nil {
				t.Fatal(err)
			}
			serveEcho(t, onHost)

			var stop atomic.Bool
			var rounds [2]atomic.Int64
			var wg sync.WaitGroup
			for side, path := range []string{socket.HostPath(r.dir), r.guest} {
				for range 4 {
					wg.Go(func() {
						for !stop.Load() {
							conn, err := socket.Connect(ctx, path, 7)
							if err != nil {
								runtime.Gosched()
								continue
							}
							// Echo until the connection ends; every byte that comes must be the right one.
							wg.Go(func() {
								buf := make([]byte, 50_000)
								for i := range buf {
									buf[i] = byte(i % 251)
								}
								for !stop.Load() {
									if _, err := conn.Write(buf); err != nil {
										break
									}
								}
								conn.CloseWrite()
							})
							got := make([]byte, 50_000)
							for {
								if _, err := io.ReadFull(conn, got); err != nil {
									break
								}
								for i := range got {
									if got[i] != byte(i%251) {
										t.Errorf("wrong byte in a stream")
										stop.Store(true)
										break
									}
								}
								rounds[side].Add(1)
							}
							conn.Close()
						}
					})
				}
			}
			waitFor := func(n int64) {
				for side := range rounds {
					was := rounds[side].Load()
					for rounds[side].Load() < was+n && ctx.Err() == nil {
						runtime.Gosched()
						<-time.After(time.Millisecond)
					}
				}
				if ctx.Err() != nil {
					t.Error("no stream runs any more")
				}
			}
			for range 10 {
				waitFor(3)
				c.act(r, &host, &guest)
			}
			waitFor(3)
			stop.Store(true)
			host.Close()
			guest.Close()
			wg.Wait()
		})
	}
}
