package transport_test

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/drafter-vm/drafter/internal/testcert"
	"github.com/drafter-vm/drafter/pkg/transport"
	"github.com/drafter-vm/drafter/pkg/wire"
)

// greet accepts connections as a peer's lobby does, and tells those that are no peers whom they have met.
func greet(t *testing.T, l net.Listener) {
	done := make(chan struct{})
	t.Cleanup(func() { l.Close(); <-done })
	go func() {
		defer close(done)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			conn.SetDeadline(time.Now().Add(10 * time.Second))
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
			if _, err := transport.Handshake(ctx, conn); err == nil {
				if _, err := wire.ReadPreface(conn); err != nil {
					conn.Write(wire.Preface{Newest: 1, Oldest: 1, Role: wire.RoleSource}.Append(nil))
				}
			}
			cancel()
			conn.Close()
		}
	}()
}

// hear dials, and introduces itself: the error is what a peer would say.
func hear(t *testing.T, o transport.Options, address string) error {
	t.Helper()
	conn, err := o.Dial(t.Context(), address)
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	conn.Write(wire.Preface{Newest: 1, Oldest: 1, Role: wire.RoleDestination}.Append(nil))
	_, err = wire.ReadPreface(conn)
	return err
}

// TestOtherScheme dials listeners with another scheme than theirs: the error says that this may be it.
func TestOtherScheme(t *testing.T) {
	a := testcert.New(t)
	with, _ := a.Issue(t, nil, "127.0.0.1")
	with.Key = strings.Repeat("ab", 32)
	for _, tt := range []struct{ listens, dials, want string }{
		{"tls", "tcp", "dialled in another way"},
		{"psk", "tcp", "dialled in another way"},
		{"tcp", "tls", "another scheme than tls://"},
		{"psk", "tls", "another scheme than tls://"},
		{"wss", "tls", "another scheme than tls://"},
		{"tcp", "ws", "another scheme than ws://"},
		{"tls", "ws", "another scheme than ws://"},
		{"psk", "ws", "another scheme than ws://"},
		{"tcp", "wss", "another scheme than wss://"},
		{"tcp", "psk", "not speak psk"},
	} {
		t.Run(tt.dials+" to "+tt.listens, func(t *testing.T) {
			l, err := with.Listen(t.Context(), tt.listens+"://127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			greet(t, l)
			if err := hear(t, with, tt.dials+"://"+l.Addr().String()); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want %q", err, tt.want)
			}
		})
	}
}

// TestCertificateRefused has the other side refuse what it is shown: the error says so, and which file that is.
func TestCertificateRefused(t *testing.T) {
	ours, theirs := testcert.New(t), testcert.New(t)
	server, _ := ours.Issue(t, nil, "127.0.0.1")
	client, _ := theirs.Issue(t, nil, "127.0.0.1")
	client.Authorities = ours.File
	for _, scheme := range []string{"tls", "wss", "quic"} {
		t.Run(scheme, func(t *testing.T) {
			l, err := server.Listen(t.Context(), scheme+"://127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			greet(t, l)
			err = hear(t, client, scheme+"://"+l.Addr().String())
			if err == nil || !strings.Contains(err.Error(), "has refused the certificate") || !strings.Contains(err.Error(), client.Certificate) || strings.Contains(err.Error(), "another scheme") {
				t.Errorf("error %v, want that %q was refused", err, client.Certificate)
			}
		})
	}
	t.Run("by who dials", func(t *testing.T) {
		l, err := client.Listen(t.Context(), "tls://127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		refused := make(chan error, 1)
		go func() {
			_, _, err := accept(t.Context(), l)
			refused <- err
		}()
		if _, err := client.Dial(t.Context(), "tls://"+l.Addr().String()); !errors.Is(err, transport.ErrRefused) {
			t.Errorf("the client says %v", err)
		}
		if err := <-refused; err == nil || !strings.Contains(err.Error(), client.Certificate) {
			t.Errorf("the server says %v, want that %q was refused", err, client.Certificate)
		}
	})
}

// TestNobodyAnswers dials where nobody listens.
func TestNobodyAnswers(t *testing.T) {
	t.Parallel() // it takes its time over QUIC
	o, _ := testcert.New(t).Issue(t, nil, "127.0.0.1")
	silent, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	if _, err := o.Dial(t.Context(), "quic://"+silent.LocalAddr().String()); !errors.Is(err, transport.ErrNoAnswer) {
		t.Errorf("error %v", err)
	}
}

// TestUnixPlaces listens and dials where no socket can be.
func TestUnixPlaces(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		path           string
		listens, dials string // parts of the error
	}{
		{file, "no socket: choose another path", "no socket"},
		{dir, "is a folder", "is a folder"},
		{filepath.Join(dir, "no", "s"), "does not exist: make it", "no such file"},
		{filepath.Join(file, "s"), "no folder", "not a directory"},
	} {
		for _, v := range []struct {
			do   func(context.Context, string) (io.Closer, error)
			want string
		}{
			{func(ctx context.Context, a string) (io.Closer, error) { return transport.Listen(ctx, a) }, tt.listens},
			{func(ctx context.Context, a string) (io.Closer, error) { return transport.Dial(ctx, a) }, tt.dials},
		} {
			if _, err := v.do(t.Context(), "unix://"+tt.path); err == nil || !strings.Contains(err.Error(), v.want) || errors.Is(err, syscall.EADDRINUSE) || errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("%s: error %v, want %q", tt.path, err, v.want)
			}
		}
	}
}

// TestUnixAddresses are for people, although who dials a unix socket has none.
func TestUnixAddresses(t *testing.T) {
	k := kind{address: "unix://" + filepath.Join(t.TempDir(), "s")}
	dialled, accepted, _ := connect(t, k)
	path := strings.TrimPrefix(k.address, "unix://")
	for _, tt := range []struct{ got, want net.Addr }{
		{dialled.RemoteAddr(), &net.UnixAddr{Name: path}}, {accepted.LocalAddr(), &net.UnixAddr{Name: path}},
		{dialled.LocalAddr(), &net.UnixAddr{Name: "a process of this host"}}, {accepted.RemoteAddr(), &net.UnixAddr{Name: "a process of this host"}},
	} {
		if tt.got.String() != tt.want.String() || tt.got.Network() != "unix" {
			t.Errorf("%s, want %s", tt.got, tt.want)
		}
	}
}

// TestKeyOnce gives a pipe for a key's file, which would have the key once.
func TestKeyOnce(t *testing.T) {
	pipe := filepath.Join(t.TempDir(), "pipe")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := (transport.Options{KeyFile: pipe}).Check("psk://127.0.0.1:1"); err == nil || !strings.Contains(err.Error(), "can be read once") {
		t.Error(err)
	}
}
