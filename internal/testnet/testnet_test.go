package testnet

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// guest puts a stand-in for a guest behind a peer: a namespace with the guest's addresses, on a veth where the tap would
// be, that runs a TCP server on port 7 that answers every connection with the peer's name. It says nothing unasked.
func guest(t *testing.T, n *Network, peer string) {
	t.Helper()
	name := n.Peer(peer) + "-guest"
	if err := removeNamespace(name); err != nil {
		t.Fatal(err)
	}
	if err := newNamespace(name); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := removeNamespace(name); err != nil {
			t.Error(err)
		}
	})
	handle, err := netns.GetFromName(name)
	if err != nil {
		t.Fatal(err)
	}
	defer handle.Close()
	if err := Do(name, quietIPv6); err != nil {
		t.Fatal(err)
	}
	err = Do(n.Peer(peer), func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "guest"
		veth := netlink.NewVeth(attrs)
		veth.PeerName, veth.PeerHardwareAddr, veth.PeerNamespace = "eth0", DefaultGuestMAC, netlink.NsFd(int(handle))
		if err := netlink.LinkAdd(veth); err != nil {
			return err
		}
		return up("guest")
	})
	if err != nil {
		t.Fatal(err)
	}
	var listeners []net.Listener
	err = Do(name, func() error {
		if err := sysctl("net/ipv6/conf/eth0/disable_ipv6", "0"); err != nil {
			return err
		}
		// No solicitations, reports and other signs of life.
		for _, key := range []string{"accept_ra", "router_solicitations", "dad_transmits"} {
			if err := sysctl("net/ipv6/conf/eth0/"+key, "0"); err != nil {
				return err
			}
		}
		eth0, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		for _, addr := range []string{"172.16.0.2/30", "fd00:172:16::2/64"} {
			a, err := netlink.ParseAddr(addr)
			if err != nil {
				return err
			}
			if a.IP.To4() == nil {
				a.Flags = unix.IFA_F_NODAD
			}
			if err := netlink.AddrAdd(eth0, a); err != nil {
				return err
			}
		}
		if err := up("eth0"); err != nil {
			return err
		}
		for _, addr := range []string{"172.16.0.2:7", "[fd00:172:16::2]:7"} {
			l, err := net.Listen("tcp", addr)
			if err != nil {
				return err
			}
			listeners = append(listeners, l)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range listeners {
		done := make(chan struct{})
		go func() {
			defer close(done)
			for {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				io.WriteString(conn, peer)
				conn.Close()
			}
		}()
		t.Cleanup(func() { l.Close(); <-done })
	}
}

// run lets the guest of a peer be heard and hear, as a VM that runs does; pause is the opposite.
func run(t *testing.T, n *Network, peer string) {
	t.Helper()
	err := Do(n.Peer(peer), func() error {
		port, err := enslave("guest")
		if err != nil {
			return err
		}
		return netlink.LinkSetLearning(port, false)
	})
	if err != nil {
		t.Fatal(err)
	}
}

func pause(t *testing.T, n *Network, peer string) {
	t.Helper()
	err := Do(n.Peer(peer), func() error {
		link, err := netlink.LinkByName("guest")
		if err != nil {
			return err
		}
		return netlink.LinkSetNoMaster(link)
	})
	if err != nil {
		t.Fatal(err)
	}
}

// ask says which guest answers the client.
func ask(t *testing.T, n *Network, address string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	conn, err := DialContext(ctx, n.Client(), "tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	b, err := io.ReadAll(conn)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// learnedPort is the name of the port behind which the client's bridge has learned the guest to be, or empty.
func learnedPort(t *testing.T, n *Network) (port string) {
	t.Helper()
	err := Do(n.Client(), func() error {
		entries, err := netlink.NeighList(0, unix.AF_BRIDGE)
		if err != nil {
			return err
		}
		for _, e := range entries {
			if bytes.Equal(e.HardwareAddr, DefaultGuestMAC) {
				link, err := netlink.LinkByIndex(e.LinkIndex)
				if err != nil {
					return err
				}
				port = link.Attrs().Name
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return port
}

func TestMove(t *testing.T) {
	n := NewTest(t, "a", "b", "c")
	for _, peer := range []string{"a", "b", "c"} {
		guest(t, n, peer)
	}
	ports := map[string]string{"a": "p0", "b": "p1", "c": "p2"}
	silent := 0 // moves whose stand-in had said nothing yet, so that the announcement alone moved it
	for i, peer := range []string{"a", "b", "a", "c", "b"} {
		before := learnedPort(t, n)
		run(t, n, peer)
		if learnedPort(t, n) == before {
			silent++ // the kernel may send something on its behalf at any time: IPv6 listeners, neighbours
		}
		if err := n.Moved(peer); err != nil {
			t.Fatal(err)
		}
		// The announcement goes through a softirq, which may run after Moved on a busy machine.
		for deadline := time.Now().Add(10 * time.Second); learnedPort(t, n) != ports[peer] && time.Now().Before(deadline); {
			runtime.Gosched()
		}
		if got := learnedPort(t, n); got != ports[peer] {
			t.Fatalf("move %d to %s: the bridge has the guest behind %q, want %q", i, peer, got, ports[peer])
		}
		for _, address := range []string{"172.16.0.2:7", "[fd00:172:16::2]:7"} {
			if got := ask(t, n, address); got != peer {
				t.Errorf("move %d to %s: at %s answers %q", i, peer, address, got)
			}
		}
		if got := learnedPort(t, n); got != ports[peer] {
			t.Errorf("move %d to %s: then the bridge has the guest behind %q", i, peer, got)
		}
		pause(t, n, peer)
	}
	if silent == 0 {
		t.Error("each stand-in was heard before its announcement: nothing was shown")
	}
	if err := n.Moved("d"); err == nil {
		t.Error("a move to nowhere was announced")
	}
}

// TestTap attaches to the tap device as a VMM does and lets the client speak to it.
func TestTap(t *testing.T) {
	n := NewTest(t, "a")
	var tap *os.File
	err := Do(n.Peer("a"), func() error {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != nil {
			return err
		}
		req, err := unix.NewIfreq(Interface)
		if err != nil {
			return err
		}
		req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
			return err
		}
		tap = os.NewFile(uintptr(fd), Interface)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	defer tap.Close()
	// Who has 172.16.0.1? Tell 172.16.0.2.
	request := announcement(DefaultGuestMAC, GuestIPv4)
	copy(request[38:42], GatewayIPv4.Addr().AsSlice())
	started := time.Now()
	mac := answer(t, tap, request)
	t.Logf("the client was reached %v after the tap device was attached to", time.Since(started))
	if !bytes.Equal(mac, gatewayMAC) {
		t.Errorf("the gateway has MAC %v, want %v", mac, gatewayMAC)
	}
	if got := learnedPort(t, n); got != "p0" {
		t.Errorf("the bridge has the guest behind %q", got)
	}
}

// answer sends an ARP request by a tap device and returns the sender of the reply. It asks again until there is one: the
// kernel makes the device a working port of the bridge a moment after somebody attaches to it.
func answer(t *testing.T, tap *os.File, request []byte) net.HardwareAddr {
	t.Helper()
	const vnetHeader = 10
	buf := make([]byte, 2000)
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); {
		if _, err := tap.Write(append(make([]byte, vnetHeader), request...)); err != nil {
			t.Fatal(err)
		}
		if err := tap.SetReadDeadline(time.Now().Add(10 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		for {
			length, err := tap.Read(buf)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			frame := buf[vnetHeader:length]
			if len(frame) >= 42 && frame[12] == 0x08 && frame[13] == 0x06 && frame[21] == 2 {
				return net.HardwareAddr(frame[22:28])
			}
		}
	}
	t.Fatal("no answer from the client")
	return nil
}

// traces returns what is there of a network.
func traces(name string) []string {
	names, _ := filepath.Glob(filepath.Join(netnsDir, name+"-*"))
	locks, _ := filepath.Glob(filepath.Join(lockDir, name))
	return append(names, locks...)
}

func TestClose(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to create network namespaces")
	}
	name := fmt.Sprintf("close%d", os.Getpid())
	goroutines := runtime.NumGoroutine()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	n, err := New(Config{Name: name, Peers: []string{"a", "b"}})
	if err != nil {
		t.Fatal(err)
	}
	if got := traces(name); len(got) != 4 {
		t.Errorf("there are %v", got)
	}
	if _, err := New(Config{Name: name}); !errors.Is(err, ErrBusy) {
		t.Errorf("a second network of the name: %v", err)
	}
	for range 2 {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	}
	if got := traces(name); len(got) > 0 {
		t.Errorf("left: %v", got)
	}
	if err := n.Moved("a"); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Moved after Close: %v", err)
	}
	if now, _ := os.ReadDir("/proc/self/fd"); len(now) != len(fds) || runtime.NumGoroutine() > goroutines {
		t.Errorf("descriptors %d → %d, goroutines %d → %d", len(fds), len(now), goroutines, runtime.NumGoroutine())
	}
}

// TestHeal kills a process that holds a network, and builds another of the name.
func TestHeal(t *testing.T) {
	if name := os.Getenv("TESTNET_HOLD"); name != "" {
		if _, err := New(Config{Name: name, Peers: []string{"old", "a"}}); err != nil {
			t.Fatal(err)
		}
		fmt.Println("ready")
		select {}
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root, to create network namespaces")
	}
	name := fmt.Sprintf("heal%d", os.Getpid())
	child := exec.Command(os.Args[0], "-test.run", "^TestHeal$")
	child.Env = append(os.Environ(), "TESTNET_HOLD="+name)
	out, err := child.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	line := make([]byte, 5)
	if _, err := io.ReadFull(out, line); err != nil || string(line) != "ready" {
		t.Errorf("child said %q, %v", line, err)
	}
	if err := child.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	child.Wait() // says that it was killed
	if got := traces(name); len(got) != 4 {
		t.Fatalf("the killed process left %v", got)
	}
	// Killed between creating the file of a namespace and mounting on it.
	if err := os.WriteFile(filepath.Join(netnsDir, name+"-b"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	n, err := New(Config{Name: name, Peers: []string{"a", "b"}})
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(traces(name), " "); strings.Contains(got, "-old") {
		t.Errorf("there are %v", got)
	}
	if err := n.Close(); err != nil {
		t.Error(err)
	}
	if got := traces(name); len(got) > 0 {
		t.Errorf("left: %v", got)
	}
}

func TestNewRefuses(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to create network namespaces")
	}
	for _, tt := range []struct {
		cfg  Config
		want string
	}{
		{Config{}, `name "" is not valid`},
		{Config{Name: "../x"}, "is not valid"},
		{Config{Name: "x", Peers: []string{"a", "a"}}, `peer name "a" is taken`},
		{Config{Name: "x", Peers: []string{"client"}}, `peer name "client" is taken`},
		{Config{Name: strings.Repeat("x", 60)}, "more than 64 bytes"},
		{Config{Name: "x", GuestMAC: net.HardwareAddr{1}}, "6 bytes"},
	} {
		if _, err := New(tt.cfg); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("New(%+v): %v, want %q", tt.cfg, err, tt.want)
		}
	}
}

func TestDialContext(t *testing.T) {
	if _, err := DialContext(t.Context(), "x", "tcp", "localhost:1"); err == nil || !strings.Contains(err.Error(), "IP address") {
		t.Errorf("a host name was accepted: %v", err)
	}
	if err := Do("no-such-namespace", func() error { return nil }); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Do in a namespace that is not there: %v", err)
	}
}
