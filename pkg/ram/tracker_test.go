package ram

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/block/blocktest"
)

const testSize = 16 << 20

// mirror is what the other end of a migration would have.
type mirror struct {
	t    testing.TB
	dev  block.Device
	data []byte
}

func newMirror(t testing.TB, mem *Memory) *mirror {
	dev := mem.Device()
	return &mirror{t, dev, make([]byte, dev.Size())}
}

// copyAll is round 0: everything there is data for.
func (m *mirror) copyAll() {
	m.t.Helper()
	for off := int64(0); ; {
		r, err := m.dev.(block.Extents).NextData(off)
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			m.t.Fatal(err)
		}
		m.copy([]block.Range{r})
		off = r.End()
	}
}

func (m *mirror) copy(ranges []block.Range) {
	m.t.Helper()
	for _, r := range ranges {
		if _, err := m.dev.ReadAt(m.data[r.Offset:r.End()], r.Offset); err != nil {
			m.t.Fatal(err)
		}
	}
}

// differing lists the pages in which the memory is not as the mirror. It reads without disturbing a hashing tracker.
func (m *mirror) differing(mem *Memory) (pages []int64) {
	m.t.Helper()
	now := make([]byte, len(m.data))
	if _, err := mem.file.ReadAt(now, 0); err != nil {
		m.t.Fatal(err)
	}
	for off := 0; off < len(now); off += pageSize {
		if string(now[off:off+pageSize]) != string(m.data[off:off+pageSize]) {
			pages = append(pages, int64(off/pageSize))
		}
	}
	return pages
}

