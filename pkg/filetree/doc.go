// Package filetree puts a file system together in memory and writes it, as a tar archive or as an ext4 file system, without a privilege or a mount:
// nothing of it exists on the host's file systems, so its files may have any owner, mode, attribute or device number.
//
//	spool, err := filetree.NewSpool(dir) // large contents wait in an unnamed file there
//	tree := filetree.New(spool)
//	err = tree.WriteFile("/etc/hostname", "guest\n", 0o644)
//	err = tree.WriteExt4(ctx, "disk.ext4", filetree.Ext4{Mke2fs: tools.Mke2fs, Label: "data", UUID: …, HashSeed: …})
//
// # Invariants
//
//   - Symbolic links are followed within the tree, and lead nowhere else.
//   - The same tree gives the same bytes.
//
// One goroutine at a time uses a tree; a spool may be put into by several.
//
// # What it does not do
//
// It neither brings mke2fs (package blueprint does) nor reads file systems.
package filetree

import "embed"

// Sources is the source text of this package: a part of what determines the bytes that it makes.
//
//go:embed *.go
var Sources embed.FS
