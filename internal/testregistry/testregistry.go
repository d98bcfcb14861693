// Package testregistry runs an OCI registry for tests: distribution/v3 over a folder, on loopback, with TLS and passwords if wanted, and a proxy
// before it that counts, limits and fails on request.
//
//	server := testregistry.Start(t, testregistry.Options{})
//	front := server.Front(t)                                   // counts, and does harm when it is told to
//	name := front.Address + "/vms/web:1"                       // as in oci://127.0.0.1:PORT/vms/web:1
//	front.Set(&testregistry.Fault{Match: testregistry.Of("GET", "blobs"), Cut: true})
//
// The server is a program of a module of its own (registry/go.mod), which the go command builds once and keeps.
package testregistry

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/bcrypt"
)

// T is what is needed of a testing.TB, or of a program.
type T interface {
	Helper()
	Fatal(...any)
	TempDir() string
	Cleanup(func())
}

// Options say what a server is like; the zero value is one without TLS that anybody may use.
type Options struct {
	TLS            bool   // with a certificate of an authority of its own: see Server.CA
	User, Password string // whom it lets in, by HTTP's basic authentication; empty: everybody
}

var program = sync.OnceValues(func() (string, error) {
	_, here, _, _ := runtime.Caller(0)
	cmd := exec.Command("go", "tool", "-n", "registry")
	cmd.Dir = filepath.Join(filepath.Dir(here), "registry")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("build registry: %w: %s", err, stderr.String())
	}
	return strings.TrimSpace(string(out)), nil
})

// Server is a running registry.
type Server struct {
	Address string // 127.0.0.1:PORT, of which names begin
	CA      string // with TLS: file with the certificate of the authority, for SSL_CERT_FILE; else empty
	Dir     string // holds all content: see Blob

	t           T
	opts        Options
	config      string // file
	certificate tls.Certificate
	cmd         *exec.Cmd
	output      *bytes.Buffer // of cmd; read when that has ended
}

// Start starts a server, which is ended with the test.
func Start(t T, opts Options) *Server {
	t.Helper()
	dir := t.TempDir()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &Server{Address: l.Addr().String(), Dir: filepath.Join(dir, "content"), t: t, opts: opts, config: filepath.Join(dir, "config.json")}
	l.Close()
	server := map[string]any{"addr": s.Address}
	if opts.TLS {
		key := filepath.Join(dir, "key.pem")
		certificate := filepath.Join(dir, "certificate.pem")
		s.CA = filepath.Join(dir, "ca.pem")
		if s.certificate, err = writeCertificates(s.CA, certificate, key); err != nil {
			t.Fatal(err)
		}
		server["tls"] = map[string]any{"certificate": certificate, "key": key}
	}
	// The configuration is YAML, of which JSON is a part.
	config := map[string]any{
		"version": "0.1", "http": server,
		"log":     map[string]any{"level": "error", "accesslog": map[string]any{"disabled": true}},
		"storage": map[string]any{"filesystem": map[string]any{"rootdirectory": s.Dir}, "delete": map[string]any{"enabled": true}},
	}
	if opts.User != "" {
		hash, err := bcrypt.GenerateFromPassword([]byte(opts.Password), bcrypt.MinCost)
		if err != nil {
			t.Fatal(err)
		}
		users := filepath.Join(dir, "htpasswd")
		if err := os.WriteFile(users, []byte(opts.User+":"+string(hash)+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		config["auth"] = map[string]any{"htpasswd": map[string]any{"realm": "test", "path": users}}
	}
	b, err := json.Marshal(config)
	if err == nil {
		err = os.WriteFile(s.config, b, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	s.Restart()
	t.Cleanup(s.Stop)
	return s
}

// Restart starts the server, which was stopped, again at the same address.
func (s *Server) Restart() {
	s.t.Helper()
	path, err := program()
	if err != nil {
		s.t.Fatal(err)
	}
	s.output = new(bytes.Buffer)
	s.cmd = exec.Command(path, "serve", s.config)
	s.cmd.Env = environment()
	s.cmd.Stdout, s.cmd.Stderr = s.output, s.output
	if err := s.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		conn, err := net.Dial("tcp", s.Address)
		if err == nil {
			conn.Close()
			return
		}
		if time.Now().After(deadline) {
			s.Stop()
			s.t.Fatal("the registry does not listen: ", s.output.String())
		}
	}
}

// environment is that of the server: without what would change its configuration, as REGISTRY_AUTH_FILE does, which is meant for clients.
func environment() []string {
	all := slices.DeleteFunc(os.Environ(), func(s string) bool { return strings.HasPrefix(s, "REGISTRY_") })
	return append(all, "OTEL_TRACES_EXPORTER=none")
}

// Stop ends the server. It may be called more than once.
func (s *Server) Stop() {
	if s.cmd != nil {
		_ = s.cmd.Process.Kill()
		_ = s.cmd.Wait()
		s.cmd = nil
	}
}

// CollectGarbage removes blobs that no manifest refers to, and manifests without a tag that no index refers to. The server is restarted.
func (s *Server) CollectGarbage() {
	s.t.Helper()
	path, err := program()
	if err != nil {
		s.t.Fatal(err)
	}
	s.Stop()
	cmd := exec.Command(path, "garbage-collect", "--delete-untagged", s.config)
	cmd.Env = environment()
	if out, err := cmd.CombinedOutput(); err != nil {
		s.t.Fatal("collect garbage: ", err, ": ", string(out))
	}
	s.Restart()
}

// Blob is the file that holds a blob or manifest, by its digest, as sha256:HEX.
func (s *Server) Blob(digest string) string {
	hex := strings.TrimPrefix(digest, "sha256:")
	return filepath.Join(s.Dir, "docker", "registry", "v2", "blobs", "sha256", hex[:2], hex, "data")
}

// DockerConfig makes a folder, for DOCKER_CONFIG, with the credentials of the server for some addresses: its own, if none are given.
func (s *Server) DockerConfig(addresses ...string) string {
	s.t.Helper()
	if len(addresses) == 0 {
		addresses = []string{s.Address}
	}
	auths := make(map[string]any)
	for _, a := range addresses {
		auths[a] = map[string]string{"auth": base64.StdEncoding.EncodeToString([]byte(s.opts.User + ":" + s.opts.Password))}
	}
	b, err := json.Marshal(map[string]any{"auths": auths})
	dir := s.t.TempDir()
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "config.json"), b, 0o600)
	}
	if err != nil {
		s.t.Fatal(err)
	}
	return dir
}

