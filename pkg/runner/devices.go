package runner

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/drafter-vm/drafter/pkg/block"
)

// device is an opened device of an instance.
type device struct {
	DeviceConfig
	block.Device // base, or overlay over base; closes both

	overlay *block.Overlay // nil where there is none
	tracked *block.Tracked // non-nil for disks: the device again, recording writes while a migration runs
	writes  *block.Tracked // non-nil for disks: the same for somebody else
	served  *relay         // non-nil for disks: the device again, as the machine has it open, or the layer has it as its base
	layer   *layer         // what the guest writes, while a commit point is kept under it
	lazy    *block.Lazy    // the device again, while something of it is missing
	liveFiles
	lock    *os.File    // holds the lock on the base until the device is closed
	base    os.FileInfo // of that
	created []string    // files that opening the device made, to remove if nothing comes of it
	folders []string    // folders that it made for them, outermost first
	closed  bool
}

// liveFiles hold what a disk must remember from one process to the next: which blocks its overlay holds, and what of it
// has arrived; and, where a commit point is kept, which its layer holds. See block.OverlayOptions and block.LazyOptions.
type liveFiles struct{ blocks, arrived, since *os.File }

// common reports whether the device is a file that several instances may have, to read it.
func (d *device) common() bool { return d.served == nil && d.Overlay == "" }

// openMode says what a device is opened for.
type openMode int

const (
	openExisting openMode = iota // what is there is the device
	openReceive                  // what is there will be overwritten by a migration
)

// CheckDevices reports the first thing that is wrong with a list of devices before anything is opened.
func CheckDevices(devices []DeviceConfig) error {
	names := make(map[string]bool)
	files := make(map[string]string)
	for _, d := range devices {
		if d.Name == "" {
			return errors.New("a device has no name")
		}
		if names[d.Name] {
			return fmt.Errorf("device %q is configured twice", d.Name)
		}
		names[d.Name] = true
		if d.Base == "" {
			return fmt.Errorf("device %q has no base: give the file it starts from", d.Name)
		}
		if (d.Overlay == "") != (d.State == "") {
			return fmt.Errorf("device %q has overlay %q and state %q: give both or neither", d.Name, d.Overlay, d.State)
		}
		if d.BlockSize != 0 && (d.BlockSize < block.PageSize || d.BlockSize > block.MaxOverlayBlockSize || d.BlockSize&(d.BlockSize-1) != 0) {
			return fmt.Errorf("device %q has block size %d: use a power of two from %d to %d bytes", d.Name, d.BlockSize, block.PageSize, block.MaxOverlayBlockSize)
		}
		paths := []string{d.Base, d.Overlay, d.State}
		for _, l := range d.Beneath {
			if l.Overlay == "" || l.State == "" {
				return fmt.Errorf("device %q is over overlay %q with state %q: give both", d.Name, l.Overlay, l.State)
			}
			paths = append(paths, l.Overlay, l.State)
		}
		if d.Shared && (!IsDisk(d.Name) || d.Overlay != "") {
			return fmt.Errorf("device %q is shared: that can be a disk without an overlay, which all may only read", d.Name)
		}
		if len(d.Beneath) > 0 && d.Overlay == "" {
			return fmt.Errorf("device %q is over overlay %q, which is only read, and has no overlay of its own: give it one", d.Name, d.Beneath[0].Overlay)
		}
		for _, path := range paths {
			if path == "" {
				continue
			}
			clean := filepath.Clean(path)
			if other, ok := files[clean]; ok {
				return fmt.Errorf("devices %q and %q both use the file %q", other, d.Name, path)
			}
			files[clean] = d.Name
		}
	}
	return nil
}

// writable reports whether the instance changes the device, and so may not share its file with another.
func (d DeviceConfig) writable() bool {
	return IsDisk(d.Name) && !d.Shared || d.Name == MemoryDevice || d.Name == StateDevice
}

// recordFile is the file that what is written to the device goes to; for a state device, the one its record is in.
func (d DeviceConfig) recordFile() string {
	if d.Overlay != "" {
		return d.Overlay
	}
	return d.Base
}

