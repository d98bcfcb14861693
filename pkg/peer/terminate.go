package peer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/migrate"
	"github.com/drafter-vm/drafter/pkg/runner"
	"github.com/drafter-vm/drafter/pkg/vmpackage"
	"github.com/drafter-vm/drafter/pkg/wire"
)

// Terminator is the other end of a migration that writes the VM down as a package instead of running it. The VM is then
// owned by the package: whoever resumes it goes on where the source paused. Or, with Copy, the source goes on itself, and the
// package is a backup: a second VM, as the first one was at that moment.
//
// All files are new, and nothing is left of them when Receive fails. Until the commit they are no package: the state device
// says so; that it is saved is written, synced, as the commit.
type Terminator struct {
	// Dir is the folder of the package. It must not exist, and its devices get their usual names.
	Dir string

	// Devices, instead of Dir, say where each device goes. They must be the ones that the source sends, and "state"; "config"
	// may be left out. None of the files may exist. A manifest is written if they are all in one folder.
	Devices []vmpackage.File

	// Copy leaves the VM to the source, which pauses it for as long as a migration would.
	Copy bool

	// Concurrency bounds the workers of the migration. 0 means migrate's default.
	Concurrency int

	// FindSource brings new streams to the peer that the VM comes from, when the link to it is lost before it has learnt
	// that the VM is here. It is called until RescueTimeout (default: one minute) is over. Nil: the source is left in doubt.
	FindSource    func(ctx context.Context) ([]io.ReadWriter, error)
	RescueTimeout time.Duration

	// Authorize decides whose VMs may come. Nil: whoever the transport lets in.
	Authorize Authorize

	// Progress is told how the migration goes, and Digesting how far the digests of the manifest are. Nil is allowed.
	Progress  func(migrate.Progress)
	Digesting func(vmpackage.Progress)

	// Logger receives events; nil means slog.Default().
	Logger *slog.Logger
}

// Check reports what is wrong with the terminator before anything is begun.
func (t Terminator) Check() error {
	if (t.Dir == "") == (len(t.Devices) == 0) {
		return errors.New("give either a folder for the package, or a file for each device")
	}
	if t.Dir != "" {
		return absent(t.Dir)
	}
	var configs []runner.DeviceConfig
	names := make(map[string]bool)
	for _, d := range t.Devices {
		if err := vmpackage.CheckName(d.Name); err != nil {
			return err
		}
		names[d.Name] = true
		configs = append(configs, runner.DeviceConfig{Name: d.Name, Base: d.Path})
	}
	if err := runner.CheckDevices(configs); err != nil {
		return err
	}
	for _, name := range []string{runner.StateDevice, runner.MemoryDevice} {
		if !names[name] {
			return fmt.Errorf("there is no device %q: without it the VM cannot be resumed", name)
		}
	}
	var paths []string
	for _, d := range t.Devices {
		if err := absent(d.Path); err != nil {
			return fmt.Errorf("device %q: %w", d.Name, err)
		}
		paths = append(paths, d.Path)
	}
	if dir := folderOf(paths); dir != "" {
		return absent(filepath.Join(dir, vmpackage.ManifestFile))
	}
	return nil
}

// folderOf is the one folder that all paths are in, or empty.
func folderOf(paths []string) string {
	dir := filepath.Dir(paths[0])
	for _, path := range paths {
		if filepath.Dir(path) != dir {
			return ""
		}
	}
	return dir
}

