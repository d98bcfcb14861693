// Package faults makes things go wrong with migrations, and checks what becomes of the guest: that it runs on exactly one host, or
// on none as long as its owner is in doubt, that it has everything it ever had, and that nothing is left behind.
//
// # What there is
//
//   - A [Link] lies between the two sides' streams, in this process or over TCP, and knows the frames of pkg/wire: it cuts, stalls,
//     truncates, delays, throttles or damages them at a frame, a byte, or a type of frame. A [Fault] says what and where.
//   - A [World] is some [Host]s and one guest, all in this process: records and disks that outlive a power cut, machines ([VM]) that
//     outlive the [Process] that drives them, processes that can be killed at any moment of pkg/migrate. The guest's [Program]
//     writes all over its memory and appends to a journal on its disk, and finds by itself what is lost, old or misplaced. The world
//     sees when the guest runs where, and holds what clients were told into a [History], which Porcupine judges.
//   - The tests with real machines and the real command are beside them; they need root and QEMU.
//
// What happens in a World happens in the fake time of package testing/synctest: a minute of silence costs nothing, and what is left
// running at the end of a test fails it. Such tests are parallel, as nothing real takes time; the others look at what the process has
// open, or at real machines.
//
// # How to add a fault
//
//   - Of the network: a [Kind], a line in [conduit.reach], and the sweeps over frames and bytes, and the histories, try it.
//   - Of a device: an answer in TestDevices.
//   - Of a host: a line in blows. It is struck at every moment of every situation.
//   - Of real peers: a victim in victims, and what it means in play.strike. It is struck in every state.
//   - A state or hook of pkg/migrate: nothing. Blows are struck in all states that its tables lead to; TestKill fails when no
//     situation comes through a state, and then wants one in situations.
//
// # How to reproduce
//
// A scene of TestProcesses is a subtest: -run 'TestProcesses/link,_source_pausing' -long.
//
// A test that fails with a seed prints how to run it again. Faults are chosen by the seed alone; how goroutines are scheduled is
// not, so that a rare failure may want -count.
//
//	go test ./internal/faults -run TestHistories -seed 17 -count 100
package faults
