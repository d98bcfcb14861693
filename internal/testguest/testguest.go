// Package testguest builds the guest that tests of real machines boot: the kernel of Debian's cloud image package,
// unpacked to an ELF vmlinux, and an initramfs whose only program obeys commands.
//
//	vmlinux, initrd := testguest.Build(t)
//
// Debian's package is fetched with apt-get once and kept below ${XDG_CACHE_HOME:-~/.cache}/drafter-test; a test is
// skipped, with the reason, where that is impossible. The guest runs in 128 MiB.
//
// # Protocol
//
// The guest reads commands, one a line, on the serial console and on the virtio-serial port org.drafter.vsock (unless
// its kernel command line has testguest.channel=off), with testguest.socket=PORT from whoever connects to that port of
// its own, too, and answers each with one line,
//
//	= COMMAND ok RESULT…
//	= COMMAND error MESSAGE
//
// and says "= ready" on the console after boot. Other lines there are the kernel's. [Dial] and [NewConsole] speak it.
// Numbers are decimal, disks are called by their names: serial numbers, or those that testguest.disks=NAME,NAME gives
// them by their order.
//
//	echo TEXT                       TEXT
//	say TEXT                        a line on the console
//	clock                           wall clock, ns since 1970
//	cpus                            number of CPUs
//	mem start MIB [random]          write all over that much RAM, page after page, pass after pass; each page holds its pass
//	mem stop|go|status              PASS PAGE, the next to be written; go continues after stop
//	mem verify                      check every page: this pass before PAGE, the previous one from there. PASS PAGE
//	touch MIB                       write to that much RAM, and free it
//	disk NAME info                  size in bytes
//	disk NAME write OFF LEN SEED    write a pattern, flush. SHA-256 of it
//	disk NAME sum OFF LEN           SHA-256, read past the guest's cache
//	disk NAME start SLOTS [LAST]    append journal records (package journal) as fast as they can be flushed, after LAST
//	disk NAME stop|status           newest flushed record
//	disk NAME verify                stop, then check the whole journal. Its newest record
//	mount SOURCE DIR TYPE, umount DIR
//	cat FILE, put FILE TEXT         contents, quoted as Go does; write and fsync
//	net IFACE CIDR [GATEWAY]        bring an interface up, with an address and a default route
//	listen PORT                     serve TCP and UDP echo
//	call tcp|udp ADDRESS            connect, and echo what comes; over UDP after a hello
//	run PROGRAM ARG…                run to its end. Its output, quoted
//	spawn PROGRAM ARG…              run in the background, output to the console. Its pid
//	reboot, poweroff, panic
//	button                          power off when the power button is pressed
package testguest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"testing"
	"time"

	"github.com/cavaliergopher/cpio"
	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/ulikunitz/xz"
	"golang.org/x/sys/unix"
)

// ChannelPort is the name of the virtio-serial port that carries the guest channel.
const ChannelPort = "org.drafter.vsock"

// modules are what the guest needs, without what they depend on.
var modules = []string{
	"virtio_pci", "virtio_mmio", "virtio_blk", "virtio_net", "virtio_console", "virtio-rng", "virtio_balloon",
	"vmw_vsock_virtio_transport", "button", "evdev",
}

// Build returns the paths of a kernel, an ELF vmlinux, and of its initramfs. They belong to the cache: read them only.
func Build(t testing.TB) (vmlinux, initrd string) {
	t.Helper()
	return BuildWith(t, nil)
}

// BuildWith is Build with more files in the initramfs: files maps absolute paths in the guest to files here, which keep
// their permissions.
func BuildWith(t testing.TB, files map[string]string) (vmlinux, initrd string) {
	t.Helper()
	vmlinux, initrd, err := Make(t.Context(), files)
	if errors.Is(err, errNoKernel) {
		t.Skipf("test guest: %v", err)
	}
	if err != nil {
		t.Fatalf("test guest: %v", err)
	}
	return vmlinux, initrd
}

// errNoKernel is wrapped by errors of Make that are the host's: it has no cache, or no way to a Debian mirror.
var errNoKernel = errors.New("a Debian kernel is needed")

// readyEnv names a folder with the files vmlinux and initrd that Build has made on another host, for one that has no compiler.
const readyEnv = "DRAFTER_TESTGUEST"

// Make is BuildWith for programs that are no tests.
func Make(ctx context.Context, files map[string]string) (vmlinux, initrd string, err error) {
	if dir := os.Getenv(readyEnv); dir != "" && len(files) == 0 {
		return filepath.Join(dir, "vmlinux"), filepath.Join(dir, "initrd"), nil
	}
	cache, err := cacheDir()
	if err != nil {
		return "", "", fmt.Errorf("%w: %w", errNoKernel, err)
	}
	unlock, err := lock(filepath.Join(cache, "lock"))
	if err != nil {
		return "", "", fmt.Errorf("lock the cache: %w", err)
	}
	defer unlock()
	sum := sha256.Sum256([]byte(strings.Join(modules, " ")))
	kernel := filepath.Join(cache, fmt.Sprintf("kernel-with-%x", sum[:4])) // and its modules: a folder without these is another
	if err := fetchKernel(ctx, kernel); err != nil {
		return "", "", fmt.Errorf("%w: %w", errNoKernel, err)
	}
	initrd, err = buildInitrd(ctx, kernel, cache, files)
	if err != nil {
		return "", "", fmt.Errorf("build the initramfs: %w", err)
	}
	return filepath.Join(kernel, "vmlinux"), initrd, nil
}

func cacheDir() (string, error) {
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	dir = filepath.Join(dir, "drafter-test")
	return dir, os.MkdirAll(dir, 0o755)
}

// lock serialises test binaries that run at the same time.
func lock(path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		f.Close()
		return nil, err
	}
	return func() { f.Close() }, nil
}

