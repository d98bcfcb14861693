package vmmtest

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/drafter-vm/drafter/internal/testguest"
	"github.com/drafter-vm/drafter/pkg/vmm"
)

// Harness is what the suite has to know of a backend.
type Harness struct {
	// Backend is the one to test.
	Backend vmm.Backend

	// Attach serves the file of a disk to a machine in folder dir until the test ends. Nil means by its path.
	Attach func(t testing.TB, dir string, disk vmm.Disk, file string) vmm.Attachment

	// Dir makes the folder of a machine, for a backend that does not take any; nil means that it does. It is short, and is removed
	// with the test.
	Dir func(t testing.TB) string

	// Configure changes a machine's configuration before it starts, in every test; nil changes nothing.
	Configure func(t testing.TB, cfg *vmm.Config)

	// Tiny has the suite run package tinyguest rather than a Linux, where the backend's accelerator boots none. What
	// that cannot do is not tested, which the tests say.
	Tiny bool

	// ConsoleBuffer is more than what a machine's console holds while nobody reads it, in bytes. 0 is 400 KB.
	ConsoleBuffer int

	// ResetEnds says that a guest which asks for a reboot ends its machine as one that shuts down.
	ResetEnds bool
}

const (
	// patience ends a test that hangs. An emulated guest boots in 3.4 seconds of CPU time, which is minutes on a machine
	// that is busy enough.
	patience = 8 * time.Minute

	memorySize   = 128 << 20
	diskSize     = 4 << 20
	diskName     = "disk"
	journalSlots = 64
	memoryLoad   = "mem start 16"
	kernelArgs   = "quiet loglevel=1 testguest.socket=52 testguest.disks=" + diskName
	socketPort   = 52
)

// ownerEnv names the folder of the machine that this process is to start and own, in the second process.
const ownerEnv = "DRAFTER_VMMTEST_OWNER"

// Program is where a program is that the tests of a backend need, from an environment variable or PATH. Without it the test is skipped, loudly.
func Program(t testing.TB, name, variable string) string {
	t.Helper()
	binary := os.Getenv(variable)
	if binary != "" {
		if _, err := os.Stat(binary); err != nil { // or else a misspelt one would be one that is not there
			t.Fatalf("$%s: %v", variable, err)
		}
	} else {
		binary, _ = exec.LookPath(name)
	}
	if binary == "" {
		t.Skipf("SKIPPED, not tested: there is no %s; name one in $%s or put it into $PATH", name, variable)
	}
	return binary
}

// Run runs the suite.
func Run(t *testing.T, h Harness) {
	if dir := os.Getenv(ownerEnv); dir != "" {
		own(t, h, dir)
		return
	}
	s := newSuite(h)
	s.boot(t)
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) { c.run(s, t) })
	}
}

// cases are the tests of a suite.
var cases = []struct {
	name string
	run  func(*suite, *testing.T)
}{
	{"Load", (*suite).testLoad},
	{"Rollback", (*suite).testRollback},
	{"Cycles", (*suite).testCycles},
	{"States", (*suite).testStates},
	{"SaveAgain", (*suite).testSaveAgain},
	{"CancelledSave", (*suite).testCancelledSave},
	{"BadState", (*suite).testBadState},
	{"SlowConsole", (*suite).testSlowConsole},
	{"Channel", (*suite).testChannel},
	{"Disk", (*suite).testDisk},
	{"DiskLimit", (*suite).testDiskLimit},
	{"Reboot", (*suite).testReboot},
	{"Poweroff", (*suite).testPoweroff},
	{"PowerButton", (*suite).testPowerButton},
	{"Balloon", (*suite).testBalloon},
	{"Killed", (*suite).testKilled},
	{"CloseLeavesNothing", (*suite).testCloseLeavesNothing},
	{"FailedStart", (*suite).testFailedStart},
	{"CancelledStart", (*suite).testCancelledStart},
	{"Adopt", (*suite).testAdopt},
	{"AdoptSaved", (*suite).testAdoptSaved},
}

// Cases are the names of what Run tests.
func Cases() (names []string) {
	for _, c := range cases {
		names = append(names, c.name)
	}
	return names
}

// suite is the saved guest that the tests start from. It was saved while it wrote all over its RAM and its disk.
type suite struct {
	Harness
	guest guest
	spec  vmm.Spec
	state []byte
	ram   *os.File // a memfd: copy it
	disk  string   // a file: copy it
}

// instance is a machine with what belongs to it.
type instance struct {
	vmm.Machine
	guest   guest
	cfg     vmm.Config
	console *testguest.Console
	disk    string
	adopted bool // from an owner that died
}

func newSuite(h Harness) *suite {
	s := &suite{Harness: h, guest: linux{}}
	if h.Tiny {
		s.guest = tiny{}
	}
	return s
}

