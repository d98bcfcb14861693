package vmpackage

import (
	"fmt"
	"slices"
	"strings"
)

// Names of the known devices. Any other valid name is an additional disk.
const (
	State  = "state"
	Memory = "memory"
	Kernel = "kernel"
	Initrd = "initrd"
	Disk   = "disk"
	Config = "config"
	OCI    = "oci"
)

// ManifestFile is the name of the manifest, in a folder and in an archive.
const ManifestFile = "manifest.json"

// maxNameLength bounds device names. QEMU shows at most 20 bytes of a disk's serial number, which is the name, to the
// guest; longer names are legal but the guest sees them cut.
const maxNameLength = 64

// knownDevices is in the order devices have in a package.
var knownDevices = []struct{ name, file string }{
	{State, "state.bin"},
	{Memory, "memory.bin"},
	{Kernel, "vmlinux"},
	{Initrd, "initrd.img"},
	{Disk, "rootfs.ext4"},
	{Config, "config.json"},
	{OCI, "oci.ext4"},
}

// KnownNames returns the names of the known devices in the order they have in a package.
func KnownNames() []string {
	names := make([]string, len(knownDevices))
	for i, d := range knownDevices {
		names[i] = d.name
	}
	return names
}

// DefaultFile is the file name of a device in a package: "memory.bin" for "memory", NAME.img for an additional disk.
func DefaultFile(name string) string {
	for _, d := range knownDevices {
		if d.name == name {
			return d.file
		}
	}
	return name + ".img"
}

// CheckName reports why name cannot be the name of a device. Names consist of lower-case letters, digits, dots,
// underscores and hyphens, start with a letter or digit, and are at most 64 bytes long.
func CheckName(name string) error {
	switch {
	case name == "":
		return fmt.Errorf("device name is empty")
	case len(name) > maxNameLength:
		return fmt.Errorf("device name %q is longer than %d bytes", name, maxNameLength)
	}
	for _, r := range name {
		if !(r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r == '.' || r == '_' || r == '-') {
			return fmt.Errorf("device name %q contains %q; use a-z, 0-9, '.', '_' and '-'", name, r)
		}
	}
	if strings.ContainsRune("._-", rune(name[0])) {
		return fmt.Errorf("device name %q starts with %q; start with a letter or a digit", name, name[0])
	}
	return nil
}

// checkFile reports why a manifest may not call a device's file so.
func checkFile(file string) error {
	if file == "" || len(file) > maxNameLength+len(".img") || file[0] == '.' || file == ManifestFile {
		return fmt.Errorf("file name %q is not allowed in a package", file)
	}
	for _, r := range file {
		if !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '.' || r == '_' || r == '-') {
			return fmt.Errorf("file name %q is not allowed in a package: it contains %q", file, r)
		}
	}
	return nil
}

// sortDevices puts devices in the order of a package: the known ones, then the disks in the order the guest sees them,
// then others as they came.
func sortDevices[T any](devices []T, name func(T) string, guestOrder []string) {
	rank := func(d T) int {
		if i := slices.Index(KnownNames(), name(d)); i >= 0 {
			return i
		}
		if i := slices.Index(guestOrder, name(d)); i >= 0 {
			return len(knownDevices) + i
		}
		return len(knownDevices) + len(guestOrder)
	}
	slices.SortStableFunc(devices, func(a, b T) int { return rank(a) - rank(b) })
}
