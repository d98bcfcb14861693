package serve

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"sync"
)

// Answers is conn for a ttrpc client, which makes one call with one answer at a time of each number. It ends at the first frame that answers
// none: ttrpc would write a line into the process's log for each, as fast as the other side sends them.
func Answers(conn net.Conn) net.Conn {
	return &answers{Conn: conn, asked: make(map[uint32]bool)}
}

type answers struct {
	net.Conn
	in, out frames // of the goroutine that reads, and of that which writes

	mu    sync.Mutex // guards what follows
	asked map[uint32]bool
}

func (a *answers) Read(p []byte) (int, error) {
	n, err := a.Conn.Read(p)
	if e := a.in.pass(p[:n], a.answered); e != nil {
		a.Close()
		return 0, io.EOF // the one end that a client does not write about
	}
	return n, err
}

func (a *answers) answered(header []byte) error {
	stream := binary.BigEndian.Uint32(header[4:8])
	a.mu.Lock()
	defer a.mu.Unlock()
	if header[8] != kindResponse || !a.asked[stream] {
		return fmt.Errorf("a message of kind %d with the number %d, to which there is no call", header[8], stream)
	}
	delete(a.asked, stream)
	return nil
}

func (a *answers) Write(p []byte) (int, error) {
	err := a.out.pass(p, func(header []byte) error {
		if header[8] == kindRequest {
			a.mu.Lock()
			defer a.mu.Unlock()
			a.asked[binary.BigEndian.Uint32(header[4:8])] = true
		}
		return nil
	})
	if err != nil {
		return 0, err
	}
	return a.Conn.Write(p)
}

// frames follows frames that pass by in pieces.
type frames struct {
	header [headerSize]byte
	have   int   // bytes of header
	rest   int64 // bytes of the payload that are to come
}

// pass calls begun with the header of each frame that begins in p, or before it.
func (f *frames) pass(p []byte, begun func(header []byte) error) error {
	for len(p) > 0 {
		if f.rest > 0 {
			n := min(int64(len(p)), f.rest)
			p = p[n:]
			f.rest -= n
			continue
		}
		n := copy(f.header[f.have:], p)
		f.have += n
		p = p[n:]
		if f.have == headerSize {
			f.have, f.rest = 0, int64(binary.BigEndian.Uint32(f.header[:4]))
			if err := begun(f.header[:]); err != nil {
				return err
			}
		}
	}
	return nil
}
