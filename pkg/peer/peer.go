package peer

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/drafter-vm/drafter/pkg/agent"
	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/migrate"
	"github.com/drafter-vm/drafter/pkg/runner"
	"github.com/drafter-vm/drafter/pkg/vmm"
	"github.com/drafter-vm/drafter/pkg/wire"
)

// Device is a device of a peer's instance.
type Device struct {
	runner.DeviceConfig

	// Policy says when pre-copy of this device has done enough. The zero value disables pre-copy.
	Policy migrate.Policy

	// Stationary devices do not travel: the destination has them already. An instance can be
	// sent only if its stationary devices do not change while it runs: kernel, initrd, config.
	Stationary bool

	// SharedBase is of a device whose base is to be on both hosts: only what differs from it travels. Both prove that they hold the same, by
	// its digest, and another is refused before the guest is disturbed. (Without it, too, what both are found to hold does not travel.)
	SharedBase bool
}

// hasBase reports whether the other peer is to have the device's base, or all of it.
func (d Device) hasBase() bool { return d.SharedBase || d.Shared }

// Config is a peer's instance on this host.
type Config struct {
	Devices []Device    // the disks among them in the order the guest sees them
	Backend vmm.Backend // runs the machine, or one of the Others does: see runner.Config
	Others  []vmm.Backend
	Host    runner.Host  // where machines run on this host
	Hooks   runner.Hooks // called on the way; nil ones are left out

	// ForceOwner, Clone and MemoryOnDemand are those of runner.Config.
	ForceOwner, Clone, MemoryOnDemand bool

	// HostName, Environment, GuestNetwork and RecordWorkingSet are those of runner.Config, in which the third is Network.
	HostName         string
	Environment      []string
	GuestNetwork     agent.Network
	RecordWorkingSet time.Duration

	// KeepCommitPoint and Rollback are those of runner.Config.
	KeepCommitPoint, Rollback bool

	// Goal is what a Send is to achieve, for devices whose Policy leaves it to that.
	Goal migrate.Goal

	// Concurrency is how many goroutines of a migration read, hash, pack and write content. 0 means 4; more than 64 counts as 64.
	Concurrency int

	// OwnThreads is that of migrate: for a process that is there for its guests alone.
	OwnThreads bool

	// ResumeTimeout bounds each wait for the guest's agent. Default: one minute.
	ResumeTimeout time.Duration
	// RescueTimeout bounds saving, rolling back and cleaning up, and how long the other side of a migration is looked for
	// when the link to it is gone and the guest needs it. Default: one minute.
	RescueTimeout time.Duration

	// FindSource brings new streams to the peer that the instance came from, FindDestination to the one it was given to: they
	// dial, or wait for the other to do so (Lobby.Rejoin). Nil: a link that is lost then is lost.
	FindSource, FindDestination func(ctx context.Context) ([]io.ReadWriter, error)

	// Storage keeps what devices hold in a store that other peers reach, too, so that less of it has to come from here. Nil: nothing is kept.
	Storage Storage

	// Network keeps the guest's connections when it moves. Nil: they end, or it is the caller's affair.
	Network Network

	// Authorize decides who may have the VM from here, and whose may come. Nil: whoever the transport lets in.
	Authorize Authorize

	// DisablePostCopy has everything arrive before the guest runs here.
	DisablePostCopy bool

	// Progress is told how a migration goes. Nil is allowed.
	Progress func(migrate.Progress)
	// OnState is called at each change of state of a Send, OnReceive at each of a Receive, before anything is done in it. Nil is
	// allowed.
	OnState   func(migrate.SourceState)
	OnReceive func(migrate.DestinationState)

	// OnRun is that of runner.Config: the instance runs here, though the call that brings it here may take a while yet.
	OnRun func(*runner.Instance)

	// Logger receives events; nil means slog.Default().
	Logger *slog.Logger
}

func (c Config) runner() runner.Config {
	rc := runner.Config{
		Backend: c.Backend, Others: c.Others, Host: c.Host, Hooks: c.Hooks, ResumeTimeout: c.ResumeTimeout, RescueTimeout: c.RescueTimeout,
		ForceOwner: c.ForceOwner, Clone: c.Clone, HostName: c.HostName, Environment: c.Environment, Network: c.GuestNetwork, MemoryOnDemand: c.MemoryOnDemand, RecordWorkingSet: c.RecordWorkingSet, KeepCommitPoint: c.KeepCommitPoint, Rollback: c.Rollback, OnRun: c.OnRun, Logger: c.Logger,
	}
	rc.Devices = DeviceConfigs(c.Devices)
	return rc
}

