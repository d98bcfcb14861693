package qemu

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/drafter-vm/drafter/pkg/vmm/internal/process"
)

// program is the name QEMU has in PATH.
const program = "qemu-system-x86_64"

// capabilities is what a QEMU binary can do, as it says itself.
type capabilities struct {
	Major, Minor, Micro int
	Machines            []string // names, without aliases
	CPUModels           []string
	Emulated            map[string][]string // per CPU model: the features that TCG gives a guest, in QEMU's names
}

func (c *capabilities) version() string { return fmt.Sprintf("%d.%d.%d", c.Major, c.Minor, c.Micro) }

// atLeast reports whether the version is major.minor or newer.
func (c *capabilities) atLeast(major, minor int) bool {
	return c.Major > major || c.Major == major && c.Minor >= minor
}

// machineType is the q35 board of this version: pc-q35-10.0 for 10.0.2.
func (c *capabilities) machineType() string { return fmt.Sprintf("pc-q35-%d.%d", c.Major, c.Minor) }

func (b *Backend) find(override string) (string, error) {
	name := override
	if name == "" {
		name = b.opts.Binary
	}
	if name == "" {
		name = program
	}
	path, err := exec.LookPath(name)
	if err != nil {
		return "", fmt.Errorf("find QEMU: %w: install it (Debian: qemu-system-x86) or name its binary", err)
	}
	return filepath.Abs(path)
}

// probe asks a binary what it can do. A process with QMP takes some 40 ms, which a resume cannot afford, so answers are
// kept in files that are named after the binary's identity.
func (b *Backend) probe(ctx context.Context, binary string) (*capabilities, error) {
	cached := b.cacheFile(binary)
	if cached != "" {
		var caps capabilities
		if text, err := os.ReadFile(cached); err == nil && json.Unmarshal(text, &caps) == nil && caps.Major > 0 {
			return &caps, nil
		}
	}
	caps, err := askBinary(ctx, binary)
	if err != nil {
		return nil, fmt.Errorf("ask %q what it can do: it is not QEMU, or does not work: %w: give the program qemu-system-x86_64 (Debian: qemu-system-x86)", binary, err)
	}
	if !caps.atLeast(8, 0) {
		return nil, fmt.Errorf("QEMU %q has version %s, but 8.0 or newer is needed", binary, caps.version())
	}
	if cached != "" {
		if err := writeCache(cached, caps); err != nil {
			b.log.Debug("cannot cache what QEMU can do", "error", err)
		}
	}
	return caps, nil
}

// cacheFile returns where a binary's answers are kept, "" if nowhere. A binary that is replaced has another name.
func (b *Backend) cacheFile(binary string) string {
	dir := b.opts.CacheDir
	if dir == "" {
		user, err := os.UserCacheDir()
		if err != nil {
			return ""
		}
		dir = filepath.Join(user, "drafter")
	}
	info, err := os.Stat(binary)
	if err != nil {
		return ""
	}
	sys, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return ""
	}
	id := fmt.Sprintf("v2 %s %d %d %d %d %d", binary, sys.Dev, sys.Ino, sys.Size, sys.Mtim.Nano(), sys.Ctim.Nano())
	sum := sha256.Sum256([]byte(id))
	return filepath.Join(dir, fmt.Sprintf("qemu-%x.json", sum[:8]))
}

func writeCache(path string, caps *capabilities) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	text, err := json.Marshal(caps)
	if err != nil {
		return err
	}
	tmp, err := os.CreateTemp(filepath.Dir(path), ".qemu-")
	if err != nil {
		return err
	}
	_, err = tmp.Write(text)
	if err = errors.Join(err, tmp.Close()); err == nil {
		err = os.Rename(tmp.Name(), path)
	}
	if err != nil {
		os.Remove(tmp.Name())
	}
	return err
}

// askBinary starts a QEMU without a machine and asks it over QMP.
func askBinary(ctx context.Context, binary string) (*capabilities, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, 30*time.Second, errors.New("no answer in 30s"))
	defer cancel()
	ours, theirs, err := socketPair()
	if err != nil {
		return nil, err
	}
	defer ours.Close()
	stderr := process.NewTail("QEMU")
	cmd := exec.CommandContext(ctx, binary, "-M", "none", "-nodefaults", "-no-user-config", "-display", "none",
		"-chardev", "socket,id=qmp,fd=3", "-mon", "chardev=qmp,mode=control")
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.Stderr = stderr
	err = cmd.Start()
	theirs.Close()
	if err != nil {
		return nil, err
	}
	defer func() {
		cmd.Process.Kill()
		cmd.Wait()
	}()
	// Nothing that fails below knows as much as QEMU's own words, and these are complete once it has ended.
	explain := func(err error) error {
		ours.Close()
		cmd.Process.Kill()
		cmd.Wait()
		return stderr.Explain(err)
	}
	qmp, err := newClient(ctx, ours, nil)
	if err != nil {
		return nil, explain(err)
	}
	defer qmp.close()
	var version struct {
		QEMU struct{ Major, Minor, Micro int }
	}
	var machines, models []struct{ Name string }
	if err := errors.Join(
		qmp.execute(ctx, "query-version", nil, &version),
		qmp.execute(ctx, "query-machines", nil, &machines),
		qmp.execute(ctx, "query-cpu-definitions", nil, &models),
	); err != nil {
		return nil, explain(err)
	}
	caps := &capabilities{Major: version.QEMU.Major, Minor: version.QEMU.Minor, Micro: version.QEMU.Micro, Emulated: make(map[string][]string)}
	for _, m := range machines {
		if strings.HasPrefix(m.Name, "pc-q35-") {
			caps.Machines = append(caps.Machines, m.Name)
		}
	}
	for _, m := range models {
		caps.CPUModels = append(caps.CPUModels, m.Name)
		features, err := emulated(ctx, qmp, m.Name)
		if err != nil {
			return nil, explain(err)
		}
		caps.Emulated[m.Name] = features
	}
	slices.Sort(caps.Machines)
	slices.Sort(caps.CPUModels)
	return caps, nil
}

// emulated returns the features of a CPU model, sorted; none of one that TCG cannot be. The static expansion of
// QEMU's qapi/machine-target.json names each feature once and leaves out what is no feature.
func emulated(ctx context.Context, qmp *client, model string) ([]string, error) {
	var expansion struct {
		Model struct{ Props map[string]any }
	}
	err := qmp.execute(ctx, "query-cpu-model-expansion", map[string]any{"type": "static", "model": map[string]any{"name": model}}, &expansion)
	if refused := (*qmpError)(nil); errors.As(err, &refused) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var features []string
	for name, value := range expansion.Model.Props {
		if value == true {
			features = append(features, name)
		}
	}
	slices.Sort(features)
	return features, nil
}

// socketPair returns two ends of a unix stream, one for us and one to inherit.
func socketPair() (ours *net.UnixConn, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make a socket pair: %w", err)
	}
	mine := os.NewFile(uintptr(fds[0]), "qmp")
	theirs = os.NewFile(uintptr(fds[1]), "qmp")
	defer mine.Close()
	conn, err := net.FileConn(mine)
	if err != nil {
		theirs.Close()
		return nil, nil, err
	}
	return conn.(*net.UnixConn), theirs, nil
}
