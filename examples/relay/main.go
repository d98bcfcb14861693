// Command relay runs a VM that goes back and forth between two peers in this process, and serves its progress by HTTP.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"time"

	"github.com/drafter-vm/drafter/pkg/migrate"
	"github.com/drafter-vm/drafter/pkg/peer"
	"github.com/drafter-vm/drafter/pkg/runner"
	"github.com/drafter-vm/drafter/pkg/transport"
	"github.com/drafter-vm/drafter/pkg/vmm/qemu"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "relay:", err)
		os.Exit(1)
	}
}

// relay has what both peers share.
type relay struct {
	pkg, dir string
	secure   transport.Options

	mu       sync.Mutex // guards progress
	progress migrate.Progress
}

func run(ctx context.Context, args []string, out io.Writer) (err error) {
	flags := flag.NewFlagSet("relay", flag.ContinueOnError)
	pkg := flags.String("package", "out/package", "folder of the package")
	moves := flags.Int("moves", 4, "how often to move the VM")
	address := flags.String("http", "localhost:0", "address to serve progress at")
	if err := flags.Parse(args); err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "relay")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	// Whoever has the key may have the VM. In two processes it comes from a file (KeyFile) or the environment.
	r := &relay{pkg: *pkg, dir: dir, secure: transport.Options{Key: "6f1d4c0f5e0f4d6f8a1b2c3d4e5f60718293a4b5c6d7e8f90a1b2c3d4e5f6071"}}

	l, err := net.Listen("tcp", *address)
	if err != nil {
		return err
	}
	server := &http.Server{Handler: http.HandlerFunc(r.serve), ReadHeaderTimeout: time.Minute}
	go server.Serve(l) // until Close
	defer server.Close()
	fmt.Fprintf(out, "progress at http://%s/\n", l.Addr())

	cfg, err := r.config(0)
	if err != nil {
		return err
	}
	p, err := peer.Resume(ctx, cfg)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.Close(ctx)) }()
	for n := range *moves {
		next, report, err := r.move(ctx, p, n+1)
		if err != nil {
			return fmt.Errorf("move %d: %w", n+1, err)
		}
		if err := p.Close(ctx); err != nil {
			return err
		}
		p = next
		fmt.Fprintf(out, "move %d: downtime %v, %.1f MiB\n", n+1, time.Duration(report.Downtime).Round(100*time.Microsecond), float64(report.WireBytes)/(1<<20))
	}
	return nil
}

// config is a host's: the VM comes back to where it was two moves ago.
func (r *relay) config(n int) (peer.Config, error) {
	devices, err := peer.PackageDevices(r.pkg, filepath.Join(r.dir, fmt.Sprintf("host-%d", n%2)))
	return peer.Config{
		Backend: qemu.New(qemu.Options{}),
		Devices: devices,
		Host:    runner.Host{Dir: filepath.Join(r.dir, "vms")},
		Logger:  slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn})),
		Progress: func(p migrate.Progress) {
			r.mu.Lock()
			defer r.mu.Unlock()
			r.progress = p
		},
	}, err
}

// move has the peer of the n-th move take the VM over from p.
func (r *relay) move(ctx context.Context, p *peer.Peer, n int) (*peer.Peer, *migrate.Report, error) {
	cfg, err := r.config(n)
	if err != nil {
		return nil, nil, err
	}
	l, err := r.secure.Listen(ctx, "psk://localhost:0")
	if err != nil {
		return nil, nil, err
	}
	lobby := peer.NewLobby(l, cfg.Logger)
	defer lobby.Close()
	type sent struct {
		report *migrate.Report
		err    error
	}
	source, gone := make(chan sent, 1), make(chan struct{})
	go func() { // waited for below
		var a peer.Arrival
		select {
		case a = <-lobby.New:
		case <-gone:
			a.Err = errors.New("nobody came")
		}
		if a.Err != nil {
			source <- sent{nil, a.Err}
			return
		}
		report, err := p.Send(ctx, a.Streams)
		source <- sent{report, err}
	}()
	streams, err := peer.DialStreams(ctx, 2, func(ctx context.Context) (net.Conn, error) {
		return r.secure.Dial(ctx, fmt.Sprintf("psk://localhost:%d", l.Addr().(*net.TCPAddr).Port))
	})
	if err != nil {
		close(gone)
		<-source
		return nil, nil, err
	}
	next, _, err := peer.Receive(ctx, cfg, streams)
	s := <-source
	if err = errors.Join(err, s.err); err != nil && next != nil {
		err = errors.Join(err, next.Close(ctx))
	}
	return next, s.report, err
}

func (r *relay) serve(w http.ResponseWriter, _ *http.Request) {
	r.mu.Lock()
	defer r.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(r.progress)
}
