package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/drafter-vm/drafter/pkg/migrate"
	"github.com/drafter-vm/drafter/pkg/peer"
	"github.com/drafter-vm/drafter/pkg/runner"
	"github.com/drafter-vm/drafter/pkg/transport"
)

type mounterOptions struct {
	mount       string
	devices     string
	packagePath string
	instance    string
	links
	concurrency int
	rescue      time.Duration
	report      string
}

func newMounterCommand() *cobra.Command {
	var opts mounterOptions
	cmd := &cobra.Command{
		Use:   "mounter",
		Short: "Show the devices of a VM that nothing runs as files, and migrate it to and from peers",
		Long: `Show the devices of a VM as files in a folder, each named as the device, through FUSE. Nothing runs the VM meanwhile; what
is written to the files is in it when a peer resumes it.

  without --raddr   mount the VM in a package or instance
  with --raddr      receive it from the peer that listens there, then mount it
  with --laddr      then let a peer, terminator or mounter take it over; this one ends when that has happened

Ctrl-C unmounts and leaves the VM saved in its files.

The short way gives --package: the folder of the package, which is changed in place, or with --instance keeps what it has and
gets its changes as overlays in that folder. With --raddr and without --instance it is a folder to be made. The long way
gives --devices, as for drafter peer.

A guest that is resumed remembers what it has read. Do not change a file system under it that it has mounted, except for
what it has not read and will not write before it reads it.

Exit statuses: 0 the VM was handed over, or is saved in its files; 1 something failed; 2 the command line cannot be used; 130
ended by a signal before the devices were mounted.`,
		Example: `  drafter mounter --package out/package --mount out/mnt
  drafter mounter --raddr localhost:1337 --package out/received --mount out/mnt --laddr localhost:1338`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return runMounter(cmd, opts) },
	}
	flags := cmd.Flags()
	flags.StringVar(&opts.mount, "mount", "out/mnt", "folder to mount the devices at; made if it does not exist")
	flags.StringVar(&opts.devices, "devices", "", "devices of the VM, a JSON array, instead of --package")
	flags.StringVar(&opts.packagePath, "package", "out/package", "folder of the package; with --raddr and without --instance, one that does not exist")
	flags.StringVar(&opts.instance, "instance", "", "with --package: folder for overlays (empty: write to the package itself)")
	opts.links.registerBothWays(flags)
	flags.StringVar(&opts.raddr, "raddr", "", "address of the peer to receive the VM from (empty: mount what is here)")
	flags.StringVar(&opts.laddr, "laddr", "", "address to hand the VM over at (empty: it stays)")
	flags.IntVar(&opts.concurrency, "concurrency", 1024, "most workers of a migration; more than 64 are not used")
	flags.DurationVar(&opts.rescue, "rescue-timeout", time.Minute, "how long rolling back may take, and the other side of a migration is looked for when the link is lost")
	flags.StringVar(&opts.report, "report", "", "file to write the reports of migrations to, one JSON object a line")
	return cmd
}

