// Package qemu runs machines with QEMU (8.0 or newer, on x86-64): it implements [vmm.Backend], [vmm.Machine] and
// [vmm.Adopter].
//
//	backend := qemu.New(qemu.Options{})
//	spec, err := backend.Describe(ctx, vmm.Spec{CPUCount: 1, MemorySize: 1 << 30})
//	m, err := backend.Start(ctx, vmm.Config{Spec: spec, Dir: "/run/drafter/vm1", Memory: memfd, NUMANode: -1,
//		Boot: &vmm.Boot{Kernel: "vmlinux", Initrd: "initrd.img"}})
//
// # The machine
//
// A q35 board of one fixed version without the devices nobody needs, qboot instead of a BIOS, one serial port, and
// virtio devices on PCI: disks in the order of the description, one network interface, one serial port named
// org.drafter.vsock that carries the guest channel, an entropy source and a balloon. What the guest can see follows from
// [vmm.Spec] and the machine version alone, never from the host, so that a saved machine fits into a new process.
//
// RAM is a memory-backend-file over the caller's memfd, reached as /proc/self/fd/N. (memory-backend-memfd would be
// saved with the devices: QEMU skips only RAM that has a path.) Saving is QEMU's migration with the capability
// x-ignore-shared into a pipe; what comes out is the state of the devices, some 300 KB.
//
// KVM is used when /dev/kvm opens and the processor has vmx or svm, or when asked for; else TCG, which needs nothing and
// is slow. A machine saved under one cannot be loaded under the other.
//
// # Files in Config.Dir
//
//	qmp.sock      QEMU's control socket; one client at a time: the owner
//	serial.sock   the console; free for others when the Config has neither SerialOutput nor SerialInput
//	channel.sock  the guest channel (vmm.GuestChannel), if Spec.Sockets; whoever serves the guest's sockets dials it
//	qemu.json     which process this is, for Adopt
//
// We create and bind these sockets and QEMU inherits them listening. There is no moment at which a connection is
// refused: it waits in the backlog until QEMU answers, and fails when QEMU dies. NBD sockets of disks must be in Dir too.
//
// # Confinement
//
// QEMU runs with its seccomp sandbox (no exec, no privileged or resource-controlling calls). Started by root it also
// changes its root directory to Dir before the guest runs its first instruction, so NBD is dialled by names relative to
// Dir and can be dialled again. With Config.UID or GID, QEMU switches to that user in the same moment, itself: only the
// set-up (opening RAM, disks, the interface) is privileged, which is why the files of disks and the memfd need no other
// owner and why, unlike a process that is started as the user and keeps CAP_SYS_CHROOT to change its root, it
// has no capability left and no way out. Dir then belongs to the group GID with mode 0710, so that QEMU can reach the
// NBD sockets in it, which are given to the user, and can create nothing.
//
// # Network
//
// A tap device that exists. A guest that was loaded is announced by broadcast RARP frames: by Announce, before it runs, so
// that its packets wait in the queue of the tap device (txqueuelen, 1000 by default), and some more times by Resume and
// soon after. A guest that goes on after a Pause, or was adopted, is announced by QEMU, at once.
//
// # Concurrency
//
// As [vmm.Machine] says. Every machine has these goroutines, which have all ended when Done is closed: the reader of
// QMP, the waiter for the process and its stderr, and two or three that pump the console. Two exceptions, both the
// caller's readers and writers: a goroutine that reads Config.SerialInput ends only when that Read returns (one with
// SetReadDeadline, such as a pipe or a connection, is interrupted), and a Write to Config.SerialOutput that hangs is
// waited for one second.
//
// # What it does not do
//
// It does not track or copy RAM, does not serve disks, and does not multiplex the guest channel. It does not set the
// guest's clock. It has no hotplug.
package qemu
