package backends

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/drafter-vm/drafter/pkg/ram"
	"github.com/drafter-vm/drafter/pkg/vmm"
	"github.com/drafter-vm/drafter/pkg/vmm/firecracker"
)

var record = flag.Bool("record", false, "write down what TestTraffic hears, for the test of that name that runs without a Firecracker")

// exchange is a request of Firecracker's API, and its answer.
type exchange struct {
	Request string `json:"request"` // method and path
	Body    string `json:"body,omitempty"`
	Code    int64  `json:"code"`
	Answer  string `json:"answer,omitempty"`
}

// listener is a logger that keeps what was said by the API.
type listener struct {
	mu    sync.Mutex // guards heard
	heard []exchange
}

func (*listener) Enabled(context.Context, slog.Level) bool { return true }
func (l *listener) WithAttrs([]slog.Attr) slog.Handler     { return l }
func (l *listener) WithGroup(string) slog.Handler          { return l }

func (l *listener) Handle(_ context.Context, r slog.Record) error {
	if r.Message != "Firecracker has answered" {
		return nil
	}
	var e exchange
	r.Attrs(func(a slog.Attr) bool {
		switch a.Key {
		case "request":
			e.Request = a.Value.String()
		case "body":
			e.Body = a.Value.String()
		case "code":
			e.Code = a.Value.Int64()
		case "answer":
			e.Answer = a.Value.String()
		}
		return true
	})
	l.mu.Lock()
	defer l.mu.Unlock()
	l.heard = append(l.heard, e)
	return nil
}

// TestTraffic: what Firecracker is asked, and answers, is what is written down for the test of its client, which always runs. Run with -record it
// is written down.
func TestTraffic(t *testing.T) {
	ctx := t.Context()
	var l listener
	b := firecracker.New(firecracker.Options{Binary: program(t), Logger: slog.New(&l)})
	disk := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(disk, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	spec, err := b.Describe(ctx, vmm.Spec{MemorySize: memorySize, Sockets: true, Disks: []vmm.Disk{{Name: "disk", Size: 1 << 20}}})
	if err != nil {
		t.Fatal(err)
	}
	begin := func(boot *vmm.Boot) vmm.Machine {
		t.Helper()
		dir, err := os.MkdirTemp("", "fc-")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(dir) })
		memory, err := ram.Create("traffic", memorySize)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { memory.Close() })
		cfg := vmm.Config{Spec: spec, Dir: dir, Memory: memory.File(), Boot: boot, NUMANode: -1, Disks: []vmm.Attachment{{Name: "disk", Path: disk}}, Logger: slog.New(&l)}
		graft(t, &cfg, false)
		m, err := b.Start(ctx, cfg)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { m.Close() })
		return m
	}
	boot := &vmm.Boot{Kernel: kernel(t)}
	first := begin(boot)
	var state bytes.Buffer
	for _, step := range []func() error{
		func() error { return first.Pause(ctx) }, func() error { return first.Save(ctx, &state) }, func() error { return first.Resume(ctx) },
	} {
		if err := step(); err != nil {
			t.Fatal(err)
		}
	}
	if err := first.(vmm.Ballooner).SetBalloon(ctx, 1<<20); err == nil {
		t.Error("a guest without a driver of a balloon has been asked for memory")
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	second := begin(nil)
	if err := second.Load(ctx, bytes.NewReader(state.Bytes())); err != nil {
		t.Fatal(err)
	}
	if err := second.Resume(ctx); err != nil {
		t.Fatal(err)
	}
	if err := second.Close(); err != nil {
		t.Fatal(err)
	}

	l.mu.Lock()
	defer l.mu.Unlock()
	heard := l.heard
	for i := range heard {
		heard[i].Body = strings.ReplaceAll(heard[i].Body, boot.Kernel, "/kernel")
	}
	const file = "../../pkg/vmm/firecracker/testdata/traffic.json"
	if *record {
		text, err := json.MarshalIndent(heard, "", "\t")
		if err == nil {
			err = os.WriteFile(file, append(text, '\n'), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var recorded []exchange
	if err := json.Unmarshal(text, &recorded); err != nil {
		t.Fatal(err)
	}
	// Versions differ in what they say, and in the engine that disks have.
	same := func(a, b exchange) bool {
		engine := strings.NewReplacer(`"Async"`, `"Sync"`)
		return a.Request == b.Request && a.Code == b.Code && engine.Replace(a.Body) == engine.Replace(b.Body)
	}
	for i := range max(len(heard), len(recorded)) {
		if i >= len(heard) || i >= len(recorded) || !same(heard[i], recorded[i]) {
			t.Fatalf("exchange %d: heard %+v\nrecorded %+v", i, heard[min(i, len(heard)):], recorded[min(i, len(recorded)):])
		}
	}
}
