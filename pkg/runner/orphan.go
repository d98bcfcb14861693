package runner

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/drafter-vm/drafter/pkg/vmm"
)

// machineFile is in the folder of each machine, beside its VMPath, and says what a later owner cannot know otherwise. Whoever
// made the folder has it locked (flock(2)), and the machine inherits that lock: a folder whose file is not locked is of a
// machine that has ended, and of an owner that has ended before it could clean up.
const machineFile = "machine.json"

// machineNote is the content of a machineFile. Which process the machine is is not in it: that is asked of the kernel.
type machineNote struct {
	Hypervisor    string      `json:"hypervisor"`
	Memory        string      `json:"memory,omitempty"` // name of the memfd, if it was another machine's
	Netns         string      `json:"netns,omitempty"`
	Interface     string      `json:"interface,omitempty"`
	UID           int         `json:"uid,omitempty"`
	GID           int         `json:"gid,omitempty"`
	CgroupVersion int         `json:"cgroupVersion,omitempty"`
	IOEngineSync  bool        `json:"ioEngineSync,omitempty"`
	Passthrough   []string    `json:"passthrough,omitempty"`
	NoMemory      bool        `json:"noMemory,omitempty"` // it has no device of memory
	Description   Description `json:"description"`
}

// makeNote makes and locks the machineFile of a new folder.
func (n machineNote) make(root string) (_ *os.File, err error) {
	text, err := json.Marshal(n)
	if err != nil {
		return nil, err
	}
	path := filepath.Join(root, machineFile)
	f, err := os.OpenFile(path+".new", os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	if _, err = f.Write(text); err == nil {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	}
	if err == nil {
		err = os.Rename(path+".new", path) // locked by the time that anybody finds it
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("make %q: %w", path, err)
	}
	return f, nil
}

func readNote(f *os.File) (machineNote, error) {
	var n machineNote
	text, err := io.ReadAll(io.NewSectionReader(f, 0, maxDescription))
	if err == nil {
		err = json.Unmarshal(text, &n)
	}
	if err != nil {
		return n, fmt.Errorf("read %q: %w", f.Name(), err)
	}
	return n, nil
}

// reapAll is reapFolders of all hypervisors.
func (i *Instance) reapAll() {
	for _, b := range i.cfg.backends() {
		i.reapFolders(filepath.Join(i.cfg.Host.Dir, b.Name()))
	}
}

// reapFolders removes the folders that ended machines have left in dir, a hypervisor's, and what they have elsewhere: whatever
// was killed, what it leaves goes with the next instance that starts or ends beside it.
func (i *Instance) reapFolders(dir string) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return // there is none yet
	}
	for _, e := range entries {
		root := filepath.Join(dir, e.Name())
		f, err := os.OpenFile(filepath.Join(root, machineFile), os.O_RDWR, 0)
		if err != nil {
			continue // being made, or none of ours
		}
		if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil {
			i.unblock(root, f)
		} else if err := i.reap(root, f); err != nil {
			i.log.Warn("what an ended machine left could not be removed", "error", err)
		}
		f.Close()
	}
	making, err := LockFolder(dir, unix.LOCK_EX|unix.LOCK_NB)
	if err != nil {
		return // one is being made
	}
	defer making.Close()
	for _, e := range entries {
		root := filepath.Join(dir, e.Name())
		if _, err := os.Lstat(filepath.Join(root, machineFile)); errors.Is(err, os.ErrNotExist) {
			os.Remove(filepath.Join(root, machineFile+".new")) // who was making it was killed
			os.Remove(root)                                    // fails, rightly, when it has anything else
		}
	}
	os.Remove(dir) // the same
}

