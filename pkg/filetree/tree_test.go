package filetree

import (
	"archive/tar"
	"bytes"
	"io"
	"slices"
	"strings"
	"testing"
)

func newTestTree(t testing.TB) *Tree {
	t.Helper()
	s, err := NewSpool(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return New(s)
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestTreeFollowsLinksWithin(t *testing.T) {
	tr := newTestTree(t)
	must(t, tr.Mkdir("/usr/lib", 0o755, 0, 0))
	must(t, tr.Symlink("usr/lib", "/lib"))
	must(t, tr.Symlink("/../../usr/lib/../lib", "/odd"))
	must(t, tr.Symlink("loop", "/loop"))
	must(t, tr.WriteFile("/lib/x", "data", 0o600))
	for p, want := range map[string]string{"/usr/lib/x": "data", "/lib/x": "data", "/odd/x": "data", "/lib/../../../lib/x": "data", "lib//./x": "data"} {
		if got, err := tr.ReadFile(p); err != nil || string(got) != want {
			t.Errorf("%s: got %q, %v", p, got, err)
		}
	}
	if n := tr.Find("/loop/x", true); n != nil {
		t.Errorf("a loop of links led to %+v", n)
	}
	if err := tr.WriteFile("/loop/x", "", 0o644); err == nil {
		t.Error("a file was written behind a loop of links")
	}
	if err := tr.WriteFile("/lib/x/y", "", 0o644); err == nil {
		t.Error("a file was written below a file")
	}
	// A folder of a package does not replace a link to one; a file never replaces a folder.
	must(t, tr.Put("/lib", &Node{Type: tar.TypeDir, Mode: 0o700}))
	if n := tr.Find("/lib", false); n.Type != tar.TypeSymlink {
		t.Error("the link /lib was replaced by a folder")
	}
	if err := tr.WriteFile("/usr", "", 0o644); err == nil {
		t.Error("a folder was replaced by a file")
	}
}

func TestWriteTar(t *testing.T) {
	tr := newTestTree(t)
	big := strings.Repeat("spooled ", 20_000)
	c, err := tr.Spool.Put(strings.NewReader(big), int64(len(big)))
	must(t, err)
	n := &Node{Type: tar.TypeReg, Mode: 0o4755, UID: 7, GID: 8, ModTime: 50, Content: c}
	must(t, tr.Put("/b/first", n))
	must(t, tr.Put("/a/link", n))
	must(t, tr.Symlink("../b", "/a/sym"))
	must(t, tr.Put("/dev/null", &Node{Type: tar.TypeChar, Mode: 0o666, Major: 1, Minor: 3, ModTime: 500}))
	var first, second bytes.Buffer
	for _, b := range []*bytes.Buffer{&first, &second} {
		must(t, tr.WriteTar(t.Context(), b, 100, func(int64) {}))
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
