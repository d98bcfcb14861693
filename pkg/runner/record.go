package runner

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"strings"
	"time"

	"github.com/zeebo/xxh3"

	"github.com/drafter-vm/drafter/pkg/block"
)

// StateDeviceSize is the size of a state device in bytes. Device state is 55 to 400 KiB for the machines we know; the
// rest of the device is a hole.
const StateDeviceSize = 16 << 20

// Status says who may run an instance, and from what.
//
//	            ┌──────── Close ────────┐
//	            ▼                       │
//	Saved ─ resume ─► Running ──────────┘
//	                  Running ─ commit of a migration ─► Moved, then Confirmed, then Settled
//	                                                     Moved ─ it never ran there ─► Running, or Saved if it was closed
//	                  Running ─ the guest shuts down ─► ShutDown ─ boot ─► Running
//	                  Running, with Kept ─ rollback of a dead instance ─► Saved
//	(any) ─ receive ─► Receiving ─ commit arrives ─► Running
//	                   Receiving ─ abort ─► Discarded
//
// It is the first field of the state device, so that it lies where the instance's data lies and travels with its files.
// The instance that is in the hands of a living process is locked besides (see block.Overlay and block.File).
type Status uint32

const (
	// Saved: the device state, the memory and the disks belong together; the instance can be resumed from them.
	Saved Status = 1 + iota
	// Running: a machine runs, or ran when its host died. Then the memory on disk is older than the disks, and the
	// instance can only boot again from its disks.
	Running
	// Receiving: a migration into these devices was begun and not finished. They hold nothing of use.
	Receiving
	// Moved: the instance was handed to another peer, which owns it now. Running it here would make a second owner.
	Moved
	// Discarded: a migration into these devices was given up. They hold nothing of use.
	Discarded
	// ShutDown: the guest shut down, or rebooted, by itself. There is no memory to resume; the disks are whole.
	ShutDown
)

func (s Status) String() string {
	switch s {
	case Saved:
		return "saved"
	case Running:
		return "running"
	case Receiving:
		return "receiving"
	case Moved:
		return "moved"
	case Discarded:
		return "discarded"
	case ShutDown:
		return "shut down"
	}
	return fmt.Sprintf("status %d", uint32(s))
}

// ErrNotSaved is returned when an instance is to be resumed whose state device does not hold a saved state that belongs to
// its memory and disks. The message says which status it has and what can be done.
var ErrNotSaved = errors.New("instance holds no saved state")

// Record is the header of a state device: the instance's status and where its device state lies.
type Record struct {
	Status    Status    // where the instance stands
	Migration string    // id of the migration that the status comes from, with its secret, at most 64 bytes; empty if none
	Time      time.Time // when it was written; of one that is Kept, when the guest began to run from the commit point
	Length    int64     // bytes of device state that follow; 0 if there is none
	Sum       uint64    // xxh3 of the device state

	// Settled says of an instance that moved that the other peer runs it, and needs nothing of this one.
	Settled bool

	// Confirmed says of an instance that moved that the other peer has said that it runs it. Until it is Settled, that one may need
	// content which is only here.
	Confirmed bool

	// Shared says of an instance that moved that the other peer, on this host, was given its memory itself: what was saved of it here is
	// what the other has made of it, unless it never ran there.
	Shared bool

	// Kept says of an instance that runs that it can return to its commit point: the device state that follows, memory as it is
	// in its device, and the disks without their layers.
	Kept bool

	// Layered says that the disks have layers which are a part of them, if their files are there. Otherwise such files are void.
	Layered bool
}

