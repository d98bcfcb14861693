package runner

import (
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// TestReapFolders leaves folders of machines as owners do that are killed at some time.
func TestReapFolders(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "vms")
	folder := func(name string, files ...string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Join(dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			if err := os.WriteFile(filepath.Join(dir, name, f), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	check := func(want map[string]bool) {
		t.Helper()
		for name, there := range want {
			if _, err := os.Stat(filepath.Join(dir, name)); (err == nil) != there {
				t.Errorf("folder %q: %v, want it to be there: %t", name, err, there)
			}
		}
	}
	folder("empty")
	folder("no note yet", machineFile+".new")
	folder("somebody else's", "file")
	folder("ended")
	folder("alive")
	for _, name := range []string{"ended", "alive"} {
		f, err := machineNote{}.make(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if name == "ended" {
			f.Close()
		} else {
			defer f.Close()
		}
	}
	i := &Instance{log: slog.New(slog.DiscardHandler)}

	making, err := LockFolder(dir, unix.LOCK_SH)
	if err != nil {
		t.Fatal(err)
	}
	i.reapFolders(dir)
	check(map[string]bool{"empty": true, "no note yet": true, "somebody else's": true, "ended": false, "alive": true})
	making.Close()
	i.reapFolders(dir)
	check(map[string]bool{"empty": false, "no note yet": false, "somebody else's": true, "alive": true})

	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	folder("no note yet", machineFile+".new")
	i.reapFolders(dir)
	check(map[string]bool{"": false})
}
