package transport_test

import (
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
