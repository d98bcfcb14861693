package main

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/drafter-vm/drafter/pkg/migrate"
	"github.com/drafter-vm/drafter/pkg/peer"
	"github.com/drafter-vm/drafter/pkg/vmpackage"
)

// serveDevice is an element of the --devices of serve. BlockSize is accepted and means nothing: pages are the unit.
type serveDevice struct {
	Name      string `json:"name"`
	Input     string `json:"input"`
	BlockSize int64  `json:"blockSize"`
}

type serveOptions struct {
	links
	packagePath string
	devices     string
	cache       string
	concurrency int
	maxPeers    int
	report      string
}

func newServeCommand() *cobra.Command {
	var opts serveOptions
	cmd := &cobra.Command{
		Use:     "serve",
		Aliases: []string{"registry"},
		Short:   "Serve a package to peers that start from it over the network",
		Long: `Serve a package to any number of peers at once. Each (drafter peer --raddr) gets a VM of its own, which starts where the
package was saved, and runs as soon as it has the device state: memory and disks come when its guest touches them, and
behind it as fast as they can. The package stays as it is, and is not handed over.

It is the folder of a package, or a .tar.zst, which is first extracted into the folder --cache, once.

A peer that loses its connection comes back by itself for what it lacks, also to a server that was started anew with the same
package.

Ctrl-C begins no transfer any more, waits until those whose guest runs have everything, and ends; a second one ends at once, and
leaves them without the rest.

Exit statuses: 0 ended by a signal; 1 something failed; 2 the command line cannot be used; 130 ended by a signal before it served.`,
		Example: `  drafter serve --package out/package --laddr localhost:1600
  drafter peer --package out/package --instance out/instance-0 --raddr localhost:1600`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return runServe(cmd, opts) },
	}
	flags := cmd.Flags()
	opts.links.register(flags)
	flags.StringVar(&opts.laddr, "laddr", ":1600", "address to serve at")
	flags.StringVar(&opts.packagePath, "package", "out/package", "folder or .tar.zst of the package")
	flags.StringVar(&opts.devices, "devices", "", `devices to serve instead of --package, a JSON array: [{"name":"disk","input":"out/package/rootfs.ext4"},…]`)
	flags.StringVar(&opts.cache, "cache", "out/cache", "folder to extract a .tar.zst into")
	flags.IntVar(&opts.maxPeers, "max-peers", 64, "most peers that are served at once, at up to 20 MiB of memory each; more wait, and are told to come again after some seconds")
	flags.IntVar(&opts.concurrency, "concurrency", 1024, "most workers for each peer; more than 64 are not used")
	flags.StringVar(&opts.report, "report", "", "file to write the reports of transfers to, one JSON object a line")
	return cmd
}

