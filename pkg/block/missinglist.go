package block

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"sync"
)

// The list of a lazy device is a header of 64 bytes and a log in the format of an overlay's state (see overlaystate.go), of
// batches that say of blocks that they are missing (1) or present (2). All numbers are little endian.
//
//	 0  16  "drafter missing\n"
//	16   4  version, 1
//	20   4  block size, bytes
//	24   8  device size, bytes
//	32  28  zero
//	60   4  CRC-32C of the 60 bytes before
//
// The first batch says what is missing; it is there as a whole, or the file is not. The others strike off.
const missingMagic = "drafter missing\n"

const (
	listedMissing = blockHeld
	listedPresent = blockZero
)

// missingList is a list of missing blocks in a file.
type missingList struct {
	fs        storage
	path      string
	size      int64 // of the device, bytes
	blockSize int64
	changed   bitmap // blocks that are present, and not struck off yet
	found     bool   // the file was there when the device was opened

	mu   sync.Mutex // one flush at a time; guards what follows
	file storedFile // nil: not made yet, or removed
	log  stateLog
	runs []stateRun // of a list that was found, until begin; of a list to be made, until it is
	over bool       // removed
	err  error      // why it cannot be written any more
}

// openMissingList reads the list at path if it is there.
func openMissingList(fs storage, path string, deviceSize int64) (_ *missingList, err error) {
	m := &missingList{fs: fs, path: path, size: deviceSize}
	n, err := fs.size(path)
	if errors.Is(err, os.ErrNotExist) {
		return m, nil
	} else if err != nil {
		return nil, fmt.Errorf("open list of what is missing: %w", err)
	}
	if m.file, err = fs.open("open list", path, fileWrite); err != nil {
		return nil, fmt.Errorf("open list of what is missing: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("read list of what is missing, %q: %w", path, err), m.file.close())
		}
	}()
	if err := m.file.lock(false); err != nil {
		return nil, err
	}
	raw := make([]byte, n)
	if err := m.file.readAt(raw, 0); err != nil {
		return nil, err
	}
	if m.blockSize, err = decodeMissingHeader(raw, deviceSize); err != nil {
		return nil, err
	}
	blocks := (deviceSize + m.blockSize - 1) / m.blockSize
	m.log, err = decodeStateLog(raw[stateHeaderSize:], blocks, func(r stateRun) { m.runs = append(m.runs, r) })
	if err == nil && m.log.sequence == 0 {
		err = errDamagedList
	}
	if err != nil {
		return nil, err
	}
	m.found = true
	return m, nil
}

var errDamagedList = errors.New("it is damaged: what is missing of this device is not known; receive the instance again, or restore it from a backup")

func encodeMissingHeader(blockSize, deviceSize int64) []byte {
	b := make([]byte, stateHeaderSize)
	copy(b, missingMagic)
	binary.LittleEndian.PutUint32(b[16:], stateVersion)
	binary.LittleEndian.PutUint32(b[20:], uint32(blockSize))
	binary.LittleEndian.PutUint64(b[24:], uint64(deviceSize))
	binary.LittleEndian.PutUint32(b[60:], crc32.Checksum(b[:60], crcTable))
	return b
}

func decodeMissingHeader(b []byte, deviceSize int64) (blockSize int64, err error) {
	switch {
	case len(b) < stateHeaderSize || string(b[:len(missingMagic)]) != missingMagic:
		return 0, errors.New("it is no such list: give the right file")
	case binary.LittleEndian.Uint32(b[16:]) != stateVersion:
		return 0, fmt.Errorf("it has version %d, this program reads version %d: use the program that wrote it", binary.LittleEndian.Uint32(b[16:]), stateVersion)
	case crc32.Checksum(b[:60], crcTable) != binary.LittleEndian.Uint32(b[60:]):
		return 0, errDamagedList
	}
	blockSize = int64(binary.LittleEndian.Uint32(b[20:]))
	if size := int64(binary.LittleEndian.Uint64(b[24:])); size != deviceSize {
		return 0, fmt.Errorf("it is of a device of %d bytes, this one has %d: they do not belong together", size, deviceSize)
	}
	if checkBlockSize(blockSize) != nil {
		return 0, errDamagedList
	}
	return blockSize, nil
}

