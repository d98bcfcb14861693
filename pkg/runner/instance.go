package runner

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/zeebo/xxh3"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/drafter-vm/drafter/pkg/agent"
	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/ram"
	"github.com/drafter-vm/drafter/pkg/vmm"
)

// phase is where an instance is in its life in this process.
//
//	Resume, Boot ─────► running ⇄ suspended ─ Release ─► released ─ Released ─► moved
//	                                   ▲                    │
//	                                   └───── Reclaim ──────┘
//	Prepare ─► waiting ─ Load ─► loaded ─ Own ─► suspended ─ Run ─► running
//	any ─ Close, Kill, Discard ─► closed
//
// An instance whose owner died enters by Adopt, as running or released.
//
// Every transition is made by one method of Instance, which holds Instance.mu throughout.
type phase int

const (
	waiting   phase = iota // devices are being received; the machine has no state
	loaded                 // everything was received; the instance belongs to the source still
	suspended              // all vCPUs stopped; memory, device state and disks are consistent
	running                // ours, and live
	released               // given to another peer, which has not said that it runs it
	moved                  // another peer owns the instance
	closed                 // nothing is left of it in this process
)

func (p phase) String() string {
	return [...]string{"waiting", "loaded", "suspended", "running", "released", "moved", "closed"}[p]
}

// ErrSize is wrapped by the error of [Instance.Balloon] for a size that no guest of the instance's memory can give.
var ErrSize = errors.New("a guest can give from 0 to less than all of its memory")

// ErrBalloon is wrapped by the error of [Instance.Balloon] when a guest cannot be asked for memory now.
var ErrBalloon = errors.New("the guest cannot be asked for memory now")

// ErrPhase is returned by a method of Instance that the instance's phase does not allow.
var ErrPhase = errors.New("instance is not in the right phase")

// Instance is a virtual machine on this host with its devices. Its methods may be called by any goroutine; those that
// change its phase exclude each other, and take as long as the guest's agent, the machine and the disks do. Running, InDoubt,
// Confirmed, RunsSince, Missing, FillStats and VMPath answer at once, whatever goes on.
type Instance struct {
	cfg  Config
	log  *slog.Logger
	desc Description
	root string // folder of this machine, removed at the end: Dir/HYPERVISOR/ID
	path string // VMPath: root/root

	folders []string // those above root that were made for it

	devices []*device // in the order of the configuration
	owner   *os.File  // holds the lock on the instance: see lockOwner
	folder  *os.File  // holds the lock on root: see machineFile
	orphan  *orphan   // the machine of an owner that died, until it is adopted
	adopted bool
	made    bool     // the hook of that name was called
	handed  *os.File // the memory of a source on this host, until the machine is started with it
	foreign bool     // the memory is that of a source on this host, whose guest uses it until this instance is ours
	memory  *ram.Memory
	filler  *ram.Filler // nil unless memory is filled lazily
	// onDemand says that the filler brings only what is touched, from the memory's device. It does not change once the guest runs.
	onDemand bool
	disks    []diskServer

	diskConnection *os.File // of disks that are mounted: the machine holds it, too

	machine vmm.Machine
	leash   *leash        // ends the machine with this process; nil for one that is to outlive it from the start
	guest   *guest        // nil when the machine has no guest sockets
	quiet   chan struct{} // of a guest that was received: closed when it may notice

	huge             background // see useHugePages
	ahead, recording background // see workingSet

	killed atomic.Bool // by Kill: its end is no shutdown

	late late // what arrives while the guest runs

	point point // to which it can return

	mu      sync.Mutex // held through every change of phase, for as long as an agent or a disk takes; guards what follows
	refused bool       // it is on record that what was received will never run
	lent    bool       // whom it is given to has its memory
	shown   bool       // Config.OnRun was called

	// Whoever asks how the instance is must not wait for an agent: what follows is written with mu and seen held, so either is
	// enough to read it, and seen is held for no longer than that.
	seen      sync.Mutex
	phase     phase
	migration string    // that the instance was released to, or comes by
	confirmed bool      // whom it was released to has said that it runs it
	runsSince time.Time // when the vCPUs ran again

	resumeDuration time.Duration

	throttle throttle
}

// Resume starts the instance from its saved state. When it fails, the instance is as it was before.
//
// Memory is filled lazily: the guest runs when Resume returns, whatever the size of its memory, and what it touches comes
// first. With an agent in the guest, Resume returns after the agent has finished its work.
func Resume(ctx context.Context, cfg Config) (_ *Instance, err error) {
	began := time.Now()
	i, err := open(ctx, cfg, openExisting, nil)
	if err != nil {
		return nil, err
	}
	if i.orphan != nil {
		if i.cfg.Rollback {
			pid := i.orphan.pid
			return nil, errors.Join(fmt.Errorf("roll back instance: %w (process %d), so nothing of it is discarded: start it without --rollback to take it over; to give up what it has, end that process first (kill -9 %d)", ErrAlive, pid, pid), i.letGo())
		}
		return i.takeOver(ctx, Resume)
	}
	resumed := false
	defer func() {
		if err != nil {
			err = errors.Join(err, i.abandon(ctx, resumed))
		}
	}()
	for _, name := range []string{StateDevice, MemoryDevice} {
		if i.device(name) == nil {
			return nil, fmt.Errorf("resume instance: no device %q is configured", name)
		}
	}
	if len(i.cfg.Environment) > 0 && len(i.desc.agentPorts()) == 0 {
		return nil, fmt.Errorf("resume instance: %w: the package's guest has no agent", agent.ErrNoEnvironment)
	}
	if len(cfg.Host.Passthrough) > 0 {
		return nil, fmt.Errorf("resume instance: nothing can be resumed with PCI device %q of the host: boot it", cfg.Host.Passthrough[0])
	}
	if i.cfg.Rollback {
		if err := i.rollBack(ctx); err != nil {
			return nil, fmt.Errorf("roll back instance from %q: %w", i.device(StateDevice).recordFile(), err)
		}
	}
	state, err := ReadSaved(i.device(StateDevice), i.cfg.ForceOwner)
	if err != nil {
		return nil, fmt.Errorf("resume instance from %q: %w", i.device(StateDevice).recordFile(), err)
	}
	if err := i.checkWhole(ctx); err != nil { // nothing is saved before it is whole
		return nil, fmt.Errorf("resume instance: %w", err)
	}
	if err := i.cfg.Backend.Compatible(ctx, i.desc.Spec); err != nil {
		return nil, fmt.Errorf("resume instance: %w: resume it on a host like the one that made it, or make the package anew for this one (drafter snapshotter --accel, --cpu-template)", err)
	}
	if err := errors.Join(i.dropLayers(), i.keepPoint()); err != nil {
		return nil, fmt.Errorf("resume instance: %w", err)
	}
	i.point.front.Store(true)
	set := i.workingSet()
	if err := i.start(ctx, nil); err != nil {
		return nil, fmt.Errorf("resume instance: %w", err)
	}
	if err := i.fill(ctx, ram.FillOptions{First: set.first, Record: set.record}); err != nil {
		return nil, fmt.Errorf("resume instance: %w", err)
	}
	select {
	case <-i.filler.Ready():
	case <-i.filler.Done():
		if err := i.filler.Err(); err != nil {
			return nil, fmt.Errorf("resume instance: %w", err)
		}
	case <-ctx.Done():
		return nil, fmt.Errorf("resume instance: %w", context.Cause(ctx))
	}

	// From the moment the guest may write to its disks, the saved memory does not belong to them any more: that must be
	// on record first. It costs a sync, which runs beside the machine's work. The record still says where the device state
	// is, for whoever finds that this process died before the guest ran.
	i.guest.noteResume(&i.cfg)
	var work errgroup.Group
	resumed = true
	record := Record{Status: Running, Length: int64(len(state)), Sum: xxh3.Hash(state), Kept: i.cfg.KeepCommitPoint, Layered: i.cfg.KeepCommitPoint, Time: time.Now()}
	if record.Kept {
		i.point.record = record
	}
	work.Go(func() error {
		// Once the record says Running, a machine that is gone is one that was lost.
		if err := i.leash.release(); err != nil {
			return err
		}
		return writeRecord(i.device(StateDevice), record)
	})
	work.Go(func() error { return i.machine.Load(ctx, bytes.NewReader(state)) })
	if err := work.Wait(); err != nil {
		resumed = false // nothing ran: the saved state is as good as it was
		return nil, errors.Join(fmt.Errorf("resume instance: %w", err), WriteSaved(i.device(StateDevice), state))
	}
	// From here on a cancelled context must not end the guest half-way: it runs, and then it is saved.
	if err := i.run(context.WithoutCancel(ctx)); err != nil {
		return nil, fmt.Errorf("resume instance: %w", err)
	}
	i.resumeDuration = time.Since(began)
	if err := i.afterResume(ctx); err != nil {
		return nil, fmt.Errorf("resume instance: %w", err)
	}
	i.mu.Lock() // OnRun has shown it to others
	defer i.mu.Unlock()
	i.recordWorkingSet(set)
	return i, nil
}

