package ram

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/drafter-vm/drafter/pkg/block"
)

// FillOptions tune [Memory.Fill] and [Memory.Receive]. The zero value is right for most.
type FillOptions struct {
	// Ranges are what is to be filled, aligned to pages; nil means all. Everything else keeps what it holds, and is
	// zero where it holds nothing.
	Ranges []block.Range

	// Resume goes on with a filling that was ended early, by a Filler of this Memory or, for an adopted VMM, by another
	// process: pages that are there are kept, where otherwise Ranges are emptied first. After a Filler of this Memory,
	// Ranges are ignored.
	Resume bool

	// Workers is how many faults are served at once; 8 if zero. A fault takes one worker for as long as a read of one
	// page of the source takes. Receive needs no more than one.
	Workers int

	// ReadAround is how much of the source around a demanded page the background brings next, in bytes; 64 KiB if zero,
	// nothing if negative.
	ReadAround int64

	// Chunk is how much is read of the source at once in the background, in bytes; 256 KiB if zero. Streams is how many
	// such reads are made at once; 1 if zero. A source with latency wants more.
	Chunk   int64
	Streams int

	// RetryMin and RetryMax bound the pause, doubled each time, after which a page that could not be read or stored is
	// tried again; 10 ms and 1 s if zero.
	RetryMin, RetryMax time.Duration

	// OnError is told each failure to read or store a part, which is going to be tried again. It must return soon and
	// may be called by several goroutines. Nil: see Filler.Err.
	OnError func(error)

	// OnDemand brings what is demanded, with what is around it, and what is known to be zero, and nothing else until [Filler.Rest] is called:
	// for a guest that is to take no more memory than it uses. Fill only.
	OnDemand bool

	// First are brought before all else, in this order, whatever OnDemand says: what the guest is known to touch soon. Zeros among them take up memory,
	// which they are going to do anyway: a page that is left a hole costs a fault when it is touched. Fill only.
	First []block.Range

	// Record keeps the order in which pages are touched, for a later First, until [Filler.Touched] is called. Nothing else is brought meanwhile, as
	// what is there is touched without a fault. It is of no use on a rung without faults. Fill only.
	Record bool
}

func (o FillOptions) withDefaults() FillOptions {
	if o.Workers <= 0 {
		o.Workers = 8
	}
	if o.ReadAround == 0 {
		o.ReadAround = 64 << 10
	}
	if o.Chunk <= 0 {
		o.Chunk = 256 << 10
	}
	o.Chunk = max(o.Chunk/pageSize, 1) * pageSize
	if o.Streams <= 0 {
		o.Streams = 1
	}
	if o.RetryMin <= 0 {
		o.RetryMin = 10 * time.Millisecond
	}
	if o.RetryMax <= 0 {
		o.RetryMax = time.Second
	}
	o.RetryMax = max(o.RetryMax, o.RetryMin)
	return o
}

// Filler brings contents into a memory while the guest may already be running on it. A page is absent, then in flight
// (claimed by the one goroutine that writes it, for microseconds), then present; it is written once, so nothing the
// guest stores is ever overwritten. All methods may be called concurrently.
type Filler struct {
	m       *Memory
	src     io.ReaderAt   // nil: pages are delivered
	extents block.Extents // of src; nil if it has none
	request func(off int64)
	opts    FillOptions
	lazy    bool // faults come to us

	present   *bitmap      // pages that hold their contents, in the memfd or by being a hole that means zeros
	claimed   *bitmap      // present, or in flight
	remaining atomic.Int64 // pages not present
	complete  chan struct{}
	ready     chan struct{}
	done      chan struct{}

	ctx     context.Context
	cancel  context.CancelCauseFunc
	work    sync.WaitGroup // background and retries; end with ctx
	servers sync.WaitGroup // of faults; end by stopServing
	stopped atomic.Bool    // stopServing was called

	// mu guards what follows. No I/O is done under it.
	mu       sync.Mutex
	changed  sync.Cond           // pages that somebody waits for arrived, or ended was set
	ended    bool                // nothing will arrive any more
	err      error               // why it ended incomplete, or the latest failure that is not overcome
	wanted   map[int64]time.Time // pages demanded of request and not there yet, by when first
	failing  map[int64]struct{}  // demanded pages to try again
	retryNow chan struct{}       // kicks retry when failing gets its first; capacity 1
	// waiting counts who has an interest in arrivals: entries of wanted, and waiters on changed. It lets arrivals that
	// nobody waits for pass without mu.
	waiting atomic.Int64

	faults, zeroFaults, demandBytes, fillBytes, zeroBytes, failures atomic.Uint64
	latency                                                         histogram

	nearby chan span // what the background should do next, because a page of it was demanded; dropped when full

	recording atomic.Bool   // touches are noted; set to false with mu held
	noted     *bitmap       // pages of touched
	touched   []int64       // offsets of pages, in the order of the faults; guarded by mu
	recorded  chan struct{} // closed when recording ends

	rest     chan struct{} // closed when all is wanted
	wantRest sync.Once
}

