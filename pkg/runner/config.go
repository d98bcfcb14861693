package runner

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"time"

	"github.com/drafter-vm/drafter/pkg/agent"
	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/vmm"
)

// Names of the devices that are not disks. Any other name is a disk: "disk" is the root disk by custom, and the guest sees
// disks in the order they are configured in. An instance without MemoryDevice is never saved: it boots at each start, and is shut down by Close.
const (
	StateDevice  = "state"  // the hypervisor's device state, behind a Record
	MemoryDevice = "memory" // guest RAM
	KernelDevice = "kernel"
	InitrdDevice = "initrd"
	ConfigDevice = "config" // a Description
)

// IsDisk reports whether the device of that name is attached to the guest as a disk.
func IsDisk(name string) bool {
	switch name {
	case StateDevice, MemoryDevice, KernelDevice, InitrdDevice, ConfigDevice:
		return false
	}
	return true
}

// IsBootFile reports whether the device of that name is only read to boot: a guest that runs does without.
func IsBootFile(name string) bool { return name == KernelDevice || name == InitrdDevice }

// ByNeed compares the names of two devices of a guest that runs, as slices.SortStableFunc wants it: what it does without comes last.
func ByNeed(a, b string) int { return cmp.Compare(btoi(IsBootFile(a)), btoi(IsBootFile(b))) }

// Description is the content of a config device: the machine as the guest sees it, and the ports on which the host expects
// its services.
type Description struct {
	vmm.Spec
	AgentVSockPort uint32 `json:"agentVSockPort,omitempty"` // 0: the guest has no agent
	// MoreAgents are the ports of further agents in the guest, which are told of the same.
	MoreAgents        []uint32 `json:"moreAgentVSockPorts,omitempty"`
	LivenessVSockPort uint32   `json:"livenessVSockPort,omitempty"` // 0: the guest does not say when it is up
	AgentHook         bool     `json:"agentHook,omitempty"`         // of an instance that runs: its agent has a hook for the resume
}

// maxAgents bounds how many agents a guest may have.
const maxAgents = 16

// agentPorts are the ports of all agents.
func (d Description) agentPorts() []uint32 {
	if d.AgentVSockPort == 0 && len(d.MoreAgents) == 0 {
		return nil
	}
	return append([]uint32{d.AgentVSockPort}, d.MoreAgents...)
}

// CheckPorts reports the first thing that is wrong with the ports of the guest's services.
func (d Description) CheckPorts() error {
	taken := make(map[uint32]string)
	if d.LivenessVSockPort != 0 {
		taken[d.LivenessVSockPort] = "the guest's liveness"
	}
	ports := d.agentPorts()
	if len(ports) > maxAgents {
		return fmt.Errorf("%d agents: a guest has at most %d", len(ports), maxAgents)
	}
	for _, port := range ports {
		if port == 0 {
			return errors.New("port 0 means that there is no agent: leave it out among others")
		}
		if by, ok := taken[port]; ok {
			return fmt.Errorf("port %d is for %s and for an agent: each needs a port of its own", port, by)
		}
		taken[port] = "another agent"
	}
	return nil
}

// maxDescription bounds a config device, in bytes.
const maxDescription = 1 << 20

// ReadDescription reads a config device.
func ReadDescription(dev block.Device) (Description, error) {
	if dev.Size() > maxDescription {
		return Description{}, fmt.Errorf("config device has %d bytes, more than %d: it is not one of ours", dev.Size(), maxDescription)
	}
	b := make([]byte, dev.Size())
	if _, err := dev.ReadAt(b, 0); err != nil && err != io.EOF {
		return Description{}, fmt.Errorf("read config device: %w", err)
	}
	return ParseDescription(b)
}

// ParseDescription decodes the bytes of a config device: JSON, padded at the end.
func ParseDescription(b []byte) (Description, error) {
	var d Description
	if err := json.Unmarshal(bytes.TrimRight(b, "\x00 \n"), &d); err != nil {
		return Description{}, fmt.Errorf("decode config device: %w", err)
	}
	switch {
	case d.Hypervisor == "":
		return Description{}, fmt.Errorf("decode config device: it names no hypervisor, so it was not made by drafter")
	case d.MemorySize <= 0 || d.MemorySize%(1<<20) != 0:
		return Description{}, fmt.Errorf("decode config device: memory size %d is not a multiple of 1 MiB", d.MemorySize)
	case d.CPUCount <= 0:
		return Description{}, fmt.Errorf("decode config device: CPU count %d", d.CPUCount)
	}
	if err := d.CheckPorts(); err != nil {
		return Description{}, fmt.Errorf("decode config device: %w", err)
	}
	return d, nil
}

