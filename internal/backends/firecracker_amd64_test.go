package backends

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/drafter-vm/drafter/internal/tinyguest"
	"github.com/drafter-vm/drafter/pkg/ram"
	"github.com/drafter-vm/drafter/pkg/vmm"
	"github.com/drafter-vm/drafter/pkg/vmm/firecracker"
	"github.com/drafter-vm/drafter/pkg/vmm/vmmtest"
	"golang.org/x/sys/unix"
)

const (
	memorySize = 64 << 20
	patience   = time.Minute
)

// kernel is a file with the tiny guest.
func kernel(t testing.TB) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "tinyguest")
	if err := os.WriteFile(path, tinyguest.Kernel(), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// vm is a Firecracker with its memory.
type vm struct {
	vmm.Machine
	memory *ram.Memory
	cfg    vmm.Config
	out    *buffer
}

// buffer keeps what is written to it.
type buffer struct {
	mu   sync.Mutex // guards text
	text bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}

// backend is Firecracker, where there is one.
func backend(t testing.TB) *firecracker.Backend {
	t.Helper()
	return firecracker.New(firecracker.Options{Binary: program(t), Logger: vmmtest.Logger(t)})
}

// program is Firecracker's, where there is one and it can run.
func program(t testing.TB) string {
	t.Helper()
	binary := vmmtest.Program(t, "firecracker", "FIRECRACKER_BIN")
	if _, err := os.Stat("/dev/kvm"); err != nil {
		t.Skipf("SKIPPED, not tested: Firecracker needs KVM: %v", err)
	}
	return binary
}

// jailed is Firecracker in its jailer.
func jailed(t testing.TB) *firecracker.Backend {
	t.Helper()
	return firecracker.New(firecracker.Options{
		Binary: program(t), Jailer: vmmtest.Program(t, "jailer", "JAILER_BIN"), Logger: vmmtest.Logger(t),
	})
}

func start(t testing.TB, b *firecracker.Backend, boot *vmm.Boot) *vm {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	spec, err := b.Describe(ctx, vmm.Spec{MemorySize: memorySize})
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Compatible(ctx, spec); err != nil {
		t.Fatal(err)
	}
	v := &vm{out: new(buffer)}
	if v.memory, err = ram.Create("firecracker-test", memorySize); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { v.memory.Close() })
	dir, err := os.MkdirTemp("", "fc-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	v.cfg = vmm.Config{
		Spec: spec, Dir: dir, Memory: v.memory.File(), Boot: boot, NUMANode: -1, SerialOutput: v.out, Logger: vmmtest.Logger(t), Graft: v.memory.Graft,
		Spawn: func(cmd *exec.Cmd) error {
			h, err := ram.Spawn(cmd, ram.Options{Graft: v.memory})
			if err != nil {
				return err
			}
			return v.memory.Attach(ctx, h)
		},
	}
	if v.Machine, err = b.Start(ctx, v.cfg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := v.Close(); err != nil {
			t.Error(err)
		}
		left, err := os.ReadDir(dir)
		if err != nil || len(left) > 0 {
			t.Errorf("it has left %v in its folder (%v)", left, err)
		}
	})
	return v
}

// count is where the guest is.
func (v *vm) count(t testing.TB) uint64 {
	t.Helper()
	b := make([]byte, 8)
	if _, err := v.memory.Device().ReadAt(b, tinyguest.Counters); err != nil {
		t.Fatal(err)
	}
	return binary.LittleEndian.Uint64(b)
}

// goesOn waits until the guest has counted on.
func (v *vm) goesOn(t testing.TB, from uint64) {
	t.Helper()
	for end := time.Now().Add(patience); v.count(t) <= from; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("the guest has not come beyond %d (%v)", from, v.Err())
		}
	}
}

