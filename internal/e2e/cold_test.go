package e2e

import (
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/runner"
	"github.com/drafter-vm/drafter/pkg/vmpackage"
)

// TestCommandShutDown makes a package without memory, and runs instances of it: they boot, are adopted, and shut down, and what the guest has written
// to its disk stays. They are neither snapshotted nor moved.
func TestCommandShutDown(t *testing.T) {
	t.Parallel()
	w := newWorkshop(t)
	args := w.snapshotter(t, "package", "--shut-down")
	var devices []map[string]string
	if err := json.Unmarshal([]byte(args[2]), &devices); err != nil {
		t.Fatal(err)
	}
	if said := w.start(t, nil, args...).wait(t, 1); !strings.Contains(said, `"memory" is configured, but a guest that is shut down has none`) {
		t.Errorf("it takes a memory that there will not be:\n%s", said)
	}
	devices = append(devices[:1], devices[2:]...)
	b, err := json.Marshal(devices)
	if err != nil {
		t.Fatal(err)
	}
	args[2] = string(b)
	c := w.start(t, w.console, args...)
	services := func() {
		t.Helper()
		if err := (&guest{console: w.console}).startServices(newContext(t)); err != nil {
			t.Fatalf("start the services: %v", err)
		}
	}
	services()
	c.wait(t, 0)
	w.checkClean(t)
	pkg, err := vmpackage.Open(w.path("package"))
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range pkg.Devices {
		if d.Name == vmpackage.Memory {
			t.Error("the package has a memory")
		}
	}

	t.Run("refused", func(t *testing.T) {
		for _, args := range [][]string{{"--laddr", "127.0.0.1:0"}, {"--raddr", "127.0.0.1:1"}, {"--accept", "127.0.0.1:0"}, {"--keep-commit-point"}, {"--rollback"}, {"--clone"}} {
			said := w.start(t, nil, w.peer("package", "instance", args...)...).wait(t, 2)
			if !strings.Contains(said, args[0]+` needs a device "memory"`) {
				t.Errorf("%s: it says\n%s", args[0], said)
			}
		}
		if _, err := os.Stat(w.path("instance")); !errors.Is(err, os.ErrNotExist) {
			t.Error("a refused peer has left an instance")
		}
		w.checkClean(t)
	})

	// boot starts an instance and its guest's services.
	control := w.path("control.sock")
	boot := func() *command {
		t.Helper()
		c := w.start(t, w.console, w.peer("package", "instance", "--control", control)...)
		services()
		c.waitFor(t, "Booted VM on")
		return c
	}
	c = boot()
	w.do(t, "disk disk write 4096 65536 7")
	sum := w.do(t, "disk disk sum 4096 65536")
	for _, verb := range [][]string{{"migrate", "127.0.0.1:1"}, {"snapshot", w.path("snapshot")}} {
		said := w.start(t, nil, append([]string{"ctl", "--control", control}, verb...)...).wait(t, 1)
		if !strings.Contains(said, `it has no device "memory"`) {
			t.Errorf("%s: it says\n%s", verb[0], said)
		}
	}
	if _, err := os.Stat(w.path("snapshot")); !errors.Is(err, os.ErrNotExist) {
		t.Error("a snapshot that was refused has left a folder")
	}
	// Its peer is killed, and the next one finds the guest as it was.
	if err := c.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	c.wait(t, -1)
	c = w.start(t, w.console, w.peer("package", "instance", "--control", control)...)
	c.waitFor(t, "Adopted VM on")
	if got := w.do(t, "disk disk sum 4096 65536"); got != sum {
		t.Errorf("the adopted guest reads %s, and wrote %s", got, sum)
	}
	w.start(t, nil, "ctl", "--control", control, "pause").wait(t, 0)
	c.Process.Signal(syscall.SIGTERM) // a guest that is paused goes on, to shut down
	if said := c.wait(t, 0); !strings.Contains(said, "the guest shuts down") {
		t.Errorf("it says\n%s", said)
	}
	w.checkClean(t)

	c = boot()
	if got := w.do(t, "disk disk sum 4096 65536"); got != sum {
		t.Errorf("after a shutdown the guest reads %s, and wrote %s", got, sum)
	}
	c.Process.Signal(syscall.SIGTERM)
	c.wait(t, 0)
	w.checkClean(t)

	// Of a guest that heeds nothing it is said that it was switched off, and a second signal does so at once.
	status := func() runner.Status {
		t.Helper()
		f, err := block.OpenFile(filepath.Join(w.path("instance"), "overlay", vmpackage.DefaultFile("state")), block.FileOptions{ReadOnly: true})
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		r, err := runner.ReadRecord(f)
		if err != nil {
			t.Fatal(err)
		}
		return r.Status
	}
	if got := status(); got != runner.ShutDown {
		t.Errorf("the record says %v of a guest that shut down", got)
	}
	for _, twice := range []bool{false, true} {
		timeout := "2s"
		if twice {
			timeout = "10m"
		}
		c = w.start(t, w.console, w.peer("package", "instance", "--resume-timeout", "1s", "--rescue-timeout", timeout)...)
		c.waitFor(t, "Booted VM on")
		c.Process.Signal(syscall.SIGTERM)
		c.waitFor(t, "Closing")
		if twice {
			c.Process.Signal(syscall.SIGTERM)
		}
		if said := c.wait(t, 1); !strings.Contains(said, "switched off") {
			t.Errorf("it says\n%s", said)
		}
		if got := status(); got != runner.Running {
			t.Errorf("the record says %v of a guest that was switched off", got)
		}
		w.checkClean(t)
	}

	// What has a memory, saved or living, is not booted because the memory is left out.
	t.Run("memory left out", func(t *testing.T) {
		w := newWorkshop(t)
		w.pack(t)
		var devices []map[string]string
		for _, name := range []string{"state", "kernel", "initrd", "disk", "config"} {
			devices = append(devices, map[string]string{"name": name, "base": filepath.Join(w.path("package"), vmpackage.DefaultFile(name))})
		}
		b, err := json.Marshal(devices)
		if err != nil {
			t.Fatal(err)
		}
		forgetful := []string{"peer", "--netns", "", "--chroot-base-dir", w.vms(), "--enable-input", "--devices", string(b)}
		if said := w.start(t, nil, forgetful...).wait(t, 1); !strings.Contains(said, `it is saved, with its memory, and no device "memory" is configured`) {
			t.Errorf("it says\n%s", said)
		}
		c := w.start(t, w.console, w.peer("package", "")...)
		c.waitFor(t, "Resumed VM")
		if err := c.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		c.wait(t, -1)
		if said := w.start(t, nil, forgetful...).wait(t, 1); !strings.Contains(said, `the machine was started with a device "memory": true`) {
			t.Errorf("it says\n%s", said)
		}
		c = w.start(t, w.console, w.peer("package", "")...)
		c.waitFor(t, "Adopted VM")
		w.do(t, "disk disk info")
		c.Process.Signal(syscall.SIGTERM)
		c.wait(t, 0)
		w.checkClean(t)
	})

	// Packed and unpacked, it is the same.
	var list []map[string]string
	for _, d := range pkg.Devices {
		list = append(list, map[string]string{"name": d.Name, "path": d.Path})
	}
	if b, err = json.Marshal(list); err != nil {
		t.Fatal(err)
	}
	w.start(t, nil, "packager", "--package-path", w.path("cold.tar.zst"), "--devices", string(b)).wait(t, 0)
	again := w.path("again")
	if err := os.Mkdir(again, 0o700); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("tar", "-xf", w.path("cold.tar.zst"), "-C", again).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if _, err := vmpackage.Verify(t.Context(), again, vmpackage.ExtractOptions{}); err != nil {
		t.Error(err)
	}
}
