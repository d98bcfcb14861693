package registry

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/runner"
	"github.com/drafter-vm/drafter/pkg/vmpackage"
)

// PullOptions say how a package is pulled.
type PullOptions struct {
	OpenOptions

	// Progress is told how far the pull is, by one goroutine at a time. Nil is allowed.
	Progress func(Progress)
}

// Pulled is what came of a pull.
type Pulled struct {
	Reference Reference // with the digest of the package
	Size      int64     // of all devices, bytes
	Data      int64     // bytes of content that is not zeros, and not the same as other
	Present   int64     // of that, what an earlier pull had left
	Fetched   int64     // bytes that came for the rest, compressed
}

const (
	partial    = ".partial" // ends the name of a folder that is being pulled to
	pieceBytes = 4 << 20    // of a pack, at most, that are asked for at once
	gapBytes   = 64 << 10   // of a pack that nobody wants, and that come along rather than being left out by another request
)

// Pull makes a folder of a package, which must not be there, or be empty. Until all of it is there and was verified the folder is called DIR.partial; a
// pull that fails leaves that, and the next one goes on from what is in it and is right.
func Pull(ctx context.Context, ref Reference, dir string, opts PullOptions) (_ *Pulled, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("pull package %s to %q: %w", ref, dir, err)
		}
	}()
	if dir, err = filepath.Abs(dir); err != nil {
		return nil, err
	}
	if list, err := os.ReadDir(dir); err == nil && len(list) > 0 {
		return nil, fmt.Errorf("%w: nothing is overwritten: choose another folder", os.ErrExist)
	} else if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	p, err := Open(ctx, ref, opts.OpenOptions)
	if err != nil {
		return nil, err
	}
	c, err := newClient(ctx, p.Reference, p.opts.Transport)
	if err != nil {
		return nil, err
	}
	defer c.close()
	u := &pull{client: c, artifact: p.artifact, dir: dir + partial, opts: opts, report: &Pulled{Reference: p.Reference}}
	lock, err := u.lock()
	if err != nil {
		return nil, err
	}
	defer lock.Close() // nobody else begins there before the folder has its name
	if err := u.run(ctx); err != nil {
		return nil, err
	}
	if err := WriteOrigin(u.dir, p.Origin()); err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(u.dir, vmpackage.ManifestFile), u.artifact.raw, 0o600); err != nil {
		return nil, err
	}
	if err := syncFolder(u.dir); err != nil {
		return nil, err
	}
	if err := os.Remove(dir); err != nil && !errors.Is(err, os.ErrNotExist) { // it is empty
		return nil, err
	}
	if err := os.Rename(u.dir, dir); err != nil {
		return nil, err
	}
	return u.report, syncFolder(filepath.Dir(dir))
}

// syncFolder makes the names in a folder last, and what its files hold, but for devices.
func syncFolder(dir string) error {
	for _, path := range []string{filepath.Join(dir, vmpackage.ManifestFile), filepath.Join(dir, originFile), dir} {
		f, err := os.Open(path)
		if errors.Is(err, os.ErrNotExist) {
			continue
		} else if err != nil {
			return err
		}
		if err := errors.Join(f.Sync(), f.Close()); err != nil {
			return err
		}
	}
	return nil
}

// pull is a pull under way.
type pull struct {
	*client
	artifact *artifact
	dir      string // while it is partial
	opts     PullOptions
	files    []*block.File // of the devices
	report   *Pulled

	mu   sync.Mutex // guards what follows, and serializes opts.Progress
	done int64      // bytes of content that are here, of this stage
}

func (u *pull) progress(stage string, more, total int64) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.done += more
	if u.opts.Progress != nil {
		u.opts.Progress(Progress{stage, u.done, total})
	}
}

// begin begins a stage.
func (u *pull) begin() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.done = 0
}

