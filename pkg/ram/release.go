package ram

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"time"
	"unsafe"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// A VMM that was given its guest's RAM ([Options.Graft]) believes that it is private. What the guest gives back (balloon, free page reporting)
// it returns to the kernel by one of two system calls, of which madvise(2) with MADV_DONTNEED leaves shared memory as it is, and mmap(2) puts
// private pages in place of it, which nobody else would ever see again. A seccomp(2) filter over the addresses of the RAM has both
// ask us instead: we free the pages, and the VMM is told that it is done. While nobody listens, as when we have died, they fail with ENOSYS: the
// guest's pages stay as they are, and are not freed.
//
// Once we have heard of a call, nothing but its end may let the VMM go on (SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV, Linux 5.19): a signal would, and the
// pages could be the guest's again before we free them.

// releaseFilter is the filter: a notification for what gives back memory from start on, size bytes. Everything else is allowed.
func releaseFilter(start, size uint64, action uint32) ([]bpf.RawInstruction, error) {
	last := start + size - 1
	low, high := func(x uint64) uint32 { return uint32(x) }, func(x uint64) uint32 { return uint32(x >> 32) }
	const nr, arch, args = 0, 4, 16 // offsets in struct seccomp_data of linux/seccomp.h; arguments have 8 bytes, the low half first
	load := func(offset uint32) bpf.Instruction { return bpf.LoadAbsolute{Off: offset, Size: 4} }
	return bpf.Assemble([]bpf.Instruction{
		load(arch),
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.AUDIT_ARCH_X86_64, SkipFalse: 17},
		load(nr),
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.SYS_MADVISE, SkipTrue: 3},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.SYS_MMAP, SkipFalse: 14},
		load(args + 3*8),
		bpf.JumpIf{Cond: bpf.JumpBitsSet, Val: unix.MAP_FIXED, SkipTrue: 2, SkipFalse: 12},
		load(args + 2*8),
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.MADV_DONTNEED, SkipFalse: 10},
		// The address, from start to last.
		load(args + 4),
		bpf.JumpIf{Cond: bpf.JumpLessThan, Val: high(start), SkipTrue: 8},
		bpf.JumpIf{Cond: bpf.JumpGreaterThan, Val: high(last), SkipTrue: 7},
		bpf.JumpIf{Cond: bpf.JumpGreaterThan, Val: high(start), SkipTrue: 2},
		load(args),
		bpf.JumpIf{Cond: bpf.JumpLessThan, Val: low(start), SkipTrue: 4},
		load(args + 4),
		bpf.JumpIf{Cond: bpf.JumpLessThan, Val: high(last), SkipTrue: 3},
		load(args),
		bpf.JumpIf{Cond: bpf.JumpLessOrEqual, Val: low(last), SkipTrue: 1},
		bpf.RetConstant{Val: unix.SECCOMP_RET_ALLOW},
		bpf.RetConstant{Val: action},
	})
}

// guard installs the filter in a stopped process, and returns what its notifications come to. Where there can be none, as where another
// filter around us has some already, or before Linux 5.19, it is nil: nothing is freed ([Memory.Frees]).
func guard(pid int, start, size uint64) (_ *os.File, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("keep process %d from giving back memory by itself: %w", pid, err)
		}
	}()
	t := tracee{pid: pid}
	if err := t.open(); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, t.close()) }()
	// Without privileges a filter is installed by a process only that can get none.
	if _, err := t.call(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return nil, err
	}
	install := func(flags uint64, action uint32) (uint64, error) {
		filter, err := releaseFilter(start, size, action)
		if err != nil {
			return 0, err
		}
		// struct sock_fprog of linux/filter.h, and the instructions.
		at := t.scratch()
		const header = 16
		program := binary.NativeEndian.AppendUint64(nil, uint64(len(filter)))
		program = binary.NativeEndian.AppendUint64(program, at+header)
		for _, i := range filter {
			program = append(binary.NativeEndian.AppendUint16(program, i.Op), i.Jt, i.Jf)
			program = binary.NativeEndian.AppendUint32(program, i.K)
		}
		if err := t.write(at, program); err != nil {
			return 0, err
		}
		return t.call(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, flags, at)
	}
	fd, err := install(unix.SECCOMP_FILTER_FLAG_NEW_LISTENER|unix.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV, unix.SECCOMP_RET_USER_NOTIF)
	if errors.Is(err, unix.EBUSY) || errors.Is(err, unix.EINVAL) {
		_, err = install(0, unix.SECCOMP_RET_ERRNO|uint32(unix.ENOSYS))
		return nil, err
	}
	if err != nil {
		return nil, err
	}
	taken, err := t.take(int(fd))
	if err != nil {
		return nil, err
	}
	// It keeps none: with one of its own it would wait for an answer that nobody gives.
	if _, err := t.call(unix.SYS_CLOSE, fd); err != nil {
		_ = unix.Close(taken)
		return nil, err
	}
	if err := unix.SetNonblock(taken, true); err != nil {
		_ = unix.Close(taken)
		return nil, err
	}
	return os.NewFile(uintptr(taken), "seccomp notifications"), nil
}

