package socket

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"github.com/mdlayher/vsock"
)

// GuestPath is where drafter-agent offers host ports in a guest that has no AF_VSOCK device.
const GuestPath = "/run/drafter/" + FileName

const (
	cidAny   = 0xffffffff // VMADDR_CID_ANY of linux/vm_sockets.h: no transport is loaded, or bind to every address
	cidGuest = 3          // the least address a guest can have; 0, 1 and 2 are hypervisor, loopback and host
)

// HasVsock reports whether AF_VSOCK reaches the host: /dev/vsock exists and a transport gave this machine a guest's
// address. A kernel with the module alone, or with loopback only, does not.
func HasVsock() bool {
	cid, err := vsock.ContextID()
	return err == nil && cid >= cidGuest && cid != cidAny
}

// Dial connects, from inside a guest, to the program that listens on port of the host. The error wraps
// [syscall.ECONNREFUSED] or [syscall.ECONNRESET] when nobody listens there.
func Dial(ctx context.Context, port uint32) (net.Conn, error) {
	var (
		conn net.Conn
		err  error
	)
	if HasVsock() {
		conn, err = vsock.DialContext(ctx, vsock.Host, port, nil)
	} else {
		conn, err = Connect(ctx, GuestPath, port)
		if errors.Is(err, os.ErrNotExist) {
			err = fmt.Errorf("no AF_VSOCK device, and drafter-agent vsock does not run: %w", err)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("dial host port %d: %w", port, err)
	}
	return conn, nil
}

// Listen accepts, inside a guest, the connections that host programs make to port.
func Listen(port uint32) (net.Listener, error) {
	ln, err := listen(port)
	if err != nil {
		return nil, fmt.Errorf("listen on guest port %d: %w", port, err)
	}
	return ln, nil
}

func listen(port uint32) (net.Listener, error) {
	if HasVsock() {
		// Every address, not today's: a clone may be given another one.
		return vsock.ListenContextID(cidAny, port, nil)
	}
	if err := os.MkdirAll(filepath.Dir(GuestPath), 0o755); err != nil {
		return nil, err
	}
	return ListenUnix(PortPath(GuestPath, port), 0o600)
}
