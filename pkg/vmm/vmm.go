package vmm

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"os"
	"os/exec"
)

// Backend starts machines of one hypervisor. It is safe for concurrent use and holds no state of its own.
type Backend interface {
	// Name is the name users choose the backend by: "qemu", "firecracker".
	Name() string

	// Describe completes a description with what this host's hypervisor is and would offer a guest: Hypervisor,
	// Version, MachineType, Accel, CPUModel and CPUFeatures. It starts no machine. It fails when the hypervisor is
	// missing, or when a field that was set cannot be honoured here, naming the field.
	Describe(ctx context.Context, spec Spec) (Spec, error)

	// Compatible reports, as an error that names the first field that differs, why a machine saved with the
	// description saved cannot be restored by this backend on this host.
	Compatible(ctx context.Context, saved Spec) error

	// Start starts a VMM process. With cfg.Boot set, the guest is loaded and runs when Start returns; without it, the
	// machine waits, paused and without device state, for Load. When Start fails nothing of the machine is left.
	// Cancelling ctx ends the start, not a machine that has started.
	Start(ctx context.Context, cfg Config) (Machine, error)
}

// Machine is one VMM process with one virtual machine, driven by us.
//
//	Start(Boot) ──────────────► running ⇄ paused ── Save ──► paused
//	Start(no Boot) ─ waiting ─ Load ─► paused
//	any ── Close, or the process ends ──► closed
//
// One goroutine at a time may call the methods that change the state (Pause, Resume, Save, Load); PID, Done, Err and
// Close may be called at any time by anyone. A method that is illegal in the present state fails with [ErrState].
type Machine interface {
	// PID is the process id of the VMM in our pid namespace.
	PID() int

	// Pause stops all vCPUs. When it returns, no vCPU runs, guest disk I/O has been completed and flushed to the
	// devices, and the guest's RAM no longer changes.
	Pause(ctx context.Context) error

	// Resume lets the vCPUs run again after Pause, Save (then the machine goes on as if Save had not been) or Load.
	Resume(ctx context.Context) error

	// Save writes the device state of a paused machine, without its RAM and disks, to w.
	Save(ctx context.Context, w io.Writer) error

	// Load restores device state written by Save into a waiting machine. The disks and RAM the machine was started
	// with must by then hold, or be able to deliver lazily, what they held at Save.
	Load(ctx context.Context, r io.Reader) error

	// Done is closed when the VMM process has ended and been reaped. Err says why then: nil when the guest shut down
	// or Close was called, [ErrReboot] when the guest asked for a reboot, otherwise what is known of the failure.
	Done() <-chan struct{}
	Err() error

	// Close ends the VMM at once, as a power cut would, waits for it, and removes what it left in its folder. It is
	// idempotent.
	Close() error
}

// Adopter is implemented by backends whose machines outlive the process that started them.
type Adopter interface {
	// Adopt takes over the living machine whose sockets are in cfg.Dir.
	Adopt(ctx context.Context, cfg Config) (Machine, error)
}

// State is where a machine is in its life, as far as its owner needs to know.
type State int

const (
	StateBroken  State = iota // in none of the others: only Close is left
	StateWaiting              // for Load; the guest has never run
	StateRunning              // the vCPUs run
	StatePaused               // vCPUs stopped
	StateClosed               // the process has ended
)

func (s State) String() string {
	return [...]string{"broken", "waiting", "running", "paused", "closed"}[s]
}

// Stater is implemented by machines that can be adopted, whose new owner must find out what the former one did last.
type Stater interface {
	// State may be called at any time by anyone.
	State() State
}

// Measurer is implemented by machines whose VMM counts what it does.
type Measurer interface {
	// Metrics are sums by the VMM's own names of them, since it was started, or adopted. It may be called at any time by anyone, and does
	// not wait.
	Metrics() map[string]float64
}

// Reaper is implemented by backends whose machines have things outside of their folder.
type Reaper interface {
	// Reap removes what a machine has left whose process has ended without an owner to clean up after it. Of cfg it needs
	// what says where those things are: Dir, CgroupVersion and CgroupName.
	Reap(cfg Config) error
}

