package block

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/bits"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/zeebo/xxh3"
)

// DefaultOverlayBlockSize is the block size of an overlay, in bytes, when none is given.
const DefaultOverlayBlockSize = 64 << 10

// MaxOverlayBlockSize is the largest block size of an overlay, in bytes.
const MaxOverlayBlockSize = 64 << 20

// OverlayOptions say what an [Overlay] consists of.
type OverlayOptions struct {
	// Base holds what was not changed. Nobody may change it while the overlay exists. The overlay owns it from a
	// successful open on, and closes it. It may be another overlay: see ReadOnly.
	Base Device

	// BasePath is the file Base was opened from. The overlay remembers its size and time of modification, and refuses to be
	// opened over a base that has others. Empty: only the size of Base is compared. Of a Base that is an Overlay this is known, and
	// also which blocks it holds.
	BasePath string

	// AnyBase opens the overlay over a base that is not known to be the one it was made over, but of its size: for who knows that it
	// holds the same, and is to [Overlay.Rebase] on it.
	AnyBase bool

	// Overlay is the sparse file of the size of the base that holds the changed blocks, State the file that says which
	// those are. Both are made when neither exists.
	Overlay, State string

	// BlockSize is the unit, in bytes, in which blocks move from the base to the overlay: a power of two of at least
	// PageSize. 0 means what the state file says, and DefaultOverlayBlockSize in a new one.
	BlockSize int64

	// ElideUnchanged makes a write compare what it brings with the blocks the overlay does not hold yet, and store
	// nothing where they are the same. It costs a read of the base for each such write, and is for bulk writes that
	// mostly repeat the base: receiving a migration, saving RAM.
	ElideUnchanged bool

	// ReadOnly opens an overlay that exists, to be read alone: as the base of others, or to be looked at. Any number may have it open
	// so at a time, while nobody writes it. Neither file is changed; writes and discards fail with an error that wraps syscall.EROFS, and
	// Flush does nothing.
	ReadOnly bool

	// Live is a file in memory (memfd_create(2)) in which the overlay keeps, from write to write, what only a Flush puts
	// into the state file. It is for users that outlive this process, as a virtual machine does: to them every write that
	// was answered has happened, flushed or not. Another process that holds the file keeps it from vanishing; who opens
	// the overlay with it again finds every block as it was at the last answered write. After a power cut there is
	// no such file, and no such user. Give an empty file to begin with. The caller keeps it, and may close it once the
	// overlay is open. Nil: writes that were not flushed end with this process.
	Live *os.File

	// Logger receives what is noteworthy about opening; nil means slog.Default().
	Logger *slog.Logger
}

// Overlay is a device made of a read-only base and a copy-on-write file over it.
//
// A block is in one of three states: of the base (neither file has anything on it), held (the overlay file has all of it),
// or zero (it was discarded: it reads as zero without looking at the base). Reads go straight to where the block
// is. The first partial write to a block of the base copies it up; writes to held blocks go straight to the
// overlay file.
//
// # What a crash leaves
//
// Flush syncs the overlay file, then appends what became of which block to the state file and syncs that. Therefore the
// state never speaks of data that is not there, and everything flushed is found again. Data in the overlay file that
// the state does not speak of was never flushed; it is punched out when the overlay is opened.
//
// That last step also keeps the one invariant partial writes lean on: outside of held blocks the overlay file reads as
// zeros. Copying up a block can therefore skip pages of zeros, and a write to a zero block stores only what was written.
type Overlay struct {
	base      Device
	basePath  string // see identify
	path      string // of the overlay file; names the device in errors
	statePath string
	size      int64 // bytes
	blockSize int64 // bytes
	blocks    int64
	elide     bool
	readOnly  bool
	fs        storage
	data      storedFile // the overlay file
	log       *slog.Logger

	// locks order what is done to a block. Held shared, for writes into blocks that are held and stay so; held
	// exclusively, for everything that changes the state of a block. Reads take none: the base does not change, and a
	// block that leaves the base never returns to it.
	locks stripes

	states  blockStates
	changed bitmap      // blocks whose state is not in the state file yet
	dirty   atomic.Bool // the overlay file was changed since it was synced
	buffers sync.Pool   // *[]byte of blockSize

	flushing sync.Mutex // one Flush at a time; guards the fields below
	state    storedFile // the state file
	stateLog stateLog   // where it ends

	// failure is why the overlay cannot be written any more, if set. See fail.
	failure atomic.Pointer[error]
	closed  atomic.Bool
}

var (
	_ Device  = (*Overlay)(nil)
	_ Extents = (*Overlay)(nil)
)

func checkBlockSize(n int64) error {
	if n < PageSize || n > MaxOverlayBlockSize || n&(n-1) != 0 {
		return fmt.Errorf("block size %d: use a power of two from %d to %d: %w", n, PageSize, MaxOverlayBlockSize, os.ErrInvalid)
	}
	return nil
}

