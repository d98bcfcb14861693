package peer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/migrate"
	"github.com/drafter-vm/drafter/pkg/runner"
	"github.com/drafter-vm/drafter/pkg/vmpackage"
	"github.com/drafter-vm/drafter/pkg/wire"
)

// Snapshot writes the VM, which runs on, down as a package in a new folder. The guest is paused for as long as a migration would:
// for its device state, and what it wrote last. Config.Goal applies, and all of the memory and the disks is written meanwhile. When it
// fails nothing is left. The report is that of the writing side. Where dir exists the error wraps fs.ErrExist.
func (p *Peer) Snapshot(ctx context.Context, dir string) (*vmpackage.Manifest, *migrate.Report, error) {
	t := Terminator{Dir: dir, Copy: true, Concurrency: p.cfg.Concurrency, RescueTimeout: p.cfg.RescueTimeout, Logger: p.cfg.Logger}
	err := p.cfg.CheckSavable()
	if err == nil {
		err = t.Check()
	}
	if err != nil {
		return nil, nil, fmt.Errorf("snapshot VM: %w", err)
	}
	var manifest *vmpackage.Manifest
	report, err := p.copyTo(ctx, nil, func(there net.Conn) (report *migrate.Report, err error) {
		manifest, report, err = t.Receive(ctx, []io.ReadWriter{there})
		return report, err
	})
	if err != nil {
		return nil, report, fmt.Errorf("snapshot VM: %w", err)
	}
	return manifest, report, nil
}

// CopyTarget takes a copy of a VM that runs on: its devices, as they were at one moment, and the state of the machine.
type CopyTarget interface {
	// Prepare returns what the devices are to be written to, in their order. They are all devices of the machine but its state; their Base names the
	// base that they hold already, if there is one.
	Prepare(ctx context.Context, desc runner.Description, devices []wire.Device) ([]block.Device, error)
	// Keep is called when all is written. The guest was paused at the given time.
	Keep(ctx context.Context, state []byte, paused time.Time) error
	// Discard is called instead when something failed after Prepare.
	Discard(ctx context.Context) error
}

// Copy gives a copy of the VM, which is paused for a moment, to a target. Bases are what devices of the target hold, by their
// names: only what differs is written then. The report is that of the target's side.
func (p *Peer) Copy(ctx context.Context, to CopyTarget, bases map[string]*migrate.BaseIndex) (*migrate.Report, error) {
	if err := p.cfg.CheckSavable(); err != nil {
		return nil, fmt.Errorf("copy VM: %w", err)
	}
	report, err := p.copyTo(ctx, bases, func(there net.Conn) (*migrate.Report, error) {
		return migrate.Receive(ctx, []io.ReadWriter{there}, migrate.DestinationConfig{
			Target: &copyReceiver{to: to, bases: bases}, Copy: true, Concurrency: p.cfg.Concurrency, MaxState: runner.StateDeviceSize - block.PageSize, Logger: p.cfg.Logger,
		})
	})
	if err != nil {
		return report, fmt.Errorf("copy VM: %w", err)
	}
	return report, nil
}

// copyTo sends a copy of the VM to what receives it in this process.
func (p *Peer) copyTo(ctx context.Context, bases map[string]*migrate.BaseIndex, receive func(net.Conn) (*migrate.Report, error)) (*migrate.Report, error) {
	here, there, err := socketPair()
	if err != nil {
		return nil, err
	}
	type result struct {
		report *migrate.Report
		err    error
	}
	sent := make(chan result, 1)
	go func() {
		report, err := p.sendCopy(ctx, here, bases)
		sent <- result{report, err}
	}()
	report, err := receive(there)
	s := <-sent
	if err == nil {
		report.Downtime, report.Parts = s.report.Downtime, s.report.Parts // which this side alone sees whole
		return report, s.err
	}
	// One of them failed because the other did, and was told no more than a stranger would be.
	var told *migrate.PeerError
	switch {
	case s.err == nil || errors.As(s.err, &told):
	case errors.As(err, &told):
		err = s.err
	default:
		err = fmt.Errorf("%w; %w", s.err, err)
	}
	return report, err
}

// sendCopy sends a copy of the VM to ourselves.
func (p *Peer) sendCopy(ctx context.Context, to net.Conn, bases map[string]*migrate.BaseIndex) (*migrate.Report, error) {
	streams := []io.ReadWriter{to}
	ctx, done, err := p.begin(ctx, copying)
	if err == nil {
		defer done()
		err = p.checkWhole(ctx)
	}
	if err != nil {
		code, reason := refusal(err)
		refuse(streams, wire.RoleSource, code, reason)
		return &migrate.Report{}, err
	}
	defer closeAll(streams)
	return p.send(ctx, streams, func(sc *migrate.SourceConfig) {
		for n := range sc.Devices {
			d := &sc.Devices[n]
			if x := bases[d.Name]; x != nil && x.Size() == d.Device.Size() {
				d.Base, d.Changed = x, nil
			}
			d.RequireBase = false
		}
	})
}

// copyReceiver is a CopyTarget, as migrate.Receive sees it.
type copyReceiver struct {
	to    CopyTarget
	bases map[string]*migrate.BaseIndex
	state []byte

	paused time.Time
}

var (
	_ migrate.Keeper        = (*copyReceiver)(nil)
	_ migrate.BaseTarget    = (*copyReceiver)(nil)
	_ migrate.ArrivalTarget = (*copyReceiver)(nil)
)

func (r *copyReceiver) Prepare(ctx context.Context, m *wire.Manifest) ([]block.Device, error) {
	desc, err := describe(m)
	if err != nil {
		return nil, err
	}
	return r.to.Prepare(ctx, desc, m.Devices)
}

func (r *copyReceiver) Bases(_ context.Context, m *wire.Manifest) ([]*migrate.BaseIndex, error) {
	out := make([]*migrate.BaseIndex, len(m.Devices))
	for n, d := range m.Devices {
		out[n] = r.bases[d.Name]
	}
	return out, nil
}

func (r *copyReceiver) Load(_ context.Context, state io.Reader) (err error) {
	r.state, err = readState(state)
	return err
}

func (r *copyReceiver) Arriving()                         { r.paused = time.Now() }
func (r *copyReceiver) Run(context.Context) error         { return errors.New("a copy does not run") }
func (r *copyReceiver) Keep(ctx context.Context) error    { return r.to.Keep(ctx, r.state, r.paused) }
func (r *copyReceiver) Discard(ctx context.Context) error { return r.to.Discard(ctx) }
