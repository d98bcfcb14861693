package vfiotest

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/drafter-vm/drafter/internal/testguest"
	"github.com/drafter-vm/drafter/internal/testpackage"
	"github.com/drafter-vm/drafter/pkg/blueprint"
)

var long = flag.Bool("long", false, "run it: it takes some 15 minutes")

// blockSize is what the guest reads, and writes behind it, in bytes.
const blockSize = 4096

// files are what both tests need.
type files struct {
	t                       *testing.T
	dir, kernel, initrd     string
	nvme, log, program      string // program is QEMU's
	fromOutside, fromInside string
}

func newFiles(t *testing.T) *files {
	t.Helper()
	f := &files{t: t, dir: t.TempDir(), fromOutside: "written by the outermost host", fromInside: "written by the guest within"}
	var err error
	if f.program, err = exec.LookPath("qemu-system-x86_64"); err != nil {
		t.Skipf("SKIPPED, not tested: %v", err)
	}
	f.kernel, f.initrd = testguest.BuildWith(t, map[string]string{"/bin/inner": f.build("./inner")})
	f.nvme, f.log = filepath.Join(f.dir, "nvme"), filepath.Join(f.dir, "log")
	content := make([]byte, 1<<20)
	copy(content, f.fromOutside)
	if err := errors.Join(os.WriteFile(f.nvme, content, 0o600), os.WriteFile(f.log, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	return f
}

func (f *files) build(pkg string) string {
	f.t.Helper()
	path := filepath.Join(f.dir, filepath.Base(pkg))
	if err := testpackage.Build(f.t.Context(), ".", pkg, path); err != nil {
		f.t.Fatal(err)
	}
	return path
}

// said checks what was said, and what the guest has written.
func (f *files) said(want ...string) string {
	f.t.Helper()
	text, err := os.ReadFile(f.log)
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Logf("it says:\n%s", text)
	for _, w := range append(want, `inner: read "`+f.fromOutside+`"`, "inner: written", "inner: the power button was pressed") {
		if !strings.Contains(string(text), w) {
			f.t.Errorf("it does not say %q", w)
		}
	}
	content, err := os.ReadFile(f.nvme)
	if err != nil || !bytes.HasPrefix(content[blockSize:], []byte(f.fromInside)) {
		f.t.Errorf("the disk has %.40q, %v, where the guest has written", content[blockSize:], err)
	}
	return string(text)
}

// TestInner: the guest does what it is for, with a disk of its own.
func TestInner(t *testing.T) {
	if testing.Short() {
		t.Skip("boots a real guest: left out with -short")
	}
	f := newFiles(t)
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, f.program, "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-accel", "tcg", "-cpu", "max", "-m", "128", "-M", "q35", "-bios", "qboot.rom",
		"-kernel", f.kernel, "-initrd", f.initrd, "-append", "console=ttyS0 quiet panic=-1 tsc=reliable no_timer_check rdinit=/bin/inner",
		"-drive", "if=none,id=nvme,format=raw,file="+f.nvme, "-device", "nvme,drive=nvme,serial=outside", "-serial", "file:"+f.log, "-monitor", "stdio")
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
			f.said()
			return
		case <-time.After(500 * time.Millisecond):
		}
		if text, err := os.ReadFile(f.log); err != nil || bytes.Contains(text, []byte("inner: written")) {
			_, _ = monitor.Write([]byte("system_powerdown\n")) // until it is heeded
		}
	}
}

// TestPassthrough: a guest uses a disk of its host's, which nothing but VFIO gives it.
func TestPassthrough(t *testing.T) {
	if !*long {
		t.Skip("SKIPPED, not tested: a guest on an emulated host takes some 15 minutes: make test-vfio")
	}
	f := newFiles(t)
	blank := filepath.Join(f.dir, "blank")
	if err := os.WriteFile(blank, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	host, err := blueprint.Build(t.Context(), blueprint.Config{
		Output: filepath.Join(f.dir, "host"), Agent: f.build("../../cmd/drafter-agent"), Scripts: []string{"testdata/outer.sh"}, Size: 2 << 30,
		Packages: []string{"qemu-system-x86/bookworm-backports", "pciutils", "kmod"},
		Copies: []blueprint.Copy{
			{Host: f.build("../../cmd/drafter"), Guest: "/usr/local/bin/drafter"},
			{Host: f.kernel, Guest: "/root/inner/vmlinux"}, {Host: f.initrd, Guest: "/root/inner/initrd"}, {Host: blank, Guest: "/root/inner/disk"},
		},
	})
	if err != nil {
		t.Fatal(err)
	}

	ctx, cancel := context.WithTimeout(t.Context(), 45*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, f.program, "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "2G",
		"-M", "q35,usb=off,vmport=off,hpet=off", "-device", "intel-iommu,intremap=on,caching-mode=on",
		"-kernel", host.Kernel, "-initrd", host.Initrd, "-append", "console=ttyS0 quiet panic=-1 tsc=reliable no_timer_check intel_iommu=on",
		"-drive", "if=none,id=root,format=raw,file="+host.Disk, "-device", "virtio-blk-pci,drive=root",
		"-drive", "if=none,id=nvme,format=raw,file="+f.nvme, "-device", "nvme,drive=nvme,serial=outside",
		"-serial", "null", "-serial", "file:"+f.log)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("the emulated host: %v: %s", err, out)
	}
	said := f.said("the driver nvme has it, not vfio-pci", "with the host's driver: status 1", "passed through: status 0")
	if _, list, _ := strings.Cut(said, "passed through: status 0"); strings.Contains(list, "memory.bin") || !strings.Contains(list, "manifest.json") {
		t.Errorf("the package has %q", list)
	}
}
