package main

import (
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"github.com/drafter-vm/drafter/pkg/runner"
	"github.com/drafter-vm/drafter/pkg/vmm"
	"github.com/drafter-vm/drafter/pkg/vmm/firecracker"
	"github.com/drafter-vm/drafter/pkg/vmm/qemu"
	"github.com/drafter-vm/drafter/pkg/vmm/vfio"
)

// machineFlags are the flags of every tool that runs a machine: on what, as whom, and where.
type machineFlags struct {
	hypervisor    string
	accel         string
	qemuBin       string
	fcBin         string
	jailerBin     string
	chrootBaseDir string
	uid, gid      int
	netns         string
	iface         string
	numaNode      int
	cgroupVersion int
	ioEngineSync  bool
	hugePages     bool
	diskBandwidth int64
	diskIOPS      int64
	vfio          []string
	enableOutput  bool
	enableInput   bool
	resumeTimeout time.Duration

	flags *pflag.FlagSet // which of these were given
}

func (m *machineFlags) register(flags *pflag.FlagSet) {
	flags.StringVar(&m.hypervisor, "hypervisor", "auto", "hypervisor: qemu, firecracker, or auto: the one that the VM was made with; to make one, Firecracker if --firecracker-bin is given, otherwise QEMU")
	flags.StringVar(&m.accel, "accel", "auto", "acceleration: kvm, tcg (emulation, works everywhere), or auto: kvm where the CPU has vmx or svm")
	flags.StringVar(&m.qemuBin, "qemu-bin", "", "QEMU program (default: qemu-system-x86_64 from PATH)")
	flags.StringVar(&m.fcBin, "firecracker-bin", "", "Firecracker program (default: firecracker from PATH)")
	flags.StringVar(&m.jailerBin, "jailer-bin", "", "Firecracker's jailer, in which it runs, or none (default: jailer from PATH, or from beside --firecracker-bin, if that is there)")
	flags.StringVar(&m.chrootBaseDir, "chroot-base-dir", "out/vms", "folder in which running machines have theirs (VMPath)")
	flags.IntVar(&m.uid, "uid", 0, "user id to run the hypervisor as")
	flags.IntVar(&m.gid, "gid", 0, "group id to run the hypervisor as")
	flags.StringVar(&m.netns, "netns", "ark0", "network namespace with the tap interface (empty: the one this runs in)")
	flags.StringVar(&m.iface, "interface", "tap0", "tap interface in the network namespace that the guest's is connected to")
	flags.IntVar(&m.numaNode, "numa-node", 0, "NUMA node for the machine's CPUs and memory (-1: any; the default where this host has no such node)")
	flags.IntVar(&m.cgroupVersion, "cgroup-version", 2, "hierarchy in which the machine gets a control group of its own: 1 or 2 (0: none; the default where this user cannot make one)")
	flags.BoolVar(&m.ioEngineSync, "io-engine-sync", false, "synchronous disks: each request is finished before the next is begun")
	flags.BoolVar(&m.hugePages, "huge-pages", false, "put the guest's memory into huge pages once all of it is here (docs/hypervisors.md says what the host needs)")
	flags.Int64Var(&m.diskBandwidth, "disk-bandwidth", 0, "most that the guest reads and writes of each disk, in bytes per second (0: no limit)")
	flags.Int64Var(&m.diskIOPS, "disk-iops", 0, "most requests of the guest to each disk per second (0: no limit)")
	flags.StringSliceVar(&m.vfio, "vfio", nil, "PCI `address` of a device of this host for the guest, by QEMU (repeatable); its VM boots and shuts down, and is neither snapshotted nor moved")
	flags.BoolVar(&m.enableOutput, "enable-output", true, "print the guest's console on stdout")
	flags.BoolVar(&m.enableInput, "enable-input", false, "pass stdin to the guest's console")
	flags.DurationVar(&m.resumeTimeout, "resume-timeout", time.Minute, "how long to wait for the guest's agent and liveness")
	m.flags = flags
}

// offerMachine has shells complete the values of a machine's flags.
func offerMachine(cmd *cobra.Command) {
	offer(cmd, "hypervisor", "auto", "qemu", "firecracker")
	offer(cmd, "accel", "auto", "kvm", "tcg")
	offer(cmd, "cgroup-version", "0", "1", "2")
}

