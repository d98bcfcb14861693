package hosttest

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/drafter-vm/drafter/internal/testpackage"
	"github.com/drafter-vm/drafter/pkg/blueprint"
)

var long = flag.Bool("long", false, "run what takes from some minutes to hours")

// host is one that is emulated.
type host struct {
	t            *testing.T
	dir, program string // program is QEMU's
	log          string // what its script says
}

func newHost(t *testing.T) *host {
	t.Helper()
	h := &host{t: t, dir: t.TempDir()}
	t.Cleanup(func() {
		if *long && t.Skipped() {
			t.Error("nothing was run, and -long asks for it")
		}
	})
	var err error
	if h.program, err = exec.LookPath("qemu-system-x86_64"); err != nil {
		t.Skipf("SKIPPED, not tested: %v", err)
	}
	h.log = filepath.Join(h.dir, "log")
	if err := os.WriteFile(h.log, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	return h
}

// build builds a command that runs anywhere.
func (h *host) build(pkg string) string {
	h.t.Helper()
	path := filepath.Join(h.dir, filepath.Base(pkg))
	if err := testpackage.Build(h.t.Context(), ".", pkg, path); err != nil {
		h.t.Fatal(err)
	}
	return path
}

// blueprint makes what a host boots.
func (h *host) blueprint(cfg blueprint.Config) blueprint.Result {
	h.t.Helper()
	cfg.Output, cfg.Agent = filepath.Join(h.dir, "host"), h.build("../../cmd/drafter-agent")
	cfg.Copies = append(cfg.Copies, blueprint.Copy{Host: h.build("../../cmd/drafter"), Guest: "/usr/local/bin/drafter"})
	made, err := blueprint.Build(h.t.Context(), cfg)
	if err != nil {
		h.t.Fatal(err)
	}
	return made
}

// run boots a host with these options of QEMU, and waits for its end. Its second serial port is what its script says. Until then, beside is called with
// that, every now and then.
func (h *host) run(limit time.Duration, made blueprint.Result, beside func(said string), options ...string) (said string, err error) {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(h.t.Context(), limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, h.program, append([]string{"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-cpu", "max",
		"-M", "q35,usb=off,vmport=off,hpet=off", "-kernel", made.Kernel, "-initrd", made.Initrd,
		"-drive", "if=none,id=root,format=raw,file=" + made.Disk, "-device", "virtio-blk-pci,drive=root", "-serial", "null", "-serial", "file:" + h.log}, options...)...)
	done := make(chan error, 1)
	go func() {
		out, err := cmd.CombinedOutput()
		if err != nil {
			err = fmt.Errorf("the emulated host: %w: %s", err, out)
		}
		done <- err
	}()
	for {
		select {
		case err := <-done:
			if said = h.said(); beside != nil {
				beside(said)
			}
			return said, err
		case <-time.After(time.Second):
			if beside != nil {
				beside(h.said())
			}
		}
	}
}

func (h *host) said() string {
	h.t.Helper()
	text, err := os.ReadFile(h.log)
	if err != nil {
		h.t.Error(err)
	}
	return strings.ReplaceAll(string(text), "\r\n", "\n") // it is a terminal's
}

// bootArgs are of every emulated host's kernel.
const bootArgs = "console=ttyS0 quiet panic=-1 tsc=reliable no_timer_check"
