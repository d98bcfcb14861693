package blueprint

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
)

// errNotServed says that the archive answered, and has no such file: the lock is stale, or the source was guessed.
var errNotServed = errors.New("not served by the archive")

// cache is a folder of files named by the sha256 of their content. Files appear in it whole (written beside, verified,
// renamed), so that any number of builds may share it.
type cache struct {
	dir    string
	client *http.Client
}

func newCache(dir string) (*cache, error) {
	if dir == "" {
		base, err := os.UserCacheDir()
		if err != nil {
			return nil, fmt.Errorf("find a cache folder: %w; name one with --cache", err)
		}
		dir = filepath.Join(base, "drafter", "blueprint")
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("find cache folder: %w", err)
	}
	for _, sub := range []string{"sha256", "tools"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o755); err != nil {
			return nil, fmt.Errorf("create cache folder: %w; name another with --cache", err)
		}
	}
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.ResponseHeaderTimeout = 30 * time.Second
	transport.MaxIdleConnsPerHost = parallelDownloads
	transport.RegisterProtocol("file", http.NewFileTransport(http.Dir("/")))
	return &cache{dir: dir, client: &http.Client{Transport: transport}}, nil
}

const parallelDownloads = 6

func (c *cache) path(sum string) string { return filepath.Join(c.dir, "sha256", sum) }

// has tells whether the file with this digest is there. Its name was earned by its content when it was written; readers
// of untrusted formats bound themselves.
func (c *cache) has(sum string, size int64) bool {
	st, err := os.Stat(c.path(sum))
	return err == nil && (size < 0 || st.Size() == size)
}

// get makes a plain request and returns the body, at most limit bytes.
func (c *cache) get(ctx context.Context, url string, limit int64) ([]byte, error) {
	var data []byte
	err := c.retry(ctx, url, func(body io.Reader) (err error) {
		data, err = io.ReadAll(io.LimitReader(body, limit+1))
		if err == nil && int64(len(data)) > limit {
			err = fmt.Errorf("download %s: larger than %d bytes", url, limit)
		}
		return err
	})
	return data, err
}

// fetch makes sure that the file with the digest is in the cache, downloading it from url. size < 0 is unknown; count,
// if not nil, is told of the bytes as they come.
func (c *cache) fetch(ctx context.Context, url, sum string, size int64, count func(int64)) error {
	if _, err := hex.DecodeString(sum); err != nil || len(sum) != 2*sha256.Size {
		return fmt.Errorf("download %s: %q is not a sha256", url, sum)
	}
	if c.has(sum, size) {
		if count != nil && size > 0 {
			count(size)
		}
		return nil
	}
	return c.retry(ctx, url, func(body io.Reader) error {
		tmp, err := os.CreateTemp(filepath.Join(c.dir, "sha256"), ".download-*")
		if err != nil {
			return &permanentError{fmt.Errorf("create download: %w", err)}
		}
		defer os.Remove(tmp.Name())
		defer tmp.Close()
		h := sha256.New()
		limit := size
		if limit < 0 {
			limit = 1 << 30
		}
		var got int64
		w := &countingWriter{w: io.MultiWriter(tmp, h), count: func(n int64) {
			got += n
			if count != nil {
				count(n)
			}
		}}
		undo := func() {
			if count != nil {
				count(-got)
			}
		}
		if _, err := io.Copy(w, io.LimitReader(body, limit+1)); err != nil {
			undo()
			return err
		}
		if err := checkSum(url, h, sum, got, size); err != nil {
			undo()
			return err
		}
		if err := tmp.Chmod(0o644); err != nil {
			return &permanentError{err}
		}
		if err := os.Rename(tmp.Name(), c.path(sum)); err != nil {
			return &permanentError{fmt.Errorf("keep download: %w", err)}
		}
		return nil
	})
}

func checkSum(url string, h hash.Hash, want string, got, size int64) error {
	if sum := hex.EncodeToString(h.Sum(nil)); sum != want || size >= 0 && got != size {
		return fmt.Errorf("download %s is corrupt: has %d bytes and sha256 %s, expected %d and %s; the mirror or a proxy is at fault, try another --mirror",
			url, got, sum, size, want)
	}
	return nil
}

