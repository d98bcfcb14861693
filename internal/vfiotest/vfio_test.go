package vfiotest

import (
	"bytes"
	"context"
	"flag"
	"io"
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

const (
	fromOutside = "written by the outermost host"
	fromInside  = "written by the guest within"
	blockSize   = 4096
)

// TestPassthrough: a guest uses a disk of its host's, which nothing but VFIO gives it.
func TestPassthrough(t *testing.T) {
	if !*long {
		t.Skip("SKIPPED, not tested: a guest on an emulated host takes some 15 minutes: make test-vfio")
	}
	qemu, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Skipf("SKIPPED, not tested: %v", err)
	}
	dir := t.TempDir()
	built := func(pkg string) string {
		path := filepath.Join(dir, filepath.Base(pkg))
		if err := testpackage.Build(t.Context(), ".", pkg, path); err != nil {
			t.Fatal(err)
		}
		return path
	}
	kernel, initrd := testguest.BuildWith(t, map[string]string{"/bin/inner": built("./inner")})
	blank, nvme, log := filepath.Join(dir, "blank"), filepath.Join(dir, "nvme"), filepath.Join(dir, "log")
	content := make([]byte, 1<<20)
	copy(content, fromOutside)
	for path, b := range map[string][]byte{blank: make([]byte, 1<<20), nvme: content, log: nil} {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	host, err := blueprint.Build(t.Context(), blueprint.Config{
		Output: filepath.Join(dir, "host"), Agent: built("../../cmd/drafter-agent"), Scripts: []string{"testdata/outer.sh"}, Size: 2 << 30,
		Packages: []string{"qemu-system-x86/bookworm-backports", "pciutils", "kmod"},
		Copies: []blueprint.Copy{
			{Host: built("../../cmd/drafter"), Guest: "/usr/local/bin/drafter"},
			{Host: kernel, Guest: "/root/inner/vmlinux"}, {Host: initrd, Guest: "/root/inner/initrd"}, {Host: blank, Guest: "/root/inner/disk"},
		},
	})
	if err != nil {
		t.Fatal(err)
	}

	ctx, cancel := context.WithTimeout(t.Context(), 45*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, qemu, "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "2G",
		"-M", "q35,usb=off,vmport=off,hpet=off", "-device", "intel-iommu,intremap=on,caching-mode=on",
		"-kernel", host.Kernel, "-initrd", host.Initrd, "-append", "console=ttyS0 quiet panic=-1 tsc=reliable no_timer_check intel_iommu=on",
		"-drive", "if=none,id=root,format=raw,file="+host.Disk, "-device", "virtio-blk-pci,drive=root",
		"-drive", "if=none,id=nvme,format=raw,file="+nvme, "-device", "nvme,drive=nvme,serial=outside",
		"-serial", "null", "-serial", "file:"+log)
	out, err := cmd.CombinedOutput()
	text, _ := os.ReadFile(log)
	t.Logf("the host says:\n%s", text)
	if err != nil {
		t.Fatalf("the emulated host: %v: %s", err, out)
	}
	said := string(text)
	for _, want := range []string{
		"the driver nvme has it, not vfio-pci", "with the host's driver: status 1",
		`inner: read "` + fromOutside + `"`, "inner: written", "inner: the power button was pressed", "passed through: status 0",
	} {
		if !strings.Contains(said, want) {
			t.Errorf("it does not say %q", want)
		}
	}
	if _, list, _ := strings.Cut(said, "passed through: status 0"); strings.Contains(list, "memory.bin") || !strings.Contains(list, "manifest.json") {
		t.Errorf("the package has %q", list)
	}
	f, err := os.Open(nvme)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, len(fromInside))
	if _, err := f.ReadAt(b, blockSize); err != nil && err != io.EOF || !bytes.Equal(b, []byte(fromInside)) {
		t.Errorf("the disk has %q, %v, where the guest has written", b, err)
	}
}
