package qemu

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/drafter-vm/drafter/pkg/vmm"
)

const (
	// hypervisor is our name in vmm.Spec.
	hypervisor = "qemu"

	// tcgModel is the CPU under TCG when none is asked for. Every feature of it is emulated, it is what x86-64-v2
	// distributions need, with AES, and unlike QEMU's "max" it means the same in every version of QEMU.
	tcgModel = "Westmere"
	kvmModel = "host"

	// maxSerial is VIRTIO_BLK_ID_BYTES, the length of a disk's serial number.
	maxSerial = 20
	// maxDisks is what fits on the board beside the other devices.
	maxDisks = 24
)

// firecrackerTemplates are the values --cpu-template has with Firecracker.
var firecrackerTemplates = []string{"C3", "T2", "T2A", "T2CL", "T2S", "V1N1"}

// Describe implements [vmm.Backend].
func (b *Backend) Describe(ctx context.Context, spec vmm.Spec) (vmm.Spec, error) {
	binary, err := b.find("")
	if err != nil {
		return vmm.Spec{}, err
	}
	caps, err := b.probe(ctx, binary)
	if err != nil {
		return vmm.Spec{}, err
	}
	return b.describe(spec, caps)
}

func (b *Backend) describe(spec vmm.Spec, caps *capabilities) (vmm.Spec, error) {
	if spec.Hypervisor != "" && spec.Hypervisor != hypervisor {
		return vmm.Spec{}, fmt.Errorf("hypervisor is %q, but this is %q", spec.Hypervisor, hypervisor)
	}
	spec.Hypervisor = hypervisor
	spec.Version = caps.version()
	if spec.CPUCount == 0 {
		spec.CPUCount = 1
	}

	switch spec.Accel {
	case "", "auto":
		spec.Accel = "tcg"
		if b.host.kvm() == nil && b.host.virtualizes() {
			spec.Accel = "kvm"
		}
	case "kvm":
		if err := b.host.kvm(); err != nil {
			return vmm.Spec{}, fmt.Errorf("accel is \"kvm\", but KVM cannot be used: %w: choose \"tcg\", or give access to /dev/kvm", err)
		}
	case "tcg":
	default:
		return vmm.Spec{}, fmt.Errorf("accel is %q: choose \"auto\", \"kvm\" or \"tcg\"", spec.Accel)
	}

	if spec.MachineType == "" {
		spec.MachineType = caps.machineType()
	}
	if spec.CPUModel == "" {
		spec.CPUModel = tcgModel
		if spec.Accel == "kvm" {
			spec.CPUModel = kvmModel
		}
	}
	have := b.features(spec, caps)
	if missing := without(spec.CPUFeatures, have); len(missing) > 0 {
		return vmm.Spec{}, fmt.Errorf("cpuFeatures has %q, but %s has them not", missing, b.cpu(spec))
	}
	if len(spec.CPUFeatures) == 0 {
		spec.CPUFeatures = have
	}
	if err := checkSpec(spec, caps); err != nil {
		return vmm.Spec{}, err
	}
	return spec, nil
}

// checkSpec says why a completed description cannot be a machine of this QEMU. A description may come from another
// host, and its strings get into QEMU's command line: nothing passes here that is not known, or a plain name.
func checkSpec(spec vmm.Spec, caps *capabilities) error {
	if spec.Hypervisor != hypervisor {
		return fmt.Errorf("it was made by hypervisor %q, and only %q is supported here", spec.Hypervisor, hypervisor)
	}
	if spec.Accel != "kvm" && spec.Accel != "tcg" {
		return fmt.Errorf("accel is %q, not \"kvm\" or \"tcg\": the description is not complete", spec.Accel)
	}
	if !slices.Contains(caps.Machines, spec.MachineType) {
		return fmt.Errorf("machineType is %q, but QEMU %s has no such board; its own is %q: install the QEMU version that made this machine, or a newer one",
			spec.MachineType, caps.version(), caps.machineType())
	}
	if spec.CPUTemplate != "" {
		return errors.New("cpuTemplate is set, and QEMU has no templates of one's own: name a CPU model (--cpu-template)")
	}
	if slices.Contains(firecrackerTemplates, spec.CPUModel) && !slices.Contains(caps.CPUModels, spec.CPUModel) {
		return fmt.Errorf("CPU template %q is Firecracker's: with QEMU name one of its CPU models, for example \"Skylake-Server\" (%s -cpu help lists them)",
			spec.CPUModel, program)
	}
	if !slices.Contains(caps.CPUModels, spec.CPUModel) {
		return fmt.Errorf("cpuModel is %q, but QEMU %s has no such CPU (%s -cpu help lists them)", spec.CPUModel, caps.version(), program)
	}
	if spec.CPUModel == "host" && spec.Accel != "kvm" {
		return errors.New("cpuModel is \"host\", which needs accel \"kvm\", but accel is \"tcg\": leave the model out, or name another")
	}
	if spec.CPUCount < 1 || spec.CPUCount > 255 {
		return fmt.Errorf("cpuCount is %d: it must be from 1 to 255", spec.CPUCount)
	}
	if spec.MemorySize < 1<<20 || spec.MemorySize%(1<<20) != 0 {
		return fmt.Errorf("memorySize is %d bytes: it must be a multiple of 1 MiB", spec.MemorySize)
	}
	if len(spec.Disks) > maxDisks {
		return fmt.Errorf("there are %d disks: a machine has room for %d", len(spec.Disks), maxDisks)
	}
	seen := make(map[string]bool)
	for _, d := range spec.Disks {
		switch {
		case !diskName.MatchString(d.Name):
			return fmt.Errorf("disk %q: a name has 1 to %d letters, digits, dots, underscores or hyphens and starts with a letter or digit", d.Name, maxSerial)
		case seen[d.Name]:
			return fmt.Errorf("disk %q is there twice", d.Name)
		case d.Size <= 0 || d.Size%512 != 0:
			return fmt.Errorf("disk %q: size is %d bytes: it must be a multiple of 512", d.Name, d.Size)
		}
		seen[d.Name] = true
	}
	if spec.MAC != "" {
		mac, err := net.ParseMAC(spec.MAC)
		if err != nil || len(mac) != 6 {
			return fmt.Errorf("mac is %q, not an Ethernet address such as 02:0e:d9:fd:68:3d", spec.MAC)
		}
		if mac[0]&1 != 0 {
			return fmt.Errorf("mac is %q, a multicast address, which no interface can have", spec.MAC)
		}
	}
	if strings.ContainsRune(spec.BootArgs, 0) {
		return errors.New("bootArgs contains a zero byte")
	}
	return nil
}

