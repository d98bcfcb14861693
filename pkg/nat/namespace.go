package nat

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/drafter-vm/drafter/pkg/nat/rule"
	"github.com/drafter-vm/drafter/pkg/nat/sysctl"
)

// VethInside is the namespace's end of its veth pair.
const VethInside = "veth0"

// queueLength is how many packets wait in a tap for a guest that is paused, as when it arrives from elsewhere.
const queueLength = 8000

const insideName = "drafter-nat" // the table of rules in a namespace

// gatewayLinkLocal is an address that the gateway of every guest has besides its own, insideLinkLocal one of the namespace's end of its
// veth pair.
var (
	gatewayLinkLocal = netip.MustParsePrefix("fe80::1/64")
	insideLinkLocal  = netip.MustParsePrefix("fe80::2/64")
)

// mark is what the alias of lo says in a namespace of this NAT.
func (c Config) mark() string { return "drafter nat " + c.Prefix + " " }

// fingerprint is the mark with all that a namespace depends on, and what others want to know of it, but for whether it is closed.
func (c Config) fingerprint(n Namespace) string {
	sum := sha256.Sum256(fmt.Append(nil, n, c.Gateway, c.Gateway6, c.Guest, c.Guest6, c.MAC))
	return fmt.Sprintf("%s%x %s %s %s", c.mark(), sum[:8], c.Interface, c.Guest, c.Guest6)
}

// closed ends the alias in a namespace of a NAT with DenyIncoming. That is changed without making it anew.
const closed = " closed"

// Inside is what a namespace of a NAT says of itself.
type Inside struct {
	Prefix        string     // of the NAT
	Interface     string     // the tap
	Guest, Guest6 netip.Addr // address of the guest in its namespace
	Closed        bool       // the NAT has DenyIncoming
}

// Lookup finds out whether a namespace was made by a NAT, by its name.
func Lookup(name string) (in Inside, ours bool, err error) {
	handle, err := OpenNamespace(name)
	if err != nil {
		return in, false, err
	}
	defer handle.Close()
	h, err := netlink.NewHandleAt(handle, unix.NETLINK_ROUTE)
	if err != nil {
		return in, false, fmt.Errorf("open netlink: %w", err)
	}
	defer h.Close()
	lo, err := h.LinkByName("lo")
	if err != nil {
		return in, false, fmt.Errorf("inspect network namespace %q: %w", name, err)
	}
	alias, denies := strings.CutSuffix(lo.Attrs().Alias, closed)
	words := strings.Fields(alias)
	if len(words) != 7 || words[0] != "drafter" || words[1] != "nat" {
		return in, false, nil
	}
	in = Inside{Prefix: words[2], Interface: words[4], Closed: denies}
	if in.Guest, err = netip.ParseAddr(words[5]); err == nil {
		in.Guest6, err = netip.ParseAddr(words[6])
	}
	if err != nil {
		return in, false, fmt.Errorf("inspect network namespace %q: %w", name, err)
	}
	return in, true, nil
}

// build makes a network namespace with all that belongs to it, and gives it its name at the end.
func (n *NAT) build(ns Namespace) error {
	return onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("make network namespace: %w", err)
		}
		inside, err := netns.Get()
		if err != nil {
			return err
		}
		defer inside.Close()
		if err := n.furnish(ns, inside); err != nil {
			return err
		}
		return giveName(ns.Name)
	})
}

