package oci

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"
	"sync/atomic"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sync/errgroup"

	"github.com/drafter-vm/drafter/pkg/filetree"
)

// Limits bound what an image may become, as a few kilobytes can unpack to any size. The zero value is the defaults.
type Limits struct {
	// Size is how many bytes the files of all layers may have, also those that a later layer takes away. Default: 16 GiB.
	Size int64

	// Entries is how many files, directories and so on all layers may have. Default: 2 million.
	Entries int
}

func (l Limits) withDefaults() Limits {
	if l.Size == 0 {
		l.Size = 16 << 30
	}
	if l.Entries == 0 {
		l.Entries = 2_000_000
	}
	return l
}

// What one entry of an archive may have.
const (
	maxPath   = 4096 // bytes, as Linux has it
	maxXAttrs = 64   // of one file
	maxXAttr  = 64 << 10
	maxOwner  = 1<<32 - 2
	maxDepth  = 255       // directories, one in another
	maxNames  = 512 << 20 // bytes of all names, links and attributes, which are in memory
)

// Names of whiteouts, by the image specification (layer.md, "Whiteouts"): a file .wh.NAME takes NAME of the layers below away, the opaque one all
// of its directory.
const (
	whiteout       = ".wh."
	whiteoutMeta   = ".wh..wh."
	whiteoutOpaque = ".wh..wh..opq"
)

const xattrRecord = "SCHILY.xattr."

// skippedXAttrs have no meaning on another machine.
func skippedXAttr(name string) bool {
	return name == "security.selinux" || name == "system.nfs4_acl" || strings.HasPrefix(name, "trusted.overlay.") || strings.HasPrefix(name, "user.overlay.")
}

// layering is the application of layers to a tree.
type layering struct {
	tree    *filetree.Tree
	limits  Limits
	size    int64
	entries int
	names   int64

	upper map[string]bool // paths that the layer that is applied has set
}

// apply applies one layer.
func (l *layering) apply(ctx context.Context, r io.Reader) error {
	l.upper = make(map[string]bool)
	tr := tar.NewReader(contextReader{ctx, r})
	for {
		h, err := tr.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read archive: %w", err)
		}
		if err := l.entry(h, func() (filetree.Content, error) { return l.tree.Spool.Put(tr, h.Size) }); err != nil {
			return fmt.Errorf("entry %q: %w", h.Name, err)
		}
	}
}

// count counts one more file, with so many bytes of names and attributes.
func (l *layering) count(bytes int) error {
	if l.entries++; l.entries > l.limits.Entries {
		return fmt.Errorf("the image has more than %d entries: raise the limit if that is meant", l.limits.Entries)
	}
	if l.names += int64(bytes); l.names > maxNames {
		return fmt.Errorf("the image's names and attributes have more than %d bytes", int64(maxNames))
	}
	return nil
}

// inside returns the path within the tree of a name of an archive.
func (l *layering) inside(name string) (string, error) {
	clean := path.Clean(strings.TrimLeft(name, "/"))
	switch {
	case name == "" || strings.ContainsRune(name, 0):
		return "", errors.New("a file without a name that it could have")
	case clean == ".." || strings.HasPrefix(clean, "../"):
		return "", errors.New("its path leads out of the image")
	case len(name) > maxPath:
		return "", fmt.Errorf("its path has %d bytes, at most %d are possible", len(name), maxPath)
	case strings.Count(clean, "/") >= maxDepth:
		return "", fmt.Errorf("it is in more than %d directories, one in another", maxDepth)
	}
	return path.Join("/", clean), nil
}

// resolve follows the links in the directory of p. They must not lead out of the image, which is where / leads.
func (l *layering) resolve(p string) (string, error) {
	if p == "/" {
		return p, nil
	}
	dir, name := path.Split(p)
	real, err := l.follow(dir, true)
	return path.Join(real, name), err
}

// follow returns the path of a directory, without links. What is missing is made, or without create the path is empty.
func (l *layering) follow(dir string, create bool) (string, error) {
	at := "/"
	parts := strings.Split(strings.Trim(path.Clean(dir), "/"), "/")
	for hops := 0; len(parts) > 0; {
		name := parts[0]
		parts = parts[1:]
		switch name {
		case "", ".":
			continue
		case "..":
			if at == "/" {
				return "", errors.New("a link above it leads out of the image")
			}
			at = path.Dir(at)
			continue
		}
		next := path.Join(at, name)
		n := l.tree.Find(next, false)
		switch {
		case n == nil && !create:
			return "", nil
		case n == nil:
			if err := l.count(len(next)); err != nil {
				return "", err
			}
			if strings.Count(next, "/") > maxDepth {
				return "", fmt.Errorf("it is in more than %d directories, one in another", maxDepth)
			}
			if err := l.tree.Mkdir(next, 0o755, 0, 0); err != nil {
				return "", err
			}
			at = next
		case n.Type == tar.TypeSymlink:
			if hops++; hops > 40 {
				return "", errors.New("too many links above it")
			}
			if path.IsAbs(n.Link) {
				at = "/"
			}
			parts = append(strings.Split(n.Link, "/"), parts...)
		case n.Type == tar.TypeDir:
			at = next
		case !create:
			return "", nil
		default: // tar replaces what is in the way of a directory
			if err := l.tree.Replace(next, &filetree.Node{Type: tar.TypeDir, Mode: 0o755}); err != nil {
				return "", err
			}
			at = next
		}
	}
	return at, nil
}