// Ender is implemented by backends whose machines cannot end while they wait for a disk that nobody serves any more.
type Ender interface {
	// Ending reports whether the process of the machine in cfg.Dir has been killed, and has not ended yet.
	Ending(cfg Config) bool
}

// PowerButton is implemented by machines whose guest can be asked to shut down.
type PowerButton interface {
	// PressPower presses the power button of a running machine. It does not wait for what the guest makes of it, which may be nothing: one that
	// shuts down ends the machine (Done).
	PressPower(ctx context.Context) error
}

// Ballooner is implemented by machines whose guest can be asked to give memory back. What it has given is part of the device state: a
// guest goes on having given it wherever it is loaded. A guest without the driver gives nothing: where the VMM can tell, both methods
// fail with [ErrNoBalloon].
type Ballooner interface {
	// SetBalloon asks a running guest to have given so many bytes of its RAM in all, rounded down to a MiB; 0 gives back everything to it. It does not
	// wait for the guest, which may take its time, and one that needs its memory gives less or takes it back.
	SetBalloon(ctx context.Context, size int64) error

	// Balloon returns how many bytes a running guest has given.
	Balloon(ctx context.Context) (int64, error)
}

// Announcer is implemented by machines that can have the network send their guest's packets here before the guest runs
// here. A guest that is paused at its old place gets nothing there: packets are lost, which costs their senders a timeout
// of 200 ms or more. Here they wait for Resume, as many as the interface's queue holds.
type Announcer interface {
	// Announce is for a machine that waits for Load, once its guest is paused elsewhere; it counts as one of the methods
	// that change the state. Packets that came before are discarded: the guest got them there. Should the guest go on
	// there after all, the Resume of that machine announces it again.
	Announce() error
}

var (
	// ErrState is returned when a method is called in a state that does not allow it.
	ErrState = errors.New("machine is not in the right state")
	// ErrNoBalloon is wrapped by errors of a Ballooner that has no balloon, or whose guest has no driver for it, or not yet.
	ErrNoBalloon = errors.New("there is no balloon, or the guest has no driver for it, or not yet")
	// ErrReboot is what Machine.Err returns after a guest asked for a reboot, which ends the VMM: device state lives in
	// the instance, not in the process, and the owner decides whether to boot anew.
	ErrReboot = errors.New("guest rebooted")
)

// Spec is what the guest can see of its machine, and what must therefore be the same wherever it resumes. It is the
// content of a package's config device, as JSON, and travels in a migration. Paths and host resources are not in it.
type Spec struct {
	Hypervisor  string   `json:"hypervisor"`            // "qemu", "firecracker"
	Version     string   `json:"version"`               // of the hypervisor, "10.0.2"
	MachineType string   `json:"machineType,omitempty"` // versioned: "pc-q35-10.0"
	Accel       string   `json:"accel"`                 // "kvm" or "tcg" once described; "auto" (or empty) before
	CPUCount    int      `json:"cpuCount"`              // virtual CPUs, at least 1
	CPUModel    string   `json:"cpuModel,omitempty"`    // from --cpu-template; empty: the backend's default
	CPUTemplate string   `json:"cpuTemplate,omitempty"` // a template of one's own, as JSON, instead of CPUModel; Firecracker's alone
	CPUFeatures []string `json:"cpuFeatures,omitempty"` // what the guest may use, and a host or its VMM must have
	MemorySize  int64    `json:"memorySize"`            // bytes, a multiple of 1 MiB
	Disks       []Disk   `json:"disks"`                 // in the order the guest sees them
	MAC         string   `json:"mac,omitempty"`         // empty: no network interface
	Sockets     bool     `json:"sockets"`               // has a guest channel (vsock)
	BootArgs    string   `json:"bootArgs,omitempty"`    // the kernel's command line
}

// Disk is a disk as the guest sees it.
type Disk struct {
	Name     string `json:"name"`               // device name; the disk's serial number in the guest
	Size     int64  `json:"size"`               // bytes, a multiple of 512
	ReadOnly bool   `json:"readOnly,omitempty"` // the guest cannot write
}

