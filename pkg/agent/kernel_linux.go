package agent

import (
	"encoding/binary"
	"fmt"
	"os"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// clockTolerance is how far the wall clock may be off without being set: a step costs programs more than it gives.
const clockTolerance = 5 * time.Millisecond

// Wall clocks outside these bounds are a broken host's.
var (
	earliest = time.Date(2025, 1, 1, 0, 0, 0, 0, time.UTC)
	latest   = time.Date(2200, 1, 1, 0, 0, 0, 0, time.UTC)
)

// setClock sets the wall clock if it is wrong, and returns by how much.
func setClock(now time.Time) (step time.Duration, err error) {
	if now.Before(earliest) || now.After(latest) {
		return 0, fmt.Errorf("set the clock: the host says it is %v", now.UTC())
	}
	step = now.Sub(time.Now().Round(0)) // wall clock readings on both sides
	if step.Abs() <= clockTolerance {
		return 0, nil
	}
	ts := unix.NsecToTimespec(now.UnixNano())
	if err := unix.ClockSettime(unix.CLOCK_REALTIME, &ts); err != nil {
		return 0, fmt.Errorf("set the clock by %v: %w", step, err)
	}
	return step, nil
}

// Requests of random(4) that golang.org/x/sys does not have, from linux/random.h.
const (
	rndAddEntropy = 0x40085203 // _IOW('R', 0x03, int[2])
	rndReseedCRNG = 0x5207     // _IO('R', 0x07)
)

// reseed mixes entropy into the kernel's random number generator, credits it in full, and makes the generator use it now:
// two clones must not go on with the same numbers.
func reseed(entropy []byte) error {
	f, err := os.OpenFile("/dev/urandom", os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("reseed the random number generator: %w", err)
	}
	defer f.Close()
	// struct rand_pool_info { int entropy_count (bits), buf_size (bytes); __u32 buf[]; }
	info := make([]byte, 8, 8+len(entropy))
	binary.NativeEndian.PutUint32(info, uint32(8*len(entropy)))
	binary.NativeEndian.PutUint32(info[4:], uint32(len(entropy)))
	info = append(info, entropy...)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), rndAddEntropy, uintptr(unsafe.Pointer(&info[0]))); errno != 0 {
		return fmt.Errorf("add entropy: %w", errno)
	}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), rndReseedCRNG, 0); errno != 0 {
		return fmt.Errorf("reseed the random number generator: %w", errno)
	}
	return nil
}
