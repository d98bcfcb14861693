package serve

import (
	"context"
	"io"
	"net"
	"sync"

	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"github.com/sirupsen/logrus"
)

// Conn serves calls on conn until it ends, or ctx does. The server may serve others too, and is not closed.
func Conn(ctx context.Context, server *ttrpc.Server, conn net.Conn) {
	c := &served{Conn: conn, closed: make(chan struct{})}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	// ttrpc writes to the process's logger unless told otherwise; what it would say is seen here anyway.
	silent := logrus.New()
	silent.SetOutput(io.Discard)
	server.Serve(log.WithLogger(ctx, logrus.NewEntry(silent)), &once{conn: c})
}

// served ends a connection in the one way that ttrpc's server answers by ending, too: every error of Read is io.EOF.
type served struct {
	net.Conn
	once   sync.Once
	closed chan struct{}
}

func (c *served) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if err != nil {
		err = io.EOF
	}
	return n, err
}

func (c *served) Close() error {
	c.once.Do(func() { close(c.closed) })
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
