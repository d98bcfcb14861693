package transport

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

func checkCommand(_ Options, command string) error {
	if strings.TrimSpace(command) == "" {
		return errors.New("no command given: use exec:COMMAND")
	}
	return nil
}

func dialCommand(ctx context.Context, _ Options, command string) (net.Conn, error) {
	return startCommand(ctx, fmt.Sprintf("program %q", command), exec.Command("/bin/sh", "-c", command))
}

// sshConfig is the parameter for the file that ssh reads instead of its own configuration.
const sshConfig = "config"

// sshTarget takes USER@HOST:PORT/TARGET?config=FILE apart.
func sshTarget(rest string) (u *url.URL, target string, err error) {
	if u, err = url.Parse("ssh://" + rest); err != nil {
		return nil, "", err
	}
	target = strings.TrimPrefix(u.Path, "/")
	switch {
	case u.Hostname() == "" || strings.HasPrefix(u.Hostname(), "-") || strings.HasPrefix(u.User.Username(), "-"):
		return nil, "", errors.New("no host given: use ssh://USER@HOST/TARGET")
	case target == "":
		return nil, "", errors.New("no target given: use ssh://USER@HOST/TARGET, where TARGET is the HOST:PORT that a peer listens on, as HOST sees it (localhost:1337)")
	}
	if err := checkPort(Options{}, target); err != nil {
		return nil, "", fmt.Errorf("target %q: %w", target, err)
	}
	for name := range u.Query() {
		if name != sshConfig {
			return nil, "", fmt.Errorf("unknown parameter %q: use ?%s=FILE, or none", name, sshConfig)
		}
	}
	return u, target, nil
}

func checkSSH(_ Options, rest string) error {
	_, _, err := sshTarget(rest)
	return err
}

// dialSSH has the system's ssh, with its configuration, keys and known hosts, connect to a target at the other end.
func dialSSH(ctx context.Context, _ Options, rest string) (net.Conn, error) {
	u, target, err := sshTarget(rest)
	if err != nil {
		return nil, err
	}
	// No questions: there is nobody to answer them. A link that died is the engine's to notice, and ssh's after that.
	args := []string{"-o", "BatchMode=yes", "-o", "ServerAliveInterval=15", "-o", "ClearAllForwardings=yes", "-W", target}
	if file := u.Query().Get(sshConfig); file != "" {
		args = append(args, "-F", file)
	}
	if u.Port() != "" {
		args = append(args, "-p", u.Port())
	}
	if name := u.User.Username(); name != "" {
		args = append(args, "-l", name)
	}
	return startCommand(ctx, "ssh to "+u.Hostname(), exec.Command("ssh", append(args, "--", u.Hostname())...))
}

// command is a program whose standard input and output are the connection.
type command struct {
	net.Conn
	name  string // for people
	cmd   *exec.Cmd
	spoke atomic.Bool // something has come from it

	said  *lastWords
	errs  *os.File      // its standard error
	heard chan struct{} // closed when nothing more comes from there

	over   chan struct{} // closed when it has ended, but was not reaped: its id, which is its group's, is not another's
	ending ending        // valid when over is closed
	reap   chan struct{} // takes or is closed when it may be reaped
	reaped chan struct{} // closed when it was

	once   sync.Once // guards Close
	closed error     // what it returned
}

// maxWords bounds what is kept of what a program says, in bytes.
const maxWords = 2 << 10

// lastWords keeps the end of what a program says on its standard error.
type lastWords struct {
	mu   sync.Mutex // guards text
	text []byte
}

func (w *lastWords) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.text = append(w.text, p...)
	if over := len(w.text) - maxWords; over > 0 {
		w.text = w.text[over:]
	}
	return len(p), nil
}

func (w *lastWords) String() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return strings.TrimSpace(string(w.text))
}

// ending is how a process has ended.
type ending struct {
	code   int32 // CLD_EXITED and the like
	status int32 // what it says, or the signal
	err    error // it is not known
}

func (e ending) success() bool { return e.err == nil && e.code == cldExited && e.status == 0 }

func (e ending) String() string {
	switch {
	case e.err != nil:
		return e.err.Error()
	case e.code == cldExited:
		return fmt.Sprintf("exit status %d", e.status)
	default:
		return fmt.Sprintf("signal: %s", syscall.Signal(e.status))
	}
}

const cldExited = 1 // waitid(2), from <bits/siginfo-consts.h>

// await waits until a process has ended, and leaves it to be reaped.
func await(pid int) (e ending) {
	var info struct { // siginfo_t of a 64-bit Linux, as far as waitid(2) fills it in; x/sys/unix has the beginning of it
		signo, errno, code, _ int32
		pid                   int32
		uid                   uint32
		status                int32
		_                     [100]byte
	}
	for {
		err := unix.Waitid(unix.P_PID, pid, (*unix.Siginfo)(unsafe.Pointer(&info)), unix.WEXITED|unix.WNOWAIT, nil)
		if !errors.Is(err, unix.EINTR) {
			return ending{info.code, info.status, err}
		}
	}
}

