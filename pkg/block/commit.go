package block

import (
	"bytes"
	"context"
	"errors"
	"fmt"
)

// Commit writes what the overlay holds to its base, which must be writable, and leaves the overlay empty. The device reads the
// same before, after, and when Commit fails or is cut short by a crash: then what was written to the base is also in the overlay still,
// and Commit can be called again, by who has opened both again. Other overlays over the same base are worth nothing afterwards, and
// refuse to be opened.
//
// Nobody may use the overlay meanwhile. Progress, if not nil, is told how many bytes of blocks are done, of how many.
func (o *Overlay) Commit(ctx context.Context, progress func(done, total int64)) error {
	if err := o.begin("commit"); err != nil {
		return err
	}
	defer o.end()
	if _, err := o.base.WriteAt(nil, 0); err != nil {
		return fmt.Errorf("commit %q: its base: %w", o.path, err)
	}
	if err := o.flush(); err != nil {
		return err
	}
	id, err := identify(o.fs, o.base, o.basePath)
	if err != nil {
		return fmt.Errorf("commit %q: %w", o.path, err)
	}
	// From here on the base is another at each moment. With what it still holds, the overlay is right over each of them.
	if err := o.writeState(o.header(id.unknown()), o.states.runs(o.blocks)); err != nil {
		return fmt.Errorf("commit %q: %w", o.path, err)
	}
	committed := false
	defer func() {
		if !committed { // what it is over is the base as it has become; if this fails, too, the next to open it notes that
			_ = o.bind(o.states.runs(o.blocks))
		}
	}()
	blocks := o.Blocks()
	done, total := int64(0), (blocks.Held+blocks.Zero)*o.blockSize
	if err := CopyRanges(ctx, o.base, o, o.nextOwn, func(n int64) {
		if done += n; progress != nil {
			progress(min(done, total), total)
		}
	}); err != nil {
		return fmt.Errorf("commit %q: %w", o.path, err)
	}
	if err := o.bind(nil); err != nil {
		return fmt.Errorf("commit %q: %w", o.path, err)
	}
	committed = true
	for _, r := range o.states.runs(o.blocks) {
		o.states.set(r.first, r.first+r.count-1, blockBase)
	}
	if err := o.scrub(); err != nil { // the next to open it does that, too
		return fmt.Errorf("commit %q: free the space of the overlay: %w", o.path, err)
	}
	return nil
}

// bind makes the base durable, and has the state say that the overlay is over it as it is now, and holds these blocks.
func (o *Overlay) bind(runs []stateRun) error {
	if err := errors.Join(o.base.Flush(), o.syncBase()); err != nil {
		return err
	}
	id, err := identify(o.fs, o.base, o.basePath)
	if err != nil {
		return err
	}
	return o.writeState(o.header(id), runs)
}

// header is that of the state of the overlay over a base.
func (o *Overlay) header(base baseIdentity) stateHeader {
	return stateHeader{blockSize: o.blockSize, deviceSize: o.size, base: base}
}

// begin has everything wait until end, but for reads: see Commit for these.
func (o *Overlay) begin(verb string) error {
	o.locks.lock(0, stripeCount-1)
	o.flushing.Lock()
	err := o.usable(verb)
	if err != nil {
		o.end()
	}
	return err
}

func (o *Overlay) end() {
	o.flushing.Unlock()
	o.locks.unlock(0, stripeCount-1)
}

// RebaseOptions say what an overlay is put over.
type RebaseOptions struct {
	// Base is what the overlay is to be over, of the same size as the one it has. The overlay owns it from success on.
	Base Device
	// BasePath is the file it was opened from: see OverlayOptions.
	BasePath string

	// SameContents says that Base holds what the present one holds. Then nothing is compared. If that is not so, the device reads as
	// something that it never was.
	SameContents bool

	// Progress, if set, is told how many bytes of the device have been compared, of how many.
	Progress func(done, total int64)
}

// Rebase puts the overlay over another base, and closes the one it had. The device reads the same as before: where the two differ,
// the overlay holds from now on what the old one has. When Rebase fails, or is cut short by a crash, the overlay is over the old base, and
// may hold more of it than before.
//
// Nobody may use the overlay meanwhile.
func (o *Overlay) Rebase(ctx context.Context, opts RebaseOptions) error {
	if opts.Base.Size() != o.size {
		return fmt.Errorf("rebase %q: the new base has %d bytes, the device has %d: give one of the same size", o.path, opts.Base.Size(), o.size)
	}
	if below, ok := opts.Base.(*Overlay); ok {
		opts.BasePath = below.path
	}
	if err := o.begin("rebase"); err != nil {
		return err
	}
	defer o.end()
	if !opts.SameContents {
		if err := o.holdDifferences(ctx, opts); err != nil {
			return fmt.Errorf("rebase %q: %w", o.path, err)
		}
	}
	if err := o.flush(); err != nil {
		return err
	}
	base, err := identify(o.fs, opts.Base, opts.BasePath)
	if err == nil && opts.BasePath != "" {
		err = o.fs.syncFile("sync new base", opts.BasePath)
	}
	if err == nil {
		err = o.writeState(o.header(base), o.states.runs(o.blocks))
	}
	if err != nil {
		return fmt.Errorf("rebase %q: %w", o.path, err)
	}
	old := o.base
	o.base, o.basePath = opts.Base, opts.BasePath
	return old.Close()
}

// holdDifferences has the overlay hold the blocks of its base that the other one has not.
func (o *Overlay) holdDifferences(ctx context.Context, opts RebaseOptions) error {
	have, other := make([]byte, o.blockSize), make([]byte, o.blockSize)
	for i := int64(0); i < o.blocks; i++ {
		if err := ctx.Err(); err != nil {
			return err
		}
		b := o.block(i)
		if opts.Progress != nil {
			opts.Progress(b.Offset, o.size)
		}
		if o.states.get(i) != blockBase {
			continue
		}
		next, err := nextDataOfAny(b.Offset, o.base, opts.Base)
		if err != nil {
			return err
		}
		if next == o.size {
			break
		} else if next >= b.End() {
			i = next/o.blockSize - 1
			continue
		}
		have, other := have[:b.Length], other[:b.Length]
		if err := errors.Join(readFull(o.base, have, b.Offset), readFull(opts.Base, other, b.Offset)); err != nil {
			return err
		}
		switch {
		case bytes.Equal(have, other):
		case IsZero(have):
			o.become(i, i, blockZero)
		default:
			if err := o.writeRun(have, b.Offset); err != nil {
				return err
			}
		}
	}
	if opts.Progress != nil {
		opts.Progress(o.size, o.size)
	}
	return nil
}