// writeCertificates makes an authority, and a certificate of it for loopback.
func writeCertificates(ca, certificate, key string) (tls.Certificate, error) {
	authorityKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	serverKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	authority := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "authority of a test"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	server := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "registry of a test"}, NotBefore: authority.NotBefore, NotAfter: authority.NotAfter,
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, DNSNames: []string{"localhost"}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	authorityDER, err := x509.CreateCertificate(rand.Reader, authority, authority, authorityKey.Public(), authorityKey)
	if err != nil {
		return tls.Certificate{}, err
	}
	serverDER, err := x509.CreateCertificate(rand.Reader, server, authority, serverKey.Public(), authorityKey)
	if err != nil {
		return tls.Certificate{}, err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(serverKey)
	if err != nil {
		return tls.Certificate{}, err
	}
	for _, f := range []struct {
		path, kind string
		der        []byte
	}{{ca, "CERTIFICATE", authorityDER}, {certificate, "CERTIFICATE", serverDER}, {key, "PRIVATE KEY", keyDER}} {
		if err := os.WriteFile(f.path, pem.EncodeToMemory(&pem.Block{Type: f.kind, Bytes: f.der}), 0o600); err != nil {
			return tls.Certificate{}, err
		}
	}
	return tls.LoadX509KeyPair(certificate, key)
}

// Proxy stands between clients and a server, with TLS if that has it, and does to requests what it is told.
type Proxy struct {
	Address string // 127.0.0.1:PORT

	// What is counted: requests, and the bytes of bodies that clients put and get.
	Gets, Heads, Puts, Posts, Patches atomic.Int64
	BytesPut, BytesGot                atomic.Int64

	fault  atomic.Pointer[Fault]
	pace   atomic.Pointer[pace]
	server *http.Server
}

// Fault is what becomes of a request; nil fields, and zero ones, change nothing.
type Fault struct {
	Match   func(r *http.Request) bool // which requests; nil: all
	Delay   time.Duration              // before it is passed on, or until the client leaves
	Hang    bool                       // until the client leaves
	Status  int                        // instead of an answer
	Corrupt bool                       // a byte of each answer's body is another
	Cut     bool                       // the answer ends in the middle, or the server reads no more than half of what is put
	Stall   bool                       // the answer's body stops in the middle, until the client leaves
}

