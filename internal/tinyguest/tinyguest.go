//go:build amd64

package tinyguest

import (
	"bytes"
	"encoding/binary"
	"unsafe"
)

// What the guest has in its memory, as addresses there, which are offsets in it.
const (
	Counters    = 4 << 20  // the first page that it counts in, by 8 bytes at its beginning
	CountersEnd = 16 << 20 // after the last one
	Written     = 0x306000 // 8 bytes for each block of the disk: what was written last at its beginning
	Flushed     = 0x306200 // 8 bytes: what was written when the disk was flushed last
	Learned     = 0x306208 // 8 bytes: the highest that was on the disk when it booted
	MinMemory   = CountersEnd
)

// The disk that it uses, if it has one.
const (
	Blocks    = 64
	BlockSize = 4096 // bytes
)

// Of what it says on the serial port.
const (
	Pass   = '.' // it has counted once through its memory
	Broken = 'X' // a request failed, or there is what it has not written, in its memory or on its disk; it does nothing from then on
)

// Reset, on the serial port, has it reset the machine. It sends back whatever else it reads there, once in each pass.
const Reset = 'r'

// start is the address of code; both are in tinyguest_amd64.s.
var start uintptr

// code is not to be called: it is the guest.
func code()

// end follows the code.
var end = []byte{0xdb, 0xe5, 0x7f, 0x0c, 0x92, 0x41, 0xee, 0x38}

// Kernel is the guest as a program in the format ELF, which Firecracker takes for a kernel.
func Kernel() []byte {
	const (
		entry   = 0x200000
		headers = 64 + 56
		most    = 4096
	)
	_ = code // the linker keeps it
	text := unsafe.Slice((*byte)(*(*unsafe.Pointer)(unsafe.Pointer(&start))), most)
	text = text[:bytes.Index(text, end)]

	elf := append([]byte("\x7fELF\x02\x01\x01"), make([]byte, 9)...)
	for _, part := range []any{
		// The header (elf(5), Elf64_Ehdr), and that of the one segment (Elf64_Phdr).
		uint16(2), uint16(62), uint32(1), uint64(entry), uint64(64), uint64(0), uint32(0), uint16(64), uint16(56), uint16(1), uint16(64), uint16(0), uint16(0),
		uint32(1), uint32(5), uint64(headers), uint64(entry), uint64(entry), uint64(len(text)), uint64(len(text)), uint64(1),
		text,
	} {
		elf, _ = binary.Append(elf, binary.LittleEndian, part) // of fixed size
	}
	return elf
}