// Boot starts the instance by booting its kernel, with empty memory; what its state and memory devices hold is void from
// then on. The machine is what its config device describes. With a liveness port in the description, Boot returns when the
// guest says that it is up. An instance that moved away is refused, unless Config.ForceOwner says otherwise.
func Boot(ctx context.Context, cfg Config) (_ *Instance, err error) {
	if at := slices.IndexFunc(cfg.Devices, func(d DeviceConfig) bool { return d.Name == MemoryDevice }); at >= 0 && len(cfg.Host.Passthrough) > 0 {
		return nil, fmt.Errorf("boot instance: it has a device %q (%q), which it could not be saved to with PCI device %q of the host: make a package without (drafter snapshotter --shut-down)",
			MemoryDevice, cfg.Devices[at].Base, cfg.Host.Passthrough[0])
	}
	i, err := open(ctx, cfg, openExisting, nil)
	if err != nil {
		return nil, err
	}
	if i.orphan != nil {
		return i.takeOver(ctx, Boot)
	}
	booted := false
	defer func() {
		if err != nil {
			err = errors.Join(err, i.abandon(ctx, booted))
		}
	}()
	if state := i.device(StateDevice); state != nil {
		if err := i.checkBootable(state); err != nil {
			return nil, fmt.Errorf("boot instance from %q: %w", state.recordFile(), err)
		}
	}
	if n := i.Missing(); n > 0 && i.cfg.OnLate == nil {
		return nil, fmt.Errorf("boot instance: %d bytes of it are still at the peer that it came from (migration %s): say where that one is (--raddr)", n, shown(i.late.migration))
	}
	if err := i.foldLayers(ctx); err != nil {
		return nil, fmt.Errorf("boot instance: %w", err)
	}
	if booted, err = i.startBoot(ctx); err != nil {
		return nil, fmt.Errorf("boot instance: %w", err)
	}
	i.show()
	for _, wait := range []func(context.Context, vmm.Machine, time.Duration) error{i.guest.waitAlive, i.guest.waitAgent} {
		err := wait(ctx, i.machine, i.cfg.ResumeTimeout)
		switch {
		case err == nil:
		case i.cfg.BootUnattended && ctx.Err() == nil && !ended(i.machine):
			i.log.Warn("the instance boots, but its guest is silent", "error", err)
		default:
			return nil, fmt.Errorf("boot instance: %w", err)
		}
	}
	return i, nil
}

// startBoot starts the machine. With booted, the record says so, and what was saved before is void. What is missing of what it boots from comes
// meanwhile, and whoever brings it is told to wait with what follows, until the instance runs.
func (i *Instance) startBoot(ctx context.Context) (booted bool, err error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.callOnLate()
	boot := &vmm.Boot{}
	if boot.Kernel, err = i.bootFile(ctx, KernelDevice); err != nil {
		return false, err
	}
	if boot.Kernel == "" {
		return false, fmt.Errorf("no device %q is configured", KernelDevice)
	}
	if boot.Initrd, err = i.bootFile(ctx, InitrdDevice); err != nil {
		return false, err
	}
	if state := i.device(StateDevice); state != nil {
		if err := writeRecord(state, Record{Status: Running, Migration: i.late.migration}); err != nil {
			return false, err
		}
	}
	if err := i.start(ctx, boot); err != nil {
		return true, err
	}
	i.enter(running)
	return true, nil
}

// ended reports whether the machine's process has ended.
func ended(m vmm.Machine) bool {
	select {
	case <-m.Done():
		return true
	default:
		return false
	}
}

// checkBootable refuses to boot an instance whose record says that it is not ours, or not whole.
func (i *Instance) checkBootable(state *device) error {
	r, err := ReadRecord(state)
	switch {
	case errors.Is(err, errNoRecord): // a package that is being made
		return nil
	case err != nil:
		return err
	case r.Status == Saved && i.device(MemoryDevice) == nil:
		return fmt.Errorf("it is saved, with its memory, and no device %q is configured: configure it, and resume it, or give --boot with it to give its memory up", MemoryDevice)
	case r.Status == Moved && !r.Settled && !r.Confirmed && i.cfg.ForceOwner, r.Status == Running, r.Status == ShutDown, r.Status == Saved:
		return nil
	}
	return r.mark(fmt.Errorf("%w: %s", ErrNotSaved, r.remedy()))
}

// Incoming is a device that a migration will bring.
type Incoming struct {
	Name string // of a device
	Size int64  // bytes

	// Memory, for the device of memory, is the memfd of the source's machine on this host, with all that is in it: nothing of it
	// comes. Prepare takes it over. Not with Config.KeepCommitPoint.
	Memory *os.File
}

// Prepare opens devices to receive a migration into, and starts the machine that waits for it. The incoming devices and the
// configured ones must match by name, except those configured devices that exist here and do not travel; local names them.
// [Instance.Devices] gives the devices to write to; then come Load and Run, or Discard. The migration's id goes on record.
func Prepare(ctx context.Context, cfg Config, migration string, desc Description, incoming []Incoming) (_ *Instance, err error) {
	var handed *os.File
	for _, in := range incoming {
		if in.Memory != nil {
			handed = in.Memory
		}
	}
	i, err := open(ctx, cfg, openReceive, &reception{desc: desc, incoming: incoming})
	if err != nil {
		closeFiles(handed)
		return nil, err
	}
	i.handed = handed
	defer func() {
		switch {
		case err == nil:
		case errors.Is(err, ErrMismatch): // nothing here was touched yet
			err = errors.Join(err, i.abandon(ctx, false))
		default:
			err = errors.Join(err, i.Discard(context.WithoutCancel(ctx)))
		}
	}()
	if err := i.cfg.Backend.Compatible(ctx, desc.Spec); err != nil {
		return nil, fmt.Errorf("prepare instance: %w: the machine: %w", ErrMismatch, err)
	}
	if err := i.checkVacant(); err != nil {
		return nil, fmt.Errorf("prepare instance: %w", err)
	}
	if err := i.checkOwnParts(); err != nil {
		return nil, fmt.Errorf("prepare instance: %w", err)
	}
	for _, d := range i.devices { // of an instance that was here before
		switch err := os.Remove(d.listFile()); {
		case err == nil && d.common():
			d.created = append(d.created, d.Base) // a part of a file, which would pass for the whole of it
		case err != nil && !errors.Is(err, os.ErrNotExist):
			return nil, fmt.Errorf("prepare instance: %w", err)
		}
	}
	if err := errors.Join(i.dropLayers(), i.keepPoint()); err != nil {
		return nil, fmt.Errorf("prepare instance: %w", err)
	}
	i.note(func() { i.migration = migration })
	if err := writeRecord(i.device(StateDevice), Record{Status: Receiving, Migration: migration}); err != nil {
		return nil, fmt.Errorf("prepare instance: %w", err)
	}
	i.quiet = make(chan struct{})
	if err := i.start(ctx, nil); err != nil {
		return nil, fmt.Errorf("prepare instance: %w", err)
	}
	if cfg.KeepCommitPoint {
		i.point.memory = i.device(MemoryDevice).Device
	}
	return i, nil
}

// ErrMismatch is wrapped by errors of Prepare which say that what a migration would bring does not fit what is here. Their
// text names no paths and may be told to the source.
var ErrMismatch = errors.New("the instance does not fit this destination")

