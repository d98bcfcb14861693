package oci

import (
	"archive/tar"
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
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
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/filetree"
	"github.com/drafter-vm/drafter/pkg/oci/bundle"
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

	mu      sync.Mutex // guards the states of chunks, and what follows
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
	done chan struct{}
	err  error // set before done is closed
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
	left int // bytes that are not here
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
	text, err := b.SpecText()
	if err != nil {
		return nil, err
	}
	if err := b.tree.WriteFile("/"+bundle.ConfigFile, string(text), 0o644); err != nil {
		return nil, err
	}
	path := filepath.Join(dir, "disk")
	opts.Disk.Progress = opts.Progress
	if err := writeExt4(ctx, b.tree, path+newSuffix, bundle.Label, text, opts.Disk); err != nil {
		return nil, err
	}
	defer func() { _ = os.Remove(path + newSuffix) }() // unless it is the disk by then
	if err := d.find(ctx, b.tree, files, path+newSuffix, opts.Disk); err != nil {
		return nil, err
	}
	d.ctx, d.cancel = context.WithCancel(context.WithoutCancel(ctx))
	if err := d.open(path, d.identity(i, text)); err != nil {
		d.cancel()
		return nil, err
	}
	for range opts.Background {
		d.work.Go(d.background)
	}
	return d, nil
}