// Fill brings the contents of src into the memory: at once where the guest touches them, the rest in the background.
// If src implements [block.Extents], what it knows to be zero is not read; zeros never take up memory, but for those of
// FillOptions.First. Its reads are made concurrently. Where it is shorter than the memory, reads fail with io.EOF, which is an error like others.
//
// What the memory holds in the ranges to be filled is dropped first: VMMs touch RAM before there is anything in it, and
// the zero pages that populates must not hide the contents. The guest must not have run. When Fill has returned, the
// guest may run as soon as [Filler.Ready].
//
// Cancelling ctx ends the filling. Pages that are missing then are not replaced by zeros: who touches them waits, until
// another Fill with Resume, or the end of the VMM.
func (m *Memory) Fill(ctx context.Context, src io.ReaderAt, opts FillOptions) (*Filler, error) {
	if src == nil {
		return nil, fmt.Errorf("fill memory %q: there is no source", m.name)
	}
	if d, ok := src.(block.Device); ok && d.Size() < m.size {
		return nil, fmt.Errorf("fill memory %q: its size is %d bytes, that of the source only %d", m.name, m.size, d.Size())
	}
	return m.startFill(ctx, src, nil, opts)
}

// Receive is Fill where contents are pushed by [Filler.Deliver]. request is told the offset of each page that somebody
// waits for, once; after a failure of what carries requests, [Filler.Wanted] lists those not yet answered. It is called
// by the goroutines that serve faults, so it must return soon.
func (m *Memory) Receive(ctx context.Context, request func(off int64), opts FillOptions) (*Filler, error) {
	if request == nil {
		return nil, fmt.Errorf("fill memory %q: there is nobody to request pages of", m.name)
	}
	return m.startFill(ctx, nil, request, opts)
}

func (m *Memory) startFill(ctx context.Context, src io.ReaderAt, request func(int64), opts FillOptions) (*Filler, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	pages := m.size / pageSize
	f := &Filler{
		m: m, src: src, request: request, opts: opts.withDefaults(),
		present: newBitmap(pages), claimed: newBitmap(pages),
		complete: make(chan struct{}), ready: make(chan struct{}), done: make(chan struct{}),
		recorded: make(chan struct{}), wanted: map[int64]time.Time{}, failing: map[int64]struct{}{}, retryNow: make(chan struct{}, 1), nearby: make(chan span, 4), rest: make(chan struct{}),
	}
	f.changed.L = &f.mu
	f.extents, _ = src.(block.Extents)
	if err := m.prepareFill(f); err != nil {
		return nil, fmt.Errorf("fill memory %q: %w", m.name, err)
	}

	f.ctx, f.cancel = context.WithCancelCause(ctx)
	m.filler.Store(f)
	m.unfilled.Store(false)
	if f.lazy {
		if f.opts.Record {
			f.noted = newBitmap(pages)
			f.recording.Store(true)
		}
		for range f.opts.Workers {
			f.servers.Add(1)
			m.servers.Go(func() { defer f.servers.Done(); f.serve() })
		}
		close(f.ready)
	}
	if f.remaining.Load() == 0 {
		close(f.complete)
	} else if src != nil {
		f.work.Go(f.retry)
		f.work.Go(func() {
			f.bringFirst()
			if f.opts.Record && f.lazy {
				select {
				case <-f.recorded:
				case <-f.rest:
				case <-f.ctx.Done():
				}
			}
			if f.opts.OnDemand && f.lazy { // or else there is no demand, and the guest waits for all of it
				f.bringZeros()
				f.load(nil, f.rest)
			}
			f.stream()
		})
	}
	var ended <-chan struct{}
	if m.handle != nil {
		ended = m.handle.done
	}
	go f.supervise(ended) // waited for by done
	return f, nil
}

