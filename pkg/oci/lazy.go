package oci

import (
	"archive/tar"
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/filetree"
)

// LazyOptions say how a disk is made whose content comes while it is used.
type LazyOptions struct {
	Settings Settings
	Limits   Limits
	Disk     DiskOptions

	// Background is how many requests fetch what nobody has asked for yet, at a time. 0: 2; less than 0: none.
	Background int

	Progress func(Progress) // nil is allowed
	Logger   *slog.Logger   // nil means slog.Default()
}

// LazyDisk is the disk of an image, as WriteDisk makes it, whose files come from the registry when they are read, and behind it. It is a [block.Device], which
// keeps what is written to it.
//
// Of layers with a table of contents, eStargz or zstd:chunked, only that is fetched to lay out the disk: names, owners and where each file's content will be.
// Layers without one are fetched first. Each chunk is verified, by the digest that the table has of it, and the table by that of the manifest.
//
// A chunk goes one way, but for a fetch that fails:
//
//	absent ── somebody reads, or it is its turn ──► coming ──► here
//	   ▲                                              │
//	   └───────────────── failed ◄────────────────────┘
type LazyDisk struct {
	*block.Lazy

	// Whole is how many bytes the image's layers have, and First how many had to be fetched before the disk could be used.
	Whole, First int64

	// Since is when the disk was laid out. What an earlier process has left of the same disk is as old as that.
	Since time.Time

	blobs  *blobs
	layers []*lazyLayer
	log    *slog.Logger
	pieces []piece // by where they are on the disk
	cancel context.CancelFunc
	work   sync.WaitGroup
	ctx    context.Context // ends with Close

	fetched atomic.Int64 // bytes of layers
	waiting atomic.Int32 // how many reads wait for the registry
	calm    chan struct{}

	mu       sync.Mutex // guards the states of chunks, and what follows
	edges    map[int64]*edge
	failure  error // of the background
	recorded bool  // that all has come
}

type chunkState int

const (
	chunkAbsent chunkState = iota
	chunkComing
	chunkHere
	chunkZeros // it is not in the layer; as absent, but for the fetch
)

// arrival is a request that several may wait for.
type arrival struct {
	first *chunk // of those that come with it
	done  chan struct{}
	err   error // set before done is closed
}

// extent is a stretch of a file on the disk, in blocks.
type extent struct{ logical, physical, length int64 }

// piece is an extent of a file, by where it is on the disk.
type piece struct {
	extent
	file *lazyFile
}

// edge is a block that is in more than one chunk, of which not all are here.
type edge struct {
	data []byte
	left int             // bytes that are not here
	has  map[*chunk]bool // whose part is
}

const diskBlock = 4096

// LazyDisk lays the image's disk out in a folder, which keeps what has come: another process goes on with that. The image must be in a registry.
// While the disk is open, the folder is its alone.
func (i *Image) LazyDisk(ctx context.Context, dir string, opts LazyOptions) (_ *LazyDisk, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("lay out image %q: %w", i.Reference, err)
		}
	}()
	if i.blobs == nil {
		return nil, errors.New("it is in no registry, so all of it is here already: make a disk of it")
	}
	if opts.Progress == nil {
		opts.Progress = func(Progress) {}
	}
	if opts.Logger == nil {
		opts.Logger = slog.Default()
	}
	if opts.Background == 0 {
		opts.Background = 2
	}
	if err := opts.Settings.Check(); err != nil {
		return nil, err
	}
	b, err := newBundle()
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, b.Close()) }()
	d := &LazyDisk{blobs: i.blobs, log: opts.Logger, edges: map[int64]*edge{}, calm: make(chan struct{}, 1)}
	files, err := d.lay(ctx, i, b, opts)
	if err != nil {
		return nil, err
	}
	if err := b.configure(i.config, opts.Settings); err != nil {
		return nil, err
	}
	path := filepath.Join(dir, diskFile)
	opts.Disk.Progress = opts.Progress
	config, err := b.writeDisk(ctx, path+newSuffix, opts.Disk)
	if err != nil {
		return nil, err
	}
	defer func() { _ = os.Remove(path + newSuffix) }() // unless it is the disk by then
	if err := d.find(ctx, b.tree, files, path+newSuffix, opts.Disk); err != nil {
		return nil, err
	}
	d.ctx, d.cancel = context.WithCancel(context.WithoutCancel(ctx))
	if err := d.open(path, d.identity(i, config), request(i.Reference, i.arch, opts.Settings, opts.Disk.Size)); err != nil {
		d.cancel()
		return nil, err
	}
	for range opts.Background {
		d.work.Go(d.background)
	}
	return d, nil
}

