package ram

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/drafter-vm/drafter/pkg/block"
)

// source is contents in memory; its reads can be held up and made to fail.
type source struct {
	data []byte
	// before is called first; an error is returned.
	before func(off, n int64) error
	reads  atomic.Int64
}

func newSource(data []byte) *source { return &source{data: data} }

func (s *source) ReadAt(p []byte, off int64) (int, error) {
	s.reads.Add(1)
	if s.before != nil {
		if err := s.before(off, int64(len(p))); err != nil {
			return 0, err
		}
	}
	return bytes.NewReader(s.data).ReadAt(p, off)
}

// sparse is a source that knows its holes.
type sparse struct{ *source }

func (s sparse) NextData(off int64) (block.Range, error) {
	zero := make([]byte, pageSize)
	start := int64(-1)
	for page := off / pageSize; page < int64(len(s.data))/pageSize; page++ {
		hole := bytes.Equal(s.data[page*pageSize:(page+1)*pageSize], zero)
		switch {
		case hole && start >= 0:
			return block.Range{Offset: start, Length: page*pageSize - start}, nil
		case !hole && start < 0:
			start = max(page*pageSize, off)
		}
	}
	if start < 0 {
		return block.Range{}, io.EOF
	}
	return block.Range{Offset: start, Length: int64(len(s.data)) - start}, nil
}

func startFill(t testing.TB, mem *Memory, src io.ReaderAt, opts FillOptions) *Filler {
	t.Helper()
	f, err := mem.Fill(t.Context(), src, opts)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func wait(t testing.TB, f *Filler) {
	t.Helper()
	if err := f.Wait(testContext(t)); err != nil {
		t.Fatal(err)
	}
	if s := f.Stats(); s.Remaining != 0 {
		t.Errorf("filled, but %d bytes remain", s.Remaining)
	}
}

// eventually waits until something outside of our process has come about.
func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	ctx := testContext(t)
	for tick := time.NewTicker(time.Millisecond); !cond(); {
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("still waiting for: %s", what)
		}
	}
}

// settled checks that a complete filling has left nothing behind.
func settled(t testing.TB, mem *Memory) {
	t.Helper()
	mem.mu.Lock()
	defer mem.mu.Unlock()
	if mem.mode&modeMissing != 0 || mem.filler.Load() != nil {
		t.Errorf("mode %d, filler %v", mem.mode, mem.filler.Load())
	}
}

// TestFill fills under readers that check every page, on every rung, with and without known holes.
func TestFill(t *testing.T) {
	needFull(t)
	data := contents(testSize, 1)
	nonzero := int64(0)
	for page := range int64(testSize / pageSize) {
		if page%7 != 3 {
			nonzero += pageSize
		}
	}
	for _, rung := range rungs {
		for name, src := range map[string]io.ReaderAt{"plain": newSource(data), "sparse": sparse{newSource(data)}} {
			for _, user := range []string{"root", "nobody"} {
				t.Run(fmt.Sprintf("%s/%s/%s", rung, name, user), func(t *testing.T) {
					checkLeaks(t)
					mem := create(t, testSize)
					v := startVMM(t, mem, Options{Limit: rung})
					if user == "nobody" {
						v.kill()
						v.h.Close()
						v = startVMM(t, mem, Options{Limit: rung}, asNobody)
					}
					v.attach(mem)
					v.do("populate") // zero pages that must not hide the contents
					f := startFill(t, mem, src, FillOptions{})
					select {
					case <-f.Ready():
					case <-time.After(time.Minute):
						t.Fatal("never ready")
					}
					if rung == Eager && f.Stats().Remaining > 0 {
						t.Error("ready before it was full")
					}
					if got := v.ask("verify 1 3"); got != "0" {
						t.Errorf("the VMM found %s wrong pages", got)
					}
					wait(t, f)
					settled(t, mem)
					if got := v.ask("verify 1 1"); got != "0" {
						t.Errorf("afterwards, the VMM found %s wrong pages", got)
					}
					s := f.Stats()
					t.Logf("%+v", s)
					if total := s.DemandBytes + s.FillBytes + s.ZeroBytes; total != testSize || s.ZeroBytes != testSize-uint64(nonzero) {
						t.Errorf("%d bytes delivered of %d, %d of them zero", total, testSize, s.ZeroBytes)
					}
					if err := f.Close(testContext(t)); err != nil {
						t.Error(err)
					}
				})
			}
		}
	}
}

