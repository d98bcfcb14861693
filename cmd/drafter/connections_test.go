package main

import (
	"context"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/drafter-vm/drafter/pkg/transport"
)

// What another host says of where it is may not run a program here, nor weaken what was asked for.
func TestDialTold(t *testing.T) {
	ran := filepath.Join(t.TempDir(), "ran")
	for address, scheme := range map[string]string{
		"exec:touch " + ran:             "tcp",
		"exec:touch  " + ran:            "",
		"ssh://-oProxyCommand=x@host/x": "tcp",
		"ssh://-oProxyCommand=x@host/y": "",
		"stdio:":                        "",
		"unix:///run/docker.sock":       "tcp",
		"tcp://127.0.0.1:1":             "tls",
		"127.0.0.1:1":                   "psk",
		"nonsense://":                   "",
		"EXEC:touch " + ran:             "",
		"exec://touch " + ran:           "exec",
	} {
		if conn, err := dialTold(transport.Options{}, scheme)(t.Context(), address); err == nil {
			conn.Close()
			t.Errorf("%q was dialled by one that uses %q", address, scheme)
		} else if !strings.Contains(err.Error(), "another host") {
			t.Errorf("%q was tried by one that uses %q: %v", address, scheme, err)
		}
	}
	if _, err := os.Stat(ran); err == nil {
		t.Error("it has run a command")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for _, scheme := range []string{"", "tcp"} {
		conn, err := dialTold(transport.Options{}, scheme)(t.Context(), l.Addr().String())
		if err != nil {
			t.Errorf("one that uses %q: %v", scheme, err)
			continue
		}
		conn.Close()
	}
}

// Who was asked for the VM may come back, whatever address was dialled since, and who is dialled may be there.
func TestEitherWay(t *testing.T) {
	streams := func() ([]net.Conn, find) {
		a, b := net.Pipe()
		return []net.Conn{a, b}, func(context.Context) ([]io.ReadWriter, error) { return []io.ReadWriter{a}, nil }
	}
	never := func(ctx context.Context) ([]io.ReadWriter, error) { <-ctx.Done(); return nil, context.Cause(ctx) }
	fails := func(context.Context) ([]io.ReadWriter, error) { return nil, net.ErrClosed }
	for name, tt := range map[string]struct {
		home, away func(find) find
	}{
		"it comes":                         {func(f find) find { return f }, func(find) find { return never }},
		"it is there":                      {func(find) find { return never }, func(f find) find { return f }},
		"it comes, and cannot be dialled":  {func(f find) find { return f }, func(find) find { return fails }},
		"nobody can come, and it is there": {func(find) find { return fails }, func(f find) find { return f }},
		"nobody comes any more":            {func(find) find { return nil }, func(f find) find { return f }},
		"nobody is dialled any more":       {func(f find) find { return f }, func(find) find { return nil }},
	} {
		conns, f := streams()
		var w way
		w.wait(tt.home(f))
		w.dial(tt.away(f))
		got, err := w.take(t.Context())
		if err != nil || len(got) != 1 || got[0] != conns[0] {
			t.Errorf("%s: %v (%v)", name, got, err)
		}
		for _, c := range conns {
			c.Close()
		}
	}
	// Who comes does not end a dial: both are had, one after the other, and what is not taken is closed in the end.
	one, f := streams()
	two, g := streams()
	var both way
	both.wait(f)
	both.dial(g)
	ctx, end := context.WithCancel(t.Context())
	got := make(map[io.ReadWriter]bool)
	for range 20 {
		s, err := both.take(ctx)
		if err != nil {
			t.Fatal(err)
		}
		got[s[0]] = true
	}
	if !got[one[0]] && !got[two[0]] {
		t.Errorf("neither was found: %v", got)
	}
	end()
	for _, c := range append(one, two...) {
		c.Close()
	}
	// Neither: the error is that of the address.
	var neither way
	neither.wait(never)
	neither.dial(fails)
	if _, err := neither.take(t.Context()); err != net.ErrClosed {
		t.Errorf("nobody: %v", err)
	}
}

// TestWayAmongStrangers: who comes, and is not the other side, keeps it from being dialled as little as from coming.
func TestWayAmongStrangers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var w way
		a, b := net.Pipe()
		c, d := net.Pipe()
		defer func() {
			for _, conn := range []net.Conn{a, b, c, d} {
				conn.Close()
			}
		}()
		w.wait(func(ctx context.Context) ([]io.ReadWriter, error) { // a stranger each millisecond
			select {
			case <-time.After(time.Millisecond):
				return []io.ReadWriter{a}, nil
			case <-ctx.Done():
				return nil, context.Cause(ctx)
			}
		})
		dials := 0
		w.dial(func(ctx context.Context) ([]io.ReadWriter, error) { // far away
			dials++
			select {
			case <-time.After(200 * time.Millisecond):
				return []io.ReadWriter{c}, nil
			case <-ctx.Done():
				return nil, context.Cause(ctx)
			}
		})
		ctx, end := context.WithCancel(t.Context())
		defer end()
		began := time.Now()
		for strangers := 0; ; strangers++ {
			streams, err := w.take(ctx)
			if err != nil {
				t.Fatal(err)
			}
			if streams[0] == c {
				break
			}
			if time.Since(began) > time.Second {
				t.Fatalf("after %d strangers and %d dials the other side was not found", strangers, dials)
			}
		}
		if dials != 1 {
			t.Errorf("%d dials were begun for one", dials)
		}
		// One that nobody takes is closed in the end.
		if _, err := w.take(ctx); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		end()
		synctest.Wait()
		if _, err := d.Write([]byte{0}); err == nil {
			t.Error("a dial that nobody took is still open")
		}
	})
}
