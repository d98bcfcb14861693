package qemu

import (
	"bytes"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/drafter-vm/drafter/pkg/vmm"
)

var caps100 = &capabilities{Major: 10, Minor: 0, Micro: 2,
	Machines:  []string{"pc-q35-10.0", "pc-q35-9.2"},
	CPUModels: []string{"EPYC", "Skylake-Server", "Westmere", "host", "max"},
	Emulated:  map[string][]string{"EPYC": {"aes", "svm"}, "Westmere": {"aes", "sse4.2"}, "max": {"aes", "avx2", "svm"}}}

// fakeHost is a host with KVM or without, whose CPU has some flags.
func fakeHost(t *testing.T, kvm bool, flags string) host {
	t.Helper()
	dir := t.TempDir()
	h := host{kvmDevice: filepath.Join(dir, "kvm"), cpuinfo: filepath.Join(dir, "cpuinfo")}
	if kvm {
		if err := os.WriteFile(h.kvmDevice, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(h.cpuinfo, []byte("processor\t: 0\nflags\t\t: "+flags+"\nbugs\t\t:\n\nprocessor\t: 1\nflags\t\t: other\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return h
}

func fakeBackend(h host) *Backend {
	b := New(Options{})
	b.host = h
	return b
}

func TestDescribe(t *testing.T) {
	for _, tc := range []struct {
		name  string
		kvm   bool
		flags string
		spec  vmm.Spec
		want  vmm.Spec
		err   string
	}{
		{name: "no kvm", flags: "sse vmx", want: vmm.Spec{Accel: "tcg", CPUModel: tcgModel}},
		{name: "kvm on intel", kvm: true, flags: "vmx sse", want: vmm.Spec{Accel: "kvm", CPUModel: "host", CPUFeatures: []string{"sse", "vmx"}}},
		{name: "kvm on amd", kvm: true, flags: "svm", spec: vmm.Spec{Accel: "auto"}, want: vmm.Spec{Accel: "kvm", CPUModel: "host", CPUFeatures: []string{"svm"}}},
		{name: "kvm without virtualization", kvm: true, flags: "sse", want: vmm.Spec{Accel: "tcg", CPUModel: tcgModel}},
		{name: "the user knows better", kvm: true, flags: "sse", spec: vmm.Spec{Accel: "kvm"}, want: vmm.Spec{Accel: "kvm", CPUModel: "host", CPUFeatures: []string{"sse"}}},
		{name: "kvm asked for in vain", spec: vmm.Spec{Accel: "kvm"}, err: `accel is "kvm"`},
		{name: "tcg asked for", kvm: true, flags: "vmx", spec: vmm.Spec{Accel: "tcg"}, want: vmm.Spec{Accel: "tcg", CPUModel: tcgModel}},
		{name: "unknown accel", spec: vmm.Spec{Accel: "hvf"}, err: `accel is "hvf"`},
		{name: "other hypervisor", spec: vmm.Spec{Hypervisor: "firecracker"}, err: `hypervisor is "firecracker"`},
		{name: "model", spec: vmm.Spec{CPUModel: "EPYC"}, want: vmm.Spec{Accel: "tcg", CPUModel: "EPYC"}},
		{name: "unknown model", spec: vmm.Spec{CPUModel: "Z80"}, err: `cpuModel is "Z80"`},
		{name: "model with options", spec: vmm.Spec{CPUModel: "EPYC,+vmx"}, err: `cpuModel is "EPYC,+vmx"`},
		{name: "Firecracker's template", spec: vmm.Spec{CPUModel: "T2"}, err: `"T2" is Firecracker's: with QEMU name one`},
		{name: "host without kvm", spec: vmm.Spec{CPUModel: "host"}, err: `"host", which needs accel "kvm"`},
		{name: "older board", spec: vmm.Spec{MachineType: "pc-q35-9.2"}, want: vmm.Spec{Accel: "tcg", CPUModel: tcgModel, MachineType: "pc-q35-9.2"}},
		{name: "newer board", spec: vmm.Spec{MachineType: "pc-q35-11.0"}, err: `machineType is "pc-q35-11.0"`},
		{name: "board with options", spec: vmm.Spec{MachineType: "pc-q35-10.0,x=y"}, err: "machineType"},
		{name: "features the host lacks", kvm: true, flags: "vmx", spec: vmm.Spec{CPUFeatures: []string{"avx512f"}}, err: "avx512f"},
		{name: "too many CPUs", spec: vmm.Spec{CPUCount: 1000}, err: "cpuCount is 1000"},
		{name: "odd memory", spec: vmm.Spec{MemorySize: 1<<20 + 1}, err: "memorySize is 1048577"},
		{name: "disk with a comma", spec: vmm.Spec{Disks: []vmm.Disk{{Name: "a,b", Size: 512}}}, err: `"a,b"`},
		{name: "disk with a long name", spec: vmm.Spec{Disks: []vmm.Disk{{Name: strings.Repeat("x", 21), Size: 512}}}, err: "1 to 20"},
		{name: "disk twice", spec: vmm.Spec{Disks: []vmm.Disk{{Name: "a", Size: 512}, {Name: "a", Size: 512}}}, err: "twice"},
		{name: "odd disk", spec: vmm.Spec{Disks: []vmm.Disk{{Name: "a", Size: 513}}}, err: "513"},
		{name: "no MAC", spec: vmm.Spec{MAC: "nonsense"}, err: "nonsense"},
		{name: "multicast MAC", spec: vmm.Spec{MAC: "01:00:5e:00:00:01"}, err: "multicast"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := fakeBackend(fakeHost(t, tc.kvm, tc.flags))
			if tc.spec.MemorySize == 0 {
				tc.spec.MemorySize = 128 << 20
			}
			got, err := b.describe(tc.spec, caps100)
			if tc.err != "" {
				if err == nil || !strings.Contains(err.Error(), tc.err) {
					t.Fatalf("error %v, want %q", err, tc.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if tc.want.MachineType == "" {
				tc.want.MachineType = "pc-q35-10.0"
			}
			if tc.want.Accel == "tcg" {
				tc.want.CPUFeatures = caps100.Emulated[tc.want.CPUModel]
			}
			if got.Accel != tc.want.Accel || got.CPUModel != tc.want.CPUModel || !slices.Equal(got.CPUFeatures, tc.want.CPUFeatures) ||
				got.MachineType != tc.want.MachineType || got.Version != "10.0.2" || got.Hypervisor != "qemu" || got.CPUCount != 1 {
				t.Errorf("got %+v", got)
			}
			if err := b.compatible(got, caps100); err != nil {
				t.Errorf("a description does not fit where it was made: %v", err)
			}
		})
	}
}

func TestCompatible(t *testing.T) {
	good := vmm.Spec{Hypervisor: "qemu", Version: "9.2.1", MachineType: "pc-q35-9.2", Accel: "tcg", CPUModel: "Westmere", CPUCount: 1, MemorySize: 1 << 20}
	for _, tc := range []struct {
		name   string
		change func(s *vmm.Spec)
		err    []string
	}{
		{"older, same board", func(s *vmm.Spec) {}, nil},
		{"other hypervisor", func(s *vmm.Spec) { s.Hypervisor = "firecracker" }, []string{"hypervisor", "firecracker", "qemu"}},
		{"board from the future", func(s *vmm.Spec) { s.MachineType = "pc-q35-11.0" }, []string{"machineType", "pc-q35-11.0", "pc-q35-10.0"}},
		{"max of another version", func(s *vmm.Spec) { s.CPUModel = "max" }, []string{"version", "9.2.1", "10.0.2"}},
		{"max of this version", func(s *vmm.Spec) { s.CPUModel, s.Version = "max", "10.0.5" }, nil},
		{"kvm", func(s *vmm.Spec) { s.Accel = "kvm" }, []string{"accel", "kvm", "tcg"}},
		{"features as emulated here", func(s *vmm.Spec) { s.CPUFeatures = []string{"aes"} }, nil},
		{"features of a newer QEMU", func(s *vmm.Spec) { s.CPUFeatures = []string{"aes", "apx"} }, []string{`["apx"]`, `QEMU's "Westmere"`}},
		{"not described", func(s *vmm.Spec) { s.Accel = "auto" }, []string{"accel", "auto"}},
		{"unknown CPU", func(s *vmm.Spec) { s.CPUModel = "i9" }, []string{"cpuModel", "i9"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			spec := good
			tc.change(&spec)
			err := fakeBackend(fakeHost(t, false, "sse")).compatible(spec, caps100)
			if (err == nil) != (tc.err == nil) {
				t.Fatalf("error %v, want %q", err, tc.err)
			}
			for _, want := range tc.err {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("error %q does not name %q", err, want)
				}
			}
		})
	}
	kvm := good
	kvm.Accel, kvm.CPUModel, kvm.CPUFeatures = "kvm", "host", []string{"avx", "avx512f", "vmx"}
	err := fakeBackend(fakeHost(t, true, "avx vmx sse")).compatible(kvm, caps100)
	if err == nil || !strings.Contains(err.Error(), `["avx512f"]`) {
		t.Errorf("missing features: %v", err)
	}
	with := fakeBackend(fakeHost(t, true, "avx avx512f vmx"))
	if err := with.compatible(kvm, caps100); err != nil {
		t.Errorf("all features: %v", err)
	}
	kvm.CPUFeatures = nil
	if err := with.compatible(kvm, caps100); err == nil || !strings.Contains(err.Error(), "cpuFeatures is empty") {
		t.Errorf("no features: %v", err)
	}
}

// TestRate looks at the measured rate of the time stamp counter, which is measured once.
func TestRate(t *testing.T) {
	a, b := tscRate(), tscRate()
	if a == 0 && runtime.GOARCH != "amd64" {
		t.Skip("the time stamp counter is amd64's")
	}
	if a < 100_000 || a > 20_000_000 {
		t.Errorf("the counter runs at %d kHz", a)
	}
	if a != b {
		t.Errorf("it is measured more than once: %d and %d", a, b)
	}
}

// TestArguments holds the command line: what the guest sees of it is part of every saved machine.
func TestArguments(t *testing.T) {
	if canConfine() {
		t.Log("as root: with chroot")
	}
	cfg := vmm.Config{
		Spec: vmm.Spec{MachineType: "pc-q35-10.0", Accel: "tcg", CPUCount: 2, CPUModel: "Westmere", MemorySize: 1 << 30, MAC: "02:0e:d9:fd:68:3d",
			Sockets: true, BootArgs: "quiet console=ttyS1", Disks: []vmm.Disk{{Name: "disk", Size: 1 << 20}, {Name: "oci", Size: 1 << 20, ReadOnly: true}}},
		Dir: "/vm", Disks: []vmm.Attachment{{Name: "disk", Socket: "/vm/disk.nbd"}, {Name: "oci", Socket: "/vm/oci.nbd"}},
		Boot: &vmm.Boot{Kernel: "/k", Initrd: "/i"}, NUMANode: 1,
	}
	defer func(f func() int) { tscRate = f }(tscRate)
	tscRate = func() int { return 2100000 }
	got := arguments(cfg, caps100, descriptors{memory: 3, qmp: 4, serial: 5, channel: 6, tap: 7})
	var text bytes.Buffer
	skip := 0
	for _, word := range got {
		switch {
		case skip > 0:
			skip--
		case word == "-sandbox" || word == "-run-with": // depend on who runs the test
			skip = 1
		case strings.HasPrefix(word, "-"):
			text.WriteString("\n" + word)
		default:
			text.WriteString(" " + word)
		}
	}
	golden := filepath.Join("testdata", "arguments")
	if os.Getenv("UPDATE") != "" {
		if err := os.WriteFile(golden, text.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(text.Bytes(), want) {
		t.Errorf("got %s\nwant %s\n(UPDATE=1 rewrites testdata/arguments: saved machines of before will not load)", text.Bytes(), want)
	}

	// Behind all others, which have the places that they always have.
	with := cfg
	with.Passthrough = []string{"0000:01:00.0", "0000:02:00.0"}
	more := arguments(with, caps100, descriptors{memory: 3, qmp: 4, serial: 5, channel: 6, tap: 7})
	if want := append(slices.Clone(got), "-device", `{"driver":"vfio-pci","host":"0000:01:00.0","id":"host0"}`, "-device", `{"driver":"vfio-pci","host":"0000:02:00.0","id":"host1"}`); !slices.Equal(more, want) {
		t.Errorf("with devices of the host: got %q, want %q", more, want)
	}

	cfg.Boot, cfg.NUMANode = nil, -1
	if got := strings.Join(arguments(cfg, caps100, descriptors{memory: 3}), " "); !strings.Contains(got, "-incoming defer") ||
		strings.Contains(got, "-kernel") || strings.Contains(got, "host-nodes") {
		t.Errorf("without Boot: %s", got)
	}
}

func TestConfinementOfOldVersions(t *testing.T) {
	if !canConfine() {
		t.Skip("only root confines")
	}
	cfg := vmm.Config{UID: 1000, GID: 1001}
	for _, tc := range []struct {
		caps capabilities
		want string
	}{
		{capabilities{Major: 8, Minor: 0}, "-chroot . -runas 1000:1001"},
		{capabilities{Major: 9, Minor: 0}, "-runas 1000:1001 -run-with chroot=."},
		{capabilities{Major: 9, Minor: 1}, "-run-with chroot=.,user=1000:1001"},
	} {
		got := strings.Join(confinement(cfg, &tc.caps)[2:], " ")
		if got != tc.want {
			t.Errorf("%s: %q, want %q", tc.caps.version(), got, tc.want)
		}
	}
}

func TestProbeCache(t *testing.T) {
	b := New(Options{CacheDir: t.TempDir()})
	binary, err := b.find("")
	if err != nil {
		t.Skip(err)
	}
	first, err := b.probe(t.Context(), binary)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(first.Machines, first.machineType()) || !slices.Contains(first.CPUModels, tcgModel) {
		t.Errorf("QEMU %s has neither %s nor %s: %+v", first.version(), first.machineType(), tcgModel, first)
	}
	if _, err := os.Stat(b.cacheFile(binary)); err != nil {
		t.Error(err)
	}
	second, err := b.probe(t.Context(), binary)
	if err != nil || second.version() != first.version() || !slices.Equal(second.Machines, first.Machines) {
		t.Errorf("from the cache: %+v, %v", second, err)
	}
	if _, err := b.probe(t.Context(), "/bin/false"); err == nil {
		t.Error("/bin/false is a QEMU")
	} else {
		t.Log(err)
	}
}