// TestFillTakesNoMemoryForZeros counts what the memfd holds when nobody has read it.
func TestFillTakesNoMemoryForZeros(t *testing.T) {
	checkLeaks(t)
	mem := create(t, testSize)
	f := startFill(t, mem, newSource(contents(testSize, 1)), FillOptions{})
	wait(t, f)
	var st unix.Stat_t
	if err := unix.Fstat(int(mem.File().Fd()), &st); err != nil {
		t.Fatal(err)
	}
	if got, want := st.Blocks*512, int64(f.Stats().FillBytes); got != want || want > testSize*7/8 {
		t.Errorf("%d bytes are in use, %d were stored", got, want)
	}
}

// TestFillNeverOverwrites has the guest write pages while they arrive.
func TestFillNeverOverwrites(t *testing.T) {
	needFull(t)
	checkLeaks(t)
	for range 3 {
		mem := create(t, testSize)
		v := startVMM(t, mem, Options{})
		v.attach(mem)
		f := startFill(t, mem, newSource(contents(testSize, 1)), FillOptions{Streams: 3, Chunk: 64 << 10})
		v.do("overwrite 5 99")
		wait(t, f)
		want := contents(testSize, 1)
		for page := int64(0); page < testSize/pageSize; page += 5 {
			pattern(page, 99, want[page*pageSize:(page+1)*pageSize])
		}
		got := make([]byte, testSize)
		if _, err := mem.Device().ReadAt(got, 0); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Error("contents are not what the guest left")
		}
	}
}

// TestFillDemandOnly serves everything by faults.
func TestFillDemandOnly(t *testing.T) {
	needFull(t)
	for _, around := range []int64{-1, 0} {
		checkLeaks(t)
		mem := create(t, testSize)
		v := startVMM(t, mem, Options{})
		v.attach(mem)
		f := startFill(t, mem, newSource(contents(testSize, 1)), FillOptions{OnDemand: true, ReadAround: around})
		if got := v.ask("verify 1 4"); got != "0" {
			t.Errorf("the VMM found %s wrong pages", got)
		}
		wait(t, f)
		settled(t, mem)
		s := f.Stats()
		t.Logf("read around %d: %+v", around, s)
		if around < 0 && s.FillBytes != 0 || around == 0 && s.FillBytes == 0 {
			t.Errorf("%d bytes were read around with %d", s.FillBytes, around)
		}
	}
}

func TestFillSourceErrors(t *testing.T) {
	needFull(t)
	checkLeaks(t)
	mem := create(t, testSize)
	v := startVMM(t, mem, Options{})
	v.attach(mem)
	const bad = int64(1001 * pageSize)
	broken := errors.New("broken")
	var mended atomic.Bool
	src := newSource(contents(testSize, 1))
	src.before = func(off, n int64) error {
		if !mended.Load() && off < bad+10*pageSize && off+n > bad {
			return broken
		}
		return nil
	}
	var told atomic.Int64
	f := startFill(t, mem, src, FillOptions{
		Workers: 2, RetryMin: time.Millisecond, RetryMax: 5 * time.Millisecond,
		OnError: func(err error) {
			if !errors.Is(err, broken) {
				t.Errorf("told of %v", err)
			}
			told.Add(1)
		},
	})
	// More threads wait for what is broken than there are workers, and yet others are served.
	for i := range int64(6) {
		v.do("touch %d", bad+i*pageSize)
	}
	eventually(t, "many failures", func() bool { return told.Load() > 50 })
	want := make([]byte, pageSize)
	pattern(3000, 1, want)
	if got := v.ask("peek %d", 3000*pageSize); got != fmt.Sprint(want[0]) {
		t.Errorf("peek = %s, want %d", got, want[0])
	}
	if err := f.Err(); !errors.Is(err, broken) || errors.Is(err, ErrIncomplete) {
		t.Errorf("while failing: %v", err)
	}
	if _, err := mem.Device().ReadAt(make([]byte, 10), bad+5); !errors.Is(err, broken) {
		t.Errorf("device read: %v", err)
	}
	select {
	case <-f.Done():
		t.Error("done in spite of errors")
	default:
	}
	mended.Store(true)
	v.do("join")
	wait(t, f)
	if got := v.ask("verify 1 1"); got != "0" {
		t.Errorf("the VMM found %s wrong pages", got)
	}
}

