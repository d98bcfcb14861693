package migrate

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/zeebo/xxh3"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/wire"
)

// BaseIndex is what is known of a base: of a device that does not change and that others were made from, such as the
// disk or the memory image of a package. It has the hash of each page that holds data, 16 bytes for 4096, and so tells a
// page that is as in the base from one that is not without the base being read.
//
// When both sides of a migration hold the same base, the destination's device starts as a copy of it, and only pages that
// differ are sent: see SourceDevice.Base and [BaseTarget].
//
// It does not change. All methods may be called concurrently.
type BaseIndex struct {
	pages  *digest // nobody writes to it any more
	digest wire.Digest
}

// Size returns the size of the base in bytes.
func (x *BaseIndex) Size() int64 { return x.pages.size }

// Digest returns the digest of the base's contents, the one that [block.Digest] returns.
func (x *BaseIndex) Digest() wire.Digest { return x.digest }

// IndexBase reads the base, but for its holes, and returns its index. It takes about 0.3 s for each GiB of data that is
// in the page cache.
func IndexBase(ctx context.Context, base block.Device) (*BaseIndex, error) {
	d := newDigest(base.Size())
	buffer := make([]byte, 256<<10)
	for off := int64(0); off < d.size; {
		next, err := block.NextData(base, off)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("index base: find data from %d: %w", off, err)
		}
		if next.Offset < off || next.Length <= 0 || next.Length > d.size-next.Offset {
			return nil, fmt.Errorf("index base of %d bytes: find data from %d: got %d bytes at %d", d.size, off, next.Length, next.Offset)
		}
		next = aligned(next, d.size)
		for off = max(off, next.Offset); off < next.End(); {
			if err := ctx.Err(); err != nil {
				return nil, fmt.Errorf("index base: %w", context.Cause(ctx))
			}
			p := buffer[:min(int64(len(buffer)), next.End()-off)]
			if n, err := base.ReadAt(p, off); n < len(p) {
				if err == nil || errors.Is(err, io.EOF) {
					err = io.ErrUnexpectedEOF
				}
				return nil, fmt.Errorf("index base: read at %d: %w", off, err)
			}
			d.write(off, p)
			off += int64(len(p))
		}
	}
	return newBaseIndex(d), nil
}

func newBaseIndex(d *digest) *BaseIndex { return &BaseIndex{pages: d, digest: d.sum()} }

// OpenBaseIndex returns the index of the base in the regular file at path. It is kept in the file at cache, with what
// identifies the base's file in its present state: its size, its inode number, and when its contents and its inode
// changed last. While those are the same, the base is not read again. An index that does not fit, or is damaged, is made
// anew; one that cannot be kept is logged and costs only time. Empty cache: it is not kept.
//
// The cache is trusted as much as the base: keep it where nobody else can write.
func OpenBaseIndex(ctx context.Context, path, cache string, log *slog.Logger) (*BaseIndex, error) {
	if log == nil {
		log = slog.Default()
	}
	began := time.Now()
	before, err := identify(path)
	if err != nil {
		return nil, fmt.Errorf("open index of base: %w", err)
	}
	if cache != "" {
		x, err := loadBaseIndex(cache, before)
		if err == nil {
			return x, nil
		}
		if !errors.Is(err, fs.ErrNotExist) {
			log.Debug("the index of a base is made anew", "base", path, "cache", cache, "error", err)
		}
	}
	base, err := block.OpenFile(path, block.FileOptions{ReadOnly: true})
	if err != nil {
		return nil, fmt.Errorf("open index of base: %w", err)
	}
	x, err := IndexBase(ctx, base)
	if err := errors.Join(err, base.Close()); err != nil {
		return nil, fmt.Errorf("open index of base %q: %w", path, err)
	}
	after, err := identify(path)
	if err != nil {
		return nil, fmt.Errorf("open index of base: %w", err)
	}
	if before != after || x.Size() != after.size {
		return nil, fmt.Errorf("open index of base %q: it changed while it was read: a base must not be written to", path)
	}
	if cache == "" {
		return x, nil
	}
	// A change in the same tick of the file system's clock would not be noticed.
	if young := began.Add(-2 * time.Second).UnixNano(); after.mtime > young || after.ctime > young {
		log.Debug("the index of a base is not kept, because the base is too new", "base", path)
		return x, nil
	}
	if err := saveBaseIndex(cache, after, x); err != nil {
		log.Warn("cannot keep the index of a base: it will be made again", "base", path, "error", err)
	}
	return x, nil
}

// fileIdentity says whether a file is still the same, in the same state.
type fileIdentity struct {
	size, mtime, ctime int64 // times in nanoseconds
	ino                uint64
}

