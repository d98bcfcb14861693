package peer

import (
	"fmt"
	"sync"
)

// ender is what a [vmm.Machine] says of its end.
type ender interface {
	Done() <-chan struct{}
	Err() error
}

// watch calls failed when a machine ends that waits for its guest, until stop, which is idempotent and returns when failed has or will
// not be called. Without it, everything would be sent to a machine that died meanwhile, and the guest be paused for it.
func watch(m ender, failed func(error)) (stop func()) {
	stopped := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		select {
		case <-stopped:
		case <-m.Done():
			failed(fmt.Errorf("the machine that waited for the guest has ended: %w", orNone(m.Err())))
		}
	})
	var once sync.Once
	return func() {
		once.Do(func() { close(stopped) })
		wg.Wait()
	}
}

// orNone is err, or an error that says that there is no reason.
func orNone(err error) error {
	if err == nil {
		return fmt.Errorf("it does not say why")
	}
	return err
}
