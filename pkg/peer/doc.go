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
// # Concurrency
//
// All methods may be called by any goroutine. One Send runs at a time; a second one fails at once. Close during a Send
// cancels it first.
//
// # What it does not do
//
// It makes no connections (package transport, or the caller's own) and no networks. What a guest's clients see of a move is
// the caller's to arrange; Config.Hooks say when.
package peer
