package main

import (
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/spf13/cobra"

	"github.com/drafter-vm/drafter/pkg/nat"
)

type natOptions struct {
	hostInterface string
	hostVeth      [2]string // IPv4, IPv6
	namespaceVeth [2]string
	blocked       []string
	iface         string
	gateway       string
	netmask       uint
	guest         string
	gateway6      string
	guest6        string
	mac           string
	prefix        string
	count         int
	incoming      bool
	ipv6          string
}

func newNATCommand() *cobra.Command {
	var opts natOptions
	cmd := &cobra.Command{
		Use:   "nat",
		Short: "Make network namespaces for VMs, with NAT to the host's network",
		Long: `Make network namespaces for VMs, each with a tap interface for a guest and NAT to the host's network, in IPv4 and IPv6,
and keep them until the command ends (Ctrl-C, SIGTERM); then nothing is left of them.

Guests have the same addresses everywhere, so that they can be moved and cloned. Each namespace translates its guest's to one of
--namespace-veth-cidr, and the host to its own where it leaves by --host-interface. From the host, a guest is reached at its
namespace's address of --host-veth-cidr; drafter forwarder brings there what comes to a port of the host. Guests reach others, but
nothing of --blocked-subnet-cidr.

One that was killed is started again with the same flags: it takes over what is there, with the VMs in it. Other flags are
refused while VMs run.

Exit statuses: 0 ended by a signal, nothing is left; 1 something failed; 2 the command line cannot be used; 130 ended by a signal before the
namespaces were there, nothing is left.`,
		Example: `  drafter nat --count 4
  drafter peer --netns ark0 --package out/package --instance out/instance-0`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return runNAT(cmd, opts) },
	}
	flags := cmd.Flags()
	flags.StringVar(&opts.hostInterface, "host-interface", "", "the host's interface to others (empty: that of its default route)")
	flags.StringVar(&opts.hostVeth[0], "host-veth-cidr", "10.0.8.0/22", "network of the addresses between host and namespaces, 4 for each")
	flags.StringVar(&opts.hostVeth[1], "host-veth-cidr6", "fd00:10:8::/64", "the same in IPv6")
	flags.StringVar(&opts.namespaceVeth[0], "namespace-veth-cidr", "10.0.15.0/24", "network of the addresses that guests' are translated to, one for each")
	flags.StringVar(&opts.namespaceVeth[1], "namespace-veth-cidr6", "fd00:10:15::/64", "the same in IPv6; a prefix that is not unique local must be routed to this host, and is not translated again")
	flags.StringArrayVar(&opts.blocked, "blocked-subnet-cidr", []string{"10.0.15.0/24", "fd00:10:15::/64"}, "network that guests do not reach and are not reached from, may be given again (default: the guests' own)")
	flags.StringVar(&opts.iface, "namespace-interface", "tap0", "tap interface in each namespace")
	flags.StringVar(&opts.gateway, "namespace-interface-gateway", "172.16.0.1", "its address, the gateway of the guest")
	flags.UintVar(&opts.netmask, "namespace-interface-netmask", 30, "length of the prefix of gateway and guest, in bits")
	flags.StringVar(&opts.guest, "namespace-interface-ip", "172.16.0.2", "the guest's address")
	flags.StringVar(&opts.gateway6, "namespace-interface-gateway6", "fd00:172:16::1/64", "gateway of the guest in IPv6, with the length of the prefix")
	flags.StringVar(&opts.guest6, "namespace-interface-ip6", "fd00:172:16::2", "the guest's IPv6 address")
	flags.StringVar(&opts.mac, "namespace-interface-mac", nat.DefaultMAC.String(), "MAC address of the tap interfaces")
	flags.StringVar(&opts.prefix, "namespace-prefix", "ark", "begin of the namespaces' names, which go on with a number")
	flags.IntVar(&opts.count, "count", 256, "how many namespaces to make (default: as many as there are addresses for, up to 256)")
	flags.BoolVar(&opts.incoming, "allow-incoming-traffic", true, "let guests be reached from the host, and by forwards")
	flags.StringVar(&opts.ipv6, "ipv6", "auto", "IPv6 beside IPv4: on, off, or auto: where the host has it")
	offer(cmd, "ipv6", "auto", "on", "off")
	return cmd
}