// notification and response are struct seccomp_notif and seccomp_notif_resp of linux/seccomp.h.
type notification struct {
	id         uint64
	pid, flags uint32
	nr         int32
	arch       uint32
	ip         uint64
	args       [6]uint64
}

type response struct {
	id     uint64
	result uint64
	errno  int32 // negative
	flags  uint32
}

// serveReleases frees what the VMM gives back, until it has ended or stopReleases was called.
func (m *Memory) serveReleases(h *Handle) {
	raw, err := h.releases.SyscallConn()
	if err != nil {
		return
	}
	for {
		var n notification
		var errno unix.Errno
		err := raw.Read(func(fd uintptr) bool {
			// Asked before, as the request itself would wait.
			poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
			if _, err := unix.Poll(poll, 0); err != nil || poll[0].Revents == 0 {
				return false
			}
			if errno = unix.ESRCH; poll[0].Revents&unix.POLLIN != 0 {
				n = notification{} // as the kernel wants it
				_, _, errno = unix.Syscall(unix.SYS_IOCTL, fd, unix.SECCOMP_IOCTL_NOTIF_RECV, uintptr(unsafe.Pointer(&n)))
			}
			return true
		})
		switch {
		case err != nil:
			return
		case errno == unix.ENOENT || errno == unix.EINTR: // whoever asked is gone, or asks again
			continue
		case errno != 0: // so is the VMM
			return
		}
		answer := response{id: n.id}
		if addr, size := n.args[0], n.args[1]; addr%pageSize != 0 { // as the kernel has it
			answer.errno = -int32(unix.EINVAL)
		} else {
			m.release(addr-h.grafted, size)
			if n.nr == unix.SYS_MMAP {
				answer.result = addr
			}
		}
		_ = raw.Control(func(fd uintptr) {
			_, _, _ = unix.Syscall(unix.SYS_IOCTL, fd, unix.SECCOMP_IOCTL_NOTIF_SEND, uintptr(unsafe.Pointer(&answer))) // fails if who asked is gone
		})
	}
}

// release frees a range of the memory. One that cannot be freed stays as it is, which is as good for the guest. The VMM waits: what has not arrived is
// not waited for, as nobody needs it any more.
func (m *Memory) release(off, n uint64) {
	if off >= uint64(m.size) {
		return
	}
	n = min((n+pageSize-1)&^(pageSize-1), uint64(m.size)-off)
	if f := m.filler.Load(); f != nil {
		_ = f.DeliverZeros(int64(off), int64(n)) // where it is absent
	}
	_ = m.Device().Discard(int64(off), int64(n))
}

// Frees reports whether what the VMM gives back of RAM that was grafted is freed. It is not of a VMM that was adopted, nor where [Spawn] could not
// arrange for it.
func (m *Memory) Frees() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.handle != nil && m.handle.releases != nil
}

// stopReleases ends serveReleases.
func (h *Handle) stopReleases() {
	if h.releases != nil {
		_ = h.releases.SetReadDeadline(time.Unix(1, 0))
	}
}
