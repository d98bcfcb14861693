package ram

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The kernel interfaces below are written out because golang.org/x/sys has neither their numbers nor their structures.
// Layouts and numbers are those of linux/userfaultfd.h and linux/fs.h; uffd_test.go compares the numbers with the ones
// the C macros give, and the array types next to each structure fail to compile when a size is not the kernel's.

// ioctl request numbers, _IOC(dir, type, nr, size) of asm-generic/ioctl.h: the same on amd64 and arm64.
const (
	iocRead      = 2
	iocReadWrite = 3

	uffdioAPI          = iocReadWrite<<30 | unsafe.Sizeof(uffdAPI{})<<16 | 0xAA<<8 | 0x3F          // UFFDIO_API
	uffdioRegister     = iocReadWrite<<30 | unsafe.Sizeof(uffdRegister{})<<16 | 0xAA<<8            // UFFDIO_REGISTER
	uffdioUnregister   = iocRead<<30 | unsafe.Sizeof(uffdRange{})<<16 | 0xAA<<8 | 0x01             // UFFDIO_UNREGISTER
	uffdioWake         = iocRead<<30 | unsafe.Sizeof(uffdRange{})<<16 | 0xAA<<8 | 0x02             // UFFDIO_WAKE
	uffdioCopy         = iocReadWrite<<30 | unsafe.Sizeof(uffdCopy{})<<16 | 0xAA<<8 | 0x03         // UFFDIO_COPY
	uffdioZeropage     = iocReadWrite<<30 | unsafe.Sizeof(uffdZeropage{})<<16 | 0xAA<<8 | 0x04     // UFFDIO_ZEROPAGE
	uffdioWriteprotect = iocReadWrite<<30 | unsafe.Sizeof(uffdWriteprotect{})<<16 | 0xAA<<8 | 0x06 // UFFDIO_WRITEPROTECT
	uffdIOCNew         = 0xAA << 8                                                                 // USERFAULTFD_IOC_NEW
	pagemapScan        = iocReadWrite<<30 | unsafe.Sizeof(pmScanArg{})<<16 | 'f'<<8 | 16           // PAGEMAP_SCAN
)

const (
	uffdAPIVersion = 0xAA // UFFD_API

	featureMissingShmem     = 1 << 5  // UFFD_FEATURE_MISSING_SHMEM
	featureWPHugetlbfsShmem = 1 << 12 // UFFD_FEATURE_WP_HUGETLBFS_SHMEM
	featureWPUnpopulated    = 1 << 13 // UFFD_FEATURE_WP_UNPOPULATED
	featureWPAsync          = 1 << 15 // UFFD_FEATURE_WP_ASYNC, since Linux 6.7

	featuresFull = featureMissingShmem | featureWPHugetlbfsShmem | featureWPUnpopulated | featureWPAsync
	featuresLazy = featureMissingShmem

	// featureInitialized is UFFD_FEATURE_INITIALIZED of fs/userfaultfd.c: not part of the interface proper, but visible
	// in /proc/PID/fdinfo, where it says that UFFDIO_API has been done.
	featureInitialized = 1 << 31

	modeMissing = 1 << 0 // UFFDIO_REGISTER_MODE_MISSING
	modeWP      = 1 << 1 // UFFDIO_REGISTER_MODE_WP

	copyModeWP = 1 << 1 // UFFDIO_COPY_MODE_WP

	eventPagefault = 0x12 // UFFD_EVENT_PAGEFAULT

	pmScanWPMatching   = 1 << 0 // PM_SCAN_WP_MATCHING
	pmScanCheckWPAsync = 1 << 1 // PM_SCAN_CHECK_WPASYNC
	pageIsWritten      = 1 << 1 // PAGE_IS_WRITTEN
)

// uffdMsg is struct uffd_msg with the pagefault member of its union.
type uffdMsg struct {
	event   uint8
	_       [7]byte
	flags   uint64
	address uint64
	ptid    uint32
	_       uint32
}

// uffdAPI is struct uffdio_api.
type uffdAPI struct{ api, features, ioctls uint64 }

// uffdRange is struct uffdio_range.
type uffdRange struct{ start, len uint64 }

