// Package e2e tests the whole path with real machines: a guest that checks itself is snapshotted, resumed, cloned, and moved
// between peers while it writes to all of its memory and to its disk.
//
// The tests need root, QEMU and, once, the Debian mirror; they skip, with the reason, where that is missing, and TestMain
// fails when nothing ran.
//
// A guest keeps one core busy, so that two tests at a time take hardly longer than one: tests are parallel, but for those that
// say why not.
package e2e

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/drafter-vm/drafter/internal/testguest"
	"github.com/drafter-vm/drafter/internal/testpackage"
	"github.com/drafter-vm/drafter/pkg/agent/socket"
	"github.com/drafter-vm/drafter/pkg/migrate"
	"github.com/drafter-vm/drafter/pkg/peer"
	"github.com/drafter-vm/drafter/pkg/runner"
	"github.com/drafter-vm/drafter/pkg/snapshot"
	"github.com/drafter-vm/drafter/pkg/vmm"
	"github.com/drafter-vm/drafter/pkg/vmm/qemu"
	"github.com/drafter-vm/drafter/pkg/vmpackage"
)

const (
	memorySize = 192 << 20
	diskSize   = 64 << 20

	machineID = "0123456789abcdef0123456789abcdef" // of guests in packages
	// spareMiB of its memory is what the guest leaves to its kernel and programs while it writes all the rest over and over.
	spareMiB = 24
)

// guestWait bounds anything a guest is asked to do. Emulated guests on a busy machine are slow; a hang is longer still.
const guestWait = 5 * time.Minute

// guest is a package whose guest obeys commands on its console and has an agent.
type guest struct {
	backend vmm.Backend
	pkg     string // folder of the package
	console *testguest.Console
}

// long runs also what takes long and is contained in something else.
var long = flag.Bool("long", false, "run also cases that another contains")

// guests counts the guests that were made, so that a run in which every test skipped does not pass for one that passed.
var guests atomic.Int64

func TestMain(m *testing.M) {
	// Under nohup(1) the commands would inherit that SIGHUP is ignored, and honour it. A caught one they do not inherit.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGHUP)
	if signal.Ignored(os.Interrupt) { // as a shell has it for what it starts with &
		signal.Notify(make(chan os.Signal, 1), os.Interrupt)
	}
	status := m.Run()
	for _, dir := range []string{built.dir, packed.dir, made.dir} {
		os.RemoveAll(dir)
	}
	whole := flag.Lookup("test.run").Value.String() == "" && !testing.Short()
	if status == 0 && whole && os.Getuid() == 0 && guests.Load() == 0 {
		fmt.Fprintln(os.Stderr, "end-to-end tests: no guest was made, so nothing was tested")
		status = 1
	}
	os.Exit(status)
}

// sample is a third of the moments that a test has, chosen by chance, and the last one; with -long it is all of them. What a moment finds is in
// the log of a test that fails.
func sample[T any](t *testing.T, moments ...T) []T {
	t.Helper()
	if *long {
		return moments
	}
	var some []T
	for n := rand.IntN(3); n < len(moments)-1; n += 3 {
		some = append(some, moments[n])
	}
	some = append(some, moments[len(moments)-1])
	t.Logf("at the moments %v of %v: all with -long", some, moments)
	return some
}

func newContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), guestWait)
	t.Cleanup(cancel)
	return ctx
}

// shortDir is a temporary folder with a path short enough for unix sockets.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "dr")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// newConsole returns a console whose log a failing test shows.
func newConsole(t *testing.T) *testguest.Console {
	t.Helper()
	c, err := testguest.NewConsole()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.Close()
		if t.Failed() {
			t.Logf("the guest's console:\n%s", c.Log())
		}
	})
	return c
}

// built are the programs that build has built. TestMain removes them.
var built struct {
	dir string

	mu    sync.Mutex        // guards what follows
	paths map[string]string // by package
}

