package vmpackage

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"sync"

	"github.com/klauspost/compress/zstd"
	"github.com/zeebo/xxh3"
	"golang.org/x/sync/errgroup"
)

// File is where a device lies, or is to lie, on this host.
type File struct {
	Name string // of the device
	Path string // on this host
}

// Progress says how far a call is. A call may have several stages; each starts with Done 0 and, unless the call fails,
// ends with Done = Total.
type Progress struct {
	Stage Stage // what is done now
	Done  int64 // bytes
	Total int64 // bytes
}

// Stage is what is being done.
type Stage string

const (
	StageHash    Stage = "hash"    // devices are read and hashed
	StagePack    Stage = "pack"    // the data of devices is compressed and written
	StageExtract Stage = "extract" // devices are decompressed, verified and written
	StageVerify  Stage = "verify"  // devices are read and verified
)

// Level is how hard to compress. The zero value is LevelFastest.
type Level int

// Measured with 700 MB of programs and libraries, which LevelFastest shrinks to 35 %.
const (
	LevelFastest Level = iota
	LevelDefault       // 7 % smaller, in twice the time
	LevelBetter        // 11 % smaller, in 6 times the time
	LevelBest          // 18 % smaller, in 16 times the time: for packages that are shipped often
)

var levels = []struct {
	name  string
	level zstd.EncoderLevel
}{
	LevelFastest: {"fastest", zstd.SpeedFastest},
	LevelDefault: {"default", zstd.SpeedDefault},
	LevelBetter:  {"better", zstd.SpeedBetterCompression},
	LevelBest:    {"best", zstd.SpeedBestCompression},
}

func (l Level) String() string {
	if l < 0 || int(l) >= len(levels) {
		return fmt.Sprintf("Level(%d)", int(l))
	}
	return levels[l].name
}

// ParseLevel is the inverse of [Level.String].
func ParseLevel(s string) (Level, error) {
	for l, known := range levels {
		if known.name == s {
			return Level(l), nil
		}
	}
	return 0, fmt.Errorf("compression level %q is unknown; use fastest, default, better or best", s)
}

// PackOptions is how to pack. The zero value is good.
type PackOptions struct {
	Level Level // of zstd; 0 means its default

	// Concurrency is how many cores may be used; 0: all. The result does not depend on it.
	Concurrency int

	// Progress, if set, is told how far the work is, often, from one goroutine at a time.
	Progress func(Progress)
}

// Pack writes the devices to an archive at path, which it replaces if it exists, and returns its manifest. The devices
// may be given in any order and under any file name. A device called "config" must hold a machine configuration, which
// becomes part of the manifest; then the disks it names must be among the devices.
//
// Devices are read twice and must not change meanwhile; if one does, Pack fails. They are not modified.
func Pack(ctx context.Context, path string, devices []File, opts PackOptions) (*Manifest, error) {
	manifest, err := pack(ctx, path, devices, opts)
	if err != nil {
		return nil, fmt.Errorf("pack %q: %w", path, err)
	}
	return manifest, nil
}

