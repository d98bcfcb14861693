package main

import (
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/drafter-vm/drafter/pkg/runner"
	"github.com/drafter-vm/drafter/pkg/vmm"
	"github.com/drafter-vm/drafter/pkg/vmm/qemu"
)

// machineFlags are the flags of every tool that runs a machine: on what, as whom, and where.
type machineFlags struct {
	hypervisor    string
	accel         string
	qemuBin       string
	chrootBaseDir string
	uid, gid      int
	netns         string
	numaNode      int
	cgroupVersion int
	enableOutput  bool
	enableInput   bool
	resumeTimeout time.Duration
}

func (m *machineFlags) register(flags *pflag.FlagSet) {
	flags.StringVar(&m.hypervisor, "hypervisor", "auto", "hypervisor: auto or qemu")
	flags.StringVar(&m.accel, "accel", "auto", "acceleration: kvm, tcg (emulation, works everywhere), or auto: kvm where the CPU has vmx or svm")
	flags.StringVar(&m.qemuBin, "qemu-bin", "", "QEMU program (default: qemu-system-x86_64 from PATH)")
	flags.StringVar(&m.chrootBaseDir, "chroot-base-dir", "out/vms", "folder in which running machines have theirs (VMPath)")
	flags.IntVar(&m.uid, "uid", 0, "user id to run the hypervisor as")
	flags.IntVar(&m.gid, "gid", 0, "group id to run the hypervisor as")
	flags.StringVar(&m.netns, "netns", "ark0", "network namespace with the tap interface (empty: the one this runs in)")
	flags.IntVar(&m.numaNode, "numa-node", 0, "NUMA node for the machine's CPUs and memory (-1: any)")
	flags.IntVar(&m.cgroupVersion, "cgroup-version", 2, "hierarchy in which the machine gets a control group of its own: 1 or 2 (0: none)")
	flags.BoolVar(&m.enableOutput, "enable-output", true, "print the guest's console on stdout")
	flags.BoolVar(&m.enableInput, "enable-input", false, "pass stdin to the guest's console")
	flags.DurationVar(&m.resumeTimeout, "resume-timeout", time.Minute, "how long to wait for the guest's agent and liveness")
}

// check refuses values that no machine could have, before anything is begun.
func (m *machineFlags) check() error {
	switch {
	case m.uid < 0:
		return usageErrorf("--uid %d is negative", m.uid)
	case m.gid < 0:
		return usageErrorf("--gid %d is negative", m.gid)
	case m.numaNode < -1:
		return usageErrorf("--numa-node %d: give the number of a node, or -1 for any", m.numaNode)
	case m.cgroupVersion < 0 || m.cgroupVersion > 2:
		return usageErrorf("--cgroup-version %d: use 1 or 2, or 0 for none", m.cgroupVersion)
	case m.resumeTimeout <= 0:
		return usageErrorf("--resume-timeout %s: give a time above zero", m.resumeTimeout)
	case m.chrootBaseDir == "":
		return usageErrorf("--chroot-base-dir is empty: give a folder")
	case m.accel != "auto" && m.accel != "kvm" && m.accel != "tcg":
		return usageErrorf("--accel %q: use auto, kvm or tcg", m.accel)
	}
	if m.netns != "" {
		if _, err := os.Stat("/run/netns/" + m.netns); err != nil {
			return fmt.Errorf("--netns %q: there is no such network namespace: make it, or name another (empty: this one)", m.netns)
		}
	}
	return nil
}

// backend chooses the hypervisor. Only commands do: libraries are given one.
func (m *machineFlags) backend() (vmm.Backend, error) {
	switch m.hypervisor {
	case "auto", "qemu":
		return qemu.New(qemu.Options{Binary: m.qemuBin}), nil
	}
	return nil, usageErrorf("--hypervisor %q: use auto or qemu", m.hypervisor)
}

// host is where and how the machine runs. Console output goes to stdout.
func (m *machineFlags) host(cmd *cobra.Command) runner.Host {
	h := runner.Host{
		Dir: m.chrootBaseDir, Netns: m.netns, UID: m.uid, GID: m.gid, CgroupVersion: m.cgroupVersion, Binary: m.qemuBin,
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
