package qemu

import (
	"context"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/drafter-vm/drafter/pkg/vmm"
)

// announceTimes are the pauses between the announcements of a guest that was loaded and runs. The first is the one that
// counts; a switch may lose it.
var announceTimes = []time.Duration{100 * time.Millisecond, 300 * time.Millisecond, time.Second}

// announcer tells the network where a guest is that comes by Load, in the guest's name: it sends frames by the guest's
// end of the tap device.
//
// QEMU's announce-self would do, were it not that it also has the guest announce its addresses, if the guest knows
// VIRTIO_NET_F_GUEST_ANNOUNCE. Nobody needs that, the address of the interface being the same as before, but for switches
// behind which the guest has VLANs, and they learn from its next frame. It is work, for all in the guest that watch its
// interfaces too, and right after a move, when every cache is cold and clients wait for answers, nothing is as dear as the
// guest's CPU.
type announcer struct {
	mac net.HardwareAddr

	mu sync.Mutex // guards fd
	fd int        // of the tap device, the queue that QEMU has; -1: closed
}

// newAnnouncer keeps the tap device open until close. The interface stays in use as long.
func newAnnouncer(tap *os.File, mac string) (*announcer, error) {
	address, err := net.ParseMAC(mac)
	if err != nil {
		return nil, err
	}
	fd, err := unix.FcntlInt(tap.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("duplicate the descriptor of interface %q: %w", tap.Name(), err)
	}
	return &announcer{mac: address, fd: fd}, nil
}

// close is idempotent. A nil announcer is closed.
func (a *announcer) close() {
	if a == nil {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.fd >= 0 {
		unix.Close(a.fd)
		a.fd = -1
	}
}

// discard empties the interface's queue, of which QEMU takes nothing while the machine waits. Until the guest is paused at
// its old place, what comes here is broadcasts and what switches flood: the guest gets it there.
func (a *announcer) discard() {
	a.mu.Lock()
	defer a.mu.Unlock()
	frame := make([]byte, 1<<16+64)
	for range 4096 { // a flood must not hold us up
		if n, err := unix.Read(a.fd, frame); n <= 0 || err != nil {
			return // EAGAIN: that was all
		}
	}
}

// announce sends the frame that hypervisors send after a move: a broadcast RARP request for the guest's own address
// (RFC 903), from which switches learn behind which port the guest is, and which all others ignore.
func (a *announcer) announce() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.fd < 0 {
		return fmt.Errorf("announce the guest on its network: %w", os.ErrClosed)
	}
	header, err := unix.IoctlGetInt(a.fd, unix.TUNGETVNETHDRSZ)
	if err != nil {
		return fmt.Errorf("announce the guest on its network: size of virtio headers: %w", err)
	}
	frame := make([]byte, header+60) // the least that an Ethernet frame has; a header of zeros asks for no offload
	copy(frame[header:], rarp(a.mac))
	if _, err := unix.Write(a.fd, frame); err != nil {
		return fmt.Errorf("announce the guest on its network: %w", err)
	}
	return nil
}

func rarp(mac net.HardwareAddr) []byte {
	frame := []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	frame = append(frame, mac...)
	frame = append(frame, 0x80, 0x35, 0, 1, 0x08, 0x00, 6, 4, 0, 3) // RARP: Ethernet and IPv4; "reverse request"
	frame = append(frame, mac...)
	frame = append(frame, 0, 0, 0, 0)
	frame = append(frame, mac...)
	return append(frame, 0, 0, 0, 0)
}

// Announce implements [vmm.Announcer].
func (m *machine) Announce() error {
	if m.announcer == nil {
		return nil // no network; or adopted: Resume announces it
	}
	m.announcer.discard()
	return m.announcer.announce()
}

var _ vmm.Announcer = (*machine)(nil)

// announceSelf has QEMU and the guest announce the guest, once: more rounds would go on while the machine is paused. That it
// cannot be announced is no reason to fail: the guest runs.
func (m *machine) announceSelf(ctx context.Context) {
	if err := m.qmp.execute(ctx, "announce-self", map[string]any{"initial": 50, "max": 550, "rounds": 1, "step": 100}, nil); err != nil {
		m.log.Warn("cannot announce the guest on its network", "error", err)
	}
}
