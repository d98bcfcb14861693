package firecracker

import (
	"bytes"
	"encoding/json"
	"maps"
	"strings"
	"sync"
)

// measures are what Firecracker counts of itself: it writes a line of JSON each minute, and when it ends, with what was counted since the one before.
type measures struct {
	mu   sync.Mutex // guards what follows
	line []byte
	sums map[string]float64 // by GROUP.NAME
}

// maxLine bounds a line, in bytes. It has some KB.
const maxLine = 1 << 20

// What is kept of one that says anything: Firecracker has a few hundred names, of some 50 bytes at most.
const (
	maxNames = 4096
	maxName  = 200 // bytes
)

// Write takes lines, and never fails: what is none is passed over.
func (m *measures) Write(p []byte) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.line = append(m.line, p...)
	for {
		line, rest, ok := bytes.Cut(m.line, []byte("\n"))
		if !ok {
			break
		}
		m.add(line)
		m.line = append(m.line[:0], rest...)
	}
	if len(m.line) > maxLine {
		m.line = nil
	}
	return len(p), nil
}

func (m *measures) add(line []byte) {
	var groups map[string]json.RawMessage
	if json.Unmarshal(line, &groups) != nil {
		return
	}
	if m.sums == nil {
		m.sums = make(map[string]float64)
	}
	for group, text := range groups {
		var numbers map[string]any
		// Latencies are of the last operation, and are no sums. The time of the line is a number by itself.
		if strings.HasPrefix(group, "latencies") || json.Unmarshal(text, &numbers) != nil {
			continue
		}
		for name, n := range numbers {
			key := group + "." + name
			if _, known := m.sums[key]; !known && (len(m.sums) >= maxNames || len(key) > maxName) {
				continue
			}
			n, ok := n.(float64)
			switch {
			case !ok:
			case stays(group, name):
				m.sums[key] = n
			default:
				m.sums[key] += n
			}
		}
	}
}

// stays reports whether Firecracker says of a number in each line what it has come to, and not what was counted since the line before: those of
// its type SharedStoreMetric (src/vmm/src/logger/metrics.rs of 1.10 to 1.16).
func stays(group, name string) bool {
	switch group {
	case "api_server":
		return strings.HasPrefix(name, "process_startup_time")
	case "seccomp":
		return name == "num_faults"
	case "signals":
		return name != "sigpipe" // the one that does not end it
	case "vmm":
		return name == "panic_count"
	}
	return strings.HasPrefix(group, "vhost_user") && strings.HasSuffix(name, "_time_us")
}

// all are the sums so far.
func (m *measures) all() map[string]float64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return maps.Clone(m.sums)
}

// Metrics implements [vmm.Measurer]. They are a minute old, at most.
func (m *machine) Metrics() map[string]float64 { return m.counted.all() }
