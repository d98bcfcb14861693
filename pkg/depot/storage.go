package depot

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/drafter-vm/drafter/pkg/migrate"
	"github.com/drafter-vm/drafter/pkg/objstore"
	"github.com/drafter-vm/drafter/pkg/peer"
)

// StorageConfig says where devices are kept.
type StorageConfig struct {
	// Devices are those that are kept, by their names, and that are fetched where a source has kept them.
	Devices map[string]DeviceConfig

	// Logger receives events; nil means slog.Default().
	Logger *slog.Logger
}

// DeviceConfig says where a device is kept.
type DeviceConfig struct {
	// Store is where. Without a bucket it is the store that a source names, when the device comes from one; until then it is not kept.
	Store objstore.Config

	// Quiet is for how long something was not written that is kept. 0 means 10 s.
	Quiet time.Duration
}

// Storage keeps the devices of one peer: see [peer.Storage].
type Storage struct {
	cfg StorageConfig
	id  string

	mu     sync.Mutex                 // guards what follows
	stores []*objstore.Store          // that were opened
	places map[string]*objstore.Store // where devices are kept that are configured so
	found  map[string]found           // what was found of the VM that comes, or has come
	open   map[string]*syncing
}

// found is where a device was found that comes, and what there is of it.
type found struct {
	store *objstore.Store
	list  objstore.ID
}

var _ peer.Storage = (*Storage)(nil)

// NewStorage checks a configuration.
func NewStorage(cfg StorageConfig) (*Storage, error) {
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	s := &Storage{cfg: cfg, id: rand.Text(), places: make(map[string]*objstore.Store), found: make(map[string]found), open: make(map[string]*syncing)}
	for name, d := range cfg.Devices {
		if d.Store.Bucket == "" {
			if d.Store.AccessKey != "" || d.Store.Endpoint != "" {
				return nil, fmt.Errorf("device %q has an endpoint or credentials of a store, and no bucket: name it, or leave all to the source", name)
			}
			continue
		}
		store, err := s.openStore(d.Store)
		if err != nil {
			return nil, fmt.Errorf("device %q: %w", name, err)
		}
		s.places[name] = store
	}
	return s, nil
}

// openStore returns a store, which may be one that was opened before.
func (s *Storage) openStore(cfg objstore.Config) (*objstore.Store, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, have := range s.stores {
		if have.Serves(cfg) {
			return have, nil
		}
	}
	cfg.Logger = s.cfg.Logger
	store, err := objstore.Open(cfg)
	if err == nil {
		s.stores = append(s.stores, store)
	}
	return store, err
}

// Reset implements [peer.Storage].
func (s *Storage) Reset() {
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(s.found)
}

// Ping reports whether the stores can be used now.
func (s *Storage) Ping(ctx context.Context) error {
	s.mu.Lock()
	stores := s.stores
	s.mu.Unlock()
	var errs []error
	for _, store := range stores {
		errs = append(errs, store.Ping(ctx))
	}
	return errors.Join(errs...)
}

// Close lets go of the stores, when the peer has been closed.
func (s *Storage) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, store := range s.stores {
		store.Close()
	}
}

// Stats are how far the devices are, by their names.
func (s *Storage) Stats() map[string]objstore.SyncStats {
	s.mu.Lock()
	defer s.mu.Unlock()
	stats := make(map[string]objstore.SyncStats)
	for name, d := range s.open {
		stats[name] = d.syncer.Stats()
	}
	return stats
}

// reference is what a source says of a device that it keeps. It holds no secrets.
type reference struct {
	objstore.Location
	List string `json:"list"`
	Key  string `json:"key,omitempty"` // what tells the key from others; empty: nothing is encrypted
}

// Find implements [peer.Storage].
func (s *Storage) Find(ctx context.Context, device string, size int64, named json.RawMessage) (migrate.Fetcher, error) {
	c, ok := s.cfg.Devices[device]
	if !ok {
		return nil, nil
	}
	var ref reference
	if err := json.Unmarshal(named, &ref); err != nil {
		return nil, fmt.Errorf("understand where the source has stored it: %w", err)
	}
	id, err := objstore.ParseID(ref.List)
	if err != nil {
		return nil, fmt.Errorf("understand what the source has stored: %w", err)
	}
	switch {
	case c.Store.Bucket == "":
		c.Store.Location = ref.Location
	case !c.Store.Same(ref.Location):
		return nil, fmt.Errorf("the source has stored it in %v, and here %v is configured: configure the same, or none", ref.Location, c.Store.Location)
	}
	if have := c.Store.Key.ID(); have != ref.Key {
		return nil, fmt.Errorf("the source has stored it with %s, and here there is %s: give both the same", keyOf(ref.Key), keyOf(have))
	}
	store, err := s.openStore(c.Store)
	if err != nil {
		return nil, fmt.Errorf("use the store that the source names: %w", err)
	}
	list, err := store.GetList(ctx, id, size)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.found[device] = found{store, id}
	return store.Fetch(list), nil
}

