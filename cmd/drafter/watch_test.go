package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/drafter-vm/drafter/pkg/control"
	"github.com/drafter-vm/drafter/pkg/migrate"
	"github.com/drafter-vm/drafter/pkg/wire"
)

func TestDescribe(t *testing.T) {
	for _, tt := range []struct {
		progress migrate.Progress
		want     string
	}{
		{migrate.Progress{Role: "source", State: "offering"}, "Sending, round 1, offering"},
		{migrate.Progress{Role: "source", State: "copying", Dirty: 512 << 20, Rest: 128 << 20, Bandwidth: 310 << 20, Remaining: 413 * time.Millisecond},
			"Sending, round 1: 75% of 512.0 MiB, 310.0 MiB/s, 400ms left"},
		{migrate.Progress{Role: "source", State: "copying", Round: 2, Dirty: 1 << 20, Rest: 1 << 20, DirtyRate: 45 << 20, Throttle: 0.3},
			"Sending, round 3: 0% of 1.0 MiB, 0.0 MiB/s, guest writes 45.0 MiB/s, held back 30%"},
		{migrate.Progress{Role: "destination", State: "receiving", Size: 100 << 20, Data: 50 << 20, Zero: 25 << 20, Bandwidth: 1 << 20}, "Receiving: 75% of 100.0 MiB, 1.0 MiB/s"},
		{migrate.Progress{Role: "destination", State: "receiving", Size: 100 << 20, Data: 500 << 20}, "Receiving: 100% of 100.0 MiB, 0.0 MiB/s"},
		{migrate.Progress{Role: "destination", State: "loading", Size: 100}, "Receiving, loading"},
		{migrate.Progress{Role: "source", State: "serving", Round: 1, Dirty: 4 << 20, Rest: 1 << 20, DirtyRate: 1 << 20}, "Sending, the VM runs there: 75% of 4.0 MiB, 0.0 MiB/s"},
		{migrate.Progress{Role: "destination", State: "filling", Size: 100 << 20, Data: 90 << 20, Dirty: 4 << 20, Rest: 1 << 20}, "Receiving, the VM runs here: 75% of 4.0 MiB, 0.0 MiB/s"},
	} {
		if got := describe(tt.progress); got != tt.want {
			t.Errorf("%+v: %q, want %q", tt.progress, got, tt.want)
		}
	}
}

// A migration that is over leaves the peer neither sending nor receiving, unless nothing came of it.
func TestPeerState(t *testing.T) {
	for s := migrate.SourceConnecting; !strings.HasPrefix(s.String(), "state "); s++ {
		got, ok := peerState(migrate.Progress{Role: "source", State: s.String()})
		if over := len(s.Next()) == 0; over && got == control.Sending || ok == (s == migrate.SourceConnecting) {
			t.Errorf("source %v: peer is %q, %t", s, got, ok)
		}
	}
	for s := migrate.DestinationConnecting; !strings.HasPrefix(s.String(), "state "); s++ {
		got, ok := peerState(migrate.Progress{Role: "destination", State: s.String()})
		nothing := s == migrate.DestinationDiscarded || s == migrate.DestinationCopied
		if over := len(s.Next()) == 0; over && got == control.Receiving && !nothing || !ok {
			t.Errorf("destination %v: peer is %q, %t", s, got, ok)
		}
	}
}

// show gives a watch news and waits until they are shown.
func show(w *watch, p migrate.Progress) {
	w.progress(p)
	w.draw()
}

func TestWatchPlain(t *testing.T) {
	var out bytes.Buffer
	w := newWatch(&out)
	p := migrate.Progress{Role: "source", State: "connecting", Elapsed: time.Hour}
	show(w, p) // somebody knocks
	p.State, p.Dirty = "copying", 1<<20
	for _, p.Elapsed = range []time.Duration{0, 4 * time.Second, 5 * time.Second, 6 * time.Second, 11 * time.Second} {
		show(w, p)
	}
	p.State = "moved"
	show(w, p)
	w.Close()
	want := strings.Repeat("Sending, round 1: 100% of 1.0 MiB, 0.0 MiB/s\n", 2)
	if out.String() != want {
		t.Errorf("got\n%swant\n%s", &out, want)
	}
}

