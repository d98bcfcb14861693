package agent

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/drafter-vm/drafter/pkg/agent/agentpb"
)

// Network is what a network interface of a guest is to be. The zero value leaves all as it is.
type Network struct {
	Interface string   `json:"interface,omitempty"` // its name; empty: the first that is no loopback
	MAC       string   `json:"mac,omitempty"`       // as 02:00:00:00:00:01; empty: as before
	Addresses []string `json:"addresses,omitempty"` // as 172.16.0.2/30 or fd00::2/64; those of the same family that it has go
	Gateways  []string `json:"gateways,omitempty"`  // of default routes, one for each family at most; those of the same family go
}

// IsZero reports whether nothing is to change.
func (n Network) IsZero() bool {
	return n.Interface == "" && n.MAC == "" && len(n.Addresses) == 0 && len(n.Gateways) == 0
}

// Check reports what is wrong with it.
func (n Network) Check() error {
	if n.MAC == "" && len(n.Addresses) == 0 && len(n.Gateways) == 0 && n.Interface != "" {
		return fmt.Errorf("interface %q is named, and nothing of it is to change: give a MAC, addresses or gateways", n.Interface)
	}
	if len(n.Interface) >= unix.IFNAMSIZ {
		return fmt.Errorf("interface %q: a name has at most %d bytes", n.Interface, unix.IFNAMSIZ-1)
	}
	if n.MAC != "" {
		if mac, err := net.ParseMAC(n.MAC); err != nil || len(mac) != 6 || mac[0]&1 != 0 || bytes.Equal(mac, make([]byte, 6)) {
			return fmt.Errorf("MAC %q: give six bytes in hexadecimal, of which the first is even, as 02:00:00:00:00:01", n.MAC)
		}
	}
	for _, a := range n.Addresses {
		if p, err := netip.ParsePrefix(a); err != nil || p.Addr().IsMulticast() || p.Addr().IsUnspecified() || p.Addr().Is4In6() {
			return fmt.Errorf("address %q: give it with its prefix length, as 172.16.0.2/30 or fd00::2/64", a)
		}
	}
	seen := map[bool]string{}
	for _, g := range n.Gateways {
		a, err := netip.ParseAddr(g)
		if err != nil || a.IsMulticast() || a.IsUnspecified() || a.Zone() != "" || a.Is4In6() {
			return fmt.Errorf("gateway %q: give an address, as 172.16.0.1 or fd00::1", g)
		}
		if other, ok := seen[a.Is4()]; ok {
			return fmt.Errorf("gateways %q and %q: give one for each of IPv4 and IPv6", other, g)
		}
		seen[a.Is4()] = g
	}
	return nil
}

func (n Network) message() *agentpb.Network {
	if n.IsZero() {
		return nil
	}
	return &agentpb.Network{Interface: n.Interface, Mac: n.MAC, Addresses: n.Addresses, Gateways: n.Gateways}
}

func networkOf(m *agentpb.Network) Network {
	return Network{Interface: m.GetInterface(), MAC: m.GetMac(), Addresses: m.GetAddresses(), Gateways: m.GetGateways()}
}

// take makes the interface of this network namespace that. It does all it can, and reports what failed.
func (n Network) take() error {
	if err := n.Check(); err != nil {
		return fmt.Errorf("set network: %w", err)
	}
	link, err := n.link()
	if err != nil {
		return fmt.Errorf("set network: %w", err)
	}
	name := link.Attrs().Name
	var errs []error
	if n.MAC != "" {
		mac, _ := net.ParseMAC(n.MAC) // which was checked
		errs = append(errs, setMAC(link, mac))
	}
	errs = append(errs, setAddresses(link, n.Addresses))
	for _, g := range n.Gateways {
		gw := net.ParseIP(g)
		if err := dropRoutes(link, family(gw)); err != nil { // those that are left of before
			errs = append(errs, err)
			continue
		}
		if err := netlink.RouteReplace(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: gw}); err != nil {
			errs = append(errs, fmt.Errorf("route by gateway %q: %w", g, err))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("set network of interface %q: %w", name, err)
	}
	return nil
}

