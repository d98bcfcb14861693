package objstore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/zeebo/xxh3"
	"golang.org/x/sync/errgroup"

	"github.com/drafter-vm/drafter/pkg/block"
)

// SyncConfig configures a [Syncer]. Store and Device are required.
type SyncConfig struct {
	Store  *Store
	Device block.Device // is only read

	// Writes reports what is written to Device; nobody else may use it. Nil: the device is read again and again instead, slowly, and what is
	// as it was the time before is quiet. That is for memory, of which nobody can tell cheaply what is written.
	Writes block.Tracker

	// Still says that nobody writes to Device, instead of Writes: it is put once.
	Still bool

	// Quiet is for how long a chunk was not written to that is put into the store. 0 means 10 s. Without Writes it is the least time between two readings.
	Quiet time.Duration

	// ReadRate is how many bytes per second are read where there are no Writes. 0 means 128 MiB.
	ReadRate int64

	// Ready, if set, says whether the device may be read by now. It is called often.
	Ready func() bool

	// Stored, if set, is told what was put at off, before it is in what [Syncer.Snapshot] returns; never twice at the same time.
	Stored func(off int64, content []byte)

	// Logger receives events; nil means slog.Default().
	Logger *slog.Logger
}

// SyncStats are how far a Syncer is.
type SyncStats struct {
	Chunks  int   // of the device
	Stored  int   // of them, what is in the store is what the device holds, as far as is known
	Waiting int   // that are to be put when they have been quiet
	Bytes   int64 // read and put, or found to be there, since the beginning
	Failing error // why the latest attempt to put something failed; nil: it did not
}

// Syncer puts what a device holds into a store while it is used. What is written often waits until that ends, and is put once.
//
// Run is its life. Snapshot and Resume are called by one goroutine at a time; Stats by any.
type Syncer struct {
	cfg SyncConfig
	log *slog.Logger

	turn chan struct{} // of one element: put in while chunks are put, and between Snapshot and Resume

	mu      sync.Mutex // guards what follows
	list    *List      // what is in the store, whether or not the device still holds it
	changed []bool     // per chunk, whether the device may hold something else
	last    []int64    // per chunk, when it was last seen to be written to, or to differ: nanoseconds since began
	sums    []uint64   // per chunk, without Writes: of what was read last
	bytes   int64
	failing error
	began   time.Time
	frozen  bool               // between Snapshot and Resume
	cut     context.CancelFunc // cuts the pass short that goes on; nil: there is none
	writes  bool               // Writes was started
}

// NewSyncer checks a configuration.
func NewSyncer(cfg SyncConfig) (*Syncer, error) {
	list, err := NewList(cfg.Device.Size())
	if err != nil {
		return nil, fmt.Errorf("sync device: %w", err)
	}
	if cfg.Quiet == 0 {
		cfg.Quiet = 10 * time.Second
	}
	if cfg.ReadRate == 0 {
		cfg.ReadRate = 128 << 20
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	n := len(list.Chunks)
	s := &Syncer{cfg: cfg, log: cfg.Logger, turn: make(chan struct{}, 1), list: list, changed: make([]bool, n), last: make([]int64, n), began: time.Now()}
	for i := range s.changed {
		s.changed[i] = true
	}
	if cfg.Still {
		s.cfg.Writes = still{}
	}
	if s.cfg.Writes == nil {
		s.sums = make([]uint64, n)
	}
	return s, nil
}

// still is the tracker of a device that nobody writes to.
type still struct{}

func (still) Start(context.Context) error                    { return nil }
func (still) Collect(context.Context) ([]block.Range, error) { return nil, nil }
func (still) Stop() error                                    { return nil }

// Run syncs until ctx ends, and returns when nothing of it goes on. A store that fails is tried again, at longer and longer intervals.
func (s *Syncer) Run(ctx context.Context) error {
	if s.cfg.Writes != nil {
		if err := s.cfg.Writes.Start(ctx); err != nil {
			return fmt.Errorf("sync device: %w", err)
		}
		s.mu.Lock()
		s.writes = true
		s.mu.Unlock()
		defer func() {
			s.turn <- struct{}{} // a snapshot needs the tracker until Resume
			defer func() { <-s.turn }()
			s.mu.Lock()
			defer s.mu.Unlock()
			s.writes = false
			for i := range s.changed {
				s.changed[i] = true // from now on nobody tells
			}
			_ = s.cfg.Writes.Stop()
		}()
	}
	const patience = time.Minute
	pause, announced := s.interval(), false
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause):
		}
		if s.cfg.Ready != nil && !s.cfg.Ready() {
			continue
		}
		err := s.pass(ctx)
		if ctx.Err() != nil {
			return nil
		}
		s.mu.Lock()
		before := s.failing
		s.failing = err
		s.mu.Unlock()
		switch {
		case err == nil:
			if before != nil {
				s.log.Info("the object store can be written again")
			}
			pause = s.interval()
			if st := s.Stats(); !announced && (st.Bytes > 0 || st.Waiting == 0) {
				announced = true
				s.log.Info("the object store has what a device holds, but for what was written a short while ago", "chunks", st.Chunks, "stored", st.Stored)
			}
		default:
			if before == nil {
				s.log.Warn("the object store cannot be written: it falls behind", "error", err)
			}
			pause = min(2*pause, patience)
		}
	}
}

