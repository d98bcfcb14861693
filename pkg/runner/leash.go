package runner

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// leash ends a machine together with this process, however that ends, for as long as the machine is of no use to anybody else:
// before the guest may run, and where what it is for can only be made anew.
//
// It is a pipe. The machine inherits the reading end and knows nothing of it; the writing end is this process's alone. When
// that is closed, the kernel has a signal for the owner of the reading end (fcntl(2), O_ASYNC, F_SETOWN, F_SETSIG), which is
// the machine, and the signal is SIGKILL. So nothing has to run, or to answer, for that: neither the machine, which may be
// stopped, nor a process that watches. PR_SET_PDEATHSIG is no way to do this: it counts the death of a thread, and the machine
// would have to take it back itself.
type leash struct {
	machine *os.File // the reading end: one open file with the machine's, and so are its flags
	hand    *os.File
}

func newLeash() (*leash, error) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		return nil, fmt.Errorf("make a pipe: %w", err)
	}
	return &leash{os.NewFile(uintptr(fds[0]), "leash"), os.NewFile(uintptr(fds[1]), "leash")}, nil
}

// fasten puts a process on the leash that has inherited l.machine.
func (l *leash) fasten(pid int) error {
	if l == nil {
		return nil
	}
	for _, set := range []struct{ command, value int }{{unix.F_SETSIG, int(unix.SIGKILL)}, {unix.F_SETOWN, pid}, {unix.F_SETFL, unix.O_ASYNC}} {
		if _, err := unix.FcntlInt(l.machine.Fd(), set.command, set.value); err != nil {
			return fmt.Errorf("have process %d end with this one: %w", pid, err)
		}
	}
	return nil
}

// release lets the machine outlive this process. It may be called again, and of a machine that was never on a leash.
func (l *leash) release() error {
	if l == nil || l.hand == nil {
		return nil
	}
	if _, err := unix.FcntlInt(l.machine.Fd(), unix.F_SETFL, 0); err != nil {
		return fmt.Errorf("let the machine outlive this process: %w", err)
	}
	closeFiles(l.machine, l.hand)
	l.machine, l.hand = nil, nil
	return nil
}
