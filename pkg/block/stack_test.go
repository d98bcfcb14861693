package block_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/block/blocktest"
)

// stack is a base with overlays over it, the newest last.
type stack struct {
	base   string
	layers []block.OverlayOptions
}

// newStack makes a base and some overlays, each of another block size, with one block of its own.
func newStack(t *testing.T, content []byte, layers int) *stack {
	t.Helper()
	dir := t.TempDir()
	s := &stack{base: filepath.Join(dir, "base")}
	if err := os.WriteFile(s.base, content, 0o600); err != nil {
		t.Fatal(err)
	}
	for i := range layers {
		name := filepath.Join(dir, string(rune('a'+i)))
		s.layers = append(s.layers, block.OverlayOptions{Overlay: name, State: name + ".state", BlockSize: 64 << 10 >> i})
	}
	return s
}

// try opens the first n overlays; the last of them, and the base where there is none, as given.
func (s *stack) try(n int, last block.OverlayOptions) (block.Device, error) {
	base, err := block.OpenFile(s.base, block.FileOptions{ReadOnly: true})
	if err != nil {
		return nil, err
	}
	var device block.Device = base
	for i, opts := range s.layers[:n] {
		opts.Base, opts.ReadOnly = device, true
		if i == 0 {
			opts.BasePath = s.base
		}
		if i == n-1 {
			opts.ReadOnly, opts.AnyBase, opts.Live = last.ReadOnly, last.AnyBase, last.Live
		}
		next, err := block.OpenOverlay(opts)
		if err != nil {
			return nil, errors.Join(err, device.Close())
		}
		device = next
	}
	return device, nil
}

func (s *stack) open(t *testing.T, n int) *block.Overlay {
	t.Helper()
	return must[block.Device](t)(s.try(n, block.OverlayOptions{})).(*block.Overlay)
}

// write writes to the nth overlay.
func (s *stack) write(t *testing.T, n int, p string, off int64) {
	t.Helper()
	o := s.open(t, n)
	mustWrite(t, o, []byte(p), off)
	mustClose(t, o)
}

func contentOf(t *testing.T, d block.Device) []byte {
	t.Helper()
	p := make([]byte, d.Size())
	if _, err := d.ReadAt(p, 0); err != nil && err != io.EOF {
		t.Fatal(err)
	}
	return p
}

func TestOverlayStackSuite(t *testing.T) {
	blocktest.Run(t, func(t *testing.T) block.Device {
		s := newStack(t, make([]byte, oddSize), 3)
		for n := 1; n < 3; n++ { // what the suite takes for zeros is so in three ways
			o := s.open(t, n)
			if err := o.Discard(0, 200_000); err != nil {
				t.Fatal(err)
			}
			mustClose(t, o)
		}
		return s.open(t, 3)
	})
}

// TestOverlayStack reads and writes through overlays over each other.
func TestOverlayStack(t *testing.T) {
	content := testContent(oddSize)
	want := bytes.Clone(content)
	s := newStack(t, content, 3)
	for n := range 3 {
		s.write(t, n+1, strings.Repeat(string(rune('a'+n)), 100), int64(n)*200_000)
		copy(want[n*200_000:], strings.Repeat(string(rune('a'+n)), 100))
	}
	o := s.open(t, 2)
	if err := o.Discard(500_000, 100_000); err != nil {
		t.Fatal(err)
	}
	mustClose(t, o)
	clear(want[500_000:600_000])
	// The third was made over what the second was.
	if _, err := s.try(3, block.OverlayOptions{}); err == nil {
		t.Fatal("an overlay opens over one that has changed")
	}
	top := must[block.Device](t)(s.try(3, block.OverlayOptions{AnyBase: true})).(*block.Overlay)
	if got := contentOf(t, top); !bytes.Equal(got, want) {
		t.Error("the stack reads as something else than what was written to it")
	}
	// What may differ from the base is known across all.
	differs := make([]bool, oddSize)
	for off := int64(0); ; {
		r, err := top.NextChange(off)
		if err == io.EOF {
			break
		} else if err != nil || r.Length <= 0 || r.Offset < off {
			t.Fatalf("the change after %d is %v, %v", off, r, err)
		}
		for i := r.Offset; i < r.End(); i++ {
			differs[i] = true
		}
		off = r.End()
	}
	changed := 0
	for i := range differs {
		if !differs[i] && want[i] != content[i] {
			t.Fatalf("byte %d differs from the base, and no change is listed", i)
		}
		if differs[i] {
			changed++
		}
	}
	if changed > 450_000 {
		t.Errorf("%d bytes of %d may be changed, of some 300,000", changed, oddSize)
	}
	mustClose(t, top)
}

