// Package rule writes netfilter rules as they are read, and puts whole tables of them into the kernel.
//
//	t := rule.Table{Name: "drafter-example", Chains: []rule.Chain{{
//		Name: "out", Hook: rule.PostRouting, Priority: rule.SourceNAT, NAT: true,
//		Rules: []rule.Rule{
//			rule.Of(rule.Out("eth0"), rule.From(netip.MustParsePrefix("10.0.15.0/24")), rule.Masquerade()),
//		},
//	}}}
//	err := t.Replace(ns)
//
// # Invariants
//
// A table belongs to one program. [Table.Replace] exchanges it as a whole, in one transaction: a packet meets the old rules or the new
// ones. Connections that netfilter tracks are not touched by that: a translation is decided by a connection's first packet.
// Tables are of the family inet, and so are for IPv4 and IPv6 alike.
//
// A rule is the concatenation of its parts ([Of]), of which each narrows what it matches; the last says what happens. The parts are what
// nft(8) compiles its own language to; the names here are those of nft where it has one.
//
// # Concurrency
//
// Tables and rules are values. Replace and Remove of different tables may run concurrently; the kernel puts them in an order.
package rule
