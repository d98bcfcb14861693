package socket

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"
)

// FileName is the name of the socket in a VMPath, and of the one in the guest's folder.
const FileName = "vsock.sock"

// maxPath is the longest path of a unix socket on Linux: sun_path (unix(7)) has 108 bytes, the last of which is NUL.
const maxPath = 107

// HostPath is the host's socket of the guest whose folder is vmPath.
func HostPath(vmPath string) string { return filepath.Join(vmPath, FileName) }

// PortPath is the socket on which a program listens for connections to port that arrive through the socket at path.
func PortPath(path string, port uint32) string {
	return path + "_" + strconv.FormatUint(uint64(port), 10)
}

// DialGuest connects to the program that listens on port in the guest whose folder is vmPath. The error wraps
// [syscall.ECONNREFUSED] when nobody listens there, which is also how a guest looks that is not up yet.
func DialGuest(ctx context.Context, vmPath string, port uint32) (*net.UnixConn, error) {
	conn, err := Connect(ctx, HostPath(vmPath), port)
	if err != nil {
		return nil, fmt.Errorf("dial guest port %d: %w", port, err)
	}
	return conn, nil
}

// ListenHost accepts the connections that programs in the guest whose folder is vmPath make to port of the host. The
// listener's Close removes its socket.
func ListenHost(vmPath string, port uint32) (*net.UnixListener, error) {
	ln, err := ListenUnix(PortPath(HostPath(vmPath), port), 0o600)
	if err != nil {
		return nil, fmt.Errorf("listen on host port %d: %w", port, err)
	}
	return ln, nil
}

// Connect asks for port through the socket at path. DialGuest and Dial are what most callers want.
func Connect(ctx context.Context, path string, port uint32) (*net.UnixConn, error) {
	if err := checkPath(path); err != nil {
		return nil, err
	}
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	conn := c.(*net.UnixConn)
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	if err = WriteRequest(conn, port); err == nil {
		_, err = ReadReply(conn)
	}
	if !stop() {
		err = context.Cause(ctx)
	}
	if err == nil {
		return conn, nil
	}
	conn.Close()
	if errors.Is(err, io.EOF) || errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET) {
		err = fmt.Errorf("nobody answers on port %d: %w", port, syscall.ECONNREFUSED)
	}
	return nil, fmt.Errorf("connect through %s: %w", path, err)
}

// ListenUnix listens on a unix socket with the given permissions. A socket file that a dead process left at path is
// replaced; one that answers, and anything that is not a socket, is an error.
func ListenUnix(path string, mode fs.FileMode) (*net.UnixListener, error) {
	if err := checkPath(path); err != nil {
		return nil, err
	}
	if err := removeStale(path); err != nil {
		return nil, err
	}
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	// Between bind and chmod the socket has the permissions of the umask; the folder keeps strangers out.
	if err := os.Chmod(path, mode); err != nil {
		ln.Close()
		return nil, fmt.Errorf("set permissions of socket: %w", err)
	}
	return ln, nil
}

func checkPath(path string) error {
	if len(path) > maxPath {
		return fmt.Errorf("path of unix socket %q has %d bytes, the system allows %d: use a folder with a shorter path", path, len(path), maxPath)
	}
	return nil
}

func removeStale(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("%s exists and is not a socket: remove it or choose another path", path)
	}
	conn, err := net.DialTimeout("unix", path, time.Second)
	if err == nil {
		conn.Close()
		return fmt.Errorf("%s is in use by another process: %w", path, syscall.EADDRINUSE)
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("see whether %s is in use: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove stale socket: %w", err)
	}
	return nil
}
