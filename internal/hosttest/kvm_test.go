package hosttest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
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
	// Each case of a suite is tested by a process of its own.
	parts := []string{"backends", "demo qemu", "demo firecracker"}
	var list strings.Builder
	for _, s := range []struct{ pkg, binary, suite string }{
		{"../backends", "backends.test", "TestFirecrackerSuite"}, {"../backends", "backends.test", "TestFirecrackerJailed"},
		{"../../pkg/vmm/qemu", "qemu.test", "TestSuite"},
	} {
		if path := "/root/" + s.binary; !slices.ContainsFunc(copies, func(c blueprint.Copy) bool { return c.Guest == path }) {
			copies = append(copies, blueprint.Copy{Host: h.buildTest(s.pkg, s.binary), Guest: path})
		}
		for _, name := range vmmtest.Cases() {
			parts = append(parts, s.suite+"/"+name)
			fmt.Fprintln(&list, s.suite, s.binary, name)
		}
	}
	cases := filepath.Join(h.dir, "cases")
	if err := os.WriteFile(cases, []byte(list.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	copies = append(copies, blueprint.Copy{Host: cases, Guest: "/root/cases"})
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

	for _, part := range parts {
		if !strings.Contains(said, "outer: "+part+": status 0\n") {
			t.Errorf("%s has failed, or was not reached", part)
		}
	}
	if strings.Contains(said, "no Linux boots here") {
		t.Error("a tiny guest was tested, and not a Linux")
	}
}

// buildTest builds the tests of a package.
func (h *host) buildTest(pkg, binary string) string {
	h.t.Helper()
	path := filepath.Join(h.dir, binary)
	cmd := exec.CommandContext(h.t.Context(), "go", "test", "-c", "-o", path, pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		h.t.Fatal(errors.New(string(out)), err)
	}
	return path
}