// absent refuses a path that exists.
func absent(path string) error {
	if _, err := os.Lstat(path); err == nil {
		return fmt.Errorf("%q: %w: nothing is overwritten: choose another path, or remove it", path, fs.ErrExist)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// place is where a device goes.
func (t Terminator) place(name string) (string, bool) {
	if t.Dir != "" {
		return filepath.Join(t.Dir, vmpackage.DefaultFile(name)), true
	}
	for _, d := range t.Devices {
		if d.Name == name {
			return d.Path, true
		}
	}
	return "", false
}

// Receive takes the VM, or with Copy a copy of it, from the peer at the other end of streams and writes it down. When it
// fails, the VM runs on at the source and nothing of it is left here, unless the error wraps migrate.ErrInDoubt. The streams are closed when it
// returns. The manifest is nil if the devices are not all in one folder; the report is there in any case.
//
// The package is complete when the source is told so. The digests of its manifest are worked out afterwards; cancelling ctx
// then leaves them out, and is no error.
func (t Terminator) Receive(ctx context.Context, streams []io.ReadWriter) (*vmpackage.Manifest, *migrate.Report, error) {
	if t.Logger == nil {
		t.Logger = slog.Default()
	}
	if t.RescueTimeout == 0 {
		t.RescueTimeout = time.Minute
	}
	if err := t.Check(); err != nil {
		closeAll(streams)
		return nil, &migrate.Report{Role: wire.RoleDestination.String(), Error: err.Error()}, fmt.Errorf("write down VM: %w", err)
	}
	w := &writer{Terminator: t, streams: streams}
	report, err := migrate.Receive(ctx, streams, migrate.DestinationConfig{
		Target: w, Journal: w, Concurrency: t.Concurrency, MaxState: runner.StateDeviceSize - block.PageSize, Progress: t.Progress, Logger: t.Logger,
		Copy: t.Copy, Reconnect: t.FindSource, Admit: t.Authorize.again(false, func() string { return w.id }), RescueTimeout: t.RescueTimeout,
	})
	if err != nil {
		if w.still != nil {
			err = errors.Join(err, w.still.close()) // in doubt: kept
		}
		return nil, report, err
	}
	if report.Untold == nil { // nobody will ask again, and packages are passed on
		if err := w.forget(); err != nil {
			t.Logger.Warn("the package still names the migration that it came by", "error", err)
		}
	}
	if err := w.still.close(); err != nil {
		return nil, report, fmt.Errorf("write down VM: it is here, but: %w", err)
	}
	manifest := w.manifest
	if manifest != nil {
		digested, err := vmpackage.WriteManifest(ctx, w.folder(), w.files(), vmpackage.ManifestOptions{Progress: t.Digesting})
		switch {
		case err == nil:
			manifest = digested
		case ctx.Err() == nil:
			t.Logger.Warn("the package is complete, but its manifest has no digests", "error", err)
		}
	}
	return manifest, report, nil
}

// forget takes the migration, with its secret, out of the record of a VM whose source knows that it is here.
func (w *writer) forget() error {
	state := w.still.device(runner.StateDevice)
	r, err := runner.ReadRecord(state)
	if err != nil {
		return err
	}
	r.Migration = ""
	return runner.WriteRecord(state, r)
}

// Settle tells the source of a VM what has become of it, after a terminator, or a mounter with the same files, has died before
// it could: that it was written down here (here is true), or that it was not and never will be. The source then ends, or
// goes on; until it knows, it keeps the VM, paused and in doubt. It is looked for by FindSource within RescueTimeout. Of the rest
// only Dir or Devices are needed.
func (t Terminator) Settle(ctx context.Context) (here bool, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("settle a VM that was to be written down: %w", err)
		}
	}()
	if t.RescueTimeout == 0 {
		t.RescueTimeout = time.Minute
	}
	var migration string
	cfg := migrate.DestinationConfig{Reconnect: t.FindSource, Admit: t.Authorize.again(false, func() string { return migration }), RescueTimeout: t.RescueTimeout, Progress: t.Progress, Logger: t.Logger}
	path, ok := t.place(runner.StateDevice)
	if !ok {
		return false, fmt.Errorf("there is no device %q", runner.StateDevice)
	}
	// Opened to be written: nobody else has it then, and a terminator that lives does.
	s, err := openStill([]Device{{DeviceConfig: runner.DeviceConfig{Name: runner.StateDevice, Base: path}}}, nil)
	if err != nil {
		return false, err
	}
	defer s.close()
	state := s.device(runner.StateDevice)
	record, err := runner.ReadRecord(state)
	if err != nil {
		return false, err
	}
	migration = record.Migration
	switch {
	case migration == "":
		return false, errors.New("the VM did not come from a peer, its source knows that it is here, or it was resumed since: nobody needs to be told")
	case record.Status == runner.Receiving || record.Status == runner.Discarded:
		cfg.Journal = &writer{still: s}
		return false, migrate.Disclaim(ctx, cfg, migration)
	case record.Status != runner.Saved:
		return false, fmt.Errorf("the VM is not saved but %s: nobody needs to be told", record.Status)
	}
	claim := migrate.Claim{ID: migration, Complete: func(context.Context) error { return nil }}
	claim.Devices = func(context.Context, func(int, block.Range)) ([]migrate.ClaimDevice, error) {
		files := t.Devices
		if t.Dir != "" {
			pkg, err := vmpackage.Open(t.Dir)
			if err != nil {
				return nil, err
			}
			for _, d := range pkg.Devices {
				files = append(files, vmpackage.File{Name: d.Name, Path: d.Path})
			}
		}
		var devices []migrate.ClaimDevice
		for _, f := range files {
			if f.Name != runner.MemoryDevice && !runner.IsDisk(f.Name) {
				continue // it need not have travelled
			}
			info, err := os.Stat(f.Path)
			if err != nil {
				return nil, err
			}
			devices = append(devices, migrate.ClaimDevice{Name: f.Name, Size: info.Size()})
		}
		return devices, nil
	}
	report, err := migrate.RejoinDestination(ctx, claim, cfg)
	if err == nil {
		err = report.Untold
	}
	return true, err
}

