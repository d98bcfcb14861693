package hosttest

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/drafter-vm/drafter/internal/testguest"
	"github.com/drafter-vm/drafter/pkg/blueprint"
	"github.com/drafter-vm/drafter/pkg/vmm/vmmtest"
)

var only = flag.String("parts", "", "run only the parts of TestKVM whose names match this regular expression, such as TestFirecrackerJailed/Disk or demo-qemu")

// caseLimit is how long a case of a suite may take, in seconds: longer than its own patience, so that one that hangs says why. Half of it is less: see kvm.sh.
const caseLimit = 900

// TestKVM: guests that are a real Linux run under KVM, by both hypervisors.
func TestKVM(t *testing.T) {
	if !*long {
		t.Skip("SKIPPED, not tested: guests under KVM on an emulated host take hours: make test-kvm")
	}
	h := newHost(t)
	firecracker, jailer := vmmtest.Program(t, "firecracker", "FIRECRACKER_BIN"), vmmtest.Program(t, "jailer", "JAILER_BIN")
	kernel, initrd := testguest.Build(t)
	copies := []blueprint.Copy{
		{Host: firecracker, Guest: "/usr/local/bin/firecracker"}, {Host: jailer, Guest: "/usr/local/bin/jailer"},
		{Host: kernel, Guest: "/root/guest/vmlinux"}, {Host: initrd, Guest: "/root/guest/initrd"},
		{Host: h.build("../demo"), Guest: "/root/demo"},
	}
	// What is done there, each by processes of its own: for how many seconds at most, and how.
	var names []string
	var parts strings.Builder
	wanted, err := regexp.Compile(*only)
	if err != nil {
		t.Fatal(err)
	}
	part := func(limit int, name, command string) {
		if !wanted.MatchString(name) {
			return
		}
		names = append(names, name)
		fmt.Fprintln(&parts, limit, name, command)
	}
	for _, s := range []struct{ pkg, binary, suite string }{
		{"../backends", "backends.test", "TestFirecrackerSuite"}, {"../backends", "backends.test", "TestFirecrackerJailed"},
		{"../../pkg/vmm/qemu", "qemu.test", "TestSuite"},
	} {
		if path := "/root/" + s.binary; !slices.ContainsFunc(copies, func(c blueprint.Copy) bool { return c.Guest == path }) {
			copies = append(copies, blueprint.Copy{Host: h.buildTest(s.pkg, s.binary), Guest: path})
		}
		for _, name := range vmmtest.Cases() {
			limit := caseLimit
			if name == "SlowConsole" {
				limit *= 3 // a byte takes milliseconds
			}
			part(limit, s.suite+"/"+name, fmt.Sprintf("./%s -test.v -test.run '^%s$/^%s$'", s.binary, s.suite, name))
		}
	}
	for _, hypervisor := range []string{"qemu", "firecracker"} {
		part(3600, "demo-"+hypervisor, fmt.Sprintf("./demo -moves 1 -bin bin -out out-%s -blueprint blueprint -hypervisor %s", hypervisor, hypervisor))
	}
	list := filepath.Join(h.dir, "parts")
	if err := os.WriteFile(list, []byte(parts.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	copies = append(copies, blueprint.Copy{Host: list, Guest: "/root/parts"})
	valkey, err := blueprint.Build(t.Context(), blueprint.Config{
		Output: filepath.Join(h.dir, "blueprint"), Agent: h.build("../../cmd/drafter-agent"), Packages: []string{"valkey-server"},
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{valkey.Kernel, valkey.Initrd, valkey.Disk} {
		copies = append(copies, blueprint.Copy{Host: path, Guest: "/root/blueprint/" + filepath.Base(path)})
	}

	host := h.blueprint(blueprint.Config{
		Scripts: []string{"testdata/kvm.sh"}, Size: 8 << 30, KernelPackage: "linux-image-cloud-amd64/bookworm-backports",
		Packages: []string{"qemu-system-x86/bookworm-backports", "qemu-utils", "kmod", "iproute2", "nftables"}, Copies: copies,
	})
	said, told := "", 0
	tell := func(now string) {
		// It is long for somebody who watches.
		if end := strings.LastIndexByte(now, '\n') + 1; end > told {
			for line := range strings.Lines(now[told:end]) {
				if !strings.Contains(line, "level=DEBUG") {
					t.Log(strings.TrimRight(line, "\n"))
				}
			}
			told = end
		}
	}
	for end := time.Now().Add(4 * time.Hour); !strings.Contains(said, "outer: done\n"); {
		if time.Now().After(end) {
			t.Fatal("it takes too long")
		}
		told = 0
		now, err := h.run(time.Until(end), host, tell, "-accel", "tcg,thread=single", "-smp", "1", "-m", "8G", "-append", bootArgs)
		if said += now; err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(now, "outer: ") {
			t.Fatal("it has begun with nothing")
		}
	}
	for _, name := range names {
		if !strings.Contains(said, "outer: "+name+": status 0\n") {
			t.Errorf("%s has failed", name)
		}
	}
	for _, line := range regexp.MustCompile(`(?m)^ *--- SKIP.*$`).FindAllString(said, -1) {
		if !strings.Contains(line, "/Poweroff ") { // of Firecracker, whose guests reboot
			t.Errorf("not tested: %s", strings.TrimSpace(line))
		}
	}
	if again := strings.Count(said, "it stood still, or the host ended\n"); again > len(names)/4+1 {
		t.Errorf("of %d parts, %d were tried again: more than the emulation explains", len(names), again)
	}
	if len(names) == 0 {
		t.Error("nothing was run")
	}
	if strings.Contains(said, "-accel tcg ") {
		t.Error("QEMU was tested without KVM")
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
