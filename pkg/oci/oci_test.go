package oci

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/zstd"
	rspec "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/drafter-vm/drafter/internal/testimage"
	"github.com/drafter-vm/drafter/pkg/blueprint"
	"github.com/drafter-vm/drafter/pkg/oci/bundle"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantError(t testing.TB, err error, parts ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error; want one with %q", parts)
	}
	for _, part := range parts {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("error %q lacks %q", err, part)
		}
	}
}

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, to make files of others")
	}
}

// program is a peer that Debian has; it is there after `make depend`.
func program(t testing.TB, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Fatalf("%v: run make depend", err)
	}
	return path
}

func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(program(t, name), args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// unpack makes a bundle of an image, and closes it with the test.
func unpack(t testing.TB, reference string, opts BundleOptions) *Bundle {
	t.Helper()
	image, err := Open(t.Context(), reference, OpenOptions{Architecture: "amd64"})
	must(t, err)
	defer image.Close()
	b, err := image.Bundle(t.Context(), opts)
	must(t, err)
	t.Cleanup(func() { must(t, b.Close()) })
	return b
}

// digest tells trees apart: by everything but when directories were written to.
func digest(t testing.TB, b *Bundle) string {
	t.Helper()
	h := sha256.New()
	must(t, b.rootfs().WriteTar(t.Context(), h, 0, func(int64) {}))
	return fmt.Sprintf("%x", h.Sum(nil))
}

func layoutOf(t testing.TB, images ...v1.Image) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "layout")
	testimage.WriteLayout(t, dir, "latest", images...)
	return "oci:" + dir + ":latest"
}

// small is an image without the packages, which has all that is peculiar: users, whiteouts, links, devices, attributes.
func small(t testing.TB) v1.Image {
	t.Helper()
	spec := testimage.Valkey()
	spec.Base, spec.Packages = nil, nil
	return testimage.Make(t, spec)
}

var real = map[string]func() testimage.Spec{"valkey": testimage.Valkey, "nginx": testimage.Nginx, "python": testimage.Python}

// What umoci unpacks of real images is what we unpack: every file, and what is to run.
func TestUnpackAsUmoci(t *testing.T) {
	needRoot(t)
	for name, spec := range real {
		t.Run(name, func(t *testing.T) {
			reference := layoutOf(t, testimage.Make(t, spec()))
			ours, theirs := filepath.Join(t.TempDir(), "ours"), filepath.Join(t.TempDir(), "theirs")
			must(t, unpack(t, reference, BundleOptions{}).WriteFolder(t.Context(), ours, false))
			run(t, "umoci", "unpack", "--image", strings.TrimPrefix(reference, "oci:"), theirs)
			a, b := listing(t, filepath.Join(ours, "rootfs")), listing(t, filepath.Join(theirs, "rootfs"))
			compare(t, a, b)
			if len(a) < 100 {
				t.Errorf("there are but %d files", len(a))
			}
			x, y := specOf(t, ours), specOf(t, theirs)
			for what, pair := range map[string][2]any{
				"arguments": {x.Process.Args, y.Process.Args}, "directory": {x.Process.Cwd, y.Process.Cwd}, "user": {x.Process.User, y.Process.User},
				"environment": {sorted(x.Process.Env), sorted(y.Process.Env)},
			} {
				if got, want := fmt.Sprint(pair[0]), fmt.Sprint(pair[1]); got != want {
					t.Errorf("%s: got %s, umoci has %s", what, got, want)
				}
			}

			// And a bundle of umoci's is what our own is, when it is read.
			mine, err := OpenFolder(t.Context(), ours)
			must(t, err)
			defer mine.Close()
			their, err := OpenFolder(t.Context(), theirs)
			must(t, err)
			defer their.Close()
			compare(t, headers(t, mine), headers(t, their))
		})
	}
}

func sorted(list []string) []string { return slices.Sorted(slices.Values(list)) }

func specOf(t testing.TB, dir string) rspec.Spec {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(dir, bundle.ConfigFile))
	must(t, err)
	var s rspec.Spec
	must(t, json.Unmarshal(text, &s))
	return s
}

// listing is every file below a folder with all that it is, a line each.
func listing(t testing.TB, root string) map[string]string {
	t.Helper()
	list := map[string]string{}
	inodes := map[uint64]string{}
	must(t, filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return err
		}
		name := strings.TrimPrefix(p, root)
		line := fmt.Sprintf("mode %o owner %d:%d device %d:%d", st.Mode, st.Uid, st.Gid, unix.Major(st.Rdev), unix.Minor(st.Rdev))
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			data, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" content %x time %d", sha256.Sum256(data), st.Mtim.Sec)
			if st.Nlink > 1 {
				if first, ok := inodes[st.Ino]; ok {
					line += " is " + first
				} else {
					inodes[st.Ino] = name
				}
			}
		case unix.S_IFLNK:
			link, err := os.Readlink(p)
			if err != nil {
				return err
			}
			line += " to " + link
		}
		buf := make([]byte, 4096)
		if n, err := unix.Llistxattr(p, buf); err == nil && n > 0 {
			for _, attr := range sorted(strings.Split(strings.Trim(string(buf[:n]), "\x00"), "\x00")) {
				value := make([]byte, 4096)
				n, err := unix.Lgetxattr(p, attr, value)
				if err != nil {
					return err
				}
				line += fmt.Sprintf(" %s=%x", attr, value[:n])
			}
		}
		list[name] = line
		return nil
	}))
	return list
}

func compare(t testing.TB, got, want map[string]string) {
	t.Helper()
	for name, line := range want {
		if got[name] != line {
			t.Errorf("%q: got %q, want %q", name, got[name], line)
		}
	}
	for name := range got {
		if _, ok := want[name]; !ok {
			t.Errorf("%q: is there, and should not be", name)
		}
	}
}

