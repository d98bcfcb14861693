package qemu

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
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
	"github.com/drafter-vm/drafter/pkg/vmm/vfio"
)

// Names of the sockets in Config.Dir, beside vmm.GuestChannel.
const (
	qmpSocket    = "qmp.sock"
	serialSocket = "serial.sock"
)

// Options configures a backend. The zero value works.
type Options struct {
	// Binary is QEMU's program, a path or a name in PATH. Empty means qemu-system-x86_64. Config.Binary goes before it.
	Binary string

	// CacheDir is where it is remembered what a binary can do, which takes 40 ms to find out. Empty means drafter in
	// the user's cache folder.
	CacheDir string

	// Logger receives events; nil means slog.Default(). Config.Logger goes before it for a machine's events.
	Logger *slog.Logger
}

// Backend starts QEMU machines. It implements [vmm.Backend], [vmm.Adopter] and [vmm.Reaper].
type Backend struct {
	opts Options
	log  *slog.Logger
	host host
}

var (
	_ vmm.Backend = (*Backend)(nil)
	_ vmm.Adopter = (*Backend)(nil)
	_ vmm.Reaper  = (*Backend)(nil)
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

// complete fills in what may be left out and checks what does not need QEMU to be checked.
func (b *Backend) complete(cfg vmm.Config) (vmm.Config, error) {
	if cfg.Logger == nil {
		cfg.Logger = b.log
	}
	var err error
	if cfg.Dir, err = filepath.Abs(cfg.Dir); err != nil {
		return cfg, err
	}
	if err := config.CheckFolder(cfg.Dir, qmpSocket, serialSocket, vmm.GuestChannel); err != nil {
		return cfg, err
	}
	if (cfg.UID != 0 && cfg.UID != os.Geteuid() || cfg.GID != 0 && cfg.GID != os.Getegid()) && !canConfine() {
		return cfg, fmt.Errorf("uid %d, gid %d: only root can run QEMU as another user; this is %d, %d", cfg.UID, cfg.GID, os.Geteuid(), os.Getegid())
	}
	if cfg.UID < 0 || cfg.GID < 0 {
		return cfg, fmt.Errorf("uid %d, gid %d: they cannot be negative", cfg.UID, cfg.GID)
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
		if (at.Socket == "") == (at.Path == "") {
			return cfg, fmt.Errorf("disk %q: exactly one of socket and path must be set", name)
		}
		if at.Path != "" {
			if at.Path, err = filepath.Abs(at.Path); err != nil {
				return cfg, err
			}
		} else {
			if at.Socket, err = filepath.Abs(at.Socket); err != nil {
				return cfg, err
			}
			if rel, err := filepath.Rel(cfg.Dir, at.Socket); err != nil || !filepath.IsLocal(rel) {
				return cfg, fmt.Errorf("disk %q: its socket %q must be in the machine's folder %q, the only one QEMU will see", name, at.Socket, cfg.Dir)
			}
		}
		attached[i] = at
	}
	cfg.Disks = attached
	cfg.Boot, err = config.Boot(cfg.Boot)
	return cfg, err
}

// start starts the process and makes it a machine, or leaves nothing.
func (b *Backend) start(ctx context.Context, cfg vmm.Config) (_ *machine, err error) {
	binary, err := b.find(cfg.Binary)
	if err != nil {
		return nil, err
	}
	caps, err := b.probe(ctx, binary)
	if err != nil {
		return nil, err
	}
	if err := checkSpec(cfg.Spec, caps); err != nil {
		return nil, err
	}
	if err := config.Check(cfg); err != nil {
		return nil, err
	}
	if cfg.Passthrough, err = passedThrough(cfg); err != nil {
		return nil, err
	}
	if id, err := process.Read(filepath.Join(cfg.Dir, identityFile)); err == nil && id.Alive() {
		return nil, fmt.Errorf("a machine runs there already, as process %d: close it, or adopt it", id.PID)
	}
	var cpus *unix.CPUSet
	if cfg.NUMANode >= 0 {
		if cpus, err = numa.CPUs(cfg.NUMANode); err != nil {
			return nil, err
		}
	}
	if err := openToUser(cfg); err != nil {
		return nil, err
	}

	m := newMachine(cfg, caps)
	defer func() {
		if err != nil {
			err = m.abandon(err)
		}
	}()

	var inherit inherited
	defer inherit.close()
	var fd descriptors
	memory, err := unix.FcntlInt(cfg.Memory.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("duplicate the memory's descriptor: %w", err)
	}
	fd.memory = inherit.add(os.NewFile(uintptr(memory), "memory"))
	listeners := []struct {
		name string
		fd   *int
	}{{qmpSocket, &fd.qmp}, {serialSocket, &fd.serial}, {vmm.GuestChannel, &fd.channel}}
	if !cfg.Spec.Sockets {
		listeners = listeners[:2]
	}
	for _, l := range listeners {
		f, err := listen(filepath.Join(cfg.Dir, l.name))
		if err != nil {
			return nil, err
		}
		*l.fd = inherit.add(f)
	}
	if cfg.Spec.MAC != "" {
		f, err := tap.Open(cfg.Netns, cfg.Interface)
		if err != nil {
			return nil, err
		}
		fd.tap = inherit.add(f)
		if cfg.Boot == nil {
			if m.announcer, err = newAnnouncer(f, cfg.Spec.MAC); err != nil {
				return nil, err
			}
		}
	}
	if cfg.CgroupVersion != 0 {
		if m.cgroup, err = cgroup.Make(cfg.CgroupVersion, cfg.CgroupName); err != nil {
			return nil, err
		}
	}

	cmd := exec.Command(binary, arguments(cfg, caps, fd)...)
	cmd.Dir = cfg.Dir
	cmd.ExtraFiles = inherit.files
	m.log.Debug("start QEMU", "command", strings.Join(cmd.Args, " "))
	if m.process, err = process.Start(cmd, "QEMU", cfg.Spawn, m.log); err != nil {
		return nil, err
	}
	inherit.close() // so that a connection ends when QEMU does
	if err := m.process.Identity.Write(filepath.Join(cfg.Dir, identityFile)); err != nil {
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
	if err := m.connect(ctx); err != nil {
		return nil, err
	}
	if cfg.Boot != nil {
		if err := m.qmp.execute(ctx, "cont", nil, nil); err != nil {
			return nil, err
		}
		m.life.Found(lifecycle.Running)
	}
	go m.watch()
	return m, nil
}

// passedThrough are the addresses, in full, of devices that can be passed through now.
func passedThrough(cfg vmm.Config) (addresses []string, err error) {
	if len(cfg.Passthrough) > 0 && cfg.Boot == nil {
		return nil, fmt.Errorf("device state cannot be loaded into a machine with PCI device %q of the host: boot it", cfg.Passthrough[0])
	}
	devices, err := vfio.Check(cfg.Passthrough)
	for _, d := range devices {
		addresses = append(addresses, d.Address)
	}
	return addresses, err
}

// Adopt implements [vmm.Adopter]. It waits, as long as ctx allows, while another owner is still connected. The NBD
// sockets of cfg.Disks must be served again by now. Done of an adopted machine knows less of the reasons: its words on
// stderr went to the former owner, and the exit status to its parent.
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

func (b *Backend) adopt(ctx context.Context, cfg vmm.Config) (*machine, error) {
	binary, err := b.find(cfg.Binary)
	if err != nil {
		return nil, err
	}
	caps, err := b.probe(ctx, binary)
	if err != nil {
		return nil, err
	}
	id, err := process.Read(filepath.Join(cfg.Dir, identityFile))
	if err != nil {
		return nil, fmt.Errorf("find its process: %w", err)
	}
	if err := openToUser(cfg); err != nil {
		return nil, err
	}
	m := newMachine(cfg, caps)
	if m.process, err = process.Adopt(id, "QEMU"); err != nil {
		return nil, err
	}
	if cfg.CgroupVersion != 0 {
		m.cgroup = cgroup.Find(cfg.CgroupVersion, cfg.CgroupName)
	}
	// A failed adoption leaves the machine alone: whose it is, is not ours to decide.
	letGo := func(err error) (*machine, error) {
		m.disconnect()
		m.process.Release()
		return nil, err
	}
	if err := m.connect(ctx); err != nil {
		return letGo(err)
	}
	found, err := m.look(ctx)
	if err != nil {
		return letGo(err)
	}
	m.life.Found(found)
	go m.watch()
	return m, nil
}

// Reap implements [vmm.Reaper].
func (b *Backend) Reap(cfg vmm.Config) error {
	if id, err := process.Read(filepath.Join(cfg.Dir, identityFile)); err == nil && id.Alive() {
		return fmt.Errorf("reap machine in %q: process %d is alive", cfg.Dir, id.PID)
	}
	if cfg.CgroupVersion == 0 {
		return nil
	}
	return cgroup.Find(cfg.CgroupVersion, cfg.CgroupName).Remove()
}

// openToUser lets a QEMU that runs as another user reach the NBD sockets in Dir, now and when it dials them again.
func openToUser(cfg vmm.Config) error {
	if !switchesUser(cfg) {
		return nil
	}
	// Search permission for the group: QEMU can open what it knows the name of, if that is its own.
	if err := errors.Join(os.Chown(cfg.Dir, -1, cfg.GID), os.Chmod(cfg.Dir, 0o710)); err != nil {
		return fmt.Errorf("open the machine's folder to gid %d: %w", cfg.GID, err)
	}
	for i, at := range cfg.Disks {
		if at.Socket == "" {
			continue
		}
		if err := os.Lchown(at.Socket, cfg.UID, cfg.GID); err != nil {
			return fmt.Errorf("disk %q: give its socket to uid %d: %w", cfg.Spec.Disks[i].Name, cfg.UID, err)
		}
	}
	return nil
}

// listen makes a listening unix socket for QEMU to inherit, in place of one that an ended process left.
func listen(path string) (*os.File, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("listen on %q: %w", path, err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	defer l.Close()
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, err
	}
	return l.File()
}