func collect(t testing.TB, tr block.Tracker) []block.Range {
	t.Helper()
	ranges, err := tr.Collect(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	end := int64(-1)
	for _, r := range ranges {
		if r.Offset <= end || r.Length <= 0 || r.Offset%pageSize != 0 || r.Length%pageSize != 0 {
			t.Fatalf("ranges are not in order, apart or aligned: %v after %d", r, end)
		}
		end = r.End()
	}
	return ranges
}

func pagesOf(ranges []block.Range) map[int64]bool {
	pages := map[int64]bool{}
	for _, r := range ranges {
		for off := r.Offset; off < r.End(); off += pageSize {
			pages[off/pageSize] = true
		}
	}
	return pages
}

var rungs = []Rung{Full, Lazy, Eager}

// TestTrackerExact compares each Collect with a comparison of all contents, the VMM standing still meanwhile.
func TestTrackerExact(t *testing.T) {
	needFull(t)
	for _, rung := range rungs {
		t.Run(rung.String(), func(t *testing.T) {
			checkLeaks(t)
			mem := create(t, testSize)
			v := startVMM(t, mem, Options{Limit: rung})
			v.attach(mem)
			v.do("scribble 1 2000") // some populated, most not
			tr := mem.Tracker()
			if err := tr.Start(testContext(t)); err != nil {
				t.Fatal(err)
			}
			m := newMirror(t, mem)
			m.copyAll()
			if got := collect(t, tr); len(got) != 0 {
				t.Errorf("reported %v when nothing was written", got)
			}
			missed, reported, changed := 0, 0, 0
			for round := range 20 {
				v.do("scribble %d %d", 100+round, 1+round*100)
				if round%3 == 0 { // our own writes count as well
					if _, err := mem.Device().WriteAt([]byte{1, 2, 3, byte(round)}, int64(round)*pageSize*10+pageSize-2); err != nil {
						t.Fatal(err)
					}
				}
				if round%5 == 0 {
					if err := mem.Device().Discard(int64(round)*pageSize, 3*pageSize); err != nil {
						t.Fatal(err)
					}
				}
				diff := m.differing(mem)
				ranges := collect(t, tr)
				pages := pagesOf(ranges)
				for _, page := range diff {
					if !pages[page] {
						missed++
					}
				}
				reported, changed = reported+len(pages), changed+len(diff)
				m.copy(ranges)
				if diff := m.differing(mem); len(diff) > 0 {
					t.Fatalf("round %d: %d pages still differ after the copy", round, len(diff))
				}
			}
			t.Logf("%d pages changed, %d reported, %d missed", changed, reported, missed)
			if missed > 0 {
				t.Errorf("%d of %d changed pages were not reported", missed, changed)
			}
			// Writes of the same value, and the holes punched that were holes already, are all that may be extra.
			if extra := reported - changed; extra > changed/20 {
				t.Errorf("%d pages reported, only %d changed", reported, changed)
			}
			if err := tr.Stop(); err != nil {
				t.Error(err)
			}
			if err := tr.Stop(); err != nil {
				t.Error(err)
			}
			if _, err := tr.Collect(context.Background()); err == nil {
				t.Error("collected after Stop")
			}
			// And once more: nothing of the first time is left.
			if err := tr.Start(testContext(t)); err != nil {
				t.Fatal(err)
			}
			m.copyAll()
			v.do("poke 4096 9")
			v.do("poke 4096 8")
			if got := collect(t, tr); len(got) != 1 || got[0] != (block.Range{Offset: pageSize, Length: pageSize}) {
				t.Errorf("after one write: %v", got)
			}
			if err := tr.Stop(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestTrackerConcurrent collects and copies while the VMM writes, then pauses it, as a migration does.
func TestTrackerConcurrent(t *testing.T) {
	needFull(t)
	for _, rung := range rungs {
		t.Run(rung.String(), func(t *testing.T) {
			checkLeaks(t)
			mem := create(t, testSize)
			v := startVMM(t, mem, Options{Limit: rung})
			v.attach(mem)
			v.do("churn 5 3")
			tr := mem.Tracker()
			if err := tr.Start(testContext(t)); err != nil {
				t.Fatal(err)
			}
			m := newMirror(t, mem)
			m.copyAll()
			for range 25 {
				m.copy(collect(t, tr))
			}
			v.do("stop")
			last := collect(t, tr)
			m.copy(last)
			if diff := m.differing(mem); len(diff) > 0 {
				t.Errorf("%d pages were missed", len(diff))
			}
			if got := collect(t, tr); len(got) > 0 {
				t.Errorf("reported %d pages when nothing was written", len(pagesOf(got)))
			}
			if err := tr.Stop(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestTrackerHashingReversal is why hashing compares with what was read: a page copied between a change and its
// reversal is different from what it was at each Collect.
func TestTrackerHashingReversal(t *testing.T) {
	checkLeaks(t)
	mem := create(t, 4*pageSize)
	dev := mem.Device()
	write := func(b byte) {
		t.Helper()
		if _, err := dev.WriteAt([]byte{b}, pageSize); err != nil {
			t.Fatal(err)
		}
	}
	write(1)
	tr := mem.Tracker()
	if err := tr.Start(testContext(t)); err != nil {
		t.Fatal(err)
	}
	m := newMirror(t, mem)
	m.copyAll()
	write(2)
	ranges := collect(t, tr)
	write(3)
	m.copy(ranges) // has 3
	write(2)
	m.copy(collect(t, tr))
	if diff := m.differing(mem); len(diff) > 0 {
		t.Error("a reversed change was missed")
	}
	// Reading a part makes the whole unknown.
	if _, err := dev.ReadAt(make([]byte, 10), pageSize+100); err != nil {
		t.Fatal(err)
	}
	if got := collect(t, tr); len(got) != 1 {
		t.Errorf("after reading a part: %v", got)
	}
	if err := tr.Stop(); err != nil {
		t.Error(err)
	}
}

// TestTrackerAliases has the memory mapped in pieces, one of them twice.
func TestTrackerAliases(t *testing.T) {
	needFull(t)
	checkLeaks(t)
	mem := create(t, 2<<20)
	v := startVMM(t, mem, Options{})
	v.do("mapsplit")
	if err := mem.Attach(testContext(t), v.h); err != nil {
		t.Fatal(err)
	}
	tr := mem.Tracker()
	if err := tr.Start(testContext(t)); err != nil {
		t.Fatal(err)
	}
	for _, at := range []int64{0, 1<<20 + 4096, 2<<20 + 8192, 2<<20 + 100} {
		v.do("poke %d 1", at)
	}
	want := []block.Range{{Offset: 0, Length: 4096}, {Offset: 8192, Length: 4096}, {Offset: 1<<20 + 4096, Length: 4096}}
	if got := collect(t, tr); fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if err := tr.Stop(); err != nil {
		t.Error(err)
	}
}

func TestTrackerMisuse(t *testing.T) {
	needFull(t)
	checkLeaks(t)
	mem := create(t, testSize)
	v := startVMM(t, mem, Options{})
	v.attach(mem)
	tr := mem.Tracker()
	if _, err := tr.Collect(context.Background()); err == nil {
		t.Error("collected before Start")
	}
	cancelled, cancel := context.WithCancel(context.Background())
	cancel()
	if err := tr.Start(cancelled); !errors.Is(err, context.Canceled) {
		t.Errorf("start with a cancelled context: %v", err)
	}
	if err := tr.Start(testContext(t)); err != nil {
		t.Fatal(err)
	}
	if err := tr.Start(testContext(t)); err == nil {
		t.Error("started twice")
	}
	if err := mem.Tracker().Start(testContext(t)); err == nil {
		t.Error("started a second tracker")
	}
	if _, err := mem.Fill(testContext(t), strings.NewReader(""), FillOptions{}); err == nil || !strings.Contains(err.Error(), "tracked") {
		t.Errorf("fill while tracking: %v", err)
	}
	// What a Collect that failed had already taken is in the next one.
	v.do("poke 4096 1")
	if _, err := mem.Device().WriteAt([]byte{1}, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := tr.Collect(cancelled); !errors.Is(err, context.Canceled) {
		t.Errorf("collect with a cancelled context: %v", err)
	}
	if got := collect(t, tr); len(got) != 1 || got[0].Length != 2*pageSize {
		t.Errorf("after a failed collect: %v", got)
	}
	// An address space that is gone must not look clean.
	v.kill()
	if got, err := tr.Collect(testContext(t)); !errors.Is(err, ErrProcessEnded) {
		t.Errorf("collect of a dead VMM: %v, %v", got, err)
	}
	if err := tr.Stop(); err != nil {
		t.Error(err)
	}
	if err := tr.Start(testContext(t)); !errors.Is(err, ErrProcessEnded) {
		t.Errorf("start on a dead VMM: %v", err)
	}
}

func TestTrackerUnmappedPages(t *testing.T) {
	needFull(t)
	checkLeaks(t)
	mem := create(t, testSize)
	v := startVMM(t, mem, Options{})
	v.attach(mem)
	v.do("poke 0 1")
	tr := mem.Tracker()
	if err := tr.Start(testContext(t)); err != nil {
		t.Fatal(err)
	}
	v.do("poke 8192 1")
	v.do("dontneed 0 16384") // a page that was written must stay reported when its mapping is gone
	if got := pagesOf(collect(t, tr)); !got[2] {
		t.Errorf("a written and unmapped page is missed: %v", got)
	}
	v.do("poke 4096 2")
	if got := pagesOf(collect(t, tr)); !got[1] {
		t.Errorf("a page written after it was unmapped is missed: %v", got)
	}
	if err := tr.Stop(); err != nil {
		t.Error(err)
	}
}

// TestTrackerSuite runs the contract's own suite, the VMM's part played by Device.
func TestTrackerSuite(t *testing.T) {
	needFull(t)
	checkLeaks(t)
	for _, rung := range rungs {
		t.Run(rung.String(), func(t *testing.T) {
			blocktest.RunTracker(t, func(t *testing.T) blocktest.TrackerSubject {
				mem := create(t, 1<<20)
				v := startVMM(t, mem, Options{Limit: rung})
				v.attach(mem)
				dev := mem.Device()
				return blocktest.TrackerSubject{
					Tracker: mem.Tracker(), Size: mem.Size(), Overreports: rung != Full,
					Write: func(p []byte, off int64) error { _, err := dev.WriteAt(p, off); return err },
					Read:  func(p []byte, off int64) error { _, err := dev.ReadAt(p, off); return err },
				}
			})
		})
	}
}
