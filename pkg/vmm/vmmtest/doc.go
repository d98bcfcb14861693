// Package vmmtest is the suite that every [vmm.Backend] passes, against a real guest.
//
//	func TestSuite(t *testing.T) {
//		vmmtest.Run(t, vmmtest.Harness{Backend: qemu.New(qemu.Options{})})
//	}
//
// The guest (package testguest) boots once. What it was then is kept (device state, RAM, disk) and every other test
// starts from a copy of it, which takes a fraction of a boot and exercises Load all the time.
//
// Backends that are vmm.Adopters are tested from a second process: Run starts the test binary again, and in that
// process never returns.
package vmmtest
