package block

import (
	"fmt"
	"sync"
	"sync/atomic"
)

// Memory is a device in the memory of this process. It forgets everything when it is garbage; it is for tests and for
// small things that were read from elsewhere. Memory is taken only for what was written.
type Memory struct {
	size   int64
	chunks []memoryChunk
	closed atomic.Bool
}

// memoryChunkSize is the unit in which a Memory takes and frees memory, and the granularity of its holes.
const memoryChunkSize = 64 << 10

type memoryChunk struct {
	mu   sync.RWMutex // guards data and its bytes
	data []byte       // nil: zeros
}

var (
	_ Device  = (*Memory)(nil)
	_ Extents = (*Memory)(nil)
)

// NewMemory makes a device of size bytes, all zero. It panics on a negative size.
func NewMemory(size int64) *Memory {
	if size < 0 {
		panic(fmt.Sprintf("block.NewMemory: size %d is negative", size))
	}
	return &Memory{size: size, chunks: make([]memoryChunk, (size+memoryChunkSize-1)/memoryChunkSize)}
}

// Size implements [Device].
func (m *Memory) Size() int64 { return m.size }

// eachChunk calls f with each chunk that [off, off+n) touches, and with the part of the chunk and of the range they share.
func (m *Memory) eachChunk(off, n int64, f func(c *memoryChunk, at int64, from, to int64)) {
	for done := int64(0); done < n; {
		at := (off + done) % memoryChunkSize
		k := min(n-done, memoryChunkSize-at)
		f(&m.chunks[(off+done)/memoryChunkSize], at, done, done+k)
		done += k
	}
}

// ReadAt implements [Device].
func (m *Memory) ReadAt(p []byte, off int64) (int, error) {
	if m.closed.Load() {
		return 0, errClosed("read", "memory")
	}
	p, err := clipRead("memory", p, off, m.size)
	m.eachChunk(off, int64(len(p)), func(c *memoryChunk, at, from, to int64) {
		c.mu.RLock()
		defer c.mu.RUnlock()
		if c.data == nil {
			clear(p[from:to])
		} else {
			copy(p[from:to], c.data[at:])
		}
	})
	return len(p), err
}

// WriteAt implements [Device].
func (m *Memory) WriteAt(p []byte, off int64) (int, error) {
	if err := m.usable("write", off, int64(len(p))); err != nil {
		return 0, err
	}
	m.eachChunk(off, int64(len(p)), func(c *memoryChunk, at, from, to int64) {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.data == nil {
			c.data = make([]byte, memoryChunkSize)
		}
		copy(c.data[at:], p[from:to])
	})
	return len(p), nil
}

// Discard implements [Device].
func (m *Memory) Discard(off, n int64) error {
	if err := m.usable("discard", off, n); err != nil {
		return err
	}
	m.eachChunk(off, n, func(c *memoryChunk, at, from, to int64) {
		c.mu.Lock()
		defer c.mu.Unlock()
		if to-from == memoryChunkSize {
			c.data = nil
		} else if c.data != nil {
			clear(c.data[at : at+to-from])
		}
	})
	return nil
}

func (m *Memory) usable(verb string, off, n int64) error {
	if m.closed.Load() {
		return errClosed(verb, "memory")
	}
	return checkRange(verb, "memory", off, n, m.size)
}

// Flush implements [Device]. Memory has no durability.
func (m *Memory) Flush() error { return m.usable("flush", 0, 0) }

// NextData implements [Extents].
func (m *Memory) NextData(off int64) (Range, error) {
	if m.closed.Load() {
		return Range{}, errClosed("find data in", "memory")
	}
	r, err := restOf(m.size, off)
	if err != nil {
		return r, err
	}
	i := off / memoryChunkSize
	for ; i < int64(len(m.chunks)) && !m.chunks[i].present(); i++ {
	}
	j := i
	for ; j < int64(len(m.chunks)) && m.chunks[j].present(); j++ {
	}
	start := max(off, i*memoryChunkSize)
	end := min(m.size, j*memoryChunkSize)
	if start >= end {
		return restOf(0, 0)
	}
	return Range{Offset: start, Length: end - start}, nil
}

func (c *memoryChunk) present() bool {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return c.data != nil
}

// Close implements [Device].
func (m *Memory) Close() error {
	m.closed.Store(true)
	return nil
}
