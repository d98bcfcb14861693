package migrate

import (
	"slices"
	"sync"
	"time"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/wire"
)

// Progress is where a migration stands. What is not known is 0.
type Progress struct {
	Role  string // "source" or "destination"
	State string // as SourceState or DestinationState prints it
	Round int    // at the source; 0: the first
	Size  int64  // bytes of all devices

	Data       int64 // bytes of content sent or received so far, over all rounds
	Zero       int64 // bytes that went as runs of zeros
	Same       int64 // at the source: bytes that did not have to be sent, as the destination holds them
	StateBytes int64 // bytes of device state

	// At the source, of the round under way: bytes that were found dirty at its start (everything, in the first), and
	// those of them that were not sent yet. When the guest runs at the destination, on both sides: bytes that were missing
	// then, and still are.
	Dirty, Rest int64

	Elapsed   time.Duration // since the start
	Bandwidth float64       // bytes of data a second, over the last two seconds at most
	DirtyRate float64       // at the source: bytes a second that the guest writes, at the last look
	Throttle  float64       // at the source: the share of its time that the guest is held back, 0 to 0.99
	Remaining time.Duration // at the source: until everything is there, if the guest goes on as it did

	share float64 // of what is sent, that is written again meanwhile
}

// Over reports whether the migration has ended.
func (p Progress) Over() bool {
	if p.Role == wire.RoleSource.String() {
		return ends(sourceStates[:], p.State)
	}
	return ends(destinationStates[:], p.State)
}

// ends reports whether a state has no next one.
func ends[S ~uint8](table []transition[S], state string) bool {
	return slices.ContainsFunc(table, func(t transition[S]) bool { return t.name == state && t.next == nil })
}

const (
	progressInterval = 200 * time.Millisecond
	paceWindow       = 2 * time.Second
)

// meter calls a Progress function, one call at a time.
type meter struct {
	take func() Progress
	tell func(Progress) // may be nil

	mu   sync.Mutex // held during a call of tell; guards pace
	pace pace
}

// pace tells speeds from what was counted at some moments.
type pace []moment

type moment struct {
	at            time.Duration
	data, content int64 // bytes; content is data and zeros
}

// speeds notes a moment and returns the bytes a second since the oldest one in the window.
func (p *pace) speeds(now moment) (data, content float64) {
	*p = append(*p, now)
	for len(*p) > 2 && now.at-(*p)[1].at >= paceWindow {
		*p = (*p)[1:]
	}
	since := (*p)[0]
	if t := (now.at - since.at).Seconds(); t > 0 {
		return float64(now.data-since.data) / t, float64(now.content-since.content) / t
	}
	return 0, 0
}

// remaining is how long it takes to send a rest, and what is written meanwhile at a share of that speed, and so on.
func remaining(rest int64, speed, share float64) time.Duration {
	t := transfer(rest, speed)
	switch {
	case t == forever:
		return 0
	case share > 0 && share < 0.9: // otherwise it does not converge, and is sent once more at most
		t = time.Duration(min(float64(t)/(1-share), float64(forever)))
	}
	return t
}

func (m *meter) report() {
	if m.tell == nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	p := m.take()
	var speed float64
	p.Bandwidth, speed = m.pace.speeds(moment{p.Elapsed, p.Data, p.Data + p.Zero})
	if p.Rest > 0 {
		p.Remaining = remaining(p.Rest, speed, p.share)
	}
	m.tell(p)
}

// run reports now and then until the returned function is called, which waits for the last report.
func (m *meter) run() (stop func()) {
	if m.tell == nil {
		return func() {}
	}
	quit, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		t := time.NewTicker(progressInterval)
		defer t.Stop()
		for {
			select {
			case <-t.C:
				m.report()
			case <-quit:
				return
			}
		}
	}()
	return func() {
		close(quit)
		<-done
	}
}

// filling is what the destination lacked when the guest was started.
type filling struct {
	devices []*targetDevice
	bytes   int64
}

// missing is how much the destination lacked when the guest was started, and lacks still.
func (d *destination) missing() (then, now int64) {
	f := d.filling.Load()
	if f == nil {
		return 0, 0
	}
	for _, dev := range f.devices {
		if dev.lacking != nil {
			now += dev.lacking.count.Load() * block.PageSize
		}
	}
	return f.bytes, min(f.bytes, now)
}
