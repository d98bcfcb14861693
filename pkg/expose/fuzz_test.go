package expose

import (
	"bufio"
	"bytes"
	"io"
	"log/slog"
	"net"
	"strings"
	"testing"

	"github.com/drafter-vm/drafter/pkg/block"
)

// FuzzNegotiate checks that no client makes the server panic, say more than a multiple of what it heard, or choose an export
// that does not exist.
func FuzzNegotiate(f *testing.F) {
	const flags = "\x00\x00\x00\x03"
	f.Add([]byte(flags + option(8, "") + option(7, "\x00\x00\x00\x04disk\x00\x01\x00\x01")))
	f.Add([]byte(flags + option(3, "") + option(6, "\x00\x00\x00\x03rom\x00\x00") + option(2, "")))
	f.Add([]byte("\x00\x00\x00\x00" + option(1, "rom")))
	f.Add([]byte(flags + option(7, strings.Repeat("x", 5000)) + option(99, "?")))
	exports := []Export{{Name: "disk", Device: block.NewMemory(4096)}, {Name: "rom", Device: block.NewMemory(512), ReadOnly: true}}
	f.Fuzz(func(t *testing.T, client []byte) {
		var out bytes.Buffer
		s, err := negotiate(bufio.NewReader(bytes.NewReader(client)), &out, exports)
		if err == nil && s.export != &exports[0] && s.export != &exports[1] {
			t.Errorf("the session has the export %v", s.export)
		}
		if out.Len() > 1000+20*len(client) {
			t.Errorf("%d bytes are answered with %d", len(client), out.Len())
		}
	})
}

// scripted is a connection that says what it was told, and hears nothing.
type scripted struct {
	net.Conn
	io.Reader
	heard countingWriter
}

type countingWriter int64

func (s *scripted) Read(p []byte) (int, error) { return s.Reader.Read(p) }
func (s *scripted) Write(p []byte) (int, error) {
	s.heard += countingWriter(len(p))
	return len(p), nil
}

// FuzzRequests checks that no sequence of requests makes the server panic, or change a read-only device.
func FuzzRequests(f *testing.F) {
	f.Add([]byte(requestHead(0, 1, "cookie 1", 2, 4)+"data"+requestHead(1, 0, "cookie 2", 0, 512)+requestHead(0, 2, "cookie 3", 0, 0)), false, false)
	f.Add([]byte(requestHead(0, 4, "cookie 4", 0, 4096)+requestHead(3, 6, "cookie 5", 1, 4095)+requestHead(0, 3, "cookie 6", 0, 0)), true, false)
	f.Add([]byte(requestHead(0, 1, "cookie 7", 1<<63, 4)+"data"+requestHead(0, 0, "cookie 8", 0, 1<<31)), true, true)
	f.Add([]byte(requestHead(0, 1, "cookie 9", 0, 1<<31)), false, true)
	s := &Server{log: slog.New(slog.DiscardHandler), ctx: f.Context(), opts: NBDOptions{Workers: 4, MaxInFlight: 2 * MaxRequest}}
	f.Fuzz(func(t *testing.T, client []byte, structured, readOnly bool) {
		d := block.NewMemory(100_000)
		if _, err := d.WriteAt([]byte("precious"), 0); err != nil {
			t.Fatal(err)
		}
		before, _ := block.Digest(t.Context(), d)
		conn := &scripted{Reader: bytes.NewReader(client)}
		c := newNBDConn(s, conn)
		c.session = session{export: &Export{Device: d, ReadOnly: readOnly}, structured: structured}
		c.device, c.size = d, d.Size()
		c.running.Store(1)
		c.workers.Go(c.work)
		c.workers.Wait()
		c.cancel()
		if after, _ := block.Digest(t.Context(), d); readOnly && after != before {
			t.Error("a read-only device was changed")
		}
		if requests := int64(len(client)/nbdRequestSize + 1); int64(conn.heard) > requests*(100_000+maxReplyHead) {
			t.Errorf("%d bytes are answered with %d", len(client), conn.heard)
		}
	})
}
