package ram

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The test binary executes itself again as the VMM: a process that maps the memory it inherits as descriptor 3 and does
// with it what it reads from standard input, one command a line, answering each with one line.

const roleEnv = "DRAFTER_RAM_TEST_ROLE"

func TestMain(m *testing.M) {
	switch role := os.Getenv(roleEnv); {
	case role == "":
		os.Exit(m.Run())
	case role == "vmm":
		vmmMain()
	case role == "graft":
		graftMain()
	case strings.HasPrefix(role, "starter"):
		starterMain(strings.HasSuffix(role, "wrapped"))
	case strings.HasPrefix(role, "keeper"):
		keeperMain()
	case strings.HasPrefix(role, "deny:"):
		denyMain(strings.TrimPrefix(role, "deny:"))
	}
	os.Exit(0)
}

// pattern is what page holds in the world of seed: every seventh page is zero, the others are unlike all others.
func pattern(page int64, seed uint64, out []byte) {
	if page%7 == 3 {
		clear(out)
		return
	}
	x := uint64(page)*0x9E3779B97F4A7C15 + seed
	for i := 0; i < len(out); i += 8 {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		binary.LittleEndian.PutUint64(out[i:], x)
	}
}

// contents are the patterns of all pages.
func contents(size int64, seed uint64) []byte {
	b := make([]byte, size)
	for page := range size / pageSize {
		pattern(page, seed, b[page*pageSize:(page+1)*pageSize])
	}
	return b
}

