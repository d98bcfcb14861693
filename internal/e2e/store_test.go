package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/drafter-vm/drafter/internal/tests3"
	"github.com/drafter-vm/drafter/pkg/migrate"
	"github.com/drafter-vm/drafter/pkg/runner"
	"github.com/drafter-vm/drafter/pkg/vmpackage"
)

// latest is the newest report of a file of reports.
func latest(t *testing.T, path string) (r migrate.Report) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	if err := json.Unmarshal([]byte(lines[len(lines)-1]), &r); err != nil {
		t.Fatal(err)
	}
	return r
}

// TestCommandStore: a package goes to an object store, and a VM starts from there, lazily. What it holds is kept there while it runs, so that it moves
// with few bytes from its source; and again, when the store fails. Its host dies with everything on it, and it goes on elsewhere from its latest copy.
func TestCommandStore(t *testing.T) {
	t.Parallel()
	w := newWorkshop(t)
	server := tests3.Start(t)
	proxy := server.Front(t)
	w.env = append(tests3.Environment(), "AWS_ENDPOINT_URL="+proxy.Endpoint)
	w.pack(t)
	key := w.path("key")
	w.start(t, nil, "store", "keygen", key).wait(t, 0)
	store := []string{"--store", "s3://" + tests3.Bucket + "/e2e", "--store-key", key}
	run := func(status int, args ...string) (stdout, stderr string) {
		t.Helper()
		var out bytes.Buffer
		c := w.startWith(t, nil, &out, append(args, store...)...)
		c.wait(t, status)
		return out.String(), c.said()
	}
	says := func(text string, want ...string) {
		t.Helper()
		for _, s := range want {
			if !strings.Contains(text, s) {
				t.Errorf("it does not say %q:\n%s", s, text)
			}
		}
	}

	pushed, _ := run(0, "store", "push", "--package", w.path("package"), "web")
	says(pushed, "web@")
	again, errs := run(0, "store", "push", "--package", w.path("package"), "other")
	says(errs, "Pushed", "0 B were not there yet")
	run(0, "store", "remove", strings.TrimSpace(again))
	listed, _ := run(0, "store", "list")
	says(listed, "web")
	_, errs = run(1, "peer", "--restore", "nothing", "--package", w.path("x"))
	says(errs, `image "nothing": there is no such image`, "drafter store list")

	// It starts from there: before most of it was fetched.
	restored := func(name string, more ...string) *command {
		t.Helper()
		args := append([]string{"peer", "--netns", "", "--chroot-base-dir", w.vms(), "--enable-input", "--package", w.path(name)}, more...)
		if len(more) > 0 {
			args = append(args, store...)
		}
		return w.start(t, w.console, args...)
	}
	slow := &tests3.Fault{Delay: 50 * time.Millisecond, Match: tests3.Of(http.MethodGet, "chunks")}
	proxy.Set(slow)
	withAll := []string{"--restore", "web", "--store-sync", "--store-quiet", "1s", "--laddr", "localhost:0", "--backup", "copies", "--backup-every", "1s", "--report", w.path("a.json")}
	a := restored("a", withAll...)
	a.waitFor(t, "VM runs here")
	early := proxy.Gets.Load()
	w.do(t, "put /name first")

	// Its peer dies, while a part of it is missing, and there is a newer version when it goes on.
	a.Process.Kill()
	a.wait(t, -1)
	run(0, "store", "push", "--package", w.path("package"), "web")
	a = restored("a", withAll...)
	a.waitFor(t, "Adopted VM")
	proxy.Set(nil)
	a.waitFor(t, "Received VM")
	t.Logf("the VM ran after %d requests to the store, and was whole after %d", early, proxy.Gets.Load())
	sum := w.do(t, "disk disk write 0 1048576 5")
	a.waitFor(t, "level=INFO msg=\"backed up the VM\"")
	a.waitForCount(t, "the object store has what a device holds", 5)
	a.waitForCount(t, "backed up the VM", strings.Count(a.said(), "backed up the VM")+1)
	time.Sleep(2 * time.Second) // what was written becomes quiet

	// It moves with the help of the store, which the destination is told of by the source.
	address := func(c *command) string { return strings.TrimSpace(c.waitFor(t, "Serving on ")) }
	check := func(what string) {
		t.Helper()
		if got := w.do(t, "cat /name"); !strings.Contains(got, "first") {
			t.Errorf("%s its name is %s", what, got)
		}
		if got := w.do(t, "disk disk sum 0 1048576"); got != sum {
			t.Errorf("%s its disk has %s, want %s", what, got, sum)
		}
	}
	moved := func(from *command, name string) *command {
		t.Helper()
		c := w.start(t, w.console, append(storePeer(w, name), "--raddr", address(from), "--laddr", "localhost:0", "--store-sync", "--store-quiet", "1s", "--store-key", key,
			"--disable-postcopy-migration", "--report", w.path(name+".json"))...)
		c.waitFor(t, "Received VM")
		from.wait(t, 0)
		return c
	}
	b := moved(a, "b")
	if _, err := os.Stat(w.path("a/" + vmpackage.ManifestFile)); err != nil {
		t.Errorf("the folder that it was restored to is no package: %v", err)
	}
	check("after a move with the help of the store")
	r := latest(t, w.path("b.json"))
	t.Logf("moved with the store: %d bytes came from it, %d of data from the source, which sent %d", r.StoredBytes, r.DataBytes, r.WireBytes)
	if r.StoredBytes < 4*r.DataBytes {
		t.Errorf("%d bytes came from the store, and %d of data from the source", r.StoredBytes, r.DataBytes)
	}

	// The store returns something else, and then fails: the source has all of it.
	b.waitForCount(t, "the object store has what a device holds", 5)
	proxy.Set(&tests3.Fault{Corrupt: true, Match: tests3.Of(http.MethodGet, "chunks")})
	c := moved(b, "c")
	check("after a move past a store that returns something else")
	if r := latest(t, w.path("c.json")); r.StoredBytes > 0 || r.DataBytes < 10<<20 {
		t.Errorf("past a store that returns something else: %d bytes came from it, and %d from the source", r.StoredBytes, r.DataBytes)
	}
	proxy.Set(nil)

	// Its host dies, with its disks. What is left is the copies.
	copies, _ := run(0, "store", "list", "copies")
	last := strings.Split(strings.TrimSpace(copies), "\n")
	if n := len(last) - 1; n < 2 || n > 3 {
		t.Errorf("there are %d copies, want 2 or 3:\n%s", n, strings.Join(last, "\n"))
	}
	pid := machinePID(t, c)
	c.Process.Kill()
	syscall.Kill(pid, syscall.SIGKILL)
	c.wait(t, -1)
	if err := os.RemoveAll(w.path("c")); err != nil {
		t.Fatal(err)
	}
	w.console = newConsole(t)
	_, errs = run(1, "peer", "--netns", "", "--chroot-base-dir", w.vms(), "--restore", "copies", "--package", w.path("d"))
	says(errs, "it may run still", "--force-owner")
	oldest := "copies@" + strings.Fields(last[1])[1]
	_, errs = run(1, "peer", "--netns", "", "--chroot-base-dir", w.vms(), "--restore", oldest, "--package", w.path("d"))
	says(errs, "it may run still")
	proxy.Set(slow)
	d := restored("d", "--restore", "copies", "--force-owner")
	d.waitFor(t, "what it did later is lost")
	d.waitFor(t, "VM runs here")

	// That one dies as well, with its machine, before all of it was fetched.
	pid = machinePID(t, d)
	d.Process.Kill()
	syscall.Kill(pid, syscall.SIGKILL)
	d.wait(t, -1)
	proxy.Set(nil)
	d = restored("d", "--restore", "copies")
	says(d.wait(t, 1), "died before all of it had been fetched", "--boot", "remove the folder")
	w.console = newConsole(t)
	d = restored("d", "--restore", "copies", "--boot", "--resume-timeout", "1s") // nobody starts its services
	d.waitFor(t, "Booted VM")
	d.Process.Signal(syscall.SIGTERM)
	d.wait(t, 0)
	if err := os.RemoveAll(w.path("d")); err != nil {
		t.Fatal(err)
	}
	w.console = newConsole(t)
	d = restored("d", "--restore", "copies", "--force-owner")
	d.waitFor(t, "Received VM")
	check("after it was restored from a copy")
	w.do(t, "put /name second")
	d.Process.Signal(syscall.SIGTERM)
	d.wait(t, 0)
	d = restored("d")
	if got := w.do(t, "cat /name"); !strings.Contains(got, "second") { // said before it runs
		t.Errorf("closed and resumed, its name is %s", got)
	}
	d.waitFor(t, "Resumed VM")
	d.Process.Signal(syscall.SIGTERM)
	d.wait(t, 0)
	collected, _ := run(0, "store", "collect", "--grace", "1ns")
	says(collected, "Removed ")
	if out, _ := run(0, "store", "pull", "copies", "--package", w.path("e")); out != "" {
		t.Error(out)
	}
	w.checkClean(t)
}

// storePeer is the command line of an instance in plain files, which come from a peer.
func storePeer(w *workshop, name string) []string {
	var devices []string
	for _, device := range []string{runner.StateDevice, runner.MemoryDevice, runner.KernelDevice, runner.InitrdDevice, "disk", runner.ConfigDevice} {
		devices = append(devices, fmt.Sprintf(`{"name":%q,"base":%q}`, device, w.path(name+"/"+vmpackage.DefaultFile(device))))
	}
	return []string{"peer", "--netns", "", "--chroot-base-dir", w.vms(), "--enable-input", "--devices", "[" + strings.Join(devices, ",") + "]"}
}
