package blueprint

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"

	"github.com/drafter-vm/drafter/pkg/filetree"
	"golang.org/x/sync/errgroup"
)

// deb is an opened .deb: what dpkg would register of it, and its files.
type deb struct {
	Package
	control stanza
	scripts map[string][]byte // files of the control archive: postinst, conffiles, md5sums, …
	files   []debFile
}

type debFile struct {
	path   string // "/usr/bin/x"
	node   *filetree.Node
	hardTo string // path of the file this is a hard link to
}

const (
	maxControl = 16 << 20 // bytes of one file of a control archive
	maxFiles   = 1 << 20  // files of one package

	// maxUnpacked bounds what one archive unpacks to, in bytes: far above any package, below what would fill a disk.
	maxUnpacked = 8 << 30
)

// openDeb reads the .deb at file, keeping the contents of its files in s. keep says which paths are wanted.
func openDeb(ctx context.Context, p Package, file string, s *filetree.Spool, keep func(path string) bool) (*deb, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, fmt.Errorf("open package %s: %w", p, err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("open package %s: %w", p, err)
	}
	d, err := readDeb(ctx, f, st.Size(), s, keep)
	if err != nil {
		return nil, fmt.Errorf("unpack package %s (%s): %w", p, file, err)
	}
	d.Package = p
	return d, nil
}

func readDeb(ctx context.Context, r io.ReaderAt, size int64, s *filetree.Spool, keep func(string) bool) (*deb, error) {
	archive, err := newArReader(r, size)
	if err != nil {
		return nil, err
	}
	d := &deb{scripts: map[string][]byte{}}
	for {
		name, data, err := archive.next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, err
		}
		part, suffix, _ := strings.Cut(name, ".tar")
		switch part {
		case "control":
			err = untar(data, suffix, func(h *tar.Header, r io.Reader) error {
				if h.Typeflag != tar.TypeReg {
					return nil
				}
				b, err := readLimited(r, maxControl)
				d.scripts[path.Clean("/" + h.Name)[1:]] = b
				return err
			})
			d.control = stanza(d.scripts["control"])
		case "data":
			err = untar(data, suffix, func(h *tar.Header, r io.Reader) error {
				if err := ctx.Err(); err != nil {
					return err
				}
				return d.addFile(h, r, s, keep)
			})
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
	}
	if d.control == nil {
		return nil, errors.New("it has no control file")
	}
	return d, nil
}

func (d *deb) addFile(h *tar.Header, r io.Reader, s *filetree.Spool, keep func(string) bool) error {
	f := debFile{path: path.Clean("/" + h.Name)}
	if f.path == "/" || !keep(f.path) {
		return nil
	}
	if len(d.files) == maxFiles {
		return fmt.Errorf("more than %d files", maxFiles)
	}
	switch h.Typeflag {
	case tar.TypeLink:
		f.hardTo = path.Clean("/" + h.Linkname)
	case tar.TypeReg, tar.TypeDir, tar.TypeSymlink, tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
		f.node = &filetree.Node{
			Type: h.Typeflag, Mode: uint32(h.Mode) & 0o7777, UID: h.Uid, GID: h.Gid, ModTime: h.ModTime.Unix(), Link: h.Linkname,
			Major: h.Devmajor, Minor: h.Devminor,
		}
		if h.Typeflag == tar.TypeReg {
			var err error
			if f.node.Content, err = s.Put(r, h.Size); err != nil {
				return fmt.Errorf("%s: %w", f.path, err)
			}
		}
	default:
		return fmt.Errorf("%s has the unknown type %q", f.path, h.Typeflag)
	}
	d.files = append(d.files, f)
	return nil
}

func untar(r io.Reader, suffix string, each func(*tar.Header, io.Reader) error) error {
	z, err := decompress(r, suffix)
	if err != nil {
		return err
	}
	defer z.Close()
	tr := tar.NewReader(io.LimitReader(z, maxUnpacked))
	for {
		h, err := tr.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if h.Size > maxUnpacked || h.Typeflag == tar.TypeGNUSparse || h.PAXRecords["GNU.sparse.size"] != "" || h.PAXRecords["GNU.sparse.realsize"] != "" {
			return fmt.Errorf("%s is sparse or larger than %d bytes, which no package needs", h.Name, int64(maxUnpacked))
		}
		if err := each(h, tr); err != nil {
			return err
		}
	}
}

// openAll opens packages, as many at a time as there are processors, and returns them in the order given.
func (c *cache) openAll(ctx context.Context, packages []Package, s *filetree.Spool, keep func(string) bool, progress func(done, total int64)) ([]*deb, error) {
	out := make([]*deb, len(packages))
	var total int64
	for _, p := range packages {
		total += p.Size
	}
	count := counter(total, progress)
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(parallelUnpacks())
	for i, p := range packages {
		group.Go(func() (err error) {
			out[i], err = openDeb(ctx, p, c.path(p.SHA256), s, keep)
			count(p.Size)
			return err
		})
	}
	return out, group.Wait()
}

// installDeb puts the files of a package into the tree, over those of packages before it, as dpkg does with Replaces.
func installDeb(t *filetree.Tree, d *deb) error {
	for _, f := range d.files {
		if f.hardTo != "" {
			n := t.Find(f.hardTo, false)
			if n == nil {
				return fmt.Errorf("package %s: hard link %q to %q, which it has not", d.Package, f.path, f.hardTo)
			}
			f.node = n
		}
		if err := t.Put(f.path, f.node); err != nil {
			return fmt.Errorf("package %s: %w", d.Package, err)
		}
	}
	return nil
}
