package testnet

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Guest is what a virtual machine is to a network, without one: a network namespace NAME-guest whose interface eth0 is connected to the
// tap of another namespace, as a VMM connects its guest's. It can be paused, and moved to another tap. What runs in its namespace is
// "in the guest", and notices no more of a move than a program in a virtual machine.
type Guest struct {
	namespace string
	inner     *os.File // the other end of eth0

	mu    sync.Mutex // guards what follows
	outer *os.File   // the other end of the tap that it is connected to; nil: none
	pumps *sync.WaitGroup
}

// NewGuest makes a guest that is connected to nothing, with the addresses that every guest has, and the MAC address mac (nil:
// DefaultGuestMAC). It is removed when the test ends.
func NewGuest(t testing.TB, name string, mac net.HardwareAddr) *Guest {
	t.Helper()
	if mac == nil {
		mac = DefaultGuestMAC
	}
	g := &Guest{namespace: name + "-guest", pumps: new(sync.WaitGroup)}
	if err := removeNamespace(g.namespace); err != nil {
		t.Fatal(err)
	}
	if err := newNamespace(g.namespace); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		g.Pause()
		if g.inner != nil {
			g.inner.Close()
		}
		if err := removeNamespace(g.namespace); err != nil {
			t.Error(err)
		}
	})
	err := Do(g.namespace, func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "eth0"
		if err := netlink.LinkAdd(&netlink.Tuntap{LinkAttrs: attrs, Mode: netlink.TUNTAP_MODE_TAP}); err != nil {
			return err
		}
		link, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		if err := netlink.LinkSetHardwareAddr(link, mac); err != nil {
			return err
		}
		// As blueprints' guests have it: no address but those that they are given.
		for key, value := range map[string]string{"accept_dad": "0", "accept_ra": "0", "addr_gen_mode": "1"} {
			if err := sysctl("net/ipv6/conf/eth0/"+key, value); err != nil {
				return err
			}
		}
		if g.inner, err = openTap("eth0"); err != nil {
			return err
		}
		if err := up("lo"); err != nil {
			return err
		}
		if err := up("eth0"); err != nil {
			return err
		}
		if err := addAddresses(link, netip.PrefixFrom(GuestIPv4, 30), netip.PrefixFrom(GuestIPv6, 64)); err != nil {
			return err
		}
		for _, gateway := range []netip.Addr{GatewayIPv4.Addr(), GatewayIPv6.Addr()} {
			all := &net.IPNet{IP: make(net.IP, gateway.BitLen()/8), Mask: net.CIDRMask(0, gateway.BitLen())}
			if err := netlink.RouteAdd(&netlink.Route{Dst: all, Gw: gateway.AsSlice(), LinkIndex: link.Attrs().Index}); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// openTap opens the file of a tap in the calling thread's namespace, which must be there.
func openTap(name string) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	request, err := unix.NewIfreq(name)
	if err == nil {
		request.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, request)
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("attach to tap %q: %w", name, err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

// Namespace is the network namespace that is the guest's own.
func (g *Guest) Namespace() string { return g.namespace }

// Connection is a tap that was opened, and of which nothing is read yet: what comes for the guest waits in its queue.
type Connection struct{ tap *os.File }

// Open opens the tap of a namespace, for a guest that is paused elsewhere.
func (g *Guest) Open(namespace string) (Connection, error) {
	var c Connection
	err := Do(namespace, func() (err error) {
		c.tap, err = openTap(Interface)
		return err
	})
	return c, err
}

// Pause disconnects the guest. What it sends and what is sent to it waits in the queues of the interfaces.
func (g *Guest) Pause() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.outer == nil {
		return
	}
	g.outer.SetReadDeadline(time.Unix(1, 0))
	g.inner.SetReadDeadline(time.Unix(1, 0))
	g.pumps.Wait()
	// What it was sent before the pause is in the queue, on a busy machine, and a machine would have it.
	g.outer.SetReadDeadline(time.Now().Add(time.Millisecond))
	pump(g.outer, g.inner)
	g.outer.Close()
	g.outer = nil
}

// Resume connects the guest, which is paused or new, to a tap.
func (g *Guest) Resume(c Connection) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.outer = c.tap
	g.inner.SetReadDeadline(time.Time{})
	for _, p := range [][2]*os.File{{g.outer, g.inner}, {g.inner, g.outer}} {
		g.pumps.Go(func() { pump(p[0], p[1]) })
	}
}

// pump carries frames until from has a deadline.
func pump(from, to *os.File) {
	frame := make([]byte, 1<<16)
	for {
		n, err := from.Read(frame)
		if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, os.ErrClosed) || errors.Is(err, io.EOF) {
			return
		} else if err != nil {
			continue
		}
		_, _ = to.Write(frame[:n]) // a network may lose what it is given
	}
}
