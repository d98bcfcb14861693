// Package tests3 runs an S3 server for tests: versitygw over a folder, on loopback, and a proxy before it that fails on request.
//
// The server is a program of a module of its own (versitygw/go.mod), which the go command builds once and keeps.
package tests3

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// The credentials of the server, and a bucket that is there.
const (
	AccessKey = "test-access"
	SecretKey = "test-secret-key"
	Bucket    = "vms"
)

// T is what is needed of a testing.TB, or of a program.
type T interface {
	Helper()
	Fatal(...any)
	TempDir() string
	Cleanup(func())
}

var program = sync.OnceValues(func() (string, error) {
	_, here, _, _ := runtime.Caller(0)
	cmd := exec.Command("go", "tool", "-n", "versitygw")
	cmd.Dir = filepath.Join(filepath.Dir(here), "versitygw")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("build versitygw: %w: %s", err, stderr.String())
	}
	return strings.TrimSpace(string(out)), nil
})

// Server is a running server.
type Server struct {
	Endpoint string // http://127.0.0.1:PORT
	Dir      string // holds a folder for each bucket, with a file for each object

	t   T
	cmd *exec.Cmd
}

// Start starts a server, which is ended with the test.
func Start(t T) *Server {
	t.Helper()
	path, err := program()
	if err != nil {
		t.Fatal(err)
	}
	s := &Server{Dir: t.TempDir(), t: t}
	if err := os.Mkdir(filepath.Join(s.Dir, Bucket), 0o755); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	l.Close()
	s.Endpoint = "http://" + address
	s.run(path, address)
	t.Cleanup(s.Stop)
	return s
}

func (s *Server) run(path, address string) {
	s.t.Helper()
	output := new(bytes.Buffer)
	s.cmd = exec.Command(path, "--port", address, "--quiet", "--access", AccessKey, "--secret", SecretKey, "posix", s.Dir)
	s.cmd.Stdout, s.cmd.Stderr = output, output
	if err := s.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		conn, err := net.Dial("tcp", address)
		if err == nil {
			conn.Close()
			return
		}
		if time.Now().After(deadline) {
			s.Stop()
			s.t.Fatal("the S3 server does not listen: ", output.String())
		}
	}
}

// Stop ends the server. It may be called more than once.
func (s *Server) Stop() {
	if s.cmd != nil {
		_ = s.cmd.Process.Kill()
		_ = s.cmd.Wait()
		s.cmd = nil
	}
}

// Restart starts the server again, at the same address.
func (s *Server) Restart() {
	s.t.Helper()
	path, err := program()
	if err != nil {
		s.t.Fatal(err)
	}
	s.run(path, strings.TrimPrefix(s.Endpoint, "http://"))
}

// Objects lists the files of the objects below a folder of the bucket.
func (s *Server) Objects(folder string) (paths []string) {
	_ = filepath.WalkDir(filepath.Join(s.Dir, Bucket, folder), func(path string, d os.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			paths = append(paths, path)
		}
		return nil
	})
	return paths
}

// Proxy stands between clients and a server, and does to requests what it is told.
type Proxy struct {
	Endpoint string

	// Requests and Bytes are counted: of what clients get, and put.
	Gets, Puts        atomic.Int64
	BytesIn, BytesOut atomic.Int64

	fault  atomic.Pointer[Fault]
	server *http.Server
}

// Fault is what becomes of a request; nil fields, and zero ones, change nothing.
type Fault struct {
	Match   func(r *http.Request) bool // which requests; nil: all
	Delay   time.Duration              // before it is passed on, or until the client leaves
	Hang    bool                       // until the client leaves
	Status  int                        // instead of an answer
	Corrupt bool                       // a byte of each answer's body is another
	Cut     bool                       // the answer ends in the middle
}

// Front starts a proxy, which is ended with the test.
func (s *Server) Front(t T) *Proxy {
	t.Helper()
	target, err := url.Parse(s.Endpoint)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &Proxy{Endpoint: "http://" + l.Addr().String()}
	reverse := &httputil.ReverseProxy{
		ErrorLog: log.New(io.Discard, "", 0),
		// The host that a client has signed stays.
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(target)
			r.Out.Host = r.In.Host
		},
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, _ error) { w.WriteHeader(http.StatusBadGateway) },
		ModifyResponse: func(r *http.Response) error {
			if f := p.faultOf(r.Request); f != nil && r.StatusCode == http.StatusOK && (f.Corrupt || f.Cut) {
				b, err := io.ReadAll(r.Body)
				if err != nil {
					return err
				}
				if f.Corrupt && len(b) > 0 {
					b[len(b)/2] ^= 0x10
				}
				body := io.Reader(bytes.NewReader(b))
				if f.Cut {
					body = io.MultiReader(bytes.NewReader(b[:len(b)/2]), failing{})
				}
				r.Body = io.NopCloser(body)
			}
			return nil
		},
	}
	p.server = &http.Server{ErrorLog: log.New(io.Discard, "", 0), Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.Method {
		case http.MethodGet:
			p.Gets.Add(1)
		case http.MethodPut:
			p.Puts.Add(1)
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
		}
		r.Body = counting{r.Body, &p.BytesIn}
		reverse.ServeHTTP(counter{w, &p.BytesOut}, r)
	})}
	go func() { _ = p.server.Serve(l) }() // ends with Close
	t.Cleanup(func() { _ = p.server.Close() })
	return p
}

// Set has requests fail so from now on, nil: none.
func (p *Proxy) Set(f *Fault) { p.fault.Store(f) }

func (p *Proxy) faultOf(r *http.Request) *Fault {
	f := p.fault.Load()
	if f == nil || f.Match != nil && !f.Match(r) {
		return nil
	}
	return f
}

type failing struct{}

func (failing) Read([]byte) (int, error) { return 0, errors.New("cut") }

type counting struct {
	io.ReadCloser
	n *atomic.Int64
}

func (c counting) Read(p []byte) (int, error) {
	n, err := c.ReadCloser.Read(p)
	c.n.Add(int64(n))
	return n, err
}

type counter struct {
	http.ResponseWriter
	n *atomic.Int64
}

func (c counter) Write(p []byte) (int, error) {
	n, err := c.ResponseWriter.Write(p)
	c.n.Add(int64(n))
	return n, err
}

// Of matches requests of a method for objects below a folder of the bucket, with whatever prefix.
func Of(method, folder string) func(*http.Request) bool {
	return func(r *http.Request) bool {
		return r.Method == method && strings.Contains(r.URL.Path, "/"+folder+"/")
	}
}

// Environment is that of a process which is to use the server.
func Environment() []string {
	return []string{"AWS_ACCESS_KEY_ID=" + AccessKey, "AWS_SECRET_ACCESS_KEY=" + SecretKey}
}
