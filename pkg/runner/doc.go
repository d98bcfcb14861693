// Package runner runs an instance on this host: it opens the instance's devices, gives them to a machine, and keeps the
// machine's memory, sockets and records in order until the instance is closed. It knows no network and no peers; package
// peer moves instances between hosts.
//
//	i, err := runner.Resume(ctx, runner.Config{
//		Backend: qemu.New(qemu.Options{}),
//		Devices: []runner.DeviceConfig{
//			{Name: "state", Base: "out/package/state.bin", Overlay: "out/i/overlay/state.bin", State: "out/i/state/state.bin"},
//			{Name: "memory", Base: "out/package/memory.bin", Overlay: "out/i/overlay/memory.bin", State: "out/i/state/memory.bin"},
//			{Name: "disk", Base: "out/package/rootfs.ext4", Overlay: "out/i/overlay/rootfs.ext4", State: "out/i/state/rootfs.ext4"},
//			{Name: "config", Base: "out/package/config.json"},
//		},
//	})
//	if err != nil { … }
//	fmt.Println(i.VMPath())       // the folder with the machine's sockets
//	err = i.Close(ctx)            // suspends and saves it; Resume goes on from there
//
// # An instance
//
// Its devices are files on this host. With overlays, everything that changes goes there and the base is only read, so that
// any number of instances can share one. Without, the base is the instance: disks are written in place, memory and state
// are replaced when it is closed. Files are locked while they are in use; a second process that wants them is refused.
//
// The state device begins with a [Record], which says whether what the devices hold can be run, and from what: see
// [Status]. It is written before the fact it allows (Running before the guest may write to a disk, Moved before another peer
// may run), and Saved is written after memory and disks are durable. A crash at any point therefore leaves a status
// that is true.
//
// # When this process dies
//
// The machine is a process of its own and lives on when its owner is killed. Whoever starts the instance again finds it and
// takes it over ([Adopt]; Resume and Boot do so, too), in whatever state the two were. The guest notices a pause of its
// disks, and perhaps of what touches memory that was being filled.
//
// The machine holds what the next owner needs, by descriptors that it inherited and never looks at: the locks on the
// instance and on its folder, its memory, and which blocks its disks' overlays hold and have received ([block.OverlayOptions],
// Live). So that an instance has a living machine, and which process that is, is the kernel's word and nobody's note: it is
// the one that holds the lock on the instance. What the kernel does not know is in the folder: machine.json (the
// description, the user), agent.json (which call to the guest's agent must be repeated), late.json (whose memory this is).
//
// A folder of which nobody holds the lock is of a machine that has ended, and is removed when another one is made beside it.
//
// An instance that was given away when its machine ended has no machine to take over, and another host may need what its files hold:
// [OpenGiven].
//
// # When the guest runs before all of it has arrived
//
// Between Prepare and Load, [Instance.Postpone] says what of memory and disks is not here yet. What the guest touches of that
// is asked for, and the guest waits; everything comes by [Late]. What is missing of a disk is on a list beside the
// overlay's state, durable with each flush of the guest, so that a power cut costs no more than it does otherwise; what is
// missing of memory is a hole in it. A kernel and an initrd are listed as a disk is; nobody waits for them but Boot. Adopt, and Boot after a
// power cut, have the same devices again ([Config].OnLate). [Instance.Complete] ends it.
//
// When the machine ends before all has arrived, its memory is not needed any more, and the disks go on arriving.
//
// # Returning to the commit point
//
// An instance that died with its machine boots again ([Boot]), or, where Config.KeepCommitPoint was set, returns to what it was
// when it was resumed or received (Config.Rollback, for Resume). What the guest writes to disks is kept apart in layers until
// then, and memory that is received is written down; the record says with one flag what is valid. See
// docs/decisions/0004-rollback.md.
//
// # Invariants
//
//   - An instance has at most one living machine, and a machine at most one owner.
//   - When Resume, Boot or Prepare fails, nothing is left running, and files they made are removed. An instance whose guest
//     has run before Resume failed (its agent did not answer) is saved first.
//   - The guest's memory is our memfd; the machine maps it. It is filled lazily on Resume, and tracked for writes only
//     while a migration asks for it.
//   - Everything of a running instance that is not a device lies below Host.Dir/HYPERVISOR/ID, in a folder of mode 0700, and
//     is gone after Close.
//
// # Concurrency
//
// The methods of an Instance may be called by any goroutine. Those that change its phase exclude each other and may take
// as long as a guest's agent does.
//
// # What it does not do
//
// It makes no network: the tap interface in Host.Netns must exist. It does not restart guests that shut down or reboot.
package runner
