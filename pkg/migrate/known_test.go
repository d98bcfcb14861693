package migrate

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/wire"
)

// someBase is a device of a few chunks of hashes with holes, zeros that are no holes, and a last page that is not whole.
func someBase(tb testing.TB) *block.Memory {
	m := block.NewMemory(3*chunkPages*block.PageSize + 1000)
	p := make([]byte, 5*block.PageSize)
	for i, off := range []int64{0, 100 * block.PageSize, chunkPages*block.PageSize - 8192, m.Size() - 1000 - 5*block.PageSize} {
		fill(p, uint64(i))
		clear(p[block.PageSize : 2*block.PageSize])
		if _, err := m.WriteAt(p, off); err != nil {
			tb.Fatal(err)
		}
	}
	if _, err := m.WriteAt([]byte("the end"), m.Size()-7); err != nil {
		tb.Fatal(err)
	}
	return m
}

func digestOfDevice(tb testing.TB, d block.Device) wire.Digest {
	sum, err := block.Digest(context.Background(), d)
	if err != nil {
		tb.Fatal(err)
	}
	return sum
}

func TestIndexBase(t *testing.T) {
	for name, d := range map[string]block.Device{
		"some": someBase(t), "empty": block.NewMemory(0), "zeros": block.NewMemory(1 << 20), "short": block.NewMemory(10),
		"without extents": struct{ block.Device }{someBase(t)},
	} {
		x, err := IndexBase(context.Background(), d)
		if err != nil {
			t.Fatal(name, err)
		}
		if want := digestOfDevice(t, d); x.Digest() != want || x.Size() != d.Size() {
			t.Errorf("%s: got %x of %d bytes, want %x of %d", name, x.Digest(), x.Size(), want, d.Size())
		}
	}

	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := IndexBase(ctx, someBase(t)); !errors.Is(err, context.Canceled) {
		t.Errorf("canceled: got error %v", err)
	}
	closed := someBase(t)
	closed.Close()
	if _, err := IndexBase(context.Background(), closed); !errors.Is(err, os.ErrClosed) {
		t.Errorf("closed: got error %v", err)
	}
	for _, r := range []block.Range{
		{Offset: 8192, Length: 4097}, {Offset: 12288, Length: 4096}, {Offset: 1 << 40, Length: 4096}, {Offset: 4096, Length: math.MaxInt64},
		{Offset: 0, Length: 0}, {Offset: 0, Length: -1}, {Offset: -4096, Length: 8192},
	} {
		if x, err := IndexBase(context.Background(), wrongExtents{block.NewMemory(12288), r}); err == nil {
			t.Errorf("data said to be %d bytes at %d of 12288: got %x", r.Length, r.Offset, x.Digest())
		}
	}
}

// wrongExtents says that it has data where it may have none.
type wrongExtents struct {
	block.Device
	says block.Range
}

func (w wrongExtents) NextData(int64) (block.Range, error) { return w.says, nil }

// A digest that began as a base's and had pages replaced is the digest of the device with those pages.
func TestDigestCloneGoesOn(t *testing.T) {
	base := someBase(t)
	x, err := IndexBase(context.Background(), base)
	if err != nil {
		t.Fatal(err)
	}
	before := x.Digest()
	d := x.pages.clone()
	p := make([]byte, 2*block.PageSize)
	fill(p, 9)
	for _, off := range []int64{0, 101 * block.PageSize, 2 * chunkPages * block.PageSize} {
		if _, err := base.WriteAt(p, off); err != nil {
			t.Fatal(err)
		}
		d.write(off, p)
	}
	if err := base.Discard(chunkPages*block.PageSize-block.PageSize, 4*block.PageSize); err != nil {
		t.Fatal(err)
	}
	d.zero(chunkPages*block.PageSize-block.PageSize, 4*block.PageSize)
	if got, want := d.sum(), digestOfDevice(t, base); got != want {
		t.Errorf("got %x, want %x", got, want)
	}
	if x.pages.sum() != before || x.Digest() != before {
		t.Error("the index changed with its clone")
	}
}

