package cgroup

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// parent is the cgroup that those of machines lie in.
const parent = "drafter"

// Group is a machine's own cgroup: one folder in the v2 hierarchy, or one in each v1 hierarchy with a controller.
type Group struct{ dirs []string }

// Make makes drafter/NAME below the hierarchies of that cgroup version (1 or 2). Limits are whoever's they are to
// set: on that folder, or on drafter.
func Make(version int, name string) (*Group, error) {
	if version != 1 && version != 2 {
		return nil, fmt.Errorf("cgroup version %d: choose 1, 2, or 0 for none", version)
	}
	if name == "" || name != filepath.Base(name) || name == "." || name == ".." {
		return nil, fmt.Errorf("cgroup name %q: a file name is needed", name)
	}
	mounts, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer mounts.Close()
	found := roots(mounts, version)
	if len(found) == 0 {
		return nil, fmt.Errorf("cgroup version %d: no hierarchy of that version is mounted: choose the other version, or none", version)
	}
	c := new(Group)
	for _, root := range found {
		dir := filepath.Join(root, parent, name)
		if err := makeDir(root, dir); err != nil {
			return nil, errors.Join(fmt.Errorf("make cgroup %s: %w", dir, err), c.Remove())
		}
		c.dirs = append(c.dirs, dir)
	}
	return c, nil
}

// Find is Make for one that exists.
func Find(version int, name string) *Group {
	mounts, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil
	}
	defer mounts.Close()
	c := new(Group)
	for _, root := range roots(mounts, version) {
		c.dirs = append(c.dirs, filepath.Join(root, parent, name))
	}
	return c
}

// roots returns the mount points of the hierarchies of a version, from a file in the format of
// /proc/PID/mountinfo (proc_pid_mountinfo(5)).
func roots(mountinfo io.Reader, version int) []string {
	var roots []string
	lines := bufio.NewScanner(mountinfo)
	for lines.Scan() {
		left, right, ok := strings.Cut(lines.Text(), " - ")
		l, r := strings.Fields(left), strings.Fields(right)
		if !ok || len(l) < 5 || len(r) < 3 {
			continue
		}
		mountPoint, fs, options := unescapeMount(l[4]), r[0], strings.Split(r[2], ",")
		switch {
		case version == 2 && fs == "cgroup2":
			return []string{mountPoint} // there is only one hierarchy, however often it is mounted
		case version == 1 && fs == "cgroup" && !slices.ContainsFunc(options, func(o string) bool { return strings.HasPrefix(o, "name=") }):
			roots = append(roots, mountPoint)
		}
	}
	return roots
}

// unescapeMount undoes the octal escapes of white space and backslashes in mountinfo.
func unescapeMount(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}

func makeDir(root, dir string) error {
	// Another machine's end may remove the empty parent between the two calls.
	for range 10 {
		if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
			return err
		}
		err := os.Mkdir(dir, 0o755)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
		return inheritCpuset(root, dir)
	}
	return errors.New("its parent disappears again and again")
}

// inheritCpuset gives a new v1 cpuset cgroup, which starts empty and then takes no process, what its parents have.
func inheritCpuset(root, dir string) error {
	for _, d := range []string{filepath.Dir(dir), dir} {
		for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
			have, err := os.ReadFile(filepath.Join(d, file))
			if errors.Is(err, os.ErrNotExist) || err == nil && len(strings.TrimSpace(string(have))) > 0 {
				continue
			}
			if err != nil {
				return err
			}
			if _, err := os.Stat(filepath.Join(root, "cgroup.controllers")); err == nil {
				continue // v2: empty means inherited
			}
			parent, err := os.ReadFile(filepath.Join(filepath.Dir(d), file))
			if err != nil {
				return err
			}
			if err := os.WriteFile(filepath.Join(d, file), parent, 0o644); err != nil {
				return err
			}
		}
	}
	return nil
}

// Add moves a process, all its threads, into the cgroup.
func (c *Group) Add(pid int) error {
	for _, dir := range c.dirs {
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0o644); err != nil {
			return fmt.Errorf("move process %d into cgroup %s: %w", pid, dir, err)
		}
	}
	return nil
}

// Remove removes the cgroup, whose process has ended, and its parent if it was the last in it.
func (c *Group) Remove() error {
	if c == nil {
		return nil
	}
	var errs []error
	for _, dir := range c.dirs {
		err := unix.Rmdir(dir)
		// The kernel lets go of a process a moment after it was reaped.
		for i := 0; err == unix.EBUSY && i < 100; i++ {
			time.Sleep(time.Millisecond)
			err = unix.Rmdir(dir)
		}
		if err != nil && err != unix.ENOENT {
			errs = append(errs, fmt.Errorf("remove cgroup %s: %w", dir, err))
		}
		unix.Rmdir(filepath.Dir(dir))
	}
	return errors.Join(errs...)
}