// TestFirecracker: a guest boots in our memory, is tracked while it runs, saved without a copy of its memory, goes on, and runs elsewhere while its
// memory arrives.
func TestFirecracker(t *testing.T) {
	b := backend(t)
	ctx := t.Context()
	a := start(t, b, &vmm.Boot{Kernel: kernel(t)})
	a.goesOn(t, 0)
	a.goesOn(t, a.count(t))
	for end := time.Now().Add(patience); !strings.Contains(a.out.String(), ".."); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("its console says %q", a.out.String())
		}
	}
	tracker := a.memory.Tracker()
	if err := tracker.Start(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := tracker.Collect(ctx); err != nil {
		t.Fatal(err)
	}
	before := make([]byte, memorySize)
	if _, err := a.memory.Device().ReadAt(before, 0); err != nil {
		t.Fatal(err)
	}
	a.goesOn(t, a.count(t)+1)
	began := time.Now()
	if err := a.Pause(ctx); err != nil {
		t.Fatal(err)
	}
	paused := time.Since(began)
	dirty, err := tracker.Collect(ctx)
	if err != nil {
		t.Fatal(err)
	}
	after := make([]byte, memorySize)
	if _, err := a.memory.Device().ReadAt(after, 0); err != nil {
		t.Fatal(err)
	}
	for page := int64(0); page < memorySize; page += 4096 {
		told := false
		for _, r := range dirty {
			told = told || page >= r.Offset && page < r.End()
		}
		if !told && !bytes.Equal(before[page:page+4096], after[page:page+4096]) {
			t.Errorf("page %#x was written, and is not told", page)
		}
	}
	if err := tracker.Stop(); err != nil {
		t.Error(err)
	}

	at := a.count(t)
	var state, again bytes.Buffer
	if err := a.Save(ctx, &state); err != nil {
		t.Fatal(err)
	}
	t.Logf("paused, and %d bytes of state saved, in %v", state.Len(), paused.Round(time.Microsecond))
	if err := a.Save(ctx, &again); err != nil || !bytes.Equal(again.Bytes(), state.Bytes()) {
		t.Errorf("saved again, and it is another state (%v)", err)
	}
	standsStill(t, a)
	if a.count(t) != at {
		t.Error("a paused guest has counted on")
	}
	if err := a.Load(ctx, &again); !errors.Is(err, vmm.ErrState) {
		t.Errorf("load into a guest: got error %v, want ErrState", err)
	}
	if err := a.Resume(ctx); err != nil {
		t.Fatal(err)
	}
	a.goesOn(t, at)

	c := start(t, b, nil)
	source := demanded{bytes.NewReader(after), make(chan struct{})}
	rest := sync.OnceFunc(func() { close(source.all) })
	defer rest()
	filler, err := c.memory.Fill(ctx, source, ram.FillOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Load(ctx, strings.NewReader("nonsense")); err == nil || !strings.Contains(err.Error(), "no device state") {
		t.Errorf("load nonsense: got error %v", err)
	}
	began = time.Now()
	if err := c.Load(ctx, bytes.NewReader(state.Bytes())); err != nil {
		t.Fatal(err)
	}
	loaded := time.Since(began)
	if err := c.Resume(ctx); err != nil {
		t.Fatal(err)
	}
	resumed := time.Since(began)
	c.goesOn(t, at)
	select {
	case <-filler.Done():
		t.Error("its memory was there before it ran")
	default:
	}
	t.Logf("loaded in %v, runs after %v; %d faults", loaded.Round(time.Microsecond), resumed.Round(time.Microsecond), filler.Stats().Faults)
	rest()
	if err := filler.Wait(ctx); err != nil {
		t.Fatal(err)
	}
	c.goesOn(t, c.count(t))
}

// TestFirecrackerHeldUp: a Firecracker that did not answer for some time is found again.
func TestFirecrackerHeldUp(t *testing.T) {
	v := start(t, backend(t), &vmm.Boot{Kernel: kernel(t)})
	v.goesOn(t, 0)
	if err := syscall.Kill(v.PID(), syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	short, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := v.Pause(short); err == nil || errors.Is(err, vmm.ErrState) {
		t.Errorf("pause one that is held up: got error %v", err)
	}
	if err := syscall.Kill(v.PID(), syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	var state bytes.Buffer
	err := v.Pause(t.Context())
	if errors.Is(err, vmm.ErrState) { // what was asked for first has come about meanwhile
		err = nil
	}
	if err := errors.Join(err, v.Save(t.Context(), &state)); err != nil || state.Len() == 0 {
		t.Fatal(err)
	}
	at := v.count(t)
	if err := v.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	v.goesOn(t, at)
}

// standsStill checks that a machine's devices do nothing: the thread that serves them waits for a file to be opened.
func standsStill(t testing.TB, v *vm) {
	t.Helper()
	call, err := os.ReadFile(fmt.Sprintf("/proc/%d/syscall", v.PID()))
	if number, _, _ := strings.Cut(string(call), " "); err != nil || number != strconv.Itoa(unix.SYS_OPENAT) && number != strconv.Itoa(unix.SYS_OPEN) {
		t.Errorf("its main thread is in system call %q (%v), want open(2)", call, err)
	}
}

// demanded is a source that gives what is demanded, a page at a time, at once, and more than that when all is wanted.
type demanded struct {
	io.ReaderAt
	all chan struct{}
}

func (s demanded) ReadAt(b []byte, off int64) (int, error) {
	if len(b) > 4096 {
		<-s.all
	}
	return s.ReaderAt.ReadAt(b, off)
}

// TestFirecrackerAdopt: a machine whose owner has died goes on, and is taken over.
func TestFirecrackerAdopt(t *testing.T) {
	b := backend(t)
	v := start(t, b, &vmm.Boot{Kernel: kernel(t)})
	v.goesOn(t, 0)
	cfg := v.cfg
	cfg.Boot = nil
	adopt := func(want vmm.State) vmm.Machine {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		m, err := b.Adopt(ctx, cfg)
		if err != nil {
			t.Fatal(err)
		}
		if got := m.(vmm.Stater).State(); got != want {
			t.Fatalf("it is %s, want %s", got, want)
		}
		return m
	}
	first := adopt(vmm.StateRunning)
	if err := first.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	var state, again bytes.Buffer
	if err := first.Save(t.Context(), &state); err != nil || state.Len() == 0 {
		t.Errorf("saved %d bytes: %v", state.Len(), err)
	}
	// It stands still, and does not answer: whoever comes next finds that out.
	adopted := adopt(vmm.StatePaused)
	if err := adopted.Save(t.Context(), &again); err != nil || !bytes.Equal(state.Bytes(), again.Bytes()) {
		t.Errorf("saved again, and it is another state (%v)", err)
	}
	at := v.count(t)
	if err := adopted.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	v.goesOn(t, at)
	if err := errors.Join(adopted.Pause(t.Context()), adopted.Resume(t.Context())); err != nil {
		t.Fatal(err)
	}
	if err := adopted.Close(); err != nil {
		t.Error(err)
	}
	select {
	case <-v.Done():
	case <-time.After(patience):
		t.Error("its first owner does not notice its end")
	}
}

// TestFirecrackerRefusals: what cannot be is told by name, and leaves nothing.
func TestFirecrackerRefusals(t *testing.T) {
	b := backend(t)
	ctx := t.Context()
	for what, c := range map[string]struct {
		spec vmm.Spec
		want string
	}{
		"memory":   {vmm.Spec{MemorySize: 1000}, "memory size 1000"},
		"CPUs":     {vmm.Spec{MemorySize: memorySize, CPUCount: 33}, "CPU count 33"},
		"template": {vmm.Spec{MemorySize: memorySize, CPUModel: "486"}, `CPU template "486"`},
		"accel":    {vmm.Spec{MemorySize: memorySize, Accel: "tcg"}, `accel "tcg"`},
		"version":  {vmm.Spec{MemorySize: memorySize, Version: "0.1.0"}, `version "0.1.0"`},
	} {
		if _, err := b.Describe(ctx, c.spec); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got error %v, want one that says %q", what, err, c.want)
		}
	}
	spec, err := b.Describe(ctx, vmm.Spec{MemorySize: memorySize})
	if err != nil {
		t.Fatal(err)
	}
	for what, c := range map[string]struct {
		change func(*vmm.Spec)
		want   string
	}{
		"QEMU's":          {func(s *vmm.Spec) { s.Hypervisor = "qemu" }, "hypervisor"},
		"a newer format":  {func(s *vmm.Spec) { s.MachineType = "snapshot-7.99.0" }, "machineType"},
		"another format":  {func(s *vmm.Spec) { s.MachineType = "snapshot-3.0.0" }, "machineType"},
		"another vendor":  {func(s *vmm.Spec) { s.CPUModel, s.CPUFeatures = "T2", []string{"vendor:Nobody"} }, "a processor of Nobody"},
		"another feature": {func(s *vmm.Spec) { s.CPUFeatures = []string{"fpu", "teleport"} }, `"teleport"`},
	} {
		saved := spec
		c.change(&saved)
		if err := b.Compatible(ctx, saved); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got error %v, want one that says %q", what, err, c.want)
		}
	}
	if _, err := firecracker.New(firecracker.Options{Binary: "/bin/true"}).Describe(ctx, vmm.Spec{MemorySize: memorySize}); err == nil || !strings.Contains(err.Error(), "is it Firecracker?") {
		t.Errorf("another program: got error %v", err)
	}
}
