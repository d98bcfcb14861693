package blueprint

import (
	"archive/tar"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"slices"
	"strings"
	"sync/atomic"
	"time"
)

// tree is the root file system while it is being put together: names, modes and owners in memory, the content of large
// files in one unnamed temporary file. Nothing of it exists on the host's file system, which is why no privilege is
// needed to make files of any owner.
//
// Paths are those of the guest; symbolic links in them are followed within the tree. One goroutine at a time changes a
// tree; content may be put into the spool by several.
type tree struct {
	root  *node
	spool *spool
}

// node is an inode: hard links are several names of one node.
type node struct {
	typ      byte   // tar.TypeReg, TypeDir, TypeSymlink, TypeChar, TypeBlock, TypeFifo
	mode     uint32 // permission bits with set-uid, set-gid and sticky, as in chmod(2)
	uid, gid int
	mtime    int64 // seconds since 1970
	link     string
	major    int64
	minor    int64
	content  content
	children map[string]*node // of a directory
}

// content is the data of a file: bytes, or a range of the spool.
type content struct {
	data  []byte
	spool *spool
	off   int64
	size  int64
}

func (c content) reader() io.Reader {
	if c.spool == nil {
		return strings.NewReader(string(c.data))
	}
	return io.NewSectionReader(c.spool.f, c.off, c.size)
}

func bytesContent(b []byte) content { return content{data: b, size: int64(len(b))} }

// spool holds file contents in an unnamed temporary file.
type spool struct {
	f   *os.File
	end atomic.Int64
}

func newSpool(dir string) (*spool, error) {
	f, err := os.CreateTemp(dir, ".spool-*")
	if err != nil {
		return nil, fmt.Errorf("create spool: %w", err)
	}
	if err := os.Remove(f.Name()); err != nil {
		return nil, errors.Join(fmt.Errorf("create spool: %w", err), f.Close())
	}
	return &spool{f: f}, nil
}

func (s *spool) Close() error { return s.f.Close() }

// put stores size bytes of r. Small contents stay in memory.
func (s *spool) put(r io.Reader, size int64) (content, error) {
	if size <= 64<<10 {
		b := make([]byte, size)
		_, err := io.ReadFull(r, b)
		return bytesContent(b), err
	}
	off := s.end.Add(size) - size
	n, err := io.Copy(io.NewOffsetWriter(s.f, off), io.LimitReader(r, size))
	if err == nil && n != size {
		err = io.ErrUnexpectedEOF
	}
	return content{spool: s, off: off, size: size}, err
}

func newTree(s *spool) *tree {
	return &tree{root: &node{typ: tar.TypeDir, mode: 0o755, children: map[string]*node{}}, spool: s}
}

var errLoop = errors.New("too many levels of symbolic links")

// find returns the node at p, nil if there is none. follow resolves a symbolic link at the end, too.
func (t *tree) find(p string, follow bool) *node {
	n, _ := t.walk(p, follow)
	return n
}

// walk resolves p and returns its node and its path without symbolic links.
func (t *tree) walk(p string, follow bool) (*node, string) {
	parts := split(p)
	at, where := t.root, []string{}
	stack := []*node{}
	for hops := 0; len(parts) > 0; {
		name := parts[0]
		parts = parts[1:]
		if name == ".." {
			if len(stack) > 0 {
				at, stack, where = stack[len(stack)-1], stack[:len(stack)-1], where[:len(where)-1]
			}
			continue
		}
		next := at.children[name]
		if next == nil {
			return nil, "/" + strings.Join(append(append(where, name), parts...), "/")
		}
		if next.typ == tar.TypeSymlink && (follow || len(parts) > 0) {
			if hops++; hops > 40 {
				return nil, p
			}
			if path.IsAbs(next.link) {
				at, stack, where = t.root, nil, nil
			}
			parts = append(split(next.link), parts...)
			continue
		}
		stack, at, where = append(stack, at), next, append(where, name)
	}
	return at, "/" + strings.Join(where, "/")
}

// split cuts a path in its parts, without empty ones and dots.
func split(p string) []string {
	return slices.DeleteFunc(strings.Split(p, "/"), func(s string) bool { return s == "" || s == "." })
}

