package runner

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/zeebo/xxh3"
	"golang.org/x/sys/unix"

	"github.com/drafter-vm/drafter/pkg/block"
)

// A working set is what a guest touches of its memory when it goes on: the pages that it waits for at each start, one after the other. A start that
// records has them all come by faults (ram.FillOptions.Record), and keeps their list in a hidden file beside the memory's base. Later starts read the
// base ahead while the machine is started, and have these pages in the memory, mostly, before the guest runs.
//
// The list is a hint: the pages have the contents of the device in any case. One that is not of this base, or damaged, is left aside, and so is any of a
// memory that does not read as its base, such as that of an instance that was saved: what its guest touches is mostly elsewhere.

// workingSetFile is where the working set of a memory that starts as a base is kept.
func workingSetFile(base string) string {
	return filepath.Join(filepath.Dir(base), "."+filepath.Base(base)+".workingset")
}

// The file of a working set, all numbers big-endian:
//
//	0   8  "DRAFTWSS"
//	8   8  version, 1
//	16  8  size of the base
//	24  8  its mtime, nanoseconds
//	32  8  its ctime, nanoseconds
//	40  8  its inode number
//	48  8  number of pages that follow
//	56     4 each: its number, in the order of the first touch
//	     8 XXH3-64 of all that precedes
const (
	workingSetMagic   = "DRAFTWSS"
	workingSetVersion = 1
	workingSetHead    = 56
)

// workingSetBatch is how many pages are brought in the order of their places, not of the touches: 4 MiB are in the memory within a few milliseconds,
// and a disk is read in one direction.
const workingSetBatch = 1024

// baseState says whether a base is still the same file with the same contents.
type baseState struct {
	size, mtime, ctime int64 // times in nanoseconds
	ino                uint64
}

func stateOf(base os.FileInfo) (baseState, error) {
	st, ok := base.Sys().(*syscall.Stat_t)
	if !ok || !base.Mode().IsRegular() {
		return baseState{}, fmt.Errorf("%q is no regular file: its changes would not be noticed", base.Name())
	}
	return baseState{size: st.Size, mtime: st.Mtim.Nano(), ctime: st.Ctim.Nano(), ino: st.Ino}, nil
}

func workingSetHeader(of baseState, pages int) []byte {
	b := append(make([]byte, 0, workingSetHead+4*pages+8), workingSetMagic...)
	for _, v := range []uint64{workingSetVersion, uint64(of.size), uint64(of.mtime), uint64(of.ctime), of.ino, uint64(pages)} {
		b = binary.BigEndian.AppendUint64(b, v)
	}
	return b
}

// encodeWorkingSet encodes the offsets of pages.
func encodeWorkingSet(of baseState, offsets []int64) []byte {
	b := workingSetHeader(of, len(offsets))
	for _, off := range offsets {
		b = binary.BigEndian.AppendUint32(b, uint32(off/block.PageSize))
	}
	return binary.BigEndian.AppendUint64(b, xxh3.Hash(b))
}

// decodeWorkingSet returns the offsets of the pages of a working set of a base.
func decodeWorkingSet(b []byte, of baseState) ([]int64, error) {
	n := (len(b) - workingSetHead - 8) / 4
	if n < 0 || len(b) != workingSetHead+4*n+8 {
		return nil, fmt.Errorf("it has %d bytes, which none has", len(b))
	}
	if !bytes.Equal(b[:workingSetHead], workingSetHeader(of, n)) {
		return nil, errors.New("it is of another base, of another state of it, or of another version")
	}
	list, sum := b[workingSetHead:len(b)-8], b[len(b)-8:]
	if xxh3.Hash(b[:len(b)-8]) != binary.BigEndian.Uint64(sum) {
		return nil, errors.New("its checksum is wrong")
	}
	offsets := make([]int64, n)
	for i := range offsets {
		offsets[i] = int64(binary.BigEndian.Uint32(list[4*i:])) * block.PageSize
		if offsets[i]+block.PageSize > of.size {
			return nil, fmt.Errorf("page at %d is outside the %d bytes of the base", offsets[i], of.size)
		}
	}
	return offsets, nil
}

