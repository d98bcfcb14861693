package ram

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ErrProcessEnded is wrapped by errors that come of the end of the VMM's process.
var ErrProcessEnded = errors.New("process of the VMM has ended")

// Options tune [Spawn] and [Adopt]. The zero value asks for the best there is.
type Options struct {
	// Limit is the highest rung to use; [Full] if zero. Lower ones are for tests and for working around a kernel.
	Limit Rung

	// Graft is a memory that the VMM is to use for its guest though it allocates that by itself. It is mapped into the VMM before its
	// first instruction; [Memory.Graft] gives it. That takes ptrace: without it, Spawn fails. What the VMM gives back of it to the kernel
	// is freed, see [Memory.Frees].
	Graft *Memory

	// Wrapped says that the command executes the VMM in the same process, and closes what it has inherited before, as Firecracker's jailer does:
	// the command's ExtraFiles are given to the VMM itself. It must not fork.
	Wrapped bool

	// Started, if set, is called with the process id before the command's first instruction (where ptrace is not allowed: at once after it was
	// started), and its error ends the command. Should this process die before Started has returned, however it dies, the command ends too:
	// but not where ptrace is not allowed, nor one that just then executes a file with a set-user-ID or with capabilities (PR_SET_PDEATHSIG(2const)).
	Started func(pid int) error
}

// Handle is a VMM process as this package holds it: its pidfd, and the userfaultfd planted in it if that could be done.
// Give it to [Memory.Attach], which then owns it, or Close it. All methods may be called concurrently.
type Handle struct {
	pid     int
	pidfd   *os.File
	uffd    *uffd // nil on Eager
	caps    Capabilities
	adopted bool
	grafted uint64 // where Options.Graft is mapped; 0: it is not

	// releases are what the VMM gives back of what was grafted; nil: it cannot. Whoever has attached the handle serves them.
	releases *os.File

	done      chan struct{} // closed when the process has ended
	watcher   sync.WaitGroup
	closeOnce sync.Once
}

// PID is the VMM's process id.
func (h *Handle) PID() int { return h.pid }

// Capabilities says what can be done for this VMM's RAM, and why not more.
func (h *Handle) Capabilities() Capabilities { return h.caps }

// Done is closed when the process has ended, reaped or not. It is never closed once the handle is.
func (h *Handle) Done() <-chan struct{} { return h.done }

// Close lets go of the process, which goes on undisturbed: it has its own reference to its userfaultfd, so a thread
// that waits for a page goes on waiting. It is idempotent.
func (h *Handle) Close() error {
	h.closeOnce.Do(func() {
		_ = h.pidfd.SetReadDeadline(time.Unix(1, 0))
		h.watcher.Wait()
		_ = h.pidfd.Close()
		if h.uffd != nil {
			_ = h.uffd.close()
		}
		if h.releases != nil {
			_ = h.releases.Close()
		}
	})
	return nil
}

// newHandle takes over pidfd, which must be nonblocking.
func newHandle(pid, pidfd int) *Handle {
	h := &Handle{pid: pid, pidfd: os.NewFile(uintptr(pidfd), "pidfd"), done: make(chan struct{})}
	h.watcher.Go(func() {
		raw, err := h.pidfd.SyscallConn()
		if err != nil {
			return
		}
		// A pidfd becomes readable when its process ends (pidfd_open(2)); it fails only by the deadline of Close.
		if raw.Read(func(fd uintptr) bool { return readable(int(fd)) }) == nil {
			close(h.done)
		}
	})
	return h
}

func readable(fd int) bool {
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		if err != unix.EINTR {
			return n > 0
		}
	}
}

