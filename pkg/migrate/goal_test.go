package migrate

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"net"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/wire"
)

const mib = 1 << 20

// sent makes rounds of so many MiB that follow each other, at 100 MiB/s.
func sent(mibs ...int64) (out []Round) {
	at := time.Duration(0)
	for i, n := range mibs {
		d := time.Duration(n) * 10 * time.Millisecond
		out = append(out, Round{Index: i, Start: Millis(at), Blocks: n * 256, Bytes: n * mib, Duration: Millis(d)})
		at += d
	}
	return out
}

// spent is when the last of the rounds ended.
func spent(rounds []Round) time.Duration {
	last := rounds[len(rounds)-1]
	return time.Duration(last.Start + last.Duration)
}

func TestDecide(t *testing.T) {
	kib := func(n int64) Dirty { return Dirty{Blocks: n / 4, Bytes: n << 10} }
	memory := func(dirty Dirty, mibs ...int64) History {
		return History{Device: "memory", Size: 1 << 30, Policy: Policy{ByGoal: true}, Rounds: sent(mibs...), Dirty: dirty}
	}
	held := func(h History, share float64) History {
		h.Rounds[len(h.Rounds)-1].Throttle = share
		return h
	}
	with := func(h History, p Policy) History {
		h.Policy = p
		return h
	}
	disk := func(p Policy, dirty Dirty, mibs ...int64) History {
		return History{Device: "disk", Size: 1 << 30, Policy: p, Rounds: sent(mibs...), Dirty: dirty}
	}
	list := func(h ...History) []History { return h }
	stated := Goal{MaxDowntime: 50 * time.Millisecond} // 40 ms for content: 4 MiB here
	lively := kib(40 << 10)                            // 400 ms of content
	for _, tt := range []struct {
		name    string
		goal    Goal
		elapsed time.Duration // 0: right after the last round
		devices []History
		want    Action
		again   []int
		reason  string
		share   float64
		wait    time.Duration
	}{
		{name: "no devices", devices: list(), want: Switch, reason: "nothing is dirty"},
		{name: "the first copy, of all", devices: list(memory(Dirty{}), disk(Policy{CycleThrottle: time.Hour}, Dirty{})), want: Continue, again: []int{0, 1}, reason: "the first copy"},
		{name: "pre-copy disabled", devices: list(disk(Policy{}, Dirty{})), want: Continue, again: []int{0}},
		{name: "pre-copy disabled, copied", devices: list(disk(Policy{}, lively, 1000)), want: Switch, reason: `device "disk": 0 cycles are the maximum`},
		{name: "pre-copy disabled, post-copy", goal: Goal{PostCopy: true}, elapsed: 1, devices: list(disk(Policy{}, Dirty{}), memory(Dirty{}, 0)), want: PostCopy, reason: `device "disk": pre-copy is disabled`},
		{name: "pre-copy disabled for one", goal: Goal{PostCopy: true}, devices: list(disk(Policy{}, Dirty{}), memory(Dirty{})), want: Continue, again: []int{1}},
		{name: "pre-copy disabled for one, the other is ready", goal: Goal{PostCopy: true}, devices: list(disk(Policy{}, Dirty{}), memory(kib(4), 1000)), want: PostCopy, reason: "the rest needs 40µs of 10ms"},
		{name: "clean", devices: list(memory(Dirty{}, 1000)), want: Switch, reason: "nothing is dirty"},
		{name: "clean does not wait", devices: list(with(memory(Dirty{}, 1000), Policy{ByGoal: true, MinCycles: 5, CycleThrottle: time.Hour})), want: Switch},

		{name: "fits", devices: list(memory(kib(1024), 1000)), want: Switch, reason: "the rest needs 10ms of 10ms"},
		{name: "does not fit", devices: list(memory(kib(1028), 1000)), want: Continue, again: []int{0}, reason: "the rest needs 10.04ms, more than 10ms"},
		{name: "fits what is stated", goal: stated, devices: list(memory(kib(4096), 1000)), want: Switch},
		{name: "content gets a quarter", goal: Goal{MaxDowntime: 8 * time.Millisecond}, devices: list(memory(kib(200), 1000)), want: Switch, reason: "of 2ms"},
		{name: "fits, with the round trip", goal: Goal{RoundTrip: 2 * time.Millisecond}, devices: list(memory(kib(716), 1000)), want: Switch, reason: "of 7ms"},
		{name: "does not fit, for the round trip", goal: Goal{RoundTrip: 2 * time.Millisecond}, devices: list(memory(kib(720), 1000)), want: Continue, again: []int{0}, reason: "the rest needs 7.03ms, more than 7ms"},
		{name: "does not fit, for the round trip, post-copy", goal: Goal{RoundTrip: 2 * time.Millisecond, PostCopy: true}, devices: list(memory(kib(720), 1000, 1)), want: PostCopy},
		{name: "content gets a quarter, however far it is", goal: Goal{RoundTrip: time.Second}, devices: list(memory(kib(512), 1000)), want: Switch, reason: "of 5ms"},
		{name: "too late, for the round trip", goal: Goal{MaxTotalTime: 10480 * time.Millisecond, MaxDowntime: time.Millisecond, RoundTrip: 50 * time.Millisecond}, devices: list(memory(lively, 1000)), want: GiveUp, reason: "the rest needs 485ms"},
		{name: "fits, post-copy allowed", goal: Goal{PostCopy: true}, devices: list(memory(kib(1024), 1000)), want: Switch},
		{name: "bandwidth unknown", devices: list(memory(kib(4), 0)), want: Continue, again: []int{0}, reason: "not known"},
		{name: "bandwidth unknown, post-copy", goal: Goal{PostCopy: true}, devices: list(memory(kib(4), 0)), want: Continue, again: []int{0}},
		{name: "only dirty ones again", devices: list(memory(Dirty{}, 1000), disk(Policy{ByGoal: true}, kib(8192), 1000)), want: Continue, again: []int{1}},
		{name: "the dirty of all counts", devices: list(memory(kib(800), 1000), disk(Policy{ByGoal: true}, kib(800), 1000)), want: Switch, reason: "needs 7.81ms"}, // at twice the bandwidth
		{name: "minimum", devices: list(with(memory(kib(4), 1000), Policy{ByGoal: true, MinCycles: 2})), want: Continue, again: []int{0}, reason: `device "memory": 0 of 2 cycles done`},
		{name: "maximum", devices: list(with(memory(lively, 1000, 500), Policy{ByGoal: true, MaxCycles: 1})), want: Switch, reason: "the most cycles"},
		{name: "wait", devices: list(with(memory(lively, 1000), Policy{ByGoal: true, CycleThrottle: time.Second})), want: Continue, again: []int{0}, wait: time.Second},
		{name: "no wait before the first copy", devices: list(with(memory(Dirty{}), Policy{CycleThrottle: time.Second})), want: Continue, again: []int{0}},
		{name: "no longer than there is time", goal: Goal{MaxTotalTime: 11 * time.Second, MaxDowntime: time.Millisecond}, devices: list(with(memory(lively, 1000), Policy{ByGoal: true, CycleThrottle: time.Minute})), want: Continue, again: []int{0}, wait: 590 * time.Millisecond},

		{name: "not less", devices: list(memory(lively, 1000, 42)), want: Continue, again: []int{0}},
		{name: "not less, twice", devices: list(memory(lively, 1000, 50, 42)), want: Continue, again: []int{0}, reason: "more than 10ms"},
		{name: "in vain", devices: list(memory(kib(29<<10), 1000, 28, 29)), want: Switch, reason: "cycles no longer make it less, the rest needs 290ms"},
		{name: "in vain once", devices: list(memory(kib(29<<10), 1000, 50, 29)), want: Continue, again: []int{0}},
		{name: "in vain, tolerated rather than throttled", goal: Goal{Throttle: true}, devices: list(memory(kib(29<<10), 1000, 28, 29)), want: Switch},
		{name: "in vain, throttled", goal: Goal{Throttle: true}, devices: list(memory(lively, 1000, 40, 40)), want: Throttle, again: []int{0}, share: 0.2, reason: "held back for 20 %"},
		{name: "in vain, nothing helps", devices: list(memory(lively, 1000, 40, 40)), want: Switch},
		{name: "stated, in vain, waiting for a lull", goal: stated, devices: list(memory(lively, 1000, 40, 40)), want: Continue, again: []int{0}, wait: time.Second, reason: "waiting"},
		{name: "stated, given up", goal: stated, devices: list(memory(lively, append([]int64{1000}, make40s(31)...)...)), want: GiveUp, reason: "30 cycles did not make it less: the rest needs 400ms, more than 40ms"},
		{name: "stated, throttled", goal: Goal{MaxDowntime: 50 * time.Millisecond, Throttle: true}, devices: list(memory(kib(29<<10), 1000, 28, 29)), want: Throttle, again: []int{0}, share: 0.2},
		{name: "throttled more", goal: Goal{Throttle: true}, devices: list(held(memory(lively, 1000, 40), 0.2)), want: Throttle, again: []int{0}, share: 0.3},
		{name: "throttled most", goal: Goal{Throttle: true}, devices: list(held(memory(lively, 1000, 40), 0.9)), want: Throttle, again: []int{0}, share: 0.99},
		{name: "throttled enough", goal: Goal{Throttle: true}, devices: list(held(memory(lively, 1000, 80), 0.3)), want: Continue, again: []int{0}, share: 0.3},
		{name: "throttled most, in vain", goal: Goal{MaxDowntime: 50 * time.Millisecond, Throttle: true}, devices: list(held(memory(lively, 1000, 40, 40), 0.99)), want: GiveUp, reason: "held back for 99 %"},
		{name: "throttled most, in vain, none stated", goal: Goal{Throttle: true}, devices: list(held(memory(lively, 1000, 40, 40), 0.99)), want: Switch, share: 0.99},

		{name: "post-copy: a cycle halves it", goal: Goal{PostCopy: true}, devices: list(memory(lively, 1000, 80)), want: Continue, again: []int{0}},
		{name: "post-copy: a cycle would not halve it", goal: Goal{PostCopy: true}, devices: list(memory(lively, 1000, 79)), want: PostCopy, reason: "79.0 MiB were sent and 40.0 MiB are dirty again"},
		{name: "post-copy: faster than the link from the start", goal: Goal{PostCopy: true}, devices: list(memory(kib(900<<10), 1000)), want: PostCopy},

		{name: "time is over", goal: Goal{MaxTotalTime: 10 * time.Second}, devices: list(memory(lively, 1000)), want: GiveUp, reason: "the 10s of a migration are over, and 40.0 MiB are still dirty"},
		{name: "time is over in the first copy", goal: Goal{MaxTotalTime: time.Second}, elapsed: time.Second, devices: list(memory(Dirty{})), want: GiveUp, reason: "1.00 GiB"},
		{name: "time is over, but it fits", goal: Goal{MaxTotalTime: 10 * time.Second}, devices: list(with(memory(kib(4), 1000), Policy{MinCycles: 5, MaxCycles: 9})), want: Switch},
		{name: "time is over, post-copy", goal: Goal{MaxTotalTime: 10 * time.Second, PostCopy: true}, devices: list(memory(lively, 1000)), want: PostCopy, reason: "10s"},
		{name: "time is over in the first copy, post-copy", goal: Goal{MaxTotalTime: time.Second, PostCopy: true}, elapsed: time.Second, devices: list(memory(Dirty{})), want: PostCopy},
		{name: "time is over, but for what cannot come later", goal: Goal{MaxTotalTime: time.Second, PostCopy: true}, elapsed: time.Second,
			devices: list(memory(Dirty{}), History{Device: "kernel", Size: 4096, Whole: true, Policy: Policy{ByGoal: true}}), want: Continue, again: []int{1}, reason: "cannot be sent later"},
		{name: "time for the rest, post-copy", goal: Goal{MaxTotalTime: 10410 * time.Millisecond, PostCopy: true}, devices: list(memory(lively, 1000)), want: PostCopy, reason: "the rest needs the 410ms that are left of 10.41s"},
		{name: "time for more, post-copy", goal: Goal{MaxTotalTime: 11 * time.Second, PostCopy: true}, devices: list(memory(lively, 1000)), want: Continue, again: []int{0}},
		{name: "too late", goal: Goal{MaxTotalTime: 10200 * time.Millisecond}, devices: list(memory(lively, 1000)), want: GiveUp, reason: "the rest needs 410ms, and 200ms are left of 10.2s"},
		{name: "the last chance", goal: Goal{MaxTotalTime: 10420 * time.Millisecond}, devices: list(memory(lively, 1000)), want: Switch, reason: "420ms are left of 10.42s, not enough for another cycle"},
		{name: "no last chance when a downtime is stated", goal: Goal{MaxTotalTime: 10420 * time.Millisecond, MaxDowntime: time.Millisecond}, devices: list(memory(lively, 1000)), want: Continue, again: []int{0}},

		{name: "fixed numbers want more", devices: list(disk(Policy{MaxDirtyBlocks: 10, MaxCycles: 5}, kib(44), 1000), memory(kib(4), 1000)), want: Continue, again: []int{0}, reason: `device "disk": 11 dirty blocks are more than 10`},
		{name: "fixed numbers have enough", devices: list(disk(Policy{MaxDirtyBlocks: 1 << 20, MaxCycles: 5}, lively, 1000), memory(kib(4), 1000)), want: Switch},
		{name: "fixed numbers have enough, post-copy", goal: Goal{PostCopy: true}, devices: list(disk(Policy{MaxDirtyBlocks: 1 << 20, MaxCycles: 5}, lively, 1000)), want: PostCopy, reason: "10240 dirty blocks are at most"},
		{name: "both want more", devices: list(disk(Policy{MaxCycles: 5, CycleThrottle: time.Minute}, lively, 1000), memory(lively, 1000)), want: Continue, again: []int{0, 1}, wait: time.Minute},
		{name: "fixed numbers want more, others are in vain", goal: Goal{PostCopy: true}, devices: list(disk(Policy{MaxCycles: 5}, lively, 1000), memory(lively, 1000, 40)), want: Continue, again: []int{0}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.elapsed == 0 {
				for _, h := range tt.devices {
					if len(h.Rounds) > 0 {
						tt.elapsed = max(tt.elapsed, spent(h.Rounds))
					}
				}
			}
			for i := range tt.devices {
				var err error
				if tt.devices[i].Policy, err = tt.devices[i].Policy.check(); err != nil {
					t.Fatal(err)
				}
			}
			got := Decide(tt.goal, tt.elapsed, tt.devices)
			if got.Action != tt.want || !reflect.DeepEqual(got.Again, tt.again) || got.Share != tt.share || time.Duration(got.Wait) != tt.wait {
				t.Errorf("got %v of %v, throttle %v, wait %v (%s); want %v of %v, throttle %v, wait %v",
					got.Action, got.Again, got.Share, got.Wait, got.Reason, tt.want, tt.again, tt.share, tt.wait)
			}
			if got.Reason == "" || !strings.Contains(got.Reason, tt.reason) {
				t.Errorf("reason %q, want %q", got.Reason, tt.reason)
			}
			if len(got.Reasons) != len(tt.devices) {
				t.Errorf("reasons of devices: %q", got.Reasons)
			}
		})
	}
}