// LockFolder locks a folder as flock(2) does with how, until the file is closed. The error wraps os.ErrNotExist if it was removed by whom it was
// locked by. That of machines is locked shared by who makes a machine's folder in it, until its note is there, exclusively by who removes those that
// nobody is making any more, and the folder itself.
func LockFolder(dir string, how int) (*os.File, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	for err = unix.EINTR; errors.Is(err, unix.EINTR); {
		err = unix.Flock(int(f.Fd()), how)
	}
	var ours, its os.FileInfo
	if err == nil {
		ours, err = f.Stat()
	}
	if err == nil {
		its, err = os.Stat(dir)
	}
	if err == nil && !os.SameFile(ours, its) {
		err = fmt.Errorf("lock %q: %w: it was removed, and made anew", dir, os.ErrNotExist)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// reap removes what an ended machine has left. Its note is locked by us.
func (i *Instance) reap(root string, note *os.File) error {
	n, err := readNote(note)
	i.unmountDisks(root)
	if reaper, ok := named(i.cfg.backends(), n.Hypervisor).(vmm.Reaper); ok && err == nil {
		err = reaper.Reap(n.config(root))
	}
	return errors.Join(err, os.RemoveAll(root))
}

// unblock lets a machine end that somebody has killed, and that waits for the dead owner of its disks.
func (i *Instance) unblock(root string, note *os.File) {
	n, err := readNote(note)
	if e, ok := named(i.cfg.backends(), n.Hypervisor).(vmm.Ender); ok && err == nil && e.Ending(n.config(root)) {
		i.unmountDisks(root)
	}
}

// config is what a backend needs to know of a machine without an owner.
func (n machineNote) config(root string) vmm.Config {
	return vmm.Config{Dir: filepath.Join(root, "root"), CgroupVersion: n.CgroupVersion, CgroupName: filepath.Base(root)}
}

// orphan is a living machine whose owner has died. Its descriptors are ours too.
//
// That a process is the machine of an instance is proven by the kernel, and by nothing that is written down: it holds the
// open file description that holds the owner's lock on the instance's record (see lockOwner), and we hold the process by a
// pidfd from before that was found out. So neither a process with a number that was used before nor somebody else's is
// ever taken for it.
type orphan struct {
	pid   int
	pidfd *os.File
	owner *os.File            // the lock on the instance
	note  *os.File            // its machineFile
	live  map[string]*os.File // those of its memfds that nobody took yet, by name
	disks *os.File            // the connection of its disks, if it has one and nobody took it yet
	root  string              // folder of the machine
	info  machineNote
}

// errNoOrphan says that no process could be found that holds the lock on an instance.
var errNoOrphan = errors.New("no process of this host can be seen to have it")

// findOrphan finds the machine that holds the lock on the instance whose record is in the file at path. The caller has
// the device itself locked, so that no peer is alive that could have the lock.
func findOrphan(path string) (*orphan, error) {
	path, err := filepath.Abs(path)
	if err == nil {
		path, err = filepath.EvalSymlinks(path)
	}
	if err != nil {
		return nil, err
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	failure := errNoOrphan
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		for fd, target := range descriptorsOf(pid) {
			if target != path {
				continue
			}
			o, err := holdOrphan(pid, fd, path)
			if err == nil {
				return o, nil
			}
			if !errors.Is(err, errNoOrphan) {
				failure = fmt.Errorf("process %d: %w", pid, err)
			}
		}
	}
	return nil, failure
}

// descriptorsOf are the descriptors of a process and what they are of, as /proc shows it to us: nothing when it has ended.
func descriptorsOf(pid int) map[int]string {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil
	}
	all := make(map[int]string, len(entries))
	for _, e := range entries {
		if target, err := os.Readlink(filepath.Join(dir, e.Name())); err == nil {
			if fd, err := strconv.Atoi(e.Name()); err == nil {
				all[fd] = target
			}
		}
	}
	return all
}

// holdOrphan takes hold of a process if its descriptor fd holds the lock on the file at path.
func holdOrphan(pid, fd int, path string) (_ *orphan, err error) {
	handle, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		return nil, errNoOrphan // it has just ended
	}
	o := &orphan{pid: pid, pidfd: os.NewFile(uintptr(handle), "pidfd"), live: make(map[string]*os.File)}
	defer func() {
		if err != nil {
			o.close()
			closeFiles(o.owner, o.note)
		}
	}()
	if o.owner, err = o.take(fd, path); err != nil {
		return nil, err
	}
	var ours, its unix.Stat_t
	if err := errors.Join(unix.Stat(path, &ours), unix.Fstat(int(o.owner.Fd()), &its)); err != nil {
		return nil, err
	}
	lock := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart}
	if ours.Dev != its.Dev || ours.Ino != its.Ino || unix.FcntlFlock(o.owner.Fd(), unix.F_OFD_SETLK, &lock) != nil {
		return nil, errNoOrphan // it has the file open, and not the lock
	}
	for fd, target := range descriptorsOf(pid) {
		if name, ok := memfdOf(target); ok {
			if o.live[name] != nil || !strings.HasPrefix(name, memfdPrefix) {
				continue
			}
			f, err := o.take(fd, target)
			if err != nil {
				return nil, err
			}
			// A hypervisor may have opened its memory once more, to read it.
			if flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFL, 0); err != nil || flags&unix.O_ACCMODE != unix.O_RDWR {
				f.Close()
				continue
			}
			o.live[name] = f
		} else if target == "/dev/fuse" && o.disks == nil {
			if o.disks, err = o.take(fd, target); err != nil {
				return nil, err
			}
		} else if filepath.Base(target) == machineFile && o.note == nil {
			if o.note, err = o.take(fd, target); err != nil {
				return nil, err
			}
			o.root = filepath.Dir(target)
		}
	}
	if o.ending() {
		return nil, errNoOrphan // and what was listed may be of another by now
	}
	if o.note == nil {
		return nil, fmt.Errorf("it is the machine of this instance, but its folder is gone, and with it the way to it: end it (kill -9 %d), then start the instance with --boot", pid)
	}
	if o.info, err = readNote(o.note); err != nil {
		return nil, err
	}
	return o, nil
}