func pack(ctx context.Context, path string, devices []File, opts PackOptions) (*Manifest, error) {
	if opts.Level < 0 || int(opts.Level) >= len(levels) {
		return nil, fmt.Errorf("compression level %d is unknown", opts.Level)
	}
	inputs, err := openInputs(devices)
	if err != nil {
		return nil, err
	}
	defer closeInputs(inputs)
	if archive, err := os.Stat(path); err == nil {
		for _, in := range inputs {
			if stat, err := in.file.Stat(); err == nil && os.SameFile(stat, archive) {
				return nil, fmt.Errorf("the archive would replace device %q", in.Name)
			}
		}
	}
	manifest, err := describe(ctx, inputs, opts.Concurrency, true, opts.Progress)
	if err != nil {
		return nil, err
	}
	header, err := manifest.encode()
	if err != nil {
		return nil, err
	}

	var data int64
	for _, in := range inputs {
		for _, e := range in.content.extents {
			data += e.length
		}
	}
	meter := newMeter(opts.Progress, StagePack, data)

	out, err := createTemp(path)
	if err != nil {
		return nil, err
	}
	defer out.discard()
	buffered := bufio.NewWriterSize(out.File, chunkSize)
	// At least 2, because with one the compressor cuts the stream differently and the archive would depend on the
	// number of cores.
	compressed, err := zstd.NewWriter(buffered, zstd.WithEncoderLevel(levels[opts.Level].level),
		zstd.WithEncoderConcurrency(max(2, concurrency(opts.Concurrency))), zstd.WithConcurrentBlocks(true))
	if err != nil {
		return nil, err
	}
	// Ends the compressor's goroutines on every path; after a successful Close it does nothing.
	defer compressed.Close()

	tw := tarWriter{compressed}
	if err := tw.file(ManifestFile, int64(len(header))); err != nil {
		return nil, err
	}
	if _, err := compressed.Write(header); err != nil {
		return nil, err
	}
	if err := tw.pad(int64(len(header))); err != nil {
		return nil, err
	}
	for _, d := range manifest.Devices {
		if err := packDevice(ctx, tw, d, inputs[d.Name], meter.add); err != nil {
			return nil, fmt.Errorf("device %q: %w", d.Name, err)
		}
	}
	if err := tw.end(); err != nil {
		return nil, err
	}
	if err := compressed.Close(); err != nil {
		return nil, err
	}
	if err := buffered.Flush(); err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	return manifest, out.commit()
}

func packDevice(ctx context.Context, tw tarWriter, d Device, in *input, progress func(int64)) error {
	extents := fitExtents(d.Size, in.content.extents)
	stored := int64(0)
	for _, e := range extents {
		stored += e.length
	}
	header := func() error { return tw.sparseFile(d.File, d.Size, extents) }
	if stored == d.Size {
		header = func() error { return tw.file(d.File, d.Size) }
	}
	if err := header(); err != nil {
		return err
	}

	quick := xxh3.New()
	buf := make([]byte, chunkSize)
	for _, e := range extents {
		for off, end := e.offset, e.offset+e.length; off < end; {
			if err := ctx.Err(); err != nil {
				return err
			}
			b := buf[:min(end-off, chunkSize)]
			if err := readFull(in.file, b, off); err != nil {
				return err
			}
			// Extents that were merged across holes contain zeros, which the first reading did not hash.
			data := int64(0)
			for found := range dataExtents(b, off) {
				quick.Write(b[found.offset-off:][:found.length])
				data += found.length
			}
			if _, err := tw.w.Write(b); err != nil {
				return err
			}
			off += int64(len(b))
			progress(data)
		}
	}
	if quick.Sum64() != in.content.xxh3 {
		return fmt.Errorf("%q changed while it was packed; suspend the VM that uses it", in.Path)
	}
	return tw.pad(stored)
}

// input is a device that is read.
type input struct {
	File
	file    *os.File
	size    int64
	content content
}

// openInputs opens the devices, whose names and paths it checks. The caller closes them.
func openInputs(devices []File) (_ map[string]*input, err error) {
	inputs := make(map[string]*input, len(devices))
	defer func() {
		if err != nil {
			closeInputs(inputs)
		}
	}()
	if len(devices) == 0 {
		return nil, fmt.Errorf("no devices were given")
	}
	for _, d := range devices {
		if err := CheckName(d.Name); err != nil {
			return nil, err
		}
		if _, ok := inputs[d.Name]; ok {
			return nil, fmt.Errorf("device %q is given twice", d.Name)
		}
		in, err := openInput(d)
		if err != nil {
			return nil, fmt.Errorf("device %q: %w", d.Name, err)
		}
		inputs[d.Name] = in
	}
	return inputs, nil
}

func openInput(d File) (*input, error) {
	// Looked at before it is opened: opening a pipe would wait for its other end.
	stat, err := os.Stat(d.Path)
	if err != nil {
		return nil, err
	}
	if !stat.Mode().IsRegular() {
		return nil, fmt.Errorf("%q is not a regular file", d.Path)
	}
	if stat.Size() == 0 {
		return nil, fmt.Errorf("%q is empty", d.Path)
	}
	if stat.Size() > maxDeviceSize {
		return nil, fmt.Errorf("%q has %d bytes, more than %d", d.Path, stat.Size(), int64(maxDeviceSize))
	}
	f, err := os.Open(d.Path)
	if err != nil {
		return nil, err
	}
	return &input{File: d, file: f, size: stat.Size()}, nil
}

