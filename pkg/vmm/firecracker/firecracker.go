package firecracker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/drafter-vm/drafter/pkg/vmm"
	"github.com/drafter-vm/drafter/pkg/vmm/internal/cgroup"
	"github.com/drafter-vm/drafter/pkg/vmm/internal/config"
	"github.com/drafter-vm/drafter/pkg/vmm/internal/lifecycle"
	"github.com/drafter-vm/drafter/pkg/vmm/internal/numa"
	"github.com/drafter-vm/drafter/pkg/vmm/internal/process"
	"github.com/drafter-vm/drafter/pkg/vmm/internal/tap"
)

// Names of files in Config.Dir, beside vmm.SocketFile.
const (
	apiSocket     = "api.sock"
	consoleInput  = "console.in"
	consoleOutput = "console.out"
	stillFIFO     = "still"
	logFIFO       = "log"
	metricsFIFO   = "metrics"
	identityFile  = "firecracker.json"
)

// diskLink is the name of the link to a disk, by its number.
func diskLink(n int) string { return fmt.Sprintf("%d.disk", n) }

// diskID is what a disk is called in device state.
func diskID(n int) string { return fmt.Sprintf("disk%d", n) }

// Descriptors that a Firecracker without a jail inherits, by their numbers there.
const (
	savedFD  = 3 // a memfd for device state that is saved
	loadedFD = 4 // one for device state that is loaded
	memoryFD = 5 // the guest's RAM
)

// inherited is the path of a descriptor, to the process that has it.
func inherited(fd int) string { return fmt.Sprintf("/proc/self/fd/%d", fd) }

// Options configures a backend. The zero value works.
type Options struct {
	// Binary is Firecracker's program, a path or a name in PATH. Empty means firecracker. Config.Binary goes before it.
	Binary string

	// Jailer is the program that confines Firecracker, a path or a name in PATH. Empty: it is not confined, and runs as the user that we are.
	Jailer string

	// Logger receives events; nil means slog.Default(). Config.Logger goes before it for a machine's events.
	Logger *slog.Logger
}

// host is where this host describes itself.
type host struct{ kvmDevice, cpuinfo string }

// Backend starts Firecracker machines. It implements [vmm.Backend], [vmm.Adopter], [vmm.Reaper] and [vmm.Demanding].
type Backend struct {
	opts Options
	log  *slog.Logger
	host host
}

var (
	_ vmm.Backend   = (*Backend)(nil)
	_ vmm.Adopter   = (*Backend)(nil)
	_ vmm.Reaper    = (*Backend)(nil)
	_ vmm.Ender     = (*Backend)(nil)
	_ vmm.Demanding = (*Backend)(nil)
)

// New returns a backend. It starts nothing and looks at nothing yet.
func New(opts Options) *Backend {
	b := &Backend{opts: opts, log: opts.Logger, host: host{kvmDevice: "/dev/kvm", cpuinfo: "/proc/cpuinfo"}}
	if b.log == nil {
		b.log = slog.Default()
	}
	return b
}

// Name implements [vmm.Backend].
func (b *Backend) Name() string { return hypervisor }

// Requirements implements [vmm.Demanding].
func (b *Backend) Requirements() vmm.Requirements {
	return vmm.Requirements{Graft: true, Paths: true, Carries: true, Reboots: true, Wrapped: b.opts.Jailer != ""}
}

// Start implements [vmm.Backend].
func (b *Backend) Start(ctx context.Context, cfg vmm.Config) (vmm.Machine, error) {
	began := time.Now()
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("start machine: %w", context.Cause(ctx))
	}
	cfg, err := b.complete(cfg)
	if err != nil {
		return nil, fmt.Errorf("start machine: %w", err)
	}
	m, err := b.start(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("start machine in %q: %w", cfg.Dir, err)
	}
	m.log.Debug("machine started", "pid", m.PID(), "boot", cfg.Boot != nil, "took", time.Since(began))
	return m, nil
}

