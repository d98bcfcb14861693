package faults

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/drafter-vm/drafter/pkg/migrate"
	"github.com/drafter-vm/drafter/pkg/wire"
)

var errNo = errors.New("no")

// situation is a migration that comes through certain states. Each is tried with everything going wrong at each of its moments.
type situation struct {
	name   string
	modes  []Mode // nil: all
	faults []Fault
	plan   func(m *Migration)
}

// situations lead through every state there is: TestKill fails when one is missing.
var situations = []situation{
	{name: "plain", plan: func(m *Migration) {}},
	{name: "pause fails", plan: func(m *Migration) { m.Source.Fail = map[string]error{"pause": errNo} }},
	{name: "pause and resume fail", modes: []Mode{PreCopy}, plan: func(m *Migration) {
		m.Source.Fail = map[string]error{"pause": errNo, "resume": errNo}
	}},
	{name: "load fails", plan: func(m *Migration) { m.Destination.Fail = map[string]error{"load": errNo} }},
	{name: "run fails", modes: []Mode{PreCopy, PostCopy}, plan: func(m *Migration) { m.Destination.Fail = map[string]error{"run": errNo} }},
	{name: "run fails for certain", modes: []Mode{PreCopy, PostCopy}, plan: func(m *Migration) {
		m.Destination.Fail = map[string]error{"run": migrate.ErrNeverRan}
	}},
	{name: "source's record fails", modes: []Mode{PreCopy}, plan: func(m *Migration) { m.Source.Fail = map[string]error{"commit": errNo} }},
	{name: "destination's record fails", modes: []Mode{PreCopy, PostCopy}, plan: func(m *Migration) {
		m.Destination.Fail = map[string]error{"commit": errNo}
	}},
	{name: "cut before commit arrives", modes: []Mode{PreCopy, PostCopy}, faults: []Fault{{Kind: Cut, Direction: ToDestination, At: Point{Before: wire.TypeCommit}}},
		plan: func(m *Migration) { m.Reconnect = false }},
	{name: "cut before commit arrives, and they meet again", modes: []Mode{PreCopy, PostCopy}, faults: []Fault{{Kind: Cut, Direction: ToDestination, At: Point{Before: wire.TypeCommit}}},
		plan: func(m *Migration) {}},
	{name: "cut before it runs", modes: []Mode{PreCopy, PostCopy}, faults: []Fault{{Kind: Cut, Direction: ToSource, At: Point{Before: wire.TypeRunning}}},
		plan: func(m *Migration) { m.Reconnect = false }},
	{name: "cut before it runs, and they meet again", modes: []Mode{PreCopy, PostCopy}, faults: []Fault{{Kind: Cut, Direction: ToSource, At: Point{Before: wire.TypeRunning}}},
		plan: func(m *Migration) {}},
	{name: "cut while content is missing", modes: []Mode{PostCopy}, faults: []Fault{{Kind: Cut, Direction: ToDestination, At: Point{Before: wire.TypeServed}}},
		plan: func(m *Migration) { m.Reconnect = false }},
	{name: "cut while content is missing, and they meet again", modes: []Mode{PostCopy}, faults: []Fault{{Kind: Cut, Direction: ToDestination, At: Point{Before: wire.TypeServed}}},
		plan: func(m *Migration) {}},
	{name: "cut twice while content is missing", modes: []Mode{PostCopy}, faults: []Fault{
		{Kind: Cut, Direction: ToDestination, At: Point{Before: wire.TypeServed}}, {Kind: Cut, Stream: 1, Direction: ToSource, At: Point{Before: wire.TypeMissing}}},
		plan: func(m *Migration) {}},
	{name: "cut before it is settled", modes: []Mode{PostCopy}, faults: []Fault{{Kind: Cut, Direction: ToSource, At: Point{Before: wire.TypeSettled}}},
		plan: func(m *Migration) {}},
}

// blow is something that happens to one side at one moment.
type blow struct {
	name string
	// strike strikes at the process whose moment it is. cancel is of its context.
	strike func(own, other *Host, cancel context.CancelFunc, l *Link)
}

// quick is how many of the blows, the first, are also tried in the short run.
const quick = 3

var blows = []blow{
	{"its process is killed", func(own, _ *Host, _ context.CancelFunc, _ *Link) { own.KillProcess() }},
	{"its power is cut", func(own, _ *Host, _ context.CancelFunc, _ *Link) { own.PowerCut() }},
	{"it is canceled", func(_, _ *Host, cancel context.CancelFunc, _ *Link) { cancel() }},
	{"its machine is killed", func(own, _ *Host, _ context.CancelFunc, _ *Link) { own.KillVMM() }},
	{"the other's process is killed", func(_, other *Host, _ context.CancelFunc, _ *Link) { other.KillProcess() }},
	{"the other's power is cut", func(_, other *Host, _ context.CancelFunc, _ *Link) { other.PowerCut() }},
	{"both processes are killed", func(own, other *Host, _ context.CancelFunc, _ *Link) { own.KillProcess(); other.KillProcess() }},
	{"both powers are cut", func(own, other *Host, _ context.CancelFunc, _ *Link) { own.PowerCut(); other.PowerCut() }},
	{"the link is cut", func(_, _ *Host, _ context.CancelFunc, l *Link) { l.Cut() }},
}

// runsOnWithin is how long a guest that was paused and is still the source's may stand still because of a blow.
const runsOnWithin = time.Second

// ranOn are how long guests stood still, of those that did.
var ranOn durations

// durations are measured by several goroutines.
type durations struct {
	mu  sync.Mutex // guards all
	all []time.Duration
}

