package democlient

import (
	"slices"
	"sync"
	"time"
)

// timeline is when a server gave signs of life.
type timeline struct {
	start time.Time

	mu    sync.Mutex // guards what follows
	marks []int64    // nanoseconds since start, ascending
	end   int64      // when the client was stopped; 0: it runs
}

func (t *timeline) mark() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.marks = append(t.marks, int64(time.Since(t.start)))
}

// stop says that no signs are to be expected from now on.
func (t *timeline) stop() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.end = int64(time.Since(t.start))
}

func (t *timeline) count() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.marks)
}

// countBetween is the number of marks in [from, to).
func (t *timeline) countBetween(from, to time.Time) int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return max(0, t.index(to)-t.index(from))
}

// index is that of the first mark at or after at. mu must be held.
func (t *timeline) index(at time.Time) int {
	i, _ := slices.BinarySearch(t.marks, int64(at.Sub(t.start)))
	return i
}

// gapBetween is the longest time without a mark that overlaps [from, to], in its whole length, even if it began before or
// ended after. A gap that lasts is counted up to now.
func (t *timeline) gapBetween(from, to time.Time) time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	last := int64(0) // the start counts as a sign
	first := t.index(from)
	if first > 0 {
		last = t.marks[first-1]
	}
	longest := int64(0)
	for _, m := range t.marks[first:] {
		if last >= int64(to.Sub(t.start)) {
			return time.Duration(longest)
		}
		longest = max(longest, m-last)
		last = m
	}
	if last < int64(to.Sub(t.start)) {
		end := t.end
		if end == 0 {
			end = int64(time.Since(t.start))
		}
		longest = max(longest, end-last)
	}
	return time.Duration(longest)
}