// complete fills in what may be left out and checks what does not need Firecracker to be checked.
func (b *Backend) complete(cfg vmm.Config) (vmm.Config, error) {
	if cfg.Logger == nil {
		cfg.Logger = b.log
	}
	var err error
	if cfg.Dir, err = filepath.Abs(cfg.Dir); err != nil {
		return cfg, err
	}
	if err := config.CheckFolder(cfg.Dir, apiSocket, vmm.SocketFile+"_4294967295"); err != nil {
		return cfg, err
	}
	if len(cfg.Disks) != len(cfg.Spec.Disks) {
		return cfg, fmt.Errorf("%d disks are described, but %d attached", len(cfg.Spec.Disks), len(cfg.Disks))
	}
	attached := make([]vmm.Attachment, len(cfg.Disks))
	for i, at := range cfg.Disks {
		name := cfg.Spec.Disks[i].Name
		if at.Name != "" && at.Name != name {
			return cfg, fmt.Errorf("disk %d is described as %q, but attached as %q: the order must be the same", i, name, at.Name)
		}
		if at.Path == "" || at.Socket != "" {
			return cfg, fmt.Errorf("disk %q: Firecracker opens disks by a path, and by nothing else", name)
		}
		if at.Path, err = filepath.Abs(at.Path); err != nil {
			return cfg, err
		}
		// A mounted disk is for the user who will have it, and for nobody else.
		if _, err := os.Stat(at.Path); err != nil && !((cfg.UID != 0 || cfg.GID != 0) && errors.Is(err, os.ErrPermission)) {
			return cfg, fmt.Errorf("disk %q: %w", name, err)
		}
		attached[i] = at
	}
	cfg.Disks = attached
	if cfg.Boot, err = config.Boot(cfg.Boot); err != nil {
		return cfg, err
	}
	return cfg, checkSpec(cfg.Spec)
}

// start starts the process and makes it a machine, or leaves nothing.
func (b *Backend) start(ctx context.Context, cfg vmm.Config) (_ *machine, err error) {
	if cfg.Spawn == nil || cfg.Graft == nil {
		return nil, errNoHooks
	}
	binary, err := b.find(cfg.Binary)
	if err != nil {
		return nil, err
	}
	if err := b.checkKVM(); err != nil {
		return nil, err
	}
	if err := config.Check(cfg); err != nil {
		return nil, err
	}
	if len(cfg.Passthrough) > 0 {
		return nil, fmt.Errorf("it passes no devices of the host through, such as %q: use QEMU (--hypervisor qemu)", cfg.Passthrough[0])
	}
	jail, err := b.findJail(cfg)
	if err != nil {
		return nil, err
	}
	m := newMachine(cfg, jail)
	if id, err := process.Read(m.identity()); err == nil && id.Alive() {
		return nil, fmt.Errorf("a machine runs there already, as process %d: close it, or adopt it", id.PID)
	}
	var cpus *unix.CPUSet
	if cfg.NUMANode >= 0 {
		if cpus, err = numa.CPUs(cfg.NUMANode); err != nil {
			return nil, err
		}
	}
	netns := ""
	if cfg.Spec.MAC != "" {
		// Firecracker opens it by its name, says little where that fails, and makes one that is missing.
		if m.tap, err = tap.Open(cfg.Netns, cfg.Interface); err != nil {
			return nil, err
		}
		if cfg.Boot != nil { // it does so now
			m.tap.Close()
		}
		netns = cfg.Netns
	}

	defer func() {
		if err != nil {
			err = m.abandon(err)
		}
	}()
	if err := m.removeFiles(); err != nil { // of one that has ended without an owner
		return nil, err
	}
	if err := m.linkDisks(); err != nil {
		return nil, err
	}
	inherited, err := m.makeFiles()
	if err != nil {
		return nil, err
	}
	defer closeAll(inherited)
	if cfg.CgroupVersion != 0 {
		if m.cgroup, err = cgroup.Make(cfg.CgroupVersion, cfg.CgroupName); err != nil {
			return nil, err
		}
	}

	line := []string{"--api-sock", apiSocket, "--log-path", logFIFO, "--level", "Warn", "--show-level", "--metrics-path", metricsFIFO}
	if jail == nil {
		line = append(line, "--id", "drafter")
	} else if binary, line, err = jail.command(binary, line); err != nil {
		return nil, err
	}
	cmd := exec.Command(binary, line...)
	cmd.Dir = cfg.Dir
	cmd.Stdin, cmd.Stdout = m.in, m.out
	cmd.ExtraFiles = inherited
	m.log.Debug("start Firecracker", "command", strings.Join(cmd.Args, " "))
	if err := tap.In(netns, func() (err error) {
		m.process, err = process.Start(cmd, "Firecracker", cfg.Spawn, m.log)
		return err
	}); err != nil {
		return nil, err
	}
	if err := m.process.Identity.Write(m.identity()); err != nil {
		return nil, fmt.Errorf("record the process: %w", err)
	}
	if m.cgroup != nil {
		if err := m.cgroup.Add(m.process.PID); err != nil {
			return nil, err
		}
	}
	if cpus != nil {
		if err := numa.Bind(m.process.PID, cpus); err != nil {
			return nil, err
		}
	}
	m.startPumps()
	answering, cancel := context.WithTimeoutCause(ctx, answerTime, fmt.Errorf("no answer within %s", answerTime))
	defer cancel()
	info, err := m.api.await(answering, m.process.Ended)
	if err != nil {
		return nil, err
	}
	m.version = info.Version
	if err := m.checkInterface(); err != nil {
		return nil, err
	}
	if os.Geteuid() == 0 && cfg.UID == 0 {
		where := "in its jail, as root: give it a user (--uid, --gid)"
		if jail == nil {
			where = "without its jailer, as root: say where that is (--jailer-bin)"
		}
		m.log.Warn("Firecracker runs "+where, "pid", m.PID())
	}
	if cfg.Boot != nil {
		if err := m.boot(ctx); err != nil {
			return nil, err
		}
		m.life.Found(lifecycle.Running)
	}
	go m.watch()
	return m, nil
}