// check refuses values that no machine on this host could have, before anything is begun. A default that this host cannot
// honour is none; a value that was asked for is honoured or refused.
func (m *machineFlags) check() error {
	switch {
	case m.uid < 0:
		return usageErrorf("--uid %d is negative: give the number of a user", m.uid)
	case m.gid < 0:
		return usageErrorf("--gid %d is negative: give the number of a group", m.gid)
	case m.uid > maxID:
		return usageErrorf("--uid %d is no number of a user: give one up to %d", m.uid, maxID)
	case m.gid > maxID:
		return usageErrorf("--gid %d is no number of a group: give one up to %d", m.gid, maxID)
	case (m.uid != 0 && m.uid != os.Geteuid() || m.gid != 0 && m.gid != os.Getegid()) && os.Geteuid() != 0:
		return usageErrorf("--uid %d --gid %d: only root can run the hypervisor as another user; leave them out, or run this as root", m.uid, m.gid)
	case m.numaNode < -1:
		return usageErrorf("--numa-node %d: give the number of a node, or -1 for any", m.numaNode)
	case m.cgroupVersion < 0 || m.cgroupVersion > 2:
		return usageErrorf("--cgroup-version %d: use 1 or 2, or 0 for none", m.cgroupVersion)
	case m.diskBandwidth < 0:
		return usageErrorf("--disk-bandwidth %d is negative: give bytes per second, or 0 for no limit", m.diskBandwidth)
	case m.diskIOPS < 0:
		return usageErrorf("--disk-iops %d is negative: give requests per second, or 0 for no limit", m.diskIOPS)
	case m.resumeTimeout <= 0:
		return usageErrorf("--resume-timeout %s: give a time above zero", m.resumeTimeout)
	case m.chrootBaseDir == "":
		return usageErrorf("--chroot-base-dir is empty: give a folder")
	case m.accel != "auto" && m.accel != "kvm" && m.accel != "tcg":
		return usageErrorf("--accel %q: use auto, kvm or tcg", m.accel)
	}
	if m.netns != "" {
		if m.netns != filepath.Base(m.netns) || m.netns == "." || m.netns == ".." {
			return usageErrorf("--netns %q: give the name of a network namespace in %s, not a path", m.netns, netnsDir)
		}
		if _, err := os.Stat(filepath.Join(netnsDir, m.netns)); err != nil {
			return fmt.Errorf("--netns %q: there is no such network namespace: make it (ip netns add %s), or name another (empty: this one)", m.netns, m.netns)
		}
	}
	for _, program := range []struct{ flag, path, name string }{
		{"qemu-bin", m.qemuBin, "QEMU's program"}, {"firecracker-bin", m.fcBin, "Firecracker's program"}, {"jailer-bin", m.jailerBin, "Firecracker's jailer"},
	} {
		if program.path == "" || program.flag == "jailer-bin" && program.path == noJailer {
			continue
		}
		if _, err := exec.LookPath(program.path); err != nil {
			return fmt.Errorf("--%s: %w: give the path of %s, or leave it out", program.flag, err, program.name)
		}
	}
	if m.flags.Changed("vfio") && len(m.vfio) == 0 {
		return usageErrorf("--vfio is empty: give the address of a PCI device, like 0000:01:00.0, or leave it out")
	}
	if len(m.vfio) > 0 {
		if m.hypervisor == "firecracker" {
			return usageErrorf("--vfio excludes --hypervisor firecracker, which passes no devices through: use qemu")
		}
		if _, err := vfio.Check(m.vfio); err != nil {
			return fmt.Errorf("--vfio: %w", err)
		}
	}
	if m.hugePages {
		if err := runner.CheckHugePages(); err != nil {
			return fmt.Errorf("--huge-pages: %w, or leave it out", err)
		}
	}
	if m.numaNode >= 0 {
		if _, err := os.Stat(fmt.Sprintf("/sys/devices/system/node/node%d", m.numaNode)); err != nil {
			if m.flags.Changed("numa-node") {
				online, _ := os.ReadFile("/sys/devices/system/node/online")
				return fmt.Errorf("--numa-node %d: this host has no such NUMA node (it has %q): name one of its own, or -1 for any",
					m.numaNode, strings.TrimSpace(string(online)))
			}
			m.numaNode = -1
		}
	}
	if m.cgroupVersion != 0 {
		mounts, err := os.ReadFile("/proc/self/mountinfo")
		if err == nil {
			err = cgroupUsable(string(mounts), m.cgroupVersion)
		}
		if err != nil {
			if m.flags.Changed("cgroup-version") {
				return fmt.Errorf("--cgroup-version %d: %w: use the other version, or 0 for none", m.cgroupVersion, err)
			}
			m.cgroupVersion = 0
		}
	}
	return nil
}

