package serve

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"github.com/sirupsen/logrus"
)

// Limits bound what the other side of one connection can make this side hold, whatever it sends and however little it reads. Fields
// that are zero have their defaults.
//
// ttrpc has no such bounds: it reads call after call, each of which it gives a goroutine that ends only when its answer is written.
type Limits struct {
	// Calls is how many calls may be without an answer that is written. Default: 320.
	Calls int

	// Bytes is how many bytes of such calls' requests there may be when another is taken, which may have 4 MiB. Default: 16 MiB.
	Bytes int

	// Patience is how long it may take until some of an answer can be written, before the connection is closed. Default: a minute.
	Patience time.Duration
}

func (l Limits) withDefaults() Limits {
	if l.Calls == 0 {
		l.Calls = 320
	}
	if l.Bytes == 0 {
		l.Bytes = 16 << 20
	}
	if l.Patience == 0 {
		l.Patience = time.Minute
	}
	return l
}

// Conn serves calls on conn until it ends, or ctx does. The server may serve others too, and is not closed. No more is read than the
// limits allow: what is beyond waits with the other side. The error says what that side did wrong, if it was its fault that the
// connection ended.
func Conn(ctx context.Context, server *ttrpc.Server, conn net.Conn, limits Limits) error {
	c := &served{Conn: conn, limits: limits.withDefaults(), closed: make(chan struct{}), calls: make(map[uint32]int)}
	c.changed.L = &c.mu
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	// ttrpc writes to the process's logger unless told otherwise; what it would say is seen here anyway.
	silent := logrus.New()
	silent.SetOutput(io.Discard)
	server.Serve(log.WithLogger(ctx, logrus.NewEntry(silent)), &once{conn: c})
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.fault
}

// A frame of ttrpc is a header, that says how long the payload behind it is, of which stream (the number of a call), and of what kind.
const (
	headerSize = 10
	maxPayload = 4 << 20 // of what is longer ttrpc keeps nothing

	kindRequest  = 1
	kindResponse = 2
	kindData     = 3

	flagRemoteClosed = 1 // of data: no more follows
)

// piece is how much is written at a time: of that much, some can be written within Limits.Patience by any link that is alive.
const piece = 64 << 10

// served counts the calls that are read against the answers that are written. It ends a connection in the one way that ttrpc's server
// answers by ending, too: every error of Read is io.EOF.
type served struct {
	net.Conn
	limits Limits
	once   sync.Once
	closed chan struct{}

	// Of the goroutine that reads.
	header [headerSize]byte
	head   []byte // of the header, what is not passed on yet
	body   int64  // the same of the payload behind it
	last   uint32 // the newest stream

	// Of the goroutine that writes: the frame that it is in.
	reply [headerSize]byte
	have  int   // bytes of reply
	rest  int64 // bytes of the payload that are to come

	mu      sync.Mutex // guards what follows
	changed sync.Cond
	calls   map[uint32]int // that have no answer yet, by stream: bytes of the request
	bytes   int            // their sum
	writing bool           // an answer
	ended   bool
	fault   error // of the other side; nil: none
}

func (c *served) Read(p []byte) (int, error) {
	n, err := c.read(p)
	if err != nil {
		err = io.EOF
	}
	return n, err
}

// read passes on one frame after the other, and begins none for which there is no room.
func (c *served) read(p []byte) (n int, err error) {
	if len(c.head) == 0 && c.body == 0 {
		if _, err := io.ReadFull(c.Conn, c.header[:]); err != nil {
			return 0, err
		}
		if err := c.admit(); err != nil {
			return 0, err
		}
		c.head = c.header[:]
		c.body = int64(binary.BigEndian.Uint32(c.header[:4]))
	}
	if len(c.head) > 0 {
		n = copy(p, c.head)
		c.head = c.head[n:]
		return n, nil
	}
	n, err = c.Conn.Read(p[:min(int64(len(p)), c.body)])
	c.body -= int64(n)
	return n, err
}

// admit waits until there is room for the call whose header was read. While an answer is written none is taken: the answers that wait
// for a side that does not read are those of the calls that it had before.
func (c *served) admit() error {
	size, stream := binary.BigEndian.Uint32(c.header[:4]), binary.BigEndian.Uint32(c.header[4:8])
	if kind := c.header[8]; kind != kindRequest {
		// Messages that follow a request wait in ttrpc until the method takes them, 64 for each: that is bounded by nobody.
		return c.blame(fmt.Errorf("a message of kind %d, where only requests are served", kind))
	}
	if stream%2 != 1 || stream <= c.last {
		return c.blame(fmt.Errorf("a request with the number %d after %d, where they are odd and grow", stream, c.last))
	}
	c.last = stream
	if size > maxPayload {
		size = 0
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for !c.ended && (c.writing || len(c.calls) >= c.limits.Calls || c.bytes >= c.limits.Bytes) {
		c.changed.Wait()
	}
	if c.ended {
		return net.ErrClosed
	}
	c.calls[stream] = int(size)
	c.bytes += int(size)
	return nil
}

func (c *served) Write(p []byte) (n int, err error) {
	c.mu.Lock()
	c.writing = true
	c.mu.Unlock()
	for n < len(p) && err == nil {
		var m int
		if err = c.Conn.SetWriteDeadline(time.Now().Add(c.limits.Patience)); err == nil {
			m, err = c.Conn.Write(p[n:min(n+piece, len(p))])
		}
		c.wrote(p[n : n+m])
		n += m
		if errors.Is(err, os.ErrDeadlineExceeded) && m > 0 {
			err = nil // slow is not dead
		}
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		c.blame(fmt.Errorf("the other side has read nothing for %v", c.limits.Patience))
	}
	return n, err
}

// wrote takes note of what was written: of the calls whose answers that completes.
func (c *served) wrote(p []byte) {
	for len(p) > 0 {
		if c.have < headerSize {
			n := copy(c.reply[c.have:], p)
			c.have += n
			p = p[n:]
			if c.have < headerSize {
				return
			}
			c.rest = int64(binary.BigEndian.Uint32(c.reply[:4]))
		}
		n := min(int64(len(p)), c.rest)
		p = p[n:]
		c.rest -= n
		if c.rest > 0 {
			return
		}
		c.have = 0
		c.mu.Lock()
		c.writing = false
		if kind := c.reply[8]; kind == kindResponse || kind == kindData && c.reply[9]&flagRemoteClosed != 0 {
			stream := binary.BigEndian.Uint32(c.reply[4:8])
			c.bytes -= c.calls[stream]
			delete(c.calls, stream)
		}
		c.changed.Broadcast()
		c.mu.Unlock()
	}
}

// blame ends the connection by a fault of the other side.
func (c *served) blame(fault error) error {
	c.mu.Lock()
	if c.fault == nil && !c.ended {
		c.fault = fault
	}
	c.mu.Unlock()
	c.Close()
	return fault
}

func (c *served) Close() error {
	c.once.Do(func() {
		c.mu.Lock()
		c.ended = true
		c.changed.Broadcast()
		c.mu.Unlock()
		close(c.closed)
	})
	return c.Conn.Close()
}

// once is a listener with one connection, which fails when that has ended.
type once struct {
	conn  *served
	taken bool // Accept is called by one goroutine
}

func (l *once) Accept() (net.Conn, error) {
	if !l.taken {
		l.taken = true
		return l.conn, nil
	}
	<-l.conn.closed
	return nil, net.ErrClosed
}
func (l *once) Close() error   { return l.conn.Close() }
func (l *once) Addr() net.Addr { return l.conn.LocalAddr() }
