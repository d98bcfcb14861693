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