// lock takes the folder that is pulled to, which it makes.
func (u *pull) lock() (*os.File, error) {
	if err := os.MkdirAll(u.dir, 0o700); err != nil {
		return nil, err
	}
	lock, err := runner.LockFile(u.dir, true)
	if err != nil {
		return nil, fmt.Errorf("somebody else is pulling there: %w", err)
	}
	// Whoever had it before has perhaps given it its name since.
	have, err := lock.Stat()
	if err == nil {
		var now os.FileInfo
		if now, err = os.Stat(u.dir); err == nil && !os.SameFile(have, now) {
			err = errors.New("somebody else has pulled there just now")
		}
	}
	if err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	return lock, nil
}

// run makes the files of the devices whole.
func (u *pull) run(ctx context.Context) (err error) {
	if err := u.clear(); err != nil {
		return err
	}
	defer func() {
		for _, f := range u.files {
			err = errors.Join(err, f.Close()) // which flushes it
		}
	}()
	for n, d := range u.artifact.description.Devices {
		path := filepath.Join(u.dir, d.File)
		if info, e := os.Lstat(path); e == nil && info.Size() != d.Size {
			if err := os.Remove(path); err != nil {
				return err
			}
		}
		f, err := block.CreateFile(path, d.Size)
		if errors.Is(err, os.ErrExist) {
			f, err = block.OpenFile(path, block.FileOptions{})
		}
		if err != nil {
			return err
		}
		u.files = append(u.files, f)
		u.report.Size += u.artifact.indexes[n].size
	}
	lacking, err := u.look(ctx)
	if err != nil {
		return err
	}
	if err := u.fetch(ctx, lacking); err != nil {
		return err
	}
	return u.verify(ctx)
}