// Encode returns the bytes of a config device that holds d: indented JSON, padded with newlines to whole pages so that the
// device can be mapped and moved like any other.
func (d Description) Encode() ([]byte, error) {
	b, err := json.MarshalIndent(d, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("encode config device: %w", err)
	}
	pad := block.PageSize - len(b)%block.PageSize
	return append(b, bytes.Repeat([]byte{'\n'}, pad)...), nil
}

// DeviceConfig is where a device of an instance lives on this host.
type DeviceConfig struct {
	Name string // one of the names of devices, or that of a disk

	// Base is the file that the device starts from. With an overlay it is only read. Without one it is the device: disks
	// are written in place, memory and state are replaced when the instance is closed.
	Base string

	// Beneath are overlays between the base and the Overlay, the oldest first: what an instance has left that was closed, and that
	// this one, and others, go on from. They are only read, and may be shared as the base may.
	Beneath []Layer

	// Overlay and State are the copy-on-write overlay of the base and the file that says which blocks it holds. Both are
	// set or none is; they are created when both are absent.
	Overlay, State string

	// Shared is of a disk that others have, too, and that nobody writes: its machine was made with it read-only. It has no overlay, and is only
	// read here, with what that means to who would write the file (see LockFile).
	Shared bool

	// BlockSize is the overlay's granularity in bytes: a power of two, at least 4096. Zero means 64 KiB.
	BlockSize int64
}

// Layer is an overlay that a device goes on from.
type Layer struct {
	Overlay, State string // as those of DeviceConfig
}

// Host is where and how an instance's machine runs on this host. The zero value runs it in our network namespace as our
// user, in no cgroup, on any CPU.
type Host struct {
	// Dir is where the folders of running machines are made, each as Dir/HYPERVISOR/ID/root. Default: "out/vms".
	Dir string

	// Netns and Interface name the tap device that the guest's network interface is connected to. Interface empty means
	// "tap0"; both are ignored when the machine has no network interface.
	Netns, Interface string

	// Accel is what the machine must run under: "kvm", "tcg", or "auto" and empty for whatever it was made under.
	Accel string

	UID, GID      int    // user of the VMM; 0: ours
	NUMANode      *int   // nil: any
	CgroupVersion int    // 1 or 2; 0: none
	Binary        string // of the hypervisor; empty: from PATH
	IOEngineSync  bool   // each request of a disk is finished before the next is begun

	HugePages bool // the guest's memory is put into huge pages, once all of it is here; see CheckHugePages

	DiskLimit vmm.Limit // of each disk, for machines that are started; one that is adopted has its own

	// Passthrough are PCI devices of this host that the guest gets, by their addresses; see package vfio. An instance with any boots, and shuts down:
	// it has no device of memory.
	Passthrough []string

	SerialOutput io.Writer // what the guest's console prints; nil: discarded
	SerialInput  io.Reader // nil: none
}

// Hooks are called by an instance as it goes through its life. Each may be nil. They are called by the goroutine that works
// on the instance, so they must not call the instance.
type Hooks struct {
	// Made is called when the instance's VMPath is there and its guest is not let run yet, or again after an adoption: what listens
	// there (socket.ListenHost, service.ListenHost) is found by the guest at once. The start fails with its error. It is called for
	// a received instance, too, which may never come to run.
	Made func(vmPath string) error

	BeforeSuspend func()                                           // the guest is about to be told that it will be suspended
	Suspended     func()                                           // all vCPUs have stopped
	Resumed       func()                                           // the vCPUs run (again)
	AfterResume   func()                                           // the agent has finished its work after a resume
	Flushed       func(disk string, took time.Duration, err error) // a disk was made durable, as the guest had asked; by any goroutine
	Closed        func()                                           // the machine and its VMPath are gone from here, or left to the next owner; only after Made
}

