package hosttest

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/drafter-vm/drafter/internal/testguest"
	"github.com/drafter-vm/drafter/pkg/blueprint"
)

// blockSize is what the guest reads, and writes behind it, in bytes.
const blockSize = 4096

// passthrough is what both tests need.
type passthrough struct {
	*host
	kernel, initrd          string
	nvme                    string
	fromOutside, fromInside string
}

func newPassthrough(t *testing.T) *passthrough {
	t.Helper()
	p := &passthrough{host: newHost(t), fromOutside: "written by the outermost host", fromInside: "written by the guest within"}
	p.kernel, p.initrd = testguest.BuildWith(t, map[string]string{"/bin/inner": p.build("./inner")})
	p.nvme = filepath.Join(p.dir, "nvme")
	content := make([]byte, 1<<20)
	copy(content, p.fromOutside)
	if err := os.WriteFile(p.nvme, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return p
}

// check checks what was said, and what the guest has written.
func (p *passthrough) check(want ...string) (said string) {
	p.t.Helper()
	said = p.said()
	p.t.Logf("it says:\n%s", said)
	for _, w := range append(want, `inner: read "`+p.fromOutside+`"`, "inner: written", "inner: the power button was pressed") {
		if !strings.Contains(said, w) {
			p.t.Errorf("it does not say %q", w)
		}
	}
	content, err := os.ReadFile(p.nvme)
	if err != nil || !bytes.HasPrefix(content[blockSize:], []byte(p.fromInside)) {
		p.t.Errorf("the disk has %.40q, %v, where the guest has written", content[blockSize:], err)
	}
	return said
}

// TestInner: the guest does what it is for, with a disk of its own.
func TestInner(t *testing.T) {
	if testing.Short() {
		t.Skip("boots a real guest: left out with -short")
	}
	p := newPassthrough(t)
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, p.program, "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-accel", "tcg", "-cpu", "max", "-m", "128", "-M", "q35", "-bios", "qboot.rom",
		"-kernel", p.kernel, "-initrd", p.initrd, "-append", bootArgs+" rdinit=/bin/inner",
		"-drive", "if=none,id=nvme,format=raw,file="+p.nvme, "-device", "nvme,drive=nvme,serial=outside", "-serial", "file:"+p.log, "-monitor", "stdio")
	monitor, err := cmd.StdinPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	for {
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("QEMU: %v", err)
			}
			p.check()
			return
		case <-time.After(500 * time.Millisecond):
		}
		if strings.Contains(p.said(), "inner: written") {
			_, _ = monitor.Write([]byte("system_powerdown\n")) // until it is heeded
		}
	}
}

// TestPassthrough: a guest uses a disk of its host's, which nothing but VFIO gives it.
func TestPassthrough(t *testing.T) {
	if !*long {
		t.Skip("SKIPPED, not tested: a guest on an emulated host takes some 15 minutes: make test-vfio")
	}
	p := newPassthrough(t)
	blank := filepath.Join(p.dir, "blank")
	if err := os.WriteFile(blank, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	host := p.blueprint(blueprint.Config{
		Scripts: []string{"testdata/vfio.sh"}, Size: 2 << 30, Packages: []string{"qemu-system-x86/bookworm-backports", "pciutils", "kmod"},
		Copies: []blueprint.Copy{
			{Host: p.kernel, Guest: "/root/inner/vmlinux"}, {Host: p.initrd, Guest: "/root/inner/initrd"}, {Host: blank, Guest: "/root/inner/disk"},
		},
	})
	_, err := p.run(45*time.Minute, host, nil, "-accel", "tcg,thread=multi", "-smp", "2", "-m", "2G", "-device", "intel-iommu,intremap=on,caching-mode=on", "-append", bootArgs+" intel_iommu=on",
		"-drive", "if=none,id=nvme,format=raw,file="+p.nvme, "-device", "nvme,drive=nvme,serial=outside")
	if err != nil {
		t.Error(err)
	}
	said := p.check("the driver nvme has it, not vfio-pci", "with the host's driver: status 1", "passed through: status 0")
	if _, list, _ := strings.Cut(said, "passed through: status 0"); strings.Contains(list, "memory.bin") || !strings.Contains(list, "manifest.json") {
		t.Errorf("the package has %q", list)
	}
}