// TestFillCancelAndResume ends a filling early, and has another go on with it.
func TestFillCancelAndResume(t *testing.T) {
	needFull(t)
	for _, rung := range []Rung{Full, Lazy} {
		t.Run(rung.String(), func(t *testing.T) {
			checkLeaks(t)
			mem := create(t, testSize)
			v := startVMM(t, mem, Options{Limit: rung})
			v.attach(mem)
			reason := errors.New("changed my mind")
			ctx, cancel := context.WithCancelCause(context.Background())
			src := newSource(contents(testSize, 1))
			var once sync.Once
			src.before = func(off, n int64) error {
				if off > testSize/2 {
					once.Do(func() { cancel(reason) })
					return reason
				}
				return nil
			}
			f, err := mem.Fill(ctx, src, FillOptions{Chunk: 64 << 10})
			if err != nil {
				t.Fatal(err)
			}
			v.do("write 1 77") // to be kept
			if err := f.Wait(testContext(t)); !errors.Is(err, ErrIncomplete) || !errors.Is(err, reason) {
				t.Errorf("after cancel: %v", err)
			}
			if err := f.Close(testContext(t)); !errors.Is(err, ErrIncomplete) {
				t.Errorf("close after cancel: %v", err)
			}
			// Who touches what is missing waits; it does not see zeros.
			v.do("touch %d", testSize-pageSize)
			if _, err := mem.Device().ReadAt(make([]byte, 1), testSize-pageSize); !errors.Is(err, ErrIncomplete) {
				t.Errorf("device read: %v", err)
			}
			if err := f.Deliver(testSize-pageSize, make([]byte, pageSize)); !errors.Is(err, ErrIncomplete) {
				t.Errorf("deliver: %v", err)
			}
			if _, err := mem.Fill(ctx, src, FillOptions{}); err == nil {
				t.Error("started over on a guest that may have run")
			}
			again := startFill(t, mem, newSource(contents(testSize, 1)), FillOptions{Resume: true})
			v.do("join")
			wait(t, again)
			settled(t, mem)
			v.do("write 1 1")
			if got := v.ask("verify 1 2"); got != "0" {
				t.Errorf("the VMM found %s wrong pages", got)
			}
		})
	}
}

// TestFillClosedByContext is Close with a context that ends first.
func TestFillClosedByContext(t *testing.T) {
	checkLeaks(t)
	mem := create(t, 1<<20)
	release := make(chan struct{})
	src := newSource(contents(1<<20, 1))
	src.before = func(off, n int64) error { <-release; return nil }
	f := startFill(t, mem, src, FillOptions{})
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := f.Wait(ctx); !errors.Is(err, context.Canceled) || errors.Is(err, ErrIncomplete) {
		t.Errorf("wait: %v", err)
	}
	go func() { <-f.ctx.Done(); close(release) }() // a read that is under way has to be ended by who owns the source
	if err := f.Close(ctx); !errors.Is(err, ErrIncomplete) {
		t.Errorf("close: %v", err)
	}
	select {
	case <-f.Ready():
		t.Error("ready, although incomplete and not lazy")
	default:
	}
}

