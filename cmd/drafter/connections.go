package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"net/url"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/drafter-vm/drafter/pkg/flow"
	"github.com/drafter-vm/drafter/pkg/nat"
	"github.com/drafter-vm/drafter/pkg/transport"
)

// connectionFlags are those by which a peer keeps the connections of its guest.
type connectionFlags struct {
	keep  bool
	laddr string
	vxlan string
	limit time.Duration
}

func (c *connectionFlags) register(flags *pflag.FlagSet) {
	flags.BoolVar(&c.keep, "keep-connections", true, "keep the guest's connections when it moves between network namespaces of drafter nat")
	flags.StringVar(&c.laddr, "connections-laddr", "", "address at which the other hosts of the VM bring its packets: HOST:PORT, or as docs/transports.md has them (empty: on a free port, in the way that the VM itself goes)")
	flags.StringVar(&c.vxlan, "connections-vxlan", "", "address of this host, IP or IP:PORT (port 4789), by which the kernel carries the packets by VXLAN to hosts that have the like: faster, and while no peer runs, too, but not authenticated nor encrypted")
	flags.DurationVar(&c.limit, "connections-limit", 0, "how long connections are kept after the guest has left, alive or not (0: while they live)")
}

// keeper keeps the connections of a peer's guest, if that can be; nil if not.
func (c *connectionFlags) keeper(ctx context.Context, flags *pflag.FlagSet, netns string, l *links) (*flow.Keeper, error) {
	asked := c.keep && (flags.Changed("keep-connections") || c.laddr != "" || c.vxlan != "")
	vxlan, err := parseVXLAN(c.vxlan)
	switch {
	case err != nil:
		return nil, usageErrorf("--connections-vxlan %q: %w", c.vxlan, err)
	case !c.keep && c.laddr != "":
		return nil, usageErrorf("--connections-laddr has no effect with --keep-connections=false")
	case !c.keep && c.vxlan != "":
		return nil, usageErrorf("--connections-vxlan has no effect with --keep-connections=false")
	case !c.keep:
		return nil, nil
	case netns == "" && asked:
		return nil, usageErrorf("--keep-connections needs --netns: a network namespace of drafter nat")
	case netns == "":
		return nil, nil
	}
	_, ours, err := nat.Lookup(netns)
	if err != nil || !ours {
		if asked && err == nil {
			err = flow.ErrNotNAT
		}
		if asked {
			return nil, fmt.Errorf("--keep-connections: network namespace %q: %w", netns, err)
		}
		return nil, nil
	}
	address := c.laddr
	if address == "" {
		if address = l.beside(); address == "" {
			logger(ctx).Info("connections of the guest are not kept when it moves: nobody could bring its packets; --connections-laddr says where")
			return nil, nil
		}
	}
	if vxlan.IsValid() {
		logger(ctx).Warn("packets of the guest are neither authenticated nor encrypted on their way by VXLAN; use a trusted network", "address", vxlan)
	}
	o := l.both()
	o.Logger = logger(ctx)
	if err := o.Check(address); err != nil {
		return nil, usageErrorf("--connections-laddr: %w", err)
	}
	if !transport.CanListen(address) || transport.Single(address) {
		return nil, usageErrorf("--connections-laddr %s: several hosts connect there, again and again: give one that can be listened on", transport.Redacted(address))
	}
	if c.laddr != "" && transport.Insecure(address) {
		logger(ctx).Warn("packets of the guest are neither authenticated nor encrypted on their way; use a trusted network, or tls:// or psk://", "flag", "--connections-laddr", "address", transport.Redacted(address))
	}
	// Others dial the address that they were told, so a peer that is started again is best found there.
	if kept, err := flow.Read(netns); err == nil && c.laddr == "" && transport.Scheme(kept.Address) == transport.Scheme(address) && hostOf(kept.Address) == hostOf(address) {
		if l, err := o.Listen(ctx, kept.Address); err == nil {
			return c.open(ctx, netns, kept.Address, l, vxlan, o)
		}
	}
	listener, err := o.Listen(ctx, address)
	if err != nil {
		return nil, fmt.Errorf("--connections-laddr: %w", err)
	}
	return c.open(ctx, netns, reached(address, listener.Addr()), listener, vxlan, o)
}

