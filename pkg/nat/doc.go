// Package nat makes the network namespaces that virtual machines live in, and translates between them and the host's network.
//
//	n, err := nat.Open(ctx, nat.Config{Count: 16})
//	ns, err := n.Claim(ctx)        // one that nobody else has
//	… run a machine in ns.Name …
//	err = n.Release(ctx, ns.Name)
//	err = n.Close(ctx)             // nothing is left
//
// # What a namespace is
//
// A guest has the same addresses wherever it runs, so that it can be moved and cloned: 172.16.0.2 and fd00:172:16::2. What is around it
// makes that possible:
//
//	guest ── tap0 ─┤ namespace ark3 ├─ veth0 ──── ark3-veth ─┤ host ├─ eth0 ── others
//	172.16.0.2     172.16.0.1       10.0.8.14     10.0.8.13
//	               translated to    10.0.15.4                translated to eth0's own
//
// Each namespace has an address of its own, of NamespaceVethCIDR, to which the guest's is translated, one to one; the host translates
// that to its own where it leaves the host. From the host the guest is reached at the namespace's end of the veth pair (10.0.8.14), if
// AllowIncoming is set; package forward brings there what comes to a port of the host. The guest sees the addresses of who calls it. It
// is the same in IPv6, where all of that is unique local (RFC 4193), or, if NamespaceVethCIDR6 is a global prefix that is routed to this
// host, is not translated a second time.
//
// Guests reach nothing of BlockedSubnets, which are each other's addresses unless others are given, and each other at most by what is
// forwarded.
//
// # Invariants
//
//   - A namespace of ours bears the mark of its NAT (the alias of its interface lo), and has a name only when all that belongs to it is
//     there: a process that is killed in between leaves nothing. One that has no such mark is never touched.
//   - On the host there is one table of rules a NAT, which is replaced as a whole, and settings that are given back (package sysctl).
//   - Open after a kill finds what is there, and mends it; a namespace in which a machine runs keeps running.
//   - All is checked before anything is changed.
//
// # Concurrency
//
// The methods of a NAT may be called by any goroutine. One process at a time has the NAT of a prefix, in one network namespace of a
// host; Open binds it to that of the calling thread.
//
// # What it does not do
//
// It assigns no addresses to guests, and answers no DHCP: a blueprint's guest has them in its disk. It does not filter what guests
// say to the world.
package nat
