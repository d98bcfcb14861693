package transport_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/drafter-vm/drafter/internal/testcert"
	"github.com/drafter-vm/drafter/pkg/transport"
)

// TestOptionsCheck makes mistakes in addresses and credentials. No message quotes a secret.
func TestOptionsCheck(t *testing.T) {
	a := testcert.New(t)
	good, pin := a.Issue(t, nil, "127.0.0.1")
	other, _ := a.Issue(t, nil, "127.0.0.1")
	const secret = "not-quite-as-secret-as-it-should-be"
	bad := filepath.Join(t.TempDir(), "bad")
	if err := os.WriteFile(bad, []byte(secret), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name    string
		options transport.Options
		address string
		want    string // empty: nothing is wrong
	}{
		{"udp", transport.Options{}, "udp://127.0.0.1:1", "use quic://"},
		{"datagrams of unix sockets", transport.Options{}, "unixgram:///a", "use quic://"},
		{"unknown", transport.Options{}, "carrier://pigeon:1", `unknown scheme "carrier"`},
		{"tls without anything", transport.Options{}, "tls://127.0.0.1:1", "give one, and its key"},
		{"tls without key", transport.Options{Certificate: good.Certificate}, "tls://127.0.0.1:1", "has no key"},
		{"tls without certificate", transport.Options{PrivateKey: good.PrivateKey}, "tls://127.0.0.1:1", "no certificate"},
		{"tls with another's key", transport.Options{Certificate: good.Certificate, PrivateKey: other.PrivateKey, Authorities: a.File}, "tls://127.0.0.1:1", "private key does not match"},
		{"tls that trusts nobody", transport.Options{Certificate: good.Certificate, PrivateKey: good.PrivateKey}, "tls://127.0.0.1:1", "nobody could be trusted"},
		{"tls that trusts a pin", transport.Options{Certificate: good.Certificate, PrivateKey: good.PrivateKey, Allow: []string{pin}}, "tls://127.0.0.1:1", ""},
		{"tls with bad authorities", transport.Options{Certificate: good.Certificate, PrivateKey: good.PrivateKey, Authorities: bad}, "quic://127.0.0.1:1", "there is none in"},
		{"tls without port", good, "tls://127.0.0.1", "HOST:PORT"},
		{"tls", good, "tls://127.0.0.1:1", ""},
		{"wss with query", good, "wss://127.0.0.1:1/a?b", "no path"},
		{"wss", good, "wss://127.0.0.1:1/a", ""},
		{"psk without key", transport.Options{}, "psk://127.0.0.1:1", "give its file"},
		{"psk with missing file", transport.Options{KeyFile: bad + "x"}, "psk://127.0.0.1:1", "no such file"},
		{"psk with bad file", transport.Options{KeyFile: bad}, "psk://127.0.0.1:1", "32 bytes in hexadecimal or base64"},
		{"psk with bad key", transport.Options{Key: secret}, "psk://127.0.0.1:1", "32 bytes in hexadecimal or base64"},
		{"psk with short key", transport.Options{Key: strings.Repeat("ab", 16)}, "psk://127.0.0.1:1", "32 bytes in hexadecimal or base64"},
		{"psk in base64", transport.Options{Key: "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=\n"}, "psk://127.0.0.1:1", ""},
		{"unix without path", transport.Options{}, "unix://", "no path"},
		{"unix with long path", transport.Options{}, "unix:///" + strings.Repeat("a", 107), "may have 107"},
		{"abstract", transport.Options{}, "unix://@a", "use a path"},
		{"ssh without target", transport.Options{}, "ssh://host", "no target given"},
		{"ssh without host", transport.Options{}, "ssh:///localhost:1", "no host given"},
		{"ssh with an option", transport.Options{}, "ssh://-oProxyCommand=x/localhost:1", "no host given"},
		{"ssh with an option as user", transport.Options{}, "ssh://-oProxyCommand=x@host/localhost:1", "no host given"},
		{"ssh with password", transport.Options{}, "ssh://me:" + secret + "@host/localhost:1", "password"},
		{"ssh with bad password", transport.Options{}, "ssh://me:" + secret + "%zz@host/localhost:1", "password"},
		{"ssh with password and nothing else", transport.Options{}, "ssh://me:" + secret + "@host", "password"},
		{"SSH with password", transport.Options{}, "SSH://me:" + secret + "@host/localhost:1", "password"},
		{"tcp with password", transport.Options{}, "me:" + secret + "@host:1", "password"},
		{"tls with password", good, "tls://me:" + secret + "@host:1", "password"},
		{"ws with password", transport.Options{}, "ws://me:" + secret + "@host:1/path", "password"},
		{"ws with password and a slash", transport.Options{}, "ws://me:" + secret + "/x@host:1/path", "password"},
		{"unknown, with password", transport.Options{}, "http://me:" + secret + "@host:1/path", "unknown scheme"},
		{"password before what is no scheme", transport.Options{}, "me:" + secret + "@host://1", "password"},
		{"udp with password", transport.Options{}, "udp://me:" + secret + "@host:1", "use quic://"},
		{"UDP", transport.Options{}, "UDP://127.0.0.1:1", "use quic://"},
		{"TLS", good, "TLS://127.0.0.1:1", ""},
		{"user over tcp", transport.Options{}, "me@host:1", "no host"},
		{"ssh with bad target", transport.Options{}, "ssh://host/localhost", "HOST:PORT"},
		{"ssh with a parameter", transport.Options{}, "ssh://host/localhost:1?option=x", "unknown parameter"},
		{"ssh with a configuration", transport.Options{}, "ssh://host/localhost:1?config=/f", ""},
		{"ssh", transport.Options{}, "ssh://me@host:2222/localhost:1337", ""},
		{"empty command", transport.Options{}, "exec: ", "no command"},
		{"stdio without any", transport.Options{}, "stdio:", "not to be had"},
		{"names over tcp", transport.Options{Allow: []string{"host"}}, "127.0.0.1:1", "nobody proves a name"},
		{"names over psk", transport.Options{Allow: []string{"host"}, Key: strings.Repeat("ab", 32)}, "psk://127.0.0.1:1", "nobody proves a name"},
		{"empty name", transport.Options{Allow: []string{""}}, "unix:///a", "empty name"},
		{"bad uid", transport.Options{Allow: []string{"uid:root"}}, "unix:///a", `"root" is no number`},
		{"bad pin", transport.Options{Allow: []string{"pin-sha256:abc"}}, "unix:///a", "openssl"},
		{"bad URI", transport.Options{Allow: []string{"spiffe://"}}, "unix:///a", "no URI"},
		{"pattern within a name", transport.Options{Allow: []string{"spiffe://example.org/a*"}}, "unix:///a", "use spiffe://DOMAIN/PATH/*"},
		{"pattern within a path", transport.Options{Allow: []string{"spiffe://example.org/*/a"}}, "unix:///a", "use spiffe://DOMAIN/PATH/*"},
		{"two patterns", transport.Options{Allow: []string{"spiffe://example.org/*/*"}}, "unix:///a", "use spiffe://DOMAIN/PATH/*"},
		{"pattern of domains", transport.Options{Allow: []string{"spiffe://*.example.org/a"}}, "unix:///a", "use spiffe://DOMAIN/PATH/*"},
		{"pattern of all", transport.Options{Allow: []string{"spiffe://*"}}, "unix:///a", "no URI"},
		{"pattern", transport.Options{Allow: []string{"spiffe://example.org/*"}}, "unix:///a", ""},
		{"bad name", transport.Options{Allow: []string{"a b"}}, "unix:///a", "host's name"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := tt.options.Check(tt.address)
			if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
				t.Errorf("error %v, want %q", err, tt.want)
			}
			if err != nil && strings.Contains(err.Error(), secret) {
				t.Errorf("the error quotes a secret: %v", err)
			}
		})
	}
}

