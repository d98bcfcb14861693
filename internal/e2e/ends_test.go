package e2e

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/drafter-vm/drafter/pkg/vmpackage"
)

// gone fails the test if there is anything at path.
func gone(t *testing.T, path string) {
	t.Helper()
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is left (%v)", path, err)
	}
}

// verify checks everything the guest can know of what became of it, and lets it go on.
func (w *workshop) verify(t *testing.T) {
	t.Helper()
	w.do(t, "mem stop")
	w.do(t, "mem verify")
	last := w.do(t, "disk disk verify")
	w.do(t, "mem go")
	w.do(t, "disk disk start 512 "+last)
}

// TestCommandTerminator moves a VM that works from a peer into a package, and resumes that.
func TestCommandTerminator(t *testing.T) {
	w := newWorkshop(t)
	w.snapshot(t, "package").wait(t, 0)
	source := w.start(t, w.console, w.peer("package", "instance", "--laddr", "127.0.0.1:0")...)
	addr := source.waitFor(t, "Serving on ")
	w.do(t, "mem start 48")
	w.do(t, "disk disk start 512")
	failures := 0
	runsOn := func(t *testing.T) {
		t.Helper()
		failures++
		source.waitForCount(t, "the VM runs on here", failures)
		w.verify(t)
	}

	t.Run("existing folder", func(t *testing.T) {
		said := w.start(t, nil, "terminator", "--raddr", addr, "--package", w.path("package")).wait(t, 1)
		if !strings.Contains(said, "nothing is overwritten") {
			t.Errorf("the message does not say why:\n%s", said)
		}
		w.verify(t) // the source was not even asked
	})
	t.Run("no space", func(t *testing.T) {
		small := w.mountSmall(t, "20m")
		said := w.start(t, nil, "terminator", "--raddr", addr, "--package", small+"/a/b").wait(t, 1)
		if !strings.Contains(said, "no space left") {
			t.Errorf("the message does not say what failed:\n%s", said)
		}
		runsOn(t)
		gone(t, small+"/a")
	})
	for _, tt := range []struct {
		name string
		sig  syscall.Signal
		at   int64 // bytes
		rc   int
	}{{"interrupted at once", syscall.SIGINT, 2 << 10, 130}, {"interrupted", syscall.SIGTERM, 24 << 20, 130}, {"killed", syscall.SIGKILL, 24 << 20, -1}} {
		t.Run(tt.name, func(t *testing.T) {
			tap := newTap(t, addr, tt.at)
			c := w.start(t, nil, "terminator", "--raddr", tap.addr, "--package", w.path("broken"))
			select {
			case <-tap.reached:
			case <-c.done:
				t.Fatalf("the terminator ended before:\n%s", c.said())
			}
			c.Process.Signal(tt.sig)
			c.wait(t, tt.rc)
			tap.close()
			runsOn(t)
			if tt.sig != syscall.SIGKILL {
				gone(t, w.path("broken"))
				return
			}
			// What a killed one leaves is no package.
			if _, err := vmpackage.Open(w.path("broken")); !errors.Is(err, vmpackage.ErrNotPackage) {
				t.Errorf("a killed terminator left something that opens as a package (%v)", err)
			}
			os.RemoveAll(w.path("broken"))
		})
	}

	t.Run("devices that do not match", func(t *testing.T) {
		out := func(name string) string {
			return `{"name":"` + name + `","output":"` + filepath.Join(w.path("some"), name) + `"}`
		}
		for _, tt := range []struct{ devices, want string }{
			{"[" + out("state") + "," + out("memory") + "," + out("disk") + "," + out("config") + "]", "none of that name is configured"},
			{"[" + out("state") + "," + out("memory") + "," + out("disk") + "," + out("kernel") + "," + out("initrd") + "," + out("data") + "]", `"data" is configured at the destination, and is not sent`},
		} {
			said := w.start(t, nil, "terminator", "--raddr", addr, "--devices", tt.devices).wait(t, 1)
			if !strings.Contains(said, tt.want) {
				t.Errorf("the message does not say %q:\n%s", tt.want, said)
			}
			runsOn(t)
			gone(t, w.path("some"))
		}
	})

	c := w.start(t, nil, "terminator", "--raddr", addr, "--package", w.path("written"), "--report", w.path("report"))
	c.waitFor(t, "Wrote VM to "+w.path("written"))
	c.wait(t, 0)
	source.waitFor(t, "Sent VM")
	source.wait(t, 0)
	w.checkClean(t)
	if b, err := os.ReadFile(w.path("report")); err != nil || !strings.Contains(string(b), `"outcome":"running"`) {
		t.Errorf("the report: %s, %v", b, err)
	}
	if said := w.start(t, nil, w.peer("package", "instance")...).wait(t, 1); !strings.Contains(said, "moved") {
		t.Errorf("the source's instance does not say that it moved:\n%s", said)
	}

	// As a package for many, and as the VM itself.
	clone := w.start(t, w.console, w.peer("written", "clone", "--verify")...)
	clone.waitFor(t, "Resumed VM")
	w.verify(t)
	clone.Process.Signal(syscall.SIGTERM)
	clone.wait(t, 0)
	again := w.start(t, w.console, w.peer("written", "")...)
	again.waitFor(t, "Resumed VM")
	w.verify(t)
	again.Process.Signal(syscall.SIGTERM)
	again.wait(t, 0)
	w.checkClean(t)
}