type countingWriter struct {
	w     io.Writer
	count func(int64)
}

func (w *countingWriter) Write(p []byte) (int, error) {
	n, err := w.w.Write(p)
	w.count(int64(n))
	return n, err
}

// permanentError is one that asking again does not mend.
type permanentError struct{ error }

func (e *permanentError) Unwrap() error { return e.error }

// retry makes the request and hands its body to use, up to three times.
func (c *cache) retry(ctx context.Context, rawURL string, use func(io.Reader) error) error {
	const attempts = 3
	var err error
	for i := range attempts {
		if i > 0 {
			select {
			case <-time.After(time.Duration(i) * 500 * time.Millisecond):
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		if err = c.once(ctx, rawURL, use); err == nil {
			return nil
		}
		var permanent *permanentError
		if ctx.Err() != nil {
			return ctx.Err()
		} else if errors.Is(err, errNotServed) || errors.As(err, &permanent) {
			return err
		}
	}
	return err
}

func (c *cache) once(ctx context.Context, rawURL string, use func(io.Reader) error) error {
	// A stalled mirror must not hang the build: the request dies when no byte came for a while.
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	const stall = 60 * time.Second
	timer := time.AfterFunc(stall, func() { cancel(fmt.Errorf("no data for %s", stall)) })
	defer timer.Stop()

	req, err := http.NewRequestWithContext(ctx, http.MethodGet, rawURL, nil)
	if err != nil {
		return &permanentError{fmt.Errorf("download: %w", err)}
	}
	req.Header.Set("User-Agent", "drafter-blueprint")
	resp, err := c.client.Do(req)
	if err != nil {
		var u *url.Error
		if errors.As(err, &u) {
			err = u.Err
		}
		return fmt.Errorf("reach mirror for %s: %w; check the network or name another with --mirror", rawURL, err)
	}
	defer resp.Body.Close()
	switch {
	case resp.StatusCode == http.StatusNotFound || resp.StatusCode == http.StatusGone:
		return fmt.Errorf("download %s: %w", rawURL, errNotServed)
	case resp.StatusCode != http.StatusOK:
		return fmt.Errorf("download %s: mirror answered %s", rawURL, resp.Status)
	}
	if err := use(&resettingReader{resp.Body, timer, stall}); err != nil {
		if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, context.Canceled) {
			err = cause
		}
		return fmt.Errorf("download %s: %w", rawURL, err)
	}
	return nil
}

type resettingReader struct {
	r     io.Reader
	timer *time.Timer
	d     time.Duration
}

func (r *resettingReader) Read(p []byte) (int, error) {
	n, err := r.r.Read(p)
	r.timer.Reset(r.d)
	return n, err
}

// fetchAll downloads what is missing of the packages, several at a time. Those the archive no longer serves are
// returned; any other failure is an error. archives maps suites to the base URI of the archive that has them.
func (c *cache) fetchAll(ctx context.Context, packages []Package, archives map[string]string, progress func(done, total int64)) (gone []Package, err error) {
	var total int64
	for _, p := range packages {
		if !c.has(p.SHA256, p.Size) {
			total += p.Size
		}
	}
	var sum atomic.Int64
	missing := make([]bool, len(packages))
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(parallelDownloads)
	for i, p := range packages {
		if c.has(p.SHA256, p.Size) {
			continue
		}
		base, ok := archives[p.Suite]
		if !ok {
			missing[i] = true
			continue
		}
		group.Go(func() error {
			err := c.fetch(ctx, base+"/"+p.Path, p.SHA256, p.Size, func(n int64) { progress(sum.Add(n), total) })
			if errors.Is(err, errNotServed) {
				missing[i] = true
				return nil
			}
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}
	for i, m := range missing {
		if m {
			gone = append(gone, packages[i])
		}
	}
	return gone, nil
}
