package qemu

import (
	"fmt"
	"strings"
	"sync"

	"github.com/drafter-vm/drafter/pkg/vmm"
)

// state is where a machine is in its life.
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
type state int

const (
	waiting state = iota // for Load: no device state yet
	running
	paused // vCPUs stopped, devices flushed
	saved  // paused, and QEMU has migrated; cont takes it back
	broken // QEMU lives, but not in a state that we know: only Close is left
	closed // the process has ended
)

func (s state) String() string {
	return [...]string{"waiting for Load", "running", "paused", "saved", "broken", "closed"}[s]
}

// lifecycle holds a machine's state. It is the only writer of it.
type lifecycle struct {
	mu   sync.Mutex // guards what follows; not held during an operation
	now  state
	busy string // the operation under way; empty: none
}

// begin starts an operation that is legal in the states from, and returns the state it starts from. It fails with
// vmm.ErrState in other states, and while another operation is under way.
func (l *lifecycle) begin(op string, from ...state) (state, error) {
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

// end finishes the operation. A machine that was closed meanwhile stays closed.
func (l *lifecycle) end(next state) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.busy = ""
	if l.now != closed {
		l.now = next
	}
}

// close makes the machine closed, whatever is under way.
func (l *lifecycle) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.now = closed
}

func (l *lifecycle) state() state {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.now
}