// parent returns the directory that holds, or would hold, p; missing ones are made with mode 0755.
func (t *tree) parent(p string) (*node, string, error) {
	dir, name := path.Split(strings.TrimRight(p, "/"))
	if name == "" || name == "." || name == ".." {
		return nil, "", fmt.Errorf("path %q has no name", p)
	}
	d, err := t.mkdirAll(dir)
	return d, name, err
}

// mkdirAll makes the directory p and those above it, as far as they are missing.
func (t *tree) mkdirAll(p string) (*node, error) {
	for hops := 0; ; hops++ {
		n, real := t.walk(p, true)
		if n != nil {
			if n.typ != tar.TypeDir {
				return nil, fmt.Errorf("%q is not a directory", p)
			}
			return n, nil
		}
		if hops > 256 || slices.Contains(split(real), "..") {
			return nil, fmt.Errorf("make directory %q: %w", p, errLoop)
		}
		// Make the first missing one; symbolic links may lie behind it, so begin anew.
		at := t.root
		for _, name := range split(real) {
			next := at.children[name]
			if next == nil {
				next = &node{typ: tar.TypeDir, mode: 0o755, children: map[string]*node{}}
				if at.children == nil {
					return nil, fmt.Errorf("make directory %q: a file is in the way", p)
				}
				at.children[name] = next
				break
			}
			if next.typ == tar.TypeSymlink { // dangling: walk has resolved it as far as it goes
				return nil, fmt.Errorf("make directory %q: symbolic link %q leads nowhere", p, name)
			}
			at = next
		}
	}
}

// put places n at p, replacing a file that is there. A directory that is there stays, and takes n's mode and owner.
func (t *tree) put(p string, n *node) error {
	dir, name, err := t.parent(p)
	if err != nil {
		return err
	}
	old := dir.children[name]
	if n.typ == tar.TypeDir {
		if old != nil && old.typ == tar.TypeSymlink {
			if target := t.find(p, true); target != nil && target.typ == tar.TypeDir {
				return nil // as dpkg: a directory of a package may be a symbolic link on the system
			}
		}
		if old != nil && old.typ == tar.TypeDir {
			old.mode, old.uid, old.gid, old.mtime = n.mode, n.uid, n.gid, n.mtime
			return nil
		}
		if n.children == nil {
			n.children = map[string]*node{}
		}
	} else if old != nil && old.typ == tar.TypeDir {
		return fmt.Errorf("put %q: a directory is in the way", p)
	}
	dir.children[name] = n
	return nil
}

func (t *tree) mkdir(p string, mode uint32, uid, gid int) error {
	return t.put(p, &node{typ: tar.TypeDir, mode: mode, uid: uid, gid: gid})
}

func (t *tree) writeFile(p, data string, mode uint32) error {
	return t.put(p, &node{typ: tar.TypeReg, mode: mode, content: bytesContent([]byte(data))})
}

func (t *tree) symlink(target, p string) error {
	return t.put(p, &node{typ: tar.TypeSymlink, mode: 0o777, link: target})
}

// remove takes p away, with what is below it.
func (t *tree) remove(p string) {
	dir, name := path.Split(strings.TrimRight(p, "/"))
	if d := t.find(dir, true); d != nil {
		delete(d.children, name)
	}
}

// readFile returns the content of the regular file at p.
func (t *tree) readFile(p string) ([]byte, error) {
	n := t.find(p, true)
	if n == nil {
		return nil, &fs.PathError{Op: "open", Path: p, Err: fs.ErrNotExist}
	}
	if n.typ != tar.TypeReg {
		return nil, &fs.PathError{Op: "open", Path: p, Err: errors.New("not a regular file")}
	}
	return io.ReadAll(n.content.reader())
}

// appendFile adds text to the end of the file at p, making it if need be.
func (t *tree) appendFile(p, text string, mode uint32) error {
	old, err := t.readFile(p)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if n := t.find(p, true); n != nil {
		n.content = bytesContent(append(old, text...))
		return nil
	}
	return t.writeFile(p, text, mode)
}