// checkOwnParts refuses to receive over a part of a file that several instances may have, unless it is this one's: left by a migration that was
// not finished.
func (i *Instance) checkOwnParts() error {
	state := i.device(StateDevice)
	if len(state.created) == 0 {
		if r, err := ReadRecord(state); err == nil && (r.Status == Receiving || r.Status == Discarded) {
			return nil
		}
	}
	for _, d := range i.devices {
		if lacks := d.CheckArrived(); lacks != nil && d.common() {
			return fmt.Errorf("%w: device %q is another instance's, and some of it has not arrived", ErrMismatch, d.Name)
		}
	}
	return nil
}

// checkVacant refuses to receive over an instance that somebody may still want.
func (i *Instance) checkVacant() error {
	state := i.device(StateDevice)
	if len(state.created) > 0 {
		return nil
	}
	return vacant(state)
}

// CheckVacant refuses, as Prepare would, to receive over an instance that somebody may still want, and says what can be done with
// that. It changes nothing, so a peer can ask it before it goes to anybody for another one.
func CheckVacant(cfg Config) error {
	for _, c := range cfg.Devices {
		if c.Name != StateDevice {
			continue
		}
		if _, err := os.Stat(c.recordFile()); errors.Is(err, os.ErrNotExist) {
			return nil
		}
		state, err := openDevice(c, openExisting, 0, liveFiles{})
		if err != nil {
			return err
		}
		return errors.Join(vacant(state), state.close())
	}
	return nil
}

// vacant is CheckVacant of a state device.
func vacant(state *device) error {
	if state.overlay != nil {
		// A record that is not in the overlay is the package's: somebody was killed after he had made the overlay, and before
		// there was an instance in it.
		if first, err := state.overlay.NextChange(0); err == io.EOF || err == nil && first.Offset >= recordSize {
			return nil
		} else if err != nil {
			return err
		}
	}
	r, err := ReadRecord(state)
	switch {
	case errors.Is(err, errNoRecord):
		return nil // not an instance: nothing of value
	case err != nil:
		return err
	case r.Status == Saved:
		return fmt.Errorf("%w: the devices configured here hold an instance already, saved at %s: resume that, receive into other overlays, or delete these", ErrMismatch, r.Time.UTC().Format(time.RFC3339))
	case r.Status == Moved && !r.Settled, r.Status == Running, r.Status == ShutDown:
		return r.mark(fmt.Errorf("%w: the devices configured here hold an instance already: %s; or receive into other overlays", ErrMismatch, r.remedy()))
	}
	return nil
}

// reception is what a migration announces.
type reception struct {
	desc     Description
	incoming []Incoming
}

