package block

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
)

// LazyOptions say what a [Lazy] is missing and where it comes from.
type LazyOptions struct {
	// BlockSize is the unit in bytes in which things are missing: a power of two of at least PageSize. 0 means PageSize.
	BlockSize int64

	// Missing lists what the destination does not hold yet, aligned to BlockSize but for the end of the device. Nil means
	// all of it, an empty list nothing.
	Missing []Range

	// Fetch asks for r, one or more missing blocks that someone waits for, to be delivered by Fill ahead of everything
	// else. It may return once the request is on its way, or once the data is filled in; a reader that misses several
	// stretches calls it one after another, so the former is faster. Whoever asked goes on waiting until the blocks
	// are present. An error is handed to all who wait for these blocks, which are asked for again at the next
	// read. ctx ends when the device is closed.
	//
	// Calls are concurrent, and never for the same block at the same time. Nil: nobody is asked, and
	// waiting ends when a Fill happens to bring the block.
	Fetch func(ctx context.Context, r Range) error

	// List is a file that says durably what is missing, for a destination whose contents are worth something before all of
	// them have arrived. If it is there, it is what Missing and BlockSize are. If not, the first Flush makes it,
	// and until that has returned nil nothing of what this device does may be relied on after a power cut.
	// [Lazy.Complete] removes it. Empty: what is missing is known to this process alone.
	List string

	// Live is a file in memory in which the device keeps, from block to block, what only a Flush puts into List. It is what
	// [OverlayOptions.Live] is, for the same users.
	Live *os.File
}

// Lazy is a device whose contents arrive while it is in use, in a destination device, from wherever [LazyOptions.Fetch]
// and the callers of Fill get them. It is the destination of a migration after the switch.
//
// Each block goes its way once:
//
//	absent ── someone waits: Fetch ──► in flight ── Fill ──► present
//	  │  ▲                               │  │                  ▲
//	  │  └────────── Fetch failed ───────┘  └─ overwritten ────┤
//	  └────── Fill (unasked), overwritten, discarded ──────────┘
//
// Present blocks are read from and written to the destination directly. A read of a missing block, and a write to a part of one,
// wait until it is present. A write or Discard of a whole missing block makes it present, and what Fill brings for
// it later is dropped: it is older. There is no way back from present.
//
// # What a crash leaves
//
// With a list, Flush makes what is present durable in the destination first, then strikes it off the list, and returns
// when that is durable, too. So a block that is found on the list was never part of a Flush that returned, and
// who fetches it again overwrites nothing that was promised.
type Lazy struct {
	dst       Device
	size      int64 // bytes
	blockSize int64 // bytes
	blocks    int64
	fetch     func(context.Context, Range) error

	// locks order what makes a block present: Fill, and writes that cover it. A block is looked at, written and marked under
	// its lock, so that a Fill never overwrites a newer write. Present blocks need no lock.
	locks stripes

	present bitmap
	missing atomic.Int64 // how many blocks are not present

	list *missingList // nil: not kept

	mu      sync.Mutex        // guards flights, and idle being closed
	flights map[int64]*flight // blocks in flight
	idle    chan struct{}     // closed when nothing is missing

	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	closed atomic.Bool
	using  sync.RWMutex // held shared by calls that use dst; Close takes it to wait for them
}

// flight is a block someone waits for.
type flight struct {
	done chan struct{} // closed when the block is present, or err is set
	err  error         // why it will not be; set before done is closed
}

var (
	_ Device  = (*Lazy)(nil)
	_ Extents = (*Lazy)(nil)
)

// NewLazy wraps dst, which it owns, and of which it is the only user from then on. When it fails, dst stays the caller's.
func NewLazy(dst Device, opts LazyOptions) (*Lazy, error) {
	return newLazy(hostStorage{}, dst, opts)
}

