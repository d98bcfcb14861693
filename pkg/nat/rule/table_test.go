package rule_test

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/drafter-vm/drafter/internal/testnet"
	"github.com/drafter-vm/drafter/pkg/nat"
	"github.com/drafter-vm/drafter/pkg/nat/rule"
)

// TestFlowSet: a set has the connections whose packets have been remembered, many of them, and matches no others.
func TestFlowSet(t *testing.T) {
	h := testnet.NewTestHosts(t, "a")
	ns, err := nat.OpenNamespace(h.Host("a"))
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	four, six := rule.FlowSet{Name: "four"}, rule.FlowSet{Name: "six", IPv6: true}
	out := rule.Chain{Name: "out", Hook: rule.Output, Priority: rule.Filter}
	in := rule.Chain{Name: "in", Hook: rule.Input, Priority: rule.Filter, Rules: []rule.Rule{rule.Of(rule.InFlows(four), rule.Drop()), rule.Of(rule.InFlows(six), rule.Drop())}}
	for _, s := range []rule.FlowSet{four, six} {
		out.Rules = append(out.Rules, rule.Of(rule.Is(rule.UDP), rule.ToPort(1234), rule.Remember(s)))
	}
	table := rule.Table{Name: "many", FlowSets: []rule.FlowSet{four, six}, Chains: []rule.Chain{out, in}}
	const many = 3000
	for range 2 { // also instead of one that is there
		if err := table.Replace(ns); err != nil {
			t.Fatal(err)
		}
		if err := testnet.Do(h.Host("a"), func() error {
			for _, a := range []string{"127.0.0.1", "::1"} {
				for i := range many {
					from, to := netip.MustParseAddr(a), netip.MustParseAddr(a)
					c, err := net.DialUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(from, uint16(10000+i))), net.UDPAddrFromAddrPort(netip.AddrPortFrom(to, 1234)))
					if err != nil {
						return err
					}
					_, err = c.Write([]byte("remember"))
					c.Close()
					if err != nil {
						return err
					}
				}
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"four", "six"} {
			list := string(testnet.Run(t, h.Host("a"), "nft", "list", "set", "inet", "many", name))
			if got := strings.Count(list, " . 1234 "); got != many {
				t.Errorf("set %s has %d of %d connections", name, got, many)
			}
		}
	}
	for port, passes := range map[string]bool{"1234": false, "1235": true} {
		for _, a := range []string{"127.0.0.1", "::1"} {
			if err := testnet.Do(h.Host("a"), func() error {
				l, err := net.ListenPacket("udp", net.JoinHostPort(a, port))
				if err != nil {
					return err
				}
				defer l.Close()
				c, err := net.Dial("udp", l.LocalAddr().String())
				if err != nil {
					return err
				}
				defer c.Close()
				if _, err := c.Write([]byte("x")); err != nil {
					return err
				}
				wait := 100 * time.Millisecond
				if passes {
					wait = testnet.Patience
				}
				_ = l.SetReadDeadline(time.Now().Add(wait))
				if _, _, err = l.ReadFrom(make([]byte, 8)); (err == nil) != passes {
					t.Errorf("to port %s of %s: got error %v, passes should be %t", port, a, err, passes)
				}
				if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
					return err
				}
				return nil
			}); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// TestManyRules: a table has as many rules as a VM's places can ask for: some 20 for each of 256, and more.
func TestManyRules(t *testing.T) {
	h := testnet.NewTestHosts(t, "a")
	ns, err := nat.OpenNamespace(h.Host("a"))
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	in := rule.Chain{Name: "in", Hook: rule.Input, Priority: rule.Filter}
	const many = 10000
	for range many {
		in.Rules = append(in.Rules, rule.Of(rule.Is(rule.UDP), rule.ToPort(1234), rule.Drop()))
	}
	table := rule.Table{Name: "many", Chains: []rule.Chain{in}}
	for range 2 { // also instead of one that is there
		if err := table.Replace(ns); err != nil {
			t.Fatal(err)
		}
	}
	if got := strings.Count(string(testnet.Run(t, h.Host("a"), "nft", "list", "table", "inet", "many")), "dport 1234 drop"); got != many {
		t.Errorf("it has %d of %d rules", got, many)
	}
}
