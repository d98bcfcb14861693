package expose

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/drafter-vm/drafter/pkg/block"
)

// Export is a device that a [Server] serves.
type Export struct {
	// Name is how clients ask for it, at most 4096 bytes. A client that gives no name gets the only export there is.
	Name string

	// Device is what is served. The server does not close it.
	Device block.Device

	// ReadOnly refuses everything that would change the device.
	ReadOnly bool

	// Modified is when a file of a mount says that it was written to last, to the second: of a device whose content is the same as before, that of before.
	// Zero: when it was mounted.
	Modified time.Time
}

// NBDOptions are the limits of a server. The zero value is good for one virtual machine.
type NBDOptions struct {
	// MaxConnections is how many clients may be connected at a time; 0 means 16. One more is disconnected at once.
	MaxConnections int

	// Workers is how many requests of a connection may be in the device at a time; 0 means 64.
	Workers int

	// MaxInFlight is how many bytes of requests and replies a connection may have in memory at a time; 0 means
	// 64 MiB, and less than 2 × MaxRequest is raised to that. Beyond it the client's next request has to wait.
	MaxInFlight int64

	// HandshakeTimeout is how long a client may take to choose an export; 0 means 10 s.
	HandshakeTimeout time.Duration

	// Logger receives failed requests and connections; nil means slog.Default().
	Logger *slog.Logger
}

// drainTimeout is how long Close waits for a client to take the replies it is owed.
const drainTimeout = 5 * time.Second

// maxSocketPath is the longest path of a unix socket, in bytes: sun_path in unix(7) less its final zero.
const maxSocketPath = 107

// Server serves devices as NBD exports on a unix socket.
type Server struct {
	path     string
	exports  []Export
	opts     NBDOptions
	log      *slog.Logger
	listener *net.UnixListener
	inode    os.FileInfo // of the socket file

	ctx    context.Context // ends with Close; what waits for memory or slots then gives up
	cancel context.CancelFunc
	tasks  sync.WaitGroup // the accepting goroutine and those of the connections

	mu          sync.Mutex // guards closed and connections
	closed      bool
	connections map[*nbdConn]struct{}
}

// ListenNBD serves exports on a unix socket at path, for the user of this process alone (mode 0600). A socket file
// that is left from a process that is gone is replaced; one that is served, and any other file, is an error. Path
// may have 107 bytes.
func ListenNBD(path string, exports []Export, opts NBDOptions) (*Server, error) {
	if len(path) > maxSocketPath {
		return nil, fmt.Errorf("listen for NBD on %q: the path has %d bytes, a unix socket may have %d: choose a shorter folder", path, len(path), maxSocketPath)
	}
	names := make(map[string]bool)
	for _, e := range exports {
		switch {
		case e.Device == nil:
			return nil, fmt.Errorf("listen for NBD on %q: export %q has no device", path, e.Name)
		case len(e.Name) > nbdMaxString:
			return nil, fmt.Errorf("listen for NBD on %q: the name of an export has %d bytes, at most %d are allowed", path, len(e.Name), nbdMaxString)
		case names[e.Name]:
			return nil, fmt.Errorf("listen for NBD on %q: two exports are named %q", path, e.Name)
		}
		names[e.Name] = true
	}
	if opts.MaxConnections <= 0 {
		opts.MaxConnections = 16
	}
	if opts.Workers <= 0 {
		opts.Workers = 64
	}
	opts.MaxInFlight = max(opts.MaxInFlight, 2*MaxRequest)
	if opts.HandshakeTimeout <= 0 {
		opts.HandshakeTimeout = 10 * time.Second
	}
	if opts.Logger == nil {
		opts.Logger = slog.Default()
	}

	listener, inode, err := listenUnix(path)
	if err != nil {
		return nil, fmt.Errorf("listen for NBD: %w", err)
	}
	s := &Server{
		path: path, exports: append([]Export(nil), exports...), opts: opts, log: opts.Logger.With("socket", path),
		listener: listener, inode: inode, connections: make(map[*nbdConn]struct{}),
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.tasks.Go(s.accept)
	return s, nil
}

// listenUnix makes a socket at path. Its folder is locked meanwhile: of two processes that find a stale file, one must
// not remove what the other has just made.
func listenUnix(path string) (_ *net.UnixListener, inode os.FileInfo, err error) {
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return nil, nil, err
	}
	defer dir.Close() // and thereby unlocked
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX); err != nil {
		return nil, nil, fmt.Errorf("lock folder of %q: %w", path, err)
	}
	info, err := os.Lstat(path)
	switch {
	case err == nil && info.Mode()&os.ModeSocket == 0:
		return nil, nil, fmt.Errorf("%q exists and is not a socket: remove it, or choose another path", path)
	case err == nil:
		conn, err := net.Dial("unix", path)
		if err == nil {
			_ = conn.Close()
			return nil, nil, fmt.Errorf("%q is served by another process: stop it, or choose another path", path)
		}
		if !errors.Is(err, syscall.ECONNREFUSED) && !errors.Is(err, os.ErrNotExist) {
			return nil, nil, fmt.Errorf("find out whether %q is served: %w", path, err)
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, nil, fmt.Errorf("remove a socket nobody serves: %w", err)
		}
	case !errors.Is(err, os.ErrNotExist):
		return nil, nil, err
	}
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, nil, err
	}
	listener.SetUnlinkOnClose(false) // by then the path may be someone else's: see Close
	if err = os.Chmod(path, 0o600); err == nil {
		inode, err = os.Lstat(path)
	}
	if err != nil {
		return nil, nil, errors.Join(err, listener.Close(), os.Remove(path))
	}
	return listener, inode, nil
}

