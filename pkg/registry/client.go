package registry

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2/errdef"
	"oras.land/oras-go/v2/registry/remote"
	"oras.land/oras-go/v2/registry/remote/auth"
	"oras.land/oras-go/v2/registry/remote/credentials"
	"oras.land/oras-go/v2/registry/remote/errcode"
	"oras.land/oras-go/v2/registry/remote/retry"

	"github.com/drafter-vm/drafter/internal/version"
)

// Transport says how a registry is spoken to. Its zero value is by HTTPS; on loopback by whichever of HTTPS and HTTP it answers.
//
// Credentials are those of docker login (DOCKER_CONFIG, else ~/.docker/config.json, with its credential helpers), else those of podman login
// (REGISTRY_AUTH_FILE, else containers/auth.json in XDG_RUNTIME_DIR).
type Transport struct {
	// PlainHTTP, if it is true, has everything go unencrypted; if it is false, nothing. Nil: see above.
	PlainHTTP *bool

	// CA is a file with certificates, PEM, which are trusted beside the system's. Empty: none.
	CA string

	// Concurrency is how many requests there are at once; 0 means 4.
	Concurrency int

	// StallTimeout is how long nothing of an answer may come before a request is given up, and made again; 0 means 10 seconds.
	StallTimeout time.Duration

	// Logger receives events; nil means slog.Default().
	Logger *slog.Logger

	backoff time.Duration // before something is tried again, and each time twice that; 0: firstBackoff
}

const (
	attempts       = 5 // of everything, before it has failed
	firstBackoff   = 250 * time.Millisecond
	uploadPatience = 6       // StallTimeouts
	maxManifest    = 4 << 20 // bytes, of a manifest or an index of manifests
)

// ErrNotFound is wrapped by the error of asking for a package that is not there.
var ErrNotFound = errors.New("there is no such package")

// errStalled is why a request ends of which nothing comes.
var errStalled = errors.New("the registry does not go on answering")

// client speaks with a registry about a repository.
type client struct {
	Transport
	ref  Reference
	repo *remote.Repository
	auth *auth.Client
	http *http.Transport
}

func newClient(ctx context.Context, ref Reference, t Transport) (_ *client, err error) {
	if t.Concurrency == 0 {
		t.Concurrency = 4
	}
	if t.StallTimeout == 0 {
		t.StallTimeout = 10 * time.Second
	}
	if t.Logger == nil {
		t.Logger = slog.Default()
	}
	c := &client{Transport: t, ref: ref}
	roots, err := authorities(t.CA)
	if err != nil {
		return nil, err
	}
	dialer := &net.Dialer{Timeout: t.StallTimeout, KeepAlive: 15 * time.Second}
	c.http = &http.Transport{
		Proxy: http.ProxyFromEnvironment, DialContext: dialer.DialContext, TLSHandshakeTimeout: t.StallTimeout, IdleConnTimeout: 30 * time.Second,
		MaxIdleConnsPerHost: 4 * t.Concurrency, DisableCompression: true, TLSClientConfig: &tls.Config{RootCAs: roots},
		// HTTP/1 only: what somebody waits for gets a connection of its own, and is not queued behind the rest.
		TLSNextProto: map[string]func(string, *tls.Conn) http.RoundTripper{},
	}
	store, err := credentialStore()
	if err != nil {
		return nil, err
	}
	c.auth = &auth.Client{
		Client: &http.Client{Transport: &retry.Transport{Base: c.http, Policy: func() retry.Policy {
			// Few: try makes others, which also know what is fleeting beyond a single request.
			return &retry.GenericPolicy{Retryable: retry.DefaultPredicate, Backoff: retry.DefaultBackoff, MinWait: 200 * time.Millisecond, MaxWait: 3 * time.Second, MaxRetry: 2}
		}}},
		Credential: credentials.Credential(store), Cache: auth.NewCache(),
	}
	c.auth.SetUserAgent("drafter/" + version.String())
	if ref.loopback() {
		c.auth.BlockedRealmPrefixes = []netip.Prefix{} // its tokens come from here, too
	}
	if c.repo, err = remote.NewRepository(ref.Host + "/" + ref.Repository); err != nil {
		return nil, fmt.Errorf("name %q: %w", ref, err)
	}
	c.repo.Client = c.auth
	switch {
	case t.PlainHTTP != nil:
		c.repo.PlainHTTP = *t.PlainHTTP
	case ref.loopback():
		c.repo.PlainHTTP = c.speaksPlain(ctx)
	}
	return c, nil
}

