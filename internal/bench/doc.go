// Command bench measures what docs/promises.md promises, each number beside its reference in the same run:
//
//	go run ./internal/bench [-quick] [-run REGEXP] [-samples N] [-profiles DIR] [-list]
//
// The cases, in the order they run; -list says more of each:
//
//	engine/DATA/LOAD   1 GiB from one process's memory to another's over TCP, beside io.Copy of the same bytes
//	vm                 a VM with a loaded Valkey server, beside QEMU's own pre-copy and post-copy of the same guest
//	postcopy/engine    what a thread waits for a page that has not arrived, while everything else is streamed
//	postcopy/vm        the same in a real machine
//	handover           a move within one host, memory handed over, beside TCP
//	resume             from a package to the guest's first instruction, 128 MiB to 4 GiB
//	working-set        from a package to the guest's answer with a recorded working set, beside without
//	clones             50 clones of one package, in turn and at once: time to an answer, and memory, beside QEMU booting the guest
//	store              a VM over a slow link: with sharedbase, with an object store, with both, with stores that fail, beside neither
//	slowdown           how fast a guest works at a peer that does not migrate, beside plain QEMU; and while it migrates
//	overlay/…          4 KiB and 64 KiB requests to an overlay, by what is in it, beside a file
//	expose/…           the same of qemu-img bench to an NBD socket, and to a file served by FUSE, beside the file behind it, and qemu-nbd
//	nat                256 network namespaces, made and removed
//	forward            a client through a forward, beside a plain DNAT rule
//
// # What it writes
//
// A table on stdout, progress on stderr, all samples to out/bench.json, and a picture to docs/bench.svg. With -run, the
// other cases' results in out/bench.json stay, each with the date it was measured. With -quick everything is tiny and the
// files are out/bench-quick.json and out/bench-quick.svg: such a run shows that the harness works, its numbers mean
// nothing. The exit status is 1 when a case failed; a goal that was missed is a result and no failure.
//
// # How it measures
//
// Machines differ, and this one's cores may be shared: what is compared is measured in turns, ours, the reference, ours,
// and so on, and the ratio is the median of the ratios of the turns. Where only one side has samples, or the two have
// different numbers of them, it is the ratio of the medians.
//
// Whatever is charged for CPU time or memory is a process of its own, which this program is once more with another role
// (roles.go). What is measured starts when both ends are connected and have been told to go.
//
// Other programs on the machine still cost. What helps, as root, is a session that goes first:
//
//	setsid -w bash -c 'echo -15 > /proc/self/autogroup; make bench'
//
// Each row has the load of the machine just before, so that one sees whether it was quiet.
//
// # Cleaning up
//
// Ctrl-C ends the case that runs and writes what there is. Processes are ended by their owner; network namespaces and
// files below out are removed, or found and removed by the next run, as is what is mounted at out/exposed. Should this program be killed, its own
// processes end with it, but machines live on, as they do when a peer dies: QEMU processes whose working folder is below
// out/bench/vms or is /tmp/drafter-bench-*; the S3 server of store, versitygw; and the registry of registry. What took long to make, blueprint and packages, is kept in out.
package main
