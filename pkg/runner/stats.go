package runner

import (
	"time"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/ram"
)

// FillStats tells how the lazy filling of the guest's memory goes, or went; false when its memory is not filled lazily.
func (i *Instance) FillStats() (ram.FillStats, bool) {
	if i.filler == nil {
		return ram.FillStats{}, false
	}
	return i.filler.Stats(), true
}

// timedFlush tells of each Flush.
type timedFlush struct {
	block.Device
	flushed func(took time.Duration, err error)
}

func (d timedFlush) NextData(off int64) (block.Range, error) { return block.NextData(d.Device, off) }

func (d timedFlush) Flush() error {
	began := time.Now()
	err := d.Device.Flush()
	d.flushed(time.Since(began), err)
	return err
}
