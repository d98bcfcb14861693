//go:build !amd64

package ram

import (
	"errors"
	"runtime"

	"golang.org/x/sys/unix"
)

// canInject says that VMMs are started untouched on this architecture, without userfaultfd.
const canInject = false

var errInject = errors.New("executing system calls in another process is not implemented on " + runtime.GOARCH)

type tracee struct{ pid int }

func (t *tracee) open() error                            { return errInject }
func (t *tracee) close() error                           { return nil }
func (t *tracee) call(uint64, ...uint64) (uint64, error) { return 0, errInject }
func (t *tracee) scratch() uint64                        { return 0 }
func memoryCall(*unix.PtraceRegs) call                   { return call{} }
func skip(*unix.PtraceRegs)                              {}
func setResult(*unix.PtraceRegs, uint64)                 {}
