package runner

import (
	"bytes"
	"encoding/hex"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/ram"
)

func TestWorkingSetGolden(t *testing.T) {
	of := baseState{size: 5 * block.PageSize, mtime: 0x0102, ctime: 0x0304, ino: 0x0506}
	offsets := []int64{4 * block.PageSize, 0, 2 * block.PageSize}
	want := hex.EncodeToString([]byte("DRAFTWSS")) + "0000000000000001" + // version
		"0000000000005000" + "0000000000000102" + "0000000000000304" + "0000000000000506" + // the base
		"0000000000000003" + "00000004" + "00000000" + "00000002" + // pages
		"bc4c6ad80060526c" // checksum
	b := encodeWorkingSet(of, offsets)
	if got := hex.EncodeToString(b); got != want {
		t.Errorf("encoded as\n%s, want\n%s", got, want)
	}
	if back, err := decodeWorkingSet(b, of); err != nil || !slices.Equal(back, offsets) {
		t.Errorf("decoded as %d, %v; want %d", back, err, offsets)
	}
	if none, err := decodeWorkingSet(encodeWorkingSet(of, nil), of); err != nil || len(none) != 0 {
		t.Errorf("one without pages is decoded as %d, %v", none, err)
	}

	for n := range b {
		damaged := bytes.Clone(b)
		damaged[n] ^= 0x40
		if _, err := decodeWorkingSet(damaged, of); err == nil {
			t.Errorf("with byte %d changed it is taken", n)
		}
		if _, err := decodeWorkingSet(b[:n], of); err == nil {
			t.Errorf("cut to %d bytes it is taken", n)
		}
	}
	if _, err := decodeWorkingSet(append(bytes.Clone(b), 0, 0, 0, 0), of); err == nil {
		t.Error("with bytes after its end it is taken")
	}
	for name, other := range map[string]func(*baseState){
		"size": func(s *baseState) { s.size += block.PageSize }, "mtime": func(s *baseState) { s.mtime++ },
		"ctime": func(s *baseState) { s.ctime-- }, "inode": func(s *baseState) { s.ino++ },
	} {
		changed := of
		other(&changed)
		if _, err := decodeWorkingSet(b, changed); err == nil || !strings.Contains(err.Error(), "another base") {
			t.Errorf("of a base of another %s: error %v", name, err)
		}
	}
	if _, err := decodeWorkingSet(encodeWorkingSet(of, []int64{5 * block.PageSize}), of); err == nil || !strings.Contains(err.Error(), "outside") {
		t.Errorf("with a page outside of the base: error %v", err)
	}
}

func FuzzDecodeWorkingSet(f *testing.F) {
	of := baseState{size: 64 * block.PageSize, mtime: 1, ctime: 2, ino: 3}
	f.Add(encodeWorkingSet(of, []int64{0, 63 * block.PageSize, 7 * block.PageSize}))
	f.Add(encodeWorkingSet(of, nil))
	f.Add([]byte(workingSetMagic))
	f.Fuzz(func(t *testing.T, b []byte) {
		offsets, err := decodeWorkingSet(b, of)
		if err != nil {
			return
		}
		if !bytes.Equal(encodeWorkingSet(of, offsets), b) {
			t.Errorf("what was taken is encoded otherwise")
		}
		for _, r := range inBatches(offsets, 16) {
			if r.Offset < 0 || r.Length <= 0 || r.End() > of.size || r.Offset%block.PageSize != 0 || r.Length%block.PageSize != 0 {
				t.Errorf("range %d+%d", r.Offset, r.Length)
			}
		}
	})
}

func TestInBatches(t *testing.T) {
	const p = block.PageSize
	offsets := []int64{9 * p, 3 * p, 4 * p, 8 * p, 3 * p /**/, 5 * p, 0, 1 * p, 7 * p, 2 * p /**/, 6 * p}
	want := []block.Range{{Offset: 3 * p, Length: 2 * p}, {Offset: 8 * p, Length: 2 * p}, {Offset: 0, Length: 3 * p}, {Offset: 5 * p, Length: p}, {Offset: 7 * p, Length: p}, {Offset: 6 * p, Length: p}}
	if got := inBatches(offsets, 5); !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if got := inBatches(nil, 5); got != nil {
		t.Errorf("of no pages: %v", got)
	}
}

