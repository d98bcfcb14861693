package numa

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// nodeDir is where the kernel describes NUMA nodes.
const nodeDir = "/sys/devices/system/node"

// CPUs returns the CPUs of a NUMA node.
func CPUs(node int) (*unix.CPUSet, error) {
	list, err := os.ReadFile(filepath.Join(nodeDir, fmt.Sprintf("node%d", node), "cpulist"))
	if errors.Is(err, os.ErrNotExist) {
		online, _ := os.ReadFile(filepath.Join(nodeDir, "online"))
		return nil, fmt.Errorf("NUMA node %d does not exist here: there are %s", node, strings.TrimSpace(string(online)))
	}
	if err != nil {
		return nil, fmt.Errorf("NUMA node %d: %w", node, err)
	}
	set, err := parseCPUList(string(list))
	if err != nil {
		return nil, fmt.Errorf("NUMA node %d: %w", node, err)
	}
	if set.Count() == 0 {
		return nil, fmt.Errorf("NUMA node %d has no CPUs", node)
	}
	return set, nil
}

// parseCPUList parses the kernel's format for sets: "0-3,8,10-11".
func parseCPUList(list string) (*unix.CPUSet, error) {
	set := new(unix.CPUSet)
	list = strings.TrimSpace(list)
	if list == "" {
		return set, nil
	}
	for part := range strings.SplitSeq(list, ",") {
		first, last, isRange := strings.Cut(part, "-")
		if !isRange {
			last = first
		}
		from, err1 := strconv.ParseUint(first, 10, 16)
		to, err2 := strconv.ParseUint(last, 10, 16)
		if err := errors.Join(err1, err2); err != nil || from > to {
			return nil, fmt.Errorf("parse CPU list %q", list)
		}
		for cpu := from; cpu <= to; cpu++ {
			set.Set(int(cpu))
		}
	}
	return set, nil
}

// Bind binds every thread of a process to a set. Threads inherit the set of the one that makes them, so once a look
// at all of them finds none to change, there will be none.
func Bind(pid int, set *unix.CPUSet) error {
	for {
		tasks, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
		if err != nil {
			return fmt.Errorf("bind CPUs: %w", err)
		}
		changed := false
		for _, task := range tasks {
			tid, err := strconv.Atoi(task.Name())
			if err != nil {
				continue
			}
			var have unix.CPUSet
			if err := unix.SchedGetaffinity(tid, &have); err == unix.ESRCH {
				continue
			} else if err != nil {
				return fmt.Errorf("bind CPUs of thread %d: %w", tid, err)
			}
			if have == *set {
				continue
			}
			changed = true
			if err := unix.SchedSetaffinity(tid, set); err != nil && err != unix.ESRCH {
				return fmt.Errorf("bind CPUs of thread %d: %w", tid, err)
			}
			// What the thread may not use is left out of what it got: compare with that from now on.
			if err := unix.SchedGetaffinity(tid, &have); err == nil && have.Count() < set.Count() {
				*set = have
			}
		}
		if !changed {
			return nil
		}
	}
}
