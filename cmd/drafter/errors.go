package main

import "fmt"

// usageError is an error in the command line itself: nothing was done, and the exit status is 2.
type usageError struct{ err error }

// usageErrorf makes a usageError with a message as of [fmt.Errorf].
func usageErrorf(format string, args ...any) error {
	return &usageError{fmt.Errorf(format, args...)}
}

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }
