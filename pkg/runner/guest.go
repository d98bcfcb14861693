package runner

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/drafter-vm/drafter/pkg/agent"
	"github.com/drafter-vm/drafter/pkg/agent/channel"
	"github.com/drafter-vm/drafter/pkg/agent/socket"
	"github.com/drafter-vm/drafter/pkg/vmm"
)

// guest is the host's side of the services in an instance's guest. A nil guest has none: every method does nothing.
type guest struct {
	path     string
	log      *slog.Logger
	carried  bool            // by the hypervisor, which offers VMPath/vsock.sock itself
	channel  *channel.Host   // nil until serve, and where it is carried
	agents   agents          // none if the guest has no agent
	liveness *agent.Liveness // nil unless the guest boots and will say when it is up

	told telling // that the guest will be suspended; of one goroutine at a time
	note callNote
}

// callNote says which call to the agent was begun last and is not known to be over. It is kept in a file beside the VMPath,
// so that who adopts the machine of a process that died repeats that call, which the guest does not execute twice, and
// makes the one that must follow it.
type callNote struct {
	Suspend string `json:"suspend,omitempty"` // id of a BeforeSuspend that no AfterResume has followed
	Resume  string `json:"resume,omitempty"`  // id of an AfterResume that has not been answered
	Clone   bool   `json:"clone,omitempty"`   // that says that there are others

	MachineID string `json:"machineID,omitempty"` // and gives these; the former in hexadecimal
	HostName  string `json:"hostName,omitempty"`
	Network   string `json:"network,omitempty"` // JSON

	Environment string `json:"environment,omitempty"` // JSON
}

// next is the note of calls that follow, which tell the guest what it was not told yet.
func (n callNote) next(suspend, resume string) callNote {
	n.Suspend, n.Resume = suspend, resume
	return n
}

// identity is what the call gives the guest.
func (n callNote) identity() agent.Identity {
	id, _ := hex.DecodeString(n.MachineID) // ours
	identity := agent.Identity{MachineID: id, HostName: n.HostName}
	_ = json.Unmarshal([]byte(n.Network), &identity.Network)         // ours, or empty
	_ = json.Unmarshal([]byte(n.Environment), &identity.Environment) // likewise
	return identity
}

// callFile is the name of that file.
const callFile = "agent.json"

// write replaces the file. It is not synced: it is of use to a living machine only.
func (n callNote) write(vmPath string) error {
	path := filepath.Join(filepath.Dir(vmPath), callFile)
	if n == (callNote{}) {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		return nil
	}
	text, err := json.Marshal(n)
	if err == nil {
		err = os.WriteFile(path+".new", text, 0o600)
	}
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	return err
}

// remember makes n the note. A call is made all the same when that fails.
func (g *guest) remember(n callNote) {
	g.note = n
	if err := n.write(g.path); err != nil {
		g.log.Warn("a process that takes over from this one would not know what the guest's agent was told", "error", err)
	}
}

// recall finds out what a former owner of the machine has told the agent.
func (g *guest) recall() {
	text, err := os.ReadFile(filepath.Join(filepath.Dir(g.path), callFile))
	if err != nil || len(g.agents) == 0 {
		return
	}
	if json.Unmarshal(text, &g.note) == nil && g.note.Suspend != "" {
		g.told = uncertain
	}
}

// owed reports whether the agent is to be told that the guest runs.
func (g *guest) owed() bool { return g != nil && g.note != callNote{} }

// noteResume notes, before a guest runs that was saved or sent, that its agent is to be told, whether it is a clone, which has an identity of
// its own, what it is called if that changes, what its network is, and what its containers are given.
func (g *guest) noteResume(cfg *Config) {
	if g == nil || len(g.agents) == 0 {
		return
	}
	n := callNote{Resume: rand.Text(), Clone: cfg.Clone, HostName: cfg.HostName}
	if cfg.Clone {
		n.MachineID = hex.EncodeToString(agent.NewMachineID())
	}
	if !cfg.Network.IsZero() {
		text, _ := json.Marshal(cfg.Network) // strings only: cannot fail
		n.Network = string(text)
	}
	if len(cfg.Environment) > 0 {
		text, _ := json.Marshal(cfg.Environment) // likewise
		n.Environment = string(text)
	}
	g.remember(n)
}