// describe describes the machine of all tests.
func (s *suite) describe(ctx context.Context) (vmm.Spec, error) {
	return s.Backend.Describe(ctx, vmm.Spec{MemorySize: memorySize, Sockets: true, BootArgs: kernelArgs, Disks: []vmm.Disk{{Name: diskName, Size: diskSize}}})
}

func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeoutCause(t.Context(), patience, fmt.Errorf("the test's patience of %v has ended", patience))
	t.Cleanup(cancel)
	return ctx
}

// boot boots the guest and saves it. What it checks on the way is that it can.
func (s *suite) boot(t *testing.T) {
	ctx := testContext(t)
	kernel, initrd := s.guest.build(t)
	spec, err := s.describe(ctx)
	if err != nil {
		t.Fatalf("%s cannot be used here: %v", s.Backend.Name(), err)
	}
	if err := s.Backend.Compatible(ctx, spec); err != nil {
		t.Fatalf("Compatible with what Describe said just now: %v", err)
	}
	s.spec = spec
	s.disk = filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(s.disk, make([]byte, diskSize), 0o600); err != nil {
		t.Fatal(err)
	}
	s.ram = NewMemory(t, memorySize)

	cfg := s.config(t, s.ram, s.disk)
	cfg.Boot = &vmm.Boot{Kernel: kernel, Initrd: initrd}
	began := time.Now()
	i := s.start(t, cfg, s.disk)
	s.guest.begin(t, i, began)
	began = time.Now()
	if err := i.Pause(ctx); err != nil {
		t.Fatal(err)
	}
	paused := time.Now()
	first := digest(t, s.ram)
	var state bytes.Buffer
	saving := time.Now()
	if err := i.Save(ctx, &state); err != nil {
		t.Fatal(err)
	}
	t.Logf("paused in %v, saved %d bytes in %v", paused.Sub(began), state.Len(), time.Since(saving))
	s.state = state.Bytes()
	if len(s.state) > 4<<20 {
		t.Errorf("the device state has %d bytes: RAM is in it", len(s.state))
	}
	if digest(t, s.ram) != first {
		t.Error("the RAM of a paused machine has changed")
	}
	if err := i.Close(); err != nil {
		t.Fatal(err)
	}
}

// config returns the configuration of a machine that waits for Load.
func (s *suite) config(t testing.TB, ram *os.File, disk string) vmm.Config {
	t.Helper()
	return s.configIn(t, s.folder(t), s.spec, ram, disk)
}

// folder makes the folder of a machine.
func (s *suite) folder(t testing.TB) string {
	t.Helper()
	if s.Dir != nil {
		return s.Dir(t)
	}
	dir, err := os.MkdirTemp("", "vmm-") // t.TempDir's names are too long for sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func (s *suite) configIn(t testing.TB, dir string, spec vmm.Spec, ram *os.File, disk string) vmm.Config {
	t.Helper()
	at := vmm.Attachment{Name: diskName, Path: disk}
	if s.Attach != nil {
		at = s.Attach(t, dir, spec.Disks[0], disk)
	}
	cfg := vmm.Config{Spec: spec, Dir: dir, Memory: ram, Disks: []vmm.Attachment{at}, NUMANode: -1, Logger: Logger(t)}
	if s.Configure != nil {
		s.Configure(t, &cfg)
	}
	return cfg
}

// start starts a machine with a console; it is closed with the test.
func (s *suite) start(t testing.TB, cfg vmm.Config, disk string) *instance {
	t.Helper()
	i := &instance{guest: s.guest, cfg: cfg, disk: disk, console: newConsole(t)}
	i.cfg.SerialInput, i.cfg.SerialOutput = i.console.Input(), i.console
	m, err := s.Backend.Start(testContext(t), i.cfg)
	if err != nil {
		t.Fatal(err)
	}
	i.Machine = m
	t.Cleanup(func() { m.Close() })
	return i
}

// copies returns copies of the saved guest's RAM and disk.
func (s *suite) copies(t testing.TB) (ram *os.File, disk string) {
	t.Helper()
	ram = CopyMemory(t, s.ram)
	disk = filepath.Join(t.TempDir(), "disk")
	copyFile(t, disk, s.disk)
	return ram, disk
}

// waiting starts a machine on copies of the saved guest's RAM and disk, ready for Load.
func (s *suite) waiting(t testing.TB) *instance {
	t.Helper()
	ram, disk := s.copies(t)
	return s.start(t, s.config(t, ram, disk), disk)
}

// loaded is waiting, with the saved guest in it, paused.
func (s *suite) loaded(t testing.TB) *instance {
	t.Helper()
	i := s.waiting(t)
	if err := i.Load(testContext(t), bytes.NewReader(s.state)); err != nil {
		t.Fatal(err)
	}
	return i
}

