package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"mvdan.cc/sh/v3/shell"

	"github.com/drafter-vm/drafter/pkg/blueprint"
	"github.com/drafter-vm/drafter/pkg/oci"
)

// Where an image is unpacked to, and its disk goes, by default.
var (
	defaultBundle  = filepath.Join("out", "oci-runtime-bundle")
	defaultOCIDisk = filepath.Join("out", "blueprint", "oci.ext4")
)

// newOCICommand is `drafter oci`.
func newOCICommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "oci",
		Short: "Make a VM of an OCI image",
		Long: `Make a virtual machine of an OCI image, as docker and podman run them: 'build' in one step, a package that resumes with the
application serving; or 'unpack', look at and edit the bundle, and 'pack', a disk for the snapshotter.

None of it needs docker, and but for running the machine, none needs root.

An IMAGE is docker://NAME[:TAG|@DIGEST] in a registry, oci:FOLDER[:TAG] with the OCI layout, oci-archive:FILE[:TAG],
docker-archive:FILE[:NAME:TAG] as docker save writes it, or containers-storage:NAME or docker-daemon:NAME of this host. Without such a
beginning it is a file or folder if there is one of that name, else in a registry: valkey/valkey:8.

Credentials for registries are those of 'docker login' and 'podman login', and of credential helpers.`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usageErrorf("unknown command %q; 'drafter oci --help' lists them", args[0])
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newOCIUnpackCommand(), newOCIPackCommand(), newOCIBuildCommand(), newOCIMountCommand(), newOCIRunCommand())
	return cmd
}

// imageFlags say how an image is found and how much of it may come of it.
type imageFlags struct {
	open       oci.OpenOptions
	maxSize    string
	maxEntries int
}

func (f *imageFlags) register(flags *pflag.FlagSet) {
	flags.StringVar(&f.open.Architecture, "architecture", "", "`architecture` of the image, such as amd64 or arm64/v8 (default: this machine's)")
	if flags.Lookup("plain-http") == nil { // it is a peer's, too
		flags.BoolVar(&f.open.PlainHTTP, "plain-http", false, "talk to the registry without TLS (on this host that is tried anyway)")
	}
	flags.StringVar(&f.maxSize, "max-size", "16G", "most that the image's files may have")
	flags.IntVar(&f.maxEntries, "max-entries", 2_000_000, "most files that the image may have")
}

func (f *imageFlags) limits() (oci.Limits, error) {
	size, err := parseDiskSize(f.maxSize)
	if err != nil {
		return oci.Limits{}, usageErrorf("--max-size: %w", err)
	}
	if f.maxEntries <= 0 {
		return oci.Limits{}, usageErrorf("--max-entries %d: give a number above 0", f.maxEntries)
	}
	return oci.Limits{Size: size, Entries: f.maxEntries}, nil
}

// settingFlags change what an image or a bundle says of itself.
type settingFlags struct {
	settings            oci.Settings
	mounts              []string
	entrypoint, command string
}

func (f *settingFlags) register(flags *pflag.FlagSet, image bool) {
	s := &f.settings
	if flags.Lookup("env") == nil { // it is a peer's, too
		flags.StringArrayVar(&s.Env, "env", nil, "`NAME=VALUE` for the application's environment (repeatable)")
	}
	flags.StringArrayVar(&f.mounts, "mount", nil, "`MOUNT`, as type=volume,source=data,target=/data,size=1G or data:/data[:ro]: a volume is an additional disk whose label is its source; types tmpfs and bind, of the guest's files, too (repeatable)")
	flags.StringVar(&s.Hostname, "hostname", "", "host `name` of the container (default: the machine's)")
	flags.StringVar(&s.Name, "name", "", "`name` of the container in the guest (default: that of its device)")
	flags.StringVar(&s.Restart, "restart", "", "when the application is started again: no, on-failure, on-failure:N or always (default on-failure)")
	flags.StringVar(&s.Ready, "ready", "", "when the application counts as up: started, port:N, log:REGEXP or notify, as sd_notify(3) (default: the first TCP port that the image says, else started)")
	flags.BoolVar(&s.ReadOnly, "read-only", false, "mount the container's root file system read-only")
	if image {
		flags.StringVar(&f.entrypoint, "entrypoint", "", "`command` line instead of the image's entrypoint and command: words as a shell has them, or a JSON array")
		flags.StringVar(&f.command, "cmd", "", "`arguments` instead of the image's command, as of --entrypoint")
		flags.StringVar(&s.User, "user", "", "`USER[:GROUP]` to run as, by name or number (default: the image's)")
		flags.StringVar(&s.WorkDir, "workdir", "", "working `directory` (default: the image's)")
	}
}

