package block

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"

	"github.com/zeebo/xxh3"
)

const sectorSize = 512

// simStorage is a disk in memory that writes down all that is done to it, can fail any step, and can say what a power cut after
// any step might have left.
type simStorage struct {
	mu    sync.Mutex // guards everything, the files' too
	names map[string]*simFile
	ops   []simOp
	files int

	// fail, if set, is asked before each step that changes something. op is its label.
	fail func(step int, op string) error
}

// simFile is a file as the running system sees it.
type simFile struct {
	id     int
	data   []byte
	locked int // -1: by a writer; else by how many readers
}

// simOp is a step that was done.
type simOp struct {
	label string
	kind  simKind
	file  int
	off   int64
	n     int64  // punch, truncate
	data  []byte // write
	path  string // create, rename, remove, syncDir
	to    string // rename
}

type simKind int

const (
	simWrite simKind = iota
	simPunch
	simTruncate
	simSync
	simCreate
	simRename
	simRemove
	simSyncDir
)

func newSimStorage() *simStorage { return &simStorage{names: make(map[string]*simFile)} }

// do writes a step down and applies it, unless it is to fail. The caller holds mu.
func (s *simStorage) do(op simOp, apply func()) error {
	if s.fail != nil {
		if err := s.fail(len(s.ops), op.label); err != nil {
			return fmt.Errorf("%s: %w", op.label, err)
		}
	}
	op.data = bytes.Clone(op.data)
	s.ops = append(s.ops, op)
	apply()
	return nil
}

func (s *simStorage) open(op, path string, mode fileMode) (storedFile, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f := s.names[path]
	if f == nil {
		if mode < fileCreate {
			return nil, &os.PathError{Op: "open", Path: path, Err: os.ErrNotExist}
		}
		f = &simFile{id: s.files}
		s.files++
		if err := s.do(simOp{label: op, kind: simCreate, file: f.id, path: path}, func() { s.names[path] = f }); err != nil {
			return nil, err
		}
	}
	h := &simHandle{s: s, f: f}
	if mode == fileEmpty && len(f.data) > 0 {
		if err := s.do(simOp{label: op, kind: simTruncate, file: f.id}, func() { f.data = nil }); err != nil {
			return nil, err
		}
	}
	return h, nil
}

func (s *simStorage) size(path string) (int64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if f := s.names[path]; f != nil {
		return int64(len(f.data)), nil
	}
	return 0, &os.PathError{Op: "stat", Path: path, Err: os.ErrNotExist}
}

func (s *simStorage) rename(op, from, to string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.do(simOp{label: op, kind: simRename, path: from, to: to}, func() {
		s.names[to] = s.names[from]
		delete(s.names, from)
	})
}

func (s *simStorage) remove(op, path string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.names[path] == nil {
		return os.ErrNotExist
	}
	return s.do(simOp{label: op, kind: simRemove, path: path}, func() { delete(s.names, path) })
}

// modTime is a function of the contents: it is another when they are, and as durable as they are.
func (s *simStorage) modTime(path string) (int64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f := s.names[path]
	if f == nil {
		return 0, os.ErrNotExist
	}
	return int64(xxh3.Hash(f.data)>>2) + 1, nil
}

func (s *simStorage) syncFile(op, path string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	f := s.names[path]
	if f == nil {
		return os.ErrNotExist
	}
	return s.do(simOp{label: op, kind: simSync, file: f.id}, func() {})
}

func (s *simStorage) syncDir(op, path string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.do(simOp{label: op, kind: simSyncDir, path: path}, func() {})
}

// simHandle is an open simFile.
type simHandle struct {
	s      *simStorage
	f      *simFile
	holds  int // what it adds to locked
	closed bool
}

func (h *simHandle) readAt(p []byte, off int64) error {
	h.s.mu.Lock()
	defer h.s.mu.Unlock()
	if h.closed {
		return os.ErrClosed
	}
	if off+int64(len(p)) > int64(len(h.f.data)) {
		return io.ErrUnexpectedEOF
	}
	copy(p, h.f.data[off:])
	return nil
}

