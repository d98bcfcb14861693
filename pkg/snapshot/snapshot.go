package snapshot

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/runner"
	"github.com/drafter-vm/drafter/pkg/vmm"
	"github.com/drafter-vm/drafter/pkg/vmpackage"
)

// VSockName is the name of the socket in a machine's VMPath at which programs of the host reach those in the guest.
const VSockName = runner.VSockName

// DefaultBootArgs are the kernel arguments of a machine whose configuration gives none.
const DefaultBootArgs = "console=ttyS0 quiet panic=-1 net.ifnames=0 root=/dev/vda rw"

// Default vsock ports on which the host expects the guest's services.
const (
	DefaultLivenessVSockPort = 25
	DefaultAgentVSockPort    = 26
)

// Device is one device of the package that is made.
type Device struct {
	Name string // of the device

	// Input is the blueprint's file: copied to Output, the copy is used. A device that is made here (state, memory,
	// config) has none. Any other device without Input is used where it is: its Output must exist, and a disk's changes.
	Input string

	// Output is the package's file.
	Output string

	// Shared makes a disk read-only in the guest, so that VMs made from the package can all have one file for it.
	Shared bool
}

// Config is a snapshot to create. Backend and Devices must be set; the zero value of the rest is usable.
type Config struct {
	Backend vmm.Backend // the hypervisor; required

	// Devices are the package's devices. "state", "memory" (but see ShutDown), "config", "kernel" and at least one disk are needed. In the guest
	// "disk" comes first, as /dev/vda, then "oci", then the others in the order given.
	Devices []Device

	CPUCount    int    // virtual CPUs; default 1
	MemorySize  int64  // bytes, a multiple of 1 MiB; default 1 GiB
	CPUTemplate string // a model of the backend's, or a JSON object, as Firecracker's templates of one's own are; empty or "None": the backend's default
	Accel       string // "kvm", "tcg" or "auto", the default
	BootArgs    string // default DefaultBootArgs
	MAC         string // of the guest's interface; empty: it has none

	// LivenessVSockPort and AgentVSockPort are the ports on which the guest reports that it is up, and on which its agent
	// is reached. 0 means that the guest has no such service; without liveness the machine runs for SettleTime instead.
	LivenessVSockPort, AgentVSockPort uint32
	// MoreAgents are the ports of further agents in the guest, all of which must answer.
	MoreAgents []uint32
	// SettleTime is how long a guest without liveness is given to boot. Default: 30 s.
	SettleTime time.Duration

	Host  runner.Host  // where machines run on this host
	Hooks runner.Hooks // called on the way; nil ones are left out

	// ResumeTimeout bounds the boot until liveness and agent have answered, and then how long the guest may take to get ready to be suspended, or to
	// shut down. Default: one minute.
	ResumeTimeout time.Duration

	// ShutDown has the guest shut down when it is up, instead of suspending it. There is no device "memory" then: the package boots at each start.
	ShutDown bool

	// Unbooted makes a package of a VM that has never run: its first start boots it. No machine runs for it.
	Unbooted bool

	// Progress is called when a stage begins: "copy", "boot", "suspend" or "shut down", "hash". Nil is allowed.
	Progress func(stage string)

	// Logger receives events; nil means slog.Default().
	Logger *slog.Logger
}

// Result is what was made.
type Result struct {
	Manifest *vmpackage.Manifest // nil when the outputs do not lie in one folder
	BootTime time.Duration       // from the start of the machine until liveness and agent had answered
}

// partialSuffix marks files of a package that is not complete.
const partialSuffix = ".partial"