// Path is where the server listens.
func (s *Server) Path() string { return s.path }

// accept hands new clients their connection, until the listener is closed.
func (s *Server) accept() {
	for {
		conn, err := s.listener.Accept()
		if err != nil {
			if s.ctx.Err() != nil {
				return
			}
			// Out of descriptors, most likely. The clients wait in the queue meanwhile.
			s.log.Error("cannot accept an NBD client", "error", err)
			select {
			case <-time.After(100 * time.Millisecond):
				continue
			case <-s.ctx.Done():
				return
			}
		}
		c := newNBDConn(s, conn)
		if !s.add(c) {
			_ = conn.Close()
			continue
		}
		s.tasks.Go(func() {
			defer s.remove(c)
			c.serve()
		})
	}
}

func (s *Server) add(c *nbdConn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false
	}
	if len(s.connections) >= s.opts.MaxConnections {
		s.log.Warn("refused an NBD client: too many are connected", "limit", s.opts.MaxConnections)
		return false
	}
	s.connections[c] = struct{}{}
	return true
}

func (s *Server) remove(c *nbdConn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.connections, c)
}

// Abort disconnects all clients at once and accepts no more. What is in flight is not answered, so that a client that
// reconnects asks whoever listens next. It does not wait; Close does.
func (s *Server) Abort() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cancel()
	for c := range s.connections {
		_ = c.conn.Close()
	}
}

// Close stops listening, answers the requests that are in flight, and disconnects all clients. It waits for calls of
// devices that have not returned: close a device that blocks (a lazy one whose source is gone) to end them, or fail its
// readers. A second Close waits as the first, and returns nil.
func (s *Server) Close() error {
	s.mu.Lock()
	first := !s.closed
	s.closed = true
	connections := make([]*nbdConn, 0, len(s.connections))
	for c := range s.connections {
		connections = append(connections, c)
	}
	s.mu.Unlock()

	var err error
	if first {
		s.cancel()
		// The file goes first: who connects from now on is told so, rather than left in the queue of a dead socket.
		if now, statErr := os.Lstat(s.path); statErr == nil && os.SameFile(now, s.inode) {
			err = os.Remove(s.path)
		}
		err = errors.Join(err, s.listener.Close())
		for _, c := range connections {
			c.drain()
		}
	}
	s.tasks.Wait()
	if err != nil {
		return fmt.Errorf("close NBD server: %w", err)
	}
	return nil
}
