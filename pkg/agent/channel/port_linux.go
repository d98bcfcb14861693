package channel

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// PortName is the name of the virtio-serial port that carries the channel.
const PortName = "org.drafter.vsock"

// Port is the guest's end of a virtio-serial port.
//
// Linux gives such a port no idea of a connection (drivers/char/virtio_console.c): while the host's end is away, read
// returns 0 at once and write would block; one process at a time may have it open. Whether the host is there can be
// polled only as an edge, so Port waits in the runtime's edge-triggered poller and reads again at each event.
type Port struct {
	file *os.File
	raw  syscall.RawConn
	away bool // the last read found no host; only Read uses it
}

// OpenPort opens the virtio-serial port with the given name, waiting until there is one and no other process has it.
func OpenPort(ctx context.Context, name string) (*Port, error) {
	const longest = 250 * time.Millisecond
	for pause := 5 * time.Millisecond; ; pause = min(2*pause, longest) {
		path, err := findPort(name)
		if err == nil {
			var p *Port
			if p, err = openPort(path); err == nil {
				return p, nil
			}
		}
		if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.ENXIO) {
			return nil, fmt.Errorf("open virtio port %q: %w", name, err)
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for virtio port %q: %w (last: %w)", name, context.Cause(ctx), err)
		}
	}
}

// findPort returns the device of a port, by udev's link or, where no udev runs, by the name in sysfs.
func findPort(name string) (string, error) {
	link := filepath.Join("/dev/virtio-ports", name)
	if _, err := os.Stat(link); err == nil {
		return link, nil
	}
	names, err := filepath.Glob("/sys/class/virtio-ports/*/name")
	if err != nil {
		return "", err
	}
	for _, file := range names {
		if b, err := os.ReadFile(file); err == nil && strings.TrimSpace(string(b)) == name {
			return filepath.Join("/dev", filepath.Base(filepath.Dir(file))), nil
		}
	}
	return "", fs.ErrNotExist
}

func openPort(path string) (*Port, error) {
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	raw, err := f.SyscallConn()
	if err == nil {
		// Only what the runtime's poller knows has deadlines.
		err = f.SetWriteDeadline(time.Time{})
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("%s is not a virtio port: %w", path, err)
	}
	return &Port{file: f, raw: raw}, nil
}

// Read reads what the host has sent. It returns [ErrHostAway] once when the host's end is disconnected, and then waits
// for the next host. Read is for one goroutine.
func (p *Port) Read(b []byte) (n int, err error) {
	pollErr := p.raw.Read(func(fd uintptr) bool {
		for {
			n, err = unix.Read(int(fd), b)
			switch {
			case err == unix.EINTR:
				continue
			case err == unix.EAGAIN: // a host, and nothing to read
				p.away = false
				return false
			case err != nil:
				return true
			case n > 0:
				p.away = false
				return true
			case p.away: // still
				return false
			}
			p.away = true
			err = ErrHostAway
			return true
		}
	})
	if pollErr != nil {
		return 0, pollErr
	}
	return max(n, 0), err
}

// Write writes all of b unless the deadline passes first.
func (p *Port) Write(b []byte) (int, error) { return p.file.Write(b) }

// SetWriteDeadline sets when writes give up.
func (p *Port) SetWriteDeadline(t time.Time) error { return p.file.SetWriteDeadline(t) }

// Close makes reads and writes that wait return.
func (p *Port) Close() error { return p.file.Close() }

var _ Pipe = (*Port)(nil)
