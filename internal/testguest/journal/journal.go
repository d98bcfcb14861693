// Package journal is a sequence of checksummed records on a disk: a guest appends them with a flush after each, and
// whoever holds the disk later, in the guest or on the host, can tell whether one is missing, old or torn.
//
// The journal is a ring of slots of [RecordSize] bytes from the start of the disk. Record n (from 1) lies in slot
// n mod slots, so a complete journal holds an unbroken run of the newest records and nothing else.
package journal

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
)

// RecordSize is the size of a record in bytes: one block of a file system, so that no write needs a read before it.
const RecordSize = 4096

const magic = 0x4c4e524a54465244 // "DRFTJRNL", little endian

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Record returns record seq: magic, sequence number, words that follow from the sequence number, CRC-32C.
func Record(seq uint64) []byte {
	p := make([]byte, RecordSize)
	binary.LittleEndian.PutUint64(p, magic)
	binary.LittleEndian.PutUint64(p[8:], seq)
	x := seq*0x9e3779b97f4a7c15 + 1
	for i := 16; i < RecordSize-8; i += 8 {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		binary.LittleEndian.PutUint64(p[i:], x)
	}
	binary.LittleEndian.PutUint32(p[RecordSize-4:], crc32.Checksum(p[:RecordSize-4], castagnoli))
	return p
}

// Parse returns the sequence number of a record, and 0 for a slot that was never written.
func Parse(p []byte) (seq uint64, err error) {
	if len(p) != RecordSize {
		return 0, fmt.Errorf("parse record: %d bytes instead of %d", len(p), RecordSize)
	}
	if binary.LittleEndian.Uint64(p) == 0 && binary.LittleEndian.Uint64(p[8:]) == 0 {
		return 0, nil
	}
	if binary.LittleEndian.Uint64(p) != magic {
		return 0, errors.New("parse record: no magic number")
	}
	if got, want := binary.LittleEndian.Uint32(p[RecordSize-4:]), crc32.Checksum(p[:RecordSize-4], castagnoli); got != want {
		return 0, fmt.Errorf("parse record: checksum %08x instead of %08x", got, want)
	}
	return binary.LittleEndian.Uint64(p[8:]), nil
}

// Append writes record seq into its slot. The caller flushes.
func Append(w io.WriterAt, slots int, seq uint64) error {
	_, err := w.WriteAt(Record(seq), int64(seq%uint64(slots))*RecordSize)
	return err
}

// Verify reads a whole journal and returns the newest record's sequence number (0: empty). A missing, foreign or old
// record is an error. Only the slot after the newest may be torn: it is where the next record was being written.
func Verify(r io.ReaderAt, slots int) (last uint64, err error) {
	seqs := make([]uint64, slots)
	broken := make(map[int]error)
	chunk := make([]byte, 64*RecordSize) // of many: an emulated guest takes a millisecond for a read of any length
	for i := range slots {
		at := i % 64 * RecordSize
		if at == 0 {
			n := min(len(chunk), (slots-i)*RecordSize)
			if _, err := r.ReadAt(chunk[:n], int64(i)*RecordSize); err != nil {
				return 0, fmt.Errorf("read slots %d to %d: %w", i, i+n/RecordSize-1, err)
			}
		}
		seq, err := Parse(chunk[at : at+RecordSize])
		switch {
		case err != nil:
			broken[i] = err
		case seq != 0 && seq%uint64(slots) != uint64(i):
			return 0, fmt.Errorf("slot %d holds record %d", i, seq)
		}
		seqs[i] = seq
		last = max(last, seq)
	}
	for i, seq := range seqs {
		// The newest record that belongs into slot i, given that last is the newest of all; 0 if there was none yet.
		want := uint64(0)
		if back := (last%uint64(slots) + uint64(slots) - uint64(i)) % uint64(slots); last > back {
			want = last - back
		}
		if err := broken[i]; err != nil && uint64(i) == (last+1)%uint64(slots) {
			continue
		} else if err != nil {
			return last, fmt.Errorf("slot %d, newest record %d: %w", i, last, err)
		}
		if seq != want {
			return last, fmt.Errorf("slot %d holds record %d instead of %d: a write was lost (newest record %d)", i, seq, want, last)
		}
	}
	return last, nil
}