// fetchKernel makes the folder dir with vmlinux and the needed modules, 00-name.ko and on in the order to load them.
func fetchKernel(ctx context.Context, dir string) error {
	if _, err := os.Stat(dir); err == nil {
		return nil
	}
	// A first download on a slow mirror takes long, but not for ever.
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	tmp, err := os.MkdirTemp(filepath.Dir(dir), "kernel-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)

	// linux-image-cloud-amd64 is empty and depends on the present kernel's package.
	out, err := run(ctx, tmp, "apt-cache", "depends", "linux-image-cloud-amd64")
	if err != nil {
		return err
	}
	var name string
	for _, word := range strings.Fields(out) {
		if strings.HasPrefix(word, "linux-image-") && strings.HasSuffix(word, "-cloud-amd64") && word != "linux-image-cloud-amd64" {
			name = word
			break
		}
	}
	if name == "" {
		return errors.New("apt does not know the package linux-image-cloud-amd64: run apt-get update")
	}
	if _, err := run(ctx, tmp, "apt-get", "download", name); err != nil {
		return err
	}
	debs, _ := filepath.Glob(filepath.Join(tmp, "*.deb"))
	if len(debs) != 1 {
		return fmt.Errorf("apt-get download %s left %d packages", name, len(debs))
	}
	if _, err := run(ctx, tmp, "dpkg", "-x", debs[0], "root"); err != nil {
		return err
	}
	images, _ := filepath.Glob(filepath.Join(tmp, "root/boot/vmlinuz-*"))
	if len(images) != 1 {
		return fmt.Errorf("package %s holds %d kernels", name, len(images))
	}
	image, err := os.ReadFile(images[0])
	if err != nil {
		return err
	}
	vmlinux, err := unpackKernel(image)
	if err != nil {
		return fmt.Errorf("unpack %s: %w", filepath.Base(images[0]), err)
	}
	ready := filepath.Join(tmp, "ready")
	if err := os.Mkdir(ready, 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(ready, "vmlinux"), vmlinux, 0o644); err != nil {
		return err
	}
	if err := collectModules(filepath.Join(tmp, "root"), ready); err != nil {
		return err
	}
	return os.Rename(ready, dir)
}

func run(ctx context.Context, dir, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return string(out), nil
}

// unpackKernel returns the ELF file in a bzImage. The header's fields are described in the kernel's
// Documentation/arch/x86/boot.rst: setup_sects at 0x1f1, payload_offset at 0x248 and payload_length at 0x24c; the
// payload ends with its unpacked length.
func unpackKernel(image []byte) ([]byte, error) {
	if len(image) < 0x250 || string(image[0x202:0x206]) != "HdrS" {
		return nil, errors.New("not a bzImage")
	}
	sects := int(image[0x1f1])
	if sects == 0 {
		sects = 4
	}
	start := (sects+1)*512 + int(binary.LittleEndian.Uint32(image[0x248:]))
	end := start + int(binary.LittleEndian.Uint32(image[0x24c:])) - 4
	if start > end || end+4 > len(image) {
		return nil, errors.New("payload lies outside of the image")
	}
	payload := image[start:end]
	var r io.Reader
	switch {
	case bytes.HasPrefix(payload, []byte{0x02, 0x21, 0x4c, 0x18}): // LZ4, legacy frame
		r = lz4.NewReader(bytes.NewReader(payload))
	case bytes.HasPrefix(payload, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		d, err := zstd.NewReader(bytes.NewReader(payload))
		if err != nil {
			return nil, err
		}
		defer d.Close()
		r = d
	default:
		return nil, fmt.Errorf("unknown compression % x", payload[:4])
	}
	elfFile, err := io.ReadAll(r)
	if err != nil {
		return nil, err
	}
	if want := int(binary.LittleEndian.Uint32(image[end:])); len(elfFile) != want || !bytes.HasPrefix(elfFile, []byte(elf.ELFMAG)) {
		return nil, fmt.Errorf("unpacked %d bytes instead of an ELF file of %d", len(elfFile), want)
	}
	return elfFile, nil
}

// collectModules copies the modules and what they depend on, numbered in the order to load them.
func collectModules(root, dir string) error {
	paths := make(map[string]string) // by name, in which - and _ are the same
	err := filepath.WalkDir(root, func(path string, _ os.DirEntry, err error) error {
		if base := filepath.Base(path); strings.HasSuffix(base, ".ko") || strings.HasSuffix(base, ".ko.xz") {
			paths[moduleName(base)] = path
		}
		return err
	})
	if err != nil {
		return err
	}
	var order []string
	contents := make(map[string][]byte)
	var visit func(name string) error
	visit = func(name string) error {
		if contents[name] != nil {
			return nil
		}
		path, ok := paths[name]
		if !ok {
			return nil // built in
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if strings.HasSuffix(path, ".xz") {
			r, err := xz.NewReader(bytes.NewReader(b))
			if err != nil {
				return err
			}
			if b, err = io.ReadAll(r); err != nil {
				return err
			}
		}
		contents[name] = b
		deps, err := dependencies(b)
		if err != nil {
			return fmt.Errorf("module %s: %w", name, err)
		}
		for _, dep := range deps {
			if err := visit(moduleName(dep)); err != nil {
				return err
			}
		}
		order = append(order, name)
		return nil
	}
	for _, name := range modules {
		if err := visit(moduleName(name)); err != nil {
			return err
		}
	}
	for i, name := range order {
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("%02d-%s.ko", i, name)), contents[name], 0o644); err != nil {
			return err
		}
	}
	return nil
}

func moduleName(base string) string {
	base = strings.TrimSuffix(strings.TrimSuffix(base, ".xz"), ".ko")
	return strings.ReplaceAll(base, "-", "_")
}

// dependencies reads "depends=a,b" in a module's section .modinfo.
func dependencies(ko []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(ko))
	if err != nil {
		return nil, err
	}
	section := f.Section(".modinfo")
	if section == nil {
		return nil, errors.New("no section .modinfo")
	}
	info, err := section.Data()
	if err != nil {
		return nil, err
	}
	for field := range bytes.SplitSeq(info, []byte{0}) {
		if deps, ok := bytes.CutPrefix(field, []byte("depends=")); ok && len(deps) > 0 {
			return strings.Split(string(deps), ","), nil
		}
	}
	return nil, nil
}

