// Package firecracker runs machines with Firecracker, as its project releases it (1.10 or newer, on x86-64 with KVM): it implements
// [vmm.Backend], [vmm.Machine] and [vmm.Adopter].
//
//	backend := firecracker.New(firecracker.Options{})
//	spec, err := backend.Describe(ctx, vmm.Spec{CPUCount: 1, MemorySize: 1 << 30})
//	m, err := backend.Start(ctx, vmm.Config{Spec: spec, Dir: "/run/drafter/vm1", Memory: memfd, Spawn: spawn, Graft: graft, NUMANode: -1,
//		Boot: &vmm.Boot{Kernel: "vmlinux", Initrd: "initrd.img"}})
//
// # Memory
//
// Firecracker allocates its guest's RAM by itself, privately. It gets the caller's memfd instead ([vmm.Requirements]), so that RAM is tracked,
// sent and filled as that of any machine: see docs/decisions/0007.
//
// # Pause and device state
//
// Firecracker's pause is one of the vCPUs. Its devices go on: they finish requests, and write packets that arrive into the guest's memory.
// And its snapshots are a file of device state and one of RAM, where only the first is of use. Both are settled at once: Pause begins a snapshot
// whose file of RAM is a FIFO. The devices are drained and their state is written and synced, before the thread that does all of their work
// comes to the FIFO, and waits there for a reader until Resume, Close, or a new owner. From the end of Pause on the guest's memory does not
// change. At Resume the snapshot ends, as a FIFO cannot be given the size of RAM; with any other answer, Resume fails.
//
// To load, it is given the memfd as the file of RAM, whose mappings are answered with the memfd itself.
//
// What a pause costs the guest, even when it goes on here: connections of its vsock are reset, as with any snapshot of Firecracker.
//
// # Files in Config.Dir
//
//	api.sock          Firecracker's control socket
//	console.in, .out  FIFOs: its standard input and output, which are the console
//	vsock.sock        the guest's sockets (vmm.SocketFile), if Spec.Sockets; served by Firecracker itself
//	0.disk, …         a link to each disk: device state has these names in it, and so fits any folder
//	log, metrics      FIFOs: what it says and counts
//	still             the FIFO at which a paused one waits
//	firecracker.json  which process this is, for Adopt
//
// The process holds three descriptors it knows nothing of: a memfd for device state that is saved, one for what is loaded, and the RAM.
//
// # The jailer
//
// With [Options.Jailer], Firecracker runs in its jailer: Config.Dir, which has to be BASE/firecracker/ID/root, is its root folder, and Config.UID
// and GID are who it is. What it inherits otherwise is there as files, in a small file system in memory; what the jailer closes is given to it by Config.Spawn
// ([vmm.Requirements.Wrapped]). Network namespace, NUMA node and control group are ours to set, as without it.
//
// # Concurrency
//
// As [vmm.Machine] says. A machine has these goroutines, which have all ended when Done is closed: the waiter for the process and its
// stderr, two for its log, two for its metrics, two or three that pump the console, and while it is paused one that waits for an answer.
//
// # What it does not do
//
// It does not serve disks, does not set the guest's clock, and has no hotplug.
package firecracker