// TestOverlayStackRefuses: a base that is an overlay, and is not what it was.
func TestOverlayStackRefuses(t *testing.T) {
	for _, test := range []struct {
		name  string
		spoil func(t *testing.T, s *stack)
		want  string
	}{
		{"written", func(t *testing.T, s *stack) { s.write(t, 1, "other", 0) }, "last modified at"},
		{"discarded", func(t *testing.T, s *stack) {
			before := must[os.FileInfo](t)(os.Stat(s.layers[0].Overlay))
			o := s.open(t, 1)
			if err := o.Discard(1<<19, 1<<18); err != nil {
				t.Fatal(err)
			}
			mustClose(t, o)
			setModTime(t, s.layers[0].Overlay, before.ModTime())
		}, "it holds other blocks"},
		{"missing", func(t *testing.T, s *stack) { _ = os.Remove(s.layers[0].State) }, "without its state"},
		{"not there", func(t *testing.T, s *stack) {
			_ = os.Remove(s.layers[0].State)
			_ = os.Remove(s.layers[0].Overlay)
		}, "no such file"},
		{"in use", func(t *testing.T, s *stack) {
			o := s.open(t, 1)
			t.Cleanup(func() { mustClose(t, o) })
		}, "another process holds it"},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := newStack(t, testContent(1<<20), 2)
			s.write(t, 1, "first", 0)
			s.write(t, 2, "second", 100_000)
			test.spoil(t, s)
			_, err := s.try(2, block.OverlayOptions{})
			if err == nil || !strings.Contains(err.Error(), test.want) || !strings.Contains(err.Error(), s.layers[0].Overlay) {
				t.Errorf("error is %v, want one that says %q and %q", err, s.layers[0].Overlay, test.want)
			}
		})
	}
}

// TestReadOnlyOverlay: any number read one overlay, nobody writes it meanwhile, and not a byte of it changes.
func TestReadOnlyOverlay(t *testing.T) {
	s := newStack(t, testContent(1<<20), 1)
	s.write(t, 1, "data", 300_000)
	state, overlay := s.layers[0].State, s.layers[0].Overlay
	// An append that was cut short, and a write that never was flushed.
	for path, tail := range map[string]string{state: "OVLB", overlay: "never flushed"} {
		f := must[*os.File](t)(os.OpenFile(path, os.O_WRONLY, 0))
		at := int64(700_000)
		if path == state {
			at = must[os.FileInfo](t)(f.Stat()).Size()
		}
		if _, err := f.WriteAt([]byte(tail), at); err != nil {
			t.Fatal(err)
		}
		_ = f.Close()
	}
	before := [][]byte{must[[]byte](t)(os.ReadFile(state)), must[[]byte](t)(os.ReadFile(overlay))}

	first := must[block.Device](t)(s.try(1, block.OverlayOptions{ReadOnly: true}))
	second := must[block.Device](t)(s.try(1, block.OverlayOptions{ReadOnly: true}))
	if _, err := s.try(1, block.OverlayOptions{}); err == nil || !strings.Contains(err.Error(), "another process holds it") {
		t.Errorf("opening it to write meanwhile: %v", err)
	}
	want := testContent(1 << 20)
	copy(want[300_000:], "data")
	if !bytes.Equal(contentOf(t, second), want) {
		t.Error("it reads as something else than what was flushed")
	}
	if _, err := first.WriteAt([]byte("x"), 300_000); !errors.Is(err, syscall.EROFS) {
		t.Errorf("WriteAt of a held block: %v", err)
	}
	if _, err := first.WriteAt([]byte("x"), 0); !errors.Is(err, syscall.EROFS) {
		t.Errorf("WriteAt: %v", err)
	}
	if err := first.Discard(0, 1<<20); !errors.Is(err, syscall.EROFS) {
		t.Errorf("Discard: %v", err)
	}
	if err := first.Flush(); err != nil {
		t.Errorf("Flush: %v", err)
	}
	mustClose(t, first)
	mustClose(t, second)
	if after := [][]byte{must[[]byte](t)(os.ReadFile(state)), must[[]byte](t)(os.ReadFile(overlay))}; !slices.EqualFunc(after, before, bytes.Equal) {
		t.Error("its files have changed")
	}
	if o := s.open(t, 1); !bytes.Equal(contentOf(t, o), want) {
		t.Error("later, it reads as something else than what was flushed")
	} else {
		mustClose(t, o)
	}
}

