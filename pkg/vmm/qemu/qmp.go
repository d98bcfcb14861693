package qemu

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// maxMessage bounds one QMP message, in bytes. The largest we ask for, the list of machine types, has 60 KB.
const maxMessage = 4 << 20

// message is whatever QEMU sends: a greeting, an answer (with its id) or an event. Exactly one of the pointers and Event
// is set. The protocol is described in QEMU's docs/interop/qmp-spec.rst.
type message struct {
	Greeting json.RawMessage `json:"QMP"`

	ID     *uint64         `json:"id"`
	Return json.RawMessage `json:"return"`
	Error  *qmpError       `json:"error"`

	Event string          `json:"event"`
	Data  json.RawMessage `json:"data"`
}

// qmpError is QEMU's answer to a command that failed.
type qmpError struct {
	Command string `json:"-"`
	Class   string `json:"class"`
	Desc    string `json:"desc"`
}

func (e *qmpError) Error() string {
	if e.Class == "" || e.Class == "GenericError" {
		return fmt.Sprintf("QMP %s: %s", e.Command, e.Desc)
	}
	return fmt.Sprintf("QMP %s: %s: %s", e.Command, e.Class, e.Desc)
}

// decodeMessage decodes one line.
func decodeMessage(line []byte) (message, error) {
	var m message
	if err := json.Unmarshal(line, &m); err != nil {
		return message{}, fmt.Errorf("decode QMP message: %w", err)
	}
	kinds := 0
	for _, is := range []bool{m.Greeting != nil, m.Return != nil, m.Error != nil, m.Event != ""} {
		if is {
			kinds++
		}
	}
	if kinds != 1 {
		return message{}, fmt.Errorf("decode QMP message: neither a greeting nor an answer nor an event: %.200q", line)
	}
	return m, nil
}

// client is a QMP connection. Its methods may be called concurrently.
type client struct {
	conn    *net.UnixConn
	onEvent func(name string, data json.RawMessage) // called by the reader: must not block
	done    chan struct{}                           // closed when the reader has ended; then err is set

	write sync.Mutex // held while a command is written

	mu      sync.Mutex // guards what follows
	last    uint64
	pending map[uint64]chan<- message
	err     error
}

// dialQMP connects to a QMP socket and negotiates. It waits as long as QEMU serves another client, or has not got to
// its main loop yet, until ctx ends.
func dialQMP(ctx context.Context, socket string, onEvent func(string, json.RawMessage)) (*client, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, fmt.Errorf("connect to QMP: %w", err)
	}
	c, err := newClient(ctx, conn.(*net.UnixConn), onEvent)
	if err != nil {
		return nil, err
	}
	return c, nil
}

// newClient takes over a connection.
func newClient(ctx context.Context, conn *net.UnixConn, onEvent func(string, json.RawMessage)) (*client, error) {
	c := &client{conn: conn, onEvent: onEvent, done: make(chan struct{}), pending: make(map[uint64]chan<- message)}
	lines := bufio.NewReaderSize(conn, 64<<10)

	greeting := make(chan error, 1)
	go func() {
		m, err := readMessage(lines)
		if err == nil && m.Greeting == nil {
			err = errors.New("it did not start with a greeting")
		}
		greeting <- connectionError(err)
		if err != nil {
			c.end(err)
			return
		}
		c.end(c.read(lines))
	}()
	select {
	case err := <-greeting:
		if err != nil {
			c.close()
			return nil, fmt.Errorf("greet QMP: %w", err)
		}
	case <-ctx.Done():
		c.close()
		return nil, fmt.Errorf("wait for QMP's greeting: %w", context.Cause(ctx))
	}
	if err := c.execute(ctx, "qmp_capabilities", nil, nil); err != nil {
		c.close()
		return nil, err
	}
	return c, nil
}

func readMessage(r *bufio.Reader) (message, error) {
	var line []byte
	for {
		part, err := r.ReadSlice('\n')
		line = append(line, part...)
		switch {
		case len(line) > maxMessage:
			return message{}, fmt.Errorf("QMP message longer than %d bytes", maxMessage)
		case err == bufio.ErrBufferFull:
			continue
		case err != nil:
			return message{}, err
		}
		return decodeMessage(line)
	}
}

// read dispatches messages until the connection ends.
func (c *client) read(r *bufio.Reader) error {
	for {
		m, err := readMessage(r)
		if err != nil {
			return err
		}
		if m.Event != "" {
			if c.onEvent != nil {
				c.onEvent(m.Event, m.Data)
			}
			continue
		}
		if m.ID == nil {
			// An error without an id answers something QEMU could not parse: we have written nothing of the kind.
			return fmt.Errorf("QMP answer without an id")
		}
		c.mu.Lock()
		answer := c.pending[*m.ID]
		delete(c.pending, *m.ID)
		c.mu.Unlock()
		if answer != nil {
			answer <- m // has room; nobody may be waiting any more
		}
	}
}

// connectionError says in one way what the system says in many.
func connectionError(err error) error {
	for _, end := range []error{io.EOF, io.ErrUnexpectedEOF, net.ErrClosed, unix.ECONNRESET, unix.EPIPE} {
		if errors.Is(err, end) {
			return errors.New("connection closed")
		}
	}
	return err
}

// end records why the connection ended.
func (c *client) end(err error) {
	c.mu.Lock()
	c.err = connectionError(err)
	c.mu.Unlock()
	c.conn.Close()
	close(c.done)
}

// close ends the connection and waits for the reader.
func (c *client) close() {
	c.conn.Close()
	<-c.done
}

// execute runs a command, sending files with it, and decodes what it returns into result (nil: thrown away). When it
// fails because ctx ended, QEMU may still execute the command.
func (c *client) execute(ctx context.Context, command string, arguments, result any, files ...*os.File) error {
	request := struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
		ID        uint64 `json:"id"`
	}{Execute: command, Arguments: arguments}

	answer := make(chan message, 1)
	c.mu.Lock()
	if c.err != nil {
		defer c.mu.Unlock()
		return fmt.Errorf("QMP %s: %w", command, c.err)
	}
	c.last++
	request.ID = c.last
	c.pending[request.ID] = answer
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		delete(c.pending, request.ID)
		c.mu.Unlock()
	}()

	line, err := json.Marshal(request)
	if err != nil {
		return fmt.Errorf("QMP %s: %w", command, err)
	}
	var rights []byte
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			fds[i] = int(f.Fd())
		}
		rights = unix.UnixRights(fds...)
	}
	if err := c.send(append(line, '\n'), rights); err != nil {
		return fmt.Errorf("QMP %s: %w", command, err)
	}
	select {
	case m := <-answer:
		if m.Error != nil {
			m.Error.Command = command
			return m.Error
		}
		if result == nil {
			return nil
		}
		if err := json.Unmarshal(m.Return, result); err != nil {
			return fmt.Errorf("QMP %s: decode the answer: %w", command, err)
		}
		return nil
	case <-c.done:
		c.mu.Lock()
		defer c.mu.Unlock()
		return fmt.Errorf("QMP %s: %w", command, c.err)
	case <-ctx.Done():
		return fmt.Errorf("QMP %s: %w", command, context.Cause(ctx))
	}
}

// send writes a command whole. Commands are far smaller than the socket's buffer, so this does not wait for QEMU.
func (c *client) send(line, rights []byte) error {
	c.write.Lock()
	defer c.write.Unlock()
	n, _, err := c.conn.WriteMsgUnix(line, rights, nil)
	if err == nil && n < len(line) {
		_, err = c.conn.Write(line[n:])
	}
	return connectionError(err)
}