func (h *simHandle) change(op simOp) error {
	h.s.mu.Lock()
	defer h.s.mu.Unlock()
	if h.closed {
		return os.ErrClosed
	}
	op.file = h.f.id
	err := h.s.do(op, func() { h.f.data = op.apply(h.f.data) })
	if err != nil && op.kind == simWrite { // half of it may be there
		half := op
		half.data = op.data[:len(op.data)/2/sectorSize*sectorSize]
		if len(half.data) > 0 {
			half.data = bytes.Clone(half.data)
			h.s.ops = append(h.s.ops, half)
			h.f.data = half.apply(h.f.data)
		}
	}
	return err
}

// apply is what becomes of the contents of a file.
func (op simOp) apply(data []byte) []byte {
	switch op.kind {
	case simWrite:
		if end := int(op.off) + len(op.data); end > len(data) {
			data = append(data, make([]byte, end-len(data))...)
		}
		copy(data[op.off:], op.data)
	case simPunch:
		if op.off < int64(len(data)) {
			clear(data[op.off:min(op.off+op.n, int64(len(data)))])
		}
	case simTruncate:
		if op.n <= int64(len(data)) {
			return data[:op.n:op.n]
		}
		return append(data, make([]byte, int(op.n)-len(data))...)
	}
	return data
}

func (h *simHandle) writeAt(op string, p []byte, off int64) error {
	return h.change(simOp{label: op, kind: simWrite, off: off, data: p})
}

func (h *simHandle) punch(op string, off, n int64) error {
	return h.change(simOp{label: op, kind: simPunch, off: off, n: n})
}

func (h *simHandle) truncate(op string, size int64) error {
	return h.change(simOp{label: op, kind: simTruncate, n: size})
}

func (h *simHandle) sync(op string) error { return h.change(simOp{label: op, kind: simSync}) }

func (h *simHandle) size() (int64, error) {
	h.s.mu.Lock()
	defer h.s.mu.Unlock()
	return int64(len(h.f.data)), nil
}

func (h *simHandle) nextData(off, end int64) (Range, error) {
	h.s.mu.Lock()
	defer h.s.mu.Unlock()
	page := func(off int64) []byte {
		off = min(off, int64(len(h.f.data)))
		return h.f.data[off:min(off/PageSize*PageSize+PageSize, int64(len(h.f.data)))]
	}
	for ; off < end && IsZero(page(off)); off = (off/PageSize + 1) * PageSize {
	}
	if off >= end {
		return Range{}, io.EOF
	}
	stop := off
	for ; stop < end && !IsZero(page(stop)); stop = (stop/PageSize + 1) * PageSize {
	}
	return Range{Offset: off, Length: min(stop, end) - off}, nil
}

func (h *simHandle) lock(shared bool) error {
	h.s.mu.Lock()
	defer h.s.mu.Unlock()
	switch {
	case h.f.locked < 0 || h.f.locked > 0 && !shared:
		return errLocked
	case shared:
		h.holds = 1
	default:
		h.holds = -1
	}
	h.f.locked += h.holds
	return nil
}

func (h *simHandle) close() error {
	h.s.mu.Lock()
	defer h.s.mu.Unlock()
	h.f.locked -= h.holds
	h.holds = 0
	h.closed = true
	return nil
}

// cutMode says what of the steps that no sync covers is on the disk after a cut.
type cutMode int

const (
	cutNothing cutMode = iota
	cutEverything
	cutSome // each on its own, writes sector by sector
	cutModes
)

