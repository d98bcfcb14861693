package qemu

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/drafter-vm/drafter/internal/testguest"
	"github.com/drafter-vm/drafter/pkg/vmm"
	"github.com/drafter-vm/drafter/pkg/vmm/internal/tap"
	"github.com/drafter-vm/drafter/pkg/vmm/vmmtest"
)

// nbdServer is a qemu-nbd that can be killed and started again.
type nbdServer struct {
	file, socket, export string
	cmd                  *exec.Cmd
}

func (s *nbdServer) start(t testing.TB) {
	t.Helper()
	if err := os.Remove(s.socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	s.cmd = exec.Command("qemu-nbd", "--socket", s.socket, "--export-name", s.export, "--format", "raw", "--persistent", "--shared", "4", "--discard", "unmap", s.file)
	var stderr bytes.Buffer
	s.cmd.Stderr = &stderr
	if err := s.cmd.Start(); err != nil {
		t.Skipf("qemu-nbd (Debian: qemu-utils) is needed: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for {
		conn, err := net.Dial("unix", s.socket)
		if err == nil {
			conn.Close()
			return
		}
		if ctx.Err() != nil {
			t.Fatalf("qemu-nbd: %v: %s", err, stderr.String())
		}
	}
}

func (s *nbdServer) kill() {
	s.cmd.Process.Kill()
	s.cmd.Wait()
}

// attachNBD serves a disk by NBD until the test ends.
func attachNBD(t testing.TB, dir string, disk vmm.Disk, file string) (*nbdServer, vmm.Attachment) {
	t.Helper()
	s := &nbdServer{file: file, socket: filepath.Join(dir, disk.Name+".nbd"), export: disk.Name}
	s.start(t)
	t.Cleanup(s.kill)
	return s, vmm.Attachment{Name: disk.Name, Socket: s.socket}
}

// TestSuiteConfined runs the suite as it is used: disks by NBD, another user, a cgroup, a NUMA node, a seized tap.
func TestSuiteConfined(t *testing.T) {
	if testing.Short() {
		t.Skip("starts QEMU with real guests")
	}
	needRoot(t)
	vmmtest.Run(t, vmmtest.Harness{
		Backend: New(Options{}),
		Attach: func(t testing.TB, dir string, disk vmm.Disk, file string) vmm.Attachment {
			_, at := attachNBD(t, dir, disk, file)
			return at
		},
		Configure: func(_ testing.TB, cfg *vmm.Config) {
			cfg.UID, cfg.GID, cfg.NUMANode = 12345, 12346, 0
			cfg.CgroupVersion, cfg.CgroupName = 1, filepath.Base(cfg.Dir)
		},
	})
}

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: users, cgroups, network namespaces")
	}
}

func ip(t testing.TB, args ...string) {
	t.Helper()
	if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
		t.Fatalf("ip %s: %v: %s", strings.Join(args, " "), err, out)
	}
}

// makeNetns makes a network namespace with a configured tap0.
func makeNetns(t testing.TB) string {
	t.Helper()
	name := fmt.Sprintf("vmmtest%d", os.Getpid())
	ip(t, "netns", "add", name)
	t.Cleanup(func() { exec.Command("ip", "netns", "del", name).Run() })
	ip(t, "-n", name, "tuntap", "add", "tap0", "mode", "tap")
	ip(t, "-n", name, "addr", "add", "172.16.0.1/30", "dev", "tap0")
	ip(t, "-n", name, "link", "set", "tap0", "up")
	ip(t, "-n", name, "link", "set", "lo", "up")
	return name
}

// status returns a field of /proc/PID/status.
func status(t testing.TB, pid int, field string) string {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, field+":"); ok {
			return strings.Join(strings.Fields(value), " ")
		}
	}
	t.Fatalf("/proc/%d/status has no %s", pid, field)
	return ""
}

