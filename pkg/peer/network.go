package peer

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/drafter-vm/drafter/pkg/migrate"
)

// Network keeps the connections of an instance when it moves to another host: a flow.Keeper is one. What it is asked for in the wrong
// order it refuses, with an error, and changes nothing. Its errors cost connections, never the instance: they are logged.
type Network interface {
	// Start notes that the guest begins to run here, without a past elsewhere, which is fresh, or runs here as before. An error is why it
	// cannot run in this place: it needs another one.
	Start() (fresh bool, err error)
	// End notes that the guest does not run here any more, nor anywhere.
	End() error

	// Offer is what a destination is told; nil if connections cannot be kept.
	Offer() json.RawMessage
	// Connect prepares the way to the destination, by its answer, while the guest runs.
	Connect(ctx context.Context, answer json.RawMessage) error
	// Divert has what comes for the guest wait at the destination from now on. It is called just before the guest is paused.
	Divert() error
	// Hand makes the connections known at the destination, while the guest is paused. It returns how many.
	Hand(ctx context.Context) (int, error)
	// Undo has all be as before Connect: the guest goes on here.
	Undo() error
	// Left notes that the guest runs at the destination.
	Left() error

	// Accept prepares for a guest, by what its source has offered, and answers that.
	Accept(offer json.RawMessage) (answer json.RawMessage, err error)
	// Arrive notes that the guest is about to run here, Discard that it does not come.
	Arrive() error
	Discard() error
}

const (
	// connectWait is how long the pause of a guest is put off for a way to the destination that is not ready.
	connectWait = 2 * time.Second
	// handWait is how long the guest stands still for its connections at most. Then they are lost, and it goes on.
	handWait = 2 * time.Second
)

// keeping keeps the connections of an instance that is sent. A nil one keeps none. Its methods are called by the goroutine of the Send.
type keeping struct {
	net Network
	log *slog.Logger

	tasks   sync.WaitGroup
	ready   chan struct{} // closed when Connect has ended
	err     error         // of Connect; valid then
	handed  chan struct{} // closed when Hand has ended; nil before
	begun   bool          // Connect was called
	diverts bool          // and Divert has succeeded
	cancel  func()        // ends Connect
}

func (p *Peer) keep() *keeping {
	if p.cfg.Network == nil {
		return nil
	}
	return &keeping{net: p.cfg.Network, log: p.cfg.Logger, ready: make(chan struct{})}
}

func (k *keeping) offer() json.RawMessage {
	if k == nil {
		return nil
	}
	return k.net.Offer()
}

// connect begins to make the way to the destination.
func (k *keeping) connect(ctx context.Context, answer json.RawMessage) {
	if len(answer) == 0 {
		k.log.Warn("the destination does not keep connections: those of the guest will end")
		return
	}
	k.begun = true
	ctx, k.cancel = context.WithCancel(ctx)
	k.tasks.Go(func() {
		defer close(k.ready)
		defer k.cancel()
		k.err = k.net.Connect(ctx, answer)
	})
}

// divert is done just before the pause.
func (k *keeping) divert(ctx context.Context) {
	if k == nil || !k.begun {
		return
	}
	late := time.NewTimer(connectWait)
	defer late.Stop()
	err := errors.New("it takes too long")
	select {
	case <-k.ready:
		if err = k.err; err == nil {
			err = k.net.Divert()
		}
	case <-late.C:
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	k.diverts = err == nil
	if err != nil {
		k.cancel() // the guest is not going to stand still for it
		k.log.Error("connections of the guest are not kept", "error", err)
	}
}

// hand begins to make the connections known, as soon as the guest is paused.
func (k *keeping) hand(ctx context.Context) {
	if k == nil || !k.diverts {
		return
	}
	k.handed = make(chan struct{})
	k.tasks.Go(func() {
		defer close(k.handed)
		ctx, cancel := context.WithTimeout(ctx, handWait)
		defer cancel()
		n, err := k.net.Hand(ctx)
		if err != nil {
			k.log.Error("connections of the guest are lost", "error", err)
			return
		}
		k.log.Info("connections of the guest go with it", "connections", n)
	})
}

// wait returns when the connections are known at the destination, or are not going to be.
func (k *keeping) wait() {
	if k != nil {
		k.tasks.Wait()
	}
}

// undo is done before the guest goes on here.
func (k *keeping) undo() {
	if k == nil || !k.begun {
		return
	}
	k.tasks.Wait()
	k.begun, k.diverts = false, false
	if err := k.net.Undo(); err != nil {
		k.log.Error("something of a migration is left in the guest's network", "error", err)
	}
}

// left is done when the guest runs at the destination. It may be done twice.
func (k *keeping) left() {
	if k == nil || !k.begun {
		return
	}
	if !k.diverts { // it went without its connections
		k.undo()
		return
	}
	k.begun, k.diverts = false, false
	if err := k.net.Left(); err != nil {
		k.log.Error("connections of the guest that began here end", "error", err)
	}
}

// Network implements migrate.NetworkTarget.
func (t *target) Network(_ context.Context, offer json.RawMessage) (json.RawMessage, error) {
	n := t.cfg.Network
	if n == nil {
		return nil, nil
	}
	if len(offer) > 0 {
		answer, err := n.Accept(offer)
		if err == nil {
			t.kept = expected
			return answer, nil
		}
		t.cfg.Logger.Error("connections of the guest are not kept", "error", err)
	}
	fresh, err := n.Start()
	if err == nil && !fresh { // what is left of a guest whose machine is no more: two cannot be in one place
		if err = n.End(); err == nil {
			_, err = n.Start()
		}
	}
	if err != nil {
		return nil, errors.Join(migrate.Refuse("there is no place for the guest's network"), fmt.Errorf("network: %w", err))
	}
	t.kept = began
	return nil, nil
}

// kept is what a target has to do with its network.
type kept int

const (
	none     kept = iota
	expected      // the guest comes with its connections
	began         // it comes without
)

// arrive is done just before the guest runs.
func (t *target) arrive() {
	if t.kept == expected {
		if err := t.cfg.Network.Arrive(); err != nil {
			t.cfg.Logger.Error("connections of the guest are lost", "error", err)
		}
	}
	t.kept = none
}

// depart is done when the guest does not come.
func (t *target) depart() {
	var err error
	switch t.kept {
	case expected:
		err = t.cfg.Network.Discard()
	case began:
		err = t.cfg.Network.End()
	}
	t.kept = none
	if err != nil {
		t.cfg.Logger.Error("something of a migration is left in the network", "error", err)
	}
}
