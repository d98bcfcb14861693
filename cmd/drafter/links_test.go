package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/spf13/pflag"

	"github.com/drafter-vm/drafter/internal/testcert"
	"github.com/drafter-vm/drafter/pkg/transport"
)

// TestNeeds takes hosts that are called as schemes are for hosts.
func TestNeeds(t *testing.T) {
	for address, want := range map[string]string{
		"tls:1337": "", "quic:1337": "", "psk:1337": "", "wss:1337": "", "stdio:1337": "", "": "",
		"tls://h:1": "certificate", "TLS://h:1": "certificate", "wss://h:1": "certificate", "quic://h:1": "certificate", "psk://h:1": "key", "Psk://h:1": "key", "stdio:": "stdio", "unix:///a": "",
	} {
		if got := needs(address); got != want {
			t.Errorf("%q needs %q, want %q", address, got, want)
		}
	}
	var l links
	flags := pflag.NewFlagSet("", pflag.ContinueOnError)
	l.register(flags)
	l.raddr, l.laddr = "tls:1337", "psk:1337"
	if err := l.check(t.Context(), flags, strings.NewReader(""), io.Discard); err != nil {
		t.Error(err)
	}
}

// TestSecretsNotPrinted gives addresses with a password in every place: nothing that is printed has it.
func TestSecretsNotPrinted(t *testing.T) {
	f := newForeign(t)
	const secret = "hunter2"
	for _, address := range []string{"ssh://root:" + secret + "@h/localhost:1", "ssh://root:" + secret + "%zz@h/localhost:1", "ws://u:" + secret + "@localhost:1/p", "psk://u:" + secret + "@localhost:1", "tls://u:" + secret + "@localhost:1"} {
		for _, line := range [][]string{
			{"terminator", "--package", filepath.Join(f.dir, "out"), "--raddr", address},
			{"mounter", "--package", filepath.Join(f.dir, "out"), "--mount", filepath.Join(f.dir, "mnt"), "--raddr", address},
			{"mounter", "--package", f.pkg, "--mount", filepath.Join(f.dir, "mnt"), "--laddr", address},
			{"serve", "--package", f.pkg, "--laddr", address},
			{"peer", "--package", f.pkg, "--rollback", "--raddr", address},
			{"peer", "--package", f.pkg, "--laddr", address},
			{"peer", "--package", f.pkg, "--accept", address},
			{"peer", "--package", f.pkg, "--metrics", address},
			{"peer", address},
			{"ctl", address},
			{"ctl", "--control", filepath.Join(f.dir, "none"), "migrate", address},
			{address},
		} {
			if status, stdout, stderr := drafter(t.Context(), line...); status == 0 || strings.Contains(stdout+stderr, secret) {
				t.Errorf("drafter %q prints %s%s", line, stdout, stderr)
			}
		}
		if err := lookAt(links{}, new(way), "id", address); err == nil || strings.Contains(err.Error(), secret) {
			t.Errorf("ctl migrate: %v", err)
		}
		if _, err := (&operator{}).links.to(address); err == nil || strings.Contains(err.Error(), secret) {
			t.Errorf("ctl migrate: %v", err)
		}
		if s := named(address).String(); strings.Contains(s, secret) {
			t.Errorf("the VM is sent to %s", s)
		}
		var log bytes.Buffer
		ctx := withLogger(t.Context(), slog.New(slog.NewTextHandler(&log, nil)))
		if _, err := (&links{}).listen(ctx, "laddr", address); err == nil || strings.Contains(err.Error()+log.String(), secret) {
			t.Errorf("listen: %v, log %s", err, &log)
		}
		if _, err := (&links{raddr: address}).dialOr(ctx, "remedy"); err == nil || strings.Contains(err.Error()+log.String(), secret) {
			t.Errorf("dial: %v, log %s", err, &log)
		}
	}
}

