// Package sysctl borrows the kernel's network settings of a host, and gives them back.
//
// A host that forwards packets for guests needs settings that belong to the host, not to us. Whoever needs one says so under a name:
//
//	err := settings.Borrow("nat ark", sysctl.Setting{Key: "net/ipv4/ip_forward", Value: "1"})
//	…
//	err = settings.Return("nat ark")
//
// What a setting was before is written down before it is changed, in a file that outlives the process, and is put back when the last of
// its users has returned it. A user that was killed returns it after its next start, under the same name. What somebody else has
// changed meanwhile is theirs, and stays.
//
// # Concurrency
//
// All methods may be called by any goroutine of any process: a lock on the file's folder puts them in an order.
package sysctl