func make40s(n int) []int64 {
	out := make([]int64, n)
	for i := range out {
		out[i] = 40
	}
	return out
}

func TestEstimate(t *testing.T) {
	rounds := sent(1000, 100)
	h := History{Size: 1 << 30, Policy: Policy{ByGoal: true}, Rounds: rounds, Dirty: Dirty{Bytes: 50 * mib}}
	got := Decide(Goal{}, spent(rounds), []History{h}).Estimate
	want := Estimate{Rest: 50 * mib, Bandwidth: 100 * mib, DirtyRate: 50 * mib, Downtime: Millis(510 * time.Millisecond), Remaining: Millis(1010 * time.Millisecond)}
	if got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	got = Decide(Goal{RoundTrip: 20 * time.Millisecond}, spent(rounds), []History{h}).Estimate
	want.RoundTrip, want.Downtime, want.Remaining = Millis(20*time.Millisecond), Millis(540*time.Millisecond), Millis(1040*time.Millisecond)
	if got != want {
		t.Errorf("with a round trip: got %+v, want %+v", got, want)
	}
	h.Dirty.Bytes = 95 * mib
	if got := Decide(Goal{}, spent(rounds), []History{h}).Remaining; got != 0 {
		t.Errorf("%v remain of what does not converge, want unknown", got)
	}
	if got := Decide(Goal{PostCopy: true}, spent(rounds), []History{h}).Remaining; got != Millis(960*time.Millisecond) {
		t.Errorf("%v remain with post-copy, want the time to send the rest once", got)
	}
	// Recent rounds tell the bandwidth, whatever it was before.
	slow := append(sent(1000), Round{Index: 1, Start: Millis(10 * time.Second), Bytes: 20 * mib, Duration: Millis(2 * time.Second)})
	if got := Decide(Goal{}, 12*time.Second, []History{{Policy: Policy{ByGoal: true}, Rounds: slow}}).Bandwidth; got != 10*mib {
		t.Errorf("bandwidth %v, want that of the last round", got)
	}
	if got := Decide(Goal{}, 0, []History{{Size: 5}}).Estimate; got != (Estimate{Rest: 5}) {
		t.Errorf("before the first round: %+v", got)
	}
}