func TestFillProcessDeath(t *testing.T) {
	needFull(t)
	checkLeaks(t)
	mem := create(t, testSize)
	v := startVMM(t, mem, Options{})
	v.attach(mem)
	src := newSource(contents(testSize, 1))
	src.before = func(off, n int64) error {
		if off >= testSize/2 {
			return errors.New("out of reach")
		}
		return nil
	}
	f := startFill(t, mem, src, FillOptions{})
	v.do("touch %d", testSize-pageSize)
	v.kill()
	if err := f.Wait(testContext(t)); !errors.Is(err, ErrProcessEnded) || !errors.Is(err, ErrIncomplete) {
		t.Errorf("got %v", err)
	}
	if err := mem.Close(); err != nil {
		t.Errorf("close: %v", err)
	}
}

// TestMemoryCloseWhileFilling leaves the VMM waiting rather than let it see zeros.
func TestMemoryCloseWhileFilling(t *testing.T) {
	needFull(t)
	checkLeaks(t)
	mem := create(t, 1<<20)
	v := startVMM(t, mem, Options{})
	v.attach(mem)
	f, err := mem.Receive(t.Context(), func(int64) {}, FillOptions{})
	if err != nil {
		t.Fatal(err)
	}
	v.do("touch 0")
	if err := mem.Close(); !errors.Is(err, ErrIncomplete) {
		t.Errorf("close: %v", err)
	}
	if err := f.Err(); !errors.Is(err, ErrIncomplete) || !errors.Is(err, os.ErrClosed) {
		t.Errorf("filler: %v", err)
	}
}

// TestFillBalloon has the VMM give back pages that had arrived: they are zero afterwards, and do not block.
func TestFillBalloon(t *testing.T) {
	needFull(t)
	checkLeaks(t)
	mem := create(t, 1<<20)
	v := startVMM(t, mem, Options{})
	v.attach(mem)
	f := startFill(t, mem, newSource(contents(1<<20, 1)), FillOptions{OnDemand: true})
	if got := v.ask("peek 8192"); got == "0" {
		t.Error("page 2 is zero")
	}
	v.do("punch 8192 4096")
	if got := v.ask("peek 8192"); got != "0" {
		t.Errorf("a page given back holds %s", got)
	}
	v.do("poke 8192 3")
	if got := v.ask("peek 8192"); got != "3" {
		t.Errorf("after writing 3: %s", got)
	}
	if got := v.ask("verify 1 1"); got != "1" {
		t.Errorf("%s pages differ, want the one given back", got)
	}
	wait(t, f)
}

// TestFillRanges is what follows pre-copy: most of the memory is there, some pages of it are stale and come later.
func TestFillRanges(t *testing.T) {
	needFull(t)
	for _, rung := range rungs {
		t.Run(rung.String(), func(t *testing.T) {
			checkLeaks(t)
			mem := create(t, testSize)
			stale := contents(testSize, 1)
			var ranges []block.Range
			for page := int64(0); page+3 <= testSize/pageSize; page += 11 {
				ranges = append(ranges, block.Range{Offset: page * pageSize, Length: 3 * pageSize})
				clear(stale[page*pageSize : (page+3)*pageSize])
				stale[page*pageSize] = 0xEE
			}
			if _, err := mem.Device().WriteAt(stale, 0); err != nil {
				t.Fatal(err)
			}
			v := startVMM(t, mem, Options{Limit: rung})
			v.attach(mem)

			data := contents(testSize, 1)
			requests := make(chan int64, testSize/pageSize)
			f, err := mem.Receive(t.Context(), func(off int64) { requests <- off }, FillOptions{Ranges: ranges, Workers: 1})
			if err != nil {
				t.Fatal(err)
			}
			if got, want := f.Stats().Remaining, int64(len(ranges))*3*pageSize; got != want {
				t.Errorf("%d bytes remain, want %d", got, want)
			}
			// The other side: what is requested first, and in between the rest, in order.
			var other sync.WaitGroup
			other.Go(func() {
				for next := 0; ; {
					select {
					case off := <-requests:
						if err := f.Deliver(off, data[off:off+pageSize]); err != nil {
							t.Error(err)
						}
						continue
					default:
					}
					if next == len(ranges) {
						return
					}
					r := ranges[next]
					next++
					if err := f.Deliver(r.Offset, data[r.Offset:r.End()]); err != nil {
						t.Error(err)
					}
				}
			})
			<-f.Ready()
			if got := v.ask("verify 1 3"); got != "0" {
				t.Errorf("the VMM found %s wrong pages", got)
			}
			other.Wait()
			wait(t, f)
			settled(t, mem)
			if got := f.Wanted(); len(got) > 0 {
				t.Errorf("still wanted: %d", got)
			}
			t.Logf("%+v", f.Stats())
		})
	}
}

