package flow_test

import (
	"fmt"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/drafter-vm/drafter/internal/testnet"
	"github.com/drafter-vm/drafter/pkg/flow"
)

// byVXLAN waits until packets go between two sites by VXLAN, or by the session.
func (s *sites) byVXLAN(t *testing.T, want bool, between ...string) {
	t.Helper()
	s.waitFor(t, fmt.Sprintf("VXLAN between %s and %s is not %t", between[0], between[1], want), func() bool {
		for i, host := range between {
			places, err := s.all[host].k.Places()
			if err != nil {
				t.Fatal(err)
			}
			found := false
			for _, p := range places {
				if strings.HasPrefix(p.Address, s.Addr4(s.all[between[1-i]].host).String()+":") {
					found = p.VXLAN
				}
			}
			if found != want {
				return false
			}
		}
		return true
	})
}

// packets is how many have come in by an interface.
func packets(t *testing.T, namespace, device string) int {
	t.Helper()
	var n int
	if err := testnet.Do(namespace, func() error {
		link, err := netlink.LinkByName(device)
		if err == nil {
			n = int(link.Attrs().Statistics.RxPackets)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return n
}

// TestVXLAN: the kernel carries packets between places that have chosen so, also while a process is gone, and while it is shown that it does; the
// session does otherwise.
func TestVXLAN(t *testing.T) {
	s := newSitesWith(t, []string{"a", "b"}, "a", "b", "c")
	s.forward("a")
	all := s.talks(t, 2)
	goOn(t, "at the begin", all)
	for _, mss := range regexp.MustCompile(`\bmss:([0-9]+)`).FindAllStringSubmatch(string(testnet.Run(t, s.guest.Namespace(), "ss", "-tin")), -1) {
		if n, err := strconv.Atoi(mss[1]); err != nil || n > 1500-50-40 {
			t.Errorf("a connection has segments of %s bytes, which do not fit (%v)", mss[1], err)
		}
	}
	gaps(all)

	s.during = func(when string) { goOn(t, "while "+when, all) }
	t.Logf("to b: paused for %v; %s", s.move("b"), gaps(all))
	goOn(t, "at b", all)
	s.byVXLAN(t, true, "a", "b")
	ns := s.all["b"].ns.Name
	session, vxlan := packets(t, ns, "dft1"), packets(t, ns, "dftx")
	for range 5 {
		goOn(t, "by VXLAN", all)
	}
	if more := packets(t, ns, "dft1") - session; more > 0 {
		t.Errorf("%d packets have come by the session", more)
	}
	if more := packets(t, ns, "dftx") - vxlan; more < 100 {
		t.Errorf("only %d packets have come by VXLAN", more)
	}

	a := s.all["a"]
	if err := a.k.Close(); err != nil {
		t.Fatal(err)
	}
	for range 5 {
		goOn(t, "without a process at a", all)
	}
	a.open()
	goOn(t, "with one again", all)
	s.byVXLAN(t, true, "a", "b")
	t.Logf("so far: %s", gaps(all))

	s.forward("b")
	all = append(all, s.talks(t, 1)...)
	for _, to := range []string{"a", "b", "c", "b"} {
		paused := s.move(to)
		goOn(t, "at "+to, all)
		if to != "c" {
			s.byVXLAN(t, true, "a", "b")
			goOn(t, "by VXLAN", all)
		}
		t.Logf("to %s: paused for %v; %s", to, paused, gaps(all))
	}
	for _, k := range all {
		if sent, unanswered := k.Datagrams(); unanswered > 20+sent/100 {
			t.Errorf("%s: %d of %d datagrams are unanswered", k.Name, unanswered, sent)
		}
	}

	b := s.Host("b")
	testnet.Run(t, b, "nft", "add table inet wall; add chain inet wall in { type filter hook input priority 0; }; add rule inet wall in udp dport 4789 drop")
	s.byVXLAN(t, false, "b", "a")
	goOn(t, "behind a wall", all)
	t.Logf("until the session had taken over: %s", gaps(all))
	testnet.Run(t, b, "nft", "delete table inet wall")
	s.byVXLAN(t, true, "b", "a")
	goOn(t, "without the wall", all)
	gaps(all)

	for _, k := range all {
		k.Stop()
	}
	s.forward("")
	s.forgetUDP()
	s.done(t, "a")
	s.done(t, "c")
	s.waitFor(t, "the place of the guest has to do with others", func() bool { p, err := s.at.k.Places(); return err == nil && len(p) == 0 })
	if err := s.at.k.End(); err != nil {
		t.Error(err)
	}
	s.bare(t)
}

// bare closes all keepers, of which nothing is left.
func (s *sites) bare(t *testing.T) {
	t.Helper()
	for host, x := range s.all {
		if err := x.k.Close(); err != nil {
			t.Errorf("%s: %v", host, err)
		}
		testnet.Diff(t, host, x.bare, testnet.Picture(t, x.ns.Name, "none"))
	}
}

// TestVXLANGivenUp: a place that is opened without VXLAN, where it had it, has it no more, and loses nothing.
func TestVXLANGivenUp(t *testing.T) {
	s := newSitesWith(t, []string{"a", "b"}, "a", "b")
	s.forward("a")
	all := s.talks(t, 1)
	s.move("b")
	s.byVXLAN(t, true, "a", "b")
	for _, host := range []string{"a", "b"} {
		x := s.all[host]
		if err := x.k.Close(); err != nil {
			t.Fatal(err)
		}
		x.vxlan = false
		x.open()
		s.byVXLAN(t, false, host, map[string]string{"a": "b", "b": "a"}[host])
		goOn(t, host+" without VXLAN", all)
		if out := string(testnet.Run(t, x.ns.Name, "ip", "-o", "link")); strings.Contains(out, "dftx") {
			t.Errorf("%s has an interface for it still:\n%s", host, out)
		}
	}
	s.move("a")
	goOn(t, "at home", all)
}

// TestVXLANOneHost: two namespaces of one host do without, as what the kernel does there loses connections.
func TestVXLANOneHost(t *testing.T) {
	s := newSitesWith(t, []string{"a", "a'"}, "a", "a'")
	s.forward("a")
	all := s.talks(t, 1)
	s.move("a'")
	for end := time.Now().Add(3 * time.Second); time.Now().Before(end); {
		s.byVXLAN(t, false, "a", "a'")
		goOn(t, "at another place of the host", all)
	}
	s.move("a")
	goOn(t, "at home", all)
}

// TestVXLANErrors: what cannot be is told before anything is changed.
func TestVXLANErrors(t *testing.T) {
	s := newSites(t, "a")
	x := s.all["a"]
	if err := x.k.End(); err != nil {
		t.Fatal(err)
	}
	if err := x.k.Close(); err != nil {
		t.Fatal(err)
	}
	if err := testnet.Do(s.Host("a"), func() error {
		_, err := flow.Open(t.Context(), flow.Config{Netns: x.ns.Name, VXLAN: netip.MustParseAddrPort("198.51.100.9:4789")})
		return err
	}); err == nil || !strings.Contains(err.Error(), "198.51.100.9:4789: this host has no such address") {
		t.Errorf("an address of nobody: got error %v", err)
	}
	s.bare(t)
}
