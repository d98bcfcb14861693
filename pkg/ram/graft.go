package ram

import (
	"errors"
	"fmt"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ErrNotGrafted is wrapped by errors of [Memory.Graft] which say that the VMM did not get the memory, or not as its own. It must not
// run a guest then.
var ErrNotGrafted = errors.New("the VMM has not taken the memory")

// Graft has a VMM that allocates its guest's RAM itself use this memory, which [Spawn] has mapped into it ([Options.Graft]): do has the VMM
// allocate the RAM, and returns when it has, or when that has failed. While do runs, the VMM's main thread is traced, and what it asks
// the kernel for (mmap(2), private, without reserve, as hypervisors written with the crate vm-memory do, at once or in a place that it has reserved
// before) is answered by addresses in that mapping, until all of it is given. So the VMM may be of any build, and its seccomp filters stay as they are.
//
// RAM of several regions, of which all but the last have 1 GiB or more, is one after the other in the memory. The memory must be attached. An
// error of do is returned as it is.
func (m *Memory) Graft(do func() error) error {
	m.mu.Lock()
	h := m.handle
	m.mu.Unlock()
	if h == nil || h.grafted == 0 {
		return fmt.Errorf("graft memory %q: %w: it was not started for that", m.name, ErrNotGrafted)
	}
	g := graft{pid: h.pid, next: h.grafted, left: uint64(m.size)}
	if err := g.trace(do); err != nil {
		return fmt.Errorf("graft memory %q into process %d: %w", m.name, h.pid, err)
	}
	return nil
}

// graft is the giving of a mapping to a traced VMM.
type graft struct {
	pid  int
	next uint64 // address to give
	left uint64 // bytes that were not given

	mu       sync.Mutex // guards what follows
	attached bool       // the VMM is traced
	finished bool       // do has returned
}

func (g *graft) trace(do func() error) error {
	done := make(chan error, 1)
	all := g.left
	err := onThread(func(*unix.Sigset_t) error {
		if err := g.seize(); err != nil {
			done <- nil
			return err
		}
		go func() { // waited for by done
			err := do()
			g.finish()
			done <- err
		}()
		return g.serve()
	})
	if failed := <-done; failed != nil {
		return failed
	}
	switch {
	case err != nil:
		return fmt.Errorf("%w: %w", ErrNotGrafted, err)
	case g.left == all:
		return fmt.Errorf("%w: it has asked for none", ErrNotGrafted)
	case g.left > 0:
		return fmt.Errorf("%w: it has asked for %d bytes of %d", ErrNotGrafted, all-g.left, all)
	}
	return nil
}

// seize begins to trace the main thread, which is stopped when it returns. Were we to die, the VMM must not run on with a part of the memory.
func (g *graft) seize() error {
	const options = unix.PTRACE_O_EXITKILL | unix.PTRACE_O_TRACESYSGOOD
	if err := g.ptrace(unix.PTRACE_SEIZE, 0, options); err != nil {
		return fmt.Errorf("trace it: %w", err)
	}
	g.attached = true
	if err := g.ptrace(unix.PTRACE_INTERRUPT, 0, 0); err != nil {
		return fmt.Errorf("stop it: %w", err)
	}
	_, err := awaitStop(g.pid)
	return err
}

// finish ends the tracing from another thread: by a signal that the tracer keeps from the VMM, as nothing else ends its waiting.
func (g *graft) finish() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.finished = true
	if g.attached {
		_ = unix.Tgkill(g.pid, g.pid, unix.SIGURG) // the process may have ended, which its tracer hears of
	}
}

// serve answers a stopped VMM until it has all of the memory, or do has returned. It is not traced any more then.
func (g *graft) serve() error {
	signal := unix.Signal(0) // to deliver
	for {
		g.mu.Lock()
		if g.left == 0 || g.finished {
			g.attached = false
			err := g.ptrace(unix.PTRACE_DETACH, 0, uintptr(signal))
			g.mu.Unlock()
			return err
		}
		g.mu.Unlock()
		if err := g.ptrace(unix.PTRACE_SYSCALL, 0, uintptr(signal)); err != nil {
			return err
		}
		status, err := awaitStop(g.pid)
		if err != nil {
			return err
		}
		signal = 0
		switch {
		case status == syscallStop:
			if err := g.answer(); err != nil {
				return err
			}
		case status>>8 == 0 && unix.Signal(status) != unix.SIGURG:
			signal = unix.Signal(status)
		}
	}
}