// Files of a lazy disk: itself, and what is beside it.
const (
	diskFile       = "disk"
	newSuffix      = ".new"
	listSuffix     = ".missing"  // what has not come; absent: nothing
	identitySuffix = ".identity" // what the disk is of, written when the others are there
	requestSuffix  = ".request"  // what it was asked for by, where that cannot be of another image
)

// request tells a disk from any other by how it is asked for; none, where the image of that name may be another tomorrow.
func request(reference, arch string, s Settings, size int64) []byte {
	if !strings.Contains(reference, "@sha256:") {
		return nil
	}
	settings, _ := json.Marshal(s) // strings and numbers only: cannot fail
	return fmt.Appendf(nil, "%x\n", sha256.Sum256(fmt.Appendf(nil, "%s\n%s\n%s\n%d", reference, arch, settings, size)))
}

// OpenWhole opens the disk of an image, by the same reference with its digest, for the same architecture (empty: this machine's), with the same settings and size, in a folder where all of it is: no registry is asked. If
// it is not so there, the disk is nil.
func OpenWhole(dir, reference, architecture string, s Settings, size int64) (*LazyDisk, error) {
	path := filepath.Join(dir, diskFile)
	want := request(reference, defaultArchitecture(architecture), s, size)
	have, err := os.ReadFile(path + requestSuffix)
	if want == nil || err != nil || !bytes.Equal(have, want) {
		return nil, ignoreAbsent(err)
	}
	if _, err := os.Stat(path + listSuffix); !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	info, err := os.Stat(path + identitySuffix)
	if err != nil {
		return nil, ignoreAbsent(err)
	}
	file, err := block.OpenFile(path, block.FileOptions{})
	if err != nil {
		return nil, err
	}
	d := &LazyDisk{Since: info.ModTime()}
	if d.Lazy, err = block.NewLazy(file, block.LazyOptions{BlockSize: diskBlock, Missing: []block.Range{}}); err != nil {
		return nil, errors.Join(fmt.Errorf("open disk %q: %w", path, err), file.Close())
	}
	d.ctx, d.cancel = context.WithCancel(context.Background())
	return d, nil
}

// identity tells the disk from any other: by the image, the configuration, and where everything is.
func (d *LazyDisk) identity(i *Image, config []byte) []byte {
	h := sha256.New()
	fmt.Fprintf(h, "lazy disk 1\n%s\n%s\n", i.Digest, config)
	for _, p := range d.pieces {
		fmt.Fprintln(h, p.extent, p.file.size)
	}
	return fmt.Appendf(nil, "%x\n", h.Sum(nil))
}

// open opens the disk that an earlier process has begun to fetch, if it is the same, or else the one that was laid out now.
func (d *LazyDisk) open(path string, identity, request []byte) error {
	have, err := os.ReadFile(path + identitySuffix)
	list := path + listSuffix
	missing := []block.Range{}
	if err == nil && bytes.Equal(have, identity) {
		if _, err := os.Stat(list); errors.Is(err, os.ErrNotExist) { // all of it has come
			list = ""
		}
	} else {
		if err := errors.Join(ignoreAbsent(os.Remove(path+requestSuffix)), ignoreAbsent(os.Remove(path+identitySuffix)), ignoreAbsent(os.Remove(list)), d.punch(path+newSuffix), os.Rename(path+newSuffix, path)); err != nil {
			return err
		}
		have = nil
		for _, p := range d.pieces {
			missing = append(missing, block.Range{Offset: p.physical * diskBlock, Length: p.length * diskBlock})
		}
	}
	file, err := block.OpenFile(path, block.FileOptions{})
	if err != nil {
		return err
	}
	if d.Lazy, err = block.NewLazy(file, block.LazyOptions{BlockSize: diskBlock, Missing: missing, Fetch: d.fetch, List: list}); err != nil {
		return errors.Join(err, file.Close())
	}
	if have == nil {
		if err = d.Flush(); err == nil { // the list is there from now on
			err = os.WriteFile(path+identitySuffix, identity, 0o600)
		}
		if err != nil {
			return errors.Join(err, d.Lazy.Close())
		}
	}
	info, err := os.Stat(path + identitySuffix)
	if err != nil {
		return errors.Join(err, d.Lazy.Close())
	}
	d.Since = info.ModTime()
	if err := os.WriteFile(path+requestSuffix, request, 0o600); err != nil {
		return errors.Join(err, d.Lazy.Close())
	}
	if err := d.skipPresent(); err != nil {
		return errors.Join(err, d.Lazy.Close())
	}
	return nil
}

