package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/drafter-vm/drafter/pkg/control"
	"github.com/drafter-vm/drafter/pkg/migrate"
	"github.com/drafter-vm/drafter/pkg/runner"
	"github.com/drafter-vm/drafter/pkg/transport"
)

// desk is where the control socket of a peer leads. It is open from before anything is begun until the peer closes; what can be
// controlled there changes meanwhile.
type desk struct {
	mu     sync.Mutex // guards behind
	behind control.Controlled
}

var _ control.Controlled = (*desk)(nil)

// put has c controlled from now on. What was asked for before goes on.
func (d *desk) put(c control.Controlled) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.behind = c
}

func (d *desk) now() control.Controlled {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.behind
}

func (d *desk) Status(ctx context.Context) (control.Status, error) { return d.now().Status(ctx) }
func (d *desk) Pause(ctx context.Context) error                    { return d.now().Pause(ctx) }
func (d *desk) Resume(ctx context.Context) error                   { return d.now().Resume(ctx) }
func (d *desk) Cancel(ctx context.Context) error                   { return d.now().Cancel(ctx) }
func (d *desk) Stop(ctx context.Context) error                     { return d.now().Stop(ctx) }

func (d *desk) SetMigratable(ctx context.Context, may bool) error {
	return d.now().SetMigratable(ctx, may)
}

func (d *desk) Migrate(ctx context.Context, address string) (*migrate.Report, error) {
	return d.now().Migrate(ctx, address)
}

func (d *desk) Snapshot(ctx context.Context, dir string) (*migrate.Report, error) {
	return d.now().Snapshot(ctx, dir)
}

func (d *desk) Balloon(ctx context.Context, size int64) (control.Balloon, error) {
	return d.now().Balloon(ctx, size)
}

// serveControl makes the control socket at a path and serves it until the returned function is called, which may be called again. With no
// path it does nothing.
func serveControl(ctx context.Context, path string, c control.Controlled) (stop func(), err error) {
	if path == "" {
		return func() {}, nil
	}
	l, err := transport.Listen(ctx, controlAddress(path))
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return nil, fmt.Errorf("--control: %w: end the peer that uses it, remove the file if it is no socket, or choose another path", err)
	case errors.Is(err, syscall.ENOENT):
		return nil, fmt.Errorf("--control: %w: make the folder first, or correct the path", err)
	case err != nil:
		return nil, fmt.Errorf("--control: %w", err)
	}
	log, handler := logger(ctx), control.NewHandler(c)
	s := control.Serve(&verified{l}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		handler.ServeHTTP(w, r.WithContext(withLogger(r.Context(), log))) // what is done for a request is logged as all else is
	}), log)
	return sync.OnceFunc(func() { s.Close() }), nil
}

func controlAddress(path string) string { return "unix://" + path }

// verified is a listener whose connections are known to be of who may connect.
type verified struct{ net.Listener }

func (l *verified) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if _, err := transport.Handshake(context.Background(), conn); err == nil { // at once, of a unix socket
			return conn, nil
		}
		conn.Close()
	}
}

// starter is what the control socket of a peer controls until its VM can be: while that is started, waited for or received, and while it
// runs here and its agent has not answered, or the rest of it is on its way.
type starter struct {
	state string // "starting" or "receiving"
	watch *watch
	stop  context.CancelFunc
	runs  atomic.Pointer[runner.Instance] // nil before its guest runs here
}

var _ control.Controlled = (*starter)(nil)

func (s *starter) Status(context.Context) (control.Status, error) {
	status := control.Status{State: s.state, Busy: true, UnderWay: "start"}
	if s.state == "receiving" {
		status.UnderWay = "reception"
	}
	if i := s.runs.Load(); i != nil && i.Running() {
		status.State, status.VMPath, status.PID, status.Missing = "running", i.VMPath(), i.Machine().PID(), i.Missing()
	}
	if p := s.watch.latest(); p.Role != "" {
		status.Migration = control.MigrationOf(p)
	}
	return status, nil
}

func (s *starter) refuse() error {
	why := "the VM does not run here yet: it is being started"
	if s.state == "receiving" {
		why = "the VM does not run here yet: it is waited for, or being received"
	}
	if i := s.runs.Load(); i != nil && i.Running() {
		why = "the VM runs here, but its guest's agent has not answered yet"
		if n := i.Missing(); n > 0 {
			why = fmt.Sprintf("the VM runs here, but %d bytes of it are still to come", n)
		}
	}
	return fmt.Errorf("%w: %s", control.ErrConflict, why)
}

func (s *starter) Pause(context.Context) error               { return s.refuse() }
func (s *starter) Resume(context.Context) error              { return s.refuse() }
func (s *starter) SetMigratable(context.Context, bool) error { return s.refuse() }

func (s *starter) Migrate(context.Context, string) (*migrate.Report, error) {
	return nil, s.refuse()
}

func (s *starter) Snapshot(context.Context, string) (*migrate.Report, error) {
	return nil, s.refuse()
}

func (s *starter) Balloon(context.Context, int64) (control.Balloon, error) {
	return control.Balloon{}, s.refuse()
}

func (s *starter) Cancel(context.Context) error {
	return fmt.Errorf("%w; that can only be ended with this peer (drafter ctl stop), or at the other", s.refuse())
}

func (s *starter) Stop(context.Context) error {
	s.stop()
	return nil
}
