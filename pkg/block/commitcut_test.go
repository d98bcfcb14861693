package block

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"syscall"
	"testing"
)

// simDevice is a file of a simulated disk as a device.
type simDevice struct {
	*simHandle
	length int64
}

func (d *simDevice) Size() int64 { return d.length }

func (d *simDevice) ReadAt(p []byte, off int64) (int, error) {
	p, eof := clipRead("base", p, off, d.length)
	if err := d.readAt(p, off); err != nil {
		return 0, err
	}
	return len(p), eof
}

func (d *simDevice) WriteAt(p []byte, off int64) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	return len(p), d.writeAt("write base", p, off)
}

func (d *simDevice) Discard(off, n int64) error { return d.punch("discard from base", off, n) }
func (d *simDevice) Flush() error               { return d.sync("flush base") }
func (d *simDevice) Close() error               { return d.close() }

// simStack is an overlay on a simulated disk over a base there, or over another overlay over that.
type simStack struct {
	overlays int
	base     string // path
}

// make puts the base there.
func (st simStack) make(t *testing.T, s *simStorage, content []byte) {
	t.Helper()
	f, err := s.open("make base", st.base, fileCreate)
	if err == nil {
		err = f.writeAt("make base", content, 0)
	}
	if err == nil {
		err = f.sync("make base")
	}
	if err == nil {
		err = s.syncDir("make base", "base")
	}
	if err != nil {
		t.Fatal(err)
	}
}

// open opens the newest overlay. Only it is written, or, for a commit, it and what is below it.
func (st simStack) open(s *simStorage, commit bool) (*Overlay, error) {
	f, err := s.open("open base", st.base, fileWrite)
	if err != nil {
		return nil, err
	}
	size, _ := f.size()
	var below Device = &simDevice{simHandle: f.(*simHandle), length: size}
	path := st.base
	for i := range st.overlays {
		name := fmt.Sprintf("overlay/%d", i)
		opts := OverlayOptions{Base: below, BasePath: path, Overlay: name, State: name + ".state", BlockSize: simBlockSize << i, Logger: slog.New(slog.DiscardHandler)}
		opts.ReadOnly = i < st.overlays-1 && !(commit && i == st.overlays-2)
		o, err := openOverlay(s, opts)
		if err != nil {
			_ = below.Close()
			return nil, err
		}
		below, path = o, ""
	}
	return below.(*Overlay), nil
}

// fill makes the overlays and writes to each, and returns what the device holds.
func (st simStack) fill(t *testing.T, s *simStorage, rng *rand.Rand) []byte {
	t.Helper()
	var content []byte
	for n := range st.overlays {
		o, err := simStack{overlays: n + 1, base: st.base}.open(s, false)
		if err != nil {
			t.Fatal(err)
		}
		h := &simHistory{steps: []simStep{{after: contentOf(t, o)}}}
		simScript(t, s, o, h, rng, 12, nil)
		content = h.last()
		if err := o.Close(); err != nil {
			t.Fatal(err)
		}
	}
	return content
}

// TestCommitCut cuts the power after each step of a commit. The device reads as before, and the commit can be done again.
func TestCommitCut(t *testing.T) {
	for _, overlays := range []int{1, 2} {
		t.Run(fmt.Sprintf("overlays=%d", overlays), func(t *testing.T) {
			labels := make(map[string]int)
			for seed := range uint64(3) {
				rng := rand.New(rand.NewPCG(seed, 9))
				st := simStack{overlays: overlays, base: "base/disk"}
				s := newSimStorage()
				st.make(t, s, simBase())
				want := st.fill(t, s, rng)
				o, err := st.open(s, true)
				if err != nil {
					t.Fatal(err)
				}
				begin := len(s.ops)
				if err := o.Commit(context.Background(), nil); err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(contentOf(t, o.base), want) {
					t.Fatal("the base is not what was committed")
				}
				for n := begin; n <= len(s.ops); n++ {
					for mode := range cutModes + 2 {
						left := s.cut(n, min(mode, cutSome), rng)
						labels[s.label(n)]++
						check := func(what string, commit bool) *Overlay {
							t.Helper()
							o, err := st.open(left, commit)
							if err != nil {
								t.Fatalf("cut after step %d (%s), %s: %v", n, s.label(n), what, err)
							}
							if !bytes.Equal(contentOf(t, o), want) {
								t.Fatalf("cut after step %d (%s), %s: it reads as something else", n, s.label(n), what)
							}
							return o
						}
						if err := check("opened again", false).Close(); err != nil {
							t.Fatal(err)
						}
						o := check("opened for another commit", true)
						if err := o.Commit(context.Background(), nil); err != nil {
							t.Fatal(err)
						}
						if !bytes.Equal(contentOf(t, o.base), want) {
							t.Fatalf("cut after step %d (%s): the second commit has left something else in the base", n, s.label(n))
						}
						if err := o.Close(); err != nil {
							t.Fatal(err)
						}
						if err := check("opened after that", false).Close(); err != nil {
							t.Fatal(err)
						}
					}
				}
			}
			for _, label := range []string{"rename state", "sync base", "scrub"} {
				if labels[label] == 0 {
					t.Errorf("no cut came after the step %q, but after %v", label, labels)
				}
			}
		})
	}
}