// openDevice opens one device. A size above zero is what a device must have, and the size it is made with when it is to be
// received. It takes live over.
func openDevice(c DeviceConfig, mode openMode, size int64, live liveFiles) (_ *device, err error) {
	d := &device{DeviceConfig: c, liveFiles: live}
	defer func() {
		if err != nil {
			d.discard()
			err = fmt.Errorf("open device %q: %w", c.Name, err)
		}
	}()

	inPlace := c.Overlay == ""
	if _, err := os.Stat(c.Base); errors.Is(err, os.ErrNotExist) {
		if mode != openReceive || !inPlace || c.Shared {
			return nil, fmt.Errorf("its base %q does not exist: make the package first, or correct the path", c.Base)
		}
		if err := d.create(c.Base, size); err != nil {
			return nil, err
		}
	} else if err != nil {
		return nil, err
	}
	lacks := c.CheckArrived()
	if lacks != nil && c.Shared {
		return nil, lacks
	}
	writes := inPlace && (c.writable() || len(d.created) > 0 || lacks != nil && IsBootFile(c.Name)) // what is still to come
	if d.lock, err = LockFile(c.Base, writes); err != nil {
		return nil, err
	}

	base, err := c.openBase(writes)
	if err != nil {
		return nil, err
	}
	d.Device = base
	if d.base, err = d.lock.Stat(); err != nil {
		return nil, err
	}
	if inPlace && !writes && mode == openReceive {
		d.Device = &sameDevice{Device: base, name: c.Name, path: c.Base}
	}
	if size > 0 && base.Size() != size {
		return nil, fmt.Errorf("its base %q has %d bytes, the instance's device has %d: they belong to different packages", c.Base, base.Size(), size)
	}
	if !inPlace {
		for _, path := range []string{c.Overlay, c.State} {
			made, err := MakeFolders(filepath.Dir(path), 0o700)
			d.folders = append(d.folders, made...)
			if err != nil {
				return nil, err
			}
			if _, err := os.Lstat(path); errors.Is(err, os.ErrNotExist) {
				d.created = append(d.created, path)
			}
		}
		overlay, err := block.OpenOverlay(block.OverlayOptions{
			Base: base, BasePath: c.Base, Overlay: c.Overlay, State: c.State, BlockSize: c.BlockSize,
			// What a migration brings is mostly what the base holds already, and a saved memory image mostly what it was.
			ElideUnchanged: mode == openReceive || c.Name == MemoryDevice,
			Live:           live.blocks,
		})
		if err != nil {
			return nil, err
		}
		d.overlay, d.Device = overlay, overlay
	}
	if IsDisk(c.Name) {
		d.writes = block.NewTracked(d.Device)
		d.tracked = block.NewTracked(d.writes)
		d.Device = d.tracked
		d.served = newRelay(d.Device)
	}
	return d, nil
}

// OpenBase opens what the device's overlay is over, to be read alone: the base, and the overlays beneath. What is missing of an overlay
// beneath, or is kept apart from it, is an error: who has them knows nothing of either.
func (c DeviceConfig) OpenBase() (block.Device, error) { return c.openBase(false) }

func (c DeviceConfig) openBase(writes bool) (_ block.Device, err error) {
	if c.Overlay != "" { // so that a list beside the base is of an instance that has it in place
		if err := (DeviceConfig{Name: c.Name, Base: c.Base}).CheckArrived(); err != nil {
			return nil, err
		}
	}
	base, err := block.OpenFile(c.Base, block.FileOptions{ReadOnly: !writes})
	if err != nil {
		return nil, err
	}
	device := block.Device(base)
	path := c.Base
	for _, l := range c.Beneath {
		below := DeviceConfig{Name: c.Name, Base: c.Base, Overlay: l.Overlay, State: l.State}
		if err = below.CheckWhole(); err == nil {
			var o *block.Overlay
			if o, err = block.OpenOverlay(block.OverlayOptions{Base: device, BasePath: path, Overlay: l.Overlay, State: l.State, ReadOnly: true}); err == nil {
				device, path = o, ""
			}
		}
		if err != nil {
			return nil, errors.Join(err, device.Close())
		}
	}
	return device, nil
}

// CheckWhole fails if the device is more, or less, than its base and overlays: some of it has not arrived, or is in its layer.
func (c DeviceConfig) CheckWhole() error {
	_, since := c.layerFiles()
	return errors.Join(c.CheckArrived(), c.checkNone(since, "writes since its commit point are kept apart"))
}

// CheckArrived fails if some of the device has not arrived: it is in no file of this host.
func (c DeviceConfig) CheckArrived() error {
	return c.checkNone(c.listFile(), "some of it has not arrived")
}

