package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/schollz/progressbar/v3"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/term"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/control"
	"github.com/drafter-vm/drafter/pkg/depot"
	"github.com/drafter-vm/drafter/pkg/migrate"
	"github.com/drafter-vm/drafter/pkg/objstore"
	"github.com/drafter-vm/drafter/pkg/peer"
	"github.com/drafter-vm/drafter/pkg/runner"
	"github.com/drafter-vm/drafter/pkg/vmpackage"
)

// storeFlags say where an object store is.
type storeFlags struct {
	url, endpoint, region, key string
	concurrency                int
}

func (f *storeFlags) register(flags *pflag.FlagSet) {
	flags.StringVar(&f.url, "store", "", "object store, as s3://BUCKET or s3://BUCKET/PREFIX; credentials as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or in ~/.aws/credentials")
	flags.StringVar(&f.endpoint, "store-endpoint", "", "with --store: its server, as https://HOST or http://HOST:PORT (default: AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, or Amazon's)")
	flags.StringVar(&f.region, "store-region", "", "with --store: its region (default: AWS_REGION, or found out)")
	flags.StringVar(&f.key, "store-key", "", "with --store: file with the key that all in it is encrypted with (drafter store keygen; empty: nothing is encrypted)")
	flags.IntVar(&f.concurrency, "store-concurrency", 16, "with --store: most requests at once")
}

// storeScheme begins the URL of a store.
const storeScheme = "s3://"

// config is what the flags say; false if no store is named.
func (f *storeFlags) config(flags *pflag.FlagSet) (c objstore.Config, named bool, err error) {
	if f.url == "" {
		for _, name := range []string{"store-endpoint", "store-region"} {
			if flags.Changed(name) {
				return c, false, usageErrorf("--%s needs --store: the bucket, as s3://BUCKET/PREFIX", name)
			}
		}
	}
	if f.concurrency < 1 || f.concurrency > 1024 {
		return c, false, usageErrorf("--store-concurrency %d: give 1 to 1024", f.concurrency)
	}
	c.Concurrency = f.concurrency
	if f.key != "" {
		if c.Key, err = objstore.ReadKey(f.key); err != nil {
			return c, false, usageErrorf("--store-key: %w", err)
		}
	}
	if f.url == "" {
		return c, false, nil
	}
	rest, ok := strings.CutPrefix(f.url, storeScheme)
	if !ok {
		return c, false, usageErrorf("--store %q: give it as s3://BUCKET or s3://BUCKET/PREFIX, and its server by --store-endpoint", f.url)
	}
	c.Bucket, c.Prefix, _ = strings.Cut(rest, "/")
	c.Endpoint, c.Region = f.endpoint, f.region
	for _, name := range []string{"AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"} {
		if c.Endpoint == "" {
			c.Endpoint = os.Getenv(name)
		}
	}
	for _, name := range []string{"AWS_REGION", "AWS_DEFAULT_REGION"} {
		if c.Region == "" {
			c.Region = os.Getenv(name)
		}
	}
	if err := c.Check(); err != nil {
		return c, false, usageErrorf("--store: %w", err)
	}
	return c, true, nil
}

// open opens the store that the flags must name, and looks whether it can be used.
func (f *storeFlags) open(ctx context.Context, flags *pflag.FlagSet) (*objstore.Store, error) {
	c, named, err := f.config(flags)
	if err != nil {
		return nil, err
	}
	if !named {
		return nil, usageErrorf("give --store: the bucket, as s3://BUCKET/PREFIX")
	}
	c.Logger = logger(ctx)
	store, err := objstore.Open(c)
	if err != nil {
		return nil, usageErrorf("--store: %w", err)
	}
	if err := store.Ping(ctx); err != nil {
		return nil, fmt.Errorf("--store: %w", err)
	}
	return store, nil
}

