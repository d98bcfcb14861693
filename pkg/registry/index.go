package registry

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"sort"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"

	"github.com/drafter-vm/drafter/pkg/block"
)

// Bounds of the format. What goes beyond them is refused before anything is made of it.
const (
	leastChunkSize = 64 << 10
	maxChunkSize   = 1 << 20
	manyChunks     = 1 << 21 // beyond which chunks are larger
	maxDeviceSize  = 1 << 46
	maxPackSize    = 2 << 30      // of the blob, bytes
	maxIndex       = 128 << 20    // bytes, decompressed
	maxIndexes     = 4 * maxIndex // of all devices together
	frameOverhead  = 1 << 10      // a frame of what cannot be compressed is not longer than that, and the content
)

// ErrCorrupt is wrapped when what a registry holds is not what its name says, or is no package.
var ErrCorrupt = errors.New("what the registry holds is corrupt")

// chunkSize is how many bytes the chunks of a device have: 64 KiB, or more where there could be more than 2^21 of them.
func chunkSize(device int64) int64 {
	n := int64(leastChunkSize)
	for (device+n-1)/n > manyChunks && n < maxChunkSize {
		n *= 2
	}
	return n
}

// index says where the content of a device is. Encoded, before it is compressed as one frame of zstd, it is, big-endian:
//
//	0   8  "DRAFTIDX"
//	8   4  version, 1
//	12  4  bytes of a chunk: a power of two from 4 KiB to 1 MiB
//	16  8  bytes of the device
//	24 32  SHA-256 of the device
//	56  4  number of packs, of chunks, and of runs: 4 each
//	68     packs: 32 SHA-256 of the blob, 8 bytes of it
//	       chunks: 4 number of the pack, 4 offset of the frame in it, 4 bytes of the frame, 32 SHA-256 of the content
//	       runs: 4 how many chunks of the device, 4 what they are: 0 zeros; else, counted from 1, the first of as many chunks in a row
//
// The last chunk of a device is filled up with zeros. There is nothing behind.
type index struct {
	chunkSize int64
	size      int64
	sum       [sha256.Size]byte
	packs     []packRef
	chunks    []chunkRef
	runs      []run
	starts    []int64 // of each run, the place of its first chunk in the device; nil until seal
}

type packRef struct {
	digest digest.Digest
	size   int64
}

type chunkRef struct {
	pack           uint32
	offset, length uint32
	sum            [sha256.Size]byte
}

// run is some chunks of a device in a row.
type run struct {
	count uint32
	first uint32 // 0: zeros; else the place in chunks, plus 1, of the first of count
}

const (
	indexMagic   = "DRAFTIDX"
	indexVersion = 1
	indexHead    = 68
	packBytes    = sha256.Size + 8
	chunkBytes   = 12 + sha256.Size
	runBytes     = 8
)

// places is how many chunks the device has.
func (x *index) places() int64 { return (x.size + x.chunkSize - 1) / x.chunkSize }

// append says what the next chunk of the device is: nil for zeros.
func (x *index) append(chunk *uint32) {
	first := uint32(0)
	if chunk != nil {
		first = *chunk + 1
	}
	if n := len(x.runs); n > 0 {
		last := &x.runs[n-1]
		if first == 0 && last.first == 0 || first != 0 && last.first != 0 && first == last.first+last.count {
			last.count++
			return
		}
	}
	x.runs = append(x.runs, run{1, first})
}

