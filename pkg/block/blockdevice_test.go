package block_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/block/blocktest"
)

// TestBlockDevice runs the suite over a loop device, which is what a host's block device is like.
func TestBlockDevice(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("making a loop device needs root")
	}
	if _, err := exec.LookPath("losetup"); err != nil {
		t.Skip("losetup is not installed (Debian package mount)")
	}
	const size = 1<<20 + 512
	image := filepath.Join(t.TempDir(), "image")
	f := must[*block.File](t)(block.CreateFile(image, size))
	mustClose(t, f)
	out, err := exec.Command("losetup", "--find", "--show", image).CombinedOutput()
	if err != nil {
		t.Skipf("there are no loop devices here: %v: %s", err, out)
	}
	loop := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if out, err := exec.Command("losetup", "--detach", loop).CombinedOutput(); err != nil {
			t.Errorf("detach %s: %v: %s", loop, err, out)
		}
	})
	open := func(t *testing.T) *block.File {
		return must[*block.File](t)(block.OpenFile(loop, block.FileOptions{}))
	}
	blocktest.Run(t, func(t *testing.T) block.Device {
		d := open(t)
		if d.Size() != size {
			t.Fatalf("the size of the block device is %d, want %d", d.Size(), size)
		}
		if err := d.Discard(0, size); err != nil { // every test begins with zeros
			t.Fatal(err)
		}
		return d
	}, blocktest.Reopen(func(t *testing.T, _ block.Device) block.Device { return open(t) }))
}
