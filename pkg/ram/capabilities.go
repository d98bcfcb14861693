package ram

import (
	"fmt"
	"os/exec"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"
)

// Rung is a step of the ladder of what can be done for a VMM's RAM on this host. Lower rungs cost more and give the
// same contents.
type Rung int

const (
	// Full: writes are tracked by the kernel (userfaultfd WP_ASYNC and PAGEMAP_SCAN, Linux 6.7) and RAM is filled while
	// the guest runs.
	Full Rung = iota
	// Lazy: RAM is filled while the guest runs (userfaultfd, Linux 5.7; pidfd_getfd 5.6); written pages are found by
	// hashing all of RAM.
	Lazy
	// Eager: RAM must be full before the guest runs; written pages are found by hashing. Nothing is asked of the kernel.
	Eager
)

func (r Rung) String() string {
	switch r {
	case Full:
		return "full"
	case Lazy:
		return "lazy"
	case Eager:
		return "eager"
	}
	return fmt.Sprintf("Rung(%d)", int(r))
}

// Names of Capabilities.Tracking.
const (
	TrackingUserfaultfd = "userfaultfd-wp" // by the kernel; costs nothing while not tracking and little while
	TrackingHashing     = "hashing"        // by comparing hashes: each Collect reads all of RAM
)

// Capabilities is what can be done for one VMM's RAM: chosen once, when the VMM is started or adopted.
type Capabilities struct {
	Rung     Rung   // the best way that this host has
	Tracking string // TrackingUserfaultfd or TrackingHashing
	Lazy     bool   // the guest may run while its RAM is being filled
	Reason   string // why it is not better; empty on Full
}

func (c Capabilities) String() string {
	s := fmt.Sprintf("%s (tracking by %s, lazy %t)", c.Rung, c.Tracking, c.Lazy)
	if c.Reason != "" {
		s += ": " + c.Reason
	}
	return s
}

func capabilities(r Rung, reason string) Capabilities {
	switch r {
	case Full:
		return Capabilities{Rung: Full, Tracking: TrackingUserfaultfd, Lazy: true, Reason: reason}
	case Lazy:
		return Capabilities{Rung: Lazy, Tracking: TrackingHashing, Lazy: true, Reason: reason}
	default:
		return Capabilities{Rung: Eager, Tracking: TrackingHashing, Reason: reason}
	}
}

// Probe says what [Spawn] can be expected to do for a VMM that runs with this process's credentials. The answer is found
// once, by starting this program again and ending it before its first instruction (a millisecond), and remembered.
func Probe() Capabilities { return probe().Capabilities }

type probed struct {
	Capabilities
	traceable bool // we may trace our children
}

var probe = sync.OnceValue(func() probed {
	if !canInject {
		return probed{capabilities(Eager, errInject.Error()), false}
	}
	// The child never executes anything: it is killed at the stop that follows its execve.
	cmd := exec.Command("/proc/self/exe")
	h, err := spawnTraced(cmd, Options{Started: func(pid int) error { return unix.Kill(pid, unix.SIGKILL) }})
	if err != nil {
		return probed{capabilities(Eager, fmt.Sprintf("children cannot be traced with ptrace: %v", err)), false}
	}
	c := h.Capabilities()
	h.Close()
	_ = cmd.Wait() // killed by us
	return probed{c, true}
})

// negotiateRung turns what UFFDIO_API grants on a new userfaultfd into a rung, trying from limit downwards. It takes over
// fd, and returns nil on Eager.
func negotiateRung(fd int, limit Rung) (*uffd, Capabilities) {
	reason := fmt.Sprintf("limited to %s by configuration", limit)
	if limit == Full {
		err := negotiate(fd, featuresFull)
		if err == nil {
			return newUFFD(fd), capabilities(Full, "")
		}
		reason = fmt.Sprintf("this kernel cannot track writes asynchronously (Linux 6.7 can): %v", err)
	}
	if err := negotiate(fd, featuresLazy); err != nil {
		_ = unix.Close(fd)
		return nil, capabilities(Eager, fmt.Sprintf("this kernel cannot catch faults on shared memory: %v", err))
	}
	return newUFFD(fd), capabilities(Lazy, reason)
}

// onThread runs f on a thread of its own goroutine's that no other goroutine uses meanwhile, with every signal blocked
// that may be, and hands f the mask that was in force before.
func onThread(f func(mask *unix.Sigset_t) error) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var block, old unix.Sigset_t
	for i := range block.Val {
		block.Val[i] = ^block.Val[i]
	}
	// Blocked, the trap that ptrace waits for would stay pending for ever, and synchronous faults would kill.
	for _, sig := range []unix.Signal{unix.SIGTRAP, unix.SIGSEGV, unix.SIGBUS, unix.SIGFPE, unix.SIGILL} {
		block.Val[0] &^= 1 << (sig - 1)
	}
	if err := unix.PthreadSigmask(unix.SIG_SETMASK, &block, &old); err != nil {
		return fmt.Errorf("block signals: %w", err)
	}
	defer func() { _ = unix.PthreadSigmask(unix.SIG_SETMASK, &old, nil) }()
	return f(&old)
}
