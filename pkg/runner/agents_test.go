package runner

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/drafter-vm/drafter/pkg/agent"
	"github.com/drafter-vm/drafter/pkg/agent/socket"
	"github.com/drafter-vm/drafter/pkg/vmm"
)

// lasting is a machine that does not end.
type lasting struct{ vmm.Machine }

func (lasting) Done() <-chan struct{} { return nil }

// told is what an agent has been told, and whether it answers.
type toldAgent struct {
	mu   sync.Mutex // guards said
	said []string
	hang chan struct{} // it does nothing more until this is closed; nil: it answers

	containers bool // it knows of some
}

func (a *toldAgent) hear(what string) error {
	a.mu.Lock()
	a.said = append(a.said, what)
	a.mu.Unlock()
	if a.hang != nil {
		<-a.hang
	}
	return nil
}

func (a *toldAgent) heard() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return strings.Join(a.said, " ")
}

// run serves the agent to the host whose folder is dir, until the test ends.
func (a *toldAgent) run(t *testing.T, dir string, port uint32) {
	ctx, cancel := context.WithCancel(context.Background())
	g := &agent.Guest{Port: port, Logger: slog.New(slog.DiscardHandler),
		BeforeSuspend: func(context.Context) error { return a.hear("before") },
		AfterResume:   func(context.Context, bool) error { return a.hear("after") },
		Dial: func(ctx context.Context, port uint32) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket.PortPath(socket.HostPath(dir), port))
		},
	}
	if a.containers {
		g.SetEnvironment = func(_ context.Context, environment []string) error { return a.hear(strings.Join(environment, ",")) }
	}
	var wg sync.WaitGroup
	wg.Go(func() { g.Serve(ctx) })
	t.Cleanup(func() { cancel(); wg.Wait() })
}

// One agent that does not answer keeps no other from hearing that the guest runs on.
func TestAgentsApart(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root: an agent sets the clock, which is right here, and feeds the random number generator")
	}
	dir := t.TempDir() + "/vm/root"
	if _, err := MakeFolders(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	g, err := (&Instance{path: dir, desc: Description{AgentVSockPort: 26, MoreAgents: []uint32{27}}, log: slog.New(slog.DiscardHandler)}).openGuest(false)
	if err != nil {
		t.Fatal(err)
	}
	defer g.close()
	well, ill := new(toldAgent), &toldAgent{hang: make(chan struct{})}
	well.run(t, dir, 26)
	ill.run(t, dir, 27)
	t.Cleanup(func() { close(ill.hang) }) // before it is waited for

	const patience = 500 * time.Millisecond
	err = g.beforeSuspend(t.Context(), lasting{}, patience)
	if err == nil || !strings.Contains(err.Error(), "agent on port 27") || strings.Contains(err.Error(), "agent on port 26") {
		t.Errorf("before the suspend: %v", err)
	}
	// As long as it takes for one to answer, and no longer: what is over for the one is not for the other.
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	err = g.undoSuspend(ctx, lasting{}, patience)
	if err == nil || strings.Contains(err.Error(), "agent on port 26") {
		t.Errorf("when it runs on: %v", err)
	}
	if got := well.heard(); got != "before after" {
		t.Errorf("the agent that answers was told %q", got)
	}
}

// An environment is given by the agent that knows of containers, whatever others there are; where none does, that is an error, also for who takes over from a process
// that has died.
func TestAgentsEnvironment(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root: an agent sets the clock, which is right here, and feeds the random number generator")
	}
	for name, containers := range map[string]bool{"one of two": true, "none": false} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir() + "/vm/root"
			if _, err := MakeFolders(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			open := func() *guest {
				t.Helper()
				g, err := (&Instance{path: dir, desc: Description{AgentVSockPort: 26, MoreAgents: []uint32{27}}, log: slog.New(slog.DiscardHandler)}).openGuest(false)
				if err != nil {
					t.Fatal(err)
				}
				return g
			}
			g := open()
			g.noteResume(&Config{Environment: []string{"A=b", "web:C=d"}})
			g.close()
			g = open()
			defer g.close()
			g.recall()
			one, other := &toldAgent{containers: containers}, new(toldAgent)
			one.run(t, dir, 26)
			other.run(t, dir, 27)
			err := g.afterResume(t.Context(), lasting{}, time.Minute)
			if containers && (err != nil || one.heard() != "A=b,web:C=d after") || !containers && (!errors.Is(err, agent.ErrNoEnvironment) || one.heard() != "after") || other.heard() != "after" {
				t.Errorf("they were told %q and %q: %v", one.heard(), other.heard(), err)
			}
			if g.owed() {
				t.Error("they are to be told again")
			}
		})
	}
}
