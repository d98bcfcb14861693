package oci

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	rspec "github.com/opencontainers/runtime-spec/specs-go"
	rootless "github.com/rootless-containers/proto/go-proto"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/drafter-vm/drafter/pkg/filetree"
	"github.com/drafter-vm/drafter/pkg/oci/bundle"
)

// RecordFile is the file beside config.json that says what the folder rootfs, made by one who may not do it, could not be given: owners, modes,
// devices, attributes.
const RecordFile = "rootfs.json"

// record is what RecordFile says.
type record struct {
	Comment string         `json:"comment"`
	Maker   int            `json:"maker"` // the user who owns what is not said here: files of that one are root's
	Files   []recordedFile `json:"files"`
}

// recordedFile is one file, by its path in rootfs. Hard links have an entry each.
type recordedFile struct {
	Path     string            `json:"path,omitempty"`
	RawPath  []byte            `json:"rawPath,omitempty"` // where that is no UTF-8
	Type     string            `json:"type"`              // file, directory, link, char, block, fifo
	UID      int               `json:"uid"`
	GID      int               `json:"gid"`
	Mode     string            `json:"mode"` // octal
	Major    int64             `json:"major,omitempty"`
	Minor    int64             `json:"minor,omitempty"`
	XAttrs   map[string][]byte `json:"xattrs,omitempty"`
	realMode uint32
}

func (r recordedFile) path() string {
	if r.RawPath != nil {
		return string(r.RawPath)
	}
	return r.Path
}

var typeNames = map[byte]string{tar.TypeReg: "file", tar.TypeDir: "directory", tar.TypeSymlink: "link", tar.TypeChar: "char", tar.TypeBlock: "block", tar.TypeFifo: "fifo"}

const (
	maxRecord = 1 << 30 // bytes of RecordFile
	maxSpec   = 4 << 20 // bytes of config.json
	recordSay = "What the files of rootfs are to be, which could not be made so here: drafter oci pack restores it."
)

// WriteFolder writes the bundle as a folder: config.json and rootfs, to be looked at and edited. Without privileges, files belong to who asks, and what they should
// be is in RecordFile. A folder that is there is an error, or with replace makes room, if it is a bundle, once the new one is complete.
func (b *Bundle) WriteFolder(ctx context.Context, dir string, replace bool) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("write bundle %q: %w", dir, err)
		}
	}()
	if dir == "" {
		return errors.New("it has no name")
	}
	dir = filepath.Clean(dir)
	_, err = os.Lstat(dir)
	there := err == nil
	if there && !replace {
		return fmt.Errorf("%w: remove it first", fs.ErrExist)
	}
	if there {
		if err := checkBundle(dir); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return err
	}
	tmp, err := os.MkdirTemp(filepath.Dir(dir), "."+filepath.Base(dir)+"-*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, removeAll(tmp))
		}
	}()
	w := &folderWriter{ctx: ctx, dir: filepath.Join(tmp, bundle.RootFolder), root: os.Geteuid() == 0, made: map[*filetree.Node]string{}}
	if err := w.write(b.rootfs()); err != nil {
		return err
	}
	text, err := b.SpecText()
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(tmp, bundle.ConfigFile), text, 0o600); err != nil {
		return err
	}
	if len(w.rest) > 0 || !w.root {
		text, err := json.MarshalIndent(record{recordSay, os.Geteuid(), w.rest}, "", " ")
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(tmp, RecordFile), append(text, '\n'), 0o600); err != nil {
			return err
		}
	}
	// The folder stays one for its maker alone, as it was made: in it are set-user-ID programs and devices of somebody else's choice.
	if !there {
		return os.Rename(tmp, dir)
	}
	// Both at once: whatever happens, there is one of them.
	if err := unix.Renameat2(unix.AT_FDCWD, tmp, unix.AT_FDCWD, dir, unix.RENAME_EXCHANGE); err != nil {
		return err
	}
	return removeAll(tmp)
}

// removeAll removes a folder with directories in it that their owner may not write to.
func removeAll(dir string) error {
	_ = filepath.WalkDir(dir, func(p string, d fs.DirEntry, _ error) error {
		if d != nil && d.IsDir() {
			_ = os.Chmod(p, 0o700)
		}
		return nil
	})
	return os.RemoveAll(dir)
}

