package console

import (
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"
)

// consoleBuffer bounds, in bytes, the console output that waits for a slow SerialOutput. What comes on top of it
// replaces the oldest: the guest does not wait.
const consoleBuffer = 1 << 20

// consoleGrace is how long the end of a machine waits for a slow SerialOutput to take what is left.
const consoleGrace = time.Second

// Console pumps between a VMM's console and the owner's reader and writer.
type Console struct {
	conn io.ReadWriteCloser
	out  io.Writer
	log  *slog.Logger

	mu    sync.Mutex // guards what follows
	more  sync.Cond  // signals that something below changed
	queue []byte
	lost  int  // bytes
	ended bool // nothing will be added to queue

	received, written chan struct{} // closed when those goroutines have ended
	input             io.Reader
	runs              <-chan struct{} // see Start
	sent              chan struct{}
}

// Start pumps until conn ends. Either of out and in may be nil. Nothing is taken from in before runs is closed, if that is not nil.
func Start(conn io.ReadWriteCloser, out io.Writer, in io.Reader, runs <-chan struct{}, log *slog.Logger) *Console {
	c := &Console{conn: conn, out: out, log: log, runs: runs, received: make(chan struct{}), written: make(chan struct{}), input: in, sent: make(chan struct{})}
	c.more.L = &c.mu
	go c.receive()
	go c.write()
	if in != nil {
		go c.send()
	} else {
		close(c.sent)
	}
	return c
}

// receive takes what the guest writes, always at once.
func (c *Console) receive() {
	defer close(c.received)
	buf := make([]byte, 32<<10)
	for {
		n, err := c.conn.Read(buf)
		c.mu.Lock()
		if c.out != nil {
			c.queue = append(c.queue, buf[:n]...)
			if over := len(c.queue) - consoleBuffer; over > 0 {
				c.queue = append(c.queue[:0], c.queue[over:]...)
				c.lost += over
			}
		}
		c.ended = err != nil
		c.more.Signal()
		c.mu.Unlock()
		if err != nil {
			return
		}
	}
}

func (c *Console) write() {
	defer close(c.written)
	for {
		c.mu.Lock()
		for len(c.queue) == 0 && !c.ended {
			c.more.Wait()
		}
		chunk, lost, out := c.queue, c.lost, c.out
		c.queue, c.lost = nil, 0
		c.mu.Unlock()
		if lost > 0 {
			c.log.Warn("console output was lost: its reader is too slow", "bytes", lost)
		}
		if len(chunk) == 0 {
			return
		}
		if _, err := out.Write(chunk); err != nil {
			c.log.Debug("console output is discarded from here on", "error", err)
			c.mu.Lock()
			c.out, c.queue = nil, nil
			c.mu.Unlock()
		}
	}
}

func (c *Console) send() {
	defer close(c.sent)
	if c.runs != nil {
		select {
		case <-c.runs:
		case <-c.received: // the connection's end
			return
		}
	}
	if _, err := io.Copy(c.conn, onlyReader{c.input}); err != nil && !errors.Is(err, net.ErrClosed) && !errors.Is(err, os.ErrDeadlineExceeded) {
		c.log.Debug("console input ended", "error", err)
	}
}

// onlyReader hides a reader's WriteTo, so that a read is never in progress while a write fails.
type onlyReader struct{ io.Reader }

// Close ends the pump; the VMM has ended before, so all output is there. A SerialInput that cannot be interrupted keeps
// its goroutine until its Read returns.
func (c *Console) Close() {
	<-c.received // the connection's end
	c.conn.Close()
	select {
	case <-c.written:
	case <-time.After(consoleGrace):
		c.log.Warn("console output was cut off: its writer is stuck")
	}
	if r, ok := c.input.(interface{ SetReadDeadline(time.Time) error }); ok {
		if err := r.SetReadDeadline(time.Unix(1, 0)); err == nil {
			<-c.sent
			r.SetReadDeadline(time.Time{})
		}
	}
}

// Disconnect ends the connection to a VMM that goes on.
func (c *Console) Disconnect() { c.conn.Close() }
