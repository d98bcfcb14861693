package registry

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/drafter-vm/drafter/internal/testregistry"
)

// little is an index of a device with a chunk, zeros, and that chunk twice.
func little() *index {
	x := &index{chunkSize: 4096, size: 5*4096 - 96, packs: []packRef{{digest.FromString("pack"), 1000}}, chunks: []chunkRef{{pack: 0, offset: 256, length: 300, sum: [32]byte{1}}, {offset: 556, length: 20, sum: [32]byte{2}}}}
	x.sum[31] = 9
	zero := uint32(0)
	one := uint32(1)
	for _, c := range []*uint32{&zero, &one, nil, &zero, &zero} {
		x.append(c)
	}
	return x
}

// TestGolden holds the format to its bytes, as docs/registry.md has them.
func TestGolden(t *testing.T) {
	x := little()
	if err := x.seal(); err != nil {
		t.Fatal(err)
	}
	blob, err := x.encode()
	if err != nil {
		t.Fatal(err)
	}
	b, err := decompress(blob, maxIndex)
	if err != nil {
		t.Fatal(err)
	}
	sum := strings.Repeat("00", 31)
	want := "4452414654494458" + "00000001" + "00001000" + "0000000000004fa0" + sum + "09" + "00000001" + "00000002" + "00000004" +
		digest.FromString("pack").Encoded() + "00000000000003e8" +
		"00000000" + "00000100" + "0000012c" + "01" + sum + "00000000" + "0000022c" + "00000014" + "02" + sum +
		"00000002" + "00000001" + "00000001" + "00000000" + "00000001" + "00000001" + "00000001" + "00000001"
	if got := hex.EncodeToString(b); got != want {
		t.Errorf("an index is\n%s, want\n%s", got, want)
	}
	back, err := decodeIndex(blob)
	if err != nil {
		t.Fatal(err)
	}
	for place, want := range []int{0, 1, -1, 0, 0} {
		if n, ok := back.at(int64(place)); ok != (want >= 0) || ok && n != want {
			t.Errorf("at %d is chunk %d, %t, want %d", place, n, ok, want)
		}
	}

	table := hex.EncodeToString(appendSeekTable(nil, []uint32{300, 20}, 4096))
	if want := "5e2a4d18" + "19000000" + "2c010000" + "00100000" + "14000000" + "00100000" + "02000000" + "00" + "b1ea928f"; table != want {
		t.Errorf("a seek table is\n%s, want\n%s", table, want)
	}
}

// A pack is what any decompressor of zstd reads as the content of its chunks.
func TestPackIsZstd(t *testing.T) {
	content := append(text(64<<10, 1), make([]byte, 64<<10)...)
	var pack []byte
	var lengths []uint32
	for at := 0; at < len(content); at += 64 << 10 {
		before := len(pack)
		pack = compressor().EncodeAll(content[at:at+64<<10], pack)
		lengths = append(lengths, uint32(len(pack)-before))
	}
	pack = appendSeekTable(pack, lengths, 64<<10)
	d, err := zstd.NewReader(bytes.NewReader(pack))
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	var got bytes.Buffer
	if _, err := got.ReadFrom(d); err != nil || !bytes.Equal(got.Bytes(), content) {
		t.Errorf("it reads as %d bytes, want %d: %v", got.Len(), len(content), err)
	}
	program, err := exec.LookPath("zstd")
	if err != nil {
		t.Log("there is no zstd to ask")
		return
	}
	cmd := exec.Command(program, "-dc")
	cmd.Stdin = bytes.NewReader(pack)
	if out, err := cmd.Output(); err != nil || !bytes.Equal(out, content) {
		t.Errorf("zstd reads it as %d bytes, want %d: %v", len(out), len(content), err)
	}
}

