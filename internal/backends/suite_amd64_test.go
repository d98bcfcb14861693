package backends

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/drafter-vm/drafter/pkg/ram"
	"github.com/drafter-vm/drafter/pkg/vmm"
	"github.com/drafter-vm/drafter/pkg/vmm/vmmtest"
)

// TestFirecrackerSuite runs the suite of all backends: with a Linux where the processor has what it takes to run one.
func TestFirecrackerSuite(t *testing.T) {
	vmmtest.Run(t, vmmtest.Harness{Backend: backend(t), Configure: graft, Tiny: !virtualises(t), ResetEnds: true})
}

// virtualises reports whether an operating system boots under this host's KVM.
func virtualises(t testing.TB) bool {
	t.Helper()
	text, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range strings.Fields(string(text)) {
		if f == "vmx" || f == "svm" {
			return true
		}
	}
	return false
}

// graft has the machine's memory be the guest's RAM.
func graft(t testing.TB, cfg *vmm.Config) {
	if cfg.Memory == nil {
		return
	}
	fd, err := unix.FcntlInt(cfg.Memory.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	memory, err := ram.Open(os.NewFile(uintptr(fd), "memory"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { memory.Close() })
	cfg.Graft = memory.Graft
	cfg.Spawn = func(cmd *exec.Cmd) error {
		h, err := ram.Spawn(cmd, ram.Options{Graft: memory})
		if err != nil {
			return err
		}
		return memory.Attach(t.Context(), h)
	}
}
