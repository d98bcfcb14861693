package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"runtime/pprof"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// usage is where a process stood when it began to be measured.
type usage struct {
	cpu time.Duration
	rss int64 // bytes resident
}

// startUsage begins to measure this process.
func startUsage() (usage, error) {
	debug.FreeOSMemory()
	// 5 resets the peak of the resident set: proc_pid_clear_refs(5).
	if err := os.WriteFile("/proc/self/clear_refs", []byte("5"), 0); err != nil {
		return usage{}, err
	}
	rss, err := statusField("VmRSS:")
	return usage{cpu: processCPU(), rss: rss}, err
}

// since is what was used since u.
func (u usage) since() (cpu time.Duration, peakExtra int64, err error) {
	peak, err := statusField("VmHWM:")
	return processCPU() - u.cpu, max(0, peak-u.rss), err
}

// startProfile begins a CPU profile of a side of ours, if one was asked for; the function it returns ends it.
func startProfile(task engineTask, side string) (end func() error, err error) {
	if task.Profile == "" || task.Plain {
		return func() error { return nil }, nil
	}
	f, err := os.Create(filepath.Join(task.Profile, side+".pprof"))
	if err != nil {
		return nil, err
	}
	if err := pprof.StartCPUProfile(f); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return func() error {
		pprof.StopCPUProfile()
		return f.Close()
	}, nil
}

// processCPU is the processor time of this process, without its children's.
func processCPU() time.Duration {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u) // cannot fail with these arguments
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// cpuOf is the processor time of a process's threads, which must not end meanwhile. The first number in schedstat is
// nanoseconds on a CPU, where stat counts hundredths of a second.
func cpuOf(pid int) (spent time.Duration, err error) {
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
	if err != nil {
		return 0, err
	}
	for _, path := range threads {
		stat, err := os.ReadFile(path)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
			continue // one of QEMU's workers
		}
		var ns int64
		if err == nil {
			_, err = fmt.Sscan(string(stat), &ns)
		}
		if err != nil {
			return 0, fmt.Errorf("read %s: %w", path, err)
		}
		spent += time.Duration(ns)
	}
	return spent, nil
}

// statusField is a field of /proc/self/status, in bytes.
func statusField(name string) (int64, error) {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0, err
	}
	_, rest, found := strings.Cut(string(status), name)
	var kib int64
	if _, err := fmt.Sscan(rest, &kib); !found || err != nil {
		return 0, fmt.Errorf("read %s in /proc/self/status: %q", name, rest)
	}
	return kib << 10, nil
}

// mincore says which pages of b are in memory, in the lowest bit of a byte each.
func mincore(b, out []byte) error {
	_, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), uintptr(unsafe.Pointer(&out[0])))
	if errno != 0 {
		return errno
	}
	return nil
}