// checkBundle refuses a folder that is something else.
func checkBundle(dir string) error {
	text, err := readBounded(filepath.Join(dir, bundle.ConfigFile), maxSpec)
	var spec rspec.Spec
	if err == nil {
		err = json.Unmarshal(text, &spec)
	}
	if err == nil && (spec.Version == "" || spec.Root == nil) {
		err = fmt.Errorf("its %s is none of a bundle", bundle.ConfigFile)
	}
	if err == nil {
		_, err = os.Lstat(filepath.Join(dir, bundle.RootFolder))
	}
	if err != nil {
		return fmt.Errorf("it is there, and is no bundle that could be replaced: %w", err)
	}
	return nil
}

// folderWriter writes a tree to a new folder. Every path is made of names of the tree's directories, none of which is a link: nothing can be written
// elsewhere.
type folderWriter struct {
	ctx  context.Context
	dir  string
	root bool // whether owners and devices can be made
	made map[*filetree.Node]string
	rest []recordedFile
}

func (w *folderWriter) write(t *filetree.Tree) error {
	if err := w.one("/", t.Root); err != nil {
		return err
	}
	if err := t.Each("/", w.one); err != nil {
		return err
	}
	// Directories last, and from below: what is made in one changes its time, and its mode may forbid that.
	type dir struct {
		p string
		n *filetree.Node
	}
	dirs := []dir{{"/", t.Root}}
	_ = t.Each("/", func(p string, n *filetree.Node) error {
		if n.Type == tar.TypeDir {
			dirs = append(dirs, dir{p, n})
		}
		return nil
	})
	for _, d := range slices.Backward(dirs) {
		if err := w.attributes(d.p, d.n); err != nil {
			return fmt.Errorf("%q: %w", d.p, err)
		}
	}
	return nil
}

func (w *folderWriter) one(p string, n *filetree.Node) error {
	if err := w.ctx.Err(); err != nil {
		return err
	}
	if err := w.make(p, n); err != nil {
		return fmt.Errorf("%q: %w", p, err)
	}
	return nil
}

func (w *folderWriter) make(p string, n *filetree.Node) error {
	file := w.dir + p
	if first, ok := w.made[n]; ok && n.Type != tar.TypeDir {
		if i := slices.IndexFunc(w.rest, func(r recordedFile) bool { return r.path() == first }); i >= 0 {
			again := w.rest[i]
			again.setPath(p)
			w.rest = append(w.rest, again)
		}
		return os.Link(w.dir+first, file)
	}
	w.made[n] = p
	switch n.Type {
	case tar.TypeDir:
		return os.Mkdir(file, 0o700)
	case tar.TypeSymlink:
		if err := os.Symlink(n.Link, file); err != nil {
			return err
		}
	case tar.TypeReg:
		f, err := os.OpenFile(file, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
		if err != nil {
			return err
		}
		if err := errors.Join(n.Content.CopyTo(f), f.Close()); err != nil {
			return err
		}
	case tar.TypeFifo:
		if err := unix.Mkfifo(file, 0o600); err != nil {
			return err
		}
	default:
		kind := uint32(unix.S_IFCHR)
		if n.Type == tar.TypeBlock {
			kind = unix.S_IFBLK
		}
		err := error(unix.EPERM)
		if w.root {
			err = unix.Mknod(file, kind|0o600, int(unix.Mkdev(uint32(n.Major), uint32(n.Minor))))
		}
		if errors.Is(err, unix.EPERM) { // an empty file in its place
			w.record(p, n)
			return errors.Join(os.WriteFile(file, nil, 0o600), setTime(file, n))
		}
		if err != nil {
			return err
		}
	}
	return w.attributes(p, n)
}

func (r *recordedFile) setPath(p string) {
	r.Path, r.RawPath = p, nil
	if !utf8.ValidString(p) {
		r.Path, r.RawPath = "", []byte(p)
	}
}

// record notes what a file is to be.
func (w *folderWriter) record(p string, n *filetree.Node) {
	r := recordedFile{Type: typeNames[n.Type], UID: n.UID, GID: n.GID, Mode: fmt.Sprintf("%04o", n.Mode), Major: n.Major, Minor: n.Minor}
	r.setPath(p)
	for name, value := range n.XAttrs {
		if r.XAttrs == nil {
			r.XAttrs = map[string][]byte{}
		}
		r.XAttrs[name] = []byte(value)
	}
	w.rest = append(w.rest, r)
}

// attributes gives a file its owner, mode, attributes and time, and records what it cannot have.
func (w *folderWriter) attributes(p string, n *filetree.Node) error {
	file := w.dir + p
	lacking := false
	if w.root {
		if err := os.Lchown(file, n.UID, n.GID); errors.Is(err, unix.EPERM) || errors.Is(err, unix.EINVAL) { // in a user namespace that has not all users
			lacking = true
		} else if err != nil {
			return err
		}
	} else {
		lacking = n.UID != 0 || n.GID != 0
	}
	for _, name := range slices.Sorted(maps.Keys(n.XAttrs)) {
		if err := unix.Lsetxattr(file, name, []byte(n.XAttrs[name]), 0); errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOTSUP) {
			lacking = true
		} else if err != nil {
			return fmt.Errorf("set attribute %q: %w", name, err)
		}
	}
	if n.Type != tar.TypeSymlink {
		mode := n.Mode
		if !w.root {
			mode = unprivilegedMode(n)
		}
		lacking = lacking || mode != n.Mode
		if err := unix.Fchmodat(unix.AT_FDCWD, file, mode, 0); err != nil {
			return fmt.Errorf("set mode: %w", err)
		}
	}
	if lacking {
		w.record(p, n)
	}
	return setTime(file, n)
}

