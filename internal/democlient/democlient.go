package democlient

import (
	"bufio"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"hash/crc32"
	"log/slog"
	"net"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/drafter-vm/drafter/internal/testnet"
)

// Config says what to load and how.
type Config struct {
	// Address is the server's, IP address and port.
	Address string
	// Namespace is the name of the network namespace to connect from; empty: the present one.
	Namespace string
	// Prefix is what keys start with; empty: "k:".
	Prefix string
	// PayloadSize is the length of values in bytes, at least 64; 0: 64.
	PayloadSize int
	// PingInterval is the time between pings; 0: 1 ms; negative: no pings.
	PingInterval time.Duration
	// Timeout is how long to wait for an answer, or for a connection, before a connection is given up; 0: 10 s. It should
	// be longer than the moves that a connection has to survive.
	Timeout time.Duration
	// RetryDelay is the pause before connecting again, and after a command the server refused; 0: 10 ms.
	RetryDelay time.Duration
	// Logger receives broken connections and lost keys; nil means slog.Default().
	Logger *slog.Logger
}

// Client is a running load.
type Client struct {
	cfg    Config
	token  string // tells the values of this run from those of others
	cancel context.CancelFunc
	done   sync.WaitGroup // writer and pinger
	stop   sync.Once

	writes, pings *timeline
	reconnects    atomic.Int64

	mu      sync.Mutex // guards address
	address string
}

// Stats is what has happened so far.
type Stats struct {
	AckedWrites int   `json:"acked_writes"`
	Pings       int   `json:"pings"` // answered
	Reconnects  int64 `json:"client_reconnects"`
	// The longest times between two answers, in milliseconds.
	LongestGap      float64 `json:"longest_gap_ms"`
	LongestWriteGap float64 `json:"longest_write_gap_ms"`
}

// Start begins the load. It returns when the server has answered on both connections; it waits for a server that is not up
// yet until ctx is cancelled, which at any later time ends the load, as Stop does.
func Start(ctx context.Context, cfg Config) (*Client, error) {
	if _, _, err := net.SplitHostPort(cfg.Address); err != nil {
		return nil, fmt.Errorf("load server %q: %w", cfg.Address, err)
	}
	if cfg.Prefix == "" {
		cfg.Prefix = "k:"
	}
	if cfg.PayloadSize == 0 {
		cfg.PayloadSize = 64
	}
	if cfg.PayloadSize < 64 || cfg.PayloadSize > maxBulk {
		return nil, fmt.Errorf("load server %q: payload size %d is not between 64 and %d", cfg.Address, cfg.PayloadSize, maxBulk)
	}
	if cfg.PingInterval == 0 {
		cfg.PingInterval = time.Millisecond
	}
	if cfg.Timeout <= 0 {
		cfg.Timeout = 10 * time.Second
	}
	if cfg.RetryDelay <= 0 {
		cfg.RetryDelay = 10 * time.Millisecond
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}

	ctx, cancel := context.WithCancel(ctx)
	c := &Client{cfg: cfg, address: cfg.Address, token: rand.Text(), cancel: cancel}
	writer, err := c.firstConn(ctx)
	if err != nil {
		cancel()
		return nil, fmt.Errorf("load server %q: %w", cfg.Address, err)
	}
	var pinger *conn
	if cfg.PingInterval > 0 {
		if pinger, err = c.firstConn(ctx); err != nil {
			writer.Close()
			cancel()
			return nil, fmt.Errorf("load server %q: %w", cfg.Address, err)
		}
	}
	start := time.Now()
	c.writes, c.pings = &timeline{start: start}, &timeline{start: start}
	c.done.Go(func() { c.keep(ctx, "writer", writer, c.write) })
	if pinger != nil {
		c.done.Go(func() { c.keep(ctx, "pinger", pinger, c.ping) })
	}
	return c, nil
}

// firstConn waits for the server and returns a connection on which it has answered.
func (c *Client) firstConn(ctx context.Context) (*conn, error) {
	for {
		cn, err := c.dial(ctx)
		if err == nil {
			stop := context.AfterFunc(ctx, func() { cn.Close() })
			_, _, err = cn.do("PING")
			if stop() && err == nil {
				return cn, nil
			}
			cn.Close()
		}
		c.cfg.Logger.Debug("server does not answer yet", "address", c.cfg.Address, "error", err)
		if !c.pause(ctx) {
			return nil, errors.Join(ctx.Err(), err)
		}
	}
}

