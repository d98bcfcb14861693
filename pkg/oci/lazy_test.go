package oci

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/containerd/stargz-snapshotter/estargz/zstdchunked"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/zstd"

	"github.com/drafter-vm/drafter/internal/testimage"
	"github.com/drafter-vm/drafter/internal/testregistry"
)

// formats are those in which files can be fetched one by one.
var formats = map[string]func(t testing.TB, l v1.Layer) mutate.Addendum{"eStargz": stargz, "zstd:chunked": chunked}

func uncompressed(t testing.TB, l v1.Layer) []byte {
	t.Helper()
	r, err := l.Uncompressed()
	must(t, err)
	data, err := io.ReadAll(r)
	must(t, errors.Join(err, r.Close()))
	return data
}

// stargz makes a layer an eStargz one, by the program of the format's authors.
func stargz(t testing.TB, l v1.Layer) mutate.Addendum {
	t.Helper()
	data := uncompressed(t, l)
	blob, err := estargz.Build(io.NewSectionReader(bytes.NewReader(data), 0, int64(len(data))), estargz.WithChunkSize(64<<10), estargz.WithCompressionLevel(gzip.BestSpeed))
	must(t, err)
	packed, err := io.ReadAll(blob)
	must(t, errors.Join(err, blob.Close()))
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(packed)), nil }, tarball.WithMediaType(types.OCILayer))
	must(t, err)
	return mutate.Addendum{Layer: layer, Annotations: map[string]string{estargz.TOCJSONDigestAnnotation: blob.TOCDigest().String()}}
}

// chunked makes a layer a zstd:chunked one, by the same.
func chunked(t testing.TB, l v1.Layer) mutate.Addendum {
	t.Helper()
	var b bytes.Buffer
	annotations := map[string]string{}
	w := estargz.NewWriterWithCompressor(&b, &zstdchunked.Compressor{CompressionLevel: zstd.SpeedFastest, Metadata: annotations})
	w.ChunkSize = 50_000 // no multiple of a block
	must(t, w.AppendTar(bytes.NewReader(uncompressed(t, l))))
	_, err := w.Close()
	must(t, err)
	packed := b.Bytes()
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(packed)), nil }, tarball.WithMediaType(types.MediaType("application/vnd.oci.image.layer.v1.tar+zstd")))
	must(t, err)
	annotations[estargz.TOCJSONDigestAnnotation] = "sha256:" + strings.Repeat("0", 64) // as some converters have both
	return mutate.Addendum{Layer: layer, Annotations: annotations, MediaType: types.MediaType("application/vnd.oci.image.layer.v1.tar+zstd")}
}

// reformat makes the layers of an image ones of a format. Of those that plain names, by their number, nothing is changed.
func reformat(t testing.TB, image v1.Image, format func(testing.TB, v1.Layer) mutate.Addendum, plain ...int) v1.Image {
	t.Helper()
	layers, err := image.Layers()
	must(t, err)
	config, err := image.ConfigFile()
	must(t, err)
	out, err := testimage.Assemble(config.Config)
	must(t, err)
	for n, l := range layers {
		add := mutate.Addendum{Layer: l}
		if len(plain) == 0 || plain[0] != n {
			add = format(t, l)
		}
		out, err = mutate.Append(out, add)
		must(t, err)
	}
	return out
}

func pushImage(t testing.TB, reference string, image v1.Image) {
	t.Helper()
	ref, err := name.ParseReference(reference)
	must(t, err)
	must(t, remote.Write(ref, image))
}

// testSize is that of disks, which are read wholly.
const testSize = 192 << 20

func openLazy(t testing.TB, reference string, opts LazyOptions) *LazyDisk {
	t.Helper()
	image, err := Open(t.Context(), reference, OpenOptions{Architecture: "amd64"})
	must(t, err)
	defer image.Close()
	opts.Disk = tools(t)
	opts.Disk.Size = testSize
	d, err := image.LazyDisk(t.Context(), t.TempDir(), opts)
	must(t, err)
	t.Cleanup(func() { must(t, d.Close()) })
	return d
}

