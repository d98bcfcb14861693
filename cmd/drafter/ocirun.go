package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/blueprint"
	"github.com/drafter-vm/drafter/pkg/expose"
	"github.com/drafter-vm/drafter/pkg/oci"
	"github.com/drafter-vm/drafter/pkg/runner"
	"github.com/drafter-vm/drafter/pkg/snapshot"
	"github.com/drafter-vm/drafter/pkg/vmpackage"
)

// mountLock is the file beside a lazy disk that who serves it has locked, and written its process id to.
const mountLock = "lock"

func newOCIMountCommand() *cobra.Command {
	var (
		image         imageFlags
		settings      settingFlags
		data, size    string
		cache, mirror string
		background    int
	)
	cmd := &cobra.Command{
		Use:   "mount IMAGE DIR",
		Short: "Show the disk of an image in a registry as a file, whose content comes when it is read",
		Long: `Show the disk of an image, as 'drafter oci pack' makes it, as the file DIR/oci.ext4, before the image has been fetched: only the tables of contents of its
layers are. What is read is fetched then, and the rest behind it. It can be the base of a device of any number of instances.

Layers have a table of contents if they are eStargz or zstd:chunked ('podman push --compression-format zstd:chunked', 'nerdctl image convert
--estargz'); others are fetched whole first. What has come is kept in --data, for the next time.

It needs root and FUSE. Ctrl-C unmounts.

Exit statuses: 0 it was unmounted; 1 it could not be mounted; 2 the command line cannot be used; 130 ended by a signal before it was mounted.`,
		Example: `  drafter oci mount registry.example/app:1 out/image
  drafter peer --devices '[…,{"name":"oci","base":"out/image/oci.ext4","overlay":"out/i/oci.overlay","state":"out/i/oci.state"}]'`,
		Args: twoArgs("the IMAGE, and the folder to mount its disk at"),
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			s, err := settings.read()
			if err != nil {
				return err
			}
			limits, err := image.limits()
			if err != nil {
				return err
			}
			bytes, err := parseDiskSize(size)
			if err != nil {
				return usageErrorf("--size: %w", err)
			}
			dir := filepath.Clean(args[1])
			if data == "" {
				data = dir + ".data"
			}
			if err := os.MkdirAll(data, 0o700); err != nil {
				return fmt.Errorf("make folder for --data: %w", err)
			}
			unlock, err := lockMount(data)
			if err != nil {
				return err
			}
			defer unlock()
			ctx := cmd.Context()
			show := newStages(cmd.ErrOrStderr())
			defer show.end()
			disk, err := oci.OpenWhole(data, args[0], image.open.Architecture, s, bytes)
			if err == nil && disk == nil {
				disk, err = openLazyDisk(cmd, args[0], data, image.open, oci.LazyOptions{
					Settings: s, Limits: limits, Background: background, Progress: show.oci, Logger: logger(ctx), Disk: oci.DiskOptions{Size: bytes},
				}, blueprint.Config{Cache: cache, Mirror: mirror, Progress: show.blueprint, Logger: logger(ctx)})
			}
			if err != nil {
				return interrupted(cmd, err)
			}
			defer func() { err = errors.Join(err, disk.Close()) }()
			mount, err := expose.MountFUSE(dir, []expose.Export{{Name: vmpackage.DefaultFile(ociDevice), Device: disk, ReadOnly: true, Modified: disk.Since}}, expose.FUSEOptions{Logger: logger(ctx)})
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, mount.Close()) }()
			show.end()
			fmt.Fprintf(cmd.ErrOrStderr(), "Mounted %s at %s: %s of its files are still to come\n", args[0], filepath.Join(dir, vmpackage.DefaultFile(ociDevice)), humanize.IBytes(uint64(disk.Missing())))
			<-ctx.Done()
			return nil
		},
	}
	flags := cmd.Flags()
	image.register(flags)
	settings.register(flags, true)
	flags.StringVar(&data, "data", "", "`folder` for what has come (default: DIR.data)")
	flags.StringVar(&size, "size", "", "size of the disk, such as 2G (default: what the image takes, and 0.5 GiB or more)")
	registerBackground(flags, &background)
	registerTools(flags, &cache, &mirror)
	return cmd
}

