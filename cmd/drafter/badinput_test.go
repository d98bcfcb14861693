package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/runner"
	"github.com/drafter-vm/drafter/pkg/vmm"
	"github.com/drafter-vm/drafter/pkg/vmm/qemu"
	"github.com/drafter-vm/drafter/pkg/vmpackage"
	"github.com/drafter-vm/drafter/pkg/wire"
)

// drafter runs a command line as main does.
func drafter(ctx context.Context, args ...string) (status int, stdout, stderr string) {
	var out, errs bytes.Buffer
	err := run(ctx, append([]string{"drafter"}, args...), strings.NewReader(""), &out, &errs)
	return exitStatus(err), out.String(), errs.String()
}

// foreign is a package that no machine is started from, in a folder of its own, and what is made wrong about it.
type foreign struct {
	dir  string
	pkg  string
	desc runner.Description
}

// newForeign makes a package which is right in every respect but the contents of memory, kernel and device state.
func newForeign(t *testing.T) *foreign {
	t.Helper()
	dir, err := os.MkdirTemp("", "dr") // short: unix sockets may be made below it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	f := &foreign{dir: dir, desc: runner.Description{Spec: vmm.Spec{
		Hypervisor: "qemu", Version: "10.0.0", Accel: "tcg", MachineType: "pc-q35-8.0", CPUModel: "Westmere", CPUCount: 1, MemorySize: 1 << 20,
		Disks: []vmm.Disk{{Name: "disk", Size: 1 << 20}},
	}}}
	if caps, err := qemu.New(qemu.Options{}).Describe(t.Context(), vmm.Spec{MemorySize: 1 << 20}); err == nil {
		f.desc.MachineType = caps.MachineType
	}
	f.pkg = filepath.Join(f.dir, "package")
	if err := os.Mkdir(f.pkg, 0o700); err != nil {
		t.Fatal(err)
	}
	for name, size := range map[string]int64{"state": runner.StateDeviceSize, "memory": 1 << 20, "disk": 1 << 20, "kernel": 4096} {
		dev, err := block.CreateFile(f.file(name), size)
		if err != nil {
			t.Fatal(err)
		}
		if name == "state" {
			if err := runner.WriteSaved(dev, []byte("no machine's")); err != nil {
				t.Fatal(err)
			}
		}
		if err := dev.Close(); err != nil {
			t.Fatal(err)
		}
	}
	f.describe(t, func(*runner.Description) {})
	return f
}

func (f *foreign) file(name string) string { return filepath.Join(f.pkg, vmpackage.DefaultFile(name)) }

// describe changes the config device.
func (f *foreign) describe(t *testing.T, change func(*runner.Description)) {
	t.Helper()
	change(&f.desc)
	b, err := f.desc.Encode()
	if err != nil {
		t.Fatal(err)
	}
	f.write(t, "config", b)
}

// write replaces a device, and the manifest so that it fits.
func (f *foreign) write(t *testing.T, name string, content []byte) {
	t.Helper()
	if err := os.WriteFile(f.file(name), content, 0o600); err != nil {
		t.Fatal(err)
	}
	var files []vmpackage.File
	for _, name := range []string{"state", "memory", "kernel", "disk", "config"} {
		files = append(files, vmpackage.File{Name: name, Path: f.file(name)})
	}
	if _, err := vmpackage.WriteManifest(t.Context(), f.pkg, files, vmpackage.ManifestOptions{SkipDigests: true}); err != nil {
		t.Fatal(err)
	}
}

// devices is a --devices value for the package, with overlays in dir/instance, changed by edit.
func (f *foreign) devices(edit func(devices []map[string]any)) string {
	var list []map[string]any
	for _, name := range []string{"state", "memory", "kernel", "disk", "config"} {
		list = append(list, map[string]any{
			"name": name, "base": f.file(name),
			"overlay": filepath.Join(f.dir, "instance", name+".overlay"), "state": filepath.Join(f.dir, "instance", name+".state"),
		})
	}
	edit(list)
	b, _ := json.Marshal(list) // strings and numbers
	return string(b)
}

// set returns an edit of the disk's entry.
func set(key string, value any) func([]map[string]any) {
	return func(devices []map[string]any) { devices[3][key] = value }
}

// tree lists all below a folder with type, size and time of change, to be compared.
func tree(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		fmt.Fprintf(&b, "%s %s", path, info.Mode())
		if info.Mode().IsRegular() {
			fmt.Fprintf(&b, " %d bytes, %s", info.Size(), info.ModTime())
		}
		b.WriteByte('\n')
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// checkRefused checks that a command line is refused, with a message that has all of want, and leaves nothing: no file or
// folder below dir, no process, no descriptor.
func checkRefused(t *testing.T, dir string, args []string, status int, want ...string) {
	t.Helper()
	t.Setenv("XDG_CACHE_HOME", t.TempDir()) // what QEMU can do is remembered there: outside of dir
	t.Setenv("TMPDIR", dir)
	before, fds, processes := tree(t, dir), descriptors(t), children(t)
	got, stdout, stderr := drafter(t.Context(), args...)
	if got != status {
		t.Errorf("exit status %d, want %d", got, status)
	}
	for _, w := range want {
		if !strings.Contains(stderr, w) {
			t.Errorf("the message lacks %q", w)
		}
	}
	if stdout != "" {
		t.Errorf("stdout has %q, want nothing", stdout)
	}
	if strings.Contains(stderr, "hidden") || strings.Contains(stderr, "12345") {
		t.Errorf("the message shows a secret: %s", stderr)
	}
	if after := tree(t, dir); after != before {
		t.Errorf("it left something behind or changed something:\n%s\nwas\n%s", after, before)
	}
	// The other end of a connection, which is in this process too, may need a moment. What was open before may have
	// needed one, too: an earlier case's, so what counts is what is open now and was not.
	left := added(descriptors(t), fds)
	for deadline := time.Now().Add(10 * time.Second); len(left) > 0 && time.Now().Before(deadline); left = added(descriptors(t), fds) {
		runtime.Gosched()
	}
	if len(left) > 0 {
		t.Errorf("it left descriptors open: %q, beside %q", left, fds)
	}
	if left := added(children(t), processes); len(left) > 0 {
		t.Errorf("it left processes: %q, beside %q", left, processes)
	}
	if t.Failed() || testing.Verbose() {
		t.Logf("drafter %q says:\n%s", args, stderr)
	}
}

// descriptors lists what our open descriptors are of, except those that the runtime keeps once made.
func descriptors(t *testing.T) []string {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	var list []string
	for _, e := range entries {
		target, err := os.Readlink("/proc/self/fd/" + e.Name())
		if err != nil || strings.HasPrefix(target, "anon_inode:[event") || strings.HasPrefix(target, "/proc/") || strings.HasPrefix(target, "anon_inode:[pidfd]") {
			continue
		}
		list = append(list, target)
	}
	return list
}

// children lists the processes that are ours, ended or not.
func children(t *testing.T) (pids []string) {
	t.Helper()
	files, err := filepath.Glob("/proc/self/task/*/children")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		text, _ := os.ReadFile(f) // of a thread that may have ended
		pids = append(pids, strings.Fields(string(text))...)
	}
	return pids
}

