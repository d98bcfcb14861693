package transport

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

func checkStdio(o Options, _ string) error {
	if o.Stdio == nil {
		return errors.New("this program's standard input and output are not to be had for that")
	}
	return nil
}

func dialStdio(_ context.Context, o Options, _ string) (net.Conn, error) {
	return &stdioConn{ReadWriteCloser: o.Stdio}, nil
}

// listenStdio has one connection to accept, which is there already.
func listenStdio(_ context.Context, o Options, _ string) (net.Listener, error) {
	return &stdioListener{conn: &stdioConn{ReadWriteCloser: o.Stdio}, closed: make(chan struct{})}, nil
}

type stdioAddr struct{}

func (stdioAddr) Network() string { return "stdio" }
func (stdioAddr) String() string  { return stdioAddress }

// stdioConn has deadlines where what it is made of has them.
type stdioConn struct {
	io.ReadWriteCloser
}

func (*stdioConn) LocalAddr() net.Addr  { return stdioAddr{} }
func (*stdioConn) RemoteAddr() net.Addr { return stdioAddr{} }

func (c *stdioConn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

func (c *stdioConn) SetReadDeadline(t time.Time) error {
	if d, ok := c.ReadWriteCloser.(interface{ SetReadDeadline(time.Time) error }); ok {
		return d.SetReadDeadline(t)
	}
	return nil
}

func (c *stdioConn) SetWriteDeadline(t time.Time) error {
	if d, ok := c.ReadWriteCloser.(interface{ SetWriteDeadline(time.Time) error }); ok {
		return d.SetWriteDeadline(t)
	}
	return nil
}

type stdioListener struct {
	conn   net.Conn
	given  atomic.Bool
	once   sync.Once // guards the closing of closed
	closed chan struct{}
}

func (l *stdioListener) Accept() (net.Conn, error) {
	if !l.given.Swap(true) {
		return l.conn, nil
	}
	<-l.closed
	return nil, net.ErrClosed
}

func (l *stdioListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	if !l.given.Swap(true) {
		return l.conn.Close()
	}
	return nil
}

func (l *stdioListener) Addr() net.Addr { return stdioAddr{} }
