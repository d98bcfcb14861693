package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/drafter-vm/drafter/pkg/blueprint"
	"github.com/drafter-vm/drafter/pkg/oci"
	"github.com/drafter-vm/drafter/pkg/runner"
	"github.com/drafter-vm/drafter/pkg/snapshot"
	"github.com/drafter-vm/drafter/pkg/vmpackage"
)

// ociDevice is the device of a package that holds its first container.
const ociDevice = "oci"

// buildOptions are the flags of oci build.
type buildOptions struct {
	machineFlags
	image         imageFlags
	setting       settingFlags
	disk          string // where the disk alone goes
	size          string
	memory        string
	cpuCount      int
	mac           string
	disks         []string // NAME=FILE
	blueprintDir  string
	agent         string
	cache, mirror string
}

func newOCIBuildCommand() *cobra.Command {
	var opts buildOptions
	cmd := &cobra.Command{
		Use:   "build IMAGE [PACKAGE]",
		Short: "Make a package of an image, which resumes with the application serving",
		Long: `Make a package of an OCI image, a folder: the image becomes a disk, a guest boots that runs it, and is written down once the application is
ready (--ready). Whoever resumes the package has the application serving at once. Without PACKAGE only the disk is made.

The guest is a Debian with crun: 'drafter blueprint --oci', which is built into out/blueprint-oci when it is not there. It needs a tap interface in
a network namespace, as 'drafter nat' makes them, unless --interface is empty.

A volume of --mount becomes a disk of the package with its name, which has at first what the image has there. --disk adds another: a
container of its own, if 'drafter oci pack' has made it.

Exit statuses: 0 success; 1 nothing was made; 2 the command line cannot be used; 130 ended by a signal, nothing was made.`,
		Example: `  drafter oci build --netns ark0 --memory 512M valkey/valkey:8 out/valkey
  drafter oci build --env GREETING=hi --mount data:/data --ready log:listening oci:layout:latest out/web
  drafter peer --package out/valkey --instance out/instance-0 --netns ark0`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) < 1 || len(args) > 2 {
				return usageErrorf("give one IMAGE, and the folder of the PACKAGE to make; there are %d arguments", len(args))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 1 {
				return buildDisk(cmd, opts, args[0])
			}
			return buildPackage(cmd, opts, args[0], args[1])
		},
	}
	flags := cmd.Flags()
	opts.register(flags)
	offerMachine(cmd)
	const patience = 3 * time.Minute // an application may take long to be ready
	opts.resumeTimeout = patience
	flags.Lookup("resume-timeout").DefValue = patience.String()
	flags.Lookup("resume-timeout").Usage = "how long to wait until the application is ready"
	flags.Lookup("interface").Usage = "tap interface in the network namespace (empty: a guest without network)"
	opts.image.register(flags)
	opts.setting.register(flags, true)
	flags.StringVar(&opts.disk, "disk-output", defaultOCIDisk, "`file` of the disk, without a PACKAGE")
	flags.StringVar(&opts.size, "size", "", "size of the image's disk, such as 2G (default: what the image takes, and 0.5 GiB or more)")
	flags.StringVar(&opts.memory, "memory", "1G", "memory of the machine, such as 512M")
	flags.IntVar(&opts.cpuCount, "cpu-count", 1, "virtual CPUs")
	flags.StringVar(&opts.mac, "mac", "02:0e:d9:fd:68:3d", "MAC address of the guest's interface")
	flags.StringArrayVar(&opts.disks, "disk", nil, "`NAME=FILE` of an additional disk (repeatable)")
	flags.StringVar(&opts.blueprintDir, "blueprint", "", "`folder` of the guest's blueprint, to be used as it is (default: out/blueprint-oci, made or brought up to date)")
	flags.StringVar(&opts.agent, "agent", "", "`path` of the guest's program, for the blueprint (default drafter-agent beside this program, else in PATH)")
	registerTools(flags, &opts.cache, &opts.mirror)
	return cmd
}

