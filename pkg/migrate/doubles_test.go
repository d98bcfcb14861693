package migrate

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/wire"
)

var quiet = slog.New(slog.DiscardHandler)

// world counts running copies of the one guest there is.
type world struct {
	mu      sync.Mutex // guards running
	running map[string]bool
	twice   bool
}

func (w *world) set(who string, runs bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.running == nil {
		w.running = map[string]bool{}
	}
	w.running[who] = runs
	if w.running["source"] && w.running["destination"] {
		w.twice = true
	}
}

func (w *world) runs(who string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.running[who]
}

// journal remembers the last record and counts calls.
type journal struct {
	mu                    sync.Mutex // guards what follows
	record                string
	commits, aborts       int
	confirms              int
	failCommit, failAbort error
	onCommit              func(ctx context.Context)
}

func (j *journal) Commit(ctx context.Context, id string) error {
	if j.onCommit != nil {
		j.onCommit(ctx)
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.commits++
	if j.failCommit != nil {
		return j.failCommit
	}
	j.record = "commit " + id
	return nil
}

func (j *journal) Abort(_ context.Context, id string) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.aborts++
	if j.failAbort != nil {
		return j.failAbort
	}
	j.record = "abort " + id
	return nil
}

// Confirm implements [Confirmer].
func (j *journal) Confirm(_ context.Context, id string) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.confirms++; j.record != "commit "+id {
		return fmt.Errorf("the record is %q", j.record)
	}
	return nil
}

func (j *journal) Done(_ context.Context, id string) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.record = "done " + id
	return nil
}

func (j *journal) committed() bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	return strings.HasPrefix(j.record, "commit") || strings.HasPrefix(j.record, "done")
}

// guest is a VM that writes to its tracked devices, as fast as it can or not at all.
type guest struct {
	world   *world
	state   []byte
	devices []*block.Tracked
	busy    bool
	pace    time.Duration // between writes, of which there are some: time that is not real does not pass while somebody works

	mu      sync.Mutex // guards what follows
	stop    chan struct{}
	done    chan struct{}
	paused  bool
	resumes int
	hooks   int // BeforeSuspend less Resume
	writes  atomic.Int64

	failSuspend, failPause, failState, failResume error
}

// run starts the writer. It is the guest's life.
func (g *guest) run() {
	g.world.set("source", true)
	g.paused = false
	if !g.busy {
		return
	}
	g.stop, g.done = make(chan struct{}), make(chan struct{})
	go func() {
		defer close(g.done)
		r := rand.New(rand.NewPCG(1, uint64(time.Now().UnixNano())))
		for {
			select {
			case <-g.stop:
				return
			default:
			}
			d := g.devices[r.IntN(len(g.devices))]
			n := min(int64(1+r.IntN(9000)), d.Size())
			p := make([]byte, n)
			if r.IntN(4) > 0 {
				fill(p, r.Uint64())
			}
			if _, err := d.WriteAt(p, r.Int64N(d.Size()-n+1)); err != nil {
				panic(err)
			}
			g.writes.Add(1)
			if g.pace > 0 {
				if g.writes.Load() > 200 {
					return
				}
				time.Sleep(g.pace)
			}
			runtime.Gosched()
		}
	}()
}

func (g *guest) halt() {
	if g.stop != nil {
		close(g.stop)
		<-g.done
		g.stop = nil
	}
	g.paused = true
	g.world.set("source", false)
}

func (g *guest) BeforeSuspend(ctx context.Context) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.hooks++
	return errors.Join(g.failSuspend, ctx.Err())
}

func (g *guest) Pause(ctx context.Context) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.halt()
	return errors.Join(g.failPause, ctx.Err())
}

func (g *guest) State(ctx context.Context, w io.Writer) error {
	if _, err := w.Write(g.state); err != nil {
		return err
	}
	return errors.Join(g.failState, ctx.Err())
}

func (g *guest) Resume(context.Context) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.resumes++
	g.hooks--
	if g.failResume != nil {
		return g.failResume
	}
	if g.paused {
		g.run()
	}
	return nil
}

// target is where the guest goes.
type target struct {
	world   *world
	sizes   map[string]int64
	make    func(name string, size int64) block.Device // nil: block.NewMemory
	devices map[string]block.Device
	state   []byte

	prepares, loads, runs, discards int
	onRun                           func()

	failPrepare, failLoad, failRun error
}

