package hosttest

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/drafter-vm/drafter/internal/testguest"
	"github.com/drafter-vm/drafter/pkg/blueprint"
	"github.com/drafter-vm/drafter/pkg/vmm/vmmtest"
)

// TestKVM: guests that are a real Linux run under KVM, by both hypervisors.
func TestKVM(t *testing.T) {
	if !*long {
		t.Skip("SKIPPED, not tested: guests under KVM on an emulated host take up to an hour: make test-kvm")
	}
	h := newHost(t)
	firecracker, jailer := vmmtest.Program(t, "firecracker", "FIRECRACKER_BIN"), vmmtest.Program(t, "jailer", "JAILER_BIN")
	kernel, initrd := testguest.Build(t)
	copies := []blueprint.Copy{
		{Host: firecracker, Guest: "/usr/local/bin/firecracker"}, {Host: jailer, Guest: "/usr/local/bin/jailer"},
		{Host: kernel, Guest: "/root/guest/vmlinux"}, {Host: initrd, Guest: "/root/guest/initrd"},
		{Host: h.build("../demo"), Guest: "/root/demo"},
	}
	for name, pkg := range map[string]string{"backends.test": "../backends", "qemu.test": "../../pkg/vmm/qemu"} {
		copies = append(copies, blueprint.Copy{Host: h.buildTest(pkg), Guest: "/root/" + name})
	}
	valkey, err := blueprint.Build(t.Context(), blueprint.Config{
		Output: filepath.Join(h.dir, "blueprint"), Agent: h.build("../../cmd/drafter-agent"), Packages: []string{"valkey-server"},
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{valkey.Kernel, valkey.Initrd, valkey.Disk} {
		copies = append(copies, blueprint.Copy{Host: path, Guest: "/root/blueprint/" + filepath.Base(path)})
	}

	told := 0
	said := h.run(3*time.Hour, blueprint.Config{
		Scripts: []string{"testdata/kvm.sh"}, Size: 8 << 30, KernelPackage: "linux-image-cloud-amd64/bookworm-backports",
		Packages: []string{"qemu-system-x86/bookworm-backports", "qemu-utils", "kmod", "iproute2", "nftables"}, Copies: copies,
	}, func(said string) {
		// An hour is long for somebody who watches.
		if end := strings.LastIndexByte(said, '\n') + 1; end > told {
			for line := range strings.Lines(said[told:end]) {
				if !strings.Contains(line, "level=DEBUG") {
					t.Log(strings.TrimRight(line, "\n"))
				}
			}
			told = end
		}
	}, "-accel", "tcg,thread=multi", "-m", "8G", "-append", bootArgs)

	for _, part := range []string{"backends", "qemu", "demo qemu", "demo firecracker"} {
		if !strings.Contains(said, "outer: "+part+": status 0\n") {
			t.Errorf("%s has failed, or was not reached", part)
		}
	}
	// What only a Linux does was tested with one.
	for _, name := range []string{"SlowConsole", "Channel", "Disk", "Poweroff", "PowerButton", "Balloon"} {
		for _, suite := range []string{"TestFirecrackerSuite", "TestFirecrackerJailed", "TestSuite"} {
			if !regexp.MustCompile(`--- PASS: ` + suite + `/` + name + ` `).MatchString(said) {
				t.Errorf("%s/%s has not passed", suite, name)
			}
		}
	}
}

// buildTest builds the tests of a package.
func (h *host) buildTest(pkg string) string {
	h.t.Helper()
	path := filepath.Join(h.dir, filepath.Base(pkg)+".test")
	cmd := exec.CommandContext(h.t.Context(), "go", "test", "-c", "-o", path, pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		h.t.Fatal(errors.New(string(out)), err)
	}
	return path
}
