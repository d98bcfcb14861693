package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/drafter-vm/drafter/pkg/agent/internal/serve"
	"github.com/drafter-vm/drafter/pkg/agent/socket"
)

// checkGoroutines fails the test if it ends with more goroutines than it began with.
func checkGoroutines(t *testing.T) {
	before := runtime.NumGoroutine()
	t.Cleanup(func() {
		var n int
		for range 200 {
			if n = runtime.NumGoroutine(); n <= before {
				return
			}
			<-time.After(10 * time.Millisecond) // those of timers and of ttrpc end by themselves
		}
		buf := make([]byte, 1<<20)
		t.Errorf("%d goroutines are left over:\n%s", n-before, buf[:runtime.Stack(buf, true)])
	})
}

// world is a host and a guest whose connections can be cut.
type world struct {
	t   *testing.T
	dir string

	mu    sync.Mutex // guards conns
	conns []net.Conn
}

func newWorld(t *testing.T) *world {
	checkGoroutines(t)
	return &world{t: t, dir: t.TempDir()}
}

func (w *world) host() *Host {
	w.t.Helper()
	h, err := ListenAgent(w.dir, 0, quiet())
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { h.Close() })
	return h
}

// dial is what the guest's socket.Dial amounts to.
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

// cut ends all connections.
func (w *world) cut() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, conn := range w.conns {
		conn.Close()
	}
	w.conns = nil
}

// guest serves g until the test ends.
func (w *world) guest(g *Guest) {
	g.Dial, g.Logger = w.dial, quiet()
	if g.setClock == nil {
		g.setClock = func(time.Time) (time.Duration, error) { return 0, nil }
	}
	if g.reseed == nil {
		g.reseed = func([]byte) error { return nil }
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- g.Serve(ctx) }()
	w.t.Cleanup(func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			w.t.Errorf("Serve: got %v, want context.Canceled", err)
		}
	})
}