// openBundle makes a bundle of an image, and brings the tools for its disks.
func (o *buildOptions) openBundle(ctx context.Context, image string, s oci.Settings, show *stages) (_ *oci.Bundle, _ oci.DiskOptions, err error) {
	disk := oci.DiskOptions{Progress: show.oci}
	limits, err := o.image.limits()
	if err != nil {
		return nil, disk, err
	}
	if disk.Size, err = parseDiskSize(o.size); err != nil {
		return nil, disk, usageErrorf("--size: %w", err)
	}
	i, err := oci.Open(ctx, image, o.image.open)
	if err != nil {
		return nil, disk, err
	}
	defer i.Close()
	tools, err := blueprint.OpenTools(ctx, blueprint.Config{Cache: o.cache, Mirror: o.mirror, Progress: show.blueprint, Logger: logger(ctx)})
	if err != nil {
		return nil, disk, err
	}
	disk.Mke2fs, disk.Debugfs = tools.Mke2fs, tools.Debugfs
	b, err := i.Bundle(ctx, oci.BundleOptions{Settings: s, Limits: limits, Progress: show.oci})
	return b, disk, err
}

// buildDisk makes the disk of an image.
func buildDisk(cmd *cobra.Command, opts buildOptions, image string) error {
	s, err := opts.setting.read()
	if err != nil {
		return err
	}
	show := newStages(cmd.ErrOrStderr())
	defer show.end()
	b, disk, err := opts.openBundle(cmd.Context(), image, s, show)
	if err != nil {
		return interrupted(cmd, err)
	}
	defer b.Close()
	volumes, err := writeVolumes(cmd, b, s, filepath.Dir(opts.disk), disk)
	if err == nil {
		err = b.WriteDisk(cmd.Context(), opts.disk, disk)
	}
	if err != nil {
		return interrupted(cmd, err)
	}
	show.end()
	fmt.Fprintf(cmd.ErrOrStderr(), "Built %s into %s\n", image, strings.Join(append([]string{opts.disk}, volumes...), ", "))
	return nil
}

// checkPackage refuses what could not become a package, before anything is begun.
func (o *buildOptions) checkPackage(s oci.Settings, out string) (memory int64, more []snapshot.Device, err error) {
	if memory, err = parseDiskSize(o.memory); err != nil || memory%(1<<20) != 0 {
		return 0, nil, usageErrorf("--memory %q: give a size in whole MiB, such as 512M", o.memory)
	}
	if o.cpuCount < 1 {
		return 0, nil, usageErrorf("--cpu-count %d: give at least 1", o.cpuCount)
	}
	if o.iface == "" {
		o.mac, o.netns = "", ""
	} else if mac, err := net.ParseMAC(o.mac); err != nil || len(mac) != 6 || mac[0]&1 != 0 {
		return 0, nil, usageErrorf("--mac %q is no address of an Ethernet interface, like 02:0e:d9:fd:68:3d", o.mac)
	}
	if len(o.vfio) > 0 {
		return 0, nil, usageErrorf("--vfio %s: the state of a device of the host cannot be written down, so its VM cannot be made a package", o.vfio[0])
	}
	if arch := o.image.open.Architecture; arch != "" && arch != "amd64" {
		return 0, nil, usageErrorf("--architecture %s: the guest is amd64; without PACKAGE a disk is made of any", arch)
	}
	o.image.open.Architecture = "amd64"
	seen := vmpackage.KnownNames()
	for _, v := range s.Volumes() {
		if err := vmpackage.CheckName(v.Source); err != nil || slices.Contains(seen, v.Source) {
			return 0, nil, usageErrorf("--mount: volume %q becomes a disk of that name, and cannot: use lower-case letters and digits, and none of %s", v.Source, strings.Join(seen, ", "))
		}
		seen = append(seen, v.Source)
	}
	for _, d := range o.disks {
		name, file, ok := strings.Cut(d, "=")
		if err := vmpackage.CheckName(name); !ok || err != nil || file == "" {
			return 0, nil, usageErrorf("--disk %q: give NAME=FILE, the name in lower-case letters and digits", d)
		}
		if slices.Contains(seen, name) {
			return 0, nil, usageErrorf("--disk %q: there is a device of that name", d)
		}
		if !isFile(file) {
			return 0, nil, fmt.Errorf("--disk %q: there is no file %q", d, file)
		}
		seen = append(seen, name)
		more = append(more, snapshot.Device{Name: name, Input: file, Output: filepath.Join(out, vmpackage.DefaultFile(name))})
	}
	return memory, more, o.check()
}

