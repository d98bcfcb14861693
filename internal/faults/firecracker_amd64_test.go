package faults

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/drafter-vm/drafter/internal/tinyguest"
	"github.com/drafter-vm/drafter/pkg/expose"
	"github.com/drafter-vm/drafter/pkg/runner"
	"github.com/drafter-vm/drafter/pkg/snapshot"
	"github.com/drafter-vm/drafter/pkg/vmm/firecracker"
	"github.com/drafter-vm/drafter/pkg/vmm/vmmtest"
	"golang.org/x/sys/unix"
)

// TestFirecrackerProcesses is TestProcesses with Firecracker, where there is one, and a guest that any KVM runs.
func TestFirecrackerProcesses(t *testing.T) {
	testFirecrackerProcesses(t, tiny{vmmtest.Program(t, "firecracker", "FIRECRACKER_BIN"), "none"})
}

// TestFirecrackerJailedProcesses is that with machines in the jailer, as a user of their own.
func TestFirecrackerJailedProcesses(t *testing.T) {
	testFirecrackerProcesses(t, tiny{vmmtest.Program(t, "firecracker", "FIRECRACKER_BIN"), vmmtest.Program(t, "jailer", "JAILER_BIN")})
}

func testFirecrackerProcesses(t *testing.T, guest tiny) {
	// A disk that will be full is TestFirecrackerFull's: there is too little to come for one to become full here.
	r := newRoom(t, guest)
	t.Cleanup(func() { // of peers that were killed, and that nobody follows
		r.killAll()
		roots, err := filepath.Glob(r.path("vms/firecracker/*/root"))
		for _, root := range roots {
			err = errors.Join(err, expose.DetachFUSE(filepath.Join(root, "disks")))
			if e := unix.Unmount(filepath.Join(root, "state"), unix.MNT_DETACH); !errors.Is(e, unix.EINVAL) && !errors.Is(e, unix.ENOENT) { // of a jail
				err = errors.Join(err, e)
			}
		}
		if err != nil {
			t.Error(err)
		}
	})
	t.Run("peer and machine", r.killsBoth)
	r.play(t, slices.DeleteFunc(scenes(), func(s scene) bool { return s.victim == destinationDisk }))
}

