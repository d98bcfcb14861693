package supervise

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	maxLine    = 16 << 10  // of a container's output: what is longer becomes several
	maxPending = 256 << 10 // what waits for the console
)

// output is where the lines of containers go.
type output struct {
	mu      sync.Mutex // guards journal: lines of several containers do not mix
	journal io.Writer

	console *console // nil: none
}

// line puts out one line, without its end.
func (o *output) line(container string, text []byte) {
	line := make([]byte, 0, len(container)+len(text)+3)
	line = append(append(append(append(line, container...), ": "...), text...), '\n')
	if o.console != nil {
		o.console.offer(line)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	_, _ = o.journal.Write(line) // there is nobody to tell
}

// copy puts out what a container writes, until it ends. Each line is shown to seen, too.
func (o *output) copy(container string, r io.Reader, seen func([]byte)) {
	in := bufio.NewReaderSize(r, maxLine)
	for {
		text, err := in.ReadSlice('\n')
		if len(text) > 0 {
			text = bytes.TrimRight(text, "\r\n")
			seen(text)
			o.line(container, text)
		}
		if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
			return
		}
	}
}

// console writes to a terminal that may be slow, or that nobody reads, without having anybody wait for it.
type console struct {
	w    io.Writer
	file *os.File // what w is in the end

	mu      sync.Mutex // guards what follows
	pending []byte
	dropped int           // lines, since the last one that was taken
	closed  bool          //
	grown   chan struct{} // capacity 1: something changed

	done chan struct{} // closed when its goroutine has ended
}

// openConsole opens a terminal; nil if there is none.
func openConsole(path string) *console {
	f, err := os.OpenFile(path, os.O_WRONLY|unix.O_NOCTTY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil
	}
	return newConsole(f, f)
}

func newConsole(w io.Writer, f *os.File) *console {
	c := &console{w: w, file: f, grown: make(chan struct{}, 1), done: make(chan struct{})}
	go c.run()
	return c
}

func (c *console) offer(line []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.dropped > 0 && len(c.pending) < maxPending/2 { // and not each time that there is room for one
		c.pending = fmt.Appendf(c.pending, "drafter: the console is slow: %d lines are not shown here\n", c.dropped)
		c.dropped = 0
	}
	if c.dropped > 0 || len(c.pending)+len(line) > maxPending {
		c.dropped++
		return
	}
	c.pending = append(c.pending, line...)
	c.wake()
}

func (c *console) wake() {
	select {
	case c.grown <- struct{}{}:
	default:
	}
}

func (c *console) run() {
	defer close(c.done)
	for range c.grown {
		for {
			c.mu.Lock()
			text, closed := c.pending, c.closed
			if len(text) == 0 && c.dropped > 0 {
				text = fmt.Appendf(nil, "drafter: the console is slow: %d lines are not shown here\n", c.dropped)
				c.dropped = 0
			}
			c.pending = nil
			c.mu.Unlock()
			if len(text) == 0 {
				if closed {
					return
				}
				break
			}
			if _, err := c.w.Write(text); err != nil && closed {
				return
			}
		}
	}
}

// close gives what is pending a moment to be written.
func (c *console) close() {
	c.mu.Lock()
	c.closed = true
	c.wake()
	c.mu.Unlock()
	if c.file != nil {
		_ = c.file.SetWriteDeadline(time.Now().Add(2 * time.Second)) // what is no terminal does not block
	}
	<-c.done
	if c.file != nil {
		c.file.Close()
	}
}

// toBoth is a log handler that shows on the console, too, what somebody should see who has nothing else, as when a guest does not come up.
type toBoth struct{ all, console slog.Handler }

// onConsole is a logger that logs to log, and warnings and errors to the console, too.
func onConsole(log *slog.Logger, c *console) *slog.Logger {
	if c == nil {
		return log
	}
	return slog.New(toBoth{log.Handler(), slog.NewTextHandler(consoleLines{c}, &slog.HandlerOptions{Level: slog.LevelWarn, ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
		if len(groups) == 0 && a.Key == slog.TimeKey {
			return slog.Attr{}
		}
		return a
	}})})
}

// consoleLines has each write be a line of the console.
type consoleLines struct{ c *console }

func (w consoleLines) Write(p []byte) (int, error) {
	w.c.offer(append([]byte("drafter: "), p...))
	return len(p), nil
}

func (h toBoth) Enabled(ctx context.Context, l slog.Level) bool {
	return h.all.Enabled(ctx, l) || h.console.Enabled(ctx, l)
}

func (h toBoth) Handle(ctx context.Context, r slog.Record) error {
	var errs []error
	for _, to := range []slog.Handler{h.all, h.console} {
		if to.Enabled(ctx, r.Level) {
			errs = append(errs, to.Handle(ctx, r.Clone()))
		}
	}
	return errors.Join(errs...)
}

func (h toBoth) WithAttrs(attrs []slog.Attr) slog.Handler {
	return toBoth{h.all.WithAttrs(attrs), h.console.WithAttrs(attrs)}
}

func (h toBoth) WithGroup(name string) slog.Handler {
	return toBoth{h.all.WithGroup(name), h.console.WithGroup(name)}
}