// OpenOverlay opens an overlay, or makes a new one when neither of its files exists. One without the other, a base that
// has changed, another block size, damage, and a second process that has the overlay open are errors.
//
// The overlay file is locked with flock(2) until Close.
func OpenOverlay(opts OverlayOptions) (*Overlay, error) { return openOverlay(hostStorage{}, opts) }

func openOverlay(fs storage, opts OverlayOptions) (_ *Overlay, err error) {
	switch {
	case opts.Base == nil:
		return nil, fmt.Errorf("open overlay %q: it has no base", opts.Overlay)
	case opts.Overlay == "" || opts.State == "":
		return nil, fmt.Errorf("open overlay: overlay file %q and state file %q: give both", opts.Overlay, opts.State)
	case filepath.Clean(opts.Overlay) == filepath.Clean(opts.State):
		return nil, fmt.Errorf("open overlay: overlay and state are both %q: give two files", opts.Overlay)
	case opts.ReadOnly && opts.Live != nil:
		return nil, fmt.Errorf("open overlay %q: to be read alone, it has no live file: %w", opts.Overlay, os.ErrInvalid)
	}
	if opts.BlockSize != 0 {
		if err := checkBlockSize(opts.BlockSize); err != nil {
			return nil, fmt.Errorf("open overlay %q: %w", opts.Overlay, err)
		}
	}

	if below, ok := opts.Base.(*Overlay); ok {
		opts.BasePath = below.path
	}
	o := &Overlay{
		base: opts.Base, basePath: opts.BasePath, path: opts.Overlay, statePath: opts.State, size: opts.Base.Size(),
		elide: opts.ElideUnchanged, readOnly: opts.ReadOnly, fs: fs, log: opts.Logger,
	}
	if o.log == nil {
		o.log = slog.Default()
	}
	var created []string
	defer func() {
		if err == nil {
			return
		}
		for _, f := range []storedFile{o.data, o.state} {
			if f != nil {
				err = errors.Join(err, f.close())
			}
		}
		for _, path := range created {
			if removed := fs.remove("undo creation", path); removed != nil && !errors.Is(removed, os.ErrNotExist) {
				err = errors.Join(err, removed)
			}
		}
	}()

	base, err := identify(fs, opts.Base, opts.BasePath)
	if err != nil {
		return nil, fmt.Errorf("open overlay: find the base: %w", err)
	}
	created, err = o.openFiles(opts)
	if err != nil {
		return nil, err
	}
	want := stateHeader{blockSize: opts.BlockSize, deviceSize: o.size, base: base}
	if want.blockSize == 0 {
		want.blockSize = DefaultOverlayBlockSize
	}
	if o.state == nil {
		// What the base is known again by must outlive what speaks of it.
		if err := o.syncBase(); err != nil {
			return nil, fmt.Errorf("create overlay state %q: %w", o.statePath, err)
		}
		if err := o.writeState(want, nil); err != nil {
			return nil, fmt.Errorf("create overlay state %q: %w", o.statePath, err)
		}
	}
	if err := o.load(opts, want); err != nil {
		return nil, err
	}
	return o, nil
}

// openFiles opens and locks the overlay file, and the state file if there is one. Both or neither must exist. It returns
// the files it made, and those that will be.
//
// A new overlay file stays empty until its state file is durable. So an empty overlay file without a state is the making
// of an overlay that was cut short, and any other lone file is one whose companion was lost.
func (o *Overlay) openFiles(opts OverlayOptions) (created []string, err error) {
	overlaySize, overlayErr := o.fs.size(o.path)
	_, stateErr := o.fs.size(o.statePath)
	for _, err := range []error{overlayErr, stateErr} {
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("open overlay: %w", err)
		}
	}
	switch {
	case overlayErr == nil && overlaySize > 0 && stateErr != nil:
		return nil, fmt.Errorf("open overlay: %q exists without its state %q: restore the state, or delete the overlay to start afresh from the base", o.path, o.statePath)
	case stateErr == nil && overlayErr != nil:
		return nil, fmt.Errorf("open overlay: state %q exists without its overlay %q: restore the overlay, or delete the state to start afresh from the base", o.statePath, o.path)
	}

	mode := fileWrite
	switch {
	case opts.ReadOnly:
		mode = fileRead
		if stateErr != nil { // the making of it was cut short, or it never began
			return nil, fmt.Errorf("open overlay: %w", stateErr)
		}
	case overlayErr != nil:
		mode = fileCreate
	}
	if o.data, err = o.fs.open("create overlay", o.path, mode); err != nil {
		return nil, fmt.Errorf("open overlay: %w", err)
	}
	if err := o.data.lock(opts.ReadOnly); err != nil {
		return nil, fmt.Errorf("open overlay: lock %q: %w", o.path, err)
	}
	// Only now nobody else can make the state.
	if _, err := o.fs.size(o.statePath); errors.Is(err, os.ErrNotExist) {
		return []string{o.statePath, o.statePath + newSuffix, o.path}, o.fs.syncDir("sync folder of new overlay", filepath.Dir(o.path))
	} else if err != nil {
		return nil, fmt.Errorf("open overlay: %w", err)
	}
	if mode == fileCreate {
		mode = fileWrite
	}
	if o.state, err = o.fs.open("open state", o.statePath, mode); err != nil {
		return nil, fmt.Errorf("open overlay: %w", err)
	}
	if err := o.state.lock(opts.ReadOnly); err != nil {
		return nil, fmt.Errorf("open overlay %q: lock its state %q: %w", o.path, o.statePath, err)
	}
	return nil, nil
}

