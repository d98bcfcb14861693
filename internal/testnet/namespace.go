package testnet

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"

	"github.com/drafter-vm/drafter/pkg/nat"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// netnsDir is where named network namespaces are; the kernel knows no names, this is the convention of ip-netns(8).
const netnsDir = "/run/netns"

// Do calls f on a thread that is in the named network namespace, and returns its error. What f creates there, sockets
// above all, stays there. Goroutines that f starts are not in the namespace.
func Do(namespace string, f func() error) error {
	target, err := netns.GetFromName(namespace)
	if err != nil {
		return fmt.Errorf("open network namespace %q: %w", filepath.Join(netnsDir, namespace), err)
	}
	defer target.Close()
	return onThread(func() error {
		if err := netns.Set(target); err != nil {
			return fmt.Errorf("enter network namespace %q: %w", namespace, err)
		}
		return f()
	})
}

// onThread calls f on a thread of its own, whose network namespace f may change.
func onThread(f func() error) error {
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		home, err := netns.Get()
		if err != nil {
			runtime.UnlockOSThread()
			result <- fmt.Errorf("find own network namespace: %w", err)
			return
		}
		defer home.Close()
		err = f()
		if netns.Set(home) == nil {
			runtime.UnlockOSThread()
		} // else the thread ends with this goroutine, and nobody meets it in the wrong namespace
		result <- err
	}()
	return <-result
}

// Lacking calls f in a namespace, on a thread that has not got a capability (capabilities(7)). What f starts on other threads has it.
func Lacking(namespace string, capability uint, f func() error) error {
	target, err := netns.GetFromName(namespace)
	if err != nil {
		return err
	}
	defer target.Close()
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var caps [2]unix.CapUserData
		err := netns.Set(target)
		if err == nil {
			err = unix.Capget(&header, &caps[0])
		}
		if err == nil {
			caps[capability/32].Effective &^= 1 << (capability % 32)
			err = unix.Capset(&header, &caps[0])
		}
		if err == nil {
			err = f()
		}
		result <- err
	}()
	return <-result
}

// DialContext is like [net.Dialer.DialContext] from within the named network namespace (empty: the present one). The host
// in address must be an IP address: a name would be looked up elsewhere.
func DialContext(ctx context.Context, namespace, network, address string) (net.Conn, error) {
	var dialer net.Dialer
	if namespace == "" {
		return dialer.DialContext(ctx, network, address)
	}
	if _, err := netip.ParseAddrPort(address); err != nil {
		return nil, fmt.Errorf("dial %q in network namespace %q: give an IP address and a port: %w", address, namespace, err)
	}
	var conn net.Conn
	err := Do(namespace, func() (err error) {
		conn, err = dialer.DialContext(ctx, network, address) // a single address is dialed by the calling goroutine
		return err
	})
	return conn, err
}

// newNamespace creates a named network namespace.
func newNamespace(name string) error {
	if err := nat.MakeFolder(); err != nil {
		return err
	}
	return onThread(func() error {
		handle, err := netns.NewNamed(name)
		if err != nil {
			return fmt.Errorf("create network namespace %q: %w", name, err)
		}
		return handle.Close()
	})
}

func namespaceExists(name string) bool {
	_, err := os.Lstat(filepath.Join(netnsDir, name))
	return err == nil
}
