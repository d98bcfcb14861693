package faults

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/migrate"
	"github.com/drafter-vm/drafter/pkg/wire"
)

// Process is what drives a host's machine and takes part in migrations: the hooks of package migrate, without a hypervisor. Its
// death is like SIGKILL: from one instant on nothing that it does has an effect, its streams end without a word, and the
// machine lives on. The engine that runs in it does not know, and goes on until everything has failed.
type Process struct {
	host *Host
	ctx  context.Context // its life
	end  context.CancelFunc

	gate sync.RWMutex // held while a hook has its effect; guards dead. A writer does not wait for it: see die
	dead bool

	mu      sync.Mutex // guards what follows
	streams []io.ReadWriter
	memory  *block.Tracked // what the guest has, as long as it runs here
	disk    *block.Tracked
	plan    *Plan
}

// Plan is what happens to a process during a migration.
type Plan struct {
	// At is called at a moment: "state copying" when that state is entered, "before pause" and "after pause" around a hook.
	At map[string]func()
	// Fail is what a hook returns instead of doing anything.
	Fail map[string]error
	// Wrap replaces a device by its name. The guest does not notice.
	Wrap func(name string, d block.Device) block.Device
	// Trace, if set, is told each moment.
	Trace func(moment string)
}

// Hooks of a process, as named in a Plan.
var (
	SourceHooks      = []string{"suspend", "pause", "save", "resume", "commit", "abort", "done"}
	DestinationHooks = []string{"prepare", "postpone", "load", "commit", "run", "complete", "keep", "abort", "discard", "done"}
)

var errKilled = errors.New("the process was killed")

func newProcess(h *Host) *Process {
	p := &Process{host: h, plan: &Plan{}}
	p.ctx, p.end = context.WithCancel(context.Background())
	h.mu.Lock()
	h.process = p
	h.mu.Unlock()
	return p
}

func (p *Process) isDead() bool {
	p.gate.RLock()
	defer p.gate.RUnlock()
	return p.dead
}

// die is SIGKILL.
func (p *Process) die() {
	for !p.gate.TryLock() { // see VM.lock
		time.Sleep(tick / 10)
	}
	was := p.dead
	p.dead = true
	p.gate.Unlock()
	if was {
		return
	}
	p.end()
	p.mu.Lock()
	streams := p.streams
	p.mu.Unlock()
	for _, s := range streams {
		s.(io.Closer).Close()
	}
	if vm := p.host.machine(); vm != nil {
		vm.abandon()
	}
}

// take makes streams those that end with the process.
func (p *Process) take(streams []io.ReadWriter) {
	p.mu.Lock()
	p.streams = append(p.streams, streams...)
	p.mu.Unlock()
	if p.isDead() {
		for _, s := range streams {
			s.(io.Closer).Close()
		}
	}
}

// moment lets the plan act.
func (p *Process) moment(name string) {
	if p.isDead() {
		return
	}
	p.mu.Lock()
	plan := p.plan
	p.mu.Unlock()
	if plan.Trace != nil {
		plan.Trace(name)
	}
	if act := plan.At[name]; act != nil {
		act()
	}
}

// hook has an effect if the process lives, and at no time half of it.
func (p *Process) hook(name string, effect func() error) error {
	p.moment("before " + name)
	if err := p.live(name, effect); err != nil {
		return err
	}
	p.moment("after " + name)
	if p.isDead() {
		return errKilled
	}
	return nil
}

func (p *Process) live(name string, effect func() error) error {
	p.gate.RLock()
	defer p.gate.RUnlock()
	if p.dead {
		return errKilled
	}
	if err := p.plan.Fail[name]; err != nil {
		return err
	}
	return effect()
}

// serve has the process serve the devices of a machine.
func (p *Process) serve(vm *VM) {
	p.mu.Lock()
	p.memory, p.disk = block.NewTracked(vm.ram), block.NewTracked(vm.store)
	p.mu.Unlock()
	vm.serve(p.memory, p.disk)
}

var errNoMachine = errors.New("there is no machine")

func (p *Process) withVM(f func(*VM) error) error {
	vm := p.host.machine()
	if vm == nil {
		return errNoMachine
	}
	return f(vm)
}

// guest is the process as the source of a migration.
type guest struct{ *Process }

func (g guest) BeforeSuspend(context.Context) error {
	return g.hook("suspend", func() error {
		return g.withVM(func(vm *VM) error {
			for range 5 {
				vm.tryStep()
			}
			return nil
		})
	})
}

func (g guest) Pause(context.Context) error {
	return g.hook("pause", func() error { return g.withVM((*VM).pause) })
}

