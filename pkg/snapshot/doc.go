// Package snapshot turns a blueprint into a package: it boots the blueprint's kernel and disks in a machine, waits until the
// guest says that it is up, suspends it and writes everything down, so that from then on nobody has to boot it again.
//
//	_, err := snapshot.Create(ctx, snapshot.Config{
//		Backend: qemu.New(qemu.Options{}),
//		Devices: []snapshot.Device{
//			{Name: "kernel", Input: "out/blueprint/vmlinux", Output: "out/package/vmlinux"},
//			{Name: "disk", Input: "out/blueprint/rootfs.ext4", Output: "out/package/rootfs.ext4"},
//			{Name: "config", Output: "out/package/config.json"},
//			{Name: "memory", Output: "out/package/memory.bin"},
//			{Name: "state", Output: "out/package/state.bin"},
//		},
//		MemorySize: 512 << 20,
//	})
//
// # Invariants
//
//   - Inputs are only read: the machine runs on copies.
//   - Outputs appear all at once, under their names, when the package is complete. After an error or a cancellation there is
//     none of them, and what was there before is still there.
//   - When the package has been written, no machine of it runs.
//
// # What it does not do
//
// It builds no blueprints (package blueprint) and packs no archives (package vmpackage).
package snapshot