// set notes that the layer has set a path, and so the directories above it.
func (l *layering) set(p string) {
	for ; !l.upper[p]; p = path.Dir(p) {
		l.upper[p] = true
	}
}

// entry applies one entry of a layer. content is that of a file.
func (l *layering) entry(h *tar.Header, content func() (filetree.Content, error)) error {
	if h.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	p, err := l.inside(h.Name)
	if err != nil {
		return err
	}
	bytes := len(h.Name) + len(h.Linkname)
	for name, value := range h.PAXRecords {
		bytes += len(name) + len(value)
	}
	if err := l.count(bytes); err != nil {
		return err
	}
	if name := path.Base(p); strings.HasPrefix(name, whiteout) && p != "/" {
		return l.whiteOut(p, name)
	}
	if p, err = l.resolve(p); err != nil {
		return err
	}
	n := &filetree.Node{
		Type: h.Typeflag, Mode: uint32(h.Mode) & 0o7777, UID: h.Uid, GID: h.Gid, ModTime: h.ModTime.Unix(), Link: h.Linkname, Major: h.Devmajor, Minor: h.Devminor,
	}
	if h.Uid < 0 || h.Gid < 0 || int64(h.Uid) > maxOwner || int64(h.Gid) > maxOwner {
		return fmt.Errorf("its owner is %d:%d, which nobody can be", h.Uid, h.Gid)
	}
	if n.XAttrs, err = xattrsOf(h); err != nil {
		return err
	}
	switch h.Typeflag {
	case tar.TypeReg:
		if l.size += h.Size; l.size > l.limits.Size || l.size < 0 {
			return fmt.Errorf("the image's files have more than %d bytes: raise the limit if that is meant", l.limits.Size)
		}
		n.Link = ""
		if n.Content, err = content(); err != nil {
			return fmt.Errorf("read content: %w", err)
		}
	case tar.TypeDir:
		n.Link = ""
	case tar.TypeLink:
		target, err := l.inside(h.Linkname)
		if err == nil {
			target, err = l.resolve(target)
		}
		if err != nil {
			return fmt.Errorf("hard link to %q: %w", h.Linkname, err)
		}
		if n = l.tree.Find(target, false); n == nil {
			return fmt.Errorf("hard link to %q, which is not there", h.Linkname)
		}
		if n.Type == tar.TypeDir {
			return fmt.Errorf("hard link to %q, a directory", h.Linkname)
		}
		if target == p {
			return nil
		}
	case tar.TypeSymlink:
		if len(h.Linkname) == 0 || len(h.Linkname) >= maxPath || strings.ContainsRune(h.Linkname, 0) {
			return fmt.Errorf("symbolic link to %d bytes: from 1 to %d are possible", len(h.Linkname), maxPath-1)
		}
	case tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
	default:
		return fmt.Errorf("it is of type %q, which no file of an image is", h.Typeflag)
	}
	l.set(p)
	if p == "/" {
		if n.Type != tar.TypeDir {
			return errors.New("the root of an image is a directory")
		}
		root := l.tree.Find(p, false)
		n.Children = root.Children
		*root = *n
		return nil
	}
	return l.tree.Replace(p, n)
}

// xattrsOf are the extended attributes of an entry.
func xattrsOf(h *tar.Header) (map[string]string, error) {
	var attrs map[string]string
	for record, value := range h.PAXRecords {
		name, ok := strings.CutPrefix(record, xattrRecord)
		if !ok || skippedXAttr(name) || name == ownerXAttr {
			continue
		}
		if attrs == nil {
			attrs = make(map[string]string)
		}
		attrs[name] = value
		if len(attrs) > maxXAttrs || len(value) > maxXAttr || len(name) > 255 {
			return nil, fmt.Errorf("it has more than %d extended attributes, or longer ones than %d bytes", maxXAttrs, maxXAttr)
		}
	}
	return attrs, nil
}

// whiteOut takes away what layers below have set.
func (l *layering) whiteOut(p, name string) error {
	hidden := strings.TrimPrefix(name, whiteout)
	if hidden == "" || hidden == "." || hidden == ".." {
		return errors.New("it takes away what is no file")
	}
	dir, err := l.follow(path.Dir(p), false)
	if err != nil || dir == "" {
		return err
	}
	switch target := path.Join(dir, hidden); {
	case name == whiteoutOpaque:
		l.purge(dir)
	case strings.HasPrefix(name, whiteoutMeta): // what a union file system keeps for itself
	case l.upper[target]:
		l.purge(target)
	default:
		l.tree.Remove(target)
	}
	return nil
}