// DeviceConfigs are where devices live.
func DeviceConfigs(devices []Device) []runner.DeviceConfig {
	configs := make([]runner.DeviceConfig, len(devices))
	for n, d := range devices {
		configs[n] = d.DeviceConfig
	}
	return configs
}

// CheckAtRest fails with an error that wraps runner.ErrAlive if somebody runs the instance with these devices. It opens none of them.
func CheckAtRest(devices []Device) error {
	if runner.Alive(DeviceConfigs(devices)) {
		return fmt.Errorf("%w: its peer, or the machine that a killed peer has left, runs it: end that first", runner.ErrAlive)
	}
	return nil
}

func (c Config) withDefaults() Config {
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	if c.RescueTimeout == 0 {
		c.RescueTimeout = time.Minute
	}
	return c
}

// CheckSavable reports why an instance like this could not be saved, be it for a snapshot or a move. The error wraps ErrNotSavable.
func (c Config) CheckSavable() error {
	if len(c.Host.Passthrough) > 0 {
		return fmt.Errorf("%w: it has PCI device %q of the host, whose state nobody can write down; shut it down instead", ErrNotSavable, c.Host.Passthrough[0])
	}
	if !slices.ContainsFunc(c.Devices, func(d Device) bool { return d.Name == runner.MemoryDevice }) {
		return fmt.Errorf("%w: it has no device %q, so it boots at each start, and shuts down at each end", ErrNotSavable, runner.MemoryDevice)
	}
	return nil
}

// CheckMigratable reports why an instance with these devices could not be sent. The error wraps ErrNotMigratable.
func (c Config) CheckMigratable() error {
	if err := c.CheckSavable(); err != nil {
		return fmt.Errorf("%w: %w", ErrNotMigratable, err)
	}
	for _, d := range c.Devices {
		if d.Stationary && (runner.IsDisk(d.Name) || d.Name == runner.MemoryDevice || d.Name == runner.StateDevice) {
			return fmt.Errorf("%w: device %q changes while the instance runs, so it cannot stay behind when the instance moves: make it migratable", ErrNotMigratable, d.Name)
		}
	}
	return nil
}

// ErrBusy is wrapped by errors of what excludes something that is under way, which the text names: see [Peer.UnderWay].
var ErrBusy = errors.New("busy")

// ErrStranger is wrapped by the error of Send when the other end did not introduce itself as a peer that can receive: it
// is another program, said nothing, or speaks no common version. Nothing was begun then, and the guest has noticed nothing.
var ErrStranger = errors.New("no peer that can receive")

// Peer owns one running instance.
type Peer struct {
	cfg      Config
	instance *runner.Instance

	agent   sync.WaitGroup // the telling of an adopted guest's agent
	started atomic.Bool    // the instance is there

	mu     sync.Mutex // guards what follows; held for a moment
	op     *operation // what is under way; nil: nothing
	paused bool       // by Pause
	stays  bool       // SetMigratable has forbidden to send it

	synced map[string]synced // devices that are kept in a store; it does not change once there can be an operation

	rest *rest // what is still to come of an instance that was received; nil: nothing, as far as is known
}

// rest is the search for the source of an instance that was received by a process that has died, and the arrival of
// what is missing.
type rest struct {
	claim  migrate.Claim
	cancel context.CancelFunc
	done   chan struct{}
	report *migrate.Report // once done
	err    error           // once done
}

func newPeer(cfg Config, i *runner.Instance) *Peer {
	p := &Peer{cfg: cfg, instance: i, synced: make(map[string]synced)}
	p.started.Store(i != nil)
	return p
}

// Adopt takes over the living machine of an instance whose peer has died; see runner.Adopt. Resume and Boot do so too.
func Adopt(ctx context.Context, cfg Config) (*Peer, error) {
	return start(ctx, cfg, true, runner.Adopt)
}

// Resume starts the instance on this host from its saved state.
func Resume(ctx context.Context, cfg Config) (*Peer, error) {
	return start(ctx, cfg, false, runner.Resume)
}

// Boot starts the instance on this host by booting its disks; the memory it was saved with is lost. A guest that does not
// say that it is up is reported in the log, and runs.
func Boot(ctx context.Context, cfg Config) (*Peer, error) {
	return start(ctx, cfg, false, func(ctx context.Context, rc runner.Config) (*runner.Instance, error) {
		rc.BootUnattended = true
		return runner.Boot(ctx, rc)
	})
}

