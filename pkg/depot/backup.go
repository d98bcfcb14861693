package depot

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/migrate"
	"github.com/drafter-vm/drafter/pkg/objstore"
	"github.com/drafter-vm/drafter/pkg/peer"
	"github.com/drafter-vm/drafter/pkg/runner"
	"github.com/drafter-vm/drafter/pkg/wire"
)

// BackupConfig configures a [Backup]. Store and Name are required.
type BackupConfig struct {
	Store *objstore.Store
	Name  string        // of the image
	Every time.Duration // from the end of one to the begin of the next; 0 means one minute
	Keep  int           // versions that are kept; 0 means 3

	// Dir is where what has changed is written down before it is put, in files without names. Empty: where temporary files are.
	Dir string

	// Done, if set, is told of each version, or why there is none.
	Done func(BackupReport, error)

	// Logger receives events; nil means slog.Default().
	Logger *slog.Logger
}

// BackupReport says what a version of a backup is.
type BackupReport struct {
	Version  string
	Taken    time.Time     // when the VM was as it is
	Downtime time.Duration // of the VM
	Took     time.Duration // until all of it was in the store
	Sent     int64         // bytes, of whole chunks, that were not in the store
}

// Backup puts versions of a running VM into a store, one after the other. The first has all of it, each other what has changed, for which all of the
// memory and the disks is read.
type Backup struct {
	cfg   BackupConfig
	bases map[string]*base

	mu     sync.Mutex // guards what follows
	held   int        // how many want the VM not to be copied
	cancel context.CancelFunc
	copied chan struct{} // closed when the copying has ended that cancel ends; nil: none is under way
}

// base is what the latest version holds of a device.
type base struct {
	list  *objstore.List
	index *migrate.BaseIndex
}

// NewBackup checks a configuration.
func NewBackup(cfg BackupConfig) (*Backup, error) {
	if err := objstore.CheckName(cfg.Name); err != nil {
		return nil, fmt.Errorf("back up VM: %w", err)
	}
	if cfg.Every < 0 || cfg.Keep < 0 {
		return nil, fmt.Errorf("back up VM every %v, and keep %d: neither can be negative", cfg.Every, cfg.Keep)
	}
	if cfg.Every == 0 {
		cfg.Every = time.Minute
	}
	if cfg.Keep == 0 {
		cfg.Keep = 3
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	return &Backup{cfg: cfg, bases: make(map[string]*base)}, nil
}

// Run makes versions until ctx ends. One that fails is logged, and tried again; the VM runs on in any case. While the peer is busy otherwise, as with a
// migration, none is made.
func (b *Backup) Run(ctx context.Context, p *peer.Peer) {
	failing := false
	for ctx.Err() == nil {
		report, err := b.Once(ctx, p)
		if ctx.Err() != nil {
			return
		}
		switch {
		case errors.Is(err, peer.ErrBusy):
		case err != nil:
			b.cfg.Logger.Warn("the VM could not be backed up: the latest version is what it was", "image", b.cfg.Name, "error", err)
		case failing:
			b.cfg.Logger.Info("the VM is backed up again", "image", b.cfg.Name)
		}
		failing = err != nil
		if b.cfg.Done != nil {
			b.cfg.Done(report, err)
		}
		select {
		case <-time.After(b.cfg.Every):
		case <-ctx.Done():
		case <-p.Done():
			return
		}
	}
}

// Hold has the VM not be copied until release is called: it ends a copying that is under way, of which nothing comes. What has been copied goes on
// to be put. It is for who wants the peer to be free.
func (b *Backup) Hold() (release func()) {
	b.mu.Lock()
	b.held++
	cancel, copied := b.cancel, b.copied
	b.mu.Unlock()
	if cancel != nil {
		cancel()
		<-copied
	}
	return func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.held--
	}
}

// copy copies the VM, unless somebody wants it not to be.
func (b *Backup) copy(ctx context.Context, p *peer.Peer, t *copyTarget) (*migrate.Report, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	copied := make(chan struct{})
	b.mu.Lock()
	if b.held > 0 {
		b.mu.Unlock()
		return nil, fmt.Errorf("back up VM: %w: it is not to be copied now", peer.ErrBusy)
	}
	b.cancel, b.copied = cancel, copied
	b.mu.Unlock()
	bases := make(map[string]*migrate.BaseIndex)
	for name, have := range b.bases {
		bases[name] = have.index
	}
	report, err := p.Copy(ctx, t, bases)
	b.mu.Lock()
	defer b.mu.Unlock()
	b.cancel, b.copied = nil, nil
	close(copied)
	if err != nil && b.held > 0 {
		err = fmt.Errorf("%w: %w", peer.ErrBusy, err)
	}
	return report, err
}

