package blueprint

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
)

// arReader reads the members of a common ar archive, the outer format of a .deb: an 8-byte magic, then per member a
// 60-byte header (name 16, mtime 12, uid 6, gid 6, mode 8, size 10, "`\n") and the data, padded to an even length.
type arReader struct {
	r    io.ReaderAt
	off  int64
	size int64 // of the whole archive
}

const arMagic = "!<arch>\n"

var errNotAr = errors.New("not an ar archive")

func newArReader(r io.ReaderAt, size int64) (*arReader, error) {
	var magic [len(arMagic)]byte
	if _, err := r.ReadAt(magic[:], 0); err != nil || string(magic[:]) != arMagic {
		return nil, errNotAr
	}
	return &arReader{r: r, off: int64(len(arMagic)), size: size}, nil
}

// next returns the next member, io.EOF after the last.
func (a *arReader) next() (name string, data *io.SectionReader, err error) {
	if a.off >= a.size {
		return "", nil, io.EOF
	}
	var h [60]byte
	if _, err := a.r.ReadAt(h[:], a.off); err != nil {
		return "", nil, fmt.Errorf("read ar header at %d: %w", a.off, io.ErrUnexpectedEOF)
	}
	if !bytes.Equal(h[58:], []byte("`\n")) {
		return "", nil, fmt.Errorf("ar header at %d has no end mark", a.off)
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(h[48:58])), 10, 64)
	if err != nil || n < 0 || n > a.size-a.off-60 {
		return "", nil, fmt.Errorf("ar member at %d claims %q bytes, %d are left", a.off, h[48:58], a.size-a.off-60)
	}
	data = io.NewSectionReader(a.r, a.off+60, n)
	a.off += 60 + n + n&1
	return strings.TrimSuffix(strings.TrimSpace(string(h[:16])), "/"), data, nil
}
