// Package registry keeps packages in OCI registries: it pushes and pulls them, and VMs start from there before they have been fetched.
//
//	ref, err := registry.ParseReference("oci://registry.example/vms/web:1")
//	pushed, err := registry.Push(ctx, "out/package", ref, registry.PushOptions{})     // what is there already is not sent
//	fmt.Println(pushed.Reference)                                                     // oci://…@sha256:…, which pins every byte
//	pulled, err := registry.Pull(ctx, ref, "out/web", registry.PullOptions{})         // again, after an interruption, goes on
//
//	p, err := registry.Open(ctx, ref, registry.OpenOptions{})
//	vm, report, err := peer.Receive(ctx, cfg, streams)                                // with streams of p.Dial: it runs at once
//
// # What is where
//
// A tag names an OCI image index, with a manifest for each platform. A manifest's layers are the package's own manifest; an index for each device, in
// its order; and packs. A pack is frames of zstd in a row, each the content of one chunk of a device, and the seek table of zstd's seekable format. An
// index says where each chunk of its device is: in which pack, where, how long, and what its SHA-256 is. Chunks of zeros are nowhere, and the same
// content is once in what is pushed together. docs/registry.md has the bytes.
//
// A package may refer to packs of others, as long as its manifest lists them: so whoever copies it, or collects garbage, knows of them, and knows
// nothing else of the format. That is how a second package of the same base is pushed by what differs.
//
// # What is trusted
//
// Nothing, but the digest that one began with. Manifests and indexes are held against their digests, each chunk against that in its index, and a
// device that was pulled, whole, against its own. A tag says what it says: pin what matters.
//
// All that is read is bounded, before anything is made of it.
//
// # When something fails
//
// Requests are made again, a few times, when what fails may be fleeting: also one of which nothing comes for a while, so that a registry that hangs
// holds nobody up for ever. A device that cannot be read fails, and may succeed the next time: a peer that lacks content of it keeps its guest frozen, and
// asks again.
//
// # Concurrency
//
// Functions may be called by any number of goroutines at once, as long as they do not write to the same folder or tag. Who pushes to a tag that
// others push to for other platforms at the same time does it again when it was overtaken; for the same platform, the later one stays.
//
// # What it does not do
//
// It signs nothing: tools that sign manifests by digest do. It does not encrypt: a package holds the memory of its guest, and with it secrets. It
// removes nothing from a registry.
package registry
