package cgroup

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
	if got, want := roots(strings.NewReader(mounts), 1), []string{"/sys/fs/cgroup/cpu", "/sys/fs/cgroup/my memory"}; !slices.Equal(got, want) {
		t.Errorf("v1: %q, want %q", got, want)
	}
	if got, want := roots(strings.NewReader(mounts), 2), []string{"/sys/fs/cgroup/unified"}; !slices.Equal(got, want) {
		t.Errorf("v2: %q, want %q", got, want)
	}
	if got := roots(strings.NewReader(""), 2); got != nil {
		t.Errorf("nothing mounted: %q", got)
	}
}
