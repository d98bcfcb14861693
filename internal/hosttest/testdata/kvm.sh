#!/bin/bash
# What the emulated host does. The test reads its second serial port, and boots the host again for what is not done when it ends.
exec >/dev/ttyS1 2>&1
cd /root
export DRAFTER_TESTGUEST=/root/guest HOME=/root
modprobe kvm_amd
modprobe tun
mkdir -p bin && ln -sf /usr/local/bin/drafter bin/drafter
touch tried over
echo "outer: up"

# An emulated processor takes an interrupt of the host's for one of the guest's now and then, or the other way around: a guest stands still then, whatever
# runs it, or the host panics. So what does not end in time, or only when a test has waited for so long that it gives up, or brings the host down, is
# tried again, which is said. The test counts that.
while read -r limit name command; do
	n=$(grep -cxF "$name" tried)
	grep -qxF "$name" over && continue
	[ "$n" -gt 0 ] && echo "outer: $name: it stood still, or the host ended"
	if [ "$n" -ge 4 ]; then
		echo "$name" >>over
		continue
	fi
	echo "$name" >>tried
	sync
	SECONDS=0
	timeout -s KILL "$limit" bash -c "$command"
	status=$?
	if [ "$status" -ne 0 ] && [ "$SECONDS" -ge $((limit / 2)) ]; then
		break # with all that it has left
	fi
	echo "outer: $name: status $status"
	echo "$name" >>over
done <parts
cut -d' ' -f2 parts | while read -r name; do
	grep -qxF "$name" over || exit 1
done && echo "outer: done"
sync
poweroff -f
