package blocktest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"sync"
	"testing"

	"github.com/drafter-vm/drafter/pkg/block"
)

// MinSize is the size in bytes a device must at least have to be tested. One that is no multiple of the page size, or of
// the block size of the device, finds more.
const MinSize = 300 << 10

// Option changes what Run expects.
type Option func(*options)

type options struct {
	content []byte
	reopen  func(t *testing.T, d block.Device) block.Device
}

// Content says what the device holds when it is made. Without it a device must be made of zeros.
func Content(p []byte) Option { return func(o *options) { o.content = p } }

// Reopen adds the tests of what outlives Close. f is called with a device that was closed, and opens it anew.
func Reopen(f func(t *testing.T, d block.Device) block.Device) Option {
	return func(o *options) { o.reopen = f }
}

// Run tests the devices that make returns, a new one at each call. The suite closes them. It keeps about twice the size
// of a device in memory.
func Run(t *testing.T, make func(t *testing.T) block.Device, opts ...Option) {
	var o options
	for _, opt := range opts {
		opt(&o)
	}
	open := func(t *testing.T) (block.Device, []byte) {
		t.Helper()
		d := make(t)
		t.Cleanup(func() {
			if err := d.Close(); err != nil {
				t.Errorf("Close: %v", err)
			}
		})
		if d.Size() < MinSize {
			t.Fatalf("the device has %d bytes: the suite needs at least %d", d.Size(), MinSize)
		}
		model := bytes.Clone(o.content)
		if model == nil {
			model = newBytes(d.Size())
		}
		if int64(len(model)) != d.Size() {
			t.Fatalf("Size is %d, the content given has %d bytes", d.Size(), len(model))
		}
		return d, model
	}
	for _, test := range []struct {
		name string
		run  func(t *testing.T, d block.Device, model []byte)
	}{
		{"FirstContent", checkContent},
		{"WriteRead", testWriteRead},
		{"EndOfDevice", testEndOfDevice},
		{"OutOfRange", testOutOfRange},
		{"EmptyRequests", testEmpty},
		{"Discard", testDiscard},
		{"Extents", testExtents},
		{"RandomOperations", testRandom},
		{"ConcurrentWriters", testConcurrentWriters},
		{"ConcurrentEverything", testConcurrentEverything},
		{"CloseWhileInUse", testCloseWhileInUse},
		{"Closed", testClosed},
	} {
		t.Run(test.name, func(t *testing.T) {
			d, model := open(t)
			test.run(t, d, model)
		})
	}
	if o.reopen != nil {
		t.Run("Reopen", func(t *testing.T) {
			d, model := open(t)
			testReopen(t, d, model, o.reopen)
		})
	}
}

func newBytes(n int64) []byte { return make([]byte, n) }

// random returns n bytes that are not zero, so that losing one shows.
func random(rng *rand.Rand, n int64) []byte {
	p := make([]byte, (n+7)/8*8)
	for i := 0; i < len(p); i += 8 {
		binary.LittleEndian.PutUint64(p[i:], rng.Uint64()|0x0101010101010101)
	}
	return p[:n]
}

func newRand(seed uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, 0x9e3779b97f4a7c15)) }

func mustWrite(t *testing.T, d block.Device, model, p []byte, off int64) {
	t.Helper()
	if n, err := d.WriteAt(p, off); err != nil || n != len(p) {
		t.Fatalf("WriteAt(%d bytes, %d) = %d, %v", len(p), off, n, err)
	}
	copy(model[off:], p)
}

func mustDiscard(t *testing.T, d block.Device, model []byte, off, n int64) {
	t.Helper()
	if err := d.Discard(off, n); err != nil {
		t.Fatalf("Discard(%d, %d): %v", off, n, err)
	}
	clear(model[off : off+n])
}

func checkRead(t *testing.T, d block.Device, model []byte, off, n int64) {
	t.Helper()
	p := bytes.Repeat([]byte{0xaa}, int(n))
	got, err := d.ReadAt(p, off)
	if int64(got) != n || (err != nil && !(err == io.EOF && off+n == d.Size())) {
		t.Fatalf("ReadAt(%d bytes, %d) = %d, %v", n, off, got, err)
	}
	if !bytes.Equal(p, model[off:off+n]) {
		t.Fatalf("ReadAt(%d bytes, %d): %s", n, off, difference(p, model[off:off+n], off))
	}
}

