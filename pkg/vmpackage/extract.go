package vmpackage

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/klauspost/compress/zstd"
)

// maxWindow bounds the memory that decompressing takes. Archives of this package need 4 to 8 MiB; 128 MiB allow those
// that were recompressed with zstd's --long.
const maxWindow = 128 << 20

// ExtractOptions is how to extract or verify. The zero value is good.
type ExtractOptions struct {
	// Concurrency is how many cores may be used; 0: all.
	Concurrency int

	// Progress, if set, is told how far the work is, often, from one goroutine at a time.
	Progress func(Progress)
}

// Extraction is what [Extract] did.
type Extraction struct {
	Manifest *Manifest // of the archive
	// Ignored are the devices of the archive that were not asked for.
	Ignored []string
}

// Extract writes devices of the archive to the paths given, in whatever order, and nothing else; existing files are
// replaced and missing folders made. Zero blocks become holes. Each device written is verified by its digest, and only
// when all are, and synced, the files get their names; then an error can only come from renaming, which leaves the files
// that were renamed before.
func Extract(ctx context.Context, archive string, devices []File, opts ExtractOptions) (*Extraction, error) {
	result, err := extract(ctx, archive, devices, opts)
	if err != nil {
		return nil, fmt.Errorf("extract %q: %w", archive, err)
	}
	return result, nil
}

func extract(ctx context.Context, archive string, devices []File, opts ExtractOptions) (_ *Extraction, err error) {
	if err := checkOutputs(devices); err != nil {
		return nil, err
	}
	r, err := openArchive(ctx, archive, opts.Concurrency)
	if err != nil {
		return nil, err
	}
	defer r.close()

	var total int64
	for _, d := range devices {
		known, ok := r.manifest.Device(d.Name)
		if !ok {
			return nil, fmt.Errorf("it has no device %q, only: %s", d.Name, strings.Join(r.manifest.Names(), ", "))
		}
		total += known.Size
	}
	meter := newMeter(opts.Progress, StageExtract, total)

	outputs := map[string]*tempFile{}
	var dirs []string
	defer func() {
		for _, out := range outputs {
			out.discard()
		}
		if err != nil {
			removeDirs(dirs)
		}
	}()
	for _, d := range devices {
		made, err := makeDirs(filepath.Dir(d.Path))
		dirs = append(dirs, made...)
		if err != nil {
			return nil, fmt.Errorf("device %q: %w", d.Name, err)
		}
		if stat, err := os.Stat(d.Path); err == nil && os.SameFile(stat, r.stat) {
			return nil, fmt.Errorf("device %q would replace the archive", d.Name)
		}
		out, err := createTemp(d.Path)
		if err != nil {
			return nil, fmt.Errorf("device %q: %w", d.Name, err)
		}
		outputs[d.Name] = out
	}

	result := &Extraction{Manifest: r.manifest}
	err = r.each(func(d Device, content io.Reader) error {
		out, ok := outputs[d.Name]
		if !ok {
			result.Ignored = append(result.Ignored, d.Name)
			return nil
		}
		if err := out.Truncate(d.Size); err != nil {
			return err
		}
		if err := verify(ctx, d, content, out.File, meter.add); err != nil {
			return err
		}
		return out.sync()
	})
	if err != nil {
		return nil, err
	}
	for _, d := range devices {
		if err := outputs[d.Name].rename(); err != nil {
			return nil, fmt.Errorf("device %q: %w", d.Name, err)
		}
	}
	return result, syncParents(devices, dirs)
}

// checkOutputs checks what can be checked without the archive.
func checkOutputs(devices []File) error {
	if len(devices) == 0 {
		return fmt.Errorf("no devices were given")
	}
	names, paths := map[string]bool{}, map[string]string{}
	for _, d := range devices {
		if err := CheckName(d.Name); err != nil {
			return err
		}
		if names[d.Name] {
			return fmt.Errorf("device %q is given twice", d.Name)
		}
		names[d.Name] = true
		if d.Path == "" {
			return fmt.Errorf("device %q has no path", d.Name)
		}
		path, err := filepath.Abs(d.Path)
		if err != nil {
			return fmt.Errorf("device %q: %w", d.Name, err)
		}
		if other, ok := paths[path]; ok {
			return fmt.Errorf("devices %q and %q have the same path %q", other, d.Name, d.Path)
		}
		paths[path] = d.Name
	}
	return nil
}

