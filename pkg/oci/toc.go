package oci

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/stargz-snapshotter/estargz"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"github.com/drafter-vm/drafter/pkg/filetree"
)

// Annotations of a layer whose files can be fetched one by one: eStargz (https://github.com/containerd/stargz-snapshotter, docs/estargz.md), and
// zstd:chunked, as podman and as that project write it (https://github.com/containers/storage, docs/containers-storage-zstd-chunked.md).
const tocAnnotation = estargz.TOCJSONDigestAnnotation

var zstdAnnotations = []string{"io.github.containers.zstd-chunked.", "io.containers.zstd-chunked."}

const (
	maxTOC   = 256 << 20 // bytes of a table of contents
	maxItems = 3_000_000 // files and chunks in it
	maxChunk = 64 << 20  // bytes of one chunk of a file
	tocName  = "stargz.index.json"
)

// tocEntry is an entry of a table of contents. The two formats have it in common, but for the last field.
type tocEntry struct {
	estargz.TOCEntry
	ChunkType string `json:"chunkType"` // "zeros": it is not in the layer

	lazy *lazyFile // of a file
}

// chunk is a part of a file that is fetched as one.
type chunk struct {
	file   *lazyFile
	layer  *lazyLayer
	off    int64 // in the file
	size   int64
	digest [sha256.Size]byte

	from, to int64 // in the layer: a compressed stream begins at from, and what is needed of it ends before to
	skip     int64 // bytes of the stream before the chunk

	state chunkState // guarded by the disk's mutex
	done  *arrival   // of a chunk that is on its way; guarded by the disk's mutex
}

// lazyFile is a file whose content is in a layer of a registry.
type lazyFile struct {
	size   int64
	chunks []*chunk // in their order
	blocks []extent // where it is on the disk
}

// lazyLayer is a layer that is not fetched as a whole.
type lazyLayer struct {
	digest string
	size   int64
	gzip   bool     // else zstd
	chunks []*chunk // that are to be fetched, by where they are in the layer
}

// openTOC reads the table of contents of a layer. Without one it returns none.
func (i *Image) openTOC(ctx context.Context, d v1.Descriptor) (*lazyLayer, []tocEntry, error) {
	l := &lazyLayer{digest: d.Digest.String(), size: d.Size, gzip: true}
	var (
		entries []tocEntry
		end     int64 // of the files' contents in the layer
	)
	if prefix := zstdPrefix(d.Annotations); prefix != "" {
		l.gzip = false // some have the other annotation, too
		want := d.Annotations[prefix+"manifest-checksum"]
		at, length, err := parsePosition(d.Annotations[prefix+"manifest-position"], d.Size)
		if err != nil {
			return nil, nil, err
		}
		packed, err := i.blobs.read(ctx, l.digest, at, length, nil)
		if err != nil {
			return nil, nil, err
		}
		if have := digestOf(packed); have != want {
			return nil, nil, fmt.Errorf("its table of contents is %s, not %s as the manifest says: it is corrupt", have, want)
		}
		z, err := zstd.NewReader(bytes.NewReader(packed), zstd.WithDecoderMaxMemory(maxTOC))
		if err != nil {
			return nil, nil, err
		}
		defer z.Close()
		text, err := readAll(z, maxTOC)
		if err != nil {
			return nil, nil, fmt.Errorf("read its table of contents: %w", err)
		}
		if entries, err = decodeTOC(text); err != nil {
			return nil, nil, err
		}
		end = at
	} else if want := d.Annotations[tocAnnotation]; want != "" {
		footer, err := i.blobs.read(ctx, l.digest, max(0, d.Size-estargz.FooterSize), min(d.Size, estargz.FooterSize), nil)
		if err != nil {
			return nil, nil, err
		}
		_, at, _, err := new(estargz.GzipDecompressor).ParseFooter(footer)
		if err != nil || at <= 0 || at > d.Size-estargz.FooterSize || d.Size-at > maxTOC {
			return nil, nil, fmt.Errorf("its footer is none of eStargz (%w)", errors.Join(err, errCorrupt))
		}
		packed, err := i.blobs.read(ctx, l.digest, at, d.Size-at-estargz.FooterSize, nil)
		if err != nil {
			return nil, nil, err
		}
		text, err := stargzIndex(packed)
		if err != nil {
			return nil, nil, fmt.Errorf("read its table of contents: %w", err)
		}
		if have := digestOf(text); have != want {
			return nil, nil, fmt.Errorf("its table of contents is %s, not %s as the manifest says: it is corrupt", have, want)
		}
		if entries, err = decodeTOC(text); err != nil {
			return nil, nil, err
		}
		end = at
	} else {
		return nil, nil, nil
	}
	return l, entries, l.place(entries, end)
}