func TestGoalCheck(t *testing.T) {
	for _, g := range []Goal{{}, {MaxDowntime: time.Second, MaxTotalTime: time.Second}, {MaxDowntime: time.Hour}} {
		if err := g.Check(); err != nil {
			t.Errorf("%+v: %v", g, err)
		}
	}
	for want, g := range map[string]Goal{
		"downtime of -1s": {MaxDowntime: -time.Second}, "total time of -1s": {MaxTotalTime: -time.Second}, "overhead of -1s": {Overhead: -time.Second}, "round trip of -1s": {RoundTrip: -time.Second},
		"raise the total time": {MaxDowntime: 2 * time.Second, MaxTotalTime: time.Second},
	} {
		if err := g.Check(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v, want %q", g, err, want)
		}
	}
}

func TestActionText(t *testing.T) {
	for a := Continue; a <= GiveUp; a++ {
		b, err := json.Marshal(Decision{Action: a})
		if err != nil {
			t.Fatal(err)
		}
		var back Decision
		if err := json.Unmarshal(b, &back); err != nil || back.Action != a {
			t.Errorf("%s: %v, %v", b, back.Action, err)
		}
	}
	if err := new(Action).UnmarshalText([]byte("dance")); err == nil {
		t.Error("no error")
	}
}

// model is a model of a guest that writes while it is copied over a link. The guest writes rate bytes a second to random
// places of set bytes; in bursts, for the first half of each period, as many times as fast.
type model struct {
	goal      Goal
	size, set float64 // bytes
	rate      float64 // bytes/s
	burst     float64 // factor; 0: none
	period    time.Duration
	bandwidth float64 // bytes/s
	latency   time.Duration
	policy    Policy
}

