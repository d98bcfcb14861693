package peer

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/drafter-vm/drafter/pkg/migrate"
	"github.com/drafter-vm/drafter/pkg/transport"
	"github.com/drafter-vm/drafter/pkg/wire"
)

func newTestLobby(t *testing.T, patience time.Duration) *Lobby {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b := newLobby(l, wire.RoleDestination, nil, patience)
	t.Cleanup(func() { b.Close() })
	return b
}

func knock(t *testing.T, b *Lobby, what []byte) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", b.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if _, err := conn.Write(what); err != nil {
		t.Fatal(err)
	}
	return conn
}

func destination(session uint64, stream, of uint8, purpose wire.Purpose) []byte {
	return wire.Preface{Newest: 2, Oldest: 1, Role: wire.RoleDestination, Purpose: purpose, Stream: stream, Streams: of, Session: session}.Append(nil)
}

// TestLobbySorts brings the streams of three sessions mixed up.
func TestLobbySorts(t *testing.T) {
	b := newTestLobby(t, time.Minute)
	again := make(chan []io.ReadWriter)
	go func() {
		streams, err := b.Rejoin(t.Context())
		if err != nil {
			t.Error(err)
		}
		again <- streams
	}()
	knock(t, b, destination(1, 1, 2, wire.PurposeMigrate))
	knock(t, b, destination(2, 0, 2, wire.PurposeRejoin))
	old := wire.Preface{Newest: 1, Oldest: 1, Role: wire.RoleDestination}.Append(nil)
	knock(t, b, old)
	if a := <-b.New; a.Err != nil || len(a.Streams) != 1 {
		t.Fatalf("one of version 1 is %+v", a)
	}
	knock(t, b, destination(2, 1, 2, wire.PurposeRejoin))
	if streams := <-again; len(streams) != 2 {
		t.Errorf("%d streams came again, want 2", len(streams))
	}
	knock(t, b, append(destination(1, 0, 2, wire.PurposeMigrate), "more"...))
	a := <-b.New
	if a.Err != nil || len(a.Streams) != 2 {
		t.Fatalf("the first session is %+v", a)
	}
	// What was read to find that out is still there, and so is what follows it.
	for n, s := range a.Streams {
		p, err := wire.ReadPreface(s)
		if err != nil || int(p.Stream) != n || p.Session != 1 {
			t.Errorf("stream %d begins with %+v, %v", n, p, err)
		}
	}
	more := make([]byte, 4)
	if _, err := io.ReadFull(a.Streams[0], more); err != nil || string(more) != "more" {
		t.Errorf("and goes on with %q, %v", more, err)
	}
}

// TestLobbyStrangers checks that whoever cannot receive is told from those who can, and learns whom it has met.
func TestLobbyStrangers(t *testing.T) {
	b := newTestLobby(t, time.Minute)
	for _, tt := range []struct {
		name string
		says []byte
	}{
		{"HTTP", []byte("GET / HTTP/1.0\r\n\r\n")},
		{"a source", wire.Preface{Newest: 2, Oldest: 1, Role: wire.RoleSource, Streams: 1}.Append(nil)},
		{"stream 3 of 2", destination(5, 3, 2, wire.PurposeMigrate)},
		{"too many streams", destination(5, 3, 200, wire.PurposeMigrate)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			conn := knock(t, b, tt.says)
			if a := <-b.New; !errors.Is(a.Err, ErrStranger) || a.From == nil || len(a.Streams) > 0 {
				t.Errorf("it is %+v, want a stranger", a)
			}
			if said, _ := io.ReadAll(conn); !strings.HasPrefix(string(said), wire.Magic) { // the end may be a reset
				t.Errorf("it was told %q", said)
			}
		})
	}
}

// TestLobbyBusy checks that a peer for which nobody has time is told so.
func TestLobbyBusy(t *testing.T) {
	b := newTestLobby(t, 50*time.Millisecond)
	streams, err := DialStreams(t.Context(), 3, func(ctx context.Context) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp", b.Addr().String())
	})
	if err != nil {
		t.Fatal(err)
	}
	defer Arrival{Streams: streams}.Close()
	_, err = migrate.Receive(t.Context(), streams, migrate.DestinationConfig{Target: &target{}})
	if err == nil || !strings.Contains(err.Error(), "this peer is busy: try again") {
		t.Errorf("it was told: %v", err)
	}
}

