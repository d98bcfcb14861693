package vmpackage

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestNames(t *testing.T) {
	for _, name := range []string{"disk", "0", "a.b-c_d", strings.Repeat("x", 64)} {
		if err := CheckName(name); err != nil {
			t.Error(err)
		}
	}
	for _, name := range []string{"", ".", "..", "-x", ".x", "a/b", "A", "a b", "ä", "a\x00", strings.Repeat("x", 65)} {
		if CheckName(name) == nil {
			t.Errorf("name %q was accepted", name)
		}
	}
	// No additional disk can take the file of a known device.
	for _, d := range knownDevices {
		if other, ok := strings.CutSuffix(d.file, ".img"); ok && other != d.name {
			t.Errorf("a disk %q would have the file of %q", other, d.name)
		}
		if DefaultFile(d.name) != d.file || checkFile(d.file) != nil {
			t.Errorf("device %q: file %q", d.name, d.file)
		}
	}
	if got := DefaultFile("data"); got != "data.img" {
		t.Errorf("file of data is %q", got)
	}
}

func TestConfig(t *testing.T) {
	b, err := EncodeConfig(map[string]any{"hypervisor": "qemu"})
	if err != nil {
		t.Fatal(err)
	}
	if len(b) != 4096 || !bytes.HasPrefix(b, []byte("{\n  \"hypervisor\": \"qemu\"\n}  ")) || !bytes.HasSuffix(b, []byte(" \n")) {
		t.Errorf("config device is %d bytes: %.40q…", len(b), b)
	}
	raw, err := DecodeConfig(b)
	if err != nil {
		t.Fatal(err)
	}
	var got map[string]string
	if err := json.Unmarshal(raw, &got); err != nil || got["hypervisor"] != "qemu" {
		t.Errorf("decoded %v, %v", got, err)
	}
	// Exactly full, and one byte more.
	for length, want := range map[int]int{4096 - 1: 4096, 4096: 8192} {
		b, err := EncodeConfig(map[string]string{"x": strings.Repeat("y", length-len("{\n  \"x\": \"\"\n}"))})
		if err != nil || len(b) != want {
			t.Errorf("%d bytes of JSON become %d (%v), want %d", length, len(b), err, want)
		}
	}
	for _, bad := range []any{[]int{1}, nil, "x", map[string]string{"x": strings.Repeat("y", maxConfigSize)}} {
		if _, err := EncodeConfig(bad); err == nil {
			t.Errorf("%.20v… was accepted", bad)
		}
	}
	for _, bad := range []string{"", "   ", "[]", "null", `{"a":1}x`, `{"a":1`, "{}\x00"} {
		if _, err := DecodeConfig([]byte(bad)); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
}

func TestManifestRefuses(t *testing.T) {
	good := Manifest{Format: formatName, FormatVersion: 1, Devices: []Device{describeDevice("disk", "x"), describeDevice("data", "y")}}
	for _, tt := range []struct {
		name   string
		change func(m *Manifest)
		want   string
	}{
		{"version 0", func(m *Manifest) { m.FormatVersion = 0 }, "less than 1"},
		{"no devices", func(m *Manifest) { m.Devices = nil }, "no devices"},
		{"many devices", func(m *Manifest) { m.Devices = make([]Device, 257) }, "257 devices"},
		{"name", func(m *Manifest) { m.Devices[0].Name = "Disk" }, "contains 'D'"},
		{"same name", func(m *Manifest) { m.Devices[1].Name = "disk" }, "listed twice"},
		{"same file", func(m *Manifest) { m.Devices[1].File = "rootfs.ext4" }, "another device's"},
		{"file is a path", func(m *Manifest) { m.Devices[0].File = "a/b" }, "not allowed"},
		{"file is the manifest", func(m *Manifest) { m.Devices[0].File = ManifestFile }, "not allowed"},
		{"hidden file", func(m *Manifest) { m.Devices[0].File = ".." }, "not allowed"},
		{"no file", func(m *Manifest) { m.Devices[0].File = "" }, "not allowed"},
		{"size 0", func(m *Manifest) { m.Devices[0].Size = 0 }, "size 0"},
		{"negative data", func(m *Manifest) { m.Devices[0].DataBytes = -1 }, "dataBytes -1"},
		{"more data than size", func(m *Manifest) { m.Devices[0].DataBytes = 2 }, "dataBytes 2"},
		{"short digest", func(m *Manifest) { m.Devices[0].SHA256 = "ab" }, "64 lower-case hex"},
		{"upper case digest", func(m *Manifest) { m.Devices[0].SHA256 = strings.Repeat("AB", 32) }, "64 lower-case hex"},
		{"machine is no object", func(m *Manifest) { m.Machine = json.RawMessage(`[1]`) }, "not an object"},
		{"machine contradicts", func(m *Manifest) { m.Machine = json.RawMessage(`{"hypervisor":"qemu"}`) }, "not what machine says"},
		{"hypervisor without machine", func(m *Manifest) { m.Hypervisor = "qemu" }, "not what machine says"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := good
			m.Devices = slices.Clone(good.Devices)
			tt.change(&m)
			if err := m.check(); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error is %v, want %q", err, tt.want)
			}
		})
	}
	if err := good.check(); err != nil {
		t.Error(err)
	}
}

