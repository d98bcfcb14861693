package ram

import (
	"math/bits"
	"sync/atomic"
	"time"
)

// histogram counts durations in buckets an eighth of an octave wide. It may be used concurrently.
type histogram struct {
	counts [64 * 8]atomic.Uint64
}

// bucket maps nanoseconds to a bucket: the octave, then the three bits below the highest one.
func bucket(ns uint64) int {
	if ns < 8 {
		return int(ns)
	}
	octave := bits.Len64(ns) - 1
	return (octave-2)*8 + int(ns>>(octave-3)&7)
}

// ceiling is the largest duration of a bucket, in nanoseconds.
func ceiling(b int) uint64 {
	if b < 8 {
		return uint64(b)
	}
	octave := b/8 + 2
	return (uint64(b%8)+9)<<(octave-3) - 1
}

func (h *histogram) add(d time.Duration) { h.counts[bucket(uint64(max(d, 0)))].Add(1) }

// quantiles returns, for each q (0 to 1, ascending), a duration that at least that share of all did not exceed; within
// 12.5 % of the exact one. All are 0 when nothing was counted.
func (h *histogram) quantiles(qs ...float64) []time.Duration {
	var counts [len(h.counts)]uint64
	var total uint64
	for i := range h.counts {
		counts[i] = h.counts[i].Load()
		total += counts[i]
	}
	out := make([]time.Duration, len(qs))
	if total == 0 {
		return out
	}
	var sum uint64
	i := 0
	for b, n := range counts {
		sum += n
		for i < len(qs) && n > 0 && float64(sum) >= qs[i]*float64(total) {
			out[i] = time.Duration(ceiling(b))
			i++
		}
	}
	return out
}
