package block

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"

	"github.com/zeebo/xxh3"
)

// PageSum is a sum over the pages of a device from which its digest is made. Pages are added in any order, can be taken out
// again when they change, and sums of parts are added up: a digest can be kept up to date, or be worked out in parallel.
// The zero value is the sum of a device of zeros.
//
// The sum is Σ XXH3-128(i ‖ XXH3-128(page i)) modulo 2^128, over the pages that hold something else than zeros. i counts
// from 0 and is 8 bytes, little endian; hashes are 16 bytes in their canonical, big-endian form. It detects
// accidents: who wants two devices of the same sum can make them.
type PageSum struct {
	hi, lo uint64
}

// Add adds the page at offset off, which is a multiple of PageSize. page is PageSize bytes, or fewer at the end of the
// device.
func (s *PageSum) Add(off int64, page []byte) {
	if !IsZero(page) {
		s.add(pageTerm(off, page))
	}
}

// Remove takes out a page that was added.
func (s *PageSum) Remove(off int64, page []byte) {
	if !IsZero(page) {
		t := pageTerm(off, page)
		s.add(PageSum{^t.hi, ^t.lo})
		s.add(PageSum{0, 1})
	}
}

// Join adds the sum of other pages.
func (s *PageSum) Join(other PageSum) { s.add(other) }

func (s *PageSum) add(t PageSum) {
	lo := s.lo + t.lo
	s.hi += t.hi
	if lo < s.lo {
		s.hi++
	}
	s.lo = lo
}

func pageTerm(off int64, page []byte) PageSum {
	var b [24]byte
	binary.LittleEndian.PutUint64(b[:], uint64(off/PageSize))
	h := xxh3.Hash128(page).Bytes()
	copy(b[8:], h[:])
	t := xxh3.Hash128(b[:])
	return PageSum{t.Hi, t.Lo}
}

// Digest is the digest of a device of size bytes whose pages have this sum: the sum plus XXH3-128 of the size (8 bytes,
// little endian), 16 bytes big endian.
func (s *PageSum) Digest(size int64) [16]byte {
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], uint64(size))
	h := xxh3.Hash128(b[:])
	sum := *s
	sum.add(PageSum{h.Hi, h.Lo})
	var d [16]byte
	binary.BigEndian.PutUint64(d[:], sum.hi)
	binary.BigEndian.PutUint64(d[8:], sum.lo)
	return d
}

// Digest reads all of d and returns its digest, as [PageSum] defines it. Devices of the same size and contents have the
// same digest, however their holes lie. Holes cost nothing.
func Digest(ctx context.Context, d Device) ([16]byte, error) {
	var sum PageSum
	buffer := make([]byte, copyBufferSize)
	err := eachPiece(ctx, d, copyBufferSize, func(r Range) error {
		p := buffer[:r.Length]
		if err := readFull(d, p, r.Offset); err != nil {
			return err
		}
		for at := 0; at < len(p); at += PageSize {
			sum.Add(r.Offset+int64(at), p[at:min(at+PageSize, len(p))])
		}
		return nil
	})
	if err != nil {
		return [16]byte{}, fmt.Errorf("digest: %w", err)
	}
	return sum.Digest(d.Size()), nil
}

// readFull fills p from d. An end of the device at the end of p is no error.
func readFull(d Device, p []byte, off int64) error {
	n, err := d.ReadAt(p, off)
	if n == len(p) && err == io.EOF {
		return nil
	}
	if err == nil && n < len(p) {
		err = io.ErrUnexpectedEOF
	}
	return err
}

// eachPiece calls f with ranges of up to size bytes that together cover all that may be data in d. They ascend, do not
// overlap, and are aligned to size but for the end of the device; so f sees a page once, and whole.
func eachPiece(ctx context.Context, d Device, size int64, f func(Range) error) error {
	for off := int64(0); off < d.Size(); {
		if err := ctx.Err(); err != nil {
			return err
		}
		data, err := NextData(d, off)
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		start := max(off, data.Offset/size*size)
		r := Range{Offset: start, Length: min(size, d.Size()-start)}
		if err := f(r); err != nil {
			return err
		}
		off = r.End()
	}
	return nil
}
