package faults

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/drafter-vm/drafter/pkg/migrate"
	"github.com/drafter-vm/drafter/pkg/wire"
)

// victim is what the blow falls on in a migration between two real peers, "a" and "b".
type victim string

const (
	sourcePeer         victim = "source's peer"
	destinationPeer    victim = "destination's peer"
	bothPeers          victim = "both peers"
	sourceMachine      victim = "source's machine"
	destinationMachine victim = "destination's machine"
	theLink            victim = "link"

	sourceCanceled      victim = "source's peer interrupted" // by a SIGINT, as by Ctrl-C: it cancels, and closes
	destinationCanceled victim = "destination's peer interrupted"
	destinationDisk     victim = "destination's disk full"
)

// victims are those that are struck in every state; a peer is canceled in every state of its own.
var victims = []victim{sourcePeer, destinationPeer, bothPeers, sourceMachine, destinationMachine, theLink, sourceCanceled, destinationCanceled}

// scene is a migration between two real peers, in which something is killed, canceled or full in a state of one of them.
type scene struct {
	short  bool // also tried in the short run
	victim victim
	source migrate.SourceState      // in this state of the source,
	dest   migrate.DestinationState // or, if that is its zero value, in this one of the destination
	// hold, if set, holds the migration there: frames of this type do not pass until the blow has fallen. Otherwise the blow
	// falls as soon as the peer has said that it is there, and may find it further on.
	hold   wire.Type
	toward Direction
	flags  []string // of the destination
	space  int64    // bytes of the destination's file system, which it has to itself; 0: that of everything
}

func (s scene) String() string {
	state := "source " + s.source.String()
	if s.source == migrate.SourceConnecting {
		state = "destination " + s.dest.String()
	}
	if s.flags != nil {
		state += " " + strings.Join(s.flags, " ")
	}
	return fmt.Sprintf("%s, %s", s.victim, state)
}

var noPostCopy = []string{"--disable-postcopy-migration"}

// scenes are one for each victim in each state. Where a frame holds the migration in a state, the blow falls exactly there.
func scenes() (all []scene) {
	held := map[migrate.SourceState]scene{
		migrate.SourceOffering:   {hold: wire.TypeAccept, toward: ToSource},
		migrate.SourceCopying:    {hold: wire.TypeRoundEnd, toward: ToDestination},
		migrate.SourceConfirming: {hold: wire.TypePrepared, toward: ToSource},
		migrate.SourceCommitted:  {hold: wire.TypeCommit, toward: ToDestination},
		migrate.SourceServing:    {hold: wire.TypeServed, toward: ToDestination},
	}
	heldThere := map[migrate.DestinationState]scene{
		migrate.DestinationWaiting:   {hold: wire.TypeManifest, toward: ToDestination},
		migrate.DestinationReceiving: {hold: wire.TypeRoundEnd, toward: ToDestination},
		migrate.DestinationPrepared:  {hold: wire.TypeCommit, toward: ToDestination},
		migrate.DestinationFilling:   {hold: wire.TypeServed, toward: ToDestination},
	}
	for _, v := range victims {
		for _, s := range States(migrate.SourceConnecting, migrate.SourceState.Next) {
			switch s {
			case migrate.SourceConnecting, migrate.SourceResuming, migrate.SourceChecking, migrate.SourceCopied, migrate.SourceStuck, migrate.SourceInDoubt,
				migrate.SourceUnsettled, migrate.SourceRollingBack, migrate.SourceKept, migrate.SourceSeeking, migrate.SourceRejoining:
				continue // of copies, or what another blow leads to
			}
			if v == destinationCanceled {
				break
			}
			x := held[s]
			x.victim, x.source = v, s
			x.short = v == sourcePeer && s == migrate.SourceCommitted || v == destinationPeer && s == migrate.SourceServing ||
				v == sourceCanceled && s == migrate.SourceConfirming
			all = append(all, x)
		}
		for _, s := range States(migrate.DestinationConnecting, migrate.DestinationState.Next) {
			switch s {
			case migrate.DestinationConnecting, migrate.DestinationKeeping, migrate.DestinationCopied, migrate.DestinationDiscarding, migrate.DestinationDiscarded,
				migrate.DestinationIncomplete, migrate.DestinationFailed, migrate.DestinationRejoining:
				continue
			}
			if v == sourceCanceled {
				break
			}
			x := heldThere[s]
			x.victim, x.dest = v, s
			all = append(all, x)
		}
	}
	for n, x := range all { // and without post-copy, where it has its own way
		if x.source == migrate.SourceCommitted || x.dest == migrate.DestinationStarting {
			all[n].flags = nil
			x.flags, x.short = noPostCopy, false
			all = append(all, x)
		}
	}
	// A disk that is full before anything comes, when something does, and half-way.
	return append(all,
		scene{victim: destinationDisk, dest: migrate.DestinationWaiting, hold: wire.TypeManifest, toward: ToDestination, space: 64 << 20},
		scene{victim: destinationDisk, dest: migrate.DestinationReceiving, hold: wire.TypeData, toward: ToDestination, space: 64 << 20},
		scene{victim: destinationDisk, dest: migrate.DestinationReceiving, space: diskLoad / 2})
}

