package firecracker

import (
	"fmt"
	"maps"
	"strings"
	"testing"
)

func TestMeasures(t *testing.T) {
	var m measures
	lines := `{"utc_timestamp_ms":1700000000000,"api_server":{"process_startup_time_us":900},"block":{"read_bytes":100,"read_agg":{"min_us":1}},"latencies_us":{"pause_vm":7}}
nonsense
[1]
{"block":{"read_bytes":50,"write_bytes":"many"},"block_disk0":{"read_bytes":50},"api_server":{"process_startup_time_us":900},"signals":{"sigsegv":1,"sigpipe":1},"vmm":{"panic_count":1},"seccomp":{"num_faults":1},"vhost_user_block_a":{"init_time_us":7,"cfg_fails":1}}
{"signals":{"sigsegv":1,"sigpipe":1},"vmm":{"panic_count":1,"device_events":2},"seccomp":{"num_faults":1},"vhost_user_block_a":{"init_time_us":7,"cfg_fails":1}}
{"block":{"read_bytes":1000}`
	for len(lines) > 0 { // as it comes
		n := min(17, len(lines))
		if got, err := m.Write([]byte(lines[:n])); got != n || err != nil {
			t.Fatal(got, err)
		}
		lines = lines[n:]
	}
	want := map[string]float64{
		"api_server.process_startup_time_us": 900, "block.read_bytes": 150, "block_disk0.read_bytes": 50, "signals.sigsegv": 1, "signals.sigpipe": 2,
		"vmm.panic_count": 1, "vmm.device_events": 2, "seccomp.num_faults": 1, "vhost_user_block_a.init_time_us": 7, "vhost_user_block_a.cfg_fails": 2,
	}
	if got := m.all(); !maps.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	for n := range 2 * maxNames {
		fmt.Fprintf(&m, "{\"x\":{\"%d\":1,\"%s\":1}}\n", n, strings.Repeat("y", maxName))
	}
	if got := len(m.all()); got != maxNames {
		t.Errorf("%d names are kept, want %d", got, maxNames)
	}
	// What has no end takes no memory for ever.
	for range 3 {
		m.Write([]byte(strings.Repeat("x", maxLine)))
	}
	if len(m.line) > maxLine {
		t.Errorf("%d bytes of a line are kept", len(m.line))
	}
}