// cut returns the disk that a power cut after the first n steps leaves.
func (s *simStorage) cut(n int, mode cutMode, rng *rand.Rand) *simStorage {
	lucky := func() bool { return mode == cutEverything || mode == cutSome && rng.IntN(2) == 0 }
	contents := make(map[int][]byte)
	pending := make(map[int][]simOp)
	names := make(map[string]int)
	var pendingNames []simOp
	name := func(op simOp) {
		switch op.kind {
		case simCreate:
			names[op.path] = op.file
		case simRename:
			names[op.to] = names[op.path]
			delete(names, op.path)
		case simRemove:
			delete(names, op.path)
		}
	}
	for _, op := range s.ops[:n] {
		switch op.kind {
		case simCreate, simRename, simRemove:
			pendingNames = append(pendingNames, op)
		case simSyncDir:
			for _, op := range pendingNames {
				name(op)
			}
			pendingNames = nil
		case simSync:
			for _, op := range pending[op.file] {
				contents[op.file] = op.apply(contents[op.file])
			}
			delete(pending, op.file)
		default:
			pending[op.file] = append(pending[op.file], op)
		}
	}
	// Names are journaled: a later one is there only if the earlier ones are.
	for _, op := range pendingNames {
		if !lucky() {
			break
		}
		name(op)
	}
	for id, ops := range pending {
		for _, op := range ops {
			if op.kind != simWrite || mode != cutSome {
				if lucky() {
					contents[id] = op.apply(contents[id])
				}
				continue
			}
			for len(op.data) > 0 {
				k := min(sectorSize-int(op.off%sectorSize), len(op.data))
				sector := op
				sector.data = op.data[:k]
				if lucky() {
					contents[id] = sector.apply(contents[id])
				}
				op.data, op.off = op.data[k:], op.off+int64(k)
			}
		}
	}
	left := newSimStorage()
	left.files = s.files
	for path, id := range names {
		left.names[path] = &simFile{id: id, data: bytes.Clone(contents[id])}
		// What is there is durable.
		left.ops = append(left.ops, simOp{kind: simCreate, file: id, path: path}, simOp{kind: simSyncDir},
			simOp{kind: simWrite, file: id, data: bytes.Clone(contents[id])}, simOp{kind: simSync, file: id})
	}
	return left
}

const (
	simBlockSize  = 8 << 10
	simDeviceSize = 100_352 // 12.25 blocks
)

func simBase() []byte {
	p := make([]byte, simDeviceSize)
	for i := range p {
		if i/6000%3 != 1 {
			p[i] = byte(1 + i*i>>6&0x7f)
		}
	}
	return p
}

func openSim(s *simStorage, base []byte, elide bool) (*Overlay, error) {
	d := NewMemory(int64(len(base)))
	if _, err := d.WriteAt(base, 0); err != nil {
		return nil, err
	}
	return openOverlay(s, OverlayOptions{
		Base: d, Overlay: "overlay/disk", State: "state/disk", BlockSize: simBlockSize, ElideUnchanged: elide,
		Logger: slog.New(slog.DiscardHandler),
	})
}

func contentOf(t *testing.T, d Device) []byte {
	t.Helper()
	p := make([]byte, d.Size())
	if err := readFull(d, p, 0); err != nil {
		t.Fatal(err)
	}
	return p
}

// simHistory is what was done to an overlay, for judging what is left of it.
type simHistory struct {
	steps []simStep
}

type simStep struct {
	begin, end int    // steps of the disk that it took: [begin, end)
	after      []byte // contents of the device
	flushed    bool   // it was a Flush or Close that succeeded
}

// simScript does random things to an overlay of a disk and writes them down. Everything is aligned to sectors, the unit
// in which power cuts tear writes. It stops at the first error of a call that tolerated does not tolerate.
func simScript(t *testing.T, s *simStorage, o *Overlay, h *simHistory, rng *rand.Rand, n int, tolerated func(error) bool) {
	t.Helper()
	model := contentOf(t, o)
	for range n {
		step := simStep{begin: len(s.ops)}
		size := int64(sectorSize * (1 + rng.IntN([]int{1, 8, 40, 150}[rng.IntN(4)])))
		off := rng.Int64N((simDeviceSize-size)/sectorSize+1) * sectorSize
		if rng.IntN(3) == 0 {
			off = off / simBlockSize * simBlockSize
			size = min(simDeviceSize-off, (size+simBlockSize-1)/simBlockSize*simBlockSize)
		}
		var err error
		switch rng.IntN(10) {
		case 0, 1, 2, 3, 4:
			p := make([]byte, size)
			for i := range p {
				p[i] = byte(0x80 | rng.Uint32())
			}
			copy(model[off:], p)
			_, err = o.WriteAt(p, off)
		case 5:
			p := bytes.Clone(model[off : off+size]) // what is there
			_, err = o.WriteAt(p, off)
		case 6, 7:
			clear(model[off : off+size])
			err = o.Discard(off, size)
		default:
			err = o.Flush()
			step.flushed = err == nil
		}
		step.end = len(s.ops)
		if err != nil {
			if tolerated == nil || !tolerated(err) {
				t.Fatal(err)
			}
			// A call that failed may have done any part of its job.
			have := contentOf(t, o)
			checkSectors(t, have, h.last(), model)
			h.steps = append(h.steps, simStep{begin: step.begin, end: step.end, after: bytes.Clone(model)})
			model = have
		}
		step.after = bytes.Clone(model)
		h.steps = append(h.steps, step)
		if have := contentOf(t, o); !bytes.Equal(have, model) {
			t.Fatal("the overlay is not what was written to it")
		}
	}
}

