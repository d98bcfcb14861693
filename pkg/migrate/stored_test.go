package migrate

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/wire"
)

const testChunk = 16 * block.PageSize

// shelf is a store of what a device held: every chunk of it, but for each fifth.
type shelf struct {
	content *block.Memory
	chunks  []block.Range

	fetches atomic.Int64
	fail    func(chunk int) error // nil: none fails
	slow    func(ctx context.Context, chunk int)
}

func newShelf(t testing.TB, of block.Device) *shelf {
	s := &shelf{content: block.NewMemory(of.Size())}
	for off := int64(0); off < of.Size(); off += testChunk {
		if off/testChunk%5 == 4 {
			continue
		}
		r := block.Range{Offset: off, Length: min(testChunk, of.Size()-off)}
		p := make([]byte, r.Length)
		if _, err := of.ReadAt(p, off); err != nil && !errors.Is(err, io.EOF) {
			t.Fatal(err)
		}
		if _, err := s.content.WriteAt(p, off); err != nil {
			t.Fatal(err)
		}
		s.chunks = append(s.chunks, r)
	}
	return s
}

func (s *shelf) stored(t testing.TB) *Stored {
	b := NewIndexBuilder(s.content.Size())
	for n, r := range s.chunks {
		p := make([]byte, r.Length)
		if err := s.read(n, p); err != nil {
			t.Fatal(err)
		}
		b.Write(r.Offset, p)
	}
	x := b.Index()
	if want := digestOfDevice(t, s.content); x.Digest() != want {
		t.Fatalf("the index of what is stored has digest %s, want %s", x.Digest(), want)
	}
	return &Stored{Reference: []byte(`{"list":"x"}`), Index: x, Ranges: s.chunks}
}

func (s *shelf) read(chunk int, p []byte) error {
	_, err := s.content.ReadAt(p, s.chunks[chunk].Offset)
	return err
}

func (s *shelf) Chunks() []block.Range { return s.chunks }

