package vmpackage

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
)

var update = flag.Bool("update", false, "rewrite the golden files")

const testMachine = `{"hypervisor":"qemu","version":"10.0.2","cpuFeatures":["avx2","sse4_2"],"disks":[{"name":"disk"},{"name":"zeta"},{"name":"data"}]}`

// testDevices writes a small package's devices to dir, under file names that are not the default ones.
func testDevices(t testing.TB, dir string) []File {
	t.Helper()
	config, err := EncodeConfig(json.RawMessage(testMachine))
	if err != nil {
		t.Fatal(err)
	}
	random := rand.New(rand.NewPCG(1, 2))
	noise := func(n int) []byte {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(random.Uint32())
		}
		return b
	}
	var devices []File
	// content is pairs of offset and data.
	device := func(name string, size int64, content map[int64][]byte) {
		path := filepath.Join(dir, "my."+name)
		f, err := os.Create(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := f.Truncate(size); err != nil {
			t.Fatal(err)
		}
		for off, b := range content {
			if _, err := f.WriteAt(b, off); err != nil {
				t.Fatal(err)
			}
		}
		devices = append(devices, File{Name: name, Path: path})
	}
	// In an order that is not that of a package.
	device("data", 5<<20, nil)                                                                           // one hole
	device("disk", 3<<20+512, map[int64][]byte{0: noise(10000), 1<<20 - 100: noise(200), 3 << 20: {1}})  // odd end
	device("zeta", 8192, map[int64][]byte{4096: {7}})                                                    // starts with a hole
	device("memory", 40<<20, map[int64][]byte{8192: noise(2 << 20), 17<<20 + 5: {1}, 39 << 20: {0, 0}})  // written zeros
	device("kernel", 123457, map[int64][]byte{0: noise(123457)})                                         // no hole, odd size
	device("state", 1<<20, map[int64][]byte{0: noise(4096), 12288: bytes.Repeat([]byte("state"), 1000)}) // ends with a hole
	device("config", int64(len(config)), map[int64][]byte{0: config})
	return devices
}

var testOrder = []string{"state", "memory", "kernel", "disk", "config", "zeta", "data"}

