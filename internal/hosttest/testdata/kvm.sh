#!/bin/bash
# What the emulated host does. The test reads its second serial port.
exec >/dev/ttyS1 2>&1
cd /root
export DRAFTER_TESTGUEST=/root/guest HOME=/root
modprobe kvm_amd
modprobe tun
part() {
	local name=$1
	shift
	"$@"
	echo "outer: $name: status $?"
}
grep -m1 -o -w svm /proc/cpuinfo
part backends ./backends.test -test.v -test.timeout 100m
part qemu ./qemu.test -test.v -test.timeout 60m -test.run 'TestSuite$'
mkdir bin && ln -s /usr/local/bin/drafter bin/drafter
for hypervisor in qemu firecracker; do
	part "demo $hypervisor" ./demo -bin bin -out "out-$hypervisor" -blueprint blueprint -hypervisor "$hypervisor"
done
poweroff -f
