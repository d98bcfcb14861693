package main

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestMan writes the manual pages twice: one for each tool, and the same each time.
func TestMan(t *testing.T) {
	var dirs [2]string
	for i := range dirs {
		dirs[i] = filepath.Join(t.TempDir(), "a", "man1")
		if err := run(t.Context(), []string{"drafter", "man", dirs[i]}, strings.NewReader(""), io.Discard, io.Discard); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range newRootCommand().Commands() {
		if c.Hidden || c.Name() == "help" {
			continue
		}
		name := "drafter-" + c.Name() + ".1"
		first, err := os.ReadFile(filepath.Join(dirs[0], name))
		if err != nil {
			t.Error(err)
			continue
		}
		if second, err := os.ReadFile(filepath.Join(dirs[1], name)); err != nil || !bytes.Equal(first, second) {
			t.Errorf("%s is written differently the second time (%v)", name, err)
		}
		if !bytes.Contains(first, []byte(strings.ReplaceAll(c.Short, "-", "\\-"))) && !bytes.Contains(first, []byte(c.Short)) {
			t.Errorf("%s does not say what the tool does:\n%.500s", name, first)
		}
	}
}

// TestManOfAll has a page for every name that make install installs, and tables in them that are still tables.
func TestManOfAll(t *testing.T) {
	dir := t.TempDir()
	for range 2 { // the second time over the first
		if err := run(t.Context(), []string{"drafter", "man", dir}, strings.NewReader(""), io.Discard, io.Discard); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range append(names(newRootCommand()), "drafter-agent", "drafter-liveness", "drafter-agent-vsock") {
		if page, err := os.ReadFile(filepath.Join(dir, name+".1")); err != nil || !bytes.Contains(page, []byte(".SH NAME")) {
			t.Errorf("there is no page %s(1): %v", name, err)
		}
	}
	for _, tt := range []struct{ page, want string }{
		{"drafter-peer.1", ".EX\nwithout --raddr   resume the instance from its package, or from where it was closed\nwith --raddr      receive"},
		{"drafter-mounter.1", ".EX\nwithout --raddr   mount the VM in a package or instance\nwith --raddr      receive"},
		{"drafter-agent-vsock.1", "CONNECT <port>"},
	} {
		page, err := os.ReadFile(filepath.Join(dir, tt.page))
		if err != nil || !strings.Contains(string(page), tt.want) {
			t.Errorf("%s does not say %q: %v\n%.1500s", tt.page, tt.want, err, page)
		}
	}
}
