package runner

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/zeebo/xxh3"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/vmm"
)

// compatible is a backend that would run anything, and runs nothing.
type compatible struct{ vmm.Backend }

func (compatible) Compatible(context.Context, vmm.Spec) error { return nil }

const testDiskSize = 1<<20 + 3*block.PageSize

// restsOn returns an instance that nothing runs, with a state device and a disk in dir, made anew if there is none.
func restsOn(t *testing.T, dir string, inPlace bool, cfg Config) *Instance {
	t.Helper()
	cfg.Backend = compatible{}
	for name, size := range map[string]int64{StateDevice: StateDeviceSize, "disk": testDiskSize} {
		c := DeviceConfig{Name: name, Base: filepath.Join(dir, name)}
		if !inPlace {
			c.Overlay, c.State = filepath.Join(dir, "overlay", name), filepath.Join(dir, "overlay", name+".blocks")
		}
		if _, err := os.Stat(c.Base); err != nil {
			f, err := block.CreateFile(c.Base, size)
			if err == nil {
				err = f.Close()
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		cfg.Devices = append(cfg.Devices, c)
	}
	i := &Instance{cfg: cfg.withDefaults(), log: slog.New(slog.DiscardHandler)}
	for _, c := range cfg.Devices {
		d, err := openDevice(c, openExisting, 0, liveFiles{})
		if err != nil {
			t.Fatal(err)
		}
		i.devices = append(i.devices, d)
	}
	return i
}

// leave closes what restsOn opened, as a crash would but for flushing.
func (i *Instance) leave(t *testing.T) {
	t.Helper()
	for _, d := range i.devices {
		if err := d.close(); err != nil {
			t.Fatal(err)
		}
	}
}

func content(t *testing.T, d block.Device) []byte {
	t.Helper()
	p := make([]byte, d.Size())
	if _, err := d.ReadAt(p, 0); err != nil && err != io.EOF {
		t.Fatal(err)
	}
	return p
}

// scribble writes and discards at random, in d and in want.
func scribble(t *testing.T, d block.Device, want []byte, seed uint64) {
	t.Helper()
	random := rand.New(rand.NewPCG(seed, 0))
	for range 60 {
		off := random.Int64N(int64(len(want)))
		n := min(1+random.Int64N(3*block.PageSize), int64(len(want))-off)
		part := want[off : off+n]
		var err error
		if random.IntN(4) == 0 {
			clear(part)
			err = d.Discard(off, n)
		} else {
			for k := range part {
				part[k] = byte(random.Uint32())
			}
			_, err = d.WriteAt(part, off)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// TestCommitPoint has a guest write to a disk whose commit point is kept, and then everything that can become of it.
func TestCommitPoint(t *testing.T) {
	for _, inPlace := range []bool{false, true} {
		name := map[bool]string{false: "overlay", true: "in place"}[inPlace]
		state := bytes.Repeat([]byte("state"), 1000)
		// run leaves what a machine leaves that died, and returns the disk as it was before and after.
		run := func(t *testing.T, dir string) (before, after []byte) {
			t.Helper()
			i := restsOn(t, dir, inPlace, Config{KeepCommitPoint: true})
			defer i.leave(t)
			disk := i.device("disk")
			before = make([]byte, testDiskSize)
			scribble(t, disk.Device, before, 1)
			if err := errors.Join(disk.Flush(), WriteSaved(i.device(StateDevice), state), i.keepPoint()); err != nil {
				t.Fatal(err)
			}
			if err := writeRecord(i.device(StateDevice), Record{Status: Running, Kept: true, Layered: true, Length: int64(len(state)), Sum: xxh3.Hash(state)}); err != nil {
				t.Fatal(err)
			}
			after = bytes.Clone(before)
			scribble(t, disk.front(), after, 2)
			if err := disk.front().Flush(); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(content(t, disk.front()), after) || !bytes.Equal(content(t, disk.Device), before) {
				t.Fatal("the guest does not see its writes, or the commit point has changed")
			}
			return before, after
		}
		check := func(t *testing.T, dir string, want []byte) {
			t.Helper()
			i := restsOn(t, dir, inPlace, Config{})
			defer i.leave(t)
			if !bytes.Equal(content(t, i.device("disk").Device), want) {
				t.Error("the disk holds something else")
			}
			if left, _ := filepath.Glob(filepath.Join(dir, "*", "*"+layerSuffix+"*")); len(left) > 0 {
				t.Errorf("%v is left", left)
			}
		}
		t.Run(name+"/rolled back", func(t *testing.T) {
			dir := t.TempDir()
			before, _ := run(t, dir)
			var since time.Time
			for n := range 3 { // cut short after the record, and tried again
				i := restsOn(t, dir, inPlace, Config{Rollback: true, KeepCommitPoint: true})
				if err := i.rollBack(t.Context()); err != nil {
					t.Fatal(err)
				}
				back := i.RolledBack()
				if n == 0 {
					since = back.Since
				}
				if (back.Discarded > 0) != (n == 0) || back.Discarded%block.PageSize != 0 || since.IsZero() {
					t.Errorf("attempt %d: %+v", n, back)
				}
				if got, err := ReadSaved(i.device(StateDevice), false); err != nil || !bytes.Equal(got, state) {
					t.Errorf("attempt %d: %d bytes of device state, %v", n, len(got), err)
				}
				i.leave(t)
			}
			i := restsOn(t, dir, inPlace, Config{})
			if err := i.dropLayers(); err != nil { // as each start does
				t.Error(err)
			}
			i.leave(t)
			check(t, dir, before)
		})
		t.Run(name+"/saved", func(t *testing.T) {
			dir := t.TempDir()
			_, after := run(t, dir)
			i := restsOn(t, dir, inPlace, Config{})
			disk := i.device("disk")
			if err := disk.openLayer(nil); err != nil {
				t.Fatal(err)
			}
			i.point.record = Record{Kept: true}
			if err := i.forgetPoint(Running); err != nil {
				t.Fatal(err)
			}
			if r, err := ReadRecord(i.device(StateDevice)); err != nil || r.Kept || !r.Layered || r.Length != 0 {
				t.Errorf("%+v, %v: the commit point is about to change and still on record", r, err)
			}
			if err := i.fold(t.Context()); err != nil {
				t.Fatal(err)
			}
			i.voidLayers()
			i.leave(t)
			check(t, dir, after)
		})
		t.Run(name+"/booted", func(t *testing.T) {
			dir := t.TempDir()
			_, after := run(t, dir)
			canceled, cancel := context.WithCancel(t.Context())
			cancel()
			for _, ctx := range []context.Context{canceled, t.Context()} { // cut short, and done
				i := restsOn(t, dir, inPlace, Config{})
				if err := i.foldLayers(ctx); (err == nil) != (ctx.Err() == nil) {
					t.Errorf("error %v", err)
				}
				if r, err := ReadRecord(i.device(StateDevice)); err != nil || r.Kept || !r.Layered || r.Status != Running {
					t.Errorf("record %+v, %v", r, err)
				}
				i.leave(t)
			}
			check(t, dir, after)
		})
		t.Run(name+"/void", func(t *testing.T) {
			// As where a power loss brings back files that had been removed, under a record of later.
			dir := t.TempDir()
			before, _ := run(t, dir)
			i := restsOn(t, dir, inPlace, Config{})
			err := writeRecord(i.device(StateDevice), Record{Status: Running})
			if err := errors.Join(err, i.foldLayers(t.Context())); err != nil {
				t.Error(err)
			}
			i.leave(t)
			check(t, dir, before)
		})
		t.Run(name+"/migrates on", func(t *testing.T) {
			dir := t.TempDir()
			before, after := run(t, dir)
			i := restsOn(t, dir, inPlace, Config{})
			defer i.leave(t)
			disk := i.device("disk")
			if err := disk.openLayer(nil); err != nil {
				t.Fatal(err)
			}
			i.point.front.Store(true)
			for _, d := range i.Devices() {
				if d.Config.Name != "disk" {
					continue
				}
				if !bytes.Equal(content(t, d.Block), after) {
					t.Error("what is sent is not what the guest has")
				}
				if inPlace != (d.Overlay == nil) {
					t.Fatalf("it has the overlay %v", d.Overlay)
				}
				// Outside of what may have changed everything is the base's, which is zero.
				for off := int64(0); !inPlace && off < testDiskSize; {
					r, err := d.Overlay.NextChange(off)
					if err == io.EOF {
						r.Offset = testDiskSize
					} else if err != nil {
						t.Fatal(err)
					}
					if !block.IsZero(after[off:r.Offset]) || r.Offset < off {
						t.Fatalf("changes from %d to %d are not known", off, r.Offset)
					}
					off = r.End()
				}
			}
			if bytes.Equal(before, after) {
				t.Error("nothing was written")
			}
		})
	}
}

func TestNoCommitPoint(t *testing.T) {
	state := []byte("state")
	whole := Record{Length: int64(len(state)), Sum: xxh3.Hash(state)}
	for name, tt := range map[string]struct {
		change func(*Record)
		want   []string
	}{
		"not kept":     {func(r *Record) { r.Status = Running }, []string{"--keep-commit-point", "--boot"}},
		"still coming": {func(r *Record) { r.Status, r.Migration = Running, "M1" }, []string{"not all of its memory had arrived", "M1", "--raddr"}},
		"shut down":    {func(r *Record) { r.Status = ShutDown }, []string{"shut down", "--boot"}},
		"in doubt":     {func(r *Record) { r.Status, r.Migration, r.Kept = Moved, "M1", true }, []string{"given to another peer", "M1"}},
		"moved":        {func(r *Record) { r.Status, r.Settled, r.Kept = Moved, true, true }, []string{"owns it"}},
		"receiving":    {func(r *Record) { r.Status, r.Kept = Receiving, true }, []string{"receive it again"}},
		"discarded":    {func(r *Record) { r.Status, r.Kept = Discarded, true }, []string{"receive it again"}},
		"damaged":      {func(r *Record) { r.Status, r.Kept, r.Sum = Running, true, 1 }, []string{"corrupt", "--boot"}},
	} {
		t.Run(name, func(t *testing.T) {
			i := restsOn(t, t.TempDir(), false, Config{Rollback: true, ForceOwner: true})
			defer i.leave(t)
			dev := i.device(StateDevice)
			if err := WriteSaved(dev, state); err != nil {
				t.Fatal(err)
			}
			r := whole
			tt.change(&r)
			if err := writeRecord(dev, r); err != nil {
				t.Fatal(err)
			}
			before := content(t, dev)
			err := i.rollBack(t.Context())
			if !errors.Is(err, ErrNoCommitPoint) {
				t.Fatalf("error %v, want ErrNoCommitPoint", err)
			}
			for _, want := range tt.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("the error does not say %q: %v", want, err)
				}
			}
			if !bytes.Equal(content(t, dev), before) || i.RolledBack() != nil {
				t.Error("something was changed")
			}
		})
	}
}

// TestKeptMemory receives into memory that is kept, over something that was kept before.
func TestKeptMemory(t *testing.T) {
	const size = 64 * block.PageSize
	kept := block.NewMemory(size)
	scribble(t, kept, make([]byte, size), 3)
	m := &keptMemory{Device: block.NewMemory(size), kept: kept}
	if _, err := m.NextData(0); err != nil {
		t.Errorf("what was kept before is taken for zeros: %v", err)
	}
	want := make([]byte, size)
	if err := m.Discard(0, size); err != nil {
		t.Fatal(err)
	}
	if r, err := m.NextData(0); err != io.EOF {
		t.Errorf("data at %v, %v", r, err)
	}
	scribble(t, m, want, 4)
	for name, d := range map[string]block.Device{"the guest's": m, "the kept": kept} {
		if !bytes.Equal(content(t, d), want) {
			t.Errorf("%s memory is not what came", name)
		}
	}
}

// BenchmarkKeptDisk is what a disk costs whose commit point is kept, beside one whose is not.
func BenchmarkKeptDisk(b *testing.B) {
	for _, keep := range []bool{false, true} {
		name := map[bool]string{false: "plain", true: "kept"}[keep]
		b.Run(name, func(b *testing.B) {
			const size = 256 << 20
			dir := b.TempDir()
			base := filepath.Join(dir, "disk")
			f, err := block.CreateFile(base, size)
			if err != nil {
				b.Fatal(err)
			}
			if err := f.Close(); err != nil {
				b.Fatal(err)
			}
			d, err := openDevice(DeviceConfig{Name: "disk", Base: base, Overlay: base + ".o", State: base + ".s"}, openExisting, 0, liveFiles{})
			if err != nil {
				b.Fatal(err)
			}
			defer d.close()
			p := bytes.Repeat([]byte{1}, 1<<20)
			for off := int64(0); off < size; off += int64(len(p)) { // what an earlier run has written
				if _, err := d.WriteAt(p, off); err != nil {
					b.Fatal(err)
				}
			}
			if keep {
				if err := d.openLayer(nil); err != nil {
					b.Fatal(err)
				}
			}
			random := rand.New(rand.NewPCG(1, 1))
			b.Run("write 4 KiB", func(b *testing.B) {
				b.SetBytes(4096)
				for b.Loop() {
					if _, err := d.front().WriteAt(p[:4096], random.Int64N(size/4096)*4096); err != nil {
						b.Fatal(err)
					}
				}
			})
			b.Run("read 4 KiB", func(b *testing.B) {
				b.SetBytes(4096)
				for b.Loop() {
					if _, err := d.front().ReadAt(p[:4096], random.Int64N(size/4096)*4096); err != nil {
						b.Fatal(err)
					}
				}
			})
			b.Run("read 1 MiB", func(b *testing.B) {
				b.SetBytes(1 << 20)
				for b.Loop() {
					if _, err := d.front().ReadAt(p, random.Int64N(size/int64(len(p)))*int64(len(p))); err != nil {
						b.Fatal(err)
					}
				}
			})
		})
	}
}
