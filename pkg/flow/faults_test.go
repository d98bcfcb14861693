package flow_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/drafter-vm/drafter/internal/testnet"
	"github.com/drafter-vm/drafter/pkg/flow"
	"github.com/drafter-vm/drafter/pkg/nat"
)

var long = flag.Bool("long", false, "take hours where minutes do by default")

// TestRelayTwice: an owner that reaches one place only is relayed for by that one, however far the guest goes.
func TestRelayTwice(t *testing.T) {
	s := newSites(t, "a", "b", "c", "d")
	for _, host := range []string{"c", "d"} {
		s.all["a"].deaf, s.all[host].deaf = append(s.all["a"].deaf, host), []string{"a"}
	}
	old, recent := s.owners(t)
	all := append(old, recent...)
	for _, to := range []string{"c", "d", "c", "d"} {
		s.move(to)
		goOn(t, "at "+to, all)
	}
	time.Sleep(2 * time.Second) // what is left of places is gone a second after it is not needed
	goOn(t, "at d for a while", all)
	s.move("b")
	goOn(t, "at b again", all)
	s.move("a")
	goOn(t, "at home", all)
}

// TestOwnerMissesMove: an owner whose process was not there during a move hears of it when it is again.
func TestOwnerMissesMove(t *testing.T) {
	s := newSites(t, "a", "b", "c", "d")
	s.forward("a")
	all := s.talks(t, 1)
	s.move("b")
	goOn(t, "at b", all)
	a := s.all["a"]
	if err := a.k.Close(); err != nil {
		t.Fatal(err)
	}
	s.move("c")
	a.open()
	goOn(t, "at c, with the owner again", all)
	s.waitFor(t, "the owner does not reach c itself", func() bool {
		places, err := a.k.Places()
		if err != nil {
			t.Fatal(err)
		}
		return len(places) == 1 && places[0].Guest && places[0].Connected && places[0].Number == 3
	})
	s.done(t, "b")
	goOn(t, "without b", all)
	s.move("d")
	goOn(t, "at d", all)
}

// TestBackAndForth: a place which the guest has left a moment ago, and goes to again, is not left by an owner as one that it needs no more.
func TestBackAndForth(t *testing.T) {
	s := newSites(t, "a", "b", "c")
	old, recent := s.owners(t)
	all := append(old, recent...)
	s.move("c")
	b := s.all["b"].k
	reaches := func(host string) {
		t.Helper()
		s.waitFor(t, "b does not send straight to "+host, func() bool {
			places, err := b.Places()
			if err != nil {
				t.Fatal(err)
			}
			return slices.ContainsFunc(places, func(p flow.Place) bool { return p.Guest && p.Connected && p.Address == s.all[host].k.Address() })
		})
	}
	s.during = func(string) { time.Sleep(700 * time.Millisecond) } // what is not needed any more is left after a second
	for range 2 {
		reaches("c")
		s.move("a")
		reaches("a")
		s.move("c")
		goOn(t, "at c again", all)
	}
	reaches("c")
}

