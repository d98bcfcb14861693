package e2e

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestCommandAdopt kills peers, at rest, under load and at many moments, and starts them again: each adopts its machine, and
// the guest has noticed nothing.
func TestCommandAdopt(t *testing.T) {
	t.Parallel()
	w := newWorkshop(t)
	w.pack(t)
	w.checkClean(t)
	kill := func(t *testing.T, c *command) {
		t.Helper()
		c.Process.Kill()
		c.wait(t, -1, 0) // 0: it had ended already
	}
	start := func(want string, more ...string) *command { // of the whole test, so that subtests leave it alive
		t.Helper()
		c := w.start(t, w.console, w.peer("package", "instance", more...)...)
		if want != "" {
			c.waitFor(t, want)
		}
		return c
	}
	// check checks everything the guest can know of what became of it.
	check := func(t *testing.T) {
		t.Helper()
		w.do(t, "mem stop")
		w.do(t, "mem verify")
		last := w.do(t, "disk disk verify")
		w.do(t, "mem go")
		w.do(t, "disk disk start 4096 "+last)
		if log := w.console.Log(); strings.Contains(log, "I/O error") {
			t.Error("the guest saw an I/O error")
		}
	}
	hooks := func(t *testing.T) {
		t.Helper()
		told, err := strconv.Unquote(w.do(t, "cat /hooks"))
		if err != nil {
			t.Fatal(err)
		}
		if n := strings.Count(told, "[before][after]"); n*len("[before][after]") != len(told) {
			t.Errorf("the guest was told %s", told)
		}
	}

	c := start("Resumed VM")
	machine := machinePID(t, c)

	t.Run("standing still", func(t *testing.T) {
		// As a peer leaves it that held it back, or had to wait for a source that was away. It is that peer's child still.
		syscall.Kill(machine, syscall.SIGSTOP)
		for ctx := newContext(t); !stopped(t, machine); w.pass(c, 1) {
			if ctx.Err() != nil {
				t.Fatal("the machine does not stop")
			}
		}
		kill(t, c)
		c = start("Adopted VM on ")
		w.do(t, "echo hello")
		if !running(machine) {
			t.Error("the machine is another one")
		}
	})

	t.Run("at rest", func(t *testing.T) {
		for range 2 {
			kill(t, c)
			c = start("Adopted VM on ")
			w.do(t, "echo hello")
			hooks(t)
		}
	})
	w.do(t, "mem start 64")
	w.do(t, "disk disk start 4096")

	t.Run("under load", func(t *testing.T) {
		for range 4 {
			kill(t, c)
			c = start("Adopted VM on ")
			check(t)
		}
		hooks(t)
		if !running(machine) {
			t.Error("the machine is another one")
		}
	})

	t.Run("another hypervisor", func(t *testing.T) {
		kill(t, c)
		other := w.start(t, w.console, w.peer("package", "instance", "--hypervisor", "firecracker")...)
		other.wait(t, 1)
		if said := other.said(); !strings.Contains(said, `is of hypervisor "qemu", and "firecracker" was asked for`) || strings.Contains(said, "kill -9") {
			t.Errorf("it says:\n%s", said)
		}
		c = start("Adopted VM on ")
		check(t)
	})

	t.Run("flags of the machine", func(t *testing.T) {
		kill(t, c)
		c = start("Adopted VM on ", "--chroot-base-dir", w.path("elsewhere"))
		check(t)
	})

	t.Run("closing", func(t *testing.T) {
		for _, after := range sample[time.Duration](t, 5, 20, 40, 80, 160, 320) {
			c.Process.Signal(syscall.SIGTERM)
			w.pass(c, after)
			kill(t, c)
			c = start(" VM ")
			check(t)
			hooks(t)
		}
	})

	t.Run("starting", func(t *testing.T) {
		for _, after := range sample[time.Duration](t, 0, 10, 20, 30, 40, 50, 60, 70, 80, 100, 120, 150, 200, -1) {
			c.Process.Signal(syscall.SIGTERM)
			c.wait(t, 0)
			w.checkClean(t)
			c = start("")
			if after < 0 {
				c.waitFor(t, "Resumed VM") // and memory is being filled
			} else {
				w.pass(c, after)
			}
			kill(t, c)
			c = start(" VM ")
			t.Logf("after %d ms: %s", after, strings.TrimSpace(c.said()))
			check(t)
			hooks(t)
			if t.Failed() {
				t.Fatalf("killed after %d ms", after)
			}
		}
	})

	t.Run("moves on", func(t *testing.T) {
		c.Process.Signal(syscall.SIGTERM)
		c.wait(t, 0)
		user := []string{"--uid", "65534", "--gid", "65533", "--cgroup-version", "0"}
		c = start("Resumed VM", user...)
		kill(t, c)
		c = start("Adopted VM on ", append(user, "--laddr", "127.0.0.1:0")...)
		addr := c.waitFor(t, "Serving on ")
		there := w.start(t, w.console, w.peer("package", "there", "--raddr", addr)...)
		there.waitFor(t, "Received VM")
		c.wait(t, 0)
		check(t)
		hooks(t)
		kill(t, there)
		// With the same command line: it has the VM, and asks nobody for it.
		there = w.start(t, w.console, w.peer("package", "there", "--raddr", addr)...)
		there.waitFor(t, "Adopted VM on ")
		check(t)
		hooks(t)
		there.Process.Signal(syscall.SIGTERM)
		there.wait(t, 0)
		w.checkClean(t)
	})

	t.Run("machine dies too", func(t *testing.T) {
		c := w.start(t, w.console, w.peer("package", "there")...)
		c.waitFor(t, "Resumed VM")
		machine := machinePID(t, c)
		kill(t, c)
		syscall.Kill(machine, syscall.SIGKILL)
		for _, more := range [][]string{nil, {"--raddr", "127.0.0.1:1"}} { // which there is no need to ask
			if said := w.start(t, nil, w.peer("package", "there", more...)...).wait(t, 1); !strings.Contains(said, "--boot") {
				t.Errorf("with %q the message does not offer --boot:\n%s", more, said)
			}
		}
		c = w.start(t, w.console, w.peer("package", "there", "--boot", "--resume-timeout", "2s")...)
		c.waitFor(t, "Booted VM") // and removes what the other has left
		c.Process.Signal(syscall.SIGTERM)
		c.wait(t, 0)
		w.checkClean(t)
		if _, err := os.Stat(w.path("elsewhere")); !errors.Is(err, os.ErrNotExist) {
			t.Error("a folder was made where nothing runs")
		}
	})
}

// pass lets some milliseconds pass: there is nothing to wait for, the moment is what is tested.
func (w *workshop) pass(c *command, ms time.Duration) {
	select {
	case <-time.After(ms * time.Millisecond):
	case <-c.done:
	}
}

// running reports whether a process exists.
func running(pid int) bool { return syscall.Kill(pid, 0) == nil }

// stopped reports whether all threads of a process are (proc(5), field 3 of stat).
func stopped(t *testing.T, pid int) bool {
	t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(stat), ") ")
	return strings.HasPrefix(rest, "T")
}