// modelEnd is how a migration of a model ended.
type modelEnd struct {
	action   Action
	total    time.Duration // until the guest runs there, or the end
	downtime time.Duration // to send the rest, if it was sent while paused
	cycles   int
	share    float64
	reason   string
}

// run migrates. It fails the test if that does not end.
func (w model) run(t *testing.T) modelEnd {
	t.Helper()
	policy, err := w.policy.check()
	if err != nil {
		t.Fatal(err)
	}
	h := History{Device: "memory", Size: int64(w.size), Policy: policy}
	var now time.Duration
	var dirty, share float64
	pass := func(d time.Duration) {
		const steps = 40
		for range steps {
			rate := w.rate * (1 - share)
			if w.burst > 0 && now%w.period < w.period/2 {
				rate *= w.burst
			}
			// Of what is written, a part hits what is dirty already.
			step := (d / steps).Seconds()
			dirty = min(dirty+rate*step*(1-dirty/w.set), w.set)
			now += d / steps
		}
	}
	for n := 0; ; n++ {
		h.Dirty = Dirty{Bytes: int64(dirty) &^ 4095, Blocks: int64(dirty) / 4096}
		d := Decide(w.goal, now, []History{h})
		if n > 5_000 {
			t.Fatalf("%+v: no end after %d decisions: %+v", w, n, d)
		}
		end := modelEnd{action: d.Action, total: now, cycles: n - 1, share: share, reason: d.Reason}
		rest := float64(h.Dirty.Bytes)
		if n == 0 {
			rest = w.size
		}
		switch d.Action {
		case Switch:
			end.downtime = time.Duration(rest/w.bandwidth*1e9) + w.latency
			end.total += end.downtime
			return end
		case PostCopy, GiveUp:
			return end
		case Throttle:
			if d.Share <= share || d.Share > 0.99 {
				t.Fatalf("%+v: throttle from %v to %v", w, share, d.Share)
			}
		}
		share = d.Share
		if d.Wait > 0 {
			pass(time.Duration(d.Wait))
			rest = float64(int64(dirty) &^ 4095)
		}
		round := Round{Index: n, Start: Millis(now), Bytes: int64(rest), Blocks: int64(rest) / 4096, Throttle: share}
		dirty = 0
		d2 := time.Duration(rest/w.bandwidth*1e9) + w.latency
		pass(d2)
		round.Duration = Millis(d2)
		h.Rounds = append(h.Rounds, round)
	}
}

