package qemu

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// process is a QEMU process: our child, or one that was adopted.
type process struct {
	pid    int
	start  uint64   // clock ticks since boot; with pid, the process's identity
	pidfd  *os.File // nil for a child, for which os.Process has its own
	child  *exec.Cmd
	stderr *tail

	ended  chan struct{} // closed when the process has ended and, if ours, been reaped
	status string        // how it ended, once it has; "" if unknown
	clean  bool          // it ended with status 0
}

// spawn starts a prepared command, in a session of its own: then a Ctrl-C at our terminal does not reach it, nor the SIGHUP
// that the kernel has for a stopped process whose parent's end leaves its process group without anybody in the same session
// (setpgid(2), "orphaned"). QEMU would shut down, though the next owner was to let it go on.
func spawn(cmd *exec.Cmd, start func(*exec.Cmd) error, log *slog.Logger) (*process, error) {
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
		r.Close()
		if cmd.Process != nil { // the hook failed after the start
			cmd.Process.Kill()
			cmd.Wait()
		}
		return nil, fmt.Errorf("start QEMU: %w", err)
	}
	p := &process{pid: cmd.Process.Pid, child: cmd, stderr: new(tail), ended: make(chan struct{})}
	p.start, _ = startTime(p.pid)
	go func() {
		defer close(p.ended)
		// Its words come before its end: the pipe is empty for good once it and all that inherited it have ended.
		p.stderr.collect(r, log)
		r.Close()
		cmd.Wait()
		p.status, p.clean = cmd.ProcessState.String(), cmd.ProcessState.Success()
	}()
	return p, nil
}

// adopt takes a process that may have any parent. Its stderr went to the former owner.
func adopt(id identity) (*process, error) {
	fd, err := unix.PidfdOpen(id.PID, unix.PIDFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("process %d: %w", id.PID, err)
	}
	p := &process{pid: id.PID, start: id.Start, pidfd: os.NewFile(uintptr(fd), "pidfd"), stderr: new(tail), ended: make(chan struct{})}
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
		defer close(p.ended)
		raw.Read(func(fd uintptr) bool { // a pidfd is readable when the process has ended
			n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
			return n > 0 || err != nil && err != unix.EINTR
		})
	}()
	return p, nil
}

// kill ends the process; ended is closed soon after.
func (p *process) kill() {
	if p.child != nil {
		p.child.Process.Kill()
		return
	}
	if raw, err := p.pidfd.SyscallConn(); err == nil {
		raw.Control(func(fd uintptr) { unix.PidfdSendSignal(int(fd), unix.SIGKILL, nil, 0) })
	}
}

// release frees what we hold of an ended process.
func (p *process) release() {
	if p.pidfd != nil {
		p.pidfd.Close()
	}
}

// identityFile is the file in Config.Dir that says which process the machine is.
const identityFile = "qemu.json"

type identity struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"` // clock ticks since boot, field 22 of /proc/PID/stat
}

func (id identity) write(dir string) error {
	text, err := json.Marshal(id)
	if err != nil {
		return err
	}
	path := filepath.Join(dir, identityFile)
	if err := os.WriteFile(path+".tmp", text, 0o600); err != nil {
		return err
	}
	return os.Rename(path+".tmp", path)
}

func readIdentity(dir string) (identity, error) {
	var id identity
	text, err := os.ReadFile(filepath.Join(dir, identityFile))
	if err != nil {
		return id, err
	}
	if err := json.Unmarshal(text, &id); err != nil || id.PID <= 1 {
		return id, fmt.Errorf("%s: not the identity of a process: %q", filepath.Join(dir, identityFile), text)
	}
	return id, nil
}

// alive reports whether the process still exists.
func (id identity) alive() bool {
	start, err := startTime(id.PID)
	return err == nil && start == id.Start
}

// startTime returns field 22 of /proc/PID/stat; zombies count as ended.
func startTime(pid int) (uint64, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// Field 2, the program's name, may contain anything, but the last parenthesis ends it.
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	if len(fields) < 20 {
		return 0, fmt.Errorf("parse /proc/%d/stat", pid)
	}
	if fields[0] == "Z" || fields[0] == "X" {
		return 0, errors.New("it has ended")
	}
	return strconv.ParseUint(fields[19], 10, 64)
}

// tail keeps the end of what a process said.
type tail struct {
	mu   sync.Mutex // guards text
	text []byte
}

// maxTail bounds a tail, in bytes.
const maxTail = 4 << 10

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.text = append(t.text, p...)
	if over := len(t.text) - maxTail; over > 0 {
		t.text = append(t.text[:0], t.text[over:]...)
	}
	return len(p), nil
}

// collect reads r to its end, into the tail and, line by line, into a log.
func (t *tail) collect(r io.Reader, log *slog.Logger) {
	buf := make([]byte, 4<<10)
	for {
		n, err := r.Read(buf)
		t.Write(buf[:n])
		if n > 0 {
			log.Debug("QEMU says", "stderr", strings.TrimSpace(string(buf[:n])))
		}
		if err != nil {
			return
		}
	}
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.TrimSpace(string(t.text))
}

// explain adds QEMU's words to an error.
func (t *tail) explain(err error) error {
	words := t.String()
	if err == nil || words == "" {
		return err
	}
	return fmt.Errorf("%w: QEMU says: %s", err, words)
}