// Spawn starts cmd, which must be the VMM itself unless [Options.Wrapped] says otherwise, as cmd.Start would, and plants a
// userfaultfd in it before its first instruction. Afterwards cmd is like any started command: its owner calls cmd.Wait.
// An error means that it was not started. That no userfaultfd could be planted is not an error: the capabilities of the
// handle say so.
//
// The command is started from the calling goroutine's thread, so namespaces and other properties that the caller gave
// the thread are inherited. It is traced from its execve for about a tenth of a millisecond; signals sent to it
// meanwhile are delivered afterwards. For a command with other credentials than ours, /dev/userfaultfd is opened here
// and inherited for that time: the command needs no privilege.
func Spawn(cmd *exec.Cmd, opts Options) (*Handle, error) {
	if opts.Limit < Full || opts.Limit > Eager {
		return nil, fmt.Errorf("start %q: rung %d does not exist, use Full, Lazy or Eager", cmd.Path, opts.Limit)
	}
	if opts.Limit == Eager && opts.Graft == nil && !opts.Wrapped {
		return spawnPlain(cmd, opts, "limited to eager by configuration")
	}
	// Whether ptrace is allowed must be known before: a failed cmd.Start cannot be repeated.
	if p := probe(); !p.traceable {
		if opts.Graft != nil || opts.Wrapped {
			return nil, fmt.Errorf("start %q: its memory and files are given to it by ptrace(2): %s", cmd.Path, p.Reason)
		}
		return spawnPlain(cmd, opts, p.Reason)
	}
	return spawnTraced(cmd, opts)
}

func spawnPlain(cmd *exec.Cmd, opts Options, reason string) (*Handle, error) {
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	if err := opts.started(cmd.Process.Pid); err != nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		return nil, err
	}
	return withPidfd(cmd, reason)
}

func (o Options) started(pid int) error {
	if o.Started == nil {
		return nil
	}
	return o.Started(pid)
}

// withPidfd makes the handle of a started command, or ends the command.
func withPidfd(cmd *exec.Cmd, reason string) (*Handle, error) {
	pid := cmd.Process.Pid
	// Until somebody waits for it the process id cannot be reused.
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		return nil, fmt.Errorf("open pidfd of process %d: %w", pid, err)
	}
	h := newHandle(pid, fd)
	h.caps = capabilities(Eager, reason)
	return h, nil
}

// unprivileged reports whether cmd will run without our capabilities, and so needs /dev/userfaultfd.
func unprivileged(cmd *exec.Cmd) bool {
	attr := cmd.SysProcAttr
	return attr != nil && (attr.Credential != nil || attr.Cloneflags&unix.CLONE_NEWUSER != 0)
}

// spawnTraced is Spawn where ptrace is allowed.
func spawnTraced(cmd *exec.Cmd, opts Options) (h *Handle, err error) {
	attr, extra := cmd.SysProcAttr, cmd.ExtraFiles
	defer func() { cmd.SysProcAttr, cmd.ExtraFiles = attr, extra }()
	traced := syscall.SysProcAttr{}
	if attr != nil {
		traced = *attr
	}
	traced.Ptrace = true
	deathsig := traced.Pdeathsig
	traced.Pdeathsig = unix.SIGKILL // until it is stopped, and the tracing sees to that
	cmd.SysProcAttr = &traced

	files := slices.Clip(extra)
	inherited := -1 // number of /dev/userfaultfd in the child
	if unprivileged(cmd) || opts.Wrapped {
		// Without the device the plain system call may still do (vm.unprivileged_userfaultfd).
		if dev, err := os.OpenFile("/dev/userfaultfd", os.O_RDWR, 0); err == nil {
			defer dev.Close()
			inherited = firstPassed + len(files)
			files = append(files, dev)
		}
	}
	memory := -1
	if opts.Graft != nil {
		memory = firstPassed + len(files)
		files = append(files, opts.Graft.file)
	}
	if cmd.ExtraFiles = files; opts.Wrapped {
		cmd.ExtraFiles = nil
	}

	// ptrace ties a tracee to one thread of the tracer: the one that forks it. With signals blocked on that thread the
	// child is born with them blocked, so that none arrives between its stops; setSignalMask gives it its real mask.
	err = onThread(func(mask *unix.Sigset_t) error {
		if err := cmd.Start(); err != nil {
			return err
		}
		pid := cmd.Process.Pid
		fd, reason, grafted := -1, "", uint64(0)
		var releases *os.File
		var fatal error
		if err := hold(pid); err != nil {
			reason = fmt.Sprintf("trace process %d: %v", pid, err)
			if opts.Graft != nil || opts.Wrapped || !errors.Is(err, ErrProcessEnded) {
				fatal = errors.New(reason)
			}
		} else {
			if opts.Wrapped {
				fatal = unwrap(pid, files)
			}
			if opts.Graft != nil && fatal == nil {
				if grafted, fatal = mapInto(pid, memory, opts.Graft); fatal == nil {
					releases, fatal = guard(pid, grafted, uint64(opts.Graft.size))
				}
			}
			switch {
			case fatal != nil:
			case opts.Limit == Eager:
				reason = "limited to eager by configuration"
			default:
				fd, reason, fatal = plant(pid, inherited)
			}
			if fatal == nil {
				if err := setDeathSignal(pid, deathsig); err != nil && !gone(err) {
					fatal = err
				}
			}
			if err := setSignalMask(pid, mask); err != nil && fatal == nil && !gone(err) {
				fatal = fmt.Errorf("restore signal mask of process %d: %w", pid, err)
			}
			if fatal == nil {
				fatal = opts.started(pid)
			}
			if fatal != nil {
				_ = unix.Kill(pid, unix.SIGKILL)
			}
			// Gone already: killed by somebody, which is not for us to report.
			if err := unix.PtraceDetach(pid); err != nil && fatal == nil && !gone(err) {
				fatal = fmt.Errorf("detach from process %d: %w", pid, err)
			}
		}
		if fatal != nil {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		} else if h, fatal = withPidfd(cmd, reason); fatal == nil && fd >= 0 {
			h.uffd, h.caps = negotiateRung(fd, opts.Limit)
			fd = -1
		}
		if h != nil {
			h.grafted, h.releases = grafted, releases
		} else if releases != nil {
			_ = releases.Close()
		}
		if fd >= 0 {
			_ = unix.Close(fd)
		}
		return fatal
	})
	if err != nil {
		return nil, err
	}
	return h, nil
}

