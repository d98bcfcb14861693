package faults

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/drafter-vm/drafter/pkg/wire"
)

// Link is what lies between the two sides of a migration: streams, in this process or over TCP, and the faults on them.
// It reads along, so that a fault can be placed between two frames, or before a certain one.
//
//	                 ┌─────────────── Link ───────────────┐
//	source ── stream ┤ ─ conduit, to-destination ─ faults ─ ├ stream ── destination
//	                 │ ─ conduit, to-source ────── faults ─ │
//	                 └──────────────────────────────────────┘
//
// Close ends and awaits everything that a Link has started.
type Link struct {
	// Rate is what passes each way of a stream, in bytes per second; 0: as fast as it goes. In fake time something has to take
	// time. To be set before there are streams.
	Rate int

	faults []*pending

	released chan struct{} // closed by Release
	black    chan struct{} // closed by a Blackout
	closed   chan struct{} // closed by Close
	once     struct{ release, black, close sync.Once }
	wg       sync.WaitGroup

	mu        sync.Mutex // guards what follows
	ends      []io.Closer
	streams   int // made so far
	passed    map[way]*Passed
	refusing  bool
	listeners []net.Listener
}

// way is one direction of one stream.
type way struct {
	direction Direction
	stream    int
}

// Passed is what went one way.
type Passed struct {
	Bytes  int64
	Frames []wire.Type // without heartbeats; the preface is the first, as type 0
}

// NewLink returns a link with these faults, each of which happens once.
func NewLink(faults ...Fault) *Link {
	l := &Link{released: make(chan struct{}), black: make(chan struct{}), closed: make(chan struct{}), passed: map[way]*Passed{}}
	for _, f := range faults {
		l.faults = append(l.faults, &pending{Fault: f})
	}
	return l
}

// pending is a fault that may have happened.
type pending struct {
	Fault
	done atomic.Bool
}

// Pipes makes n streams in this process, and returns their ends.
func (l *Link) Pipes(n int) (source, destination []io.ReadWriter) {
	for range n {
		a, a2 := duplex()
		b, b2 := duplex()
		l.join(a2, b2)
		source, destination = append(source, a), append(destination, b)
	}
	return source, destination
}

// Listen makes a stream to the source at an address of each connection that a destination makes to the address it
// returns, until Close.
func (l *Link) Listen(source string) (addr string, err error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	l.mu.Lock()
	l.listeners = append(l.listeners, listener)
	l.mu.Unlock()
	l.wg.Go(func() {
		for {
			down, err := listener.Accept()
			if err != nil {
				return // closed by us
			}
			l.mu.Lock()
			refusing := l.refusing
			l.mu.Unlock()
			if refusing {
				down.Close()
				continue
			}
			up, err := net.Dial("tcp", source)
			if err != nil {
				down.Close()
				continue
			}
			l.join(up.(end), down.(end))
		}
	})
	return listener.Addr().String(), nil
}

// Refuse says whether new connections are closed at once, as a network does that is down.
func (l *Link) Refuse(yes bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.refusing = yes
}

// Passed returns what has gone one way of a stream so far.
func (l *Link) Passed(d Direction, stream int) Passed {
	l.mu.Lock()
	defer l.mu.Unlock()
	if p := l.passed[way{d, stream}]; p != nil {
		return Passed{p.Bytes, append([]wire.Type(nil), p.Frames...)}
	}
	return Passed{}
}

// Release lets everything pass that a Stall holds.
func (l *Link) Release() { l.once.release.Do(func() { close(l.released) }) }

// Cut ends every stream that there is now.
func (l *Link) Cut() {
	l.mu.Lock()
	ends := l.ends
	l.ends = nil
	l.mu.Unlock()
	for _, e := range ends {
		e.Close()
	}
}

// Close cuts everything and waits until nothing of the link is left.
func (l *Link) Close() {
	l.once.close.Do(func() { close(l.closed) })
	l.mu.Lock()
	for _, x := range l.listeners {
		x.Close()
	}
	l.mu.Unlock()
	l.Cut()
	l.wg.Wait()
	l.Cut() // what a listener made meanwhile; its conduits are awaited below
	l.wg.Wait()
}

// end is the link's end of a stream.
type end interface {
	io.ReadWriteCloser
	CloseWrite() error
}

// join passes on what comes from each of the two ends to the other.
func (l *Link) join(source, destination end) {
	l.mu.Lock()
	stream := l.streams
	l.streams++
	l.ends = append(l.ends, source, destination)
	var conduits []*conduit
	for _, c := range []*conduit{{way: way{ToDestination, stream}, from: source, to: destination}, {way: way{ToSource, stream}, from: destination, to: source}} {
		c.link, c.queue, c.passed, c.rate = l, make(chan parcel, 64), &Passed{}, l.Rate
		l.passed[c.way] = c.passed
		for _, f := range l.faults {
			if f.Direction == c.way.direction && (f.Stream == stream || f.Stream == AnyStream) {
				c.faults = append(c.faults, f)
			}
		}
		conduits = append(conduits, c)
	}
	l.mu.Unlock()
	for _, c := range conduits {
		l.wg.Go(c.receive)
		l.wg.Go(c.deliver)
	}
}

// conduit is one way of a stream. One goroutine receives and decides, another delivers, so that a delay does not hold up
// the sender.
type conduit struct {
	way
	link     *Link
	from, to end
	queue    chan parcel
	passed   *Passed // guarded by link.mu

	faults []*pending    // of this way
	delay  time.Duration // of every parcel
	rate   int           // bytes per second; 0: as fast as it goes
	flip   bool          // the next byte
	drop   bool          // what comes is forgotten
}

// parcel is something to deliver.
type parcel struct {
	data []byte
	due  time.Time // zero: at once
	then func()    // after the data; may be nil
}

