package blueprint

import (
	"bytes"
	"compress/gzip"
	"debug/elf"
	"encoding/binary"
	"io"
	"strconv"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/ulikunitz/xz"
)

func itoa(n int) string { return strconv.Itoa(n) }

// tinyELF is an ELF header for the machine, with n bytes after it.
func tinyELF(t testing.TB, machine elf.Machine, n int) []byte {
	t.Helper()
	var b bytes.Buffer
	h := elf.Header64{
		Ident: [16]byte{0x7f, 'E', 'L', 'F', byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)},
		Type:  uint16(elf.ET_EXEC), Machine: uint16(machine), Version: 1, Ehsize: 64, Phentsize: 56, Shentsize: 64,
	}
	if err := binary.Write(&b, binary.LittleEndian, h); err != nil {
		t.Fatal(err)
	}
	b.Write(bytes.Repeat([]byte("kernel "), n/7+1)[:n])
	return b.Bytes()
}

// bzImage wraps a compressed kernel as the kernel's build does; the appended size is left out for gzip, which has it.
func bzImage(payload []byte, size int, gzip bool) []byte {
	if !gzip {
		payload = binary.LittleEndian.AppendUint32(payload, uint32(size))
	}
	const setup, before = 3, 100 // sectors after the boot sector; bytes of decompressor before the payload
	image := make([]byte, (setup+1)*512+before, (setup+1)*512+before+len(payload)+50)
	image[bzSetupSects] = setup
	copy(image[bzMagic:], "HdrS")
	binary.LittleEndian.PutUint16(image[bzVersion:], 0x20f)
	binary.LittleEndian.PutUint32(image[bzPayloadOffset:], before)
	binary.LittleEndian.PutUint32(image[bzPayloadLength:], uint32(len(payload)))
	image = append(image, payload...)
	return append(image, make([]byte, 50)...)
}

var compressors = map[string]func(t testing.TB, data []byte) []byte{
	"gzip": func(t testing.TB, data []byte) []byte {
		return through(t, data, func(w io.Writer) (io.WriteCloser, error) { return gzip.NewWriter(w), nil })
	},
	"zstd": func(t testing.TB, data []byte) []byte {
		return through(t, data, func(w io.Writer) (io.WriteCloser, error) { return zstd.NewWriter(w) })
	},
	"xz": func(t testing.TB, data []byte) []byte {
		return through(t, data, func(w io.Writer) (io.WriteCloser, error) {
			return xz.WriterConfig{CheckSum: xz.CRC32}.NewWriter(w)
		})
	},
	"lz4": func(t testing.TB, data []byte) []byte {
		return through(t, data, func(w io.Writer) (io.WriteCloser, error) {
			z := lz4.NewWriter(w)
			return z, z.Apply(lz4.LegacyOption(true))
		})
	},
}

func through(t testing.TB, data []byte, open func(io.Writer) (io.WriteCloser, error)) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := open(&b)
	if err == nil {
		_, err = w.Write(data)
	}
	if err == nil {
		err = w.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestExtractVMLinux(t *testing.T) {
	kernel := tinyELF(t, elf.EM_X86_64, 9<<20) // more than one block of an LZ4 legacy frame
	for name, compress := range compressors {
		t.Run(name, func(t *testing.T) {
			got, err := ExtractVMLinux(bytes.NewReader(bzImage(compress(t, kernel), len(kernel), name == "gzip")))
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, kernel) {
				t.Errorf("got %d other bytes, want the %d of the kernel", len(got), len(kernel))
			}
		})
	}
	t.Run("ELF already", func(t *testing.T) {
		if got, err := ExtractVMLinux(bytes.NewReader(kernel)); err != nil || !bytes.Equal(got, kernel) {
			t.Errorf("got %d bytes and %v", len(got), err)
		}
	})
	good := bzImage(compressors["zstd"](t, kernel), len(kernel), false)
	arm := tinyELF(t, elf.EM_AARCH64, 100)
	for name, test := range map[string]struct {
		image []byte
		want  string
	}{
		"other file":  {[]byte(strings.Repeat("no kernel ", 100)), "no setup header"},
		"short":       {good[:100], "no setup header"},
		"truncated":   {good[:len(good)/2], "truncated"},
		"compression": {bzImage([]byte("BZh91AY&SY..............."), 10, false), "unknown format"},
		"wrong size":  {bzImage(compressors["zstd"](t, kernel), len(kernel)+1, false), "its header says"},
		"too long":    {bzImage(compressors["zstd"](t, kernel), len(kernel)-1, false), "larger than expected"},
		"not ELF":     {bzImage(compressors["zstd"](t, []byte("0123456789")), 10, false), "not an ELF file"},
		"other machine": {bzImage(compressors["zstd"](t, arm), len(arm), false),
			"not for x86-64"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := ExtractVMLinux(bytes.NewReader(test.image)); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got error %v, want one with %q", err, test.want)
			}
		})
	}
}

func FuzzExtractVMLinux(f *testing.F) {
	kernel := tinyELF(f, elf.EM_X86_64, 1000)
	for name, compress := range compressors {
		f.Add(bzImage(compress(f, kernel), len(kernel), name == "gzip"))
	}
	f.Fuzz(func(t *testing.T, image []byte) {
		// Sizes that an image claims cost memory only when data follows: what is claimed is bounded here for speed.
		if len(image) > 1<<20 {
			return
		}
		_, _ = ExtractVMLinux(bytes.NewReader(image))
	})
}