// uffdRegister is struct uffdio_register.
type uffdRegister struct {
	uffdRange
	mode, ioctls uint64
}

// uffdCopy is struct uffdio_copy.
type uffdCopy struct {
	dst, src, len, mode uint64
	copied              int64
}

// uffdZeropage is struct uffdio_zeropage.
type uffdZeropage struct {
	uffdRange
	mode   uint64
	zeroed int64
}

// uffdWriteprotect is struct uffdio_writeprotect.
type uffdWriteprotect struct {
	uffdRange
	mode uint64
}

// pmScanArg is struct pm_scan_arg.
type pmScanArg struct {
	size, flags, start, end, walkEnd, vec, vecLen, maxPages          uint64
	categoryInverted, categoryMask, categoryAnyofMask, returnMaskSet uint64
}

// pageRegion is struct page_region.
type pageRegion struct{ start, end, categories uint64 }

var (
	_ [32]byte = [unsafe.Sizeof(uffdMsg{})]byte{}
	_ [24]byte = [unsafe.Sizeof(uffdAPI{})]byte{}
	_ [16]byte = [unsafe.Sizeof(uffdRange{})]byte{}
	_ [32]byte = [unsafe.Sizeof(uffdRegister{})]byte{}
	_ [40]byte = [unsafe.Sizeof(uffdCopy{})]byte{}
	_ [32]byte = [unsafe.Sizeof(uffdZeropage{})]byte{}
	_ [24]byte = [unsafe.Sizeof(uffdWriteprotect{})]byte{}
	_ [96]byte = [unsafe.Sizeof(pmScanArg{})]byte{}
	_ [24]byte = [unsafe.Sizeof(pageRegion{})]byte{}
)

// ioctl issues a request with a pointer argument, again when a signal interrupted it.
func ioctl(fd int, request uintptr, arg unsafe.Pointer) error {
	for {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(arg))
		switch errno {
		case 0:
			return nil
		case unix.EINTR:
		default:
			return errno
		}
	}
}

// uffd is our reference to the userfaultfd of the VMM's address space. The VMM holds one of its own for as long as it
// lives, so closing ours never resolves a fault.
//
// All methods may be called concurrently, except close.
type uffd struct {
	fd   int      // for ioctls; owned by file
	file *os.File // for reads through the poller, so that they can be interrupted
}

// newUFFD takes over fd, which must be nonblocking and negotiated: before, polling it reports an error, and the runtime's
// poller would remember that.
func newUFFD(fd int) *uffd {
	return &uffd{fd: fd, file: os.NewFile(uintptr(fd), "userfaultfd")}
}

func (u *uffd) close() error { return u.file.Close() }

// negotiate does the UFFDIO_API handshake. A set of features the kernel lacks is refused with EINVAL and may be
// followed by an attempt with less; after a success there is no second one.
func negotiate(fd int, features uint64) error {
	arg := uffdAPI{api: uffdAPIVersion, features: features}
	if err := ioctl(fd, uffdioAPI, unsafe.Pointer(&arg)); err != nil {
		return fmt.Errorf("negotiate userfaultfd features %#x: %w", features, err)
	}
	return nil
}

func (u *uffd) register(r uffdRange, mode uint64) error {
	arg := uffdRegister{uffdRange: r, mode: mode}
	if err := ioctl(u.fd, uffdioRegister, unsafe.Pointer(&arg)); err != nil {
		return fmt.Errorf("register %#x+%#x with userfaultfd: %w", r.start, r.len, err)
	}
	return nil
}

func (u *uffd) unregister(r uffdRange) error {
	if err := ioctl(u.fd, uffdioUnregister, unsafe.Pointer(&r)); err != nil {
		return fmt.Errorf("unregister %#x+%#x from userfaultfd: %w", r.start, r.len, err)
	}
	return nil
}

// wake makes every thread that waits for a page of r try its access again.
func (u *uffd) wake(r uffdRange) error {
	if err := ioctl(u.fd, uffdioWake, unsafe.Pointer(&r)); err != nil {
		return fmt.Errorf("wake %#x+%#x: %w", r.start, r.len, err)
	}
	return nil
}