// TestCommit folds overlays into what is below them.
func TestCommit(t *testing.T) {
	ctx := context.Background()
	content := testContent(oddSize)
	s := newStack(t, content, 2)
	s.write(t, 1, "first", 100)
	o := s.open(t, 2)
	mustWrite(t, o, []byte("second"), 400_000)
	mustWrite(t, o, []byte("both"), 102)
	if err := o.Discard(600_000, 200_000); err != nil {
		t.Fatal(err)
	}
	if err := o.Commit(ctx, nil); !errors.Is(err, syscall.EROFS) {
		t.Fatalf("Commit to what is open to be read: %v", err)
	}
	mustClose(t, o)
	want := bytes.Clone(content)
	copy(want[100:], "first")
	copy(want[400_000:], "second")
	copy(want[102:], "both")
	clear(want[600_000:800_000])

	// The second into the first.
	lower := s.layers[0]
	lower.Base, lower.BasePath = must[*block.File](t)(block.OpenFile(s.base, block.FileOptions{ReadOnly: true})), s.base
	upper := s.layers[1]
	upper.Base = must[*block.Overlay](t)(block.OpenOverlay(lower))
	o = must[*block.Overlay](t)(block.OpenOverlay(upper))
	cancelled, cancel := context.WithCancel(ctx)
	if err := o.Commit(cancelled, func(done, total int64) { cancel() }); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled, Commit says %v", err)
	}
	if !bytes.Equal(contentOf(t, o), want) {
		t.Error("a Commit that is cut short changes what is read")
	}
	mustClose(t, o)
	// Over another base, or without it, it is refused all the same.
	alone := upper
	alone.Base, alone.BasePath = must[*block.File](t)(block.OpenFile(s.base, block.FileOptions{ReadOnly: true})), s.base
	if _, err := block.OpenOverlay(alone); err == nil || !strings.Contains(err.Error(), "it was made over another overlay") {
		t.Errorf("after a Commit that was cut short, without what it is over: %v", err)
	}
	mustClose(t, alone.Base)
	lower.Base = must[*block.File](t)(block.OpenFile(s.base, block.FileOptions{ReadOnly: true}))
	upper.Base = must[*block.Overlay](t)(block.OpenOverlay(lower))
	o = must[*block.Overlay](t)(block.OpenOverlay(upper))
	last := int64(0)
	if err := o.Commit(ctx, func(done, total int64) { last = total - done }); err != nil || last != 0 {
		t.Fatalf("Commit: %v, with %d bytes to do", err, last)
	}
	if b := o.Blocks(); b.Held != 0 || b.Zero != 0 || space(t, upper.Overlay) > 0 {
		t.Errorf("the overlay has %+v, and takes %d bytes, after a Commit", b, space(t, upper.Overlay))
	}
	mustWrite(t, o, []byte("third"), 900_000) // it goes on
	copy(want[900_000:], "third")
	mustClose(t, o)
	if !bytes.Equal(must[[]byte](t)(os.ReadFile(s.base)), content) {
		t.Error("the base has changed")
	}
	o = s.open(t, 2)
	if !bytes.Equal(contentOf(t, o), want) {
		t.Error("opened again it reads as something else")
	}
	if err := o.Close(); err != nil {
		t.Fatal(err)
	}

	// And both into the base.
	for n := 2; n > 0; n-- {
		opts := s.layers[n-1]
		if n == 1 {
			opts.Base, opts.BasePath = must[*block.File](t)(block.OpenFile(s.base, block.FileOptions{})), s.base
		} else {
			lower.Base = must[*block.File](t)(block.OpenFile(s.base, block.FileOptions{ReadOnly: true}))
			opts.Base = must[*block.Overlay](t)(block.OpenOverlay(lower))
		}
		o := must[*block.Overlay](t)(block.OpenOverlay(opts))
		if err := o.Commit(ctx, nil); err != nil {
			t.Fatal(err)
		}
		mustClose(t, o)
	}
	if !bytes.Equal(must[[]byte](t)(os.ReadFile(s.base)), want) {
		t.Error("after all was committed, the base reads as something else")
	}
	// One that was cut short is over the base that has come of it, and no other.
	s.write(t, 1, "again", 0)
	cut := s.layers[0]
	cut.Base, cut.BasePath = must[*block.File](t)(block.OpenFile(s.base, block.FileOptions{})), s.base
	o = must[*block.Overlay](t)(block.OpenOverlay(cut))
	cancelled, cancel = context.WithCancel(ctx)
	if err := o.Commit(cancelled, func(done, total int64) { cancel() }); err != nil && !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	cancel()
	mustClose(t, o)
	mustClose(t, s.open(t, 1))
	setModTime(t, s.base, time.Date(2033, 1, 2, 3, 4, 5, 6000, time.UTC))
	if _, err := s.try(1, block.OverlayOptions{}); err == nil || !strings.Contains(err.Error(), "last modified at") {
		t.Errorf("over a base that has changed since a Commit was cut short: %v", err)
	}
	setModTime(t, s.base, time.Now())
	o = must[block.Device](t)(s.try(1, block.OverlayOptions{AnyBase: true})).(*block.Overlay)
	if err := o.Rebase(ctx, block.RebaseOptions{Base: must[*block.File](t)(block.OpenFile(s.base, block.FileOptions{ReadOnly: true})), BasePath: s.base, SameContents: true}); err != nil {
		t.Fatal(err)
	}
	mustClose(t, o)
	// The second was made over a first that held blocks.
	if _, err := s.try(2, block.OverlayOptions{}); err == nil {
		t.Error("the second overlay opens over a first that holds nothing any more")
	}
	mustClose(t, s.open(t, 1))
}

