package migrate

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/wire"
)

// lateDevice is memory that its guest uses while pages of it are missing.
type lateDevice struct {
	block.Device
	position int
	ask      func(int, block.Range)

	mu      sync.Mutex // guards what follows
	arrived *sync.Cond
	missing *pageSet
	wanted  map[int64]bool
	ended   bool
	model   map[int64][]byte // pages the guest wrote here
	waits   int
	hold    chan struct{} // the first page is not filled before this is closed

	forgone atomic.Bool // nobody needs what is missing
}

func (l *lateDevice) Forgone() bool { return l.forgone.Load() }

func newLateDevice(d block.Device, position int, missing []block.Range, ask func(int, block.Range)) *lateDevice {
	l := &lateDevice{Device: d, position: position, ask: ask, missing: newPageSetOf(d.Size(), missing), wanted: map[int64]bool{}, model: map[int64][]byte{}}
	l.arrived = sync.NewCond(&l.mu)
	return l
}

func (l *lateDevice) Fill(off int64, data []byte) error {
	if l.hold != nil && off == 0 {
		<-l.hold
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for len(data) > 0 {
		n := min(len(data), block.PageSize)
		if l.missing.take(off / block.PageSize) {
			if _, err := l.WriteAt(data[:n], off); err != nil {
				return err
			}
			delete(l.wanted, off/block.PageSize)
		}
		data, off = data[n:], off+int64(n)
	}
	l.arrived.Broadcast()
	return nil
}

func (l *lateDevice) FillZero(off, n int64) error { return l.Fill(off, make([]byte, n)) }

func (l *lateDevice) Wanted() (out []block.Range) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, page := range slices.Sorted(maps.Keys(l.wanted)) {
		out = append(out, l.missing.rangeOf(page, 1))
	}
	return out
}

func (l *lateDevice) NextMissing(off int64) (block.Range, error) {
	page := l.missing.next((off + block.PageSize - 1) / block.PageSize)
	if page >= l.missing.pages {
		return block.Range{}, io.EOF
	}
	return l.missing.rangeOf(page, 1), nil
}

// touch waits for a page. It returns false when it will not come. l.mu is held.
func (l *lateDevice) touch(page int64) bool {
	for l.missing.has(page) && !l.ended {
		if !l.wanted[page] {
			l.wanted[page] = true
			l.waits++
			l.mu.Unlock()
			l.ask(l.position, l.missing.rangeOf(page, 1))
			l.mu.Lock()
			continue
		}
		l.arrived.Wait()
	}
	return !l.ended
}

func (l *lateDevice) end() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ended = true
	l.arrived.Broadcast()
}

// use does what guests do to a page: read it, write part of it, overwrite it.
func (l *lateDevice) use(r *rand.Rand, frozen block.Device) error {
	page := r.Int64N(l.missing.pages)
	at := l.missing.rangeOf(page, 1)
	p, want := make([]byte, at.Length), make([]byte, at.Length)
	l.mu.Lock()
	defer l.mu.Unlock()
	what := r.IntN(4)
	if what == 3 { // whole: what was there does not matter
		fill(p, r.Uint64())
		l.missing.take(page)
		delete(l.wanted, page)
		l.model[page] = p
		_, err := l.WriteAt(p, at.Offset)
		return err
	}
	if !l.touch(page) {
		return nil
	}
	if _, err := l.ReadAt(p, at.Offset); err != nil && err != io.EOF {
		return err
	}
	if m, ok := l.model[page]; ok {
		copy(want, m)
	} else if _, err := frozen.ReadAt(want, at.Offset); err != nil && err != io.EOF {
		return err
	}
	if !bytes.Equal(p, want) {
		return fmt.Errorf("device %d: page %d is not what it was at the source", l.position, page)
	}
	if what == 2 {
		p[r.IntN(len(p))]++
		l.model[page] = p
		_, err := l.WriteAt(p, at.Offset)
		return err
	}
	return nil
}