// added lists what of now is not in before, each as often as it is there more.
func added(now, before []string) []string {
	rest := slices.Clone(before)
	return slices.DeleteFunc(now, func(target string) bool {
		i := slices.Index(rest, target)
		if i >= 0 {
			rest = slices.Delete(rest, i, i+1)
		}
		return i >= 0
	})
}

func needQEMU(t *testing.T) {
	t.Helper()
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		t.Skipf("needs QEMU: %v", err)
	}
}

// TestMachineFlagsRefused gives both tools that run a machine what no machine here can have.
func TestMachineFlagsRefused(t *testing.T) {
	for _, tt := range []struct {
		name   string
		args   []string
		status int
		want   []string
	}{
		{"unknown flag", []string{"--memory", "1"}, 2, []string{"--memory", "--help"}},
		{"positional argument", []string{"now"}, 2, []string{`"now"`, "flag"}},
		{"log level", []string{"--log-level", "loud"}, 2, []string{"--log-level", `"loud"`, "debug, info"}},
		{"hypervisor", []string{"--hypervisor", "xen"}, 2, []string{"--hypervisor", `"xen"`, "use auto, qemu or firecracker"}},
		{"accel", []string{"--accel", "hvf"}, 2, []string{"--accel", `"hvf"`, "use auto, kvm or tcg"}},
		{"uid negative", []string{"--uid", "-1"}, 2, []string{"--uid -1", "negative"}},
		{"uid too high", []string{"--uid", "99999999999"}, 2, []string{"--uid 99999999999", "4294967294"}},
		{"gid negative", []string{"--gid", "-7"}, 2, []string{"--gid -7", "negative"}},
		{"uid no number", []string{"--uid", "nobody"}, 2, []string{"--uid", `"nobody"`}},
		{"netns missing", []string{"--netns", "no-such-namespace"}, 1, []string{"--netns", `"no-such-namespace"`, "make it"}},
		{"netns path", []string{"--netns", "../netns/x"}, 2, []string{"--netns", `"../netns/x"`, "name"}},
		{"NUMA node missing", []string{"--numa-node", "4093"}, 1, []string{"--numa-node 4093", "-1 for any"}},
		{"NUMA node negative", []string{"--numa-node", "-2"}, 2, []string{"--numa-node -2", "-1 for any"}},
		{"cgroup version", []string{"--cgroup-version", "3"}, 2, []string{"--cgroup-version 3", "use 1 or 2"}},
		{"resume timeout", []string{"--resume-timeout", "0s"}, 2, []string{"--resume-timeout 0s", "above zero"}},
		{"resume timeout without unit", []string{"--resume-timeout", "60"}, 2, []string{"--resume-timeout", "60"}},
		{"chroot base dir", []string{"--chroot-base-dir", ""}, 2, []string{"--chroot-base-dir", "give a folder"}},
		{"QEMU missing", []string{"--qemu-bin", "/no/such/qemu"}, 1, []string{"--qemu-bin", "/no/such/qemu", "give the path"}},
		{"Firecracker missing", []string{"--firecracker-bin", "/no/such/fc"}, 1, []string{"--firecracker-bin", "/no/such/fc", "give the path"}},
		{"no Firecracker", []string{"--firecracker-bin", "/bin/true"}, 1, []string{"--firecracker-bin", "/bin/true", "is it Firecracker?"}},
		{"jailer missing", []string{"--jailer-bin", "/no/such/jailer"}, 1, []string{"--jailer-bin", "/no/such/jailer", "give the path"}},
		{"disk bandwidth", []string{"--disk-bandwidth", "-1"}, 2, []string{"--disk-bandwidth -1", "0 for no limit"}},
		{"disk IOPS", []string{"--disk-iops", "-5"}, 2, []string{"--disk-iops -5", "0 for no limit"}},
		{"no QEMU", []string{"--qemu-bin", "/bin/true"}, 1, []string{`--qemu-bin: ask "/bin/true"`, "it is not QEMU", "give the program qemu-system-x86_64 (Debian: qemu-system-x86)\n"}},
	} {
		for _, tool := range []string{"snapshotter", "peer"} {
			t.Run(tool+" "+tt.name, func(t *testing.T) {
				f := newForeign(t)
				args := []string{tool, "--devices", f.devices(func([]map[string]any) {}), "--chroot-base-dir", filepath.Join(f.dir, "vms")}
				if tool == "snapshotter" {
					args[2] = snapshotterDevices(f, func([]map[string]any) {})
				}
				if tt.args[0] != "--netns" {
					args = append(args, "--netns", "")
				}
				checkRefused(t, f.dir, append(args, tt.args...), tt.status, tt.want...)
			})
		}
	}
}

