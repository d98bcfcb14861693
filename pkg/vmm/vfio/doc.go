// Package vfio says whether a PCI device of the host can be passed through to a machine, and if not, what is to be done.
//
//	devices, err := vfio.Check([]string{"0000:01:00.0"})
//
// # What that takes
//
// The kernel's VFIO (Documentation/driver-api/vfio.rst) gives a process the devices of an IOMMU group, whole groups only: what a device does
// in memory could otherwise reach the memory of the others. So the host's IOMMU is on, and each device of the group has vfio-pci for its driver,
// or pci-stub, or none, or is a bridge, which the kernel keeps.
//
// Nothing is changed here: which driver has a device is the affair of whoever runs the host.
//
// # What a machine with such a device cannot do
//
// What is inside the device is known to nobody else, and it writes to the guest's memory unseen. So there are no snapshots, and no live migration:
// such a VM boots, and shuts down.
//
// All functions may be called concurrently.
package vfio
