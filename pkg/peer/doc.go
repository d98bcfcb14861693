// Package peer is an instance that can be migrated: one process that owns one running virtual machine, can hand it to
// another peer and can receive it from one, over any byte streams.
//
//	p, err := peer.Resume(ctx, cfg)                       // start it here …
//	report, err := p.Send(ctx, []io.ReadWriter{conn})     // … and hand it over
//
//	p, report, err := peer.Receive(ctx, cfg, []io.ReadWriter{conn}) // the other side
//	defer p.Close(ctx)
//
// # Ownership
//
// At most one peer runs the VM at any time. Who owns it is on record in each side's state device (runner.Status): the source
// writes Moved, synced, before the commit frame leaves; the destination writes Running, synced, before the guest runs there.
// Until the source's record, whatever fails, the VM runs on at the source. From it on the source never runs the VM again
// by itself: when the destination's confirmation is lost, Send returns an error that wraps migrate.ErrInDoubt.
//
// # When something dies
//
// A received guest may run before all of it has arrived. Until [Receive] returns it needs the source, which keeps its copy, paused.
// When the link is lost meanwhile, both look for each other: by Config.FindSource and Config.FindDestination, for
// Config.RescueTimeout. After that the guest is frozen and the copy kept, and they go on when either is asked to
// ([Peer.Search], [Peer.Rejoin]).
//
// A peer process that was killed is started again, and adopts its machine ([Adopt], [Resume], [Boot]). One that had given its
// instance away is in doubt ([Peer.InDoubt]) until Rejoin has met the destination, serves what is missing there, and ends;
// or takes the guest back if the destination has promised never to run it. One that had received its instance looks
// for the source by itself ([Peer.Arrived]). A [Lobby] tells the connections of all that apart.
//
// One that had given its instance away and was closed, or died with its machine, has files that the other peer may need:
// [OpenGiven] serves them.
//
// # Other ends
//
// What takes a VM or hands it over need not run it. A [Terminator] writes it down as a package; a [Mounter] shows its devices as
// files, and hands it on; a [Server] gives clones of a package to peers, which run before they have all of it.
//
// # Stores
//
// A [Storage] keeps what the devices hold in a store while the instance runs, from which a peer that it is sent to gets most of it.
// [Peer.Copy] gives a copy of the running VM to whoever wants to keep it. Package depot does both with an object store.
//
// # Concurrency
//
// All methods may be called by any goroutine. A peer does one thing at a time of Send, Snapshot, Pause, Unpause and Rejoin; another fails
// at once with ErrBusy. Close cancels what is under way first. How a peer is (Running, Paused, InDoubt, Busy, UnderWay and
// Instance().Missing) is answered at once, whatever goes on.
//
// # What it does not do
//
// It makes no connections (package transport, or the caller's own) and no networks. What a guest's clients see of a move is
// the caller's to arrange; Config.Hooks say when.
package peer
