package block

import "sync"

// stripeCount is how many locks the blocks of a device share. Block i belongs to lock i%stripeCount.
const stripeCount = 64

// stripes locks ranges of blocks. Whoever locks takes the stripes of its range in ascending order, so that no two can
// wait for each other, and holds one range at a time.
type stripes [stripeCount]struct {
	sync.RWMutex
	_ [40]byte // a cache line each
}

// each calls f with the stripes of the blocks [first, last] in ascending order.
func (s *stripes) each(first, last int64, f func(*sync.RWMutex)) {
	from, to := first%stripeCount, last%stripeCount
	whole := last-first >= stripeCount-1
	for i := range int64(stripeCount) {
		if whole || (from <= to && from <= i && i <= to) || (from > to && (i <= to || from <= i)) {
			f(&s[i].RWMutex)
		}
	}
}

func (s *stripes) lock(first, last int64) {
	if first == last {
		s[first%stripeCount].Lock()
		return
	}
	s.each(first, last, (*sync.RWMutex).Lock)
}

func (s *stripes) unlock(first, last int64) {
	if first == last {
		s[first%stripeCount].Unlock()
		return
	}
	s.each(first, last, (*sync.RWMutex).Unlock)
}

func (s *stripes) rlock(first, last int64) {
	if first == last {
		s[first%stripeCount].RLock()
		return
	}
	s.each(first, last, (*sync.RWMutex).RLock)
}

func (s *stripes) runlock(first, last int64) {
	if first == last {
		s[first%stripeCount].RUnlock()
		return
	}
	s.each(first, last, (*sync.RWMutex).RUnlock)
}
