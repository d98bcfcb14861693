package migrate

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/zeebo/xxh3"
	"golang.org/x/sync/errgroup"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/wire"
)

// Content by reference: what a device held a while ago is in a store that both sides reach. The destination fetches it from there, while the
// source sends what is not there, or was written since. What the destination cannot get, for whatever reason, it says, and the source
// sends that, too. When the source has had nothing else to do for a while, it gets some of what the destination has not begun to fetch, as much at a
// time as it sends in about a second: so both ways are used until all is here, and a store that is slow, or silent, costs little.
//
//	source                                   destination
//	  manifest: stored ───────────────────►  StoreTarget.Stored
//	                   ◄───────────────────  accept: stored
//	  what is not stored ─────────────────►  ◄── store: what is, but for pages that the source has sent
//	  idle             ───────────────────►
//	                   ◄───────────────────  absent: the end of what was not fetched
//	  that, idle       ───────────────────►  ◄── store: the rest
//	                   ◄───────────────────  absent, last: nothing is left to fetch
//	  rounds, as always

// Stored says what of a device is in a store.
type Stored struct {
	// Reference is by which a destination finds it. It is JSON of at most wire.MaxStored bytes, and names no secrets.
	Reference json.RawMessage

	// Index is of what is stored: of a device of that size that holds it, and zeros where nothing is stored. It must not change.
	Index *BaseIndex
	// Ranges are what is stored, ascending, as whole pages.
	Ranges []block.Range
	// Changed, if set, returns the first range at or after off of those stored in which the device may differ from what is stored, and io.EOF
	// when there is none. It is called when writes to the device are tracked. Nil: anywhere.
	Changed func(off int64) (block.Range, error)
}

// StoreTarget is a [Target] that can reach stores.
type StoreTarget interface {
	Target

	// Stored is called after Prepare if the manifest names something that is stored. It returns, in the order of the manifest, what of
	// each device can be fetched, and nil where that is nothing: then all of it comes from the source. It should not take long.
	Stored(ctx context.Context, m *wire.Manifest) ([]Fetcher, error)
}

// Fetcher gets what is stored of a device. Its methods may be called concurrently.
type Fetcher interface {
	// Chunks lists what there is, ascending, as whole pages. Each is fetched as a whole.
	Chunks() []block.Range
	// Fetch fills p with the content of the chunk of that number, which it has verified. It returns soon when ctx ends.
	Fetch(ctx context.Context, chunk int, p []byte) error
	// Is reports whether p is the content of that chunk.
	Is(chunk int, p []byte) bool
}

const (
	fetchers   = 32              // chunks of a device that are fetched at once, at most
	fetchGrace = 3 * time.Second // for which the source may have nothing to do before it gets a part of what could be fetched, and a chunk take that is waited for; after such a part, shareTime
	firstShare = 4 << 20         // bytes of that part, the first time
	shareTime  = time.Second     // that sending it should take
)

// IndexBuilder makes the index of what is stored, as it is stored. Its methods may be called concurrently, but not for the same page.
type IndexBuilder struct{ pages *digest }

// NewIndexBuilder is an index of zeros, of a device of that many bytes. It takes 16 bytes for each page of 4096 that holds data.
func NewIndexBuilder(size int64) *IndexBuilder { return &IndexBuilder{newDigest(size)} }

// Write notes that data, whole pages, is what is stored at off.
func (b *IndexBuilder) Write(off int64, data []byte) { b.pages.write(off, data) }

// Zero notes that the n bytes at off, whole pages, are zeros.
func (b *IndexBuilder) Zero(off, n int64) { b.pages.zero(off, n) }

// Builder goes on from an index, which stays what it is.
func (x *BaseIndex) Builder() *IndexBuilder { return &IndexBuilder{x.pages.clone()} }

// Index is a copy of what was noted. Nobody may call Write meanwhile.
func (b *IndexBuilder) Index() *BaseIndex { return newBaseIndex(b.pages.clone()) }

