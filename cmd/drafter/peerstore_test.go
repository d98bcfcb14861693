package main

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// A restore that comes to nothing leaves nothing, but for the mark of an earlier attempt, whose VM may have run. That one's files are not taken for
// whole, and its state says what has become of it.
func TestMarkRestored(t *testing.T) {
	dir := t.TempDir()
	devices := []string{"state", "kernel", "disk"}
	undo, err := markRestored("web@1", devices, dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range restoredDevices(devices, dir) {
		if err := os.WriteFile(d.Base, []byte("half"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	again, err := markRestored("web@1", devices, dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range restoredDevices(devices, dir) {
		if _, err := os.Stat(d.Base); (err == nil) != (d.Name == "state") {
			t.Errorf("%s: %v", d.Name, err)
		}
	}
	again()
	if text, err := os.ReadFile(filepath.Join(dir, restoreMark)); err != nil || string(text) != "web@1 state kernel disk\n" {
		t.Errorf("after another attempt the mark is %q (%v)", text, err)
	}
	undo()
	if _, err := os.Stat(filepath.Join(dir, restoreMark)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a mark is left (%v)", err)
	}
}