// lateTarget runs its guest before all is there.
type lateTarget struct {
	*target
	frozen   map[string]block.Device // what the source has
	can      func(name string) bool  // nil: all
	seed     uint64
	loads    int           // pages that loading the device state touches
	uses     int           // of pages, by the guest
	hold     chan struct{} // see holdBack
	released sync.Once

	names                  []string
	late                   []*lateDevice // nil: complete
	postpones, completes   int
	failPostpone, failDone error
	hang                   chan struct{} // Complete waits for it, if set
	guest                  sync.WaitGroup
	wrong                  atomic.Pointer[error]
}

func (t *lateTarget) Prepare(ctx context.Context, m *wire.Manifest) ([]block.Device, error) {
	out, err := t.target.Prepare(ctx, m)
	for _, d := range m.Devices {
		t.names = append(t.names, d.Name)
	}
	return out, err
}

func (t *lateTarget) CanPostpone() []bool {
	var out []bool
	for _, n := range t.names {
		out = append(out, t.can == nil || t.can(n))
	}
	return out
}

func (t *lateTarget) Postpone(_ context.Context, missing [][]block.Range, ask func(int, block.Range)) ([]Late, error) {
	t.postpones++
	if t.failPostpone != nil {
		return nil, t.failPostpone
	}
	out := make([]Late, len(missing))
	t.late = make([]*lateDevice, len(missing))
	for i, list := range missing {
		if list != nil {
			t.late[i] = newLateDevice(t.devices[t.names[i]], i, list, ask)
			t.late[i].hold = t.hold
			out[i] = t.late[i]
		}
	}
	return out, nil
}

func (t *lateTarget) Load(ctx context.Context, r io.Reader) error {
	stop := context.AfterFunc(ctx, func() {
		for _, l := range t.late {
			if l != nil {
				l.end()
			}
		}
	})
	defer stop()
	rnd := rand.New(rand.NewPCG(t.seed, 1))
	for _, l := range t.late {
		for range t.loads {
			if l != nil {
				l.mu.Lock()
				l.touch(rnd.Int64N(l.missing.pages))
				l.mu.Unlock()
			}
		}
	}
	return t.target.Load(ctx, r)
}

func (t *lateTarget) Run(ctx context.Context) error {
	if err := t.target.Run(ctx); err != nil {
		return err
	}
	t.resume()
	return nil
}

// resume is the life of the guest.
func (t *lateTarget) resume() {
	for i, l := range t.late {
		if l == nil {
			continue
		}
		t.guest.Go(func() {
			r := rand.New(rand.NewPCG(t.seed, uint64(i)+2))
			for range t.uses {
				if err := l.use(r, t.frozen[t.names[i]]); err != nil {
					t.wrong.Store(&err)
					return
				}
			}
		})
	}
}

func (t *lateTarget) Complete(context.Context) error {
	t.completes++
	if t.hang != nil {
		<-t.hang
	}
	return t.failDone
}

// halt ends the guest.
func (t *lateTarget) halt() {
	for _, l := range t.late {
		if l != nil {
			l.end()
		}
	}
	t.guest.Wait()
}

// verify checks the content of a guest that lacks nothing, page by page.
func (t *lateTarget) verify(tb testing.TB) {
	tb.Helper()
	t.guest.Wait() // it waits for nothing
	t.verifyNow(tb)
}

func (t *lateTarget) verifyNow(tb testing.TB) {
	tb.Helper()
	if err := t.wrong.Load(); err != nil {
		tb.Error(*err)
	}
	for i, name := range t.names {
		have, want := t.devices[name], block.NewMemory(t.frozen[name].Size())
		if err := block.Copy(context.Background(), want, t.frozen[name], block.CopyOptions{}); err != nil {
			tb.Fatal(err)
		}
		if t.late != nil && t.late[i] != nil {
			for page, p := range t.late[i].model {
				if _, err := want.WriteAt(p, page*block.PageSize); err != nil {
					tb.Fatal(err)
				}
			}
		}
		if equal, at, err := block.Equal(context.Background(), want, have); err != nil || !equal {
			tb.Errorf("device %q differs at %d (%v)", name, at, err)
		}
	}
}