// gone reports whether an error comes of a process that somebody has killed.
func gone(err error) bool { return errors.Is(err, unix.ESRCH) || errors.Is(err, ErrProcessEnded) }

// hold waits until the traced process stops before its first instruction. From then on it dies with this thread, and does not run on: half
// of what is to be done to it may have been done.
func hold(pid int) error {
	if err := awaitTrap(pid); err != nil {
		return err
	}
	err := unix.PtraceSetOptions(pid, unix.PTRACE_O_EXITKILL)
	if errors.Is(err, unix.ESRCH) {
		err = ErrProcessEnded
	}
	return err
}

// setDeathSignal has the stopped process get sig when the thread ends that started it (PR_SET_PDEATHSIG(2const)); none if 0.
func setDeathSignal(pid int, sig syscall.Signal) (err error) {
	t := tracee{pid: pid}
	if err = t.open(); err == nil {
		_, err = t.call(unix.SYS_PRCTL, unix.PR_SET_PDEATHSIG, uint64(sig))
		err = errors.Join(err, t.close())
	}
	if err != nil {
		return fmt.Errorf("set the signal that process %d gets at our end: %w", pid, err)
	}
	return nil
}

// unwrap waits for the VMM, and gives it what the program before it would have closed.
func unwrap(pid int, files []*os.File) (err error) {
	if err := awaitExec(pid); err != nil {
		return fmt.Errorf("wait for process %d to execute the VMM: %w", pid, err)
	}
	t := tracee{pid: pid}
	if err := t.open(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, t.close()) }()
	return t.pass(files)
}

// mapInto maps a memory, of which the stopped process has inherited the descriptor, and returns where.
func mapInto(pid, fd int, m *Memory) (addr uint64, err error) {
	t := tracee{pid: pid}
	if err := t.open(); err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, t.close()) }()
	// At an address where huge pages can be: there is a place for it in a mapping that is larger by one.
	const private = unix.MAP_PRIVATE | unix.MAP_ANONYMOUS | unix.MAP_NORESERVE
	size := uint64(m.size)
	place, err := t.call(unix.SYS_MMAP, 0, size+HugePage, unix.PROT_NONE, private, ^uint64(0), 0)
	if err == nil {
		addr = (place + HugePage - 1) &^ (HugePage - 1)
		_, err = t.call(unix.SYS_MMAP, addr, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_NORESERVE|unix.MAP_FIXED, uint64(fd), 0)
	}
	for _, rest := range []uffdRange{{place, addr - place}, {addr + size, place + HugePage - addr}} {
		if err == nil && rest.len > 0 {
			_, err = t.call(unix.SYS_MUNMAP, rest.start, rest.len)
		}
	}
	if err != nil {
		return 0, fmt.Errorf("map memory %q into process %d: %w", m.name, pid, err)
	}
	// Allowed to those who ask for them, huge pages are given to a guest that boots as it comes to touch them. No kernel needs to have any.
	_, _ = t.call(unix.SYS_MADVISE, addr, size, unix.MADV_HUGEPAGE)
	return addr, nil
}

