package faults

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/drafter-vm/drafter/pkg/migrate"
	"github.com/drafter-vm/drafter/pkg/wire"
)

// victim is what is killed of a migration between two real peers, "a" and "b".
type victim string

const (
	sourcePeer         victim = "source's peer"
	destinationPeer    victim = "destination's peer"
	bothPeers          victim = "both peers"
	sourceMachine      victim = "source's machine"
	destinationMachine victim = "destination's machine"
	theLink            victim = "link"
)

// scene is a migration between two real peers, in which something is killed in a state of one of them.
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
	for _, v := range []victim{sourcePeer, destinationPeer, bothPeers, sourceMachine, destinationMachine, theLink} {
		for _, s := range States(migrate.SourceConnecting, migrate.SourceState.Next) {
			switch s {
			case migrate.SourceConnecting, migrate.SourceResuming, migrate.SourceChecking, migrate.SourceCopied, migrate.SourceStuck, migrate.SourceInDoubt,
				migrate.SourceUnsettled, migrate.SourceRollingBack, migrate.SourceKept, migrate.SourceSeeking, migrate.SourceRejoining:
				continue // of copies, or what another blow leads to
			}
			x := held[s]
			x.victim, x.source = v, s
			x.short = v == sourcePeer && s == migrate.SourceCommitted || v == destinationPeer && s == migrate.SourceServing
			all = append(all, x)
		}
		for _, s := range States(migrate.DestinationConnecting, migrate.DestinationState.Next) {
			switch s {
			case migrate.DestinationConnecting, migrate.DestinationKeeping, migrate.DestinationCopied, migrate.DestinationDiscarding, migrate.DestinationDiscarded,
				migrate.DestinationIncomplete, migrate.DestinationFailed, migrate.DestinationRejoining:
				continue
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
	return all
}

// TestProcesses kills real peers and their machines, and cuts links, in every state of a migration under load. What is killed is
// started again by the command line that it had, or by what the peer says is to be done. Then exactly one guest runs: with memory
// and disk intact, or, where its machine was killed, booted from a disk on which is everything that was flushed.
func TestProcesses(t *testing.T) {
	r := newRoom(t)
	died := map[string]int{}
	for n, s := range scenes() {
		if !*long && !s.short {
			continue
		}
		t.Run(s.String(), func(t *testing.T) {
			p := &play{room: r, scene: s, a: fmt.Sprintf("a%d", n), b: fmt.Sprintf("b%d", n), address: freeAddress(t)}
			p.run(t)
			died[fmt.Sprintf("%s in %s", s.victim, p.died)]++
		})
	}
	if len(died) == 0 {
		t.Error("no scene was played to its end")
	}
	t.Logf("what was killed, and where it was: %v", died)
}

// play is one scene being played.
type play struct {
	scene
	room    *room
	a, b    string // names of the two peers, and of their instances
	address string // of a
	link    *Link
	through string // address of a, by way of the link
	died    string // state in which the victim was found
	acked   string // newest record of the disk's journal that was known to be flushed before the blow

	source, destination *proc
}

func (p *play) run(t *testing.T) {
	defer p.room.killAll()
	p.source = p.room.peer(t, p.a, "--laddr", p.address)
	p.source.says(t, "Serving on ")
	p.source.do(t, fmt.Sprintf("mem start %d", loadedMiB))
	p.source.do(t, fmt.Sprintf("disk disk start %d", slots))
	for p.acked == "" || p.acked == "0" {
		p.acked = p.source.do(t, "disk disk status")
	}

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
	p.startDestination(t)

	// The moment.
	at := p.source.state
	state := fmt.Stringer(p.scene.source)
	if p.scene.source == migrate.SourceConnecting {
		at, state = p.destination.state, p.scene.dest
	}
	if !at(t, state) {
		t.Skipf("the migration did not come through %v", state)
	}
	if p.hold != 0 {
		select {
		case <-reached:
		case <-time.After(guestWait):
			t.Fatalf("no frame %v came by", p.hold)
		}
	}
	p.strike(t)
	p.link.Release()
	p.recover(t)
}

func (p *play) startDestination(t *testing.T) {
	p.destination = p.room.peer(t, p.b, append([]string{"--raddr", p.through}, p.flags...)...)
}

// strike kills the victim.
func (p *play) strike(t *testing.T) {
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
		ctx := newWait(t)
		if err := owner.console.Ready(ctx); err != nil {
			t.Fatal(err)
		}
		// The records that follow are written where they would have been, so that a lost one is missing in the whole.
		owner.do(t, fmt.Sprintf("disk disk start %d %s", slots, p.acked))
		owner.do(t, fmt.Sprintf("mem start %d", loadedMiB))
	} else {
		owner.do(t, "mem stop")
		owner.do(t, "mem verify")
		owner.do(t, "mem go")
	}
	last := owner.do(t, "disk disk verify")
	t.Logf("newest record %s, flushed before the blow %s", last, p.acked)
	if log := owner.console.Log(); strings.Contains(log, "I/O error") {
		t.Errorf("the guest saw an I/O error")
	}

	// Nobody else runs it.
	if n := executing(newWait(t), append(p.room.machines(p.a), p.room.machines(p.b)...)); n != 1 {
		t.Errorf("%d machines execute a guest, want one", n)
	}
	p.close(t, owner)
}

// owner is the peer that says that it has the guest, once nobody is moving it any more.
func (p *play) owner() *proc {
	has := func(x *proc, texts ...string) bool {
		return slices.ContainsFunc(texts, func(text string) bool { return strings.Contains(x.said(), text) })
	}
	switch {
	case !p.destination.ended() && has(p.destination, "Received VM", "Adopted VM", "Booted VM"):
		return p.destination
	case p.destination.ended() && !p.source.ended() && has(p.source, "the VM runs on here", "runs on here", "Booted VM"),
		p.destination.ended() && !p.source.ended() && has(p.source, "Adopted VM") && !has(p.source, ", paused:"):
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
	case strings.Contains(said, "which owns it"), strings.Contains(said, "did not finish"), x.name == p.b && x.rc == 1 && !strings.Contains(said, "--boot") && !strings.Contains(said, "lacks"):
		return x // it is not the owner
	case strings.Contains(said, "--boot"):
		booted[x.name] = true
		args = append(args, "--boot", "--resume-timeout", "3s")
	}
	t.Logf("%s is started again: %v", x.name, args)
	return p.room.peer(t, x.name, args...)
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