// memfdPrefix begins the names of the memfds that a machine is given: its RAM, and what is known of its disks.
const memfdPrefix = "drafter-"

// memfdOf is the name of the memfd that a descriptor is of, where /proc shows that it is of target (proc_pid_fd(5)).
func memfdOf(target string) (name string, ok bool) {
	return strings.CutPrefix(strings.TrimSuffix(target, " (deleted)"), "/memfd:")
}

// take duplicates a descriptor of the process. With errNoOrphan the process has ended, or closed it, since it was listed.
func (o *orphan) take(fd int, name string) (*os.File, error) {
	got, err := unix.PidfdGetfd(int(o.pidfd.Fd()), fd, 0)
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EBADF) {
		return nil, errNoOrphan
	} else if err != nil {
		return nil, fmt.Errorf("take %q of it: %w", name, err)
	}
	return os.NewFile(uintptr(got), name), nil
}

// claim takes a memfd over; nil if the machine has none of that name.
func (o *orphan) claim(name string) *os.File {
	f := o.live[name]
	delete(o.live, name)
	return f
}

// ending reports whether the process has ended or is being ended by the kernel, which takes its time with much memory.
func (o *orphan) ending() bool {
	if o.ended(0) {
		return true
	}
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", o.pid))
	if err != nil {
		return true
	}
	const flags, exiting = 6, 0x4 // field 9 of proc_pid_stat(5), counted after the name; PF_EXITING of linux/sched.h
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	if len(fields) <= flags {
		return true
	}
	n, err := strconv.ParseUint(fields[flags], 10, 64)
	return err != nil || n&exiting != 0
}

// ended waits up to d for the end of the process.
func (o *orphan) ended(d time.Duration) bool {
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(o.pidfd.Fd()), Events: unix.POLLIN}}, int(d.Milliseconds()))
	return n > 0 && err == nil
}

// end kills the machine and removes what it has. The lock on the instance stays, with o.owner.
func (i *Instance) end(ctx context.Context, o *orphan) error {
	if err := unix.PidfdSendSignal(int(o.pidfd.Fd()), unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("end process %d: %w", o.pid, err)
	}
	i.unmountDisks(o.root)
	for !o.ended(50 * time.Millisecond) {
		if ctx.Err() != nil {
			return fmt.Errorf("wait for the end of process %d: %w", o.pid, context.Cause(ctx))
		}
	}
	err := i.reap(o.root, o.note)
	os.Remove(filepath.Dir(o.root)) // of the hypervisor; fails, rightly, when it is not empty
	return err
}

// close lets go of the process, and of those of its memfds that nobody took. The locks are the instance's.
func (o *orphan) close() {
	for _, f := range o.live {
		f.Close()
	}
	closeFiles(o.disks)
	o.pidfd.Close()
}

// closeFiles closes those files that there are, through which nothing was written.
func closeFiles(files ...*os.File) {
	for _, f := range files {
		if f != nil {
			f.Close()
		}
	}
}

// endingTime is how long the kernel may take to let go of what an ended process had.
const endingTime = 10 * time.Second

// lockInstance is lockOwner that finds the machine that has the lock, if one has. One that is ending is waited for.
func lockInstance(ctx context.Context, c DeviceConfig) (*os.File, *orphan, error) {
	deadline := time.Now().Add(endingTime)
	for {
		owner, err := lockOwner(c)
		if err == nil || !errors.Is(err, ErrAlive) {
			return owner, nil, err
		}
		o, why := findOrphan(c.recordFile())
		if why == nil {
			return nil, o, nil
		}
		if !errors.Is(why, errNoOrphan) || time.Now().After(deadline) {
			return nil, nil, fmt.Errorf("%w (%w)", err, why)
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
			return nil, nil, fmt.Errorf("%w (%w)", err, context.Cause(ctx))
		}
	}
}

// Alive reports whether the instance with these devices is in the hands of a living process: a peer, or the machine that a
// peer left behind. It opens no device and changes nothing.
func Alive(devices []DeviceConfig) bool {
	for _, d := range devices {
		if d.Name != StateDevice {
			continue
		}
		f, err := os.OpenFile(d.recordFile(), os.O_RDWR, 0)
		if err != nil {
			return false
		}
		defer f.Close()
		lock := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart}
		return unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &lock) == nil && lock.Type != unix.F_UNLCK
	}
	return false
}
