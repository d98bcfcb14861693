package ram

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/drafter-vm/drafter/pkg/block"
)

func TestCreate(t *testing.T) {
	checkLeaks(t)
	for _, size := range []int64{0, -4096, 1, 4097} {
		if _, err := Create("x", size); err == nil || !strings.Contains(err.Error(), fmt.Sprint(size)) {
			t.Errorf("size %d: %v", size, err)
		}
	}
	if _, err := Create(strings.Repeat("x", 300), 4096); err == nil {
		t.Error("a name of 300 bytes was accepted")
	}
	mem := create(t, 1<<20)
	if mem.Size() != 1<<20 {
		t.Errorf("size %d", mem.Size())
	}
	if err := mem.File().Truncate(0); !errors.Is(err, os.ErrPermission) {
		t.Errorf("truncate: %v", err)
	}
	if err := mem.File().Truncate(2 << 20); !errors.Is(err, os.ErrPermission) {
		t.Errorf("grow: %v", err)
	}
	if c := mem.Capabilities(); c.Rung != Eager {
		t.Errorf("unattached memory has %s", c)
	}
	if err := mem.Close(); err != nil {
		t.Error(err)
	}
	if err := mem.Close(); err != nil {
		t.Error(err)
	}
	if _, err := mem.Device().ReadAt(make([]byte, 1), 0); !errors.Is(err, os.ErrClosed) {
		t.Errorf("read after close: %v", err)
	}
	if err := mem.Device().Discard(0, 1); !errors.Is(err, os.ErrClosed) {
		t.Errorf("discard after close: %v", err)
	}
}

func TestOpen(t *testing.T) {
	checkLeaks(t)
	mem := create(t, 1<<20)
	if _, err := mem.Device().WriteAt([]byte("kept"), 5000); err != nil {
		t.Fatal(err)
	}
	file, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", mem.File().Fd()), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	again, err := Open(file)
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 4)
	if _, err := again.Device().ReadAt(got, 5000); err != nil || string(got) != "kept" || again.Size() != 1<<20 {
		t.Errorf("got %q of %d bytes, %v", got, again.Size(), err)
	}
	if err := again.Close(); err != nil {
		t.Error(err)
	}
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, []byte("odd"), 0o600); err != nil {
		t.Fatal(err)
	}
	if file, err = os.Open(path); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(file); err == nil || !strings.Contains(err.Error(), "not a memfd") {
		t.Errorf("ordinary file: %v", err)
	}
}

func TestDeviceExtents(t *testing.T) {
	checkLeaks(t)
	mem := create(t, 16*pageSize)
	dev := mem.Device()
	data := func() (out []block.Range) {
		t.Helper()
		for off := int64(0); ; {
			r, err := dev.(block.Extents).NextData(off)
			if errors.Is(err, io.EOF) {
				return out
			}
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, r)
			off = r.End()
		}
	}
	check := func(want ...block.Range) {
		t.Helper()
		if got := data(); fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("got %v, want %v", got, want)
		}
	}
	check()
	for _, page := range []int64{2, 3, 15} {
		if _, err := dev.WriteAt([]byte{1}, page*pageSize+17); err != nil {
			t.Fatal(err)
		}
	}
	check(block.Range{Offset: 2 * pageSize, Length: 2 * pageSize}, block.Range{Offset: 15 * pageSize, Length: pageSize})
	if r, err := dev.(block.Extents).NextData(3*pageSize + 5); err != nil || r != (block.Range{Offset: 3*pageSize + 5, Length: pageSize - 5}) {
		t.Errorf("from within: %v, %v", r, err)
	}
	// Reading holes populates nothing.
	if _, err := dev.ReadAt(make([]byte, 16*pageSize), 0); err != nil {
		t.Fatal(err)
	}
	if err := dev.Discard(2*pageSize, pageSize); err != nil {
		t.Fatal(err)
	}
	check(block.Range{Offset: 3 * pageSize, Length: pageSize}, block.Range{Offset: 15 * pageSize, Length: pageSize})
}

