package console

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/drafter-vm/drafter/pkg/vmm/vmmtest"
)

// gate is a writer that blocks until it is opened.
type gate struct {
	open chan struct{}
	mu   sync.Mutex // guards got
	got  bytes.Buffer
}

func (g *gate) Write(p []byte) (int, error) {
	<-g.open
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.got.Write(p)
}

func TestConsoleNeverBlocks(t *testing.T) {
	guest, ours := net.Pipe()
	out := &gate{open: make(chan struct{})}
	c := Start(ours, out, nil, nil, vmmtest.Logger(t))
	line := strings.Repeat("x", 1023) + "\n"
	const lines = 3 * consoleBuffer / 1024
	for range lines {
		if _, err := io.WriteString(guest, line); err != nil { // a net.Pipe has no buffer: somebody takes each
			t.Fatal(err)
		}
	}
	if _, err := io.WriteString(guest, "the end"); err != nil {
		t.Fatal(err)
	}
	close(out.open)
	guest.Close()
	c.Close()
	got := out.got.String()
	if !strings.HasSuffix(got, "x\nthe end") {
		t.Errorf("the end is missing: %q", got[max(0, len(got)-20):])
	}
	// A full buffer, and what the writer had taken before it got stuck.
	if len(got) < consoleBuffer || len(got) > 2*consoleBuffer {
		t.Errorf("%d bytes of %d arrived, the buffer has %d", len(got), lines*1024, consoleBuffer)
	}
}

func TestConsoleStuckWriter(t *testing.T) {
	guest, ours := net.Pipe()
	out := &gate{open: make(chan struct{})}
	c := Start(ours, out, nil, nil, vmmtest.Logger(t))
	if _, err := io.WriteString(guest, "x"); err != nil {
		t.Fatal(err)
	}
	guest.Close()
	c.Close() // returns although the writer does not
	close(out.open)
	<-c.written
}

func TestConsoleBrokenWriter(t *testing.T) {
	guest, ours := net.Pipe()
	r, w := io.Pipe()
	r.CloseWithError(errors.New("no reader"))
	c := Start(ours, w, nil, nil, vmmtest.Logger(t))
	for range 1000 {
		if _, err := guest.Write(make([]byte, 1024)); err != nil {
			t.Fatal(err)
		}
	}
	guest.Close()
	c.Close()
}

// TestConsoleInputIsLeft shows that a console that ends takes no byte of its input with it: the next machine reads on.
func TestConsoleInputIsLeft(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	for _, text := range []string{"first", "second"} {
		guest, ours := net.Pipe()
		c := Start(ours, nil, r, nil, vmmtest.Logger(t))
		if _, err := io.WriteString(w, text); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(text))
		if _, err := io.ReadFull(guest, got); err != nil || string(got) != text {
			t.Fatalf("%q, %v", got, err)
		}
		guest.Close()
		c.Close()
	}
}

// What a guest is to be told before it runs waits until it does.
func TestConsoleInputWaits(t *testing.T) {
	ours, theirs := net.Pipe()
	defer theirs.Close()
	runs := make(chan struct{})
	c := Start(ours, nil, strings.NewReader("hello"), runs, vmmtest.Logger(t))
	if err := theirs.SetReadDeadline(time.Now().Add(50 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if n, err := theirs.Read(make([]byte, 1)); n > 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%d bytes came before the guest runs (%v)", n, err)
	}
	if err := theirs.SetReadDeadline(time.Time{}); err != nil {
		t.Fatal(err)
	}
	close(runs)
	got := make([]byte, 5)
	if _, err := io.ReadFull(theirs, got); err != nil || string(got) != "hello" {
		t.Errorf("got %q (%v)", got, err)
	}
	theirs.Close()
	c.Close()

	// One that never runs holds nobody up.
	ours, theirs = net.Pipe()
	c = Start(ours, nil, strings.NewReader("hello"), make(chan struct{}), vmmtest.Logger(t))
	theirs.Close()
	c.Close()
	<-c.sent
}
