package blueprint

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The tests of this file build a blueprint from the real archive and boot it. They download about 70 MB once, into
// $DRAFTER_TEST_CACHE or, without it, where `drafter blueprint` keeps its downloads; later runs need no network.

// Builds run in a process of their own: as another user, to be interrupted, and without the race detector, under which
// the decoder of xz takes minutes (the tests of single parts run with it).

// childVariable holds the configuration of a build for the test program to run instead of tests.
const childVariable = "DRAFTER_BLUEPRINT_TEST_BUILD"

// childLine is what such a process prints, one line of JSON each: the stages it comes to, then the result.
type childLine struct {
	Stage  string  `json:",omitempty"`
	Result *Result `json:",omitempty"`
}

func TestMain(m *testing.M) {
	if text := os.Getenv(childVariable); text != "" {
		if err := runChild(text); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func runChild(text string) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	var cfg Config
	if err := json.Unmarshal([]byte(text), &cfg); err != nil {
		return err
	}
	out := json.NewEncoder(os.Stdout)
	stage := ""
	cfg.Progress = func(p Progress) {
		if p.Stage != stage {
			stage = p.Stage
			_ = out.Encode(childLine{Stage: stage}) // nobody reads: nothing lost
		}
	}
	result, err := Build(ctx, cfg)
	if err != nil {
		return err
	}
	return out.Encode(childLine{Result: &result})
}

// builder runs builds in processes of their own.
type builder struct {
	program *os.File // the test program, without the race detector
}

func newBuilder(t *testing.T, dir string) *builder {
	path := "/proc/self/exe"
	if raceEnabled {
		path = filepath.Join(dir, "helper.test")
		if out, err := exec.CommandContext(t.Context(), "go", "test", "-c", "-race=false", "-o", path, ".").CombinedOutput(); err != nil {
			t.Fatalf("build helper: %v\n%s", err, out)
		}
	}
	f, err := os.Open(path)
	must(t, err)
	t.Cleanup(func() { f.Close() })
	return &builder{f}
}

// build runs one build, as the user uid if it is not 0, and interrupts it when it comes to the stage named, if any.
func (b *builder) build(t *testing.T, cfg Config, uid uint32, interruptAt string) (Result, error) {
	t.Helper()
	encoded, err := json.Marshal(cfg)
	must(t, err)
	cmd := exec.CommandContext(t.Context(), "/proc/self/fd/3") // by descriptor: the user need not reach its path
	cmd.ExtraFiles = []*os.File{b.program}
	cmd.Env = append(os.Environ(), childVariable+"="+string(encoded))
	if uid != 0 {
		cmd.Env, cmd.Dir = []string{childVariable + "=" + string(encoded), "HOME=/nonexistent"}, "/"
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdout, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	var result Result
	lines := json.NewDecoder(stdout)
	for {
		var line childLine
		if lines.Decode(&line) != nil {
			break
		}
		if line.Result != nil {
			result = *line.Result
		}
		if interruptAt != "" && line.Stage == interruptAt {
			must(t, cmd.Process.Signal(os.Interrupt))
		}
	}
	if err := cmd.Wait(); err != nil {
		return Result{}, errors.New(strings.TrimSpace(stderr.String()))
	}
	if stderr.Len() > 0 {
		t.Logf("the build says:\n%s", stderr.String())
	}
	return result, nil
}

// standIn is what takes the part of drafter-agent: liveness says so on the console, everything else waits.
const standIn = `package main

import (
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
)

func main() {
	if filepath.Base(os.Args[0]) == "drafter-liveness" {
		up, _ := os.ReadFile("/proc/uptime")
		console, _ := os.OpenFile("/dev/console", os.O_WRONLY, 0)
		fmt.Fprintf(console, "\nALIVE after %s s\n", strings.Fields(string(up))[0])
		return
	}
	c := make(chan os.Signal, 1)
	signal.Notify(c, syscall.SIGTERM)
	<-c
}
`

func TestBlueprint(t *testing.T) {
	if testing.Short() {
		t.Skip("builds and boots a real guest: left out with -short")
	}
	// Not t.TempDir(): another user must get in.
	dir, err := os.MkdirTemp("", "blueprint-test-")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	must(t, os.Chmod(dir, 0o755))
	for name, text := range map[string]string{
		"main.go": standIn, "go.mod": "module standin\n\ngo 1.26\n", "hello.service": "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/sh -c \"echo unit ran > /run/unit\"\n[Install]\nWantedBy=multi-user.target\n",
		"setup.sh": "#!/bin/sh\necho script ran > /run/script\n", "copied/deep/file.txt": "copied\n",
	} {
		must(t, os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755))
		must(t, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644))
	}
	agent := filepath.Join(dir, "drafter-agent")
	build := exec.CommandContext(t.Context(), "go", "build", "-ldflags=-s", "-o", agent, "main.go")
	build.Dir, build.Env = dir, append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build stand-in agent: %v\n%s", err, out)
	}
	cfg := Config{
		Output: filepath.Join(dir, "out"), Agent: agent, Packages: []string{"valkey-server"}, Cache: os.Getenv("DRAFTER_TEST_CACHE"),
		Units: []string{dir + "/hello.service"}, Scripts: []string{dir + "/setup.sh"}, Copies: []Copy{{dir + "/copied", "/srv/copied"}},
		Fstab: []string{"LABEL=data /data ext4 defaults 0 2", "LABEL=absent /absent ext4 defaults 0 2"},
	}
	b := newBuilder(t, dir)
	start := time.Now()
	result, err := b.build(t, cfg, 0, "")
	must(t, err)
	t.Logf("built in %.1f s: Linux %s, %d packages", time.Since(start).Seconds(), result.KernelVersion, len(result.Packages))

	t.Run("nothing changed", func(t *testing.T) {
		again, err := b.build(t, cfg, 0, "")
		must(t, err)
		if !again.UpToDate || !maps.Equal(again.SHA256, result.SHA256) {
			t.Errorf("the second run built: %+v", again)
		}
	})
	t.Run("same bytes elsewhere and unprivileged", func(t *testing.T) {
		t.Parallel() // beside the boot, which keeps one core busy
		testReproducible(t, b, cfg, dir, result)
	})
	t.Run("cancelled", func(t *testing.T) {
		other := cfg
		other.Output = filepath.Join(dir, "cancelled")
		if _, err := b.build(t, other, 0, "write root disk"); err == nil || !strings.Contains(err.Error(), "canceled") {
			t.Errorf("got error %v", err)
		}
		left, err := filepath.Glob(filepath.Join(other.Output, "[^b]*"))
		must(t, err)
		hidden, err := filepath.Glob(filepath.Join(other.Output, ".*"))
		must(t, err)
		if len(left)+len(hidden) > 0 {
			t.Errorf("left behind: %q %q", left, hidden)
		}
	})
	t.Run("no space", func(t *testing.T) {
		t.Parallel()
		other := cfg
		other.Output, other.Size = filepath.Join(dir, "small"), 64<<20
		if _, err := b.build(t, other, 0, ""); err == nil || !strings.Contains(err.Error(), "64 MiB") || !strings.Contains(err.Error(), "--size") {
			t.Errorf("got error %v", err)
		}
	})
	t.Run("file system check", func(t *testing.T) {
		fsck, err := exec.LookPath("e2fsck")
		if err != nil {
			t.Skip("e2fsck is not installed")
		}
		if out, err := exec.CommandContext(t.Context(), fsck, "-fn", result.Disk).CombinedOutput(); err != nil {
			t.Errorf("e2fsck: %v\n%s", err, out)
		}
	})
	t.Run("boot", func(t *testing.T) {
		t.Parallel()
		testBoot(t, cfg, dir, result)
	})
}

