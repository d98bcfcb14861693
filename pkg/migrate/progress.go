package migrate

import (
	"sync"
	"time"
)

const progressInterval = 200 * time.Millisecond

// meter calls a Progress function, one call at a time.
type meter struct {
	take func() Progress
	tell func(Progress) // may be nil

	mu sync.Mutex // held during a call of tell
}

func (m *meter) report() {
	if m.tell == nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.tell(m.take())
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