// writeFile makes a file with the contents of d that is old enough to be remembered.
func writeFile(t *testing.T, path string, d block.Device) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := io.Copy(f, io.NewSectionReader(d, 0, d.Size())); err != nil {
		t.Fatal(err)
	}
}

func TestBaseIndexFile(t *testing.T) {
	x, err := IndexBase(context.Background(), someBase(t))
	if err != nil {
		t.Fatal(err)
	}
	id := fileIdentity{size: x.Size(), mtime: 1e18, ctime: 1e18 + 5, ino: 7}
	var b bytes.Buffer
	if err := writeBaseIndex(&b, id, x); err != nil {
		t.Fatal(err)
	}
	if want := indexHead + 4*indexChunkSize + 16; b.Len() != want {
		t.Errorf("%d bytes, want %d", b.Len(), want)
	}
	got, err := readBaseIndex(bytes.NewReader(b.Bytes()), id)
	if err != nil {
		t.Fatal(err)
	}
	if got.Digest() != x.Digest() || got.Size() != x.Size() {
		t.Errorf("got %x of %d bytes, want %x of %d", got.Digest(), got.Size(), x.Digest(), x.Size())
	}
	again := new(bytes.Buffer)
	if err := writeBaseIndex(again, id, got); err != nil || !bytes.Equal(again.Bytes(), b.Bytes()) {
		t.Errorf("does not write what it read: %v", err)
	}

	for _, other := range []fileIdentity{
		{id.size + 1, id.mtime, id.ctime, id.ino}, {id.size, id.mtime + 1, id.ctime, id.ino},
		{id.size, id.mtime, id.ctime + 1, id.ino}, {id.size, id.mtime, id.ctime, id.ino + 1}, {0, id.mtime, id.ctime, id.ino},
	} {
		if _, err := readBaseIndex(bytes.NewReader(b.Bytes()), other); err == nil {
			t.Errorf("index of %+v taken for %+v", id, other)
		}
	}
	for _, at := range []int{0, 9, 20, 30, 45, 55, indexHead + 3, indexHead + 1000, b.Len() - 20, b.Len() - 1} {
		damaged := bytes.Clone(b.Bytes())
		damaged[at] ^= 4
		if _, err := readBaseIndex(bytes.NewReader(damaged), id); err == nil {
			t.Errorf("damage at %d was not noticed", at)
		}
	}
	for _, n := range []int{0, 10, indexHead, indexHead + 100, b.Len() - 16, b.Len() - 1} {
		if _, err := readBaseIndex(bytes.NewReader(b.Bytes()[:n]), id); err == nil {
			t.Errorf("%d of %d bytes were taken for all", n, b.Len())
		}
	}
	if _, err := readBaseIndex(io.MultiReader(&b, strings.NewReader("x")), id); err == nil {
		t.Error("a byte too many was not noticed")
	}
}

