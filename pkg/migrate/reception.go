package migrate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/wire"
)

// Reception is a [Receive] under way, whose guest may run before it is over.
type Reception struct {
	running, done chan struct{}
	report        *Report
	err           error
}

// Begin is Receive for those who want the guest as soon as it runs: it returns at once. All hooks are called as by Receive,
// by one goroutine of the Reception's.
//
//	r := migrate.Begin(ctx, streams, cfg)
//	select {
//	case <-r.Running():
//		// the guest serves; what it touches comes first, the rest behind
//	case <-r.Done():
//		// it does not run here; see Wait
//	}
//	report, err := r.Wait()
func Begin(ctx context.Context, streams []io.ReadWriter, cfg DestinationConfig) *Reception {
	return begin(func(running func()) (*Report, error) { return receive(ctx, streams, cfg, running) })
}

func begin(f func(running func()) (*Report, error)) *Reception {
	r := &Reception{running: make(chan struct{}), done: make(chan struct{})}
	go func() { // its owner waits for done
		defer close(r.done)
		r.report, r.err = f(sync.OnceFunc(func() { close(r.running) }))
	}()
	return r
}

// Running is closed once the guest runs here, with or without all its content. It is never closed when it does not get that
// far.
func (r *Reception) Running() <-chan struct{} { return r.running }

// Done is closed when Wait has an answer.
func (r *Reception) Done() <-chan struct{} { return r.done }

// Wait waits for the end and returns what Receive returns.
func (r *Reception) Wait() (*Report, error) {
	<-r.done
	return r.report, r.err
}

// Claim is what a process that was restarted knows of a guest it had received before: that it belongs here, by its journal, and
// what of it is missing.
type Claim struct {
	ID string // of the migration

	// Devices lists all devices of the guest. ask is as in [Postponer].Postpone, with positions in this list.
	Devices func(ctx context.Context, ask func(device int, r block.Range)) ([]ClaimDevice, error)

	// Complete is as in [Postponer].
	Complete func(ctx context.Context) error
}

// ClaimDevice is a device of a Claim.
type ClaimDevice struct {
	Name string // as it was in the migration
	Size int64  // bytes
	Late Late   // nil: nothing of it is missing
}

// RejoinDestination is the destination's part of a migration after the commit, in a process that was restarted and has adopted
// the guest: running, or about to be. It looks for the source by cfg.Reconnect, gets what is missing, and tells the source when
// nothing is. Also a guest that misses nothing is claimed in this way: the source may not know. It returns as Receive does. Of
// cfg, Journal and Reconnect are needed; Target is not used.
//
// Cancelling ctx ends the search for the source, and has no effect while there is a link to it.
func RejoinDestination(ctx context.Context, claim Claim, cfg DestinationConfig) (*Report, error) {
	cfg.Target = claimed{}
	err := cfg.check()
	switch {
	case err != nil:
	case cfg.Reconnect == nil:
		err = errors.New("no way to reconnect: set DestinationConfig.Reconnect")
	default:
		err = wire.CheckName(claim.ID)
	}
	if err != nil {
		err = fmt.Errorf("rejoin migration: %w", err)
		return &Report{ID: wire.PublicID(claim.ID), Role: wire.RoleDestination.String(), Outcome: DestinationIncomplete.String(), Error: err.Error()}, fmt.Errorf("%w: %w", ErrUnsettled, err)
	}
	d := newDestination(cfg, DestinationRejoining, func() {})
	d.manifest = &wire.Manifest{ID: claim.ID}
	d.log = d.log.With("migration", wire.PublicID(claim.ID))
	d.version, d.fresh, d.standing, d.complete = 2, true, wire.Runs, claim.Complete
	return d.receive(0, func() error {
		d.state.begin()
		return d.conclude(ctx, d.reclaim(ctx, claim))
	})
}

