package transport

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"
)

// protocol is what we call ourselves in TLS's choice of a protocol (RFC 7301).
const protocol = "drafter"

func checkTLS(o Options, hostport string) error {
	if err := checkPort(o, hostport); err != nil {
		return err
	}
	return o.checkCredentials()
}

// checkCredentials reports what is wrong with the files for TLS.
func (o Options) checkCredentials() error {
	if _, err := o.certificate(); err != nil {
		return err
	}
	if _, err := o.authorities(); err != nil {
		return err
	}
	if o.Authorities == "" && !o.pins() {
		return errors.New("nobody could be trusted: give the certificates of the authorities, or pin the other side's key")
	}
	return nil
}

func (o Options) certificate() (*tls.Certificate, error) {
	switch {
	case o.Certificate == "" && o.PrivateKey == "":
		return nil, errors.New("both sides show a certificate there: give one, and its key")
	case o.Certificate == "":
		return nil, fmt.Errorf("there is a key (%q), but no certificate", o.PrivateKey)
	case o.PrivateKey == "":
		return nil, fmt.Errorf("certificate %q has no key", o.Certificate)
	}
	c, err := tls.LoadX509KeyPair(o.Certificate, o.PrivateKey)
	if err != nil {
		return nil, fmt.Errorf("certificate %q with key %q: %w", o.Certificate, o.PrivateKey, err)
	}
	return &c, nil
}

// authorities are nil if there are none.
func (o Options) authorities() (*x509.CertPool, error) {
	if o.Authorities == "" {
		return nil, nil
	}
	text, err := os.ReadFile(o.Authorities)
	if err != nil {
		return nil, fmt.Errorf("certificates of the authorities: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(text) {
		return nil, fmt.Errorf("certificates of the authorities: there is none in %q", o.Authorities)
	}
	return pool, nil
}

// pins reports whether a key is allowed by its pin.
func (o Options) pins() bool {
	for _, name := range o.Allow {
		if len(name) > len(pinPrefix) && name[:len(pinPrefix)] == pinPrefix {
			return true
		}
	}
	return false
}

// tlsConfig is for one side of connections: towards host, or, if that is empty, for a listener.
func (o Options) tlsConfig(host, protocol string) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		NextProtos: []string{protocol},
		ServerName: host,
		// Both are looked at by VerifyConnection, in the same way.
		InsecureSkipVerify:     true,
		ClientAuth:             tls.RequireAnyClientCert,
		SessionTicketsDisabled: true, // with each connection all of it is proven anew
		GetCertificate:         func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return o.certificate() },
		GetClientCertificate:   func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return o.certificate() },
		VerifyConnection: func(s tls.ConnectionState) error {
			_, err := o.verify(s, host)
			return err
		},
	}
}

// tellRefusals has refusals logged, where nobody else hears of them.
func (o Options) tellRefusals(config *tls.Config) *tls.Config {
	config.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		from := hello.Conn.RemoteAddr()
		own := config.Clone()
		own.VerifyConnection = func(s tls.ConnectionState) error {
			err := config.VerifyConnection(s)
			if err != nil {
				o.log().Warn("refused a connection", "from", from, "reason", err)
			}
			return err
		}
		return own, nil
	}
	return config
}

// verify decides whether the other side, that of host if we have dialled it, is who it has to be, and says what was proven of it. It
// is called during the handshake, so that the other side is told of a refusal, and once more after it for the identity, which TLS
// has no place for.
func (o Options) verify(s tls.ConnectionState, host string) (Identity, error) {
	certificates := s.PeerCertificates
	if len(certificates) == 0 {
		return Identity{}, fmt.Errorf("%w: it shows no certificate", ErrRefused)
	}
	leaf, now := certificates[0], time.Now()
	is := certified(leaf) // so it says
	if now.After(leaf.NotAfter) || now.Before(leaf.NotBefore) {
		return Identity{}, fmt.Errorf("%w: its certificate is valid from %s to %s, and it is %s (it says that it is %s)", ErrRefused,
			leaf.NotBefore.UTC().Format(time.RFC3339), leaf.NotAfter.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339), is)
	}
	key := pinned(leaf)
	known := o.allows(key)
	roots, err := o.authorities()
	switch {
	case known && (err != nil || roots == nil):
		return key, nil // nobody has to vouch for it, nor does
	case err != nil:
		return Identity{}, err
	case roots == nil:
		return Identity{}, fmt.Errorf("%w: its key is none of those that are pinned (it says that it is %s)", ErrRefused, is)
	}
	usage := x509.ExtKeyUsageClientAuth
	if host != "" {
		usage = x509.ExtKeyUsageServerAuth
	}
	between := x509.NewCertPool()
	for _, c := range certificates[1:] {
		between.AddCert(c)
	}
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{usage}}); err != nil {
		if known {
			return key, nil
		}
		return Identity{}, fmt.Errorf("%w: %w (it says that it is %s)", ErrRefused, err, is)
	}
	switch {
	case len(o.Allow) > 0 && !o.allows(is):
		return Identity{}, fmt.Errorf("%w: it is none of those that are allowed (%s)", ErrRefused, is)
	case len(o.Allow) == 0 && host != "":
		if err := leaf.VerifyHostname(host); err != nil {
			return Identity{}, fmt.Errorf("%w: %w (%s); if that is who it should be, allow it by name", ErrRefused, err, is)
		}
	}
	return is, nil
}

// tlsConn is a TLS connection.
type tlsConn struct {
	*tls.Conn
	options Options
	host    string // that was dialled; empty: it was accepted

	mu sync.Mutex // guards what follows
	is Identity
}

func (c *tlsConn) handshake(ctx context.Context) (Identity, error) {
	if err := c.HandshakeContext(ctx); err != nil {
		return Identity{}, fmt.Errorf("TLS: %w", err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.is.Method == "" {
		var err error
		if c.is, err = c.options.verify(c.ConnectionState(), c.host); err != nil {
			return Identity{}, fmt.Errorf("TLS: %w", err)
		}
	}
	return c.is, nil
}

// Identity is for IdentityOf.
func (c *tlsConn) Identity() Identity {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.is
}

func dialTLS(ctx context.Context, o Options, hostport string) (net.Conn, error) {
	conn, err := dialTCP(ctx, o, hostport)
	if err != nil {
		return nil, err
	}
	host, _, _ := net.SplitHostPort(hostport)
	return &tlsConn{Conn: tls.Client(conn, o.tlsConfig(host, protocol)), options: o, host: host}, nil
}

func listenTLS(ctx context.Context, o Options, hostport string) (net.Listener, error) {
	l, err := listenTCP(ctx, o, hostport)
	if err != nil {
		return nil, err
	}
	config := o.tlsConfig("", protocol)
	return wrapped{l, func(conn net.Conn) net.Conn { return &tlsConn{Conn: tls.Server(conn, config), options: o} }}, nil
}