func (s *Syncer) interval() time.Duration {
	if s.cfg.Writes == nil {
		return s.cfg.Quiet
	}
	return max(s.cfg.Quiet/4, time.Millisecond)
}

// pass puts what is quiet now, until Snapshot cuts it short.
func (s *Syncer) pass(ctx context.Context) error {
	select {
	case s.turn <- struct{}{}:
	case <-ctx.Done():
		return nil
	}
	defer func() { <-s.turn }()
	if s.cfg.Writes != nil {
		if err := s.collect(ctx); err != nil {
			return err
		}
	}
	ctx, cut := context.WithCancel(ctx)
	defer cut()
	s.mu.Lock()
	s.cut = cut
	if s.frozen {
		cut()
	}
	s.mu.Unlock()
	err := s.putQuiet(ctx)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cut = nil
	if s.frozen && ctx.Err() != nil {
		return nil // the store has not failed
	}
	return err
}

// putQuiet puts what is quiet now. turn is held.
func (s *Syncer) putQuiet(ctx context.Context) error {
	if s.cfg.Writes == nil {
		return s.readAll(ctx)
	}
	var due []int
	s.mu.Lock()
	now := time.Since(s.began)
	for n, changed := range s.changed {
		if changed && (s.cfg.Still || now-time.Duration(s.last[n]) >= s.cfg.Quiet) {
			due = append(due, n)
		}
	}
	s.mu.Unlock()
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(s.cfg.Store.cfg.Concurrency)
	hole := s.holes()
	for _, n := range due {
		if ctx.Err() != nil {
			break
		}
		if hole(n) {
			s.note(n, Zeros, nil)
			continue
		}
		g.Go(func() error {
			p := make([]byte, s.list.Range(n).Length)
			return s.putChunk(ctx, n, p)
		})
	}
	return g.Wait()
}

// holes returns a function that says of ascending chunks whether the device certainly holds nothing there.
func (s *Syncer) holes() func(n int) bool {
	data := block.Range{Offset: -1}
	end := false
	return func(n int) bool {
		r := s.list.Range(n)
		for !end && data.End() <= r.Offset {
			next, err := block.NextData(s.cfg.Device, r.Offset)
			if errors.Is(err, io.EOF) {
				end = true
			} else if err != nil {
				return false
			}
			data = next
		}
		return end && data.End() <= r.Offset || !end && data.Offset >= r.End()
	}
}

