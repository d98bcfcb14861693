package blueprint

import (
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

func TestReadSources(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"sources.list": "# comment\ndeb http://a.example/debian/ bookworm main contrib # end\ndeb-src http://a.example/debian bookworm main\n" +
			"deb [arch=amd64 signed-by=/k.gpg] https://b.example/debian bookworm-backports main\ndeb [broken http://x y z\ndeb http://too.short bookworm\n",
		"sources.list.d/x.sources": "Types: deb deb-src\nURIs: http://c.example/debian\nSuites: trixie trixie-updates\nComponents: main\nSigned-By: /usr/share/keyrings/x.gpg\n\n" +
			"Types: deb\nEnabled: no\nURIs: http://off.example\nSuites: trixie\nComponents: main\n\nTypes: deb-src\nURIs: http://src.example\nSuites: trixie\nComponents: main\n\n" +
			"Types: deb\nURIs: http://flat.example\nSuites: ./\n",
		"sources.list.d/inline.sources":    "Types: deb\nURIs: http://d.example/debian\nSuites: forky\nComponents: main\nSigned-By:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n abc\n -----END PGP PUBLIC KEY BLOCK-----\n",
		"sources.list.d/off.list.disabled": "deb http://never.example x main\n",
	} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := readSources(dir)
	if err != nil {
		t.Fatal(err)
	}
	want := []Source{
		{URI: "http://a.example/debian", Suite: "bookworm", Components: []string{"main", "contrib"}},
		{URI: "https://b.example/debian", Suite: "bookworm-backports", Components: []string{"main"}, SignedBy: "/k.gpg"},
		{URI: "http://d.example/debian", Suite: "forky", Components: []string{"main"}, SignedBy: "-----BEGIN PGP PUBLIC KEY BLOCK-----\n\nabc\n-----END PGP PUBLIC KEY BLOCK-----\n"},
		{URI: "http://c.example/debian", Suite: "trixie", Components: []string{"main"}, SignedBy: "/usr/share/keyrings/x.gpg"},
		{URI: "http://c.example/debian", Suite: "trixie-updates", Components: []string{"main"}, SignedBy: "/usr/share/keyrings/x.gpg"},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

func TestCompleteSources(t *testing.T) {
	src := func(uri, suite string) Source { return Source{URI: uri, Suite: suite, Components: []string{"main"}} }
	for _, test := range []struct {
		name       string
		configured []Source
		want       []string // "URI suite", with "?" where it may be missing
	}{
		{"nothing configured", nil, []string{"http://deb.debian.org/debian bookworm", "http://deb.debian.org/debian bookworm-updates?", "http://deb.debian.org/debian-security bookworm-security?", "http://deb.debian.org/debian bookworm-backports?"}},
		{"all configured", []Source{src("http://m/debian", "bookworm"), src("http://m/debian", "bookworm-updates"), src("http://s/sec", "bookworm-security"), src("http://b/debian", "bookworm-backports")},
			[]string{"http://m/debian bookworm", "http://m/debian bookworm-updates", "http://s/sec bookworm-security", "http://b/debian bookworm-backports"}},
		{"a newer host", []Source{src("http://m/debian", "trixie"), src("http://s/sec", "trixie-security")},
			[]string{"http://m/debian bookworm", "http://m/debian bookworm-updates?", "http://s/sec bookworm-security?", "http://m/debian bookworm-backports?"}},
		{"others ignored", []Source{src("https://cloud.example/apt", "cloud-sdk-bookworm"), src("cdrom:[x]/", "bookworm"), src("http://u/ubuntu", "noble")},
			[]string{"http://deb.debian.org/debian bookworm", "http://deb.debian.org/debian bookworm-updates?", "http://deb.debian.org/debian-security bookworm-security?", "http://deb.debian.org/debian bookworm-backports?"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			var got []string
			for _, s := range completeSources(test.configured, "bookworm") {
				mark := ""
				if s.optional {
					mark = "?"
				}
				got = append(got, s.String()+mark)
			}
			if fmt.Sprint(got) != fmt.Sprint(test.want) {
				t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(test.want, "\n"))
			}
		})
	}
}
