package migrate

import (
	"fmt"
	"io"

	"github.com/drafter-vm/drafter/pkg/block"
)

// blank stands for a device that the other side has itself, of this size: to whoever reads it, it is zeros, and nobody has anything to
// write to it.
type blank int64

var _ block.Extents = blank(0)

func (b blank) Size() int64                         { return int64(b) }
func (b blank) NextData(int64) (block.Range, error) { return block.Range{}, io.EOF }
func (b blank) Discard(off, n int64) error          { return nil }
func (b blank) Flush() error                        { return nil }
func (b blank) Close() error                        { return nil }

func (b blank) ReadAt(p []byte, off int64) (int, error) {
	if off >= int64(b) {
		return 0, io.EOF
	}
	n := int(min(int64(len(p)), int64(b)-off))
	clear(p[:n])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (b blank) WriteAt(p []byte, off int64) (int, error) {
	return 0, fmt.Errorf("%d bytes at %d of a device that is shared, of which nothing is to come", len(p), off)
}