// open makes an instance with its devices opened and nothing running.
func open(ctx context.Context, cfg Config, mode openMode, r *reception) (_ *Instance, err error) {
	cfg = cfg.withDefaults()
	if cfg.Backend == nil {
		return nil, errors.New("open instance: no backend is given")
	}
	if err := CheckDevices(cfg.Devices); err != nil {
		return nil, fmt.Errorf("open instance: %w", err)
	}
	i := &Instance{cfg: cfg, log: cfg.Logger, phase: waiting}
	defer func() {
		if err != nil {
			if i.orphan != nil {
				i.orphan.close()
			}
			err = errors.Join(err, i.discardDevices())
			closeFiles(i.owner, i.folder)
		}
	}()

	i.reapAll()
	sizes := make(map[string]int64)
	if r != nil {
		i.desc = r.desc
		if sizes, err = matchIncoming(cfg.Devices, r.incoming); err != nil {
			return nil, fmt.Errorf("open instance: %w: %w", ErrMismatch, err)
		}
		sizes[StateDevice] = StateDeviceSize
		sizes[MemoryDevice] = r.desc.MemorySize
	}
	// The state device first: it says whether there is a machine already, which knows more of the disks than their files.
	order := slices.Clone(cfg.Devices)
	slices.SortStableFunc(order, func(a, b DeviceConfig) int {
		return cmp.Compare(btoi(b.Name == StateDevice), btoi(a.Name == StateDevice))
	})
	for _, c := range order {
		size, travels := sizes[c.Name]
		deviceMode := mode
		if !travels {
			deviceMode = openExisting
		}
		var live liveFiles
		if IsDisk(c.Name) {
			if live, err = i.liveFiles(c.Name); err != nil {
				return nil, fmt.Errorf("open device %q: %w", c.Name, err)
			}
		}
		d, err := openDevice(c, deviceMode, size, live)
		if err != nil {
			return nil, err
		}
		i.devices = append(i.devices, d)
		if lacks := c.CheckArrived(); lacks != nil && d.canBeLate() && deviceMode == openExisting {
			switch {
			case r != nil:
				return nil, fmt.Errorf("open instance: %w: device %q does not come, and some of the one here has not arrived", ErrMismatch, d.Name)
			case d.common() && i.late.migration == "" && i.orphan == nil:
				return nil, fmt.Errorf("open instance: device %q is another instance's: %w", d.Name, lacks)
			}
			if err := d.makeLazy(nil, &i.late); err != nil {
				return nil, err
			}
		}
		if d.since != nil && i.orphan != nil && d.hasLayer() {
			if err := d.openLayer(d.since); err != nil {
				return nil, fmt.Errorf("open instance: %w", err)
			}
		}
		if d.Name == StateDevice {
			if err := i.lock(ctx, d, mode); err != nil {
				return nil, fmt.Errorf("open instance: %w", err)
			}
			if r, err := ReadRecord(d); err == nil && (r.Status == Running || r.Status == ShutDown) {
				i.late.migration = r.Migration
			}
		}
	}
	rank := make(map[string]int)
	for n, c := range cfg.Devices {
		rank[c.Name] = n
	}
	slices.SortFunc(i.devices, func(a, b *device) int { return cmp.Compare(rank[a.Name], rank[b.Name]) })
	if i.orphan != nil {
		i.desc = i.orphan.info.Description
	} else if r == nil {
		config := i.device(ConfigDevice)
		if config == nil {
			return nil, fmt.Errorf("open instance: no device %q is configured: it describes the machine", ConfigDevice)
		}
		if i.desc, err = ReadDescription(config); err != nil {
			return nil, fmt.Errorf("open instance: %q: %w", config.Base, err)
		}
	}
	if b := named(i.cfg.Others, i.desc.Hypervisor); b != nil {
		i.cfg.Backend = b
	}
	if want := cfg.Host.Accel; want != "" && want != "auto" && want != i.desc.Accel {
		return nil, fmt.Errorf("open instance: acceleration %q was asked for, but the machine was made under %q: a running guest cannot change it", want, i.desc.Accel)
	}
	if err := i.checkDisks(); err != nil {
		return nil, fmt.Errorf("open instance: %w", err)
	}
	if m := i.device(MemoryDevice); m != nil && m.Size() != i.desc.MemorySize {
		return nil, fmt.Errorf("open instance: memory %q has %d bytes, the machine has %d: they belong to different packages", m.Base, m.Size(), i.desc.MemorySize)
	}
	return i, nil
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

// lock takes the lock on the instance. A machine that has it, because its owner died, is kept for adoption if it may have
// run and its instance is not to be made anew, and is ended otherwise.
func (i *Instance) lock(ctx context.Context, state *device, mode openMode) error {
	owner, o, err := lockInstance(ctx, state.DeviceConfig)
	if err != nil {
		return err
	}
	if o == nil {
		i.owner = owner
		return nil
	}
	i.owner, i.folder, i.orphan = o.owner, o.note, o
	r, err := ReadRecord(state)
	ran := err == nil && (r.Status == Running || r.Status == Moved && !r.Settled)
	switch {
	case err != nil && !errors.Is(err, errNoRecord):
		return err
	case ran && mode == openReceive:
		return fmt.Errorf("%w: the instance configured here is alive already (process %d): receive into other overlays, or start it here to adopt it", ErrMismatch, o.pid)
	case ran && !i.cfg.Anew:
		return nil
	}
	i.log.Info("the machine of an owner that died is ended: it holds nothing of use", "pid", o.pid, "status", r.Status)
	if err := i.end(ctx, o); err != nil {
		return err
	}
	o.close()
	closeFiles(o.note)
	i.folder, i.orphan = nil, nil
	if r.Status == Receiving {
		return writeRecord(state, Record{Status: Discarded, Migration: r.Migration})
	}
	return nil
}

// liveFiles are what outlives this process of a disk: those of the machine to be adopted, or new ones.
func (i *Instance) liveFiles(disk string) (l liveFiles, err error) {
	for _, f := range []struct {
		file **os.File
		name string
	}{{&l.blocks, memfdPrefix + "blocks:" + disk}, {&l.arrived, memfdPrefix + "arrived:" + disk}} {
		if i.orphan == nil {
			*f.file, err = block.NewLive(f.name)
		} else if *f.file = i.orphan.claim(f.name); *f.file == nil {
			err = fmt.Errorf("process %d, the machine, does not hold %q, which says what was written last", i.orphan.pid, f.name)
		}
		if err != nil {
			closeFiles(l.blocks, l.arrived)
			return liveFiles{}, err
		}
	}
	if since := memfdPrefix + "since:" + disk; i.orphan != nil {
		l.since = i.orphan.claim(since) // it has one if its commit point was to be kept
	} else if i.cfg.KeepCommitPoint {
		if l.since, err = block.NewLive(since); err != nil {
			closeFiles(l.blocks, l.arrived)
			return liveFiles{}, err
		}
	}
	return l, nil
}

// matchIncoming checks that what a migration brings is what is configured here, and returns the sizes by name.
func matchIncoming(devices []DeviceConfig, incoming []Incoming) (map[string]int64, error) {
	configured := make(map[string]bool)
	for _, d := range devices {
		configured[d.Name] = true
	}
	for _, name := range []string{StateDevice, MemoryDevice} {
		if !configured[name] {
			return nil, fmt.Errorf("no device %q is configured to receive into", name)
		}
	}
	sizes := make(map[string]int64)
	for _, in := range incoming {
		if !configured[in.Name] {
			return nil, fmt.Errorf("the source sends a device %q, which is not configured here: add it to the devices", in.Name)
		}
		if in.Name == StateDevice {
			return nil, fmt.Errorf("the source sends a device %q: device state has messages of its own", in.Name)
		}
		if in.Size <= 0 {
			return nil, fmt.Errorf("the source sends a device %q of %d bytes", in.Name, in.Size)
		}
		if _, ok := sizes[in.Name]; ok {
			return nil, fmt.Errorf("the source sends the device %q twice", in.Name)
		}
		sizes[in.Name] = in.Size
	}
	for _, d := range devices {
		if _, ok := sizes[d.Name]; ok || d.Name == StateDevice {
			continue
		}
		if IsDisk(d.Name) || d.Name == MemoryDevice {
			return nil, fmt.Errorf("device %q is configured here, but the source does not send it: its content here is not that of the instance; remove it from the devices", d.Name)
		}
		if _, err := os.Stat(d.Base); err != nil {
			return nil, fmt.Errorf("device %q is configured here, but the source does not send it and its base is not here", d.Name)
		}
	}
	return sizes, nil
}

// checkDisks compares the disks the machine was made with to those that are configured.
func (i *Instance) checkDisks() error {
	inMachine := make(map[string]bool)
	for _, disk := range i.desc.Disks {
		inMachine[disk.Name] = true
		d := i.device(disk.Name)
		if d == nil {
			return fmt.Errorf("the machine has a disk %q, which is not configured: add it to the devices", disk.Name)
		}
		if d.Size() != disk.Size {
			return fmt.Errorf("disk %q has %d bytes (%q), the machine was made with %d: they belong to different packages", disk.Name, d.Size(), d.Base, disk.Size)
		}
		if d.Shared && !disk.ReadOnly {
			return fmt.Errorf("disk %q is shared, and this machine can write it: make a snapshot in which it is shared, too, or give it an overlay instead", disk.Name)
		}
	}
	for _, d := range i.devices {
		if IsDisk(d.Name) && !inMachine[d.Name] {
			return fmt.Errorf("disk %q is configured, but the machine was made without it: a disk cannot be added to a running guest; make a snapshot with it", d.Name)
		}
	}
	return nil
}

func (i *Instance) device(name string) *device {
	for _, d := range i.devices {
		if d.Name == name {
			return d
		}
	}
	return nil
}

// bootFile is the path of a file with the device's content, for a VMM that reads files, once all of it has arrived. Empty if there is no such device.
func (i *Instance) bootFile(ctx context.Context, name string) (_ string, err error) {
	d := i.device(name)
	if d == nil {
		return "", nil
	}
	if d.Overlay == "" && d.lazy == nil {
		return filepath.Abs(d.Base)
	}
	if err := i.makeFolder(); err != nil {
		return "", err
	}
	if d.lazy != nil { // of which a reader waits, whatever becomes of ctx
		closed := make(chan struct{})
		stop := context.AfterFunc(ctx, func() {
			defer close(closed)
			_ = d.lazy.Close() // nothing was written to it
		})
		defer func() {
			if !stop() {
				<-closed
				err = context.Cause(ctx)
			}
		}()
	}
	path := filepath.Join(i.path, name)
	f, err := block.CreateFile(path, d.Size())
	if err != nil {
		return "", err
	}
	if err := errors.Join(block.Copy(ctx, f, d.Device, block.CopyOptions{}), f.Close()); err != nil {
		return "", err
	}
	return filepath.Abs(path)
}

// memfdName is the name that a memfd was made with.
func memfdName(f *os.File) (string, error) {
	target, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
	name, ok := memfdOf(target)
	if err == nil && !ok {
		err = fmt.Errorf("%q is no memfd", target)
	}
	return name, err
}

// Handle names the memory for a destination on this host that knows our process id, so that it can have the memory itself: see
// [Incoming]. There is none while the memory is being filled.
func (i *Instance) Handle() (string, error) {
	if vmm.RequirementsOf(i.cfg.Backend).Graft {
		return "", fmt.Errorf("%s, once loaded, writes into its guest's memory before that may run: it needs one of its own", i.cfg.Backend.Name())
	}
	return i.memory.Handle()
}

// OpenMemory opens, for [Incoming], the memory of size bytes that process pid of this host has named with a handle. Only whoever trusts that
// process may: it can go on reading and writing the memory.
func OpenMemory(pid int, handle string, size int64) (*os.File, error) {
	return ram.OpenHandle(pid, handle, size)
}

// makeFolder makes the VMPath.
func (i *Instance) makeFolder() (err error) {
	if i.path != "" {
		return nil
	}
	id := make([]byte, 8)
	rand.Read(id)
	i.root = filepath.Join(i.cfg.Host.Dir, i.cfg.Backend.Name(), hex.EncodeToString(id))
	i.path = filepath.Join(i.root, "root")
	if len(i.path) > maxPath {
		return fmt.Errorf("folder %q has %d characters, too long for the unix sockets in it: choose a shorter --chroot-base-dir (at most %d)", i.path, len(i.path), maxPath)
	}
	parent := filepath.Dir(i.root)
	// The end of another machine may remove the empty folder between the two calls.
	for try := 0; ; try++ {
		made, err := MakeFolders(parent, 0o755)
		i.folders = append(i.folders, made...)
		if err != nil {
			return fmt.Errorf("make folder of machines: %w", err)
		}
		making, err := LockFolder(parent, unix.LOCK_SH)
		if err == nil {
			defer making.Close()
			break
		}
		if !errors.Is(err, os.ErrNotExist) || try == 10 {
			return fmt.Errorf("make folder of machine: %w", err)
		}
	}
	if err := os.Mkdir(i.root, 0o700); err != nil {
		return fmt.Errorf("make folder of machine: %w", err)
	}
	host := i.cfg.Host
	memory := ""
	if i.handed != nil {
		if memory, err = memfdName(i.handed); err != nil {
			return fmt.Errorf("make folder of machine: %w", err)
		}
	}
	i.folder, err = machineNote{
		Memory: memory, Hypervisor: i.cfg.Backend.Name(), Netns: host.Netns, Interface: host.Interface, UID: host.UID, GID: host.GID,
		CgroupVersion: host.CgroupVersion, IOEngineSync: host.IOEngineSync, Passthrough: host.Passthrough, NoMemory: i.device(MemoryDevice) == nil, Description: i.desc,
	}.make(i.root)
	if err == nil {
		err = os.Mkdir(i.path, 0o700)
	}
	if err != nil {
		return fmt.Errorf("make folder of machine: %w", err)
	}
	return nil
}

// memoryName is the name of the memfd that is the RAM of the machine whose folder is root.
func memoryName(root string) string { return memfdPrefix + filepath.Base(root) }

// maxPath leaves room for the longest socket name in a VMPath within the 108 bytes of a unix socket's address (unix(7)).
const maxPath = 80

// start starts the machine: booting, or waiting for device state. On return its RAM is under our control.
func (i *Instance) start(ctx context.Context, boot *vmm.Boot) (err error) {
	if err := i.makeFolder(); err != nil {
		return err
	}
	if i.handed != nil {
		i.memory, err = ram.Open(i.handed)
		i.handed, i.foreign = nil, true
	} else {
		i.memory, err = ram.Create(memoryName(i.root), i.desc.MemorySize)
	}
	if node := i.cfg.Host.NUMANode; err == nil && node != nil && *node >= 0 {
		err = i.memory.Bind(*node) // whoever brings a page: a hypervisor binds at most what it touches itself
	}
	if err != nil {
		return err
	}
	cfg := i.machineConfig(boot)
	if cfg.Disks, err = i.serveDisks(); err != nil {
		return err
	}
	if i.desc.Sockets {
		if i.guest, err = i.openGuest(boot != nil); err != nil {
			return err
		}
	}
	if boot == nil || i.cfg.Anew {
		if i.leash, err = newLeash(); err != nil {
			return err
		}
	}
	var handle *ram.Handle // until the memory has it
	attach := func() error {
		h := handle
		handle = nil
		return i.memory.Attach(ctx, h)
	}
	needs := vmm.RequirementsOf(i.cfg.Backend)
	grafted := needs.Graft
	cfg.Spawn = func(cmd *exec.Cmd) (err error) {
		// The machine holds the instance's locks too: should this process die, the instance stays taken while it lives. And
		// it holds what it alone outlives us with: see block.OverlayOptions.Live.
		cmd.ExtraFiles = append(cmd.ExtraFiles, i.inherited()...)
		opts := ram.Options{Wrapped: needs.Wrapped, Started: i.leash.fasten}
		if grafted {
			opts.Graft = i.memory
		}
		if handle, err = ram.Spawn(cmd, opts); err != nil {
			return err
		}
		if grafted { // it is mapped, and has to be ours before the hypervisor takes it for its guest's
			return attach()
		}
		return nil
	}
	if grafted {
		cfg.Graft = i.memory.Graft
	}
	machine, err := i.cfg.Backend.Start(ctx, cfg)
	if err != nil {
		if handle != nil {
			handle.Close()
		}
		return err
	}
	i.note(func() { i.machine = machine })
	if !grafted {
		if err := attach(); err != nil {
			return err
		}
	}
	if caps := i.memory.Capabilities(); caps.Rung != ram.Full {
		i.log.Warn("this host offers less than the best way to handle guest memory", "capabilities", caps.String())
	}
	if err := i.callMade(); err != nil {
		return err
	}
	if i.foreign { // the hypervisor says in the guest's memory who is connected: see Own
		return nil
	}
	return i.guest.serve(i.quiet)
}

// callMade calls the hook of that name.
func (i *Instance) callMade() error {
	if i.cfg.Hooks.Made == nil {
		return nil
	}
	if err := i.cfg.Hooks.Made(i.path); err != nil {
		return fmt.Errorf("hook Made: %w", err)
	}
	i.made = true
	return nil
}

// inherited are the files that the machine holds for its next owner.
func (i *Instance) inherited() []*os.File {
	files := []*os.File{i.folder}
	if i.owner != nil {
		files = append(files, i.owner)
	}
	if i.leash != nil {
		files = append(files, i.leash.machine)
	}
	if i.diskConnection != nil {
		files = append(files, i.diskConnection)
	}
	for _, d := range i.devices {
		for _, f := range []*os.File{d.blocks, d.arrived, d.since} {
			if f != nil {
				files = append(files, f)
			}
		}
	}
	return files
}

// machineConfig is the machine without its disks.
func (i *Instance) machineConfig(boot *vmm.Boot) vmm.Config {
	host := i.cfg.Host
	cfg := vmm.Config{
		Spec: i.desc.Spec, Dir: i.path, Memory: i.memory.File(), Boot: boot,
		Netns: host.Netns, Interface: host.Interface,
		SerialOutput: host.SerialOutput, SerialInput: host.SerialInput,
		IOEngineSync: host.IOEngineSync, DiskLimit: host.DiskLimit, Passthrough: host.Passthrough,
		UID: host.UID, GID: host.GID, NUMANode: -1,
		CgroupVersion: host.CgroupVersion, CgroupName: filepath.Base(i.root),
		Binary: host.Binary, Logger: i.log,
	}
	if host.NUMANode != nil {
		cfg.NUMANode = *host.NUMANode
	}
	return cfg
}

// run lets the vCPUs run and puts that on record in the phase.
func (i *Instance) run(ctx context.Context) error {
	if err := i.machine.Resume(ctx); err != nil {
		return err
	}
	i.note(func() { i.phase, i.runsSince = running, time.Now() })
	call(i.cfg.Hooks.Resumed)
	i.show()
	i.useHugePages()
	return nil
}

// note changes what others see of the instance. mu is held.
func (i *Instance) note(change func()) {
	i.seen.Lock()
	defer i.seen.Unlock()
	change()
}

func (i *Instance) enter(p phase) { i.note(func() { i.phase = p }) }

// show tells the owner of an instance whose guest runs, once. mu is held, or nobody else has the instance yet.
func (i *Instance) show() {
	if i.cfg.OnRun != nil && !i.shown {
		i.shown = true
		i.cfg.OnRun(i)
	}
}

// RunsSince is when the vCPUs ran again, last.
func (i *Instance) RunsSince() time.Time {
	i.seen.Lock()
	defer i.seen.Unlock()
	return i.runsSince
}

// afterResume has the agent set the clock, reseed and run its hook.
func (i *Instance) afterResume(ctx context.Context) error {
	if err := i.guest.afterResume(ctx, i.machine, i.cfg.ResumeTimeout); err != nil {
		return err
	}
	call(i.cfg.Hooks.AfterResume)
	return nil
}

func call(hook func()) {
	if hook != nil {
		hook()
	}
}

// VMPath is the folder with the machine's sockets; guest sockets are at VMPath/vsock.sock.
func (i *Instance) VMPath() string { return i.path }

// Description is the machine as the guest sees it.
func (i *Instance) Description() Description {
	d := i.desc
	d.AgentHook = i.guest.hasHook()
	return d
}

// Machine is the VMM. Callers must not change its state; PID, Done and Err are of use.
func (i *Instance) Machine() vmm.Machine { return i.machine }

// Running reports whether the guest runs here: not suspended, not given away, not ended.
func (i *Instance) Running() bool {
	i.seen.Lock()
	defer i.seen.Unlock()
	return i.phase == running && !ended(i.machine)
}

// ResumeDuration is the time from the call of Resume until the vCPUs ran, zero for an instance that was not resumed.
func (i *Instance) ResumeDuration() time.Duration { return i.resumeDuration }

// BeforeSuspend tells the guest's agent that the guest will be suspended, and returns when it is ready. The guest runs on.
func (i *Instance) BeforeSuspend(ctx context.Context) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.beforeSuspend(ctx)
}