// start starts an instance; alive says that it was never ended.
func start(ctx context.Context, cfg Config, alive bool, how func(context.Context, runner.Config) (*runner.Instance, error)) (*Peer, error) {
	p := newPeer(cfg.withDefaults(), nil)
	rc := p.cfg.runner()
	if p.cfg.FindSource != nil {
		rc.OnLate = p.onLate
	}
	fresh := false
	if cfg.Network != nil && !alive { // which has its place already
		var err error
		if fresh, err = cfg.Network.Start(); err != nil {
			return nil, fmt.Errorf("network: %w", err)
		}
	}
	i, err := how(ctx, rc)
	if err != nil {
		p.endRest()
		if fresh {
			err = errors.Join(err, cfg.Network.End())
		}
		return nil, err
	}
	p.instance = i
	p.cfg.Host.Passthrough = i.Passthrough() // of one that was adopted
	if _, given := i.InDoubt(); cfg.Network != nil && !given {
		_, err := cfg.Network.Start()
		if err == nil { // of a process that has died while it sent it
			err = cfg.Network.Undo()
		}
		if err != nil {
			p.cfg.Logger.Error("connections of the guest are not kept", "error", err)
		}
	}
	p.started.Store(true)
	if _, given := i.InDoubt(); !given {
		p.startSync()
	}
	if i.AgentOwed() {
		p.agent.Go(func() {
			if err := i.AfterResume(context.WithoutCancel(ctx)); err != nil {
				p.cfg.Logger.Error("the instance was adopted and runs, but its agent failed after the resume", "error", err)
			}
		})
	}
	return p, nil
}

// onLate begins to look for the peer that the instance came from.
func (p *Peer) onLate(i *runner.Instance, migration string, devices []runner.Arriving) {
	p.rest = p.find(claimOf(i, migration, devices), i)
}

// claim is the claim to an instance that was received.
func claim(i *runner.Instance) migrate.Claim {
	migration, devices := i.Arriving()
	return claimOf(i, migration, devices)
}

func claimOf(i *runner.Instance, migration string, devices []runner.Arriving) migrate.Claim {
	return migrate.Claim{
		ID: migration,
		Devices: func(_ context.Context, ask func(int, block.Range)) ([]migrate.ClaimDevice, error) {
			numbers := make(map[string]int)
			var out []migrate.ClaimDevice
			for _, d := range devices {
				numbers[d.Name] = len(out)
				c := migrate.ClaimDevice{Name: d.Name, Size: d.Size}
				if d.Late != nil {
					c.Late = d.Late
				}
				out = append(out, c)
			}
			i.Ask(func(name string, r block.Range) { ask(numbers[name], r) })
			return out, nil
		},
		Complete: i.Complete,
	}
}

// find looks for the source of a claim, and takes in what is missing.
func (p *Peer) find(claim migrate.Claim, i *runner.Instance) *rest {
	ctx, cancel := context.WithCancel(context.Background())
	r := &rest{claim: claim, cancel: cancel, done: make(chan struct{})}
	cfg := migrate.DestinationConfig{
		Journal: &target{instance: i}, Concurrency: p.cfg.Concurrency, OwnThreads: p.cfg.OwnThreads, RescueTimeout: p.cfg.RescueTimeout,
		Reconnect: p.cfg.FindSource, Admit: p.cfg.Authorize.again(false, func() string { return claim.ID }),
		Progress: p.cfg.Progress, Logger: p.cfg.Logger,
		OnState: func(s migrate.DestinationState) {
			if s == migrate.DestinationFilling {
				p.thaw(i)
			}
		},
	}
	go func() { // endRest waits for it
		defer close(r.done)
		for {
			r.report, r.err = migrate.RejoinDestination(ctx, claim, cfg)
			if !errors.Is(r.err, migrate.ErrUnsettled) || ctx.Err() != nil || p.started.Load() {
				break
			}
			// The start itself may wait for what is missing: a machine whose main loop needs a page does not answer.
			p.cfg.Logger.Warn("the peer that has the rest of the instance was not found yet: start it again, with the command line that it had", "error", r.err)
		}
		if r.err != nil {
			p.completeAlone(ctx, i)
		} else {
			p.thaw(i)
			p.agent.Go(func() { // which takes its turn after a call that goes on
				if err := i.TellAgent(ctx); err != nil {
					p.cfg.Logger.Error("all of the instance has arrived and it runs, but its agent failed after the resume", "error", err)
				}
			})
		}
	}()
	return r
}