// The same image comes from wherever it is, also after skopeo has carried it there.
func TestSources(t *testing.T) {
	needRoot(t)
	image := small(t)
	reference := layoutOf(t, image)
	want := digest(t, unpack(t, reference, BundleOptions{}))
	dir := t.TempDir()
	storage := filepath.Join(dir, "storage.conf")
	must(t, os.WriteFile(storage, fmt.Appendf(nil, "[storage]\ndriver = \"vfs\"\nrunroot = %q\ngraphroot = %q\n", filepath.Join(dir, "run"), filepath.Join(dir, "graph")), 0o600))
	t.Setenv("CONTAINERS_STORAGE_CONF", storage)
	for _, to := range []string{
		"docker-archive:" + dir + "/docker.tar:example.com/python:3", "oci-archive:" + dir + "/oci.tar", "containers-storage:localhost/python:3", "oci:" + dir + "/other:two",
	} {
		run(t, "skopeo", "--insecure-policy", "copy", "--quiet", reference, to)
	}
	for _, from := range []string{
		"docker-archive:" + dir + "/docker.tar:example.com/python:3", "docker-archive:" + dir + "/docker.tar", "oci-archive:" + dir + "/oci.tar", dir + "/docker.tar", dir + "/oci.tar",
		"containers-storage:localhost/python:3", "oci:" + dir + "/other:two", dir + "/other",
	} {
		if got := digest(t, unpack(t, from, BundleOptions{})); got != want {
			t.Errorf("%s: another tree", from)
		}
	}
	for reference, parts := range map[string][]string{
		"oci:" + dir + "/other:three":            {"no tag \"three\"", "two"},
		"oci:" + dir:                             {"index.json"},
		"docker-archive:" + dir + "/none.tar":    {"none.tar"},
		"containers-storage:localhost/none":      {"none"},
		"docker-daemon:x":                        {"docker"},
		"containers-storage:--help":              {"--help"},
		"docker://UPPER/case":                    {"UPPER/case", "docker://NAME:TAG"},
		"docker-archive:" + dir + "/oci.tar:a:b": {"oci.tar"},
	} {
		_, err := Open(t.Context(), reference, OpenOptions{Architecture: "amd64"})
		wantError(t, err, append(parts, reference)...)
	}
	_, err := Open(t.Context(), reference, OpenOptions{Architecture: "arm64"})
	wantError(t, err, "arm64", "amd64")
}

func tools(t testing.TB) DiskOptions {
	t.Helper()
	tools, err := blueprint.OpenTools(t.Context(), blueprint.Config{})
	must(t, err)
	return DiskOptions{Mke2fs: tools.Mke2fs, Debugfs: tools.Debugfs}
}

// A disk is the same, byte for byte, whether it comes straight from the image, by a folder that root has made, or by one that nobody has made, who can
// give no file to anyone.
func TestDisk(t *testing.T) {
	needRoot(t)
	opts := tools(t)
	image := small(t)
	reference := layoutOf(t, image)
	dir := t.TempDir()
	straight := filepath.Join(dir, "straight.ext4")
	must(t, unpack(t, reference, BundleOptions{}).WriteDisk(t.Context(), straight, opts))

	folder := filepath.Join(dir, "bundle")
	must(t, unpack(t, reference, BundleOptions{}).WriteFolder(t.Context(), folder, false))
	if _, err := os.Stat(filepath.Join(folder, RecordFile)); err == nil {
		t.Errorf("root's folder has %s", RecordFile)
	}
	packed := filepath.Join(dir, "packed.ext4")
	b, err := OpenFolder(t.Context(), folder)
	must(t, err)
	must(t, b.WriteDisk(t.Context(), packed, opts))
	must(t, b.Close())
	same(t, packed, straight)

	// By debugfs, which knows nothing of us.
	for path, want := range map[string][]string{
		"/rootfs/opt/capable":      {"Mode:  0755", "security.capability (20)", "user.note (4) = \"kept\""},
		"/rootfs/opt/null":         {"Type: character special", "major/minor number: 01:03", "Mode:  0666"},
		"/rootfs/opt/links/second": {"Mode:  04755", "User:     1", "Group:     2", "Links: 2"},
		"/rootfs/data":             {"User:   999"},
		"/rootfs/opt/secret":       {"Mode:  0000", "User:  4242"},
	} {
		text := run(t, "debugfs", "-R", "stat "+path, straight)
		for _, w := range want {
			if !strings.Contains(text, w) {
				t.Errorf("%s lacks %q:\n%s", path, w, text)
			}
		}
	}
	run(t, "e2fsck", "-fn", straight)
}

func same(t testing.TB, got, want string) {
	t.Helper()
	a, err := os.ReadFile(got)
	must(t, err)
	b, err := os.ReadFile(want)
	must(t, err)
	if !bytes.Equal(a, b) {
		t.Errorf("%s is not %s", got, want)
	}
}

