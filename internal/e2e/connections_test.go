package e2e

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/drafter-vm/drafter/internal/testguest"
	"github.com/drafter-vm/drafter/internal/testnet"
	"github.com/drafter-vm/drafter/pkg/forward"
	"github.com/drafter-vm/drafter/pkg/nat"
	"github.com/drafter-vm/drafter/pkg/nat/rule"
)

// goOn waits until all have heard more, and returns the longest gaps since it was asked before, in order.
func goOn(t *testing.T, when string, talks []*testnet.Talk) (gaps []time.Duration) {
	t.Helper()
	var all sync.WaitGroup
	for _, k := range talks {
		all.Go(func() { k.GoesOn(t, when) })
	}
	if all.Wait(); t.Failed() {
		t.FailNow()
	}
	for _, k := range talks {
		gaps = append(gaps, k.Gap().Round(time.Millisecond))
	}
	slices.Sort(gaps)
	return gaps
}

// histogram says how many of some gaps, which are in order, are how long.
func histogram(gaps []time.Duration) string {
	var b strings.Builder
	for rest := gaps; len(rest) > 0; {
		limit := 10 * time.Millisecond
		for limit < rest[0] {
			limit *= 2
		}
		n, _ := slices.BinarySearch(rest, limit+1)
		fmt.Fprintf(&b, "%d up to %s, ", n, limit)
		rest = rest[n:]
	}
	return fmt.Sprintf("%slongest %s", b.String(), gaps[len(gaps)-1])
}

