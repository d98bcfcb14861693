package transport

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/quic-go/quic-go"
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
	case len(o.Allow) == 0 && host != "" && !o.AnyHost:
		if err := leaf.VerifyHostname(host); err != nil {
			return Identity{}, fmt.Errorf("%w: %w (%s); if that is who it should be, allow it by name", ErrRefused, err, is)
		}
	}
	return is, nil
}

// The alerts of TLS (RFC 8446, 6.2) that can be about the certificate which the other side was shown.
var certificateAlerts = []tls.AlertError{
	42,  // bad_certificate
	43,  // unsupported_certificate
	44,  // certificate_revoked
	45,  // certificate_expired
	46,  // certificate_unknown
	48,  // unknown_ca
	49,  // access_denied
	116, // certificate_required
}

const noApplicationProtocol = tls.AlertError(120) // the alert that there is no protocol which both speak

// alerted reports whether an error is one of these alerts, from the other side. Over TCP crypto/tls has no exported type for them, but
// the same text.
func alerted(err error, alerts ...tls.AlertError) bool {
	var op *net.OpError
	var q *quic.TransportError
	for _, a := range alerts {
		if errors.As(err, &op) && op.Op == "remote error" && op.Err.Error() == a.Error() {
			return true
		}
		if errors.As(err, &q) && q.Remote && q.ErrorCode.IsCryptoError() && byte(q.ErrorCode) == byte(a) {
			return true
		}
	}
	return false
}

// refusal says of an error that it is the other side's refusal of our certificate, if it is. With TLS 1.3 the side that has dialled
// hears of that with what it reads first.
func (o Options) refusal(err error) error {
	if alerted(err, certificateAlerts...) {
		return fmt.Errorf("the other side has refused the certificate that was shown to it, %q, and its log says why: %w", o.Certificate, err)
	}
	return err
}

// otherScheme reports whether an error of a connection that was made can come of two sides which speak different protocols.
func otherScheme(err error) bool {
	var header tls.RecordHeaderError
	return errors.As(err, &header) || alerted(err, noApplicationProtocol) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) ||
		errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) || strings.Contains(err.Error(), "malformed HTTP") // net/http has no type for that
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
		return Identity{}, fmt.Errorf("TLS: %w", c.options.refusal(err))
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

func (c *tlsConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	return n, c.options.refusal(err)
}

// Identity is for IdentityOf.
func (c *tlsConn) Identity() Identity {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.is
}

// ChannelBinding is for bound.
func (c *tlsConn) ChannelBinding() []byte { return exported(c.ConnectionState()) }

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
