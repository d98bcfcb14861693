package vmpackage

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sync/errgroup"
)

// Package is a package in a folder, whose devices can be used where they are.
type Package struct {
	Dir      string          // the folder
	Manifest *Manifest       // as it is in the folder
	Devices  []PackageDevice // in the order of the manifest
}

// PackageDevice is a device of a [Package].
type PackageDevice struct {
	Name string // of the device
	Path string // Dir joined with the name of the file
	Size int64  // bytes
}

// Device returns the device called name.
func (p *Package) Device(name string) (PackageDevice, bool) {
	for _, d := range p.Devices {
		if d.Name == name {
			return d, true
		}
	}
	return PackageDevice{}, false
}

// Open reads the manifest of the package in dir and finds its devices. It compares sizes but reads no content: a device
// that was written to since is noticed by [Verify] only.
func Open(dir string) (*Package, error) {
	p, err := open(dir)
	if err != nil {
		return nil, fmt.Errorf("open package %q: %w", dir, err)
	}
	return p, nil
}

func open(dir string) (*Package, error) {
	m, err := readFolderManifest(dir)
	if err != nil {
		return nil, err
	}
	p := &Package{Dir: dir, Manifest: m}
	for _, d := range m.Devices {
		path := filepath.Join(dir, d.File)
		stat, err := os.Stat(path)
		if err != nil {
			return nil, fmt.Errorf("device %q: %w", d.Name, err)
		}
		if !stat.Mode().IsRegular() {
			return nil, fmt.Errorf("device %q: %q is not a regular file", d.Name, path)
		}
		if stat.Size() != d.Size {
			return nil, fmt.Errorf("device %q: %q has %d bytes, %d in the manifest: %w", d.Name, path, stat.Size(), d.Size, ErrCorrupt)
		}
		p.Devices = append(p.Devices, PackageDevice{Name: d.Name, Path: path, Size: d.Size})
	}
	return p, nil
}

// ManifestOptions is how to write a manifest. The zero value is good.
type ManifestOptions struct {
	// SkipDigests leaves the digests of the devices out, and with them the reading of the devices. Such a package can be
	// opened and packed, but not verified.
	SkipDigests bool

	// Concurrency is how many devices are read at once; 0: one per core.
	Concurrency int

	// Progress, if set, is told how far the work is, often, from one goroutine at a time.
	Progress func(Progress)
}

// WriteManifest makes dir a package: it writes, or replaces, the manifest that describes devices, whose files must lie in
// dir itself, under any name. Additional disks are put in the order in which the machine configuration has them.
func WriteManifest(ctx context.Context, dir string, devices []File, opts ManifestOptions) (*Manifest, error) {
	m, err := writeManifest(ctx, dir, devices, opts)
	if err != nil {
		return nil, fmt.Errorf("write manifest of %q: %w", dir, err)
	}
	return m, nil
}

func writeManifest(ctx context.Context, dir string, devices []File, opts ManifestOptions) (*Manifest, error) {
	folder, err := os.Stat(dir)
	if err != nil {
		return nil, err
	}
	inputs, err := openInputs(devices)
	if err != nil {
		return nil, err
	}
	defer closeInputs(inputs)
	for _, in := range inputs {
		if parent, err := os.Stat(filepath.Dir(in.Path)); err != nil {
			return nil, fmt.Errorf("device %q: %w", in.Name, err)
		} else if !os.SameFile(parent, folder) {
			return nil, fmt.Errorf("device %q: %q is in another folder; a package has all its devices in one", in.Name, in.Path)
		}
		if err := checkFile(filepath.Base(in.Path)); err != nil {
			return nil, fmt.Errorf("device %q: %w", in.Name, err)
		}
	}
	m, err := describe(ctx, inputs, opts.Concurrency, !opts.SkipDigests, opts.Progress)
	if err != nil {
		return nil, err
	}
	for i := range m.Devices {
		m.Devices[i].File = filepath.Base(inputs[m.Devices[i].Name].Path)
	}
	if err := m.check(); err != nil {
		return nil, err
	}
	b, err := m.encode()
	if err != nil {
		return nil, err
	}
	out, err := createTemp(filepath.Join(dir, ManifestFile))
	if err != nil {
		return nil, err
	}
	defer out.discard()
	if _, err := out.Write(b); err != nil {
		return nil, err
	}
	return m, out.commit()
}

