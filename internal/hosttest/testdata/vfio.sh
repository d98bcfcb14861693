#!/bin/bash
# What the emulated host does. The test reads its second serial port.
exec >/dev/ttyS1 2>&1
cd /root/inner
modprobe vfio-pci
disk=$(lspci -Dn | awk '$2 == "0108:" {print $1; exit}') # class 01h, sub-class 08h: NVMe
make() {
	drafter snapshotter --interface '' --memory-size 128 --cgroup-version 0 --shut-down --vfio "$disk" "$@" \
		--liveness-vsock-port 0 --agent-vsock-port 0 --resume-timeout 30m --boot-args 'console=ttyS0 quiet panic=-1 rdinit=/bin/inner' --devices '[
		{"name":"state","output":"/root/package/state.bin"},{"name":"config","output":"/root/package/config.json"},
		{"name":"kernel","input":"vmlinux","output":"/root/package/vmlinux"},{"name":"initrd","input":"initrd","output":"/root/package/initrd.img"},
		{"name":"disk","input":"disk","output":"/root/package/rootfs.ext4"}]'
}
echo "outer: device $disk"
make
echo "outer: with the host's driver: status $?"
echo vfio-pci >"/sys/bus/pci/devices/$disk/driver_override"
echo "$disk" >"/sys/bus/pci/devices/$disk/driver/unbind"
echo "$disk" >/sys/bus/pci/drivers_probe
make
echo "outer: passed through: status $?"
ls /root/package
poweroff -f
