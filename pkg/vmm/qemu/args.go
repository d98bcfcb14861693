package qemu

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/drafter-vm/drafter/pkg/vmm"
)

// channelPort is the name the guest knows the guest channel's port by.
const channelPort = "org.drafter.vsock"

// reconnectDelay is how long, in seconds, a disk waits for its NBD server to come back before the guest sees errors:
// the time a crashed owner has to be started again. A guest that waits loses nothing, and one that is told of errors all
// that it had in mind to write: so it is a year. (QEMU takes up to 2³²−1.)
const reconnectDelay = 365 * 24 * 60 * 60

// inherited collects the descriptors a process is to inherit. The first gets number 3.
type inherited struct{ files []*os.File }

// add returns the number that f will have in the process. It takes f over.
func (i *inherited) add(f *os.File) int {
	i.files = append(i.files, f)
	return 2 + len(i.files)
}

func (i *inherited) close() {
	for _, f := range i.files {
		f.Close()
	}
	i.files = nil
}

// descriptors are the numbers, in the process, of what QEMU inherits; 0: not there.
type descriptors struct{ memory, qmp, serial, channel, tap int }

// object is an option in JSON syntax, in which values need no escaping.
type object map[string]any

func (o object) String() string {
	text, err := json.Marshal(o)
	if err != nil {
		panic(fmt.Sprintf("marshal option %v: %v", map[string]any(o), err)) // strings, numbers and maps of them always marshal
	}
	return string(text)
}

// arguments returns QEMU's command line, without the program's name. cfg has been checked.
//
// What the guest sees depends on cfg.Spec alone, and the order of -device fixes the PCI addresses: a change here is a
// change of the machine, which breaks saved ones.
func arguments(cfg vmm.Config, caps *capabilities, fd descriptors) []string {
	spec := cfg.Spec
	var args []string
	add := func(words ...string) { args = append(args, words...) }
	device := func(o object) { add("-device", o.String()) }
	// Modern virtio only: no I/O ports, and no question which of the two a driver chose.
	virtio := func(driver, id string, more object) {
		o := object{"driver": driver, "id": id, "disable-legacy": "on"}
		for k, v := range more {
			o[k] = v
		}
		device(o)
	}

	add("-nodefaults", "-no-user-config", "-display", "none")
	add(confinement(cfg, caps)...)
	add("-M", spec.MachineType+",sata=off,smbus=off,usb=off,vmport=off,hpet=off,memory-backend=mem")
	if spec.Accel == "kvm" {
		add("-accel", "kvm")
	} else {
		add("-accel", "tcg,thread=multi")
	}
	add("-cpu", spec.CPUModel)
	add("-smp", fmt.Sprintf("cpus=%d,maxcpus=%d", spec.CPUCount, spec.CPUCount))
	add("-m", fmt.Sprintf("%dM", spec.MemorySize>>20))
	mem := object{"qom-type": "memory-backend-file", "id": "mem", "size": spec.MemorySize,
		"mem-path": fmt.Sprintf("/proc/self/fd/%d", fd.memory), "share": true}
	if cfg.NUMANode >= 0 {
		mem["host-nodes"], mem["policy"] = []int{cfg.NUMANode}, "bind"
	}
	add("-object", mem.String())
	// A reboot ends QEMU: vmm.ErrReboot.
	add("-action", "reboot=shutdown,shutdown=poweroff")
	// No sleep states: a guest that sleeps looks like one that somebody stopped.
	add("-global", "ICH9-LPC.disable_s3=1", "-global", "ICH9-LPC.disable_s4=1")
	// The guest starts by cont, when everything that must see its first sign of life is connected.
	add("-S")

	add("-bios", "qboot.rom")
	if cfg.Boot != nil {
		add("-kernel", cfg.Boot.Kernel)
		if cfg.Boot.Initrd != "" {
			add("-initrd", cfg.Boot.Initrd)
		}
		add("-append", bootArgs(spec))
	} else {
		add("-incoming", "defer")
	}

	socket := func(id string, fd int) { add("-chardev", fmt.Sprintf("socket,id=%s,fd=%d,server=on,wait=off", id, fd)) }
	socket("qmp", fd.qmp)
	add("-mon", "chardev=qmp,mode=control")
	socket("serial", fd.serial)
	add("-serial", "chardev:serial")

	// The disks have no iothread, although with one a missing page of RAM that disk I/O waits for would not keep QMP
	// waiting: with QEMU 10.0 under TCG a stop in the middle of disk I/O then loses the interrupt of a finished request
	// in one of about 30 cases, and the guest's disk hangs, there and wherever the saved machine is loaded. The test
	// vmmtest Cycles shows it.
	for i, d := range spec.Disks {
		host := blockdev(cfg, i)
		if limit := cfg.DiskLimit; limit != (vmm.Limit{}) {
			group := fmt.Sprintf("limit%d", i)
			host["node-name"] = fmt.Sprintf("unlimited%d", i)
			add("-object", object{"qom-type": "throttle-group", "id": group, "limits": object{"bps-total": limit.Bytes, "iops-total": limit.Requests}}.String())
			add("-blockdev", host.String())
			host = object{"driver": "throttle", "node-name": blockNode(i), "throttle-group": group, "file": host["node-name"], "read-only": d.ReadOnly, "discard": "unmap"}
		}
		add("-blockdev", host.String())
		virtio("virtio-blk-pci", fmt.Sprintf("disk%d", i), object{"drive": blockNode(i), "serial": d.Name,
			"write-cache": "on", "werror": "report", "rerror": "report"})
	}
	if spec.MAC != "" {
		add("-netdev", object{"type": "tap", "id": "net", "fd": fmt.Sprint(fd.tap), "vhost": false}.String())
		// No boot ROM, and no offloads that depend on the host's kernel version.
		nic := object{"netdev": "net", "mac": spec.MAC, "romfile": "", "guest_ufo": false, "host_ufo": false}
		if caps.atLeast(8, 2) {
			nic["guest_uso4"], nic["guest_uso6"], nic["host_uso"] = false, false, false
		}
		virtio("virtio-net-pci", "nic", nic)
	}
	if spec.Sockets {
		socket("channel", fd.channel)
		virtio("virtio-serial-pci", "serialbus", object{"max_ports": 2})
		device(object{"driver": "virtserialport", "id": "channelport", "bus": "serialbus.0", "chardev": "channel", "name": channelPort})
	}
	add("-object", object{"qom-type": "rng-builtin", "id": "entropy"}.String())
	virtio("virtio-rng-pci", "rng", object{"rng": "entropy"})
	virtio("virtio-balloon-pci", "balloon", object{"deflate-on-oom": true})
	for i, address := range cfg.Passthrough {
		device(object{"driver": "vfio-pci", "id": fmt.Sprintf("host%d", i), "host": address})
	}
	return args
}