// testReproducible builds again in a process of its own, as nobody if we are root, with another cache.
func testReproducible(t *testing.T, b *builder, cfg Config, dir string, first Result) {
	c, err := newCache(cfg.Cache)
	must(t, err)
	lock, _, err := readLock(first.Lock)
	must(t, err)
	work := filepath.Join(dir, "unprivileged")
	must(t, os.MkdirAll(filepath.Join(work, "cache", "sha256"), 0o777))
	for _, p := range lock.all() {
		data, err := os.ReadFile(c.path(p.SHA256))
		must(t, err)
		must(t, os.WriteFile(filepath.Join(work, "cache", "sha256", p.SHA256), data, 0o644))
	}
	text, err := os.ReadFile(first.Lock)
	must(t, err)
	must(t, os.WriteFile(filepath.Join(work, "x.lock"), text, 0o644))
	cfg.Output, cfg.Cache, cfg.Lock, cfg.Locked = filepath.Join(work, "elsewhere"), filepath.Join(work, "cache"), filepath.Join(work, "x.lock"), true
	uid := uint32(0)
	if os.Getuid() == 0 {
		uid = 65534 // nobody
		must(t, filepath.WalkDir(work, func(p string, _ os.DirEntry, err error) error {
			if err != nil {
				return err
			}
			return os.Lchown(p, int(uid), int(uid))
		}))
	}
	_, err = b.build(t, cfg, uid, "")
	must(t, err)
	for name, want := range first.SHA256 {
		got, err := digestFile(t.Context(), filepath.Join(cfg.Output, name))
		must(t, err)
		if got.SHA256 != want {
			t.Errorf("%s has sha256 %s, was %s", name, got.SHA256, want)
		}
	}
}

