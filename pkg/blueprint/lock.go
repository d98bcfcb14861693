package blueprint

import (
	"bufio"
	"bytes"
	_ "embed"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// lockFile is what a build installs, exactly. Its text has one line a package, so that a difference reads as what
// changed:
//
//	# comment
//	drafter-blueprint-lock 1
//	request bookworm amd64 linux-image-cloud-amd64 valkey-server
//	system  NAME VERSION ARCH SIZE SHA256 SUITE PATH
//	kernel  …
//	tool    …
//
// Packages of role system are installed in the root disk, in this order; the one of role kernel gives the kernel and its
// modules; those of role tool are unpacked in the cache and used by the build.
type lockFile struct {
	request string
	system  []Package
	kernel  []Package
	tools   []Package
}

const lockHeader = "drafter-blueprint-lock 1"

// defaultLock is the lock of the default request, as this version of Drafter was tested with.
//
//go:embed blueprint.lock
var defaultLock []byte

func (l *lockFile) all() []Package { return slices.Concat(l.system, l.kernel, l.tools) }

// digests maps each role and package name to the digest locked for it.
func digests(packages []Package) map[string]string {
	m := make(map[string]string, len(packages))
	for _, p := range packages {
		m[p.Name] = p.SHA256
	}
	return m
}

// readLock reads the lock file at path; where there is none, the one this program carries.
func readLock(path string) (l *lockFile, inFile bool, err error) {
	data, err := os.ReadFile(path)
	if os.IsNotExist(err) {
		l, err := parseLock(defaultLock)
		if err != nil {
			return nil, false, fmt.Errorf("read built-in lock: %w", err)
		}
		return l, false, nil
	}
	if err != nil {
		return nil, false, fmt.Errorf("read lock file: %w", err)
	}
	if l, err = parseLock(data); err != nil {
		return nil, false, fmt.Errorf("read lock file %q: %w; remove it, or name another with --lock", path, err)
	}
	return l, true, nil
}

func parseLock(data []byte) (*lockFile, error) {
	l := &lockFile{}
	lines := bufio.NewScanner(bytes.NewReader(data))
	header := false
	for n := 1; lines.Scan(); n++ {
		line := strings.TrimSpace(lines.Text())
		if line == "" || line[0] == '#' {
			continue
		}
		if !header {
			if line != lockHeader {
				return nil, fmt.Errorf("line %d is %q, expected %q: not a lock file, or one of another version", n, line, lockHeader)
			}
			header = true
			continue
		}
		role, rest, _ := strings.Cut(line, " ")
		rest = strings.TrimSpace(rest)
		var list *[]Package
		switch role {
		case "request":
			l.request = rest
			continue
		case "system":
			list = &l.system
		case "kernel":
			list = &l.kernel
		case "tool":
			list = &l.tools
		default:
			return nil, fmt.Errorf("line %d has the unknown role %q", n, role)
		}
		f := strings.Fields(rest)
		if len(f) != 7 {
			return nil, fmt.Errorf("line %d has %d fields, expected 7 after its role", n, len(f))
		}
		p := Package{Name: f[0], Version: f[1], Arch: f[2], SHA256: f[4], Suite: f[5], Path: f[6]}
		var err error
		if p.Size, err = strconv.ParseInt(f[3], 10, 64); err != nil || p.Size < 0 {
			return nil, fmt.Errorf("line %d has the size %q", n, f[3])
		}
		if raw, err := hex.DecodeString(p.SHA256); err != nil || len(raw) != 32 || strings.ToLower(p.SHA256) != p.SHA256 {
			return nil, fmt.Errorf("line %d has %q for a sha256", n, p.SHA256)
		}
		if !validName(p.Name) {
			return nil, fmt.Errorf("line %d has %q for a package name", n, p.Name)
		}
		*list = append(*list, p)
	}
	if err := lines.Err(); err != nil {
		return nil, err
	}
	if !header {
		return nil, fmt.Errorf("it is empty, expected %q", lockHeader)
	}
	return l, nil
}

func (l *lockFile) text() []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "# Written by `drafter blueprint`: the exact packages of a blueprint. --update-lock brings it up to date.\n%s\nrequest %s\n", lockHeader, l.request)
	for _, part := range []struct {
		role     string
		packages []Package
	}{{"system", l.system}, {"kernel", l.kernel}, {"tool", l.tools}} {
		for _, p := range part.packages {
			fmt.Fprintf(&b, "%s %s %s %s %d %s %s %s\n", part.role, p.Name, p.Version, p.Arch, p.Size, p.SHA256, p.Suite, p.Path)
		}
	}
	return b.Bytes()
}

// write replaces the lock file at path, unless it says the same already.
func (l *lockFile) write(path string) error {
	text := l.text()
	if old, err := os.ReadFile(path); err == nil && bytes.Equal(old, text) {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("write lock file: %w", err)
	}
	return writeFileAtomic(path, text, 0o644)
}

// writeFileAtomic writes a file so that it is there whole or not at all.
func writeFileAtomic(path string, data []byte, mode os.FileMode) error {
	tmp, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-*")
	if err != nil {
		return fmt.Errorf("write %q: %w", path, err)
	}
	defer os.Remove(tmp.Name())
	_, err = tmp.Write(data)
	if err == nil {
		err = tmp.Chmod(mode)
	}
	if closeErr := tmp.Close(); err == nil {
		err = closeErr
	}
	if err == nil {
		err = os.Rename(tmp.Name(), path)
	}
	if err != nil {
		return fmt.Errorf("write %q: %w", path, err)
	}
	return nil
}