// seal makes the index ready for at, and reports what is wrong with it.
func (x *index) seal() error {
	if x.chunkSize < block.PageSize || x.chunkSize > maxChunkSize || x.chunkSize&(x.chunkSize-1) != 0 {
		return fmt.Errorf("chunks of %d bytes", x.chunkSize)
	}
	if x.size <= 0 || x.size > maxDeviceSize {
		return fmt.Errorf("a device of %d bytes", x.size)
	}
	for _, p := range x.packs {
		if p.size <= 0 || p.size > maxPackSize {
			return fmt.Errorf("a pack of %d bytes", p.size)
		}
	}
	for n, c := range x.chunks {
		if int64(c.pack) >= int64(len(x.packs)) {
			return fmt.Errorf("chunk %d is in pack %d of %d", n, c.pack, len(x.packs))
		}
		if c.length == 0 || int64(c.length) > x.chunkSize+frameOverhead || int64(c.offset)+int64(c.length) > x.packs[c.pack].size {
			return fmt.Errorf("chunk %d is %d bytes at %d of a pack of %d", n, c.length, c.offset, x.packs[c.pack].size)
		}
	}
	at := int64(0)
	x.starts = make([]int64, len(x.runs))
	for n, r := range x.runs {
		if r.count == 0 || r.first != 0 && int64(r.first)-1+int64(r.count) > int64(len(x.chunks)) {
			return fmt.Errorf("run %d is of %d chunks from %d, of %d", n, r.count, r.first, len(x.chunks))
		}
		x.starts[n] = at
		at += int64(r.count)
	}
	if at != x.places() {
		return fmt.Errorf("it says what %d chunks are, and the device has %d", at, x.places())
	}
	return nil
}

// runAt is the run that a chunk of the device is in, and how far.
func (x *index) runAt(place int64) (n int, within int64) {
	n = sort.Search(len(x.starts), func(i int) bool { return x.starts[i] > place }) - 1
	return n, place - x.starts[n]
}

// at is the chunk at a place of the device; false for zeros.
func (x *index) at(place int64) (chunk int, ok bool) {
	n, within := x.runAt(place)
	if x.runs[n].first == 0 {
		return 0, false
	}
	return int(int64(x.runs[n].first) - 1 + within), true
}

// bytes is how long the index is, before it is compressed.
func (x *index) bytes() int64 {
	return indexHead + packBytes*int64(len(x.packs)) + chunkBytes*int64(len(x.chunks)) + runBytes*int64(len(x.runs))
}

// encode returns the blob of a sealed index.
func (x *index) encode() ([]byte, error) {
	if n := x.bytes(); n > maxIndex {
		return nil, fmt.Errorf("its index would have %d bytes, more than %d", n, maxIndex)
	}
	b := make([]byte, 0, x.bytes())
	b = append(b, indexMagic...)
	b = binary.BigEndian.AppendUint32(b, indexVersion)
	b = binary.BigEndian.AppendUint32(b, uint32(x.chunkSize))
	b = binary.BigEndian.AppendUint64(b, uint64(x.size))
	b = append(b, x.sum[:]...)
	for _, n := range []int{len(x.packs), len(x.chunks), len(x.runs)} {
		b = binary.BigEndian.AppendUint32(b, uint32(n))
	}
	for _, p := range x.packs {
		b = append(b, sumOf(p.digest)...)
		b = binary.BigEndian.AppendUint64(b, uint64(p.size))
	}
	for _, c := range x.chunks {
		for _, n := range []uint32{c.pack, c.offset, c.length} {
			b = binary.BigEndian.AppendUint32(b, n)
		}
		b = append(b, c.sum[:]...)
	}
	for _, r := range x.runs {
		b = binary.BigEndian.AppendUint32(b, r.count)
		b = binary.BigEndian.AppendUint32(b, r.first)
	}
	return compressor().EncodeAll(b, nil), nil
}

