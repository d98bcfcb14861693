package expose

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"path/filepath"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// ErrFleeting is returned by [Mount.Connection] where a mount cannot outlive the process that serves it.
var ErrFleeting = errors.New("this kernel cannot repeat what a dead process was asked (Linux 6.9 can)")

// Connection is the mount's connection with the kernel, for a program to inherit that uses the files: then it need not end with this process.
// What is asked of the files waits, from the end of this process until another has taken the mount over with [AdoptFUSE]; and nobody who looks
// at the folder can go on until then, nor can a program be killed that waits for an answer: [DetachFUSE] ends that. The caller closes it.
func (m *Mount) Connection() (*os.File, error) {
	if !m.lasting {
		return nil, ErrFleeting
	}
	fd := -1
	if err := control(m.connection, func(own int) (err error) {
		fd, err = unix.FcntlInt(uintptr(own), unix.F_DUPFD_CLOEXEC, 0)
		return err
	}); err != nil {
		return nil, fmt.Errorf("duplicate the connection of %q: %w", m.dir, err)
	}
	return os.NewFile(uintptr(fd), fuseDevice), nil
}

// control does something with the descriptor of a file that others may close.
func control(f *os.File, do func(fd int) error) error {
	raw, failed := f.SyscallConn()
	if failed != nil {
		return failed
	}
	var err error
	failed = raw.Control(func(fd uintptr) { err = do(int(fd)) })
	return errors.Join(failed, err)
}

// DetachFUSE takes away what is mounted at dir, from everybody, if anything is: who waits for an answer of a dead process gets an error instead.
func DetachFUSE(dir string) error {
	if err := detach(dir); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return err
	}
	return nil
}

// AdoptFUSE takes over the mount at dir whose process has died, or has abandoned it. The connection is that of [Mount.Connection], and is closed;
// the exports are the same as ever, in the same order. What the kernel has no answer to yet it asks again.
func AdoptFUSE(dir string, connection *os.File, exports []Export, opts FUSEOptions) (_ *Mount, err error) {
	defer connection.Close()
	defer func() {
		if err != nil {
			err = fmt.Errorf("take over mount %q: %w", dir, err)
		}
	}()
	if opts.Logger == nil {
		opts.Logger = slog.Default()
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return nil, err
	}
	// A server begins with what the kernel says first, and has said long ago: it is told the same by a socket. Before it asks for more, the
	// connection takes the socket's place.
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(pair[1])
	first, err := binary.Append(nil, binary.NativeEndian, greeting)
	if err == nil {
		_, err = unix.Write(pair[1], first)
	}
	if err != nil {
		return nil, errors.Join(err, unix.Close(pair[0]))
	}
	m, server, err := newMount(dir, pair[0], exports, opts)
	if err != nil { // the descriptor is closed
		return nil, err
	}
	for _, number := range []int{m.number, int(m.connection.Fd())} {
		if err := unix.Dup3(int(connection.Fd()), number, unix.O_CLOEXEC); err != nil {
			return nil, err
		}
	}
	m.made, m.lasting = true, true
	if err := resend(m.connection); err != nil {
		return nil, err
	}
	m.serve(server)
	return m, nil
}

// greeting is what a kernel says first that can repeat requests, of which the server asks for what it needs.
var greeting = fuse.InitIn{
	InHeader: fuse.InHeader{Length: 104, Opcode: 26, Unique: 2}, // FUSE_INIT
	Major:    7, Minor: 40, MaxReadAhead: 128 << 10, Flags: math.MaxUint32, Flags2: math.MaxUint32,
}

// resend has the kernel repeat all that was asked and not answered (FUSE_NOTIFY_RESEND of linux/fuse.h).
func resend(connection *os.File) error {
	const header, notifyResend = 16, 7 // fuse_out_header: length, code, unique
	message := binary.NativeEndian.AppendUint32(nil, header)
	message = binary.NativeEndian.AppendUint32(message, notifyResend)
	message = binary.NativeEndian.AppendUint64(message, 0)
	if err := control(connection, func(fd int) error {
		_, err := unix.Write(fd, message)
		return err
	}); err != nil {
		return fmt.Errorf("have requests repeated: %w", err)
	}
	return nil
}

// Abandon ends this process's part in a mount whose connection somebody else has ([Mount.Connection]): it goes on, and waits for [AdoptFUSE].
// Nothing is answered from here any more. It does not wait for calls of devices; Close does, and leaves the mount alone then. Threads that wait
// for the kernel's next request may wait on; what they get they have it ask again.
func (m *Mount) Abandon() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed || m.abandoned {
		return nil
	}
	nobody, err := unix.Open(fuseDevice, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err == nil {
		defer unix.Close(nobody)
		m.files.abandoned.Store(true)
		err = unix.Dup3(nobody, m.number, unix.O_CLOEXEC)
	}
	if err != nil {
		return fmt.Errorf("abandon mount %q: %w", m.dir, err)
	}
	m.abandoned = true
	return nil
}