// collect notes what was written. turn is held.
func (s *Syncer) collect(ctx context.Context) error {
	s.mu.Lock()
	running := s.writes
	s.mu.Unlock()
	if !running {
		return nil
	}
	written, err := s.cfg.Writes.Collect(ctx)
	if err != nil {
		return fmt.Errorf("sync device: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	now := int64(time.Since(s.began))
	size := ChunkSize(s.list.Size)
	for _, r := range written {
		for n := r.Offset / size; n*size < r.End(); n++ {
			s.changed[n], s.last[n] = true, now
		}
	}
	return nil
}

// putChunk reads a chunk and puts it.
func (s *Syncer) putChunk(ctx context.Context, n int, p []byte) error {
	r := s.list.Range(n)
	s.mu.Lock()
	s.changed[n] = false // what is written from here on is collected the next time
	s.mu.Unlock()
	err := readChunk(s.cfg.Device, p, r)
	var id ID
	if err == nil {
		id, err = s.cfg.Store.Put(ctx, p)
	}
	if err != nil {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.changed[n] = true
		return fmt.Errorf("sync device: %w", err)
	}
	s.note(n, id, p)
	return nil
}

// note notes that a chunk is in the store; nil are zeros that nobody has read.
func (s *Syncer) note(n int, id ID, p []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p == nil {
		s.changed[n] = false
	}
	if s.list.Chunks[n] == id {
		return
	}
	r := s.list.Range(n)
	if p != nil {
		s.bytes += r.Length
	} else if s.cfg.Stored != nil {
		p = make([]byte, r.Length)
	}
	if s.cfg.Stored != nil {
		s.cfg.Stored(r.Offset, p)
	}
	s.list.Chunks[n] = id
}

func readChunk(d block.Device, p []byte, r block.Range) error {
	if k, err := d.ReadAt(p, r.Offset); k < len(p) {
		return fmt.Errorf("read %d bytes at %d: %w", len(p), r.Offset, errors.Join(err, io.ErrUnexpectedEOF))
	}
	return nil
}

// readAll reads the device, and puts what is as it was the last time. turn is held.
func (s *Syncer) readAll(ctx context.Context) error {
	hole := s.holes()
	p := make([]byte, ChunkSize(s.list.Size))
	began, read := time.Now(), int64(0)
	for n := range s.list.Chunks {
		if err := ctx.Err(); err != nil {
			return err
		}
		r := s.list.Range(n)
		if hole(n) {
			s.note(n, Zeros, nil)
			continue
		}
		p := p[:r.Length]
		if err := readChunk(s.cfg.Device, p, r); err != nil {
			return fmt.Errorf("sync device: %w", err)
		}
		sum := xxh3.Hash(p) | 1 // 0 is none
		s.mu.Lock()
		quiet, stored := s.sums[n] == sum, !s.changed[n]
		s.sums[n] = sum
		s.changed[n] = !quiet || !stored
		s.mu.Unlock()
		if quiet && !stored {
			id, err := s.cfg.Store.Put(ctx, p)
			if err != nil {
				return fmt.Errorf("sync device: %w", err)
			}
			s.note(n, id, p)
			s.mu.Lock()
			s.changed[n] = s.list.Chunks[n] != id // which Verify may have missed
			s.mu.Unlock()
		}
		read += r.Length
		if ahead := time.Duration(float64(read)/float64(s.cfg.ReadRate)*float64(time.Second)) - time.Since(began); ahead > 10*time.Millisecond {
			select {
			case <-time.After(ahead):
			case <-ctx.Done():
			}
		}
	}
	return nil
}

// Verify looks for what is to be in the store and was not seen there for a while, and has what is missing be put again. An error is the store's.
func (s *Syncer) Verify(ctx context.Context) error {
	l := s.List()
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(max(1, s.cfg.Store.cfg.Concurrency/4)) // nobody waits for it
	for n, id := range l.Chunks {
		if id == None || ctx.Err() != nil {
			continue
		}
		g.Go(func() error {
			err := s.cfg.Store.Has(ctx, id)
			if errors.Is(err, ErrNotFound) {
				s.mu.Lock()
				defer s.mu.Unlock()
				if s.list.Chunks[n] == id {
					s.list.Chunks[n], s.changed[n] = None, true
				}
				return nil
			}
			return err
		})
	}
	return g.Wait()
}

// Snapshot is what is in the store at one moment.
type Snapshot struct {
	List   *List
	Stored []block.Range // where the list has chunks
	// Changed returns the first range at or after off, of what is stored, in which the device may differ, and io.EOF when there is none. Nil: anywhere.
	Changed func(off int64) (block.Range, error)
}

// Snapshot says what is in the store. It does not wait for what is being put: that is put after Resume. Until then nothing more is put, and Stored
// is not called.
func (s *Syncer) Snapshot(ctx context.Context) (*Snapshot, error) {
	s.mu.Lock()
	s.frozen = true
	if s.cut != nil {
		s.cut()
	}
	s.mu.Unlock()
	select {
	case s.turn <- struct{}{}:
	case <-ctx.Done():
		s.thaw()
		return nil, fmt.Errorf("take snapshot of what is stored: %w", context.Cause(ctx))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	snap := &Snapshot{List: &List{Size: s.list.Size, Chunks: slices.Clone(s.list.Chunks)}}
	for n, id := range s.list.Chunks {
		r := s.list.Range(n)
		switch k := len(snap.Stored); {
		case id == None:
		case k > 0 && snap.Stored[k-1].End() == r.Offset:
			snap.Stored[k-1].Length += r.Length
		default:
			snap.Stored = append(snap.Stored, r)
		}
	}
	if s.writes {
		snap.Changed = func(off int64) (block.Range, error) { return s.nextChange(snap.List, off) }
	}
	return snap, nil
}

// Resume goes on after a Snapshot.
func (s *Syncer) Resume() {
	s.thaw()
	<-s.turn
}

func (s *Syncer) thaw() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.frozen = false
}

// nextChange is what has changed since of what was stored then, whatever has become of it in the store.
func (s *Syncer) nextChange(stored *List, off int64) (block.Range, error) {
	if err := s.collect(context.Background()); err != nil {
		return block.Range{}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for n := int(off / ChunkSize(s.list.Size)); n < len(s.changed); n++ {
		if s.changed[n] && stored.Chunks[n] != None {
			r := s.list.Range(n)
			first := max(off, r.Offset)
			return block.Range{Offset: first, Length: r.End() - first}, nil
		}
	}
	return block.Range{}, io.EOF
}

// List is what is in the store by now, of whatever moments.
func (s *Syncer) List() *List {
	s.mu.Lock()
	defer s.mu.Unlock()
	return &List{Size: s.list.Size, Chunks: slices.Clone(s.list.Chunks)}
}

// Stats says how far it is.
func (s *Syncer) Stats() SyncStats {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := SyncStats{Chunks: len(s.changed), Bytes: s.bytes, Failing: s.failing}
	for n, changed := range s.changed {
		if !changed && s.list.Chunks[n] != None {
			st.Stored++
		} else {
			st.Waiting++
		}
	}
	return st
}