func runServe(cmd *cobra.Command, opts serveOptions) error {
	ctx, log := cmd.Context(), logger(cmd.Context())
	out := &lineWriter{to: cmd.ErrOrStderr()}
	changed := cmd.Flags().Changed
	switch {
	case changed("devices") && changed("package"):
		return usageErrorf("--devices and --package exclude each other")
	case changed("devices") && opts.devices == "":
		return usageErrorf("--devices is empty: give the devices as a JSON array, or leave it out")
	case opts.devices == "" && opts.packagePath == "":
		return usageErrorf("--package is empty: give the folder or file of the package")
	case opts.cache == "":
		return usageErrorf("--cache is empty: give a folder to extract packages into")
	case opts.concurrency < 1:
		return usageErrorf("--concurrency %d: give at least 1", opts.concurrency)
	case opts.maxPeers < 1:
		return usageErrorf("--max-peers %d: give at least 1", opts.maxPeers)
	case opts.laddr == "":
		return usageErrorf("--laddr is empty: give the address to serve at")
	}
	if err := opts.check(ctx, cmd.Flags(), cmd.InOrStdin(), cmd.OutOrStdout()); err != nil {
		return err
	}
	cfg := peer.ServerConfig{Concurrency: opts.concurrency, Logger: log}
	flag := "--package"
	if opts.devices != "" {
		flag = "--devices"
		decoded, err := decodeDevices[serveDevice](opts.devices)
		if err != nil {
			return err
		}
		for _, d := range decoded {
			if d.Input == "" {
				return usageErrorf(`--devices: device %q has no "input"`, d.Name)
			}
			cfg.Devices = append(cfg.Devices, vmpackage.File{Name: d.Name, Path: d.Input})
		}
	}
	listener, err := opts.listen(ctx, "laddr", opts.laddr)
	if err != nil {
		return err
	}
	defer listener.Close()
	reports, err := openReports(opts.report)
	if err != nil {
		return fmt.Errorf("--report: %w", err)
	}
	defer reports.close()
	if opts.devices == "" {
		if cfg.Dir, err = packageFolder(cmd, opts.packagePath, opts.cache); err != nil {
			return interrupted(cmd, fmt.Errorf("--package: %w", err))
		}
	}
	server, err := peer.OpenServer(cfg)
	if err != nil {
		return interrupted(cmd, fmt.Errorf("%s: %w", flag, err))
	}
	lobby := peer.NewLobby(listener, log)
	fmt.Fprintf(out, "Serving on %s\n", opts.serving(lobby.Addr()))

	var sessions sync.WaitGroup
	var reporting sync.Mutex // held while a report is written
	tell := func(what, whom string, report *migrate.Report, err error) {
		reporting.Lock()
		defer reporting.Unlock()
		if err := reports.write(report); err != nil {
			log.Error("could not write the report of a transfer", "error", err)
		}
		switch {
		case err == nil:
			fmt.Fprintf(out, "Served %s to %s: %s\n", what, whom, summary(report))
		case errors.Is(err, migrate.ErrUnsettled), errors.Is(err, migrate.ErrInDoubt):
			fmt.Fprintf(out, "%s left before it said that it has everything: %v\n", whom, err)
		default:
			fmt.Fprintf(out, "Serving %s to %s failed: %v\n", what, whom, err)
		}
	}
	serve := func(a peer.Arrival) {
		report, err := server.Serve(ctx, a.Streams)
		if errors.Is(err, peer.ErrStranger) {
			log.Warn("refused a connection", "from", a.From, "reason", err)
			return
		}
		tell("VM", a.From.String(), report, err)
	}
	// Those who come back are served until the last has everything.
	open, shut := context.WithCancel(context.WithoutCancel(ctx))
	defer shut()
	back := make(chan struct{}, opts.maxPeers) // as room, which they must not have to wait for
	sessions.Go(func() {
		for {
			select {
			case back <- struct{}{}:
			case <-open.Done():
				return
			}
			streams, err := lobby.Rejoin(open)
			if err != nil {
				return
			}
			sessions.Go(func() {
				defer func() { <-back }()
				report, err := server.Rejoin(ctx, streams)
				tell("the rest of a VM", "a peer that came back", report, err)
			})
		}
	})
	room := make(chan struct{}, opts.maxPeers) // holds one for each that is served
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
			continue
		case room <- struct{}{}:
		}
		select {
		case <-ctx.Done():
		case a := <-lobby.New:
			if a.Err != nil {
				<-room
				log.Warn("refused a connection", "from", a.From, "reason", a.Err)
				continue
			}
			sessions.Go(func() {
				defer func() { <-room }()
				serve(a)
			})
		}
	}
	again, stop := signal.NotifyContext(context.WithoutCancel(ctx), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if n := server.Sessions(); n > 0 {
		fmt.Fprintf(out, "Closing: waiting for %s to have everything; Ctrl-C ends at once\n", count(n, "peer"))
	}
	err = server.Close(again)
	shut()
	sessions.Wait()
	return errors.Join(err, lobby.Close())
}

// lineWriter lets goroutines write whole lines.
type lineWriter struct {
	mu sync.Mutex // held while writing
	to io.Writer
}

func (w *lineWriter) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.to.Write(p)
}

// packageFolder returns the folder of a package. An archive is extracted into the cache, unless it was before.
func packageFolder(cmd *cobra.Command, path, cache string) (_ string, err error) {
	ctx := cmd.Context()
	if !isFile(path) {
		return path, nil
	}
	manifest, err := vmpackage.ReadManifest(ctx, path)
	if err != nil {
		return "", err
	}
	// The digests in it say what the package is, wherever it lies.
	identity, err := json.Marshal(manifest)
	if err != nil {
		return "", err
	}
	name, _, _ := strings.Cut(filepath.Base(path), ".")
	dir := filepath.Join(cache, fmt.Sprintf("%s-%x", name, sha256.Sum256(identity))[:len(name)+1+16])
	if _, err := vmpackage.Open(dir); err == nil {
		return dir, nil
	}
	if err := os.MkdirAll(cache, 0o700); err != nil {
		return "", fmt.Errorf("--cache: %w", err)
	}
	partial, err := os.MkdirTemp(cache, ".extract-")
	if err != nil {
		return "", fmt.Errorf("--cache: %w", err)
	}
	defer os.RemoveAll(partial) // what is left there is of no use
	var files []vmpackage.File
	for _, name := range manifest.Names() {
		files = append(files, vmpackage.File{Name: name, Path: filepath.Join(partial, vmpackage.DefaultFile(name))})
	}
	bar := newStageBar(cmd.ErrOrStderr())
	defer bar.end()
	if _, err := vmpackage.Extract(ctx, path, files, vmpackage.ExtractOptions{Progress: bar.show}); err != nil {
		return "", err
	}
	// What was extracted was compared with its digests, which the manifest of the folder need not have again.
	if _, err := vmpackage.WriteManifest(ctx, partial, files, vmpackage.ManifestOptions{SkipDigests: true}); err != nil {
		return "", err
	}
	if err := os.Rename(partial, dir); err != nil {
		if _, open := vmpackage.Open(dir); open == nil {
			return dir, nil // by another one, meanwhile
		}
		return "", fmt.Errorf("--cache: %w", err)
	}
	return dir, nil
}