func runMounter(cmd *cobra.Command, opts mounterOptions) error {
	ctx, log, out := cmd.Context(), logger(cmd.Context()), cmd.ErrOrStderr()
	changed := cmd.Flags().Changed
	switch {
	case changed("devices") && (changed("package") || changed("instance")):
		return usageErrorf("--devices excludes --package and --instance")
	case changed("devices") && opts.devices == "":
		return usageErrorf("--devices is empty: give the devices as a JSON array, or leave it out")
	case opts.packagePath == "":
		return usageErrorf("--package is empty: give the folder of the package")
	case opts.mount == "":
		return usageErrorf("--mount is empty: give the folder to mount the devices at")
	case opts.concurrency < 1:
		return usageErrorf("--concurrency %d: give at least 1", opts.concurrency)
	case opts.rescue <= 0:
		return usageErrorf("--rescue-timeout %s: give a time above zero", opts.rescue)
	}
	if err := opts.check(ctx, cmd.Flags(), cmd.InOrStdin(), cmd.OutOrStdout()); err != nil {
		return err
	}
	cfg := peer.MounterConfig{Mount: opts.mount, Concurrency: opts.concurrency, RescueTimeout: opts.rescue, Logger: log}
	var err error
	switch {
	case opts.devices != "" || opts.instance != "":
		source := deviceSource{devices: opts.devices, packagePath: cond(opts.devices == "", opts.packagePath), instance: opts.instance}
		if cfg.Devices, err = source.open(); err != nil {
			return err
		}
	default:
		cfg.Dir = opts.packagePath
	}

	var listener net.Listener
	if opts.laddr != "" {
		if listener, err = opts.listen(ctx, "laddr", opts.laddr); err != nil {
			return err
		}
		defer listener.Close()
	}
	reports, err := openReports(opts.report)
	if err != nil {
		return fmt.Errorf("--report: %w", err)
	}
	defer reports.close()

	var lobby *peer.Lobby // opened when there is something to be had
	cfg.FindSource = opts.redial()
	if !transport.Single(opts.laddr) {
		cfg.FindDestination = func(ctx context.Context) ([]io.ReadWriter, error) { return lobby.Rejoin(ctx) }
	}
	open := func() {
		if listener != nil && lobby == nil {
			lobby = peer.NewLobby(listener, log)
			fmt.Fprintf(out, "Serving on %s\n", opts.serving(lobby.Addr()))
		}
	}
	defer func() {
		if lobby != nil {
			lobby.Close()
		}
	}()
	for {
		// One that was given away, here or by a mounter that died, is the other's to ask for.
		switch g, err := cfg.OpenGiven(ctx); {
		case err == nil && (listener == nil || cfg.FindDestination == nil):
			g.Close()
			opts.raddr = "" // startMounter says what can be done
		case err == nil:
			open()
			switch end, err := serveGiven(ctx, g, reports, out); {
			case end == givenAway || err != nil:
				return interrupted(cmd, err)
			case end == givenLeft:
				return leave(cmd)
			}
			opts.raddr = "" // it is here
		case !errors.Is(err, runner.ErrNotGiven):
			return interrupted(cmd, err)
		}
		m, err := startMounter(ctx, cfg, &opts.links, reports, out)
		if err != nil {
			return interrupted(cmd, err)
		}
		fmt.Fprintf(out, "Mounted %s at %s\n", strings.Join(m.Names(), ", "), m.Dir())
		open()
		var arrivals <-chan peer.Arrival
		if lobby != nil {
			arrivals = lobby.New
		}
		err = serveMounter(ctx, m, arrivals, reports, out)
		doubt := errors.Is(err, migrate.ErrInDoubt) || errors.Is(err, migrate.ErrUnsettled)
		err = errors.Join(err, m.Close())
		if !doubt || cfg.FindDestination == nil || ctx.Err() != nil {
			return err
		}
		fmt.Fprintf(out, "%v\n", err)
	}
}

// cond is v if it is wanted.
func cond(wanted bool, v string) string {
	if wanted {
		return v
	}
	return ""
}

// startMounter mounts the VM, from here or from a peer.
func startMounter(ctx context.Context, cfg peer.MounterConfig, source *links, reports *reports, out io.Writer) (*peer.Mounter, error) {
	if source.raddr == "" {
		m, err := peer.OpenMounter(ctx, cfg)
		if errors.Is(err, runner.ErrNotSaved) {
			err = fmt.Errorf("%w (a VM can be mounted when it is saved)", err)
		}
		return m, err
	}
	conns, err := source.dialFirst(ctx)
	if err != nil {
		return nil, err
	}
	m, report, err := peer.ReceiveMounter(ctx, cfg, conns)
	if err := reports.write(report); err != nil {
		cfg.Logger.Error("could not write the report of a migration", "error", err)
	}
	if err != nil {
		return nil, fmt.Errorf("receive from %q: %w", transport.Redacted(source.raddr), err)
	}
	fmt.Fprintf(out, "Received VM: %s\n", summary(report))
	return m, nil
}

// serveMounter waits until the VM is handed over, the folder unmounted, or a signal arrives.
func serveMounter(ctx context.Context, m *peer.Mounter, arrivals <-chan peer.Arrival, reports *reports, out io.Writer) error {
	for {
		select {
		case <-ctx.Done():
			fmt.Fprintf(out, "Closing: the VM stays saved in its files\n")
			return nil
		case <-m.Done():
			fmt.Fprintf(out, "The folder was unmounted; the VM stays saved in its files\n")
			return nil
		case a := <-arrivals:
			var report *migrate.Report
			err := a.Err
			if err == nil {
				report, err = m.Send(ctx, a.Streams)
				a.Close()
			}
			if errors.Is(err, peer.ErrStranger) {
				logger(ctx).Warn("refused a connection, the VM stays here", "from", a.From, "reason", err)
				continue
			}
			if err := reports.write(report); err != nil {
				logger(ctx).Error("could not write the report of a migration", "error", err)
			}
			switch {
			case err == nil && !m.Sent():
				fmt.Fprintf(out, "Sent a copy of the VM to %s: %s\n", a.From, summary(report))
			case err == nil:
				fmt.Fprintf(out, "Sent VM to %s: %s\n", a.From, summary(report))
				return nil
			case m.Sent():
				return fmt.Errorf("send to %s: %w", a.From, err)
			default:
				fmt.Fprintf(out, "Migration to %s failed, the VM stays here: %v\n", a.From, err)
			}
		}
	}
}
