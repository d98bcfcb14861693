package socket

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/iotest"
)

func TestReadRequest(t *testing.T) {
	for _, c := range []struct {
		in   string
		port uint32
		err  string // in the error; empty: none
	}{
		{"CONNECT 1\n", 1, ""},
		{"CONNECT 0\n", 0, ""},
		{"CONNECT 4294967295\n", 4294967295, ""},
		{"Connect 52\n", 52, ""},
		{"  connect \t 52 \r\n", 52, ""},
		{"CONNECT 4294967296\n", 0, `port "4294967296"`},
		{"CONNECT -1\n", 0, `port "-1"`},
		{"CONNECT +1\n", 0, `port "+1"`},
		{"CONNECT 0x10\n", 0, `port "0x10"`},
		{"CONNECT\n", 0, "unexpected line"},
		{"CONNECT 1 2\n", 0, "unexpected line"},
		{"CONNECTION 1\n", 0, "unexpected line"},
		{"OK 1\n", 0, "unexpected line"},
		{"\n", 0, "unexpected line"},
		{"CONNECT 1", 0, "unexpected EOF"},
		{"", 0, "EOF"},
		{strings.Repeat(" ", MaxLine-10) + "CONNECT 1\n", 1, ""},
		{strings.Repeat(" ", MaxLine-9) + "CONNECT 1\n", 0, "longer than 32 bytes"},
	} {
		t.Run(c.in, func(t *testing.T) {
			for _, r := range []io.Reader{strings.NewReader(c.in), iotest.DataErrReader(strings.NewReader(c.in))} {
				port, err := ReadRequest(r)
				if (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) || port != c.port {
					t.Errorf("got %d, %v, want %d, %q", port, err, c.port, c.err)
				}
			}
		})
	}
}

// TestReadNoMore leaves what follows the line.
func TestReadNoMore(t *testing.T) {
	r := strings.NewReader("OK 1073741824\nOK 2\n")
	if n, err := ReadReply(r); n != 1<<30 || err != nil {
		t.Errorf("got %d, %v", n, err)
	}
	if rest, _ := io.ReadAll(r); string(rest) != "OK 2\n" {
		t.Errorf("left: %q", rest)
	}
}

func FuzzReadRequest(f *testing.F) {
	for _, s := range []string{"CONNECT 52\nx", "connect  1 \n", "CONNECT 99999999999\n", "\n"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		r := bytes.NewReader(in)
		port, err := ReadRequest(r)
		if read := len(in) - r.Len(); read > MaxLine {
			t.Fatalf("read %d bytes", read)
		}
		if err != nil {
			return
		}
		var out bytes.Buffer
		WriteRequest(&out, port)
		if again, err := ReadRequest(&out); err != nil || again != port {
			t.Fatalf("port %d became %d, %v", port, again, err)
		}
	})
}

func TestConnect(t *testing.T) {
	answer := func(f func(conn *net.UnixConn)) string {
		dir := t.TempDir()
		ln, err := ListenUnix(HostPath(dir), 0o600)
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			conn, err := ln.AcceptUnix()
			if err == nil {
				f(conn)
				conn.Close()
			}
		}()
		t.Cleanup(func() { ln.Close(); <-done })
		return dir
	}
	t.Run("granted", func(t *testing.T) {
		dir := answer(func(conn *net.UnixConn) {
			ReadRequest(conn)
			io.WriteString(conn, "OK 7\nhello")
		})
		conn, err := DialGuest(t.Context(), dir, 1)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if got, _ := io.ReadAll(conn); string(got) != "hello" {
			t.Errorf("got %q", got)
		}
	})
	t.Run("refused", func(t *testing.T) {
		dir := answer(func(conn *net.UnixConn) { ReadRequest(conn) })
		if _, err := DialGuest(t.Context(), dir, 1); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("got %v, want ECONNREFUSED", err)
		}
	})
	t.Run("foreign", func(t *testing.T) {
		dir := answer(func(conn *net.UnixConn) {
			ReadRequest(conn)
			io.WriteString(conn, "HTTP/1.1 400 Bad Request\n")
		})
		if _, err := DialGuest(t.Context(), dir, 1); err == nil || !strings.Contains(err.Error(), "unexpected line") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("no answer", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		dir := answer(func(conn *net.UnixConn) {
			ReadRequest(conn)
			cancel()
			io.Copy(io.Discard, conn)
		})
		if _, err := DialGuest(ctx, dir, 1); !errors.Is(err, context.Canceled) {
			t.Errorf("got %v, want context.Canceled", err)
		}
	})
	t.Run("nobody", func(t *testing.T) {
		if _, err := DialGuest(t.Context(), t.TempDir(), 1); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("got %v, want not exist", err)
		}
	})
}

func TestListenUnix(t *testing.T) {
	dir := t.TempDir()
	t.Run("stale", func(t *testing.T) {
		path := filepath.Join(dir, "stale")
		ln, err := ListenUnix(path, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		ln.SetUnlinkOnClose(false) // as a process that was killed
		ln.Close()
		ln, err = ListenUnix(path, 0o640)
		if err != nil {
			t.Fatalf("listen where a dead process did: %v", err)
		}
		if info, _ := os.Stat(path); info.Mode().Perm() != 0o640 {
			t.Errorf("mode: got %v, want 0640", info.Mode())
		}
		if _, err := ListenUnix(path, 0o600); !errors.Is(err, syscall.EADDRINUSE) {
			t.Errorf("listen where a living one does: got %v, want EADDRINUSE", err)
		}
		ln.Close()
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("socket after Close: %v, want none", err)
		}
	})
	t.Run("not a socket", func(t *testing.T) {
		path := filepath.Join(dir, "file")
		if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := ListenUnix(path, 0o600); err == nil || !strings.Contains(err.Error(), "not a socket") {
			t.Errorf("got %v", err)
		}
		if b, _ := os.ReadFile(path); string(b) != "precious" {
			t.Error("the file is gone")
		}
	})
	t.Run("long path", func(t *testing.T) {
		_, err := ListenHost("/tmp/"+strings.Repeat("x", 90), 26)
		if err == nil || !strings.Contains(err.Error(), "use a folder with a shorter path") {
			t.Errorf("got %v, want a remedy", err)
		}
	})
}
