// Package vmpackage keeps a virtual machine as files: it packs, extracts, verifies and opens packages.
//
// A package is the devices of one VM, as they were when it was suspended, plus a manifest that says what they are. It
// comes in two forms that hold the same files:
//
//   - a folder, from which a VM can be started at once ([Open]);
//   - an archive, one .tar.zst of that folder, to store and to ship ([Pack], [Extract]).
//
// A folder looks like this; devices beyond the known ones are additional disks:
//
//	manifest.json   what the package is; first in the archive
//	state.bin       "state": device state of the hypervisor and the record of who owns the instance
//	memory.bin      "memory": guest RAM, mostly holes
//	vmlinux         "kernel"
//	initrd.img      "initrd"
//	rootfs.ext4     "disk": the root disk
//	config.json     "config": what the guest can see of its machine (vmm.Spec as JSON, padded, see [EncodeConfig])
//	oci.ext4        "oci": an OCI bundle
//	data.img        "data": an additional disk of that name
//
// No device is mandatory here: a package without state and memory is a blueprint in an archive. Who needs a device says
// so when it is missing.
//
// # Example
//
//	devices := []vmpackage.File{{Name: "disk", Path: "out/package/rootfs.ext4"}, {Name: "config", Path: "out/package/config.json"}}
//	if _, err := vmpackage.Pack(ctx, "app.tar.zst", devices, vmpackage.PackOptions{}); err != nil { … }
//	if _, err := vmpackage.Extract(ctx, "app.tar.zst", elsewhere, vmpackage.ExtractOptions{}); err != nil { … }
//
//	pkg, err := vmpackage.Open("out/package")
//	for _, d := range pkg.Devices { fmt.Println(d.Name, d.Path, d.Size) }
//
// # The archive
//
// An archive is a tar in the POSIX (pax) format inside zstd, readable by GNU tar: `tar -xf app.tar.zst` makes the
// folder, holes included, and `tar -tvf` lists it. What a writer must produce, and what a reader may rely on:
//
//   - The first entry is manifest.json, at most 1 MiB, whose formatVersion is [FormatVersion].
//   - One regular file per device of the manifest follows, named by the device's "file", which is [DefaultFile] of its
//     name. There is nothing else.
//   - A device without a 4 KiB block of zeros is stored as it is. Any other is a sparse file in the pax format 1.0 of
//     GNU tar: records GNU.sparse.major=1, .minor=0, .name and .realsize, and before the data a map of decimal
//     numbers. Zero blocks are found by content, not by the holes of the file, so that equal devices pack equally.
//     The map is kept below 1 MiB, which is what archive/tar reads: short holes of a very fragmented device are stored
//     as zeros.
//   - Times, owners and modes are constants, the order is that of the manifest, and zstd's output does not depend on
//     the number of cores: the same devices give the same bytes, with the same version of the compressor.
//
// # Invariants
//
//   - Each device's sha256 is that of its whole content, zeros included: sha256sum says the same.
//   - Nothing half-written gets a name: files are written beside their place under a temporary name, verified, synced
//     and renamed. After an error or a cancellation no temporary file and no new folder is left.
//   - Extract writes to the paths its caller gave and nowhere else. Names in an archive select devices; they are never
//     used as paths.
//   - What comes from an archive is bounded by its manifest, and the manifest by constants.
//
// Functions may be called concurrently, as long as they do not write the same files. The package holds no state.
//
// # What it does not do
//
// It does not sign or encrypt: a digest proves that devices belong to their manifest, not who made it. A package holds
// the guest's RAM and therefore its secrets; files are created with mode 0600. It does not know what a machine
// configuration means, beyond the fields the manifest repeats.
package vmpackage
