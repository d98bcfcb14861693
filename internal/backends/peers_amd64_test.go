package backends

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/drafter-vm/drafter/internal/tinyguest"
	"github.com/drafter-vm/drafter/pkg/migrate"
	"github.com/drafter-vm/drafter/pkg/peer"
	"github.com/drafter-vm/drafter/pkg/runner"
	"github.com/drafter-vm/drafter/pkg/snapshot"
	"github.com/drafter-vm/drafter/pkg/vmm"
	"github.com/drafter-vm/drafter/pkg/vmm/vmmtest"
	"github.com/drafter-vm/drafter/pkg/vmpackage"
)

// shortDir is a folder for unix sockets.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "fc")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// pack makes a package of the tiny guest, with a disk and, on a host with one, a network interface.
func pack(t *testing.T, b vmm.Backend, host runner.Host) (dir string) {
	t.Helper()
	dir = filepath.Join(shortDir(t), "package")
	out := func(name string) string { return filepath.Join(dir, vmpackage.DefaultFile(name)) }
	blank := filepath.Join(t.TempDir(), "blank")
	if err := errors.Join(os.WriteFile(blank, nil, 0o600), os.Truncate(blank, 1<<20)); err != nil {
		t.Fatal(err)
	}
	cfg := snapshot.Config{
		Backend: b, MemorySize: memorySize, SettleTime: 500 * time.Millisecond, Host: host, Logger: vmmtest.Logger(t),
		Devices: []snapshot.Device{
			{Name: "state", Output: out("state")}, {Name: "memory", Output: out("memory")}, {Name: "config", Output: out("config")},
			{Name: "kernel", Input: kernel(t), Output: out("kernel")}, {Name: "disk", Input: blank, Output: out("disk")},
		},
	}
	if host.Interface != "" {
		cfg.MAC = "02:0e:d9:fd:68:3d"
	}
	if _, err := snapshot.Create(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	return dir
}

// peerOf is the configuration of a peer with an instance of a package.
func peerOf(t *testing.T, b vmm.Backend, host runner.Host, pkg, instance string) peer.Config {
	t.Helper()
	devices, err := peer.PackageDevices(pkg, instance)
	if err != nil {
		t.Fatal(err)
	}
	return peer.Config{Backend: b, Host: host, Devices: devices, Logger: vmmtest.Logger(t)}
}

// count is where the guest of a peer is.
func count(t *testing.T, p *peer.Peer) uint64 {
	t.Helper()
	for _, d := range p.Instance().Devices() {
		if d.Config.Name == runner.MemoryDevice {
			b := make([]byte, 8)
			if _, err := d.Block.ReadAt(b, tinyguest.Counters); err != nil {
				t.Fatal(err)
			}
			return binary.LittleEndian.Uint64(b)
		}
	}
	t.Fatal("it has no memory")
	return 0
}

// counts waits until the guest has come from a number through all of its memory, and through its disk.
func counts(t *testing.T, p *peer.Peer, from uint64, console *buffer) {
	t.Helper()
	end := time.Now().Add(patience)
	const all = tinyguest.Blocks * (tinyguest.CountersEnd - tinyguest.Counters) / 4096
	for count(t, p) < from+all {
		if time.Now().After(end) || strings.ContainsRune(console.String(), tinyguest.Broken) {
			t.Fatalf("the guest has come from %d to %d (%v); its console says %.100q", from, count(t, p), p.Err(), console.String())
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// TestFirecrackerMoves moves a guest between two hosts, in the jailer, with a network interface that has another name on each.
func TestFirecrackerMoves(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED, not tested: network namespaces need root")
	}
	b := jailed(t)
	var hosts [2]runner.Host
	console := new(buffer)
	for n := range hosts {
		hosts[n] = runner.Host{
			Dir: shortDir(t), Netns: fmt.Sprintf("fc%d-%d", n, os.Getpid()), Interface: fmt.Sprintf("tap%d", 7*n), UID: uid + n, GID: gid + n,
			CgroupVersion: cgroupVersion(), NUMANode: new(int), SerialOutput: console,
		}
		for _, line := range []string{"netns add NS", "-n NS tuntap add TAP mode tap", "-n NS link set TAP up"} {
			line = strings.NewReplacer("NS", hosts[n].Netns, "TAP", hosts[n].Interface).Replace(line)
			if said, err := exec.Command("ip", strings.Fields(line)...).CombinedOutput(); err != nil {
				t.Fatalf("ip %s: %v: %s", line, err, said)
			}
			t.Cleanup(func() { _ = exec.Command("ip", "netns", "del", hosts[n].Netns).Run() })
		}
	}
	pkg := pack(t, b, hosts[0])
	work := shortDir(t)
	p, err := peer.Resume(t.Context(), peerOf(t, b, hosts[0], pkg, filepath.Join(work, "0")))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Kill() })
	t.Logf("resumed in %v", p.ResumeDuration())
	counts(t, p, count(t, p), console)
	for move := 1; move <= 4; move++ {
		var source, destination []io.ReadWriter
		for range 3 {
			x, y := streams(t)
			source, destination = append(source, x), append(destination, y)
		}
		type sent struct {
			report *migrate.Report
			err    error
		}
		done := make(chan sent, 1)
		go func() {
			report, err := p.Send(t.Context(), source)
			done <- sent{report, err}
		}()
		cfg := peerOf(t, b, hosts[move%2], pkg, filepath.Join(work, fmt.Sprint(move)))
		looked := false
		cfg.OnReceive = func(s migrate.DestinationState) {
			if s != migrate.DestinationReceiving {
				return
			}
			looked = true
			said, err := exec.Command("ip", "-n", cfg.Host.Netns, "link", "show", cfg.Host.Interface).CombinedOutput()
			if err != nil || !strings.Contains(string(said), "LOWER_UP") {
				t.Errorf("move %d: nobody has the guest's interface before the guest is there: %v, %s", move, err, said)
			}
		}
		next, report, err := peer.Receive(t.Context(), cfg, destination)
		if err != nil {
			t.Fatalf("move %d: %v, and the source: %v", move, err, <-done)
		}
		if !looked {
			t.Errorf("move %d: nobody looked who has the interface", move)
		}
		t.Cleanup(func() { next.Kill() })
		if s := <-done; s.err != nil {
			t.Fatalf("move %d: %v", move, s.err)
		} else {
			t.Logf("move %d: downtime %v, %v of them at the destination", move, s.report.Downtime, report.Downtime)
		}
		if err := p.Close(t.Context()); err != nil {
			t.Errorf("move %d: close the source: %v", move, err)
		}
		p = next
		counts(t, p, count(t, p), console)
	}
	if err := p.Close(t.Context()); err != nil {
		t.Error(err)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	for _, h := range hosts {
		if left, readErr := os.ReadDir(h.Dir); readErr != nil || len(left) > 0 {
			t.Errorf("it has left %v in %q (%v)", left, h.Dir, readErr)
		}
		if err != nil || strings.Contains(string(mounts), h.Dir) {
			t.Errorf("it has left a mount in %q (%v)", h.Dir, err)
		}
	}
}

// streams are the two ends of a connection.
func streams(t *testing.T) (net.Conn, net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	x, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	y, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { x.Close(); y.Close() })
	return x, y
}

// TestFirecrackerFull saves a guest where there is no space, and again where there is: nothing of it is lost.
func TestFirecrackerFull(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED, not tested: mounting needs root")
	}
	b := backend(t)
	console := new(buffer)
	host := runner.Host{Dir: shortDir(t), SerialOutput: console}
	pkg := pack(t, b, runner.Host{Dir: host.Dir})
	small := shortDir(t)
	if err := unix.Mount("tmpfs", small, "tmpfs", 0, "size=4m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(small, unix.MNT_DETACH) })
	cfg := peerOf(t, b, host, pkg, filepath.Join(small, "instance"))
	p, err := peer.Resume(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Kill() })
	counts(t, p, count(t, p), console)

	if err := p.Close(t.Context()); !errors.Is(err, runner.ErrUnsaved) || !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("saved 12 MiB to a file system of 4: error %v, want runner.ErrUnsaved for want of space", err)
	}
	at := count(t, p)
	if err := unix.Mount("tmpfs", small, "tmpfs", unix.MS_REMOUNT, "size=64m"); err != nil {
		t.Fatal(err)
	}
	if err := p.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if p, err = peer.Resume(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	if now := count(t, p); now < at {
		t.Errorf("the guest was at %d when it was saved, and is at %d", at, now)
	}
	counts(t, p, at, console)
	if err := p.Close(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestFirecrackerHuge: a guest that was resumed comes to have its memory in huge pages, moves by small ones, and has huge ones again.
func TestFirecrackerHuge(t *testing.T) {
	const setting = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"
	if runner.CheckHugePages() != nil {
		before, err := os.ReadFile(setting)
		if err == nil {
			err = os.WriteFile(setting, []byte("advise"), 0)
		}
		if err != nil {
			t.Skipf("SKIPPED, not tested: huge pages cannot be allowed here: %v", err)
		}
		_, was, _ := strings.Cut(string(before), "[")
		was, _, _ = strings.Cut(was, "]")
		t.Cleanup(func() { _ = os.WriteFile(setting, []byte(was), 0) })
	}
	b := backend(t)
	console := new(buffer)
	host := runner.Host{Dir: shortDir(t), SerialOutput: console, HugePages: true}
	pkg, work := pack(t, b, runner.Host{Dir: host.Dir}), shortDir(t)
	p, err := peer.Resume(t.Context(), peerOf(t, b, host, pkg, filepath.Join(work, "0")))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Kill() })
	becomesHuge := func() {
		t.Helper()
		const least = 8 << 10 // of 12 MiB that it counts in
		for end := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
			text, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", p.Instance().Machine().PID()))
			if err != nil {
				t.Fatal(err)
			}
			_, line, _ := strings.Cut(string(text), "ShmemPmdMapped:")
			var kb int
			if _, err := fmt.Sscan(line, &kb); err == nil && kb >= least {
				return
			}
			if time.Now().After(end) {
				t.Fatalf("%d KiB of its memory are in huge pages, want %d", kb, least)
			}
		}
	}
	becomesHuge()
	counts(t, p, count(t, p), console)
	x, y := streams(t)
	done := make(chan error, 1)
	go func() {
		_, err := p.Send(t.Context(), []io.ReadWriter{x})
		done <- err
	}()
	next, _, err := peer.Receive(t.Context(), peerOf(t, b, host, pkg, filepath.Join(work, "1")), []io.ReadWriter{y})
	if err != nil {
		t.Fatalf("%v, and the source: %v", err, <-done)
	}
	t.Cleanup(func() { next.Kill() })
	if err := errors.Join(<-done, p.Close(t.Context())); err != nil {
		t.Fatal(err)
	}
	p = next
	becomesHuge()
	counts(t, p, count(t, p), console)
	if err := p.Close(t.Context()); err != nil {
		t.Error(err)
	}
}
