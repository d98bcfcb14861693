package faults

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/drafter-vm/drafter/internal/testguest"
	"github.com/drafter-vm/drafter/pkg/vmpackage"
)

const (
	realMemory = 128 << 20 // bytes of a real guest
	realDisk   = 64 << 20
	loadedMiB  = 24 // that the guest writes over and over
	slots      = 1024

	// guestWait bounds anything that real guests are waited for. They are emulated, and the machine may be busy.
	guestWait = 5 * time.Minute
)

// room is where real peers run: the built command, a package of a guest, and what is started.
type room struct {
	bin, dir string
	tenant   tenant
	mark     string    // in the environment of every process that is started here, and of theirs
	ranOn    durations // from blows before the record to the guest's running on
}

// newRoom builds the command and makes a package of a guest, or skips the test with the reason.
func newRoom(t *testing.T, guest tenant) *room {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: userfaultfd in another process")
	}
	if testing.Short() {
		t.Skip("boots real machines: left out with -short")
	}
	dir, err := os.MkdirTemp("", "df") // short, for unix sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	r := &room{tenant: guest, bin: filepath.Join(dir, "drafter"), dir: dir, mark: fmt.Sprintf("DRAFTER_FAULTS=%d-%s-", os.Getpid(), filepath.Base(dir))}
	if err := os.Mkdir(r.path("tmp"), 0o700); err != nil {
		t.Fatal(err)
	}
	// A peer that was killed leaves its machine alive, by design. When all is over, nobody adopts it.
	t.Cleanup(func() { r.killAll() })
	r.build(t, r.bin, "cmd/drafter")
	if err := os.WriteFile(r.path("blank"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(r.path("blank"), realDisk); err != nil {
		t.Fatal(err)
	}
	guest.pack(t, r)
	return r
}

// build builds a program of ours.
func (r *room) build(t *testing.T, out, pkg string) {
	t.Helper()
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", out, "github.com/drafter-vm/drafter/"+pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if said, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build %s: %v\n%s", pkg, err, said)
	}
}

func (r *room) path(name string) string { return filepath.Join(r.dir, name) }

// packaged is the file of a device of the package.
func (r *room) packaged(device string) string {
	return filepath.Join(r.path("package"), vmpackage.DefaultFile(device))
}

func newWait(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), guestWait)
	t.Cleanup(cancel)
	return ctx
}

// processes lists those that were started here, directly or not, and have not ended.
func (r *room) processes() (pids []int) {
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		if r.started(pid, r.mark) || r.holds(pid, r.dir) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// machines are the hypervisor's processes that were started by a peer of a name.
func (r *room) machines(name string) (pids []int) {
	for _, pid := range r.processes() {
		exe, _ := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
		if strings.Contains(exe, r.tenant.hypervisor()) && (r.started(pid, r.mark+name+"=") || r.holds(pid, r.path(name))) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// started reports whether a process has a mark in its environment.
func (r *room) started(pid int, mark string) bool {
	environ, _ := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid)) // empty for a zombie
	return bytes.Contains(environ, []byte(mark))
}

// holds reports whether a process is a hypervisor that has the lock of an instance in a folder, or below it: a jailer takes the environment away.
func (r *room) holds(pid int, folder string) bool {
	exe, _ := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
	if !strings.Contains(exe, r.tenant.hypervisor()) {
		return false
	}
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, _ := os.ReadDir(dir)
	return slices.ContainsFunc(entries, func(e os.DirEntry) bool {
		to, _ := os.Readlink(filepath.Join(dir, e.Name()))
		return strings.HasPrefix(to, folder+"/") && strings.Contains(to, "/overlay/")
	})
}

func (r *room) killAll() {
	for _, pid := range r.processes() {
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
}

// proc is a command that runs, and the console of its guest.
type proc struct {
	*exec.Cmd
	room    *room
	name    string
	args    []string
	console *testguest.Console
	done    chan struct{}
	rc      int
	again   bool // it goes on where another of its name has ended

	mu    sync.Mutex // guards what follows
	out   bytes.Buffer
	grown chan struct{} // closed and replaced when out grows
}

// Write receives stderr.
func (p *proc) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	close(p.grown)
	p.grown = make(chan struct{})
	return p.out.Write(b)
}

func (p *proc) said() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.out.String()
}

