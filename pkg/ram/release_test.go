package ram

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"testing"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"github.com/drafter-vm/drafter/pkg/block"
)

func TestReleaseFilter(t *testing.T) {
	const size = 5 << 30
	for _, start := range []uint64{0x7f00_0000_0000, 0x7f12_fff0_0000, 1 << 33} {
		raw, err := releaseFilter(start, size, unix.SECCOMP_RET_USER_NOTIF)
		if err != nil {
			t.Fatal(err)
		}
		program, ok := bpf.Disassemble(raw)
		if !ok {
			t.Fatal("it cannot be disassembled")
		}
		vm, err := bpf.NewVM(program)
		if err != nil {
			t.Fatal(err)
		}
		// Of struct seccomp_data as the VM reads it: big-endian words, where the kernel has them in its own order.
		run := func(arch uint32, nr int, args ...uint64) uint32 {
			data := make([]byte, 64)
			binary.BigEndian.PutUint32(data, uint32(nr))
			binary.BigEndian.PutUint32(data[4:], arch)
			for n, arg := range args {
				binary.BigEndian.PutUint32(data[16+8*n:], uint32(arg))
				binary.BigEndian.PutUint32(data[20+8*n:], uint32(arg>>32))
			}
			result, err := vm.Run(data)
			if err != nil {
				t.Fatal(err)
			}
			return uint32(result)
		}
		const native = unix.AUDIT_ARCH_X86_64
		for _, c := range []struct {
			addr   uint64
			inside bool
		}{
			{0, false}, {start - 1<<32, false}, {start - 1, false}, {start, true}, {start + 1<<31, true}, {start + 1<<32, true}, {start + 4<<30 + 5, true},
			{start + size - 1, true}, {start + size, false}, {start + size + 1<<32, false}, {^uint64(0), false},
		} {
			want := uint32(unix.SECCOMP_RET_ALLOW)
			if c.inside {
				want = unix.SECCOMP_RET_USER_NOTIF
			}
			if got := run(native, unix.SYS_MADVISE, c.addr, pageSize, unix.MADV_DONTNEED); got != want {
				t.Errorf("memory at %#x: madvise at %#x: %#x, want %#x", start, c.addr, got, want)
			}
			if got := run(native, unix.SYS_MMAP, c.addr, pageSize, unix.PROT_READ, unix.MAP_FIXED|unix.MAP_PRIVATE); got != want {
				t.Errorf("memory at %#x: mmap at %#x: %#x, want %#x", start, c.addr, got, want)
			}
		}
		for what, got := range map[string]uint32{
			"other advice":        run(native, unix.SYS_MADVISE, start, pageSize, unix.MADV_HUGEPAGE),
			"a hint":              run(native, unix.SYS_MMAP, start, pageSize, unix.PROT_READ, unix.MAP_PRIVATE),
			"other calls":         run(native, unix.SYS_MUNMAP, start, unix.MADV_DONTNEED, unix.MADV_DONTNEED, unix.MAP_FIXED),
			"other architectures": run(unix.AUDIT_ARCH_I386, unix.SYS_MADVISE, start, pageSize, unix.MADV_DONTNEED),
		} {
			if got != unix.SECCOMP_RET_ALLOW {
				t.Errorf("%s: %#x, want that it is allowed", what, got)
			}
		}
	}
}