func difference(got, want []byte, off int64) string {
	for i := range got {
		if got[i] != want[i] {
			return fmt.Sprintf("the byte at %d is %#02x, want %#02x", off+int64(i), got[i], want[i])
		}
	}
	return "no difference"
}

// checkContent reads all of d, and compares it with the model.
func checkContent(t *testing.T, d block.Device, model []byte) {
	t.Helper()
	const piece = 100_000 // aligned to nothing
	for off := int64(0); off < d.Size(); off += piece {
		checkRead(t, d, model, off, min(piece, d.Size()-off))
	}
}

func testWriteRead(t *testing.T, d block.Device, model []byte) {
	rng := newRand(1)
	size := d.Size()
	for _, at := range []block.Range{
		{Offset: 0, Length: 1}, {Offset: 1, Length: 1}, {Offset: 511, Length: 2}, {Offset: 4096, Length: 4096}, {Offset: 8191, Length: 2},
		{Offset: 12287, Length: 4098}, {Offset: 65536, Length: 65536}, {Offset: 65535, Length: 65538}, {Offset: 131071, Length: 131073},
		{Offset: size - 1, Length: 1}, {Offset: size - 5000, Length: 5000}, {Offset: 3, Length: size - 7}, {Offset: 0, Length: size},
	} {
		p := random(rng, at.Length)
		keep := bytes.Clone(p)
		mustWrite(t, d, model, p, at.Offset)
		if !bytes.Equal(p, keep) {
			t.Fatalf("WriteAt(%d bytes, %d) changed its argument", len(p), at.Offset)
		}
		from, to := max(0, at.Offset-70000), min(size, at.End()+70000)
		checkRead(t, d, model, from, to-from)
	}
	if err := d.Flush(); err != nil {
		t.Fatalf("Flush: %v", err)
	}
	checkContent(t, d, model)
}

func testEndOfDevice(t *testing.T, d block.Device, model []byte) {
	size := d.Size()
	mustWrite(t, d, model, random(newRand(2), 1000), size-1000)
	for _, test := range []struct {
		off  int64
		n    int
		want int
	}{{size - 10, 11, 10}, {size - 1, 5000, 1}, {size, 1, 0}, {size + 1, 1, 0}, {size + 1<<40, 4096, 0}, {size - 5000, 100_000, 5000}} {
		p := make([]byte, test.n)
		n, err := d.ReadAt(p, test.off)
		if n != test.want || err != io.EOF {
			t.Errorf("ReadAt(%d bytes, size%+d) = %d, %v; want %d, io.EOF", test.n, test.off-size, n, err, test.want)
		} else if n > 0 && !bytes.Equal(p[:n], model[test.off:]) {
			t.Errorf("ReadAt(%d bytes, size%+d): %s", test.n, test.off-size, difference(p[:n], model[test.off:], test.off))
		}
	}
}

func testOutOfRange(t *testing.T, d block.Device, model []byte) {
	size := d.Size()
	const maxInt64 = 1<<63 - 1
	for _, test := range []block.Range{{Offset: -1, Length: 1}, {Offset: -1, Length: 4096}, {Offset: size, Length: 1}, {Offset: size - 1, Length: 2}, {Offset: size - 4096, Length: 4097}, {Offset: size + 1, Length: 1}, {Offset: maxInt64, Length: 4096}, {Offset: 0, Length: size + 1}} {
		if n, err := d.WriteAt(random(newRand(3), test.Length), test.Offset); err == nil || n != 0 {
			t.Errorf("WriteAt(%d bytes, %d) of a device of %d bytes = %d, %v; want 0 and an error", test.Length, test.Offset, size, n, err)
		}
		if err := d.Discard(test.Offset, test.Length); err == nil {
			t.Errorf("Discard(%d, %d) of a device of %d bytes succeeded", test.Offset, test.Length, size)
		}
	}
	for _, test := range []block.Range{{Offset: 0, Length: -1}, {Offset: 10, Length: -10}, {Offset: 1, Length: maxInt64}, {Offset: 4096, Length: -maxInt64 - 1}} {
		if err := d.Discard(test.Offset, test.Length); err == nil {
			t.Errorf("Discard(%d, %d) succeeded", test.Offset, test.Length)
		}
	}
	if n, err := d.ReadAt(make([]byte, 1), -1); n != 0 || err == nil || err == io.EOF {
		t.Errorf("ReadAt(1 byte, -1) = %d, %v; want 0 and an error that is not io.EOF", n, err)
	}
	checkContent(t, d, model)
}