// Front starts a proxy, which is ended with the test.
func (s *Server) Front(t T) *Proxy {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &Proxy{Address: l.Addr().String()}
	target := &url.URL{Scheme: "http", Host: s.Address}
	transport := &http.Transport{MaxIdleConnsPerHost: 64}
	if s.opts.TLS {
		pool := x509.NewCertPool()
		ca, err := os.ReadFile(s.CA)
		if err != nil {
			t.Fatal(err)
		}
		pool.AppendCertsFromPEM(ca)
		target.Scheme, transport.TLSClientConfig = "https", &tls.Config{RootCAs: pool}
		l = tls.NewListener(l, &tls.Config{Certificates: []tls.Certificate{s.certificate}})
	}
	reverse := &httputil.ReverseProxy{
		Transport: transport,
		ErrorLog:  log.New(io.Discard, "", 0),
		// The host that a client has named stays: where the server says to upload to is here.
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(target)
			r.Out.Host = r.In.Host
		},
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, _ error) { w.WriteHeader(http.StatusBadGateway) },
		ModifyResponse: func(r *http.Response) error {
			f := p.faultOf(r.Request)
			if f == nil || r.StatusCode/100 != 2 || r.Request.Method != http.MethodGet || !f.Corrupt && !f.Cut && !f.Stall {
				return nil
			}
			b, err := io.ReadAll(r.Body)
			if err != nil {
				return err
			}
			if f.Corrupt && len(b) > 0 {
				b[len(b)/2] ^= 0x10
			}
			body := io.Reader(bytes.NewReader(b))
			switch {
			case f.Cut:
				body = io.MultiReader(bytes.NewReader(b[:len(b)/2]), failing{})
			case f.Stall:
				body = io.MultiReader(bytes.NewReader(b[:len(b)/2]), stalling{r.Request.Context()})
			}
			r.Body = io.NopCloser(body)
			return nil
		},
		FlushInterval: -1,
	}
	p.server = &http.Server{ErrorLog: log.New(io.Discard, "", 0), Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if n := p.counter(r.Method); n != nil {
			n.Add(1)
		}
		if f := p.faultOf(r); f != nil {
			if f.Hang {
				<-r.Context().Done()
				return
			}
			if f.Delay > 0 {
				select {
				case <-time.After(f.Delay):
				case <-r.Context().Done():
					return
				}
			}
			if f.Status != 0 {
				w.WriteHeader(f.Status)
				return
			}
			if f.Cut && r.Method != http.MethodGet && r.ContentLength > 0 {
				r.Body = io.NopCloser(io.MultiReader(io.LimitReader(r.Body, r.ContentLength/2), failing{}))
			}
		}
		r.Body = &counting{ReadCloser: r.Body, p: p, ctx: r.Context()}
		reverse.ServeHTTP(&counter{ResponseWriter: w, p: p, ctx: r.Context()}, r)
	})}
	go func() { _ = p.server.Serve(l) }() // ends with Close
	t.Cleanup(func() {
		_ = p.server.Close()
		transport.CloseIdleConnections()
	})
	return p
}

// Set has requests fail so from now on, nil: none.
func (p *Proxy) Set(f *Fault) { p.fault.Store(f) }

// Limit has all clients together get no more than so many bytes a second, and put no more than so many, from now on; 0: any.
func (p *Proxy) Limit(bytesPerSecond int64) {
	if bytesPerSecond <= 0 {
		p.pace.Store(nil)
		return
	}
	p.pace.Store(&pace{rate: bytesPerSecond})
}

func (p *Proxy) counter(method string) *atomic.Int64 {
	return map[string]*atomic.Int64{http.MethodGet: &p.Gets, http.MethodHead: &p.Heads, http.MethodPut: &p.Puts, http.MethodPost: &p.Posts, http.MethodPatch: &p.Patches}[method]
}

func (p *Proxy) faultOf(r *http.Request) *Fault {
	f := p.fault.Load()
	if f == nil || f.Match != nil && !f.Match(r) {
		return nil
	}
	return f
}

// wait waits until n bytes may pass that go the way of w.
func (p *Proxy) wait(ctx context.Context, way int, n int) {
	pace := p.pace.Load()
	if pace == nil || n <= 0 {
		return
	}
	select {
	case <-time.After(time.Until(pace.next(way, n))):
	case <-ctx.Done():
	}
}

// pace spreads bytes over time.
type pace struct {
	rate int64 // bytes a second

	mu   sync.Mutex // guards what follows
	free [2]time.Time
}

func (p *pace) next(way, n int) time.Time {
	p.mu.Lock()
	defer p.mu.Unlock()
	if now := time.Now(); p.free[way].Before(now) {
		p.free[way] = now
	}
	p.free[way] = p.free[way].Add(time.Duration(int64(n) * int64(time.Second) / p.rate))
	return p.free[way]
}

type failing struct{}

func (failing) Read([]byte) (int, error) { return 0, errors.New("cut") }

type stalling struct{ ctx context.Context }

func (s stalling) Read([]byte) (int, error) {
	<-s.ctx.Done()
	return 0, s.ctx.Err()
}

type counting struct {
	io.ReadCloser
	p   *Proxy
	ctx context.Context
}

func (c *counting) Read(b []byte) (int, error) {
	n, err := c.ReadCloser.Read(b)
	c.p.BytesPut.Add(int64(n))
	c.p.wait(c.ctx, 0, n)
	return n, err
}

type counter struct {
	http.ResponseWriter
	p   *Proxy
	ctx context.Context
}

// Unwrap has http.ResponseController find what it needs.
func (c *counter) Unwrap() http.ResponseWriter { return c.ResponseWriter }

func (c *counter) Write(b []byte) (int, error) {
	n, err := c.ResponseWriter.Write(b)
	c.p.BytesGot.Add(int64(n))
	c.p.wait(c.ctx, 1, n)
	return n, err
}

// Of matches requests of a method, or of any if it is empty, for things of a kind: blobs, manifests, uploads.
func Of(method, kind string) func(*http.Request) bool {
	return func(r *http.Request) bool {
		return (method == "" || r.Method == method) && strings.Contains(r.URL.Path, "/"+kind+"/")
	}
}