func quiet() *slog.Logger {
	if testing.Verbose() {
		return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	return slog.New(slog.DiscardHandler)
}

func within(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

func TestRoundTrip(t *testing.T) {
	w := newWorld(t)
	h := w.host()
	var events []string // written by executions, which are one after the other and answered before they are read
	w.guest(&Guest{
		Version:       "1.2.3",
		BeforeSuspend: func(context.Context) error { events = append(events, "before"); return nil },
		AfterResume: func(_ context.Context, clone bool) error {
			events = append(events, fmt.Sprintf("after clone=%v", clone))
			return nil
		},
		setClock: func(now time.Time) (time.Duration, error) {
			events = append(events, "clock "+now.UTC().Format(time.DateOnly))
			return time.Second, nil
		},
		reseed: func(b []byte) error { events = append(events, fmt.Sprint("entropy ", len(b))); return nil },
	})
	ctx := within(t, time.Minute)
	if version, err := h.Wait(ctx); version != "1.2.3" || err != nil {
		t.Fatalf("Wait: got %q, %v", version, err)
	}
	if !h.HasHook() {
		t.Error("the guest's hook is not known")
	}
	for range 2 {
		if err := h.BeforeSuspend(ctx); err != nil {
			t.Fatal(err)
		}
		err := h.AfterResume(ctx, AfterResumeRequest{Time: time.Unix(1<<31, 0), Entropy: NewEntropy(), Clone: true})
		if err != nil {
			t.Fatal(err)
		}
	}
	want := "before,clock 2038-01-19,entropy 64,after clone=true"
	if got := strings.Join(events, ","); got != want+","+want {
		t.Errorf("events: got %s, want %s twice", got, want)
	}
}

// TestShutDown: a guest is told to shut down, or to reboot, and what its agent says of that is known. An agent that has nothing for it says so.
// TestEnvironment has an agent that knows of containers give them an environment, once; one that does not is not asked, and the host hears of it, with all else done.
func TestEnvironment(t *testing.T) {
	want := []string{"A=b", "web:C=d"}
	after := func(h *Host, id string, environment []string) error {
		return h.AfterResume(within(t, time.Minute), AfterResumeRequest{ID: id, Identity: Identity{Environment: environment}})
	}
	t.Run("with containers", func(t *testing.T) {
		w := newWorld(t)
		h := w.host()
		var given [][]string // by executions, which are answered before it is read
		fail := errors.New("no such container")
		w.guest(&Guest{
			SetEnvironment: func(_ context.Context, environment []string) error {
				given = append(given, environment)
				if len(given) > 1 {
					return fail
				}
				return nil
			},
			AfterResume: func(context.Context, bool) error {
				if len(given) == 0 {
					t.Error("the hook runs before the containers have it")
				}
				return nil
			},
		})
		for range 2 { // the same call is not executed twice
			if err := after(h, "first", want); err != nil {
				t.Fatal(err)
			}
		}
		if len(given) != 1 || !slices.Equal(given[0], want) {
			t.Errorf("they were given %q", given)
		}
		if err := after(h, "second", want); err == nil || !strings.Contains(err.Error(), fail.Error()) {
			t.Errorf("of one that fails: %v", err)
		}
		if err := after(h, "third", nil); err != nil || len(given) != 2 {
			t.Errorf("without: %v, %q", err, given)
		}
		if err := after(h, "fourth", []string{"A"}); err == nil || len(given) != 2 {
			t.Errorf("of what is none: %v, %q", err, given)
		}
	})
	t.Run("without", func(t *testing.T) {
		w := newWorld(t)
		h := w.host()
		resumed := 0
		w.guest(&Guest{AfterResume: func(context.Context, bool) error { resumed++; return nil }})
		if err := after(h, "", want); !errors.Is(err, ErrNoEnvironment) || resumed != 1 {
			t.Errorf("it is resumed %d times, %v", resumed, err)
		}
	})
	for _, bad := range [][]string{{"A"}, {"=b"}, {"1=b"}, {"a b=c"}, {":A=b"}, {"web:=b"}, {"-web:A=b"}, {"A=\x00"}, {"A=\xff"}, {"A=" + strings.Repeat("x", maxEnvironment)}, slices.Repeat([]string{"A=b"}, maxVariables+1)} {
		if CheckEnvironment(bad) == nil {
			t.Errorf("%.40q is taken", bad)
		}
	}
	if err := CheckEnvironment([]string{"A=", "web-1.x:PATH_2=a=b:c\nd", "a.b-c=1"}); err != nil {
		t.Error(err)
	}
}

func TestShutDown(t *testing.T) {
	w := newWorld(t)
	h := w.host()
	var told []bool // written by calls, one after the other
	w.guest(&Guest{ShutDown: func(_ context.Context, reboot bool) error {
		told = append(told, reboot)
		if len(told) > 2 {
			return errors.New("it is too late")
		}
		return nil
	}})
	ctx := within(t, time.Minute)
	for _, reboot := range []bool{false, true} {
		if err := h.ShutDown(ctx, reboot); err != nil {
			t.Fatal(err)
		}
	}
	if !slices.Equal(told, []bool{false, true}) {
		t.Errorf("it was told to reboot: %v", told)
	}
	if err := h.ShutDown(ctx, false); err == nil || !strings.Contains(err.Error(), "too late") {
		t.Errorf("got error %v", err)
	}

	other := newWorld(t)
	h = other.host()
	other.guest(&Guest{})
	if err := h.ShutDown(ctx, false); err == nil || !strings.Contains(err.Error(), "does not shut it down") {
		t.Errorf("of an agent without: got error %v", err)
	}
}

// TestExactlyOnce cuts the connection at every phase of a call, again and again: each call is executed once.
func TestExactlyOnce(t *testing.T) {
	w := newWorld(t)
	h := w.host()
	entered, leave := make(chan string), make(chan error)
	hook := func(name string) error { entered <- name; return <-leave }
	w.guest(&Guest{
		BeforeSuspend: func(context.Context) error { return hook("before") },
		AfterResume:   func(context.Context, bool) error { return hook("after") },
	})
	ctx := within(t, time.Minute)
	for round := range 20 {
		for _, c := range []struct {
			name string
			call func() error
		}{
			{"before", func() error { return h.BeforeSuspend(ctx) }},
			{"after", func() error { return h.AfterResume(ctx, AfterResumeRequest{}) }},
		} {
			if round%3 == 0 {
				w.cut()
			}
			result := make(chan error, 1)
			go func() { result <- c.call() }()
			if got := <-entered; got != c.name {
				t.Fatalf("executed %q, want %q", got, c.name)
			}
			if round%2 == 0 {
				w.cut() // the host asks again, and waits for the same execution
			}
			leave <- nil
			select {
			case err := <-result:
				if err != nil {
					t.Fatal(err)
				}
			case name := <-entered:
				t.Fatalf("%q was executed twice", name)
			}
		}
	}
}

// TestRetryByAnotherProcess repeats a call, by its id, from another host.
func TestRetryByAnotherProcess(t *testing.T) {
	w := newWorld(t)
	executed := 0
	w.guest(&Guest{AfterResume: func(context.Context, bool) error { executed++; return errors.New("hook failed") }})
	ctx := within(t, time.Minute)
	for range 3 {
		h := w.host()
		err := h.AfterResume(ctx, AfterResumeRequest{ID: "journaled"})
		if err == nil || !strings.Contains(err.Error(), "hook failed") {
			t.Errorf("got %v, want the outcome of the first", err)
		}
		h.Close()
	}
	if executed != 1 {
		t.Errorf("executed %d times, want once", executed)
	}
	h := w.host()
	h.AfterResume(ctx, AfterResumeRequest{})
	if executed != 2 {
		t.Errorf("a new call was executed %d times", executed-1)
	}
}

// TestUnknownOutcome gives up a call that is executed: asking again joins it, and the resume waits for its end.
func TestUnknownOutcome(t *testing.T) {
	w := newWorld(t)
	h := w.host()
	entered, leave := make(chan string, 10), make(chan error)
	w.guest(&Guest{
		BeforeSuspend: func(context.Context) error { entered <- "before"; return <-leave },
		AfterResume:   func(context.Context, bool) error { entered <- "after"; return nil },
	})
	ctx, cancel := context.WithCancel(context.Background())
	result := make(chan error, 1)
	go func() { result <- h.BeforeSuspend(ctx) }()
	<-entered
	cancel()
	if err := <-result; !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v, want context.Canceled", err)
	}
	go func() { result <- h.BeforeSuspend(within(t, time.Minute)) }()
	leave <- errors.New("not now")
	if err := <-result; err == nil || !strings.Contains(err.Error(), "not now") {
		t.Fatalf("second call: got %v, want the outcome of the first", err)
	}
	if err := h.AfterResume(within(t, time.Minute), AfterResumeRequest{}); err != nil {
		t.Fatal(err)
	}
	if got := <-entered; got != "after" || len(entered) > 0 {
		t.Errorf("executed %q and %d more, want after alone", got, len(entered))
	}
}

// TestDeadAgents has all kinds of guests that do not answer.
func TestDeadAgents(t *testing.T) {
	for _, c := range []struct {
		name string
		act  func(conn net.Conn)
	}{
		{"silent", func(conn net.Conn) {}},
		{"noise", func(conn net.Conn) { conn.Write([]byte(strings.Repeat("GET / HTTP/1.1\r\n", 100))) }},
		{"gone", func(conn net.Conn) { conn.Close() }},
		{"endless", func(conn net.Conn) { // a frame of 4 GiB
			conn.Write([]byte{0xff, 0xff, 0xff, 0xff, 0, 0, 0, 1, 2, 0})
			go io.Copy(conn, neverEnding{})
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t)
			h := w.host()
			for range 2 * serve.MaxIntroductions {
				conn, err := w.dial(t.Context(), DefaultPort)
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				c.act(conn)
			}
			ctx := within(t, 100*time.Millisecond)
			if err := h.BeforeSuspend(ctx); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("got %v, want deadline exceeded", err)
			}
			h.Close()
		})
	}
	t.Run("none", func(t *testing.T) {
		w := newWorld(t)
		err := w.host().AfterResume(within(t, 10*time.Millisecond), AfterResumeRequest{})
		if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "no agent has connected") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("hangs in a hook", func(t *testing.T) {
		w := newWorld(t)
		h := w.host()
		w.guest(&Guest{BeforeSuspend: func(ctx context.Context) error { <-ctx.Done(); return fmt.Errorf("hook: %w", ctx.Err()) }})
		if _, err := h.Wait(within(t, time.Minute)); err != nil {
			t.Fatal(err)
		}
		err := h.BeforeSuspend(within(t, 500*time.Millisecond))
		if err == nil || !strings.Contains(err.Error(), "deadline exceeded") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("closed during a call", func(t *testing.T) {
		w := newWorld(t)
		h := w.host()
		entered := make(chan bool)
		w.guest(&Guest{BeforeSuspend: func(ctx context.Context) error { close(entered); <-ctx.Done(); return nil }})
		go func() { <-entered; h.Close() }()
		if err := h.BeforeSuspend(context.Background()); !errors.Is(err, net.ErrClosed) {
			t.Errorf("got %v, want closed", err)
		}
	})
}

type neverEnding struct{}

func (neverEnding) Read(p []byte) (int, error) { return len(p), nil }

func TestHook(t *testing.T) {
	t.Run("fails", func(t *testing.T) {
		w := newWorld(t)
		h := w.host()
		w.guest(&Guest{BeforeSuspend: func(ctx context.Context) error {
			return RunHook(ctx, "sh", `echo "cannot flush $WHAT" >&2; exit 3`, "WHAT=everything")
		}})
		err := h.BeforeSuspend(within(t, time.Minute))
		for _, want := range []string{"exit status 3", "cannot flush everything"} {
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("got %v, want %q in it", err, want)
			}
		}
	})
	t.Run("long output", func(t *testing.T) {
		err := RunHook(t.Context(), "sh", `i=0; while [ $i -lt 2000 ]; do echo line $i; i=$((i+1)); done; exit 1`)
		if err == nil || !strings.HasSuffix(err.Error(), "line 1999") || len(err.Error()) > 2*maxOutput {
			t.Errorf("got %v", err)
		}
	})
	t.Run("no shell", func(t *testing.T) {
		if err := RunHook(t.Context(), "/no/such/shell", "true"); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("got %v, want not exist", err)
		}
	})
	t.Run("killed with its group", func(t *testing.T) {
		fifo := filepath.Join(t.TempDir(), "children")
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- RunHook(ctx, "sh", `(echo started; exec sleep 1000) >`+fifo+` & wait`) }()
		// The child holds the file open; when it is gone nothing holds the lock of its process group.
		for {
			if b, _ := os.ReadFile(fifo); string(b) == "started\n" {
				break
			}
			<-time.After(time.Millisecond)
		}
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("got %v, want context.Canceled", err)
		}
		for range 1000 {
			if !holdsOpen(t, fifo) {
				return
			}
			<-time.After(10 * time.Millisecond)
		}
		t.Error("a process of the command's group lives on")
	})
	t.Run("background child", func(t *testing.T) {
		if err := RunHook(t.Context(), "sh", `sleep 3 & exit 0`); err != nil {
			t.Errorf("got %v, want nil", err)
		}
	})
}