func zstdPrefix(annotations map[string]string) string {
	for _, prefix := range zstdAnnotations {
		if annotations[prefix+"manifest-checksum"] != "" && annotations[prefix+"manifest-position"] != "" {
			return prefix
		}
	}
	return ""
}

// parsePosition reads offset:length:uncompressed length:type.
func parsePosition(s string, size int64) (at, length int64, err error) {
	fields := strings.Split(s, ":")
	if len(fields) >= 2 {
		at, _ = strconv.ParseInt(fields[0], 10, 64)
		length, _ = strconv.ParseInt(fields[1], 10, 64)
	}
	if at <= 0 || length <= 0 || length > maxTOC || at > size-length {
		return 0, 0, fmt.Errorf("its table of contents is at %q of %d bytes: %w", s, size, errCorrupt)
	}
	return at, length, nil
}

var errCorrupt = errors.New("it is corrupt")

// stargzIndex takes the index out of the archive at the end of an eStargz layer.
func stargzIndex(packed []byte) ([]byte, error) {
	z, err := gzip.NewReader(bytes.NewReader(packed))
	if err != nil {
		return nil, err
	}
	tr := tar.NewReader(io.LimitReader(z, maxTOC))
	h, err := tr.Next()
	if err != nil {
		return nil, err
	}
	if h.Name != tocName {
		return nil, fmt.Errorf("there is %q for %s: %w", h.Name, tocName, errCorrupt)
	}
	return readAll(tr, maxTOC)
}

func readAll(r io.Reader, limit int64) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err == nil && int64(len(data)) > limit {
		err = fmt.Errorf("it has more than %d bytes", limit)
	}
	return data, err
}

func decodeTOC(text []byte) ([]tocEntry, error) {
	if n := bytes.Count(text, []byte("{")); n > maxItems {
		return nil, fmt.Errorf("its table of contents has %d items, of which no more than %d are possible", n, maxItems)
	}
	var toc struct {
		Version int        `json:"version"`
		Entries []tocEntry `json:"entries"`
	}
	if err := json.Unmarshal(text, &toc); err != nil {
		return nil, fmt.Errorf("read its table of contents: %w", err)
	}
	if toc.Version != 1 {
		return nil, fmt.Errorf("its table of contents is of version %d, not 1", toc.Version)
	}
	return toc.Entries, nil
}