// TestNobody runs itself as a user who can give no file away, and compares.
func TestNobody(t *testing.T) {
	dir := os.Getenv("DRAFTER_TEST_NOBODY")
	if dir != "" {
		must(t, unpack(t, os.Getenv("DRAFTER_TEST_IMAGE"), BundleOptions{}).WriteFolder(t.Context(), filepath.Join(dir, "bundle"), false))
		b, err := OpenFolder(t.Context(), filepath.Join(dir, "bundle"))
		must(t, err)
		defer b.Close()
		must(t, os.WriteFile(filepath.Join(dir, "digest"), []byte(digest(t, b)), 0o600))
		return
	}
	needRoot(t)
	public, err := os.MkdirTemp("", "drafter-nobody-*")
	must(t, err)
	t.Cleanup(func() { must(t, os.RemoveAll(public)) })
	must(t, os.Chmod(public, 0o777))
	self, err := os.ReadFile(must2(os.Executable()))
	must(t, err)
	program := filepath.Join(public, "test")
	must(t, os.WriteFile(program, self, 0o755))
	image := small(t)
	testimage.WriteLayout(t, filepath.Join(public, "layout"), "latest", image)
	must(t, filepath.WalkDir(filepath.Join(public, "layout"), func(p string, _ fs.DirEntry, err error) error { return errors.Join(err, os.Chmod(p, 0o755)) }))
	work := filepath.Join(public, "work")
	must(t, os.Mkdir(work, 0o777))
	must(t, os.Chown(work, 65534, 65534))
	cmd := exec.Command(program, "-test.run", "^TestNobody$")
	cmd.Dir = work
	cmd.Env = []string{"DRAFTER_TEST_NOBODY=" + work, "DRAFTER_TEST_IMAGE=oci:" + public + "/layout:latest", "PATH=" + os.Getenv("PATH"), "HOME=" + work, "TMPDIR=" + work}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("as nobody: %v\n%s", err, out)
	}
	got, err := os.ReadFile(filepath.Join(work, "digest"))
	must(t, err)
	whole := unpack(t, "oci:"+public+"/layout:latest", BundleOptions{})
	if want := digest(t, whole); string(got) != want {
		b, err := OpenFolder(t.Context(), filepath.Join(work, "bundle"))
		must(t, err)
		defer b.Close()
		compare(t, headers(t, b), headers(t, whole))
		t.Error("what nobody has unpacked is not what the image has")
	}
	// What they edit stays theirs to decide: a new file is root's, one that was there has the owner that it had.
	bundleDir := filepath.Join(work, "bundle")
	must(t, os.WriteFile(filepath.Join(bundleDir, "rootfs/etc/new"), []byte("x"), 0o644))
	must(t, os.Chown(filepath.Join(bundleDir, "rootfs/etc/new"), 65534, 65534))
	must(t, os.WriteFile(filepath.Join(bundleDir, "rootfs/data/readme"), []byte("edited"), 0o644))
	must(t, os.Chmod(filepath.Join(bundleDir, "rootfs/opt/capable"), 0o700))
	b, err := OpenFolder(t.Context(), bundleDir)
	must(t, err)
	defer b.Close()
	if n := b.rootfs().Find("/opt/capable", false); n.Mode != 0o700 || n.XAttrs["security.capability"] == "" {
		t.Errorf("a file whose mode was changed has %o, and attributes %q", n.Mode, n.XAttrs)
	}
	if n := b.rootfs().Find("/etc/new", false); n.UID != 0 || n.GID != 0 {
		t.Errorf("a new file is of %d:%d", n.UID, n.GID)
	}
	if n := b.rootfs().Find("/data/readme", false); n.UID != 999 || n.Content.Size() != 6 {
		t.Errorf("an edited file is of %d, and has %d bytes", n.UID, n.Content.Size())
	}
}

// headers are the entries of a bundle's tree as tar has them, but for when directories were written to.
func headers(t testing.TB, b *Bundle) map[string]string {
	t.Helper()
	r, w := io.Pipe()
	go func() { w.CloseWithError(b.rootfs().WriteTar(t.Context(), w, 0, func(int64) {})) }()
	list := map[string]string{}
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if err == io.EOF {
			return list
		}
		must(t, err)
		if h.Typeflag == tar.TypeDir {
			h.ModTime = time.Time{}
		}
		list[h.Name] = fmt.Sprintf("%c %o %d:%d %d %s %v %d:%d %q", h.Typeflag, h.Mode, h.Uid, h.Gid, h.Size, h.Linkname, h.ModTime.Unix(), h.Devmajor, h.Devminor, h.PAXRecords)
	}
}

func must2(s string, err error) string {
	if err != nil {
		panic(err)
	}
	return s
}

// What umoci unpacks as a user who is not root is read with the owners that the image says.
func TestUmociRootless(t *testing.T) {
	needRoot(t)
	image := small(t)
	reference := layoutOf(t, image)
	dir := filepath.Join(t.TempDir(), "bundle")
	run(t, "umoci", "unpack", "--rootless", "--image", strings.TrimPrefix(reference, "oci:"), dir)
	b, err := OpenFolder(t.Context(), dir)
	must(t, err)
	defer b.Close()
	got, want := headers(t, b), headers(t, unpack(t, reference, BundleOptions{}))
	for name := range want {
		if strings.HasPrefix(name, "./opt/") { // devices and attributes are lost to umoci then
			delete(want, name)
			delete(got, name)
		}
	}
	compare(t, got, want)
	if b.Spec.Linux.UIDMappings != nil || slices.ContainsFunc(b.Spec.Linux.Namespaces, func(n rspec.LinuxNamespace) bool { return n.Type == rspec.UserNamespace }) {
		t.Error("the user namespace of the host that unpacked it is left")
	}
}

// entry is one entry of a hostile archive.
type entry = testimage.File

func file(name string) entry { return entry{Header: tar.Header{Name: name, Mode: 0o644}, Data: "x"} }
func link(name, to string) entry {
	return entry{Header: tar.Header{Name: name, Typeflag: tar.TypeSymlink, Linkname: to, Mode: 0o777}}
}
func hard(name, to string) entry {
	return entry{Header: tar.Header{Name: name, Typeflag: tar.TypeLink, Linkname: to, Mode: 0o644}}
}
func folder(name string) entry {
	return entry{Header: tar.Header{Name: name, Typeflag: tar.TypeDir, Mode: 0o755}}
}

var runs = v1.Config{Cmd: []string{"/bin/true"}}

func imageOf(t testing.TB, config v1.Config, layers ...[]entry) v1.Image {
	t.Helper()
	var list []v1.Layer
	for _, files := range layers {
		l, err := testimage.Layer(files)
		must(t, err)
		list = append(list, l)
	}
	image, err := testimage.Assemble(config, list...)
	must(t, err)
	return image
}

func tryBundle(t testing.TB, image v1.Image, opts BundleOptions) (*Bundle, error) {
	t.Helper()
	i, err := Open(t.Context(), layoutOf(t, image), OpenOptions{Architecture: "amd64"})
	if err != nil {
		return nil, err
	}
	defer i.Close()
	b, err := i.Bundle(t.Context(), opts)
	if err == nil {
		t.Cleanup(func() { must(t, b.Close()) })
	}
	return b, err
}