func testEmpty(t *testing.T, d block.Device, model []byte) {
	for _, off := range []int64{0, 1, 4096, d.Size()} {
		if n, err := d.ReadAt(nil, off); n != 0 || (err != nil && err != io.EOF) {
			t.Errorf("ReadAt(nothing, %d) = %d, %v", off, n, err)
		}
		if n, err := d.WriteAt(nil, off); n != 0 || err != nil {
			t.Errorf("WriteAt(nothing, %d) = %d, %v", off, n, err)
		}
		if err := d.Discard(off, 0); err != nil {
			t.Errorf("Discard(%d, 0): %v", off, err)
		}
	}
	if err := d.Flush(); err != nil {
		t.Errorf("Flush: %v", err)
	}
	checkContent(t, d, model)
}

func testDiscard(t *testing.T, d block.Device, model []byte) {
	rng := newRand(4)
	size := d.Size()
	for _, at := range []block.Range{
		{Offset: 0, Length: 1}, {Offset: 4095, Length: 2}, {Offset: 4096, Length: 4096}, {Offset: 5000, Length: 100}, {Offset: 65536, Length: 65536},
		{Offset: 65535, Length: 65538}, {Offset: 100_000, Length: 100_000}, {Offset: size - 1, Length: 1}, {Offset: size - 70_000, Length: 70_000}, {Offset: 0, Length: size},
	} {
		for _, written := range []bool{false, true} { // as it is, and written just before
			if written {
				mustWrite(t, d, model, random(rng, size), 0)
			}
			mustDiscard(t, d, model, at.Offset, at.Length)
			checkContent(t, d, model)
			// What is written into a discarded range has zeros around it.
			mid := at.Offset + at.Length/2
			mustWrite(t, d, model, []byte{0x77}, mid)
			checkContent(t, d, model)
		}
	}
}

// checkExtents checks that all that is not zero lies in a range of NextData.
func checkExtents(t *testing.T, d block.Device, model []byte) {
	t.Helper()
	e, ok := d.(block.Extents)
	if !ok {
		return
	}
	for off := int64(0); ; {
		r, err := e.NextData(off)
		if err == io.EOF {
			r = block.Range{Offset: d.Size()}
		} else if err != nil {
			t.Fatalf("NextData(%d): %v", off, err)
		} else if r.Offset < off || r.Length <= 0 || r.End() > d.Size() {
			t.Fatalf("NextData(%d) = %+v, of a device of %d bytes", off, r, d.Size())
		}
		if !block.IsZero(model[off:r.Offset]) {
			t.Fatalf("NextData(%d) = %+v, but there is data before", off, r)
		}
		if err == io.EOF {
			return
		}
		off = r.End()
	}
}

func testExtents(t *testing.T, d block.Device, model []byte) {
	e, ok := d.(block.Extents)
	if !ok {
		t.Skip("the device does not implement Extents")
	}
	checkExtents(t, d, model)
	mustDiscard(t, d, model, 0, d.Size())
	checkExtents(t, d, model)
	rng := newRand(5)
	for range 20 {
		n := 1 + rng.Int64N(9000)
		mustWrite(t, d, model, random(rng, n), rng.Int64N(d.Size()-n))
		checkExtents(t, d, model)
	}
	for _, off := range []int64{d.Size(), d.Size() + 1} {
		if r, err := e.NextData(off); err != io.EOF {
			t.Errorf("NextData(size%+d) = %+v, %v; want io.EOF", off-d.Size(), r, err)
		}
	}
	if _, err := e.NextData(-1); err == nil || err == io.EOF {
		t.Errorf("NextData(-1): %v; want an error that is not io.EOF", err)
	}
}

