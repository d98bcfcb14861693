package vfio

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// made is a device of a host that a test made up.
type made struct{ address, class, driver, group string }

func makeHost(t *testing.T, devices ...made) host {
	t.Helper()
	h := host{sys: t.TempDir(), dev: t.TempDir(), open: func(path string) error { _, err := os.Stat(path); return err }}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.MkdirAll(filepath.Join(h.dev, "vfio"), 0o755))
	must(os.WriteFile(filepath.Join(h.dev, "vfio/vfio"), nil, 0o600))
	for _, d := range devices {
		dir := filepath.Join(h.sys, "devices", d.address)
		must(os.MkdirAll(dir, 0o755))
		must(os.MkdirAll(filepath.Join(h.sys, "bus/pci/devices"), 0o755))
		must(os.Symlink(dir, filepath.Join(h.sys, "bus/pci/devices", d.address)))
		must(os.WriteFile(filepath.Join(dir, "class"), []byte(d.class+"\n"), 0o644))
		if d.driver != "" {
			must(os.Symlink(filepath.Join(h.sys, "bus/pci/drivers", d.driver), filepath.Join(dir, "driver")))
		}
		if d.group != "" {
			group := filepath.Join(h.sys, "kernel/iommu_groups", d.group)
			must(os.MkdirAll(filepath.Join(group, "devices"), 0o755))
			must(os.Symlink(dir, filepath.Join(group, "devices", d.address)))
			must(os.Symlink(group, filepath.Join(dir, "iommu_group")))
			if d.driver == driver {
				must(os.WriteFile(filepath.Join(h.dev, "vfio", d.group), nil, 0o600))
			}
		}
	}
	return h
}

const display, network = "0x030000", "0x020000"

// TestFind: a device is found where it can be passed through, and where it cannot, what is in the way is named, with what to do.
func TestFind(t *testing.T) {
	gpu := made{"0000:01:00.0", display, driver, "7"}
	for _, test := range []struct {
		name    string
		devices []made
		address string
		says    []string // none: it is found
	}{
		{"alone", []made{gpu}, "0000:01:00.0", nil},
		{"short", []made{gpu}, "01:00.0", nil},
		{"upper case", []made{{"0000:0a:00.0", display, driver, "7"}}, "0000:0A:00.0", nil},
		{"with its bridge", []made{gpu, {"0000:00:01.0", "0x060400", "pcieport", "7"}}, "01:00.0", nil},
		{"with one that nobody has", []made{gpu, {"0000:01:00.1", network, "", "7"}}, "01:00.0", nil},
		{"with one that is kept from drivers", []made{gpu, {"0000:01:00.1", network, "pci-stub", "7"}}, "01:00.0", nil},
		{"with another of its kind", []made{gpu, {"0000:01:00.1", network, driver, "7"}}, "01:00.0", nil},

		{"no address", nil, "gpu0", []string{`"gpu0"`, "lspci"}},
		{"function 8", nil, "01:00.8", []string{`"01:00.8"`, "lspci"}},
		{"a path", nil, "../../../etc", []string{"lspci"}},
		{"absent", []made{gpu}, "02:00.0", []string{`"0000:02:00.0"`, "no such device", "lspci"}},
		{"a bridge", []made{{"0000:00:01.0", "0x060400", driver, "7"}}, "00:01.0", []string{"bridge", "behind it"}},
		{"no IOMMU", []made{{"0000:01:00.0", display, driver, ""}}, "01:00.0", []string{"IOMMU is off", "intel_iommu=on"}},
		{"another driver", []made{{"0000:01:00.0", display, "nouveau", "7"}}, "01:00.0", []string{"the driver nouveau has it", "driverctl set-override 0000:01:00.0 vfio-pci"}},
		{"no driver", []made{{"0000:01:00.0", display, "", "7"}}, "01:00.0", []string{"no driver has it", "driverctl"}},
		{"shared", []made{gpu, {"0000:01:00.1", network, "e1000e", "7"}}, "01:00.0", []string{"group 7", "0000:01:00.1", "e1000e"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			d, err := makeHost(t, test.devices...).find(test.address)
			if test.says == nil {
				if err != nil || d.Group != "7" || d.Address != test.devices[0].address {
					t.Errorf("found %+v, %v", d, err)
				}
				return
			}
			if err == nil {
				t.Fatalf("found %+v, want an error", d)
			}
			for _, part := range test.says {
				if !strings.Contains(err.Error(), part) {
					t.Errorf("the error %q does not say %q", err, part)
				}
			}
		})
	}
}

// TestFindClosed: a device whose group cannot be opened is refused now, not when a machine starts.
func TestFindClosed(t *testing.T) {
	h := makeHost(t, made{"0000:01:00.0", display, driver, "7"})
	if err := os.Remove(filepath.Join(h.dev, "vfio/7")); err != nil {
		t.Fatal(err)
	}
	if _, err := h.find("01:00.0"); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "vfio/7") {
		t.Errorf("got error %v", err)
	}
}

// TestCheck: no device is given twice, however it is written.
func TestCheck(t *testing.T) {
	h := makeHost(t, made{"0000:01:00.0", display, driver, "7"}, made{"0000:02:00.0", network, driver, "8"})
	if all, err := h.check([]string{"01:00.0", "02:00.0"}); err != nil || len(all) != 2 {
		t.Errorf("got %v, %v", all, err)
	}
	if _, err := h.check([]string{"01:00.0", "0000:01:00.0"}); err == nil || !strings.Contains(err.Error(), "twice") {
		t.Errorf("got error %v", err)
	}
}

// TestThisHost: the address of what this host has not is refused, and nothing else happens.
func TestThisHost(t *testing.T) {
	if _, err := Check([]string{"ffff:ff:1f.7"}); err == nil || !strings.Contains(err.Error(), "no such device") {
		t.Errorf("got error %v", err)
	}
}
