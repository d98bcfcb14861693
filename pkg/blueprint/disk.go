package blueprint

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// mke2fsMinimum is the first e2fsprogs whose mke2fs fills a file system from a tar archive and honours
// SOURCE_DATE_EPOCH everywhere; 1.47.0 of Debian 12 gives other bytes on each run.
const mke2fsMinimum = "1.47.2"

// toolbox is programs of the distribution, unpacked in the cache and run with their own libraries and their own program
// loader: what they do depends on the lock, not on the host.
type toolbox struct{ dir string }

// toolPath tells which parts of tool packages are unpacked: programs, libraries, the loader.
func toolPath(p string) bool {
	dir, name := filepath.Split(strings.TrimPrefix(p, "/usr"))
	return (dir == "/bin/" || dir == "/sbin/") && (name == "mke2fs" || name == "depmod" || name == "kmod") ||
		dir == "/lib64/" || dir == "/lib/x86_64-linux-gnu/" && strings.Contains(name, ".so")
}

// openToolbox unpacks the packages into the cache, unless an earlier build has.
func (c *cache) openToolbox(ctx context.Context, packages []Package) (*toolbox, error) {
	key := sha256.New()
	for _, p := range packages {
		fmt.Fprintln(key, p.SHA256)
	}
	box := &toolbox{filepath.Join(c.dir, "tools", hex.EncodeToString(key.Sum(nil))[:32])}
	if _, err := os.Stat(box.dir); err == nil {
		return box, nil
	}
	tmp, err := os.MkdirTemp(filepath.Join(c.dir, "tools"), ".new-*")
	if err != nil {
		return nil, fmt.Errorf("unpack tools: %w", err)
	}
	defer os.RemoveAll(tmp)
	s, err := newSpool(tmp)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	debs, err := c.openAll(ctx, packages, s, toolPath, func(_, _ int64) {})
	if err != nil {
		return nil, err
	}
	// A flat folder: loader, libraries and programs by name. Within it no link leads anywhere else.
	root, err := os.OpenRoot(tmp)
	if err != nil {
		return nil, fmt.Errorf("unpack tools: %w", err)
	}
	defer root.Close()
	for _, d := range debs {
		for _, f := range d.files {
			name := filepath.Base(f.path)
			switch {
			case f.node == nil || f.node.typ == '5':
				continue
			case f.node.typ == '2':
				if target := filepath.Base(f.node.link); target != name {
					if err := root.Symlink(target, name); err != nil && !errors.Is(err, os.ErrExist) {
						return nil, fmt.Errorf("unpack tools: %w", err)
					}
				}
			default:
				w, err := root.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o755)
				if err != nil {
					return nil, fmt.Errorf("unpack tools: %w", err)
				}
				err = f.node.content.writeTo(w)
				if err := errors.Join(err, w.Close()); err != nil {
					return nil, fmt.Errorf("unpack tools: %w", err)
				}
			}
		}
	}
	if err := os.Chmod(tmp, 0o755); err != nil {
		return nil, err
	}
	if err := os.Rename(tmp, box.dir); err != nil {
		if _, statErr := os.Stat(box.dir); statErr == nil {
			return box, nil // another build was faster
		}
		return nil, fmt.Errorf("unpack tools: %w", err)
	}
	return box, nil
}

// command prepares a run of a program of the box.
func (b *toolbox) command(ctx context.Context, name string, args ...string) *exec.Cmd {
	// depmod is a link to kmod, which goes by the name it is called by.
	argv := append([]string{"--argv0", name, "--library-path", b.dir, filepath.Join(b.dir, name)}, args...)
	cmd := exec.CommandContext(ctx, filepath.Join(b.dir, "ld-linux-x86-64.so.2"), argv...)
	cmd.Env = []string{"LC_ALL=C.UTF-8", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "TZ=UTC"}
	return cmd
}

// writeTo writes the content to w.
func (c content) writeTo(w io.Writer) error {
	_, err := io.Copy(w, c.reader())
	return err
}

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

// rootUUID and rootHashSeed are fixed: the same content gives the same bytes. Guests of one blueprint are told apart by
// more than their disk's UUID, which nothing mounts by.
const (
	rootLabel    = "drafter-root"
	rootUUID     = "d7af7e70-0000-4000-8000-000000000001"
	rootHashSeed = "d7af7e70-0000-4000-8000-000000000002"
)

const (
	journalMiB = 16
	mib        = 1 << 20
)

// diskSize returns the size for a file system that holds the tree: the least, and a good default with room to grow.
func diskSize(t *tree) (least, usual int64) {
	used, inodes := t.usage()
	least = used + used/64 + int64(inodes)*256 + (journalMiB+16)*mib
	usual = (least + least/10 + 512*mib + 64*mib - 1) / (64 * mib) * (64 * mib)
	return least, usual
}

// makeExt4 writes the tree as an ext4 file system of size bytes to path.
func (b *toolbox) makeExt4(ctx context.Context, t *tree, path string, size, epoch int64, progress func(done, total int64)) error {
	least, _ := diskSize(t)
	if size < least {
		return fmt.Errorf("root disk of %d MiB has no space for the packages, which need %d MiB; raise --size", size/mib, (least+mib-1)/mib)
	}
	_, inodes := t.usage()
	conf := filepath.Join(filepath.Dir(path), ".mke2fs.conf")
	if err := os.WriteFile(conf, []byte(mke2fsConfig), 0o644); err != nil {
		return fmt.Errorf("make root disk: %w", err)
	}
	defer os.Remove(conf)

	args := []string{
		"-q", "-F", "-t", "ext4", "-L", rootLabel, "-U", rootUUID, "-m", "0", "-J", fmt.Sprintf("size=%d", journalMiB),
		"-E", "hash_seed=" + rootHashSeed + ",lazy_itable_init=0,lazy_journal_init=0,nodiscard,root_owner=0:0", "-d", "-",
	}
	if size/16384 < int64(inodes)+4096 {
		args = append(args, "-N", fmt.Sprint(inodes+8192))
	}
	cmd := b.command(ctx, "mke2fs", append(args, path, fmt.Sprintf("%dk", size/1024))...)
	cmd.Env = append(cmd.Env, "MKE2FS_CONFIG="+conf, fmt.Sprintf("SOURCE_DATE_EPOCH=%d", epoch))
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return fmt.Errorf("make root disk: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("make root disk: start mke2fs: %w", err)
	}
	total, _ := t.usage()
	writeErr := t.writeTar(ctx, stdin, epoch, counter(total, progress))
	closeErr := stdin.Close()
	if err := cmd.Wait(); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return fmt.Errorf("make root disk: mke2fs: %w: %s", err, strings.TrimSpace(output.String()))
	}
	if err := errors.Join(writeErr, closeErr); err != nil {
		return fmt.Errorf("make root disk: %w", err)
	}
	return nil
}
