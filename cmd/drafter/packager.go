package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/schollz/progressbar/v3"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/drafter-vm/drafter/pkg/runner"
	"github.com/drafter-vm/drafter/pkg/vmpackage"
)

// packagerDevice is an element of the packager's --devices.
type packagerDevice struct {
	Name string `json:"name"`
	Path string `json:"path"`
}

type packagerOptions struct {
	packagePath string
	devices     string
	extract     bool
	level       string
	concurrency int
}

func newPackagerCommand() *cobra.Command {
	var opts packagerOptions
	cmd := &cobra.Command{
		Use:   "packager",
		Short: "Pack a VM's devices into one file, or extract them",
		Long: `Pack the devices of a VM into one .tar.zst, with a manifest of sizes, digests and the machine they belong to; or,
with --extract, verify such a file and write devices of it to the paths given. Holes are neither stored nor lost.

Each device is {"name":NAME,"path":PATH}. Known names are ` + strings.Join(vmpackage.KnownNames(), ", ") + `; any other is an
additional disk. Extraction writes the devices that are named and no others.

GNU tar reads the file too: 'tar -xf PACKAGE' makes a folder that 'drafter peer --package' starts from.

Exit statuses: 0 success; 1 the package or a device cannot be used, and nothing was written; 2 the command line cannot be
used; 130 ended by a signal, and nothing was written.`,
		Example: `  drafter packager --package-path out/app.tar.zst --devices '[
    {"name":"state","path":"out/package/state.bin"},
    {"name":"memory","path":"out/package/memory.bin"},
    {"name":"kernel","path":"out/package/vmlinux"},
    {"name":"initrd","path":"out/package/initrd.img"},
    {"name":"disk","path":"out/package/rootfs.ext4"},
    {"name":"config","path":"out/package/config.json"}]'`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return runPackager(cmd, opts) },
	}
	flags := cmd.Flags()
	flags.StringVar(&opts.packagePath, "package-path", "out/app.tar.zst", "the package file to write, or with --extract to read")
	flags.StringVar(&opts.devices, "devices", "", `devices to pack or extract, a JSON array: [{"name":"disk","path":"out/package/rootfs.ext4"},…]`)
	flags.BoolVar(&opts.extract, "extract", false, "extract the devices instead of packing them")
	flags.StringVar(&opts.level, "compression-level", vmpackage.LevelFastest.String(), "how hard to compress: fastest, default, better or best")
	flags.IntVar(&opts.concurrency, "concurrency", 0, "cores to use (0: all)")
	return cmd
}

func runPackager(cmd *cobra.Command, opts packagerOptions) error {
	if opts.packagePath == "" {
		return usageErrorf("--package-path is empty; give the package file")
	}
	if opts.devices == "" {
		return usageErrorf(`--devices is missing; give the devices as [{"name":"disk","path":"out/package/rootfs.ext4"},…]`)
	}
	if opts.concurrency < 0 {
		return usageErrorf("--concurrency %d is negative", opts.concurrency)
	}
	level, err := vmpackage.ParseLevel(opts.level)
	if err != nil {
		return usageErrorf("--compression-level: %w", err)
	}
	decoded, err := decodeDevices[packagerDevice](opts.devices)
	if err != nil {
		return err
	}
	var devices []vmpackage.File
	for _, d := range decoded {
		if d.Path == "" {
			return usageErrorf(`--devices: device %q has no "path"`, d.Name)
		}
		devices = append(devices, vmpackage.File(d))
	}

	bar := newStageBar(cmd.ErrOrStderr())
	defer bar.end()
	if !opts.extract {
		made, err := runner.MakeFolders(filepath.Dir(opts.packagePath), 0o755)
		if err != nil {
			runner.RemoveFolders(made)
			return fmt.Errorf("make folder for --package-path: %w", err)
		}
		m, err := vmpackage.Pack(cmd.Context(), opts.packagePath, devices,
			vmpackage.PackOptions{Level: level, Concurrency: opts.concurrency, Progress: bar.show})
		if err != nil {
			runner.RemoveFolders(made)
			return interrupted(cmd, err)
		}
		bar.end()
		fmt.Fprintf(cmd.ErrOrStderr(), "packed %s into %s\n", strings.Join(m.Names(), ", "), opts.packagePath)
		return nil
	}
	result, err := vmpackage.Extract(cmd.Context(), opts.packagePath, devices,
		vmpackage.ExtractOptions{Concurrency: opts.concurrency, Progress: bar.show})
	switch {
	case errors.Is(err, vmpackage.ErrCorrupt):
		return fmt.Errorf("%w: fetch it again, or pack it again where it was made", err)
	case errors.Is(err, vmpackage.ErrNotPackage):
		return fmt.Errorf("%w: give a file that drafter packager has written", err)
	case err != nil:
		return interrupted(cmd, err)
	}
	if dir := filepath.Dir(devices[0].Path); len(result.Ignored) == 0 && inFolder(dir, devices) {
		// All of the package, in one folder: with a manifest it is one that peers start from. The files have their names by
		// now, so a signal comes too late.
		if _, err := vmpackage.WriteManifest(context.WithoutCancel(cmd.Context()), dir, devices, vmpackage.ManifestOptions{Concurrency: opts.concurrency, Progress: bar.show}); err != nil {
			return err
		}
	}
	bar.end()
	for _, d := range devices {
		fmt.Fprintf(cmd.ErrOrStderr(), "extracted %s to %s\n", d.Name, d.Path)
	}
	if len(result.Ignored) > 0 {
		fmt.Fprintf(cmd.ErrOrStderr(), "left in the package, not named in --devices: %s\n", strings.Join(result.Ignored, ", "))
	}
	return nil
}

// inFolder reports whether all devices lie in dir itself.
func inFolder(dir string, devices []vmpackage.File) bool {
	for _, d := range devices {
		if filepath.Dir(d.Path) != dir {
			return false
		}
	}
	return true
}

// interrupted turns an error that a signal caused into errInterrupted.
func interrupted(cmd *cobra.Command, err error) error {
	if err != nil && cmd.Context().Err() != nil {
		return fmt.Errorf("%w: %w", errInterrupted, err)
	}
	return err
}

// stageBar shows the stages of a long task, one bar each, if it is watched on a terminal.
type stageBar struct {
	out   io.Writer // nil: nobody watches
	bar   *progressbar.ProgressBar
	stage vmpackage.Stage
}

func newStageBar(out io.Writer) *stageBar {
	if f, ok := out.(*os.File); !ok || !term.IsTerminal(int(f.Fd())) {
		out = nil
	}
	return &stageBar{out: out}
}

func (b *stageBar) show(p vmpackage.Progress) {
	if b.out == nil {
		return
	}
	if b.bar == nil || p.Stage != b.stage {
		b.end()
		b.stage = p.Stage
		b.bar = progressbar.NewOptions64(p.Total, progressbar.OptionSetWriter(b.out), progressbar.OptionSetDescription(string(p.Stage)),
			progressbar.OptionShowBytes(true), progressbar.OptionThrottle(100*time.Millisecond), progressbar.OptionClearOnFinish())
	}
	b.bar.Set64(p.Done) // fails only when the terminal does
}

// end removes the bar, if there is one.
func (b *stageBar) end() {
	if b.bar != nil {
		b.bar.Clear()
		b.bar = nil
	}
}
