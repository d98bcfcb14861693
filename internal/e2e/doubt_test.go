package e2e

import (
	"io"
	"net"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/drafter-vm/drafter/pkg/wire"
)

// commitThief is a proxy to a peer that swallows the first commit frame, and calls stolen instead of passing it on. With pushes,
// it is the source that comes; otherwise the peer is.
func commitThief(t *testing.T, peer string, pushes bool, stolen func()) (addr string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var once sync.Once
	var wg sync.WaitGroup
	t.Cleanup(func() { l.Close(); wg.Wait() })
	pipe(l, peer, pushes, &wg, func(to, from net.Conn) {
		if _, err := io.CopyN(to, from, wire.PrefaceSize); err != nil {
			return
		}
		for r := wire.NewReader(from); ; {
			h, err := r.Next()
			if err != nil {
				return
			}
			payload := make([]byte, h.Length)
			if err := r.Payload(payload); err != nil {
				return
			}
			steal := false
			if h.Type == wire.TypeCommit {
				once.Do(func() { steal = true })
			}
			if steal {
				stolen()
				return
			}
			if _, err := to.Write(wire.Append(nil, h, payload)); err != nil {
				return
			}
		}
	})
	return l.Addr().String()
}

// TestCommandDoubt kills a destination to which the commit is on its way. Its source cannot know whether it arrived, and
// keeps the VM paused, until the destination is started again and says that it did not.
func TestCommandDoubt(t *testing.T) {
	t.Parallel()
	w := newWorkshop(t)
	w.pack(t)
	addr := freePort(t)
	src := w.start(t, w.console, w.peer("package", "here", "--laddr", addr)...)
	src.waitFor(t, "Serving on ")
	w.do(t, "mem start 32")
	w.do(t, "disk disk start 4096")

	victim := make(chan *command, 1)
	link := commitThief(t, addr, false, func() {
		c := <-victim
		c.Process.Signal(syscall.SIGKILL)
		<-c.done
	})
	destination := func() *command {
		return w.start(t, nil, w.peer("package", "there", "--raddr", link)...)
	}
	dst := destination()
	victim <- dst
	dst.wait(t, -1)
	src.waitFor(t, "trying to meet again")
	dst = destination()
	src.waitFor(t, "the VM runs on here") // and says why
	dst.waitFor(t, "Received VM")
	src.wait(t, 0)
	if said := dst.said(); !strings.Contains(said, "was not completed here") {
		t.Errorf("the destination does not say that it told the source:\n%s", said)
	}
	dst.Process.Signal(syscall.SIGTERM)
	dst.wait(t, 0)

	c := w.start(t, w.console, w.peer("package", "there")...)
	c.waitFor(t, "Resumed VM")
	w.do(t, "mem stop")
	w.do(t, "mem verify")
	w.do(t, "disk disk verify")
	c.Process.Signal(syscall.SIGTERM)
	c.wait(t, 0)
	w.checkClean(t)
}