// TestKeyFile gives the key for psk in files and pipes.
func TestKeyFile(t *testing.T) {
	key := strings.Repeat("ab", 32)
	dir := t.TempDir()
	file := func(name string, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(key), mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	pipe := func(content string) (path string, r *os.File) {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { r.Close() })
		if _, err := w.WriteString(content); err != nil {
			t.Fatal(err)
		}
		w.Close()
		return fmt.Sprintf("/proc/self/fd/%d", r.Fd()), r
	}
	whole, _ := pipe(key + "\n")
	empty, _ := pipe("")
	bad, _ := pipe("secret")
	stdin, in := pipe(key)
	for _, tt := range []struct {
		name, file string
		raddr      string
		want       string // part of the error
		warns      bool
	}{
		{"file", file("own", 0o600), "", "", false},
		{"file of the group", file("group", 0o640), "", "", true},
		{"file of all", file("all", 0o604), "", "", true},
		{"missing file", filepath.Join(dir, "none"), "", "no such file", false},
		{"pipe", whole, "", "", false},
		{"empty pipe", empty, "", "is empty", false},
		{"bad pipe", bad, "", "32 bytes", false},
		{"standard input, which is the other peer's", stdin, "stdio:", "standard input", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var log bytes.Buffer
			ctx := withLogger(t.Context(), slog.New(slog.NewTextHandler(&log, nil)))
			l := links{laddr: "psk://127.0.0.1:0", raddr: tt.raddr}
			flags := pflag.NewFlagSet("", pflag.ContinueOnError)
			l.register(flags)
			if err := flags.Set("psk-file", tt.file); err != nil {
				t.Fatal(err)
			}
			out, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer out.Close()
			err = l.check(ctx, flags, in, out)
			if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
				t.Fatalf("error %v, want %q", err, tt.want)
			}
			if said := log.String(); tt.warns != (strings.Contains(said, "chmod 600") && strings.Contains(said, tt.file)) {
				t.Errorf("the log has %q", said)
			}
			if err != nil {
				return
			}
			listener, err := l.listen(ctx, "laddr", l.laddr)
			if err != nil {
				t.Fatal(err)
			}
			defer listener.Close()
			for range 2 { // the key is there for more than one
				greeted := make(chan error, 1)
				go func() {
					conn, err := listener.Accept()
					if err == nil {
						defer conn.Close()
						_, err = transport.Handshake(ctx, conn)
					}
					greeted <- err
				}()
				conn, err := (transport.Options{Key: key}).Dial(ctx, "psk://"+listener.Addr().String())
				if err != nil {
					t.Fatal(err)
				}
				if err := <-greeted; err != nil {
					t.Error(err)
				}
				conn.Close()
			}
		})
	}
}

// TestKeyNotInherited has a program started by a command that has the key in its environment. The program has it not, whether the
// command uses it or does not, and the command still has it.
func TestKeyNotInherited(t *testing.T) {
	f := newForeign(t)
	env := filepath.Join(f.dir, "env")
	t.Setenv(pskVariable, strings.Repeat("ab", 32))
	drafter(t.Context(), "terminator", "--package", filepath.Join(f.dir, "out"), "--raddr", "exec:env >"+env)
	text, err := os.ReadFile(env)
	if err != nil || !bytes.Contains(text, []byte("PATH=")) {
		t.Fatalf("%q, %v", text, err)
	}
	if bytes.Contains(text, []byte(pskVariable)) {
		t.Error("a program that was started has the key")
	}
	t.Setenv(pskVariable, strings.Repeat("ab", 32))
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	if status, _, stderr := drafter(t.Context(), "terminator", "--package", filepath.Join(f.dir, "out"), "--raddr", "psk://"+l.Addr().String()); status != 1 || !strings.Contains(stderr, "refused") {
		t.Errorf("with the key in the environment: %d, %s", status, stderr)
	}
	if _, ok := os.LookupEnv(pskVariable); ok {
		t.Error("the key is left in the environment")
	}
}

// TestQUICNobody dials where nobody listens, over UDP: the remedy is that of TCP.
func TestQUICNobody(t *testing.T) {
	if testing.Short() {
		t.Skip("QUIC waits for ten seconds")
	}
	o, _ := testcert.New(t).Issue(t, nil, "127.0.0.1")
	l, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, err = (&links{raddr: "quic://" + l.LocalAddr().String(), Options: o}).dialFirst(context.Background())
	if err == nil || !strings.Contains(err.Error(), "start the peer that has the VM, with --laddr") {
		t.Errorf("error %v", err)
	}
}

