package peer

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
	"sync/atomic"
	"testing"

	"github.com/drafter-vm/drafter/internal/testcert"
	"github.com/drafter-vm/drafter/internal/testssh"
	"github.com/drafter-vm/drafter/pkg/migrate"
	"github.com/drafter-vm/drafter/pkg/transport"
)

// way is how two peers get at each other.
type way struct {
	name           string
	server, client transport.Options
	listen         string
	dial           func(l net.Listener) string // address for the client
	stranger       *transport.Options          // a client that the transport refuses; nil: it refuses nobody
	strangers      *transport.Options          // the server's, for it; nil: the same
	identity       string                      // a name of the client; empty: it has none
	once           bool                        // there is no second connection
}

func ways(t *testing.T) []way {
	t.Helper()
	ours, theirs := testcert.New(t), testcert.New(t)
	server, serverPin := ours.Issue(t, nil, "127.0.0.1")
	client, _ := ours.Issue(t, nil, "spiffe://example.org/b")
	hostile, _ := theirs.Issue(t, nil, "spiffe://example.org/b")
	hostile.Authorities, hostile.Allow = "", []string{serverPin}
	key, otherKey := transport.Options{Key: strings.Repeat("1f", 32)}, transport.Options{Key: strings.Repeat("2e", 32)}
	to := func(scheme string) func(net.Listener) string {
		return func(l net.Listener) string { return scheme + l.Addr().String() }
	}
	sshd := testssh.New(t)
	socket := "unix://" + filepath.Join(t.TempDir(), "s")
	return []way{
		{name: "tcp", listen: "127.0.0.1:0", dial: to("")},
		{name: "tls", server: server, client: client, listen: "tls://127.0.0.1:0", dial: to("tls://"), stranger: &hostile, identity: "spiffe://example.org/b"},
		{name: "psk", server: key, client: key, listen: "psk://127.0.0.1:0", dial: to("psk://"), stranger: &otherKey},
		{name: "unix", listen: socket, dial: func(net.Listener) string { return socket }, stranger: new(transport.Options),
			strangers: &transport.Options{Allow: []string{"uid:4000000000"}}, identity: fmt.Sprintf("uid:%d", os.Getuid())},
		{name: "ws", listen: "ws://127.0.0.1:0/vm", dial: func(l net.Listener) string { return "ws://" + l.Addr().String() + "/vm" }},
		{name: "wss", server: server, client: client, listen: "wss://127.0.0.1:0", dial: to("wss://"), stranger: &hostile, identity: "spiffe://example.org/b"},
		{name: "quic", server: server, client: client, listen: "quic://127.0.0.1:0", dial: to("quic://"), stranger: &hostile, identity: "spiffe://example.org/b"},
		{name: "ssh", listen: "127.0.0.1:0", dial: func(l net.Listener) string {
			return fmt.Sprintf("ssh://somebody@%s/%s?config=%s", sshd.Addr, l.Addr(), sshd.Config)
		}},
		{name: "exec", listen: "127.0.0.1:0", dial: func(l net.Listener) string { // as ssh would
			_, port, _ := net.SplitHostPort(l.Addr().String())
			return fmt.Sprintf("exec:exec bash -c 'exec 3<>/dev/tcp/127.0.0.1/%s; cat <&3 & exec cat >&3'", port)
		}},
		{name: "stdio", listen: "stdio:", dial: func(net.Listener) string { return "stdio:" }, once: true},
	}
}

// meeting is a source that listens, and a destination that dials.
type meeting struct {
	way
	pkg   string
	lobby *Lobby
	find  func(context.Context) ([]io.ReadWriter, error) // dials
	found atomic.Int32                                   // times
}

func (w way) meet(t *testing.T) *meeting {
	t.Helper()
	if w.once {
		a, b := net.Pipe()
		w.server.Stdio, w.client.Stdio = a, b
	}
	l, err := w.server.Listen(t.Context(), w.listen)
	if err != nil {
		t.Fatal(err)
	}
	m := &meeting{way: w, pkg: newPackage(t), lobby: NewLobby(l, quiet)}
	t.Cleanup(func() { m.lobby.Close() })
	address, streams := w.dial(l), 3
	if !transport.Parallel(address) {
		streams = 1
	}
	m.find = func(ctx context.Context) ([]io.ReadWriter, error) {
		m.found.Add(1)
		return DialStreams(ctx, streams, func(ctx context.Context) (net.Conn, error) { return m.client.Dial(ctx, address) })
	}
	return m
}

// source has a VM that can be had.
func (m *meeting) source(t *testing.T, may Authorize) (sent <-chan error) {
	t.Helper()
	mounter, err := OpenMounter(t.Context(), MounterConfig{Dir: m.pkg, Mount: filepath.Join(t.TempDir(), "mnt"), Logger: quiet, FindDestination: m.lobby.Rejoin, Authorize: may})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { mounter.Close() })
	done := make(chan error, 1)
	go func() {
		select {
		case a := <-m.lobby.New:
			err := a.Err
			if err == nil {
				_, err = mounter.Send(t.Context(), a.Streams)
			}
			done <- err
		case <-t.Context().Done():
			done <- t.Context().Err()
		}
	}()
	return done
}

