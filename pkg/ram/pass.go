package ram

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// firstPassed is the number of the first descriptor that a process has beside its standard ones, as with exec.Cmd.ExtraFiles.
const firstPassed = 3

// awaitExec lets a traced process go on until it has executed another program, and stops it before the first instruction of that. It stops there
// by a SIGTRAP, as it did for the first one (ptrace(2), "execve(2) under ptrace"): in the stop of PTRACE_O_TRACEEXEC it would still be in the
// system call, whose result then takes the place of what is put into its registers.
func awaitExec(pid int) error {
	if err := unix.PtraceCont(pid, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("continue process %d: %w", pid, err)
	}
	return awaitTrap(pid)
}

// pass gives files to the stopped process, which has no descriptors but its standard ones: they get the numbers from 3 on. They go by a socket
// whose other end is taken from it, so they reach a process in whatever namespaces, and of whatever user.
func (t *tracee) pass(files []*os.File) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("give %d files to process %d: %w", len(files), t.pid, err)
		}
	}()
	at := t.scratch()
	if _, err := t.call(unix.SYS_SOCKETPAIR, unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0, at); err != nil {
		return err
	}
	var pair [8]byte
	if err := t.read(at, pair[:]); err != nil {
		return err
	}
	ours, its := binary.NativeEndian.Uint32(pair[:4]), uint64(binary.NativeEndian.Uint32(pair[4:]))
	socket, err := t.take(int(ours))
	if err != nil {
		return err
	}
	defer unix.Close(socket)
	// Out of the way: what it receives gets the lowest numbers that are free.
	const high = 512
	away, err := t.call(unix.SYS_FCNTL, its, unix.F_DUPFD_CLOEXEC, high)
	if err != nil {
		return err
	}
	for _, fd := range []uint64{uint64(ours), its} {
		if _, err := t.call(unix.SYS_CLOSE, fd); err != nil {
			return err
		}
	}

	fds := make([]int, len(files))
	for i, f := range files {
		fds[i] = int(f.Fd())
	}
	if err := unix.Sendmsg(socket, []byte{0}, unix.UnixRights(fds...), nil, 0); err != nil {
		return err
	}
	// struct msghdr of recvmsg(2), on 64 bits, what it points to, and room for what comes.
	const header, vector = 7 * 8, 2 * 8
	control := make([]byte, unix.CmsgSpace(4*len(files)))
	data, begin := at+header+vector, at+header+vector+8
	var message []byte
	for _, word := range []uint64{0, 0, at + header, 1, begin, uint64(len(control)), 0, data, 1, 0} {
		message = binary.NativeEndian.AppendUint64(message, word)
	}
	if err := t.write(at, append(message, control...)); err != nil {
		return err
	}
	if _, err := t.call(unix.SYS_RECVMSG, away, at, 0); err != nil {
		return err
	}
	if err := t.read(begin, control); err != nil {
		return err
	}
	if _, err := t.call(unix.SYS_CLOSE, away); err != nil {
		return err
	}
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil || len(messages) != 1 {
		return fmt.Errorf("it has received %d messages (%w)", len(messages), err)
	}
	numbers, err := unix.ParseUnixRights(&messages[0])
	if err != nil {
		return err
	}
	for i, n := range numbers {
		if n != firstPassed+i {
			return fmt.Errorf("it had others already: number %d got %d", firstPassed+i, n)
		}
	}
	if len(numbers) != len(files) {
		return fmt.Errorf("it has received %d", len(numbers))
	}
	return nil
}

// take duplicates a descriptor of the process.
func (t *tracee) take(fd int) (int, error) {
	pidfd, err := unix.PidfdOpen(t.pid, 0)
	if err != nil {
		return -1, fmt.Errorf("open pidfd of process %d: %w", t.pid, err)
	}
	defer unix.Close(pidfd)
	return unix.PidfdGetfd(pidfd, fd, 0)
}

func (t *tracee) read(at uint64, p []byte) error {
	return t.transfer(unix.ProcessVMReadv, at, p)
}

func (t *tracee) write(at uint64, p []byte) error {
	return t.transfer(unix.ProcessVMWritev, at, p)
}

func (t *tracee) transfer(do func(int, []unix.Iovec, []unix.RemoteIovec, uint) (int, error), at uint64, p []byte) error {
	here := []unix.Iovec{{Base: unsafe.SliceData(p), Len: uint64(len(p))}}
	n, err := do(t.pid, here, []unix.RemoteIovec{{Base: uintptr(at), Len: len(p)}}, 0)
	if err == nil && n != len(p) {
		err = unix.EFAULT
	}
	if err != nil {
		return fmt.Errorf("transfer %d bytes at %#x of process %d: %w", len(p), at, t.pid, err)
	}
	return nil
}
