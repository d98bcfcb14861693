package filetree

import (
	"archive/tar"
	"bytes"
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
	"unicode/utf8"
)

// Tree is a file system while it is being put together. Paths are those within it, and its symbolic links are followed within it; a leading / makes
// no difference. One goroutine at a time changes a tree; content may be put into the spool by several.
type Tree struct {
	Root  *Node
	Spool *Spool
}

// Node is an inode: hard links are several names of one node.
type Node struct {
	Type     byte   // tar.TypeReg, TypeDir, TypeSymlink, TypeChar, TypeBlock, TypeFifo
	Mode     uint32 // permission bits with set-uid, set-gid and sticky, as in chmod(2)
	UID, GID int
	ModTime  int64 // seconds since 1970
	Link     string
	Major    int64
	Minor    int64
	Content  Content
	XAttrs   map[string]string // extended attributes, by their full names (security.capability)
	Children map[string]*Node  // of a directory
}

// Content is the data of a file: bytes, a range of the spool, or what a function reads.
type Content struct {
	data  []byte
	spool *Spool
	off   int64
	size  int64
	open  func() io.ReadCloser
}

// Size is the content's length in bytes.
func (c Content) Size() int64 { return c.size }

// Reader reads the content from its begin. What it returns is to be closed.
func (c Content) Reader() io.ReadCloser {
	switch {
	case c.open != nil:
		return c.open()
	case c.spool != nil:
		return io.NopCloser(io.NewSectionReader(c.spool.f, c.off, c.size))
	default:
		return io.NopCloser(strings.NewReader(string(c.data)))
	}
}

// CopyTo writes the content to w. Content that is not as long as it was said to be is an error.
func (c Content) CopyTo(w io.Writer) error {
	r := c.Reader()
	n, err := io.Copy(w, io.LimitReader(r, c.size))
	if err == nil && n != c.size {
		err = fmt.Errorf("%w: %d bytes of %d", io.ErrUnexpectedEOF, n, c.size)
	}
	return errors.Join(err, r.Close())
}

// Later is content of size bytes that open reads, whenever it is needed.
func Later(size int64, open func() io.ReadCloser) Content { return Content{size: size, open: open} }

// Bytes is content that is in memory.
func Bytes(b []byte) Content { return Content{data: b, size: int64(len(b))} }

// Spool holds file contents in an unnamed temporary file.
type Spool struct {
	f   *os.File
	end atomic.Int64
}

// NewSpool makes a spool in a folder, in which it shows no file.
func NewSpool(dir string) (*Spool, error) {
	f, err := os.CreateTemp(dir, ".spool-*")
	if err != nil {
		return nil, fmt.Errorf("create spool: %w", err)
	}
	if err := os.Remove(f.Name()); err != nil {
		return nil, errors.Join(fmt.Errorf("create spool: %w", err), f.Close())
	}
	return &Spool{f: f}, nil
}

// Close lets go of everything that is in the spool.
func (s *Spool) Close() error { return s.f.Close() }

// Put stores size bytes of r. Small contents stay in memory.
func (s *Spool) Put(r io.Reader, size int64) (Content, error) {
	if size <= 64<<10 {
		b := make([]byte, size)
		_, err := io.ReadFull(r, b)
		return Bytes(b), err
	}
	off := s.end.Add(size) - size
	n, err := io.Copy(io.NewOffsetWriter(s.f, off), io.LimitReader(r, size))
	if err == nil && n != size {
		err = io.ErrUnexpectedEOF
	}
	return Content{spool: s, off: off, size: size}, err
}

// New makes an empty tree, whose large contents go to a spool.
func New(s *Spool) *Tree {
	return &Tree{Root: &Node{Type: tar.TypeDir, Mode: 0o755, Children: map[string]*Node{}}, Spool: s}
}

var errLoop = errors.New("too many levels of symbolic links")

// Find returns the node at p, nil if there is none. follow resolves a symbolic link at the end, too.
func (t *Tree) Find(p string, follow bool) *Node {
	n, _ := t.Walk(p, follow)
	return n
}