// take sets the terms of the n bytes at off to those of another digest, nil being zeros.
func (d *digest) take(from *digest, off, n int64) {
	var sum termSum
	for page, end := off/block.PageSize, (off+n+block.PageSize-1)/block.PageSize; page < end; page++ {
		d.takePage(from, page, &sum)
	}
	d.add(sum)
}

func (d *digest) takePage(from *digest, page int64, sum *termSum) {
	hi, lo := from.at(page)
	e := d.term(page)
	if e == nil {
		if hi|lo == 0 {
			return
		}
		e = d.grow(page)
	}
	sum.replace(xxh3.Uint128{Lo: e.lo.Swap(lo), Hi: e.hi.Swap(hi)}, xxh3.Uint128{Lo: lo, Hi: hi})
}

// at is the term of a page, zeros where there is none.
func (d *digest) at(page int64) (hi, lo uint64) {
	if d == nil {
		return 0, 0
	}
	if e := d.term(page); e != nil {
		return e.hi.Load(), e.lo.Load()
	}
	return 0, 0
}

// check finds mistakes in what is said to be stored of a device.
func (s *Stored) check(size int64) error {
	if s.Index == nil || s.Index.Size() != size {
		return fmt.Errorf("what is stored has no index, or one of another size than the device's %d bytes", size)
	}
	if len(s.Reference) == 0 || len(s.Reference) > wire.MaxStored {
		return fmt.Errorf("the reference to what is stored has %d bytes: 1 to %d are allowed", len(s.Reference), wire.MaxStored)
	}
	return checkPages(s.Ranges, size)
}

// checkPages finds what is wrong with a list of ranges of a device: it is to ascend, and to consist of whole pages.
func checkPages(list []block.Range, size int64) error {
	end := int64(0)
	for _, r := range list {
		if r.Offset < end || r.Length <= 0 || r.Length > size-r.Offset || aligned(r, size) != r {
			return fmt.Errorf("%d bytes at %d of a device of %d bytes are not whole pages, or not in ascending order", r.Length, r.Offset, size)
		}
		end = r.End()
	}
	return nil
}

// storing is, at the source, what the destination fetches from a store. The destination may speak of that before its accept was looked at.
type storing struct {
	news chan struct{} // capacity 1
	base []*digest     // per device, what the destination's started as before what is stored came over it; nil: zeros

	mu     sync.Mutex // guards what follows
	absent []*pageSet // per device, what the destination has said that it does not get; nil: nothing of the device is fetched
	over   []bool     // per device, whether the destination has said its last word
}

// newStoring is nil if nothing is stored of the devices.
func newStoring(devices []*sourceDevice) *storing {
	if !slices.ContainsFunc(devices, func(d *sourceDevice) bool { return d.Stored != nil }) {
		return nil
	}
	n := len(devices)
	st := &storing{news: make(chan struct{}, 1), absent: make([]*pageSet, n), over: make([]bool, n), base: make([]*digest, n)}
	for i, d := range devices {
		if d.Stored != nil {
			st.absent[i] = newPageSet(d.size)
		}
	}
	return st
}

// store settles, after accept, which devices are fetched. What they are made from is settled.
func (s *source) store(stored []bool) {
	if s.storing == nil {
		return
	}
	s.storing.mu.Lock()
	defer s.storing.mu.Unlock()
	for i, d := range s.devices {
		if d.Stored == nil || len(stored) == 0 || !stored[i] {
			s.storing.absent[i] = nil
			continue
		}
		based := d.digest.shared.Load()
		if based {
			s.storing.base[i] = d.Base.pages
		}
		for _, r := range d.Stored.Ranges {
			d.digest.take(d.Stored.Index.pages, r.Offset, r.Length)
		}
		d.digest.shared.Store(true)
		d.Changed = d.notStored(based)
	}
}

