package snapshot

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/runner"
	"github.com/drafter-vm/drafter/pkg/vmm"
)

// brokenBackend describes machines and cannot start one.
type brokenBackend struct{ vmm.Backend }

var errNoMachine = errors.New("no machine today")

func (brokenBackend) Name() string { return "broken" }
func (brokenBackend) Describe(_ context.Context, s vmm.Spec) (vmm.Spec, error) {
	s.Hypervisor = "broken"
	return s, nil
}
func (brokenBackend) Start(context.Context, vmm.Config) (vmm.Machine, error) {
	return nil, errNoMachine
}

// blueprint makes files to snapshot, and the devices for them.
func blueprint(t *testing.T) (dir string, devices []Device) {
	t.Helper()
	dir = t.TempDir()
	for _, name := range []string{"vmlinux", "rootfs.ext4"} {
		if err := os.WriteFile(filepath.Join(dir, name), make([]byte, 4096), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	out := func(name string) string { return filepath.Join(dir, "made", "package", name) }
	return dir, []Device{
		{Name: "state", Output: out("state.bin")}, {Name: "memory", Output: out("memory.bin")}, {Name: "config", Output: out("config.json")},
		{Name: "kernel", Input: filepath.Join(dir, "vmlinux"), Output: out("vmlinux")},
		{Name: "disk", Input: filepath.Join(dir, "rootfs.ext4"), Output: out("rootfs.ext4")},
	}
}

func TestFailureLeavesNothing(t *testing.T) {
	dir, devices := blueprint(t)
	t.Chdir(dir)
	_, err := Create(t.Context(), Config{Backend: brokenBackend{}, Devices: devices, MemorySize: 1 << 20})
	if !errors.Is(err, errNoMachine) {
		t.Fatalf("error %v, want that of the backend", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "made")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the folder of the outputs is left behind: %v", err)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "out/vms/broken/*")); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

func TestFailureKeepsTheOldPackage(t *testing.T) {
	dir, devices := blueprint(t)
	t.Chdir(dir)
	old := filepath.Join(dir, "made", "package", "memory.bin")
	if err := os.MkdirAll(filepath.Dir(old), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(old, []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Create(t.Context(), Config{Backend: brokenBackend{}, Devices: devices, MemorySize: 1 << 20}); err == nil {
		t.Fatal("no error")
	}
	entries, err := os.ReadDir(filepath.Dir(old))
	if err != nil || len(entries) != 1 {
		t.Errorf("the folder holds %v, %v; want the old file alone", entries, err)
	}
	if b, err := os.ReadFile(old); err != nil || string(b) != "old" {
		t.Errorf("the old file holds %q, %v", b, err)
	}
}

func TestBadConfig(t *testing.T) {
	dir, good := blueprint(t)
	change := func(f func(*Config, []Device) []Device) Config {
		cfg := Config{Backend: brokenBackend{}, MemorySize: 1 << 20}
		cfg.Devices = f(&cfg, append([]Device(nil), good...))
		return cfg
	}
	for _, tt := range []struct {
		name string
		cfg  Config
		want string
	}{
		{"no backend", Config{Devices: good}, "no backend"},
		{"negative CPUs", change(func(c *Config, d []Device) []Device { c.CPUCount = -1; return d }), "CPU count -1"},
		{"odd memory", change(func(c *Config, d []Device) []Device { c.MemorySize = 4096; return d }), "multiple of 1 MiB"},
		{"device twice", change(func(_ *Config, d []Device) []Device { return append(d, Device{Name: "disk", Output: "x"}) }), `"disk" is configured twice`},
		{"no output", change(func(_ *Config, d []Device) []Device { d[4].Output = ""; return d }), `"disk" has no output`},
		{"same output", change(func(_ *Config, d []Device) []Device { d[4].Output = d[3].Output; return d }), "same output"},
		{"input for state", change(func(_ *Config, d []Device) []Device { d[0].Input = d[3].Input; return d }), `"state" has input`},
		{"missing input", change(func(_ *Config, d []Device) []Device { d[4].Input = filepath.Join(dir, "absent"); return d }), "absent"},
		{"folder as input", change(func(_ *Config, d []Device) []Device { d[4].Input = dir; return d }), "is a folder"},
		{"neither input nor output file", change(func(_ *Config, d []Device) []Device { d[4].Input = ""; return d }), `"disk"`},
		{"no kernel", change(func(_ *Config, d []Device) []Device { return append(d[:3], d[4]) }), `no device "kernel"`},
		{"no disk", change(func(_ *Config, d []Device) []Device { return d[:4] }), "no disk"},
		{"bad name", change(func(_ *Config, d []Device) []Device { return append(d, Device{Name: "../up", Output: "x"}) }), "../up"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Create(t.Context(), tt.cfg)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want one with %q", err, tt.want)
			}
		})
	}
}

// A VM that has never run is a package all the same, for which no machine is started.
func TestUnbooted(t *testing.T) {
	dir, devices := blueprint(t)
	t.Chdir(dir)
	result, err := Create(t.Context(), Config{Backend: brokenBackend{}, Devices: devices, MemorySize: 1 << 20, Unbooted: true})
	if err != nil {
		t.Fatal(err)
	}
	if len(result.Manifest.Devices) != len(devices) {
		t.Errorf("the manifest has %d devices, not %d", len(result.Manifest.Devices), len(devices))
	}
	f, err := block.OpenFile(devices[0].Output, block.FileOptions{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if r, err := runner.ReadRecord(f); err != nil || r.Status != runner.ShutDown {
		t.Errorf("its record is %+v, %v", r, err)
	}
	if _, err := Create(t.Context(), Config{Backend: brokenBackend{}, Devices: devices, Unbooted: true, ShutDown: true}); err == nil {
		t.Error("a VM that has never run was to be shut down")
	}
}
