package main

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestEndsRefuse gives terminator, mounter and serve what they cannot use. Each message names what is wrong.
func TestEndsRefuse(t *testing.T) {
	f := newForeign(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	taken := l.Addr().String()
	defer l.Close()
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	nobody := free.Addr().String()
	free.Close()
	out := filepath.Join(f.dir, "out")
	device := func(format string, args ...any) string { return "[" + fmt.Sprintf(format, args...) + "]" }
	for _, tt := range []struct {
		name   string
		line   []string
		status int
		want   []string
	}{
		{"terminator: argument", []string{"terminator", "x"}, 2, []string{`unexpected argument "x"`}},
		{"terminator: no address", []string{"terminator", "--raddr", "", "--package", out}, 2, []string{"--raddr is empty"}},
		{"terminator: bad address", []string{"terminator", "--raddr", "nowhere", "--package", out}, 2, []string{"--raddr", `"nowhere"`, "HOST:PORT"}},
		{"terminator: nobody there", []string{"terminator", "--raddr", nobody, "--package", out}, 1, []string{"--raddr", nobody, "--laddr"}},
		{"terminator: package exists", []string{"terminator", "--raddr", nobody, "--package", f.pkg}, 1, []string{"--package", f.pkg, "nothing is overwritten"}},
		{"terminator: no package", []string{"terminator", "--raddr", nobody, "--package", ""}, 2, []string{"--package is empty"}},
		{"terminator: both", []string{"terminator", "--raddr", nobody, "--package", out, "--devices", "[]"}, 2, []string{"--devices and --package exclude"}},
		{"terminator: no devices", []string{"terminator", "--raddr", nobody, "--devices", "[]"}, 2, []string{"--devices", "empty"}},
		{"terminator: no output", []string{"terminator", "--raddr", nobody, "--devices", device(`{"name":"disk"}`)}, 2, []string{`"disk" has no "output"`}},
		{"terminator: unknown key", []string{"terminator", "--raddr", nobody, "--devices", device(`{"name":"disk","path":"x"}`)}, 2, []string{`unknown key "path"`, "output"}},
		{"terminator: no memory", []string{"terminator", "--raddr", nobody, "--devices", device(`{"name":"state","output":%q}`, out)}, 2, []string{`no device "memory"`}},
		{"terminator: file exists", []string{"terminator", "--raddr", nobody, "--devices", device(`{"name":"state","output":%q},{"name":"memory","output":%q}`, out, f.file("memory"))}, 2, []string{`"memory"`, "nothing is overwritten"}},
		{"terminator: workers", []string{"terminator", "--raddr", nobody, "--package", out, "--concurrency", "0"}, 2, []string{"--concurrency 0"}},
		{"terminator: rescue timeout", []string{"terminator", "--raddr", nobody, "--package", out, "--rescue-timeout", "-1s"}, 2, []string{"--rescue-timeout -1s"}},
		{"terminator: settle a copy", []string{"terminator", "--raddr", nobody, "--package", out, "--settle", "--copy"}, 2, []string{"--settle and --copy"}},
		{"terminator: settle nothing", []string{"terminator", "--raddr", nobody, "--package", out, "--settle"}, 1, []string{`"state"`, "no such file"}},
		{"terminator: settle what came from nobody", []string{"terminator", "--raddr", nobody, "--package", f.pkg, "--settle"}, 1, []string{"nobody needs to be told"}},

		{"mounter: argument", []string{"mounter", "x"}, 2, []string{`unexpected argument "x"`}},
		{"mounter: no folder", []string{"mounter", "--package", f.pkg, "--mount", ""}, 2, []string{"--mount is empty"}},
		{"mounter: no package", []string{"mounter", "--package", filepath.Join(f.dir, "no"), "--mount", out}, 1, []string{"manifest.json is missing"}},
		{"mounter: bad laddr", []string{"mounter", "--package", f.pkg, "--mount", out, "--laddr", "x"}, 2, []string{"--laddr", "HOST:PORT"}},
		{"mounter: bad raddr", []string{"mounter", "--package", out, "--mount", out, "--raddr", "x"}, 2, []string{"--raddr", "HOST:PORT"}},
		{"mounter: port in use", []string{"mounter", "--package", f.pkg, "--mount", out, "--laddr", taken}, 1, []string{"--laddr", taken, "choose another port"}},
		{"mounter: nobody there", []string{"mounter", "--package", filepath.Join(f.dir, "new"), "--mount", out, "--raddr", nobody}, 1, []string{"--raddr", nobody}},
		{"mounter: both", []string{"mounter", "--package", f.pkg, "--mount", out, "--devices", "[]"}, 2, []string{"--devices excludes"}},
		{"mounter: instance is the package", []string{"mounter", "--package", f.pkg, "--instance", f.pkg, "--mount", out}, 2, []string{"--instance", "the package itself"}},
		{"mounter: unknown key", []string{"mounter", "--mount", out, "--devices", device(`{"name":"disk","mount":"x"}`)}, 2, []string{`unknown key "mount"`}},
		{"mounter: mount point in use", []string{"mounter", "--package", f.pkg, "--mount", f.dir}, 1, []string{f.dir, "not empty"}},
		{"mounter: workers", []string{"mounter", "--package", f.pkg, "--mount", out, "--concurrency", "0"}, 2, []string{"--concurrency 0"}},

		{"serve: argument", []string{"serve", "x"}, 2, []string{`unexpected argument "x"`}},
		{"serve: no address", []string{"serve", "--package", f.pkg, "--laddr", ""}, 2, []string{"--laddr is empty"}},
		{"serve: bad address", []string{"registry", "--package", f.pkg, "--laddr", "x"}, 2, []string{"--laddr", "HOST:PORT"}},
		{"serve: port in use", []string{"serve", "--package", f.pkg, "--laddr", taken}, 1, []string{"--laddr", taken, "choose another port"}},
		{"serve: no package", []string{"serve", "--package", filepath.Join(f.dir, "no"), "--laddr", "127.0.0.1:0"}, 1, []string{"--package", "manifest.json is missing"}},
		{"serve: no archive", []string{"serve", "--package", f.file("config"), "--laddr", "127.0.0.1:0", "--cache", out}, 1, []string{"--package", "not a Drafter package"}},
		{"serve: both", []string{"serve", "--package", f.pkg, "--devices", "[]"}, 2, []string{"--devices and --package exclude"}},
		{"serve: no input", []string{"serve", "--devices", device(`{"name":"disk"}`), "--laddr", "127.0.0.1:0"}, 2, []string{`"disk" has no "input"`}},
		{"serve: no state", []string{"serve", "--devices", device(`{"name":"memory","input":%q,"blockSize":65536}`, f.file("memory")), "--laddr", "127.0.0.1:0"}, 1, []string{"--devices", `no device "state"`}},
		{"serve: a file that is not there", []string{"serve", "--devices", device(`{"name":"state","input":%q}`, out), "--laddr", "127.0.0.1:0"}, 1, []string{`"state"`, "no such file"}},
		{"serve: no cache", []string{"serve", "--package", f.pkg, "--cache", ""}, 2, []string{"--cache is empty"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if strings.HasPrefix(tt.name, "mounter: mount point") {
				needFUSE(t)
			}
			checkRefused(t, f.dir, tt.line, tt.status, tt.want...)
		})
	}
}

// needFUSE skips a test where file systems cannot be mounted.
func needFUSE(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Skipf("there is no FUSE here: %v", err)
	}
}