// Once makes a version.
//
// Where something of the version before is not in the store any more, it fails, and the next has all of it again.
func (b *Backup) Once(ctx context.Context, p *peer.Peer) (_ BackupReport, err error) {
	began := time.Now()
	t := &copyTarget{backup: b, ctx: ctx}
	defer func() {
		if errors.Is(err, objstore.ErrNotFound) || errors.Is(err, objstore.ErrCorrupt) {
			clear(b.bases)
			b.cfg.Store.Doubt()
		}
	}()
	defer t.close()
	report, err := b.copy(ctx, p, t)
	if err != nil {
		return BackupReport{}, err
	}
	r := BackupReport{Taken: t.paused, Downtime: time.Duration(report.Downtime)}
	root := &objstore.Root{}
	now := make(map[string]*base)
	for _, d := range t.devices {
		have := b.bases[d.name]
		opts := objstore.PutOptions{Progress: func(_, n int64) { d.put = n }}
		if have != nil {
			opts.Before, opts.Changed = have.list, d.changed
		}
		l, err := b.cfg.Store.PutDevice(ctx, d.Device, opts)
		if err != nil {
			return r, fmt.Errorf("back up device %q: %w", d.name, err)
		}
		id, err := b.cfg.Store.PutList(ctx, l)
		if err != nil {
			return r, fmt.Errorf("back up device %q: %w", d.name, err)
		}
		r.Sent += d.put
		now[d.name] = &base{l, d.index.Index()}
		root.Devices = append(root.Devices, objstore.RootDevice{Name: d.name, Size: d.Size(), List: id.String()})
	}
	for _, d := range []struct {
		name    string
		content func() (block.Device, error)
	}{{runner.StateDevice, t.state}, {runner.ConfigDevice, t.config}} {
		if root.Device(d.name) != nil {
			continue
		}
		device, err := d.content()
		if err != nil {
			return r, fmt.Errorf("back up device %q: %w", d.name, err)
		}
		id, err := putDevice(ctx, b.cfg.Store, device, objstore.PutOptions{})
		if err != nil {
			return r, fmt.Errorf("back up device %q: %w", d.name, err)
		}
		root.Devices = append(root.Devices, objstore.RootDevice{Name: d.name, Size: device.Size(), List: id.String()})
	}
	// Of a VM that has left, somebody else may have put newer versions by now.
	if _, given := p.InDoubt(); given || !p.Running() {
		return r, fmt.Errorf("back up VM: %w: it does not run here any more", peer.ErrBusy)
	}
	if r.Version, err = putVersion(ctx, b.cfg.Store, b.cfg.Name, root, body{Taken: t.paused.UTC(), Every: b.cfg.Every.String()}); err != nil {
		return r, fmt.Errorf("back up VM: %w", err)
	}
	b.bases = now
	r.Took = time.Since(began)
	if err := b.prune(ctx); err != nil && ctx.Err() == nil {
		b.cfg.Logger.Warn("old copies of the VM stay in the store", "image", b.cfg.Name, "error", err)
	}
	return r, nil
}

// prune removes copies that are too old, and nothing that was pushed under the same name.
func (b *Backup) prune(ctx context.Context) error {
	list, err := versions(ctx, b.cfg.Store, b.cfg.Name)
	if err != nil {
		return err
	}
	list = slices.DeleteFunc(list, func(v string) bool { return !strings.HasSuffix(v, copyMark) })
	for _, v := range list[:max(0, len(list)-b.cfg.Keep)] {
		if err := b.cfg.Store.RemoveRoot(ctx, images, b.cfg.Name, v); err != nil {
			return err
		}
	}
	return nil
}

// copyTarget takes one copy of the VM.
type copyTarget struct {
	backup  *Backup
	ctx     context.Context // of Once
	desc    runner.Description
	devices []*copied
	machine []byte
	paused  time.Time
}