// killsBoth kills a peer, and then its machine, which may be waiting for a disk that nobody serves any more. Started again, the guest boots.
func (r *room) killsBoth(t *testing.T) {
	defer r.killAll()
	for n := range 5 {
		p := r.peer(t, fmt.Sprintf("both%d", n))
		p.says(t, "Resumed VM")
		r.tenant.begin(t, p)
		flushed := r.tenant.flushed(t, p)
		machines := r.machines(p.name)
		p.kill()
		time.Sleep(time.Duration(n) * 10 * time.Millisecond) // the guest comes to its disk, every 50 ms or so
		for _, pid := range machines {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
		again := r.peer(t, p.name, "--boot")
		if again.says(t, "Booted VM") == "" {
			t.Fatalf("the guest does not boot:\n%s", again.said())
		}
		r.tenant.booted(t, again, flushed)
		r.tenant.verifyDisk(t, again, flushed)
		if left := r.machines(p.name); len(left) != 1 {
			t.Errorf("it has processes %v, and is to have one", left)
		}
		_ = again.Process.Signal(syscall.SIGTERM)
		again.ends(t)
	}
	r.checkClean(t)
}

// tiny is the guest of package tinyguest, in Firecracker, and in its jailer if there is one.
type tiny struct{ program, jailer string }

const tinyMemory = 64 << 20

func (tiny) hypervisor() string { return "firecracker" }

func (g tiny) jailed() bool { return g.jailer != "none" }

func (g tiny) flags() []string {
	flags := []string{"--firecracker-bin", g.program, "--jailer-bin", g.jailer, "--interface", ""}
	if g.jailed() {
		flags = append(flags, "--uid", "12345", "--gid", "12346")
	}
	return flags
}

func (g tiny) pack(t *testing.T, r *room) {
	t.Helper()
	kernel := r.path("tinyguest")
	if err := os.WriteFile(kernel, tinyguest.Kernel(), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := snapshot.Create(t.Context(), snapshot.Config{
		Backend: firecracker.New(firecracker.Options{Binary: g.program}), MemorySize: tinyMemory, SettleTime: time.Second,
		Devices: []snapshot.Device{
			{Name: "state", Output: r.packaged("state")}, {Name: "memory", Output: r.packaged("memory")}, {Name: "config", Output: r.packaged("config")},
			{Name: "kernel", Input: kernel, Output: r.packaged("kernel")}, {Name: "disk", Input: r.path("blank"), Output: r.packaged("disk")},
		},
		Host: runner.Host{Dir: r.path("vms")}, Logger: vmmtest.Logger(t),
	})
	if err != nil {
		t.Fatal(err)
	}
}

// word is a number in the guest's memory.
func (p *proc) word(t *testing.T, at int64) uint64 {
	t.Helper()
	memory := p.memory(t)
	defer memory.Close()
	b := make([]byte, 8)
	if _, err := memory.ReadAt(b, at); err != nil {
		t.Fatal(err)
	}
	return binary.LittleEndian.Uint64(b)
}

// grows waits until a number in the guest's memory has grown n times, and is none of before.
func (p *proc) grows(t *testing.T, at int64, n int) (now uint64) {
	t.Helper()
	ctx := newWait(t)
	for range n {
		for last := p.word(t, at); ; time.Sleep(5 * time.Millisecond) { // between two looks
			if now = p.word(t, at); now > last {
				break
			}
			if p.broken() || p.ended() || ctx.Err() != nil {
				t.Fatalf("the guest stands still at %d; its console says %.100q", last, p.console.Log())
			}
		}
	}
	return now
}

// broken reports whether the guest has said that it found an error.
func (p *proc) broken() bool { return strings.ContainsRune(p.console.Log(), tinyguest.Broken) }

func (tiny) begin(t *testing.T, p *proc) { t.Helper(); p.grows(t, tinyguest.Counters, 3) }

func (tiny) flushed(t *testing.T, p *proc) string {
	t.Helper()
	return fmt.Sprint(p.grows(t, tinyguest.Flushed, tinyguest.Blocks/8))
}

func (tiny) booted(t *testing.T, p *proc, flushed string) {
	t.Helper()
	p.grows(t, tinyguest.Counters, 2)
	if found := p.word(t, tinyguest.Learned); found < number(t, flushed) {
		t.Errorf("the guest has found %d on its disk, and %s was flushed", found, flushed)
	}
}

// keepsOfBoot: Firecracker never closes its guest's kernel.
func (tiny) keepsOfBoot(r *room) []string {
	return []string{r.path("vms") + "/firecracker/ID/root/kernel"}
}

func (tiny) verify(t *testing.T, p *proc) {
	t.Helper()
	p.grows(t, tinyguest.Counters, 2) // in which it compares all of it
}

func (tiny) verifyDisk(t *testing.T, p *proc, flushed string) {
	t.Helper()
	last := p.grows(t, tinyguest.Flushed, tinyguest.Blocks+1) // in which it reads all of it
	t.Logf("newest record %d, flushed before the blow %s", last, flushed)
	if last < number(t, flushed) {
		t.Errorf("the guest is at %d, and was at %s", last, flushed)
	}
	if p.broken() {
		t.Error("the guest has found an error")
	}
}

func (tiny) findsErrors(t *testing.T, p *proc) {
	t.Helper()
	for what, at := range map[string]int64{"memory": tinyguest.Counters + 9<<20, "disk": tinyguest.Written + 8*17} {
		if p.broken() {
			p = p.room.peer(t, "c")
			p.says(t, "Resumed VM")
			p.grows(t, tinyguest.Counters, 3)
		}
		// What is written on its disk is damaged here in what it remembers of it.
		memory := p.memory(t)
		ctx := newWait(t)
		for !p.broken() { // what it has just written anew is damaged again
			b := make([]byte, 8)
			if _, err := memory.ReadAt(b, at); err != nil {
				t.Fatal(err)
			}
			b[5] ^= 0x40
			if _, err := memory.WriteAt(b, at); err != nil {
				t.Fatal(err)
			}
			select {
			case <-time.After(500 * time.Millisecond): // some passes
			case <-ctx.Done():
				t.Fatalf("the guest does not see that its %s is damaged", what)
			}
		}
		memory.Close()
	}
}

func number(t *testing.T, text string) uint64 {
	t.Helper()
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n
}
