package transport

import (
	"context"
	"fmt"
	"net"
	"strings"
	"time"
)

// keepAlive notices a host that vanished while a connection is idle. The engine's own heartbeats are faster; this bounds
// what the kernel keeps for connections nobody reads.
const keepAlive = 15 * time.Second

// Dial connects to an address. It ends when ctx does.
func Dial(ctx context.Context, address string) (net.Conn, error) {
	hostport, err := parse(address)
	if err != nil {
		return nil, fmt.Errorf("dial %q: %w", address, err)
	}
	conn, err := (&net.Dialer{KeepAlive: keepAlive}).DialContext(ctx, "tcp", hostport)
	if err != nil {
		return nil, fmt.Errorf("dial %q: %w", address, err)
	}
	return conn, nil
}

// Listen listens on an address. Port 0 chooses a free one; Addr of the listener tells which.
func Listen(ctx context.Context, address string) (net.Listener, error) {
	hostport, err := parse(address)
	if err != nil {
		return nil, fmt.Errorf("listen on %q: %w", address, err)
	}
	l, err := (&net.ListenConfig{KeepAlive: keepAlive}).Listen(ctx, "tcp", hostport)
	if err != nil {
		return nil, fmt.Errorf("listen on %q: %w", address, err)
	}
	return l, nil
}

// Check reports what is wrong with an address as it is written, for programs that want to know before they begin anything.
// It looks up no host and opens no connection, so an address that passes may still lead nowhere.
func Check(address string) error {
	if _, err := parse(address); err != nil {
		return fmt.Errorf("address %q: %w", address, err)
	}
	return nil
}

// Insecure reports whether traffic to or from an address can be read and changed by others: it is not protected, and it is
// not certain to stay on this host.
func Insecure(address string) bool {
	hostport, err := parse(address)
	if err != nil {
		return true
	}
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

// parse returns the host:port of an address that is a bare one or has the scheme tcp.
func parse(address string) (string, error) {
	hostport := address
	if scheme, rest, ok := strings.Cut(address, "://"); ok {
		if scheme != "tcp" {
			return "", fmt.Errorf("unknown scheme %q: use HOST:PORT or tcp://HOST:PORT", scheme)
		}
		hostport = rest
	}
	_, port, err := net.SplitHostPort(hostport)
	if err != nil {
		return "", fmt.Errorf("not of the form HOST:PORT: %w", err)
	}
	if port == "" {
		return "", fmt.Errorf("no port given: use HOST:PORT")
	}
	if _, err := net.LookupPort("tcp", port); err != nil {
		return "", fmt.Errorf("%q is no port: use HOST:PORT with a number up to 65535", port)
	}
	return hostport, nil
}
