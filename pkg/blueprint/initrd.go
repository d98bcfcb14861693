package blueprint

import (
	"archive/tar"
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/cavaliergopher/cpio"
	"github.com/drafter-vm/drafter/pkg/filetree"
)

// initrdModules are what the guest needs before its root disk is there, and what must be there for the machine to be
// whole: loaded in this order, each after what it depends on. One that a kernel has built in is no file of its package.
var initrdModules = []string{
	"virtio_pci", "virtio_mmio", "virtio_blk", "virtio_net", "virtio_console", "virtio_rng", "virtio_balloon",
	"vmw_vsock_virtio_transport", "overlay", "erofs",
}

// optionalModules may be missing in a kernel with neither module nor built-in driver; the others must not.
var optionalModules = []string{"virtio_mmio", "virtio_balloon", "virtio_rng", "overlay", "erofs", "vmw_vsock_virtio_transport"}

// kernelPackage is what the files of a kernel's package hold.
type kernelPackage struct {
	version string                      // "6.1.0-56-cloud-amd64"
	image   filetree.Content            // vmlinuz
	modules map[string]filetree.Content // by path below /lib/modules/VERSION
	config  []byte
}

func readKernelPackage(d *deb) (*kernelPackage, error) {
	k := &kernelPackage{modules: map[string]filetree.Content{}}
	for _, f := range d.files {
		p := strings.TrimPrefix(f.path, "/usr")
		if f.node == nil || f.node.Type != tar.TypeReg {
			continue
		}
		if v, ok := strings.CutPrefix(p, "/boot/vmlinuz-"); ok {
			k.version, k.image = v, f.node.Content
		}
		if strings.HasPrefix(p, "/boot/config-") {
			b, err := io.ReadAll(f.node.Content.Reader())
			if err != nil {
				return nil, err
			}
			k.config = b
		}
		if rest, ok := strings.CutPrefix(p, "/lib/modules/"); ok {
			_, rest, _ = strings.Cut(rest, "/")
			k.modules[rest] = f.node.Content
		}
	}
	if k.version == "" {
		return nil, fmt.Errorf("package %s holds no kernel (/boot/vmlinuz-…); choose another with --kernel-package", d.Package)
	}
	return k, nil
}

// moduleName is the name a module's file stands for: dashes and underscores are one.
func moduleName(file string) string {
	name, _, _ := strings.Cut(path.Base(file), ".ko")
	return strings.ReplaceAll(name, "-", "_")
}

// module is a loadable module, uncompressed.
type module struct {
	name    string
	data    []byte
	depends []string
}

// readModule finds a module by name. It returns nil for one that the package has not.
func (k *kernelPackage) readModule(name string) (*module, error) {
	for _, file := range slices.Sorted(maps.Keys(k.modules)) {
		_, suffix, isModule := strings.Cut(path.Base(file), ".ko")
		if !isModule || moduleName(file) != name {
			continue
		}
		r, err := decompress(k.modules[file].Reader(), suffix)
		if err != nil {
			return nil, fmt.Errorf("unpack module %q: %w", file, err)
		}
		defer r.Close()
		data, err := readLimited(r, 256<<20)
		if err != nil {
			return nil, fmt.Errorf("unpack module %q: %w", file, err)
		}
		depends, err := moduleDepends(data)
		if err != nil {
			return nil, fmt.Errorf("read module %q: %w", file, err)
		}
		return &module{name, data, depends}, nil
	}
	return nil, nil
}

// moduleDepends reads the names a module depends on from its .modinfo section, as depmod would.
func moduleDepends(data []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	section := f.Section(".modinfo")
	if section == nil {
		return nil, errors.New("it has no .modinfo section")
	}
	info, err := section.Data()
	if err != nil {
		return nil, err
	}
	var out []string
	for field := range bytes.SplitSeq(info, []byte{0}) {
		key, value, _ := strings.Cut(string(field), "=")
		// A soft dependency "pre: x" must be there first where it exists (crc32c for ext4 and its like).
		switch key {
		case "depends":
			out = append(out, strings.FieldsFunc(value, func(r rune) bool { return r == ',' })...)
		case "softdep":
			_, pre, _ := strings.Cut(value, "pre:")
			pre, _, _ = strings.Cut(pre, "post:")
			for _, name := range strings.Fields(pre) {
				out = append(out, "?"+name)
			}
		}
	}
	for i := range out {
		out[i] = strings.ReplaceAll(out[i], "-", "_")
	}
	return out, nil
}

// closure returns the named modules with everything they depend on, dependencies first.
func (k *kernelPackage) closure(names []string) ([]*module, error) {
	var out []*module
	seen := map[string]bool{}
	var visit func(name string, required bool) error
	visit = func(name string, required bool) error {
		if seen[name] {
			return nil
		}
		seen[name] = true
		m, err := k.readModule(name)
		if err != nil {
			return err
		}
		if m == nil {
			if required && !k.builtin(name) {
				return fmt.Errorf("kernel %s has no module %q; choose another with --kernel-package", k.version, name)
			}
			return nil
		}
		for _, dep := range m.depends {
			dep, soft := strings.CutPrefix(dep, "?")
			if err := visit(dep, !soft); err != nil {
				return err
			}
		}
		out = append(out, m)
		return nil
	}
	for _, name := range names {
		if err := visit(name, !slices.Contains(optionalModules, name)); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// builtin tells whether the kernel has the module in itself (file modules.builtin of its package).
func (k *kernelPackage) builtin(name string) bool {
	list, ok := k.modules["modules.builtin"]
	if !ok {
		return false
	}
	text, err := io.ReadAll(list.Reader())
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(text)) {
		if moduleName(strings.TrimSpace(line)) == name {
			return true
		}
	}
	return false
}

// initScript is the init of the initrd, run by busybox: load the modules, mount the root disk, hand over to its init.
const initScript = `#!/bin/busybox sh
# The kernel's arguments that matter here: root= rootfstype= rootflags= init= ro.
export PATH=/bin
mount -t devtmpfs -o mode=0755,nosuid devtmpfs /dev
mount -t proc -o nosuid,nodev,noexec proc /proc
mount -t sysfs -o nosuid,nodev,noexec sysfs /sys
root=/dev/vda fstype=ext4 flags=noatime mode=rw init=/sbin/init
for arg in $(cat /proc/cmdline); do
	case $arg in
	root=*) root=${arg#root=} ;;
	rootfstype=*) fstype=${arg#rootfstype=} ;;
	rootflags=*) flags=${arg#rootflags=} ;;
	init=*) init=${arg#init=} ;;
	ro) mode=ro ;;
	esac
done
for module in /modules/*.ko; do
	insmod "$module" || echo "drafter initrd: cannot load $module" >&2
done
tries=0
while :; do
	case $root in
	LABEL=* | UUID=*) device=$(findfs "$root" 2>/dev/null) ;;
	*) device=$root ;;
	esac
	[ -b "$device" ] && break
	tries=$((tries + 1))
	if [ $tries -gt 500 ]; then
		echo "drafter initrd: root disk $root does not appear; disks are:" >&2
		cat /proc/partitions >&2
		exec sh
	fi
	usleep 20000
done
if ! mount -t "$fstype" -o "$mode,$flags" "$device" /newroot; then
	echo "drafter initrd: cannot mount $device ($fstype, $mode,$flags)" >&2
	exec sh
fi
# Named virtio-serial ports, as udev will link them when it is up.
for name in /sys/class/virtio-ports/*/name; do
	[ -e "$name" ] && read -r port < "$name" && [ -n "$port" ] || continue
	device=${name%/name}
	mkdir -p /dev/virtio-ports
	ln -sf "../${device##*/}" "/dev/virtio-ports/$port"
done
mount -o move /dev /newroot/dev
mount -o move /proc /newroot/proc
mount -o move /sys /newroot/sys
exec switch_root /newroot "$init"
`

// initrdApplets are the programs of busybox that the script calls.
var initrdApplets = []string{"sh", "mount", "cat", "insmod", "findfs", "usleep", "mkdir", "ln", "switch_root"}

// writeInitrd writes the initial RAM disk: an uncompressed cpio archive, which the kernel unpacks faster than a
// compressed one where the CPU is emulated, and which needs no more than its size in page cache anywhere else.
func writeInitrd(w io.Writer, busybox []byte, modules []*module) error {
	cw := cpio.NewWriter(w)
	inode := int64(0)
	add := func(name string, mode cpio.FileMode, data []byte, link string) error {
		inode++
		h := &cpio.Header{Name: name, Mode: mode, Size: int64(len(data)), Linkname: link, Inode: inode, Links: 1}
		if link != "" {
			data, h.Size = []byte(link), int64(len(link))
		}
		if mode&cpio.ModeType == cpio.TypeDir {
			h.Links = 2
		}
		if err := cw.WriteHeader(h); err != nil {
			return fmt.Errorf("write initrd: %s: %w", name, err)
		}
		if _, err := cw.Write(data); err != nil {
			return fmt.Errorf("write initrd: %s: %w", name, err)
		}
		return nil
	}
	for _, dir := range []string{"bin", "dev", "modules", "newroot", "proc", "sys"} {
		if err := add(dir, cpio.TypeDir|0o755, nil, ""); err != nil {
			return err
		}
	}
	if err := add("bin/busybox", cpio.TypeReg|0o755, busybox, ""); err != nil {
		return err
	}
	for _, name := range initrdApplets {
		if err := add("bin/"+name, cpio.TypeSymlink|0o777, nil, "busybox"); err != nil {
			return err
		}
	}
	if err := add("init", cpio.TypeReg|0o755, []byte(initScript), ""); err != nil {
		return err
	}
	for i, m := range modules {
		if err := add(fmt.Sprintf("modules/%02d-%s.ko", i, m.name), cpio.TypeReg|0o644, m.data, ""); err != nil {
			return err
		}
	}
	if err := cw.Close(); err != nil {
		return fmt.Errorf("write initrd: %w", err)
	}
	return nil
}