// furnish sees to it that a namespace has all that belongs to it. It runs on a thread in the namespace, and can be called again for one
// that has some of it, or all, even while a guest runs there.
func (n *NAT) furnish(ns Namespace, inside netns.NsHandle) error {
	c := n.cfg
	settings := []sysctl.Setting{
		{Key: "net/ipv4/ip_forward", Value: "1"},
		{Key: "net/ipv4/conf/all/rp_filter", Value: "0"}, // what comes through a tunnel comes from where no route leads to
		{Key: "net/ipv4/conf/default/rp_filter", Value: "0"},
		{Key: "net/ipv4/conf/all/send_redirects", Value: "0"}, // nobody is told to go round a host that relays
		{Key: "net/ipv4/conf/default/send_redirects", Value: "0"},
		{Key: "net/ipv6/conf/all/disable_ipv6", Value: "0"},
		{Key: "net/ipv6/conf/default/disable_ipv6", Value: "0"},
		{Key: "net/ipv6/conf/default/addr_gen_mode", Value: "1"}, // no link-local addresses: the tap's would be the guest's
		{Key: "net/ipv6/conf/default/accept_dad", Value: "0"},
		{Key: "net/ipv6/conf/default/accept_ra", Value: "0"},
		{Key: "net/ipv6/conf/all/forwarding", Value: "1"},
	}
	if !n.ipv6 {
		settings = settings[:5]
	}
	if err := sysctl.Set(settings...); err != nil {
		return err
	}
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	defer h.Close()

	lo, err := h.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find %q: %w", "lo", err)
	}
	if err := h.LinkSetUp(lo); err != nil {
		return fmt.Errorf("set %q up: %w", "lo", err)
	}

	tap, err := h.LinkByName(c.Interface)
	if notFound(err) {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = c.Interface
		if err := h.LinkAdd(&netlink.Tuntap{LinkAttrs: attrs, Mode: netlink.TUNTAP_MODE_TAP}); err != nil {
			return fmt.Errorf("add tap %q: %w", c.Interface, err)
		}
		tap, err = h.LinkByName(c.Interface)
	}
	if err != nil {
		return fmt.Errorf("find tap %q: %w", c.Interface, err)
	}
	if !bytes.Equal(tap.Attrs().HardwareAddr, c.MAC) {
		if err := h.LinkSetHardwareAddr(tap, c.MAC); err != nil {
			return fmt.Errorf("give tap %q the address %s: %w", c.Interface, c.MAC, err)
		}
	}
	if err := h.LinkSetTxQLen(tap, queueLength); err != nil {
		return fmt.Errorf("set length of the queue of tap %q: %w", c.Interface, err)
	}
	gateways := []netip.Prefix{c.Gateway}
	if n.ipv6 {
		gateways = append(gateways, c.Gateway6, gatewayLinkLocal)
	}
	if err := raise(h, tap, gateways...); err != nil {
		return err
	}

	veth, err := h.LinkByName(VethInside)
	if err == nil && !n.hasLink(ns.Veth) { // its other end is elsewhere: of a host that was, or is another
		if err := h.LinkDel(veth); err != nil {
			return fmt.Errorf("remove %q: %w", VethInside, err)
		}
		_, err = h.LinkByName(VethInside)
	}
	if notFound(err) {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = VethInside
		pair := netlink.NewVeth(attrs)
		pair.PeerName, pair.PeerNamespace = ns.Veth, netlink.NsFd(int(n.host))
		if err := h.LinkAdd(pair); err != nil {
			return fmt.Errorf("add veth pair %q, %q: %w", VethInside, ns.Veth, err)
		}
		veth, err = h.LinkByName(VethInside)
	}
	if err != nil {
		return fmt.Errorf("find %q: %w", VethInside, err)
	}
	ends := []netip.Prefix{netip.PrefixFrom(ns.Inside, pairBits4)}
	routes := []netlink.Route{{Dst: anywhere(ns.Host), Gw: ns.Host.AsSlice(), LinkIndex: veth.Attrs().Index}}
	if n.ipv6 {
		// Whoever forwards finds its neighbours by a link-local address.
		ends = append(ends, netip.PrefixFrom(ns.Inside6, pairBits6), insideLinkLocal)
		routes = append(routes, netlink.Route{Dst: anywhere(ns.Host6), Gw: ns.Host6.AsSlice(), LinkIndex: veth.Attrs().Index})
	}
	if err := raise(h, veth, ends...); err != nil {
		return err
	}
	for _, r := range routes {
		if err := h.RouteReplace(&r); err != nil {
			return fmt.Errorf("set route by %s: %w", r.Gw, err)
		}
	}
	if err := c.inside(ns, n.ipv6).Replace(inside); err != nil {
		return err
	}
	// The keys are there once there are rules that know of connections. Those that are moved here have no windows yet.
	if err := sysctl.Set(sysctl.Setting{Key: "net/netfilter/nf_conntrack_tcp_be_liberal", Value: "1"}); err != nil {
		return err
	}
	if err := n.attach(ns); err != nil {
		return err
	}
	// At last: who bears the mark is whole.
	alias := c.fingerprint(ns)
	if c.DenyIncoming {
		alias += closed
	}
	if err := h.LinkSetAlias(lo, alias); err != nil {
		return fmt.Errorf("mark network namespace: %w", err)
	}
	return nil
}

// hasLink reports whether the host has an interface of that name.
func (n *NAT) hasLink(name string) bool {
	h, err := netlink.NewHandleAt(n.host, unix.NETLINK_ROUTE)
	if err != nil {
		return false
	}
	defer h.Close()
	_, err = h.LinkByName(name)
	return err == nil
}

