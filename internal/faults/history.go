package faults

import (
	"fmt"
	"time"

	"github.com/anishathalye/porcupine"
)

// Event is something that happened to the guest, or that a client was answered.
type Event struct {
	Register register // "": it is about who runs the guest
	Do       verb
	Host     string // that ran, stopped or booted the guest
	Value    uint64 // written, or read
}

type verb string

const (
	starts verb = "start" // the guest runs on Host
	stops  verb = "stop"  // it does not any more
	boots  verb = "boot"  // its memory was lost
	reads  verb = "read"
	writes verb = "write"
)

func (e Event) String() string {
	if e.Register == "" {
		return fmt.Sprintf("%s on %s", e.Do, e.Host)
	}
	return fmt.Sprintf("%s %d in %s", e.Do, e.Value, e.Register)
}

// History is what happened, each from the instant at which it was asked for to the one at which it was known to be done.
type History []porcupine.Operation

func (h *History) add(client int, call, end int64, e Event) {
	*h = append(*h, porcupine.Operation{ClientId: client, Input: e, Call: call, Return: end})
}

// Check reports whether the history is one of a single guest: one that runs on at most one host at any time, and that gives a
// client back what was last written, in some order that fits the times. It is checked by Porcupine.
func (h History) Check() error {
	parts := map[register]History{}
	for _, op := range h {
		e := op.Input.(Event)
		switch {
		case e.Do == boots: // forgets what is in memory, and is no client's of the disk
			op.Input = Event{Register: inMemory, Do: writes, Value: 0}
			parts[inMemory] = append(parts[inMemory], op)
		default:
			parts[e.Register] = append(parts[e.Register], op)
		}
	}
	for _, part := range []struct {
		name  register
		model porcupine.Model
		what  string
	}{{"", ownerModel, "who runs the guest"}, {inMemory, registerModel, "the register in memory"}, {onDisk, registerModel, "the register on disk"}} {
		// A second is a thousand times what a history here takes.
		switch porcupine.CheckOperationsTimeout(part.model, parts[part.name], time.Minute) {
		case porcupine.Illegal:
			return fmt.Errorf("the history of %s is none of one guest: %s", part.what, parts[part.name])
		case porcupine.Unknown:
			return fmt.Errorf("the history of %s could not be judged within a minute: %d operations", part.what, len(parts[part.name]))
		}
	}
	return nil
}

// String lists the end of the history.
func (h History) String() string {
	s := ""
	for _, op := range h[max(0, len(h)-40):] {
		s += fmt.Sprintf("\n  [%d, %d] %v", op.Call, op.Return, op.Input)
	}
	return s
}

// ownerModel is the guest as something that one host has at a time; its state is the host's name.
var ownerModel = porcupine.Model{
	Init: func() any { return "" },
	Step: func(state, input, _ any) (bool, any) {
		e := input.(Event)
		if e.Do == starts {
			return state == "", e.Host
		}
		return state == e.Host, ""
	},
}

// registerModel is a register that holds 0 at first.
var registerModel = porcupine.Model{
	Init: func() any { return uint64(0) },
	Step: func(state, input, _ any) (bool, any) {
		e := input.(Event)
		if e.Do == reads {
			return state == e.Value, state
		}
		return true, e.Value
	},
}