// clear removes what does not belong to the package from the folder, which only pulls write to.
func (u *pull) clear() error {
	list, err := os.ReadDir(u.dir)
	if err != nil {
		return err
	}
	for _, e := range list {
		if !slices.ContainsFunc(u.artifact.description.Devices, func(d vmpackage.Device) bool { return d.File == e.Name() }) || !e.Type().IsRegular() {
			if err := os.RemoveAll(filepath.Join(u.dir, e.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}

// wanted is content that is not here yet.
type wanted struct {
	x      *index
	chunk  int // of x
	places []spot
}

// spot is where content goes.
type spot struct{ device, place int64 }

// look finds what is not here yet.
func (u *pull) look(ctx context.Context) ([]*wanted, error) {
	u.begin()
	all := make(map[contentKey]*wanted)
	var order []*wanted
	for n, x := range u.artifact.indexes {
		f := u.files[n]
		buffer := make([]byte, x.chunkSize)
		for r, run := range x.runs {
			for i := int64(0); i < int64(run.count); i++ {
				if i%1024 == 0 && ctx.Err() != nil {
					return nil, ctx.Err()
				}
				place := x.starts[r] + i
				off := place * x.chunkSize
				size := min(x.chunkSize, x.size-off)
				hole := false
				if data, err := f.NextData(off); errors.Is(err, io.EOF) || err == nil && data.Offset >= off+size {
					hole = true
					if run.first == 0 {
						if err != nil { // nothing more is here, and nothing more is to be
							break
						}
						i += (data.Offset-off)/x.chunkSize - 1
						continue
					}
				} else if err != nil {
					return nil, err
				}
				if run.first == 0 {
					if err := f.Discard(off, size); err != nil {
						return nil, err
					}
					continue
				}
				chunk := int(int64(run.first) - 1 + i)
				key := x.key(chunk)
				w := all[key]
				if w == nil {
					w = &wanted{x: x, chunk: chunk}
					all[key] = w
					u.report.Data += x.chunkSize
				}
				if !hole {
					clear(buffer[size:])
					if _, err := f.ReadAt(buffer[:size], off); err != nil && !errors.Is(err, io.EOF) {
						return nil, err
					}
					if sha256.Sum256(buffer) == x.chunks[chunk].sum {
						u.progress(StageCheck, x.chunkSize, u.report.Size)
						continue
					}
				}
				if len(w.places) == 0 {
					order = append(order, w)
				}
				w.places = append(w.places, spot{int64(n), place})
			}
		}
	}
	u.report.Present = u.report.Data
	for _, w := range order {
		u.report.Present -= w.x.chunkSize
	}
	return order, nil
}

// fetch gets what is lacking, in pieces of packs.
func (u *pull) fetch(ctx context.Context, lacking []*wanted) error {
	u.begin()
	total := int64(0)
	for _, w := range lacking {
		total += int64(w.x.chunks[w.chunk].length)
	}
	slices.SortStableFunc(lacking, func(a, b *wanted) int {
		return cmp.Or(cmp.Compare(a.pack().digest, b.pack().digest), cmp.Compare(a.at().offset, b.at().offset))
	})
	group, fetching := errgroup.WithContext(ctx)
	group.SetLimit(u.Concurrency)
	for len(lacking) > 0 && fetching.Err() == nil {
		n := 1
		begin := int64(lacking[0].at().offset)
		for ; n < len(lacking) && lacking[n].pack().digest == lacking[0].pack().digest && lacking[n].x.chunkSize == lacking[0].x.chunkSize; n++ {
			before, next := lacking[n-1].at(), lacking[n].at()
			end := int64(before.offset) + int64(before.length)
			if gap := int64(next.offset) - end; gap < 0 || gap > gapBytes || int64(next.offset)+int64(next.length)-begin > pieceBytes {
				break
			}
		}
		piece := lacking[:n]
		lacking = lacking[n:]
		group.Go(func() error { return u.piece(fetching, piece, total) })
	}
	return group.Wait()
}

func (w *wanted) at() chunkRef  { return w.x.chunks[w.chunk] }
func (w *wanted) pack() packRef { return w.x.packs[w.at().pack] }

// piece gets some content of a pack by one request, and puts it where it belongs.
func (u *pull) piece(ctx context.Context, piece []*wanted, total int64) error {
	got := 0
	return u.try(ctx, func(ctx context.Context, alive func()) error {
		// As an index of these alone, for frames.
		x := &index{chunkSize: piece[0].x.chunkSize, packs: []packRef{piece[0].pack()}}
		for _, w := range piece[got:] {
			c := w.at()
			c.pack = 0
			x.chunks = append(x.chunks, c)
		}
		return u.frames(ctx, x, 0, len(x.chunks), alive, func(_ int, data []byte) error {
			w := piece[got]
			for _, s := range w.places {
				off := s.place * w.x.chunkSize
				size := min(w.x.chunkSize, u.artifact.indexes[s.device].size-off)
				if _, err := u.files[s.device].WriteAt(data[:size], off); err != nil {
					return finalError{err}
				}
			}
			got++
			u.mu.Lock()
			u.report.Fetched += int64(w.at().length)
			u.mu.Unlock()
			u.progress(StageFetch, int64(w.at().length), total)
			return nil
		})
	})
}

// verify compares the digests of devices.
func (u *pull) verify(ctx context.Context) error {
	u.begin()
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(2)
	for n, d := range u.artifact.description.Devices {
		group.Go(func() error {
			sum := sha256.New()
			buffer := make([]byte, 1<<20)
			for off := int64(0); off < d.Size; {
				if ctx.Err() != nil {
					return ctx.Err()
				}
				k := min(int64(len(buffer)), d.Size-off)
				if _, err := u.files[n].ReadAt(buffer[:k], off); err != nil && !errors.Is(err, io.EOF) {
					return err
				}
				sum.Write(buffer[:k])
				off += k
				u.progress(StageVerify, k, u.report.Size)
			}
			if want := u.artifact.indexes[n].sum; !slices.Equal(sum.Sum(nil), want[:]) {
				return fmt.Errorf("device %q has the SHA-256 %x, and should have %x: %w", d.Name, sum.Sum(nil), want, ErrCorrupt)
			}
			return nil
		})
	}
	return group.Wait()
}
