package faults

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/drafter-vm/drafter/pkg/block"
)

// Status is what a host's record says about the guest. A record is durable as soon as it is written.
type Status string

const (
	NoRecord  Status = ""
	Running   Status = "running"   // the guest is this host's
	Receiving Status = "receiving" // a migration to here was begun
	Moved     Status = "moved"     // it was given away, and nobody has confirmed that
	Settled   Status = "settled"   // it was given away, and runs there
	Aborted   Status = "aborted"   // it will never run here from that migration
)

// Record is who has the guest, as a host knows it.
type Record struct {
	Status    Status
	Migration string
}

// Host is a machine room's host: what a power cut leaves (record, disk), what lives without its process (the VM), and the
// process that drives all that, which tests kill.
type Host struct {
	name  string
	world *World
	lists atomic.Int32 // how many lists of what is missing there were

	mu      sync.Mutex // guards what follows
	record  Record
	disk    *Disk
	vm      *VM      // nil: none
	process *Process // nil: it was never started
}

func (h *Host) String() string { return h.name }

// Record returns the host's record.
func (h *Host) Record() Record {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.record
}

func (h *Host) write(r Record) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.record = r
}

// machine is the living VM, or nil.
func (h *Host) machine() *VM {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.vm == nil || h.vm.isDead() {
		return nil
	}
	return h.vm
}

func (h *Host) runs() bool {
	vm := h.machine()
	return vm != nil && vm.isRunning()
}

// Process is the living process, or nil.
func (h *Host) Process() *Process {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.process == nil || h.process.isDead() {
		return nil
	}
	return h.process
}

// KillVMM is SIGKILL to the machine.
func (h *Host) KillVMM() {
	if vm := h.machine(); vm != nil {
		vm.kill()
	}
}

// KillProcess is SIGKILL to the process that drives the machine, which lives on.
func (h *Host) KillProcess() {
	if p := h.Process(); p != nil {
		p.die()
	}
}

// PowerCut ends everything here but what is durable.
func (h *Host) PowerCut() {
	h.KillProcess()
	h.KillVMM()
	h.world.mu.Lock()
	defer h.world.mu.Unlock()
	h.disk.PowerCut(h.world.rand)
}

// Start starts the process of a host that has none, in the way the record asks for: it adopts a living machine, boots the guest
// from its disk if it belongs here and has none, and ends what never was the guest's.
func (h *Host) Start() error {
	p := newProcess(h)
	vm := h.machine()
	switch r := h.Record(); {
	case r.Status == Running && vm != nil:
		p.serve(vm)
		return vm.run()
	case r.Status == Running:
		return h.boot(p)
	case r.Status == Moved && vm != nil:
		p.serve(vm) // paused: it may run elsewhere
	case r.Status == Receiving:
		h.KillVMM()
		h.write(Record{Aborted, r.Migration})
	default:
		h.KillVMM()
	}
	return nil
}

// list is the file that says what is missing of the disk.
func (h *Host) list() string {
	return filepath.Join(h.world.dir, fmt.Sprintf("%s-%d.missing", h.name, h.lists.Load()))
}

// inherit makes the list that a machine has left that of the next one. It is another file, as here nobody is ever gone so that
// its files were closed.
func (h *Host) inherit() error {
	b, err := os.ReadFile(h.list())
	if err != nil {
		return err
	}
	h.lists.Add(1)
	return os.WriteFile(h.list(), b, 0o600)
}

// forget forgets what is missing.
func (h *Host) forget() error {
	h.lists.Add(1) // a file that is still open is not the next one's
	if err := os.Remove(h.list()); !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// boot boots the guest from its disk. Where something of that is missing, it runs as soon as it has what it reads first.
func (h *Host) boot(p *Process) error {
	h.mu.Lock()
	disk := h.disk
	h.mu.Unlock()
	vm := newVM(h, Program{}, newMemory(), disk)
	vm.ready.Store(false)
	_, err := os.Stat(h.list())
	late := err == nil
	if late {
		if err := h.inherit(); err != nil {
			vm.kill()
			return err
		}
		if err := vm.postpone("disk", nil, h.list()); err != nil {
			vm.kill()
			return err
		}
	}
	h.mu.Lock()
	h.vm = vm
	h.mu.Unlock()
	p.serve(vm)
	if !late {
		return vm.boot()
	}
	h.world.wg.Go(func() {
		for !vm.isDead() && vm.boot() != nil {
			time.Sleep(tick) // its wait for content was interrupted
		}
	})
	return nil
}

// TakeBack is the operator's word that the guest, which was given away, is this host's: --force-owner.
func (h *Host) TakeBack() error {
	r := h.Record()
	if r.Status != Moved {
		return fmt.Errorf("host %s: the guest is not in doubt: %s", h.name, r.Status)
	}
	h.write(Record{Running, r.Migration})
	if vm := h.machine(); vm != nil {
		return vm.run()
	}
	return h.boot(h.Process())
}

// Settle notes that the guest is known to run elsewhere.
func (h *Host) Settle() {
	h.write(Record{Settled, h.Record().Migration})
	h.KillVMM()
}

func newMemory() *block.Memory { return block.NewMemory(memorySize) }
