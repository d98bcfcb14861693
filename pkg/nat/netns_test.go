package nat

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// Names can be taken away also when somebody has used ip-netns(8) for the first time since they were given.
func TestNameBeforeIP(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root: a mount namespace")
	}
	err := onThread(func() error { // which ends with its mounts
		err := errors.Join(unix.Unshare(unix.CLONE_NEWNS|unix.CLONE_NEWNET), unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
		if err == nil {
			err = unix.Mount("tmpfs", "/run", "tmpfs", 0, "")
		}
		if err == nil {
			err = giveName("before")
		}
		if err != nil {
			return err
		}
		if out, err := exec.Command("ip", "netns", "add", "after").CombinedOutput(); err != nil {
			return errors.New(string(out))
		}
		for _, name := range []string{"before", "after"} {
			if err := takeName(name); err != nil {
				return err
			}
			if _, err := os.Stat(filepath.Join(Folder, name)); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("name %q is there still (%v)", name, err)
			}
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}
