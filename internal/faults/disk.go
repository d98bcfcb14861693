package faults

import (
	"io"
	"math/rand/v2"
	"sync"

	"github.com/drafter-vm/drafter/pkg/block"
)

// Disk is a device with a volatile cache, as real ones have: what was not flushed is lost, or not, by a power cut.
type Disk struct {
	mu       sync.Mutex // guards what follows
	cache    *block.Memory
	platter  *block.Memory
	unsynced map[int64]bool // pages
}

var _ block.Device = (*Disk)(nil)

// NewDisk returns an empty disk of size bytes.
func NewDisk(size int64) *Disk {
	return &Disk{cache: block.NewMemory(size), platter: block.NewMemory(size), unsynced: map[int64]bool{}}
}

// Size implements block.Device.
func (d *Disk) Size() int64 { return d.cache.Size() }

// ReadAt implements block.Device.
func (d *Disk) ReadAt(p []byte, off int64) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.cache.ReadAt(p, off)
}

// WriteAt implements block.Device.
func (d *Disk) WriteAt(p []byte, off int64) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.mark(off, int64(len(p)))
	return d.cache.WriteAt(p, off)
}

// Discard implements block.Device.
func (d *Disk) Discard(off, n int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.mark(off, n)
	return d.cache.Discard(off, n)
}

func (d *Disk) mark(off, n int64) {
	for page := off / block.PageSize; page*block.PageSize < off+n; page++ {
		d.unsynced[page] = true
	}
}

// NextData implements block.Extents.
func (d *Disk) NextData(off int64) (block.Range, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.cache.NextData(off)
}

// Flush implements block.Device.
func (d *Disk) Flush() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	for page := range d.unsynced {
		d.copy(d.platter, d.cache, page)
	}
	clear(d.unsynced)
	return nil
}

// PowerCut forgets what was not flushed, page by page as chance will have it.
func (d *Disk) PowerCut(r *rand.Rand) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for page := range d.unsynced {
		if r.IntN(2) == 0 {
			d.copy(d.platter, d.cache, page)
		} else {
			d.copy(d.cache, d.platter, page)
		}
	}
	clear(d.unsynced)
}

// copy copies a page between two devices in memory, which cannot fail.
func (d *Disk) copy(to, from *block.Memory, page int64) {
	p := make([]byte, min(block.PageSize, d.Size()-page*block.PageSize))
	_, _ = from.ReadAt(p, page*block.PageSize)
	_, _ = to.WriteAt(p, page*block.PageSize)
}

// Close implements block.Device. The disk of a host outlives who uses it.
func (d *Disk) Close() error { return d.Flush() }

// section is a part of a device, from off.
type section struct {
	block.Device
	off int64
}

func (s section) ReadAt(p []byte, off int64) (int, error)  { return s.Device.ReadAt(p, s.off+off) }
func (s section) WriteAt(p []byte, off int64) (int, error) { return s.Device.WriteAt(p, s.off+off) }

var _ interface {
	io.ReaderAt
	io.WriterAt
} = section{}