func vmmMain() {
	// A goroutine in a page fault cannot be preempted, so a collection would stop the whole process.
	debug.SetGCPercent(-1)
	var mem []byte
	var churn sync.WaitGroup
	var stop atomic.Bool
	var touching sync.WaitGroup
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		f := strings.Fields(in.Text())
		arg := func(i int) int64 {
			n, err := strconv.ParseInt(f[i], 10, 64)
			if err != nil {
				panic(err)
			}
			return n
		}
		answer := "ok"
		switch f[0] {
		case "map": // [offset length]
			var st unix.Stat_t
			if err := unix.Fstat(3, &st); err != nil {
				panic(err)
			}
			off, n := int64(0), st.Size
			if len(f) > 1 {
				off, n = arg(1), arg(2)
			}
			m, err := unix.Mmap(3, off, int(n), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
			if err != nil {
				panic(err)
			}
			if mem == nil {
				mem = m
			}
		case "mapsplit": // two mappings in the wrong order, and the first half once more
			var st unix.Stat_t
			if err := unix.Fstat(3, &st); err != nil {
				panic(err)
			}
			half := uintptr(st.Size / 2)
			area, err := unix.MmapPtr(-1, 0, nil, 3*half, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANON|unix.MAP_NORESERVE)
			if err != nil {
				panic(err)
			}
			for i, off := range []int64{0, int64(half), 0} {
				_, err := unix.MmapPtr(3, off, unsafe.Add(area, uintptr(i)*half), half, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_FIXED)
				if err != nil {
					panic(err)
				}
			}
			mem = unsafe.Slice((*byte)(area), 3*half)
		case "write": // page seed
			pattern(arg(1), uint64(arg(2)), mem[arg(1)*pageSize:(arg(1)+1)*pageSize])
		case "overwrite": // step seed: every so many pages, at random
			for _, page := range rand.Perm(len(mem) / pageSize) {
				if int64(page)%arg(1) == 0 {
					pattern(int64(page), uint64(arg(2)), mem[page*pageSize:(page+1)*pageSize])
				}
			}
		case "dirty": // percent: one byte of that share of the pages, spread evenly
			for page := range int64(len(mem) / pageSize) {
				if page*arg(1)/100 != (page+1)*arg(1)/100 {
					mem[page*pageSize]++
				}
			}
		case "poke": // offset byte
			mem[arg(1)] = byte(arg(2))
		case "peek": // offset
			answer = strconv.Itoa(int(mem[arg(1)]))
		case "touch": // offset, in the background
			touching.Go(func() { _ = *(*byte)(unsafe.Pointer(&mem[arg(1)])); sink.Add(int64(mem[arg(1)])) })
		case "stray": // has whoever fills its memory told of faults that are somewhere else
			found, err := findUFFDs(os.Getpid())
			if err != nil || len(found) == 0 {
				panic(fmt.Sprint("no userfaultfd: ", err))
			}
			const length = 1 << 20
			area, err := unix.Mmap(-1, 0, length, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
			if err != nil {
				panic(err)
			}
			fd, err := unix.Dup(found[0].fd)
			if err != nil {
				panic(err)
			}
			u := newUFFD(fd)
			if err := u.register(uffdRange{uint64(uintptr(unsafe.Pointer(&area[0]))), length}, modeMissing); err != nil {
				panic(err)
			}
			for at := 0; at < length; at += 64 << 10 {
				go func() { sink.Add(int64(area[at])) }() // for ever
			}
		case "join":
			touching.Wait()
		case "populate": // reads everything, as a VMM may that looks for something
			var sum int64
			for at := 0; at < len(mem); at += pageSize {
				sum += int64(mem[at])
			}
			sink.Add(sum)
		case "dontneed": // offset length
			if err := unix.Madvise(mem[arg(1):arg(1)+arg(2)], unix.MADV_DONTNEED); err != nil {
				panic(err)
			}
		case "punch": // offset length, as a balloon does
			if err := unix.Fallocate(3, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, arg(1), arg(2)); err != nil {
				panic(err)
			}
		case "scribble": // seed n: n writes of a few bytes at random
			scribble(mem, uint64(arg(1)), arg(2))
		case "churn": // seed writers: until stopped
			stop.Store(false)
			for i := range arg(2) {
				churn.Go(func() {
					for round := uint64(0); !stop.Load(); round++ {
						scribble(mem, uint64(arg(1))+uint64(i)<<32+round<<40, 64)
						runtime.Gosched()
					}
				})
			}
		case "stop":
			stop.Store(true)
			churn.Wait()
		case "verify": // seed readers: how many pages are not as they should be
			answer = strconv.FormatInt(verify(mem, uint64(arg(1)), int(arg(2))), 10)
		case "faults": // n seed: touches n pages at random, answers p50 and p99 and mean in ns
			answer = faults(mem, arg(1), uint64(arg(2)))
		case "exit":
			os.Exit(int(arg(1)))
		default:
			answer = "unknown command " + f[0]
		}
		fmt.Println(answer)
	}
}

var sink atomic.Int64

func scribble(mem []byte, seed uint64, n int64) {
	rnd := rand.New(rand.NewPCG(seed, 1))
	for range n {
		at := rnd.Int64N(int64(len(mem)))
		mem[at] = byte(rnd.Uint32())
	}
}

// verify reads every page, each goroutine all of them in an order of its own.
func verify(mem []byte, seed uint64, readers int) int64 {
	var wrong atomic.Int64
	var wg sync.WaitGroup
	for i := range readers {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(seed, uint64(i)))
			got, want := make([]byte, pageSize), make([]byte, pageSize)
			for _, page := range rnd.Perm(len(mem) / pageSize) {
				copy(got, mem[page*pageSize:(page+1)*pageSize])
				pattern(int64(page), seed, want)
				if string(got) != string(want) {
					wrong.Add(1)
				}
			}
		})
	}
	wg.Wait()
	return wrong.Load()
}

func faults(mem []byte, n int64, seed uint64) string {
	rnd := rand.New(rand.NewPCG(seed, 2))
	took := make([]time.Duration, n)
	var sum int64
	start := time.Now()
	for i, page := range rnd.Perm(len(mem) / pageSize)[:n] {
		t := time.Now()
		sum += int64(mem[page*pageSize])
		took[i] = time.Since(t)
	}
	mean := time.Since(start) / time.Duration(n)
	sink.Add(sum)
	slices.Sort(took)
	return fmt.Sprintf("%d %d %d", took[n/2], took[n*99/100], mean)
}

// vmm is the test's end of such a process.
type vmm struct {
	t   testing.TB
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
	h   *Handle
}

func vmmCommand(mem *Memory) *exec.Cmd {
	// Through this link also a user who may not search the build's folder can execute it.
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), roleEnv+"=vmm")
	cmd.Stderr = os.Stderr
	if mem != nil {
		cmd.ExtraFiles = []*os.File{mem.File()}
	}
	return cmd
}

