package faults

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/drafter-vm/drafter/pkg/migrate"
)

// TestHistories lets three hosts move a guest to and fro while clients use it, with faults on the links, kills, power cuts and
// cancellations at random, and everything started again after each; and has the history of it checked.
func TestHistories(t *testing.T) {
	t.Parallel()
	var total, moved, blown int
	var longest time.Duration
	eachSeed(t, 40, 600, func(t *testing.T, seed uint64) {
		begun := time.Now()
		w := NewWorld(seed, newDir(t), "a", "b", "c")
		r := rand.New(rand.NewPCG(seed, 3))
		stop := w.startClients(t, seed, 3)
		for n := range 4 + r.IntN(6) {
			total++
			from := w.Runs()[0]
			others := w.others(from)
			to := others[r.IntN(len(others))]
			m, story, end := randomMigration(r, n, from, to)
			result := w.Move(from, to, m)
			end()
			if strings.Contains(story, ";") {
				blown++
			}
			if r.IntN(8) == 0 {
				story += ", then " + randomBlow(r, from, to)
			}
			if err := w.Recover(); err != nil {
				t.Errorf("%s: %v", story, err)
				break
			}
			if owner := w.check(t); owner == to {
				moved++
			}
			if t.Failed() || len(w.Wrong()) > 0 {
				t.Errorf("%d: %s: %v; records %v", n, story, result, w.records())
				break
			}
		}
		stop()
		w.Close()
		for _, wrong := range w.Wrong() {
			t.Error(wrong)
		}
		longest = max(longest, time.Since(begun))
		h := w.History()
		if err := h.Check(); err != nil {
			t.Error(err)
		}
		// The same with a second owner in it, for a moment: found in whatever history.
		planted, host := h.withSecondOwner(r)
		if err := planted.Check(); err == nil {
			t.Errorf("nothing was found in a history in which the guest ran on %s, too:%v", host, planted)
		}
	})
	t.Logf("%d migrations, %d of them with faults, %d moved the guest; the longest history took %v of fake time", total, blown, moved, longest)
	if *seed == 0 && *seeds == 0 && (total < 200 || moved < total/10 || blown < total/3) {
		t.Error("that is too little")
	}
}

// withSecondOwner is the history with another host that starts and stops the guest while one runs it. It returns the host.
func (h History) withSecondOwner(r *rand.Rand) (History, string) {
	var begins []int // where a guest starts
	for i, op := range h {
		if op.Input.(Event).Do == starts {
			begins = append(begins, i)
		}
	}
	first := begins[r.IntN(len(begins))]
	other := "a"
	if h[first].Input.(Event).Host == other {
		other = "b"
	}
	// Three times the time, so that there are instants between any two.
	out := slices.Clone(h)
	for i := range out {
		out[i].Call, out[i].Return = 3*out[i].Call, 3*out[i].Return
	}
	at := out[first].Return
	out.add(0, at+1, at+1, Event{Do: starts, Host: other})
	out.add(0, at+2, at+2, Event{Do: stops, Host: other})
	return out, other
}

// startClients starts clients, and returns what ends and awaits them.
func (w *World) startClients(t *testing.T, seed uint64, n int) (stop func()) {
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for id := 1; id <= n; id++ {
		wg.Go(func() { w.client(ctx, id, seed) })
	}
	return func() {
		cancel()
		wg.Wait()
	}
}

func (w *World) others(h *Host) (out []*Host) {
	for _, o := range w.Hosts {
		if o != h {
			out = append(out, o)
		}
	}
	return out
}

// moments are those at which something can happen to a side.
func moments() map[Direction][]string {
	out := map[Direction][]string{}
	for _, s := range States(migrate.SourceConnecting, migrate.SourceState.Next) {
		out[ToDestination] = append(out[ToDestination], "state "+s.String())
	}
	for _, s := range States(migrate.DestinationConnecting, migrate.DestinationState.Next) {
		out[ToSource] = append(out[ToSource], "state "+s.String())
	}
	for side, hooks := range map[Direction][]string{ToDestination: SourceHooks, ToSource: DestinationHooks} {
		for _, h := range hooks {
			out[side] = append(out[side], "before "+h, "after "+h)
		}
	}
	return out
}