// leastRegion is how large a region of RAM is, in bytes, that others follow: they are there because of the gap below 4 GiB.
const leastRegion = 1 << 30

// syscallStop is the status of a stop before or after a system call (PTRACE_O_TRACESYSGOOD).
const syscallStop = int32(unix.SIGTRAP) | 0x80

// answer lets a system call be, unless it asks for RAM.
func (g *graft) answer() error {
	var regs unix.PtraceRegs
	if err := unix.PtraceGetRegs(g.pid, &regs); err != nil {
		return fmt.Errorf("read its registers: %w", err)
	}
	entry, err := g.entry()
	if err != nil {
		return err
	}
	result, given, ok := g.consider(memoryCall(&regs))
	if !entry || !ok { // something of the VMM's own
		return nil
	}
	skip(&regs)
	if err := unix.PtraceSetRegs(g.pid, &regs); err != nil {
		return fmt.Errorf("write its registers: %w", err)
	}
	if err := g.ptrace(unix.PTRACE_SYSCALL, 0, 0); err != nil {
		return err
	}
	if status, err := awaitStop(g.pid); err != nil {
		return err
	} else if status != syscallStop {
		return fmt.Errorf("it stops with %#x where the end of a system call was due", status)
	}
	setResult(&regs, result)
	if err := unix.PtraceSetRegs(g.pid, &regs); err != nil {
		return fmt.Errorf("write its registers: %w", err)
	}
	g.next += given
	g.left -= given
	return nil
}

// call is a system call about memory: mmap(2), or munmap(2), which has an address and a length only.
type call struct{ nr, addr, length, prot, flags uint64 }

// consider says what a system call has to return that is about the guest's RAM, and how much of that is given by it.
func (g *graft) consider(c call) (result, given uint64, ok bool) {
	const kind = unix.MAP_PRIVATE | unix.MAP_NORESERVE
	due := func(length uint64) bool { return length == g.left || length >= leastRegion && length < g.left }
	// What is reserved has room to be aligned in, which it is already.
	const room = HugePage - pageSize
	switch {
	case c.nr == unix.SYS_MUNMAP: // of that room: there is none
		return 0, 0, c.addr >= g.next && c.addr-g.next <= g.left && c.length <= room
	case c.nr != unix.SYS_MMAP || c.flags&kind != kind:
		return 0, 0, false
	case c.prot == unix.PROT_NONE:
		return g.next, 0, c.addr == 0 && c.length > room && due(c.length-room)
	case c.prot != unix.PROT_READ|unix.PROT_WRITE:
		return 0, 0, false
	}
	place := c.addr == 0 || c.addr == g.next && c.flags&unix.MAP_FIXED != 0
	return g.next, c.length, place && due(c.length)
}

// syscallInfo is struct ptrace_syscall_info of linux/ptrace.h, with the member of its union that is the largest.
type syscallInfo struct {
	op   uint8
	_    [3]byte
	arch uint32
	ip   uint64
	sp   uint64
	_    [8]uint64
}

// entry reports whether the VMM is stopped before a system call, rather than after it.
func (g *graft) entry() (bool, error) {
	const getSyscallInfo, syscallEntry = 0x420e, 1 // PTRACE_GET_SYSCALL_INFO (Linux 5.3), PTRACE_SYSCALL_INFO_ENTRY
	var info syscallInfo
	_, _, errno := unix.Syscall6(unix.SYS_PTRACE, getSyscallInfo, uintptr(g.pid), unsafe.Sizeof(info), uintptr(unsafe.Pointer(&info)), 0, 0)
	if errno != 0 {
		return false, fmt.Errorf("look at its system call: %w", errno)
	}
	return info.op == syscallEntry, nil
}

func (g *graft) ptrace(request int, addr, data uintptr) error {
	_, _, errno := unix.Syscall6(unix.SYS_PTRACE, uintptr(request), uintptr(g.pid), addr, data, 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}