// attach sets up the host's end of a namespace's veth pair.
func (n *NAT) attach(ns Namespace) error {
	h, err := netlink.NewHandleAt(n.host, unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	defer h.Close()
	veth, err := h.LinkByName(ns.Veth)
	if err != nil {
		return fmt.Errorf("find %q on the host: %w", ns.Veth, err)
	}
	// Who calls a forward at 127.0.0.1 gets its answers from here; the rules keep guests from using it otherwise.
	if err := n.within(func() error {
		return sysctl.Set(
			sysctl.Setting{Key: "net/ipv4/conf/" + ns.Veth + "/route_localnet", Value: "1"},
			sysctl.Setting{Key: "net/ipv4/conf/" + ns.Veth + "/rp_filter", Value: "0"},
			sysctl.Setting{Key: "net/ipv6/conf/" + ns.Veth + "/accept_ra", Value: "0"},
			sysctl.Setting{Key: "net/ipv6/conf/" + ns.Veth + "/accept_dad", Value: "0"},
		)
	}); err != nil {
		return err
	}
	ends := []netip.Prefix{netip.PrefixFrom(ns.Host, pairBits4)}
	routes := []netlink.Route{{Dst: network(rule.Host(ns.Outer)), Gw: ns.Inside.AsSlice(), LinkIndex: veth.Attrs().Index}}
	if n.ipv6 {
		ends = append(ends, netip.PrefixFrom(ns.Host6, pairBits6))
		routes = append(routes, netlink.Route{Dst: network(rule.Host(ns.Outer6)), Gw: ns.Inside6.AsSlice(), LinkIndex: veth.Attrs().Index})
	}
	if err := raise(h, veth, ends...); err != nil {
		return err
	}
	for _, r := range routes {
		if err := h.RouteReplace(&r); err != nil {
			return fmt.Errorf("set route to %s: %w", r.Dst, err)
		}
	}
	return nil
}

// raise sets an interface up and gives it addresses, usable at once.
func raise(h *netlink.Handle, link netlink.Link, prefixes ...netip.Prefix) error {
	if err := h.LinkSetUp(link); err != nil {
		return fmt.Errorf("set %q up: %w", link.Attrs().Name, err)
	}
	for _, p := range prefixes {
		addr := &netlink.Addr{IPNet: network(p)}
		if p.Addr().Is6() {
			addr.Flags = unix.IFA_F_NODAD
		}
		if err := h.AddrReplace(link, addr); err != nil {
			return fmt.Errorf("give %q the address %s: %w", link.Attrs().Name, p, err)
		}
	}
	return nil
}

// inside are the rules in a namespace. They translate only what comes or goes by the veth pair: what comes through other interfaces,
// from where the guest was before, has been translated there.
func (c Config) inside(ns Namespace, ipv6 bool) rule.Table {
	pre := rule.Chain{Name: "prerouting", Hook: rule.PreRouting, Priority: rule.DestinationNAT, NAT: true}
	post := rule.Chain{Name: "postrouting", Hook: rule.PostRouting, Priority: rule.SourceNAT, NAT: true}
	forward := rule.Chain{Name: "forward", Hook: rule.Forward, Priority: rule.Filter}
	families := []struct{ guest, inside, outer netip.Addr }{{c.Guest, ns.Inside, ns.Outer}}
	if ipv6 {
		families = append(families, struct{ guest, inside, outer netip.Addr }{c.Guest6, ns.Inside6, ns.Outer6})
	}
	for _, f := range families {
		if !c.DenyIncoming {
			for _, a := range []netip.Addr{f.outer, f.inside} {
				pre.Rules = append(pre.Rules, rule.Of(rule.In(VethInside), rule.To(rule.Host(a)), rule.ToAddress(f.guest, 0)))
			}
		}
		post.Rules = append(post.Rules, rule.Of(rule.Out(VethInside), rule.From(rule.Host(f.guest)), rule.FromAddress(f.outer)))
		// A guest has one address; who uses another one would not be translated.
		forward.Rules = append(forward.Rules, rule.Of(rule.In(c.Interface), rule.NotFrom(rule.Host(f.guest)), rule.Drop()))
	}
	if !ipv6 {
		forward.Rules = append(forward.Rules, rule.Of(rule.IPv6(), rule.Drop()))
	}
	// What netfilter takes for no part of a connection it would not translate either.
	forward.Rules = append(forward.Rules, rule.Of(rule.In(c.Interface), rule.Out(VethInside), rule.State(rule.Invalid), rule.Drop()))
	return rule.Table{Name: insideName, Chains: []rule.Chain{pre, post, forward}}
}

// state is what is found under the name of a namespace.
type state int

const (
	absent state = iota
	foreign
	leftover // a name without a namespace
	ours     // as it is to be, or nearly
	outdated // of other settings
)

// inspect finds out what is under the name of a namespace, and whether a machine uses it.
func (n *NAT) inspect(ns Namespace) (found state, used bool, err error) {
	handle, err := OpenNamespace(ns.Name)
	if errors.Is(err, ErrNoNamespace) {
		if exists(ns.Name) {
			return leftover, false, nil
		}
		return absent, false, nil
	} else if err != nil {
		return 0, false, err
	}
	defer handle.Close()
	h, err := netlink.NewHandleAt(handle, unix.NETLINK_ROUTE)
	if err != nil {
		return foreign, false, nil // no network namespace
	}
	defer h.Close()
	lo, err := h.LinkByName("lo")
	if err != nil {
		return 0, false, fmt.Errorf("inspect network namespace %q: %w", ns.Name, err)
	}
	alias := lo.Attrs().Alias
	if !strings.HasPrefix(alias, n.cfg.mark()) {
		return foreign, false, nil
	}
	links, err := h.LinkList()
	if err != nil {
		return 0, false, fmt.Errorf("inspect network namespace %q: %w", ns.Name, err)
	}
	for _, l := range links {
		if l.Type() == "tuntap" && l.Attrs().RawFlags&unix.IFF_LOWER_UP != 0 {
			used = true // a carrier: somebody has it open
		}
	}
	if strings.TrimSuffix(alias, closed) != n.cfg.fingerprint(ns) {
		return outdated, used, nil
	}
	return ours, used, nil
}

// mend brings a namespace of ours to what it should be.
func (n *NAT) mend(ns Namespace) error {
	handle, err := OpenNamespace(ns.Name)
	if err != nil {
		return err
	}
	defer handle.Close()
	return Within(handle, func() error { return n.furnish(ns, handle) })
}

// removeNamespace removes a namespace of ours, or what is left of one. Its interfaces go first: the namespace itself lives on while
// programs are in it.
func removeNamespace(name string) error {
	handle, err := OpenNamespace(name)
	if err == nil {
		defer handle.Close()
		err = Within(handle, removeLinks)
		if cookie, e := Cookie(handle); e == nil { // of a keeper that was killed
			for _, kind := range []string{".json", ".json.new", ".sock", ".lock"} {
				if e := os.Remove(filepath.Join(StateDir(), FlowState(cookie)+kind)); e != nil && !errors.Is(e, os.ErrNotExist) {
					err = errors.Join(err, e)
				}
			}
		}
	} else if errors.Is(err, ErrNoNamespace) {
		err = nil
	}
	return errors.Join(err, takeName(name))
}

// removeLinks removes all interfaces that can be, from the network namespace of the calling thread.
func removeLinks() error {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	defer h.Close()
	links, err := h.LinkList()
	if err != nil {
		return fmt.Errorf("list interfaces: %w", err)
	}
	var errs []error
	for _, l := range links {
		if !slices.Contains([]string{"tuntap", "veth", "vxlan"}, l.Type()) {
			continue
		}
		if err := h.LinkDel(l); err != nil && !errors.Is(err, unix.ENODEV) {
			errs = append(errs, fmt.Errorf("remove %q: %w", l.Attrs().Name, err))
		}
	}
	return errors.Join(errs...)
}

// forget has a namespace forget all connections, so that its next guest does not get what was its last one's.
func forget(name string) error {
	handle, err := OpenNamespace(name)
	if err != nil {
		return err
	}
	defer handle.Close()
	h, err := netlink.NewHandleAt(handle, unix.NETLINK_NETFILTER)
	if err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	defer h.Close()
	if err := h.ConntrackTableFlush(netlink.ConntrackTable); err != nil {
		return fmt.Errorf("forget connections of network namespace %q: %w", name, err)
	}
	return nil
}

func notFound(err error) bool {
	var missing netlink.LinkNotFoundError
	return errors.As(err, &missing)
}

// network is a prefix in the words of netlink.
func network(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// anywhere is the prefix of all addresses of an address's family.
func anywhere(a netip.Addr) *net.IPNet {
	if a.Is4() {
		return network(netip.PrefixFrom(netip.IPv4Unspecified(), 0))
	}
	return network(netip.PrefixFrom(netip.IPv6Unspecified(), 0))
}
