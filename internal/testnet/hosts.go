package testnet

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Hosts are hosts on one Ethernet: each is a network namespace with an interface eth0, which has an address of IPv4 and one of IPv6,
// and a default route. Each has its own kernel settings, rules and connections, as a host has; only names below /run/netns, and
// processes, are those of all.
//
//	NAME-a: eth0 198.51.100.1, 2001:db8::1 ──┐
//	NAME-b: eth0 198.51.100.2, 2001:db8::2 ──┼── br0 of NAME-wire: 198.51.100.254, 2001:db8::fe
//	…                                     ┘
type Hosts struct {
	name  string
	hosts []string
	lock  *lock
}

// The networks of Hosts, which are those of documentation (RFC 5737, RFC 3849), and their routers.
var (
	hostsNetwork4 = netip.MustParsePrefix("198.51.100.0/24")
	hostsNetwork6 = netip.MustParsePrefix("2001:db8::/64")
	hostsRouter4  = netip.MustParseAddr("198.51.100.254")
	hostsRouter6  = netip.MustParseAddr("2001:db8::fe")
)

// NewHosts makes the hosts of these names, after removing what is left of earlier ones under the same name.
func NewHosts(name string, hosts ...string) (_ *Hosts, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("create test hosts %q: %w", name, err)
		}
	}()
	if os.Geteuid() != 0 {
		return nil, errors.New("creating network namespaces needs root")
	}
	h := &Hosts{name: name, hosts: hosts}
	for _, n := range h.namespaces() {
		if !validName.MatchString(n) {
			return nil, fmt.Errorf("name %q is not valid; use letters, digits, '.', '_' and '-'", n)
		}
	}
	if h.lock, err = acquire(name); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, h.Close())
		}
	}()
	if err := h.lock.make(h.namespaces()); err != nil {
		return nil, err
	}
	err = Do(h.wire(), func() error {
		bridge, err := addBridge(gatewayMAC)
		if err != nil {
			return err
		}
		return addAddresses(bridge, netip.PrefixFrom(hostsRouter4, 24), netip.PrefixFrom(hostsRouter6, 64))
	})
	if err != nil {
		return nil, err
	}
	for i, host := range hosts {
		if err := h.build(i, host); err != nil {
			return nil, fmt.Errorf("host %q: %w", host, err)
		}
	}
	return h, nil
}

// NewTestHosts is NewHosts for a test: it chooses a name, skips the test without root, and removes the hosts when the test ends.
func NewTestHosts(t testing.TB, hosts ...string) *Hosts {
	t.Helper()
	return named(t, "h", func(name string) (*Hosts, error) { return NewHosts(name, hosts...) })
}

func (h *Hosts) wire() string { return h.name + "-wire" }

// Host is the name of a host's network namespace.
func (h *Hosts) Host(host string) string { return h.name + "-" + host }

// Addr4 and Addr6 are a host's addresses.
func (h *Hosts) Addr4(host string) netip.Addr { return h.addr(host, hostsNetwork4) }
func (h *Hosts) Addr6(host string) netip.Addr { return h.addr(host, hostsNetwork6) } // see Addr4

func (h *Hosts) addr(host string, network netip.Prefix) netip.Addr {
	a := network.Addr()
	for _, other := range h.hosts {
		a = a.Next()
		if other == host {
			return a
		}
	}
	return netip.Addr{}
}

func (h *Hosts) namespaces() []string {
	names := []string{h.wire()}
	for _, host := range h.hosts {
		names = append(names, h.Host(host))
	}
	return names
}

func (h *Hosts) build(i int, host string) error {
	handle, err := netns.GetFromName(h.Host(host))
	if err != nil {
		return err
	}
	defer handle.Close()
	err = Do(h.wire(), func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = fmt.Sprintf("p%d", i)
		veth := netlink.NewVeth(attrs)
		veth.PeerName, veth.PeerNamespace = "eth0", netlink.NsFd(int(handle))
		if err := netlink.LinkAdd(veth); err != nil {
			return fmt.Errorf("add veth %q: %w", attrs.Name, err)
		}
		_, err := enslave(attrs.Name)
		return err
	})
	if err != nil {
		return err
	}
	return Do(h.Host(host), func() error {
		// A host that forwards finds its neighbours by its link-local address, which would be in doubt for a second.
		if err := sysctl("net/ipv6/conf/eth0/accept_dad", "0"); err != nil {
			return err
		}
		for _, name := range []string{"lo", "eth0"} {
			if err := up(name); err != nil {
				return err
			}
		}
		link, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		if err := addAddresses(link, netip.PrefixFrom(h.Addr4(host), 24), netip.PrefixFrom(h.Addr6(host), 64)); err != nil {
			return err
		}
		for _, router := range []netip.Addr{hostsRouter4, hostsRouter6} {
			all := &net.IPNet{IP: make(net.IP, router.BitLen()/8), Mask: net.CIDRMask(0, router.BitLen())}
			if err := netlink.RouteAdd(&netlink.Route{Dst: all, Gw: router.AsSlice(), LinkIndex: link.Attrs().Index}); err != nil {
				return fmt.Errorf("add default route by %s: %w", router, err)
			}
		}
		return nil
	})
}

// addAddresses gives an interface of the calling thread's namespace addresses that are usable at once.
func addAddresses(link netlink.Link, prefixes ...netip.Prefix) error {
	for _, p := range prefixes {
		addr := &netlink.Addr{IPNet: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}}
		if p.Addr().Is6() {
			addr.Flags = unix.IFA_F_NODAD
		}
		if err := netlink.AddrAdd(link, addr); err != nil {
			return fmt.Errorf("add address %v: %w", p, err)
		}
	}
	return nil
}

// Close removes the hosts. Programs that are still in them lose their interfaces.
func (h *Hosts) Close() error {
	if h.lock == nil {
		return nil
	}
	err := h.lock.remove(h.namespaces())
	h.lock = nil
	return err
}