// completeAlone notes of an instance whose source is lost, and not missed, that it lacks nothing.
func (p *Peer) completeAlone(ctx context.Context, i *runner.Instance) {
	if i.Missing() > 0 {
		return
	}
	if err := i.Complete(context.WithoutCancel(ctx)); err != nil {
		p.cfg.Logger.Warn("the instance is whole, and it cannot be noted", "error", err)
	}
}

func (p *Peer) thaw(i *runner.Instance) {
	if err := i.Thaw(); err != nil {
		p.cfg.Logger.Error("the machine cannot go on", "error", err)
	}
}

// endRest ends the search for the source, if one goes on.
func (p *Peer) endRest() {
	p.mu.Lock()
	r := p.rest
	p.mu.Unlock()
	if r != nil {
		r.cancel()
		<-r.done
	}
}

// Arrived is closed when nothing of the instance is missing any more, or the search for the peer that has the rest has
// ended: see [Peer.Arrival]. It is nil for an instance to which nothing is to come.
func (p *Peer) Arrived() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.rest == nil {
		return nil
	}
	return p.rest.done
}

// Arrival is how the arrival of the rest went, once Arrived is closed. When its error wraps migrate.ErrUnsettled something is
// missing still, and the guest is frozen if it may come to need that: see [Peer.Search].
func (p *Peer) Arrival() (*migrate.Report, error) {
	p.mu.Lock()
	r := p.rest
	p.mu.Unlock()
	if errors.Is(r.err, migrate.ErrUnsettled) && p.instance.GuestLacks() {
		return r.report, errors.Join(r.err, p.instance.Freeze())
	}
	return r.report, r.err
}

// Search looks once more for the peer that has the rest of the instance, after Arrived was closed in vain. The guest goes on
// when it is found.
func (p *Peer) Search() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.rest != nil { // else there is nobody to look for: it was started without Config.FindSource
		p.rest = p.find(p.rest.claim, p.instance)
	}
}

// Receive takes over a running instance from the peer at the other end of streams. When it fails, the instance runs on at
// the source and nothing of it is left here, unless the error wraps migrate.ErrInDoubt. The streams are closed when it
// returns. The report is there in any case.
//
// Without Config.DisablePostCopy the guest may run here long before Receive returns, and needs the source until it does. From the
// commit on, cancelling ctx has no effect while there is a link to the source: the guest can neither be given back nor be
// saved before it is whole. That it ends meanwhile is no failure: its disks are completed, and [Peer.Done] is closed. When
// the source is lost meanwhile, and is not found again within Config.RescueTimeout, the error wraps migrate.ErrUnsettled, and
// the peer is there: its guest is frozen until [Peer.Search] has found the source.
func Receive(ctx context.Context, cfg Config, streams []io.ReadWriter) (*Peer, *migrate.Report, error) {
	cfg = cfg.withDefaults()
	if cfg.Storage != nil {
		cfg.Storage.Reset()
	}
	receiving, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	t := &target{cfg: cfg, fail: fail, streams: streams}
	defer t.stopWatch()
	report, err := migrate.Receive(receiving, streams, migrate.DestinationConfig{
		Target: t, Journal: t, Concurrency: cfg.Concurrency, OwnThreads: cfg.OwnThreads, MaxState: runner.StateDeviceSize, Progress: cfg.Progress, Logger: cfg.Logger,
		DisablePostCopy: cfg.DisablePostCopy, Reconnect: cfg.FindSource, Admit: cfg.Authorize.again(false, t.migration), RescueTimeout: cfg.RescueTimeout, OnState: cfg.OnReceive,
	})
	switch {
	case err == nil:
		t.agent.Wait()
		report.AgentAfter = migrate.Millis(t.agentTook)
		p := newPeer(cfg, t.instance)
		p.startSync()
		return p, report, nil
	case errors.Is(err, migrate.ErrUnsettled):
		p := newPeer(cfg, t.instance)
		p.rest = &rest{claim: claim(t.instance), cancel: func() {}, done: make(chan struct{}), report: report, err: err}
		close(p.rest.done)
		p.completeAlone(ctx, t.instance)
		p.startSync()
		_, err := p.Arrival()
		return p, report, err
	case t.instance != nil && errors.Is(err, migrate.ErrInDoubt):
		// It is ours, and it does not run. Saved, it is not lost, whatever becomes of the doubt.
		dead := endsSoon(t.instance.Machine())
		err = errors.Join(err, t.instance.Close(ctx))
		if dead {
			err = fmt.Errorf("%w; it belongs here, and its VM has ended, as by a power loss: boot it from its disks with --boot", err)
		}
	}
	return nil, report, err
}

