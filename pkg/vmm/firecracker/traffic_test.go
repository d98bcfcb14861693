package firecracker

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"

	"github.com/drafter-vm/drafter/pkg/vmm"
	"github.com/drafter-vm/drafter/pkg/vmm/internal/lifecycle"
)

// exchange is a request, and its answer, of a Firecracker that was listened to: see TestTraffic of package backends.
type exchange struct {
	Request string `json:"request"` // method and path
	Body    string `json:"body"`
	Code    int    `json:"code"`
	Answer  string `json:"answer"`
}

// replay answers as a real Firecracker did, as long as it is asked for the same.
type replay struct {
	t *testing.T

	mu       sync.Mutex // guards what follows
	rest     []exchange
	snapshot func() // what is done for a snapshot
}

func (r *replay) ServeHTTP(w http.ResponseWriter, q *http.Request) {
	r.mu.Lock()
	defer r.mu.Unlock()
	body, err := io.ReadAll(q.Body)
	if err != nil {
		r.t.Error(err)
	}
	if len(r.rest) == 0 {
		r.t.Errorf("after all that was recorded: %s %s %s", q.Method, q.URL.Path, body)
		w.WriteHeader(http.StatusInternalServerError)
		return
	}
	next := r.rest[0]
	r.rest = r.rest[1:]
	if got := q.Method + " " + q.URL.Path; got != next.Request || string(body) != next.Body {
		r.t.Errorf("asked %s %s\nrecorded %s %s", got, body, next.Request, next.Body)
	}
	if next.Request == "PUT /snapshot/create" {
		r.snapshot()
	}
	w.WriteHeader(next.Code)
	_, _ = io.WriteString(w, next.Answer)
}

// TestTraffic: against the answers of a real Firecracker, its client asks for what it was recorded to ask for, and makes of them what it made.
func TestTraffic(t *testing.T) {
	text, err := os.ReadFile("testdata/traffic.json")
	if err != nil {
		t.Fatal(err)
	}
	var all []exchange
	if err := json.Unmarshal(text, &all); err != nil {
		t.Fatal(err)
	}
	again := 0 // where the second machine begins
	for i, e := range all {
		if e.Request == "GET /" {
			again = i
		}
	}
	if again == 0 {
		t.Fatal("there are not two machines in it")
	}
	ctx := t.Context()
	cfg := vmm.Config{
		Spec: vmm.Spec{CPUCount: 1, MemorySize: 64 << 20, Sockets: true, Disks: []vmm.Disk{{Name: "disk", Size: 1 << 20}}},
		Boot: &vmm.Boot{Kernel: "/kernel"},
	}
	begin := func(exchanges []exchange) (*machine, *replay) {
		r := &replay{t: t, rest: exchanges}
		m, snapshot := served(t, cfg, r)
		r.snapshot = snapshot
		info, err := m.api.await(ctx, nil)
		if err != nil {
			t.Fatal(err)
		}
		m.version = info.Version
		return m, r
	}
	m, r := begin(all[:again])
	if err := m.boot(ctx); err != nil {
		t.Fatal(err)
	}
	m.life.Found(lifecycle.Running)
	var state bytes.Buffer
	if err := errors.Join(m.Pause(ctx), m.Save(ctx, &state), m.Resume(ctx)); err != nil || !bytes.Equal(state.Bytes(), someState) {
		t.Errorf("saved %q (%v)", state.String(), err)
	}
	if err := m.SetBalloon(ctx, 1<<20); !errors.Is(err, vmm.ErrNoBalloon) || !strings.Contains(err.Error(), "not activated") {
		t.Errorf("a guest without a driver of a balloon: %v", err)
	}
	over := func(r *replay) {
		t.Helper()
		r.mu.Lock()
		defer r.mu.Unlock()
		if len(r.rest) > 0 {
			t.Errorf("it was not asked for %+v", r.rest)
		}
	}
	over(r)

	cfg.Boot = nil
	m, r = begin(all[again:])
	m.life.Found(lifecycle.Waiting)
	if err := errors.Join(m.Load(ctx, &state), m.Resume(ctx)); err != nil {
		t.Error(err)
	}
	over(r)
}
