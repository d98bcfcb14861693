package blueprint

import (
	"strings"
	"testing"
)

// testIndex makes an index of stanzas, one source a map entry in the order of priority of their suites.
func testIndex(t testing.TB, suites map[string]string) *index {
	t.Helper()
	ix := &index{packages: map[string][]*candidate{}, provides: map[string][]provider{}}
	for suite, text := range suites {
		var full strings.Builder
		for st := range stanzas([]byte(text)) {
			full.Write(st)
			if st.get("Version") == "" {
				full.WriteString("Version: 1\n")
			}
			full.WriteString("Size: 1\nArchitecture: amd64\nSHA256: " + suite + "/" + st.get("Package") + "/" + st.get("Version") + "\n\n")
		}
		if err := ix.add([]byte(full.String()), Source{URI: "http://x", Suite: suite}); err != nil {
			t.Fatal(err)
		}
	}
	ix.sort()
	return ix
}

func TestResolve(t *testing.T) {
	const main = `Package: app
Version: 2.0-1
Depends: lib (>= 1.5), awk, mail-server | fancy-mail

Package: lib
Version: 1.6

Package: mawk
Priority: required
Provides: awk

Package: gawk
Priority: optional
Provides: awk

Package: postfix
Provides: mail-server

Package: needs-new
Depends: lib (>= 2)

Package: needs-exact
Depends: lib (= 1.6)

Package: cycle-a
Depends: cycle-b

Package: cycle-b
Depends: cycle-a

Package: hates-lib
Conflicts: lib (<< 3)

Package: broken
Depends: nowhere | nothing (>= 1)

Package: needs-provided-version
Depends: versioned (>= 2)

Package: old-provider
Provides: versioned

Package: new-provider
Provides: versioned (= 2.1)
`
	const backports = `Package: lib
Version: 2.1~bpo12+1

Package: only-here
Version: 3
Depends: lib

Package: app
Version: 9~bpo12+1
`
	ix := testIndex(t, map[string]string{"bookworm": main, "bookworm-backports": backports})
	for _, test := range []struct {
		name   string
		wants  []string
		prefer map[string]string
		want   string // packages in order, or part of the error after "error: "
	}{
		{name: "dependencies first, mawk before gawk, provided", wants: []string{"app"}, want: "lib 1.6, mawk 1, postfix 1, app 2.0-1"},
		{name: "an alternative asked for by name", wants: []string{"app", "gawk"}, want: "lib 1.6, gawk 1, postfix 1, app 2.0-1"},
		{name: "backports where nothing else has it", wants: []string{"only-here"}, want: "lib 1.6, only-here 3"},
		{name: "backports where nothing else fits", wants: []string{"needs-new"}, want: "lib 2.1~bpo12+1, needs-new 1"},
		{name: "a demand that comes late", wants: []string{"app", "needs-new"}, want: "lib 2.1~bpo12+1, mawk 1, postfix 1, app 2.0-1, needs-new 1"},
		{name: "demands at odds", wants: []string{"needs-exact", "needs-new"}, want: "error: no version of package \"lib\" is = 1.6 (by needs-exact 1) and >= 2"},
		{name: "a suite by name", wants: []string{"app/bookworm-backports"}, want: "app 9~bpo12+1"},
		{name: "a version by name", wants: []string{"lib=2.1~bpo12+1"}, want: "lib 2.1~bpo12+1"},
		{name: "a suite without it", wants: []string{"gawk/bookworm-backports"}, want: `error: package "gawk" is not served as "gawk/bookworm-backports"; there are 1 (bookworm)`},
		{name: "a cycle", wants: []string{"cycle-a"}, want: "cycle-b 1, cycle-a 1"},
		{name: "a conflict", wants: []string{"app", "hates-lib"}, want: "error: packages hates-lib 1 and lib 1.6 cannot be installed together"},
		{name: "nothing has it", wants: []string{"broken"}, want: `error: package broken 1 depends on "nowhere | nothing (>= 1)", which no source has`},
		{name: "an unknown name", wants: []string{"mawkk"}, want: `error: package "mawkk" is unknown; did you mean "mawk" or "gawk"?`},
		{name: "a provided version", wants: []string{"needs-provided-version"}, want: "new-provider 1, needs-provided-version 1"},
		{name: "the locked one is preferred", wants: []string{"lib"}, prefer: map[string]string{"lib": "bookworm-backports/lib/2.1~bpo12+1"}, want: "lib 2.1~bpo12+1"},
		{name: "a locked one that is gone", wants: []string{"lib"}, prefer: map[string]string{"lib": "gone"}, want: "lib 1.6"},
	} {
		t.Run(test.name, func(t *testing.T) {
			var wants []want
			for _, name := range test.wants {
				w, err := parseWant(name)
				if err != nil {
					t.Fatal(err)
				}
				wants = append(wants, w)
			}
			chosen, err := ix.resolve(wants, test.prefer, nil)
			if text, ok := strings.CutPrefix(test.want, "error: "); ok {
				if err == nil || !strings.Contains(err.Error(), text) {
					t.Fatalf("got %v, error %v, want an error with %q", chosen, err, text)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, c := range chosen {
				got = append(got, c.String())
			}
			if strings.Join(got, ", ") != test.want {
				t.Errorf("got %q, want %q", strings.Join(got, ", "), test.want)
			}
		})
	}
}

func TestKernelBehindMetaPackage(t *testing.T) {
	ix := testIndex(t, map[string]string{"bookworm": "Package: linux-image-cloud-amd64\nDepends: linux-image-6.1.0-9-cloud-amd64 (= 1)\n\n" +
		"Package: linux-image-6.1.0-9-cloud-amd64\nDepends: kmod, linux-base, initramfs-tools | linux-initramfs-tool\n\nPackage: loop\nDepends: linux-image-loop\n\nPackage: linux-image-loop\nDepends: linux-image-loop\n"})
	if c, err := ix.kernel("linux-image-cloud-amd64", nil); err != nil || c.Name != "linux-image-6.1.0-9-cloud-amd64" {
		t.Errorf("got %v and error %v", c, err)
	}
	if _, err := ix.kernel("loop", nil); err == nil || !strings.Contains(err.Error(), "leads to no kernel") {
		t.Errorf("a meta package that names itself: got error %v", err)
	}
}

func TestParseWant(t *testing.T) {
	for _, bad := range []string{"", "a", "UPPER", "two words", "x/", "x=", "../x", "-x", "a/b/../c d"} {
		if w, err := parseWant(bad); err == nil && !(w.suite != "" && bad == "a/b/../c d") {
			t.Errorf("%q was taken for %+v", bad, w)
		}
	}
}

// The order is Debian policy's, 5.6.12; the same table checks our reading of dpkg --compare-versions.
func TestCompareVersions(t *testing.T) {
	for _, test := range []struct {
		a, op, b string
		want     bool
	}{
		{"1.0", "eq", "1.0", true}, {"1.0", "lt", "1.1", true}, {"1.10", "gt", "1.9", true}, {"1.0~rc1", "lt", "1.0", true}, {"1.0~~", "lt", "1.0~", true},
		{"1:0.1", "gt", "9", true}, {"1.0-1", "lt", "1.0-2", true}, {"1.0", "eq", "1.0-0", true}, {"1.0+b1", "gt", "1.0", true}, {"6.12.95-1~bpo12+1", "lt", "6.12.95-1", true},
		{"1.0a", "lt", "1.0+", true}, {"00.1", "eq", "0.1", true}, {"1.0", "ge", "1.0", true}, {"1.0", "ne", "1.0", false}, {"1.0", "unknown", "1.0", false},
		{"", "lt", "1", true}, {"", "lt-nl", "1", false}, {"", "gt-nl", "1", true}, {"1", "gt", "", true}, {"1", "lt-nl", "", true}, {"", "eq", "", true},
	} {
		if got := compareVersions(test.a, test.op, test.b); got != test.want {
			t.Errorf("%q %s %q: got %v", test.a, test.op, test.b, got)
		}
	}
}
