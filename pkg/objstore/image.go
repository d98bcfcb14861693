package objstore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"github.com/drafter-vm/drafter/pkg/block"
)

// Fetcher gets what is in the store of a device, chunk by chunk.
type Fetcher struct {
	store  *Store
	list   *List
	known  []int // chunks that are in the list
	ranges []block.Range
}

// Fetch makes a Fetcher of a list.
func (s *Store) Fetch(l *List) *Fetcher {
	f := &Fetcher{store: s, list: l}
	for n, id := range l.Chunks {
		if id != None {
			f.known, f.ranges = append(f.known, n), append(f.ranges, l.Range(n))
		}
	}
	return f
}

// List is what the Fetcher was made of.
func (f *Fetcher) List() *List { return f.list }

// Chunks lists what there is, ascending.
func (f *Fetcher) Chunks() []block.Range { return f.ranges }

// Fetch fills p with the content of a chunk, by its place in Chunks.
func (f *Fetcher) Fetch(ctx context.Context, chunk int, p []byte) error {
	return f.store.Get(ctx, f.list.Chunks[f.known[chunk]], p)
}

// Is reports whether p is the content of that chunk.
func (f *Fetcher) Is(chunk int, p []byte) bool { return f.store.Is(f.list.Chunks[f.known[chunk]], p) }

const (
	imageCache = 64 // chunks that an image remembers, at least
	imageAhead = 8  // chunks that it fetches before they are asked for
)

// Image is a device that holds what a list says, and can only be read. What is read is fetched, and what follows it, and the latest chunks
// are remembered.
type Image struct {
	store *Store
	list  *List
	ctx   context.Context // ends with Close, at the latest
	stop  context.CancelFunc
	ahead sync.WaitGroup

	mu     sync.Mutex     // guards what follows
	chunks map[int]*chunk // remembered, or on their way
	order  []int          // those of them that were asked for, or fetched ahead, the oldest first
	closed bool
}

// chunk is a chunk of an image. Its fields are set before done is closed.
type chunk struct {
	done chan struct{}
	data []byte
	err  error
}

var _ block.Device = (*Image)(nil)
var _ block.Extents = (*Image)(nil)

// OpenImage returns the image of a list of which all is known. Reads fail when ctx has ended.
func (s *Store) OpenImage(ctx context.Context, l *List) (*Image, error) {
	for n, id := range l.Chunks {
		if id == None {
			return nil, fmt.Errorf("open image: what it holds at %d is not in the store", l.Range(n).Offset)
		}
	}
	i := &Image{store: s, list: l, chunks: make(map[int]*chunk)}
	i.ctx, i.stop = context.WithCancel(ctx)
	return i, nil
}

// Size implements [block.Device].
func (i *Image) Size() int64 { return i.list.Size }

// ReadAt implements [block.Device]. It fails when the store does, and may succeed the next time.
func (i *Image) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("read image at %d: %w", off, os.ErrInvalid)
	}
	n := 0
	for n < len(p) && off < i.list.Size {
		index := int(off / ChunkSize(i.list.Size))
		data, err := i.chunk(index)
		if err != nil {
			return n, fmt.Errorf("read image at %d: %w", off, err)
		}
		at := off - i.list.Range(index).Offset
		k := min(int64(len(p)-n), i.list.Range(index).Length-at)
		if data == nil {
			clear(p[n : n+int(k)])
		} else {
			copy(p[n:], data[at:at+k])
		}
		n, off = n+int(k), off+k
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// chunk is the content of a chunk, nil for zeros.
func (i *Image) chunk(index int) ([]byte, error) {
	i.mu.Lock()
	if i.closed {
		i.mu.Unlock()
		return nil, os.ErrClosed
	}
	if i.list.Chunks[index] == Zeros {
		i.mu.Unlock()
		return nil, nil
	}
	c := i.want(index)
	for next := index + 1; next <= index+imageAhead && next < len(i.list.Chunks); next++ {
		if i.list.Chunks[next] != Zeros {
			i.want(next)
		}
	}
	i.mu.Unlock()
	<-c.done
	return c.data, c.err
}

// want has a chunk fetched, unless it is here or on its way. mu is held.
func (i *Image) want(index int) *chunk {
	if c := i.chunks[index]; c != nil {
		return c
	}
	c := &chunk{done: make(chan struct{})}
	i.chunks[index] = c
	i.order = append(i.order, index)
	for len(i.order) > imageCache {
		delete(i.chunks, i.order[0]) // who waits for it has it
		i.order = i.order[1:]
	}
	i.ahead.Go(func() {
		p := make([]byte, i.list.Range(index).Length)
		if c.err = i.store.Get(i.ctx, i.list.Chunks[index], p); c.err == nil {
			c.data = p
		} else {
			i.mu.Lock()
			if i.chunks[index] == c {
				delete(i.chunks, index) // it is asked for again the next time
			}
			i.mu.Unlock()
		}
		close(c.done)
	})
	return c
}

// NextData implements [block.Extents].
func (i *Image) NextData(off int64) (block.Range, error) {
	size := ChunkSize(i.list.Size)
	if off < 0 {
		return block.Range{}, fmt.Errorf("find data of image from %d: %w", off, os.ErrInvalid)
	}
	for n := int(off / size); n < len(i.list.Chunks); n++ {
		if i.list.Chunks[n] == Zeros {
			continue
		}
		first := max(off, i.list.Range(n).Offset)
		end := i.list.Range(n).End()
		for n++; n < len(i.list.Chunks) && i.list.Chunks[n] != Zeros; n++ {
			end = i.list.Range(n).End()
		}
		return block.Range{Offset: first, Length: end - first}, nil
	}
	return block.Range{}, io.EOF
}

var errReadOnly = errors.New("an image in an object store is only read")

// WriteAt fails.
func (i *Image) WriteAt([]byte, int64) (int, error) { return 0, errReadOnly }

// Discard fails.
func (i *Image) Discard(int64, int64) error { return errReadOnly }

// Flush does nothing.
func (i *Image) Flush() error { return nil }

// Close ends what is being fetched, and waits for its end.
func (i *Image) Close() error {
	i.mu.Lock()
	i.closed = true
	i.mu.Unlock()
	i.stop()
	i.ahead.Wait()
	return nil
}