// newStoreCommand makes the command that works on images in an object store.
func newStoreCommand() *cobra.Command {
	const verbs = "push, pull, list, remove, collect or keygen"
	var store storeFlags
	cmd := &cobra.Command{
		Use:   "store",
		Short: "Keep packages and copies of VMs in an object store (S3), and clear it up",
		Long: `Works on images in an object store that speaks S3. An image has a name and versions: packages that were pushed, or copies of a running VM
(drafter peer --backup). A VM starts from one before it has been fetched: drafter peer --restore.

What is there already, of whatever image, is not sent again. All is compressed, and with --store-key encrypted.

Exit statuses: 0 done; 1 it failed; 2 the command line cannot be used; 130 ended by a signal.`,
		Example: `  drafter store push --store s3://vms/prod --package out/package web
  drafter store list --store s3://vms/prod
  drafter peer --store s3://vms/prod --restore web --package out/web`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usageErrorf("unknown command %q: use %s", args[0], verbs)
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return usageErrorf("say what to do: %s", verbs) },
	}
	store.register(cmd.PersistentFlags())
	cmd.AddCommand(newStorePushCommand(&store), newStorePullCommand(&store), newStoreListCommand(&store), newStoreRemoveCommand(&store), newStoreCollectCommand(&store), newKeygenCommand())
	return cmd
}

// oneArg is the one argument of a command.
func oneArg(what string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		if len(args) != 1 || args[0] == "" {
			return usageErrorf("give one argument: %s", what)
		}
		return nil
	}
}

// imageAndVersion are what NAME or NAME@VERSION means.
func imageAndVersion(arg string) (name, version string, err error) {
	name, version, given := strings.Cut(arg, "@")
	if err := objstore.CheckName(name); err != nil {
		return "", "", usageErrorf("image %q: %w", arg, err)
	}
	if given {
		if err := objstore.CheckName(version); err != nil {
			return "", "", usageErrorf("version of image %q: %w", arg, err)
		}
	}
	return name, version, nil
}

func newStorePushCommand(flags *storeFlags) *cobra.Command {
	var dir string
	cmd := &cobra.Command{
		Use:   "push NAME",
		Short: "Put a package there, as the newest version of an image",
		Args:  oneArg("the name of the image"),
		RunE: func(cmd *cobra.Command, args []string) error {
			name, version, err := imageAndVersion(args[0])
			if err == nil && version != "" {
				err = usageErrorf("image %q: a version that is pushed gets its name from the time: leave it out", args[0])
			}
			if err != nil {
				return err
			}
			store, err := flags.open(cmd.Context(), cmd.Flags())
			if err != nil {
				return err
			}
			defer store.Close()
			bars := &storeBars{out: cmd.ErrOrStderr(), shown: isTerminal(cmd.ErrOrStderr())}
			version, err = depot.Push(cmd.Context(), store, dir, name, depot.PushOptions{Progress: bars.progress})
			bars.end()
			if err != nil {
				return interrupted(cmd, err)
			}
			fmt.Fprintf(cmd.ErrOrStderr(), "Pushed %s: %s were not there yet\n", dir, humanize.IBytes(uint64(bars.total())))
			fmt.Fprintf(cmd.OutOrStdout(), "%s@%s\n", name, version)
			return nil
		},
	}
	cmd.Flags().StringVar(&dir, "package", "out/package", "folder of the package")
	return cmd
}

func newStorePullCommand(flags *storeFlags) *cobra.Command {
	var dir string
	cmd := &cobra.Command{
		Use:   "pull NAME[@VERSION]",
		Short: "Fetch an image as a package, whole",
		Args:  oneArg("the image, as NAME or NAME@VERSION"),
		RunE: func(cmd *cobra.Command, args []string) error {
			name, version, err := imageAndVersion(args[0])
			if err != nil {
				return err
			}
			store, err := flags.open(cmd.Context(), cmd.Flags())
			if err != nil {
				return err
			}
			defer store.Close()
			v, err := depot.Open(cmd.Context(), store, name, version, logger(cmd.Context()))
			if err != nil {
				return interrupted(cmd, err)
			}
			if err := pullImage(cmd.Context(), v, dir); err != nil {
				return interrupted(cmd, fmt.Errorf("pull image %q: %w", name, err))
			}
			fmt.Fprintf(cmd.ErrOrStderr(), "Pulled %s@%s, of %s, to %s\n", v.Name, v.ID, v.Taken.Format(time.RFC3339), dir)
			return nil
		},
	}
	cmd.Flags().StringVar(&dir, "package", "out/package", "folder to make for the package")
	return cmd
}

