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
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const commandPrefix = "exec:"

func checkCommand(_ Options, command string) error {
	if strings.TrimSpace(command) == "" {
		return errors.New("no command given: use exec:COMMAND")
	}
	return nil
}

func dialCommand(ctx context.Context, _ Options, command string) (net.Conn, error) {
	return startCommand(ctx, exec.Command("/bin/sh", "-c", command))
}

// sshConfig is the parameter for the file that ssh reads instead of its own configuration.
const sshConfig = "config"

// sshTarget takes USER@HOST:PORT/TARGET?config=FILE apart.
func sshTarget(rest string) (u *url.URL, target string, err error) {
	if u, err = url.Parse("ssh://" + rest); err != nil {
		return nil, "", err
	}
	target = strings.TrimPrefix(u.Path, "/")
	switch _, hasPassword := u.User.Password(); {
	case hasPassword:
		return nil, "", errors.New("a password does not belong into an address, which others can see: use a key that ssh finds")
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
	return startCommand(ctx, exec.Command("ssh", append(args, "--", u.Hostname())...))
}

// command is a program whose standard input and output are the connection.
type command struct {
	net.Conn
	cmd  *exec.Cmd
	said *lastWords
	done chan struct{} // closed when it has ended
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

func startCommand(ctx context.Context, cmd *exec.Cmd) (net.Conn, error) {
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
	c := &command{Conn: conn, cmd: cmd, said: new(lastWords), done: make(chan struct{})}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = its, its, c.said
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // a Ctrl-C is for us to handle, and what it starts ends with it
	cmd.WaitDelay = time.Second                          // what it has started may hold its standard error
	if err := cmd.Start(); err != nil {
		conn.Close()
		return nil, err
	}
	go func() {
		defer close(c.done)
		cmd.Wait()
	}()
	return c, nil
}

// Read says, at the end, what the program said of it.
func (c *command) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if err == io.EOF || errors.Is(err, syscall.ECONNRESET) {
		select {
		case <-c.done:
			if words := c.said.String(); words != "" || !c.cmd.ProcessState.Success() {
				if words != "" {
					words += ": "
				}
				err = fmt.Errorf("%s ended (%s): %s%w", c.cmd.Args[0], c.cmd.ProcessState, words, io.ErrUnexpectedEOF)
			}
		case <-time.After(time.Second): // it has closed its output, and lives
		}
	}
	return n, err
}

// Close gives the program the time to pass on what it was given, but does not wait for that.
func (c *command) Close() error {
	err := c.Conn.Close()
	go func() {
		select {
		case <-c.done:
		case <-time.After(lingering):
			_ = syscall.Kill(-c.cmd.Process.Pid, syscall.SIGKILL)
			<-c.done
		}
	}()
	return err
}
