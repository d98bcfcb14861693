package vfio

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Device is a PCI device of the host that can be passed through.
type Device struct {
	Address string // in full, "0000:01:00.0"
	Group   string // number of its IOMMU group
}

// host is where the kernel says what there is: of this host, or of one that a test made up.
type host struct {
	sys  string                  // where sysfs is
	dev  string                  // where devices are
	open func(path string) error // whether a device can be opened
}

var this = host{sys: "/sys", dev: "/dev", open: func(path string) error { return unix.Access(path, unix.R_OK|unix.W_OK) }}

// Check finds devices by their addresses, domain:bus:device.function in hexadecimal numbers; the domain 0000 may be left out. Each may be named
// once. It fails where one cannot be passed through now, and says what is to be done.
func Check(addresses []string) ([]Device, error) { return this.check(addresses) }

func (h host) check(addresses []string) ([]Device, error) {
	var all []Device
	for _, a := range addresses {
		d, err := h.find(a)
		if err != nil {
			return nil, err
		}
		if slices.Contains(all, d) {
			return nil, fmt.Errorf("PCI device %q is given twice: a machine has it once", a)
		}
		all = append(all, d)
	}
	return all, nil
}

var form = regexp.MustCompile(`^(?:([0-9a-fA-F]{4}):)?([0-9a-fA-F]{2}:[01][0-9a-fA-F]\.[0-7])$`)

// parse returns an address in full.
func parse(address string) (string, error) {
	m := form.FindStringSubmatch(address)
	if m == nil {
		return "", fmt.Errorf("%q is no address of a PCI device: give it as lspci -D prints it, like 0000:01:00.0", address)
	}
	domain := m[1]
	if domain == "" {
		domain = "0000"
	}
	return strings.ToLower(domain + ":" + m[2]), nil
}

// driver is the only one by which a device is passed through; stub is one that does nothing, which the kernel lets others of the group have.
const (
	driver = "vfio-pci"
	stub   = "pci-stub"
)

func (h host) find(given string) (Device, error) {
	address, err := parse(given)
	if err != nil {
		return Device{}, err
	}
	fail := func(format string, args ...any) (Device, error) {
		return Device{}, fmt.Errorf("PCI device %q: %w", address, fmt.Errorf(format, args...))
	}
	dir := filepath.Join(h.sys, "bus/pci/devices", address)
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return fail("this host has no such device: lspci -D lists those that there are")
	} else if err != nil {
		return fail("look for it: %w", err)
	}
	if class := h.read(dir, "class"); strings.HasPrefix(class, bridge) {
		return fail("it is a bridge (class %s), which stays the host's: name a device behind it", class)
	}
	group, err := os.Readlink(filepath.Join(dir, "iommu_group"))
	if errors.Is(err, fs.ErrNotExist) {
		return fail("it has no IOMMU group, as the host's IOMMU is off: switch it on in the firmware (VT-d, AMD-Vi) and on the kernel's command line (intel_iommu=on)")
	} else if err != nil {
		return fail("find its IOMMU group: %w", err)
	}
	d := Device{Address: address, Group: filepath.Base(group)}
	if has := h.driver(dir); has != driver {
		return fail("%s, not %s: give it to that one (modprobe vfio-pci; driverctl set-override %s %s)", had(has), driver, address, driver)
	}
	members := filepath.Join(dir, "iommu_group", "devices")
	others, err := os.ReadDir(members)
	if err != nil {
		return fail("list its IOMMU group: %w", err)
	}
	for _, o := range others {
		other := filepath.Join(members, o.Name())
		if has := h.driver(other); has != "" && has != driver && has != stub && !strings.HasPrefix(h.read(other, "class"), bridge) {
			return fail("it shares its IOMMU group %s with %s, and %s: a group goes to a machine as a whole, so give that one to %s, too, or to none",
				d.Group, o.Name(), had(has), driver)
		}
	}
	for _, path := range []string{filepath.Join(h.dev, "vfio/vfio"), filepath.Join(h.dev, "vfio", d.Group)} {
		if err := h.open(path); err != nil {
			return fail("%q cannot be opened: %w: load the kernel's module vfio-pci, and run this as a user who may", path, err)
		}
	}
	return d, nil
}

// bridge begins the class of bridges between PCI buses (PCI Code and ID Assignment Specification, base class 06h, sub-class 04h), as sysfs has it.
const bridge = "0x0604"

// had says what drives a device.
func had(driver string) string {
	if driver == "" {
		return "no driver has it"
	}
	return fmt.Sprintf("the driver %s has it", driver)
}

// driver is the driver of a device; empty: none.
func (h host) driver(dir string) string {
	target, err := os.Readlink(filepath.Join(dir, "driver"))
	if err != nil {
		return ""
	}
	return filepath.Base(target)
}

func (h host) read(dir, file string) string {
	b, err := os.ReadFile(filepath.Join(dir, file))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}