func (i *Instance) beforeSuspend(ctx context.Context) error {
	if i.phase != running {
		return fmt.Errorf("suspend instance: %w: it is %s", ErrPhase, i.phase)
	}
	i.greet()
	call(i.cfg.Hooks.BeforeSuspend)
	if err := i.guest.beforeSuspend(ctx, i.machine, i.cfg.ResumeTimeout); err != nil {
		return fmt.Errorf("suspend instance: %w", err)
	}
	return nil
}

// Pause stops all vCPUs. Continue goes on from there.
func (i *Instance) Pause(ctx context.Context) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.pause(ctx)
}

func (i *Instance) pause(ctx context.Context) error {
	if i.phase != running {
		return fmt.Errorf("pause instance: %w: it is %s", ErrPhase, i.phase)
	}
	if err := i.machine.Pause(ctx); err != nil {
		return fmt.Errorf("pause instance: %w", err)
	}
	i.enter(suspended)
	call(i.cfg.Hooks.Suspended)
	return nil
}

// Suspend tells the agent, then stops all vCPUs. If that fails, the guest goes on running.
func (i *Instance) Suspend(ctx context.Context) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.suspend(ctx)
}

func (i *Instance) suspend(ctx context.Context) error {
	err := i.beforeSuspend(ctx)
	if err == nil {
		err = i.pause(ctx)
	}
	if err != nil && i.phase == running {
		// Whatever the agent did before a suspend, it must undo.
		err = errors.Join(err, i.guest.undoSuspend(context.WithoutCancel(ctx), i.machine, i.cfg.RescueTimeout))
	}
	return err
}

