package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/drafter-vm/drafter/pkg/control"
	"github.com/drafter-vm/drafter/pkg/depot"
	"github.com/drafter-vm/drafter/pkg/migrate"
	"github.com/drafter-vm/drafter/pkg/objstore"
	"github.com/drafter-vm/drafter/pkg/peer"
	"github.com/drafter-vm/drafter/pkg/runner"
	"github.com/drafter-vm/drafter/pkg/vmpackage"
	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// depotFlags say what a peer has to do with a store.
type depotFlags struct {
	storeFlags
	sync        bool
	quiet       time.Duration
	backup      string
	backupEvery time.Duration
	backupKeep  int
	restore     string
}

func (f *depotFlags) register(flags *pflag.FlagSet) {
	f.storeFlags.register(flags)
	flags.BoolVar(&f.sync, "store-sync", false, "keep the devices in the object store while the instance runs, and receive them from there: the one of --store, or, without it, the one that the source names")
	flags.DurationVar(&f.quiet, "store-quiet", 10*time.Second, "for how long something was not written that is kept in the object store")
	flags.StringVar(&f.backup, "backup", "", "put copies of the running instance into --store, as versions of the image of this name")
	flags.DurationVar(&f.backupEvery, "backup-every", time.Minute, "with --backup: time from the end of one copy to the begin of the next")
	flags.IntVar(&f.backupKeep, "backup-keep", 3, "with --backup: versions that are kept")
	flags.StringVar(&f.restore, "restore", "", "start from an image in --store, NAME or NAME@VERSION, before it has been fetched; --package is the folder to make for it")
}

// peerDepot is a peer's part in a store.
type peerDepot struct {
	store   *objstore.Store // of --store; nil: none
	storage *depot.Storage  // nil: nothing is kept
	backup  *depot.Backup   // nil: no copies
	version *depot.Version  // to start from; nil: none
	metrics *control.Metrics
}

// open opens what the flags name, but for what devices are kept in: see keep. Dir is the folder to restore to.
func (f *depotFlags) open(ctx context.Context, cmd *cobra.Command, dir string, metrics *control.Metrics) (_ *peerDepot, err error) {
	flags := cmd.Flags()
	c, named, err := f.config(flags)
	if err != nil {
		return nil, err
	}
	d := &peerDepot{metrics: metrics}
	if f.quiet <= 0 {
		return nil, usageErrorf("--store-quiet %v: give a time above zero", f.quiet)
	}
	for _, v := range []struct {
		flag string
		set  bool
	}{{"backup", f.backup != ""}, {"restore", f.restore != ""}} {
		if v.set && !named {
			return nil, usageErrorf("--%s needs --store: the bucket, as s3://BUCKET/PREFIX", v.flag)
		}
	}
	for _, name := range []string{"backup-every", "backup-keep"} {
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
	if named {
		if d.store, err = objstore.Open(c); err != nil {
			return nil, usageErrorf("--store: %w", err)
		}
	}
	if f.restore != "" {
		name, version, err := imageAndVersion(f.restore)
		if err != nil {
			return nil, err
		}
		// One that was begun goes on with the version that it was begun with.
		if begun, err := os.ReadFile(filepath.Join(dir, restoreMark)); err == nil {
			if of, at, _ := strings.Cut(strings.TrimSpace(string(begun)), "@"); of == name && (version == "" || version == at) {
				version = at
			} else {
				return nil, usageErrorf("--restore %s: %q is being made from %q: finish that, or name another folder (--package)", f.restore, dir, strings.TrimSpace(string(begun)))
			}
		}
		if d.version, err = depot.Open(ctx, d.store, name, version, c.Logger); err != nil {
			return nil, interrupted(cmd, fmt.Errorf("--restore: %w", err))
		}
	}
	if f.backup != "" {
		cfg := depot.BackupConfig{Store: d.store, Name: f.backup, Every: f.backupEvery, Keep: f.backupKeep, Logger: c.Logger}
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
func (d *peerDepot) keep(ctx context.Context, f *depotFlags, flags *pflag.FlagSet, devices []peer.Device, own map[string]depot.DeviceConfig) error {
	c, named, err := f.config(flags)
	if err != nil {
		return err
	}
	cfg := depot.StorageConfig{Devices: make(map[string]depot.DeviceConfig), Logger: logger(ctx)}
	for _, device := range devices {
		kept, has := own[device.Name]
		if !has && (!f.sync || device.Name == runner.StateDevice || device.Stationary || device.Shared) {
			continue
		}
		if kept.Store.Bucket == "" && named {
			kept.Store = c
		}
		kept.Store.Key, kept.Quiet = c.Key, f.quiet
		if kept.Store.Concurrency == 0 {
			kept.Store.Concurrency = c.Concurrency
		}
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
	// A VM does not wait for its store.
	if err := d.storage.Ping(ctx); err != nil {
		cfg.Logger.Warn("the object store cannot be used now: devices will be kept there when it can", "error", err)
	}
	return nil
}

// close lets go of the store.
func (d *peerDepot) close() {
	if d.storage != nil {
		d.storage.Close()
	}
	if d.store != nil {
		d.store.Close()
	}
}

// restoredDevices are the files of a package that is made of an image, in a folder.
func restoredDevices(v *depot.Version, dir string) []peer.Device {
	var devices []peer.Device
	for _, d := range v.Devices {
		devices = append(devices, peer.Device{
			DeviceConfig: runner.DeviceConfig{Name: d.Name, Base: filepath.Join(dir, vmpackage.DefaultFile(d.Name))}, Policy: migrate.Policy{ByGoal: true},
		})
	}
	return devices
}

// restoreMark is a file in the folder of an image that has not been fetched wholly, with its name and version.
const restoreMark = ".restore"

// markRestored makes the folder that an image is restored to. Undo removes it, if that has come to nothing.
func markRestored(v *depot.Version, dir string) (undo func(), err error) {
	made, err := runner.MakeFolders(dir, 0o700)
	mark := filepath.Join(dir, restoreMark)
	if err == nil {
		err = os.WriteFile(mark, []byte(v.Name+"@"+v.ID+"\n"), 0o600)
	}
	undo = func() {
		_ = os.Remove(mark)
		runner.RemoveFolders(made)
	}
	if err != nil {
		undo()
	}
	return undo, err
}

// describeRestored makes the folder of an image a package.
func describeRestored(ctx context.Context, dir string, devices []peer.Device) error {
	if err := os.Remove(filepath.Join(dir, restoreMark)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if _, err := os.Stat(filepath.Join(dir, vmpackage.ManifestFile)); err == nil {
		return nil
	}
	var files []vmpackage.File
	for _, d := range devices {
		files = append(files, vmpackage.File{Name: d.Name, Path: d.Base})
	}
	_, err := vmpackage.WriteManifest(ctx, dir, files, vmpackage.ManifestOptions{SkipDigests: true})
	return err
}

// checkAlone refuses to start a VM from a copy of one that may run.
func checkAlone(v *depot.Version, image string) error {
	if age := time.Since(v.Taken); v.Every > 0 && age < 2*v.Every+time.Minute {
		return fmt.Errorf("--restore %s: the VM was copied %v ago, and is every %v: it may run still, and then there would be two. Make sure that it does not, and give --force-owner",
			image, age.Round(time.Second), v.Every)
	}
	return nil
}