// buildInitrd compiles the guest program and packs it; an archive with the same contents is found in the cache.
func buildInitrd(ctx context.Context, kernel, cache string, files map[string]string) (string, error) {
	tmp, err := os.MkdirTemp(cache, "initrd-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w -buildid=", "-o", filepath.Join(tmp, "init"),
		"github.com/drafter-vm/drafter/internal/testguest/guest")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64", "GOFLAGS=")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build: %w: %s", err, out)
	}

	type entry struct{ guest, host string }
	entries := []entry{{"init", filepath.Join(tmp, "init")}}
	kos, _ := filepath.Glob(filepath.Join(kernel, "*.ko"))
	for _, ko := range kos {
		entries = append(entries, entry{"modules/" + filepath.Base(ko), ko})
	}
	for guest, host := range files {
		entries = append(entries, entry{strings.TrimPrefix(filepath.Clean(guest), "/"), host})
	}
	slices.SortFunc(entries, func(a, b entry) int { return strings.Compare(a.guest, b.guest) })

	var archive bytes.Buffer
	w := cpio.NewWriter(&archive)
	dirs := make(map[string]bool)
	var mkdir func(dir string) error
	mkdir = func(dir string) error {
		if dir == "." || dirs[dir] {
			return nil
		}
		dirs[dir] = true
		if err := mkdir(filepath.Dir(dir)); err != nil {
			return err
		}
		return w.WriteHeader(&cpio.Header{Name: dir, Mode: cpio.TypeDir | 0o755, Links: 2})
	}
	if err := mkdir("dev"); err != nil {
		return "", err
	}
	// The kernel opens /dev/console for init before init can mount anything.
	if err := w.WriteHeader(&cpio.Header{Name: "dev/console", Mode: cpio.TypeChar | 0o600, Links: 1, DeviceID: 5<<8 | 1}); err != nil {
		return "", err
	}
	for _, e := range entries {
		b, err := os.ReadFile(e.host)
		if err != nil {
			return "", err
		}
		info, err := os.Stat(e.host)
		if err != nil {
			return "", err
		}
		if err := mkdir(filepath.Dir(e.guest)); err != nil {
			return "", err
		}
		if err := w.WriteHeader(&cpio.Header{Name: e.guest, Mode: cpio.TypeReg | cpio.FileMode(info.Mode().Perm()), Size: int64(len(b)), Links: 1}); err != nil {
			return "", err
		}
		if _, err := w.Write(b); err != nil {
			return "", err
		}
	}
	if err := w.Close(); err != nil {
		return "", err
	}

	sum := sha256.Sum256(archive.Bytes())
	path := filepath.Join(cache, fmt.Sprintf("initrd-%x.cpio", sum[:10]))
	if _, err := os.Stat(path); err == nil {
		now := time.Now()
		return path, os.Chtimes(path, now, now)
	}
	if err := os.WriteFile(path+".tmp", archive.Bytes(), 0o644); err != nil {
		return "", err
	}
	if err := os.Rename(path+".tmp", path); err != nil {
		return "", err
	}
	return path, forgetOld(cache)
}

// forgetOld keeps the archives that were used last: the guest program changes, and each is several MB.
func forgetOld(cache string) error {
	const keep = 8
	paths, _ := filepath.Glob(filepath.Join(cache, "initrd-*.cpio"))
	used := func(path string) time.Time {
		info, err := os.Stat(path)
		if err != nil {
			return time.Time{}
		}
		return info.ModTime()
	}
	sort.Slice(paths, func(i, j int) bool { return used(paths[i]).After(used(paths[j])) })
	for _, path := range paths[min(keep, len(paths)):] {
		if err := os.Remove(path); err != nil {
			return err
		}
	}
	return nil
}