// TestRefusedClients has clients knock that do not speak what is spoken, or show nothing.
func TestRefusedClients(t *testing.T) {
	a := testcert.New(t)
	server, _ := a.Issue(t, nil, "127.0.0.1")
	key := transport.Options{Key: strings.Repeat("ab", 32)}
	anonymous := func(conn net.Conn) error {
		c := tls.Client(conn, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"drafter"}})
		if err := c.Handshake(); err != nil {
			return err
		}
		_, err := c.Read(make([]byte, 1))
		return err
	}
	garbage := func(conn net.Conn) error {
		conn.Write([]byte("GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"))
		b, err := io.ReadAll(conn)
		if strings.Contains(string(b), "200") {
			return fmt.Errorf("it was told %q", b)
		}
		return err
	}
	for _, tt := range []struct {
		name    string
		options transport.Options
		address string
		knock   func(net.Conn) error
	}{
		{"anonymous over TLS", server, "tls://127.0.0.1:0", anonymous},
		{"old TLS", server, "tls://127.0.0.1:0", func(conn net.Conn) error {
			return tls.Client(conn, &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12}).Handshake()
		}},
		{"other protocol over TLS", server, "tls://127.0.0.1:0", func(conn net.Conn) error {
			return tls.Client(conn, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}}).Handshake()
		}},
		{"plain over TLS", server, "tls://127.0.0.1:0", garbage},
		{"plain over psk", key, "psk://127.0.0.1:0", garbage},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l, err := tt.options.Listen(t.Context(), tt.address)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			accepted := make(chan error, 1)
			go func() {
				_, _, err := accept(t.Context(), l)
				accepted <- err
			}()
			conn, err := net.Dial("tcp", l.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(10 * time.Second))
			if err := tt.knock(conn); errors.Is(err, os.ErrDeadlineExceeded) || err != nil && strings.HasPrefix(err.Error(), "it was told") {
				t.Error(err)
			}
			if err := <-accepted; err == nil {
				t.Error("the server lets it in")
			}
		})
	}
}