func mustPack(t testing.TB, path string, devices []File, opts PackOptions) *Manifest {
	t.Helper()
	m, err := Pack(t.Context(), path, devices, opts)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func allocated(t testing.TB, path string) int64 {
	t.Helper()
	stat, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return stat.Sys().(*syscall.Stat_t).Blocks * 512
}

// wantSame fails the test unless both files have the same content.
func wantSame(t *testing.T, name, got, want string) {
	t.Helper()
	g, err := os.ReadFile(got)
	if err != nil {
		t.Fatal(err)
	}
	w, err := os.ReadFile(want)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(g, w) {
		t.Errorf("device %q differs from its original", name)
	}
}

// wantFiles fails the test unless dir holds just these names.
func wantFiles(t *testing.T, dir string, want ...string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	got := []string{}
	for _, e := range entries {
		got = append(got, e.Name())
	}
	slices.Sort(want)
	if !slices.Equal(got, append([]string{}, want...)) {
		t.Errorf("%q holds %q, want %q", dir, got, want)
	}
}

// noLeaks fails the test if it ends with more goroutines or descriptors than now.
func noLeaks(t *testing.T) {
	t.Helper()
	descriptors := func() int {
		entries, _ := os.ReadDir("/proc/self/fd")
		return len(entries)
	}
	goroutines, fds := runtime.NumGoroutine(), descriptors()
	t.Cleanup(func() {
		deadline := time.Now().Add(10 * time.Second)
		for runtime.NumGoroutine() > goroutines || descriptors() > fds {
			if time.Now().After(deadline) {
				buf := make([]byte, 1<<20)
				t.Errorf("goroutines %d → %d, descriptors %d → %d\n%s", goroutines, runtime.NumGoroutine(), fds, descriptors(), buf[:runtime.Stack(buf, true)])
				return
			}
			runtime.Gosched()
		}
	})
}

func TestRoundTrip(t *testing.T) {
	noLeaks(t)
	dir, out := t.TempDir(), t.TempDir()
	devices := testDevices(t, dir)
	archive := filepath.Join(dir, "app.tar.zst")
	m := mustPack(t, archive, devices, PackOptions{})

	if got := m.Names(); !slices.Equal(got, testOrder) {
		t.Errorf("order is %v, want %v", got, testOrder)
	}
	if m.Hypervisor != "qemu" || m.HypervisorVersion != "10.0.2" || !slices.Equal(m.CPUFeatures, []string{"avx2", "sse4_2"}) || string(m.Machine) != testMachine {
		t.Errorf("manifest does not repeat the machine: %+v, %s", m, m.Machine)
	}
	for _, d := range devices {
		content, err := os.ReadFile(d.Path)
		if err != nil {
			t.Fatal(err)
		}
		sum := sha256.Sum256(content)
		if got, _ := m.Device(d.Name); got.SHA256 != hex.EncodeToString(sum[:]) || got.Size != int64(len(content)) {
			t.Errorf("device %q is %+v", d.Name, got)
		}
	}
	if d, _ := m.Device("memory"); d.DataBytes != 2<<20+4096 {
		t.Errorf("memory has %d data bytes, want %d: written zeros are no data", d.DataBytes, 2<<20+4096)
	}
	if read, err := ReadManifest(t.Context(), archive); err != nil || fmt.Sprint(read) != fmt.Sprint(m) {
		t.Errorf("ReadManifest: %v, %v; want %v", read, err, m)
	}
	if _, err := Verify(t.Context(), archive, ExtractOptions{}); err != nil {
		t.Error(err)
	}
	if stat, _ := os.Stat(archive); stat.Mode() != 0o600 || stat.Size() > 3<<20 {
		t.Errorf("archive has mode %v and %d bytes", stat.Mode(), stat.Size())
	}

	// Any order, over files that exist, and in folders that do not.
	var outputs []File
	for _, d := range devices {
		outputs = append(outputs, File{d.Name, filepath.Join(out, "new", d.Name, "file")})
	}
	rand.Shuffle(len(outputs), func(i, j int) { outputs[i], outputs[j] = outputs[j], outputs[i] })
	for range 2 {
		result, err := Extract(t.Context(), archive, outputs, ExtractOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if len(result.Ignored) != 0 {
			t.Errorf("ignored %v", result.Ignored)
		}
		for _, d := range devices {
			path := filepath.Join(out, "new", d.Name, "file")
			wantSame(t, d.Name, path, d.Path)
			wantFiles(t, filepath.Dir(path), "file")
			known, _ := m.Device(d.Name)
			// The file system may need a block or so for itself.
			if got := allocated(t, path); got > known.DataBytes+(64<<10) {
				t.Errorf("device %q: %d bytes are allocated for %d of data: holes were lost", d.Name, got, known.DataBytes)
			}
		}
	}
}

func TestExtractSome(t *testing.T) {
	dir, out := t.TempDir(), t.TempDir()
	devices := testDevices(t, dir)
	archive := filepath.Join(dir, "app.tar.zst")
	mustPack(t, archive, devices, PackOptions{})
	result, err := Extract(t.Context(), archive, []File{{"kernel", filepath.Join(out, "k")}}, ExtractOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{"state", "memory", "disk", "config", "zeta", "data"}; !slices.Equal(result.Ignored, want) {
		t.Errorf("ignored %v, want %v", result.Ignored, want)
	}
	wantFiles(t, out, "k")
}

func TestPackIsDeterministic(t *testing.T) {
	dir := t.TempDir()
	devices := testDevices(t, dir)
	first := filepath.Join(dir, "first")
	mustPack(t, first, devices, PackOptions{Concurrency: 1})
	want, err := os.ReadFile(first)
	if err != nil {
		t.Fatal(err)
	}
	// The same content, without holes, in another order and by other numbers of cores.
	for i, d := range devices {
		content, err := os.ReadFile(d.Path)
		if err != nil {
			t.Fatal(err)
		}
		devices[i].Path = filepath.Join(t.TempDir(), "full")
		if err := os.WriteFile(devices[i].Path, content, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for _, cores := range []int{1, 2, 3, 8, 0} {
		slices.Reverse(devices)
		again := filepath.Join(dir, "again")
		mustPack(t, again, devices, PackOptions{Concurrency: cores})
		got, err := os.ReadFile(again)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("with %d cores the archive differs", cores)
		}
	}
}

func TestLevels(t *testing.T) {
	dir := t.TempDir()
	devices := testDevices(t, dir)
	archive := filepath.Join(dir, "app.tar.zst")
	for l := LevelFastest; l <= LevelBest; l++ {
		if parsed, err := ParseLevel(l.String()); err != nil || parsed != l {
			t.Errorf("ParseLevel(%q) is %v, %v", l, parsed, err)
		}
		mustPack(t, archive, devices, PackOptions{Level: l})
		if _, err := Verify(t.Context(), archive, ExtractOptions{}); err != nil {
			t.Errorf("level %v: %v", l, err)
		}
	}
	if _, err := ParseLevel("11"); err == nil {
		t.Error("level 11 was accepted")
	}
	if _, err := Pack(t.Context(), archive, devices, PackOptions{Level: 11}); err == nil {
		t.Error("Level(11) was accepted")
	}
}

// TestGolden holds the format still: the tar, byte by byte, and that what was written once can be read for ever. The
// compressed bytes may change with the compressor.
func TestGolden(t *testing.T) {
	dir := t.TempDir()
	config, err := EncodeConfig(json.RawMessage(`{"hypervisor":"qemu","version":"10.0.2","disks":[{"name":"disk"}]}`))
	if err != nil {
		t.Fatal(err)
	}
	contents := map[string][]byte{
		"config": config,
		"disk":   append(append(make([]byte, 4096), bytes.Repeat([]byte("x"), 4096)...), make([]byte, 12288)...),
		"state":  []byte("device state"),
	}
	var devices []File
	for name, b := range contents {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		devices = append(devices, File{name, path})
	}
	archive := filepath.Join(dir, "app.tar.zst")
	mustPack(t, archive, devices, PackOptions{})
	packed, err := os.ReadFile(archive)
	if err != nil {
		t.Fatal(err)
	}
	got := decompress(t, packed)
	golden := filepath.Join("testdata", "golden.tar")
	if *update {
		if err := os.WriteFile(golden, got, 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(golden+".zst", packed, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("the archive differs from %s; if that is meant, raise FormatVersion or run with -update", golden)
	}
	var outputs []File
	for name := range contents {
		outputs = append(outputs, File{name, filepath.Join(dir, "out", name)})
	}
	if _, err := Extract(t.Context(), golden+".zst", outputs, ExtractOptions{}); err != nil {
		t.Fatal(err)
	}
	for _, out := range outputs {
		if b, err := os.ReadFile(out.Path); err != nil || !bytes.Equal(b, contents[out.Name]) {
			t.Errorf("device %q of the golden archive differs (%v)", out.Name, err)
		}
	}
}

func decompress(t testing.TB, b []byte) []byte {
	t.Helper()
	d, err := zstd.NewReader(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	out, err := io.ReadAll(d)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// TestGNUTar exchanges packages with the tar of the system, both ways.
func TestGNUTar(t *testing.T) {
	if out, err := exec.Command("tar", "--version").Output(); err != nil || !bytes.Contains(out, []byte("GNU tar")) {
		t.Skip("needs GNU tar")
	}
	if _, err := exec.LookPath("zstd"); err != nil {
		t.Skip("needs the program zstd, which tar calls")
	}
	dir, folder := t.TempDir(), t.TempDir()
	devices := testDevices(t, dir)
	archive := filepath.Join(dir, "app.tar.zst")
	m := mustPack(t, archive, devices, PackOptions{})

	if out, err := exec.Command("tar", "-C", folder, "--zstd", "-xf", archive).CombinedOutput(); err != nil || len(out) > 0 {
		t.Fatalf("tar -xf: %v\n%s", err, out)
	}
	p, err := Open(folder)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range devices {
		got, ok := p.Device(d.Name)
		if !ok {
			t.Fatalf("no device %q", d.Name)
		}
		wantSame(t, d.Name, got.Path, d.Path)
		known, _ := m.Device(d.Name)
		if got := allocated(t, got.Path); got > known.DataBytes+(64<<10) {
			t.Errorf("device %q: tar allocated %d bytes for %d of data", d.Name, got, known.DataBytes)
		}
	}
	if _, err := Verify(t.Context(), folder, ExtractOptions{}); err != nil {
		t.Error(err)
	}

	// What GNU tar makes of the folder is a package too, in each sparse format of pax.
	for _, args := range [][]string{{"--format=posix"}, {"--format=posix", "-S"}, {"--format=posix", "-S", "--sparse-version=0.1"}} {
		again := filepath.Join(dir, "again.tar.zst")
		args := append(append([]string{"-C", folder, "--zstd", "-cf", again}, args...), ManifestFile)
		for _, d := range m.Devices {
			args = append(args, d.File)
		}
		if out, err := exec.Command("tar", args...).CombinedOutput(); err != nil {
			t.Fatalf("tar %v: %v\n%s", args, err, out)
		}
		if _, err := Verify(t.Context(), again, ExtractOptions{}); err != nil {
			t.Errorf("tar %v: %v", args, err)
		}
	}
}

func TestFolder(t *testing.T) {
	noLeaks(t)
	dir := t.TempDir()
	devices := testDevices(t, dir)
	if _, err := Open(dir); !errors.Is(err, ErrNotPackage) {
		t.Errorf("Open without a manifest: %v", err)
	}
	if _, err := WriteManifest(t.Context(), dir, devices, ManifestOptions{SkipDigests: true}); err != nil {
		t.Fatal(err)
	}
	if _, err := Verify(t.Context(), dir, ExtractOptions{}); err == nil || errors.Is(err, ErrCorrupt) {
		t.Errorf("Verify without digests: %v", err)
	}
	if _, err := WriteManifest(t.Context(), dir, devices, ManifestOptions{}); err != nil {
		t.Fatal(err)
	}
	p, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, d := range p.Devices {
		names = append(names, d.Name)
		if d.Path != filepath.Join(dir, "my."+d.Name) {
			t.Errorf("device %q is at %q", d.Name, d.Path)
		}
	}
	if !slices.Equal(names, testOrder) {
		t.Errorf("order is %v, want %v", names, testOrder)
	}
	if _, err := Verify(t.Context(), dir, ExtractOptions{}); err != nil {
		t.Error(err)
	}

	memory, _ := p.Device("memory")
	f, err := os.OpenFile(memory.Path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte{1}, 30<<20); err != nil {
		t.Fatal(err)
	}
	if _, err := Verify(t.Context(), dir, ExtractOptions{}); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), `"memory"`) {
		t.Errorf("Verify of a changed device: %v", err)
	}
	if err := f.Truncate(1 << 20); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), "1048576 bytes, 41943040 in the manifest") {
		t.Errorf("Open with a shorter device: %v", err)
	}
	os.Remove(memory.Path)
	if _, err := Open(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Open without a device: %v", err)
	}
	other := filepath.Join(t.TempDir(), "x")
	if err := os.WriteFile(other, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := WriteManifest(t.Context(), dir, []File{{"disk", other}}, ManifestOptions{}); err == nil || !strings.Contains(err.Error(), "another folder") {
		t.Errorf("WriteManifest with a device elsewhere: %v", err)
	}
}

func TestPackRefuses(t *testing.T) {
	dir := t.TempDir()
	file := func(name, content string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	good, empty := file("good", "content"), file("empty", "")
	config := file("config", testMachine)
	broken := file("broken", "[]")
	pipe := filepath.Join(dir, "pipe")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(good, link); err != nil {
		t.Fatal(err)
	}
	target := filepath.Join(dir, "app.tar.zst")
	for _, tt := range []struct {
		name, path string
		devices    []File
		want       string
	}{
		{"none", target, nil, "no devices"},
		{"twice", target, []File{{"disk", good}, {"disk", good}}, `device "disk" is given twice`},
		{"bad name", target, []File{{"../disk", good}}, `contains '/'`},
		{"missing", target, []File{{"disk", filepath.Join(dir, "no")}}, `device "disk": stat`},
		{"empty", target, []File{{"disk", empty}}, `is empty`},
		{"pipe", target, []File{{"disk", pipe}}, `not a regular file`},
		{"folder", target, []File{{"disk", dir}}, `not a regular file`},
		{"config", target, []File{{"config", broken}}, `device "config": decode machine configuration`},
		{"lost disk", target, []File{{"config", config}, {"disk", good}}, `device "zeta" is missing`},
		{"no folder", filepath.Join(dir, "no", "app"), []File{{"disk", good}}, `no such file`},
		{"over itself", good, []File{{"disk", good}}, `would replace device "disk"`},
		{"over a folder", dir, []File{{"disk", good}}, `not a regular file`},
		{"over a link", link, []File{{"kernel", config}}, `not a regular file`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Pack(t.Context(), tt.path, tt.devices, PackOptions{})
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error is %v, want %q", err, tt.want)
			}
		})
	}
	wantFiles(t, dir, "good", "empty", "config", "broken", "pipe", "link")
}

func TestPackNoticesChange(t *testing.T) {
	noLeaks(t)
	dir := t.TempDir()
	for _, change := range []struct {
		name string
		do   func(f *os.File) error
	}{
		{"data", func(f *os.File) error { _, err := f.WriteAt([]byte("other"), 8192); return err }},
		{"cut", func(f *os.File) error { return f.Truncate(9000) }},
	} {
		t.Run(change.name, func(t *testing.T) {
			path, archive := filepath.Join(t.TempDir(), "disk"), filepath.Join(dir, "app.tar.zst")
			if err := os.WriteFile(path, bytes.Repeat([]byte("disk"), 10000), 0o600); err != nil {
				t.Fatal(err)
			}
			var changed error
			_, err := Pack(t.Context(), archive, []File{{"disk", path}}, PackOptions{Progress: func(p Progress) {
				if p.Stage == StagePack && p.Done == 0 {
					f, err := os.OpenFile(path, os.O_RDWR, 0)
					if err == nil {
						err = change.do(f)
						f.Close()
					}
					changed = err
				}
			}})
			if changed != nil {
				t.Fatal(changed)
			}
			if err == nil {
				t.Error("the change was not noticed")
			}
			wantFiles(t, dir)
		})
	}
}

func TestCancel(t *testing.T) {
	noLeaks(t)
	dir := t.TempDir()
	devices := testDevices(t, dir)
	before, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range before {
		names = append(names, e.Name())
	}
	good := filepath.Join(t.TempDir(), "app.tar.zst")
	mustPack(t, good, devices, PackOptions{})

	for _, stage := range []Stage{StageHash, StagePack, StageExtract, StageVerify} {
		t.Run(string(stage), func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			progress := func(p Progress) {
				if p.Stage == stage && p.Done > 0 {
					cancel()
				}
			}
			out := t.TempDir()
			var err error
			switch stage {
			case StageHash, StagePack:
				_, err = Pack(ctx, filepath.Join(dir, "app.tar.zst"), devices, PackOptions{Progress: progress})
			case StageExtract:
				_, err = Extract(ctx, good, []File{{"memory", filepath.Join(out, "a", "b", "memory")}}, ExtractOptions{Progress: progress})
			case StageVerify:
				_, err = Verify(ctx, good, ExtractOptions{Progress: progress})
			}
			if !errors.Is(err, context.Canceled) || errors.Is(err, ErrCorrupt) {
				t.Errorf("error is %v, want context.Canceled", err)
			}
			wantFiles(t, dir, names...)
			wantFiles(t, out)
		})
	}
}

func TestProgress(t *testing.T) {
	dir := t.TempDir()
	devices := testDevices(t, dir)
	archive := filepath.Join(dir, "app.tar.zst")
	last := map[Stage]Progress{}
	progress := func(p Progress) {
		if p.Done < last[p.Stage].Done {
			t.Errorf("progress went back: %+v after %+v", p, last[p.Stage])
		}
		last[p.Stage] = p
	}
	mustPack(t, archive, devices, PackOptions{Progress: progress})
	if _, err := Verify(t.Context(), archive, ExtractOptions{Progress: progress}); err != nil {
		t.Fatal(err)
	}
	if _, err := Extract(t.Context(), archive, []File{{"disk", filepath.Join(dir, "out")}}, ExtractOptions{Progress: progress}); err != nil {
		t.Fatal(err)
	}
	for _, stage := range []Stage{StageHash, StagePack, StageExtract, StageVerify} {
		if p := last[stage]; p.Done != p.Total || p.Total == 0 {
			t.Errorf("stage %s ended with %+v", stage, p)
		}
	}
}