func TestHostile(t *testing.T) {
	huge := func(n int) string { return strings.Repeat("n", n) }
	many := map[string]string{}
	for i := range 80 {
		many[fmt.Sprintf("SCHILY.xattr.user.%d", i)] = "x"
	}
	for name, c := range map[string]struct {
		files []entry
		want  string
	}{
		"path outside":           {[]entry{file("../evil")}, "leads out"},
		"path outside, deep":     {[]entry{file("a/b/../../../evil")}, "leads out"},
		"absolute, outside":      {[]entry{file("/../evil")}, "leads out"},
		"link outside":           {[]entry{link("out", "../../etc"), file("out/evil")}, "leads out"},
		"link through links":     {[]entry{folder("a"), link("a/b", ".."), link("c", "a/b/.."), file("c/evil")}, "leads out"},
		"links in a circle":      {[]entry{link("a", "b"), link("b", "a"), file("a/x")}, "too many links"},
		"hard link outside":      {[]entry{hard("x", "../../etc/shadow")}, "leads out"},
		"hard link by a link":    {[]entry{link("out", "../.."), hard("x", "out/etc/shadow")}, "leads out"},
		"hard link to nothing":   {[]entry{hard("x", "y")}, "not there"},
		"hard link to a folder":  {[]entry{folder("d"), hard("x", "d")}, "a directory"},
		"whiteout outside":       {[]entry{file("../.wh.etc")}, "leads out"},
		"whiteout by a link":     {[]entry{link("out", "../.."), file("out/.wh.etc")}, "leads out"},
		"whiteout of the folder": {[]entry{file("a/.wh..")}, "no file"},
		"root is a file":         {[]entry{file(".")}, "root of an image"},
		"root is a link":         {[]entry{link("/", "etc")}, "root of an image"},
		"long path":              {[]entry{file(huge(5000))}, "at most 4096"},
		"long link":              {[]entry{link("x", huge(5000))}, "symbolic link to 5000"},
		"kind of file":           {[]entry{{Header: tar.Header{Name: "x", Typeflag: 'Z'}}}, "no file of an image"},
		"owner":                  {[]entry{{Header: tar.Header{Name: "x", Uid: 1 << 40}}}, "nobody can be"},
		"attributes":             {[]entry{{Header: tar.Header{Name: "x", PAXRecords: many}}}, "extended attributes"},
	} {
		t.Run(name, func(t *testing.T) {
			b, err := tryBundle(t, imageOf(t, runs, c.files), BundleOptions{})
			wantError(t, err, c.want)
			if b != nil {
				t.Error("there is a bundle all the same")
			}
		})
	}
	// Nothing of these stays behind.
	if left, _ := filepath.Glob(filepath.Join(os.TempDir(), "drafter-oci-*")); len(left) > 0 {
		for _, l := range left {
			if entries, _ := os.ReadDir(l); len(entries) > 0 {
				t.Logf("in %s: %v", l, entries)
			}
		}
	}
}

func TestBombs(t *testing.T) {
	// A long path is many directories, which no entry names; and names and attributes are in memory.
	var deep []entry
	for i := range 30 {
		deep = append(deep, file(fmt.Sprint("d", i, strings.Repeat("/a", 200), "/f")))
	}
	_, deepErr := tryBundle(t, imageOf(t, runs, deep), BundleOptions{Limits: Limits{Entries: 1000}})
	wantError(t, deepErr, "more than 1000 entries")
	_, deepErr = tryBundle(t, imageOf(t, runs, []entry{file(strings.Repeat("a/", 300) + "f")}), BundleOptions{})
	wantError(t, deepErr, "255 directories")
	passwd := entry{Header: tar.Header{Name: "etc/passwd", Mode: 0o644}, Data: string(make([]byte, maxAccounts+1))}
	_, passwdErr := tryBundle(t, imageOf(t, runs, []entry{passwd}), BundleOptions{})
	wantError(t, passwdErr, "etc/passwd")

	var files []entry
	for i := range 2000 {
		files = append(files, file(fmt.Sprint("f", i)))
	}
	_, err := tryBundle(t, imageOf(t, runs, files), BundleOptions{Limits: Limits{Entries: 1000}})
	wantError(t, err, "more than 1000 entries")

	zeros := entry{Header: tar.Header{Name: "zeros", Mode: 0o644}, Data: string(make([]byte, 8<<20))}
	image := imageOf(t, runs, []entry{zeros})
	layers, err := image.Layers()
	must(t, err)
	if size, _ := layers[0].Size(); size > 64<<10 {
		t.Fatalf("the bomb has %d bytes", size)
	}
	_, err = tryBundle(t, image, BundleOptions{Limits: Limits{Size: 4 << 20}})
	wantError(t, err, "more than 4194304 bytes")

	// What is in no file counts as well: an archive of headers, or of zeros behind its end.
	tail := gzipped(t, make([]byte, 256<<20))
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(tail)), nil }, tarball.WithMediaType(types.OCILayer))
	must(t, err)
	image, err = testimage.Assemble(runs, l)
	must(t, err)
	_, err = tryBundle(t, image, BundleOptions{Limits: Limits{Size: 1 << 20, Entries: 10}})
	wantError(t, err, "more than an image may have")
}

func gzipped(t testing.TB, data []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	_, err := w.Write(data)
	must(t, err)
	must(t, w.Close())
	return b.Bytes()
}

