package runner

import (
	"context"
	"errors"
	"fmt"
	"os"
)

// ErrNotVoid is returned by OpenVoid for devices that are not what an unfinished migration has left.
var ErrNotVoid = errors.New("no unfinished migration has left this")

// Void is what is left of an instance whose reception was not finished, because its process died. It can never run; its
// source may be waiting to hear that. While it is open nobody else has the instance.
type Void struct {
	state *device
	owner *os.File
	id    string
}

// OpenVoid opens what an unfinished migration has left in the devices of cfg.
func OpenVoid(cfg Config) (_ *Void, err error) {
	v := &Void{}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("open what a migration has left: %w", err), v.Close())
		}
	}()
	for _, c := range cfg.Devices {
		if c.Name != StateDevice {
			continue
		}
		if _, err := os.Stat(c.recordFile()); errors.Is(err, os.ErrNotExist) {
			return v, ErrNotVoid
		}
		if v.state, err = openDevice(c, openExisting, 0, liveFiles{}); err != nil {
			return v, err
		}
		if v.owner, err = lockOwner(c); err != nil {
			return v, err
		}
		r, err := ReadRecord(v.state)
		if err != nil && !errors.Is(err, errNoRecord) {
			return v, err
		}
		if v.id = r.Migration; v.id != "" && (r.Status == Receiving || r.Status == Discarded) {
			return v, nil
		}
	}
	return v, ErrNotVoid
}

// Migration is the id, with its secret, of the migration that was not finished.
func (v *Void) Migration() string { return v.id }

// Refuse puts on record, durably, that what was received will never run here.
func (v *Void) Refuse(_ context.Context, migration string) error {
	return writeRecord(v.state, Record{Status: Discarded, Migration: migration})
}

// Close lets go of the devices.
func (v *Void) Close() error {
	var err error
	if v.state != nil {
		err = v.state.close()
	}
	if v.owner != nil {
		v.owner.Close() // nothing was written through it
	}
	return err
}