// networks makes of some hosts such as VMs move between: each has a namespace of drafter nat, by its name, and a forwarder.
func networks(t *testing.T, h *testnet.Hosts, hosts ...string) (map[string]string, map[string]*forward.Forwarder) {
	t.Helper()
	prefix := "e" + h.Host("")[1:5]
	netns := make(map[string]string)
	forwards := make(map[string]*forward.Forwarder)
	for _, host := range hosts {
		err := testnet.Do(h.Host(host), func() error {
			n, err := nat.Open(context.Background(), nat.Config{Prefix: prefix + host, Count: 1})
			if err != nil {
				return err
			}
			t.Cleanup(func() {
				if err := n.Close(context.Background()); err != nil {
					t.Error(err)
				}
			})
			netns[host] = n.Namespaces()[0].Name
			f, err := forward.Open(context.Background(), forward.Config{}, nil)
			if err != nil {
				return err
			}
			t.Cleanup(func() { f.Close(context.Background()) })
			forwards[host] = f
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return netns, forwards
}

// TestCommandConnections: connections between a VM and others, in both directions, of TCP and UDP and over IPv4 and IPv6, go on while it moves
// between hosts with NAT, along a chain and home again. Between b and c the kernel carries their packets. It is not parallel: a neighbour would be in
// the gaps that it measures.
func TestCommandConnections(t *testing.T) {
	const (
		inbound  = 100 // TCP; of both families
		calls    = 20  // of the guest; of these, 4 UDP
		sessions = 4   // UDP, to the guest
		began    = inbound + calls + sessions
	)
	// Where the guest's processor is emulated, it answers a few hundred times a second: few of the connections then show the gaps, and the others that
	// they are there.
	tick, others := 20*time.Millisecond, 500*time.Millisecond
	if cpu, err := os.ReadFile("/proc/cpuinfo"); err == nil && regexp.MustCompile(`\b(vmx|svm)\b`).Match(cpu) {
		tick, others = time.Millisecond, time.Millisecond
	}
	w := newWorkshop(t)
	h := testnet.NewTestHosts(t, "a", "b", "c", "world")
	netns, forwards := networks(t, h, "a", "b", "c")
	start := func(host string, console *testguest.Console, args []string) (c *command) {
		t.Helper()
		err := testnet.Do(h.Host(host), func() error { c = w.start(t, console, args...); return nil })
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	peerOn := func(host, instance string, more ...string) *command {
		t.Helper()
		args := w.peer("package", instance, append([]string{"--netns", netns[host], "--laddr", h.Addr4(host).String() + ":0"}, more...)...)
		return start(host, w.console, args)
	}
	// Only the host that has the guest forwards to it.
	forwardAt := func(host string) {
		t.Helper()
		for name, f := range forwards {
			var list []forward.Forward
			if name == host {
				for _, protocol := range []rule.Protocol{rule.TCP, rule.UDP} {
					list = append(list, forward.Forward{Netns: netns[host], InternalPort: 6379, Protocol: protocol, External: ":3333"})
				}
			}
			if err := f.Set(context.Background(), list); err != nil {
				t.Fatal(err)
			}
		}
	}
	var talks []*testnet.Talk
	fast := 4
	next := func(network string) time.Duration {
		if fast == 0 || network == "udp" {
			return others
		}
		fast--
		return tick
	}
	// comeTo begins talks with a host, half of them in each family.
	comeTo := func(host, network string, n int) {
		t.Helper()
		for i := range n {
			addr := []netip.Addr{h.Addr4(host), h.Addr6(host)}[i%2]
			talks = append(talks, testnet.NewTalk(t, h.Host("world"), testnet.TalkTo{
				Name: fmt.Sprintf("%s %d to %s", network, i, addr), Network: network, Addr: netip.AddrPortFrom(addr, 3333), Tick: next(network),
			}))
		}
	}
	// call has the guest begin talks.
	call := func(network string, n int) {
		t.Helper()
		for i := range n {
			addr := []netip.Addr{h.Addr4("world"), h.Addr6("world")}[i%2]
			at, called := testnet.AwaitTalk(t, h.Host("world"), testnet.TalkTo{
				Name: fmt.Sprintf("%s %d of the guest to %s", network, i, addr), Network: network, Addr: netip.AddrPortFrom(addr, 0), Tick: next(network),
			})
			w.do(t, fmt.Sprintf("call %s %s", network, at))
			talks = append(talks, called())
		}
	}
	say := func(move string, from *command) {
		t.Helper()
		report := from.waitFor(t, "Sent VM to ")
		t.Logf("%s: %s; gaps of %d connections: %s", move, downtimeOf(report), len(talks), histogram(goOn(t, move, talks)))
	}

	w.snapshot(t, "package", "--netns", netns["a"], "--interface", "tap0").wait(t, 0)
	a := peerOn("a", "at-a")
	a.waitFor(t, "Resumed VM")
	for _, command := range []string{"net lo 127.0.0.1/8", "net eth0 172.16.0.2/30 172.16.0.1", "net eth0 fd00:172:16::2/64 fd00:172:16::1", "listen 6379"} {
		w.do(t, command)
	}
	forwardAt("a")
	comeTo("a", "tcp", inbound)
	comeTo("a", "udp", sessions)
	call("tcp", calls-4)
	call("udp", 4)
	goOn(t, "at the begin", talks)
	t.Logf("before any move: gaps %s", histogram(goOn(t, "before any move", talks)))

	vxlan := func(host string) []string { return []string{"--connections-vxlan", h.Addr4(host).String()} }
	b := peerOn("b", "at-b", append(vxlan("b"), "--raddr", a.waitFor(t, "Serving on "))...)
	b.waitFor(t, "Received VM")
	say("a to b", a)
	a.waitFor(t, fmt.Sprintf("Keeping %d connections that began here", began))
	forwardAt("b")
	comeTo("b", "tcp", 2)
	call("tcp", 2)
	goOn(t, "with those that begin at b", talks)

	// The process that keeps the first ones dies, and another one goes on.
	a.Process.Kill()
	<-a.done
	kept := start("a", nil, []string{"connections", "--netns", netns["a"]})
	kept.waitFor(t, fmt.Sprintf("Keeping %d connections that began here", began))
	goOn(t, "after a kill", talks)

	servedByB := b.waitFor(t, "Serving on ")
	c := peerOn("c", "at-c", append(vxlan("c"), "--raddr", servedByB)...)
	c.waitFor(t, "Received VM")
	say("b to c", b)
	b.waitFor(t, "Keeping 4 connections that began here")
	c.waitFor(t, "packets go to another place by VXLAN")
	forwardAt("c")
	comeTo("c", "tcp", 2)
	call("udp", 2)
	goOn(t, "with those that begin at c", talks)

	// The peer that has the guest dies, and is started again by its command line.
	c.Process.Kill()
	<-c.done
	c = peerOn("c", "at-c", append(vxlan("c"), "--raddr", servedByB)...)
	c.waitFor(t, "Adopted VM")
	goOn(t, "after a kill of the guest's peer", talks)

	home := peerOn("a", "at-a-again", "--raddr", c.waitFor(t, "Serving on "))
	home.waitFor(t, "Received VM")
	say("c to a", c)
	kept.waitFor(t, "Another process keeps the connections")
	kept.wait(t, 0)
	for _, k := range talks {
		if sent, unanswered := k.Datagrams(); sent > 0 {
			t.Logf("%s: %d datagrams, %d of them not answered", k.Name, sent, unanswered)
		}
		k.Stop()
	}
	for _, p := range []*command{b, c} {
		p.Process.Signal(os.Interrupt) // a datagram's connection would be kept for two minutes more
		p.wait(t, 0)
	}
	home.Process.Signal(os.Interrupt)
	home.wait(t, 0)
	for host, ns := range netns {
		if left := string(testnet.Run(t, ns, "sh", "-c", "ip -o link; ip rule; ip -6 rule; nft list tables")); strings.Contains(left, "dft") || // dftx, too
			strings.Contains(left, "lookup 1000") || strings.Contains(left, "drafter-flow") {
			t.Errorf("in the namespace on %s is left:\n%s", host, left)
		}
		err := testnet.Do(ns, func() error {
			for _, family := range []netlink.InetFamily{netlink.FAMILY_V4, netlink.FAMILY_V6} {
				flows, err := netlink.ConntrackTableList(netlink.ConntrackTable, family)
				if err != nil {
					return err
				}
				for _, f := range flows {
					if f.Mark != 0 {
						t.Errorf("in the namespace on %s is left: %s", host, f)
					}
				}
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	}
	w.checkClean(t)
}

// downtimeOf is what a report says of the downtime.
func downtimeOf(report string) string {
	_, rest, _ := strings.Cut(report, "downtime ")
	took, _, _ := strings.Cut(rest, ",")
	return "downtime " + took
}
