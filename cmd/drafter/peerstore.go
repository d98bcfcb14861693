package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/control"
	"github.com/drafter-vm/drafter/pkg/depot"
	"github.com/drafter-vm/drafter/pkg/migrate"
	"github.com/drafter-vm/drafter/pkg/objstore"
	"github.com/drafter-vm/drafter/pkg/peer"
	"github.com/drafter-vm/drafter/pkg/registry"
	"github.com/drafter-vm/drafter/pkg/runner"
	"github.com/drafter-vm/drafter/pkg/vmpackage"
)

// depotFlags say what a peer has to do with a store.
type depotFlags struct {
	storeFlags
	sync        bool
	quiet       time.Duration
	backup      string
	backupEvery time.Duration
	backupKeep  int
	backupDir   string
	restore     string
	registry    registryFlags
	run         bool // the command is drafter run, which restore is the argument of
	ofImage     bool // the command is drafter oci run, whose registry is that of its image
}

func (f *depotFlags) register(flags *pflag.FlagSet) {
	f.storeFlags.register(flags)
	flags.BoolVar(&f.sync, "store-sync", false, "keep the devices in the object store while the instance runs, and receive them from there: the one of --store, or, without it, the one that the source names")
	flags.DurationVar(&f.quiet, "store-quiet", 10*time.Second, "for how long something was not written that is kept in the object store")
	flags.StringVar(&f.backup, "backup", "", "put copies of the running instance into --store, as versions of the image of this name")
	flags.DurationVar(&f.backupEvery, "backup-every", time.Minute, "with --backup: time from the end of one copy to the begin of the next")
	flags.IntVar(&f.backupKeep, "backup-keep", 3, "with --backup: versions that are kept")
	flags.StringVar(&f.backupDir, "backup-dir", "", "with --backup: folder for what has changed, until it is in the store, in files without names (default: TMPDIR, or /tmp)")
	flags.StringVar(&f.restore, "restore", "", "start from an image in --store, NAME or NAME@VERSION, or a package in a registry, oci://HOST/NAME:TAG, before it has been fetched; --package is the folder to make for it")
	f.registry.register(flags)
}

// inRegistry reports whether what is restored is in a registry, and not in --store.
func (f *depotFlags) inRegistry() bool { return registry.IsReference(f.restore) }

// restoring is what the command line calls what is restored.
func (f *depotFlags) restoring() string {
	if f.run {
		return f.restore
	}
	return "--restore " + f.restore
}

// peerDepot is a peer's part in a store.
type peerDepot struct {
	config  objstore.Config // by the flags
	store   *objstore.Store // of --store; nil: none
	storage *depot.Storage  // nil: nothing is kept
	backup  *depot.Backup   // nil: no copies
	origin  origin          // to start from; nil: none
	devices []string        // of that
	whole   bool            // it is here already
	begun   bool            // to be restored, to this folder
	metrics *control.Metrics
	work    sync.WaitGroup // what goes on beside the instance
	stop    func()         // ends the look whether the store can be used
}

// origin is what an instance starts from before it has been fetched: an image in an object store, or a package in a registry.
type origin interface {
	// Dial returns streams to a source of it in this process, and Redial for what was received from it before. Close waits until all was fetched.
	Dial(ctx context.Context) ([]io.ReadWriter, error)
	Redial(ctx context.Context) ([]io.ReadWriter, error)
	Close(ctx context.Context) error

	String() string // for people
	mark() string   // says, in a word, exactly what is fetched

	// check looks whether a VM can be started from it now, and says what that is.
	check(ctx context.Context, restoring string, force bool) (said string, err error)
}

// storedOrigin is an image in an object store.
type storedOrigin struct{ *depot.Version }

func (o storedOrigin) String() string { return "image " + o.mark() }
func (o storedOrigin) mark() string   { return o.Name + "@" + o.ID }