// openLazyDisk opens the disk of an image in a registry, in the folder data.
func openLazyDisk(cmd *cobra.Command, image, data string, open oci.OpenOptions, opts oci.LazyOptions, bring blueprint.Config) (*oci.LazyDisk, error) {
	tools, err := blueprint.OpenTools(cmd.Context(), bring)
	if err != nil {
		return nil, err
	}
	opts.Disk.Mke2fs, opts.Disk.Debugfs = tools.Mke2fs, tools.Debugfs
	i, err := oci.Open(cmd.Context(), image, open)
	if err != nil {
		return nil, err
	}
	defer i.Close()
	return i.LazyDisk(cmd.Context(), data, opts)
}

// registerBackground has the flag for how much of a lazy disk is fetched behind.
func registerBackground(flags *pflag.FlagSet, background *int) {
	flags.IntVar(background, "background", 2, "requests at a time for what of the image nobody has asked for (-1: none)")
}

// lockMount takes the folder of a lazy disk, and writes down who has it.
func lockMount(data string) (unlock func(), err error) {
	f, err := os.OpenFile(filepath.Join(data, mountLock), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	// Whoever only looks has it for a moment.
	for attempt := 1; ; attempt++ {
		if err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err == nil {
			break
		}
		if attempt == 20 {
			return nil, errors.Join(fmt.Errorf("folder %q is in use by another drafter oci mount: end that, or give another --data", data), f.Close())
		}
		time.Sleep(50 * time.Millisecond)
	}
	if err := errors.Join(f.Truncate(0), writeAt(f, fmt.Sprintln(os.Getpid()))); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return func() { f.Close() }, nil
}

func writeAt(f *os.File, text string) error {
	_, err := f.WriteAt([]byte(text), 0)
	return err
}

// mounterOf finds who serves a lazy disk; 0: nobody does.
func mounterOf(data string) (pid int, err error) {
	f, err := os.Open(filepath.Join(data, mountLock))
	if errors.Is(err, os.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB); err == nil {
		return 0, nil
	}
	text, err := io.ReadAll(io.LimitReader(f, 32))
	if err != nil {
		return 0, err
	}
	if pid, err = strconv.Atoi(strings.TrimSpace(string(text))); err != nil {
		return 0, nil // it has not written it yet
	}
	return pid, nil
}

// ociRun are the flags of oci run, beside those of a peer.
type ociRun struct {
	image         imageFlags
	setting       settingFlags
	memory, size  string
	cpuCount      int
	mac           string
	blueprintDir  string
	agent         string
	background    int
	cache, mirror string
}

// runRecord is kept in an instance's folder: an instance goes on with the disk that it was begun with.
type runRecord struct {
	Image string   `json:"image"` // as it was asked for
	Disk  []string `json:"disk"`  // the command line of its disk, with the image by its digest
}

func newOCIRunCommand() *cobra.Command {
	peer := peerOptions{}
	peer.ofImage = true
	run := ociRun{}
	cmd := peerCommand(&peer, &cobra.Command{
		Use:   "run IMAGE",
		Short: "Boot a VM that runs an image of a registry, before the image has been fetched",
		Long: `Boot a VM that runs an image, from a registry, while it is being fetched: what the guest reads of it comes first, and the rest behind ('drafter oci mount').
What the guest changes is in the folder --instance; the same command goes on with that. Everything else is as of 'drafter peer', and so the VM can be
sent to another one.

A package starts faster, as its application serves already: 'drafter oci build' makes one, 'drafter push' and 'drafter run' ship it.

Exit statuses: as of drafter peer.`,
		Example: `  drafter oci run --netns ark0 --memory 512M registry.example/app:1
  drafter oci run --netns ark0 --instance out/app-2 --laddr localhost:1337 registry.example/app:1`,
		Args: oneImage,
	})
	for _, name := range append([]string{"boot", "clone", "host-name", "guest-mac", "guest-address", "guest-gateway", "guest-interface", "record-working-set", "registry-ca", "platform"}, notOfRun...) {
		cmd.Flags().Lookup(name).Hidden = true
	}
	flags := cmd.Flags()
	run.image.register(flags)
	run.setting.register(flags, true)
	flags.Lookup("env").Usage = "`NAME=VALUE` for the application's environment (repeatable)"
	flags.Lookup("instance").Usage = "folder for the instance (default: out/instance-NAME)"
	flags.StringVar(&run.memory, "memory", "1G", "memory of the machine, such as 512M")
	flags.StringVar(&run.size, "size", "", "size of the image's disk, such as 2G (default: what the image takes, and 0.5 GiB or more)")
	flags.IntVar(&run.cpuCount, "cpu-count", 1, "virtual CPUs")
	flags.StringVar(&run.mac, "mac", "02:0e:d9:fd:68:3d", "MAC address of the guest's interface")
	flags.StringVar(&run.blueprintDir, "blueprint", "", "`folder` of the guest's blueprint, to be used as it is (default: out/blueprint-oci, made or brought up to date)")
	flags.StringVar(&run.agent, "agent", "", "`path` of the guest's program, for the blueprint (default drafter-agent beside this program, else in PATH)")
	registerBackground(flags, &run.background)
	registerTools(flags, &run.cache, &run.mirror)
	cmd.RunE = func(cmd *cobra.Command, args []string) error { return runImage(cmd, peer, run, args[0]) }
	return cmd
}

// diskFlags are those of oci run that are oci mount's, too.
var diskFlags = []string{"architecture", "plain-http", "max-size", "max-entries", "mount", "hostname", "name", "restart", "ready", "read-only", "entrypoint", "cmd", "user", "workdir", "size", "cache", "mirror"}

// runImage is oci run.
func runImage(cmd *cobra.Command, opts peerOptions, run ociRun, image string) (err error) {
	flags := cmd.Flags()
	for _, name := range []string{"registry-ca", "platform"} {
		if flags.Changed(name) {
			return usageErrorf("--%s is for packages in registries: use SSL_CERT_FILE for certificates, and --architecture", name)
		}
	}
	for _, name := range notOfRun {
		if flags.Changed(name) {
			return usageErrorf("--%s says where else an instance comes from: leave it out, or use drafter peer", name)
		}
	}
	run.setting.settings.Env, opts.env = opts.env, nil
	run.image.open.PlainHTTP = opts.registry.plainHTTP
	s, err := run.setting.read()
	if err != nil {
		return err
	}
	if len(s.Volumes()) > 0 {
		return usageErrorf("--mount: volume %q: an image that is run at once has no disk for it: build a package ('drafter oci build'), or mount a tmpfs", s.Volumes()[0].Source)
	}
	dir := opts.instance
	if dir == "" {
		name, _, _ := strings.Cut(filepath.Base(image), "@")
		name, _, _ = strings.Cut(name, ":")
		dir = filepath.Join("out", "instance-"+name)
		fmt.Fprintf(cmd.ErrOrStderr(), "Instance folder: %s\n", dir)
	}
	opts.instance = ""
	build := buildOptions{machineFlags: opts.machineFlags, image: run.image, memory: run.memory, cpuCount: run.cpuCount, mac: run.mac, blueprintDir: run.blueprintDir, agent: run.agent, cache: run.cache, mirror: run.mirror}
	memory, _, err := build.checkPackage(s, dir)
	if err != nil {
		return err
	}

	// One command has an instance at a time, and so its image.
	release, err := takeFolder(dir, "--instance")
	if err != nil {
		return err
	}
	defer release()

	var disk []string
	for _, name := range diskFlags {
		if f := flags.Lookup(name); f.Changed {
			disk = append(disk, flagWords(f)...)
		}
	}
	for _, env := range s.Env {
		disk = append(disk, "--env="+env)
	}
	record, begun, err := run.record(cmd, dir, image, disk)
	if err != nil {
		return err
	}
	stop, err := startMount(cmd, dir, record, run.background)
	if err != nil {
		return interrupted(cmd, err)
	}
	defer stop()

	if !begun {
		if err := beginRun(cmd, opts, build, dir, memory); err != nil {
			return interrupted(cmd, err)
		}
		if err := writeRecord(dir, record); err != nil { // the instance is there from now on
			return err
		}
	}
	status, err := recordedStatus(filepath.Join(dir, vmpackage.DefaultFile(runner.StateDevice)))
	if err != nil {
		return err
	}
	opts.boot = opts.boot || status == runner.ShutDown
	opts.devices = runDevices(dir)
	return runPeer(cmd, opts)
}

// record is that of the folder, or what it will be, with the image pinned.
func (r *ociRun) record(cmd *cobra.Command, dir, image string, disk []string) (rec runRecord, begun bool, err error) {
	text, err := os.ReadFile(filepath.Join(dir, runRecordFile))
	if err == nil {
		if err := json.Unmarshal(text, &rec); err != nil {
			return rec, false, fmt.Errorf("read %q: %w", filepath.Join(dir, runRecordFile), err)
		}
		if rec.Image != image || len(rec.Disk) == 0 || !slices.Equal(rec.Disk[1:], disk) {
			return rec, false, fmt.Errorf("instance %q is of image %s, begun with the flags %q: give the same with the same values, or another --instance", dir, rec.Image, flagNames(rec.Disk[1:]))
		}
		return rec, true, nil
	}
	if !errors.Is(err, os.ErrNotExist) {
		return rec, false, err
	}
	i, err := oci.Open(cmd.Context(), image, r.image.open)
	if err != nil {
		return rec, false, interrupted(cmd, err)
	}
	defer i.Close()
	pinned, err := i.Pinned()
	if err != nil {
		return rec, false, err
	}
	return runRecord{Image: image, Disk: append([]string{pinned}, disk...)}, false, nil
}

const runRecordFile = "image.json"

func writeRecord(dir string, rec runRecord) error {
	text, err := json.MarshalIndent(rec, "", "\t")
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, runRecordFile+".new"), append(text, '\n'), 0o600)
	}
	if err == nil {
		err = os.Rename(filepath.Join(dir, runRecordFile+".new"), filepath.Join(dir, runRecordFile))
	}
	return err
}

