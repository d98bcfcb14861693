package ram

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// HugePage is the size of a huge page in bytes.
const HugePage = 2 << 20

// madvCollapse is MADV_COLLAPSE of linux/mman.h (Linux 6.1).
const madvCollapse = 25

// Collapse puts what there is of the memory into huge pages, which a processor translates faster, and returns how many bytes are in them (madvise(2),
// MADV_COLLAPSE). It takes about 2.5 s/GiB of one processor, and holds up the VMM for moments. A huge page of which a part was there is there wholly afterwards.
//
// Memory is tracked and filled by pages of 4 KiB: Collapse ends at once, without an error, when one of the two begins, and does nothing meanwhile.
// What is in huge pages then is taken apart. The kernel has to allow them: see [HugePages].
func (m *Memory) Collapse(ctx context.Context) (collapsed int64, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("put memory %q into huge pages: %w", m.name, err)
		}
	}()
	if err := HugePages(); err != nil {
		return 0, err
	}
	for off := int64(0); ; {
		if err := ctx.Err(); err != nil {
			return collapsed, context.Cause(ctx)
		}
		end, n, err := m.collapseNext(off)
		collapsed += n
		if err == io.EOF {
			return collapsed, nil
		}
		if err != nil {
			return collapsed, err
		}
		off = end
	}
}

// collapseNext is Collapse of one huge page, the first one from off that has anything in it. It returns where that ends, and io.EOF when there is none
// or it is not the time.
func (m *Memory) collapseNext(off int64) (end, collapsed int64, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.closed:
		return 0, 0, os.ErrClosed
	case m.handle == nil || m.tracking || m.filler.Load() != nil || m.unfilled.Load():
		return 0, 0, io.EOF
	}
	if err := m.control(func(fd int) error {
		data, err := unix.Seek(fd, off, unix.SEEK_DATA)
		off = data &^ (HugePage - 1)
		return err
	}); errors.Is(err, unix.ENXIO) || err == nil && off+HugePage > m.size {
		return 0, 0, io.EOF
	} else if err != nil {
		return 0, 0, err
	}
	if m.mode != 0 { // of tracking that is over: in its ranges the kernel makes no huge pages
		if err := m.unregister(); err != nil {
			return 0, 0, err
		}
	}
	err = m.maps.addresses(off, HugePage, func(r uffdRange) error {
		if r.len != HugePage || r.start%HugePage != 0 {
			return nil // the VMM has it elsewhere than where a huge page can be
		}
		switch err := m.handle.advise(r, madvCollapse); {
		case err == nil:
			collapsed, m.collapsed = HugePage, true
			return nil
		case errors.Is(err, unix.ESRCH):
			return ErrProcessEnded
		case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EBUSY), errors.Is(err, unix.ENOMEM), errors.Is(err, unix.EINVAL):
			return nil // in use at the moment, or there is none
		default:
			return err
		}
	})
	return off + HugePage, collapsed, err
}

// advise is process_madvise(2).
func (h *Handle) advise(r uffdRange, advice int) error {
	raw, err := h.pidfd.SyscallConn()
	if err != nil {
		return err
	}
	vector := unix.RemoteIovec{Base: uintptr(r.start), Len: int(r.len)}
	var errno unix.Errno
	if err := raw.Control(func(fd uintptr) {
		_, _, errno = unix.Syscall6(unix.SYS_PROCESS_MADVISE, fd, uintptr(unsafe.Pointer(&vector)), 1, uintptr(advice), 0, 0)
	}); err != nil {
		return err
	}
	if errno != 0 {
		return errno
	}
	return nil
}

// hugeSetting says when memory of memfds may be in huge pages (Documentation/admin-guide/mm/transhuge.rst of Linux).
const hugeSetting = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"

// HugePages reports why this kernel does not put memory into huge pages for [Memory.Collapse].
func HugePages() error {
	text, err := os.ReadFile(hugeSetting)
	if err != nil {
		return fmt.Errorf("this kernel has no huge pages for shared memory: %w", err)
	}
	return hugeAllowed(string(text))
}

// hugeAllowed is HugePages of what the setting says.
func hugeAllowed(setting string) error {
	for _, off := range []string{"[never]", "[deny]"} {
		if strings.Contains(setting, off) {
			return fmt.Errorf("%s is %q: allow huge pages to those who ask for them (echo advise > %s)", hugeSetting, off[1:len(off)-1], hugeSetting)
		}
	}
	return nil
}