// buildPackage makes a package of an image.
func buildPackage(cmd *cobra.Command, opts buildOptions, image, out string) (err error) {
	ctx := cmd.Context()
	s, err := opts.setting.read()
	if err != nil {
		return err
	}
	memory, more, err := opts.checkPackage(s, out)
	if err != nil {
		return err
	}
	if entries, err := os.ReadDir(out); err == nil && len(entries) > 0 {
		return fmt.Errorf("folder %q is there, and not empty: give another for the package, or remove it", out)
	}
	backend, _, err := opts.backend(cmd)
	if err != nil {
		return err
	}
	show := newStages(cmd.ErrOrStderr())
	defer show.end()

	base, err := opts.blueprint(cmd, show)
	if err != nil {
		return interrupted(cmd, err)
	}
	made, err := runner.MakeFolders(filepath.Dir(filepath.Clean(out)), 0o755)
	if err == nil {
		defer func() {
			if err != nil {
				runner.RemoveFolders(made)
			}
		}()
	}
	tmp, err := os.MkdirTemp(filepath.Dir(filepath.Clean(out)), ".oci-build-*")
	if err != nil {
		return fmt.Errorf("make folder for the disks: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(tmp)) }()
	devices, err := opts.packageDevices(cmd, image, s, base, tmp, out, show)
	if err != nil {
		return interrupted(cmd, err)
	}
	show.end()

	result, err := snapshot.Create(ctx, snapshot.Config{
		Backend: backend, Devices: append(devices, more...), Host: opts.host(cmd), CPUCount: opts.cpuCount, MemorySize: memory, Accel: opts.accel, MAC: opts.mac,
		LivenessVSockPort: snapshot.DefaultLivenessVSockPort, AgentVSockPort: snapshot.DefaultAgentVSockPort, ResumeTimeout: opts.resumeTimeout, Logger: logger(ctx),
		Progress: func(stage string) { show.show(stage, 0, -1) },
	})
	show.end()
	if err != nil {
		return interrupted(cmd, err)
	}
	fmt.Fprintf(cmd.ErrOrStderr(), "Ready after %s, wrote the package to %s; drafter peer --package %s --instance %s starts it\n", result.BootTime.Round(10*time.Millisecond), out, out, filepath.Join("out", "instance-"+filepath.Base(filepath.Clean(out))))
	return nil
}

// blueprint is the folder of the guest's blueprint, which is built if need be.
func (o *buildOptions) blueprint(cmd *cobra.Command, show *stages) (string, error) {
	if o.blueprintDir != "" {
		return o.blueprintDir, nil
	}
	agent := o.agent
	if agent == "" {
		var err error
		if agent, err = findAgent(); err != nil {
			return "", err
		}
	}
	dir := filepath.Join("out", "blueprint-oci")
	_, err := blueprint.Build(cmd.Context(), blueprint.Config{Output: dir, Agent: agent, OCI: true, Cache: o.cache, Mirror: o.mirror, Progress: show.blueprint, Logger: logger(cmd.Context())})
	return dir, err
}

// packageDevices makes the disks of an image in tmp, and says which devices the package has.
func (o *buildOptions) packageDevices(cmd *cobra.Command, image string, s oci.Settings, base, tmp, out string, show *stages) ([]snapshot.Device, error) {
	b, disk, err := o.openBundle(cmd.Context(), image, s, show)
	if err != nil {
		return nil, err
	}
	defer b.Close()
	var devices []snapshot.Device
	for _, name := range vmpackage.KnownNames() {
		d := snapshot.Device{Name: name, Output: filepath.Join(out, vmpackage.DefaultFile(name))}
		switch name {
		case runner.StateDevice, runner.MemoryDevice, runner.ConfigDevice:
		case ociDevice:
			d.Input = filepath.Join(tmp, vmpackage.DefaultFile(name))
			if err := b.WriteDisk(cmd.Context(), d.Input, disk); err != nil {
				return nil, err
			}
		default:
			d.Input = filepath.Join(base, vmpackage.DefaultFile(name))
			if !isFile(d.Input) {
				return nil, fmt.Errorf("blueprint %q has no %s: 'drafter blueprint --oci --output %s' makes it", base, vmpackage.DefaultFile(name), base)
			}
		}
		devices = append(devices, d)
	}
	for _, v := range s.Volumes() {
		d := snapshot.Device{Name: v.Source, Input: filepath.Join(tmp, vmpackage.DefaultFile(v.Source)), Output: filepath.Join(out, vmpackage.DefaultFile(v.Source))}
		if err := b.WriteVolume(cmd.Context(), d.Input, v, disk); err != nil {
			return nil, err
		}
		devices = append(devices, d)
	}
	return devices, nil
}
