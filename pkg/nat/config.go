package nat

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
)

// Config is a NAT. The zero value of each field is its default.
type Config struct {
	// Prefix begins the names of the namespaces, which go on with a number. Default: "ark". A host can have several, with addresses
	// that do not overlap.
	Prefix string

	// Count is how many namespaces Open makes. More are made by Claim, up to the number of addresses.
	Count int

	// HostInterface is the interface by which guests reach others. Default: that of the host's default route.
	HostInterface string

	// HostVethCIDR is where the pairs of addresses between host and namespaces come from, of which each takes 4 (a /30).
	// Default: 10.0.8.0/22, of 256 pairs. HostVethCIDR6 is the same for IPv6; default: fd00:10:8::/64.
	HostVethCIDR, HostVethCIDR6 netip.Prefix

	// NamespaceVethCIDR is where the addresses come from that guests have outside of their namespaces, one each. Default:
	// 10.0.15.0/24. NamespaceVethCIDR6 is the same for IPv6; default: fd00:10:15::/64. A prefix that is not unique local (fc00::/7) must
	// be routed to this host, and is what others see.
	NamespaceVethCIDR, NamespaceVethCIDR6 netip.Prefix

	// BlockedSubnets are what guests reach nothing of, and are not reached from. Nil: NamespaceVethCIDR and NamespaceVethCIDR6, so other
	// guests.
	BlockedSubnets []netip.Prefix

	// Interface is the tap in each namespace. Default: "tap0".
	Interface string
	// Gateway is its address, with the length of the prefix that the guest has; default: 172.16.0.1/30. Gateway6: fd00:172:16::1/64; it
	// answers to fe80::1, too.
	Gateway, Gateway6 netip.Prefix
	// Guest is the guest's address. Default: 172.16.0.2; Guest6: fd00:172:16::2.
	Guest, Guest6 netip.Addr
	// MAC is the tap's address, the same in all namespaces, so that a guest that has moved finds its gateway. Default: 02:0e:d9:fd:68:3d,
	// which the guest's own interface may have, too.
	MAC net.HardwareAddr

	// DenyIncoming has guests reached only by answers to what they began.
	DenyIncoming bool

	// IPv6 says whether there is IPv6 beside IPv4. Default: [Auto].
	IPv6 Choice

	// Making and Removing are called before a namespace is made or removed, by any goroutine. Nil is allowed.
	Making, Removing func(name string)

	// Logger receives events; nil means slog.Default().
	Logger *slog.Logger
}

// Choice is whether something is wanted.
type Choice int

// The choices.
const (
	Auto Choice = iota // where the host has it
	On                 // yes, or it is an error
	Off                // no
)

// DefaultMAC is the hardware address of taps, and of blueprints' guests.
var DefaultMAC = net.HardwareAddr{0x02, 0x0e, 0xd9, 0xfd, 0x68, 0x3d}

// WithDefaults is the configuration with every default in its place, but for HostInterface.
func (c Config) WithDefaults() Config {
	set := func(p *netip.Prefix, s string) {
		if !p.IsValid() {
			*p = netip.MustParsePrefix(s)
		}
	}
	if c.Prefix == "" {
		c.Prefix = "ark"
	}
	set(&c.HostVethCIDR, "10.0.8.0/22")
	set(&c.HostVethCIDR6, "fd00:10:8::/64")
	set(&c.NamespaceVethCIDR, "10.0.15.0/24")
	set(&c.NamespaceVethCIDR6, "fd00:10:15::/64")
	set(&c.Gateway, "172.16.0.1/30")
	set(&c.Gateway6, "fd00:172:16::1/64")
	if c.BlockedSubnets == nil {
		c.BlockedSubnets = []netip.Prefix{c.NamespaceVethCIDR, c.NamespaceVethCIDR6}
	}
	if c.Interface == "" {
		c.Interface = "tap0"
	}
	if !c.Guest.IsValid() {
		c.Guest = netip.MustParseAddr("172.16.0.2")
	}
	if !c.Guest6.IsValid() {
		c.Guest6 = netip.MustParseAddr("fd00:172:16::2")
	}
	if c.MAC == nil {
		c.MAC = DefaultMAC
	}
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	return c
}

// pairBits is the length of the prefixes of a pair: network, host, namespace, broadcast.
const (
	pairBits4 = 30
	pairBits6 = 126
)

// Capacity is how many namespaces there are addresses for.
func (c Config) Capacity() int {
	c = c.WithDefaults()
	n := min(room(c.HostVethCIDR, pairBits4), room(c.NamespaceVethCIDR, 32))
	if c.IPv6 != Off {
		n = min(n, room(c.HostVethCIDR6, pairBits6), room(c.NamespaceVethCIDR6, 128))
	}
	return n
}

