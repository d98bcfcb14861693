package migrate

import "github.com/drafter-vm/drafter/pkg/block"

// Lists of ranges here are what a block.Tracker returns: ascending, without overlaps.

// union returns the list that covers what a or b covers, with touching ranges joined.
func union(a, b []block.Range) []block.Range {
	if len(a) == 0 {
		return b
	}
	if len(b) == 0 {
		return a
	}
	out := make([]block.Range, 0, len(a)+len(b))
	for len(a) > 0 || len(b) > 0 {
		var r block.Range
		if len(b) == 0 || len(a) > 0 && a[0].Offset <= b[0].Offset {
			r, a = a[0], a[1:]
		} else {
			r, b = b[0], b[1:]
		}
		if n := len(out); n > 0 && r.Offset <= out[n-1].End() {
			out[n-1].Length = max(out[n-1].End(), r.End()) - out[n-1].Offset
		} else {
			out = append(out, r)
		}
	}
	return out
}

// split cuts a at the borders of b and returns what lies outside b, then what lies inside, each ascending.
func split(a, b []block.Range) (outside, inside []block.Range) {
	for _, r := range a {
		for r.Length > 0 {
			for len(b) > 0 && b[0].End() <= r.Offset {
				b = b[1:]
			}
			if len(b) == 0 || b[0].Offset >= r.End() {
				outside = append(outside, r)
				break
			}
			if n := b[0].Offset - r.Offset; n > 0 {
				outside = append(outside, block.Range{Offset: r.Offset, Length: n})
				r = block.Range{Offset: r.Offset + n, Length: r.Length - n}
			}
			n := min(r.End(), b[0].End()) - r.Offset
			inside = append(inside, block.Range{Offset: r.Offset, Length: n})
			r = block.Range{Offset: r.Offset + n, Length: r.Length - n}
		}
	}
	return outside, inside
}

// measure counts the bytes of a list, and the blocks of the given size that it touches.
func measure(list []block.Range, blockSize int64) Dirty {
	var d Dirty
	last := int64(-1) // the last block counted
	for _, r := range list {
		d.Bytes += r.Length
		from, to := r.Offset/blockSize, (r.End()-1)/blockSize
		from = max(from, last+1)
		if to >= from {
			d.Blocks += to - from + 1
			last = to
		}
	}
	return d
}

// aligned widens r to whole pages of a device of the given size.
func aligned(r block.Range, size int64) block.Range {
	from := r.Offset &^ (block.PageSize - 1)
	to := min(size, (r.End()+block.PageSize-1)&^(block.PageSize-1))
	return block.Range{Offset: from, Length: to - from}
}

// normalize widens every range of a list to whole pages of a device of the given size and joins those that then touch.
func normalize(list []block.Range, size int64) []block.Range {
	out := make([]block.Range, 0, len(list))
	for _, r := range list {
		r = aligned(r, size)
		if r.Length <= 0 {
			continue
		}
		if n := len(out); n > 0 && r.Offset <= out[n-1].End() {
			out[n-1].Length = max(out[n-1].End(), r.End()) - out[n-1].Offset
		} else {
			out = append(out, r)
		}
	}
	return out
}
