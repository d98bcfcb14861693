// Package block holds the devices a virtual machine is made of, and what one does with devices.
//
// Everything a machine consists of (disks, RAM, saved device state, kernel) is a [Device]: a fixed-size array of bytes
// that is read, written, discarded and flushed. The contract is in block.go, and [blocktest.Run] is the same contract as
// a test suite, which every implementation passes, here and in other packages.
//
// # The devices
//
//   - [File]: a file or a host block device.
//   - [Memory]: bytes in this process, for tests.
//   - [Overlay]: a read-only base plus a sparse file with the blocks that were changed plus a small state file that says
//     which those are. Many instances share a base this way. It survives a power cut at any instruction. The base may be another
//     overlay, which then is only read and may have others over it, too. [Overlay.Commit] folds one into its base,
//     [Overlay.Rebase] puts it over another, and [InspectOverlay] reads what its files say.
//   - [Tracked]: another device, recording which pages are written, for the rounds of a migration.
//   - [Lazy]: another device whose blocks arrive while it is in use; reading what is missing waits for it.
//
// They stack: what a migrated disk is while it arrives is a Tracked over a Lazy over an Overlay over a File. A device that
// wraps another one owns it: closing the outermost closes all. What a device does not know cheaply about its
// holes it answers with "may be data"; ask by [NextData], which works for every Device.
//
// # Durability
//
// A write is durable after a [Device.Flush] that was called after the write returned, and not before: this is the
// contract of a disk with a write cache, and guests are built for it. After a crash every flushed write is there, and
// each byte written since the last flush is either the old or a newer value. A Flush that failed to sync the
// file is not followed by one that succeeds: the kernel may have dropped the data, so the Overlay refuses
// further writes until it is opened anew.
//
// # Concurrency
//
// Every method of every Device may be called from any goroutine at any time, Close included. Nothing in this package
// starts a goroutine that outlives the call that started it.
//
// # An example
//
//	base, err := block.OpenFile("package/disk", block.FileOptions{ReadOnly: true})
//	if err != nil {
//		return err
//	}
//	disk, err := block.OpenOverlay(block.OverlayOptions{
//		Base: base, BasePath: "package/disk",
//		Overlay: "instance/disk.overlay", State: "instance/disk.state",
//	})
//	if err != nil {
//		return errors.Join(err, base.Close())
//	}
//	defer disk.Close() // flushes, and closes base
//
//	tracked := block.NewTracked(disk)
//	if err := tracked.Start(ctx); err != nil {
//		return err
//	}
//	// … the guest writes; then, as often as it takes:
//	dirty, err := tracked.Collect(ctx)
//	// … send what dirty lists, reading it after Collect.
//
// # What it does not do
//
// It resizes nothing, encrypts nothing and knows no image formats: a device is plain bytes. [Digest] finds accidents,
// not forgeries.
//
// [blocktest.Run]: https://pkg.go.dev/github.com/drafter-vm/drafter/pkg/block/blocktest#Run
package block
