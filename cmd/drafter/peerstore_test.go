package main

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// A restore that comes to nothing leaves nothing, but for the mark of an earlier attempt, whose VM may have run.
func TestMarkRestored(t *testing.T) {
	parent := t.TempDir()
	dir := filepath.Join(parent, "deep", "web")
	undo, err := markRestored("web@1", []string{"state", "disk"}, dir)
	if err != nil {
		t.Fatal(err)
	}
	again, err := markRestored("web@1", []string{"state", "disk"}, dir)
	if err != nil {
		t.Fatal(err)
	}
	again()
	if text, err := os.ReadFile(filepath.Join(dir, restoreMark)); err != nil || string(text) != "web@1 state disk\n" {
		t.Errorf("after another attempt the mark is %q (%v)", text, err)
	}
	undo()
	if _, err := os.Stat(filepath.Join(parent, "deep")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a folder is left (%v)", err)
	}
}