// each calls f for every name below dir, sorted, directories before what they hold.
func (t *tree) each(dir string, f func(p string, n *node) error) error {
	d := t.find(dir, true)
	if d == nil {
		return nil
	}
	return eachBelow(strings.TrimRight(dir, "/"), d, f)
}

func eachBelow(p string, d *node, f func(string, *node) error) error {
	for _, name := range slices.Sorted(maps.Keys(d.children)) {
		n := d.children[name]
		if err := f(p+"/"+name, n); err != nil {
			return err
		}
		if n.typ == tar.TypeDir {
			if err := eachBelow(p+"/"+name, n, f); err != nil {
				return err
			}
		}
	}
	return nil
}

// usage is what the tree needs of a file system.
func (t *tree) usage() (bytes int64, inodes int) {
	const block = 4096
	seen := map[*node]bool{}
	_ = t.each("/", func(_ string, n *node) error { // f never fails
		if seen[n] {
			return nil
		}
		seen[n] = true
		inodes++
		if n.typ == tar.TypeDir {
			bytes += block
		}
		bytes += (n.content.size + block - 1) / block * block
		return nil
	})
	return bytes, inodes
}

// writeTar writes the tree in a fixed order, so that the same tree gives the same bytes. No file is younger than epoch.
func (t *tree) writeTar(ctx context.Context, w io.Writer, epoch int64, progress func(n int64)) error {
	tw := tar.NewWriter(w)
	names := map[*node]string{}
	emit := func(p string, n *node) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		h := &tar.Header{
			Name: "." + p, Mode: int64(n.mode), Uid: n.uid, Gid: n.gid, Typeflag: n.typ, Linkname: n.link,
			ModTime: time.Unix(min(cmp.Or(n.mtime, epoch), epoch), 0), Devmajor: n.major, Devminor: n.minor, Format: tar.FormatPAX,
		}
		switch n.typ {
		case tar.TypeDir:
			h.Name += "/"
		case tar.TypeReg:
			if first, ok := names[n]; ok {
				h.Typeflag, h.Linkname = tar.TypeLink, first
				return tw.WriteHeader(h)
			}
			names[n], h.Size = h.Name, n.content.size
		}
		if err := tw.WriteHeader(h); err != nil {
			return fmt.Errorf("write %q: %w", p, err)
		}
		if n.typ == tar.TypeReg {
			if _, err := io.Copy(tw, n.content.reader()); err != nil {
				return fmt.Errorf("write %q: %w", p, err)
			}
			progress(n.content.size)
		}
		return nil
	}
	if err := emit("", t.root); err != nil {
		return err
	}
	if err := t.each("/", emit); err != nil {
		return err
	}
	return tw.Close()
}

// nodeInfo shows a node as fs.FileInfo, for the shell interpreter.
type nodeInfo struct {
	name string
	n    *node
}

func (i nodeInfo) Name() string       { return i.name }
func (i nodeInfo) Size() int64        { return i.n.content.size }
func (i nodeInfo) ModTime() time.Time { return time.Unix(i.n.mtime, 0) }
func (i nodeInfo) IsDir() bool        { return i.n.typ == tar.TypeDir }
func (i nodeInfo) Sys() any           { return nil }
func (i nodeInfo) Mode() fs.FileMode {
	m := fs.FileMode(i.n.mode & 0o777)
	if i.n.mode&0o4000 != 0 {
		m |= fs.ModeSetuid
	}
	if i.n.mode&0o2000 != 0 {
		m |= fs.ModeSetgid
	}
	if i.n.mode&0o1000 != 0 {
		m |= fs.ModeSticky
	}
	switch i.n.typ {
	case tar.TypeDir:
		m |= fs.ModeDir
	case tar.TypeSymlink:
		m |= fs.ModeSymlink
	case tar.TypeChar:
		m |= fs.ModeDevice | fs.ModeCharDevice
	case tar.TypeBlock:
		m |= fs.ModeDevice
	case tar.TypeFifo:
		m |= fs.ModeNamedPipe
	}
	return m
}
