package peer

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/expose"
	"github.com/drafter-vm/drafter/pkg/migrate"
	"github.com/drafter-vm/drafter/pkg/runner"
	"github.com/drafter-vm/drafter/pkg/vmpackage"
	"github.com/drafter-vm/drafter/pkg/wire"
)

// MounterConfig says where the devices of a mounter are, and where they are shown.
type MounterConfig struct {
	// Mount is the folder in which each device is a file, named as the device. It is made if it does not exist.
	Mount string

	// Dir is the folder of the package that is mounted, whose files are changed in place; to receive into, a folder that
	// does not exist.
	Dir string

	// Devices, instead of Dir, are where each device is, as for a peer. Stationary ones do not travel, and are read-only.
	Devices []Device

	// Concurrency bounds the workers of a migration. 0 means migrate's default.
	Concurrency int

	// RescueTimeout bounds rolling back, and how long the other side of a migration is looked for when the link to it is
	// gone. Default: one minute.
	RescueTimeout time.Duration

	// FindSource and FindDestination are those of Config.
	FindSource, FindDestination func(ctx context.Context) ([]io.ReadWriter, error)

	// Authorize decides who may have the VM from here, and whose may come. Nil: whoever the transport lets in.
	Authorize Authorize

	// Progress is told how a migration goes, OnState each change of state of a Send. Nil is allowed.
	Progress func(migrate.Progress)
	OnState  func(migrate.SourceState)

	// Logger receives events; nil means slog.Default().
	Logger *slog.Logger
}

func (c MounterConfig) withDefaults() (MounterConfig, error) {
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	if c.RescueTimeout == 0 {
		c.RescueTimeout = time.Minute
	}
	if c.Mount == "" {
		return c, errors.New("give the folder to mount the devices at")
	}
	if (c.Dir == "") == (len(c.Devices) == 0) {
		return c, errors.New("give either the folder of a package, or its devices")
	}
	return c, runner.CheckDevices(DeviceConfigs(c.Devices))
}

// Mounter owns a VM that nothing runs, and shows its devices as files. What is written to the files is in the VM when it is
// resumed, by a peer that it is sent to or from the files of the mounter itself.
//
// A guest goes on with what it remembers: of a file system that it has mounted, only change what it does not have in its
// own cache, or what is known not to be looked at before it is read from the disk.
//
// Its methods may be called by any goroutine. One Send runs at a time; Close during a Send cancels it first.
type Mounter struct {
	cfg   MounterConfig
	still *still
	mount *expose.Mount
	gate  *gate
	state []byte // of the machine

	exported []migrate.SourceDevice // those that travel

	mu     sync.Mutex // guards what follows
	cancel context.CancelFunc
	idle   chan struct{} // closed when no Send runs; nil: none ever ran
	sent   bool          // the VM is another's, or may be
	closed bool
}

// OpenMounter mounts the devices of a saved VM.
func OpenMounter(ctx context.Context, cfg MounterConfig) (_ *Mounter, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("mount VM: %w", err)
		}
	}()
	if cfg, err = cfg.withDefaults(); err != nil {
		return nil, err
	}
	devices, err := cfg.devices()
	if err != nil {
		return nil, err
	}
	s, err := openStill(devices, nil)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.discard())
		}
	}()
	for _, name := range []string{runner.StateDevice, runner.MemoryDevice, runner.ConfigDevice} {
		if s.device(name) == nil {
			return nil, fmt.Errorf("there is no device %q", name)
		}
	}
	if s.desc, err = runner.ReadDescription(s.device(runner.ConfigDevice)); err != nil {
		return nil, err
	}
	m := &Mounter{cfg: cfg, still: s, gate: new(gate)}
	if m.state, err = runner.ReadSaved(s.device(runner.StateDevice), false); err != nil {
		return nil, err
	}
	m.gate.close()
	if err := m.expose(devices); err != nil {
		return nil, err
	}
	if cfg.Dir != "" {
		// The digests of the manifest are not true any more when the first byte is written.
		if err := m.writeManifest(ctx); err != nil {
			return nil, errors.Join(err, m.mount.Close())
		}
	}
	m.gate.open(false)
	return m, nil
}

