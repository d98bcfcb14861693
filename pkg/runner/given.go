package runner

import (
	"context"
	"errors"
	"fmt"
	"os"
)

// ErrGiven is wrapped by the errors of Resume, Boot, Prepare and CheckVacant which say that the instance was given to another
// peer, which has not confirmed that it needs nothing of it any more: see [OpenGiven]. It says so by errors.Is, not in the text.
var ErrGiven = errors.New("instance was given to another peer, which may need it")

// given reports whether the instance was given to another peer that may need it, or may not have it.
func (r Record) given() bool { return r.Status == Moved && !r.Settled }

// mark makes err wrap ErrGiven if r is the reason for that.
func (r Record) mark(err error) error {
	if r.given() {
		return givenError{err}
	}
	return err
}

type givenError struct{ error }

func (e givenError) Unwrap() error { return e.error }
func (givenError) Is(t error) bool { return t == ErrGiven }

// ErrNotGiven is returned by OpenGiven for devices that hold no instance which another peer may need or give back.
var ErrNotGiven = errors.New("the instance was not given away, or is not needed any more")

// Given is an instance that was given to another peer and has no machine here any more, because this peer was closed, or died
// together with it. Its files may hold what the other peer has not got; and the other may never have run it.
//
// Its disks are those of the moment at which it was given away, as the machine had flushed them by then. Its memory is there if
// the peer was closed in order. While a Given is open nobody else has the instance. Its methods are not to be called
// concurrently, except for those of its devices.
type Given struct {
	at     *Instance // the devices; there is no machine
	owner  *os.File  // holds the lock on the instance
	record Record
}

// OpenGiven opens an instance that was given away. Of cfg, the devices and the logger are used, and the backend, which may be nil, to
// remove what its machine has left. Where there is none the
// error wraps ErrNotGiven; where it has a living machine, which Adopt takes over, ErrAlive.
func OpenGiven(ctx context.Context, cfg Config) (_ *Given, err error) {
	cfg = cfg.withDefaults()
	g := &Given{at: &Instance{cfg: cfg, log: cfg.Logger}}
	defer func() {
		if err != nil {
			err = fmt.Errorf("open instance that was given away: %w", errors.Join(err, g.Close()))
		}
	}()
	if err := CheckDevices(cfg.Devices); err != nil {
		return nil, err
	}
	state := DeviceConfig{}
	for _, c := range cfg.Devices {
		if c.Name == StateDevice {
			state = c
		}
	}
	if _, err := os.Stat(state.recordFile()); err != nil {
		return nil, ErrNotGiven
	}
	if err := g.open(state); err != nil {
		return nil, err
	}
	if g.owner, err = lockOwner(state); err != nil {
		return nil, err
	}
	if g.record, err = ReadRecord(g.state()); errors.Is(err, errNoRecord) || err == nil && !g.record.given() {
		return nil, ErrNotGiven
	} else if err != nil {
		return nil, err
	}
	for _, c := range cfg.Devices {
		if c.Name == StateDevice {
			continue
		}
		if err := g.open(c); err != nil {
			return nil, err
		}
	}
	g.at.reapAll()
	if err := g.at.foldLayers(ctx); err != nil {
		return nil, err
	}
	if g.record.Layered {
		g.record.Layered = false
		if err := writeRecord(g.state(), g.record); err != nil {
			return nil, err
		}
	}
	return g, nil
}

// open opens a device, all of whose files must be there: without its overlay it would be another.
func (g *Given) open(c DeviceConfig) error {
	d, err := openDevice(c, openExisting, 0, liveFiles{})
	if err != nil {
		return err
	}
	if len(d.created) > 0 {
		return errors.Join(fmt.Errorf("device %q: its file %q is gone, and with it what the instance had written", c.Name, d.created[0]), d.discard())
	}
	g.at.devices = append(g.at.devices, d)
	return nil
}

func (g *Given) state() *device { return g.at.device(StateDevice) }

// Kept reports whether the other peer may have the instance still: it is false after Settle and Reclaim.
func (g *Given) Kept() bool { return g.record.given() }

// Migration is the id, with its secret, of the migration that the instance was given away by.
func (g *Given) Migration() string { return g.record.Migration }

// Confirmed reports whether the other peer has said that it runs the instance. Then it lacked some of its content.
func (g *Given) Confirmed() bool { return g.record.Confirmed }

// Saved reports whether memory and device state are here. Otherwise they are lost, and there are only disks.
func (g *Given) Saved() bool { return g.record.Length > 0 }

// Devices are those of [Instance.Devices]; the block device of memory holds the guest's only if it is Saved.
func (g *Given) Devices() []Device {
	var out []Device
	for _, d := range g.at.devices {
		if d.Name != StateDevice {
			out = append(out, Device{Config: d.DeviceConfig, Block: d.Device})
		}
	}
	return out
}

// Confirm is [Instance.Confirm].
func (g *Given) Confirm() error {
	r := g.record
	r.Confirmed = true
	return g.write(r)
}

// Settle puts on record that the other peer runs the instance and needs nothing of it any more: what is here is of no use.
func (g *Given) Settle() error {
	return g.write(Record{Status: Moved, Migration: g.record.Migration, Settled: true})
}

// Reclaim puts on record that the instance belongs here: saved, or as a power loss leaves it. Only whoever knows that the other
// peer will never run it may call it.
func (g *Given) Reclaim() error {
	r := Record{Status: Running}
	if g.Saved() {
		r = Record{Status: Saved, Length: g.record.Length, Sum: g.record.Sum}
	}
	return g.write(r)
}

func (g *Given) write(r Record) error {
	if err := writeRecord(g.state(), r); err != nil {
		return err
	}
	g.record = r
	return nil
}

// Close lets go of the devices.
func (g *Given) Close() error {
	var errs []error
	for _, d := range g.at.devices {
		errs = append(errs, d.close())
	}
	closeFiles(g.owner)
	g.at.devices, g.owner = nil, nil
	return errors.Join(errs...)
}