// load reads the state file, checks that everything belongs together, and brings both files in order.
func (o *Overlay) load(opts OverlayOptions, want stateHeader) error {
	size, err := o.state.size()
	if err != nil {
		return fmt.Errorf("read overlay state %q: %w", o.statePath, err)
	}
	raw := make([]byte, size)
	if err := o.state.readAt(raw, 0); err != nil {
		return fmt.Errorf("read overlay state %q: %w", o.statePath, err)
	}
	header, err := decodeStateHeader(raw)
	if err != nil {
		return fmt.Errorf("read overlay state %q: %w", o.statePath, err)
	}
	if err := o.checkHeader(opts, header, want); err != nil {
		return err
	}
	o.blockSize = header.blockSize
	o.blocks = (o.size + o.blockSize - 1) / o.blockSize
	o.states = newBlockStates(o.blocks)
	o.changed = newBitmap(o.blocks)
	o.buffers.New = func() any {
		b := make([]byte, o.blockSize)
		return &b
	}
	fresh := true
	o.stateLog, err = decodeStateLog(raw[stateHeaderSize:], o.blocks, func(r stateRun) {
		fresh = false
		o.states.set(r.first, r.first+r.count-1, r.state)
	})
	if err != nil {
		return fmt.Errorf("read overlay state %q: %w", o.statePath, err)
	}
	durable := o.states.runs(o.blocks)
	if opts.Live != nil {
		before, err := o.live(opts.Live)
		if err != nil {
			return fmt.Errorf("open overlay %q: what it was like when its last user died: %w", o.path, err)
		}
		fresh = fresh && !before
	}

	overlaySize, err := o.data.size()
	if err != nil {
		return fmt.Errorf("open overlay %q: %w", o.path, err)
	}
	if overlaySize != o.size {
		if overlaySize != 0 || !fresh {
			return fmt.Errorf("open overlay %q: it has %d bytes, its device has %d: it was truncated, or belongs to another state than %q; restore both from a backup, or delete both to start afresh from the base",
				o.path, overlaySize, o.size, o.statePath)
		}
		if opts.ReadOnly {
			return nil // it holds nothing
		}
		if err := o.data.truncate("size new overlay", o.size); err != nil {
			return fmt.Errorf("create overlay %q: %w", o.path, err)
		}
		// Now, so that every other file of a wrong size is known to be wrong.
		if err := o.data.sync("sync new overlay"); err != nil {
			return fmt.Errorf("create overlay %q: %w", o.path, err)
		}
	}
	if opts.ReadOnly {
		return nil
	}
	if err := o.scrub(); err != nil {
		return fmt.Errorf("open overlay %q: remove what was never flushed: %w", o.path, err)
	}

	// A commit was cut short. From now on the base is known again, unless it is an overlay that is only read here: who writes that next removes
	// from its file what was never flushed, and with that changes its time.
	if below, ok := opts.Base.(*Overlay); header.base.modTime == 0 && want.base.modTime != 0 && !opts.AnyBase && !(ok && below.readOnly) {
		header.base = want.base
		if err := o.writeState(header, durable); err != nil {
			return fmt.Errorf("note the base in overlay state %q: %w", o.statePath, err)
		}
	}
	compact := stateHeaderSize + batchHeaderSize*2 + int64(len(durable))*batchRunSize
	if o.stateLog.torn || o.stateLog.end > 2*compact+PageSize {
		torn := o.stateLog.torn
		if err := o.writeState(header, durable); err != nil {
			return fmt.Errorf("compact overlay state %q: %w", o.statePath, err)
		}
		if torn {
			o.log.Info("dropped the unfinished last entry of an overlay's state, which no flush had promised", "overlay", o.path, "state_file", o.statePath)
		}
	}
	return nil
}

