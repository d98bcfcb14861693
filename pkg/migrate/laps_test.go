package migrate

import (
	"context"
	"encoding/json"
	"io"
	"reflect"
	"testing"
	"testing/synctest"
	"time"
)

func TestLaps(t *testing.T) {
	ms := func(n int) time.Duration { return time.Duration(n) * time.Millisecond }
	synctest.Test(t, func(t *testing.T) {
		var l laps
		l.begin()
		time.Sleep(ms(3))
		l.end("pause")
		began := time.Now()
		time.Sleep(ms(10))
		l.endAll(
			span{"list", began, began.Add(ms(2))},
			span{"state", began, began.Add(ms(9))},
			span{"transfer", began.Add(ms(2)), began.Add(ms(5))},
			span{"nothing", began, time.Time{}},
			span{"before", began.Add(-ms(2)), began.Add(-ms(1))},
		)
		want := []Part{
			{Name: "pause", Duration: Millis(ms(3))},
			{Name: "before", Took: Millis(ms(1))},
			{Name: "list", Duration: Millis(ms(2))},
			{Name: "transfer", Duration: Millis(ms(3))},
			{Name: "state", Duration: Millis(ms(5)), Took: Millis(ms(9))}, // and the millisecond until all was over
		}
		if !reflect.DeepEqual(l.parts, want) {
			t.Errorf("got %+v, want %+v", l.parts, want)
		}
		if l.total() != Millis(ms(13)) {
			t.Errorf("total %v", l.total())
		}
	})
}

// slowGuest and slowTarget take their time in each hook.
type slowGuest struct{ Guest }

func (g slowGuest) BeforeSuspend(ctx context.Context) error {
	time.Sleep(70 * time.Millisecond)
	return g.Guest.BeforeSuspend(ctx)
}

func (g slowGuest) Pause(ctx context.Context) error {
	time.Sleep(time.Millisecond)
	return g.Guest.Pause(ctx)
}

func (g slowGuest) State(ctx context.Context, w io.Writer) error {
	time.Sleep(2 * time.Millisecond)
	return g.Guest.State(ctx, w)
}

type slowTarget struct {
	Target
	arriving func()
}

func (g slowTarget) Arriving() { g.arriving() }

func (g slowTarget) Load(ctx context.Context, r io.Reader) error {
	time.Sleep(4 * time.Millisecond)
	return g.Target.Load(ctx, r)
}

func (g slowTarget) Run(ctx context.Context) error {
	time.Sleep(8 * time.Millisecond)
	return g.Target.Run(ctx)
}

type slowJournal struct {
	Journal
	took time.Duration
}

func (j slowJournal) Commit(ctx context.Context, id string) error {
	time.Sleep(j.took)
	return j.Journal.Commit(ctx, id)
}

// The parts of the downtime are those that took the time, and add up.
func TestParts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(smallShape)
		r.source.Guest = slowGuest{r.guest}
		r.source.Journal = slowJournal{r.src, 16 * time.Millisecond}
		arrivals := 0
		r.dest.Target = slowTarget{r.target, func() {
			arrivals++
			if r.target.loads != 0 || !r.guest.paused {
				t.Error("the guest arrives, and runs at the source or is loaded already")
			}
		}}
		r.dest.Journal = slowJournal{r.dst, 32 * time.Millisecond}
		a, b := pipes(1)
		o := r.move(t.Context(), a, b)
		if r.verify(t, o); o.srcErr != nil || o.dstErr != nil {
			t.Fatal(o.srcErr, o.dstErr)
		}
		if arrivals != 1 {
			t.Errorf("the target heard %d times that the guest arrives", arrivals)
		}
		if o.src.AgentBefore < Millis(70*time.Millisecond) {
			t.Errorf("agent took %v", o.src.AgentBefore)
		}
		for _, tt := range []struct {
			report *Report
			want   map[string]int // milliseconds
		}{
			{o.src, map[string]int{PartPause: 1, PartFinalList: 0, PartState: 2, PartTransfer: 0, PartLoad: 4, PartCommit: 16, PartResume: 32 + 8}},
			{o.dst, map[string]int{PartTransfer: 2, PartVerify: 0, PartFlush: 0, PartLoad: 4, PartDecision: 16, PartCommit: 32, PartResume: 8}},
		} {
			var sum Millis
			got := map[string]int{}
			for _, p := range tt.report.Parts {
				sum += p.Duration
				got[p.Name] += int(time.Duration(p.Duration).Round(time.Millisecond) / time.Millisecond)
			}
			if !reflect.DeepEqual(got, tt.want) {
				t.Errorf("%s: parts %v, want %v (%+v)", tt.report.Role, got, tt.want, tt.report.Parts)
			}
			if sum != tt.report.Downtime {
				t.Errorf("%s: parts are %v of %v", tt.report.Role, sum, tt.report.Downtime)
			}
			b, err := json.Marshal(tt.report)
			if err != nil {
				t.Fatal(err)
			}
			var back Report
			if err := json.Unmarshal(b, &back); err != nil || len(back.Parts) != len(tt.report.Parts) {
				t.Errorf("%s: %v", b, err)
			}
		}
	})
}

type failingTarget struct{ Target }

func (failingTarget) Load(context.Context, io.Reader) error {
	time.Sleep(4 * time.Millisecond)
	return io.ErrUnexpectedEOF
}

// Of a migration that fails after the pause, the parts tell how long the guest stood still here.
func TestPartsOfRollback(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(smallShape)
		r.source.Guest = slowGuest{r.guest}
		r.dest.Target = failingTarget{r.target}
		a, b := pipes(1)
		o := r.move(t.Context(), a, b)
		if owner := r.verify(t, o); owner != "source" {
			t.Fatalf("%s has the guest: %v", owner, o.srcErr)
		}
		var sum Millis
		for _, p := range o.src.Parts {
			sum += p.Duration
		}
		last := o.src.Parts[len(o.src.Parts)-1]
		if sum != o.src.Downtime || sum < Millis(7*time.Millisecond) || last.Name != PartRollback || last.Duration < Millis(4*time.Millisecond) {
			t.Errorf("downtime %v, parts %+v", o.src.Downtime, o.src.Parts)
		}
	})
}
