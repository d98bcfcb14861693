package supervise

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/drafter-vm/drafter/pkg/oci/bundle"
)

// volumeWait is how long a volume's disk is waited for. An emulated guest may need many seconds until all of its disks are there.
const volumeWait = 20 * time.Second

// filesystem is what a superblock says.
type filesystem struct{ kind, label, uuid string }

// probe reads the superblock of a file system that a bundle or a volume may be on.
func probe(r io.ReaderAt) (filesystem, bool) {
	text := func(b []byte) string {
		b, _, _ = bytes.Cut(b, []byte{0})
		return string(b)
	}
	uuid := func(b []byte) string {
		h := hex.EncodeToString(b)
		return strings.Join([]string{h[:8], h[8:12], h[12:16], h[16:20], h[20:]}, "-")
	}
	head := make([]byte, 4096)
	if n, err := r.ReadAt(head, 0); n < len(head) || err != nil && !errors.Is(err, io.EOF) {
		return filesystem{}, false
	}
	super := head[1024:]
	switch {
	case binary.LittleEndian.Uint16(super[56:]) == 0xef53:
		return filesystem{"ext4", text(super[120:136]), uuid(super[104:120])}, true // whose driver has ext2 and ext3, too
	case binary.LittleEndian.Uint32(super) == 0xe0f5e1e2:
		return filesystem{"erofs", text(super[64:80]), uuid(super[48:64])}, true
	case bytes.HasPrefix(head, []byte("hsqs")):
		return filesystem{kind: "squashfs"}, true
	case bytes.HasPrefix(head, []byte("XFSB")):
		return filesystem{"xfs", text(head[108:120]), uuid(head[32:48])}, true
	}
	far := make([]byte, 1024)
	if n, _ := r.ReadAt(far, 64<<10); n == len(far) && string(far[64:72]) == "_BHRfS_M" {
		return filesystem{"btrfs", text(far[299:555]), uuid(far[32:48])}, true
	}
	return filesystem{}, false
}

// disk is a block device of the machine with a file system.
type disk struct {
	filesystem
	device   string // the kernel's name: "vdb"
	path     string
	serial   string
	readOnly bool
}

// disks finds file systems among the block devices of this machine.
type disks struct {
	sys, dev, fstab, mountinfo string // "/sys", "/dev", "/etc/fstab", "/proc/self/mountinfo"
}

// names lists what may have a file system.
func (d disks) names() []string {
	entries, _ := os.ReadDir(filepath.Join(d.sys, "class/block"))
	var names []string
	for _, e := range entries {
		if n := e.Name(); !strings.HasPrefix(n, "ram") && !strings.HasPrefix(n, "loop") && !strings.HasPrefix(n, "zram") && !strings.HasPrefix(n, "fd") {
			names = append(names, n)
		}
	}
	slices.SortFunc(names, func(a, b string) int { return cmp.Or(cmp.Compare(len(a), len(b)), cmp.Compare(a, b)) }) // vdz is before vdaa
	return names
}

// settle waits until no device has come for a moment. Drivers find theirs in the background.
func (d disks) settle(ctx context.Context) {
	for names := d.names(); ; {
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			return
		}
		again := d.names()
		if slices.Equal(names, again) {
			return
		}
		names = again
	}
}

// list is all file systems.
func (d disks) list() []disk {
	var all []disk
	for _, name := range d.names() {
		sys := filepath.Join(d.sys, "class/block", name)
		attribute := func(name string) string {
			b, _ := os.ReadFile(filepath.Join(sys, name))
			return strings.TrimSpace(string(b))
		}
		if attribute("size") == "0" {
			continue
		}
		f, err := os.Open(filepath.Join(d.dev, name))
		if err != nil {
			continue
		}
		fs, ok := probe(f)
		f.Close()
		if ok {
			all = append(all, disk{filesystem: fs, device: name, path: filepath.Join(d.dev, name), serial: cmp.Or(attribute("serial"), attribute("device/serial")), readOnly: attribute("ro") == "1"})
		}
	}
	return all
}

// taken reports whether a file system is mounted, is to be, or is part of something.
func (d disks) taken(one disk) bool {
	if number, err := os.ReadFile(filepath.Join(d.sys, "class/block", one.device, "dev")); err == nil {
		for line := range lines(d.mountinfo) {
			if f := strings.Fields(line); len(f) > 2 && f[2] == strings.TrimSpace(string(number)) {
				return true
			}
		}
	}
	if holders, _ := os.ReadDir(filepath.Join(d.sys, "class/block", one.device, "holders")); len(holders) > 0 {
		return true
	}
	for line := range lines(d.fstab) {
		f := strings.Fields(line)
		if len(f) == 0 || strings.HasPrefix(f[0], "#") {
			continue
		}
		if one.is(f[0]) {
			return true
		}
		if path, err := filepath.EvalSymlinks(f[0]); err == nil && path == one.path {
			return true
		}
	}
	return false
}