func (t *target) Prepare(ctx context.Context, m *wire.Manifest) ([]block.Device, error) {
	t.prepares++
	if t.failPrepare != nil {
		return nil, t.failPrepare
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	devices := map[string]block.Device{}
	var out []block.Device
	for _, d := range m.Devices {
		size, ok := t.sizes[d.Name]
		if !ok {
			return nil, Refuse("device %q is not configured here", d.Name)
		}
		var dev block.Device
		if t.make != nil {
			dev = t.make(d.Name, size)
		} else {
			dev = block.NewMemory(size)
		}
		devices[d.Name] = dev
		out = append(out, dev)
	}
	t.devices = devices
	return out, nil
}

func (t *target) Load(ctx context.Context, r io.Reader) (err error) {
	t.loads++
	if t.state, err = io.ReadAll(r); err != nil {
		return err
	}
	return errors.Join(t.failLoad, ctx.Err())
}

func (t *target) Run(context.Context) error {
	if t.onRun != nil {
		t.onRun()
	}
	if t.failRun != nil {
		return t.failRun
	}
	t.runs++
	t.world.set("destination", true)
	return nil
}

func (t *target) Discard(context.Context) error {
	t.discards++
	return nil
}

// fill writes cheap pseudo-random bytes.
func fill(p []byte, seed uint64) {
	r := rand.NewPCG(seed, 7)
	for i := 0; i < len(p); i += 8 {
		v := r.Uint64()
		for k := i; k < min(i+8, len(p)); k++ {
			p[k] = byte(v >> (8 * (k - i)))
		}
	}
}

// rig is one migration between two doubles.
type rig struct {
	world    *world
	guest    *guest
	target   *target
	late     *lateTarget // nil: everything arrives before the guest runs
	copy     *copyTarget // nil: the guest is moved
	src, dst *journal
	source   SourceConfig
	dest     DestinationConfig
}

// shape describes the devices of a rig.
type shape struct {
	name    string
	size    int64
	filled  float64 // share of pages with data
	tracked bool
	policy  Policy
}

var smallShape = []shape{
	{"memory", 1<<20 + 4096, 0.6, true, Policy{MaxDirtyBlocks: 8, MinCycles: 1, MaxCycles: 3, Expiry: time.Second}},
	{"disk", 512<<10 + 100, 0.3, true, Policy{MaxCycles: 2}},
	{"kernel", 100_000, 1, false, Policy{}},
	{"empty", 0, 0, false, Policy{}},
}

func newRig(shapes []shape) *rig {
	w := &world{}
	r := &rig{world: w, src: &journal{}, dst: &journal{},
		guest:  &guest{world: w, state: make([]byte, 150_000)},
		target: &target{world: w, sizes: map[string]int64{}},
	}
	fill(r.guest.state, 5)
	rnd := rand.New(rand.NewPCG(3, 4))
	for _, s := range shapes {
		mem := block.NewMemory(s.size)
		for off := int64(0); off < s.size; off += block.PageSize {
			if rnd.Float64() < s.filled {
				p := make([]byte, min(block.PageSize, s.size-off))
				fill(p, uint64(off))
				if _, err := mem.WriteAt(p, off); err != nil {
					panic(err)
				}
			}
		}
		d := SourceDevice{Name: s.name, Device: mem, Policy: s.policy}
		if s.tracked {
			t := block.NewTracked(mem)
			r.guest.devices = append(r.guest.devices, t)
			d.Device, d.Tracker = t, t
		}
		r.source.Devices = append(r.source.Devices, d)
		r.target.sizes[s.name] = s.size
	}
	r.source.ID = "test.secret"
	r.source.NoCompression = true // what a test says of bytes and of the speed of its link is about content
	r.source.Guest, r.source.Journal, r.source.Logger = r.guest, r.src, quiet
	r.dest.Target, r.dest.Journal, r.dest.Logger = r.target, r.dst, quiet
	r.source.Spec = []byte(`{"cpu":1}`)
	return r
}

// pipes returns n pairs of connected streams.
func pipes(n int) (a, b []io.ReadWriter) {
	for range n {
		x, y := net.Pipe()
		a, b = append(a, x), append(b, y)
	}
	return a, b
}

type outcome struct {
	src, dst       *Report
	srcErr, dstErr error
}

// move runs the rig over the given streams and waits for both sides.
func (r *rig) move(ctx context.Context, a, b []io.ReadWriter) outcome {
	return r.moveWith(ctx, ctx, a, b)
}

func (r *rig) moveWith(sctx, dctx context.Context, a, b []io.ReadWriter) (o outcome) {
	r.guest.run()
	var wg sync.WaitGroup
	wg.Go(func() {
		o.src, o.srcErr = Send(sctx, a, r.source)
		r.release()
	})
	wg.Go(func() { o.dst, o.dstErr = Receive(dctx, b, r.dest) })
	wg.Wait()
	return o
}

// stop ends the guest if it still runs at the source.
func (r *rig) stop() {
	r.guest.mu.Lock()
	defer r.guest.mu.Unlock()
	r.guest.halt()
}

// verify checks, from outside, that the outcome is one the promises allow: never two owners; without doubt, exactly one;
// in doubt, the destination's journal decides and leaves exactly one. It returns who has the guest.
func (r *rig) verify(t testing.TB, o outcome) (owner string) {
	t.Helper()
	defer r.stop()
	if r.world.twice {
		t.Errorf("the guest ran twice")
	}
	src, dst := r.world.runs("source"), r.world.runs("destination")
	inDoubt := errors.Is(o.srcErr, ErrInDoubt)
	unsettled := errors.Is(o.srcErr, ErrUnsettled)
	if r.late != nil {
		defer r.late.halt()
		if err := r.late.wrong.Load(); err != nil {
			t.Error(*err)
		}
	}
	switch {
	case r.copy != nil:
		r.verifyCopy(t, o)
		return "source"
	case unsettled:
		if src || !dst || o.dstErr != nil && !errors.Is(o.dstErr, ErrUnsettled) {
			t.Errorf("unsettled: source runs: %t, destination runs: %t (%v; %v)", src, dst, o.srcErr, o.dstErr)
		}
	case dst && errors.Is(o.dstErr, ErrUnsettled):
		if src || !inDoubt && !unsettled {
			t.Errorf("incomplete: source runs: %t (%v; %v)", src, o.srcErr, o.dstErr)
		}
	case inDoubt && src:
		t.Errorf("source is in doubt and its guest runs")
	case inDoubt:
		if dst != r.dst.committed() && !errors.Is(o.dstErr, ErrInDoubt) {
			t.Errorf("in doubt: destination runs: %t, its journal %q", dst, r.dst.record)
		}
		if !r.src.committed() {
			t.Errorf("in doubt without a commit record: %q", r.src.record)
		}
	case src == dst:
		t.Errorf("without doubt, source runs: %t, destination runs: %t (%v; %v)", src, dst, o.srcErr, o.dstErr)
	case src && (o.srcErr == nil || o.dstErr == nil):
		t.Errorf("guest runs at the source, errors: %v; %v", o.srcErr, o.dstErr)
	case dst && (o.srcErr != nil || o.dstErr != nil):
		t.Errorf("guest runs at the destination, errors: %v; %v", o.srcErr, o.dstErr)
	}
	if src {
		if r.src.committed() {
			t.Errorf("guest runs at the source, whose journal says %q", r.src.record)
		}
		if r.guest.hooks != 0 {
			t.Errorf("BeforeSuspend without Resume: %d", r.guest.hooks)
		}
		if r.guest.resumes > 1 {
			t.Errorf("Resume called %d times", r.guest.resumes)
		}
	}
	wantDiscards := 0
	if !dst && r.target.devices != nil && !errors.Is(o.dstErr, ErrInDoubt) {
		wantDiscards = 1
	}
	if r.target.discards != wantDiscards {
		t.Errorf("Discard called %d times, want %d", r.target.discards, wantDiscards)
	}
	if dst && !errors.Is(o.dstErr, ErrUnsettled) {
		r.verifyContent(t)
	}
	for _, d := range r.guest.devices { // tracking has ended: it can begin again
		if err := d.Start(context.Background()); err != nil {
			t.Errorf("tracker still runs: %v", err)
		}
		d.Stop()
	}
	switch {
	case dst:
		return "destination"
	case src:
		return "source"
	}
	return "nobody"
}

// verifyCopy is verify for a copy: the guest runs on at the source, whatever happened.
func (r *rig) verifyCopy(t testing.TB, o outcome) {
	t.Helper()
	if !r.world.runs("source") || r.world.runs("destination") {
		t.Errorf("source runs: %t, destination runs: %t", r.world.runs("source"), r.world.runs("destination"))
	}
	if r.guest.hooks != 0 || r.guest.resumes > 1 || r.src.commits+r.src.aborts+r.src.confirms+r.dst.commits+r.dst.aborts > 0 {
		t.Errorf("%d hooks open, %d resumes, records %q and %q", r.guest.hooks, r.guest.resumes, r.src.record, r.dst.record)
	}
	if kept := r.copy.keeps > 0; kept != (o.dstErr == nil) || kept && r.target.discards > 0 || o.srcErr == nil && !kept {
		t.Errorf("kept %t, discarded %d: %v; %v", kept, r.target.discards, o.srcErr, o.dstErr)
	}
}

// copyTarget keeps what it gets.
type copyTarget struct {
	*target
	keeps    int
	failKeep error
}

func (c *copyTarget) Keep(context.Context) error {
	if c.failKeep != nil {
		return c.failKeep
	}
	c.keeps++
	return nil
}

// copying makes a rig whose destination wants a copy.
func (r *rig) copying() {
	r.copy = &copyTarget{target: r.target}
	r.dest.Target, r.dest.Copy = r.copy, true
}

func (r *rig) verifyContent(t testing.TB) {
	t.Helper()
	ctx := context.Background()
	if !bytes.Equal(r.guest.state, r.target.state) {
		t.Errorf("device state differs")
	}
	if r.late != nil {
		r.late.verify(t)
		return
	}
	for _, d := range r.source.Devices {
		equal, at, err := block.Equal(ctx, d.Device, r.target.devices[d.Name])
		if err != nil || !equal {
			t.Errorf("device %q differs at %d (%v)", d.Name, at, err)
		}
	}
}

// noLeak fails the test if goroutines of this package are left at its end.
func noLeak(t testing.TB) {
	t.Helper()
	t.Cleanup(func() {
		var left string
		for range 200 { // they may be on their way out
			if left = ours(); left == "" {
				return
			}
			time.Sleep(5 * time.Millisecond)
		}
		t.Errorf("goroutines left:\n%s", left)
	})
}

func ours() string {
	buf := make([]byte, 1<<20)
	buf = buf[:runtime.Stack(buf, true)]
	var out []string
	for _, g := range strings.Split(string(buf), "\n\n") {
		if strings.Contains(g, "pkg/migrate.") && !strings.Contains(g, "testing.tRunner") && !strings.Contains(g, "migrate.ours") {
			out = append(out, g)
		}
	}
	return strings.Join(out, "\n\n")
}

// plain hides everything of a stream but Read and Write.
type plain struct{ io.ReadWriter }

func hide(in []io.ReadWriter) (out []io.ReadWriter) {
	for _, s := range in {
		out = append(out, plain{s})
	}
	return out
}

var errCut = errors.New("link was cut")

// cutter lets through the first bytes or frames that are written to it, then closes both directions.
type cutter struct {
	net.Conn
	mu      sync.Mutex // guards what follows
	bytes   int        // left to let through; negative: no limit
	frames  int        // likewise, the preface counts as one
	seen    []byte     // of the frame being written
	written int        // bytes
	sizes   []int      // of whole frames written
}

func (c *cutter) Write(p []byte) (int, error) {
	c.mu.Lock()
	n := 0
	for n < len(p) && c.bytes != 0 && c.frames != 0 {
		want := wire.PrefaceSize
		if len(c.sizes) > 0 {
			want = wire.HeaderSize
			if len(c.seen) >= want {
				h, err := wire.ParseHeader(c.seen)
				if err != nil {
					panic(fmt.Sprintf("we write a bad frame: %v", err))
				}
				want += int(h.Length)
			}
		}
		k := min(want-len(c.seen), len(p)-n)
		if c.bytes > 0 {
			k = min(k, c.bytes)
			c.bytes -= k
		}
		c.seen = append(c.seen, p[n:n+k]...)
		n += k
		whole := len(c.seen) == want
		if whole && len(c.sizes) > 0 && want == wire.HeaderSize {
			h, _ := wire.ParseHeader(c.seen)
			whole = h.Length == 0
		}
		if whole {
			c.sizes = append(c.sizes, want)
			c.seen = c.seen[:0]
			c.frames--
		}
	}
	c.written += n
	cut := c.bytes == 0 || c.frames == 0
	c.mu.Unlock()
	if n > 0 {
		if m, err := c.Conn.Write(p[:n]); err != nil {
			return m, err
		}
	}
	if cut {
		c.Conn.Close()
		if n < len(p) {
			return n, errCut
		}
	}
	return n, nil
}

func states[S ~uint8](n S) []S {
	var all []S
	for s := range n {
		all = append(all, S(s))
	}
	return slices.Clip(all)
}
