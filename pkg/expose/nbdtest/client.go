package nbdtest

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"

	"github.com/drafter-vm/drafter/pkg/block"
)

// maxRequest is the payload of the largest request the client sends, in bytes. Larger calls are split.
const maxRequest = 32 << 20

// Options say how to connect. The zero value is what QEMU does, without structured replies.
type Options struct {
	// Structured negotiates structured replies.
	Structured bool

	// ExportName ends the negotiation with EXPORT_NAME, as old clients do, rather than GO.
	ExportName bool
}

// Client is a connection to an export. Any number of goroutines may use it; each has its request in flight.
type Client struct {
	conn       net.Conn
	name       string
	size       int64
	flags      uint16
	structured bool

	sending sync.Mutex // one request after the other

	mu      sync.Mutex // guards the three below
	pending map[uint64]*call
	cookie  uint64
	err     error // why there are no more replies

	closing sync.Once
	done    chan struct{} // closed when the receiving goroutine has ended
}

// call is a request in flight.
type call struct {
	read []byte // where the data of a READ goes
	done chan error
}

var _ block.Device = (*Client)(nil)

// Dial connects to the export called name of the server on the unix socket at path.
func Dial(path, name string, opts Options) (*Client, error) {
	conn, err := net.Dial("unix", path)
	if err != nil {
		return nil, err
	}
	c := &Client{conn: conn, name: name, pending: make(map[uint64]*call), done: make(chan struct{})}
	r := bufio.NewReaderSize(conn, 64<<10)
	if err := c.negotiate(r, opts); err != nil {
		return nil, errors.Join(fmt.Errorf("connect to export %q on %q: %w", name, path, err), conn.Close())
	}
	go c.receive(r)
	return c, nil
}

func (c *Client) negotiate(r *bufio.Reader, opts Options) error {
	be := binary.BigEndian
	hello := make([]byte, 18)
	if _, err := io.ReadFull(r, hello); err != nil {
		return err
	}
	if string(hello[:16]) != "NBDMAGICIHAVEOPT" {
		return fmt.Errorf("the server says %q", hello)
	}
	if _, err := c.conn.Write(be.AppendUint32(nil, 3)); err != nil { // FIXED_NEWSTYLE, NO_ZEROES
		return err
	}
	option := func(option uint32, data []byte) error {
		b := be.AppendUint64(nil, 0x49484156454f5054)
		b = be.AppendUint32(b, option)
		b = be.AppendUint32(b, uint32(len(data)))
		_, err := c.conn.Write(append(b, data...))
		return err
	}
	if opts.Structured {
		if err := option(8, nil); err != nil {
			return err
		}
		if kind, _, err := optionReply(r); err != nil || kind != 1 {
			return fmt.Errorf("structured replies are answered with %#x, %v", kind, err)
		}
		c.structured = true
	}
	if opts.ExportName {
		if err := option(1, []byte(c.name)); err != nil {
			return err
		}
		b := make([]byte, 10)
		if _, err := io.ReadFull(r, b); err != nil {
			return err
		}
		c.size, c.flags = int64(be.Uint64(b)), be.Uint16(b[8:])
		return nil
	}
	data := be.AppendUint32(nil, uint32(len(c.name)))
	data = append(data, c.name...)
	data = be.AppendUint16(data, 0)
	if err := option(7, data); err != nil {
		return err
	}
	for {
		kind, data, err := optionReply(r)
		switch {
		case err != nil:
			return err
		case kind == 1:
			return nil
		case kind == 3 && len(data) == 12 && be.Uint16(data) == 0:
			c.size, c.flags = int64(be.Uint64(data[2:])), be.Uint16(data[10:])
		case kind != 3:
			return fmt.Errorf("the server answers %#x: %s", kind, data)
		}
	}
}

func optionReply(r io.Reader) (kind uint32, data []byte, err error) {
	var b [20]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return 0, nil, err
	}
	data = make([]byte, binary.BigEndian.Uint32(b[16:]))
	_, err = io.ReadFull(r, data)
	return binary.BigEndian.Uint32(b[12:]), data, err
}

// receive hands replies to the calls that wait for them.
func (c *Client) receive(r *bufio.Reader) {
	defer close(c.done)
	err := func() error {
		for {
			if err := c.receiveOne(r); err != nil {
				return err
			}
		}
	}()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil {
		c.err = fmt.Errorf("connection to export %q: %w", c.name, err)
	}
	for _, call := range c.pending {
		call.done <- c.err
	}
	c.pending = nil
}

func (c *Client) receiveOne(r *bufio.Reader) error {
	be := binary.BigEndian
	head, err := r.Peek(16)
	if err != nil {
		return err
	}
	var code uint32
	cookie := be.Uint64(head[8:])
	switch magic := be.Uint32(head); magic {
	case 0x67446698:
		code = be.Uint32(head[4:])
		_, _ = r.Discard(16)
		call := c.take(cookie)
		if call == nil {
			return fmt.Errorf("a reply with cookie %d, which no request has", cookie)
		}
		if code == 0 {
			if _, err := io.ReadFull(r, call.read); err != nil {
				call.done <- err
				return err
			}
		}
		call.done <- errorOf(code, "")
		return nil
	case 0x668e33ef:
		head := make([]byte, 20)
		if _, err := io.ReadFull(r, head); err != nil {
			return err
		}
		call := c.take(cookie)
		flags, kind, length := be.Uint16(head[4:]), be.Uint16(head[6:]), be.Uint32(head[16:])
		if call == nil || flags != 1 {
			return fmt.Errorf("a chunk with cookie %d and flags %#x", cookie, flags)
		}
		switch {
		case kind == 0 && length == 0:
		case kind == 1 && int(length) == 8+len(call.read):
			if _, err = r.Discard(8); err == nil {
				_, err = io.ReadFull(r, call.read)
			}
		case kind == 1<<15+1 && length >= 6 && length < 1<<16:
			b := make([]byte, length)
			_, err = io.ReadFull(r, b)
			code = be.Uint32(b)
			if err == nil {
				call.done <- errorOf(code, string(b[6:]))
				return nil
			}
		default:
			err = fmt.Errorf("a chunk of type %d with %d bytes", kind, length)
		}
		call.done <- err
		return err
	default:
		return fmt.Errorf("a reply begins with %#08x", magic)
	}
}