// checkHeader reports why the files of this overlay cannot be opened as it was asked for.
func (o *Overlay) checkHeader(opts OverlayOptions, have, want stateHeader) error {
	if opts.BlockSize != 0 && have.blockSize != opts.BlockSize {
		return fmt.Errorf("open overlay %q: block size %d was asked for, its state %q says %d: ask for that, or delete overlay and state to start afresh from the base",
			o.path, opts.BlockSize, o.statePath, have.blockSize)
	}
	base := opts.BasePath
	if base == "" {
		base = "base"
	}
	remedy := fmt.Sprintf("restore the base the overlay was made over, or delete overlay %q and state %q to start afresh", o.path, o.statePath)
	was, is := have.base, want.base
	switch {
	case have.deviceSize != want.deviceSize || was.size != is.size:
		return fmt.Errorf("open overlay: %q changed since the overlay was made: it had %d bytes, it has %d now; %s", base, was.size, is.size, remedy)
	case opts.AnyBase || was.isOf(is):
		return nil
	}
	if (was.states == 0) != (is.states == 0) && was.states == 0 {
		return fmt.Errorf("open overlay %q: it was made over a base that is no overlay, and %q is one: give it what it was made over", o.path, base)
	} else if was.states != 0 && is.states == 0 {
		return fmt.Errorf("open overlay %q: it was made over another overlay, and %q is none: give it what it was made over", o.path, base)
	}
	remedy += ", or, if it is known to hold the same, tell the overlay so (drafter device rebase --same-contents)"
	if was.modTime == is.modTime {
		return fmt.Errorf("open overlay: %q changed since the overlay was made: it holds other blocks; %s", base, remedy)
	}
	format := func(ns int64) string { return time.Unix(0, ns).UTC().Format(time.RFC3339Nano) }
	return fmt.Errorf("open overlay: %q changed since the overlay was made: it was last modified at %s, now at %s; %s", base, format(was.modTime), format(is.modTime), remedy)
}

// identify finds out what a base from the file at path, if it is not empty, is known again by, as it is now.
func identify(fs storage, base Device, path string) (id baseIdentity, err error) {
	id.size = base.Size()
	if below, ok := base.(*Overlay); ok {
		// Its file tells when held blocks were written, and nothing of discarded ones.
		id.states = below.states.digest(below.blocks)
	}
	if path != "" {
		id.modTime, err = fs.modTime(path)
	}
	return id, err
}

// syncBase makes durable what the base is known again by.
func (o *Overlay) syncBase() error {
	if o.basePath == "" {
		return nil
	}
	return o.fs.syncFile("sync base", o.basePath)
}

// scrub punches out of the overlay file what lies outside of held blocks.
func (o *Overlay) scrub() error {
	for off := int64(0); off < o.size; {
		data, err := o.data.nextData(off, o.size)
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		for off = data.Offset; off < data.End(); {
			state, last := o.states.run(off/o.blockSize, (data.End()-1)/o.blockSize)
			end := min(data.End(), (last+1)*o.blockSize)
			if state != blockHeld {
				if err := o.data.punch("scrub", off, end-off); err != nil {
					return err
				}
				o.dirty.Store(true)
			}
			off = end
		}
	}
	return nil
}

// writeState replaces the state file by a new one with these contents, whole or not at all.
func (o *Overlay) writeState(header stateHeader, runs []stateRun) error {
	log := stateLog{}
	b := header.encode()
	for len(runs) > 0 {
		n := min(len(runs), batchMaxRuns)
		log.sequence++
		b = appendBatch(b, log.sequence, 0, runs[:n])
		runs = runs[n:]
	}
	log.sequence++
	log.sealed = true
	b = appendBatch(b, log.sequence, batchSeal, nil)
	log.end = int64(len(b))
	// The overlay file's lock is what counts; the one on this file catches a state file that is given two overlays.
	f, err := replaceFile(o.fs, "state", o.statePath, b)
	if err != nil {
		return err
	}
	old := o.state
	o.state, o.stateLog = f, log
	if old != nil {
		return old.close()
	}
	return nil
}

// Size implements [Device].
func (o *Overlay) Size() int64 { return o.size }

// BlockSize is the unit in bytes in which the overlay holds changes.
func (o *Overlay) BlockSize() int64 { return o.blockSize }

// span is the first and last block of a range that is not empty.
func (o *Overlay) span(off, n int64) (first, last int64) {
	return off / o.blockSize, (off + n - 1) / o.blockSize
}

// block is the range of bytes of block i.
func (o *Overlay) block(i int64) Range {
	off := i * o.blockSize
	return Range{Offset: off, Length: min(o.blockSize, o.size-off)}
}