// TestMachineFlagDefaults shows that a default which this host cannot honour is no error, but the same value asked for is.
func TestMachineFlagDefaults(t *testing.T) {
	parse := func(args ...string) (m machineFlags) {
		t.Helper()
		flags := pflag.NewFlagSet("peer", pflag.ContinueOnError)
		m.register(flags)
		if err := flags.Parse(append([]string{"--netns", ""}, args...)); err != nil {
			t.Fatal(err)
		}
		return m
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	m := parse()
	if err := m.check(); err != nil {
		t.Errorf("the defaults are refused: %v", err)
	}
	want := 2
	if cgroupUsable(string(mounts), 2) != nil {
		want = 0
	}
	if m.cgroupVersion != want {
		t.Errorf("the default cgroup version became %d, want %d", m.cgroupVersion, want)
	}
	for version := 1; version <= 2; version++ {
		usable := cgroupUsable(string(mounts), version)
		m := parse("--cgroup-version", fmt.Sprint(version))
		err := m.check()
		if (err == nil) != (usable == nil) || err != nil && !strings.Contains(err.Error(), fmt.Sprintf("--cgroup-version %d", version)) {
			t.Errorf("--cgroup-version %d: %v, but: %v", version, err, usable)
		}
		if m.cgroupVersion != version {
			t.Errorf("--cgroup-version %d became %d", version, m.cgroupVersion)
		}
	}
}

func TestCgroupUsable(t *testing.T) {
	const (
		v1     = "23 22 0:21 / / rw,relatime - cgroup cgroup rw,cpu\n"
		named  = "25 22 0:23 / / rw,relatime - cgroup cgroup rw,name=systemd\n"
		v2     = "26 22 0:24 / / rw,relatime shared:1 - cgroup2 cgroup2 rw\n"
		absent = "26 22 0:24 / /no/such/place rw,relatime - cgroup2 cgroup2 rw\n"
	)
	root := unix.Access("/", unix.W_OK) == nil
	for _, tt := range []struct {
		mounts  string
		version int
		want    string // of the error; empty: none
	}{
		{v1 + v2, 1, ""}, {v1 + v2, 2, ""}, {v1, 2, "no control group hierarchy"}, {v2, 1, "no control group hierarchy"},
		{named, 1, "no control group hierarchy"}, {"", 2, "no control group hierarchy"}, {"junk\n", 2, "no control group hierarchy"},
		{absent, 2, "/no/such/place"},
	} {
		err := cgroupUsable(tt.mounts, tt.version)
		if tt.want == "" && err != nil && root || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("version %d in %q: %v, want %q", tt.version, tt.mounts, err, tt.want)
		}
	}
}

func snapshotterDevices(f *foreign, edit func([]map[string]any)) string {
	var list []map[string]any
	for _, name := range []string{"state", "memory", "kernel", "disk", "config"} {
		d := map[string]any{"name": name, "output": filepath.Join(f.dir, "new", "package", name)}
		if name == "kernel" || name == "disk" {
			d["input"] = f.file(name)
		}
		list = append(list, d)
	}
	edit(list)
	b, _ := json.Marshal(list) // strings
	return string(b)
}

func TestSnapshotterRefuses(t *testing.T) {
	needQEMU(t)
	for _, tt := range []struct {
		name   string
		edit   func([]map[string]any)
		args   []string
		status int
		want   []string
	}{
		{"unknown key", set("size", 7), nil, 2, []string{`device "disk"`, `"size"`, "known keys are name, input, output"}},
		{"name twice", set("name", "kernel"), nil, 2, []string{`"kernel"`, "twice"}},
		{"no output", set("output", ""), nil, 1, []string{`"disk"`, "no output", "give the file"}},
		{"output twice", func(d []map[string]any) { d[3]["output"] = d[2]["output"] }, nil, 1, []string{`"kernel"`, `"disk"`, "same output"}},
		{"input missing", set("input", "/no/such/rootfs"), nil, 1, []string{`"disk"`, `"/no/such/rootfs"`, "make a blueprint first"}},
		{"input is a folder", set("input", "/"), nil, 1, []string{`"disk"`, `"/"`, "folder"}},
		{"state with input", func(d []map[string]any) { d[0]["input"] = "/dev/null" }, nil, 1, []string{`"state"`, "leave the input out"}},
		{"no disk", func(d []map[string]any) { d[3]["name"] = "initrd" }, nil, 1, []string{"no disk"}},
		{"no kernel", func(d []map[string]any) { d[2]["name"] = "logs" }, nil, 1, []string{`"kernel"`}},
		{"disk of odd size", func(d []map[string]any) { d[3]["input"] = f512(d) }, nil, 1, []string{`"disk"`, `/odd"`, "3 bytes", "multiple of 512"}},
		{"MAC", nil, []string{"--mac", "02:zz"}, 2, []string{"--mac", `"02:zz"`, "like 02:0e:d9:fd:68:3d"}},
		{"MAC too long", nil, []string{"--mac", "02:00:00:00:00:00:00:01"}, 2, []string{"--mac", "02:00:00:00:00:00:00:01"}},
		{"MAC multicast", nil, []string{"--mac", "03:00:00:00:00:01"}, 2, []string{"--mac", `"03:00:00:00:00:01"`, "multicast"}},
		{"tap missing", nil, []string{"--interface", "no-tap-of-ours"}, 1, []string{`no-tap-of-ours`}},
		{"CPU count", nil, []string{"--cpu-count", "0"}, 2, []string{"--cpu-count 0", "at least 1"}},
		{"CPU count huge", nil, []string{"--cpu-count", "4096"}, 1, []string{"4096", "255"}},
		{"memory size", nil, []string{"--memory-size", "0"}, 2, []string{"--memory-size 0", "MiB"}},
		{"Firecracker's CPU template", nil, []string{"--cpu-template", "T2"}, 1, []string{`"T2"`, "Firecracker", "with QEMU name one"}},
		{"CPU template unknown", nil, []string{"--cpu-template", "Z80"}, 1, []string{`"Z80"`, "-cpu help"}},
		{"CPU template host under emulation", nil, []string{"--cpu-template", "host", "--accel", "tcg"}, 1, []string{`"host"`, "kvm"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := newForeign(t)
			if err := os.WriteFile(filepath.Join(f.dir, "odd"), []byte("odd"), 0o600); err != nil {
				t.Fatal(err)
			}
			edit := tt.edit
			if edit == nil {
				edit = func([]map[string]any) {}
			}
			args := []string{"snapshotter", "--netns", "", "--chroot-base-dir", filepath.Join(f.dir, "vms"), "--devices", snapshotterDevices(f, edit)}
			if !slices.Contains(tt.args, "--interface") && !slices.Contains(tt.args, "--mac") {
				args = append(args, "--interface", "")
			}
			checkRefused(t, f.dir, append(args, tt.args...), tt.status, tt.want...)
		})
	}
}

// s3 has the disk be kept in a store, with more keys.
func s3(more ...any) func([]map[string]any) {
	return func(d []map[string]any) {
		d[3]["s3sync"] = true
		for n := 0; n < len(more); n += 2 {
			d[3][more[n].(string)] = more[n+1]
		}
	}
}

