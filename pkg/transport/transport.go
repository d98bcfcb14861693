package transport

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strings"
	"time"
)

// keepAlive notices a host that vanished while a connection is idle. The engine's own heartbeats are faster; this bounds
// what the kernel keeps for connections nobody reads.
const keepAlive = 15 * time.Second

// Options are credentials, and who is let in. The zero value has none, and is enough for tcp, unix, ws, ssh and exec.
type Options struct {
	// Certificate and PrivateKey are the PEM files of what this side shows over TLS.
	Certificate, PrivateKey string

	// Authorities is a PEM file of the certificates that have to have signed the other side's. It may be empty when Allow pins keys. The
	// system's are never used: they vouch for anybody.
	Authorities string

	// KeyFile is the file of the key for psk: 32 random bytes, in hexadecimal or base64. It is no pipe, as it is read for each
	// connection. Key, if not empty, is that text itself and goes before it.
	KeyFile string
	Key     string

	// Allow names who may be at the other end, of which one name is enough: see [Identity.Is]. Empty: over TLS, when dialling, whoever has a
	// certificate for the host that is dialled, and when listening, whoever has one; over unix, this user and root; over psk,
	// whoever has the key.
	Allow []string

	// AnyHost takes, when dialling over TLS with an empty Allow, whoever has a certificate of Authorities, whatever host it is for: for
	// callers to whom the other side proves in another way who it is.
	AnyHost bool

	// Stdio is what stdio: is.
	Stdio io.ReadWriteCloser

	// Logger receives what happens behind listeners; nil means slog.Default().
	Logger *slog.Logger
}

// ErrRefused is wrapped by errors which say that the other side is not who it has to be, or cannot prove it.
var ErrRefused = errors.New("the other side is refused")

// ErrNoAnswer is wrapped by errors which say that nothing came from where somebody should be, where that cannot be told from nobody
// being there. Over TCP and unix sockets there is ECONNREFUSED.
var ErrNoAnswer = errors.New("nobody answers there")

// Dial connects to an address without credentials: see [Options.Dial].
func Dial(ctx context.Context, address string) (net.Conn, error) { return Options{}.Dial(ctx, address) }

// Listen listens on an address without credentials: see [Options.Listen].
func Listen(ctx context.Context, address string) (net.Listener, error) {
	return Options{}.Listen(ctx, address)
}

// Check is [Options.Check] without credentials.
func Check(address string) error { return Options{}.Check(address) }

// Dial connects to an address, and makes sure of who is there. It ends when ctx does.
func (o Options) Dial(ctx context.Context, address string) (net.Conn, error) {
	s, rest, err := o.parse(address)
	if err == nil && s.dial == nil {
		err = errors.New("one can only listen on it")
	}
	var conn net.Conn
	if err == nil {
		conn, err = s.dial(ctx, o, rest)
	}
	if err == nil {
		if _, err = Handshake(ctx, conn); err != nil {
			conn.Close()
		}
	}
	if err != nil {
		if name := Scheme(address); (name == "tls" || name == "ws" || name == "wss") && otherScheme(err) {
			err = fmt.Errorf("%w; the other side may want another scheme than %s://: dial it with the one that it listens with", err, name)
		}
		return nil, fmt.Errorf("dial %q: %w", Redacted(address), err)
	}
	return conn, nil
}

// Listen listens on an address. Port 0 chooses a free one; Addr of the listener tells which. What it accepts needs [Handshake].
func (o Options) Listen(ctx context.Context, address string) (net.Listener, error) {
	s, rest, err := o.parse(address)
	if err == nil && s.listen == nil {
		err = errors.New("it can only be dialled")
	}
	var l net.Listener
	if err == nil {
		l, err = s.listen(ctx, o, rest)
	}
	if err != nil {
		return nil, fmt.Errorf("listen on %q: %w", Redacted(address), err)
	}
	return l, nil
}

// Check reports what is wrong with an address as it is written, or with the credentials that it needs, for programs that want to
// know before they begin anything. It looks up no host and opens no connection, so an address that passes may still lead nowhere.
func (o Options) Check(address string) error {
	if _, _, err := o.parse(address); err != nil {
		return fmt.Errorf("address %q: %w", Redacted(address), err)
	}
	return nil
}

