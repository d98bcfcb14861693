package e2e

import (
	"context"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/drafter-vm/drafter/pkg/agent/service"
	"github.com/drafter-vm/drafter/pkg/peer"
)

// TestService calls an application's own service in a guest, which calls back, on each host that the guest comes to.
func TestService(t *testing.T) {
	t.Parallel()
	g := newGuest(t)
	ctx := newContext(t)
	const port = 9000
	folders := []string{shortDir(t), shortDir(t)}
	// host is an instance on a host of that name, with its side of the service.
	host := func(name, folder string) (cfg peer.Config, endpoint func() *service.Endpoint, closed <-chan struct{}) {
		var mu sync.Mutex
		var e *service.Endpoint
		gone := make(chan struct{})
		cfg = g.config(t, folder)
		cfg.Hooks.Made = func(vmPath string) error {
			mu.Lock()
			defer mu.Unlock()
			var err error
			e, err = service.ListenHost(vmPath, service.Config{Port: port, Name: "e2e", Version: 1, Register: func(s *ttrpc.Server) {
				s.RegisterService("e2e.v1.Host", &ttrpc.ServiceDesc{Methods: map[string]ttrpc.Method{
					"Name": func(context.Context, func(any) error) (any, error) { return wrapperspb.String(name), nil },
				}})
			}})
			return err
		}
		cfg.Hooks.Closed = func() {
			mu.Lock()
			defer mu.Unlock()
			e.Close()
			close(gone)
		}
		return cfg, func() *service.Endpoint {
			mu.Lock()
			defer mu.Unlock()
			return e
		}, gone
	}
	check := func(t *testing.T, e *service.Endpoint, count int64, name string) {
		t.Helper()
		next, asked := new(wrapperspb.Int64Value), new(wrapperspb.StringValue)
		call := func(method string, answer any) func(context.Context, *ttrpc.Client) error {
			return func(ctx context.Context, c *ttrpc.Client) error {
				return c.Call(ctx, "e2e.v1.Guest", method, new(wrapperspb.StringValue), answer)
			}
		}
		if err := e.Call(ctx, call("Next", next)); err != nil || next.Value != count {
			t.Errorf("the guest counts %d, %v; want %d", next.Value, err, count)
		}
		if err := e.Retry(ctx, call("Ask", asked)); err != nil || asked.Value != name {
			t.Errorf("the guest asks %q, %v; want %q", asked.Value, err, name)
		}
	}

	cfg, here, gone := host("first", folders[0])
	p, err := peer.Resume(ctx, cfg)
	if err != nil {
		t.Fatalf("resume: %v", err)
	}
	defer func() { p.Close(context.WithoutCancel(ctx)) }()
	g.do(t, "spawn /bin/guest serve 9000")
	if version, err := here().Wait(ctx); err != nil || version != 1 {
		t.Fatalf("version %d, %v", version, err)
	}
	check(t, here(), 1, "first")

	cfg, there, _ := host("second", folders[1])
	p, _ = move(t, p, cfg)
	<-gone
	check(t, there(), 2, "second")

	// Saved and resumed, the guest's side is found again.
	if err := p.Close(ctx); err != nil {
		t.Fatal(err)
	}
	cfg, again, _ := host("third", folders[1])
	if p, err = peer.Resume(ctx, cfg); err != nil {
		t.Fatal(err)
	}
	check(t, again(), 3, "third")
}

// TestCommandAgents has two agents in one guest, both of which are told of all that happens.
func TestCommandAgents(t *testing.T) {
	t.Parallel()
	w := newWorkshop(t)
	c := w.snapshot(t, "package", "--agent-vsock-port", "26,27")
	w.do(t, "spawn /bin/drafter-agent agent --vsock-port 27 --shell-cmd /bin/guest --before-suspend-cmd before --after-resume-cmd after")
	c.wait(t, 0)
	told := func(t *testing.T, word string, want int) {
		t.Helper()
		for ctx := newContext(t); ; {
			said := w.do(t, "cat /hooks")
			if n := strings.Count(said, "["+word+"]"); n == want {
				return
			} else if n > want || ctx.Err() != nil {
				t.Fatalf("%q was said %d times, want %d: %s", word, n, want, said)
			}
		}
	}

	addr := freePort(t)
	src := w.start(t, w.console, w.peer("package", "here", "--laddr", addr)...)
	src.waitFor(t, "Serving on ")
	told(t, "before", 2)
	told(t, "after", 2)
	dst := w.start(t, w.console, w.peer("package", "there", "--raddr", addr)...)
	dst.waitFor(t, "Received VM")
	src.wait(t, 0)
	told(t, "before", 4)
	told(t, "after", 4)
	dst.Process.Signal(syscall.SIGTERM)
	dst.wait(t, 0)
	w.checkClean(t)

	// Without one of them a guest is not ready, and the error says which.
	said := w.snapshot(t, "deaf", "--agent-vsock-port", "26,28", "--resume-timeout", "15s").wait(t, 1)
	if !strings.Contains(said, "agent on port 28") {
		t.Errorf("it is not said which agent is missing:\n%s", said)
	}
	said = w.start(t, nil, w.snapshotter(t, "none", "--agent-vsock-port", "26,25")...).wait(t, 2)
	if !strings.Contains(said, "port 25 is for the guest's liveness and for an agent") {
		t.Errorf("it is not said that a port is used twice:\n%s", said)
	}
}
