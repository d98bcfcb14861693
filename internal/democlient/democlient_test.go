package democlient

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/drafter-vm/drafter/internal/testnet"
)

// silent is a logger for tests in which things break on purpose.
var silent = slog.New(slog.DiscardHandler)

// server is a Valkey or Redis that a test has started.
type server struct {
	t       *testing.T
	address string
	command func() *exec.Cmd
	cmd     *exec.Cmd
}

// startServer runs a real server on a free port of 127.0.0.1, or skips the test. VALKEY_SERVER says where the program is.
func startServer(t *testing.T, options ...string) *server {
	t.Helper()
	program := os.Getenv("VALKEY_SERVER")
	for _, name := range []string{"valkey-server", "redis-server"} {
		if path, err := exec.LookPath(name); program == "" && err == nil {
			program = path
		}
	}
	if path, err := exec.LookPath("valkey-check-rdb"); program == "" && err == nil {
		// Debian's valkey-tools has the server's program under this name; it goes by what it is called.
		program = filepath.Join(t.TempDir(), "valkey-server")
		if err := os.Symlink(path, program); err != nil {
			t.Fatal(err)
		}
	}
	if program == "" {
		t.Skip("needs valkey-server in PATH, or its path in VALKEY_SERVER")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	l.Close()
	_, port, _ := net.SplitHostPort(address)
	dir := t.TempDir()
	s := &server{t: t, address: address, command: func() *exec.Cmd {
		args := append([]string{"--port", port, "--bind", "127.0.0.1", "--dir", dir, "--save", "", "--logfile", filepath.Join(dir, "log")}, options...)
		cmd := exec.Command(program, args...)
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		return cmd
	}}
	s.start()
	t.Cleanup(s.kill)
	return s
}

func (s *server) start() {
	s.t.Helper()
	s.cmd = s.command()
	if err := s.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
}

func (s *server) kill() {
	s.cmd.Process.Kill()
	s.cmd.Wait() // says that it was killed
}

// do sends a command on a connection of its own and returns the first line of the reply.
func (s *server) do(args ...string) string {
	s.t.Helper()
	nc, err := net.Dial("tcp", s.address)
	if err != nil {
		s.t.Fatal(err)
	}
	defer nc.Close()
	cn := &conn{nc, bufio.NewReader(nc), 10 * time.Second}
	// Numbers are no kind of reply that readReply knows: read the line as it is.
	if err := cn.send(appendCommand(nil, args...)); err != nil {
		s.t.Fatal(err)
	}
	line, err := cn.replies.ReadString('\n')
	if err != nil {
		s.t.Fatal(err)
	}
	return strings.TrimSpace(line)
}

// start starts a client, which is stopped when the test ends.
func start(t *testing.T, cfg Config) *Client {
	t.Helper()
	if cfg.Logger == nil {
		cfg.Logger = silent
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	c, err := Start(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Stop)
	return c
}

// waitFor waits until something is so.
func waitFor(t *testing.T, what string, isSo func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !isSo(); {
		if time.Now().After(end) {
			t.Fatalf("waited in vain for %s", what)
		}
		runtime.Gosched()
	}
}

func wantLost(t *testing.T, c *Client, want int) {
	t.Helper()
	lost, err := c.Verify(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if lost != want {
		t.Errorf("%d writes are lost, want %d", lost, want)
	}
}

func TestLoad(t *testing.T) {
	goroutines := runtime.NumGoroutine()
	s := startServer(t)
	begin := time.Now()
	c := start(t, Config{Address: s.address})
	waitFor(t, "writes and pings", func() bool { st := c.Stats(); return st.AckedWrites > 1000 && st.Pings > 20 })
	c.Stop()
	stats := c.Stats()
	if stats.Reconnects != 0 || stats.LongestGap <= 0 || stats.LongestWriteGap <= 0 {
		t.Errorf("stats are %+v", stats)
	}
	if got := c.AckedBetween(begin, time.Now()); got != stats.AckedWrites {
		t.Errorf("%d writes in all of the time, want %d", got, stats.AckedWrites)
	}
	wantLost(t, c, 0)

	// The checker is worth nothing unless it fails.
	if got := s.do("DEL", c.Key(7)); got != ":1" {
		t.Fatalf("DEL says %q", got)
	}
	wantLost(t, c, 1)
	if got := s.do("SET", c.Key(500), "something else"); got != "+OK" {
		t.Fatalf("SET says %q", got)
	}
	wantLost(t, c, 2)
	if got := s.do("SET", c.Key(7), c.payload(7)); got != "+OK" {
		t.Fatalf("SET says %q", got)
	}
	wantLost(t, c, 1)
	if stats.AckedWrites > 600 {
		// The value of another key, whose own checksum is right.
		if got := s.do("SET", c.Key(7), c.payload(8)); got != "+OK" {
			t.Fatalf("SET says %q", got)
		}
		wantLost(t, c, 2)
	}
	// The values of another run are not ours.
	again := start(t, Config{Address: s.address, PingInterval: -1})
	waitFor(t, "a write", func() bool { return again.Stats().AckedWrites > 0 })
	again.Stop()
	wantLost(t, again, 0)
	if lost, err := c.Verify(t.Context()); err != nil || lost < again.Stats().AckedWrites {
		t.Errorf("%d writes are lost, %v; the second run has written %d of them over", lost, err, again.Stats().AckedWrites)
	}
	waitFor(t, "the end of all goroutines", func() bool { return runtime.NumGoroutine() <= goroutines })
}

// TestRestart kills the server in the middle and starts it again: once with a log it writes before it acknowledges, once
// without.
func TestRestart(t *testing.T) {
	for _, tt := range []struct {
		name    string
		options []string
		loses   bool
	}{
		{"durable", []string{"--appendonly", "yes", "--appendfsync", "always"}, false},
		{"volatile", []string{"--appendonly", "no"}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := startServer(t, tt.options...)
			c := start(t, Config{Address: s.address})
			waitFor(t, "writes", func() bool { st := c.Stats(); return st.AckedWrites > 50 && st.Pings > 10 })
			before := time.Now()
			s.kill()
			stopped := time.Now()
			waitFor(t, "the gap to grow", func() bool { return time.Since(stopped) > 50*time.Millisecond })
			s.start()
			waitFor(t, "reconnects", func() bool { return c.Stats().Reconnects >= 2 })
			n, pings := c.Stats().AckedWrites, c.Stats().Pings
			waitFor(t, "writes", func() bool { st := c.Stats(); return st.AckedWrites > n+50 && st.Pings > pings+10 })
			after := time.Now()
			c.Stop()
			for what, gap := range map[string]time.Duration{"ping": c.GapBetween(before, after), "write": c.WriteGapBetween(before, after)} {
				if gap < 50*time.Millisecond || gap > after.Sub(before)+time.Second {
					t.Errorf("the %s gap is %v", what, gap)
				}
			}
			lost, err := c.Verify(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if tt.loses && lost < 50 || !tt.loses && lost > 0 {
				t.Errorf("%d of %d writes are lost", lost, c.Stats().AckedWrites)
			}
		})
	}
}

// TestPausedServer stops the server's process for a while: connections survive, gaps are seen.
func TestPausedServer(t *testing.T) {
	s := startServer(t)
	c := start(t, Config{Address: s.address})
	waitFor(t, "pings", func() bool { return c.Stats().Pings > 10 })
	before := time.Now()
	if err := s.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the gap to be seen while it lasts", func() bool { return c.GapBetween(before, time.Now()) > 60*time.Millisecond })
	if err := s.cmd.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	n := c.Stats().Pings
	waitFor(t, "pings", func() bool { return c.Stats().Pings > n+100 })
	c.Stop()
	if gap := c.GapBetween(before, time.Now()); gap < 60*time.Millisecond {
		t.Errorf("the gap is %v", gap)
	}
	if r := c.Stats().Reconnects; r != 0 {
		t.Errorf("%d reconnects", r)
	}
	wantLost(t, c, 0)
}

func TestNamespace(t *testing.T) {
	n := testnet.NewTest(t, "a")
	var l net.Listener
	err := testnet.Do(n.Client(), func() (err error) {
		l, err = net.Listen("tcp", "172.16.0.1:0")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	f := serveFake(t, l)
	c := start(t, Config{Address: f.address(), Namespace: n.Client()})
	waitFor(t, "writes", func() bool { return c.Stats().AckedWrites > 10 })
	c.Stop()
	wantLost(t, c, 0)
}

// fake is a server in this process, for what a real one does not do on demand.
type fake struct {
	listener net.Listener
	done     sync.WaitGroup

	mu     sync.Mutex // guards what follows
	values map[string]string
	conns  map[net.Conn]bool
	// reply, if set, may answer a command instead.
	reply func(args []string) (reply string, ok bool)
}

func serveFake(t *testing.T, l net.Listener) *fake {
	f := &fake{listener: l, values: map[string]string{}, conns: map[net.Conn]bool{}}
	f.done.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			f.mu.Lock()
			f.conns[conn] = true
			f.mu.Unlock()
			f.done.Go(func() {
				defer conn.Close()
				f.serve(conn)
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		f.breakAll()
		f.done.Wait()
	})
	return f
}

func startFake(t *testing.T) *fake {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return serveFake(t, l)
}

func (f *fake) address() string { return f.listener.Addr().String() }

// breakAll closes all connections.
func (f *fake) breakAll() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for conn := range f.conns {
		conn.Close()
		delete(f.conns, conn)
	}
}

func (f *fake) setReply(reply func(args []string) (string, bool)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.reply = reply
}

func (f *fake) serve(conn net.Conn) {
	r := bufio.NewReader(conn)
	for {
		var n int
		if _, err := fmt.Fscanf(r, "*%d\r\n", &n); err != nil {
			return
		}
		args := make([]string, n)
		for i := range args {
			var length int
			if _, err := fmt.Fscanf(r, "$%d\r\n", &length); err != nil {
				return
			}
			b := make([]byte, length+2)
			if _, err := io.ReadFull(r, b); err != nil {
				return
			}
			args[i] = string(b[:length])
		}
		f.mu.Lock()
		reply, ok := "", false
		if f.reply != nil {
			reply, ok = f.reply(args)
		}
		if !ok {
			switch args[0] {
			case "PING":
				reply = "+PONG\r\n"
			case "SET":
				f.values[args[1]] = args[2]
				reply = "+OK\r\n"
			case "GET":
				if value, ok := f.values[args[1]]; ok {
					reply = fmt.Sprintf("$%d\r\n%s\r\n", len(value), value)
				} else {
					reply = "$-1\r\n"
				}
			}
		}
		f.mu.Unlock()
		if _, err := io.WriteString(conn, reply); err != nil {
			return
		}
	}
}

// TestBrokenConnections breaks connections over and over: nothing acknowledged is lost or counted twice.
func TestBrokenConnections(t *testing.T) {
	f := startFake(t)
	c := start(t, Config{Address: f.address(), RetryDelay: time.Millisecond})
	for i := range 10 {
		before := c.Stats()
		waitFor(t, "writes and pings", func() bool {
			st := c.Stats()
			return st.AckedWrites > before.AckedWrites+20 && st.Pings > before.Pings
		})
		f.breakAll()
		waitFor(t, "reconnects", func() bool { return c.Stats().Reconnects >= int64(2*(i+1)) })
	}
	c.Stop()
	if got, want := c.Stats().Reconnects, int64(20); got != want {
		t.Errorf("%d reconnects, want %d", got, want)
	}
	wantLost(t, c, 0)
	f.mu.Lock()
	defer f.mu.Unlock()
	// One more may have been set without its acknowledgement getting through.
	if n, acked := len(f.values), c.Stats().AckedWrites; n != acked && n != acked+1 {
		t.Errorf("the server has %d keys, the client counts %d", n, acked)
	}
}

func TestRefusals(t *testing.T) {
	f := startFake(t)
	c := start(t, Config{Address: f.address(), RetryDelay: time.Millisecond})
	refused := 0
	f.setReply(func(args []string) (string, bool) {
		refused++
		return "-LOADING the server reads its files\r\n", true
	})
	waitFor(t, "refusals", func() bool { f.mu.Lock(); defer f.mu.Unlock(); return refused > 20 })
	n := c.Stats().AckedWrites
	f.setReply(nil)
	waitFor(t, "writes", func() bool { return c.Stats().AckedWrites > n+20 })
	c.Stop()
	if got := c.Stats().Reconnects; got != 0 {
		t.Errorf("%d reconnects: a refusal is no broken connection", got)
	}
	// The keys cannot be read for a while, then they can.
	left := 300
	f.setReply(func(args []string) (string, bool) {
		left--
		return "-LOADING the server reads its files\r\n", left >= 0
	})
	wantLost(t, c, 0)
	// An error that is no matter of time.
	f.setReply(func(args []string) (string, bool) { return "-NOAUTH Authentication required.\r\n", true })
	if _, err := c.Verify(t.Context()); err == nil || !strings.Contains(err.Error(), "NOAUTH") {
		t.Errorf("Verify: %v", err)
	}
	// A server that never has its keys, and a caller who has enough of it.
	f.setReply(func(args []string) (string, bool) { return "-LOADING the server reads its files\r\n", true })
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(20*time.Millisecond, cancel)
	if _, err := c.Verify(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled Verify: %v", err)
	}
}

// TestSilence has a server that stops answering on connections that stay open.
func TestSilence(t *testing.T) {
	f := startFake(t)
	c := start(t, Config{Address: f.address(), Timeout: 50 * time.Millisecond, RetryDelay: time.Millisecond})
	waitFor(t, "writes", func() bool { return c.Stats().AckedWrites > 10 })
	f.setReply(func(args []string) (string, bool) { return "", true })
	waitFor(t, "reconnects", func() bool { return c.Stats().Reconnects > 2 })
	f.setReply(nil)
	n := c.Stats().AckedWrites
	waitFor(t, "writes", func() bool { return c.Stats().AckedWrites > n+10 })
	c.Stop()
	wantLost(t, c, 0)
}

func TestStart(t *testing.T) {
	if _, err := Start(t.Context(), Config{Address: "nowhere"}); err == nil {
		t.Error("an address without a port was accepted")
	}
	if _, err := Start(t.Context(), Config{Address: "127.0.0.1:1", PayloadSize: 10}); err == nil {
		t.Error("payloads of 10 bytes were accepted")
	}
	// A server that is not there, and one that never answers.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for _, address := range []string{"127.0.0.1:1", l.Addr().String()} {
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
		defer cancel()
		if _, err := Start(ctx, Config{Address: address, Logger: silent}); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("server %s: %v", address, err)
		}
	}
	// Cancelling ends the load, too.
	f := startFake(t)
	ctx, cancel := context.WithCancel(t.Context())
	c, err := Start(ctx, Config{Address: f.address(), Logger: silent})
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	c.done.Wait()
	c.Stop()
}

func TestPayload(t *testing.T) {
	seen := map[string]bool{}
	for _, size := range []int{64, 100, 4096} {
		c := &Client{cfg: Config{PayloadSize: size}, token: strings.Repeat("x", 26)}
		for n := range 1000 {
			p := c.payload(n)
			if len(p) != size || seen[p] {
				t.Fatalf("payload %d is %q", n, p)
			}
			seen[p] = true
		}
	}
}

func TestTimeline(t *testing.T) {
	start := time.Now().Add(-time.Hour)
	at := func(ms int) time.Time { return start.Add(time.Duration(ms) * time.Millisecond) }
	tl := &timeline{start: start, end: int64(200 * time.Millisecond)}
	for _, ms := range []int{10, 20, 50, 51, 100} {
		tl.marks = append(tl.marks, int64(ms)*int64(time.Millisecond))
	}
	for _, tt := range []struct{ from, to, want int }{
		{0, 200, 100},   // the open end
		{0, 99, 49},     // 51 → 100 counts whole
		{0, 50, 30},     // 50 → 51 and later do not overlap
		{21, 22, 30},    // in the middle of a gap
		{-50, 5, 10},    // the start is a sign of life
		{10, 20, 10},    // exactly between two marks
		{150, 160, 100}, // after the last mark
		{50, 51, 30},    // the gap that ends where the time begins is counted: it had not ended before
	} {
		if got := tl.gapBetween(at(tt.from), at(tt.to)); got != time.Duration(tt.want)*time.Millisecond {
			t.Errorf("gap in [%d,%d] is %v, want %d ms", tt.from, tt.to, got, tt.want)
		}
	}
	if got := tl.countBetween(at(20), at(100)); got != 3 {
		t.Errorf("%d marks in [20,100), want 3", got)
	}
}

func TestReadReply(t *testing.T) {
	for _, tt := range []struct {
		in, value string
		exists    bool
		err       string
	}{
		{"+OK\r\n", "OK", true, ""},
		{"$5\r\nhello\r\n", "hello", true, ""},
		{"$0\r\n\r\n", "", true, ""},
		{"$-1\r\n", "", false, ""},
		{"-ERR no\r\n", "", false, "server: ERR no"},
		{"$-2\r\n", "", false, "announces"},
		{"$99999999\r\n", "", false, "announces"},
		{"$5\r\nhelloxx", "", false, "does not end"},
		{"$5\r\nhel", "", false, "EOF"},
		{":1\r\n", "", false, "unexpected kind"},
		{"OK\n", "", false, "not RESP"},
		{"", "", false, "EOF"},
		{"+" + strings.Repeat("x", 10000), "", false, "too long a line"},
	} {
		value, exists, err := readReply(bufio.NewReader(strings.NewReader(tt.in)))
		if tt.err == "" && err != nil || tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)) {
			t.Errorf("%.20q: error is %v, want %q", tt.in, err, tt.err)
		}
		if value != tt.value || exists != tt.exists {
			t.Errorf("%.20q: got %q, %v", tt.in, value, exists)
		}
	}
	if got := string(appendCommand(nil, "GET", "k:1")); got != "*2\r\n$3\r\nGET\r\n$3\r\nk:1\r\n" {
		t.Errorf("command is %q", got)
	}
}

func FuzzReadReply(f *testing.F) {
	f.Add([]byte("+OK\r\n$5\r\nhello\r\n$-1\r\n-ERR\r\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bufio.NewReader(bytes.NewReader(b))
		for {
			value, _, err := readReply(r)
			if len(value) > len(b) {
				t.Fatal("a value is longer than the input")
			}
			var refused serverError
			if err != nil && !errors.As(err, &refused) {
				return
			}
		}
	})
}