func (o storedOrigin) check(ctx context.Context, restoring string, force bool) (string, error) {
	// Also where it was begun before: it has not run here, and may by now elsewhere.
	known := o.Version
	if !known.Loaded {
		var err error
		if known, err = known.Reopen(ctx); err != nil {
			return "", fmt.Errorf("%s: %w", restoring, err)
		}
	}
	if err := checkAlone(known, restoring); err != nil && !force {
		return "", err
	}
	return fmt.Sprintf("Restoring %s@%s: the VM as it was at %s (%s); what it did later is lost", known.Name, known.ID, known.Taken.Format(time.RFC3339), humanize.Time(known.Taken)), nil
}

// registryOrigin is a package in a registry.
type registryOrigin struct{ *registry.Package }

func (o registryOrigin) String() string { return o.Reference.String() }
func (o registryOrigin) mark() string   { return o.Origin().String() }

func (o registryOrigin) check(ctx context.Context, restoring string, _ bool) (string, error) {
	if o.Manifest == nil {
		if err := o.Load(ctx); err != nil {
			return "", fmt.Errorf("%s: %w", restoring, err)
		}
	}
	return fmt.Sprintf("Starting %s, which is fetched as it is needed, and behind it", o.Reference), nil
}

// open opens what the flags name, but for what devices are kept in: see keep. Dir is the folder to restore to.
func (f *depotFlags) open(ctx context.Context, cmd *cobra.Command, dir string, own map[string]depot.DeviceConfig, receives bool, metrics *control.Metrics) (_ *peerDepot, err error) {
	flags := cmd.Flags()
	c, named, err := f.config(flags)
	if err != nil {
		return nil, err
	}
	d := &peerDepot{metrics: metrics}
	sync := f.sync || len(own) > 0
	for _, v := range []struct {
		flag  string
		needs bool
		what  string
	}{{"store", sync || f.backup != "" || f.restore != "" && !f.inRegistry(), "--store-sync, --backup or --restore"}, {"store-quiet", sync, "--store-sync"},
		{"store-concurrency", sync || named, "--store"}, {"store-key", sync || named, "--store"}} {
		if flags.Changed(v.flag) && !v.needs {
			return nil, usageErrorf("--%s does nothing without %s", v.flag, v.what)
		}
	}
	if f.sync && !named && !receives && len(own) == 0 {
		return nil, usageErrorf("--store-sync needs --store: without it the store is the one that a source names, and nothing is received here (--raddr, --accept)")
	}
	if f.quiet <= 0 {
		return nil, usageErrorf("--store-quiet %v: give a time above zero", f.quiet)
	}
	for _, v := range []struct {
		flag string
		set  bool
	}{{"backup", f.backup != ""}, {"restore", f.restore != "" && !f.inRegistry()}} {
		if v.set && !named {
			return nil, usageErrorf("--%s needs --store: the bucket, as s3://BUCKET/PREFIX", v.flag)
		}
	}
	for _, name := range registryFlagNames {
		if flags.Changed(name) && !f.inRegistry() && !f.ofImage {
			return nil, usageErrorf("--%s needs --restore %sHOST/NAME:TAG: a package in a registry", name, registry.Scheme)
		}
	}
	for _, name := range []string{"backup-every", "backup-keep", "backup-dir"} {
		if flags.Changed(name) && f.backup == "" {
			return nil, usageErrorf("--%s needs --backup: the name of the image", name)
		}
	}
	if f.backupEvery <= 0 {
		return nil, usageErrorf("--backup-every %v: give a time above zero", f.backupEvery)
	}
	if f.backupKeep < 1 {
		return nil, usageErrorf("--backup-keep %d: give at least 1", f.backupKeep)
	}
	c.Logger = logger(ctx)
	d.config = c
	if named {
		if d.store, err = objstore.Open(c); err != nil {
			return nil, usageErrorf("--store: %w", err)
		}
	}
	if f.restore != "" {
		if err := d.restore(ctx, f, flags, dir); err != nil {
			return nil, interrupted(cmd, err)
		}
	}
	if f.backup != "" {
		cfg := depot.BackupConfig{Store: d.store, Name: f.backup, Every: f.backupEvery, Keep: f.backupKeep, Dir: f.backupDir, Logger: c.Logger}
		cfg.Done = func(r depot.BackupReport, err error) {
			if !errors.Is(err, peer.ErrBusy) {
				metrics.BackedUp(r.Taken, err)
			}
			if err == nil {
				c.Logger.Info("backed up the VM", "image", f.backup+"@"+r.Version, "downtime", r.Downtime, "took", r.Took, "sent", humanize.IBytes(uint64(r.Sent)))
			}
		}
		if d.backup, err = depot.NewBackup(cfg); err != nil {
			return nil, usageErrorf("--backup: %w", err)
		}
	}
	return d, nil
}

