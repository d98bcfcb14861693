package transport

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"
)

// recorder keeps what is written to a connection, and may change it.
type recorder struct {
	net.Conn
	sent   bytes.Buffer
	damage bool
}

func (r *recorder) Write(p []byte) (int, error) {
	r.sent.Write(p)
	if r.damage {
		p = bytes.Clone(p)
		p[len(p)-1] ^= 1
	}
	return r.Conn.Write(p)
}

func pskPair(t *testing.T, ours, theirs string, rekeyAfter uint64) (client, server *pskConn, wire *recorder) {
	t.Helper()
	a, b := net.Pipe()
	t.Cleanup(func() { a.Close(); b.Close() })
	wire = &recorder{Conn: a}
	return &pskConn{Conn: wire, options: Options{Key: ours}, initiator: true, rekeyAfter: rekeyAfter}, &pskConn{Conn: b, options: Options{Key: theirs}, rekeyAfter: rekeyAfter}, wire
}

var (
	keyA = strings.Repeat("a1", 32)
	keyB = strings.Repeat("b2", 32)
)

// TestPSKRekey sends more messages than one key is for, and nothing of it as it is.
func TestPSKRekey(t *testing.T) {
	client, server, wire := pskPair(t, keyA, keyA, 3)
	content := bytes.Repeat([]byte("plain text that nobody else should see "), 100)
	go func() {
		for range 20 {
			client.Write(content)
		}
		client.Close()
	}()
	got, err := io.ReadAll(server)
	if err != nil || !bytes.Equal(got, bytes.Repeat(content, 20)) {
		t.Errorf("%d bytes have come: %v", len(got), err)
	}
	if bytes.Contains(wire.sent.Bytes(), content[:16]) || bytes.Contains(wire.sent.Bytes(), []byte(keyA[:8])) {
		t.Error("content or key is on the wire")
	}
	messages := bytes.Split(wire.sent.Bytes(), wire.sent.Bytes()[100:116])
	if len(messages) != 2 {
		t.Error("the same content looks the same on the wire")
	}
}

// TestPSKRefuses meets whoever has another key, changes what is sent, or sends again what another has sent.
func TestPSKRefuses(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	t.Run("another key", func(t *testing.T) {
		client, server, _ := pskPair(t, keyA, keyB, rekeyAfter)
		refused := make(chan error, 1)
		go func() {
			_, err := server.handshake(ctx)
			server.Close()
			refused <- err
		}()
		if _, err := client.handshake(ctx); err == nil || !strings.Contains(err.Error(), "another key") {
			t.Errorf("the client says %v", err)
		}
		if err := <-refused; !errors.Is(err, ErrRefused) || strings.Contains(err.Error(), keyA[:8]) {
			t.Errorf("the server says %v", err)
		}
	})
	t.Run("changed", func(t *testing.T) {
		client, server, wire := pskPair(t, keyA, keyA, rekeyAfter)
		go func() {
			client.Write([]byte("one"))
			wire.damage = true
			client.Write([]byte("two"))
		}()
		b := make([]byte, 10)
		if n, err := server.Read(b); err != nil || string(b[:n]) != "one" {
			t.Fatalf("%q, %v", b[:n], err)
		}
		if n, err := server.Read(b); n > 0 || !errors.Is(err, ErrRefused) {
			t.Errorf("%q, %v", b[:n], err)
		}
	})
	t.Run("sent again", func(t *testing.T) {
		client, server, wire := pskPair(t, keyA, keyA, rekeyAfter)
		go client.Write([]byte("pay 100"))
		b := make([]byte, 10)
		if _, err := server.Read(b); err != nil {
			t.Fatal(err)
		}
		_, again, replay := pskPair(t, keyA, keyA, rekeyAfter)
		go func() {
			go io.Copy(io.Discard, replay.Conn)
			replay.Conn.Write(wire.sent.Bytes())
		}()
		if _, err := again.handshake(ctx); !errors.Is(err, ErrRefused) {
			t.Errorf("a replay is let in: %v", err)
		}
	})
}

// FuzzPSK feeds a server what it likes: nothing of it counts.
func FuzzPSK(f *testing.F) {
	f.Add([]byte{})
	f.Add([]byte{0, 48})
	f.Add(append([]byte{0, 48}, make([]byte, 48)...))
	f.Add([]byte("GET / HTTP/1.1\r\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		a, conn := net.Pipe()
		defer a.Close()
		defer conn.Close()
		go func() {
			a.Write(b)
			a.Close()
		}()
		server := &pskConn{Conn: conn, options: Options{Key: keyA}, rekeyAfter: rekeyAfter}
		if n, err := server.Read(make([]byte, 1)); n > 0 || err == nil {
			t.Errorf("%d bytes were let in", n)
		}
	})
}
