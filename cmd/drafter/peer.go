package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/drafter-vm/drafter/pkg/agent"
	"github.com/drafter-vm/drafter/pkg/control"
	"github.com/drafter-vm/drafter/pkg/migrate"
	"github.com/drafter-vm/drafter/pkg/peer"
	"github.com/drafter-vm/drafter/pkg/registry"
	"github.com/drafter-vm/drafter/pkg/runner"
	"github.com/drafter-vm/drafter/pkg/transport"
	"github.com/drafter-vm/drafter/pkg/vmm"
	"github.com/drafter-vm/drafter/pkg/vmpackage"
	"github.com/drafter-vm/drafter/pkg/wire"
)

type peerOptions struct {
	machineFlags
	links
	connections connectionFlags
	deviceSource
	depotFlags
	concurrency   int
	noPostcopy    bool
	maxDowntime   time.Duration
	maxTotalTime  time.Duration
	rescueTimeout time.Duration
	metrics       string
	profiles      bool
	control       string
	report        string
	boot          bool
	forceOwner    bool
	keepPoint     bool
	rollback      bool
	verify        bool
	clone         bool
	onDemand      bool
	recordSet     time.Duration
	hostName      string
	guest         agent.Network
	env           []string
}

func newPeerCommand() *cobra.Command {
	var opts peerOptions
	return refuseMachineFlags(peerCommand(&opts, &cobra.Command{
		Use:   "peer",
		Short: "Run an instance of a package, and migrate it to and from other peers",
		Long: `Run an instance, and migrate it live.

  without --raddr   resume the instance from its package, or from where it was closed
  with --raddr      receive it, running, from the peer that listens there
  with --laddr      then let another peer take it over; this one ends when that has happened

A package without memory (drafter snapshotter --shut-down, for devices of the host: --vfio) boots, and closing it shuts its guest down.

Closing a peer (Ctrl-C, SIGTERM) suspends the instance and saves it: into the overlays, or into the package's own files
where there are none. The next start goes on from there. An instance that runs here before all of it has arrived is saved
when all has.

An instance that died, with its VM, boots again from its disks (--boot). One that was started with --keep-commit-point can
return instead to what it was when it was resumed or received then (--rollback): its disk writes since are discarded.

The short way gives --package and --instance: a package's folder, and a folder for the instance's overlays. The long way
gives --devices, a JSON array of {"name","base","overlay","state","blockSize","expiry","maxDirtyBlocks","minCycles",
"maxCycles","cycleThrottle","makeMigratable","shared","sharedbase"}; times are in nanoseconds. A device that is kept in an object store
(--store-sync) can say in which, by {"s3sync","s3endpoint","s3secure","s3bucket","s3prefix","s3region","s3accesskey","s3secretkey",
"s3concurrency"}.

An instance can go on from another that was closed, beside others that do: --parent gives the folder of that. Of --devices, the key
"overlays" gives several overlays, the newest last: [{"overlay":PATH,"state":PATH},…]. Only the newest is written. Starting a parent
again leaves nothing to those that went on from it.

A migration copies everything once, then in cycles what was written meanwhile, until the rest is small enough for
--max-downtime, or cycles no longer make it less. For a device with any of maxDirtyBlocks, minCycles, maxCycles and
cycleThrottle, these decide instead: until minCycles in a row had at most maxDirtyBlocks, or maxCycles are done, or nothing
is dirty. All four zero disable copying before the switch, as far as possible.

Exit statuses: 0 the instance was closed and saved, handed over, or shut down by its guest; 1 something failed; 2 the
command line cannot be used; 130 ended by a signal, or by drafter ctl stop, before the instance ran.`,
		Example: `  drafter peer --package out/package --instance out/instance-0 --laddr localhost:1337
  drafter peer --package out/package --instance out/instance-1 --netns ark1 --raddr localhost:1337`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return runPeer(cmd, opts) },
	}))
}