// start starts the command with a console of its own.
func (r *room) start(t *testing.T, name string, args ...string) *proc {
	t.Helper()
	console, err := testguest.NewConsole()
	if err != nil {
		t.Fatal(err)
	}
	p := &proc{Cmd: exec.Command(r.bin, args...), room: r, name: name, args: args, console: console, done: make(chan struct{}), grown: make(chan struct{})}
	p.Env = append(os.Environ(), r.mark+name+"=1", "TMPDIR="+r.path("tmp"))
	p.Stdin, p.Stdout, p.Stderr = console.Input(), console, p
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { // awaited below
		defer close(p.done)
		_ = p.Cmd.Wait() // the exit status says it
		p.rc = p.ProcessState.ExitCode()
	}()
	t.Cleanup(func() {
		_ = p.Process.Kill()
		<-p.done
		console.Close()
		if t.Failed() {
			t.Logf("%s (drafter %q), exit status %d:\n%s\nits console: %.2000s", name, args, p.rc, p.said(), console.Log())
		}
	})
	return p
}

// peer starts a peer of an instance of the package, by the name of both.
func (r *room) peer(t *testing.T, name string, more ...string) *proc {
	t.Helper()
	return r.start(t, name, append([]string{"peer", "--netns", "", "--chroot-base-dir", r.path("vms"), "--package", r.path("package"), "--instance", r.path(name),
		"--enable-input", "--log-level", "debug", "--resume-timeout", "1m", "--rescue-timeout", "1m"}, append(r.tenant.flags(), more...)...)...)
}

// ended reports whether the command has ended.
func (p *proc) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// ends waits for its end.
func (p *proc) ends(t *testing.T) {
	t.Helper()
	select {
	case <-p.done:
	case <-newWait(t).Done():
		_ = p.Process.Signal(syscall.SIGQUIT) // for its stacks
		<-p.done
		t.Fatalf("%s does not end:\n%s", p.name, p.said())
	}
}

// says waits until it has said one of some texts, or has ended. It returns the one, or "".
func (p *proc) says(t *testing.T, texts ...string) string {
	t.Helper()
	ctx := newWait(t)
	for {
		p.mu.Lock()
		said, grown := p.out.String(), p.grown
		p.mu.Unlock()
		first, at := "", len(said)
		for _, text := range texts {
			if i := strings.Index(said, text); i >= 0 && i < at && strings.Contains(said[i:], "\n") {
				first, at = text, i
			}
		}
		if first != "" {
			return first
		}
		select {
		case <-grown:
		case <-p.done:
			if !slices.ContainsFunc(texts, func(text string) bool { return strings.Contains(p.said(), text) }) {
				return ""
			}
		case <-ctx.Done():
			t.Fatalf("%s says none of %q:\n%s", p.name, texts, p.said())
		}
	}
}

// state waits for a state of the migration.
func (p *proc) state(t *testing.T, s fmt.Stringer) bool {
	t.Helper()
	return p.says(t, "state="+s.String()+"\n") != ""
}

// kill is SIGKILL, and waits for the end.
func (p *proc) kill() {
	_ = p.Process.Kill()
	<-p.done
}

// lastState is the last state of a migration that it has reported.
func (p *proc) lastState() string {
	said := p.said()
	i := strings.LastIndex(said, `msg="migration state"`)
	if i < 0 {
		return "none"
	}
	_, rest, _ := strings.Cut(said[i:], " state=")
	state, _, _ := strings.Cut(rest, "\n")
	return state
}

// do has the guest do something.
func (p *proc) do(t *testing.T, command string) string {
	t.Helper()
	answer, err := p.try(newWait(t), command)
	if err != nil {
		t.Fatalf("%s: %v", p.name, err)
	}
	return answer
}

func (p *proc) try(ctx context.Context, command string) (string, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() { // ends with ctx
		select {
		case <-p.done:
			cancel(errors.New("the peer has ended"))
		case <-ctx.Done():
		}
	}()
	return p.console.Do(ctx, command)
}

// executing counts the machines whose guests run, which their loads keep busy: by the time that they get from the kernel, until one
// of them has had a good deal of it. One that is paused gets next to none, one that has to share gets some.
func executing(ctx context.Context, pids []int) (n int) {
	before := map[int]int{}
	for _, pid := range pids {
		before[pid] = cpuTicks(pid)
	}
	for {
		most := 0
		for _, pid := range pids {
			most = max(most, cpuTicks(pid)-before[pid])
		}
		if most >= 100 || ctx.Err() != nil {
			for _, pid := range pids {
				if cpuTicks(pid)-before[pid] > most/10 {
					n++
				}
			}
			return n
		}
		time.Sleep(50 * time.Millisecond) // between two looks
	}
}

// cpuTicks is the time that a process has had, in hundredths of a second; 0 for one that has ended. See proc(5).
func cpuTicks(pid int) (n int) {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, rest, ok := strings.Cut(string(b), ") ")
	fields := strings.Fields(rest)
	if !ok || len(fields) < 13 {
		return 0
	}
	user, _ := strconv.Atoi(fields[11])
	system, _ := strconv.Atoi(fields[12])
	return user + system
}

// freeAddress is one that nobody listens on.
func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}
