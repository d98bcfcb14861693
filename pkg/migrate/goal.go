package migrate

import (
	"context"
	"fmt"
	"math"
	"slices"
	"time"
)

// Goal is what a whole migration is to achieve, and what may be used for it. [Decide] pursues it.
//
// The zero value moves any guest: it aims at a downtime of 20 ms, and sends what cycles cannot make less while the guest
// is paused, however long that takes.
type Goal struct {
	// MaxDowntime is how long the guest may stand still, as far as that can be told before. It is kept: with PostCopy,
	// what would take longer is sent afterwards; otherwise the guest is slowed down, if Throttle allows it, and at last
	// the migration is given up. 0 aims at 20 ms and keeps nothing: what does not get less is sent, up to 300 ms of it
	// in preference to slowing the guest down.
	MaxDowntime time.Duration

	// MaxTotalTime is how long the migration may take until the guest runs at the destination; there may be a MaxDowntime
	// more to it. With PostCopy the switch comes in time for that, whatever is missing then, as soon as what is on its way
	// has arrived; without it a migration that would take longer is given up. 0 means no limit.
	MaxTotalTime time.Duration

	// PostCopy: the guest may run at the destination before everything is there.
	PostCopy bool

	// Throttle: the guest may be slowed down, by a share of its time that grows in steps up to 99 %. Only for guests that
	// are a [Throttler].
	Throttle bool

	// Overhead is what a pause costs beside sending content: pausing, the device state, loading it, starting. Content
	// gets the rest of MaxDowntime, and a quarter of it at least. 0 means 10 ms.
	Overhead time.Duration

	// RoundTrip is what the link takes there and back. A pause costs one and a half of it beside Overhead: the last of the
	// content goes there, the destination's word that it is prepared comes back, the commit goes there. 0 means that it is not
	// known; [Send] measures it then.
	RoundTrip time.Duration
}

// Throttler is implemented by a [Guest] that can be slowed down.
type Throttler interface {
	// Throttle holds the guest back for a share of its time, from 0 (not at all) to below 1, until it is called again: with
	// 0 before the guest is paused, or goes on here.
	Throttle(ctx context.Context, share float64) error
}

// Check reports why the goal could not be used.
func (g Goal) Check() error {
	for _, v := range []struct {
		name  string
		value time.Duration
	}{{"downtime", g.MaxDowntime}, {"total time", g.MaxTotalTime}, {"overhead", g.Overhead}, {"round trip", g.RoundTrip}} {
		if v.value < 0 {
			return fmt.Errorf("%s of %v: it cannot be negative", v.name, v.value)
		}
	}
	if g.MaxTotalTime > 0 && g.MaxDowntime > g.MaxTotalTime {
		return fmt.Errorf("a downtime of %v cannot be part of a total time of %v: raise the total time", g.MaxDowntime, g.MaxTotalTime)
	}
	return nil
}

const (
	aimedDowntime    = 20 * time.Millisecond  // where none is stated
	toleratedContent = 300 * time.Millisecond // of content, where no downtime is stated, in preference to throttling
	defaultOverhead  = 10 * time.Millisecond
	recentBytes      = 16 << 20               // rounds with these bytes, or of this time, tell the bandwidth
	recentTime       = 250 * time.Millisecond // …
	lullWait         = time.Second            // before another cycle that is likely to be in vain
	pointlessCycles  = 3                      // without a new low: they gain nothing over post-copy
	stalledCycles    = 10                     // without a new low: they no longer make it less
	hopelessCycles   = 30                     // without a new low: the goal is out of reach
	forever          = 1000 * time.Hour
)

// shares are the steps of the throttle.
var shares = []float64{0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99}

// overhead is what a pause costs beside sending content.
func (g Goal) overhead() time.Duration {
	o := g.Overhead
	if o == 0 {
		o = defaultOverhead
	}
	return o + g.RoundTrip + g.RoundTrip/2
}

// budget is how long content may be sent while the guest is paused.
func (g Goal) budget() time.Duration {
	all := g.MaxDowntime
	if all == 0 {
		all = aimedDowntime
	}
	return max(all-g.overhead(), all/4)
}

// fits reports whether a rest may be sent while the guest is paused, at a bandwidth in bytes a second.
func (g Goal) fits(rest int64, bandwidth float64) bool {
	return rest == 0 || bandwidth > 0 && transfer(rest, bandwidth) <= g.budget()
}

