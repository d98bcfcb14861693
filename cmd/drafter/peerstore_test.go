package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/depot"
	"github.com/drafter-vm/drafter/pkg/runner"
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

// What is restored is no package before all of it has arrived, whatever became of its guest, and it is said how it goes on.
func TestRestoredInPart(t *testing.T) {
	dir := t.TempDir()
	devices := restoredDevices([]string{"state", "kernel"}, dir)
	state, err := block.CreateFile(devices[0].Base, runner.StateDeviceSize)
	if err == nil {
		err = errors.Join(runner.WriteRecord(state, runner.Record{Status: runner.ShutDown, Migration: "m"}), state.Close())
	}
	lacking, kernel := devices[1].Base+".missing", os.WriteFile(devices[1].Base, make([]byte, 4096), 0o600)
	if err = errors.Join(err, kernel, os.WriteFile(lacking, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	d := &peerDepot{origin: storedOrigin{depot.At(nil, "web", "1", nil)}, begun: true}
	if err := describeRestored(t.Context(), d.origin, dir, devices); err == nil || !strings.Contains(err.Error(), lacking) {
		t.Errorf("it is described: %v", err)
	}
	err = d.occupied(t.Context(), &depotFlags{run: true}, devices, dir, errors.New("taken"))
	if err == nil || !strings.Contains(err.Error(), "shut down before all of it had been fetched") || !strings.Contains(err.Error(), "--boot") {
		t.Errorf("what can be done is said as %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "manifest.json")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("it is a package (%v)", err)
	}
}
