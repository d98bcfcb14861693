package e2e

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
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
	t.Parallel()
	w := newWorkshop(t)
	w.pack(t)
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

	t.Run("copy", func(t *testing.T) {
		c := w.start(t, nil, "terminator", "--raddr", addr, "--package", w.path("backup"), "--copy")
		c.waitFor(t, "Wrote a copy of the VM to "+w.path("backup"))
		c.wait(t, 0)
		source.waitFor(t, "Sent a copy of the VM")
		w.verify(t)
		w.do(t, "disk disk stop")
		newest := w.do(t, "disk disk verify")
		w.do(t, "disk disk start 512 "+newest)

		console := newConsole(t)
		backup := &guest{console: console}
		other := w.start(t, console, w.peer("backup", "restored", "--verify")...)
		other.waitFor(t, "Resumed VM")
		backup.do(t, "mem stop")
		backup.do(t, "mem verify")
		backup.do(t, "disk disk stop")
		saved := backup.do(t, "disk disk verify")
		t.Logf("the source is at record %s, its copy at %s", newest, saved)
		other.Process.Signal(syscall.SIGTERM)
		other.wait(t, 0)
		w.verify(t)
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

// TestCommandMounter moves a VM from a peer to a mounter, which shows its disk as a file, and on to a peer.
func TestCommandMounter(t *testing.T) {
	t.Parallel()
	w := newWorkshop(t)
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Skipf("there is no FUSE here: %v", err)
	}
	w.pack(t)
	source := w.start(t, w.console, w.peer("package", "instance", "--laddr", "127.0.0.1:0")...)
	addr := source.waitFor(t, "Serving on ")
	w.do(t, "mem start 48")
	w.do(t, "disk disk start 512")
	const at, length = 40 << 20, 1 << 20 // behind the journal
	w.do(t, fmt.Sprintf("disk disk write %d %d 5", at, length))
	mnt := w.path("mnt")

	t.Run("mount point in use", func(t *testing.T) {
		said := w.start(t, nil, "mounter", "--raddr", addr, "--package", w.path("taken"), "--mount", w.path("package")).wait(t, 1)
		if !strings.Contains(said, "not empty") {
			t.Errorf("the message does not say why:\n%s", said)
		}
		source.waitFor(t, "the VM runs on here")
		w.verify(t)
		gone(t, w.path("taken"))
	})

	first := w.start(t, nil, "mounter", "--raddr", addr, "--package", w.path("received"), "--mount", mnt, "--laddr", "127.0.0.1:0")
	first.waitFor(t, "Mounted ")
	source.wait(t, 0)
	disk, err := os.OpenFile(filepath.Join(mnt, "disk"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	p := bytes.Repeat([]byte("changed!"), length/8)
	if _, err := disk.WriteAt(p, at); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(disk.Sync(), disk.Close()); err != nil {
		t.Fatal(err)
	}
	// Interrupted, it leaves no mount, and goes on from there, again and again; killed, too.
	for n, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGKILL} {
		first.Process.Signal(sig)
		first.wait(t, map[bool]int{true: 0, false: -1}[sig != syscall.SIGKILL])
		if sig != syscall.SIGKILL {
			gone(t, mnt)
		}
		first = w.start(t, nil, "mounter", "--package", w.path("received"), "--mount", mnt, "--laddr", "127.0.0.1:0")
		first.waitFor(t, "Mounted ")
		if out, err := exec.Command("cmp", "-n", fmt.Sprint(length), "-i", fmt.Sprintf("%d:0", at), filepath.Join(mnt, "disk"), writeFile(t, p)).CombinedOutput(); err != nil {
			t.Fatalf("start %d: the file does not hold what was written: %v: %s", n, err, out)
		}
	}
	if err := os.WriteFile(filepath.Join(mnt, "state"), []byte{0}, 0o600); err == nil {
		t.Error("the device state can be written")
	}

	// To a mounter with overlays, while a program writes.
	addr = first.waitFor(t, "Serving on ")
	writer := exec.Command("sh", "-c", `while dd if=/dev/zero of="$1" bs=4096 seek=15000 count=64 conv=notrunc,fsync status=none; do echo x; done`, "sh", filepath.Join(mnt, "disk"))
	out, err := writer.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	writer.Stderr = io.Discard
	if err := writer.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, 2)); err != nil {
		t.Fatal(err)
	}
	devices := strings.Builder{}
	for _, name := range []string{"state", "memory", "disk", "kernel", "initrd", "config"} {
		fmt.Fprintf(&devices, `{"name":%q,"base":%q,"overlay":%q,"state":%q},`, name, filepath.Join(w.path("package"), vmpackage.DefaultFile(name)),
			filepath.Join(w.path("second"), "overlay", name), filepath.Join(w.path("second"), "state", name))
	}
	second := w.start(t, nil, "mounter", "--raddr", addr, "--devices", "["+strings.TrimSuffix(devices.String(), ",")+"]", "--mount", w.path("mnt2"), "--laddr", "127.0.0.1:0")
	second.waitFor(t, "Mounted ")
	first.wait(t, 0)
	if left, err := os.ReadDir(mnt); err != nil || len(left) > 0 { // it found the folder of the one that was killed
		t.Errorf("the mount is left: %v, %v", left, err)
	}
	_, _ = io.Copy(io.Discard, out)
	_ = writer.Wait() // its file went away
	if said := w.start(t, nil, w.peer("received", "")...).wait(t, 1); !strings.Contains(said, "moved") {
		t.Errorf("the files of the first mounter do not say that the VM moved:\n%s", said)
	}

	// And on to a peer.
	addr = second.waitFor(t, "Serving on ")
	last := w.start(t, w.console, w.peer("package", "last", "--raddr", addr)...)
	last.waitFor(t, "Received VM")
	second.wait(t, 0)
	gone(t, w.path("mnt2"))
	if got, want := w.do(t, fmt.Sprintf("disk disk sum %d %d", at, length)), fmt.Sprintf("%x", sha256.Sum256(p)); got != want {
		t.Errorf("the guest reads %s, want what was written through the mount: %s", got, want)
	}
	w.verify(t)
	last.Process.Signal(syscall.SIGTERM)
	last.wait(t, 0)
	w.checkClean(t)
	if mounts, err := os.ReadFile("/proc/self/mounts"); err != nil || strings.Contains(string(mounts), w.dir) {
		t.Errorf("a mount is left (%v):\n%s", err, mounts)
	}
}