// build builds a static program, once for all tests: to link it takes a second or more.
func build(t *testing.T, pkg string) string {
	t.Helper()
	built.mu.Lock()
	defer built.mu.Unlock()
	if path, ok := built.paths[pkg]; ok {
		return path
	}
	if built.dir == "" {
		dir, err := os.MkdirTemp("", "dr-built")
		if err != nil {
			t.Fatal(err)
		}
		built.dir, built.paths = dir, make(map[string]string)
	}
	path := filepath.Join(built.dir, filepath.Base(pkg))
	if err := testpackage.Build(t.Context(), ".", pkg, path); err != nil {
		t.Fatal(err)
	}
	built.paths[pkg] = path
	return path
}

// shared is a package that is made once for all tests, which takes longer than most of what they do with it. TestMain removes it.
type shared struct {
	once sync.Once
	dir  string // that of the folder "package"; empty: it could not be made
}

// copyTo puts the package at to; who comes first makes it there, by fresh.
func (s *shared) copyTo(t *testing.T, to string, fresh func()) {
	t.Helper()
	s.once.Do(func() {
		fresh()
		dir, err := os.MkdirTemp("", "dr-package")
		if err != nil {
			t.Fatal(err)
		}
		copyAll(t, to, filepath.Join(dir, "package"))
		s.dir = dir
	})
	if _, err := os.Stat(to); err == nil {
		return
	}
	if s.dir == "" {
		t.Fatal("the package could not be made: another test says why")
	}
	copyAll(t, filepath.Join(s.dir, "package"), to)
}

// copyAll copies a folder, with its holes and times.
func copyAll(t *testing.T, from, to string) {
	t.Helper()
	if out, err := exec.Command("cp", "-aT", "--sparse=always", from, to).CombinedOutput(); err != nil {
		t.Fatalf("copy %s: %v\n%s", from, err, out)
	}
}

var made shared // the package of newGuest

// newGuest makes a package in the way drafter snapshotter does.
func newGuest(t *testing.T, extraDisks ...string) *guest {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: userfaultfd in another process, and network namespaces")
	}
	if testing.Short() {
		t.Skip("boots real machines: left out with -short")
	}
	g := &guest{backend: qemu.New(qemu.Options{}), pkg: filepath.Join(shortDir(t), "package"), console: newConsole(t)}
	if len(extraDisks) > 0 {
		g.snapshot(t, extraDisks)
	} else {
		made.copyTo(t, g.pkg, func() { g.snapshot(t, nil) })
	}
	guests.Add(1)
	return g
}