// SaveState writes the device state of a suspended instance to w.
func (i *Instance) SaveState(ctx context.Context, w io.Writer) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.phase != suspended {
		return fmt.Errorf("save state of instance: %w: it is %s", ErrPhase, i.phase)
	}
	return i.machine.Save(ctx, w)
}

// Continue undoes BeforeSuspend, Pause and SaveState, whether they succeeded or not: when it returns nil the guest runs on.
// That its agent was told is tried, and logged where it fails: the guest serves all the same.
func (i *Instance) Continue(ctx context.Context) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	switch i.phase {
	case running: // only the agent was told, or pausing failed half-way
		if err := i.machine.Resume(ctx); err != nil && !errors.Is(err, vmm.ErrState) {
			return fmt.Errorf("continue instance: %w", err)
		}
	case suspended:
		if err := i.run(ctx); err != nil {
			return fmt.Errorf("continue instance: %w", err)
		}
	default:
		return fmt.Errorf("continue instance: %w: it is %s", ErrPhase, i.phase)
	}
	if err := i.guest.undoSuspend(ctx, i.machine, i.cfg.ResumeTimeout); err != nil {
		i.log.Error("the instance runs on, but its agent failed after the resume", "error", err)
	} else {
		call(i.cfg.Hooks.AfterResume)
	}
	return nil
}

// Release puts on record, durably, that the suspended instance was given to whoever completes the migration. When it
// fails nobody knows what the record says: Reclaim follows.
func (i *Instance) Release(ctx context.Context, migration string) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.phase != suspended {
		return fmt.Errorf("release instance: %w: it is %s", ErrPhase, i.phase)
	}
	i.note(func() { i.phase, i.migration, i.confirmed = released, migration, false })
	// Whatever becomes of this host, what the other lacks of the disks is in the files. The machine has flushed them when it was
	// paused, or should have.
	var work errgroup.Group
	for _, d := range i.devices {
		if d.served != nil {
			work.Go(d.front().Flush)
		}
	}
	if err := work.Wait(); err != nil {
		return fmt.Errorf("release instance: flush its disks: %w", err)
	}
	return writeRecord(i.device(StateDevice), i.movedRecord())
}

// movedRecord is the record of an instance that was released.
func (i *Instance) movedRecord() Record {
	return Record{Status: Moved, Migration: i.migration, Confirmed: i.confirmed, Layered: i.layered(), Shared: i.lent}
}

// Confirm puts on record that whom the instance was given to runs it, and may still need content from here: nobody can take it
// back any more.
func (i *Instance) Confirm(context.Context) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.phase != released {
		return fmt.Errorf("confirm instance: %w: it is %s", ErrPhase, i.phase)
	}
	i.note(func() { i.confirmed = true })
	return writeRecord(i.device(StateDevice), i.movedRecord())
}

// Confirmed reports whether whom the instance was given to has said that it runs it, and may still need content from here.
func (i *Instance) Confirmed() bool {
	i.seen.Lock()
	defer i.seen.Unlock()
	return i.phase == released && i.confirmed
}

// Released says that whom the instance was given to runs it: nothing here is of use any more.
func (i *Instance) Released() {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.phase != released {
		return
	}
	i.enter(moved)
	// Nobody depends on this record but one who starts the instance after this process died, and who would be in doubt.
	if err := writeRecord(i.device(StateDevice), Record{Status: Moved, Migration: i.migration, Settled: true}); err != nil {
		i.log.Warn("could not put on record that the instance runs elsewhere", "error", err)
	}
}

// Reclaim puts on record, durably, that an instance which may have been released belongs here. Only whoever knows that the
// other side will never run it may call it.
func (i *Instance) Reclaim(ctx context.Context, migration string) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.phase != released && i.phase != suspended {
		return fmt.Errorf("reclaim instance: %w: it is %s", ErrPhase, i.phase)
	}
	i.enter(suspended)
	i.lent = false
	return writeRecord(i.device(StateDevice), i.runningRecord(""))
}

// Lend notes whether whom the instance is about to be given to has its memory itself: see [Instance.Handle]. It holds until the instance
// is ours again.
func (i *Instance) Lend(lent bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.lent = lent
}

// Load gives the waiting machine its device state. Everything the devices need must have arrived.
func (i *Instance) Load(ctx context.Context, state io.Reader) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.phase != waiting {
		return fmt.Errorf("load instance: %w: it is %s", ErrPhase, i.phase)
	}
	state, err := i.keepState(state)
	if err == nil {
		err = i.machine.Load(ctx, state)
	}
	if err != nil {
		return fmt.Errorf("load instance: %w", err)
	}
	i.enter(loaded)
	return nil
}

// Own puts on record, durably, that this host owns the instance that was received: the commit of the migration.
func (i *Instance) Own(ctx context.Context, migration string) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.phase != loaded {
		return fmt.Errorf("own instance: %w: it is %s", ErrPhase, i.phase)
	}
	if err := i.commitLate(migration); err != nil {
		return err
	}
	if i.point.record.Length > 0 {
		i.point.record.Time = time.Now()
	}
	if i.foreign {
		if err := i.guest.serve(i.quiet); err != nil {
			return err
		}
	}
	// Before the record, as who adopts the machine is to know; and while it still ends with this process.
	i.guest.noteResume(&i.cfg)
	if err := i.leash.release(); err != nil {
		return err
	}
	if err := writeRecord(i.device(StateDevice), i.runningRecord(migration)); err != nil {
		return err
	}
	i.point.front.Store(true)
	i.enter(suspended)
	return nil
}

// Refuse puts on record, durably, that what was received will never run here. Discard follows.
func (i *Instance) Refuse(ctx context.Context, migration string) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.phase == running || i.phase == closed {
		return fmt.Errorf("refuse instance: %w: it is %s", ErrPhase, i.phase)
	}
	if err := writeRecord(i.device(StateDevice), Record{Status: Discarded, Migration: migration}); err != nil {
		return err
	}
	i.enter(loaded)
	i.refused = true
	return nil
}

// Run lets a received instance run, after Own.
func (i *Instance) Run(ctx context.Context) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.phase != suspended {
		return fmt.Errorf("run instance: %w: it is %s", ErrPhase, i.phase)
	}
	return i.run(ctx)
}

// AfterResume has the agent of a received instance do its work. It is apart from Run because the guest serves meanwhile.
func (i *Instance) AfterResume(ctx context.Context) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.phase != running {
		return fmt.Errorf("after resume of instance: %w: it is %s", ErrPhase, i.phase)
	}
	i.comeToRest(ctx)
	return i.afterResume(ctx)
}

// Device is a device of an instance as a migration sees it.
type Device struct {
	Config  DeviceConfig  // as it was given
	Base    os.FileInfo   // the file that was opened as Config.Base, which may be another by now: see os.SameFile
	Block   block.Device  // its content
	Tracker block.Tracker // nil for a device that does not change while the instance runs

	// Writes is another Tracker, for who wants to know beside a migration, once the instance runs. Nil for a device that does not change, and for
	// memory, in which nobody can see cheaply what is written.
	Writes block.Tracker

	// Overlay knows what differs from the base. Nil where there is none, and for memory, whose overlay is what it was when it
	// was saved.
	Overlay Changes
}

// Changes knows where a device may differ from its base: see [block.Overlay.NextChange].
type Changes interface {
	NextChange(off int64) (block.Range, error)
}

// foreignMemory is memory that another machine's guest uses: it is looked at here, and not touched.
type foreignMemory struct{ block.Device }

func (foreignMemory) WriteAt(p []byte, off int64) (int, error) {
	return 0, fmt.Errorf("write %d bytes at %d of memory that is the source's still: %w", len(p), off, os.ErrPermission)
}