// randomRange is a range of a device of size bytes: small or large, aligned or not.
func randomRange(rng *rand.Rand, size int64) block.Range {
	n := 1 + rng.Int64N([]int64{16, 4096, 20_000, 200_000}[rng.IntN(4)])
	n = min(n, size)
	off := rng.Int64N(size - n + 1)
	if rng.IntN(2) == 0 {
		off = off / 4096 * 4096
		n = min((n+4095)/4096*4096, size-off)
	}
	if rng.IntN(16) == 0 {
		n = size - off
	}
	return block.Range{Offset: off, Length: n}
}

func testRandom(t *testing.T, d block.Device, model []byte) {
	seed := rand.Uint64()
	defer func() {
		if t.Failed() {
			t.Logf("the seed was %d", seed)
		}
	}()
	rng := newRand(seed)
	for range 400 {
		r := randomRange(rng, d.Size())
		switch rng.IntN(10) {
		case 0, 1, 2, 3:
			mustWrite(t, d, model, random(rng, r.Length), r.Offset)
		case 4:
			mustWrite(t, d, model, newBytes(r.Length), r.Offset)
		case 5:
			mustWrite(t, d, model, bytes.Clone(model[r.Offset:r.End()]), r.Offset) // what is there
		case 6:
			mustDiscard(t, d, model, r.Offset, r.Length)
		case 7:
			if err := d.Flush(); err != nil {
				t.Fatalf("Flush: %v", err)
			}
		default:
			checkRead(t, d, model, r.Offset, r.Length)
		}
	}
	checkContent(t, d, model)
	checkExtents(t, d, model)
}

// testConcurrentWriters writes ranges next to each other, which share pages and blocks, at the same time.
func testConcurrentWriters(t *testing.T, d block.Device, model []byte) {
	const writers = 8
	size := d.Size()
	var wg sync.WaitGroup
	for w := range int64(writers) {
		part := block.Range{Offset: size * w / writers, Length: size*(w+1)/writers - size*w/writers}
		mine := model[part.Offset:part.End()]
		wg.Go(func() {
			rng := newRand(uint64(w))
			for range 60 {
				n := 1 + rng.Int64N(part.Length)
				if rng.IntN(3) > 0 {
					n = min(n, 700)
				}
				at := rng.Int64N(part.Length - n + 1)
				off := part.Offset + at
				switch rng.IntN(8) {
				case 0:
					if err := d.Discard(off, n); err != nil {
						t.Errorf("Discard(%d, %d): %v", off, n, err)
						return
					}
					clear(mine[at : at+n])
				case 1:
					if err := d.Flush(); err != nil {
						t.Errorf("Flush: %v", err)
						return
					}
				default:
					p := random(rng, n)
					if _, err := d.WriteAt(p, off); err != nil {
						t.Errorf("WriteAt(%d bytes, %d): %v", n, off, err)
						return
					}
					copy(mine[at:], p)
					got := make([]byte, n)
					if k, err := d.ReadAt(got, off); int64(k) != n || !bytes.Equal(got, p) {
						t.Errorf("ReadAt(%d bytes, %d) = %d, %v after WriteAt: %s", n, off, k, err, difference(got, p, off))
						return
					}
				}
			}
		})
	}
	wg.Wait()
	if !t.Failed() {
		checkContent(t, d, model)
		checkExtents(t, d, model)
	}
}

