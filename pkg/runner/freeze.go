package runner

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// Freeze stops the machine's process, and with it the guest, until Thaw. Unlike Pause it works while the guest waits for what
// is missing: then the machine does not answer. Nothing but Thaw, Kill and deliveries to Late devices works meanwhile.
func (i *Instance) Freeze() error { return i.signal("freeze", unix.SIGSTOP) }

// Thaw undoes Freeze.
func (i *Instance) Thaw() error { return i.signal("thaw", unix.SIGCONT) }

func (i *Instance) signal(verb string, s unix.Signal) error {
	i.seen.Lock()
	machine := i.machine // which may be starting, and come to wait for what is missing
	i.seen.Unlock()
	if machine == nil || ended(machine) {
		return nil
	}
	if err := unix.Kill(machine.PID(), s); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("%s machine: %w", verb, err)
	}
	return nil
}

// thaw lets the orphan go on if its owner froze it: it must answer.
func (o *orphan) thaw() error {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", o.pid))
	if err != nil {
		return err
	}
	if f := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:])); len(f) == 0 || f[0] != "T" {
		return nil
	}
	return unix.PidfdSendSignal(int(o.pidfd.Fd()), unix.SIGCONT, nil, 0)
}