// Create makes a package.
func Create(ctx context.Context, cfg Config) (_ *Result, err error) {
	cfg, err = cfg.withDefaults()
	if err != nil {
		return nil, fmt.Errorf("create snapshot: %w", err)
	}
	wish := vmm.Spec{
		Accel: cfg.Accel, CPUCount: cfg.CPUCount, CPUModel: cfg.CPUTemplate, MemorySize: cfg.MemorySize, MAC: cfg.MAC, BootArgs: cfg.BootArgs, Sockets: true,
	}
	if strings.HasPrefix(strings.TrimSpace(cfg.CPUTemplate), "{") {
		wish.CPUModel, wish.CPUTemplate = "", cfg.CPUTemplate
	}
	spec, err := cfg.Backend.Describe(ctx, wish)
	if err != nil {
		return nil, fmt.Errorf("create snapshot: %w", err)
	}

	out := &outputs{}
	defer func() {
		if err != nil {
			err = errors.Join(err, out.discard())
		}
	}()

	if err := out.lock(cfg.Devices, cfg.Unbooted); err != nil {
		return nil, fmt.Errorf("create snapshot: %w", err)
	}
	defer out.unlock()

	cfg.Progress("copy")
	devices, err := out.make(ctx, cfg, &spec)
	if err != nil {
		return nil, fmt.Errorf("create snapshot: %w", err)
	}

	if cfg.Unbooted {
		if err := recordUnbooted(devices); err != nil {
			return nil, fmt.Errorf("create snapshot: %w", err)
		}
		return cfg.publish(ctx, out, &Result{})
	}

	cfg.Progress("boot")
	console := newTail(cfg.Host.SerialOutput)
	cfg.Host.SerialOutput = console
	began := time.Now()
	instance, err := runner.Boot(ctx, runner.Config{
		Devices: devices, Backend: cfg.Backend, Host: cfg.Host, Hooks: cfg.Hooks, ResumeTimeout: cfg.ResumeTimeout, RescueTimeout: cfg.ResumeTimeout, Logger: cfg.Logger,
		Anew: true,
	})
	if err != nil {
		return nil, fmt.Errorf("create snapshot: %w%s", err, console)
	}
	result := &Result{BootTime: time.Since(began)}
	if cfg.LivenessVSockPort == 0 {
		select {
		case <-time.After(cfg.SettleTime):
		case <-instance.Machine().Done():
		case <-ctx.Done():
		}
	}
	if ctx.Err() != nil {
		return nil, fmt.Errorf("create snapshot: %w", errors.Join(context.Cause(ctx), instance.Kill()))
	}
	select {
	case <-instance.Machine().Done():
		reason := instance.Machine().Err()
		return nil, fmt.Errorf("create snapshot: the guest ended before it was to: %w%s", errors.Join(reason, instance.Kill()), console)
	default:
	}

	stage, end := "suspend", instance.Suspend
	if cfg.ShutDown {
		stage, end = "shut down", instance.ShutDown
	}
	cfg.Progress(stage)
	if err := end(ctx); err != nil {
		return nil, fmt.Errorf("create snapshot: %w%s", errors.Join(err, instance.Kill()), console)
	}
	if err := instance.Close(ctx); err != nil {
		return nil, fmt.Errorf("create snapshot: %w", err)
	}
	if ctx.Err() != nil {
		return nil, fmt.Errorf("create snapshot: %w", context.Cause(ctx))
	}
	return cfg.publish(ctx, out, result)
}

// recordUnbooted says in the state device that there is nothing to resume.
func recordUnbooted(devices []runner.DeviceConfig) error {
	at := slices.IndexFunc(devices, func(d runner.DeviceConfig) bool { return d.Name == runner.StateDevice })
	f, err := block.OpenFile(devices[at].Base, block.FileOptions{})
	if err != nil {
		return err
	}
	return errors.Join(runner.WriteRecord(f, runner.Record{Status: runner.ShutDown}), f.Close())
}

// publish gives the outputs their names.
func (cfg Config) publish(ctx context.Context, out *outputs, result *Result) (_ *Result, err error) {
	// From here on the only way is forward: the old package is gone with the first rename.
	ctx = context.WithoutCancel(ctx)
	dir := packageFolder(cfg.Devices)
	stale := ""
	if dir != "" {
		if cfg.ShutDown { // the memory of the package that is replaced is of no use to this one, and would pass for its own
			if old, err := vmpackage.Open(dir); err == nil {
				for _, d := range old.Devices {
					if d.Name == vmpackage.Memory {
						stale = d.Path
					}
				}
			}
		}
		// The manifest is written last and removed first: a folder with one is a whole package.
		if err := os.Remove(filepath.Join(dir, vmpackage.ManifestFile)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("create snapshot: %w", err)
		}
	}
	if err := out.publish(); err != nil {
		return nil, fmt.Errorf("create snapshot: %w", err)
	}
	if stale != "" {
		if err := os.Remove(stale); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("create snapshot: %w", err)
		}
	}
	if dir != "" {
		cfg.Progress("hash")
		files := make([]vmpackage.File, len(cfg.Devices))
		for n, d := range cfg.Devices {
			files[n] = vmpackage.File{Name: d.Name, Path: d.Output}
		}
		if result.Manifest, err = vmpackage.WriteManifest(ctx, dir, files, vmpackage.ManifestOptions{}); err != nil {
			return nil, fmt.Errorf("create snapshot: %w", err)
		}
	}
	return result, nil
}

