package oci

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"

	"github.com/drafter-vm/drafter/pkg/filetree"
	"github.com/drafter-vm/drafter/pkg/oci/bundle"
)

// DiskOptions say how a bundle becomes a disk.
type DiskOptions struct {
	// Mke2fs and Debugfs prepare runs of these programs: see [filetree.Ext4]. Required.
	Mke2fs, Debugfs func(ctx context.Context, args ...string) *exec.Cmd

	// Size of the disk in bytes. 0: what the bundle takes, and half a GiB or more for what the container writes.
	Size int64

	Progress func(Progress) // nil is allowed
}

// WriteDisk writes the bundle as a disk for a guest, to a file that appears when it is complete.
func (b *Bundle) WriteDisk(ctx context.Context, file string, opts DiskOptions) error {
	if _, err := b.writeDisk(ctx, file, opts); err != nil {
		return fmt.Errorf("write disk %q: %w", file, err)
	}
	return nil
}

// writeDisk is WriteDisk, and returns config.json as it is on the disk.
func (b *Bundle) writeDisk(ctx context.Context, file string, opts DiskOptions) (config []byte, err error) {
	if config, err = b.SpecText(); err != nil {
		return nil, err
	}
	if err := b.tree.WriteFile("/"+bundle.ConfigFile, string(config), 0o644); err != nil {
		return nil, err
	}
	return config, writeExt4(ctx, b.tree, file, bundle.Label, config, opts)
}

// WriteVolume makes the disk of a volume, of size bytes (0: half a GiB and what is in it), which has at first what the bundle has where it will be
// mounted, with its owner.
func (b *Bundle) WriteVolume(ctx context.Context, file string, m Mount, opts DiskOptions) error {
	content := &filetree.Node{Type: tar.TypeDir, Mode: 0o755}
	if n := b.rootfs().Find(m.Target, true); n != nil && n.Type == tar.TypeDir {
		content = n
	}
	tree := filetree.New(b.tree.Spool)
	children := tree.Root.Children
	*tree.Root = *content
	if tree.Root.Children == nil {
		tree.Root.Children = children
	}
	opts.Size = m.Size
	if err := writeExt4(ctx, tree, file, m.Source, []byte("volume "+m.Source), opts); err != nil {
		return fmt.Errorf("write volume %q to %q: %w", m.Source, file, err)
	}
	return nil
}

// Volumes are those among the settings' mounts, each once.
func (s Settings) Volumes() []Mount {
	var list []Mount
	seen := map[string]bool{}
	for _, m := range s.Mounts {
		if m.Type == VolumeMount && !seen[m.Source] {
			seen[m.Source] = true
			list = append(list, m)
		}
	}
	return list
}

func writeExt4(ctx context.Context, tree *filetree.Tree, file, label string, identity []byte, opts DiskOptions) (err error) {
	if opts.Progress == nil {
		opts.Progress = func(Progress) {}
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	if info, err := os.Stat(file); err == nil && !info.Mode().IsRegular() {
		return errors.New("it is there, and no file")
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	tmp, err := os.MkdirTemp(filepath.Dir(file), "."+path.Base(file)+"-*")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(tmp)) }()
	part := filepath.Join(tmp, "disk")
	youngest := int64(1)
	_ = tree.Each("/", func(_ string, n *filetree.Node) error { // f never fails
		youngest = max(youngest, n.ModTime)
		return nil
	})
	err = tree.WriteExt4(ctx, part, filetree.Ext4{
		Mke2fs: opts.Mke2fs, Debugfs: opts.Debugfs, Size: opts.Size, Label: label, UUID: uuidOf(identity, "file system"), HashSeed: uuidOf(identity, "hash seed"), Epoch: youngest, KeepTimes: true,
		Progress: func(done, total int64) { opts.Progress(Progress{"write disk", done, total}) },
	})
	if errors.Is(err, filetree.ErrNoSpace) {
		err = fmt.Errorf("%w; give a larger size", err)
	}
	if err != nil {
		return err
	}
	f, err := os.OpenFile(part, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(part, file)
}

// uuidOf is a UUID that is the same for the same content (RFC 9562, version 8).
func uuidOf(identity []byte, what string) string {
	h := sha256.Sum256(append(append([]byte(what), 0), identity...))
	h[6], h[8] = h[6]&0x0f|0x80, h[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", h[0:4], h[4:6], h[6:8], h[8:10], h[10:16])
}
