package e2e

import (
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestCommandGiven ends sources that have given their VM away before the other side needs nothing more of them, and starts them
// again: what their files hold is served, and what never ran elsewhere comes back.
func TestCommandGiven(t *testing.T) {
	t.Parallel()
	w := newWorkshop(t)
	w.loaded(t, "ready")
	// part is where a part of the test is done, with an instance "here" to begin with, beside the other parts.
	part := func(t *testing.T) (part *workshop, addr string) {
		t.Helper()
		t.Parallel()
		part = w.apart(t, "package")
		copyAll(t, w.path("ready"), part.path("here"))
		return part, freePort(t)
	}
	verify := func(t *testing.T, w *workshop) {
		t.Helper()
		w.do(t, "mem stop")
		w.do(t, "mem verify")
		w.do(t, "disk disk verify")
	}
	closed := func(t *testing.T, w *workshop, c *command) {
		t.Helper()
		c.Process.Signal(syscall.SIGTERM)
		c.wait(t, 0)
		w.checkClean(t)
	}
	said := func(t *testing.T, c *command, words ...string) {
		t.Helper()
		for _, want := range words {
			if !strings.Contains(c.said(), want) {
				t.Errorf("it is not said that %q:\n%s", want, c.said())
			}
		}
	}

	t.Run("closed in doubt", func(t *testing.T) {
		w, addr := part(t)
		victim := make(chan *command, 1)
		link := commitThief(t, addr, false, func() {
			c := <-victim
			c.Process.Signal(syscall.SIGKILL)
			<-c.done
		})
		source := func() *command { return w.start(t, w.console, w.peer("package", "here", "--laddr", addr)...) }
		destination := func() *command { return w.start(t, nil, w.peer("package", "there", "--raddr", link)...) }
		src := source()
		src.waitFor(t, "Serving on ")
		dst := destination()
		victim <- dst
		dst.wait(t, -1)
		src.waitFor(t, "trying to meet again")
		src.Process.Signal(syscall.SIGTERM)
		src.wait(t, 0)
		w.checkClean(t)

		unreachable := w.start(t, nil, w.peer("package", "here")...)
		unreachable.wait(t, 1)
		said(t, unreachable, "the command line that it had", "--force-owner")

		src = source()
		src.waitFor(t, "has not confirmed that it runs it")
		src.Process.Signal(syscall.SIGINT) // which changes nothing
		src.wait(t, 130)
		said(t, src, "may be needed")

		src = source()
		src.waitFor(t, "Serving on ")
		dst = destination()
		src.waitFor(t, "belongs here again")
		src.waitFor(t, "Resumed VM")
		src.waitForCount(t, "Serving on ", 2)
		for ended := false; !ended && !strings.Contains(dst.said(), "Received VM"); {
			select {
			case <-dst.done:
				ended = true
			case <-time.After(20 * time.Millisecond): // between two looks
			}
		}
		if strings.Contains(dst.said(), "try again later") { // on a busy machine: it had waited for 5 s by the time that the VM was served
			dst.wait(t, 1)
			dst = destination()
		}
		dst.waitFor(t, "Received VM")
		src.wait(t, 0)
		closed(t, w, dst)

		c := w.start(t, w.console, w.peer("package", "there")...)
		c.waitFor(t, "Resumed VM")
		verify(t, w)
		closed(t, w, c)
	})

	t.Run("killed after it was sent", func(t *testing.T) {
		w, addr := part(t)
		victim := make(chan *command, 1)
		link := commitThief(t, addr, true, func() {
			c := <-victim
			c.Process.Signal(syscall.SIGKILL)
			<-c.done
		})
		socket := w.path("sent.sock")
		source := func() *command {
			return w.start(t, w.console, w.peer("package", "here", "--control", socket)...)
		}
		destination := func() *command {
			return w.start(t, w.console, w.peer("package", "there", "--accept", addr)...)
		}
		src := source()
		src.waitFor(t, "Resumed VM")
		dst := destination()
		dst.waitFor(t, "Waiting for a VM")
		victim <- dst
		sent := make(chan struct{})
		go func() {
			defer close(sent)
			w.ctl(t, 1, "--control", socket, "migrate", link)
		}()
		dst.wait(t, -1)
		machine := machinePID(t, src)
		src.Process.Kill()
		syscall.Kill(machine, syscall.SIGKILL)
		src.wait(t, -1)
		<-sent

		src = source()
		src.waitFor(t, "say where it is")
		if out, _ := w.ctl(t, 0, "--control", socket, "status"); !strings.Contains(out, "in_doubt") {
			t.Errorf("its status is %s", out)
		}
		w.ctl(t, 1, "--control", socket, "pause")
		if _, said := w.ctl(t, 1, "--control", socket, "migrate", link); !strings.Contains(said, "is looked for at") {
			t.Errorf("it says %s", said)
		}
		dst = destination()
		dst.waitFor(t, "was not completed here")
		src.waitFor(t, "belongs here again")
		src.wait(t, 1)
		said(t, src, "--boot") // its memory went with its machine

		src = w.start(t, w.console, w.peer("package", "here", "--boot", "--resume-timeout", "2s", "--control", socket)...)
		src.waitFor(t, "Booted VM")
		if err := w.console.Ready(newContext(t)); err != nil {
			t.Fatal(err)
		}
		src.Process.Signal(syscall.SIGTERM)
		src.wait(t, 0)
		dst.Process.Signal(syscall.SIGTERM)
		dst.wait(t, 130)
		w.checkClean(t)
	})

	t.Run("closed while it is needed", func(t *testing.T) {
		w, addr := part(t)
		source := func() *command {
			return w.start(t, w.console, w.peer("package", "here", "--enable-input=false", "--laddr", addr, "--max-total-time", "8s")...)
		}
		src := source()
		src.waitFor(t, "Serving on ")
		link := newSlowLink(t, addr, 8<<20)
		destination := func() *command {
			return w.start(t, w.console, w.peer("package", "there", "--raddr", link.addr)...)
		}
		dst := destination()
		dst.waitFor(t, "VM runs here")
		link.rate.Store(1 << 20)
		src.waitFor(t, "Sending, the VM runs there") // it has heard so
		dst.Process.Kill()
		dst.wait(t, -1)
		src.Process.Signal(syscall.SIGTERM)
		src.waitFor(t, "Not closing yet")
		src.Process.Signal(syscall.SIGTERM)
		src.wait(t, 0)

		refused := w.start(t, nil, w.peer("package", "here", "--force-owner")...)
		refused.wait(t, 1)
		said(t, refused, "which runs it", "so that the other finds these files")

		src = source()
		src.waitFor(t, "may need content that only the files here have")
		link.rate.Store(256 << 20)
		dst = destination()
		dst.waitFor(t, "Received VM")
		src.wait(t, 0)
		said(t, src, "Sent VM")
		verify(t, w)
		closed(t, w, dst)

		gone := w.start(t, nil, w.peer("package", "here", "--laddr", addr)...)
		gone.wait(t, 1)
		said(t, gone, "which owns it")
	})

	t.Run("killed with its machine", func(t *testing.T) {
		w, addr := part(t)
		source := func(more ...string) *command {
			return w.start(t, w.console, w.peer("package", "here", append([]string{"--enable-input=false", "--laddr", addr, "--max-total-time", "8s"}, more...)...)...)
		}
		src := source("--keep-commit-point") // then what the guest wrote to its disk since is beside the disk
		src.waitFor(t, "Serving on ")
		link := newSlowLink(t, addr, 8<<20)
		dst := w.start(t, w.console, w.peer("package", "there", "--raddr", link.addr, "--rescue-timeout", "3s", "--resume-timeout", "5s")...)
		dst.waitFor(t, "VM runs here")
		flushed := w.do(t, "disk disk status")
		link.rate.Store(1 << 20)
		src.waitFor(t, "Sending, the VM runs there")
		machine := machinePID(t, src)
		src.Process.Kill()
		syscall.Kill(machine, syscall.SIGKILL)
		src.wait(t, -1)

		src = source("--rescue-timeout", "3s")
		src.waitFor(t, "its memory here is lost")
		link.rate.Store(256 << 20)
		dst.waitFor(t, "boot it from its disks") // as it hears from there
		dst.Process.Signal(syscall.SIGTERM)
		dst.waitFor(t, "Ctrl-C gives the VM up")
		dst.Process.Signal(syscall.SIGTERM)
		dst.wait(t, 1)

		dst = w.start(t, w.console, w.peer("package", "there", "--boot", "--resume-timeout", "2s", "--raddr", link.addr)...)
		dst.waitFor(t, "Booted VM")
		if err := w.console.Ready(newContext(t)); err != nil {
			t.Fatal(err)
		}
		src.wait(t, 0)
		said(t, src, "Sent VM")
		w.do(t, "disk disk start 4096 "+flushed)
		w.do(t, "disk disk verify")
		closed(t, w, dst)
	})

	t.Run("mounter", func(t *testing.T) {
		w, addr := part(t)
		victim := make(chan *command, 1)
		link := commitThief(t, addr, false, func() {
			c := <-victim
			c.Process.Signal(syscall.SIGKILL)
			<-c.done
		})
		source := func() *command {
			return w.start(t, nil, "mounter", "--package", w.path("package"), "--instance", w.path("here"), "--mount", w.path("mnt"), "--laddr", addr)
		}
		destination := func() *command { return w.start(t, w.console, w.peer("package", "there", "--raddr", link)...) }
		src := source()
		src.waitFor(t, "Serving on ")
		dst := destination()
		victim <- dst
		dst.wait(t, -1)
		src.Process.Kill()
		src.wait(t, -1)
		exec.Command("umount", "-l", w.path("mnt")).Run() // which a killed process leaves

		src = source()
		src.waitFor(t, "has not confirmed that it runs it")
		dst = destination()
		src.waitFor(t, "belongs here again")
		src.waitFor(t, "Mounted ")
		dst.waitFor(t, "Received VM")
		src.wait(t, 0)
		said(t, src, "Sent VM")
		verify(t, w)
		closed(t, w, dst)
	})
}
