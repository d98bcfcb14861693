package agent

import (
	"net"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

func TestNetworkCheck(t *testing.T) {
	for want, n := range map[string]Network{
		`MAC "01:00`:         {MAC: "01:00:00:00:00:01"},
		`MAC "00:00`:         {MAC: "00:00:00:00:00:00"},
		`MAC "x"`:            {MAC: "x"},
		`address "10.0.0.1"`: {Addresses: []string{"10.0.0.1"}},
		`gateway "10.0.0.1/`: {Gateways: []string{"10.0.0.1/8"}},
		"one for each":       {Gateways: []string{"10.0.0.1", "fd00::1", "10.0.0.2"}},
		"nothing of it":      {Interface: "eth0"},
		"at most 15 bytes":   {Interface: "a-very-long-name", MAC: "02:00:00:00:00:01"},
	} {
		if err := n.Check(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: got error %v, want %q", n, err, want)
		}
	}
	for _, n := range []Network{{}, {MAC: "02:00:00:00:00:01", Addresses: []string{"10.0.0.1/8", "fd00::1/64"}, Gateways: []string{"10.0.0.2", "fd00::2"}}} {
		if err := n.Check(); err != nil {
			t.Error(err)
		}
		if got := networkOf(n.message()); !slices.Equal(got.Addresses, n.Addresses) || !slices.Equal(got.Gateways, n.Gateways) || got.MAC != n.MAC {
			t.Errorf("%+v became %+v", n, got)
		}
	}
}

// A clone takes another MAC, addresses and gateways, and can do so twice.
func TestNetworkTake(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root: a network namespace")
	}
	runtime.LockOSThread() // and not unlocked: the thread ends with the test
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	run := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := (Network{MAC: "02:00:00:00:00:01"}).take(); err == nil || !strings.Contains(err.Error(), "no interface but loopback") {
		t.Errorf("without an interface: %v", err)
	}
	run(netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: "other"}))
	for _, name := range []string{"other", "eth0"} {
		link, err := netlink.LinkByName(name)
		run(err)
		run(netlink.LinkSetUp(link))
	}
	run(Network{Interface: "eth0", Addresses: []string{"172.16.0.2/24", "fd00::2/64"}, Gateways: []string{"172.16.0.1", "fd00::1"}}.take())
	// In the subnet that it is in, too, and then its route stays.
	run(Network{Interface: "eth0", Addresses: []string{"172.16.0.7/24"}}.take())
	link, err := netlink.LinkByName("eth0")
	run(err)
	same, err := netlink.AddrList(link, netlink.FAMILY_V4)
	run(err)
	kept, err := netlink.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{LinkIndex: link.Attrs().Index, Gw: net.IPv4(172, 16, 0, 1)}, netlink.RT_FILTER_OIF|netlink.RT_FILTER_GW)
	run(err)
	if len(same) != 1 || same[0].IPNet.String() != "172.16.0.7/24" || len(kept) != 1 {
		t.Errorf("in the same subnet it has %v, and routes %v", same, kept)
	}
	next := Network{Interface: "eth0", MAC: "02:00:00:00:00:17", Addresses: []string{"10.1.0.7/16"}, Gateways: []string{"10.1.0.1"}}
	for range 2 {
		run(next.take())
		link, err := netlink.LinkByName("eth0")
		run(err)
		if got := link.Attrs().HardwareAddr.String(); got != next.MAC {
			t.Errorf("its MAC is %s", got)
		}
		var have []string
		addresses, err := netlink.AddrList(link, netlink.FAMILY_ALL)
		run(err)
		for _, a := range addresses {
			if a.Scope == int(netlink.SCOPE_UNIVERSE) {
				have = append(have, a.IPNet.String())
			}
		}
		routes, err := netlink.RouteList(link, netlink.FAMILY_ALL)
		run(err)
		for _, r := range routes {
			if r.Gw != nil {
				have = append(have, "by "+r.Gw.String())
			}
		}
		slices.Sort(have)
		if want := []string{"10.1.0.7/16", "by 10.1.0.1", "by fd00::1", "fd00::2/64"}; !slices.Equal(have, want) {
			t.Errorf("it has %q, want %q", have, want)
		}
	}
	if err := (Network{Interface: "eth1", MAC: "02:00:00:00:00:01"}).take(); err == nil || !strings.Contains(err.Error(), `"eth1"`) {
		t.Errorf("another interface: %v", err)
	}
}