func ignoreAbsent(err error) error {
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

// skipPresent takes chunks for here, all of whose blocks an earlier process has fetched.
func (d *LazyDisk) skipPresent() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	seen := map[*lazyFile]bool{}
	for _, p := range d.pieces {
		if seen[p.file] {
			continue
		}
		seen[p.file] = true
		for _, c := range p.file.chunks {
			here := true
			for b := c.off / diskBlock; here && b <= (c.off+c.size-1)/diskBlock; {
				e := p.file.extentOf(b)
				last := min(e.logical+e.length-1, (c.off+c.size-1)/diskBlock)
				at, end := (e.physical+b-e.logical)*diskBlock, (e.physical+last-e.logical+1)*diskBlock
				r, err := d.NextMissing(at)
				if err != nil && !errors.Is(err, io.EOF) {
					return err
				}
				here = err != nil || r.Offset >= end
				b = last + 1
			}
			if here {
				c.state = chunkHere
			}
		}
	}
	return nil
}

// Fetched is how many bytes of layers have been fetched.
func (d *LazyDisk) Fetched() int64 { return d.fetched.Load() }

// Err is why what nobody has asked for is not fetched any more, if that is so. What is read is asked for all the same.
func (d *LazyDisk) Err() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.failure
}

// Close ends the fetching, and lets go of the disk.
func (d *LazyDisk) Close() error {
	d.cancel()
	err := d.Lazy.Close() // nobody asks for anything after that
	d.work.Wait()
	return err
}

// lay lays out the tree: files of layers with a table of contents are placeholders, which it returns.
func (d *LazyDisk) lay(ctx context.Context, i *Image, b *Bundle, opts LazyOptions) (map[*filetree.Node]*lazyFile, error) {
	manifest, err := i.image.Manifest()
	if err != nil {
		return nil, err
	}
	layers, err := i.image.Layers()
	if err != nil {
		return nil, err
	}
	config, err := i.image.ConfigFile()
	if err != nil {
		return nil, err
	}
	files := map[*filetree.Node]*lazyFile{}
	l := &layering{tree: b.rootfs(), limits: opts.Limits.withDefaults()}
	for n, desc := range manifest.Layers {
		d.Whole += desc.Size
		lazy, entries, err := i.openTOC(ctx, desc)
		if errors.Is(err, errNoRanges) {
			err, lazy = nil, nil
		}
		if err != nil {
			return nil, fmt.Errorf("layer %d: %w", n+1, err)
		}
		if lazy == nil {
			d.log.Info("layer has no table of contents, and is fetched whole", "image", i.Reference, "layer", desc.Digest.String(), "bytes", desc.Size)
			if err := d.layWhole(ctx, b.tmp, l, layers[n], config.RootFS.DiffIDs[n], desc.Size, opts.Progress); err != nil {
				return nil, fmt.Errorf("layer %d: %w", n+1, err)
			}
			d.First += desc.Size
			continue
		}
		d.layers = append(d.layers, lazy)
		if err := l.applyTOC(ctx, entries, files); err != nil {
			return nil, fmt.Errorf("layer %d: %w", n+1, err)
		}
		d.First += desc.Size - lazy.end()
	}
	d.fetched.Store(d.First)
	// What is read to make config.json is fetched now.
	for _, name := range accountFiles {
		if n := b.rootfs().Find("/"+name, true); files[n] != nil {
			text, err := d.whole(ctx, files[n])
			if err != nil {
				return nil, fmt.Errorf("%q: %w", name, err)
			}
			n.Content = filetree.Bytes(text)
			delete(files, n)
		}
	}
	return files, nil
}

// whole fetches a small file.
func (d *LazyDisk) whole(ctx context.Context, f *lazyFile) ([]byte, error) {
	if f.size > maxAccounts {
		return nil, fmt.Errorf("it has %d bytes", f.size)
	}
	text := make([]byte, f.size)
	for _, c := range f.chunks {
		if c.state == chunkZeros {
			continue
		}
		if err := d.contents(ctx, c.layer, []*chunk{c}, nil, func(c *chunk, content []byte) error { copy(text[c.off:], content); return nil }); err != nil {
			return nil, err
		}
	}
	return text, nil
}

// end is where the files of the layer end, and its table of contents begins.
func (l *lazyLayer) end() int64 {
	end := int64(0)
	for _, c := range l.chunks {
		end = max(end, c.to)
	}
	return end
}

func (d *LazyDisk) layWhole(ctx context.Context, tmp string, l *layering, layer v1.Layer, want v1.Hash, size int64, progress func(Progress)) error {
	file := filepath.Join(tmp, "layer")
	defer os.Remove(file)
	var done int64
	if err := fetchLayer(ctx, layer, file, size, func(n int64) { done += n; progress(Progress{"fetch layers", done, size}) }); err != nil {
		return err
	}
	return l.applyFile(ctx, file, layer, want)
}