// Files of a lazy disk, beside it.
const (
	newSuffix      = ".new"
	listSuffix     = ".missing"  // what has not come; absent: nothing
	identitySuffix = ".identity" // what the disk is of, written when the others are there
)

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
func (d *LazyDisk) open(path string, identity []byte) error {
	have, err := os.ReadFile(path + identitySuffix)
	list := path + listSuffix
	missing := []block.Range{}
	if err == nil && bytes.Equal(have, identity) {
		if _, err := os.Stat(list); errors.Is(err, os.ErrNotExist) { // all of it has come
			list = ""
		}
	} else {
		if err := errors.Join(ignoreAbsent(os.Remove(path+identitySuffix)), ignoreAbsent(os.Remove(list)), d.punch(path+newSuffix), os.Rename(path+newSuffix, path)); err != nil {
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
	return d.skipPresent()
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
	if f.size > 16<<20 {
		return nil, fmt.Errorf("it has %d bytes", f.size)
	}
	text := make([]byte, f.size)
	for _, c := range f.chunks {
		if c.state == chunkZeros {
			continue
		}
		l := d.layers[slices.IndexFunc(d.layers, func(l *lazyLayer) bool { return slices.Contains(l.chunks, c) })]
		if err := d.contents(ctx, l, []*chunk{c}, nil, func(c *chunk, content []byte) error { copy(text[c.off:], content); return nil }); err != nil {
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
		if l.entries++; l.entries > l.limits.Entries {
			return fmt.Errorf("it has more than %d entries: raise the limit if that is meant", l.limits.Entries)
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

// fetch is what the device asks of blocks that somebody reads.
func (d *LazyDisk) fetch(ctx context.Context, r block.Range) error {
	d.waiting.Add(1)
	defer func() {
		if d.waiting.Add(-1) == 0 {
			select {
			case d.calm <- struct{}{}:
			default:
			}
		}
	}()
	var wait []*arrival
	for _, c := range d.chunksOf(r) {
		a, err := d.want(c, foregroundSpan)
		if err != nil {
			return err
		}
		wait = append(wait, a...)
	}
	for _, a := range wait {
		select {
		case <-a.done:
			if a.err != nil {
				return a.err
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// chunksOf are the chunks with a part in a range of the disk.
func (d *LazyDisk) chunksOf(r block.Range) []*chunk {
	var list []*chunk
	first, last := r.Offset/diskBlock, (r.End()-1)/diskBlock
	n, _ := slices.BinarySearchFunc(d.pieces, first, func(p piece, b int64) int {
		if p.physical+p.length <= b {
			return -1
		}
		if p.physical > b {
			return 1
		}
		return 0
	})
	for ; n < len(d.pieces) && d.pieces[n].physical <= last; n++ {
		p := d.pieces[n]
		from := (p.logical + max(0, first-p.physical)) * diskBlock
		to := min((p.logical+min(p.length, last+1-p.physical))*diskBlock, p.file.size)
		k, found := slices.BinarySearchFunc(p.file.chunks, from, func(c *chunk, off int64) int { return cmp.Compare(c.off, off) })
		if !found {
			k--
		}
		for ; k < len(p.file.chunks) && p.file.chunks[k].off < to; k++ {
			list = append(list, p.file.chunks[k])
		}
	}
	return list
}

// How much is asked of the registry at once: of what somebody waits for; and behind, as much as comes in a moment, as it holds up what somebody asks for then.
const (
	foregroundSpan = 256 << 10
	leastSpan      = 64 << 10
	mostSpan       = 4 << 20
	spanTime       = 100 * time.Millisecond
)

// want sees to it that a chunk comes, and returns what to wait for: with it come those behind it in the layer, up to span bytes.
func (d *LazyDisk) want(c *chunk, span int64) ([]*arrival, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch c.state {
	case chunkHere:
		return nil, nil
	case chunkComing:
		return []*arrival{c.done}, nil
	case chunkZeros:
		c.state = chunkHere
		return nil, d.put(c, make([]byte, c.size))
	}
	for _, l := range d.layers {
		n, _ := slices.BinarySearchFunc(l.chunks, c.from, func(x *chunk, from int64) int { return cmp.Compare(x.from, from) })
		for ; n < len(l.chunks) && l.chunks[n].from == c.from; n++ {
			if l.chunks[n] == c {
				return []*arrival{d.start(l, n, span)}, nil
			}
		}
	}
	return nil, errors.New("read a chunk that no layer has") // a chunk of a file is in the list of its layer
}

// start begins to fetch the chunks of a layer from n on that are absent, without a gap, up to span bytes. It is called with the mutex held.
func (d *LazyDisk) start(l *lazyLayer, n int, span int64) *arrival {
	a := &arrival{done: make(chan struct{})}
	from := l.chunks[n].from
	var list []*chunk
	for k := n; k < len(l.chunks) && l.chunks[k].state == chunkAbsent && (k == n || l.chunks[k].to-from <= span); k++ {
		l.chunks[k].state, l.chunks[k].done = chunkComing, a
		list = append(list, l.chunks[k])
	}
	d.work.Go(func() {
		err := d.bring(l, list)
		d.mu.Lock()
		for _, c := range list {
			if c.state == chunkComing {
				c.state = chunkAbsent
			}
			c.done = nil
		}
		d.mu.Unlock()
		a.err = err
		close(a.done)
	})
	return a
}

// bring fetches chunks that lie one behind the other in a layer, and puts them on the disk.
func (d *LazyDisk) bring(l *lazyLayer, list []*chunk) error {
	return d.contents(d.ctx, l, list, d.log, func(c *chunk, content []byte) error {
		d.mu.Lock()
		defer d.mu.Unlock()
		c.state = chunkHere
		return d.put(c, content)
	})
}

// contents fetches chunks that lie one behind the other in a layer.
func (d *LazyDisk) contents(ctx context.Context, l *lazyLayer, list []*chunk, patient *slog.Logger, each func(c *chunk, content []byte) error) error {
	from, to := list[0].from, list[0].to
	for _, c := range list {
		to = max(to, c.to)
	}
	data, err := d.blobs.read(ctx, l.digest, from, to-from, patient)
	if err != nil {
		return err
	}
	d.fetched.Add(int64(len(data)))
	for _, c := range list {
		content, err := l.decompress(data[c.from-from:c.to-from], c)
		if err != nil {
			return fmt.Errorf("layer %s: %w", l.digest, err)
		}
		if sha256.Sum256(content) != c.digest {
			return fmt.Errorf("layer %s: the chunk at %d is not what the table of contents says: %w", l.digest, c.from, errCorrupt)
		}
		if err := each(c, content); err != nil {
			return err
		}
	}
	return nil
}

// decompress takes a chunk out of the stream that it is in.
func (l *lazyLayer) decompress(data []byte, c *chunk) ([]byte, error) {
	var r io.Reader
	if l.gzip {
		z, err := gzip.NewReader(bytes.NewReader(data))
		if err != nil {
			return nil, fmt.Errorf("the chunk at %d: %w", c.from, err)
		}
		r = z
	} else {
		z, err := zstd.NewReader(bytes.NewReader(data), zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(2*maxChunk))
		if err != nil {
			return nil, fmt.Errorf("the chunk at %d: %w", c.from, err)
		}
		defer z.Close()
		r = z
	}
	if _, err := io.CopyN(io.Discard, r, c.skip); err != nil {
		return nil, fmt.Errorf("the chunk at %d: %w", c.from, err)
	}
	content := make([]byte, c.size)
	if _, err := io.ReadFull(r, content); err != nil {
		return nil, fmt.Errorf("the chunk at %d: %w", c.from, err)
	}
	return content, nil
}

// put puts a chunk where it belongs on the disk. A block with parts of several chunks waits until all are here. It is called with the mutex held.
func (d *LazyDisk) put(c *chunk, data []byte) error {
	f := c.file
	for off := c.off; off < c.off+c.size; {
		block := off / diskBlock
		begin, end := block*diskBlock, min((block+1)*diskBlock, f.size) // of what the block has of the file
		to := min(end, c.off+c.size)
		part := data[off-c.off : to-c.off]
		if off == begin && to == end && end == begin+diskBlock {
			// As many whole blocks as lie one behind the other.
			e := f.extentOf(block)
			n := min((c.off+c.size-off)/diskBlock, e.logical+e.length-block)
			if err := d.Fill((e.physical+block-e.logical)*diskBlock, data[off-c.off:off-c.off+n*diskBlock]); err != nil {
				return err
			}
			off += n * diskBlock
			continue
		}
		e := f.extentOf(block)
		at := e.physical + block - e.logical
		x := d.edges[at]
		if x == nil {
			x = &edge{data: make([]byte, diskBlock), left: int(end - begin)}
			d.edges[at] = x
		}
		copy(x.data[off-begin:], part)
		if x.left -= len(part); x.left == 0 {
			delete(d.edges, at)
			if err := d.Fill(at*diskBlock, x.data); err != nil {
				return err
			}
		}
		off = to
	}
	return nil
}

func (f *lazyFile) extentOf(b int64) extent {
	n, found := slices.BinarySearchFunc(f.blocks, b, func(e extent, b int64) int { return cmp.Compare(e.logical, b) })
	if !found {
		n--
	}
	return f.blocks[n]
}

// background fetches what nobody has asked for yet, one request at a time, and none while somebody waits.
func (d *LazyDisk) background() {
	pause, span := time.Second, int64(leastSpan)
	for {
		for d.waiting.Load() > 0 {
			select {
			case <-d.calm:
			case <-time.After(10 * time.Millisecond): // another may have been told
			case <-d.ctx.Done():
				return
			}
		}
		began := time.Now()
		a, err := d.next(span)
		if d.ctx.Err() != nil {
			return
		}
		if a == nil && err == nil {
			d.complete()
			return
		}
		if err == nil {
			<-a.done
			err = a.err
		}
		if d.ctx.Err() != nil {
			return
		}
		d.mu.Lock()
		d.failure = err
		d.mu.Unlock()
		if err == nil {
			pause = time.Second
			if took := time.Since(began); took > 2*spanTime {
				span = max(span/2, leastSpan)
			} else if took < spanTime {
				span = min(2*span, mostSpan)
			}
			continue
		}
		d.log.Warn("what nobody has asked for yet cannot be fetched, and is tried again", "error", err, "after", pause)
		select {
		case <-time.After(pause):
		case <-d.ctx.Done():
			return
		}
		pause = min(2*pause, time.Minute)
	}
}

// complete puts on record that all has come, once it has.
func (d *LazyDisk) complete() {
	if d.Wait(d.ctx) != nil {
		return // it is closed
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.recorded {
		d.recorded = true
		if err := d.Complete(); err != nil {
			d.log.Warn("all of the image has been fetched, which could not be put on record: it is looked at again when it is used the next time", "error", err)
		}
	}
}

// next begins to fetch the first chunks that are absent, up to span bytes; nil: there are none.
func (d *LazyDisk) next(span int64) (*arrival, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, l := range d.layers {
		for n, c := range l.chunks {
			if c.state == chunkAbsent {
				return d.start(l, n, span), nil
			}
		}
	}
	for _, p := range d.pieces {
		for _, c := range p.file.chunks {
			if c.state == chunkZeros {
				c.state = chunkHere
				if err := d.put(c, make([]byte, c.size)); err != nil {
					return nil, err
				}
			}
		}
	}
	return nil, nil
}
