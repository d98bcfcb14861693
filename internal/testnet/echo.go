package testnet

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// Echo answers on a port of a namespace, by TCP and UDP and in both families, until the test ends: with the address that it sees the
// question come from, and a newline; over TCP, what comes then comes back.
func Echo(t testing.TB, namespace string, port int) {
	t.Helper()
	err := Do(namespace, func() error {
		l, err := net.Listen("tcp", fmt.Sprintf(":%d", port))
		if err != nil {
			return err
		}
		t.Cleanup(func() { l.Close() })
		p, err := net.ListenPacket("udp", fmt.Sprintf(":%d", port))
		if err != nil {
			return err
		}
		t.Cleanup(func() { p.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() {
					defer c.Close()
					fmt.Fprintln(c, host(c.RemoteAddr()))
					_, _ = io.Copy(c, c)
				}()
			}
		}()
		go func() {
			b := make([]byte, 2000)
			for {
				_, from, err := p.ReadFrom(b)
				if err != nil {
					return
				}
				_, _ = p.WriteTo([]byte(host(from)+"\n"), from)
			}
		}()
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func host(a net.Addr) string {
	ap, _ := netip.ParseAddrPort(a.String())
	return ap.Addr().Unmap().WithZone("").String()
}

const (
	// Patience is how long an answer may take on a busy machine.
	Patience = 5 * time.Second
	// Unseen is how long nothing must come for there to be no answer.
	Unseen = 300 * time.Millisecond
)

// Seen asks an [Echo] from within a namespace where it sees the question come from. Empty: there is no answer.
func Seen(t testing.TB, namespace, network string, addr netip.Addr, port int) string {
	t.Helper()
	return SeenWithin(namespace, network, addr, port, Patience)
}

// SeenWithin is Seen with the time that an answer may take.
func SeenWithin(namespace, network string, addr netip.Addr, port int, patience time.Duration) string {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	c, err := DialContext(ctx, namespace, network, netip.AddrPortFrom(addr, uint16(port)).String())
	if err != nil {
		return ""
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(patience))
	if network == "udp" {
		if _, err := c.Write([]byte("hello")); err != nil {
			return ""
		}
	}
	b := make([]byte, 100)
	n, err := c.Read(b)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b[:n]))
}

// Run runs a program in a namespace, and returns what it prints.
func Run(t testing.TB, namespace string, command ...string) []byte {
	t.Helper()
	var out []byte
	err := Do(namespace, func() (err error) {
		cmd := exec.Command(command[0], command[1:]...)
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		if out, err = cmd.Output(); err != nil {
			err = fmt.Errorf("%s: %w: %s", strings.Join(command, " "), err, stderr.Bytes())
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// Picture is all of a host's network that a program can change and leave so: rules, interfaces, addresses, routes, kernel settings, and the
// names of network namespaces that begin with prefix, but for those of guests.
func Picture(t testing.TB, namespace, prefix string) string {
	t.Helper()
	// Not what the kernel changes by itself when somebody is at the other end of an interface.
	out := Run(t, namespace, "sh", "-c", `nft list ruleset
ip -o link | sed 's/^[0-9]*: //; s/@if[0-9]*//; s/<[^>]*>//; s/ state [A-Z]*//'
ip -o address | grep -v 'inet6 fe80' | sed 's/^[0-9]*: //; s/ valid_lft.*//'
(ip route; ip -6 route) | grep -v ^fe80 | sed 's/ linkdown//'
ip rule; ip -6 rule
sysctl -a 2>/dev/null | grep '^net\.' | grep -v 'nf_conntrack_count\|neigh'`)
	names, err := os.ReadDir(netnsDir)
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	b.Write(out)
	for _, n := range names {
		if strings.HasPrefix(n.Name(), prefix) && !strings.HasSuffix(n.Name(), "-guest") {
			fmt.Fprintln(&b, n.Name())
		}
	}
	return b.String()
}

// Diff fails the test if a Picture is not as it was before.
func Diff(t testing.TB, what, before, after string) {
	t.Helper()
	was := make(map[string]int)
	for l := range strings.Lines(before) {
		was[l]++
	}
	for l := range strings.Lines(after) {
		if was[l]--; was[l] < 0 {
			t.Errorf("%s: + %s", what, l)
		}
	}
	for l, n := range was {
		if n > 0 {
			t.Errorf("%s: - %s", what, l)
		}
	}
}

// NewGuestIn makes a guest that runs in a namespace.
func NewGuestIn(t testing.TB, name, namespace string) *Guest {
	t.Helper()
	g := NewGuest(t, name, nil)
	c, err := g.Open(namespace)
	if err != nil {
		t.Fatal(err)
	}
	g.Resume(c)
	return g
}
