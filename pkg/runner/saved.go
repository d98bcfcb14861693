package runner

import (
	"time"

	"github.com/drafter-vm/drafter/pkg/block"
)

// WriteReceived makes state the device's content, with status Saved, and names the migration that brought the instance:
// the commit of one that is written down, not run. The memory and the disks must be durable before the call.
func WriteReceived(dev block.Device, migration string, state []byte) error {
	return writeState(dev, Record{Status: Saved, Migration: migration}, state)
}

// WriteRecord makes r, at the present time, the durable header of a state device. The device state behind it stays: r says
// its length and sum again, or loses it.
func WriteRecord(dev block.Device, r Record) error {
	r.Time = time.Time{}
	return writeRecord(dev, r)
}
