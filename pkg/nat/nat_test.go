package nat_test

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/drafter-vm/drafter/internal/testnet"
	"github.com/drafter-vm/drafter/pkg/nat"
)

var update = flag.Bool("update", false, "write the rules that are found to testdata")

// child is set in the environment of a process that opens a NAT and waits to be killed.
const child = "DRAFTER_TEST_NAT_CHILD"

func TestMain(m *testing.M) {
	if prefix := os.Getenv(child); prefix != "" {
		if _, err := nat.Open(context.Background(), nat.Config{Prefix: prefix, Count: 3}); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println("open")
		select {}
	}
	os.Exit(m.Run())
}

// prefix is one for the namespaces of a test, which are those of the whole machine.
func prefix(h *testnet.Hosts, letter string) string { return "t" + h.Host("")[1:5] + letter }

func openOn(t *testing.T, h *testnet.Hosts, host string, cfg nat.Config) *nat.NAT {
	t.Helper()
	n, err := tryOpen(h, host, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Close(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return n
}

func tryOpen(h *testnet.Hosts, host string, cfg nat.Config) (n *nat.NAT, err error) {
	err = testnet.Do(h.Host(host), func() error {
		n, err = nat.Open(context.Background(), cfg)
		return err
	})
	return n, err
}

// TestNAT: guests reach others, are reached by their host, and do not reach each other, in both families.
func TestNAT(t *testing.T) {
	h := testnet.NewTestHosts(t, "a", "world")
	p := prefix(h, "a")
	n := openOn(t, h, "a", nat.Config{Prefix: p, Count: 2})
	all := n.Namespaces()
	one := testnet.NewGuestIn(t, p+"x", all[0].Name)
	two := testnet.NewGuestIn(t, p+"y", all[1].Name)
	testnet.Echo(t, h.Host("world"), 7)
	testnet.Echo(t, h.Host("a"), 7)
	testnet.Echo(t, one.Namespace(), 8)
	testnet.Echo(t, two.Namespace(), 8)
	// A neighbour who makes use of this host as a router.
	for _, a := range []netip.Addr{all[0].Inside, all[0].Outer, all[0].Inside6, all[0].Outer6} {
		via := h.Addr4("a")
		if a.Is6() {
			via = h.Addr6("a")
		}
		testnet.Run(t, h.Host("world"), "ip", "route", "add", a.String(), "via", via.String())
	}

	for _, c := range []struct {
		what    string
		from    string
		to      netip.Addr
		port    int
		wanted  netip.Addr // invalid: no answer
		allowed bool
	}{
		{"guest to the world", one.Namespace(), h.Addr4("world"), 7, h.Addr4("a"), true},
		{"guest to the world, IPv6", one.Namespace(), h.Addr6("world"), 7, h.Addr6("a"), true},
		{"host to guest", h.Host("a"), all[0].Inside, 8, all[0].Host, true},
		{"host to guest, IPv6", h.Host("a"), all[0].Inside6, 8, all[0].Host6, true},
		{"host to guest at its outer address", h.Host("a"), all[1].Outer, 8, all[1].Host, true},
		{"guest to its host", one.Namespace(), h.Addr4("a"), 7, all[0].Outer, true},
		{"guest to guest", one.Namespace(), all[1].Inside, 8, netip.Addr{}, false},
		{"guest to guest at its outer address", one.Namespace(), all[1].Outer, 8, netip.Addr{}, false},
		{"guest to guest, IPv6", one.Namespace(), all[1].Inside6, 8, netip.Addr{}, false},
		{"guest to guest at its outer address, IPv6", one.Namespace(), all[1].Outer6, 8, netip.Addr{}, false},
		{"neighbour to guest", h.Host("world"), all[0].Inside, 8, netip.Addr{}, false},
		{"neighbour to guest at its outer address", h.Host("world"), all[0].Outer, 8, netip.Addr{}, false},
		{"neighbour to guest, IPv6", h.Host("world"), all[0].Inside6, 8, netip.Addr{}, false},
		{"neighbour to guest at its outer address, IPv6", h.Host("world"), all[0].Outer6, 8, netip.Addr{}, false},
		{"guest to a blocked address of its host", one.Namespace(), all[0].Outer.Next(), 7, netip.Addr{}, false},
	} {
		for _, network := range []string{"tcp", "udp"} {
			if network == "udp" && c.to == h.Addr4("a") {
				continue // the echo answers from another of the host's addresses
			}
			patience := testnet.Unseen
			if c.allowed {
				patience = testnet.Patience
			}
			got := testnet.SeenWithin(c.from, network, c.to, c.port, patience)
			if want := c.wanted; c.allowed && got != want.String() {
				t.Errorf("%s by %s: it was seen as %q, want %s", c.what, network, got, want)
			} else if !c.allowed && got != "" {
				t.Errorf("%s by %s: there is an answer, want none", c.what, network)
			}
		}
	}
}

// TestDenyIncoming: then a guest is reached by answers only.
func TestDenyIncoming(t *testing.T) {
	h := testnet.NewTestHosts(t, "a", "world")
	p := prefix(h, "d")
	n := openOn(t, h, "a", nat.Config{Prefix: p, Count: 1, DenyIncoming: true})
	ns := n.Namespaces()[0]
	g := testnet.NewGuestIn(t, p, ns.Name)
	testnet.Echo(t, h.Host("world"), 7)
	testnet.Echo(t, g.Namespace(), 8)
	if got := testnet.Seen(t, g.Namespace(), "tcp", h.Addr4("world"), 7); got != h.Addr4("a").String() {
		t.Errorf("the guest reaches the world as %q, want %s", got, h.Addr4("a"))
	}
	for _, a := range []netip.Addr{ns.Inside, ns.Outer, ns.Inside6, ns.Outer6} {
		if got := testnet.SeenWithin(h.Host("a"), "tcp", a, 8, testnet.Unseen); got != "" {
			t.Errorf("the guest is reached at %s", a)
		}
	}
}

// TestBlockedSubnets: what is blocked beyond other guests.
func TestBlockedSubnets(t *testing.T) {
	h := testnet.NewTestHosts(t, "a", "world", "secret")
	p := prefix(h, "b")
	blocked := []netip.Prefix{netip.PrefixFrom(h.Addr4("secret"), 32), netip.PrefixFrom(h.Addr6("secret"), 128)}
	n := openOn(t, h, "a", nat.Config{Prefix: p, Count: 1, BlockedSubnets: blocked})
	g := testnet.NewGuestIn(t, p, n.Namespaces()[0].Name)
	testnet.Echo(t, h.Host("world"), 7)
	testnet.Echo(t, h.Host("secret"), 7)
	for _, a := range []netip.Addr{h.Addr4("world"), h.Addr6("world")} {
		if testnet.Seen(t, g.Namespace(), "tcp", a, 7) == "" {
			t.Errorf("the guest does not reach %s, which is not blocked", a)
		}
	}
	for _, a := range []netip.Addr{h.Addr4("secret"), h.Addr6("secret")} {
		if testnet.SeenWithin(g.Namespace(), "tcp", a, 7, testnet.Unseen) != "" {
			t.Errorf("the guest reaches %s, which is blocked", a)
		}
	}
}

// TestGlobalPrefix: a prefix that is routed to the host is not translated a second time.
func TestGlobalPrefix(t *testing.T) {
	h := testnet.NewTestHosts(t, "a", "world")
	p := prefix(h, "g")
	global := netip.MustParsePrefix("2001:db8:1::/64")
	n := openOn(t, h, "a", nat.Config{Prefix: p, Count: 1, NamespaceVethCIDR6: global})
	ns := n.Namespaces()[0]
	g := testnet.NewGuestIn(t, p, ns.Name)
	testnet.Echo(t, h.Host("world"), 7)
	testnet.Echo(t, g.Namespace(), 8)
	testnet.Run(t, h.Host("world"), "ip", "-6", "route", "add", global.String(), "via", h.Addr6("a").String())
	if got := testnet.Seen(t, g.Namespace(), "tcp", h.Addr6("world"), 7); got != ns.Outer6.String() {
		t.Errorf("the world sees the guest as %q, want %s", got, ns.Outer6)
	}
	if got := testnet.Seen(t, h.Host("world"), "tcp", ns.Outer6, 8); got != h.Addr6("world").String() {
		t.Errorf("the guest sees the world as %q, want %s", got, h.Addr6("world"))
	}
}

// TestOneFamily: a host with one family only works with that one.
func TestOneFamily(t *testing.T) {
	h := testnet.NewTestHosts(t, "four", "six", "world")
	testnet.Echo(t, h.Host("world"), 7)
	testnet.Run(t, h.Host("four"), "sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1", "net.ipv6.conf.default.disable_ipv6=1")
	testnet.Run(t, h.Host("six"), "ip", "-4", "address", "flush", "dev", "eth0")
	four, six := prefix(h, "f"), prefix(h, "s")
	if _, err := tryOpen(h, "four", nat.Config{Prefix: four, Count: 1, IPv6: nat.On}); err == nil || !strings.Contains(err.Error(), "no IPv6") {
		t.Errorf("IPv6 that the host has not: got error %v", err)
	}
	a, b := openOn(t, h, "four", nat.Config{Prefix: four, Count: 1}), openOn(t, h, "six", nat.Config{Prefix: six, Count: 1})
	if c := a.Config(); c.IPv6 != nat.Off || a.Namespaces()[0].Inside6.IsValid() {
		t.Errorf("a host without IPv6 has namespaces with it: %v", a.Namespaces())
	}
	g := testnet.NewGuestIn(t, four, a.Namespaces()[0].Name)
	if got := testnet.Seen(t, g.Namespace(), "tcp", h.Addr4("world"), 7); got != h.Addr4("four").String() {
		t.Errorf("IPv4 only: the guest is seen as %q, want %s", got, h.Addr4("four"))
	}
	g = testnet.NewGuestIn(t, six, b.Namespaces()[0].Name)
	if got := testnet.Seen(t, g.Namespace(), "tcp", h.Addr6("world"), 7); got != h.Addr6("six").String() {
		t.Errorf("IPv6 only: the guest is seen as %q, want %s", got, h.Addr6("six"))
	}
}

// TestRules holds the rules on the host and in a namespace to what nft says of them.
func TestRules(t *testing.T) {
	h := testnet.NewTestHosts(t, "a")
	n := openOn(t, h, "a", nat.Config{Prefix: prefix(h, "r"), Count: 2})
	for name, namespace := range map[string]string{"host": h.Host("a"), "namespace": n.Namespaces()[1].Name} {
		got := bytes.ReplaceAll(testnet.Run(t, namespace, "nft", "list", "ruleset"), []byte(prefix(h, "r")), []byte("ark"))
		file := filepath.Join("testdata", name+".nft")
		if *update {
			if err := os.WriteFile(file, got, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("rules of the %s are\n%s\nwant, as in %s (-update writes it),\n%s", name, got, file, want)
		}
	}
}

// TestNothingLeft: after a stop the host is as it was, also with a second NAT there in between, and after a kill.
func TestNothingLeft(t *testing.T) {
	h := testnet.NewTestHosts(t, "a")
	a, b := prefix(h, "a"), prefix(h, "b")
	// Settings that are not the kernel's defaults have to survive, too.
	testnet.Run(t, h.Host("a"), "sysctl", "-qw", "net.ipv4.conf.all.accept_redirects=0", "net.ipv6.conf.eth0.accept_ra=1")
	// An interface that forwards, though the host does not, and one that listens to routers.
	testnet.Run(t, h.Host("a"), "sh", "-ec", `ip link add other0 type veth peer name other1
sysctl -qw net.ipv4.conf.other0.forwarding=1 net.ipv6.conf.other0.forwarding=1
sysctl -qw net.ipv6.conf.other1.accept_ra=1`)
	before := testnet.Picture(t, h.Host("a"), prefix(h, ""))
	others := nat.Config{
		Prefix: b, Count: 2, HostVethCIDR: netip.MustParsePrefix("10.0.16.0/24"), NamespaceVethCIDR: netip.MustParsePrefix("10.0.17.0/24"),
		HostVethCIDR6: netip.MustParsePrefix("fd00:10:16::/64"), NamespaceVethCIDR6: netip.MustParsePrefix("fd00:10:17::/64"),
	}
	first, err := tryOpen(h, "a", nat.Config{Prefix: a, Count: 3})
	if err != nil {
		t.Fatal(err)
	}
	second, err := tryOpen(h, "a", others)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tryOpen(h, "a", nat.Config{Prefix: a, Count: 3}); !errors.Is(err, nat.ErrBusy) || !strings.Contains(err.Error(), fmt.Sprint(os.Getpid())) {
		t.Errorf("a second NAT of the same prefix: got error %v, want one that names process %d", err, os.Getpid())
	}
	if err := first.Close(context.Background()); err != nil {
		t.Fatal(err)
	}
	if got := strings.TrimSpace(string(testnet.Run(t, h.Host("a"), "sysctl", "-n", "net.ipv4.ip_forward"))); got != "1" {
		t.Errorf("net.ipv4.ip_forward is %s while a NAT needs it", got)
	}
	if err := second.Close(context.Background()); err != nil {
		t.Fatal(err)
	}
	testnet.Diff(t, "after two NATs", before, testnet.Picture(t, h.Host("a"), prefix(h, "")))

	// Killed, and started again with a guest in one of its namespaces.
	testnet.KillChild(t, h.Host("a"), child+"="+a)
	name := a + "1"
	g := testnet.NewGuestIn(t, a, name)
	testnet.Echo(t, g.Namespace(), 8)
	testnet.Run(t, h.Host("a"), "ip", "link", "delete", a+"0-veth") // and damaged
	testnet.Run(t, h.Host("a"), "nft", "flush", "ruleset")
	if err := os.WriteFile(filepath.Join(nat.Folder, a+"7"), nil, 0o444); err != nil { // no namespace, of somebody else
		t.Fatal(err)
	}
	defer os.Remove(filepath.Join(nat.Folder, a+"7"))
	n, err := tryOpen(h, "a", nat.Config{Prefix: a, Count: 2})
	if err != nil {
		t.Fatal(err)
	}
	if got := len(n.Namespaces()); got != 2 {
		t.Errorf("there are %d namespaces, want 2", got)
	}
	if _, err := os.Stat(filepath.Join(nat.Folder, a+"2")); err == nil {
		t.Errorf("a namespace is left that nobody wants any more")
	}
	for _, ns := range n.Namespaces() {
		if ns.Name == name {
			if got := testnet.Seen(t, h.Host("a"), "tcp", ns.Inside, 8); got != ns.Host.String() {
				t.Errorf("a guest that was there before is not reached: seen as %q, want %s", got, ns.Host)
			}
		}
	}
	if _, err := tryOpen(h, "a", nat.Config{Prefix: a, Count: 2, Gateway: netip.MustParsePrefix("172.16.0.9/29")}); !errors.Is(err, nat.ErrBusy) && err == nil {
		t.Errorf("other settings: got no error")
	}
	if err := n.Close(context.Background()); err != nil {
		t.Fatal(err)
	}
	os.Remove(filepath.Join(nat.Folder, a+"7"))
	testnet.Diff(t, "after a kill", before, testnet.Picture(t, h.Host("a"), prefix(h, "")))

	// Other settings rebuild what nobody uses, and are refused where a machine runs.
	testnet.KillChild(t, h.Host("a"), child+"="+a)
	other := nat.Config{Prefix: a, Count: 3, Gateway: netip.MustParsePrefix("172.16.0.9/28")}
	c, err := g.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	g.Pause()
	g.Resume(c)
	if _, err := tryOpen(h, "a", other); err == nil || !strings.Contains(err.Error(), name+" ") {
		t.Errorf("other settings, with a machine in %s: got error %v", name, err)
	}
	g.Pause()
	if n, err = tryOpen(h, "a", other); err != nil {
		t.Fatal(err)
	}
	if err := n.Close(context.Background()); err != nil {
		t.Fatal(err)
	}
	testnet.Diff(t, "after other settings", before, testnet.Picture(t, h.Host("a"), prefix(h, "")))
}

// TestClaim: namespaces are claimed one by one, made as needed, and come back without the connections of their last guest.
func TestClaim(t *testing.T) {
	h := testnet.NewTestHosts(t, "a", "world")
	p := prefix(h, "c")
	ctx := context.Background()
	n := openOn(t, h, "a", nat.Config{Prefix: p, Count: 1, NamespaceVethCIDR: netip.MustParsePrefix("10.0.15.0/31")})
	first, err := n.Claim(ctx)
	if err != nil {
		t.Fatal(err)
	}
	second, err := n.Claim(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if first.Name == second.Name || first.Outer == second.Outer {
		t.Errorf("two claims give %v and %v", first, second)
	}
	if _, err := n.Claim(ctx); !errors.Is(err, nat.ErrExhausted) {
		t.Errorf("a claim too many: got error %v, want ErrExhausted", err)
	}
	g := testnet.NewGuestIn(t, p, second.Name)
	testnet.Echo(t, h.Host("world"), 7)
	if testnet.Seen(t, g.Namespace(), "udp", h.Addr4("world"), 7) == "" {
		t.Error("a guest in a namespace that was made by a claim reaches nobody")
	}
	if n := connections(t, second.Name); n == 0 {
		t.Error("no connection is tracked, so none can be forgotten")
	}
	handle, err := nat.OpenNamespace(second.Name)
	if err != nil {
		t.Fatal(err)
	}
	defer handle.Close()
	cookie, err := nat.Cookie(handle)
	if err != nil {
		t.Fatal(err)
	}
	kept := filepath.Join(nat.StateDir(), nat.FlowState(cookie)+".json") // as package flow has it
	if err := os.WriteFile(kept, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := n.Release(second.Name); !errors.Is(err, nat.ErrKept) {
		t.Errorf("release of a namespace that keeps connections: got error %v, want ErrKept", err)
	}
	if err := os.Remove(kept); err != nil {
		t.Fatal(err)
	}
	if err := n.Release(second.Name); err != nil {
		t.Fatal(err)
	}
	if n := connections(t, second.Name); n != 0 {
		t.Errorf("%d connections are left in a namespace that was released", n)
	}
	if err := n.Release(second.Name); err == nil {
		t.Error("a second release: got no error")
	}
	if err := os.WriteFile(kept, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if ns, err := n.Claim(ctx); !errors.Is(err, nat.ErrExhausted) {
		t.Errorf("a claim where one keeps connections: got %v, %v, want ErrExhausted", ns, err)
	}
	if err := os.Remove(kept); err != nil {
		t.Fatal(err)
	}
	if ns, err := n.Claim(ctx); !errors.Is(err, nat.ErrExhausted) {
		t.Errorf("a claim where a guest is: got %v, %v, want ErrExhausted", ns, err)
	}
	g.Pause()
	again, err := n.Claim(ctx)
	if err != nil || again != second {
		t.Errorf("a claim after a release: got %v, %v, want %v", again, err, second)
	}
}

func connections(t *testing.T, namespace string) int {
	t.Helper()
	var n int
	err := testnet.Do(namespace, func() error {
		flows, err := netlink.ConntrackTableList(netlink.ConntrackTable, netlink.FAMILY_V4)
		n = len(flows)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestOpenErrors: what cannot be is refused by name, before anything is changed.
func TestOpenErrors(t *testing.T) {
	h := testnet.NewTestHosts(t, "a", "lonely")
	p := prefix(h, "e")
	testnet.Run(t, h.Host("lonely"), "ip", "route", "delete", "default")
	testnet.Run(t, h.Host("lonely"), "ip", "-6", "route", "delete", "default")
	testnet.Run(t, h.Host("a"), "ip", "netns", "add", p+"1")
	t.Cleanup(func() { exec.Command("ip", "netns", "delete", p+"1").Run() })
	before := testnet.Picture(t, h.Host("a"), prefix(h, ""))
	cidr := netip.MustParsePrefix
	for _, c := range []struct {
		what string
		host string
		cfg  nat.Config
		want string
	}{
		{"a namespace that is not ours", "a", nat.Config{Count: 2}, p + "1 exist"},
		{"no interface", "a", nat.Config{HostInterface: "eth7"}, `"eth7"`},
		{"no default route", "lonely", nat.Config{}, "no default route"},
		{"addresses of the host", "a", nat.Config{HostVethCIDR: cidr("198.51.100.0/24")}, `"eth0"`},
		{"overlap", "a", nat.Config{HostVethCIDR: cidr("10.0.8.0/21")}, "10.0.15.0/24 overlaps"},
		{"multicast", "a", nat.Config{HostVethCIDR: cidr("224.0.0.0/16")}, "224.0.0.0/16: it has addresses of 224.0.0.0/3"},
		{"no network", "a", nat.Config{NamespaceVethCIDR: cidr("0.0.0.0/8")}, "0.0.0.0/8"},
		{"too many", "a", nat.Config{Count: 300}, "256"},
		{"family", "a", nat.Config{HostVethCIDR: cidr("fd00::/64")}, "IPv4"},
		{"bits", "a", nat.Config{NamespaceVethCIDR: cidr("10.0.15.7/24")}, "10.0.15.0/24"},
		{"no room", "a", nat.Config{HostVethCIDR: cidr("10.0.8.0/31")}, "31"},
		{"guest", "a", nat.Config{Guest: netip.MustParseAddr("172.16.1.2")}, "172.16.1.2"},
		{"guest is gateway", "a", nat.Config{Guest: netip.MustParseAddr("172.16.0.1")}, "gateway"},
		{"broadcast", "a", nat.Config{Guest: netip.MustParseAddr("172.16.0.3")}, "broadcast"},
		{"MAC", "a", nat.Config{MAC: net.HardwareAddr{1, 0, 0, 0, 0, 1}}, "01:00:00:00:00:01"},
		{"interface", "a", nat.Config{Interface: "veth0"}, "veth0"},
		{"prefix", "a", nat.Config{Prefix: "a/b"}, `"a/b"`},
		{"prefix too long", "a", nat.Config{Prefix: "abcdefghijklmn"}, "too long"},
	} {
		t.Run(c.what, func(t *testing.T) {
			if c.cfg.Prefix == "" {
				c.cfg.Prefix = p
			}
			n, err := tryOpen(h, c.host, c.cfg)
			if err == nil {
				n.Close(context.Background())
				t.Fatal("got no error")
			}
			if !strings.Contains(err.Error(), c.want) {
				t.Errorf("got error %q, want one that says %q", err, c.want)
			}
		})
	}
	for name, capability := range map[string]uint{"CAP_NET_ADMIN": unix.CAP_NET_ADMIN, "CAP_SYS_ADMIN": unix.CAP_SYS_ADMIN} {
		err := testnet.Lacking(h.Host("a"), capability, func() error {
			n, err := nat.Open(context.Background(), nat.Config{Prefix: p + "x", Count: 1})
			if err == nil {
				n.Close(context.Background())
			}
			return err
		})
		if err == nil || !strings.Contains(err.Error(), name) || !strings.Contains(err.Error(), "root") {
			t.Errorf("without %s: %v", name, err)
		}
	}
	testnet.Diff(t, "after refusals", before, testnet.Picture(t, h.Host("a"), prefix(h, "")))
}
