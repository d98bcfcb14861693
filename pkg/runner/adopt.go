package runner

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"time"

	"github.com/drafter-vm/drafter/pkg/ram"
	"github.com/drafter-vm/drafter/pkg/vmm"
)

// ErrNotAlive is returned by Adopt when there is no living machine of the instance.
var ErrNotAlive = errors.New("the instance has no living machine")

// Adopt takes over the living machine of an instance whose owner has died: the guest goes on as if nothing had happened,
// with every page and every write that it had. Resume and Boot do the same when there is one; Adopt does nothing else.
//
// What becomes of it is what the instance's record says. Running: it runs, and if it had been paused, it is let run.
// Moved: it stays paused, as somebody else runs it, or may ([Instance.InDoubt]); Config.ForceOwner takes it back. Anything
// else: its guest never ran, or was saved, and it is ended.
func Adopt(ctx context.Context, cfg Config) (*Instance, error) {
	if !Alive(cfg.Devices) {
		return nil, ErrNotAlive
	}
	i, err := open(ctx, cfg, openExisting, nil)
	if err != nil && !Alive(cfg.Devices) { // it has ended meanwhile, or its guest never ran and it was ended: what is there need not be whole
		return nil, fmt.Errorf("%w any more: %w", ErrNotAlive, err)
	} else if err != nil {
		return nil, err
	}
	if i.orphan == nil {
		return nil, errors.Join(ErrNotAlive, i.abandon(ctx, false))
	}
	return i.takeOver(ctx, Adopt)
}

// errNeverRan says that the owner of a machine died before the guest ran in it.
var errNeverRan = errors.New("the guest never ran in this machine")

// takeOver makes the orphan that open found this instance's machine. Where its guest never ran, it is ended, and again
// starts the instance from what it was saved as.
func (i *Instance) takeOver(ctx context.Context, again func(context.Context, Config) (*Instance, error)) (*Instance, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	o, cfg := i.orphan, i.cfg
	if named(cfg.backends(), o.info.Hypervisor) == nil {
		return nil, errors.Join(fmt.Errorf("adopt instance: its machine (process %d) is of hypervisor %q, and %q was asked for: ask for that one, or for any (--hypervisor auto)",
			o.pid, o.info.Hypervisor, cfg.Backend.Name()), i.letGo())
	}
	err := i.adopt(ctx)
	switch {
	case err == nil:
		if cfg.RecordWorkingSet > 0 {
			i.log.Warn("the working set is not recorded", "reason", "the machine was running already")
		}
		return i, nil
	case errors.Is(err, errNeverRan):
		state := i.device(StateDevice)
		err := i.end(context.WithoutCancel(ctx), o)
		if err == nil {
			err = restoreSaved(state)
		}
		if err = errors.Join(err, i.letGo()); err != nil {
			return nil, fmt.Errorf("end a machine whose guest never ran: %w", err)
		}
		return again(ctx, cfg)
	case o.ended(endingTime / 10):
		// It was on its way out. What is left is what a power cut leaves.
		err = errors.Join(fmt.Errorf("adopt instance: its machine has just ended, as by a power cut: boot it from its disks with --boot: %w", err), i.reap(o.root, o.note))
	default:
		err = fmt.Errorf("adopt instance: %w: its machine (process %d, in %q) lives on: try again, or end it (kill -9 %d) and start the instance with --boot", err, o.pid, o.root, o.pid)
	}
	return nil, errors.Join(err, i.letGo())
}

// letGo closes everything but leaves the machine, and what is its own, as it is.
func (i *Instance) letGo() error {
	i.note(func() { i.machine = nil })
	i.root = ""
	for _, d := range i.disks {
		if m, ok := d.(*diskMount); ok {
			m.leave = true
		}
	}
	err := i.teardown()
	if errors.Is(err, ram.ErrIncomplete) {
		err = nil // whoever adopts it next goes on with that
	}
	return err
}

