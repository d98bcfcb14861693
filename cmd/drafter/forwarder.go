package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/drafter-vm/drafter/pkg/forward"
)

type forwarderOptions struct {
	forwards     string
	file         string
	hostVethCIDR [2]string // IPv4, IPv6
}

// defaultForwards is the documented default of --port-forwards.
const defaultForwards = `[{"netns":"ark0","internalPort":"6379","protocol":"tcp","externalAddr":"127.0.0.1:3333"}]`

func newForwarderCommand() *cobra.Command {
	var opts forwarderOptions
	cmd := &cobra.Command{
		Use:   "forwarder",
		Short: "Forward ports of the host to VMs in network namespaces",
		Long: `Forward ports of the host to VMs in network namespaces of drafter nat, until the command ends (Ctrl-C, SIGTERM); connections that
are open then go on. The VMs see the addresses of their clients.

An external address is one of the host's (127.0.0.1:3333, [::1]:3333, 192.0.2.1:3333), every one of a family (0.0.0.0:3333,
[::]:3333), or every one (:3333). Internal ports are those of the VM; the protocol is tcp or udp.

With --port-forwards-file, the list is read from a file, and read again when that is changed: forwards that are in the
old list and in the new one are not disturbed. A list that cannot be used changes nothing, and is logged.

What the kernel cannot translate, [::1], is relayed: such a TCP connection ends here, and does not survive a move of its VM.

Exit statuses: 0 ended by a signal; 1 something failed; 2 the command line cannot be used; 130 ended by a signal before the ports were
forwarded.`,
		Example: `  drafter forwarder --port-forwards '[{"netns":"ark0","internalPort":"6379","protocol":"tcp","externalAddr":"127.0.0.1:3333"}]'
  drafter forwarder --port-forwards-file forwards.json`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return runForwarder(cmd, opts) },
	}
	flags := cmd.Flags()
	flags.StringVar(&opts.forwards, "port-forwards", defaultForwards, `what to forward, a JSON array of {"netns","internalPort","protocol","externalAddr"}`)
	flags.StringVar(&opts.file, "port-forwards-file", "", "file with that array, read again when it changes, instead of --port-forwards")
	flags.StringVar(&opts.hostVethCIDR[0], "host-veth-cidr", "10.0.8.0/22", "network in which the namespaces are reached, as of drafter nat")
	flags.StringVar(&opts.hostVethCIDR[1], "host-veth-cidr6", "fd00:10:8::/64", "the same in IPv6")
	return cmd
}

// decodeForwards reads a list of forwards, called what in messages.
func decodeForwards(what, text string) ([]forward.Forward, error) {
	var forwards []forward.Forward
	d := json.NewDecoder(strings.NewReader(text))
	d.DisallowUnknownFields()
	err := d.Decode(&forwards)
	if err == nil {
		if _, e := d.Token(); !errors.Is(e, io.EOF) {
			err = errors.New("there is something behind the array")
		}
	}
	if err != nil {
		return nil, fmt.Errorf(`%s: %w: give a JSON array of {"netns","internalPort","protocol","externalAddr"}`, what, err)
	}
	return forwards, nil
}

func runForwarder(cmd *cobra.Command, opts forwarderOptions) error {
	ctx, log := cmd.Context(), logger(cmd.Context())
	out := &lineWriter{to: cmd.ErrOrStderr()}
	if opts.file != "" && cmd.Flags().Changed("port-forwards") {
		return usageErrorf("--port-forwards and --port-forwards-file exclude each other")
	}
	cfg := forward.Config{
		Logger:  log,
		Added:   func(f forward.Forward) { fmt.Fprintf(out, "Forwarding %s\n", f) },
		Removed: func(f forward.Forward) { fmt.Fprintf(out, "Not forwarding %s any more\n", f) },
	}
	for i, to := range []*netip.Prefix{&cfg.HostVethCIDR, &cfg.HostVethCIDR6} {
		var err error
		if *to, err = netip.ParsePrefix(opts.hostVethCIDR[i]); err != nil {
			return usageErrorf("--%s %q: give a network as ADDRESS/BITS", []string{"host-veth-cidr", "host-veth-cidr6"}[i], opts.hostVethCIDR[i])
		}
	}
	var file watched
	forwards, err := decodeForwards("--port-forwards", opts.forwards)
	if opts.file != "" {
		file.path = opts.file
		if _, err = file.changed(); err == nil {
			forwards, err = file.read()
		}
	}
	if err != nil {
		return usageErrorf("%w", err)
	}
	f, err := forward.Open(ctx, cfg, forwards)
	if err != nil {
		return interrupted(cmd, err)
	}
	if len(forwards) == 0 {
		fmt.Fprintln(out, "Forwarding nothing")
	}
	if opts.file != "" {
		said := ""
		file.follow(ctx, func(forwards []forward.Forward, err error) bool {
			if err == nil {
				err = f.Set(ctx, forwards)
			}
			if err == nil {
				said = ""
				return true
			}
			if ctx.Err() == nil && said != err.Error() { // once, as it is tried again and again
				said = err.Error()
				log.Error("the forwards stay as they are", "file", opts.file, "error", err)
			}
			return false
		})
	}
	<-ctx.Done()
	return f.Close(ctx)
}

// watched is a file with a list of forwards.
type watched struct {
	path string
	last os.FileInfo // when it was read
}

// changed reports whether the file is another one than before.
func (w *watched) changed() (bool, error) {
	info, err := os.Stat(w.path)
	if err != nil {
		return false, fmt.Errorf("--port-forwards-file: %w", err)
	}
	before := w.last
	w.last = info
	return before == nil || !os.SameFile(before, info) || !before.ModTime().Equal(info.ModTime()) || before.Size() != info.Size(), nil
}

func (w *watched) read() ([]forward.Forward, error) {
	b, err := os.ReadFile(w.path)
	if err != nil {
		return nil, fmt.Errorf("--port-forwards-file: %w", err)
	}
	return decodeForwards(fmt.Sprintf("--port-forwards-file %q", w.path), string(b))
}

// look is how often a file is looked at.
const look = time.Second

// follow calls f with what the file says whenever it has changed, and again while f says that it could not be used, as a namespace may be made
// soon, until ctx ends. A file that is away for a moment, as it is replaced, has not changed.
func (w *watched) follow(ctx context.Context, f func([]forward.Forward, error) bool) {
	tick := time.NewTicker(look)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			if changed, err := w.changed(); err == nil && changed && !f(w.read()) {
				w.last = nil
			}
		}
	}
}
