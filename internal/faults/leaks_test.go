package faults

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/drafter-vm/drafter/pkg/vmpackage"
)

// holdings are what a process has open: how many descriptors of each kind. Sockets, pipes and what has no name are counted as what
// they are, files by their names, without what differs from one instance to another.
type holdings map[string]int

var machineID = regexp.MustCompile(`[0-9a-f]{16}`)

// holdings of a process whose instance has that name.
func (r *room) holdings(pid int, instance string) holdings {
	h := holdings{}
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, _ := os.ReadDir(dir) // nothing of one that has ended
	for _, e := range entries {
		to, err := os.Readlink(filepath.Join(dir, e.Name()))
		if err != nil {
			continue
		}
		to = strings.TrimSuffix(to, " (deleted)")
		if kind, _, ok := strings.Cut(to, ":["); ok && (kind == "socket" || kind == "pipe") {
			to = kind
		}
		to = strings.Replace(to, r.path(instance)+"/", "INSTANCE/", 1)
		h[machineID.ReplaceAllString(to, "ID")]++
	}
	return h
}

// more lists what h has that there was not before.
func (h holdings) more(before holdings) (more []string) {
	for _, kind := range slices.Sorted(maps.Keys(h)) {
		if n := h[kind] - before[kind]; n > 0 {
			more = append(more, fmt.Sprintf("%d × %s", n, kind))
		}
	}
	return more
}

// resting are the holdings of a peer and of its machine, at rest.
type resting struct{ peer, machine holdings }

func (r *room) resting(t *testing.T, p *proc) resting {
	t.Helper()
	machines := r.machines(p.name)
	if len(machines) != 1 {
		t.Fatalf("%s has machines %v, want one", p.name, machines)
	}
	peer := r.holdings(p.Process.Pid, p.name)
	for kind := range peer {
		if strings.HasSuffix(kind, ".missing") {
			delete(peer, kind) // one list of what had not arrived of each disk, deleted, is kept open by who has received it
		}
	}
	return resting{peer, r.holdings(machines[0], p.name)}
}

// checkResting waits until a peer and its machine hold nothing that they did not hold before, or that belongs to a peer of their
// kind.
func (r *room) checkResting(t *testing.T, p *proc, before resting) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for {
		now := r.resting(t, p)
		peer, machine := now.peer.more(before.peer), now.machine.more(before.machine)
		if len(peer)+len(machine) == 0 {
			return
		}
		select {
		case <-time.After(50 * time.Millisecond): // between two looks
		case <-ctx.Done():
			t.Errorf("%s still has open what it had not before: %q, and its machine %q", p.name, peer, machine)
			return
		}
	}
}

// spaces are the kinds of namespaces that a process can have of its own.
var spaces = []string{"net", "mnt", "pid", "ipc", "uts", "user", "cgroup"}

// strayNamespaces lists processes here that are in other namespaces than this one: nobody here has any reason to make one, but for a jailer.
func (r *room) strayNamespaces() (stray []string) {
	for _, pid := range r.processes() {
		for _, space := range spaces {
			own, _ := os.Readlink("/proc/self/ns/" + space)
			its, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", pid, space))
			if err == nil && its != own && !(space == "mnt" && r.tenant.jailed()) {
				stray = append(stray, fmt.Sprintf("process %d is in a namespace of its own, %s", pid, its))
			}
		}
	}
	return stray
}

// leaks lists what is left of what ran here, when nothing does any more: processes (and so their memory, as a memfd lives no longer
// than who holds it), folders of machines, sockets, mounts, temporary files, and files in instances that are none of its devices.
func (r *room) leaks() (left []string) {
	for _, pid := range r.processes() {
		line, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		left = append(left, fmt.Sprintf("process %d: %.150q", pid, line))
	}
	for _, dir := range []string{r.path("vms"), r.path("tmp")} {
		if entries, err := os.ReadDir(dir); err == nil && len(entries) > 0 {
			out, _ := exec.Command("find", dir).Output()
			left = append(left, fmt.Sprintf("files:\n%s", out))
		}
	}
	for _, table := range []string{"/proc/self/mounts", "/proc/net/unix"} {
		b, err := os.ReadFile(table)
		if err != nil {
			left = append(left, err.Error())
		}
		for line := range bytes.Lines(b) {
			if bytes.Contains(line, []byte(r.dir+"/")) {
				left = append(left, fmt.Sprintf("in %s: %s", table, line))
			}
		}
	}
	known := map[string]bool{}
	for _, device := range vmpackage.KnownNames() {
		known[vmpackage.DefaultFile(device)] = true
	}
	for _, folder := range []string{"overlay", "state"} {
		files, _ := filepath.Glob(r.path("*/" + folder + "/*"))
		for _, f := range files {
			if !known[filepath.Base(f)] {
				left = append(left, "file "+f)
			}
		}
	}
	return left
}

