package runner

import (
	"context"
	"fmt"
	"sync"
	"time"
)

// throttlePeriod is the rhythm in which a machine is held back: short enough for what talks to the guest, long enough
// that signals cost nothing beside it.
const throttlePeriod = 20 * time.Millisecond

// throttle holds a machine back by stopping its process for a part of each period. It works with every VMM, and the kernel
// forgets nothing while a process is stopped; a peer that dies meanwhile leaves a stopped machine, which whoever adopts it
// lets go on.
type throttle struct {
	mu   sync.Mutex // guards what follows; held while the rhythm is changed
	stop chan struct{}
	done chan struct{} // closed when no signal is sent any more
}

// Throttle makes the guest stand still for a share of its time, from 0 (not at all) to below 1, until it is called again.
// A throttled instance must be let go, by a share of 0, before it is paused.
func (i *Instance) Throttle(_ context.Context, share float64) error {
	if share < 0 || share >= 1 {
		return fmt.Errorf("throttle instance: a share of %v of its time: give 0 to below 1", share)
	}
	t := &i.throttle
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.stop != nil {
		close(t.stop)
		<-t.done
		t.stop = nil
		if err := i.Thaw(); err != nil {
			return err
		}
	}
	if share == 0 {
		return nil
	}
	t.stop, t.done = make(chan struct{}), make(chan struct{})
	go i.holdBack(share, t.stop, t.done)
	return nil
}

// holdBack stops the machine and lets it go on, in turn, until stop is closed or the machine has ended.
func (i *Instance) holdBack(share float64, stop, done chan struct{}) {
	defer close(done)
	still := time.Duration(share * float64(throttlePeriod))
	timer := time.NewTimer(0)
	defer timer.Stop()
	for frozen := false; ; frozen = !frozen {
		select {
		case <-timer.C:
		case <-stop:
			return
		case <-i.machine.Done():
			return
		}
		act, next := i.Freeze, still
		if frozen {
			act, next = i.Thaw, throttlePeriod-still
		}
		if err := act(); err != nil {
			i.log.Warn("cannot slow the machine down", "error", err)
			return
		}
		timer.Reset(next)
	}
}