// ReadAt implements [Device].
func (o *Overlay) ReadAt(p []byte, off int64) (int, error) {
	if o.closed.Load() {
		return 0, errClosed("read", o.path)
	}
	p, eof := clipRead(o.path, p, off, o.size)
	for done := 0; done < len(p); {
		at := off + int64(done)
		first, last := o.span(at, int64(len(p)-done))
		state, last := o.states.run(first, last)
		part := p[done:min(int64(len(p)), (last+1)*o.blockSize-off)]
		var err error
		switch state {
		case blockBase:
			if _, err = o.base.ReadAt(part, at); err == io.EOF {
				err = nil // the end of the base is ours, too
			}
		case blockHeld:
			err = o.data.readAt(part, at)
		case blockZero:
			clear(part)
		}
		if err != nil {
			return done, err
		}
		done += len(part)
	}
	return len(p), eof
}

// WriteAt implements [Device].
func (o *Overlay) WriteAt(p []byte, off int64) (int, error) {
	if err := checkRange("write", o.path, off, int64(len(p)), o.size); err != nil {
		return 0, err
	}
	if len(p) == 0 {
		return 0, o.usable("write")
	}
	first, last := o.span(off, int64(len(p)))
	if done, err := o.writeHeld(p, off, first, last); done {
		if err != nil {
			return 0, err
		}
		return len(p), nil
	}

	o.locks.lock(first, last)
	defer o.locks.unlock(first, last)
	if err := o.usable("write"); err != nil {
		return 0, err
	}
	if !o.elide {
		if err := o.writeRun(p, off); err != nil {
			return 0, err
		}
		return len(p), nil
	}
	// Write what lies between the blocks that need nothing.
	start := 0
	for i := first; i <= last; i++ {
		from := max(0, int(i*o.blockSize-off))
		to := min(len(p), int((i+1)*o.blockSize-off))
		same, err := o.unchanged(i, p[from:to], off+int64(from))
		if err != nil {
			return start, err
		}
		if !same {
			continue
		}
		if start < from {
			if err := o.writeRun(p[start:from], off+int64(start)); err != nil {
				return start, err
			}
		}
		start = to
	}
	if start < len(p) {
		if err := o.writeRun(p[start:], off+int64(start)); err != nil {
			return start, err
		}
	}
	return len(p), nil
}

// writeHeld writes p if the overlay holds all the blocks it touches, and reports whether it does.
func (o *Overlay) writeHeld(p []byte, off, first, last int64) (done bool, err error) {
	o.locks.rlock(first, last)
	defer o.locks.runlock(first, last)
	if err := o.usable("write"); err != nil {
		return true, err
	}
	if state, end := o.states.run(first, last); state != blockHeld || end != last {
		return false, nil
	}
	err = o.data.writeAt("write", p, off)
	o.dirty.Store(true)
	return true, err
}

// unchanged reports whether p is what block i, which the caller has locked, has at off, and the overlay need not hold it.
func (o *Overlay) unchanged(i int64, p []byte, off int64) (bool, error) {
	switch o.states.get(i) {
	case blockZero:
		return IsZero(p), nil
	case blockBase:
		buffer := o.buffers.Get().(*[]byte)
		defer o.buffers.Put(buffer)
		have := (*buffer)[:len(p)]
		if err := o.readBase(have, off); err != nil {
			return false, err
		}
		return bytes.Equal(have, p), nil
	}
	return false, nil
}

func (o *Overlay) readBase(p []byte, off int64) error {
	if _, err := o.base.ReadAt(p, off); err != nil && err != io.EOF {
		return fmt.Errorf("read the base of %q: %w", o.path, err)
	}
	return nil
}

// writeRun writes p at off and makes all blocks it touches, which the caller has locked, held.
func (o *Overlay) writeRun(p []byte, off int64) error {
	first, last := o.span(off, int64(len(p)))
	err := func() error {
		defer o.dirty.Store(true)
		// Only the first and the last block can be written in part, and need what the base has around it.
		for _, i := range [2]int64{first, last} {
			b := o.block(i)
			lo, hi := max(off, b.Offset), min(off+int64(len(p)), b.End())
			if hi <= lo || (lo == b.Offset && hi == b.End()) || o.states.get(i) != blockBase {
				continue
			}
			if err := o.copyUp(b, lo, p[lo-off:hi-off]); err != nil {
				return err
			}
			if lo == off { // the head
				p, off = p[hi-off:], hi
			} else { // the tail
				p = p[:lo-off]
			}
		}
		if len(p) == 0 {
			return nil
		}
		return o.data.writeAt("write", p, off)
	}()
	if err != nil {
		o.undo(first, last)
		return err
	}
	o.become(first, last, blockHeld)
	return nil
}