// ReceiveMounter takes the VM over from the peer at the other end of streams, and mounts its devices. When it fails, the VM
// runs on at the source and nothing of it is left here, unless the error wraps migrate.ErrInDoubt. The streams are closed
// when it returns. The report is there in any case.
//
// The devices are mounted before the commit, and can be written after it.
func ReceiveMounter(ctx context.Context, cfg MounterConfig, streams []io.ReadWriter) (*Mounter, *migrate.Report, error) {
	refuse := func(err error) (*Mounter, *migrate.Report, error) {
		closeAll(streams)
		return nil, &migrate.Report{Role: wire.RoleDestination.String(), Error: err.Error()}, fmt.Errorf("receive VM to mount: %w", err)
	}
	cfg, err := cfg.withDefaults()
	if err != nil {
		return refuse(err)
	}
	if cfg.Dir != "" {
		if err := absent(cfg.Dir); err != nil {
			return refuse(err)
		}
	}
	r := &mountReceiver{Mounter: &Mounter{cfg: cfg, gate: new(gate)}, streams: streams}
	report, err := migrate.Receive(ctx, streams, migrate.DestinationConfig{
		Target: r, Journal: r, Concurrency: cfg.Concurrency, MaxState: runner.StateDeviceSize - block.PageSize, Progress: cfg.Progress, Logger: cfg.Logger,
		Reconnect: cfg.FindSource, Admit: cfg.Authorize.again(false, func() string { return r.id }), RescueTimeout: cfg.RescueTimeout,
	})
	if err != nil {
		if r.still != nil {
			err = errors.Join(err, r.mount.Close(), r.still.close()) // in doubt: kept
		}
		return nil, report, err
	}
	return r.Mounter, report, nil
}

// expose mounts the devices. What a guest that was started cannot change is read-only: its device state and the description of
// its machine; and so are devices that do not travel.
func (m *Mounter) expose(devices []Device) error {
	var exports []expose.Export
	for _, d := range m.still.devices {
		travels := migrate.SourceDevice{Name: d.name, Policy: migrate.Policy{ByGoal: true}}
		stays := d.name == runner.StateDevice
		for _, c := range devices {
			if c.Name == d.name {
				travels.Policy, stays = c.Policy, stays || c.Stationary
			}
		}
		export := expose.Export{Name: d.name, Device: d.Device, ReadOnly: stays || d.name == runner.ConfigDevice}
		if !export.ReadOnly {
			tracked := block.NewTracked(d.Device)
			d.Device, travels.Tracker = tracked, tracked
			export.Device = gated{tracked, m.gate}
		}
		if travels.Device = d.Device; !stays {
			m.exported = append(m.exported, travels)
		}
		exports = append(exports, export)
	}
	var err error
	m.mount, err = expose.MountFUSE(m.cfg.Mount, exports, expose.FUSEOptions{Logger: m.cfg.Logger})
	return err
}

// writeManifest describes the files in the folder of the package, without digests.
func (m *Mounter) writeManifest(ctx context.Context) error {
	var files []vmpackage.File
	for _, d := range m.still.devices {
		files = append(files, vmpackage.File{Name: d.name, Path: d.path})
	}
	_, err := vmpackage.WriteManifest(ctx, m.cfg.Dir, files, vmpackage.ManifestOptions{SkipDigests: true})
	return err
}

// Dir is the folder with the files.
func (m *Mounter) Dir() string { return m.mount.Dir() }

// Path is the file of a device.
func (m *Mounter) Path(device string) string { return m.mount.Path(device) }

// Names are the names of the devices, which are those of the files.
func (m *Mounter) Names() []string {
	var names []string
	for _, d := range m.still.devices {
		names = append(names, d.name)
	}
	return names
}

// Done is closed when the folder is not mounted any more: after Close, or when somebody else has unmounted it.
func (m *Mounter) Done() <-chan struct{} { return m.mount.Done() }

// Sent reports whether the VM was handed over, or may have been: then only Close is left to call.
func (m *Mounter) Sent() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.sent
}