// dying is how long a machine that does not answer any more may take to have ended.
const dying = 2 * time.Second

// endsSoon reports whether a machine that has failed is ending, or has ended.
func endsSoon(m vmm.Machine) bool {
	select {
	case <-m.Done():
		return true
	case <-time.After(dying):
		return false
	}
}

// Send hands the instance over to the peer at the other end of streams. After success the instance is gone from here and
// only Close is left to call. After an error that wraps migrate.ErrInDoubt it is paused for good; after any other error,
// ErrStranger among them, it runs on. The streams are closed when it returns. The report is there in any case.
//
// What it cannot be done beside, or at all, fails with an error that wraps ErrBusy, ErrPaused or ErrNotMigratable, and the other
// side is told.
func (p *Peer) Send(ctx context.Context, streams []io.ReadWriter) (*migrate.Report, error) {
	if err := p.cfg.Authorize.give(ctx, streams); err != nil { // before anything is said of the VM, as that it is busy
		return &migrate.Report{}, err
	}
	ctx, done, err := p.beginSend(ctx)
	if err != nil {
		code, reason := refusal(err)
		refuse(streams, wire.RoleSource, code, reason)
		return &migrate.Report{}, err
	}
	defer done()
	return p.send(ctx, streams, nil)
}

// SendTo is Send to whoever dial connects to, as [DialStreams] does. Nobody is dialled when the VM cannot be sent now, so that a peer
// which waits for one hears nothing of it. Dialling is a part of it: the peer is busy meanwhile, and [Peer.Cancel] ends it. The
// report is empty when nobody was there.
func (p *Peer) SendTo(ctx context.Context, dial func(context.Context) ([]io.ReadWriter, error)) (*migrate.Report, error) {
	ctx, done, err := p.beginSend(ctx)
	if err != nil {
		return &migrate.Report{}, err
	}
	defer done()
	streams, err := dial(ctx)
	if err != nil {
		return &migrate.Report{}, err
	}
	if err := p.cfg.Authorize.give(ctx, streams); err != nil {
		return &migrate.Report{}, err
	}
	return p.send(ctx, streams, nil)
}

// beginSend registers a Send, if the VM can be sent now.
func (p *Peer) beginSend(ctx context.Context) (context.Context, func(), error) {
	if err := p.cfg.CheckMigratable(); err != nil {
		return nil, nil, err
	}
	ctx, done, err := p.begin(ctx, migrating)
	if err != nil {
		return nil, nil, err
	}
	if err = p.checkWhole(ctx); err == nil && !p.Migratable() {
		err = fmt.Errorf("%w: that was forbidden here", ErrNotMigratable)
	}
	if err != nil {
		done()
		return nil, nil, err
	}
	return ctx, done, nil
}

// checkWhole reports that something of the instance is still on its way here. If nothing is, that is durable afterwards.
func (p *Peer) checkWhole(ctx context.Context) error {
	if n := p.instance.Missing(); n > 0 {
		return fmt.Errorf("%w: %d bytes of the instance are still to come from the peer that had it", ErrBusy, n)
	}
	return p.instance.Complete(ctx)
}

// send is a Send that was begun, to a peer or to ourselves, which adapts what is sent.
func (p *Peer) send(ctx context.Context, streams []io.ReadWriter, adapt func(*migrate.SourceConfig)) (*migrate.Report, error) {
	sc, err := p.source()
	if err != nil {
		return &migrate.Report{}, err
	}
	err = p.instance.BringMemory(ctx)
	if err == nil {
		err = p.addBases(ctx, &sc)
	}
	if err != nil {
		return &migrate.Report{}, err
	}
	if adapt != nil {
		adapt(&sc)
	} else {
		p.offerMemory(streams, &sc)
		defer p.addStored(ctx, &sc)()
	}
	report, err := send(ctx, streams, sc)
	if err != nil && !errors.Is(err, migrate.ErrInDoubt) && !errors.Is(err, migrate.ErrUnsettled) {
		sc.Guest.(source).kept.undo()
	}
	return report, err
}

