package block

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"syscall"

	"golang.org/x/sync/errgroup"
)

// copyBufferSize is the unit in which devices are copied and compared, in bytes.
const copyBufferSize = 1 << 20

// minHole is the shortest run of zeros, in bytes, that Copy finds in data and discards. Discarding shorter ones would take
// more time and more extents than writing them.
const minHole = 32 << 10

// CopyOptions say how [Copy] copies. The zero value copies one piece at a time to a destination that may hold anything.
type CopyOptions struct {
	// Zeroed promises that the destination reads as zeros throughout, as a file that was just made does: what is zero in
	// the source is then left out rather than discarded.
	Zeroed bool

	// Concurrency is how many pieces of 1 MiB are on their way at a time; 0 means 1.
	Concurrency int

	// Progress, if set, is called after each piece with the position that was reached, which ascends, and the size of the
	// device, both in bytes, by one goroutine at a time.
	Progress func(done, total int64)
}

// Copy makes dst read as src does. They must be of the same size. Holes of src become holes in dst, and longer runs
// of zeros too. Nothing is flushed. When it fails, or ctx is cancelled, dst holds a part of the copy.
func Copy(ctx context.Context, dst, src Device, opts CopyOptions) error {
	if dst.Size() != src.Size() {
		return fmt.Errorf("copy device: the source has %d bytes, the destination %d: they must be of the same size", src.Size(), dst.Size())
	}
	var (
		mu       sync.Mutex // guards reached and Progress
		reached  int64
		progress = func(done int64) {
			if opts.Progress == nil {
				return
			}
			mu.Lock()
			defer mu.Unlock()
			if done > reached {
				reached = done
				opts.Progress(done, src.Size())
			}
		}
		buffers = sync.Pool{New: func() any {
			b := make([]byte, copyBufferSize)
			return &b
		}}
	)
	group, groupCtx := errgroup.WithContext(ctx)
	group.SetLimit(max(1, opts.Concurrency))
	end := int64(0) // of what was looked at
	err := eachPiece(groupCtx, src, copyBufferSize, func(r Range) error {
		if hole := (Range{Offset: end, Length: r.Offset - end}); hole.Length > 0 && !opts.Zeroed {
			if err := dst.Discard(hole.Offset, hole.Length); err != nil {
				return err
			}
		}
		end = r.End()
		group.Go(func() error {
			buffer := buffers.Get().(*[]byte)
			defer buffers.Put(buffer)
			p := (*buffer)[:r.Length]
			if err := readFull(src, p, r.Offset); err != nil {
				return err
			}
			if err := writeSparse(dst, p, r.Offset, opts.Zeroed); err != nil {
				return err
			}
			progress(r.End())
			return nil
		})
		return nil
	})
	// An error of a piece is the reason why groupCtx ended, if it did.
	if pieces := group.Wait(); pieces != nil {
		err = pieces
	}
	if err == nil && end < dst.Size() && !opts.Zeroed {
		err = dst.Discard(end, dst.Size()-end)
	}
	if err != nil {
		return fmt.Errorf("copy device: %w", err)
	}
	progress(src.Size())
	return nil
}

// CopyRanges makes parts of dst read as those of src, and leaves the rest of dst as it is. The parts are those that next returns: the first at or after
// an offset, until io.EOF. Holes of src become holes. Nothing is flushed. Progress, if not nil, is called with the bytes that were done
// since the last call. When it fails, or ctx is cancelled, dst holds some of the parts.
func CopyRanges(ctx context.Context, dst, src Device, next func(off int64) (Range, error), progress func(n int64)) error {
	buffer := make([]byte, copyBufferSize)
	for off := int64(0); ; {
		part, err := next(off)
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		for off = part.Offset; off < part.End(); {
			if err := ctx.Err(); err != nil {
				return err
			}
			data, err := NextData(src, off)
			if err == io.EOF {
				data.Offset = part.End()
			} else if err != nil {
				return err
			}
			start := min(data.Offset, part.End())
			if err := discardData(dst, off, start); err != nil {
				return err
			}
			p := buffer[:min(data.End(), part.End(), start+copyBufferSize)-start]
			if err := readFull(src, p, start); err != nil {
				return err
			}
			if err := writeSparse(dst, p, start, false); err != nil {
				return err
			}
			end := start + int64(len(p))
			if progress != nil {
				progress(end - off)
			}
			off = end
		}
	}
}

