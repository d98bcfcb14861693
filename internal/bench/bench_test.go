package main

import (
	"bytes"
	"encoding/json"
	"encoding/xml"
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/drafter-vm/drafter/pkg/ram"
)

func TestMain(m *testing.M) {
	// The harness executes itself: here, that is the test's program.
	if role := os.Getenv(roleEnv); role != "" {
		playRole(role)
		return
	}
	os.Exit(m.Run())
}

// TestQuick runs every case that needs no machine, so that the harness cannot rot.
func TestQuick(t *testing.T) {
	out := t.TempDir()
	var cheap []string
	for _, c := range allCases() {
		if c.cheap {
			cheap = append(cheap, c.name)
		}
	}
	var stdout, stderr bytes.Buffer
	args := []string{"-quick", "-out", out, "-run", "^(" + strings.Join(cheap, "|") + ")$"}
	if err := run(t.Context(), args, &stdout, &stderr); err != nil {
		t.Fatalf("bench %q: %v\n%s", args, err, stderr.String())
	}
	f, err := readFile(filepath.Join(out, "bench-quick.json"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range cheap {
		rows := 0
		for _, r := range f.Rows {
			if r.Case != name {
				continue
			}
			rows++
			if len(r.Ours) == 0 || slices.ContainsFunc(r.Ours, math.IsNaN) {
				t.Errorf("%s, %s: samples %v", r.Case, r.Name, r.Ours)
			}
			if r.Goal != "" && r.Met == nil {
				t.Errorf("%s, %s: goal %s was not judged", r.Case, r.Name, r.Goal)
			}
		}
		if rows == 0 {
			t.Errorf("case %s has no row", name)
		}
		if !strings.Contains(stdout.String(), name) {
			t.Errorf("the table has no case %s:\n%s", name, stdout.String())
		}
	}
	picture, err := os.ReadFile(filepath.Join(out, "bench-quick.svg"))
	if err != nil {
		t.Fatal(err)
	}
	checkXML(t, picture)
	entries, err := os.ReadDir(out)
	if err != nil || len(entries) != 2 {
		t.Errorf("left %v, error %v; want a JSON file and a picture", entries, err)
	}
}

func TestUsage(t *testing.T) {
	for _, args := range [][]string{{"-run", "("}, {"-run", "no such case"}, {"-samples", "0"}, {"extra"}, {"-no-such-flag"}} {
		if err := run(t.Context(), append([]string{"-out", t.TempDir()}, args...), io.Discard, io.Discard); !errors.Is(err, errUsage) {
			t.Errorf("bench %q: error %v, want a usage error", args, err)
		}
	}
	if err := run(t.Context(), []string{"-h"}, io.Discard, io.Discard); !errors.Is(err, flag.ErrHelp) {
		t.Errorf("-h: error %v", err)
	}
}

func TestList(t *testing.T) {
	var out bytes.Buffer
	if err := run(t.Context(), []string{"-list"}, &out, io.Discard); err != nil {
		t.Fatal(err)
	}
	promises, err := os.ReadFile("../../docs/promises.md")
	if err != nil {
		t.Fatal(err)
	}
	names := map[string]bool{}
	for _, c := range allCases() {
		if names[c.name] {
			t.Errorf("two cases are called %s", c.name)
		}
		names[c.name] = true
		if !strings.Contains(out.String(), c.name) {
			t.Errorf("-list does not name %s", c.name)
		}
		if !strings.Contains(string(promises), "`"+c.name+"`") {
			t.Errorf("docs/promises.md says nothing of case %s", c.name)
		}
	}
}

func TestNewRow(t *testing.T) {
	met, missed := true, false
	for _, test := range []struct {
		name            string
		better          string
		ours, reference []float64
		goal            goal
		ratio           float64
		met             *bool
		verdict         string
	}{
		{"no goal", less, []float64{1, 2, 3}, nil, goal{}, 0, nil, ""},
		{"absolute, met", less, []float64{10, 30, 20}, nil, atMost(20, "ms"), 0, &met, "met"},
		{"absolute, missed", less, []float64{30}, nil, atMost(20, "ms"), 0, &missed, "missed by 50 %"},
		{"ratio of turns", more, []float64{1, 20, 300}, []float64{1, 10, 100}, ratioAtLeast(2), 2, &met, "met"},
		{"ratio of medians", more, []float64{8}, []float64{10, 10, 10}, ratioAtLeast(0.9), 0.8, &missed, "missed by 11 %"},
		{"ratio, less is better", less, []float64{3}, []float64{2}, ratioAtMost(1.5), 1.5, &met, "met"},
		{"within, faster", more, []float64{11}, []float64{10}, ratioWithin(2), 1.1, &met, "met"},
		{"within, slower", more, []float64{97}, []float64{100}, ratioWithin(2), 0.97, &missed, "missed by 1 %"},
		{"no samples of the reference", less, []float64{1}, nil, ratioAtMost(1), 0, nil, ""},
	} {
		r := newRow("case", test.name, "ms", test.better, test.ours, test.reference, "reference", test.goal)
		if math.Abs(r.Ratio-test.ratio) > 1e-9 {
			t.Errorf("%s: ratio %v, want %v", test.name, r.Ratio, test.ratio)
		}
		if (r.Met == nil) != (test.met == nil) || r.Met != nil && *r.Met != *test.met {
			t.Errorf("%s: met %v, want %v", test.name, r.Met, test.met)
		}
		if got := verdict(r); got != test.verdict {
			t.Errorf("%s: verdict %q, want %q", test.name, got, test.verdict)
		}
	}
}

func TestQuantile(t *testing.T) {
	for _, test := range []struct {
		values  []float64
		q, want float64
	}{
		{nil, 0.5, 0}, {[]float64{7}, 0.99, 7}, {[]float64{3, 1, 2}, 0.5, 2}, {[]float64{4, 1, 2, 3}, 0.5, 2.5}, {[]float64{0, 10}, 0.9, 9}, {[]float64{1, 2}, 1, 2},
	} {
		if got := quantile(test.values, test.q); math.Abs(got-test.want) > 1e-9 {
			t.Errorf("quantile(%v, %v) = %v, want %v", test.values, test.q, got, test.want)
		}
	}
}

func TestMerge(t *testing.T) {
	row := func(c, name string, ours float64) Row { return Row{Case: c, Name: name, Ours: []float64{ours}} }
	old := []Row{row("a", "x", 1), row("b", "x", 1), row("b", "gone", 1), row("no longer a case", "x", 1)}
	got := merge(old, []Row{row("b", "x", 2), row("b", "new", 2)}, []string{"a", "b", "c"})
	want := []Row{row("a", "x", 1), row("b", "x", 2), row("b", "new", 2)}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestNumber(t *testing.T) {
	for v, want := range map[float64]string{0: "0", 0.0123: "0.012", 1.234: "1.23", 12.34: "12.3", 1234.5: "1234", -2: "-2.00"} {
		if got := number(v); got != want {
			t.Errorf("number(%v) = %q, want %q", v, got, want)
		}
	}
}

// TestOffsets: a pass has one request in each stride, whole and aligned, and random ones in no order.
func TestOffsets(t *testing.T) {
	for _, op := range []deviceOp{{Request: 4096}, {Request: 4096, Random: true}, {Request: 4096, Stride: 65536, Random: true}} {
		stride := max(op.Request, op.Stride)
		offsets := op.offsets(1 << 20)
		if slices.IsSorted(offsets) == op.Random {
			t.Errorf("%+v: sorted: %t", op, !op.Random)
		}
		slices.Sort(offsets)
		if want := 1 << 20 / int(stride); len(offsets) != want {
			t.Errorf("%+v: %d requests, want %d", op, len(offsets), want)
		}
		for i, off := range offsets {
			if off%op.Request != 0 || off/stride != int64(i) {
				t.Errorf("%+v: request %d is at %d", op, i, off)
			}
		}
	}
}

// TestFootprint: memory of a file is found, and so is that of a process below.
func TestFootprint(t *testing.T) {
	before, err := footprintOf(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	memory, err := ram.Create("test", 4*mib)
	if err != nil {
		t.Fatal(err)
	}
	defer memory.Close()
	if err := fillDevice(memory.Device()); err != nil {
		t.Fatal(err)
	}
	below := exec.CommandContext(t.Context(), "sleep", "60") // until the test ends
	if err := below.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { below.Process.Kill(); below.Wait() }()
	after, err := footprintOf(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if got := after.files - before.files; got < 4*mib || got > 8*mib {
		t.Errorf("a memory file of 4 MiB counts as %d bytes", got)
	}
	if after.below <= before.below {
		t.Errorf("with a process below, those take %d bytes, before %d", after.below, before.below)
	}
}

// TestChart draws rows of all kinds, with a name that has to be escaped and values off the axis.
func TestChart(t *testing.T) {
	rows := []Row{
		newRow("a", "no goal & no reference", "ms", less, []float64{1}, nil, "", goal{}),
		newRow("a", "<goal>", "ms", less, []float64{1000}, nil, "", atMost(1, "ms")),
		newRow("b", "both", "MB/s", more, []float64{9}, []float64{10}, "other", ratioAtLeast(0.8)),
		newRow("b", "no goal", "MB/s", more, []float64{9}, []float64{10}, "other", goal{}),
		newRow("b", "met", "MB/s", more, []float64{9}, []float64{10}, "other", ratioAtLeast(0.5)),
		newRow("b", "zero", "MB/s", more, []float64{0}, []float64{10}, "other", ratioAtLeast(0.8)),
	}
	picture := drawChart(file{Machine: machine{CPU: "a <CPU>"}, Rows: rows})
	checkXML(t, picture)
	if bytes.Contains(picture, []byte("no goal &amp; no reference")) {
		t.Error("the picture has a row without a bar")
	}
	for _, want := range []string{"&lt;goal&gt;", metColour, missedColour, noGoalColour} {
		if !bytes.Contains(picture, []byte(want)) {
			t.Errorf("the picture has no %q", want)
		}
	}
	// What is written can be read, whatever the numbers are.
	if _, err := json.Marshal(file{Rows: rows}); err != nil {
		t.Error(err)
	}
}

func checkXML(t *testing.T, content []byte) {
	t.Helper()
	for d := xml.NewDecoder(bytes.NewReader(content)); ; {
		if _, err := d.Token(); errors.Is(err, io.EOF) {
			return
		} else if err != nil {
			t.Fatalf("the picture is no XML: %v", err)
		}
	}
}