// diskLoad is how many bytes of the disk the guest fills before it moves to one that will be full.
const diskLoad = 16 << 20

// TestProcesses kills and interrupts real peers, kills their machines, cuts links and fills disks, in every state of a migration
// under load. What has ended is started again by the command line that it had, or by what the peer says is to be done. Then exactly
// one guest runs: with memory and disk intact, or, where its machine was killed, booted from a disk on which is everything that was
// flushed. Where the blow fell before the source's record, the source ran on at once. Nothing is left, and nothing is open that was
// not before.
func TestProcesses(t *testing.T) {
	newRoom(t, linux{}).play(t, scenes())
}

// play plays scenes: those that are short, or all with -long.
func (r *room) play(t *testing.T, scenes []scene) {
	died := map[string]int{}
	begun := time.Now()
	for n, s := range scenes {
		if !*long && !s.short {
			continue
		}
		before := r.own()
		ok := t.Run(s.String(), func(t *testing.T) {
			p := &play{room: r, scene: s, a: fmt.Sprintf("a%d", n), b: fmt.Sprintf("b%d", n), address: freeAddress(t)}
			begun := time.Now()
			p.run(t)
			t.Logf("took %v", time.Since(begun).Round(time.Second))
			died[fmt.Sprintf("%s in %s", s.victim, p.died)]++
		})
		if more := r.own().more(before); ok && len(more) > 0 {
			t.Errorf("after %s the test itself has open what it had not before: %q", s, more)
		}
	}
	t.Run("planted errors", r.guestsFindErrors)
	if len(died) == 0 && flag.Lookup("test.run").Value.String() == "" {
		t.Error("no scene was played to its end")
	}
	for _, what := range slices.Sorted(maps.Keys(died)) {
		t.Logf("%d × %s", died[what], what)
	}
	t.Logf("a guest that stood still before the record ran on at the source %v", &r.ranOn)
	t.Logf("all of it took %v", time.Since(begun).Round(time.Second))
}

// maxRestarts is how often peers are started again in a scene, which needs three or four at most.
const maxRestarts = 10

// play is one scene being played.
type play struct {
	scene
	room     *room
	a, b     string // names of the two peers, and of their instances
	address  string // of a
	link     *Link
	through  string  // address of a, by way of the link
	died     string  // state in which the victim was found
	acked    string  // newest record of the disk's journal that was known to be flushed before the blow
	rest     resting // of the source, before anything happened
	restarts int     // of peers, after the blow
	paused   bool    // the source's guest stood still when the blow fell

	source, destination *proc
	canceled            *proc // which therefore will close
}

