package vmpackage

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
)

// entry is an entry of an archive made by hand.
type entry struct {
	tar.Header
	content string
}

func compress(t testing.TB, b []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w, err := zstd.NewWriter(&out)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func tarOf(t testing.TB, entries ...entry) []byte {
	t.Helper()
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, e := range entries {
		e.Size = int64(len(e.content))
		if e.Typeflag == 0 {
			e.Typeflag = tar.TypeReg
		}
		if e.Typeflag != tar.TypeReg {
			e.Size = 0
		}
		if err := w.WriteHeader(&e.Header); err != nil {
			t.Fatal(err)
		}
		if e.Typeflag == tar.TypeReg {
			if _, err := io.WriteString(w, e.content); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func file(name, content string) entry { return entry{tar.Header{Name: name}, content} }

func describeDevice(name, content string) Device {
	sum := sha256.Sum256([]byte(content))
	return Device{Name: name, File: DefaultFile(name), Size: int64(len(content)), SHA256: hex.EncodeToString(sum[:]), DataBytes: int64(len(content))}
}

func manifestOf(t testing.TB, devices ...Device) entry {
	t.Helper()
	b, err := json.Marshal(Manifest{Format: formatName, FormatVersion: 1, Devices: devices})
	if err != nil {
		t.Fatal(err)
	}
	return file(ManifestFile, string(b))
}

func TestHostileArchives(t *testing.T) {
	noLeaks(t)
	kernel, disk := describeDevice("kernel", "the kernel"), describeDevice("disk", "the disk")
	m := manifestOf(t, kernel, disk)
	k, d := file("vmlinux", "the kernel"), file("rootfs.ext4", "the disk")
	with := func(d Device, change func(*Device)) Device { change(&d); return d }
	link := func(kind byte, name, target string) entry {
		return entry{tar.Header{Name: name, Typeflag: kind, Linkname: target}, ""}
	}
	good := tarOf(t, m, k, d)
	huge := with(kernel, func(d *Device) { d.Size, d.DataBytes = 1<<40, 0 })

	for _, tt := range []struct {
		name    string
		archive []byte
		is      error
		want    string
	}{
		{"empty file", nil, ErrNotPackage, "not compressed by zstd"},
		{"text", []byte("hello, this is text"), ErrNotPackage, "not compressed by zstd"},
		{"plain tar", good, ErrNotPackage, "not compressed by zstd"},
		{"compressed nothing", compress(t, []byte{}), ErrNotPackage, ""},
		{"compressed text", compress(t, bytes.Repeat([]byte("text "), 1000)), ErrNotPackage, "not a tar archive"},
		{"foreign tar", compress(t, tarOf(t, file("etc/passwd", "root"))), ErrNotPackage, `first entry is "etc/passwd"`},
		{"manifest not first", compress(t, tarOf(t, k, m, d)), ErrNotPackage, `first entry is "vmlinux"`},
		{"manifest is a link", compress(t, tarOf(t, link(tar.TypeSymlink, ManifestFile, "/etc/passwd"))), ErrNotPackage, ""},
		{"manifest of another program", compress(t, tarOf(t, file(ManifestFile, `{"schemaVersion":2}`))), ErrNotPackage, ""},
		{"manifest too long", compress(t, tarOf(t, file(ManifestFile, strings.Repeat(" ", maxManifestSize+1)))), ErrCorrupt, "more than 1048576"},
		{"newer", compress(t, tarOf(t, file(ManifestFile, `{"format":"drafter-package","formatVersion":2,"devices":"other"}`))), ErrVersion, "use a newer drafter"},
		{"no digest", compress(t, tarOf(t, manifestOf(t, with(kernel, func(d *Device) { d.SHA256 = "" })), k)), ErrCorrupt, `device "kernel" has no sha256`},
		{"path up", compress(t, tarOf(t, m, k, d, file("../../tmp/evil", "x"))), ErrCorrupt, "not in the manifest"},
		{"absolute path", compress(t, tarOf(t, m, file("/vmlinux", "the kernel"), d)), ErrCorrupt, "not in the manifest"},
		{"path in manifest", compress(t, tarOf(t, manifestOf(t, with(kernel, func(d *Device) { d.File = "../vmlinux" })))), ErrCorrupt, "not allowed"},
		{"dot", compress(t, tarOf(t, m, file("./vmlinux", "the kernel"), d)), ErrCorrupt, "not in the manifest"},
		{"symlink", compress(t, tarOf(t, m, link(tar.TypeSymlink, "vmlinux", "/etc/passwd"), d)), ErrCorrupt, "not a regular file"},
		{"hard link", compress(t, tarOf(t, m, link(tar.TypeLink, "vmlinux", ManifestFile), d)), ErrCorrupt, "not a regular file"},
		{"folder", compress(t, tarOf(t, m, link(tar.TypeDir, "vmlinux/", ""), d)), ErrCorrupt, ""},
		{"fifo", compress(t, tarOf(t, m, link(tar.TypeFifo, "vmlinux", ""), d)), ErrCorrupt, "not a regular file"},
		{"device twice", compress(t, tarOf(t, m, k, d, k)), ErrCorrupt, `device "kernel" is there twice`},
		{"manifest twice", compress(t, tarOf(t, m, m, k, d)), ErrCorrupt, "not in the manifest"},
		{"missing device", compress(t, tarOf(t, m, k)), ErrCorrupt, `ends before device "disk"`},
		{"longer than manifest", compress(t, tarOf(t, m, file("vmlinux", "the kernel and more"), d)), ErrCorrupt, "has 19 bytes, 10 in the manifest"},
		{"shorter than manifest", compress(t, tarOf(t, m, file("vmlinux", "kernel"), d)), ErrCorrupt, "has 6 bytes"},
		{"wrong content", compress(t, tarOf(t, m, file("vmlinux", "THE KERNEL"), d)), ErrCorrupt, "sha256"},
		{"wrong data bytes", compress(t, tarOf(t, manifestOf(t, with(kernel, func(d *Device) { d.DataBytes-- }), disk), k, d)), ErrCorrupt, "bytes are data"},
		{"huge size in manifest", compress(t, tarOf(t, manifestOf(t, huge, disk), k, d)), ErrCorrupt, "1099511627776 in the manifest"},
		{"size over the limit", compress(t, tarOf(t, manifestOf(t, with(kernel, func(d *Device) { d.Size = maxDeviceSize + 1 })), k)), ErrCorrupt, "is not between"},
		{"cut in zstd", compress(t, good)[:100], ErrCorrupt, "cut short"},
		{"cut in a device", compress(t, good[:len(good)-2500]), ErrCorrupt, ""},
		{"cut after a header", compress(t, good[:3*512]), ErrCorrupt, "cut short"},
		{"second archive behind", compress(t, append(bytes.Clone(good), good...)), ErrCorrupt, "goes on after its end"},
		{"garbage behind", append(compress(t, good), "garbage"...), ErrCorrupt, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			archive, out := filepath.Join(dir, "app.tar.zst"), filepath.Join(dir, "kernel")
			if err := os.WriteFile(archive, tt.archive, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(out, []byte("old"), 0o600); err != nil {
				t.Fatal(err)
			}
			check := func(what string, err error) {
				t.Helper()
				if !errors.Is(err, tt.is) || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("%s: error is %v, want %q that wraps %v", what, err, tt.want, tt.is)
				}
			}
			_, err := Extract(t.Context(), archive, []File{{"kernel", out}, {"disk", filepath.Join(dir, "new", "disk")}}, ExtractOptions{})
			check("Extract", err)
			_, err = Verify(t.Context(), archive, ExtractOptions{})
			check("Verify", err)
			wantFiles(t, dir, "app.tar.zst", "kernel")
			if b, _ := os.ReadFile(out); string(b) != "old" {
				t.Errorf("the old file was replaced by %q", b)
			}
		})
	}
}

func TestExtractRefuses(t *testing.T) {
	dir := t.TempDir()
	archive := filepath.Join(dir, "app.tar.zst")
	kernel := describeDevice("kernel", "the kernel")
	if err := os.WriteFile(archive, compress(t, tarOf(t, manifestOf(t, kernel), file("vmlinux", "the kernel"))), 0o600); err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(dir, "out")
	for _, tt := range []struct {
		name    string
		devices []File
		want    string
	}{
		{"none", nil, "no devices"},
		{"missing", []File{{"kernel", out}, {"disk", out + "2"}}, `it has no device "disk", only: kernel`},
		{"twice", []File{{"kernel", out}, {"kernel", out + "2"}}, "given twice"},
		{"same path", []File{{"kernel", out}, {"disk", dir + "/./out"}}, "have the same path"},
		{"no path", []File{{"kernel", ""}}, "has no path"},
		{"folder", []File{{"kernel", dir}}, "not a regular file"},
		{"archive", []File{{"kernel", archive}}, "would replace the archive"},
		{"below a file", []File{{"kernel", archive + "/x"}}, "not a directory"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Extract(t.Context(), archive, tt.devices, ExtractOptions{})
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error is %v, want %q", err, tt.want)
			}
			wantFiles(t, dir, "app.tar.zst")
		})
	}
}

// TestDamage cuts and flips a real archive everywhere: it must be refused, or, where a flipped bit means nothing, give
// what was packed.
func TestDamage(t *testing.T) {
	golden, err := os.ReadFile(filepath.Join("testdata", "golden.tar.zst"))
	if err != nil {
		t.Fatal(err)
	}
	for n := range golden {
		if err := readAll(t.Context(), golden[:n]); err == nil {
			t.Errorf("cut to %d bytes, it was accepted", n)
		}
	}
	for i := range golden {
		bad := bytes.Clone(golden)
		bad[i] ^= 1 << (i % 8)
		if err := readAll(t.Context(), bad); err == nil && !bytes.Equal(decompress(t, bad), decompress(t, golden)) {
			t.Errorf("with a flipped bit in byte %d, it was accepted", i)
		}
	}
}

// readAll verifies an archive in memory.
func readAll(ctx context.Context, archive []byte) error {
	r, err := readArchive(ctx, bytes.NewReader(archive), 1)
	if err != nil {
		return err
	}
	defer r.zstd.Close()
	return r.each(func(d Device, content io.Reader) error { return verify(ctx, d, content, nil, func(int64) {}) })
}

func FuzzArchive(f *testing.F) {
	golden, err := os.ReadFile(filepath.Join("testdata", "golden.tar"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(golden)
	f.Add(tarOf(f, manifestOf(f, describeDevice("kernel", "k")), file("vmlinux", "k")))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := readTar(bytes.NewReader(b))
		// A few bytes may describe holes of any size, whose zeros take hours to hash.
		if err == nil && r.manifest.size() < 16<<20 {
			err = r.each(func(d Device, content io.Reader) error { return verify(t.Context(), d, content, nil, func(int64) {}) })
		}
		if err != nil && !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrNotPackage) && !errors.Is(err, ErrVersion) {
			t.Errorf("the error wraps none of ours: %v", err)
		}
	})
}