// transfer is how long bytes take at a bandwidth in bytes a second; forever when that is unknown.
func transfer(bytes int64, bandwidth float64) time.Duration {
	switch t := float64(bytes) / bandwidth * float64(time.Second); {
	case bytes == 0:
		return 0
	case t < float64(forever): // not when it is NaN
		return time.Duration(t)
	}
	return forever
}

// History is how the copying of one device went so far.
type History struct {
	Device string  // name
	Size   int64   // bytes
	Policy Policy  // that the device has
	Whole  bool    // the guest cannot run at the destination before all of it is there, with PostCopy neither
	Rounds []Round // those that are complete, in order; none: nothing was sent yet
	Dirty  Dirty   // what was written and not sent since. Without rounds it means nothing: everything is to be sent.
}

// rest is how many bytes of the device the destination does not have.
func (h *History) rest() int64 {
	if len(h.Rounds) == 0 {
		return h.Size
	}
	return h.Dirty.Bytes
}

// cycles is how many rounds the device had after the first.
func (h *History) cycles() int { return max(0, len(h.Rounds)-1) }

// Action is what to do next in a migration.
type Action uint8

const (
	// Continue with a round of Decision.Again, after Decision.Wait.
	Continue Action = iota
	// Switch: pause the guest, send the rest, let it run at the destination.
	Switch
	// PostCopy: pause the guest, send the list of the rest, let it run at the destination, send the rest.
	PostCopy
	// Throttle holds the guest back for Decision.Share of its time, and then is Continue.
	Throttle
	// GiveUp: the guest runs on here, as the goal cannot be reached.
	GiveUp
)

var actions = []string{"continue", "switch", "post-copy", "throttle", "give-up"}

func (a Action) String() string {
	if int(a) < len(actions) {
		return actions[a]
	}
	return fmt.Sprintf("action %d", uint8(a))
}