// startVMM starts a VMM for mem, which it has mapped already. It ends with the test.
func startVMM(t testing.TB, mem *Memory, opts Options, change ...func(*exec.Cmd)) *vmm {
	t.Helper()
	v := &vmm{t: t, cmd: vmmCommand(mem)}
	v.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} // also when the test times out
	for _, f := range change {
		f(v.cmd)
	}
	var err error
	if v.in, err = v.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := v.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	v.out = bufio.NewReader(out)
	if v.h, err = Spawn(v.cmd, opts); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(v.kill)
	return v
}

func (v *vmm) kill() {
	_ = v.cmd.Process.Kill()
	_ = v.cmd.Wait()
}

func (v *vmm) send(format string, args ...any) {
	v.t.Helper()
	if _, err := fmt.Fprintf(v.in, format+"\n", args...); err != nil {
		v.t.Fatal(err)
	}
}

func (v *vmm) receive() string {
	v.t.Helper()
	line, err := v.out.ReadString('\n')
	if err != nil {
		v.t.Fatalf("read answer of the VMM: %v", err)
	}
	return strings.TrimSpace(line)
}

func (v *vmm) ask(format string, args ...any) string {
	v.t.Helper()
	v.send(format, args...)
	return v.receive()
}

func (v *vmm) do(format string, args ...any) {
	v.t.Helper()
	if got := v.ask(format, args...); got != "ok" {
		v.t.Fatalf("%s: %s", fmt.Sprintf(format, args...), got)
	}
}

// attach maps the memory and attaches it.
func (v *vmm) attach(mem *Memory) {
	v.t.Helper()
	v.do("map")
	if err := mem.Attach(testContext(v.t), v.h); err != nil {
		v.t.Fatal(err)
	}
}

// testContext ends before the test would be killed, so that something that hangs says where.
func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func create(t testing.TB, size int64) *Memory {
	t.Helper()
	mem, err := Create("test", size)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := mem.Close(); err != nil && !errors.Is(err, ErrIncomplete) {
			t.Errorf("close memory: %v", err)
		}
	})
	return mem
}

// needFull skips where the kernel or the user cannot do the whole of it.
func needFull(t testing.TB) {
	t.Helper()
	if c := Probe(); c.Rung != Full {
		t.Skipf("needs root and Linux 6.7: %s", c)
	}
}

// checkLeaks fails the test if at its end there are more descriptors, goroutines or children than now. Call it first.
func checkLeaks(t testing.TB) {
	t.Helper()
	Probe() // once for all
	fds, goroutines := descriptors(t), runtime.NumGoroutine()
	t.Cleanup(func() {
		deadline := time.Now().Add(10 * time.Second)
		for tick := time.NewTicker(time.Millisecond); ; <-tick.C {
			now := descriptors(t)
			var more []string
			for target, n := range now {
				if n > fds[target] {
					more = append(more, target)
				}
			}
			if len(more) == 0 && runtime.NumGoroutine() <= goroutines {
				return
			}
			if time.Now().After(deadline) {
				stacks := make([]byte, 1<<20)
				t.Errorf("leaked descriptors %q; %d goroutines before, %d now:\n%s", more, goroutines, runtime.NumGoroutine(), stacks[:runtime.Stack(stacks, true)])
				return
			}
		}
	})
}

func descriptors(t testing.TB) map[string]int {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]int{}
	for _, e := range entries {
		target, err := os.Readlink("/proc/self/fd/" + e.Name())
		if err != nil || strings.HasPrefix(target, "anon_inode:[event") {
			continue // the folder itself; what the runtime's poller keeps
		}
		if i := strings.IndexByte(target, ':'); i > 0 && !strings.HasPrefix(target, "anon_inode") {
			target = target[:i] // pipe:[1234]
		}
		found[target]++
	}
	return found
}

// asNobody runs a command without any privilege.
func asNobody(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Credential: &syscall.Credential{Uid: 65534, Gid: 65534},
		Pdeathsig:  syscall.SIGKILL,
	}
}
