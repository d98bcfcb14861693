package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/drafter-vm/drafter/internal/testguest"
	"github.com/drafter-vm/drafter/pkg/agent/socket"
	"github.com/drafter-vm/drafter/pkg/runner"
	"github.com/drafter-vm/drafter/pkg/vmpackage"
)

// workshop is where commands are run: the built program, a folder for what it makes, and the files of a guest.
type workshop struct {
	bin, dir string
	mark     string // in the environment of every process that is started here, and of theirs
	console  *testguest.Console
	env      []string // more of it, for every process
	shells   int      // commands that a guest's shell was given
}

// marks makes the mark of each workshop different.
var marks atomic.Int64

func newWorkshop(t *testing.T) *workshop {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: userfaultfd in another process, users and control groups")
	}
	if testing.Short() {
		t.Skip("boots real machines: left out with -short")
	}
	w := (&workshop{bin: build(t, "../../cmd/drafter")}).apart(t)
	blank, err := os.Create(filepath.Join(w.dir, "blank"))
	if err == nil {
		err = errors.Join(blank.Truncate(diskSize), blank.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	return w
}

// apart is a workshop with copies of some folders of this one, so that parts of a test can run beside each other.
func (w *workshop) apart(t *testing.T, folders ...string) *workshop {
	t.Helper()
	other := &workshop{
		bin: w.bin, dir: shortDir(t), mark: fmt.Sprintf("DRAFTER_E2E=%d-%d-", os.Getpid(), marks.Add(1)), console: newConsole(t), env: w.env,
	}
	for _, name := range folders {
		copyAll(t, w.path(name), other.path(name))
	}
	// A peer that was killed leaves its machine alive, by design. Here nobody will adopt it.
	t.Cleanup(func() {
		for _, pid := range other.processes() {
			syscall.Kill(pid, syscall.SIGKILL)
		}
	})
	return other
}

// path is a path in the workshop's folder.
func (w *workshop) path(name string) string { return filepath.Join(w.dir, name) }

// vms is the folder of running machines.
func (w *workshop) vms() string { return w.path("vms") }

// processes lists those that were started here, directly or not, and have not ended.
func (w *workshop) processes() []int {
	var pids []int
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		environ, _ := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid)) // empty for a zombie
		if bytes.Contains(environ, []byte(w.mark)) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// checkClean checks that nothing of any command is left: no process, folder, socket or mount.
func (w *workshop) checkClean(t *testing.T) {
	t.Helper()
	for _, pid := range w.processes() {
		line, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		t.Errorf("process %d is left: %.100q", pid, line)
	}
	// The folder itself goes with the peer that made it, unless another uses it then.
	if entries, err := os.ReadDir(w.vms()); err == nil && len(entries) > 0 {
		out, _ := exec.Command("find", w.vms()).Output()
		t.Errorf("machines have left something:\n%s", out)
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(mounts), w.vms()) {
		t.Errorf("a mount is left:\n%s", mounts)
	}
}

// command is a command line that runs.
type command struct {
	*exec.Cmd
	args []string
	done chan struct{}
	rc   int

	mu     sync.Mutex // guards what follows
	stderr bytes.Buffer
	grown  chan struct{} // closed and replaced when stderr grows
}

// Write receives stderr.
func (c *command) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	close(c.grown)
	c.grown = make(chan struct{})
	return c.stderr.Write(p)
}

func (c *command) said() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.stderr.String()
}

// start starts drafter with arguments. Stdin and stdout are the guest's console, if one is given.
func (w *workshop) start(t *testing.T, console *testguest.Console, args ...string) *command {
	t.Helper()
	if console == nil {
		return w.startWith(t, nil, nil, args...)
	}
	// The pipe itself is stdin: what one peer has not read of it is the next one's.
	return w.startWith(t, console.Input(), console, args...)
}

func (w *workshop) startWith(t *testing.T, stdin io.Reader, stdout io.Writer, args ...string) *command {
	t.Helper()
	c := &command{Cmd: exec.Command(w.bin, args...), args: args, done: make(chan struct{}), grown: make(chan struct{})}
	c.Env = append(append(os.Environ(), w.mark+"=1"), w.env...)
	c.Stdin, c.Stdout, c.Stderr = stdin, stdout, c
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(c.done)
		c.Wait()
		c.rc = c.ProcessState.ExitCode()
	}()
	t.Cleanup(func() {
		c.Process.Signal(syscall.SIGTERM)
		select {
		case <-c.done:
		case <-time.After(30 * time.Second): // it waits for a peer, and the test for nothing
			c.Process.Kill()
			<-c.done
		}
		if t.Failed() {
			t.Logf("drafter %q:\n%s", args, c.said())
		}
	})
	return c
}

// wait waits for the end and checks the exit status, which must be one of want. It returns what was said.
func (c *command) wait(t *testing.T, want ...int) string {
	t.Helper()
	select {
	case <-c.done:
	case <-newContext(t).Done():
		c.Process.Signal(syscall.SIGQUIT) // for its stacks
		<-c.done
		t.Fatalf("drafter %q did not end:\n%s", c.args, c.said())
	}
	if !slices.Contains(want, c.rc) {
		t.Errorf("drafter %q: exit status %d, want %d; it said:\n%s", c.args, c.rc, want, c.said())
	}
	return c.said()
}