// snapshot makes the package.
func (g *guest) snapshot(t *testing.T, extraDisks []string) {
	t.Helper()
	dir := shortDir(t)
	files := map[string]string{"/bin/drafter-agent": build(t, "../../cmd/drafter-agent"), "/bin/guest": build(t, "./guest")}
	for name, text := range map[string]string{"machine-id": machineID, "hostname": "packaged"} {
		files["/etc/"+name] = filepath.Join(dir, name)
		if err := os.WriteFile(files["/etc/"+name], []byte(text+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	kernel, initrd := testguest.BuildWith(t, files)
	out := func(name string) string { return filepath.Join(g.pkg, vmpackage.DefaultFile(name)) }
	devices := []snapshot.Device{
		{Name: "state", Output: out("state")}, {Name: "memory", Output: out("memory")}, {Name: "config", Output: out("config")},
		{Name: "kernel", Input: kernel, Output: out("kernel")}, {Name: "initrd", Input: initrd, Output: out("initrd")},
	}
	for _, name := range append([]string{"disk"}, extraDisks...) { // "shared:NAME" is one that its guest may only read
		name, shared := strings.CutPrefix(name, "shared:")
		blank := filepath.Join(dir, name+".blank")
		if err := os.WriteFile(blank, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(blank, diskSize); err != nil {
			t.Fatal(err)
		}
		devices = append(devices, snapshot.Device{Name: name, Input: blank, Output: out(name), Shared: shared})
	}

	ctx, cancel := context.WithCancel(newContext(t))
	defer cancel()
	started := make(chan error, 1)
	go func() { started <- g.startServices(ctx) }()
	_, err := snapshot.Create(ctx, snapshot.Config{
		Backend: g.backend, Devices: devices, MemorySize: memorySize, BootArgs: "console=ttyS0 quiet panic=-1 testguest.channel=off",
		LivenessVSockPort: snapshot.DefaultLivenessVSockPort, AgentVSockPort: snapshot.DefaultAgentVSockPort,
		Host: g.host(t), ResumeTimeout: guestWait,
	})
	if err != nil {
		cancel()
	}
	if err := errors.Join(err, <-started); err != nil {
		t.Fatalf("make package: %v", err)
	}
}

// startServices does what the init system of a blueprint does.
func (g *guest) startServices(ctx context.Context) error {
	if err := g.console.Ready(ctx); err != nil {
		return err
	}
	for _, command := range []string{
		"spawn /bin/drafter-agent vsock",
		"spawn /bin/drafter-agent agent --shell-cmd /bin/guest --before-suspend-cmd before --after-resume-cmd after",
		"spawn /bin/drafter-agent liveness",
	} {
		if _, err := g.console.Do(ctx, command); err != nil {
			return fmt.Errorf("%s: %w", command, err)
		}
	}
	return nil
}

func (g *guest) host(t *testing.T) runner.Host {
	return runner.Host{Dir: shortDir(t), SerialOutput: g.console, SerialInput: g.console.Input()}
}

// config is an instance of the package with overlays in folder.
func (g *guest) config(t *testing.T, folder string) peer.Config {
	t.Helper()
	pkg, err := vmpackage.Open(g.pkg)
	if err != nil {
		t.Fatal(err)
	}
	cfg := peer.Config{Backend: g.backend, Host: g.host(t), ResumeTimeout: guestWait}
	for _, d := range pkg.Devices {
		device := peer.Device{
			DeviceConfig: runner.DeviceConfig{Name: d.Name, Base: d.Path},
			Policy:       migrate.Policy{MaxDirtyBlocks: 200, MinCycles: 1, MaxCycles: 5},
		}
		if folder != "" {
			device.Overlay = filepath.Join(folder, "overlay", d.Name)
			device.State = filepath.Join(folder, "state", d.Name)
		}
		cfg.Devices = append(cfg.Devices, device)
	}
	return cfg
}

// do asks the guest, and fails the test when it cannot.
func (g *guest) do(t *testing.T, command string) string {
	t.Helper()
	answer, err := g.console.Do(newContext(t), command)
	if err != nil {
		t.Fatalf("guest: %s: %v", command, err)
	}
	return answer
}

// loadMemory makes the guest write a counter over all of its free memory.
func (g *guest) loadMemory(t *testing.T) {
	t.Helper()
	info, err := strconv.Unquote(g.do(t, "cat /proc/meminfo"))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(info, "MemAvailable:")
	var available int
	if _, err := fmt.Sscan(rest, &available); err != nil {
		t.Fatalf("no MemAvailable in %s", info)
	}
	mib := available/1024 - spareMiB
	t.Logf("the guest writes all over %d of its %d MiB", mib, memorySize>>20)
	g.do(t, fmt.Sprintf("mem start %d", mib))
}

// move hands the instance over from one peer to a new one, over TCP.
func move(t *testing.T, from *peer.Peer, to peer.Config) (*peer.Peer, *migrate.Report) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx := newContext(t)
	var wg sync.WaitGroup
	var sent *migrate.Report
	var sendErr error
	wg.Go(func() {
		conn, err := l.Accept()
		if err != nil {
			sendErr = err
			return
		}
		defer conn.Close()
		sent, sendErr = from.Send(ctx, []io.ReadWriter{conn})
	})
	conn, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	p, _, err := peer.Receive(ctx, to, []io.ReadWriter{conn})
	wg.Wait()
	if err := errors.Join(err, sendErr); err != nil {
		t.Fatalf("move: %v", err)
	}
	t.Logf("moved: %v", sent)
	if err := from.Close(ctx); err != nil {
		t.Errorf("close the source after the move: %v", err)
	}
	return p, sent
}

func TestMigrateUnderLoad(t *testing.T) {
	t.Parallel()
	g := newGuest(t)
	ctx := newContext(t)
	folders := []string{shortDir(t), shortDir(t)}
	p, err := peer.Resume(ctx, g.config(t, folders[0]))
	if err != nil {
		t.Fatalf("resume: %v", err)
	}
	defer func() { p.Close(context.WithoutCancel(ctx)) }()

	g.loadMemory(t)
	g.do(t, "disk disk start 4096")
	for n := 1; n <= 3; n++ {
		var report *migrate.Report
		p, report = move(t, p, g.config(t, folders[n%2]))
		if len(report.Digests) == 0 {
			t.Error("the report has no digests: nothing was compared")
		}
		t.Logf("memory at %s, disk at %s", g.do(t, "mem status"), g.do(t, "disk disk status"))
	}
	g.do(t, "mem stop")
	t.Logf("memory verified: %s", g.do(t, "mem verify"))
	t.Logf("disk verified: %s", g.do(t, "disk disk verify"))

	// Closed and resumed, it goes on, and what it wrote before is still right.
	g.do(t, "mem go")
	if err := p.Close(ctx); err != nil {
		t.Fatalf("close: %v", err)
	}
	if p, err = peer.Resume(ctx, g.config(t, folders[1])); err != nil {
		t.Fatalf("resume after close: %v", err)
	}
	g.do(t, "mem stop")
	t.Logf("memory verified after close and resume: %s", g.do(t, "mem verify"))
	t.Logf("disk verified after close and resume: %s", g.do(t, "disk disk verify"))

	// The folder it moved away from must never run it again.
	if _, err := peer.Resume(ctx, g.config(t, folders[0])); !errors.Is(err, runner.ErrNotSaved) || !strings.Contains(err.Error(), "moved") {
		t.Errorf("resume where it moved away from: error %v, want one that says so", err)
	}
}

// TestVerifierFindsAPlantedError shows that the checks of TestMigrateUnderLoad can fail: one page of the saved memory image
// and one block of the disk are changed behind the guest's back.
func TestVerifierFindsAPlantedError(t *testing.T) {
	t.Parallel()
	g := newGuest(t)
	ctx := newContext(t)
	p, err := peer.Resume(ctx, g.config(t, ""))
	if err != nil {
		t.Fatal(err)
	}
	g.loadMemory(t)
	g.do(t, "disk disk start 64")
	for seq := 0; seq < 64; { // until every slot of the journal has a record
		if _, err := fmt.Sscan(g.do(t, "disk disk status"), &seq); err != nil {
			t.Fatal(err)
		}
	}
	g.do(t, "mem stop")
	g.do(t, "disk disk stop")
	if err := p.Close(ctx); err != nil {
		t.Fatal(err)
	}
	damage(t, filepath.Join(g.pkg, vmpackage.DefaultFile("memory")), func(page []byte) bool {
		return page[0] != 0 && zero(page[8:]) // as the guest's memory load writes it
	})
	damage(t, filepath.Join(g.pkg, vmpackage.DefaultFile("disk")), func(page []byte) bool { return !zero(page) })
	if p, err = peer.Resume(ctx, g.config(t, "")); err != nil {
		t.Fatal(err)
	}
	defer p.Close(ctx)
	for _, command := range []string{"mem verify", "disk disk verify"} {
		if answer, err := g.console.Do(ctx, command); err == nil {
			t.Errorf("guest: %s found nothing wrong in damaged content: %s", command, answer)
		}
	}
}

// damage changes a page in the middle of the first sixteen in a row that match.
func damage(t *testing.T, path string, match func(page []byte) bool) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	page := make([]byte, 4096)
	run := 0
	for off := int64(0); ; off += int64(len(page)) {
		if _, err := f.ReadAt(page, off); err != nil {
			t.Fatalf("found nothing to damage in %s: %v", path, err)
		}
		if !match(page) {
			run = 0
			continue
		}
		if run++; run == 16 {
			page[0] ^= 0x40
			page[100] ^= 0x40
			if _, err := f.WriteAt(page, off); err != nil {
				t.Fatal(err)
			}
			return
		}
	}
}

func zero(p []byte) bool {
	for _, b := range p {
		if b != 0 {
			return false
		}
	}
	return true
}

func TestCloneTwice(t *testing.T) {
	t.Parallel()
	g := newGuest(t)
	before := digests(t, g.pkg)
	first := g.console
	for n := range 2 {
		// A console each: the clones run at the same time.
		g.console = newConsole(t)
		p, err := peer.Resume(newContext(t), g.config(t, shortDir(t)))
		if err != nil {
			t.Fatalf("resume clone %d: %v", n, err)
		}
		defer p.Close(context.WithoutCancel(t.Context()))
		name := fmt.Sprintf("clone-%d", n)
		g.do(t, "put /name "+name)
		g.do(t, fmt.Sprintf("disk disk write 0 4096 %d", n+1))
		defer func(c *testguest.Console) {
			g.console = c
			if got := g.do(t, "cat /name"); !strings.Contains(got, name) {
				t.Errorf("clone %d has name %s: clones are not independent", n, got)
			}
		}(g.console)
	}
	g.console = first
	if after := digests(t, g.pkg); after != before {
		t.Errorf("the package changed while clones of it ran:\n%s\nwas\n%s", after, before)
	}
}

// digests are those of all files of a folder.
func digests(t *testing.T, dir string) string {
	t.Helper()
	out, err := exec.Command("sh", "-c", "cd "+dir+" && sha256sum *").Output()
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

func TestAdditionalDisk(t *testing.T) {
	t.Parallel()
	g := newGuest(t, "data", "logs")
	p, err := peer.Resume(newContext(t), g.config(t, shortDir(t)))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { p.Close(context.WithoutCancel(t.Context())) }()
	for n, name := range []string{"disk", "data", "logs"} {
		if got := strings.TrimSpace(g.do(t, "cat /sys/block/vd"+string(rune('a'+n))+"/serial")); !strings.Contains(got, name) {
			t.Errorf("/dev/vd%c is %s, want %q: disks are not in the order given", 'a'+n, got, name)
		}
		if got := g.do(t, "disk "+name+" info"); got != fmt.Sprint(diskSize) {
			t.Errorf("disk %q has size %s in the guest, want %d", name, got, diskSize)
		}
	}
	want := g.do(t, "disk data write 1048576 1048576 7")
	p, _ = move(t, p, g.config(t, shortDir(t)))
	if got := g.do(t, "disk data sum 1048576 1048576"); got != want {
		t.Errorf("additional disk has digest %s after the move, want %s", got, want)
	}
}

// TestGuestSockets opens a port of the application in both directions, before and after a move.
func TestGuestSockets(t *testing.T) {
	t.Parallel()
	g := newGuest(t)
	p, err := peer.Resume(newContext(t), g.config(t, shortDir(t)))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { p.Close(context.WithoutCancel(t.Context())) }()
	g.do(t, "spawn /bin/guest listen 1234")
	for _, when := range []string{"before the move", "after the move"} {
		// Host to guest: the guest echoes.
		conn := dialGuest(t, p, 1234)
		fmt.Fprintf(conn, "hello\n")
		buf := make([]byte, 6)
		if _, err := io.ReadFull(conn, buf); err != nil || string(buf) != "hello\n" {
			t.Errorf("%s: the guest echoed %q, error %v", when, buf, err)
		}
		conn.Close()

		// Guest to host.
		l, err := socket.ListenHost(p.VMPath(), 4321)
		if err != nil {
			t.Fatal(err)
		}
		heard := make(chan string, 1)
		go func() {
			conn, err := l.Accept()
			if err != nil {
				heard <- err.Error()
				return
			}
			defer conn.Close()
			b, _ := io.ReadAll(conn)
			heard <- string(b)
		}()
		g.do(t, "run /bin/guest say 4321 greetings")
		if got := <-heard; got != "greetings" {
			t.Errorf("%s: heard %q from the guest", when, got)
		}
		l.Close()

		if when == "before the move" {
			held := dialGuest(t, p, 1234)
			p, _ = move(t, p, g.config(t, shortDir(t)))
			// Streams are reset by a move: who waits on one learns it.
			if n, err := held.Read(buf); err == nil {
				t.Errorf("a stream that was open during the move gave %d bytes after it", n)
			}
			held.Close()
		}
	}
}

// dialGuest connects to a port in the guest as soon as somebody listens there.
func dialGuest(t *testing.T, p *peer.Peer, port uint32) net.Conn {
	t.Helper()
	for ctx := newContext(t); ; {
		conn, err := socket.DialGuest(ctx, p.VMPath(), port)
		if err == nil {
			return conn
		}
		if ctx.Err() != nil || !errors.Is(err, syscall.ECONNREFUSED) {
			t.Fatalf("dial the guest: %v", err)
		}
	}
}

// TestHooksRunOnce counts how often the agent's hooks ran: once for each suspend, once for each resume.
func TestHooksRunOnce(t *testing.T) {
	t.Parallel()
	g := newGuest(t) // one suspend
	var suspended, resumed atomic.Int64
	hooks := runner.Hooks{Suspended: func() { suspended.Add(1) }, AfterResume: func() { resumed.Add(1) }}
	folder := shortDir(t)
	cfg := g.config(t, folder)
	cfg.Hooks = hooks
	p, err := peer.Resume(newContext(t), cfg) // one resume
	if err != nil {
		t.Fatal(err)
	}
	defer func() { p.Close(context.WithoutCancel(t.Context())) }()
	check := func(when string, before, after int) {
		t.Helper()
		if got := strings.Count(g.do(t, "cat /hooks"), "[before]"); got != before {
			t.Errorf("%s: the before-suspend hook ran %d times, want %d", when, got, before)
		}
		if got := strings.Count(g.do(t, "cat /hooks"), "[after]"); got != after {
			t.Errorf("%s: the after-resume hook ran %d times, want %d", when, got, after)
		}
	}
	check("after snapshot and resume", 1, 1)
	to := g.config(t, shortDir(t))
	to.Hooks = hooks
	p, _ = move(t, p, to)
	check("after a move", 2, 2)

	// A migration that fails before the commit: suspended or not, the guest runs on and its hooks are balanced.
	left, right := net.Pipe()
	failed := make(chan error, 1)
	go func() {
		_, err := p.Send(newContext(t), []io.ReadWriter{left})
		failed <- err
	}()
	broken := g.config(t, shortDir(t))
	broken.Devices = broken.Devices[1:]
	if _, _, err := peer.Receive(newContext(t), broken, []io.ReadWriter{right}); err == nil {
		t.Error("a destination without one of the devices received the instance")
	}
	if err := <-failed; err == nil {
		t.Error("sending to a destination without one of the devices succeeded")
	}
	left.Close()
	right.Close()
	check("after a refused move", 2, 2)
	if suspended.Load() != 1 || resumed.Load() != 2 {
		t.Errorf("the host's hooks saw %d suspends and %d resumes, want 1 and 2", suspended.Load(), resumed.Load())
	}
}

// cutAt is a stream that breaks when the source reaches a state.
type cutAt struct {
	net.Conn
	cut atomic.Bool
}

func (c *cutAt) Write(p []byte) (int, error) {
	if c.cut.Load() {
		c.Conn.Close()
	}
	return c.Conn.Write(p)
}

// TestRollback breaks the link before the guest is suspended, while it is, and before the commit: each time the guest runs
// on at the source, its hooks are balanced, and the destination leaves nothing.
func TestRollback(t *testing.T) {
	t.Parallel()
	g := newGuest(t)
	states := []migrate.SourceState{
		migrate.SourceCopying, migrate.SourceSuspending, migrate.SourcePausing, migrate.SourceSwitching, migrate.SourceConfirming,
	}
	var link atomic.Pointer[cutAt]
	var at atomic.Int32
	cfg := g.config(t, shortDir(t))
	cfg.OnState = func(s migrate.SourceState) {
		if int32(s) == at.Load() {
			link.Load().cut.Store(true)
			link.Load().Conn.Close()
		}
	}
	ctx := newContext(t)
	p, err := peer.Resume(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { p.Close(context.WithoutCancel(ctx)) }()
	for _, state := range states {
		left, right := net.Pipe()
		cut := &cutAt{Conn: left}
		link.Store(cut)
		at.Store(int32(state))
		failed := make(chan error, 1)
		go func() {
			_, err := p.Send(ctx, []io.ReadWriter{cut})
			failed <- err
		}()
		folder := filepath.Join(shortDir(t), "instance")
		if _, _, err := peer.Receive(ctx, g.config(t, folder), []io.ReadWriter{right}); err == nil {
			t.Fatalf("cut in state %v: the destination received the instance", state)
		}
		if err := <-failed; err == nil || errors.Is(err, migrate.ErrInDoubt) {
			t.Fatalf("cut in state %v: the source got %v, want an error before the commit", state, err)
		}
		if !p.Running() {
			t.Fatalf("cut in state %v: the guest does not run at the source", state)
		}
		hooks := g.do(t, "cat /hooks")
		if before, after := strings.Count(hooks, "[before]"), strings.Count(hooks, "[after]"); before != after {
			t.Errorf("cut in state %v: hooks ran as %s: %d before, %d after", state, hooks, before, after)
		}
		if _, err := os.Stat(folder); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("cut in state %v: the destination left %s: %v", state, folder, err)
		}
	}
	// And after all that it moves.
	at.Store(-1)
	p, _ = move(t, p, g.config(t, shortDir(t)))
	g.do(t, "mem start 8")
}

// TestOneOwner tries to run an instance in every way where it does not belong.
func TestOneOwner(t *testing.T) {
	t.Parallel()
	g := newGuest(t)
	ctx := newContext(t)
	folders := []string{shortDir(t), shortDir(t)}
	p, err := peer.Resume(ctx, g.config(t, folders[0]))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { p.Close(context.WithoutCancel(ctx)) }()
	if _, err := peer.Resume(ctx, g.config(t, folders[0])); err == nil || !strings.Contains(err.Error(), "in use") && !strings.Contains(err.Error(), "alive") && !strings.Contains(err.Error(), "another process") {
		t.Errorf("resume of a living instance: error %v, want one that says that it is taken", err)
	}
	p, _ = move(t, p, g.config(t, folders[1]))
	for name, how := range map[string]func(context.Context, peer.Config) (*peer.Peer, error){"resume": peer.Resume, "boot": peer.Boot} {
		if _, err := how(ctx, g.config(t, folders[0])); !errors.Is(err, runner.ErrNotSaved) {
			t.Errorf("%s where it moved away from: error %v, want ErrNotSaved", name, err)
		}
		forced := g.config(t, folders[0])
		forced.ForceOwner = true
		if name == "resume" { // the move was confirmed, so there is nothing to take back
			if _, err := how(ctx, forced); !errors.Is(err, runner.ErrNotSaved) {
				t.Errorf("forced %s where it moved away from: error %v, want ErrNotSaved", name, err)
			}
		}
	}

	// A machine that was loaded and never owned is not saved as if it had been.
	desc := p.Instance().Description()
	var incoming []runner.Incoming
	var devices []runner.DeviceConfig
	folder := shortDir(t)
	for _, d := range p.Instance().Devices() {
		incoming = append(incoming, runner.Incoming{Name: d.Config.Name, Size: d.Block.Size()})
	}
	cfg := g.config(t, folder)
	for _, d := range cfg.Devices {
		devices = append(devices, d.DeviceConfig)
	}
	i, err := runner.Prepare(ctx, runner.Config{Backend: g.backend, Devices: devices, Host: runner.Host{Dir: shortDir(t)}}, "rollback", desc, incoming)
	if err != nil {
		t.Fatal(err)
	}
	if err := i.Run(ctx); !errors.Is(err, runner.ErrPhase) {
		t.Errorf("run of an instance that was not received: error %v, want ErrPhase", err)
	}
	if err := i.Close(ctx); err != nil {
		t.Error(err)
	}
	if _, err := peer.Resume(ctx, g.config(t, folder)); !errors.Is(err, runner.ErrNotSaved) {
		t.Errorf("resume of what was never owned: error %v, want ErrNotSaved", err)
	}
}
