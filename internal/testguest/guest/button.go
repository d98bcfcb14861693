package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// heedButton has the guest power off when its power button is pressed.
func heedButton() error {
	paths, err := filepath.Glob("/dev/input/event*")
	if err != nil || len(paths) == 0 {
		return errors.Join(err, errors.New("there is no input device"))
	}
	for _, path := range paths {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		go func() {
			defer f.Close()
			// struct input_event of linux/input.h: a time of two longs, type, code, value.
			var event struct {
				_          [2]int64
				Type, Code uint16
				Value      int32
			}
			const keyEvent, keyPower = 1, 116 // EV_KEY and KEY_POWER of linux/input-event-codes.h
			for binary.Read(f, binary.NativeEndian, &event) == nil {
				if event.Type == keyEvent && event.Code == keyPower && event.Value == 1 {
					unix.Sync()
					fmt.Println(unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF))
				}
			}
		}()
	}
	return nil
}