// read are the settings that the flags say.
func (f *settingFlags) read() (oci.Settings, error) {
	s := f.settings
	var err error
	if s.Entrypoint, err = parseWords(f.entrypoint); err != nil {
		return s, usageErrorf("--entrypoint: %w", err)
	}
	if s.Command, err = parseWords(f.command); err != nil {
		return s, usageErrorf("--cmd: %w", err)
	}
	for _, m := range f.mounts {
		mount, err := parseMount(m)
		if err != nil {
			return s, usageErrorf("--mount %q: %w", m, err)
		}
		s.Mounts = append(s.Mounts, mount)
	}
	if err := s.Check(); err != nil {
		return s, usageErrorf("%w", err)
	}
	return s, nil
}

// parseWords reads a command line, or a JSON array of its words. Of an empty one it returns nil.
func parseWords(s string) ([]string, error) {
	if s == "" {
		return nil, nil
	}
	var words []string
	if strings.HasPrefix(strings.TrimSpace(s), "[") {
		if err := json.Unmarshal([]byte(s), &words); err != nil {
			return nil, fmt.Errorf("%q is no JSON array of strings: %w", s, err)
		}
		return words, nil
	}
	words, err := shell.Fields(s, func(name string) string { return "$" + name })
	if err != nil {
		return nil, fmt.Errorf("%q: %w", s, err)
	}
	return words, nil
}

// parseMount reads a mount in docker's long form, or as SOURCE:TARGET[:ro].
func parseMount(s string) (oci.Mount, error) {
	m := oci.Mount{Type: oci.VolumeMount}
	if !strings.Contains(s, "=") {
		parts := strings.Split(s, ":")
		if len(parts) < 2 || len(parts) > 3 || len(parts) == 3 && parts[2] != "ro" && parts[2] != "rw" {
			return m, fmt.Errorf("give type=volume,source=data,target=/data or data:/data[:ro]")
		}
		m.Source, m.Target, m.ReadOnly = parts[0], parts[1], len(parts) == 3 && parts[2] == "ro"
		if path.IsAbs(m.Source) {
			m.Type = oci.BindMount
		}
		return m, nil
	}
	for field := range strings.SplitSeq(s, ",") {
		key, value, given := strings.Cut(field, "=")
		switch key {
		case "type":
			m.Type = value
		case "source", "src":
			m.Source = value
		case "target", "dst", "destination":
			m.Target = value
		case "readonly", "ro":
			if given && value != "true" && value != "false" {
				return m, fmt.Errorf("%s is true or false, not %q", key, value)
			}
			m.ReadOnly = value != "false"
		case "size", "tmpfs-size":
			var err error
			if m.Size, err = parseDiskSize(value); err != nil {
				return m, err
			}
		default:
			return m, fmt.Errorf("there is no %q: use type, source, target, readonly and size", key)
		}
	}
	return m, nil
}

func newOCIUnpackCommand() *cobra.Command {
	var (
		image     imageFlags
		settings  settingFlags
		output    string
		overwrite bool
	)
	cmd := &cobra.Command{
		Use:   "unpack IMAGE",
		Short: "Unpack an image to an OCI runtime bundle that one can edit",
		Long: `Unpack an image to an OCI runtime bundle: the folder rootfs, and config.json with the environment, the mounts, the command and
everything else of how it runs. Edit them, then 'drafter oci pack'.

As root, files have the owners, devices and attributes that the image says. As another user they are yours, and rootfs.json beside
config.json says what they are to be: 'drafter oci pack' makes them so.

Exit statuses: 0 success; 1 nothing was unpacked; 2 the command line cannot be used; 130 ended by a signal, nothing was unpacked.`,
		Example: `  drafter oci unpack valkey/valkey:8
  drafter oci unpack --env TZ=UTC --mount data:/data oci:layout:latest`,
		Args: oneImage,
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := settings.read()
			if err != nil {
				return err
			}
			limits, err := image.limits()
			if err != nil {
				return err
			}
			if output == "" {
				return usageErrorf("--output is empty: give the folder of the bundle")
			}
			if _, err := os.Lstat(output); err == nil && !overwrite {
				return fmt.Errorf("bundle %q is there, and may have been edited: --overwrite replaces it, --output names another", output)
			}
			show := newStages(cmd.ErrOrStderr())
			defer show.end()
			i, err := oci.Open(cmd.Context(), args[0], image.open)
			if err != nil {
				return interrupted(cmd, err)
			}
			defer i.Close()
			b, err := i.Bundle(cmd.Context(), oci.BundleOptions{Settings: s, Limits: limits, Progress: show.oci})
			if err != nil {
				return interrupted(cmd, err)
			}
			defer b.Close()
			if err := b.WriteFolder(cmd.Context(), output, overwrite); err != nil {
				return interrupted(cmd, err)
			}
			show.end()
			fmt.Fprintf(cmd.ErrOrStderr(), "Unpacked %s (%s) to %s\n", args[0], i.Digest, output)
			return nil
		},
	}
	image.register(cmd.Flags())
	settings.register(cmd.Flags(), true)
	cmd.Flags().StringVar(&output, "output", defaultBundle, "`folder` of the bundle")
	cmd.Flags().BoolVar(&overwrite, "overwrite", false, "replace a bundle that is there")
	return cmd
}