// Whatever byte of a layout is another, nobody is given what the image is not.
func TestCorrupt(t *testing.T) {
	image := imageOf(t, runs, []entry{file("a")}, []entry{file("b")})
	for _, what := range []string{"layer", "config", "manifest", "diff id", "short layer", "count"} {
		t.Run(what, func(t *testing.T) {
			reference := layoutOf(t, image)
			dir := strings.TrimSuffix(strings.TrimPrefix(reference, "oci:"), ":latest")
			manifest, err := image.Manifest()
			must(t, err)
			id, err := image.Digest()
			must(t, err)
			blob := func(h v1.Hash) string { return filepath.Join(dir, "blobs", h.Algorithm, h.Hex) }
			flip := func(path string, change func([]byte) []byte) {
				data, err := os.ReadFile(path)
				must(t, err)
				must(t, os.WriteFile(path, change(data), 0o644))
			}
			last := func(b []byte) []byte { b[len(b)-3] ^= 1; return b }
			want := "corrupt"
			switch what {
			case "layer":
				flip(blob(manifest.Layers[1].Digest), last)
			case "short layer":
				flip(blob(manifest.Layers[0].Digest), func(b []byte) []byte { return b[:len(b)-1] })
			case "config":
				flip(blob(manifest.Config.Digest), func(b []byte) []byte { return bytes.Replace(b, []byte("/bin/true"), []byte("/bin/evil"), 1) })
			case "manifest":
				flip(blob(id), func(b []byte) []byte { return append(b, '\n') })
			case "diff id", "count":
				file, err := image.ConfigFile()
				must(t, err)
				file = file.DeepCopy()
				if what == "count" {
					file.RootFS.DiffIDs = file.RootFS.DiffIDs[:1]
				} else {
					file.RootFS.DiffIDs[0], file.RootFS.DiffIDs[1] = file.RootFS.DiffIDs[1], file.RootFS.DiffIDs[0]
				}
				text, err := json.Marshal(file)
				must(t, err)
				m := manifest.DeepCopy()
				m.Config.Digest, m.Config.Size, err = v1.SHA256(bytes.NewReader(text))
				must(t, err)
				must(t, os.WriteFile(blob(m.Config.Digest), text, 0o644))
				mtext, err := json.Marshal(m)
				must(t, err)
				h, n, err := v1.SHA256(bytes.NewReader(mtext))
				must(t, err)
				must(t, os.WriteFile(blob(h), mtext, 0o644))
				flip(filepath.Join(dir, "index.json"), func(b []byte) []byte {
					var index v1.IndexManifest
					must(t, json.Unmarshal(b, &index))
					index.Manifests[0].Digest, index.Manifests[0].Size = h, n
					text, err := json.Marshal(index)
					must(t, err)
					return text
				})
			}
			i, err := Open(t.Context(), reference, OpenOptions{Architecture: "amd64"})
			if err == nil {
				defer i.Close()
				_, err = i.Bundle(t.Context(), BundleOptions{})
			}
			wantError(t, err, want)
		})
	}
}

// Layers are applied by the rules of the image specification.
func TestLayers(t *testing.T) {
	base := []entry{
		folder("dir"), file("dir/old"), file("dir/keep"), folder("dir/sub"), file("dir/sub/x"), folder("gone"), file("gone/x"), file("file"), folder("real"), link("sym", "real"),
		file("twin"), hard("pair", "twin"), folder("opaque"), file("opaque/low"), folder("opaque/deep"), file("opaque/deep/low"),
	}
	for name, c := range map[string]struct {
		layer  []entry
		has    []string
		hasNot []string
	}{
		"whiteout of a file":                     {[]entry{file("dir/.wh.old")}, []string{"dir/keep"}, []string{"dir/old", "dir/.wh.old"}},
		"whiteout of a folder":                   {[]entry{file(".wh.gone")}, []string{"dir/keep"}, []string{"gone", "gone/x"}},
		"whiteout of nothing":                    {[]entry{file("dir/.wh.never")}, []string{"dir/old"}, nil},
		"whiteout before":                        {[]entry{file("dir/.wh.sub"), folder("dir/sub"), file("dir/sub/new")}, []string{"dir/sub/new"}, []string{"dir/sub/x"}},
		"whiteout after":                         {[]entry{folder("dir/sub"), file("dir/sub/new"), file("dir/.wh.sub")}, []string{"dir/sub/new"}, []string{"dir/sub/x"}},
		"opaque":                                 {[]entry{folder("opaque"), file("opaque/.wh..wh..opq"), file("opaque/new")}, []string{"opaque/new"}, []string{"opaque/low", "opaque/deep"}},
		"opaque after":                           {[]entry{folder("opaque/deep"), file("opaque/deep/new"), file("opaque/.wh..wh..opq")}, []string{"opaque/deep/new"}, []string{"opaque/low", "opaque/deep/low"}},
		"metadata of unions":                     {[]entry{file(".wh..wh.plnk"), file(".wh..wh.aufs")}, []string{"file"}, []string{".wh..wh.plnk"}},
		"a file for a folder":                    {[]entry{file("gone")}, []string{"gone"}, []string{"gone/x"}},
		"a folder for a file":                    {[]entry{folder("file"), file("file/in")}, []string{"file/in"}, nil},
		"a folder for a link":                    {[]entry{folder("sym"), file("sym/in")}, []string{"sym/in"}, []string{"real/in"}},
		"through a link":                         {[]entry{file("sym/in")}, []string{"real/in"}, nil},
		"a link of a pair is replaced":           {[]entry{{Header: tar.Header{Name: "pair", Mode: 0o644}, Data: "other"}}, []string{"twin", "pair"}, nil},
		"a folder without an entry":              {[]entry{file("new/deep/in")}, []string{"new/deep/in"}, nil},
		"absolute names":                         {[]entry{file("/etc/in")}, []string{"etc/in"}, nil},
		"dots in the name":                       {[]entry{file("./dir/../dir/./in")}, []string{"dir/in"}, nil},
		"absolute link of the image":             {[]entry{link("abs", "/real"), file("abs/in")}, []string{"real/in"}, nil},
		"whiteout through a link":                {[]entry{link("to", "dir"), file("to/.wh.old")}, []string{"dir/keep"}, []string{"dir/old"}},
		"hard link to a layer below":             {[]entry{hard("new", "file")}, []string{"new"}, nil},
		"whiteout of a folder that is new below": {[]entry{file("gone/new/deep"), file(".wh.gone")}, []string{"gone/new/deep"}, []string{"gone/x"}},
		"opaque, of a folder that is new below":  {[]entry{file("opaque/a/b"), file("opaque/.wh..wh..opq")}, []string{"opaque/a/b"}, []string{"opaque/low"}},
		"whiteout, then the same again":          {[]entry{file(".wh.file"), file("file")}, []string{"file"}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			b, err := tryBundle(t, imageOf(t, runs, base, c.layer), BundleOptions{})
			must(t, err)
			tree := b.rootfs()
			for _, p := range c.has {
				if tree.Find(p, false) == nil {
					t.Errorf("%s is not there", p)
				}
			}
			for _, p := range c.hasNot {
				if n := tree.Find(p, false); n != nil {
					t.Errorf("%s is there", p)
				}
			}
		})
	}
}

