#!/bin/bash
# What the emulated host does. The test reads its second serial port, and boots the host again for what is not done when it ends.
exec >/dev/ttyS1 2>&1
cd /root
export DRAFTER_TESTGUEST=/root/guest HOME=/root
modprobe kvm_amd
modprobe tun
mkdir -p bin && ln -sf /usr/local/bin/drafter bin/drafter
touch tried
echo "outer: up"

# An emulated processor takes an interrupt of the host's for one of the guest's now and then, or the other way around: a guest stands still then, whatever
# runs it, or the host panics. So what does not end in time, or brings the host down, is tried again, which is said.
while read -r limit name command; do
	n=$(grep -cxF "$name" tried)
	[ "$n" -ge 4 ] && continue
	[ "$n" -gt 0 ] && echo "outer: $name: it stood still, or the host ended"
	echo "$name" >>tried
	sync
	timeout -s KILL "$limit" bash -c "$command"
	status=$?
	if [ "$status" -eq 137 ]; then
		break # with all that it has left
	fi
	echo "outer: $name: status $status"
	printf '%s\n%s\n%s\n%s\n' "$name" "$name" "$name" "$name" >>tried
done <parts
cut -d' ' -f2 parts | while read -r name; do
	[ "$(grep -cxF "$name" tried)" -ge 4 ] || exit 1
done && echo "outer: done"
sync
poweroff -f