func (g guest) State(_ context.Context, w io.Writer) error {
	var state []byte
	err := g.hook("save", func() error {
		return g.withVM(func(vm *VM) error {
			defer vm.lock()()
			state = vm.program.encode()
			return nil
		})
	})
	if err == nil {
		_, err = w.Write(state)
	}
	return err
}

func (g guest) Resume(context.Context) error {
	return g.hook("resume", func() error { return g.withVM((*VM).run) })
}

func (g guest) Commit(_ context.Context, id string) error {
	return g.hook("commit", func() error { g.host.write(Record{Moved, id}); return nil })
}

func (g guest) Abort(_ context.Context, id string) error {
	return g.hook("abort", func() error { g.host.write(Record{Running, id}); return nil })
}

func (g guest) Done(context.Context, string) error {
	return g.hook("done", func() error { g.host.Settle(); return nil })
}

// target is the process as the destination of a migration.
type target struct {
	*Process
	copying  bool
	planted  Plant
	names    []string
	devices  map[string]block.Device
	kept     bool
	postpone bool
}

var (
	_ migrate.Guest     = guest{}
	_ migrate.Journal   = guest{}
	_ migrate.Postponer = (*target)(nil)
	_ migrate.Keeper    = (*target)(nil)
	_ migrate.Journal   = (*target)(nil)
)

func (t *target) Prepare(_ context.Context, m *wire.Manifest) (out []block.Device, err error) {
	err = t.hook("prepare", func() error {
		if r := t.host.Record(); r.Status == Running || r.Status == Moved {
			return migrate.Refuse("this host's guest is %s", r.Status)
		}
		if !t.copying {
			t.host.write(Record{Receiving, m.ID})
		}
		if err := t.host.forget(); err != nil {
			return err
		}
		t.host.mu.Lock()
		t.host.disk = NewDisk(diskSize)
		t.devices = map[string]block.Device{"memory": newMemory(), "disk": t.host.disk, "kernel": block.NewMemory(int64(len(kernel)))}
		t.host.mu.Unlock()
		for _, d := range m.Devices {
			dev, ok := t.devices[d.Name]
			if !ok {
				return migrate.Refuse("device %q is not configured here", d.Name)
			}
			if t.plan.Wrap != nil {
				dev = t.plan.Wrap(d.Name, dev)
			}
			if d.Name == "disk" {
				dev = t.spoil(dev)
			}
			t.names, out = append(t.names, d.Name), append(out, dev)
		}
		vm := newVM(t.host, Program{}, t.devices["memory"], t.devices["disk"])
		vm.kernel = t.devices["kernel"]
		t.host.mu.Lock()
		t.host.vm = vm
		t.host.mu.Unlock()
		return nil
	})
	return out, err
}

// spoil is the disk with what is planted in it.
func (t *target) spoil(d block.Device) block.Device {
	if t.planted.LoseWrite == 0 && !t.planted.LoseFlush {
		return d
	}
	spoiled := &Device{Device: d}
	if t.planted.LoseWrite > 0 {
		spoiled.Write = func(n int64, b []byte, off int64) (int, error) {
			if n == int64(t.planted.LoseWrite) {
				return len(b), nil
			}
			return d.WriteAt(b, off)
		}
	}
	if t.planted.LoseFlush {
		spoiled.Sync = func(int64) error { return nil }
	}
	return spoiled
}

func (t *target) CanPostpone() (can []bool) {
	for range t.names {
		can = append(can, t.postpone)
	}
	return can
}

func (t *target) Postpone(_ context.Context, missing [][]block.Range, ask func(int, block.Range)) ([]migrate.Late, error) {
	out := make([]migrate.Late, len(missing))
	err := t.hook("postpone", func() error {
		return t.withVM(func(vm *VM) error {
			vm.asks(t.names, ask)
			for i, list := range missing {
				if list == nil {
					continue
				}
				file := ""
				if t.names[i] == "disk" {
					file = t.host.list()
				}
				if err := vm.postpone(t.names[i], list, file); err != nil {
					return err
				}
				out[i] = vm.late(t.names[i])
			}
			return nil
		})
	})
	return out, err
}

func (t *target) Load(ctx context.Context, r io.Reader) error {
	state, err := io.ReadAll(r)
	if err != nil {
		return err
	}
	err = t.hook("load", func() error { return nil })
	if err != nil {
		return err
	}
	// Not as an effect that has to be whole: it may wait, and who dies meanwhile leaves nothing that anybody looks at.
	program, err := decodeProgram(state)
	if err != nil {
		return err
	}
	return t.withVM(func(vm *VM) error {
		loaded := make(chan struct{})
		defer close(loaded)
		stop := context.AfterFunc(ctx, func() { // again and again: its next wait may be yet to come
			for {
				vm.interrupt()
				select {
				case <-loaded:
					return
				case <-time.After(tick):
				}
			}
		})
		defer stop()
		return vm.load(program)
	})
}

