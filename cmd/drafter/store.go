package main

import (
	"cmp"
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
	"github.com/drafter-vm/drafter/pkg/depot"
	"github.com/drafter-vm/drafter/pkg/objstore"
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
		return c, false, usageErrorf("--store %s: give it as s3://BUCKET or s3://BUCKET/PREFIX, and its server by --store-endpoint", objstore.Shown(f.url))
	}
	c.Bucket, c.Prefix, _ = strings.Cut(rest, "/")
	c.Endpoint, c.Region = f.endpoint, f.region
	fromEnvironment(&c.Location)
	if err := c.Check(); err != nil {
		return c, false, usageErrorf("--store: %w", err)
	}
	return c, true, nil
}

// fromEnvironment sets the server and the region of a store where they are not.
func fromEnvironment(l *objstore.Location) {
	l.Endpoint = cmp.Or(l.Endpoint, os.Getenv("AWS_ENDPOINT_URL_S3"), os.Getenv("AWS_ENDPOINT_URL"))
	l.Region = cmp.Or(l.Region, os.Getenv("AWS_REGION"), os.Getenv("AWS_DEFAULT_REGION"))
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

// with has something be done with the store that the flags must name.
func (f *storeFlags) with(cmd *cobra.Command, do func(ctx context.Context, store *objstore.Store) error) error {
	store, err := f.open(cmd.Context(), cmd.Flags())
	if err != nil {
		return interrupted(cmd, err)
	}
	defer store.Close()
	return interrupted(cmd, do(cmd.Context(), store))
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
			return flags.with(cmd, func(ctx context.Context, store *objstore.Store) error {
				bars := &storeBars{out: cmd.ErrOrStderr(), shown: isTerminal(cmd.ErrOrStderr())}
				version, err := depot.Push(ctx, store, dir, name, depot.PushOptions{Progress: bars.progress})
				bars.end()
				if err != nil {
					return err
				}
				fmt.Fprintf(cmd.ErrOrStderr(), "Pushed %s: %s were not there yet\n", dir, humanize.IBytes(uint64(bars.total())))
				fmt.Fprintf(cmd.OutOrStdout(), "%s@%s\n", name, version)
				return nil
			})
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
			return flags.with(cmd, func(ctx context.Context, store *objstore.Store) error {
				v, err := depot.Open(ctx, store, name, version, logger(ctx))
				if err != nil {
					return err
				}
				if err := pullImage(ctx, v, dir); err != nil {
					return fmt.Errorf("pull image %q: %w", name, err)
				}
				fmt.Fprintf(cmd.ErrOrStderr(), "Pulled %s@%s, of %s, to %s\n", v.Name, v.ID, v.Taken.Format(time.RFC3339), dir)
				return nil
			})
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

// imageRow is what list says of a version of an image.
type imageRow struct {
	Image    string    `json:"image"`
	Version  string    `json:"version"`
	Versions int       `json:"versions"`
	Taken    time.Time `json:"taken"`
	Size     int64     `json:"size"` // bytes, of all devices
}

// listImages are the newest versions of all images, or all of one.
func listImages(ctx context.Context, store *objstore.Store, only string) ([]imageRow, error) {
	all, err := depot.Images(ctx, store)
	if err != nil {
		return nil, err
	}
	rows := []imageRow{}
	for _, image := range all {
		shown := image.Versions[len(image.Versions)-1:]
		if only != "" {
			if image.Name != only {
				continue
			}
			shown = image.Versions
		}
		for _, version := range shown {
			v, err := depot.Open(ctx, store, image.Name, version, logger(ctx))
			if err != nil {
				return nil, err
			}
			r := imageRow{Image: image.Name, Version: version, Versions: len(image.Versions), Taken: v.Taken}
			for _, d := range v.Devices {
				r.Size += d.Size
			}
			rows = append(rows, r)
		}
	}
	if only != "" && len(rows) == 0 {
		return nil, fmt.Errorf("list image %q: %w in %v", only, depot.ErrNoImage, store.Location())
	}
	return rows, nil
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
			only := ""
			if len(args) == 1 {
				only = args[0]
			}
			return flags.with(cmd, func(ctx context.Context, store *objstore.Store) error {
				rows, err := listImages(ctx, store, only)
				if err != nil {
					return err
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
			})
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
			return flags.with(cmd, func(ctx context.Context, store *objstore.Store) error {
				n, err := depot.Remove(ctx, store, name, version)
				if err == nil {
					fmt.Fprintf(cmd.ErrOrStderr(), "Removed %d versions of image %q\n", n, name)
				}
				return err
			})
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
			return flags.with(cmd, func(ctx context.Context, store *objstore.Store) error {
				c, err := store.Collect(ctx, opts)
				if err != nil {
					return err
				}
				verb := "Removed"
				if opts.DryRun {
					verb = "Would remove"
				}
				fmt.Fprintf(cmd.OutOrStdout(), "%s %d objects with %s, and %d records of VMs that have ended; %d objects with %s are needed, and %d are too young to tell\n", verb,
					c.Garbage, humanize.IBytes(uint64(c.GarbageBytes)), c.Expired, c.Lists+c.Chunks, humanize.IBytes(uint64(c.Bytes)), c.Young)
				return nil
			})
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
