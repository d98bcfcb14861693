package peer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/migrate"
	"github.com/drafter-vm/drafter/pkg/runner"
	"github.com/drafter-vm/drafter/pkg/vmpackage"
	"github.com/drafter-vm/drafter/pkg/wire"
)

// still is a VM that nothing runs: its devices, each in files of this host.
type still struct {
	desc    runner.Description
	devices []*stillDevice // "state" among them
	made    []string       // files that were made for it, to remove if nothing comes of it
	folders []string       // folders that were made for them, outermost first

	forgotten bool // it is on record that nothing of it will ever run here, for a source that may want to know: discard keeps that
}

// stillDevice is a device of a still VM.
type stillDevice struct {
	block.Device
	name string
	path string   // of the file that holds it, or its base; empty for an image
	id   string   // of an image
	lock *os.File // on that file; nil: none
	made bool     // the file that is written to is new
}

// device is the device called name, or nil.
func (s *still) device(name string) *stillDevice {
	for _, d := range s.devices {
		if d.name == name {
			return d
		}
	}
	return nil
}

// describe checks what a migration announces before anything is made, and returns the machine it brings.
func describe(m *wire.Manifest) (runner.Description, error) {
	desc, err := runner.ParseDescription(m.Spec)
	if err != nil {
		return desc, migrate.Refuse("machine description: %v", err)
	}
	coming := make(map[string]int64)
	for _, d := range m.Devices {
		if err := vmpackage.CheckName(d.Name); err != nil {
			return desc, migrate.Refuse("%v", err)
		}
		if d.Name == runner.StateDevice || d.Size <= 0 {
			return desc, migrate.Refuse("device %q of %d bytes cannot be received", d.Name, d.Size)
		}
		coming[d.Name] = d.Size
	}
	if coming[runner.MemoryDevice] != desc.MemorySize {
		return desc, migrate.Refuse("device %q has %d bytes, the machine's memory %d", runner.MemoryDevice, coming[runner.MemoryDevice], desc.MemorySize)
	}
	for _, disk := range desc.Disks {
		if _, ok := coming[disk.Name]; !ok {
			return desc, migrate.Refuse("the machine has a disk %q, which does not come: without it the VM cannot be resumed; let it be sent (makeMigratable)", disk.Name)
		}
	}
	return desc, nil
}