// prepareFill brings the memfd and the VMM's mappings into the state in which pages may be served. m.mu is held.
func (m *Memory) prepareFill(f *Filler) error {
	prior := m.filler.Load()
	switch {
	case m.closed:
		return os.ErrClosed
	case m.tracking:
		return errors.New("it is being tracked, stop that first")
	case prior != nil && !prior.isEnded():
		return errors.New("it is being filled already, close that filler first")
	case (prior != nil || m.unfilled.Load()) && !f.opts.Resume:
		return errors.New("an earlier filling is incomplete and its guest may have run, set Resume to go on with it")
	}
	for _, r := range f.opts.First {
		if err := m.checkPages(r); err != nil {
			return err
		}
	}
	pages := m.size / pageSize
	f.present.add(0, pages)
	if prior != nil {
		prior.servers.Wait()
		for lo := int64(0); lo < pages; {
			lo = prior.present.next(lo, pages, false)
			hi := prior.present.next(lo, pages, true)
			f.present.remove(lo, hi)
			lo = hi
		}
	} else {
		ranges := f.opts.Ranges
		if ranges == nil {
			ranges = []block.Range{{Offset: 0, Length: m.size}}
		}
		for _, r := range ranges {
			if err := m.checkPages(r); err != nil {
				return err
			}
			f.present.remove(r.Offset/pageSize, r.End()/pageSize)
		}
		f.opts.Ranges = ranges
	}

	if m.handle != nil && m.handle.caps.Lazy {
		// Registered before the holes are punched, so that nobody can populate a hole again; served after, so that no
		// page that was served is punched out.
		if err := m.register(modeMissing); err != nil {
			return err
		}
		f.lazy = true
	}
	switch {
	case prior != nil:
	case f.opts.Resume:
		err := m.eachExtent(context.Background(), 0, m.size, func(off, end int64, data bool) error {
			if data {
				f.present.add(off/pageSize, end/pageSize)
			}
			return nil
		})
		if err != nil {
			return err
		}
	default:
		for _, r := range f.opts.Ranges {
			if err := m.empty(r); err != nil {
				return err
			}
		}
	}
	for w := range f.present.words {
		f.claimed.words[w].Store(f.present.words[w].Load())
	}
	f.remaining.Store(pages - f.present.count(0, pages))
	if f.lazy {
		if err := m.handle.uffd.resume(); err != nil {
			return fmt.Errorf("poll userfaultfd: %w", err)
		}
		return m.wake(0, m.size) // faults that an earlier filler read and did not answer
	}
	return nil
}

// checkPages fails if a range is not of whole pages of the memory.
func (m *Memory) checkPages(r block.Range) error {
	if r.Offset < 0 || r.Length <= 0 || r.Length > m.size || r.Offset > m.size-r.Length || r.Offset%pageSize != 0 || r.Length%pageSize != 0 {
		return fmt.Errorf("range %d+%d is not of whole pages within its %d bytes", r.Offset, r.Length, m.size)
	}
	return nil
}

// supervise ends everything when all is there, or when no more can come.
func (f *Filler) supervise(processEnded <-chan struct{}) {
	var cause error
	select {
	case <-f.complete:
	case <-f.ctx.Done():
		cause = context.Cause(f.ctx)
	case <-processEnded:
		cause = ErrProcessEnded
	}
	f.cancel(cause)
	f.work.Wait()

	if f.remaining.Load() == 0 {
		f.m.mu.Lock()
		err := f.m.settle()
		f.m.mu.Unlock()
		if f.stopped.Load() {
			f.servers.Wait() // else Tracker.Stop or Memory.Close ends them
		}
		f.end(err)
		if !f.lazy && err == nil {
			close(f.ready)
		}
	} else {
		f.stopServing()
		f.servers.Wait()
		f.end(fmt.Errorf("fill memory %q: %w: %w", f.m.name, ErrIncomplete, cause))
	}
	close(f.done)
}

