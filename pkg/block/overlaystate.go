package block

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math"
)

// The state file of an overlay says which blocks the overlay holds. All numbers are little endian, checksums CRC-32C.
//
//	header, 64 bytes
//	   0  16  "drafter overlay\n"
//	  16   4  version, 1
//	  20   4  block size, bytes
//	  24   8  device size, bytes
//	  32   8  base: size, bytes
//	  40   8  base: time of last modification, ns since 1970 (0: not known)
//	  48   8  base: if it is an overlay, digest of which blocks it holds (1: not known); 0: it is none
//	  56   4  zero
//	  60   4  checksum of the 60 bytes before
//	then any number of batches, each 32 + 16 × runs bytes
//	   0   4  "OVLB"
//	   4   4  number of runs
//	   8   8  sequence number; 1, 2, 3 …
//	  16   4  flags; bit 0: seal (see below)
//	  20   8  zero
//	  28   4  checksum of the batch with this field zero
//	then for each run
//	   0   8  first block
//	   8   4  number of blocks, ≥ 1
//	  12   4  what they are now; 1: held in the overlay, 2: zero
//
// Blocks are of the base until a run says otherwise; later runs win. One batch is appended, and synced, per Flush that
// has something to say, after the data it speaks of was synced. So a batch that cannot be read is one of two things: the
// last append, cut short by a crash, which is ignored (its Flush never returned); or damage, if a readable batch
// follows. Damage is an error: guessing would hand stale blocks to a guest. A seal is a batch without runs that is appended
// by Close, and by compaction, for no other reason than to be what follows.
const (
	stateMagic      = "drafter overlay\n"
	stateVersion    = 1
	stateHeaderSize = 64

	batchMagic      = 'O' | 'V'<<8 | 'L'<<16 | 'B'<<24
	batchHeaderSize = 32
	batchRunSize    = 16
	batchMaxRuns    = 1 << 16

	batchSeal = 1 << 0
)

var crcTable = crc32.MakeTable(crc32.Castagnoli)

// blockState is where the contents of a block are.
type blockState uint8

const (
	blockBase blockState = 0 // in the base
	blockHeld blockState = 1 // in the overlay
	blockZero blockState = 2 // nowhere: it was discarded
)

// stateHeader is what a state file is bound to.
type stateHeader struct {
	blockSize  int64
	deviceSize int64
	base       baseIdentity
}

// baseIdentity is what a base is known again by.
type baseIdentity struct {
	size    int64  // bytes
	modTime int64  // of its file, ns since 1970; 0: not known
	states  uint64 // of an overlay: see blockStates.digest, or unknownStates; 0: it is none
}

// unknownStates is of a base that is an overlay, and of which is not known what it holds.
const unknownStates = 1

// isOf reports whether two identities can be of the same base.
func (b baseIdentity) isOf(other baseIdentity) bool {
	return b.size == other.size && (b.modTime == other.modTime || b.modTime == 0 || other.modTime == 0) && (b.states == 0) == (other.states == 0) &&
		(b.states == other.states || b.states == unknownStates || other.states == unknownStates)
}

// unknown is what is known of a base that changes.
func (b baseIdentity) unknown() baseIdentity {
	b.modTime, b.states = 0, min(b.states, unknownStates)
	return b
}

func (h stateHeader) encode() []byte {
	b := make([]byte, stateHeaderSize)
	copy(b, stateMagic)
	le := binary.LittleEndian
	le.PutUint32(b[16:], stateVersion)
	le.PutUint32(b[20:], uint32(h.blockSize))
	le.PutUint64(b[24:], uint64(h.deviceSize))
	le.PutUint64(b[32:], uint64(h.base.size))
	le.PutUint64(b[40:], uint64(h.base.modTime))
	le.PutUint64(b[48:], h.base.states)
	le.PutUint32(b[60:], crc32.Checksum(b[:60], crcTable))
	return b
}

func decodeStateHeader(b []byte) (stateHeader, error) {
	le := binary.LittleEndian
	if len(b) < stateHeaderSize || !bytes.HasPrefix(b, []byte(stateMagic)) {
		return stateHeader{}, errors.New("it is not the state of an overlay: give the right file")
	}
	if v := le.Uint32(b[16:]); v != stateVersion {
		return stateHeader{}, fmt.Errorf("it has version %d, this program reads version %d: use the program that wrote it", v, stateVersion)
	}
	if crc32.Checksum(b[:60], crcTable) != le.Uint32(b[60:]) {
		return stateHeader{}, errDamagedState
	}
	h := stateHeader{
		blockSize:  int64(le.Uint32(b[20:])),
		deviceSize: int64(le.Uint64(b[24:])),
		base:       baseIdentity{size: int64(le.Uint64(b[32:])), modTime: int64(le.Uint64(b[40:])), states: le.Uint64(b[48:])},
	}
	if checkBlockSize(h.blockSize) != nil || h.deviceSize < 0 || h.base.size < 0 {
		return stateHeader{}, errDamagedState
	}
	return h, nil
}

