package forward_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/drafter-vm/drafter/internal/testnet"
	"github.com/drafter-vm/drafter/pkg/forward"
	"github.com/drafter-vm/drafter/pkg/nat"
	"github.com/drafter-vm/drafter/pkg/nat/rule"
)

// child is set in the environment of a process that forwards and waits to be killed.
const child = "DRAFTER_TEST_FORWARD_CHILD"

func TestMain(m *testing.M) {
	if ns := os.Getenv(child); ns != "" {
		if _, err := forward.Open(context.Background(), forward.Config{}, []forward.Forward{{Netns: ns, InternalPort: 8, External: "0.0.0.0:3333"}}); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println("open")
		select {}
	}
	os.Exit(m.Run())
}

// site is a host with a NAT and guests in its namespaces.
type site struct {
	*testnet.Hosts
	names  []string // of the namespaces
	all    []nat.Namespace
	guests []*testnet.Guest
}

func newSite(t *testing.T, cfg nat.Config) *site {
	t.Helper()
	s := &site{Hosts: testnet.NewTestHosts(t, "a", "world")}
	cfg.Prefix = "f" + s.Host("")[1:5] + "x"
	err := testnet.Do(s.Host("a"), func() error {
		n, err := nat.Open(context.Background(), cfg)
		if err != nil {
			return err
		}
		t.Cleanup(func() {
			if err := n.Close(context.Background()); err != nil {
				t.Error(err)
			}
		})
		s.all = n.Namespaces()
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, ns := range s.all {
		g := testnet.NewGuestIn(t, ns.Name, ns.Name)
		testnet.Echo(t, g.Namespace(), 8)
		s.names, s.guests = append(s.names, ns.Name), append(s.guests, g)
	}
	return s
}

func (s *site) open(cfg forward.Config, forwards ...forward.Forward) (f *forward.Forwarder, err error) {
	err = testnet.Do(s.Host("a"), func() error {
		f, err = forward.Open(context.Background(), cfg, forwards)
		return err
	})
	return f, err
}

func (s *site) mustOpen(t *testing.T, forwards ...forward.Forward) *forward.Forwarder {
	t.Helper()
	f, err := s.open(forward.Config{}, forwards...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return f
}

// TestForward: who reaches a guest by which external address, and who the guest takes him for.
func TestForward(t *testing.T) {
	s := newSite(t, nat.Config{Count: 1})
	a4, a6, w4, w6 := s.Addr4("a"), s.Addr6("a"), s.Addr4("world"), s.Addr6("world")
	host4, host6 := s.all[0].Host, s.all[0].Host6
	four, six := netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback()
	type from struct {
		host string
		to   netip.Addr
		seen netip.Addr // invalid: it is not reached
	}
	none := netip.Addr{}
	for _, c := range []struct {
		external string
		froms    []from
	}{
		{a4.String(), []from{{"world", a4, w4}, {"a", a4, a4}, {"a", four, none}, {"world", a6, none}}},
		{"127.0.0.1", []from{{"a", four, host4}, {"world", a4, none}, {"a", six, none}}},
		{"0.0.0.0", []from{{"world", a4, w4}, {"a", four, host4}, {"a", a4, a4}, {"world", a6, none}, {"a", six, none}}},
		{"[" + a6.String() + "]", []from{{"world", a6, w6}, {"a", a6, a6}, {"a", six, none}, {"world", a4, none}}},
		{"[::1]", []from{{"a", six, host6}, {"world", a6, none}, {"a", four, none}}},
		{"[::]", []from{{"world", a6, w6}, {"a", six, host6}, {"a", a6, a6}, {"world", a4, none}, {"a", four, none}}},
		{"", []from{{"world", a6, w6}, {"world", a4, w4}, {"a", six, host6}, {"a", four, host4}}},
		{"localhost", []from{{"a", six, host6}, {"a", four, host4}, {"world", a4, none}}},
	} {
		for name, protocol := range map[string]rule.Protocol{"tcp": rule.TCP, "udp": rule.UDP} {
			t.Run(c.external+" "+name, func(t *testing.T) {
				f := s.mustOpen(t, forward.Forward{Netns: s.names[0], InternalPort: 8, Protocol: protocol, External: c.external + ":3333"})
				for _, x := range c.froms {
					patience := testnet.Unseen
					if x.seen.IsValid() {
						patience = testnet.Patience
					}
					got := testnet.SeenWithin(s.Host(x.host), name, x.to, 3333, patience)
					if x.seen.IsValid() && got != x.seen.String() || !x.seen.IsValid() && got != "" {
						t.Errorf("from %s to %s: seen as %q, want %s", x.host, x.to, got, x.seen)
					}
				}
				if err := f.Close(context.Background()); err != nil {
					t.Fatal(err)
				}
				for _, x := range c.froms {
					if testnet.SeenWithin(s.Host(x.host), name, x.to, 3333, testnet.Unseen) != "" {
						t.Errorf("from %s to %s: it is forwarded after the end", x.host, x.to)
					}
				}
			})
		}
	}
}

// TestLoopbackFromOutside: what is for programs of this host is not reached by a neighbour who sends it packets for 127.0.0.1.
func TestLoopbackFromOutside(t *testing.T) {
	s := newSite(t, nat.Config{Count: 1})
	for _, external := range []string{"127.0.0.1", s.Addr4("a").String()} {
		s.mustOpen(t, forward.Forward{Netns: s.names[0], InternalPort: 8, Protocol: rule.UDP, External: external + ":3333"})
	}
	if testnet.SeenWithin(s.Host("a"), "udp", netip.MustParseAddr("127.0.0.1"), 3333, testnet.Patience) == "" {
		t.Fatal("a program of this host does not reach it")
	}
	// The neighbour's own kernel would not send such a packet: one of its rules makes it of another.
	testnet.Run(t, s.Host("world"), "sysctl", "-qw", "net.ipv4.conf.all.route_localnet=1", "net.ipv4.conf.eth0.route_localnet=1")
	testnet.Run(t, s.Host("world"), "nft", "add table ip forge; add chain ip forge out { type nat hook output priority -100; }; add rule ip forge out ip daddr "+
		s.Addr4("a").String()+" udp dport 4444 dnat to 127.0.0.1:3333")
	testnet.Run(t, s.Host("world"), "ip", "rule", "add", "to", "127.0.0.1", "lookup", "77", "priority", "0")
	testnet.Run(t, s.Host("world"), "ip", "rule", "del", "priority", "0", "lookup", "local")
	testnet.Run(t, s.Host("world"), "ip", "route", "add", "127.0.0.1", "via", s.Addr4("a").String(), "dev", "eth0", "table", "77")
	testnet.Run(t, s.Host("world"), "ip", "rule", "add", "priority", "1", "lookup", "local")
	if got := testnet.SeenWithin(s.Host("world"), "udp", s.Addr4("a"), 4444, testnet.Unseen); got != "" {
		t.Errorf("a neighbour reaches it, seen as %s", got)
	}
}

// TestFourOnly: IPv6 from outside reaches a guest that has none.
func TestFourOnly(t *testing.T) {
	s := newSite(t, nat.Config{Count: 1, IPv6: nat.Off})
	for name, protocol := range map[string]rule.Protocol{"tcp": rule.TCP, "udp": rule.UDP} {
		s.mustOpen(t, forward.Forward{Netns: s.names[0], InternalPort: 8, Protocol: protocol, External: "[::]:3333"})
		for _, from := range []string{"a", "world"} {
			if got := testnet.Seen(t, s.Host(from), name, s.Addr6("a"), 3333); got != s.all[0].Host.String() {
				t.Errorf("%s from %s: seen as %q, want %s", name, from, got, s.all[0].Host)
			}
		}
	}
}

// TestSet: forwards come, go and change their guest while others, and connections, go on.
func TestSet(t *testing.T) {
	s := newSite(t, nat.Config{Count: 2})
	var said []string
	hook := func(what string) func(forward.Forward) {
		return func(f forward.Forward) { said = append(said, fmt.Sprintf("%s %s>%s", what, f.External, f.Netns)) }
	}
	to := func(guest int, external string) forward.Forward {
		return forward.Forward{Netns: s.names[guest], InternalPort: 8, Protocol: rule.TCP, External: external}
	}
	f, err := s.open(forward.Config{Added: hook("+"), Removed: hook("-")}, to(0, "0.0.0.0:3333"), to(0, "[::1]:3333"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close(context.Background())
	var open []net.Conn
	for _, a := range []netip.Addr{s.Addr4("a"), netip.IPv6Loopback()} {
		c, err := testnet.DialContext(t.Context(), s.Host("a"), "tcp", netip.AddrPortFrom(a, 3333).String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		open = append(open, c)
		if _, err := c.Read(make([]byte, 100)); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Set(t.Context(), []forward.Forward{to(1, "0.0.0.0:3333"), to(1, "0.0.0.0:4444")}); err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf("[+ 0.0.0.0:3333>%[1]s + [::1]:3333>%[1]s - 0.0.0.0:3333>%[1]s - [::1]:3333>%[1]s + 0.0.0.0:3333>%[2]s + 0.0.0.0:4444>%[2]s]", s.names[0], s.names[1])
	if fmt.Sprint(said) != want {
		t.Errorf("hooks heard %v, want %s", said, want)
	}
	for _, port := range []int{3333, 4444} {
		if testnet.Seen(t, s.Host("world"), "tcp", s.Addr4("a"), port) == "" {
			t.Errorf("port %d is not forwarded", port)
		}
	}
	if testnet.SeenWithin(s.Host("a"), "tcp", netip.IPv6Loopback(), 3333, testnet.Unseen) != "" {
		t.Error("[::1] is forwarded after it was removed")
	}
	for _, c := range open {
		_ = c.SetDeadline(time.Now().Add(testnet.Patience))
		if _, err := c.Write([]byte("x")); err != nil {
			t.Error(err)
		}
		if n, err := c.Read(make([]byte, 10)); err != nil || n != 1 {
			t.Errorf("a connection does not go on when its forward is removed: %v", err)
		}
	}
	// What cannot be made changes nothing.
	if err := f.Set(t.Context(), []forward.Forward{to(0, "0.0.0.0:5555"), to(1, "203.0.113.9:5555")}); err == nil || !strings.Contains(err.Error(), "203.0.113.9") {
		t.Errorf("an address of others: got error %v", err)
	}
	if got := f.Forwards(); len(got) != 2 || got[0].External != "0.0.0.0:3333" {
		t.Errorf("after an error the forwards are %v", got)
	}
	if testnet.SeenWithin(s.Host("world"), "tcp", s.Addr4("a"), 5555, testnet.Unseen) != "" || testnet.Seen(t, s.Host("world"), "tcp", s.Addr4("a"), 4444) == "" {
		t.Error("an error has changed what is forwarded")
	}
}

// TestErrors: what cannot be is refused by name, and nothing is left of it.
func TestErrors(t *testing.T) {
	s := newSite(t, nat.Config{Count: 1})
	ns := s.names[0]
	testnet.Echo(t, s.Host("a"), 7777)
	other := s.mustOpen(t, forward.Forward{Netns: ns, InternalPort: 8, External: s.Addr4("a").String() + ":6666"})
	before := testnet.Picture(t, s.Host("a"), ns)
	for _, c := range []struct {
		what, want string
		conflict   bool
		forwards   []forward.Forward
	}{
		{"no namespace", `"nowhere"`, false, []forward.Forward{{Netns: "nowhere", InternalPort: 8, External: "127.0.0.1:3333"}}},
		{"a path", "not a path", false, []forward.Forward{{Netns: "../" + ns, InternalPort: 8, External: "127.0.0.1:3333"}}},
		{"a namespace of others", "10.0.8.0/22", false, []forward.Forward{{Netns: s.Host("world"), InternalPort: 8, External: "127.0.0.1:3333"}}},
		{"no port", `"127.0.0.1"`, false, []forward.Forward{{Netns: ns, InternalPort: 8, External: "127.0.0.1"}}},
		{"port 0", `"0"`, false, []forward.Forward{{Netns: ns, InternalPort: 8, External: "127.0.0.1:0"}}},
		{"internal port 0", "internal port 0", false, []forward.Forward{{Netns: ns, External: "127.0.0.1:3333"}}},
		{"protocol", "protocol 132", false, []forward.Forward{{Netns: ns, InternalPort: 8, Protocol: 132, External: "127.0.0.1:3333"}}},
		{"address of others", "203.0.113.9", false, []forward.Forward{{Netns: ns, InternalPort: 8, External: "203.0.113.9:3333"}}},
		{"multicast", `"224.0.0.1:3333"`, false, []forward.Forward{{Netns: ns, InternalPort: 8, External: "224.0.0.1:3333"}}},
		{"broadcast", `"255.255.255.255:3333"`, false, []forward.Forward{{Netns: ns, InternalPort: 8, External: "255.255.255.255:3333"}}},
		{"twice", "127.0.0.1:3333 to " + ns + ":8", true, []forward.Forward{
			{Netns: ns, InternalPort: 8, External: "127.0.0.1:3333"}, {Netns: ns, InternalPort: 9, External: "0.0.0.0:3333"}}},
		{"another program", fmt.Sprintf("process %d (", os.Getpid()), true, []forward.Forward{{Netns: ns, InternalPort: 8, External: "127.0.0.1:7777"}}},
		{"another program, UDP", fmt.Sprintf("process %d (", os.Getpid()), true, []forward.Forward{{Netns: ns, InternalPort: 8, Protocol: rule.UDP, External: "[::1]:7777"}}},
		{"another forwarder", fmt.Sprintf("process %d (", os.Getpid()), true, []forward.Forward{{Netns: ns, InternalPort: 8, External: "0.0.0.0:6666"}}},
	} {
		t.Run(c.what, func(t *testing.T) {
			f, err := s.open(forward.Config{}, c.forwards...)
			if err == nil {
				f.Close(context.Background())
				t.Fatal("got no error")
			}
			if !strings.Contains(err.Error(), c.want) || errors.Is(err, forward.ErrConflict) != c.conflict {
				t.Errorf("got error %q, want one that says %q, of a conflict: %t", err, c.want, c.conflict)
			}
		})
	}
	err := testnet.Lacking(s.Host("a"), unix.CAP_NET_ADMIN, func() error {
		f, err := forward.Open(context.Background(), forward.Config{}, []forward.Forward{{Netns: ns, InternalPort: 8, External: "127.0.0.1:3333"}})
		if err == nil {
			f.Close(context.Background())
		}
		return err
	})
	if err == nil || !strings.Contains(err.Error(), "CAP_NET_ADMIN") {
		t.Errorf("without CAP_NET_ADMIN: %v", err)
	}
	if err := testnet.Do(s.Host("a"), func() error {
		n, err := nat.Open(context.Background(), nat.Config{Prefix: ns[:len(ns)-1] + "x", Count: 1, DenyIncoming: true, HostVethCIDR: netip.MustParsePrefix("10.1.8.0/22"), NamespaceVethCIDR: netip.MustParsePrefix("10.1.15.0/24"), IPv6: nat.Off})
		if err != nil {
			return err
		}
		closed := n.Namespaces()[0].Name
		f, err := s.open(forward.Config{HostVethCIDR: netip.MustParsePrefix("10.1.8.0/22")}, forward.Forward{Netns: closed, InternalPort: 8, External: "127.0.0.1:3333"})
		if err == nil {
			f.Close(context.Background())
		}
		if err == nil || !strings.Contains(err.Error(), closed) || !strings.Contains(err.Error(), "--allow-incoming-traffic=false") {
			t.Errorf("to a namespace that is closed: got error %v", err)
		}
		return n.Close(context.Background())
	}); err != nil {
		t.Error(err)
	}
	testnet.Diff(t, "after refusals", before, testnet.Picture(t, s.Host("a"), ns))
	if got := other.Forwards(); len(got) != 1 {
		t.Errorf("the other forwarder has %v", got)
	}
}

// TestKilled: what a killed process leaves is removed by the next one.
func TestKilled(t *testing.T) {
	s := newSite(t, nat.Config{Count: 1})
	before := testnet.Picture(t, s.Host("a"), s.names[0])
	testnet.KillChild(t, s.Host("a"), child+"="+s.names[0])
	if left := testnet.Picture(t, s.Host("a"), s.names[0]); left == before {
		t.Fatal("a killed process has left nothing, so nothing can be removed")
	}
	f, err := s.open(forward.Config{}, forward.Forward{Netns: s.names[0], InternalPort: 8, External: "0.0.0.0:3333"})
	if err != nil {
		t.Fatal(err)
	}
	if testnet.Seen(t, s.Host("world"), "tcp", s.Addr4("a"), 3333) == "" {
		t.Error("it is not forwarded after a kill")
	}
	if err := f.Close(context.Background()); err != nil {
		t.Fatal(err)
	}
	testnet.Diff(t, "after a kill", before, testnet.Picture(t, s.Host("a"), s.names[0]))
}

// TestJSON: the form of the command line.
func TestJSON(t *testing.T) {
	var got []forward.Forward
	text := `[{"netns":"ark0","internalPort":"6379","protocol":"tcp","externalAddr":"127.0.0.1:3333"},{"netns":"ark1","internalPort":53,"protocol":"udp","externalAddr":"[::]:53"}]`
	if err := json.Unmarshal([]byte(text), &got); err != nil {
		t.Fatal(err)
	}
	want := []forward.Forward{{"ark0", 6379, rule.TCP, "127.0.0.1:3333"}, {"ark1", 53, rule.UDP, "[::]:53"}}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("got %v, want %v", got, want)
	}
	for want, text := range map[string]string{
		`"0"`:      `[{"netns":"a","internalPort":"0","externalAddr":"127.0.0.1:1"}]`,
		`"70000"`:  `[{"netns":"a","internalPort":70000,"externalAddr":"127.0.0.1:1"}]`,
		`"sctp"`:   `[{"netns":"a","internalPort":1,"protocol":"sctp","externalAddr":"127.0.0.1:1"}]`,
		`"netnss"`: `[{"netnss":"a","internalPort":1,"externalAddr":"127.0.0.1:1"}]`,
	} {
		if err := json.Unmarshal([]byte(text), &got); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got error %v, want one that says %s", text, err, want)
		}
	}
}
