package expose

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/block/blocktest"
	"github.com/drafter-vm/drafter/pkg/expose/nbdtest"
)

// socketPath is short: the folders of tests with long names exceed what a socket may have.
func socketPath(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "nbd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return filepath.Join(dir, "s")
}

func listen(t testing.TB, opts NBDOptions, exports ...Export) *Server {
	t.Helper()
	return listenAt(t, socketPath(t), opts, exports...)
}

func listenAt(t testing.TB, path string, opts NBDOptions, exports ...Export) *Server {
	t.Helper()
	if opts.Logger == nil {
		opts.Logger = slog.New(slog.DiscardHandler)
	}
	s, err := ListenNBD(path, exports, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return s
}

func dial(t testing.TB, s *Server, name string, opts nbdtest.Options) *nbdtest.Client {
	t.Helper()
	c, err := nbdtest.Dial(s.Path(), name, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// TestDevice runs the suite of block devices through the protocol.
func TestDevice(t *testing.T) {
	for _, opts := range []nbdtest.Options{{}, {Structured: true}, {ExportName: true}} {
		t.Run(fmt.Sprintf("%+v", opts), func(t *testing.T) {
			blocktest.Run(t, func(t *testing.T) block.Device {
				return dial(t, listen(t, NBDOptions{}, Export{Name: "disk", Device: block.NewMemory(1<<20 + 12345)}), "disk", opts)
			})
		})
	}
}

// request encodes an option of a client.
func option(kind uint32, data string) string {
	be := binary.BigEndian
	b := be.AppendUint64(nil, 0x49484156454f5054)
	b = be.AppendUint32(b, kind)
	b = be.AppendUint32(b, uint32(len(data)))
	return string(b) + data
}

// TestNegotiation compares what is said byte by byte. The bytes were written by hand from the specification.
func TestNegotiation(t *testing.T) {
	exports := []Export{
		{Name: "disk", Device: block.NewMemory(0x12345678)},
		{Name: "rom", Device: block.NewMemory(0x1000), ReadOnly: true},
	}
	const (
		hello   = "NBDMAGIC" + "IHAVEOPT" + "\x00\x03"
		flags   = "\x00\x00\x00\x03"
		reply   = "\x00\x03\xe8\x89\x04\x55\x65\xa9"
		ack     = "\x00\x00\x00\x01"
		none    = "\x00\x00\x00\x00"
		info    = "\x00\x00\x00\x03"
		sizes   = "\x00\x00\x00\x0e" + "\x00\x03" + "\x00\x00\x00\x01" + "\x00\x00\x10\x00" + "\x02\x00\x00\x00"
		goDisk  = "\x00\x00\x00\x04disk\x00\x00"
		optGo   = "\x00\x00\x00\x07"
		optInfo = "\x00\x00\x00\x06"
		optList = "\x00\x00\x00\x03"
		server  = "\x00\x00\x00\x02"
	)
	diskInfo := func(opt, trans string) string {
		return reply + opt + info + "\x00\x00\x00\x0c" + "\x00\x00" + "\x00\x00\x00\x00\x12\x34\x56\x78" + trans + reply + opt + info + sizes + reply + opt + ack + none
	}
	for _, test := range []struct {
		name, client, server string
		export               string // chosen
		structured           bool
		err                  string // contained; "left" for errHandshakeOver
	}{
		{
			name: "go", client: flags + option(7, goDisk), export: "disk",
			server: hello + diskInfo(optGo, "\x01\x6d"),
		},
		{
			name: "structured", client: flags + option(8, "") + option(7, goDisk), export: "disk", structured: true,
			server: hello + reply + "\x00\x00\x00\x08" + ack + none + diskInfo(optGo, "\x01\xed"),
		},
		{
			name: "export name", client: flags + option(1, "rom"), export: "rom",
			server: hello + "\x00\x00\x00\x00\x00\x00\x10\x00" + "\x01\x0f",
		},
		{
			name: "export name, oldest client", client: none + option(1, "disk"), export: "disk",
			server: hello + "\x00\x00\x00\x00\x12\x34\x56\x78" + "\x01\x6d" + strings.Repeat("\x00", 124),
		},
		{
			name: "unknown export name", client: flags + option(1, "nothing"), err: "nothing",
			server: hello,
		},
		{
			name: "list, info, abort", client: flags + option(3, "") + option(6, goDisk) + option(2, ""), err: "left",
			server: hello +
				reply + optList + server + "\x00\x00\x00\x08" + "\x00\x00\x00\x04disk" +
				reply + optList + server + "\x00\x00\x00\x07" + "\x00\x00\x00\x03rom" +
				reply + optList + ack + none + diskInfo(optInfo, "\x01\x6d") +
				reply + "\x00\x00\x00\x02" + ack + none,
		},
		{
			name: "name is asked for", client: flags + option(7, "\x00\x00\x00\x03rom\x00\x02\x00\x03\x00\x01"), export: "rom",
			server: hello +
				reply + optGo + info + "\x00\x00\x00\x0c" + "\x00\x00" + "\x00\x00\x00\x00\x00\x00\x10\x00" + "\x01\x0f" +
				reply + optGo + info + "\x00\x00\x00\x05" + "\x00\x01rom" +
				reply + optGo + info + sizes + reply + optGo + ack + none,
		},
		{
			name: "unknown export, unknown option, malformed, then gone", err: "left",
			client: flags + option(7, "\x00\x00\x00\x01x\x00\x00") + option(5, "") + option(7, "\xff\xff\xff\xff") + option(3, "data") + option(7, "\x00\x00\x00\x00\x00\x01"),
			server: hello +
				reply + optGo + "\x80\x00\x00\x06" + "\x00\x00\x00\x0d" + `no export "x"` +
				reply + "\x00\x00\x00\x05" + "\x80\x00\x00\x01" + none +
				reply + optGo + "\x80\x00\x00\x03" + "\x00\x00\x00\x11" + "malformed request" +
				reply + optList + "\x80\x00\x00\x03" + "\x00\x00\x00\x17" + "this option has no data" +
				reply + optGo + "\x80\x00\x00\x03" + "\x00\x00\x00\x11" + "malformed request",
		},
		{
			name: "too much data", client: flags + option(7, strings.Repeat("x", 60_000)) + option(2, ""), err: "left",
			server: hello + reply + optGo + "\x80\x00\x00\x09" + "\x00\x00\x00\x0d" + "too much data" + reply + "\x00\x00\x00\x02" + ack + none,
		},
		{name: "far too much data", client: flags + "IHAVEOPT\x00\x00\x00\x07\xff\xff\xff\xff", server: hello, err: "option 7 has 4294967295 bytes"},
		{name: "unknown client flags", client: "\x00\x00\x00\x04", server: hello, err: "unknown flags"},
		{name: "HTTP", client: "GET / HTTP/1.1\r\nHost: example.org\r\n", server: hello, err: "does not speak the NBD protocol"},
		{name: "not an option", client: flags + "GET / HTTP/1.1\r\n\r\n", server: hello, err: "does not speak the NBD protocol"},
		{name: "nobody", server: hello, err: "left"},
		{name: "half an option", client: flags + option(1, "rom")[:17], server: hello, err: "left"},
	} {
		t.Run(test.name, func(t *testing.T) {
			var out bytes.Buffer
			s, err := negotiate(bufio.NewReader(strings.NewReader(test.client)), &out, exports)
			if out.String() != test.server {
				t.Errorf("the server says\n%q, want\n%q", out.String(), test.server)
			}
			switch {
			case test.err == "left":
				if !errors.Is(err, errHandshakeOver) {
					t.Errorf("error is %v, want that the client left", err)
				}
			case test.err != "":
				if err == nil || !strings.Contains(err.Error(), test.err) {
					t.Errorf("error is %v, want one with %q", err, test.err)
				}
			case err != nil:
				t.Errorf("error is %v", err)
			case s.export.Name != test.export || s.structured != test.structured:
				t.Errorf("the session is %q, structured %v", s.export.Name, s.structured)
			}
		})
	}
	t.Run("only export", func(t *testing.T) {
		s, err := negotiate(bufio.NewReader(strings.NewReader(flags+option(7, "\x00\x00\x00\x00\x00\x00"))), io.Discard, exports[:1])
		if err != nil || s.export.Name != "disk" {
			t.Errorf("the empty name gives %+v, %v", s, err)
		}
	})
	t.Run("endless options", func(t *testing.T) {
		_, err := negotiate(bufio.NewReader(strings.NewReader(flags+strings.Repeat(option(3, ""), 1000))), io.Discard, exports)
		if err == nil || !strings.Contains(err.Error(), "chose no export") {
			t.Errorf("error is %v", err)
		}
	})
}

// rawConn connects and negotiates by hand, and returns the connection in transmission.
func rawConn(t *testing.T, s *Server, options string) net.Conn {
	t.Helper()
	conn, err := net.Dial("unix", s.Path())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	if _, err := io.WriteString(conn, "\x00\x00\x00\x03"+options+option(1, "")); err != nil {
		t.Fatal(err)
	}
	skip := 18 + 10
	if options != "" {
		skip += 20
	}
	if _, err := io.ReadFull(conn, make([]byte, skip)); err != nil {
		t.Fatal(err)
	}
	return conn
}

func requestHead(flags, command uint16, cookie string, off uint64, length uint32) string {
	be := binary.BigEndian
	b := be.AppendUint32(nil, 0x25609513)
	b = be.AppendUint16(b, flags)
	b = be.AppendUint16(b, command)
	b = append(b, cookie...)
	b = be.AppendUint64(b, off)
	return string(be.AppendUint32(b, length))
}

// TestTransmission compares replies byte by byte.
func TestTransmission(t *testing.T) {
	const (
		simple = "\x67\x44\x66\x98"
		chunk  = "\x66\x8e\x33\xef"
		ok     = "\x00\x00\x00\x00"
	)
	for _, test := range []struct {
		name, options, client, server string
	}{
		{name: "simple", client: requestHead(0, 1, "cookie 1", 2, 4) + "data", server: simple + ok + "cookie 1"},
		{name: "simple read", client: requestHead(0, 0, "cookie 2", 0, 8), server: simple + ok + "cookie 2" + "\x00\x00data\x00\x00"},
		{name: "simple error", client: requestHead(0, 0, "cookie 3", 1<<40, 8), server: simple + "\x00\x00\x00\x16" + "cookie 3"},
		{
			name: "structured read", options: option(8, ""), client: requestHead(4, 0, "cookie 4", 2, 4),
			server: chunk + "\x00\x01\x00\x01" + "cookie 4" + "\x00\x00\x00\x0c" + "\x00\x00\x00\x00\x00\x00\x00\x02" + "data",
		},
		{
			name: "structured flush", options: option(8, ""), client: requestHead(0, 3, "cookie 5", 0, 0),
			server: chunk + "\x00\x01\x00\x00" + "cookie 5" + ok,
		},
		{
			name: "structured error", options: option(8, ""), client: requestHead(0, 0, "cookie 6", 1<<40, 4),
			server: chunk + "\x00\x01\x80\x01" + "cookie 6" + "\x00\x00\x00\x06" + "\x00\x00\x00\x16" + "\x00\x00",
		},
		{
			name: "structured read of nothing", options: option(8, ""), client: requestHead(0, 0, "cookie 7", 0, 0),
			server: chunk + "\x00\x01\x00\x00" + "cookie 7" + ok,
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			d := block.NewMemory(4096)
			if _, err := d.WriteAt([]byte("data"), 2); err != nil {
				t.Fatal(err)
			}
			conn := rawConn(t, listen(t, NBDOptions{}, Export{Name: "disk", Device: d}), test.options)
			if _, err := io.WriteString(conn, test.client+requestHead(0, 2, "disconct", 0, 0)); err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(conn)
			if err != nil || string(got) != test.server {
				t.Errorf("the server answers\n%q, %v, want\n%q", got, err, test.server)
			}
		})
	}
}

// faulty is a device whose calls fail, or do what hooks do.
type faulty struct {
	block.Device
	err   error
	flush func() error
	read  func()
}

func (f *faulty) ReadAt(p []byte, off int64) (int, error) {
	if f.read != nil {
		f.read()
	}
	if f.err != nil {
		return 0, f.err
	}
	return f.Device.ReadAt(p, off)
}

func (f *faulty) WriteAt(p []byte, off int64) (int, error) {
	if f.err != nil {
		return 0, f.err
	}
	return f.Device.WriteAt(p, off)
}

func (f *faulty) Flush() error {
	if f.flush != nil {
		return f.flush()
	}
	return f.err
}

func TestErrors(t *testing.T) {
	const size = 1 << 20
	for _, structured := range []bool{false, true} {
		t.Run(fmt.Sprintf("Refused/structured=%v", structured), func(t *testing.T) {
			s := listen(t, NBDOptions{}, Export{Name: "disk", Device: block.NewMemory(size)}, Export{Name: "rom", Device: block.NewMemory(size), ReadOnly: true})
			for _, test := range []struct {
				name           string
				export         string
				flags, command uint16
				off            int64
				length         uint32
				want           error
			}{
				{"read beyond the end", "disk", 0, 0, size - 1, 2, syscall.EINVAL},
				{"read at -1", "disk", 0, 0, -1, 1, syscall.EINVAL},
				{"read too much", "disk", 0, 0, 0, MaxRequest + 1, syscall.EINVAL},
				{"read the most", "disk", 0, 0, 0, 1<<32 - 1, syscall.EINVAL},
				{"write beyond the end", "disk", 0, 1, size - 1, 2, syscall.ENOSPC},
				{"write at 2^63", "disk", 0, 1, -1 << 63, 2, syscall.ENOSPC},
				{"trim beyond the end", "disk", 0, 4, size, 1, syscall.EINVAL},
				{"trim the most", "disk", 0, 4, 0, 1<<32 - 1, syscall.EINVAL},
				{"zero beyond the end", "disk", 0, 6, size, 1, syscall.ENOSPC},
				{"unknown command", "disk", 0, 99, 0, 0, syscall.EINVAL},
				{"block status", "disk", 0, 7, 0, 1, syscall.EINVAL},
				{"unknown flag", "disk", 1 << 9, 0, 0, 1, syscall.EINVAL},
				{"fast zero", "disk", 1 << 4, 6, 0, 1, syscall.EINVAL},
				{"write to a ROM", "rom", 0, 1, 0, 2, syscall.EPERM},
				{"trim of a ROM", "rom", 0, 4, 0, 2, syscall.EPERM},
				{"zeroes to a ROM", "rom", 0, 6, 0, 2, syscall.EPERM},
				{"flush", "disk", 0, 3, 0, 0, nil},
				{"flush with reserved fields", "rom", 1, 3, 7, 7, nil},
				{"trim all", "disk", 1, 4, 0, size, nil},
				{"zero all, no holes", "disk", 3, 6, 0, size, nil},
				{"nothing at the end", "disk", 0, 0, size, 0, nil},
				{"write nothing", "disk", 0, 1, 0, 0, nil},
			} {
				t.Run(test.name, func(t *testing.T) {
					c := dial(t, s, test.export, nbdtest.Options{Structured: structured})
					var data []byte
					if test.command == 1 {
						data = make([]byte, test.length)
					}
					if err := c.Request(test.flags, test.command, test.off, test.length, data, nil); !errors.Is(err, test.want) {
						t.Errorf("the answer is %v, want %v", err, test.want)
					}
					if err := c.Request(0, 3, 0, 0, nil, nil); err != nil {
						t.Errorf("the connection is of no use afterwards: %v", err)
					}
				})
			}
		})
	}
	for _, test := range []struct{ err, want error }{
		{syscall.EIO, syscall.EIO}, {syscall.ENOSPC, syscall.ENOSPC}, {syscall.EDQUOT, syscall.ENOSPC}, {syscall.EROFS, syscall.EPERM},
		{os.ErrClosed, syscall.ESHUTDOWN}, {errors.New("unheard of"), syscall.EIO}, {io.ErrUnexpectedEOF, syscall.EIO},
	} {
		t.Run(fmt.Sprintf("Device/%v", test.err), func(t *testing.T) {
			s := listen(t, NBDOptions{}, Export{Name: "disk", Device: &faulty{Device: block.NewMemory(4096), err: fmt.Errorf("frobnicate: %w", test.err)}})
			c := dial(t, s, "disk", nbdtest.Options{Structured: true})
			for command := range uint16(4) {
				if command == 2 {
					continue
				}
				data := make([]byte, 16)
				write, read := data, []byte(nil)
				if command != 1 {
					write = nil
				}
				err := c.Request(0, command, 0, 16, write, read)
				if !errors.Is(err, test.want) || !strings.Contains(err.Error(), "frobnicate") {
					t.Errorf("command %d is answered with %v, want %v and its reason", command, err, test.want)
				}
			}
		})
	}
}

// TestForceUnitAccess checks that FUA flushes before the reply.
func TestForceUnitAccess(t *testing.T) {
	var flushes atomic.Int32
	d := &faulty{Device: block.NewMemory(1 << 20), flush: func() error { flushes.Add(1); return nil }}
	c := dial(t, listen(t, NBDOptions{}, Export{Device: d}), "", nbdtest.Options{})
	for _, test := range []struct {
		command uint16
		data    []byte
	}{{1, make([]byte, 512)}, {4, nil}, {6, nil}} {
		for fua := range uint16(2) {
			before := flushes.Load()
			if err := c.Request(fua, test.command, 0, 512, test.data, nil); err != nil {
				t.Fatal(err)
			}
			if n := flushes.Load() - before; n != int32(fua) {
				t.Errorf("command %d with flags %d flushed %d times", test.command, fua, n)
			}
		}
	}
}

// TestSlowRequests checks that requests the device keeps waiting do not keep others of the connection waiting.
func TestSlowRequests(t *testing.T) {
	const slow = 32
	release := make(chan struct{})
	var arrived sync.WaitGroup
	arrived.Add(slow)
	d := &faulty{Device: block.NewMemory(1 << 20), read: func() { arrived.Done(); <-release }}
	c := dial(t, listen(t, NBDOptions{}, Export{Device: d}), "", nbdtest.Options{})
	var wg sync.WaitGroup
	for range slow {
		wg.Go(func() {
			if _, err := c.ReadAt(make([]byte, 4096), 0); err != nil {
				t.Error(err)
			}
		})
	}
	arrived.Wait() // all of them are in the device at the same time
	if _, err := c.WriteAt(make([]byte, 4096), 0); err != nil {
		t.Error(err)
	}
	if err := c.Flush(); err != nil {
		t.Error(err)
	}
	close(release)
	wg.Wait()
}

// TestBounds lets a client send more than may be in flight without taking a reply: the server stops reading, rather
// than taking memory, and goes on when replies are taken.
func TestBounds(t *testing.T) {
	const n, size = 300, 1 << 20 // 300 MiB of replies
	s := listen(t, NBDOptions{Workers: 4}, Export{Device: block.NewMemory(size)})
	conn := rawConn(t, s, "")
	var sent sync.WaitGroup
	sent.Go(func() {
		for range n {
			if _, err := io.WriteString(conn, requestHead(0, 0, "a cookie", 0, size)); err != nil {
				t.Error(err)
				return
			}
		}
	})
	if _, err := io.CopyN(io.Discard, conn, n*(size+16)); err != nil {
		t.Error(err)
	}
	sent.Wait()
}

// TestCloseAnswers checks that Close waits for requests in flight, answers them, and then disconnects.
func TestCloseAnswers(t *testing.T) {
	inDevice, release := make(chan struct{}), make(chan struct{})
	d := &faulty{Device: block.NewMemory(1 << 20), read: func() { close(inDevice); <-release }}
	s := listen(t, NBDOptions{}, Export{Device: d})
	c := dial(t, s, "", nbdtest.Options{})
	idle := dial(t, s, "", nbdtest.Options{})
	reply := make(chan error, 1)
	go func() {
		_, err := c.ReadAt(make([]byte, 4096), 0)
		reply <- err
	}()
	<-inDevice
	closed := make(chan error, 1)
	go func() { closed <- s.Close() }()
	if err := idle.Flush(); err == nil { // fails when Close has come to it, or works before
		for idle.Flush() == nil {
		}
	}
	select {
	case <-closed:
		t.Fatal("Close returned while a request was in the device")
	case err := <-reply:
		t.Fatalf("there is a reply (%v) while the request is in the device", err)
	default:
	}
	close(release)
	if err := <-reply; err != nil {
		t.Errorf("the request in flight is answered with %v", err)
	}
	if err := <-closed; err != nil {
		t.Errorf("Close: %v", err)
	}
	if _, err := os.Lstat(s.Path()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is still there: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
}

func TestListen(t *testing.T) {
	d := block.NewMemory(4096)
	export := Export{Name: "disk", Device: d}
	fails := func(t *testing.T, path, want string, exports ...Export) {
		t.Helper()
		s, err := ListenNBD(path, exports, NBDOptions{})
		if err == nil {
			_ = s.Close()
		}
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error is %v, want one with %q", err, want)
		}
	}
	t.Run("stale", func(t *testing.T) {
		path := socketPath(t)
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		l.SetUnlinkOnClose(false)
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		s := listenAt(t, path, NBDOptions{}, export)
		if err := dial(t, s, "disk", nbdtest.Options{}).Flush(); err != nil {
			t.Error(err)
		}
		info, err := os.Lstat(path)
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("the socket has mode %v, %v", info.Mode(), err)
		}
	})
	t.Run("served", func(t *testing.T) {
		s := listen(t, NBDOptions{}, export)
		fails(t, s.Path(), "is served by another process", export)
		if err := dial(t, s, "disk", nbdtest.Options{}).Flush(); err != nil {
			t.Error(err)
		}
	})
	t.Run("replaced", func(t *testing.T) { // Close must not remove the socket of a successor
		s := listen(t, NBDOptions{}, export)
		if err := os.Remove(s.Path()); err != nil {
			t.Fatal(err)
		}
		next := listenAt(t, s.Path(), NBDOptions{}, export)
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if err := dial(t, next, "disk", nbdtest.Options{}).Flush(); err != nil {
			t.Error(err)
		}
	})
	t.Run("file", func(t *testing.T) {
		path := socketPath(t)
		if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
			t.Fatal(err)
		}
		fails(t, path, "is not a socket", export)
	})
	t.Run("long path", func(t *testing.T) { fails(t, "/tmp/"+strings.Repeat("x", 103), "the path has 108 bytes", export) })
	t.Run("no folder", func(t *testing.T) { fails(t, "/nonexistent/s", "/nonexistent", export) })
	t.Run("twice", func(t *testing.T) { fails(t, socketPath(t), `two exports are named "disk"`, export, export) })
	t.Run("no device", func(t *testing.T) { fails(t, socketPath(t), "has no device", Export{Name: "disk"}) })
	t.Run("too many clients", func(t *testing.T) {
		s := listen(t, NBDOptions{MaxConnections: 1}, export)
		c := dial(t, s, "disk", nbdtest.Options{})
		if second, err := nbdtest.Dial(s.Path(), "disk", nbdtest.Options{}); err == nil {
			_ = second.Close()
			t.Error("a second client is let in")
		}
		if err := c.Flush(); err != nil {
			t.Error(err)
		}
	})
	t.Run("silent client", func(t *testing.T) {
		s := listen(t, NBDOptions{HandshakeTimeout: time.Millisecond}, export)
		conn, err := net.Dial("unix", s.Path())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if _, err := io.Copy(io.Discard, conn); err != nil { // ends when the server hangs up
			t.Error(err)
		}
	})
}