// copyPage atomically puts page where nothing is, maps it and wakes whoever waits for it. EEXIST means that something
// was there already, and nobody was woken.
func (u *uffd) copyPage(dst uint64, page []byte, mode uint64) error {
	var pin runtime.Pinner
	pin.Pin(&page[0])
	defer pin.Unpin()
	arg := uffdCopy{dst: dst, src: uint64(uintptr(unsafe.Pointer(&page[0]))), len: uint64(len(page)), mode: mode}
	for {
		err := ioctl(u.fd, uffdioCopy, unsafe.Pointer(&arg))
		if errors.Is(err, unix.EAGAIN) && arg.copied <= 0 { // the address space is being changed by a fork or mremap
			runtime.Gosched()
			continue
		}
		return err
	}
}

// zeroPages is copyPage with zeros.
func (u *uffd) zeroPages(r uffdRange) error {
	arg := uffdZeropage{uffdRange: r}
	for {
		err := ioctl(u.fd, uffdioZeropage, unsafe.Pointer(&arg))
		if errors.Is(err, unix.EAGAIN) && arg.zeroed <= 0 {
			runtime.Gosched()
			continue
		}
		return err
	}
}

// disarm takes write protection, and what stands for it on unpopulated pages, off r. (It is put on by scanWritten.)
func (u *uffd) disarm(r uffdRange) error {
	for {
		arg := uffdWriteprotect{uffdRange: r}
		err := ioctl(u.fd, uffdioWriteprotect, unsafe.Pointer(&arg))
		if errors.Is(err, unix.EAGAIN) {
			runtime.Gosched()
			continue
		}
		if err != nil {
			return fmt.Errorf("take write protection off %#x+%#x: %w", r.start, r.len, err)
		}
		return nil
	}
}

// next returns the address of the next page fault. It blocks until there is one, or until interrupt is called, which
// makes it fail with os.ErrDeadlineExceeded.
func (u *uffd) next() (uint64, error) {
	var msg uffdMsg
	buf := unsafe.Slice((*byte)(unsafe.Pointer(&msg)), unsafe.Sizeof(msg))
	for {
		n, err := u.file.Read(buf)
		if err != nil {
			return 0, fmt.Errorf("read page fault: %w", err)
		}
		if n != len(buf) {
			return 0, fmt.Errorf("read page fault: got %d bytes, want %d", n, len(buf))
		}
		// No other event was asked for, so none should come; none would need an answer.
		if msg.event == eventPagefault {
			return msg.address, nil
		}
	}
}

// interrupt makes present and future calls of next fail; resume ends that.
func (u *uffd) interrupt() error { return u.file.SetReadDeadline(time.Unix(1, 0)) }
func (u *uffd) resume() error    { return u.file.SetReadDeadline(time.Time{}) }

// scanWritten calls found, in ascending order, with each range of [start, end) of the address space behind the open
// /proc/PID/pagemap that was written since it was last write-protected, and write-protects it again in the same atomic
// step. Pages that are not populated count as written until then, so the first scan of a range arms its tracking (in a
// third of the time UFFDIO_WRITEPROTECT takes). vec is working space. On an error, what found was told is no longer written in the eyes of the kernel.
func scanWritten(pagemap int, start, end uint64, vec []pageRegion, found func(pageRegion)) error {
	var pin runtime.Pinner
	pin.Pin(&vec[0])
	defer pin.Unpin()
	for start < end {
		arg := pmScanArg{
			size:          uint64(unsafe.Sizeof(pmScanArg{})),
			flags:         pmScanWPMatching | pmScanCheckWPAsync,
			start:         start,
			end:           end,
			vec:           uint64(uintptr(unsafe.Pointer(&vec[0]))),
			vecLen:        uint64(len(vec)),
			categoryMask:  pageIsWritten,
			returnMaskSet: pageIsWritten,
		}
		n, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(pagemap), pagemapScan, uintptr(unsafe.Pointer(&arg)))
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 {
			return fmt.Errorf("scan pagemap %#x-%#x: %w", start, end, errno)
		}
		for _, r := range vec[:n] {
			found(r)
		}
		if arg.walkEnd <= start {
			return fmt.Errorf("scan pagemap %#x-%#x: no progress", start, end)
		}
		start = arg.walkEnd
	}
	return nil
}