func (c Config) withDefaults() (Config, error) {
	if c.Backend == nil {
		return c, errors.New("no backend is given")
	}
	if c.CPUCount == 0 {
		c.CPUCount = 1
	}
	if c.MemorySize == 0 {
		c.MemorySize = 1 << 30
	}
	if c.CPUCount < 0 {
		return c, fmt.Errorf("CPU count %d: give at least 1", c.CPUCount)
	}
	if c.MemorySize < 0 || c.MemorySize%(1<<20) != 0 {
		return c, fmt.Errorf("memory size of %d bytes: give a multiple of 1 MiB", c.MemorySize)
	}
	if c.CPUTemplate == "None" {
		c.CPUTemplate = ""
	}
	if c.BootArgs == "" {
		c.BootArgs = DefaultBootArgs
	}
	if c.SettleTime == 0 {
		c.SettleTime = 30 * time.Second
	}
	if c.ResumeTimeout == 0 {
		c.ResumeTimeout = time.Minute
	}
	if c.Progress == nil {
		c.Progress = func(string) {}
	}
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	names := make(map[string]bool)
	outputs := make(map[string]string)
	disks := 0
	for _, d := range c.Devices {
		if err := vmpackage.CheckName(d.Name); err != nil {
			return c, err
		}
		if names[d.Name] {
			return c, fmt.Errorf("device %q is configured twice", d.Name)
		}
		names[d.Name] = true
		if d.Output == "" {
			return c, fmt.Errorf("device %q has no output: give the file to write", d.Name)
		}
		path := filepath.Clean(d.Output)
		if other, ok := outputs[path]; ok {
			return c, fmt.Errorf("devices %q and %q have the same output %q", other, d.Name, d.Output)
		}
		outputs[path] = d.Name
		if made(d.Name) && d.Input != "" {
			return c, fmt.Errorf("device %q has input %q, but it is made by the snapshot: leave the input out", d.Name, d.Input)
		}
		source := d.Input
		if source == "" {
			source = d.Output
		}
		if info, err := os.Stat(source); !made(d.Name) && err != nil {
			return c, fmt.Errorf("device %q: its blueprint file %q cannot be used: %w: make a blueprint first (drafter blueprint), or correct the path", d.Name, source, err)
		} else if err == nil && info.IsDir() {
			return c, fmt.Errorf("device %q: %q is a folder, a file is needed", d.Name, source)
		}
		if runner.IsDisk(d.Name) {
			disks++
		}
	}
	for _, name := range []string{runner.StateDevice, runner.MemoryDevice, runner.ConfigDevice, runner.KernelDevice} {
		switch absent := name == runner.MemoryDevice && c.ShutDown; {
		case absent && names[name]:
			return c, fmt.Errorf("device %q is configured, but a guest that is shut down has none: leave it out", name)
		case !absent && !names[name]:
			return c, fmt.Errorf("no device %q is configured", name)
		}
	}
	if len(c.Host.Passthrough) > 0 && !c.ShutDown {
		return c, fmt.Errorf("the state of PCI device %q of the host cannot be written down: have the guest shut down", c.Host.Passthrough[0])
	}
	if disks == 0 {
		return c, errors.New("no disk is configured: give a device \"disk\"")
	}
	if c.Unbooted && c.ShutDown {
		return c, errors.New("a VM that has never run is not shut down: choose one")
	}
	return c, nil
}

// made reports whether a device is made by the snapshot rather than taken from a blueprint.
func made(name string) bool {
	return name == runner.StateDevice || name == runner.MemoryDevice || name == runner.ConfigDevice
}

// outputs are the files of a package that is being made.
type outputs struct {
	locks     []*os.File // on files that will be replaced
	partial   []string   // written under their name + partialSuffix
	published []string   // that got their name, but are no package before all of it is done
	dirs      []string   // made for them, outermost first
}

// make writes the files that the machine needs, and completes spec with the disks it finds.
func (o *outputs) make(ctx context.Context, cfg Config, spec *vmm.Spec) ([]runner.DeviceConfig, error) {
	var devices []runner.DeviceConfig
	for _, d := range cfg.Devices {
		path := d.Output
		if d.Input != "" || made(d.Name) {
			path = d.Output + partialSuffix
			if err := o.mkdir(filepath.Dir(path)); err != nil {
				return nil, err
			}
			o.partial = append(o.partial, d.Output)
		}
		if d.Shared && !runner.IsDisk(d.Name) {
			return nil, fmt.Errorf("device %q: only a disk can be shared", d.Name)
		}
		devices = append(devices, runner.DeviceConfig{Name: d.Name, Base: path, Shared: d.Shared})
		size := int64(0)
		var err error
		switch d.Name {
		case runner.StateDevice:
			err = createFile(path, runner.StateDeviceSize)
		case runner.MemoryDevice:
			err = createFile(path, cfg.MemorySize)
		case runner.ConfigDevice: // written last: it lists the disks
		default:
			size, err = prepare(ctx, d, path)
		}
		if err != nil {
			return nil, fmt.Errorf("device %q: %w", d.Name, err)
		}
		if runner.IsDisk(d.Name) {
			if size == 0 || size%512 != 0 {
				return nil, fmt.Errorf("device %q: %q has %d bytes; a disk is a multiple of 512 bytes", d.Name, cmp.Or(d.Input, d.Output), size)
			}
			spec.Disks = append(spec.Disks, vmm.Disk{Name: d.Name, Size: size, ReadOnly: d.Shared})
		}
	}
	slices.SortStableFunc(spec.Disks, func(a, b vmm.Disk) int { return cmp.Compare(diskRank(a.Name), diskRank(b.Name)) })
	for _, d := range devices {
		if d.Name != runner.ConfigDevice {
			continue
		}
		b, err := runner.Description{Spec: *spec, AgentVSockPort: cfg.AgentVSockPort, MoreAgents: cfg.MoreAgents, LivenessVSockPort: cfg.LivenessVSockPort}.Encode()
		if err == nil {
			err = os.WriteFile(d.Base, b, 0o600)
		}
		if err != nil {
			return nil, fmt.Errorf("device %q: %w", d.Name, err)
		}
	}
	return devices, nil
}

