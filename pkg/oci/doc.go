// Package oci makes disks for virtual machines of OCI images: image → runtime bundle → disk. It runs without privileges, mounts and helpers.
//
//	image, err := oci.Open(ctx, "docker://valkey/valkey:8", oci.OpenOptions{})
//	defer image.Close()
//	b, err := image.Bundle(ctx, oci.BundleOptions{Settings: oci.Settings{Env: []string{"TZ=UTC"}}})
//	defer b.Close()
//	err = b.WriteFolder(ctx, "out/oci-runtime-bundle")                                // to be edited, or
//	err = b.WriteDisk(ctx, "out/blueprint/oci.ext4", oci.DiskOptions{Mke2fs: tools.Mke2fs, Debugfs: tools.Debugfs}) // to be run
//
// A folder, of ours, umoci's or podman's, becomes a bundle again by [OpenFolder]. What the guest does with the disk is in package
// [github.com/drafter-vm/drafter/pkg/oci/supervise], what both have to agree on in [github.com/drafter-vm/drafter/pkg/oci/bundle].
//
// # Invariants
//
//   - The root file system is laid out in memory (package filetree), large contents in one unnamed file; owners, devices and attributes are what the
//     image says, whoever asks. A folder made by one who may not give files away says beside it what they should be.
//   - Nothing of an archive is a path of this host. Paths and links that lead out of the image, hard links to nothing, files of other kinds, and more
//     than [Limits] allow are errors; so is any digest that is not what refers to it says: of the manifest and the configuration when an image is
//     opened, of each layer as it was fetched and as it unpacks when it is laid out.
//   - What is written appears complete or not at all.
//
// # Rules
//
// Layers and whiteouts, and how a configuration becomes config.json: https://github.com/opencontainers/image-spec, layer.md, config.md and conversion.md.
// Beyond these, a container has the capabilities that docker and podman grant, the guest's network, no terminal, and its volumes (VOLUME) are
// ordinary directories until one is mounted there.
//
// # Concurrency
//
// An [Image] may be used by several goroutines, a [Bundle] by one at a time.
//
// # What it does not do
//
// It builds no images, and signs and pushes nothing (packages of virtual machines: package registry).
package oci
