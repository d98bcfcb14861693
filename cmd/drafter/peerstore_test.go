package main

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/drafter-vm/drafter/pkg/depot"
)

// A restore that comes to nothing leaves nothing, but for the mark of an earlier attempt, whose VM may have run.
func TestMarkRestored(t *testing.T) {
	parent := t.TempDir()
	dir := filepath.Join(parent, "deep", "web")
	v := depot.At(nil, "web", "1", nil)
	undo, err := markRestored(v, []string{"state", "disk"}, dir)
	if err != nil {
		t.Fatal(err)
	}
	again, err := markRestored(v, []string{"state", "disk"}, dir)
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
