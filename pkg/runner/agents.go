package runner

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"

	"github.com/drafter-vm/drafter/pkg/agent"
)

// agents are the agents of a guest, which are told at the same time, and stand and fall together: when one does not get ready the
// others are told that the guest runs on, and a call whose outcome is unknown of one is repeated to all, by its id, which those
// that have executed it do not do again.
type agents []portAgent

type portAgent struct {
	*agent.Host
	port uint32
}

// listenAgents listens for an agent on each port.
func listenAgents(path string, ports []uint32, log *slog.Logger) (a agents, err error) {
	for _, port := range ports {
		h, err := agent.ListenAgent(path, port, log)
		if err != nil {
			return nil, errors.Join(err, a.Close())
		}
		a = append(a, portAgent{h, port})
	}
	return a, nil
}

// each calls f for all agents at the same time. With one agent an error is its own, otherwise it names the port.
func (a agents) each(f func(int, *agent.Host) error) error {
	errs := make([]error, len(a))
	var work sync.WaitGroup
	for n := range a {
		work.Go(func() {
			if errs[n] = f(n, a[n].Host); errs[n] != nil && len(a) > 1 {
				errs[n] = fmt.Errorf("agent on port %d: %w", a[n].port, errs[n])
			}
		})
	}
	work.Wait()
	if len(a) == 1 {
		return errs[0]
	}
	return errors.Join(errs...)
}

// Wait returns once all agents are connected, with their versions.
func (a agents) Wait(ctx context.Context) (string, error) {
	versions := make([]string, len(a))
	err := a.each(func(n int, h *agent.Host) (err error) {
		versions[n], err = h.Wait(ctx)
		return err
	})
	return strings.Join(versions, ", "), err
}

// HasHook reports whether any agent has something of its own to do after a resume.
func (a agents) HasHook() bool {
	return slices.ContainsFunc(a, func(p portAgent) bool { return p.HasHook() })
}

func (a agents) RepeatSuspend(id string) {
	for _, p := range a {
		p.RepeatSuspend(id)
	}
}

func (a agents) BeforeSuspend(ctx context.Context) error {
	return a.each(func(_ int, h *agent.Host) error { return h.BeforeSuspend(ctx) })
}

// ShutDown asks the first, which is enough.
func (a agents) ShutDown(ctx context.Context, reboot bool) error {
	if len(a) == 0 {
		return errors.New("the guest has no agent")
	}
	return a[0].ShutDown(ctx, reboot)
}

func (a agents) Close() error {
	return a.each(func(_ int, h *agent.Host) error { return h.Close() })
}