func TestOpenBaseIndex(t *testing.T) {
	ctx, log := context.Background(), slog.New(slog.DiscardHandler)
	dir := t.TempDir()
	path, cache := filepath.Join(dir, "base"), filepath.Join(dir, "base.index")
	base := someBase(t)
	writeFile(t, path, base)
	open := func() *BaseIndex {
		t.Helper()
		x, err := OpenBaseIndex(ctx, path, cache, log)
		if err != nil {
			t.Fatal(err)
		}
		if want := digestOfDevice(t, base); x.Digest() != want {
			t.Fatalf("got %x, want %x", x.Digest(), want)
		}
		return x
	}
	open()
	if _, err := os.Stat(cache); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("index of a file that just changed was kept: %v", err)
	}

	// The time of the last change of an inode cannot be set: put an index where an older base would have got it.
	plant := func(x *BaseIndex) {
		t.Helper()
		id, err := identify(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := saveBaseIndex(cache, id, x); err != nil {
			t.Fatal(err)
		}
	}
	planted, err := IndexBase(ctx, block.NewMemory(base.Size()))
	if err != nil {
		t.Fatal(err)
	}
	plant(planted)
	if x, err := OpenBaseIndex(ctx, path, cache, log); err != nil || x.Digest() != planted.Digest() {
		t.Errorf("the index that is kept was not used: %v", err)
	}
	for what, change := range map[string]func() error{
		"content": func() error {
			_, err := base.WriteAt([]byte("x"), 4711)
			writeFile(t, path, base)
			return err
		},
		"time":    func() error { return os.Chtimes(path, time.Time{}, time.Now().Add(-time.Hour)) },
		"replace": func() error { writeFile(t, path+"2", base); return os.Rename(path+"2", path) },
		"damage":  func() error { return os.WriteFile(cache, []byte("DRAFTIDX"), 0o600) },
	} {
		t.Run(what, func(t *testing.T) {
			plant(planted)
			if err := change(); err != nil {
				t.Fatal(err)
			}
			open()
		})
	}

	if _, err := OpenBaseIndex(ctx, path, filepath.Join(dir, "nowhere", "index"), log); err != nil {
		t.Errorf("an index that cannot be kept is an error: %v", err)
	}
	if _, err := OpenBaseIndex(ctx, dir, "", log); err == nil {
		t.Error("a folder has an index")
	}
	if _, err := OpenBaseIndex(ctx, filepath.Join(dir, "missing"), "", nil); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing base: got error %v", err)
	}
	left, err := filepath.Glob(filepath.Join(dir, ".*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func FuzzReadBaseIndex(f *testing.F) {
	x, err := IndexBase(context.Background(), someBase(f))
	if err != nil {
		f.Fatal(err)
	}
	id := fileIdentity{size: x.Size(), mtime: 1e18, ctime: 1e18, ino: 7}
	var b bytes.Buffer
	if err := writeBaseIndex(&b, id, x); err != nil {
		f.Fatal(err)
	}
	f.Add(b.Bytes())
	f.Add(b.Bytes()[:indexHead])
	f.Add(id.head(1 << 40))
	f.Fuzz(func(t *testing.T, in []byte) {
		x, err := readBaseIndex(bytes.NewReader(in), id)
		if err != nil {
			return
		}
		var out bytes.Buffer
		if err := writeBaseIndex(&out, id, x); err != nil || !bytes.Equal(out.Bytes(), in) {
			t.Error("an index that was read is written differently", err)
		}
	})
}

func BenchmarkIndexBase(b *testing.B) {
	const size = 256 << 20
	base := newMemfd(b, size)
	defer base.Close()
	p := make([]byte, 1<<20)
	for off := int64(0); off < size; off += int64(len(p)) {
		fill(p, uint64(off))
		if _, err := base.WriteAt(p, off); err != nil {
			b.Fatal(err)
		}
	}
	b.SetBytes(size)
	for b.Loop() {
		if _, err := IndexBase(context.Background(), base); err != nil {
			b.Fatal(err)
		}
	}
}

// basedTarget is a target whose devices start as bases.
type basedTarget struct {
	*target
	bases map[string]*block.Memory
	asked int
}

func (t *basedTarget) Prepare(ctx context.Context, m *wire.Manifest) ([]block.Device, error) {
	devices, err := t.target.Prepare(ctx, m)
	if err != nil {
		return nil, err
	}
	return devices, t.copyTo(ctx, m, devices)
}

func (t *basedTarget) copyTo(ctx context.Context, m *wire.Manifest, devices []block.Device) error {
	for i, d := range m.Devices {
		if base := t.bases[d.Name]; base != nil {
			if err := block.Copy(context.WithoutCancel(ctx), devices[i], base, block.CopyOptions{}); err != nil {
				return err
			}
		}
	}
	return nil
}

func (t *basedTarget) Bases(ctx context.Context, m *wire.Manifest) (out []*BaseIndex, err error) {
	t.asked++
	for _, d := range m.Devices {
		var x *BaseIndex
		if base := t.bases[d.Name]; base != nil {
			if x, err = IndexBase(ctx, base); err != nil {
				return nil, err
			}
		}
		out = append(out, x)
	}
	return out, nil
}

// fromBases gives the rig bases that both sides hold, from which the source's devices then differ in a few pages: new
// data, zeros where there was data, data where there were zeros.
func fromBases(t *testing.T, r *rig) *basedTarget {
	t.Helper()
	to := &basedTarget{target: r.target, bases: map[string]*block.Memory{}}
	r.dest.Target = to
	p := make([]byte, 2*block.PageSize)
	for i := range r.source.Devices {
		d := &r.source.Devices[i]
		base := block.NewMemory(d.Device.Size())
		if err := block.Copy(t.Context(), base, d.Device, block.CopyOptions{}); err != nil {
			t.Fatal(err)
		}
		x, err := IndexBase(t.Context(), base)
		if err != nil {
			t.Fatal(err)
		}
		d.Base, to.bases[d.Name] = x, base
		for n, off := range []int64{3, 10, 40, 41, 90} {
			if off *= block.PageSize; off+int64(len(p)) > base.Size() {
				break
			}
			fill(p, uint64(1000+n))
			if n%2 == 1 {
				clear(p)
			}
			if _, err := d.Device.WriteAt(p, off); err != nil {
				t.Fatal(err)
			}
		}
	}
	return to
}

func TestMoveFromBase(t *testing.T) {
	for _, busy := range []bool{false, true} {
		for _, streams := range []int{1, 3} {
			t.Run(fmt.Sprintf("busy=%t, streams=%d", busy, streams), func(t *testing.T) {
				noLeak(t)
				r := newRig(smallShape)
				r.guest.busy = busy
				to := fromBases(t, r)
				a, b := pipes(streams)
				o := r.move(t.Context(), a, b)
				if r.verify(t, o) != "destination" {
					t.Fatal(o.srcErr, o.dstErr)
				}
				if to.asked != 1 || o.src.SameBytes == 0 {
					t.Errorf("target was asked %d times for bases, %d bytes were not sent", to.asked, o.src.SameBytes)
				}
				if limit := int64(40 * block.PageSize); !busy && (o.src.DataBytes > limit || o.src.WireBytes > limit+200_000) { // and the state
					t.Errorf("%d bytes of data, %d in all for %d changed ones", o.src.DataBytes, o.src.WireBytes, limit)
				}
			})
		}
	}
}

func TestMoveFromOtherBase(t *testing.T) {
	for name, spoil := range map[string]func(*rig, *basedTarget){
		"other contents": func(_ *rig, to *basedTarget) {
			for _, base := range to.bases {
				if base.Size() > 0 {
					_, _ = base.WriteAt([]byte("other"), base.Size()-5)
				}
			}
		},
		"none":             func(_ *rig, to *basedTarget) { to.bases = nil },
		"not a BaseTarget": func(r *rig, to *basedTarget) { r.dest.Target = to.target },
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(smallShape[:3])
			to := fromBases(t, r)
			spoil(r, to)
			a, b := pipes(2)
			o := r.move(t.Context(), a, b)
			if r.verify(t, o) != "destination" {
				t.Fatal(o.srcErr, o.dstErr)
			}
			if o.src.SameBytes != 0 {
				t.Errorf("%d bytes were not sent", o.src.SameBytes)
			}
		})
	}
	t.Run("a base that is not what its index says", func(t *testing.T) {
		r := newRig(smallShape[:1])
		to := fromBases(t, r)
		lying := &lyingTarget{to, r.source.Devices[0].Base}
		_, _ = to.bases["memory"].WriteAt([]byte("other"), 50*block.PageSize)
		r.dest.Target = lying
		a, b := pipes(1)
		o := r.move(t.Context(), a, b)
		defer r.stop()
		// Nobody reads the base again: what was promised for good is not compared.
		if o.srcErr != nil || o.dstErr != nil {
			t.Error(o.srcErr, o.dstErr)
		}
	})
}

