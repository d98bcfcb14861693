package oci

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
)

// blobs reads parts of the blobs of a repository: the distribution specification's GET /v2/NAME/blobs/DIGEST with a Range.
type blobs struct {
	name   string // of the repository
	base   string // URL, up to the digest
	client *http.Client
}

func openBlobs(ctx context.Context, repo name.Repository, keychain authn.Keychain, rt http.RoundTripper) (*blobs, error) {
	auth, err := authn.Resolve(ctx, keychain, repo)
	if err != nil {
		return nil, err
	}
	// The transport lives longer than who opens the image waits.
	rt, err = transport.NewWithContext(context.WithoutCancel(ctx), repo.Registry, auth, rt, []string{repo.Scope(transport.PullScope)})
	if err != nil {
		return nil, err
	}
	return &blobs{
		name:   repo.Name(),
		base:   fmt.Sprintf("%s://%s/v2/%s/blobs/", repo.Scheme(), repo.RegistryStr(), repo.RepositoryStr()),
		client: &http.Client{Transport: rt},
	}, nil
}

// secure sends nothing without TLS but to this host: the library that it is for would, to any private address.
type secure struct{ http.RoundTripper }

// RoundTrip implements [http.RoundTripper].
func (s secure) RoundTrip(r *http.Request) (*http.Response, error) {
	if host := r.URL.Hostname(); r.URL.Scheme != "https" && host != "localhost" {
		if ip, err := netip.ParseAddr(host); err != nil || !ip.IsLoopback() {
			return nil, fmt.Errorf("registry %q speaks no TLS: --plain-http does without, where all that is between is to be trusted", r.URL.Host)
		}
	}
	return s.RoundTripper.RoundTrip(r)
}

// For how long a registry may say nothing, how often it is asked at least without having given anything, and the pauses between.
const (
	blobTimeout  = 30 * time.Second
	blobAttempts = 4
	firstPause   = 100 * time.Millisecond
	longestPause = 5 * time.Second
)

var errNoRanges = errors.New("the registry does not give parts of blobs")

// read reads length bytes at off. A registry that fails is asked again, a few times; with a log, as for a guest whose disk it is, for as long as it takes: but for
// a registry that says that it will not.
func (b *blobs) read(ctx context.Context, digest string, off, length int64, log *slog.Logger) ([]byte, error) {
	pause := firstPause
	data := make([]byte, length)
	for attempt, have := 1, int64(0); ; attempt++ {
		n, err := b.once(ctx, digest, off+have, data[have:])
		if errors.Is(err, errNoRanges) {
			return nil, err
		}
		if have += n; have == length {
			return data, nil
		}
		if n > 0 { // it goes on, if slowly
			attempt, pause = 0, firstPause
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		var answer *transport.Error
		refused := errors.As(err, &answer) && answer.StatusCode >= 400 && answer.StatusCode < 500 && answer.StatusCode != http.StatusTooManyRequests && answer.StatusCode != http.StatusRequestTimeout
		if attempt >= blobAttempts && (log == nil || refused) {
			return nil, fmt.Errorf("fetch %d bytes at %d of %s: %w", length, off, digest, err)
		}
		if log != nil && attempt >= blobAttempts {
			log.Warn("the registry fails, and is asked again", "layer", digest, "error", err, "after", pause)
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		pause = min(2*pause, longestPause)
	}
}

// once asks for as much as data takes, and returns how much of that has come. It waits for as long as something comes.
func (b *blobs) once(ctx context.Context, digest string, off int64, data []byte) (int64, error) {
	if len(data) == 0 {
		return 0, nil
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	silence := time.AfterFunc(blobTimeout, func() { cancel(fmt.Errorf("nothing has come for %s", blobTimeout)) })
	defer silence.Stop()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, b.base+digest, nil)
	if err != nil {
		return 0, err
	}
	req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", off, off+int64(len(data))-1))
	resp, err := b.client.Do(req)
	if err != nil {
		return 0, errors.Join(err, context.Cause(ctx))
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusOK {
		return 0, errNoRanges
	}
	if err := transport.CheckError(resp, http.StatusPartialContent); err != nil {
		return 0, err
	}
	var have int64
	for have < int64(len(data)) {
		n, err := resp.Body.Read(data[have:])
		have += int64(n)
		silence.Reset(blobTimeout)
		if err == io.EOF && have < int64(len(data)) {
			return have, io.ErrUnexpectedEOF
		}
		if err != nil && err != io.EOF {
			return have, errors.Join(err, context.Cause(ctx))
		}
	}
	return have, nil
}
