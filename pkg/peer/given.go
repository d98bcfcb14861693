package peer

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/drafter-vm/drafter/pkg/migrate"
	"github.com/drafter-vm/drafter/pkg/runner"
	"github.com/drafter-vm/drafter/pkg/wire"
)

// Given is an instance that was given to another peer, and whose machine here is gone: see [runner.Given]. Start it in place of
// the instance when Resume, Boot, Receive or OpenMounter fails with [runner.ErrGiven]: then the other peer, which may lack
// content or never have run it, can be met again.
//
// One goroutine at a time may call its methods.
type Given struct {
	cfg   Config
	given *runner.Given
}

// OpenGiven opens an instance that was given away. Of cfg, Devices, FindDestination and what bounds and reports a migration
// are used. The error wraps runner.ErrNotGiven where there is no such instance, and runner.ErrAlive where its machine
// lives, which Adopt takes over.
func OpenGiven(ctx context.Context, cfg Config) (*Given, error) {
	cfg = cfg.withDefaults()
	given, err := runner.OpenGiven(ctx, cfg.runner())
	if err != nil {
		return nil, err
	}
	return &Given{cfg, given}, nil
}

// OpenGiven is OpenGiven for the devices of a mounter.
func (c MounterConfig) OpenGiven(ctx context.Context) (*Given, error) {
	c, err := c.withDefaults()
	if err != nil {
		return nil, err
	}
	devices, err := c.devices()
	if err != nil { // there is no package, and so nothing that was given away
		return nil, fmt.Errorf("%w: %w", runner.ErrNotGiven, err)
	}
	return OpenGiven(ctx, Config{
		Devices: devices, Concurrency: c.Concurrency, RescueTimeout: c.RescueTimeout, FindDestination: c.FindDestination, Authorize: c.Authorize,
		Progress: c.Progress, OnState: c.OnState, Logger: c.Logger,
	})
}

// devices are the devices of a mounter, wherever they are.
func (c MounterConfig) devices() ([]Device, error) {
	if c.Dir == "" {
		return c.Devices, nil
	}
	return PackageDevices(c.Dir, "")
}

// Migration is the public part of the id of the migration that the instance was given away by.
func (g *Given) Migration() string { return wire.PublicID(g.given.Migration()) }

// Confirmed reports whether the other peer has said that it runs the instance: then it lacks content that only these files
// have, as far as is known here.
func (g *Given) Confirmed() bool { return g.given.Confirmed() }

// Saved reports whether the memory is here. Otherwise a destination that misses some of it is refused, and only what it lacks
// of disks can be served.
func (g *Given) Saved() bool { return g.given.Saved() }

// errMemoryLost is told to a destination that misses memory.
var errMemoryLost = errors.New("it is lost, as the source's machine ended with its peer: give the VM up there, and boot it from its disks with --boot, and --raddr to this peer, which completes them")

// Rejoin looks for the other peer by Config.FindDestination, within Config.RescueTimeout, and serves what it lacks. It returns as
// migrate.RejoinSource does: nil when the other runs the instance and needs nothing more; ErrInDoubt or ErrUnsettled when it is
// not known yet, and Rejoin may be called again; any other error when it will never run there. Then the instance belongs
// here: Close, and it can be started, by Resume if its memory was saved and by Boot otherwise.
//
// Cancelling ctx ends it at any time, also while there is a link: the files are as they were.
func (g *Given) Rejoin(ctx context.Context) (*migrate.Report, error) {
	if g.cfg.FindDestination == nil {
		return &migrate.Report{}, fmt.Errorf("%w: no way to find the other peer: set Config.FindDestination", migrate.ErrInDoubt)
	}
	var devices []migrate.SourceDevice
	stationary := make(map[string]bool)
	for _, d := range g.cfg.Devices {
		stationary[d.Name] = d.Stationary
	}
	for _, d := range g.given.Devices() {
		if stationary[d.Config.Name] {
			continue
		}
		device := migrate.SourceDevice{Name: d.Config.Name, Device: d.Block}
		if d.Config.Name == runner.MemoryDevice && !g.given.Saved() {
			device.Lost = errMemoryLost
		}
		devices = append(devices, device)
	}
	report, err := migrate.RejoinSource(ctx, migrate.SourceConfig{
		ID: g.given.Migration(), Devices: devices, Guest: givenSource{g.given}, Journal: givenSource{g.given}, Concurrency: g.cfg.Concurrency,
		ResumeTimeout: g.cfg.RescueTimeout, Reconnect: g.cfg.FindDestination, Admit: g.cfg.Authorize.again(true, g.given.Migration), Interruptible: true, RescueTimeout: g.cfg.RescueTimeout,
		Progress: g.cfg.Progress, OnState: g.cfg.OnState, Logger: g.cfg.Logger,
	})
	if err != nil && g.given.Kept() && !errors.Is(err, migrate.ErrUnsettled) && !errors.Is(err, migrate.ErrInDoubt) {
		err = fmt.Errorf("%w: %w", migrate.ErrInDoubt, err) // as that could not be put on record
	}
	return report, err
}

// Close lets go of the files.
func (g *Given) Close() error { return g.given.Close() }

// givenSource is an instance without a machine as migrate.RejoinSource sees it: its guest stands still, and stays so.
type givenSource struct{ *runner.Given }

var _ migrate.Confirmer = givenSource{}

func (givenSource) BeforeSuspend(context.Context) error { return nil }
func (givenSource) Pause(context.Context) error         { return nil }
func (givenSource) Resume(context.Context) error        { return nil }
func (givenSource) State(context.Context, io.Writer) error {
	return fmt.Errorf("%w: it was given away", runner.ErrPhase)
}

func (givenSource) Commit(context.Context, string) error    { return nil } // it is on record
func (s givenSource) Confirm(context.Context, string) error { return s.Given.Confirm() }
func (s givenSource) Abort(context.Context, string) error   { return s.Reclaim() }
func (s givenSource) Done(context.Context, string) error    { return s.Settle() }
