package process

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Process is a VMM's process: our child, or one that was adopted.
type Process struct {
	Identity
	name   string    // of the VMM, for people
	pidfd  *os.File  // nil for a child, for which os.Process has its own
	child  *exec.Cmd // nil for one that was adopted
	Stderr *Tail

	Ended  chan struct{} // closed when the process has ended and, if ours, been reaped
	Status string        // how it ended, once it has; "" if unknown
	Clean  bool          // it ended with status 0
}

// Start starts a prepared command of a VMM called name, by start if that is not nil, in a session of its own: then a Ctrl-C at our terminal does not reach it, nor the SIGHUP
// that the kernel has for a stopped process whose parent's end leaves its process group without anybody in the same session
// (setpgid(2), "orphaned"). It would shut down, though the next owner was to let it go on.
func Start(cmd *exec.Cmd, name string, start func(*exec.Cmd) error, log *slog.Logger) (*Process, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	cmd.Stderr = w
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = new(syscall.SysProcAttr)
	}
	cmd.SysProcAttr.Setsid = true
	if start == nil {
		start = (*exec.Cmd).Start
	}
	err = start(cmd)
	w.Close()
	if err != nil {
		defer r.Close()
		err = fmt.Errorf("start %s: %w", name, err)
		if cmd.Process != nil { // the hook failed after the start
			cmd.Process.Kill()
			cmd.Wait()
			words := NewTail(name)
			words.last(r)
			err = words.Explain(err)
		}
		return nil, err
	}
	p := &Process{Identity: Identity{PID: cmd.Process.Pid}, name: name, child: cmd, Stderr: NewTail(name), Ended: make(chan struct{})}
	p.Identity.Start, _ = startTime(p.PID)
	go func() {
		defer close(p.Ended)
		// Its words come before its end: the pipe is empty for good once it and all that inherited it have ended.
		_, _ = io.Copy(p.Stderr.Log(log), r) // its end is all there is to know
		r.Close()
		cmd.Wait()
		p.Status, p.Clean = cmd.ProcessState.String(), cmd.ProcessState.Success()
	}()
	return p, nil
}

// Adopt takes a process that may have any parent. Its stderr went to the former owner.
func Adopt(id Identity, name string) (*Process, error) {
	fd, err := unix.PidfdOpen(id.PID, unix.PIDFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("process %d: %w", id.PID, err)
	}
	p := &Process{Identity: id, name: name, pidfd: os.NewFile(uintptr(fd), "pidfd"), Stderr: NewTail(name), Ended: make(chan struct{})}
	// Only now that the descriptor holds the process is it certain whom the number means.
	if start, err := startTime(id.PID); err != nil || start != id.Start {
		p.pidfd.Close()
		return nil, fmt.Errorf("process %d is another one: the machine's has ended", id.PID)
	}
	raw, err := p.pidfd.SyscallConn()
	if err != nil {
		p.pidfd.Close()
		return nil, err
	}
	go func() {
		defer close(p.Ended)
		raw.Read(func(fd uintptr) bool { // a pidfd is readable when the process has ended
			n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
			return n > 0 || err != nil && err != unix.EINTR
		})
	}()
	return p, nil
}

// Kill ends the process; Ended is closed soon after.
func (p *Process) Kill() {
	if p.child != nil {
		p.child.Process.Kill()
		return
	}
	if raw, err := p.pidfd.SyscallConn(); err == nil {
		raw.Control(func(fd uintptr) { unix.PidfdSendSignal(int(fd), unix.SIGKILL, nil, 0) })
	}
}

// Release frees what we hold of an ended process.
func (p *Process) Release() {
	if p.pidfd != nil {
		p.pidfd.Close()
	}
}

// Child reports whether it is ours, rather than adopted.
func (p *Process) Child() bool { return p.child != nil }

// Identity says which process is meant, whatever its number means later.
type Identity struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"` // clock ticks since boot, field 22 of /proc/PID/stat
}

