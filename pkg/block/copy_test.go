package block_test

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/drafter-vm/drafter/pkg/block"
)

// plain hides what a device can do besides.
type plain struct{ block.Device }

// failing fails reads from an offset on.
type failing struct {
	block.Device
	from int64
}

func (f failing) ReadAt(p []byte, off int64) (int, error) {
	if off+int64(len(p)) > f.from {
		return 0, syscall.EIO
	}
	return f.Device.ReadAt(p, off)
}

func memoryOf(t testing.TB, content []byte) *block.Memory {
	d := block.NewMemory(int64(len(content)))
	mustWrite(t, d, content, 0)
	return d
}

func sparseContent() []byte {
	content := make([]byte, 5<<20+777)
	for _, r := range [][2]int{{0, 10}, {100_000, 100_001}, {1 << 20, 2 << 20}, {3<<20 - 5000, 3<<20 + 5000}, {len(content) - 1, len(content)}} {
		for i := r[0]; i < r[1]; i++ {
			content[i] = byte(1 + i%255)
		}
	}
	return content
}

func TestCopy(t *testing.T) {
	content := sparseContent()
	for _, test := range []struct {
		name   string
		src    block.Device
		opts   block.CopyOptions
		dirty  bool // the destination is full of something else
		sparse bool // the copy must be
	}{
		{name: "memory", src: memoryOf(t, content), dirty: true, sparse: true},
		{name: "without extents", src: plain{memoryOf(t, content)}, dirty: true, sparse: true},
		{name: "zeroed", src: memoryOf(t, content), opts: block.CopyOptions{Zeroed: true}, sparse: true},
		{name: "concurrent", src: memoryOf(t, content), opts: block.CopyOptions{Concurrency: 4}, dirty: true, sparse: true},
		{name: "empty", src: block.NewMemory(int64(len(content))), dirty: true, sparse: true},
	} {
		t.Run(test.name, func(t *testing.T) {
			dst := newFile(t, int64(len(content)))
			defer dst.Close()
			if test.dirty {
				mustWrite(t, dst, bytes.Repeat([]byte{0xee}, len(content)), 0)
			}
			var last, calls int64
			test.opts.Progress = func(done, total int64) {
				if done < last || total != int64(len(content)) {
					t.Errorf("progress is %d of %d after %d", done, total, last)
				}
				last = done
				calls++
			}
			if err := block.Copy(t.Context(), dst, test.src, test.opts); err != nil {
				t.Fatal(err)
			}
			if last != int64(len(content)) || calls == 0 {
				t.Errorf("progress ended at %d", last)
			}
			if equal, at, err := block.Equal(t.Context(), dst, test.src); err != nil || !equal {
				t.Errorf("the copy differs at %d, %v", at, err)
			}
			if err := dst.Flush(); err != nil {
				t.Fatal(err)
			}
			if n := space(t, dst.Path()); test.sparse && n > 2<<20 {
				t.Errorf("the copy takes %d bytes", n)
			}
		})
	}
	t.Run("other size", func(t *testing.T) {
		if err := block.Copy(t.Context(), block.NewMemory(10), block.NewMemory(11), block.CopyOptions{}); err == nil {
			t.Error("it succeeds")
		}
	})
	t.Run("source fails", func(t *testing.T) {
		for _, n := range []int{1, 4} {
			err := block.Copy(t.Context(), block.NewMemory(int64(len(content))), failing{memoryOf(t, content), 3 << 20}, block.CopyOptions{Concurrency: n})
			if !errors.Is(err, syscall.EIO) {
				t.Errorf("error is %v", err)
			}
		}
	})
	t.Run("cancelled", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		err := block.Copy(ctx, block.NewMemory(int64(len(content))), memoryOf(t, content), block.CopyOptions{Progress: func(int64, int64) { cancel() }})
		if !errors.Is(err, context.Canceled) {
			t.Errorf("error is %v", err)
		}
	})
}