// closeAll closes streams that nobody will use.
func closeAll(streams []io.ReadWriter) {
	for _, s := range streams {
		if c, ok := s.(io.Closer); ok {
			c.Close()
		}
	}
}

var _ migrate.Keeper = (*writer)(nil)

// writer is one call of Terminator.Receive.
type writer struct {
	Terminator
	streams  []io.ReadWriter
	id       string // of the migration
	still    *still
	gone     *still // what was still, after Discard
	state    []byte
	manifest *vmpackage.Manifest
}

// files are the files of the package.
func (w *writer) files() []vmpackage.File {
	var files []vmpackage.File
	for _, d := range w.still.devices {
		files = append(files, vmpackage.File{Name: d.name, Path: d.path})
	}
	return files
}

// folder is the one that all files are in, or empty.
func (w *writer) folder() string {
	var paths []string
	for _, d := range w.still.devices {
		paths = append(paths, d.path)
	}
	return folderOf(paths)
}

// Prepare implements [migrate.Target].
func (w *writer) Prepare(ctx context.Context, m *wire.Manifest) ([]block.Device, error) {
	if err := w.Authorize.take(ctx, w.streams, m); err != nil {
		return nil, err
	}
	for _, d := range w.Devices {
		coming := d.Name == runner.StateDevice || d.Name == runner.ConfigDevice
		for _, in := range m.Devices {
			coming = coming || in.Name == d.Name
		}
		if !coming {
			return nil, migrate.Refuse("device %q is configured at the destination, and is not sent", d.Name)
		}
	}
	place := w.place
	if w.Dir == "" {
		if _, ok := place(runner.ConfigDevice); !ok {
			// Nothing can be resumed without it, and it has an obvious place.
			state, _ := w.place(runner.StateDevice)
			place = func(name string) (string, bool) {
				if name == runner.ConfigDevice {
					return filepath.Join(filepath.Dir(state), vmpackage.DefaultFile(name)), true
				}
				return w.place(name)
			}
		}
	}
	s, err := createStill(ctx, m, place)
	if err != nil {
		return nil, err
	}
	// Until the commit it says whose it would have been: see Settle.
	if err := runner.WriteRecord(s.device(runner.StateDevice), runner.Record{Status: runner.Receiving, Migration: m.ID}); err != nil {
		return nil, errors.Join(err, s.discard())
	}
	w.still, w.id = s, m.ID
	return s.incoming(m), nil
}

// Load implements [migrate.Target]. It does all that can be done before the commit.
func (w *writer) Load(ctx context.Context, state io.Reader) (err error) {
	if w.state, err = readState(state); err != nil {
		return err
	}
	for _, d := range w.still.devices {
		if err := d.Flush(); err != nil { // those that did not come, too
			return err
		}
	}
	if dir := w.folder(); dir != "" {
		if w.manifest, err = vmpackage.WriteManifest(ctx, dir, w.files(), vmpackage.ManifestOptions{SkipDigests: true}); err != nil {
			return err
		}
		w.still.made = append(w.still.made, filepath.Join(dir, vmpackage.ManifestFile))
	}
	return w.still.syncFolders()
}

// Run implements [migrate.Target]: there is nothing to run.
func (w *writer) Run(context.Context) error { return nil }

// Keep implements [migrate.Keeper]: it is the commit of a copy.
func (w *writer) Keep(ctx context.Context) error { return w.Commit(ctx, w.id) }

// Discard implements [migrate.Target].
func (w *writer) Discard(context.Context) error {
	w.gone, w.still = w.still, nil
	return w.gone.discard()
}

// Forget implements migrate.Forgetter.
func (w *writer) Forget(context.Context) error { return w.gone.dropRecord() }

// Commit implements [migrate.Journal]: from here on the files are a package.
func (w *writer) Commit(_ context.Context, id string) error {
	return runner.WriteReceived(w.still.device(runner.StateDevice), id, w.state)
}

// Abort implements [migrate.Journal].
func (w *writer) Abort(_ context.Context, id string) error { return w.still.forget(id) }

// Done implements [migrate.Journal].
func (w *writer) Done(context.Context, string) error { return nil }