// place finds out where in the layer each chunk is.
func (l *lazyLayer) place(entries []tocEntry, end int64) error {
	offsets := []int64{end}
	for _, e := range entries {
		if e.Offset > 0 {
			offsets = append(offsets, e.Offset)
		}
	}
	slices.Sort(offsets)
	var file *lazyFile
	for n := range entries {
		e := &entries[n]
		if e.Type != "reg" && e.Type != "chunk" {
			file = nil
			continue
		}
		if e.Type == "reg" {
			file = &lazyFile{size: e.Size}
			e.lazy = file
			if e.Size == 0 {
				continue
			}
		}
		if file == nil {
			return fmt.Errorf("its table of contents has a chunk without a file: %w", errCorrupt)
		}
		size := e.ChunkSize
		if size == 0 {
			size = file.size - e.ChunkOffset
		}
		last := int64(0)
		if k := len(file.chunks); k > 0 {
			last = file.chunks[k-1].off + file.chunks[k-1].size
		}
		if e.ChunkOffset != last || size <= 0 || size > file.size-last || size > maxChunk {
			return fmt.Errorf("%q: its chunk at %d has %d bytes, the file %d: %w", e.Name, e.ChunkOffset, size, file.size, errCorrupt)
		}
		c := &chunk{file: file, layer: l, off: e.ChunkOffset, size: size, skip: e.InnerOffset}
		file.chunks = append(file.chunks, c)
		if e.ChunkType == "zeros" {
			c.state = chunkZeros
			continue
		}
		digest := e.ChunkDigest
		if digest == "" && size == file.size {
			digest = e.Digest
		}
		var err error
		if c.digest, err = parseDigest(digest); err != nil {
			return fmt.Errorf("%q: %w", e.Name, err)
		}
		k, _ := slices.BinarySearch(offsets, e.Offset+1)
		if e.Offset < 0 || k == len(offsets) || e.Offset >= end || e.InnerOffset < 0 || e.InnerOffset > maxChunk {
			return fmt.Errorf("%q: a chunk is at %d of %d bytes: %w", e.Name, e.Offset, end, errCorrupt)
		}
		c.from, c.to = e.Offset, offsets[k]
		if c.to-c.from > 2*maxChunk {
			return fmt.Errorf("%q: a chunk has %d bytes: %w", e.Name, c.to-c.from, errCorrupt)
		}
		l.chunks = append(l.chunks, c)
	}
	for n := range entries {
		if f := entries[n].lazy; f != nil && f.size > 0 {
			if k := len(f.chunks); k == 0 || f.chunks[k-1].off+f.chunks[k-1].size != f.size {
				return fmt.Errorf("%q: its chunks are not all of it: %w", entries[n].Name, errCorrupt)
			}
		}
	}
	slices.SortStableFunc(l.chunks, func(a, b *chunk) int { return int(min(1, max(-1, a.from-b.from))) })
	return nil
}

func parseDigest(s string) (d [sha256.Size]byte, err error) {
	h, err := v1.NewHash(s)
	if err != nil || h.Algorithm != "sha256" {
		return d, fmt.Errorf("a chunk has digest %q: %w", s, errCorrupt)
	}
	_, err = hex.Decode(d[:], []byte(h.Hex))
	return d, err
}

// header is an entry as tar has it.
func (e *tocEntry) header() (*tar.Header, error) {
	h := &tar.Header{Name: e.Name, Linkname: e.LinkName, Mode: e.Mode, Uid: e.UID, Gid: e.GID, Size: e.Size, Devmajor: int64(e.DevMajor), Devminor: int64(e.DevMinor)}
	for typ, name := range map[byte]string{
		tar.TypeReg: "reg", tar.TypeDir: "dir", tar.TypeSymlink: "symlink", tar.TypeLink: "hardlink", tar.TypeChar: "char", tar.TypeBlock: "block", tar.TypeFifo: "fifo",
	} {
		if name == e.Type {
			h.Typeflag = typ
		}
	}
	if h.Typeflag == 0 {
		return nil, fmt.Errorf("%q is of type %q: %w", e.Name, e.Type, errCorrupt)
	}
	if e.ModTime3339 != "" {
		t, err := time.Parse(time.RFC3339, e.ModTime3339)
		if err != nil {
			return nil, fmt.Errorf("%q is of %q: %w", e.Name, e.ModTime3339, errCorrupt)
		}
		h.ModTime = t
	}
	for name, value := range e.Xattrs {
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords[xattrRecord+name] = string(value)
	}
	return h, nil
}

// filled is content of which the disk is made as long as the real one is not there: anything but zeros, for which no blocks would be set aside.
type filled struct{}

func (filled) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = 0xff
	}
	return len(p), nil
}

func placeholder(size int64) filetree.Content {
	return filetree.Later(size, func() io.ReadCloser { return io.NopCloser(io.LimitReader(filled{}, size)) })
}