// keep has devices be kept: all that travel with --store-sync, or those that say so themselves.
func (d *peerDepot) keep(ctx context.Context, f *depotFlags, devices []peer.Device, own map[string]depot.DeviceConfig) (err error) {
	cfg := depot.StorageConfig{Devices: make(map[string]depot.DeviceConfig), Logger: logger(ctx)}
	for _, device := range devices {
		kept, has := own[device.Name]
		if !has && (!f.sync || device.Name == runner.StateDevice || device.Stationary || device.Shared) {
			continue
		}
		few := cmp.Or(kept.Store.Concurrency, d.config.Concurrency)
		if kept.Store.Bucket == "" && d.store != nil {
			kept.Store = d.config
		}
		kept.Store.Concurrency, kept.Store.Key, kept.Quiet = few, d.config.Key, f.quiet
		cfg.Devices[device.Name] = kept
	}
	if len(cfg.Devices) == 0 {
		return nil
	}
	if d.storage, err = depot.NewStorage(cfg); err != nil {
		return usageErrorf("--store-sync: %w", err)
	}
	d.metrics.Store(func() map[string]control.Stored {
		all := make(map[string]control.Stored)
		for name, s := range d.storage.Stats() {
			all[name] = control.Stored{Stored: s.Stored, Waiting: s.Waiting, Bytes: s.Bytes, Failing: s.Failing != nil}
		}
		return all
	})
	pinging, stop := context.WithCancel(ctx)
	d.stop = stop
	d.work.Go(func() { // a VM does not wait for its store
		if err := d.storage.Ping(pinging); err != nil && pinging.Err() == nil {
			cfg.Logger.Warn("the object store cannot be used now: devices will be kept there when it can", "error", err)
		}
	})
	return nil
}

// close lets go of the store.
func (d *peerDepot) close() {
	if d.stop != nil {
		d.stop()
	}
	d.work.Wait()
	if d.storage != nil {
		d.storage.Close()
	}
	if d.store != nil {
		d.store.Close()
	}
}

// restore finds what is to be restored to a folder, where that may have been begun, or be done, already: then what it comes from is not needed for the
// devices to be known, so that a VM whose peer has died is adopted also where there is no store.
func (d *peerDepot) restore(ctx context.Context, f *depotFlags, flags *pflag.FlagSet, dir string) error {
	begun, err := os.ReadFile(filepath.Join(dir, restoreMark))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%s: %w", f.restoring(), err)
	}
	var words []string // of what is in the folder: what that is made of, and its devices
	pkg, notYet := vmpackage.Open(dir)
	switch {
	case notYet == nil:
		d.whole = true
		words = []string{""}
		for _, device := range pkg.Devices {
			words = append(words, device.Name)
		}
	case err == nil:
		if words = strings.Fields(string(begun)); len(words) < 2 {
			return fmt.Errorf("%s: %q does not say what it is being made from: remove %q, and begin anew", f.restoring(), filepath.Join(dir, restoreMark), dir)
		}
		d.begun = true
	}
	if f.inRegistry() {
		err = d.restorePackage(ctx, f, flags, dir, words)
	} else {
		err = d.restoreImage(ctx, f, dir, words)
	}
	return err
}