// peerCommand gives a command the flags of a peer.
func peerCommand(opts *peerOptions, cmd *cobra.Command) *cobra.Command {
	flags := cmd.Flags()
	opts.machineFlags.register(flags)
	offerMachine(cmd)
	opts.links.registerBothWays(flags)
	opts.connections.register(flags)
	opts.depotFlags.register(flags)
	flags.StringVar(&opts.devices, "devices", "", "devices of the instance, a JSON array (default: out/package, with overlays in out/overlay and out/state)")
	flags.StringVar(&opts.packagePath, "package", "", "folder of the package, instead of --devices")
	flags.StringVar(&opts.instance, "instance", "", "with --package: folder for the instance's overlays (empty: write to the package itself)")
	flags.StringSliceVar(&opts.parents, "parent", nil, "with --instance: folder of a closed instance of the same package that this one goes on from; again for each, the oldest first")
	flags.StringVar(&opts.raddr, "raddr", "", "address of the peer to receive the instance from: HOST:PORT, or as docs/transports.md has them (empty: resume it here)")
	flags.StringVar(&opts.laddr, "laddr", "", "address to hand the instance over at: HOST:PORT, or as docs/transports.md has them (empty: it is not migratable)")
	flags.IntVar(&opts.concurrency, "concurrency", 1024, "most workers of a migration; more than 64 are not used")
	flags.BoolVar(&opts.noPostcopy, "disable-postcopy-migration", false, "have everything here before a received instance runs, rather than fetch what it touches")
	flags.DurationVar(&opts.maxDowntime, "max-downtime", 0, "how long the guest may stand still when it is sent; what needs longer is given up (0: aim at 20ms, and send what there is)")
	flags.DurationVar(&opts.maxTotalTime, "max-total-time", 0, "how long it may take to send the guest; what needs longer is given up (0: any time)")
	flags.DurationVar(&opts.rescueTimeout, "rescue-timeout", time.Minute, "how long the other peer of a migration is looked for when the link is lost, and how long saving and rolling back may take")
	flags.StringVar(&opts.metrics, "metrics", "", "address to serve Prometheus metrics at, as http://ADDRESS/metrics (empty: none)")
	flags.BoolVar(&opts.profiles, "pprof", false, "with --metrics: also serve profiles of this process there, under /debug/pprof/")
	flags.StringVar(&opts.control, "control", "", "unix socket to make for drafter ctl before anything else is begun, which this user and root can use (empty: none)")
	flags.StringVar(&opts.accept, "accept", "", "address to wait at for a peer that sends an instance (drafter ctl migrate), instead of --raddr")
	flags.StringVar(&opts.report, "report", "", "file to write the reports of migrations to, one JSON object a line")
	flags.BoolVar(&opts.boot, "boot", false, "boot the instance from its disks instead of resuming its memory: after a power loss (with --raddr: what had not arrived of them is fetched there)")
	flags.BoolVar(&opts.forceOwner, "force-owner", false, "take back an instance that was given to a peer which never confirmed, and which you know does not run it")
	flags.BoolVar(&opts.clone, "clone", false, "tell the guest's agent, when the instance is resumed, that other VMs run from the same state: it takes another machine-id, and hooks see DRAFTER_CLONE=true")
	flags.StringVar(&opts.hostName, "host-name", "", "what the guest is called from when the instance is resumed on, by its agent (empty: as before)")
	flags.StringVar(&opts.guest.MAC, "guest-mac", "", "MAC that the guest's interface has from when the instance is resumed on, by its agent: for clones in one network (empty: as before)")
	flags.StringSliceVar(&opts.guest.Addresses, "guest-address", nil, "likewise, an address with its prefix length, instead of those of its family; again for each")
	flags.StringSliceVar(&opts.guest.Gateways, "guest-gateway", nil, "likewise, the gateway of its default route; again for IPv6")
	flags.StringVar(&opts.guest.Interface, "guest-interface", "", "the guest's interface that these are for (default: the first)")
	flags.StringArrayVar(&opts.env, "env", nil, "`NAME=VALUE` in the environment of the guest's containers from when the instance is resumed on, or CONTAINER:NAME=VALUE for one of them, instead of those given before; again for each: containers that it changes start anew")
	flags.BoolVar(&opts.onDemand, "memory-on-demand", false, "bring no more of the memory than the guest touches, until the instance is sent (default: with --clone)")
	flags.DurationVar(&opts.recordSet, "record-working-set", 0, "record beside the package's memory which pages of it the guest touches, from when it is resumed until so long after its agent has answered (--record-working-set=3s; 1s if no time is given): later starts bring these first")
	flags.Lookup("record-working-set").NoOptDefVal = "1s"
	flags.BoolVar(&opts.keepPoint, "keep-commit-point", false, "keep what --rollback returns to: the instance as it is when it begins to run here; its disk writes since then are kept apart until it is closed, and a received memory is written to its device as it comes")
	flags.BoolVar(&opts.rollback, "rollback", false, "return an instance that died while it ran, its VM included, to its commit point, and discard its disk writes since then (needs --keep-commit-point at the start that died)")
	flags.BoolVar(&opts.verify, "verify", false, "with --package: first compare every byte of it with the digests in its manifest")
	return cmd
}

// refuseMachineFlags has flags that describe a machine refused with the remedy, which an unknown flag would not be.
func refuseMachineFlags(cmd *cobra.Command) *cobra.Command {
	for _, name := range machineOfPackage {
		cmd.Flags().String(name, "", "")
		cmd.Flags().Lookup(name).Hidden = true
	}
	return cmd
}

// ofClones are flags that make a VM another than those that start from the same state, as any that starts from a package in a registry may be.
var ofClones = []string{"clone", "host-name", "guest-mac", "env"}

// machineOfPackage are flags of the snapshotter that describe the machine in a package, which a running guest cannot change.
var machineOfPackage = []string{"cpu-count", "memory-size", "cpu-template", "boot-args", "mac", "liveness-vsock-port", "agent-vsock-port"}