// unprivilegedMode is the mode that a file has in a folder of one who cannot give it away.
func unprivilegedMode(n *filetree.Node) uint32 {
	mode := n.Mode | 0o600 // who packs the bundle must be able to read it
	if n.Type == tar.TypeDir {
		mode |= 0o700
	}
	if n.UID != 0 || n.GID != 0 {
		mode &^= 0o6000 // nobody is to become the one who made the bundle
	}
	return mode
}

func setTime(file string, n *filetree.Node) error {
	when := unix.Timespec{Sec: n.ModTime}
	return unix.UtimesNanoAt(unix.AT_FDCWD, file, []unix.Timespec{when, when}, unix.AT_SYMLINK_NOFOLLOW)
}

// idMaps are the mappings of a user namespace, which the owners of a folder's files are to be seen through.
type idMaps struct{ uids, gids []rspec.LinuxIDMapping }

func mapID(id int, maps []rspec.LinuxIDMapping) (int, bool) {
	if len(maps) == 0 {
		return id, true
	}
	for _, m := range maps {
		if off := int64(id) - int64(m.HostID); off >= 0 && off < int64(m.Size) {
			return int(int64(m.ContainerID) + off), true
		}
	}
	return 0, false
}

// OpenFolder reads the folder of a bundle: one that WriteFolder, umoci or podman has made, or anyone. Contents of files are read when they are needed.
//
// Owners are those of the files, through the mappings of a user namespace of config.json; those of RecordFile, and of umoci's attributes, come before that.
func OpenFolder(ctx context.Context, dir string) (_ *Bundle, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("read bundle %q: %w", dir, err)
		}
	}()
	text, err := readBounded(filepath.Join(dir, bundle.ConfigFile), maxSpec)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: a bundle is a folder with %s and %s; drafter oci unpack makes one", err, bundle.ConfigFile, bundle.RootFolder)
	}
	if err != nil {
		return nil, err
	}
	var spec rspec.Spec
	if err := json.Unmarshal(text, &spec); err != nil {
		return nil, fmt.Errorf("%s: %w", bundle.ConfigFile, err)
	}
	if spec.Root == nil || spec.Root.Path == "" || spec.Process == nil || len(spec.Process.Args) == 0 {
		return nil, fmt.Errorf("%s says neither what is to run nor where: it needs root.path and process.args", bundle.ConfigFile)
	}
	root, err := rootOf(dir, spec.Root.Path)
	if err != nil {
		return nil, err
	}
	b, err := newBundle()
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, b.Close())
		}
	}()
	b.Spec = &spec
	r := &folderReader{ctx: ctx, dir: root, links: map[[2]uint64]*filetree.Node{}, nodes: map[string]*filetree.Node{}}
	if spec.Linux != nil {
		r.ids = idMaps{spec.Linux.UIDMappings, spec.Linux.GIDMappings}
	}
	if err := r.record(filepath.Join(dir, RecordFile)); err != nil {
		return nil, err
	}
	if err := r.read("/", b.tree.Find(rootPath, false)); err != nil {
		return nil, err
	}
	b.normalise()
	return b, b.checkMounts()
}