func TestWatchBar(t *testing.T) {
	var out bytes.Buffer
	w := newWatch(&out)
	w.bars = true
	log := w.logger(slog.New(slog.NewTextHandler(&out, nil))).With("a", 1).WithGroup("g")
	show(w, migrate.Progress{Role: "source", State: "copying", Dirty: 1 << 20, Rest: 1 << 19})
	w.mu.Lock() // it may be drawing the same once more
	bar := out.String()
	w.mu.Unlock()
	if !strings.Contains(bar, "Sending, round 1: 50% of 1.0 MiB") || !strings.Contains(bar, "█") {
		t.Errorf("no bar: %q", bar)
	}
	log.Info("hello")
	show(w, migrate.Progress{Role: "source", State: "copying", Round: 1, Dirty: 1 << 20, Rest: 1 << 20})
	io.WriteString(w, "VM runs here\n")
	show(w, migrate.Progress{Role: "source", State: "copying", Round: 1, Dirty: 1 << 20, Rest: 1 << 20})
	show(w, migrate.Progress{Role: "source", State: "moved"})
	w.Close()
	// On a terminal a carriage return goes back to the start: whole lines begin there, over what was cleared.
	for _, line := range []string{"VM runs here", "a=1"} {
		i := strings.Index(out.String(), line)
		before := out.String()[:i]
		before = before[strings.LastIndexAny(before, "\r\n")+1:]
		if strings.ContainsAny(before, "█%") {
			t.Errorf("%q is written after %q", line, before)
		}
	}
	if rest := out.String()[strings.LastIndex(out.String(), "\r")+1:]; strings.TrimSpace(rest) != "" {
		t.Errorf("%q is left", rest)
	}
}

// TestMetricsServed scrapes a peer that waits for an instance, and looks for the server when it has ended.
func TestMetricsServed(t *testing.T) {
	f := newForeign(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	stderr, w := io.Pipe()
	ended := make(chan error, 1)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() {
		err := run(ctx, []string{"drafter", "peer", "--netns", "", "--chroot-base-dir", filepath.Join(f.dir, "vms"), "--package", f.pkg, "--instance", filepath.Join(f.dir, "instance"),
			"--raddr", l.Addr().String(), "--metrics", "127.0.0.1:0"}, strings.NewReader(""), io.Discard, w)
		w.Close()
		ended <- err
	}()
	lines := bufio.NewScanner(stderr)
	var url string
	for url == "" && lines.Scan() {
		url = regexp.MustCompile(`http://\S+`).FindString(lines.Text())
	}
	go io.Copy(io.Discard, stderr)
	var conn net.Conn
	// A source that introduces itself, on each stream, and then says nothing.
	for i := range streams {
		if conn, err = l.Accept(); err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if _, err := conn.Write(wire.Preface{Newest: wire.Version, Oldest: wire.OldestVersion, Role: wire.RoleSource, Stream: uint8(i), Streams: streams, Session: 7}.Append(nil)); err != nil {
			t.Fatal(err)
		}
		if i < streams-1 {
			continue
		}
		if _, err := io.ReadFull(conn, make([]byte, wire.PrefaceSize+wire.HeaderSize)); err != nil { // its preface and a heartbeat
			t.Fatal(err)
		}
	}
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(resp.Body)
	resp.Body.Close()
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`drafter_peer_state{state="receiving"} 1`, `drafter_migration_state{role="destination",state="waiting"} 1`, "drafter_build_info{version="} {
		if !strings.Contains(string(got), want) {
			t.Errorf("no %s in\n%s", want, got)
		}
	}
	conn.Close()
	if err := <-ended; exitStatus(err) != 1 {
		t.Errorf("peer ended with %v", err)
	}
	address := strings.TrimSuffix(strings.TrimPrefix(url, "http://"), "/metrics")
	if _, err := net.Dial("tcp", address); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("the metrics are still served at %s: %v", address, err)
	}
	http.DefaultClient.CloseIdleConnections()
}