// Layers without compression, and by zstd, are read too.
func TestCompressions(t *testing.T) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	must(t, w.WriteHeader(&tar.Header{Name: "a", Size: 1, Mode: 0o600}))
	_, err := w.Write([]byte("x"))
	must(t, err)
	must(t, w.Close())
	z, err := zstd.NewWriter(nil)
	must(t, err)
	for name, data := range map[string][]byte{"none": b.Bytes(), "zstd": z.EncodeAll(b.Bytes(), nil), "gzip": gzipped(t, b.Bytes())} {
		layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil })
		must(t, err)
		image, err := testimage.Assemble(runs, layer)
		must(t, err)
		got, err := tryBundle(t, image, BundleOptions{})
		must(t, err)
		if got.rootfs().Find("/a", false) == nil {
			t.Errorf("%s: the file is not there", name)
		}
	}
}

func TestConfigure(t *testing.T) {
	accounts := []entry{
		{Header: tar.Header{Name: "etc/passwd", Mode: 0o644}, Data: "root:x:0:0::/root:/bin/sh\napp:x:1000:1001::/home/app:/bin/sh\n"},
		{Header: tar.Header{Name: "etc/group", Mode: 0o644}, Data: "root:x:0:\napps:x:1001:\nextra:x:2000:app\n"},
	}
	for name, c := range map[string]struct {
		config   v1.Config
		settings Settings
		want     string
	}{
		"entrypoint and command": {v1.Config{Entrypoint: []string{"e"}, Cmd: []string{"c", "d"}}, Settings{}, "[e c d] 0:0 [] / home=/root"},
		"command":                {v1.Config{Cmd: []string{"c"}}, Settings{}, "[c] 0:0 [] / home=/root"},
		"another command":        {v1.Config{Entrypoint: []string{"e"}, Cmd: []string{"c"}}, Settings{Command: []string{"x"}}, "[e x] 0:0 [] / home=/root"},
		"another entrypoint":     {v1.Config{Entrypoint: []string{"e"}, Cmd: []string{"c"}}, Settings{Entrypoint: []string{"x"}}, "[x] 0:0 [] / home=/root"},
		"both others":            {v1.Config{Entrypoint: []string{"e"}}, Settings{Entrypoint: []string{"x"}, Command: []string{"y"}}, "[x y] 0:0 [] / home=/root"},
		"user by name":           {v1.Config{Cmd: []string{"c"}, User: "app"}, Settings{}, "[c] 1000:1001 [2000] / home=/home/app"},
		"user by number":         {v1.Config{Cmd: []string{"c"}, User: "1000"}, Settings{}, "[c] 1000:1001 [2000] / home=/home/app"},
		"unknown number":         {v1.Config{Cmd: []string{"c"}, User: "4711"}, Settings{}, "[c] 4711:0 [] / "},
		"user and group":         {v1.Config{Cmd: []string{"c"}, User: "app:extra"}, Settings{}, "[c] 1000:2000 [] / home=/home/app"},
		"another user":           {v1.Config{Cmd: []string{"c"}, User: "app"}, Settings{User: "0:1001"}, "[c] 0:1001 [] / home=/root"},
		"directory":              {v1.Config{Cmd: []string{"c"}, WorkingDir: "/w"}, Settings{}, "[c] 0:0 [] /w home=/root"},
		"another directory":      {v1.Config{Cmd: []string{"c"}, WorkingDir: "/w"}, Settings{WorkDir: "/v"}, "[c] 0:0 [] /v home=/root"},
		"home of the image":      {v1.Config{Cmd: []string{"c"}, Env: []string{"HOME=/there"}}, Settings{}, "[c] 0:0 [] / home=/there"},
		"another home":           {v1.Config{Cmd: []string{"c"}, Env: []string{"HOME=/there"}}, Settings{Env: []string{"HOME=/here"}}, "[c] 0:0 [] / home=/here"},
	} {
		t.Run(name, func(t *testing.T) {
			b, err := tryBundle(t, imageOf(t, c.config, accounts), BundleOptions{Settings: c.settings})
			must(t, err)
			p := b.Spec.Process
			home := ""
			for _, e := range p.Env {
				if v, ok := strings.CutPrefix(e, "HOME="); ok {
					home += "home=" + v
				}
			}
			if got := fmt.Sprintf("%v %d:%d %v %s %s", p.Args, p.User.UID, p.User.GID, p.User.AdditionalGids, p.Cwd, home); got != c.want {
				t.Errorf("got %s, want %s", got, c.want)
			}
			if b.rootfs().Find(p.Cwd, true) == nil {
				t.Errorf("directory %q is not there", p.Cwd)
			}
		})
	}
	for name, c := range map[string]struct {
		config   v1.Config
		settings Settings
		want     string
	}{
		"nothing to run":     {v1.Config{}, Settings{}, "neither an entrypoint nor a command"},
		"no such user":       {v1.Config{Cmd: []string{"c"}, User: "none"}, Settings{}, "none"},
		"environment":        {runs, Settings{Env: []string{"X"}}, `environment "X"`},
		"restart":            {runs, Settings{Restart: "sometimes"}, `restart "sometimes"`},
		"ready":              {runs, Settings{Ready: "port:x"}, `ready "port:x"`},
		"relative directory": {runs, Settings{WorkDir: "w"}, `work directory "w"`},
		"name":               {runs, Settings{Name: "A B"}, `name "A B"`},
		"mount at root":      {runs, Settings{Mounts: []Mount{{Type: VolumeMount, Source: "x", Target: "/"}}}, `mount at "/"`},
		"two mounts":         {runs, Settings{Mounts: []Mount{{Type: TmpfsMount, Target: "/x"}, {Type: TmpfsMount, Target: "/x/"}}}, "there are two"},
		"label":              {runs, Settings{Mounts: []Mount{{Type: VolumeMount, Source: strings.Repeat("v", 17), Target: "/x"}}}, "at most 16"},
		"mount type":         {runs, Settings{Mounts: []Mount{{Type: "nfs", Target: "/x"}}}, `type "nfs"`},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := tryBundle(t, imageOf(t, c.config, accounts), BundleOptions{Settings: c.settings})
			wantError(t, err, c.want)
		})
	}
}

