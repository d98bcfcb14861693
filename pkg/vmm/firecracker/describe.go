package firecracker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/drafter-vm/drafter/pkg/vmm"
)

// hypervisor is what the backend is called in descriptions.
const hypervisor = "firecracker"

// program is the name Firecracker has in PATH.
const program = "firecracker"

// oldest is the oldest version of Firecracker that is used.
var oldest = [2]int{1, 10}

// release is what a binary says of itself.
type release struct {
	version string // "1.13.1"
	format  string // of its snapshots: "7.0.0"
}

var (
	versionPattern = regexp.MustCompile(`(?m)^Firecracker v([0-9]+)\.([0-9]+)\.([0-9]+)`)
	formatPattern  = regexp.MustCompile(`(?m)^v([0-9]+)\.([0-9]+)\.([0-9]+)`)
)

// find is where Firecracker is.
func (b *Backend) find(binary string) (string, error) {
	for _, name := range []string{binary, b.opts.Binary, program} {
		if name == "" {
			continue
		}
		path, err := exec.LookPath(name)
		if err != nil {
			return "", fmt.Errorf("find Firecracker: %w: install it, or say where it is (--firecracker-bin)", err)
		}
		return filepath.Abs(path) // it is started in another folder
	}
	return "", nil // program is not empty
}

// probe asks a binary for its version.
func probe(ctx context.Context, binary string) (release, error) {
	var r release
	// One that hangs is none, nor is one whose children hold on to its output.
	ctx, cancel := context.WithTimeoutCause(ctx, answerTime, fmt.Errorf("no answer within %s", answerTime))
	defer cancel()
	for flag, ask := range map[string]struct {
		pattern *regexp.Regexp
		into    *string
	}{"--version": {versionPattern, &r.version}, "--snapshot-version": {formatPattern, &r.format}} {
		cmd := exec.CommandContext(ctx, binary, flag)
		cmd.WaitDelay = time.Second
		out, err := cmd.Output()
		if cause := context.Cause(ctx); err != nil && cause != nil {
			err = cause
		}
		if err != nil {
			return r, fmt.Errorf("ask %q for its version: %w", binary, err)
		}
		found := ask.pattern.FindStringSubmatch(string(out))
		if found == nil {
			return r, fmt.Errorf("%s %s says %.100q, which is not a version: is it Firecracker?", binary, flag, out)
		}
		*ask.into = strings.Join(found[1:], ".")
	}
	if v := numbers(r.version); slices.Compare(v[:2], oldest[:]) < 0 {
		return r, fmt.Errorf("firecracker %s at %q is too old: %d.%d or newer is needed", r.version, binary, oldest[0], oldest[1])
	}
	return r, nil
}

// usable finds out which Firecracker there is, if it can run here.
func (b *Backend) usable(ctx context.Context) (release, error) {
	binary, err := b.find("")
	if err != nil {
		return release{}, err
	}
	r, err := probe(ctx, binary)
	if err != nil {
		return release{}, err
	}
	return r, b.checkKVM()
}

// numbers are those of a version, three at least.
func numbers(version string) []int {
	all := make([]int, 3)
	for i, part := range strings.SplitN(version, ".", 3) {
		all[i], _ = strconv.Atoi(part)
	}
	return all
}

// Describe implements [vmm.Backend]. MachineType is the format of Firecracker's device state.
func (b *Backend) Describe(ctx context.Context, spec vmm.Spec) (vmm.Spec, error) {
	fail := func(err error) (vmm.Spec, error) { return vmm.Spec{}, fmt.Errorf("describe machine: %w", err) }
	r, err := b.usable(ctx)
	if err != nil {
		return fail(err)
	}
	for _, f := range []struct{ name, got, want string }{
		{"hypervisor", spec.Hypervisor, hypervisor}, {"version", spec.Version, r.version}, {"machineType", spec.MachineType, machineType(r)}, {"accel", spec.Accel, "kvm"},
	} {
		if f.got != "" && f.got != f.want && !(f.name == "accel" && f.got == "auto") {
			return fail(fmt.Errorf("%s %q cannot be had: Firecracker here has %q", f.name, f.got, f.want))
		}
	}
	spec.Hypervisor, spec.Version, spec.MachineType, spec.Accel = hypervisor, r.version, machineType(r), "kvm"
	if spec.CPUCount == 0 {
		spec.CPUCount = 1
	}
	if spec.CPUFeatures, err = b.cpuFeatures(); err != nil {
		return fail(err)
	}
	if err := checkSpec(spec); err != nil {
		return fail(err)
	}
	return spec, nil
}

// vendorPrefix begins what CPUFeatures says of the processor's vendor.
const vendorPrefix = "vendor:"

func machineType(r release) string { return "snapshot-" + r.format }

// templates are the CPU templates that Firecracker has for x86-64.
var templates = []string{"None", "C3", "T2", "T2S", "T2CL", "T2A"}

