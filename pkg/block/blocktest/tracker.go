package blocktest

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"testing"

	"github.com/drafter-vm/drafter/pkg/block"
)

// TrackerSubject is a tracker and what it tracks.
type TrackerSubject struct {
	Tracker block.Tracker // what is tested
	Size    int64         // bytes, at least MinSize

	// Write changes what is tracked, by the way that the tracker watches. Read reads it back. Both are called concurrently,
	// though not for the same bytes.
	Write func(p []byte, off int64) error
	Read  func(p []byte, off int64) error

	// Overreports says that the first Collect may list what nobody wrote, as that of RAM does.
	Overreports bool
}

// RunTracker tests the trackers that make returns, a new one at each call. They do not run yet.
func RunTracker(t *testing.T, make func(t *testing.T) TrackerSubject) {
	for _, test := range []struct {
		name string
		run  func(t *testing.T, s TrackerSubject)
	}{
		{"Lifecycle", testTrackerLifecycle},
		{"Collect", testTrackerCollect},
		{"Again", testTrackerAgain},
		{"Cancelled", testTrackerCancelled},
		{"Converges", testTrackerConverges},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := make(t)
			t.Cleanup(func() {
				if err := s.Tracker.Stop(); err != nil {
					t.Errorf("Stop: %v", err)
				}
			})
			test.run(t, s)
		})
	}
}

func mustStart(t *testing.T, s TrackerSubject) {
	t.Helper()
	if err := s.Tracker.Start(context.Background()); err != nil {
		t.Fatalf("Start: %v", err)
	}
}

// collect returns what Collect does, and checks its form.
func collect(t *testing.T, s TrackerSubject) []block.Range {
	t.Helper()
	ranges, err := s.Tracker.Collect(context.Background())
	if err != nil {
		t.Fatalf("Collect: %v", err)
	}
	end := int64(0)
	for _, r := range ranges {
		if r.Offset < end || r.Length <= 0 || r.End() > s.Size {
			t.Fatalf("Collect returned %+v after %d, of %d bytes: ranges ascend, do not overlap, and lie within", r, end, s.Size)
		}
		if r.Offset%block.PageSize != 0 || (r.Length%block.PageSize != 0 && r.End() != s.Size) {
			t.Fatalf("Collect returned %+v, which is not aligned to pages", r)
		}
		end = r.End()
	}
	return ranges
}

func covers(ranges []block.Range, off, n int64) bool {
	for _, r := range ranges {
		if r.Offset <= off && off < r.End() {
			k := min(n, r.End()-off)
			off, n = off+k, n-k
		}
	}
	return n == 0
}

func testTrackerLifecycle(t *testing.T, s TrackerSubject) {
	ctx := context.Background()
	if err := s.Tracker.Stop(); err != nil {
		t.Errorf("Stop of a tracker that does not run: %v; want nil", err)
	}
	if _, err := s.Tracker.Collect(ctx); err == nil {
		t.Error("Collect of a tracker that does not run succeeded")
	}
	mustStart(t, s)
	if err := s.Tracker.Start(ctx); err == nil {
		t.Error("Start of a tracker that runs succeeded")
	}
	collect(t, s)
	for range 2 {
		if err := s.Tracker.Stop(); err != nil {
			t.Errorf("Stop: %v", err)
		}
	}
	if _, err := s.Tracker.Collect(ctx); err == nil {
		t.Error("Collect after Stop succeeded")
	}
}

func testTrackerCollect(t *testing.T, s TrackerSubject) {
	mustStart(t, s)
	first := collect(t, s)
	if len(first) > 0 && !s.Overreports {
		t.Errorf("Collect right after Start returned %v", first)
	}
	for _, w := range []block.Range{
		{Offset: 0, Length: 1}, {Offset: 4095, Length: 2}, {Offset: 8192, Length: 4096}, {Offset: 100_000, Length: 100_000},
		{Offset: 262_143, Length: 2}, {Offset: s.Size - 1, Length: 1}, {Offset: 0, Length: s.Size},
	} {
		if err := s.Write(random(newRand(1), w.Length), w.Offset); err != nil {
			t.Fatalf("Write(%d bytes, %d): %v", w.Length, w.Offset, err)
		}
		if ranges := collect(t, s); !covers(ranges, w.Offset, w.Length) {
			t.Errorf("Collect after a write of %d bytes at %d returned %v, which does not cover it", w.Length, w.Offset, ranges)
		}
	}
	if ranges := collect(t, s); len(ranges) > 0 && !s.Overreports {
		t.Errorf("Collect without a write returned %v", ranges)
	}
}