// What is hostile in an index is refused.
func TestHostileIndex(t *testing.T) {
	for name, harm := range map[string]func(*index){
		"no chunk size":          func(x *index) { x.chunkSize = 0 },
		"an odd chunk size":      func(x *index) { x.chunkSize = 5000 },
		"a huge chunk size":      func(x *index) { x.chunkSize = 1 << 21 },
		"no size":                func(x *index) { x.size = 0 },
		"a negative size":        func(x *index) { x.size = -4096 },
		"a huge size":            func(x *index) { x.size = maxDeviceSize + 1 },
		"an empty pack":          func(x *index) { x.packs[0].size = 0 },
		"a huge pack":            func(x *index) { x.packs[0].size = 1 << 62 },
		"a pack that is not":     func(x *index) { x.chunks[0].pack = 1 },
		"an offset outside":      func(x *index) { x.chunks[0].offset = 1 << 31 },
		"a length outside":       func(x *index) { x.chunks[0].length = 745 },
		"no length":              func(x *index) { x.chunks[0].length = 0 },
		"a length over the size": func(x *index) { x.packs[0].size = 1 << 30; x.chunks[0].length = 4096 + frameOverhead + 1 },
		"a chunk that is not":    func(x *index) { x.runs[0].first = 3 },
		"an empty run":           func(x *index) { x.runs[0].count = 0 },
		"a run over the end":     func(x *index) { x.runs[1].count = 1 << 31 },
		"too few":                func(x *index) { x.runs = x.runs[:2] },
		"a run that overflows":   func(x *index) { x.runs[0] = run{1<<32 - 1, 1<<32 - 1} },
	} {
		x := little()
		harm(x)
		blob, err := x.encode()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := decodeIndex(blob); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
	good, err := little().encode()
	if err != nil {
		t.Fatal(err)
	}
	raw, err := decompress(good, maxIndex)
	if err != nil {
		t.Fatal(err)
	}
	bomb := compressor().EncodeAll(make([]byte, maxIndex+1), nil)
	for name, blob := range map[string][]byte{
		"nothing": {}, "no zstd": []byte("DRAFTIDX"), "half": good[:len(good)/2], "more": compressor().EncodeAll(append(bytes.Clone(raw), 0), nil),
		"another magic": compressor().EncodeAll(append([]byte("X"), raw[1:]...), nil), "a bomb": bomb, "two frames": append(bytes.Clone(good), bomb...),
		"many packs": compressor().EncodeAll(append(append(bytes.Clone(raw[:56]), 0xff, 0xff, 0xff, 0xff), raw[60:]...), nil),
	} {
		if _, err := decodeIndex(blob); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
	newer := bytes.Clone(raw)
	newer[11] = 2
	if _, err := decodeIndex(compressor().EncodeAll(newer, nil)); err == nil || errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), "newer drafter") {
		t.Errorf("a newer version: %v", err)
	}
}

func FuzzIndex(f *testing.F) {
	good, err := little().encode()
	if err != nil {
		f.Fatal(err)
	}
	raw, err := decompress(good, maxIndex)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(raw, true)
	f.Add(good, false)
	f.Fuzz(func(t *testing.T, b []byte, wrap bool) {
		if wrap {
			b = compressor().EncodeAll(b, nil)
		}
		x, err := decodeIndex(b)
		if err != nil {
			return
		}
		again, err := x.encode()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := decodeIndex(again); err != nil {
			t.Fatal(err)
		}
		for range 20 {
			if n, ok := x.at(rand.Int64N(x.places())); ok && n >= len(x.chunks) {
				t.Fatal("a chunk that is not")
			}
		}
		d := &device{index: x}
		for off := int64(0); ; {
			r, err := d.NextData(off)
			if err != nil {
				break
			}
			if r.Offset < off || r.Length <= 0 || r.End() > x.size {
				t.Fatalf("data from %d is at %v of %d", off, r, x.size)
			}
			off = r.End()
		}
	})
}