// TestRebase puts overlays over another base.
func TestRebase(t *testing.T) {
	ctx := context.Background()
	content := testContent(oddSize)
	s := newStack(t, content, 1)
	s.write(t, 1, "own", 70_000)
	want := bytes.Clone(content)
	copy(want[70_000:], "own")

	other := newStack(t, content, 2)
	changed := bytes.Clone(content)
	clear(changed[1<<18 : 1<<18+100_000])                   // the old base has data there
	copy(changed[20_000:], bytes.Repeat([]byte{9}, 20_000)) // and here a hole
	copy(changed[70_000:], bytes.Repeat([]byte{8}, 100))    // this is held
	copy(changed[oddSize-5:], []byte{1, 2, 3, 4, 5})        // the last block, which is short
	if err := os.WriteFile(other.base, changed, 0o600); err != nil {
		t.Fatal(err)
	}
	other.write(t, 1, "a base that is an overlay", 900_000)

	o := s.open(t, 1)
	if err := o.Rebase(ctx, block.RebaseOptions{Base: block.NewMemory(oddSize + 1)}); err == nil || !strings.Contains(err.Error(), "1060922") {
		t.Errorf("Rebase to a base of another size: %v", err)
	}
	cancelled, cancel := context.WithCancel(ctx)
	cancel()
	if err := o.Rebase(cancelled, block.RebaseOptions{Base: block.NewMemory(oddSize)}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled, Rebase says %v", err)
	}
	base := must[block.Device](t)(other.try(1, block.OverlayOptions{ReadOnly: true}))
	done := int64(0)
	if err := o.Rebase(ctx, block.RebaseOptions{Base: base, Progress: func(d, _ int64) { done = d }}); err != nil || done != oddSize {
		t.Fatalf("Rebase: %v, with %d bytes done", err, done)
	}
	if !bytes.Equal(contentOf(t, o), want) {
		t.Error("over another base it reads as something else")
	}
	if b := o.Blocks(); b.Held+b.Zero > 7 {
		t.Errorf("it holds %+v, where six blocks differ", b)
	}
	mustWrite(t, o, []byte("goes on"), 123)
	copy(want[123:], "goes on")
	mustClose(t, o)

	if _, err := s.try(1, block.OverlayOptions{}); err == nil {
		t.Error("it opens over the base that it had")
	}
	opts := s.layers[0]
	opts.Base = must[block.Device](t)(other.try(1, block.OverlayOptions{ReadOnly: true}))
	o = must[*block.Overlay](t)(block.OpenOverlay(opts))
	if !bytes.Equal(contentOf(t, o), want) {
		t.Error("opened again it reads as something else")
	}
	mustClose(t, o)

	// A base that was only touched.
	touched := newStack(t, content, 1)
	touched.write(t, 1, "own", 70_000)
	setModTime(t, touched.base, time.Date(2033, 1, 2, 3, 4, 5, 6000, time.UTC))
	if _, err := touched.try(1, block.OverlayOptions{}); err == nil || !strings.Contains(err.Error(), "drafter device rebase --same-contents") {
		t.Fatalf("over a base that was touched, opening says %v", err)
	}
	o = must[block.Device](t)(touched.try(1, block.OverlayOptions{AnyBase: true})).(*block.Overlay)
	same := must[*block.File](t)(block.OpenFile(touched.base, block.FileOptions{ReadOnly: true}))
	if err := o.Rebase(ctx, block.RebaseOptions{Base: same, BasePath: touched.base, SameContents: true}); err != nil {
		t.Fatal(err)
	}
	mustClose(t, o)
	o = touched.open(t, 1)
	if b := o.Blocks(); b.Held != 1 {
		t.Errorf("it holds %+v", b)
	}
	mustClose(t, o)
}