// diskRank says which disks come first in the guest, wherever they stand in the list: a kernel boots from the first.
func diskRank(name string) int {
	if i := slices.Index([]string{"disk", "oci"}, name); i >= 0 {
		return i
	}
	return 2
}

// mkdir makes dir and remembers which folders were not there before.
func (o *outputs) mkdir(dir string) error {
	made, err := runner.MakeFolders(dir, 0o755)
	o.dirs = append(o.dirs, made...)
	return err
}

// lock takes the files that will be replaced, so that no instance that runs from them, or starts meanwhile, loses them.
func (o *outputs) lock(devices []Device, unbooted bool) error {
	for _, d := range devices {
		if unbooted && d.Input == "" && !made(d.Name) {
			continue // nobody writes to it here
		}
		f, err := runner.LockFile(d.Output, true)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			o.unlock()
			return fmt.Errorf("device %q: output %w", d.Name, err)
		}
		// What is used in place is locked by the instance itself.
		if d.Input == "" && !made(d.Name) {
			f.Close()
			continue
		}
		o.locks = append(o.locks, f)
	}
	return nil
}

func (o *outputs) unlock() {
	for _, f := range o.locks {
		f.Close()
	}
	o.locks = nil
}

// publish gives all files their names.
func (o *outputs) publish() error {
	for _, path := range o.partial {
		if err := os.Rename(path+partialSuffix, path); err != nil {
			return err
		}
		o.published = append(o.published, path)
	}
	return nil
}

// discard removes what make wrote, published or not: part of a package is worth nothing.
func (o *outputs) discard() error {
	var errs []error
	for _, path := range o.published {
		errs = append(errs, os.Remove(path))
	}
	for _, path := range o.partial {
		if err := os.Remove(path + partialSuffix); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	runner.RemoveFolders(o.dirs)
	return errors.Join(errs...)
}

func createFile(path string, size int64) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	f, err := block.CreateFile(path, size)
	if err != nil {
		return err
	}
	return f.Close()
}

// prepare makes path a copy of the device's input, holes included, and returns its size.
func prepare(ctx context.Context, d Device, path string) (int64, error) {
	source := d.Input
	if source == "" {
		source = path
	}
	in, err := block.OpenFile(source, block.FileOptions{ReadOnly: true})
	if err != nil {
		return 0, err
	}
	defer in.Close()
	if d.Input == "" {
		return in.Size(), nil
	}
	if err := createFile(path, in.Size()); err != nil {
		return 0, err
	}
	out, err := block.OpenFile(path, block.FileOptions{})
	if err != nil {
		return 0, err
	}
	if err := block.Copy(ctx, out, in, block.CopyOptions{}); err != nil {
		return 0, errors.Join(err, out.Close())
	}
	return in.Size(), out.Close()
}

// packageFolder is the one folder that all outputs lie in, which makes it a package, else "".
func packageFolder(devices []Device) string {
	dir := filepath.Dir(devices[0].Output)
	for _, d := range devices {
		if filepath.Dir(d.Output) != dir {
			return ""
		}
	}
	return dir
}

// tail passes what it is given on and keeps the end of it, for error messages.
type tail struct {
	next io.Writer
	mu   sync.Mutex // guards last
	last []byte
}

const tailSize = 2048

func newTail(next io.Writer) *tail {
	return &tail{next: next}
}

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	t.last = append(t.last, p...)
	if over := len(t.last) - tailSize; over > 0 {
		t.last = append(t.last[:0], t.last[over:]...)
	}
	t.mu.Unlock()
	if t.next == nil {
		return len(p), nil
	}
	return t.next.Write(p)
}

// String is the end of what was written, as an addition to an error message.
func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.last) == 0 {
		return "; the console printed nothing"
	}
	return fmt.Sprintf("; the console's last words:\n%s", t.last)
}
