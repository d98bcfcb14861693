package transport

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// maxUnixPath is what fits into sockaddr_un (unix(7)), in bytes.
const maxUnixPath = 107

func checkUnix(_ Options, path string) error {
	switch {
	case path == "":
		return errors.New("no path given: use unix:///PATH")
	case len(path) > maxUnixPath:
		return fmt.Errorf("the path has %d bytes, but a unix socket's may have %d: choose a shorter one", len(path), maxUnixPath)
	case strings.HasPrefix(path, "@"):
		return errors.New("abstract sockets have no owner: use a path")
	}
	return nil
}

// unixConn is a connection on this host. It can carry descriptors: see [net.UnixConn.WriteMsgUnix].
type unixConn struct {
	*net.UnixConn
	options Options
}

// credentials are those of the process that has made the other end, when it did.
func (c unixConn) credentials() (*unix.Ucred, Identity, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, Identity{}, err
	}
	var cred *unix.Ucred
	if e := raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); e != nil || err != nil {
		return nil, Identity{}, errors.Join(e, err)
	}
	is := Identity{Method: "unix", Names: []string{fmt.Sprintf("uid:%d", cred.Uid), fmt.Sprintf("gid:%d", cred.Gid)}}
	if cred.Uid == uint32(os.Geteuid()) || cred.Uid == 0 {
		is.Process = int(cred.Pid)
	}
	return cred, is, nil
}

// Identity is for IdentityOf.
func (c unixConn) Identity() Identity {
	_, is, _ := c.credentials() // of a connection that is closed there are none
	return is
}

func (c unixConn) handshake(context.Context) (Identity, error) {
	cred, is, err := c.credentials()
	if err != nil {
		return Identity{}, err
	}
	switch own := uint32(os.Geteuid()); {
	case len(c.options.Allow) > 0 && !c.options.allows(is):
		return is, fmt.Errorf("%w: process %d is none of those that are allowed (%s)", ErrRefused, cred.Pid, is)
	case len(c.options.Allow) == 0 && cred.Uid != own && cred.Uid != 0:
		return is, fmt.Errorf("%w: process %d is another user's (%s), and this one's is uid:%d; allow it by name", ErrRefused, cred.Pid, is, own)
	}
	return is, nil
}

// unnamed is who is at the other end of a socket that has no name, as the one of a process that has dialled has none.
const unnamed = "a process of this host"

func (c unixConn) LocalAddr() net.Addr  { return place(c.UnixConn.LocalAddr()) }
func (c unixConn) RemoteAddr() net.Addr { return place(c.UnixConn.RemoteAddr()) }

func place(a net.Addr) net.Addr {
	if a == nil || a.String() == "" || a.String() == "@" {
		return placeAddr{"unix", unnamed}
	}
	return a
}

// isSocket reports what is wrong with a path at which something else is. It need not be there at all.
func isSocket(path string) error {
	info, err := os.Stat(path)
	switch {
	case err != nil || info.Mode().Type() == os.ModeSocket:
		return nil
	case info.IsDir():
		return fmt.Errorf("%q is a folder, and no socket: choose a path in it, or another", path)
	default:
		return fmt.Errorf("%q is a file, and no socket: choose another path", path)
	}
}

func dialUnix(ctx context.Context, o Options, path string) (net.Conn, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "unix", path)
	if err != nil {
		return nil, cmp.Or(isSocket(path), err)
	}
	return unixConn{conn.(*net.UnixConn), o}, nil
}

// listenUnix listens in place of a socket that an ended process has left. Who may connect is for the handshake to say: the file lets
// everybody who can reach it if others than this user are allowed, and nobody else otherwise.
func listenUnix(ctx context.Context, o Options, path string) (net.Listener, error) {
	if err := isSocket(path); err != nil {
		return nil, err
	}
	dir := filepath.Dir(path)
	if info, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("folder %q does not exist: make it (mkdir -p), or choose another path", dir)
	} else if err == nil && !info.IsDir() {
		return nil, fmt.Errorf("%q is no folder, in which a socket could be: choose another path", dir)
	}
	if conn, err := new(net.Dialer).DialContext(ctx, "unix", path); err == nil {
		conn.Close()
		return nil, &os.PathError{Op: "listen", Path: path, Err: syscall.EADDRINUSE}
	} else if info, statErr := os.Lstat(path); errors.Is(err, syscall.ECONNREFUSED) && statErr == nil && info.Mode().Type() == os.ModeSocket {
		if err := os.Remove(path); err != nil {
			return nil, err
		}
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	mode := os.FileMode(0o600)
	if len(o.Allow) > 0 {
		mode = 0o666
	}
	if err := os.Chmod(path, mode); err != nil {
		l.Close()
		return nil, err
	}
	return wrapped{l, func(conn net.Conn) net.Conn { return unixConn{conn.(*net.UnixConn), o} }}, nil
}
