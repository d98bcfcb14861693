package agentcmd

import (
	"bytes"
	"context"
	"errors"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/drafter-vm/drafter/pkg/oci/supervise"
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
		{"drafter-agent containers bogus", 2, `unexpected argument "bogus"`},
		{"drafter-agent containers list bogus", 2, `unexpected argument "bogus"`},
		{"drafter-agent containers restart", 2, "name of one container"},
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

// fakeContainers stands for the supervisor of a guest.
type fakeContainers struct{ asked []string }

func (f *fakeContainers) List(context.Context) ([]supervise.Container, error) {
	return []supervise.Container{
		{Name: "web", Disk: "vdb", State: "ready", Ready: "port:80", Starts: 2, For: 90 * time.Second, Detail: "exit status 3"},
		{Name: "job", Disk: "vdc", State: "ended", Starts: 1},
	}, nil
}

func (f *fakeContainers) Restart(_ context.Context, name string) error {
	f.asked = append(f.asked, "restart "+name)
	return nil
}

func (f *fakeContainers) SetEnvironment(_ context.Context, environment []string) error {
	f.asked = append(f.asked, environment...)
	return nil
}

func TestContainers(t *testing.T) {
	before := client
	t.Cleanup(func() { client = before })
	f := &fakeContainers{}
	client = f
	var stdout, stderr bytes.Buffer
	if err := Run(t.Context(), []string{"drafter-agent", "containers", "list"}, nil, &stdout, &stderr); err != nil {
		t.Fatal(err)
	}
	want := "NAME  DISK  STATE  FOR    STARTS  READY    ENDED LAST\nweb   vdb   ready  1m30s  2       port:80  exit status 3\njob   vdc   ended  0s     1       started  -\n"
	if stdout.String() != want {
		t.Errorf("the list is\n%s, want\n%s", stdout.String(), want)
	}
	if err := Run(t.Context(), []string{"drafter-agent", "containers", "restart", "web"}, nil, &stdout, &stderr); err != nil || !slices.Equal(f.asked, []string{"restart web"}) {
		t.Errorf("it was asked for %q, %v", f.asked, err)
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
