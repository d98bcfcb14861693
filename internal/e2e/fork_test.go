package e2e

import (
	"context"
	"strings"
	"testing"

	"github.com/drafter-vm/drafter/internal/testguest"
	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/peer"
	"github.com/drafter-vm/drafter/pkg/runner"
)

// goesOn is the configuration of an instance in a folder that goes on from others.
func (g *guest) goesOn(t *testing.T, folder string, parents ...string) peer.Config {
	t.Helper()
	cfg := g.config(t, folder)
	for _, p := range parents {
		for i, d := range g.config(t, p).Devices {
			cfg.Devices[i].Beneath = append(cfg.Devices[i].Beneath, runner.Layer{Overlay: d.Overlay, State: d.State})
		}
	}
	return cfg
}

// TestForks has two instances go on from one that was closed, at the same time, and one more from one of these; moves one of them to a host that
// has nothing but the package; and folds one into its parent.
func TestForks(t *testing.T) {
	g := newGuest(t)
	before := digests(t, g.pkg)
	parent, fork := shortDir(t), shortDir(t)
	first := g.console
	closed := func(cfg peer.Config, work func()) {
		t.Helper()
		p, err := peer.Resume(newContext(t), cfg)
		if err != nil {
			t.Fatal(err)
		}
		work()
		if err := p.Close(context.WithoutCancel(t.Context())); err != nil {
			t.Fatal(err)
		}
	}
	var written string
	closed(g.config(t, parent), func() {
		g.do(t, "put /name parent")
		written = g.do(t, "disk disk write 0 65536 1")
	})

	type running struct {
		peer    *peer.Peer
		console *testguest.Console
	}
	var forks []running
	for _, folder := range []string{fork, shortDir(t)} {
		g.console = newConsole(t)
		p, err := peer.Resume(newContext(t), g.goesOn(t, folder, parent))
		if err != nil {
			t.Fatal(err)
		}
		defer func() { p.Close(context.WithoutCancel(t.Context())) }()
		forks = append(forks, running{p, g.console})
	}
	names := []string{"fork", "sibling"}
	for n, f := range forks {
		g.console = f.console
		if got := g.do(t, "cat /name"); !strings.Contains(got, "parent") {
			t.Errorf("%s finds %s where its parent wrote its name", names[n], got)
		}
		if got := g.do(t, "disk disk sum 0 65536"); got != written {
			t.Errorf("%s finds %s on the disk, its parent wrote %s", names[n], got, written)
		}
		g.do(t, "put /name "+names[n])
		g.do(t, "disk disk write 4096 4096 "+string(rune('2'+n)))
	}
	if _, err := peer.Resume(newContext(t), g.config(t, parent)); err == nil || !strings.Contains(err.Error(), "another process holds it") {
		t.Errorf("resuming the parent of those that run: %v", err)
	}

	// The sibling goes to a host that knows the package alone.
	g.console = forks[1].console
	want := g.do(t, "disk disk sum 0 65536")
	there, report := move(t, forks[1].peer, g.config(t, shortDir(t)))
	defer there.Close(context.WithoutCancel(t.Context()))
	if got := g.do(t, "cat /name"); !strings.Contains(got, "sibling") {
		t.Errorf("after the move the sibling's name is %s", got)
	}
	if got := g.do(t, "disk disk sum 0 65536"); got != want {
		t.Errorf("after the move its disk has %s, want %s", got, want)
	}
	if report.SameBytes == 0 {
		t.Error("all of the sibling travelled, though both hosts have the package")
	}

	// A third generation, over both.
	g.console = forks[0].console
	if err := forks[0].peer.Close(context.WithoutCancel(t.Context())); err != nil {
		t.Fatal(err)
	}
	g.console = newConsole(t)
	grandchild := g.goesOn(t, shortDir(t), parent, fork)
	closed(grandchild, func() {
		if got := g.do(t, "cat /name"); !strings.Contains(got, "fork") {
			t.Errorf("the grandchild finds %s where its parent wrote its name", got)
		}
	})

	// What the fork holds becomes its parent's. It goes on from there; a sibling's files do not.
	for _, d := range g.goesOn(t, fork, parent).Devices {
		commit(t, d.DeviceConfig)
	}
	g.console = first
	closed(g.config(t, parent), func() {
		if got := g.do(t, "cat /name"); !strings.Contains(got, "fork") {
			t.Errorf("the parent finds %s where the fork that was committed to it wrote its name", got)
		}
	})
	if _, err := peer.Resume(newContext(t), grandchild); err == nil || !strings.Contains(err.Error(), "changed since the overlay was made") {
		t.Errorf("resuming over what has changed: %v", err)
	}
	if after := digests(t, g.pkg); after != before {
		t.Errorf("the package has changed:\n%s\nwas\n%s", after, before)
	}
}

// commit folds the overlay of a device into the one below it.
func commit(t *testing.T, c runner.DeviceConfig) {
	t.Helper()
	below := c
	last := c.Beneath[len(c.Beneath)-1]
	below.Overlay, below.State, below.Beneath = last.Overlay, last.State, c.Beneath[:len(c.Beneath)-1]
	open := func(c runner.DeviceConfig, base block.Device) *block.Overlay {
		t.Helper()
		o, err := block.OpenOverlay(block.OverlayOptions{Base: base, BasePath: c.Base, Overlay: c.Overlay, State: c.State})
		if err != nil {
			t.Fatal(err)
		}
		return o
	}
	base, err := below.OpenBase()
	if err != nil {
		t.Fatal(err)
	}
	o := open(c, open(below, base))
	if err := o.Commit(t.Context(), nil); err != nil {
		t.Error(err)
	}
	if err := o.Close(); err != nil {
		t.Error(err)
	}
}
