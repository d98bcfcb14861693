package e2e

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/drafter-vm/drafter/internal/testcert"
	"github.com/drafter-vm/drafter/internal/testssh"
)

// TestCommandTransports moves a whole VM under load over TLS, a key, a unix socket, ssh and a program's pipe, one after the other,
// and has strangers knock.
func TestCommandTransports(t *testing.T) {
	t.Parallel()
	w := newWorkshop(t)
	w.pack(t)
	flagsOf := func(change ...string) (flags, hostile []string) {
		ours, theirs := testcert.New(t), testcert.New(t)
		o, pin := ours.Issue(t, nil, change...)
		x, _ := theirs.Issue(t, nil, change...)
		flags = []string{"--tls-cert", o.Certificate, "--tls-key", o.PrivateKey, "--tls-ca", ours.File}
		return flags, []string{"--tls-cert", x.Certificate, "--tls-key", x.PrivateKey, "--allow-peer", pin}
	}
	mtls, hostile := flagsOf("127.0.0.1", "spiffe://example.org/vm")
	key, otherKey := w.path("key"), w.path("other-key")
	for path, text := range map[string]string{key: strings.Repeat("5a", 32) + "\n", otherKey: strings.Repeat("a5", 32)} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	sshd := testssh.New(t)
	socket := "unix://" + w.path("s")
	same := func(address string) string { return address }

	c := w.start(t, w.console, w.peer("package", "at-0", append([]string{"--laddr", "tls://127.0.0.1:0"}, mtls...)...)...)
	c.waitFor(t, "Resumed VM")
	w.do(t, "mem start 32")
	w.do(t, "disk disk start 4096")
	whole := t // of its parts, the peers outlive each
	// Each step says how the VM is got, and how it can be had next.
	for n, step := range []struct {
		name     string
		raddr    func(serving string) string
		flags    []string // of the one that receives
		stranger []string // flags that do not get it; nil: not tried
		says     string   // part of what the source says of them
		laddr    []string // where it can be had next
	}{
		{"tls", same, append([]string{"--allow-peer", "spiffe://example.org/*", "--allow-peer", "uid:0"}, mtls...), hostile, "unknown authority", []string{socket}},
		{"unix", same, nil, nil, "", []string{"psk://127.0.0.1:0", "--psk-file", key}},
		{"psk", same, []string{"--psk-file", key}, []string{"--psk-file", otherKey}, "another key", []string{"127.0.0.1:0"}},
		{"ssh", func(serving string) string {
			return fmt.Sprintf("ssh://root@%s/%s?config=%s", sshd.Addr, serving, sshd.Config)
		}, nil, nil, "", []string{"quic://127.0.0.1:0"}},
		{"quic", same, nil, nil, "", []string{"127.0.0.1:0"}},
		{"exec", func(serving string) string {
			_, port, _ := net.SplitHostPort(serving)
			return fmt.Sprintf("exec:exec bash -c 'exec 3<>/dev/tcp/127.0.0.1/%s; cat <&3 & exec cat >&3'", port)
		}, nil, nil, "", nil},
	} {
		t.Run(step.name, func(t *testing.T) {
			serving := c.waitFor(t, "Serving on ")
			args := func(flags []string, laddr []string) []string {
				all := append([]string{"--raddr", step.raddr(serving)}, flags...)
				if len(laddr) > 0 {
					all = append(all, append([]string{"--laddr"}, laddr...)...)
				}
				for _, address := range []string{serving, strings.Join(laddr, "")} {
					if strings.HasPrefix(address, "quic:") {
						all = append(all, mtls...)
					}
				}
				return w.peer("package", fmt.Sprintf("at-%d", n+1), all...)
			}
			if step.stranger != nil {
				said := w.start(t, nil, args(step.stranger, nil)...).wait(t, 1)
				t.Logf("the stranger hears: %s", said)
				c.waitFor(t, step.says)
				w.do(t, "echo here")
				if _, err := os.Stat(filepath.Join(w.path(fmt.Sprintf("at-%d", n+1)), "overlay")); err == nil {
					t.Error("a stranger has made something of what it has not got")
				}
			}
			next := w.start(whole, w.console, args(step.flags, step.laddr)...)
			next.waitFor(t, "Received VM")
			c.wait(t, 0)
			w.do(t, "mem stop")
			w.do(t, "mem verify")
			w.do(t, "mem go")
			if said := c.said() + next.said(); strings.Contains(said, strings.Repeat("5a", 8)) {
				t.Error("a key is in what was said")
			}
			c = next
		})
		if t.Failed() {
			return
		}
	}
	last := w.do(t, "disk disk verify")
	t.Logf("newest record %s", last)
	c.Process.Signal(syscall.SIGTERM)
	c.wait(t, 0)
	w.checkClean(t)
	if _, err := os.Stat(w.path("s")); err == nil {
		t.Error("the unix socket is left")
	}

	// A source that the destination starts itself: both ends of one pipe.
	t.Run("stdio", func(t *testing.T) {
		quoted := []string{w.bin}
		for _, a := range w.peer("package", fmt.Sprintf("at-%d", 6), "--laddr", "stdio:") {
			if a != "--enable-input" {
				quoted = append(quoted, "'"+a+"'")
			}
		}
		there := w.start(t, w.console, w.peer("package", "there", "--raddr", "exec:exec "+strings.Join(quoted, " "))...)
		there.waitFor(t, "Received VM")
		w.do(t, "echo here")
		there.Process.Signal(syscall.SIGTERM)
		there.wait(t, 0)
		w.checkClean(t)
	})
}
