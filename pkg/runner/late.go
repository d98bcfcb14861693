package runner

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/ram"
)

// Late is a device of an instance of which something arrives while the guest runs.
//
// Its methods may be called concurrently.
type Late interface {
	// Fill and FillZero deliver contents, in whole pages but for the end of the device. What the guest has overwritten
	// meanwhile stays as it is.
	Fill(off int64, data []byte) error
	FillZero(off, n int64) error

	// Wanted lists what somebody waits for, and was asked for: what to ask for again when the asking got lost.
	Wanted() []block.Range

	// NextMissing returns the first range at or after off that has not arrived, and io.EOF when there is none.
	NextMissing(off int64) (block.Range, error)
}

// Ask asks for contents that somebody waits for. It must return soon.
type Ask func(device string, r block.Range)

// late is what an instance knows of what arrives while its guest runs.
type late struct {
	ask atomic.Pointer[Ask]

	mu      sync.Mutex      // guards devices; held for a moment, with Instance.mu held or not
	devices map[string]Late // complete ones too, until Complete

	migration string     // that brings it
	listed    chan error // receives when what is missing of disks is durable; nil: nothing is
}

// device is what is late of a device; nil: nothing.
func (l *late) device(name string) Late {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.devices[name]
}

// put sets what is late of a device; nil: nothing any more.
func (l *late) put(name string, d Late) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if d == nil {
		delete(l.devices, name)
		return
	}
	if l.devices == nil {
		l.devices = make(map[string]Late)
	}
	l.devices[name] = d
}

// all are the devices that are late, by their names.
func (l *late) all() map[string]Late {
	l.mu.Lock()
	defer l.mu.Unlock()
	return maps.Clone(l.devices)
}

// request asks, if there is somebody to be asked. What is wanted meanwhile is listed by Late.Wanted.
func (l *late) request(device string, r block.Range) {
	if ask := l.ask.Load(); ask != nil {
		(*ask)(device, r)
	}
}

// lateFile is in the folder of a machine whose memory arrives while it runs, for whoever adopts it: then a hole in its
// memory is not a page of zeros, but one to be asked for.
const lateFile = "late.json"

type lateNote struct {
	Migration string `json:"migration"`
}

// listSuffix makes the name of the file that lists what is missing of a device of that of the overlay's state, or of the device
// itself where there is no overlay.
const listSuffix = ".missing"

func (d DeviceConfig) listFile() string {
	if d.State != "" {
		return d.State + listSuffix
	}
	return d.Base + listSuffix
}

// relay is a disk as the machine has it open: a device that may come to be another, which is the same plus what is missing.
type relay struct{ to atomic.Pointer[block.Device] }

func newRelay(to block.Device) *relay {
	r := new(relay)
	r.to.Store(&to)
	return r
}

func (r *relay) dev() block.Device                        { return *r.to.Load() }
func (r *relay) Size() int64                              { return r.dev().Size() }
func (r *relay) ReadAt(p []byte, off int64) (int, error)  { return r.dev().ReadAt(p, off) }
func (r *relay) WriteAt(p []byte, off int64) (int, error) { return r.dev().WriteAt(p, off) }
func (r *relay) Discard(off, n int64) error               { return r.dev().Discard(off, n) }
func (r *relay) Flush() error                             { return r.dev().Flush() }
func (r *relay) Close() error                             { return nil } // its owner closes what it relays to
func (r *relay) NextData(off int64) (block.Range, error)  { return block.NextData(r.dev(), off) }

// lateDisk is a disk, or a file to boot from, of which something is missing.
type lateDisk struct{ *block.Lazy }

func (d lateDisk) Wanted() []block.Range { return d.InFlight() }

// lateMemory is memory of which something is missing. When its machine ends, nothing of it is missing any more: nobody will
// look for it. So the disks, which are worth something without it, go on arriving, and the source comes to its end.
type lateMemory struct{ f *ram.Filler }

// unneeded is what is left of the error of a delivery.
func unneeded(err error) error {
	if errors.Is(err, ram.ErrProcessEnded) {
		return nil
	}
	return err
}

func (m lateMemory) Fill(off int64, data []byte) error { return unneeded(m.f.Deliver(off, data)) }
func (m lateMemory) FillZero(off, n int64) error       { return unneeded(m.f.DeliverZeros(off, n)) }