func (f *Filler) end(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ended = true
	f.err = err
	f.changed.Broadcast()
}

func (f *Filler) isEnded() bool {
	select {
	case <-f.done:
		return true
	default:
		return false
	}
}

// stopServing makes the servers end, without waiting for them.
func (f *Filler) stopServing() {
	if f.lazy && !f.stopped.Swap(true) {
		_ = f.m.handle.uffd.interrupt() // fails only when closed, which ends reads as well
	}
}

// Ready is closed as soon as the guest may run: at once when faults are caught, else when the memory is full.
func (f *Filler) Ready() <-chan struct{} { return f.ready }

// Done is closed when the filling has ended, completely or not.
func (f *Filler) Done() <-chan struct{} { return f.done }

// Wait waits until the filling has ended and returns Err, or the cause why ctx ended before.
func (f *Filler) Wait(ctx context.Context) error {
	select {
	case <-f.done:
		return f.Err()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Err is nil while all is well and after all contents have arrived. While parts cannot be read or stored and are being
// tried again, it is the latest such failure; after an early end it wraps [ErrIncomplete] and the reason, such as
// [ErrProcessEnded] or the cause given by the context.
func (f *Filler) Err() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.err
}

// Close completes the filling, or ends it when ctx is done first and returns Err. It is idempotent.
func (f *Filler) Close(ctx context.Context) error {
	select {
	case <-f.done:
	case <-ctx.Done():
		f.abort(context.Cause(ctx))
	}
	return f.Err()
}

// abort ends the filling with a reason.
func (f *Filler) abort(cause error) {
	f.cancel(cause)
	<-f.done
}

// Deliver stores contents at off; both off and the length must be multiples of the page size. What is there already
// stays as it is, since the guest may have changed it. It may also be used to hand pages to a Fill that come from
// elsewhere than its source. Zero pages take up no memory. A failure concerns what was not stored: deliver that again.
func (f *Filler) Deliver(off int64, data []byte) error {
	if err := f.deliverable(off, int64(len(data))); err != nil {
		return err
	}
	return f.put(off/pageSize, data, len(data) == pageSize)
}

// DeliverZeros is Deliver of n zero bytes.
func (f *Filler) DeliverZeros(off, n int64) error {
	if err := f.deliverable(off, n); err != nil {
		return err
	}
	f.putZeros(off/pageSize, (off+n)/pageSize)
	return nil
}

func (f *Filler) deliverable(off, n int64) error {
	if off < 0 || n < 0 || off%pageSize != 0 || n%pageSize != 0 || n > f.m.size || off > f.m.size-n {
		return fmt.Errorf("deliver %d+%d to memory %q: not whole pages within its %d bytes", off, n, f.m.name, f.m.size)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.ended && f.remaining.Load() > 0 {
		return f.err
	}
	return nil
}

// Wanted lists the offsets of pages that were requested and have not arrived, the longest wanted in no special order.
func (f *Filler) Wanted() []int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := make([]int64, 0, len(f.wanted))
	for page := range f.wanted {
		out = append(out, page*pageSize)
	}
	return out
}

// NextMissing returns the first range at or after off that has not arrived, and io.EOF when there is none.
func (f *Filler) NextMissing(off int64) (block.Range, error) {
	if off < 0 {
		return block.Range{}, fmt.Errorf("find what is missing of memory %q: offset %d is negative", f.m.name, off)
	}
	if off < f.m.size {
		if r, ok := f.nextAbsent(off); ok {
			return r, nil
		}
	}
	return block.Range{}, io.EOF
}

// FillStats is what a filling has done so far.
type FillStats struct {
	Faults     uint64 // page faults served, or being served
	ZeroFaults uint64 // of them, those of pages known to be zero
	Failures   uint64 // reads of the source or stores that failed

	DemandBytes uint64 // delivered because somebody waited
	FillBytes   uint64 // delivered otherwise
	ZeroBytes   uint64 // found to be zero, and not stored
	Remaining   int64  // bytes that are still missing

	// Latency of faults served, from the moment we read of them to the moment the thread was woken. At most 12.5 % high.
	P50, P99, Max time.Duration
}

// Stats may be called at any time.
func (f *Filler) Stats() FillStats {
	q := f.latency.quantiles(0.5, 0.99, 1)
	return FillStats{
		Faults: f.faults.Load(), ZeroFaults: f.zeroFaults.Load(), Failures: f.failures.Load(),
		DemandBytes: f.demandBytes.Load(), FillBytes: f.fillBytes.Load(), ZeroBytes: f.zeroBytes.Load(),
		Remaining: f.remaining.Load() * pageSize,
		P50:       q[0], P99: q[1], Max: q[2],
	}
}

// serve answers page faults, one at a time, until stopServing.
func (f *Filler) serve() {
	u := f.m.handle.uffd
	buf := make([]byte, pageSize)
	for {
		addr, err := u.next()
		start := time.Now()
		if err != nil {
			if !f.stopped.Load() {
				f.cancel(err)
			}
			return
		}
		off, ok := f.m.maps.offset(addr)
		if !ok {
			continue
		}
		page := off / pageSize
		if f.stopped.Load() {
			// Not ours any more: make it be told again, to whoever comes next.
			_ = f.m.wake(page*pageSize, pageSize)
			return
		}
		f.faults.Add(1)
		if f.recording.Load() {
			f.note(page)
		}
		switch {
		case f.present.has(page):
			// It arrived meanwhile, or it is a hole: known to be zero, or punched by the VMM (balloon).
			f.zeroFaults.Add(1)
			f.resolve(page)
			f.latency.add(time.Since(start))
		case f.src == nil:
			f.demand(page, start)
		default:
			if err := f.fetch(page, buf); err != nil {
				f.postpone(page)
				continue
			}
			f.latency.add(time.Since(start))
			f.readAround(page)
		}
	}
}

// resolve lets who waits for a present page go on: by a zero page if nothing is there.
func (f *Filler) resolve(page int64) {
	first := true
	err := f.m.maps.addresses(page*pageSize, pageSize, func(r uffdRange) error {
		if first {
			first = false
			// Atomic with respect to everything else that might put a page there. Where the page is mapped once more,
			// the second place only needs to be woken.
			err := f.m.handle.uffd.zeroPages(r)
			if err == nil || !errors.Is(err, unix.EEXIST) {
				return err
			}
		}
		return f.m.handle.uffd.wake(r)
	})
	if err != nil && !errors.Is(err, unix.ESRCH) && !errors.Is(err, unix.ENOENT) { // the process or mapping is gone
		f.failed(fmt.Errorf("resolve fault at %d of memory %q: %w", page*pageSize, f.m.name, err))
		// Out of memory, presumably. Woken, the thread comes back with the same fault.
		time.Sleep(f.opts.RetryMin)
		_ = f.m.wake(page*pageSize, pageSize)
	}
}

// fetch reads one demanded page and stores it.
func (f *Filler) fetch(page int64, buf []byte) error {
	if err := f.read(buf, page*pageSize); err != nil {
		return err
	}
	return f.put(page, buf, true)
}

// read reads of the source, reporting a failure.
func (f *Filler) read(buf []byte, off int64) error {
	n, err := f.src.ReadAt(buf, off)
	if n == len(buf) {
		return nil
	}
	if err == nil {
		err = io.ErrUnexpectedEOF
	}
	err = fmt.Errorf("read %d+%d for memory %q: %w", off, len(buf), f.m.name, err)
	f.failed(err)
	return err
}

// readAround has the background go on in the neighbourhood of a page that was just demanded, if anything is absent there.
// When it has enough to do already, it is not told: what serves faults must not get in the way of faults.
func (f *Filler) readAround(page int64) {
	n := f.opts.ReadAround / pageSize
	if n <= 1 || f.recording.Load() {
		return
	}
	lo := page / n * n
	hi := min(lo+n, f.present.limit)
	if lo = f.present.next(lo, hi, false); lo == hi {
		return
	}
	select {
	case f.nearby <- span{lo, hi}:
	default:
	}
}

// put stores what of data, whole pages from page on, is absent. Pages that another goroutine has in flight are left to
// it. urgent says that a thread is likely to wait for the (single) page.
func (f *Filler) put(page int64, data []byte, urgent bool) error {
	var failure error
	f.claimed.claim(page, page+int64(len(data))/pageSize, func(lo, hi int64) {
		if failure != nil {
			f.claimed.remove(lo, hi)
			return
		}
		failure = f.store(lo, data[(lo-page)*pageSize:(hi-page)*pageSize], urgent)
	})
	if failure != nil {
		failure = fmt.Errorf("store %d+%d of memory %q: %w", page*pageSize, len(data), f.m.name, failure)
		f.failed(failure)
	}
	return failure
}

var zeroPage [pageSize]byte

// storeMax bounds one write into the memfd, in pages: the inode is locked meanwhile, also for urgent pages.
const storeMax = 32

// store is put of claimed pages.
func (f *Filler) store(page int64, data []byte, urgent bool) error {
	n := int64(len(data)) / pageSize
	zero := func(i int64) bool { return bytes.Equal(data[i*pageSize:(i+1)*pageSize], zeroPage[:]) }
	for i := int64(0); i < n; {
		z := zero(i)
		end := i + 1
		for end < n && (z || end-i < storeMax) && zero(end) == z {
			end++
		}
		part := data[i*pageSize : end*pageSize]
		if z {
			f.zeroBytes.Add(uint64(len(part)))
			f.arrived(page+i, page+end, urgent)
		} else {
			if err := f.write(page+i, part, urgent); err != nil {
				f.claimed.remove(page+i, page+n)
				return err
			}
			if urgent {
				f.demandBytes.Add(uint64(len(part)))
			} else {
				f.fillBytes.Add(uint64(len(part)))
			}
			f.arrived(page+i, page+end, false)
		}
		i = end
	}
	return nil
}

// write puts pages into the memfd. Nobody sees any of them half written: the kernel has a new page locked until it is.
func (f *Filler) write(page int64, data []byte, urgent bool) error {
	if urgent && f.lazy {
		// Unlike a write to the file this does not wait for the lock of the inode, and maps the page as well.
		mode := uint64(0)
		if f.m.marks.Load() != nil {
			mode = copyModeWP // arrival is not a write
		}
		done := false
		err := f.m.maps.addresses(page*pageSize, int64(len(data)), func(r uffdRange) error {
			if done {
				return nil
			}
			done = true
			return f.m.handle.uffd.copyPage(r.start, data, mode)
		})
		if err == nil {
			return nil
		}
		// Whatever the reason, the file will tell; only a page that is there must not be written.
		if errors.Is(err, unix.EEXIST) {
			return nil
		}
	}
	_, err := f.m.file.WriteAt(data, page*pageSize)
	return err
}

// putZeros declares that absent pages are zero.
func (f *Filler) putZeros(lo, hi int64) {
	f.claimed.claim(lo, hi, func(lo, hi int64) {
		f.zeroBytes.Add(uint64(hi-lo) * pageSize)
		f.arrived(lo, hi, false)
	})
}

// arrived makes claimed pages, which are in the memfd or holes that mean zeros, present, and wakes who waits for them.
// The order matters: whoever reads of a fault before the pages are present finds nothing to do and relies on this wake;
// whoever reads of it later wakes by himself. holes says to resolve the faults rather than wait for them to come again.
func (f *Filler) arrived(lo, hi int64, holes bool) {
	f.present.add(lo, hi)
	switch {
	case !f.lazy:
	case holes && hi-lo == 1:
		f.resolve(lo)
	default:
		if err := f.m.wake(lo*pageSize, (hi-lo)*pageSize); err != nil {
			f.failed(err)
		}
	}
	if f.waiting.Load() > 0 {
		f.mu.Lock()
		for page := range f.wanted {
			if page >= lo && page < hi {
				f.unwant(page)
			}
		}
		f.changed.Broadcast()
		f.mu.Unlock()
	}
	if f.remaining.Add(lo-hi) == 0 {
		close(f.complete)
	}
}

// demand requests an absent page of the other side, if it was not yet.
func (f *Filler) demand(page int64, since time.Time) {
	f.mu.Lock()
	_, known := f.wanted[page]
	if !known {
		f.wanted[page] = since
		f.waiting.Add(1)
		if f.present.has(page) { // it arrived before we said that we wait
			f.unwant(page)
			known = true
		}
	}
	f.mu.Unlock()
	if !known {
		f.request(page * pageSize)
	} else if f.lazy && f.present.has(page) {
		f.resolve(page)
	}
}

// unwant forgets a page of wanted, which has arrived. f.mu is held.
func (f *Filler) unwant(page int64) {
	f.latency.add(time.Since(f.wanted[page]))
	delete(f.wanted, page)
	f.waiting.Add(-1)
}

// failed reports a failure that will be tried again.
func (f *Filler) failed(err error) {
	f.failures.Add(1)
	f.mu.Lock()
	if !f.ended {
		f.err = err
	}
	f.mu.Unlock()
	if f.opts.OnError != nil {
		f.opts.OnError(err)
	}
}

// postpone has a demanded page tried again later.
func (f *Filler) postpone(page int64) {
	f.mu.Lock()
	f.failing[page] = struct{}{}
	f.mu.Unlock()
	select {
	case f.retryNow <- struct{}{}:
	default:
	}
}

// retry tries postponed pages again, until ctx ends.
func (f *Filler) retry() {
	buf := make([]byte, pageSize)
	for {
		select {
		case <-f.ctx.Done():
			return
		case <-f.retryNow:
		}
		for pause := f.opts.RetryMin; f.sleep(pause); pause = min(2*pause, f.opts.RetryMax) {
			f.mu.Lock()
			pages := make([]int64, 0, len(f.failing))
			for page := range f.failing {
				pages = append(pages, page)
			}
			clear(f.failing)
			f.mu.Unlock()
			again := false
			for _, page := range pages {
				if f.present.has(page) {
					f.resolve(page)
				} else if f.fetch(page, buf) != nil {
					again = true
					f.mu.Lock()
					f.failing[page] = struct{}{}
					f.mu.Unlock()
				}
			}
			if !again {
				f.recovered()
				break
			}
		}
	}
}

// sleep waits, and reports whether work is to go on.
func (f *Filler) sleep(d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-f.complete:
	case <-f.ctx.Done():
	}
	return false
}