// waitFor waits until stderr has text, and returns the rest of that line.
func (c *command) waitFor(t *testing.T, text string) string {
	t.Helper()
	return c.waitForCount(t, text, 1)
}

// waitForCount is waitFor for the n-th text.
func (c *command) waitForCount(t *testing.T, text string, n int) string {
	t.Helper()
	ctx := newContext(t)
	for {
		c.mu.Lock()
		parts := strings.SplitN(c.stderr.String(), text, n+1)
		grown := c.grown
		c.mu.Unlock()
		if line, _, whole := strings.Cut(parts[len(parts)-1], "\n"); len(parts) == n+1 && whole {
			return line
		}
		select {
		case <-grown:
		case <-c.done:
			if strings.Count(c.said(), text) >= n {
				continue
			}
			t.Fatalf("drafter %q ended with status %d before it said %q:\n%s", c.args, c.rc, text, c.said())
		case <-ctx.Done():
			t.Fatalf("drafter %q does not say %q:\n%s", c.args, text, c.said())
		}
	}
}

// snapshotter is the command line that makes the package w.dir/NAME.
func (w *workshop) snapshotter(t *testing.T, name string, more ...string) []string {
	t.Helper()
	kernel, initrd := testguest.BuildWith(t, map[string]string{
		"/bin/drafter-agent": build(t, "../../cmd/drafter-agent"), "/bin/guest": build(t, "./guest"),
	})
	out := func(device string) string {
		return filepath.Join(w.path(name), vmpackage.DefaultFile(device))
	}
	devices := fmt.Sprintf(`[{"name":"state","output":%q},{"name":"memory","output":%q},{"name":"config","output":%q},
		{"name":"kernel","input":%q,"output":%q},{"name":"initrd","input":%q,"output":%q},{"name":"disk","input":%q,"output":%q}]`,
		out("state"), out("memory"), out("config"), kernel, out("kernel"), initrd, out("initrd"), w.path("blank"), out("disk"))
	return append([]string{"snapshotter", "--devices", devices, "--netns", "", "--interface", "", "--memory-size", fmt.Sprint(memorySize >> 20),
		"--boot-args", "console=ttyS0 quiet panic=-1 testguest.channel=off", "--chroot-base-dir", w.vms(), "--enable-input"}, more...)
}

// peer is the command line of an instance of the package.
func (w *workshop) peer(pkg, instance string, more ...string) []string {
	args := []string{"peer", "--netns", "", "--chroot-base-dir", w.vms(), "--package", w.path(pkg), "--enable-input"}
	if instance != "" {
		args = append(args, "--instance", w.path(instance))
	}
	return append(args, more...)
}

// snapshot makes a package with a guest whose services run.
func (w *workshop) snapshot(t *testing.T, name string, more ...string) *command {
	t.Helper()
	c := w.start(t, w.console, w.snapshotter(t, name, more...)...)
	g := &guest{console: w.console}
	ctx, cancel := context.WithCancelCause(newContext(t))
	go func() {
		<-c.done // at the latest at the end of the test
		cancel(errors.New("the snapshotter has ended"))
	}()
	if err := g.startServices(ctx); err != nil {
		t.Fatalf("start the services: %v", err)
	}
	return c
}

var packed shared // the package of pack

// pack puts a package with a guest whose services run into w.dir/package.
func (w *workshop) pack(t *testing.T) {
	t.Helper()
	packed.copyTo(t, w.path("package"), func() { w.snapshot(t, "package").wait(t, 0) })
}

// do has the guest do something.
func (w *workshop) do(t *testing.T, command string) string {
	t.Helper()
	return (&guest{console: w.console}).do(t, command)
}

// vmPath is the folder of the instance that a peer says it runs.
func vmPath(t *testing.T, c *command) string {
	t.Helper()
	_, path, ok := strings.Cut(c.waitFor(t, "Resumed VM in "), " on ")
	if !ok {
		t.Fatalf("the peer does not name the VMPath:\n%s", c.said())
	}
	return path
}

// machinePID is the process of a peer's machine.
func machinePID(t *testing.T, c *command) int {
	t.Helper()
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", c.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, task := range tasks {
		children, _ := os.ReadFile(task)
		for _, child := range strings.Fields(string(children)) {
			exe, _ := os.Readlink("/proc/" + child + "/exe")
			if strings.Contains(exe, "qemu") {
				pid, _ := strconv.Atoi(child)
				return pid
			}
		}
	}
	t.Fatalf("drafter %q has no QEMU process", c.args)
	return 0
}

// status is a field of /proc/PID/status.
func status(t *testing.T, pid int, field string) string {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(b), field+":")
	line, _, _ := strings.Cut(rest, "\n")
	return strings.Join(strings.Fields(line), " ")
}