// Config is one machine on this host.
type Config struct {
	Spec Spec // completed by Backend.Describe

	// Dir is the machine's folder ("VMPath"), which must exist with mode 0700: sockets to and from the VMM, and nothing
	// that has to survive it. It must be short enough for unix sockets (90 bytes).
	Dir string

	// Memory is the guest's RAM: a memfd of Spec.MemorySize bytes, mapped shared by the VMM.
	Memory *os.File

	// Boot is what to boot. Nil starts a machine that waits for Load.
	Boot *Boot

	// Disks says where each of Spec.Disks is attached, in the same order.
	Disks []Attachment

	// Netns and Interface name the tap device to attach: an interface that exists in that network namespace
	// (/run/netns/NAME; empty: ours). Ignored when Spec.MAC is empty.
	Netns, Interface string

	// Passthrough are PCI devices of the host that the guest gets, by their addresses as package vfio has them. A machine with any is booted, and
	// neither saved nor loaded. A backend that has none of this refuses them.
	Passthrough []string

	// SerialOutput receives what the guest writes on its console; nil discards it. SerialInput is what it reads; nil is
	// none. Neither is closed.
	SerialOutput io.Writer
	SerialInput  io.Reader

	// DiskLimit bounds each of the disks.
	DiskLimit Limit

	// IOEngineSync makes the VMM use a synchronous disk engine rather than an asynchronous one.
	IOEngineSync bool

	// UID and GID run the VMM as this user when not 0. NUMANode binds its CPUs and RAM to this node when ≥ 0 (-1 leaves
	// them free). CgroupVersion (1 or 2; 0: none) puts it in a cgroup of its own named after CgroupName.
	UID, GID      int
	NUMANode      int
	CgroupVersion int
	CgroupName    string

	// Binary overrides where the hypervisor's program is looked for (default: PATH).
	Binary string

	// Spawn starts the prepared VMM process instead of cmd.Start, if set: the hook by which the owner of the RAM plants
	// what it needs in the process before its first instruction. It must have cmd started when it returns nil.
	Spawn func(cmd *exec.Cmd) error

	// Graft runs do, in which the VMM allocates its guest's RAM, and sees to it that what it gets is Memory, which Spawn has prepared
	// ([Requirements]). An error of do is returned as it is.
	Graft func(do func() error) error

	// Logger receives events; nil means slog.Default().
	Logger *slog.Logger
}

// Requirements are what a backend needs of a machine's owner that others do not, and what it does itself.
type Requirements struct {
	Graft   bool // the VMM allocates RAM by itself: Config.Spawn and Config.Graft are needed
	Paths   bool // disks are attached by their paths, not by sockets
	Carries bool // the VMM serves SocketFile itself: there is no GuestChannel
	Reboots bool // only a guest that reboots ends the VMM; one that powers off stays
	Wrapped bool // Config.Spawn is given a program that confines the VMM and executes it, and closes what it has inherited before
}

// Demanding is implemented by backends that have requirements.
type Demanding interface {
	// Requirements are the same for all machines of the backend.
	Requirements() Requirements
}

// RequirementsOf are those of a backend.
func RequirementsOf(b Backend) Requirements {
	if d, ok := b.(Demanding); ok {
		return d.Requirements()
	}
	return Requirements{}
}

// Limit bounds what the guest may do with a disk, reads and writes together. The zero value of a field is no limit.
type Limit struct {
	Bytes    int64 // per second
	Requests int64 // per second
}

// Boot is what a machine boots.
type Boot struct {
	Kernel string // path of an ELF vmlinux
	Initrd string // path; empty: none
}

// Attachment is the host's end of a disk. Exactly one of Socket and Path is set.
type Attachment struct {
	Name   string // of the disk in Spec.Disks
	Socket string // unix socket that speaks NBD, with the export named as the disk
	Path   string // file or block device
}

// SocketFile is the name, inside Config.Dir, of the unix socket by which host programs reach the guest (see
// docs/architecture.md, "Guest sockets"); GuestChannel is the one by which the VMM itself carries that traffic where it
// has no vsock device that speaks it natively.
const (
	SocketFile   = "vsock.sock"
	GuestChannel = "channel.sock"
)
