package main

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/drafter-vm/drafter/internal/testguest/button"
)

// heedButton has the guest power off when its power button is pressed.
func heedButton() error {
	pressed, err := button.Watch()
	if err != nil {
		return err
	}
	go func() {
		if err := <-pressed; err != nil {
			fmt.Println(err)
			return
		}
		unix.Sync()
		fmt.Println(unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF))
	}()
	return nil
}