// telling is whether the agent knows of a suspend that has not been followed by a resume.
type telling int

const (
	untold    telling = iota
	uncertain         // the call was sent and not answered
	told
)

// openGuest listens for the guest's services, which must be done before the guest runs.
func (i *Instance) openGuest(boots bool) (_ *guest, err error) {
	g := &guest{path: i.path, log: i.log, carried: vmm.RequirementsOf(i.cfg.Backend).Carries}
	defer func() {
		if err != nil {
			g.close()
		}
	}()
	if g.agents, err = listenAgents(g.path, i.desc.agentPorts(), g.log); err != nil {
		return nil, err
	}
	if boots && i.desc.LivenessVSockPort != 0 {
		if g.liveness, err = agent.ListenLiveness(g.path, i.desc.LivenessVSockPort); err != nil {
			return nil, err
		}
	}
	if host := i.cfg.Host; g.carried && (host.UID != 0 || host.GID != 0) {
		// The hypervisor connects to them itself, as whoever it runs as.
		ports := i.desc.agentPorts()
		if g.liveness != nil {
			ports = append(ports, i.desc.LivenessVSockPort)
		}
		for _, port := range ports {
			if err := os.Chown(socket.PortPath(socket.HostPath(g.path), port), host.UID, host.GID); err != nil {
				return nil, fmt.Errorf("give the guest's port %d to the hypervisor: %w", port, err)
			}
		}
	}
	return g, nil
}

// VSockName is the socket in the VMPath at which programs of the host reach the guest's.
const VSockName = socket.FileName

// serve connects to the machine's guest channel and offers VMPath/vsock.sock.
// A guest that was received does not notice before quiet is closed; nil: at once.
func (g *guest) serve(quiet <-chan struct{}) error {
	if g == nil || g.carried {
		return nil
	}
	var err error
	g.channel, err = channel.StartHost(channel.HostConfig{Dir: g.path, Quiet: quiet, Logger: g.log})
	return err
}

// reconnect is serve once more, with new connections. What a hypervisor carries begins anew at each pause.
func (g *guest) reconnect() error {
	if g.carried {
		return nil
	}
	if err := g.channel.Close(); err != nil {
		return err
	}
	return g.serve(nil)
}

// close ends all connections with the guest.
func (g *guest) close() error {
	if g == nil {
		return nil
	}
	var errs []error
	errs = append(errs, g.agents.Close())
	if g.liveness != nil {
		errs = append(errs, g.liveness.Close())
	}
	if g.channel != nil {
		errs = append(errs, g.channel.Close())
	}
	return errors.Join(errs...)
}

// waitAlive waits until the guest says that it is up.
func (g *guest) waitAlive(ctx context.Context, m vmm.Machine, timeout time.Duration) error {
	if g == nil || g.liveness == nil {
		return nil
	}
	return bounded(ctx, m, timeout, "the guest did not say that it is up", g.liveness.Wait)
}

// waitAgent waits until the guest's agent is connected.
func (g *guest) waitAgent(ctx context.Context, m vmm.Machine, timeout time.Duration) error {
	if g == nil || len(g.agents) == 0 {
		return nil
	}
	return bounded(ctx, m, timeout, "the guest's agent did not connect", func(ctx context.Context) error {
		version, err := g.agents.Wait(ctx)
		g.log.Debug("agent is connected", "version", version)
		return err
	})
}

// hasHook reports whether the guest's agent has something of its own to do after a resume.
func (g *guest) hasHook() bool { return g != nil && g.agents.HasHook() }

func (g *guest) beforeSuspend(ctx context.Context, m vmm.Machine, timeout time.Duration) error {
	if g == nil || len(g.agents) == 0 {
		return nil
	}
	if ctx.Err() != nil {
		return context.Cause(ctx) // and the guest knows nothing
	}
	if g.told != uncertain || g.note.Suspend == "" {
		g.remember(g.note.next(rand.Text(), ""))
	}
	g.agents.RepeatSuspend(g.note.Suspend)
	g.told = uncertain
	return bounded(ctx, m, timeout, "the guest's agent did not get ready for the suspend", func(ctx context.Context) error {
		err := g.agents.BeforeSuspend(ctx)
		if err == nil || ctx.Err() == nil { // it did, or said why it does not
			g.told = told
		}
		return err
	})
}

