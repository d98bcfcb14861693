package transport_test

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/drafter-vm/drafter/internal/testcert"
	"github.com/drafter-vm/drafter/pkg/transport"
)

// kind is one way to connect.
type kind struct {
	name           string
	server, client transport.Options
	address        string
}

func kinds(t testing.TB) []kind {
	t.Helper()
	a := testcert.New(t)
	there, _ := a.Issue(t, nil, "127.0.0.1", "::1")
	here, _ := a.Issue(t, nil, "spiffe://example.org/host/1")
	key := transport.Options{Key: strings.Repeat("0123456789abcdef", 4)}
	return []kind{
		{"tcp", transport.Options{}, transport.Options{}, "127.0.0.1:0"},
		{"tcp, named", transport.Options{}, transport.Options{}, "tcp://[::1]:0"},
		{"tls", there, here, "tls://127.0.0.1:0"},
		{"psk", key, key, "psk://127.0.0.1:0"},
		{"unix", transport.Options{}, transport.Options{}, "unix://" + filepath.Join(t.TempDir(), "s")},
		{"ws", transport.Options{}, transport.Options{}, "ws://127.0.0.1:0/a/path"},
		{"wss", there, here, "wss://127.0.0.1:0"},
		{"quic", there, here, "quic://127.0.0.1:0"},
	}
}

// dialable is the address at which a listener on address is.
func dialable(l net.Listener, address string) string {
	if l.Addr().Network() == "unix" {
		return address
	}
	scheme, rest, ok := strings.Cut(address, "://")
	if !ok {
		return l.Addr().String()
	}
	_, path, hasPath := strings.Cut(rest, "/")
	address = scheme + "://" + l.Addr().String()
	if hasPath {
		address += "/" + path
	}
	return address
}

