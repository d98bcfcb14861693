package ram

import (
	"cmp"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// mapping is a part of our memory in the VMM's address space.
type mapping struct {
	addr   uint64 // in the VMM
	offset int64  // in the memory
	length int64
}

func (m mapping) vma() uffdRange { return uffdRange{m.addr, uint64(m.length)} }

// mappings are all of them, by address. The same page may be mapped more than once.
type mappings []mapping

// offset is the inverse of addresses.
func (ms mappings) offset(addr uint64) (int64, bool) {
	for _, m := range ms {
		if addr >= m.addr && addr < m.addr+uint64(m.length) {
			return m.offset + int64(addr-m.addr), true
		}
	}
	return 0, false
}

// addresses calls f with each place where a part of [offset, offset+n) of the memory is mapped.
func (ms mappings) addresses(offset, n int64, f func(uffdRange) error) error {
	for _, m := range ms {
		lo, hi := max(offset, m.offset), min(offset+n, m.offset+m.length)
		if lo < hi {
			if err := f(uffdRange{m.addr + uint64(lo-m.offset), uint64(hi - lo)}); err != nil {
				return err
			}
		}
	}
	return nil
}

// covered is the first offset below size that is not mapped, or size.
func (ms mappings) covered(size int64) int64 {
	byOffset := slices.SortedFunc(slices.Values(ms), func(a, b mapping) int { return cmp.Compare(a.offset, b.offset) })
	var end int64
	for _, m := range byOffset {
		if m.offset > end {
			break
		}
		end = max(end, m.offset+m.length)
	}
	return min(end, size)
}

// readMappings finds where the process maps, shared and writable, the file that st describes. See proc_pid_maps(5).
func readMappings(pid int, st *unix.Stat_t, size int64) (mappings, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return nil, fmt.Errorf("read memory map of process %d: %w", pid, err)
	}
	ms, err := parseMaps(string(text), st, size)
	if err != nil {
		return nil, fmt.Errorf("read memory map of process %d: %w", pid, err)
	}
	return ms, nil
}

func parseMaps(text string, st *unix.Stat_t, size int64) (mappings, error) {
	dev := fmt.Sprintf("%02x:%02x", unix.Major(st.Dev), unix.Minor(st.Dev))
	ino := strconv.FormatUint(st.Ino, 10)
	var ms mappings
	for line := range strings.Lines(text) {
		// 7f5e40000000-7f5e60000000 rw-s 00000000 00:01 1043  /memfd:guest (deleted)
		fields := strings.Fields(line)
		if len(fields) < 5 || fields[4] != ino || fields[3] != dev || !strings.HasPrefix(fields[1], "rw") || !strings.HasSuffix(fields[1], "s") {
			continue
		}
		from, to, ok := strings.Cut(fields[0], "-")
		start, err1 := strconv.ParseUint(from, 16, 64)
		end, err2 := strconv.ParseUint(to, 16, 64)
		offset, err3 := strconv.ParseInt(fields[2], 16, 64)
		if !ok || err1 != nil || err2 != nil || err3 != nil || end <= start || offset < 0 {
			return nil, fmt.Errorf("cannot understand %q", strings.TrimSpace(line))
		}
		// A mapping may be longer than the file; there is nothing to track or fill beyond its end.
		if length := min(int64(end-start), size-offset); length > 0 {
			ms = append(ms, mapping{addr: start, offset: offset, length: length})
		}
	}
	return ms, nil
}

// registered reports with which modes the mappings are registered with a userfaultfd, from the VmFlags of
// /proc/PID/smaps ("um": missing, "uw": write-protect).
func (ms mappings) registered(pid int) (mode uint64, err error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", pid))
	if err != nil {
		return 0, fmt.Errorf("read memory map of process %d: %w", pid, err)
	}
	var ours bool
	for line := range strings.Lines(string(text)) {
		if flags, ok := strings.CutPrefix(line, "VmFlags:"); ok {
			if !ours {
				continue
			}
			for _, flag := range strings.Fields(flags) {
				switch flag {
				case "um":
					mode |= modeMissing
				case "uw":
					mode |= modeWP
				}
			}
			continue
		}
		from, _, ok := strings.Cut(line, "-")
		if !ok {
			continue
		}
		if start, err := strconv.ParseUint(from, 16, 64); err == nil {
			_, ours = ms.offset(start)
		}
	}
	return mode, nil
}