func (s *shelf) Fetch(ctx context.Context, chunk int, p []byte) error {
	s.fetches.Add(1)
	if s.slow != nil {
		s.slow(ctx, chunk)
	}
	if s.fail != nil {
		if err := s.fail(chunk); err != nil {
			fill(p, 77) // what came is not what was asked for
			return err
		}
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	return s.read(chunk, p)
}

func (s *shelf) Is(chunk int, p []byte) bool {
	want := make([]byte, len(p))
	return s.read(chunk, want) == nil && bytes.Equal(want, p)
}

// storeTarget is a target that reaches the shelves, and may have bases.
type storeTarget struct {
	*basedTarget
	shelves map[string]*shelf
}

func (t *storeTarget) Stored(_ context.Context, m *wire.Manifest) ([]Fetcher, error) {
	out := make([]Fetcher, len(m.Devices))
	for i, d := range m.Devices {
		if s := t.shelves[d.Name]; s != nil && len(d.Stored) > 0 {
			out[i] = s
		}
	}
	return out, nil
}

// newStoredRig is a rig of two devices that were stored a while ago, and written to since. With a base, the disk was made from one that both sides have.
func newStoredRig(t *testing.T, busy, based, changed bool) (*rig, *storeTarget) {
	r := newRig(smallShape)
	r.guest.busy = busy
	target := &storeTarget{basedTarget: &basedTarget{target: r.target, bases: map[string]*block.Memory{}}, shelves: map[string]*shelf{}}
	r.dest.Target = target
	for i := range 2 {
		d := &r.source.Devices[i]
		if based {
			base := block.NewMemory(d.Device.Size())
			if err := block.Copy(context.Background(), base, d.Device, block.CopyOptions{}); err != nil {
				t.Fatal(err)
			}
			x, err := IndexBase(context.Background(), base)
			if err != nil {
				t.Fatal(err)
			}
			d.Base, target.bases[d.Name] = x, base
		}
		write := func(seed uint64) {
			p := make([]byte, 3*block.PageSize)
			fill(p, seed)
			off := int64(seed) * 37 * 1024 % (d.Device.Size() - int64(len(p)))
			if _, err := d.Device.WriteAt(p, off); err != nil {
				t.Fatal(err)
			}
		}
		for seed := range uint64(12) {
			write(seed)
		}
		s := newShelf(t, d.Device)
		target.shelves[d.Name] = s
		since := block.NewTracked(d.Device)
		d.Stored = s.stored(t)
		if changed {
			if err := since.Start(t.Context()); err != nil {
				t.Fatal(err)
			}
			tracked := d.Device.(*block.Tracked)
			inner := block.NewTracked(tracked.Unwrap())
			if err := inner.Start(t.Context()); err != nil {
				t.Fatal(err)
			}
			outer := block.NewTracked(inner)
			r.guest.devices[i], d.Device, d.Tracker = outer, outer, outer
			var list []block.Range
			d.Stored.Changed = func(off int64) (block.Range, error) {
				more, err := inner.Collect(context.Background())
				if err != nil {
					return block.Range{}, err
				}
				list = union(list, more)
				for _, r := range list {
					if r.End() > off {
						return block.Range{Offset: max(off, r.Offset), Length: r.End() - max(off, r.Offset)}, nil
					}
				}
				return block.Range{}, io.EOF
			}
		}
		for seed := range uint64(6) {
			write(seed*3 + 50)
		}
		if err := d.Device.Discard(128<<10, 64<<10); err != nil {
			t.Fatal(err)
		}
	}
	return r, target
}

func TestMoveStored(t *testing.T) {
	someFail := errors.New("there is no such object")
	for _, c := range []struct {
		name   string
		fail   func(int) error
		slow   func(context.Context, int)
		absent bool // the source is to send what could have been fetched
	}{
		{name: "store"},
		{name: "some fail", fail: func(n int) error {
			if n%3 == 1 {
				return someFail
			}
			return nil
		}, absent: true},
		{name: "all fail", fail: func(int) error { return someFail }, absent: true},
		{name: "some hang", slow: func(ctx context.Context, n int) {
			if n%4 == 2 {
				<-ctx.Done()
			}
		}, absent: true},
		{name: "slow", slow: func(context.Context, int) { time.Sleep(20 * time.Millisecond) }},
	} {
		for _, busy := range []bool{false, true} {
			for _, based := range []bool{false, true} {
				for _, changed := range []bool{false, true} {
					if c.name == "some hang" && based == changed { // it takes seconds
						continue
					}
					t.Run(fmt.Sprintf("%s/busy=%t/based=%t/changed=%t", c.name, busy, based, changed), func(t *testing.T) {
						t.Parallel()
						r, target := newStoredRig(t, busy, based, changed)
						for _, s := range target.shelves {
							s.fail, s.slow = c.fail, c.slow
						}
						a, b := pipes(2)
						o := r.move(t.Context(), a, b)
						if o.srcErr != nil || o.dstErr != nil {
							t.Fatal(o.srcErr, o.dstErr)
						}
						if owner := r.verify(t, o); owner != "destination" {
							t.Errorf("the guest is at the %s", owner)
						}
						var fetched int64
						for _, s := range target.shelves {
							fetched += s.fetches.Load()
						}
						if fetched == 0 && !based {
							t.Error("nothing was fetched")
						}
						if got := o.src.AbsentBytes > 0; c.absent && !based && !got {
							t.Errorf("the source says that %d bytes were not fetched", o.src.AbsentBytes)
						}
						if c.name == "store" && !based && !busy && changed {
							whole := r.source.Devices[0].Device.Size() + r.source.Devices[1].Device.Size()
							if o.src.DataBytes > whole/2 || o.dst.StoredBytes < whole/3 {
								t.Errorf("%d bytes came from the source, %d from the store, of %d", o.src.DataBytes, o.dst.StoredBytes, whole)
							}
						}
					})
				}
			}
		}
	}
}

// A device that is not copied before the pause comes from the store all the same, and one that holds something else does not.
func TestMoveStoredWithoutRounds(t *testing.T) {
	r, target := newStoredRig(t, false, false, true)
	for i := range 2 {
		r.source.Devices[i].Policy = Policy{}
	}
	target.target.make = func(name string, size int64) block.Device {
		m := block.NewMemory(size)
		if name == "disk" {
			if _, err := m.WriteAt([]byte("something else"), 300<<10); err != nil {
				t.Fatal(err)
			}
		}
		return m
	}
	target.shelves["memory"].fail = func(n int) error {
		if n == 3 {
			return io.ErrUnexpectedEOF
		}
		return nil
	}
	a, b := pipes(1)
	o := r.move(t.Context(), a, b)
	if o.srcErr != nil || o.dstErr != nil {
		t.Fatal(o.srcErr, o.dstErr)
	}
	r.verify(t, o)
	if target.shelves["memory"].fetches.Load() == 0 || target.shelves["disk"].fetches.Load() > 0 {
		t.Errorf("fetched %d chunks of memory, and %d of the disk", target.shelves["memory"].fetches.Load(), target.shelves["disk"].fetches.Load())
	}
}

// The link is cut after each frame of each side: the guest is where it was, or where it is to be.
func TestCutStored(t *testing.T) {
	noLeak(t)
	for _, side := range []string{"source", "destination"} {
		t.Run(side, func(t *testing.T) {
			for n := 1; ; n++ {
				r, target := newStoredRig(t, n%3 == 0, n%2 == 0, true)
				target.shelves["memory"].fail = func(n int) error {
					if n%3 == 1 {
						return io.ErrUnexpectedEOF
					}
					return nil
				}
				a, b := pipes(1)
				list := a
				if side == "destination" {
					list = b
				}
				list[0] = &cutter{Conn: list[0].(net.Conn), bytes: -1, frames: n}
				o := r.move(t.Context(), a, b)
				owner := r.verify(t, o)
				if t.Failed() {
					t.Fatalf("cut after frame %d", n)
				}
				if o.srcErr == nil && o.dstErr == nil && owner == "destination" {
					t.Logf("%d frames", n)
					break
				}
			}
		})
	}
}

// What a destination may not say about what it fetches.
func TestAbsentRefused(t *testing.T) {
	frame := func(h wire.Header, p []byte) []byte { return wire.Append(nil, h, p) }
	for name, bytes := range map[string][]byte{
		"nothing stored": frame(wire.Header{Type: wire.TypeAbsent, Device: 3, Flags: wire.FlagLast}, nil),
		"no such device": frame(wire.Header{Type: wire.TypeAbsent, Device: 9, Flags: wire.FlagLast}, nil),
		"beyond the end": frame(wire.Header{Type: wire.TypeAbsent, Device: 0, Offset: 1 << 30}, []byte{1}),
		"malformed":      frame(wire.Header{Type: wire.TypeAbsent, Device: 0}, []byte{0}),
		"after the last": append(frame(wire.Header{Type: wire.TypeAbsent, Device: 0, Flags: wire.FlagLast}, nil), frame(wire.Header{Type: wire.TypeAbsent, Device: 0, Flags: wire.FlagLast}, nil)...),
	} {
		t.Run(name, func(t *testing.T) {
			r, _ := newStoredRig(t, false, false, false)
			s := newSource(r.source, SourceConnecting)
			for _, d := range s.devices {
				d.digest = newDigest(d.size)
			}
			s.store([]bool{true, true, false, false})
			var err error
			for rest := slices.Clone(bytes); err == nil && len(rest) > 0; {
				h, e := wire.ParseHeader(rest)
				if e != nil {
					t.Fatal(e)
				}
				err = s.notFetched(h, rest[wire.HeaderSize:][:h.Length])
				rest = rest[wire.HeaderSize+int(h.Length):]
			}
			if !errors.Is(err, wire.ErrMalformed) {
				t.Errorf("got error %v", err)
			}
		})
	}
	r, _ := newStoredRig(t, false, false, false)
	for name, change := range map[string]func(*Stored){
		"no index":     func(s *Stored) { s.Index = nil },
		"no reference": func(s *Stored) { s.Reference = nil },
		"half a page":  func(s *Stored) { s.Ranges = []block.Range{{Offset: 0, Length: 100}} },
		"beyond":       func(s *Stored) { s.Ranges = []block.Range{{Offset: 1 << 40, Length: 4096}} },
	} {
		stored := *r.source.Devices[0].Stored
		change(&stored)
		if err := stored.check(r.source.Devices[0].Device.Size()); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// tardy is a store that has one chunk just when that is left to the source.
type tardy struct {
	*storeTarget
	chunk int
	late  time.Duration
	hit   atomic.Bool
}

type tardyFetcher struct {
	*shelf
	t *tardy
}

func (t *tardy) Stored(ctx context.Context, m *wire.Manifest) ([]Fetcher, error) {
	out, err := t.storeTarget.Stored(ctx, m)
	out[0] = tardyFetcher{t.shelves["memory"], t}
	return out, err
}

func (f tardyFetcher) Fetch(ctx context.Context, chunk int, p []byte) error {
	if chunk != f.t.chunk {
		return f.shelf.Fetch(ctx, chunk, p)
	}
	<-ctx.Done()
	f.t.hit.Store(true)
	time.Sleep(f.t.late)
	return f.read(chunk, p)
}

func (f tardyFetcher) Is(chunk int, p []byte) bool { return chunk != f.t.chunk && f.shelf.Is(chunk, p) }

// A chunk that was left to the source does not come over what the guest has written since.
func TestStoredTooLate(t *testing.T) {
	for _, late := range []time.Duration{0, 100 * time.Millisecond, 500 * time.Millisecond} {
		t.Run(late.String(), func(t *testing.T) {
			t.Parallel()
			r, store := newStoredRig(t, false, true, true)
			target := &tardy{storeTarget: store, chunk: 12, late: late}
			r.dest.Target = target
			mark := bytes.Repeat([]byte("guest!!!"), block.PageSize/8)
			c := store.shelves["memory"].chunks[target.chunk]
			pages := func(f func(at int64)) {
				for at := c.Offset; at < c.End(); at += block.PageSize {
					f(at)
				}
			}
			r.target.onRun = func() {
				pages(func(at int64) {
					if _, err := r.target.devices["memory"].WriteAt(mark, at); err != nil {
						t.Error(err)
					}
				})
			}
			a, b := pipes(2)
			o := r.move(t.Context(), a, b)
			r.stop()
			if o.srcErr != nil || o.dstErr != nil || !target.hit.Load() {
				t.Fatal(o.srcErr, o.dstErr, target.hit.Load())
			}
			time.Sleep(50 * time.Millisecond)
			pages(func(at int64) {
				p := make([]byte, block.PageSize)
				if _, err := r.target.devices["memory"].ReadAt(p, at); err != nil || !bytes.Equal(p, mark) {
					t.Fatalf("what the guest wrote at %d is gone (%v)", at, err)
				}
			})
		})
	}
}

// A chunk that has been under way for long is not waited for once the source has nothing else to do, whatever it did meanwhile; a later one has its time.
func TestLeaveFlying(t *testing.T) {
	s := &targetStored{chunks: make([]block.Range, 3), end: 3, flying: make(map[int]flight), wake: make(chan struct{}, 1)}
	var last context.Context
	for range s.chunks {
		_, last, _ = s.begin(t.Context())
	}
	now := time.Now()
	for n := range 2 {
		f := s.flying[n]
		f.began = now.Add(-fetchGrace - time.Millisecond)
		s.flying[n] = f
	}
	if absent, over := s.report(now); len(absent) > 0 || over {
		t.Errorf("the source is busy: got %v, %t", absent, over)
	}
	s.sourceIdle(false)
	absent, over := s.report(now)
	if slices.Sort(absent); !slices.Equal(absent, []int{0, 1}) || over || last.Err() != nil {
		t.Errorf("got %v, %t, want the two that are late", absent, over)
	}
	s.sourceIdle(false)
	s.share = firstShare // the source had nothing to do before
	if absent, over := s.report(now.Add(shareTime / 2)); len(absent) > 0 || over {
		t.Errorf("after half of its time: got %v, %t", absent, over)
	}
	if absent, over := s.report(now.Add(shareTime)); !slices.Equal(absent, []int{2}) || !over || last.Err() == nil {
		t.Errorf("got %v, %t, want the last", absent, over)
	}
}