// rootOf is the folder of a bundle's root file system: within the bundle, or one of podman's. Who has got a bundle from somebody does not expect files of this host to
// be in the disk.
func rootOf(dir, path string) (string, error) {
	root := path
	if !filepath.IsAbs(path) {
		root = filepath.Join(dir, path)
	}
	info, err := os.Lstat(root)
	if err != nil {
		return "", fmt.Errorf("its root file system: %w", err)
	}
	if !info.IsDir() {
		return "", fmt.Errorf("its root file system %q is no folder", root)
	}
	real, err := filepath.EvalSymlinks(root)
	if err != nil {
		return "", err
	}
	home, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return "", err
	}
	if !filepath.IsAbs(real) {
		if real, err = filepath.Abs(real); err != nil {
			return "", err
		}
	}
	if home, err = filepath.Abs(home); err != nil {
		return "", err
	}
	within, err := filepath.Rel(home, real)
	if (err != nil || !filepath.IsLocal(within)) && !podmanFolders.MatchString(real) {
		return "", fmt.Errorf("its root file system %q is neither within the bundle nor podman's: make it so if that is meant", root)
	}
	return root, nil
}

func readBounded(file string, limit int64) ([]byte, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(text)) > limit {
		err = fmt.Errorf("%s has more than %d bytes", filepath.Base(file), limit)
	}
	return text, err
}

// folderReader reads a folder into a tree.
type folderReader struct {
	ctx      context.Context
	dir      string
	ids      idMaps
	recorded map[string]recordedFile // nil: there is no record
	maker    int
	links    map[[2]uint64]*filetree.Node // by device and inode
	nodes    map[string]*filetree.Node
}

func (r *folderReader) record(file string) error {
	text, err := readBounded(file, maxRecord)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var rec record
	if err := json.Unmarshal(text, &rec); err != nil {
		return fmt.Errorf("%s: %w", RecordFile, err)
	}
	r.maker, r.recorded = rec.Maker, make(map[string]recordedFile, len(rec.Files))
	for _, f := range rec.Files {
		mode, err := strconv.ParseUint(f.Mode, 8, 16)
		if err != nil || mode > 0o7777 || f.UID < 0 || f.GID < 0 || int64(f.UID) > maxOwner || int64(f.GID) > maxOwner || !slices.Contains(slices.Collect(maps.Values(typeNames)), f.Type) {
			return fmt.Errorf("%s: %q is of type %q, mode %q and owner %d:%d, which is not possible", RecordFile, f.path(), f.Type, f.Mode, f.UID, f.GID)
		}
		f.realMode = uint32(mode)
		r.recorded[f.path()] = f
	}
	return nil
}

func (r *folderReader) read(p string, into *filetree.Node) error {
	if err := r.ctx.Err(); err != nil {
		return err
	}
	n, err := r.node(p)
	if err != nil {
		return fmt.Errorf("%q: %w", p, err)
	}
	children := into.Children
	*into = *n
	into.Children = children
	entries, err := os.ReadDir(r.dir + p)
	if err != nil {
		return err
	}
	for _, e := range entries {
		child := path.Join(p, e.Name())
		if e.Type()&fs.ModeSocket != 0 {
			continue // a socket is of a process
		}
		if e.IsDir() {
			d := &filetree.Node{Children: map[string]*filetree.Node{}}
			if err := r.read(child, d); err != nil {
				return err
			}
			into.Children[e.Name()] = d
			continue
		}
		n, err := r.node(child)
		if err != nil {
			return fmt.Errorf("%q: %w", child, err)
		}
		into.Children[e.Name()] = n
	}
	return nil
}

// node is one file of the folder.
func (r *folderReader) node(p string) (*filetree.Node, error) {
	file := r.dir + p
	var st unix.Stat_t
	if err := unix.Lstat(file, &st); err != nil {
		return nil, err
	}
	inode := [2]uint64{st.Dev, st.Ino}
	if n := r.links[inode]; n != nil && st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return n, nil
	}
	n := &filetree.Node{Mode: st.Mode & 0o7777, UID: int(st.Uid), GID: int(st.Gid), ModTime: st.Mtim.Sec}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		n.Type = tar.TypeDir
	case unix.S_IFREG:
		n.Type = tar.TypeReg
		n.Content = filetree.Later(st.Size, func() io.ReadCloser { return openLater(file) })
	case unix.S_IFLNK:
		n.Type = tar.TypeSymlink
		link, err := os.Readlink(file)
		if err != nil {
			return nil, err
		}
		n.Link = link
	case unix.S_IFIFO:
		n.Type = tar.TypeFifo
	case unix.S_IFCHR, unix.S_IFBLK:
		n.Type = tar.TypeChar
		if st.Mode&unix.S_IFMT == unix.S_IFBLK {
			n.Type = tar.TypeBlock
		}
		n.Major, n.Minor = int64(unix.Major(st.Rdev)), int64(unix.Minor(st.Rdev))
	default:
		return nil, fmt.Errorf("it is of type %o, which no file of a container is", st.Mode&unix.S_IFMT)
	}
	if err := readXAttrs(file, n); err != nil {
		return nil, err
	}
	if err := r.restore(p, n); err != nil {
		return nil, err
	}
	if st.Nlink > 1 {
		r.links[inode] = n
	}
	return n, nil
}