type span struct{ lo, hi int64 } // pages

// stream brings everything that is absent, in passes, until nothing is.
func (f *Filler) stream() {
	for pause := f.opts.RetryMin; f.pass() && f.sleep(pause); pause = min(2*pause, f.opts.RetryMax) {
	}
}

// pass goes through all pages once and reports whether some may still be absent.
func (f *Filler) pass() (again bool) {
	var failed atomic.Bool
	var streams sync.WaitGroup
	spans := make(chan span)
	for range f.opts.Streams {
		streams.Go(func() {
			if !f.load(spans, nil) {
				failed.Store(true)
			}
		})
	}
	pages := f.present.limit
	data := int64(0) // up to where the source is known to have data: finding the end of a long extent takes its time
	for lo := f.present.next(0, pages, false); lo < pages; lo = f.present.next(lo, pages, false) {
		if f.extents != nil && lo >= data {
			r, err := f.extents.NextData(lo * pageSize)
			if errors.Is(err, io.EOF) {
				f.putZeros(lo, pages)
				break
			}
			// Any other error will show in the read.
			if err == nil && r.Offset/pageSize > lo {
				next := min(r.Offset/pageSize, pages)
				f.putZeros(lo, next)
				lo = next
				continue
			}
			if err == nil {
				data = r.End() / pageSize
			}
		}
		// Reading across pages that are there already beats many small reads, unless it is mostly them.
		hi := min(lo+f.opts.Chunk/pageSize, pages)
		if 2*f.present.count(lo, hi) > hi-lo {
			hi = f.present.next(lo, hi, true)
		}
		select {
		case spans <- span{lo, hi}:
			lo = hi
			continue
		case <-f.ctx.Done():
		}
		break
	}
	close(spans)
	streams.Wait()
	if f.ctx.Err() != nil {
		return false
	}
	if !failed.Load() {
		f.recovered()
	}
	return f.remaining.Load() > 0
}

