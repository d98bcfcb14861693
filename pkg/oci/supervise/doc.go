// Package supervise runs, in a guest, the containers that disks of the machine hold, one each: it is drafter-agent containers.
//
//	err := supervise.Run(ctx, supervise.Config{})
//
// It is one process beside the agent, the only one that starts a container here. The machine is the boundary around what runs in it: a container has
// the network of its guest, and its host name unless it brings one of its own.
//
// # Disks
//
// A disk holds a container if it has a file system (ext2 to ext4, erofs, squashfs, xfs, btrfs) that is neither mounted nor in fstab(5), and there, at its root,
// are config.json and the folder rootfs (package bundle). Its label does not matter. It is mounted at /run/drafter/oci/NAME, in which NAME is, the first that can be one, the annotation
// [bundle.NameAnnotation], the disk's serial, by which QEMU tells it the device's name, and the kernel's name. The second of a name is NAME-2. What a disk that
// cannot be written lacks, a layer in memory has: what the container writes to its root is gone when it ends.
//
// # From config.json to what runs
//
// The runtime, crun or else runc, has a copy of config.json that is made anew at each start, in which
//
//   - there is no terminal, no network namespace, and one of the host name only with config.hostname;
//   - the control group is below that of the supervisor's service;
//   - /etc/resolv.conf, /etc/hosts and /etc/hostname are those of the guest, also after they change, unless config.json mounts something there;
//   - a source LABEL=… or UUID=… is a file system of another disk, which is waited for [volumeWait] and mounted once, however many containers have it;
//   - the environment has what [Client.SetEnvironment] was given last.
//
// What rootless or foreign tools leave in it and no other machine has is left out, with a warning where somebody might miss it: hooks and bind mounts whose files are not
// here, profiles of AppArmor and SELinux that are not loaded, user namespaces whose ids the files of rootfs do not have. Everything else reaches the runtime as it is, and
// what is wrong with it is the runtime's to say.
//
// # A container's life
//
//	starting ──► running ──► ready
//	   ▲            └────┬─────┘
//	   │ 0.1 s to 10 s   ▼ ended
//	waiting ◄── again? ──┤ by bundle.RestartAnnotation
//	                     ▼
//	                ended, failed ──► starting, if somebody asks for it
//
// The pause doubles with each end that is followed by a start, and begins anew after a run of 10 s. Ready is what [bundle.ReadyAnnotation] says. Once all of them are ready, or have
// ended with status 0 and are not started again, and for a second, the service manager is told READY=1; the guest's liveness waits for that. A container that cannot be started is
// on the console again and again, and the guest is not up: who waits for it has a deadline of his own.
//
// When ctx ends, containers are told so (SIGTERM, or what the image asks for), killed 10 s later, and file systems unmounted.
//
// # Never two of the same
//
// A container has one goroutine, and a state in the runtime's folder. What is found there before a start is killed first: of a supervisor that died, or a runtime that was killed.
// It is not adopted, as neither its output nor its exit status can be had any more.
//
// # Output
//
// Each line, with the container's name in front, goes to standard output, which is the journal, and to the console. A container waits for the journal, which is in memory and always read.
// It does not wait for the console, whose other end is a serial line that perhaps nobody reads: 256 KiB wait there, then lines are left out, and counted. What
// the supervisor itself has to warn of is there, too.
package supervise