func TestParseMaps(t *testing.T) {
	st := &unix.Stat_t{Dev: unix.Mkdev(0, 1), Ino: 1043}
	const text = `55a3c4a00000-55a3c4a01000 r--p 00000000 fe:01 1043                       /usr/bin/qemu
7f0000000000-7f0000100000 rw-s 00000000 00:01 1043                       /memfd:guest (deleted)
7f0000100000-7f0000200000 r--s 00100000 00:01 1043                       /memfd:guest (deleted)
7f0000200000-7f0000300000 rw-p 00100000 00:01 1043                       /memfd:guest (deleted)
7f0000300000-7f0000400000 rw-s 00100000 00:01 1043                       /memfd:a name (deleted)
7f0000400000-7f0000500000 rw-s 00200000 00:01 1043                       /memfd:guest (deleted)
7f0000500000-7f0000600000 rw-s 00000000 00:01 10430                      /memfd:other (deleted)
7ffd12345000-7ffd12366000 rw-p 00000000 00:00 0                          [stack]
`
	ms, err := parseMaps(text, st, 0x280000)
	want := mappings{{0x7f0000000000, 0, 0x100000}, {0x7f0000300000, 0x100000, 0x100000}, {0x7f0000400000, 0x200000, 0x80000}}
	if err != nil || fmt.Sprint(ms) != fmt.Sprint(want) {
		t.Fatalf("got %x, %v", ms, err)
	}
	if got := ms.covered(0x280000); got != 0x280000 {
		t.Errorf("covered %#x", got)
	}
	if got := ms[1:].covered(0x280000); got != 0 {
		t.Errorf("covered %#x without the first", got)
	}
	if off, ok := ms.offset(0x7f0000300123); !ok || off != 0x100123 {
		t.Errorf("offset %#x, %t", off, ok)
	}
	if _, ok := ms.offset(0x7f0000480000); ok {
		t.Error("found an offset beyond the end")
	}
	if _, err := parseMaps("zz-1 rw-s 0 00:01 1043 x\n", st, 4096); err == nil {
		t.Error("accepted nonsense")
	}
}

func FuzzParseMaps(f *testing.F) {
	f.Add("7f0000000000-7f0000100000 rw-s 00000000 00:01 1043 /memfd:guest (deleted)\n")
	f.Add("1-0 rw-s ffffffffffffffff 00:01 1043\n")
	st := &unix.Stat_t{Dev: unix.Mkdev(0, 1), Ino: 1043}
	f.Fuzz(func(t *testing.T, text string) {
		const size = 1 << 30
		ms, err := parseMaps(text, st, size)
		if err != nil {
			return
		}
		for _, m := range ms {
			if m.length <= 0 || m.offset < 0 || m.offset+m.length > size {
				t.Errorf("mapping %+v is outside the file", m)
			}
		}
		if c := ms.covered(size); c < 0 || c > size {
			t.Errorf("covered %d", c)
		}
	})
}

func TestBitmap(t *testing.T) {
	const limit = 1000
	rnd := rand.New(rand.NewPCG(1, 2))
	b, want := newBitmap(limit), make([]bool, limit)
	for range 2000 {
		lo := rnd.Int64N(limit)
		hi := lo + rnd.Int64N(min(limit-lo, 1+rnd.Int64N(300))+1)
		switch rnd.IntN(4) {
		case 0:
			b.remove(lo, hi)
			for i := lo; i < hi; i++ {
				want[i] = false
			}
		case 1:
			b.add(lo, hi)
			for i := lo; i < hi; i++ {
				want[i] = true
			}
		case 2:
			end := lo - 1
			won := map[int64]bool{}
			b.claim(lo, hi, func(l, h int64) {
				if l <= end {
					t.Fatalf("runs touch: %d after %d", l, end)
				}
				end = h
				for i := l; i < h; i++ {
					won[i] = true
				}
			})
			for i := lo; i < hi; i++ {
				if won[i] == want[i] {
					t.Fatalf("page %d: won %t, was there %t", i, won[i], want[i])
				}
				want[i] = true
			}
		}
		n, set, clr := int64(0), hi, hi
		for i := hi - 1; i >= lo; i-- {
			if want[i] {
				n, set = n+1, i
			} else {
				clr = i
			}
			if b.has(i) != want[i] {
				t.Fatalf("has %d = %t", i, b.has(i))
			}
		}
		if b.count(lo, hi) != n || b.next(lo, hi, true) != set || b.next(lo, hi, false) != clr || b.hasAll(lo, hi) != (n == hi-lo) {
			t.Fatalf("[%d, %d): count %d want %d, next set %d want %d, next clear %d want %d", lo, hi, b.count(lo, hi), n, b.next(lo, hi, true), set, b.next(lo, hi, false), clr)
		}
	}
	got := make([]bool, limit)
	b.drain(func(lo, hi int64) {
		for i := lo; i < hi; i++ {
			got[i] = true
		}
	})
	if fmt.Sprint(got) != fmt.Sprint(want) || b.count(0, limit) != 0 {
		t.Error("drain did not tell or remove everything")
	}
}

