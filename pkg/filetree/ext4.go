package filetree

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
)

// Ext4 is a file system to make of a tree.
type Ext4 struct {
	// Mke2fs prepares a run of mke2fs, at least 1.47.2, the first that fills a file system from a tar archive and honours SOURCE_DATE_EPOCH
	// everywhere. Required.
	Mke2fs func(ctx context.Context, args ...string) *exec.Cmd

	// Debugfs prepares a run of debugfs of the same version, for attributes that mke2fs leaves out: all but security.capability. A tree without them needs none.
	Debugfs func(ctx context.Context, args ...string) *exec.Cmd

	// Size is that of the file system in bytes, a multiple of 1 KiB. 0: what [Tree.Ext4Size] says that is usual.
	Size int64

	Label          string
	UUID, HashSeed string // fixed ones, for the same bytes of the same tree

	// Epoch is when the file system was made, in seconds since 1970: see [Tree.WriteTar].
	Epoch int64

	// KeepTimes keeps those of files that are younger than Epoch.
	KeepTimes bool

	// Progress is told how many bytes of the tree were written. Nil is allowed.
	Progress func(done, total int64)
}

// ErrNoSpace is wrapped by the error of making a file system that is too small for its tree.
var ErrNoSpace = errors.New("it has no space")

// mke2fsConfig is all that mke2fs knows of its defaults: those of the host do not count.
const mke2fsConfig = `[defaults]
	base_features = sparse_super,large_file,filetype,resize_inode,dir_index,ext_attr
	default_mntopts = acl,user_xattr
	enable_periodic_fsck = 0
	blocksize = 4096
	inode_size = 256
	inode_ratio = 16384
[fs_types]
	ext4 = {
		features = has_journal,extent,huge_file,flex_bg,metadata_csum,64bit,dir_nlink,extra_isize
	}
`

const (
	journalMiB = 16
	mib        = 1 << 20
)

// Ext4Size returns the size for a file system that holds the tree, in bytes: the least, and a good default with room to grow.
func (t *Tree) Ext4Size() (least, usual int64) {
	used, inodes := t.Usage()
	least = used + used/64 + int64(inodes)*256 + (journalMiB+16)*mib
	usual = (least + least/10 + 512*mib + 64*mib - 1) / (64 * mib) * (64 * mib)
	return least, usual
}

// WriteExt4 writes the tree as an ext4 file system to the file path. It needs no privilege.
func (t *Tree) WriteExt4(ctx context.Context, path string, fs Ext4) error {
	least, usual := t.Ext4Size()
	if fs.Size == 0 {
		fs.Size = usual
	}
	if fs.Size < least {
		return fmt.Errorf("make file system of %d MiB: %w for what it is to hold, which needs %d MiB", fs.Size/mib, ErrNoSpace, (least+mib-1)/mib)
	}
	total, inodes := t.Usage()
	dir, err := os.MkdirTemp(filepath.Dir(path), ".mke2fs-*")
	if err != nil {
		return fmt.Errorf("make file system: %w", err)
	}
	defer os.RemoveAll(dir)
	conf := filepath.Join(dir, "mke2fs.conf")
	if err := os.WriteFile(conf, []byte(mke2fsConfig), 0o644); err != nil {
		return fmt.Errorf("make file system: %w", err)
	}

	args := []string{
		"-q", "-F", "-t", "ext4", "-L", fs.Label, "-U", fs.UUID, "-m", "0", "-J", fmt.Sprintf("size=%d", journalMiB),
		"-E", "hash_seed=" + fs.HashSeed + ",lazy_itable_init=0,lazy_journal_init=0,nodiscard,root_owner=0:0", "-d", "-",
	}
	if fs.Size/16384 < int64(inodes)+4096 {
		args = append(args, "-N", fmt.Sprint(inodes+8192))
	}
	cmd := fs.Mke2fs(ctx, append(args, path, fmt.Sprintf("%dk", fs.Size/1024))...)
	cmd.Env = append(cmd.Env, "MKE2FS_CONFIG="+conf, fmt.Sprintf("SOURCE_DATE_EPOCH=%d", fs.Epoch))
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return fmt.Errorf("make file system: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("make file system: start mke2fs: %w", err)
	}
	epoch := fs.Epoch
	if fs.KeepTimes {
		epoch = 0
	}
	var done atomic.Int64
	writeErr := t.WriteTar(ctx, stdin, epoch, func(n int64) {
		if fs.Progress != nil {
			fs.Progress(done.Add(n), total)
		}
	})
	closeErr := stdin.Close()
	if err := cmd.Wait(); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return fmt.Errorf("make file system: mke2fs: %w: %s", err, strings.TrimSpace(output.String()))
	}
	if err := errors.Join(writeErr, closeErr); err != nil {
		return fmt.Errorf("make file system: %w", err)
	}
	if err := t.setXAttrs(ctx, path, dir, fs); err != nil {
		return fmt.Errorf("make file system: set attributes: %w", err)
	}
	return nil
}

// inArchive is the one attribute that mke2fs 1.47 takes from an archive.
const inArchive = "security.capability"

// setXAttrs sets the others.
func (t *Tree) setXAttrs(ctx context.Context, path, tmp string, fs Ext4) error {
	var script strings.Builder
	values := 0
	seen := map[*Node]bool{}
	one := func(p string, n *Node) error {
		if seen[n] {
			return nil
		}
		seen[n] = true
		for _, name := range slices.Sorted(maps.Keys(n.XAttrs)) {
			if name == inArchive {
				continue
			}
			if strings.ContainsAny(p+name, "\"\n") {
				return fmt.Errorf("%q has attribute %q: a name with a quotation mark or a line break cannot have one", p, name)
			}
			value := filepath.Join(tmp, fmt.Sprint("value-", values))
			if err := os.WriteFile(value, []byte(n.XAttrs[name]), 0o600); err != nil {
				return err
			}
			values++
			fmt.Fprintf(&script, "ea_set -f %q \"%s\" \"%s\"\n", value, p, name)
		}
		return nil
	}
	if err := one("/", t.Root); err != nil {
		return err
	}
	if err := t.Each("/", one); err != nil || values == 0 {
		return err
	}
	if fs.Debugfs == nil {
		return errors.New("there is no debugfs")
	}
	commands := filepath.Join(tmp, "commands")
	if err := os.WriteFile(commands, []byte(script.String()), 0o600); err != nil {
		return err
	}
	cmd := fs.Debugfs(ctx, "-w", "-f", commands, path)
	cmd.Env = append(cmd.Env, fmt.Sprintf("SOURCE_DATE_EPOCH=%d", fs.Epoch))
	var complaints bytes.Buffer
	cmd.Stderr = &complaints
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return fmt.Errorf("debugfs: %w: %s", err, strings.TrimSpace(complaints.String()))
	}
	// It says what failed, and ends well all the same. Its first line is its version.
	if _, rest, _ := strings.Cut(complaints.String(), "\n"); strings.TrimSpace(rest) != "" {
		return fmt.Errorf("debugfs: %s", strings.TrimSpace(rest))
	}
	return nil
}