func TestRunHooks(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "hooks.d")
	if HasHooks(dir) {
		t.Error("a folder that does not exist has hooks")
	}
	if err := RunHooks(t.Context(), dir); err != nil {
		t.Errorf("folder that does not exist: %v", err)
	}
	out := filepath.Join(t.TempDir(), "out")
	write := func(name, content string, mode os.FileMode) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), mode); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.MkdirAll(filepath.Join(dir, "folder"), 0o755); err != nil {
		t.Fatal(err)
	}
	write("20-README", "no program", 0o644)
	write("20-old.dpkg-dist", "#!/bin/sh\necho wrong >> "+out+"\n", 0o755)
	if HasHooks(dir) {
		t.Error("folders, texts and what a package left behind are hooks")
	}
	write("30-second", "#!/bin/sh\necho second $WHAT >> "+out+"\n", 0o755)
	write("10-first", "#!/bin/sh\necho first $WHAT >> "+out+"\n", 0o755)
	write("40-fails", "#!/bin/sh\necho cannot >&2\nexit 3\n", 0o755)
	write("50-never", "#!/bin/sh\necho wrong >> "+out+"\n", 0o755)
	if !HasHooks(dir) {
		t.Error("programs are no hooks")
	}
	err := RunHooks(t.Context(), dir, "WHAT=hook")
	for _, want := range []string{"40-fails", "exit status 3", "cannot"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q in it", err, want)
		}
	}
	if got, err := os.ReadFile(out); err != nil || string(got) != "first hook\nsecond hook\n" {
		t.Errorf("ran %q, %v", got, err)
	}
	if err := os.Symlink("/nowhere", filepath.Join(dir, "60-link")); err != nil {
		t.Fatal(err)
	}
	if err := RunHooks(t.Context(), dir); !errors.Is(err, os.ErrNotExist) || !HasHooks(dir) {
		t.Errorf("link to nowhere: %v", err)
	}
}

