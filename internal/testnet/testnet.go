package testnet

import (
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Interface is the tap device in each peer's namespace.
const Interface = "tap0"

// Addresses of every Network.
var (
	GuestIPv4   = netip.MustParseAddr("172.16.0.2")
	GuestIPv6   = netip.MustParseAddr("fd00:172:16::2")
	GatewayIPv4 = netip.MustParsePrefix("172.16.0.1/30") // the client's own
	GatewayIPv6 = netip.MustParsePrefix("fd00:172:16::1/64")
)

// DefaultGuestMAC is the MAC address of a guest unless it is told otherwise.
var DefaultGuestMAC = net.HardwareAddr{0x02, 0x0e, 0xd9, 0xfd, 0x68, 0x3d}

// gatewayMAC is fixed, because a bridge would otherwise change its address with its ports.
var gatewayMAC = net.HardwareAddr{0x02, 0x0e, 0xd9, 0x00, 0x00, 0x01}

// ErrBusy is wrapped by New when another living Network has the name.
var ErrBusy = errors.New("the network is in use")

// Config describes a Network.
type Config struct {
	// Name starts the names of the namespaces; letters, digits, dots, underscores and hyphens.
	Name string
	// Peers names the peers, each of which gets a namespace NAME-PEER. "client" is taken.
	Peers []string
	// GuestMAC is the guest's MAC address; empty: [DefaultGuestMAC].
	GuestMAC net.HardwareAddr
}

// Network is a set of joined network namespaces.
type Network struct {
	cfg  Config
	lock *lock

	mu      sync.Mutex     // guards what follows
	uplinks map[string]int // peer → packet socket on its up0
	closed  bool
}

var validName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)

// New builds a network, after removing what is left of an earlier one of the same name.
func New(cfg Config) (_ *Network, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("create test network %q: %w", cfg.Name, err)
		}
	}()
	if os.Geteuid() != 0 {
		return nil, errors.New("creating network namespaces needs root")
	}
	for i, name := range append([]string{cfg.Name}, cfg.Peers...) {
		if !validName.MatchString(name) {
			return nil, fmt.Errorf("name %q is not valid; use letters, digits, '.', '_' and '-'", name)
		}
		if i > 0 && (name == "client" || slices.Contains(cfg.Peers[:i-1], name)) {
			return nil, fmt.Errorf("peer name %q is taken", name)
		}
	}
	n := &Network{cfg: cfg, uplinks: map[string]int{}}
	for _, namespace := range n.namespaces() {
		if !validName.MatchString(namespace) {
			return nil, fmt.Errorf("namespace %q would have a name of more than 64 bytes", namespace)
		}
	}
	if n.cfg.GuestMAC == nil {
		n.cfg.GuestMAC = DefaultGuestMAC
	}
	if len(n.cfg.GuestMAC) != 6 {
		return nil, fmt.Errorf("MAC address %v does not have 6 bytes", cfg.GuestMAC)
	}

	if n.lock, err = acquire(cfg.Name); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, n.Close())
		}
	}()
	if err := n.lock.make(n.namespaces()); err != nil {
		return nil, err
	}
	if err := Do(n.Client(), n.buildClient); err != nil {
		return nil, err
	}
	for i, peer := range cfg.Peers {
		if err := n.buildPeer(i, peer); err != nil {
			return nil, fmt.Errorf("peer %q: %w", peer, err)
		}
	}
	return n, nil
}

// NewTest is New for a test: it chooses a name, skips the test without root, and closes the network when the test ends.
func NewTest(t testing.TB, peers ...string) *Network {
	t.Helper()
	return named(t, "t", func(name string) (*Network, error) { return New(Config{Name: name, Peers: peers}) })
}

// named makes something of a name for a test, which ends with the test. It skips the test without root.
func named[T io.Closer](t testing.TB, prefix string, make func(name string) (T, error)) (made T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, to create network namespaces")
	}
	// The same test has the same name in the next run, which then finds what this one may leave.
	h := fnv.New32a()
	h.Write([]byte(filepath.Base(os.Args[0]) + t.Name()))
	err := ErrBusy
	for i := 0; errors.Is(err, ErrBusy) && i < 16; i++ {
		made, err = make(fmt.Sprintf("%s%08x.%d", prefix, h.Sum32(), i))
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := made.Close(); err != nil {
			t.Error(err)
		}
	})
	return made
}

