// Package vmm is the contract between Drafter and a hypervisor: [Backend] starts machines, [Machine] is one process
// with one virtual machine that can be paused, saved, loaded and resumed, and [Adopter] takes over a machine whose
// owner died.
//
//	spec, err := backend.Describe(ctx, vmm.Spec{CPUCount: 1, MemorySize: 1 << 30, Disks: disks})
//	m, err := backend.Start(ctx, vmm.Config{Spec: spec, Dir: dir, Memory: memfd, Boot: &boot, NUMANode: -1})
//	…
//	err = m.Pause(ctx)
//	err = m.Save(ctx, state)  // device state; RAM and disks are the caller's own
//
// and somewhere else, with the same Spec, the same RAM and the same disks:
//
//	m, err := backend.Start(ctx, vmm.Config{Spec: spec, Dir: dir, Memory: memfd, NUMANode: -1})
//	err = m.Load(ctx, state)
//	err = m.Resume(ctx)
//
// # What holds for every backend
//
//   - Guest RAM is a memfd of the caller, mapped shared; device state travels apart from it. A machine therefore costs
//     nothing while nobody migrates, and RAM is tracked, sent and filled by other rooms.
//   - A VMM survives the process that started it. Its sockets are in Config.Dir, and it is no orphan: whoever has Dir
//     can adopt it.
//   - A machine that could not be started, or that was closed, leaves nothing: no process, socket, descriptor, cgroup.
//   - The guest never waits for somebody to read its console or its channel.
//   - Disk errors are reported to the guest, never answered by pausing the machine behind its owner's back.
//
// Package vmmtest holds the suite that proves this for a backend.
//
// # What this package does not do
//
// It chooses no backend, knows no file formats of packages, moves no RAM and serves no disk. It does not decide who owns
// a virtual machine: that Save was called, or Load succeeded, says nothing about who may Resume.
package vmm
