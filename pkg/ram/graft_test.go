package ram

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// graftMain is a VMM that allocates its guest's RAM itself: "allocate N" by its main thread, "reserve N" in a place that is aligned, "poke N" and "peek N" bytes of it, "release N"
// and "replace N" give back a page of it by madvise(2) and mmap(2), "own" by both one that is not the guest's.
func graftMain() {
	runtime.LockOSThread() // main.main runs on the main thread
	var regions [][]byte
	at := func(offset int) *byte {
		for _, r := range regions {
			if offset < len(r) {
				return &r[offset]
			}
			offset -= len(r)
		}
		panic("offset beyond the RAM")
	}
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		var n, value int
		switch line := lines.Text(); {
		case scan(line, "allocate %d", &n):
			// Others, which are not the guest's, before it.
			for _, flags := range []uintptr{unix.MAP_PRIVATE | unix.MAP_ANONYMOUS, unix.MAP_SHARED | unix.MAP_ANONYMOUS | unix.MAP_NORESERVE} {
				if _, err := mmap(4096, flags); err != nil {
					fmt.Println(err)
				}
			}
			b, err := mmap(n, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
			regions = append(regions, b)
			fmt.Println("allocated", err)
		case scan(line, "reserve %d", &n):
			b, err := reserve(n)
			regions = append(regions, b)
			fmt.Println("allocated", err)
		case scan(line, "poke %d %d", &n, &value):
			*at(n) = byte(value)
			fmt.Println("ok")
		case scan(line, "peek %d", &n):
			fmt.Println(*at(n))
		case scan(line, "release %d", &n):
			fmt.Println(unix.Madvise(unsafe.Slice(at(n), pageSize), unix.MADV_DONTNEED))
		case scan(line, "replace %d", &n):
			fmt.Println(replace(at(n)))
		case line == "own":
			own, err := mmap(2*pageSize, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
			own[0], own[pageSize] = 1, 1
			err = errors.Join(err, unix.Madvise(own[:pageSize], unix.MADV_DONTNEED), replace(&own[pageSize]))
			fmt.Println(own[0], own[pageSize], err)
		}
	}
}

// reserve is mmap as Firecracker has it from 1.17 on: in the aligned part of a mapping that is larger.
func reserve(n int) ([]byte, error) {
	const private, room = unix.MAP_PRIVATE | unix.MAP_ANONYMOUS | unix.MAP_NORESERVE, HugePage - pageSize
	all, _, errno := unix.RawSyscall6(unix.SYS_MMAP, 0, uintptr(n+room), unix.PROT_NONE, private, ^uintptr(0), 0)
	if errno != 0 {
		return nil, errno
	}
	addr := (all + HugePage - 1) &^ (HugePage - 1)
	for _, rest := range [][2]uintptr{{all, addr - all}, {addr + uintptr(n), all + room - addr}} {
		if rest[1] == 0 {
			continue
		}
		if _, _, errno := unix.RawSyscall(unix.SYS_MUNMAP, rest[0], rest[1], 0); errno != 0 {
			return nil, errno
		}
	}
	got, _, errno := unix.RawSyscall6(unix.SYS_MMAP, addr, uintptr(n), unix.PROT_READ|unix.PROT_WRITE, private|unix.MAP_FIXED, ^uintptr(0), 0)
	if errno != 0 {
		return nil, errno
	}
	if got != addr {
		return nil, fmt.Errorf("mapped at %#x, not %#x", got, addr)
	}
	return unsafe.Slice((*byte)(unsafe.Add(unsafe.Pointer(nil), addr)), n), nil
}

// replace puts a private page where another one is.
func replace(at *byte) error {
	const flags = unix.MAP_PRIVATE | unix.MAP_ANONYMOUS | unix.MAP_FIXED
	addr, _, errno := unix.RawSyscall6(unix.SYS_MMAP, uintptr(unsafe.Pointer(at)), pageSize, unix.PROT_READ|unix.PROT_WRITE, flags, ^uintptr(0), 0)
	switch {
	case errno != 0:
		return errno
	case addr != uintptr(unsafe.Pointer(at)):
		return fmt.Errorf("it is mapped at %#x", addr)
	}
	return nil
}

func scan(line, format string, to ...any) bool {
	n, err := fmt.Sscanf(line, format, to...)
	return err == nil && n == len(to)
}

func mmap(n int, flags uintptr) ([]byte, error) {
	addr, _, errno := unix.RawSyscall6(unix.SYS_MMAP, 0, uintptr(n), unix.PROT_READ|unix.PROT_WRITE, flags, ^uintptr(0), 0)
	if errno != 0 {
		return nil, errno
	}
	return unsafe.Slice((*byte)(unsafe.Add(unsafe.Pointer(nil), addr)), n), nil
}

// graftVMM is such a process.
type graftVMM struct {
	t   *testing.T
	in  io.Writer
	out *bufio.Reader
	h   *Handle
}

func startGraftVMM(t *testing.T, opts Options) *graftVMM {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), roleEnv+"=graft")
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	v := &graftVMM{t: t, in: in, out: bufio.NewReader(out)}
	if v.h, err = Spawn(cmd, opts); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	return v
}

func (v *graftVMM) ask(command string) string {
	v.t.Helper()
	fmt.Fprintln(v.in, command)
	line, err := v.out.ReadString('\n')
	if err != nil {
		v.t.Fatalf("%s: %v", command, err)
	}
	return strings.TrimSpace(line)
}

// grafted is a memory that such a process is to have, and the process.
func grafted(t *testing.T, size int64) (*Memory, *graftVMM) {
	t.Helper()
	mem := create(t, size)
	v := startGraftVMM(t, Options{Graft: mem})
	if err := mem.Attach(t.Context(), v.h); err != nil {
		t.Fatal(err)
	}
	return mem, v
}