// Client is the name of the client's namespace.
func (n *Network) Client() string { return n.cfg.Name + "-client" }

// Peer is the name of a peer's namespace.
func (n *Network) Peer(peer string) string { return n.cfg.Name + "-" + peer }

func (n *Network) namespaces() []string {
	names := []string{n.Client()}
	for _, peer := range n.cfg.Peers {
		names = append(names, n.Peer(peer))
	}
	return names
}

// Moved announces that the guest runs at peer now: from when it returns, the client's frames to the guest go there. It
// sends, from the peer's end of the bridge, the gratuitous ARP that the guest itself might send.
func (n *Network) Moved(peer string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return fmt.Errorf("announce guest at %q: %w", peer, os.ErrClosed)
	}
	socket, ok := n.uplinks[peer]
	if !ok {
		return fmt.Errorf("announce guest at %q: there is no such peer", peer)
	}
	// A veth hands the frame to the other end within the call or, on a busy core, in the softirq after it.
	if _, err := unix.Write(socket, announcement(n.cfg.GuestMAC, GuestIPv4)); err != nil {
		return fmt.Errorf("announce guest at %q: %w", peer, err)
	}
	return nil
}

// announcement is a frame with an ARP announcement (RFC 5227, section 3): a broadcast request for the sender's own
// address.
func announcement(mac net.HardwareAddr, ip netip.Addr) []byte {
	frame := slices.Repeat([]byte{0xff}, 6) // to everybody
	frame = append(frame, mac...)
	frame = append(frame, 0x08, 0x06) // ARP
	frame = append(frame, 0, 1, 0x08, 0x00, 6, 4, 0, 1)
	frame = append(frame, mac...)
	frame = append(frame, ip.AsSlice()...)
	frame = append(frame, 0, 0, 0, 0, 0, 0)
	frame = append(frame, ip.AsSlice()...)
	return append(frame, make([]byte, 60-len(frame))...) // the least an Ethernet frame has
}

// Close removes the network. Programs that are still in its namespaces lose their interfaces. It may be called twice.
func (n *Network) Close() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return nil
	}
	n.closed = true
	var errs []error
	for _, socket := range n.uplinks {
		errs = append(errs, unix.Close(socket))
	}
	return errors.Join(append(errs, n.lock.remove(n.namespaces()))...)
}

// buildClient runs in the client's namespace.
func (n *Network) buildClient() error {
	if err := quietIPv6(); err != nil {
		return err
	}
	if err := up("lo"); err != nil {
		return err
	}
	bridge, err := addBridge(gatewayMAC)
	if err != nil {
		return err
	}
	if err := sysctl("net/ipv6/conf/br0/disable_ipv6", "0"); err != nil {
		return err
	}
	return addAddresses(bridge, GatewayIPv4, GatewayIPv6)
}

// buildPeer makes the namespace of peer number i and joins it to the client's.
func (n *Network) buildPeer(i int, peer string) error {
	handle, err := netns.GetFromName(n.Peer(peer))
	if err != nil {
		return err
	}
	defer handle.Close()
	if err := Do(n.Peer(peer), quietIPv6); err != nil {
		return err
	}

	err = Do(n.Client(), func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = fmt.Sprintf("p%d", i)
		veth := netlink.NewVeth(attrs)
		veth.PeerName, veth.PeerNamespace = "up0", netlink.NsFd(int(handle))
		if err := netlink.LinkAdd(veth); err != nil {
			return fmt.Errorf("add veth %q: %w", attrs.Name, err)
		}
		port, err := enslave(attrs.Name)
		if err != nil {
			return err
		}
		if err := netlink.LinkSetIsolated(port, true); err != nil {
			return fmt.Errorf("isolate bridge port %q: %w", attrs.Name, err)
		}
		return nil
	})
	if err != nil {
		return err
	}

	return Do(n.Peer(peer), func() error {
		if err := up("lo"); err != nil {
			return err
		}
		if _, err := addBridge(nil); err != nil {
			return err
		}
		attrs := netlink.NewLinkAttrs()
		attrs.Name = Interface
		tap := &netlink.Tuntap{LinkAttrs: attrs, Mode: netlink.TUNTAP_MODE_TAP}
		if err := netlink.LinkAdd(tap); err != nil {
			return fmt.Errorf("add tap device %q: %w", Interface, err)
		}
		for _, name := range []string{Interface, "up0"} {
			port, err := enslave(name)
			if err != nil {
				return err
			}
			if err := netlink.LinkSetLearning(port, false); err != nil {
				return fmt.Errorf("switch learning of bridge port %q off: %w", name, err)
			}
		}
		socket, err := packetSocket("up0")
		if err != nil {
			return err
		}
		n.uplinks[peer] = socket // nobody else has n yet
		return nil
	})
}