// f512 is the path of a file that is no multiple of 512 bytes, beside the package.
func f512(d []map[string]any) string {
	return filepath.Join(filepath.Dir(filepath.Dir(d[3]["input"].(string))), "odd")
}

func TestPeerRefuses(t *testing.T) {
	needQEMU(t)
	for _, tt := range []struct {
		name   string
		edit   func([]map[string]any)
		args   []string
		status int
		want   []string
	}{
		{"no JSON", nil, []string{"--devices", "disk"}, 2, []string{"--devices"}},
		{"unknown key", set("size", 7), nil, 2, []string{`device "disk"`, `"size"`, "known keys are name, base"}},
		{"name twice", set("name", "kernel"), nil, 2, []string{`"kernel"`, "twice"}},
		{"no base", set("base", ""), nil, 2, []string{`"disk"`, "no base", "give the file"}},
		{"missing base", set("base", "/no/such/rootfs"), nil, 1, []string{`"disk"`, `"/no/such/rootfs"`, "make the package first"}},
		{"overlay without state", set("state", ""), nil, 2, []string{`"disk"`, "disk.overlay", "give both or neither"}},
		{"state without overlay", set("overlay", ""), nil, 2, []string{`"disk"`, "disk.state", "give both or neither"}},
		{"overlay is the base", func(d []map[string]any) { d[3]["overlay"] = d[3]["base"] }, nil, 2, []string{`"disk"`, "both use the file"}},
		{"block size no power of two", set("blockSize", 5000), nil, 2, []string{`"disk"`, "5000", "power of two", "4096"}},
		{"block size too small", set("blockSize", 2048), nil, 2, []string{`"disk"`, "2048", "4096"}},
		{"block size negative", set("blockSize", -4096), nil, 2, []string{`"disk"`, "-4096"}},
		{"maxDirtyBlocks negative", set("maxDirtyBlocks", -1), nil, 2, []string{`"disk"`, `"maxDirtyBlocks"`, "-1"}},
		{"minCycles above maxCycles", func(d []map[string]any) { d[3]["minCycles"], d[3]["maxCycles"] = 9, 3 }, nil, 2, []string{`"disk"`, "minCycles", "9", "3"}},
		{"expiry negative", set("expiry", -5), nil, 2, []string{`"disk"`, `"expiry"`, "-5"}},
		{"shared", set("shared", true), nil, 1, []string{`"disk" is shared`, "can write it", "make a snapshot in which it is shared"}},
		{"sharedbase", func(d []map[string]any) { d[3]["sharedbase"] = true; delete(d[3], "overlay"); delete(d[3], "state") }, nil, 2, []string{`"disk"`, `"sharedbase" needs an overlay`}},
		{"s3 without bucket", s3("s3endpoint", "host:9000"), nil, 2, []string{`"disk"`, `no "s3bucket"`, "--store"}},
		{"s3 credentials without bucket", s3("s3accesskey", "a", "s3secretkey", "hidden"), nil, 2, []string{`"disk"`, `no "s3bucket"`}},
		{"s3 half of the credentials", s3("s3bucket", "bbb", "s3secretkey", "hidden"), nil, 2, []string{`"disk"`, "both the access key and the secret key"}},
		{"s3 endpoint", s3("s3bucket", "bbb", "s3endpoint", "host/path"), nil, 2, []string{`"disk"`, `"http://host/path"`, "without a path"}},
		{"s3 endpoint that is not secure", s3("s3bucket", "bbb", "s3endpoint", "http://host", "s3secure", true), nil, 2, []string{`"disk"`, `"s3secure"`, "https://"}},
		{"s3 secret of another type", s3("s3bucket", "bbb", "s3secretkey", 12345), nil, 2, []string{`key "s3secretkey" must be a string`}},
		{"s3 concurrency", s3("s3bucket", "bbb", "s3concurrency", -1), nil, 2, []string{`"s3concurrency" is -1`}},
		{"s3 of what stays", s3("s3bucket", "bbb", "makeMigratable", false), nil, 2, []string{`"disk"`, "device that travels"}},
		{"guest MAC", nil, []string{"--guest-mac", "01:00:00:00:00:01"}, 2, []string{`MAC "01:00:00:00:00:01"`, "first is even"}},
		{"guest address", nil, []string{"--guest-address", "10.0.0.1"}, 2, []string{`address "10.0.0.1"`, "prefix length"}},
		{"guest MAC of what is received", nil, []string{"--guest-mac", "02:00:00:00:00:01", "--raddr", "localhost:1"}, 2, []string{"exclude --raddr"}},
		{"variable without a value", nil, []string{"--env", "A"}, 2, []string{"--env", `variable "A"`, "NAME=VALUE"}},
		{"variable of what is received", nil, []string{"--env", "A=b", "--raddr", "localhost:1"}, 2, []string{"--env excludes --raddr"}},
		{"store", nil, []string{"--store", "bucket"}, 2, []string{`--store "bucket"`, "s3://BUCKET"}},
		{"store with credentials", nil, []string{"--store", "s3://a:hidden@b/c", "--store-sync"}, 2, []string{"--store", "credentials are given apart"}},
		{"store endpoint with credentials", nil, []string{"--store", "s3://bbb", "--store-sync", "--store-endpoint", "http://a:hidden@host"}, 2, []string{"without credentials"}},
		{"store with credentials and another scheme", nil, []string{"--store", "https://a:hidden@b:9000/c", "--store-sync"}, 2, []string{"--store", "s3://BUCKET"}},
		{"store endpoint with a query", nil, []string{"--store", "s3://bbb", "--store-sync", "--store-endpoint", "http://h:1/?key=hidden"}, 2, []string{"without a path"}},
		{"s3 secure endpoint with credentials", s3("s3bucket", "bbb", "s3secure", true, "s3endpoint", "http://a:hidden@h"), nil, 2, []string{"s3secure"}},
		{"store for nothing", nil, []string{"--store", "s3://bbb"}, 2, []string{"--store does nothing without"}},
		{"store quiet for nothing", nil, []string{"--store", "s3://bbb", "--backup", "x", "--store-quiet", "1s"}, 2, []string{"--store-quiet does nothing without"}},
		{"store sync without a store", nil, []string{"--store-sync"}, 2, []string{"--store-sync needs --store"}},
		{"store without a bucket", nil, []string{"--store", "s3://"}, 2, []string{"--store", "no bucket"}},
		{"store endpoint alone", nil, []string{"--store-endpoint", "http://host"}, 2, []string{"--store-endpoint needs --store"}},
		{"store endpoint", nil, []string{"--store", "s3://bbb", "--store-endpoint", "host:9000"}, 2, []string{`"host:9000"`, "http://HOST:PORT"}},
		{"store key", nil, []string{"--store", "s3://bbb", "--store-sync", "--store-key", "/no/such/key"}, 2, []string{"--store-key", "/no/such/key"}},
		{"store concurrency", nil, []string{"--store", "s3://bbb", "--store-sync", "--store-concurrency", "0"}, 2, []string{"--store-concurrency 0", "1 to 1024"}},
		{"store quiet", nil, []string{"--store", "s3://bbb", "--store-sync", "--store-quiet", "0s"}, 2, []string{"--store-quiet 0s", "above zero"}},
		{"backup without store", nil, []string{"--backup", "web"}, 2, []string{"--backup needs --store"}},
		{"backup name", nil, []string{"--store", "s3://bbb", "--backup", "../x"}, 2, []string{"--backup", `"../x"`}},
		{"backup time alone", nil, []string{"--store", "s3://bbb", "--store-sync", "--backup-every", "1s"}, 2, []string{"--backup-every needs --backup"}},
		{"backup keep", nil, []string{"--store", "s3://bbb", "--backup", "web", "--backup-keep", "0"}, 2, []string{"--backup-keep 0", "at least 1"}},
		{"restore with devices", nil, []string{"--store", "s3://bbb", "--restore", "web", "--package", "x"}, 2, []string{"--restore excludes --devices"}},
		{"block size beyond any overlay", set("blockSize", 1<<40), nil, 2, []string{"1099511627776", "67108864"}},
		{"disk the machine lacks", set("name", "logs"), nil, 1, []string{`"disk"`, "add it to the devices"}},
		{"memory of another package", func(d []map[string]any) { d[1]["base"], d[2]["base"] = d[2]["base"], d[1]["base"] }, nil, 1, []string{"memory", "different packages"}},
		{"metrics without port", nil, []string{"--metrics", "localhost"}, 2, []string{"--metrics", `"localhost"`, "HOST:PORT"}},
		{"maximum of downtime", nil, []string{"--max-downtime", "-1ms"}, 2, []string{"--max-downtime -1ms", "above zero"}},
		{"maximum of total time", nil, []string{"--max-total-time", "0"}, 2, []string{"--max-total-time 0s", "leave it out"}},
		{"more downtime than time", nil, []string{"--max-downtime", "2s", "--max-total-time", "1s"}, 2, []string{"--max-downtime", "2s", "1s", "raise the total time"}},
		{"downtime without unit", nil, []string{"--max-downtime", "20"}, 2, []string{"--max-downtime", "20", "unit"}},
		{"concurrency", nil, []string{"--concurrency", "0"}, 2, []string{"--concurrency 0", "at least 1"}},
		{"rescue timeout", nil, []string{"--rescue-timeout", "-1s"}, 2, []string{"--rescue-timeout -1s", "above zero"}},
		{"VXLAN of a name", nil, []string{"--connections-vxlan", "localhost"}, 2, []string{"--connections-vxlan", `"localhost"`, "IP address of this host"}},
		{"VXLAN without port", nil, []string{"--connections-vxlan", "192.0.2.1:0"}, 2, []string{"--connections-vxlan", `"192.0.2.1:0"`, "port"}},
		{"VXLAN of all addresses", nil, []string{"--connections-vxlan", "0.0.0.0"}, 2, []string{"--connections-vxlan", `"0.0.0.0"`, "one address"}},
		{"VXLAN without keeping", nil, []string{"--connections-vxlan", "192.0.2.1", "--keep-connections=false"}, 2, []string{"--connections-vxlan", "--keep-connections=false"}},
		{"VXLAN without a namespace", nil, []string{"--connections-vxlan", "192.0.2.1"}, 2, []string{"--netns", "drafter nat"}},
		{"laddr without port", nil, []string{"--laddr", "localhost"}, 2, []string{"--laddr", `"localhost"`, "HOST:PORT"}},
		{"laddr with a bad port", nil, []string{"--laddr", "localhost:65536"}, 2, []string{"--laddr", `"65536"`, "HOST:PORT"}},
		{"laddr of another scheme", nil, []string{"--laddr", "carrier://localhost:1"}, 2, []string{"--laddr", `"carrier"`, "HOST:PORT", "quic"}},
		{"laddr of datagrams", nil, []string{"--laddr", "udp://localhost:1"}, 2, []string{"--laddr", "datagrams", "quic://"}},
		{"laddr that can only be dialled", nil, []string{"--laddr", "ssh://host/localhost:1"}, 2, []string{"--laddr", "only be dialled"}},
		{"tls without certificate", nil, []string{"--laddr", "tls://localhost:1"}, 2, []string{"--laddr", "--tls-cert", "--tls-key", "--tls-ca", "--allow-peer"}},
		{"tls with a missing file", nil, []string{"--raddr", "tls://localhost:1", "--tls-cert", "/nowhere", "--tls-key", "/nowhere", "--tls-ca", "/nowhere"}, 2, []string{"--raddr", `"/nowhere"`, "no such file"}},
		{"certificate for nothing", nil, []string{"--laddr", "localhost:0", "--tls-cert", "/nowhere"}, 2, []string{"--tls-cert has no effect", "neither authenticated"}},
		{"psk without key", nil, []string{"--raddr", "psk://localhost:1"}, 2, []string{"--raddr", "--psk-file", "DRAFTER_PSK"}},
		{"psk with a missing file", nil, []string{"--raddr", "psk://localhost:1", "--psk-file", "/nowhere"}, 2, []string{"--raddr", "/nowhere", "no such file"}},
		{"key for nothing", nil, []string{"--laddr", "localhost:0", "--psk-file", "/nowhere"}, 2, []string{"--psk-file has no effect"}},
		{"names over tcp", nil, []string{"--laddr", "localhost:0", "--allow-peer", "host"}, 2, []string{"--allow-peer has no effect", "prove a name"}},
		{"bad name", nil, []string{"--laddr", "unix:///tmp/x", "--allow-peer", "uid:root"}, 2, []string{"--laddr", `"uid:root"`, "no number"}},
		{"ssh without target", nil, []string{"--raddr", "ssh://host"}, 2, []string{"--raddr", "no target", "localhost:1337"}},
		{"one stdio for two", nil, []string{"--raddr", "stdio:", "--laddr", "stdio:"}, 2, []string{"are both stdio:"}},
		{"raddr without port", nil, []string{"--raddr", "localhost"}, 2, []string{"--raddr", `"localhost"`, "HOST:PORT"}},
		{"raddr with a bad port", nil, []string{"--raddr", "localhost:x"}, 2, []string{"--raddr", `"x"`, "HOST:PORT"}},
		{"raddr without listener", nil, []string{"--raddr", "localhost:1"}, 1, []string{"--raddr", `"localhost:1"`, "refused", "start the peer"}},
		{"report cannot be written", nil, []string{"--report", "/no/such/folder/report"}, 1, []string{"--report", "/no/such/folder/report"}},
		{"package and devices", nil, []string{"--package", "x"}, 2, []string{"--devices", "--package"}},
		{"disk that stays behind", set("makeMigratable", false), []string{"--laddr", "localhost:0"}, 2, []string{`"disk"`, "make it migratable"}},
		{"folder of machines too deep", nil, []string{"--chroot-base-dir", "/tmp/" + strings.Repeat("d", 90)}, 1, []string{"--chroot-base-dir", "shorter"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := newForeign(t)
			edit := tt.edit
			if edit == nil {
				edit = func([]map[string]any) {}
			}
			args := []string{"peer", "--netns", "", "--chroot-base-dir", filepath.Join(f.dir, "vms")}
			if !slices.Contains(tt.args, "--devices") {
				args = append(args, "--devices", f.devices(edit))
			}
			checkRefused(t, f.dir, append(args, tt.args...), tt.status, tt.want...)
		})
	}
}