// notStored is SourceDevice.Changed of a device that starts as what is stored.
func (d *sourceDevice) notStored(based bool) func(int64) (block.Range, error) {
	changed, stored := d.Changed, d.Stored
	list := sync.OnceValues(func() ([]block.Range, error) { // not before writes are tracked
		outside := []block.Range{{Length: d.size}}
		if based && changed != nil {
			var err error
			if outside, err = rangesOf(changed, d.size); err != nil {
				return nil, err
			}
		}
		outside, _ = split(outside, stored.Ranges)
		if stored.Changed == nil {
			return union(outside, stored.Ranges), nil
		}
		since, err := rangesOf(stored.Changed, d.size)
		return union(outside, since), err
	})
	return func(off int64) (block.Range, error) {
		ranges, err := list()
		if err != nil {
			return block.Range{}, err
		}
		n, _ := slices.BinarySearchFunc(ranges, off, func(r block.Range, off int64) int {
			if r.End() <= off {
				return -1
			}
			return 1
		})
		if n == len(ranges) {
			return block.Range{}, io.EOF
		}
		r := ranges[n]
		if r.Offset < off {
			r = block.Range{Offset: off, Length: r.End() - off}
		}
		return r, nil
	}
}

// rangesOf lists what next returns one after another.
func rangesOf(next func(int64) (block.Range, error), size int64) ([]block.Range, error) {
	var list []block.Range
	for off := int64(0); off < size; {
		r, err := next(off)
		if errors.Is(err, io.EOF) {
			break
		}
		if err == nil && (r.Offset < off || r.Length <= 0) {
			err = fmt.Errorf("got %d bytes at %d", r.Length, r.Offset)
		}
		if err != nil {
			return nil, fmt.Errorf("from %d: %w", off, err)
		}
		list = append(list, r)
		off = r.End()
	}
	return normalize(list, size), nil
}

// notFetched takes an Absent frame in.
func (s *source) notFetched(h wire.Header, payload []byte) error {
	st := s.storing
	if st == nil {
		return unexpectedFrame(h.Type, "nothing to fetch")
	}
	st.mu.Lock()
	defer st.mu.Unlock()
	if int(h.Device) >= len(st.absent) || st.absent[h.Device] == nil {
		return unexpectedFrame(h.Type, "nothing to fetch")
	}
	if st.over[h.Device] {
		return unexpectedFrame(h.Type, "nothing more about that device")
	}
	set := st.absent[h.Device]
	err := wire.DecodeMissing(h, payload, func(r wire.Run) error {
		if r.Page+r.Pages > set.pages {
			return fmt.Errorf("%w: %v frame for %d pages at %d of device %d of %d pages", wire.ErrMalformed, h.Type, r.Pages, r.Page, h.Device, set.pages)
		}
		for page := r.Page; page < r.Page+r.Pages; page++ {
			set.put(page)
		}
		return nil
	})
	if err != nil {
		return err
	}
	if h.Flags&wire.FlagLast != 0 {
		st.over[h.Device] = true
	}
	select {
	case st.news <- struct{}{}:
	default:
	}
	return nil
}

// fetched reports whether the destination has got from the store what it gets from there.
func (s *source) fetched() bool {
	if s.storing == nil {
		return true
	}
	s.storing.mu.Lock()
	defer s.storing.mu.Unlock()
	for i, p := range s.storing.absent {
		if p != nil && (!s.storing.over[i] || p.count.Load() > 0) {
			return false
		}
	}
	return true
}