// A disk that was laid out by tables of contents is, once all has come, the one that is made of the whole image, but for times that only the archive has.
func TestLazyDisk(t *testing.T) {
	server := testregistry.Start(t, testregistry.Options{})
	image := testimage.Make(t, testimage.Nginx())
	for name, format := range formats {
		t.Run(name, func(t *testing.T) {
			front := server.Front(t)
			reference := "docker://" + front.Address + "/lazy/" + map[string]string{"eStargz": "gz", "zstd:chunked": "zstd"}[name] + ":1"
			pushImage(t, strings.TrimPrefix(reference, "docker://"), reformat(t, image, format))

			d := openLazy(t, reference, LazyOptions{Background: -1})
			if d.First > d.Whole/8 {
				t.Errorf("%d of %d bytes were fetched before the disk was there", d.First, d.Whole)
			}
			// The file system is whole before any file has come, and one file brings little.
			before := d.Fetched()
			page := []byte("hello from nginx\n")
			i := slices.IndexFunc(d.pieces, func(p piece) bool { return p.file.size == int64(len(page)) })
			buf := make([]byte, diskBlock)
			_, err := d.ReadAt(buf, d.pieces[i].physical*diskBlock)
			must(t, err)
			if !bytes.HasPrefix(buf, page) {
				t.Errorf("the page is %q", buf[:len(page)])
			}
			if got := d.Fetched() - before; got == 0 || got > 2*foregroundSpan {
				t.Errorf("a small file brought %d bytes", got)
			}

			// Everything, by who reads it and behind.
			all := openLazy(t, reference, LazyOptions{})
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			must(t, all.Wait(ctx))
			lazy := filepath.Join(t.TempDir(), "lazy.ext4")
			must(t, copyTo(lazy, all))
			run(t, "e2fsck", "-fn", lazy)
			whole := filepath.Join(t.TempDir(), "whole.ext4")
			size := tools(t)
			size.Size = testSize
			must(t, unpack(t, reference, BundleOptions{}).WriteDisk(t.Context(), whole, size))
			a, b := filepath.Join(t.TempDir(), "a"), filepath.Join(t.TempDir(), "b")
			must(t, os.Mkdir(a, 0o700))
			must(t, os.Mkdir(b, 0o700))
			run(t, "debugfs", "-R", "rdump /rootfs "+a, lazy)
			run(t, "debugfs", "-R", "rdump /rootfs "+b, whole)
			got, want := listing(t, a), listing(t, b)
			delete(got, "") // the folders themselves
			delete(want, "")
			for _, name := range []string{"/rootfs/" + tocName, "/rootfs/.no.prefetch.landmark"} { // the format's own, which who takes the layer as an archive sees as files
				delete(want, name)
			}
			compare(t, got, want)
			if len(want) < 100 {
				t.Errorf("there are but %d files", len(want))
			}
		})
	}
}

func copyTo(path string, d *LazyDisk) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, io.NewSectionReader(d, 0, d.Size()))
	return errors.Join(err, f.Close())
}

// Layers with and without a table of contents may be mixed; a registry that gives no parts of blobs has them fetched whole.
func TestLazyMixed(t *testing.T) {
	server := testregistry.Start(t, testregistry.Options{})
	image := imageOf(t, runs, []entry{{Data: strings.Repeat("low", 10_000), Header: file("low").Header}}, []entry{{Data: strings.Repeat("top", 10_000), Header: file("top").Header}, file("small")})
	reference := server.Address + "/mixed:1"
	pushImage(t, reference, reformat(t, image, stargz, 0))
	d := openLazy(t, "docker://"+reference, LazyOptions{})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	must(t, d.Wait(ctx))
	path := filepath.Join(t.TempDir(), "disk")
	must(t, copyTo(path, d))
	for file, want := range map[string]string{"/rootfs/low": strings.Repeat("low", 10_000), "/rootfs/top": strings.Repeat("top", 10_000), "/rootfs/small": "x"} {
		if got := run(t, "debugfs", "-R", "cat "+file, path); !strings.HasSuffix(got, want) {
			t.Errorf("%s has %d bytes", file, len(got))
		}
	}
	_, err := func() (*LazyDisk, error) {
		i, err := Open(t.Context(), layoutOf(t, image), OpenOptions{Architecture: "amd64"})
		must(t, err)
		defer i.Close()
		return i.LazyDisk(t.Context(), t.TempDir(), LazyOptions{Disk: tools(t)})
	}()
	wantError(t, err, "no registry")
}

