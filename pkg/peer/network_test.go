package peer

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"slices"
	"testing"
	"testing/synctest"

	"github.com/drafter-vm/drafter/pkg/migrate"
)

// network is a Network that notes what it is asked for.
type network struct {
	Network
	asked   []string
	stale   bool // of Start: somebody is here already
	connect func(context.Context) error
}

func (n *network) note(what string) error { n.asked = append(n.asked, what); return nil }

func (n *network) Start() (fresh bool, err error) {
	fresh = !n.stale
	return fresh, n.note("start")
}
func (n *network) End() error                        { n.stale = false; return n.note("end") }
func (n *network) Divert() error                     { return n.note("divert") }
func (n *network) Hand(context.Context) (int, error) { return 0, n.note("hand") }
func (n *network) Undo() error                       { return n.note("undo") }
func (n *network) Left() error                       { return n.note("left") }
func (n *network) Connect(ctx context.Context, _ json.RawMessage) error {
	n.note("connect")
	return n.connect(ctx)
}

// TestKeeping: the pause is put off for a way to the destination, but not for ever, and what was begun is ended in one way or the other.
func TestKeeping(t *testing.T) {
	hangs := func(ctx context.Context) error { <-ctx.Done(); return context.Cause(ctx) }
	for name, tt := range map[string]struct {
		connect func(context.Context) error
		left    bool
		asked   []string
	}{
		"moved":               {func(context.Context) error { return nil }, true, []string{"connect", "divert", "hand", "left"}},
		"stayed":              {func(context.Context) error { return nil }, false, []string{"connect", "divert", "hand", "undo"}},
		"moved, no way there": {hangs, true, []string{"connect", "undo"}},
		"stayed, no way":      {func(context.Context) error { return errors.New("no") }, false, []string{"connect", "undo"}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := &network{connect: tt.connect}
				k := &keeping{net: n, log: slog.New(slog.DiscardHandler), ready: make(chan struct{})}
				k.connect(t.Context(), json.RawMessage(`{}`))
				k.divert(t.Context())
				k.hand(t.Context())
				k.wait() // does not end for one that hangs
				for range 2 {
					if tt.left {
						k.left()
					} else {
						k.undo()
					}
				}
				if !slices.Equal(n.asked, tt.asked) {
					t.Errorf("it was asked for %q, want %q", n.asked, tt.asked)
				}
			})
		})
	}
}

// TestPlaceOfTheDead: a guest that comes without connections has a place to itself.
func TestPlaceOfTheDead(t *testing.T) {
	for _, stale := range []bool{false, true} {
		n := &network{stale: stale}
		target := &target{cfg: Config{Network: n, Logger: slog.New(slog.DiscardHandler)}}
		if _, err := migrate.NetworkTarget(target).Network(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
		want := []string{"start"}
		if stale {
			want = []string{"start", "end", "start"}
		}
		if !slices.Equal(n.asked, want) {
			t.Errorf("stale %t: it was asked for %q, want %q", stale, n.asked, want)
		}
	}
}
