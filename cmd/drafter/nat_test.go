package main

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/drafter-vm/drafter/internal/testnet"
)

// shared is a buffer that a command writes and a test reads.
type shared struct {
	mu   sync.Mutex // guards text
	text bytes.Buffer
}

func (s *shared) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text.Write(p)
}

func (s *shared) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text.String()
}

// waitFor waits until the command has said something.
func (s *shared) waitFor(t *testing.T, text string) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !strings.Contains(s.String(), text); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("it does not say %q, but %q", text, s.String())
		}
	}
}

// start runs a command line on a host, until it is stopped; stop returns its exit status.
func start(t *testing.T, host string, args ...string) (said *shared, stop func() int) {
	t.Helper()
	said = new(shared)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan int, 1)
	go func() {
		var status int
		err := testnet.Do(host, func() error {
			status = exitStatus(run(ctx, append([]string{"drafter"}, args...), strings.NewReader(""), said, said))
			return nil
		})
		if err != nil {
			status = -1
		}
		done <- status
	}()
	stop = sync.OnceValue(func() int { cancel(); return <-done })
	t.Cleanup(func() { stop() })
	return said, stop
}

// TestCommandNAT: a guest in a namespace of drafter nat is reached by drafter forwarder, whose file may change; both leave nothing.
func TestCommandNAT(t *testing.T) {
	h := testnet.NewTestHosts(t, "a", "world")
	prefix := "c" + h.Host("")[1:5] + "n"
	before := testnet.Picture(t, h.Host("a"), prefix)
	said, stop := start(t, h.Host("a"), "nat", "--namespace-prefix", prefix, "--count", "2")
	said.waitFor(t, fmt.Sprintf("2 network namespaces, %s0 to %s1, IPv4 and IPv6 by eth0", prefix, prefix))
	g := testnet.NewGuestIn(t, prefix, prefix+"1")
	testnet.Echo(t, g.Namespace(), 6379)

	file := filepath.Join(t.TempDir(), "forwards.json")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(file+".new", []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(file+".new", file); err != nil {
			t.Fatal(err)
		}
	}
	entry := func(external string) string {
		return fmt.Sprintf(`[{"netns":%q,"internalPort":"6379","protocol":"tcp","externalAddr":%q}]`, prefix+"1", external)
	}
	write(entry("0.0.0.0:3333"))
	forwarder, end := start(t, h.Host("a"), "forwarder", "--port-forwards-file", file)
	forwarder.waitFor(t, "Forwarding tcp 0.0.0.0:3333 to "+prefix+"1:6379")
	if got := testnet.Seen(t, h.Host("world"), "tcp", h.Addr4("a"), 3333); got != h.Addr4("world").String() {
		t.Errorf("the guest sees a client as %q, want %s", got, h.Addr4("world"))
	}
	write(entry("[::1]:4444"))
	forwarder.waitFor(t, "Forwarding tcp [::1]:4444")
	forwarder.waitFor(t, "Not forwarding tcp 0.0.0.0:3333")
	if testnet.Seen(t, h.Host("a"), "tcp", netip.IPv6Loopback(), 4444) == "" {
		t.Error("the guest is not reached at [::1]")
	}
	write(entry("[::1]:4444") + "]")
	forwarder.waitFor(t, "the forwards stay as they are")
	write(entry("203.0.113.1:1"))
	forwarder.waitFor(t, "this host has no address 203.0.113.1")
	if status := end(); status != 0 {
		t.Errorf("the forwarder ends with %d: %s", status, forwarder)
	}
	if status := stop(); status != 0 {
		t.Errorf("the NAT ends with %d: %s", status, said)
	}
	said.waitFor(t, "Removed 2 network namespaces")
	testnet.Diff(t, "after nat and forwarder", before, testnet.Picture(t, h.Host("a"), prefix))
}

// TestNATBadInput: command lines that cannot be used, and what is said of them.
func TestNATBadInput(t *testing.T) {
	for _, c := range []struct {
		line   string
		status int
		want   string
	}{
		{"nat --count 300", 2, "more than the 256"},
		{"nat --count 0", 2, "--count 0"},
		{"nat --host-veth-cidr 10.0.8.0/33", 2, `--host-veth-cidr "10.0.8.0/33"`},
		{"nat --host-veth-cidr 10.0.15.0/26", 2, "overlaps"},
		{"nat --namespace-veth-cidr6 fd00::/129", 2, "--namespace-veth-cidr6"},
		{"nat --blocked-subnet-cidr 10", 2, `--blocked-subnet-cidr "10"`},
		{"nat --namespace-interface-mac 02:0e", 2, "--namespace-interface-mac"},
		{"nat --namespace-interface-ip 172.16.0.1", 2, "gateway"},
		{"nat --namespace-interface-ip nobody", 2, `--namespace-interface-ip "nobody"`},
		{"nat --namespace-interface-netmask 33", 2, "--namespace-interface-netmask 33"},
		{"nat --namespace-interface lo", 2, `"lo"`},
		{"nat --namespace-prefix ark7", 2, `"ark7"`},
		{"nat --ipv6 perhaps", 2, `"perhaps"`},
		{"nat ark", 2, "every setting is a flag"},
		{"nat --host-interface eth7", 1, `"eth7"`},
		{`forwarder --port-forwards [`, 2, "--port-forwards"},
		{`forwarder --port-forwards []x`, 2, "behind the array"},
		{`forwarder --port-forwards [{"netns":"a","internalPort":"x","externalAddr":"127.0.0.1:1"}]`, 2, `"x"`},
		{`forwarder --port-forwards [{"netns":"a","internalPort":"1","protocol":"icmp","externalAddr":"127.0.0.1:1"}]`, 2, `"icmp"`},
		{`forwarder --port-forwards-file /nonexistent/f`, 2, "/nonexistent/f"},
		{`forwarder --port-forwards-file f --port-forwards []`, 2, "exclude each other"},
		{`forwarder --host-veth-cidr 10.0.8.0`, 2, "--host-veth-cidr"},
		{`forwarder --port-forwards [{"netns":"nowhere-at-all","internalPort":"1","externalAddr":"127.0.0.1:1"}]`, 1, "nowhere-at-all"},
	} {
		t.Run(c.line, func(t *testing.T) {
			if os.Geteuid() != 0 && c.status == 1 {
				t.Skip("needs root to come so far")
			}
			status, _, stderr := drafter(t.Context(), strings.Fields(c.line)...)
			if status != c.status || !strings.Contains(stderr, c.want) {
				t.Errorf("status %d, %q: want %d and %q", status, stderr, c.status, c.want)
			}
		})
	}
}