func lines(path string) func(func(string) bool) {
	b, _ := os.ReadFile(path)
	return strings.Lines(string(b))
}

// is reports whether a source LABEL=… or UUID=… names the file system.
func (d disk) is(source string) bool {
	source = strings.ReplaceAll(source, `"`, "") // as fstab may have it
	if label, ok := strings.CutPrefix(source, "LABEL="); ok {
		return label != "" && label == d.label
	}
	uuid, ok := strings.CutPrefix(source, "UUID=")
	return ok && uuid != "" && strings.EqualFold(uuid, d.uuid)
}

// mount mounts a file system, read-only if nobody can write to the disk. Of one with a journal that cannot be replayed there, it shows what is there.
func (d disk) mount(dir string, flags uintptr, data string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("mount disk %q: %w", d.device, err)
	}
	if d.readOnly {
		flags |= unix.MS_RDONLY
	}
	err := unix.Mount(d.path, dir, d.kind, flags, data)
	if err != nil && d.readOnly && d.kind == "ext4" && data == "" {
		err = unix.Mount(d.path, dir, d.kind, flags, "noload")
	}
	if err != nil {
		os.Remove(dir)
		return fmt.Errorf("mount disk %q (%s) at %q: %w", d.device, d.kind, dir, err)
	}
	return nil
}

// found is a disk that holds a container.
type found struct {
	disk string // what it is called in messages: "vdb"
	name string // of the container
	dir  string // where config.json is, and rootfs as far as it can be written to
	root string // rootfs
}

var validName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$`)
var onlyDigits = regexp.MustCompile(`^[0-9]+$`)

// namer gives each container a name of its own.
type namer struct {
	taken map[string]bool
	log   *slog.Logger
}

// name is the first of what a container may be called that can be a name.
func (n *namer) name(device, annotation, serial string) string {
	name := device
	switch {
	case validName.MatchString(annotation):
		name = annotation
	case validName.MatchString(serial) && !onlyDigits.MatchString(serial):
		name = serial
	}
	if annotation != "" && name != annotation {
		n.log.Warn("the name that a container asks for is none: letters, digits, dots, hyphens and underscores, at most 63, are", "device", device, "name", fmt.Sprintf("%.100q", annotation), "container", name)
	}
	if n.taken == nil {
		n.taken = map[string]bool{}
	}
	own := name
	for i := 2; n.taken[own]; i++ {
		own = fmt.Sprintf("%.55s-%d", name, i)
	}
	if own != name {
		n.log.Warn("several containers ask for one name", "device", device, "name", name, "container", own)
	}
	n.taken[own] = true
	return own
}

// findBundles mounts every disk that holds a container below run.
func (d disks) findBundles(ctx context.Context, run string, log *slog.Logger) ([]found, error) {
	d.settle(ctx)
	var all []found
	names := namer{log: log}
	for _, one := range d.list() {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if d.taken(one) {
			continue
		}
		f, err := d.openBundle(one, run, &names)
		if err != nil {
			log.Error("a disk cannot be used", "device", one.device, "error", err)
			continue
		}
		if f != nil {
			all = append(all, *f)
		}
	}
	return all, nil
}

// isBundle reports whether a folder has what makes a bundle. Neither may be a link: what it shows would be of the guest.
func isBundle(dir string) bool {
	config, err := os.Lstat(filepath.Join(dir, bundle.ConfigFile))
	if err != nil || !config.Mode().IsRegular() {
		return false
	}
	root, err := os.Lstat(filepath.Join(dir, bundle.RootFolder))
	return err == nil && root.IsDir()
}

// openBundle mounts a disk at its place if it holds a container; nil if it does not. It is looked at read-only, as it may be somebody's.
func (d disks) openBundle(one disk, run string, names *namer) (*found, error) {
	look := filepath.Join(run, "look", one.device)
	if err := one.mount(look, unix.MS_RDONLY, ""); err != nil {
		return nil, err
	}
	defer func() {
		_ = unix.Unmount(look, 0)
		os.Remove(look)
	}()
	if !isBundle(look) {
		return nil, nil
	}
	annotation := ""
	if c, _, err := readConfig(filepath.Join(look, bundle.ConfigFile)); err == nil { // else it is said when it is to start
		annotation = c.Annotations[bundle.NameAnnotation]
	}
	f := &found{disk: one.device, name: names.name(one.device, annotation, one.serial)}
	f.dir = filepath.Join(run, "oci", f.name)
	f.root = filepath.Join(f.dir, bundle.RootFolder)
	readOnly := one.readOnly || one.kind == "erofs" || one.kind == "squashfs"
	if err := os.MkdirAll(f.dir, 0o700); err != nil {
		return nil, fmt.Errorf("mount disk %q: %w", one.device, err)
	}
	// The same file system, which the other place loses then: it is not mounted twice.
	if err := unix.Mount(look, f.dir, "", unix.MS_BIND, ""); err != nil {
		return nil, fmt.Errorf("mount disk %q at %q: %w", one.device, f.dir, err)
	}
	if !readOnly {
		if err := errors.Join(unix.Mount("", look, "", unix.MS_REMOUNT, ""), unix.Mount("", f.dir, "", unix.MS_REMOUNT|unix.MS_BIND, "")); err != nil {
			names.log.Warn("a disk cannot be written, so what its container writes to its root is kept in memory", "device", one.device, "container", f.name, "error", err)
			readOnly = true
		}
	}
	if readOnly {
		var err error
		if f.root, err = layer(f.root, filepath.Join(run, "root", f.name)); err != nil {
			return nil, errors.Join(fmt.Errorf("make the root of disk %q writable: %w", one.device, err), unix.Unmount(f.dir, unix.MNT_DETACH))
		}
	}
	return f, nil
}

// layer puts a layer in memory above a folder, in dir, and is the path of both together.
func layer(lower, dir string) (string, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	if err := unix.Mount("drafter", dir, "tmpfs", 0, "mode=0700"); err != nil {
		return "", fmt.Errorf("mount tmpfs at %q: %w", dir, err)
	}
	at := func(name string) string { return filepath.Join(dir, name) }
	for _, name := range []string{"upper", "work", "both"} {
		if err := os.Mkdir(at(name), 0o755); err != nil {
			return "", err
		}
	}
	if info, err := os.Stat(lower); err == nil { // the root of the container has the mode and owner that it has there
		st := info.Sys().(*syscall.Stat_t)
		_ = os.Chown(at("upper"), int(st.Uid), int(st.Gid))
		_ = os.Chmod(at("upper"), info.Mode())
	}
	if err := unix.Mount("overlay", at("both"), "overlay", 0, "lowerdir="+lower+",upperdir="+at("upper")+",workdir="+at("work")); err != nil {
		return "", fmt.Errorf("mount overlay at %q: %w", at("both"), err)
	}
	return at("both"), nil
}

// volumes are the file systems that containers share with nobody but each other.
type volumes struct {
	disks disks
	dir   string // below which they are mounted
	wait  time.Duration

	mu      sync.Mutex        // guards what follows; held while one is mounted
	mounted map[string]string // where, by the device's path
}

// open waits for a volume, and is where it is mounted. The options are of who comes first.
func (v *volumes) open(ctx context.Context, source string, flags uintptr, data string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, v.wait)
	defer cancel()
	for {
		dir, err := v.try(source, flags, data)
		if dir != "" || err != nil {
			return dir, err
		}
		select {
		case <-time.After(250 * time.Millisecond):
		case <-ctx.Done():
			return "", fmt.Errorf("volume %q: no disk of this machine has a file system of that name, after %s", source, v.wait)
		}
	}
}

func (v *volumes) try(source string, flags uintptr, data string) (string, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, one := range v.disks.list() {
		if !one.is(source) {
			continue
		}
		if dir, ok := v.mounted[one.path]; ok {
			return dir, nil
		}
		name := one.label
		if !validName.MatchString(name) {
			name = one.device
		}
		dir := filepath.Join(v.dir, name)
		for _, other := range v.mounted {
			if other == dir {
				dir = filepath.Join(v.dir, name+"-"+one.device)
			}
		}
		if err := one.mount(dir, flags, data); err != nil {
			return "", fmt.Errorf("volume %q: %w", source, err)
		}
		if v.mounted == nil {
			v.mounted = map[string]string{}
		}
		v.mounted[one.path] = dir
		return dir, nil
	}
	return "", nil
}

// unmountBelow unmounts all that is mounted below folders, the newest first.
func unmountBelow(mountinfo string, dirs ...string) error {
	var points []string
	for line := range lines(mountinfo) {
		if f := strings.Fields(line); len(f) > 4 {
			point := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(f[4])
			if slices.ContainsFunc(dirs, func(dir string) bool { return strings.HasPrefix(point, dir+"/") }) {
				points = append(points, point)
			}
		}
	}
	slices.Reverse(points)
	var errs []error
	for _, point := range points {
		err := unix.Unmount(point, 0)
		for range 20 { // what has just ended may be about to let go of it
			if !errors.Is(err, unix.EBUSY) {
				break
			}
			time.Sleep(50 * time.Millisecond)
			err = unix.Unmount(point, 0)
		}
		if errors.Is(err, unix.EBUSY) {
			unix.Sync()
			err = errors.Join(fmt.Errorf("unmount %q: %w", point, err), unix.Unmount(point, unix.MNT_DETACH))
		}
		if err != nil && !errors.Is(err, unix.EINVAL) {
			errs = append(errs, err)
		}
		os.Remove(point)
	}
	return errors.Join(errs...)
}