// accept accepts a connection and makes sure of it.
func accept(ctx context.Context, l net.Listener) (net.Conn, transport.Identity, error) {
	conn, err := l.Accept()
	if err != nil {
		return nil, transport.Identity{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	who, err := transport.Handshake(ctx, conn)
	if err != nil {
		conn.Close()
		return nil, who, err
	}
	return conn, who, nil
}

// connect connects both ends.
func connect(t testing.TB, k kind) (dialled, accepted net.Conn, who transport.Identity) {
	t.Helper()
	l, err := k.server.Listen(t.Context(), k.address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	type arrival struct {
		conn net.Conn
		who  transport.Identity
		err  error
	}
	arrived := make(chan arrival, 1)
	go func() {
		conn, who, err := accept(t.Context(), l)
		arrived <- arrival{conn, who, err}
	}()
	dialled, err = k.client.Dial(t.Context(), dialable(l, k.address))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dialled.Close() })
	if _, err := dialled.Write([]byte("!")); err != nil { // QUIC tells of a stream with its first bytes
		t.Fatal(err)
	}
	a := <-arrived
	if a.err != nil {
		t.Fatal(a.err)
	}
	t.Cleanup(func() { a.conn.Close() })
	if _, err := io.ReadFull(a.conn, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	return dialled, a.conn, a.who
}

// TestKinds sends much both ways at once over each kind, in pieces of all sizes.
func TestKinds(t *testing.T) {
	for _, k := range kinds(t) {
		t.Run(k.name, func(t *testing.T) {
			dialled, accepted, _ := connect(t, k)
			const size = 5 << 20
			content := make([]byte, size)
			rng := rand.New(rand.NewPCG(1, 2))
			for i := range content {
				content[i] = byte(rng.Uint32())
			}
			errs := make(chan error, 4)
			for _, end := range []net.Conn{dialled, accepted} {
				rng := rand.New(rand.NewPCG(3, 4))
				go func() {
					for p := content; len(p) > 0; {
						n, err := end.Write(p[:min(len(p), 1+rng.IntN(200<<10))])
						if err != nil {
							errs <- fmt.Errorf("write: %w", err)
							return
						}
						p = p[n:]
					}
					errs <- nil
				}()
				go func() {
					got := make([]byte, size)
					if _, err := io.ReadFull(end, got); err != nil {
						errs <- fmt.Errorf("read: %w", err)
					} else if !bytes.Equal(got, content) {
						errs <- errors.New("what came is not what was sent")
					} else {
						errs <- nil
					}
				}()
			}
			for range 4 {
				if err := <-errs; err != nil {
					t.Fatal(err)
				}
			}
			if dialled.RemoteAddr() == nil || dialled.LocalAddr() == nil || accepted.RemoteAddr() == nil {
				t.Error("an end has no address")
			}
		})
	}
}

// TestClose closes one end after it has written: all of that arrives, and then the end. Its own Read ends at once.
func TestClose(t *testing.T) {
	for _, k := range kinds(t) {
		t.Run(k.name, func(t *testing.T) {
			dialled, accepted, _ := connect(t, k)
			const size = 1 << 20
			reading := make(chan error, 1)
			go func() {
				_, err := dialled.Read(make([]byte, 1))
				reading <- err
			}()
			read := make(chan int64, 1)
			go func() {
				n, _ := io.Copy(io.Discard, accepted) // some end in their own way
				read <- n
			}()
			if _, err := dialled.Write(make([]byte, size)); err != nil {
				t.Fatal(err)
			}
			dialled.Close()
			select {
			case err := <-reading:
				if err == nil {
					t.Error("a Read of what was closed succeeds")
				}
			case <-time.After(10 * time.Second):
				t.Error("a Read of what was closed goes on")
			}
			select {
			case n := <-read:
				if n != size {
					t.Errorf("%d bytes have come, of %d", n, size)
				}
			case <-time.After(10 * time.Second):
				t.Fatal("the other end does not see the end")
			}
			if _, err := dialled.Write([]byte("x")); err == nil {
				t.Error("a Write to what was closed succeeds")
			}
		})
	}
}

// Both ends of a protected channel have the same name for it, and no other channel has it.
func TestChannelBinding(t *testing.T) {
	binding := func(c net.Conn) []byte {
		if b, ok := c.(interface{ ChannelBinding() []byte }); ok {
			return b.ChannelBinding()
		}
		return nil
	}
	seen := make(map[string]string)
	for range 2 {
		for _, k := range kinds(t) {
			dialled, accepted, _ := connect(t, k)
			a, b := binding(dialled), binding(accepted)
			if want := k.name == "tls" || k.name == "psk" || k.name == "quic"; want != (len(a) == 32) || !bytes.Equal(a, b) {
				t.Errorf("%s: %x and %x", k.name, a, b)
			}
			if other, ok := seen[string(a)]; ok && a != nil {
				t.Errorf("%s and %s have both %x", k.name, other, a)
			}
			seen[string(a)] = k.name
		}
	}
	k := kinds(t)[2]
	l, err := k.server.Listen(t.Context(), k.address)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go net.Dial("tcp", l.Addr().String())
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if b := binding(conn); b != nil {
		t.Errorf("before the handshake: %x", b)
	}
}

// TestIdentities looks at who is said to be at the other end.
func TestIdentities(t *testing.T) {
	for _, k := range kinds(t) {
		t.Run(k.name, func(t *testing.T) {
			dialled, _, who := connect(t, k)
			is := map[string]string{"tls": "spiffe://example.org/host/1", "wss": "spiffe://example.org/host/1", "quic": "spiffe://example.org/host/1",
				"unix": fmt.Sprintf("uid:%d", os.Getuid())}[k.name]
			if is != "" && !who.Is(is) {
				t.Errorf("the client is %v, want %q", who, is)
			}
			if is == "" && len(who.Names) > 0 {
				t.Errorf("the client is %v, but nobody proved that", who)
			}
			server, err := transport.Handshake(t.Context(), dialled) // once more says it again
			if err != nil {
				t.Fatal(err)
			}
			if k.server.Certificate != "" && !server.Is("127.0.0.1") {
				t.Errorf("the server is %v", server)
			}
		})
	}
}

// TestCertificates has each of those who must not get in try.
func TestCertificates(t *testing.T) {
	ours, theirs := testcert.New(t), testcert.New(t)
	server, serverPin := ours.Issue(t, nil, "127.0.0.1", "host.example.org", "spiffe://example.org/host/0")
	client, clientPin := ours.Issue(t, nil, "client.example.org", "spiffe://example.org/host/1")
	wild, _ := ours.Issue(t, nil, "*.example.org")
	elsewhere, _ := ours.Issue(t, nil, "10.1.2.3")
	past := func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }
	future := func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) }
	expired, expiredPin := ours.Issue(t, past, "127.0.0.1")
	early, _ := ours.Issue(t, future, "127.0.0.1")
	hostile, hostilePin := theirs.Issue(t, nil, "127.0.0.1", "client.example.org", "spiffe://example.org/host/1")
	hostile.Authorities = ours.File
	onlyServer, _ := ours.Issue(t, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }, "127.0.0.1")
	allow := func(o transport.Options, names ...string) transport.Options { o.Allow = names; return o }
	pinned := func(o transport.Options, names ...string) transport.Options {
		o.Authorities = ""
		return allow(o, names...)
	}
	anyHost := func(o transport.Options) transport.Options { o.AnyHost = true; return o }
	for _, tt := range []struct {
		name           string
		server, client transport.Options
		refused        string // by whom; empty: nobody
		says           string
	}{
		{"match", server, client, "", ""},
		{"match by URI", allow(server, "spiffe://example.org/host/1"), allow(client, "spiffe://example.org/host/0"), "", ""},
		{"match by many URIs", allow(server, "spiffe://example.org/host/*"), client, "", ""},
		{"match by host", allow(server, "CLIENT.example.org"), client, "", ""},
		{"match by wildcard", allow(server, "other.example.org"), wild, "", ""},
		{"match by pin", pinned(server, clientPin), pinned(client, serverPin), "", ""},
		{"match of one by pin", allow(server, hostilePin), pinned(hostile, serverPin), "", ""},
		{"client is another", allow(server, "spiffe://example.org/host/2"), client, "server", "none of those that are allowed"},
		{"client begins like another", allow(server, "spiffe://example.org/host/10", "spiffe://example.org/ho/*"), client, "server", "none of those that are allowed"},
		{"client is above the wildcard", allow(server, "a.b.example.org"), wild, "server", "none of those that are allowed"},
		{"server is another", server, allow(client, "spiffe://example.org/host/2"), "client", "none of those that are allowed"},
		{"server is on another host", elsewhere, client, "client", "allow it by name"},
		{"server is on another host, as it may be", elsewhere, anyHost(client), "", ""},
		{"hostile server, on any host", hostile, anyHost(client), "client", "unknown authority"},
		{"server is another, on any host", server, anyHost(allow(client, "spiffe://example.org/host/2")), "client", "none of those that are allowed"},
		{"client has another pin", pinned(server, hostilePin), pinned(client, serverPin), "server", "none of those that are pinned"},
		{"server has another pin", pinned(server, clientPin), pinned(client, hostilePin), "client", "none of those that are pinned"},
		{"expired client", server, expired, "server", "valid from"},
		{"expired client that is pinned", pinned(server, expiredPin), pinned(expired, serverPin), "server", "valid from"},
		{"expired server", expired, client, "client", "valid from"},
		{"client from the future", server, early, "server", "valid from"},
		{"hostile client", server, hostile, "server", "unknown authority"},
		{"hostile server", hostile, client, "client", "unknown authority"},
		{"client with a server's certificate", server, onlyServer, "server", "incompatible key usage"},
	} {
		for _, scheme := range []string{"tls://127.0.0.1:0", "wss://127.0.0.1:0", "quic://127.0.0.1:0"} {
			t.Run(tt.name+"/"+scheme[:3], func(t *testing.T) {
				l, err := tt.server.Listen(t.Context(), scheme)
				if err != nil {
					t.Fatal(err)
				}
				defer l.Close()
				accepted := make(chan error, 1)
				go func() {
					conn, _, err := accept(t.Context(), l)
					if err == nil {
						_, err = conn.Read(make([]byte, 1))
						conn.Write([]byte("secret"))
						conn.Close()
					}
					accepted <- err
				}()
				conn, err := tt.client.Dial(t.Context(), dialable(l, scheme))
				if err == nil {
					defer conn.Close()
					conn.SetDeadline(time.Now().Add(10 * time.Second))
					conn.Write([]byte("!"))
					var got []byte
					if got, err = io.ReadAll(conn); len(got) > 0 {
						err = nil
						if tt.refused != "" {
							t.Errorf("who was to be refused was told %q", got)
						}
					}
				}
				switch tt.refused {
				case "":
					if err != nil {
						t.Fatalf("refused: %v", err)
					}
					if err := <-accepted; err != nil {
						t.Errorf("the server refuses: %v", err)
					}
				case "client":
					if !errors.Is(err, transport.ErrRefused) && scheme[:3] != "qui" || err == nil || !strings.Contains(err.Error(), tt.says) {
						t.Errorf("the client says %v, want %q", err, tt.says)
					}
				case "server":
					if err == nil {
						t.Error("the client does not learn that it was refused")
					}
					if scheme[:3] != "tls" { // there it is refused before there is anything to accept
						break
					}
					if err := <-accepted; !errors.Is(err, transport.ErrRefused) || !strings.Contains(err.Error(), tt.says) {
						t.Errorf("the server says %v, want %q", err, tt.says)
					}
				}
			})
		}
	}
}