// Write writes it to a file, from which Read has it.
func (id Identity) Write(path string) error {
	text, err := json.Marshal(id)
	if err != nil {
		return err
	}
	if err := os.WriteFile(path+".tmp", text, 0o600); err != nil {
		return err
	}
	return os.Rename(path+".tmp", path)
}

// Read reads what Write has written.
func Read(path string) (Identity, error) {
	var id Identity
	text, err := os.ReadFile(path)
	if err != nil {
		return id, err
	}
	if err := json.Unmarshal(text, &id); err != nil || id.PID <= 1 {
		return id, fmt.Errorf("%s: not the identity of a process: %q", path, text)
	}
	return id, nil
}

// Alive reports whether the process still exists.
func (id Identity) Alive() bool {
	start, err := startTime(id.PID)
	return err == nil && start == id.Start
}

// Ending reports whether the process has been killed and has not ended: one of its threads may be waiting for what cannot be interrupted.
func (id Identity) Ending() bool {
	fields, err := statOf(id.PID)
	if err != nil || fields[19] != strconv.FormatUint(id.Start, 10) {
		return false
	}
	const exiting = 0x4 // PF_EXITING of linux/sched.h
	if flags, err := strconv.ParseUint(fields[6], 10, 64); fields[0] == "Z" || err == nil && flags&exiting != 0 {
		return true
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", id.PID))
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(status)) {
		name, value, _ := strings.Cut(line, ":")
		pending, err := strconv.ParseUint(strings.TrimSpace(value), 16, 64)
		if (name == "SigPnd" || name == "ShdPnd") && err == nil && pending&(1<<(syscall.SIGKILL-1)) != 0 {
			return true
		}
	}
	return false
}

// startTime returns field 22 of /proc/PID/stat; zombies count as ended.
func startTime(pid int) (uint64, error) {
	fields, err := statOf(pid)
	if err != nil {
		return 0, err
	}
	if fields[0] == "Z" || fields[0] == "X" {
		return 0, errors.New("it has ended")
	}
	return strconv.ParseUint(fields[19], 10, 64)
}

// statOf are the fields of /proc/PID/stat from the third on, 20 at least (proc_pid_stat(5)).
func statOf(pid int) ([]string, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return nil, err
	}
	// Field 2, the program's name, may contain anything, but the last parenthesis ends it.
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	if len(fields) < 20 {
		return nil, fmt.Errorf("parse /proc/%d/stat", pid)
	}
	return fields, nil
}

// Tail keeps the end of what a process said.
type Tail struct {
	name string
	mu   sync.Mutex // guards text
	text []byte
}

// NewTail makes the tail of a VMM called name.
func NewTail(name string) *Tail { return &Tail{name: name} }

// maxTail bounds a tail, in bytes.
const maxTail = 4 << 10

// Write implements [io.Writer].
func (t *Tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.text = append(t.text, p...)
	if over := len(t.text) - maxTail; over > 0 {
		t.text = append(t.text[:0], t.text[over:]...)
	}
	return len(p), nil
}

// Log is a writer into the tail and, line by line, into a log.
func (t *Tail) Log(log *slog.Logger) io.Writer { return tailLog{t, log} }

type tailLog struct {
	*Tail
	log *slog.Logger
}

func (l tailLog) Write(p []byte) (int, error) {
	if len(p) > 0 {
		l.log.Debug("the VMM says", "vmm", l.name, "stderr", strings.TrimSpace(string(p)))
	}
	return l.Tail.Write(p)
}

// last reads what a process that has ended has left in the pipe r. Others that inherited it may live.
func (t *Tail) last(r *os.File) {
	_ = r.SetReadDeadline(time.Now().Add(lastWords))
	_, _ = io.Copy(t, r) // until the deadline, at most
}

// lastWords is how long a process that has ended is listened to.
const lastWords = 100 * time.Millisecond

func (t *Tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.TrimSpace(string(t.text))
}

// Explain adds the VMM's words to an error.
func (t *Tail) Explain(err error) error {
	words := t.String()
	if err == nil || words == "" {
		return err
	}
	return fmt.Errorf("%w: %s says: %s", err, t.name, words)
}