// offerMemory has a destination on this host take the memory as it is.
func (p *Peer) offerMemory(streams []io.ReadWriter, sc *migrate.SourceConfig) {
	if who, err := whoIs(streams); err != nil || who.Process == 0 {
		return
	}
	handle, err := p.instance.Handle()
	if err != nil {
		p.cfg.Logger.Debug("memory is sent, not handed over", "error", err)
		return
	}
	for n := range sc.Devices {
		if sc.Devices[n].Name == runner.MemoryDevice {
			sc.Devices[n].Handle = handle
		}
	}
}

// source is the instance as a source of migrations.
func (p *Peer) source() (migrate.SourceConfig, error) {
	spec, err := json.Marshal(p.instance.Description())
	if err != nil {
		return migrate.SourceConfig{}, fmt.Errorf("describe machine: %w", err)
	}
	opened := make(map[string]runner.Device)
	for _, d := range p.instance.Devices() {
		opened[d.Config.Name] = d
	}
	var devices []migrate.SourceDevice
	for _, d := range p.cfg.Devices {
		if of, ok := opened[d.Name]; ok && !d.Stationary {
			sent := migrate.SourceDevice{Name: d.Name, Device: of.Block, Tracker: of.Tracker, Policy: d.Policy}
			if d.Shared {
				sent.Tracker = nil // nobody writes it
			}
			devices = append(devices, sent)
		}
	}
	id := wire.NewID()
	if given, ok := p.instance.InDoubt(); ok {
		id = given // it is gone on with
	}
	kept := p.keep()
	if _, given := p.instance.InDoubt(); kept != nil && given {
		kept.begun, kept.diverts = true, true
	}
	return migrate.SourceConfig{
		ID: id, Devices: devices, Spec: spec, Network: kept.offer(), Guest: source{p.instance, kept}, Journal: source{p.instance, kept}, Goal: p.cfg.Goal, Concurrency: p.cfg.Concurrency,
		ResumeTimeout: p.cfg.RescueTimeout, Reconnect: p.cfg.FindDestination, Admit: p.cfg.Authorize.again(true, func() string { return id }), RescueTimeout: p.cfg.RescueTimeout,
		Progress: p.cfg.Progress, OnState: p.cfg.OnState, Logger: p.cfg.Logger,
	}, nil
}

// send is migrate.Send, with ErrStranger.
func send(ctx context.Context, streams []io.ReadWriter, cfg migrate.SourceConfig) (*migrate.Report, error) {
	connecting, onState := false, cfg.OnState
	cfg.OnState = func(s migrate.SourceState) {
		connecting = s == migrate.SourceConnecting || connecting && s != migrate.SourceOffering
		if onState != nil {
			onState(s)
		}
	}
	report, err := migrate.Send(ctx, streams, cfg)
	if err != nil && connecting && ctx.Err() == nil {
		err = fmt.Errorf("%w: %w", ErrStranger, err)
	}
	return report, err
}

// Rejoin goes on with the migration that left the instance in doubt or unsettled here: after an error of Send that says so, or
// in a peer that has adopted such an instance. It looks for the other side by Config.FindDestination until it is found, or
// Config.RescueTimeout is over, and returns as Send does. An instance that was not given away is refused with an error that wraps
// runner.ErrNotGiven.
func (p *Peer) Rejoin(ctx context.Context) (*migrate.Report, error) {
	if _, ok := p.InDoubt(); !ok {
		return &migrate.Report{}, fmt.Errorf("rejoin: %w", runner.ErrNotGiven)
	}
	ctx, done, err := p.begin(ctx, rejoining)
	if err != nil {
		return &migrate.Report{}, err
	}
	defer done()
	sc, err := p.source()
	if err != nil {
		return &migrate.Report{}, err
	}
	return migrate.RejoinSource(ctx, sc)
}

// CheckSavable reports why the instance could not be saved: see [Config.CheckSavable]. Close shuts its guest down then.
func (p *Peer) CheckSavable() error { return p.cfg.CheckSavable() }

// VMPath is the folder with the machine's sockets; guest sockets are at VMPath/vsock.sock.
func (p *Peer) VMPath() string { return p.instance.VMPath() }

// ResumeDuration is how long the instance took to resume, zero for one that was received or booted.
func (p *Peer) ResumeDuration() time.Duration { return p.instance.ResumeDuration() }

// Instance is the instance itself.
func (p *Peer) Instance() *runner.Instance { return p.instance }

// Done is closed when the machine has ended by itself: the guest shut down, or the hypervisor failed; Err says which.
func (p *Peer) Done() <-chan struct{} { return p.instance.Machine().Done() }