// room is how many prefixes of a length fit into one.
func room(p netip.Prefix, bits int) int {
	if free := bits - p.Bits(); free < 0 {
		return 0
	} else if free < 31 {
		return 1 << free
	}
	return math.MaxInt32
}

// maxInterface is how long an interface's name can be (IFNAMSIZ of the kernel, less its end).
const maxInterface = 15

const vethSuffix = "-veth" // of the host's end of a namespace's veth pair, behind the namespace's name

var (
	validPrefix    = regexp.MustCompile(`^[A-Za-z](?:[A-Za-z0-9_.-]*[A-Za-z_.-])?$`)
	validInterface = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,14}$`)
)

// Check reports the first thing that is wrong with the configuration itself, whatever the host.
func (c Config) Check() error {
	c = c.WithDefaults()
	if !validPrefix.MatchString(c.Prefix) {
		return fmt.Errorf("namespace prefix %q: use letters, digits, '.', '_' and '-', with a letter at the begin and no digit at the end", c.Prefix)
	}
	if c.Count < 0 {
		return fmt.Errorf("count %d is negative: give the number of namespaces", c.Count)
	}
	for _, v := range []struct {
		what string
		p    netip.Prefix
		v4   bool
		bits int
	}{
		{"host veth CIDR", c.HostVethCIDR, true, pairBits4}, {"host veth IPv6 CIDR", c.HostVethCIDR6, false, pairBits6},
		{"namespace veth CIDR", c.NamespaceVethCIDR, true, 32}, {"namespace veth IPv6 CIDR", c.NamespaceVethCIDR6, false, 128},
		{"gateway", c.Gateway, true, 30}, {"IPv6 gateway", c.Gateway6, false, 126},
	} {
		switch {
		case v.v4 != v.p.Addr().Is4():
			return fmt.Errorf("%s %s: give a prefix of %s", v.what, v.p, map[bool]string{true: "IPv4", false: "IPv6"}[v.v4])
		case v.p.Bits() > v.bits:
			return fmt.Errorf("%s %s: it has room for nobody: its length can be %d at most", v.what, v.p, v.bits)
		}
	}
	for _, p := range []struct {
		what string
		p    netip.Prefix
	}{{"host veth CIDR", c.HostVethCIDR}, {"host veth IPv6 CIDR", c.HostVethCIDR6}, {"namespace veth CIDR", c.NamespaceVethCIDR}, {"namespace veth IPv6 CIDR", c.NamespaceVethCIDR6}} {
		if p.p != p.p.Masked() {
			return fmt.Errorf("%s %s: its address has bits behind the prefix: did you mean %s?", p.what, p.p, p.p.Masked())
		}
		for _, s := range special {
			if p.p.Overlaps(s) {
				return fmt.Errorf("%s %s: it has addresses of %s, which no interface can have, or not for others: give a private network, as 10.0.8.0/22 or fd00:10:8::/64", p.what, p.p, s)
			}
		}
	}
	if err := c.checkOverlaps(); err != nil {
		return err
	}
	for _, g := range []struct {
		what    string
		guest   netip.Addr
		gateway netip.Prefix
	}{{"", c.Guest, c.Gateway}, {"IPv6 ", c.Guest6, c.Gateway6}} {
		switch {
		case !g.gateway.Contains(g.guest):
			return fmt.Errorf("guest's %saddress %s: it is not in the network of its gateway, %s", g.what, g.guest, g.gateway.Masked())
		case g.guest == g.gateway.Addr():
			return fmt.Errorf("guest's %saddress %s: it is its gateway's", g.what, g.guest)
		case g.guest == g.gateway.Masked().Addr() || g.gateway.Addr() == g.gateway.Masked().Addr():
			return fmt.Errorf("%s is the address of the network %s: give its gateway and its guest others", g.gateway.Masked().Addr(), g.gateway.Masked())
		}
	}
	for _, a := range []netip.Addr{c.Guest, c.Gateway.Addr()} {
		if last := last(c.Gateway); a == last && c.Gateway.Bits() < 31 {
			return fmt.Errorf("%s is the broadcast address of the network %s: give its gateway and its guest others", a, c.Gateway.Masked())
		}
	}
	switch {
	case !validInterface.MatchString(c.Interface) || c.Interface == "lo" || c.Interface == VethInside:
		return fmt.Errorf("interface %q in the namespaces: use up to %d letters, digits, '.', '_' and '-', and not lo or %s", c.Interface, maxInterface, VethInside)
	case len(c.MAC) != 6 || c.MAC[0]&1 != 0 || bytes.Equal(c.MAC, make([]byte, 6)):
		return fmt.Errorf("MAC address %q of the interface in the namespaces: give the 6 bytes of one interface, as 02:0e:d9:fd:68:3d", c.MAC)
	}
	n := c.Capacity()
	if c.Count > n {
		return fmt.Errorf("%w: count %d is more than the %d namespaces that there are addresses for (host veth CIDR %s: %d, namespace veth CIDR %s: %d): give fewer, or larger CIDRs",
			ErrExhausted, c.Count, n, c.HostVethCIDR, room(c.HostVethCIDR, pairBits4), c.NamespaceVethCIDR, room(c.NamespaceVethCIDR, 32))
	}
	if longest := c.name(max(c.Count, 1) - 1); len(longest)+len(vethSuffix) > maxInterface {
		return fmt.Errorf("namespace prefix %q is too long: the interface %q would have more than %d characters", c.Prefix, longest+vethSuffix, maxInterface)
	}
	return nil
}

// ErrExhausted is wrapped by errors of Open and Claim which say that there are no addresses for more namespaces.
var ErrExhausted = errors.New("the addresses are exhausted")

// special are networks of which a veth pair cannot have addresses, or nobody would route them (the registries of RFC 6890).
var special = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"), netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("169.254.0.0/16"), netip.MustParsePrefix("224.0.0.0/3"),
	netip.MustParsePrefix("::/64"), netip.MustParsePrefix("fe80::/10"), netip.MustParsePrefix("ff00::/8"),
}

func (c Config) checkOverlaps() error {
	networks := []struct {
		what string
		p    netip.Prefix
	}{
		{"host veth CIDR", c.HostVethCIDR}, {"namespace veth CIDR", c.NamespaceVethCIDR}, {"guest's network", c.Gateway.Masked()},
		{"host veth IPv6 CIDR", c.HostVethCIDR6}, {"namespace veth IPv6 CIDR", c.NamespaceVethCIDR6}, {"guest's IPv6 network", c.Gateway6.Masked()},
	}
	for i, a := range networks {
		for _, b := range networks[:i] {
			if a.p.Overlaps(b.p) {
				return fmt.Errorf("%s %s overlaps with the %s %s: give networks that have no address in common", a.what, a.p, b.what, b.p)
			}
		}
	}
	return nil
}

// last is the last address of a network.
func last(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for bit := p.Bits(); bit < len(b)*8; bit++ {
		b[bit/8] |= 0x80 >> (bit % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// name is that of a namespace by its number.
func (c Config) name(index int) string { return c.Prefix + strconv.Itoa(index) }

// index is the number of a namespace by its name.
func (c Config) index(name string) (int, bool) {
	digits, ok := strings.CutPrefix(name, c.Prefix)
	if !ok {
		return 0, false
	}
	n, err := strconv.Atoi(digits)
	return n, err == nil && n >= 0 && c.name(n) == name
}

// Namespace is a network namespace for one guest.
type Namespace struct {
	Name      string // below /run/netns
	Interface string // the tap in it
	Veth      string // the host's end of its veth pair

	// Inside is the namespace's end of the veth pair, at which the host reaches the guest; Host is the host's. Outer is what the guest's
	// address is translated to.
	Host, Inside, Outer netip.Addr
	// The same in IPv6; invalid where there is none.
	Host6, Inside6, Outer6 netip.Addr
}

// namespace is the plan of a namespace.
func (c Config) namespace(index int, ipv6 bool) Namespace {
	name := c.name(index)
	n := Namespace{
		Name: name, Interface: c.Interface, Veth: name + vethSuffix,
		Host: nth(c.HostVethCIDR, 4*index+1), Inside: nth(c.HostVethCIDR, 4*index+2),
		// From 1, so that the address of the network comes last.
		Outer: nth(c.NamespaceVethCIDR, (index+1)%room(c.NamespaceVethCIDR, 32)),
	}
	if ipv6 {
		n.Host6, n.Inside6 = nth(c.HostVethCIDR6, 4*index+1), nth(c.HostVethCIDR6, 4*index+2)
		n.Outer6 = nth(c.NamespaceVethCIDR6, (index+1)%room(c.NamespaceVethCIDR6, 128))
	}
	return n
}

// nth is the address so far behind the first of a network.
func nth(p netip.Prefix, n int) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for i := len(b) - 1; n > 0 && i >= 0; i-- {
		n += int(b[i])
		b[i] = byte(n)
		n >>= 8
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}
