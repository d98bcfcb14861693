package main

import (
	"testing"
	"time"

	"github.com/drafter-vm/drafter/pkg/migrate"
)

func TestSummary(t *testing.T) {
	ms := func(n float64) migrate.Millis { return migrate.Millis(n * float64(time.Millisecond)) }
	for _, tt := range []struct {
		name   string
		report migrate.Report
		want   string
	}{
		{"source", migrate.Report{
			ID: "7f", Role: "source", Outcome: "moved", Streams: 1, Total: ms(1209.361), Downtime: ms(29.876), WireBytes: 379002616,
			Rounds:  []migrate.Round{{Index: 0}, {Index: 2}, {Index: 0}, {Index: 1}},
			Digests: map[string]string{"memory": "aa", "disk": "bb"}, Phases: []migrate.Phase{{Name: "copying", Duration: ms(1000)}},
			Parts: []migrate.Part{{Name: "pause", Duration: ms(0.06)}, {Name: "state save", Duration: ms(9)}, {Name: "load", Duration: ms(20.766)}, {Name: "commit", Duration: ms(0.05)}}, AgentBefore: ms(70),
		}, "downtime 29.9ms, 1.21s in all\n  361.4 MiB sent in 3 rounds over 1 stream, verified: the digests of 2 devices agree\n" +
			"  downtime: state save 9ms, load 20.8ms, other 100µs; before it, the guest's agent took 70ms"},
		{"destination", migrate.Report{
			Role: "destination", Streams: 2, Total: ms(901.23), WireBytes: 1 << 20, Digests: map[string]string{"disk": "bb"},
		}, "901.2ms in all\n  1.0 MiB received over 2 streams, verified: the digests of 1 device agree"},
		{"destination that saw the end", migrate.Report{
			Role: "destination", Streams: 1, Downtime: ms(9), Parts: []migrate.Part{{Name: "load", Duration: ms(9)}}, AgentAfter: ms(200),
		}, "0s in all\n  0.0 MiB received over 1 stream, not verified\n  downtime, since word of the pause came: load 9ms; after it, the guest's agent took 200ms"},
		{"source that was started again", migrate.Report{Role: "source", Outcome: "moved", Streams: 3, Total: ms(900), WireBytes: 3 << 20},
			"900ms in all\n  3.0 MiB sent since this peer was started again over 3 streams, not verified"},
		{"nothing compared", migrate.Report{Role: "destination", Streams: 1}, "0s in all\n  0.0 MiB received over 1 stream, not verified"},
	} {
		if got := summary(&tt.report); got != tt.want {
			t.Errorf("%s:\n%s\nwant\n%s", tt.name, got, tt.want)
		}
	}
}