func TestReceiveWanted(t *testing.T) {
	needFull(t)
	checkLeaks(t)
	mem := create(t, 1<<20)
	v := startVMM(t, mem, Options{})
	v.attach(mem)
	requests := make(chan int64, 10)
	f, err := mem.Receive(t.Context(), func(off int64) { requests <- off }, FillOptions{})
	if err != nil {
		t.Fatal(err)
	}
	v.do("touch 8192")
	v.do("touch 8200")
	if off := <-requests; off != 8192 {
		t.Errorf("requested %d", off)
	}
	if got := f.Wanted(); len(got) != 1 || got[0] != 8192 {
		t.Errorf("wanted %d", got)
	}
	for _, bad := range [][2]int64{{1, 4096}, {0, 100}, {-4096, 4096}, {1 << 20, 4096}} {
		if err := f.Deliver(bad[0], make([]byte, bad[1])); err == nil {
			t.Errorf("delivered %d+%d", bad[0], bad[1])
		}
	}
	if err := f.Deliver(8192, bytes.Repeat([]byte{5}, pageSize)); err != nil {
		t.Fatal(err)
	}
	v.do("join")
	if got := f.Wanted(); len(got) != 0 {
		t.Errorf("wanted %d", got)
	}
	if err := f.DeliverZeros(0, 8192); err != nil {
		t.Fatal(err)
	}
	if got := v.ask("peek 4097"); got != "0" {
		t.Errorf("zeros are %s", got)
	}
	v.do("poke 8192 6")
	if err := f.Deliver(0, bytes.Repeat([]byte{7}, 1<<20)); err != nil { // comes too late for some
		t.Fatal(err)
	}
	wait(t, f)
	for off, want := range map[int]string{0: "0", 8192: "6", 8193: "5", 12288: "7"} {
		if got := v.ask("peek %d", off); got != want {
			t.Errorf("byte %d is %s, want %s", off, got, want)
		}
	}
	if len(requests) > 0 {
		t.Errorf("%d more requests", len(requests))
	}
}

// TestFillWhileTracking has a migration begin before the resume it follows has ended.
func TestFillWhileTracking(t *testing.T) {
	needFull(t)
	for _, rung := range rungs {
		t.Run(rung.String(), func(t *testing.T) {
			checkLeaks(t)
			mem := create(t, testSize)
			v := startVMM(t, mem, Options{Limit: rung})
			v.attach(mem)
			hold := make(chan struct{})
			src := newSource(contents(testSize, 1))
			src.before = func(off, n int64) error {
				if off >= testSize/2 && n > 64<<10 {
					<-hold
				}
				return nil
			}
			f := startFill(t, mem, src, FillOptions{})
			if rung != Eager {
				v.do("write 10 50")
			}
			tr := mem.Tracker()
			if err := tr.Start(testContext(t)); err != nil {
				t.Fatal(err)
			}
			if rung == Eager {
				close(hold)
				wait(t, f)
			}
			v.do("overwrite 50 60")
			m := newMirror(t, mem)
			if rung != Eager {
				close(hold)
			}
			m.copyAll() // races with the background
			v.do("overwrite 51 61")
			m.copy(collect(t, tr))
			wait(t, f)
			v.do("overwrite 52 62")
			ranges := collect(t, tr)
			if rung == Full && len(pagesOf(ranges)) > testSize/pageSize/52+200 {
				t.Errorf("%d pages reported: arrivals count as writes", len(pagesOf(ranges)))
			}
			m.copy(ranges)
			if diff := m.differing(mem); len(diff) > 0 {
				t.Errorf("%d pages were missed", len(diff))
			}
			if err := tr.Stop(); err != nil {
				t.Error(err)
			}
			settled(t, mem)
		})
	}
}