// maxID is the highest number of a user or group: the one above it stands for none (setresuid(2)).
const maxID = math.MaxUint32 - 1

// netnsDir is where network namespaces have their names (ip-netns(8)).
const netnsDir = "/run/netns"

// cgroupUsable says why this user cannot make control groups in the hierarchies of a version. Mountinfo is in the format of
// /proc/PID/mountinfo (proc_pid_mountinfo(5)): the mount point is the fifth field, the file system the first after " - ".
func cgroupUsable(mountinfo string, version int) error {
	fs := map[int]string{1: "cgroup", 2: "cgroup2"}[version]
	found := false
	for line := range strings.Lines(mountinfo) {
		left, right, _ := strings.Cut(line, " - ")
		l, r := strings.Fields(left), strings.Fields(right)
		if len(l) < 5 || len(r) < 3 || r[0] != fs || strings.Contains(r[2], "name=") {
			continue
		}
		found = true
		if err := unix.Access(l[4], unix.W_OK); err != nil {
			return fmt.Errorf("this user cannot make control groups in %q: %w", l[4], err)
		}
	}
	if !found {
		return errors.New("no control group hierarchy of that version is mounted on this host")
	}
	return nil
}

// noJailer as --jailer-bin is Firecracker without a jailer.
const noJailer = "none"

// backend chooses the hypervisor, and those that have what others have made. Only commands do: libraries are given them.
func (m *machineFlags) backend(cmd *cobra.Command) (vmm.Backend, []vmm.Backend, error) {
	qemu := qemu.New(qemu.Options{Binary: m.qemuBin})
	jailer := m.jailerBin
	if jailer == noJailer {
		jailer = ""
	} else if jailer == "" {
		var err error
		if jailer, err = exec.LookPath("jailer"); err != nil && m.fcBin != "" {
			jailer, _ = exec.LookPath(filepath.Join(filepath.Dir(m.fcBin), "jailer"))
		}
	}
	firecracker := firecracker.New(firecracker.Options{Binary: m.fcBin, Jailer: jailer})
	// What is another program is found out now, as later it would look like a package that does not fit this host.
	for flag, b := range map[string]vmm.Backend{"qemu-bin": qemu, "firecracker-bin": firecracker} {
		if !m.flags.Changed(flag) {
			continue
		}
		if _, err := b.Describe(cmd.Context(), vmm.Spec{MemorySize: 1 << 20}); err != nil {
			return nil, nil, interrupted(cmd, fmt.Errorf("--%s: %w", flag, err))
		}
	}
	switch m.hypervisor {
	case "auto":
		if m.fcBin != "" {
			return firecracker, []vmm.Backend{qemu}, nil
		}
		return qemu, []vmm.Backend{firecracker}, nil
	case "qemu":
		return qemu, nil, nil
	case "firecracker":
		return firecracker, nil, nil
	}
	return nil, nil, usageErrorf("--hypervisor %q: use auto, qemu or firecracker", m.hypervisor)
}

// host is where and how the machine runs. Console output goes to stdout.
func (m *machineFlags) host(cmd *cobra.Command) runner.Host {
	h := runner.Host{
		Dir: m.chrootBaseDir, Netns: m.netns, Interface: m.iface, Accel: m.accel, UID: m.uid, GID: m.gid, CgroupVersion: m.cgroupVersion,
		IOEngineSync: m.ioEngineSync, HugePages: m.hugePages, Passthrough: m.vfio, DiskLimit: vmm.Limit{Bytes: m.diskBandwidth, Requests: m.diskIOPS},
	}
	if m.numaNode >= 0 {
		h.NUMANode = &m.numaNode
	}
	if m.enableOutput {
		h.SerialOutput = cmd.OutOrStdout()
	}
	if m.enableInput {
		h.SerialInput = cmd.InOrStdin()
	}
	return h
}