func (p *play) run(t *testing.T) {
	defer p.room.killAll()
	p.source = p.room.peer(t, p.a, "--laddr", p.address)
	p.source.says(t, "Serving on ")
	p.room.tenant.begin(t, p.source)
	p.acked = p.room.tenant.flushed(t, p.source)
	if p.victim == destinationDisk {
		p.source.do(t, fmt.Sprintf("disk disk write %d %d 1", 8<<20, diskLoad))
	}
	p.rest = p.room.resting(t, p.source)

	reached := make(chan struct{})
	var faults []Fault
	if p.hold != 0 {
		faults = append(faults, Fault{Kind: Stall, Direction: p.toward, Stream: AnyStream, At: Point{Before: p.hold}, Reached: func() { close(reached) }})
	}
	p.link = NewLink(faults...)
	p.link.Rate = 30 << 20 // slow enough for something to be missing at the switch
	defer p.link.Close()
	var err error
	if p.through, err = p.link.Listen(p.address); err != nil {
		t.Fatal(err)
	}
	if p.space > 0 {
		p.mount(t)
	}
	p.startDestination(t)

	// The moment.
	at := p.source.state
	state := fmt.Stringer(p.scene.source)
	if p.scene.source == migrate.SourceConnecting {
		at, state = p.destination.state, p.scene.dest
	}
	if !at(t, state) {
		t.Fatalf("the migration did not come through %v, so that nothing was tried there", state)
	}
	if p.hold != 0 {
		select {
		case <-reached:
		case <-time.After(guestWait):
			t.Fatalf("no frame %v came by", p.hold)
		}
	}
	begun := time.Now()
	p.strike(t)
	p.link.Release()
	p.checkRunsOn(t, begun)
	if p.victim == destinationDisk {
		p.giveSpace(t)
	}
	p.recover(t)
}

// mount gives the destination's instance a file system of its own, with little space.
func (p *play) mount(t *testing.T) {
	t.Helper()
	dir := p.room.path(p.b)
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=%d", p.space)); err != nil {
		t.Fatalf("mount a small file system: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) }) // of a scene that failed
}

// fill leaves no space on the destination's file system.
func (p *play) fill(t *testing.T) {
	t.Helper()
	f, err := os.Create(filepath.Join(p.room.path(p.b), "ballast"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for err == nil {
		_, err = f.Write(make([]byte, 64<<10))
	}
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("fill the disk: %v", err)
	}
}

// ranOnAt is when its guest ran again after a migration that failed, as its log says.
func (p *proc) ranOnAt() (at time.Time, ok bool) {
	_, after, _ := strings.Cut(p.said(), " state=rolling-back\n")
	for line := range strings.Lines(after) {
		if !strings.Contains(line, " step=cont ") {
			continue
		}
		text, _, _ := strings.Cut(strings.TrimPrefix(line, "time="), " ")
		at, err := time.Parse(time.RFC3339, text)
		return at, err == nil
	}
	return time.Time{}, false
}

// giveSpace checks that the destination has failed for want of space and has left nothing, and starts it again where there is some.
func (p *play) giveSpace(t *testing.T) {
	t.Helper()
	p.destination.ends(t)
	if said := p.destination.said(); !strings.Contains(said, "no space left") || p.destination.rc != 1 {
		t.Errorf("the destination does not say that its disk is full, but ends with status %d and says:\n%s", p.destination.rc, said)
	}
	dir := p.room.path(p.b)
	_ = os.Remove(filepath.Join(dir, "ballast")) // if it was filled with one
	_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if info, statErr := os.Stat(path); err != nil || statErr != nil || !d.IsDir() && info.Sys().(*syscall.Stat_t).Blocks*512 > 64<<10 {
			t.Errorf("the destination has left %s (%v, %v)", path, err, statErr)
		}
		return nil
	})
	if err := unix.Unmount(dir, 0); err != nil {
		t.Fatal(err)
	}
	if owner := p.owner(); owner != p.source {
		t.Errorf("the guest is not the source's any more, which says:\n%s", p.source.said())
	}
	p.startDestination(t)
	if p.destination.says(t, "Received VM") == "" {
		t.Fatalf("the destination has space, and received nothing:\n%s", p.destination.said())
	}
}

// timeouts are what sides of a migration say of the other when some time is over.
var timeouts = []string{"no sign of life", "took longer than", "not found again within", "did not introduce itself"}