// confinement returns the options for the sandbox, the root directory and the user.
func confinement(cfg vmm.Config, caps *capabilities) []string {
	sandbox := "on,obsolete=deny,spawn=deny,resourcecontrol=deny"
	if !switchesUser(cfg) {
		// With it QEMU could not switch to the user. It has no privileges left after that, and no_new_privs is set
		// either way.
		sandbox += ",elevateprivileges=deny"
	}
	args := []string{"-sandbox", sandbox}
	root, user := canConfine(), fmt.Sprintf("%d:%d", cfg.UID, cfg.GID)
	var runWith []string
	if root {
		// -chroot and -runas became parts of -run-with in 8.1 and 9.1.
		if caps.atLeast(8, 1) {
			runWith = append(runWith, "chroot=.")
		} else {
			args = append(args, "-chroot", ".")
		}
	}
	if switchesUser(cfg) {
		if caps.atLeast(9, 1) {
			runWith = append(runWith, "user="+user)
		} else {
			args = append(args, "-runas", user)
		}
	}
	if len(runWith) > 0 {
		args = append(args, "-run-with", strings.Join(runWith, ","))
	}
	return args
}

// canConfine reports whether we may change the root directory and the user of a process.
func canConfine() bool { return os.Geteuid() == 0 }

// switchesUser reports whether QEMU has to become somebody else.
func switchesUser(cfg vmm.Config) bool {
	return canConfine() && (cfg.UID != 0 || cfg.GID != 0)
}

// bootArgs completes the kernel's command line by what our machine needs and the description leaves open.
func bootArgs(spec vmm.Spec) string {
	args := strings.Fields(spec.BootArgs)
	has := func(prefix string) bool {
		for _, arg := range args {
			if strings.HasPrefix(arg, prefix) {
				return true
			}
		}
		return false
	}
	if !has("console=") {
		args = append(args, "console=ttyS0")
	}
	if !has("panic=") {
		args = append(args, "panic=-1") // reboot at once: the owner hears of it
	}
	if spec.Accel == "tcg" {
		// An emulated CPU that shares its core fails the kernel's tests of clock and timer now and then, or measures a
		// counter that is the host's as twenty times too slow, and believes it.
		if !has("tsc=") {
			args = append(args, "tsc=reliable")
		}
		if rate := tscRate(); rate > 0 && !has("tsc_early_khz=") {
			args = append(args, fmt.Sprintf("tsc_early_khz=%d", rate))
		}
		if !has("no_timer_check") {
			args = append(args, "no_timer_check")
		}
	}
	return strings.Join(args, " ")
}

// blockNode is what QEMU calls disk i.
func blockNode(i int) string { return fmt.Sprintf("block%d", i) }

// blockdev returns the host's end of disk i. Caching is the owner's job: direct, except where a file cannot.
func blockdev(cfg vmm.Config, i int) object {
	d, at := cfg.Spec.Disks[i], cfg.Disks[i]
	o := object{"node-name": blockNode(i), "read-only": d.ReadOnly, "discard": "unmap"}
	if at.Socket != "" {
		// Relative: the same name before and after the change of the root directory.
		rel, _ := filepath.Rel(cfg.Dir, at.Socket)
		o["driver"] = "nbd"
		o["server"] = object{"type": "unix", "path": rel}
		o["export"] = d.Name
		o["reconnect-delay"] = reconnectDelay
		o["cache"] = object{"direct": true}
		return o
	}
	o["driver"] = "file"
	if info, err := os.Stat(at.Path); err == nil && info.Mode()&os.ModeDevice != 0 {
		o["driver"] = "host_device"
	}
	o["filename"] = at.Path
	direct := takesDirectIO(at.Path, d.ReadOnly)
	o["cache"] = object{"direct": direct}
	o["aio"] = "threads"
	if direct && !cfg.IOEngineSync {
		o["aio"] = "native" // needs direct I/O
	}
	return o
}

// fuseMagic is FUSE_SUPER_MAGIC of linux/magic.h.
const fuseMagic = 0x65735546

// takesDirectIO reports whether a file can be opened with O_DIRECT. A file on FUSE is believed to, and not opened: it
// may be served by this very process, which must not hold a file of its own mount.
func takesDirectIO(path string, readOnly bool) bool {
	var fs unix.Statfs_t
	if unix.Statfs(path, &fs) == nil && fs.Type == fuseMagic {
		return true
	}
	flags := unix.O_RDWR
	if readOnly {
		flags = unix.O_RDONLY
	}
	fd, err := unix.Open(path, flags|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	unix.Close(fd)
	return true
}