// open opens the keeper of a namespace, which others reach by a listener at an address.
func (c *connectionFlags) open(ctx context.Context, netns, address string, listener net.Listener, vxlan netip.AddrPort, o transport.Options) (*flow.Keeper, error) {
	k, err := flow.Open(ctx, flow.Config{
		Netns: netns, Listen: listener, Address: address, VXLAN: vxlan, Limit: c.limit, Logger: logger(ctx),
		Handshake: func(ctx context.Context, conn net.Conn) error { _, err := transport.Handshake(ctx, conn); return err },
		Dial:      dialTold(o, transport.Scheme(address)),
	})
	if err != nil {
		listener.Close()
		return nil, err
	}
	return k, nil
}

// parseVXLAN parses an address for VXLAN; the zero value, if there is none.
func parseVXLAN(s string) (netip.AddrPort, error) {
	if s == "" {
		return netip.AddrPort{}, nil
	}
	a, err := netip.ParseAddrPort(s)
	if err != nil {
		var ip netip.Addr
		if ip, err = netip.ParseAddr(strings.Trim(s, "[]")); err != nil {
			return netip.AddrPort{}, errors.New("give an IP address of this host, as 192.0.2.1 or [2001:db8::1]:4789")
		}
		a = netip.AddrPortFrom(ip, flow.VXLANPort)
	}
	switch ip := a.Addr(); {
	case a.Port() == 0:
		return netip.AddrPort{}, errors.New("the port cannot be 0")
	case ip.IsUnspecified() || ip.IsMulticast() || ip.Zone() != "":
		return netip.AddrPort{}, errors.New("give one address of this host, at which others reach it")
	}
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()), nil
}

// beside is an address to listen at of the kind that the VM itself comes or goes by, on the same interface; empty where there is none.
func (l *links) beside() string {
	for _, a := range []string{l.laddr, l.accept} {
		switch scheme := transport.Scheme(a); {
		case a == "" || !transport.CanListen(a) || transport.Single(a):
		case scheme == "unix":
			return a + ".connections"
		default:
			return withHost(a, hostOf(a))
		}
	}
	switch transport.Scheme(l.raddr) {
	case "tcp", "tls", "psk", "ws", "wss", "quic":
		if host := sourceFor(hostOf(l.raddr)); l.raddr != "" && host != "" {
			return withHost(l.raddr, host)
		}
	}
	return ""
}

// dialTold dials addresses that other hosts have told: no more than what is listened on by a host itself, and of the kind that this one
// uses, if it is given. Others would run a program here, or bring connections around the authentication that was asked for.
func dialTold(o transport.Options, scheme string) func(context.Context, string) (net.Conn, error) {
	return func(ctx context.Context, address string) (net.Conn, error) {
		switch is := transport.Scheme(address); {
		case scheme != "" && is != scheme:
			return nil, fmt.Errorf("another host of the VM says that it is reached by %s, and this one by %s: give both the same kind of --connections-laddr", is, scheme)
		case !transport.CanListen(address) || transport.Single(address):
			return nil, fmt.Errorf("another host of the VM says that it is reached by %s, which is none that can be listened on", is)
		}
		return o.Dial(ctx, address)
	}
}

// parts takes an address apart into what is before its host and port, these, and what is behind them.
func parts(address string) (scheme, hostport, path string) {
	rest := address
	if before, after, ok := strings.Cut(address, "://"); ok {
		scheme, rest = before+"://", after
	}
	hostport, path, ok := strings.Cut(rest, "/")
	if ok {
		path = "/" + path
	}
	return scheme, hostport, path
}

func hostOf(address string) string {
	_, hostport, _ := parts(address)
	host, _, _ := net.SplitHostPort(hostport)
	return host
}

// withHost is an address of the same kind, at a host, on any port.
func withHost(address, host string) string {
	scheme, _, path := parts(address)
	return scheme + net.JoinHostPort(host, "0") + path
}

// reached is the address at which a listener is reached by others: one on all interfaces by the host's own address towards others.
func reached(address string, a net.Addr) string {
	scheme, hostport, path := parts(address)
	host, _, err := net.SplitHostPort(hostport)
	_, port, e := net.SplitHostPort(a.String())
	if err != nil || e != nil {
		return address // a path
	}
	if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
		if host = sourceFor("198.51.100.1"); host == "" {
			host = sourceFor("2001:db8::1")
		}
	}
	return scheme + net.JoinHostPort(host, port) + path
}

// sourceFor is the address that this host has towards another; nothing is sent. Empty: there is no way there.
func sourceFor(host string) string {
	conn, err := net.Dial("udp", net.JoinHostPort((&url.URL{Host: host}).Hostname(), "9"))
	if err != nil {
		return ""
	}
	defer conn.Close()
	local, _, err := net.SplitHostPort(conn.LocalAddr().String())
	if err != nil {
		return ""
	}
	return local
}

