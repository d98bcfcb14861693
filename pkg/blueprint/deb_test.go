package blueprint

import (
	"archive/tar"
	"bytes"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/drafter-vm/drafter/pkg/filetree"
)

func newTestTree(t testing.TB) *filetree.Tree {
	t.Helper()
	s, err := filetree.NewSpool(t.TempDir())
	must(t, err)
	t.Cleanup(func() { s.Close() })
	return filetree.New(s)
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
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

func openTestDeb(t testing.TB, tr *filetree.Tree, name, control string, files, scripts map[string]string) *deb {
	t.Helper()
	data := testDeb(t, "Package: "+name+"\n"+control, files, scripts)
	d, err := readDeb(t.Context(), bytes.NewReader(data), int64(len(data)), tr.Spool, keepPath)
	must(t, err)
	d.Name, d.Version, d.Arch = name, "1", "amd64"
	must(t, installDeb(tr, d))
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
	debs, err := c.openAll(t.Context(), packages, tr.Spool, keepPath, func(_, _ int64) {})
	must(t, err)
	for i, d := range debs {
		must(t, installDeb(tr, d))
		name := "pkg" + itoa(i)
		for p, want := range map[string]string{"/usr/share/" + name: strings.Repeat(name, 30_000), "/etc/" + name: name} {
			if got, err := tr.ReadFile(p); err != nil || string(got) != want {
				t.Errorf("%s: got %d bytes, %v", p, len(got), err)
			}
		}
	}
}
