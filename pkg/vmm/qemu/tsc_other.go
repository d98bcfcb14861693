//go:build !amd64

package qemu

// tscRate is not known: the guest's counter is not this processor's.
var tscRate = func() int { return 0 }