func closeInputs(inputs map[string]*input) {
	for _, in := range inputs {
		in.file.Close() // only read
	}
}

// describe makes the manifest of inputs, for an archive: files have their default names. It scans the inputs, if digests
// is set, several at once.
func describe(ctx context.Context, inputs map[string]*input, cores int, digests bool, progress func(Progress)) (*Manifest, error) {
	machine, err := inputConfig(inputs)
	if err != nil {
		return nil, err
	}
	var list []Device
	var total int64
	for _, in := range inputs {
		list = append(list, Device{Name: in.Name, File: DefaultFile(in.Name), Size: in.size})
		total += in.size
	}
	// Checked before the long part, with devices that have no digests yet.
	manifest, err := newManifest(machine, list)
	if err != nil || !digests {
		return manifest, err
	}

	meter := newMeter(progress, StageHash, total)
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(concurrency(cores))
	for i := range manifest.Devices {
		d := &manifest.Devices[i]
		in := inputs[d.Name]
		group.Go(func() error {
			var err error
			if in.content, err = scan(ctx, in.file, in.size, meter.add); err != nil {
				return fmt.Errorf("device %q: %w", in.Name, err)
			}
			d.SHA256, d.DataBytes = in.content.sha256, in.content.data
			return nil
		})
	}
	return manifest, group.Wait()
}

// inputConfig reads the machine configuration, or returns nil if there is no config device.
func inputConfig(inputs map[string]*input) ([]byte, error) {
	in, ok := inputs[Config]
	if !ok {
		return nil, nil
	}
	content, err := io.ReadAll(io.NewSectionReader(in.file, 0, min(in.size, maxConfigSize+1)))
	if err != nil {
		return nil, fmt.Errorf("device %q: %w", Config, err)
	}
	raw, err := DecodeConfig(content)
	if err != nil {
		return nil, fmt.Errorf("device %q: %w", Config, err)
	}
	return raw, nil
}

func concurrency(n int) int {
	if n <= 0 {
		return runtime.GOMAXPROCS(0)
	}
	return n
}

// meter adds up progress of several goroutines and reports it in order.
type meter struct {
	report func(Progress) // nil: nobody listens

	mu    sync.Mutex // guards state and the order of reports
	state Progress
}

func newMeter(report func(Progress), stage Stage, total int64) *meter {
	m := &meter{report: report, state: Progress{Stage: stage, Total: total}}
	m.add(0)
	return m
}

func (m *meter) add(n int64) {
	if m.report == nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.state.Done += n
	m.report(m.state)
}

// tempFile is a file that has no name of its own until commit.
type tempFile struct {
	*os.File
	path string // to be
	done bool
}

// createTemp creates a file, mode 0600, in the folder of path.
func createTemp(path string) (*tempFile, error) {
	if stat, err := os.Lstat(path); err == nil && !stat.Mode().IsRegular() {
		return nil, fmt.Errorf("%q exists and is not a regular file; it will not be replaced", path)
	}
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*.tmp")
	if err != nil {
		return nil, err
	}
	return &tempFile{File: f, path: path}, nil
}

// commit makes the content durable and gives the file its name.
func (t *tempFile) commit() error {
	if err := t.sync(); err != nil {
		return err
	}
	return errors.Join(t.rename(), syncDir(filepath.Dir(t.path)))
}

// sync makes the content durable and closes the file.
func (t *tempFile) sync() error {
	return errors.Join(t.Sync(), t.Close())
}

// rename gives a synced file its name. The folder is to be synced afterwards.
func (t *tempFile) rename() error {
	if err := os.Rename(t.Name(), t.path); err != nil {
		return err
	}
	t.done = true
	return nil
}

// discard removes the file, unless it has got its name.
func (t *tempFile) discard() {
	if !t.done {
		t.Close() // again, perhaps: what matters is that it is closed
		os.Remove(t.Name())
	}
}

// syncDir makes renames in a folder durable.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