// postCopy makes a rig whose rest is sent after the switch.
func (r *rig) postCopy(seed uint64) *lateTarget {
	frozen := map[string]block.Device{}
	for _, d := range r.source.Devices {
		frozen[d.Name] = d.Device
	}
	t := &lateTarget{target: r.target, frozen: frozen, seed: seed, loads: 3, uses: 200}
	r.late = t
	r.dest.Target = t
	r.source.Goal = Goal{PostCopy: true, MaxDowntime: time.Nanosecond}
	return t
}

func TestPostCopy(t *testing.T) {
	for _, streams := range []int{1, 3} {
		for _, busy := range []bool{false, true} {
			t.Run(fmt.Sprintf("streams=%d,busy=%t", streams, busy), func(t *testing.T) {
				noLeak(t)
				r := newRig(smallShape)
				r.guest.busy = busy
				late := r.postCopy(1)
				a, b := pipes(streams)
				var dst []DestinationState
				r.dest.OnState = func(s DestinationState) { dst = append(dst, s) }
				o := r.move(t.Context(), a, b)
				if got := r.verify(t, o); got != "destination" {
					t.Fatalf("guest is at the %s: %v; %v", got, o.srcErr, o.dstErr)
				}
				if o.src.Outcome != "moved" || o.dst.Outcome != "running" || !slices.Contains(dst, DestinationFilling) {
					t.Errorf("outcomes %q, %q; states %v", o.src.Outcome, o.dst.Outcome, dst)
				}
				if r.src.confirms != 1 {
					t.Errorf("it was put on record %d times that the guest runs, want once", r.src.confirms)
				}
				if late.postpones != 1 || late.completes != 1 || o.src.LateBytes == 0 || o.src.LateBytes != o.dst.LateBytes {
					t.Errorf("postponed %d times, completed %d; %d bytes late, %d", late.postpones, late.completes, o.src.LateBytes, o.dst.LateBytes)
				}
				if o.src.Demands == 0 {
					t.Errorf("nothing was demanded")
				}
				for _, d := range r.source.Devices {
					want, err := block.Digest(t.Context(), d.Device)
					if err != nil {
						t.Fatal(err)
					}
					if got := o.src.Digests[d.Name]; got != fmt.Sprintf("%x", want) || got != o.dst.Digests[d.Name] {
						t.Errorf("digest of %q: source %s, destination %s, content %x", d.Name, got, o.dst.Digests[d.Name], want)
					}
				}
			})
		}
	}
}

// What makes the content durable may hang, as in a call of the guest's agent: the migration ends, and the source keeps its copy.
func TestCompleteHangs(t *testing.T) {
	noLeak(t)
	r := newRig(smallShape)
	late := r.postCopy(1)
	late.hang = make(chan struct{})
	defer close(late.hang)
	r.dest.CompleteTimeout = 500 * time.Millisecond // enough for the source to hear first that the guest runs, on a busy machine too
	a, b := pipes(2)
	o := r.move(t.Context(), a, b)
	if !errors.Is(o.dstErr, ErrUnsettled) || !errors.Is(o.dstErr, os.ErrDeadlineExceeded) || o.dst.Outcome != "incomplete" {
		t.Errorf("destination is %q: %v", o.dst.Outcome, o.dstErr)
	}
	if !errors.Is(o.srcErr, ErrUnsettled) || o.src.Outcome != "unsettled" {
		t.Errorf("source is %q: %v", o.src.Outcome, o.srcErr)
	}
	late.halt()
	late.verifyNow(t)
}

var errNo = errors.New("no")

// holdBack keeps the guest from being complete until release is called, and has its content postponed without use.
func (t *lateTarget) holdBack() {
	t.loads, t.hold = 0, make(chan struct{})
}

// releaseSoon is release when a link that was just cut is known to be dead.
func (r *rig) releaseSoon() { time.AfterFunc(50*time.Millisecond, r.release) }

func (r *rig) release() {
	if r.late != nil && r.late.hold != nil {
		r.late.released.Do(func() { close(r.late.hold) })
	}
}