func runPeer(cmd *cobra.Command, opts peerOptions) error {
	for _, name := range machineOfPackage {
		if f := cmd.Flags().Lookup(name); f != nil && f.Hidden && f.Changed {
			return usageErrorf("--%s is part of the package: a guest that runs cannot change it; make a package with drafter snapshotter --%s", name, name)
		}
	}
	if cmd.Flags().Changed("devices") && opts.devices == "" {
		return usageErrorf("--devices is empty: give the devices as a JSON array, or leave it out")
	}
	switch {
	case opts.rollback && opts.raddr != "":
		return usageErrorf("--rollback excludes --raddr %s: what returns to its commit point is here, and what is received has none yet; leave one out", transport.Redacted(opts.raddr))
	case opts.accept != "" && opts.raddr != "":
		return usageErrorf("--accept excludes --raddr: the one waits for a peer that brings an instance, the other asks a peer for its; choose one")
	case opts.accept != "" && (opts.rollback || opts.boot):
		return usageErrorf("--accept excludes --rollback and --boot: an instance that is received is neither rolled back nor booted")
	case opts.rollback && opts.boot:
		return usageErrorf("--rollback excludes --boot: the one discards the disk writes since the commit point, the other boots from them; choose one")
	case opts.rollback && opts.forceOwner:
		return usageErrorf("--rollback excludes --force-owner: only an instance that belongs here can return to its commit point")
	case opts.clone && (opts.raddr != "" || opts.accept != "" || opts.boot):
		return usageErrorf("--clone excludes --raddr, --accept and --boot: what is received is the VM itself, and what boots shares no state with others")
	case opts.recordSet < 0:
		return usageErrorf("--record-working-set=%s: give a time above zero, or none for 1s", opts.recordSet)
	case opts.recordSet > 0 && (opts.raddr != "" || opts.accept != "" || opts.boot):
		return usageErrorf("--record-working-set excludes --raddr, --accept and --boot: only a VM that is resumed here touches the memory of its package")
	case opts.hostName != "" && (opts.raddr != "" || opts.accept != "" || opts.boot):
		return usageErrorf("--host-name excludes --raddr, --accept and --boot: what is received is the VM itself, and what boots names itself")
	case !opts.guest.IsZero() && (opts.raddr != "" || opts.accept != "" || opts.boot):
		return usageErrorf("--guest-mac, --guest-address and --guest-gateway exclude --raddr, --accept and --boot: what is received is the VM itself, and what boots sets its network up itself")
	case opts.guest.Check() != nil:
		return usageErrorf("--guest-mac, --guest-address and --guest-gateway: %w", opts.guest.Check())
	case len(opts.env) > 0 && (opts.raddr != "" || opts.accept != "" || opts.boot):
		return usageErrorf("--env excludes --raddr, --accept and --boot: what is received is the VM itself, and what boots has the environment that it was given last")
	case agent.CheckEnvironment(opts.env) != nil:
		return usageErrorf("--env: %w", agent.CheckEnvironment(opts.env))
	case opts.hostName != "" && agent.CheckHostName(opts.hostName) != nil:
		return usageErrorf("--host-name: %w", agent.CheckHostName(opts.hostName))
	case opts.keepPoint && opts.boot:
		return usageErrorf("--keep-commit-point excludes --boot: there is no memory yet to return to; give it at the next start")
	}
	for _, v := range []struct {
		flag string
		set  bool
	}{
		{"raddr", opts.raddr != ""}, {"accept", opts.accept != ""}, {"rollback", opts.rollback}, {"clone", opts.clone}, {"host-name", opts.hostName != ""}, {"guest-mac", !opts.guest.IsZero()}, {"env", len(opts.env) > 0}, {"record-working-set", opts.recordSet != 0},
		{"instance", opts.instance != ""}, {"devices", opts.devices != ""}, {"verify", opts.verify},
	} {
		if opts.restore != "" && v.set && !(opts.inRegistry() && slices.Contains(ofClones, v.flag)) {
			return usageErrorf("--restore excludes --%s: the instance comes from the store, to the folder --package, which is made for it", v.flag)
		}
	}
	if opts.restore == "" && opts.run {
		return usageErrorf("say what to run, as %sHOST/NAME:TAG", registry.Scheme)
	}
	if opts.restore != "" && opts.packagePath == "" {
		return usageErrorf("--restore needs --package: the folder to make for the instance")
	}
	if !cmd.Flags().Changed("memory-on-demand") {
		opts.onDemand = opts.clone && !opts.hugePages
	} else if opts.onDemand && opts.hugePages {
		return usageErrorf("--memory-on-demand excludes --huge-pages: memory is put into huge pages when all of it is here; choose one")
	}
	if opts.profiles && opts.metrics == "" {
		return usageErrorf("--pprof needs --metrics: the address at which profiles are served")
	}
	if opts.verify && opts.packagePath == "" {
		return usageErrorf("--verify needs --package: digests are in a package's manifest")
	}
	out := newWatch(cmd.ErrOrStderr())
	defer out.Close()
	log := out.logger(logger(cmd.Context()))
	ctx := withLogger(cmd.Context(), log)
	if opts.concurrency < 1 {
		return usageErrorf("--concurrency %d: give at least 1", opts.concurrency)
	}
	if opts.rescueTimeout <= 0 {
		return usageErrorf("--rescue-timeout %s: give a time above zero", opts.rescueTimeout)
	}
	goal := migrate.Goal{MaxDowntime: opts.maxDowntime, MaxTotalTime: opts.maxTotalTime, PostCopy: !opts.noPostcopy, Throttle: true}
	for _, v := range []struct {
		flag  string
		value time.Duration
	}{{"max-downtime", opts.maxDowntime}, {"max-total-time", opts.maxTotalTime}} {
		if cmd.Flags().Changed(v.flag) && v.value <= 0 {
			return usageErrorf("--%s %s: give a time above zero, or leave it out", v.flag, v.value)
		}
	}
	if err := goal.Check(); err != nil {
		return usageErrorf("--max-downtime and --max-total-time: %w", err)
	}
	opts.pushes = opts.control != ""
	if err := opts.links.check(ctx, cmd.Flags(), cmd.InOrStdin(), cmd.OutOrStdout()); err != nil {
		return err
	}
	if opts.Stdio != nil {
		switch {
		case opts.enableInput:
			return usageErrorf("--enable-input excludes stdio:, which is for the other peer")
		case opts.enableOutput && cmd.Flags().Changed("enable-output"):
			return usageErrorf("--enable-output excludes stdio:, which is for the other peer")
		}
		opts.enableOutput = false
	}
	if opts.control != "" {
		if err := transport.Check(controlAddress(opts.control)); err != nil {
			return usageErrorf("--control: %w", err)
		}
	}
	if opts.metrics != "" {
		if err := transport.Check(opts.metrics); err != nil {
			return usageErrorf("--metrics: %w", err)
		}
	}
	var devices []peer.Device
	if opts.restore == "" {
		var err error
		if devices, err = opts.deviceSource.open(); err != nil {
			return err
		}
	}
	store, err := opts.depotFlags.open(ctx, cmd, opts.packagePath, opts.stores, opts.raddr != "" || opts.accept != "", out.metrics)
	if err != nil {
		return err
	}
	defer store.close()
	if store.whole && opts.inRegistry() { // it has been fetched, and goes on from the folder
		opts.restore, store.origin, store.whole = "", nil, false
		if devices, err = opts.deviceSource.open(); err != nil {
			return err
		}
	}
	if store.origin != nil {
		if opts.boot && !store.begun {
			return usageErrorf("--boot, beside %s, is for a VM that died before all of it had been fetched, and in %q there is none: leave one out", opts.restoring(), opts.packagePath)
		}
		devices = restoredDevices(store.devices, opts.packagePath)
	}
	if err := store.keep(ctx, &opts.depotFlags, devices, opts.stores); err != nil {
		return err
	}
	if err := opts.checkMemory(devices); err != nil {
		return err
	}
	if err := opts.machineFlags.check(); err != nil {
		return err
	}
	backend, others, err := opts.backend(cmd)
	if err != nil {
		return err
	}
	if opts.verify {
		if _, err := vmpackage.Verify(ctx, opts.packagePath, vmpackage.ExtractOptions{}); err != nil {
			return interrupted(cmd, fmt.Errorf("--verify: %w", err))
		}
	}
	cfg := peer.Config{
		Devices: devices, Backend: backend, Others: others, Host: opts.host(cmd), ResumeTimeout: opts.resumeTimeout, RescueTimeout: opts.rescueTimeout,
		ForceOwner: opts.forceOwner && opts.restore == "", Clone: opts.clone, HostName: opts.hostName, Environment: opts.env, GuestNetwork: opts.guest, MemoryOnDemand: opts.onDemand, RecordWorkingSet: opts.recordSet, KeepCommitPoint: opts.keepPoint, Rollback: opts.rollback, Goal: goal, Concurrency: opts.concurrency, OwnThreads: true, Progress: out.progress, Logger: log,
		DisablePostCopy: opts.noPostcopy, FindSource: opts.redial(),
	}
	if store.storage != nil {
		cfg.Storage = store.storage
	}
	if store.origin != nil {
		cfg.FindSource = store.origin.Redial
	}
	if opts.metrics != "" {
		cfg.Hooks.Flushed = out.metrics.Flushed
	}

	if opts.laddr != "" {
		if err := cfg.CheckMigratable(); err != nil {
			return usageErrorf("--devices: with --laddr, %w", err)
		}
	}
	// The addresses to listen on are taken before anything is begun, so that a port in use costs nothing.
	stopMetrics, err := out.serveMetrics(ctx, opts.metrics, opts.profiles, log)
	if err != nil {
		return err
	}
	defer stopMetrics()
	op := &operator{links: opts.links, watch: out, pushes: make(chan push), backup: store.backup}
	ctx, op.stop = context.WithCancel(ctx)
	defer op.stop()
	start := &starter{state: "starting", watch: out, stop: op.stop}
	if opts.accept != "" || opts.raddr != "" && !opts.boot {
		start.state = "receiving"
	}
	cfg.OnRun = func(i *runner.Instance) { start.runs.Store(i) }
	desk := &desk{behind: start}
	stopControl, err := serveControl(ctx, opts.control, desk)
	if err != nil {
		return err
	}
	defer stopControl()
	var listener net.Listener
	if opts.laddr != "" {
		if listener, err = opts.listen(ctx, "laddr", opts.laddr); err != nil {
			return err
		}
		defer listener.Close()
	}
	var reception *peer.Lobby
	if opts.accept != "" {
		l, err := opts.listen(ctx, "accept", opts.accept)
		if err != nil {
			return err
		}
		reception = peer.NewReception(l, log)
		defer reception.Close()
		cfg.FindSource = reception.Rejoin
	}
	reports, err := openReports(opts.report)
	if err != nil {
		return fmt.Errorf("--report: %w", err)
	}
	defer reports.close()
	keeper, err := opts.connections.keeper(ctx, cmd.Flags(), opts.netns, &opts.links)
	if err != nil {
		return err
	}
	if keeper != nil {
		defer keeper.Close()
		cfg.Network = keeper
	}
	reports.tell = out.done

	if opts.control != "" || !transport.Single(opts.laddr) {
		cfg.FindDestination = op.way.take
	}
	var lobby *peer.Lobby
	open := func() { // when there is something to be had
		if listener == nil || lobby != nil {
			return
		}
		lobby = peer.NewLobby(listener, log)
		op.serving = opts.serving(lobby.Addr())
		if !transport.Single(opts.laddr) {
			op.way.wait(lobby.Rejoin)
		}
	}
	defer func() {
		if lobby != nil {
			lobby.Close()
		}
	}()
	p, err := startPeer(ctx, cfg, opts, store, reception, reports, out)
	if errors.Is(err, runner.ErrGiven) && !opts.forceOwner && (opts.control != "" || listener != nil && !transport.Single(opts.laddr)) {
		open()
		var end givenEnd
		end, err = awaitTaker(ctx, cfg, op, desk, opts.control != "", reports, out)
		switch {
		case end == givenAway || err != nil:
			if keeper != nil && err == nil {
				err = givenConnections(cmd.Context(), keeper, out)
			}
			return interrupted(cmd, err)
		case end == givenLeft:
			return leave(cmd)
		}
		// It is here, whatever it was that this peer was started for.
		opts.raddr, opts.accept, reception = "", "", nil
		opts.boot = opts.boot && end != givenSaved
		start = &starter{state: "starting", watch: out, stop: op.stop}
		desk.put(start)
		p, err = startPeer(ctx, cfg, opts, new(peerDepot), reception, reports, out)
	}
	if err != nil && ctx.Err() != nil { // by a signal, or from the control socket
		return fmt.Errorf("%w: %w", errInterrupted, err)
	} else if err != nil {
		return err
	}
	out.started(p)
	if opts.laddr != "" || opts.control != "" { // so that whoever takes the VM need not wait for it
		indexing, stop := context.WithCancel(ctx)
		var indexed sync.WaitGroup
		indexed.Go(func() {
			if err := cfg.IndexBases(indexing); err != nil && indexing.Err() == nil {
				log.Warn("the VM cannot be sent as it is configured", "error", err)
			}
		})
		defer func() { stop(); indexed.Wait() }()
	}
	if store.origin != nil && p.Instance().Missing() == 0 {
		if err := describeRestored(ctx, store.origin, opts.packagePath, devices); err != nil {
			log.Warn("the instance runs, but the folder that it was restored to is no package yet: it will be when the instance is closed", "error", err)
		}
	}
	backingUp, stopBackup := context.WithCancel(ctx)
	var backups sync.WaitGroup
	if store.backup != nil {
		backups.Go(func() { store.backup.Run(backingUp, p) })
	}
	defer func() { stopBackup(); backups.Wait() }()
	open()
	op.p = p
	desk.put(op)
	if lobby != nil {
		fmt.Fprintf(out, "Serving on %s\n", op.serving)
	}
	err = servePeer(ctx, op, lobby, reports, out)
	stopControl()
	stopBackup()
	backups.Wait()
	if p.Running() {
		out.metrics.State(control.Closing)
	}
	err = errors.Join(err, closePeer(ctx, p, out))
	if store.origin != nil && err == nil { // which may have been adopted, and have got the rest since
		err = describeRestored(context.WithoutCancel(ctx), store.origin, opts.packagePath, devices)
	}
	if store.origin != nil {
		ending, cancel := context.WithTimeout(context.WithoutCancel(ctx), opts.rescueTimeout)
		err = errors.Join(err, store.origin.Close(ending))
		cancel()
	}
	if keeper != nil { // the rest is free for others, who may have the VM from here again
		if lobby != nil {
			lobby.Close()
		}
		if reception != nil {
			reception.Close()
		}
		stopMetrics()
		err = errors.Join(err, closeKeeper(cmd.Context(), keeper, out))
	}
	if err != nil {
		return err
	}
	if opts.packagePath != "" && opts.instance == "" {
		// The package has changed, and the digests in its manifest are not true any more.
		return refreshManifest(context.WithoutCancel(ctx), opts.packagePath)
	}
	return nil
}

