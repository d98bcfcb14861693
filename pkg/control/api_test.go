package control

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/drafter-vm/drafter/pkg/migrate"
)

// fake notes what it is asked to do.
type fake struct {
	mu   sync.Mutex // guards what follows
	did  []string
	fail error
}

func (f *fake) note(format string, args ...any) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.did = append(f.did, fmt.Sprintf(format, args...))
	return f.fail
}

func (f *fake) Status(context.Context) (Status, error) {
	return Status{State: "running", PID: 7, Migration: MigrationOf(migrate.Progress{Role: "source", State: "copying", Round: 2})}, f.note("status")
}
func (f *fake) Pause(context.Context) error                     { return f.note("pause") }
func (f *fake) Resume(context.Context) error                    { return f.note("resume") }
func (f *fake) SetMigratable(_ context.Context, may bool) error { return f.note("migratable %t", may) }
func (f *fake) Cancel(context.Context) error                    { return f.note("cancel") }
func (f *fake) Stop(context.Context) error                      { return f.note("stop") }
func (f *fake) Migrate(ctx context.Context, address string) (*migrate.Report, error) {
	return &migrate.Report{ID: "m", Outcome: "moved"}, f.note("migrate %s", address)
}
func (f *fake) Snapshot(_ context.Context, dir string) (*migrate.Report, error) {
	return &migrate.Report{ID: "s"}, f.note("snapshot %s", dir)
}
func (f *fake) Balloon(_ context.Context, size int64) (Balloon, error) {
	return Balloon{size / 2}, f.note("balloon %d", size)
}

// TestClient has a client call all there is, over a socket.
func TestClient(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	f := &fake{}
	s := Serve(l, NewHandler(f), nil)
	defer s.Close()
	c := NewClient(func(ctx context.Context) (net.Conn, error) { return new(net.Dialer).DialContext(ctx, "unix", path) })
	ctx := t.Context()
	status, err := c.Status(ctx)
	if err != nil || status.State != "running" || status.PID != 7 || status.Migration.Round != 2 {
		t.Errorf("%+v, %v", status, err)
	}
	if err := errors.Join(c.Pause(ctx), c.Resume(ctx), c.SetMigratable(ctx, true), c.SetMigratable(ctx, false), c.Cancel(ctx), c.Stop(ctx)); err != nil {
		t.Error(err)
	}
	if r, err := c.Migrate(ctx, "tls://h:1"); err != nil || r.Outcome != "moved" {
		t.Errorf("%+v, %v", r, err)
	}
	if r, err := c.Snapshot(ctx, "/a b"); err != nil || r.ID != "s" {
		t.Errorf("%+v, %v", r, err)
	}
	if b, err := c.Balloon(ctx, 1<<20); err != nil || b.Given != 1<<19 {
		t.Errorf("%+v, %v", b, err)
	}
	if want := "status pause resume migratable true migratable false cancel stop migrate tls://h:1 snapshot /a b balloon 1048576"; strings.Join(f.did, " ") != want {
		t.Errorf("done was %q, want %q", f.did, want)
	}
	for _, is := range []error{ErrConflict, ErrInvalid, errors.New("of another kind")} {
		f.fail = fmt.Errorf("the VM cannot: %w", is)
		err := c.Pause(ctx)
		if err == nil || err.Error() != f.fail.Error() || errors.Is(err, ErrConflict) != (is == ErrConflict) || errors.Is(err, ErrInvalid) != (is == ErrInvalid) {
			t.Errorf("for %v the client says %v", f.fail, err)
		}
	}
	if err := c.call(ctx, http.MethodGet, "/v2/future", nil, nil); err == nil || !strings.Contains(err.Error(), "another version") {
		t.Errorf("an unknown path: %v", err)
	}
}

// TestRequestsRefused sends what is no request.
func TestRequestsRefused(t *testing.T) {
	for _, tt := range []struct {
		method, path, body string
		status             int
		want               string
	}{
		{"POST", "/v1/migratable", "", 400, `"on" is missing`},
		{"POST", "/v1/migratable", `{"on":"yes"}`, 400, "not understood"},
		{"POST", "/v1/migratable", `{"on":true,"force":true}`, 400, `unknown field`},
		{"POST", "/v1/migratable", `{"on":true} {}`, 400, "something follows"},
		{"POST", "/v1/migrate", `{}`, 400, `"address" is missing`},
		{"POST", "/v1/snapshot", `{"dir":""}`, 400, `"dir" is missing`},
		{"POST", "/v1/balloon", `{}`, 400, `"size" is missing`},
		{"POST", "/v1/pause", `[`, 400, "not understood"},
		{"POST", "/v1/pause", `{"x":` + strings.Repeat(" ", maxBody) + `}`, 400, "more than 65536 bytes"},
		{"GET", "/v1/pause", "", 405, ""},
		{"POST", "/v1/status", "", 405, ""},
		{"GET", "/", "", 404, ""},
	} {
		f := &fake{}
		w := httptest.NewRecorder()
		NewHandler(f).ServeHTTP(w, httptest.NewRequest(tt.method, tt.path, strings.NewReader(tt.body)))
		if w.Code != tt.status || !strings.Contains(w.Body.String(), strings.ReplaceAll(tt.want, `"`, `\"`)) {
			t.Errorf("%s %s %.40q: %d %s, want %d %s", tt.method, tt.path, tt.body, w.Code, w.Body, tt.status, tt.want)
		}
		if len(f.did) > 0 {
			t.Errorf("%s %s %.40q did %q", tt.method, tt.path, tt.body, f.did)
		}
	}
}

// FuzzControl feeds a control socket whatever parses as HTTP: what is done is what was asked for in full, and every answer is one.
func FuzzControl(f *testing.F) {
	for _, s := range []string{
		"GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n", "POST /v1/pause HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n",
		"POST /v1/migrate HTTP/1.1\r\nHost: x\r\nContent-Length: 15\r\n\r\n{\"address\":\"a\"}", "POST /v1/migratable HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nb\r\n{\"on\":true}\r\n0\r\n\r\n",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(b)))
		if err != nil {
			return
		}
		c := &fake{}
		w := httptest.NewRecorder()
		NewHandler(c).ServeHTTP(w, r)
		if (w.Code == http.StatusOK) != (len(c.did) == 1) || len(c.did) > 1 {
			t.Errorf("answered %d, and did %q", w.Code, c.did)
		}
		_, _ = io.Copy(io.Discard, w.Body)
	})
}
