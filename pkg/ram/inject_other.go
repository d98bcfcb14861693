//go:build !amd64

package ram

import (
	"errors"
	"runtime"
)

// canInject says that VMMs are started untouched on this architecture, without userfaultfd.
const canInject = false

var errInject = errors.New("executing system calls in another process is not implemented on " + runtime.GOARCH)

type tracee struct{ pid int }

func (t *tracee) open() error                          { return errInject }
func (t *tracee) close() error                         { return nil }
func (t *tracee) call(nr, a, b, c uint64) (int, error) { return 0, errInject }