// TestWorkingSet has instances find the working set of the base that they start from, or leave it aside.
func TestWorkingSet(t *testing.T) {
	const p = block.PageSize
	dir := t.TempDir()
	base := filepath.Join(dir, "memory.bin")
	if err := os.WriteFile(base, bytes.Repeat([]byte{1}, 32*p), 0o600); err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	// find returns what an instance finds that has been through what is given.
	find := func(instance string, record time.Duration, through func(*device)) workingSet {
		t.Helper()
		log.Reset()
		i := &Instance{log: slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug})), cfg: Config{RecordWorkingSet: record}}
		d, err := openDevice(DeviceConfig{Name: MemoryDevice, Base: base, Overlay: filepath.Join(dir, instance, "overlay"), State: filepath.Join(dir, instance, "state")}, openExisting, 0, liveFiles{})
		if err != nil {
			t.Fatal(err)
		}
		i.devices = []*device{d}
		if through != nil {
			through(d)
		}
		w := i.workingSet()
		i.ahead.end()
		i.leave(t)
		return w
	}
	said := func(what string) {
		t.Helper()
		if !strings.Contains(log.String(), what) || what == "" && log.Len() > 0 {
			t.Errorf("the log has %q, want %q", log.String(), what)
		}
	}

	if w := find("a", 0, nil); w.first != nil || w.record {
		t.Errorf("where there is none, it is %+v", w)
	}
	said("")
	recorded := find("a", time.Second, nil)
	if !recorded.record || recorded.first != nil || recorded.of.size != 32*p {
		t.Errorf("to be recorded: %+v", recorded)
	}
	touched := []int64{7 * p, 31 * p, 6 * p}
	path := filepath.Join(dir, ".memory.bin.workingset")
	if err := replaceFile(path, encodeWorkingSet(recorded.of, touched)); err != nil {
		t.Fatal(err)
	}
	first := []block.Range{{Offset: 6 * p, Length: 2 * p}, {Offset: 31 * p, Length: p}}
	if w := find("b", 0, nil); !slices.Equal(w.first, first) || w.record {
		t.Errorf("where there is one, it is %+v", w)
	}
	said("")
	if w := find("b", time.Second, nil); w.first != nil || !w.record {
		t.Errorf("to be recorded again: %+v", w)
	}

	// Of an instance that was saved, the memory is another.
	saved := func(d *device) {
		if _, err := d.WriteAt([]byte("saved"), 20*p); err != nil {
			t.Fatal(err)
		}
	}
	if w := find("c", 0, saved); w.first != nil {
		t.Errorf("of a memory that was saved, it is %+v", w)
	}
	said("level=DEBUG msg=\"a working set is left aside\"")
	if w := find("c", time.Second, nil); w.record {
		t.Errorf("of a memory that was saved it is to be recorded: %+v", w)
	}
	said("level=WARN msg=\"the working set is not recorded\"")

	// Damaged; then of a base that was changed.
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, bad := range [][]byte{nil, good[:len(good)-1], append(bytes.Clone(good), make([]byte, 1<<20)...), bytes.Repeat([]byte{0xff}, len(good))} {
		if err := os.WriteFile(path, bad, 0o600); err != nil {
			t.Fatal(err)
		}
		if w := find("d", 0, nil); w.first != nil {
			t.Errorf("of %d bytes that are none, it is %+v", len(bad), w)
		}
		said("left aside")
	}
	if err := os.WriteFile(path, good, 0o600); err != nil {
		t.Fatal(err)
	}
	if w := find("d", 0, nil); !slices.Equal(w.first, first) {
		t.Errorf("mended, it is %+v", w)
	}
	if err := os.Chtimes(base, time.Time{}, time.Unix(1, 0)); err != nil {
		t.Fatal(err)
	}
	if w := find("e", 0, nil); w.first != nil {
		t.Errorf("of a base that was changed, it is %+v", w)
	}
	said("another state of it")
}

// TestWorkingSetUnknown: where nothing is told of what is touched, nothing is recorded, and an earlier one stays.
func TestWorkingSetUnknown(t *testing.T) {
	dir := t.TempDir()
	memory, err := ram.Create("test", 8*block.PageSize)
	if err != nil {
		t.Fatal(err)
	}
	defer memory.Close()
	var log bytes.Buffer
	i := &Instance{
		log: slog.New(slog.NewTextHandler(&log, nil)), memory: memory, cfg: Config{RecordWorkingSet: time.Hour},
		devices: []*device{{DeviceConfig: DeviceConfig{Name: MemoryDevice, Base: filepath.Join(dir, "memory.bin")}}},
	}
	if i.filler, err = memory.Fill(t.Context(), block.NewMemory(8*block.PageSize), ram.FillOptions{Record: true}); err != nil {
		t.Fatal(err)
	}
	i.recordWorkingSet(workingSet{record: true})
	i.recording.end() // as by Close, within the hour
	if !strings.Contains(log.String(), "the working set is not recorded") {
		t.Errorf("the log has %q", log.String())
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
		t.Errorf("there are %v (%v)", entries, err)
	}
}

// TestReadAhead has the kernel read parts of a file that it has not cached.
func TestReadAhead(t *testing.T) {
	const size = 8 << 20
	f, err := os.Create(filepath.Join(t.TempDir(), "base"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Write(bytes.Repeat([]byte{1}, size)); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Sync(), unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)); err != nil {
		t.Fatal(err)
	}
	m, err := unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(m)
	// cached is how many pages of a range the kernel has in its page cache.
	cached := func(r block.Range) (n int64) {
		t.Helper()
		vec := make([]byte, r.Length/block.PageSize)
		if _, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&m[r.Offset])), uintptr(r.Length), uintptr(unsafe.Pointer(&vec[0]))); errno != 0 {
			t.Fatal(errno)
		}
		for _, v := range vec {
			n += int64(v & 1)
		}
		return n
	}
	if n := cached(block.Range{Length: size}); n > 0 {
		t.Skipf("the file system of %q keeps %d pages in the page cache", f.Name(), n)
	}
	ranges := []block.Range{{Offset: 1 << 20, Length: 1 << 20}, {Offset: 3 << 20, Length: block.PageSize}, {Offset: 3<<20 + 64<<10, Length: 64 << 10}, {Offset: 8 * block.PageSize, Length: block.PageSize}}
	readAhead(t.Context(), f, ranges)
	for until := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		missing := int64(0)
		for _, r := range ranges {
			missing += r.Length/block.PageSize - cached(r)
		}
		if missing == 0 {
			break
		}
		if time.Now().After(until) {
			t.Fatalf("%d pages are not in the page cache", missing)
		}
	}
	if n := cached(block.Range{Offset: 4 << 20, Length: 4 << 20}); n > 0 {
		t.Errorf("%d pages were read that nobody wants", n)
	}
}