func newLazy(fs storage, dst Device, opts LazyOptions) (_ *Lazy, err error) {
	var list *missingList
	if opts.List != "" {
		if list, err = openMissingList(fs, opts.List, dst.Size()); err != nil {
			return nil, fmt.Errorf("make lazy device: %w", err)
		}
		defer func() {
			if err != nil {
				err = errors.Join(err, list.close())
			}
		}()
	}
	l := &Lazy{
		list: list,
		dst:  dst, size: dst.Size(), blockSize: opts.BlockSize, fetch: opts.Fetch,
		flights: make(map[int64]*flight), idle: make(chan struct{}),
	}
	if l.blockSize == 0 {
		l.blockSize = PageSize
	}
	if err := checkBlockSize(l.blockSize); err != nil {
		return nil, fmt.Errorf("make lazy device: %w", err)
	}
	missing := opts.Missing
	if list != nil && list.found {
		l.blockSize = list.blockSize
	}
	l.blocks = (l.size + l.blockSize - 1) / l.blockSize
	l.present = newBitmap(l.blocks)
	if missing == nil && l.size > 0 {
		missing = []Range{{Offset: 0, Length: l.size}}
	}
	if list != nil && list.found {
		missing = []Range{}
		for _, r := range list.missing(l.blocks) {
			missing = append(missing, l.bytesOf(r.Offset, r.End()-1))
		}
	}
	if len(missing) > 0 {
		absent := newBitmap(l.blocks)
		for _, r := range missing {
			first, last, err := l.wholeBlocks(r.Offset, r.Length)
			if err != nil {
				return nil, fmt.Errorf("make lazy device: missing range: %w", err)
			}
			absent.set(first, last)
		}
		for i := range absent {
			l.present[i].Store(^absent[i].Load())
		}
		var n int64
		absent.take(func(first, last int64) { n += last - first + 1 })
		l.missing.Store(n)
	} else {
		for i := range l.present {
			l.present[i].Store(^uint64(0))
		}
	}
	if list != nil {
		list.begin(l)
	}
	if opts.Live != nil {
		if err := l.live(opts.Live); err != nil {
			return nil, fmt.Errorf("make lazy device: what had arrived when its last user died: %w", err)
		}
	}
	if l.missing.Load() == 0 {
		close(l.idle)
	}
	l.ctx, l.cancel = context.WithCancel(context.Background())
	return l, nil
}

// wholeBlocks is the first and last block of a range that must consist of whole ones, and not be empty.
func (l *Lazy) wholeBlocks(off, n int64) (first, last int64, err error) {
	if err := checkRange("fill", "lazy device", off, n, l.size); err != nil {
		return 0, 0, err
	}
	if n == 0 || off%l.blockSize != 0 || (n%l.blockSize != 0 && off+n != l.size) {
		return 0, 0, fmt.Errorf("%d bytes at offset %d are not whole blocks of %d bytes: %w", n, off, l.blockSize, os.ErrInvalid)
	}
	return off / l.blockSize, (off + n - 1) / l.blockSize, nil
}

func (l *Lazy) span(off, n int64) (first, last int64) {
	return off / l.blockSize, (off + n - 1) / l.blockSize
}

// bytesOf is the range of bytes of the blocks [first, last].
func (l *Lazy) bytesOf(first, last int64) Range {
	off := first * l.blockSize
	return Range{Offset: off, Length: min((last+1)*l.blockSize, l.size) - off}
}

// enter begins a call that uses dst, unless the device is closed; leave ends it.
func (l *Lazy) enter(verb string) error {
	l.using.RLock()
	if l.closed.Load() {
		l.using.RUnlock()
		return errClosed(verb, "lazy device")
	}
	return nil
}

func (l *Lazy) leave() { l.using.RUnlock() }

// Fill delivers data for whole blocks at off. Blocks that are present already keep what they have. It is for the
// background stream and for answers to Fetch alike, and may be called concurrently.
func (l *Lazy) Fill(off int64, data []byte) error {
	return l.fill(off, int64(len(data)), func(r Range) error {
		_, err := l.dst.WriteAt(data[r.Offset-off:r.End()-off], r.Offset)
		return err
	})
}

// FillZero delivers zeros for n bytes of whole blocks at off.
func (l *Lazy) FillZero(off, n int64) error {
	return l.fill(off, n, func(r Range) error { return l.dst.Discard(r.Offset, r.Length) })
}

func (l *Lazy) fill(off, n int64, store func(Range) error) error {
	first, last, err := l.wholeBlocks(off, n)
	if err != nil {
		return err
	}
	if err := l.enter("fill"); err != nil {
		return err
	}
	defer l.leave()
	l.locks.lock(first, last)
	defer l.locks.unlock(first, last)
	for i := l.present.next(first, last+1, false); i <= last; {
		end := l.present.next(i, last+1, true) - 1
		if err := store(l.bytesOf(i, end)); err != nil {
			return err // who waits goes on waiting: the next Fill may succeed
		}
		l.arrived(i, end)
		i = l.present.next(end+1, last+1, false)
	}
	return nil
}

// arrived marks the blocks [first, last], which the caller has locked, present, and wakes who waits for them. The bits are
// set before mu is taken, and await looks at them with mu held: so a flight is listed here in time, or never.
func (l *Lazy) arrived(first, last int64) {
	n := int64(0)
	for i := l.present.next(first, last+1, false); i <= last; i = l.present.next(i+1, last+1, false) {
		n++
	}
	if n == 0 {
		return // a write to what was there already, by the time the lock was ours
	}
	l.present.set(first, last)
	if l.list != nil {
		l.list.changed.set(first, last)
	}
	left := l.missing.Add(-n)

	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.flights) > 0 {
		for i := first; i <= last; i++ {
			if f := l.flights[i]; f != nil {
				close(f.done)
				delete(l.flights, i)
			}
		}
	}
	if left == 0 {
		close(l.idle)
	}
}