// holdsOpen reports whether any process has the file open.
func holdsOpen(t *testing.T, path string) bool {
	fds, err := filepath.Glob("/proc/[0-9]*/fd/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		if target, _ := os.Readlink(fd); target == path {
			return true
		}
	}
	return false
}

func TestSetClockRefusesNonsense(t *testing.T) {
	for _, now := range []time.Time{{}, time.Unix(0, 0), time.Unix(1<<40, 0), time.Unix(-1<<40, 0)} {
		if _, err := setClock(now); err == nil {
			t.Errorf("%v was accepted", now)
		}
	}
	if step, err := setClock(time.Now()); step != 0 || err != nil {
		t.Errorf("a clock that is right was set by %v, %v", step, err)
	}
}

func TestReseed(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root: only it may add entropy")
	}
	if err := reseed(NewEntropy()); err != nil {
		t.Fatal(err)
	}
}

func TestLiveness(t *testing.T) {
	w := newWorld(t)
	l, err := ListenLiveness(w.dir, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := l.Wait(within(t, 10*time.Millisecond)); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("before: got %v, want deadline exceeded", err)
	}
	if err := SayAlive(within(t, time.Minute), 0, w.dial); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := l.Wait(within(t, time.Minute)); err != nil {
			t.Fatal(err)
		}
	}
	l.Close()
	if err := l.Wait(t.Context()); err != nil {
		t.Errorf("after Close of one that heard of the guest: %v", err)
	}
	if err := SayAlive(within(t, 10*time.Millisecond), 0, w.dial); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("nobody listens: got %v, want deadline exceeded", err)
	}
}