// Guests of all kinds end in time.
func TestDecideEnds(t *testing.T) {
	const (
		mb = 1e6
		gb = 1e9
	)
	ms, s := time.Millisecond, time.Second
	goals := map[string]Goal{
		"nothing stated":     {},
		"throttle":           {Throttle: true},
		"post-copy":          {PostCopy: true},
		"downtime":           {MaxDowntime: 50 * ms},
		"downtime, throttle": {MaxDowntime: 50 * ms, Throttle: true},
		"time":               {MaxTotalTime: 20 * s},
		"time, post-copy":    {MaxTotalTime: 20 * s, PostCopy: true},
		"both":               {MaxDowntime: 50 * ms, MaxTotalTime: 20 * s},
		"both, throttle":     {MaxDowntime: 50 * ms, MaxTotalTime: 20 * s, Throttle: true},
		"both, post-copy":    {MaxDowntime: 50 * ms, MaxTotalTime: 20 * s, PostCopy: true},
	}
	worlds := []struct {
		name string
		model
		cycles int // at most, where nothing limits the time
		easy   bool
	}{
		{"idle", model{size: gb, set: gb, bandwidth: gb, latency: ms}, 0, true},
		{"tiny", model{size: 4096, set: 4096, rate: 100 * mb, bandwidth: gb, latency: ms}, 0, true},
		{"slow writer", model{size: gb, set: gb, rate: 50 * mb, bandwidth: gb, latency: ms}, 3, true},
		{"lively writer", model{size: gb, set: gb / 2, rate: 400 * mb, bandwidth: gb, latency: ms}, 10, true},
		{"hot spot", model{size: gb, set: 5 * mb, rate: 10 * gb, bandwidth: gb, latency: ms}, 0, true},
		{"as fast as the link", model{size: gb, set: gb, rate: gb, bandwidth: gb, latency: ms}, 90, false},
		{"ten times as fast", model{size: gb, set: gb / 2, rate: 10 * gb, bandwidth: gb, latency: ms}, 90, false},
		{"a hundred times as fast", model{size: gb, set: gb / 2, rate: 100 * gb, bandwidth: gb, latency: ms}, 90, false},
		{"bursts", model{size: 4 * gb, set: gb, rate: 20 * mb, burst: 100, period: 3 * s, bandwidth: gb, latency: ms}, 90, false},
		{"far away", model{size: gb, set: gb / 4, rate: 10 * mb, bandwidth: 100 * mb, latency: 100 * ms}, 90, false},
		{"thin link", model{size: gb, set: gb / 4, rate: mb, bandwidth: 2 * mb, latency: 20 * ms}, 90, false},
		{"large", model{size: 512 * gb, set: 64 * gb, rate: 3 * gb, bandwidth: 10 * gb, latency: ms}, 90, false},
	}
	for _, w := range worlds {
		for name, goal := range goals {
			t.Run(w.name+"/"+name, func(t *testing.T) {
				w.goal, w.policy = goal, Policy{ByGoal: true}
				got := w.run(t)
				t.Logf("%v after %v: %d cycles, downtime %v, throttle %v: %s", got.action, round(got.total), got.cycles, round(got.downtime), got.share, got.reason)
				copied := time.Duration(w.size / w.bandwidth * 1e9)
				switch {
				case got.action == GiveUp && (goal.PostCopy || goal.MaxDowntime == 0 && goal.MaxTotalTime == 0):
					t.Error("given up without need")
				case got.action == PostCopy && !goal.PostCopy || got.share > 0 && !goal.Throttle:
					t.Error("used what it must not")
				case w.easy && got.action != Switch:
					t.Error("an easy guest has not moved by pre-copy")
				case w.easy && got.downtime > max(goal.MaxDowntime, 20*ms):
					t.Error("an easy guest stood still for too long")
				case got.action == Switch && (goal.MaxDowntime > 0 || goal.PostCopy) && got.downtime > goal.budget()+w.latency+goal.budget()/5:
					t.Errorf("content took %v of %v", got.downtime, goal.budget())
				case goal.MaxTotalTime == 0 && got.cycles > w.cycles:
					t.Errorf("too many cycles")
				case goal.PostCopy && got.cycles > 30:
					t.Errorf("cycles that gain nothing")
				case goal.MaxTotalTime > 0 && got.action == Switch && got.total > goal.MaxTotalTime+max(goal.MaxDowntime, 20*ms)+w.latency:
					t.Errorf("too late")
				case goal.MaxTotalTime > 0 && got.total > max(goal.MaxTotalTime, copied)+s: // a round that is under way is the engine's to cut
					t.Errorf("too late")
				}
			})
		}
	}
}