// copyUp writes the block b of the base to the overlay file with p in place of what it has at off. Pages of zeros are
// left out.
func (o *Overlay) copyUp(b Range, off int64, p []byte) error {
	buffer := o.buffers.Get().(*[]byte)
	defer o.buffers.Put(buffer)
	data := (*buffer)[:b.Length]
	if err := o.readBase(data, b.Offset); err != nil {
		return err
	}
	copy(data[off-b.Offset:], p)
	page := func(i int) []byte { return data[i:min(i+PageSize, len(data))] }
	for i := 0; i < len(data); {
		if IsZero(page(i)) {
			i += PageSize
			continue
		}
		end := i + PageSize
		for end < len(data) && !IsZero(page(end)) {
			end += PageSize
		}
		end = min(end, len(data))
		if err := o.data.writeAt("copy up", data[i:end], b.Offset+int64(i)); err != nil {
			return err
		}
		i = end
	}
	return nil
}

// become sets the state of the blocks [first, last], which the caller has locked, after their data is in place. The state
// is set before the block is listed as changed: see the order in flush.
func (o *Overlay) become(first, last int64, state blockState) {
	for i := first; i <= last; {
		have, end := o.states.run(i, last)
		if have != state {
			o.states.set(i, end, state)
			o.changed.set(i, end)
		}
		i = end + 1
	}
}

// undo restores the invariant that the overlay file is zero outside of held blocks, after a write that failed.
func (o *Overlay) undo(first, last int64) {
	for i := first; i <= last; {
		state, end := o.states.run(i, last)
		if state != blockHeld {
			from := i * o.blockSize
			if err := o.data.punch("undo", from, min((end+1)*o.blockSize, o.size)-from); err != nil {
				_ = o.fail(fmt.Errorf("undo a write that failed: %w", err))
				return
			}
		}
		i = end + 1
	}
}

// Discard implements [Device]. Blocks that are discarded whole take no space in the overlay file.
func (o *Overlay) Discard(off, n int64) error {
	if err := checkRange("discard", o.path, off, n, o.size); err != nil {
		return err
	}
	if n == 0 {
		return o.usable("discard")
	}
	end := off + n
	first := (off + o.blockSize - 1) / o.blockSize // whole blocks: [first, last)
	last := end / o.blockSize
	if end == o.size {
		last = o.blocks
	}
	if first >= last {
		// No block as a whole: one in part, or two neighbours.
		if mid := first * o.blockSize; mid < end && mid > off {
			return errors.Join(o.zeroPart(off, mid-off), o.zeroPart(mid, end-mid))
		}
		return o.zeroPart(off, n)
	}
	if head := first * o.blockSize; off < head {
		if err := o.zeroPart(off, head-off); err != nil {
			return err
		}
	}
	if tail := last * o.blockSize; tail < end {
		if err := o.zeroPart(tail, end-tail); err != nil {
			return err
		}
	}
	return o.zeroBlocks(first, last-1)
}

// zeroBlocks makes whole blocks zero.
func (o *Overlay) zeroBlocks(first, last int64) error {
	o.locks.lock(first, last)
	defer o.locks.unlock(first, last)
	if err := o.usable("discard"); err != nil {
		return err
	}
	for i := first; i <= last; {
		state, end := o.states.run(i, last)
		if state == blockHeld {
			off := i * o.blockSize
			err := o.data.punch("discard", off, min((end+1)*o.blockSize, o.size)-off)
			o.dirty.Store(true)
			if err != nil {
				return err
			}
		}
		// At once, and not after the loop: what is punched must not be called held for longer than it must.
		o.become(i, end, blockZero)
		i = end + 1
	}
	return nil
}

// zeroPart makes a part of one block zero.
func (o *Overlay) zeroPart(off, n int64) error {
	i := off / o.blockSize
	o.locks.lock(i, i)
	defer o.locks.unlock(i, i)
	if err := o.usable("discard"); err != nil {
		return err
	}
	switch o.states.get(i) {
	case blockHeld:
		err := o.data.punch("discard", off, n)
		o.dirty.Store(true)
		return err
	case blockBase:
		buffer := o.buffers.Get().(*[]byte)
		defer o.buffers.Put(buffer)
		p := (*buffer)[:n]
		if err := o.readBase(p, off); err != nil {
			return err
		}
		if IsZero(p) {
			return nil
		}
		clear(p)
		return o.writeRun(p, off)
	}
	return nil
}

// NextData implements [Extents].
func (o *Overlay) NextData(off int64) (Range, error) {
	if o.closed.Load() {
		return Range{}, errClosed("find data in", o.path)
	}
	if off < 0 || off >= o.size {
		return restOf(o.size, off)
	}
	for off < o.size {
		state, last := o.states.run(off/o.blockSize, o.blocks-1)
		end := min((last+1)*o.blockSize, o.size)
		var r Range
		err := io.EOF
		switch state {
		case blockHeld:
			r, err = o.data.nextData(off, end)
		case blockBase:
			if r, err = NextData(o.base, off); err == nil && r.Offset >= end {
				err = io.EOF
			}
			r.Length = min(r.End(), end) - r.Offset
		}
		if err != io.EOF {
			return r, err
		}
		off = end
	}
	return Range{}, io.EOF
}

