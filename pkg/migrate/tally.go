package migrate

import (
	"fmt"
	"sync"

	"github.com/drafter-vm/drafter/pkg/wire"
)

// tally counts, per device, the bytes of content frames the destination has processed, and says when to tell the source.
// Counting bytes instead of remembering frames works because a round never sends a page twice: when the number the
// source named has been reached, everything it sent has been processed, by whatever stream it came.
type tally struct {
	signal chan struct{} // capacity 1: something should be acknowledged

	mu   sync.Mutex // guards what follows
	cond *sync.Cond // done or err changed

	threshold int64 // this many unacknowledged bytes are worth a frame

	done  []int64 // processed
	want  []int64 // total the source named at the end of its round; reaching it is worth a frame
	acked []int64 // ≤ done
	open  int64   // sum of done − acked
	err   error
}

func newTally(devices int, window int64) *tally {
	t := &tally{
		threshold: ackThreshold(window),
		signal:    make(chan struct{}, 1),
		done:      make([]int64, devices), want: make([]int64, devices), acked: make([]int64, devices),
	}
	t.cond = sync.NewCond(&t.mu)
	return t
}

// ackThreshold is how many unacknowledged bytes are worth a frame. The source stops when a window is unacknowledged: a quarter
// keeps it going with few frames.
func ackThreshold(window int64) int64 { return window / 4 }

func (t *tally) wake() {
	select {
	case t.signal <- struct{}{}:
	default: // it is awake
	}
}

// add notes n processed bytes of a device.
func (t *tally) add(device int, n int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.done[device] += n
	t.open += n
	if t.open >= t.threshold || t.done[device] == t.want[device] {
		t.wake()
	}
	t.cond.Broadcast()
}

// hurry makes fewer unacknowledged bytes worth a frame.
func (t *tally) hurry(threshold int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.threshold = min(t.threshold, threshold)
	if t.open >= t.threshold {
		t.wake()
	}
}

// roundEnd notes the total at which a device's round is complete.
func (t *tally) roundEnd(device int, total int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.want[device] = total
	if t.done[device] >= total {
		t.wake()
	}
}

// take returns the device's total and whether the source does not know it yet, which it now will.
func (t *tally) take(device int) (int64, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := t.done[device] - t.acked[device]
	t.acked[device] = t.done[device]
	t.open -= n
	return t.done[device], n > 0
}

// reach waits until exactly total bytes of the device are processed.
func (t *tally) reach(device int, total int64) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	for t.err == nil && t.done[device] < total {
		t.cond.Wait()
	}
	if t.err == nil && t.done[device] > total {
		return fmt.Errorf("%w: device %d got %d bytes where the source counts %d", wire.ErrMalformed, device, t.done[device], total)
	}
	return t.err
}

// atLeast waits until total bytes of the device, or more, are processed.
func (t *tally) atLeast(device int, total int64) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	for t.err == nil && t.done[device] < total {
		t.cond.Wait()
	}
	return t.err
}

// fail ends all waiting, now and later, with err.
func (t *tally) fail(err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.err == nil {
		t.err = err
	}
	t.cond.Broadcast()
}
