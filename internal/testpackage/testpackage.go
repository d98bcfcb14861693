// Package testpackage makes a package of the guest of package testguest, whose agent and services run, for tests and examples of what
// is done with packages.
package testpackage

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/drafter-vm/drafter/internal/testguest"
	"github.com/drafter-vm/drafter/pkg/runner"
	"github.com/drafter-vm/drafter/pkg/snapshot"
	"github.com/drafter-vm/drafter/pkg/vmm/qemu"
	"github.com/drafter-vm/drafter/pkg/vmpackage"
)

// Config is what is in the package.
type Config struct {
	// Files are more files in the guest: paths there, and paths here. /bin/drafter-agent is there anyway.
	Files map[string]string

	// Spawn are command lines that run in the guest, beside its agent and liveness.
	Spawn []string
}

// WhyNot says why no package can be made on this host, or that it can: "".
func WhyNot() string {
	if os.Getuid() != 0 {
		return "needs root: userfaultfd in another process"
	}
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		return err.Error()
	}
	return ""
}

// Make makes a package in the folder dir, which must not exist: one CPU, 128 MiB of memory, a blank disk of 16 MiB, no network.
func Make(ctx context.Context, dir string, cfg Config) (err error) {
	temp, err := os.MkdirTemp("", "dr")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(temp)) }()
	agent := filepath.Join(temp, "drafter-agent")
	if err := Build(ctx, ".", "github.com/drafter-vm/drafter/cmd/drafter-agent", agent); err != nil {
		return err
	}
	files := map[string]string{"/bin/drafter-agent": agent}
	maps.Copy(files, cfg.Files)
	kernel, initrd, err := testguest.Make(ctx, files)
	if err != nil {
		return err
	}
	blank := filepath.Join(temp, "blank")
	if err := errors.Join(os.WriteFile(blank, nil, 0o600), os.Truncate(blank, 16<<20)); err != nil {
		return err
	}
	console, err := testguest.NewConsole()
	if err != nil {
		return err
	}
	defer console.Close()
	ctx, cancel := context.WithCancelCause(ctx)
	started := make(chan error, 1)
	go func() { // waited for below
		err := startServices(ctx, console, cfg.Spawn)
		if err != nil {
			cancel(err)
		}
		started <- err
	}()
	out := func(name string) string { return filepath.Join(dir, vmpackage.DefaultFile(name)) }
	_, err = snapshot.Create(ctx, snapshot.Config{
		Backend: qemu.New(qemu.Options{}), MemorySize: 128 << 20, BootArgs: "console=ttyS0 quiet panic=-1 testguest.channel=off",
		Devices: []snapshot.Device{
			{Name: "state", Output: out("state")}, {Name: "memory", Output: out("memory")}, {Name: "config", Output: out("config")},
			{Name: "kernel", Input: kernel, Output: out("kernel")}, {Name: "initrd", Input: initrd, Output: out("initrd")},
			{Name: "disk", Input: blank, Output: out("disk")},
		},
		LivenessVSockPort: snapshot.DefaultLivenessVSockPort, AgentVSockPort: snapshot.DefaultAgentVSockPort,
		Host: runner.Host{Dir: filepath.Join(temp, "vms"), SerialOutput: console, SerialInput: console.Input()},
	})
	cancel(err)
	if e := <-started; err == nil {
		err = e
	}
	if err != nil {
		return fmt.Errorf("make a package: %w\nthe guest's console:\n%s", err, console.Log())
	}
	return nil
}

// Build builds a static program, as a guest needs it, of the module in the folder dir.
func Build(ctx context.Context, dir, source, to string) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", to, source)
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build %s: %w\n%s", source, err, out)
	}
	return nil
}

// startServices does what the init system of a blueprint does.
func startServices(ctx context.Context, console *testguest.Console, more []string) error {
	if err := console.Ready(ctx); err != nil {
		return err
	}
	commands := []string{"/bin/drafter-agent vsock", "/bin/drafter-agent agent"}
	for _, command := range append(append(commands, more...), "/bin/drafter-agent liveness") {
		if _, err := console.Do(ctx, "spawn "+command); err != nil {
			return fmt.Errorf("%s: %w", command, err)
		}
	}
	return nil
}