// checkRunsOn checks, if the source has not given its guest away when the blow fell, that the guest ran on there at once, and not
// when some time was over. How long that took is noted; on a machine that is busy it says little.
func (p *play) checkRunsOn(t *testing.T, blow time.Time) {
	t.Helper()
	switch p.victim {
	case sourcePeer, bothPeers, sourceMachine:
		return // by itself nothing runs on there
	}
	if p.source.says(t, "state=kept\n", "state=committed\n") != "state=kept\n" {
		return
	}
	took := time.Since(blow)
	if at, ok := p.source.ranOnAt(); ok && p.paused { // the agent hears of it later
		took = at.Sub(blow)
		p.room.ranOn.add(took)
	}
	if p.source.says(t, "the VM runs on here: ") == "" {
		t.Fatalf("the source kept its guest, and does not say why:\n%s", p.source.said())
	}
	_, why, _ := strings.Cut(p.source.said(), "the VM runs on here: ")
	why, _, _ = strings.Cut(why, "\n")
	t.Logf("the source kept its guest, paused: %t, after %v: %s", p.paused, took.Round(time.Millisecond), why)
	if slices.ContainsFunc(timeouts, func(text string) bool { return strings.Contains(why, text) }) {
		t.Errorf("the source ran on only when some time was over: %s", why)
	}
}

func (p *play) startDestination(t *testing.T) {
	p.destination = p.room.peer(t, p.b, append([]string{"--raddr", p.through}, p.flags...)...)
}

