package block_test

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/drafter-vm/drafter/pkg/block"
)

func mustWrite(t testing.TB, d block.Device, p []byte, off int64) {
	t.Helper()
	if _, err := d.WriteAt(p, off); err != nil {
		t.Fatal(err)
	}
}

func mustClose(t testing.TB, d block.Device) {
	t.Helper()
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
}

// space is what a file takes on its file system, in bytes.
func space(t *testing.T, path string) int64 {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return info.Sys().(*syscall.Stat_t).Blocks * 512
}

// tryOverlay opens and closes an overlay, and returns why that fails.
func tryOverlay(t *testing.T, opts block.OverlayOptions) error {
	t.Helper()
	base := must[*block.File](t)(block.OpenFile(opts.BasePath, block.FileOptions{ReadOnly: true}))
	opts.Base = base
	o, err := block.OpenOverlay(opts)
	if err != nil {
		mustClose(t, base)
		return err
	}
	return o.Close()
}

// TestOverlayRefuses checks that what does not belong together is refused, by an error that names it and says what to do.
func TestOverlayRefuses(t *testing.T) {
	const size = 1 << 20
	flip := func(t *testing.T, path string, at int) {
		t.Helper()
		b := must[[]byte](t)(os.ReadFile(path))
		b[at] ^= 1
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, test := range []struct {
		name  string
		spoil func(t *testing.T, opts *block.OverlayOptions)
		want  []string
	}{
		{"overlay without state", func(t *testing.T, o *block.OverlayOptions) { _ = os.Remove(o.State) }, []string{"OVERLAY", "without its state", "STATE", "restore the state, or delete the overlay"}},
		{"state without overlay", func(t *testing.T, o *block.OverlayOptions) { _ = os.Remove(o.Overlay) }, []string{"STATE", "without its overlay", "OVERLAY", "restore the overlay, or delete the state"}},
		{"base touched", func(t *testing.T, o *block.OverlayOptions) {
			setModTime(t, o.BasePath, time.Date(2033, 1, 2, 3, 4, 5, 6000, time.UTC))
		}, []string{"BASE", "changed", "2020-02-02T02:02:02Z", "2033-01-02T03:04:05.000006Z", "restore the base", "OVERLAY", "STATE"}},
		{"base grown", func(t *testing.T, o *block.OverlayOptions) {
			if err := os.Truncate(o.BasePath, size+4096); err != nil {
				t.Fatal(err)
			}
		}, []string{"BASE", "changed", "1048576", "1052672", "restore the base"}},
		{"base gone", func(t *testing.T, o *block.OverlayOptions) {
			o.BasePath += ".other"
			if err := os.WriteFile(o.BasePath, make([]byte, 5000), 0o600); err != nil {
				t.Fatal(err)
			}
		}, []string{"BASE", "1048576", "5000"}},
		{"other block size", func(t *testing.T, o *block.OverlayOptions) { o.BlockSize = 4096 }, []string{"OVERLAY", "block size 4096", "65536", "STATE"}},
		{"block size no power of two", func(t *testing.T, o *block.OverlayOptions) { o.BlockSize = 65537 }, []string{"65537", "power of two"}},
		{"block size too small", func(t *testing.T, o *block.OverlayOptions) { o.BlockSize = 2048 }, []string{"2048", "power of two"}},
		{"same file", func(t *testing.T, o *block.OverlayOptions) { o.State = o.Overlay }, []string{"OVERLAY", "two files"}},
		{"no state given", func(t *testing.T, o *block.OverlayOptions) { o.State = "" }, []string{"OVERLAY", "give both"}},
		{"overlay truncated", func(t *testing.T, o *block.OverlayOptions) {
			if err := os.Truncate(o.Overlay, 4096); err != nil {
				t.Fatal(err)
			}
		}, []string{"OVERLAY", "4096", "1048576"}},
		{"overlay is a folder", func(t *testing.T, o *block.OverlayOptions) { o.Overlay = filepath.Dir(o.Overlay) }, []string{"not a regular file"}},
		{"state is something else", func(t *testing.T, o *block.OverlayOptions) {
			if err := os.WriteFile(o.State, bytes.Repeat([]byte("text"), 100), 0o600); err != nil {
				t.Fatal(err)
			}
		}, []string{"STATE", "not the state of an overlay"}},
		{"state is empty", func(t *testing.T, o *block.OverlayOptions) { _ = os.Truncate(o.State, 0) }, []string{"STATE", "not the state of an overlay"}},
		{"state of the future", func(t *testing.T, o *block.OverlayOptions) { flip(t, o.State, 17) }, []string{"STATE", "version 257", "version 1"}},
		{"header damaged", func(t *testing.T, o *block.OverlayOptions) { flip(t, o.State, 25) }, []string{"STATE", "damaged"}},
		{"log damaged", func(t *testing.T, o *block.OverlayOptions) { flip(t, o.State, 64+32+40) }, []string{"STATE", "damaged"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			opts := overlayOptions(t, testContent(size))
			setModTime(t, opts.BasePath, time.Date(2020, 2, 2, 2, 2, 2, 0, time.UTC))
			o := openTestOverlay(t, opts)
			mustWrite(t, o, []byte("data"), 300_000)
			mustClose(t, o)
			names := strings.NewReplacer("OVERLAY", opts.Overlay, "STATE", opts.State, "BASE", opts.BasePath)
			before := must[[]byte](t)(os.ReadFile(opts.Overlay))
			test.spoil(t, &opts)
			err := tryOverlay(t, opts)
			if err == nil {
				t.Fatal("it opens")
			}
			for _, want := range test.want {
				if want = names.Replace(want); !strings.Contains(err.Error(), want) {
					t.Errorf("the error does not say %q: %v", want, err)
				}
			}
			if after, err := os.ReadFile(opts.Overlay); err == nil && len(after) == len(before) && !bytes.Equal(after, before) {
				t.Error("the overlay was changed")
			}
		})
	}
	t.Run("no base file", func(t *testing.T) {
		opts := overlayOptions(t, testContent(size))
		opts.Base = block.NewMemory(size)
		opts.BasePath += ".missing"
		if _, err := block.OpenOverlay(opts); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), opts.BasePath) {
			t.Errorf("error is %v", err)
		}
	})
	t.Run("no folder", func(t *testing.T) {
		opts := overlayOptions(t, testContent(size))
		opts.State = filepath.Join(filepath.Dir(opts.State), "missing", "state")
		if err := tryOverlay(t, opts); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("error is %v", err)
		}
		if _, err := os.Stat(opts.Overlay); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the overlay file is left behind: %v", err)
		}
	})
}

