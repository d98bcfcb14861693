package firecracker

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/drafter-vm/drafter/pkg/vmm"
)

// jail is where Firecracker's jailer confines it: Config.Dir is its root folder, and it runs as a user of its own. A nil jail is none.
//
// What the machine needs lies in that folder, owned by that user, which from its start on can put there what it likes: nothing of it is
// followed or believed afterwards.
type jail struct {
	program  string // the jailer
	dir      string // Config.Dir, with no links in its path
	uid, gid int
}

// findJail is the jail of a machine, nil if it is to have none.
func (b *Backend) findJail(cfg vmm.Config) (*jail, error) {
	if b.opts.Jailer == "" {
		if cfg.UID != 0 && cfg.UID != os.Geteuid() || cfg.GID != 0 && cfg.GID != os.Getegid() {
			return nil, fmt.Errorf("uid %d, gid %d: Firecracker runs as another user in its jailer only: say where that is (--jailer-bin)", cfg.UID, cfg.GID)
		}
		return nil, nil
	}
	program, err := exec.LookPath(b.opts.Jailer)
	if err == nil {
		program, err = filepath.Abs(program)
	}
	if err != nil {
		return nil, fmt.Errorf("find Firecracker's jailer: %w: install it, or say where it is (--jailer-bin)", err)
	}
	dir, err := filepath.EvalSymlinks(cfg.Dir)
	if err != nil {
		return nil, err
	}
	j := &jail{program: program, dir: dir, uid: cfg.UID, gid: cfg.GID}
	if filepath.Base(dir) != "root" || !strings.Contains(j.name(), hypervisor) || !validID(j.id()) {
		return nil, fmt.Errorf("the machine's folder %q: in the jailer it has to be BASE/%s/ID/root, with an ID of letters, digits and hyphens", cfg.Dir, hypervisor)
	}
	return j, nil
}

// validID reports whether the jailer takes an id.
func validID(id string) bool {
	return len(id) <= 64 && strings.Trim(id, "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ-") == ""
}

func (j *jail) id() string { return filepath.Base(filepath.Dir(j.dir)) }

// name is that of the folder, and therefore has to be that of the program in the jail.
func (j *jail) name() string { return filepath.Base(filepath.Dir(filepath.Dir(j.dir))) }

// outside is a file beside the jail, which it cannot reach.
func (j *jail) outside(name string) string { return filepath.Join(filepath.Dir(j.dir), name) }

// command is what starts Firecracker in the jail.
func (j *jail) command(binary string, args []string) (program string, line []string, err error) {
	if binary, err = filepath.EvalSymlinks(binary); err != nil {
		return "", nil, err
	}
	info, err := os.Stat(binary)
	if err != nil {
		return "", nil, err
	}
	// The jailer copies it with its permissions, and some versions leave it to root, whatever user is to execute it.
	if filepath.Base(binary) != j.name() || info.Mode()&0o005 != 0o005 {
		named := j.outside(j.name())
		if err := copyFile(named, binary, 0o755); err != nil {
			return "", nil, fmt.Errorf("copy Firecracker to where it has the name that the jailer wants: %w", err)
		}
		binary = named
	}
	base := filepath.Dir(filepath.Dir(filepath.Dir(j.dir)))
	line = []string{"--id", j.id(), "--exec-file", binary, "--uid", strconv.Itoa(j.uid), "--gid", strconv.Itoa(j.gid), "--chroot-base-dir", base, "--"}
	return j.program, append(line, args...), nil
}

// stateFolder has device state in a jail, in memory, as a snapshot is synced: the time that takes is the guest's.
const stateFolder = "state"

// files makes the files by which device state is saved and loaded, and one of the size of RAM.
func (j *jail) files(memory int64) (saved, loaded *os.File, err error) {
	dir := filepath.Join(j.dir, stateFolder)
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, nil, err
	}
	options := fmt.Sprintf("mode=0700,uid=%d,gid=%d,size=%d", j.uid, j.gid, 2*maxState)
	if err := unix.Mount("drafter", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, options); err != nil {
		return nil, nil, fmt.Errorf("mount memory at %q for device state: %w", dir, err)
	}
	made := make(map[string]*os.File)
	for _, name := range []string{savedFile, loadedFile, memoryFile} {
		f, err := os.OpenFile(filepath.Join(j.dir, name), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
		if err == nil {
			made[name], err = f, f.Chown(j.uid, j.gid)
		}
		if err == nil && name == memoryFile {
			err = errors.Join(f.Truncate(memory), f.Close())
			delete(made, name)
		}
		if err != nil {
			for _, f := range made {
				f.Close()
			}
			return nil, nil, err
		}
	}
	return made[savedFile], made[loadedFile], nil
}

// What the files are called in a jail.
const (
	savedFile  = stateFolder + "/saved"
	loadedFile = stateFolder + "/loaded"
	memoryFile = stateFolder + "/memory"
)

// open opens files that were made by files, if they are files still.
func (j *jail) open() (saved, loaded *os.File, err error) {
	dir, err := os.OpenRoot(j.dir)
	if err != nil {
		return nil, nil, err
	}
	defer dir.Close()
	if saved, err = dir.OpenFile(savedFile, os.O_RDWR|unix.O_NONBLOCK, 0); err != nil {
		return nil, nil, err
	}
	if loaded, err = dir.OpenFile(loadedFile, os.O_RDWR|unix.O_NONBLOCK, 0); err != nil {
		saved.Close()
		return nil, nil, err
	}
	return saved, loaded, nil
}

// take gives a file or folder in the jail to its user.
func (j *jail) take(name string) error {
	return os.Lchown(filepath.Join(j.dir, name), j.uid, j.gid)
}

// bring copies a file into the jail, unless it is there, and returns its path there.
func (j *jail) bring(path, name string) (string, error) {
	if inside, ok := strings.CutPrefix(path, j.dir+"/"); ok {
		return inside, j.take(inside)
	}
	if err := copyFile(filepath.Join(j.dir, name), path, 0o600); err != nil {
		return "", err
	}
	return name, j.take(name)
}

// remove takes down what the jailer and we have made in the folder, and beside it.
func (j *jail) remove() error {
	unmountState(j.dir)
	var errs []error
	for _, name := range []string{stateFolder, "dev", "run", j.name(), j.name() + ".pid", kernelFile, initrdFile} {
		errs = append(errs, os.RemoveAll(filepath.Join(j.dir, name)))
	}
	errs = append(errs, os.RemoveAll(j.outside(j.name())), os.Chown(j.dir, os.Geteuid(), os.Getegid()))
	return errors.Join(errs...)
}

// unmountState takes away the memory of a jail that a folder was; there is none as a rule.
func unmountState(dir string) {
	_ = unix.Unmount(filepath.Join(dir, stateFolder), unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
}

// Names of files that are copied into a jail.
const (
	kernelFile = "boot-kernel"
	initrdFile = "boot-initrd"
)

func copyFile(to, from string, mode os.FileMode) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Chmod(mode), out.Close()) // whatever the umask
}
