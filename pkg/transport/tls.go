package transport

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
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
		VerifyConnection:       func(s tls.ConnectionState) error { return o.verify(s.PeerCertificates, host) },
	}
}

// tellRefusals has refusals logged, where nobody else hears of them.
func (o Options) tellRefusals(config *tls.Config) *tls.Config {
	verify := config.VerifyConnection
	config.VerifyConnection = func(s tls.ConnectionState) error {
		err := verify(s)
		if err != nil {
			o.log().Warn("refused a connection", "reason", err)
		}
		return err
	}
	return config
}

// verify decides whether the other side, that of host if we have dialled it, is who it has to be.
func (o Options) verify(certificates []*x509.Certificate, host string) error {
	if len(certificates) == 0 {
		return fmt.Errorf("%w: it shows no certificate", ErrRefused)
	}
	leaf, now := certificates[0], time.Now()
	is := certified(leaf)
	if now.After(leaf.NotAfter) || now.Before(leaf.NotBefore) {
		return fmt.Errorf("%w: its certificate is valid from %s to %s, and it is %s (%s)", ErrRefused,
			leaf.NotBefore.UTC().Format(time.RFC3339), leaf.NotAfter.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339), is)
	}
	if name := pin(leaf); o.allows(Identity{Names: []string{name}}) {
		return nil
	}
	roots, err := o.authorities()
	if err != nil {
		return err
	}
	if roots == nil {
		return fmt.Errorf("%w: its key is none of those that are pinned (%s)", ErrRefused, is)
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
		return fmt.Errorf("%w: %w (%s)", ErrRefused, err, is)
	}
	switch {
	case len(o.Allow) > 0 && !o.allows(is):
		return fmt.Errorf("%w: it is none of those that are allowed (%s)", ErrRefused, is)
	case len(o.Allow) == 0 && host != "":
		if err := leaf.VerifyHostname(host); err != nil {
			return fmt.Errorf("%w: %w (%s); if that is who it should be, allow it by name", ErrRefused, err, is)
		}
	}
	return nil
}

// tlsConn is a TLS connection.
type tlsConn struct{ *tls.Conn }

func (c tlsConn) handshake(ctx context.Context) (Identity, error) {
	if err := c.HandshakeContext(ctx); err != nil {
		return Identity{}, fmt.Errorf("TLS: %w", err)
	}
	return c.Identity(), nil
}

// Identity is for IdentityOf.
func (c tlsConn) Identity() Identity {
	if s := c.ConnectionState(); s.HandshakeComplete {
		return certified(s.PeerCertificates[0])
	}
	return Identity{}
}

func dialTLS(ctx context.Context, o Options, hostport string) (net.Conn, error) {
	conn, err := dialTCP(ctx, o, hostport)
	if err != nil {
		return nil, err
	}
	host, _, _ := net.SplitHostPort(hostport)
	return tlsConn{tls.Client(conn, o.tlsConfig(host, protocol))}, nil
}

func listenTLS(ctx context.Context, o Options, hostport string) (net.Listener, error) {
	l, err := listenTCP(ctx, o, hostport)
	if err != nil {
		return nil, err
	}
	config := o.tlsConfig("", protocol)
	return wrapped{l, func(conn net.Conn) net.Conn { return tlsConn{tls.Server(conn, config)} }}, nil
}