// ensure returns when the blocks [first, last] are present.
func (l *Lazy) ensure(first, last int64) error {
	for !l.present.all(first, last) {
		if err := l.await(first, last); err != nil {
			return err
		}
	}
	return nil
}

// await asks for those of the blocks [first, last] nobody has asked for, and waits for all that are missing.
func (l *Lazy) await(first, last int64) error {
	var wait []*flight
	var ask []Range // in blocks
	l.mu.Lock()
	for i := l.present.next(first, last+1, false); i <= last; i = l.present.next(i+1, last+1, false) {
		f := l.flights[i]
		if f == nil {
			f = &flight{done: make(chan struct{})}
			l.flights[i] = f
			if k := len(ask) - 1; k >= 0 && ask[k].End() == i {
				ask[k].Length++
			} else {
				ask = append(ask, Range{Offset: i, Length: 1})
			}
		}
		wait = append(wait, f)
	}
	l.mu.Unlock()
	for _, r := range ask {
		if l.fetch == nil {
			break
		}
		if err := l.fetch(l.ctx, l.bytesOf(r.Offset, r.End()-1)); err != nil {
			l.abort(r, fmt.Errorf("fetch %d blocks at offset %d: %w", r.Length, r.Offset*l.blockSize, err))
		}
	}
	for _, f := range wait {
		select {
		case <-f.done:
			if f.err != nil {
				return f.err
			}
		case <-l.ctx.Done():
			return errClosed("wait for blocks of", "lazy device")
		}
	}
	return nil
}

// abort ends the flights of blocks that will not come, for now.
func (l *Lazy) abort(r Range, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := r.Offset; i < r.End(); i++ {
		if f := l.flights[i]; f != nil {
			f.err = err
			close(f.done)
			delete(l.flights, i)
		}
	}
}

// Size implements [Device].
func (l *Lazy) Size() int64 { return l.size }

// ReadAt implements [Device]. It waits for what is missing.
func (l *Lazy) ReadAt(p []byte, off int64) (int, error) {
	if l.closed.Load() {
		return 0, errClosed("read", "lazy device")
	}
	p, eof := clipRead("lazy device", p, off, l.size)
	if len(p) == 0 {
		return 0, eof
	}
	if l.missing.Load() > 0 {
		if err := l.ensure(l.span(off, int64(len(p)))); err != nil {
			return 0, err
		}
	}
	if err := l.enter("read"); err != nil {
		return 0, err
	}
	defer l.leave()
	n, err := l.dst.ReadAt(p, off)
	if err == nil || err == io.EOF && n == len(p) {
		err = eof
	}
	return n, err
}

// WriteAt implements [Device]. It waits for blocks that are missing and written in part.
func (l *Lazy) WriteAt(p []byte, off int64) (int, error) {
	n := 0
	err := l.change("write", off, int64(len(p)), func() (err error) {
		n, err = l.dst.WriteAt(p, off)
		return err
	})
	return n, err
}

// Discard implements [Device]. It waits for blocks that are missing and discarded in part.
func (l *Lazy) Discard(off, n int64) error {
	return l.change("discard", off, n, func() error { return l.dst.Discard(off, n) })
}

// change calls store, which overwrites [off, off+n) of the destination, when no block is missing that it changes in part.
func (l *Lazy) change(verb string, off, n int64, store func() error) error {
	if err := checkRange(verb, "lazy device", off, n, l.size); err != nil {
		return err
	}
	if l.closed.Load() {
		return errClosed(verb, "lazy device")
	}
	if n == 0 || l.missing.Load() == 0 {
		if err := l.enter(verb); err != nil {
			return err
		}
		defer l.leave()
		return store()
	}
	first, last := l.span(off, n)
	for _, i := range [2]int64{first, last} {
		if b := l.bytesOf(i, i); b.Offset < off || b.End() > off+n {
			if err := l.ensure(i, i); err != nil {
				return err
			}
		}
	}
	// Every block is now present, or overwritten whole.
	if err := l.enter(verb); err != nil {
		return err
	}
	defer l.leave()
	if l.present.all(first, last) {
		return store()
	}
	l.locks.lock(first, last)
	defer l.locks.unlock(first, last)
	if err := store(); err != nil {
		return err
	}
	l.arrived(first, last)
	return nil
}

