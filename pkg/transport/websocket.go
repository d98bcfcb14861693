package transport

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coder/websocket"
)

// opening is how long a client may take until its connection is a WebSocket, or its QUIC connection has a stream.
const opening = 10 * time.Second

func checkWebSocket(o Options, rest string) error {
	hostport, path, _ := strings.Cut(rest, "/")
	if strings.ContainsAny(path, "?# ") {
		return fmt.Errorf("%q is no path of a WebSocket: use HOST:PORT/PATH", "/"+path)
	}
	return checkPort(o, hostport)
}

func checkSecureWebSocket(o Options, rest string) error {
	if err := checkWebSocket(o, rest); err != nil {
		return err
	}
	return o.checkCredentials()
}

func dialWebSocket(ctx context.Context, o Options, rest string) (net.Conn, error) {
	return o.dialHTTP(ctx, "ws", rest)
}

func dialSecureWebSocket(ctx context.Context, o Options, rest string) (net.Conn, error) {
	return o.dialHTTP(ctx, "wss", rest)
}

func (o Options) dialHTTP(ctx context.Context, scheme, rest string) (net.Conn, error) {
	hostport, path, _ := strings.Cut(rest, "/")
	host, _, _ := net.SplitHostPort(hostport)
	// Nobody comes back to this transport for a connection that it would keep after a refusal.
	t := &http.Transport{Proxy: http.ProxyFromEnvironment, DialContext: (&net.Dialer{KeepAlive: keepAlive}).DialContext, DisableKeepAlives: true}
	if scheme == "wss" {
		t.TLSClientConfig = o.tlsConfig(host, "http/1.1")
	}
	client := &http.Client{Transport: t, CheckRedirect: func(*http.Request, []*http.Request) error {
		return http.ErrUseLastResponse // to another host, perhaps without TLS, would be to another than was asked for
	}}
	u := url.URL{Scheme: scheme, Host: hostport, Path: "/" + path}
	ws, response, err := websocket.Dial(ctx, u.String(), &websocket.DialOptions{HTTPClient: client, CompressionMode: websocket.CompressionDisabled})
	if err != nil {
		return nil, o.refusal(err)
	}
	var is Identity
	if scheme == "wss" {
		if is, err = o.verify(*response.TLS, host); err != nil {
			ws.CloseNow()
			return nil, err
		}
	}
	return newWebSocketConn(ws, is), nil
}

// webSocketConn is a WebSocket whose messages are a stream.
type webSocketConn struct {
	net.Conn
	ws     *websocket.Conn
	is     Identity
	cancel context.CancelFunc
}

func newWebSocketConn(ws *websocket.Conn, is Identity) *webSocketConn {
	ws.SetReadLimit(-1) // a message is no more than a piece of the stream, and is not kept as a whole
	ctx, cancel := context.WithCancel(context.Background())
	return &webSocketConn{websocket.NetConn(ctx, ws, websocket.MessageBinary), ws, is, cancel}
}

func (c *webSocketConn) handshake(context.Context) (Identity, error) { return c.is, nil }

// Identity is for IdentityOf.
func (c *webSocketConn) Identity() Identity { return c.is }

// Close does not wait for the other side to close too, as a WebSocket would: nobody must wait for it.
func (c *webSocketConn) Close() error {
	err := c.ws.CloseNow()
	c.cancel()
	return err
}

func listenWebSocket(ctx context.Context, o Options, rest string) (net.Listener, error) {
	return listenHTTP(ctx, o, rest, nil)
}

func listenSecureWebSocket(ctx context.Context, o Options, rest string) (net.Listener, error) {
	return listenHTTP(ctx, o, rest, o.tellRefusals(o.tlsConfig("", "http/1.1")))
}

func listenHTTP(ctx context.Context, o Options, rest string, config *tls.Config) (net.Listener, error) {
	hostport, path, _ := strings.Cut(rest, "/")
	l, err := listenTCP(ctx, o, hostport)
	if err != nil {
		return nil, err
	}
	w := &webSocketListener{queue: newQueue(l.Addr())}
	w.server = http.Server{
		ReadHeaderTimeout: opening, ReadTimeout: opening, IdleTimeout: opening, MaxHeaderBytes: 16 << 10,
		ConnState: func(conn net.Conn, is http.ConnState) {
			switch is {
			case http.StateNew:
				w.opening.enter(conn, func() {
					if t, ok := conn.(*tls.Conn); ok {
						t.NetConn().Close() // without a goodbye, for which it may be waited
					} else {
						conn.Close()
					}
				})
			case http.StateHijacked, http.StateClosed:
				w.opening.leave(conn)
			}
		},
		ErrorLog: slog.NewLogLogger(o.log().Handler(), slog.LevelDebug),
		Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			if r.URL.Path != "/"+path {
				http.NotFound(rw, r)
				return
			}
			var is Identity
			if r.TLS != nil {
				var err error
				if is, err = o.verify(*r.TLS, ""); err != nil {
					o.log().Warn("refused a connection", "from", r.RemoteAddr, "reason", err)
					http.Error(rw, "refused", http.StatusForbidden)
					return
				}
			}
			defer w.waiting.Add(-1) // until it is accepted
			if w.waiting.Add(1) > maxOpening {
				http.Error(rw, "busy", http.StatusServiceUnavailable)
				return
			}
			// What another site's page in somebody's browser asks for is refused there, by its Origin.
			ws, err := websocket.Accept(rw, r, &websocket.AcceptOptions{CompressionMode: websocket.CompressionDisabled})
			if err != nil {
				o.log().Debug("no WebSocket", "from", r.RemoteAddr, "error", err)
				return
			}
			w.put(newWebSocketConn(ws, is))
		}),
	}
	serve := l
	if config != nil {
		serve = tls.NewListener(l, config)
	}
	w.serving.Go(func() { w.fail(w.server.Serve(serve)) })
	return w, nil
}

type webSocketListener struct {
	*queue
	server  http.Server
	serving sync.WaitGroup
	opening places       // clients that are on their way
	waiting atomic.Int64 // those that are here, and not accepted yet
}

func (l *webSocketListener) Close() error {
	err := l.server.Close() // and not what was hijacked: those are the caller's, or in the queue
	l.queue.close()
	l.serving.Wait()
	return err
}

// queue is what a listener has ready to be accepted.
type queue struct {
	addr  net.Addr
	ready chan net.Conn

	once   sync.Once // guards the closing of closed
	closed chan struct{}
	err    error // valid when closed is closed
}

func newQueue(addr net.Addr) *queue {
	return &queue{addr: addr, ready: make(chan net.Conn), closed: make(chan struct{})}
}

func (q *queue) Addr() net.Addr { return q.addr }

func (q *queue) Accept() (net.Conn, error) {
	select {
	case conn := <-q.ready:
		return conn, nil
	case <-q.closed:
		return nil, q.err
	}
}

// put waits until a connection is accepted, but not for ever.
func (q *queue) put(conn net.Conn) {
	t := time.NewTimer(opening)
	defer t.Stop()
	select {
	case q.ready <- conn:
	case <-q.closed:
		conn.Close()
	case <-t.C:
		conn.Close()
	}
}

func (q *queue) fail(err error) {
	if err == nil || errors.Is(err, http.ErrServerClosed) {
		err = net.ErrClosed
	}
	q.once.Do(func() { q.err = err; close(q.closed) })
}

func (q *queue) close() { q.fail(net.ErrClosed) }