// Send hands the VM over to the peer, terminator or mounter at the other end of streams. Files can be written meanwhile; for
// the moment of the switch writes wait. After success, and after an error that wraps migrate.ErrInDoubt, they fail, as the
// VM is another's; after any other error, ErrStranger among them, they go on. The streams are closed when it returns. The
// report is there in any case.
func (m *Mounter) Send(ctx context.Context, streams []io.ReadWriter) (*migrate.Report, error) {
	if err := m.cfg.Authorize.give(ctx, streams); err != nil {
		return &migrate.Report{}, err
	}
	ctx, done, err := m.begin(ctx)
	if err != nil {
		closeAll(streams)
		return &migrate.Report{}, err
	}
	defer done()
	spec, err := json.Marshal(m.still.desc)
	if err != nil {
		return &migrate.Report{}, fmt.Errorf("describe machine: %w", err)
	}
	defer func() {
		if m.Sent() {
			m.gate.open(true) // in doubt, too: who waits is told that nothing is written any more
		}
	}()
	id := wire.NewID()
	return send(ctx, streams, migrate.SourceConfig{
		ID: id, Devices: slices.Clone(m.exported), Spec: spec, Guest: mountSource{m}, Journal: mountSource{m}, Concurrency: m.cfg.Concurrency,
		ResumeTimeout: m.cfg.RescueTimeout, Reconnect: m.cfg.FindDestination, Admit: m.cfg.Authorize.again(true, func() string { return id }), RescueTimeout: m.cfg.RescueTimeout, Progress: m.cfg.Progress, OnState: m.cfg.OnState, Logger: m.cfg.Logger,
	})
}

// begin registers a Send.
func (m *Mounter) begin(ctx context.Context) (context.Context, func(), error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.closed:
		return nil, nil, errors.New("the mounter is closed")
	case m.sent:
		return nil, nil, errors.New("the VM was handed over already")
	case m.cancel != nil:
		return nil, nil, fmt.Errorf("%w: a migration is under way", ErrBusy)
	}
	ctx, cancel := context.WithCancel(ctx)
	m.cancel, m.idle = cancel, make(chan struct{})
	return ctx, func() {
		cancel()
		m.mu.Lock()
		defer m.mu.Unlock()
		m.cancel = nil
		close(m.idle)
	}, nil
}

// Close unmounts the folder, flushes the devices and lets go of them. A VM that was not handed over stays saved in its files.
// Programs that have one of the files open get errors from then on.
func (m *Mounter) Close() error {
	m.mu.Lock()
	if m.cancel != nil {
		m.cancel()
	}
	idle := m.idle
	closed := m.closed
	m.closed = true
	m.mu.Unlock()
	if idle != nil {
		<-idle
	}
	if closed {
		<-m.mount.Done()
		return nil
	}
	m.gate.open(m.Sent()) // nobody may be left waiting
	return errors.Join(m.mount.Close(), m.still.close())
}

// mountSource is a mounter as migrate.Send sees it: a guest that stands still whenever it is asked to.
type mountSource struct{ *Mounter }

func (s mountSource) BeforeSuspend(context.Context) error { return nil }

func (s mountSource) Pause(context.Context) error {
	s.gate.close()
	return nil
}

func (s mountSource) State(_ context.Context, w io.Writer) error {
	_, err := w.Write(s.state)
	return err
}

func (s mountSource) Resume(context.Context) error {
	s.gate.open(false)
	return nil
}

// record writes what becomes of the VM into its state device, which keeps the device state.
func (s mountSource) record(id string, status runner.Status, settled bool) error {
	dev := s.still.device(runner.StateDevice)
	r, err := runner.ReadRecord(dev)
	if err != nil {
		return err
	}
	r.Status, r.Migration, r.Settled = status, id, settled
	if settled {
		r.Length, r.Sum = 0, 0 // there is nothing to take back
	}
	return runner.WriteRecord(dev, r)
}

func (s mountSource) Commit(_ context.Context, id string) error {
	// Should this process die, what the other side lacks is in the files: see [OpenGiven].
	for _, d := range s.still.devices {
		if err := d.Flush(); err != nil {
			return fmt.Errorf("flush device %q: %w", d.name, err)
		}
	}
	s.mu.Lock()
	s.sent = true
	s.mu.Unlock()
	return s.record(id, runner.Moved, false)
}

func (s mountSource) Abort(_ context.Context, id string) error {
	if err := s.record(id, runner.Saved, false); err != nil {
		return err
	}
	s.mu.Lock()
	s.sent = false
	s.mu.Unlock()
	return nil
}

func (s mountSource) Done(_ context.Context, id string) error {
	return s.record(id, runner.Moved, true)
}