// checkSpec reports what no Firecracker can do.
func checkSpec(spec vmm.Spec) error {
	switch {
	case spec.CPUCount < 1 || spec.CPUCount > 32:
		return fmt.Errorf("CPU count %d: Firecracker's guests have 1 to 32", spec.CPUCount)
	case spec.MemorySize <= 0 || spec.MemorySize%(1<<20) != 0:
		return fmt.Errorf("memory size %d: it has to be a multiple of 1 MiB", spec.MemorySize)
	case spec.CPUModel != "" && spec.CPUTemplate != "":
		return fmt.Errorf("CPU template %q and one of one's own exclude each other", spec.CPUModel)
	case spec.CPUTemplate != "" && !isObject(spec.CPUTemplate):
		return fmt.Errorf("CPU template %.40q is no JSON object", spec.CPUTemplate)
	case spec.CPUModel != "" && !slices.Contains(templates, spec.CPUModel):
		return fmt.Errorf("CPU template %q: Firecracker has %s", spec.CPUModel, strings.Join(templates, ", "))
	}
	return nil
}

// hidesFeatures reports whether a template hides from the guest what differs between processors. One of one's own does if it says anything of
// features: whether it hides enough is up to who made it.
func hidesFeatures(spec vmm.Spec) bool {
	if spec.CPUTemplate == "" {
		return spec.CPUModel != "" && spec.CPUModel != "None"
	}
	var template struct {
		Modifiers []json.RawMessage `json:"cpuid_modifiers"`
	}
	return json.Unmarshal([]byte(spec.CPUTemplate), &template) == nil && len(template.Modifiers) > 0
}

func isObject(text string) bool {
	var object map[string]json.RawMessage
	return json.Unmarshal([]byte(text), &object) == nil && object != nil
}

// checkKVM reports why Firecracker cannot run here.
func (b *Backend) checkKVM() error {
	f, err := os.OpenFile(b.host.kvmDevice, os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("firecracker needs KVM: %w: enable virtualisation, or choose --hypervisor qemu", err)
	}
	return f.Close()
}

// cpuFeatures are the vendor and the features of this host's processor.
func (b *Backend) cpuFeatures() ([]string, error) {
	text, err := os.ReadFile(b.host.cpuinfo)
	if err != nil {
		return nil, fmt.Errorf("read the processor's features: %w", err)
	}
	var all []string
	for line := range strings.Lines(string(text)) {
		name, value, _ := strings.Cut(line, ":")
		switch strings.TrimSpace(name) {
		case "vendor_id":
			all = append(all, vendorPrefix+strings.TrimSpace(value))
		case "flags":
			all = append(all, strings.Fields(value)...)
			slices.Sort(all)
			return slices.Compact(all), nil
		}
	}
	return nil, fmt.Errorf("%s names no features of a processor", b.host.cpuinfo)
}

// Compatible implements [vmm.Backend].
func (b *Backend) Compatible(ctx context.Context, saved vmm.Spec) error {
	fail := func(err error) error { return fmt.Errorf("machine is not compatible: %w", err) }
	if saved.Hypervisor != hypervisor {
		return fail(fmt.Errorf("hypervisor: saved with %q, and this is %q: device state and memory of one are nothing to the other", saved.Hypervisor, hypervisor))
	}
	if saved.Accel != "kvm" {
		return fail(fmt.Errorf("accel: saved with %q, and Firecracker has \"kvm\"", saved.Accel))
	}
	r, err := b.usable(ctx)
	if err != nil {
		return fail(err)
	}
	// Firecracker reads formats of its own major version that are not newer.
	format, ok := strings.CutPrefix(saved.MachineType, "snapshot-")
	if has, needs := numbers(r.format), numbers(format); !ok || has[0] != needs[0] || slices.Compare(has, needs) < 0 {
		return fail(fmt.Errorf("machineType: saved as %q by Firecracker %s, and Firecracker %s here reads %q", saved.MachineType, saved.Version, r.version, machineType(r)))
	}
	has, err := b.cpuFeatures()
	if err != nil {
		return fail(err)
	}
	hidden := hidesFeatures(saved)
	for _, f := range saved.CPUFeatures {
		_, ok := slices.BinarySearch(has, f)
		switch vendor, other := strings.CutPrefix(f, vendorPrefix); {
		case ok:
		case other:
			return fail(fmt.Errorf("cpuFeatures: it was made on a processor of %s, which this host's is not, and no CPU template makes up for that: use a host with one", vendor))
		case !hidden:
			return fail(fmt.Errorf("cpuFeatures: the guest may use %q, which this host's processor lacks: make the package with a CPU template that hides it (drafter snapshotter --cpu-template)", f))
		}
	}
	if err := checkSpec(saved); err != nil {
		return fail(err)
	}
	return nil
}

var errNoHooks = errors.New("firecracker allocates RAM by itself: Config.Spawn and Config.Graft are needed")