// TestMoveRequiresBase: a device whose base is to be there does not travel as a whole, but to who has none of any.
func TestMoveRequiresBase(t *testing.T) {
	for name, c := range map[string]struct {
		spoil   func(*rig, *basedTarget)
		refused bool
	}{
		"the same": {func(*rig, *basedTarget) {}, false},
		"other contents": {func(_ *rig, to *basedTarget) {
			base := to.bases["disk"]
			_, _ = base.WriteAt([]byte("other"), base.Size()-5)
		}, true},
		"none":             {func(_ *rig, to *basedTarget) { delete(to.bases, "disk") }, true},
		"not a BaseTarget": {func(r *rig, to *basedTarget) { r.dest.Target = to.target }, false},
	} {
		t.Run(name, func(t *testing.T) {
			noLeak(t)
			r := newRig(smallShape)
			to := fromBases(t, r)
			for i := range r.source.Devices {
				r.source.Devices[i].RequireBase = r.source.Devices[i].Name == "disk"
			}
			c.spoil(r, to)
			a, b := pipes(2)
			o := r.move(t.Context(), a, b)
			if !c.refused {
				if r.verify(t, o) != "destination" {
					t.Error(o.srcErr, o.dstErr)
				}
				return
			}
			if r.verify(t, o) != "source" {
				t.Error("it has moved")
			}
			for _, err := range []error{o.srcErr, o.dstErr} {
				if err == nil || !strings.Contains(err.Error(), `device "disk": the destination does not have the base`) {
					t.Errorf("error is %v", err)
				}
			}
			if o.src.DataBytes != 0 {
				t.Errorf("%d bytes were sent before", o.src.DataBytes)
			}
		})
	}
	r := newRig(smallShape[:1])
	r.source.Devices[0].RequireBase = true
	a, _ := pipes(1)
	if _, err := Send(t.Context(), a, r.source); err == nil || !strings.Contains(err.Error(), "set SourceDevice.Base") {
		t.Errorf("without a base: %v", err)
	}
}

