package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/drafter-vm/drafter/pkg/peer"
	"github.com/drafter-vm/drafter/pkg/transport"
	"github.com/drafter-vm/drafter/pkg/vmpackage"
)

// terminatorDevice is an element of the terminator's --devices.
type terminatorDevice struct {
	Name   string `json:"name"`
	Output string `json:"output"`
}

type terminatorOptions struct {
	links
	packagePath string
	devices     string
	copy        bool
	settle      bool
	concurrency int
	rescue      time.Duration
	report      string
}

func newTerminatorCommand() *cobra.Command {
	var opts terminatorOptions
	cmd := &cobra.Command{
		Use:   "terminator",
		Short: "Receive a VM from a peer and write it down as a package, without running it",
		Long: `Take a running VM over from the peer that listens at --raddr, and write it down as a package instead of running it. The
peer ends when that has happened: from then on the VM is the package's, and whoever resumes it (drafter peer --package) goes
on where it was paused. With --copy the peer runs on, and the package is a backup of the VM: do not let both talk to the same
network.

The short way gives --package, a folder, which must not exist. The long way gives --devices, a JSON array of
{"name":NAME,"output":PATH}: all that the peer sends, and "state". None of the files may exist.

Nothing is written over, and nothing is left of a migration that fails: the VM then runs on at the peer. Only a terminator that
was killed leaves something. If the peer then keeps the VM paused, in doubt, the same command line with --settle tells it
whether the VM was written down or not; it is for a killed drafter mounter --raddr, too.

Exit statuses: 0 the package is written; 1 something failed; 2 the command line cannot be used; 130 ended by a signal, and
nothing was written.`,
		Example: `  drafter terminator --raddr localhost:1337 --package out/written
  drafter terminator --raddr localhost:1337 --package out/backup --copy`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return runTerminator(cmd, opts) },
	}
	flags := cmd.Flags()
	opts.links.register(flags)
	flags.StringVar(&opts.raddr, "raddr", "localhost:1337", "address of the peer to receive the VM from")
	flags.StringVar(&opts.packagePath, "package", "out/package", "folder of the package to write; it must not exist")
	flags.StringVar(&opts.devices, "devices", "", `files to write instead of --package, a JSON array: [{"name":"disk","output":"out/package/rootfs.ext4"},…]`)
	flags.BoolVar(&opts.copy, "copy", false, "write a copy, and let the VM run on at the peer")
	flags.BoolVar(&opts.settle, "settle", false, "only tell the peer what became of the VM, after a terminator was killed")
	flags.IntVar(&opts.concurrency, "concurrency", 1024, "most workers of the migration; more than 64 are not used")
	flags.DurationVar(&opts.rescue, "rescue-timeout", time.Minute, "how long the peer is looked for when the link is lost before it knows that the VM is here")
	flags.StringVar(&opts.report, "report", "", "file to write the report of the migration to, as one line of JSON")
	return cmd
}

func runTerminator(cmd *cobra.Command, opts terminatorOptions) error {
	ctx, log, out := cmd.Context(), logger(cmd.Context()), cmd.ErrOrStderr()
	changed := cmd.Flags().Changed
	switch {
	case changed("devices") && changed("package"):
		return usageErrorf("--devices and --package exclude each other")
	case changed("devices") && opts.devices == "":
		return usageErrorf("--devices is empty: give the devices as a JSON array, or leave it out")
	case opts.devices == "" && opts.packagePath == "":
		return usageErrorf("--package is empty: give the folder to write the package to")
	case opts.concurrency < 1:
		return usageErrorf("--concurrency %d: give at least 1", opts.concurrency)
	case opts.settle && opts.copy:
		return usageErrorf("--settle and --copy exclude each other: a copy is nobody's to settle")
	case opts.rescue <= 0:
		return usageErrorf("--rescue-timeout %s: give a time above zero", opts.rescue)
	case opts.raddr == "":
		return usageErrorf("--raddr is empty: give the address of the peer to receive the VM from")
	case opts.settle && transport.Single(opts.raddr):
		return usageErrorf("--settle needs an address that can be dialled again, and %s is not", transport.Redacted(opts.raddr))
	}
	if err := opts.check(ctx, cmd.Flags(), cmd.InOrStdin(), cmd.OutOrStdout()); err != nil {
		return err
	}
	t := peer.Terminator{Copy: opts.copy, Concurrency: opts.concurrency, RescueTimeout: opts.rescue, Logger: log}
	t.FindSource = opts.redial()
	where := opts.packagePath
	if opts.devices == "" {
		t.Dir = opts.packagePath
		if err := t.Check(); err != nil && !opts.settle {
			return fmt.Errorf("--package: %w", err)
		}
	} else {
		decoded, err := decodeDevices[terminatorDevice](opts.devices)
		if err != nil {
			return err
		}
		for _, d := range decoded {
			if d.Output == "" {
				return usageErrorf(`--devices: device %q has no "output"`, d.Name)
			}
			t.Devices = append(t.Devices, vmpackage.File{Name: d.Name, Path: d.Output})
		}
		if err := t.Check(); err != nil && !opts.settle {
			return usageErrorf("--devices: %w", err)
		}
		where = fmt.Sprintf("%d files", len(t.Devices))
	}
	if opts.settle {
		here, err := t.Settle(ctx)
		switch {
		case err != nil:
			return interrupted(cmd, err)
		case here:
			fmt.Fprintf(out, "The peer knows that the VM is in %s\n", where)
		default:
			fmt.Fprintf(out, "The peer knows that the VM did not get to %s, which can be removed, and runs it on\n", where)
		}
		return nil
	}
	bar := newStageBar(out)
	defer bar.end()
	t.Digesting = bar.show

	reports, err := openReports(opts.report)
	if err != nil {
		return fmt.Errorf("--report: %w", err)
	}
	defer reports.close()
	conns, err := opts.dialFirst(ctx)
	if err != nil {
		return interrupted(cmd, err)
	}
	manifest, report, err := t.Receive(ctx, conns)
	bar.end()
	if err := reports.write(report); err != nil {
		log.Error("could not write the report of a migration", "error", err)
	}
	if err != nil {
		return interrupted(cmd, fmt.Errorf("receive from %q: %w", transport.Redacted(opts.raddr), err))
	}
	what := "VM"
	if opts.copy {
		what = "a copy of the VM"
	}
	fmt.Fprintf(out, "Wrote %s to %s: %s\n", what, where, summary(report))
	if manifest == nil {
		fmt.Fprintf(out, "There is no manifest, as the files are not all in one folder\n")
	}
	return nil
}