// TestTransports moves VMs over each transport, with and without the link being cut, and refuses peers.
func TestTransports(t *testing.T) {
	needFUSE(t)
	for _, w := range ways(t) {
		t.Run(w.name, func(t *testing.T) {
			t.Run("plain move", func(t *testing.T) {
				m := w.meet(t)
				asked := make(chan Request, 2)
				ask := func(_ context.Context, r Request) error { asked <- r; return nil }
				sent := m.source(t, ask)
				streams, err := m.find(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				term := Terminator{Dir: filepath.Join(t.TempDir(), "out"), Logger: quiet, Authorize: ask}
				if _, _, err := term.Receive(t.Context(), streams); err != nil {
					t.Fatal(err)
				}
				if err := <-sent; err != nil {
					t.Fatal(err)
				}
				sameVM(t, term.Dir, newPackage(t))
				there, here := <-asked, <-asked
				if !there.Give || here.Give || here.Description.MemorySize != 2<<20 || here.Migration == "" || len(here.Devices) != 4 {
					t.Errorf("asked were %+v, %+v", there, here)
				}
				if w.identity != "" && !there.Peer.Is(w.identity) || w.identity == "" && len(there.Peer.Names) > 0 {
					t.Errorf("the destination is said to be %v", there.Peer)
				}
			})
			t.Run("cut and reconnect", func(t *testing.T) {
				if w.once {
					t.Skip("there is one connection of its kind")
				}
				m := w.meet(t)
				var mu sync.Mutex // guards asked
				var asked []Request
				ask := func(_ context.Context, r Request) error {
					mu.Lock()
					defer mu.Unlock()
					asked = append(asked, r)
					return nil
				}
				sent := m.source(t, ask)
				streams, err := m.find(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				term := Terminator{Dir: filepath.Join(t.TempDir(), "out"), Logger: quiet, FindSource: m.find, Authorize: ask, Progress: func(p migrate.Progress) {
					if p.State == migrate.DestinationStarting.String() {
						closeAll(streams)
					}
				}}
				if _, _, err := term.Receive(t.Context(), streams); err != nil {
					t.Fatal(err)
				}
				if err := <-sent; err != nil {
					t.Fatal(err)
				}
				if m.found.Load() != 2 {
					t.Errorf("they have met %d times, want twice", m.found.Load())
				}
				// Each side is asked each time about who is there, and knows of which migration that is.
				var gives, takes []Request
				for _, r := range asked {
					if r.Give {
						gives = append(gives, r)
					} else {
						takes = append(takes, r)
					}
				}
				if len(gives) != 2 || len(takes) != 2 || gives[0].Rejoin || takes[0].Rejoin || !gives[1].Rejoin || !takes[1].Rejoin {
					t.Errorf("the source was asked %+v, the destination %+v: want each twice, the second time to go on", gives, takes)
				} else if id := takes[0].Migration; id == "" || takes[1].Migration != id || gives[1].Migration != id || strings.Contains(id, ".") {
					t.Errorf("it was migration %q, and is %q and %q", id, gives[1].Migration, takes[1].Migration)
				}
				sameVM(t, term.Dir, newPackage(t))
			})
			t.Run("refused by the transport", func(t *testing.T) {
				if w.stranger == nil {
					t.Skip("it refuses nobody: see what the program decides")
				}
				x := w
				if x.strangers != nil {
					x.server = *x.strangers
				}
				m := x.meet(t)
				sent := m.source(t, nil)
				good := m.client
				m.client = *w.stranger
				streams, err := m.find(t.Context())
				if err == nil {
					term := Terminator{Dir: filepath.Join(t.TempDir(), "out"), Logger: quiet}
					if _, _, err = term.Receive(t.Context(), streams); err == nil {
						t.Error("a stranger has got the VM")
					}
					if _, err := os.Stat(term.Dir); !errors.Is(err, os.ErrNotExist) {
						t.Error("something was made for what did not come")
					}
				}
				t.Logf("the stranger hears: %v", err)
				select {
				case err := <-sent:
					t.Fatalf("the source heard of it: %v", err)
				default:
				}
				if x.strangers != nil {
					return // nobody is let in there
				}
				m.client = good
				if streams, err = m.find(t.Context()); err != nil {
					t.Fatal(err)
				}
				if _, _, err := (Terminator{Dir: filepath.Join(t.TempDir(), "out"), Logger: quiet}).Receive(t.Context(), streams); err != nil {
					t.Errorf("after a stranger, a friend: %v", err)
				}
				if err := <-sent; err != nil {
					t.Error(err)
				}
			})
			for _, whose := range []string{"source", "destination"} {
				t.Run("refused by the "+whose, func(t *testing.T) {
					m := w.meet(t)
					no := func(context.Context, Request) error { return errors.New("not on a Monday") }
					term := Terminator{Dir: filepath.Join(t.TempDir(), "out"), Logger: quiet}
					var may Authorize
					if whose == "source" {
						may = no
					} else {
						term.Authorize = no
					}
					sent := m.source(t, may)
					streams, err := m.find(t.Context())
					if err != nil {
						t.Fatal(err)
					}
					_, _, there := term.Receive(t.Context(), streams)
					here := <-sent
					refuses, hears := there, here
					if whose == "source" {
						refuses, hears = here, there
					}
					if !errors.Is(refuses, ErrUnauthorized) || !strings.Contains(refuses.Error(), "Monday") {
						t.Errorf("the %s says %v", whose, refuses)
					}
					if hears == nil || strings.Contains(hears.Error(), "Monday") || !strings.Contains(hears.Error(), "this peer") {
						t.Errorf("the other side hears %v", hears)
					}
					if _, err := os.Stat(term.Dir); !errors.Is(err, os.ErrNotExist) {
						t.Error("something was made for what did not come")
					}
				})
			}
		})
	}
}
