package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/drafter-vm/drafter/pkg/migrate"
)

// TestCommandHandOver moves a VM between peers of one host over unix sockets: its memory is handed over, not copied.
func TestCommandHandOver(t *testing.T) {
	t.Parallel()
	w := newWorkshop(t)
	w.pack(t)
	socket := func(name string) string { return "unix://" + w.path(name+".sock") }
	check := func(t *testing.T) {
		t.Helper()
		w.do(t, "mem stop")
		w.do(t, "mem verify")
		w.do(t, "mem go")
	}
	reportOf := func(t *testing.T, name string) (r migrate.Report) {
		t.Helper()
		text, err := os.ReadFile(w.path(name + ".json"))
		if err == nil {
			lines := strings.Split(strings.TrimSpace(string(text)), "\n")
			err = json.Unmarshal([]byte(lines[len(lines)-1]), &r)
		}
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	// start is the peer that takes the VM over from the one named, if any.
	start := func(t *testing.T, name, from string, more ...string) *command {
		args := []string{"--laddr", socket(name), "--report", w.path(name + ".json")}
		if from != "" {
			args = append(args, "--raddr", socket(from))
		}
		return w.start(t, w.console, w.peer("package", name, append(args, more...)...)...)
	}

	a := start(t, "a", "")
	a.waitFor(t, "Resumed VM")
	w.do(t, "mem start 64 random")
	w.do(t, "disk disk start 4096")
	b := start(t, "b", "a")
	b.waitFor(t, "Received VM")
	a.wait(t, 0)
	check(t)
	for _, name := range []string{"a", "b"} {
		r := reportOf(t, name)
		if !slices.Equal(r.Shared, []string{"memory"}) || r.Digests["disk"] == "" || r.Digests["memory"] != "" || r.WireBytes > 40<<20 {
			t.Errorf("%s reports that it shared %q, %d bytes, digests %v", name, r.Shared, r.WireBytes, r.Digests)
		}
	}

	// The memory outlives the peer of the machine that has it now, as any other does.
	b.Process.Kill()
	b.wait(t, -1)
	b = start(t, "b", "a")
	b.waitFor(t, "Adopted VM on ")
	check(t)
	c := start(t, "c", "b")
	c.waitFor(t, "Received VM")
	b.wait(t, 0)
	check(t)
	if r := reportOf(t, "c"); !slices.Equal(r.Shared, []string{"memory"}) {
		t.Errorf("from the adopted machine it was not handed over: %q", r.Shared)
	}

	// A destination that dies before it has the VM leaves the memory as it was, whenever that is. One that has it already, or may have, is
	// started again.
	machines := func() []string {
		found, _ := filepath.Glob(filepath.Join(w.vms(), "qemu", "*", "machine.json"))
		return found
	}
	at := "c"
	for n := 0; n < 4 && at == "c"; n++ {
		name := fmt.Sprintf("victim-%d", n)
		before := machines()
		victim := start(t, name, "c")
		for ctx := newContext(t); ; w.pass(victim, 1) { // until it has a machine; an earlier victim's may be there still
			if slices.ContainsFunc(machines(), func(m string) bool { return !slices.Contains(before, m) }) {
				break
			}
			if ctx.Err() != nil {
				t.Fatalf("the destination starts no machine:\n%s", victim.said())
			}
		}
		w.pass(victim, time.Duration(10*n))
		victim.Process.Kill()
		victim.wait(t, -1, 0)
		for ctx := newContext(t); strings.Count(c.said(), "the VM runs on here") <= n && at == "c"; w.pass(c, 10) {
			if said := c.said(); strings.Contains(said, "Sent VM") || strings.Contains(said, "trying to meet again") {
				at = name
			} else if ctx.Err() != nil {
				t.Fatalf("the source does not say what has become of its VM:\n%s", said)
			}
		}
		if at != "c" {
			next := start(t, at, "c")
			next.waitFor(t, "Serving on ")
			c.wait(t, 0)
			c = next
		}
		check(t)
	}
	t.Logf("the VM is at %s", at)

	// Who wants to keep what comes has it sent; so has a copy.
	w.start(t, nil, "terminator", "--raddr", socket(at), "--copy", "--package", w.path("copy")).wait(t, 0)
	d := start(t, "d", at, "--keep-commit-point")
	d.waitFor(t, "Received VM")
	c.wait(t, 0)
	check(t)
	if r := reportOf(t, "d"); len(r.Shared) > 0 || r.Digests["memory"] == "" {
		t.Errorf("it shared %q", r.Shared)
	}

	// Closed and resumed it is what it was.
	d.Process.Signal(syscall.SIGTERM)
	d.wait(t, 0)
	w.checkClean(t)
	e := start(t, "d", "")
	e.waitFor(t, "Serving on ")
	f := start(t, "f", "d") // while its memory is being filled, perhaps
	f.waitFor(t, "Received VM")
	e.wait(t, 0)
	t.Logf("at once after it was resumed, %q of it was handed over", reportOf(t, "f").Shared)
	check(t)
	w.do(t, "disk disk verify")
	w.do(t, "echo the channel goes on")
	f.Process.Signal(syscall.SIGTERM)
	f.wait(t, 0)
	w.checkClean(t)
}