// discardData discards what may be data of d from off to end.
func discardData(d Device, off, end int64) error {
	for off < end {
		r, err := NextData(d, off)
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		off = min(r.End(), end)
		if n := off - r.Offset; n > 0 {
			if err := d.Discard(r.Offset, n); err != nil {
				return err
			}
		}
	}
	return nil
}

// writeSparse writes p to d at off, discarding runs of zeros, or leaving them out if d is zero.
func writeSparse(d Device, p []byte, off int64, zeroed bool) error {
	write := func(from, to int) error {
		if from >= to {
			return nil
		}
		_, err := d.WriteAt(p[from:to], off+int64(from))
		return err
	}
	start := 0 // of what is not written yet
	for at := 0; at < len(p); {
		end := at
		for end < len(p) {
			next := min(end+PageSize, len(p))
			if !IsZero(p[end:next]) {
				break
			}
			end = next
		}
		if end-at < minHole && end < len(p) || end == at {
			at = min(end+PageSize, len(p)) // the page that is not zero
			continue
		}
		if err := write(start, at); err != nil {
			return err
		}
		if !zeroed {
			if err := d.Discard(off+int64(at), int64(end-at)); err != nil {
				return err
			}
		}
		start, at = end, end
	}
	return write(start, len(p))
}

// Equal reports whether two devices are of the same size and contents, and if they are of the same size where they first
// differ (-1: they do not).
func Equal(ctx context.Context, a, b Device) (equal bool, at int64, err error) {
	if a.Size() != b.Size() {
		return false, -1, nil
	}
	pa, pb := make([]byte, copyBufferSize), make([]byte, copyBufferSize)
	size := a.Size()
	for off := int64(0); off < size; {
		if err := ctx.Err(); err != nil {
			return false, -1, fmt.Errorf("compare devices: %w", err)
		}
		// Where both have holes there is nothing to compare.
		start, err := nextDataOfAny(off, a, b)
		if err != nil {
			return false, -1, fmt.Errorf("compare devices: %w", err)
		}
		n := min(copyBufferSize, size-start)
		if n <= 0 {
			break
		}
		if err := errors.Join(readFull(a, pa[:n], start), readFull(b, pb[:n], start)); err != nil {
			return false, -1, fmt.Errorf("compare devices: %w", err)
		}
		if !bytes.Equal(pa[:n], pb[:n]) {
			for i := range n {
				if pa[i] != pb[i] {
					return false, start + i, nil
				}
			}
		}
		off = start + n
	}
	return true, -1, nil
}

// ReplaceFile puts the contents of from in the place of the file at path, or makes it: at any moment, also after a crash,
// path is the old file or the whole new one. It keeps the owner and permissions of the file it replaces; a new one is
// its owner's alone. The folder needs space for the new file beside the old.
func ReplaceFile(ctx context.Context, path string, from Device) (err error) {
	target, err := filepath.EvalSymlinks(path)
	if errors.Is(err, os.ErrNotExist) {
		target, err = path, nil
	}
	if err != nil {
		return fmt.Errorf("replace %q: %w", path, err)
	}
	temp, err := os.CreateTemp(filepath.Dir(target), "."+filepath.Base(target)+".new-*")
	if err != nil {
		return fmt.Errorf("replace %q: %w", path, err)
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("replace %q: %w", path, err)
			if removed := os.Remove(temp.Name()); !errors.Is(removed, os.ErrNotExist) { // it was renamed
				err = errors.Join(err, removed)
			}
		}
	}()
	if err := errors.Join(temp.Truncate(from.Size()), temp.Close()); err != nil {
		return err
	}
	file, err := OpenFile(temp.Name(), FileOptions{})
	if err != nil {
		return err
	}
	err = Copy(ctx, file, from, CopyOptions{Zeroed: true})
	if err == nil {
		err = keepOwner(file.file.File, target)
	}
	if err := errors.Join(err, file.Close()); err != nil { // Close flushes
		return err
	}
	if err := os.Rename(temp.Name(), target); err != nil {
		return err
	}
	return syncFolder(target)
}

// keepOwner gives f the permissions and the owner of the file at path, if that exists.
func keepOwner(f *os.File, path string) error {
	info, err := os.Stat(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := f.Chmod(info.Mode().Perm()); err != nil {
		return err
	}
	owner, ok := info.Sys().(*syscall.Stat_t)
	if !ok || (int(owner.Uid) == os.Geteuid() && int(owner.Gid) == os.Getegid()) {
		return nil
	}
	return f.Chown(int(owner.Uid), int(owner.Gid))
}