// checkClean checks that nothing is left of what ran here.
func (r *room) checkClean(t *testing.T) {
	t.Helper()
	for _, l := range r.leaks() {
		t.Errorf("something is left: %s", l)
	}
}

// own are the holdings of the test itself.
func (r *room) own() holdings { return r.holdings(os.Getpid(), "") }

// TestLeaksAreFound leaves one thing after another behind, and shows that each is seen.
func TestLeaksAreFound(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root: mounts and namespaces")
	}
	dir := t.TempDir()
	r := &room{tenant: linux{}, dir: dir, mark: fmt.Sprintf("DRAFTER_FAULTS=%d-planted-", os.Getpid())}
	file := func(path string) func(t *testing.T) {
		return func(t *testing.T) {
			if err := os.MkdirAll(filepath.Dir(r.path(path)), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(r.path(path), nil, 0o600); err != nil {
				t.Fatal(err)
			}
			folder, _, _ := strings.Cut(path, "/")
			t.Cleanup(func() { os.RemoveAll(r.path(folder)) })
		}
	}
	for name, leave := range map[string]func(t *testing.T){
		"a process":                  func(t *testing.T) { r.sleeper(t, "x", nil) },
		"a folder of a machine":      file("vms/qemu/0123456789abcdef"),
		"a temporary file":           file("tmp/x"),
		"an overlay of nothing":      file("b/overlay/disk.tmp"),
		"a list of what was missing": file("b/state/rootfs.ext4.missing"),
		"a socket": func(t *testing.T) {
			l, err := net.Listen("unix", r.path("s"))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { l.Close() })
		},
		"a mount": func(t *testing.T) {
			if err := os.MkdirAll(r.path("m"), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := unix.Mount("tmpfs", r.path("m"), "tmpfs", 0, "size=64k"); err != nil {
				t.Skipf("mount: %v", err)
			}
			t.Cleanup(func() { unix.Unmount(r.path("m"), unix.MNT_DETACH) })
		},
	} {
		t.Run(name, func(t *testing.T) {
			if left := r.leaks(); len(left) > 0 {
				t.Fatalf("there is something already: %q", left)
			}
			leave(t)
			if left := r.leaks(); len(left) != 1 {
				t.Errorf("found %q, want one thing", left)
			}
		})
	}

	t.Run("descriptors", func(t *testing.T) {
		first := r.sleeper(t, "x", nil)
		memfd, err := unix.MemfdCreate("drafter-0123456789abcdef", unix.MFD_CLOEXEC)
		if err != nil {
			t.Fatal(err)
		}
		pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		var files []*os.File
		for _, fd := range append(pair[:], memfd) {
			f := os.NewFile(uintptr(fd), "planted")
			defer f.Close()
			files = append(files, f)
		}
		pid, want := r.sleeper(t, "x", nil, files...), []string{"1 × /memfd:drafter-ID", "2 × socket"}
		before, now := r.holdings(first, "x"), r.holdings(pid, "x")
		for end := time.Now().Add(10 * time.Second); !slices.Equal(now.more(before), want) || len(before.more(now)) > 0; {
			if time.Now().After(end) { // a program that begins has files of its libraries open for a moment
				t.Fatalf("found %q, want %q, and of what is not open %q", now.more(before), want, before.more(now))
			}
			time.Sleep(10 * time.Millisecond)
			before, now = r.holdings(first, "x"), r.holdings(pid, "x")
		}
	})
	t.Run("a namespace", func(t *testing.T) {
		r.sleeper(t, "x", nil)
		if stray := r.strayNamespaces(); len(stray) > 0 {
			t.Errorf("found %q, and there is none", stray)
		}
		r.sleeper(t, "x", &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNET})
		if stray := r.strayNamespaces(); len(stray) != 1 {
			t.Errorf("found %q, want one", stray)
		}
	})
}

