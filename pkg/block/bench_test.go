package block_test

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/drafter-vm/drafter/pkg/block"
)

const benchSize = 64 << 20

// benchFolder is on tmpfs where there is one, so that the disk is not what is measured.
func benchFolder(b *testing.B) string {
	b.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "block")
	if err != nil {
		return b.TempDir()
	}
	b.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

func benchBase(b *testing.B) (dir string, f *block.File) {
	b.Helper()
	dir = benchFolder(b)
	f = must[*block.File](b)(block.CreateFile(filepath.Join(dir, "base"), benchSize))
	b.Cleanup(func() { _ = f.Close() })
	mustWrite(b, f, testContent(benchSize), 0)
	return dir, f
}

func benchOverlay(b *testing.B, warm bool) *block.Overlay {
	b.Helper()
	dir, f := benchBase(b)
	o := must[*block.Overlay](b)(block.OpenOverlay(block.OverlayOptions{Base: f, BasePath: f.Path(), Overlay: filepath.Join(dir, "overlay"), State: filepath.Join(dir, "state")}))
	b.Cleanup(func() { _ = o.Close() })
	if warm {
		mustWrite(b, o, testContent(benchSize), 0)
	}
	return o
}

// BenchmarkDevice measures 4 KiB requests to each device, beside the plain file they all end at.
func BenchmarkDevice(b *testing.B) {
	file := func(b *testing.B) block.Device { _, f := benchBase(b); return f }
	for _, test := range []struct {
		name string
		open func(b *testing.B) block.Device
	}{
		{"file", file},
		{"memory", func(b *testing.B) block.Device { return memoryOf(b, testContent(benchSize)) }},
		{"overlay-base", func(b *testing.B) block.Device { return benchOverlay(b, false) }},
		{"overlay-held", func(b *testing.B) block.Device { return benchOverlay(b, true) }},
		{"tracked-idle", func(b *testing.B) block.Device { return block.NewTracked(file(b)) }},
		{"tracked-running", func(b *testing.B) block.Device {
			d := block.NewTracked(file(b))
			if err := d.Start(context.Background()); err != nil {
				b.Fatal(err)
			}
			return d
		}},
		{"lazy-present", func(b *testing.B) block.Device {
			return must[*block.Lazy](b)(block.NewLazy(file(b), block.LazyOptions{Missing: []block.Range{}}))
		}},
		{"lazy-last-missing", func(b *testing.B) block.Device {
			return must[*block.Lazy](b)(block.NewLazy(file(b), block.LazyOptions{Missing: []block.Range{{Offset: benchSize - 4096, Length: 4096}}}))
		}},
	} {
		for _, kind := range []string{"read", "write"} {
			b.Run(test.name+"/"+kind, func(b *testing.B) {
				d := test.open(b)
				p := make([]byte, 4096)
				for i := range p {
					p[i] = byte(i)
				}
				b.SetBytes(4096)
				b.ReportAllocs()
				i := int64(0)
				for b.Loop() {
					off := i * 7919 % (benchSize/4096 - 1) * 4096
					i++
					var err error
					if kind == "read" {
						_, err = d.ReadAt(p, off)
					} else {
						_, err = d.WriteAt(p, off)
					}
					if err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

// BenchmarkCollect measures a round of tracking, per GiB of the device.
func BenchmarkCollect(b *testing.B) {
	for _, test := range []struct {
		name  string
		every int64 // pages
	}{{"clean", 0}, {"1-in-20", 20}, {"all", 1}} {
		b.Run(test.name, func(b *testing.B) {
			const size = 1 << 30
			d := block.NewTracked(discarding{size})
			if err := d.Start(context.Background()); err != nil {
				b.Fatal(err)
			}
			for b.Loop() {
				b.StopTimer()
				for off := int64(0); test.every > 0 && off < size; off += 4096 * test.every {
					_, _ = d.WriteAt(page[:], off)
				}
				b.StartTimer()
				if _, err := d.Collect(context.Background()); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

var page [4096]byte

// discarding is a device that forgets.
type discarding struct{ size int64 }

func (discarding) ReadAt(p []byte, _ int64) (int, error)  { return len(p), nil }
func (discarding) WriteAt(p []byte, _ int64) (int, error) { return len(p), nil }
func (d discarding) Size() int64                          { return d.size }
func (discarding) Discard(int64, int64) error             { return nil }
func (discarding) Flush() error                           { return nil }
func (discarding) Close() error                           { return nil }

func BenchmarkDigest(b *testing.B) {
	_, f := benchBase(b)
	b.SetBytes(benchSize)
	for b.Loop() {
		if _, err := block.Digest(context.Background(), f); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkCopy(b *testing.B) {
	dir, f := benchBase(b)
	dst := must[*block.File](b)(block.CreateFile(filepath.Join(dir, "copy"), benchSize))
	b.Cleanup(func() { _ = dst.Close() })
	b.SetBytes(benchSize)
	for b.Loop() {
		if err := block.Copy(context.Background(), dst, f, block.CopyOptions{}); err != nil {
			b.Fatal(err)
		}
	}
}
