package agentcmd

import (
	"bytes"
	"context"
	"errors"
	"net"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

func TestMain(m *testing.M) {
	dialHost = func(ctx context.Context, port uint32) (net.Conn, error) {
		return nil, syscall.ECONNREFUSED
	}
	m.Run()
}

func TestCommandLine(t *testing.T) {
	for _, c := range []struct {
		line   string
		status int
		want   string // in what is printed on stderr
	}{
		{"drafter-agent bogus", 2, `unexpected argument "bogus"`},
		{"drafter-agent agent bogus", 2, `unexpected argument "bogus"`},
		{"drafter-agent --bogus", 2, "--bogus"},
		{"drafter-agent --log-level loud", 2, `--log-level "loud": use debug`},
		{"drafter-agent --vsock-port 0", 2, "--vsock-port 0"},
		{"drafter-agent --vsock-port 4294967296", 2, "--vsock-port"},
		{"drafter-agent --vsock-timeout -1s", 2, "--vsock-timeout -1s"},
		{"drafter-agent liveness --vsock-timeout 0s", 2, "--vsock-timeout 0s"},
		{"drafter-liveness --vsock-timeout soon", 2, `"soon"`},
		{"drafter-liveness extra", 2, `unexpected argument "extra"`},
		{"drafter-agent vsock --mode 9", 2, `--mode "9": use octal`},
	} {
		t.Run(c.line, func(t *testing.T) {
			var stdout, stderr bytes.Buffer
			err := Run(t.Context(), strings.Fields(c.line), nil, &stdout, &stderr)
			if got := ExitStatus(err); got != c.status {
				t.Errorf("exit status: got %d (%v), want %d", got, err, c.status)
			}
			if !strings.Contains(stderr.String(), c.want) {
				t.Errorf("stderr: got %q, want %q in it", stderr.String(), c.want)
			}
			if stdout.Len() > 0 {
				t.Errorf("stdout: got %q, want nothing", stdout.String())
			}
		})
	}
}

// TestDefaults pins what the flags have been since the first version.
func TestDefaults(t *testing.T) {
	root := New()
	for _, c := range []struct{ command, flag, want string }{
		{"", "vsock-port", "26"},
		{"", "vsock-timeout", "1m0s"},
		{"", "shell-cmd", "sh"},
		{"", "before-suspend-cmd", ""},
		{"", "after-resume-cmd", ""},
		{"agent", "vsock-port", "26"},
		{"liveness", "vsock-port", "25"},
		{"liveness", "vsock-timeout", "1m0s"},
	} {
		cmd, _, err := root.Find(strings.Fields(c.command))
		if err != nil {
			t.Fatal(err)
		}
		if f := cmd.Flags().Lookup(c.flag); f == nil || f.DefValue != c.want || f.Value.String() != c.want {
			t.Errorf("%q --%s: got %+v, want default %q", c.command, c.flag, f, c.want)
		}
	}
}

// TestAgentEndsBySignal also sees that the service manager is told.
func TestAgentEndsBySignal(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify")
	ln, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	t.Setenv("NOTIFY_SOCKET", path)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- Run(ctx, []string{"drafter-agent", "--log-level", "error"}, nil, new(bytes.Buffer), new(bytes.Buffer))
	}()
	buf := make([]byte, 32)
	n, err := ln.Read(buf)
	if err != nil || string(buf[:n]) != "READY=1" {
		t.Errorf("notification: got %q, %v, want READY=1", buf[:n], err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Errorf("agent ended by a signal: got %v, want nil", err)
	}
}

func TestLivenessInterrupted(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	err := Run(ctx, []string{"drafter-liveness"}, nil, new(bytes.Buffer), new(bytes.Buffer))
	if !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want context.Canceled", err)
	}
}
