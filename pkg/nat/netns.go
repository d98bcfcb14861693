package nat

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Folder is where network namespaces have their names (ip-netns(8)).
const Folder = "/run/netns"

// Within runs f on a thread of its own in a network namespace, and waits for it.
func Within(ns netns.NsHandle, f func() error) error {
	return onThread(func() error {
		if err := netns.Set(ns); err != nil {
			return fmt.Errorf("enter network namespace: %w", err)
		}
		return f()
	})
}

// onThread runs f on a thread of its own, which ends with it: so nothing has to be put back that f did to the thread.
func onThread(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		done <- f()
	}()
	return <-done
}

// ErrNoNamespace is wrapped by errors which say that there is no network namespace of a name.
var ErrNoNamespace = errors.New("there is no such network namespace")

// OpenNamespace opens a network namespace by its name. The caller closes it.
func OpenNamespace(name string) (netns.NsHandle, error) {
	path := filepath.Join(Folder, name)
	if name == "" || name != filepath.Base(path) {
		return netns.None(), fmt.Errorf("network namespace %q: give a name in %s, not a path", name, Folder)
	}
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		return netns.None(), fmt.Errorf("network namespace %q: %w: make it (drafter nat, or ip netns add)", name, ErrNoNamespace)
	} else if err != nil {
		return netns.None(), fmt.Errorf("open network namespace %q: %w", name, err)
	}
	var fs unix.Statfs_t
	if err := unix.Fstatfs(fd, &fs); err != nil || fs.Type != unix.NSFS_MAGIC {
		unix.Close(fd)
		return netns.None(), fmt.Errorf("network namespace %q: %w: %s is an ordinary file, left by whoever made it", name, ErrNoNamespace, path)
	}
	return netns.NsHandle(fd), nil
}

// MakeFolder makes Folder, and it a mount of its own that is shared with other mount namespaces, as ip-netns(8) has it. Otherwise the first `ip netns
// add` of the host does so later: over the names that are there by then, which nobody can remove any more.
func MakeFolder() (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("make folder of network namespaces: %w", err)
		}
	}()
	if err := os.MkdirAll(Folder, 0o755); err != nil {
		return err
	}
	dir, err := os.Open(Folder)
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX); err != nil { // two would mount it twice
		return err
	}
	share := func() error { return unix.Mount("", Folder, "", unix.MS_SHARED|unix.MS_REC, "") }
	if err := share(); !errors.Is(err, unix.EINVAL) {
		return err
	}
	if err := unix.Mount(Folder, Folder, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return err
	}
	return share()
}

// giveName gives the network namespace of the calling thread a name.
func giveName(name string) error {
	path := filepath.Join(Folder, name)
	if err := MakeFolder(); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|unix.O_CLOEXEC, 0o444)
	if err != nil {
		return err
	}
	f.Close()
	if err := unix.Mount(fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid()), path, "", unix.MS_BIND, ""); err != nil {
		return errors.Join(fmt.Errorf("mount network namespace on %q: %w", path, err), os.Remove(path))
	}
	return nil
}

// takeName takes a namespace's name away. Without it, the namespace ends when nobody is in it.
func takeName(name string) error {
	path := filepath.Join(Folder, name)
	if err := unix.Unmount(path, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmount %q: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// Cookie is a number that no other network namespace has, until the host is started anew (SO_NETNS_COOKIE of socket(7)).
func Cookie(ns netns.NsHandle) (uint64, error) {
	var cookie uint64
	err := Within(ns, func() error {
		s, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(s)
		cookie, err = unix.GetsockoptUint64(s, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("tell network namespaces apart: %w", err)
	}
	return cookie, nil
}

// CheckPrivileges reports what this process lacks to change networks.
func CheckPrivileges() error {
	var caps [2]unix.CapUserData
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	if err := unix.Capget(&header, &caps[0]); err != nil {
		return fmt.Errorf("read capabilities: %w", err)
	}
	for _, c := range []struct {
		bit  uint
		name string
	}{{unix.CAP_NET_ADMIN, "CAP_NET_ADMIN"}, {unix.CAP_SYS_ADMIN, "CAP_SYS_ADMIN"}} {
		if caps[0].Effective&(1<<c.bit) == 0 {
			return fmt.Errorf("changing networks needs the capability %s: run this as root", c.name)
		}
	}
	return nil
}
