package testguest

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"testing/iotest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/drafter-vm/drafter/pkg/agent/socket"
)

// Console is the host's end of a guest's serial console: give it to a machine as both SerialInput and SerialOutput.
// One goroutine at a time may use Ready and Do. Several machines may have the same console one after another, as a
// guest that moves does; what was written while none had it is read by the next.
type Console struct {
	mu    sync.Mutex // guards what follows
	out   bytes.Buffer
	lines []string      // complete lines not yet consumed
	log   bytes.Buffer  // everything, for messages
	grown chan struct{} // closed and replaced when lines grows

	in, input *os.File // the ends of a pipe: a machine can stop reading it without taking the next one's bytes

	inputs []*os.File // what Input returned; guarded by mu
}

// NewConsole returns a console that nothing has been written to.
func NewConsole() (*Console, error) {
	c := &Console{grown: make(chan struct{})}
	var err error
	c.in, c.input, err = os.Pipe()
	return c, err
}

// Write receives what the guest writes.
func (c *Console) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.log.Write(p)
	c.out.Write(p)
	for {
		line, rest, ok := bytes.Cut(c.out.Bytes(), []byte("\n"))
		if !ok {
			break
		}
		c.lines = append(c.lines, string(bytes.TrimRight(line, "\r")))
		c.out.Next(c.out.Len() - len(rest))
		close(c.grown)
		c.grown = make(chan struct{})
	}
	return len(p), nil
}

// Input is what the guest reads; it ends at Close. Each call returns a descriptor of its own, so that interrupting one
// machine's reading, as its end does, leaves that of the next alone.
func (c *Console) Input() io.Reader {
	var in *os.File
	raw, err := c.in.SyscallConn()
	if err == nil {
		// Control, as Fd would make the pipe one that deadlines do not work on.
		err = errors.Join(raw.Control(func(fd uintptr) {
			in, err = os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", fd), os.O_RDONLY|unix.O_NONBLOCK, 0)
		}), err)
	}
	if err != nil {
		return iotest.ErrReader(fmt.Errorf("console input: %w", err))
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.inputs = append(c.inputs, in)
	return in
}

// Close ends Input. No machine may be using it any more.
func (c *Console) Close() error {
	err := errors.Join(c.input.Close(), c.in.Close())
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, in := range c.inputs {
		err = errors.Join(err, in.Close())
	}
	return err
}

// Log returns everything the guest wrote.
func (c *Console) Log() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.log.String()
}

// Line consumes lines up to the first that starts with prefix and returns the rest of that one.
func (c *Console) Line(ctx context.Context, prefix string) (string, error) {
	for {
		c.mu.Lock()
		for i, line := range c.lines {
			// The kernel may write in the middle of a line of ours, but not before its first characters.
			if rest, ok := strings.CutPrefix(line, prefix); ok {
				c.lines = c.lines[i+1:]
				c.mu.Unlock()
				return rest, nil
			}
		}
		c.lines = nil
		grown := c.grown
		c.mu.Unlock()
		select {
		case <-grown:
		case <-ctx.Done():
			return "", fmt.Errorf("wait for %q on the console: %w; it says:\n%s", prefix, context.Cause(ctx), c.Log())
		}
	}
}

// Ready waits until the guest has booted.
func (c *Console) Ready(ctx context.Context) error {
	_, err := c.Line(ctx, "= ready")
	return err
}

// Do sends a command and returns its result; an answer "error" becomes an error.
func (c *Console) Do(ctx context.Context, command string) (string, error) {
	stop := context.AfterFunc(ctx, func() { c.input.SetWriteDeadline(time.Unix(1, 0)) })
	defer stop()
	if _, err := io.WriteString(c.input, command+"\n"); err != nil {
		return "", errors.Join(fmt.Errorf("send %q: %w", command, err), context.Cause(ctx))
	}
	answer, err := c.Line(ctx, "= "+verb(command)+" ")
	if err != nil {
		return "", fmt.Errorf("command %q: %w", command, err)
	}
	return result(command, answer)
}

// Send sends a command that the guest will not live to answer.
func (c *Console) Send(command string) error {
	_, err := io.WriteString(c.input, command+"\n")
	return err
}

// Channel is a connection to the commands on the guest channel. One goroutine at a time may use it.
type Channel struct {
	conn  net.Conn
	lines *bufio.Reader
}

// Dial connects to a guest channel that is a unix socket of a VMM: [vmm.GuestChannel] in the machine's folder.
//
// [vmm.GuestChannel]: https://pkg.go.dev/github.com/drafter-vm/drafter/pkg/vmm#GuestChannel
func Dial(ctx context.Context, socket string) (*Channel, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, err
	}
	return &Channel{conn: conn, lines: bufio.NewReader(conn)}, nil
}

// DialSocket connects to the commands at a port of the guest's, through the machine's socket in a folder.
func DialSocket(ctx context.Context, dir string, port uint32) (*Channel, error) {
	conn, err := socket.DialGuest(ctx, dir, port)
	if err != nil {
		return nil, err
	}
	return &Channel{conn: conn, lines: bufio.NewReader(conn)}, nil
}

// Close ends the connection.
func (c *Channel) Close() error { return c.conn.Close() }

// Do sends a command and returns its result; an answer "error" becomes an error.
func (c *Channel) Do(ctx context.Context, command string) (string, error) {
	stop := context.AfterFunc(ctx, func() { c.conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if _, err := io.WriteString(c.conn, command+"\n"); err != nil {
		return "", errors.Join(fmt.Errorf("send %q: %w", command, err), context.Cause(ctx))
	}
	for {
		line, err := c.lines.ReadString('\n')
		if err != nil {
			return "", errors.Join(fmt.Errorf("command %q: %w", command, err), context.Cause(ctx))
		}
		if answer, ok := strings.CutPrefix(line, "= "+verb(command)+" "); ok {
			return result(command, strings.TrimSpace(answer))
		}
	}
}

func verb(command string) string {
	v, _, _ := strings.Cut(command, " ")
	return v
}

func result(command, answer string) (string, error) {
	if msg, failed := strings.CutPrefix(answer, "error"); failed {
		return "", fmt.Errorf("guest command %q: %s", command, strings.TrimSpace(msg))
	}
	return strings.TrimSpace(strings.TrimPrefix(answer, "ok")), nil
}
