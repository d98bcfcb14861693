package transport_test

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/drafter-vm/drafter/pkg/transport"
)

// resources counts our goroutines and descriptors.
func resources(t *testing.T) (goroutines, descriptors int) {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return runtime.NumGoroutine(), len(fds)
}

// TestWebSocketMute: of those who connect and say nothing, no more than some are there at a time, and they keep nobody out.
func TestWebSocketMute(t *testing.T) {
	const bound, more = 1024, 50 // the first is that of clients on their way
	for _, k := range kinds(t) {
		if !strings.HasPrefix(k.name, "ws") {
			continue
		}
		t.Run(k.name, func(t *testing.T) {
			l, err := k.server.Listen(t.Context(), k.address)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			var all []net.Conn
			for range bound + more {
				conn, err := net.Dial("tcp", l.Addr().String())
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				all = append(all, conn)
			}
			go func() { // until l is closed
				for {
					if _, err := l.Accept(); err != nil {
						return
					}
				}
			}()
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second) // before any has to go by itself
			defer cancel()
			conn, err := k.client.Dial(ctx, dialable(l, k.address))
			if err != nil {
				t.Fatalf("who says something is kept out: %v", err)
			}
			conn.Close()
			closed := 0
			for _, conn := range all[:more] {
				conn.SetReadDeadline(time.Now().Add(5 * time.Second))
				if _, err := conn.Read(make([]byte, 1)); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
					closed++
				}
			}
			if closed != more {
				t.Errorf("%d of the %d that came first are closed", closed, more)
			}
		})
	}
}

// TestWebSocketLeavesNothing dials many times, a server that has no WebSocket and one that has.
func TestWebSocketLeavesNothing(t *testing.T) {
	const attempts = 50
	s := httptest.NewServer(http.NotFoundHandler())
	defer s.Close()
	l, err := transport.Listen(t.Context(), "ws://127.0.0.1:0/")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() { // until l is closed
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			conn.Close()
		}
	}()
	for _, tt := range []struct {
		name, address string
		refused       bool
	}{
		{"refused", "ws://" + s.Listener.Addr().String(), true},
		{"closed", "ws://" + l.Addr().String(), false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dial := func() {
				conn, err := transport.Dial(t.Context(), tt.address)
				if err == nil {
					conn.Close()
				}
				if tt.refused != (err != nil && strings.Contains(err.Error(), "404")) {
					t.Fatal(err)
				}
			}
			dial() // what the first has begun may stay, such as the runtime's
			goroutines, descriptors := resources(t)
			for range attempts {
				dial()
			}
			few := attempts / 5 // may be on their way to the end
			now, open := resources(t)
			for end := time.Now().Add(5 * time.Second); (now > goroutines+few || open > descriptors+few) && time.Now().Before(end); now, open = resources(t) {
				time.Sleep(10 * time.Millisecond)
			}
			if now > goroutines+few || open > descriptors+few {
				t.Errorf("%d goroutines and %d descriptors after %d dials, %d and %d before", now, open, attempts, goroutines, descriptors)
			}
		})
	}
}
