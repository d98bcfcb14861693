package qemu

import (
	"slices"
	"strings"
	"testing"
)

func TestCgroupRoots(t *testing.T) {
	const mounts = `22 1 0:20 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
23 22 0:21 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu
24 22 0:22 / /sys/fs/cgroup/my\040memory rw,relatime shared:9 - cgroup cgroup rw,memory
25 22 0:23 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd
26 22 0:24 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
broken line
`
	if got, want := cgroupRoots(strings.NewReader(mounts), 1), []string{"/sys/fs/cgroup/cpu", "/sys/fs/cgroup/my memory"}; !slices.Equal(got, want) {
		t.Errorf("v1: %q, want %q", got, want)
	}
	if got, want := cgroupRoots(strings.NewReader(mounts), 2), []string{"/sys/fs/cgroup/unified"}; !slices.Equal(got, want) {
		t.Errorf("v2: %q, want %q", got, want)
	}
	if got := cgroupRoots(strings.NewReader(""), 2); got != nil {
		t.Errorf("nothing mounted: %q", got)
	}
}

func TestParseCPUList(t *testing.T) {
	for _, tc := range []struct {
		list string
		want int // CPUs; -1: an error
	}{
		{"0\n", 1}, {"0-3,8,10-11\n", 7}, {"", 0}, {"\n", 0}, {"3-1", -1}, {"a", -1}, {"1-", -1}, {"1,,2", -1},
	} {
		set, err := parseCPUList(tc.list)
		if (err != nil) != (tc.want < 0) || err == nil && set.Count() != tc.want {
			t.Errorf("%q: %v, %v", tc.list, set, err)
		}
	}
}

func FuzzParseCPUList(f *testing.F) {
	f.Add("0-3,8")
	f.Fuzz(func(t *testing.T, list string) {
		if set, err := parseCPUList(list); err == nil && set == nil {
			t.Error("neither a set nor an error")
		}
	})
}