// testBoot boots the blueprint under emulation, with a second disk, and looks at it from outside and inside.
func testBoot(t *testing.T, cfg Config, dir string, r Result) {
	qemu, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Skip("QEMU (qemu-system-x86_64) is not installed")
	}
	if os.Getuid() != 0 {
		t.Skip("needs root, to make a network namespace with a tap device")
	}
	// The namespace belongs to this thread, and so do the guest's process and the connections made from it.
	runtime.LockOSThread() // never unlocked: the thread ends with the goroutine, and the namespace with it
	must(t, unix.Unshare(unix.CLONE_NEWNET))
	tap := &netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: "tap0"}, Mode: netlink.TUNTAP_MODE_TAP}
	must(t, netlink.LinkAdd(tap))
	for _, address := range []string{"172.16.0.1/30", "fd00:172:16::1/64"} {
		a, err := netlink.ParseAddr(address)
		must(t, err)
		a.Flags = unix.IFA_F_NODAD
		must(t, netlink.AddrAdd(tap, a))
	}
	must(t, netlink.LinkSetUp(tap))

	// A disk of its own to mount by its label, made by the same tools as the root disk.
	c, err := newCache(cfg.Cache)
	must(t, err)
	lock, _, err := readLock(r.Lock)
	must(t, err)
	box, err := c.openToolbox(t.Context(), lock.tools)
	must(t, err)
	data := filepath.Join(dir, "data.ext4")
	if out, err := box.command(t.Context(), "mke2fs", "-q", "-t", "ext4", "-L", "data", data, "16M").CombinedOutput(); err != nil {
		t.Fatalf("mke2fs: %v\n%s", err, out)
	}

	cmd := exec.CommandContext(t.Context(), qemu, "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-accel", "tcg", "-cpu", "max", "-m", "512",
		"-M", "q35,sata=off,smbus=off,usb=off,vmport=off,hpet=off", "-bios", "qboot.rom", "-kernel", r.Kernel, "-initrd", r.Initrd,
		"-append", "console=ttyS0 quiet panic=-1 tsc=reliable no_timer_check", "-serial", "stdio",
		"-drive", "if=none,id=disk,format=raw,snapshot=on,file="+r.Disk, "-device", "virtio-blk-pci,drive=disk,serial=disk",
		"-drive", "if=none,id=data,format=raw,cache=unsafe,file="+data, "-device", "virtio-blk-pci,drive=data,serial=data",
		"-device", "virtio-rng-pci", "-device", "virtio-balloon-pci", "-device", "virtio-serial-pci", "-chardev", "null,id=channel", "-device", "virtserialport,chardev=channel,name=org.drafter.vsock",
		"-netdev", "tap,id=net,ifname=tap0,script=no,downscript=no", "-device", "virtio-net-pci,netdev=net,mac=02:0e:d9:fd:68:3d,romfile=")
	stdin, err := cmd.StdinPipe()
	must(t, err)
	console := &consoleLog{changed: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = console, console
	start := time.Now()
	must(t, cmd.Start())
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if t.Failed() {
			t.Logf("console:\n%s", console.text())
		}
	})
	// Generous: an emulated guest on a busy machine. A guest that hangs says nothing more.
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()

	must(t, console.wait(ctx, "ALIVE after"))
	_, after, _ := strings.Cut(console.text(), "ALIVE ")
	line, _, _ := strings.Cut(after, "\n")
	t.Logf("alive %s by its own clock, %.1f s by ours", strings.TrimSpace(line), time.Since(start).Seconds())

	// The server was up before the guest called itself alive.
	for _, address := range []string{"172.16.0.2:6379", "[fd00:172:16::2]:6379"} {
		conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
		must(t, err)
		deadline, _ := ctx.Deadline()
		must(t, conn.SetDeadline(deadline))
		_, err = io.WriteString(conn, "PING\r\n")
		must(t, err)
		answer := make([]byte, len("+PONG\r\n"))
		_, err = io.ReadFull(conn, answer)
		must(t, errors.Join(err, conn.Close()))
		if string(answer) != "+PONG\r\n" {
			t.Errorf("%s answers PING with %q", address, answer)
		}
	}

	// The prompt came before, if the guest waited for the absent disk: an empty line brings it again.
	_, err = io.WriteString(stdin, "\n")
	must(t, err)
	must(t, console.wait(ctx, "login: "))
	_, err = io.WriteString(stdin, "root\n")
	must(t, err)
	must(t, console.wait(ctx, "# "))
	// Each line of the answer is one fact; the marks are put together by the shell, so the echo of the line is not one.
	for command, want := range map[string]string{
		"systemctl is-system-running":                              "running",
		"dpkg --audit | wc -l":                                     "0",
		"cat /run/unit":                                            "unit ran",
		"cat /run/script":                                          "script ran",
		"stat -c '%U %a' /srv/copied/deep/file.txt":                "root 644",
		"findmnt -no SOURCE /data":                                 "/dev/vdb",
		"stat -c '%U:%G %a' /var/lib/valkey":                       "valkey:valkey 750",
		"cat /sys/class/block/vda/serial":                          "disk",
		"readlink /dev/virtio-ports/org.drafter.vsock | cut -c1-8": "../vport",
		"systemctl is-active drafter-vsock drafter-agent | uniq":   "active",
		"ip -o -6 route show default | cut -d' ' -f1-5":            "default via fd00:172:16::1 dev eth0",
		"modprobe -n overlay && lsmod | grep -c -E '^(overlay|erofs|vmw_vsock_virtio_transport|virtio_balloon|virtio_rng) '": "5",
		"ls -d /etc/drafter/*.d | wc -l": "2",
	} {
		mark := fmt.Sprintf("M%dK", time.Now().UnixNano())
		_, err = fmt.Fprintf(stdin, "echo '%s'\"%s[$(%s)]\"\n", mark[:2], mark[2:], command)
		must(t, err)
		must(t, console.wait(ctx, mark+"["))
		must(t, console.wait(ctx, "# "))
		_, answer, _ := strings.Cut(console.text(), mark+"[")
		answer, _, _ = strings.Cut(answer, "]")
		if answer != want {
			t.Errorf("%s: got %q, want %q", command, answer, want)
		}
	}
	_, err = io.WriteString(stdin, "poweroff\n")
	must(t, err)
	if err := cmd.Wait(); err != nil {
		t.Errorf("the guest did not power off: %v", err)
	}
}

// consoleLog collects what a guest prints and lets one goroutine wait for it.
type consoleLog struct {
	mu      sync.Mutex // guards what follows
	buf     bytes.Buffer
	seen    int // what was waited for and found
	changed chan struct{}
}

func (l *consoleLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	close(l.changed)
	l.changed = make(chan struct{})
	return l.buf.Write(p)
}

func (l *consoleLog) text() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// wait returns once text has appeared behind what was found before.
func (l *consoleLog) wait(ctx context.Context, text string) error {
	for {
		l.mu.Lock()
		i := bytes.Index(l.buf.Bytes()[l.seen:], []byte(text))
		if i >= 0 {
			l.seen += i + len(text)
		}
		changed := l.changed
		l.mu.Unlock()
		if i >= 0 {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("wait for %q on the console: %w", text, ctx.Err())
		}
	}
}
