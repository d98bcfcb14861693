package ram

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// canInject says that this architecture's tracee works.
const canInject = true

// tracee is a process stopped by ptrace before its first instruction, made to execute system calls of our choice. All
// methods must be called on the thread that traces it.
type tracee struct {
	pid  int
	regs unix.PtraceRegs // as they were
	text [2]byte         // what was at regs.Rip
}

// open saves the state that call disturbs and close restores.
func (t *tracee) open() error {
	if err := unix.PtraceGetRegs(t.pid, &t.regs); err != nil {
		return fmt.Errorf("read registers of process %d: %w", t.pid, err)
	}
	const userCS64 = 0x33 // __USER_CS of asm/segment.h: 64-bit code
	if t.regs.Cs != userCS64 {
		return fmt.Errorf("process %d is not a 64-bit program", t.pid)
	}
	if _, err := unix.PtracePeekText(t.pid, uintptr(t.regs.Rip), t.text[:]); err != nil {
		return fmt.Errorf("read text of process %d: %w", t.pid, err)
	}
	if _, err := unix.PtracePokeText(t.pid, uintptr(t.regs.Rip), []byte{0x0f, 0x05}); err != nil { // syscall
		return fmt.Errorf("write text of process %d: %w", t.pid, err)
	}
	return nil
}

func (t *tracee) close() error {
	if _, err := unix.PtracePokeText(t.pid, uintptr(t.regs.Rip), t.text[:]); err != nil {
		return fmt.Errorf("restore text of process %d: %w", t.pid, err)
	}
	if err := unix.PtraceSetRegs(t.pid, &t.regs); err != nil {
		return fmt.Errorf("restore registers of process %d: %w", t.pid, err)
	}
	return nil
}

// scratch is the address of some KB that the process has no use for, before its first instruction: below its stack, which is mapped.
func (t *tracee) scratch() uint64 { return (t.regs.Rsp - 16<<10) &^ 15 }

// call executes one system call. The error is an errno of the call, or wraps errInject when it could not be executed.
func (t *tracee) call(nr uint64, args ...uint64) (uint64, error) {
	regs := t.regs
	var a [6]uint64
	copy(a[:], args)
	regs.Rax, regs.Rdi, regs.Rsi, regs.Rdx, regs.R10, regs.R8, regs.R9 = nr, a[0], a[1], a[2], a[3], a[4], a[5]
	regs.Orig_rax = ^uint64(0) // not inside a system call: the kernel must not restart execve
	if err := unix.PtraceSetRegs(t.pid, &regs); err != nil {
		return 0, fmt.Errorf("%w %d: %w", errInject, t.pid, err)
	}
	if err := unix.PtraceSingleStep(t.pid); err != nil {
		return 0, fmt.Errorf("%w %d: %w", errInject, t.pid, err)
	}
	if err := awaitTrap(t.pid); err != nil {
		return 0, fmt.Errorf("%w %d: %w", errInject, t.pid, err)
	}
	if err := unix.PtraceGetRegs(t.pid, &regs); err != nil {
		return 0, fmt.Errorf("%w %d: %w", errInject, t.pid, err)
	}
	const maxErrno = 4095 // of linux/err.h
	if result := int64(regs.Rax); result < 0 && result >= -maxErrno {
		return 0, unix.Errno(-result)
	}
	return regs.Rax, nil
}

// memoryCall is what a process that is stopped before a system call asks for, if that is about memory.
func memoryCall(regs *unix.PtraceRegs) call {
	return call{nr: regs.Orig_rax, addr: regs.Rdi, length: regs.Rsi, prot: regs.Rdx, flags: regs.R10}
}

// skip has the system call not be made, setResult says what it returns.
func skip(regs *unix.PtraceRegs) { regs.Orig_rax = ^uint64(0) }

func setResult(regs *unix.PtraceRegs, result uint64) { regs.Rax = result }

var errInject = errors.New("execute a system call in process")
