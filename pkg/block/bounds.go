package block

import (
	"bytes"
	"fmt"
	"io"
	"os"
)

// checkRange fails unless [off, off+n) lies within a device of size bytes.
func checkRange(verb, name string, off, n, size int64) error {
	if off < 0 || n < 0 || n > size || off > size-n {
		return fmt.Errorf("%s %q: %d bytes at offset %d are not within its %d bytes: %w", verb, name, n, off, size, os.ErrInvalid)
	}
	return nil
}

// clipRead returns the part of p that a read at off can fill on a device of size bytes, and io.EOF when that is not all
// of it.
func clipRead(name string, p []byte, off, size int64) ([]byte, error) {
	switch {
	case off < 0:
		return nil, fmt.Errorf("read %q: offset %d is negative: %w", name, off, os.ErrInvalid)
	case len(p) == 0:
		return nil, nil
	case off >= size:
		return nil, io.EOF
	case int64(len(p)) > size-off:
		return p[:size-off], io.EOF
	}
	return p, nil
}

// errClosed is what the methods of a device return after Close.
func errClosed(verb, name string) error {
	return fmt.Errorf("%s %q: %w", verb, name, os.ErrClosed)
}

// zeros is never written. It is what holes are compared with and filled from.
var zeros [64 << 10]byte

// IsZero reports whether p holds only zeros. It costs about as much as reading p, and less if p does not.
func IsZero(p []byte) bool {
	for len(p) > len(zeros) {
		if !bytes.Equal(p[:len(zeros)], zeros[:]) {
			return false
		}
		p = p[len(zeros):]
	}
	return bytes.Equal(p, zeros[:len(p)])
}

// NextData returns the first range at or after off of d that may hold non-zero bytes, and io.EOF when there is none. For
// a device that does not implement [Extents] that is everything from off on.
func NextData(d Device, off int64) (Range, error) {
	if e, ok := d.(Extents); ok {
		return e.NextData(off)
	}
	return restOf(d.Size(), off)
}

// nextDataOfAny is where one of some devices of a size may hold something, at or after off; their size when none does.
func nextDataOfAny(off int64, devices ...Device) (int64, error) {
	next := devices[0].Size()
	for _, d := range devices {
		data, err := NextData(d, off)
		if err == nil {
			next = min(next, data.Offset)
		} else if err != io.EOF {
			return 0, err
		}
	}
	return next, nil
}

// restOf is the range from off to the end of a device of size bytes.
func restOf(size, off int64) (Range, error) {
	if off < 0 {
		return Range{}, fmt.Errorf("find data: offset %d is negative: %w", off, os.ErrInvalid)
	}
	if off >= size {
		return Range{}, io.EOF
	}
	return Range{Offset: off, Length: size - off}, nil
}