// TestDiscardFirst: what is on its way to a place that expects the guest back no more is lost. It does not go back to the guest, as what it would take
// for strange.
func TestDiscardFirst(t *testing.T) {
	s := newSites(t, "a", "b")
	old, recent := s.owners(t)
	all := append(old, recent...)
	for range 3 {
		goOn(t, "at b", all)
		s.begin(t, "b", "a")
		if err := s.all["a"].k.Discard(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(100 * time.Millisecond)
		if err := s.at.k.Undo(); err != nil {
			t.Fatal(err)
		}
	}
	goOn(t, "after it did not go", all)
}

// TestCutBeforeFollow: an owner that has met the guest's new place, and lost it before the guest was there, is relayed for.
func TestCutBeforeFollow(t *testing.T) {
	s := newSites(t, "a", "b", "c")
	s.forward("a")
	all := s.talks(t, 1)
	s.move("b")
	goOn(t, "at b", all)
	a, c := s.all["a"], s.all["c"]
	s.during = func(when string) {
		if when != "b is about to send it to c" {
			return
		}
		s.waitFor(t, "a does not meet c", func() bool {
			places, err := a.k.Places()
			return err == nil && slices.ContainsFunc(places, func(p flow.Place) bool { return p.Number == 3 && p.Connected })
		})
		a.k.Busy(func() { // it has said that it has
			a.way.Lock()
			a.deaf = []string{"c"}
			a.way.Unlock()
			a.k.Cut(c.k.Address())
		})
	}
	s.move("c")
	goOn(t, "relayed", all)
	places, err := c.k.Places()
	if err != nil || !slices.ContainsFunc(places, func(p flow.Place) bool { return p.Number == 1 && p.Relay == 2 }) {
		t.Errorf("a is not relayed for: %+v, %v", places, err)
	}
	a.way.Lock()
	a.deaf = nil
	a.way.Unlock()
	s.waitFor(t, "a does not meet c", func() bool {
		places, err := c.k.Places()
		return err == nil && slices.ContainsFunc(places, func(p flow.Place) bool { return p.Number == 1 && p.Connected })
	})
	goOn(t, "connected again", all)
	s.during = nil
	s.move("b")
	goOn(t, "at b again", all)
}

// TestOwnerGone: an owner that ends unheard, with its last connection, is not kept for ever, and one that is only silent is.
func TestOwnerGone(t *testing.T) {
	t.Cleanup(flow.SetSilentFor(time.Second))
	s := newSites(t, "a", "b", "c")
	old, recent := s.owners(t)
	s.move("c")
	goOn(t, "at c", append(old, recent...))
	owners := func() (all []uint32) {
		places, err := s.at.k.Places()
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range places {
			if p.HasOwn {
				all = append(all, p.Number)
			}
		}
		return all
	}
	for _, k := range old {
		k.Stop()
	}
	for _, host := range []string{"a", "b"} { // as by kills
		if err := s.all[host].k.Close(); err != nil {
			t.Fatal(err)
		}
	}
	s.forgetUDPOf("c", 1)
	s.waitFor(t, "an owner that is gone is kept", func() bool { return slices.Equal(owners(), []uint32{2}) })
	time.Sleep(2 * time.Second)
	if got := owners(); !slices.Equal(got, []uint32{2}) {
		t.Errorf("the owners are %d, though b has connections that live", got)
	}
	s.all["b"].open()
	goOn(t, "with b again", recent)
	s.all["a"].open()
	s.forgetUDPOf("a", 0)
	s.done(t, "a")
}

// TestRelayIsSilent: a place that relays for an owner is not taken for gone while its process is not there.
func TestRelayIsSilent(t *testing.T) {
	t.Cleanup(flow.SetSilentFor(time.Second))
	s := newSites(t, "a", "b", "c")
	s.all["a"].deaf = []string{"c"}
	s.forward("a")
	all := s.talks(t, 1)
	s.move("b")
	s.move("c")
	goOn(t, "relayed", all)
	if err := s.all["b"].k.Close(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(4 * time.Second)
	s.all["b"].open()
	goOn(t, "with the relay again", all)
}

// TestGuestsPlaceRestarts: when the process at the guest's place comes back, at another address, connections of other places go on.
func TestGuestsPlaceRestarts(t *testing.T) {
	s := newSites(t, "a", "b", "c")
	s.forward("a")
	all := s.talks(t, 1)
	s.move("b")
	goOn(t, "at b", all)
	for range 2 {
		b := s.all["b"]
		if err := b.k.Close(); err != nil {
			t.Fatal(err)
		}
		b.open()
		if fresh, err := b.k.Start(); err != nil || fresh {
			t.Fatalf("it is not the same guest: %t, %v", fresh, err)
		}
		goOn(t, "after b's restart", all)
	}
}

// TestSilentOwner: an owner that does not answer keeps the guest no longer than others: it goes with the connections of the others.
func TestSilentOwner(t *testing.T) {
	s := newSites(t, "a", "b", "c")
	old, recent := s.owners(t)
	goOn(t, "at b", append(old, recent...))
	s.all["a"].k.Busy(func() {
		b, c := s.all["b"].k, s.all["c"].k
		answer, err := c.Accept(b.Offer())
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second) // as long as a peer waits
		defer cancel()
		if err := b.Connect(ctx, answer); err != nil || ctx.Err() != nil {
			t.Errorf("it waits for the owner: %v, %v", err, ctx.Err())
		}
		guest, err := s.guest.Open(s.all["c"].ns.Name)
		if err != nil {
			t.Fatal(err)
		}
		if err := b.Divert(); err != nil {
			t.Fatal(err)
		}
		s.guest.Pause()
		if _, err := b.Hand(ctx); err != nil {
			t.Fatal(err)
		}
		if err := c.Arrive(); err != nil {
			t.Fatal(err)
		}
		s.guest.Resume(guest)
		if err := b.Left(); err != nil {
			t.Fatal(err)
		}
		s.at = s.all["c"]
		goOn(t, "at c, with an owner that does not answer", append(old, recent...))
	})
	goOn(t, "when it does", append(old, recent...))

}

// TestRandomMoves: whatever the order in which a guest moves, does not move after all, and places that it has left are started again, its
// connections go on.
func TestRandomMoves(t *testing.T) {
	steps := 10
	if *long {
		steps = 200
	}
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	s := newSitesWith(t, []string{"a", "b"}, "a", "b", "c")
	old, recent := s.owners(t)
	all := append(old, recent...)
	s.during = func(string) { time.Sleep(time.Duration(max(0, r.IntN(2000)-1000)) * time.Millisecond) }
	for i := range steps {
		others := slices.DeleteFunc([]string{"a", "b", "c"}, func(host string) bool { return host == s.at.host })
		to := others[r.IntN(2)]
		x, what := s.all[to], "move to "+to
		switch r.IntN(4) {
		case 0:
			what = "undo a move to " + to
			s.begin(t, s.at.host, to)
			if r.IntN(2) == 0 {
				s.guest.Pause()
				if _, err := s.at.k.Hand(t.Context()); err != nil {
					t.Fatal(err)
				}
				back, err := s.guest.Open(s.at.ns.Name)
				if err != nil {
					t.Fatal(err)
				}
				what += ", late"
				if err := s.at.k.Undo(); err != nil {
					t.Fatal(err)
				}
				s.guest.Resume(back)
			} else if err := s.at.k.Undo(); err != nil {
				t.Fatal(err)
			}
			if err := x.k.Discard(); err != nil {
				t.Fatal(err)
			}
		case 1:
			if x.k.State() != flow.Away {
				continue
			}
			what = "restart " + to
			if err := x.k.Close(); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Duration(r.IntN(300)) * time.Millisecond)
			x.open()
		default:
			s.move(to)
		}
		what = fmt.Sprintf("step %d, %s, at %s", i, what, s.at.host)
		goOn(t, what, all)
		time.Sleep(time.Duration(r.IntN(1500)) * time.Millisecond)
		goOn(t, "after "+what, all)
		t.Logf("%s: %s", what, gaps(all))
		if t.Failed() {
			t.FailNow()
		}
	}
	s.waitFor(t, "the guest's place has to do with others than owners", func() bool {
		places, err := s.at.k.Places()
		return err == nil && !slices.ContainsFunc(places, func(p flow.Place) bool { return !p.HasOwn })
	})
}