// decodeIndex reads the blob of an index.
func decodeIndex(blob []byte) (*index, error) {
	b, err := decompress(blob, maxIndex)
	if err != nil {
		return nil, fmt.Errorf("decompress index: %w: %w", err, ErrCorrupt)
	}
	fail := func(format string, args ...any) (*index, error) {
		return nil, fmt.Errorf("decode index: %w: %w", fmt.Errorf(format, args...), ErrCorrupt)
	}
	if len(b) < indexHead || string(b[:8]) != indexMagic {
		return fail("it is none")
	}
	if v := binary.BigEndian.Uint32(b[8:]); v != indexVersion {
		return nil, fmt.Errorf("decode index: it has version %d, this program reads version %d: use a newer drafter", v, indexVersion)
	}
	x := &index{chunkSize: int64(binary.BigEndian.Uint32(b[12:])), size: int64(binary.BigEndian.Uint64(b[16:]))}
	copy(x.sum[:], b[24:])
	packs, chunks, runs := int64(binary.BigEndian.Uint32(b[56:])), int64(binary.BigEndian.Uint32(b[60:])), int64(binary.BigEndian.Uint32(b[64:]))
	if want := indexHead + packBytes*packs + chunkBytes*chunks + runBytes*runs; want != int64(len(b)) {
		return fail("it has %d bytes, and should have %d", len(b), want)
	}
	b = b[indexHead:]
	x.packs, x.chunks, x.runs = make([]packRef, packs), make([]chunkRef, chunks), make([]run, runs)
	for n := range x.packs {
		x.packs[n] = packRef{digest.NewDigestFromBytes(digest.SHA256, b[:sha256.Size]), int64(binary.BigEndian.Uint64(b[sha256.Size:]))}
		b = b[packBytes:]
	}
	for n := range x.chunks {
		c := &x.chunks[n]
		c.pack, c.offset, c.length = binary.BigEndian.Uint32(b), binary.BigEndian.Uint32(b[4:]), binary.BigEndian.Uint32(b[8:])
		copy(c.sum[:], b[12:])
		b = b[chunkBytes:]
	}
	for n := range x.runs {
		x.runs[n] = run{binary.BigEndian.Uint32(b), binary.BigEndian.Uint32(b[4:])}
		b = b[runBytes:]
	}
	if err := x.seal(); err != nil {
		return fail("%w", err)
	}
	return x, nil
}

// sumOf are the bytes of a digest that was checked.
func sumOf(d digest.Digest) []byte {
	var sum []byte
	if _, err := fmt.Sscanf(d.Encoded(), "%x", &sum); err != nil || len(sum) != sha256.Size {
		panic(fmt.Sprintf("digest %q is not checked", d))
	}
	return sum
}

// The seek table of the zstd seekable format: a frame that decoders skip, at the end of a pack, which says how long the others are.
const (
	skippableMagic = 0x184D2A5E
	seekableMagic  = 0x8F92EAB1
	seekableFooter = 9
)

// appendSeekTable appends the seek table of frames of some lengths, each of chunkSize bytes. Unlike what is ours it is little-endian.
func appendSeekTable(b []byte, lengths []uint32, chunkSize int64) []byte {
	b = binary.LittleEndian.AppendUint32(b, skippableMagic)
	b = binary.LittleEndian.AppendUint32(b, uint32(8*len(lengths)+seekableFooter))
	for _, n := range lengths {
		b = binary.LittleEndian.AppendUint32(b, n)
		b = binary.LittleEndian.AppendUint32(b, uint32(chunkSize))
	}
	b = binary.LittleEndian.AppendUint32(b, uint32(len(lengths)))
	b = append(b, 0) // without checksums
	return binary.LittleEndian.AppendUint32(b, seekableMagic)
}

// chunk checks and returns the content of a frame.
func (c chunkRef) content(frame []byte, chunkSize int64) ([]byte, error) {
	p, err := decompress(frame, chunkSize)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, ErrCorrupt)
	}
	if int64(len(p)) != chunkSize {
		return nil, fmt.Errorf("it has %d bytes, want %d: %w", len(p), chunkSize, ErrCorrupt)
	}
	if sum := sha256.Sum256(p); !bytes.Equal(sum[:], c.sum[:]) {
		return nil, fmt.Errorf("its SHA-256 is %x, want %x: %w", sum, c.sum, ErrCorrupt)
	}
	return p, nil
}

var errLarge = errors.New("it is larger than it may be")

// decompress is what a frame holds, if that is no more than most.
func decompress(frame []byte, most int64) ([]byte, error) {
	var h zstd.Header
	if err := h.Decode(frame); err != nil {
		return nil, err
	}
	if !h.HasFCS || h.FrameContentSize > uint64(most) || h.Skippable {
		return nil, errLarge
	}
	if n := int64(h.FrameContentSize); n > maxChunkSize && n > int64(len(frame))<<14 { // nobody gets much memory by claiming a size
		return nil, errLarge
	}
	p := make([]byte, 0, h.FrameContentSize) // which the decompressor does not go beyond
	p, err := decompressor().DecodeAll(frame, p)
	if err != nil {
		return nil, err
	}
	if uint64(len(p)) != h.FrameContentSize {
		return nil, errLarge
	}
	return p, nil
}