// Flush implements [Device]: it makes what is present durable, and then, with a list, that it is.
func (l *Lazy) Flush() error {
	if err := l.enter("flush"); err != nil {
		return err
	}
	defer l.leave()
	return l.flush()
}

func (l *Lazy) flush() error {
	if l.list == nil {
		return l.dst.Flush()
	}
	return l.list.flush(l.dst)
}

// Complete makes durable that nothing is missing, and removes the list. It fails if something is. From then on the device
// is its destination, and a little detour.
func (l *Lazy) Complete() error {
	if n := l.Missing(); n > 0 {
		return fmt.Errorf("complete lazy device: %d bytes are missing", n)
	}
	if err := l.Flush(); err != nil {
		return fmt.Errorf("complete lazy device: %w", err)
	}
	if l.list == nil {
		return nil
	}
	return l.list.remove()
}

// live moves the bits of what is present into a file in memory. If they were there before, those that are not on the list
// yet are what was not flushed.
func (l *Lazy) live(f *os.File) error {
	size := int64(len(l.present)) * 8
	before, err := grow(f, size)
	if err != nil || size == 0 {
		return err
	}
	words, err := mapWords(l, f, size)
	if err != nil {
		return err
	}
	shared := bitmap(words)
	if !before {
		for i := range l.present {
			shared[i].Store(l.present[i].Load())
		}
		l.present = shared
		return nil
	}
	var n int64
	for i := int64(0); i < l.blocks; i++ {
		switch {
		case !shared.get(i):
			n++
		case l.list != nil && !l.present.get(i):
			l.list.changed.set(i, i)
		}
	}
	l.present = shared
	l.missing.Store(n)
	return nil
}

// NextData implements [Extents]. What is missing may be data.
func (l *Lazy) NextData(off int64) (Range, error) {
	if err := l.enter("find data in"); err != nil {
		return Range{}, err
	}
	defer l.leave()
	if off < 0 || off >= l.size {
		return restOf(l.size, off)
	}
	for off < l.size {
		i := off / l.blockSize
		if !l.present.get(i) {
			end := min(l.present.next(i, l.blocks, true)*l.blockSize, l.size)
			return Range{Offset: off, Length: end - off}, nil
		}
		end := min(l.present.next(i, l.blocks, false)*l.blockSize, l.size)
		r, err := NextData(l.dst, off)
		if err != nil && err != io.EOF {
			return Range{}, err
		}
		if err == nil && r.Offset < end {
			r.Length = min(r.End(), end) - r.Offset
			return r, nil
		}
		off = end
	}
	return Range{}, io.EOF
}

// Missing is how many bytes are not present yet.
func (l *Lazy) Missing() int64 { return min(l.missing.Load()*l.blockSize, l.size) }

// NextMissing returns the first range of missing blocks at or after off, and io.EOF when there is none.
func (l *Lazy) NextMissing(off int64) (Range, error) {
	if off < 0 || off >= l.size {
		return restOf(l.size, off)
	}
	i := l.present.next((off+l.blockSize-1)/l.blockSize, l.blocks, false)
	if i >= l.blocks {
		return Range{}, io.EOF
	}
	return l.bytesOf(i, l.present.next(i, l.blocks, true)-1), nil
}

// Wait returns nil when nothing is missing any more, or why that will not be.
func (l *Lazy) Wait(ctx context.Context) error {
	select {
	case <-l.idle:
		return nil
	default:
	}
	select {
	case <-l.idle:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for %d missing bytes: %w", l.Missing(), ctx.Err())
	case <-l.ctx.Done():
		return errClosed("wait for blocks of", "lazy device")
	}
}

// InFlight lists the blocks someone waits for, in no particular order: what to ask for again on a new connection, when
// the requests that Fetch sent on the old one are lost.
func (l *Lazy) InFlight() []Range {
	l.mu.Lock()
	defer l.mu.Unlock()
	ranges := make([]Range, 0, len(l.flights))
	for i := range l.flights {
		ranges = append(ranges, l.bytesOf(i, i))
	}
	return ranges
}

// Fail hands err to all who wait now. Who reads a missing block later asks and waits anew.
func (l *Lazy) Fail(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i, f := range l.flights {
		f.err = err
		close(f.done)
		delete(l.flights, i)
	}
}

// Close implements [Device]. Who waits for a block gets an error that wraps [os.ErrClosed]. What is missing stays so.
func (l *Lazy) Close() error {
	if l.closed.Swap(true) {
		return nil
	}
	l.cancel()
	l.using.Lock()
	defer l.using.Unlock()
	err := errors.Join(l.flush(), l.dst.Close())
	if l.list != nil {
		err = errors.Join(err, l.list.close())
	}
	return err
}