// Whatever the guest, the link and the goal, Decide ends.
func TestDecideAlwaysEnds(t *testing.T) {
	r := rand.New(rand.NewPCG(7, 11))
	any := func(low, high float64) float64 { // with all magnitudes as likely
		return low * math.Pow(high/low, r.Float64())
	}
	maybe := func(d time.Duration) time.Duration {
		if r.IntN(2) == 0 {
			return 0
		}
		return d
	}
	n := 3000
	if testing.Short() {
		n = 300
	}
	ends := map[Action]int{}
	for range n {
		w := model{
			size: any(4096, 1e12), rate: any(1, 1e12), bandwidth: any(1e3, 1e11), latency: time.Duration(any(1e3, 1e9)),
			goal: Goal{
				MaxDowntime: maybe(time.Duration(any(1e3, 1e9))), PostCopy: r.IntN(3) == 0, Throttle: r.IntN(2) == 0,
			},
			policy: Policy{ByGoal: r.IntN(4) > 0, MaxDirtyBlocks: int64(any(1, 1e6)), MinCycles: r.IntN(3), MaxCycles: 3 + r.IntN(30), CycleThrottle: maybe(time.Duration(any(1e3, 1e10)))},
		}
		if w.policy.ByGoal {
			w.policy.MaxCycles *= r.IntN(2)
		}
		w.set = any(4096, w.size)
		if r.IntN(3) == 0 {
			w.burst, w.period = any(1, 1e4), time.Duration(any(1e6, 1e11))
		}
		if r.IntN(2) == 0 {
			w.goal.MaxTotalTime = w.goal.MaxDowntime + time.Duration(any(1e6, 1e12))
		}
		got := w.run(t)
		ends[got.action]++
		if got.reason == "" || got.action == PostCopy && !w.goal.PostCopy || got.action == GiveUp && w.goal.PostCopy {
			t.Errorf("%+v: %+v", w, got)
		}
	}
	t.Log(ends)
	for _, a := range []Action{Switch, PostCopy, GiveUp} {
		if ends[a] == 0 && !testing.Short() {
			t.Errorf("no migration ended with %v: the worlds are too much alike", a)
		}
	}
}

