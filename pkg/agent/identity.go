package agent

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// Identity is what a machine is told apart by, where several are made from the same state. The zero value leaves a machine what it is.
type Identity struct {
	// MachineID replaces that of machine-id(5), where the guest has one: 16 random bytes, or none.
	MachineID []byte

	// HostName is what the machine calls itself from now on, as hostname(7) has it. Empty: as before.
	HostName string

	// Network is what a network interface of the machine is from now on.
	Network Network

	// Environment is what the guest's containers have in their environment from now on, besides what their images have, and in place of what they
	// were given before: "K=V" for all of them, "NAME:K=V" for the one of that name. A guest without containers refuses it.
	Environment []string
}

// NewMachineID is 16 bytes from this host's random number generator, marked as those of a random UUID (RFC 9562, version 4), as
// machine-id(5) wants it.
func NewMachineID() []byte {
	id := make([]byte, 16)
	rand.Read(id) // never fails
	id[6] = id[6]&0x0f | 0x40
	id[8] = id[8]&0x3f | 0x80
	return id
}

var hostNamePattern = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9.-]{0,62}[A-Za-z0-9])?$`)

// CheckHostName reports why a guest cannot be called that: by hostname(7), and at most 64 bytes, which is what Linux takes.
func CheckHostName(name string) error {
	if !hostNamePattern.MatchString(name) {
		return fmt.Errorf("host name %q: use at most 64 letters, digits, hyphens and dots, with a letter or digit at both ends", name)
	}
	return nil
}

var variablePattern = regexp.MustCompile(`^([A-Za-z0-9][A-Za-z0-9_.-]{0,62}:)?[A-Za-z_][A-Za-z0-9_.-]*=[^\x00]*$`)

// What an identity's environment may have at most.
const (
	maxVariables   = 256
	maxEnvironment = 64 << 10 // bytes
)

// CheckEnvironment reports why containers cannot be given that, see [Identity.Environment]. A guest has the last word, as it knows which containers it has.
func CheckEnvironment(environment []string) error {
	if len(environment) > maxVariables {
		return fmt.Errorf("%d variables: give at most %d", len(environment), maxVariables)
	}
	size := 0
	for _, v := range environment {
		if !variablePattern.MatchString(v) || !utf8.ValidString(v) { // which no string of the agent's protocol may have
			return fmt.Errorf("variable %.100q: give it as NAME=VALUE, or CONTAINER:NAME=VALUE for one container, in UTF-8", v)
		}
		size += len(v)
	}
	if size > maxEnvironment {
		return fmt.Errorf("%d variables of %d bytes: give at most %d KiB", len(environment), size, maxEnvironment>>10)
	}
	return nil
}

// isZero reports whether the machine itself stays what it is.
func (id Identity) isZero() bool {
	return len(id.MachineID) == 0 && id.HostName == "" && id.Network.IsZero()
}

// take makes the machine whose files are below root, and this kernel if that is /, what id says. It does all it can, and reports what failed. What a
// guest has not, it is not given.
func (id Identity) take(root string) error {
	var errs []error
	if len(id.MachineID) != 0 {
		if len(id.MachineID) != 16 {
			return fmt.Errorf("take identity: a machine id of %d bytes", len(id.MachineID))
		}
		text := hex.EncodeToString(id.MachineID) + "\n"
		// The second is a link to the first as a rule.
		errs = append(errs, replaceText(filepath.Join(root, "etc/machine-id"), text), replaceText(filepath.Join(root, "var/lib/dbus/machine-id"), text))
	}
	if id.HostName != "" {
		if err := CheckHostName(id.HostName); err != nil {
			return fmt.Errorf("take identity: %w", err)
		}
		if root == "/" {
			if err := unix.Sethostname([]byte(id.HostName)); err != nil {
				errs = append(errs, fmt.Errorf("set host name %q: %w", id.HostName, err))
			}
		}
		errs = append(errs, replaceText(filepath.Join(root, "etc/hostname"), id.HostName+"\n"))
	}
	if root == "/" && !id.Network.IsZero() {
		errs = append(errs, id.Network.take())
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("take identity: %w", err)
	}
	return nil
}

// replaceText gives a file that exists other contents, whole or not at all. One that nobody can write, as on a root that is read-only, keeps its
// own: whoever has made the guest so has to see to that.
func replaceText(path, text string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) || err == nil && !info.Mode().IsRegular() {
		return nil
	}
	if err != nil {
		return err
	}
	next := path + ".new"
	if err = os.WriteFile(next, []byte(text), info.Mode().Perm()); err == nil {
		err = os.Rename(next, path)
	}
	if err == nil {
		return nil
	}
	_ = os.Remove(next)
	if errors.Is(err, unix.EBUSY) || errors.Is(err, unix.EROFS) { // it may be a mount of its own, as in a container
		err = os.WriteFile(path, []byte(text), info.Mode().Perm())
	}
	if errors.Is(err, unix.EROFS) {
		return nil
	}
	return err
}
