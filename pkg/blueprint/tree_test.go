package blueprint

import (
	"archive/tar"
	"bytes"
	"io"
	"maps"
	"slices"
	"strings"
	"testing"
)

func newTestTree(t testing.TB) *tree {
	t.Helper()
	s, err := newSpool(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return newTree(s)
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestTreeFollowsLinksWithin(t *testing.T) {
	tr := newTestTree(t)
	must(t, tr.mkdir("/usr/lib", 0o755, 0, 0))
	must(t, tr.symlink("usr/lib", "/lib"))
	must(t, tr.symlink("/../../usr/lib/../lib", "/odd"))
	must(t, tr.symlink("loop", "/loop"))
	must(t, tr.writeFile("/lib/x", "data", 0o600))
	for p, want := range map[string]string{"/usr/lib/x": "data", "/lib/x": "data", "/odd/x": "data", "/lib/../../../lib/x": "data", "lib//./x": "data"} {
		if got, err := tr.readFile(p); err != nil || string(got) != want {
			t.Errorf("%s: got %q, %v", p, got, err)
		}
	}
	if n := tr.find("/loop/x", true); n != nil {
		t.Errorf("a loop of links led to %+v", n)
	}
	if err := tr.writeFile("/loop/x", "", 0o644); err == nil {
		t.Error("a file was written behind a loop of links")
	}
	if err := tr.writeFile("/lib/x/y", "", 0o644); err == nil {
		t.Error("a file was written below a file")
	}
	// A folder of a package does not replace a link to one; a file never replaces a folder.
	must(t, tr.put("/lib", &node{typ: tar.TypeDir, mode: 0o700}))
	if n := tr.find("/lib", false); n.typ != tar.TypeSymlink {
		t.Error("the link /lib was replaced by a folder")
	}
	if err := tr.writeFile("/usr", "", 0o644); err == nil {
		t.Error("a folder was replaced by a file")
	}
}

func TestWriteTar(t *testing.T) {
	tr := newTestTree(t)
	big := strings.Repeat("spooled ", 20_000)
	c, err := tr.spool.put(strings.NewReader(big), int64(len(big)))
	must(t, err)
	n := &node{typ: tar.TypeReg, mode: 0o4755, uid: 7, gid: 8, mtime: 50, content: c}
	must(t, tr.put("/b/first", n))
	must(t, tr.put("/a/link", n))
	must(t, tr.symlink("../b", "/a/sym"))
	must(t, tr.put("/dev/null", &node{typ: tar.TypeChar, mode: 0o666, major: 1, minor: 3, mtime: 500}))
	var first, second bytes.Buffer
	for _, b := range []*bytes.Buffer{&first, &second} {
		must(t, tr.writeTar(t.Context(), b, 100, func(int64) {}))
	}
	if !bytes.Equal(first.Bytes(), second.Bytes()) {
		t.Error("two writings of one tree differ")
	}
	var got []string
	r := tar.NewReader(&first)
	for {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		must(t, err)
		if h.Name == "./a/link" {
			data, err := io.ReadAll(r)
			must(t, err)
			if string(data) != big || h.Mode != 0o4755 || h.Uid != 7 || h.Gid != 8 || h.ModTime.Unix() != 50 {
				t.Errorf("%+v with %d bytes", h, len(data))
			}
		}
		if h.ModTime.Unix() > 100 {
			t.Errorf("%s is of %d, younger than the epoch", h.Name, h.ModTime.Unix())
		}
		got = append(got, h.Name+"|"+string(h.Typeflag)+"|"+h.Linkname)
	}
	want := []string{"./|5|", "./a/|5|", "./a/link|0|", "./a/sym|2|../b", "./b/|5|", "./b/first|1|./a/link", "./dev/|5|", "./dev/null|3|"}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// testDeb makes a .deb with the given control file, scripts beside it, and files; a value "-> x" is a symbolic link, a
// name that ends in / a folder.
func testDeb(t testing.TB, control string, files, scripts map[string]string) []byte {
	t.Helper()
	pack := func(files map[string]string) string {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for _, name := range slices.Sorted(maps.Keys(files)) {
			h := &tar.Header{Name: "./" + name, Mode: 0o644, Size: int64(len(files[name])), Typeflag: tar.TypeReg}
			body := files[name]
			if target, ok := strings.CutPrefix(body, "-> "); ok {
				h.Typeflag, h.Linkname, h.Size, body = tar.TypeSymlink, target, 0, ""
			}
			if strings.HasSuffix(name, "/") {
				h.Typeflag, h.Size, h.Mode, body = tar.TypeDir, 0, 0o755, ""
			}
			must(t, w.WriteHeader(h))
			_, err := w.Write([]byte(body))
			must(t, err)
		}
		must(t, w.Close())
		return b.String()
	}
	meta := map[string]string{"control": control}
	maps.Copy(meta, scripts)
	return arArchive([2]string{"debian-binary", "2.0\n"}, [2]string{"control.tar", pack(meta)}, [2]string{"data.tar.zst", string(compressors["zstd"](t, []byte(pack(files))))})
}

func openTestDeb(t testing.TB, tr *tree, name, control string, files, scripts map[string]string) *deb {
	t.Helper()
	data := testDeb(t, "Package: "+name+"\n"+control, files, scripts)
	d, err := readDeb(t.Context(), bytes.NewReader(data), int64(len(data)), tr.spool, keepPath)
	must(t, err)
	d.Name, d.Version, d.Arch = name, "1", "amd64"
	must(t, tr.install(d))
	return d
}

func TestKeepPath(t *testing.T) {
	for p, want := range map[string]bool{
		"/usr/share/doc/x/copyright": true, "/usr/share/doc/x/changelog.gz": false, "/usr/share/doc/x": true, "/usr/share/man/man1/x.1.gz": false,
		"/usr/share/locale/de/LC_MESSAGES/x.mo": false, "/usr/share/locale/locale.alias": true, "/usr/bin/x": true,
	} {
		if got := keepPath(p); got != want {
			t.Errorf("%s: got %v", p, got)
		}
	}
}

// Packages are unpacked several at a time into one spool.
func TestOpenAll(t *testing.T) {
	c, err := newCache(t.TempDir())
	must(t, err)
	var packages []Package
	for i := range 12 {
		name := "pkg" + itoa(i)
		data := testDeb(t, "Package: "+name+"\n", map[string]string{"usr/share/" + name: strings.Repeat(name, 30_000), "etc/" + name: name}, nil)
		must(t, writeFileAtomic(c.path(sumOf(data)), data, 0o644))
		packages = append(packages, Package{Name: name, Version: "1", SHA256: sumOf(data), Size: int64(len(data))})
	}
	tr := newTestTree(t)
	debs, err := c.openAll(t.Context(), packages, tr.spool, keepPath, func(_, _ int64) {})
	must(t, err)
	for i, d := range debs {
		must(t, tr.install(d))
		name := "pkg" + itoa(i)
		for p, want := range map[string]string{"/usr/share/" + name: strings.Repeat(name, 30_000), "/etc/" + name: name} {
			if got, err := tr.readFile(p); err != nil || string(got) != want {
				t.Errorf("%s: got %d bytes, %v", p, len(got), err)
			}
		}
	}
}