// plant makes the stopped process create a userfaultfd and takes a copy of it. It returns the descriptor, or the reason
// why there is none, or an error if the process is no longer fit to run.
func plant(pid, inherited int) (fd int, reason string, fatal error) {
	refuse := func(err error) (int, string, error) { return -1, err.Error(), nil }
	t := tracee{pid: pid}
	if err := t.open(); err != nil {
		return refuse(err)
	}
	defer func() {
		if err := t.close(); err != nil && !errors.Is(err, unix.ESRCH) {
			if fd >= 0 {
				_ = unix.Close(fd)
			}
			fd, fatal = -1, err
		}
	}()

	// Nonblocking, because a blocking userfaultfd cannot be polled.
	const flags = unix.O_CLOEXEC | unix.O_NONBLOCK
	remote, err := t.call(unix.SYS_USERFAULTFD, flags, 0, 0)
	if inherited >= 0 {
		if err != nil {
			var viaDevice error
			if remote, viaDevice = t.call(unix.SYS_IOCTL, uint64(inherited), uffdIOCNew, flags); viaDevice == nil {
				err = nil
			} else {
				err = fmt.Errorf("%w; by /dev/userfaultfd: %w", err, viaDevice)
			}
		}
		if _, closing := t.call(unix.SYS_CLOSE, uint64(inherited), 0, 0); closing != nil && err == nil {
			err = fmt.Errorf("close the inherited /dev/userfaultfd: %w", closing)
		}
	}
	switch {
	case err == nil:
	case errors.Is(err, unix.EPERM):
		return refuse(fmt.Errorf("userfaultfd is not permitted to the VMM (run as root, or allow /dev/userfaultfd): %w", err))
	default:
		return refuse(fmt.Errorf("create userfaultfd in process %d: %w", pid, err))
	}
	if fd, err = t.take(int(remote)); err != nil {
		return refuse(fmt.Errorf("take userfaultfd of process %d: %w", pid, err))
	}
	return fd, "", nil
}

// awaitTrap waits until the traced process stops with SIGTRAP, holding back other signals that stop it meanwhile (only
// SIGSTOP can, as the rest are blocked; its effect is lost, as with a debugger).
func awaitTrap(pid int) error {
	for {
		status, err := awaitStop(pid)
		if err != nil {
			return err
		}
		switch sig := unix.Signal(status); sig {
		case unix.SIGTRAP:
			return nil
		case unix.SIGSEGV, unix.SIGBUS, unix.SIGILL, unix.SIGFPE:
			return fmt.Errorf("stopped by %v", sig)
		}
		if _, _, errno := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_CONT, uintptr(pid), 0, 0, 0, 0); errno != 0 && errno != unix.ESRCH {
			return fmt.Errorf("continue: %w", errno)
		}
	}
}

// awaitStop waits until the traced process stops, and returns with what (si_status of waitid(2)). It never reaps: the end of the process is
// left for cmd.Wait.
func awaitStop(pid int) (status int32, err error) {
	for {
		var info unix.Siginfo
		err := unix.Waitid(unix.P_PID, pid, &info, unix.WEXITED|unix.WSTOPPED|unix.WNOWAIT|unix.WALL, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return 0, fmt.Errorf("wait: %w", err)
		}
		const cldTrapped, cldStopped = 4, 5 // CLD_TRAPPED, CLD_STOPPED of siginfo.h
		if info.Code != cldTrapped && info.Code != cldStopped {
			return 0, ErrProcessEnded
		}
		// The same again, consuming it. A SIGKILL may have ended the stop since: then go round.
		err = unix.Waitid(unix.P_PID, pid, &info, unix.WSTOPPED|unix.WNOHANG|unix.WALL, nil)
		if err == nil && info.Signo != 0 {
			return siginfoStatus(&info), nil
		}
	}
}