// takeFolder makes an instance's folder, which flag has named, and takes it for this process. Release removes it if it is empty.
func takeFolder(dir, flag string) (release func(), err error) {
	made, err := runner.MakeFolders(dir, 0o700)
	var lock *os.File
	if err == nil {
		lock, err = runner.LockFolder(dir, unix.LOCK_EX|unix.LOCK_NB)
	}
	if err == nil {
		return func() { // in this order: nobody takes what is being removed
			runner.RemoveFolders(made)
			lock.Close()
		}, nil
	}
	runner.RemoveFolders(made)
	if errors.Is(err, unix.EWOULDBLOCK) || errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("folder %q is in use by another command: end that, or name another folder (%s)", dir, flag)
	}
	return nil, fmt.Errorf("take folder %q: %w", dir, err)
}

// imageMount is where an instance's image is shown, and imageData where what has come of it is.
func imageMount(dir string) string { return filepath.Join(dir, "image") }
func imageData(dir string) string  { return filepath.Join(dir, "image.data") }

// startMount has another process serve the image's disk: one that served a file to itself could not be killed. What a killed command has left serving goes on. stop ends
// it.
func startMount(cmd *cobra.Command, dir string, rec runRecord, background int) (stop func(), err error) {
	disk := filepath.Join(imageMount(dir), vmpackage.DefaultFile(ociDevice))
	if pid, err := mounterOf(imageData(dir)); err != nil {
		return nil, err
	} else if pid > 0 {
		if err := canRead(disk); err != nil {
			return nil, fmt.Errorf("image of instance %q: process %d serves it, and it cannot be read: end that process: %w", dir, pid, err)
		}
		return adoptMount(cmd, pid, imageData(dir), rec)
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	args := append([]string{"oci", "mount", "--data=" + imageData(dir), fmt.Sprint("--background=", background)}, rec.Disk[1:]...)
	child := exec.Command(self, append(args, "--", rec.Disk[0], imageMount(dir))...)
	child.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // Ctrl-C is for this process, which still needs the disk then
	stderr, err := child.StderrPipe()
	if err != nil {
		return nil, err
	}
	if err := child.Start(); err != nil {
		return nil, fmt.Errorf("start drafter oci mount: %w", err)
	}
	ended := make(chan struct{})
	go func() { // until the child ends
		defer close(ended)
		for lines := bufio.NewScanner(stderr); lines.Scan(); {
			fmt.Fprintln(cmd.ErrOrStderr(), lines.Text())
		}
		_ = child.Wait()
	}()
	ending := make(chan struct{})
	end := func() {
		close(ending)
		_ = child.Process.Signal(syscall.SIGTERM)
		<-ended
	}
	for {
		// Of what a mount was whose process is dead, the kernel still says that it is there.
		if pid, err := mounterOf(imageData(dir)); err == nil && pid == child.Process.Pid && canRead(disk) == nil {
			go func() { // until the child ends
				select {
				case <-ending:
				case <-ended:
					imageGone(cmd, rec)
				}
			}()
			return end, nil
		}
		select {
		case <-ended:
			return nil, fmt.Errorf("the disk of image %s could not be mounted", rec.Image)
		case <-cmd.Context().Done():
			end()
			return nil, cmd.Context().Err()
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// imageGone says that nobody serves an image any more that a guest has.
func imageGone(cmd *cobra.Command, rec runRecord) {
	logger(cmd.Context()).Error("the process that serves the image has ended: the guest cannot read what it has not read before; end this command, and give it again", "image", rec.Image)
}

// adoptMount takes over what a command that was killed has left serving an image. stop ends it.
func adoptMount(cmd *cobra.Command, pid int, data string, rec runRecord) (stop func(), err error) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, fmt.Errorf("take over process %d, which serves the image: %w: give the command again", pid, err)
	}
	// It still has the lock, so the descriptor is of no other process that has got its number since.
	if now, err := mounterOf(data); err != nil || now != pid {
		return nil, errors.Join(fmt.Errorf("process %d, which served the image, has ended just now: give the command again", pid), err, unix.Close(fd))
	}
	ended, ending := make(chan struct{}), make(chan struct{})
	go func() { // until it ends
		defer close(ended)
		for {
			n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, -1)
			if n > 0 || err != nil && !errors.Is(err, unix.EINTR) {
				break
			}
		}
		select {
		case <-ending:
		default:
			imageGone(cmd, rec)
		}
	}()
	return func() {
		close(ending)
		_ = unix.PidfdSendSignal(fd, unix.SIGTERM, nil, 0) // it may have ended
		<-ended
		_ = unix.Close(fd)
	}, nil
}

// canRead looks whether a file can be read.
func canRead(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	_, err = f.ReadAt(make([]byte, 512), 1024) // the superblock, which is never missing
	return errors.Join(err, f.Close())
}

// runBlueprint is where an instance has the files of its blueprint, which stay what they are when the blueprint becomes another.
func runBlueprint(dir string) string { return filepath.Join(dir, "blueprint") }

// beginRun makes what an instance has of its own: the blueprint's files, and state, memory and configuration of a VM that has never run.
func beginRun(cmd *cobra.Command, opts peerOptions, build buildOptions, dir string, memory int64) error {
	backend, _, err := opts.backend(cmd)
	if err != nil {
		return err
	}
	show := newStages(cmd.ErrOrStderr())
	defer show.end()
	base, err := build.blueprint(cmd, show)
	if err != nil {
		return err
	}
	var devices []snapshot.Device
	for _, d := range runFiles(dir) {
		devices = append(devices, snapshot.Device{Name: d.Name, Output: d.Base})
		if filepath.Dir(d.Base) == runBlueprint(dir) {
			if err := keepFile(cmd.Context(), filepath.Join(base, filepath.Base(d.Base)), d.Base); err != nil {
				return err
			}
		}
	}
	_, err = snapshot.Create(cmd.Context(), snapshot.Config{
		Backend: backend, Devices: devices, CPUCount: build.cpuCount, MemorySize: memory, Accel: build.accel, MAC: build.mac,
		LivenessVSockPort: snapshot.DefaultLivenessVSockPort, AgentVSockPort: snapshot.DefaultAgentVSockPort, Unbooted: true, Logger: logger(cmd.Context()),
	})
	return err
}

// keepFile has a file under another name, too: the same one where that can be, or a copy.
func keepFile(ctx context.Context, from, to string) error {
	if err := os.MkdirAll(filepath.Dir(to), 0o700); err != nil {
		return err
	}
	if err := os.Remove(to); err != nil && !errors.Is(err, os.ErrNotExist) { // of an instance that was not begun in the end
		return err
	}
	err := os.Link(from, to)
	if errors.Is(err, unix.EXDEV) || errors.Is(err, unix.EPERM) {
		return copyFile(ctx, from, to)
	}
	return err
}

func copyFile(ctx context.Context, from, to string) error {
	f, err := block.OpenFile(from, block.FileOptions{ReadOnly: true})
	if err != nil {
		return err
	}
	return errors.Join(block.ReplaceFile(ctx, to, f), f.Close())
}

// runDevice is a device as --devices has it.
type runDevice struct {
	Name    string `json:"name"`
	Base    string `json:"base"`
	Overlay string `json:"overlay,omitempty"`
	State   string `json:"state,omitempty"`
}

// runFiles are the devices of an instance of an image: those of the blueprint, the image, and its own.
func runFiles(dir string) []runDevice {
	var devices []runDevice
	for _, name := range vmpackage.KnownNames() {
		d := runDevice{Name: name, Base: filepath.Join(runBlueprint(dir), vmpackage.DefaultFile(name))}
		switch name {
		case runner.StateDevice, runner.MemoryDevice, runner.ConfigDevice:
			d.Base = filepath.Join(dir, vmpackage.DefaultFile(name))
		case ociDevice:
			d.Base = filepath.Join(imageMount(dir), vmpackage.DefaultFile(name))
		}
		devices = append(devices, d)
	}
	return devices
}

// runDevices are the same as --devices has them: what is not the instance's own gets an overlay.
func runDevices(dir string) string {
	devices := runFiles(dir)
	for i, d := range devices {
		if filepath.Dir(d.Base) != dir {
			devices[i].Overlay, devices[i].State = filepath.Join(dir, "overlay", filepath.Base(d.Base)), filepath.Join(dir, "state", filepath.Base(d.Base))
		}
	}
	b, _ := json.Marshal(devices) // strings only: cannot fail
	return string(b)
}

// recordedStatus is what a state device says of its instance.
func recordedStatus(path string) (runner.Status, error) {
	f, err := block.OpenFile(path, block.FileOptions{ReadOnly: true})
	if err != nil {
		return 0, err
	}
	defer f.Close()
	r, err := runner.ReadRecord(f)
	return r.Status, err
}

// flagNames are those of a command line, without their values, which may be secrets.
func flagNames(line []string) []string {
	var names []string
	for _, word := range line {
		name, _, _ := strings.Cut(word, "=")
		names = append(names, name)
	}
	return names
}

// flagWords are a flag as it stands on a command line, again for each of its values.
func flagWords(f *pflag.Flag) []string {
	if list, ok := f.Value.(pflag.SliceValue); ok {
		var words []string
		for _, v := range list.GetSlice() {
			words = append(words, "--"+f.Name+"="+v)
		}
		return words
	}
	return []string{"--" + f.Name + "=" + f.Value.String()}
}