// applyTOC applies a layer by its table of contents.
func (l *layering) applyTOC(ctx context.Context, entries []tocEntry, files map[*filetree.Node]*lazyFile) error {
	l.upper = make(map[string]bool)
	for n := range entries {
		e := &entries[n]
		if err := ctx.Err(); err != nil {
			return err
		}
		if e.Type == "chunk" || e.Name == tocName || e.Name == ".prefetch.landmark" || e.Name == ".no.prefetch.landmark" {
			continue // of the format itself
		}
		h, err := e.header()
		if err != nil {
			return err
		}
		if err := l.entry(h, func() (filetree.Content, error) { return placeholder(e.Size), nil }); err != nil {
			return fmt.Errorf("entry %q: %w", e.Name, err)
		}
		if h.Typeflag == tar.TypeReg && e.Size > 0 && !strings.HasPrefix(filepath.Base(e.Name), whiteout) {
			p, err := l.inside(h.Name)
			if err == nil {
				p, err = l.resolve(p)
			}
			if err != nil {
				return err
			}
			files[l.tree.Find(p, false)] = e.lazy
		}
	}
	return nil
}

// find finds out where on the disk the files are.
func (d *LazyDisk) find(ctx context.Context, tree *filetree.Tree, files map[*filetree.Node]*lazyFile, path string, opts DiskOptions) error {
	var (
		commands strings.Builder
		order    []*lazyFile
	)
	seen := map[*lazyFile]bool{}
	if err := tree.Each("/", func(p string, n *filetree.Node) error {
		f := files[n]
		if f == nil || seen[f] {
			return nil
		}
		if strings.ContainsAny(p, "\"\n") {
			return fmt.Errorf("file %q: a name with a quotation mark or a line break cannot be looked for: use an image's disk as a whole", p)
		}
		seen[f] = true
		order = append(order, f)
		fmt.Fprintf(&commands, "dump_extents -l \"%s\"\n", p)
		return nil
	}); err != nil {
		return err
	}
	if len(order) == 0 {
		return nil
	}
	script := path + ".commands"
	if err := os.WriteFile(script, []byte(commands.String()), 0o600); err != nil {
		return err
	}
	defer os.Remove(script)
	cmd := opts.Debugfs(ctx, "-f", script, path)
	var complaints bytes.Buffer
	cmd.Stderr = &complaints
	output, err := cmd.Output()
	if err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return fmt.Errorf("debugfs: %w: %s", err, strings.TrimSpace(complaints.String()))
	}
	n := -1
	for scan := bufio.NewScanner(bytes.NewReader(output)); scan.Scan(); {
		line := scan.Text()
		switch {
		case strings.HasPrefix(line, "debugfs: "):
			n++
		case strings.HasPrefix(line, "Level") || line == "":
		default:
			// " 0/ 0   1/  4     0 -  3807  4385 -  8192   3808 ": level and its depth, which of how many, logical and physical blocks, length
			fields := strings.FieldsFunc(line, func(r rune) bool { return r == ' ' || r == '/' || r == '-' })
			var numbers [9]int64
			if len(fields) < len(numbers) || n < 0 || n >= len(order) {
				return fmt.Errorf("debugfs says %q", line)
			}
			for k := range numbers {
				if _, err := fmt.Sscanf(fields[k], "%d", &numbers[k]); err != nil {
					return fmt.Errorf("debugfs says %q", line)
				}
			}
			e := extent{logical: numbers[4], physical: numbers[6], length: numbers[8]}
			order[n].blocks = append(order[n].blocks, e)
			d.pieces = append(d.pieces, piece{e, order[n]})
		}
	}
	for _, f := range order {
		var have int64
		for _, e := range f.blocks {
			if e.logical != have {
				return fmt.Errorf("a file of %d bytes has a hole at block %d", f.size, have)
			}
			have += e.length
		}
		if want := (f.size + diskBlock - 1) / diskBlock; have != want {
			return fmt.Errorf("debugfs finds %d blocks of a file that has %d (%s)", have, want, strings.TrimSpace(complaints.String()))
		}
	}
	slices.SortFunc(d.pieces, func(a, b piece) int { return cmp.Compare(a.physical, b.physical) })
	// What no file has any more, as a later layer took it away, is not fetched.
	for _, l := range d.layers {
		l.chunks = slices.DeleteFunc(l.chunks, func(c *chunk) bool { return !seen[c.file] })
	}
	return nil
}

// punch takes the placeholders away.
func (d *LazyDisk) punch(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	for _, p := range d.pieces {
		if err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, p.physical*diskBlock, p.length*diskBlock); err != nil {
			return fmt.Errorf("make a hole in %q: %w", path, err)
		}
	}
	return nil
}