// siginfoStatus is si_status of a SIGCHLD: it follows si_signo, si_errno, si_code, padding, si_pid and si_uid.
func siginfoStatus(info *unix.Siginfo) int32 {
	return *(*int32)(unsafe.Add(unsafe.Pointer(info), 24))
}

// setSignalMask replaces the mask of blocked signals of a stopped tracee.
func setSignalMask(pid int, set *unix.Sigset_t) error {
	const kernelSigsetSize = 8 // bytes the kernel's sigset_t has
	_, _, errno := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_SETSIGMASK, uintptr(pid), kernelSigsetSize, uintptr(unsafe.Pointer(set)), 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// Adopt takes hold of a living VMM that another process, since ended, had started with [Spawn]: it finds the
// userfaultfd that the VMM keeps in /proc/PID/fd. Threads of the VMM that wait for a page go on waiting until
// [Memory.Attach] and [Memory.Fill]. Where there is none, the handle is of the Eager rung and says so.
//
// The caller makes sure that pid is still the process it means.
func Adopt(pid int, opts Options) (*Handle, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("adopt process %d: %w", pid, err)
	}
	h := newHandle(pid, fd)
	h.adopted = true
	h.caps = capabilities(Eager, "limited to eager by configuration")
	if opts.Limit == Eager {
		return h, nil
	}
	found, err := findUFFDs(pid)
	if err != nil {
		h.Close()
		return nil, fmt.Errorf("adopt process %d: %w", pid, err)
	}
	if len(found) == 0 {
		h.caps.Reason = fmt.Sprintf("process %d holds no userfaultfd", pid)
		return h, nil
	}
	taken, err := unix.PidfdGetfd(fd, found[0].fd, 0)
	if err != nil {
		h.caps.Reason = fmt.Sprintf("take userfaultfd of process %d: %v", pid, err)
		return h, nil
	}
	switch found[0].features &^ featureInitialized {
	case featuresFull:
		h.uffd, h.caps = newUFFD(taken), capabilities(Full, "")
	case featuresLazy:
		h.uffd, h.caps = newUFFD(taken), capabilities(Lazy, "the VMM was started with lazy RAM only")
	default: // its starter did not get to negotiate
		h.uffd, h.caps = negotiateRung(taken, opts.Limit)
	}
	if opts.Limit > h.caps.Rung {
		h.caps = capabilities(opts.Limit, fmt.Sprintf("limited to %s by configuration", opts.Limit))
	}
	return h, nil
}

type foundUFFD struct {
	fd       int
	features uint64
}

// findUFFDs lists the userfaultfds of a process, those most likely ours first.
func findUFFDs(pid int) ([]foundUFFD, error) {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var found []foundUFFD
	for _, e := range entries {
		if target, err := os.Readlink(dir + "/" + e.Name()); err != nil || target != "anon_inode:[userfaultfd]" {
			continue
		}
		fd, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		info, err := os.ReadFile(fmt.Sprintf("/proc/%d/fdinfo/%d", pid, fd))
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(info)) {
			// API:	aa:8000b020:80000000000001ff (version, features in force, features there are)
			if api, ok := strings.CutPrefix(line, "API:"); ok {
				parts := strings.Split(strings.TrimSpace(api), ":")
				if len(parts) == 3 {
					features, _ := strconv.ParseUint(parts[1], 16, 64)
					found = append(found, foundUFFD{fd, features})
				}
			}
		}
	}
	slices.SortStableFunc(found, func(a, b foundUFFD) int { return cmp.Compare(a.rank(), b.rank()) })
	if len(found) > 0 && found[0].rank() > 2 {
		return nil, nil // only somebody else's
	}
	return found, nil
}

func (f foundUFFD) rank() int {
	switch f.features {
	case featuresFull | featureInitialized:
		return 0
	case featuresLazy | featureInitialized:
		return 1
	case 0:
		return 2
	}
	return 3
}
