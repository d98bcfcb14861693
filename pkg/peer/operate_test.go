package peer

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"strings"
	"sync"
	"testing"

	"github.com/drafter-vm/drafter/pkg/runner"
)

// withMemory is a VM that could be sent.
var withMemory = Config{Devices: []Device{{DeviceConfig: runner.DeviceConfig{Name: runner.MemoryDevice}}}}

// TestCheckSavable: what cannot be saved is named, and cannot be sent either.
func TestCheckSavable(t *testing.T) {
	withDevice := withMemory
	withDevice.Host.Passthrough = []string{"0000:01:00.0"}
	for _, tt := range []struct {
		cfg  Config
		says string
	}{{withMemory, ""}, {Config{}, `no device "memory"`}, {withDevice, `"0000:01:00.0"`}} {
		err := tt.cfg.CheckSavable()
		if tt.says == "" && err != nil || tt.says != "" && (!errors.Is(err, ErrNotSavable) || !strings.Contains(err.Error(), tt.says)) {
			t.Errorf("error %v, want %q", err, tt.says)
		}
		if err := tt.cfg.CheckMigratable(); tt.says != "" && (!errors.Is(err, ErrNotMigratable) || !errors.Is(err, ErrNotSavable)) {
			t.Errorf("it can be sent: %v", err)
		}
	}
}

// TestSendTo dials nobody for a VM that cannot be sent, and is under way while it dials.
func TestSendTo(t *testing.T) {
	still := Config{Devices: append([]Device{{DeviceConfig: runner.DeviceConfig{Name: "disk"}, Stationary: true}}, withMemory.Devices...)}
	for _, tt := range []struct {
		name string
		cfg  Config
		to   func(*Peer)
		want error
	}{
		{"paused", withMemory, func(p *Peer) { p.setPaused(true) }, ErrPaused},
		{"busy", withMemory, func(p *Peer) { p.begin(t.Context(), pausing) }, ErrBusy},
		{"forbidden", withMemory, func(p *Peer) { p.SetMigratable(false) }, ErrNotMigratable},
		{"impossible", still, func(*Peer) {}, ErrNotMigratable},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := newPeer(tt.cfg, new(runner.Instance))
			tt.to(p)
			_, err := p.SendTo(t.Context(), func(context.Context) ([]io.ReadWriter, error) {
				t.Error("somebody was dialled")
				return nil, io.EOF
			})
			if !errors.Is(err, tt.want) {
				t.Errorf("it ends with %v, want %v", err, tt.want)
			}
		})
	}

	p := newPeer(withMemory, new(runner.Instance))
	if p.Cancel() {
		t.Error("something was cancelled, and nothing was under way")
	}
	_, err := p.SendTo(t.Context(), func(ctx context.Context) ([]io.ReadWriter, error) {
		if what := p.UnderWay(); what != "migration" || !p.Busy() || !p.Cancel() {
			t.Errorf("while it dials, %q is under way", what)
		}
		<-ctx.Done()
		return nil, context.Cause(ctx)
	})
	if !errors.Is(err, context.Canceled) || p.Busy() {
		t.Errorf("it ends with %v, and %q is under way", err, p.UnderWay())
	}
}

// TestUnpauseExcludes has a guest that cannot go on: nothing must get in while that is tried, and nobody be told that it runs.
func TestUnpauseExcludes(t *testing.T) {
	p := newPeer(withMemory, new(runner.Instance)) // it is in no phase in which it could go on
	p.setPaused(true)
	const times = 20_000
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			for range times {
				if err := p.Unpause(t.Context()); !errors.Is(err, runner.ErrPhase) {
					t.Errorf("Unpause: %v", err)
					return
				}
			}
		})
	}
	wg.Go(func() {
		for range times {
			if _, _, err := p.begin(t.Context(), migrating); !errors.Is(err, ErrPaused) && !errors.Is(err, ErrBusy) {
				t.Errorf("a Send of a paused guest began: %v", err)
				return
			}
		}
	})
	wg.Wait()
	if p.Cancel() || !p.Paused() {
		t.Error("it is not paused any more")
	}
}

// TestCancelLeaves checks what is not Cancel's.
func TestCancelLeaves(t *testing.T) {
	for task, want := range map[task]bool{migrating: true, copying: true, pausing: true, resuming: false, rejoining: false} {
		p := newPeer(withMemory, new(runner.Instance))
		ctx, done, err := p.begin(t.Context(), task)
		if err != nil {
			t.Fatal(err)
		}
		if got := p.Cancel(); got != want || (ctx.Err() != nil) != want {
			t.Errorf("%s: Cancel says %t, want %t, and it ends with %v", task, got, want, ctx.Err())
		}
		done()
	}
}

// TestErrorsTell checks that callers can tell apart what they can do something about.
func TestErrorsTell(t *testing.T) {
	p := newPeer(withMemory, new(runner.Instance))
	if _, err := p.Rejoin(t.Context()); !errors.Is(err, runner.ErrNotGiven) {
		t.Errorf("Rejoin of what was not given away: %v", err)
	}
	if _, err := p.Clone(t.Context(), t.TempDir(), Config{}); !errors.Is(err, fs.ErrExist) {
		t.Errorf("Clone into a folder that exists: %v", err)
	}
	if _, _, err := p.Snapshot(t.Context(), t.TempDir()); !errors.Is(err, fs.ErrExist) {
		t.Errorf("Snapshot into a folder that exists: %v", err)
	}
	p.setPaused(true)
	if _, _, err := p.Snapshot(t.Context(), t.TempDir()+"/new"); !errors.Is(err, ErrPaused) {
		t.Errorf("Snapshot of a paused guest: %v", err)
	}
}
