package faults

import (
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/drafter-vm/drafter/pkg/migrate"
)

var (
	long  = flag.Bool("long", false, "run the whole sweep, as make test-faults does, instead of the part that make test runs")
	seeds = flag.Int("seeds", 0, "how many seeds to try (0: 30, or 400 with -long)")
	seed  = flag.Uint64("seed", 0, "try this seed alone, which a failing test has printed")
)

var logged = flag.Bool("log", false, "show what the engines log")

func TestMain(m *testing.M) {
	flag.Parse()
	if *logged {
		Log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	begun := time.Now()
	status := m.Run()
	if *long {
		fmt.Printf("faults: the sweep took %v\n", time.Since(begun).Round(time.Second))
	}
	os.Exit(status)
}

// eachSeed calls f with every seed of this run, as a subtest in fake time.
func eachSeed(t *testing.T, short, whole int, f func(t *testing.T, seed uint64)) {
	n := short
	if *long {
		n = whole
	}
	if *seeds > 0 {
		n = *seeds
	}
	first := uint64(1)
	if *seed > 0 {
		first, n = *seed, 1
	}
	for s := first; s < first+uint64(n); s++ {
		t.Run(fmt.Sprint(s), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f(t, s)
				if t.Failed() {
					t.Logf("again: go test ./internal/faults -run '%s' -seed %d", strings.TrimRight(t.Name(), "0123456789"), s)
				}
			})
		})
		if t.Failed() {
			return
		}
	}
}

// newDir is a folder for what a world keeps in files: in memory, where a flush costs nothing.
func newDir(t *testing.T) string {
	dir, err := os.MkdirTemp("/dev/shm", "faults")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// begin makes a world of two hosts, which ends with the test.
func begin(t *testing.T, seed uint64) (w *World, a, b *Host) {
	w = NewWorld(seed, newDir(t), "a", "b")
	t.Cleanup(func() {
		w.Close()
		for _, wrong := range w.Wrong() {
			t.Error(wrong)
		}
	})
	return w, w.Hosts[0], w.Hosts[1]
}

// check holds what a world has become against the promises, after a migration and what followed from it.
func (w *World) check(t *testing.T) (owner *Host) {
	t.Helper()
	runs := w.Runs()
	if len(runs) != 1 {
		t.Errorf("the guest runs on %v, want exactly one host; records %v", runs, w.records())
		return nil
	}
	time.Sleep(50 * tick) // it goes on
	if vm := runs[0].machine(); vm == nil {
		t.Errorf("the machine on %s has died", runs[0])
	} else if err := vm.verify(); err != nil {
		t.Error(err)
	}
	return runs[0]
}

func (w *World) records() (out []string) {
	for _, h := range w.Hosts {
		out = append(out, fmt.Sprintf("%s: %v", h, h.Record()))
	}
	return out
}

// settle checks what the sides say of a migration in which no process was killed, has the world recover, and checks again.
func (w *World) settle(t *testing.T, r Result, source, destination *Host) (owner *Host) {
	t.Helper()
	runs := len(w.Runs())
	inDoubt := errors.Is(r.SourceErr, migrate.ErrInDoubt)
	switch {
	case source.runs() && (r.SourceErr == nil && r.Source.Outcome != "copied" || inDoubt):
		t.Errorf("the guest runs at the source, which says otherwise")
	case runs == 0 && !inDoubt && r.Source.Outcome != "stuck" && !errors.Is(r.SourceErr, migrate.ErrUnsettled):
		t.Errorf("the guest runs nowhere, without a doubt at the source")
	}
	if err := w.Recover(); err != nil {
		t.Error(err)
	}
	owner = w.check(t)
	if t.Failed() {
		t.Logf("%v; records %v", r, w.records())
	}
	return owner
}

func TestMove(t *testing.T) {
	t.Parallel()
	for _, mode := range Modes() {
		for _, streams := range []int{1, 3} {
			t.Run(fmt.Sprintf("%v over %d", mode, streams), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					w, a, b := begin(t, 1)
					for n := range 4 {
						r := w.Move(a, b, Migration{ID: fmt.Sprintf("%d.s", n), Mode: mode, Streams: streams})
						if mode == Copying {
							if owner := w.settle(t, r, a, b); owner != a {
								t.Fatalf("after the copy the guest is on %v: %v", owner, r)
							}
							continue
						}
						if owner := w.settle(t, r, a, b); owner != b {
							t.Fatalf("after the move the guest is on %v: %v", owner, r)
						}
						a, b = b, a
					}
				})
			})
		}
	}
}

