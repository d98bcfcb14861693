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

// call executes one system call. The error is an errno of the call, or wraps errInject when it could not be executed.
func (t *tracee) call(nr, a, b, c uint64) (int, error) {
	regs := t.regs
	regs.Rax, regs.Rdi, regs.Rsi, regs.Rdx = nr, a, b, c
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
	if result := int64(regs.Rax); result < 0 {
		return 0, unix.Errno(-result)
	}
	return int(regs.Rax), nil
}

var errInject = errors.New("execute a system call in process")
