package blueprint

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/drafter-vm/drafter/pkg/filetree"
)

// mke2fsMinimum is the first e2fsprogs whose mke2fs fills a file system from a tar archive and honours
// SOURCE_DATE_EPOCH everywhere; 1.47.0 of Debian 12 gives other bytes on each run.
const mke2fsMinimum = "1.47.2"

// toolbox is programs of the distribution, unpacked in the cache and run with their own libraries and their own program
// loader: what they do depends on the lock, not on the host.
type toolbox struct{ dir string }

// toolVersion is raised when toolPath tells something else.
const toolVersion = 2

// toolPath tells which parts of tool packages are unpacked: programs, libraries, the loader.
func toolPath(p string) bool {
	dir, name := filepath.Split(strings.TrimPrefix(p, "/usr"))
	return (dir == "/bin/" || dir == "/sbin/") && (name == "mke2fs" || name == "debugfs" || name == "depmod" || name == "kmod") ||
		dir == "/lib64/" || dir == "/lib/x86_64-linux-gnu/" && strings.Contains(name, ".so")
}

// openToolbox unpacks the packages into the cache, unless an earlier build has.
func (c *cache) openToolbox(ctx context.Context, packages []Package) (*toolbox, error) {
	key := sha256.New()
	fmt.Fprintln(key, toolVersion)
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
	s, err := filetree.NewSpool(tmp)
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
			case f.node == nil || f.node.Type == '5':
				continue
			case f.node.Type == '2':
				if target := filepath.Base(f.node.Link); target != name {
					if err := root.Symlink(target, name); err != nil && !errors.Is(err, os.ErrExist) {
						return nil, fmt.Errorf("unpack tools: %w", err)
					}
				}
			default:
				w, err := root.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o755)
				if err != nil {
					return nil, fmt.Errorf("unpack tools: %w", err)
				}
				err = f.node.Content.CopyTo(w)
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

// rootUUID and rootHashSeed are fixed: the same content gives the same bytes. Guests of one blueprint are told apart by
// more than their disk's UUID, which nothing mounts by.
const (
	rootLabel    = "drafter-root"
	rootUUID     = "d7af7e70-0000-4000-8000-000000000001"
	rootHashSeed = "d7af7e70-0000-4000-8000-000000000002"
)

// mke2fs prepares a run of mke2fs.
func (b *toolbox) mke2fs(ctx context.Context, args ...string) *exec.Cmd {
	return b.command(ctx, "mke2fs", args...)
}

// makeExt4 writes the tree as an ext4 file system of size bytes to path; 0 is what is needed and room to grow.
func (b *toolbox) makeExt4(ctx context.Context, t *filetree.Tree, path string, size, epoch int64, progress func(done, total int64)) error {
	err := t.WriteExt4(ctx, path, filetree.Ext4{
		Mke2fs: b.mke2fs, Size: size, Label: rootLabel, UUID: rootUUID, HashSeed: rootHashSeed, Epoch: epoch, Progress: progress,
	})
	if errors.Is(err, filetree.ErrNoSpace) {
		err = fmt.Errorf("%w; raise --size", err)
	}
	if err != nil {
		return fmt.Errorf("make root disk: %w", err)
	}
	return nil
}

// Tools are programs of the distribution that a blueprint is built with, for those who make more disks. They run with their own libraries,
// whatever the host is.
type Tools struct{ box *toolbox }

// OpenTools finds the tools in the cache, and downloads what is not there. Of cfg, Mirror, AptDir, Cache, Progress and Logger count.
func OpenTools(ctx context.Context, cfg Config) (*Tools, error) {
	cfg = Config{Mirror: cfg.Mirror, AptDir: cfg.AptDir, Cache: cfg.Cache, Progress: cfg.Progress, Logger: cfg.Logger}.withDefaults()
	c, err := newCache(cfg.Cache)
	if err != nil {
		return nil, err
	}
	lock, err := parseLock(defaultLock)
	if err != nil {
		return nil, fmt.Errorf("read built-in lock: %w", err)
	}
	b := &build{cfg: cfg, cache: c, log: cfg.Logger}
	if err := b.findArchives(); err != nil {
		return nil, err
	}
	gone, err := c.fetchAll(ctx, lock.tools, b.archives, b.progress("download tools"))
	if err != nil {
		return nil, err
	}
	if len(gone) > 0 { // the archive has newer ones
		if lock, err = b.resolve(ctx, lock); err != nil {
			return nil, err
		}
		if gone, err = c.fetchAll(ctx, lock.tools, b.archives, b.progress("download tools")); err != nil {
			return nil, err
		}
		if len(gone) > 0 {
			return nil, fmt.Errorf("the archive's index names package %s, which it does not serve; it may be changing, try again or another --mirror", gone[0])
		}
	}
	box, err := c.openToolbox(ctx, lock.tools)
	if err != nil {
		return nil, err
	}
	return &Tools{box}, nil
}

// Mke2fs prepares a run of mke2fs, of a version that can fill a file system from a tar archive.
func (t *Tools) Mke2fs(ctx context.Context, args ...string) *exec.Cmd {
	return t.box.mke2fs(ctx, args...)
}

// Debugfs prepares a run of debugfs of the same version.
func (t *Tools) Debugfs(ctx context.Context, args ...string) *exec.Cmd {
	return t.box.command(ctx, "debugfs", args...)
}
