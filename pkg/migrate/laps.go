package migrate

import (
	"slices"
	"sync/atomic"
	"time"
)

// Part is a named part of the downtime.
type Part struct {
	Name     string `json:"part"` // one of the constants Part…
	Duration Millis `json:"ms"`   // of all times together

	// Took is how long it took in truth, when that is more than Duration: of what happens at the same time, each moment
	// counts for one part only, the one that ends next.
	Took Millis `json:"took_ms,omitempty"`
}

// The parts of a downtime. The report has them in the order in which they came, and adds them up to the downtime.
const (
	PartPause     = "pause"      // source: Guest.Pause
	PartFinalList = "final list" // source: the last look at what was written
	PartState     = "state save" // source: Guest.State; it is sent as it is written
	PartAside     = "put aside"  // source, for a copy: the rest is copied in memory, to be sent when the guest runs on
	PartTransfer  = "transfer"   // source: sending the rest; destination: receiving it and the device state
	PartLoad      = "load"       // source: all the destination does until it is prepared; destination: Target.Load
	PartVerify    = "verify"     // destination: comparing digests
	PartFlush     = "flush"      // destination: making disks durable
	PartDecision  = "decision"   // destination: waiting for the source's commit
	PartCommit    = "commit"     // Journal.Commit
	PartResume    = "resume"     // source: commit, record and start at the destination, and the word of it; destination: Target.Run
	PartRollback  = "rollback"   // source: what else passed until the guest ran here again, or was given up
)

// laps cuts a time into parts. It belongs to one goroutine.
type laps struct {
	at    time.Time // end of the last part; zero: not begun
	parts []Part
}

// begin starts the first part.
func (l *laps) begin() { l.at = time.Now() }

func (l *laps) begun() bool { return !l.at.IsZero() }

// end ends a part, which began when the one before ended.
func (l *laps) end(name string) { l.endAt(name, time.Now()) }

func (l *laps) endAt(name string, t time.Time) {
	d := t.Sub(l.at).Truncate(time.Microsecond) // as reports show it, so that what they show adds up
	l.parts = append(l.parts, Part{Name: name, Duration: Millis(d)})
	l.at = l.at.Add(d)
}

// span is something that happened beside other things.
type span struct {
	name       string
	begin, end time.Time
}

// endAll ends what happened at the same time since the last part ended, and is over now.
func (l *laps) endAll(spans ...span) {
	spans = slices.DeleteFunc(spans, func(s span) bool { return s.end.IsZero() })
	slices.SortStableFunc(spans, func(a, b span) int { return a.end.Compare(b.end) })
	now := time.Now()
	for i, s := range spans {
		end := s.end
		if i == len(spans)-1 {
			end = now
		}
		if end.Before(l.at) {
			end = l.at // it began and ended before all this
		}
		l.endAt(s.name, end)
		part := &l.parts[len(l.parts)-1]
		if took := Millis(s.end.Sub(s.begin).Truncate(time.Microsecond)); took > part.Duration {
			part.Took = took
		}
	}
}

// total is the sum of all parts.
func (l *laps) total() (sum Millis) {
	for _, p := range l.parts {
		sum += p.Duration
	}
	return sum
}

// atomicMax makes v at least n.
func atomicMax(v *atomic.Int64, n int64) {
	for {
		old := v.Load()
		if old >= n || v.CompareAndSwap(old, n) {
			return
		}
	}
}
