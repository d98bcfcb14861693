package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/drafter-vm/drafter/pkg/control"
	"github.com/drafter-vm/drafter/pkg/transport"
	"github.com/drafter-vm/drafter/pkg/wire"
)

// TestControlRefused gives a destination a control socket that cannot be made: nobody is dialled, so that no VM is taken from where it runs.
func TestControlRefused(t *testing.T) {
	f := newForeign(t)
	source, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	dialled := make(chan struct{})
	go func() {
		defer close(dialled)
		if conn, err := source.Accept(); err == nil {
			t.Error("the source was dialled")
			conn.Close()
		}
	}()
	defer func() { source.Close(); <-dialled }()
	taken := filepath.Join(f.dir, "taken.sock")
	other, err := net.Listen("unix", taken)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	for _, tt := range []struct{ name, path, want string }{
		{"no folder", filepath.Join(f.dir, "none", "c.sock"), "make it (mkdir -p)"},
		{"in use", taken, "end the peer that uses it"},
		{"a file", f.file("kernel"), "is a file, and no socket"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			checkRefused(t, f.dir, []string{"peer", "--netns", "", "--chroot-base-dir", filepath.Join(f.dir, "vms"), "--package", f.pkg,
				"--instance", filepath.Join(f.dir, "instance"), "--raddr", source.Addr().String(), "--control", tt.path}, 1, "--control", tt.path, tt.want)
		})
	}
}

// TestControlEarly controls a peer that waits for a VM, which goes on to wait when one that was begun to be sent does not come.
func TestControlEarly(t *testing.T) {
	f := newForeign(t)
	socket := filepath.Join(f.dir, "c.sock")
	stderr, w := io.Pipe()
	ended := make(chan error, 1)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() {
		err := run(ctx, []string{"drafter", "peer", "--netns", "", "--chroot-base-dir", filepath.Join(f.dir, "vms"), "--package", f.pkg, "--instance", filepath.Join(f.dir, "instance"),
			"--accept", "127.0.0.1:0", "--control", socket}, strings.NewReader(""), io.Discard, w)
		w.Close()
		ended <- err
	}()
	lines := bufio.NewScanner(stderr)
	said := func(pattern string) string {
		t.Helper()
		for lines.Scan() {
			if found := regexp.MustCompile(pattern).FindStringSubmatch(lines.Text()); found != nil {
				return found[len(found)-1]
			}
		}
		t.Fatalf("it never says %q: %v", pattern, <-ended)
		return ""
	}
	address := said(`Waiting for a VM on (\S+)`)
	client := control.NewClient(func(ctx context.Context) (net.Conn, error) { return transport.Dial(ctx, controlAddress(socket)) })
	check := func() {
		t.Helper()
		s, err := client.Status(ctx)
		if err != nil || s.State != "receiving" || !s.Busy || s.UnderWay != "reception" || s.PID != 0 {
			t.Errorf("it is %+v, %v", s, err)
		}
		_, migrating := client.Migrate(ctx, "127.0.0.1:1")
		_, copying := client.Snapshot(ctx, filepath.Join(f.dir, "copy"))
		for _, err := range []error{client.Pause(ctx), client.Resume(ctx), client.SetMigratable(ctx, false), client.Cancel(ctx), migrating, copying} {
			if !errors.Is(err, control.ErrConflict) || !strings.Contains(err.Error(), "waited for, or being received") {
				t.Errorf("what cannot be done yet fails with %v", err)
			}
		}
	}
	check()
	for range 2 {
		conn, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		// A source whose owner has changed his mind.
		ours := wire.Preface{Newest: wire.Version, Oldest: wire.OldestVersion, Role: wire.RoleSource, Streams: 1, Session: 7}
		if _, err := conn.Write(wire.Append(ours.Append(nil), wire.Header{Type: wire.TypeAbort}, wire.Abort{Code: wire.CodeCanceled, Reason: "not now"}.Encode())); err != nil {
			t.Fatal(err)
		}
		if line := said(`.*waiting for another.*`); !strings.Contains(line, "not now") {
			t.Errorf("it says %s", line)
		}
		conn.Close()
		check()
	}
	go io.Copy(io.Discard, stderr)
	if err := client.Stop(ctx); err != nil {
		t.Error(err)
	}
	if err := <-ended; exitStatus(err) != 130 {
		t.Errorf("it ended with %v", err)
	}
	if _, err := os.Lstat(socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left: %v", err)
	}
}

// logging is a peer that logs when it is asked how it is.
type logging struct{ control.Controlled }

func (logging) Status(ctx context.Context) (control.Status, error) {
	logger(ctx).Debug("asked")
	return control.Status{}, nil
}

// TestControlLogs has what is done for a request logged by the command's logger.
func TestControlLogs(t *testing.T) {
	var logged bytes.Buffer // of one request at a time
	ctx := withLogger(t.Context(), slog.New(slog.NewTextHandler(&logged, &slog.HandlerOptions{Level: slog.LevelDebug})))
	socket := filepath.Join(t.TempDir(), "c.sock")
	desk := &desk{}
	stop, err := serveControl(ctx, socket, desk)
	if err != nil {
		t.Fatal(err)
	}
	desk.put(logging{})
	client := control.NewClient(func(ctx context.Context) (net.Conn, error) { return transport.Dial(ctx, controlAddress(socket)) })
	_, err = client.Status(ctx)
	stop()
	stop()
	if err != nil || !strings.Contains(logged.String(), "asked") {
		t.Errorf("%v, and it logs %q", err, &logged)
	}
}