// Forgone implements migrate.Forgoer.
func (m lateMemory) Forgone() bool { return errors.Is(m.f.Err(), ram.ErrProcessEnded) }

func (m lateMemory) NextMissing(off int64) (block.Range, error) {
	if m.Forgone() {
		return block.Range{}, io.EOF
	}
	return m.f.NextMissing(off)
}
func (m lateMemory) Wanted() []block.Range {
	offsets := m.f.Wanted()
	slices.Sort(offsets)
	ranges := make([]block.Range, len(offsets))
	for n, off := range offsets {
		ranges[n] = block.Range{Offset: off, Length: block.PageSize}
	}
	return ranges
}

// makeLazy puts a lazy device before one. Missing is what has not arrived; nil: what the list says that is there.
func (d *device) makeLazy(missing []block.Range, l *late) error {
	lazy, err := block.NewLazy(d.Device, block.LazyOptions{
		Missing: missing, List: d.listFile(), Live: d.arrived,
		Fetch: func(_ context.Context, r block.Range) error {
			l.request(d.Name, r)
			return nil
		},
	})
	if err != nil {
		return fmt.Errorf("device %q: %w", d.Name, err)
	}
	d.lazy, d.Device = lazy, lazy
	if d.served != nil {
		d.served.to.Store(&d.Device)
	}
	l.put(d.Name, lateDisk{lazy})
	return nil
}

// canBeLate reports whether the device may arrive while the guest runs: a disk, or a file that no machine reads but one that boots.
func (d *device) canBeLate() bool {
	if IsBootFile(d.Name) {
		_, here := d.Device.(*sameDevice)
		return !here
	}
	return d.served != nil && !d.Shared // which is here
}

// CanPostpone reports whether the device may arrive while the guest runs. The instance is prepared.
func (i *Instance) CanPostpone(device string) bool {
	if device == MemoryDevice {
		return i.memory.Capabilities().Lazy
	}
	d := i.device(device)
	return d != nil && d.canBeLate()
}

// Postpone declares, before Load, what of the devices arrives only while the guest runs, by device; devices of which
// nothing is missing are not in it. ask is told what somebody waits for. Everything else has arrived.
func (i *Instance) Postpone(ctx context.Context, missing map[string][]block.Range, ask Ask) (map[string]Late, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.phase != waiting {
		return nil, fmt.Errorf("postpone contents of instance: %w: it is %s", ErrPhase, i.phase)
	}
	i.late.ask.Store(&ask)
	var disks []*device
	for name, ranges := range missing {
		if len(ranges) == 0 {
			continue
		}
		if !i.CanPostpone(name) {
			return nil, fmt.Errorf("postpone contents of device %q: all of it must be here before the guest runs", name)
		}
		if name == MemoryDevice {
			// It outlives this call, as the guest does.
			if err := i.receiveMemory(ctx, ram.FillOptions{Ranges: ranges}); err != nil {
				return nil, fmt.Errorf("postpone contents of memory: %w", err)
			}
			continue
		}
		d := i.device(name)
		if err := d.makeLazy(ranges, &i.late); err != nil {
			return nil, fmt.Errorf("postpone contents: %w", err)
		}
		disks = append(disks, d)
	}
	if len(disks) > 0 {
		// What is missing is durable when the instance is ours; meanwhile the device state is loaded.
		i.late.listed = make(chan error, 1)
		go func() {
			var errs []error
			for _, d := range disks {
				errs = append(errs, d.lazy.Flush())
			}
			i.late.listed <- errors.Join(errs...)
		}()
	}
	return i.late.all(), nil
}

func (i *Instance) receiveMemory(ctx context.Context, opts ram.FillOptions) error {
	request := func(off int64) { i.late.request(MemoryDevice, block.Range{Offset: off, Length: block.PageSize}) }
	f, err := i.memory.Receive(context.WithoutCancel(ctx), request, opts)
	if err != nil {
		return err
	}
	i.filler = f
	if late := (lateMemory{f}); i.point.memory != nil {
		i.late.put(MemoryDevice, keptLate{late, i})
	} else {
		i.late.put(MemoryDevice, late)
	}
	return nil
}