// testTrackerAgain starts a tracker that was stopped: what was written in between, and before, is forgotten, and what is
// written after is not.
func testTrackerAgain(t *testing.T, s TrackerSubject) {
	for round := range int64(3) {
		mustStart(t, s)
		if ranges := collect(t, s); len(ranges) > 0 && !s.Overreports {
			t.Errorf("Collect right after Start returned %v", ranges)
		}
		off := 20_000 * (round + 1)
		if err := s.Write(random(newRand(2), 10_000), off); err != nil {
			t.Fatalf("Write: %v", err)
		}
		if ranges := collect(t, s); !covers(ranges, off, 10_000) {
			t.Errorf("Collect in round %d returned %v, which does not cover what was written", round, ranges)
		}
		if err := s.Write(random(newRand(3), 10), 0); err != nil {
			t.Fatalf("Write: %v", err)
		}
		if err := s.Tracker.Stop(); err != nil {
			t.Fatalf("Stop: %v", err)
		}
	}
}

// testTrackerCancelled calls Collect with a context that has ended: it fails, and forgets nothing.
func testTrackerCancelled(t *testing.T, s TrackerSubject) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := s.Tracker.Start(ctx); !errors.Is(err, context.Canceled) {
		t.Fatalf("Start with a cancelled context: %v", err)
	}
	mustStart(t, s)
	collect(t, s)
	if err := s.Write(random(newRand(4), 10), 50_000); err != nil {
		t.Fatalf("Write: %v", err)
	}
	if _, err := s.Tracker.Collect(ctx); !errors.Is(err, context.Canceled) {
		t.Fatalf("Collect with a cancelled context: %v", err)
	}
	if ranges := collect(t, s); !covers(ranges, 50_000, 10) {
		t.Errorf("Collect returned %v: a cancelled Collect forgot a write", ranges)
	}
}

// testTrackerConverges does what a migration does: it copies what Collect lists, over and over, while writers write. When
// they have ended, one more round must make the copy the same.
func testTrackerConverges(t *testing.T, s TrackerSubject) {
	copied := newBytes(s.Size)
	copyRange := func(r block.Range) error { return s.Read(copied[r.Offset:r.End()], r.Offset) }
	mustStart(t, s)

	const writers = 4
	var wg sync.WaitGroup
	errs := make(chan error, writers)
	for w := range int64(writers) {
		part := block.Range{Offset: s.Size * w / writers, Length: s.Size*(w+1)/writers - s.Size*w/writers}
		wg.Go(func() {
			rng := newRand(uint64(w))
			for range 1500 {
				n := 1 + rng.Int64N(100)
				if err := s.Write(random(rng, n), part.Offset+rng.Int64N(part.Length-n)); err != nil {
					errs <- err
					return
				}
			}
		})
	}
	go func() {
		wg.Wait()
		close(errs)
	}()
	if err := copyRange(block.Range{Length: s.Size}); err != nil {
		t.Fatalf("Read: %v", err)
	}
	for last, rounds := false, 0; ; rounds++ {
		if !last {
			select {
			case err, ok := <-errs:
				if ok {
					t.Fatalf("Write: %v", err)
				}
				last = true // no more writes from here on
			default:
			}
		}
		for _, r := range collect(t, s) {
			if err := copyRange(r); err != nil {
				t.Fatalf("Read: %v", err)
			}
		}
		if last {
			t.Logf("%d rounds", rounds+1)
			break
		}
	}
	want := newBytes(s.Size)
	if err := s.Read(want, 0); err != nil {
		t.Fatalf("Read: %v", err)
	}
	if !bytes.Equal(copied, want) {
		t.Fatalf("the copy is not what it was copied from: %s", difference(copied, want, 0))
	}
}