func (h *simHistory) last() []byte { return h.steps[len(h.steps)-1].after }

// candidates lists what the device may hold after a cut after n steps of the disk.
func (h *simHistory) candidates(n int) [][]byte {
	var c [][]byte
	for _, step := range h.steps {
		switch {
		case step.flushed && step.end <= n:
			c = [][]byte{step.after}
		case step.begin < n || len(c) == 0:
			c = append(c, step.after)
		}
	}
	return c
}

// checkSectors checks that each sector of have is that of one of the candidates.
func checkSectors(t *testing.T, have []byte, candidates ...[]byte) {
	t.Helper()
	for off := 0; off < len(have); off += sectorSize {
		end := min(off+sectorSize, len(have))
		if !slices.ContainsFunc(candidates, func(c []byte) bool { return bytes.Equal(c[off:end], have[off:end]) }) {
			t.Fatalf("the sector at %d (block %d) begins with %x, which is none of the %d contents it may have", off, off/simBlockSize, have[off:off+8], len(candidates))
		}
	}
}

// TestPowerCut cuts the power after each step that an overlay does to its files, and checks that the overlay can be
// opened again, holds everything that was flushed, and works.
func TestPowerCut(t *testing.T) {
	const scripts = 4
	cuts := 0
	labels := make(map[string]int) // of the last step before each cut
	for seed := range uint64(scripts) {
		t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
			rng := rand.New(rand.NewPCG(seed, 1))
			elide := seed%2 == 1
			base := simBase()
			s := newSimStorage()
			h := &simHistory{steps: []simStep{{after: base, flushed: true}}}
			// Several lives: the later ones begin by reading and compacting what the earlier ones left.
			for life := range 3 {
				o, err := openSim(s, base, elide)
				if err != nil {
					t.Fatal(err)
				}
				simScript(t, s, o, h, rng, 30, nil)
				if life < 2 {
					step := simStep{begin: len(s.ops), after: bytes.Clone(h.last()), flushed: true}
					if err := o.Close(); err != nil {
						t.Fatal(err)
					}
					step.end = len(s.ops)
					h.steps = append(h.steps, step)
				}
			}
			for n := range len(s.ops) + 1 {
				for mode := range cutModes + 2 { // cutSome three times
					cuts++
					if n > 0 {
						labels[s.ops[n-1].label]++
					}
					left := s.cut(n, min(mode, cutSome), rng)
					o, err := openSim(left, base, elide)
					if err != nil {
						t.Fatalf("cut after step %d (%+v): %v", n, s.label(n), err)
					}
					checkSectors(t, contentOf(t, o), h.candidates(n)...)
					// The next life, in which old data must not shine through.
					next := &simHistory{steps: []simStep{{after: contentOf(t, o)}}}
					simScript(t, left, o, next, rng, 4, nil)
					if err := o.Close(); err != nil {
						t.Fatal(err)
					}
					if o, err = openSim(left, base, elide); err != nil {
						t.Fatal(err)
					}
					if !bytes.Equal(contentOf(t, o), next.last()) {
						t.Fatalf("cut after step %d (%s): the life after the next differs", n, s.label(n))
					}
				}
			}
		})
	}
	t.Logf("%d cuts; last step before them: %v", cuts, labels)
	for _, label := range []string{"create overlay", "create state", "rename state", "size new overlay", "copy up", "write", "discard", "sync overlay", "append to state", "sync state"} {
		if labels[label] == 0 {
			t.Errorf("no cut came after the step %q", label)
		}
	}
}

