package block

import (
	"math/bits"
	"sync/atomic"
)

// bitmap is a fixed set of bits that any number of goroutines set, test and take.
type bitmap []atomic.Uint64

func newBitmap(n int64) bitmap { return make(bitmap, (n+63)/64) }

// maskFrom has the bits i%64 and above, maskTo those up to and including i%64.
func maskFrom(i int64) uint64 { return ^uint64(0) << uint(i%64) }
func maskTo(i int64) uint64   { return ^uint64(0) >> uint(63-i%64) }

// eachWord calls f with each word that holds bits of [first, last] and the mask of those, until f returns false.
func eachWord(first, last int64, f func(word int64, mask uint64) bool) bool {
	for w := first / 64; w <= last/64; w++ {
		mask := ^uint64(0)
		if w == first/64 {
			mask &= maskFrom(first)
		}
		if w == last/64 {
			mask &= maskTo(last)
		}
		if !f(w, mask) {
			return false
		}
	}
	return true
}

// set sets the bits [first, last].
func (b bitmap) set(first, last int64) {
	eachWord(first, last, func(w int64, mask uint64) bool {
		// Most bits are set again and again: looking first leaves the cache line shared. Everything here is
		// sequentially consistent, so a bit seen set is taken by a later take, not by an earlier one.
		if b[w].Load()&mask != mask {
			b[w].Or(mask)
		}
		return true
	})
}

// all reports whether each of [first, last] is set.
func (b bitmap) all(first, last int64) bool {
	return eachWord(first, last, func(w int64, mask uint64) bool { return b[w].Load()&mask == mask })
}

func (b bitmap) get(i int64) bool { return b[i/64].Load()&(1<<uint(i%64)) != 0 }

// next returns the first bit at or after i that is set (or that is clear), and before n, or n.
func (b bitmap) next(i, n int64, set bool) int64 {
	for i < n {
		word := b[i/64].Load()
		if !set {
			word = ^word
		}
		if word &= maskFrom(i); word != 0 {
			return min(n, i/64*64+int64(bits.TrailingZeros64(word)))
		}
		i = (i/64 + 1) * 64
	}
	return n
}

// take clears all bits and calls f with each run of bits that were set, in ascending order. Each bit is taken in one
// atomic step.
func (b bitmap) take(f func(first, last int64)) {
	start := int64(-1) // of the run that is open
	for w := range b {
		base := int64(w) * 64
		var word uint64
		if b[w].Load() != 0 {
			word = b[w].Swap(0)
		}
		for i := int64(0); i < 64; {
			if start < 0 {
				rest := word & maskFrom(i)
				if rest == 0 {
					break
				}
				i = int64(bits.TrailingZeros64(rest))
				start = base + i
			}
			rest := ^word & maskFrom(i)
			if rest == 0 {
				break // goes on in the next word
			}
			i = int64(bits.TrailingZeros64(rest))
			f(start, base+i-1)
			start = -1
		}
	}
	if start >= 0 {
		f(start, int64(len(b))*64-1)
	}
}