// deliver brings all that a filling waits for, and waits for its end.
func deliver(t *testing.T, f *Filler, content []byte) {
	t.Helper()
	for off := int64(0); off < int64(len(content)); off += pageSize {
		if err := f.Deliver(off, content[off:off+pageSize]); err != nil {
			t.Fatal(err)
		}
	}
	wait(t, f)
}

// tracks checks that of a write to one page that page is told, and nothing else. While it does, meanwhile is called.
func (v *graftVMM) tracks(mem *Memory, page int64, meanwhile func()) {
	t := v.t
	t.Helper()
	tracker := mem.Tracker()
	if err := tracker.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := tracker.Collect(t.Context()); err != nil {
		t.Fatal(err)
	}
	meanwhile()
	v.ask(fmt.Sprintf("poke %d 9", page*pageSize))
	dirty, err := tracker.Collect(t.Context())
	if err != nil || len(dirty) != 1 || dirty[0].Offset != page*pageSize || dirty[0].Length != pageSize {
		t.Errorf("written is %v, want page %d (%v)", dirty, page, err)
	}
	if err := tracker.Stop(); err != nil {
		t.Error(err)
	}
}

func (v *graftVMM) allocate(sizes ...int) func() error { return v.obtain("allocate", sizes...) }

func (v *graftVMM) obtain(how string, sizes ...int) func() error {
	return func() error {
		for _, n := range sizes {
			if got := v.ask(fmt.Sprintf("%s %d", how, n)); got != "allocated <nil>" {
				return errors.New(got)
			}
		}
		return nil
	}
}

// TestGraft: a VMM that allocates its guest's RAM has our memory instead, in one region or two, and what comes after that is its own again.
func TestGraft(t *testing.T) {
	needFull(t)
	checkLeaks(t)
	for n, regions := range [][]int{{9 << 20}, {1 << 30, 5 << 20}, {9 << 20}, {1 << 30, 5 << 20}} {
		how := "allocate"
		if n >= 2 {
			how = "reserve"
		}
		size := int64(0)
		for _, n := range regions {
			size += int64(n)
		}
		mem, v := grafted(t, size)
		if err := mem.Graft(v.obtain(how, regions...)); err != nil {
			t.Fatal(err)
		}
		for i, offset := range []int64{0, size - 5<<20 - 1, size - 5<<20, size - 1} {
			if got := v.ask(fmt.Sprintf("poke %d %d", offset, 7+i)); got != "ok" {
				t.Fatal(got)
			}
			b := make([]byte, 1)
			if _, err := mem.Device().ReadAt(b, offset); err != nil || b[0] != byte(7+i) {
				t.Errorf("%s %v: byte %d of the memory is %d, want %d (%v)", how, regions, offset, b[0], 7+i, err)
			}
		}
		// What it allocates from now on is its own.
		if err := v.allocate(4096)(); err != nil {
			t.Fatal(err)
		}
		v.ask(fmt.Sprintf("poke %d 9", size))
		if err := mem.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestGraftTracks: grafted RAM is tracked and filled as any.
func TestGraftTracks(t *testing.T) {
	needFull(t)
	const size = 5 << 20
	mem, v := grafted(t, size)
	defer mem.Close()
	src := contents(size, 1)
	filler, err := mem.Fill(t.Context(), bytes.NewReader(src), FillOptions{OnDemand: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := mem.Graft(v.allocate(size)); err != nil {
		t.Fatal(err)
	}
	for _, offset := range []int{5*pageSize + 9, size - 5} {
		if got := v.ask(fmt.Sprintf("peek %d", offset)); got != fmt.Sprint(src[offset]) {
			t.Errorf("byte %d is %s, want %d", offset, got, src[offset])
		}
	}
	if err := filler.DeliverZeros(0, 0); err != nil {
		t.Error(err)
	}
	deliver(t, filler, src)
	v.tracks(mem, 77, func() {})
}

// TestGraftRefused: a VMM that asks for less, or more, or nothing, or fails, or ends, is told apart, and not waited for.
func TestGraftRefused(t *testing.T) {
	needFull(t)
	checkLeaks(t)
	const size = 5 << 20
	broken := errors.New("broken")
	for what, c := range map[string]struct {
		do   func(v *graftVMM) error
		want error
	}{
		"nothing": {func(*graftVMM) error { return nil }, ErrNotGrafted},
		"less":    {func(v *graftVMM) error { return v.allocate(size / 2)() }, ErrNotGrafted},
		"more":    {func(v *graftVMM) error { return v.allocate(2 * size)() }, ErrNotGrafted},
		"a part":  {func(v *graftVMM) error { return v.allocate(1 << 30)() }, ErrNotGrafted},
		"fails":   {func(*graftVMM) error { return broken }, broken},
		"ends":    {func(v *graftVMM) error { return unix.Kill(v.h.PID(), unix.SIGKILL) }, ErrNotGrafted},
	} {
		t.Run(what, func(t *testing.T) {
			mem := create(t, map[bool]int64{true: 1<<30 + size, false: size}[what == "a part"])
			defer mem.Close()
			v := startGraftVMM(t, Options{Graft: mem})
			if err := mem.Attach(t.Context(), v.h); err != nil {
				t.Fatal(err)
			}
			if err := mem.Graft(func() error { return c.do(v) }); !errors.Is(err, c.want) {
				t.Errorf("got error %v, want %v", err, c.want)
			}
		})
	}
	mem := create(t, size)
	defer mem.Close()
	if err := mem.Graft(func() error { return nil }); !errors.Is(err, ErrNotGrafted) {
		t.Errorf("without a VMM: got error %v", err)
	}
}
