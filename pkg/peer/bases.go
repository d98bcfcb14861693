package peer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
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

// index returns the index of a device's base, nil where there is none to be had.
func (c Config) index(ctx context.Context, d runner.DeviceConfig) *migrate.BaseIndex {
	if d.Overlay == "" {
		return nil // the base is the device
	}
	ctx, cancel := context.WithTimeoutCause(ctx, indexPatience, errors.New("it takes too long to read"))
	defer cancel()
	cache := filepath.Join(filepath.Dir(d.Base), "."+filepath.Base(d.Base)+".index")
	x, err := migrate.OpenBaseIndex(ctx, d.Base, cache, c.Logger)
	if err != nil {
		c.Logger.Info("all of a device travels, as its base is not known", "device", d.Name, "error", err)
		return nil
	}
	return x
}

// addBases names the bases of what is sent.
func (p *Peer) addBases(ctx context.Context, sc *migrate.SourceConfig) {
	opened := make(map[string]runner.Device)
	for _, d := range p.instance.Devices() {
		opened[d.Config.Name] = d
	}
	var g errgroup.Group
	for n := range sc.Devices {
		d := &sc.Devices[n]
		g.Go(func() error {
			of := opened[d.Name]
			if x := p.cfg.index(ctx, of.Config); x != nil && x.Size() == d.Device.Size() {
				d.Base = x
				if of.Overlay != nil {
					d.Changed = of.Overlay.NextChange
				}
			}
			return nil
		})
	}
	_ = g.Wait() // they all return nil
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
			x := t.cfg.index(ctx, d.Config)
			if x == nil || x.Size() != want.Size || x.Digest().String() != want.Base {
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
	buffer := make([]byte, 256<<10)
	for off := int64(0); ; {
		r, err := d.Overlay.NextChange(off)
		if err == io.EOF {
			return nil
		}
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return err
		}
		p := buffer[:min(r.Length, int64(len(buffer)))]
		if n, err := base.ReadAt(p, r.Offset); n < len(p) {
			return err
		}
		if _, err := d.Block.WriteAt(p, r.Offset); err != nil {
			return err
		}
		off = r.Offset + int64(len(p))
	}
}
