package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/drafter-vm/drafter/pkg/control"
	"github.com/drafter-vm/drafter/pkg/migrate"
)

// ctl runs drafter ctl and returns what it prints, and what it says on stderr. The exit status must be rc.
func (w *workshop) ctl(t *testing.T, rc int, args ...string) (out, said string) {
	t.Helper()
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(newContext(t), w.bin, append([]string{"ctl"}, args...)...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	var status *exec.ExitError
	if err != nil && !errors.As(err, &status) || cmd.ProcessState.ExitCode() != rc {
		t.Fatalf("drafter ctl %q: %v, want exit status %d; it says %s", args, err, rc, &stderr)
	}
	return stdout.String(), stderr.String()
}

// TestCommandCtl controls a peer by its socket.
func TestCommandCtl(t *testing.T) {
	t.Parallel()
	w := newWorkshop(t)
	w.pack(t)
	socket, other := w.path("a.sock"), w.path("b.sock")
	status := func(t *testing.T, socket string) (s control.Status) {
		t.Helper()
		out, _ := w.ctl(t, 0, "--control", socket, "status")
		if err := json.Unmarshal([]byte(out), &s); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return s
	}
	a := w.start(t, w.console, w.peer("package", "a", "--laddr", "127.0.0.1:0", "--control", socket, "--metrics", "127.0.0.1:0")...)
	metrics := a.waitFor(t, "Metrics on ")
	serving := a.waitFor(t, "Serving on ")
	w.do(t, "mem start 32")
	// It waits from the beginning, and outlives whatever does not come.
	b := w.start(t, w.console, w.peer("package", "b", "--accept", "127.0.0.1:0", "--control", other)...)
	address := b.waitFor(t, "Waiting for a VM on ")
	waits := func(t *testing.T) {
		t.Helper()
		if s := status(t, other); s.State != "receiving" || s.UnderWay != "reception" {
			t.Errorf("the peer that waits is %+v", s)
		}
	}
	measured := func(t *testing.T, wants ...string) {
		t.Helper()
		answer, err := http.Get(metrics)
		if err != nil {
			t.Fatal(err)
		}
		defer answer.Body.Close()
		text, err := io.ReadAll(answer.Body)
		if err != nil {
			t.Fatal(err)
		}
		for _, want := range wants {
			if !regexp.MustCompile(`(?m)^` + want + `$`).Match(text) {
				t.Errorf("%q is not among the metrics", want)
			}
		}
	}
	refused := func(t *testing.T, want string) {
		t.Helper()
		said := w.start(t, nil, w.peer("package", "refused", "--raddr", serving)...).wait(t, 1)
		if !strings.Contains(said, want) {
			t.Errorf("who asks for the VM hears %s, want %q", said, want)
		}
	}

	t.Run("status", func(t *testing.T) {
		s := status(t, socket)
		if s.State != "running" || !s.Migratable || s.Busy || s.Serving != serving || s.PID != machinePID(t, a) || s.Migration != nil {
			t.Errorf("it is %+v", s)
		}
		if info, err := os.Stat(socket); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("the socket is %v, %v", info.Mode(), err)
		}
	})
	t.Run("metrics", func(t *testing.T) {
		w.do(t, "disk disk write 0 4096 1") // which it flushes
		measured(t, `drafter_peer_state\{state="running"\} 1`, `drafter_disk_flush_failures_total\{disk="disk"\} 0`,
			`drafter_disk_flush_seconds_count\{disk="disk"\} [1-9].*`)
	})
	t.Run("pause", func(t *testing.T) {
		w.ctl(t, 0, "--control", socket, "pause")
		if s := status(t, socket); s.State != "paused" {
			t.Errorf("it is %+v", s)
		}
		measured(t, `drafter_peer_state\{state="paused"\} 1`, `drafter_peer_state\{state="running"\} 0`)
		refused(t, "this VM is paused")
		if _, said := w.ctl(t, 1, "--control", socket, "migrate", address); !strings.Contains(said, "paused") {
			t.Errorf("it says %s", said)
		}
		waits(t)
		if _, said := w.ctl(t, 1, "--control", socket, "pause"); !strings.Contains(said, "paused") {
			t.Errorf("it says %s", said)
		}
		if _, said := w.ctl(t, 1, "--control", socket, "snapshot", w.path("none")); !strings.Contains(said, "paused") {
			t.Errorf("it says %s", said)
		}
		w.ctl(t, 0, "--control", socket, "resume")
		w.ctl(t, 0, "--control", socket, "resume") // once more changes nothing
		w.do(t, "echo awake")
		measured(t, `drafter_peer_state\{state="paused"\} 0`, `drafter_peer_state\{state="running"\} 1`)
	})
	t.Run("migratable", func(t *testing.T) {
		w.ctl(t, 0, "--control", socket, "migratable", "off")
		if s := status(t, socket); s.Migratable {
			t.Errorf("it is %+v", s)
		}
		refused(t, "not migratable now")
		if _, said := w.ctl(t, 1, "--control", socket, "migrate", address); !strings.Contains(said, "not migratable") {
			t.Errorf("it says %s", said)
		}
		waits(t)
		w.ctl(t, 0, "--control", socket, "migratable", "on")
		if s := status(t, socket); !s.Migratable {
			t.Errorf("it is %+v", s)
		}
		w.ctl(t, 2, "--control", socket, "migratable", "maybe")
	})
	t.Run("snapshot", func(t *testing.T) {
		out, _ := w.ctl(t, 0, "--control", socket, "snapshot", w.path("copy"))
		var r migrate.Report
		if err := json.Unmarshal([]byte(out), &r); err != nil || r.Downtime <= 0 || len(r.Digests) == 0 {
			t.Errorf("%v: %s", err, out)
		}
		t.Logf("the guest stood still for %v: %v", r.Downtime, r.Parts)
		w.do(t, "mem stop")
		w.do(t, "mem verify")
		w.do(t, "mem go")
		if _, said := w.ctl(t, 1, "--control", socket, "snapshot", w.path("copy")); !strings.Contains(said, "not possible: ") || !strings.Contains(said, "nothing is overwritten") {
			t.Errorf("it says %s", said)
		}
		// Why, and not what a destination that is not ours would be told.
		if _, said := w.ctl(t, 1, "--control", socket, "snapshot", "/proc/none"); !strings.Contains(said, "/proc/none") || strings.Contains(said, "destination") {
			t.Errorf("it says %s", said)
		}
		measured(t, `drafter_snapshots_total\{result="written"\} 1`, `drafter_snapshots_total\{result="failed"\} 1`, `drafter_snapshot_pause_seconds_count 1`,
			`drafter_snapshot_bytes_total\{kind="data"\} [1-9].*`, `drafter_migration_bandwidth_bytes_per_second\{role="source"\} 0`,
			`drafter_migration_dirty_bytes_per_second 0`, `drafter_peer_state\{state="running"\} 1`)
	})
	t.Run("balloon", func(t *testing.T) {
		given := func(size string) (b control.Balloon) {
			t.Helper()
			out, _ := w.ctl(t, 0, "--control", socket, "balloon", size)
			if err := json.Unmarshal([]byte(out), &b); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			return b
		}
		if b := given("16M"); b.Given != 16<<20 {
			t.Errorf("asked for 16 MiB, the guest has given %+v", b)
		}
		if b := given("0"); b.Given != 0 {
			t.Errorf("asked for nothing, the guest has given %+v", b)
		}
		w.ctl(t, 2, "--control", socket, "balloon", "much")
		w.ctl(t, 2, "--control", socket, "balloon", "-1")
		if _, said := w.ctl(t, 1, "--control", socket, "balloon", "2T"); !strings.Contains(said, "not possible: ") || !strings.Contains(said, "less than all of its memory") {
			t.Errorf("it says %s", said)
		}
		w.ctl(t, 0, "--control", socket, "pause")
		if _, said := w.ctl(t, 1, "--control", socket, "balloon", "16M"); !strings.Contains(said, "not possible now: ") {
			t.Errorf("it says %s", said)
		}
		w.ctl(t, 0, "--control", socket, "resume")
	})
	t.Run("nothing to cancel, nobody there", func(t *testing.T) {
		if _, said := w.ctl(t, 1, "--control", socket, "cancel"); !strings.Contains(said, "nothing is under way") {
			t.Errorf("it says %s", said)
		}
		if _, said := w.ctl(t, 1, "--control", socket, "migrate", "127.0.0.1:1"); !strings.Contains(said, "127.0.0.1:1") || !strings.Contains(said, "refused") {
			t.Errorf("it says %s", said)
		}
		if _, said := w.ctl(t, 1, "--control", socket, "migrate", "udp://127.0.0.1:1"); !strings.Contains(said, "quic://") {
			t.Errorf("it says %s", said)
		}
		if _, said := w.ctl(t, 1, "--control", w.path("nobody.sock"), "status"); !strings.Contains(said, "no peer listens there") {
			t.Errorf("it says %s", said)
		}
		w.ctl(t, 2, "status")
		w.ctl(t, 2, "--control", socket)
		w.ctl(t, 2, "--control", socket, "migrate")
	})
	// cancelled is a migration to an address that is cancelled as soon as is says that it can be.
	cancelled := func(t *testing.T, to string, is func(control.Status) bool) {
		t.Helper()
		ended := make(chan string, 1)
		go func() {
			_, said := w.ctl(t, 1, "--control", socket, "migrate", to)
			ended <- said
		}()
		for ctx := newContext(t); !is(status(t, socket)); time.Sleep(10 * time.Millisecond) {
			if ctx.Err() != nil {
				t.Fatal("the migration is not under way")
			}
		}
		w.ctl(t, 0, "--control", socket, "cancel")
		if said := <-ended; !strings.Contains(said, "cancel") {
			t.Errorf("it says %s", said)
		}
		if s := status(t, socket); s.State != "running" || s.Busy {
			t.Errorf("it is %+v", s)
		}
	}
	t.Run("cancel while it dials", func(t *testing.T) {
		silent, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer silent.Close()
		cancelled(t, "ws://"+silent.Addr().String()+"/", func(s control.Status) bool { return s.Busy && s.UnderWay == "migration" })
	})
	t.Run("cancel a push", func(t *testing.T) {
		cancelled(t, newTapOn(t, address, true, 4<<20).addr, func(s control.Status) bool {
			return s.UnderWay == "migration" && s.Migration != nil && s.Migration.State == "copying"
		})
		b.waitFor(t, "waiting for another")
		waits(t)
	})
	moved := t.Run("migrate", func(t *testing.T) {
		out, _ := w.ctl(t, 0, "--control", socket, "migrate", address)
		var r migrate.Report
		if err := json.Unmarshal([]byte(out), &r); err != nil || r.Outcome != "moved" {
			t.Errorf("%v: %s", err, out)
		}
		b.waitFor(t, "Received VM")
		a.wait(t, 0)
		w.do(t, "mem stop")
		w.do(t, "mem verify")
		if s := status(t, other); s.State != "running" || !s.Migratable || s.Serving != "" || s.Migration == nil || s.Migration.Role != "destination" || !s.Migration.Over {
			t.Errorf("it is %+v", s)
		}
		for _, may := range []string{"off", "on"} { // it can be sent, though nobody can ask for it
			w.ctl(t, 0, "--control", other, "migratable", may)
			if s := status(t, other); s.Migratable != (may == "on") {
				t.Errorf("%s: it is %+v", may, s)
			}
		}
	})
	if !moved {
		return
	}
	t.Run("stop", func(t *testing.T) {
		w.ctl(t, 0, "--control", other, "stop")
		if said := b.wait(t, 0); !strings.Contains(said, "Closing") {
			t.Errorf("it says %s", said)
		}
		w.checkClean(t)
		for _, path := range []string{socket, other} {
			if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("%s is left", path)
			}
		}
	})
	t.Run("what was written down", func(t *testing.T) {
		c := w.start(t, w.console, w.peer("copy", "of-copy")...)
		c.waitFor(t, "Resumed VM")
		w.do(t, "mem stop")
		w.do(t, "mem verify")
		c.Process.Signal(syscall.SIGTERM)
		c.wait(t, 0)
	})
}