// TestUnixSocketRefused listens where something else is, or another listens.
func TestUnixSocketRefused(t *testing.T) {
	dir := t.TempDir()
	taken := filepath.Join(dir, "s")
	l, err := net.Listen("unix", taken)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	pipe := filepath.Join(dir, "pipe")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{taken: "choose another path", file: "no socket", pipe: "no socket", dir: "is a folder", filepath.Join(dir, "no", "s"): "mkdir -p"} {
		_, err := (&links{}).listen(t.Context(), "laddr", "unix://"+path)
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "--laddr") || strings.Contains(err.Error(), "port") {
			t.Errorf("%s: error %v, want %q", path, err, want)
		}
	}
}

// TestBothWays holds what is allowed to the direction that a VM goes in, and credentials to addresses that are named later.
func TestBothWays(t *testing.T) {
	ca := testcert.New(t)
	files, _ := ca.Issue(t, nil, "spiffe://example.org/a", "127.0.0.1")
	credentials := []string{"--tls-cert", files.Certificate, "--tls-key", files.PrivateKey, "--tls-ca", files.Authorities}
	for _, tt := range []struct {
		args    []string
		control bool
		want    string // part of the error
	}{
		{append([]string{"--laddr", "tls://127.0.0.1:1"}, credentials...), false, ""},
		{append([]string{"--laddr", "tls://127.0.0.1:1", "--allow-destination", "b.example"}, credentials...), false, ""},
		{append([]string{"--laddr", "tls://127.0.0.1:1", "--allow-source", "b.example"}, credentials...), false, "--allow-source has no effect"},
		{append([]string{"--raddr", "tls://127.0.0.1:1", "--laddr", "127.0.0.1:2", "--allow-source", "b.example"}, credentials...), false, ""},
		{append([]string{"--raddr", "tls://127.0.0.1:1", "--laddr", "127.0.0.1:2", "--allow-destination", "b.example"}, credentials...), false, "--allow-destination has no effect"},
		{append([]string{"--raddr", "tls://127.0.0.1:1", "--allow-destination", "b.example"}, credentials...), true, ""},
		{credentials, false, "--tls-cert has no effect"},
		{credentials, true, ""},
		{credentials[:4], true, "nobody could be trusted"},
		{append([]string{"--allow-destination", "spiffe://x/a*"}, credentials...), true, "spiffe://x/a*"},
	} {
		l := &links{pushes: tt.control}
		flags := pflag.NewFlagSet("", pflag.ContinueOnError)
		l.registerBothWays(flags)
		flags.StringVar(&l.laddr, "laddr", "", "")
		flags.StringVar(&l.raddr, "raddr", "", "")
		if err := flags.Parse(tt.args); err != nil {
			t.Fatal(err)
		}
		err := l.check(t.Context(), flags, strings.NewReader(""), io.Discard)
		if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%q: %v, want %q", tt.args, err, tt.want)
		}
	}
	l := links{sources: []string{"s"}, destinations: []string{"d"}}
	l.Allow = []string{"both"}
	if give, take := l.options(true).Allow, l.options(false).Allow; !slices.Equal(give, []string{"both", "d"}) || !slices.Equal(take, []string{"both", "s"}) {
		t.Errorf("a VM may go to %q and come from %q", give, take)
	}
	if both := l.both().Allow; !slices.Equal(both, []string{"both", "s", "d"}) {
		t.Errorf("connections go between %q", both)
	}
	for _, one := range []links{{sources: []string{"s"}}, {destinations: []string{"d"}}, {}} {
		if both := one.both().Allow; len(both) > 0 {
			t.Errorf("with %+v connections go between %q only, and a VM goes to or comes from anybody", one, both)
		}
	}
	// A way that an operator names is one to give the VM.
	if to, err := l.to("unix:///tmp/x"); err != nil || !to.giving {
		t.Errorf("an operator's way gives: %t (%v)", to.giving, err)
	}
}