var diskName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,` + strconv.Itoa(maxSerial-1) + `}$`)

// Compatible implements [vmm.Backend]. A board of the saved machine's version must be known here. TCG machines load on
// every host whose QEMU emulates the features they were saved with. The CPU model "max" is whatever a QEMU version can emulate, and so demands the same major.minor.
func (b *Backend) Compatible(ctx context.Context, saved vmm.Spec) error {
	binary, err := b.find("")
	if err != nil {
		return err
	}
	caps, err := b.probe(ctx, binary)
	if err != nil {
		return err
	}
	if err := b.compatible(saved, caps); err != nil {
		return fmt.Errorf("the saved machine does not fit this host: %w", err)
	}
	return nil
}

func (b *Backend) compatible(saved vmm.Spec, caps *capabilities) error {
	if err := checkSpec(saved, caps); err != nil {
		return err
	}
	ours := fmt.Sprintf("%d.%d", caps.Major, caps.Minor)
	if theirs := majorMinor(saved.Version); saved.CPUModel == "max" && theirs != ours {
		return fmt.Errorf("version is %q there and %q here: the CPU model \"max\" differs between them; a named model would not", saved.Version, caps.version())
	}
	if saved.Accel == "kvm" {
		if err := b.host.kvm(); err != nil {
			return fmt.Errorf("accel is \"kvm\" there, but only \"tcg\" here: %w", err)
		}
		if len(saved.CPUFeatures) == 0 {
			return errors.New("cpuFeatures is empty: the description of a machine under KVM says what it needs of a host's CPU")
		}
	}
	if missing := without(saved.CPUFeatures, b.features(saved, caps)); len(missing) > 0 {
		return fmt.Errorf("cpuFeatures has %q there, which %s lacks", missing, b.cpu(saved))
	}
	return nil
}

// features returns what a guest of this description can be given here: what the host's CPU has under KVM, in the names
// of /proc/cpuinfo, or what QEMU emulates, in its names.
func (b *Backend) features(spec vmm.Spec, caps *capabilities) []string {
	if spec.Accel == "kvm" {
		return b.host.flags()
	}
	return caps.Emulated[spec.CPUModel]
}

// cpu names in messages what features is about.
func (b *Backend) cpu(spec vmm.Spec) string {
	if spec.Accel == "kvm" {
		return "this host's CPU"
	}
	return fmt.Sprintf("this QEMU's %q", spec.CPUModel)
}

// majorMinor cuts "10.0.2" to "10.0".
func majorMinor(version string) string {
	parts := strings.SplitN(version, ".", 3)
	return strings.Join(parts[:min(2, len(parts))], ".")
}

// without returns what is in want but not in have.
func without(want, have []string) []string {
	var missing []string
	for _, w := range want {
		if !slices.Contains(have, w) {
			missing = append(missing, w)
		}
	}
	return missing
}

// host is what we look at on this machine, replaceable by tests.
type host struct {
	kvmDevice, cpuinfo string
}

// kvm says why KVM cannot be used.
func (h host) kvm() error {
	f, err := os.OpenFile(h.kvmDevice, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return f.Close()
}

// virtualizes reports whether the processor has what KVM needs. There are kernels that offer /dev/kvm without it, on
// which an ordinary guest does not boot.
func (h host) virtualizes() bool {
	flags := h.flags()
	return slices.Contains(flags, "vmx") || slices.Contains(flags, "svm")
}

// flags returns the first processor's, sorted; none if they cannot be read.
func (h host) flags() []string {
	f, err := os.Open(h.cpuinfo)
	if err != nil {
		return nil
	}
	defer f.Close()
	return parseFlags(f)
}

func parseFlags(cpuinfo io.Reader) []string {
	lines := bufio.NewScanner(cpuinfo)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		if name, value, ok := strings.Cut(lines.Text(), ":"); ok && strings.TrimSpace(name) == "flags" {
			flags := strings.Fields(value)
			slices.Sort(flags)
			return flags
		}
	}
	return nil
}
