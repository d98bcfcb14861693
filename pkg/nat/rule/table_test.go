package rule_test

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/drafter-vm/drafter/internal/testnet"
	"github.com/drafter-vm/drafter/pkg/nat"
	"github.com/drafter-vm/drafter/pkg/nat/rule"
)

// TestManyFlows: a set has all flows that it was given, also where they are more than one attribute of netlink holds.
func TestManyFlows(t *testing.T) {
	h := testnet.NewTestHosts(t, "a")
	ns, err := nat.OpenNamespace(h.Host("a"))
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	const many = 5000
	var flows []rule.Flow
	for i := range many {
		for _, a := range []string{"192.0.2.1", "2001:db8::1"} {
			flows = append(flows, rule.Flow{Protocol: rule.TCP, From: netip.AddrPortFrom(netip.MustParseAddr(a), uint16(10000+i)), ToPort: 80})
		}
	}
	table := rule.Table{Name: "many", FlowSets: []rule.FlowSet{{Name: "four", Flows: flows}, {Name: "six", IPv6: true, Flows: flows}}}
	for range 2 { // also instead of one that is there
		if err := table.Replace(ns); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"four", "six"} {
			list := string(testnet.Run(t, h.Host("a"), "nft", "list", "set", "inet", "many", name))
			if got := strings.Count(list, " . 80"); got != many && strings.Count(list, " . http") != many {
				t.Errorf("set %s has %d of %d flows", name, max(got, strings.Count(list, " . http")), many)
			}
		}
	}
}