// Config is an instance on this host.
type Config struct {
	// Devices are the instance's devices; the disks among them in the order the guest sees them.
	Devices []DeviceConfig

	// Backend runs the machine, unless the instance was made by the hypervisor of one of the Others: then that one does, and
	// Backend is it from then on.
	Backend vmm.Backend
	Others  []vmm.Backend

	Host  Host  // where machines run on this host
	Hooks Hooks // called on the way; nil ones are left out

	// ForceOwner lets Resume take back an instance that was given to another peer which never confirmed that it runs it.
	// Only whoever knows that the other peer will never run it may set it: otherwise there are two.
	ForceOwner bool

	// Clone tells the guest's agents, when Resume has resumed it, or Receive has received it from a package, that other VMs run from the same state, or may: they give the guest another
	// machine-id(5), and hooks of theirs change what else must be unique. Without it they hear that the guest goes on. The guest's random number
	// generator is seeded anew in either case.
	Clone bool

	// HostName is what the guest's agents call the guest from then on. Empty: as before.
	HostName string

	// Network is what the guest's agents make a network interface of the guest, when Resume has resumed it: for clones that are to differ in that.
	Network agent.Network

	// Environment is what the guest's agents give its containers from then on, "NAME=VALUE" or "CONTAINER:NAME=VALUE": see agent.Identity. It is an error where no
	// agent can. Empty: as before.
	Environment []string

	// MemoryOnDemand has Resume bring no more of the memory than the guest touches, and what is around that, until the instance is sent: for many
	// that run from one package, of which each takes the memory that it uses. Otherwise all of it is brought, in the background. What
	// was never brought is not written when the instance is saved.
	MemoryOnDemand bool

	// RecordWorkingSet has Resume record which pages of the memory the guest touches, from its start until that long after its agent has answered, in a hidden
	// file beside the base of the memory (.NAME.workingset): any later start from that base brings these first. Nothing else is brought while it
	// records. 0: it does not.
	RecordWorkingSet time.Duration

	// KeepCommitPoint has the instance keep what it takes to return to what it is when it begins to run here: by Resume, or after
	// Prepare when all of it has arrived. Disks are written to layers then, which are folded in when the instance is saved.
	// Memory that is received is written to its device as it comes, too. Boot knows no commit point.
	KeepCommitPoint bool

	// Rollback has Resume return an instance that died while it ran to its commit point, and discard what was written to its
	// disks since: see [Instance.RolledBack]. A living instance is refused, as is one that is not ours. One that is saved is
	// resumed as it is.
	Rollback bool

	// OnLate is called by Adopt and Boot for an instance that was received by a migration whose source may still have
	// something to do with it: to bring what has not arrived, or to learn that nothing is missing. It comes before anything
	// waits for what is missing that the call itself waits for. It must see to it that [Instance.Ask] is called and the
	// devices are filled, must not wait for that, and may call no other method of the instance. Nil: then Boot refuses an instance
	// whose disks lack something, and whoever waits for something after Adopt waits for ever.
	OnLate func(i *Instance, migration string, devices []Arriving)

	// OnRun is told of the instance as soon as its guest runs here, for the first time: Resume, Boot and Adopt may return long after
	// that, when an agent has answered or what is missing has come. It must not wait, and may call only those of its methods that
	// answer at once: see [Instance]. The start may fail still. Nil is allowed.
	OnRun func(*Instance)

	// Anew makes the start end a living machine that it finds of this instance, where it would adopt it otherwise: for
	// instances that are made, not kept.
	Anew bool

	// BootUnattended makes Boot succeed, with a warning, when the guest's liveness or agent do not answer: for a guest
	// that is to be repaired.
	BootUnattended bool

	// ResumeTimeout bounds the wait for the guest's agent, per call. Default: one minute.
	ResumeTimeout time.Duration
	// RescueTimeout bounds what the guest's agent may take when the instance is closed, and each step of the machine then.
	// Default: one minute.
	RescueTimeout time.Duration

	// Logger receives events; nil means slog.Default().
	Logger *slog.Logger
}

// backends are all that may have machines of ours.
func (c Config) backends() []vmm.Backend {
	if c.Backend == nil {
		return c.Others
	}
	return append([]vmm.Backend{c.Backend}, c.Others...)
}

// named is the one of that name, nil if there is none.
func named(backends []vmm.Backend, hypervisor string) vmm.Backend {
	for _, b := range backends {
		if b.Name() == hypervisor {
			return b
		}
	}
	return nil
}

func (c Config) withDefaults() Config {
	if c.Host.Dir == "" {
		c.Host.Dir = "out/vms"
	}
	if c.Host.Interface == "" {
		c.Host.Interface = "tap0"
	}
	if c.ResumeTimeout == 0 {
		c.ResumeTimeout = time.Minute
	}
	if c.RescueTimeout == 0 {
		c.RescueTimeout = time.Minute
	}
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	return c
}
