// Package ram owns the RAM of a guest: a memfd that the VMM maps shared. It finds out which pages were written while a
// migration runs, and fills the memory while the guest is running on it already, for any VMM, unmodified.
//
//	mem, err := ram.Create("guest", 1<<30)
//	defer mem.Close()
//	cmd := exec.Command("qemu-system-x86_64", …, "-object",
//		"memory-backend-file,id=mem,size=1G,share=on,mem-path=/proc/self/fd/3", …)
//	cmd.ExtraFiles = []*os.File{mem.File()}
//	vmm, err := ram.Spawn(cmd, ram.Options{})       // instead of cmd.Start
//	err = mem.Attach(ctx, vmm)                      // once the VMM has mapped it
//	filler, err := mem.Fill(ctx, pkg, ram.FillOptions{})
//	<-filler.Ready()
//	…                                               // the guest may run
//	err = filler.Wait(ctx)                          // the package may go
//
//	tracker := mem.Tracker()                        // a migration
//	err = tracker.Start(ctx)
//	…                                               // copy everything mem.Device() has data for
//	dirty, err := tracker.Collect(ctx)              // … and then, again and again, what was written since
//
// # How it works
//
// userfaultfd is the kernel's way to let a program handle page faults. A userfaultfd belongs to the address space of the
// process that created it, and VMMs create none for us. So [Spawn] starts the VMM under ptrace, makes it execute
// userfaultfd(2) before its own first instruction, and takes a copy of the descriptor with pidfd_getfd(2). From then on
// the VMM is not traced, and knows nothing of it.
//
// Filling registers the VMM's mapping for missing pages: a thread that touches a page the memfd does not hold sleeps in
// the kernel until we have put the page there. A page that is in the memfd maps without us, which is why the background
// merely writes into the memfd.
//
// Tracking registers the mapping for write protection in the asynchronous mode (Linux 6.7): the kernel resolves the
// first write to a page by itself and remembers it; PAGEMAP_SCAN returns what it remembers and forgets it, atomically.
//
// A VMM that allocates its guest's RAM by itself gets ours all the same: [Spawn] maps it before the VMM's first instruction ([Options.Graft]), and
// when the VMM comes to ask the kernel for RAM, [Memory.Graft] answers with that address.
//
// Outside of filling no fault comes to us, and outside of tracking no page is protected: neither costs anything then.
//
// # The ladder
//
// Where the kernel, or the permission, does not allow this, there is less: see [Rung]. [Spawn] chooses the rung once,
// [Handle.Capabilities] and [Memory.Capabilities] report it with the reason, [Probe] foretells it. Everything works on
// every rung, through the same calls, but on [Eager] the guest must wait for [Filler.Ready] until the memory is full.
//
// # Invariants
//
//   - A guest never sees a page that has not arrived: it sleeps. This holds through errors of the source, cancellation,
//     and the death of this process, because the VMM keeps the userfaultfd open itself; [Adopt] takes it from there.
//     Only the VMM's own mapping is guarded: other processes that map the memfd (vhost-user) see zeros, and spoil the
//     hole they touch. They have to wait until the filling is complete.
//   - A page is stored once by a filling. What the guest wrote since is never overwritten.
//   - A write is never missed by a Collect, with the exception that [Memory.Tracker] names; it may be reported twice.
//   - The memfd is read and written through file operations, never through a mapping of our own: reading a hole through
//     a mapping would populate it, and writing into a missing page through one would show the guest half of it.
//   - A thread of the VMM that waits for a page holds up whatever it was doing: a vCPU, or the main loop and with it the
//     control socket. The filler must not depend on an answer of the VMM.
//
// # What it does not do
//
// It knows nothing of device state, of packages or of the network. Huge pages and memory of several NUMA nodes are left
// to the VMM's defaults. Writes to the file by others than [Memory.Device] are not tracked. Pages that a guest gives
// back (balloon, free page reporting), and the VMM itself frees, are not reported as written when they become zero by that:
// their contents are undefined for the guest until it writes them.
package ram