// Names that are no text, and attributes of every kind, are on the disk as in the image; an owner that an image says by umoci's attribute is none.
func TestOddNames(t *testing.T) {
	odd := entry{Header: tar.Header{Name: "odd/\xff\xfe name", Mode: 0o644}, Data: "odd"}
	attributed := entry{Header: tar.Header{Name: "attributed", Mode: 0o644, PAXRecords: map[string]string{"SCHILY.xattr.security.foo": "one", "SCHILY.xattr.user.rootlesscontainers": "\x08\x05", "SCHILY.xattr.trusted.x": "two"}}, Data: "x"}
	b, err := tryBundle(t, imageOf(t, runs, []entry{odd, attributed, link("sym", "odd"), hard("twin", "sym")}), BundleOptions{})
	must(t, err)
	disk := filepath.Join(t.TempDir(), "disk")
	must(t, b.WriteDisk(t.Context(), disk, tools(t)))
	for command, want := range map[string][]string{
		"stat /rootfs/attributed": {"security.foo", "trusted.x", "User:     0"}, "ls /rootfs/odd": {`\xff\xfe name`}, "stat /rootfs/twin": {"Links: 2", "symlink"},
	} {
		got := run(t, "debugfs", "-R", command, disk)
		for _, w := range want {
			if !strings.Contains(got, w) {
				t.Errorf("%s: no %q in %q", command, w, got)
			}
		}
		if strings.Contains(got, "rootlesscontainers") {
			t.Errorf("%s: %s", command, got)
		}
	}
}

// An index in an index is verified, as everything is.
func TestNestedIndex(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "layout")
	p, err := layout.Write(dir, mutate.AppendManifests(empty.Index, mutate.IndexAddendum{Add: mutate.AppendManifests(empty.Index, mutate.IndexAddendum{Add: imageOf(t, runs, []entry{file("a")}), Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "amd64"}}})}))
	must(t, err)
	i, err := Open(t.Context(), "oci:"+dir, OpenOptions{Architecture: "amd64"})
	must(t, err)
	must(t, i.Close())
	index, err := p.ImageIndex()
	must(t, err)
	manifest, err := index.IndexManifest()
	must(t, err)
	inner := filepath.Join(dir, "blobs/sha256", manifest.Manifests[0].Digest.Hex)
	text, err := os.ReadFile(inner)
	must(t, err)
	must(t, os.WriteFile(inner, append(text, ' '), 0o644))
	_, err = Open(t.Context(), "oci:"+dir, OpenOptions{Architecture: "amd64"})
	wantError(t, err, "corrupt")
}

// Settings are found in config.json, volumes have what the image has there, and ports say when it is ready.
func TestSettings(t *testing.T) {
	image := imageOf(t, v1.Config{Cmd: []string{"c"}, Env: []string{"A=1", "B=2"}, ExposedPorts: map[string]struct{}{"9000/tcp": {}, "53/udp": {}, "8080": {}}, Volumes: map[string]struct{}{"/var/lib/x": {}}},
		[]entry{{Header: tar.Header{Name: "data/", Typeflag: tar.TypeDir, Mode: 0o700, Uid: 5, Gid: 6}}, file("data/in")})
	s := Settings{
		Env: []string{"B=3", "C=4"}, Hostname: "web", Name: "web", Restart: "always", ReadOnly: true,
		Mounts: []Mount{{Type: VolumeMount, Source: "data", Target: "/data"}, {Type: TmpfsMount, Target: "/tmp", Size: 1 << 20, ReadOnly: true}, {Type: BindMount, Source: "/etc/ssl", Target: "/etc/ssl"}},
	}
	b, err := tryBundle(t, image, BundleOptions{Settings: s})
	must(t, err)
	if b.rootfs().Find("/var/lib/x", false) == nil {
		t.Error("the image's volume has no directory")
	}
	for _, m := range b.Spec.Mounts {
		if m.Destination == "/var/lib/x" {
			t.Errorf("the image's volume is mounted: %+v", m)
		}
	}
	env := strings.Join(b.Spec.Process.Env, " ")
	if !strings.Contains(env, "A=1 B=3") || !strings.Contains(env, "C=4") || strings.Contains(env, "B=2") {
		t.Errorf("environment: %s", env)
	}
	if !b.Spec.Root.Readonly || b.Spec.Hostname != "web" || b.Spec.Process.Terminal {
		t.Errorf("got %+v %q", b.Spec.Root, b.Spec.Hostname)
	}
	for key, want := range map[string]string{bundle.NameAnnotation: "web", bundle.RestartAnnotation: "always", bundle.ReadyAnnotation: "port:8080"} {
		if got := b.Spec.Annotations[key]; got != want {
			t.Errorf("%s: got %q, want %q", key, got, want)
		}
	}
	opts := tools(t)
	volume := filepath.Join(t.TempDir(), "data.img")
	must(t, b.WriteVolume(t.Context(), volume, s.Volumes()[0], opts))
	for cmd, want := range map[string]string{"stat /": "User:     5", "cat /in": "x", "show_super_stats -h": "data"} {
		if got := run(t, "debugfs", "-R", cmd, volume); !strings.Contains(got, want) {
			t.Errorf("%s: no %q in\n%s", cmd, want, got)
		}
	}
	if b.rootfs().Find("/data/in", false) == nil {
		t.Error("the volume took the image's files away")
	}
	err = b.WriteDisk(t.Context(), filepath.Join(t.TempDir(), "small.ext4"), DiskOptions{Mke2fs: opts.Mke2fs, Size: 1 << 20})
	wantError(t, err, "no space", "larger size")
	wantError(t, b.Set(Settings{User: "x"}), bundle.ConfigFile)
}

