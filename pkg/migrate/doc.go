// Package migrate moves a running VM from one process to another: the two state machines, the policy that says when to
// pause the guest, and the report. It speaks the protocol of pkg/wire (docs/protocol.md) over any streams, reads and
// writes block.Devices, and knows neither a hypervisor nor a network: what pauses, saves, loads and runs a guest comes in
// as [Guest] and [Target].
//
// # How it goes
//
//	source                                       destination
//	[Send]                                       [Receive]
//	  manifest: names, sizes, machine  ───────►  Target.Prepare: devices made, VMM started and waiting
//	                                   ◄───────  accept
//	  everything once, writes tracked  ───────►  written as it comes
//	  what was written meanwhile, …    ───────►  … in rounds, until Decide asks for the switch
//	  Guest.BeforeSuspend, Guest.Pause
//	  the rest, and Guest.State        ───────►  digests compared, flushed, Target.Load
//	                                   ◄───────  prepared
//	  Journal.Commit
//	  commit                           ───────►  Journal.Commit, Target.Run
//	                                   ◄───────  running
//
// The guest stands still from Guest.Pause until Target.Run. What can be slow is outside of that: starting the VMM, most of
// the content, most of the flushing, and a second look at the content, which is not needed (see below).
//
// # Invariants
//
//   - The guest never runs in two places. Who has it is decided by one thing, the commit: before the commit frame leaves,
//     the source resumes the guest by itself when anything fails; from then on only the destination may run it, and only
//     after its own record. [SourceState] and [DestinationState] have the pictures, and the answer to "the link dies now"
//     and "someone cancels now" in each state.
//   - A failure is told to the other side with its reason, but never with the text of an error that might hold a path: see
//     [Refuse].
//   - Within a round no page is sent twice, and the next round of a device begins when the destination has processed the
//     last one. So pages may take any stream and be written by any worker, and the last version wins.
//   - Every device's digest is compared by both sides before the commit. It is computed as content is sent and received:
//     it proves that the last version of every page that the source sent arrived at its place, undamaged. It does not
//     prove that the tracker reported every write, nor that the destination's device keeps what it was given, and it is
//     no defence against a peer or network that lies on purpose; authenticity is the transport's.
//   - Memory is bounded: a window of bytes on their way at the source, a queue of buffers per worker at the destination,
//     16 bytes of digest table for each 4 KiB page that holds data, and the device state, up to a limit.
//
// # Streams
//
// One stream is enough. Control frames go before queued content, of which at most 64 KiB are in their way. More streams
// carry content in parallel. Streams with Close or SetDeadline are interrupted when a migration is over, and with Close
// closed; from others a blocked goroutine returns when the caller closes them. A peer that is silent for the heartbeat
// timeout is given up, whatever the stream can or cannot do.
//
// # Concurrency
//
// Send and Receive may be called any number of times at once, each with streams, devices and hooks of its own. Both
// return only when everything they started has ended, but for goroutines blocked in a stream that nothing can interrupt.
// Hooks are called by the goroutine that called Send or Receive, one at a time, except that Guest.State runs beside the
// last round. While Send runs, nobody else may use the trackers, and while Receive runs, nobody else may write to the
// devices.
//
// # Example
//
//	report, err := migrate.Send(ctx, []io.ReadWriter{conn}, migrate.SourceConfig{
//		Devices: []migrate.SourceDevice{{Name: "memory", Device: ram, Tracker: ram, Policy: migrate.Policy{ByGoal: true}}},
//		Goal:    migrate.Goal{MaxDowntime: 20 * time.Millisecond},
//		Spec:    spec,
//		Guest:   guest,
//		Journal: journal,
//	})
//	switch {
//	case err == nil:
//		fmt.Println(report) // the guest runs there: close ours
//	case errors.Is(err, migrate.ErrInDoubt):
//		// keep ours paused until the destination's journal is known
//	default:
//		// ours runs on
//	}
//
// # What it does not do
//
// It opens no connection and encrypts nothing (pkg/transport), keeps no journal file and does not resolve a doubt
// (pkg/peer). Post-copy, content by reference, compression and reconnecting are not in this version; the protocol keeps
// room for them.
package migrate