// adopt connects everything to the orphan. The order matters: the machine may be waiting for a page, or for a disk, with the
// thread that would answer us.
func (i *Instance) adopt(ctx context.Context) error {
	o := i.orphan
	adopter, ok := i.cfg.Backend.(vmm.Adopter)
	if !ok {
		return fmt.Errorf("hypervisor %q cannot be taken over", i.cfg.Backend.Name())
	}
	if none := i.device(MemoryDevice) == nil; none != o.info.NoMemory { // what becomes of it at its end is what it was started for
		return fmt.Errorf("the machine was started with a device %q: %t, and the configuration has one: %t: configure it as before", MemoryDevice, !o.info.NoMemory, !none)
	}
	record, err := ReadRecord(i.device(StateDevice))
	if err != nil {
		return err
	}
	i.point.front.Store(true)
	if record.Kept {
		i.point.record = Record{Length: record.Length, Sum: record.Sum, Kept: true, Time: record.Time}
	}
	whole := ctx
	ctx, cancel := context.WithTimeoutCause(ctx, i.cfg.RescueTimeout, fmt.Errorf("not done within the rescue timeout of %s", i.cfg.RescueTimeout))
	defer cancel()
	i.root, i.path = o.root, filepath.Join(o.root, "root")
	if have := i.cfg.Host; i.desc.MAC != "" && (have.Netns != o.info.Netns || have.Interface != o.info.Interface) {
		i.log.Warn("the adopted machine stays where it is", "netns", o.info.Netns, "interface", o.info.Interface)
	}
	i.cfg.Host.UID, i.cfg.Host.GID, i.cfg.Host.CgroupVersion = o.info.UID, o.info.GID, o.info.CgroupVersion
	i.cfg.Host.Netns, i.cfg.Host.Interface, i.cfg.Host.IOEngineSync = o.info.Netns, o.info.Interface, o.info.IOEngineSync
	if have := i.cfg.Host.Passthrough; len(have) > 0 && !slices.Equal(have, o.info.Passthrough) {
		i.log.Warn("the adopted machine keeps its devices of the host", "devices", o.info.Passthrough)
	}
	i.cfg.Host.Passthrough = o.info.Passthrough

	name := cmp.Or(o.info.Memory, memoryName(i.root))
	file := o.claim(name)
	if file == nil {
		return fmt.Errorf("process %d does not hold its memory %q", o.pid, name)
	}
	if i.memory, err = ram.Open(file); err != nil {
		return err
	}
	cfg := i.machineConfig(nil)
	if cfg.Disks, err = i.serveDisks(); err != nil {
		return err
	}
	handle, err := ram.Adopt(o.pid, ram.Options{})
	if err != nil {
		return err
	}
	if err := i.memory.Attach(ctx, handle); err != nil {
		return err
	}
	arriving, err := i.recallLate()
	if err != nil {
		return err
	}
	if i.memory.Unfilled() {
		if arriving {
			err = i.receiveMemory(ctx, ram.FillOptions{Resume: true})
		} else {
			err = i.fill(ctx, ram.FillOptions{Resume: true})
		}
		if err != nil {
			return err
		}
	}
	i.callOnLate()
	if i.GuestLacks() {
		// The machine answers when what its main loop may be waiting for has come, however long that takes.
		ctx = whole
	}
	if i.desc.Sockets {
		if i.guest, err = i.openGuest(false); err != nil {
			return err
		}
		i.guest.recall()
	}
	if err := i.callMade(); err != nil {
		return err
	}
	if err := i.guest.serve(nil); err != nil {
		return err
	}
	if err := o.thaw(); err != nil {
		return err
	}
	machine, err := adopter.Adopt(ctx, cfg)
	if err != nil {
		return err
	}
	i.note(func() { i.machine = machine })
	state := vmm.StateBroken
	if m, ok := i.machine.(vmm.Stater); ok {
		state = m.State()
	}
	if i.machine.PID() != o.pid {
		return fmt.Errorf("the machine that answers in %q is process %d, the instance's is %d", i.path, i.machine.PID(), o.pid)
	}
	if err := i.settle(context.WithoutCancel(ctx), record, state); err != nil {
		return err
	}
	o.close()
	i.orphan, i.adopted = nil, true
	return nil
}