// Stop ends the load and waits until it has ended.
func (c *Client) Stop() {
	c.cancel()
	c.done.Wait()
	c.stop.Do(func() {
		c.writes.stop()
		c.pings.stop()
	})
}

// Stats returns what has happened so far.
func (c *Client) Stats() Stats {
	begin, now := c.pings.start, time.Now()
	s := Stats{
		AckedWrites:     c.writes.count(),
		Pings:           c.pings.count(),
		Reconnects:      c.reconnects.Load(),
		LongestWriteGap: Milliseconds(c.writes.gapBetween(begin, now)),
	}
	if c.cfg.PingInterval > 0 {
		s.LongestGap = Milliseconds(c.pings.gapBetween(begin, now))
	}
	return s
}

// Milliseconds is a duration as a number of milliseconds, for JSON.
func Milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// GapBetween is the longest time between two answered pings that overlaps [from, to]: how long a client had no server
// because of what happened then. The gap counts whole, though it may have begun before or ended after. If no ping was
// answered since, it is counted up to now, or to Stop.
func (c *Client) GapBetween(from, to time.Time) time.Duration { return c.pings.gapBetween(from, to) }

// WriteGapBetween is like GapBetween for acknowledged writes, of which only one is under way at a time.
func (c *Client) WriteGapBetween(from, to time.Time) time.Duration {
	return c.writes.gapBetween(from, to)
}

// AckedBetween is the number of writes that were acknowledged at or after from and before to.
func (c *Client) AckedBetween(from, to time.Time) int { return c.writes.countBetween(from, to) }

// Key is the name of key number n.
func (c *Client) Key(n int) string { return c.cfg.Prefix + strconv.Itoa(n) }

// payload is the value of key number n: the number, the token of the run, filler, and a checksum over all that, so that
// others can tell a damaged value too.
func (c *Client) payload(n int) string {
	const checksum = 1 + 8
	s := strconv.Itoa(n) + " " + c.token + " "
	s += strings.Repeat(s, c.cfg.PayloadSize/len(s)+1)
	s = s[:c.cfg.PayloadSize-checksum]
	return fmt.Sprintf("%s %08x", s, crc32.ChecksumIEEE([]byte(s)))
}

// At has connections that are made from now on go to another address: those that are there stay.
func (c *Client) At(address string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.address = address
}

func (c *Client) at() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.address
}

// Verify reads every key acknowledged so far back and returns how many are missing or have another value than was
// written. An error means that not all could be read. The first few lost keys are logged.
func (c *Client) Verify(ctx context.Context) (lost int, err error) {
	lost, err = c.verify(ctx, c.writes.count())
	if err != nil {
		return lost, fmt.Errorf("verify keys of %q: %w", c.at(), err)
	}
	return lost, nil
}

func (c *Client) verify(ctx context.Context, acked int) (lost int, err error) {
	cn, err := c.dial(ctx)
	if err != nil {
		return 0, err
	}
	defer cn.Close()
	stop := context.AfterFunc(ctx, func() { cn.Close() })
	defer stop()

	const batch = 256 // so many requests under way: little enough to fit any socket buffer
	for first := 0; first < acked; {
		n := min(batch, acked-first)
		var requests []byte
		for i := range n {
			requests = appendCommand(requests, "GET", c.Key(first+i))
		}
		if err := cn.send(requests); err != nil {
			return lost, errors.Join(ctx.Err(), err)
		}
		lostHere, loading := 0, false
		for i := range n {
			value, exists, err := cn.receive()
			var refused serverError
			if errors.As(err, &refused) && strings.HasPrefix(string(refused), "LOADING ") {
				loading = true
				continue
			}
			if err != nil {
				return lost, errors.Join(ctx.Err(), fmt.Errorf("read key %q: %w", c.Key(first+i), err))
			}
			if exists && value == c.payload(first+i) {
				continue
			}
			lostHere++
			if lost+lostHere <= 10 {
				c.cfg.Logger.Error("acknowledged write is lost", "key", c.Key(first+i), "exists", exists, "value", value)
			}
		}
		if loading { // the server reads its own files: ask for all of these keys again
			if !c.pause(ctx) {
				return lost, ctx.Err()
			}
			continue
		}
		lost += lostHere
		first += n
	}
	return lost, nil
}