func TestFillMisuse(t *testing.T) {
	checkLeaks(t)
	mem := create(t, 1<<20)
	for name, try := range map[string]func() (*Filler, error){
		"no source":     func() (*Filler, error) { return mem.Fill(t.Context(), nil, FillOptions{}) },
		"nobody to ask": func() (*Filler, error) { return mem.Receive(t.Context(), nil, FillOptions{}) },
		"half a page": func() (*Filler, error) {
			return mem.Fill(t.Context(), newSource(nil), FillOptions{Ranges: []block.Range{{Offset: 0, Length: 100}}})
		},
		"outside": func() (*Filler, error) {
			return mem.Fill(t.Context(), newSource(nil), FillOptions{Ranges: []block.Range{{Offset: 1 << 20, Length: pageSize}}})
		},
		"half a page first": func() (*Filler, error) {
			return mem.Fill(t.Context(), newSource(nil), FillOptions{First: []block.Range{{Offset: 100, Length: pageSize}}})
		},
		"first outside": func() (*Filler, error) {
			return mem.Fill(t.Context(), newSource(nil), FillOptions{First: []block.Range{{Offset: 0, Length: pageSize + 1<<20}}})
		},
		"small source": func() (*Filler, error) {
			small := create(t, 4096)
			return mem.Fill(t.Context(), small.Device(), FillOptions{})
		},
	} {
		if _, err := try(); err == nil {
			t.Errorf("%s: no error", name)
		} else {
			t.Logf("%s: %v", name, err)
		}
	}
	f, err := mem.Receive(t.Context(), func(int64) {}, FillOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := mem.Fill(t.Context(), newSource(nil), FillOptions{}); err == nil {
		t.Error("filled twice at once")
	}
	if err := f.DeliverZeros(0, 1<<20); err != nil {
		t.Fatal(err)
	}
	wait(t, f)
	f = startFill(t, mem, newSource(nil), FillOptions{Ranges: []block.Range{}})
	wait(t, f)
}

// TestFillStrayFaults: a VMM that was taken over by its guest can have us told of page faults that are none of its memory's, by the userfaultfd that
// it holds, too. They are nobody's but its own: its memory is filled, and its other threads served.
func TestFillStrayFaults(t *testing.T) {
	needFull(t)
	checkLeaks(t)
	const size = 4 << 20
	mem := create(t, size)
	v := startVMM(t, mem, Options{})
	v.attach(mem)
	f := startFill(t, mem, newSource(contents(size, 1)), FillOptions{OnDemand: true})
	v.do("stray")
	for page := range 8 {
		if got, want := v.ask("peek %d", page*pageSize), contents(size, 1)[page*pageSize]; got != strconv.Itoa(int(want)) {
			t.Errorf("page %d begins with %s, want %d", page, got, want)
		}
	}
	if got := v.ask("verify 1 2"); got != "0" {
		t.Errorf("%s pages differ", got)
	}
	wait(t, f)
	if s := f.Stats(); s.Failures != 0 || s.Faults > 2*size/pageSize {
		t.Errorf("of %d pages it has served %d faults, and failed %d times", size/pageSize, s.Faults, s.Failures)
	}
}