// TestManyConnections uses several connections at once, some of which go away at a bad moment, and checks that nothing is left.
func TestManyConnections(t *testing.T) {
	const connections, size = 8, 4 << 20
	before := runtime.NumGoroutine()
	files := openFiles(t)
	d := block.NewMemory(size)
	s := listen(t, NBDOptions{}, Export{Device: d})
	var wg sync.WaitGroup
	for i := range int64(connections) {
		wg.Go(func() {
			if i%4 == 3 { // leaves in the middle of a write
				conn := rawConn(t, s, "")
				_, _ = io.WriteString(conn, requestHead(0, 1, "a cookie", 0, 1<<20)+"too little")
				_ = conn.Close()
				return
			}
			c, err := nbdtest.Dial(s.Path(), "", nbdtest.Options{Structured: i%2 == 0})
			if err != nil {
				t.Error(err)
				return
			}
			rng := rand.New(rand.NewPCG(uint64(i), 0))
			for range 100 {
				n := 1 + rng.Int64N(100_000)
				off := size/connections*i + rng.Int64N(size/connections-n)
				p := bytes.Repeat([]byte{byte(1 + i)}, int(n))
				if _, err := c.WriteAt(p, off); err != nil {
					t.Error(err)
				}
				got := make([]byte, n)
				if _, err := c.ReadAt(got, off); err != nil || !bytes.Equal(got, p) {
					t.Errorf("read after write differs, %v", err)
				}
			}
			if err := c.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	for range 1 << 20 { // those that were waited for may still be on their last instructions
		if runtime.NumGoroutine() <= before {
			break
		}
		runtime.Gosched()
	}
	if after := runtime.NumGoroutine(); after > before {
		buf := make([]byte, 1<<20)
		t.Errorf("%d goroutines before, %d after:\n%s", before, after, buf[:runtime.Stack(buf, true)])
	}
	if after := openFiles(t); after > files {
		t.Errorf("%d open files before, %d after", files, after)
	}
}

func openFiles(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}