// TestPeerRefusesPackage gives the peer packages of others, and broken ones.
func TestPeerRefusesPackage(t *testing.T) {
	needQEMU(t)
	for _, tt := range []struct {
		name   string
		change func(t *testing.T, f *foreign)
		want   []string
	}{
		{"no package", func(t *testing.T, f *foreign) { os.RemoveAll(f.pkg) }, []string{"--package", "package", "make the package first"}},
		{"another hypervisor", func(t *testing.T, f *foreign) {
			f.describe(t, func(d *runner.Description) { d.Hypervisor = "xen" })
		}, []string{`made by hypervisor "xen"`, `only "qemu" is supported here`, "make the package anew"}},
		{"what no Firecracker has made", func(t *testing.T, f *foreign) {
			f.describe(t, func(d *runner.Description) { d.Hypervisor = "firecracker" })
		}, []string{`saved with "tcg"`, `Firecracker has "kvm"`, "make the package anew"}},
		{"a machine type of the future", func(t *testing.T, f *foreign) {
			f.describe(t, func(d *runner.Description) { d.MachineType = "pc-q35-99.0" })
		}, []string{`"pc-q35-99.0"`, "install the QEMU version"}},
		{"an unknown CPU", func(t *testing.T, f *foreign) {
			f.describe(t, func(d *runner.Description) { d.CPUModel = "Itanium" })
		}, []string{`"Itanium"`, "no such CPU"}},
		{"CPU features that this host lacks", func(t *testing.T, f *foreign) {
			if _, err := os.Stat("/dev/kvm"); err != nil {
				t.Skipf("needs a /dev/kvm: without it the package is refused because of that: %v", err)
			}
			f.describe(t, func(d *runner.Description) { d.Accel, d.CPUFeatures = "kvm", []string{"antigravity"} })
		}, []string{`"antigravity"`, "--cpu-template"}},
		{"acceleration that nobody has", func(t *testing.T, f *foreign) {
			f.describe(t, func(d *runner.Description) { d.Accel = "hvf" })
		}, []string{`"hvf"`}},
		{"a config that is none", func(t *testing.T, f *foreign) { damage(t, f.file("config"), 0) }, []string{"config"}},
		{"another program's config", func(t *testing.T, f *foreign) { f.write(t, "config", []byte(`{"cpus":1}`)) }, []string{"config", "not made by drafter"}},
		{"another program's state", func(t *testing.T, f *foreign) { f.write(t, "state", make([]byte, runner.StateDeviceSize)) }, []string{"state", "magic"}},
		{"truncated state", func(t *testing.T, f *foreign) { f.write(t, "state", []byte("DRFTSTA1")) }, []string{"state"}},
		{"corrupt state header", func(t *testing.T, f *foreign) { damage(t, f.file("state"), 17) }, []string{"state", "corrupt"}},
		{"corrupt state", func(t *testing.T, f *foreign) { damage(t, f.file("state"), 4096) }, []string{"state", "corrupt"}},
		{"truncated disk", func(t *testing.T, f *foreign) { truncate(t, f.file("disk")) }, []string{`"disk"`, "in the manifest"}},
		{"truncated memory", func(t *testing.T, f *foreign) { f.write(t, "memory", make([]byte, 4096)) }, []string{"memory", "different packages"}},
		{"missing memory", func(t *testing.T, f *foreign) { os.Remove(f.file("memory")) }, []string{`"memory"`, "no such file"}},
		{"corrupt manifest", func(t *testing.T, f *foreign) { damage(t, filepath.Join(f.pkg, vmpackage.ManifestFile), 5) }, []string{"manifest"}},
		{"the archive", func(t *testing.T, f *foreign) {
			os.RemoveAll(f.pkg)
			if err := os.WriteFile(f.pkg, []byte("(\xb5/\xfd"), 0o600); err != nil {
				t.Fatal(err)
			}
		}, []string{"--package", "extract"}},
		{"running elsewhere", func(t *testing.T, f *foreign) { setStatus(t, f.file("state"), runner.Running) }, []string{"was running", "--boot"}},
		{"moved away", func(t *testing.T, f *foreign) { setStatus(t, f.file("state"), runner.Moved) }, []string{"another peer"}},
	} {
		for _, instance := range []string{"", "instance"} {
			t.Run(tt.name+" "+instance, func(t *testing.T) {
				f := newForeign(t)
				tt.change(t, f)
				args := []string{"peer", "--netns", "", "--chroot-base-dir", filepath.Join(f.dir, "vms"), "--package", f.pkg}
				if instance != "" {
					args = append(args, "--instance", filepath.Join(f.dir, instance))
				}
				checkRefused(t, f.dir, args, 1, tt.want...)
			})
		}
	}
}