// settle brings an adopted machine into the state that its record asks for.
func (i *Instance) settle(ctx context.Context, record Record, state vmm.State) error {
	switch {
	case record.Status == Moved:
		if state == vmm.StateRunning { // a former owner would have had to do the impossible
			if err := i.machine.Pause(ctx); err != nil {
				return fmt.Errorf("pause a machine that was given away: %w", err)
			}
			state = vmm.StatePaused
		}
		i.note(func() { i.phase, i.migration, i.confirmed = released, record.Migration, record.Confirmed })
		i.lent = record.Shared
		if i.cfg.ForceOwner && (record.Confirmed || record.Shared) {
			return fmt.Errorf("%w: %s", ErrNotSaved, record.remedy())
		}
		if !i.cfg.ForceOwner {
			return nil
		}
		i.enter(suspended)
		if err := writeRecord(i.device(StateDevice), i.runningRecord("")); err != nil {
			return err
		}
	case state == vmm.StateRunning:
		i.enter(running)
		i.show()
	case state != vmm.StatePaused && record.Length > 0:
		return errNeverRan
	case state != vmm.StatePaused:
		return fmt.Errorf("the machine is %s", state)
	default:
		i.enter(suspended)
	}
	if i.phase == suspended {
		if err := i.run(ctx); err != nil {
			return err
		}
	}
	if i.guest.owed() && len(i.late.all()) == 0 { // else the agent may wait for what is missing: see AgentOwed
		if err := i.guest.undoSuspend(ctx, i.machine, i.cfg.ResumeTimeout); err != nil {
			i.log.Error("the instance was adopted and runs, but its agent failed after the resume", "error", err)
		} else {
			call(i.cfg.Hooks.AfterResume)
		}
	}
	return nil
}

// restoreSaved makes the state device say again that the instance is saved. Nothing of it has run since it was.
func restoreSaved(state *device) error {
	r, err := ReadRecord(state)
	if err != nil {
		return err
	}
	r.Status, r.Kept, r.Layered, r.Time = Saved, false, false, time.Time{}
	return writeRecord(state, r)
}

// fill has memory filled from its device, lazily. With Resume it is the filling that another process began.
func (i *Instance) fill(ctx context.Context, opts ram.FillOptions) (err error) {
	opts.OnDemand = i.cfg.MemoryOnDemand
	opts.OnError = func(err error) {
		i.log.Error("a part of the memory cannot be read, trying again", "device", MemoryDevice, "error", err)
	}
	// It goes on when the call that started it, and with that its context, is over.
	i.filler, err = i.memory.Fill(context.WithoutCancel(ctx), i.device(MemoryDevice).Device, opts)
	i.onDemand = err == nil && i.cfg.MemoryOnDemand
	return err
}

// BringMemory brings what Config.MemoryOnDemand has left out of the memory, and returns when all of it is there.
func (i *Instance) BringMemory(ctx context.Context) error {
	if !i.onDemand {
		return nil
	}
	i.filler.Rest()
	return i.filler.Wait(ctx)
}

// MemoryFilled reports whether all of the memory is here. With Config.MemoryOnDemand it is not, until it is brought.
func (i *Instance) MemoryFilled() bool {
	if i.filler == nil {
		return true
	}
	select {
	case <-i.filler.Done():
		return i.filler.Err() == nil
	default:
		return false
	}
}

// AgentOwed reports whether the guest's agent is still to be told that the guest runs, by AfterResume. It is so after the
// adoption of an instance of which something is missing.
func (i *Instance) AgentOwed() bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.phase == running && i.guest.owed()
}

// TellAgent tells the guest's agent that the guest runs if that is still owed, as after a call that was not answered because
// the guest waited for what was missing. It begins with new connections to the guest.
func (i *Instance) TellAgent(ctx context.Context) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.phase != running || !i.guest.owed() {
		return nil
	}
	if err := i.guest.reconnect(); err != nil {
		return err
	}
	return i.afterResume(ctx)
}

// Adopted reports whether the machine was taken over from an owner that had died.
func (i *Instance) Adopted() bool { return i.adopted }

// Passthrough are the PCI devices of the host that the guest has.
func (i *Instance) Passthrough() []string { return i.cfg.Host.Passthrough }

// InDoubt returns the id, with its secret, of the migration by which the instance was given away and which nobody has confirmed, and whether
// there is one.
func (i *Instance) InDoubt() (migration string, ok bool) {
	i.seen.Lock()
	defer i.seen.Unlock()
	return i.migration, i.phase == released
}
