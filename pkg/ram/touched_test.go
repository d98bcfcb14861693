package ram

import (
	"bytes"
	"fmt"
	"io"
	"slices"
	"sync"
	"testing"

	"github.com/drafter-vm/drafter/pkg/block"
)

// pageRanges are ranges, each of a page and how many follow it.
func pageRanges(pairs ...[2]int64) (ranges []block.Range) {
	for _, p := range pairs {
		ranges = append(ranges, block.Range{Offset: p[0] * pageSize, Length: p[1] * pageSize})
	}
	return ranges
}

// TestFillFirst brings some pages before all others, in the order that is given, and has them touched without a fault, zeros too.
func TestFillFirst(t *testing.T) {
	needFull(t)
	data := contents(testSize, 1)
	first := pageRanges([2]int64{700, 5}, [2]int64{3, 1}, [2]int64{90, 200}, [2]int64{10, 2}) // 3, 10, 703 and others are zero
	pages := int64(0)
	for _, r := range first {
		pages += r.Length / pageSize
	}
	for _, onDemand := range []bool{true, false} {
		t.Run(fmt.Sprintf("on demand %t", onDemand), func(t *testing.T) {
			checkLeaks(t)
			mem := create(t, testSize)
			v := startVMM(t, mem, Options{})
			v.attach(mem)
			v.do("populate") // zero pages that must not hide the contents
			var mu sync.Mutex
			var read []int64
			src := sparse{newSource(data)}
			src.before = func(off, n int64) error {
				mu.Lock()
				defer mu.Unlock()
				read = append(read, off/pageSize)
				return nil
			}
			f := startFill(t, mem, src, FillOptions{OnDemand: onDemand, First: first, Chunk: 64 * pageSize})
			eventually(t, "what is to come first", func() bool {
				return !slices.ContainsFunc(first, func(r block.Range) bool { return !f.present.hasAll(r.Offset/pageSize, r.End()/pageSize) })
			})
			mu.Lock()
			if want := []int64{700, 3, 90, 154, 218, 282, 10}; len(read) < len(want) || !slices.Equal(read[:len(want)], want) || onDemand && len(read) > len(want) {
				t.Errorf("pages were read in the order %d, want %d", read, want)
			}
			mu.Unlock()
			for _, r := range first {
				for off := r.Offset; off < r.End(); off += pageSize {
					if got := v.ask(fmt.Sprintf("peek %d", off)); got != fmt.Sprint(data[off]) {
						t.Errorf("at %d the VMM finds %s, want %d", off, got, data[off])
					}
				}
			}
			if s := f.Stats(); s.Faults != 0 || s.DemandBytes != 0 || onDemand && s.FillBytes != uint64(pages)*pageSize {
				t.Errorf("%d faults, %d bytes were demanded, %d were brought otherwise, want 0, 0 and %d", s.Faults, s.DemandBytes, s.FillBytes, pages*pageSize)
			}
			if got := v.ask("verify 1 3"); got != "0" {
				t.Errorf("the VMM found %s wrong pages", got)
			}
			f.Rest()
			wait(t, f)
			settled(t, mem)
		})
	}
}

// TestFillFirstFails leaves what cannot be read to whoever touches it.
func TestFillFirstFails(t *testing.T) {
	needFull(t)
	checkLeaks(t)
	mem := create(t, testSize)
	v := startVMM(t, mem, Options{})
	v.attach(mem)
	src := newSource(contents(testSize, 1))
	failures := 0
	src.before = func(off, n int64) error {
		if off == 8*pageSize && failures == 0 { // by the one goroutine that brings what is to come first
			failures++
			return io.ErrUnexpectedEOF
		}
		return nil
	}
	f := startFill(t, mem, src, FillOptions{First: pageRanges([2]int64{8, 4}, [2]int64{20, 1})})
	if got := v.ask("verify 1 3"); got != "0" {
		t.Errorf("the VMM found %s wrong pages", got)
	}
	wait(t, f)
	if failures == 0 || f.Stats().Failures != 0 {
		t.Errorf("of %d failures, %d are told", failures, f.Stats().Failures)
	}
	settled(t, mem)
}

// TestFillRecord notes what is touched, in order, and brings nothing else until that is asked for.
func TestFillRecord(t *testing.T) {
	needFull(t)
	data := contents(testSize, 1)
	for _, onDemand := range []bool{true, false} {
		t.Run(fmt.Sprintf("on demand %t", onDemand), func(t *testing.T) {
			checkLeaks(t)
			mem := create(t, testSize)
			v := startVMM(t, mem, Options{})
			v.attach(mem)
			f := startFill(t, mem, sparse{newSource(data)}, FillOptions{OnDemand: onDemand, Record: true})
			var want []int64
			for _, page := range []int64{500, 3, 7, 8, 500, 501, 10, 3, 0} { // 3 and 10 are zero
				off := page * pageSize
				if got := v.ask(fmt.Sprintf("peek %d", off+9)); got != fmt.Sprint(data[off+9]) {
					t.Errorf("at %d the VMM finds %s, want %d", off+9, got, data[off+9])
				}
				if !slices.Contains(want, off) {
					want = append(want, off)
				}
			}
			if got := f.present.count(0, testSize/pageSize); got != int64(len(want)) {
				t.Errorf("%d pages are there, %d were touched", got, len(want))
			}
			for range 2 {
				if got := f.Touched(); !slices.Equal(got, want) {
					t.Errorf("touched were %d, want %d", got, want)
				}
				v.ask(fmt.Sprintf("peek %d", 900*pageSize)) // after the recording
			}
			if got := v.ask("verify 1 3"); got != "0" {
				t.Errorf("the VMM found %s wrong pages", got)
			}
			f.Rest()
			wait(t, f)
			settled(t, mem)
		})
	}
}

// TestFillRecordEnds: a recording does not keep from anything whoever wants all of the memory.
func TestFillRecordEnds(t *testing.T) {
	needFull(t)
	data := contents(testSize, 1)
	for _, rung := range rungs {
		t.Run(rung.String(), func(t *testing.T) {
			checkLeaks(t)
			mem := create(t, testSize)
			v := startVMM(t, mem, Options{Limit: rung})
			v.attach(mem)
			f := startFill(t, mem, newSource(data), FillOptions{Record: true})
			if rung != Eager {
				f.Rest()
			}
			wait(t, f)
			got := make([]byte, testSize)
			if _, err := mem.Device().ReadAt(got, 0); err != nil || !bytes.Equal(got, data) {
				t.Errorf("the memory is wrong (%v)", err)
			}
			if touched := f.Touched(); len(touched) != 0 {
				t.Errorf("nothing was touched, and noted were %d", touched)
			}
		})
	}
}