// oneImage refuses anything but one positional argument, an image.
func oneImage(cmd *cobra.Command, args []string) error {
	if len(args) != 1 {
		return usageErrorf("give one IMAGE, such as docker://valkey/valkey:8; there are %d", len(args))
	}
	return nil
}

func newOCIPackCommand() *cobra.Command {
	var (
		settings      settingFlags
		output, size  string
		cache, mirror string
	)
	cmd := &cobra.Command{
		Use:   "pack [BUNDLE]",
		Short: "Make the disk oci.ext4 of an OCI runtime bundle",
		Long: `Make a disk of an OCI runtime bundle: a folder with config.json and rootfs, by default out/oci-runtime-bundle, that 'drafter oci
unpack', umoci or podman has made. A guest of 'drafter blueprint --oci' runs it. Nothing is mounted, and it needs no root where one can read
the bundle; the owners of files come from rootfs.json, from umoci's attributes, and through the mappings of users in config.json.

A volume of --mount is made beside the disk, as NAME.img, with what the bundle has there, unless there is such a file.

Exit statuses: 0 success; 1 no disk was made; 2 the command line cannot be used; 130 ended by a signal, no disk was made.`,
		Example: `  drafter oci pack
  drafter oci pack --output out/web.ext4 --size 2G --restart always out/web-bundle`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 1 {
				return usageErrorf("give one BUNDLE, the folder; there are %d", len(args))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := settings.read()
			if err != nil {
				return err
			}
			bytes, err := parseDiskSize(size)
			if err != nil {
				return usageErrorf("--size: %w", err)
			}
			dir := defaultBundle
			if len(args) == 1 {
				dir = args[0]
			}
			show := newStages(cmd.ErrOrStderr())
			defer show.end()
			b, err := oci.OpenFolder(cmd.Context(), dir)
			if err != nil {
				return interrupted(cmd, err)
			}
			defer b.Close()
			if err := b.Set(s); err != nil {
				return err
			}
			tools, err := blueprint.OpenTools(cmd.Context(), blueprint.Config{Cache: cache, Mirror: mirror, Progress: show.blueprint, Logger: logger(cmd.Context())})
			if err != nil {
				return interrupted(cmd, err)
			}
			opts := oci.DiskOptions{Mke2fs: tools.Mke2fs, Debugfs: tools.Debugfs, Size: bytes, Progress: show.oci}
			volumes, err := writeVolumes(cmd, b, s, filepath.Dir(output), opts)
			if err == nil {
				err = b.WriteDisk(cmd.Context(), output, opts)
			}
			if err != nil {
				return interrupted(cmd, err)
			}
			show.end()
			fmt.Fprintf(cmd.ErrOrStderr(), "Packed %s into %s\n", dir, strings.Join(append([]string{output}, volumes...), ", "))
			return nil
		},
	}
	settings.register(cmd.Flags(), false)
	cmd.Flags().StringVar(&output, "output", defaultOCIDisk, "`file` of the disk")
	cmd.Flags().StringVar(&size, "size", "", "size of the disk, such as 2G (default: what the bundle takes, and 0.5 GiB or more)")
	registerTools(cmd.Flags(), &cache, &mirror)
	return cmd
}

// registerTools has flags for where mke2fs comes from.
func registerTools(flags *pflag.FlagSet, cache, mirror *string) {
	flags.StringVar(cache, "cache", "", "`folder` of downloads, as of drafter blueprint")
	flags.StringVar(mirror, "mirror", "", "`URL` of the Debian archive that mke2fs comes from (default as in /etc/apt)")
}

// writeVolumes makes the disks of volumes that are not there, in a folder, and returns their files.
func writeVolumes(cmd *cobra.Command, b *oci.Bundle, s oci.Settings, dir string, opts oci.DiskOptions) ([]string, error) {
	var files []string
	for _, v := range s.Volumes() {
		file := filepath.Join(dir, v.Source+".img")
		files = append(files, file)
		if _, err := os.Stat(file); err == nil {
			logger(cmd.Context()).Info("volume is there, and stays as it is", "volume", v.Source, "path", file)
			continue
		}
		if err := b.WriteVolume(cmd.Context(), file, v, opts); err != nil {
			return nil, err
		}
	}
	return files, nil
}