// commitLate makes durable, before the instance is ours, what has not arrived of it.
func (i *Instance) commitLate(migration string) error {
	i.late.migration = migration
	if i.late.listed != nil {
		err := <-i.late.listed
		i.late.listed = nil
		if err != nil {
			return err
		}
	}
	if i.late.device(MemoryDevice) == nil {
		return nil
	}
	text, err := json.Marshal(lateNote{Migration: migration})
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(i.root, lateFile), text, 0o600)
}

// recallLate finds out, of an adopted machine, whether its memory was arriving.
func (i *Instance) recallLate() (arriving bool, err error) {
	text, err := os.ReadFile(filepath.Join(i.root, lateFile))
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	} else if err != nil {
		return false, err
	}
	var note lateNote
	if err := json.Unmarshal(text, &note); err != nil {
		return false, fmt.Errorf("read %q: %w", filepath.Join(i.root, lateFile), err)
	}
	i.late.migration = note.Migration
	return true, nil
}

// Ask has ask told what somebody waits for from now on. What was wanted before is listed by the devices.
func (i *Instance) Ask(ask Ask) { i.late.ask.Store(&ask) }

// Arriving is a device of an instance that was received.
type Arriving struct {
	Name string // of a device
	Size int64  // bytes
	Late Late   // nil: all of it is here
}

// Arriving returns all devices of an instance that was received, and the migration that brings them.
func (i *Instance) Arriving() (migration string, devices []Arriving) {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.late.migration, i.arriving()
}

// callOnLate tells the owner that something is missing, before anything waits for it.
func (i *Instance) callOnLate() {
	if i.late.migration != "" && i.cfg.OnLate != nil {
		i.cfg.OnLate(i, i.late.migration, i.arriving())
	}
}

// arriving lists the devices in the order in which they are to come: what only a boot needs comes last.
func (i *Instance) arriving() (devices []Arriving) {
	for _, d := range i.devices {
		if d.Name != StateDevice {
			devices = append(devices, Arriving{Name: d.Name, Size: d.Size(), Late: i.late.device(d.Name)})
		}
	}
	slices.SortStableFunc(devices, func(a, b Arriving) int { return ByNeed(a.Name, b.Name) })
	return devices
}

// Settled puts on record that the source of the instance has nothing to do with it any more.
func (i *Instance) Settled() error {
	kept := i.sealPoint() // beside the guest, and whatever else is done to the instance
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.phase != running && i.phase != suspended {
		return nil
	}
	i.late.migration = ""
	if i.point.arrived {
		i.point.arrived = false
		if i.point.record.Kept = kept && i.point.record.Length > 0; !i.point.record.Kept {
			i.point.record = Record{}
		}
	}
	return writeRecord(i.device(StateDevice), i.runningRecord(""))
}

// GuestLacks reports whether something has not arrived that the guest may come to wait for: not only what it boots from.
func (i *Instance) GuestLacks() bool {
	for name, l := range i.late.all() {
		if _, err := l.NextMissing(0); err == nil && !IsBootFile(name) {
			return true
		}
	}
	return false
}

// Missing is how many bytes of the instance have not arrived.
func (i *Instance) Missing() int64 {
	var n int64
	for _, l := range i.late.all() {
		for off := int64(0); ; {
			r, err := l.NextMissing(off)
			if err != nil {
				break
			}
			n, off = n+r.Length, r.End()
		}
	}
	return n
}

// Complete makes durable that everything has arrived: the source may drop its copy afterwards.
func (i *Instance) Complete(ctx context.Context) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.complete(ctx)
}

func (i *Instance) complete(ctx context.Context) error {
	for name, l := range i.late.all() {
		if kept, ok := l.(keptLate); ok {
			l = kept.lateMemory
		}
		switch l := l.(type) {
		case lateMemory:
			if _, err := l.NextMissing(0); err != io.EOF {
				return fmt.Errorf("complete instance: a part of its memory has not arrived")
			}
			if err := unneeded(l.f.Wait(ctx)); err != nil {
				return fmt.Errorf("complete instance: %w", err)
			}
			if err := os.Remove(filepath.Join(i.root, lateFile)); err != nil && !errors.Is(err, os.ErrNotExist) {
				return fmt.Errorf("complete instance: %w", err)
			}
		case lateDisk:
			if err := l.Lazy.Complete(); err != nil {
				return fmt.Errorf("complete instance: device %q: %w", name, err)
			}
		}
		i.late.put(name, nil)
	}
	return nil
}
