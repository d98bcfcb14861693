package migrate

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	"github.com/drafter-vm/drafter/pkg/wire"
)

var (
	// ErrInDoubt is wrapped by the error of [Send] when the guest was given away and the destination did not confirm
	// that it runs. The guest stays paused here and must stay so until it is known that the destination will never run
	// it: two running copies would be the worst outcome of all. [Receive] wraps it when it was given the guest and can
	// neither run it nor durably promise never to.
	ErrInDoubt = errors.New("ownership of the guest is in doubt")

	// ErrUnproven is wrapped by what is logged, and at the end returned, of somebody who came when the link was cut, and could not prove to
	// be the other side of the migration. He has learned nothing but its public id, and changed nothing.
	ErrUnproven = errors.New("the other side has not proven to be that of this migration")

	// ErrUnsettled is wrapped by the error of [Send] when the guest runs at the destination and content that it needs is still
	// only here: keep the devices, and meet the destination again ([RejoinSource]). [Receive] wraps it when the guest runs
	// here and lacks content: it should be paused until the source is found again ([RejoinDestination]).
	ErrUnsettled = errors.New("content of the guest is missing at the destination")

	// ErrGaveUp is wrapped by the error of [Send] when the guest runs on here because the [Goal] could not be reached.
	ErrGaveUp = errors.New("migration given up")

	// ErrNeverRan may be wrapped by an error of [Target.Run] when it is certain that the guest executed nothing here and
	// cannot any more. The guest then goes back to the source, even after commit.
	ErrNeverRan = errors.New("guest never ran here")
)

// PeerError is the reason the other side gave for ending the migration.
type PeerError struct {
	Role     wire.Role // who gave it
	Code     wire.Code // what kind of reason
	Reason   string    // printable
	NeverRan bool      // the peer promised, durably, never to run the guest
}

func (e *PeerError) Error() string {
	return fmt.Sprintf("%v ended the migration: %v: %s", e.Role, e.Code, e.Reason)
}

// told is an error that carries what the peer may know of it. Errors of devices and hooks hold paths and other things of
// this host, so that only what was chosen for the peer's eyes is sent: see abortFor.
type told struct {
	code wire.Code
	text string
	err  error // may be nil
}

func (e *told) Error() string {
	if e.err != nil {
		return e.err.Error()
	}
	return e.text
}

func (e *told) Unwrap() error { return e.err }

// Refuse returns an error for [Target.Prepare] whose text is sent to the source. The text of any other error stays here.
func Refuse(format string, args ...any) error {
	return &told{code: wire.CodeRefused, text: fmt.Sprintf(format, args...)}
}

// tell attaches to err what the peer is told about it.
func tell(code wire.Code, err error, format string, args ...any) error {
	return &told{code: code, text: fmt.Sprintf(format, args...), err: err}
}

// abortFor chooses what the peer is told about err.
func abortFor(role wire.Role, err error) wire.Abort {
	var t *told
	errno, isErrno := errnoOf(err)
	switch {
	case errors.As(err, &t):
		return wire.Abort{Code: t.code, Reason: t.text}
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return wire.Abort{Code: wire.CodeCanceled, Reason: fmt.Sprintf("the %v was stopped", role)}
	case errors.Is(err, wire.ErrMalformed):
		return wire.Abort{Code: wire.CodeProtocol, Reason: err.Error()}
	case isErrno: // its text is the kernel's and names nothing of ours
		return wire.Abort{Code: wire.CodeInternal, Reason: fmt.Sprintf("%s; the log of the %v says more", errno.Error(), role)}
	}
	return wire.Abort{Code: wire.CodeInternal, Reason: fmt.Sprintf("the log of the %v says more", role)}
}

func errnoOf(err error) (syscall.Errno, bool) {
	var errno syscall.Errno
	ok := errors.As(err, &errno)
	return errno, ok
}