// bringZeros brings what the source is known to have no data for.
func (f *Filler) bringZeros() {
	pages := f.present.limit
	for page := int64(0); f.extents != nil && page < pages && f.ctx.Err() == nil; {
		r, err := f.extents.NextData(page * pageSize)
		if errors.Is(err, io.EOF) {
			r = block.Range{Offset: pages * pageSize}
		} else if err != nil {
			return // it will show in a read
		}
		f.putZeros(page, min(r.Offset/pageSize, pages))
		page = max(page+1, (r.End()+pageSize-1)/pageSize)
	}
}

// Rest has everything be brought that was left out on demand. It may be called again.
func (f *Filler) Rest() { f.wantRest.Do(func() { close(f.rest) }) }

// NextPresent is the first range at or after off of what is there, and io.EOF when there is none. The rest is the source's.
func (f *Filler) NextPresent(off int64) (block.Range, error) {
	lo := f.present.next(off/pageSize, f.present.limit, true)
	if lo >= f.present.limit {
		return block.Range{}, io.EOF
	}
	hi := f.present.next(lo, f.present.limit, false)
	start := max(lo*pageSize, off)
	return block.Range{Offset: start, Length: hi*pageSize - start}, nil
}

// load brings spans, and whatever is nearby a demanded page first, until spans or done is closed. It reports whether all
// went well.
func (f *Filler) load(spans <-chan span, done <-chan struct{}) bool {
	ok := true
	buf := make([]byte, max(f.opts.Chunk, f.opts.ReadAround))
	for {
		var s span
		var more bool
		select {
		case s = <-f.nearby:
			more = true
		default:
			select {
			case s = <-f.nearby:
				more = true
			case s, more = <-spans:
			case <-done:
			case <-f.ctx.Done():
			}
		}
		if !more {
			return ok
		}
		if s.lo = f.present.next(s.lo, s.hi, false); s.lo == s.hi {
			continue // there by now
		}
		part := buf[:(s.hi-s.lo)*pageSize]
		if f.read(part, s.lo*pageSize) != nil || f.put(s.lo, part, false) != nil {
			ok = false
		}
	}
}

