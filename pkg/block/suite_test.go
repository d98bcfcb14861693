package block_test

import (
	"bytes"
	"context"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/block/blocktest"
)

// oddSize is no multiple of anything.
const oddSize = 1<<20 + 12345

func testContent(n int64) []byte {
	p := make([]byte, n)
	for i := range p {
		if i/20000%3 != 0 { // with holes
			p[i] = byte(i*i>>7 ^ i>>3)
		}
	}
	return p
}

func must[T any](t testing.TB) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func newFile(t *testing.T, size int64) *block.File {
	return must[*block.File](t)(block.CreateFile(filepath.Join(t.TempDir(), "device"), size))
}

func TestFile(t *testing.T) {
	for _, size := range []int64{1 << 20, oddSize} {
		blocktest.Run(t, func(t *testing.T) block.Device { return newFile(t, size) },
			blocktest.Reopen(func(t *testing.T, d block.Device) block.Device {
				return must[*block.File](t)(block.OpenFile(d.(*block.File).Path(), block.FileOptions{}))
			}))
	}
}

func TestMemory(t *testing.T) {
	for _, size := range []int64{1 << 20, oddSize} {
		blocktest.Run(t, func(t *testing.T) block.Device { return block.NewMemory(size) })
	}
}

func TestTracked(t *testing.T) {
	blocktest.Run(t, func(t *testing.T) block.Device { return block.NewTracked(newFile(t, oddSize)) })
	t.Run("Tracking", func(t *testing.T) {
		blocktest.Run(t, func(t *testing.T) block.Device {
			d := block.NewTracked(newFile(t, oddSize))
			if err := d.Start(context.Background()); err != nil {
				t.Fatal(err)
			}
			return d
		})
	})
	t.Run("Tracker", func(t *testing.T) {
		blocktest.RunTracker(t, func(t *testing.T) blocktest.TrackerSubject {
			d := block.NewTracked(block.NewMemory(oddSize))
			return blocktest.TrackerSubject{
				Tracker: d, Size: d.Size(),
				Write: func(p []byte, off int64) error {
					if rand.IntN(4) == 0 {
						if err := d.Discard(off, int64(len(p))); err != nil {
							return err
						}
					}
					_, err := d.WriteAt(p, off)
					return err
				},
				Read: func(p []byte, off int64) error {
					_, err := d.ReadAt(p, off)
					if err == io.EOF {
						err = nil
					}
					return err
				},
			}
		})
	})
}

// testOverlay has what is needed to open an overlay again.
type testOverlay struct {
	*block.Overlay
	opts block.OverlayOptions
}

func openTestOverlay(t *testing.T, opts block.OverlayOptions) testOverlay {
	t.Helper()
	opts.Base = must[*block.File](t)(block.OpenFile(opts.BasePath, block.FileOptions{ReadOnly: true}))
	return testOverlay{must[*block.Overlay](t)(block.OpenOverlay(opts)), opts}
}