// add adds one that is not negative.
func (d *durations) add(x time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if x >= 0 {
		d.all = append(d.all, x)
	}
}

func (d *durations) String() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.all) == 0 {
		return "never"
	}
	slices.Sort(d.all)
	return fmt.Sprintf("%d times: %v in the median, %v at most", len(d.all), d.all[len(d.all)/2].Round(time.Millisecond), d.all[len(d.all)-1].Round(time.Millisecond))
}

// attempt runs a situation with a blow at a moment of a side ("" for none), has the world recover, and checks it. It returns the
// moments that each side came through.
func attempt(t *testing.T, s situation, mode Mode, side Direction, moment string, b blow) (moments map[Direction][]string) {
	moments = map[Direction][]string{}
	synctest.Test(t, func(t *testing.T) {
		w, from, to := begin(t, 1)
		m := Migration{ID: "m.s", Mode: mode, Reconnect: true, Restart: true, Link: NewLink(s.faults...)}
		s.plan(&m)
		source, stopSource := context.WithCancel(t.Context())
		defer stopSource()
		destination, stopDestination := context.WithCancel(t.Context())
		defer stopDestination()
		m.SourceCtx, m.DestinationCtx = source, destination
		var mu sync.Mutex // guards moments
		trace := func(d Direction) func(string) {
			return func(moment string) {
				mu.Lock()
				defer mu.Unlock()
				moments[d] = append(moments[d], moment)
			}
		}
		var (
			struck  time.Time // when the blow fell on a guest that was the source's; mu guards it, too
			process = from.Process()
		)
		m.Source.Trace, m.Destination.Trace = trace(ToDestination), trace(ToSource)
		if moment != "" {
			var fell atomic.Bool
			plan, own, other, cancel := &m.Source, from, to, stopSource
			if side == ToSource {
				plan, own, other, cancel = &m.Destination, to, from, stopDestination
			}
			plan.At = map[string]func(){moment: func() {
				if fell.CompareAndSwap(false, true) {
					if from.Record().Status == Running {
						mu.Lock()
						struck = time.Now()
						mu.Unlock()
					}
					b.strike(own, other, cancel, m.Link)
				}
			}}
		}
		r := w.Move(from, to, m)
		if !struck.IsZero() && from.Process() == process && from.runs() {
			// Whatever it was, the source ran on by itself: at once, and not when some time was over. In fake time this is exact.
			took := w.Since(from).Sub(struck)
			ranOn.add(took)
			if took > runsOnWithin {
				t.Errorf("the guest ran on at the source only after %v: %v", took, r)
			}
		}
		if err := w.Recover(); err != nil {
			t.Errorf("%v: %v; records %v", err, r, w.records())
			return
		}
		owner := w.check(t)
		if mode == Copying && owner != from {
			t.Errorf("after a copy the guest is on %v", owner)
		}
		if t.Failed() {
			t.Logf("the guest ended on %v: %v; records %v", owner, r, w.records())
		}
	})
	return moments
}

// TestKill kills each side, its machine, its host, the other, both, cancels it, or cuts the link, at every moment of every
// situation: in every state, and before and after every hook.
func TestKill(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("takes half a minute: left out with -short")
	}
	seen := map[Direction]map[string]bool{ToDestination: {}, ToSource: {}}
	tried, n := 0, 0
	for _, s := range situations {
		for _, mode := range Modes() {
			if s.modes != nil && !slices.Contains(s.modes, mode) {
				continue
			}
			t.Run(fmt.Sprintf("%s/%v", s.name, mode), func(t *testing.T) {
				moments := attempt(t, s, mode, ToDestination, "", blow{})
				for side, list := range moments {
					for _, moment := range list {
						seen[side][moment] = true
					}
				}
				if t.Failed() {
					return
				}
				for _, side := range Directions {
					for _, moment := range slices.Compact(slices.Sorted(slices.Values(moments[side]))) {
						n++
						for i, b := range blows {
							if !*long && (i != n%quick || !strings.HasPrefix(moment, "state ")) {
								continue // but one of the quick ones for each state, in turn
							}
							tried++
							attempt(t, s, mode, side, moment, b)
							if t.Failed() {
								who := map[Direction]string{ToDestination: "source", ToSource: "destination"}[side]
								t.Fatalf("%s: at %q of the %s: %s", s.name, moment, who, b.name)
							}
						}
					}
				}
			})
		}
	}
	t.Logf("%d attempts; moments: %d of the source, %d of the destination", tried, len(seen[ToDestination]), len(seen[ToSource]))
	t.Logf("the guest ran on at the source %v", &ranOn)
	if len(ranOn.all) < 10 {
		t.Error("a guest that stood still hardly ever ran on at the source, so that nothing was measured")
	}
	if tried < 100 {
		t.Errorf("only %d attempts were made", tried)
	}
	for _, s := range States(migrate.SourceConnecting, migrate.SourceState.Next) {
		if !seen[ToDestination]["state "+s.String()] {
			t.Errorf("no situation leads the source through state %q: add one to situations; they lead through %v", s, slices.Sorted(maps.Keys(seen[ToDestination])))
		}
	}
	for _, s := range States(migrate.DestinationConnecting, migrate.DestinationState.Next) {
		if !seen[ToSource]["state "+s.String()] {
			t.Errorf("no situation leads the destination through state %q: add one to situations; they lead through %v", s, slices.Sorted(maps.Keys(seen[ToSource])))
		}
	}
	for side, hooks := range map[Direction][]string{ToDestination: SourceHooks, ToSource: DestinationHooks} {
		for _, h := range hooks {
			if !seen[side]["before "+h] {
				t.Errorf("no situation leads %v through hook %q", side, h)
			}
		}
	}
}