// Err is why the machine ended, once Done is closed: nil when the guest shut down.
func (p *Peer) Err() error { return p.instance.Machine().Err() }

// Kill ends the instance here without saving it, as a power cut would.
func (p *Peer) Kill() error {
	err := p.instance.Kill()
	p.endRest()
	p.Cancel()
	p.endSync()
	return err
}

// Adopted reports whether the instance was taken over from a peer that had died.
func (p *Peer) Adopted() bool { return p.instance.Adopted() }

// InDoubt returns the migration, by the public part of its id, by which the instance was given away and which nobody has confirmed, if
// there is one. The guest is paused here, and may run there.
func (p *Peer) InDoubt() (migration string, ok bool) {
	migration, ok = p.instance.InDoubt()
	return wire.PublicID(migration), ok
}

// Running reports whether the guest runs here.
func (p *Peer) Running() bool { return p.instance.Running() }

// Close ends the instance here, saving it if it is ours: see runner.Instance.Close. A Send under way is cancelled, which
// leaves the instance here unless it was committed. After an error that wraps runner.ErrUnsaved the instance is still here,
// paused: Close again, or Kill.
func (p *Peer) Close(ctx context.Context) error {
	p.mu.Lock()
	op := p.op
	p.mu.Unlock()
	if op != nil {
		op.cancel()
		<-op.done
	}
	p.endRest()
	p.endSync()
	err := p.instance.Close(ctx)
	if !errors.Is(err, runner.ErrUnsaved) {
		p.agent.Wait()
	} else if p.instance.Missing() > 0 {
		p.Search()
	}
	return err
}

// source is an instance as migrate.Send sees it.
type source struct {
	*runner.Instance
	kept *keeping
}

var _ migrate.Networker = source{}

func (s source) Network(ctx context.Context, answer json.RawMessage) { s.kept.connect(ctx, answer) }

func (s source) Pause(ctx context.Context) error {
	s.kept.divert(ctx)
	err := s.Instance.Pause(ctx)
	if err == nil {
		s.kept.hand(ctx)
	}
	return err
}

func (s source) Lend(devices []string)                        { s.Instance.Lend(len(devices) > 0) }
func (s source) State(ctx context.Context, w io.Writer) error { return s.SaveState(ctx, w) }
func (s source) Resume(ctx context.Context) error {
	s.kept.undo()
	return s.Continue(ctx)
}

// Commit has the guest's connections known at the destination before it may run there.
func (s source) Commit(ctx context.Context, id string) error {
	s.kept.wait()
	return s.Release(ctx, id)
}
func (s source) Abort(ctx context.Context, id string) error { return s.Reclaim(ctx, id) }

func (s source) Confirm(ctx context.Context, _ string) error {
	s.kept.left()
	return s.Instance.Confirm(ctx)
}

func (s source) Done(context.Context, string) error {
	s.kept.left()
	s.Released()
	return nil
}

// target is an instance that is being received, as migrate.Receive sees it.
type target struct {
	cfg      Config
	instance *runner.Instance
	id       string // of the migration; set when there is a manifest
	kept     kept
	names    []string // of the devices, as the manifest has them
	shared   []bool   // of these, which are the source's own

	streams []io.ReadWriter
	fail    context.CancelCauseFunc // ends the migration, as long as it can end
	unwatch func()                  // ends the watch over the machine; nil: there is none

	agent     sync.WaitGroup // the telling of the agent that the guest runs
	agentTook time.Duration  // once agent is done
}

var _ migrate.Postponer = (*target)(nil)

func (t *target) Prepare(ctx context.Context, m *wire.Manifest) ([]block.Device, error) {
	if err := t.cfg.Authorize.take(ctx, t.streams, m); err != nil {
		return nil, err
	}
	desc, err := runner.ParseDescription(m.Spec)
	if err != nil {
		return nil, migrate.Refuse("machine description: %v", err)
	}
	t.id = m.ID
	incoming := make([]runner.Incoming, len(m.Devices))
	for n, d := range m.Devices {
		incoming[n] = runner.Incoming{Name: d.Name, Size: d.Size}
		t.names = append(t.names, d.Name)
		if d.Name == runner.MemoryDevice && d.Handle != "" && d.Size == desc.MemorySize && !t.cfg.KeepCommitPoint {
			incoming[n].Memory = t.takeMemory(d)
		}
		t.shared = append(t.shared, incoming[n].Memory != nil)
	}
	if err := t.checkBases(m); err != nil {
		return nil, err
	}
	i, err := runner.Prepare(ctx, t.cfg.runner(), m.ID, desc, incoming)
	if errors.Is(err, runner.ErrMismatch) {
		return nil, migrate.Refuse("%v", err)
	} else if err != nil {
		return nil, err
	}
	t.instance, t.unwatch = i, watch(i.Machine(), t.fail)
	devices := make([]block.Device, len(incoming))
	for n, in := range incoming {
		for _, d := range i.Devices() {
			if d.Config.Name == in.Name {
				devices[n] = d.Block
			}
		}
	}
	return devices, nil
}

