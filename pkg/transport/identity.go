package transport

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strconv"
	"strings"
)

// Identity is who was proven to be at the other end of a connection. The zero value is anybody.
type Identity struct {
	Method string   // how it was proven: "tls", "psk" or "unix"; empty if nothing was
	Names  []string // by which it can be allowed; none over psk, which proves no more than the key

	// Process is the id of the process at the other end, over unix sockets of this host when it is this user's or root's; 0 otherwise.
	Process int
}

// String is for people and logs.
func (i Identity) String() string {
	if i.Method == "" {
		return "anybody"
	}
	if len(i.Names) == 0 {
		return i.Method
	}
	return i.Method + " " + strings.Join(i.Names, " ")
}

// Equal reports whether two identities are the same.
func (i Identity) Equal(other Identity) bool {
	return i.Method == other.Method && slices.Equal(i.Names, other.Names)
}

// Is reports whether a name is among those of an identity. Names are, over TLS, what the certificate says if one of Options.Authorities
// vouches for it, and its key in any case:
//
//	spiffe://DOMAIN/PATH    a URI; with /* at its end, all that begin so
//	HOST                    a DNS name; *.DOMAIN in the certificate covers HOST.DOMAIN
//	pin-sha256:BASE64       the SHA-256 of the public key (its SubjectPublicKeyInfo), as of HTTP public key pinning (RFC 7469)
//
// and over unix sockets uid:NUMBER and gid:NUMBER. Names in an authority's certificates do not count, nor does a subject's common name.
func (i Identity) Is(name string) bool {
	for _, own := range i.Names {
		if own == name {
			return true
		}
		if prefix, ok := strings.CutSuffix(name, "/*"); ok && strings.Contains(prefix, "://") && strings.HasPrefix(own, prefix+"/") {
			return true
		}
		if domain, ok := strings.CutPrefix(own, "*."); ok && isHost(name) {
			if _, rest, found := strings.Cut(name, "."); found && strings.EqualFold(rest, domain) {
				return true
			}
		}
		if isHost(name) && strings.EqualFold(own, name) {
			return true
		}
	}
	return false
}

// isHost reports whether a name is of a host.
func isHost(name string) bool { return !strings.Contains(name, ":") }

const pinPrefix = "pin-sha256:"

// checkName reports what is wrong with a name that is to be allowed.
func checkName(name string) error {
	kind, rest, _ := strings.Cut(name, ":")
	switch {
	case name == "":
		return errors.New("an empty name is allowed: leave it out")
	case kind == "uid" || kind == "gid":
		if _, err := strconv.ParseUint(rest, 10, 32); err != nil {
			return fmt.Errorf("allowed name %q: %q is no number", name, rest)
		}
	case strings.HasPrefix(name, pinPrefix):
		if b, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(name, pinPrefix)); err != nil || len(b) != sha256.Size {
			return fmt.Errorf("allowed name %q: use %s and the base64 of %d bytes, as of: openssl x509 -in CERT -pubkey -noout | openssl pkey -pubin -outform der | openssl dgst -sha256 -binary | base64", name, pinPrefix, sha256.Size)
		}
	case strings.Contains(name, "://"):
		whole := strings.TrimSuffix(name, "/*")
		if strings.Contains(whole, "*") {
			return fmt.Errorf("allowed name %q: a * stands for all that follows a /, and is the last: use spiffe://DOMAIN/PATH/*, or each name", name)
		}
		if u, err := url.Parse(whole); err != nil || u.Host == "" {
			return fmt.Errorf("allowed name %q is no URI: use spiffe://DOMAIN/PATH", name)
		}
	case strings.ContainsAny(name, ":/ *"):
		return fmt.Errorf("allowed name %q: use spiffe://DOMAIN/PATH, a host's name, %sBASE64, uid:NUMBER or gid:NUMBER", name, pinPrefix)
	}
	return nil
}

// allows reports whether one of the allowed names is of the identity.
func (o Options) allows(i Identity) bool {
	for _, name := range o.Allow {
		if i.Is(name) {
			return true
		}
	}
	return false
}

// pinned is the identity of who has a certificate's key. That alone proves nothing of what the certificate says: whoever has a key
// can write any certificate for it.
func pinned(c *x509.Certificate) Identity {
	return Identity{Method: "tls", Names: []string{pin(c)}}
}

// certified is the identity in a certificate that somebody vouches for. Names which could be taken for those of another kind, such as
// the URI uid:0, do not count: they would say in a certificate what only the kernel can, or the key itself.
func certified(c *x509.Certificate) Identity {
	i := Identity{Method: "tls"}
	for _, u := range c.URIs {
		if name := u.String(); strings.Contains(name, "://") && !strings.HasPrefix(name, pinPrefix) { // base64 may have slashes
			i.Names = append(i.Names, name)
		}
	}
	for _, name := range c.DNSNames {
		if isHost(name) {
			i.Names = append(i.Names, name)
		}
	}
	for _, ip := range c.IPAddresses {
		i.Names = append(i.Names, ip.String())
	}
	i.Names = append(i.Names, pin(c))
	return i
}

// pin is the name of a certificate's key.
func pin(c *x509.Certificate) string {
	sum := sha256.Sum256(c.RawSubjectPublicKeyInfo)
	return pinPrefix + base64.StdEncoding.EncodeToString(sum[:])
}
