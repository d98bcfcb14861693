package e2e

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/drafter-vm/drafter/internal/testregistry"
	"github.com/drafter-vm/drafter/pkg/vmpackage"
)

// TestCommandRegistry: a package goes to a registry with TLS and a password, and a VM starts from there, lazily; its guest answers before all of it was
// fetched. Its peer dies then, and goes on; the VM moves to a peer on another host, is closed, and the changed package is pushed by what differs. The
// registry stands still for a while, and dies with the whole host of another VM.
func TestCommandRegistry(t *testing.T) {
	t.Parallel()
	w := newWorkshop(t)
	server := testregistry.Start(t, testregistry.Options{TLS: true, User: "joe", Password: "secret"})
	front := server.Front(t)
	w.env = []string{"DOCKER_CONFIG=" + server.DockerConfig(front.Address), "SSL_CERT_FILE=" + server.CA}
	w.pack(t)
	run := func(status int, args ...string) (stdout, stderr string) {
		t.Helper()
		var out bytes.Buffer
		c := w.startWith(t, nil, &out, args...)
		c.wait(t, status)
		return strings.TrimSpace(out.String()), c.said()
	}
	says := func(text string, want ...string) {
		t.Helper()
		for _, s := range want {
			if !strings.Contains(text, s) {
				t.Errorf("it does not say %q:\n%s", s, text)
			}
		}
	}
	name := "oci://" + front.Address + "/vms/web:1"
	pinned, errs := run(0, "push", w.path("package"), name)
	says(pinned, name+"@sha256:")
	says(errs, "Pushed", "of content")
	t.Log(errs)
	sent := front.BytesPut.Load()
	again, errs := run(0, "push", w.path("package"), name)
	says(errs, "(100.0%) were there")
	if again != pinned {
		t.Errorf("the same is pushed as %s, and was %s", again, pinned)
	}
	_, errs = run(1, "run", "oci://"+front.Address+"/vms/none:1", "--instance", w.path("x"))
	says(errs, "there is no such package")
	_, errs = run(1, "run", name, "--instance", w.path("x"), "--platform", "linux/s390x")
	says(errs, "there is one for linux/", "--platform")
	if _, err := os.Stat(w.path("x")); err == nil {
		t.Error("what could not be started has left a folder")
	}

	start := func(folder, from string, more ...string) *command {
		t.Helper()
		return w.start(t, w.console, append([]string{"run", from, "--netns", "", "--chroot-base-dir", w.vms(), "--enable-input", "--instance", w.path(folder)}, more...)...)
	}
	boots := func(folder string) {
		t.Helper()
		w.console = newConsole(t)
		c := start(folder, name, "--boot", "--resume-timeout", "1s") // nobody starts its services
		c.waitFor(t, "Booted VM")
		c.Process.Signal(syscall.SIGTERM)
		c.wait(t, 0)
	}
	address := func(c *command) string { return strings.TrimSpace(c.waitFor(t, "Serving on ")) }

	// It answers before all of it was fetched. What is pushed to the tag meanwhile is nothing to it.
	before := front.BytesGot.Load()
	front.Limit(1 << 20)
	a := start("a", name, "--laddr", "localhost:0")
	a.waitFor(t, "VM runs here")
	early := front.BytesGot.Load() - before
	front.Limit(2 << 20)
	w.do(t, "put /name first")
	answered, first := front.BytesGot.Load()-before, !strings.Contains(a.said(), "Received VM")
	a.Process.Kill()
	a.wait(t, -1)
	if _, err := os.Stat(w.path("a/" + vmpackage.ManifestFile)); err == nil {
		t.Error("it is a package before all of it was fetched")
	}
	_, errs = run(2, "run", "oci://"+front.Address+"/vms/other:1", "--instance", w.path("a"), "--netns", "", "--chroot-base-dir", w.vms())
	says(errs, "there is an instance of "+name)

	// Its peer goes on, while the registry hangs for a moment.
	front.Set(&testregistry.Fault{Hang: true})
	front.Limit(0)
	time.AfterFunc(2*time.Second, func() { front.Set(nil) }) // the machine may need it to answer
	a = start("a", name, "--laddr", "localhost:0")
	a.waitFor(t, "Adopted VM")
	a.waitFor(t, "Received VM")
	t.Logf("pushed with %d bytes; the VM ran after %d bytes of the registry, the guest answered after %d, and had all after %d", sent, early, answered, front.BytesGot.Load()-before)
	if early >= sent/2 { // the kernel and the initrd, which nobody needs who does not boot, are more than that
		t.Errorf("the VM ran after %d bytes of %d", early, sent)
	}
	if !first || answered >= sent {
		t.Errorf("the guest answered after %d bytes of %d", answered, sent)
	}

	// It moves.
	b := w.start(t, w.console, append(storePeer(w, "b"), "--raddr", address(a))...)
	b.waitFor(t, "Received VM")
	a.wait(t, 0)
	if got := w.do(t, "cat /name"); !strings.Contains(got, "first") {
		t.Errorf("after a move its name is %s", got)
	}
	b.Process.Signal(syscall.SIGTERM)
	b.wait(t, 0)

	// Another starts from the registry by digest, is closed, and goes on from its folder, without the registry.
	w.console = newConsole(t)
	c := start("c", pinned)
	c.waitFor(t, "Received VM")
	w.do(t, "put /name second")
	c.Process.Signal(syscall.SIGTERM)
	c.wait(t, 0)
	before = front.BytesPut.Load()
	_, errs = run(0, "push", w.path("c"), "oci://"+front.Address+"/vms/changed:1") // from where it knows that it came from
	says(errs, "were there")
	second := front.BytesPut.Load() - before
	t.Logf("a changed package was pushed with %d bytes, the first with %d: %s", second, sent, errs)
	if second > sent/2 {
		t.Errorf("a changed package was pushed with %d bytes, the first with %d", second, sent)
	}
	server.Stop()
	c = start("c", pinned)
	if got := w.do(t, "cat /name"); !strings.Contains(got, "second") {
		t.Errorf("closed and run again, its name is %s", got)
	}
	c.waitFor(t, "Resumed VM")
	c.Process.Signal(syscall.SIGTERM)
	c.wait(t, 0)
	server.Restart()

	// One dies with its machine before all of it was there: it boots, with what its disks lack from the registry.
	w.console = newConsole(t)
	front.Limit(4 << 20)
	d := start("d", name)
	d.waitFor(t, "VM runs here")
	pid := machinePID(t, d)
	d.Process.Kill()
	syscall.Kill(pid, syscall.SIGKILL)
	d.wait(t, -1)
	front.Limit(0)
	d = start("d", name)
	says(d.wait(t, 1), "died before all of it had been fetched", "--boot")
	boots("d")

	// One dies before its VM runs, with files that are there and not whole.
	w.console = newConsole(t)
	front.Limit(256 << 10)
	f := start("f", name)
	for ctx := newContext(t); ; w.pass(f, 1) {
		if _, err := os.Stat(w.path("f/vmlinux")); err == nil {
			break
		} else if ctx.Err() != nil {
			t.Fatalf("no kernel comes:\n%s", f.said())
		}
	}
	says(start("f", name).wait(t, 1), "is in use by another command", "--instance")
	f.Process.Kill()
	f.wait(t, -1)
	if said := f.said(); strings.Contains(said, "VM runs here") {
		t.Errorf("it was to be killed before:\n%s", said)
	}
	front.Limit(0)
	f = start("f", name)
	f.waitFor(t, "Received VM")
	w.do(t, "echo it lives")
	f.Process.Signal(syscall.SIGTERM)
	f.wait(t, 0)

	// The guest of one shuts down before all of it was there, which still comes: it boots, and is a package.
	w.console = newConsole(t)
	front.Limit(1 << 20)
	g := start("g", name)
	g.waitFor(t, "VM runs here")
	w.do(t, "echo it runs")
	g.Process.Kill()
	g.wait(t, -1)
	front.Limit(1 << 20)
	g = start("g", name)
	g.waitFor(t, "Adopted VM")
	if err := w.console.Send("poweroff"); err != nil {
		t.Fatal(err)
	}
	g.waitFor(t, "The guest shut down")
	front.Limit(0)
	g.wait(t, 0)
	boots("g")
	run(0, "push", w.path("g"), "oci://"+front.Address+"/vms/booted:1")

	// Pulled, it is what was pushed.
	run(0, "pull", pinned, w.path("e"))
	for _, file := range []string{vmpackage.ManifestFile, "memory.bin", "state.bin", "rootfs.ext4"} {
		want, err := os.ReadFile(filepath.Join(w.path("package"), file))
		if err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(filepath.Join(w.path("e"), file)); err != nil || !bytes.Equal(got, want) {
			t.Errorf("pulled, %s is something else (%v)", file, err)
		}
	}
	w.checkClean(t)
}