// awaitFetched sends what the destination does not get from the store, until nothing is left to be fetched. What is sent here counts as no round: it
// says nothing about the guest.
func (s *source) awaitFetched() error {
	var enough <-chan time.Time
	if s.goal.PostCopy && s.goal.MaxTotalTime > 0 {
		t := time.NewTimer(time.Until(s.began.Add(s.goal.MaxTotalTime)))
		defer t.Stop()
		enough = t.C
	}
	told := false
	for !s.fetched() {
		devices := s.takeAbsent()
		if len(devices) == 0 {
			h := wire.Header{Type: wire.TypeIdle}
			if !told {
				if err := s.link.send(h, nil); err != nil {
					return err
				}
				told = true
			}
			select {
			case <-s.storing.news:
			case <-enough:
				h.Flags = wire.FlagNow
				if err := s.link.send(h, nil); err != nil {
					return err
				}
			case <-s.link.ctx.Done():
				return context.Cause(s.link.ctx)
			}
			continue
		}
		told = false
		s.beginRound()
		err := s.each(devices, func(d *sourceDevice) error {
			_, err := s.sendAll(d, s.planPending)
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// takeAbsent makes pending what the destination was found not to get from the store, and returns the devices it is of.
func (s *source) takeAbsent() (devices []*sourceDevice) {
	st := s.storing
	st.mu.Lock()
	defer st.mu.Unlock()
	for i, d := range s.devices {
		set := st.absent[i]
		if set == nil || set.count.Load() == 0 {
			continue
		}
		var list []block.Range
		var sum termSum
		for page := set.next(0); page < set.pages; page = set.next(page + 1) {
			set.take(page)
			hi, lo := d.Stored.Index.pages.at(page)
			if h, l := d.digest.at(page); h != hi || l != lo {
				continue // it was sent meanwhile
			}
			d.digest.takePage(st.base[i], page, &sum)
			r := set.rangeOf(page, 1)
			if n := len(list); n > 0 && list[n-1].End() == r.Offset {
				list[n-1].Length += r.Length
			} else {
				list = append(list, r)
			}
		}
		d.digest.add(sum)
		s.absent.Add(measure(list, block.PageSize).Bytes)
		d.pending = union(d.pending, list)
		devices = append(devices, d)
	}
	return devices
}

// targetStored is what of a device is fetched from a store, at the destination.
type targetStored struct {
	Fetcher
	chunks []block.Range

	// using orders what writes the device: content of the source is written with it held shared, a chunk with it held
	// alone, so that no page of the store comes over a newer one.
	using   sync.RWMutex
	touched *pageSet // pages that the source has sent

	over atomic.Bool   // the last word was said, or is about to be
	wake chan struct{} // capacity 1

	mu     sync.Mutex     // guards what follows
	next   int            // first chunk that nobody has begun to fetch
	end    int            // first of those that are left to the source
	flying map[int]flight // being fetched
	kept   map[int]bool   // fetched, and being written: they are no longer the source's to send
	absent []int          // not got, and the source was not told
	idle   time.Time      // since when the source has nothing else to do; zero: it has
	share  int64          // bytes that it got when it had nothing to do; 0: it did not get any yet
	shared time.Time      // when
}

// flight is the fetching of a chunk.
type flight struct {
	cancel context.CancelFunc
	began  time.Time
}

// stored asks the target what it can fetch, if the source has something stored.
func (d *destination) stored(m *wire.Manifest) error {
	t, ok := d.cfg.Target.(StoreTarget)
	if !ok || d.link.version < 2 || !slices.ContainsFunc(m.Devices, func(d wire.Device) bool { return len(d.Stored) > 0 }) {
		return nil
	}
	all, err := t.Stored(d.link.ctx, m)
	if err != nil {
		return fmt.Errorf("prepare: find what is stored: %w", err)
	}
	if len(all) != len(d.devices) {
		return fmt.Errorf("prepare: target fetches of %d devices, the manifest has %d", len(all), len(d.devices))
	}
	for i, dev := range d.devices {
		// One of unknown contents would have to be cleared first.
		if all[i] == nil || dev.shared || !dev.based && !dev.blank || len(m.Devices[i].Stored) == 0 {
			continue
		}
		chunks := all[i].Chunks()
		if err := checkPages(chunks, dev.size); err != nil {
			return fmt.Errorf("prepare: what is stored of device %q: %w", dev.name, err)
		}
		dev.stored = &targetStored{Fetcher: all[i], chunks: chunks, end: len(chunks), touched: newPageSet(dev.size),
			flying: make(map[int]flight), kept: make(map[int]bool), wake: make(chan struct{}, 1)}
	}
	return nil
}

// fetch gets what is stored of a device, and says what is left to the source, until the link ends.
func (d *destination) fetch(c *content, index int) error {
	dev := c.devices[index]
	st := dev.stored
	ctx, cancel := context.WithCancel(c.link.ctx)
	defer cancel()
	var g errgroup.Group
	for range min(fetchers, max(1, len(st.chunks))) {
		g.Go(func() error { return d.fetchChunks(ctx, dev) })
	}
	tick := time.NewTicker(fetchGrace / 8)
	defer tick.Stop()
	for c.link.ctx.Err() == nil {
		absent, last := st.report(time.Now())
		if last {
			// Here, not when the guest is paused.
			if err := dev.Flush(); err != nil {
				return errors.Join(d.deviceError("flush", dev, 0, err), g.Wait())
			}
		}
		if len(absent) > 0 || last {
			st.over.Store(last)
			if err := d.sayAbsent(c, index, absent, last); err != nil || last {
				break
			}
			continue
		}
		select {
		case <-st.wake:
		case <-tick.C:
		case <-c.link.ctx.Done():
		}
	}
	cancel()
	return g.Wait()
}

// fetchChunks fetches one chunk after the other.
func (d *destination) fetchChunks(ctx context.Context, dev *targetDevice) error {
	st := dev.stored
	var p []byte
	for {
		n, ctx, ok := st.begin(ctx)
		if !ok {
			return nil
		}
		r := st.chunks[n]
		if int64(cap(p)) < r.Length {
			p = make([]byte, r.Length)
		}
		p = p[:r.Length]
		fetched := true
		if dev.based { // it may be what is here
			if _, err := dev.ReadAt(p, r.Offset); err == nil && st.Is(n, p) {
				fetched = false
			}
		}
		var err error
		if fetched {
			err = st.Fetch(ctx, n, p)
		}
		if err != nil && ctx.Err() == nil {
			d.log.Warn("a part of a device is not to be had from the store, and comes from the source", "device", dev.name, "offset", r.Offset, "error", err)
		}
		if err == nil && st.keep(n) { // else it was left to the source meanwhile
			n, err := d.put(dev, r.Offset, p)
			if err != nil {
				d.link.fail(err)
				return err
			}
			if fetched {
				d.storedBytes.Add(n)
			}
		}
		st.done(n, err == nil)
	}
}

// put stores a chunk, but for what the source has sent of it, and returns how much of that were data.
func (d *destination) put(dev *targetDevice, off int64, p []byte) (data int64, err error) {
	st := dev.stored
	st.using.Lock()
	defer st.using.Unlock()
	for at := int64(0); at < int64(len(p)); {
		n := min(block.PageSize, int64(len(p))-at)
		if st.touched.has((off + at) / block.PageSize) {
			at += n
			continue
		}
		// A run of pages of one kind.
		zero := block.IsZero(p[at : at+n])
		for end := at + n; end < int64(len(p)); end = at + n {
			more := min(block.PageSize, int64(len(p))-end)
			if st.touched.has((off+end)/block.PageSize) || block.IsZero(p[end:end+more]) != zero {
				break
			}
			n += more
		}
		run := block.Range{Offset: off + at, Length: n}
		if zero {
			err = d.storeZeros(dev, run)
		} else {
			err = d.storeData(dev, run.Offset, p[at:at+n])
			data += n
		}
		if err != nil {
			return data, err
		}
		at += n
	}
	return data, nil
}

// touch begins the writing of content that the source has sent; the returned function ends it.
func (s *targetStored) touch(r block.Range) (done func()) {
	s.using.RLock()
	s.touched.each(r, func(page int64) { s.touched.put(page) })
	return s.using.RUnlock
}

// begin takes a chunk to be fetched.
func (s *targetStored) begin(ctx context.Context) (chunk int, _ context.Context, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.next >= s.end || ctx.Err() != nil {
		return 0, nil, false
	}
	chunk = s.next
	s.next++
	ctx, cancel := context.WithCancel(ctx)
	s.flying[chunk] = flight{cancel, time.Now()}
	return chunk, ctx, true
}

// keep reports whether a chunk that was fetched is to be written. One that was left to the source must not be: the source believes that it is not here,
// and nothing keeps the chunk from coming over what the source has sent by then, or the guest has written here.
func (s *targetStored) keep(chunk int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	f, ok := s.flying[chunk]
	if ok {
		f.cancel()
		delete(s.flying, chunk)
		s.kept[chunk] = true
	}
	return ok
}

// done ends the fetching of a chunk.
func (s *targetStored) done(chunk int, got bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.kept, chunk)
	if f, ok := s.flying[chunk]; ok { // else it was left to the source
		f.cancel()
		delete(s.flying, chunk)
		if !got {
			s.absent = append(s.absent, chunk)
		}
	}
	s.signal()
}

func (s *targetStored) signal() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// sourceIdle notes that the source has nothing to send but what is left to it, or wants all of it.
func (s *targetStored) sourceIdle(now bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.idle.IsZero() {
		s.idle = time.Now()
		switch took := s.idle.Sub(s.shared); {
		case s.share == 0:
		case took < shareTime/2:
			s.share *= 2
		case took > 2*shareTime:
			s.share = max(s.share/2, firstShare/4)
		}
	}
	if now {
		s.leave(s.next)
		s.leaveFlying(time.Now())
	}
	s.signal()
}

// leave leaves the chunks from first on to the source. mu is held.
func (s *targetStored) leave(first int) {
	for n := first; n < s.end; n++ {
		s.absent = append(s.absent, n)
	}
	s.end = max(s.next, min(first, s.end))
}

// leaveFlying leaves those to the source that are being fetched since before then. mu is held.
func (s *targetStored) leaveFlying(then time.Time) {
	for n, f := range s.flying {
		if !f.began.After(then) {
			f.cancel()
			s.absent = append(s.absent, n)
			delete(s.flying, n)
		}
	}
}

// report is what the source is to be told now: which chunks are left to it, and whether that was all.
func (s *targetStored) report(now time.Time) (absent []int, last bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.idle.IsZero() && len(s.absent) == 0 {
		switch waited := now.Sub(s.idle) > fetchGrace; {
		case s.next < s.end && (waited || s.share > 0): // from its end
			if s.share == 0 {
				s.share = firstShare
			}
			first := s.end
			for bytes := int64(0); first > s.next && bytes < s.share; {
				first--
				bytes += s.chunks[first].Length
			}
			s.leave(first)
			s.shared = now
		case s.next >= s.end: // a chunk has had its time while the source was busy, too
			patience := fetchGrace
			if s.share > 0 { // the store is known to be the slower one
				patience = shareTime
			}
			s.leaveFlying(now.Add(-patience))
		}
	}
	absent, s.absent = s.absent, nil
	if len(absent) > 0 {
		s.idle = time.Time{} // until it has sent that
	}
	return absent, s.next >= s.end && len(s.flying) == 0 && len(s.kept) == 0
}

// sayAbsent tells the source what is left to it of a device.
func (d *destination) sayAbsent(c *content, index int, chunks []int, last bool) error {
	st := c.devices[index].stored
	set := newPageSetOf(c.devices[index].size, nil)
	st.using.RLock()
	for _, n := range chunks {
		set.each(st.chunks[n], func(page int64) {
			if !st.touched.has(page) {
				set.put(page)
			}
		})
	}
	st.using.RUnlock()
	if set.count.Load() == 0 && !last {
		st.sourceIdle(false) // as before: nothing comes for that
		return nil
	}
	return wire.EncodeAbsent(uint16(index), set.runs(), last, c.link.send)
}

// fetchAll begins to fetch what is stored. That ends with the link, at the latest.
func (d *destination) fetchAll(c *content) {
	for i, dev := range c.devices {
		if dev.stored != nil {
			d.workers.Go(func() {
				if err := d.fetch(c, i); err != nil {
					c.link.fail(err)
				}
			})
		}
	}
}

// idle takes an Idle frame in.
func (d *destination) idle(c *content, h wire.Header) error {
	any := false
	for _, dev := range c.devices {
		if dev.stored != nil {
			any = true
			dev.stored.sourceIdle(h.Flags&wire.FlagNow != 0)
		}
	}
	if !any {
		return unexpectedFrame(h.Type, "nothing that is stored")
	}
	return nil
}
