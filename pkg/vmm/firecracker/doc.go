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
// # Device state
//
// Firecracker's snapshots are a file of device state and one of RAM. The first is written, and synced, before the second is opened; a path
// that cannot be opened then ends the snapshot without a copy of RAM, and the machine goes on from there. Which file could not be opened
// is in its answer; with any other answer, Save fails. To load, it is given an empty file of the size of RAM, whose mappings are answered with
// the memfd.
//
// # Files in Config.Dir
//
//	api.sock          Firecracker's control socket
//	console.in, .out  FIFOs: its standard input and output, which are the console
//	vsock.sock        the guest's sockets (vmm.SocketFile), if Spec.Sockets; served by Firecracker itself
//	NAME.disk         a link to each disk: device state has these names in it, and so fits any folder
//	firecracker.json  which process this is, for Adopt
//
// The process holds two descriptors it knows nothing of: an empty memfd for device state, and the RAM.
//
// # Concurrency
//
// As [vmm.Machine] says. A machine has these goroutines, which have all ended when Done is closed: the waiter for the process and its
// stderr, and two or three that pump the console.
//
// # What it does not do
//
// No jailer: Config.UID and GID are refused. It does not serve disks, does not set the guest's clock, and has no hotplug.
package firecracker