// TestCommitFails lets each step of a commit fail.
func TestCommitFails(t *testing.T) {
	for _, errno := range []error{syscall.EIO, syscall.ENOSPC} {
		for at, failed := 0, true; failed; at++ {
			st := simStack{overlays: 2, base: "base/disk"}
			s := newSimStorage()
			st.make(t, s, simBase())
			want := st.fill(t, s, rand.New(rand.NewPCG(4, 4)))
			o, err := st.open(s, true)
			if err != nil {
				t.Fatal(err)
			}
			begin := len(s.ops)
			step := ""
			s.fail = func(n int, op string) error {
				if n == begin+at && step == "" {
					step = op
					return errno
				}
				return nil
			}
			err = o.Commit(context.Background(), nil)
			if failed = step != ""; failed && err == nil || !failed && err != nil {
				t.Fatalf("step %d (%s) failed, and Commit says %v", at, step, err)
			}
			if !bytes.Equal(contentOf(t, o), want) {
				t.Fatalf("step %d (%s) failed, and it reads as something else", at, step)
			}
			_ = o.Close()
			for _, commit := range []bool{false, true} {
				o, err := st.open(s, commit)
				if err != nil {
					t.Fatalf("step %d (%s) failed, opening later: %v", at, step, err)
				}
				if commit {
					if err := o.Commit(context.Background(), nil); err != nil {
						t.Fatal(err)
					}
				}
				if !bytes.Equal(contentOf(t, o), want) {
					t.Fatalf("step %d (%s) failed, and it reads as something else later", at, step)
				}
				if err := o.Close(); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
}

// TestRebaseCut cuts the power after each step of a rebase. The overlay opens over the one base or the other, and reads as before.
func TestRebaseCut(t *testing.T) {
	old, other := 0, 0
	for seed := range uint64(4) {
		rng := rand.New(rand.NewPCG(seed, 10))
		st := simStack{overlays: 1, base: "base/disk"}
		to := simStack{overlays: 1, base: "base/other"}
		s := newSimStorage()
		st.make(t, s, simBase())
		changed := simBase()
		for i := 20_000; i < 40_000; i++ {
			changed[i] ^= 0x55
		}
		clear(changed[70_000:80_000])
		to.make(t, s, changed)
		want := st.fill(t, s, rng)
		o, err := st.open(s, false)
		if err != nil {
			t.Fatal(err)
		}
		f, err := s.open("open base", to.base, fileRead)
		if err != nil {
			t.Fatal(err)
		}
		begin := len(s.ops)
		if err := o.Rebase(context.Background(), RebaseOptions{Base: &simDevice{simHandle: f.(*simHandle), length: simDeviceSize}, BasePath: to.base}); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(contentOf(t, o), want) {
			t.Fatal("over the other base it reads as something else")
		}
		for n := begin; n <= len(s.ops); n++ {
			for mode := range cutModes + 2 {
				left := s.cut(n, min(mode, cutSome), rng)
				o, err := st.open(left, false)
				if err == nil {
					old++
				} else if o, err = to.open(left, false); err == nil {
					other++
				} else {
					t.Fatalf("cut after step %d (%s): it opens over neither base: %v", n, s.label(n), err)
				}
				if !bytes.Equal(contentOf(t, o), want) {
					t.Fatalf("cut after step %d (%s): it reads as something else", n, s.label(n))
				}
				if err := o.Close(); err != nil && err != io.EOF {
					t.Fatal(err)
				}
			}
		}
	}
	if old == 0 || other == 0 {
		t.Errorf("after %d cuts it is over the old base, after %d over the new one", old, other)
	}
}
