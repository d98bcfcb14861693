// Package button tells the programs in test guests of the power button. It needs the kernel's modules button and evdev.
package button

import (
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
)

// Watch looks at all input devices from now on. What it returns receives nil when the power button is pressed, or why a device cannot be read.
func Watch() (<-chan error, error) {
	paths, err := filepath.Glob("/dev/input/event*")
	if err != nil || len(paths) == 0 {
		return nil, errors.Join(err, errors.New("there is no input device"))
	}
	pressed := make(chan error, len(paths))
	for _, path := range paths {
		f, err := os.Open(path)
		if err != nil {
			return nil, err
		}
		go func() { // for as long as the guest runs
			defer f.Close()
			pressed <- await(f)
		}()
	}
	return pressed, nil
}

// await reads until the button is pressed.
func await(f *os.File) error {
	// struct input_event of linux/input.h: a time of two longs, type, code, value.
	var event struct {
		_          [2]int64
		Type, Code uint16
		Value      int32
	}
	const keyEvent, keyPower = 1, 116 // EV_KEY and KEY_POWER of linux/input-event-codes.h
	for {
		if err := binary.Read(f, binary.NativeEndian, &event); err != nil {
			return err
		}
		if event.Type == keyEvent && event.Code == keyPower && event.Value == 1 {
			return nil
		}
	}
}
