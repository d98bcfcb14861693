package flow

import (
	"container/list"
	"net"
	"sync"
)

// maxDoors bounds how many connections may be on their way to prove who they are; each holds 330 KiB meanwhile.
const maxDoors = 64

// doors are connections whose other ends have not proven yet who they are. When there are too many, the one that has been at it for longest
// makes room: another place of the VM needs a round trip or two, so that those who only stand there keep nobody out.
type doors struct {
	mu sync.Mutex // guards in, and the doors' at
	in list.List  // of *door, the oldest first
}

type door struct {
	conn net.Conn
	at   *list.Element // nil: it has left
}

func (d *doors) enter(conn net.Conn) *door {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.in.Len() == maxDoors {
		oldest := d.in.Remove(d.in.Front()).(*door)
		oldest.at = nil
		oldest.conn.Close()
	}
	one := &door{conn: conn}
	one.at = d.in.PushBack(one)
	return one
}

// leave reports whether one was still there, and so is still open.
func (d *doors) leave(one *door) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if one.at == nil {
		return false
	}
	d.in.Remove(one.at)
	one.at = nil
	return true
}