// restoreImage finds an image in the store. Words are what is in the folder already; nil: nothing.
func (d *peerDepot) restoreImage(ctx context.Context, f *depotFlags, dir string, words []string) error {
	name, version, err := imageAndVersion(f.restore)
	if err != nil {
		return err
	}
	if words == nil {
		v, err := depot.Open(ctx, d.store, name, version, logger(ctx))
		if err != nil {
			return fmt.Errorf("%s: %w", f.restoring(), err)
		}
		d.origin = storedOrigin{v}
		for _, device := range v.Devices {
			d.devices = append(d.devices, device.Name)
		}
		return nil
	}
	if d.devices = words[1:]; d.begun {
		of, at, _ := strings.Cut(words[0], "@")
		if of != name || version != "" && version != at {
			return usageErrorf("%s: %q is being made from %s: finish that, or name another folder (--package)", f.restoring(), dir, words[0])
		}
		version = at
	}
	d.origin = storedOrigin{depot.At(d.store, name, version, logger(ctx))}
	return nil
}

// restorePackage is restoreImage for a package in a registry.
func (d *peerDepot) restorePackage(ctx context.Context, f *depotFlags, flags *pflag.FlagSet, dir string, words []string) error {
	ref, err := registry.ParseReference(f.restore)
	if err != nil {
		return usageErrorf("%w", err)
	}
	opts, err := f.registry.options(ctx, flags)
	if err != nil {
		return err
	}
	if words == nil {
		p, err := registry.Open(ctx, ref, opts)
		if err != nil {
			return fmt.Errorf("%s: %w", f.restoring(), err)
		}
		d.origin, d.devices = registryOrigin{p}, p.Manifest.Names()
		return nil
	}
	of, err := registry.ParseOrigin(words[0])
	if d.whole {
		of, err = registry.ReadOrigin(dir)
	}
	switch {
	case errors.Is(err, os.ErrNotExist):
		return usageErrorf("%s: %q is a package that came from nowhere: name another folder (%s)", f.restoring(), dir, f.folderFlag())
	case err != nil:
		return fmt.Errorf("%s: %w", f.restoring(), err)
	case !of.Is(ref):
		return usageErrorf("%s: in %q there is an instance of %s: go on with that, or name another folder (%s)", f.restoring(), dir, of.Asked, f.folderFlag())
	}
	d.origin, d.devices = registryOrigin{registry.At(of, opts)}, words[1:]
	return nil
}

// folderFlag is the flag that names the folder that is restored to.
func (f *depotFlags) folderFlag() string {
	if f.run {
		return "--instance"
	}
	return "--package"
}

// restoredDevices are the files of a package that is made of an image, in a folder.
func restoredDevices(names []string, dir string) []peer.Device {
	var devices []peer.Device
	for _, name := range names {
		devices = append(devices, peer.Device{
			DeviceConfig: runner.DeviceConfig{Name: name, Base: filepath.Join(dir, vmpackage.DefaultFile(name))}, Policy: migrate.Policy{ByGoal: true},
		})
	}
	return devices
}

