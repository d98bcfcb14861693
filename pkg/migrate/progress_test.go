package migrate

import (
	"bytes"
	"log/slog"
	"net"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/drafter-vm/drafter/pkg/block"
)

func TestPace(t *testing.T) {
	var p pace
	for _, tt := range []struct {
		at            time.Duration
		data, content int64
		want          float64 // of data
		all           float64
	}{
		{0, 0, 0, 0, 0},
		{time.Second, 1000, 3000, 1000, 3000},
		{2 * time.Second, 2000, 4000, 1000, 2000},
		{3 * time.Second, 5000, 9000, 2000, 3000}, // the first second counts no more
		{10 * time.Second, 5000, 9000, 0, 0},
		{10 * time.Second, 5000, 9000, 0, 0},
	} {
		if data, content := p.speeds(moment{tt.at, tt.data, tt.content}); data != tt.want || content != tt.all {
			t.Errorf("after %v: %v and %v, want %v and %v", tt.at, data, content, tt.want, tt.all)
		}
	}
}

func TestRemaining(t *testing.T) {
	for _, tt := range []struct {
		rest         int64
		speed, share float64
		want         time.Duration
	}{
		{1000, 0, 0, 0},
		{1000, 100, 0, 10 * time.Second},
		{1000, 100, 0.5, 20 * time.Second},
		{1000, 100, 2, 10 * time.Second},
	} {
		if got := remaining(tt.rest, tt.speed, tt.share); got != tt.want {
			t.Errorf("%+v: %v", tt, got)
		}
	}
}

// A migration is watched by a function and in the log.
func TestWatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(nil)
		g := &slowable{guest: r.guest}
		mem := block.NewMemory(20 << 20)
		if _, err := mem.WriteAt(bytes.Repeat([]byte("guest"), 4_000_000), 0); err != nil {
			t.Fatal(err)
		}
		r.source.Guest, r.source.Goal = g, Goal{MaxDowntime: 20 * time.Millisecond, Throttle: true}
		r.source.Devices = []SourceDevice{{Name: "memory", Device: mem, Tracker: &busy{g, 0.2}, Policy: Policy{ByGoal: true}}}
		r.target.sizes["memory"] = mem.Size()
		var log bytes.Buffer
		r.source.Logger = slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
			if a.Key == "time" || a.Key == "migration" {
				return slog.Attr{}
			}
			return a
		}}))
		var sent, received []Progress
		r.source.Progress = func(p Progress) { sent = append(sent, p) }
		r.dest.Progress = func(p Progress) { received = append(received, p) }
		a, b := pipes(1)
		a[0] = &paced{a[0].(net.Conn), 10 << 20}
		o := r.move(t.Context(), a, b)
		defer r.stop()
		if o.srcErr != nil || o.dstErr != nil {
			t.Fatal(o.srcErr, o.dstErr)
		}
		i := slices.IndexFunc(sent, func(p Progress) bool { return p.Elapsed >= time.Second })
		p := sent[i]
		near := func(got, want float64) bool { return got > 0.9*want && got < 1.1*want }
		if p.State != "copying" || p.Round != 0 || p.Role != "source" || p.Dirty != 20<<20 || !near(float64(p.Rest), 10<<20) || !near(p.Bandwidth, 10<<20) || !near(p.Remaining.Seconds(), 1) {
			t.Errorf("after a second: %+v", p)
		}
		if last := sent[len(sent)-1]; last.State != "moved" || last.Data == 0 || last.Throttle != 0.2 || last.DirtyRate == 0 {
			t.Errorf("at the end: %+v", last)
		}
		if last := received[len(received)-1]; last.State != "running" || last.Role != "destination" || last.Data != o.dst.DataBytes || last.Elapsed == 0 {
			t.Errorf("at the destination's end: %+v", last)
		}
		for _, want := range []string{
			`msg="migration decision" role=source action=continue reason="the first copy"`,
			`msg="migration round" role=source round=0 guest=running sent="19.1 MiB" took=1.9`,
			`action=throttle reason="cycles no longer make it less`,
			`guest=paused sent="4.0 KiB"`,
		} {
			if !strings.Contains(log.String(), want) {
				t.Errorf("the log does not say %s:\n%s", want, &log)
			}
		}
	})
}