func errorOf(code uint32, message string) error {
	if code == 0 {
		return nil
	}
	return fmt.Errorf("the server answers with an error: %s: %w", message, syscall.Errno(code))
}

func (c *Client) take(cookie uint64) *call {
	c.mu.Lock()
	defer c.mu.Unlock()
	call := c.pending[cookie]
	delete(c.pending, cookie)
	return call
}

var calls = sync.Pool{New: func() any { return &call{done: make(chan error, 1)} }}

// request sends a request and waits for its reply.
func (c *Client) request(flags, command uint16, off int64, length uint32, write, read []byte) error {
	call := calls.Get().(*call)
	call.read = read
	defer calls.Put(call)

	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		return c.err
	}
	c.cookie++
	cookie := c.cookie
	c.pending[cookie] = call
	c.mu.Unlock()

	c.sending.Lock()
	err := c.send(flags, command, cookie, off, length, write)
	c.sending.Unlock()
	if err != nil {
		_ = c.conn.Close() // the receiving goroutine then answers for all
	}
	return <-call.done
}

func (c *Client) send(flags, command uint16, cookie uint64, off int64, length uint32, write []byte) error {
	be := binary.BigEndian
	b := make([]byte, 28, 28+64)
	be.PutUint32(b, 0x25609513)
	be.PutUint16(b[4:], flags)
	be.PutUint16(b[6:], command)
	be.PutUint64(b[8:], cookie)
	be.PutUint64(b[16:], uint64(off))
	be.PutUint32(b[24:], length)
	if len(write) == 0 {
		_, err := c.conn.Write(b)
		return err
	}
	buffers := net.Buffers{b, write}
	_, err := buffers.WriteTo(c.conn)
	return err
}

// Request sends any request, valid or not, and returns the error of the reply; errors.Is finds the syscall.Errno in it.
func (c *Client) Request(flags, command uint16, off int64, length uint32, write, read []byte) error {
	return c.request(flags, command, off, length, write, read)
}

// Flags are the transmission flags.
func (c *Client) Flags() uint16 { return c.flags }

// Size implements block.Device.
func (c *Client) Size() int64 { return c.size }

func (c *Client) check(off, n int64) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return c.err
	}
	if off < 0 || n < 0 || n > c.size || off > c.size-n {
		return fmt.Errorf("%d bytes at %d are not within the %d bytes of export %q: %w", n, off, c.size, c.name, os.ErrInvalid)
	}
	return nil
}

// ReadAt implements block.Device.
func (c *Client) ReadAt(p []byte, off int64) (int, error) {
	if err := c.check(max(off, -1), 0); err != nil && off <= c.size {
		return 0, err
	}
	if len(p) == 0 {
		return 0, nil
	}
	var eof error
	if off >= c.size {
		return 0, io.EOF
	}
	if int64(len(p)) > c.size-off {
		p, eof = p[:c.size-off], io.EOF
	}
	for done := 0; done < len(p); {
		part := p[done:min(len(p), done+maxRequest)]
		if err := c.request(0, 0, off+int64(done), uint32(len(part)), nil, part); err != nil {
			return done, err
		}
		done += len(part)
	}
	return len(p), eof
}

// WriteAt implements block.Device.
func (c *Client) WriteAt(p []byte, off int64) (int, error) {
	if err := c.check(off, int64(len(p))); err != nil {
		return 0, err
	}
	for done := 0; done < len(p); {
		part := p[done:min(len(p), done+maxRequest)]
		if err := c.request(0, 1, off+int64(done), uint32(len(part)), part, nil); err != nil {
			return done, err
		}
		done += len(part)
	}
	return len(p), nil
}

// Discard implements block.Device, by WRITE_ZEROES: TRIM promises nothing.
func (c *Client) Discard(off, n int64) error {
	if err := c.check(off, n); err != nil {
		return err
	}
	for n > 0 {
		k := min(n, 1<<30)
		if err := c.request(0, 6, off, uint32(k), nil, nil); err != nil {
			return err
		}
		off, n = off+k, n-k
	}
	return nil
}

// Flush implements block.Device.
func (c *Client) Flush() error {
	if err := c.check(0, 0); err != nil {
		return err
	}
	return c.request(0, 3, 0, 0, nil, nil)
}

// Close implements block.Device.
func (c *Client) Close() error {
	var err error
	c.closing.Do(func() {
		err = c.Flush()
		c.mu.Lock()
		c.err = fmt.Errorf("export %q: %w", c.name, os.ErrClosed)
		c.mu.Unlock()
		c.sending.Lock()
		_ = c.send(0, 2, 0, 0, 0, nil) // DISC has no reply
		c.sending.Unlock()
		<-c.done // the server has answered what was in flight, and closed
		err = errors.Join(err, c.conn.Close())
	})
	return err
}