// slowable is a guest that can be slowed down.
type slowable struct {
	*guest
	shares []float64
}

func (g *slowable) Throttle(_ context.Context, share float64) error {
	g.shares = append(g.shares, share)
	return nil
}

func (g *slowable) Pause(ctx context.Context) error {
	if n := len(g.shares); n > 0 && g.shares[n-1] != 0 {
		return fmt.Errorf("it is held back for %v of its time, and would be while nothing may hold up what is left", g.shares[n-1])
	}
	return g.guest.Pause(ctx)
}

// busy is a tracker that reports a MiB as written, until the guest is held back for a share of its time.
type busy struct {
	guest *slowable
	until float64
}

func (b *busy) Start(context.Context) error { return nil }
func (b *busy) Stop() error                 { return nil }
func (b *busy) Collect(context.Context) ([]block.Range, error) {
	if n := len(b.guest.shares); n > 0 && slices.Max(b.guest.shares) >= b.until {
		return []block.Range{{Length: 4096}}, nil
	}
	return []block.Range{{Length: 1 << 20}}, nil
}

// paced is a stream that takes its time to write.
type paced struct {
	net.Conn
	rate float64 // bytes/s
}

func (p *paced) Write(b []byte) (int, error) {
	time.Sleep(time.Duration(float64(len(b)) / p.rate * 1e9))
	return p.Conn.Write(b)
}

