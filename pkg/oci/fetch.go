package oci

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"time"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

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
	chunks := d.chunksOf(r)
	coming := make([]*arrival, len(chunks))
	for n, c := range chunks {
		var err error
		if coming[n], err = d.want(c, foregroundSpan); err != nil {
			return err
		}
	}
	for n, c := range chunks {
		for a := coming[n]; a != nil; {
			select {
			case <-a.done:
			case <-ctx.Done():
				return ctx.Err()
			}
			if a.err == nil {
				break
			}
			if a.first == c {
				return a.err
			}
			// It was behind one that failed, and is asked for by itself.
			var err error
			if a, err = d.want(c, foregroundSpan); err != nil {
				return err
			}
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

// want sees to it that a chunk comes, and returns what to wait for, nothing if it is here: with it come those behind it in the layer, up to span bytes.
func (d *LazyDisk) want(c *chunk, span int64) (*arrival, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch c.state {
	case chunkHere:
		return nil, nil
	case chunkComing:
		return c.done, nil
	case chunkZeros:
		return nil, d.put(c, make([]byte, c.size))
	}
	// Several may be in one stream, and begin where it does.
	l := c.layer
	n, _ := slices.BinarySearchFunc(l.chunks, c.from, func(x *chunk, from int64) int { return cmp.Compare(x.from, from) })
	return d.start(l, n+slices.Index(l.chunks[n:], c), span), nil
}

// start begins to fetch the chunks of a layer from n on that are absent, without a gap, up to span bytes. It is called with the mutex held.
func (d *LazyDisk) start(l *lazyLayer, n int, span int64) *arrival {
	a := &arrival{done: make(chan struct{}), first: l.chunks[n]}
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
		return d.put(c, content)
	})
}

// contents fetches chunks that lie one behind the other in a layer.
func (d *LazyDisk) contents(ctx context.Context, l *lazyLayer, list []*chunk, log *slog.Logger, each func(c *chunk, content []byte) error) error {
	from, to := list[0].from, list[0].to
	for _, c := range list {
		to = max(to, c.to)
	}
	data, err := d.blobs.read(ctx, l.digest, from, to-from, log)
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

// put puts a chunk where it belongs on the disk, and says that it is here. A block with parts of several chunks waits until all are. Where that fails, it can be done
// again. It is called with the mutex held.
func (d *LazyDisk) put(c *chunk, data []byte) error {
	f := c.file
	for off := c.off; off < c.off+c.size; {
		block := off / diskBlock
		begin, end := block*diskBlock, min((block+1)*diskBlock, f.size) // of what the block has of the file
		to := min(end, c.off+c.size)
		e := f.extentOf(block)
		at := e.physical + block - e.logical
		if off == begin && to == end && end == begin+diskBlock {
			// As many whole blocks as lie one behind the other.
			n := min((c.off+c.size-off)/diskBlock, e.logical+e.length-block)
			if err := d.Fill(at*diskBlock, data[off-c.off:off-c.off+n*diskBlock]); err != nil {
				return err
			}
			off += n * diskBlock
			continue
		}
		x := d.edges[at]
		if x == nil {
			x = &edge{data: make([]byte, diskBlock), left: int(end - begin), has: map[*chunk]bool{}}
			d.edges[at] = x
		}
		if !x.has[c] {
			x.has[c] = true
			x.left -= copy(x.data[off-begin:], data[off-c.off:to-c.off])
		}
		if x.left == 0 {
			if err := d.Fill(at*diskBlock, x.data); err != nil {
				return err
			}
			delete(d.edges, at)
		}
		off = to
	}
	c.state = chunkHere
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

// next begins to fetch the first chunks that are absent, up to span bytes, or returns what is coming; nil: nothing is missing.
func (d *LazyDisk) next(span int64) (*arrival, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	var coming *arrival
	for _, l := range d.layers {
		for n, c := range l.chunks {
			switch c.state {
			case chunkAbsent:
				return d.start(l, n, span), nil
			case chunkComing: // and may not come: then it is absent again
				coming = c.done
			}
		}
	}
	if coming != nil {
		return coming, nil
	}
	for _, p := range d.pieces {
		for _, c := range p.file.chunks {
			if c.state == chunkZeros {
				if err := d.put(c, make([]byte, c.size)); err != nil {
					return nil, err
				}
			}
		}
	}
	return nil, nil
}