// running is loaded, and resumed.
func (s *suite) running(t testing.TB) *instance {
	t.Helper()
	i := s.loaded(t)
	if err := i.Resume(testContext(t)); err != nil {
		t.Fatal(err)
	}
	return i
}

func newConsole(t testing.TB) *testguest.Console {
	t.Helper()
	c, err := testguest.NewConsole()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// alive has the guest do something.
func (i *instance) alive(t testing.TB) { t.Helper(); i.guest.alive(t, i) }

// verify checks that the guest has lost nothing of its RAM and disk, and works.
func (i *instance) verify(t testing.TB) { t.Helper(); i.guest.verify(t, i) }

// await waits for the machine's end.
func (i *instance) await(t testing.TB) error {
	t.Helper()
	select {
	case <-i.Done():
		return i.Err()
	case <-testContext(t).Done():
		t.Fatalf("the machine does not end; its console says:\n%s", i.console.Log())
		return nil
	}
}

func (s *suite) testLoad(t *testing.T) {
	ctx := testContext(t)
	i := s.waiting(t)
	began := time.Now()
	if err := i.Load(ctx, bytes.NewReader(s.state)); err != nil {
		t.Fatal(err)
	}
	loaded := time.Now()
	if err := i.Resume(ctx); err != nil {
		t.Fatal(err)
	}
	t.Logf("loaded in %v, resumed in %v", loaded.Sub(began), time.Since(loaded))
	i.verify(t)
}

func (s *suite) testRollback(t *testing.T) {
	ctx := testContext(t)
	source := s.running(t)
	for range 3 {
		if err := source.Pause(ctx); err != nil {
			t.Fatal(err)
		}
		var state bytes.Buffer
		if err := source.Save(ctx, &state); err != nil {
			t.Fatal(err)
		}
		// The destination gets as far as it can before somebody decides against it.
		ram := CopyMemory(t, source.cfg.Memory)
		disk := filepath.Join(t.TempDir(), "disk")
		copyFile(t, disk, source.disk)
		destination := s.start(t, s.config(t, ram, disk), disk)
		if err := destination.Load(ctx, &state); err != nil {
			t.Fatal(err)
		}
		if err := destination.Close(); err != nil {
			t.Fatal(err)
		}
		if err := source.Resume(ctx); err != nil {
			t.Fatal(err)
		}
		source.alive(t)
	}
	source.verify(t)
}

// testCycles stops and starts the guest in the middle of its disk I/O, again and again: no request and no interrupt may
// get lost on the way.
func (s *suite) testCycles(t *testing.T) {
	ctx := testContext(t)
	i := s.running(t)
	for n := range 30 {
		if err := i.Pause(ctx); err != nil {
			t.Fatal(err)
		}
		if n%2 == 0 {
			if err := i.Save(ctx, io.Discard); err != nil {
				t.Fatal(err)
			}
		}
		if err := i.Resume(ctx); err != nil {
			t.Fatal(err)
		}
		if n%5 == 0 {
			s.guest.flush(t, i, 1)
		}
	}
	i.verify(t)
}

func (s *suite) testStates(t *testing.T) {
	ctx := testContext(t)
	i := s.waiting(t)
	type call struct {
		name string
		do   func() error
	}
	pause := call{"Pause", func() error { return i.Pause(ctx) }}
	resume := call{"Resume", func() error { return i.Resume(ctx) }}
	save := call{"Save", func() error { return i.Save(ctx, io.Discard) }}
	load := call{"Load", func() error { return i.Load(ctx, bytes.NewReader(s.state)) }}
	for _, step := range []struct {
		state   string
		illegal []call
		next    call
	}{
		{"waiting", []call{pause, resume, save}, load},
		{"loaded", []call{pause, load}, resume},
		{"running", []call{resume, save, load}, pause},
		{"paused", []call{pause, load}, save},
		{"saved", []call{pause, load}, resume},
		{"running again", []call{resume, save, load}, call{"Close", i.Close}},
		{"closed", []call{pause, resume, save, load}, call{"Close", i.Close}},
	} {
		for _, c := range step.illegal {
			if err := c.do(); !errors.Is(err, vmm.ErrState) {
				t.Errorf("%s of a machine that is %s: error %v, want vmm.ErrState", c.name, step.state, err)
			}
		}
		if err := step.next.do(); err != nil {
			t.Fatalf("%s of a machine that is %s: %v", step.next.name, step.state, err)
		}
	}
	if err := i.Err(); err != nil {
		t.Errorf("Err after Close: %v", err)
	}
}

func (s *suite) testSaveAgain(t *testing.T) {
	ctx := testContext(t)
	i := s.loaded(t)
	broken := errors.New("no space on this writer")
	if err := i.Save(ctx, writerFunc(func([]byte) (int, error) { return 0, broken })); !errors.Is(err, broken) {
		t.Fatalf("Save to a broken writer: error %v, want %v", err, broken)
	}
	var first, second bytes.Buffer
	if err := errors.Join(i.Save(ctx, &first), i.Save(ctx, &second)); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(first.Bytes(), second.Bytes()) {
		t.Error("two Saves of the same paused machine differ")
	}
	other := s.waiting(t)
	if err := other.Load(ctx, &second); err != nil {
		t.Fatal(err)
	}
	if err := i.Resume(ctx); err != nil {
		t.Fatal(err)
	}
	i.verify(t)
}

func (s *suite) testCancelledSave(t *testing.T) {
	ctx := testContext(t)
	i := s.running(t)
	// At many moments of a Save: before it, in it, after it.
	for wait := time.Duration(0); wait < 20*time.Millisecond; wait = wait*2 + 100*time.Microsecond {
		if err := i.Pause(ctx); err != nil {
			t.Fatal(err)
		}
		short, cancel := context.WithTimeout(ctx, wait)
		if err := i.Save(short, io.Discard); err != nil && !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Save with %v: %v", wait, err)
		}
		cancel()
		if err := i.Resume(ctx); err != nil {
			t.Fatalf("Resume after Save with %v: %v", wait, err)
		}
	}
	i.verify(t)
}

