package vmmtest

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/drafter-vm/drafter/pkg/vmm"
)

// stock is what this process has: goroutines, descriptors, children.
type stock struct {
	goroutines  int
	descriptors map[string]bool
	children    map[string]bool
}

// takeStock counts. Whoever wants to compare must not have anything under way.
func takeStock(t testing.TB) stock {
	t.Helper()
	return stock{runtime.NumGoroutine(), descriptors(t), children(t)}
}

// check reports what there is more of than before. Goroutines and reaped processes end a moment after whoever waited for
// them hears of it, so it looks until all is well, or for a while.
func (s stock) check(t testing.TB) {
	t.Helper()
	deadline := time.Now().Add(5 * time.Second)
	for {
		var more []string
		now := takeStock(t)
		if now.goroutines > s.goroutines {
			more = append(more, fmt.Sprintf("%d goroutines", now.goroutines-s.goroutines))
		}
		for d := range now.descriptors {
			if !s.descriptors[d] {
				more = append(more, "descriptor "+d)
			}
		}
		for c := range now.children {
			if !s.children[c] {
				more = append(more, "child "+c)
			}
		}
		if len(more) == 0 {
			return
		}
		if time.Now().After(deadline) {
			stacks := make([]byte, 1<<20)
			t.Errorf("there is more than before: %s\n%s", strings.Join(more, ", "), stacks[:runtime.Stack(stacks, true)])
			return
		}
		runtime.GC() // files that only the collector closes are not leaks of the machine's
		time.Sleep(10 * time.Millisecond)
	}
}

func descriptors(t testing.TB) map[string]bool {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	found := make(map[string]bool)
	for _, e := range entries {
		// The one of /proc/self/fd itself is gone by now.
		if target, err := os.Readlink(filepath.Join("/proc/self/fd", e.Name())); err == nil {
			found[e.Name()+" "+target] = true
		}
	}
	return found
}

func children(t testing.TB) map[string]bool {
	t.Helper()
	files, err := filepath.Glob("/proc/self/task/*/children")
	if err != nil {
		t.Fatal(err)
	}
	found := make(map[string]bool)
	for _, file := range files {
		if pids, err := os.ReadFile(file); err == nil {
			for _, pid := range strings.Fields(string(pids)) {
				found[pid] = true
			}
		}
	}
	return found
}

// checkEmpty reports what a machine left in its folder, other than disks and sockets of disks, which are not its own.
func checkEmpty(t testing.TB, cfg vmm.Config) {
	t.Helper()
	entries, err := os.ReadDir(cfg.Dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		mine := true
		for _, at := range cfg.Disks {
			if path := filepath.Join(cfg.Dir, e.Name()); at.Socket == path || at.Path == path {
				mine = false
			}
		}
		if mine {
			t.Errorf("the machine left %s in its folder", e.Name())
		}
	}
}