// close lets go of connections.
func (c *client) close() { c.http.CloseIdleConnections() }

// speaksPlain reports whether the registry answers a TLS handshake with something else.
func (c *client) speaksPlain(ctx context.Context) bool {
	host := c.ref.Host
	if _, _, err := net.SplitHostPort(host); err != nil {
		host = net.JoinHostPort(strings.Trim(host, "[]"), "443")
	}
	ctx, cancel := context.WithTimeout(ctx, c.StallTimeout)
	defer cancel()
	d := tls.Dialer{Config: &tls.Config{InsecureSkipVerify: true}} // nothing is said over it
	conn, err := d.DialContext(ctx, "tcp", host)
	if err != nil {
		var other tls.RecordHeaderError
		return errors.As(err, &other)
	}
	conn.Close()
	return false
}

// authorities are whose certificates are trusted; nil: the system's.
func authorities(file string) (*x509.CertPool, error) {
	if file == "" {
		return nil, nil
	}
	pool, err := x509.SystemCertPool()
	if err != nil {
		pool = x509.NewCertPool()
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("read certificates: %w", err)
	}
	if !pool.AppendCertsFromPEM(b) {
		return nil, fmt.Errorf("read certificates %q: there is none in it: give a PEM file", file)
	}
	return pool, nil
}

// credentialStore finds what docker and podman have been told.
func credentialStore() (credentials.Store, error) {
	docker, err := credentials.NewStoreFromDocker(credentials.StoreOptions{})
	if err != nil {
		return nil, fmt.Errorf("read the credentials of docker: %w", err)
	}
	path := os.Getenv("REGISTRY_AUTH_FILE")
	if dir := os.Getenv("XDG_RUNTIME_DIR"); path == "" && dir != "" {
		path = filepath.Join(dir, "containers", "auth.json")
	}
	if _, err := os.Stat(path); path == "" || err != nil {
		return docker, nil
	}
	podman, err := credentials.NewStore(path, credentials.StoreOptions{})
	if err != nil {
		return nil, fmt.Errorf("read the credentials of podman: %w", err)
	}
	return credentials.NewStoreWithFallbacks(docker, podman), nil
}

// final reports whether an error would be the same the next time.
func final(err error) bool {
	var answer *errcode.ErrorResponse
	if errors.As(err, &answer) {
		return answer.StatusCode/100 == 4 && answer.StatusCode != http.StatusRequestTimeout && answer.StatusCode != http.StatusTooManyRequests
	}
	var certificate *tls.CertificateVerificationError
	var record tls.RecordHeaderError
	return errors.Is(err, errdef.ErrNotFound) || errors.As(err, &certificate) || errors.As(err, &record) || errors.Is(err, auth.ErrBasicCredentialNotFound) ||
		errors.Is(err, errdef.ErrInvalidReference) || errors.As(err, new(finalError))
}

// finalError is an error that would be the same the next time.
type finalError struct{ error }

func (e finalError) Unwrap() error { return e.error }

// explain adds what can be done about an error.
func (c *client) explain(err error) error {
	var answer *errcode.ErrorResponse
	var certificate *tls.CertificateVerificationError
	var record tls.RecordHeaderError
	switch {
	case errors.Is(err, auth.ErrBasicCredentialNotFound), errors.As(err, &answer) && (answer.StatusCode == http.StatusUnauthorized || answer.StatusCode == http.StatusForbidden):
		return fmt.Errorf("%w: log in with docker login, podman login or skopeo login %s, as somebody who may do this", err, c.ref.Host)
	case errors.As(err, &certificate):
		return fmt.Errorf("%w: name the authority of its certificate (--registry-ca, or SSL_CERT_FILE)", err)
	case errors.As(err, &record):
		return fmt.Errorf("%w: it speaks no TLS: if all that is between is to be trusted, --plain-http", err)
	}
	return err
}