// TestCommandMachineFlags reads the machine flags back from where they take effect.
func TestCommandMachineFlags(t *testing.T) {
	t.Parallel()
	w := newWorkshop(t)
	c := w.snapshot(t, "package", "--cpu-count", "2", "--uid", "65534", "--gid", "65533", "--cgroup-version", "1", "--numa-node", "0")
	c.wait(t, 0)
	w.checkClean(t)

	nodeCPUs, err := os.ReadFile("/sys/devices/system/node/node0/cpulist")
	if err != nil {
		t.Skipf("needs a kernel that describes its NUMA nodes: %v", err)
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		uid, gid, cgroup int
		sync             bool
	}{{65534, 65533, 2, false}, {0, 0, 1, true}, {65534, 65533, 0, true}} {
		t.Run(fmt.Sprintf("uid %d, cgroup %d, sync %v", tt.uid, tt.cgroup, tt.sync), func(t *testing.T) {
			if fs := map[int]string{1: " cgroup ", 2: " cgroup2 "}[tt.cgroup]; !strings.Contains(string(mounts), fs) {
				t.Skipf("needs a mounted cgroup hierarchy of version %d", tt.cgroup)
			}
			c := w.start(t, w.console, w.peer("package", "instance", "--uid", fmt.Sprint(tt.uid), "--gid", fmt.Sprint(tt.gid), "--numa-node", "0",
				"--cgroup-version", fmt.Sprint(tt.cgroup), fmt.Sprintf("--io-engine-sync=%v", tt.sync), "--log-level", "debug")...)
			path := vmPath(t, c)
			id := filepath.Base(filepath.Dir(path))
			pid := machinePID(t, c)
			if got, want := status(t, pid, "Uid"), strings.TrimSuffix(strings.Repeat(fmt.Sprint(tt.uid, " "), 4), " "); got != want {
				t.Errorf("the VMM's uids are %s, want %s", got, want)
			}
			if got, want := status(t, pid, "Gid"), strings.TrimSuffix(strings.Repeat(fmt.Sprint(tt.gid, " "), 4), " "); got != want {
				t.Errorf("the VMM's gids are %s, want %s", got, want)
			}
			if tt.uid != 0 && status(t, pid, "CapEff") != "0000000000000000" {
				t.Errorf("the VMM has capabilities: %s", status(t, pid, "CapEff"))
			}
			if root, err := os.Readlink(fmt.Sprintf("/proc/%d/root", pid)); err != nil || root != path {
				t.Errorf("the VMM's root is %q, want %q (%v)", root, path, err)
			}
			if got, want := status(t, pid, "Cpus_allowed_list"), strings.TrimSpace(string(nodeCPUs)); got != want {
				t.Errorf("the VMM may run on the CPUs %s, want those of the node: %s", got, want)
			}
			groups, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
			if err != nil {
				t.Fatal(err)
			}
			in := map[int]int{}
			for line := range strings.Lines(string(groups)) {
				if strings.Contains(line, "/drafter/"+id) {
					version := 1
					if strings.HasPrefix(line, "0:") {
						version = 2
					}
					in[version]++
				}
			}
			if tt.cgroup == 0 && len(in) != 0 || tt.cgroup != 0 && (len(in) != 1 || in[tt.cgroup] == 0) {
				t.Errorf("the VMM is in cgroups of its own by version %v, want one of version %d:\n%s", in, tt.cgroup, groups)
			}
			workers := map[bool]string{false: "workers=0", true: "workers=1"}[tt.sync]
			if !strings.Contains(c.said(), workers) {
				t.Errorf("the disk is not served with %s", workers)
			}
			maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/numa_maps", pid))
			if err != nil {
				t.Errorf("the VMM's memory policy cannot be read: %v", err)
			} else if !strings.Contains(string(maps), "bind:0") {
				t.Errorf("the VMM's memory is not bound to node 0")
			}

			// What the guest sees, and that disks and lazy memory work as that user.
			if cpus := w.do(t, "cpus"); cpus != "2" {
				t.Errorf("the guest has %s CPUs, want 2", cpus)
			}
			var kib int64
			if _, err := fmt.Sscanf(strings.Trim(w.do(t, "cat /proc/meminfo"), `"`), "MemTotal: %d kB", &kib); err != nil || kib > memorySize>>10 || kib < memorySize>>10*3/4 {
				t.Errorf("the guest has %d KiB of memory of %d (%v)", kib, memorySize>>10, err)
			}
			want := w.do(t, "disk disk write 4096 1048576 5")
			if got := w.do(t, "disk disk sum 4096 1048576"); got != want {
				t.Errorf("the disk has %s, written was %s", got, want)
			}
			w.do(t, "mem start 16")
			w.do(t, "mem stop")
			w.do(t, "mem verify")
			c.Process.Signal(syscall.SIGTERM)
			c.wait(t, 0)
			w.checkClean(t)
			left, _ := filepath.Glob("/sys/fs/cgroup/*/drafter/" + id)
			more, _ := filepath.Glob("/sys/fs/cgroup/drafter/" + id)
			if left = append(left, more...); len(left) > 0 {
				t.Errorf("control groups are left: %q", left)
			}
		})
	}
	t.Run("input and output", func(t *testing.T) { w.testConsoleFlags(t) })
	t.Run("output that nobody reads", func(t *testing.T) { w.testReaderLeaves(t) })
}

