#!/bin/bash
# What the emulated host does. The test reads its second serial port.
exec >/dev/ttyS1 2>&1
cd /root
export DRAFTER_TESTGUEST=/root/guest HOME=/root
modprobe kvm_amd
modprobe tun

# part says how a command has ended. Now and then an emulated processor loses an interrupt of the guest's, and that stands still for good, whatever runs
# it: a command that does not end in time is tried again, which is said.
part() {
	local name=$1 limit=$2 status
	shift 2
	for _ in 1 2 3; do
		timeout -s KILL "$limit" "$@"
		status=$?
		[ "$status" -eq 137 ] || break
		echo "outer: $name: it stood still"
		pkill -KILL -f 'firecracker|qemu-system|drafter'
	done
	echo "outer: $name: status $status"
}

while read -r suite binary name; do
	part "$suite/$name" 420 "./$binary" -test.v -test.run "^$suite\$/^$name\$"
done <cases
part backends 1200 ./backends.test -test.v -test.skip '^TestFirecracker(Suite|Jailed)$'
mkdir bin && ln -s /usr/local/bin/drafter bin/drafter
for hypervisor in qemu firecracker; do
	part "demo $hypervisor" 1200 ./demo -bin bin -out "out-$hypervisor" -blueprint blueprint -hypervisor "$hypervisor"
done
poweroff -f