// TestInstanceIsPackage gives the package's own folder as the one for the overlays, under several names.
func TestInstanceIsPackage(t *testing.T) {
	f := newForeign(t)
	link := filepath.Join(f.dir, "link")
	if err := os.Symlink("package", link); err != nil {
		t.Fatal(err)
	}
	for _, paths := range [][2]string{{f.pkg, f.pkg}, {f.pkg, link}, {link, f.pkg + "/."}} {
		checkRefused(t, f.dir, []string{"peer", "--netns", "", "--chroot-base-dir", filepath.Join(f.dir, "vms"), "--package", paths[0], "--instance", paths[1]},
			2, "--instance", paths[1], "the package itself", "a folder of its own")
	}
}

// TestRollbackRefused asks for a rollback where there is nothing to return to, or together with its opposite.
func TestRollbackRefused(t *testing.T) {
	for _, tt := range []struct {
		args   []string
		record runner.Status
		status int
		want   []string
	}{
		{[]string{"--rollback", "--boot"}, runner.Running, 2, []string{"--rollback", "--boot", "choose one"}},
		{[]string{"--rollback", "--force-owner"}, runner.Moved, 2, []string{"--rollback", "--force-owner", "belongs here"}},
		{[]string{"--keep-commit-point", "--boot"}, runner.Running, 2, []string{"--keep-commit-point", "--boot", "next start"}},
		{[]string{"--rollback"}, runner.Running, 1, []string{"no commit point", "--keep-commit-point", "--boot"}},
		{[]string{"--rollback", "--keep-commit-point"}, runner.Running, 1, []string{"no commit point"}},
		{[]string{"--rollback"}, runner.Moved, 1, []string{"no commit point", "another peer"}},
		{[]string{"--rollback"}, runner.Receiving, 1, []string{"no commit point", "receive it again"}},
		{[]string{"--rollback"}, runner.ShutDown, 1, []string{"no commit point", "shut down", "--boot"}},
	} {
		t.Run(fmt.Sprint(tt.args, tt.record), func(t *testing.T) {
			f := newForeign(t)
			setStatus(t, f.file("state"), tt.record)
			checkRefused(t, f.dir, append([]string{"peer", "--netns", "", "--chroot-base-dir", filepath.Join(f.dir, "vms"), "--package", f.pkg}, tt.args...), tt.status, tt.want...)
		})
	}
}