func (foreignMemory) Discard(off, n int64) error {
	return fmt.Errorf("discard %d bytes at %d of memory that is the source's still: %w", n, off, os.ErrPermission)
}

// Devices are the devices that make the instance, memory included, device state not: it exists only while suspended.
func (i *Instance) Devices() []Device {
	var out []Device
	for _, d := range i.devices {
		dev := Device{Config: d.DeviceConfig, Base: d.base, Block: d.Device}
		if d.overlay != nil {
			dev.Overlay = d.overlay
		}
		switch {
		case d.Name == StateDevice:
			continue
		case d.Name == MemoryDevice:
			dev.Block, dev.Tracker, dev.Overlay = i.memory.Device(), i.memory.Tracker(), nil
			if i.foreign && !i.point.front.Load() {
				dev.Block = foreignMemory{dev.Block}
			}
			if i.point.memory != nil && !i.point.front.Load() {
				dev.Block = &keptMemory{Device: dev.Block, kept: i.point.memory}
			}
		case d.layer != nil && i.point.front.Load():
			dev.Block, dev.Tracker, dev.Writes = d.layer, d.layer, d.layer.writes
			if dev.Overlay != nil {
				dev.Overlay = d
			}
		case d.tracked != nil:
			dev.Tracker, dev.Writes = d.tracked, d.writes
		}
		out = append(out, dev)
	}
	return out
}

// ErrUnsaved is wrapped by the error of a Close that could not save the instance. Its machine lives on, paused unless it is
// not all here yet: Close tries again, Kill gives the instance up.
var ErrUnsaved = errors.New("the instance could not be saved and is kept")

// Close ends the instance here. One that runs is suspended and saved, so that the next Resume goes on from there; of one without a device of memory the
// guest is shut down, within Config.RescueTimeout, after which it is switched off, and that is an error. One that
// was released and not confirmed is saved too, but stays marked as moved: see [Config.ForceOwner]. One that moved away, or
// was never ours, is only taken down. Cancelling ctx does not end the work, as an instance half saved is worth nothing;
// saving takes as long as writing its memory does. Close may be called more than once.
func (i *Instance) Close(ctx context.Context) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	ctx = context.WithoutCancel(ctx)
	var err error
	switch i.phase {
	case closed:
		return nil
	case running, suspended:
		if ended(i.machine) {
			break
		}
		if i.device(MemoryDevice) == nil {
			return i.shutOff(ctx)
		}
		if err = i.checkWhole(ctx); err == nil && i.phase == running {
			err = i.suspendAndSave(ctx)
		} else if err == nil {
			err = i.save(ctx)
		}
	case released:
		err = i.save(ctx)
	case waiting, loaded:
		if state := i.device(StateDevice); state != nil && !i.refused {
			err = writeRecord(state, Record{Status: Discarded, Migration: i.migration})
		}
		return errors.Join(err, i.teardown())
	}
	if ended(i.machine) {
		return errors.Join(i.recordEnd(), i.teardown())
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrUnsaved, err)
	}
	return i.teardown()
}

// ShutDown has the guest of an instance that runs shut down, and waits for it, up to Config.RescueTimeout. Then there is Close to call.
func (i *Instance) ShutDown(ctx context.Context) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.phase != running {
		return fmt.Errorf("shut down instance: it is %s: %w", i.phase, ErrPhase)
	}
	if err := i.shutDown(ctx); err != nil {
		return fmt.Errorf("shut down instance: %w", err)
	}
	return nil
}

// shutOff shuts down an instance that is never saved, puts on record how it ended, and takes it down.
func (i *Instance) shutOff(ctx context.Context) error {
	err := i.shutDown(ctx)
	switch {
	case !ended(i.machine):
		err = fmt.Errorf("close instance: %w; it is switched off, as by a power cut", err)
	case err != nil:
		err = fmt.Errorf("close instance: %w", err)
	default:
		err = i.recordEnd()
	}
	return errors.Join(err, i.teardown())
}

// pressEvery is how long the guest's agent has to answer, and the time between two presses of the power button, which is for guests without one.
const pressEvery = 3 * time.Second

func (i *Instance) shutDown(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, i.cfg.RescueTimeout, fmt.Errorf("the guest has not shut down within %s", i.cfg.RescueTimeout))
	defer cancel()
	if i.phase == suspended {
		if err := i.run(ctx); err != nil {
			return err
		}
	}
	button, _ := i.machine.(vmm.PowerButton)
	reboots := vmm.RequirementsOf(i.cfg.Backend).Reboots
	for {
		// Again and again: an agent may connect later, and be slow, and a guest that boots has nobody yet to heed the button.
		began := time.Now()
		unheard := i.guest.shutDown(ctx, i.machine, reboots)
		if unheard != nil && button != nil && !ended(i.machine) {
			if err := button.PressPower(ctx); err != nil {
				i.log.Debug("cannot press the power button", "error", err)
			}
		}
		select {
		case <-i.machine.Done():
			switch err := i.machine.Err(); {
			case i.killed.Load():
				return errors.New("it was switched off before its guest had shut down")
			case !errors.Is(err, vmm.ErrReboot):
				return err
			case !reboots:
				return fmt.Errorf("instead of shutting down, as after a panic: %w", err)
			}
			return nil
		case <-ctx.Done():
			err := context.Cause(ctx)
			if unheard != nil {
				err = fmt.Errorf("%w: nothing in it heeds its power button (systemd-logind, acpid), and of its agent this is known: %w", err, unheard)
			}
			return err
		case <-time.After(pressEvery - time.Since(began)):
		}
	}
}

const (
	balloonPoll  = 100 * time.Millisecond
	balloonQuiet = 5 * time.Second // after which a guest that has given nothing more gives nothing more
)

// Balloon asks the guest of an instance that runs to have given size bytes of its memory in all, in whole MiB, which the host has for others then: 0
// takes nothing. It waits until that is so, or the guest has come no nearer to it for 5 s, and returns what it has given. What is given stays so where the
// guest moves to. A guest that comes to need it takes it back by itself. When ctx ends, the guest has been asked all the same.
func (i *Instance) Balloon(ctx context.Context, size int64) (given int64, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("set balloon of instance to %d bytes: %w", size, err)
		}
	}()
	if memory := i.desc.MemorySize; size < 0 || size >= memory {
		return 0, fmt.Errorf("%w, which has %d", ErrSize, memory)
	}
	balloon, ok := i.machine.(vmm.Ballooner)
	if !ok {
		return 0, fmt.Errorf("%s has no balloon", i.cfg.Backend.Name())
	}
	if n := i.Missing(); n > 0 {
		return 0, fmt.Errorf("%w: %d bytes of the VM are still to come", ErrBalloon, n)
	}
	if size > 0 && vmm.RequirementsOf(i.cfg.Backend).Graft && !i.memory.Frees() {
		return 0, fmt.Errorf("%w: what it gives could not be freed: the VM's peer was killed and started again, so move or restart the VM first, or this host does not allow it (seccomp notifications, Linux 5.19)", ErrBalloon)
	}
	// Between the calls the machine is free for others.
	locked := func(do func(context.Context) error) error {
		i.mu.Lock()
		defer i.mu.Unlock()
		if i.phase != running {
			return fmt.Errorf("it is %s: %w", i.phase, ErrPhase)
		}
		ctx, cancel := context.WithTimeoutCause(ctx, i.cfg.RescueTimeout, fmt.Errorf("the hypervisor has not answered within %s", i.cfg.RescueTimeout))
		defer cancel()
		err := do(ctx)
		if errors.Is(err, vmm.ErrNoBalloon) {
			err = fmt.Errorf("%w: %w", ErrBalloon, err)
		}
		return err
	}
	if err := locked(func(ctx context.Context) error { return balloon.SetBalloon(ctx, size) }); err != nil {
		return 0, err
	}
	return awaitBalloon(ctx, size, i.machine.Done(), func() (given int64, err error) {
		err = locked(func(ctx context.Context) error { given, err = balloon.Balloon(ctx); return err })
		return given, err
	})
}