// testConsoleFlags checks that the guest hears and is heard only if it was asked for.
func (w *workshop) testConsoleFlags(t *testing.T) {
	var quiet, loud bytes.Buffer
	run := func(stdout *bytes.Buffer, line string, flags ...string) (heard bool) {
		r, in, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		defer in.Close()
		peer := w.startWith(t, r, stdout, append([]string{"peer", "--netns", "", "--chroot-base-dir", w.vms(),
			"--package", w.path("package"), "--instance", w.path("instance")}, flags...)...)
		l, err := socket.ListenHost(vmPath(t, peer), 4321)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		said := make(chan string, 1)
		go func() {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			defer conn.Close()
			b, _ := io.ReadAll(conn)
			said <- string(b)
		}()
		fmt.Fprintf(in, "%s\nrun /bin/guest say 4321 heard\n", line)
		if slices.Contains(flags, "--enable-input") {
			select {
			case <-said:
				heard = true
			case <-newContext(t).Done():
			}
		}
		peer.Process.Signal(os.Interrupt)
		peer.wait(t, 0)
		w.checkClean(t)
		return heard
	}
	if !run(&quiet, "put /quiet yes", "--enable-input", "--enable-output=false") {
		t.Error("the guest did not hear what was written with --enable-input")
	}
	if quiet.Len() > 0 {
		t.Errorf("with --enable-output=false the console says %q", quiet.String())
	}
	run(&bytes.Buffer{}, "put /deaf yes")
	if !run(&loud, "cat /quiet", "--enable-input") || !strings.Contains(loud.String(), "yes") {
		t.Errorf("with --enable-output the console says %q", loud.String())
	}
	loud.Reset()
	if run(&loud, "cat /deaf", "--enable-input"); !strings.Contains(loud.String(), "= cat error") {
		t.Errorf("without --enable-input the guest heard: %q", loud.String())
	}
}

// testReaderLeaves takes the reader of all output away, as a pipe to head does: the guest runs on and is saved in the end.
func (w *workshop) testReaderLeaves(t *testing.T) {
	r, stdin, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer stdin.Close()
	left, stdout, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	c := w.startWith(t, r, stdout, w.peer("package", "instance")...)
	stdout.Close()
	l, err := socket.ListenHost(vmPath(t, c), 4321)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	left.Close()
	fmt.Fprintf(stdin, "echo hello\nput /lonely yes\nrun /bin/guest say 4321 done\n")
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	c.Process.Signal(os.Interrupt)
	c.wait(t, 0)
	w.checkClean(t)
}

// TestCommandSnapshotterInterrupted ends the snapshotter by a signal at each of its stages.
func TestCommandSnapshotterInterrupted(t *testing.T) {
	t.Parallel()
	w := newWorkshop(t)
	for _, stage := range []string{"copy", "boot", "suspend", "hash"} {
		t.Run(stage, func(t *testing.T) {
			var c *command
			if stage == "suspend" || stage == "hash" {
				c = w.snapshot(t, "made/package")
			} else {
				c = w.start(t, w.console, w.snapshotter(t, "made/package")...)
			}
			c.waitFor(t, "stage="+stage)
			c.Process.Signal(os.Interrupt)
			c.Process.Signal(os.Interrupt) // impatience changes nothing
			if stage == "hash" {
				c.wait(t, 0, 130)
				if c.rc == 0 { // all but done when the signal came: then the package is whole
					if _, err := vmpackage.Open(w.path("made/package")); err != nil {
						t.Error(err)
					}
					os.RemoveAll(w.path("made"))
				}
			} else if said := c.wait(t, 130); !strings.Contains(said, "interrupted") {
				t.Errorf("it does not say that it was interrupted:\n%s", said)
			}
			w.checkClean(t)
			if _, err := os.Stat(w.path("made")); !errors.Is(err, os.ErrNotExist) {
				out, _ := exec.Command("find", w.path("made")).Output()
				t.Errorf("files of the package are left:\n%s", out)
			}
		})
	}
	t.Run("killed", func(t *testing.T) {
		c := w.snapshot(t, "made/package")
		c.waitFor(t, "stage=suspend") // so that there is a machine, whatever it has come to
		machine := machinePID(t, c)
		c.Process.Kill()
		c.wait(t, -1)
		for ctx := newContext(t); running(machine); w.pass(c, 10) {
			if ctx.Err() != nil {
				t.Fatal("its machine lives on")
			}
		}
		w.snapshot(t, "made/package").wait(t, 0)
		w.checkClean(t)
		os.RemoveAll(w.path("made"))
	})
	t.Run("no answer", func(t *testing.T) {
		said := w.start(t, w.console, w.snapshotter(t, "made/package", "--resume-timeout", "3s")...).wait(t, 1)
		if !strings.Contains(said, "did not say that it is up") || !strings.Contains(said, "3s") {
			t.Errorf("it does not say that the guest did not answer within 3s:\n%s", said)
		}
		w.checkClean(t)
		if _, err := os.Stat(w.path("made")); !errors.Is(err, os.ErrNotExist) {
			t.Error("files of the package are left")
		}
	})
}

