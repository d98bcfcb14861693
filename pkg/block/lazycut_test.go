package block

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

const simList = "state/disk.missing"

// simSource is what a lazy device of a simulated disk is to become: the contents, what of them is not there at first, and
// what is there instead.
type simSource struct {
	content, stale []byte
	missing        []Range
}

func newSimSource(rng *rand.Rand) *simSource {
	src := &simSource{content: make([]byte, simDeviceSize)}
	for i := range src.content {
		src.content[i] = byte(0x40 | i*i>>5&0x3f)
	}
	src.stale = bytes.Clone(src.content)
	for off := int64(0); off < simDeviceSize; off += PageSize {
		if rng.IntN(2) == 0 {
			r := Range{Offset: off, Length: min(PageSize, simDeviceSize-off)}
			src.missing = append(src.missing, r)
			for i := r.Offset; i < r.End(); i++ {
				src.stale[i] = 0xee // whoever sees that sees what the source has overwritten
			}
		}
	}
	return src
}

// open opens the lazy device. missing is what is missing if there is no list.
func (src *simSource) open(s *simStorage, base []byte, missing []Range) (*Lazy, error) {
	o, err := openSim(s, base, false)
	if err != nil {
		return nil, err
	}
	var l *Lazy
	l, err = newLazy(s, o, LazyOptions{Missing: missing, List: simList, Fetch: func(_ context.Context, r Range) error {
		return l.Fill(r.Offset, src.content[r.Offset:r.End()])
	}})
	if err != nil {
		return nil, errors.Join(err, o.Close())
	}
	return l, nil
}

// script does random things to a lazy device, and writes them down. It reads little, as reading brings what is missing.
func (src *simSource) script(t *testing.T, s *simStorage, l *Lazy, h *simHistory, rng *rand.Rand, n int) {
	t.Helper()
	model := bytes.Clone(h.last())
	for range n {
		step := simStep{begin: len(s.ops)}
		size := int64(sectorSize * (1 + rng.IntN([]int{1, 8, 40}[rng.IntN(3)])))
		off := rng.Int64N((simDeviceSize-size)/sectorSize+1) * sectorSize
		var err error
		switch rng.IntN(12) {
		case 0, 1, 2:
			p := make([]byte, size)
			for i := range p {
				p[i] = byte(0x80 | rng.Uint32()&0x5f)
			}
			copy(model[off:], p)
			_, err = l.WriteAt(p, off)
		case 3, 4:
			clear(model[off : off+size])
			err = l.Discard(off, size)
		case 5, 6, 7:
			var r Range
			if r, err = l.NextMissing(off); err == nil {
				r.Length = min(r.Length, PageSize*(1+rng.Int64N(3)))
				err = l.Fill(r.Offset, src.content[r.Offset:r.End()])
			} else if err == io.EOF {
				err = nil
			}
		case 8:
			p := make([]byte, size)
			if err = readFull(l, p, off); err == nil && !bytes.Equal(p, model[off:off+size]) {
				t.Fatal("the device is not what was written to it")
			}
		default:
			err = l.Flush()
			step.flushed = err == nil
		}
		if err != nil {
			t.Fatal(err)
		}
		step.end, step.after = len(s.ops), bytes.Clone(model)
		h.steps = append(h.steps, step)
	}
}

// TestPowerCutLazy cuts the power after each step that a lazy device with a list does to its files. Fetching again what is
// on the list then must give a device that has everything that was flushed, and nothing that the source had overwritten.
func TestPowerCutLazy(t *testing.T) {
	labels := make(map[string]int)
	for seed := range uint64(6) {
		t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
			rng := rand.New(rand.NewPCG(seed, 9))
			src, base, s := newSimSource(rng), simBase(), newSimStorage()
			o, err := openSim(s, base, false)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := o.WriteAt(src.stale, 0); err != nil {
				t.Fatal(err)
			}
			if err := o.Close(); err != nil {
				t.Fatal(err)
			}
			l, err := src.open(s, base, src.missing)
			if err != nil {
				t.Fatal(err)
			}
			if err := l.Flush(); err != nil { // the commit
				t.Fatal(err)
			}
			owned := len(s.ops)
			h := &simHistory{steps: []simStep{{end: owned, after: src.content, flushed: true}}}
			for life := range 3 {
				src.script(t, s, l, h, rng, 25)
				step := simStep{begin: len(s.ops), after: h.last(), flushed: true}
				if life == 2 {
					for off := int64(0); ; {
						r, err := l.NextMissing(off)
						if err == io.EOF {
							break
						}
						if err := l.Fill(r.Offset, src.content[r.Offset:r.End()]); err != nil {
							t.Fatal(err)
						}
						off = r.End()
					}
					if err := l.Complete(); err != nil {
						t.Fatal(err)
					}
				}
				if err := l.Close(); err != nil {
					t.Fatal(err)
				}
				step.end = len(s.ops)
				h.steps = append(h.steps, step)
				if life < 2 {
					if l, err = src.open(s, base, nil); err != nil {
						t.Fatal(err)
					}
				}
			}
			for n := owned; n <= len(s.ops); n++ {
				for mode := range cutModes + 2 {
					labels[s.label(n)]++
					left := s.cut(n, min(mode, cutSome), rng)
					missing := []Range{} // with no list, as after Complete, nothing
					l, err := src.open(left, base, missing)
					if err != nil {
						t.Fatalf("cut after step %d (%s): %v", n, s.label(n), err)
					}
					next := &simHistory{steps: []simStep{{after: nil}}}
					content := contentOf(t, l)
					checkSectors(t, content, h.candidates(n)...)
					next.steps[0].after = content
					src.script(t, left, l, next, rng, 6)
					if err := l.Complete(); err != nil {
						t.Fatal(err)
					}
					if left.names[simList] != nil {
						t.Fatal("the list of a complete device is left")
					}
					if err := l.Close(); err != nil {
						t.Fatal(err)
					}
					o, err := openSim(left, base, false)
					if err != nil {
						t.Fatal(err)
					}
					if !bytes.Equal(contentOf(t, o), next.last()) {
						t.Fatalf("cut after step %d (%s): the complete device differs", n, s.label(n))
					}
				}
			}
		})
	}
	t.Logf("last step before the cuts: %v", labels)
	for _, label := range []string{"append to list", "sync list", "write", "sync overlay", "sync state", "remove list"} {
		if labels[label] == 0 {
			t.Errorf("no cut came after the step %q", label)
		}
	}
}