// lyingTarget promises a base that it does not hold.
type lyingTarget struct {
	*basedTarget
	index *BaseIndex
}

func (t *lyingTarget) Bases(context.Context, *wire.Manifest) ([]*BaseIndex, error) {
	return []*BaseIndex{t.index}, nil
}

// What an overlay does not hold is not even read.
func TestMoveReadsOnlyChanges(t *testing.T) {
	base := block.NewMemory(64 * block.PageSize)
	p := make([]byte, block.PageSize)
	for off := int64(0); off < base.Size(); off += 2 * block.PageSize {
		fill(p, uint64(off))
		if _, err := base.WriteAt(p, off); err != nil {
			t.Fatal(err)
		}
	}
	x, err := IndexBase(t.Context(), base)
	if err != nil {
		t.Fatal(err)
	}
	device := block.NewMemory(base.Size())
	if err := block.Copy(t.Context(), device, base, block.CopyOptions{}); err != nil {
		t.Fatal(err)
	}
	changed := []block.Range{{Offset: 8 * block.PageSize, Length: 4 * block.PageSize}, {Offset: 40 * block.PageSize, Length: block.PageSize}, {Offset: 62 * block.PageSize, Length: 2 * block.PageSize}}
	fill(p, 1)
	for _, off := range []int64{8, 11, 40, 63} {
		if _, err := device.WriteAt(p, off*block.PageSize); err != nil {
			t.Fatal(err)
		}
	}
	if err := device.Discard(10*block.PageSize, block.PageSize); err != nil {
		t.Fatal(err)
	}
	read := &readCounter{Device: device}
	r := newRig(nil)
	r.source.Devices = []SourceDevice{{Name: "disk", Device: read, Base: x, Changed: func(off int64) (block.Range, error) {
		for _, c := range changed {
			if c.End() > off {
				from := max(off, c.Offset)
				return block.Range{Offset: from, Length: c.End() - from}, nil
			}
		}
		return block.Range{}, io.EOF
	}}}
	r.target.sizes["disk"] = base.Size()
	r.dest.Target = &basedTarget{target: r.target, bases: map[string]*block.Memory{"disk": base}}
	a, b := pipes(1)
	o := r.move(t.Context(), a, b)
	if n := read.n.Load(); n > 7*block.PageSize {
		t.Errorf("%d bytes were read", n)
	}
	if r.verify(t, o) != "destination" {
		t.Fatal(o.srcErr, o.dstErr)
	}
	if o.src.DataBytes != 4*block.PageSize || o.src.ZeroBytes != block.PageSize || o.src.SameBytes != 59*block.PageSize {
		t.Errorf("sent %d data, %d zeros, and left out %d", o.src.DataBytes, o.src.ZeroBytes, o.src.SameBytes)
	}
}

