// Package testnet joins network namespaces by a bridge, so that tests and benchmarks can move a guest between peers on one
// host and reach it all the while. It needs root, changes nothing in the host's own namespace, and uses no programs.
//
//	     NAME-client                      NAME-a                      NAME-b
//	┌────────────────────┐       ┌───────────────────┐       ┌───────────────────┐
//	│ br0 172.16.0.1/30  │       │        br0        │       │        br0        │
//	│     fd00:172:16::1 │       │   up0       tap0  │       │   up0       tap0  │
//	│     p0      p1     │       └────┼──────────┼───┘       └────┼──────────┼───┘
//	└─────┼───────┼──────┘            │       VM of a             │       VM of b
//	      └───────┼───────────────────┘                           │
//	              └───────────────────────────────────────────────┘
//
// The guest has the same addresses wherever it runs: 172.16.0.2 and fd00:172:16::2, and one MAC address. The namespaces
// are named below /run/netns, as `ip netns` does it, for --netns flags; tap0 is persistent, of one queue, and waits for a
// VMM to attach to it.
//
// # Moves
//
// The bridge in the client's namespace is a real switch: it learns behind which of its ports the guest is, from the
// frames that the guest sends. After a move it therefore goes on sending to the old place until the guest has sent
// something from the new one, and somebody has to announce the move. Machines of package vmm/qemu do it themselves, as soon as
// the guest is paused at its old place; for others, [Network.Moved] does it on the guest's behalf. The bridges of the peers
// have two ports and learn nothing, so that nothing in them can be out of date. Peers cannot reach each other: their ports
// are isolated.
//
// # Example
//
//	network, err := testnet.New(testnet.Config{Name: "bench", Peers: []string{"a", "b"}})
//	if err != nil { … }
//	defer network.Close()
//	… drafter peer --netns bench-a --interface tap0 …
//	conn, err := testnet.DialContext(ctx, network.Client(), "tcp", "172.16.0.2:6379")
//	… the VM is resumed in demo-b …
//	err = network.Moved("b")
//
// # Leftovers
//
// Close removes everything. What a killed run has left is removed by the next New of the same name; a lock that ends with
// its process keeps that from hitting a network in use.
//
// A Network may be used by several goroutines. This package is no NAT and no way out to other networks: guests reach the
// client's namespace and nothing else.
package testnet