func TestDataExtents(t *testing.T) {
	b := make([]byte, 5*blockSize+100)
	for _, i := range []int{0, blockSize, 3*blockSize + 17, 5*blockSize + 99} {
		b[i] = 1
	}
	got := slices.Collect(dataExtents(b, 1<<20))
	want := []extent{{1 << 20, 2 * blockSize}, {1<<20 + 3*blockSize, blockSize}, {1<<20 + 5*blockSize, 100}}
	if !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// TestScanFindsHoles compares what scan finds in a file with holes and in the same file without.
func TestScanFindsHoles(t *testing.T) {
	dir := t.TempDir()
	for _, d := range testDevices(t, dir) {
		content, err := os.ReadFile(d.Path)
		if err != nil {
			t.Fatal(err)
		}
		full := filepath.Join(dir, "full")
		if err := os.WriteFile(full, content, 0o600); err != nil {
			t.Fatal(err)
		}
		scanned := func(path string) string {
			f, err := os.Open(path)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			c, err := scan(t.Context(), f, int64(len(content)), func(int64) {})
			if err != nil {
				t.Fatal(err)
			}
			b, _ := json.Marshal([]any{c.sha256, c.xxh3, c.data, len(c.extents)})
			return string(b)
		}
		if a, b := scanned(d.Path), scanned(full); a != b {
			t.Errorf("device %q: %s with holes, %s without", d.Name, a, b)
		}
	}
}

func TestSparseMap(t *testing.T) {
	for _, tt := range []struct {
		size    int64
		extents []extent
		want    string
	}{
		{8192, nil, "1\n8192\n0\n"},
		{8192, []extent{{4096, 4096}}, "1\n4096\n4096\n"},
		{12288, []extent{{0, 4096}}, "2\n0\n4096\n12288\n0\n"},
	} {
		b := sparseMap(tt.size, tt.extents)
		if got := strings.TrimRight(string(b), "\x00"); got != tt.want || len(b)%512 != 0 {
			t.Errorf("map is %q (%d bytes), want %q", got, len(b), tt.want)
		}
	}
}

// TestFragmented checks that the map of the worst device stays short enough for archive/tar, with nothing lost.
func TestFragmented(t *testing.T) {
	for _, n := range []int{1, 60_000, 500_000, 1 << 20} {
		var extents []extent
		for i := range n {
			extents = append(extents, extent{int64(i) * 3 * blockSize, blockSize})
		}
		size := int64(n) * 3 * blockSize
		fitted := fitExtents(size, extents)
		if len(sparseMap(size, fitted)) > maxSparseMap {
			t.Errorf("%d extents: the map is too long", n)
		}
		if n == 1 && len(fitted) != 1 || n > 100_000 && len(fitted) == n {
			t.Errorf("%d extents became %d", n, len(fitted))
		}
		i := 0
		for _, e := range extents {
			for fitted[i].offset+fitted[i].length <= e.offset {
				i++
			}
			if f := fitted[i]; e.offset < f.offset || e.offset+e.length > f.offset+f.length {
				t.Fatalf("extent %v is lost", e)
			}
		}
		var b bytes.Buffer
		if err := (tarWriter{&b}).sparseFile("memory.bin", size, fitted); err != nil {
			t.Fatal(err)
		}
		if h, err := tar.NewReader(&b).Next(); err != nil || h.Size != size || h.Name != "memory.bin" {
			t.Errorf("%d extents: archive/tar reads %+v, %v", n, h, err)
		}
	}
}

// TestLargeHeaders checks sizes that do not fit the header.
func TestLargeHeaders(t *testing.T) {
	for _, size := range []int64{maxOctal, maxOctal + 1, 1 << 40} {
		var b bytes.Buffer
		if err := (tarWriter{&b}).file("vmlinux", size); err != nil {
			t.Fatal(err)
		}
		if h, err := tar.NewReader(&b).Next(); err != nil || h.Size != size || h.Name != "vmlinux" {
			t.Errorf("size %d: archive/tar reads %+v, %v", size, h, err)
		}
		b.Reset()
		if err := (tarWriter{&b}).sparseFile("memory.bin", 2*size, []extent{{4096, size}}); err != nil {
			t.Fatal(err)
		}
		r := tar.NewReader(&b)
		if h, err := r.Next(); err != nil || h.Size != 2*size || h.Name != "memory.bin" {
			t.Errorf("sparse, size %d: archive/tar reads %+v, %v", size, h, err)
		}
		if n, err := io.CopyN(io.Discard, r, 4096); n != 4096 {
			t.Errorf("sparse, size %d: the hole has %d bytes (%v)", size, n, err)
		}
	}
}

func TestPaxRecord(t *testing.T) {
	for n := range 200 {
		r := paxRecord("k", strings.Repeat("v", n))
		length, rest, _ := strings.Cut(r, " ")
		if len(length)+1+len(rest) != len(r) || length != itoa(len(r)) {
			t.Fatalf("record %q has %d bytes", r, len(r))
		}
	}
}

func itoa(n int) string { b, _ := json.Marshal(n); return string(b) }

// benchDevice is 1 GiB, of which 256 MiB are data that compresses by half.
func benchDevice(b *testing.B) File {
	path := filepath.Join(b.TempDir(), "memory")
	f, err := os.Create(path)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(1 << 30); err != nil {
		b.Fatal(err)
	}
	chunk := make([]byte, 1<<20)
	for i := range 256 {
		for j := 0; j < len(chunk); j += 2 {
			chunk[j] = byte((i + j) * (j ^ i) >> 3)
		}
		if _, err := f.WriteAt(chunk, int64(i)*4<<20); err != nil {
			b.Fatal(err)
		}
	}
	return File{"memory", path}
}

func BenchmarkPack(b *testing.B) {
	d := benchDevice(b)
	b.SetBytes(1 << 30)
	for b.Loop() {
		mustPack(b, filepath.Join(filepath.Dir(d.Path), "app"), []File{d}, PackOptions{})
	}
}

func BenchmarkExtract(b *testing.B) {
	d := benchDevice(b)
	archive := filepath.Join(filepath.Dir(d.Path), "app")
	mustPack(b, archive, []File{d}, PackOptions{})
	b.SetBytes(1 << 30)
	for b.Loop() {
		if _, err := Extract(b.Context(), archive, []File{d}, ExtractOptions{}); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkScan(b *testing.B) {
	d := benchDevice(b)
	f, err := os.Open(d.Path)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	b.SetBytes(1 << 30)
	for b.Loop() {
		if _, err := scan(b.Context(), f, 1<<30, func(int64) {}); err != nil {
			b.Fatal(err)
		}
	}
}