// pullImage makes a package of an image. When it fails nothing is left.
func pullImage(ctx context.Context, v *depot.Version, dir string) (err error) {
	made, err := runner.MakeFolders(dir, 0o700)
	if err == nil && len(made) == 0 {
		err = fmt.Errorf("%q: %w: nothing is overwritten: choose another folder", dir, os.ErrExist)
	}
	defer func() {
		if err != nil {
			if len(made) > 0 {
				err = errors.Join(err, os.RemoveAll(dir))
			}
			runner.RemoveFolders(made)
		}
	}()
	if err != nil {
		return err
	}
	devices, err := v.OpenDevices(ctx)
	if err != nil {
		return err
	}
	defer func() {
		for _, d := range devices {
			_ = d.Device.Close()
		}
	}()
	var files []vmpackage.File
	for _, d := range devices {
		path := filepath.Join(dir, vmpackage.DefaultFile(d.Name))
		f, err := block.CreateFile(path, d.Device.Size())
		if err != nil {
			return err
		}
		err = block.Copy(ctx, f, d.Device, block.CopyOptions{Concurrency: 4})
		if err := errors.Join(err, f.Close()); err != nil {
			return fmt.Errorf("device %q: %w", d.Name, err)
		}
		files = append(files, vmpackage.File{Name: d.Name, Path: path})
	}
	_, err = vmpackage.WriteManifest(ctx, dir, files, vmpackage.ManifestOptions{})
	return err
}

func newStoreListCommand(flags *storeFlags) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "list [NAME]",
		Short: "List images, or the versions of one",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 1 {
				return usageErrorf("unexpected argument %q: give one image, or none", args[1])
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			store, err := flags.open(cmd.Context(), cmd.Flags())
			if err != nil {
				return err
			}
			defer store.Close()
			all, err := depot.Images(cmd.Context(), store)
			if err != nil {
				return interrupted(cmd, err)
			}
			type row struct {
				Image    string    `json:"image"`
				Version  string    `json:"version"`
				Versions int       `json:"versions"`
				Taken    time.Time `json:"taken"`
				Size     int64     `json:"size"` // bytes, of all devices
			}
			rows := []row{}
			for _, image := range all {
				shown := image.Versions[len(image.Versions)-1:]
				if len(args) == 1 {
					if image.Name != args[0] {
						continue
					}
					shown = image.Versions
				}
				for _, version := range shown {
					v, err := depot.Open(cmd.Context(), store, image.Name, version, logger(cmd.Context()))
					if err != nil {
						return interrupted(cmd, err)
					}
					r := row{image.Name, version, len(image.Versions), v.Taken, 0}
					for _, d := range v.Devices {
						r.Size += d.Size
					}
					rows = append(rows, r)
				}
			}
			if len(args) == 1 && len(rows) == 0 {
				return fmt.Errorf("list image %q: %w in %v", args[0], depot.ErrNoImage, store.Location())
			}
			if asJSON {
				return json.NewEncoder(cmd.OutOrStdout()).Encode(rows)
			}
			w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
			fmt.Fprintln(w, "IMAGE\tVERSION\tOF\tTAKEN\tSIZE")
			for _, r := range rows {
				fmt.Fprintf(w, "%s\t%s\t%d\t%s\t%s\n", r.Image, r.Version, r.Versions, humanize.Time(r.Taken), humanize.IBytes(uint64(r.Size)))
			}
			return w.Flush()
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "for programs: a JSON array")
	return cmd
}