func damage(t *testing.T, path string, offset int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 1)
	if _, err := f.ReadAt(b, offset); err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte{b[0] ^ 0x10}, offset); err != nil {
		t.Fatal(err)
	}
}

// setStatus changes the status in a state device's header, and its checksum: package runner says where they are.
func setStatus(t *testing.T, path string, status runner.Status) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 108)
	if _, err := f.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	binary.LittleEndian.PutUint32(b[8:], uint32(status))
	binary.LittleEndian.PutUint32(b[104:], crc32.Checksum(b[:104], crc32.MakeTable(crc32.Castagnoli)))
	if _, err := f.WriteAt(b, 0); err != nil {
		t.Fatal(err)
	}
}

func truncate(t *testing.T, path string) {
	t.Helper()
	if err := os.Truncate(path, 4096); err != nil {
		t.Fatal(err)
	}
}

// TestOverlayRefused opens an instance whose overlay does not fit its base any more.
func TestOverlayRefused(t *testing.T) {
	for _, tt := range []struct {
		name  string
		spoil func(t *testing.T, base, overlay, state string)
		want  []string
	}{
		{"base changed", func(t *testing.T, base, _, _ string) { damage(t, base, 9) }, []string{"changed since the overlay was made"}},
		{"base replaced by a bigger one", func(t *testing.T, base, _, _ string) {
			if err := os.Truncate(base, 2<<20); err != nil {
				t.Fatal(err)
			}
		}, []string{"changed since the overlay was made", "1048576", "2097152", "start afresh"}},
		{"overlay deleted", func(t *testing.T, _, overlay, _ string) { os.Remove(overlay) }, []string{"without its overlay", "start afresh"}},
		{"state deleted", func(t *testing.T, _, _, state string) { os.Remove(state) }, []string{"without its state", "start afresh"}},
		{"state damaged", func(t *testing.T, _, _, state string) { damage(t, state, 20) }, []string{"damaged"}},
		{"overlay truncated", func(t *testing.T, _, overlay, _ string) { truncate(t, overlay) }, []string{"4096 bytes", "start afresh"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := newForeign(t)
			base, overlay, state := f.file("disk"), filepath.Join(f.dir, "instance", "disk.overlay"), filepath.Join(f.dir, "instance", "disk.state")
			if err := os.Mkdir(filepath.Dir(overlay), 0o700); err != nil {
				t.Fatal(err)
			}
			file, err := block.OpenFile(base, block.FileOptions{ReadOnly: true})
			if err != nil {
				t.Fatal(err)
			}
			o, err := block.OpenOverlay(block.OverlayOptions{Base: file, BasePath: base, Overlay: overlay, State: state})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := o.WriteAt([]byte("written"), 1<<19); err != nil {
				t.Fatal(err)
			}
			if err := o.Close(); err != nil {
				t.Fatal(err)
			}
			tt.spoil(t, base, overlay, state)
			checkRefused(t, f.dir, []string{"peer", "--netns", "", "--chroot-base-dir", filepath.Join(f.dir, "vms"), "--devices", f.devices(func([]map[string]any) {})},
				1, append(tt.want, `"disk"`)...)
		})
	}
}

