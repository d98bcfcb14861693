package faults

import (
	"fmt"
	"strings"
	"testing"

	"github.com/drafter-vm/drafter/internal/testguest"
)

// tenant is a guest that lives in a room's machines, of a hypervisor.
type tenant interface {
	// hypervisor is a part of the name of its program.
	hypervisor() string
	// jailed reports whether its machines have a mount namespace of their own.
	jailed() bool
	// flags are those by which a peer runs it.
	flags() []string
	// pack makes the package.
	pack(t *testing.T, r *room)

	// begin has the guest write all over its memory and disk.
	begin(t *testing.T, p *proc)
	// flushed waits until the disk was flushed, and returns what is on it then: a number, that grows.
	flushed(t *testing.T, p *proc) string
	// booted waits for a guest that was booted from its disk, and has it write again. It knows what was flushed before.
	booted(t *testing.T, p *proc, flushed string)
	// keepsOfBoot is what a machine that was booted has open, and one that was resumed has not.
	keepsOfBoot(r *room) []string
	// verify checks that the guest's memory is intact, and that it goes on.
	verify(t *testing.T, p *proc)
	// verifyDisk checks that everything is on the disk that was flushed.
	verifyDisk(t *testing.T, p *proc, flushed string)
	// findsErrors damages what the guest has, and checks that the others see it.
	findsErrors(t *testing.T, p *proc)
}

// linux is the guest of package testguest, in QEMU.
type linux struct{}

func (linux) hypervisor() string { return "qemu" }
func (linux) jailed() bool       { return false }
func (linux) flags() []string    { return nil }

func (linux) pack(t *testing.T, r *room) {
	t.Helper()
	agent, hooks := r.path("agent"), r.path("hooks")
	r.build(t, agent, "cmd/drafter-agent")
	r.build(t, hooks, "internal/e2e/guest")
	kernel, initrd := testguest.BuildWith(t, map[string]string{"/bin/drafter-agent": agent, "/bin/guest": hooks})
	devices := fmt.Sprintf(`[{"name":"state","output":%q},{"name":"memory","output":%q},{"name":"config","output":%q},
		{"name":"kernel","input":%q,"output":%q},{"name":"initrd","input":%q,"output":%q},{"name":"disk","input":%q,"output":%q}]`,
		r.packaged("state"), r.packaged("memory"), r.packaged("config"), kernel, r.packaged("kernel"), initrd, r.packaged("initrd"), r.path("blank"), r.packaged("disk"))
	p := r.start(t, "snapshotter", "snapshotter", "--devices", devices, "--netns", "", "--interface", "", "--memory-size", fmt.Sprint(realMemory>>20),
		"--boot-args", "console=ttyS0 quiet panic=-1 testguest.channel=off", "--chroot-base-dir", r.path("vms"), "--enable-input")
	ctx := newWait(t)
	if err := p.console.Ready(ctx); err != nil {
		t.Fatal(err)
	}
	for _, c := range []string{"spawn /bin/drafter-agent vsock",
		"spawn /bin/drafter-agent agent --shell-cmd /bin/guest --before-suspend-cmd before --after-resume-cmd after", "spawn /bin/drafter-agent liveness"} {
		p.do(t, c)
	}
	p.ends(t)
	if p.rc != 0 {
		t.Fatalf("the snapshotter failed:\n%s", p.said())
	}
}

func (linux) begin(t *testing.T, p *proc) {
	t.Helper()
	p.do(t, fmt.Sprintf("mem start %d", loadedMiB))
	p.do(t, fmt.Sprintf("disk disk start %d", slots))
}

func (linux) flushed(t *testing.T, p *proc) (n string) {
	t.Helper()
	for n == "" || n == "0" {
		n = p.do(t, "disk disk status")
	}
	return n
}

func (linux) booted(t *testing.T, p *proc, flushed string) {
	t.Helper()
	if err := p.console.Ready(newWait(t)); err != nil {
		t.Fatal(err)
	}
	// The records that follow are written where they would have been, so that a lost one is missing in the whole.
	p.do(t, fmt.Sprintf("disk disk start %d %s", slots, flushed))
	p.do(t, fmt.Sprintf("mem start %d", loadedMiB))
}

func (linux) keepsOfBoot(*room) []string { return nil }

func (linux) verify(t *testing.T, p *proc) {
	t.Helper()
	p.do(t, "mem stop")
	p.do(t, "mem verify")
	p.do(t, "mem go")
}

func (linux) verifyDisk(t *testing.T, p *proc, flushed string) {
	t.Helper()
	last := p.do(t, "disk disk verify")
	t.Logf("newest record %s, flushed before the blow %s", last, flushed)
	if log := p.console.Log(); strings.Contains(log, "I/O error") {
		t.Errorf("the guest saw an I/O error")
	}
}

func (linux) findsErrors(t *testing.T, a *proc) {
	for n := 0; n < 3; {
		_, _ = fmt.Sscan(a.do(t, "disk disk status"), &n)
	}
	a.do(t, "mem stop")
	a.do(t, "mem verify")
	last := a.do(t, "disk disk verify")

	wrong := func(command string) {
		t.Helper()
		if answer, err := a.try(newWait(t), command); err == nil {
			t.Errorf("%s found nothing wrong: %s", command, answer)
		} else {
			t.Logf("%s found: %.100v", command, err)
		}
	}
	a.damageMemory(t)
	wrong("mem verify")

	var newest int
	if _, err := fmt.Sscan(last, &newest); err != nil {
		t.Fatal(err)
	}
	a.do(t, fmt.Sprintf("disk disk start %d %d", slots, newest+2)) // as if two more had been flushed
	for n := 0; n < newest+3; {
		_, _ = fmt.Sscan(a.do(t, "disk disk status"), &n)
	}
	wrong("disk disk verify")

	a.do(t, fmt.Sprintf("disk disk start %d", slots)) // anew: it is right again
	for n := 0; n < 3; {
		_, _ = fmt.Sscan(a.do(t, "disk disk status"), &n)
	}
	a.do(t, "disk disk stop")
	a.do(t, "disk disk write 4096 4096 1")
	wrong("disk disk verify")
}