// try is patiently with the patience of StallTimeout.
func (c *client) try(ctx context.Context, do func(ctx context.Context, alive func()) error) error {
	return c.patiently(ctx, c.StallTimeout, do)
}

// patiently does something, and again if that fails in a way that may be fleeting. Each time it may take as long as it calls alive once in a while.
func (c *client) patiently(ctx context.Context, patience time.Duration, do func(ctx context.Context, alive func()) error) error {
	for n := 0; ; n++ {
		trying, stop := context.WithCancelCause(ctx)
		timer := time.AfterFunc(patience, func() { stop(errStalled) })
		err := do(trying, func() { timer.Reset(patience) })
		timer.Stop()
		if err != nil && errors.Is(context.Cause(trying), errStalled) && ctx.Err() == nil {
			err = fmt.Errorf("%w, for %v", errStalled, patience)
		}
		stop(nil)
		switch {
		case err == nil:
			return nil
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case final(err) || n+1 == attempts:
			return c.explain(err)
		}
		wait := time.Duration(float64(cmp.Or(c.backoff, firstBackoff)<<n) * (0.8 + 0.4*rand.Float64()))
		c.Logger.Debug("a request to a registry failed, and is made again", "image", c.ref.String(), "error", err)
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// aliveReader says that something goes on whenever something is read.
type aliveReader struct {
	io.Reader
	alive func(n int)
}

func (r aliveReader) Read(p []byte) (int, error) {
	n, err := r.Reader.Read(p)
	if n > 0 {
		r.alive(n)
	}
	return n, err
}

// manifest gets a manifest, or an index of them, by tag or digest.
func (c *client) manifest(ctx context.Context, reference string) (desc ocispec.Descriptor, content []byte, err error) {
	err = c.try(ctx, func(ctx context.Context, alive func()) error {
		d, body, err := c.repo.Manifests().FetchReference(ctx, reference)
		if err != nil {
			return err
		}
		defer body.Close()
		b, err := io.ReadAll(io.LimitReader(aliveReader{body, func(int) { alive() }}, maxManifest+1))
		if err != nil {
			return err
		}
		if len(b) > maxManifest {
			return finalError{fmt.Errorf("manifest %s has more than %d bytes: %w", reference, maxManifest, ErrCorrupt)}
		}
		if want, err := digest.Parse(reference); err == nil {
			d.Digest = want
		}
		if got := digest.FromBytes(b); got != d.Digest {
			return fmt.Errorf("manifest %s has digest %s, want %s: %w", reference, got, d.Digest, ErrCorrupt)
		}
		desc, content = ocispec.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: int64(len(b))}, b
		return nil
	})
	if errors.Is(err, errdef.ErrNotFound) {
		err = fmt.Errorf("%w: the registry does not know %q", ErrNotFound, reference)
	}
	return desc, content, err
}

// blob gets a blob, whole, of which there may be so many bytes.
func (c *client) blob(ctx context.Context, desc ocispec.Descriptor, most int64) (content []byte, err error) {
	if desc.Size <= 0 || desc.Size > most {
		return nil, fmt.Errorf("blob %s has %d bytes, and may have from 1 to %d: %w", desc.Digest, desc.Size, most, ErrCorrupt)
	}
	err = c.try(ctx, func(ctx context.Context, alive func()) error {
		body, err := c.get(ctx, desc.Digest, 0, desc.Size, desc.Size)
		if err != nil {
			return err
		}
		defer body.Close()
		var b bytes.Buffer // grows by what comes, whatever the size is said to be
		if _, err := io.CopyN(&b, aliveReader{body, func(int) { alive() }}, desc.Size); err != nil {
			return fmt.Errorf("read blob %s: %w", desc.Digest, cut(err))
		}
		if got := digest.FromBytes(b.Bytes()); got != desc.Digest {
			return fmt.Errorf("blob %s has digest %s: %w", desc.Digest, got, ErrCorrupt)
		}
		content = b.Bytes()
		return nil
	})
	return content, err
}

// cut is err, of a body that must not have ended.
func cut(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// get asks for n bytes of a blob of size bytes, from off. The body may hold more.
func (c *client) get(ctx context.Context, d digest.Digest, off, n, size int64) (io.ReadCloser, error) {
	scheme := "https"
	if c.repo.PlainHTTP {
		scheme = "http"
	}
	ctx = auth.AppendRepositoryScope(ctx, c.repo.Reference, auth.ActionPull)
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("%s://%s/v2/%s/blobs/%s", scheme, c.repo.Reference.Host(), c.ref.Repository, d), nil)
	if err != nil {
		return nil, err
	}
	whole := off == 0 && n == size
	if !whole {
		r.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", off, off+n-1))
	}
	answer, err := c.auth.Do(r)
	if err != nil {
		return nil, err
	}
	switch {
	case answer.StatusCode == http.StatusPartialContent && !whole:
		var first int64
		if _, err := fmt.Sscanf(answer.Header.Get("Content-Range"), "bytes %d-", &first); err != nil || first != off {
			answer.Body.Close()
			return nil, fmt.Errorf("get blob %s from byte %d: the registry answers with the range %q", d, off, answer.Header.Get("Content-Range"))
		}
		return answer.Body, nil
	case answer.StatusCode == http.StatusOK:
		if _, err := io.CopyN(io.Discard, answer.Body, off); err != nil { // it knows no ranges
			answer.Body.Close()
			return nil, fmt.Errorf("get blob %s: %w", d, cut(err))
		}
		return answer.Body, nil
	}
	defer answer.Body.Close()
	if answer.StatusCode == http.StatusNotFound {
		return nil, fmt.Errorf("get blob %s: %w", d, errdef.ErrNotFound)
	}
	return nil, fmt.Errorf("get blob %s: %w", d, &errcode.ErrorResponse{Method: http.MethodGet, URL: r.URL, StatusCode: answer.StatusCode})
}

// put puts a blob unless it is there, and says whether it was not. Sent is told of what is on its way, and of what was in vain by a negative number.
func (c *client) put(ctx context.Context, desc ocispec.Descriptor, content []byte, sent func(n int64)) (added bool, err error) {
	// A registry may take its time to store what it has got, and no guest waits for it.
	err = c.patiently(ctx, uploadPatience*c.StallTimeout, func(ctx context.Context, alive func()) error {
		there, err := c.repo.Blobs().Exists(ctx, desc)
		if there || err != nil {
			return err
		}
		alive()
		gone := int64(0)
		err = c.repo.Blobs().Push(ctx, desc, io.NopCloser(aliveReader{bytes.NewReader(content), func(n int) {
			alive()
			gone += int64(n)
			sent(int64(n))
		}}))
		if err != nil {
			sent(-gone)
			return err
		}
		added = true
		return nil
	})
	if err != nil {
		return false, fmt.Errorf("put blob %s: %w", desc.Digest, err)
	}
	return added, nil
}

// putManifest puts a manifest, or an index of them, by its digest, or by a tag.
func (c *client) putManifest(ctx context.Context, desc ocispec.Descriptor, content []byte, tag string) error {
	// A registry looks for all that the manifest refers to.
	err := c.patiently(ctx, uploadPatience*c.StallTimeout, func(ctx context.Context, _ func()) error {
		if tag == "" {
			return c.repo.Manifests().Push(ctx, desc, bytes.NewReader(content))
		}
		return c.repo.Manifests().PushReference(ctx, desc, bytes.NewReader(content), tag)
	})
	if err != nil {
		return fmt.Errorf("put manifest %s: %w", desc.Digest, err)
	}
	return nil
}

// has fails unless the repository has a blob.
func (c *client) has(ctx context.Context, desc ocispec.Descriptor) error {
	return c.try(ctx, func(ctx context.Context, _ func()) error {
		there, err := c.repo.Blobs().Exists(ctx, desc)
		if err == nil && !there {
			err = finalError{errdef.ErrNotFound}
		}
		return err
	})
}

// errNoMount is why a blob is not mounted.
var errNoMount = errors.New("the registry does not mount it")

// mount has a blob of another repository of the registry be one of this, too.
func (c *client) mount(ctx context.Context, desc ocispec.Descriptor, from string) error {
	return c.try(ctx, func(ctx context.Context, _ func()) error {
		there, err := c.repo.Blobs().Exists(ctx, desc)
		if there || err != nil {
			return err
		}
		return c.repo.Mount(ctx, desc, from, func() (io.ReadCloser, error) { return nil, finalError{errNoMount} })
	})
}