// testConcurrentEverything lets all methods meet on overlapping ranges. Each page is written with one of a few bytes
// throughout, so that whatever is read must be one of those, or zero, or what was there at first.
func testConcurrentEverything(t *testing.T, d block.Device, model []byte) {
	const page = 4096
	pages := d.Size() / page
	var wg sync.WaitGroup
	for w := range 6 {
		wg.Go(func() {
			rng := newRand(uint64(w))
			for range 120 {
				off := rng.Int64N(pages) * page
				n := min(page*(1+rng.Int64N(20)), pages*page-off)
				var err error
				switch rng.IntN(6) {
				case 0, 1:
					_, err = d.WriteAt(bytes.Repeat([]byte{0xf0 | byte(w)}, int(n)), off)
				case 2:
					err = d.Discard(off, n)
				case 3:
					err = d.Flush()
				case 4:
					if e, ok := d.(block.Extents); ok {
						if _, err = e.NextData(off); err == io.EOF {
							err = nil
						}
					}
				default:
					p := make([]byte, n)
					if _, err = d.ReadAt(p, off); err == io.EOF {
						err = nil
					}
					for i := 0; i < len(p); i += 61 { // all pages, at ever other places
						b := p[i]
						if b != 0 && b&0xf0 != 0xf0 && b != model[off+int64(i)] {
							t.Errorf("the byte at %d reads %#02x, which nobody wrote", off+int64(i), b)
							return
						}
					}
				}
				if err != nil {
					t.Errorf("worker %d: %v", w, err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// testCloseWhileInUse closes the device under calls: they succeed, or fail with os.ErrClosed.
func testCloseWhileInUse(t *testing.T, d block.Device, model []byte) {
	started := make(chan struct{}, 4)
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			rng := newRand(uint64(w))
			for i := 0; ; i++ {
				if i == 20 {
					started <- struct{}{}
				}
				r := randomRange(rng, d.Size())
				var err error
				switch rng.IntN(4) {
				case 0:
					_, err = d.WriteAt(make([]byte, r.Length), r.Offset)
				case 1:
					err = d.Discard(r.Offset, r.Length)
				case 2:
					err = d.Flush()
				default:
					if _, err = d.ReadAt(make([]byte, r.Length), r.Offset); err == io.EOF {
						err = nil
					}
				}
				if errors.Is(err, os.ErrClosed) && i >= 20 {
					return
				}
				if err != nil {
					t.Errorf("a call that Close met failed with %v; want success, or an error that wraps os.ErrClosed", err)
					if i < 20 {
						started <- struct{}{}
					}
					return
				}
			}
		})
	}
	for range 4 {
		<-started
	}
	if err := d.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
	wg.Wait()
}

func testClosed(t *testing.T, d block.Device, model []byte) {
	size := d.Size()
	if err := d.Close(); err != nil {
		t.Fatalf("Close: %v", err)
	}
	if err := d.Close(); err != nil {
		t.Errorf("second Close: %v; want nil", err)
	}
	if d.Size() != size {
		t.Errorf("Size after Close is %d; want %d", d.Size(), size)
	}
	check := func(call string, err error) {
		t.Helper()
		if !errors.Is(err, os.ErrClosed) {
			t.Errorf("%s after Close: %v; want an error that wraps os.ErrClosed", call, err)
		}
	}
	_, err := d.ReadAt(make([]byte, 10), 0)
	check("ReadAt", err)
	_, err = d.WriteAt(make([]byte, 10), 0)
	check("WriteAt", err)
	check("Discard", d.Discard(0, 10))
	check("Flush", d.Flush())
	if e, ok := d.(block.Extents); ok {
		_, err := e.NextData(0)
		check("NextData", err)
	}
}

func testReopen(t *testing.T, d block.Device, model []byte, reopen func(*testing.T, block.Device) block.Device) {
	rng := newRand(7)
	current := d
	for round := range 4 {
		for range 40 {
			r := randomRange(rng, current.Size())
			switch rng.IntN(6) {
			case 0:
				mustDiscard(t, current, model, r.Offset, r.Length)
			case 1:
				if err := current.Flush(); err != nil {
					t.Fatalf("Flush: %v", err)
				}
			default:
				mustWrite(t, current, model, random(rng, r.Length), r.Offset)
			}
		}
		if err := current.Close(); err != nil {
			t.Fatalf("round %d: Close: %v", round, err)
		}
		opened := reopen(t, current)
		t.Cleanup(func() {
			if err := opened.Close(); err != nil {
				t.Errorf("Close of what was reopened: %v", err)
			}
		})
		current = opened
		checkContent(t, current, model)
		checkExtents(t, current, model)
	}
}
