package peer

import (
	"context"
	"encoding/json"
	"errors"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/migrate"
	"github.com/drafter-vm/drafter/pkg/runner"
	"github.com/drafter-vm/drafter/pkg/wire"
)

// Storage keeps what devices hold in a store that other peers reach, too: what a device has held for a while goes there while the instance runs,
// and a peer that receives the instance gets that from there. Package depot has one.
type Storage interface {
	// Reset forgets what Find has returned: another VM comes.
	Reset()

	// Sync begins to put what the device of that name holds. Nil: it is not kept.
	Sync(device string, source SyncSource) (Syncing, error)

	// Find returns what a source says is stored of a device that comes here; nil if it is not to be had from here, or not wanted, and an
	// error if it cannot be had now: in either case it comes from the source.
	Find(ctx context.Context, device string, size int64, reference json.RawMessage) (migrate.Fetcher, error)
}

// SyncSource is a device that is kept in a store.
type SyncSource struct {
	Device block.Device  // is only read
	Writes block.Tracker // of writes to it, for nobody else; nil: nobody can tell
	Still  bool          // nobody writes to it
	Ready  func() bool   // whether it may be read by now

	// Stored is to be told what is put, as it is put, and never twice at the same time.
	Stored func(off int64, content []byte)
}

// Syncing is a device that is being kept.
type Syncing interface {
	// Snapshot ends putting for a while, and says what is stored by now.
	Snapshot(ctx context.Context) (StoredContent, error)
	// Resume goes on after a Snapshot that succeeded.
	Resume()
	// Close ends it, once nothing stands between Snapshot and Resume. It may be called more than once.
	Close() error
}

// StoredContent is what is stored of a device: see migrate.Stored.
type StoredContent struct {
	Reference json.RawMessage
	Ranges    []block.Range
	Changed   func(off int64) (block.Range, error)
}

// storeTime is what a migration waits for the store at its source, before it says a word, and at its destination; then it goes on without.
const storeTime = 3 * time.Second

// synced is a device that is being kept in a store.
type synced struct {
	Syncing
	index *migrate.IndexBuilder
}

// startSync begins to keep the devices, once the instance runs.
func (p *Peer) startSync() {
	if p.cfg.Storage == nil {
		return
	}
	for _, d := range p.instance.Devices() {
		if c, ok := p.cfg.device(d.Config.Name); !ok || c.Stationary || c.Shared {
			continue
		}
		s := synced{index: migrate.NewIndexBuilder(d.Block.Size())}
		memory, boots := d.Config.Name == runner.MemoryDevice, runner.IsBootFile(d.Config.Name)
		var err error
		s.Syncing, err = p.cfg.Storage.Sync(d.Config.Name, SyncSource{
			Device: d.Block, Writes: d.Writes, Still: d.Tracker == nil, Stored: s.index.Write,
			Ready: func() bool {
				return !p.instance.GuestLacks() && (!boots || p.instance.Missing() == 0) && (!memory || p.instance.MemoryFilled())
			},
		})
		if err != nil {
			p.cfg.Logger.Error("a device is not kept in the store", "device", d.Config.Name, "error", err)
		} else if s.Syncing != nil {
			p.synced[d.Config.Name] = s
		}
	}
}

// endSync ends that.
func (p *Peer) endSync() {
	var ends sync.WaitGroup
	for name, s := range p.synced {
		ends.Go(func() {
			if err := s.Close(); err != nil {
				p.cfg.Logger.Warn("a device is not kept in the store any more, and that was not clean", "device", name, "error", err)
			}
		})
	}
	ends.Wait()
}

// addStored names what is stored of what is sent. Until done is called, nothing more is put.
func (p *Peer) addStored(ctx context.Context, sc *migrate.SourceConfig) (done func()) {
	ctx, cancel := context.WithTimeoutCause(ctx, storeTime, errors.New("the store took too long"))
	defer cancel()
	var g errgroup.Group
	taken := make([]*synced, len(sc.Devices))
	for n := range sc.Devices {
		d := &sc.Devices[n]
		s, ok := p.synced[d.Name]
		if !ok || d.Handle != "" { // which the other side has already
			continue
		}
		g.Go(func() error {
			content, err := s.Snapshot(ctx)
			if err != nil {
				p.cfg.Logger.Warn("all of a device comes from here, and nothing from the store", "device", d.Name, "error", err)
				return nil
			}
			taken[n] = &s
			if len(content.Ranges) > 0 {
				d.Stored = &migrate.Stored{Reference: content.Reference, Index: s.index.Index(), Ranges: content.Ranges, Changed: content.Changed}
			}
			return nil
		})
	}
	_ = g.Wait() // none fails
	return func() {
		for _, s := range taken {
			if s != nil {
				s.Resume()
			}
		}
	}
}

// Stored implements migrate.StoreTarget.
func (t *target) Stored(ctx context.Context, m *wire.Manifest) ([]migrate.Fetcher, error) {
	out := make([]migrate.Fetcher, len(m.Devices))
	if t.cfg.Storage == nil {
		return out, nil
	}
	ctx, cancel := context.WithTimeoutCause(ctx, storeTime, errors.New("the store took too long"))
	defer cancel()
	var g errgroup.Group
	for n, d := range m.Devices {
		if len(d.Stored) == 0 || t.shared[n] {
			continue
		}
		g.Go(func() error {
			f, err := t.cfg.Storage.Find(ctx, d.Name, d.Size, d.Stored)
			if err != nil {
				t.cfg.Logger.Warn("all of a device comes from the source, and nothing from the store", "device", d.Name, "error", err)
				return nil
			}
			out[n] = f
			return nil
		})
	}
	return out, g.Wait()
}
