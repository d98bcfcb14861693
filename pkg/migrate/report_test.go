package migrate

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"reflect"
	"testing"
	"time"
)

var updateReport = flag.Bool("update-report", false, "write testdata/report.json")

// The fields of a report are a promise to whoever reads the files.
func TestReportJSON(t *testing.T) {
	ms := func(n float64) Millis { return Millis(n * float64(time.Millisecond)) }
	reports := []Report{
		{
			ID: "CQ3X", Role: "source", Outcome: "moved", Streams: 2, Total: ms(1209.361),
			Phases:   []Phase{{"connecting", ms(1.5)}, {"copying", ms(1180)}, {"pausing", ms(0.25)}},
			Downtime: ms(12.5), Parts: []Part{{PartPause, ms(0.25), 0}, {PartState, ms(3), ms(4.5)}, {PartResume, ms(9.25), 0}}, AgentBefore: ms(14),
			Rounds: []Round{
				{Device: "memory", Blocks: 1000, Bytes: 4096000, Duration: ms(700)},
				{Device: "memory", Index: 1, Start: ms(720), Blocks: 10, Bytes: 40960, Duration: ms(5), Throttle: 0.2},
			},
			Decisions: []Decision{{At: ms(719), Action: Throttle, Reason: "cycles no longer make it less", Share: 0.2, Wait: ms(500), Again: []int{0}, Reasons: []string{"x"},
				Estimate: Estimate{Rest: 40960, Bandwidth: 5.5e6, DirtyRate: 57000, Downtime: ms(17.447), Remaining: ms(25)}}},
			Reasons: map[string]string{"memory": "nothing is dirty"}, Digests: map[string]string{"memory": "00ff"},
			DataBytes: 4136960, ZeroBytes: 8192, StateBytes: 90000, WireBytes: 4300000, Throughput: 3505898,
		},
		{
			ID: "CQ3X", Role: "destination", Outcome: "discarded", Error: "receive guest: source ended the migration", Streams: 2, Total: ms(800),
			Phases: []Phase{{"connecting", ms(1)}, {"receiving", ms(799)}}, AgentAfter: ms(3), WireBytes: 100,
		},
	}
	var got bytes.Buffer
	for i := range reports {
		b, err := json.MarshalIndent(&reports[i], "", "  ")
		if err != nil {
			t.Fatal(err)
		}
		got.Write(append(b, '\n'))
		var back Report
		if err := json.Unmarshal(b, &back); err != nil {
			t.Fatal(err)
		}
		for j := range back.Decisions { // which are not in the file
			back.Decisions[j].Again, back.Decisions[j].Reasons = reports[i].Decisions[j].Again, reports[i].Decisions[j].Reasons
		}
		if !reflect.DeepEqual(back, reports[i]) {
			t.Errorf("read back as\n%+v, want\n%+v", back, reports[i])
		}
	}
	const golden = "testdata/report.json"
	if *updateReport {
		if err := os.WriteFile(golden, got.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got.Bytes(), want) {
		t.Errorf("differs from %s; if that is right, run with -update-report:\n%s", golden, &got)
	}
}