// Send does what is decided.
func TestSendByGoal(t *testing.T) {
	for _, tt := range []struct {
		name   string
		goal   Goal
		rate   float64 // bytes/s of the link
		until  float64 // the guest writes less when it is held back for this share
		fixed  bool    // the guest cannot be slowed down
		shares []float64
		err    string // of the destination too
		after  time.Duration
	}{
		{name: "throttled", goal: Goal{MaxDowntime: 50 * time.Millisecond, Throttle: true}, until: 0.4, shares: []float64{0.2, 0.3, 0.4, 0}},
		{name: "throttled and given up", goal: Goal{MaxDowntime: 50 * time.Millisecond, Throttle: true}, until: 1, shares: append(slices.Clone(shares), 0), err: "held back for 99 %"},
		{name: "given up", goal: Goal{MaxDowntime: 50 * time.Millisecond}, until: 1, err: "cycles did not make it less"},
		{name: "cannot be throttled", goal: Goal{MaxDowntime: 50 * time.Millisecond, Throttle: true}, fixed: true, until: 1, err: "cycles did not make it less"},
		{name: "out of time", goal: Goal{MaxDowntime: 50 * time.Millisecond, MaxTotalTime: 5 * time.Second}, until: 1, err: "of 5s"},
		{name: "out of time in the first round", goal: Goal{MaxTotalTime: 5 * time.Second}, rate: 100 << 10, until: 1, err: "the 5s of a migration are over", after: 5 * time.Second},
		{name: "nothing stated", until: 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(nil)
				g := &slowable{guest: r.guest}
				if r.source.Guest = g; tt.fixed {
					r.source.Guest = r.guest
				}
				mem := block.NewMemory(2 << 20)
				if _, err := mem.WriteAt(bytes.Repeat([]byte("guest"), 400_000), 0); err != nil {
					t.Fatal(err)
				}
				r.source.Goal = tt.goal
				r.source.Devices = []SourceDevice{{Name: "memory", Device: mem, Tracker: &busy{g, tt.until}, Policy: Policy{ByGoal: true}}}
				r.target.sizes["memory"] = mem.Size()
				if tt.rate == 0 {
					tt.rate = 10 << 20
				}
				a, b := pipes(1)
				a[0] = &paced{a[0].(net.Conn), tt.rate}
				o := r.move(t.Context(), a, b)
				defer r.stop()
				if !slices.Equal(g.shares, tt.shares) {
					t.Errorf("throttled by %v, want %v", g.shares, tt.shares)
				}
				last := o.src.Decisions[len(o.src.Decisions)-1]
				if tt.err == "" {
					if o.srcErr != nil || o.dstErr != nil || last.Action != Switch {
						t.Errorf("errors %v, %v; last decision %+v", o.srcErr, o.dstErr, last)
					}
					return
				}
				var peer *PeerError
				if !errors.Is(o.srcErr, ErrGaveUp) || !strings.Contains(o.srcErr.Error(), tt.err) || o.src.Outcome != "kept" || !r.world.runs("source") {
					t.Errorf("error %v, outcome %s, runs here: %t", o.srcErr, o.src.Outcome, r.world.runs("source"))
				}
				if !errors.As(o.dstErr, &peer) || peer.Code != wire.CodeCanceled || !strings.Contains(peer.Reason, tt.err) {
					t.Errorf("the destination was told %v", o.dstErr)
				}
				if total := time.Duration(o.src.Total); tt.goal.MaxTotalTime > 0 && total > tt.goal.MaxTotalTime+time.Second || total < tt.after {
					t.Errorf("took %v", total)
				}
			})
		})
	}
}

func ExampleDecide() {
	history := []History{{
		Device: "memory", Size: 1 << 30, Policy: Policy{ByGoal: true},
		Rounds: []Round{{Bytes: 1 << 30, Duration: Millis(time.Second)}},
		Dirty:  Dirty{Blocks: 25600, Bytes: 100 << 20},
	}}
	d := Decide(Goal{}, time.Second, history)
	fmt.Println(d.Action, d.Again, "because", d.Reason)
	// Output: continue [0] because the rest needs 97.66ms, more than 10ms
}

// With post-copy a round that would take longer than the whole migration is cut short, and the rest is sent when the guest
// runs there: of devices that nobody writes to as well.
func TestSendCutsRounds(t *testing.T) {
	for _, busy := range []bool{false, true} {
		t.Run(fmt.Sprintf("busy=%t", busy), func(t *testing.T) {
			r := newRig([]shape{
				{"memory", 4 << 20, 0.7, true, Policy{ByGoal: true, Expiry: time.Second}},
				{"disk", 4 << 20, 0.7, false, Policy{ByGoal: true}},
				{"kernel", 64 << 10, 1, false, Policy{ByGoal: true}},
			})
			r.guest.busy = busy
			late := r.postCopy(3)
			late.uses = 20
			late.can = func(name string) bool { return name != "kernel" }
			r.source.Goal = Goal{PostCopy: true, MaxTotalTime: 300 * time.Millisecond}
			r.source.Window = 256 << 10
			a, b := pipes(1)
			a[0] = &paced{a[0].(net.Conn), 4 << 20} // a copy takes more than a second
			o := r.move(t.Context(), a, b)
			if got := r.verify(t, o); got != "destination" {
				t.Fatalf("guest is at the %s: %v; %v", got, o.srcErr, o.dstErr)
			}
			late.verify(t)
			last := o.src.Decisions[len(o.src.Decisions)-1]
			if last.Action != PostCopy || last.At < Millis(300*time.Millisecond) || o.src.LateBytes < 1<<20 {
				t.Errorf("%+v, %d bytes late", last, o.src.LateBytes)
			}
			var sent int64
			for _, x := range o.src.Rounds {
				sent += x.Bytes
			}
			if all := int64(2 * 4 << 20); sent >= all*7/10 || !busy && sent+o.src.LateBytes < all*6/10 {
				t.Errorf("%d bytes in rounds and %d late, of %d, of which 7 in 10 hold data", sent, o.src.LateBytes, all)
			}
		})
	}
}