// CanListen reports whether one can listen on addresses like this one.
func CanListen(address string) bool {
	s, _, err := split(address)
	return err == nil && s.listen != nil
}

// Parallel reports whether several connections to an address make sense at a time: not to one that is a program, started for it.
func Parallel(address string) bool {
	return !Single(address) && Scheme(address) != "exec"
}

// Single reports whether an address is of one connection, which cannot be made a second time.
func Single(address string) bool { return Scheme(address) == "stdio" }

// Insecure reports whether traffic to or from an address can be read and changed by others: it is not protected, and it is
// not certain to stay on this host.
func Insecure(address string) bool {
	s, rest, err := split(address)
	return err != nil || s.open != nil && s.open(rest)
}

// handshaker is a connection that has to make sure of the other side before it is used.
type handshaker interface {
	handshake(ctx context.Context) (Identity, error)
}

// Handshake makes sure of who is at the other end of a connection that was accepted, and says who it is; it ends when ctx does. Any
// connection may be given to it: that of a stranger to this package has no identity. With an error the connection is of no use.
func Handshake(ctx context.Context, conn net.Conn) (Identity, error) {
	if h, ok := conn.(handshaker); ok {
		return h.handshake(ctx)
	}
	return Identity{}, nil
}

// IdentityOf is who was proven to be at the other end of a stream, by a [Handshake] that is over. It asks the stream, by a method
// Identity, so that a caller's own streams can have one too; the zero value is of streams that have not.
func IdentityOf(stream io.ReadWriter) Identity {
	if s, ok := stream.(interface{ Identity() Identity }); ok {
		return s.Identity()
	}
	return Identity{}
}

// bound is a connection that has a channel of its own between the two ends, for which it has a name that nobody else can make another
// channel have (RFC 5056). Its ChannelBinding is for migrate, which proves with it that nobody is between the two sides of a
// migration; it is nil before the handshake.
type bound interface{ ChannelBinding() []byte }

var _, _, _ bound = (*tlsConn)(nil), (*pskConn)(nil), (*quicConn)(nil)

// exported is the binding of a TLS channel: 32 bytes of its exporter (RFC 8446, 7.5).
func exported(s tls.ConnectionState) []byte {
	if !s.HandshakeComplete {
		return nil
	}
	b, err := s.ExportKeyingMaterial("EXPORTER-drafter", nil, 32)
	if err != nil { // not of TLS 1.3
		return nil
	}
	return b
}

// interruptible runs f, which uses a connection, and ends it when ctx ends.
func interruptible(ctx context.Context, conn net.Conn, f func() error) error {
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	interrupted := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		conn.SetDeadline(time.Unix(1, 0))
		close(interrupted)
	})
	err := f()
	if stop() {
		return err
	}
	<-interrupted
	conn.SetDeadline(time.Time{})
	if err == nil {
		return nil
	}
	return fmt.Errorf("%w (%w)", context.Cause(ctx), err)
}

// scheme is a kind of addresses.
type scheme struct {
	form   string                             // how they are written
	check  func(o Options, rest string) error // of the address and what it needs
	open   func(rest string) bool             // others can read and change what passes; nil: never
	named  bool                               // the other side has names to be allowed by
	dial   func(context.Context, Options, string) (net.Conn, error)
	listen func(context.Context, Options, string) (net.Listener, error)
}