// TestLazyListDamage flips each bit of a list: it is refused, or says the same.
func TestLazyListDamage(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 3))
	src, base, s := newSimSource(rng), simBase(), newSimStorage()
	l, err := src.open(s, base, src.missing)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Flush(); err != nil {
		t.Fatal(err)
	}
	r := src.missing[0]
	if err := l.Fill(r.Offset, src.content[r.Offset:r.End()]); err != nil {
		t.Fatal(err)
	}
	want := l.Missing()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	list := s.names[filepath.Join("state", "disk.missing")].data
	first := stateHeaderSize + batchHeaderSize
	for i := range list {
		for bit := range 8 {
			left := s.cut(len(s.ops), cutNothing, nil)
			damaged := bytes.Clone(list)
			damaged[i] ^= 1 << bit
			left.names[simList].data = damaged
			l, err := src.open(left, base, nil)
			if err != nil {
				continue
			}
			// Damage to the last append looks like one that was cut short: then more is fetched than need be.
			if n := l.Missing(); n < want || i < first && n != want {
				t.Fatalf("bit %d of byte %d flipped: %d bytes are missing, want %d", bit, i, n, want)
			}
		}
	}
}

// TestLazyListFails checks that a list that cannot be written fails the Flush, and is made good by the next one unless a
// sync failed.
func TestLazyListFails(t *testing.T) {
	for _, tt := range []struct {
		label string
		again bool
	}{{"create list", true}, {"write list", true}, {"sync new list", true}, {"rename list", true}, {"append to list", true}, {"sync list", false}} {
		t.Run(tt.label, func(t *testing.T) {
			src, base, s := newSimSource(rand.New(rand.NewPCG(1, 1))), simBase(), newSimStorage()
			l, err := src.open(s, base, src.missing)
			if err != nil {
				t.Fatal(err)
			}
			failed := false
			s.fail = func(_ int, op string) error {
				if op == tt.label && !failed {
					failed = true
					return syscall.ENOSPC
				}
				return nil
			}
			err = l.Flush()
			if !failed {
				r := src.missing[0]
				if err := l.Fill(r.Offset, src.content[r.Offset:r.End()]); err != nil {
					t.Fatal(err)
				}
				err = l.Flush()
			}
			if !errors.Is(err, syscall.ENOSPC) {
				t.Fatalf("Flush: %v", err)
			}
			want := l.Missing()
			if err := l.Flush(); (err == nil) != tt.again {
				t.Fatalf("the next Flush: %v", err)
			}
			if !tt.again {
				return
			}
			l, err = src.open(s.cut(len(s.ops), cutNothing, nil), base, nil)
			if err != nil {
				t.Fatal(err)
			}
			if l.Missing() != want {
				t.Errorf("the list says that %d bytes are missing, want %d", l.Missing(), want)
			}
		})
	}
}

// TestLazySurvivesItsProcess checks that with a live file nothing that had arrived, or was written, is fetched again by who
// takes over from a process that was killed.
func TestLazySurvivesItsProcess(t *testing.T) {
	live, err := NewLive("test")
	if err != nil {
		t.Fatal(err)
	}
	defer live.Close()
	dst := NewMemory(1 << 20)
	list := filepath.Join(t.TempDir(), "list")
	open := func() *Lazy {
		t.Helper()
		l, err := NewLazy(dst, LazyOptions{List: list, Live: live})
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	l := open()
	if err := l.Flush(); err != nil {
		t.Fatal(err)
	}
	if _, err := l.WriteAt(bytes.Repeat([]byte{1}, 8192), 4096); err != nil {
		t.Fatal(err)
	}
	if err := l.Fill(1<<19, bytes.Repeat([]byte{2}, 4096)); err != nil {
		t.Fatal(err)
	}
	want := l.Missing()
	left, err := os.ReadFile(list)
	if err == nil { // it is another file for who comes after a process: the lock of the first is gone with it
		err = errors.Join(os.Remove(list), os.WriteFile(list, left, 0o600))
	}
	if err != nil {
		t.Fatal(err)
	}
	l = open()
	if l.Missing() != want {
		t.Fatalf("%d bytes are missing, want %d", l.Missing(), want)
	}
	if err := l.Fill(0, bytes.Repeat([]byte{3}, 16384)); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 16384)
	if _, err := l.ReadAt(p, 0); err != nil || p[0] != 3 || p[4096] != 1 || p[12287] != 1 || p[12288] != 3 {
		t.Errorf("what was written before the process died is not there (%v)", err)
	}
	// And a flush by the one who took over strikes it off.
	if err := l.Flush(); err != nil {
		t.Fatal(err)
	}
	want = l.Missing()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if l, err = NewLazy(NewMemory(1<<20), LazyOptions{List: list}); err != nil || l.Missing() != want {
		t.Errorf("the list says that %d bytes are missing, want %d (%v)", l.Missing(), want, err)
	}
}
