package tap

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// netnsDir is where ip netns keeps the names of network namespaces.
const netnsDir = "/run/netns"

// Open opens a tap device that exists in the network namespace of that name ("": ours).
func Open(netns, name string) (*os.File, error) {
	where := "in this network namespace"
	if netns != "" {
		where = fmt.Sprintf("in network namespace %q", netns)
		if netns != filepath.Base(netns) || netns == "." || netns == ".." {
			return nil, fmt.Errorf("network namespace %q: a name is needed, not a path", netns)
		}
	}
	if name == "" || len(name) >= unix.IFNAMSIZ || strings.ContainsAny(name, "/ ") {
		return nil, fmt.Errorf("interface %q %s: a name has 1 to %d characters", name, where, unix.IFNAMSIZ-1)
	}
	var f *os.File
	err := In(netns, func() (err error) {
		// TUNSETIFF would make an interface that is missing, unconfigured and gone with us.
		if _, err := net.InterfaceByName(name); err != nil {
			return fmt.Errorf("%w: make it first, for example: ip%s tuntap add %s mode tap", err, netnsFlag(netns), name)
		}
		f, err = attach(name)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("open interface %q %s: %w", name, where, err)
	}
	return f, nil
}

func netnsFlag(netns string) string {
	if netns == "" {
		return ""
	}
	return " -n " + netns
}

// In calls f on a thread that is in a network namespace. The thread ends with the call: one that has changed its
// namespace is never given back to other goroutines.
func In(name string, f func() error) error {
	if name == "" {
		return f()
	}
	result := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlock: the thread ends with this goroutine
		result <- func() error {
			path := filepath.Join(netnsDir, name)
			ns, err := os.Open(path)
			if errors.Is(err, os.ErrNotExist) {
				return fmt.Errorf("there is no such namespace: make it first, for example: ip netns add %s", name)
			}
			if err != nil {
				return err
			}
			defer ns.Close()
			if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
				return fmt.Errorf("enter %s: %w", path, err)
			}
			return f()
		}()
	}()
	return <-result
}

// attach opens /dev/net/tun and attaches it to an interface, in the calling thread's namespace.
func attach(name string) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/net/tun: %w", err)
	}
	set := func(flags uint16) error {
		req, err := unix.NewIfreq(name)
		if err != nil {
			return err
		}
		req.SetUint16(flags)
		return unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
	}
	const flags = unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR
	err = set(flags)
	if err == unix.EINVAL { // made with more than one queue, or no tap at all
		err = set(flags | unix.IFF_MULTI_QUEUE)
	}
	if err == nil {
		return os.NewFile(uintptr(fd), name), nil
	}
	unix.Close(fd)
	switch err {
	case unix.EINVAL:
		return nil, errors.New("it is not a tap device")
	case unix.EBUSY:
		return nil, fmt.Errorf("another process has it attached: give each machine one of its own (--interface, --netns), or end the process "+
			"(grep -ls iff:.%s$ /proc/[0-9]*/fdinfo/* finds all that have one of this name)", name)
	case unix.EPERM:
		return nil, fmt.Errorf("attach to it: %w: run as root, or make it with ip tuntap add … user %d", err, os.Getuid())
	}
	return nil, fmt.Errorf("attach to it: %w", err)
}
