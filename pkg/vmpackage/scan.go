package vmpackage

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/zeebo/xxh3"
	"golang.org/x/sys/unix"
)

const (
	// blockSize is the granularity in which zeros are left out, aligned to the start of the device.
	blockSize = 4096
	// chunkSize is how much is read, hashed and written at once; a multiple of blockSize.
	chunkSize = 1 << 20
)

// zeros is what runs of zeros are hashed from and compared with.
var zeros [chunkSize]byte

// extent is a range of a device that holds data. It starts at a multiple of blockSize and ends at one or at the end of
// the device.
type extent struct{ offset, length int64 }

// content is what scan finds in a device.
type content struct {
	sha256  string   // of everything, in hex
	xxh3    uint64   // of the data in extents, to notice when it changes before it is packed
	extents []extent // blocks that are not all zeros, ascending, merged where they touch
	data    int64    // bytes in extents
}

// scan reads a device of size bytes once. Holes of the file cost only the hashing of their zeros. progress is called
// with the number of bytes that were dealt with since the last call.
func scan(ctx context.Context, f *os.File, size int64, progress func(int64)) (content, error) {
	var c content
	quick := xxh3.New()
	sum := startDigest()
	defer sum.stop()

	for off := int64(0); off < size; {
		if err := ctx.Err(); err != nil {
			return c, err
		}
		data, err := nextData(f, off, size)
		if err != nil {
			return c, err
		}
		if data > off {
			n := min(data-off, 16*chunkSize) // small enough for cancellation and progress
			sum.zeros(n)
			off += n
			progress(n)
			continue
		}
		// Reading on past the end of a data range is harmless: what follows is a hole, and reads as zeros.
		buf := sum.buffer()
		n := int(min(size-off, chunkSize))
		if err := readFull(f, buf[:n], off); err != nil {
			return c, err
		}
		for e := range dataExtents(buf[:n], off) {
			quick.Write(buf[e.offset-off:][:e.length])
			c.data += e.length
			if last := len(c.extents) - 1; last >= 0 && c.extents[last].offset+c.extents[last].length == e.offset {
				c.extents[last].length += e.length
			} else {
				c.extents = append(c.extents, e)
			}
		}
		sum.data(buf, n)
		off += int64(n)
		progress(int64(n))
	}
	c.sha256, c.xxh3 = sum.sum(), quick.Sum64()
	return c, nil
}

// dataExtents yields the runs of blocks of b that are not all zeros, as extents of a device in which b is at offset
// base.
func dataExtents(b []byte, base int64) func(yield func(extent) bool) {
	return func(yield func(extent) bool) {
		start := -1
		for i := 0; i < len(b); i += blockSize {
			block := b[i:min(i+blockSize, len(b))]
			switch isZero := bytes.Equal(block, zeros[:len(block)]); {
			case !isZero && start < 0:
				start = i
			case isZero && start >= 0:
				if !yield(extent{base + int64(start), int64(i - start)}) {
					return
				}
				start = -1
			}
		}
		if start >= 0 {
			yield(extent{base + int64(start), int64(len(b) - start)})
		}
	}
}

// nextData returns the offset, rounded down to a block, of the first byte at or after off that is not in a hole of f, or
// size if there is none. File systems without holes report data everywhere.
func nextData(f *os.File, off, size int64) (int64, error) {
	data, err := f.Seek(off, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO):
		return size, nil
	case errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP):
		return off, nil
	case err != nil:
		return 0, err
	}
	return max(off, min(data, size)/blockSize*blockSize), nil
}

// readFull reads len(b) bytes at off. A file that ends before was cut since its size was taken.
func readFull(f *os.File, b []byte, off int64) error {
	n, err := f.ReadAt(b, off)
	if n == len(b) {
		return nil
	}
	if err == io.EOF {
		return fmt.Errorf("%q ends at byte %d, before its size: it was cut meanwhile", f.Name(), off+int64(n))
	}
	return err
}

// digest computes a SHA-256 in a goroutine of its own, so that reading, writing and compressing go on meanwhile. It is
// used by one goroutine, which calls stop in the end.
type digest struct {
	work   chan piece
	free   chan []byte   // buffers of chunkSize bytes; nil stands for one not yet allocated
	result chan [32]byte // the goroutine's end
	ended  bool          // work was closed and result received
}

// piece is data in a buffer that goes back to free, or, without buffer, a run of zeros.
type piece struct {
	buf []byte
	n   int64
}

func startDigest() *digest {
	const buffers = 4
	d := &digest{work: make(chan piece, buffers), free: make(chan []byte, buffers), result: make(chan [32]byte, 1)}
	for range buffers {
		d.free <- nil
	}
	go func() {
		h := sha256.New()
		for p := range d.work {
			if p.buf != nil {
				h.Write(p.buf[:p.n])
				d.free <- p.buf
				continue
			}
			for n := p.n; n > 0; {
				step := min(n, int64(len(zeros)))
				h.Write(zeros[:step])
				n -= step
			}
		}
		var sum [32]byte
		h.Sum(sum[:0])
		d.result <- sum
	}()
	return d
}

// buffer returns a buffer of chunkSize bytes, to be handed to data. It waits while all buffers are being hashed.
func (d *digest) buffer() []byte {
	buf := <-d.free
	if buf == nil {
		buf = make([]byte, chunkSize)
	}
	return buf
}

// data adds the first n bytes of a buffer from buffer, which the caller may go on reading only until its next call of
// buffer.
func (d *digest) data(buf []byte, n int) { d.work <- piece{buf, int64(n)} }

// zeros adds n bytes of zeros.
func (d *digest) zeros(n int64) { d.work <- piece{nil, n} }

// sum ends the digest and returns it in hex.
func (d *digest) sum() string {
	close(d.work)
	d.ended = true
	sum := <-d.result
	return hex.EncodeToString(sum[:])
}

// stop ends the goroutine, if sum has not.
func (d *digest) stop() {
	if !d.ended {
		d.sum()
	}
}
