// Package vfiotest shows that a device of a host reaches a guest, on a host that is emulated for it: most machines that run tests have no IOMMU, and
// what cannot be seen to work does not.
//
// The test makes a host of a blueprint, with QEMU and drafter in it, and boots it with an emulated IOMMU and an NVMe disk. There, a script has drafter
// refuse the disk while the host's driver has it, then passes it through to a guest, which reads what the outermost host has written to the disk, and
// writes what that one reads. The guest shuts down when its power button is pressed.
//
// A guest that is emulated on an emulated host takes some ten minutes to boot: the test runs with -long only (make test-vfio).
package vfiotest