// strike kills the victim.
func (p *play) strike(t *testing.T) {
	switch p.source.lastState() {
	case migrate.SourcePausing.String(), migrate.SourceSwitching.String(), migrate.SourceConfirming.String(), migrate.SourceCommitting.String():
		p.paused = true
	}
	var machines []int
	switch p.victim {
	case sourcePeer:
		p.source.kill()
	case destinationPeer:
		p.destination.kill()
	case bothPeers:
		_ = p.source.Process.Kill()
		p.destination.kill()
		p.source.kill()
	case sourceMachine:
		machines = p.room.machines(p.a)
	case destinationMachine:
		machines = p.room.machines(p.b)
	case theLink:
		p.link.Cut()
	case sourceCanceled:
		p.canceled = p.source
		_ = p.source.Process.Signal(syscall.SIGINT)
	case destinationCanceled:
		p.canceled = p.destination
		_ = p.destination.Process.Signal(syscall.SIGINT)
	case destinationDisk:
		if p.hold != 0 {
			p.fill(t)
		}
	}
	for _, pid := range machines {
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
	p.died = fmt.Sprintf("%s/%s", p.source.lastState(), p.destination.lastState())
	t.Logf("found the source in %s and the destination in %s", p.source.lastState(), p.destination.lastState())
}

// recover starts again what has ended and may have the guest, until it runs somewhere, and checks it.
func (p *play) recover(t *testing.T) {
	machineKilled := p.victim == sourceMachine || p.victim == destinationMachine
	ctx, cancel := context.WithTimeout(t.Context(), 2*guestWait)
	defer cancel()
	booted := map[string]bool{}
	var owner *proc
	for owner == nil {
		if ctx.Err() != nil {
			t.Fatalf("the guest runs nowhere: the source says\n%s\nthe destination says\n%s", p.source.said(), p.destination.said())
		}
		owner = p.owner()
		if owner != nil {
			break
		}
		p.source = p.again(t, p.source, booted, "--laddr", p.address)
		p.destination = p.again(t, p.destination, booted, append([]string{"--raddr", p.through}, p.flags...)...)
		time.Sleep(100 * time.Millisecond) // between two looks
	}
	t.Logf("the guest runs with %s, booted: %t", owner.name, booted[owner.name])
	if booted[owner.name] {
		if !machineKilled {
			t.Errorf("the guest was booted, though its machine was not killed")
		}
		p.room.tenant.booted(t, owner, p.acked)
		for _, kind := range p.room.tenant.keepsOfBoot(p.room) {
			p.rest.machine[kind]++
		}
	} else {
		p.room.tenant.verify(t, owner)
	}
	p.room.tenant.verifyDisk(t, owner, p.acked)

	// Nobody else runs it.
	if n := executing(newWait(t), append(p.room.machines(p.a), p.room.machines(p.b)...)); n != 1 {
		t.Errorf("%d machines execute a guest, want one", n)
	}
	for _, stray := range p.room.strayNamespaces() {
		t.Error(stray)
	}
	p.room.checkResting(t, owner, p.rest)
	if p.victim == destinationPeer && owner == p.source && !p.destination.again {
		owner = p.receiveAgain(t)
	}
	p.close(t, owner)
}

// receiveAgain checks that a destination which was killed before the guest was its own has left no machine, though nobody has cleaned
// up after it, and starts it again by its command line: it receives what it did not.
func (p *play) receiveAgain(t *testing.T) *proc {
	t.Helper()
	for ctx := newWait(t); len(p.room.machines(p.b)) > 0; time.Sleep(10 * time.Millisecond) {
		if ctx.Err() != nil {
			t.Fatalf("machines %v live on, of a destination that was killed", p.room.machines(p.b))
		}
	}
	p.startDestination(t)
	if p.destination.says(t, "Received VM") == "" {
		t.Fatalf("the destination was started again, and received nothing:\n%s", p.destination.said())
	}
	p.room.tenant.verify(t, p.destination)
	p.room.tenant.verifyDisk(t, p.destination, p.acked)
	return p.destination
}

// owner is the peer that says that it has the guest, once nobody is moving it any more.
func (p *play) owner() *proc {
	has := func(x *proc, texts ...string) bool {
		return slices.ContainsFunc(texts, func(text string) bool { return strings.Contains(x.said(), text) })
	}
	stays := func(x *proc) bool { return !x.ended() && x != p.canceled }
	resumed := func(x *proc) bool { return x.again && has(x, "Resumed VM") }
	switch {
	case stays(p.destination) && (has(p.destination, "Received VM", "Adopted VM", "Booted VM") || resumed(p.destination)):
		return p.destination
	case p.destination.ended() && stays(p.source) && (has(p.source, "runs on here", "Booted VM") || resumed(p.source)),
		p.destination.ended() && stays(p.source) && has(p.source, "Adopted VM") && !has(p.source, ", paused:"):
		return p.source
	}
	return nil
}

// again starts a peer again that has ended without having handed its guest over, as what it said asks for.
func (p *play) again(t *testing.T, x *proc, booted map[string]bool, args ...string) *proc {
	t.Helper()
	if !x.ended() {
		return x
	}
	said := x.said()
	switch {
	case strings.Contains(said, "Sent VM"): // and has nothing any more
		return x
	case x.rc == 130: // it was interrupted before it had a guest
		return x
	case x == p.canceled && x.name == p.b && x.rc == 0: // it has saved what it had received
		args = nil
	case strings.Contains(said, "ownership of the guest is in doubt") && !strings.Contains(said, "--boot"): // what it says when it is started again decides
	case strings.Contains(said, "which owns it"), strings.Contains(said, "did not finish"), x.name == p.b && x.rc == 1 && !strings.Contains(said, "--boot") && !strings.Contains(said, "lacks"):
		return x // it is not the owner
	case strings.Contains(said, "--boot"):
		booted[x.name] = true
		args = append(args, "--boot", "--resume-timeout", "3s")
	}
	lines := strings.Split(strings.TrimSpace(said), "\n")
	t.Logf("%s has ended with status %d (%s) and is started again: %v", x.name, x.rc, lines[len(lines)-1], args)
	if p.restarts++; p.restarts > maxRestarts {
		t.Fatalf("nothing comes of starting the peers again; the last of them said:\n%s", said)
	}
	next := p.room.peer(t, x.name, args...)
	next.again = true
	return next
}

// close closes what is left, and checks that nothing is.
func (p *play) close(t *testing.T, owner *proc) {
	t.Helper()
	for _, x := range []*proc{owner, p.source, p.destination} {
		if !x.ended() {
			_ = x.Process.Signal(syscall.SIGTERM)
			x.ends(t)
		}
	}
	p.room.checkClean(t)
}