func (s *suite) testBadState(t *testing.T) {
	ctx := testContext(t)
	for _, tc := range []struct {
		name  string
		state []byte
	}{
		{"empty", nil},
		{"foreign", []byte("GIF89a, not a machine")},
		{"truncated", s.state[:len(s.state)/2]},
		{"header only", s.state[:min(8, len(s.state))]},
		{"corrupt", append(bytes.Clone(s.state[:len(s.state)/2]), bytes.Repeat([]byte{0xa5}, 4096)...)},
	} {
		t.Run(tc.name, func(t *testing.T) {
			i := s.waiting(t)
			err := i.Load(ctx, bytes.NewReader(tc.state))
			if err == nil {
				t.Fatal("Load succeeded")
			}
			t.Log(err)
			if err := i.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// testSlowConsole has nobody take what the guest writes: it must not notice.
func (s *suite) testSlowConsole(t *testing.T) {
	s.needLinux(t)
	ctx := testContext(t)
	ram, disk := s.copies(t)
	cfg := s.config(t, ram, disk)
	stuck := make(chan struct{})
	console := newConsole(t)
	cfg.SerialInput = console.Input()
	cfg.SerialOutput = writerFunc(func(p []byte) (int, error) { <-stuck; return console.Write(p) })
	m, err := s.Backend.Start(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if err := errors.Join(m.Load(ctx, bytes.NewReader(s.state)), m.Resume(ctx)); err != nil {
		t.Fatal(err)
	}
	channel := s.channel(m, cfg.Dir)
	defer channel.close()
	// It returns, so the guest's writes to its console do.
	text := strings.Repeat("x", 1000)
	for range cmp.Or(s.ConsoleBuffer, 400_000) / len(text) {
		channel.do(t, "say "+text)
	}
	close(stuck)
	if _, err := console.Line(testContext(t), text); err != nil { // all of that may have taken long
		t.Error(err)
	}
}

func (s *suite) testChannel(t *testing.T) {
	s.needLinux(t)
	i := s.running(t)
	text := strings.TrimSpace(strings.Repeat("all work and no play ", 2000))
	for range 2 { // a second connection works as the first
		channel := s.channel(i, i.cfg.Dir)
		if got := channel.do(t, "echo "+text); got != text {
			t.Errorf("echo of %d bytes: %d bytes", len(text), len(got))
		}
		channel.close()
	}
}

// channel is a connection to the guest of a machine in a folder, by whatever its sockets come through.
type channel struct {
	machine vmm.Machine
	dir     string
	carried bool
	conn    *testguest.Channel // nil before it is needed
}

func (s *suite) channel(m vmm.Machine, dir string) *channel {
	return &channel{machine: m, dir: dir, carried: vmm.RequirementsOf(s.Backend).Carries}
}

// do has the guest obey a command that it may obey twice.
func (c *channel) do(t *testing.T, command string) string {
	t.Helper()
	ctx := testContext(t)
	for {
		var err error
		switch {
		case c.conn != nil:
		case c.carried:
			c.conn, err = testguest.DialSocket(ctx, c.dir, socketPort)
		default:
			c.conn, err = testguest.Dial(ctx, filepath.Join(c.dir, vmm.GuestChannel))
		}
		if err != nil {
			t.Fatalf("%v\nThe machine's end: %v", err, c.machine.Err())
		}
		answer, err := c.conn.Do(ctx, command)
		if err == nil {
			return answer
		}
		// A guest that was loaded resets the connections of before. It may not have come to that, and takes a new one for one of them.
		reset := errors.Is(err, io.EOF) || errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET)
		if !c.carried || !reset || ctx.Err() != nil {
			t.Fatalf("%v\nThe machine's end: %v", err, c.machine.Err())
		}
		c.close()
	}
}

func (c *channel) close() {
	if c.conn != nil {
		c.conn.Close()
	}
	c.conn = nil
}

func (s *suite) testDisk(t *testing.T) {
	s.needLinux(t)
	i := s.running(t)
	i.do(t, "disk "+diskName+" stop")
	const offset, length = 2 << 20, 256 << 10
	sum := i.do(t, fmt.Sprintf("disk %s write %d %d 7", diskName, offset, length))
	if got := i.do(t, fmt.Sprintf("disk %s sum %d %d", diskName, offset, length)); got != sum {
		t.Errorf("the guest reads %s and wrote %s", got, sum)
	}
	p := make([]byte, length)
	f, err := os.Open(i.disk)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.ReadAt(p, offset); err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprintf("%x", sha256.Sum256(p)); got != sum {
		t.Errorf("the host reads %s, the guest wrote %s", got, sum)
	}
}

// testDiskLimit loads a machine whose disk may do less than the guest would.
func (s *suite) testDiskLimit(t *testing.T) {
	ctx := testContext(t)
	ram, disk := s.copies(t)
	cfg := s.config(t, ram, disk)
	const rate, flushes = 5, 10 // without a limit they take less than half a second
	cfg.DiskLimit = vmm.Limit{Bytes: 64 << 20, Requests: rate}
	i := s.start(t, cfg, disk)
	if err := errors.Join(i.Load(ctx, bytes.NewReader(s.state)), i.Resume(ctx)); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	s.guest.flush(t, i, flushes)
	// Each takes one request at least, and as many as may come in a second may come at once.
	if took, least := time.Since(began), (flushes-rate)*time.Second/rate; took < least {
		t.Errorf("%d flushes took %v, and may not take less than %v", flushes, took, least)
	}
}

func (s *suite) testReboot(t *testing.T) {
	i := s.running(t)
	s.reboot(t, i)
}

func (s *suite) testPoweroff(t *testing.T) {
	s.needLinux(t)
	if vmm.RequirementsOf(s.Backend).Reboots {
		t.Skip("a guest of this backend that powers off stays; it ends by a reboot, which Reboot tests")
	}
	i := s.running(t)
	i.send(t, "poweroff")
	if err := i.await(t); err != nil {
		t.Errorf("Err is %v", err)
	}
}

// testPowerButton: a guest that heeds the power button ends when it is pressed, and not before. It cannot be pressed while the guest is paused.
func (s *suite) testPowerButton(t *testing.T) {
	s.needLinux(t)
	i := s.running(t)
	button, ok := i.Machine.(vmm.PowerButton)
	if !ok {
		t.Fatal("it has no power button")
	}
	ctx := testContext(t)
	if !vmm.RequirementsOf(s.Backend).Reboots { // else it is the keyboard's Ctrl-Alt-Del, which the guest's kernel heeds
		i.do(t, "button")
	}
	if err := i.Pause(ctx); err != nil {
		t.Fatal(err)
	}
	if err := button.PressPower(ctx); !errors.Is(err, vmm.ErrState) {
		t.Errorf("press it while the machine is paused: got error %v, want ErrState", err)
	}
	if err := i.Resume(ctx); err != nil {
		t.Fatal(err)
	}
	i.alive(t)
	if err := button.PressPower(ctx); err != nil {
		t.Fatal(err)
	}
	if err := i.await(t); err != nil {
		t.Errorf("Err is %v", err)
	}
}

// testBalloon: memory that a guest gives back is the host's, and the guest's again when it is not asked for any more. That it was given outlives a save.
func (s *suite) testBalloon(t *testing.T) {
	s.needLinux(t)
	const touched, given, less = 32 << 20, 24 << 20, 8 << 20
	ctx := testContext(t)
	i := s.running(t)
	set := func(m vmm.Machine, size int64) {
		t.Helper()
		balloon, ok := m.(vmm.Ballooner)
		if !ok {
			t.Fatal("it has no balloon")
		}
		if err := balloon.SetBalloon(ctx, size); err != nil {
			t.Fatal(err)
		}
		for {
			now, err := balloon.Balloon(ctx)
			if err != nil {
				t.Fatal(err)
			}
			if now == size {
				return
			}
			select {
			case <-ctx.Done():
				t.Fatalf("it has given %d bytes and not %d: %v", now, size, context.Cause(ctx))
			case <-time.After(10 * time.Millisecond):
			}
		}
	}
	i.do(t, fmt.Sprintf("touch %d", touched>>20))
	before := allocated(t, i.cfg.Memory)
	set(i.Machine, given)
	// Some of it may never have been touched.
	if now := allocated(t, i.cfg.Memory); now > before-less {
		t.Errorf("the guest's memory took %d bytes, and takes %d after it has given %d back", before, now, given)
	}
	set(i.Machine, 0)
	i.do(t, fmt.Sprintf("touch %d", touched>>20))
	i.alive(t)
	set(i.Machine, less)

	var state bytes.Buffer
	if err := errors.Join(i.Pause(ctx), i.Save(ctx, &state)); err != nil {
		t.Fatal(err)
	}
	if err := i.Machine.(vmm.Ballooner).SetBalloon(ctx, 0); !errors.Is(err, vmm.ErrState) {
		t.Errorf("set it while the machine is paused: got error %v, want ErrState", err)
	}
	disk := filepath.Join(t.TempDir(), "disk")
	copyFile(t, disk, i.disk)
	next := s.start(t, s.config(t, CopyMemory(t, i.cfg.Memory), disk), disk)
	if err := errors.Join(next.Load(ctx, &state), next.Resume(ctx)); err != nil {
		t.Fatal(err)
	}
	if now, err := next.Machine.(vmm.Ballooner).Balloon(ctx); err != nil || now != less {
		t.Errorf("loaded, it has given %d bytes (%v), want %d", now, err, less)
	}
	set(next.Machine, 0)
	next.verify(t)
}

// allocated returns how many bytes of a memory are there.
func allocated(t *testing.T, memory *os.File) int64 {
	t.Helper()
	info, err := memory.Stat()
	if err != nil {
		t.Fatal(err)
	}
	return info.Sys().(*syscall.Stat_t).Blocks * 512
}

// reboot has the guest reboot, which ends its machine.
func (s *suite) reboot(t *testing.T, i *instance) {
	t.Helper()
	s.guest.reboot(t, i)
	err := i.await(t)
	if adopted := i.adopted; s.ResetEnds && (err == nil || adopted) {
		return // an adopted one has no exit status that we could see
	}
	if !errors.Is(err, vmm.ErrReboot) {
		t.Errorf("Err is %v, want vmm.ErrReboot", err)
	}
}

func (s *suite) testKilled(t *testing.T) {
	i := s.running(t)
	if err := syscall.Kill(i.PID(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	err := i.await(t)
	if err == nil || errors.Is(err, vmm.ErrReboot) {
		t.Errorf("Err is %v", err)
	}
	if err := i.Pause(testContext(t)); err == nil {
		t.Error("Pause of a killed machine succeeded")
	}
	if err := i.Close(); err != nil {
		t.Error(err)
	}
	checkEmpty(t, i.cfg)
}

func (s *suite) testCloseLeavesNothing(t *testing.T) {
	before := takeStock(t)
	for range 3 {
		t.Run("", func(t *testing.T) {
			i := s.running(t)
			i.alive(t)
			if err := errors.Join(i.Close(), i.Close()); err != nil {
				t.Error(err)
			}
			checkEmpty(t, i.cfg)
			if err := syscall.Kill(i.PID(), 0); err != syscall.ESRCH {
				t.Errorf("signal to process %d: %v, want ESRCH", i.PID(), err)
			}
		})
	}
	before.check(t)
}

func (s *suite) testFailedStart(t *testing.T) {
	ram, disk := s.copies(t)
	before := takeStock(t)
	for _, tc := range []struct {
		name  string
		spoil func(cfg *vmm.Config)
		want  string
	}{
		{"no such folder", func(c *vmm.Config) { c.Dir = "/nonexistent" }, "/nonexistent"},
		{"long folder", func(c *vmm.Config) { c.Dir = "/tmp/" + strings.Repeat("x", 100) }, "bytes"},
		{"no such disk", func(c *vmm.Config) { c.Disks = []vmm.Attachment{{Name: diskName, Path: "/nonexistent"}} }, "/nonexistent"},
		{"disk not attached", func(c *vmm.Config) { c.Disks = nil }, "disk"},
		{"disk of another name", func(c *vmm.Config) { c.Disks = []vmm.Attachment{{Name: "other", Path: disk}} }, "other"},
		{"no memory", func(c *vmm.Config) { c.Memory = nil }, "memory"},
		{"memory of another size", func(c *vmm.Config) { c.Spec.MemorySize *= 2 }, "memory"},
		{"negative limit", func(c *vmm.Config) { c.DiskLimit.Requests = -1 }, "-1"},
		{"no such kernel", func(c *vmm.Config) { c.Boot = &vmm.Boot{Kernel: "/nonexistent/vmlinux"} }, "/nonexistent/vmlinux"},
		{"not a kernel", func(c *vmm.Config) { c.Boot = &vmm.Boot{Kernel: "/proc/self/status"} }, ""},
		{"no such binary", func(c *vmm.Config) { c.Binary = "/nonexistent/vmm" }, "/nonexistent/vmm"},
		{"no such cgroup version", func(c *vmm.Config) { c.CgroupVersion, c.CgroupName = 3, "x" }, "3"},
		{"no such node", func(c *vmm.Config) { c.NUMANode = 4000 }, "4000"},
		{"no such interface", func(c *vmm.Config) { c.Spec.MAC, c.Interface = "02:0e:d9:fd:68:3d", "nonexistent0" }, "nonexistent0"},
		{"no such namespace", func(c *vmm.Config) {
			c.Spec.MAC, c.Netns, c.Interface = "02:0e:d9:fd:68:3d", "nonexistent", "tap0"
		}, "nonexistent"},
		{"spawn fails", func(c *vmm.Config) { c.Spawn = func(*exec.Cmd) error { return errors.New("the hook failed") } }, "the hook failed"},
		{"spawn fails late", func(c *vmm.Config) {
			c.Spawn = func(cmd *exec.Cmd) error { return errors.Join(cmd.Start(), errors.New("the hook failed")) }
		}, "the hook failed"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			cfg := s.config(t, ram, disk)
			good := cfg
			tc.spoil(&cfg)
			m, err := s.Backend.Start(testContext(t), cfg)
			if err == nil {
				m.Close()
				t.Fatal("Start succeeded")
			}
			t.Log(err)
			if !strings.Contains(err.Error(), tc.want) {
				t.Errorf("the error does not name %q", tc.want)
			}
			checkEmpty(t, good)
		})
	}
	before.check(t)
}

func (s *suite) testCancelledStart(t *testing.T) {
	ram, disk := s.copies(t)
	before := takeStock(t)
	for wait := time.Duration(0); wait < 100*time.Millisecond; wait += 20 * time.Millisecond {
		t.Run(wait.String(), func(t *testing.T) {
			cfg := s.config(t, ram, disk)
			ctx, cancel := context.WithTimeout(testContext(t), wait)
			m, err := s.Backend.Start(ctx, cfg)
			cancel()
			switch {
			case err == nil: // it was fast, and a machine that has started does not depend on the context
				if err := m.Load(testContext(t), bytes.NewReader(s.state)); err != nil {
					t.Error(err)
				}
				m.Close()
			case !errors.Is(err, context.DeadlineExceeded):
				t.Error(err)
			}
			checkEmpty(t, cfg)
		})
	}
	before.check(t)
}

func (s *suite) testAdopt(t *testing.T) {
	adopter, ok := s.Backend.(vmm.Adopter)
	if !ok {
		t.Skip("the backend's machines do not outlive their owner")
	}
	ctx := testContext(t)
	i := s.orphan(t, false)
	m, err := adopter.Adopt(ctx, i.cfg)
	if err != nil {
		t.Fatal(err)
	}
	i.Machine, i.adopted = m, true
	defer m.Close()
	i.verify(t)
	var state bytes.Buffer
	if err := errors.Join(m.Pause(ctx), m.Save(ctx, &state), m.Resume(ctx)); err != nil {
		t.Fatal(err)
	}
	i.alive(t)
	if err := m.Close(); err != nil {
		t.Error(err)
	}
	if err := m.Err(); err != nil {
		t.Errorf("Err after Close: %v", err)
	}
	checkEmpty(t, i.cfg)
	if _, err := adopter.Adopt(ctx, i.cfg); err == nil {
		t.Error("a closed machine was adopted")
	}
}

// testAdoptSaved adopts a machine whose owner died between Save and Resume.
func (s *suite) testAdoptSaved(t *testing.T) {
	adopter, ok := s.Backend.(vmm.Adopter)
	if !ok {
		t.Skip("the backend's machines do not outlive their owner")
	}
	ctx := testContext(t)
	i := s.orphan(t, true)
	m, err := adopter.Adopt(ctx, i.cfg)
	if err != nil {
		t.Fatal(err)
	}
	i.Machine, i.adopted = m, true
	defer m.Close()
	if err := m.Pause(ctx); !errors.Is(err, vmm.ErrState) {
		t.Errorf("Pause: error %v, want vmm.ErrState", err)
	}
	if err := m.Resume(ctx); err != nil {
		t.Fatal(err)
	}
	i.verify(t)
	s.reboot(t, i)
}

// orphan returns a machine, not yet adopted, whose owner was killed: a second process that started it.
func (s *suite) orphan(t *testing.T, save bool) *instance {
	t.Helper()
	ram, disk := s.copies(t)
	dir := s.folder(t)
	state := filepath.Join(t.TempDir(), "state")
	if err := os.WriteFile(state, s.state, 0o600); err != nil {
		t.Fatal(err)
	}
	top, _, _ := strings.Cut(t.Name(), "/")
	cmd := exec.Command(os.Args[0], "-test.run", "^"+top+"$", "-test.v")
	cmd.Env = append(os.Environ(), ownerEnv+"="+dir, "DRAFTER_VMMTEST_DISK="+disk, "DRAFTER_VMMTEST_STATE="+state,
		fmt.Sprintf("DRAFTER_VMMTEST_SAVE=%t", save))
	cmd.ExtraFiles = []*os.File{ram}
	// A group of its own, so that what serves its disks dies with it. The VMM must not.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ready := filepath.Join(dir, "owner-ready")
	ctx := testContext(t)
	exited := make(chan struct{})
	go func() {
		cmd.Wait()
		close(exited)
	}()
	waitFile(ctx, ready, exited)
	syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
	<-exited
	if err := os.Remove(ready); err != nil {
		t.Fatalf("the first owner: %v\n%s", err, output.String())
	}
	cfg := s.configIn(t, dir, s.spec, ram, disk)
	i := &instance{guest: s.guest, cfg: cfg, disk: disk, console: newConsole(t)}
	i.cfg.SerialInput, i.cfg.SerialOutput = i.console.Input(), i.console
	return i
}

// own is the second process: it starts the machine, says so and waits to be killed.
func own(t *testing.T, h Harness, dir string) {
	ctx := testContext(t)
	s := newSuite(h)
	s.disk = os.Getenv("DRAFTER_VMMTEST_DISK")
	var err error
	if s.state, err = os.ReadFile(os.Getenv("DRAFTER_VMMTEST_STATE")); err != nil {
		t.Fatal(err)
	}
	if s.spec, err = s.describe(ctx); err != nil {
		t.Fatal(err)
	}
	i := s.start(t, s.configIn(t, dir, s.spec, os.NewFile(3, "memory"), s.disk), s.disk)
	if err := errors.Join(i.Load(ctx, bytes.NewReader(s.state)), i.Resume(ctx)); err != nil {
		t.Fatal(err)
	}
	i.alive(t)
	if os.Getenv("DRAFTER_VMMTEST_SAVE") == "true" {
		if err := errors.Join(i.Pause(ctx), i.Save(ctx, io.Discard)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "owner-ready"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	<-ctx.Done() // killed
}

// waitFile waits until a file exists, or until exited is closed.
func waitFile(ctx context.Context, path string, exited <-chan struct{}) {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		if _, err := os.Stat(path); err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-exited:
			return
		case <-ctx.Done():
			return
		}
	}
}

// writerFunc is a function as io.Writer.
type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// NewMemory returns RAM for a machine: a memfd of size bytes that is closed with the test.
func NewMemory(t testing.TB, size int64) *os.File {
	t.Helper()
	fd, err := unix.MemfdCreate("vmmtest", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "memfd")
	t.Cleanup(func() { f.Close() })
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	return f
}

// CopyMemory returns a copy of a machine's RAM, which must not change meanwhile. Holes stay holes.
func CopyMemory(t testing.TB, from *os.File) *os.File {
	t.Helper()
	info, err := from.Stat()
	if err != nil {
		t.Fatal(err)
	}
	to := NewMemory(t, info.Size())
	for off := int64(0); ; {
		start, err := unix.Seek(int(from.Fd()), off, unix.SEEK_DATA)
		if err == unix.ENXIO {
			return to
		}
		if err != nil {
			t.Fatal(err)
		}
		end, err := unix.Seek(int(from.Fd()), start, unix.SEEK_HOLE)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(io.NewOffsetWriter(to, start), io.NewSectionReader(from, start, end-start)); err != nil {
			t.Fatal(err)
		}
		off = end
	}
}

func copyFile(t testing.TB, to, from string) {
	t.Helper()
	b, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(to, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// digest returns a hash of a file's contents.
func digest(t testing.TB, f *os.File) string {
	t.Helper()
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	h := sha256.New()
	if _, err := io.Copy(h, io.NewSectionReader(f, 0, info.Size())); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%x", h.Sum(nil))
}

// Logger returns a logger for a test: with -v it shows everything.
func Logger(t testing.TB) *slog.Logger {
	if !testing.Verbose() {
		return slog.New(slog.DiscardHandler)
	}
	return slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
}