// takeMemory opens the memory of a source on this host; nil if it has to be sent.
func (t *target) takeMemory(d wire.Device) *os.File {
	who, err := whoIs(t.streams)
	if err == nil && who.Process == 0 {
		return nil
	}
	var memory *os.File
	if err == nil {
		memory, err = runner.OpenMemory(who.Process, d.Handle, d.Size)
	}
	if err != nil {
		t.cfg.Logger.Warn("the source's memory cannot be taken as it is, and is sent", "error", err)
	}
	return memory
}

// migration is its id, once Prepare was called.
func (t *target) migration() string { return t.id }

// Shared implements migrate.SharedTarget.
func (t *target) Shared() []bool { return t.shared }

// Arriving implements migrate.ArrivalTarget.
func (t *target) Arriving() { t.instance.Announce() }

func (t *target) Load(ctx context.Context, state io.Reader) error { return t.instance.Load(ctx, state) }

// Run returns when the guest serves. An agent that does not answer is the operator's to know, not a reason to stop it.
func (t *target) Run(ctx context.Context) error {
	select {
	case <-t.instance.Machine().Done(): // after it was said that it could run, and before it was to
		return fmt.Errorf("%w: the machine that waited for it has ended: %w", migrate.ErrNeverRan, orNone(t.instance.Machine().Err()))
	default:
	}
	t.arrive()
	if err := t.instance.Run(ctx); err != nil {
		return err
	}
	t.agent.Go(func() {
		began := time.Now()
		if err := t.instance.AfterResume(context.WithoutCancel(ctx)); err != nil {
			t.cfg.Logger.Error("the instance was received and runs, but its agent failed after the resume", "error", err)
		}
		t.agentTook = time.Since(began)
	})
	return nil
}

func (t *target) CanPostpone() []bool {
	can := make([]bool, len(t.names))
	for n, name := range t.names {
		can[n] = t.instance.CanPostpone(name)
	}
	return can
}

func (t *target) Postpone(ctx context.Context, missing [][]block.Range, ask func(int, block.Range)) ([]migrate.Late, error) {
	late := make(map[string][]block.Range)
	for n, ranges := range missing {
		late[t.names[n]] = ranges
	}
	devices, err := t.instance.Postpone(ctx, late, t.asker(ask))
	if err != nil {
		return nil, err
	}
	return t.late(devices), nil
}

// asker asks by name whoever is asked by number.
func (t *target) asker(ask func(int, block.Range)) runner.Ask {
	numbers := make(map[string]int)
	for n, name := range t.names {
		numbers[name] = n
	}
	return func(name string, r block.Range) { ask(numbers[name], r) }
}

// late are the devices in the manifest's order, nil where nothing is missing.
func (t *target) late(devices map[string]runner.Late) []migrate.Late {
	out := make([]migrate.Late, len(t.names))
	for n, name := range t.names {
		if l, ok := devices[name]; ok {
			out[n] = l
		}
	}
	return out
}

func (t *target) Complete(ctx context.Context) error { return t.instance.Complete(ctx) }

func (t *target) stopWatch() {
	if t.unwatch != nil {
		t.unwatch()
	}
}

// Discard ends the machine, too, which then surprises nobody.
func (t *target) Discard(ctx context.Context) error {
	t.stopWatch()
	t.depart()
	return t.instance.Discard(ctx)
}

// Forget implements migrate.Forgetter.
func (t *target) Forget(context.Context) error { return t.instance.Forget() }

// Commit ends the watch over the machine: one that ends from now on is the death of the guest, and not the migration's to undo.
func (t *target) Commit(ctx context.Context, id string) error {
	t.stopWatch()
	return t.instance.Own(ctx, id)
}

func (t *target) Abort(ctx context.Context, id string) error {
	t.depart()
	return t.instance.Refuse(ctx, id)
}
func (t *target) Done(context.Context, string) error { return t.instance.Settled() }