// TestHandshakeEnds has a client say nothing: the server's patience ends with the context, and the connection can be closed.
func TestHandshakeEnds(t *testing.T) {
	for _, k := range kinds(t) {
		if k.name != "tls" && k.name != "psk" {
			continue
		}
		t.Run(k.name, func(t *testing.T) {
			l, err := k.server.Listen(t.Context(), k.address)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			client, err := net.Dial("tcp", l.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer client.Close()
			conn, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
			defer cancel()
			if _, err := transport.Handshake(ctx, conn); err == nil || !strings.Contains(err.Error(), "deadline exceeded") {
				t.Errorf("error %v, want that the time is over", err)
			}
		})
	}
}

// TestUnixSocket takes over what an ended process has left, leaves what a living one has, and is for this user alone.
func TestUnixSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	address := "unix://" + path
	l, err := transport.Listen(t.Context(), address)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the socket is %v, %v", info.Mode(), err)
	}
	if _, err := transport.Listen(t.Context(), address); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("listen where a living process does: %v", err)
	}
	l.Close()
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left: %v", err)
	}
	dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	dead.SetUnlinkOnClose(false)
	dead.Close()
	if l, err = transport.Listen(t.Context(), address); err != nil {
		t.Fatalf("in place of a dead socket: %v", err)
	}
	l.Close()
	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := transport.Listen(t.Context(), address); err == nil {
		t.Error("a file was taken for a socket")
	}
	if b, _ := os.ReadFile(path); string(b) != "precious" {
		t.Error("a file was replaced")
	}
}

// TestUnixUsers connects as another user.
func TestUnixUsers(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root, to be another user")
	}
	dir, err := os.MkdirTemp("/tmp", "drafter-transport")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name  string
		allow []string
		mode  os.FileMode // that the socket is given, as by a careless operator
		in    bool
	}{
		{"not let in", nil, 0o666, false},
		{"allowed", []string{"uid:65534"}, 0, true},
		{"another is allowed", []string{"uid:65533"}, 0, false},
		{"group is allowed", []string{"gid:65534"}, 0, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(dir, "s")
			l, err := transport.Options{Allow: tt.allow}.Listen(t.Context(), "unix://"+path)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			if tt.mode != 0 {
				os.Chmod(path, tt.mode)
			}
			cmd := exec.Command("/usr/bin/perl", "-MSocket", "-e", `socket(S,PF_UNIX,SOCK_STREAM,0); connect(S,sockaddr_un($ARGV[0])) or die $!; sysread(S,$b,1)`, path)
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			conn, who, err := accept(t.Context(), l)
			if tt.in != (err == nil) || err != nil && !errors.Is(err, transport.ErrRefused) {
				t.Errorf("%v: %v", who, err)
			}
			if err == nil {
				conn.Close()
			}
			cmd.Wait()
		})
	}
}

// TestCommand talks to programs.
func TestCommand(t *testing.T) {
	conn, err := transport.Dial(t.Context(), "exec:exec cat")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 5)
	if _, err := io.ReadFull(conn, b); err != nil || string(b) != "hello" {
		t.Errorf("%q, %v", b, err)
	}
	conn.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
	if _, err := conn.Read(b); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("no deadline: %v", err)
	}

	failing, err := transport.Dial(t.Context(), "exec:echo it is late >&2; exit 3")
	if err != nil {
		t.Fatal(err)
	}
	defer failing.Close()
	if _, err := failing.Read(b); err == nil || !strings.Contains(err.Error(), "it is late") || !strings.Contains(err.Error(), "exit status 3") {
		t.Errorf("error %v, want what the program said", err)
	}
	if _, err := transport.Listen(t.Context(), "exec:cat"); err == nil || !strings.Contains(err.Error(), "only be dialled") {
		t.Errorf("listen: %v", err)
	}
}

// TestStdio gives both commands of a pipe their ends.
func TestStdio(t *testing.T) {
	ours, theirs := net.Pipe()
	l, err := transport.Options{Stdio: theirs}.Listen(t.Context(), "stdio:")
	if err != nil {
		t.Fatal(err)
	}
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	second := make(chan error, 1)
	go func() {
		_, err := l.Accept()
		second <- err
	}()
	dialled, err := transport.Options{Stdio: ours}.Dial(t.Context(), "stdio:")
	if err != nil {
		t.Fatal(err)
	}
	go dialled.Write([]byte("hello"))
	b := make([]byte, 5)
	if _, err := io.ReadFull(conn, b); err != nil || string(b) != "hello" {
		t.Errorf("%q, %v", b, err)
	}
	conn.SetReadDeadline(time.Now())
	if _, err := conn.Read(b); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("no deadline: %v", err)
	}
	l.Close()
	if err := <-second; !errors.Is(err, net.ErrClosed) {
		t.Errorf("a second connection: %v", err)
	}
	if transport.Parallel("exec:x") || transport.Parallel("stdio:") || !transport.Parallel("127.0.0.1:1") || !transport.Parallel("ssh://h/h:1") || !transport.Single("stdio:") || transport.Single("127.0.0.1:1") || !transport.CanListen("stdio:") || transport.CanListen("ssh://h/h:1") {
		t.Error("what can be done with addresses is said wrongly")
	}
}
