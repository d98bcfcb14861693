package migrate

import (
	"fmt"
	"sync"

	"github.com/drafter-vm/drafter/pkg/wire"
)

// window bounds the bytes of content frames that were sent and not acknowledged, over all devices and streams, and
// counts them per device, which is what ends a round: everything of the device sent, everything acknowledged.
type window struct {
	mu       sync.Mutex // guards what follows
	limit    int64
	cond     *sync.Cond // something was acknowledged, or err was set
	inflight int64
	sent     []int64 // per device, since the start
	acked    []int64 // per device, ≤ sent
	err      error
}

func newWindow(limit int64, devices int) *window {
	w := &window{limit: limit, sent: make([]int64, devices), acked: make([]int64, devices)}
	w.cond = sync.NewCond(&w.mu)
	return w
}

// acquire waits until n more bytes of the device fit, and counts them as sent. n must not exceed the limit.
func (w *window) acquire(device int, n int64) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	for w.err == nil && w.inflight+n > w.limit {
		w.cond.Wait()
	}
	if w.err != nil {
		return w.err
	}
	w.inflight += n
	w.sent[device] += n
	return nil
}

// force counts n more bytes of the device as sent, without waiting: for what must not wait, and is bounded otherwise.
func (w *window) force(device int, n int64) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.inflight += n
	w.sent[device] += n
	return w.err
}

// narrow makes the window smaller.
func (w *window) narrow(limit int64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.limit = min(w.limit, limit)
}

// ack notes that the peer has processed total bytes of the device since the start. Totals of one device arrive in order.
func (w *window) ack(device int, total int64) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if device >= len(w.sent) {
		return fmt.Errorf("%w: ack for device %d of %d", wire.ErrMalformed, device, len(w.sent))
	}
	if total < w.acked[device] || total > w.sent[device] {
		return fmt.Errorf("%w: ack of %d bytes of device %d: %d were acknowledged and %d sent",
			wire.ErrMalformed, total, device, w.acked[device], w.sent[device])
	}
	w.inflight -= total - w.acked[device]
	w.acked[device] = total
	w.cond.Broadcast()
	return nil
}

// drained waits until everything sent of the device is acknowledged. Nobody may send of it meanwhile.
func (w *window) drained(device int) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	for w.err == nil && w.acked[device] < w.sent[device] {
		w.cond.Wait()
	}
	return w.err
}

// awaits reports whether something of the device is not acknowledged, and less than limit of all devices.
func (w *window) awaits(device int, limit int64) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.acked[device] < w.sent[device] && w.inflight < limit
}

// state is how many bytes of all devices were acknowledged, and how many are on their way.
func (w *window) state() (acked, inflight int64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, n := range w.acked {
		acked += n
	}
	return acked, w.inflight
}

func (w *window) total(device int) int64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.sent[device]
}

// fail ends all waiting, now and later, with err.
func (w *window) fail(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err == nil {
		w.err = err
	}
	w.cond.Broadcast()
}