// randomMigration is one with none, one or more things that go wrong. Story tells it; end is called after it.
func randomMigration(r *rand.Rand, n int, from, to *Host) (m Migration, story string, end func()) {
	m = Migration{ID: fmt.Sprintf("m%d.s%d", n, n), Mode: Modes()[r.IntN(int(numModes))], Streams: 1 + r.IntN(3), Reconnect: r.IntN(4) > 0, Restart: r.IntN(2) == 0}
	if m.Mode == Copying && r.IntN(2) == 0 {
		m.Mode = PostCopy
	}
	tale := []string{fmt.Sprintf("%v from %s to %s over %d streams, reconnect %t, restart %t", m.Mode, from, to, m.Streams, m.Reconnect, m.Restart)}
	var faults []Fault
	for range r.IntN(3) {
		f := Random(r, 2*m.Streams, map[Direction]int64{ToDestination: 800_000, ToSource: 600})
		faults = append(faults, f)
		tale = append(tale, f.String())
	}
	m.Link = NewLink(faults...)
	source, stopSource := context.WithCancel(context.Background())
	destination, stopDestination := context.WithCancel(context.Background())
	m.SourceCtx, m.DestinationCtx = source, destination
	all := moments()
	m.Source.At, m.Destination.At = map[string]func(){}, map[string]func(){}
	for range r.IntN(3) {
		side := Directions[r.IntN(2)]
		moment := all[side][r.IntN(len(all[side]))]
		b := blows[r.IntN(len(blows))]
		own, other, cancel, plan := from, to, stopSource, &m.Source
		if side == ToSource {
			own, other, cancel, plan = to, from, stopDestination, &m.Destination
		}
		var done atomic.Bool
		plan.At[moment] = func() {
			if done.CompareAndSwap(false, true) {
				b.strike(own, other, cancel, m.Link)
			}
		}
		tale = append(tale, fmt.Sprintf("%s of the %s: %s", moment, own, b.name))
	}
	return m, strings.Join(tale, "; "), func() { stopSource(); stopDestination() }
}

// randomBlow strikes at a host at rest.
func randomBlow(r *rand.Rand, hosts ...*Host) string {
	h := hosts[r.IntN(len(hosts))]
	b := blows[r.IntN(4)]
	b.strike(h, h, func() {}, NewLink())
	return fmt.Sprintf("%s: %s", h, b.name)
}

