package objstore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/url"
	"path"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"

	"github.com/drafter-vm/drafter/pkg/block"
)

// Location says where a store is. It holds no secrets, and may be told to others.
type Location struct {
	// Endpoint is the server, as http://HOST:PORT or https://HOST. Empty: Amazon's.
	Endpoint string `json:"endpoint,omitempty"`
	// Region of the bucket; empty: found out.
	Region string `json:"region,omitempty"`
	// Bucket must exist.
	Bucket string `json:"bucket"`
	// Prefix precedes the name of each object; those of different prefixes have nothing in common. It may be empty.
	Prefix string `json:"prefix,omitempty"`
}

const amazon = "https://s3.amazonaws.com"

func (l Location) String() string {
	s := "s3://" + l.Bucket
	if l.Prefix != "" {
		s += "/" + l.Prefix
	}
	if l.Endpoint != "" {
		s += " at " + l.Endpoint
	}
	return s
}

var bucketName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9]$`)

// Shown is a setting, quoted, for an error, unless it may hold credentials.
func Shown(s string) string {
	if strings.ContainsAny(s, "@?=") {
		return "(not shown, as it may hold credentials)"
	}
	return strconv.Quote(s)
}

// Same reports whether two locations are one.
func (l Location) Same(other Location) bool {
	a, b := l.normal(), other.normal()
	return a.Endpoint == b.Endpoint && a.Bucket == b.Bucket && a.Prefix == b.Prefix
}

func (l Location) normal() Location {
	if l.Endpoint == "" {
		l.Endpoint = amazon
	}
	l.Endpoint = strings.TrimRight(l.Endpoint, "/")
	l.Prefix = strings.Trim(path.Clean("/"+l.Prefix), "/")
	return l
}

// Check reports what is wrong with a location.
func (l Location) Check() error {
	if l.Bucket == "" {
		return errors.New("there is no bucket: name one")
	}
	if !bucketName.MatchString(l.Bucket) {
		return fmt.Errorf("bucket %s: use 3 to 63 letters, digits, dots and hyphens; a slash begins the prefix, and credentials are given apart", Shown(l.Bucket))
	}
	_, err := l.server()
	return err
}

func (l Location) server() (*url.URL, error) {
	u, err := url.Parse(l.normal().Endpoint)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.Path != "" || u.User != nil || u.RawQuery != "" {
		return nil, fmt.Errorf("endpoint %s: give http://HOST:PORT or https://HOST, without a path and without credentials", Shown(l.Endpoint))
	}
	return u, nil
}

// Config is how a store is used.
type Config struct {
	Location

	// AccessKey and SecretKey are the credentials. Empty: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY of the environment or
	// MINIO_ROOT_USER and MINIO_ROOT_PASSWORD, then the profile AWS_PROFILE of ~/.aws/credentials, then what the machine that this
	// runs on has been given by its cloud.
	AccessKey, SecretKey string

	// Key encrypts all that is put, and what is got must have been. Nil: nothing is encrypted.
	Key *Key

	// Concurrency bounds the requests under way. 0 means 16.
	Concurrency int

	// Timeout bounds each request. 0 means 30 s.
	Timeout time.Duration

	// Transport carries the requests. Nil: one like http.DefaultTransport.
	Transport http.RoundTripper

	// Logger receives events; nil means slog.Default().
	Logger *slog.Logger
}

// Grace is for how long a chunk that nothing refers to is kept after it was put: twice what somebody may take who puts chunks until there is a root that
// refers to them, and refreshAfter.
const Grace = 48 * time.Hour

// refreshAfter is the age at which a chunk that is to be referred to is put again, and believedFor, how long it is believed to be there once that was known.
const (
	refreshAfter = Grace / 4
	believedFor  = Grace / 4
)

// ErrNotFound is wrapped by the error of getting what is not there.
var ErrNotFound = errors.New("there is no such object")

// ErrCorrupt is wrapped by the error of getting what is not what was put there, or cannot be read with the key.
var ErrCorrupt = errors.New("the object is not what was put there")

// Store is a part of a bucket.
type Store struct {
	cfg    Config
	log    *slog.Logger
	core   *minio.Core
	idle   func() // closes idle connections
	prefix string
	slots  chan struct{}

	mu    sync.Mutex       // guards what follows
	seen  map[ID]time.Time // until when a chunk is believed to be there
	sweep int              // at that many of them those are dropped that are over
}

// Open returns a store. It sends nothing yet: see [Store.Ping].
func Open(cfg Config) (*Store, error) {
	if err := cfg.Check(); err != nil {
		return nil, fmt.Errorf("open object store: %w", err)
	}
	if (cfg.AccessKey == "") != (cfg.SecretKey == "") {
		return nil, errors.New("open object store: give both the access key and the secret key, or neither")
	}
	if cfg.Concurrency < 0 || cfg.Concurrency > 1024 {
		return nil, fmt.Errorf("open object store: concurrency %d: use 1 to 1024", cfg.Concurrency)
	}
	cfg.Location = cfg.normal()
	if cfg.Concurrency == 0 {
		cfg.Concurrency = 16
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = 30 * time.Second
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	idle := func() {}
	if cfg.Transport == nil {
		t := &http.Transport{
			Proxy: http.ProxyFromEnvironment, DialContext: (&net.Dialer{Timeout: 10 * time.Second, KeepAlive: 30 * time.Second}).DialContext,
			MaxIdleConns: cfg.Concurrency, MaxIdleConnsPerHost: cfg.Concurrency, IdleConnTimeout: time.Minute, TLSHandshakeTimeout: 10 * time.Second,
			DisableCompression: true,
		}
		cfg.Transport, idle = t, t.CloseIdleConnections
	}
	cfg.Transport = bounded{cfg.Transport}
	creds := credentials.NewStaticV4(cfg.AccessKey, cfg.SecretKey, "")
	if cfg.AccessKey == "" {
		creds = credentials.NewChainCredentials([]credentials.Provider{
			&credentials.EnvAWS{}, &credentials.EnvMinio{}, &credentials.FileAWSCredentials{}, &credentials.IAM{Client: &http.Client{Timeout: 5 * time.Second}},
		})
	}
	u, err := cfg.server()
	if err != nil {
		return nil, fmt.Errorf("open object store: %w", err)
	}
	core, err := minio.NewCore(u.Host, &minio.Options{Creds: creds, Secure: u.Scheme == "https", Region: cfg.Region, Transport: cfg.Transport, MaxRetries: 3})
	if err != nil {
		return nil, fmt.Errorf("open object store %v: %w", cfg.Location, err)
	}
	s := &Store{cfg: cfg, log: cfg.Logger, core: core, idle: idle, slots: make(chan struct{}, cfg.Concurrency), seen: make(map[ID]time.Time)}
	if cfg.Prefix != "" {
		s.prefix = cfg.Prefix + "/"
	}
	return s, nil
}

// Location is where the store is.
func (s *Store) Location() Location { return s.cfg.Location }

// Serves reports whether the store is what a configuration asks for.
func (s *Store) Serves(cfg Config) bool {
	return s.cfg.Same(cfg.Location) && s.cfg.AccessKey == cfg.AccessKey && s.cfg.SecretKey == cfg.SecretKey && s.cfg.Key.ID() == cfg.Key.ID()
}

// Close ends idle connections. The store can be used afterwards.
func (s *Store) Close() { s.idle() }

// bounded bounds what a server can have us keep in memory: answers that are no objects are lists, and errors, in XML.
type bounded struct{ http.RoundTripper }

const maxAnswer = 4 << 20

func (b bounded) RoundTrip(r *http.Request) (*http.Response, error) {
	answer, err := b.RoundTripper.RoundTrip(r)
	if err == nil && (r.Method != http.MethodGet || r.URL.RawQuery != "" || answer.StatusCode != http.StatusOK) {
		answer.Body = struct {
			io.Reader
			io.Closer
		}{io.LimitReader(answer.Body, maxAnswer), answer.Body}
	}
	return answer, err
}

// Ping reports whether the bucket is there and may be used.
func (s *Store) Ping(ctx context.Context) error {
	ctx, done, err := s.request(ctx)
	if err != nil {
		return err
	}
	defer done()
	if o, any := <-s.core.Client.ListObjects(ctx, s.cfg.Bucket, minio.ListObjectsOptions{Prefix: s.prefix, MaxKeys: 1}); any && o.Err != nil {
		return s.failed("look into", "", s.cause(ctx, o.Err))
	}
	return nil
}

// request waits until a request may be begun. Its context ends after the timeout.
func (s *Store) request(ctx context.Context) (context.Context, func(), error) {
	select {
	case s.slots <- struct{}{}:
	case <-ctx.Done():
		return nil, nil, context.Cause(ctx)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, s.cfg.Timeout, fmt.Errorf("the object store took more than %v for a request", s.cfg.Timeout))
	return ctx, func() { cancel(); <-s.slots }, nil
}

// failed is the error of a request.
func (s *Store) failed(verb, name string, err error) error {
	r := minio.ToErrorResponse(err)
	what := fmt.Sprintf("%s object %q of %v", verb, name, s.cfg.Location)
	if name == "" {
		what = fmt.Sprintf("%s %v", verb, s.cfg.Location)
	}
	switch r.Code {
	case minio.NoSuchKey:
		return fmt.Errorf("%s: %w", what, ErrNotFound)
	case minio.NoSuchBucket:
		return fmt.Errorf("%s: there is no bucket %q: make it, or name another", what, s.cfg.Bucket)
	case minio.AccessDenied, "InvalidAccessKeyId", "SignatureDoesNotMatch":
		return fmt.Errorf("%s: %w: check the access key and what it allows", what, err)
	}
	return fmt.Errorf("%s: %w", what, err)
}

// putObject puts an object in its place.
func (s *Store) putObject(ctx context.Context, name string, body []byte) error {
	ctx, done, err := s.request(ctx)
	if err != nil {
		return err
	}
	defer done()
	// One that is refused by its deadline is not sent again by the library.
	if _, err := s.core.PutObject(ctx, s.cfg.Bucket, s.prefix+name, bytes.NewReader(body), int64(len(body)), "", "", minio.PutObjectOptions{ContentType: "application/octet-stream"}); err != nil {
		return s.failed("put", name, s.cause(ctx, err))
	}
	return nil
}

// getObject gets an object of at most limit bytes.
func (s *Store) getObject(ctx context.Context, name string, limit int64) ([]byte, error) {
	ctx, done, err := s.request(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	r, info, _, err := s.core.GetObject(ctx, s.cfg.Bucket, s.prefix+name, minio.GetObjectOptions{})
	if err != nil {
		return nil, s.failed("get", name, s.cause(ctx, err))
	}
	defer r.Close()
	if info.Size > limit {
		return nil, fmt.Errorf("get object %q: it has %d bytes, and at most %d were put: %w", name, info.Size, limit, ErrCorrupt)
	}
	b := bytes.NewBuffer(make([]byte, 0, max(0, info.Size)+bytes.MinRead))
	if _, err := b.ReadFrom(io.LimitReader(r, limit+1)); err != nil {
		return nil, s.failed("get", name, s.cause(ctx, err))
	}
	if int64(b.Len()) > limit || info.Size >= 0 && int64(b.Len()) != info.Size {
		return nil, fmt.Errorf("get object %q: %d bytes came of %d: %w", name, b.Len(), info.Size, ErrCorrupt)
	}
	return b.Bytes(), nil
}

func (s *Store) cause(ctx context.Context, err error) error {
	if c := context.Cause(ctx); c != nil && !errors.Is(err, c) {
		return fmt.Errorf("%w: %w", c, err)
	}
	return err
}

// age is how long ago an object was put, by the clocks of the store and of this host.
func (s *Store) age(ctx context.Context, name string) (time.Duration, error) {
	ctx, done, err := s.request(ctx)
	if err != nil {
		return 0, err
	}
	defer done()
	info, err := s.core.Client.StatObject(ctx, s.cfg.Bucket, s.prefix+name, minio.StatObjectOptions{})
	if err != nil {
		return 0, s.failed("look at", name, s.cause(ctx, err))
	}
	return time.Since(info.LastModified), nil
}

// removeObject removes an object, if it is there.
func (s *Store) removeObject(ctx context.Context, name string) error {
	ctx, done, err := s.request(ctx)
	if err != nil {
		return err
	}
	defer done()
	if err := s.core.Client.RemoveObject(ctx, s.cfg.Bucket, s.prefix+name, minio.RemoveObjectOptions{}); err != nil {
		return s.failed("remove", name, s.cause(ctx, err))
	}
	return nil
}

// eachObject passes on the objects below a folder, in the order of their names, until f fails.
func (s *Store) eachObject(ctx context.Context, folder string, f func(name string, info minio.ObjectInfo) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	// Each part of a list is a request.
	watchdog := time.AfterFunc(s.cfg.Timeout, func() { cancel(fmt.Errorf("the object store took more than %v for a part of a list", s.cfg.Timeout)) })
	defer watchdog.Stop()
	for o := range s.core.Client.ListObjects(ctx, s.cfg.Bucket, minio.ListObjectsOptions{Prefix: s.prefix + folder + "/", Recursive: true}) {
		if o.Err != nil {
			return s.failed("list", folder+"/", s.cause(ctx, o.Err))
		}
		watchdog.Stop()
		if err := f(strings.TrimPrefix(o.Key, s.prefix), o); err != nil {
			return err
		}
		watchdog.Reset(s.cfg.Timeout)
	}
	return context.Cause(ctx)
}

// Put puts content there, unless it is there, and returns its name.
func (s *Store) Put(ctx context.Context, content []byte) (ID, error) {
	id, _, err := s.putNew(ctx, content)
	return id, err
}

// putNew is Put that says whether it was not there, or too old.
func (s *Store) putNew(ctx context.Context, content []byte) (_ ID, sent bool, err error) {
	if len(content) == 0 || len(content) > MaxChunkSize {
		return ID{}, false, fmt.Errorf("put chunk of %d bytes: 1 to %d are allowed", len(content), MaxChunkSize)
	}
	if block.IsZero(content) {
		return Zeros, false, nil
	}
	id := s.cfg.Key.idOf(content)
	sent, err = s.put(ctx, "chunks", id, content)
	return id, sent, err
}

func (s *Store) put(ctx context.Context, folder string, id ID, content []byte) (sent bool, err error) {
	if s.believes(id) {
		return false, nil
	}
	name := folder + "/" + id.path()
	age, err := s.age(ctx, name)
	if err == nil && age < refreshAfter && !s.suspects(id) {
		s.believe(id)
		return false, nil
	}
	if err != nil && !errors.Is(err, ErrNotFound) {
		return false, err
	}
	body, err := s.cfg.Key.pack(name, content)
	if err != nil {
		return false, err
	}
	if err := s.putObject(ctx, name, body); err != nil {
		return false, err
	}
	s.believe(id)
	return true, nil
}

func (s *Store) believes(id ID) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return time.Now().Before(s.seen[id])
}

func (s *Store) believe(id ID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.seen) >= s.sweep {
		now := time.Now()
		maps.DeleteFunc(s.seen, func(_ ID, until time.Time) bool { return !until.IsZero() && now.After(until) }) // suspicions stay
		s.sweep = max(2*len(s.seen), 1<<16)
	}
	s.seen[id] = time.Now().Add(believedFor)
}

// Has looks whether a chunk is there, unless it was seen there a while ago. The error wraps ErrNotFound if it is not.
func (s *Store) Has(ctx context.Context, id ID) error {
	if id == Zeros || s.believes(id) {
		return nil
	}
	if s.suspects(id) {
		return fmt.Errorf("look at chunk %v: it was found damaged, or not at all: %w", id, ErrNotFound)
	}
	if _, err := s.age(ctx, "chunks/"+id.path()); err != nil {
		return err
	}
	s.believe(id)
	return nil
}

// Doubt no longer believes of anything that it is there.
func (s *Store) Doubt() {
	s.mu.Lock()
	defer s.mu.Unlock()
	maps.DeleteFunc(s.seen, func(_ ID, until time.Time) bool { return !until.IsZero() })
}

// Get fills p with the chunk of that name, which must have that length.
func (s *Store) Get(ctx context.Context, id ID, p []byte) error {
	switch id {
	case None:
		return fmt.Errorf("get chunk: %w: nothing was put", ErrNotFound)
	case Zeros:
		clear(p)
		return nil
	}
	b, err := s.get(ctx, "chunks", id, len(p))
	if err != nil {
		return err
	}
	if len(b) != len(p) {
		return fmt.Errorf("get chunk %v: it has %d bytes, and is to have %d: %w", id, len(b), len(p), ErrCorrupt)
	}
	copy(p, b)
	return nil
}

// get gets an object that is called by its content, of at most limit bytes.
func (s *Store) get(ctx context.Context, folder string, id ID, limit int) ([]byte, error) {
	name := folder + "/" + id.path()
	body, err := s.getObject(ctx, name, int64(limit)+overhead)
	var content []byte
	if err == nil {
		content, err = s.cfg.Key.unpack(name, body, limit)
		if err == nil && s.cfg.Key.idOf(content) != id {
			err = fmt.Errorf("its content is another: %w", ErrCorrupt)
		}
		if err != nil {
			err = fmt.Errorf("get object %q: %w", name, err)
		}
	}
	if errors.Is(err, ErrNotFound) || errors.Is(err, ErrCorrupt) {
		s.forget(name) // and so it is put anew, by who has it
	}
	return content, err
}

// Is reports whether content is the chunk of that name.
func (s *Store) Is(id ID, content []byte) bool {
	if block.IsZero(content) {
		return id == Zeros
	}
	return id != None && s.cfg.Key.idOf(content) == id
}
