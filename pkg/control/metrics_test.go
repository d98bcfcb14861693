package control

import (
	"encoding/json"
	"errors"
	"flag"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"

	"github.com/drafter-vm/drafter/pkg/migrate"
)

var update = flag.Bool("update", false, "write the golden files")

// scrape returns what the metrics say of drafter.
func scrape(t *testing.T, url string) string {
	t.Helper()
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("%s: %v: %s", resp.Status, err, b)
	}
	var out strings.Builder
	for line := range strings.Lines(string(b)) {
		if strings.Contains(line, "drafter_") {
			out.WriteString(line)
		}
	}
	return out.String()
}

func serve(t *testing.T, m *Metrics) (url string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := Serve(l, m.Handler(), slog.New(slog.DiscardHandler))
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if _, err := net.Dial("tcp", l.Addr().String()); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("after Close, dial: %v", err)
		}
		http.DefaultClient.CloseIdleConnections()
	})
	return "http://" + l.Addr().String()
}

// one migration from here that failed, one that worked, after one to here.
func story(m *Metrics) {
	ms := func(n int) migrate.Millis { return migrate.Millis(n) * migrate.Millis(time.Millisecond) }
	m.Resumed(62 * time.Millisecond)
	m.State(Running)
	m.Memory(func() (Memory, bool) {
		return Memory{Faults: 7, Failures: 1, Demanded: 4096, Background: 1 << 20, Zero: 8192, Missing: 512, P50: 9 * time.Microsecond, P99: 35 * time.Microsecond, Max: time.Millisecond}, true
	})
	m.Store(func() map[string]Stored {
		return map[string]Stored{"disk": {Stored: 200, Waiting: 56, Bytes: 52428800, Failing: true}}
	})
	m.BackedUp(time.Unix(1700000000, 0), nil)
	m.BackedUp(time.Time{}, errors.New("the store is gone"))
	m.Hypervisor(func() map[string]float64 { return map[string]float64{"block.read_bytes": 512} })
	m.Flushed("disk", 2*time.Millisecond, nil)
	m.Flushed("disk", 300*time.Millisecond, errors.New("no space"))
	m.Done(nil)
	m.Done(&migrate.Report{})

	m.Progress(migrate.Progress{Role: "destination", State: "receiving", Size: 1 << 30, Data: 1000, Zero: 500, Bandwidth: 5e8})
	m.Done(&migrate.Report{Role: "destination", Outcome: "running", Total: ms(1000), DataBytes: 2000, ZeroBytes: 500, WireBytes: 2100,
		Downtime: ms(9), Parts: []migrate.Part{{Name: "load", Duration: ms(9)}}, AgentAfter: ms(12)})

	m.State(Sending)
	m.Progress(migrate.Progress{Role: "source", State: "copying", Size: 1 << 30, Dirty: 1 << 30, Rest: 1 << 29, Data: 1 << 28})
	m.Done(&migrate.Report{Role: "source", Outcome: "kept", Total: ms(500), DataBytes: 1 << 28, WireBytes: 1 << 28})

	m.Progress(migrate.Progress{Role: "source", State: "copying", Size: 1 << 30, Dirty: 1 << 30, Data: 10})
	m.Progress(migrate.Progress{Role: "source", State: "copying", Round: 1, Size: 1 << 30, Dirty: 1 << 20, Rest: 1 << 19, Data: 1 << 30, Bandwidth: 1e9,
		DirtyRate: 5e7, Remaining: 1500 * time.Millisecond, Throttle: 0.2})
}

func end(m *Metrics) {
	ms := func(n int) migrate.Millis { return migrate.Millis(n) * migrate.Millis(time.Millisecond) }
	m.Done(&migrate.Report{Role: "source", Outcome: "moved", Total: ms(2000), DataBytes: 1<<30 + 4096, StateBytes: 90_000, WireBytes: 1<<30 + 99_000,
		Rounds:    []migrate.Round{{Device: "memory"}, {Device: "disk"}, {Device: "memory", Index: 1, Start: ms(1500)}},
		LateBytes: 8192, Demands: 3, Reconnects: 1,
		Downtime: ms(12), Parts: []migrate.Part{{Name: "pause", Duration: ms(2)}, {Name: "load", Duration: ms(4)}, {Name: "resume", Duration: ms(6)}}, AgentBefore: ms(30)})
	m.State(Moved)
}

// a snapshot that was written, and one of which nothing came.
func snapshots(m *Metrics) {
	m.State(Sending)
	m.Snapshot(migrate.Progress{Role: "source", State: "copying", Size: 1 << 30, Data: 1 << 20, Bandwidth: 1e9, DirtyRate: 3e7, Throttle: 0.1, Remaining: time.Second})
	m.Snapshot(migrate.Progress{Role: "source", State: "copied", Size: 1 << 30, Data: 1 << 21, Zero: 4096, Bandwidth: 1e9, DirtyRate: 3e7, Throttle: 0.1, Rest: 7})
	m.SnapshotDone(&migrate.Report{Role: "destination", Outcome: "kept", DataBytes: 1 << 21, ZeroBytes: 4096, StateBytes: 70_000, Downtime: migrate.Millis(36 * time.Millisecond)}, nil)
	m.SnapshotDone(nil, errors.New("no space"))
	m.State(Paused)
}