func (s *simStorage) label(n int) string {
	if n == 0 {
		return "none"
	}
	return s.ops[n-1].label
}

// TestPowerCutTwice cuts the power, and again while the overlay is being opened and used after that.
func TestPowerCutTwice(t *testing.T) {
	base := simBase()
	for seed := range uint64(40) {
		rng := rand.New(rand.NewPCG(seed, 2))
		s := newSimStorage()
		h := &simHistory{steps: []simStep{{after: base, flushed: true}}}
		o, err := openSim(s, base, false)
		if err != nil {
			t.Fatal(err)
		}
		simScript(t, s, o, h, rng, 30, nil)
		boot := 0
		for range 4 {
			n := boot + rng.IntN(len(s.ops)-boot+1)
			s = s.cut(n, cutSome, rng)
			boot = len(s.ops)
			if o, err = openSim(s, base, false); err != nil {
				t.Fatal(err)
			}
			content := contentOf(t, o)
			checkSectors(t, content, h.candidates(n)...)
			// What is read after a cut was on the disk, and stays.
			h = &simHistory{steps: []simStep{{end: boot, after: content, flushed: true}}}
			simScript(t, s, o, h, rng, 10, nil)
		}
	}
}

// TestStepFails lets each step of a script fail, once, and checks that the call says so, that nothing flushed is lost,
// and that the overlay can be used on, or says that it cannot.
func TestStepFails(t *testing.T) {
	base := simBase()
	for _, errno := range []error{syscall.EIO, syscall.ENOSPC} {
		t.Run(errno.Error(), func(t *testing.T) {
			for at, steps := 0, 1; at < steps; at++ {
				rng := rand.New(rand.NewPCG(7, 3)) // the same script for each step
				s := newSimStorage()
				failedStep := ""
				s.fail = func(step int, op string) error {
					if step == at && failedStep == "" {
						failedStep = op
						return errno
					}
					return nil
				}
				o, err := openSim(s, base, false)
				if failedStep != "" {
					if !errors.Is(err, errno) {
						t.Fatalf("step %d (%s) failed, opening says %v", at, failedStep, err)
					}
					if o, err = openSim(s, base, false); err != nil {
						t.Fatalf("step %d (%s) failed, opening again: %v", at, failedStep, err)
					}
				} else if err != nil {
					t.Fatal(err)
				}
				h := &simHistory{steps: []simStep{{after: base, flushed: true}}}
				simScript(t, s, o, h, rng, 40, func(err error) bool { return errors.Is(err, errno) && failedStep != "" })
				failed, done := failedStep, len(s.ops)
				steps = max(steps, done)
				if err := o.Close(); err != nil && !errors.Is(err, errno) {
					t.Fatalf("step %d (%s) failed, Close says %v", at, failed, err)
				} else if err == nil {
					h.steps = append(h.steps, simStep{begin: done, end: done, after: bytes.Clone(h.last()), flushed: true})
				} else {
					// A sync that failed may have dropped anything since the one before: as a power cut would.
					s = s.cut(len(s.ops), cutSome, rng)
				}
				if o, err = openSim(s, base, false); err != nil {
					t.Fatalf("step %d (%s) failed, opening later: %v", at, failed, err)
				}
				checkSectors(t, contentOf(t, o), h.candidates(done)...)
				if err := o.Close(); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

// TestSyncFailsForGood checks that after a sync that failed nothing is promised any more.
func TestSyncFailsForGood(t *testing.T) {
	for _, label := range []string{"sync overlay", "sync state"} {
		t.Run(label, func(t *testing.T) {
			s := newSimStorage()
			o, err := openSim(s, simBase(), false)
			if err != nil {
				t.Fatal(err)
			}
			once := false
			s.fail = func(_ int, op string) error {
				if op == label && !once {
					once = true
					return syscall.EIO
				}
				return nil
			}
			if _, err := o.WriteAt(make([]byte, 100), 0); err != nil {
				t.Fatal(err)
			}
			for range 2 {
				if err := o.Flush(); !errors.Is(err, syscall.EIO) {
					t.Errorf("Flush: %v", err)
				}
			}
			if _, err := o.WriteAt(make([]byte, 100), 0); !errors.Is(err, syscall.EIO) {
				t.Errorf("WriteAt: %v", err)
			}
			if err := o.Discard(0, 100); !errors.Is(err, syscall.EIO) {
				t.Errorf("Discard: %v", err)
			}
			if _, err := o.ReadAt(make([]byte, 100), 0); err != nil {
				t.Errorf("ReadAt: %v", err)
			}
			if err := o.Close(); !errors.Is(err, syscall.EIO) {
				t.Errorf("Close: %v", err)
			}
		})
	}
}

// TestFullDisk checks that a Flush that found no space is made good by the next one.
func TestFullDisk(t *testing.T) {
	s := newSimStorage()
	base := simBase()
	o, err := openSim(s, base, false)
	if err != nil {
		t.Fatal(err)
	}
	full := true
	s.fail = func(_ int, op string) error {
		if op == "append to state" && full {
			return syscall.ENOSPC
		}
		return nil
	}
	p := bytes.Repeat([]byte{7}, 50_000)
	if _, err := o.WriteAt(p, 3000); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := o.Flush(); !errors.Is(err, syscall.ENOSPC) {
			t.Fatalf("Flush: %v", err)
		}
	}
	full = false
	if err := o.Flush(); err != nil {
		t.Fatalf("Flush: %v", err)
	}
	left := s.cut(len(s.ops), cutNothing, nil)
	o, err = openSim(left, base, false)
	if err != nil {
		t.Fatal(err)
	}
	want := bytes.Clone(base)
	copy(want[3000:], p)
	if !bytes.Equal(contentOf(t, o), want) {
		t.Error("what was flushed is lost")
	}
}

// TestStateDamage flips each bit, and cuts each byte off, of the state of an overlay that was closed. It must not be
// opened as something else than it was.
func TestStateDamage(t *testing.T) {
	base := simBase()
	s := newSimStorage()
	o, err := openSim(s, base, false)
	if err != nil {
		t.Fatal(err)
	}
	h := &simHistory{steps: []simStep{{after: base}}}
	simScript(t, s, o, h, rand.New(rand.NewPCG(5, 5)), 20, nil)
	if err := o.Close(); err != nil {
		t.Fatal(err)
	}

	if o, err = openSim(s, base, false); err != nil {
		t.Fatal(err)
	}
	want := contentOf(t, o)
	if err := o.Close(); err != nil {
		t.Fatal(err)
	}
	state := s.names[filepath.Join("state", "disk")].data
	sealAt := len(state) - batchHeaderSize
	check := func(what string, damaged []byte) {
		t.Helper()
		left := s.cut(len(s.ops), cutNothing, nil)
		left.names[filepath.Join("state", "disk")].data = damaged
		o, err := openSim(left, base, false)
		if err != nil {
			return
		}
		if !bytes.Equal(contentOf(t, o), want) {
			t.Errorf("%s is not noticed, and changes the contents", what)
		}
	}
	for i := range state {
		for bit := range 8 {
			damaged := bytes.Clone(state)
			damaged[i] ^= 1 << bit
			check(fmt.Sprintf("bit %d of byte %d of %d flipped (the seal begins at %d)", bit, i, len(state), sealAt), damaged)
		}
	}
	// What is cut off looks like an append that never ended, if it is the last batch; that one is the seal.
	for n := sealAt; n < len(state); n++ {
		check(fmt.Sprintf("a state cut to %d of %d bytes", n, len(state)), bytes.Clone(state[:n]))
	}
}