// Walk resolves p and returns its node and its path without symbolic links.
func (t *Tree) Walk(p string, follow bool) (*Node, string) {
	parts := split(p)
	at, where := t.Root, []string{}
	stack := []*Node{}
	for hops := 0; len(parts) > 0; {
		name := parts[0]
		parts = parts[1:]
		if name == ".." {
			if len(stack) > 0 {
				at, stack, where = stack[len(stack)-1], stack[:len(stack)-1], where[:len(where)-1]
			}
			continue
		}
		next := at.Children[name]
		if next == nil {
			return nil, "/" + strings.Join(append(append(where, name), parts...), "/")
		}
		if next.Type == tar.TypeSymlink && (follow || len(parts) > 0) {
			if hops++; hops > 40 {
				return nil, p
			}
			if path.IsAbs(next.Link) {
				at, stack, where = t.Root, nil, nil
			}
			parts = append(split(next.Link), parts...)
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
func (t *Tree) parent(p string) (*Node, string, error) {
	dir, name := path.Split(strings.TrimRight(p, "/"))
	if name == "" || name == "." || name == ".." {
		return nil, "", fmt.Errorf("path %q has no name", p)
	}
	d, err := t.MkdirAll(dir)
	return d, name, err
}

// MkdirAll makes the directory p and those above it, as far as they are missing.
func (t *Tree) MkdirAll(p string) (*Node, error) {
	for hops := 0; ; hops++ {
		n, real := t.Walk(p, true)
		if n != nil {
			if n.Type != tar.TypeDir {
				return nil, fmt.Errorf("%q is not a directory", p)
			}
			return n, nil
		}
		if hops > 256 || slices.Contains(split(real), "..") {
			return nil, fmt.Errorf("make directory %q: %w", p, errLoop)
		}
		// Make the first missing one; symbolic links may lie behind it, so begin anew.
		at := t.Root
		for _, name := range split(real) {
			next := at.Children[name]
			if next == nil {
				next = &Node{Type: tar.TypeDir, Mode: 0o755, Children: map[string]*Node{}}
				if at.Children == nil {
					return nil, fmt.Errorf("make directory %q: a file is in the way", p)
				}
				at.Children[name] = next
				break
			}
			if next.Type == tar.TypeSymlink { // dangling: walk has resolved it as far as it goes
				return nil, fmt.Errorf("make directory %q: symbolic link %q leads nowhere", p, name)
			}
			at = next
		}
	}
}

// Put places n at p, replacing a file that is there. A directory that is there stays, and takes n's mode and owner.
func (t *Tree) Put(p string, n *Node) error {
	dir, name, err := t.parent(p)
	if err != nil {
		return err
	}
	old := dir.Children[name]
	if n.Type == tar.TypeDir {
		if old != nil && old.Type == tar.TypeSymlink {
			if target := t.Find(p, true); target != nil && target.Type == tar.TypeDir {
				return nil // as dpkg: a directory of a package may be a symbolic link on the system
			}
		}
		if old != nil && old.Type == tar.TypeDir {
			old.Mode, old.UID, old.GID, old.ModTime = n.Mode, n.UID, n.GID, n.ModTime
			return nil
		}
		if n.Children == nil {
			n.Children = map[string]*Node{}
		}
	} else if old != nil && old.Type == tar.TypeDir {
		return fmt.Errorf("put %q: a directory is in the way", p)
	}
	dir.Children[name] = n
	return nil
}

// Mkdir puts a directory at p.
func (t *Tree) Mkdir(p string, mode uint32, uid, gid int) error {
	return t.Put(p, &Node{Type: tar.TypeDir, Mode: mode, UID: uid, GID: gid})
}

// WriteFile puts a file at p, owned by root.
func (t *Tree) WriteFile(p, data string, mode uint32) error {
	return t.Put(p, &Node{Type: tar.TypeReg, Mode: mode, Content: Bytes([]byte(data))})
}

// Symlink puts a symbolic link at p.
func (t *Tree) Symlink(target, p string) error {
	return t.Put(p, &Node{Type: tar.TypeSymlink, Mode: 0o777, Link: target})
}

// Replace places n at p, whatever is there, as tar does: but a directory that is there, where n is one, stays, and takes n's attributes. Links above p
// are followed.
func (t *Tree) Replace(p string, n *Node) error {
	dir, name, err := t.parent(p)
	if err != nil {
		return err
	}
	if old := dir.Children[name]; n.Type == tar.TypeDir {
		if old != nil && old.Type == tar.TypeDir {
			n.Children = old.Children
			*old = *n
			return nil
		}
		if n.Children == nil {
			n.Children = map[string]*Node{}
		}
	}
	dir.Children[name] = n
	return nil
}

// Remove takes p away, with what is below it.
func (t *Tree) Remove(p string) {
	dir, name := path.Split(strings.TrimRight(p, "/"))
	if d := t.Find(dir, true); d != nil {
		delete(d.Children, name)
	}
}

// ReadFile returns the content of the regular file at p.
func (t *Tree) ReadFile(p string) ([]byte, error) {
	n := t.Find(p, true)
	if n == nil {
		return nil, &fs.PathError{Op: "open", Path: p, Err: fs.ErrNotExist}
	}
	if n.Type != tar.TypeReg {
		return nil, &fs.PathError{Op: "open", Path: p, Err: errors.New("not a regular file")}
	}
	var b bytes.Buffer
	err := n.Content.CopyTo(&b)
	return b.Bytes(), err
}

// AppendFile adds text to the end of the file at p, making it if need be.
func (t *Tree) AppendFile(p, text string, mode uint32) error {
	old, err := t.ReadFile(p)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if n := t.Find(p, true); n != nil {
		n.Content = Bytes(append(old, text...))
		return nil
	}
	return t.WriteFile(p, text, mode)
}

// Each calls f for every name below dir, sorted, directories before what they hold.
func (t *Tree) Each(dir string, f func(p string, n *Node) error) error {
	d := t.Find(dir, true)
	if d == nil {
		return nil
	}
	return EachBelow(strings.TrimRight(dir, "/"), d, f)
}

// EachBelow calls f for every name below the directory d, whose path is p, as [Tree.Each] does.
func EachBelow(p string, d *Node, f func(string, *Node) error) error {
	for _, name := range slices.Sorted(maps.Keys(d.Children)) {
		n := d.Children[name]
		if err := f(p+"/"+name, n); err != nil {
			return err
		}
		if n.Type == tar.TypeDir {
			if err := EachBelow(p+"/"+name, n, f); err != nil {
				return err
			}
		}
	}
	return nil
}

// Usage is what the tree needs of a file system.
func (t *Tree) Usage() (bytes int64, inodes int) {
	const block = 4096
	seen := map[*Node]bool{}
	_ = t.Each("/", func(_ string, n *Node) error { // f never fails
		if seen[n] {
			return nil
		}
		seen[n] = true
		inodes++
		if n.Type == tar.TypeDir {
			bytes += block
		}
		bytes += (n.Content.size + block - 1) / block * block
		if len(n.XAttrs) > 0 {
			bytes += block
		}
		return nil
	})
	return bytes, inodes
}

// xattrRecord begins the names of the pax records that hold extended attributes.
const xattrRecord = "SCHILY.xattr."

// WriteTar writes the tree in a fixed order, so that the same tree gives the same bytes. No file is younger than epoch, in seconds since 1970, and one
// without a time is of then; with epoch 0 times are as they are. progress is told how many bytes of content each file had that was written.
func (t *Tree) WriteTar(ctx context.Context, w io.Writer, epoch int64, progress func(n int64)) error {
	tw := tar.NewWriter(w)
	names := map[*Node]string{}
	emit := func(p string, n *Node) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		h := &tar.Header{
			Name: "." + p, Mode: int64(n.Mode), Uid: n.UID, Gid: n.GID, Typeflag: n.Type, Linkname: n.Link,
			ModTime: time.Unix(n.ModTime, 0), Devmajor: n.Major, Devminor: n.Minor, Format: tar.FormatPAX,
		}
		if epoch != 0 {
			h.ModTime = time.Unix(min(cmp.Or(n.ModTime, epoch), epoch), 0)
		}
		for name, value := range n.XAttrs {
			if h.PAXRecords == nil {
				h.PAXRecords = make(map[string]string)
			}
			h.PAXRecords[xattrRecord+name] = value
		}
		first, again := names[n]
		switch {
		case n.Type == tar.TypeDir:
			h.Name += "/"
		case again:
			h.Typeflag, h.Linkname, h.PAXRecords = tar.TypeLink, first, nil
		default:
			names[n] = h.Name
		}
		if !utf8.ValidString(h.Name) || !utf8.ValidString(h.Linkname) { // else who reads the archive takes it for text of its locale
			if h.PAXRecords == nil {
				h.PAXRecords = make(map[string]string)
			}
			h.PAXRecords["hdrcharset"] = "BINARY"
		}
		if again {
			return tw.WriteHeader(h)
		}
		if n.Type == tar.TypeReg {
			h.Size = n.Content.size
		}
		if err := tw.WriteHeader(h); err != nil {
			return fmt.Errorf("write %q: %w", p, err)
		}
		if n.Type == tar.TypeReg {
			if err := n.Content.CopyTo(tw); err != nil {
				return fmt.Errorf("write %q: %w", p, err)
			}
			progress(n.Content.size)
		}
		return nil
	}
	if err := emit("", t.Root); err != nil {
		return err
	}
	if err := t.Each("/", emit); err != nil {
		return err
	}
	return tw.Close()
}

// Stat shows a node as [fs.FileInfo].
func Stat(name string, n *Node) fs.FileInfo { return fileInfo{name, n} }

type fileInfo struct {
	name string
	n    *Node
}

func (i fileInfo) Name() string       { return i.name }
func (i fileInfo) Size() int64        { return i.n.Content.size }
func (i fileInfo) ModTime() time.Time { return time.Unix(i.n.ModTime, 0) }
func (i fileInfo) IsDir() bool        { return i.n.Type == tar.TypeDir }
func (i fileInfo) Sys() any           { return nil }
func (i fileInfo) Mode() fs.FileMode {
	m := fs.FileMode(i.n.Mode & 0o777)
	if i.n.Mode&0o4000 != 0 {
		m |= fs.ModeSetuid
	}
	if i.n.Mode&0o2000 != 0 {
		m |= fs.ModeSetgid
	}
	if i.n.Mode&0o1000 != 0 {
		m |= fs.ModeSticky
	}
	switch i.n.Type {
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