// TestInstanceInUse starts an instance whose files another process holds.
func TestInstanceInUse(t *testing.T) {
	f := newForeign(t)
	held, err := os.Open(f.file("memory"))
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	// Locks belong to the open file, so that ours holds against us.
	if err := unix.Flock(int(held.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	checkRefused(t, f.dir, []string{"peer", "--netns", "", "--chroot-base-dir", filepath.Join(f.dir, "vms"), "--package", f.pkg},
		1, `"memory"`, "in use by another instance", "overlays of its own")
}

func TestPortInUse(t *testing.T) {
	f := newForeign(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	checkRefused(t, f.dir, []string{"peer", "--netns", "", "--chroot-base-dir", filepath.Join(f.dir, "vms"), "--package", f.pkg,
		"--laddr", l.Addr().String(), "--report", filepath.Join(f.dir, "report")},
		1, "--laddr", l.Addr().String(), "in use", "another port")
	checkRefused(t, f.dir, []string{"peer", "--netns", "", "--chroot-base-dir", filepath.Join(f.dir, "vms"), "--package", f.pkg, "--metrics", l.Addr().String()},
		1, "--metrics", l.Addr().String(), "in use", "another port")
}

// TestReceiveFromStrangers receives from what is no Drafter, or one we cannot talk to.
func TestReceiveFromStrangers(t *testing.T) {
	for _, tt := range []struct {
		name   string
		answer func(net.Conn)
		want   []string
	}{
		{"an HTTP server", func(c net.Conn) { fmt.Fprintf(c, "HTTP/1.1 400 Bad Request\r\n\r\n") }, []string{"not a Drafter", "HTTP"}},
		{"an SSH server", func(c net.Conn) { fmt.Fprintf(c, "SSH-2.0-OpenSSH_9.2\r\n") }, []string{"not a Drafter", "SSH"}},
		{"random bytes", func(c net.Conn) {
			b := make([]byte, 1<<16)
			rand.NewChaCha8([32]byte{}).Read(b)
			c.Write(b)
		}, []string{"not a Drafter"}},
		{"one that hangs up", func(c net.Conn) { io.ReadFull(c, make([]byte, wire.PrefaceSize)) }, []string{"closed"}},
		{"a newer Drafter", func(c net.Conn) {
			c.Write(wire.Preface{Newest: 99, Oldest: 98, Role: wire.RoleSource, Streams: 1, Session: 7}.Append(nil))
			c.Read(make([]byte, 64))
		}, []string{"version", "98", "99"}},
		{"a Drafter that talks nonsense", func(c net.Conn) {
			c.Write(append(wire.Preface{Newest: wire.Version, Oldest: wire.OldestVersion, Role: wire.RoleSource, Streams: 1, Session: 7}.Append(nil), bytes.Repeat([]byte{0xee}, 4096)...))
			c.Read(make([]byte, 64))
		}, []string{"receive from"}},
		{"another destination", func(c net.Conn) {
			c.Write(wire.Preface{Newest: wire.Version, Oldest: wire.OldestVersion, Role: wire.RoleDestination, Streams: 1, Session: 7}.Append(nil))
			c.Read(make([]byte, 64))
		}, []string{"destination"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := newForeign(t)
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			done := make(chan struct{})
			go func() {
				defer close(done)
				conn, err := l.Accept()
				if err != nil {
					return
				}
				tt.answer(conn)
				conn.Close()
			}()
			defer func() { l.Close(); <-done }()
			checkRefused(t, f.dir, []string{"peer", "--netns", "", "--chroot-base-dir", filepath.Join(f.dir, "vms"), "--package", f.pkg,
				"--instance", filepath.Join(f.dir, "instance"), "--raddr", l.Addr().String()}, 1, append(tt.want, l.Addr().String())...)
		})
	}
}

// TestPackagerRefusesPackage extracts from what is no package, and from broken ones. Nothing of them is written.
func TestPackagerRefusesPackage(t *testing.T) {
	for _, tt := range []struct {
		name  string
		spoil func(t *testing.T, path string)
		want  []string
	}{
		{"missing", func(t *testing.T, path string) { os.Remove(path) }, []string{"no such file"}},
		{"empty", func(t *testing.T, path string) {
			if err := os.Truncate(path, 0); err != nil {
				t.Fatal(err)
			}
		}, nil},
		{"foreign", func(t *testing.T, path string) {
			if err := os.WriteFile(path, []byte("PK\x03\x04 some other archive"), 0o600); err != nil {
				t.Fatal(err)
			}
		}, []string{"not a Drafter package"}},
		{"truncated", func(t *testing.T, path string) {
			info, err := os.Stat(path)
			if err == nil {
				err = os.Truncate(path, info.Size()*2/3)
			}
			if err != nil {
				t.Fatal(err)
			}
		}, nil},
		{"corrupt", func(t *testing.T, path string) {
			info, err := os.Stat(path)
			if err != nil {
				t.Fatal(err)
			}
			damage(t, path, info.Size()*2/3)
		}, nil},
		{"a folder", func(t *testing.T, path string) {
			os.Remove(path)
			if err := os.Mkdir(path, 0o700); err != nil {
				t.Fatal(err)
			}
		}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := newForeign(t)
			noise := make([]byte, 1<<20) // that does not compress, so that there is something to break
			rand.NewChaCha8([32]byte{1}).Read(noise)
			f.write(t, "disk", noise)
			archive := filepath.Join(f.dir, "app.tar.zst")
			devices := func(dir string) string {
				var list []string
				for _, name := range []string{"state", "memory", "kernel", "disk", "config"} {
					list = append(list, fmt.Sprintf(`{"name":%q,"path":%q}`, name, filepath.Join(dir, vmpackage.DefaultFile(name))))
				}
				return "[" + strings.Join(list, ",") + "]"
			}
			if status, _, stderr := drafter(t.Context(), "packager", "--package-path", archive, "--devices", devices(f.pkg)); status != 0 {
				t.Fatalf("packing failed: %s", stderr)
			}
			tt.spoil(t, archive)
			checkRefused(t, f.dir, []string{"packager", "--extract", "--package-path", archive, "--devices", devices(filepath.Join(f.dir, "extracted"))},
				1, append(tt.want, archive)...)
		})
	}
}

// TestStdioForOne takes stdio: for one address, beside one that is empty.
func TestStdioForOne(t *testing.T) {
	for _, tt := range []struct {
		links links
		want  string // part of the error
	}{
		{links{raddr: "stdio:"}, ""},
		{links{laddr: "stdio:", accept: "localhost:1"}, ""},
		{links{raddr: "stdio:", accept: "stdio:"}, "--raddr and --accept are both stdio:"},
	} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		defer w.Close()
		flags := pflag.NewFlagSet("", pflag.ContinueOnError)
		tt.links.register(flags)
		if err := tt.links.check(t.Context(), flags, r, w); tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%+v: %v, want %q", tt.links, err, tt.want)
		}
	}
}