// reclaim takes up a claim.
func (d *destination) reclaim(ctx context.Context, claim Claim) error {
	fail := func(err error) error { return &afterCommitError{err: err, incomplete: true} }
	devices, err := claim.Devices(ctx, d.ask)
	if err != nil {
		return fail(fmt.Errorf("list devices: %w", err))
	}
	// Nobody is asked before the devices are known here: what is waited for is asked about again in each session.
	var list []*targetDevice
	for _, c := range devices {
		t := &targetDevice{name: c.Name, size: c.Size, digest: newDigest(c.Size)}
		if c.Late != nil {
			t.late, t.lacking, t.asked = c.Late, newPageSet(c.Size), newPageSet(c.Size)
			for off := int64(0); ; {
				r, err := c.Late.NextMissing(off)
				if errors.Is(err, io.EOF) {
					break
				}
				if err != nil || r.Offset < off || r.Length <= 0 {
					return fail(fmt.Errorf("find what device %q misses from %d on: %d bytes at %d: %w", c.Name, off, r.Length, r.Offset, err))
				}
				t.lacking.each(r, func(page int64) { t.lacking.put(page) })
				off = r.End()
			}
		}
		d.size.Add(c.Size)
		list = append(list, t)
		d.manifest.Devices = append(d.manifest.Devices, wire.Device{Name: c.Name, Size: c.Size})
	}
	d.asks.mu.Lock()
	d.devices = list
	d.asks.mu.Unlock()
	d.lateBytes = d.lacking() * block.PageSize
	d.lacks = true
	if d.lateBytes == 0 {
		d.served = true
		if err := d.completed(context.WithoutCancel(ctx), nil); err != nil {
			return fail(err)
		}
		return nil
	}
	return d.settle(ctx, d.reconnect(ctx, errRestarted), func() {})
}

// claimed stands in for the Target of a claim.
type claimed struct{ Target }

// Disclaim tells the source of the migration id, which this host knows not to have been completed here, that the guest never ran here and
// never will. It looks for the source by cfg.Reconnect, within cfg.RescueTimeout; who cannot prove to be it is refused. Once it was found,
// cfg.Journal records what it is told, so that it stays true. Of cfg, Journal and Reconnect are needed; Target is not used.
func Disclaim(ctx context.Context, cfg DestinationConfig, id string) error {
	cfg.Target = claimed{}
	err := cfg.check()
	if err == nil && cfg.Reconnect == nil {
		err = errors.New("no way to reconnect: set DestinationConfig.Reconnect")
	}
	if err == nil {
		err = wire.CheckName(id)
	}
	if err != nil {
		return fmt.Errorf("disclaim guest: %w", err)
	}
	d := newDestination(cfg, DestinationDiscarded, func() {})
	d.manifest, d.version, d.standing = &wire.Manifest{ID: id}, 2, wire.NeverRan
	d.log = d.log.With("migration", wire.PublicID(id))
	recorded := false
	err = meet(ctx, seeker{cfg.Reconnect, cfg.Admit, d.cfg.RescueTimeout, d.log}, errRestarted, d.prove, func(c *content) (bool, error) {
		d.link = c.link
		if !recorded {
			if err := cfg.Journal.Abort(context.WithoutCancel(ctx), id); err != nil {
				d.leaveSession(err)
				return true, fmt.Errorf("record that the guest never ran: %w", err)
			}
			recorded = true
		}
		_, err := d.rejoin(c)
		if err != nil {
			d.leaveSession(err)
			return false, err
		}
		d.link.goodbye(nil, false)
		d.finish()
		return true, nil
	})
	if err != nil {
		return fmt.Errorf("disclaim guest of migration %q: %w", wire.PublicID(id), err)
	}
	return nil
}

// sought reads what a source asks for, which must be the migration id, and must be its own.
func (l *link) sought(m message, id string) error {
	seek, err := wire.DecodeSeek(m.payload)
	switch {
	case err != nil:
	case seek.ID != wire.PublicID(id):
		err = tell(wire.CodeRefused, fmt.Errorf("source speaks of migration %q, not of %q", seek.ID, wire.PublicID(id)), "this is another migration")
	case !seek.Proves(id, l.meeting):
		err = tell(wire.CodeRefused, fmt.Errorf("%w: it calls itself the source of migration %q", ErrUnproven, seek.ID), "this is not the source of that migration")
	}
	return err
}