// sleeper starts a process that does nothing, and returns its id.
func (r *room) sleeper(t *testing.T, name string, attr *syscall.SysProcAttr, files ...*os.File) int {
	t.Helper()
	return r.program(t, name, attr, files, "sleep", "600")
}

func (r *room) program(t *testing.T, name string, attr *syscall.SysProcAttr, files []*os.File, args ...string) int {
	t.Helper()
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Env, cmd.SysProcAttr, cmd.ExtraFiles = append(os.Environ(), r.mark+name+"=1"), attr, files
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // it was killed
	})
	// The kernel lets us go on before it shows the program's environment.
	for environ := fmt.Sprintf("/proc/%d/environ", cmd.Process.Pid); ; time.Sleep(time.Millisecond) {
		if text, err := os.ReadFile(environ); err != nil || strings.Contains(string(text), r.mark) {
			return cmd.Process.Pid
		}
	}
}

// TestTwoOwnersAreFound shows that machines which execute at the same time are counted, and one that does nothing is not.
func TestTwoOwnersAreFound(t *testing.T) {
	r := &room{tenant: linux{}, dir: t.TempDir(), mark: fmt.Sprintf("DRAFTER_FAULTS=%d-busy-", os.Getpid())}
	ctx, cancel := context.WithTimeout(t.Context(), guestWait)
	defer cancel()
	busy := func() int { return r.program(t, "x", nil, nil, "sh", "-c", "while :; do :; done") }
	pids := []int{r.sleeper(t, "x", nil), busy()}
	if n := executing(ctx, pids); n != 1 {
		t.Errorf("%d of an idle and a busy process execute, want one", n)
	}
	if n := executing(ctx, append(pids, busy())); n != 2 {
		t.Errorf("%d of an idle and two busy processes execute, want two", n)
	}
}

// guestsFindErrors damages what a real guest has, and shows that the checks with which each scene ends see it: a page of its
// memory, a record of its journal, a record that was flushed and is not there, and a second machine that executes.
func (r *room) guestsFindErrors(t *testing.T) {
	defer r.killAll()
	a, b := r.peer(t, "a"), r.peer(t, "b")
	for _, p := range []*proc{a, b} {
		p.says(t, "Resumed VM")
		r.tenant.begin(t, p)
	}
	if n := executing(newWait(t), append(r.machines("a"), r.machines("b")...)); n != 2 {
		t.Errorf("%d machines execute a guest, and there are two", n)
	}
	r.killAllOf("b")
	r.tenant.findsErrors(t, a)
}

// killAllOf kills what a peer of a name has started, and itself.
func (r *room) killAllOf(name string) {
	for _, pid := range r.processes() {
		environ, _ := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
		if bytes.Contains(environ, []byte(r.mark+name+"=")) {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	}
}

// memory opens the memory of a peer's guest.
func (p *proc) memory(t *testing.T) *os.File {
	t.Helper()
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", p.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(fds, func(fd string) bool {
		to, _ := os.Readlink(fd)
		return regexp.MustCompile(`^/memfd:drafter-[0-9a-f]{16} `).MatchString(to)
	})
	if i < 0 {
		t.Fatalf("%s has no memory among %q", p.name, fds)
	}
	memory, err := os.OpenFile(fds[i], os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	return memory
}

// damageMemory changes a page that the guest's load has written, in the middle of sixteen in a row, behind its back.
func (p *proc) damageMemory(t *testing.T) {
	t.Helper()
	memory := p.memory(t)
	defer memory.Close()
	page := make([]byte, 4096)
	for off, run := int64(0), 0; ; off += int64(len(page)) {
		if _, err := memory.ReadAt(page, off); err != nil {
			t.Fatalf("found nothing to damage: %v", err)
		}
		if page[0] == 0 || bytes.Count(page[8:], []byte{0}) != len(page)-8 {
			run = 0
		} else if run++; run == 16 {
			page[0] ^= 0x40
			if _, err := memory.WriteAt(page, off); err != nil {
				t.Fatal(err)
			}
			return
		}
	}
}