// purge takes away what is below a directory and not of this layer.
func (l *layering) purge(dir string) {
	d := l.tree.Find(dir, false)
	if d == nil || d.Type != tar.TypeDir {
		return
	}
	for name := range d.Children {
		if p := path.Join(dir, name); l.upper[p] {
			l.purge(p)
		} else {
			delete(d.Children, name)
		}
	}
}

// Progress is how far a stage is: of bytes, with Total < 0 where it is not known.
type Progress struct {
	Stage       string
	Done, Total int64
}

// parallelDownloads is how many layers are fetched at a time.
const parallelDownloads = 4

// lay lays out the layers of an image in a tree. Layers are fetched several at a time, and verified.
func (i *Image) lay(ctx context.Context, tree *filetree.Tree, tmp string, limits Limits, progress func(Progress)) error {
	layers, err := i.image.Layers()
	if err != nil {
		return err
	}
	config, err := i.image.ConfigFile()
	if err != nil {
		return err
	}
	var total int64
	sizes := make([]int64, len(layers))
	for n, layer := range layers {
		if sizes[n], err = layer.Size(); err != nil {
			return err
		}
		total += sizes[n]
	}
	dir, err := os.MkdirTemp(tmp, "layers-*")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()

	// Layers are applied in their order, while those behind come.
	var done atomic.Int64
	fetched := make([]chan struct{}, len(layers))
	for n := range fetched {
		fetched[n] = make(chan struct{})
	}
	file := func(n int) string { return filepath.Join(dir, fmt.Sprint(n)) }
	group, fetching := errgroup.WithContext(ctx)
	group.SetLimit(parallelDownloads + 1) // and the one that applies
	group.Go(func() error {
		l := &layering{tree: tree, limits: limits.withDefaults()}
		for n := range layers {
			select {
			case <-fetched[n]:
			case <-fetching.Done():
				return fetching.Err()
			}
			if err := l.applyFile(fetching, file(n), layers[n], config.RootFS.DiffIDs[n]); err != nil {
				return fmt.Errorf("layer %d: %w", n+1, err)
			}
			_ = os.Remove(file(n))
		}
		return nil
	})
	for n, layer := range layers {
		group.Go(func() error {
			if err := fetchLayer(fetching, layer, file(n), sizes[n], func(b int64) { progress(Progress{"fetch layers", done.Add(b), total}) }); err != nil {
				return fmt.Errorf("layer %d: %w", n+1, err)
			}
			close(fetched[n])
			return nil
		})
	}
	return group.Wait()
}

// fetchLayer writes a layer, compressed as it is, to a file, and verifies it.
func fetchLayer(ctx context.Context, layer v1.Layer, file string, size int64, progress func(int64)) (err error) {
	want, err := layer.Digest()
	if err != nil {
		return err
	}
	r, err := layer.Compressed()
	if err != nil {
		return fmt.Errorf("fetch %v: %w", want, err)
	}
	defer r.Close()
	defer context.AfterFunc(ctx, func() { _ = r.Close() })() // reading ends then
	w, err := os.OpenFile(file, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	h := sha256.New()
	n, err := io.Copy(io.MultiWriter(w, h, progressWriter(progress)), io.LimitReader(contextReader{ctx, r}, size+1))
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err != nil {
		return fmt.Errorf("fetch %v: %w", want, err)
	}
	if have := "sha256:" + hex.EncodeToString(h.Sum(nil)); n != size || have != want.String() {
		return fmt.Errorf("fetch %v: it has %d bytes and is %s, not %d bytes as the manifest says: it is corrupt", want, n, have, size)
	}
	return nil
}

type progressWriter func(int64)

func (p progressWriter) Write(b []byte) (int, error) { p(int64(len(b))); return len(b), nil }

// applyFile applies a layer that has been fetched, and verifies what it unpacks to.
func (l *layering) applyFile(ctx context.Context, file string, layer v1.Layer, want v1.Hash) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	r, err := decompress(f)
	if err != nil {
		return err
	}
	defer r.Close()
	h := sha256.New()
	// An archive may end with zeros of any length; and what is read must be bounded, too, where it is not a file's content.
	bounded := &boundedReader{r: io.TeeReader(r, h), left: 2*l.limits.Size + int64(l.limits.Entries)*4096}
	if err := l.apply(ctx, bounded); err != nil {
		return err
	}
	if _, err := io.Copy(io.Discard, contextReader{ctx, bounded}); err != nil {
		return fmt.Errorf("read archive: %w", err)
	}
	if have := "sha256:" + hex.EncodeToString(h.Sum(nil)); have != want.String() {
		return fmt.Errorf("it unpacks to %s, not to %v as the image's configuration says: it is corrupt", have, want)
	}
	return nil
}

// boundedReader fails, where a reader has more than it may.
type boundedReader struct {
	r    io.Reader
	left int64
}

func (b *boundedReader) Read(p []byte) (int, error) {
	n, err := b.r.Read(p)
	if b.left -= int64(n); b.left < 0 {
		return n, errors.New("it unpacks to more than an image may have: raise the limit if that is meant")
	}
	return n, err
}