// newInstance is a workshop with a saved instance, whose guest writes to memory and disk whenever it runs, and the check that what the guest has is what
// it had when the last peer was closed, however that was.
func newInstance(t *testing.T) (w *workshop, verify func(*testing.T)) {
	t.Helper()
	w = newWorkshop(t)
	w.pack(t)
	w.checkClean(t)
	c := w.start(t, w.console, w.peer("package", "instance")...)
	c.waitFor(t, "Resumed VM")
	w.do(t, "mem start 64")
	w.do(t, "disk disk start 4096")
	c.Process.Signal(syscall.SIGTERM)
	c.wait(t, 0)
	w.checkClean(t)
	return w, func(t *testing.T) {
		t.Helper()
		w.do(t, "mem stop")
		w.do(t, "mem verify")
		last := w.do(t, "disk disk verify")
		w.do(t, "mem go")
		w.do(t, "disk disk start 4096 "+last)
	}
}

// TestCommandPeerInterrupted interrupts peers of one package. It is not parallel: how far they have come by then is by the clock.
func TestCommandPeerInterrupted(t *testing.T) {
	w, verify := newInstance(t)

	t.Run("signals at many moments", func(t *testing.T) {
		for n, after := range sample[time.Duration](t, 0, 10, 30, 50, 70, 90, 120, 160, 250, 500, -1) {
			c := w.start(t, w.console, w.peer("package", "instance")...)
			sig := []os.Signal{os.Interrupt, syscall.SIGTERM, syscall.SIGHUP}[n%3]
			if after < 0 {
				c.waitFor(t, "Resumed VM")
			} else {
				select { // nothing to wait for: the moment is what is tested
				case <-time.After(after * time.Millisecond):
				case <-c.done:
				}
			}
			c.Process.Signal(sig)
			c.Process.Signal(sig)
			// -1: it had not come so far as to hear of signals.
			c.wait(t, 0, 130, -1)
			if c.rc == -1 && after > 50 {
				t.Errorf("%v after %v ms killed it", sig, int(after))
			}
			w.checkClean(t)
			if t.Failed() {
				t.Fatalf("after %v at %d ms", sig, int(after))
			}
		}
		c := w.start(t, w.console, w.peer("package", "instance")...)
		c.waitFor(t, "Resumed VM")
		verify(t)
		c.Process.Signal(os.Interrupt)
		c.wait(t, 0)
		w.checkClean(t)
	})

	t.Run("migration interrupted at many moments", func(t *testing.T) { w.testMigrationInterrupted(t, verify) })
}

