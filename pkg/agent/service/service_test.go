package service

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/drafter-vm/drafter/pkg/agent/socket"
)

// world is a host and a guest whose connections can be cut.
type world struct {
	t   *testing.T
	dir string

	mu    sync.Mutex // guards conns
	conns []net.Conn
}

func newWorld(t *testing.T) *world {
	before := runtime.NumGoroutine()
	t.Cleanup(func() {
		n := 0
		for range 200 {
			if n = runtime.NumGoroutine(); n <= before {
				return
			}
			time.Sleep(10 * time.Millisecond) // those of timers and of ttrpc end by themselves
		}
		buf := make([]byte, 1<<20)
		t.Errorf("%d goroutines are left over:\n%s", n-before, buf[:runtime.Stack(buf, true)])
	})
	return &world{t: t, dir: t.TempDir()}
}

func (w *world) dial(ctx context.Context, port uint32) (net.Conn, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", socket.PortPath(socket.HostPath(w.dir), port))
	if err == nil {
		w.mu.Lock()
		w.conns = append(w.conns, conn)
		w.mu.Unlock()
	}
	return conn, err
}

// cut ends all connections, as a suspend does.
func (w *world) cut() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, conn := range w.conns {
		conn.Close()
	}
	w.conns = nil
}

func (w *world) config(change func(*Config)) Config {
	c := Config{Port: 9000, Name: "test", Dial: w.dial, Logger: slog.New(slog.DiscardHandler)}
	if change != nil {
		change(&c)
	}
	return c
}

func (w *world) host(change func(*Config)) *Endpoint {
	w.t.Helper()
	e, err := ListenHost(w.dir, w.config(change))
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { e.Close() })
	return e
}

func (w *world) guest(change func(*Config)) *Endpoint {
	w.t.Helper()
	e, err := StartGuest(w.config(change))
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { e.Close() })
	return e
}

// answers serves Test/Do by f.
func answers(f func(ctx context.Context, in string) (string, error)) func(*Config) {
	return func(c *Config) {
		c.Register = func(s *ttrpc.Server) {
			s.RegisterService("test.v1.Test", &ttrpc.ServiceDesc{Methods: map[string]ttrpc.Method{
				"Do": func(ctx context.Context, unmarshal func(any) error) (any, error) {
					in := new(wrapperspb.StringValue)
					if err := unmarshal(in); err != nil {
						return nil, err
					}
					out, err := f(ctx, in.Value)
					return wrapperspb.String(out), err
				},
			}})
		}
	}
}

// ask is a call of Test/Do.
func ask(in string, out *string) func(context.Context, *ttrpc.Client) error {
	return func(ctx context.Context, c *ttrpc.Client) error {
		answer := new(wrapperspb.StringValue)
		err := c.Call(ctx, "test.v1.Test", "Do", wrapperspb.String(in), answer)
		*out = answer.Value
		return err
	}
}

func says(who string) func(context.Context, string) (string, error) {
	return func(_ context.Context, in string) (string, error) { return who + " " + in, nil }
}

func TestBothWays(t *testing.T) {
	w := newWorld(t)
	h, g := w.host(answers(says("host"))), w.guest(answers(says("guest")))
	for n := range 3 {
		for _, tt := range []struct {
			from *Endpoint
			want string
		}{{h, "guest"}, {g, "host"}} {
			var got string
			if err := tt.from.Retry(t.Context(), ask(fmt.Sprint(n), &got)); err != nil || got != fmt.Sprintf("%s %d", tt.want, n) {
				t.Errorf("it says %q, %v", got, err)
			}
		}
		w.cut()
	}
}

// What the application says of its own calls arrives, and ends nothing.
func TestErrors(t *testing.T) {
	w := newWorld(t)
	h := w.host(nil)
	w.guest(answers(func(ctx context.Context, in string) (string, error) {
		return "", status.Errorf(codes.FailedPrecondition, "not %s", in)
	}))
	if err := h.Call(t.Context(), ask("now", new(string))); status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "not now") || errors.Is(err, ErrUnknown) {
		t.Errorf("got %v", err)
	}
	unknown := func(ctx context.Context, c *ttrpc.Client) error {
		return c.Call(ctx, "test.v2.Test", "Do", wrapperspb.String(""), new(wrapperspb.StringValue))
	}
	if err := h.Call(t.Context(), unknown); status.Code(err) != codes.Unimplemented {
		t.Errorf("got %v", err)
	}
	mine := errors.New("mine")
	if err := h.Call(t.Context(), func(context.Context, *ttrpc.Client) error { return mine }); err != mine {
		t.Errorf("got %v", err)
	}
}

// A call that is cut is the caller's to repeat, or repeated on demand.
func TestCut(t *testing.T) {
	w := newWorld(t)
	var calls atomic.Int64
	h := w.host(nil)
	w.guest(answers(func(ctx context.Context, in string) (string, error) {
		if calls.Add(1)%2 == 1 {
			w.cut()
			<-ctx.Done()
		}
		return in, nil
	}))
	var got string
	if err := h.Call(t.Context(), ask("a", &got)); !errors.Is(err, ErrUnknown) {
		t.Errorf("got %q, %v", got, err)
	}
	calls.Store(0)
	if err := h.Retry(t.Context(), ask("b", &got)); err != nil || got != "b" || calls.Load() != 2 {
		t.Errorf("got %q, %v after %d calls", got, err, calls.Load())
	}
}

