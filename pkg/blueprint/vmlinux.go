package blueprint

import (
	"bytes"
	"compress/gzip"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/therootcompany/xz"
)

// Offsets in the setup header of an x86 kernel image (Linux, Documentation/arch/x86/boot.rst).
const (
	bzSetupSects    = 0x1f1 // u8: length of the setup code after the boot sector, in sectors; 0 means 4
	bzMagic         = 0x202 // "HdrS"
	bzVersion       = 0x206 // u16: protocol version; 2.08 added the payload fields
	bzPayloadOffset = 0x248 // u32: from the start of the protected-mode code
	bzPayloadLength = 0x24c // u32
	bzHeaderEnd     = 0x250

	maxKernel = 1 << 30 // bytes, far above any kernel
)

// ExtractVMLinux returns the ELF kernel inside a compressed x86 boot image (a bzImage, the vmlinuz of a distribution).
// The compression is told by the magic number of the payload: gzip, xz, LZ4 (legacy frame) and zstd are known. An image
// that is an ELF file already is returned as it is.
func ExtractVMLinux(r io.Reader) ([]byte, error) {
	image, err := readLimited(r, maxKernel)
	if err != nil {
		return nil, fmt.Errorf("read kernel image: %w", err)
	}
	if bytes.HasPrefix(image, []byte(elf.ELFMAG)) {
		return image, checkKernel(image)
	}
	if len(image) < bzHeaderEnd || string(image[bzMagic:bzMagic+4]) != "HdrS" {
		return nil, errors.New("not a Linux kernel image for x86: it has no setup header")
	}
	if v := binary.LittleEndian.Uint16(image[bzVersion:]); v < 0x208 {
		return nil, fmt.Errorf("kernel image has boot protocol %d.%02d; 2.08 (Linux 2.6.26) or later is needed", v>>8, v&0xff)
	}
	sects := int64(image[bzSetupSects])
	if sects == 0 {
		sects = 4
	}
	start := (sects+1)*512 + int64(binary.LittleEndian.Uint32(image[bzPayloadOffset:]))
	length := int64(binary.LittleEndian.Uint32(image[bzPayloadLength:]))
	if start+length > int64(len(image)) || length < 8 {
		return nil, fmt.Errorf("kernel image is truncated: its payload is at %d and has %d bytes, the image has %d", start, length, len(image))
	}
	payload := image[start : start+length]

	// The build appends the unpacked size, little-endian, to the compressed data. (gzip has it by itself.)
	size := int64(binary.LittleEndian.Uint32(payload[len(payload)-4:]))
	if size > maxKernel {
		return nil, fmt.Errorf("kernel image claims an unpacked size of %d bytes", size)
	}
	data := bytes.NewReader(payload[:len(payload)-4])
	var unpacked io.Reader
	switch {
	case bytes.HasPrefix(payload, []byte{0x02, 0x21, 0x4c, 0x18}):
		unpacked = lz4.NewReader(data)
	case bytes.HasPrefix(payload, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		z, err := zstd.NewReader(data, zstd.WithDecoderMaxMemory(maxKernel), zstd.WithDecoderConcurrency(1))
		if err != nil {
			return nil, fmt.Errorf("unpack kernel image: %w", err)
		}
		defer z.Close()
		unpacked = z
	case bytes.HasPrefix(payload, []byte{0xfd, '7', 'z', 'X', 'Z', 0}):
		if unpacked, err = xz.NewReader(data, 0); err != nil {
			return nil, fmt.Errorf("unpack kernel image: %w", err)
		}
	case bytes.HasPrefix(payload, []byte{0x1f, 0x8b}):
		z, err := gzip.NewReader(bytes.NewReader(payload))
		if err != nil {
			return nil, fmt.Errorf("unpack kernel image: %w", err)
		}
		z.Multistream(false)
		unpacked = z
	default:
		return nil, fmt.Errorf("kernel image is compressed in an unknown format (magic % x); gzip, xz, lz4 and zstd are known", payload[:6])
	}
	kernel, err := readLimited(unpacked, size)
	if err != nil {
		return nil, fmt.Errorf("unpack kernel image: %w", err)
	}
	if int64(len(kernel)) != size {
		return nil, fmt.Errorf("unpack kernel image: got %d bytes, its header says %d", len(kernel), size)
	}
	return kernel, checkKernel(kernel)
}

func checkKernel(kernel []byte) error {
	f, err := elf.NewFile(bytes.NewReader(kernel))
	if err != nil {
		return fmt.Errorf("kernel is not an ELF file: %w", err)
	}
	defer f.Close()
	if f.Machine != elf.EM_X86_64 {
		return fmt.Errorf("kernel is for %v, not for x86-64", f.Machine)
	}
	return nil
}