// TestCommandPeer runs and breaks peers of one package.
func TestCommandPeer(t *testing.T) {
	t.Parallel()
	w, verify := newInstance(t)

	t.Run("instance in use", func(t *testing.T) {
		first := w.start(t, w.console, w.peer("package", "instance")...)
		first.waitFor(t, "Resumed VM")
		if said := w.start(t, nil, w.peer("package", "instance")...).wait(t, 1); !strings.Contains(said, "another process holds it") || !strings.Contains(said, w.path("instance")) {
			t.Errorf("the second peer does not say that the instance is in use:\n%s", said)
		}
		verify(t)
		first.Process.Signal(os.Interrupt)
		first.wait(t, 0)
		w.checkClean(t)
	})

	t.Run("base changed", func(t *testing.T) {
		disk := filepath.Join(w.path("package"), vmpackage.DefaultFile("disk"))
		info, err := os.Stat(disk)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(disk, time.Time{}, info.ModTime().Add(time.Second)); err != nil {
			t.Fatal(err)
		}
		defer os.Chtimes(disk, time.Time{}, info.ModTime())
		if said := w.start(t, nil, w.peer("package", "instance")...).wait(t, 1); !strings.Contains(said, "changed since the overlay was made") || !strings.Contains(said, disk) {
			t.Errorf("it does not say that the base changed:\n%s", said)
		}
		w.checkClean(t)
	})

	t.Run("agent that does not answer", func(t *testing.T) {
		// A guest that is called on a port where nobody listens: the package says so.
		pkg := w.path("deaf")
		if out, err := exec.Command("cp", "-a", "--sparse=always", w.path("package"), pkg).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		path := filepath.Join(pkg, vmpackage.DefaultFile("config"))
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		desc, err := runner.ParseDescription(b)
		if err != nil {
			t.Fatal(err)
		}
		desc.AgentVSockPort = 27
		if b, err = desc.Encode(); err == nil {
			err = os.WriteFile(path, b, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
		said := w.start(t, w.console, w.peer("deaf", "deaf-instance", "--resume-timeout", "2s")...).wait(t, 1)
		if !strings.Contains(said, "agent") || !strings.Contains(said, "2s") {
			t.Errorf("it does not say that the agent did not answer within 2s:\n%s", said)
		}
		w.checkClean(t)
	})

	t.Run("no space to save", func(t *testing.T) {
		small := w.mountSmall(t, "16m")
		fill := func() *command {
			c := w.start(t, w.console, w.peer("package", "small/instance")...)
			c.waitFor(t, "Resumed VM")
			w.do(t, "mem start 64")
			for pass := 0; pass < 2; { // until all of it was written
				if _, err := fmt.Sscan(w.do(t, "mem status"), &pass); err != nil {
					t.Fatal(err)
				}
			}
			c.Process.Signal(os.Interrupt)
			c.waitFor(t, "no space left")
			return c
		}
		// It waits for room, and then nothing is lost.
		c := fill()
		if err := unix.Mount("", small, "", unix.MS_REMOUNT, "size=300m"); err != nil {
			t.Fatalf("give the tmpfs room: %v", err)
		}
		c.wait(t, 0)
		w.checkClean(t)
		c = w.start(t, w.console, w.peer("package", "small/instance")...)
		c.waitFor(t, "Resumed VM")
		w.do(t, "mem stop")
		w.do(t, "mem verify")
		c.Process.Signal(os.Interrupt)
		c.wait(t, 0)
		w.checkClean(t)

		// Who does not want to wait loses the memory, and is told what is left.
		if err := os.RemoveAll(w.path("small/instance")); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount("", small, "", unix.MS_REMOUNT, "size=16m"); err != nil {
			t.Fatalf("take the room back: %v", err)
		}
		c = fill()
		c.Process.Signal(os.Interrupt)
		c.wait(t, 1)
		w.checkClean(t)
		if said := w.start(t, nil, w.peer("package", "small/instance")...).wait(t, 1); !strings.Contains(said, "--boot") {
			t.Errorf("the message does not offer --boot:\n%s", said)
		}
	})

	t.Run("packager interrupted", func(t *testing.T) { w.testPackagerInterrupted(t) })

	t.Run("migration", func(t *testing.T) { w.testMigrationBroken(t, verify) })

	t.Run("package without overlays", func(t *testing.T) {
		for n := range 3 {
			c := w.start(t, w.console, w.peer("package", "")...)
			c.waitFor(t, "Resumed VM")
			if n > 0 {
				if got := w.do(t, "cat /round"); got != strconv.Quote(fmt.Sprint(n-1)) {
					t.Errorf("the guest is in round %s, want %d: it does not go on from where it was closed", got, n-1)
				}
				w.do(t, "mem verify")
				w.do(t, "disk disk verify")
			} else {
				w.do(t, "mem start 32")
				w.do(t, "disk disk start 4096")
			}
			w.do(t, fmt.Sprintf("put /round %d", n))
			if n == 0 {
				w.do(t, "mem stop")
			}
			c.Process.Signal(syscall.SIGTERM)
			c.wait(t, 0)
			w.checkClean(t)
		}
		entries, err := os.ReadDir(w.path("package"))
		if err != nil {
			t.Fatal(err)
		}
		// Earlier moves have left an index of each file beside it.
		entries = slices.DeleteFunc(entries, func(e os.DirEntry) bool { return strings.HasSuffix(e.Name(), ".index") })
		if len(entries) != 7 {
			t.Errorf("the package has %d files, want 7: %v", len(entries), entries)
		}
	})
}

// tap is a proxy on the way of a migration. When limit bytes have come from the source it says so and from then on passes
// on little, so that what follows happens in the middle.
type tap struct {
	addr    string
	reached chan struct{}
	close   func()
}

func newTap(t *testing.T, source string, limit int64) *tap { return newTapOn(t, source, false, limit) }

// newTapOn is newTap, with pushes on the way to a peer to which the source comes.
func newTapOn(t *testing.T, peer string, pushes bool, limit int64) *tap {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &tap{addr: l.Addr().String(), reached: make(chan struct{})}
	var wg sync.WaitGroup
	p.close = sync.OnceFunc(func() { l.Close(); wg.Wait() })
	t.Cleanup(p.close)
	var passed atomic.Int64
	reached := sync.OnceFunc(func() { close(p.reached) })
	// A migration has several connections.
	pipe(l, peer, pushes, &wg, func(down, up net.Conn) {
		for {
			n, err := io.CopyN(down, up, 4<<10)
			if passed.Add(n) >= limit {
				reached()
				time.Sleep(time.Millisecond) // the slow link, not a wait
			}
			if err != nil {
				return
			}
		}
	})
	return p
}

// pipe accepts connections of l until it is closed, and makes one to source for each. What comes from source is passed on by
// pass, which ends the connection when it returns; the other direction passes as it is. wg counts all that goes on.
func pipe(l net.Listener, peer string, pushes bool, wg *sync.WaitGroup, pass func(to, from net.Conn)) {
	wg.Go(func() {
		for {
			down, err := l.Accept()
			if err != nil {
				return
			}
			up, err := net.Dial("tcp", peer)
			if err != nil {
				down.Close() // it is not there now
				continue
			}
			to, from := down, up
			if pushes {
				to, from = up, down
			}
			wg.Go(func() {
				io.Copy(from, to)
				from.Close() // with one direction the connection ends
				to.Close()
			})
			wg.Go(func() {
				defer from.Close()
				defer to.Close()
				pass(to, from)
			})
		}
	})
}

// mountSmall mounts a tmpfs with little room as the folder "small", until the end of the test.
func (w *workshop) mountSmall(t *testing.T, size string) string {
	t.Helper()
	small := w.path("small")
	if err := os.MkdirAll(small, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", small, "tmpfs", 0, "size="+size); err != nil {
		t.Fatalf("mount a small tmpfs: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(small, 0); err != nil {
			t.Errorf("unmount %s: %v", small, err)
		}
	})
	return small
}

// testPackagerInterrupted ends the packager at many moments: what it makes is there as a whole or not at all.
func (w *workshop) testPackagerInterrupted(t *testing.T) {
	var pack, extract []string
	for _, name := range []string{"state", "memory", "kernel", "initrd", "disk", "config"} {
		file := vmpackage.DefaultFile(name)
		pack = append(pack, fmt.Sprintf(`{"name":%q,"path":%q}`, name, filepath.Join(w.path("package"), file)))
		extract = append(extract, fmt.Sprintf(`{"name":%q,"path":%q}`, name, filepath.Join(w.path("extracted"), file)))
	}
	archive := w.path("archive/app.tar.zst")
	line := []string{"packager", "--package-path", archive, "--devices", "[" + strings.Join(pack, ",") + "]"}
	for _, step := range []struct {
		folder string
		files  int
		args   []string
	}{
		{"archive", 1, line},
		{"extracted", 7, []string{"packager", "--package-path", archive, "--extract", "--devices", "[" + strings.Join(extract, ",") + "]"}},
	} {
		for _, after := range sample[time.Duration](t, 5, 15, 30, 60, 120, 240, 480) {
			if err := os.MkdirAll(filepath.Dir(archive), 0o700); err != nil {
				t.Fatal(err)
			}
			c := w.start(t, nil, step.args...)
			select { // nothing to wait for: the moment is what is tested
			case <-time.After(after * time.Millisecond):
			case <-c.done:
			}
			c.Process.Signal(os.Interrupt)
			c.wait(t, 0, 130, -1) // -1: it had not come so far as to hear of signals
			entries, _ := os.ReadDir(w.path(step.folder))
			if want := map[bool]int{true: step.files}[c.rc == 0]; len(entries) != want {
				t.Errorf("after %d ms, status %d, there are %v, want %d files", after, c.rc, entries, want)
			}
			for _, e := range entries {
				os.Remove(filepath.Join(w.path(step.folder), e.Name()))
			}
			w.checkClean(t)
		}
		w.start(t, nil, step.args...).wait(t, 0)
	}
}

// testMigrationInterrupted interrupts one of the peers at many moments of migrations at full speed. Whatever happens, one
// of them has the instance in the end, and the other nothing.
func (w *workshop) testMigrationInterrupted(t *testing.T, verify func(*testing.T)) {
	holder := "hop"
	c := w.start(t, w.console, w.peer("package", holder)...)
	c.waitFor(t, "Resumed VM")
	w.do(t, "mem start 64")
	w.do(t, "disk disk start 4096")
	c.Process.Signal(os.Interrupt)
	c.wait(t, 0)
	moved := 0
	type moment struct {
		destination bool          // it is interrupted
		after       time.Duration // ms after its start; -1: when the destination says that the VM runs
	}
	for n, moment := range sample(t, moment{true, 150}, moment{false, 250}, moment{true, 400}, moment{false, 500}, moment{true, 700}, moment{false, 900},
		moment{true, -1}, moment{false, -1}, moment{true, 1200}, moment{false, 1600}) {
		source := w.start(t, w.console, w.peer("package", holder, "--laddr", "127.0.0.1:0")...)
		addr := source.waitFor(t, "Serving on ")
		verify(t)
		hop := fmt.Sprintf("hop-%d", n)
		destination := w.start(t, w.console, w.peer("package", hop, "--raddr", addr)...)
		if moment.after < 0 {
			destination.waitFor(t, "VM runs here")
		} else {
			select { // nothing to wait for: the moment is what is tested
			case <-time.After(moment.after * time.Millisecond):
			case <-destination.done:
			}
		}
		victim := source
		if moment.destination {
			victim = destination
		}
		victim.Process.Signal(os.Interrupt)
		victim.wait(t, 0, 130)
		if moment.destination && victim.rc == 130 {
			source.waitFor(t, "the VM runs on here")
			source.Process.Signal(os.Interrupt)
		}
		source.wait(t, 0)
		if strings.Contains(source.said(), "Sent VM") {
			destination.waitFor(t, "Received VM")
			destination.Process.Signal(os.Interrupt)
			destination.wait(t, 0)
			holder = hop
			moved++
		} else {
			destination.wait(t, 1, 130)
			if _, err := os.Stat(w.path(hop)); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the destination left files in %s", w.path(hop))
			}
		}
		w.checkClean(t)
		if t.Failed() {
			t.Fatalf("at moment %+v", moment)
		}
	}
	c = w.start(t, w.console, w.peer("package", holder)...)
	c.waitFor(t, "Resumed VM")
	verify(t)
	c.Process.Signal(os.Interrupt)
	c.wait(t, 0)
	w.checkClean(t)
	t.Logf("%d of the migrations were complete", moved)
}