// A registry that is hostile is refused, and nothing is written but to the folder that was asked for.
func TestHostileRegistry(t *testing.T) {
	alone(t)
	server := testregistry.Start(t, testregistry.Options{})
	ref := reference(t, server.Address+"/vms/web:1")
	dir := makePackage(t, devices{"disk": text(300000, 1)})
	pushed := mustPush(t, dir, ref)
	c, err := newClient(t.Context(), ref, quiet)
	if err != nil {
		t.Fatal(err)
	}
	defer c.close()
	_, content, err := c.manifest(t.Context(), pushed.Manifest.Digest)
	if err != nil {
		t.Fatal(err)
	}
	blob := func(b []byte) (digest.Digest, int64) {
		t.Helper()
		desc := ocispec.Descriptor{Digest: digest.FromBytes(b), Size: int64(len(b))}
		if _, err := c.put(t.Context(), desc, b, func(int64) {}); err != nil {
			t.Fatal(err)
		}
		return desc.Digest, desc.Size
	}
	description := func(m *ocispec.Manifest, old, new string) {
		raw, err := os.ReadFile(filepath.Join(dir, "manifest.json"))
		if err != nil {
			t.Fatal(err)
		}
		changed := bytes.ReplaceAll(raw, []byte(old), []byte(new))
		if bytes.Equal(changed, raw) {
			t.Fatalf("there is no %q in %s", old, raw)
		}
		m.Layers[0].Digest, m.Layers[0].Size = blob(compressor().EncodeAll(changed, nil))
	}
	indexed := func(m *ocispec.Manifest, harm func(x *index)) {
		b, err := c.blob(t.Context(), m.Layers[1], maxIndex)
		if err != nil {
			t.Fatal(err)
		}
		x, err := decodeIndex(b)
		if err != nil {
			t.Fatal(err)
		}
		harm(x)
		if b, err = x.encode(); err != nil {
			t.Fatal(err)
		}
		m.Layers[1].Digest, m.Layers[1].Size = blob(b)
	}
	for _, test := range []struct {
		name string
		harm func(m *ocispec.Manifest)
		want []string
	}{
		{"a file elsewhere", func(m *ocispec.Manifest) { description(m, `"rootfs.ext4"`, `"../rootfs.ext4"`) }, []string{"../rootfs.ext4"}},
		{"a device elsewhere", func(m *ocispec.Manifest) { description(m, `"name": "disk"`, `"name": "a/../b"`) }, []string{"a/../b"}},
		{"another size", func(m *ocispec.Manifest) { description(m, `"size": 300000`, `"size": 299999`) }, []string{`"disk"`, "299999"}},
		{"no layers", func(m *ocispec.Manifest) { m.Layers = m.Layers[:0] }, []string{"first layer"}},
		{"no index", func(m *ocispec.Manifest) { m.Layers = m.Layers[:1] }, []string{"1 devices"}},
		{"no packs", func(m *ocispec.Manifest) { m.Layers = m.Layers[:2] }, []string{`"disk"`, "no layer"}},
		{"a huge index", func(m *ocispec.Manifest) { m.Layers[1].Size = 1 << 40 }, nil},
		{"another type", func(m *ocispec.Manifest) { m.ArtifactType = "application/x" }, []string{"no package of Drafter", "application/x"}},
		{"other content", func(m *ocispec.Manifest) { indexed(m, func(x *index) { x.chunks[1].sum[0] ^= 1 }) }, []string{"chunk at", "SHA-256", m0(content).Layers[2].Digest.String()}},
		{"chunks that are exchanged", func(m *ocispec.Manifest) {
			indexed(m, func(x *index) { x.runs = []run{{1, 2}, {1, 1}, {uint32(x.places()) - 2, 3}} })
		}, []string{`device "disk"`, "SHA-256"}},
		{"a frame that is none", func(m *ocispec.Manifest) { indexed(m, func(x *index) { x.chunks[1].offset++ }) }, []string{"chunk at"}},
	} {
		m := m0(content)
		test.harm(m)
		b, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		d := ocispec.Descriptor{MediaType: m.MediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
		if err := c.putManifest(t.Context(), d, b, ""); err != nil {
			if test.name == "a huge index" { // the registry knows better
				continue
			}
			t.Fatalf("%s: %v", test.name, err)
		}
		parent := t.TempDir()
		opts := onAMD64
		opts.StallTimeout = quiet.StallTimeout
		_, err = Pull(t.Context(), ref.pinned(d.Digest), filepath.Join(parent, "pulled"), opts)
		if err == nil {
			t.Errorf("%s: it is pulled", test.name)
			continue
		}
		for _, w := range test.want {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("%s: %v does not say %q", test.name, err, w)
			}
		}
		if list, _ := os.ReadDir(parent); len(list) > 1 || len(list) == 1 && list[0].Name() != "pulled"+partial {
			t.Errorf("%s: it has made %v", test.name, list)
		}
	}

	// A blob that has changed where it lies.
	path := server.Blob(m0(content).Layers[2].Digest.String())
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)/2] ^= 1
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Pull(t.Context(), ref, filepath.Join(t.TempDir(), "x"), onAMD64); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), m0(content).Layers[2].Digest.String()) {
		t.Errorf("a blob that has changed: %v", err)
	}
	if err := os.WriteFile(server.Blob(pushed.Manifest.Digest), append(content, ' '), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Pull(t.Context(), ref, filepath.Join(t.TempDir(), "x"), onAMD64); err == nil {
		t.Error("a manifest that has changed is pulled")
	}
}