// NextChange returns the first range at or after off that may differ from the base, in whole blocks but for off itself
// and the end of the device, and io.EOF when there is none. What lies between off and the range is the base's. Of overlays over
// each other, the base is the one below all.
func (o *Overlay) NextChange(off int64) (Range, error) {
	r, err := o.nextOwn(off)
	below, ok := o.base.(*Overlay)
	if !ok || err != nil && err != io.EOF || err == nil && r.Offset == off {
		return r, err
	}
	if b, belowErr := below.NextChange(off); err == io.EOF || belowErr != io.EOF && (belowErr != nil || b.Offset < r.Offset) {
		return b, belowErr
	}
	return r, nil
}

// nextOwn is NextChange of this overlay alone.
func (o *Overlay) nextOwn(off int64) (Range, error) {
	if o.closed.Load() {
		return Range{}, errClosed("find changes in", o.path)
	}
	if off < 0 || off >= o.size {
		return restOf(o.size, off)
	}
	start := off
	for i := off / o.blockSize; i < o.blocks; {
		state, last := o.states.run(i, o.blocks-1)
		if state == blockBase {
			i = last + 1
			start = i * o.blockSize
			continue
		}
		for last+1 < o.blocks && o.states.get(last+1) != blockBase {
			_, last = o.states.run(last+1, o.blocks-1)
		}
		return Range{Offset: start, Length: min((last+1)*o.blockSize, o.size) - start}, nil
	}
	return Range{}, io.EOF
}

// OverlayBlocks counts the blocks of an overlay.
type OverlayBlocks struct {
	Total int64 // blocks of the device
	Held  int64 // in the overlay file
	Zero  int64 // discarded, in neither file
}

// Blocks counts the blocks by where they are. The rest is in the base.
func (o *Overlay) Blocks() OverlayBlocks { return o.states.count(o.blocks) }

// Flush implements [Device].
func (o *Overlay) Flush() error {
	o.flushing.Lock()
	defer o.flushing.Unlock()
	if o.closed.Load() {
		return errClosed("flush", o.path)
	}
	if o.readOnly {
		return nil
	}
	return o.flush()
}

// flush makes everything that was written before it durable. The caller holds flushing. The order is what makes it right:
//
//  1. take the list of blocks that changed their state;
//  2. look up what they are now (later changes list them again, since become sets the state first);
//  3. sync the overlay file: every block found held in 2 had its data written before;
//  4. append the states found in 2, and sync.
func (o *Overlay) flush() error {
	if err := o.failed(); err != nil {
		return err
	}
	var runs []stateRun
	o.changed.take(func(first, last int64) {
		for i := first; i <= last; {
			state, end := o.states.run(i, min(last, i+1<<30))
			runs = append(runs, stateRun{first: i, count: end - i + 1, state: state})
			i = end + 1
		}
	})
	if o.dirty.Swap(false) {
		if err := o.data.sync("sync overlay"); err != nil {
			return o.fail(err)
		}
	}
	for len(runs) > 0 {
		n := min(len(runs), batchMaxRuns)
		if err := o.appendState(0, runs[:n]); err != nil {
			// Nothing is lost (a full disk can be helped): the next Flush says it again, in the same place.
			for _, r := range runs {
				o.changed.set(r.first, r.first+r.count-1)
			}
			return err
		}
		runs = runs[n:]
	}
	return nil
}

// appendState appends a batch to the state file and syncs it. The caller holds flushing.
func (o *Overlay) appendState(flags uint32, runs []stateRun) error {
	b := appendBatch(nil, o.stateLog.sequence+1, flags, runs)
	if err := o.state.writeAt("append to state", b, o.stateLog.end); err != nil {
		return fmt.Errorf("flush %q: %w", o.path, err)
	}
	if err := o.state.sync("sync state"); err != nil {
		return o.fail(err)
	}
	o.stateLog.end += int64(len(b))
	o.stateLog.sequence++
	o.stateLog.sealed = flags&batchSeal != 0
	return nil
}

// fail makes the overlay refuse writes and flushes from now on. The kernel reports that it could not write something
// back once, and may have dropped it: a later sync that succeeds would promise too much.
func (o *Overlay) fail(err error) error {
	err = fmt.Errorf("overlay %q failed and must be opened anew: %w", o.path, err)
	o.failure.CompareAndSwap(nil, &err)
	return o.failed()
}

func (o *Overlay) failed() error {
	if err := o.failure.Load(); err != nil {
		return *err
	}
	return nil
}

