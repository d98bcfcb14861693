package runner

import (
	"context"
	"time"

	"github.com/drafter-vm/drafter/pkg/vmm"
)

// agentDelay is how long a guest that was received runs before its agent hears of it. Whoever waits for an answer of the
// guest's programs comes first: the first instructions in a new place are the slowest, and an agent that connects anew
// doubles what the CPU has to do before an answer, where it is emulated. What the guest misses is a few milliseconds on its
// clock. An agent with a hook does not wait: the hook may start again what the one before the suspend has stopped.
const agentDelay = 300 * time.Millisecond

// Announce has the network send the guest's packets here, where they wait for it. It is for an instance that waits for Load,
// once the guest is paused at its source.
func (i *Instance) Announce() {
	i.mu.Lock()
	defer i.mu.Unlock()
	if a, ok := i.machine.(vmm.Announcer); ok && i.phase == waiting {
		if err := a.Announce(); err != nil {
			i.log.Warn("clients lose what they send before the guest runs here", "error", err)
		}
	}
}

// comeToRest gives a guest that was received the time until its agent may hear of it. mu must be held.
func (i *Instance) comeToRest(ctx context.Context) {
	if i.quiet != nil && !i.desc.AgentHook {
		select {
		case <-time.After(agentDelay):
		case <-i.machine.Done():
		case <-ctx.Done():
		}
	}
	i.greet()
}

// greet lets a guest that was received notice where it is. mu must be held.
func (i *Instance) greet() {
	if i.quiet != nil {
		close(i.quiet)
		i.quiet = nil
	}
}