// occupied is why an image cannot be restored to a folder in which there is a VM, which stays as it is.
func (d *peerDepot) occupied(ctx context.Context, f *depotFlags, devices []peer.Device, dir string, taken error) error {
	if !d.begun {
		return fmt.Errorf("%w: name another folder (%s)", taken, f.folderFlag())
	}
	status, err := statusOf(filepath.Join(dir, vmpackage.DefaultFile(runner.StateDevice)))
	if err != nil {
		return err
	}
	beside, verb := ", beside --restore", "restore"
	if f.run {
		beside, verb = "", "start"
	}
	lacks := slices.ContainsFunc(devices, func(d peer.Device) bool { return d.CheckArrived() != nil })
	if status == runner.Running || lacks {
		how := "died"
		if status == runner.ShutDown {
			how = "shut down"
		}
		return fmt.Errorf("%w: the VM in %q %s before all of it had been fetched: boot it from its disks with --boot%s, which fetches what they lack; or remove the folder, to %s it once more", taken, dir, how, beside, verb)
	}
	if err := describeRestored(ctx, d.origin, dir, devices); err != nil {
		return err
	}
	if f.inRegistry() {
		return fmt.Errorf("%w: all of it had been fetched: start it once more, with --boot if it died", taken)
	}
	return fmt.Errorf("%w: all of it had been fetched, and %q is a package now: start it without --restore", taken, dir)
}

// statusOf is what the record of an instance says, whose state device is that file.
func statusOf(path string) (_ runner.Status, err error) {
	f, err := block.OpenFile(path, block.FileOptions{ReadOnly: true})
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	r, err := runner.ReadRecord(f)
	return r.Status, err
}

// restoreMark is a file in the folder of an image that has not been fetched wholly, with its name and version, and its devices.
const restoreMark = ".restore"

// markRestored begins to restore an image to a folder that this process has locked, and in which there is no VM. Undo removes the mark, if that has
// come to nothing.
func markRestored(of string, devices []string, dir string) (undo func(), err error) {
	mark := filepath.Join(dir, restoreMark)
	_, before := os.Stat(mark)
	if before == nil { // an attempt was killed: what is there of a file that only is read would pass for the whole of it
		for _, d := range restoredDevices(devices, dir) {
			if d.Name == runner.StateDevice { // says whether its machine lives, and is to be ended
				continue
			}
			if err := d.Remove(); err != nil {
				return nil, err
			}
		}
	}
	undo = func() {
		if before != nil { // else there is what an earlier attempt has left
			_ = os.Remove(mark)
		}
	}
	err = os.WriteFile(mark+".new", []byte(strings.Join(append([]string{of}, devices...), " ")+"\n"), 0o600)
	if err == nil {
		err = os.Rename(mark+".new", mark)
	}
	if err != nil {
		undo()
	}
	return undo, err
}

// describeRestored makes the folder of an image a package.
func describeRestored(ctx context.Context, o origin, dir string, devices []peer.Device) error {
	for _, d := range devices {
		if err := d.CheckArrived(); err != nil { // as where its guest has shut down meanwhile
			return fmt.Errorf("not all of %s has been fetched: device %q: %w", o, d.Name, err)
		}
	}
	if r, ok := o.(registryOrigin); ok { // so that it goes on when it is run again, and what is pushed of it is no more than what differs
		if err := registry.WriteOrigin(dir, r.Origin()); err != nil {
			return err
		}
	}
	// From the manifest on it is a package, and must say where it came from.
	if _, err := os.Stat(filepath.Join(dir, vmpackage.ManifestFile)); err != nil {
		var files []vmpackage.File
		for _, d := range devices {
			files = append(files, vmpackage.File{Name: d.Name, Path: d.Base})
		}
		if _, err := vmpackage.WriteManifest(ctx, dir, files, vmpackage.ManifestOptions{SkipDigests: true}); err != nil {
			return err
		}
	}
	if err := os.Remove(filepath.Join(dir, restoreMark)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// checkAlone refuses to start a VM from a copy of one that may run.
func checkAlone(v *depot.Version, restoring string) error {
	if age := time.Since(v.Newest); v.Every > 0 && age < 2*v.Every+time.Minute {
		return fmt.Errorf("%s: the newest copy of the VM is %v old, and there is one every %v: it may run still, and then there would be two. Make sure that it does not, and give --force-owner",
			restoring, max(0, age).Round(time.Second), v.Every)
	}
	return nil
}
