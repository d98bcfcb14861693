package backends

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/drafter-vm/drafter/pkg/ram"
	"github.com/drafter-vm/drafter/pkg/vmm"
	"github.com/drafter-vm/drafter/pkg/vmm/firecracker"
	"github.com/drafter-vm/drafter/pkg/vmm/vmmtest"
)

// consoleBuffer is more than the FIFO that is Firecracker's console holds (pipe(7)).
const consoleBuffer = 70_000

// TestFirecrackerSuite runs the suite of all backends: with a Linux where the processor has what it takes to run one.
func TestFirecrackerSuite(t *testing.T) {
	vmmtest.Run(t, vmmtest.Harness{Backend: backend(t), Configure: func(t testing.TB, cfg *vmm.Config) { graft(t, cfg, false) }, Tiny: !virtualises(t), ConsoleBuffer: consoleBuffer, ResetEnds: true})
}

// TestFirecrackerJailed runs it in the jailer, as a user of its own.
func TestFirecrackerJailed(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED, not tested: the jailer needs root")
	}
	vmmtest.Run(t, vmmtest.Harness{
		Backend: jailed(t), Tiny: !virtualises(t), ConsoleBuffer: consoleBuffer, ResetEnds: true, Dir: jailFolder,
		Attach: func(t testing.TB, dir string, disk vmm.Disk, file string) vmm.Attachment {
			// As its owner has it, in its folder.
			inside := filepath.Join(dir, "disk.image")
			if err := os.Link(file, inside); err != nil && !errors.Is(err, os.ErrExist) {
				t.Fatal(err)
			}
			if err := os.Chown(inside, uid, gid); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { os.Remove(inside) })
			return vmm.Attachment{Name: disk.Name, Path: inside}
		},
		Configure: confine,
	})
}

const uid, gid = 12345, 12346 // of jailed machines

// jailFolder makes a folder as the jailer wants it.
func jailFolder(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "fc-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	root := filepath.Join(dir, "firecracker", "vm", "root")
	if err := os.MkdirAll(root, 0o700); err != nil {
		t.Fatal(err)
	}
	return root
}

// confine has a machine be confined in all ways.
func confine(t testing.TB, cfg *vmm.Config) {
	graft(t, cfg, true)
	cfg.UID, cfg.GID, cfg.NUMANode = uid, gid, 0
	cfg.CgroupVersion, cfg.CgroupName = cgroupVersion(), filepath.Base(filepath.Dir(filepath.Dir(filepath.Dir(cfg.Dir))))
}

// cgroupVersion is that of the host's control groups.
func cgroupVersion() int {
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err == nil { // cgroups(7): where the root of version 2 is mounted
		return 2
	}
	return 1
}

// TestFirecrackerConfined: whoever takes over a jailed Firecracker has a user without privileges, in a folder, behind a filter of system calls.
func TestFirecrackerConfined(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED, not tested: the jailer needs root")
	}
	binary, jailer := program(t), vmmtest.Program(t, "jailer", "JAILER_BIN")
	t.Run("as given", func(t *testing.T) { testConfined(t, binary, jailer) })
	for name, mode := range map[string]os.FileMode{"firecracker-v1.13.0-x86_64": 0o755, "firecracker": 0o700} { // as in an archive of a release; root's alone
		t.Run(fmt.Sprintf("%s %o", name, mode), func(t *testing.T) {
			content, err := os.ReadFile(binary)
			if err != nil {
				t.Fatal(err)
			}
			path := filepath.Join(t.TempDir(), name)
			if err := os.WriteFile(path, content, mode); err != nil {
				t.Fatal(err)
			}
			testConfined(t, path, jailer)
		})
	}
}

func testConfined(t *testing.T, binary, jailer string) {
	b := firecracker.New(firecracker.Options{Binary: binary, Jailer: jailer, Logger: vmmtest.Logger(t)})
	ctx := t.Context()
	spec, err := b.Describe(ctx, vmm.Spec{MemorySize: memorySize})
	if err != nil {
		t.Fatal(err)
	}
	cfg := vmm.Config{Spec: spec, Dir: jailFolder(t), Memory: vmmtest.NewMemory(t, memorySize), Boot: &vmm.Boot{Kernel: kernel(t)}, Logger: vmmtest.Logger(t)}
	confine(t, &cfg)
	m, err := b.Start(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	proc := fmt.Sprintf("/proc/%d/", m.PID())
	status, err := os.ReadFile(proc + "status")
	if err != nil {
		t.Fatal(err)
	}
	fields := make(map[string]string)
	for line := range strings.Lines(string(status)) {
		name, value, _ := strings.Cut(line, ":")
		fields[name] = strings.Join(strings.Fields(value), " ")
	}
	for name, want := range map[string]string{
		"Uid": "12345 12345 12345 12345", "Gid": "12346 12346 12346 12346", "Seccomp": "2", "CapEff": "0000000000000000", "CapPrm": "0000000000000000",
	} {
		if fields[name] != want {
			t.Errorf("its %s is %q, want %q", name, fields[name], want)
		}
	}
	jail, err := os.Stat(proc + "root/")
	if err != nil {
		t.Fatal(err)
	}
	if dir, err := os.Stat(cfg.Dir); err != nil || !os.SameFile(jail, dir) {
		t.Errorf("its root folder is not %q (%v)", cfg.Dir, err)
	}
	if ours, err := os.Readlink("/proc/self/ns/mnt"); err != nil {
		t.Error(err)
	} else if its, err := os.Readlink(proc + "ns/mnt"); err != nil || its == ours {
		t.Errorf("it sees our mounts (%v)", err)
	}
	if groups, err := os.ReadFile(proc + "cgroup"); err != nil || !strings.Contains(string(groups), cfg.CgroupName) {
		t.Errorf("its control groups are %q (%v)", groups, err)
	}
	if err := m.Close(); err != nil {
		t.Error(err)
	}
	above := filepath.Dir(cfg.Dir)
	if left, err := os.ReadDir(above); err != nil || len(left) != 1 {
		t.Errorf("it has left %v in %q (%v)", left, above, err)
	}
	if mounts, err := os.ReadFile("/proc/self/mountinfo"); err != nil || strings.Contains(string(mounts), cfg.Dir) {
		t.Errorf("it has left a mount (%v)", err)
	}
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
func graft(t testing.TB, cfg *vmm.Config, wrapped bool) {
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
		h, err := ram.Spawn(cmd, ram.Options{Graft: memory, Wrapped: wrapped})
		if err != nil {
			return err
		}
		return memory.Attach(t.Context(), h)
	}
}