// TestHistoryFindsPlantedErrors shows that the checker of histories can fail.
func TestHistoryFindsPlantedErrors(t *testing.T) {
	at := func(call, end int64, e Event) func(*History) {
		return func(h *History) { h.add(0, call, end, e) }
	}
	for _, tt := range []struct {
		name string
		ok   bool
		ops  []func(*History)
	}{
		{"one owner after the other", true, []func(*History){at(1, 1, Event{Do: starts, Host: "a"}), at(2, 2, Event{Do: stops, Host: "a"}), at(3, 3, Event{Do: starts, Host: "b"})}},
		{"two owners", false, []func(*History){at(1, 1, Event{Do: starts, Host: "a"}), at(2, 2, Event{Do: starts, Host: "b"}), at(3, 3, Event{Do: stops, Host: "a"})}},
		{"a write and a read at once", true, []func(*History){at(1, 4, Event{Register: onDisk, Do: writes, Value: 7}), at(2, 3, Event{Register: onDisk, Do: reads, Value: 0}), at(5, 6, Event{Register: onDisk, Do: reads, Value: 7})}},
		{"a lost write", false, []func(*History){at(1, 2, Event{Register: onDisk, Do: writes, Value: 7}), at(3, 4, Event{Register: onDisk, Do: reads, Value: 0})}},
		{"a write that comes and goes", false, []func(*History){at(1, 9, Event{Register: onDisk, Do: writes, Value: 7}), at(2, 3, Event{Register: onDisk, Do: reads, Value: 7}), at(4, 5, Event{Register: onDisk, Do: reads, Value: 0})}},
		{"memory lost by a boot", true, []func(*History){at(1, 2, Event{Register: inMemory, Do: writes, Value: 7}), at(3, 3, Event{Do: boots}), at(4, 5, Event{Register: inMemory, Do: reads, Value: 0})}},
		{"memory lost without a boot", false, []func(*History){at(1, 2, Event{Register: inMemory, Do: writes, Value: 7}), at(4, 5, Event{Register: inMemory, Do: reads, Value: 0})}},
		{"disk lost by a boot", false, []func(*History){at(1, 2, Event{Register: onDisk, Do: writes, Value: 7}), at(3, 3, Event{Do: boots}), at(4, 5, Event{Register: onDisk, Do: reads, Value: 0})}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var h History
			for _, op := range tt.ops {
				op(&h)
			}
			if err := h.Check(); (err == nil) != tt.ok {
				t.Errorf("checked: %v", err)
			}
		})
	}
}

// TestPlantedErrors puts errors into a world, one at a time, and shows that each is found: by the history that clients saw where
// that can be, and by what the world and the guest check themselves.
func TestPlantedErrors(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name    string
		plant   Plant
		history bool // clients see it
		do      func(w *World, a, b *Host)
	}{
		{"a source in doubt runs its guest", Plant{}, true, func(w *World, a, b *Host) {
			link := NewLink(Fault{Kind: Cut, Direction: ToSource, At: Point{Frames: 29}})
			w.Move(a, b, Migration{ID: "m", Link: link, OnDestination: func(s migrate.DestinationState) {
				if s == migrate.DestinationRunning {
					link.Cut() // so that the source does not hear of it
				}
			}})
			_ = a.machine().run() // as a source would that believed in timeouts
			time.Sleep(100 * tick)
		}},
		{"a page that the tracker forgets", Plant{LosePage: 2}, false, func(w *World, a, b *Host) { w.Move(a, b, Migration{ID: "m"}) }},
		{"a page that arrives nowhere", Plant{LoseWrite: 1}, false, func(w *World, a, b *Host) { w.Move(a, b, Migration{ID: "m"}) }},
		{"a disk that does not flush", Plant{LoseFlush: true}, false, func(w *World, a, b *Host) {
			w.Move(a, b, Migration{ID: "m"})
			b.PowerCut()
			_ = w.Recover()
			time.Sleep(100 * tick)
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			// What was lost may have been written once more, in time. Not always.
			found, seen := false, false
			for seed := uint64(1); seed <= 10 && (!found || tt.history && !seen); seed++ {
				synctest.Test(t, func(t *testing.T) {
					w := NewWorld(seed, newDir(t), "a", "b")
					w.Plant = tt.plant
					stop := w.startClients(t, seed, 3)
					time.Sleep(100 * tick)
					tt.do(w, w.Hosts[0], w.Hosts[1])
					stop()
					var err error
					for _, h := range w.Hosts {
						if vm := h.machine(); vm != nil && vm.isRunning() {
							err = errors.Join(err, vm.verify())
						}
					}
					w.Close()
					if wrong := w.Wrong(); len(wrong) > 0 || err != nil {
						found = true
						t.Logf("seed %d found: %q, %v", seed, wrong[:min(2, len(wrong))], err)
					}
					if err := w.History().Check(); err != nil {
						seen = true
						t.Logf("history: %.200v", err)
					}
				})
			}
			if !found {
				t.Error("the error was not found")
			}
			if tt.history && !seen {
				t.Error("the error is not seen in the history")
			}
		})
	}
}
