package supervise

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/drafter-vm/drafter/pkg/oci/bundle"
)

// adapted is what the runtime gets of a config.json, and what was set in the kernel.
func adapted(t *testing.T, text string) (all map[string]any, sysctl map[string]string, warned string) {
	t.Helper()
	dir := t.TempDir()
	var log bytes.Buffer
	sysctl = map[string]string{}
	p := place{
		run: filepath.Join(dir, "run"), etc: filepath.Join(dir, "etc"), cgroup: "/test/one", root: filepath.Join(dir, "rootfs"), dir: dir, env: []string{"A=b"},
		volumes: &volumes{disks: disks{sys: dir, dev: dir}, wait: time.Millisecond}, log: slog.New(slog.NewTextHandler(&log, nil)),
		sysctl: func(name, value string) error { sysctl[name] = value; return nil },
	}
	for _, name := range []string{"etc", "rootfs", "data"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"resolv.conf", "hostname"} {
		if err := os.WriteFile(filepath.Join(dir, "etc", name), []byte("the guest's\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	path := filepath.Join(dir, bundle.ConfigFile)
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	c, whole, err := readConfig(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.refresh(c.Hostname); err != nil {
		t.Fatal(err)
	}
	out, err := p.adapt(t.Context(), c, whole)
	if err == nil {
		err = json.Unmarshal(out, &all)
	}
	if err != nil {
		t.Fatal(err)
	}
	return all, sysctl, strings.ReplaceAll(log.String(), dir, "DIR")
}

// mountsOf are what is mounted where, in order.
func mountsOf(all map[string]any) (list []string) {
	for _, m := range all["mounts"].([]any) {
		m := m.(map[string]any)
		list = append(list, m["destination"].(string)+" "+m["type"].(string))
	}
	return list
}

func namespacesOf(all map[string]any) (list []string) {
	for _, n := range all["linux"].(map[string]any)["namespaces"].([]any) {
		list = append(list, n.(map[string]any)["type"].(string))
		if len(n.(map[string]any)) > 1 {
			list = append(list, "with more than its type")
		}
	}
	return list
}

// TestAdaptPodman has the configuration of a container of podman's, as it is where podman runs, become one that a guest can run.
func TestAdaptPodman(t *testing.T) {
	all, sysctl, warned := adapted(t, `{
		"ociVersion": "1.0.2-dev", "hostname": "",
		"root": {"path": "/var/lib/containers/storage/overlay/0123/merged", "readonly": true},
		"process": {"terminal": true, "consoleSize": {"height": 1, "width": 2}, "user": {"uid": 0, "gid": 0}, "args": ["sh"], "cwd": "/", "env": ["A=image"],
			"apparmorProfile": "containers-default-0.50.1", "selinuxLabel": "system_u:system_r:container_t:s0", "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 18446744073709551615, "soft": 1024}]},
		"mounts": [
			{"destination": "/proc", "type": "proc", "source": "proc"},
			{"destination": "/dev/shm", "type": "bind", "source": "/var/lib/containers/storage/overlay-containers/0123/userdata/shm", "options": ["bind", "rprivate"]},
			{"destination": "/etc/resolv.conf", "type": "bind", "source": "/run/containers/storage/overlay-containers/0123/userdata/resolv.conf", "options": ["bind"]},
			{"destination": "/run/.containerenv", "type": "bind", "source": "/run/containers/storage/overlay-containers/0123/userdata/.containerenv", "options": ["bind"]},
			{"destination": "/data", "type": "none", "source": "data", "options": ["rbind"]}
		],
		"hooks": {"prestart": [{"path": "/usr/libexec/podman/no-such-hook"}, {"path": "/bin/sh"}]},
		"linux": {
			"namespaces": [{"type": "pid"}, {"type": "network", "path": "/run/netns/0123"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "cgroup"}],
			"sysctl": {"net.ipv4.ping_group_range": "0 0", "kernel.hostname": "x", "kernel.shmmax": "1"},
			"seccomp": {"defaultAction": "SCMP_ACT_ERRNO"}, "cgroupsPath": "machine.slice:libpod:0123", "later": {"than": "this"}
		}}`)
	process, linux := all["process"].(map[string]any), all["linux"].(map[string]any)
	for key, want := range map[string]any{"terminal": false, "oomScoreAdj": 0.0} {
		if process[key] != want {
			t.Errorf("process.%s is %v, want %v", key, process[key], want)
		}
	}
	for _, key := range []string{"consoleSize", "apparmorProfile", "selinuxLabel"} {
		if process[key] != nil {
			t.Errorf("process.%s is left", key)
		}
	}
	if got := namespacesOf(all); !slices.Equal(got, []string{"pid", "ipc", "mount", "cgroup"}) {
		t.Errorf("namespaces are %v", got)
	}
	if got := mountsOf(all); !slices.Equal(got, []string{"/proc proc", "/dev/shm tmpfs", "/data none", "/etc/resolv.conf bind", "/etc/hostname bind"}) {
		t.Errorf("mounts are %v", got)
	}
	if source := all["mounts"].([]any)[2].(map[string]any)["source"].(string); !filepath.IsAbs(source) {
		t.Errorf("a relative source is %q", source)
	}
	if got := maps.Collect(maps.All(linux["sysctl"].(map[string]any))); len(got) != 1 || got["kernel.shmmax"] != "1" || sysctl["net.ipv4.ping_group_range"] != "0 0" {
		t.Errorf("sysctl is %v, of the kernel %v", got, sysctl)
	}
	if linux["cgroupsPath"] != "/test/one" || linux["seccomp"] == nil || linux["later"] == nil || !strings.HasSuffix(all["root"].(map[string]any)["path"].(string), "/rootfs") || all["root"].(map[string]any)["readonly"] != true {
		t.Errorf("linux is %v, root %v", linux, all["root"])
	}
	if hooks := all["hooks"].(map[string]any)["prestart"].([]any); len(hooks) != 1 {
		t.Errorf("hooks are %v", hooks)
	}
	for _, want := range []string{"path=/usr/libexec/podman/no-such-hook", "destination=/run/.containerenv"} {
		if !strings.Contains(warned, want) {
			t.Errorf("it does not warn of %s:\n%s", want, warned)
		}
	}
	// What is more than a float64 holds is what it was.
	if text, _ := json.Marshal(all); strings.Contains(string(text), "containers/storage") {
		t.Errorf("a path of the other machine is left: %s", text)
	}
}

// TestAdaptUmoci has that of umoci, without privileges, lose what only such a user needs.
func TestAdaptUmoci(t *testing.T) {
	all, _, _ := adapted(t, `{
		"ociVersion": "1.0.0", "hostname": "umoci-default", "root": {"path": "rootfs"},
		"process": {"terminal": true, "args": ["sh"], "cwd": ""},
		"mounts": [
			{"destination": "/sys", "type": "none", "source": "/sys", "options": ["rbind", "ro"]},
			{"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"]},
			{"destination": "/etc/resolv.conf", "type": "none", "source": "/etc/resolv.conf", "options": ["rbind", "ro"]}
		],
		"linux": {"uidMappings": [{"containerID": 0, "hostID": 4242, "size": 1}], "gidMappings": [{"containerID": 0, "hostID": 4242, "size": 1}],
			"namespaces": [{"type": "pid"}, {"type": "user"}, {"type": "network"}, {"type": "uts"}, {"type": "mount"}]}}`)
	if got := namespacesOf(all); !slices.Equal(got, []string{"pid", "uts", "mount"}) {
		t.Errorf("namespaces are %v", got)
	}
	if linux := all["linux"].(map[string]any); linux["uidMappings"] != nil || linux["gidMappings"] != nil {
		t.Error("mappings are left")
	}
	if got := mountsOf(all); !slices.Equal(got, []string{"/sys none", "/sys/fs/cgroup cgroup", "/etc/resolv.conf bind", "/etc/hostname bind"}) {
		t.Errorf("mounts are %v", got)
	}
	if all["process"].(map[string]any)["cwd"] != "/" {
		t.Error("it has no working directory")
	}
}

func TestNumbersStay(t *testing.T) {
	const text = `{"ociVersion":"1.0.0","process":{"args":["x"],"rlimits":[{"hard":18446744073709551615}]}}`
	path := filepath.Join(t.TempDir(), "config.json")
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	_, all, err := readConfig(path)
	out, _ := json.Marshal(all)
	if err != nil || !bytes.Contains(out, []byte("18446744073709551615")) {
		t.Errorf("%s, %v", out, err)
	}
}

// TestReadConfig refuses what is no configuration, and what is no file.
func TestReadConfig(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "config.json")
	for want, make := range map[string]func() error{
		"more than 4 MiB": func() error {
			return os.WriteFile(path, append([]byte(`{"x":"`), bytes.Repeat([]byte("x"), maxConfig)...), 0o644)
		},
		"too many levels":  func() error { return os.Symlink("/etc/passwd", path) },
		"is a directory":   func() error { return os.Mkdir(path, 0o755) },
		"read config.json": func() error { return unix.Mkfifo(path, 0o644) },
		"no destination": func() error {
			return os.WriteFile(path, []byte(`{"ociVersion":"1.0.0","process":{"args":["x"]},"mounts":[null]}`), 0o644)
		},
		"cannot unmarshal":   func() error { return os.WriteFile(path, []byte(`{"ociVersion":"1.0.0","process":7}`), 0o644) },
		"unexpected end":     func() error { return os.WriteFile(path, []byte(`{"ociVersion":`), 0o644) },
		"ociVersion is \"\"": func() error { return os.WriteFile(path, []byte(`{}`), 0o644) },
	} {
		os.RemoveAll(path)
		if err := make(); err != nil {
			t.Fatal(err)
		}
		if _, _, err := readConfig(path); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
}

// FuzzConfig has whatever is read as a configuration become one, or an error.
func FuzzConfig(f *testing.F) {
	f.Add(`{"ociVersion":"1.0.2","process":{"args":["x"]},"mounts":[{"destination":"/a","source":"LABEL=x"}],"Mounts":[],"hooks":{"poststop":[{"path":"/x"}]}}`)
	f.Add(`{"ociVersion":"1.0.2","process":{"args":["x"]},"hooks":{"prestart":null},"linux":{"namespaces":[{"type":"user"}],"uidMappings":[{"hostID":1,"size":1}],"sysctl":{"net.x":"1"}}}`)
	f.Fuzz(func(t *testing.T, text string) {
		dir := t.TempDir()
		path := filepath.Join(dir, bundle.ConfigFile)
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		c, all, err := readConfig(path)
		if err != nil {
			return
		}
		p := place{run: dir, etc: dir, root: dir, dir: dir, volumes: &volumes{disks: disks{sys: dir, dev: dir}, wait: 1}, log: slog.New(slog.DiscardHandler), sysctl: func(string, string) error { return nil }}
		out, err := p.adapt(t.Context(), c, all)
		if err == nil && !json.Valid(out) {
			t.Errorf("%s", out)
		}
	})
}

func TestNames(t *testing.T) {
	var log bytes.Buffer
	n := namer{log: slog.New(slog.NewTextHandler(&log, nil))}
	for _, test := range []struct{ device, annotation, serial, want string }{
		{"vdb", "web", "oci", "web"}, {"vdc", "", "worker", "worker"}, {"vdd", "", "1234", "vdd"}, {"vde", "", "", "vde"}, {"vdf", "web", "x", "web-2"}, {"vdg", "", "web", "web-3"},
		{"vdh", "../etc", "ok", "ok"}, {"vdi", ".hidden", "a/b", "vdi"}, {"vdj", "", "worker", "worker-2"},
	} {
		if got := n.name(test.device, test.annotation, test.serial); got != test.want {
			t.Errorf("%+v is called %q", test, got)
		}
	}
	if got := strings.Count(log.String(), "several containers ask for one name"); got != 3 {
		t.Errorf("%d warnings of names that are taken, want 3:\n%s", got, log.String())
	}
}

// TestProbe reads what mke2fs has written, and what a superblock of another kind would be.
func TestProbe(t *testing.T) {
	if _, err := exec.LookPath("mke2fs"); err == nil {
		path := filepath.Join(t.TempDir(), "disk")
		const uuid = "01234567-89ab-cdef-0123-456789abcdef"
		if out, err := exec.Command("mke2fs", "-q", "-t", "ext4", "-L", "sixteen-letters-", "-U", uuid, path, "4M").CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		fs, ok := probe(f)
		if d := (disk{filesystem: fs}); !ok || fs.kind != "ext4" || !d.is("LABEL=sixteen-letters-") || !d.is("UUID="+strings.ToUpper(uuid)) || d.is("LABEL=") || d.is("UUID=") || d.is("sixteen-letters-") {
			t.Errorf("it is %+v, %v", fs, ok)
		}
	}
	erofs := make([]byte, 4096)
	binary.LittleEndian.PutUint32(erofs[1024:], 0xe0f5e1e2)
	copy(erofs[1024+64:], "name")
	xfs := append([]byte("XFSB"), make([]byte, 4092)...)
	copy(xfs[108:], "twelve-bytes")
	btrfs := make([]byte, 65<<10)
	copy(btrfs[64<<10+64:], "_BHRfS_M")
	copy(btrfs[64<<10+299:], "b")
	for want, b := range map[string][]byte{"erofs name": erofs, "xfs twelve-bytes": xfs, "btrfs b": btrfs, "squashfs ": append([]byte("hsqs"), make([]byte, 4092)...), " ": make([]byte, 70<<10), "  ": []byte("short")} {
		fs, ok := probe(bytes.NewReader(b))
		if got := fs.kind + " " + fs.label; got != strings.TrimPrefix(want, " ") && !(strings.TrimSpace(want) == "" && !ok) {
			t.Errorf("it is %q, want %q", got, want)
		}
	}
}

// TestDisks lists those of a machine, and knows which are somebody's.
func TestDisks(t *testing.T) {
	dir := t.TempDir()
	d := disks{sys: filepath.Join(dir, "sys"), dev: filepath.Join(dir, "dev"), fstab: filepath.Join(dir, "fstab"), mountinfo: filepath.Join(dir, "mountinfo")}
	write := func(path, text string) {
		t.Helper()
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	add := func(name, number, label string) {
		erofs := make([]byte, 4096)
		binary.LittleEndian.PutUint32(erofs[1024:], 0xe0f5e1e2)
		copy(erofs[1024+64:], label)
		write(filepath.Join(d.dev, name), string(erofs))
		sys := filepath.Join(d.sys, "class/block", name)
		for attribute, text := range map[string]string{"size": "8", "dev": number, "serial": "of-" + name, "ro": "0"} {
			write(filepath.Join(sys, attribute), text+"\n")
		}
	}
	add("vda", "254:0", "root")
	add("vdaa", "254:416", "far")
	add("vdb", "254:16", "web")
	add("vdc", "254:32", "data")
	add("vdd", "254:48", "")
	add("loop0", "7:0", "web")
	write(filepath.Join(d.dev, "vdd"), "nothing that is known")
	write(d.mountinfo, "22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/root rw\n")
	write(d.fstab, "# LABEL=web\nLABEL=\"data\"\t/data ext4 defaults 0 2\n"+filepath.Join(d.dev, "vdaa")+" /far erofs ro 0 0\n")
	var got []string
	for _, one := range d.list() {
		state := "free"
		if d.taken(one) {
			state = "taken"
		}
		got = append(got, one.device+" "+one.serial+" "+one.label+" "+state)
	}
	if want := []string{"vda of-vda root taken", "vdb of-vdb web free", "vdc of-vdc data taken", "vdaa of-vdaa far taken"}; !slices.Equal(got, want) {
		t.Errorf("disks are %q, want %q", got, want)
	}
	v := volumes{disks: d, dir: filepath.Join(dir, "volumes"), wait: 300 * time.Millisecond}
	if _, err := v.open(t.Context(), "LABEL=lost", 0, ""); err == nil || !strings.Contains(err.Error(), `"LABEL=lost"`) {
		t.Errorf("a volume that is not there: %v", err)
	}
}

func TestIsBundle(t *testing.T) {
	dir := t.TempDir()
	config, root := filepath.Join(dir, bundle.ConfigFile), filepath.Join(dir, bundle.RootFolder)
	step := func(want bool, errs ...error) {
		t.Helper()
		if err := errors.Join(errs...); err != nil {
			t.Fatal(err)
		}
		if got := isBundle(dir); got != want {
			t.Errorf("a bundle: %v", got)
		}
	}
	step(false)
	step(false, os.WriteFile(config, nil, 0o644))
	step(false, os.Symlink("/", root))
	step(true, os.Remove(root), os.Mkdir(root, 0o755))
	step(false, os.Remove(config), os.Symlink("/etc/passwd", config))
}

// TestLines has what a container writes appear line by line, with its name, whatever it writes.
func TestLines(t *testing.T) {
	var out buffer
	o := output{journal: &out}
	var seen []string
	long := strings.Repeat("x", maxLine+10)
	o.copy("web", strings.NewReader("one\r\n\ntwo\n"+long+"\nlast"), func(b []byte) { seen = append(seen, string(b)) })
	if want := "web: one\nweb: \nweb: two\nweb: " + long[:maxLine] + "\nweb: " + long[maxLine:] + "\nweb: last\n"; out.String() != want {
		t.Errorf("it is %q", out.String())
	}
	if len(seen) != 6 || seen[0] != "one" || seen[5] != "last" {
		t.Errorf("it was shown %d lines", len(seen))
	}
}

// TestSlowConsole has nobody wait for a console that takes nothing, and it told how much it has missed when it does.
func TestSlowConsole(t *testing.T) {
	r, w := io.Pipe()
	var out buffer
	o := output{journal: &out, console: newConsole(w, nil)}
	const count = 100000
	var wg sync.WaitGroup
	wg.Go(func() { o.copy("web", strings.NewReader(strings.Repeat("line\n", count)), func([]byte) {}) })
	wg.Wait() // which nobody has read yet
	if got := strings.Count(out.String(), "web: line\n"); got != count {
		t.Errorf("the journal has %d lines", got)
	}
	var shown bytes.Buffer
	wg.Go(func() { io.Copy(&shown, r) })
	o.console.close()
	w.Close()
	wg.Wait()
	lines := strings.Count(shown.String(), "web: line\n")
	if lines == 0 || lines > 2*maxPending/10+1 || shown.Len() > 2*maxPending+1000 || !strings.Contains(shown.String(), "lines are not shown here") {
		t.Errorf("the console has %d lines, %d bytes, and ends in %q", lines, shown.Len(), shown.String()[max(0, shown.Len()-100):])
	}
}

// TestConsoleWarnings has the console show what goes wrong, with all that is said of it, and no more.
func TestConsoleWarnings(t *testing.T) {
	var all, shown buffer
	c := newConsole(&shown, nil)
	log := onConsole(slog.New(slog.NewTextHandler(&all, nil)), c).With("container", "web")
	log.Info("it is ready")
	log.Warn("it has ended", "end", "exit status 1")
	c.close()
	if want := "drafter: level=WARN msg=\"it has ended\" container=web end=\"exit status 1\"\n"; shown.String() != want || strings.Count(all.String(), "container=web") != 2 {
		t.Errorf("the console shows %q, and the log has %q", shown.String(), all.String())
	}
}

// TestLayer has a folder that cannot be written be written to, in memory. It needs root.
func TestLayer(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root: it mounts")
	}
	dir := t.TempDir()
	lower := filepath.Join(dir, "lower")
	if err := errors.Join(os.Mkdir(lower, 0o750), os.WriteFile(filepath.Join(lower, "file"), []byte("below"), 0o644)); err != nil {
		t.Fatal(err)
	}
	both, err := layer(lower, filepath.Join(dir, "layers", "one"))
	defer func() {
		if err := unmountBelow("/proc/self/mountinfo", filepath.Join(dir, "layers")); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(filepath.Join(dir, "layers", "one", "both")); err == nil {
			t.Error("it is mounted still")
		}
	}()
	if err != nil {
		t.Skipf("this host has no overlay: %v", err)
	}
	if err := os.WriteFile(filepath.Join(both, "file"), []byte("above"), 0o644); err != nil {
		t.Error(err)
	}
	b, err := os.ReadFile(filepath.Join(lower, "file"))
	info, failed := os.Stat(both)
	if err != nil || failed != nil || string(b) != "below" || info.Mode().Perm() != 0o750 {
		t.Errorf("below is %q, %v; the mode is %v, %v", b, err, info.Mode(), failed)
	}
}