// missing are the missing blocks of a list that was found, of n, in ascending order and in blocks.
func (m *missingList) missing(n int64) []Range {
	listed := newBitmap(n)
	for _, r := range m.runs {
		if r.state == listedMissing {
			listed.set(r.first, r.first+r.count-1)
			continue
		}
		for i := r.first; i < r.first+r.count; i++ {
			listed[i/64].And(^(uint64(1) << uint(i%64)))
		}
	}
	var missing []Range
	listed.take(func(first, last int64) { missing = append(missing, Range{Offset: first, Length: last - first + 1}) })
	return missing
}

// begin takes from a device that is being made what a new list is to say.
func (m *missingList) begin(l *Lazy) {
	m.blockSize = l.blockSize
	m.changed = newBitmap(l.blocks)
	m.runs = nil
	if m.found {
		return
	}
	const most = 1 << 30 // what a run may count
	for i := l.present.next(0, l.blocks, false); i < l.blocks; {
		end := l.present.next(i, min(l.blocks, i+most), true)
		m.runs = append(m.runs, stateRun{first: i, count: end - i, state: listedMissing})
		i = l.present.next(end, l.blocks, false)
	}
}

// flush makes durable what dst holds, and strikes off what of the list that is. The blocks to strike off are taken before:
// each of them was stored before it was present, and present before it was listed as changed.
func (m *missingList) flush(dst Device) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err != nil {
		return m.err
	}
	var present []stateRun
	m.changed.take(func(first, last int64) {
		present = append(present, stateRun{first: first, count: last - first + 1, state: listedPresent})
	})
	err := dst.Flush()
	if err == nil && !m.over {
		err = m.write(present)
	}
	if err != nil { // the next flush says it again
		for _, r := range present {
			m.changed.set(r.first, r.first+r.count-1)
		}
	}
	return err
}

// write appends to the list, which it makes first if need be. The caller holds mu.
func (m *missingList) write(present []stateRun) error {
	if m.file == nil {
		if err := m.make(); err != nil {
			return fmt.Errorf("make list of what is missing: %w", err)
		}
	}
	for len(present) > 0 {
		n := min(len(present), batchMaxRuns)
		b := appendBatch(nil, m.log.sequence+1, 0, present[:n])
		if err := m.file.writeAt("append to list", b, m.log.end); err != nil {
			return fmt.Errorf("write list of what is missing: %w", err)
		}
		if err := m.file.sync("sync list"); err != nil {
			// See Overlay.fail: a later sync that succeeds would promise too much.
			m.err = fmt.Errorf("list of what is missing %q failed and its device must be opened anew: %w", m.path, err)
			return m.err
		}
		m.log.end += int64(len(b))
		m.log.sequence++
		present = present[n:]
	}
	return nil
}

// make makes the file, whole or not at all.
func (m *missingList) make() error {
	b, log, runs := encodeMissingHeader(m.blockSize, m.size), stateLog{}, m.runs
	for first := true; first || len(runs) > 0; first = false {
		n := min(len(runs), batchMaxRuns)
		log.sequence++
		b = appendBatch(b, log.sequence, 0, runs[:n])
		runs = runs[n:]
	}
	log.end = int64(len(b))
	f, err := replaceFile(m.fs, "list", m.path, b)
	if err != nil {
		return err
	}
	m.file, m.log, m.runs = f, log, nil
	return nil
}

// remove ends the list: nothing is missing, durably.
func (m *missingList) remove() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.over {
		return nil
	}
	if m.file != nil {
		if err := m.fs.remove("remove list", m.path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("remove list of what is missing: %w", err)
		}
		if err := m.fs.syncDir("sync folder after list", filepath.Dir(m.path)); err != nil {
			return fmt.Errorf("remove list of what is missing: %w", err)
		}
	}
	m.over = true
	return nil
}

func (m *missingList) close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.file == nil {
		return nil
	}
	f := m.file
	m.file, m.over = nil, true
	return f.close()
}
