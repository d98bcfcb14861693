package agent

import (
	"encoding/hex"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestIdentity(t *testing.T) {
	root := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o444); err != nil {
			t.Fatal(err)
		}
	}
	read := func(name string) string {
		t.Helper()
		text, err := os.ReadFile(filepath.Join(root, name))
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	if err := (Identity{MachineID: NewMachineID(), HostName: "nobody"}).take(root); err != nil {
		t.Errorf("a guest without such files: %v", err)
	}
	if left, err := os.ReadDir(root); err != nil || len(left) > 0 {
		t.Errorf("it was given %v (%v)", left, err)
	}
	const old = "0123456789abcdef0123456789abcdef\n"
	write("etc/machine-id", old)
	write("etc/hostname", "before\n")
	if err := os.MkdirAll(filepath.Join(root, "var/lib/dbus"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/etc/machine-id", filepath.Join(root, "var/lib/dbus/machine-id")); err != nil {
		t.Fatal(err)
	}
	if err := (Identity{HostName: "after.example"}).take(root); err != nil {
		t.Fatal(err)
	}
	if read("etc/machine-id") != old || read("etc/hostname") != "after.example\n" {
		t.Errorf("it is %q, called %q", read("etc/machine-id"), read("etc/hostname"))
	}
	id := NewMachineID()
	if err := (Identity{MachineID: id}).take(root); err != nil {
		t.Fatal(err)
	}
	if got := read("etc/machine-id"); got != hex.EncodeToString(id)+"\n" || got[12] != '4' || !strings.ContainsRune("89ab", rune(got[16])) {
		t.Errorf("the machine id is %q", got)
	}
	if info, err := os.Lstat(filepath.Join(root, "var/lib/dbus/machine-id")); err != nil || info.Mode()&os.ModeSymlink == 0 {
		t.Errorf("the link has become %v (%v)", info, err)
	}
	if left, err := os.ReadDir(filepath.Join(root, "etc")); err != nil || len(left) != 2 {
		t.Errorf("there is %v (%v)", left, err)
	}
	for _, wrong := range []Identity{{MachineID: []byte("short")}, {HostName: "-x"}, {HostName: "a b"}, {HostName: "a\nb"}, {HostName: strings.Repeat("x", 65)}} {
		if err := wrong.take(root); err == nil {
			t.Errorf("%+v is taken", wrong)
		}
	}
}
