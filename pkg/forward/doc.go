// Package forward brings what comes to ports of a host to virtual machines in network namespaces of package nat.
//
//	f, err := forward.Open(ctx, forward.Config{}, []forward.Forward{
//		{Netns: "ark0", InternalPort: 6379, Protocol: rule.TCP, External: "0.0.0.0:3333"},
//	})
//	err = f.Set(ctx, others)      // while it runs: what is in both lists is not touched
//	err = f.Close(ctx)
//
// # How
//
// A forward is a rule of the kernel, which translates the destination: of what comes from others, and of what this host's own programs
// send to its addresses. The guest sees the addresses of its clients, but for those at 127.0.0.1: these come from the host's end of the
// namespace's veth pair.
//
// Besides, each forward holds its address by a socket that listens there. So no other program takes it, who has it already is named in the
// error, and it is free again when the process ends. What reaches that socket is what the kernel does not translate: that to [::1], which
// it cannot, and that over IPv6 to a guest that has IPv4 only. It is relayed, byte by byte: a TCP connection ends here, and another one
// leads to the guest, which sees the host as its client and does not keep it when it moves to another host.
//
// # External addresses
//
//	127.0.0.1:3333, [::1]:3333     an address of this host
//	localhost:3333, a.example:3333 all addresses that the name has here
//	0.0.0.0:3333                   every IPv4 address
//	[::]:3333                      every IPv6 address
//	:3333                          every address
//
// # Invariants
//
//   - A Forwarder has one table of rules (package rule), which is replaced as a whole: nothing is half forwarded.
//   - Connections go on when their forward is removed; new ones do not come.
//   - What a killed process has left is removed by the next Open on that host.
//
// # Concurrency
//
// The methods of a Forwarder may be called by any goroutine. Several Forwarders, also of several processes, may be on one host; Open binds
// one to the network namespace of the calling thread.
package forward