// TestInspect reads what overlays consist of.
func TestInspect(t *testing.T) {
	s := newStack(t, testContent(oddSize), 2)
	s.write(t, 1, "data", 100_000)
	inspect := func(n int) *block.OverlayInfo {
		t.Helper()
		return must[*block.OverlayInfo](t)(block.InspectOverlay(s.layers[n].Overlay, s.layers[n].State))
	}
	modified := func(path string) time.Time {
		t.Helper()
		return must[os.FileInfo](t)(os.Stat(path)).ModTime()
	}
	info := inspect(0)
	if info.Size != oddSize || info.BlockSize != 64<<10 || info.Blocks != (block.OverlayBlocks{Total: 17, Held: 1}) || !info.Clean || info.InUse || info.BaseIsOverlay ||
		info.Allocated == 0 || !info.Modified.Equal(modified(s.layers[0].Overlay)) || !info.Flushed.Equal(modified(s.layers[0].State)) || !info.BaseModTime.Equal(modified(s.base)) {
		t.Errorf("it says %+v", info)
	}
	o := s.open(t, 2)
	defer o.Close()
	if err := errors.Join(o.Discard(1<<19, 64<<10), o.Flush()); err != nil {
		t.Fatal(err)
	}
	mustWrite(t, o, []byte("the end"), oddSize-7)
	if info := inspect(0); !info.InUse {
		t.Errorf("of one that is read by another it says %+v", info)
	}
	info = inspect(1)
	if !info.InUse || info.Clean || !info.BaseIsOverlay || info.Blocks != (block.OverlayBlocks{Total: 33, Zero: 2}) {
		t.Errorf("of one in use it says %+v", info)
	}
	if err := o.Flush(); err != nil {
		t.Fatal(err)
	}
	var changes []string
	for r, held := range inspect(1).Changes() {
		changes = append(changes, fmt.Sprint(r, held))
	}
	want := []string{fmt.Sprint(block.Range{Offset: 1 << 19, Length: 64 << 10}, false), fmt.Sprint(block.Range{Offset: 1 << 20, Length: oddSize - 1<<20}, true)}
	if !slices.Equal(changes, want) {
		t.Errorf("changes are %v, want %v", changes, want)
	}

	if err := os.Truncate(s.layers[1].Overlay, 4096); err != nil {
		t.Fatal(err)
	}
	if _, err := block.InspectOverlay(s.layers[1].Overlay, s.layers[1].State); err == nil || !strings.Contains(err.Error(), "4096") {
		t.Errorf("of one that was truncated it says %v", err)
	}
	if _, err := block.InspectOverlay(s.base, s.base); err == nil || !strings.Contains(err.Error(), "not the state of an overlay") {
		t.Errorf("of something else it says %v", err)
	}
}