// TestLobbyEnds checks that nobody waits for ever: for streams that do not come, for someone to take them, and for a word.
func TestLobbyEnds(t *testing.T) {
	b := newTestLobby(t, 50*time.Millisecond)
	for _, says := range [][]byte{destination(1, 0, 2, wire.PurposeMigrate), destination(2, 0, 1, wire.PurposeMigrate), destination(3, 0, 1, wire.PurposeRejoin), nil} {
		conn := knock(t, b, says)
		if _, err := io.ReadAll(conn); err != nil && !strings.Contains(err.Error(), "reset") {
			t.Errorf("%q: %v", says, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := b.Rejoin(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("Rejoin: %v", err)
	}
	for n := -1; n != 0; { // those who are gone are no longer counted
		b.mu.Lock()
		n = b.guests.Len()
		b.mu.Unlock()
		time.Sleep(time.Millisecond)
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Rejoin(t.Context()); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Rejoin after Close: %v", err)
	}
}

// TestDialSilent dials what accepts connections and says nothing: the error says who that is.
func TestDialSilent(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	key := transport.Options{Key: strings.Repeat("ab", 32)}
	address := "psk://" + l.Addr().String()
	dial := func(ctx context.Context) (net.Conn, error) { return key.Dial(ctx, address) }
	_, err = dialStreams(t.Context(), 3, 50*time.Millisecond, dial)
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), address) || !strings.Contains(err.Error(), "nobody answers there within 50ms") {
		t.Errorf("it ends with %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := dialStreams(ctx, 3, time.Minute, dial); !errors.Is(err, context.DeadlineExceeded) || strings.Contains(err.Error(), "nobody answers") {
		t.Errorf("for a caller who does not wait that long it ends with %v", err)
	}
}

// TestLobbyFull: those who only hold places, however many, keep nobody out.
func TestLobbyFull(t *testing.T) {
	for name, says := range map[string]func(n int) []byte{
		"mute":                     func(int) []byte { return nil },
		"streams that are missing": func(n int) []byte { return destination(uint64(n), 0, 2, wire.PurposeMigrate) },
		"nobody looks for them":    func(n int) []byte { return destination(uint64(n), 0, 1, wire.PurposeRejoin) },
	} {
		t.Run(name, func(t *testing.T) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			b := NewLobby(l, quiet)
			defer b.Close()
			held := make([]net.Conn, 0, 2*maxGuests)
			defer func() {
				for _, c := range held {
					c.Close()
				}
			}()
			flood := func(n int) {
				for range n {
					c, err := net.Dial("tcp", l.Addr().String())
					if err != nil {
						t.Fatal(err)
					}
					_, _ = c.Write(says(1000 + len(held))) // of one that had to make room it fails
					held = append(held, c)
				}
			}
			flood(maxGuests + 100)
			for range 3 {
				conn := knock(t, b, destination(1, 0, 1, wire.PurposeMigrate))
				defer conn.Close()
				flood(100)
				select {
				case a := <-b.New:
					if a.Err != nil {
						t.Errorf("a peer is refused: %v", a.Err)
					}
					a.Close()
				case <-time.After(handshakeTime / 4): // before any of the others has to go by itself
					t.Fatal("a peer does not come in")
				}
			}
			b.mu.Lock()
			defer b.mu.Unlock()
			if n, groups := b.guests.Len(), len(b.groups); n > maxGuests || groups > n {
				t.Errorf("%d connections are there, of %d incomplete sessions: at most %d are allowed", n, groups, maxGuests)
			}
		})
	}
}

// TestLobbyTaken: what was taken is its taker's, also when the lobby is closed at once.
func TestLobbyTaken(t *testing.T) {
	for range 100 {
		b := newTestLobby(t, time.Minute)
		conn := knock(t, b, destination(1, 0, 1, wire.PurposeMigrate))
		a := <-b.New
		if err := b.Close(); err != nil || a.Err != nil {
			t.Fatal(err, a.Err)
		}
		if _, err := wire.ReadPreface(a.Streams[0]); err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if _, err := a.Streams[0].Read(make([]byte, 1)); err != nil {
			t.Fatalf("it was closed: %v", err)
		}
		a.Close()
		conn.Close()
	}
}