// shutDown has the guest's agent begin to shut it down. What shuts down may not answer.
func (g *guest) shutDown(ctx context.Context, m vmm.Machine, reboot bool) error {
	if g == nil {
		return errors.New("the guest has no agent")
	}
	ctx, cancel := context.WithTimeoutCause(ctx, pressEvery, fmt.Errorf("no answer within %s", pressEvery))
	defer cancel()
	return whileAlive(ctx, m, func(ctx context.Context) error { return g.agents.ShutDown(ctx, reboot) })
}

// undoSuspend is afterResume for a guest that was not suspended after all, or runs on: it is told as often as it was told of
// the suspend. Where that is uncertain the call is repeated first, which the guest does not execute twice. Each agent is told by
// itself: one that does not answer keeps no other waiting.
func (g *guest) undoSuspend(ctx context.Context, m vmm.Machine, timeout time.Duration) error {
	if g == nil || g.told == untold && !g.owed() {
		return nil
	}
	again := g.told == uncertain
	g.told = untold
	if g.note.Resume == "" {
		g.remember(g.note.next(g.note.Suspend, rand.Text()))
	}
	return g.tellResumed(ctx, m, timeout, again)
}

func (g *guest) afterResume(ctx context.Context, m vmm.Machine, timeout time.Duration) error {
	if g == nil || len(g.agents) == 0 {
		return nil
	}
	g.told = untold
	if g.note.Resume == "" {
		g.remember(g.note.next("", rand.Text()))
	}
	return g.tellResumed(ctx, m, timeout, false)
}

// tellResumed tells all agents, by g.note, that the guest runs; with again, first once more of the suspend that came before.
func (g *guest) tellResumed(ctx context.Context, m vmm.Machine, timeout time.Duration, again bool) error {
	note, identity := g.note, g.note.identity()
	if again {
		g.agents.RepeatSuspend(note.Suspend)
	}
	var silent, given, ignored atomic.Bool // one of them: has not answered; has done all it was asked for; has no containers to give an environment
	err := g.agents.each(func(_ int, h *agent.Host) error {
		var errs []error
		if again {
			errs = append(errs, bounded(ctx, m, timeout, "the guest's agent did not get ready for the suspend", h.BeforeSuspend))
		}
		return errors.Join(append(errs, bounded(ctx, m, timeout, "the guest's agent did not answer after the resume", func(ctx context.Context) error {
			err := h.AfterResume(ctx, agent.AfterResumeRequest{ID: note.Resume, Entropy: agent.NewEntropy(), Clone: note.Clone, Identity: identity})
			if err != nil && ctx.Err() != nil {
				silent.Store(true)
			}
			switch {
			case errors.Is(err, agent.ErrNoEnvironment):
				ignored.Store(true)
				return nil
			case err == nil:
				given.Store(true)
			}
			return err
		}))...)
	})
	if !silent.Load() {
		g.remember(callNote{})
	}
	if err == nil && ignored.Load() && !given.Load() {
		err = agent.ErrNoEnvironment
	}
	return err
}

// bounded calls f with a context that ends after timeout, and when the machine ends.
func bounded(ctx context.Context, m vmm.Machine, timeout time.Duration, what string, f func(context.Context) error) error {
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, fmt.Errorf("no answer within the resume timeout of %s", timeout))
	defer cancel()
	if err := whileAlive(ctx, m, f); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

// whileAlive calls f, whose context ends with the machine.
func whileAlive(ctx context.Context, m vmm.Machine, f func(context.Context) error) error {
	ctx, ended := context.WithCancelCause(ctx)
	stop := make(chan struct{})
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		select {
		case <-m.Done():
			ended(errors.Join(errors.New("the machine has ended"), m.Err()))
		case <-stop:
		}
	}()
	defer func() { close(stop); <-watched; ended(nil) }()
	return f(ctx)
}
