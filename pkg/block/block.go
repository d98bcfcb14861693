package block

import (
	"context"
	"io"
)

// PageSize is the granularity, in bytes, of RAM tracking and the smallest block size a device may have.
const PageSize = 4096

// Device is a fixed-size array of bytes, the unit a VM is made of and that a migration moves.
//
// Every method may be called concurrently with every other one. Overlapping concurrent writes leave one of the written
// values in each byte, with no promise which. All implementations must pass [blocktest.Run].
//
// [blocktest.Run]: https://pkg.go.dev/github.com/drafter-vm/drafter/pkg/block/blocktest#Run
type Device interface {
	// ReadAt fills p from offset off. Reads of any offset and length within the device succeed whole; a read that
	// crosses the end returns the bytes there are and io.EOF. Bytes never written read as zero.
	io.ReaderAt

	// WriteAt writes all of p at offset off. A write that would cross the end of the device writes nothing and fails.
	// Data is durable only after a later Flush has returned nil.
	io.WriterAt

	// Size is the length of the device in bytes. It never changes.
	Size() int64

	// Discard declares that the contents of [off, off+n) are no longer needed: the range reads as zero afterwards, and
	// the space behind it is freed where the implementation can. Any offset and length within the device are allowed.
	Discard(off, n int64) error

	// Flush returns once everything written or discarded before the call is durable, as far as the device has
	// durability at all (RAM has none).
	Flush() error

	// Close flushes, then releases what the device holds. Calls made after Close fail with an error that wraps
	// [os.ErrClosed]; a second Close returns nil.
	io.Closer
}

// Range is the half-open interval of bytes [Offset, Offset+Length) of a device.
type Range struct {
	Offset int64 // bytes
	Length int64 // bytes, > 0
}

// End is the first byte after the range.
func (r Range) End() int64 { return r.Offset + r.Length }

// Extents is implemented by devices that know cheaply where they certainly hold only zeros.
type Extents interface {
	// NextData returns the first range at or after off that may hold non-zero bytes, clipped to the device. It returns
	// io.EOF when there is none. The bytes between off and the range read as zero at the time of the call.
	NextData(off int64) (Range, error)
}

// Tracker records which parts of a device were written. It is how pre-copy learns what to send again: disks have one in
// their write path ([Tracked]), RAM has the kernel's write protection.
//
// Start, Collect and Stop are called by one goroutine at a time; writes to the device go on meanwhile.
type Tracker interface {
	// Start begins tracking with nothing recorded. A write that completes after Start has returned is reported by a
	// Collect. Start on a tracker that runs is an error.
	Start(ctx context.Context) error

	// Collect returns what was written since Start or the previous Collect, in ascending order, without overlaps, and
	// forgets it, in one atomic step per range: a write that lands after a range was collected is in the next Collect.
	// Therefore copy *after* Collect, never before. Ranges may cover more than was written, never less, and are aligned
	// to PageSize except at the end of the device.
	Collect(ctx context.Context) ([]Range, error)

	// Stop ends tracking and its costs. It is a no-op on a tracker that does not run.
	Stop() error
}
