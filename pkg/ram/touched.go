package ram

import "github.com/drafter-vm/drafter/pkg/block"

// bringFirst brings what is known to be touched. What cannot be read is left to whoever touches it, who will report that.
func (f *Filler) bringFirst() {
	buf := make([]byte, min(f.opts.Chunk, longest(f.opts.First)))
	for _, r := range f.opts.First {
		for lo, end := r.Offset/pageSize, r.End()/pageSize; lo < end && f.ctx.Err() == nil; {
			hi := min(lo+int64(len(buf))/pageSize, end)
			if first := f.present.next(lo, hi, false); first < hi {
				data := buf[:(hi-first)*pageSize]
				if n, _ := f.src.ReadAt(data, first*pageSize); n == len(data) {
					f.putWhole(first, data)
				}
			}
			lo = hi
		}
	}
}

func longest(ranges []block.Range) (n int64) {
	for _, r := range ranges {
		n = max(n, r.Length)
	}
	return n
}

// putWhole is put of pages that are to be in the memfd, zeros too.
func (f *Filler) putWhole(page int64, data []byte) {
	f.claimed.claim(page, page+int64(len(data))/pageSize, func(lo, hi int64) {
		for ; lo < hi; lo += storeMax {
			end := min(lo+storeMax, hi)
			part := data[(lo-page)*pageSize : (end-page)*pageSize]
			if err := f.write(lo, part, false); err != nil {
				f.claimed.remove(lo, hi) // somebody who touches it will have the same trouble, and say so
				return
			}
			f.fillBytes.Add(uint64(len(part)))
			f.arrived(lo, end, false)
		}
	})
}

// note puts a page that is touched on record, once.
func (f *Filler) note(page int64) {
	f.noted.claim(page, page+1, func(int64, int64) {
		f.mu.Lock()
		defer f.mu.Unlock()
		if f.recording.Load() {
			f.touched = append(f.touched, page*pageSize)
		}
	})
}

// Touched ends what FillOptions.Record began: the filling goes on as without it. It returns the offsets of the pages that were touched until then, in
// that order, and the same if it is called again.
func (f *Filler) Touched() []int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.recording.Swap(false) {
		close(f.recorded)
	}
	return f.touched
}
