package ram

import (
	"testing"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/block/blocktest"
)

func TestDevice(t *testing.T) {
	checkLeaks(t)
	t.Run("alone", func(t *testing.T) {
		blocktest.Run(t, func(t *testing.T) block.Device { return create(t, 1<<20).Device() })
	})
	// A device that is being filled by what it could be asked for at any time is a device like any other.
	content := contents(1<<20, 5)
	for name, fill := range map[string]func(t *testing.T, mem *Memory){
		"filling": func(t *testing.T, mem *Memory) { startFill(t, mem, newSource(content), FillOptions{}) },
		"filling on demand": func(t *testing.T, mem *Memory) {
			startFill(t, mem, newSource(content), FillOptions{OnDemand: true})
		},
		"receiving": func(t *testing.T, mem *Memory) {
			requests := make(chan int64, mem.Size()/pageSize)
			f, err := mem.Receive(t.Context(), func(off int64) { requests <- off }, FillOptions{})
			if err != nil {
				t.Fatal(err)
			}
			done := make(chan struct{})
			go func() {
				defer close(done)
				for {
					select {
					case off := <-requests:
						if err := f.Deliver(off, content[off:off+pageSize]); err != nil {
							t.Error(err)
						}
					case <-f.Done():
						return
					}
				}
			}()
			t.Cleanup(func() { f.abort(t.Context().Err()); <-done })
		},
	} {
		t.Run(name, func(t *testing.T) {
			blocktest.Run(t, func(t *testing.T) block.Device {
				mem := create(t, 1<<20)
				fill(t, mem)
				return mem.Device()
			}, blocktest.Content(content))
		})
	}
}