// usable reports why nothing can be written. It is asked under the lock of the blocks in question, so that Close can
// wait for those that were told yes.
func (o *Overlay) usable(verb string) error {
	if o.closed.Load() {
		return errClosed(verb, o.path)
	}
	if o.readOnly {
		return fmt.Errorf("%s %q: opened read-only: %w", verb, o.path, syscall.EROFS)
	}
	return o.failed()
}

// Close implements [Device]. It closes the base, too.
func (o *Overlay) Close() error {
	if o.closed.Swap(true) {
		return nil
	}
	o.locks.lock(0, stripeCount-1) // writes that were let in are done after this, and no more are let in
	defer o.locks.unlock(0, stripeCount-1)
	o.flushing.Lock()
	defer o.flushing.Unlock()
	var err error
	if !o.readOnly {
		err = o.flush()
		if err == nil && !o.stateLog.sealed {
			err = o.appendState(batchSeal, nil)
		}
	}
	return errors.Join(err, o.data.close(), o.state.close(), o.base.Close())
}

// live moves the states of blocks into a file in memory, and reports whether they were there before: then those that
// differ from the state file are what was not flushed.
func (o *Overlay) live(f *os.File) (before bool, err error) {
	size := int64(len(o.states)) * 8
	if before, err = grow(f, size); err != nil || size == 0 {
		return before, err
	}
	words, err := mapWords(o, f, size)
	if err != nil {
		return before, err
	}
	shared := blockStates(words)
	if !before {
		for i := range o.states {
			shared[i].Store(o.states[i].Load())
		}
		o.states = shared
		return false, nil
	}
	for i := range o.states {
		if word := shared[i].Load(); word&(word>>1)&statesLow != 0 {
			return true, fmt.Errorf("a block is in no known state: the file is damaged")
		}
	}
	for i := int64(0); i < o.blocks; i++ {
		if shared.get(i) != o.states.get(i) {
			o.changed.set(i, i)
		}
	}
	o.states = shared
	// What it wrote before it died may not be on disk yet, whatever has become of the blocks' states.
	o.dirty.Store(true)
	return true, nil
}

// blockStates holds two bits for each block. Reads need no lock; writes to a block are ordered by the lock of the block.
type blockStates []atomic.Uint64

const (
	statesPerWord = 32
	statesLow     = 0x5555_5555_5555_5555 // the low bit of each pair
)

func newBlockStates(n int64) blockStates {
	return make(blockStates, (n+statesPerWord-1)/statesPerWord)
}

func (s blockStates) get(i int64) blockState {
	return blockState(s[i/statesPerWord].Load() >> (2 * uint(i%statesPerWord)) & 3)
}

// set sets the blocks [first, last].
func (s blockStates) set(first, last int64, state blockState) {
	pattern := uint64(state) * statesLow
	eachWord(first*2, last*2+1, func(w int64, mask uint64) bool {
		for {
			old := s[w].Load() // other bits of the word are someone else's
			if s[w].CompareAndSwap(old, old&^mask|pattern&mask) {
				return true
			}
		}
	})
}

// run returns the state of block first, and the last of the blocks after it, up to last, that have the same.
func (s blockStates) run(first, last int64) (blockState, int64) {
	state := s.get(first)
	pattern := uint64(state) * statesLow
	end := last
	eachWord(first*2, last*2+1, func(w int64, mask uint64) bool {
		if differs := (s[w].Load() ^ pattern) & mask; differs != 0 {
			end = w*statesPerWord + int64(bits.TrailingZeros64(differs))/2 - 1
			return false
		}
		return true
	})
	// Block first itself may have changed between the two loads.
	return state, max(end, first)
}

// runs lists the blocks, of n, that are not of the base.
func (s blockStates) runs(n int64) []stateRun {
	var runs []stateRun
	for i := int64(0); i < n; {
		state, last := s.run(i, min(n-1, i+1<<30))
		if state != blockBase {
			runs = append(runs, stateRun{first: i, count: last - i + 1, state: state})
		}
		i = last + 1
	}
	return runs
}

// count counts n blocks by their states.
func (s blockStates) count(n int64) OverlayBlocks {
	c := OverlayBlocks{Total: n}
	for i := range s {
		word := s[i].Load()
		c.Held += int64(bits.OnesCount64(word & statesLow))
		c.Zero += int64(bits.OnesCount64(word &^ statesLow))
	}
	return c
}

// digest is XXH3-64 of the states of n blocks, as a state file has them. It is neither 0 nor unknownStates.
func (s blockStates) digest(n int64) uint64 {
	h := xxh3.New()
	for _, r := range s.runs(n) {
		_, _ = h.Write(appendRun(nil, r))
	}
	return max(h.Sum64(), unknownStates+1)
}