// ReadManifest returns the manifest of the package at path, a folder or an archive. Of an archive it reads no more than
// the start.
func ReadManifest(ctx context.Context, path string) (*Manifest, error) {
	m, err := readManifest(ctx, path)
	if err != nil {
		return nil, fmt.Errorf("read manifest of %q: %w", path, err)
	}
	return m, nil
}

func readManifest(ctx context.Context, path string) (*Manifest, error) {
	if stat, err := os.Stat(path); err != nil {
		return nil, err
	} else if stat.IsDir() {
		return readFolderManifest(path)
	}
	r, err := openArchive(ctx, path, 1)
	if err != nil {
		return nil, err
	}
	defer r.close()
	return r.manifest, nil
}

func readFolderManifest(dir string) (*Manifest, error) {
	f, err := os.Open(filepath.Join(dir, ManifestFile))
	if os.IsNotExist(err) {
		return nil, fmt.Errorf("%s is missing in the folder: %w", ManifestFile, ErrNotPackage)
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxManifestSize+1))
	if err != nil {
		return nil, err
	}
	if len(b) > maxManifestSize {
		return nil, fmt.Errorf("%s has more than %d bytes: %w", ManifestFile, maxManifestSize, ErrNotPackage)
	}
	return decodeManifest(b)
}

// Verify reads the whole package at path, a folder or an archive, compares it with its manifest, and returns that. An
// error that wraps [ErrCorrupt] names the first difference found.
func Verify(ctx context.Context, path string, opts ExtractOptions) (*Manifest, error) {
	m, err := verifyPackage(ctx, path, opts)
	if err != nil {
		return nil, fmt.Errorf("verify %q: %w", path, err)
	}
	return m, nil
}

func verifyPackage(ctx context.Context, path string, opts ExtractOptions) (*Manifest, error) {
	if stat, err := os.Stat(path); err != nil {
		return nil, err
	} else if stat.IsDir() {
		return verifyFolder(ctx, path, opts)
	}
	r, err := openArchive(ctx, path, opts.Concurrency)
	if err != nil {
		return nil, err
	}
	defer r.close()
	meter := newMeter(opts.Progress, StageVerify, r.manifest.size())
	err = r.each(func(d Device, content io.Reader) error { return verify(ctx, d, content, nil, meter.add) })
	return r.manifest, err
}

func verifyFolder(ctx context.Context, dir string, opts ExtractOptions) (*Manifest, error) {
	p, err := open(dir)
	if err != nil {
		return nil, err
	}
	for _, d := range p.Manifest.Devices {
		if d.SHA256 == "" {
			return nil, fmt.Errorf("device %q has no sha256 in the manifest; write the manifest again, with digests", d.Name)
		}
	}
	meter := newMeter(opts.Progress, StageVerify, p.Manifest.size())
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(concurrency(opts.Concurrency))
	for i, d := range p.Manifest.Devices {
		group.Go(func() error {
			in, err := openInput(File{Name: d.Name, Path: p.Devices[i].Path})
			if err != nil {
				return fmt.Errorf("device %q: %w", d.Name, err)
			}
			defer in.file.Close()
			c, err := scan(ctx, in.file, d.Size, meter.add)
			switch {
			case err != nil:
				return fmt.Errorf("device %q: %w", d.Name, err)
			case c.sha256 != d.SHA256:
				return fmt.Errorf("device %q: sha256 is %s, %s in the manifest: %w", d.Name, c.sha256, d.SHA256, ErrCorrupt)
			case c.data != d.DataBytes:
				return fmt.Errorf("device %q: %d bytes are data, %d in the manifest: %w", d.Name, c.data, d.DataBytes, ErrCorrupt)
			}
			return nil
		})
	}
	return p.Manifest, group.Wait()
}

// size is that of all devices together.
func (m *Manifest) size() int64 {
	var n int64
	for _, d := range m.Devices {
		n += d.Size
	}
	return n
}