// copied is a device of a copy: what has changed is in a file, the rest in the store.
type copied struct {
	block.Device
	name    string
	lazy    *block.Lazy // nil: all of it is in the file
	image   *objstore.Image
	index   *migrate.IndexBuilder
	written []block.Range // once all is
	put     int64
}

func (t *copyTarget) Prepare(ctx context.Context, desc runner.Description, devices []wire.Device) (out []block.Device, err error) {
	t.desc = desc
	for _, d := range devices {
		c := &copied{name: d.Name, index: migrate.NewIndexBuilder(d.Size)}
		t.devices = append(t.devices, c)
		f, err := t.file(d.Size)
		if err != nil {
			return nil, fmt.Errorf("make file for what has changed of device %q: %w", d.Name, err)
		}
		c.Device = f
		if have := t.backup.bases[d.Name]; have != nil && have.list.Size == d.Size {
			if err := c.over(t.ctx, t.backup.cfg.Store, have); err != nil {
				return nil, fmt.Errorf("device %q: %w", d.Name, err)
			}
		}
		out = append(out, noting{c})
	}
	return out, nil
}

// file is a sparse file without a name.
func (t *copyTarget) file(size int64) (block.Device, error) {
	dir, err := os.MkdirTemp(t.backup.cfg.Dir, "drafter-backup-")
	if err != nil {
		return nil, err
	}
	f, err := block.CreateFile(filepath.Join(dir, "changed"), size)
	if removed := os.RemoveAll(dir); err == nil && removed != nil {
		err = errors.Join(removed, f.Close())
	}
	if err != nil {
		return nil, err
	}
	return f, nil
}

// over makes the device what the latest version holds of it, but for what will be written.
func (c *copied) over(ctx context.Context, store *objstore.Store, have *base) error {
	image, err := store.OpenImage(ctx, have.list)
	if err != nil {
		return err
	}
	c.image = image
	c.lazy, err = block.NewLazy(c.Device, block.LazyOptions{Fetch: func(_ context.Context, r block.Range) error {
		p := make([]byte, r.Length)
		if n, err := image.ReadAt(p, r.Offset); n < len(p) {
			return err
		}
		return c.lazy.Fill(r.Offset, p)
	}})
	if err != nil {
		return err
	}
	c.Device, c.index = c.lazy, have.index.Builder()
	return nil
}

// changed is where the device was written to.
func (c *copied) changed(off int64) (block.Range, error) {
	for _, r := range c.written {
		if r.End() > off {
			return r, nil
		}
	}
	return block.Range{}, io.EOF
}

// noting notes what is written to a copy.
type noting struct{ *copied }

func (n noting) WriteAt(p []byte, off int64) (int, error) {
	n.index.Write(off, p)
	return n.Device.WriteAt(p, off)
}

func (n noting) Discard(off, length int64) error {
	n.index.Zero(off, length)
	return n.Device.Discard(off, length)
}

// Flush does nothing: what is durable is in the store.
func (n noting) Flush() error { return nil }

func (t *copyTarget) Keep(_ context.Context, state []byte, paused time.Time) error {
	t.machine, t.paused = state, paused
	for _, c := range t.devices {
		if c.lazy == nil {
			continue
		}
		// What is present by now was written; reading makes more of it so.
		off := int64(0)
		for off < c.Size() {
			r, err := c.lazy.NextMissing(off)
			if err != nil { // nothing
				r = block.Range{Offset: c.Size()}
			}
			if r.Offset > off {
				c.written = append(c.written, block.Range{Offset: off, Length: r.Offset - off})
			}
			off = r.End()
			if err != nil {
				break
			}
		}
	}
	return nil
}

func (t *copyTarget) Discard(context.Context) error {
	t.close()
	return nil
}

func (t *copyTarget) close() {
	for _, c := range t.devices {
		if c.Device != nil {
			_ = c.Close() // its content is nobody's any more
		}
		if c.image != nil {
			_ = c.image.Close()
		}
	}
}

// state is the device with the state of the machine.
func (t *copyTarget) state() (block.Device, error) {
	d := block.NewMemory(runner.StateDeviceSize)
	return d, runner.WriteReceived(d, "", t.machine)
}

// config is the device with the description of the machine.
func (t *copyTarget) config() (block.Device, error) {
	b, err := t.desc.Encode()
	if err != nil {
		return nil, err
	}
	d := block.NewMemory(int64(len(b)))
	_, err = d.WriteAt(b, 0)
	return d, err
}