// archiveReader reads an archive once, from its start to its end.
type archiveReader struct {
	file     *os.File
	stat     os.FileInfo
	zstd     *zstd.Decoder
	stream   io.Reader // the decompressed archive, which tar reads
	tar      *tar.Reader
	manifest *Manifest
}

// openArchive opens an archive and reads its manifest. Reading fails when ctx is cancelled. The caller closes it.
func openArchive(ctx context.Context, path string, cores int) (_ *archiveReader, err error) {
	stat, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !stat.Mode().IsRegular() {
		return nil, fmt.Errorf("it is not a regular file: %w", ErrNotPackage)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	r, err := readArchive(ctx, f, cores)
	if err != nil {
		return nil, err
	}
	r.file, r.stat = f, stat
	return r, nil
}

// readArchive is openArchive for any stream.
func readArchive(ctx context.Context, stream io.Reader, cores int) (*archiveReader, error) {
	buffered := bufio.NewReaderSize(ctxReader{ctx, stream}, chunkSize)
	magic, err := buffered.Peek(4)
	if err != nil && err != io.EOF {
		return nil, err
	}
	if !bytes.Equal(magic, []byte{0x28, 0xb5, 0x2f, 0xfd}) { // RFC 8878, 3.1.1
		return nil, fmt.Errorf("it is not compressed by zstd: %w", ErrNotPackage)
	}
	decoder, err := zstd.NewReader(buffered, zstd.WithDecoderConcurrency(concurrency(cores)),
		zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderMaxMemory(1<<62))
	if err != nil {
		return nil, err
	}
	// Both ends look at ctx: little input can decompress to much that is only skipped.
	r, err := readTar(ctxReader{ctx, decoder})
	if err != nil {
		decoder.Close()
		return nil, err
	}
	r.zstd = decoder
	return r, nil
}

// readTar is readArchive behind the decompressor.
func readTar(stream io.Reader) (*archiveReader, error) {
	r := &archiveReader{stream: stream, tar: tar.NewReader(stream)}
	var err error
	r.manifest, err = r.readManifest()
	return r, err
}

func (r *archiveReader) readManifest() (*Manifest, error) {
	h, err := r.tar.Next()
	switch {
	case errors.Is(err, tar.ErrHeader) || err == io.EOF:
		return nil, fmt.Errorf("it is not a tar archive: %w", ErrNotPackage)
	case err != nil:
		return nil, damaged(err)
	case h.Name != ManifestFile || h.Typeflag != tar.TypeReg:
		return nil, fmt.Errorf("its first entry is %q, not %s: %w", h.Name, ManifestFile, ErrNotPackage)
	case h.Size > maxManifestSize:
		return nil, fmt.Errorf("%s has %d bytes, more than %d: %w", ManifestFile, h.Size, maxManifestSize, ErrCorrupt)
	}
	b, err := io.ReadAll(r.tar)
	if err != nil {
		return nil, damaged(err)
	}
	m, err := decodeManifest(b)
	if err != nil {
		return nil, err
	}
	for _, d := range m.Devices {
		if d.SHA256 == "" {
			return nil, fmt.Errorf("%s: device %q has no sha256: %w", ManifestFile, d.Name, ErrCorrupt)
		}
	}
	return m, nil
}

// each calls visit for every device, in the order of the archive, and fails unless the archive holds exactly the devices
// of its manifest. visit need not read the content.
func (r *archiveReader) each(visit func(d Device, content io.Reader) error) error {
	seen := map[string]bool{}
	for {
		h, err := r.tar.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return damaged(err)
		}
		i := slices.IndexFunc(r.manifest.Devices, func(d Device) bool { return d.File == h.Name })
		if i < 0 {
			return fmt.Errorf("entry %q is not in the manifest: %w", h.Name, ErrCorrupt)
		}
		d := r.manifest.Devices[i]
		if seen[d.Name] {
			return fmt.Errorf("device %q is there twice: %w", d.Name, ErrCorrupt)
		}
		seen[d.Name] = true
		if h.Typeflag != tar.TypeReg {
			return fmt.Errorf("device %q is not a regular file: %w", d.Name, ErrCorrupt)
		}
		if h.Size != d.Size {
			return fmt.Errorf("device %q has %d bytes, %d in the manifest: %w", d.Name, h.Size, d.Size, ErrCorrupt)
		}
		if err := visit(d, r.tar); err != nil {
			return fmt.Errorf("device %q: %w", d.Name, err)
		}
	}
	for _, d := range r.manifest.Devices {
		if !seen[d.Name] {
			return fmt.Errorf("it ends before device %q: %w", d.Name, ErrCorrupt)
		}
	}
	// Behind the end there may be padding, as other programs write it, but no more than a little.
	padding, err := io.ReadAll(io.LimitReader(r.stream, chunkSize))
	if err != nil {
		return damaged(err)
	}
	if len(padding) == chunkSize || !bytes.Equal(padding, zeros[:len(padding)]) {
		return fmt.Errorf("it goes on after its end: %w", ErrCorrupt)
	}
	return nil
}