func (n Network) link() (netlink.Link, error) {
	if n.Interface != "" {
		link, err := netlink.LinkByName(n.Interface)
		if err != nil {
			return nil, fmt.Errorf("find interface %q: %w", n.Interface, err)
		}
		return link, nil
	}
	links, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	for _, link := range links {
		if link.Attrs().Flags&net.FlagLoopback == 0 && link.Attrs().EncapType == "ether" {
			return link, nil
		}
	}
	return nil, errors.New("there is no interface but loopback")
}

// setMAC sets the hardware address. Where an interface must be down for that, it gets its routes back afterwards.
func setMAC(link netlink.Link, mac net.HardwareAddr) error {
	if bytes.Equal(link.Attrs().HardwareAddr, mac) {
		return nil
	}
	err := netlink.LinkSetHardwareAddr(link, mac)
	if !errors.Is(err, unix.EBUSY) {
		return wrap("set MAC", err)
	}
	routes, err := netlink.RouteList(link, netlink.FAMILY_ALL)
	if err != nil {
		return wrap("list routes", err)
	}
	if err := netlink.LinkSetDown(link); err != nil {
		return wrap("set MAC: take interface down", err)
	}
	err = netlink.LinkSetHardwareAddr(link, mac)
	if err := netlink.LinkSetUp(link); err != nil {
		return wrap("set MAC: bring interface up", err)
	}
	var errs []error
	for _, r := range routes {
		if r.Protocol != unix.RTPROT_KERNEL { // those the kernel makes itself
			errs = append(errs, wrap("restore route", netlink.RouteReplace(&r)))
		}
	}
	return errors.Join(append(errs, wrap("set MAC", err))...)
}

// setAddresses gives the interface addresses in place of those of the same family that it has, but for those of its link. The new ones come first.
func setAddresses(link netlink.Link, addresses []string) error {
	var errs []error
	kept := map[string]bool{}
	families := map[int]bool{}
	var wanted []*netlink.Addr
	for _, a := range addresses {
		addr, err := netlink.ParseAddr(a)
		if err != nil {
			return fmt.Errorf("address %q: %w", a, err)
		}
		kept[addr.IPNet.String()], families[family(addr.IP)] = true, true
		if family(addr.IP) == netlink.FAMILY_V6 {
			addr.Flags = unix.IFA_F_NODAD // nobody else is to have it, and it is wanted at once
		}
		wanted = append(wanted, addr)
	}
	routes, err := netlink.RouteList(link, netlink.FAMILY_ALL)
	if err != nil {
		return fmt.Errorf("list routes: %w", err)
	}
	for f := range families {
		have, err := netlink.AddrList(link, f)
		if err != nil {
			errs = append(errs, fmt.Errorf("list addresses: %w", err))
			continue
		}
		for _, a := range have {
			if kept[a.IPNet.String()] || a.Scope != int(netlink.SCOPE_UNIVERSE) {
				continue
			}
			if err := netlink.AddrDel(link, &a); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) { // gone with its primary
				errs = append(errs, fmt.Errorf("remove address %q: %w", a.IPNet, err))
			}
		}
	}
	// After that: one that goes takes those of its subnet that came after it along, and the last takes the routes.
	for _, a := range wanted {
		if err := netlink.AddrReplace(link, a); err != nil {
			errs = append(errs, fmt.Errorf("add address %q: %w", a.IPNet, err))
		}
	}
	for _, r := range routes {
		if r.Gw != nil && families[family(r.Gw)] && r.Protocol != unix.RTPROT_KERNEL {
			r.Src = nil                  // which may be gone
			_ = netlink.RouteReplace(&r) // as far as its gateway can be reached from the new addresses
		}
	}
	return errors.Join(errs...)
}

// dropRoutes removes the default routes by an interface.
func dropRoutes(link netlink.Link, family int) error {
	routes, err := netlink.RouteList(link, family)
	if err != nil {
		return fmt.Errorf("list routes: %w", err)
	}
	for _, r := range routes {
		if r.Dst != nil && !r.Dst.IP.IsUnspecified() {
			continue
		}
		if err := netlink.RouteDel(&r); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("remove route by gateway %q: %w", r.Gw, err)
		}
	}
	return nil
}

func family(ip net.IP) int {
	if ip.To4() != nil {
		return netlink.FAMILY_V4
	}
	return netlink.FAMILY_V6
}

func wrap(what string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", what, err)
}
