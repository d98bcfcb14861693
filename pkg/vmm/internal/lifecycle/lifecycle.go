package lifecycle

import (
	"fmt"
	"strings"
	"sync"

	"github.com/drafter-vm/drafter/pkg/vmm"
)

// State is where a machine is in its life.
//
//	        ┌──────────── cont ────────────┐
//	        ▼                              │
//	     running ── stop ──► paused ── migrate ──► saved
//	                           ▲  ◄──── failed ─────┘│  └─ (again: the same bytes)
//	waiting ── migrate-incoming ┘
//	        └── failed ──► broken
//	any ── the process ends ──► closed
//
// Paused and saved are one state to the callers of [vmm.Machine]. QEMU tells them apart: it migrates a machine only
// once between two runs. The device state of a paused machine does not change, so the bytes of the first Save are kept
// and serve the next ones.
type State int

const (
	Waiting State = iota // for Load: no device state yet
	Running              // the vCPUs run
	Paused               // vCPUs stopped, devices flushed
	Saved                // paused, and QEMU has migrated; cont takes it back
	Broken               // QEMU lives, but not in a state that we know: only Close is left
	Closed               // the process has ended
)

func (s State) String() string {
	return [...]string{"waiting for Load", "running", "paused", "saved", "broken", "closed"}[s]
}

// Lifecycle holds a machine's state. It is the only writer of it.
type Lifecycle struct {
	mu   sync.Mutex // guards what follows; not held during an operation
	now  State
	busy string // the operation under way; empty: none
}

// Begin starts an operation that is legal in the states from, and returns the state it starts from. It fails with
// vmm.ErrState in other states, and while another operation is under way.
func (l *Lifecycle) Begin(op string, from ...State) (State, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.busy != "" {
		return l.now, fmt.Errorf("%s machine: %s is under way: %w", op, l.busy, vmm.ErrState)
	}
	for _, s := range from {
		if l.now == s {
			l.busy = op
			return s, nil
		}
	}
	want := make([]string, len(from))
	for i, s := range from {
		want[i] = s.String()
	}
	return l.now, fmt.Errorf("%s machine: it is %s, not %s: %w", op, l.now, strings.Join(want, " or "), vmm.ErrState)
}

// End finishes the operation. A machine that was closed meanwhile stays closed.
func (l *Lifecycle) End(next State) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.busy = ""
	if l.now != Closed {
		l.now = next
	}
}

// Close makes the machine closed, whatever is under way.
func (l *Lifecycle) Close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.now = Closed
}

// State is where it is.
func (l *Lifecycle) State() State {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.now
}

// Found sets the state in which a machine was found, or started.
func (l *Lifecycle) Found(s State) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.now = s
}

// VMM is the state as callers of a machine know it.
func (l *Lifecycle) VMM() vmm.State {
	switch l.State() {
	case Waiting:
		return vmm.StateWaiting
	case Running:
		return vmm.StateRunning
	case Paused, Saved:
		return vmm.StatePaused
	case Closed:
		return vmm.StateClosed
	}
	return vmm.StateBroken
}