// readCounter counts what is read.
type readCounter struct {
	block.Device
	n atomic.Int64
}

func (c *readCounter) ReadAt(p []byte, off int64) (int, error) {
	c.n.Add(int64(len(p)))
	return c.Device.ReadAt(p, off)
}

// basedLateTarget starts as bases, and runs its guest before all is there.
type basedLateTarget struct {
	*lateTarget
	based *basedTarget
}

func (t *basedLateTarget) Prepare(ctx context.Context, m *wire.Manifest) ([]block.Device, error) {
	devices, err := t.lateTarget.Prepare(ctx, m)
	if err != nil {
		return nil, err
	}
	return devices, t.based.copyTo(ctx, m, devices)
}

func (t *basedLateTarget) Bases(ctx context.Context, m *wire.Manifest) ([]*BaseIndex, error) {
	return t.based.Bases(ctx, m)
}

// What is listed as missing is sent, also if it has become what it was in the base, or what it was when it was sent.
func TestPostCopyFromBase(t *testing.T) {
	for name, policy := range map[string]Policy{"after rounds": {MaxCycles: 2}, "at once": {}} {
		t.Run(name, func(t *testing.T) {
			noLeak(t)
			r := newRig(smallShape)
			for i := range r.source.Devices {
				r.source.Devices[i].Policy = policy
			}
			to := fromBases(t, r)
			late := r.postCopy(3)
			r.dest.Target = &basedLateTarget{late, to}
			r.source.Devices[0].Tracker = &rewriting{Tracker: r.source.Devices[0].Tracker}
			a, b := pipes(2)
			o := r.move(t.Context(), a, b)
			if r.verify(t, o) != "destination" {
				t.Fatal(o.srcErr, o.dstErr)
			}
			if o.src.SameBytes == 0 || o.src.LateBytes == 0 || late.postpones != 1 {
				t.Errorf("%d bytes were not sent, %d sent late", o.src.SameBytes, o.src.LateBytes)
			}
		})
	}
}

// rewriting is a tracker of a guest that writes to some pages what they hold already.
type rewriting struct{ block.Tracker }

func (w *rewriting) Collect(ctx context.Context) ([]block.Range, error) {
	list, err := w.Tracker.Collect(ctx)
	return union(list, []block.Range{{Offset: 8 * block.PageSize, Length: 40 * block.PageSize}}), err
}

// What is not sent says nothing of a link that is busy all the time, and as much as what is sent of one that is not.
func TestBandwidthOfSame(t *testing.T) {
	for _, c := range []struct{ link, want float64 }{{0, 100e6}, {1, 10e6}, {0.5, 55e6}} {
		h := []History{{Rounds: []Round{{Bytes: 100e6, Same: 90e6, Duration: Millis(time.Second), link: c.link}}}}
		sent := sweeps(h, func(*History) bool { return true })
		if got := bandwidth(sent); got != c.want || sent[0].bytes != 100e6 {
			t.Errorf("link busy for %.1f of the time: got %.0f bytes/s, %d bytes", c.link, got, sent[0].bytes)
		}
	}
}