func keyOf(id string) string {
	if id == "" {
		return "no key"
	}
	return fmt.Sprintf("key %q", id)
}

// renewal is how often what a running VM refers to is put on record in the store, and rootLife, for how long that keeps it from being garbage.
const (
	renewal  = time.Hour
	rootLife = 24 * time.Hour
)

// Sync implements [peer.Storage].
func (s *Storage) Sync(device string, source peer.SyncSource) (peer.Syncing, error) {
	c, ok := s.cfg.Devices[device]
	s.mu.Lock()
	before := s.found[device]
	store := s.places[device]
	s.mu.Unlock()
	if store == nil {
		store = before.store
	}
	if !ok || store == nil {
		return nil, nil
	}
	log := s.cfg.Logger.With("device", device)
	syncer, err := objstore.NewSyncer(objstore.SyncConfig{Store: store, Device: source.Device, Writes: source.Writes, Still: source.Still, Ready: source.Ready, Stored: source.Stored, Quiet: c.Quiet, Logger: log})
	if err != nil {
		return nil, err
	}
	d := &syncing{storage: s, device: device, store: store, syncer: syncer, size: source.Device.Size(), log: log, key: c.Store.Key.ID(), root: []string{"sync", s.id, device}}
	s.mu.Lock()
	defer s.mu.Unlock()
	d.before = before.list
	s.open[device] = d
	ctx, cancel := context.WithCancel(context.Background())
	d.cancel = cancel
	d.work.Go(func() {
		if err := syncer.Run(ctx); err != nil {
			log.Error("a device is not kept in the store", "error", err)
		}
	})
	d.work.Go(func() { d.renew(ctx) })
	return d, nil
}

// syncing is a device that is being kept.
type syncing struct {
	storage *Storage
	device  string
	store   *objstore.Store
	syncer  *objstore.Syncer
	size    int64
	log     *slog.Logger
	key     string
	root    []string
	before  objstore.ID // what was there when the device came; it is referred to until there is something newer

	cancel context.CancelFunc
	work   sync.WaitGroup
	once   sync.Once
}

// renew keeps what is stored from being garbage.
func (d *syncing) renew(ctx context.Context) {
	tick := time.NewTicker(renewal)
	defer tick.Stop()
	if d.before != objstore.None {
		if err := d.publish(ctx, d.before); err != nil && ctx.Err() == nil {
			d.log.Warn("what is stored of a device could not be put on record", "error", err)
		}
	}
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		err := d.syncer.Verify(ctx)
		var id objstore.ID
		if err == nil {
			id, err = d.store.PutList(ctx, d.syncer.List())
		}
		if err == nil {
			err = d.publish(ctx, id)
		}
		if err != nil && ctx.Err() == nil {
			d.log.Warn("what is stored of a device could not be put on record", "error", err)
		}
	}
}

func (d *syncing) publish(ctx context.Context, list objstore.ID) error {
	now := time.Now().UTC()
	end := now.Add(rootLife)
	return d.store.PutRoot(ctx, &objstore.Root{Time: now, Expires: &end, Devices: []objstore.RootDevice{{Name: d.device, Size: d.size, List: list.String()}}}, d.root...)
}

// Snapshot implements [peer.Syncing].
func (d *syncing) Snapshot(ctx context.Context) (peer.StoredContent, error) {
	snap, err := d.syncer.Snapshot(ctx)
	if err != nil {
		return peer.StoredContent{}, err
	}
	// Nothing has to be put on record for it: it is young, and whoever takes the VM does so.
	id, err := d.store.PutList(ctx, snap.List)
	var named []byte
	if err == nil {
		named, err = json.Marshal(reference{Location: d.store.Location(), List: id.String(), Key: d.key})
	}
	if err != nil {
		d.syncer.Resume()
		return peer.StoredContent{}, err
	}
	return peer.StoredContent{Reference: named, Ranges: snap.Stored, Changed: snap.Changed}, nil
}

// Resume implements [peer.Syncing].
func (d *syncing) Resume() { d.syncer.Resume() }

// goodbyeTime bounds the taking back of what is on record in the store.
const goodbyeTime = 5 * time.Second

// Close implements [peer.Syncing].
func (d *syncing) Close() (err error) {
	d.once.Do(func() {
		d.cancel()
		d.work.Wait()
		d.storage.mu.Lock()
		delete(d.storage.open, d.device)
		d.storage.mu.Unlock()
		ctx, cancel := context.WithTimeout(context.Background(), goodbyeTime)
		defer cancel()
		// Otherwise it expires.
		err = d.store.RemoveRoot(ctx, d.root...)
	})
	return err
}
