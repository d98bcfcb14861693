package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/drafter-vm/drafter/internal/testguest"
	"github.com/drafter-vm/drafter/internal/testnet"
	"github.com/drafter-vm/drafter/pkg/oci/bundle"
	"github.com/drafter-vm/drafter/pkg/vmpackage"
)

// Ports of the containers of TestContainers.
const webPort, jobPort, fixedPort = 8001, 8002, 8003

// mke2fs makes a disk of a folder; of none, if dir is empty.
func mke2fs(t *testing.T, path, label, dir string) {
	t.Helper()
	args := []string{"-q", "-t", "ext4", "-L", label}
	if dir != "" {
		args = append(args, "-d", dir)
	}
	if out, err := exec.Command("mke2fs", append(args, path, "24M")...).CombinedOutput(); err != nil {
		t.Fatalf("make disk: %v\n%s", err, out)
	}
}

// containerRoot makes the root of a container in a folder.
func containerRoot(t *testing.T, root string) {
	t.Helper()
	program, err := os.ReadFile(build(t, "./container"))
	for _, name := range []string{"bin"} {
		if err == nil {
			err = os.MkdirAll(filepath.Join(root, name), 0o755)
		}
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(root, "bin/container"), program, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// bundleDisk makes a disk that holds a container, which serves a port.
func bundleDisk(t *testing.T, path string, port int, annotations map[string]string, mounts []map[string]any, hostname string) {
	t.Helper()
	dir := shortDir(t)
	containerRoot(t, filepath.Join(dir, bundle.RootFolder))
	config := map[string]any{
		"ociVersion": "1.0.2", "annotations": annotations, "hostname": hostname,
		"root":    map[string]any{"path": "rootfs"},
		"process": map[string]any{"terminal": true, "user": map[string]any{"uid": 0, "gid": 0}, "cwd": "/", "args": []string{"/bin/container", strconv.Itoa(port)}, "env": []string{"PATH=/bin", "COLOUR=image"}},
		"mounts": append([]map[string]any{
			{"destination": "/proc", "type": "proc", "source": "proc"}, {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": []string{"nosuid", "mode=755"}},
		}, mounts...),
		"linux": map[string]any{"namespaces": []map[string]any{{"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "cgroup"}}},
	}
	text, err := json.MarshalIndent(config, "", "\t")
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, bundle.ConfigFile), text, 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
	if port == jobPort { // the other's is as small as can be
		var more map[string]any
		if err := json.Unmarshal([]byte(foreign), &more); err != nil {
			t.Fatal(err)
		}
		for key, value := range more {
			if to, ok := config[key].(map[string]any); ok {
				maps.Copy(to, value.(map[string]any))
				continue
			}
			config[key] = value
		}
		text, err = json.Marshal(config)
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, bundle.ConfigFile), text, 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	mke2fs(t, path, bundle.Label, dir)
}

// foreign is what tools write into a config.json for the machine that they are on: podman, and umoci for a user without privileges. It is not root's, and its root cannot be written.
const foreign = `{
	"root": {"path": "/var/lib/containers/storage/overlay/0123/merged", "readonly": true},
	"process": {
		"user": {"uid": 1000, "gid": 1000, "umask": 18, "additionalGids": [10]}, "noNewPrivileges": true, "apparmorProfile": "containers-default-0.50.1", "selinuxLabel": "system_u:system_r:container_t:s0",
		"rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1048576, "soft": 1024}],
		"capabilities": {"bounding": ["CAP_KILL"], "effective": ["CAP_KILL"], "permitted": ["CAP_KILL"], "inheritable": [], "ambient": []}
	},
	"mounts": [
		{"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
		{"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
		{"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
		{"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"]},
		{"destination": "/dev/shm", "type": "bind", "source": "/var/lib/containers/storage/overlay-containers/0123/userdata/shm", "options": ["bind", "rprivate", "nosuid", "noexec", "nodev"]},
		{"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
		{"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["rprivate", "nosuid", "noexec", "nodev", "relatime", "ro"]},
		{"destination": "/run", "type": "tmpfs", "source": "tmpfs", "options": ["rw", "nosuid", "nodev", "mode=755"]},
		{"destination": "/run/.containerenv", "type": "bind", "source": "/run/containers/storage/overlay-containers/0123/userdata/.containerenv", "options": ["bind", "rprivate"]},
		{"destination": "/etc/hosts", "type": "bind", "source": "/run/containers/storage/overlay-containers/0123/userdata/hosts", "options": ["bind", "rprivate"]}
	],
	"hooks": {"createRuntime": [{"path": "/usr/libexec/oci/hooks.d/no-such-hook"}]},
	"linux": {
		"cgroupsPath": "machine.slice:libpod:0123", "mountLabel": "system_u:object_r:container_file_t:s0", "rootfsPropagation": "private",
		"sysctl": {"net.ipv4.ping_group_range": "0 0"}, "uidMappings": [{"containerID": 0, "hostID": 1000, "size": 1}], "gidMappings": [{"containerID": 0, "hostID": 1000, "size": 1}],
		"resources": {"devices": [{"allow": false, "access": "rwm"}], "pids": {"limit": 2048}, "memory": {"limit": 134217728}},
		"namespaces": [{"type": "pid"}, {"type": "network", "path": "/run/netns/netns-0123"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "user"}, {"type": "cgroup"}],
		"maskedPaths": ["/proc/acpi", "/proc/kcore", "/sys/firmware"], "readonlyPaths": ["/proc/bus", "/proc/sys"],
		"seccomp": {"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"], "syscalls": [{"names": ["mount", "keyctl"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1}]}
	}
}`

// blueprint builds one.
func (w *workshop) blueprint(t *testing.T, args ...string) {
	t.Helper()
	args = append([]string{"blueprint", "--output", w.path("blueprint"), "--agent", build(t, "../../cmd/drafter-agent")}, args...)
	if cache := os.Getenv("DRAFTER_TEST_CACHE"); cache != "" {
		args = append(args, "--cache", cache)
	}
	c := w.start(t, nil, args...)
	select {
	case <-c.done:
	case <-time.After(10 * time.Minute): // a download may take longer than all else
	}
	c.wait(t, 0)
}

// debian is the command line that makes a package of the blueprint, with disks of the workshop besides.
func (w *workshop) debian(pkg string, disks []string, more ...string) []string {
	var devices []string
	for _, name := range append([]string{"state", "memory", "config", "kernel", "initrd", "disk"}, disks...) { // "shared:NAME" is one that its guest may only read
		name, shared := strings.CutPrefix(name, "shared:")
		input := w.path(name + ".img")
		switch name {
		case "kernel", "initrd", "disk":
			input = w.path(filepath.Join("blueprint", vmpackage.DefaultFile(name)))
		case "state", "memory", "config":
			input = ""
		}
		devices = append(devices, fmt.Sprintf(`{"name":%q,"input":%q,"output":%q,"shared":%t}`, name, input, w.path(filepath.Join(pkg, vmpackage.DefaultFile(name))), shared))
	}
	return append([]string{"snapshotter", "--devices", "[" + strings.Join(devices, ",") + "]", "--memory-size", "512", "--chroot-base-dir", w.vms(), "--enable-output"}, more...)
}

// talk is a connection to a container of the tests.
type talk struct {
	conn net.Conn
	in   *bufio.Reader
}

// talkTo connects to a port of the guest that a namespace leads to, and is there when somebody answers: of a process that ends, the kernel may still take a connection.
func talkTo(t *testing.T, netns string, port int) *talk {
	t.Helper()
	ctx := newContext(t)
	for {
		var conn net.Conn
		err := testnet.Do(netns, func() (err error) {
			conn, err = (&net.Dialer{}).DialContext(ctx, "tcp", fmt.Sprintf("172.16.0.2:%d", port))
			return err
		})
		if err == nil {
			k := &talk{conn, bufio.NewReader(conn)}
			conn.SetDeadline(time.Now().Add(guestWait))
			fmt.Fprintln(conn, "hello")
			if _, err = k.in.ReadString('\n'); err == nil {
				t.Cleanup(func() { conn.Close() })
				return k
			}
			conn.Close()
		}
		if ctx.Err() != nil {
			t.Fatal(err)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// ask has the container do something.
func (k *talk) ask(t *testing.T, what string) string {
	t.Helper()
	k.conn.SetDeadline(time.Now().Add(guestWait))
	if _, err := fmt.Fprintln(k.conn, what); err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	line, err := k.in.ReadString('\n')
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	answer, err := strconv.Unquote(strings.TrimSpace(line))
	if err != nil {
		t.Fatalf("%s: %q: %v", what, line, err)
	}
	return answer
}

func (k *talk) expect(t *testing.T, what, want string) {
	t.Helper()
	if got := k.ask(t, what); got != want {
		t.Errorf("%s: %q, want %q", what, got, want)
	}
}

// TestContainers: a guest runs what is on three disks, of which one has a volume on a fourth, and one cannot be written. They are ready when the snapshot is taken; a clone is given
// another environment; what ends, or is killed together with what watches it, is started again; and all of it moves.
func TestContainers(t *testing.T) {
	t.Parallel()
	began := time.Now()
	took := func(what string) {
		t.Helper()
		t.Logf("%s after %.1f s", what, time.Since(began).Seconds())
	}
	w := newWorkshop(t)
	h := testnet.NewTestHosts(t, "a", "b")
	netns, _ := networks(t, h, "a", "b")
	start := func(host string, console *testguest.Console, args []string) (c *command) {
		t.Helper()
		if err := testnet.Do(h.Host(host), func() error { c = w.start(t, console, args...); return nil }); err != nil {
			t.Fatal(err)
		}
		return c
	}
	bundleDisk(t, w.path("oci.img"), webPort, map[string]string{bundle.NameAnnotation: "web", bundle.RestartAnnotation: "always", bundle.ReadyAnnotation: fmt.Sprintf("port:%d", webPort)},
		[]map[string]any{{"destination": "/data", "source": "LABEL=data", "options": []string{"rw", "noatime"}}}, "")
	bundleDisk(t, w.path("job.img"), jobPort, map[string]string{bundle.ReadyAnnotation: "notify"}, nil, "own-name")
	bundleDisk(t, w.path("fixed.img"), fixedPort, map[string]string{bundle.RestartAnnotation: "on-failure:3", bundle.ReadyAnnotation: "log:^serving"}, nil, "")
	mke2fs(t, w.path("data.img"), "data", "")
	if err := os.WriteFile(w.path("shell.conf"), []byte(shellUnit), 0o644); err != nil {
		t.Fatal(err)
	}
	w.blueprint(t, "--oci", "--copy", w.path("shell.conf")+":/etc/systemd/system/serial-getty@ttyS0.service.d/shell.conf")
	took("blueprint built")
	console := newConsole(t)
	start("a", console, w.debian("package", []string{"oci", "job", "shared:fixed", "data"}, "--netns", netns["a"], "--resume-timeout", "10m")).wait(t, 0)
	took("snapshot taken: the containers are ready")
	for _, line := range []string{"web: serving port 8001", "job: serving port 8002", "fixed: serving port 8003"} {
		if !strings.Contains(console.Log(), line) {
			t.Errorf("the console does not say %q:\n%s", line, console.Log())
		}
	}
	peerOn := func(host, instance string, more ...string) *command {
		t.Helper()
		return start(host, w.console, w.peer("package", instance, append([]string{"--netns", netns[host], "--laddr", h.Addr4(host).String() + ":0", "--resume-timeout", "5m"}, more...)...))
	}

	// As it was packaged.
	a := peerOn("a", "at-a")
	a.waitFor(t, "Resumed VM")
	took("resumed")
	web, job := talkTo(t, netns["a"], webPort), talkTo(t, netns["a"], jobPort)
	web.expect(t, "count", "1")
	web.expect(t, "env COLOUR", "image")
	web.expect(t, "host", "drafter")
	web.expect(t, "read /etc/hostname", "drafter")
	job.expect(t, "host", "own-name")
	job.expect(t, "count", "1")
	job.expect(t, "read /sys/fs/cgroup/memory.max", "134217728")
	if got := job.ask(t, "write /more x"); !strings.Contains(got, "error: ") {
		t.Error("its root can be written")
	}
	web.expect(t, "write /data/kept of a", "")
	if resolv := web.ask(t, "read /etc/resolv.conf"); !strings.Contains(resolv, "nameserver 1.1.1.1") {
		t.Errorf("the container's resolv.conf is %q", resolv)
	}
	fixed := talkTo(t, netns["a"], fixedPort)
	fixed.expect(t, "write /bin/more of a", "") // in memory
	fixed.expect(t, "read /bin/more", "of a")
	a.Process.Signal(os.Interrupt)
	a.wait(t, 0)
	took("closed")

	// A clone that is called otherwise, and has another environment: of both, and of one.
	c := peerOn("a", "clone", "--clone", "--host-name", "clone", "--env", "COLOUR=green", "--env", "job:COLOUR=red", "--env", "web:GREETING=good morning")
	c.waitFor(t, "Resumed VM")
	took("clone resumed, with another environment")
	web, job = talkTo(t, netns["a"], webPort), talkTo(t, netns["a"], jobPort)
	web.expect(t, "env COLOUR", "green")
	web.expect(t, "env GREETING", "good morning")
	job.expect(t, "env COLOUR", "red")
	job.expect(t, "env GREETING", "")
	web.expect(t, "host", "clone")
	web.expect(t, "read /etc/hostname", "clone")
	job.expect(t, "read /etc/hostname", "own-name")
	if got := web.ask(t, "read /data/kept"); !strings.HasPrefix(got, "error: ") {
		t.Errorf("the clone has what the other wrote to its volume: %q", got)
	}
	web.expect(t, "write /data/kept of the clone", "")
	// What ends is started again, with that.
	fmt.Fprintln(web.conn, "exit 3")
	if _, err := web.in.ReadByte(); err == nil {
		t.Error("the container goes on")
	}
	web = talkTo(t, netns["a"], webPort)
	took("a container that ended was started again")
	web.expect(t, "env COLOUR", "green")
	web.expect(t, "read /data/kept", "of the clone")
	web.expect(t, "count", "1")
	job.expect(t, "count", "1") // the other goes on

	// In the guest, one sees them, and has them started again.
	list := w.shell(t, "drafter-agent containers list")
	for _, want := range []string{"web vdb ready", "job vdc ready", "fixed vdd ready", "exit status 3"} {
		if !strings.Contains(list, want) {
			t.Errorf("the list has no %q: %s", want, list)
		}
	}
	w.shell(t, "drafter-agent containers restart job")
	job = talkTo(t, netns["a"], jobPort)
	job.expect(t, "count", "1")
	job.expect(t, "env COLOUR", "red")
	took("a container was started again by hand")
	if got := w.shell(t, "journalctl -u drafter-containers -o cat | grep -c 'job: serving'"); got != "3" { // once for each start
		t.Errorf("the journal has %s such lines", got)
	}
	if got := w.shell(t, "cat /proc/$(pgrep -f '^/bin/container 8002')/cgroup"); got != "0::/system.slice/drafter-containers.service/job" {
		t.Errorf("it is in the control group %s", got)
	}
	// With what watches them killed, there is one of each again, and what it has mounted is gone when it is stopped.
	const processes = "pgrep -c -f '^/bin/container'"
	w.shell(t, "systemctl kill -s KILL --kill-whom=main drafter-containers; until systemctl is-active drafter-containers; do sleep 0.2; done")
	if got := w.shell(t, processes); got != "3" {
		t.Errorf("%s containers run, of 3", got)
	}
	took("what watches the containers was killed, and is there again")
	w.shell(t, "systemctl stop drafter-containers; ! "+processes+"; ! grep /run/drafter/ /proc/self/mountinfo")
	w.shell(t, "systemctl start drafter-containers")
	took("stopped and started")
	web, job = talkTo(t, netns["a"], webPort), talkTo(t, netns["a"], jobPort)
	web.expect(t, "env COLOUR", "green")
	web.expect(t, "count", "1")
	job.expect(t, "count", "1")

	// It moves while it runs: nothing starts anew.
	b := peerOn("b", "at-b", "--raddr", strings.TrimSpace(c.waitFor(t, "Serving on ")))
	c.waitFor(t, "Sent VM to ")
	b.waitFor(t, "Received VM")
	took("moved")
	web, job = talkTo(t, netns["b"], webPort), talkTo(t, netns["b"], jobPort)
	web.expect(t, "count", "2")
	job.expect(t, "count", "2")
	web.expect(t, "read /data/kept", "of the clone")
	job.expect(t, "env COLOUR", "red")
	b.Process.Signal(os.Interrupt)
	b.wait(t, 0)

	// Closed and resumed, it is the same; a variable for a container that is not there is refused.
	wrong := peerOn("b", "at-b", "--env", "nobody:A=b")
	if said := wrong.wait(t, 1); !strings.Contains(said, `container "nobody"`) {
		t.Errorf("a variable for nobody: %s", said)
	}
	again := peerOn("b", "at-b")
	again.waitFor(t, "Resumed VM")
	talkTo(t, netns["b"], jobPort).expect(t, "count", "3")
	took("done")
}

// TestEnvironmentRefused: a guest without containers does not pass for one that was given an environment, and loses nothing by that.
func TestEnvironmentRefused(t *testing.T) {
	t.Parallel()
	w := newWorkshop(t)
	w.pack(t)
	first := w.start(t, w.console, w.peer("package", "instance")...)
	first.waitFor(t, "Resumed VM")
	w.do(t, "put /kept yes")
	first.Process.Signal(os.Interrupt)
	first.wait(t, 0)
	said := w.start(t, w.console, w.peer("package", "instance", "--env", "A=b")...).wait(t, 1)
	if !strings.Contains(said, "--oci") {
		t.Errorf("it is refused by %s", said)
	}
	w.start(t, w.console, w.peer("package", "instance")...).waitFor(t, "Resumed VM")
	if got := w.do(t, "cat /kept"); got != `"yes"` {
		t.Errorf("it has lost what it had: %s", got)
	}
}

// shellUnit has a guest of Debian offer a shell on its console, without a login, which a program could not be sure to meet.
const shellUnit = "[Service]\nExecStart=\nExecStart=/bin/dash\nStandardInput=tty\nStandardOutput=tty\nEnvironment=HOME=/root TERM=dumb PS1=\nWorkingDirectory=/root\n"

// shell has the guest's shell run a command, and is what that says, its lines parted by spaces. It must succeed.
func (w *workshop) shell(t *testing.T, command string) string {
	t.Helper()
	w.shells++
	// Neither is a line of what the terminal echoes.
	if err := w.console.Send(fmt.Sprintf(`o=$({ %s; } 2>&1); echo "@%d $?" $o`, command, w.shells)); err != nil {
		t.Fatalf("%s: %v", command, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	answer, err := w.console.Line(ctx, fmt.Sprintf("@%d ", w.shells))
	if err != nil {
		t.Fatalf("%s: %v", command, err)
	}
	status, said, _ := strings.Cut(answer, " ")
	if status != "0" {
		t.Fatalf("%s: exit status %s: %s", command, status, said)
	}
	return said
}

// TestPodman: a guest without OCI disks has a podman of its own, which runs one container in the guest's network and one behind a published port. They move while they run, and
// podman knows them afterwards.
func TestPodman(t *testing.T) {
	t.Parallel()
	testEngine(t, "podman", "podman,netavark,iptables,dbus")
}

// TestDocker: so does one with a Docker daemon.
func TestDocker(t *testing.T) {
	if !*long {
		t.Skip("left out: what TestPodman shows of podman, with Docker's daemon, whose packages are 100 MB: -args -long")
	}
	testEngine(t, "docker", "docker.io,iptables,apparmor")
}

// testEngine tests a guest with a program that manages containers, of Debian packages.
func testEngine(t *testing.T, program, packages string) {
	t.Helper()
	began := time.Now()
	took := func(what string) {
		t.Helper()
		t.Logf("%s after %.1f s", what, time.Since(began).Seconds())
	}
	w := newWorkshop(t)
	h := testnet.NewTestHosts(t, "a", "b")
	netns, _ := networks(t, h, "a", "b")
	start := func(host string, args []string) (c *command) {
		t.Helper()
		if err := testnet.Do(h.Host(host), func() error { c = w.start(t, w.console, args...); return nil }); err != nil {
			t.Fatal(err)
		}
		return c
	}
	containerRoot(t, w.path("root"))
	if out, err := exec.Command("tar", "-C", w.path("root"), "-cf", w.path("root.tar"), ".").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if err := os.WriteFile(w.path("shell.conf"), []byte(shellUnit), 0o644); err != nil {
		t.Fatal(err)
	}
	w.blueprint(t, "--packages", packages, "--copy", w.path("root.tar")+":/root/root.tar",
		"--copy", w.path("shell.conf")+":/etc/systemd/system/serial-getty@ttyS0.service.d/shell.conf")
	took("blueprint built")
	start("a", w.debian("package", nil, "--netns", netns["a"], "--resume-timeout", "10m")).wait(t, 0)
	took("snapshot taken")
	peerOn := func(host, instance string, more ...string) *command {
		t.Helper()
		return start(host, w.peer("package", instance, append([]string{"--netns", netns[host], "--laddr", h.Addr4(host).String() + ":0", "--resume-timeout", "5m"}, more...)...))
	}
	a := peerOn("a", "at-a")
	a.waitFor(t, "Resumed VM")
	took("resumed")
	w.shell(t, program+" import root.tar counter")
	took("image imported")
	w.shell(t, program+" run --detach --name plain --network host counter /bin/container 8001")
	took("container with the guest's network started")
	w.shell(t, program+" run --detach --name published --publish 8080:8002 --env COLOUR=green counter /bin/container 8002")
	took("container with a published port started")
	inspect := program + " inspect --format '{{.Name}} {{.State.Status}} {{.State.Pid}} {{.State.StartedAt}}' plain published"
	before := w.shell(t, inspect)
	plain, published := talkTo(t, netns["a"], 8001), talkTo(t, netns["a"], 8080)
	plain.expect(t, "count", "1")
	published.expect(t, "count", "1")
	published.expect(t, "env COLOUR", "green")

	b := peerOn("b", "at-b", "--raddr", strings.TrimSpace(a.waitFor(t, "Serving on ")))
	a.waitFor(t, "Sent VM to ")
	b.waitFor(t, "Received VM")
	took("moved")
	plain, published = talkTo(t, netns["b"], 8001), talkTo(t, netns["b"], 8080)
	plain.expect(t, "count", "2")
	published.expect(t, "count", "2")
	if after := w.shell(t, inspect); after != before {
		t.Errorf("%s has\n%s, and had before\n%s", program, after, before)
	}
	w.shell(t, program+" restart --time 0 plain")
	talkTo(t, netns["b"], 8001).expect(t, "count", "1")
	took("done: " + before)
}