func overlayOptions(t *testing.T, content []byte) block.OverlayOptions {
	t.Helper()
	dir := t.TempDir()
	opts := block.OverlayOptions{BasePath: filepath.Join(dir, "base"), Overlay: filepath.Join(dir, "overlay"), State: filepath.Join(dir, "state")}
	if err := os.WriteFile(opts.BasePath, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return opts
}

func TestOverlay(t *testing.T) {
	for _, test := range []struct {
		name      string
		size      int64
		blockSize int64
		elide     bool
		empty     bool
	}{
		{name: "Default", size: oddSize},
		{name: "SmallBlocks", size: oddSize, blockSize: 4096},
		{name: "LargeBlocks", size: oddSize, blockSize: 1 << 20},
		{name: "ElideUnchanged", size: 1 << 20, blockSize: 16384, elide: true},
		{name: "EmptyBase", size: 1 << 20, empty: true},
	} {
		t.Run(test.name, func(t *testing.T) {
			content := make([]byte, test.size)
			if !test.empty {
				content = testContent(test.size)
			}
			blocktest.Run(t, func(t *testing.T) block.Device {
				opts := overlayOptions(t, content)
				opts.BlockSize, opts.ElideUnchanged = test.blockSize, test.elide
				t.Cleanup(func() {
					if base := must[[]byte](t)(os.ReadFile(opts.BasePath)); !bytes.Equal(base, content) {
						t.Error("the base was changed")
					}
				})
				return openTestOverlay(t, opts)
			}, blocktest.Content(content), blocktest.Reopen(func(t *testing.T, d block.Device) block.Device {
				return openTestOverlay(t, d.(testOverlay).opts)
			}))
		})
	}
}

func TestLazy(t *testing.T) {
	t.Run("Present", func(t *testing.T) {
		blocktest.Run(t, func(t *testing.T) block.Device {
			return must[*block.Lazy](t)(block.NewLazy(newFile(t, oddSize), block.LazyOptions{Missing: []block.Range{}}))
		})
	})
	content := testContent(oddSize)
	fill := func(l *block.Lazy, r block.Range) error { return l.Fill(r.Offset, content[r.Offset:r.End()]) }
	for _, blockSize := range []int64{0, 65536} {
		t.Run("Fetch", func(t *testing.T) {
			blocktest.Run(t, func(t *testing.T) block.Device {
				var l *block.Lazy
				l = must[*block.Lazy](t)(block.NewLazy(newFile(t, oddSize), block.LazyOptions{
					BlockSize: blockSize,
					Fetch:     func(_ context.Context, r block.Range) error { return fill(l, r) },
				}))
				return l
			}, blocktest.Content(content))
		})
	}
	// Answers come from another goroutine, and a background stream brings everything besides.
	t.Run("FetchAndStream", func(t *testing.T) {
		blocktest.Run(t, func(t *testing.T) block.Device {
			asked := make(chan block.Range, 1<<10)
			l := must[*block.Lazy](t)(block.NewLazy(newFile(t, oddSize), block.LazyOptions{
				Fetch: func(ctx context.Context, r block.Range) error {
					select {
					case asked <- r:
						return nil
					case <-ctx.Done():
						return ctx.Err()
					}
				},
			}))
			var wg sync.WaitGroup
			done := make(chan struct{})
			wg.Go(func() {
				for {
					select {
					case r := <-asked:
						if fill(l, r) != nil {
							return // closed
						}
					case <-done:
						return
					}
				}
			})
			wg.Go(func() {
				const piece = 128 << 10
				for off := int64(0); off < oddSize; off += piece {
					if fill(l, block.Range{Offset: off, Length: min(piece, oddSize-off)}) != nil {
						return // closed
					}
				}
			})
			t.Cleanup(func() {
				close(done)
				wg.Wait()
			})
			return l
		}, blocktest.Content(content))
	})
}

// TestStack runs the suite over the devices as a migrated disk stacks them.
func TestStack(t *testing.T) {
	base := testContent(oddSize)
	content := testContent(oddSize)
	for i := 300_000; i < 700_000; i++ {
		content[i] ^= 0x55
	}
	blocktest.Run(t, func(t *testing.T) block.Device {
		opts := overlayOptions(t, base)
		opts.ElideUnchanged = true
		var l *block.Lazy
		l = must[*block.Lazy](t)(block.NewLazy(openTestOverlay(t, opts), block.LazyOptions{
			Fetch: func(_ context.Context, r block.Range) error { return l.Fill(r.Offset, content[r.Offset:r.End()]) },
		}))
		tracked := block.NewTracked(l)
		if err := tracked.Start(context.Background()); err != nil {
			t.Fatal(err)
		}
		return tracked
	}, blocktest.Content(content))
}

func setModTime(t *testing.T, path string, at time.Time) {
	t.Helper()
	if err := os.Chtimes(path, at, at); err != nil {
		t.Fatal(err)
	}
}
