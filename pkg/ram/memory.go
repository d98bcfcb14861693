package ram

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/drafter-vm/drafter/pkg/block"
)

const pageSize = block.PageSize

// ErrIncomplete is wrapped by errors that come of contents that have not arrived and will not by themselves: the filling
// ended before its end.
var ErrIncomplete = errors.New("memory is not completely filled")

// Memory is the RAM of one guest: a memfd of ours that the VMM maps shared.
//
// Attach, Fill, Receive and Close are for one owner, one at a time. Device may be used by anybody at any time, the
// Tracker by one goroutine at a time, and everything else concurrently.
type Memory struct {
	file *os.File
	stat unix.Stat_t
	size int64 // bytes
	name string

	// mu guards what follows, and orders everything that changes the registration of the VMM's mappings. It is held
	// during those system calls, never while waiting for a source or a page.
	mu        sync.Mutex
	handle    *Handle        // nil: not attached
	maps      mappings       // where the VMM has it; set with handle, never changed
	mode      uint64         // with which the mappings are registered; 0: not at all
	tracking  bool           // a Tracker runs
	method    trackingMethod // how, if one does
	collapsed bool           // by us, into huge pages, since it was tracked
	closed    bool

	// filler is the latest filling that may still have to bring pages: absent once one has completed and its
	// registration is gone. Device asks it before it touches the file.
	filler atomic.Pointer[Filler]
	// unfilled says that an adopted VMM was being filled by a process that has gone, and nobody took that over yet.
	unfilled atomic.Bool

	servers sync.WaitGroup // of faults, those of all fillers; they use the handle

	marks  atomic.Pointer[bitmap]    // pages written through Device while userfaultfd tracks
	hashes atomic.Pointer[hashTable] // what Device delivered while hashing tracks
}

// Create makes a memory of size bytes, a multiple of 4096, that reads as zero. The name shows in /proc/PID/maps; it
// may have up to 249 bytes and need not be unique. The size is sealed: nobody who has the file can change it.
func Create(name string, size int64) (*Memory, error) {
	if size <= 0 || size%pageSize != 0 {
		return nil, fmt.Errorf("create memory %q: size %d is not a positive multiple of %d", name, size, pageSize)
	}
	flags := unix.MFD_CLOEXEC | unix.MFD_ALLOW_SEALING
	fd, err := unix.MemfdCreate(name, flags|unix.MFD_NOEXEC_SEAL) // Linux 6.3
	if errors.Is(err, unix.EINVAL) {
		fd, err = unix.MemfdCreate(name, flags)
	}
	if err != nil {
		return nil, fmt.Errorf("create memory %q: %w", name, err)
	}
	file := os.NewFile(uintptr(fd), "memfd:"+name)
	if err := file.Truncate(size); err != nil {
		file.Close()
		return nil, fmt.Errorf("create memory %q of %d bytes: %w", name, size, err)
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL); err != nil {
		file.Close()
		return nil, fmt.Errorf("seal size of memory %q: %w", name, err)
	}
	return newMemory(file, name, size)
}