func TestEqual(t *testing.T) {
	content := sparseContent()
	a := memoryOf(t, content)
	for _, at := range []int{0, 5, 50_000, 1<<20 + 1, 2<<20 - 1, 2 << 20, len(content) - 1} {
		other := bytes.Clone(content)
		other[at] ^= 0xff
		for _, b := range []block.Device{memoryOf(t, other), plain{memoryOf(t, other)}} {
			if equal, where, err := block.Equal(t.Context(), a, b); err != nil || equal || where != int64(at) {
				t.Errorf("devices that differ at %d: %v, %d, %v", at, equal, where, err)
			}
		}
	}
	if equal, _, err := block.Equal(t.Context(), a, block.NewMemory(a.Size()+1)); err != nil || equal {
		t.Errorf("devices of other sizes: %v, %v", equal, err)
	}
}

func TestDigest(t *testing.T) {
	content := sparseContent()
	digest := func(d block.Device) [16]byte { return must[[16]byte](t)(block.Digest(t.Context(), d)) }
	want := digest(memoryOf(t, content))
	file := newFile(t, int64(len(content)))
	defer file.Close()
	mustWrite(t, file, content, 0)
	if digest(file) != want || digest(plain{memoryOf(t, content)}) != want {
		t.Error("the digest depends on how a device keeps its contents")
	}
	// Any change changes it: of a byte, of the order of pages, of the size.
	seen := map[[16]byte]string{want: "nothing"}
	note := func(what string, d block.Device) {
		t.Helper()
		got := digest(d)
		if other, ok := seen[got]; ok {
			t.Errorf("changing %s gives the digest of changing %s", what, other)
		}
		seen[got] = what
	}
	changed := bytes.Clone(content)
	changed[len(changed)-1]++
	note("the last byte", memoryOf(t, changed))
	changed = bytes.Clone(content)
	copy(changed[1<<20:], content[1<<20+4096:1<<20+8192])
	copy(changed[1<<20+4096:], content[1<<20:1<<20+4096])
	note("the order", memoryOf(t, changed))
	note("the size", memoryOf(t, append(bytes.Clone(content), 0)))
	note("all", block.NewMemory(0))
	note("all, too", block.NewMemory(4096))
	note("a page", memoryOf(t, bytes.Repeat([]byte{1}, 4096)))

	// The digest of a device is part of the migration protocol. These were computed with xxhsum -H2.
	for _, test := range []struct {
		d    block.Device
		want string
	}{
		{block.NewMemory(0), goldenEmpty},
		{memoryOf(t, append(bytes.Repeat([]byte("a"), 4096), 'b')), goldenTwoPages},
	} {
		if got := digest(test.d); hex.EncodeToString(got[:]) != test.want {
			t.Errorf("the digest of %d bytes is %x, want %s", test.d.Size(), got, test.want)
		}
	}

	t.Run("incremental", func(t *testing.T) {
		var sum, half block.PageSum
		for off := 0; off < len(content); off += block.PageSize {
			page := content[off:min(off+block.PageSize, len(content))]
			if off%(2*block.PageSize) == 0 {
				half.Add(int64(off), page)
			} else {
				sum.Add(int64(off), page)
			}
		}
		sum.Join(half)
		if sum.Digest(int64(len(content))) != want {
			t.Error("the sum of parts is not the whole")
		}
		junk := bytes.Repeat([]byte{3}, 4096)
		sum.Add(0, junk)
		sum.Remove(0, junk)
		if sum.Digest(int64(len(content))) != want {
			t.Error("a page that was added and removed leaves a trace")
		}
	})
}