func identify(path string) (fileIdentity, error) {
	info, err := os.Stat(path)
	if err != nil {
		return fileIdentity{}, err
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok || !info.Mode().IsRegular() {
		return fileIdentity{}, fmt.Errorf("%q is no regular file: its changes would not be noticed", path)
	}
	return fileIdentity{size: st.Size, mtime: st.Mtim.Nano(), ctime: st.Ctim.Nano(), ino: st.Ino}, nil
}

// The file of an index, all numbers big-endian:
//
//	0   8  "DRAFTIDX"
//	8   8  version, 1
//	16  8  size of the base
//	24  8  its mtime, nanoseconds
//	32  8  its ctime, nanoseconds
//	40  8  its inode number
//	48  8  number of chunks that follow, each 8 + 4096 × 16:
//	       8 its number, ascending: it has the pages from 4096 times that on
//	       4096 terms of pages, high half first; 0 for zeros
//	    16 XXH3-128 of all that precedes
const (
	indexMagic     = "DRAFTIDX"
	indexVersion   = 1
	indexHead      = 56
	indexChunkSize = 8 + chunkPages*16
)

func (f fileIdentity) head(chunks int) []byte {
	b := append(make([]byte, 0, indexHead), indexMagic...)
	for _, v := range []uint64{indexVersion, uint64(f.size), uint64(f.mtime), uint64(f.ctime), f.ino, uint64(chunks)} {
		b = binary.BigEndian.AppendUint64(b, v)
	}
	return b
}

func writeBaseIndex(w io.Writer, of fileIdentity, x *BaseIndex) error {
	var h xxh3.Hasher128
	both := io.MultiWriter(w, &h)
	chunks := 0
	for i := range x.pages.chunks {
		if x.pages.chunks[i].Load() != nil {
			chunks++
		}
	}
	if _, err := both.Write(of.head(chunks)); err != nil {
		return err
	}
	b := make([]byte, indexChunkSize)
	for i := range x.pages.chunks {
		if x.pages.chunks[i].Load() == nil {
			continue
		}
		clear(b)
		binary.BigEndian.PutUint64(b, uint64(i))
		for j := range int64(chunkPages) {
			if e := x.pages.term(int64(i)*chunkPages + j); e != nil {
				binary.BigEndian.PutUint64(b[8+16*j:], e.hi.Load())
				binary.BigEndian.PutUint64(b[16+16*j:], e.lo.Load())
			}
		}
		if _, err := both.Write(b); err != nil {
			return err
		}
	}
	sum := h.Sum128().Bytes()
	_, err := w.Write(sum[:])
	return err
}

// readBaseIndex reads the index of a base in the given state. It takes no more memory than that index can need.
func readBaseIndex(r io.Reader, of fileIdentity) (*BaseIndex, error) {
	var h xxh3.Hasher128
	both := io.TeeReader(r, &h)
	b := make([]byte, indexChunkSize)
	if _, err := io.ReadFull(both, b[:indexHead]); err != nil {
		return nil, fmt.Errorf("read head: %w", err)
	}
	chunks := binary.BigEndian.Uint64(b[indexHead-8:])
	d := newDigest(of.size)
	if chunks > uint64(len(d.chunks)) || !bytes.Equal(b[:indexHead], of.head(int(chunks))) {
		return nil, errors.New("it is of another file, of another state of it, or of another version")
	}
	var sum termSum
	next := uint64(0)
	for range chunks {
		if _, err := io.ReadFull(both, b); err != nil {
			return nil, fmt.Errorf("read hashes: %w", err)
		}
		i := binary.BigEndian.Uint64(b)
		if i < next || i >= uint64(len(d.chunks)) {
			return nil, fmt.Errorf("chunk %d of %d, at least %d was due", i, len(d.chunks), next)
		}
		next = i + 1
		for j := range int64(chunkPages) {
			term := xxh3.Uint128{Hi: binary.BigEndian.Uint64(b[8+16*j:]), Lo: binary.BigEndian.Uint64(b[16+16*j:])}
			if term == (xxh3.Uint128{}) {
				continue
			}
			e := d.grow(int64(i)*chunkPages + j)
			e.hi.Store(term.Hi)
			e.lo.Store(term.Lo)
			sum.replace(xxh3.Uint128{}, term)
		}
	}
	want := h.Sum128().Bytes()
	var got [17]byte // one more than there may be
	if n, err := io.ReadFull(r, got[:]); n != 16 || !errors.Is(err, io.ErrUnexpectedEOF) {
		return nil, fmt.Errorf("its end is %d bytes: %w", n, err)
	}
	if [16]byte(got[:16]) != want {
		return nil, errors.New("its checksum is wrong")
	}
	d.add(sum)
	return newBaseIndex(d), nil
}

func loadBaseIndex(path string, of fileIdentity) (*BaseIndex, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	x, err := readBaseIndex(bufio.NewReaderSize(f, 256<<10), of)
	return x, errors.Join(err, f.Close())
}

// saveBaseIndex puts an index in its place as a whole. It need not be durable: half of it is noticed.
func saveBaseIndex(path string, of fileIdentity, x *BaseIndex) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-*")
	if err != nil {
		return err
	}
	w := bufio.NewWriterSize(f, 256<<10)
	err = errors.Join(writeBaseIndex(w, of, x), w.Flush(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return nil
}

// clone returns a digest of the same contents that can be changed by itself. Nobody may write to d meanwhile.
func (d *digest) clone() *digest {
	c := newDigest(d.size)
	for i := range d.chunks {
		if d.chunks[i].Load() == nil {
			continue
		}
		for page := int64(i) * chunkPages; page < int64(i+1)*chunkPages; page++ {
			if from := d.term(page); from != nil {
				to := c.grow(page)
				to.hi.Store(from.hi.Load())
				to.lo.Store(from.lo.Load())
			}
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	c.terms = d.terms
	return c
}
