package faults

import (
	"sync/atomic"

	"github.com/drafter-vm/drafter/pkg/block"
)

// Device is a device that answers as a test wants it to. A nil function is the device's own answer.
type Device struct {
	block.Device
	Read     func(n int64, p []byte, off int64) (int, error) // n counts the calls from 1
	Write    func(n int64, p []byte, off int64) (int, error)
	Sync     func(n int64) error
	Forget   func(n int64, off, length int64) error
	Next     func(n int64, off int64) (block.Range, error)
	Length   int64 // when not 0
	reads    atomic.Int64
	writes   atomic.Int64
	syncs    atomic.Int64
	forgets  atomic.Int64
	searches atomic.Int64
}

var (
	_ block.Device  = (*Device)(nil)
	_ block.Extents = (*Device)(nil)
)

// ReadAt implements block.Device.
func (d *Device) ReadAt(p []byte, off int64) (int, error) {
	if n := d.reads.Add(1); d.Read != nil {
		return d.Read(n, p, off)
	}
	return d.Device.ReadAt(p, off)
}

// WriteAt implements block.Device.
func (d *Device) WriteAt(p []byte, off int64) (int, error) {
	if n := d.writes.Add(1); d.Write != nil {
		return d.Write(n, p, off)
	}
	return d.Device.WriteAt(p, off)
}

// Discard implements block.Device.
func (d *Device) Discard(off, length int64) error {
	if n := d.forgets.Add(1); d.Forget != nil {
		return d.Forget(n, off, length)
	}
	return d.Device.Discard(off, length)
}

// Flush implements block.Device.
func (d *Device) Flush() error {
	if n := d.syncs.Add(1); d.Sync != nil {
		return d.Sync(n)
	}
	return d.Device.Flush()
}

// NextData implements block.Extents.
func (d *Device) NextData(off int64) (block.Range, error) {
	if n := d.searches.Add(1); d.Next != nil {
		return d.Next(n, off)
	}
	return block.NextData(d.Device, off)
}

// Size implements block.Device.
func (d *Device) Size() int64 {
	if d.Length != 0 {
		return d.Length
	}
	return d.Device.Size()
}