// passes is what goes over the link of a migration without faults.
func passes(t *testing.T, m Migration) map[Direction]Passed {
	out := map[Direction]Passed{}
	synctest.Test(t, func(t *testing.T) {
		w, a, b := begin(t, 1)
		m.Link = NewLink()
		r := w.Move(a, b, m)
		w.settle(t, r, a, b)
		for _, d := range Directions {
			out[d] = m.Link.Passed(d, 0)
		}
	})
	return out
}

// TestEveryFrame ends the link after every frame of a small migration, in every way, and checks that what became of it is what
// a link without faults or nothing would have made.
func TestEveryFrame(t *testing.T) {
	t.Parallel()
	for _, mode := range Modes() {
		for _, reconnect := range []bool{false, true} {
			m := Migration{ID: "m", Mode: mode, Reconnect: reconnect}
			t.Run(fmt.Sprintf("%v,reconnect=%t", mode, reconnect), func(t *testing.T) {
				whole := passes(t, m)
				owners, runs := map[string]int{}, 0
				for _, kind := range []Kind{Cut, Truncate, Stall, Blackout} {
					for _, d := range Directions {
						step := 1
						if !*long {
							step = 1 + len(whole[d].Frames)/5
						}
						for frame := 0; frame <= len(whole[d].Frames); frame++ {
							if frame%step != 0 && frame < len(whole[d].Frames)-3 {
								continue // the last ones decide who has the guest: they are always tried
							}
							f := Fault{Kind: kind, Direction: d, At: Point{Frames: frame}}
							runs++
							synctest.Test(t, func(t *testing.T) {
								w, a, b := begin(t, 1)
								m := m
								m.Link = NewLink(f)
								owners[fmt.Sprint(w.settle(t, w.Move(a, b, m), a, b))]++
							})
							if t.Failed() {
								t.Fatalf("%v", f)
							}
						}
					}
				}
				t.Logf("%d migrations; %v to the destination, %v to the source; the guest ended on %v", runs, whole[ToDestination], whole[ToSource], owners)
				if runs < 20 {
					t.Errorf("only %d migrations were tried", runs)
				}
			})
		}
	}
}

// TestDamage changes one bit of what a destination takes in, mostly when its guest runs already: what is damaged must not reach it.
func TestDamage(t *testing.T) {
	t.Parallel()
	m := Migration{ID: "m", Mode: PostCopy, Reconnect: true}
	whole := passes(t, m)[ToDestination].Bytes
	eachSeed(t, 60, 3000, func(t *testing.T, seed uint64) {
		r := rand.New(rand.NewPCG(seed, 5))
		m := m
		m.Streams = 1 + 2*r.IntN(2)
		at := Point{Bytes: whole/4 + r.Int64N(whole*3/4)}
		if m.Streams > 1 {
			at.Bytes = r.Int64N(whole)
		}
		m.Link = NewLink(Fault{Kind: Flip, Direction: ToDestination, Stream: r.IntN(m.Streams), At: at})
		w, a, b := begin(t, seed)
		result := w.Move(a, b, m)
		w.settle(t, result, a, b)
		if t.Failed() {
			t.Logf("%v over %d streams", at, m.Streams)
		}
	})
}

// TestRandomFaults has one to three random faults on the streams of each migration, cuts while meeting again among them.
func TestRandomFaults(t *testing.T) {
	t.Parallel()
	whole := map[Mode]map[Direction]int64{}
	for _, mode := range Modes() {
		whole[mode] = map[Direction]int64{}
		for d, p := range passes(t, Migration{ID: "m", Mode: mode}) {
			whole[mode][d] = p.Bytes
		}
	}
	eachSeed(t, 30, 1500, func(t *testing.T, seed uint64) {
		r := rand.New(rand.NewPCG(seed, 2))
		mode := Modes()[r.IntN(int(numModes))]
		m := Migration{ID: "m", Mode: mode, Streams: 1 + r.IntN(3), Reconnect: r.IntN(3) > 0}
		var faults []Fault
		for range 1 + r.IntN(3) {
			faults = append(faults, Random(r, 2*m.Streams, whole[mode]))
		}
		m.Link = NewLink(faults...)
		w, a, b := begin(t, seed)
		result := w.Move(a, b, m)
		w.settle(t, result, a, b)
		if t.Failed() {
			t.Logf("%v over %d streams, reconnect %t, faults %v", mode, m.Streams, m.Reconnect, faults)
		}
	})
}