// Layout of the header, little endian, padded to one page:
//
//	  0  8  magic "DRFTSTA1"
//	  8  4  status
//	 12  4  flags; bit 0: settled, bit 1: kept, bit 2: layered, bit 3: confirmed, bit 4: shared
//	 16  8  time, Unix nanoseconds
//	 24  8  length of the device state, which begins at recordSize
//	 32  8  xxh3-64 of the device state
//	 40 64  migration id, padded with zeros
//	104  4  crc32c of bytes 0–103
const (
	recordMagic  = "DRFTSTA1"
	recordSize   = block.PageSize
	recordSum    = 104
	maxMigration = 64
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func (r Record) encode() []byte {
	b := make([]byte, recordSize)
	copy(b, recordMagic)
	binary.LittleEndian.PutUint32(b[8:], uint32(r.Status))
	binary.LittleEndian.PutUint32(b[12:], uint32(btoi(r.Settled)|btoi(r.Kept)<<1|btoi(r.Layered)<<2|btoi(r.Confirmed)<<3|btoi(r.Shared)<<4))
	binary.LittleEndian.PutUint64(b[16:], uint64(r.Time.UnixNano()))
	binary.LittleEndian.PutUint64(b[24:], uint64(r.Length))
	binary.LittleEndian.PutUint64(b[32:], r.Sum)
	copy(b[40:40+maxMigration], r.Migration)
	binary.LittleEndian.PutUint32(b[recordSum:], crc32.Checksum(b[:recordSum], castagnoli))
	return b
}

// errNoRecord says that a device does not begin with a record.
var errNoRecord = errors.New("not a drafter state device (wrong magic)")

func decodeRecord(b []byte) (Record, error) {
	if len(b) < recordSize || string(b[:8]) != recordMagic {
		return Record{}, errNoRecord
	}
	if got, want := crc32.Checksum(b[:recordSum], castagnoli), binary.LittleEndian.Uint32(b[recordSum:]); got != want {
		return Record{}, fmt.Errorf("state header is corrupt: checksum %08x, want %08x", got, want)
	}
	r := Record{
		Status:    Status(binary.LittleEndian.Uint32(b[8:])),
		Settled:   binary.LittleEndian.Uint32(b[12:])&1 != 0,
		Kept:      binary.LittleEndian.Uint32(b[12:])&2 != 0,
		Layered:   binary.LittleEndian.Uint32(b[12:])&4 != 0,
		Confirmed: binary.LittleEndian.Uint32(b[12:])&8 != 0,
		Shared:    binary.LittleEndian.Uint32(b[12:])&16 != 0,
		Time:      time.Unix(0, int64(binary.LittleEndian.Uint64(b[16:]))),
		Length:    int64(binary.LittleEndian.Uint64(b[24:])),
		Sum:       binary.LittleEndian.Uint64(b[32:]),
		Migration: string(bytes.TrimRight(b[40:40+maxMigration], "\x00")),
	}
	if r.Status < Saved || r.Status > ShutDown {
		return Record{}, fmt.Errorf("state header has unknown %s", r.Status)
	}
	if r.Length < 0 || r.Length > StateDeviceSize-recordSize {
		return Record{}, fmt.Errorf("state header gives a device state of %d bytes, a state device holds %d", r.Length, StateDeviceSize-recordSize)
	}
	return r, nil
}

// ReadRecord reads the header of a state device.
func ReadRecord(dev block.Device) (Record, error) {
	b := make([]byte, recordSize)
	if _, err := dev.ReadAt(b, 0); err != nil && err != io.EOF {
		return Record{}, fmt.Errorf("read state header: %w", err)
	}
	return decodeRecord(b)
}

// writeRecord makes r the durable header of a state device. A zero time is the present.
func writeRecord(dev block.Device, r Record) error {
	if r.Time.IsZero() {
		r.Time = time.Now()
	}
	if _, err := dev.WriteAt(r.encode(), 0); err != nil {
		return fmt.Errorf("write state header %q: %w", r.Status, err)
	}
	if err := dev.Flush(); err != nil {
		return fmt.Errorf("flush state header %q: %w", r.Status, err)
	}
	return nil
}

// WriteSaved makes state the device's content, with status Saved. The memory and the disks it belongs to must be durable
// before the call: the header is what makes them an instance.
func WriteSaved(dev block.Device, state []byte) error {
	return writeState(dev, Record{Status: Saved}, state)
}

// writeState writes device state and then, once that is durable, its header r.
func writeState(dev block.Device, r Record, state []byte) error {
	if int64(len(state)) > dev.Size()-recordSize {
		return fmt.Errorf("device state of %d bytes does not fit the state device of %d", len(state), dev.Size())
	}
	if _, err := dev.WriteAt(state, recordSize); err != nil {
		return fmt.Errorf("write device state: %w", err)
	}
	if err := dev.Flush(); err != nil {
		return fmt.Errorf("flush device state: %w", err)
	}
	r.Length, r.Sum = int64(len(state)), xxh3.Hash(state)
	return writeRecord(dev, r)
}

// ReadSaved returns the device state of a state device with status Saved. With force it also takes an instance that was
// given away, if it was saved after that; see [Config.ForceOwner].
func ReadSaved(dev block.Device, force bool) ([]byte, error) {
	r, err := ReadRecord(dev)
	if err != nil {
		return nil, err
	}
	if r.Status != Saved && !(force && r.Status == Moved && r.Length > 0 && !r.Settled && !r.Confirmed && !r.Shared) {
		return nil, r.mark(fmt.Errorf("%w: %s", ErrNotSaved, r.remedy()))
	}
	return readState(dev, r)
}

// readState returns the device state that a record speaks of.
func readState(dev block.Device, r Record) ([]byte, error) {
	state := make([]byte, r.Length)
	if _, err := dev.ReadAt(state, recordSize); err != nil && err != io.EOF {
		return nil, fmt.Errorf("read device state: %w", err)
	}
	if xxh3.Hash(state) != r.Sum {
		return nil, errors.New("device state is corrupt: its checksum does not match the header")
	}
	return state, nil
}

// remedy says what a status that is not Saved means, and what its owner can do.
func (r Record) remedy() string {
	at := r.Time.UTC().Format(time.RFC3339)
	switch r.Status {
	case Running:
		return "it was running at " + at + " and was not closed (its process or host died), so its memory is older than its disks: start it with --boot to boot it again from its disks, " + r.orRollBack() + "or delete its overlays (without overlays: make or extract the package anew) to start from the package"
	case ShutDown:
		if r.Migration != "" {
			return fmt.Sprintf("its guest shut down at %s, when not all of its disks had arrived here (migration %s): boot it again with --boot, and with --raddr, as what they lack is at the peer that it came from", at, shown(r.Migration))
		}
		return "its guest shut down at " + at + ": boot it again with --boot"
	case Receiving, Discarded:
		return "a migration into it, begun at " + at + ", did not finish: receive it again, or delete its overlays"
	case Moved:
		given := fmt.Sprintf("it was given to another peer at %s (migration %s), which did not confirm that it runs it", at, shown(r.Migration))
		switch {
		case r.Settled:
			return fmt.Sprintf("it moved to another peer at %s (migration %s), which owns it: receive it back, or delete its overlays to start from the package", at, shown(r.Migration))
		case r.Confirmed:
			return fmt.Sprintf("it moved to another peer at %s (migration %s), which runs it and had not got all of its content when this peer ended: start it again with the command line that it had (--laddr, or --control and drafter ctl migrate), so that the other finds these files; what it lacks is nowhere else", at, shown(r.Migration))
		case r.Shared:
			return given + ", and has its memory, which it may have changed: start it again with the command line that it had (--laddr, or --control and drafter ctl migrate), so that the other can be met and asked; or if you know that it does not run it and never will, boot it from its disks with drafter peer --boot --force-owner"
		case r.Length > 0:
			return given + ": start it again with the command line that it had (--laddr, or --control and drafter ctl migrate), so that the other can be met and asked; or if you know that it does not run it and never will, take it back with drafter peer --force-owner"
		}
		return given + ", and its memory here is lost: start it again with the command line that it had (--laddr, or --control and drafter ctl migrate), so that the other can be met and asked; or if you know that it does not run it and never will, boot it from its disks with drafter peer --boot --force-owner"
	}
	return r.Status.String()
}

// shown is what of a migration's id is for everybody: what follows a dot is its secret.
func shown(migration string) string {
	public, _, _ := strings.Cut(migration, ".")
	return public
}

// orRollBack offers to return to the commit point, if it is there.
func (r Record) orRollBack() string {
	if r.Kept {
		return "with --rollback to return to what it was when it began to run then, "
	}
	return ""
}

// limitedBuffer collects device state and refuses more than fits a state device, so that a machine that goes wild ends in
// an error rather than in our memory.
type limitedBuffer struct{ b []byte }

func (l *limitedBuffer) Write(p []byte) (int, error) {
	if len(l.b)+len(p) > StateDeviceSize-recordSize {
		return 0, fmt.Errorf("device state exceeds the %d bytes a state device holds", StateDeviceSize-recordSize)
	}
	l.b = append(l.b, p...)
	return len(p), nil
}
