package vmpackage

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/drafter-vm/drafter/internal/version"
)

// FormatVersion is the version of the package format this code writes and the newest it reads. It is raised when an older
// reader would misunderstand a package; fields it can ignore are added without.
const FormatVersion = 1

const (
	formatName      = "drafter-package"
	maxManifestSize = 1 << 20
	maxDevices      = 256
	maxDeviceSize   = 1 << 46 // 64 TiB
)

var (
	// ErrNotPackage is wrapped when a file or folder is something else than a package.
	ErrNotPackage = errors.New("not a Drafter package")
	// ErrVersion is wrapped when a package has a newer format than this program knows.
	ErrVersion = errors.New("package format is newer than this program")
	// ErrCorrupt is wrapped when a package contradicts itself: it was damaged, cut short, or changed since its manifest
	// was written.
	ErrCorrupt = errors.New("package is corrupt")
)

// Manifest says what a package is.
type Manifest struct {
	Format        string `json:"format"`        // "drafter-package"
	FormatVersion int    `json:"formatVersion"` // see [FormatVersion]

	// DrafterVersion is the version of the program that wrote the manifest, for people.
	DrafterVersion string `json:"drafterVersion,omitempty"`

	// The machine that the devices belong to, as its config device has it; all empty in a package without one. The first
	// three repeat fields of Machine so that whoever lists packages need not know it.
	Hypervisor        string          `json:"hypervisor,omitempty"`        // "qemu", "firecracker"
	HypervisorVersion string          `json:"hypervisorVersion,omitempty"` // "10.0.2"
	CPUFeatures       []string        `json:"cpuFeatures,omitempty"`       // a host must have all of them
	Machine           json.RawMessage `json:"machine,omitempty"`           // vmm.Spec

	// Devices are in the order: known devices, then additional disks in the order the guest sees them.
	Devices []Device `json:"devices"`
}

// Device describes a device of a package.
type Device struct {
	Name      string `json:"name"`             // of the device
	File      string `json:"file"`             // name of the file in the folder or archive, without directories
	Size      int64  `json:"size"`             // bytes, > 0
	SHA256    string `json:"sha256,omitempty"` // of all Size bytes, lower-case hex; empty, in folders only: not known
	DataBytes int64  `json:"dataBytes"`        // bytes in 4 KiB blocks that are not all zeros; 0 if SHA256 is empty
}

// Device returns the device called name.
func (m *Manifest) Device(name string) (Device, bool) {
	i := slices.IndexFunc(m.Devices, func(d Device) bool { return d.Name == name })
	if i < 0 {
		return Device{}, false
	}
	return m.Devices[i], true
}

// Names returns the names of the devices, in order.
func (m *Manifest) Names() []string {
	names := make([]string, len(m.Devices))
	for i, d := range m.Devices {
		names[i] = d.Name
	}
	return names
}

// newManifest makes the manifest of devices, which it puts in order. raw is the machine configuration or nil.
func newManifest(raw json.RawMessage, devices []Device) (*Manifest, error) {
	mach, err := decodeMachine(raw)
	if err != nil {
		return nil, err
	}
	if raw != nil {
		// As it will be after a round trip through the file, so that both forms compare equal.
		var compact bytes.Buffer
		if err := json.Compact(&compact, raw); err != nil {
			return nil, fmt.Errorf("decode machine configuration: %w", err)
		}
		raw = compact.Bytes()
	}
	m := &Manifest{
		Format: formatName, FormatVersion: FormatVersion, DrafterVersion: version.String(),
		Hypervisor: mach.Hypervisor, HypervisorVersion: mach.Version, CPUFeatures: mach.CPUFeatures, Machine: raw,
		Devices: devices,
	}
	sortDevices(m.Devices, func(d Device) string { return d.Name }, mach.disks())
	if raw != nil {
		for _, disk := range mach.disks() {
			if _, ok := m.Device(disk); !ok {
				return nil, fmt.Errorf("device %q is missing: the machine configuration in device %q has a disk of that name", disk, Config)
			}
		}
	}
	return m, m.check()
}

