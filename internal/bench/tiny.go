package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/drafter-vm/drafter/internal/testguest"
	"github.com/drafter-vm/drafter/pkg/runner"
	"github.com/drafter-vm/drafter/pkg/snapshot"
	"github.com/drafter-vm/drafter/pkg/vmm/qemu"
	"github.com/drafter-vm/drafter/pkg/vmpackage"
)

// The tiny guest is the one of internal/testguest: a kernel and one program that obeys commands on the console.

const (
	tinyBootArgs = "console=ttyS0 quiet panic=-1 testguest.channel=off"
	tinyDisk     = 16 * mib
	// guestWait bounds what a guest is asked to do: an emulated one on a busy machine is slow.
	guestWait = 3 * time.Minute
)

// needRoot is the same for all cases with machines.
func needRoot() error {
	if os.Geteuid() != 0 {
		return errors.New("needs root: it looks into the hypervisor's memory")
	}
	return nil
}

// tinyCase is a case that needs a package of the tiny guest.
func tinyCase(name, about string, f func(ctx context.Context, b *bench, name, pkg string) ([]Row, error)) benchCase {
	return benchCase{name: name, about: about, run: func(ctx context.Context, b *bench) ([]Row, error) {
		if err := needRoot(); err != nil {
			return nil, err
		}
		pkg, err := tinyPackage(ctx, b, slowdownMemory)
		if err != nil {
			return nil, err
		}
		return f(ctx, b, name, pkg)
	}}
}

// tinyPackage returns the folder of a package of the tiny guest with so much memory. What is up to date is kept.
func tinyPackage(ctx context.Context, b *bench, memory int64) (string, error) {
	return makeTiny(ctx, b, fmt.Sprintf("tiny-%d", memory/mib), memory, 0)
}

// makeTiny is tinyPackage of a guest with an agent at a port, or without one: 0.
func makeTiny(ctx context.Context, b *bench, name string, memory int64, agentPort uint32) (string, error) {
	dir := b.path("bench", name)
	vmlinux, initrd, err := tinyFiles(ctx, b)
	if err != nil {
		return "", err
	}
	// An initramfs is named after its contents, and used again: its age says nothing.
	stamp, madeOf := dir+".made-of", filepath.Base(initrd)
	if was, err := os.ReadFile(stamp); err == nil && string(was) == madeOf &&
		fresh(filepath.Join(dir, vmpackage.ManifestFile), filepath.Join(b.bin, "drafter")) {
		return dir, nil
	}
	b.say("boot a guest of %d MiB and write it down", memory/mib)
	console, err := testguest.NewConsole()
	if err != nil {
		return "", err
	}
	defer console.Close()
	blank := b.path("bench", "blank")
	if err := makeBlank(blank, tinyDisk); err != nil {
		return "", err
	}
	out := func(name string) string { return filepath.Join(dir, vmpackage.DefaultFile(name)) }
	ctx, cancel := context.WithTimeout(ctx, guestWait)
	defer cancel()
	started := make(chan error, 1)
	services := tinyServices
	if agentPort != 0 {
		services = agentServices
	}
	go func() { started <- startServices(ctx, console, services) }()
	_, err = snapshot.Create(ctx, snapshot.Config{
		Backend: qemu.New(qemu.Options{}), MemorySize: memory, BootArgs: tinyBootArgs, LivenessVSockPort: snapshot.DefaultLivenessVSockPort, AgentVSockPort: agentPort,
		Devices: []snapshot.Device{
			{Name: "state", Output: out("state")}, {Name: "memory", Output: out("memory")}, {Name: "config", Output: out("config")},
			{Name: "kernel", Input: vmlinux, Output: out("kernel")}, {Name: "initrd", Input: initrd, Output: out("initrd")},
			{Name: "disk", Input: blank, Output: out("disk")},
		},
		Host: b.tinyHost(console), ResumeTimeout: guestWait, Logger: quiet,
	})
	if err != nil {
		cancel()
	}
	if err := errors.Join(err, <-started); err != nil {
		return "", fmt.Errorf("make the package %q: %w", dir, err)
	}
	return dir, os.WriteFile(stamp, []byte(madeOf), 0o644)
}

// tinyFiles are its kernel and its initramfs.
func tinyFiles(ctx context.Context, b *bench) (vmlinux, initrd string, err error) {
	return testguest.Make(ctx, map[string]string{"/bin/drafter-agent": filepath.Join(b.bin, "drafter-agent")})
}

// What runs in the tiny guest, without an agent and with one. The host waits for liveness.
var (
	tinyServices  = []string{"/bin/drafter-agent vsock", "/bin/drafter-agent liveness"}
	agentServices = []string{"/bin/drafter-agent vsock", "/bin/drafter-agent agent", "/bin/drafter-agent liveness"}
)

// startServices does what the init system of a blueprint does.
func startServices(ctx context.Context, console *testguest.Console, services []string) error {
	if err := console.Ready(ctx); err != nil {
		return err
	}
	return spawnServices(ctx, console, services)
}

func spawnServices(ctx context.Context, console *testguest.Console, services []string) error {
	for _, command := range services {
		if _, err := console.Do(ctx, "spawn "+command); err != nil {
			return fmt.Errorf("%s: %w", command, err)
		}
	}
	return nil
}

func (b *bench) tinyHost(console *testguest.Console) runner.Host {
	return runner.Host{Dir: b.path("bench", "vms"), SerialOutput: console, SerialInput: console.Input()}
}

// makeBlank makes an empty disk.
func makeBlank(path string, size int64) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		return err
	}
	return os.Truncate(path, size)
}

// fresh reports whether a file is newer than all it was made of.
func fresh(path string, inputs ...string) bool {
	made, err := os.Stat(path)
	if err != nil {
		return false
	}
	for _, input := range inputs {
		info, err := os.Stat(input)
		if err != nil || info.ModTime().After(made.ModTime()) {
			return false
		}
	}
	return true
}

// overlays are the devices of a package, with overlays in a folder.
func overlays(pkg, folder string) ([]runner.DeviceConfig, error) {
	p, err := vmpackage.Open(pkg)
	if err != nil {
		return nil, err
	}
	var devices []runner.DeviceConfig
	for _, d := range p.Devices {
		devices = append(devices, runner.DeviceConfig{
			Name: d.Name, Base: d.Path, Overlay: filepath.Join(folder, "overlay", d.Name), State: filepath.Join(folder, "state", d.Name),
		})
	}
	return devices, nil
}

// guestDo asks a guest on its console.
func guestDo(ctx context.Context, console *testguest.Console, format string, args ...any) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, guestWait)
	defer cancel()
	return console.Do(ctx, fmt.Sprintf(format, args...))
}

// wait sleeps, or ends with ctx.
func wait(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// command runs a program to its end; its words are shown when it fails.
func command(ctx context.Context, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	var said strings.Builder
	cmd.Stdout, cmd.Stderr = io.Writer(&said), &said
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s %s: %w; it said:\n%s", filepath.Base(name), args[0], err, said.String())
	}
	return nil
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