// createStill makes the files for what a migration announces, where place says, and the state and config devices if they do
// not come as such. When it fails nothing is left.
func createStill(ctx context.Context, m *wire.Manifest, place func(name string) (path string, ok bool)) (_ *still, err error) {
	desc, err := describe(m)
	if err != nil {
		return nil, err
	}
	s := &still{desc: desc}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.discard())
		}
	}()
	config, err := desc.Encode()
	if err != nil {
		return nil, err
	}
	all := append(slices.Clone(m.Devices), wire.Device{Name: runner.StateDevice, Size: runner.StateDeviceSize})
	if !slices.ContainsFunc(m.Devices, func(d wire.Device) bool { return d.Name == runner.ConfigDevice }) {
		all = append(all, wire.Device{Name: runner.ConfigDevice, Size: int64(len(config))})
	}
	for _, d := range all {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		path, ok := place(d.Name)
		if !ok {
			return nil, migrate.Refuse("device %q is sent, and none of that name is configured at the destination", d.Name)
		}
		if err := s.create(d, path); err != nil {
			return nil, fmt.Errorf("make device %q: %w", d.Name, err)
		}
	}
	if len(all) > len(m.Devices)+1 {
		if _, err := s.device(runner.ConfigDevice).WriteAt(config, 0); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// create makes the file of a device, which must not exist.
func (s *still) create(d wire.Device, path string) error {
	made, err := runner.MakeFolders(filepath.Dir(path), 0o700)
	s.folders = append(s.folders, made...)
	if err != nil {
		return err
	}
	f, err := block.CreateFile(path, d.Size)
	if errors.Is(err, os.ErrExist) {
		return fmt.Errorf("%w: nothing is overwritten: choose another path, or remove it", err)
	} else if err != nil {
		return err
	}
	s.made = append(s.made, path)
	dev := &stillDevice{Device: f, name: d.Name, path: path, made: true}
	s.devices = append(s.devices, dev)
	dev.lock, err = runner.LockFile(path, true)
	return err
}

// openStill opens the devices of a VM, which is not alive. sizes are those of the devices that will be received, and are made
// if they do not exist; nil: all exist. When it fails nothing is left.
func openStill(devices []Device, sizes map[string]int64) (_ *still, err error) {
	s := new(still)
	defer func() {
		if err != nil {
			err = errors.Join(err, s.discard())
		}
	}()
	if err := CheckAtRest(devices); err != nil {
		return nil, err
	}
	for _, d := range devices {
		size, received := sizes[d.Name]
		if err := s.open(d.DeviceConfig, size, received || sizes == nil && !d.Stationary); err != nil {
			return nil, fmt.Errorf("open device %q: %w", d.Name, err)
		}
	}
	return s, nil
}

// open opens a device, to be written if writes is set. One of a size is made if it does not exist.
func (s *still) open(c runner.DeviceConfig, size int64, writes bool) error {
	_, err := os.Stat(c.Base)
	if errors.Is(err, os.ErrNotExist) && size > 0 && c.Overlay == "" {
		return s.create(wire.Device{Name: c.Name, Size: size}, c.Base)
	}
	if size == 0 { // it is not to be received
		if err := c.CheckArrived(); err != nil {
			return err
		}
	}
	dev := &stillDevice{name: c.Name, path: c.Base}
	inPlace := c.Overlay == "" && writes
	if dev.lock, err = runner.LockFile(c.Base, inPlace); err != nil {
		return err
	}
	s.devices = append(s.devices, dev)
	var base block.Device
	if inPlace {
		base, err = block.OpenFile(c.Base, block.FileOptions{})
	} else {
		base, err = c.OpenBase()
	}
	if err != nil {
		return err
	}
	dev.Device = base
	if size > 0 && base.Size() != size {
		return fmt.Errorf("%q has %d bytes, the device that comes has %d: they belong to different packages", c.Base, base.Size(), size)
	}
	if c.Overlay == "" {
		return nil
	}
	for _, path := range []string{c.Overlay, c.State} {
		made, err := runner.MakeFolders(filepath.Dir(path), 0o700)
		s.folders = append(s.folders, made...)
		if err != nil {
			return err
		}
		if _, err := os.Lstat(path); errors.Is(err, os.ErrNotExist) {
			s.made, dev.made = append(s.made, path), true
		}
	}
	overlay, err := block.OpenOverlay(block.OverlayOptions{
		Base: base, BasePath: c.Base, Overlay: c.Overlay, State: c.State, BlockSize: c.BlockSize, ElideUnchanged: size > 0,
	})
	if err != nil {
		return err
	}
	dev.Device = overlay
	return nil
}

// vacant refuses to receive over a VM that somebody may still want.
func (s *still) vacant(sizes map[string]int64) error {
	state := s.device(runner.StateDevice)
	if state.made {
		for _, d := range s.devices {
			if _, received := sizes[d.name]; received && !d.made {
				return fmt.Errorf("device %q: its files exist, and those of %q do not: nothing is overwritten: choose other paths, or remove them", d.name, runner.StateDevice)
			}
		}
		return nil
	}
	r, err := runner.ReadRecord(state)
	if err != nil {
		return fmt.Errorf("device %q: %w: nothing is overwritten: choose other paths, or remove it", runner.StateDevice, err)
	}
	if r.Status == runner.Receiving || r.Status == runner.Discarded || r.Status == runner.Moved && r.Settled {
		return nil
	}
	return migrate.Refuse("the devices configured at the destination hold a VM already (%s)", r.Status)
}

// incoming are the devices of a migration, in its order.
func (s *still) incoming(m *wire.Manifest) []block.Device {
	devices := make([]block.Device, len(m.Devices))
	for i, d := range m.Devices {
		devices[i] = s.device(d.Name).Device
	}
	return devices
}

// syncFolders makes the names of all files, and of the folders that were made for them, durable.
func (s *still) syncFolders() error {
	folders := make(map[string]bool)
	for _, path := range s.made {
		folders[filepath.Dir(path)] = true
	}
	for _, dir := range s.folders {
		folders[filepath.Dir(dir)] = true
	}
	for dir := range folders {
		f, err := os.Open(dir)
		if err != nil {
			return err
		}
		if err := errors.Join(f.Sync(), f.Close()); err != nil {
			return fmt.Errorf("sync folder %q: %w", dir, err)
		}
	}
	return nil
}

// forget puts on record, durably, that what is here will never run.
func (s *still) forget(migration string) error {
	s.forgotten = true
	return runner.WriteRecord(s.device(runner.StateDevice), runner.Record{Status: runner.Discarded, Migration: migration})
}

// close flushes and closes all devices.
func (s *still) close() error {
	var errs []error
	for _, d := range s.devices {
		if d.Device == nil {
			continue
		}
		if err := d.Close(); err != nil {
			errs = append(errs, fmt.Errorf("close device %q: %w", d.name, err))
		}
		if d.lock != nil {
			d.lock.Close()
			d.lock = nil
		}
	}
	return errors.Join(errs...)
}

// discard closes all devices, and removes what was made for them.
func (s *still) discard() error {
	// What cannot be flushed any more, on a full disk say, is on its way out anyway.
	for _, d := range s.devices {
		if d.Device != nil {
			_ = d.Close()
		}
		if d.lock != nil {
			d.lock.Close()
			d.lock = nil
		}
	}
	var errs []error
	for _, path := range s.made {
		if state := s.device(runner.StateDevice); s.forgotten && state != nil && path == state.path {
			continue
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	runner.RemoveFolders(s.folders) // which leaves those that are not empty
	return errors.Join(errs...)
}

// dropRecord removes what discard has kept.
func (s *still) dropRecord() error {
	if s == nil || !s.forgotten {
		return nil
	}
	s.forgotten = false
	return s.discard()
}

// readState takes the device state that a migration brings.
func readState(state io.Reader) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(state, runner.StateDeviceSize+1))
	if err != nil {
		return nil, err
	}
	if len(b) > runner.StateDeviceSize-block.PageSize {
		return nil, fmt.Errorf("device state of more than %d bytes does not fit a state device", runner.StateDeviceSize-block.PageSize)
	}
	return b, nil
}