func FuzzManifest(f *testing.F) {
	b, err := json.Marshal(Manifest{Format: formatName, FormatVersion: 1, Hypervisor: "qemu", Machine: json.RawMessage(`{"hypervisor":"qemu"}`), Devices: []Device{describeDevice("disk", "x")}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte(`{"format":"drafter-package","formatVersion":2}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := decodeManifest(b)
		if err != nil {
			if !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrNotPackage) && !errors.Is(err, ErrVersion) {
				t.Errorf("the error wraps none of ours: %v", err)
			}
			return
		}
		// What is accepted survives being written.
		encoded, err := m.encode()
		if err != nil {
			t.Fatal(err)
		}
		again, err := decodeManifest(encoded)
		if err != nil {
			t.Fatalf("%v\n%s", err, encoded)
		}
		if fmt.Sprintf("%+v", again) != fmt.Sprintf("%+v", m) {
			t.Errorf("%+v became %+v", m, again)
		}
	})
}

func FuzzConfig(f *testing.F) {
	f.Add([]byte(testMachine + "    \n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		raw, err := DecodeConfig(b)
		if err != nil {
			return
		}
		device, err := EncodeConfig(raw)
		if err != nil {
			return // indented it may be too long
		}
		if len(device)%4096 != 0 || device[len(device)-1] != '\n' {
			t.Errorf("device has %d bytes", len(device))
		}
		if _, err := DecodeConfig(device); err != nil {
			t.Error(err)
		}
	})
}
