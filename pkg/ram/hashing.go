package ram

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"sync"

	"github.com/zeebo/xxh3"

	"github.com/drafter-vm/drafter/pkg/block"
)

// hashTable remembers, for each page, the hash of what Device delivered of it last.
type hashTable struct {
	// The zero hash stands for unknown, which differs from all contents.
	pages []xxh3.Uint128
	// locks guard pages, each those of one stretch of stripe pages in turn.
	locks [64]sync.Mutex
}

const stripe = 64 // pages

// zeroHash is that of a page of zeros.
var zeroHash = xxh3.Hash128(make([]byte, pageSize))

// delivered records that data, the contents at off, was handed out.
func (t *hashTable) delivered(off int64, data []byte) {
	for len(data) > 0 {
		page := off / pageSize
		n := min(int64(len(data)), (page+1)*pageSize-off)
		var h xxh3.Uint128
		if n == pageSize {
			h = xxh3.Hash128(data[:n])
		}
		// A part of a page makes the whole of it unknown: the reader now has a mixture of two states.
		lock := t.lock(page)
		lock.Lock()
		t.pages[page] = h
		lock.Unlock()
		data, off = data[n:], off+n
	}
}

func (t *hashTable) lock(page int64) *sync.Mutex { return &t.locks[page/stripe%int64(len(t.locks))] }

// differs reports whether the present contents of a page, by its hash, are not what was delivered.
func (t *hashTable) differs(page int64, h xxh3.Uint128) bool {
	lock := t.lock(page)
	lock.Lock()
	defer lock.Unlock()
	known := t.pages[page]
	return known != h || known == xxh3.Uint128{}
}

// hashing tracks by comparing hashes.
type hashing struct {
	m     *Memory
	table *hashTable
}

func (m *Memory) trackByHashing(ctx context.Context) (*hashing, error) {
	t := &hashTable{pages: make([]xxh3.Uint128, m.size/pageSize)}
	f := m.filler.Load()
	err := m.eachExtent(ctx, 0, m.size, func(off, end int64, data bool) error {
		for page := off / pageSize; !data && page < end/pageSize; page++ {
			if f == nil || f.present.has(page) {
				t.pages[page] = zeroHash
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	m.hashes.Store(t)
	return &hashing{m, t}, nil
}

// eachExtent calls f with what [off, end) of the memfd consists of, data and holes in turn.
func (m *Memory) eachExtent(ctx context.Context, off, end int64, f func(off, end int64, data bool) error) error {
	for off < end {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		r, err := m.nextData(off)
		if errors.Is(err, io.EOF) || err == nil && r.Offset >= end {
			return f(off, end, false)
		}
		if err != nil {
			return err
		}
		if r.Offset > off {
			if err := f(off, r.Offset, false); err != nil {
				return err
			}
		}
		off = min(r.End(), end)
		if err := f(r.Offset, off, true); err != nil {
			return err
		}
	}
	return nil
}

func (h *hashing) collect(ctx context.Context, found func(block.Range)) error {
	const span = 64 << 20 // bytes one goroutine takes at a time
	spans := (h.m.size + span - 1) / span
	results := make([][]block.Range, spans)
	errs := make([]error, spans)
	var next sync.Mutex // guards taken
	taken := int64(0)
	var workers sync.WaitGroup
	for range min(int64(runtime.GOMAXPROCS(0)), spans) {
		workers.Go(func() {
			buf := make([]byte, 256<<10)
			for {
				next.Lock()
				i := taken
				taken++
				next.Unlock()
				if i >= spans {
					return
				}
				results[i], errs[i] = h.compare(ctx, i*span, min((i+1)*span, h.m.size), buf)
			}
		})
	}
	workers.Wait()
	for _, rs := range results {
		for _, r := range rs {
			found(r)
		}
	}
	return errors.Join(errs...)
}

func (h *hashing) compare(ctx context.Context, off, end int64, buf []byte) (out []block.Range, err error) {
	differs := func(page int64) {
		if n := len(out); n > 0 && out[n-1].End() == page*pageSize {
			out[n-1].Length += pageSize
			return
		}
		out = append(out, block.Range{Offset: page * pageSize, Length: pageSize})
	}
	err = h.m.eachExtent(ctx, off, end, func(off, end int64, data bool) error {
		for off < end {
			if !data {
				if page := off / pageSize; h.table.differs(page, zeroHash) {
					differs(page)
				}
				off += pageSize
				continue
			}
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			part := buf[:min(int64(len(buf)), end-off)]
			if _, err := h.m.file.ReadAt(part, off); err != nil {
				return fmt.Errorf("read %d+%d: %w", off, len(part), err)
			}
			for ; len(part) > 0; part = part[pageSize:] {
				if page := off / pageSize; h.table.differs(page, xxh3.Hash128(part[:pageSize])) {
					differs(page)
				}
				off += pageSize
			}
		}
		return nil
	})
	return out, err
}

func (h *hashing) stop() error {
	h.m.hashes.Store(nil)
	return nil
}
