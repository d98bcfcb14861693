package transport

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/quic-go/quic-go"
)

// quicConfig lets one stream fill a fast link: a round trip of 50 ms at 1 GB/s has 50 MB on its way.
func quicConfig() *quic.Config {
	return &quic.Config{
		HandshakeIdleTimeout: opening, MaxIdleTimeout: 4 * keepAlive, KeepAlivePeriod: keepAlive,
		InitialStreamReceiveWindow: 4 << 20, MaxStreamReceiveWindow: 64 << 20, InitialConnectionReceiveWindow: 4 << 20, MaxConnectionReceiveWindow: 64 << 20,
		MaxIncomingStreams: 1, MaxIncomingUniStreams: -1,
	}
}

func dialQUIC(ctx context.Context, o Options, hostport string) (net.Conn, error) {
	host, _, _ := net.SplitHostPort(hostport)
	conn, err := quic.DialAddr(ctx, hostport, o.tlsConfig(host, protocol), quicConfig())
	if err != nil {
		return nil, unanswered(err)
	}
	var is Identity
	stream, err := conn.OpenStreamSync(ctx)
	if err == nil {
		is, err = o.verify(conn.ConnectionState().TLS, host)
	}
	if err != nil {
		conn.CloseWithError(0, "")
		return nil, o.refusal(err)
	}
	// The other side hears of a stream with its first bytes, and needs to, to make sure of us.
	return &quicConn{Stream: stream, conn: conn, options: o, is: is}, nil
}

// unanswered says of the error of a dial that nobody has answered, if that is what it is. UDP has no refusal that QUIC hears.
func unanswered(err error) error {
	var idle *quic.IdleTimeoutError
	var handshake *quic.HandshakeTimeoutError
	if errors.As(err, &idle) || errors.As(err, &handshake) {
		return fmt.Errorf("%w: %w", ErrNoAnswer, err)
	}
	return err
}

func listenQUIC(ctx context.Context, o Options, hostport string) (net.Listener, error) {
	l, err := quic.ListenAddr(hostport, o.tellRefusals(o.tlsConfig("", protocol)), quicConfig())
	if err != nil {
		return nil, err
	}
	q := &quicListener{queue: newQueue(l.Addr()), listener: l}
	q.ctx, q.cancel = context.WithCancel(context.Background())
	q.tasks.Go(func() {
		var way places // to a stream
		for {
			conn, err := l.Accept(q.ctx)
			if err != nil {
				q.fail(fmt.Errorf("%w: %w", net.ErrClosed, err))
				return
			}
			ctx, cancel := context.WithTimeout(q.ctx, opening)
			way.enter(conn, cancel)
			q.tasks.Go(func() {
				defer cancel()
				defer way.leave(conn)
				stream, err := conn.AcceptStream(ctx)
				if err != nil {
					o.log().Debug("no QUIC stream", "from", conn.RemoteAddr(), "error", err)
					conn.CloseWithError(0, "")
					return
				}
				is, err := o.verify(conn.ConnectionState().TLS, "")
				if err != nil {
					o.log().Warn("refused a connection", "from", conn.RemoteAddr(), "reason", err)
					conn.CloseWithError(0, "")
					return
				}
				q.put(&quicConn{Stream: stream, conn: conn, options: o, is: is})
			})
		}
	})
	return q, nil
}

type quicListener struct {
	*queue
	listener *quic.Listener
	ctx      context.Context
	cancel   context.CancelFunc
	tasks    sync.WaitGroup
}

func (l *quicListener) Close() error {
	l.cancel()
	err := l.listener.Close()
	l.queue.close()
	l.tasks.Wait()
	return err
}

// quicConn is a QUIC connection with its only stream.
type quicConn struct {
	*quic.Stream
	conn    *quic.Conn
	options Options
	is      Identity
	closed  atomic.Bool

	reading sync.Mutex // held while the stream is read
}

func (c *quicConn) handshake(context.Context) (Identity, error) { return c.is, nil }

// Identity is for IdentityOf.
func (c *quicConn) Identity() Identity { return c.is }

// ChannelBinding is for bound.
func (c *quicConn) ChannelBinding() []byte { return exported(c.conn.ConnectionState().TLS) }

func (c *quicConn) LocalAddr() net.Addr  { return quicAddr{c.conn.LocalAddr()} }
func (c *quicConn) RemoteAddr() net.Addr { return quicAddr{c.conn.RemoteAddr()} }

// quicAddr is of a stream, though it is carried by datagrams.
type quicAddr struct{ net.Addr }

func (quicAddr) Network() string { return "quic" }

func (c *quicConn) Read(p []byte) (int, error) {
	c.reading.Lock()
	defer c.reading.Unlock()
	if c.closed.Load() {
		return 0, net.ErrClosed
	}
	n, err := c.Stream.Read(p)
	if c.closed.Load() && errors.Is(err, os.ErrDeadlineExceeded) {
		err = net.ErrClosed
	}
	return n, c.options.refusal(gone(err))
}

func (c *quicConn) Write(p []byte) (int, error) {
	n, err := c.Stream.Write(p)
	return n, c.options.refusal(gone(err))
}

// gone makes of the other side's orderly end what it is of a stream.
func gone(err error) error {
	var app *quic.ApplicationError
	if errors.As(err, &app) && app.Remote && app.ErrorCode == 0 {
		return io.EOF
	}
	return err
}

// lingering is how long what was written before Close may take to arrive.
const lingering = 5 * time.Second

// Close returns at once. What was written goes on its way, as it does on a TCP connection that is closed: the connection ends, which
// would undo that, when the other side has ended the stream too, or after lingering.
func (c *quicConn) Close() error {
	if c.closed.Swap(true) {
		return nil
	}
	err := c.Stream.Close()
	c.Stream.SetReadDeadline(time.Unix(1, 0)) // nobody reads any more
	go func() {
		c.reading.Lock()
		defer c.reading.Unlock()
		c.Stream.SetReadDeadline(time.Now().Add(lingering))
		_, _ = io.Copy(io.Discard, c.Stream)
		c.conn.CloseWithError(0, "")
	}()
	return err
}
