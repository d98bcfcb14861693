package objstore

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/drafter-vm/drafter/pkg/block"
)

// MaxChunkSize is the most bytes of a chunk.
const MaxChunkSize = 16 << 20

const (
	leastChunkSize = 256 << 10
	maxChunks      = 1 << 20 // of a device
	maxListBytes   = listHead + 32*maxChunks
)

// ChunkSize is how many bytes the chunks of a device of that many have, but for the last: 256 KiB, or more where there would be more than
// 2^20 of them. So the same content at the same place of devices of about the same size is one chunk.
func ChunkSize(size int64) int64 {
	n := int64(leastChunkSize)
	for (size+n-1)/n > maxChunks && n < MaxChunkSize {
		n *= 2
	}
	return n
}

// List says what a device holds: which chunk is where.
type List struct {
	Size   int64 // of the device, bytes
	Chunks []ID  // None: unknown
}

// NewList is a list of nothing, of a device of that many bytes: at most 16 TiB.
func NewList(size int64) (*List, error) {
	n := ChunkSize(size)
	if size < 0 || (size+n-1)/n > maxChunks {
		return nil, fmt.Errorf("a device of %d bytes cannot be put into an object store: at most %d can", size, int64(MaxChunkSize)*maxChunks)
	}
	return &List{Size: size, Chunks: make([]ID, (size+n-1)/n)}, nil
}

// Range is where a chunk is.
func (l *List) Range(chunk int) block.Range {
	n := ChunkSize(l.Size)
	off := int64(chunk) * n
	return block.Range{Offset: off, Length: min(n, l.Size-off)}
}

// A list is, big-endian:
//
//	0   8  "DRAFTLST"
//	8   8  version, 1
//	16  8  size of the device
//	24     32 bytes for each chunk
const (
	listMagic = "DRAFTLST"
	listHead  = 24
)

func (l *List) encode() []byte {
	b := append(make([]byte, 0, listHead+32*len(l.Chunks)), listMagic...)
	b = binary.BigEndian.AppendUint64(b, 1)
	b = binary.BigEndian.AppendUint64(b, uint64(l.Size))
	for _, id := range l.Chunks {
		b = append(b, id[:]...)
	}
	return b
}

func decodeList(b []byte) (*List, error) {
	if len(b) < listHead || string(b[:8]) != listMagic {
		return nil, fmt.Errorf("it is no list of chunks: %w", ErrCorrupt)
	}
	if v := binary.BigEndian.Uint64(b[8:]); v != 1 {
		return nil, fmt.Errorf("it is a list of chunks of version %d, and 1 is known here: %w", v, ErrCorrupt)
	}
	size := binary.BigEndian.Uint64(b[16:])
	if size > MaxChunkSize*maxChunks {
		return nil, fmt.Errorf("it is a list of chunks of %d bytes: %w", size, ErrCorrupt)
	}
	l, err := NewList(int64(size))
	if err != nil {
		return nil, err
	}
	if len(b) != listHead+32*len(l.Chunks) {
		return nil, fmt.Errorf("it is a list of chunks of %d bytes, for a device of %d: %w", len(b), size, ErrCorrupt)
	}
	for n := range l.Chunks {
		l.Chunks[n] = ID(b[listHead+32*n:])
	}
	return l, nil
}

// PutList puts a list there, and returns its name.
func (s *Store) PutList(ctx context.Context, l *List) (ID, error) {
	b := l.encode()
	id := s.cfg.Key.idOf(b)
	if _, err := s.put(ctx, "lists", id, b); err != nil {
		return ID{}, fmt.Errorf("put list of chunks: %w", err)
	}
	return id, nil
}

// GetList gets a list, which must be of a device of size bytes, if that is not negative.
func (s *Store) GetList(ctx context.Context, id ID, size int64) (*List, error) {
	b, err := s.get(ctx, "lists", id, maxListBytes)
	if err != nil {
		return nil, err
	}
	l, err := decodeList(b)
	if err != nil {
		return nil, fmt.Errorf("get list %v: %w", id, err)
	}
	if size >= 0 && l.Size != size {
		return nil, fmt.Errorf("get list %v: it is of a device of %d bytes, not of %d", id, l.Size, size)
	}
	return l, nil
}

// HasList looks whether all chunks of a list are there: see Has.
func (s *Store) HasList(ctx context.Context, l *List) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(s.cfg.Concurrency)
	for _, id := range l.Chunks {
		if ctx.Err() != nil {
			break
		}
		if id != None && id != Zeros && !s.believes(id) {
			g.Go(func() error { return s.Has(ctx, id) })
		}
	}
	return g.Wait()
}

// PutOptions say how a device is put.
type PutOptions struct {
	// Before is what the device held before, and Changed, if it is not nil, returns the first range at or after off that may have changed since,
	// and io.EOF when there is none.
	Before  *List
	Changed func(off int64) (block.Range, error)

	// Progress is told how many bytes were looked at, and how many of them are in the store now that were not; nil is allowed.
	Progress func(done, put int64)
}

// PutDevice puts what the device holds, which must not change meanwhile, and returns the list of it.
func (s *Store) PutDevice(ctx context.Context, d block.Device, opts PutOptions) (*List, error) {
	l, err := NewList(d.Size())
	if err != nil {
		return nil, fmt.Errorf("put device: %w", err)
	}
	next := func(off int64) (block.Range, error) { return block.NextData(d, off) }
	for n := range l.Chunks {
		l.Chunks[n] = Zeros
	}
	if opts.Before != nil && opts.Changed != nil && opts.Before.Size == l.Size {
		copy(l.Chunks, opts.Before.Chunks)
		next = opts.Changed
	}
	var mu sync.Mutex // guards done and put, and the order of calls of Progress
	var done, put int64
	outer := ctx
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(s.cfg.Concurrency)
	size := ChunkSize(l.Size)
	for off := int64(0); off < l.Size; {
		r, err := next(off)
		if errors.Is(err, io.EOF) {
			break
		}
		if err == nil && r.End() <= off {
			err = fmt.Errorf("got %d bytes at %d", r.Length, r.Offset)
		}
		if err != nil {
			return nil, errors.Join(fmt.Errorf("put device: find what it holds from %d: %w", off, err), g.Wait())
		}
		n := int(max(off, r.Offset) / size)
		for ; n < len(l.Chunks) && l.Range(n).Offset < r.End(); n++ {
			if ctx.Err() != nil {
				break
			}
			chunk := n
			g.Go(func() error {
				at := l.Range(chunk)
				p := make([]byte, at.Length)
				if err := readChunk(d, p, at); err != nil {
					return fmt.Errorf("put device: %w", err)
				}
				id, sent, err := s.putNew(ctx, p)
				if err != nil {
					return fmt.Errorf("put device: %w", err)
				}
				mu.Lock()
				defer mu.Unlock()
				if done += at.Length; sent {
					put += at.Length
				}
				l.Chunks[chunk] = id
				if opts.Progress != nil {
					opts.Progress(done, put)
				}
				return nil
			})
		}
		off = int64(n) * size
		if ctx.Err() != nil {
			break
		}
	}
	err = g.Wait()
	if err == nil {
		err = context.Cause(outer)
	}
	if err == nil && opts.Before != nil {
		err = s.HasList(outer, l)
	}
	if err != nil {
		return nil, err
	}
	return l, nil
}
