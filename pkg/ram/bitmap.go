package ram

import (
	"math/bits"
	"sync/atomic"
)

// bitmap is a set of page numbers below a fixed limit. All methods may be called concurrently; one on a range is atomic
// per 64 pages only.
type bitmap struct {
	words []atomic.Uint64
	limit int64
}

func newBitmap(limit int64) *bitmap {
	return &bitmap{words: make([]atomic.Uint64, (limit+63)/64), limit: limit}
}

// mask has the bits of word w that lie in [lo, hi).
func mask(w, lo, hi int64) uint64 {
	m := ^uint64(0)
	if base := w * 64; lo > base {
		m &= ^uint64(0) << (lo - base)
	}
	if top := (w + 1) * 64; hi < top {
		m &= ^uint64(0) >> (top - hi)
	}
	return m
}

func (b *bitmap) has(i int64) bool { return b.words[i/64].Load()&(1<<(i%64)) != 0 }

// hasAll reports whether all of [lo, hi) is in the set.
func (b *bitmap) hasAll(lo, hi int64) bool { return lo >= hi || b.next(lo, hi, false) >= hi }

func (b *bitmap) add(lo, hi int64) {
	for w := lo / 64; w*64 < hi; w++ {
		b.words[w].Or(mask(w, lo, hi))
	}
}

func (b *bitmap) remove(lo, hi int64) {
	for w := lo / 64; w*64 < hi; w++ {
		b.words[w].And(^mask(w, lo, hi))
	}
}

// claim adds what of [lo, hi) is not yet in the set, and calls won with each run that this call, and no other, added.
func (b *bitmap) claim(lo, hi int64, won func(lo, hi int64)) {
	start := int64(-1) // of the run that is open
	end := int64(-1)
	for w := lo / 64; w*64 < hi; w++ {
		m := mask(w, lo, hi)
		got := m &^ b.words[w].Or(m)
		eachRun(got, w*64, func(l, h int64) {
			if l != end {
				if start >= 0 {
					won(start, end)
				}
				start = l
			}
			end = h
		})
	}
	if start >= 0 {
		won(start, end)
	}
}

// drain removes everything, calling found with each run that was there, in ascending order; runs that cross a word are
// told in pieces that touch.
func (b *bitmap) drain(found func(lo, hi int64)) {
	for w := range b.words {
		if b.words[w].Load() != 0 {
			eachRun(b.words[w].Swap(0), int64(w)*64, found)
		}
	}
}

// next returns the first page of [lo, hi) whose membership is want, or hi.
func (b *bitmap) next(lo, hi int64, want bool) int64 {
	for w := lo / 64; w*64 < hi; w++ {
		v := b.words[w].Load()
		if !want {
			v = ^v
		}
		if v &= mask(w, lo, hi); v != 0 {
			return w*64 + int64(bits.TrailingZeros64(v))
		}
	}
	return hi
}

// count is the number of members of [lo, hi).
func (b *bitmap) count(lo, hi int64) int64 {
	var n int64
	for w := lo / 64; w*64 < hi; w++ {
		n += int64(bits.OnesCount64(b.words[w].Load() & mask(w, lo, hi)))
	}
	return n
}

// eachRun calls f with each run of ones of v, whose lowest bit is page base.
func eachRun(v uint64, base int64, f func(lo, hi int64)) {
	for i := 0; v>>i != 0; {
		i += bits.TrailingZeros64(v >> i)
		n := bits.TrailingZeros64(^(v >> i))
		f(base+int64(i), base+int64(i+n))
		if i += n; i >= 64 {
			return
		}
	}
}