var errEnded = errors.New("the link has ended")

// receive reads frame after frame.
func (c *conduit) receive() {
	defer close(c.queue)
	r := bufio.NewReaderSize(c.from, 64<<10)
	frames := func() int { return len(c.passed.Frames) }
	err := c.reach(func(f Fault) bool { return f.At == Point{} })
	for err == nil {
		size, kind := wire.PrefaceSize, wire.Type(0)
		if frames() > 0 {
			head, peekErr := r.Peek(wire.HeaderSize)
			if peekErr != nil {
				_ = c.pass(r, r.Buffered()) // what there is of it
				err = peekErr
				break
			}
			kind = wire.Type(head[0])
			size = wire.HeaderSize + int(binary.BigEndian.Uint32(head[4:]))
			if err = c.reach(func(f Fault) bool { return f.At.Before != 0 && f.At.Before == kind }); err != nil {
				break
			}
		}
		if err = c.pass(r, size); err != nil {
			break
		}
		if kind != wire.TypeHeartbeat {
			c.link.mu.Lock()
			c.passed.Frames = append(c.passed.Frames, kind)
			c.link.mu.Unlock()
			err = c.reach(func(f Fault) bool { return f.At.Frames > 0 && f.At.Frames == frames() })
		}
	}
	if err != errEnded {
		// The sender has ended its half, or all of it.
		c.put(parcel{then: func() { c.to.CloseWrite() }})
	}
}

// pass passes on n bytes, in pieces as they come.
func (c *conduit) pass(r *bufio.Reader, n int) error {
	for n > 0 {
		k := min(n, 32<<10)
		for _, f := range c.faults {
			if left := f.At.Bytes - c.passed.Bytes; left > 0 {
				k = int(min(int64(k), left))
			}
		}
		p := make([]byte, k)
		m, err := r.Read(p)
		p = p[:m]
		n -= m
		if c.flip && m > 0 {
			p[0] ^= 0x10
			c.flip = false
		}
		if c.rate > 0 {
			if !c.sleep(time.Duration(m) * time.Second / time.Duration(c.rate)) {
				return errEnded
			}
		}
		if m > 0 && !c.drop && !c.put(parcel{data: p}) {
			return errEnded
		}
		c.link.mu.Lock()
		c.passed.Bytes += int64(m)
		c.link.mu.Unlock()
		if err != nil {
			return err
		}
		if err := c.reach(func(f Fault) bool { return f.At.Bytes > 0 && f.At.Bytes == c.passed.Bytes }); err != nil {
			return err
		}
	}
	return nil
}

// reach carries out the faults that are due.
func (c *conduit) reach(due func(Fault) bool) error {
	for _, f := range c.faults {
		if !due(f.Fault) || !f.done.CompareAndSwap(false, true) {
			continue
		}
		if f.Reached != nil {
			f.Reached()
		}
		switch f.Kind {
		case Cut:
			c.put(parcel{then: c.link.Cut})
			return errEnded
		case Truncate:
			c.put(parcel{then: func() { c.to.CloseWrite() }})
			c.drop = true
		case Stall:
			select {
			case <-c.link.released:
			case <-c.link.closed:
				return errEnded
			}
		case Blackout:
			c.link.once.black.Do(func() { close(c.link.black) })
		case Delay:
			c.delay = f.Wait
		case Throttle:
			c.rate = f.Rate
		case Flip:
			c.flip = true
		}
	}
	return nil
}

// put queues a parcel. It reports whether the link goes on.
func (c *conduit) put(p parcel) bool {
	if c.delay > 0 {
		p.due = time.Now().Add(c.delay)
	}
	select {
	case c.queue <- p:
		return true
	case <-c.link.closed:
		return false
	}
}

func (c *conduit) deliver() {
	broken := false
	for p := range c.queue {
		select {
		case <-c.link.black:
			<-c.link.closed
			broken = true
		default:
		}
		if !p.due.IsZero() {
			broken = !c.sleep(time.Until(p.due)) || broken
		}
		if len(p.data) > 0 && !broken {
			if _, err := c.to.Write(p.data); err != nil {
				// As a host that is gone: the sender hears of it at its next word.
				broken = true
				c.from.Close()
			}
		}
		if p.then != nil {
			p.then()
		}
	}
}

// sleep reports whether the link goes on after it.
func (c *conduit) sleep(d time.Duration) bool {
	if d <= 0 {
		// Not by a timer that is due at once: two goroutines of a bubble that run such timers at the same time crash the race
		// detector (runtime.timer.unlockAndRun of Go 1.26 shares one of its contexts among them without a lock).
		select {
		case <-c.link.closed:
			return false
		default:
			return true
		}
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-c.link.closed:
		return false
	}
}

// pipe is one end of a stream in this process. Like a TCP connection, and unlike net.Pipe, it can be closed by halves.
type pipe struct {
	r *io.PipeReader
	w *io.PipeWriter
}

// duplex returns the two ends of a stream.
func duplex() (a, b *pipe) {
	ar, bw := io.Pipe()
	br, aw := io.Pipe()
	return &pipe{ar, aw}, &pipe{br, bw}
}

func (p *pipe) Read(b []byte) (int, error)  { return p.r.Read(b) }
func (p *pipe) Write(b []byte) (int, error) { return p.w.Write(b) }
func (p *pipe) CloseWrite() error           { return p.w.Close() }

// Close ends both directions: the other end reads what was written, then io.EOF, and cannot write.
func (p *pipe) Close() error {
	p.w.Close()
	return p.r.Close()
}

func (p Passed) String() string { return fmt.Sprintf("%d bytes in %d frames", p.Bytes, len(p.Frames)) }