// keepOn keeps the connections of a guest that has left, until they have ended, another process keeps them, or ctx ends.
func keepOn(ctx context.Context, k *flow.Keeper, out io.Writer) error {
	n, relayed, err := k.Alive()
	if err != nil {
		return err
	}
	if n == 0 && relayed > 0 {
		fmt.Fprintf(out, "Relaying %d connections of other hosts until they do without; Ctrl-C gives them up\n", relayed)
	}
	if n > 0 {
		fmt.Fprintf(out, "Keeping %d connections that began here until they end; Ctrl-C gives them up\n", n)
	}
	select {
	case <-k.Done():
		if n > 0 {
			fmt.Fprintf(out, "The last connection that began here has ended\n")
		}
	case <-k.Taken():
		fmt.Fprintf(out, "Another process keeps the connections that began here from now on\n")
	case <-ctx.Done():
		return k.Drop()
	}
	return nil
}

// givenConnections keeps the connections of a guest of which it was learnt by a process without its machine that it runs elsewhere.
func givenConnections(ctx context.Context, k *flow.Keeper, out io.Writer) error {
	if k.State() == flow.Diverted {
		if err := k.Left(); err != nil {
			return err
		}
	}
	return closeKeeper(ctx, k, out)
}

// closeKeeper ends the keeping of connections when its peer is closed. With a guest that has moved, that is when they have ended.
func closeKeeper(ctx context.Context, k *flow.Keeper, out io.Writer) error {
	var err error
	switch k.State() {
	case flow.Away:
		err = keepOn(ctx, k, out)
	case flow.Home, flow.Leaving:
		err = k.End()
	}
	return errors.Join(err, k.Close())
}

type connectionsOptions struct {
	links
	netns      string
	drop, list bool
}

func newConnectionsCommand() *cobra.Command {
	opts := connectionsOptions{links: links{pushes: true}}
	cmd := &cobra.Command{
		Use:   "connections",
		Short: "Keep the connections of a VM that has moved, after its peer has died",
		Long: `Keep the connections of a VM that has moved, in the network namespace in which they began, until the last has ended: as the peer that the
VM has left does, and instead of it if it has died. One that lives lets go of them.

Exit statuses: 0 the connections have ended, or were given up; 1 something failed; 2 the command line cannot be used.`,
		Example: `  drafter connections --netns ark0
  drafter connections --netns ark0 --drop`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return runConnections(cmd, opts) },
	}
	flags := cmd.Flags()
	opts.links.register(flags)
	flags.StringVar(&opts.netns, "netns", "ark0", "network namespace, of drafter nat")
	flags.BoolVar(&opts.drop, "drop", false, "give the connections up")
	flags.BoolVar(&opts.list, "list", false, "print what is kept, as JSON, and leave it as it is")
	return cmd
}

func runConnections(cmd *cobra.Command, opts connectionsOptions) error {
	ctx := cmd.Context()
	out := &lineWriter{to: cmd.ErrOrStderr()}
	switch {
	case opts.netns == "":
		return usageErrorf("--netns is empty: name a network namespace")
	case opts.drop && opts.list:
		return usageErrorf("--drop and --list exclude each other")
	}
	if err := opts.links.check(ctx, cmd.Flags(), cmd.InOrStdin(), cmd.OutOrStdout()); err != nil {
		return err
	}
	if opts.list {
		if _, ours, err := nat.Lookup(opts.netns); err != nil {
			return err
		} else if !ours {
			return fmt.Errorf("network namespace %q: %w", opts.netns, flow.ErrNotNAT)
		}
		kept, err := flow.Read(opts.netns)
		if err != nil {
			return err
		}
		return json.NewEncoder(cmd.OutOrStdout()).Encode(kept)
	}
	k, err := flow.Open(ctx, flow.Config{Netns: opts.netns, Dial: dialTold(opts.both(), ""), Logger: logger(ctx)})
	if err != nil {
		return err
	}
	defer k.Close()
	switch {
	case k.State() == flow.Vacant:
		fmt.Fprintf(out, "Nothing is kept in %s\n", opts.netns)
		return nil
	case opts.drop:
		return k.Drop()
	case k.State() != flow.Away:
		return fmt.Errorf("network namespace %q: its VM runs there, or did: start its peer again, with the command line that it had, or give it up (--drop)", opts.netns)
	}
	return keepOn(ctx, k, out)
}
