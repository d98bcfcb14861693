// Package blueprint builds what a VM boots (a kernel, an initrd and a root disk) from Debian packages.
//
//	result, err := blueprint.Build(ctx, blueprint.Config{
//		Agent:    "bin/drafter-agent",
//		Packages: []string{"valkey-server"},
//	})
//	// result.Kernel, result.Initrd and result.Disk can be booted
//
// # How a build goes
//
//  1. The lock file says which packages, by digest. Without one that fits the request, the archive's signed indexes are
//     read and a version of everything is chosen ([Config.Lock]).
//  2. What the cache has not is downloaded, several at a time, and verified.
//  3. The packages are unpacked into a tree in memory, with the owners and modes they ask for; large contents wait in one
//     unnamed file. Their maintainer scripts are interpreted over that tree, by a shell interpreter whose programs are
//     Go functions: none runs on the host.
//  4. The tree is made a guest: its network address, its console, Drafter's services.
//  5. The tree goes, as a tar stream, into mke2fs, which is a program of the lock, run from the cache with its own
//     libraries. The kernel is unpacked to an ELF file; its modules and busybox become the initrd.
//
// No step needs a privilege, a loop device, a mount or a container.
//
// # What holds
//
//   - The same lock file, configuration and files of the host give the same bytes, whoever builds, where and when. The
//     mirror does not matter, unless it is given by name (then it is in the guest's apt sources).
//   - Nothing unverified is used: InRelease by the archive's keys, everything else by SHA-256 from there, or from the lock.
//   - The files appear in the output folder complete or not at all. A cancelled build leaves at most downloads.
//   - A second build with nothing changed compares digests and ends. Changed means: configuration, lock, files of the host,
//     this package's own source, or a file of the blueprint that was written to.
//   - The lock in use follows the archive: a package that is no longer served is replaced, with a warning. A build that
//     must not do that is [Config.Locked].
//
// Build may be called concurrently; two builds into one folder at a time are an error, a shared cache is not.
//
// # What the guest is
//
// A Debian without documentation and translations, on an ext4 file system labelled drafter-root, started by systemd. It
// logs in as root on ttyS0, without a password unless [Config.RootPassword] gives one: who holds the console holds the VM.
// dpkg and apt work. The kernel is not one of its packages, as it does not come from its disk. Its interface is the one
// with the configured MAC, or the only one, named eth0, with a fixed address, without duplicate address detection.
//
// Services, in /lib/systemd/system, all of the program /usr/bin/drafter-agent:
//
//   - drafter-vsock.service ("drafter-agent vsock") carries guest sockets where the machine has the virtio-serial port
//     org.drafter.vsock; it is the first to start;
//   - drafter-agent.service ("drafter-agent agent") hears of suspend and resume, and runs /etc/drafter/before-suspend.d and
//     /etc/drafter/after-resume.d;
//   - drafter-liveness.service ("drafter-liveness") says that the guest is up, once all other services are.
//
// With [Config.Desktop] there are two more, which run as the user desktop: drafter-desktop.service, a compositor without a screen
// around one program, and drafter-vnc.service, which shows it at port 5900 to whoever asks. The guest is up once that answers.
//
// With [Config.OCI] there is drafter-containers.service ("drafter-agent containers"), which runs what is on disks of OCI bundles. The guest is up once
// all of that is ready.
//
// The initrd reads root= (default /dev/vda; LABEL= and UUID= work), rootfstype=, rootflags=, init= and ro from the kernel's
// command line.
//
// # What it does not do
//
// It runs no program of the guest, so packages whose scripts need one (that make keys, or are written in Perl) are left
// "unpacked", with a warning: `dpkg --configure -a` finishes them at the guest's first boot, before it counts as alive. It knows amd64 only, and follows no
// recommendations. Resolution is greedy and never goes back on an alternative.
package blueprint