// Adopt implements [vmm.Adopter]. Done of an adopted machine knows less of the reasons: its words on stderr went to the former owner, and the
// exit status to its parent.
func (b *Backend) Adopt(ctx context.Context, cfg vmm.Config) (vmm.Machine, error) {
	cfg, err := b.complete(cfg)
	if err != nil {
		return nil, fmt.Errorf("adopt machine: %w", err)
	}
	m, err := b.adopt(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("adopt machine in %q: %w", cfg.Dir, err)
	}
	m.log.Debug("machine adopted", "pid", m.PID(), "state", m.life.State())
	return m, nil
}

func (b *Backend) adopt(ctx context.Context, cfg vmm.Config) (_ *machine, err error) {
	jail, err := b.findJail(cfg)
	if err != nil {
		return nil, err
	}
	m := newMachine(cfg, jail)
	id, err := process.Read(m.identity())
	if errors.Is(err, os.ErrNotExist) && len(identities(cfg.Dir)) > 0 {
		if jail != nil {
			return nil, errors.New("it runs without a jailer: adopt it without one (--jailer-bin none)")
		}
		return nil, errors.New("it runs in Firecracker's jailer: say where that is (--jailer-bin)")
	}
	if err != nil {
		return nil, fmt.Errorf("find its process: %w", err)
	}
	if m.process, err = process.Adopt(id, "Firecracker"); err != nil {
		return nil, err
	}
	// A failed adoption leaves the machine alone: whose it is, is not ours to decide.
	defer func() {
		if err != nil {
			m.disconnect()
			m.process.Release()
		}
	}()
	if err := m.openFiles(); err != nil {
		return nil, err
	}
	if cfg.CgroupVersion != 0 {
		m.cgroup = cgroup.Find(cfg.CgroupVersion, cfg.CgroupName)
	}
	m.startPumps()
	if err := m.findStill(ctx); err != nil {
		return nil, err
	}
	found, err := m.look(ctx)
	if err != nil {
		return nil, err
	}
	m.life.Found(found)
	go m.watch()
	return m, nil
}

// Reap implements [vmm.Reaper].
func (b *Backend) Reap(cfg vmm.Config) error {
	for _, id := range identities(cfg.Dir) {
		if id.Alive() {
			return fmt.Errorf("reap machine in %q: process %d is alive", cfg.Dir, id.PID)
		}
	}
	unmountState(cfg.Dir)
	if cfg.CgroupVersion == 0 {
		return nil
	}
	return cgroup.Find(cfg.CgroupVersion, cfg.CgroupName).Remove()
}

// Ending implements [vmm.Ender].
func (b *Backend) Ending(cfg vmm.Config) bool {
	return slices.ContainsFunc(identities(cfg.Dir), process.Identity.Ending)
}

// identities are those of a machine's process that are written down, in the one place or the other.
func identities(dir string) (all []process.Identity) {
	for _, dir := range []string{dir, filepath.Dir(dir)} { // the second if it had a jail
		if id, err := process.Read(filepath.Join(dir, identityFile)); err == nil {
			all = append(all, id)
		}
	}
	return all
}