// TestMixed: to a place without IPv6 go the connections of IPv4.
func TestMixed(t *testing.T) {
	s := newSites(t, "a", "b")
	x := s.all["b"]
	if err := x.k.Close(); err != nil {
		t.Fatal(err)
	}
	if err := testnet.Do(s.Host("b"), func() error {
		n, err := nat.Open(context.Background(), nat.Config{
			Prefix: "v" + s.Host("")[1:5] + "x", Count: 1, IPv6: nat.Off, HostVethCIDR: netip.MustParsePrefix("10.1.8.0/24"), NamespaceVethCIDR: netip.MustParsePrefix("10.1.15.0/24"),
		})
		if err != nil {
			return err
		}
		t.Cleanup(func() {
			if err := n.Close(context.Background()); err != nil {
				t.Error(err)
			}
		})
		x.ns = n.Namespaces()[0]
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	x.open()
	s.forward("a")
	var four []*testnet.Talk
	for _, k := range s.talks(t, 2) {
		if !strings.Contains(k.Name, "2001:") {
			four = append(four, k)
		}
	}
	if len(four) != 8 {
		t.Fatalf("%d connections are of IPv4", len(four))
	}
	goOn(t, "at the begin", four)
	s.move("b")
	goOn(t, "at b", four)
	s.move("a")
	goOn(t, "at home", four)
}

// TestVXLAN6: VXLAN goes over IPv6, too, with packets that nobody has to cut.
func TestVXLAN6(t *testing.T) {
	s := newSites(t, "a", "b")
	for _, x := range s.all {
		if err := x.k.Close(); err != nil {
			t.Fatal(err)
		}
		x.vxlan, x.vxlan6 = true, true
		x.open()
	}
	s.forward("a")
	all := s.talks(t, 1)
	s.move("b")
	s.byVXLAN(t, true, "a", "b")
	goOn(t, "by VXLAN", all)
	s.move("a")
	goOn(t, "at home", all)
}

// TestDeadReleased: a namespace whose guest and peer are both gone goes back to its pool, and one that keeps connections does not.
func TestDeadReleased(t *testing.T) {
	h := testnet.NewTestHosts(t, "a")
	if err := testnet.Do(h.Host("a"), func() error {
		n, err := nat.Open(t.Context(), nat.Config{Prefix: "d" + h.Host("")[1:5] + "x"})
		if err != nil {
			return err
		}
		defer n.Close(context.Background())
		for _, closed := range []bool{false, true} {
			ns, err := n.Claim(t.Context())
			if err != nil {
				return err
			}
			k, err := flow.Open(t.Context(), flow.Config{Netns: ns.Name})
			if err != nil {
				return err
			}
			defer k.Close()
			if _, err := k.Start(); err != nil {
				return err
			}
			if closed { // as by a kill
				if err := k.Close(); err != nil {
					return err
				}
			}
			if err := n.Release(ns.Name); closed != (err == nil) || !closed && !errors.Is(err, nat.ErrKept) {
				t.Errorf("its peer is gone: %t; release: %v", closed, err)
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

// TestDead: what is kept of a guest whose machine and peer are both gone can be given up.
func TestDead(t *testing.T) {
	s := newSites(t, "a")
	x := s.all["a"]
	if err := x.k.Drop(); !errors.Is(err, flow.ErrState) {
		t.Errorf("drop of a guest that runs: got error %v, want ErrState", err)
	}
	if err := x.k.Close(); err != nil {
		t.Fatal(err)
	}
	s.guest.Pause() // its tap is closed
	x.open()
	if got := x.k.State(); got != flow.Home {
		t.Fatalf("it is %s, want home", got)
	}
	if err := x.k.Drop(); err != nil || x.k.State() != flow.Vacant {
		t.Errorf("drop of a guest that is gone: %v, it is %s", err, x.k.State())
	}
}

// TestUndoRelayed: a move to an owner that is relayed for, which does not come about, changes nothing for its connections, then and later.
func TestUndoRelayed(t *testing.T) {
	s := newSites(t, "a", "b", "c")
	s.all["a"].deaf, s.all["c"].deaf = []string{"c"}, []string{"a"}
	s.forward("a")
	all := s.talks(t, 1)
	s.move("b")
	s.move("c")
	goOn(t, "relayed", all)
	a, c := s.all["a"].k, s.all["c"].k
	for range 2 {
		answer, err := a.Accept(c.Offer())
		if err != nil {
			t.Fatal(err)
		}
		goOn(t, "expected back", all)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		if err := c.Connect(ctx, answer); err == nil {
			t.Error("it has a way to a host that it does not reach")
		}
		cancel()
		if err := a.Discard(); err != nil {
			t.Fatal(err)
		}
		goOn(t, "after it did not come", all)
	}
	s.move("b")
	goOn(t, "at b", all)
	s.move("a")
	goOn(t, "at home", all)
}

// TestReturnToRelay: a guest that goes back to where its owner's connections are relayed has no need of where it was.
func TestReturnToRelay(t *testing.T) {
	s := newSites(t, "a", "x", "b", "c")
	for host, deaf := range map[string][]string{"a": {"b", "c"}, "b": {"a"}, "c": {"a", "x"}, "x": {"c"}} {
		s.all[host].deaf = deaf
	}
	s.forward("a")
	all := s.talks(t, 1)
	for _, to := range []string{"x", "b", "c", "b", "x", "a"} {
		s.move(to)
		goOn(t, "at "+to, all)
	}
}

// TestKilledDiverted: a source that has died when its guest was committed, and had not noted that it left, can have it back.
func TestKilledDiverted(t *testing.T) {
	s := newSites(t, "a", "b")
	s.forward("a")
	all := s.talks(t, 1)
	a, b := s.all["a"], s.all["b"]
	answer, err := b.k.Accept(a.k.Offer())
	if err != nil {
		t.Fatal(err)
	}
	if err := a.k.Connect(t.Context(), answer); err != nil {
		t.Fatal(err)
	}
	guest, err := s.guest.Open(b.ns.Name)
	if err != nil {
		t.Fatal(err)
	}
	if err := a.k.Divert(); err != nil {
		t.Fatal(err)
	}
	s.guest.Pause()
	if _, err := a.k.Hand(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := a.k.Close(); err != nil {
		t.Fatal(err)
	}
	if err := b.k.Arrive(); err != nil {
		t.Fatal(err)
	}
	s.guest.Resume(guest)
	s.at = b
	a.open()
	if got := a.k.State(); got != flow.Diverted {
		t.Fatalf("it is %s, want diverted", got)
	}
	goOn(t, "at b", all)
	s.move("a")
	goOn(t, "at home", all)
}