// startCommand starts a program, with a name for people.
func startCommand(ctx context.Context, name string, cmd *exec.Cmd) (net.Conn, error) {
	if err := ctx.Err(); err != nil {
		return nil, context.Cause(ctx)
	}
	// One socket for both directions: it has deadlines, which pipes of another's may not have.
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	ours, its := os.NewFile(uintptr(fds[0]), "command"), os.NewFile(uintptr(fds[1]), "command")
	defer its.Close()
	conn, err := net.FileConn(ours)
	ours.Close()
	if err != nil {
		return nil, err
	}
	errs, itsErrs, err := os.Pipe()
	if err != nil {
		conn.Close()
		return nil, err
	}
	defer itsErrs.Close()
	c := &command{
		Conn: conn, name: name, cmd: cmd, said: new(lastWords), errs: errs, heard: make(chan struct{}),
		over: make(chan struct{}), reap: make(chan struct{}), reaped: make(chan struct{}),
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = its, its, itsErrs
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // a Ctrl-C is for us to handle, and what it starts ends with it
	if err := cmd.Start(); err != nil {
		conn.Close()
		errs.Close()
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	go func() { // until its standard error ends, or Close
		defer close(c.heard)
		_, _ = io.Copy(c.said, errs)
	}()
	go func() { // until it has ended, which Close sees to
		c.ending = await(cmd.Process.Pid)
		close(c.over)
		<-c.reap
		_ = cmd.Wait()
		close(c.reaped)
	}()
	if ctx.Err() != nil {
		c.Close()
		return nil, context.Cause(ctx)
	}
	return c, nil
}

// Read says, at the end, what the program said of it.
func (c *command) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if n > 0 {
		c.spoke.Store(true)
	}
	if err == io.EOF || errors.Is(err, syscall.ECONNRESET) {
		err = c.explain(err)
	}
	return n, err
}

// Write says, when nobody reads any more, what the program said of it.
func (c *command) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	if errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET) {
		err = c.explain(err)
	}
	return n, err
}

// explain says of an end of the connection why it came. The one that is expected, after the program has said something and succeeded,
// stays io.EOF.
func (c *command) explain(err error) error {
	soon := time.After(time.Second)
	select {
	case <-c.over:
	case <-soon: // it has closed its input or output, and lives
		if err != io.EOF {
			err = fmt.Errorf("%s has closed the connection: %w", c.name, bare(err))
		}
		return err
	}
	if err == io.EOF && c.ending.success() && c.spoke.Load() {
		return err
	}
	select {
	case <-c.heard:
	case <-soon: // what it has started holds its standard error
	}
	words := c.said.String()
	if words != "" {
		words += ": "
	}
	return fmt.Errorf("%s ended (%s): %s%w", c.name, c.ending, words, io.ErrUnexpectedEOF)
}

// bare is what is wrong with a connection, without the addresses of a socket that has none.
func bare(err error) error {
	var op *net.OpError
	if errors.As(err, &op) {
		return op.Err
	}
	return err
}

func (c *command) RemoteAddr() net.Addr { return placeAddr{"exec", c.name} }

// placeAddr is of what has no address, but can be told to people.
type placeAddr struct{ network, place string }

func (a placeAddr) Network() string { return a.network }
func (a placeAddr) String() string  { return a.place }

// patience is how long a program may take to end by itself when its input has ended, mercy how long after a SIGTERM: it may be a peer that
// saves a VM, which is worth waiting for.
const (
	patience = time.Second
	mercy    = 10 * time.Second
)

// Close ends the program before it returns: it has a moment to pass on what it was given, which the end of its input asks it to, and
// another after a SIGTERM. What it has started, and left in its process group, ends with it.
func (c *command) Close() error {
	c.once.Do(func() {
		err := c.Conn.Close()
		if c.closed = c.end(); c.closed == nil {
			c.closed = err
		}
		c.errs.Close()
		<-c.heard
	})
	return c.closed
}

func (c *command) end() error {
	defer close(c.reap)         // if not now, then when it ends
	group := -c.cmd.Process.Pid // which Setsid has made
	for _, stage := range []struct {
		signal syscall.Signal
		wait   time.Duration
	}{{0, patience}, {syscall.SIGTERM, mercy}, {syscall.SIGKILL, patience}} {
		if stage.signal != 0 {
			_ = syscall.Kill(group, stage.signal)
		}
		t := time.NewTimer(stage.wait)
		select {
		case <-c.over:
			t.Stop()
			_ = syscall.Kill(group, syscall.SIGKILL)
			c.reap <- struct{}{}
			<-c.reaped
			return nil
		case <-t.C:
		}
	}
	return fmt.Errorf("end %s: process %d goes on after a SIGKILL; end it by hand", c.name, -group) // another user's, or stuck in the kernel
}