func TestOverlayIsExclusive(t *testing.T) {
	opts := overlayOptions(t, testContent(1<<20))
	o := openTestOverlay(t, opts)
	err := tryOverlay(t, opts)
	if err == nil || !strings.Contains(err.Error(), opts.Overlay) || !strings.Contains(err.Error(), "another process holds it") {
		t.Errorf("opening it a second time: %v", err)
	}
	other := opts // another overlay, the same state
	other.Overlay += ".other"
	if err := os.WriteFile(other.Overlay, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	err = tryOverlay(t, other)
	if err == nil || !strings.Contains(err.Error(), opts.State) || !strings.Contains(err.Error(), "another process holds it") {
		t.Errorf("opening its state with another overlay: %v", err)
	}
	mustClose(t, o)
	if err := tryOverlay(t, opts); err != nil {
		t.Errorf("opening it after Close: %v", err)
	}
}

// TestOverlaySpace checks what ends up in the overlay file: only what was changed, and nothing of what was discarded.
func TestOverlaySpace(t *testing.T) {
	const size, blockSize = 64 << 20, 64 << 10
	opts := overlayOptions(t, nil)
	base := must[*os.File](t)(os.Create(opts.BasePath))
	if err := errors.Join(base.Truncate(size), base.Close()); err != nil {
		t.Fatal(err)
	}
	opts.BlockSize = blockSize
	o := openTestOverlay(t, opts)
	defer o.Close()
	check := func(what string, held, zero, atMost int64) {
		t.Helper()
		if err := o.Flush(); err != nil {
			t.Fatal(err)
		}
		if b := o.Blocks(); b.Total != size/blockSize || b.Held != held || b.Zero != zero {
			t.Errorf("%s: blocks are %+v, want %d held and %d zero", what, b, held, zero)
		}
		if n := space(t, opts.Overlay); n > atMost {
			t.Errorf("%s: the overlay takes %d bytes, want at most %d", what, n, atMost)
		}
	}
	slack := int64(64 << 10) // of the file system
	check("new", 0, 0, slack)
	for i := range int64(16) {
		mustWrite(t, o, bytes.Repeat([]byte{1}, 4096), i*blockSize*2+8192)
	}
	check("16 pages", 16, 0, 16*4096+slack) // the base is zero around them, which is not copied up
	if err := o.Discard(0, size/2); err != nil {
		t.Fatal(err)
	}
	check("half discarded", 0, size/blockSize/2, slack)
	mustWrite(t, o, []byte{1}, 100)
	check("one byte", 1, size/blockSize/2-1, 4096+slack)

	changes := []block.Range{}
	for off := int64(0); ; {
		r, err := o.NextChange(off)
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		changes = append(changes, r)
		off = r.End()
	}
	if want := []block.Range{{Offset: 0, Length: size / 2}}; !slices.Equal(changes, want) {
		t.Errorf("changes are %v, want %v", changes, want)
	}
}

func TestOverlayElidesUnchanged(t *testing.T) {
	const size, blockSize = 1 << 20, 16 << 10
	content := testContent(size)
	opts := overlayOptions(t, content)
	opts.BlockSize, opts.ElideUnchanged = blockSize, true
	o := openTestOverlay(t, opts)
	defer o.Close()
	mustWrite(t, o, content, 0)
	mustWrite(t, o, content[5:70_000], 5)
	if b := o.Blocks(); b.Held != 0 {
		t.Errorf("after writing what the base holds, blocks are %+v", b)
	}
	changed := bytes.Clone(content)
	changed[10*blockSize+7]++
	changed[20*blockSize]++
	changed[21*blockSize-1]++
	mustWrite(t, o, changed, 0)
	if b := o.Blocks(); b.Held != 2 {
		t.Errorf("after a change of two blocks, blocks are %+v", b)
	}
	got := make([]byte, size)
	if _, err := o.ReadAt(got, 0); err != nil || !bytes.Equal(got, changed) {
		t.Errorf("what was written is not read, %v", err)
	}
}

// TestOverlaySharesBase opens many overlays over one base file, writes to all at once, and checks that none sees another.
func TestOverlaySharesBase(t *testing.T) {
	content := testContent(1 << 20)
	first := overlayOptions(t, content)
	overlays := make([]testOverlay, 8)
	for i := range overlays {
		opts := first
		opts.Overlay += string(rune('a' + i))
		opts.State += string(rune('a' + i))
		overlays[i] = openTestOverlay(t, opts)
		defer overlays[i].Close()
	}
	var wg sync.WaitGroup
	for i, o := range overlays {
		wg.Go(func() {
			for off := int64(0); off < o.Size(); off += 70_000 {
				if _, err := o.WriteAt(bytes.Repeat([]byte{byte(i)}, 100), off); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	for i, o := range overlays {
		want := bytes.Clone(content)
		for off := 0; off < len(want); off += 70_000 {
			copy(want[off:], bytes.Repeat([]byte{byte(i)}, 100))
		}
		got := make([]byte, len(want))
		if _, err := o.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
			t.Errorf("overlay %d is not what was written to it, %v", i, err)
		}
	}
}

// TestOverlayLogStaysSmall opens, changes and closes an overlay many times: compaction keeps its state in proportion.
func TestOverlayLogStaysSmall(t *testing.T) {
	opts := overlayOptions(t, testContent(1<<20))
	for range 50 {
		o := openTestOverlay(t, opts)
		for range 20 {
			if err := o.Discard(0, 65536); err != nil {
				t.Fatal(err)
			}
			if err := o.Flush(); err != nil {
				t.Fatal(err)
			}
			mustWrite(t, o, []byte("x"), 1)
			if err := o.Flush(); err != nil {
				t.Fatal(err)
			}
		}
		mustClose(t, o)
	}
	info, err := os.Stat(opts.State)
	if err != nil || info.Size() > 16<<10 {
		t.Errorf("the state of one changed block has %d bytes, %v", info.Size(), err)
	}
}
