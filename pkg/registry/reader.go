package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/drafter-vm/drafter/pkg/block"
)

const (
	cacheBytes   = 64 << 20 // of content that a reader remembers, at least
	demandChunks = 4        // that are fetched at once where somebody reads here and there
	aheadBytes   = 1 << 20  // of content that is fetched at once where somebody reads on
	aheadAtOnce  = 4        // requests for that

	// While somebody reads here and there, as a guest does that waits, and for so long afterwards, there is one request ahead at a time: whatever the link
	// is, more of them would take most of it.
	urgentTime = 500 * time.Millisecond
)

// reader reads what packs hold, chunk by chunk. What is read once is remembered for a while: the same content is in many places.
type reader struct {
	*client
	ctx  context.Context // ends with close, at the latest
	stop context.CancelFunc
	free chan struct{} // receives when a request ahead has ended, if somebody waits for that
	work sync.WaitGroup

	mu     sync.Mutex // guards what follows
	chunks map[contentKey]*arrival
	order  []contentKey // of them, the oldest first
	bytes  int64        // in them
	ahead  int          // requests that are not urgent
	urgent time.Time    // when one was made that is
	closed bool
}

// arrival is content that is here, or on its way. Its fields are set before done is closed.
type arrival struct {
	done chan struct{}
	data []byte
	err  error
}

func newReader(ctx context.Context, c *client) *reader {
	r := &reader{client: c, chunks: make(map[contentKey]*arrival), free: make(chan struct{}, 1)}
	r.ctx, r.stop = context.WithCancel(ctx)
	return r
}

// close ends what is being fetched, and waits for its end.
func (r *reader) close() {
	r.mu.Lock()
	r.closed = true
	r.mu.Unlock()
	r.stop()
	r.work.Wait()
	r.client.close()
}

// chunk is the content of a chunk of an index.
func (r *reader) chunk(x *index, n int) ([]byte, error) {
	r.mu.Lock()
	if r.closed {
		r.mu.Unlock()
		return nil, os.ErrClosed
	}
	a := r.chunks[x.key(n)]
	if a == nil {
		a = r.want(x, n)
	}
	r.mu.Unlock()
	<-a.done
	return a.data, a.err
}

// key tells the content of a chunk from any other.
func (x *index) key(n int) contentKey { return contentKey{x.chunks[n].sum, x.chunkSize} }

// want has a chunk fetched that is neither here nor on its way, and some that follow it in its pack. mu is held.
func (r *reader) want(x *index, n int) *arrival {
	most := demandChunks
	// Who has read what is before reads on: that can come in larger pieces, and may wait for what somebody else touches.
	urgent := n == 0 || r.chunks[x.key(n-1)] == nil
	if !urgent {
		most = max(1, int(aheadBytes/x.chunkSize))
	}
	var run []*arrival
	first := n
	for ; n < len(x.chunks) && len(run) < most && (n == first || x.follows(n)); n++ {
		key := x.key(n)
		if r.chunks[key] != nil {
			break
		}
		a := &arrival{done: make(chan struct{})}
		r.chunks[key] = a
		r.order = append(r.order, key)
		r.bytes += x.chunkSize
		run = append(run, a)
	}
	for r.bytes > cacheBytes && len(r.order) > len(run) {
		delete(r.chunks, r.order[0]) // who waits for it has it
		r.bytes -= r.order[0].size
		r.order = r.order[1:]
	}
	if urgent {
		r.urgent = time.Now()
	}
	r.work.Go(func() {
		if !urgent {
			r.queue()
			defer r.leave()
		}
		r.fetch(x, first, run)
	})
	return run[0]
}

// queue waits until a request may be made that is not urgent.
func (r *reader) queue() {
	for {
		r.mu.Lock()
		most := aheadAtOnce
		if time.Since(r.urgent) < urgentTime {
			most = 1
		}
		if r.ahead < most || r.ctx.Err() != nil {
			r.ahead++
			r.mu.Unlock()
			return
		}
		r.mu.Unlock()
		select {
		case <-r.free:
		case <-time.After(urgentTime / 10):
		case <-r.ctx.Done():
		}
	}
}

// leave ends a request that was not urgent.
func (r *reader) leave() {
	r.mu.Lock()
	r.ahead--
	r.mu.Unlock()
	select {
	case r.free <- struct{}{}:
	default:
	}
}

// follows reports whether a chunk comes right after the one before it, in the same pack.
func (x *index) follows(n int) bool {
	before, c := x.chunks[n-1], x.chunks[n]
	return c.pack == before.pack && int64(c.offset) == int64(before.offset)+int64(before.length)
}

// fetch gets chunks that follow each other, and closes done of each.
func (r *reader) fetch(x *index, first int, run []*arrival) {
	got := 0
	err := r.try(r.ctx, func(ctx context.Context, alive func()) error {
		return r.frames(ctx, x, first+got, len(run)-got, alive, func(_ int, data []byte) error {
			run[got].data = data
			close(run[got].done)
			got++
			return nil
		})
	})
	if err == nil {
		return
	}
	if r.ctx.Err() == nil { // who reads may have no way to say why it failed
		r.Logger.Warn("content of a package cannot be fetched", "image", r.ref.String(), "error", err)
	}
	r.mu.Lock()
	for n := got; n < len(run); n++ {
		if key := x.key(first + n); r.chunks[key] == run[n] {
			delete(r.chunks, key) // it is asked for again the next time
			r.forget(key)
		}
	}
	r.mu.Unlock()
	for _, a := range run[got:] {
		a.err = err
		close(a.done)
	}
}