// checkNone fails if there is a file, which says what is the matter with the device.
func (c DeviceConfig) checkNone(path, what string) error {
	if _, err := os.Lstat(path); err == nil {
		return fmt.Errorf("%q: %s (%q): start its instance, and close it", c.recordFile(), what, path)
	} else if !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// Remove removes the file of a device without overlays, and what says that some of it has not arrived. There need be none.
func (c DeviceConfig) Remove() error {
	for _, path := range []string{c.Base, c.listFile()} {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}

// create makes the file of a device that will be received.
func (d *device) create(path string, size int64) error {
	made, err := MakeFolders(filepath.Dir(path), 0o700)
	d.folders = append(d.folders, made...)
	if err != nil {
		return err
	}
	f, err := block.CreateFile(path, size)
	if err != nil {
		return err
	}
	d.created = append(d.created, path)
	return f.Close()
}

// close flushes and closes the device. It may be called more than once.
func (d *device) close() error {
	if d.closed {
		return nil
	}
	d.closed = true
	var errs []error
	if d.Device != nil {
		errs = append(errs, d.Device.Close()) // before the layer, of which a reader may be waiting for what does not come
	}
	errs = append(errs, d.closeLayer())
	closeFiles(d.lock, d.blocks, d.arrived, d.since)
	return errors.Join(errs...)
}

// discard closes the device and removes the files and folders that opening it made.
func (d *device) discard() error {
	errs := []error{d.close()}
	if d.lazy != nil && len(d.created) > 0 {
		d.created = append(d.created, d.listFile())
	}
	if d.layer != nil {
		d.created = append(d.created, d.layer.created...)
	}
	for _, path := range d.created {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	RemoveFolders(d.folders)
	return errors.Join(errs...)
}

// MakeFolders is os.MkdirAll that returns the folders it made, outermost first, also when it fails.
func MakeFolders(dir string, mode os.FileMode) (made []string, err error) {
	var missing []string
	for p := filepath.Clean(dir); ; p = filepath.Dir(p) {
		if _, err := os.Stat(p); err == nil || p == filepath.Dir(p) {
			break
		}
		missing = append(missing, p)
	}
	for _, p := range slices.Backward(missing) {
		err := os.Mkdir(p, mode)
		if err == nil {
			made = append(made, p)
		} else if !errors.Is(err, os.ErrExist) {
			return made, err
		}
	}
	return made, os.MkdirAll(dir, mode) // an error where a file is in the way
}

// RemoveFolders removes what MakeFolders made, except what others use.
func RemoveFolders(made []string) {
	for _, dir := range slices.Backward(made) {
		os.Remove(dir) // fails, rightly, when it is not empty
	}
}

// sameDevice stands for a file that a migration brings and that is here already, in use by others perhaps: it is compared
// with what comes, never written.
type sameDevice struct {
	block.Device
	name, path string
}

func (d *sameDevice) WriteAt(p []byte, off int64) (int, error) {
	have := make([]byte, len(p))
	if _, err := d.ReadAt(have, off); err != nil && err != io.EOF {
		return 0, err
	}
	if !bytes.Equal(have, p) {
		return 0, fmt.Errorf("device %q that the source sends differs from %q, which is here: give this instance an overlay for it, or remove that file, if a peer that was killed has left a part of it", d.name, d.path)
	}
	return len(p), nil
}

func (d *sameDevice) Discard(off, n int64) error {
	zeros := make([]byte, min(n, 1<<20))
	for n > 0 {
		zeros = zeros[:min(n, int64(len(zeros)))]
		if _, err := d.WriteAt(zeros, off); err != nil {
			return err
		}
		off, n = off+int64(len(zeros)), n-int64(len(zeros))
	}
	return nil
}

func (d *sameDevice) Flush() error { return nil }

// LockFile locks a device's file for as long as the returned descriptor is open: shared by all who only read it, exclusively
// by the one who writes it.
func LockFile(path string, exclusive bool) (*os.File, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	how := unix.LOCK_SH
	if exclusive {
		how = unix.LOCK_EX
	}
	if err := unix.Flock(int(f.Fd()), how|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("%q is in use by another instance: close it, or give this instance overlays of its own", path)
		}
		return nil, fmt.Errorf("lock %q: %w", path, err)
	}
	return f, nil
}

// ErrAlive is wrapped by the error of a start that finds a living process to have the instance, and cannot adopt it.
var ErrAlive = errors.New("the instance is alive")

// lockOwner takes the lock that says that an instance is alive: an open file description lock (fcntl(2), F_OFD_SETLK) on the
// file its record is in. The machine inherits the descriptor, so the lock lasts until both it and we are gone. It is of
// another kind than the locks on bases and overlays, which end with this process, and does not meet them.
func lockOwner(c DeviceConfig) (*os.File, error) {
	path := c.recordFile()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	lock := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &lock); err != nil {
		f.Close()
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
			return nil, fmt.Errorf("%w: its peer, or the hypervisor that a killed peer left behind, has %q; end that process first (fuser %s)", ErrAlive, path, path)
		}
		return nil, fmt.Errorf("lock %q: %w", path, err)
	}
	return f, nil
}
