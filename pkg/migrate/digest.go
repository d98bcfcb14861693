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

	// shared says that the other side's device has all that is noted here: what is noted as it was need not be sent.
	shared atomic.Bool

	mu    sync.Mutex // guards terms
	terms termSum    // of all pages
}

// pageKind is what a page has become since it was last noted.
type pageKind uint8

const (
	pageData pageKind = iota // data
	pageZero                 // zeros
	pageSame                 // what it was before, in a digest that the other side shares
)

// termSum is a part of a digest's sum.
type termSum xxh3.Uint128

func (s *termSum) replace(old, by xxh3.Uint128) {
	var borrow, carry uint64
	s.Lo, borrow = bits.Sub64(s.Lo, old.Lo, 0)
	s.Hi, _ = bits.Sub64(s.Hi, old.Hi, borrow)
	s.Lo, carry = bits.Add64(s.Lo, by.Lo, 0)
	s.Hi, _ = bits.Add64(s.Hi, by.Hi, carry)
}

// The table is a tree, of which there is what leads to pages that hold data: a chunk has leaves, a leaf has terms. A page that
// lies alone, as a hostile source may send them, costs as much as it has itself, and 16 bytes where it has neighbours.
const (
	leafPages  = 256
	chunkPages = 16 * leafPages
)

type (
	chunk [chunkPages / leafPages]atomic.Pointer[leaf]
	leaf  [leafPages]pageTerm
)

// pageTerm holds its halves in atomics only because a peer may break the rules; see above.
type pageTerm struct{ lo, hi atomic.Uint64 }

func newDigest(size int64) *digest {
	const span = chunkPages * block.PageSize
	return &digest{size: size, chunks: make([]atomic.Pointer[chunk], (size+span-1)/span)}
}

// write notes that data, which begins at a page's start, is now the content at off.
func (d *digest) write(off int64, data []byte) {
	var sum termSum
	for len(data) > 0 {
		n := min(len(data), block.PageSize)
		d.note(off, data[:n], &sum)
		data, off = data[n:], off+int64(n)
	}
	d.add(sum)
}

// note notes that a page is now the content at off, and says what it has become. What that changes in the digest's sum is
// added to sum, for the caller to add.
func (d *digest) note(off int64, data []byte, sum *termSum) pageKind {
	page := off / block.PageSize
	kind := pageZero
	var old, h xxh3.Uint128
	if !block.IsZero(data) {
		kind, h = pageData, termOf(page, data)
	}
	e := d.term(page)
	if e == nil && kind != pageZero {
		e = d.grow(page)
	}
	if e != nil {
		old = xxh3.Uint128{Lo: e.lo.Swap(h.Lo), Hi: e.hi.Swap(h.Hi)}
		sum.replace(old, h)
	}
	if old == h && d.shared.Load() {
		return pageSame
	}
	return kind
}

// zero notes that the n bytes at off, which is a page's start, are zeros now.
func (d *digest) zero(off, n int64) {
	var sum termSum
	d.each(off, n, func(e *pageTerm) bool {
		sum.replace(xxh3.Uint128{Lo: e.lo.Swap(0), Hi: e.hi.Swap(0)}, xxh3.Uint128{})
		return true
	})
	d.add(sum)
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
		c := d.chunks[page/chunkPages].Load()
		if c == nil {
			page = (page/chunkPages + 1) * chunkPages
			continue
		}
		next := min(end, (page/leafPages+1)*leafPages)
		if l := c[page%chunkPages/leafPages].Load(); l != nil {
			for ; page < next; page++ {
				if !f(&l[page%leafPages]) {
					return
				}
			}
		}
		page = next
	}
}

// nonZero passes on the runs of pages in the n bytes at off that are noted as data, until f fails.
func (d *digest) nonZero(off, n int64, f func(block.Range) error) error {
	var run block.Range
	for at := off; at < off+n; at += block.PageSize {
		size := min(block.PageSize, off+n-at)
		switch {
		case d.isZero(at, size):
		case run.Length > 0 && run.End() == at:
			run.Length += size
		default:
			if run.Length > 0 {
				if err := f(run); err != nil {
					return err
				}
			}
			run = block.Range{Offset: at, Length: size}
		}
	}
	if run.Length == 0 {
		return nil
	}
	return f(run)
}

// term is the entry of a page, nil if there is none.
func (d *digest) term(page int64) *pageTerm {
	c := d.chunks[page/chunkPages].Load()
	if c == nil {
		return nil
	}
	l := c[page%chunkPages/leafPages].Load()
	if l == nil {
		return nil
	}
	return &l[page%leafPages]
}

// grow is term that makes the entry.
func (d *digest) grow(page int64) *pageTerm {
	c := &d.chunks[page/chunkPages]
	if c.Load() == nil {
		c.CompareAndSwap(nil, new(chunk))
	}
	l := &c.Load()[page%chunkPages/leafPages]
	if l.Load() == nil {
		l.CompareAndSwap(nil, new(leaf))
	}
	return &l.Load()[page%leafPages]
}

func (d *digest) add(sum termSum) {
	if sum == (termSum{}) {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.terms.replace(xxh3.Uint128{}, xxh3.Uint128(sum))
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
	total := d.terms
	total.replace(xxh3.Uint128{}, h)
	binary.BigEndian.PutUint64(out[:8], total.Hi)
	binary.BigEndian.PutUint64(out[8:], total.Lo)
	return out
}

// stateHash returns the digest of a device state: its plain xxh3-128.
func stateHash(h *xxh3.Hasher128) wire.Digest { return wire.Digest(h.Sum128().Bytes()) }
