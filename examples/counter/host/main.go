// Command host has the counter in a guest count, moves the VM, and has it count on.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"time"

	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/drafter-vm/drafter/examples/counter"
	"github.com/drafter-vm/drafter/pkg/agent/service"
	"github.com/drafter-vm/drafter/pkg/peer"
	"github.com/drafter-vm/drafter/pkg/runner"
	"github.com/drafter-vm/drafter/pkg/vmm/qemu"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "host:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, out io.Writer) (err error) {
	flags := flag.NewFlagSet("host", flag.ContinueOnError)
	pkg := flags.String("package", "out/package", "folder of a package in whose guest the other half runs")
	if err := flags.Parse(args); err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "counter")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)

	first, err := newHost(*pkg, dir, "first")
	if err != nil {
		return err
	}
	second, err := newHost(*pkg, dir, "second")
	if err != nil {
		return err
	}
	p, err := peer.Resume(ctx, first.config)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.Kill()) }()
	if err := first.count(ctx, out, 2); err != nil {
		return err
	}

	here, there := net.Pipe()
	sent := make(chan error, 1)
	go func() { // waited for below
		_, err := p.Send(ctx, []io.ReadWriter{here})
		sent <- err
	}()
	moved, _, err := peer.Receive(ctx, second.config, []io.ReadWriter{there})
	if err = errors.Join(err, <-sent); err != nil {
		return err
	}
	if err := p.Close(ctx); err != nil {
		return err
	}
	p = moved
	return second.count(ctx, out, 2)
}

// host is where a VM may run, with the host's half of the counter.
type host struct {
	name     string
	config   peer.Config
	endpoint *service.Endpoint // from Made to Closed
}

func newHost(pkg, dir, name string) (*host, error) {
	h := &host{name: name}
	devices, err := peer.PackageDevices(pkg, filepath.Join(dir, name))
	h.config = peer.Config{
		Backend: qemu.New(qemu.Options{}),
		Devices: devices,
		Host:    runner.Host{Dir: filepath.Join(dir, "vms")},
		Logger:  slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn})),
		Hooks: runner.Hooks{
			Made: func(vmPath string) (err error) { // before the guest runs, so that it finds us at once
				h.endpoint, err = service.ListenHost(vmPath, service.Config{Port: counter.Port, Name: counter.Name, Version: counter.Version})
				return err
			},
			Closed: func() { h.endpoint.Close() },
		},
	}
	return h, err
}

// count has the guest count n times.
func (h *host) count(ctx context.Context, out io.Writer, n int) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for range n {
		value := new(wrapperspb.Int64Value)
		// Call, not Retry: to count twice is not the same as to count once.
		err := h.endpoint.Call(ctx, func(ctx context.Context, c *ttrpc.Client) error {
			return c.Call(ctx, counter.Service, counter.Method, new(emptypb.Empty), value)
		})
		if err != nil {
			return err
		}
		fmt.Fprintf(out, "on the %s host the guest counts %d\n", h.name, value.Value)
	}
	return nil
}