func TestMetrics(t *testing.T) {
	m := NewMetrics("1.2.3")
	url := serve(t, m)
	story(m)
	got := scrape(t, url+"/metrics")
	end(m)
	got += "\n# And when it is over:\n" + scrape(t, url+"/metrics")
	snapshots(m)
	got += "\n# And after snapshots, of one that was moved here again:\n" + scrape(t, url+"/metrics")
	const golden = "testdata/metrics.txt"
	if *update {
		if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("differs from %s; if that is right, run with -update:\n%s", golden, got)
	}

	families, err := m.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	problems, err := promlint.NewWithMetricFamilies(families).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		if strings.HasPrefix(p.Metric, "drafter_") {
			t.Errorf("%s: %s", p.Metric, p.Text)
		}
	}
}

// Every metric is in the list of the documentation, and the other way round.
func TestMetricsDocumented(t *testing.T) {
	source, err := os.ReadFile("metrics.go")
	if err != nil {
		t.Fatal(err)
	}
	m := NewMetrics("1")
	story(m)
	end(m)
	snapshots(m)
	families, err := m.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	listed := 0
	for line := range strings.Lines(string(source)) {
		if strings.HasPrefix(line, "//\tdrafter_") {
			listed++
		}
	}
	n := 0
	for _, f := range families {
		if !strings.HasPrefix(f.GetName(), "drafter_") {
			continue
		}
		if n++; !strings.Contains(string(source), "//\t"+f.GetName()) {
			t.Errorf("%s is not in the list", f.GetName())
		}
	}
	if n != listed {
		t.Errorf("%d metrics, %d in the list", n, listed)
	}
}

func TestNothingElse(t *testing.T) {
	url := serve(t, NewMetrics("1"))
	for _, path := range []string{"/", "/debug/pprof/"} {
		resp, err := http.Get(url + path)
		if err != nil {
			t.Fatal(err)
		}
		b, _ := io.ReadAll(resp.Body)
		if resp.Body.Close(); resp.StatusCode != http.StatusNotFound || !strings.Contains(string(b), "/metrics") {
			t.Errorf("%s: %s: %s", path, resp.Status, b)
		}
	}
	// Without memory that is filled lazily, nothing is said of it.
	if got := scrape(t, url+"/metrics"); strings.Contains(got, "drafter_memory") || !strings.Contains(got, `drafter_peer_state{state="starting"} 1`) {
		t.Error(got)
	}
}

// Scrapes and news at the same time, and a close in the middle.
func TestConcurrent(t *testing.T) {
	m := NewMetrics("1")
	url := serve(t, m)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 20 {
				story(m)
				end(m)
				snapshots(m)
			}
		})
		wg.Go(func() {
			for range 20 {
				scrape(t, url+"/metrics")
			}
		})
	}
	wg.Wait()
}

// TestDocumented holds docs/metrics.md and the dashboard against what is served.
func TestDocumented(t *testing.T) {
	m := NewMetrics("v")
	served := map[string]bool{}
	described := make(chan *prometheus.Desc)
	go func() {
		m.registry.Describe(described)
		close(described)
	}()
	name := regexp.MustCompile(`fqName: "(drafter_[a-z_]+)"`)
	for d := range described {
		if found := name.FindStringSubmatch(d.String()); found != nil {
			served[found[1]] = true
		}
	}
	if len(served) < 20 {
		t.Fatalf("only %d numbers are served", len(served))
	}
	for _, file := range []string{"metrics.md", "grafana.json"} {
		text, err := os.ReadFile(filepath.Join("..", "..", "docs", file))
		if err != nil {
			t.Fatal(err)
		}
		shown := map[string]bool{}
		for _, n := range regexp.MustCompile(`drafter_[a-z_]+`).FindAllString(string(text), -1) {
			n = strings.TrimSuffix(strings.TrimSuffix(n, "_bucket"), "_count")
			if shown[n] = true; !served[n] {
				t.Errorf("%s speaks of %s, which is not served", file, n)
			}
		}
		for n := range served {
			if (file == "metrics.md" || strings.HasPrefix(n, "drafter_snapshot")) && !shown[n] {
				t.Errorf("%s does not say what %s is", file, n)
			}
		}
		if file == "grafana.json" && !json.Valid(text) {
			t.Errorf("%s is no JSON", file)
		}
	}
}

// TestNothingUnderWay holds the gauges of what goes on to 0 when nothing does, whoever tells of it: a snapshot has no Done.
func TestNothingUnderWay(t *testing.T) {
	for role, last := range map[string]string{"source": "copied", "destination": "running"} {
		m := NewMetrics("1")
		url := serve(t, m)
		p := migrate.Progress{Role: role, State: "receiving", Bandwidth: 5, DirtyRate: 5, Rest: 5, Throttle: 0.5, Remaining: 5 * time.Second}
		if role == "source" {
			p.State = "copying"
		}
		numbers := regexp.MustCompile(`(?m)^drafter_migration_(bandwidth_bytes_per_second|rest_bytes|dirty_bytes_per_second|remaining_seconds|throttle_ratio)(\{.*\})? [^0].*$`)
		m.Progress(p)
		if got := numbers.FindAllString(scrape(t, url+"/metrics"), -1); len(got) < 2 {
			t.Errorf("%s: while it is under way there is only %q", role, got)
		}
		p.State = last
		if m.Progress(p); !p.Over() {
			t.Fatalf("%q is not the last state", last)
		}
		if got := numbers.FindAllString(scrape(t, url+"/metrics"), -1); len(got) > 0 {
			t.Errorf("%s: when it is over there is %q", role, got)
		}
	}
}