// inBatches are pages as ranges, in ascending order within each batch.
func inBatches(offsets []int64, batch int) (ranges []block.Range) {
	for part := range slices.Chunk(offsets, batch) {
		part = slices.Compact(slices.Sorted(slices.Values(part)))
		first := len(ranges)
		for _, off := range part {
			if last := len(ranges) - 1; last >= first && ranges[last].End() == off {
				ranges[last].Length += block.PageSize
			} else {
				ranges = append(ranges, block.Range{Offset: off, Length: block.PageSize})
			}
		}
	}
	return ranges
}

// readsAsBase reports whether the memory starts as its base has it, and the state of that.
func (i *Instance) readsAsBase() (baseState, error) {
	memory := i.device(MemoryDevice)
	of, err := stateOf(memory.base)
	if err == nil && memory.overlay != nil {
		var r block.Range
		if r, err = memory.overlay.NextChange(0); err == nil {
			err = fmt.Errorf("the memory was saved since: it differs from its base from byte %d on", r.Offset)
		} else if err == io.EOF {
			err = nil
		}
	}
	return of, err
}

// workingSet is what is known of it at a start, or is to be found out.
type workingSet struct {
	first  []block.Range // in the order in which it is brought
	record bool
	of     baseState // with record
}

// workingSet returns the working set of an instance that is about to be resumed, and begins to read the base ahead of it.
func (i *Instance) workingSet() (w workingSet) {
	memory := i.device(MemoryDevice)
	path := workingSetFile(memory.Base)
	if i.cfg.RecordWorkingSet > 0 {
		of, err := i.readsAsBase()
		if err != nil {
			i.log.Warn("the working set is not recorded", "path", path, "error", err)
		}
		return workingSet{record: err == nil, of: of} // without an earlier one: what is there is touched without a fault
	}
	offsets, err := i.loadWorkingSet(path)
	if errors.Is(err, fs.ErrNotExist) {
		return workingSet{}
	} else if err != nil {
		i.log.Debug("a working set is left aside", "path", path, "error", err)
		return workingSet{}
	}
	w.first = inBatches(offsets, workingSetBatch)
	i.ahead.begin(func(ctx context.Context) { readAhead(ctx, memory.lock, w.first) })
	return w
}

func (i *Instance) loadWorkingSet(path string) (offsets []int64, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	of, err := i.readsAsBase()
	if err != nil {
		return nil, err
	}
	b, err := io.ReadAll(io.LimitReader(f, workingSetHead+4*of.size/block.PageSize+9)) // one more than there may be
	if err != nil {
		return nil, err
	}
	return decodeWorkingSet(b, of)
}

// readAhead has the kernel bring ranges of a file into its page cache, without waiting for more than its queues.
func readAhead(ctx context.Context, f *os.File, ranges []block.Range) {
	const (
		gap  = 64 << 10  // that is read, too, as that is faster than two reads
		most = 128 << 10 // that the kernel does at one request, on any disk
	)
	for len(ranges) > 0 && ctx.Err() == nil {
		next := ranges[0]
		ranges = ranges[1:]
		for len(ranges) > 0 && ranges[0].Offset >= next.Offset && ranges[0].Offset-next.End() <= gap {
			next.Length = max(next.Length, ranges[0].End()-next.Offset)
			ranges = ranges[1:]
		}
		for off := next.Offset; off < next.End(); off += most {
			if unix.Fadvise(int(f.Fd()), off, min(most, next.End()-off), unix.FADV_WILLNEED) != nil {
				return // it is a hint
			}
		}
	}
}

// recordWorkingSet writes down what the guest has touched, and touches for as long as is wanted, or until the instance is closed. mu is held.
func (i *Instance) recordWorkingSet(w workingSet) {
	if !w.record || i.phase == closed {
		return
	}
	path := workingSetFile(i.device(MemoryDevice).Base)
	i.recording.begin(func(ctx context.Context) {
		select {
		case <-time.After(i.cfg.RecordWorkingSet):
		case <-ctx.Done():
		}
		touched := i.filler.Touched()
		err := fmt.Errorf("this host does not tell what is touched: %s", i.memory.Capabilities())
		if len(touched) > 0 {
			err = replaceFile(path, encodeWorkingSet(w.of, touched))
		}
		if err != nil {
			i.log.Warn("the working set is not recorded", "path", path, "error", err)
			return
		}
		i.log.Info("the working set is recorded", "path", path, "bytes", len(touched)*block.PageSize)
	})
}

// replaceFile puts a file in its place as a whole. It need not be durable: half of it is noticed.
func replaceFile(path string, content []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+"-*")
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return nil
}
