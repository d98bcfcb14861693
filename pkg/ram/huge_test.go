package ram

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
)

// allowHuge allows huge pages for the duration of a test.
func allowHuge(t *testing.T) {
	t.Helper()
	before, err := os.ReadFile(hugeSetting)
	if err != nil {
		t.Skipf("no huge pages: %v", err)
	}
	if HugePages() == nil {
		return
	}
	_, was, _ := strings.Cut(string(before), "[")
	was, _, _ = strings.Cut(was, "]")
	if err := os.WriteFile(hugeSetting, []byte("advise"), 0); err != nil {
		t.Skipf("huge pages cannot be allowed here: %v", err)
	}
	t.Cleanup(func() {
		if err := os.WriteFile(hugeSetting, []byte(was), 0); err != nil {
			t.Errorf("the setting stays changed, from %q: %v", was, err)
		}
	})
}

// huge is how many bytes a process has mapped in huge pages of shared memory.
func huge(t *testing.T, pid int) (n int64) {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, "ShmemPmdMapped:"); ok {
			kb, err := strconv.ParseInt(strings.Fields(value)[0], 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			n += kb << 10
		}
	}
	return n
}

// TestCollapse: memory that was filled goes into huge pages, is tracked by small ones all the same, and goes into huge ones again.
func TestCollapse(t *testing.T) {
	needFull(t)
	allowHuge(t)
	checkLeaks(t)
	const size = 16 << 20
	mem, v := grafted(t, size)
	defer mem.Close()
	collapses := func(want int64, when string) {
		t.Helper()
		if n, err := mem.Collapse(t.Context()); err != nil || n != want {
			t.Errorf("%s: %d bytes were put into huge pages, want %d (%v)", when, n, want, err)
		}
	}
	collapses(0, "empty")
	want := contents(size, 1)
	filler, err := mem.Fill(t.Context(), newSource(want), FillOptions{OnDemand: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := mem.Graft(v.allocate(size)); err != nil {
		t.Fatal(err)
	}
	collapses(0, "being filled")
	deliver(t, filler, want)
	collapses(size, "filled")
	if n := huge(t, v.h.PID()); n != size {
		t.Errorf("%d bytes are in huge pages, want %d", n, size)
	}
	for page := 0; page < size/pageSize; page += 5 {
		if got := v.ask(fmt.Sprintf("peek %d", page*pageSize)); got != fmt.Sprint(want[page*pageSize]) {
			t.Errorf("page %d begins with %s, want %d", page, got, want[page*pageSize])
		}
	}

	v.tracks(mem, 77, func() { collapses(0, "tracked") })
	collapses(size, "not tracked any more")
	if n := huge(t, v.h.PID()); n != size {
		t.Errorf("%d bytes are in huge pages in the end, want %d", n, size)
	}
}

func TestHugeAllowed(t *testing.T) {
	for setting, want := range map[string]bool{
		"always within_size advise [never] deny force": false, "always within_size advise never [deny] force": false,
		"always within_size [advise] never deny force": true, "[always] within_size advise never deny force": true,
	} {
		err := hugeAllowed(setting)
		if (err == nil) != want || err != nil && !strings.Contains(err.Error(), "echo advise") {
			t.Errorf("%s: got error %v, allowed %t", setting, err, want)
		}
	}
	mem := create(t, 1<<20)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := mem.Collapse(ctx); HugePages() == nil && !errors.Is(err, context.Canceled) {
		t.Errorf("a cancelled call: %v", err)
	}
}