// writeFile makes a temporary file.
func writeFile(t *testing.T, p []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, p, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestCommandServe starts two peers from a package that is served to both at once. Both run their guests long before they have
// everything.
func TestCommandServe(t *testing.T) {
	t.Parallel()
	w := newWorkshop(t)
	w.pack(t)
	first := w.start(t, w.console, w.peer("package", "")...)
	first.waitFor(t, "Resumed VM")
	w.do(t, "mem start 48")
	w.do(t, "disk disk start 512")
	first.Process.Signal(syscall.SIGTERM)
	first.wait(t, 0)
	w.checkClean(t)
	before := digests(t, w.path("package"))

	archive := w.path("package.tar.zst")
	var devices []string
	for _, name := range []string{"state", "memory", "kernel", "initrd", "disk", "config"} {
		devices = append(devices, fmt.Sprintf(`{"name":%q,"path":%q}`, name, filepath.Join(w.path("package"), vmpackage.DefaultFile(name))))
	}
	w.start(t, nil, "packager", "--package-path", archive, "--devices", "["+strings.Join(devices, ",")+"]").wait(t, 0)

	t.Run("two at once", func(t *testing.T) {
		server := w.start(t, nil, "registry", "--package", archive, "--laddr", "127.0.0.1:0", "--cache", w.path("cache"))
		addr := server.waitFor(t, "Serving on ")
		var peers []*command
		var guests []*guest
		var links []*slowLink
		for i := range 2 {
			console := newConsole(t)
			link := newSlowLink(t, addr, 6<<20)
			args := w.peer("package", "clone", "--raddr", link.addr) // it has the package, and keeps what differs
			if i == 1 {                                              // it has nothing
				var devices []string
				for _, name := range []string{"state", "memory", "kernel", "initrd", "disk", "config"} {
					devices = append(devices, fmt.Sprintf(`{"name":%q,"base":%q}`, name, filepath.Join(w.path("own"), name)))
				}
				args = []string{"peer", "--netns", "", "--chroot-base-dir", w.vms(), "--enable-input", "--devices", "[" + strings.Join(devices, ",") + "]", "--raddr", link.addr}
			}
			links = append(links, link)
			peers = append(peers, w.start(t, console, args...))
			guests = append(guests, &guest{console: console})
		}
		for _, p := range peers {
			p.waitFor(t, "VM runs here")
			if strings.Contains(p.said(), "Received VM") {
				t.Error("the guest ran when everything had arrived, and not before")
			}
		}
		links[0].cut()
		server.Process.Signal(syscall.SIGTERM) // it ends when both have everything
		for _, g := range guests {
			g.do(t, "mem stop")
			g.do(t, "mem verify")
			g.do(t, "disk disk stop")
			g.do(t, "disk disk verify")
		}
		for _, p := range peers {
			p.waitFor(t, "Received VM")
		}
		// One that has come back already counts twice until its first link is noticed to be gone.
		said := server.wait(t, 0)
		waited := strings.Contains(said, "waiting for 2 peers") || strings.Contains(said, "waiting for 3 peers")
		if strings.Count(said, "Served VM to ") != 1 || strings.Count(said, "Served the rest of a VM to ") != 1 || !waited {
			t.Errorf("the server does not say that it served two:\n%s", said)
		}
		for _, p := range peers {
			p.Process.Signal(syscall.SIGTERM)
			p.wait(t, 0)
		}
		w.checkClean(t)
		// What was received is an instance like any other.
		again := w.start(t, w.console, w.peer("package", "clone")...)
		again.waitFor(t, "Resumed VM")
		w.do(t, "mem go")
		w.do(t, "mem stop")
		w.do(t, "mem verify")
		again.Process.Signal(syscall.SIGTERM)
		again.wait(t, 0)
	})
	if after := digests(t, w.path("package")); after != before {
		t.Errorf("the package has changed:\n%s\n%s", before, after)
	}

	t.Run("ended at once", func(t *testing.T) {
		addr := freePort(t)
		server := w.start(t, nil, "serve", "--package", w.path("package"), "--laddr", addr)
		server.waitFor(t, "Serving on ")
		link := newSlowLink(t, addr, 6<<20)
		console := newConsole(t)
		p := w.start(t, console, w.peer("package", "orphan", "--raddr", link.addr, "--rescue-timeout", "2s", "--resume-timeout", "5s")...)
		p.waitFor(t, "VM runs here")
		server.Process.Signal(syscall.SIGINT)
		server.waitFor(t, "waiting for 1 peer")
		server.Process.Signal(syscall.SIGINT)
		server.wait(t, 0)
		p.waitFor(t, "The VM is frozen")

		// Another server of the same package has what it lacks.
		server = w.start(t, nil, "serve", "--package", w.path("package"), "--laddr", addr)
		server.waitFor(t, "Served the rest of a VM to ")
		g := &guest{console: console}
		g.do(t, "mem stop")
		g.do(t, "mem verify")
		for _, c := range []*command{p, server} {
			c.Process.Signal(syscall.SIGTERM)
			c.wait(t, 0)
		}
		w.checkClean(t)
	})
	t.Run("the package is in use", func(t *testing.T) {
		c := w.start(t, w.console, w.peer("package", "")...)
		c.waitFor(t, "Resumed VM")
		if said := w.start(t, nil, "serve", "--package", w.path("package"), "--laddr", "127.0.0.1:0").wait(t, 1); !strings.Contains(said, "in use") && !strings.Contains(said, "is alive") {
			t.Errorf("the message does not say why:\n%s", said)
		}
		c.Process.Signal(syscall.SIGTERM)
		c.wait(t, 0)
	})
}