// mountReceiver is a mounter in the course of ReceiveMounter, as migrate.Receive sees it.
type mountReceiver struct {
	*Mounter
	streams []io.ReadWriter
	id      string // of the migration, once there is a manifest
	gone    *still // what was still, after Discard
}

func (r *mountReceiver) Prepare(ctx context.Context, m *wire.Manifest) (_ []block.Device, err error) {
	if err := r.cfg.Authorize.take(ctx, r.streams, m); err != nil {
		return nil, err
	}
	r.id = m.ID
	if r.cfg.Dir != "" {
		r.still, err = createStill(ctx, m, func(name string) (string, bool) {
			return filepath.Join(r.cfg.Dir, vmpackage.DefaultFile(name)), true
		})
		if err == nil {
			if err = runner.WriteRecord(r.still.device(runner.StateDevice), runner.Record{Status: runner.Receiving, Migration: m.ID}); err != nil {
				err = errors.Join(err, r.still.discard())
				r.still = nil
			}
		}
		if err != nil {
			return nil, err
		}
		return r.still.incoming(m), nil
	}
	desc, err := describe(m)
	if err != nil {
		return nil, err
	}
	sizes := map[string]int64{runner.StateDevice: runner.StateDeviceSize}
	configured := make(map[string]bool)
	for _, d := range r.cfg.Devices {
		configured[d.Name] = true
	}
	for _, d := range m.Devices {
		if !configured[d.Name] {
			return nil, migrate.Refuse("device %q is sent, and none of that name is configured at the destination", d.Name)
		}
		sizes[d.Name] = d.Size
	}
	for _, d := range r.cfg.Devices {
		if _, coming := sizes[d.Name]; !coming && !d.Stationary {
			return nil, migrate.Refuse("device %q is configured at the destination, and is not sent", d.Name)
		}
	}
	for _, name := range []string{runner.StateDevice, runner.ConfigDevice} {
		if !configured[name] {
			return nil, migrate.Refuse("no device %q is configured at the destination", name)
		}
	}
	s, err := openStill(r.cfg.Devices, sizes)
	if err != nil {
		return nil, err
	}
	s.desc = desc
	if err = s.vacant(sizes); err == nil {
		err = runner.WriteRecord(s.device(runner.StateDevice), runner.Record{Status: runner.Receiving, Migration: m.ID})
	}
	if err != nil {
		return nil, errors.Join(err, s.discard())
	}
	r.still = s
	return s.incoming(m), nil
}

func (r *mountReceiver) Load(ctx context.Context, state io.Reader) (err error) {
	if r.state, err = readState(state); err != nil {
		return err
	}
	if r.cfg.Dir != "" {
		if err := r.writeManifest(ctx); err != nil {
			return err
		}
		r.still.made = append(r.still.made, filepath.Join(r.cfg.Dir, vmpackage.ManifestFile))
	}
	for _, d := range r.still.devices {
		if err := d.Flush(); err != nil {
			return err
		}
	}
	if err := r.still.syncFolders(); err != nil {
		return err
	}
	// Mounted before the VM is ours, so that what is in the way is the source's to know, and nobody writes before Run.
	r.gate.close()
	return r.expose(r.cfg.Devices)
}

func (r *mountReceiver) Run(context.Context) error {
	r.gate.open(false)
	return nil
}

func (r *mountReceiver) Discard(context.Context) error {
	s := r.still
	r.gone, r.still = s, nil
	r.gate.open(true)
	var err error
	if r.mount != nil {
		err = r.mount.Close()
	}
	if state := s.device(runner.StateDevice); !state.made && !s.forgotten {
		err = errors.Join(err, runner.WriteRecord(state, runner.Record{Status: runner.Discarded}))
	}
	return errors.Join(err, s.discard())
}

// Forget implements migrate.Forgetter.
func (r *mountReceiver) Forget(context.Context) error { return r.gone.dropRecord() }

func (r *mountReceiver) Commit(_ context.Context, id string) error {
	return runner.WriteReceived(r.still.device(runner.StateDevice), id, r.state)
}

func (r *mountReceiver) Abort(_ context.Context, id string) error { return r.still.forget(id) }
func (r *mountReceiver) Done(context.Context, string) error       { return nil }