func newStoreRemoveCommand(flags *storeFlags) *cobra.Command {
	return &cobra.Command{
		Use:   "remove NAME[@VERSION]",
		Short: "Remove an image, or a version of one; what it needed alone is garbage then, for collect",
		Args:  oneArg("the image, as NAME or NAME@VERSION"),
		RunE: func(cmd *cobra.Command, args []string) error {
			name, version, err := imageAndVersion(args[0])
			if err != nil {
				return err
			}
			store, err := flags.open(cmd.Context(), cmd.Flags())
			if err != nil {
				return err
			}
			defer store.Close()
			n, err := depot.Remove(cmd.Context(), store, name, version)
			if err != nil {
				return interrupted(cmd, err)
			}
			fmt.Fprintf(cmd.ErrOrStderr(), "Removed %d versions of image %q\n", n, name)
			return nil
		},
	}
}

func newStoreCollectCommand(flags *storeFlags) *cobra.Command {
	var opts objstore.CollectOptions
	cmd := &cobra.Command{
		Use:   "collect",
		Short: "Remove what no image needs, and no running VM",
		Long: `Removes what nothing refers to: no version of an image, and no VM that is kept in the store while it runs. What was put within the
last ` + humanizeHours(objstore.Grace) + ` stays in any case, as somebody may be about to refer to it; --grace says otherwise, where nobody else uses the store now.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if opts.Grace <= 0 {
				return usageErrorf("--grace %v: give a time above zero", opts.Grace)
			}
			store, err := flags.open(cmd.Context(), cmd.Flags())
			if err != nil {
				return err
			}
			defer store.Close()
			c, err := store.Collect(cmd.Context(), opts)
			if err != nil {
				return interrupted(cmd, err)
			}
			verb := "Removed"
			if opts.DryRun {
				verb = "Would remove"
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s %d objects with %s, and %d records of VMs that have ended; %d objects with %s are needed, and %d are too young to tell\n", verb,
				c.Garbage, humanize.IBytes(uint64(c.GarbageBytes)), c.Expired, c.Lists+c.Chunks, humanize.IBytes(uint64(c.Bytes)), c.Young)
			return nil
		},
	}
	cmd.Flags().DurationVar(&opts.Grace, "grace", objstore.Grace, "how long ago something was put at least that is removed")
	cmd.Flags().BoolVar(&opts.DryRun, "dry-run", false, "remove nothing, and say what would be")
	return cmd
}

func humanizeHours(d time.Duration) string { return fmt.Sprintf("%.0f hours", d.Hours()) }

func newKeygenCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "keygen FILE",
		Short: "Make a key for --store-key",
		Args:  oneArg("the file to make"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := objstore.WriteKey(args[0]); err != nil {
				return err
			}
			fmt.Fprintf(cmd.ErrOrStderr(), "Made key %s. What is encrypted with it is lost with it: keep a copy elsewhere than in the store\n", args[0])
			return nil
		},
	}
}

// isTerminal reports whether bars can be drawn there.
func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// storeBars shows how far the putting of devices is.
type storeBars struct {
	out    io.Writer
	shown  bool
	bar    *progressbar.ProgressBar
	device string
	put    map[string]int64
}

func (b *storeBars) progress(device string, done, put int64) {
	if b.put == nil {
		b.put = make(map[string]int64)
	}
	b.put[device] = put
	if !b.shown {
		return
	}
	if device != b.device {
		b.end()
		b.device = device
		b.bar = progressbar.NewOptions64(-1, progressbar.OptionSetWriter(b.out), progressbar.OptionSetDescription(device), progressbar.OptionShowBytes(true),
			progressbar.OptionThrottle(100*time.Millisecond), progressbar.OptionClearOnFinish())
	}
	_ = b.bar.Set64(done)
}

func (b *storeBars) end() {
	if b.bar != nil {
		_ = b.bar.Finish()
		b.bar = nil
	}
}

func (b *storeBars) total() (n int64) {
	for _, put := range b.put {
		n += put
	}
	return n
}

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
