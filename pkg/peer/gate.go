package peer

import (
	"fmt"
	"sync"
	"syscall"

	"github.com/drafter-vm/drafter/pkg/block"
)

// gate stands before the devices of a VM that nothing runs, and does to whoever writes to them what a pause does to a
// guest: writes wait while it is shut, and go on when it is opened, or fail once the VM is another's.
type gate struct {
	// mu is held shared by each write, so that whoever takes it knows that none is under way. It guards what follows.
	mu    sync.RWMutex
	shut  chan struct{} // closed when the gate is opened again or locked; nil: it is open
	ended bool          // the VM is another's
}

// enter waits until the gate is open. After a nil error leave must be called.
func (g *gate) enter() error {
	for {
		g.mu.RLock()
		shut := g.shut
		switch {
		case g.ended:
			g.mu.RUnlock()
			return fmt.Errorf("the VM was handed over: %w", syscall.EROFS)
		case shut == nil:
			return nil
		}
		g.mu.RUnlock()
		<-shut
	}
}

func (g *gate) leave() { g.mu.RUnlock() }

// close lets no write through any more, and returns when none is under way.
func (g *gate) close() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.shut == nil {
		g.shut = make(chan struct{})
	}
}

// open lets the writes through, those that wait, too. With ended they fail instead, for good.
func (g *gate) open(ended bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.ended = g.ended || ended
	if g.shut != nil {
		close(g.shut)
		g.shut = nil
	}
}

// gated is a device behind a gate.
type gated struct {
	block.Device
	gate *gate
}

func (d gated) WriteAt(p []byte, off int64) (int, error) {
	if err := d.gate.enter(); err != nil {
		return 0, err
	}
	defer d.gate.leave()
	return d.Device.WriteAt(p, off)
}

func (d gated) Discard(off, n int64) error {
	if err := d.gate.enter(); err != nil {
		return err
	}
	defer d.gate.leave()
	return d.Device.Discard(off, n)
}

func (d gated) NextData(off int64) (block.Range, error) { return block.NextData(d.Device, off) }