// checkMemory refuses what an instance without memory cannot do, and has it boot.
func (o *peerOptions) checkMemory(devices []peer.Device) error {
	if slices.ContainsFunc(devices, func(d peer.Device) bool { return d.Name == runner.MemoryDevice }) {
		if len(o.vfio) > 0 {
			return usageErrorf("--vfio %s: this package has a device %q, and a VM with a device of the host can neither be resumed from it nor saved to it: make a package without (drafter snapshotter --vfio %s --shut-down)",
				o.vfio[0], runner.MemoryDevice, o.vfio[0])
		}
		return nil
	}
	for _, v := range []struct {
		flag string
		set  bool
	}{{"raddr", o.raddr != ""}, {"accept", o.accept != ""}, {"laddr", o.laddr != ""}, {"keep-commit-point", o.keepPoint}, {"rollback", o.rollback}, {"clone", o.clone}} {
		switch {
		case v.set && len(o.vfio) > 0:
			return usageErrorf("--%s excludes --vfio %s: the state of a device of the host cannot be written down, so its VM is neither snapshotted nor moved; shut it down, and boot it elsewhere", v.flag, o.vfio[0])
		case v.set:
			return usageErrorf("--%s needs a device %q, and this package has none (drafter snapshotter --shut-down): its VM boots and shuts down, and is neither snapshotted nor moved", v.flag, runner.MemoryDevice)
		}
	}
	o.boot = true
	return nil
}