func (t *target) Run(context.Context) error {
	return t.hook("run", func() error {
		return t.withVM(func(vm *VM) error {
			t.serve(vm)
			return vm.run()
		})
	})
}

func (t *target) Complete(context.Context) error {
	return t.hook("complete", func() error {
		return t.withVM((*VM).complete)
	})
}

func (t *target) Keep(context.Context) error {
	return t.hook("keep", func() error {
		defer t.host.KillVMM()
		return t.withVM(func(vm *VM) error {
			t.kept = true
			if err := vm.verify(); err != nil {
				t.host.world.wrong("copy: %v", err)
			}
			return nil
		})
	})
}

func (t *target) Discard(context.Context) error {
	return t.hook("discard", func() error { t.host.KillVMM(); return t.host.forget() })
}

func (t *target) Commit(_ context.Context, id string) error {
	return t.hook("commit", func() error { t.host.write(Record{Running, id}); return nil })
}

func (t *target) Abort(_ context.Context, id string) error {
	return t.hook("abort", func() error { t.host.write(Record{Aborted, id}); return nil })
}

func (t *target) Done(context.Context, string) error {
	return t.hook("done", func() error { return nil })
}

// claim is what the process knows, which was started again, of the guest that it has received.
func (p *Process) claim(id string) migrate.Claim {
	return migrate.Claim{
		ID: id,
		Devices: func(_ context.Context, ask func(int, block.Range)) (out []migrate.ClaimDevice, err error) {
			err = p.withVM(func(vm *VM) error {
				names := []string{"disk", "kernel"}
				if vm.late("memory") != nil { // else it may have been booted, and has nothing to do with that of the source
					names = append(names, "memory")
				}
				for _, name := range names {
					size := map[string]int64{"memory": memorySize, "disk": diskSize, "kernel": int64(len(kernel))}[name]
					out = append(out, migrate.ClaimDevice{Name: name, Size: size, Late: vm.late(name)})
				}
				vm.asks(names, ask)
				return nil
			})
			return out, err
		},
		Complete: func(context.Context) error {
			return p.live("complete", func() error { return p.withVM((*VM).complete) })
		},
	}
}

// kernel is a device that never changes.
var kernel = bytes.Repeat([]byte("a kernel changes for nobody. "), 1500)

// busy is a device of a running guest, which executes a little whenever something is read.
type busy struct {
	block.Device
	vm *VM
}

func (b busy) ReadAt(p []byte, off int64) (int, error) {
	b.vm.tryStep()
	return b.Device.ReadAt(p, off)
}

func (b busy) NextData(off int64) (block.Range, error) { return block.NextData(b.Device, off) }

// tracker is a tracker that answers as a test wants it to.
type tracker struct {
	block.Tracker
	answer func([]block.Range, error) ([]block.Range, error)
}

func (t tracker) Collect(ctx context.Context) ([]block.Range, error) {
	return t.answer(t.Tracker.Collect(ctx))
}

// forget returns an answer in which the n-th range of all is missing.
func forget(n int) func([]block.Range, error) ([]block.Range, error) {
	seen := 0
	return func(list []block.Range, err error) ([]block.Range, error) {
		var out []block.Range
		for _, r := range list {
			if seen++; seen != n {
				out = append(out, r)
			}
		}
		return out, err
	}
}

// devices are those of the machine, as the source of a migration sends them; nil: of one that has died.
func (p *Process) devices(vm *VM, policy migrate.Policy, track func([]block.Range, error) ([]block.Range, error)) []migrate.SourceDevice {
	blank := block.NewMemory(int64(len(kernel)))
	if _, err := blank.WriteAt(kernel, 0); err != nil {
		panic(fmt.Sprintf("a device in memory does not take what fits: %v", err))
	}
	wrap := func(name string, d block.Device) block.Device {
		if p.plan.Wrap != nil {
			return p.plan.Wrap(name, d)
		}
		return d
	}
	if vm == nil { // it has died; its disk is what it was
		return []migrate.SourceDevice{{Name: "disk", Device: p.host.disk}, {Name: "kernel", Device: blank}}
	}
	var memory, disk block.Tracker = p.memory, p.disk
	if n := p.host.world.Plant.LosePage; n > 0 {
		memory = tracker{memory, forget(n)}
	}
	if track != nil {
		memory, disk = tracker{memory, track}, tracker{disk, track}
	}
	return []migrate.SourceDevice{
		{Name: "memory", Device: wrap("memory", busy{p.memory, vm}), Tracker: memory, Policy: policy},
		{Name: "disk", Device: wrap("disk", busy{p.disk, vm}), Tracker: disk, Policy: policy},
		{Name: "kernel", Device: wrap("kernel", blank)},
	}
}
