package runner

import (
	"context"
	"sync"

	"github.com/drafter-vm/drafter/pkg/ram"
)

// background is work on an instance that nobody waits for but who ends it. The zero value does nothing. Instance.mu is held by who calls its methods.
type background struct {
	cancel context.CancelFunc // nil: nothing was begun
	done   sync.WaitGroup
}

// begin ends what goes on, and begins do.
func (b *background) begin(do func(context.Context)) {
	b.end()
	ctx, cancel := context.WithCancel(context.Background())
	b.cancel = cancel
	b.done.Go(func() { do(ctx) })
}

// end ends what goes on, and waits for it.
func (b *background) end() {
	if b.cancel != nil {
		b.cancel()
		b.done.Wait()
		b.cancel = nil
	}
}

// useHugePages has the memory of a guest that runs be in huge pages, if that is wanted, once all of it is here. A migration from here takes them
// apart; if it comes to nothing, the guest runs on and this is called again.
func (i *Instance) useHugePages() {
	if !i.cfg.Host.HugePages {
		return
	}
	memory, filler := i.memory, i.filler
	i.huge.begin(func(ctx context.Context) {
		if filler != nil {
			select {
			case <-filler.Done():
			case <-ctx.Done():
				return
			}
		}
		n, err := memory.Collapse(ctx)
		if err != nil && ctx.Err() == nil {
			i.log.Warn("the guest's memory is not all in huge pages", "bytes", n, "error", err)
		} else {
			i.log.Debug("memory in huge pages", "bytes", n)
		}
	})
}

// CheckHugePages reports why machines of this host can have no huge pages ([Host.HugePages]).
func CheckHugePages() error { return ram.HugePages() }