var errDamagedState = errors.New("it is damaged: restore it and its overlay from a backup, or delete both to start afresh from the base")

// stateRun is count blocks that have the same state.
type stateRun struct {
	first int64
	count int64
	state blockState
}

// appendBatch appends the encoding of a batch of at most batchMaxRuns runs to b.
func appendBatch(b []byte, sequence uint64, flags uint32, runs []stateRun) []byte {
	le := binary.LittleEndian
	start := len(b)
	b = le.AppendUint32(b, batchMagic)
	b = le.AppendUint32(b, uint32(len(runs)))
	b = le.AppendUint64(b, sequence)
	b = le.AppendUint32(b, flags)
	b = append(b, make([]byte, 12)...)
	for _, r := range runs {
		b = appendRun(b, r)
	}
	le.PutUint32(b[start+28:], crc32.Checksum(b[start:], crcTable))
	return b
}

func appendRun(b []byte, r stateRun) []byte {
	b = binary.LittleEndian.AppendUint64(b, uint64(r.first))
	b = binary.LittleEndian.AppendUint32(b, uint32(r.count))
	return binary.LittleEndian.AppendUint32(b, uint32(r.state))
}

// decodedBatch is a batch whose checksum is right.
type decodedBatch struct {
	sequence uint64
	flags    uint32
	runs     []byte // encoded
	size     int    // of all of it, bytes
}

// decodeBatch reads the batch that b begins with. It reports false when there is none.
func decodeBatch(b []byte) (decodedBatch, bool) {
	le := binary.LittleEndian
	if len(b) < batchHeaderSize || le.Uint32(b) != batchMagic {
		return decodedBatch{}, false
	}
	n := le.Uint32(b[4:])
	if n > batchMaxRuns || len(b) < batchHeaderSize+int(n)*batchRunSize {
		return decodedBatch{}, false
	}
	b = b[:batchHeaderSize+int(n)*batchRunSize]
	sum := crc32.Checksum(b[:28], crcTable)
	sum = crc32.Update(sum, crcTable, zeros[:4])
	sum = crc32.Update(sum, crcTable, b[32:])
	if sum != le.Uint32(b[28:]) {
		return decodedBatch{}, false
	}
	return decodedBatch{sequence: le.Uint64(b[8:]), flags: le.Uint32(b[16:]), runs: b[batchHeaderSize:], size: len(b)}, true
}

// stateLog is what the log of a state file came to.
type stateLog struct {
	end      int64  // where the next batch goes
	sequence uint64 // of the last batch, 0 when there is none
	sealed   bool   // the last batch is a seal
	torn     bool   // there was something behind end that is no batch
}

// decodeStateLog reads the log of a state file, b without its header, of a device of n blocks, and calls apply with each run.
func decodeStateLog(b []byte, n int64, apply func(stateRun)) (stateLog, error) {
	le := binary.LittleEndian
	var log stateLog
	at := 0
	for at < len(b) {
		batch, ok := decodeBatch(b[at:])
		if !ok {
			// A crash leaves nothing readable behind what it cut short.
			for later := at + batchRunSize; later < len(b); later += batchRunSize {
				if batch, ok := decodeBatch(b[later:]); ok && batch.sequence > log.sequence {
					return stateLog{}, errDamagedState
				}
			}
			log.torn = true
			break
		}
		if batch.sequence != log.sequence+1 {
			return stateLog{}, errDamagedState
		}
		for r := batch.runs; len(r) > 0; r = r[batchRunSize:] {
			run := stateRun{first: int64(le.Uint64(r)), count: int64(le.Uint32(r[8:])), state: blockState(min(le.Uint32(r[12:]), math.MaxUint8))}
			if run.first < 0 || run.count < 1 || run.first > n-run.count || (run.state != blockHeld && run.state != blockZero) {
				return stateLog{}, errDamagedState
			}
			apply(run)
		}
		log.sequence = batch.sequence
		log.sealed = batch.flags&batchSeal != 0
		at += batch.size
	}
	log.end = stateHeaderSize + int64(at)
	return log, nil
}