// forget takes a key out of the order. mu is held.
func (r *reader) forget(key contentKey) {
	for n := len(r.order) - 1; n >= 0; n-- {
		if r.order[n] == key {
			r.order = append(r.order[:n], r.order[n+1:]...)
			r.bytes -= key.size
			return
		}
	}
}

// frames gets some chunks that follow each other by one request, and has take have the content of each, which was checked, in order.
func (c *client) frames(ctx context.Context, x *index, first, count int, alive func(), take func(n int, data []byte) error) error {
	pack := x.packs[x.chunks[first].pack]
	off := int64(x.chunks[first].offset)
	last := x.chunks[first+count-1]
	size := int64(last.offset) + int64(last.length) - off
	body, err := c.get(ctx, pack.digest, off, size, pack.size)
	if err != nil {
		return err
	}
	defer body.Close()
	from := aliveReader{body, func(int) { alive() }}
	frame := make([]byte, 0, x.chunkSize+frameOverhead)
	at := off
	for n := first; n < first+count; n++ {
		chunk := x.chunks[n]
		if _, err := io.CopyN(io.Discard, from, int64(chunk.offset)-at); err != nil { // what lies between is not wanted
			return fmt.Errorf("pack %s at %d: %w", pack.digest, at, cut(err))
		}
		frame = frame[:chunk.length]
		if _, err := io.ReadFull(from, frame); err != nil {
			return fmt.Errorf("pack %s at %d: %w", pack.digest, chunk.offset, cut(err))
		}
		data, err := chunk.content(frame, x.chunkSize)
		if err != nil {
			return fmt.Errorf("chunk at %d of pack %s: %w", chunk.offset, pack.digest, err)
		}
		if err := take(n, data); err != nil {
			return err
		}
		at = int64(chunk.offset) + int64(chunk.length)
	}
	return nil
}

// device is a device of a package in a registry: a block.Device that is only read, and fetched as it is.
type device struct {
	name   string
	index  *index
	reader *reader
	open   *openDevices

	mu     sync.Mutex // guards what follows
	closed bool
}

// openDevices closes a reader with the last of its devices.
type openDevices struct {
	reader *reader

	mu   sync.Mutex // guards what follows
	left int
}

var _ block.Device = (*device)(nil)
var _ block.Extents = (*device)(nil)

func (d *device) Size() int64 { return d.index.size }

// ReadAt fails when the registry does, and may succeed the next time.
func (d *device) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("read device %q at %d: %w", d.name, off, os.ErrInvalid)
	}
	d.mu.Lock()
	closed := d.closed
	d.mu.Unlock()
	if closed {
		return 0, fmt.Errorf("read device %q: %w", d.name, os.ErrClosed)
	}
	n := 0
	for n < len(p) && off < d.index.size {
		place := off / d.index.chunkSize
		within := off - place*d.index.chunkSize
		k := min(int64(len(p)-n), d.index.chunkSize-within, d.index.size-off)
		if chunk, ok := d.index.at(place); !ok {
			clear(p[n : n+int(k)])
		} else if data, err := d.reader.chunk(d.index, chunk); err != nil {
			return n, fmt.Errorf("read device %q at %d: %w", d.name, off, err)
		} else {
			copy(p[n:], data[within:within+k])
		}
		n, off = n+int(k), off+k
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// NextData implements block.Extents.
func (d *device) NextData(off int64) (block.Range, error) {
	x := d.index
	if off < 0 {
		return block.Range{}, fmt.Errorf("find data of device %q from %d: %w", d.name, off, os.ErrInvalid)
	}
	if off >= x.size {
		return block.Range{}, io.EOF
	}
	n, _ := x.runAt(off / x.chunkSize)
	for ; n < len(x.runs) && x.runs[n].first == 0; n++ {
	}
	if n == len(x.runs) {
		return block.Range{}, io.EOF
	}
	first := max(off, x.starts[n]*x.chunkSize)
	for ; n < len(x.runs) && x.runs[n].first != 0; n++ {
	}
	end := x.size
	if n < len(x.runs) {
		end = x.starts[n] * x.chunkSize
	}
	return block.Range{Offset: first, Length: end - first}, nil
}

var errReadOnly = errors.New("a device in a registry is only read")

func (d *device) WriteAt([]byte, int64) (int, error) { return 0, errReadOnly }
func (d *device) Discard(int64, int64) error         { return errReadOnly }
func (d *device) Flush() error                       { return nil }

func (d *device) Close() error {
	d.mu.Lock()
	closed := d.closed
	d.closed = true
	d.mu.Unlock()
	if closed {
		return nil
	}
	d.open.mu.Lock()
	d.open.left--
	last := d.open.left == 0
	d.open.mu.Unlock()
	if last {
		d.reader.close()
	}
	return nil
}
