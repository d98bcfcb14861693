// Command clones runs ten instances of a package, and then a clone of one of them.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"time"

	"github.com/drafter-vm/drafter/pkg/peer"
	"github.com/drafter-vm/drafter/pkg/runner"
	"github.com/drafter-vm/drafter/pkg/vmm/qemu"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "clones:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, out io.Writer) (err error) {
	flags := flag.NewFlagSet("clones", flag.ContinueOnError)
	pkg := flags.String("package", "out/package", "folder of the package")
	count := flags.Int("count", 10, "how many instances to run")
	if err := flags.Parse(args); err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "clones")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)

	var peers []*peer.Peer
	defer func() {
		for _, p := range peers { // nothing of them is kept
			err = errors.Join(err, p.Kill())
		}
	}()
	config := peer.Config{
		Backend: qemu.New(qemu.Options{}),
		Host:    runner.Host{Dir: filepath.Join(dir, "vms")},
		Logger:  slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn})),
		Clone:   true, // what must be unique in a guest is its own to change: its agent is told
	}
	for n := range *count {
		cfg := config
		if cfg.Devices, err = peer.PackageDevices(*pkg, filepath.Join(dir, fmt.Sprintf("instance-%d", n))); err != nil {
			return err
		}
		p, err := peer.Resume(ctx, cfg)
		if err != nil {
			return fmt.Errorf("instance %d: %w", n, err)
		}
		peers = append(peers, p)
		fmt.Fprintf(out, "instance %d resumed in %v\n", n, p.ResumeDuration().Round(100*time.Microsecond))
	}
	if len(peers) == 0 {
		return errors.New("-count: give at least 1")
	}

	began := time.Now()
	clone, err := peers[0].Clone(ctx, filepath.Join(dir, "clone"), config)
	if err != nil {
		return err
	}
	peers = append(peers, clone)
	fmt.Fprintf(out, "instance 0 cloned in %v; %d VMs run\n", time.Since(began).Round(time.Millisecond), len(peers))
	return nil
}