// The deadline is the callee's, too, and no answer is no reason to wait.
func TestDeadline(t *testing.T) {
	w := newWorld(t)
	seen := make(chan bool, 1)
	h := w.host(func(c *Config) { c.Timeout = 50 * time.Millisecond })
	w.guest(answers(func(ctx context.Context, in string) (string, error) {
		if in == "again" {
			return in, nil
		}
		_, ok := ctx.Deadline()
		seen <- ok
		<-ctx.Done()
		return "", ctx.Err()
	}))
	if err := h.Retry(t.Context(), ask("", new(string))); !errors.Is(err, ErrUnknown) && status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("got %v", err)
	}
	if !<-seen {
		t.Error("the guest does not know of the deadline")
	}
	var got string
	if err := h.Call(t.Context(), ask("again", &got)); err != nil || got != "again" {
		t.Errorf("got %q, %v", got, err)
	}
}

func TestNobody(t *testing.T) {
	w := newWorld(t)
	h, g := w.host(nil), w.guest(func(c *Config) { c.Port = 9001 })
	for _, e := range []*Endpoint{h, g} {
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
		_, err := e.Wait(ctx)
		cancel()
		if err == nil || errors.Is(err, ErrUnknown) || !strings.Contains(err.Error(), "not connected") {
			t.Errorf("got %v", err)
		}
	}
	h.Close()
	if err := h.Call(t.Context(), ask("", new(string))); !errors.Is(err, net.ErrClosed) {
		t.Errorf("got %v", err)
	}
}

func TestVersions(t *testing.T) {
	for _, tt := range []struct {
		name         string
		host, guest  [2]int // oldest, newest
		want         int
		refused      string
		otherService bool
	}{
		{name: "same", host: [2]int{1, 1}, guest: [2]int{1, 1}, want: 1},
		{name: "older guest", host: [2]int{1, 3}, guest: [2]int{2, 2}, want: 2},
		{name: "newer guest", host: [2]int{1, 2}, guest: [2]int{2, 3}, want: 2},
		{name: "guest too old", host: [2]int{3, 4}, guest: [2]int{1, 2}, refused: "speaks versions"},
		{name: "guest too new", host: [2]int{1, 2}, guest: [2]int{3, 3}, refused: "speaks versions"},
		{name: "another", host: [2]int{1, 1}, guest: [2]int{1, 1}, refused: `service "other"`, otherService: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t)
			h := w.host(func(c *Config) { c.Oldest, c.Version = tt.host[0], tt.host[1] })
			g := w.guest(func(c *Config) {
				answers(says("guest"))(c)
				c.Oldest, c.Version = tt.guest[0], tt.guest[1]
				if tt.otherService {
					c.Name = "other"
				}
			})
			for _, e := range []*Endpoint{h, g} {
				patience := 10 * time.Second
				if tt.refused != "" {
					patience = 200 * time.Millisecond
				}
				ctx, cancel := context.WithTimeout(t.Context(), patience)
				got, err := e.Wait(ctx)
				cancel()
				if tt.refused == "" && (err != nil || got != tt.want) || tt.refused != "" && (err == nil || !strings.Contains(err.Error(), tt.refused)) {
					t.Errorf("version %d, %v", got, err)
				}
			}
		})
	}
}

// Whoever connects and says nothing, or something else, harms nobody.
func TestStrangers(t *testing.T) {
	w := newWorld(t)
	h := w.host(nil)
	for _, line := range []string{"", "\n", "{}\n", "GET / HTTP/1.1\n", strings.Repeat("x", 2*maxHello), `{"service":"test","version":-1,"oldest":-1}` + "\n"} {
		conn, err := w.dial(t.Context(), 9000)
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(conn, line)
		if line != "" { // who says nothing occupies a place for a while
			io.Copy(io.Discard, conn)
		}
	}
	w.guest(answers(says("guest")))
	var got string
	if err := h.Call(t.Context(), ask("still", &got)); err != nil || got != "guest still" {
		t.Errorf("got %q, %v", got, err)
	}
}

func TestConfig(t *testing.T) {
	for _, tt := range []struct {
		change func(*Config)
		want   string
	}{
		{func(c *Config) { c.Port = 0 }, "no port"},
		{func(c *Config) { c.Name = "" }, "name"},
		{func(c *Config) { c.Name = strings.Repeat("n", 65) }, "1 to 64 bytes"},
		{func(c *Config) { c.Version, c.Oldest = 1, 2 }, "no newer than the newest"},
		{func(c *Config) { c.Version = -1 }, "at least 1"},
		{func(c *Config) { c.Calls = -1 }, "at least one"},
		{func(c *Config) { c.Timeout = -1 }, "negative"},
	} {
		w := newWorld(t)
		if _, err := ListenHost(w.dir, w.config(tt.change)); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("got %v, want %q", err, tt.want)
		}
		if _, err := StartGuest(w.config(tt.change)); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("got %v, want %q", err, tt.want)
		}
	}
}

func FuzzHello(f *testing.F) {
	f.Add(`{"service":"test","version":1,"oldest":1}`)
	f.Add(`{"service":"test","version":9223372036854775807,"oldest":-1}`)
	c, err := Config{Port: 1, Name: "test", Version: 3, Oldest: 2}.withDefaults()
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, in string) {
		var h hello
		if json.Unmarshal([]byte(in), &h) != nil {
			return
		}
		if v, err := c.agree(h); err == nil && (v < 2 || v > 3 || v > h.Version || v < h.Oldest) {
			t.Errorf("%q is agreed on as %d", in, v)
		}
	})
}