// What the registry does to us reaches a reader as an error, or late, and never as other content.
func TestLazyFaults(t *testing.T) {
	server := testregistry.Start(t, testregistry.Options{})
	front := server.Front(t)
	content := make([]byte, 1<<20)
	for i := range content {
		content[i] = byte(i * 7 >> (i % 5))
	}
	image := reformat(t, imageOf(t, runs, []entry{{Data: string(content), Header: file("data").Header}}), stargz)
	pushImage(t, server.Address+"/faults:1", image)
	read := func(d *LazyDisk) ([]byte, error) {
		var all []byte
		for _, e := range d.pieces {
			buf := make([]byte, e.length*diskBlock)
			if _, err := d.ReadAt(buf, e.physical*diskBlock); err != nil {
				return nil, err
			}
			all = append(all, buf...)
		}
		return all[:len(content)], nil
	}
	for name, c := range map[string]struct {
		fault testregistry.Fault
		waits bool // it is a fault that passes, or else what is read
	}{
		"corrupt": {testregistry.Fault{Corrupt: true}, false}, "refused": {testregistry.Fault{Status: 403}, false},
		"cut": {testregistry.Fault{Cut: true}, true}, "fail": {testregistry.Fault{Status: 500}, true},
	} {
		t.Run(name, func(t *testing.T) {
			d := openLazy(t, "docker://"+front.Address+"/faults:1", LazyOptions{Background: -1})
			c.fault.Match = testregistry.Of("GET", "blobs")
			front.Set(&c.fault)
			type result struct {
				data []byte
				err  error
			}
			ended := make(chan result, 1)
			go func() { data, err := read(d); ended <- result{data, err} }()
			if !c.waits {
				if r := <-ended; r.err == nil {
					t.Error("the content was read all the same")
				}
				front.Set(nil)
				go func() { // it is asked for again, but for what was on its way
					data, err := read(d)
					for begin := time.Now(); err != nil && time.Since(begin) < 20*time.Second; {
						data, err = read(d)
					}
					ended <- result{data, err}
				}()
			} else {
				for asked := front.Gets.Load(); front.Gets.Load() < asked+blobAttempts+2; {
					time.Sleep(10 * time.Millisecond)
				}
				front.Set(nil)
			}
			r := <-ended
			must(t, r.err)
			if !bytes.Equal(r.data, content) {
				t.Error("the content is another")
			}
		})
	}
	t.Run("closed", func(t *testing.T) {
		d := openLazy(t, "docker://"+front.Address+"/faults:1", LazyOptions{Background: -1})
		front.Set(&testregistry.Fault{Match: testregistry.Of("GET", "blobs"), Hang: true})
		defer front.Set(nil)
		ended := make(chan error)
		go func() { _, err := read(d); ended <- err }()
		time.Sleep(100 * time.Millisecond) // it may be on its way or not: either must end
		must(t, d.Close())
		if err := <-ended; err == nil {
			t.Error("a read of a closed disk ended well")
		}
	})
	t.Run("table of contents", func(t *testing.T) {
		i, err := Open(t.Context(), "docker://"+front.Address+"/faults:1", OpenOptions{Architecture: "amd64"})
		must(t, err)
		front.Set(&testregistry.Fault{Match: testregistry.Of("GET", "blobs"), Corrupt: true})
		defer front.Set(nil)
		_, err = i.LazyDisk(t.Context(), t.TempDir(), LazyOptions{Disk: tools(t)})
		if err == nil {
			t.Error("a table of contents that is another was taken")
		}
	})
}