func m0(content []byte) *ocispec.Manifest {
	var m ocispec.Manifest
	if err := json.Unmarshal(content, &m); err != nil {
		panic(err)
	}
	return &m
}

func TestReference(t *testing.T) {
	sum := digest.FromString("x").String()
	for s, want := range map[string]Reference{
		"oci://localhost:5000/vms/web:1":                  {"localhost:5000", "vms/web", "1", ""},
		"oci://r.example/web":                             {"r.example", "web", "latest", ""},
		"oci://r.example/a/b/c@" + sum:                    {"r.example", "a/b/c", "", sum},
		"oci://r.example/a:v1.2_x@" + sum:                 {"r.example", "a", "v1.2_x", sum},
		"oci://[::1]:5000/vms/web:1":                      {"[::1]:5000", "vms/web", "1", ""},
		"oci://127.0.0.1/web:" + strings.Repeat("1", 128): {"127.0.0.1", "web", strings.Repeat("1", 128), ""},
	} {
		r, err := ParseReference(s)
		if err != nil || r != want {
			t.Errorf("%s is %+v, %v", s, r, err)
			continue
		}
		if again, err := ParseReference(r.String()); err != nil || again != r {
			t.Errorf("%s becomes %s", s, r)
		}
	}
	for _, s := range []string{
		"", "web", "r.example/web:1", "docker://r.example/web", "oci://", "oci://r.example", "oci:///web", "oci://r.example/", "oci://r.example/Web", "oci://r.example/../x",
		"oci://r.example/web:", "oci://r.example/web:a/b", "oci://r.example/web@sha256:12", "oci://r.example/web@", "oci://r.example/web@sha512:" + strings.Repeat("0", 128),
		"oci://r.example/web:" + strings.Repeat("1", 129), "oci://r.example/web:1 2", "oci://r.example/a//b",
	} {
		if r, err := ParseReference(s); err == nil || !strings.Contains(err.Error(), "oci://HOST") {
			t.Errorf("%q is %+v, %v", s, r, err)
		}
	}
	if _, err := ParseReference("oci://joe:secret@r.example/web"); err == nil || strings.Contains(err.Error(), "secret") {
		t.Errorf("a password is said: %v", err)
	}
	pinned := Reference{"h", "r", "1", sum}
	for r, want := range map[Reference]bool{{"h", "r", "1", ""}: true, {"h", "r", "", sum}: true, pinned: true, {"h", "r", "2", ""}: false, {"h", "x", "1", ""}: false, {"h", "r", "", "sha256:0"}: false} {
		if r.Names(pinned) != want {
			t.Errorf("%s names %s: %t", r, pinned, !want)
		}
	}
}