// Bind has the kernel put pages into the memory of a NUMA node, and nowhere else, whoever touches or writes them first: the policy is the
// memfd's (mbind(2), MPOL_BIND of a shared mapping). Pages that are there stay where they are.
func (m *Memory) Bind(node int) error {
	mask := make([]uint64, node/64+1)
	mask[node/64] = 1 << (node % 64)
	err := m.control(func(fd int) error {
		at, err := unix.MmapPtr(fd, 0, nil, uintptr(m.size), unix.PROT_NONE, unix.MAP_SHARED) // nothing is read or written by it
		if err != nil {
			return err
		}
		const bind = 2 // MPOL_BIND in linux/mempolicy.h
		_, _, errno := unix.Syscall6(unix.SYS_MBIND, uintptr(at), uintptr(m.size), bind, uintptr(unsafe.Pointer(&mask[0])), uintptr(len(mask)*64+1), 0)
		err = unix.MunmapPtr(at, uintptr(m.size))
		if errno != 0 {
			return errno
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("bind memory %q to NUMA node %d: %w", m.name, node, err)
	}
	return nil
}

// Open adopts an existing memory, such as /proc/PID/fd/N of a living VMM, with its contents. It takes over file, also
// when it fails.
func Open(file *os.File) (*Memory, error) {
	raw, err := file.SyscallConn()
	if err != nil {
		file.Close()
		return nil, fmt.Errorf("open memory %q: %w", file.Name(), err)
	}
	var fs unix.Statfs_t
	var inner error
	err = raw.Control(func(fd uintptr) { inner = unix.Fstatfs(int(fd), &fs) })
	if err := cmp.Or(err, inner); err != nil {
		file.Close()
		return nil, fmt.Errorf("open memory %q: %w", file.Name(), err)
	}
	info, err := file.Stat()
	if err != nil {
		file.Close()
		return nil, fmt.Errorf("open memory %q: %w", file.Name(), err)
	}
	if fs.Type != unix.TMPFS_MAGIC || !info.Mode().IsRegular() || info.Size() <= 0 || info.Size()%pageSize != 0 {
		file.Close()
		return nil, fmt.Errorf("open memory %q: not a memfd whose size (%d bytes) is a positive multiple of %d", file.Name(), info.Size(), pageSize)
	}
	return newMemory(file, file.Name(), info.Size())
}

func newMemory(file *os.File, name string, size int64) (*Memory, error) {
	m := &Memory{file: file, size: size, name: name}
	if err := m.control(func(fd int) error { return unix.Fstat(fd, &m.stat) }); err != nil {
		file.Close()
		return nil, fmt.Errorf("stat memory %q: %w", name, err)
	}
	return m, nil
}

// File is the memfd, to be inherited by the VMM. It stays ours: do not close it, and do not read or write it while it
// is being filled or tracked; Device is for that.
func (m *Memory) File() *os.File { return m.file }

// Size is the size in bytes.
func (m *Memory) Size() int64 { return m.size }

// Capabilities is what can be done for this memory: that of the attached VMM, or the Eager rung before.
func (m *Memory) Capabilities() Capabilities {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.handle == nil {
		return capabilities(Eager, "no VMM is attached")
	}
	return m.handle.caps
}

// Attach waits until the VMM maps all of the memory, shared and writable, and takes over the handle: Memory.Close closes
// it, and Attach itself when it fails, which leaves the memory free for another VMM. A VMM that could not be given a userfaultfd need not have mapped anything yet.
//
// Attach by itself changes nothing for the VMM; tracking and filling do. With an adopted VMM, it ends what tracking its
// earlier keeper left on, and if that was filling the memory, says so by [Memory.Unfilled].
func (m *Memory) Attach(ctx context.Context, h *Handle) error {
	if err := m.attach(ctx, h); err != nil {
		h.Close()
		return fmt.Errorf("attach process %d to memory %q: %w", h.pid, m.name, err)
	}
	return nil
}

func (m *Memory) attach(ctx context.Context, h *Handle) error {
	var maps mappings
	if h.uffd != nil {
		var err error
		if maps, err = m.awaitMapped(ctx, h); err != nil {
			return err
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.closed:
		return os.ErrClosed
	case m.handle != nil:
		return fmt.Errorf("it belongs to process %d already", m.handle.pid)
	case m.tracking || m.filler.Load() != nil:
		return errors.New("it is being tracked or filled, attach first")
	}
	m.handle, m.maps = h, maps
	if h.adopted && h.uffd != nil {
		if err := m.takeOver(); err != nil {
			m.handle, m.maps, m.mode = nil, nil, 0
			m.unfilled.Store(false)
			return err
		}
	}
	if h.releases != nil {
		m.servers.Go(func() { m.serveReleases(h) })
	}
	return nil
}

func (m *Memory) awaitMapped(ctx context.Context, h *Handle) (mappings, error) {
	const first, last = 200 * time.Microsecond, 5 * time.Millisecond
	delay := time.NewTimer(first)
	defer delay.Stop()
	for pause := first; ; pause = min(2*pause, last) {
		maps, err := readMappings(h.pid, &m.stat, m.size)
		if err != nil {
			return nil, err
		}
		mapped := maps.covered(m.size)
		if mapped == m.size {
			return maps, nil
		}
		select {
		case <-ctx.Done():
			if len(maps) == 0 {
				return nil, fmt.Errorf("the process did not map the memory: %w", context.Cause(ctx))
			}
			return nil, fmt.Errorf("the process mapped the memory only up to byte %d of %d: %w", mapped, m.size, context.Cause(ctx))
		case <-h.done:
			return nil, fmt.Errorf("the process did not map the memory: %w", ErrProcessEnded)
		case <-delay.C:
			delay.Reset(pause)
		}
	}
}

// takeOver brings the registration of an adopted VMM into a known state. m.mu is held.
func (m *Memory) takeOver() error {
	mode, err := m.maps.registered(m.handle.pid)
	if err != nil {
		return err
	}
	m.mode = mode
	if mode&modeWP != 0 {
		if err := m.disarm(); err != nil {
			return err
		}
	}
	if mode&modeMissing == 0 {
		return nil
	}
	m.unfilled.Store(true)
	// Faults whose messages the earlier keeper read, and never answered, are told again after a wake.
	return m.wake(0, m.size)
}

// Unfilled reports whether the attached VMM waits for pages that nobody brings: the one who filled the memory has gone.
// Until [Memory.Fill] or [Memory.Receive] is called with Resume, Device refuses to read.
func (m *Memory) Unfilled() bool { return m.unfilled.Load() }

// register makes faults on the VMM's mappings come to us, according to mode, beside those that do already. m.mu is held.
func (m *Memory) register(mode uint64) error {
	if m.mode&mode == mode {
		return nil
	}
	mode |= m.mode // the kernel would drop what is not named again
	for _, mp := range m.maps {
		if err := m.handle.uffd.register(mp.vma(), mode); err != nil {
			return m.explain(err)
		}
	}
	m.mode = mode
	return nil
}

// unregister undoes register, and with it write protection; whoever waits is woken. It is cheap unless the mode has
// modeWP: then the kernel walks all page tables with the VMM's address space locked (30 ms/GiB). m.mu is held.
func (m *Memory) unregister() error {
	m.mode = 0
	for _, mp := range m.maps {
		if err := m.handle.uffd.unregister(mp.vma()); err != nil && !m.ended() {
			return err
		}
	}
	// UFFDIO_UNREGISTER wakes as well, but before it resets the mapping (fs/userfaultfd.c): a thread that faults in
	// between, under the lock of the mapping alone (Linux 6.4), would be queued after that wake and sleep for ever.
	return m.wake(0, m.size)
}

// disarm takes write protection off the whole memory. It stays registered for it, which costs nothing. m.mu is held.
func (m *Memory) disarm() error {
	const step = 64 << 20 // bytes for which the VMM's address space is locked at a time
	for off := int64(0); off < m.size; off += step {
		if err := m.maps.addresses(off, min(step, m.size-off), m.handle.uffd.disarm); err != nil {
			return m.explain(err)
		}
	}
	return nil
}

// wake needs no lock.
func (m *Memory) wake(offset, n int64) error {
	return m.maps.addresses(offset, n, m.handle.uffd.wake)
}

// ended reports whether the VMM's process is no more, or is losing its address space.
func (m *Memory) ended() bool {
	select {
	case <-m.handle.done:
		return true
	default:
	}
	// The address space goes some time before the process has ended for its pidfd.
	maps, err := readMappings(m.handle.pid, &m.stat, m.size)
	return err != nil || len(maps) == 0
}

// explain adds to an error of a userfaultfd request what it most often means.
func (m *Memory) explain(err error) error {
	switch {
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("another userfaultfd has the mapping: %w", err)
	case m.ended():
		return fmt.Errorf("%w: %w", ErrProcessEnded, err)
	}
	return err
}

// settle drops the registration for missing pages once the filling is complete and no tracking depends on it. From then
// on the kernel itself supplies zeros for holes. m.mu is held.
func (m *Memory) settle() error {
	f := m.filler.Load()
	if f == nil || m.tracking || f.remaining.Load() > 0 {
		return nil
	}
	var err error
	if m.mode&modeMissing != 0 {
		err = m.unregister()
	}
	f.stopServing()
	m.filler.Store(nil)
	return err
}

// Close ends filling and tracking, lets go of the VMM and of the memfd. If the VMM lives on and its memory is not
// completely filled, the error wraps [ErrIncomplete]: its threads that touch a missing page wait, possibly for an
// [Adopt]. A second Close returns nil.
func (m *Memory) Close() error {
	if f := m.filler.Load(); f != nil {
		f.abort(os.ErrClosed)
	}
	m.mu.Lock()
	if m.closed {
		m.mu.Unlock()
		return nil
	}
	m.closed = true
	var errs []error
	errs = append(errs, m.stopTracking())
	errs = append(errs, m.settle())
	if m.handle != nil {
		if m.mode&modeMissing != 0 && !m.ended() {
			errs = append(errs, ErrIncomplete)
		}
	}
	if m.handle != nil {
		m.handle.stopReleases()
	}
	m.mu.Unlock()
	m.servers.Wait()
	if m.handle != nil {
		m.handle.Close()
	}
	errs = append(errs, m.file.Close())
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("close memory %q: %w", m.name, err)
	}
	return nil
}
