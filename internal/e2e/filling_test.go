package e2e

import (
	"strings"
	"syscall"
	"testing"
)

// TestCommandFilling ends, in every way there is, a guest that runs at its destination while a part of it is still at its source.
func TestCommandFilling(t *testing.T) {
	t.Parallel()
	w := newWorkshop(t)
	w.loaded(t, "ready")

	resumed := func(t *testing.T, w *workshop, folder string, more ...string) *command {
		t.Helper()
		c := w.start(t, w.console, w.peer("package", folder, more...)...)
		c.waitFor(t, "Resumed VM")
		w.do(t, "mem stop")
		w.do(t, "mem verify")
		w.do(t, "disk disk verify")
		return c
	}
	closed := func(t *testing.T, w *workshop, c *command) {
		t.Helper()
		c.Process.Signal(syscall.SIGTERM)
		c.wait(t, 0)
		w.checkClean(t)
	}
	// sent waits for the source, which has nothing any more.
	sent := func(t *testing.T, src *command) {
		t.Helper()
		if said := src.wait(t, 0); !strings.Contains(said, "Sent VM") {
			t.Errorf("the source does not say that it sent the VM:\n%s", said)
		}
	}
	const fast = 256 << 20
	for _, tt := range []struct {
		name      string
		contained bool     // what it tests is also part of another
		more      []string // arguments of the destination
		during    func(t *testing.T, w *workshop, link *slowLink, there string, source func() *command, src, dst *command)
	}{
		{"interrupted", true, nil, func(t *testing.T, w *workshop, link *slowLink, there string, _ func() *command, src, dst *command) {
			dst.Process.Signal(syscall.SIGTERM)
			dst.waitFor(t, "Closing: the VM runs here already")
			link.rate.Store(fast)
			dst.wait(t, 0)
			sent(t, src)
			closed(t, w, resumed(t, w, there))
		}},
		{"interrupted without a source", false, []string{"--rescue-timeout", "5s", "--resume-timeout", "15s"}, func(t *testing.T, w *workshop, link *slowLink, there string, source func() *command, src, dst *command) {
			src.Process.Kill()
			src.wait(t, -1)
			dst.Process.Signal(syscall.SIGTERM)
			dst.waitFor(t, "are still at the peer it came from")
			src = source()
			src.waitFor(t, "Adopted VM on ")
			link.rate.Store(fast)
			dst.wait(t, 0)
			sent(t, src)
			closed(t, w, resumed(t, w, there))
		}},
		{"source interrupted without a destination", false, nil, func(t *testing.T, w *workshop, link *slowLink, there string, _ func() *command, src, dst *command) {
			link.rate.Store(1 << 20)
			src.waitFor(t, "Sending, the VM runs there") // it has heard so
			dst.Process.Kill()
			dst.wait(t, -1)
			src.Process.Signal(syscall.SIGTERM)
			src.waitFor(t, "Not closing yet")
			link.rate.Store(fast)
			dst = w.start(t, w.console, w.peer("package", there, "--raddr", link.addr)...)
			dst.waitFor(t, "Received VM")
			sent(t, src)
			w.do(t, "mem stop")
			w.do(t, "mem verify")
			closed(t, w, dst)
		}},
		{"guest shuts down", false, nil, func(t *testing.T, w *workshop, link *slowLink, there string, _ func() *command, src, dst *command) {
			machine := machinePID(t, dst)
			link.rate.Store(2 << 20)
			if err := w.console.Send("poweroff"); err != nil {
				t.Fatal(err)
			}
			for ctx := newContext(t); running(machine) && ctx.Err() == nil; w.pass(dst, 20) {
			}
			if strings.Contains(dst.said(), "Received VM") {
				t.Skip("all of it had arrived by the time that the guest had shut down")
			}
			link.rate.Store(fast)
			dst.waitFor(t, "its disks are whole")
			dst.waitFor(t, "The guest shut down")
			dst.wait(t, 0)
			sent(t, src)
			w.checkClean(t)
			if said := w.start(t, nil, w.peer("package", there)...).wait(t, 1); !strings.Contains(said, "its guest shut down") {
				t.Errorf("it is not said that the guest shut down:\n%s", said)
			}
		}},
		{"machine killed", false, []string{"--keep-commit-point"}, func(t *testing.T, w *workshop, link *slowLink, there string, _ func() *command, src, dst *command) {
			syscall.Kill(machinePID(t, dst), syscall.SIGKILL)
			link.rate.Store(fast)
			dst.waitFor(t, "its disks are whole")
			if said := dst.wait(t, 1); !strings.Contains(said, "--boot") || !strings.Contains(said, "--rollback") {
				t.Errorf("the ways out are not named:\n%s", said)
			}
			sent(t, src)
			// The memory has arrived, too, for the sake of the commit point.
			c := resumed(t, w, there, "--rollback")
			if !strings.Contains(c.said(), "Rolled back: ") {
				t.Errorf("it does not say that it was rolled back:\n%s", c.said())
			}
			closed(t, w, c)
		}},
		{"machine and peer killed", false, []string{"--keep-commit-point"}, func(t *testing.T, w *workshop, link *slowLink, there string, _ func() *command, src, dst *command) {
			flushed := w.do(t, "disk disk status")
			machine := machinePID(t, dst)
			dst.Process.Kill()
			syscall.Kill(machine, syscall.SIGKILL)
			dst.wait(t, -1)
			if strings.Contains(dst.said(), "Received VM") {
				t.Skip("all of it had arrived by then")
			}
			said := w.start(t, nil, w.peer("package", there, "--rollback")...).wait(t, 1)
			for _, want := range []string{"no commit point", "not all of its memory had arrived", "--boot", "--raddr"} {
				if !strings.Contains(said, want) {
					t.Errorf("the rollback is refused without the words %q:\n%s", want, said)
				}
			}
			link.rate.Store(fast)
			c := w.start(t, w.console, w.peer("package", there, "--boot", "--resume-timeout", "2s", "--raddr", link.addr)...)
			c.waitFor(t, "Booted VM")
			if err := w.console.Ready(newContext(t)); err != nil {
				t.Fatal(err)
			}
			sent(t, src)
			w.do(t, "disk disk start 4096 "+flushed)
			w.do(t, "disk disk verify")
			closed(t, w, c)
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.contained && !*long {
				t.Skip("a case here contains it: run with -long")
			}
			t.Parallel()
			w := w.apart(t, "package", "ready")
			addr, there := freePort(t), "there"
			source := func() *command {
				return w.start(t, w.console, w.peer("package", "ready", "--enable-input=false", "--laddr", addr, "--max-total-time", "8s")...)
			}
			src := source()
			src.waitFor(t, "Serving on ")
			link := newSlowLink(t, addr, 8<<20)
			dst := w.start(t, w.console, w.peer("package", there, append([]string{"--raddr", link.addr}, tt.more...)...)...)
			dst.waitFor(t, "VM runs here")
			if strings.Contains(dst.said(), "Received VM") {
				t.Error("everything was there when the guest ran: nothing is tested")
			}
			tt.during(t, w, link, there, source, src, dst)
		})
	}
}
