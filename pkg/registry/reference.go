package registry

import (
	"fmt"
	"net"
	"strings"

	"github.com/opencontainers/go-digest"
	"oras.land/oras-go/v2/registry"
)

// Scheme begins what names a package in a registry.
const Scheme = "oci://"

// Reference names a package: oci://HOST[:PORT]/REPOSITORY[:TAG][@sha256:DIGEST].
type Reference struct {
	Host       string // with a port, if there is one
	Repository string
	Tag        string // empty: none is given
	Digest     string // sha256:…, which pins the content, whatever the tag means by now; empty: it does not
}

// ParseReference reads a Reference. What gives neither a tag nor a digest means the tag latest.
func ParseReference(s string) (Reference, error) {
	fail := func(why string) (Reference, error) {
		return Reference{}, fmt.Errorf("%q does not name a package in a registry: %s; give it as %sHOST/NAME:TAG, or as %sHOST/NAME@sha256:DIGEST", s, why, Scheme, Scheme)
	}
	rest, ok := strings.CutPrefix(s, Scheme)
	if !ok {
		return fail("it does not begin with " + Scheme)
	}
	host, path, ok := strings.Cut(rest, "/")
	if !ok || host == "" || path == "" {
		return fail("a host and a name are needed")
	}
	if strings.Contains(host, "@") {
		return Reference{}, fmt.Errorf("the name of a package in a registry holds no password: log in to it (docker login, podman login, skopeo login), and give %sHOST/NAME:TAG", Scheme)
	}
	r := Reference{Host: host}
	path, r.Digest, ok = strings.Cut(path, "@")
	if ok {
		if d, err := digest.Parse(r.Digest); err != nil || d.Algorithm() != digest.SHA256 {
			return fail(fmt.Sprintf("%q is no SHA-256 digest", r.Digest))
		}
	}
	r.Repository, r.Tag, ok = strings.Cut(path, ":")
	if ok && r.Tag == "" {
		return fail("its tag is empty")
	}
	if r.Tag == "" && r.Digest == "" {
		r.Tag = "latest"
	}
	checked := registry.Reference{Registry: r.Host, Repository: r.Repository, Reference: r.Tag}
	if err := checked.ValidateRegistry(); err != nil {
		return fail("its host is not one")
	}
	if err := checked.ValidateRepository(); err != nil {
		return fail("a name has lower-case letters, digits and single . _ - / within")
	}
	if r.Tag != "" && checked.ValidateReferenceAsTag() != nil {
		return fail("a tag has up to 128 letters, digits and . _ - within")
	}
	return r, nil
}

func (r Reference) String() string {
	s := Scheme + r.Host + "/" + r.Repository
	if r.Tag != "" {
		s += ":" + r.Tag
	}
	if r.Digest != "" {
		s += "@" + r.Digest
	}
	return s
}

// IsReference reports whether s is meant as a Reference, for those who take other things as well.
func IsReference(s string) bool { return strings.HasPrefix(s, Scheme) }

// Names reports whether r, as somebody gave it, may mean what pinned does: it is the same but for a digest that it does not give.
func (r Reference) Names(pinned Reference) bool {
	return r.Host == pinned.Host && r.Repository == pinned.Repository && (r.Tag == "" || r.Tag == pinned.Tag) && (r.Digest == "" || r.Digest == pinned.Digest)
}

// wanted is what a registry is asked for: the digest, else the tag.
func (r Reference) wanted() string {
	if r.Digest != "" {
		return r.Digest
	}
	return r.Tag
}

// pinned is r with a digest.
func (r Reference) pinned(d digest.Digest) Reference {
	r.Digest = d.String()
	return r
}

// loopback reports whether the registry is on this host.
func (r Reference) loopback() bool {
	host := r.Host
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	ip := net.ParseIP(strings.Trim(host, "[]"))
	return host == "localhost" || ip != nil && ip.IsLoopback()
}