func TestHistogram(t *testing.T) {
	for ns := uint64(0); ns < 1<<20; ns++ {
		b := bucket(ns)
		if c := ceiling(b); c < ns || c > ns+ns/8 || bucket(c) != b {
			t.Fatalf("%d ns: bucket %d up to %d", ns, b, c)
		}
	}
	if b := bucket(1<<63 + 5); b >= len(histogram{}.counts) {
		t.Fatalf("bucket %d", b)
	}
	var h histogram
	if q := h.quantiles(0.5, 1); q[0] != 0 || q[1] != 0 {
		t.Errorf("empty: %v", q)
	}
	for i := range 1000 {
		h.add(time.Duration(i) * time.Microsecond)
	}
	for i, q := range h.quantiles(0.5, 0.99, 1) {
		exact := []time.Duration{500, 990, 999}[i] * time.Microsecond
		if q < exact-exact/100 || q > exact+exact/7 {
			t.Errorf("quantile %d: %v, exact %v", i, q, exact)
		}
	}
}

// TestRequestNumbers compares the ioctl numbers with what the macros of linux/userfaultfd.h and linux/fs.h give.
func TestRequestNumbers(t *testing.T) {
	for name, n := range map[string][2]uintptr{
		"UFFDIO_API": {uffdioAPI, 0xc018aa3f}, "UFFDIO_REGISTER": {uffdioRegister, 0xc020aa00},
		"UFFDIO_UNREGISTER": {uffdioUnregister, 0x8010aa01}, "UFFDIO_WAKE": {uffdioWake, 0x8010aa02},
		"UFFDIO_COPY": {uffdioCopy, 0xc028aa03}, "UFFDIO_ZEROPAGE": {uffdioZeropage, 0xc020aa04},
		"UFFDIO_WRITEPROTECT": {uffdioWriteprotect, 0xc018aa06}, "USERFAULTFD_IOC_NEW": {uffdIOCNew, 0xaa00},
		"PAGEMAP_SCAN": {pagemapScan, 0xc0606610},
	} {
		if n[0] != n[1] {
			t.Errorf("%s is %#x, want %#x", name, n[0], n[1])
		}
	}
}

func TestMerge(t *testing.T) {
	r := func(off, end int64) block.Range { return block.Range{Offset: off, Length: end - off} }
	got := merge([]block.Range{r(8, 10), r(0, 3), r(2, 5), r(5, 6), r(12, 13), r(0, 1)})
	if want := []block.Range{r(0, 6), r(8, 10), r(12, 13)}; fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// TestBind: the pages of a bound memory are of its node, whoever writes or touches them.
func TestBind(t *testing.T) {
	checkLeaks(t)
	mem, err := Create("bound", testSize)
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	if err := mem.Bind(4000); err == nil || !strings.Contains(err.Error(), "NUMA node 4000") {
		t.Errorf("a node that is not there: %v", err)
	}
	if err := mem.Bind(0); errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EPERM) {
		t.Skipf("SKIPPED, not tested: %v", err)
	} else if err != nil {
		t.Fatal(err)
	}
	other, err := unix.Mmap(int(mem.File().Fd()), 0, testSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(other)
	other[0] = 1
	maps, err := os.ReadFile("/proc/self/numa_maps")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(maps)) {
		if strings.Contains(line, "memfd:bound") && !strings.Contains(line, " bind:0 ") {
			t.Errorf("a mapping of it is %q", line)
		}
	}
	if !strings.Contains(string(maps), "memfd:bound") {
		t.Error("the kernel does not list its mapping")
	}
}
