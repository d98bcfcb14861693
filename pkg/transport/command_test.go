package transport_test

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/drafter-vm/drafter/pkg/transport"
)

// lives reports whether a process has not ended. One that nobody has reaped has.
func lives(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	_, fields, _ := bytes.Cut(b, []byte(") "))
	return !bytes.HasPrefix(fields, []byte("Z"))
}

// TestCommandEnds closes the connection to programs that end at once, later, when they are asked to, or not at all; what they have
// started ends with them.
func TestCommandEnds(t *testing.T) {
	for _, tt := range []struct {
		name, command string
		least, most   time.Duration // that Close takes
	}{
		{"at once", "echo $$; exec cat", 0, 900 * time.Millisecond},
		{"ended before", "echo $$", 0, 900 * time.Millisecond},
		{"soon", "echo $$; cat; sleep .3; exit 0", 200 * time.Millisecond, 900 * time.Millisecond},
		{"not by itself", "echo $$; exec sleep 1000", time.Second, 1900 * time.Millisecond},
		{"with what it has started", "sleep 1000 & echo $!; echo $$; wait", time.Second, 1900 * time.Millisecond},
		{"not when asked", "trap '' TERM; sleep 1000 & echo $!; echo $$; while :; do sleep .1; done", 11 * time.Second, 30 * time.Second},
		{"before what it has started", "sleep 1000 & echo $!; echo $$", 0, 900 * time.Millisecond},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			conn, err := transport.Dial(t.Context(), "exec:"+tt.command)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			var pids []int
			for s := bufio.NewScanner(conn); len(pids) < strings.Count(tt.command, "echo") && s.Scan(); {
				pid, err := strconv.Atoi(s.Text())
				if err != nil {
					t.Fatal(err)
				}
				pids = append(pids, pid)
			}
			begin := time.Now()
			if err := conn.Close(); err != nil {
				t.Error(err)
			}
			if took := time.Since(begin); took < tt.least || took > tt.most {
				t.Errorf("Close took %v, want %v to %v", took, tt.least, tt.most)
			}
			if last := pids[len(pids)-1]; lives(last) {
				t.Error("the program lives when Close has returned")
			}
			for end := time.Now().Add(time.Second); len(pids) > 0; {
				if !lives(pids[0]) {
					pids = pids[1:]
				} else if time.Now().After(end) {
					t.Fatalf("process %d lives", pids[0])
				}
			}
			if err := conn.Close(); err != nil {
				t.Errorf("a second time: %v", err)
			}
		})
	}
}

// late is a context that ends when it was asked whether it has.
type late struct {
	context.Context
	asked int
}

func (l *late) Err() error {
	if l.asked++; l.asked > 1 {
		return context.Canceled
	}
	return nil
}

// TestCommandCancelled has a dial cancelled when the program was started already: it ends before Dial does.
func TestCommandCancelled(t *testing.T) {
	file := filepath.Join(t.TempDir(), "pid")
	if conn, err := transport.Dial(&late{Context: t.Context()}, "exec:trap '' TERM; echo $$ >"+file+"; while :; do sleep .1; done"); err == nil {
		conn.Close()
		t.Fatal("it was not cancelled")
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		t.Fatal(err)
	}
	if lives(pid) {
		t.Error("the program lives")
	}
}

// TestCommandSays has programs end in their ways: errors name them, and how they have ended.
func TestCommandSays(t *testing.T) {
	for _, tt := range []struct {
		command string
		write   bool
		want    string // empty: the end is as expected
	}{
		{"exit 0", true, `program "exit 0" ended (exit status 0)`},
		{"exit 0", false, `program "exit 0" ended (exit status 0)`},
		{"sleep .1; exit 7", true, "ended (exit status 7)"},
		{"kill -KILL $$", true, "ended (signal: killed)"},
		{"echo it is late >&2; exit 3", false, "ended (exit status 3): it is late"},
		{"echo hello", false, ""},
		{"echo hello; exit 1", false, "ended (exit status 1)"},
	} {
		t.Run(tt.command, func(t *testing.T) {
			conn, err := transport.Dial(t.Context(), "exec:"+tt.command)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if whom := conn.RemoteAddr().String(); !strings.Contains(whom, tt.command) {
				t.Errorf("the other side is %q", whom)
			}
			if tt.write {
				conn.Write([]byte("hello")) // it may be gone already, or go without having read it
			}
			_, err = io.ReadAll(conn)
			if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "@")) {
				t.Errorf("error %v, want %q", err, tt.want)
			}
			if !tt.write {
				return
			}
			for err = nil; err == nil; { // until it is known that nobody reads
				_, err = conn.Write([]byte("hello"))
			}
			if !strings.Contains(err.Error(), tt.want) {
				t.Errorf("write: error %v, want %q", err, tt.want)
			}
		})
	}
}