func TestReplaceFile(t *testing.T) {
	content := sparseContent()
	dir := t.TempDir()
	path := filepath.Join(dir, "device")
	onlyFile := func(t *testing.T) {
		t.Helper()
		if entries := must[[]os.DirEntry](t)(os.ReadDir(dir)); len(entries) != 1 || entries[0].Name() != "device" {
			t.Errorf("the folder holds %v", entries)
		}
	}
	if err := block.ReplaceFile(t.Context(), path, memoryOf(t, content)); err != nil {
		t.Fatal(err)
	}
	if info := must[os.FileInfo](t)(os.Stat(path)); info.Mode().Perm() != 0o600 {
		t.Errorf("a new file has mode %v", info.Mode())
	}
	if n := space(t, path); n > 2<<20 {
		t.Errorf("the file takes %d bytes", n)
	}
	onlyFile(t)
	t.Run("keeps mode", func(t *testing.T) {
		if err := os.Chmod(path, 0o640); err != nil {
			t.Fatal(err)
		}
		if err := block.ReplaceFile(t.Context(), path, memoryOf(t, content[1:])); err != nil {
			t.Fatal(err)
		}
		if info := must[os.FileInfo](t)(os.Stat(path)); info.Mode().Perm() != 0o640 {
			t.Errorf("the file has mode %v", info.Mode())
		}
		if got := must[[]byte](t)(os.ReadFile(path)); !bytes.Equal(got, content[1:]) {
			t.Error("contents differ")
		}
		onlyFile(t)
	})
	t.Run("follows links", func(t *testing.T) {
		link := filepath.Join(t.TempDir(), "link")
		if err := os.Symlink(path, link); err != nil {
			t.Fatal(err)
		}
		if err := block.ReplaceFile(t.Context(), link, memoryOf(t, content[2:])); err != nil {
			t.Fatal(err)
		}
		if got := must[[]byte](t)(os.ReadFile(path)); !bytes.Equal(got, content[2:]) {
			t.Error("contents differ")
		}
		onlyFile(t)
	})
	t.Run("leaves the old", func(t *testing.T) {
		err := block.ReplaceFile(t.Context(), path, failing{memoryOf(t, content), 3 << 20})
		if !errors.Is(err, syscall.EIO) || !strings.Contains(err.Error(), path) {
			t.Errorf("error is %v", err)
		}
		if got := must[[]byte](t)(os.ReadFile(path)); !bytes.Equal(got, content[2:]) {
			t.Error("the old contents are gone")
		}
		onlyFile(t)
	})
}

func TestFileOptions(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "device")
	if err := os.WriteFile(path, []byte("contents"), 0o600); err != nil {
		t.Fatal(err)
	}
	d := must[*block.File](t)(block.OpenFile(path, block.FileOptions{ReadOnly: true}))
	if _, err := d.WriteAt([]byte("x"), 0); !errors.Is(err, syscall.EROFS) || !strings.Contains(err.Error(), path) {
		t.Errorf("WriteAt: %v", err)
	}
	if err := d.Discard(0, 1); !errors.Is(err, syscall.EROFS) {
		t.Errorf("Discard: %v", err)
	}
	if err := d.Flush(); err != nil {
		t.Errorf("Flush: %v", err)
	}
	if err := os.Truncate(path, 3); err != nil {
		t.Fatal(err)
	}
	if _, err := d.ReadAt(make([]byte, 8), 0); !errors.Is(err, io.ErrUnexpectedEOF) || !strings.Contains(err.Error(), path) {
		t.Errorf("ReadAt of a file that was truncated: %v", err)
	}
	mustClose(t, d)
	for _, test := range []struct {
		name string
		err  error
	}{
		{"missing", second(block.OpenFile(filepath.Join(dir, "missing"), block.FileOptions{}))},
		{"folder", second(block.OpenFile(dir, block.FileOptions{ReadOnly: true}))},
		{"character device", second(block.OpenFile("/dev/null", block.FileOptions{}))},
		{"exists", second(block.CreateFile(path, 10))},
		{"negative", second(block.CreateFile(filepath.Join(dir, "new"), -1))},
		{"too large", second(block.CreateFile(filepath.Join(dir, "new"), 1<<62))},
	} {
		if test.err == nil {
			t.Errorf("%s: it opens", test.name)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "new")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a file is left: %v", err)
	}
}

func second[T any](_ T, err error) error { return err }

func TestIsZero(t *testing.T) {
	p := make([]byte, 200_000)
	for _, n := range []int{0, 1, 4096, 65536, 65537, 200_000} {
		if !block.IsZero(p[:n]) {
			t.Errorf("%d zeros are not zero", n)
		}
		if n > 0 {
			p[n-1] = 1
			if block.IsZero(p[:n]) {
				t.Errorf("%d zeros and a one are zero", n-1)
			}
			p[n-1] = 0
		}
	}
}

const (
	goldenEmpty    = "2c0a8a99dc147d5445c3b49d035665b2"
	goldenTwoPages = "a2ebe2ff4fa3a570eab44d47c4cf7325"
)
