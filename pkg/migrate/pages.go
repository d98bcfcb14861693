package migrate

import (
	"math/bits"
	"sync/atomic"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/wire"
)

// pageSet is a set of pages of one device. All methods may be called concurrently; each page has its own truth, and only
// one caller takes it.
type pageSet struct {
	size  int64 // of the device, bytes
	pages int64
	words []atomic.Uint64
	count atomic.Int64 // how many pages are in
	top   int64        // where read goes on
}

func newPageSet(size int64) *pageSet {
	pages := (size + block.PageSize - 1) / block.PageSize
	return &pageSet{size: size, pages: pages, words: make([]atomic.Uint64, (pages+63)/64)}
}

// newPageSetOf is the set of the pages of a list.
func newPageSetOf(size int64, list []block.Range) *pageSet {
	s := newPageSet(size)
	for _, r := range list {
		s.each(r, func(page int64) { s.put(page) })
	}
	return s
}

// each calls f for the pages that r touches.
func (s *pageSet) each(r block.Range, f func(page int64)) {
	for page, end := r.Offset/block.PageSize, min(s.pages, (r.End()+block.PageSize-1)/block.PageSize); page < end; page++ {
		f(page)
	}
}

func (s *pageSet) has(page int64) bool { return s.words[page/64].Load()&(1<<(page%64)) != 0 }

// put adds a page, and reports whether it was not in.
func (s *pageSet) put(page int64) bool {
	bit := uint64(1) << (page % 64)
	if s.words[page/64].Or(bit)&bit != 0 {
		return false
	}
	s.count.Add(1)
	return true
}

// take removes a page, and reports whether it was in.
func (s *pageSet) take(page int64) bool {
	bit := uint64(1) << (page % 64)
	if s.words[page/64].And(^bit)&bit == 0 {
		return false
	}
	s.count.Add(-1)
	return true
}

// takeRuns removes the pages of r, and passes them on as ranges until f fails.
func (s *pageSet) takeRuns(r block.Range, f func(block.Range) error) error {
	var run block.Range
	end := min(s.pages, (r.End()+block.PageSize-1)/block.PageSize)
	for page := s.next(r.Offset / block.PageSize); page < end; page = s.next(page + 1) {
		if !s.take(page) {
			continue // somebody was faster
		}
		p := s.rangeOf(page, 1)
		if run.Length > 0 && run.End() == p.Offset {
			run.Length += p.Length
			continue
		}
		if run.Length > 0 {
			if err := f(run); err != nil {
				return err
			}
		}
		run = p
	}
	if run.Length > 0 {
		return f(run)
	}
	return nil
}

// next returns the first page of the set that is not before page; the number of pages when there is none.
func (s *pageSet) next(page int64) int64 {
	for i := page / 64; i < int64(len(s.words)); i++ {
		w := s.words[i].Load()
		if i == page/64 {
			w &= ^uint64(0) << (page % 64)
		}
		if w != 0 {
			return i*64 + int64(bits.TrailingZeros64(w))
		}
	}
	return s.pages
}

// rangeOf is the bytes of n pages.
func (s *pageSet) rangeOf(page, n int64) block.Range {
	off := page * block.PageSize
	return block.Range{Offset: off, Length: min(s.size, off+n*block.PageSize) - off}
}

// runs lists the set.
func (s *pageSet) runs() (out []wire.Run) {
	for page := s.next(0); page < s.pages; page = s.next(page + 1) {
		if n := len(out); n > 0 && out[n-1].Page+out[n-1].Pages == page {
			out[n-1].Pages++
		} else {
			out = append(out, wire.Run{Page: page, Pages: 1})
		}
	}
	return out
}

// ranges lists the set.
func (s *pageSet) ranges() (out []block.Range) {
	for _, r := range s.runs() {
		out = append(out, s.rangeOf(r.Page, r.Pages))
	}
	return out
}

// runsOf is a list of ranges in pages.
func runsOf(list []block.Range) []wire.Run {
	out := make([]wire.Run, len(list))
	for i, r := range list {
		out[i] = wire.Run{Page: r.Offset / block.PageSize, Pages: (r.Length + block.PageSize - 1) / block.PageSize}
	}
	return out
}