// Many readers at once, and the background, get the right content, and each chunk is fetched once.
func TestLazyConcurrent(t *testing.T) {
	server := testregistry.Start(t, testregistry.Options{})
	var files []entry
	for i := range 200 {
		files = append(files, entry{Data: strings.Repeat(fmt.Sprintf("%06d", i), 1+i*37%5000), Header: file(fmt.Sprint("f", i)).Header})
	}
	pushImage(t, server.Address+"/many:1", reformat(t, imageOf(t, runs, files), stargz))
	d := openLazy(t, "docker://"+server.Address+"/many:1", LazyOptions{})
	var bad atomic.Int32
	done := make(chan struct{})
	for reader := range 8 {
		go func() {
			defer func() { done <- struct{}{} }()
			for n := range d.pieces {
				p := d.pieces[(n*(2*reader+1)+reader)%len(d.pieces)]
				buf := make([]byte, p.length*diskBlock)
				if _, err := d.ReadAt(buf, p.physical*diskBlock); err != nil {
					bad.Add(1)
					return
				}
				text := string(buf[:min(int64(len(buf)), p.file.size-p.logical*diskBlock)])
				if p.logical == 0 && !strings.HasPrefix(strings.Repeat(text[:6], len(text)/6+1), text) {
					bad.Add(1)
				}
			}
		}()
	}
	for range 8 {
		<-done
	}
	if bad.Load() > 0 {
		t.Errorf("%d readers got what is not there", bad.Load())
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	must(t, d.Wait(ctx))
	if d.Fetched() > d.Whole {
		t.Errorf("%d bytes were fetched of an image of %d", d.Fetched(), d.Whole)
	}
}

func FuzzTOC(f *testing.F) {
	f.Add([]byte(`{"version":1,"entries":[{"name":"a","type":"reg","size":10,"offset":5,"chunkDigest":"sha256:0000000000000000000000000000000000000000000000000000000000000000"},{"name":"a","type":"chunk","chunkOffset":4}]}`), int64(100))
	f.Add([]byte(`{"version":1,"entries":[{"name":"d","type":"dir","modtime":"2020-01-01T00:00:00Z"},{"name":"z","type":"reg","size":4096,"chunkType":"zeros"}]}`), int64(10))
	f.Fuzz(func(t *testing.T, text []byte, end int64) {
		entries, err := decodeTOC(text)
		if err != nil {
			return
		}
		l := &lazyLayer{}
		if l.place(entries, end) != nil {
			return
		}
		for _, c := range l.chunks {
			if c.from < 0 || c.to > end || c.to <= c.from || c.off < 0 || c.off+c.size > c.file.size {
				t.Fatalf("chunk %+v of %+v", c, c.file)
			}
		}
		for n := range entries {
			_, _ = entries[n].header()
		}
	})
}

// What has come stays: another process goes on with that, and fetches nothing when nothing is missing.
func TestLazyAgain(t *testing.T) {
	server := testregistry.Start(t, testregistry.Options{})
	var files []entry
	for i := range 20 {
		files = append(files, entry{Data: strings.Repeat(fmt.Sprintf("%07d\n", i), 1000*(i+1)), Header: file(fmt.Sprint("f", i)).Header})
	}
	reference := "docker://" + server.Address + "/again:1"
	pushImage(t, server.Address+"/again:1", reformat(t, imageOf(t, runs, files), stargz))
	dir := t.TempDir()
	open := func(background int, s Settings) *LazyDisk {
		i, err := Open(t.Context(), reference, OpenOptions{Architecture: "amd64"})
		must(t, err)
		defer i.Close()
		disk := tools(t)
		disk.Size = testSize
		d, err := i.LazyDisk(t.Context(), dir, LazyOptions{Background: background, Disk: disk, Settings: s})
		must(t, err)
		return d
	}
	first := open(-1, Settings{})
	missing := first.Missing()
	large := first.pieces[0]
	for _, p := range first.pieces {
		if p.length > large.length {
			large = p
		}
	}
	want := make([]byte, large.length*diskBlock)
	_, err := first.ReadAt(want, large.physical*diskBlock)
	must(t, err)
	left := first.Missing()
	if left >= missing {
		t.Errorf("%d bytes were missing, and %d are after a read", missing, left)
	}
	must(t, first.Close())

	second := open(-1, Settings{})
	if got := second.Missing(); got != left {
		t.Errorf("%d bytes are missing, %d were", got, left)
	}
	if !second.Since.Equal(first.Since) {
		t.Errorf("the disk is of %v, and was of %v", second.Since, first.Since)
	}
	begin := second.Fetched()
	got := make([]byte, len(want))
	_, err = second.ReadAt(got, large.physical*diskBlock)
	must(t, err)
	if !bytes.Equal(got, want) {
		t.Error("what had come is another now")
	}
	if n := second.Fetched() - begin; n != 0 {
		t.Errorf("%d bytes were fetched again", n)
	}
	must(t, second.Close())

	third := open(4, Settings{})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	must(t, third.Wait(ctx))
	for { // it is put on record a moment later
		if _, err := os.Stat(filepath.Join(dir, "disk"+listSuffix)); errors.Is(err, os.ErrNotExist) {
			break
		}
		must(t, ctx.Err())
		time.Sleep(time.Millisecond)
	}
	must(t, third.Close())
	fourth := open(-1, Settings{})
	if n := fourth.Missing(); n != 0 {
		t.Errorf("%d bytes are missing of what is whole", n)
	}
	must(t, fourth.Close())
	// By its digest, it is opened without the registry, once it was so asked for.
	i, err := Open(t.Context(), reference, OpenOptions{Architecture: "amd64"})
	must(t, err)
	pinned, err := i.Pinned()
	must(t, errors.Join(err, i.Close()))
	if d, err := OpenWhole(dir, pinned, "amd64", Settings{}, testSize); d != nil || err != nil {
		t.Errorf("a disk of a tag passes for one of a digest: %v", err)
	}
	tag := reference
	reference = pinned
	must(t, open(-1, Settings{}).Close())
	d, err := OpenWhole(dir, pinned, "amd64", Settings{}, testSize)
	must(t, err)
	again := make([]byte, len(want))
	_, err = d.ReadAt(again, large.physical*diskBlock)
	must(t, err)
	if !bytes.Equal(again, want) || !d.Since.Equal(first.Since) {
		t.Error("the whole disk is another")
	}
	must(t, d.Close())
	for what, other := range map[string]func() (*LazyDisk, error){
		"settings": func() (*LazyDisk, error) {
			return OpenWhole(dir, pinned, "amd64", Settings{Env: []string{"A=B"}}, testSize)
		},
		"architecture": func() (*LazyDisk, error) { return OpenWhole(dir, pinned, "arm64", Settings{}, testSize) },
		"size":         func() (*LazyDisk, error) { return OpenWhole(dir, pinned, "amd64", Settings{}, 2*testSize) },
		"image":        func() (*LazyDisk, error) { return OpenWhole(dir, tag, "amd64", Settings{}, testSize) },
		"folder":       func() (*LazyDisk, error) { return OpenWhole(t.TempDir(), pinned, "amd64", Settings{}, testSize) },
	} {
		if d, err := other(); d != nil || err != nil {
			t.Errorf("with another %s it is there, %v", what, err)
		}
	}
	// Another configuration is another disk.
	fifth := open(-1, Settings{Env: []string{"A=B"}})
	if fifth.Missing() == 0 {
		t.Error("a disk with another configuration has come already")
	}
	must(t, fifth.Close())
}
