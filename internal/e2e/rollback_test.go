package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestCommandRollback kills VMMs whose guests have written to memory and disk since they were resumed or received, and has them
// return to that point.
func TestCommandRollback(t *testing.T) {
	t.Parallel()
	w := newWorkshop(t)
	w.pack(t)
	const keep, back = "--keep-commit-point", "--rollback"
	start := func(folder, want string, more ...string) *command {
		t.Helper()
		c := w.start(t, w.console, w.peer("package", folder, more...)...)
		c.waitFor(t, want)
		return c
	}
	closed := func(c *command) {
		t.Helper()
		c.Process.Signal(syscall.SIGTERM)
		c.wait(t, 0)
		w.checkClean(t)
	}
	// rest has the guest stop, and says where its memory and its disk are.
	rest := func() string {
		t.Helper()
		w.do(t, "mem stop")
		w.do(t, "disk disk stop")
		return w.do(t, "mem verify") + ", " + w.do(t, "disk disk verify")
	}
	// work has it go on from there, until it has written something.
	work := func() {
		t.Helper()
		w.do(t, "mem go")
		last := w.do(t, "disk disk verify")
		w.do(t, "disk disk start 4096 "+last)
		for ctx := newContext(t); ctx.Err() == nil && w.do(t, "disk disk status") == last; {
		}
	}
	// lose kills the VMM.
	lose := func(c *command, machine int) {
		t.Helper()
		syscall.Kill(machine, syscall.SIGKILL)
		if said := c.wait(t, 1); !strings.Contains(said, "the VM ended") {
			t.Errorf("the peer does not say what happened:\n%s", said)
		}
	}
	at := func(want string) {
		t.Helper()
		if got := w.do(t, "mem verify") + ", " + w.do(t, "disk disk verify"); got != want {
			t.Errorf("memory and disk are at %s, the commit point is %s", got, want)
		}
	}
	layers := func(folder string) []string {
		found, _ := filepath.Glob(w.path(folder) + "/*/*.since*")
		return found
	}
	refused := func(t *testing.T, folder string, args []string, want ...string) {
		t.Helper()
		said := w.start(t, nil, w.peer("package", folder, args...)...).wait(t, 1)
		for _, text := range want {
			if !strings.Contains(said, text) {
				t.Errorf("%v is refused without the word %q:\n%s", args, text, said)
			}
		}
	}

	// A saved instance with content of its own in its overlays.
	c := start("here", "Resumed VM", keep)
	w.do(t, "mem start 32")
	w.do(t, "disk disk start 4096")
	work()
	point := rest()
	closed(c)
	if left := layers("here"); len(left) > 0 {
		t.Errorf("a closed instance has %v", left)
	}

	t.Run("resumed", func(t *testing.T) {
		c := start("here", "Resumed VM", keep)
		at(point)
		work()
		lose(c, machinePID(t, c))
		c = start("here", "Resumed VM", back, keep)
		if said := c.said(); !strings.Contains(said, "Rolled back: ") || !strings.Contains(said, " bytes of disk writes since ") {
			t.Errorf("it does not say what is discarded:\n%s", said)
		}
		at(point)
		work()

		// A machine that is alive is not for rolling back; nor is it lost by the attempt.
		machine := machinePID(t, c)
		c.Process.Kill()
		c.wait(t, -1)
		refused(t, "here", []string{back}, "alive", "without --rollback", "kill -9")
		c = start("here", "Adopted VM on ")
		there := rest()
		if there == point {
			t.Error("the guest has done nothing")
		}
		work()
		refused(t, "here", []string{back}, "another process")

		// Rollbacks that are cut short.
		lose(c, machine) // which is no child of who adopted it
		for _, after := range []time.Duration{0, 20, 60} {
			c = w.start(t, nil, w.peer("package", "here", back, keep)...)
			w.pass(c, after)
			for _, pid := range w.processes() {
				syscall.Kill(pid, syscall.SIGKILL)
			}
			c.wait(t, -1, 1)
		}
		c = start("here", "Resumed VM", back, keep)
		at(point)
		work()
		point = rest()
		closed(c)
	})
	if t.Failed() {
		return
	}

	t.Run("saved", func(t *testing.T) {
		c := start("here", "Resumed VM", back) // once there is nothing to discard
		if said := c.said(); !strings.Contains(said, "Nothing was rolled back") {
			t.Errorf("it does not say that nothing was rolled back:\n%s", said)
		}
		at(point)
		closed(c)
	})

	t.Run("booted instead", func(t *testing.T) {
		c := start("here", "Resumed VM", keep)
		work()
		lose(c, machinePID(t, c))
		os.RemoveAll(w.path("copy"))
		if err := os.CopyFS(w.path("copy"), os.DirFS(w.path("here"))); err != nil {
			t.Fatal(err)
		}
		if said := w.start(t, nil, w.peer("package", "copy")...).wait(t, 1); !strings.Contains(said, "--rollback") {
			t.Errorf("the message does not offer --rollback:\n%s", said)
		}
		c = start("copy", "Booted VM", "--boot", "--resume-timeout", "2s")
		if left := layers("copy"); len(left) > 0 {
			t.Errorf("a booted instance has %v", left)
		}
		c.Process.Kill()
		c.wait(t, -1)
		for _, pid := range w.processes() {
			syscall.Kill(pid, syscall.SIGKILL)
		}
		refused(t, "copy", []string{back}, "was not kept", "--boot")
		c = start("here", "Resumed VM", back)
		at(point)
		closed(c)
	})

	t.Run("received", func(t *testing.T) {
		modes := [][]string{nil}
		if *long {
			modes = append(modes, []string{"--disable-postcopy-migration"})
		}
		for _, mode := range modes {
			src := start("here", "Serving on ", "--laddr", "127.0.0.1:0")
			addr := src.waitFor(t, "Serving on ")
			at(point)
			work()
			point = rest()
			os.RemoveAll(w.path("there"))
			dst := start("there", "Received VM", append(mode, keep, "--raddr", addr)...)
			src.wait(t, 0)
			work()
			lose(dst, machinePID(t, dst))
			refused(t, "here", []string{back}, "moved to another peer")
			c := start("there", "Resumed VM", back, keep)
			at(point)
			work()
			point = rest()
			closed(c)
			os.RemoveAll(w.path("here"))
			if err := os.Rename(w.path("there"), w.path("here")); err != nil {
				t.Fatal(err)
			}
		}
	})
}