// A bundle of podman's is for its host: what belongs to that is taken away, and what would be lost is refused.
func TestPodmanBundle(t *testing.T) {
	dir := t.TempDir()
	must(t, os.MkdirAll(filepath.Join(dir, "merged/etc"), 0o755))
	spec := rspec.Spec{
		Root:    &rspec.Root{Path: filepath.Join(dir, "merged")},
		Process: &rspec.Process{Args: []string{"x"}, Terminal: true, SelinuxLabel: "l", ApparmorProfile: "p"},
		Hooks:   &rspec.Hooks{},
		Mounts: []rspec.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc"}, {Destination: "/sys", Type: "bind", Source: "/sys"},
			{Destination: "/etc/hosts", Type: "bind", Source: "/run/containers/storage/overlay-containers/1/userdata/hosts"},
			{Destination: "/dev/shm", Type: "bind", Source: "/var/lib/containers/storage/overlay-containers/1/userdata/shm"},
			{Destination: "/etc/ssl", Type: "bind", Source: "/etc/ssl"},
		},
		Annotations: map[string]string{"io.podman.annotations.init": "FALSE", "mine": "1"},
		Linux: &rspec.Linux{
			CgroupsPath: "machine.slice:libpod:1", Namespaces: []rspec.LinuxNamespace{{Type: rspec.NetworkNamespace, Path: "/run/netns/x"}, {Type: rspec.PIDNamespace}, {Type: rspec.UserNamespace}},
			UIDMappings: []rspec.LinuxIDMapping{{ContainerID: 0, HostID: uint32(os.Getuid()), Size: 1}}, GIDMappings: []rspec.LinuxIDMapping{{ContainerID: 0, HostID: uint32(os.Getgid()), Size: 1}},
		},
	}
	write := func() {
		text, err := json.Marshal(spec)
		must(t, err)
		must(t, os.WriteFile(filepath.Join(dir, bundle.ConfigFile), text, 0o644))
	}
	write()
	b, err := OpenFolder(t.Context(), dir)
	must(t, err)
	defer b.Close()
	if b.Spec.Root.Path != "rootfs" || b.Spec.Process.Terminal || b.Spec.Process.SelinuxLabel != "" || b.Spec.Hooks != nil || b.Spec.Linux.CgroupsPath != "" || len(b.Spec.Linux.Namespaces) != 1 {
		t.Errorf("got %+v %+v", b.Spec, b.Spec.Linux)
	}
	var mounts []string
	for _, m := range b.Spec.Mounts {
		mounts = append(mounts, m.Destination+" "+m.Type+" "+m.Source)
	}
	if want := []string{"/proc proc proc", "/sys sysfs sysfs", "/dev/shm tmpfs shm", "/etc/ssl bind /etc/ssl"}; !slices.Equal(mounts, want) {
		t.Errorf("mounts: got %q, want %q", mounts, want)
	}
	if len(b.Spec.Annotations) != 1 {
		t.Errorf("annotations: %v", b.Spec.Annotations)
	}
	if n := b.rootfs().Find("/etc", false); n == nil || n.UID != 0 {
		t.Errorf("/etc is %+v", n)
	}

	spec.Mounts = append(spec.Mounts, rspec.Mount{Destination: "/data", Type: "bind", Source: "/var/lib/containers/storage/volumes/v/_data"})
	write()
	_, err = OpenFolder(t.Context(), dir)
	wantError(t, err, "/data", "volume")

	for name, text := range map[string]string{"no JSON": "{", "nothing to run": `{"root":{"path":"rootfs"}}`, "no folder": `{"root":{"path":"none"},"process":{"args":["x"]}}`} {
		must(t, os.WriteFile(filepath.Join(dir, bundle.ConfigFile), []byte(text), 0o644))
		if _, err := OpenFolder(t.Context(), dir); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	_, err = OpenFolder(t.Context(), t.TempDir())
	wantError(t, err, "config.json", "drafter oci unpack")

	// Nothing of this host gets into a disk by what a bundle says.
	outside := t.TempDir()
	must(t, os.Symlink("/etc", filepath.Join(dir, "link")))
	for _, root := range []string{"link", "link/apt", "../" + filepath.Base(outside), outside, "/etc"} {
		must(t, os.WriteFile(filepath.Join(dir, bundle.ConfigFile), fmt.Appendf(nil, `{"ociVersion":"1.0.2","root":{"path":%q},"process":{"args":["x"]}}`, root), 0o644))
		if b, err := OpenFolder(t.Context(), dir); err == nil {
			t.Errorf("root.path %q was taken", root)
			must(t, b.Close())
		}
	}
}

func TestWriteFolder(t *testing.T) {
	b, err := tryBundle(t, imageOf(t, runs, []entry{file("a")}), BundleOptions{})
	must(t, err)
	dir := filepath.Join(t.TempDir(), "bundle")
	must(t, b.WriteFolder(t.Context(), dir, false))
	wantError(t, b.WriteFolder(t.Context(), dir, false), "remove it first")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := b.WriteFolder(ctx, filepath.Join(t.TempDir(), "late"), false); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	if entries, _ := os.ReadDir(filepath.Dir(dir)); len(entries) != 1 {
		t.Errorf("left: %v", entries)
	}
	// It is replaced by a whole one only, and nothing else is.
	must(t, os.WriteFile(filepath.Join(dir, "rootfs/edited"), nil, 0o644))
	if err := b.WriteFolder(ctx, dir, true); err == nil {
		t.Error("cancelled: no error")
	}
	if _, err := os.Stat(filepath.Join(dir, "rootfs/edited")); err != nil {
		t.Errorf("what was there is gone: %v", err)
	}
	must(t, b.WriteFolder(t.Context(), dir, true))
	if _, err := os.Stat(filepath.Join(dir, "rootfs/edited")); err == nil {
		t.Error("it is the old one")
	}
	other := t.TempDir()
	must(t, os.WriteFile(filepath.Join(other, "config.json"), []byte(`{"auths":{}}`), 0o600))
	wantError(t, b.WriteFolder(t.Context(), other, true), "no bundle")
	if entries, _ := os.ReadDir(filepath.Dir(dir)); len(entries) != 1 {
		t.Errorf("left: %v", entries)
	}
}

func FuzzLayer(f *testing.F) {
	for _, files := range [][]entry{{file("a"), link("b", "a"), hard("c", "a")}, {folder("d"), file("d/.wh..wh..opq")}, {link("x", "../..")}} {
		l, err := testimage.Layer(files)
		must(f, err)
		r, err := l.Uncompressed()
		must(f, err)
		data, err := io.ReadAll(r)
		must(f, err)
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		b, err := newBundle()
		must(t, err)
		defer b.Close()
		l := &layering{tree: b.rootfs(), limits: Limits{Size: 1 << 20, Entries: 1000}}
		if l.apply(t.Context(), bytes.NewReader(data)) != nil {
			return
		}
		// What was laid out can be written, and is below its root.
		must(t, b.rootfs().WriteTar(t.Context(), io.Discard, 0, func(int64) {}))
	})
}