// TestMachine takes one machine with everything through its life: two CPUs, a disk by NBD and one by path, a network in
// a namespace, another user, cgroup, node and root. It reads back from /proc what was asked for, loses the NBD server,
// and moves into a new process, a TCP connection with the guest staying open.
func TestMachine(t *testing.T) {
	if testing.Short() {
		t.Skip("starts QEMU with real guests")
	}
	needRoot(t)
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	kernel, initrd := testguest.Build(t)
	netns := makeNetns(t)
	backend := New(Options{})
	spec, err := backend.Describe(ctx, vmm.Spec{CPUCount: 2, MemorySize: 160 << 20, Sockets: true, MAC: "02:0e:d9:fd:68:3d", BootArgs: "quiet loglevel=1",
		Disks: []vmm.Disk{{Name: "disk", Size: 4 << 20}, {Name: "extra", Size: 1 << 20, ReadOnly: true}}})
	if err != nil {
		t.Skip(err)
	}
	dir, err := os.MkdirTemp("", "vmm-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	files := t.TempDir()
	for i, d := range spec.Disks {
		if err := os.WriteFile(filepath.Join(files, d.Name), bytes.Repeat([]byte{byte(i)}, int(d.Size)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	server, at := attachNBD(t, dir, spec.Disks[0], filepath.Join(files, "disk"))
	console, err := testguest.NewConsole()
	if err != nil {
		t.Fatal(err)
	}
	defer console.Close()
	cfg := vmm.Config{
		Spec: spec, Dir: dir, Memory: vmmtest.NewMemory(t, spec.MemorySize),
		Disks:        []vmm.Attachment{at, {Name: "extra", Path: filepath.Join(files, "extra")}},
		Netns:        netns,
		Interface:    "tap0",
		SerialOutput: console, SerialInput: console.Input(),
		UID: 12345, GID: 12346, NUMANode: 0, CgroupVersion: 2, CgroupName: filepath.Base(dir),
		Logger: vmmtest.Logger(t),
	}
	boot := cfg
	boot.Boot = &vmm.Boot{Kernel: kernel, Initrd: initrd}
	m, err := backend.Start(ctx, boot)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { m.Close() }()
	if err := console.Ready(ctx); err != nil {
		t.Fatal(err)
	}
	do := func(command string) string {
		t.Helper()
		answer, err := console.Do(ctx, command)
		if err != nil {
			t.Fatal(err)
		}
		return answer
	}

	for field, want := range map[string]string{
		"Uid": "12345 12345 12345 12345", "Gid": "12346 12346 12346 12346", "Groups": "12346",
		"CapEff": "0000000000000000", "CapPrm": "0000000000000000", "NoNewPrivs": "1", "Seccomp": "2",
	} {
		if got := status(t, m.PID(), field); got != want {
			t.Errorf("%s of the process is %q, not %q", field, got, want)
		}
	}
	if root, err := os.Readlink(fmt.Sprintf("/proc/%d/root", m.PID())); err != nil || root != dir {
		t.Errorf("root of the process: %q, %v", root, err)
	}
	cgroups, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", m.PID()))
	if want := "0::/drafter/" + cfg.CgroupName + "\n"; err != nil || !strings.Contains(string(cgroups), want) {
		t.Errorf("cgroups of the process: %v\n%s\nwant %s", err, cgroups, want)
	}
	node, err := os.ReadFile("/sys/devices/system/node/node0/cpulist")
	if err != nil {
		t.Fatal(err)
	}
	if got := status(t, m.PID(), "Cpus_allowed_list"); got != strings.TrimSpace(string(node)) {
		t.Errorf("CPUs of the process: %s, node 0 has %s", got, node)
	}
	if numa, err := os.ReadFile(fmt.Sprintf("/proc/%d/numa_maps", m.PID())); err == nil && !bytes.Contains(numa, []byte("bind:0")) {
		t.Error("the RAM of the process is not bound to node 0")
	}
	if pgid, err := unix.Getpgid(m.PID()); err != nil || pgid != m.PID() {
		t.Errorf("process group: %d, %v: a Ctrl-C at our terminal would reach it", pgid, err)
	}
	if _, err := backend.Start(ctx, cfg); err == nil || !strings.Contains(err.Error(), "runs there already") {
		t.Errorf("a second machine in the same folder: %v", err)
	}

	if got := do("cpus"); got != "2" {
		t.Errorf("the guest has %s CPUs", got)
	}
	if got := do("disk extra info"); got != strconv.Itoa(1<<20) {
		t.Errorf("the second disk has %s bytes", got)
	}
	if _, err := console.Do(ctx, "disk extra write 0 4096 1"); err == nil {
		t.Error("the guest has written to a read-only disk")
	}

	// The NBD server goes and comes while the guest writes: it waits, and sees no error.
	do("disk disk start 64")
	server.kill()
	before := do("disk disk status")
	server.start(t)
	if err := os.Lchown(server.socket, cfg.UID, cfg.GID); err != nil { // as Adopt does
		t.Fatal(err)
	}
	for do("disk disk status") == before {
		if ctx.Err() != nil {
			t.Fatal("the guest's writer has not gone on")
		}
	}

	do("net eth0 172.16.0.2/30 172.16.0.1")
	do("listen 7")
	do("mem start 16")
	var conn net.Conn
	if err := tap.In(netns, func() (err error) {
		conn, err = net.Dial("tcp", "172.16.0.2:7")
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	echo := func(text string) {
		t.Helper()
		conn.SetDeadline(time.Now().Add(time.Minute))
		if _, err := io.WriteString(conn, text); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(text))
		if _, err := io.ReadFull(conn, got); err != nil || string(got) != text {
			t.Fatalf("echo of %q: %q, %v", text, got, err)
		}
	}
	echo("before")

	for move := range 3 {
		var state bytes.Buffer
		began := time.Now()
		if err := m.Pause(ctx); err != nil {
			t.Fatal(err)
		}
		paused := time.Now()
		if err := m.Save(ctx, &state); err != nil {
			t.Fatal(err)
		}
		saved := time.Now()
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
		if m, err = backend.Start(ctx, cfg); err != nil {
			t.Fatal(err)
		}
		started := time.Now()
		size := state.Len()
		if err := m.Load(ctx, &state); err != nil {
			t.Fatal(err)
		}
		loaded := time.Now()
		if err := m.Resume(ctx); err != nil {
			t.Fatal(err)
		}
		t.Logf("move %d: stop %v, save %v (%d bytes), close and start %v, load %v, cont %v", move,
			paused.Sub(began), saved.Sub(paused), size, started.Sub(saved), loaded.Sub(started), time.Since(loaded))
		echo(fmt.Sprintf("after move %d", move))
		do("mem verify")
	}
	if do("disk disk verify") == before {
		t.Error("the guest has written nothing more")
	}
	if err := m.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat("/sys/fs/cgroup/unified/drafter/" + cfg.CgroupName); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the cgroup is still there: %v", err)
	}
}

// TestAnnounce sees a waiting machine announced, and what comes then wait for it.
func TestAnnounce(t *testing.T) {
	needRoot(t)
	netns := makeNetns(t)
	backend, ctx := New(Options{}), t.Context()
	spec, err := backend.Describe(ctx, vmm.Spec{CPUCount: 1, MemorySize: 64 << 20, MAC: "02:0e:d9:fd:68:3d"})
	if err != nil {
		t.Skip(err)
	}
	memory, err := unix.MemfdCreate("announce", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	ram := os.NewFile(uintptr(memory), "announce")
	defer ram.Close()
	if err := ram.Truncate(spec.MemorySize); err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "announce")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	started, err := backend.Start(ctx, vmm.Config{Spec: spec, Dir: dir, Memory: ram, NUMANode: -1, Netns: netns, Interface: "tap0"})
	if err != nil {
		t.Fatal(err)
	}
	m := started.(*machine)
	defer m.Close()

	var socket int
	if err := tap.In(netns, func() error {
		link, err := net.InterfaceByName("tap0")
		if err != nil {
			return err
		}
		all := binary.BigEndian.Uint16(binary.NativeEndian.AppendUint16(nil, unix.ETH_P_ALL))
		if socket, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(all)); err != nil {
			return err
		}
		return unix.Bind(socket, &unix.SockaddrLinklayer{Protocol: all, Ifindex: link.Index})
	}); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(socket)
	send := func(what byte) {
		t.Helper()
		frame := append(slices.Repeat([]byte{0xff}, 6), 2, 0, 0, 0, 0, 1, 0x88, 0xb5, what) // an EtherType for experiments
		if _, err := unix.Write(socket, append(frame, make([]byte, 60-len(frame))...)); err != nil {
			t.Fatal(err)
		}
	}
	// queued takes what waits in the interface's queue. QEMU has taken at most one frame of it.
	queued := func() (seen []byte) {
		m.announcer.mu.Lock()
		defer m.announcer.mu.Unlock()
		frame := make([]byte, 2048)
		header, err := unix.IoctlGetInt(m.announcer.fd, unix.TUNGETVNETHDRSZ)
		if err != nil {
			t.Fatal(err)
		}
		for {
			n, err := unix.Read(m.announcer.fd, frame)
			if err != nil {
				return seen
			}
			if f := frame[header:n]; len(f) > 14 && f[12] == 0x88 && f[13] == 0xb5 {
				seen = append(seen, f[14])
			}
		}
	}
	for range 10 {
		send('a')
	}
	if err := m.Announce(); err != nil {
		t.Fatal(err)
	}
	for range 10 {
		send('b')
	}
	if got := queued(); len(got) < 9 || bytes.Contains(got, []byte("a")) {
		t.Errorf("after it was announced, %q waits for the guest instead of ten b", got)
	}
	frame := make([]byte, 2048)
	unix.SetsockoptTimeval(socket, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 60})
	for want := append(rarp(m.announcer.mac), make([]byte, 18)...); ; {
		n, err := unix.Read(socket, frame)
		if err != nil {
			t.Fatalf("no announcement was seen: %v", err)
		}
		if bytes.Equal(frame[:n], want) {
			break
		}
	}
	if err := m.Close(); err != nil {
		t.Error(err)
	}
	if f, err := tap.Open(netns, "tap0"); err != nil {
		t.Errorf("after the machine was closed: %v", err)
	} else {
		f.Close()
	}
	if err := m.announcer.announce(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("announced after the machine was closed: %v", err)
	}
}

func TestOpenTap(t *testing.T) {
	needRoot(t)
	netns := makeNetns(t)
	ip(t, "-n", netns, "link", "add", "dummy0", "type", "veth", "peer", "name", "dummy1")
	f, err := tap.Open(netns, "tap0")
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct{ netns, name, want string }{
		{netns, "tap0", "another process has it attached: give each machine one of its own (--interface, --netns)"},
		{netns, "tap9", "ip -n " + netns + " tuntap add tap9 mode tap"},
		{netns, "dummy0", "not a tap"},
		{"nonexistent", "tap0", "ip netns add nonexistent"},
		{"../etc", "tap0", "not a path"},
		{"", "", "1 to 15 characters"},
		{"", "nonexistent0", "in this network namespace"},
	} {
		g, err := tap.Open(tc.netns, tc.name)
		if err == nil {
			g.Close()
		}
		if err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%q %q: error %v, want %q", tc.netns, tc.name, err, tc.want)
		}
	}
	f.Close()
	if f, err = tap.Open(netns, "tap0"); err != nil {
		t.Errorf("after it was closed: %v", err)
	} else {
		f.Close()
	}
}