// encode returns the content of the manifest file.
func (m *Manifest) encode() ([]byte, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	if err := enc.Encode(m); err != nil {
		return nil, fmt.Errorf("encode manifest: %w", err)
	}
	if b.Len() > maxManifestSize {
		return nil, fmt.Errorf("encode manifest: %d bytes are more than %d", b.Len(), maxManifestSize)
	}
	return b.Bytes(), nil
}

// decodeManifest decodes and checks the content of a manifest file. Fields it does not know are ignored.
func decodeManifest(b []byte) (*Manifest, error) {
	var head struct {
		Format        string `json:"format"`
		FormatVersion int    `json:"formatVersion"`
	}
	if err := json.Unmarshal(b, &head); err != nil || head.Format != formatName {
		return nil, fmt.Errorf("%s: %w", ManifestFile, ErrNotPackage)
	}
	if head.FormatVersion > FormatVersion {
		return nil, fmt.Errorf("%s has format version %d, this program reads up to %d; use a newer drafter: %w",
			ManifestFile, head.FormatVersion, FormatVersion, ErrVersion)
	}
	var m Manifest
	if err := json.Unmarshal(b, &m); err != nil {
		return nil, fmt.Errorf("%s: %v: %w", ManifestFile, err, ErrCorrupt)
	}
	if err := m.check(); err != nil {
		return nil, fmt.Errorf("%s: %w: %w", ManifestFile, err, ErrCorrupt)
	}
	if len(m.Machine) > 0 {
		var compact bytes.Buffer
		if err := json.Compact(&compact, m.Machine); err != nil {
			return nil, fmt.Errorf("%s: machine: %v: %w", ManifestFile, err, ErrCorrupt)
		}
		m.Machine = compact.Bytes()
	}
	return &m, nil
}

// check reports what is wrong with the manifest. Everything behind it trusts sizes, names and files.
func (m *Manifest) check() error {
	if m.FormatVersion < 1 {
		return fmt.Errorf("format version is %d, less than 1", m.FormatVersion)
	}
	if len(m.Machine) > 0 && !bytes.HasPrefix(m.Machine, []byte("{")) {
		return fmt.Errorf("machine is not an object")
	}
	mach, err := decodeMachine(m.Machine)
	if err != nil {
		return err
	}
	if m.Hypervisor != mach.Hypervisor || m.HypervisorVersion != mach.Version || !slices.Equal(m.CPUFeatures, mach.CPUFeatures) {
		return fmt.Errorf("hypervisor, hypervisorVersion or cpuFeatures is not what machine says")
	}
	if len(m.Devices) == 0 {
		return fmt.Errorf("there are no devices")
	}
	if len(m.Devices) > maxDevices {
		return fmt.Errorf("%d devices are more than %d", len(m.Devices), maxDevices)
	}
	names, files := map[string]bool{}, map[string]bool{}
	for _, d := range m.Devices {
		if err := CheckName(d.Name); err != nil {
			return err
		}
		if err := checkFile(d.File); err != nil {
			return fmt.Errorf("device %q: %w", d.Name, err)
		}
		if names[d.Name] {
			return fmt.Errorf("device %q is listed twice", d.Name)
		}
		if files[d.File] {
			return fmt.Errorf("device %q: file %q is another device's", d.Name, d.File)
		}
		names[d.Name], files[d.File] = true, true
		if d.Size <= 0 || d.Size > maxDeviceSize {
			return fmt.Errorf("device %q: size %d is not between 1 and %d", d.Name, d.Size, int64(maxDeviceSize))
		}
		if d.DataBytes < 0 || d.DataBytes > d.Size {
			return fmt.Errorf("device %q: dataBytes %d is not between 0 and its size %d", d.Name, d.DataBytes, d.Size)
		}
		if d.SHA256 != "" {
			if sum, err := hex.DecodeString(d.SHA256); err != nil || len(sum) != 32 || strings.ToLower(d.SHA256) != d.SHA256 {
				return fmt.Errorf("device %q: sha256 %q is not 64 lower-case hex digits", d.Name, d.SHA256)
			}
		}
	}
	return nil
}
