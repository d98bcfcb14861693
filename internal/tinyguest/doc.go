// Package tinyguest is a guest without an operating system, for tests of a VMM on hosts whose KVM cannot boot one. It counts through its
// memory, a page after the other, and compares with what it left there the last time, writes what it has come to on its disk, flushes that, reads what
// it wrote before, compares that, too, and says on the serial port how it goes: see [Pass] and [Broken].
//
//	os.WriteFile("vmlinux", tinyguest.Kernel(), 0o600)
//
// It needs [MinMemory] bytes of RAM, and a virtio disk of [Blocks] blocks, or none, and is of amd64.
package tinyguest
