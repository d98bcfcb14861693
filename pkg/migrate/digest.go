package migrate

import (
	"encoding/binary"
	"math/bits"
	"sync"
	"sync/atomic"

	"github.com/zeebo/xxh3"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/wire"
)

// digest is the running content digest of one device, the one that [block.Digest] defines and would find by reading the
// whole device: a sum, modulo 2^128, of one term for each page that holds something else than zeros. A sum can be
// corrected when a page changes, which is what makes the digest of a whole device available the moment its last page was
// sent, instead of after a pass over it while the guest is paused. The price is 16 bytes of table for each page that
// ever held data: the page's term, to be taken out again.
//
// Each side feeds its digest with what goes over the wire: the source with the bytes it sends, the destination with the
// bytes it received. Equality therefore proves that every page arrived in the version that was sent last, at its place,
// undamaged. It proves neither that the tracker reported every write nor that the destination's device kept what it was
// given, and it is no defence against an attacker, who could change the digest too: that is the transport's job.
//
// All methods may be called concurrently. Two updates of the same page at the same time leave a wrong sum, which is what
// a peer deserves that sends a page twice without waiting for the round to end.
type digest struct {
	size   int64
	chunks []atomic.Pointer[chunk]

	mu     sync.Mutex // guards the sum
	lo, hi uint64
}

// chunkPages pages share a piece of the table, allocated when the first of them holds data.
const chunkPages = 4096

type chunk [chunkPages]pageTerm

// pageTerm holds its halves in atomics only because a peer may break the rules; see above.
type pageTerm struct{ lo, hi atomic.Uint64 }

func newDigest(size int64) *digest {
	const span = chunkPages * block.PageSize
	return &digest{size: size, chunks: make([]atomic.Pointer[chunk], (size+span-1)/span)}
}

// write notes that data, which begins at a page's start, is now the content at off.
func (d *digest) write(off int64, data []byte) {
	var lo, hi uint64
	for page := off / block.PageSize; len(data) > 0; page++ {
		n := min(len(data), block.PageSize)
		var h xxh3.Uint128
		if !block.IsZero(data[:n]) {
			h = termOf(page, data[:n])
		}
		data = data[n:]
		c := d.chunks[page/chunkPages].Load()
		if c == nil {
			if h == (xxh3.Uint128{}) {
				continue
			}
			c = d.allocate(page / chunkPages)
		}
		e := &c[page%chunkPages]
		var borrow, carry uint64
		lo, borrow = bits.Sub64(lo, e.lo.Swap(h.Lo), 0)
		hi, _ = bits.Sub64(hi, e.hi.Swap(h.Hi), borrow)
		lo, carry = bits.Add64(lo, h.Lo, 0)
		hi, _ = bits.Add64(hi, h.Hi, carry)
	}
	d.add(lo, hi)
}

// zero notes that the n bytes at off, which is a page's start, are zeros now.
func (d *digest) zero(off, n int64) {
	var lo, hi uint64
	d.each(off, n, func(e *pageTerm) bool {
		var borrow uint64
		lo, borrow = bits.Sub64(lo, e.lo.Swap(0), 0)
		hi, _ = bits.Sub64(hi, e.hi.Swap(0), borrow)
		return true
	})
	if lo|hi != 0 {
		d.add(lo, hi)
	}
}

// isZero reports whether everything noted for the n bytes at off is zeros.
func (d *digest) isZero(off, n int64) bool {
	zero := true
	d.each(off, n, func(e *pageTerm) bool {
		zero = e.lo.Load()|e.hi.Load() == 0
		return zero
	})
	return zero
}

// each calls f for the entries of the range that exist, until it returns false.
func (d *digest) each(off, n int64, f func(*pageTerm) bool) {
	page, end := off/block.PageSize, (off+n+block.PageSize-1)/block.PageSize
	for page < end {
		next := min(end, (page/chunkPages+1)*chunkPages)
		if c := d.chunks[page/chunkPages].Load(); c != nil {
			for ; page < next; page++ {
				if !f(&c[page%chunkPages]) {
					return
				}
			}
		}
		page = next
	}
}

func (d *digest) allocate(i int64) *chunk {
	c := new(chunk)
	if d.chunks[i].CompareAndSwap(nil, c) {
		return c
	}
	return d.chunks[i].Load()
}

func (d *digest) add(lo, hi uint64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	var carry uint64
	d.lo, carry = bits.Add64(d.lo, lo, 0)
	d.hi, _ = bits.Add64(d.hi, hi, carry)
}

// termOf is what a page that is not all zeros adds to the sum: XXH3-128 of its number and its own XXH3-128. The number
// keeps equal pages in exchanged places from canceling out.
func termOf(page int64, data []byte) xxh3.Uint128 {
	var b [24]byte
	binary.LittleEndian.PutUint64(b[:], uint64(page))
	h := xxh3.Hash128(data).Bytes()
	copy(b[8:], h[:])
	return xxh3.Hash128(b[:])
}

// sum returns the digest: the sum of the terms and of XXH3-128 of the size, big-endian.
func (d *digest) sum() (out wire.Digest) {
	d.mu.Lock()
	defer d.mu.Unlock()
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], uint64(d.size))
	h := xxh3.Hash128(b[:])
	lo, carry := bits.Add64(d.lo, h.Lo, 0)
	hi, _ := bits.Add64(d.hi, h.Hi, carry)
	binary.BigEndian.PutUint64(out[:8], hi)
	binary.BigEndian.PutUint64(out[8:], lo)
	return out
}

// stateHash returns the digest of a device state: its plain xxh3-128.
func stateHash(h *xxh3.Hasher128) wire.Digest { return wire.Digest(h.Sum128().Bytes()) }