func (r *archiveReader) close() {
	r.zstd.Close()
	r.file.Close() // only read
}

// damaged says what the errors of the decompressor and of tar mean. Errors of the operating system and of the context
// are left as they are.
func damaged(err error) error {
	var path *os.PathError
	switch {
	case errors.As(err, &path) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded):
		return err
	case errors.Is(err, io.ErrUnexpectedEOF):
		return fmt.Errorf("it is cut short: %w", ErrCorrupt)
	default:
		return fmt.Errorf("%v: %w", err, ErrCorrupt)
	}
}

// verify reads the content of d and compares it with the manifest. If out is set, it writes the blocks that are not zero
// to it.
func verify(ctx context.Context, d Device, content io.Reader, out io.WriterAt, progress func(int64)) error {
	sum := startDigest()
	defer sum.stop()
	var data int64
	for off := int64(0); off < d.Size; {
		if err := ctx.Err(); err != nil {
			return err
		}
		buf := sum.buffer()
		n := int(min(d.Size-off, chunkSize))
		if _, err := io.ReadFull(content, buf[:n]); err != nil {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return damaged(err)
		}
		sum.data(buf, n)
		for e := range dataExtents(buf[:n], off) {
			data += e.length
			if out == nil {
				continue
			}
			if _, err := out.WriteAt(buf[e.offset-off:][:e.length], e.offset); err != nil {
				return err
			}
		}
		off += int64(n)
		progress(int64(n))
	}
	if got := sum.sum(); got != d.SHA256 {
		return fmt.Errorf("sha256 is %s, %s in the manifest: %w", got, d.SHA256, ErrCorrupt)
	}
	if data != d.DataBytes {
		return fmt.Errorf("%d bytes are data, %d in the manifest: %w", data, d.DataBytes, ErrCorrupt)
	}
	return nil
}

// ctxReader fails reads once ctx is cancelled.
type ctxReader struct {
	ctx context.Context
	io.Reader
}

func (r ctxReader) Read(b []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.Reader.Read(b)
}

// makeDirs makes a folder and the missing ones above it, and returns those it made, outermost first.
func makeDirs(dir string) (made []string, err error) {
	var missing []string
	for d := filepath.Clean(dir); ; d = filepath.Dir(d) {
		if _, err := os.Stat(d); err == nil {
			break
		} else if !errors.Is(err, os.ErrNotExist) || d == filepath.Dir(d) {
			return nil, err
		}
		missing = append(missing, d)
	}
	slices.Reverse(missing)
	for _, d := range missing {
		if err := os.Mkdir(d, 0o755); err != nil {
			return made, err
		}
		made = append(made, d)
	}
	return made, nil
}

// removeDirs undoes makeDirs. A folder that somebody else has put something in stays.
func removeDirs(made []string) {
	for _, d := range slices.Backward(made) {
		os.Remove(d)
	}
}

// syncParents makes the names of the devices' files, and of folders that were made, durable.
func syncParents(devices []File, made []string) error {
	dirs := map[string]bool{}
	for _, d := range devices {
		dirs[filepath.Dir(d.Path)] = true
	}
	for _, d := range made {
		dirs[filepath.Dir(d)] = true
	}
	var errs []error
	for d := range dirs {
		errs = append(errs, syncDir(d))
	}
	return errors.Join(errs...)
}