// awaitBalloon waits until a guest has given what it was asked for, as far as look tells, or comes no nearer to it. Once the machine has ended, look fails.
func awaitBalloon(ctx context.Context, size int64, ended <-chan struct{}, look func() (int64, error)) (given int64, err error) {
	for nearer, nearest := time.Now(), int64(math.MaxInt64); ; {
		if given, err = look(); err != nil {
			return 0, err
		}
		if left := max(given-size, size-given); left < nearest {
			nearer, nearest = time.Now(), left
		}
		if given>>20 == size>>20 || time.Since(nearer) >= balloonQuiet {
			return given, nil
		}
		select {
		case <-ctx.Done():
			return given, context.Cause(ctx)
		case <-ended:
		case <-time.After(balloonPoll):
		}
	}
}

// checkWhole refuses to save an instance of which something has not arrived. Its guest runs on meanwhile: it may be needed
// for nothing, but a saved instance without its memory is worth less.
func (i *Instance) checkWhole(ctx context.Context) error {
	if n := i.Missing(); n > 0 {
		return fmt.Errorf("%d bytes of it are still at the peer it came from (migration %s): let that one be reached, or start it again", n, shown(i.late.migration))
	}
	return i.complete(ctx)
}

// recordEnd puts on record how the machine ended by itself. After anything but a shutdown the record says Running, which
// is true of an instance that had no time to say more.
func (i *Instance) recordEnd() error {
	reason := i.machine.Err()
	i.log.Info("machine has ended", "vm_path", i.path, "reason", reason)
	state := i.device(StateDevice)
	if i.phase != running || state == nil || reason != nil && !errors.Is(reason, vmm.ErrReboot) {
		return nil
	}
	if err := writeRecord(state, Record{Status: ShutDown, Migration: i.late.migration, Layered: i.layered()}); err != nil {
		return err
	}
	if err := i.fold(context.Background()); err != nil {
		return err
	}
	i.voidLayers()
	return nil
}

// Kill ends the instance here as a power cut would: nothing is saved. It does not wait for a Close that saves, but ends it.
func (i *Instance) Kill() error {
	i.killed.Store(true)
	var err error
	if i.machine != nil {
		err = i.machine.Close()
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.phase == closed {
		return err
	}
	return errors.Join(err, i.teardown())
}

// Discard ends an instance whose migration to here was given up: what arrived is marked void, and files that were made for
// it are removed. After Refuse the record stays, and with it the state device, until Forget.
func (i *Instance) Discard(ctx context.Context) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.phase == closed {
		return nil
	}
	var errs []error
	if state := i.device(StateDevice); state != nil {
		errs = append(errs, writeRecord(state, Record{Status: Discarded, Migration: i.migration}))
	}
	errs = append(errs, i.teardown())
	if i.refused {
		errs = append(errs, i.discardDevices(StateDevice))
	} else {
		errs = append(errs, i.discardDevices())
	}
	return errors.Join(errs...)
}

// Forget removes what Discard has kept, once nobody needs to hear of it any more.
func (i *Instance) Forget() error {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.discardDevices()
}

// abandon takes down an instance that failed to start. One whose guest has run is killed, not saved: it never came up.
func (i *Instance) abandon(ctx context.Context, ran bool) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	if !ran {
		return errors.Join(i.teardown(), i.discardDevices())
	}
	if i.checkWhole(ctx) != nil { // saved, it would be less than it is: so it goes on from its disks, as after a power cut
		return i.teardown()
	}
	if i.phase == running && (i.filler != nil || i.cfg.BootUnattended) && !ended(i.machine) {
		// The guest ran for a moment and its agent did not answer. It may have served clients: keep what it did.
		if i.device(MemoryDevice) == nil {
			return i.shutOff(context.WithoutCancel(ctx))
		}
		return errors.Join(i.pauseAndSave(context.WithoutCancel(ctx)), i.teardown())
	}
	return i.teardown()
}

func (i *Instance) suspendAndSave(ctx context.Context) error {
	agent, cancel := context.WithTimeout(ctx, i.cfg.RescueTimeout)
	defer cancel()
	if err := i.beforeSuspend(agent); err != nil {
		// An agent that does not answer must not cost the instance its memory.
		i.log.Warn("agent failed before suspend; saving the instance all the same", "error", err)
	}
	return i.pauseAndSave(ctx)
}

func (i *Instance) pauseAndSave(ctx context.Context) error {
	bounded, cancel := context.WithTimeout(ctx, i.cfg.RescueTimeout)
	defer cancel()
	if err := i.pause(bounded); errors.Is(err, vmm.ErrState) {
		i.enter(suspended) // it has never run
	} else if err != nil {
		return fmt.Errorf("save instance: %w", err)
	}
	return i.save(ctx)
}

// save writes a suspended instance into its devices: disks and memory first, then the header that makes them one.
func (i *Instance) save(ctx context.Context) error {
	state, memory := i.device(StateDevice), i.device(MemoryDevice)
	if state == nil || memory == nil {
		return nil
	}
	bounded, cancel := context.WithTimeout(ctx, i.cfg.RescueTimeout)
	defer cancel()
	var buf limitedBuffer
	if err := i.machine.Save(bounded, &buf); err != nil {
		return fmt.Errorf("save instance: %w", err)
	}
	status := Running
	if i.phase == released {
		status = Moved
	}
	if err := i.forgetPoint(status); err != nil {
		return fmt.Errorf("save instance: %w", err)
	}
	var work errgroup.Group
	work.Go(func() error { return i.fold(ctx) })
	work.Go(func() error {
		if memory.Overlay == "" {
			return block.ReplaceFile(ctx, memory.Base, i.memory.Device())
		}
		var err error
		if i.onDemand { // what it has not brought is there
			err = block.CopyRanges(ctx, memory.Device, i.memory.Device(), i.filler.NextPresent, nil)
		} else {
			err = block.Copy(ctx, memory.Device, i.memory.Device(), block.CopyOptions{})
		}
		if err != nil {
			return err
		}
		return memory.Flush()
	})
	if err := work.Wait(); err != nil {
		return fmt.Errorf("save instance: %w", err)
	}
	record := Record{Status: Saved}
	if i.phase == released {
		record = i.movedRecord()
		record.Layered = false // they were folded
	}
	if err := writeState(state, record, buf.b); err != nil {
		return fmt.Errorf("save instance: %w", err)
	}
	i.voidLayers()
	return nil
}

// teardown ends and removes everything that start made, and closes the devices. It works on whatever there is.
func (i *Instance) teardown() error {
	i.enter(closed)
	i.huge.end()
	i.ahead.end()
	i.recording.end()
	errs := []error{i.Throttle(context.Background(), 0)}
	if i.machine != nil {
		errs = append(errs, i.machine.Close())
	}
	errs = append(errs, i.leash.release(), i.guest.close())
	if i.late.listed != nil {
		<-i.late.listed // whatever it says: nothing came of it
	}
	// Nobody is answered any more: the machine is gone, or is to ask its next owner. Then who waits for a block may be told
	// that it will not come, for which the servers would wait.
	for _, server := range i.disks {
		server.Abort()
	}
	for _, d := range i.devices {
		if d.lazy != nil {
			errs = append(errs, d.close())
		}
	}
	for _, server := range i.disks {
		errs = append(errs, server.Close())
	}
	closeFiles(i.diskConnection)
	if i.memory != nil {
		errs = append(errs, i.memory.Close())
	}
	for _, d := range i.devices {
		errs = append(errs, d.close())
	}
	if i.orphan != nil {
		i.orphan.close()
	}
	if i.root != "" {
		errs = append(errs, os.RemoveAll(i.root))
		// The hypervisor's folder goes with the last machine in it, whoever made it; those above if we made them.
		i.reapFolders(filepath.Dir(i.root))
		RemoveFolders(i.folders)
	}
	closeFiles(i.handed)
	i.handed = nil
	closeFiles(i.owner, i.folder) // last: until then the folder is not anybody's to remove
	if i.made {
		i.made = false
		call(i.cfg.Hooks.Closed)
	}
	return errors.Join(errs...)
}

// discardDevices discards all devices but those named, the last one first: the first may have made the folder that all are in.
func (i *Instance) discardDevices(but ...string) error {
	var errs []error
	for _, d := range slices.Backward(i.devices) {
		if slices.Contains(but, d.Name) {
			errs = append(errs, d.close())
		} else {
			errs = append(errs, d.discard())
		}
	}
	return errors.Join(errs...)
}
