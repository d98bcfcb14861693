package runner

import "github.com/drafter-vm/drafter/pkg/ram"

// FillStats tells how the lazy filling of the guest's memory goes, or went; false when its memory is not filled lazily.
func (i *Instance) FillStats() (ram.FillStats, bool) {
	if i.filler == nil {
		return ram.FillStats{}, false
	}
	return i.filler.Stats(), true
}