// MarshalText implements encoding.TextMarshaler.
func (a Action) MarshalText() ([]byte, error) { return []byte(a.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (a *Action) UnmarshalText(text []byte) error {
	i := slices.Index(actions, string(text))
	if i < 0 {
		return fmt.Errorf("action %q: expected one of %v", text, actions)
	}
	*a = Action(i)
	return nil
}

// Decision is what [Decide] says after a look at all devices.
type Decision struct {
	At     Millis `json:"at_ms"`  // since the start of the migration
	Action Action `json:"action"` // what is done next
	Reason string `json:"reason"` // why, for people

	Share float64 `json:"throttle,omitempty"` // of its time that the guest is to be held back from now on, 0 to 0.99
	Wait  Millis  `json:"wait_ms,omitempty"`  // before the next round; what is written meanwhile goes with it
	Again []int   `json:"-"`                  // positions of the devices that the next round sends

	Reasons []string `json:"-"` // for each device, why it would switch or not
	Estimate
}

// Estimate is what the rounds so far let expect. Unknown values are 0.
type Estimate struct {
	Rest      int64   `json:"rest_bytes"`                     // that the destination does not have
	Bandwidth float64 `json:"bandwidth"`                      // bytes of content a second, of the last rounds
	DirtyRate float64 `json:"dirty_rate"`                     // bytes a second that the guest writes, each page counted once a round
	Downtime  Millis  `json:"expected_downtime_ms,omitempty"` // if the rest were sent while the guest is paused
	Remaining Millis  `json:"remaining_ms,omitempty"`         // until everything is there
	RoundTrip Millis  `json:"round_trip_ms,omitempty"`        // of the link; part of both
}

// Decide says what to do after each round of a migration, and before the first: from the goal, the time since the start,
// and what happened to each device. It is a pure function, and ends every migration of a guest that does not stop time:
// after some number of its decisions one is neither Continue nor Throttle.
//
// In this order:
//
//  1. Devices that were not sent yet are: unless their policy disables pre-copy and PostCopy can do without.
//  2. Nothing is dirty: switch.
//  3. The time is over, or what is left of it is needed for the rest: post-copy, or give up; or, if no downtime is
//     stated, switch while there is time.
//  4. A policy with fixed numbers wants another cycle: continue.
//  5. The rest fits in the downtime: switch. Cycles make it less: continue. They no longer do: post-copy (already
//     when a cycle would not halve it), or throttle, or what [Goal].MaxDowntime says.
func Decide(goal Goal, elapsed time.Duration, devices []History) Decision {
	l := look(goal, elapsed, devices)
	d := l.decide()
	d.At, d.Estimate, d.Reasons = Millis(elapsed), l.estimate, l.reasons
	if d.Action == Continue || d.Action == Throttle {
		for _, i := range d.Again {
			d.Wait = max(d.Wait, Millis(devices[i].Policy.CycleThrottle))
		}
		if l.copying == nil && goal.MaxTotalTime > 0 {
			d.Wait = max(0, min(d.Wait, Millis(goal.MaxTotalTime-elapsed-goal.overhead()-l.need)))
		}
		if l.copying != nil {
			d.Wait = 0
		}
	}
	if d.Action != Throttle && d.Action != GiveUp {
		d.Share = l.share
	}
	return d
}

// view is what Decide sees.
type view struct {
	goal     Goal
	elapsed  time.Duration
	devices  []History
	estimate Estimate
	reasons  []string

	copying []int         // devices that need their first round
	need    time.Duration // to send the rest
	share   float64       // the throttle now
}

func look(goal Goal, elapsed time.Duration, devices []History) *view {
	l := &view{goal: goal, elapsed: elapsed, devices: devices, reasons: make([]string, len(devices))}
	e := &l.estimate
	e.RoundTrip = Millis(goal.RoundTrip)
	for i := range devices {
		h := &devices[i]
		e.Rest += h.rest()
		if len(h.Rounds) == 0 {
			if h.Policy.precopies() || !goal.PostCopy {
				l.copying = append(l.copying, i)
				l.reasons[i] = "nothing was sent yet"
			} else {
				l.reasons[i] = "pre-copy is disabled"
			}
			continue
		}
		last := h.Rounds[len(h.Rounds)-1]
		l.share = max(l.share, last.Throttle)
		if d := elapsed - time.Duration(last.Start); d > 0 {
			e.DirtyRate += float64(h.Dirty.Bytes) / d.Seconds()
		}
	}
	e.Bandwidth = bandwidth(sweeps(devices, func(*History) bool { return true }))
	l.need = transfer(e.Rest, e.Bandwidth)
	if e.Bandwidth > 0 {
		e.Downtime = Millis(l.need + goal.overhead())
		switch ratio := e.DirtyRate / e.Bandwidth; {
		case goal.fits(e.Rest, e.Bandwidth), goal.PostCopy && ratio > 0.5:
			e.Remaining = e.Downtime
		case ratio < 0.9:
			e.Remaining = Millis(min(float64(l.need)/(1-ratio), float64(forever))) + Millis(goal.overhead())
		}
	}
	return l
}

// decide is Decide without what is common to all its answers.
func (l *view) decide() Decision {
	over := l.goal.MaxTotalTime > 0 && l.elapsed >= l.goal.MaxTotalTime
	fits := l.goal.fits(l.estimate.Rest, l.estimate.Bandwidth)
	switch {
	case len(l.copying) > 0 && !over:
		return Decision{Action: Continue, Reason: "the first copy", Again: l.copying}
	case len(l.copying) > 0 && l.goal.PostCopy && len(l.whole()) > 0:
		return Decision{Action: Continue, Reason: "the first copy of what cannot be sent later", Again: l.whole()}
	case l.estimate.Rest == 0:
		return l.end("nothing is dirty")
	case over && fits:
		return l.end(fmt.Sprintf("the %v of a migration are over", l.goal.MaxTotalTime))
	case over && l.goal.PostCopy:
		return l.end(fmt.Sprintf("the %v of a migration are over", l.goal.MaxTotalTime))
	case over:
		return l.giveUp("the %v of a migration are over, and %s are still dirty", l.goal.MaxTotalTime, size(l.estimate.Rest))
	}
	if l.goal.MaxTotalTime > 0 && l.estimate.Bandwidth > 0 && !fits {
		if d, ok := l.hurry(); ok {
			return d
		}
	}

	group := l.askGoal()
	fixed := l.askPolicies()
	switch {
	case group.Action == GiveUp:
		return group
	case len(fixed.Again) > 0 && group.Action == Switch:
		return fixed
	case group.Action != Switch:
		group.Again = append(group.Again, fixed.Again...)
		slices.Sort(group.Again)
		return group
	case group.Reason != "":
		return l.end(group.Reason)
	}
	return l.end(fixed.Reason)
}

// whole are the devices that need their first round whatever the time is.
func (l *view) whole() (out []int) {
	for _, i := range l.copying {
		if l.devices[i].Whole {
			out = append(out, i)
		}
	}
	return out
}

// end is the switch, in the way that suits the rest.
func (l *view) end(reason string) Decision {
	if l.goal.PostCopy && !l.goal.fits(l.estimate.Rest, l.estimate.Bandwidth) {
		return Decision{Action: PostCopy, Reason: reason}
	}
	return Decision{Action: Switch, Reason: reason}
}

func (l *view) giveUp(format string, args ...any) Decision {
	return Decision{Action: GiveUp, Reason: fmt.Sprintf(format, args...)}
}

// hurry looks whether there is time for another cycle, when the time is limited and the rest does not fit in the
// downtime.
func (l *view) hurry() (Decision, bool) {
	left := l.goal.MaxTotalTime - l.elapsed
	now := l.need + l.goal.overhead() // what the switch would take
	switch {
	case l.goal.PostCopy && left <= now:
		return l.end(fmt.Sprintf("the rest needs the %v that are left of %v", round(left), l.goal.MaxTotalTime)), true
	case l.goal.PostCopy:
		return Decision{}, false
	case left < now:
		return l.giveUp("the rest needs %v, and %v are left of %v", round(now), round(left), l.goal.MaxTotalTime), true
	case l.goal.MaxDowntime > 0:
		return Decision{}, false
	}
	// A cycle takes as long as the switch; then the switch must still be possible.
	next := transfer(int64(min(l.estimate.DirtyRate*l.need.Seconds(), math.MaxInt64/2)), l.estimate.Bandwidth)
	if left < now+next {
		return l.end(fmt.Sprintf("%v are left of %v, not enough for another cycle", round(left), l.goal.MaxTotalTime)), true
	}
	return Decision{}, false
}

// askPolicies asks the devices whose policy has fixed numbers.
func (l *view) askPolicies() Decision {
	d := Decision{Action: Switch}
	for i := range l.devices {
		h := &l.devices[i]
		if h.Policy.ByGoal {
			continue
		}
		if len(h.Rounds) == 0 { // after the switch
			d.reason(h, l.reasons[i], d.Action == Switch)
			continue
		}
		v := h.Policy.Decide(h.Rounds, h.Dirty)
		l.reasons[i] = v.Reason
		if !v.Switch {
			d.Action, d.Again = Continue, append(d.Again, i)
		}
		d.reason(h, v.Reason, v.Switch == (d.Action == Switch) && h.rest() > 0)
	}
	return d
}

// reason notes why a device decides as it does, if that tells something.
func (d *Decision) reason(h *History, why string, tells bool) {
	if tells {
		d.Reason = fmt.Sprintf("device %q: %s", h.Device, why)
	}
}

// askGoal asks for the devices whose policy leaves it to the goal, as one. Switch means that they are ready for it.
func (l *view) askGoal() Decision {
	var rest int64
	var early, open []int // dirty ones that have fewer cycles than they must, and than they may
	for i := range l.devices {
		h := &l.devices[i]
		if !h.Policy.ByGoal {
			continue
		}
		if h.rest() == 0 {
			l.reasons[i] = "nothing is dirty"
			continue
		}
		rest += h.rest()
		if h.cycles() < h.Policy.MinCycles {
			early = append(early, i)
		}
		if h.Policy.MaxCycles == 0 || h.cycles() < h.Policy.MaxCycles {
			open = append(open, i)
		}
	}
	if rest == 0 {
		return Decision{Action: Switch}
	}
	d := l.judge(rest, early, open)
	for i := range l.devices {
		if l.devices[i].Policy.ByGoal && l.reasons[i] == "" {
			l.reasons[i] = d.Reason
		}
	}
	return d
}

func (l *view) judge(rest int64, early, open []int) Decision {
	if len(early) > 0 {
		h := &l.devices[early[0]]
		return Decision{Action: Continue, Again: early, Reason: fmt.Sprintf("device %q: %d of %d cycles done", h.Device, h.cycles(), h.Policy.MinCycles)}
	}
	need, budget := transfer(rest, l.estimate.Bandwidth), l.goal.budget()
	ready := func(format string, args ...any) Decision {
		return Decision{Action: Switch, Reason: fmt.Sprintf(format, args...)}
	}
	switch {
	case need <= budget:
		return ready("the rest needs %v of %v", round(need), round(budget))
	case len(open) == 0:
		return ready("the most cycles that the policies allow are done, the rest needs %v", round(need))
	}
	again := Decision{Action: Continue, Again: open, Reason: fmt.Sprintf("the rest needs %v, more than %v", round(need), round(budget))}
	if need == forever {
		again.Reason = "the bandwidth is not known yet"
	}

	sent := sweeps(l.devices, func(h *History) bool { return h.Policy.ByGoal })
	n := len(sent)
	last := sent[n-1].bytes
	// What was written during a round may be less than what it sent and yet never get less from round to round, when
	// there are pauses between them or the guest writes in bursts. So lows count too.
	low := stalled(sent)
	if l.goal.PostCopy {
		if last == 0 && n == 1 || rest <= last/2 && low < pointlessCycles {
			return again
		}
		return ready("%s were sent and %s are dirty again: the rest is better sent when the guest runs there", size(last), size(rest))
	}
	slow := n >= 2 && notLess(last, rest) // the last cycle was in vain
	stuck := slow && n >= 3 && notLess(sent[n-2].bytes, last) || low >= stalledCycles
	spent := !l.goal.Throttle || l.share >= shares[len(shares)-1] // the throttle
	switch {
	case !stuck && !(slow && l.share > 0 && !spent):
		return again
	case l.goal.MaxDowntime == 0 && (spent || need <= toleratedContent):
		return ready("cycles no longer make it less, the rest needs %v", round(need))
	case !spent:
		i, _ := slices.BinarySearch(shares, l.share+0.001)
		again.Action, again.Share = Throttle, shares[i]
		again.Reason = fmt.Sprintf("cycles no longer make it less, and the rest needs %v, more than %v: the guest is held back for %.0f %% of its time",
			round(need), round(budget), 100*shares[i])
		return again
	case l.goal.Throttle:
		return l.giveUp("the guest, held back for %.0f %% of its time, still writes too fast: the rest needs %v, more than %v", 100*l.share, round(need), round(budget))
	case l.goal.MaxTotalTime == 0 && low >= hopelessCycles:
		return l.giveUp("%d cycles did not make it less: the rest needs %v, more than %v", low, round(need), round(budget))
	}
	again.Wait = Millis(lullWait)
	again.Reason += ": waiting for the guest to write less"
	return again
}

// sweep is a round of all devices that cycled together.
type sweep struct {
	start Millis
	bytes int64
	sent  int64         // bytes that say what the link carries
	spent time.Duration // by the slowest
}

// sweeps are the rounds of those devices that match, by their start.
func sweeps(devices []History, match func(*History) bool) []sweep {
	var out []sweep
	for i := range devices {
		if !match(&devices[i]) {
			continue
		}
		for _, r := range devices[i].Rounds {
			at, found := slices.BinarySearchFunc(out, r.Start, func(s sweep, t Millis) int { return int(max(-1, min(1, s.start-t))) })
			if !found {
				out = slices.Insert(out, at, sweep{start: r.Start})
			}
			out[at].bytes += r.Bytes
			// What was looked at and not sent took no time where the link was what all waited for, and as much as what was
			// sent where it was not.
			out[at].sent += r.Bytes - int64(float64(r.Same)*r.link)
			out[at].spent = max(out[at].spent, time.Duration(r.Duration))
		}
	}
	return out
}

// bandwidth is the bytes a second of the last sweeps, as many as are needed for a good number; 0 when it is unknown.
func bandwidth(sent []sweep) float64 {
	var bytes int64
	var spent time.Duration
	for _, s := range slices.Backward(sent) {
		if bytes >= recentBytes || spent >= recentTime {
			break
		}
		bytes += s.sent
		spent += s.spent
	}
	if spent <= 0 {
		return 0
	}
	return float64(bytes) / spent.Seconds()
}

// stalled is how many sweeps in a row brought no new low: one a tenth below the one before.
func stalled(sent []sweep) (n int) {
	low := sent[0].bytes
	for _, s := range sent[1:] {
		if notLess(low, s.bytes) {
			n++
		} else {
			low, n = s.bytes, 0
		}
	}
	return n
}

func notLess(before, after int64) bool { return float64(after) > 0.9*float64(before) }

// round cuts what nobody reads of a duration.
func round(d time.Duration) time.Duration {
	if d >= time.Second {
		return d.Round(10 * time.Millisecond)
	}
	return d.Round(10 * time.Microsecond)
}