// TestRelease: what a VMM gives back of grafted RAM, in either way, is free and empty, and can be used again. With nobody there to free it, it stays
// as it is.
func TestRelease(t *testing.T) {
	needFull(t)
	checkLeaks(t)
	const size = 1 << 20
	mem, v := grafted(t, size)
	if err := mem.Graft(v.allocate(size)); err != nil {
		t.Fatal(err)
	}
	if got := v.ask("own"); got != "0 0 <nil>" {
		t.Errorf("a page of its own: %s", got)
	}
	for _, how := range []string{"release", "replace"} {
		for page := range 4 {
			v.ask(fmt.Sprintf("poke %d 7", page*pageSize))
		}
		tracker := mem.Tracker()
		if err := tracker.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		if _, err := tracker.Collect(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := v.ask(fmt.Sprintf("%s %d", how, 2*pageSize)); got != "<nil>" {
			t.Fatalf("%s: %s", how, got)
		}
		dirty, err := tracker.Collect(t.Context())
		if want := (block.Range{Offset: 2 * pageSize, Length: pageSize}); err != nil || len(dirty) != 1 || dirty[0] != want {
			t.Errorf("%s: written is %v, want %v (%v)", how, dirty, want, err)
		}
		if err := tracker.Stop(); err != nil {
			t.Error(err)
		}
		var stat unix.Stat_t
		if err := mem.control(func(fd int) error { return unix.Fstat(fd, &stat) }); err != nil || stat.Blocks*512 != 3*pageSize {
			t.Errorf("%s: it has %d bytes of 4 pages, of which one was given back (%v)", how, stat.Blocks*512, err)
		}
		if got := v.ask(fmt.Sprintf("peek %d", 2*pageSize)); got != "0" {
			t.Errorf("%s: the page has %s", how, got)
		}
		v.ask(fmt.Sprintf("poke %d 9", 2*pageSize))
		b := make([]byte, 1)
		if _, err := mem.Device().ReadAt(b, 2*pageSize); err != nil || b[0] != 9 {
			t.Errorf("%s: the page, used again, has %d in the memory, want 9 (%v)", how, b[0], err)
		}
	}
	if got := v.ask(fmt.Sprintf("release %d", 2*pageSize+200)); got != unix.EINVAL.Error() {
		t.Errorf("release of an address within a page: %s, want EINVAL", got)
	}
	if !mem.Frees() {
		t.Error("it says that it does not free")
	}
	if err := mem.Close(); err != nil {
		t.Fatal(err)
	}
	for _, how := range []string{"release", "replace"} {
		if got := v.ask(fmt.Sprintf("%s %d", how, 2*pageSize)); got != unix.ENOSYS.Error() {
			t.Errorf("%s with nobody there: %s, want ENOSYS", how, got)
		}
		if got := v.ask(fmt.Sprintf("peek %d", 2*pageSize)); got != "9" {
			t.Errorf("%s with nobody there: the page has %s, want 9", how, got)
		}
	}
}

// TestReleaseAbsent: a page that has not arrived when it is given back is not fetched for that, nor is the VMM held up.
func TestReleaseAbsent(t *testing.T) {
	needFull(t)
	checkLeaks(t)
	const size = 1 << 20
	mem, v := grafted(t, size)
	defer mem.Close()
	requests := make(chan int64, 16)
	filler, err := mem.Receive(t.Context(), func(off int64) { requests <- off }, FillOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := mem.Graft(v.allocate(size)); err != nil {
		t.Fatal(err)
	}
	if got := v.ask(fmt.Sprintf("release %d", 2*pageSize)); got != "<nil>" { // or it would wait for ever
		t.Fatal(got)
	}
	if got := v.ask(fmt.Sprintf("peek %d", 2*pageSize)); got != "0" {
		t.Errorf("the page has %s", got)
	}
	select {
	case off := <-requests:
		t.Errorf("the page at %d was asked for", off)
	default:
	}
	// What comes of it nevertheless is nobody's.
	v.ask(fmt.Sprintf("poke %d 9", 2*pageSize))
	deliver(t, filler, contents(size, 1))
	if got := v.ask(fmt.Sprintf("peek %d", 2*pageSize)); got != "9" {
		t.Errorf("the page, used again, has %s, want 9", got)
	}
}

// TestReleaseHostile: whatever a VMM says that it gives back, only pages of its own guest are freed, and nothing else becomes of it.
func TestReleaseHostile(t *testing.T) {
	const size = 16 * pageSize
	for _, filling := range []bool{false, true} {
		mem, err := Create("hostile", size)
		if err != nil {
			t.Fatal(err)
		}
		defer mem.Close()
		want := contents(size, 1)
		if filling {
			filler, err := mem.Receive(t.Context(), func(int64) {}, FillOptions{})
			if err != nil {
				t.Fatal(err)
			}
			defer filler.Close(t.Context())
			deliver(t, filler, want)
		} else if _, err := mem.Device().WriteAt(want, 0); err != nil {
			t.Fatal(err)
		}
		const all = ^uint64(0)
		for _, r := range [][2]uint64{
			{size, 1}, {size, all}, {all - pageSize + 1, 2 * pageSize}, {all, all}, {1 << 63, 1 << 63}, {0, 0}, {0, all}, {size - pageSize, all},
		} {
			mem.release(r[0], r[1])
		}
		got := make([]byte, size)
		if _, err := mem.Device().ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
			t.Errorf("filling %t: pages that were not given back are gone (%v)", filling, err)
		}
		mem.release(size-pageSize, 1<<62) // behind the end there is nothing
		if _, err := mem.Device().ReadAt(got, 0); err != nil || !block.IsZero(got[size-pageSize:]) || block.IsZero(got[:pageSize]) {
			t.Errorf("filling %t: of a range that goes beyond the end, the last page is not freed, or the first is (%v)", filling, err)
		}
	}
}