// boot tells Firecracker of the machine, and starts it.
func (m *machine) boot(ctx context.Context) error {
	spec := m.cfg.Spec
	type request struct {
		path string
		body any
	}
	kernel, initrd := m.cfg.Boot.Kernel, m.cfg.Boot.Initrd
	if m.jail != nil {
		var err error
		if kernel, err = m.jail.bring(kernel, kernelFile); err == nil && initrd != "" {
			initrd, err = m.jail.bring(initrd, initrdFile)
		}
		if err != nil {
			return fmt.Errorf("bring what it boots into the jail: %w", err)
		}
	}
	requests := []request{
		{"/machine-config", machineConfiguration{spec.CPUCount, spec.MemorySize >> 20, spec.CPUModel}},
		{"/boot-source", bootSource{kernel, initrd, bootArgs(spec.BootArgs)}},
	}
	if spec.CPUTemplate != "" {
		requests = append(requests, request{"/cpu-config", json.RawMessage(spec.CPUTemplate)})
	}
	engine := "Async"
	if m.cfg.IOEngineSync || !m.isFrom(drains) {
		engine = "Sync"
	}
	for i, disk := range spec.Disks {
		id := diskID(i)
		requests = append(requests, request{"/drives/" + id, drive{id, diskLink(i), false, disk.ReadOnly, "Writeback", engine, limiter(m.cfg.DiskLimit)}})
	}
	if spec.MAC != "" {
		requests = append(requests, request{"/network-interfaces/" + interfaceID, networkInterface{interfaceID, spec.MAC, m.cfg.Interface}})
	}
	if spec.Sockets {
		requests = append(requests, request{"/vsock", vsock{guestCID, vmm.SocketFile}})
	}
	// Firecracker tells what the guest has given only where it asks it for statistics: as seldom as can be, as nobody looks at those.
	requests = append(requests, request{"/entropy", entropyDevice{}}, request{"/balloon", balloon{0, true, math.MaxUint16}})
	for _, r := range requests {
		if err := m.api.put(ctx, r.path, r.body); err != nil {
			return err
		}
	}
	return m.cfg.Graft(func() error { return m.api.put(ctx, "/actions", action{"InstanceStart"}) })
}

// bootArgs adds to a kernel's command line what a guest of Firecracker needs, unless something is said of it: its devices are not on PCI, and it
// ends by the reset that its keyboard's controller has for it.
func bootArgs(args string) string {
	for _, add := range []string{"reboot=k", "pci=off", "i8042.noaux", "i8042.nomux", "i8042.dumbkbd"} {
		name, _, _ := strings.Cut(add, "=")
		if !slices.ContainsFunc(strings.Fields(args), func(have string) bool { return have == name || strings.HasPrefix(have, name+"=") }) {
			args = strings.TrimSpace(args + " " + add)
		}
	}
	return args
}

// answerTime is how long a Firecracker may take to answer at all. It takes milliseconds.
const answerTime = 30 * time.Second

// interfaceID is what the network interface is called in device state.
const interfaceID = "net0"

// drains is the first version that saves what becomes of requests which its engine with io_uring has under way. Before that their interrupts are lost, and the
// guest waits for them for ever: "saving/restoring async IO engine transport state" (67ba7a206) of its repository.
var drains = [3]int{1, 15, 0}

// fixedInterface is the name of tap interfaces for versions before renames.
const fixedInterface = "tap0"

// checkInterface refuses a name that a machine could not be loaded with.
func (m *machine) checkInterface() error {
	if m.cfg.Spec.MAC == "" || m.cfg.Interface == fixedInterface || m.isFrom(renames) {
		return nil
	}
	return fmt.Errorf("interface %q: Firecracker %s connects a guest to the interface that it was saved with, whatever is said: call it %s in a network namespace of its own (--interface %s --netns), or use Firecracker 1.12 or newer",
		m.cfg.Interface, m.version, fixedInterface, fixedInterface)
}

// isFrom reports whether the machine's Firecracker is of a version, or newer.
func (m *machine) isFrom(version [3]int) bool {
	return slices.Compare(numbers(m.version), version[:]) >= 0
}

// renames is the first version that a machine can be loaded by with another tap interface than it was saved with. Before that it has to be one of
// the same name, in whatever namespace.
var renames = [3]int{1, 12, 0}

// guestCID is the guest's address in vsock. Addresses are no host's business: its sockets are files.
const guestCID = 3
