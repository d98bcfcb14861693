package e2e

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/drafter-vm/drafter/internal/testguest"
	"github.com/drafter-vm/drafter/internal/testnet"
	"github.com/drafter-vm/drafter/pkg/forward"
	"github.com/drafter-vm/drafter/pkg/nat"
	"github.com/drafter-vm/drafter/pkg/nat/rule"
)

// goOn waits until all have heard more, and returns the longest gaps since it was asked before, in order.
func goOn(t *testing.T, when string, talks []*testnet.Talk) (gaps []time.Duration) {
	t.Helper()
	for _, k := range talks {
		if k.GoesOn(t, when); t.Failed() {
			t.FailNow()
		}
		gaps = append(gaps, k.Gap().Round(time.Millisecond))
	}
	slices.Sort(gaps)
	return gaps
}

// TestCommandConnections: connections of clients with a VM, over IPv4 and IPv6, go on while it moves between hosts with NAT, and home again.
func TestCommandConnections(t *testing.T) {
	w := newWorkshop(t)
	h := testnet.NewTestHosts(t, "a", "b", "world")
	prefix := "e" + h.Host("")[1:5]
	netns := make(map[string]string)
	forwards := make(map[string]*forward.Forwarder)
	for _, host := range []string{"a", "b"} {
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
				list = []forward.Forward{{Netns: netns[host], InternalPort: 6379, Protocol: rule.TCP, External: ":3333"}}
			}
			if err := f.Set(context.Background(), list); err != nil {
				t.Fatal(err)
			}
		}
	}
	talksAt := func(host string, n int) (talks []*testnet.Talk) {
		t.Helper()
		for range n {
			for _, a := range []netip.Addr{h.Addr4(host), h.Addr6(host)} {
				talks = append(talks, testnet.NewTalk(t, h.Host("world"), testnet.TalkTo{Name: fmt.Sprintf("connection %d to %s", len(talks), a), Network: "tcp", Addr: netip.AddrPortFrom(a, 3333)}))
			}
		}
		return talks
	}

	w.snapshot(t, "package", "--netns", netns["a"], "--interface", "tap0").wait(t, 0)
	a := peerOn("a", "at-a")
	a.waitFor(t, "Resumed VM")
	for _, command := range []string{"net lo 127.0.0.1/8", "net eth0 172.16.0.2/30 172.16.0.1", "net eth0 fd00:172:16::2/64 fd00:172:16::1", "listen 6379", "mem start 16"} {
		w.do(t, command)
	}
	forwardAt("a")
	talks := talksAt("a", 10)
	goOn(t, "at the begin", talks)

	b := peerOn("b", "at-b", "--raddr", a.waitFor(t, "Serving on "))
	b.waitFor(t, "Received VM")
	report := a.waitFor(t, "Sent VM to ")
	a.waitFor(t, "Keeping 20 connections that began here")
	gaps := goOn(t, "after the first move", talks)
	t.Logf("first move: %s; gaps %v", downtimeOf(report), gaps)
	forwardAt("b")
	talks = append(talks, talksAt("b", 2)...)
	goOn(t, "with those that begin there", talks)

	// The process that keeps the first ones dies, and another one goes on.
	a.Process.Kill()
	<-a.done
	kept := start("a", nil, []string{"connections", "--netns", netns["a"]})
	kept.waitFor(t, "Keeping 20 connections that began here")
	goOn(t, "after a kill", talks)

	home := peerOn("a", "at-a-again", "--raddr", b.waitFor(t, "Serving on "))
	home.waitFor(t, "Received VM")
	report = b.waitFor(t, "Sent VM to ")
	kept.waitFor(t, "Another process keeps the connections")
	kept.wait(t, 0)
	gaps = goOn(t, "at home again", talks)
	t.Logf("second move: %s; gaps %v", downtimeOf(report), gaps)
	if got := w.do(t, "mem verify"); got == "" {
		t.Error("the memory was not verified")
	}
	b.waitFor(t, "Keeping 4 connections that began here")
	for _, k := range talks {
		k.Stop()
	}
	b.waitFor(t, "The last connection that began here has ended")
	b.wait(t, 0)
	home.Process.Signal(os.Interrupt)
	home.wait(t, 0)
	for host, ns := range netns {
		if left := string(testnet.Run(t, ns, "sh", "-c", "ip -o link; ip rule; ip -6 rule; nft list tables")); strings.Contains(left, "dft") || strings.Contains(left, "lookup 1000") || strings.Contains(left, "drafter-flow") {
			t.Errorf("in the namespace on %s is left:\n%s", host, left)
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
