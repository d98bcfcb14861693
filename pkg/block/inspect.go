package block

import (
	"bufio"
	"fmt"
	"iter"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// OverlayInfo is what the files of an overlay say of it, by themselves.
type OverlayInfo struct {
	Size      int64 // of the device, bytes
	BlockSize int64 // bytes
	Blocks    OverlayBlocks

	BaseModTime   time.Time // when its base was last modified, as it was when the overlay was made; zero: not known
	BaseIsOverlay bool      // its base was another overlay

	Allocated int64     // what the overlay file takes of its file system, bytes
	Modified  time.Time // when the overlay file was last written
	Flushed   time.Time // when blocks were last put on record

	Clean bool // it was closed, and not cut short: nothing may be in its file that is not on record
	InUse bool // somebody has it open, as far as /proc/locks tells. What a writer has not flushed is not in here

	states blockStates
}

// InspectOverlay reads what an overlay consists of, without its base, and changes nothing. Somebody may use the overlay meanwhile; then
// it is seen as it was at the last flush.
func InspectOverlay(overlay, state string) (*OverlayInfo, error) {
	info, err := inspectOverlay(overlay, state)
	if err != nil {
		return nil, fmt.Errorf("inspect overlay %q: %w", overlay, err)
	}
	return info, nil
}

func inspectOverlay(overlay, state string) (*OverlayInfo, error) {
	raw, err := os.ReadFile(state)
	if err != nil {
		return nil, err
	}
	header, err := decodeStateHeader(raw)
	if err != nil {
		return nil, fmt.Errorf("state %q: %w", state, err)
	}
	file, err := os.Stat(overlay)
	if err != nil {
		return nil, err
	}
	ofState, err := os.Stat(state)
	if err != nil {
		return nil, err
	}
	info := &OverlayInfo{
		Size: header.deviceSize, BlockSize: header.blockSize, BaseIsOverlay: header.base.states != 0,
		Allocated: file.Sys().(*syscall.Stat_t).Blocks * 512, // stat(2): whatever the file system's blocks are
		Modified:  file.ModTime(), Flushed: ofState.ModTime(),
	}
	if header.base.modTime != 0 {
		info.BaseModTime = time.Unix(0, header.base.modTime)
	}
	blocks := (header.deviceSize + header.blockSize - 1) / header.blockSize
	if file.Size() == info.Size { // or else it holds nothing, and what the state says of its size is not to be believed
		info.states = newBlockStates(blocks)
	}
	log, err := decodeStateLog(raw[stateHeaderSize:], blocks, func(r stateRun) {
		if info.states != nil {
			info.states.set(r.first, r.first+r.count-1, r.state)
		}
	})
	if err != nil {
		return nil, fmt.Errorf("state %q: %w", state, err)
	}
	if info.states == nil && (file.Size() != 0 || log.sequence > 1) {
		return nil, fmt.Errorf("it has %d bytes, its device has %d: it was truncated, or belongs to another state than %q", file.Size(), info.Size, state)
	}
	info.Clean = log.sealed && !log.torn
	info.Blocks = info.states.count(blocks)
	info.InUse, err = locked(file.Sys().(*syscall.Stat_t))
	return info, err
}

// locked reports whether somebody holds a lock on a file, without disturbing who is about to take one. See proc_locks(5).
func locked(file *syscall.Stat_t) (bool, error) {
	f, err := os.Open("/proc/locks")
	if err != nil {
		return false, err
	}
	defer f.Close()
	name := fmt.Sprintf("%02x:%02x:%d", unix.Major(file.Dev), unix.Minor(file.Dev), file.Ino)
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if fields := strings.Fields(lines.Text()); slices.Contains(fields, name) && fields[1] == "FLOCK" {
			return true, nil
		}
	}
	return false, lines.Err()
}

// Changes lists the ranges that are not the base's, in ascending order, in whole blocks but for the end of the device; and of each whether it
// is in the overlay file, or else was discarded, and reads as zero.
func (i *OverlayInfo) Changes() iter.Seq2[Range, bool] {
	return func(yield func(Range, bool) bool) {
		if i.states == nil {
			return
		}
		for _, r := range i.states.runs(i.Blocks.Total) {
			off := r.first * i.BlockSize
			if !yield(Range{Offset: off, Length: min(r.count*i.BlockSize, i.Size-off)}, r.state == blockHeld) {
				return
			}
		}
	}
}
