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
// That is the switch of a guest whose rest is small. A rest that would take longer than the [Goal] allows is listed instead,
// where Goal.PostCopy and the destination (a [Postponer]) allow it: the guest runs there as soon as its device state is
// loaded, and its rest comes behind, what it waits for first:
//
//	lists of the rest, Guest.State   ───────►  Postponer.Postpone, Target.Load
//	                                 ◄───────  demands, from here on
//	…                                          … as above, up to running
//	the rest                         ───────►  Late.Fill
//	served                           ───────►  digests compared, Postponer.Complete
//	                                 ◄───────  settled: the source may drop its copy
//
// A link that dies after Journal.Commit does not end the migration: the two sides meet again, by Reconnect in both
// configurations. A process that was restarted goes on with [RejoinSource] or [RejoinDestination], or says with [Disclaim] that
// the guest never ran. [Begin] is Receive for those who want the guest as soon as it runs.
//
// A destination can ask for a copy (DestinationConfig.Copy): then the guest runs on at the source, and there is no commit.
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
//   - The source keeps its copy until the destination has said, durably, that it lacks nothing. What it lacks, only the
//     destination knows: after a cut its word counts, and nothing that either side believed.
//   - A failure is told to the other side with its reason, but never with the text of an error that might hold a path: see
//     [Refuse].
//   - Within a round no page is sent twice, and the next round of a device begins when the destination has processed the
//     last one. So pages may take any stream and be written by any worker, and the last version wins.
//   - Every device's digest is compared by both sides before the commit. It is computed as content is sent and received:
//     it proves that the last version of every page that the source sent arrived at its place, undamaged. It does not
//     prove that the tracker reported every write, nor that the destination's device keeps what it was given, and it is
//     no defence against a peer or network that lies on purpose; authenticity is the transport's.
//   - Memory is bounded: a window of bytes on their way at the source, a queue of buffers per worker at the destination,
//     16 bytes of digest table for each 4 KiB page that holds data, the lists of what was written, some bits for each page
//     that comes late, a number of demands, and the device state, up to a limit.
//
// # Bytes that are not sent
//
// Zeros go as runs, and holes are not even read. Where both sides hold what a device was made from (SourceDevice.Base,
// [BaseTarget]), the destination's device starts as that, and only pages that differ are sent; whether one differs is told by
// its hash, which is needed anyway, and an index of the base's hashes, so the base is not read. In later rounds such a device's
// pages that are written with what they held are not sent again. Until the switch: what is listed as missing is sent in any
// case.
//
// What a device held a while ago may be in a store that the destination reaches by itself (SourceDevice.Stored, [StoreTarget]). It fetches
// that while the source sends the rest, and what the destination does not get comes from the source as well: see stored.go.
//
// What is sent is compressed when the link is what all waits for and compression is measured to be faster; SourceConfig.
// NoCompression turns that off. Pages that repeat each other are not looked for: in the memory of real guests they are less than
// 3 % of what remains, and most of those are filled with one value, which compression makes nothing of.
//
// # Streams
//
// One stream is enough. Control frames, and content that somebody waits for, go before queued content, of which at most 64 KiB
// are in their way, and what the stream itself buffers. More streams carry content in parallel; after the switch the first of
// them carries none but what somebody waits for. Streams with Close or SetDeadline are interrupted when a migration is over, and with Close
// closed; from others a blocked goroutine returns when the caller closes them. A peer that is silent for the heartbeat
// timeout is given up, whatever the stream can or cannot do.
//
// # Concurrency
//
// Send and Receive may be called any number of times at once, each with streams, devices and hooks of its own. Both
// return only when everything they started has ended, but for goroutines blocked in a stream that nothing can interrupt, and a
// Postponer.Complete that was given up on.
// Hooks are called by the goroutine that called Send or Receive, one at a time, except that Guest.State runs beside the
// last round, and that Target.Run of a guest that lacks content runs beside its filling. While Send runs, nobody else may use the trackers, and while Receive runs, nobody else may write to the
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
// It opens no connection and encrypts nothing (pkg/transport), keeps no journal file, and does not pause a guest that runs here
// and waits for content that will not come (pkg/peer).
package migrate