// lookup finds a scheme by its name.
func lookup(name string) (scheme, bool) {
	s, ok := map[string]scheme{
		"tcp":   {form: "HOST:PORT", check: checkPort, open: leavesHost, dial: dialTCP, listen: listenTCP},
		"tls":   {form: "tls://HOST:PORT", check: checkTLS, named: true, dial: dialTLS, listen: listenTLS},
		"psk":   {form: "psk://HOST:PORT", check: checkPSK, dial: dialPSK, listen: listenPSK},
		"unix":  {form: "unix:///PATH", check: checkUnix, named: true, dial: dialUnix, listen: listenUnix},
		"ws":    {form: "ws://HOST:PORT/PATH", check: checkWebSocket, open: leavesHost, dial: dialWebSocket, listen: listenWebSocket},
		"wss":   {form: "wss://HOST:PORT/PATH", check: checkSecureWebSocket, named: true, dial: dialSecureWebSocket, listen: listenSecureWebSocket},
		"quic":  {form: "quic://HOST:PORT", check: checkTLS, named: true, dial: dialQUIC, listen: listenQUIC},
		"ssh":   {form: "ssh://USER@HOST/TARGET", check: checkSSH, dial: dialSSH},
		"exec":  {form: "exec:COMMAND", check: checkCommand, dial: dialCommand},
		"stdio": {form: stdioAddress, check: checkStdio, dial: dialStdio, listen: listenStdio},
	}[name]
	return s, ok
}

const forms = "HOST:PORT, or one of tcp, tls, psk, unix, ws, wss, quic and ssh with ://, exec: or stdio:"

// split finds the scheme of an address.
func split(address string) (scheme, string, error) {
	name, rest := cut(address)
	switch name {
	case "udp", "udp4", "udp6", "unixgram", "unixpacket", "ip":
		return scheme{}, "", fmt.Errorf("%s carries datagrams, which can be lost and are cut to size: use quic://HOST:PORT", name)
	}
	s, ok := lookup(name)
	if !ok {
		return scheme{}, "", fmt.Errorf("unknown scheme %q: use %s", name, forms)
	}
	return s, rest, nil
}

// parse is split, with what the address needs looked at.
func (o Options) parse(address string) (scheme, string, error) {
	s, rest, err := split(address)
	if err != nil {
		return scheme{}, "", err
	}
	if Redacted(address) != address { // first, as what finds something else may quote it
		return scheme{}, "", errors.New("a password does not belong into an address, which others can see: use a key that ssh finds, or for psk:// one in a file")
	}
	if err := s.check(o, rest); err != nil {
		return scheme{}, "", err
	}
	if len(o.Allow) > 0 && !s.named {
		return scheme{}, "", fmt.Errorf("only some are allowed (%s), but nobody proves a name there: use tls, wss, quic or unix", strings.Join(o.Allow, ", "))
	}
	for _, name := range o.Allow {
		if err := checkName(name); err != nil {
			return scheme{}, "", err
		}
	}
	return s, rest, nil
}

// checkPort checks a HOST:PORT.
func checkPort(_ Options, hostport string) error {
	host, port, err := net.SplitHostPort(hostport)
	if err != nil {
		return fmt.Errorf("not of the form HOST:PORT: %w", err)
	}
	if strings.Contains(host, "@") {
		return fmt.Errorf("%q is no host: only ssh://USER@HOST/TARGET has a user", host)
	}
	if port == "" {
		return fmt.Errorf("no port given: use HOST:PORT")
	}
	if _, err := net.LookupPort("tcp", port); err != nil {
		return fmt.Errorf("%q is no port: use HOST:PORT with a number up to 65535", port)
	}
	return nil
}

// leavesHost reports whether what is sent to a HOST:PORT, with a path or without, may leave this host.
func leavesHost(hostport string) bool {
	hostport, _, _ = strings.Cut(hostport, "/")
	host, _, err := net.SplitHostPort(hostport)
	if err != nil {
		return true
	}
	if host == "localhost" {
		return false
	}
	ip := net.ParseIP(host)
	return ip == nil || !ip.IsLoopback()
}

func dialTCP(ctx context.Context, _ Options, hostport string) (net.Conn, error) {
	return (&net.Dialer{KeepAlive: keepAlive}).DialContext(ctx, "tcp", hostport)
}

func listenTCP(ctx context.Context, _ Options, hostport string) (net.Listener, error) {
	return (&net.ListenConfig{KeepAlive: keepAlive}).Listen(ctx, "tcp", hostport)
}

// wrapped is a listener whose connections are wrapped.
type wrapped struct {
	net.Listener
	wrap func(net.Conn) net.Conn
}

func (l wrapped) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return l.wrap(conn), nil
}

func (o Options) log() *slog.Logger {
	if o.Logger != nil {
		return o.Logger
	}
	return slog.Default()
}
