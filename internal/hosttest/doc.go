// Package hosttest tests what the machines that run tests mostly lack, on hosts that are emulated for it: an IOMMU, and a processor that
// virtualises. What cannot be seen to work does not.
//
// A host is a blueprint with drafter in it, and whatever else the test needs there, which QEMU boots. It runs a script of testdata, and the test reads
// what that says.
//
// TestPassthrough gives the host an IOMMU and an NVMe disk. There, a script has drafter refuse the disk while the host's driver has it, then passes it
// through to a guest, which reads what the outermost host has written to the disk, and writes what that one reads. The guest shuts down when its
// power button is pressed.
//
// TestKVM gives it a processor with AMD's SVM, so that its KVM runs any guest. There, the suite of all hypervisors runs with a Linux under Firecracker,
// plain and jailed, and under QEMU's KVM, then the demo with both. QEMU's emulation of SVM mixes up interrupts of the host and the guest now and then (seen
// with 10.0.2 and 10.0.13): the guest never gets one of its own, or the host panics. So what does not end is tried again, on a host that is booted again,
// up to four times. What fails, fails.
//
// Guests of an emulated host are slow: these tests run with -long only (make test-vfio, make test-kvm).
package hosttest