// testMigrationBroken breaks migrations at either end. The instance must run on where it was, and nothing be left at the
// other end.
func (w *workshop) testMigrationBroken(t *testing.T, verify func(*testing.T)) {
	source := w.start(t, w.console, w.peer("package", "instance", "--laddr", "127.0.0.1:0")...)
	addr := source.waitFor(t, "Serving on ")
	failures := 2 // of the three strangers below, runsOn counts the last
	runsOn := func(t *testing.T) {
		t.Helper()
		failures++
		source.waitForCount(t, "the VM runs on here", failures)
		verify(t)
	}

	for _, stranger := range []string{"GET / HTTP/1.0\r\n\r\n", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", ""} {
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprint(conn, stranger)
		conn.(*net.TCPConn).CloseWrite()
		io.Copy(io.Discard, conn)
		conn.Close()
	}
	runsOn(t)

	t.Run("destination with the source's files", func(t *testing.T) {
		said := w.start(t, nil, w.peer("package", "instance", "--raddr", addr)...).wait(t, 1)
		if !strings.Contains(said, "another process holds it") || !strings.Contains(said, w.path("instance")) {
			t.Errorf("the destination does not say what is in use:\n%s", said)
		}
		verify(t) // the source has not even been asked
	})

	t.Run("destination runs out of space", func(t *testing.T) {
		small := w.mountSmall(t, "512k")
		w.do(t, "disk disk write 33554432 4194304 9")
		said := w.start(t, nil, w.peer("package", "small/instance", "--raddr", addr)...).wait(t, 1)
		if !strings.Contains(said, "no space left") {
			t.Errorf("the destination does not say what failed:\n%s", said)
		}
		runsOn(t)
		if entries, err := os.ReadDir(small); err != nil || len(entries) > 0 {
			t.Errorf("the destination left files: %v (%v)", entries, err)
		}
	})

	for _, tt := range []struct {
		name string
		sig  syscall.Signal
		at   int64 // bytes
	}{{"destination interrupted at once", syscall.SIGINT, 4 << 10}, {"destination interrupted", syscall.SIGTERM, 24 << 20}, {"destination killed", syscall.SIGKILL, 24 << 20}} {
		t.Run(tt.name, func(t *testing.T) {
			before := w.processes()
			link := newTap(t, addr, tt.at)
			destination := w.start(t, nil, w.peer("package", "there", "--raddr", link.addr)...)
			select {
			case <-link.reached:
			case <-destination.done:
				t.Fatalf("the destination ended before it was to:\n%s", destination.said())
			}
			destination.Process.Signal(tt.sig)
			destination.wait(t, map[syscall.Signal]int{syscall.SIGINT: 130, syscall.SIGTERM: 130, syscall.SIGKILL: -1}[tt.sig])
			link.close()
			runsOn(t)
			after := w.processes()
			if tt.sig == syscall.SIGKILL {
				// Its machine holds nothing that anybody could want, and ends with it.
				for ctx := newContext(t); len(after) != len(before) && ctx.Err() == nil; after = w.processes() {
					time.Sleep(10 * time.Millisecond) // between two looks
				}
				if said := w.start(t, nil, w.peer("package", "there")...).wait(t, 1); !strings.Contains(said, "did not finish") {
					t.Errorf("it does not say that the migration did not finish:\n%s", said)
				}
				os.RemoveAll(w.path("there"))
				after = w.processes()
			}
			if !slices.Equal(before, after) {
				t.Errorf("processes were %v and are %v", before, after)
			}
			if entries, err := os.ReadDir(w.path("there")); err == nil {
				t.Errorf("the destination left files: %v", entries)
			}
		})
	}

	t.Run("source interrupted", func(t *testing.T) {
		link := newTap(t, addr, 24<<20)
		destination := w.start(t, nil, w.peer("package", "there", "--raddr", link.addr)...)
		<-link.reached
		source.Process.Signal(os.Interrupt)
		source.wait(t, 0)
		link.close()
		if said := destination.wait(t, 1); !strings.Contains(said, "receive from") {
			t.Errorf("the destination does not say what failed:\n%s", said)
		}
		if entries, err := os.ReadDir(w.path("there")); err == nil {
			t.Errorf("the destination left files: %v", entries)
		}
		if pids := w.processes(); len(pids) > 0 {
			t.Errorf("processes are left: %v", pids)
		}
	})

	t.Run("source killed", func(t *testing.T) {
		source := w.start(t, w.console, w.peer("package", "instance", "--laddr", "127.0.0.1:0")...)
		addr := source.waitFor(t, "Serving on ")
		verify(t)
		orphan := machinePID(t, source)
		link := newTap(t, addr, 24<<20)
		destination := w.start(t, nil, w.peer("package", "there", "--raddr", link.addr)...)
		<-link.reached
		source.Process.Kill()
		source.wait(t, -1)
		destination.wait(t, 1)
		link.close()
		if pids := w.processes(); !slices.Equal(pids, []int{orphan}) {
			t.Errorf("the processes %v are left, want only the VMM of the source, %d", pids, orphan)
		}
		if entries, err := os.ReadDir(w.path("there")); err == nil {
			t.Errorf("the destination left files: %v", entries)
		}
		// The machine lives on, and whoever starts the instance gets it, even by --boot.
		for _, more := range [][]string{nil, {"--boot"}} {
			c := w.start(t, w.console, w.peer("package", "instance", more...)...)
			c.waitFor(t, "Adopted VM on ")
			verify(t)
			c.Process.Kill()
			c.wait(t, -1)
		}
		syscall.Kill(orphan, syscall.SIGKILL)
		// To start it as if nothing had happened would lose what its memory held: only a boot is offered.
		said := w.start(t, nil, w.peer("package", "instance")...).wait(t, 1)
		if !strings.Contains(said, "--boot") {
			t.Errorf("the message does not offer --boot:\n%s", said)
		}
		w.checkClean(t)
	})
}