// config is the NAT that the flags ask for.
func (o natOptions) config(cmd *cobra.Command) (nat.Config, error) {
	changed := cmd.Flags().Changed
	c := nat.Config{
		Prefix: o.prefix, Count: o.count, HostInterface: o.hostInterface, Interface: o.iface, DenyIncoming: !o.incoming, Logger: logger(cmd.Context()),
	}
	switch {
	case o.prefix == "":
		return c, usageErrorf("--namespace-prefix is empty: give the begin of the namespaces' names")
	case o.iface == "":
		return c, usageErrorf("--namespace-interface is empty: give a name")
	case o.count < 1:
		return c, usageErrorf("--count %d: give at least 1", o.count)
	case o.netmask > 32:
		return c, usageErrorf("--namespace-interface-netmask %d: give the length of a prefix, up to 30", o.netmask)
	}
	prefix := func(flag, value string, to *netip.Prefix) error {
		p, err := netip.ParsePrefix(value)
		if err != nil {
			return usageErrorf("--%s %q: give a network as ADDRESS/BITS", flag, value)
		}
		*to = p
		return nil
	}
	addr := func(flag, value string, to *netip.Addr) error {
		a, err := netip.ParseAddr(value)
		if err != nil || a.Zone() != "" {
			return usageErrorf("--%s %q: give an IP address", flag, value)
		}
		*to = a
		return nil
	}
	var gateway netip.Addr
	for _, err := range []error{
		prefix("host-veth-cidr", o.hostVeth[0], &c.HostVethCIDR), prefix("host-veth-cidr6", o.hostVeth[1], &c.HostVethCIDR6),
		prefix("namespace-veth-cidr", o.namespaceVeth[0], &c.NamespaceVethCIDR), prefix("namespace-veth-cidr6", o.namespaceVeth[1], &c.NamespaceVethCIDR6),
		prefix("namespace-interface-gateway6", o.gateway6, &c.Gateway6),
		addr("namespace-interface-gateway", o.gateway, &gateway), addr("namespace-interface-ip", o.guest, &c.Guest), addr("namespace-interface-ip6", o.guest6, &c.Guest6),
	} {
		if err != nil {
			return c, err
		}
	}
	c.Gateway = netip.PrefixFrom(gateway, int(o.netmask))
	if !c.Gateway.IsValid() {
		return c, usageErrorf("--namespace-interface-gateway %q: give an IPv4 address", o.gateway)
	}
	if changed("blocked-subnet-cidr") {
		c.BlockedSubnets = []netip.Prefix{}
		for _, b := range o.blocked {
			if b == "" {
				continue // none
			}
			var p netip.Prefix
			if err := prefix("blocked-subnet-cidr", b, &p); err != nil {
				return c, err
			}
			c.BlockedSubnets = append(c.BlockedSubnets, p)
		}
	}
	mac, err := net.ParseMAC(o.mac)
	if err != nil {
		return c, usageErrorf("--namespace-interface-mac %q: give 6 bytes, as 02:0e:d9:fd:68:3d", o.mac)
	}
	c.MAC = mac
	switch o.ipv6 {
	case "auto":
	case "on":
		c.IPv6 = nat.On
	case "off":
		c.IPv6 = nat.Off
	default:
		return c, usageErrorf("--ipv6 %q: use auto, on or off", o.ipv6)
	}
	if n := c.Capacity(); !changed("count") && n > 0 {
		c.Count = min(c.Count, n)
	}
	if err := c.Check(); err != nil {
		return c, usageErrorf("%w", err)
	}
	return c, nil
}

func runNAT(cmd *cobra.Command, opts natOptions) error {
	ctx := cmd.Context()
	out := &lineWriter{to: cmd.ErrOrStderr()}
	cfg, err := opts.config(cmd)
	if err != nil {
		return err
	}
	began := time.Now()
	n, err := nat.Open(ctx, cfg)
	if err != nil {
		return interrupted(cmd, err)
	}
	all, used := n.Namespaces(), n.Config()
	families := "IPv4 and IPv6"
	if used.IPv6 == nat.Off {
		families = "IPv4"
	}
	count, names := "1 network namespace", all[0].Name
	if len(all) > 1 {
		count, names = fmt.Sprintf("%d network namespaces", len(all)), fmt.Sprintf("%s to %s", all[0].Name, all[len(all)-1].Name)
	}
	fmt.Fprintf(out, "%s, %s, %s by %s, in %s; Ctrl-C removes all\n", count, names, families, used.HostInterface, time.Since(began).Round(time.Millisecond))
	<-ctx.Done()
	if err := n.Close(ctx); err != nil {
		return err
	}
	fmt.Fprintf(out, "Removed %s\n", count)
	return nil
}
