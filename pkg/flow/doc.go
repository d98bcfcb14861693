// Package flow keeps the connections of a virtual machine when it moves to another host.
//
//	k, err := flow.Open(ctx, flow.Config{Netns: "ark0", Listen: l, Address: address, Dial: dial})
//
//	// the source                               // the destination
//	offer := k.Offer()              ──offer──►  answer, err := k.Accept(offer)
//	err := k.Connect(ctx, answer)   ◄─answer──  …
//	err = k.Divert()                            packets for the guest are held there from now on
//	… the guest is paused …
//	err = k.Hand(ctx)               ─tunnel──►  connections are known there
//	… it is committed …                         k.Arrive(); the guest runs
//	k.Left()
//	<-k.Done()                                  the last connection that began here has ended
//
// # The idea
//
// Every connection has an owner: the place, a network namespace of package nat on some host, through whose NAT it was opened. That
// never changes, and nor does the NAT. When the guest is elsewhere, only the owner's route to it changes: into a tunnel to the place
// where the guest is now. That place knows to whom each connection belongs (the mark of its conntrack entry is the owner's number), and
// sends what the guest answers back to the owner. So clients see no change: the same addresses, the same ports, no reset.
//
// Only the guest's address and its clients' pass through a tunnel, never those of a namespace, which may be the same on every host.
//
// # The tunnel
//
// Between two places of a VM there is one connection of the caller's transport (Config.Dial). It carries packets and messages; at each
// end, packets go in and out of a TUN interface in the namespace (dft1, dft2, …, by the number of the other place). Both ends prove to
// have the VM's key, which travels in the migration. The places of a VM are numbered by the order in which it came to them.
//
// With [Config.VXLAN] at both, the kernel carries packets between two places while probes show that it does, from when the guest has arrived until
// it is sent elsewhere.
//
// An owner dials the place where the guest is. Where it cannot, the place before relays: see [Keeper.Places].
//
// # States
//
//	Vacant ─ Start ─► Home ─ Connect ─► Leaving ─ Divert ─► Diverted ─ Left ─► Away ─ the last connection ends ─► Vacant
//	                  Home ◄─────────── Undo ──────────────────┘
//	Vacant, Away ─ Accept ─► Expecting ─ Arrive ─► Home
//	                         Expecting ─ Discard ─► Vacant, or Away as before
//
// What is kept outlives the process: interfaces, routes and rules are the kernel's, and the rest is in a file. Open takes up what it
// finds, also from a living process that has the namespace, which then lets go of it.
//
// # Invariants
//
//   - No packet for the guest is lost by the switch: from Divert to Arrive they wait at the destination (4 MiB).
//   - Before Divert nothing waits: connections go on while the guest is on its way, whatever place expects it.
//   - A namespace keeps connections of one VM. While it does, no other may come to it ([ErrOccupied]).
//   - A place that is dead costs its own connections only.
//   - When the last connection of a place has ended, nothing of it is left, in its namespace or elsewhere.
//
// # Concurrency
//
// All methods may be called by any goroutine; those that change the state one after the other.
//
// # What it does not do
//
// It keeps TCP and UDP. It does not change forwards: that of the host which the VM has left has to be removed, or new connections keep
// coming to it, and are kept, too.
package flow
