// Command inner is the first process of the guest within: it uses the disk that was passed through, and powers off when it is told to.
package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/drafter-vm/drafter/internal/testguest/button"
)

// The disk's blocks of 4 KiB: the first is read, the second written.
const (
	disk      = "/dev/nvme0n1"
	blockSize = 4096
	says      = "written by the guest within"
)

func main() {
	if err := run(); err != nil {
		fmt.Println("inner: failed:", err)
	}
	unix.Sync()
	fmt.Println("inner: end:", unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF))
}

func run() error {
	for _, m := range [][2]string{{"devtmpfs", "/dev"}, {"proc", "/proc"}, {"sysfs", "/sys"}} {
		if err := os.MkdirAll(m[1], 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m[0], m[1], m[0], 0, ""); err != nil && err != unix.EBUSY {
			return fmt.Errorf("mount %s: %w", m[1], err)
		}
	}
	modules, err := filepath.Glob("/modules/*.ko")
	if err != nil {
		return err
	}
	slices.Sort(modules)
	for _, m := range modules {
		if !strings.Contains(m, "button") && !strings.Contains(m, "evdev") {
			continue
		}
		f, err := os.Open(m)
		if err != nil {
			return err
		}
		err = unix.FinitModule(int(f.Fd()), "", 0)
		f.Close()
		if err != nil {
			return fmt.Errorf("load %s: %w", m, err)
		}
	}
	var f *os.File
	for range 300 {
		if f, err = os.OpenFile(disk, os.O_RDWR|os.O_SYNC, 0); err == nil {
			break
		}
		time.Sleep(time.Second)
	}
	if err != nil {
		return err
	}
	b := make([]byte, blockSize)
	if _, err := f.ReadAt(b, 0); err != nil {
		return err
	}
	fmt.Printf("inner: read %q\n", bytes.TrimRight(b, "\x00"))
	clear(b)
	copy(b, says)
	if _, err := f.WriteAt(b, blockSize); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	fmt.Println("inner: written")
	pressed, err := button.Watch()
	if err != nil {
		return err
	}
	err = <-pressed
	fmt.Println("inner: the power button was pressed")
	return err
}