// awaitTaker is serveGiven for the instance of a peer, under the control of its socket.
func awaitTaker(ctx context.Context, cfg peer.Config, o *operator, desk *desk, controlled bool, reports *reports, out io.Writer) (givenEnd, error) {
	g, err := peer.OpenGiven(ctx, cfg)
	if err != nil {
		return givenAway, err
	}
	desk.put(givenOperator{g, o.links, &o.way, o.stop})
	if known, _ := o.way.known(); known {
		fmt.Fprintf(out, "Serving on %s\n", o.serving)
	}
	if controlled {
		fmt.Fprintf(out, "If the other peer waits to be found (--accept), say where it is: drafter ctl migrate ADDRESS\n")
	}
	return serveGiven(ctx, g, reports, out)
}

// retryInterval is the time between attempts to save an instance.
const retryInterval = 5 * time.Second

// closePeer closes the peer. An instance that cannot be saved, as on a full disk, is kept paused until it can, or until
// a further signal gives it up.
func closePeer(ctx context.Context, p *peer.Peer, out io.Writer) error {
	again, stop := signal.NotifyContext(context.WithoutCancel(ctx), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if p.CheckSavable() != nil {
		switchOff := context.AfterFunc(again, func() {
			if ctx.Err() != nil { // it was asked for a second time
				fmt.Fprintf(out, "Switching the VM off\n")
				_ = p.Kill() // Close says what came of it
			}
		})
		defer switchOff()
		select {
		case <-p.Done(): // it has shut down by itself
		default: // said no earlier, as the signal that it speaks of is waited for only now
			fmt.Fprintf(out, "Closing: the guest shuts down; Ctrl-C switches it off\n")
		}
	}
	for {
		err := p.Close(ctx)
		if !errors.Is(err, runner.ErrUnsaved) {
			return err
		}
		fmt.Fprintf(out, "%v\nTrying again every %v; Ctrl-C gives the VM up and loses its memory\n", err, retryInterval)
		select {
		case <-time.After(retryInterval):
		case <-again.Done():
			return errors.Join(err, p.Kill())
		}
	}
}

// refreshManifest describes a package anew that an instance without overlays has changed. It leaves the digests out: they
// would take as long as reading everything.
func refreshManifest(ctx context.Context, dir string) error {
	pkg, err := vmpackage.Open(dir)
	if err != nil {
		return err
	}
	var files []vmpackage.File
	for _, d := range pkg.Devices {
		files = append(files, vmpackage.File{Name: d.Name, Path: d.Path})
	}
	_, err = vmpackage.WriteManifest(ctx, dir, files, vmpackage.ManifestOptions{SkipDigests: true})
	return err
}

// startPeer brings the instance up, in the way the options ask for.
func startPeer(ctx context.Context, cfg peer.Config, opts peerOptions, store *peerDepot, reception *peer.Lobby, reports *reports, out io.Writer) (_ *peer.Peer, err error) {
	if opts.rollback { // which is refused where a machine is alive
		p, err := peer.Resume(ctx, cfg)
		if err != nil {
			return nil, err
		}
		switch back := p.Instance().RolledBack(); {
		case back.Saved:
			fmt.Fprintf(out, "Nothing was rolled back: the instance did not die, but was saved at %s, and goes on from there\n", back.Since.Format(time.RFC3339))
		case back.Discarded > 0:
			fmt.Fprintf(out, "Rolled back: %d bytes of disk writes since %s are discarded\n", back.Discarded, back.Since.Format(time.RFC3339))
		default:
			fmt.Fprintf(out, "Rolled back: no disk writes since %s had to be discarded\n", back.Since.Format(time.RFC3339))
		}
		fmt.Fprintf(out, "Resumed VM in %s on %s\n", p.ResumeDuration().Round(100*time.Microsecond), p.VMPath())
		return p, nil
	}
	image := store.origin
	if image != nil && !store.whole {
		release, err := takeFolder(opts.packagePath, opts.folderFlag())
		if err != nil {
			return nil, fmt.Errorf("%s: %w", opts.restoring(), err)
		}
		defer release()
	}
	// A peer that was killed is started again with the same command line, and finds its machine alive.
	if p, err := peer.Adopt(ctx, cfg); err == nil {
		if id, ok := p.InDoubt(); ok {
			fmt.Fprintf(out, "Adopted VM on %s, paused: it was given to another peer (migration %s), which has not confirmed that it runs it\n", p.VMPath(), id)
		} else if n := p.Instance().Missing(); n > 0 {
			fmt.Fprintf(out, "Adopted VM on %s; %d bytes of it are still to come from the peer that had it\n", p.VMPath(), n)
		} else {
			fmt.Fprintf(out, "Adopted VM on %s\n", p.VMPath())
		}
		return p, nil
	} else if !errors.Is(err, runner.ErrNotAlive) {
		return nil, err
	}
	switch {
	case store.whole:
		return nil, fmt.Errorf("%s: folder %q is a package already: it was restored before, and goes on from there without --restore; or name another folder (--package)", opts.restoring(), opts.packagePath)
	case reception != nil, (image != nil || opts.raddr != "") && !opts.boot:
		if err := peer.CheckVacant(cfg); err != nil && image != nil {
			return nil, fmt.Errorf("%s: %w", opts.restoring(), store.occupied(ctx, &opts.depotFlags, cfg.Devices, opts.packagePath, err))
		} else if err != nil {
			return nil, err
		}
		if err := cfg.IndexBases(ctx); err != nil {
			return nil, err
		}
		from, dial, redial := transport.Redacted(opts.raddr), opts.dialFirst, opts.redial()
		if reception != nil {
			fmt.Fprintf(out, "Waiting for a VM on %s\n", served(opts.accept, reception.Addr()))
			dial, redial = func(ctx context.Context) ([]io.ReadWriter, error) {
				a, err := welcome(ctx, cfg, reception)
				if err != nil {
					return nil, err
				}
				from = a.From.String()
				return a.Streams, nil
			}, nil
		}
		if image != nil {
			said, err := image.check(ctx, opts.restoring(), opts.forceOwner)
			if err != nil {
				return nil, err
			}
			undo, failed := markRestored(image.mark(), store.devices, opts.packagePath)
			if failed != nil {
				return nil, fmt.Errorf("%s: %w", opts.restoring(), failed)
			}
			defer func() {
				if err != nil && !errors.Is(err, migrate.ErrInDoubt) {
					undo()
				}
			}()
			from, dial, redial = image.String(), image.Dial, nil
			fmt.Fprintln(out, said)
		}
		// At once, for whoever has to tell the network where the guest is now; the agent has not been told yet.
		var runs atomic.Bool
		closing := sync.OnceFunc(func() { // it cannot be given back, and is worth nothing until the rest of it has come
			fmt.Fprintln(out, "Closing: the VM runs here already; it is suspended and saved once all of it has arrived")
		})
		cfg.Hooks.Resumed = func() {
			fmt.Fprintln(out, "VM runs here")
			if runs.Store(true); ctx.Err() != nil {
				closing()
			}
		}
		stop := context.AfterFunc(ctx, func() {
			if runs.Load() {
				closing()
			}
		})
		p, report, err := receive(ctx, cfg, dial, redial)
		for reception != nil && p == nil && report != nil && waitsOn(ctx, opts.accept, err) {
			// Nothing of it is left here. Whoever has sent it may have changed his mind, and send it again.
			if report.ID != "" {
				if err := reports.write(report); err != nil {
					cfg.Logger.Error("could not write the report of a migration", "error", err)
				}
			}
			cfg.Logger.Warn("a VM that was to come here has not come; waiting for another", "from", from, "error", err)
			p, report, err = receive(ctx, cfg, dial, redial)
		}
		stop()
		if report == nil { // nobody was there
			return nil, err
		}
		if err := reports.write(report); err != nil {
			cfg.Logger.Error("could not write the report of a migration", "error", err)
		}
		if errors.Is(err, migrate.ErrUnsettled) {
			return p, nil // and servePeer goes on to look
		} else if err != nil {
			return nil, fmt.Errorf("receive from %q: %w", from, err)
		}
		select {
		case <-p.Done():
			fmt.Fprintf(out, "The VM ended before its migration did: its memory is not needed any more, its disks are whole\n")
			return p, nil
		default:
		}
		fmt.Fprintf(out, "Received VM on %s: %s\n", p.VMPath(), summary(report))
		return p, nil
	case opts.boot:
		p, err := peer.Boot(ctx, cfg)
		if err != nil {
			return nil, err
		}
		fmt.Fprintf(out, "Booted VM on %s\n", p.VMPath())
		return p, nil
	default:
		p, err := peer.Resume(ctx, cfg)
		if err != nil {
			return nil, err
		}
		fmt.Fprintf(out, "Resumed VM in %s on %s\n", p.ResumeDuration().Round(100*time.Microsecond), p.VMPath())
		return p, nil
	}
}

// waitsOn reports whether a peer that waits for a VM at an address goes on to wait, after a reception that ended with err: it does until
// there is one here, or may be, or the peer is to end.
func waitsOn(ctx context.Context, address string, err error) bool {
	return err != nil && ctx.Err() == nil && !transport.Single(address) && !errors.Is(err, migrate.ErrInDoubt) && !errors.Is(err, migrate.ErrUnsettled)
}

// askingTime is how long a source is asked whether it is in doubt, before it is asked for a VM again. It is as long as a peer.Lobby has one wait
// whom it has no time for.
const askingTime = 5 * time.Second

// receive is peer.Receive from whom dial finds. When an earlier migration was not finished here, because this peer died, its source may
// be waiting to hear so: then it is told, and asked again. It may be on its way to be there again itself, and is tried until the rescue
// timeout is over. Redial is dial for that; nil: there is no other time. There is no report when nobody was there.
func receive(ctx context.Context, cfg peer.Config, dial, redial func(context.Context) ([]io.ReadWriter, error)) (*peer.Peer, *migrate.Report, error) {
	unfinished := redial != nil && peer.Void(cfg)
	deadline := time.Now().Add(cfg.RescueTimeout)
	for {
		conns, err := dial(ctx)
		var p *peer.Peer
		var report *migrate.Report
		if err == nil {
			p, report, err = peer.Receive(ctx, cfg, conns)
		}
		if err == nil || !unfinished || ctx.Err() != nil || report != nil && report.ID != "" { // a source in doubt offers no VM
			return p, report, err
		}
		asking := cfg
		asking.FindSource, asking.RescueTimeout = redial, min(cfg.RescueTimeout, askingTime)
		id, failure := peer.Disclaim(ctx, asking)
		if failure == nil {
			cfg.Logger.Info("told the source that an earlier migration was not completed here", "migration", id)
			unfinished = false
			continue
		}
		cfg.Logger.Debug("the source does not ask for an earlier migration", "error", failure)
		if time.Now().After(deadline) {
			return p, report, err
		}
		dial = redial // which says nothing that was said before
		select {
		case <-time.After(250 * time.Millisecond):
		case <-ctx.Done():
			return p, report, err
		}
	}
}

// servePeer waits until the instance ends here: handed over, shut down by its guest, or closed by a signal. A nil lobby: nobody
// can come for it.
func servePeer(ctx context.Context, o *operator, lobby *peer.Lobby, reports *reports, out io.Writer) error {
	p := o.p
	var arrivals <-chan peer.Arrival
	if lobby != nil {
		arrivals = lobby.New
	}
	arrived := p.Arrived()
	for {
		if _, ok := p.InDoubt(); ok {
			if gone, err := findDestination(ctx, o, reports, out); gone || err != nil {
				return err
			}
			if _, ok := p.InDoubt(); !ok { // the VM runs on here, and who asks for it next comes here
				o.way.dial(nil)
			}
		}
		select {
		case <-ctx.Done():
			if p.CheckSavable() == nil { // else closePeer says what becomes of it
				fmt.Fprintf(out, "Closing: the VM is suspended and saved\n")
			}
			return nil
		case <-p.Done():
			if err := p.Err(); errors.Is(err, vmm.ErrReboot) {
				return fmt.Errorf("the VM ended: %w: boot it again with --boot", err)
			} else if err != nil {
				return fmt.Errorf("the VM ended: %w; as after a power loss, boot it from its disks with --boot%s", err, orRollBack(p))
			}
			fmt.Fprintf(out, "The guest shut down\n")
			return nil
		case <-arrived:
			arrived = nil
			report, err := p.Arrival()
			standing := "is frozen"
			if !p.Instance().GuestLacks() {
				standing = "runs on without what it would boot from"
			}
			switch {
			case err == nil:
				if err := reports.write(report); err != nil {
					logger(ctx).Error("could not write the report of a migration", "error", err)
				}
				fmt.Fprintf(out, "Received VM on %s: %s\n", p.VMPath(), summary(report))
			case p.Instance().Missing() > 0 && refusal(err) != "":
				fmt.Fprintf(out, "The VM %s: the peer that has the rest of its content refuses it: %s. This one goes on asking\n", standing, refusal(err))
				p.Search()
				arrived = p.Arrived()
			case p.Instance().Missing() > 0:
				fmt.Fprintf(out, "The VM %s, and nothing of it is lost: the peer that has the rest of its content was not found (%v). "+
					"Start that peer again, with the command line that it had: this one goes on looking for it\n", standing, err)
				p.Search()
				arrived = p.Arrived()
			default:
				logger(ctx).Warn("the VM is whole, but the peer that it came from could not be told: that one may be in doubt", "error", err)
			}
		case a := <-arrivals:
			release := o.hold()
			_, gone, err := give(ctx, p, handing{from: a.From, do: func(ctx context.Context) (*migrate.Report, error) {
				if a.Err != nil {
					return nil, a.Err
				}
				defer a.Close()
				return p.Send(ctx, a.Streams)
			}}, reports, out)
			release()
			if gone || err != nil {
				return err
			}
		case a := <-o.pushes:
			o.way.dial(a.again)
			ours, cancel := context.WithCancel(ctx)
			stop := context.AfterFunc(a.ctx, cancel)
			release := o.hold()
			r, gone, err := give(ours, p, handing{from: a.to, pushed: true, do: func(ctx context.Context) (*migrate.Report, error) {
				return p.SendTo(ctx, a.first)
			}}, reports, out)
			release()
			stop()
			cancel()
			a.end <- r
			if gone || err != nil {
				return err
			}
			if _, ok := p.InDoubt(); !ok {
				o.way.dial(nil)
			}
		}
	}
}

// refusal is what the other side says where err is that it refuses; empty otherwise.
func refusal(err error) string {
	var other *migrate.PeerError
	if errors.As(err, &other) && other.Code == wire.CodeRefused {
		return other.Reason
	}
	return ""
}

// handing is a way to send the VM to a peer.
type handing struct {
	from   net.Addr // of that peer
	pushed bool     // somebody here has asked for it, and not that peer
	do     func(context.Context) (*migrate.Report, error)
}

// give sends the VM to a peer, and says what came of it. It reports whether the VM is gone from here; err says why it is lost here.
func give(ctx context.Context, p *peer.Peer, h handing, reports *reports, out io.Writer) (r pushed, gone bool, err error) {
	r.report, r.err = h.do(ctx)
	nobody := errors.Is(r.err, peer.ErrStranger)
	refused := errors.Is(r.err, peer.ErrBusy) || errors.Is(r.err, peer.ErrPaused) || errors.Is(r.err, peer.ErrNotMigratable) || errors.Is(r.err, peer.ErrUnauthorized)
	switch {
	case h.pushed && (nobody || refused || r.report.Role == ""): // nothing was begun, and there is nothing to report
		logger(ctx).Warn("the VM was not sent, and stays here", "to", h.from, "error", r.err)
		return r, false, nil
	case nobody:
		// Anybody may knock: that is no migration, and has no report.
		logger(ctx).Warn("refused a connection, the VM runs on here", "from", h.from, "reason", r.err)
		return r, false, nil
	case refused:
		logger(ctx).Warn("refused a peer that asked for the VM", "from", h.from, "reason", r.err)
		return r, false, nil
	}
	if err := reports.write(r.report); err != nil {
		logger(ctx).Error("could not write the report of a migration", "error", err)
	}
	switch {
	case r.err == nil && p.Running(): // a copy was asked for
		fmt.Fprintf(out, "Sent a copy of the VM to %s: %s\n", h.from, summary(r.report))
	case r.err == nil:
		fmt.Fprintf(out, "Sent VM to %s: %s\n", h.from, summary(r.report))
		return r, true, nil
	case errors.Is(r.err, migrate.ErrInDoubt), errors.Is(r.err, migrate.ErrUnsettled):
		fmt.Fprintf(out, "Send to %s: %v\n", h.from, r.err)
	case !p.Running():
		return r, true, fmt.Errorf("send to %s: %w; the VM is not running here any more", h.from, r.err)
	default:
		// The VM runs on here, as if nobody had asked.
		fmt.Fprintf(out, "Migration to %s failed, the VM runs on here: %v\n", h.from, r.err)
	}
	return r, false, nil
}

// welcome waits for a peer that brings a VM. One that asks for an earlier migration, which was not finished here because this peer
// died, is told so meanwhile.
func welcome(ctx context.Context, cfg peer.Config, reception *peer.Lobby) (peer.Arrival, error) {
	if peer.Void(cfg) {
		asked, stop := context.WithCancel(ctx)
		var told sync.WaitGroup
		told.Go(func() {
			for asked.Err() == nil {
				id, err := peer.Disclaim(asked, cfg)
				if err == nil {
					cfg.Logger.Info("told the source that an earlier migration was not completed here", "migration", id)
					return
				}
				if asked.Err() != nil || errors.Is(err, runner.ErrNotVoid) {
					return
				}
				if !errors.Is(err, os.ErrDeadlineExceeded) {
					cfg.Logger.Warn("the source of an earlier migration could not be told that it was not completed here", "migration", id, "error", err)
					select {
					case <-time.After(time.Second):
					case <-asked.Done():
					}
				}
			}
		})
		defer told.Wait() // what is received takes the devices
		defer stop()
	}
	for {
		select {
		case a := <-reception.New:
			if a.Err == nil {
				return a, nil
			}
			logger(ctx).Warn("refused a connection", "from", a.From, "reason", a.Err)
		case <-ctx.Done():
			return peer.Arrival{}, fmt.Errorf("wait for a VM: %w", context.Cause(ctx))
		}
	}
}

// orRollBack offers to return to the commit point of a VM that has ended, if it was kept.
func orRollBack(p *peer.Peer) string {
	if p.Instance().Kept() {
		return ", or return to where it was resumed or received with --rollback, which discards its disk writes since then"
	}
	return ""
}

// findDestination waits for the peer to which the VM was given, which must say whether it runs it, and may need the rest of it.
// It reports whether the VM is gone from here; if not, and without an error, it runs on here, or is to be closed.
func findDestination(ctx context.Context, o *operator, reports *reports, out io.Writer) (gone bool, err error) {
	p := o.p
	id, _ := p.InDoubt()
	fmt.Fprintf(out, "The VM is kept, paused, until the peer that it was given to is found again (migration %s); Ctrl-C saves it, marked as moved\n", id)
	urged := false // to end, and does not
	if known, changed := o.way.known(); !known {
		fmt.Fprintf(out, "Nobody can find this peer without --laddr: start it again with the one that it had, or say where the other is (drafter ctl migrate ADDRESS)\n")
		select {
		case <-changed:
		case <-ctx.Done():
			return false, nil
		case <-p.Done():
			return false, nil
		}
	}
	for {
		report, err := p.Rejoin(ctx)
		switch {
		case errors.Is(err, migrate.ErrInDoubt) || errors.Is(err, migrate.ErrUnsettled):
			if ctx.Err() != nil && p.Instance().Confirmed() && !urged {
				again, stop := signal.NotifyContext(context.WithoutCancel(ctx), os.Interrupt, syscall.SIGTERM)
				defer stop()
				fmt.Fprintf(out, "Not closing yet: the VM runs at the other peer, which needs content that only this one has (migration %s). "+
					"Another signal gives up; then start this peer again, with the command line that it had, to serve that from its files\n", id)
				ctx, urged = again, true
				continue
			}
			if ctx.Err() != nil {
				return false, nil
			}
			logger(ctx).Warn("the peer that the VM was given to was not found yet", "migration", id, "error", err)
			continue
		case err == nil:
			fmt.Fprintf(out, "Sent VM: %s\n", summary(report))
		case p.Running():
			fmt.Fprintf(out, "The VM never ran there, and runs on here: %v\n", err)
		default:
			return true, fmt.Errorf("%w; the VM is not running here any more", err)
		}
		if err := reports.write(report); err != nil {
			logger(ctx).Error("could not write the report of a migration", "error", err)
		}
		return err == nil, nil
	}
}
