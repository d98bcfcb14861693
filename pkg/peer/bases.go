package peer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/migrate"
	"github.com/drafter-vm/drafter/pkg/runner"
	"github.com/drafter-vm/drafter/pkg/wire"
)

// Instances are mostly what the package holds that they were made from. Where two peers have the same package, what is still
// as in it does not travel. Each of them knows its package by an index, which is kept in a hidden file beside each base.

// indexPatience is how long a migration waits for the index of a base that was never read before. Without it all of a device
// travels, which is no harm.
const indexPatience = 3 * time.Second

// index returns the index of a device's base, nil where there is none to be had. Of a device whose base is to be on both sides it takes as
// long as it takes, and fails.
// Opened, if not nil, is the file that is in use as the base: another that has taken its place is not it.
func (c Config) index(ctx context.Context, d Device, opened os.FileInfo) (*migrate.BaseIndex, error) {
	if d.Overlay == "" && !d.hasBase() {
		return nil, nil // the base is the device
	}
	if !d.hasBase() {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, indexPatience, errors.New("it takes too long to read"))
		defer cancel()
	}
	cache := filepath.Join(filepath.Dir(d.Base), "."+filepath.Base(d.Base)+".index")
	x, err := migrate.OpenBaseIndex(ctx, d.Base, cache, c.Logger)
	if err == nil && opened != nil {
		var now os.FileInfo
		if now, err = os.Stat(d.Base); err == nil && !os.SameFile(now, opened) {
			err = fmt.Errorf("%q is another file than the one that the VM has been using since it was started: restore that, or close the VM and start it again", d.Base)
		}
	}
	if err != nil && d.hasBase() {
		return nil, fmt.Errorf("device %q: %w", d.Name, err)
	} else if err != nil {
		c.Logger.Info("all of a device travels, as its base is not known", "device", d.Name, "error", err)
		return nil, nil
	}
	return x, nil
}

// IndexBases works out the indexes of the bases that are to be on both sides of a migration (Device.SharedBase), and keeps them beside the bases, so that
// no migration waits for that: each base is read once, some 0.3 s for each GiB of data that is in the page cache. A Receive does so, too, but the
// source gives up within a minute.
func (c Config) IndexBases(ctx context.Context) error {
	c = c.withDefaults()
	for _, d := range c.Devices {
		if !d.hasBase() {
			continue
		}
		if _, err := c.index(ctx, d, nil); err != nil {
			return err
		}
	}
	return nil
}

// device is the configured one of that name.
func (c Config) device(name string) (Device, bool) {
	n := slices.IndexFunc(c.Devices, func(d Device) bool { return d.Name == name })
	if n < 0 {
		return Device{}, false
	}
	return c.Devices[n], true
}

// addBases names the bases of what is sent.
func (p *Peer) addBases(ctx context.Context, sc *migrate.SourceConfig) error {
	opened := make(map[string]runner.Device)
	for _, d := range p.instance.Devices() {
		opened[d.Config.Name] = d
	}
	g, ctx := errgroup.WithContext(ctx)
	for n := range sc.Devices {
		d := &sc.Devices[n]
		g.Go(func() error {
			c, ok := p.cfg.device(d.Name)
			if !ok {
				return nil
			}
			of := opened[d.Name]
			x, err := p.cfg.index(ctx, c, of.Base)
			if err != nil {
				return err
			}
			d.RequireBase = c.hasBase()
			if x == nil || x.Size() != d.Device.Size() {
				return nil // it is refused if it is required
			}
			d.Base = x
			if of.Overlay != nil {
				d.Changed = of.Overlay.NextChange
			} else if c.Shared {
				d.Changed = func(int64) (block.Range, error) { return block.Range{}, io.EOF }
			}
			return nil
		})
	}
	return g.Wait()
}

// checkBases refuses a VM of whose devices a base is to be here, and that names none.
func (t *target) checkBases(m *wire.Manifest) error {
	for n, d := range m.Devices {
		if c, ok := t.cfg.device(d.Name); ok && c.hasBase() && d.Base == "" && !t.shared[n] {
			return migrate.Refuse("device %q: its base is to be on both hosts, and the source names none: give it there, too, or let the device travel as a whole", d.Name)
		}
	}
	return nil
}

// Bases implements migrate.BaseTarget. A device that is to start as its base is made so here.
func (t *target) Bases(ctx context.Context, m *wire.Manifest) ([]*migrate.BaseIndex, error) {
	out := make([]*migrate.BaseIndex, len(m.Devices))
	opened := make(map[string]runner.Device)
	for _, d := range t.instance.Devices() {
		opened[d.Config.Name] = d
	}
	g, ctx := errgroup.WithContext(ctx)
	for n, want := range m.Devices {
		d, ok := opened[want.Name]
		if !ok || want.Base == "" {
			continue
		}
		g.Go(func() error {
			c, ok := t.cfg.device(want.Name)
			if !ok {
				return nil
			}
			x, err := t.cfg.index(ctx, c, d.Base)
			if err != nil {
				return err
			}
			if x == nil || x.Size() != want.Size || x.Digest().String() != want.Base {
				if c.hasBase() {
					return migrate.Refuse("device %q: its base is to be on both hosts, and they differ: the source's has digest %s and the destination's %s: bring one to the other, or let the device travel as a whole", want.Name, want.Base, x.Digest())
				}
				return nil
			}
			if c.Shared { // it is the base
				out[n] = x
				return nil
			}
			if err := becomeBase(ctx, d); err != nil {
				return fmt.Errorf("give device %q the contents of its base: %w", want.Name, err)
			}
			out[n] = x
			return nil
		})
	}
	return out, g.Wait()
}

// becomeBase gives a device the contents of its base. An overlay has them but for what it holds, which may be much of what an
// instance left that was here before.
func becomeBase(ctx context.Context, d runner.Device) (err error) {
	base, err := block.OpenFile(d.Config.Base, block.FileOptions{ReadOnly: true})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, base.Close()) }()
	if d.Overlay == nil {
		return block.Copy(ctx, d.Block, base, block.CopyOptions{Concurrency: 2})
	}
	return block.CopyRanges(ctx, d.Block, base, d.Overlay.NextChange, nil)
}