// recovered forgets a failure that was overcome.
func (f *Filler) recovered() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.ended && len(f.failing) == 0 {
		f.err = nil
	}
}

// nextAbsent is the first range at or after off that is not present.
func (f *Filler) nextAbsent(off int64) (block.Range, bool) {
	if f.remaining.Load() == 0 {
		return block.Range{}, false
	}
	lo := f.present.next(off/pageSize, f.present.limit, false)
	if lo == f.present.limit {
		return block.Range{}, false
	}
	hi := f.present.next(lo, f.present.limit, true)
	start := max(lo*pageSize, off)
	return block.Range{Offset: start, Length: hi*pageSize - start}, true
}

// ensure returns once the pages of a range are present, having them brought.
func (f *Filler) ensure(off, n int64) error {
	if f.remaining.Load() == 0 {
		return nil
	}
	hi := (off + n + pageSize - 1) / pageSize
	for page := off / pageSize; page < hi; {
		page = f.present.next(page, hi, false)
		if page == hi {
			return nil
		}
		end := f.present.next(page, min(hi, page+f.opts.Chunk/pageSize), true)
		if err := f.incomplete(); err != nil {
			return err
		}
		if f.src != nil {
			buf := make([]byte, (end-page)*pageSize)
			if err := f.read(buf, page*pageSize); err != nil {
				return err
			}
			if err := f.put(page, buf, false); err != nil {
				return err
			}
		} else {
			for p := page; p < end; p++ {
				if !f.present.has(p) {
					f.demand(p, time.Now())
				}
			}
		}
		if err := f.await(page, end); err != nil {
			return err
		}
		page = end
	}
	return nil
}

// incomplete is the error of a filling that ended incomplete.
func (f *Filler) incomplete() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.ended && f.remaining.Load() > 0 {
		return f.err
	}
	return nil
}

// await waits until pages are present.
func (f *Filler) await(lo, hi int64) error {
	f.waiting.Add(1)
	defer f.waiting.Add(-1)
	f.mu.Lock()
	defer f.mu.Unlock()
	for !f.present.hasAll(lo, hi) {
		if f.ended {
			return f.err
		}
		f.changed.Wait()
	}
	return nil
}
