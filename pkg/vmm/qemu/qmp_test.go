package qemu

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// fakeQMP serves the other end of a QMP connection: script gets each command and what was sent with it, and returns
// lines to answer with, in which ID stands for the command's id.
func fakeQMP(t *testing.T, script func(command string, fds int) []string) *net.UnixConn {
	t.Helper()
	ours, theirs, err := socketPair()
	if err != nil {
		t.Fatal(err)
	}
	conn, err := net.FileConn(theirs)
	theirs.Close()
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	t.Cleanup(func() {
		ours.Close()
		<-done
	})
	go func() {
		defer close(done)
		defer conn.Close()
		fmt.Fprintf(conn, `{"QMP": {"version": {}, "capabilities": ["oob"]}}`+"\r\n")
		buf, oob := make([]byte, 64<<10), make([]byte, 1<<10)
		for {
			n, oobn, _, _, err := conn.(*net.UnixConn).ReadMsgUnix(buf, oob)
			if err != nil || n == 0 {
				return
			}
			fds := 0
			if messages, err := unix.ParseSocketControlMessage(oob[:oobn]); err == nil {
				for _, m := range messages {
					got, _ := unix.ParseUnixRights(&m)
					fds += len(got)
					for _, fd := range got {
						unix.Close(fd)
					}
				}
			}
			for line := range strings.Lines(string(buf[:n])) {
				var request struct {
					Execute string
					ID      uint64
				}
				if json.Unmarshal([]byte(line), &request) != nil {
					return
				}
				answers := []string{`{"return": {}, "id": ID}`}
				if request.Execute != "qmp_capabilities" {
					answers = script(request.Execute, fds)
				}
				for _, a := range answers {
					fmt.Fprintf(conn, "%s\r\n", strings.ReplaceAll(a, "ID", fmt.Sprint(request.ID)))
				}
				if answers == nil {
					return
				}
			}
		}
	}()
	return ours
}

func TestClient(t *testing.T) {
	events := make(chan string, 10)
	conn := fakeQMP(t, func(command string, fds int) []string {
		switch command {
		case "good":
			return []string{`{"event": "STOP", "timestamp": {}}`, `{"return": {"status": "running"}, "id": ID}`}
		case "bad":
			return []string{`{"error": {"class": "GenericError", "desc": "no medium"}, "id": ID}`}
		case "unknown":
			return []string{`{"error": {"class": "CommandNotFound", "desc": "no such command"}, "id": ID}`}
		case "getfd":
			return []string{fmt.Sprintf(`{"return": %d, "id": ID}`, fds)}
		case "silent":
			return []string{`{"return": {}, "id": 4711}`}
		}
		return nil // hang up
	})
	c, err := newClient(t.Context(), conn, func(name string, _ json.RawMessage) { events <- name })
	if err != nil {
		t.Fatal(err)
	}
	defer c.close()

	var status struct{ Status string }
	if err := c.execute(t.Context(), "good", map[string]any{"x": 1}, &status); err != nil || status.Status != "running" {
		t.Errorf("good: %+v, %v", status, err)
	}
	if e := <-events; e != "STOP" {
		t.Errorf("event %q", e)
	}
	var qe *qmpError
	if err := c.execute(t.Context(), "bad", nil, nil); !errors.As(err, &qe) || err.Error() != "QMP bad: no medium" {
		t.Errorf("bad: %v", err)
	}
	if err := c.execute(t.Context(), "unknown", nil, nil); err == nil || err.Error() != "QMP unknown: CommandNotFound: no such command" {
		t.Errorf("unknown: %v", err)
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	var fds int
	if err := c.execute(t.Context(), "getfd", nil, &fds, null, null); err != nil || fds != 2 {
		t.Errorf("getfd: %d descriptors arrived, %v", fds, err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("lost patience"))
	if err := c.execute(ctx, "silent", nil, nil); err == nil || !strings.Contains(err.Error(), "lost patience") {
		t.Errorf("silent: %v", err)
	}
	for range 2 { // the answer never comes, and after that there is no connection
		if err := c.execute(t.Context(), "hang up", nil, nil); err == nil || !strings.Contains(err.Error(), "closed") {
			t.Errorf("hang up: %v", err)
		}
	}
}

func TestClientForeignGreeting(t *testing.T) {
	ours, theirs, err := socketPair()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := theirs.WriteString(`{"return": {}, "id": 1}` + "\n"); err != nil {
		t.Fatal(err)
	}
	defer theirs.Close()
	if _, err := newClient(t.Context(), ours, nil); err == nil || !strings.Contains(err.Error(), "greeting") {
		t.Errorf("error %v", err)
	}
}

func TestReadMessageLimit(t *testing.T) {
	long := `{"return": "` + strings.Repeat("x", maxMessage) + `"}` + "\n"
	if _, err := readMessage(bufio.NewReader(strings.NewReader(long))); err == nil || !strings.Contains(err.Error(), "longer") {
		t.Errorf("error %v", err)
	}
}

func FuzzDecodeMessage(f *testing.F) {
	for _, seed := range []string{
		`{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": ""}, "capabilities": ["oob"]}}`,
		`{"return": {}, "id": 1}`, `{"return": [], "id": 18446744073709551615}`, `{"return": 0}`,
		`{"error": {"class": "GenericError", "desc": "x"}, "id": 3}`,
		`{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-reset"}}`,
		`{}`, `null`, `[]`, `{"event": ""}`, `{"return": null, "id": null}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, line []byte) {
		m, err := decodeMessage(line)
		if err != nil {
			return
		}
		kinds := 0
		for _, is := range []bool{m.Greeting != nil, m.Return != nil, m.Error != nil, m.Event != ""} {
			if is {
				kinds++
			}
		}
		if kinds != 1 {
			t.Errorf("%q is of %d kinds", line, kinds)
		}
	})
}
