package transport_test

import (
	"context"
	"io"
	"strings"
	"testing"

	"github.com/drafter-vm/drafter/pkg/transport"
)

func TestDialListen(t *testing.T) {
	for _, address := range []string{"127.0.0.1:0", "tcp://127.0.0.1:0", "[::1]:0"} {
		t.Run(address, func(t *testing.T) {
			l, err := transport.Listen(t.Context(), address)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			got := make(chan string, 1)
			go func() {
				conn, err := l.Accept()
				if err != nil {
					got <- err.Error()
					return
				}
				defer conn.Close()
				b, _ := io.ReadAll(conn)
				got <- string(b)
			}()
			conn, err := transport.Dial(t.Context(), l.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			if _, err := io.WriteString(conn, "hello"); err != nil {
				t.Fatal(err)
			}
			conn.Close()
			if s := <-got; s != "hello" {
				t.Errorf("received %q, want hello", s)
			}
		})
	}
}

func TestBadAddress(t *testing.T) {
	l, err := transport.Listen(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	for _, tt := range []struct {
		name    string
		ctx     context.Context
		address string
		listen  bool
		want    string
	}{
		{"no port", t.Context(), "localhost", false, "HOST:PORT"},
		{"empty port", t.Context(), "localhost:", false, "no port given"},
		{"empty", t.Context(), "", true, "HOST:PORT"},
		{"port too large", t.Context(), "localhost:65536", true, `"65536" is no port`},
		{"port no number", t.Context(), "localhost:no-such-service", false, `"no-such-service" is no port`},
		{"unknown scheme", t.Context(), "carrier://pigeon:1", false, `unknown scheme "carrier"`},
		{"port in use", t.Context(), l.Addr().String(), true, "address already in use"},
		{"cancelled", cancelled, l.Addr().String(), false, "cancel"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var err error
			if tt.listen {
				_, err = transport.Listen(tt.ctx, tt.address)
			} else {
				_, err = transport.Dial(tt.ctx, tt.address)
			}
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want one with %q", err, tt.want)
			}
			if err != nil && !strings.Contains(err.Error(), `"`+tt.address+`"`) {
				t.Errorf("error %v does not name the address %q", err, tt.address)
			}
		})
	}
}

func TestCheck(t *testing.T) {
	for address, want := range map[string]string{
		"localhost:1337": "", "tcp://localhost:0": "", ":1": "", "[::1]:65535": "", "no.such.host.example:1": "",
		"localhost": "HOST:PORT", "localhost:": "no port given", "localhost:-1": `"-1" is no port`, "::1:1": "HOST:PORT",
	} {
		err := transport.Check(address)
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), address)) {
			t.Errorf("Check(%q): %v, want %q", address, err, want)
		}
	}
}

func TestInsecure(t *testing.T) {
	for address, want := range map[string]bool{
		"tls://10.0.0.1:1": false, "psk://10.0.0.1:1": false, "unix:///a": false, "wss://h:1": false, "quic://h:1": false, "ssh://h/l:1": false, "exec:nc h 1": false,
		"ws://10.0.0.1:1/p": true, "ws://localhost:1/p": false, "ws://127.0.0.1:1": false,
		"localhost:1337": false, "127.0.0.1:1": false, "[::1]:1": false, "tcp://127.9.9.9:1": false,
		":1337": true, "0.0.0.0:1": true, "10.0.0.1:1": true, "example.org:1": true, "nonsense": true,
	} {
		if got := transport.Insecure(address); got != want {
			t.Errorf("Insecure(%q) = %t, want %t", address, got, want)
		}
	}
}
