package blueprint

import (
	"bytes"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/drafter-vm/drafter/pkg/filetree"
)

func TestStanzas(t *testing.T) {
	text := "# a comment\nPackage: a\nDepends: b,\n c (>= 1)\nEmpty:\nversion: 1\n\n\n\nPackage: b\n#inside\nX: y\n\n"
	all := slices.Collect(stanzas([]byte(text)))
	if len(all) != 2 {
		t.Fatalf("got %d stanzas, want 2", len(all))
	}
	for _, test := range []struct {
		i           int
		field, want string
	}{
		{0, "Package", "a"}, {0, "Depends", "b,\n c (>= 1)"}, {0, "Empty", ""}, {0, "Version", "1"}, {0, "Missing", ""},
		{1, "package", "b"}, {1, "X", "y"}, {1, "Pack", ""},
	} {
		if got := all[test.i].get(test.field); got != test.want {
			t.Errorf("stanza %d, field %q: got %q, want %q", test.i, test.field, got, test.want)
		}
	}
}

func FuzzStanzas(f *testing.F) {
	f.Add([]byte("Package: a\nDepends: b,\n c\n\nPackage: b\n"))
	f.Add([]byte("#\n\n#\n \n:\n::\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		for st := range stanzas(data) {
			st.get("Package")
			st.get("Depends")
			for range relations(st.get("Depends")) {
			}
		}
		parseDeb822Sources(data)
		parseSourcesList(data)
		if l, err := parseLock(data); err == nil {
			again, err := parseLock(l.text())
			if err != nil || !bytes.Equal(again.text(), l.text()) {
				t.Fatalf("lock does not survive a round trip: %v", err)
			}
		}
		_, _ = parseRelease(data)
	})
}

// arArchive makes an archive of members, in the order given.
func arArchive(members ...[2]string) []byte {
	var b bytes.Buffer
	b.WriteString(arMagic)
	for _, m := range members {
		h := []byte(strings.Repeat(" ", 58) + "`\n")
		copy(h, m[0])
		copy(h[40:], "100644")
		copy(h[48:], itoa(len(m[1])))
		b.Write(h)
		b.WriteString(m[1])
		if len(m[1])%2 == 1 {
			b.WriteByte('\n')
		}
	}
	return b.Bytes()
}

func TestArReader(t *testing.T) {
	data := arArchive([2]string{"debian-binary", "2.0\n"}, [2]string{"odd/", "abc"}, [2]string{"last", ""})
	r, err := newArReader(bytes.NewReader(data), int64(len(data)))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for {
		name, member, err := r.next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(member)
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, name+"="+string(b))
	}
	if want := []string{"debian-binary=2.0\n", "odd=abc", "last="}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	for name, bad := range map[string][]byte{
		"other file": []byte("PK\x03\x04 not an ar archive"), "truncated header": data[:20], "size beyond the end": bytes.Replace(data, []byte("4         `"), []byte("999999    `"), 1),
	} {
		r, err := newArReader(bytes.NewReader(bad), int64(len(bad)))
		if err == nil {
			_, _, err = r.next()
		}
		if err == nil || err == io.EOF {
			t.Errorf("%s: got %v, want an error", name, err)
		}
	}
}

func FuzzDeb(f *testing.F) {
	f.Add(arArchive([2]string{"debian-binary", "2.0\n"}, [2]string{"control.tar", ""}, [2]string{"data.tar.xz", "x"}))
	f.Add(testDeb(f, "Package: x\n", map[string]string{"usr/bin/x": "y"}, nil))
	f.Fuzz(func(t *testing.T, data []byte) {
		s, err := filetree.NewSpool(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		if d, err := readDeb(t.Context(), bytes.NewReader(data), int64(len(data)), s, keepPath); err == nil {
			_ = installDeb(filetree.New(s), d)
		}
	})
}