// openLater opens a file; that it cannot be, is an error of reading it.
func openLater(file string) io.ReadCloser {
	f, err := os.OpenFile(file, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return io.NopCloser(failing{err})
	}
	return f
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

// ownerXAttr is where umoci and others who unpack without privileges keep owners: https://github.com/rootless-containers/proto.
const ownerXAttr = "user.rootlesscontainers"

func readXAttrs(file string, n *filetree.Node) error {
	size, err := unix.Llistxattr(file, nil)
	if errors.Is(err, unix.ENOTSUP) || errors.Is(err, unix.EPERM) || err == nil && size == 0 {
		return nil
	}
	if err != nil {
		return fmt.Errorf("list attributes: %w", err)
	}
	names := make([]byte, size+4096)
	if size, err = unix.Llistxattr(file, names); err != nil {
		return fmt.Errorf("list attributes: %w", err)
	}
	value := make([]byte, maxXAttr)
	for name := range strings.SplitSeq(string(names[:size]), "\x00") {
		if name == "" || skippedXAttr(name) {
			continue
		}
		size, err := unix.Lgetxattr(file, name, value)
		if err != nil {
			return fmt.Errorf("read attribute %q: %w", name, err)
		}
		if n.XAttrs == nil {
			n.XAttrs = map[string]string{}
		}
		n.XAttrs[name] = string(value[:size])
	}
	return nil
}

// restore gives a file of the folder what it is to be.
func (r *folderReader) restore(p string, n *filetree.Node) error {
	if text, ok := n.XAttrs[ownerXAttr]; ok && r.recorded == nil {
		var owner rootless.Resource
		if err := proto.Unmarshal([]byte(text), &owner); err != nil {
			return fmt.Errorf("attribute %s: %w", ownerXAttr, err)
		}
		// What it does not say is as the folder has it: 0, by the mapping of its maker.
		const same = 1<<32 - 1
		n.UID, n.GID = 0, 0
		if owner.Uid != same {
			n.UID = int(owner.Uid)
		}
		if owner.Gid != same {
			n.GID = int(owner.Gid)
		}
		delete(n.XAttrs, ownerXAttr)
		return nil
	}
	rec, ok := r.recorded[p]
	if ok && (rec.Type == typeNames[n.Type] || n.Type == tar.TypeReg && n.Content.Size() == 0 && rec.Type != typeNames[tar.TypeDir] && rec.Type != typeNames[tar.TypeSymlink]) {
		mode := n.Mode
		n.UID, n.GID, n.Mode, n.Major, n.Minor = rec.UID, rec.GID, rec.realMode, rec.Major, rec.Minor
		for typ, name := range typeNames {
			if name == rec.Type {
				n.Type = typ
			}
		}
		if n.Type == tar.TypeReg || n.Type == tar.TypeDir || n.Type == tar.TypeFifo {
			if r.maker != 0 && mode != unprivilegedMode(n) {
				n.Mode = mode // somebody has changed it
			}
		}
		for name, value := range rec.XAttrs {
			if n.XAttrs == nil {
				n.XAttrs = map[string]string{}
			}
			n.XAttrs[name] = string(value)
		}
		return nil
	}
	if r.recorded != nil && n.UID == r.maker && r.maker != 0 {
		n.UID, n.GID = 0, 0
		return nil
	}
	var known [2]bool
	uid, gid := n.UID, n.GID
	n.UID, known[0] = mapID(uid, r.ids.uids)
	n.GID, known[1] = mapID(gid, r.ids.gids)
	if !known[0] || !known[1] {
		return fmt.Errorf("its owner is %d:%d, whom the mappings of %s do not have", uid, gid, bundle.ConfigFile)
	}
	return nil
}