// keep runs work on connections, a new one whenever the old one broke, until ctx is cancelled.
func (c *Client) keep(ctx context.Context, role string, cn *conn, work func(context.Context, *conn) error) {
	for {
		stop := context.AfterFunc(ctx, func() { cn.Close() }) // ends waiting for answers
		err := work(ctx, cn)
		stop()
		cn.Close()
		if ctx.Err() != nil {
			return
		}
		logger := c.cfg.Logger.With("role", role, "address", c.at())
		logger.Info("connection broke, connecting again", "error", err)
		for {
			if !c.pause(ctx) {
				return
			}
			if cn, err = c.dial(ctx); err == nil {
				break
			}
			logger.Debug("server does not answer", "error", err)
		}
		c.reconnects.Add(1)
		logger.Info("connected again")
	}
}

// write sets the next key, and the next, until the connection breaks.
func (c *Client) write(ctx context.Context, cn *conn) error {
	for ctx.Err() == nil {
		n := c.writes.count() // only we add to it
		reply, _, err := cn.do("SET", c.Key(n), c.payload(n))
		var refused serverError
		switch {
		case errors.As(err, &refused):
			c.cfg.Logger.Debug("server refused a write", "key", c.Key(n), "error", err)
			if !c.pause(ctx) {
				return ctx.Err()
			}
		case err != nil:
			return err
		case reply != "OK":
			return fmt.Errorf("answer to SET is %.40q, not OK", reply)
		default:
			c.writes.mark()
		}
	}
	return ctx.Err()
}

// ping sends pings and notes their answers until the connection breaks.
func (c *Client) ping(ctx context.Context, cn *conn) error {
	answers := make(chan error, 1)
	go func() {
		for {
			// While nothing was answered for long, pings are under way: there is always something to wait for.
			_, _, err := cn.receive()
			var refused serverError
			if err != nil && !errors.As(err, &refused) {
				cn.Close() // ends sending
				answers <- err
				return
			}
			if err == nil { // a server that refuses pings, because it is loading, is no server yet
				c.pings.mark()
			}
		}
	}()
	ticker := time.NewTicker(c.cfg.PingInterval)
	defer ticker.Stop()
	request := appendCommand(nil, "PING")
	for {
		select {
		case err := <-answers:
			return err
		case <-ticker.C:
			if cn.send(request) != nil {
				cn.Close() // ends receiving, which knows better what happened
				return <-answers
			}
		}
	}
}

// pause waits for RetryDelay and reports whether to go on.
func (c *Client) pause(ctx context.Context) bool {
	timer := time.NewTimer(c.cfg.RetryDelay)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}

// conn is a connection to the server. Sending and receiving may be done by one goroutine each.
type conn struct {
	net.Conn
	replies *bufio.Reader
	timeout time.Duration
}

func (c *Client) dial(ctx context.Context) (*conn, error) {
	ctx, cancel := context.WithTimeout(ctx, c.cfg.Timeout)
	defer cancel()
	nc, err := testnet.DialContext(ctx, c.cfg.Namespace, "tcp", c.at())
	if err != nil {
		return nil, err
	}
	return &conn{nc, bufio.NewReader(nc), c.cfg.Timeout}, nil
}

func (c *conn) send(b []byte) error {
	if err := c.SetWriteDeadline(time.Now().Add(c.timeout)); err != nil {
		return err
	}
	_, err := c.Write(b)
	return err
}

func (c *conn) receive() (value string, exists bool, err error) {
	if err := c.SetReadDeadline(time.Now().Add(c.timeout)); err != nil {
		return "", false, err
	}
	return readReply(c.replies)
}

func (c *conn) do(args ...string) (value string, exists bool, err error) {
	if err := c.send(appendCommand(nil, args...)); err != nil {
		return "", false, err
	}
	return c.receive()
}