// packetSocket opens a socket that sends frames by an interface and receives none.
func packetSocket(name string) (int, error) {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return 0, fmt.Errorf("find %q: %w", name, err)
	}
	const protocol = 0 // receive nothing
	socket, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, protocol)
	if err != nil {
		return 0, fmt.Errorf("open packet socket: %w", err)
	}
	if err := unix.Bind(socket, &unix.SockaddrLinklayer{Protocol: protocol, Ifindex: link.Attrs().Index}); err != nil {
		unix.Close(socket)
		return 0, fmt.Errorf("bind packet socket to %q: %w", name, err)
	}
	return socket, nil
}

// The helpers below work in the namespace of the calling thread.

// addBridge adds br0 and sets it up. It forwards at once: without spanning tree there is no listening phase.
func addBridge(mac net.HardwareAddr) (netlink.Link, error) {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.HardwareAddr = "br0", mac
	snooping := false // it delays the neighbour solicitations of IPv6
	bridge := &netlink.Bridge{LinkAttrs: attrs, MulticastSnooping: &snooping}
	if err := netlink.LinkAdd(bridge); err != nil {
		return nil, fmt.Errorf("add bridge: %w", err)
	}
	return bridge, up("br0")
}

// enslave makes an interface a port of br0 and sets it up.
func enslave(name string) (netlink.Link, error) {
	bridge, err := netlink.LinkByName("br0")
	if err != nil {
		return nil, fmt.Errorf("find bridge: %w", err)
	}
	link, err := netlink.LinkByName(name)
	if err != nil {
		return nil, fmt.Errorf("find %q: %w", name, err)
	}
	if err := netlink.LinkSetMaster(link, bridge); err != nil {
		return nil, fmt.Errorf("make %q a port of the bridge: %w", name, err)
	}
	return link, up(name)
}

func up(name string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find %q: %w", name, err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("set %q up: %w", name, err)
	}
	return nil
}

// quietIPv6 keeps interfaces that are added from now on without IPv6 addresses of their own, whose traffic would disturb.
func quietIPv6() error { return sysctl("net/ipv6/conf/default/disable_ipv6", "1") }

func sysctl(key, value string) error {
	if err := os.WriteFile(filepath.Join("/proc/sys", key), []byte(value), 0); err != nil {
		return fmt.Errorf("set sysctl %s: %w", strings.ReplaceAll(key, "/", "."), err)
	}
	return nil
}

// removeNamespace removes a named namespace and its interfaces, if it exists. The interfaces are removed first: the
// namespace itself lives on while programs are in it.
func removeNamespace(name string) error {
	if !namespaceExists(name) {
		return nil
	}
	err := Do(name, func() error {
		var errs []error
		for _, name := range []string{"up0", "eth0", Interface, "br0"} {
			link, err := netlink.LinkByName(name)
			if err != nil {
				continue
			}
			// One end of a pair may go meanwhile, with a namespace that the kernel is still taking down.
			if err := netlink.LinkDel(link); err != nil && !errors.Is(err, unix.ENODEV) {
				errs = append(errs, fmt.Errorf("remove %q: %w", name, err))
			}
		}
		return errors.Join(errs...)
	})
	path := filepath.Join(netnsDir, name)
	if errors.Is(err, unix.EINVAL) {
		err = nil // an empty file: a run was killed between creating it and mounting the namespace on it
	}
	if e := unix.Unmount(path, unix.MNT_DETACH); e != nil && !errors.Is(e, unix.EINVAL) {
		err = errors.Join(err, fmt.Errorf("unmount %q: %w", path, e))
	}
	if e := os.Remove(path); e != nil {
		err = errors.Join(err, e)
	}
	return err
}
