package blueprint

import (
	"archive/tar"
	"cmp"
	"context"
	"crypto/sha256"
	"debug/elf"
	"embed"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/drafter-vm/drafter/pkg/filetree"
	"golang.org/x/sys/unix"
	"pault.ag/go/debian/dependency"
)

// Names of the files of a blueprint, in its folder.
const (
	KernelFile = "vmlinux"
	InitrdFile = "initrd.img"
	DiskFile   = "rootfs.ext4"

	stampFile = ".stamp.json"
)

// Config says what blueprint to build. Its zero value, with Agent set, is a minimal Debian 12.
type Config struct {
	// Output is the folder the blueprint is written to; default "out/blueprint".
	Output string

	// Agent is the path of the guest's program, drafter-agent: a static ELF executable. Required.
	Agent string

	// Suite is the Debian release; default "bookworm", and "trixie" with a Desktop. Packages that it has not are taken from
	// its backports.
	Suite string

	// Arch is the architecture of the guest; default and only one: "amd64".
	Arch string

	// Packages are what is installed besides a minimal system, each NAME, NAME/SUITE or NAME=VERSION. Recommended
	// packages are not installed.
	Packages []string

	// KernelPackage is the package of the kernel, or the meta package that names it; default
	// "linux-image-cloud-amd64", in bookworm Linux 6.1; "linux-image-cloud-amd64/bookworm-backports" is Linux 6.12.
	KernelPackage string

	// Mirror is the base URL of the archive; default: what the apt configuration in AptDir says, else deb.debian.org.
	Mirror string

	// AptDir is the apt configuration of this host; default "/etc/apt".
	AptDir string

	// Size is the size of the root disk in bytes, a multiple of 1 MiB; default: what is needed and about 0.5 GiB more.
	Size int64

	// Hostname of the guest; default "drafter".
	Hostname string

	// RootPassword is asked for at the serial console; empty: none is. A value that begins with "$" is a hash (man 5
	// crypt).
	RootPassword string

	// Network is the guest's address; each field has its default.
	Network NetworkConfig

	// Units are systemd unit files of this host to install and enable. Scripts are programs of this host to run at each
	// boot, as a service each; the guest counts as alive when they have ended.
	Units, Scripts []string

	// Copies are files and folders of this host to put into the guest, owned by root.
	Copies []Copy

	// Desktop is the command line, for a shell, of a program to fill the screen of a guest that has none: one looks at it by
	// VNC, at port 5900 of the guest, which asks for no password. When it ends, all of the desktop is started again. [DefaultDesktop]
	// brings its package; other programs are among Packages or Copies. Empty: no desktop.
	Desktop string

	// OCI has the guest run, with crun, what is on disks that hold an OCI runtime bundle each. It counts as alive when all of them are ready. Package
	// pkg/oci/supervise says how. Without such a disk it is a guest like any other.
	OCI bool

	// Fstab are lines for /etc/fstab. "nofail" and a short wait for the device are added where a line has none.
	Fstab []string

	// Lock is the lock file; default "blueprint.lock" in Output. Where there is none, the lock that this package carries
	// is taken, and written there. It fixes the version of every package. An entry that the archive no longer serves, or
	// that the request outgrew, is chosen anew, with a warning; that is an error if Locked. UpdateLock chooses everything anew.
	Lock               string
	Locked, UpdateLock bool

	// Cache is where downloads are kept, by digest; default "drafter/blueprint" in the user's cache folder. Builds may
	// share it at the same time.
	Cache string

	// Progress, if set, is told how far the build is. It is called from several goroutines, one at a time.
	Progress func(Progress) `json:"-"`

	// Logger receives events and warnings; nil means slog.Default().
	Logger *slog.Logger `json:"-"`
}

// Copy is a file or folder of the host that goes into the guest.
type Copy struct{ Host, Guest string } // path on this host

// Progress is how far one stage of a build is.
type Progress struct {
	Stage       string // what is being done, as shown to people: "download packages"
	Done, Total int64  // bytes; Total < 0 when unknown
}

// Result is a finished blueprint.
type Result struct {
	Kernel, Initrd, Disk string            // paths
	Lock                 string            // path of the lock file that was used
	KernelVersion        string            // "6.1.0-56-cloud-amd64"
	Packages             []Package         // installed in the root disk
	SHA256               map[string]string // of each file, by its name in the folder
	UpToDate             bool              // nothing had changed, nothing was built
}

// sources are part of what a build's outcome depends on.
//
//go:embed *.go
var sources embed.FS

// withDefaults returns the configuration with defaults filled in.
func (cfg Config) withDefaults() Config {
	cfg.Output = cmp.Or(cfg.Output, filepath.Join("out", "blueprint"))
	if cfg.Desktop != "" {
		cfg.Suite = cmp.Or(cfg.Suite, desktopSuite)
	}
	cfg.Suite = cmp.Or(cfg.Suite, "bookworm")
	cfg.Arch = cmp.Or(cfg.Arch, "amd64")
	cfg.KernelPackage = cmp.Or(cfg.KernelPackage, "linux-image-cloud-amd64")
	cfg.AptDir = cmp.Or(cfg.AptDir, "/etc/apt")
	cfg.Hostname = cmp.Or(cfg.Hostname, "drafter")
	cfg.Lock = cmp.Or(cfg.Lock, filepath.Join(cfg.Output, "blueprint.lock"))
	cfg.Logger = cmp.Or(cfg.Logger, slog.Default())
	n := &cfg.Network
	if n.MAC == nil {
		n.MAC = net.HardwareAddr{0x02, 0x0e, 0xd9, 0xfd, 0x68, 0x3d}
	}
	n.Address4 = cmp2(n.Address4, netip.MustParsePrefix("172.16.0.2/30"))
	n.Address6 = cmp2(n.Address6, netip.MustParsePrefix("fd00:172:16::2/64"))
	n.Gateway4 = cmp2(n.Gateway4, netip.MustParseAddr("172.16.0.1"))
	n.Gateway6 = cmp2(n.Gateway6, netip.MustParseAddr("fd00:172:16::1"))
	if n.Nameservers == nil {
		n.Nameservers = []netip.Addr{netip.MustParseAddr("1.1.1.1"), netip.MustParseAddr("8.8.8.8")}
	}

	return cfg
}

// complete checks the configuration and returns it with defaults filled in.
func (cfg Config) complete() (Config, error) {
	cfg = cfg.withDefaults()
	if cfg.Arch != "amd64" || runtime.GOARCH != "amd64" || runtime.GOOS != "linux" {
		return cfg, fmt.Errorf("architecture %q on %s/%s is not supported: blueprints are built for amd64, on linux/amd64", cfg.Arch, runtime.GOOS, runtime.GOARCH)
	}
	if !validName(cfg.Suite) {
		return cfg, fmt.Errorf("suite %q is not a release name such as bookworm", cfg.Suite)
	}
	if !validHostname(cfg.Hostname) {
		return cfg, fmt.Errorf("host name %q is not valid: letters, digits and dashes, at most 63", cfg.Hostname)
	}
	if cfg.Size < 0 || cfg.Size%(1<<20) != 0 {
		return cfg, fmt.Errorf("size %d of the root disk is not a positive multiple of 1 MiB", cfg.Size)
	}
	if cfg.Locked && cfg.UpdateLock {
		return cfg, errors.New("a build cannot both update the lock file and keep to it; choose one of --locked and --update-lock")
	}
	if strings.ContainsAny(cfg.RootPassword, ":\n") {
		return cfg, errors.New("root password holds a colon or a line break")
	}
	for _, p := range append([]string{cfg.KernelPackage}, cfg.Packages...) {
		if _, err := parseWant(p); err != nil {
			return cfg, err
		}
	}
	if err := checkDesktop(cfg.Desktop); err != nil {
		return cfg, err
	}
	if err := checkAgent(cfg.Agent); err != nil {
		return cfg, err
	}
	for _, u := range cfg.Units {
		if !slices.Contains([]string{".service", ".socket", ".timer", ".target", ".mount", ".path"}, filepath.Ext(u)) {
			return cfg, fmt.Errorf("unit %q does not end in .service, .socket, .timer, .target, .mount or .path", u)
		}
	}
	for _, f := range slices.Concat(cfg.Units, cfg.Scripts) {
		if st, err := os.Stat(f); err != nil {
			return cfg, fmt.Errorf("read file for the guest: %w", err)
		} else if !st.Mode().IsRegular() {
			return cfg, fmt.Errorf("read file for the guest: %q is not a regular file", f)
		}
	}
	for _, c := range cfg.Copies {
		if _, err := os.Stat(c.Host); err != nil {
			return cfg, fmt.Errorf("read file for the guest: %w", err)
		}
		if !filepath.IsAbs(c.Guest) {
			return cfg, fmt.Errorf("copy %s:%s: the path in the guest must begin with /", c.Host, c.Guest)
		}
	}
	for _, line := range cfg.Fstab {
		if f := strings.Fields(line); len(f) < 4 || len(f) > 6 || !filepath.IsAbs(f[1]) && f[1] != "none" || strings.Contains(line, "\n") {
			return cfg, fmt.Errorf("fstab line %q is not of the form %q", line, "LABEL=data /data ext4 defaults 0 2")
		}
	}
	return cfg, nil
}

// cmp2 is cmp.Or for types whose zero value says that it is not valid.
func cmp2[T interface{ IsValid() bool }](v, def T) T {
	if v.IsValid() {
		return v
	}
	return def
}

func validHostname(s string) bool {
	for i := range len(s) {
		if c := s[i]; !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' && i > 0) {
			return false
		}
	}
	return s != "" && len(s) <= 63
}

// checkAgent refuses a program that the guest could not run.
func checkAgent(path string) error {
	const remedy = "give the path of drafter-agent with --agent; `make build` makes it"
	if path == "" {
		return errors.New("no agent for the guest: " + remedy)
	}
	f, err := elf.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("agent %q does not exist: %s", path, remedy)
	}
	if err != nil {
		return fmt.Errorf("agent %q is not an ELF executable (%w): %s", path, err, remedy)
	}
	defer f.Close()
	if f.Machine != elf.EM_X86_64 {
		return fmt.Errorf("agent %q is for %v, the guest is x86-64: %s", path, f.Machine, remedy)
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return fmt.Errorf("agent %q is not a static executable: %s", path, remedy)
		}
	}
	return nil
}

// request is what a lock file answers.
func (cfg Config) request() string {
	fixed := []string{cfg.Suite, cfg.Arch, baseVersion, cfg.KernelPackage}
	if cfg.Desktop != "" {
		fixed = append(fixed, desktopVersion)
	}
	if cfg.OCI {
		fixed = append(fixed, ociVersion)
	}
	return strings.Join(append(fixed, cfg.packages()...), " ")
}

// Build builds a blueprint, or finds that the one there is what it would build. It needs no privileges. Files appear in
// the output folder complete or not at all; a build that fails or is cancelled leaves those of an earlier one, or none.
func Build(ctx context.Context, cfg Config) (Result, error) {
	cfg, err := cfg.complete()
	if err != nil {
		return Result{}, err
	}
	if err := os.MkdirAll(cfg.Output, 0o755); err != nil {
		return Result{}, fmt.Errorf("create output folder: %w", err)
	}
	unlock, err := lockFolder(cfg.Output)
	if err != nil {
		return Result{}, err
	}
	defer unlock()
	c, err := newCache(cfg.Cache)
	if err != nil {
		return Result{}, err
	}
	b := &build{cfg: cfg, cache: c, log: cfg.Logger}

	lock, inFile, err := readLock(cfg.Lock)
	if err != nil {
		return Result{}, err
	}
	if lock.request == cfg.request() && !cfg.UpdateLock {
		if r, ok := b.upToDate(lock); ok {
			return r, nil
		}
	}
	if lock, err = b.settleLock(ctx, lock); err != nil {
		return Result{}, err
	}
	if !cfg.Locked || !inFile {
		if err := lock.write(cfg.Lock); err != nil {
			return Result{}, err
		}
	}
	return b.build(ctx, lock)
}

// lockFolder makes sure that one build at a time writes to a folder.
func lockFolder(dir string) (unlock func(), err error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("open output folder: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("output folder %q is being written by another build; wait for it, or give another --output", dir)
		}
		return nil, fmt.Errorf("lock output folder %q: %w", dir, err)
	}
	return func() { f.Close() }, nil
}

// build is one run of Build.
type build struct {
	cfg   Config
	cache *cache
	log   *slog.Logger

	progressing atomic.Bool // set while Progress runs: late reports of other goroutines are dropped
	archives    map[string]string
	aptSources  []Source
}

func (b *build) progress(stage string) func(done, total int64) {
	if b.cfg.Progress == nil {
		return func(_, _ int64) {}
	}
	return func(done, total int64) {
		// Dropping what comes meanwhile is fine, but for the last of a stage.
		if done < total && b.progressing.Load() {
			return
		}
		for !b.progressing.CompareAndSwap(false, true) {
			runtime.Gosched()
		}
		defer b.progressing.Store(false)
		b.cfg.Progress(Progress{stage, done, total})
	}
}

// counter returns a function to be told of parts, which reports their sum. It may be called concurrently.
func counter(total int64, progress func(done, total int64)) func(int64) {
	var sum atomic.Int64
	return func(n int64) { progress(sum.Add(n), total) }
}

// parallelUnpacks is how many packages are unpacked at a time: the decoders are bound by the processor.
func parallelUnpacks() int { return max(1, runtime.GOMAXPROCS(0)) }

// mirrorSources is the source that a mirror given by name stands for; none if empty.
func mirrorSources(mirror, suite string) []Source {
	if mirror == "" {
		return nil
	}
	return []Source{{URI: strings.TrimSuffix(mirror, "/"), Suite: suite, Components: []string{"main"}}}
}

// findArchives finds where packages come from.
func (b *build) findArchives() (err error) {
	if b.aptSources, err = findSources(b.cfg.AptDir, b.cfg.Suite, b.cfg.Mirror); err != nil {
		return err
	}
	b.archives = map[string]string{}
	for _, s := range b.aptSources {
		b.archives[s.Suite] = s.URI
	}
	return nil
}

// settleLock returns a lock for the request whose packages are all in the cache.
func (b *build) settleLock(ctx context.Context, lock *lockFile) (*lockFile, error) {
	var err error
	if err = b.findArchives(); err != nil {
		return nil, err
	}
	fresh := false
	switch {
	case b.cfg.UpdateLock:
		if lock, err = b.resolve(ctx, nil); err != nil {
			return nil, err
		}
		fresh = true
	case lock.request != b.cfg.request():
		if b.cfg.Locked {
			return nil, fmt.Errorf("lock file %q is for the request %q, not %q; build once without --locked", b.cfg.Lock, lock.request, b.cfg.request())
		}
		b.log.Debug("lock file is for another request, choosing packages", "lock", lock.request, "request", b.cfg.request())
		if lock, err = b.resolve(ctx, lock); err != nil {
			return nil, err
		}
		fresh = true
	}
	for {
		gone, err := b.cache.fetchAll(ctx, lock.all(), b.archives, b.progress("download packages"))
		if err != nil {
			return nil, err
		}
		if len(gone) == 0 {
			return lock, nil
		}
		names := make([]string, len(gone))
		for i, p := range gone {
			names[i] = p.String()
		}
		if fresh {
			return nil, fmt.Errorf("the archive's index names packages that it does not serve: %s; it may be changing, try again or another --mirror", strings.Join(names, ", "))
		}
		if b.cfg.Locked {
			return nil, fmt.Errorf("lock file %q is stale, the archive no longer serves %s; build without --locked to choose newer versions", b.cfg.Lock, strings.Join(names, ", "))
		}
		b.log.Warn("the archive no longer serves packages of the lock file, choosing newer versions", "lock", b.cfg.Lock, "packages", strings.Join(names, ", "))
		if lock, err = b.resolve(ctx, lock); err != nil {
			return nil, err
		}
		fresh = true
	}
}

// resolve chooses all packages anew, from the indexes of the archive, keeping what lock holds where it still is served.
func (b *build) resolve(ctx context.Context, lock *lockFile) (*lockFile, error) {
	if lock == nil {
		lock = &lockFile{}
	}
	ix, err := b.cache.fetchIndex(ctx, b.aptSources, b.cfg.Arch, b.log, b.progress("read package index"))
	if err != nil {
		return nil, err
	}
	out := &lockFile{request: b.cfg.request()}

	// What is asked for by name comes first, as it decides between alternatives.
	var wants []want
	for _, p := range b.cfg.packages() {
		w, err := parseWant(p)
		if err != nil {
			return nil, err
		}
		wants = append(wants, w)
	}
	for _, name := range ix.essential() {
		wants = append(wants, want{name: name, by: "every Debian system"})
	}
	for _, name := range basePackages {
		wants = append(wants, want{name: name, by: "every guest"})
	}
	var demands map[string][]demand
	if b.cfg.Desktop != "" {
		demands = desktopDemands
	}
	system, err := ix.resolve(wants, digests(lock.system), demands)
	if err != nil {
		return nil, err
	}
	for _, c := range system {
		out.system = append(out.system, c.Package)
	}

	kernel, err := ix.kernel(b.cfg.KernelPackage, digests(lock.kernel))
	if err != nil {
		return nil, err
	}
	out.kernel = []Package{kernel.Package}

	// libarchive is opened by mke2fs at run time and so is no dependency; its package was renamed in trixie.
	tools := []want{{name: "e2fsprogs", by: "the build"}, {name: "kmod", by: "the build"}, {name: "busybox-static", by: "the build"}}
	archive := "libarchive13"
	if ix.packages[archive] == nil {
		archive = "libarchive13t64"
	}
	tools = append(tools, want{name: archive, by: "the build"})
	demands = map[string][]demand{"e2fsprogs": {{dependency.VersionRelation{Operator: ">=", Number: mke2fsMinimum}, "the build"}}}
	chosen, err := ix.resolve(tools, digests(lock.tools), demands)
	if err != nil {
		return nil, err
	}
	for _, c := range chosen {
		out.tools = append(out.tools, c.Package)
	}
	return out, nil
}

// stamp records what the files of a folder were made from, and how they looked then.
type stamp struct {
	Inputs        string               `json:"inputs"` // digest
	KernelVersion string               `json:"kernelVersion"`
	Files         map[string]stampedAs `json:"files"`
}

type stampedAs struct {
	SHA256   string `json:"sha256"`
	Size     int64  `json:"size"`
	Modified int64  `json:"modified"` // nanoseconds since 1970
}

// inputs is a digest over everything the outcome depends on.
func (b *build) inputs(lock *lockFile) (string, error) {
	h := sha256.New()
	cfg := b.cfg
	// What does not change the outcome is left out.
	cfg.Output, cfg.Lock, cfg.Cache, cfg.AptDir, cfg.Logger, cfg.Progress, cfg.Locked, cfg.UpdateLock = "", "", "", "", nil, nil, false, false
	if err := json.NewEncoder(h).Encode(cfg.encodable()); err != nil {
		return "", fmt.Errorf("digest configuration: %w", err)
	}
	h.Write(lock.text())
	for _, sources := range []embed.FS{sources, filetree.Sources} {
		if err := fs.WalkDir(sources, ".", func(p string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || strings.HasSuffix(p, "_test.go") {
				return err
			}
			text, err := sources.ReadFile(p)
			h.Write(text)
			return err
		}); err != nil {
			return "", fmt.Errorf("digest builder: %w", err)
		}
	}
	files := append([]string{cfg.Agent}, slices.Concat(cfg.Units, cfg.Scripts)...)
	for _, c := range cfg.Copies {
		files = append(files, c.Host)
	}
	for _, f := range files {
		if err := digestHostFiles(h, f); err != nil {
			return "", err
		}
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// encodable is the configuration as JSON can hold it.
func (cfg Config) encodable() any {
	return struct {
		Agent, Suite, Arch, Kernel, Mirror, Hostname, Password, Desktop string
		Packages, Units, Scripts, Fstab                                 []string
		Size                                                            int64
		OCI                                                             bool
		Network                                                         NetworkConfig
		Copies                                                          []Copy
	}{"", cfg.Suite, cfg.Arch, cfg.KernelPackage, cfg.Mirror, cfg.Hostname, cfg.RootPassword, cfg.Desktop, cfg.Packages, cfg.Units, cfg.Scripts, cfg.Fstab, cfg.Size, cfg.OCI, cfg.Network, cfg.Copies}
}

func digestHostFiles(w io.Writer, root string) error {
	return walkHost(root, func(rel string, st fs.FileInfo) error {
		fmt.Fprintf(w, "%q %v %d\n", rel, st.Mode(), st.Size())
		if !st.Mode().IsRegular() {
			return nil
		}
		f, err := os.Open(filepath.Join(root, rel))
		if err != nil {
			return fmt.Errorf("read file for the guest: %w", err)
		}
		defer f.Close()
		_, err = io.Copy(w, f)
		return err
	})
}

// walkHost calls f for a file of the host, or for all that is in a folder, by paths relative to it. A symbolic link
// that is given by name is followed.
func walkHost(root string, f func(rel string, st fs.FileInfo) error) error {
	st, err := os.Stat(root)
	if err != nil {
		return fmt.Errorf("read file for the guest: %w", err)
	}
	if !st.IsDir() {
		return f(".", st)
	}
	return filepath.WalkDir(root+string(filepath.Separator), func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return fmt.Errorf("read file for the guest: %w", err)
		}
		st, err := d.Info()
		if err != nil {
			return fmt.Errorf("read file for the guest: %w", err)
		}
		rel, err := filepath.Rel(root, p)
		if err != nil {
			return err
		}
		return f(rel, st)
	})
}

// upToDate tells whether the output folder holds what a build would make.
func (b *build) upToDate(lock *lockFile) (Result, bool) {
	data, err := os.ReadFile(filepath.Join(b.cfg.Output, stampFile))
	if err != nil {
		return Result{}, false
	}
	var st stamp
	if json.Unmarshal(data, &st) != nil {
		return Result{}, false
	}
	inputs, err := b.inputs(lock)
	if err != nil || inputs != st.Inputs {
		return Result{}, false
	}
	for _, name := range []string{KernelFile, InitrdFile, DiskFile} {
		info, err := os.Stat(filepath.Join(b.cfg.Output, name))
		if as := st.Files[name]; err != nil || info.Size() != as.Size || info.ModTime().UnixNano() != as.Modified {
			return Result{}, false
		}
	}
	r := b.result(lock, st)
	r.UpToDate = true
	return r, true
}

func (b *build) result(lock *lockFile, st stamp) Result {
	r := Result{
		Kernel: filepath.Join(b.cfg.Output, KernelFile), Initrd: filepath.Join(b.cfg.Output, InitrdFile), Disk: filepath.Join(b.cfg.Output, DiskFile),
		Lock: b.cfg.Lock, KernelVersion: st.KernelVersion, Packages: lock.system, SHA256: map[string]string{},
	}
	for name, f := range st.Files {
		r.SHA256[name] = f.SHA256
	}
	return r
}

// build makes the three files from packages that are all in the cache.
func (b *build) build(ctx context.Context, lock *lockFile) (Result, error) {
	inputs, err := b.inputs(lock)
	if err != nil {
		return Result{}, err
	}
	tmp, err := os.MkdirTemp(b.cfg.Output, ".build-*")
	if err != nil {
		return Result{}, fmt.Errorf("create work folder: %w", err)
	}
	defer os.RemoveAll(tmp)
	spool, err := filetree.NewSpool(tmp)
	if err != nil {
		return Result{}, err
	}
	defer spool.Close()

	isKernel := map[string]bool{}
	for _, p := range lock.kernel {
		isKernel[p.SHA256] = true
	}
	var busyboxPackage []Package
	for _, p := range lock.tools {
		if p.Name == "busybox-static" {
			busyboxPackage = append(busyboxPackage, p)
		}
	}
	if len(lock.kernel) != 1 || len(busyboxPackage) != 1 || len(lock.system) == 0 {
		return Result{}, fmt.Errorf("lock file %q lacks the kernel, busybox-static or the system; make it anew with --update-lock", b.cfg.Lock)
	}
	box, err := b.cache.openToolbox(ctx, lock.tools)
	if err != nil {
		return Result{}, err
	}
	debs, err := b.cache.openAll(ctx, slices.Concat(lock.kernel, busyboxPackage, lock.system), spool, keepPath, b.progress("unpack packages"))
	if err != nil {
		return Result{}, err
	}
	kernel, err := readKernelPackage(debs[0])
	if err != nil {
		return Result{}, err
	}
	if err := b.writeKernel(kernel, filepath.Join(tmp, KernelFile)); err != nil {
		return Result{}, err
	}
	if err := b.writeInitrd(kernel, debs[1], filepath.Join(tmp, InitrdFile)); err != nil {
		return Result{}, err
	}
	debs = debs[2:]

	s := &system{Tree: filetree.New(spool), cfg: &b.cfg}
	s.users = users{s.Tree}
	if err := s.lay(ctx, debs); err != nil {
		return Result{}, fmt.Errorf("lay out root disk: %w", err)
	}
	for _, w := range s.warnings {
		b.log.Warn(w)
	}
	if err := box.installModules(ctx, s.Tree, kernel, tmp); err != nil {
		return Result{}, err
	}
	// The time of the build is that of its youngest package.
	epoch := int64(0)
	for _, d := range debs {
		for _, f := range d.files {
			if f.node != nil {
				epoch = max(epoch, f.node.ModTime)
			}
		}
	}
	if err := box.makeExt4(ctx, s.Tree, filepath.Join(tmp, DiskFile), b.cfg.Size, epoch, b.progress("write root disk")); err != nil {
		return Result{}, err
	}
	return b.publish(ctx, tmp, lock, stamp{Inputs: inputs, KernelVersion: kernel.version, Files: map[string]stampedAs{}})
}

// publish moves the finished files to where they belong.
func (b *build) publish(ctx context.Context, tmp string, lock *lockFile, st stamp) (Result, error) {
	names := []string{KernelFile, InitrdFile, DiskFile}
	for _, name := range names {
		as, err := digestFile(ctx, filepath.Join(tmp, name))
		if err != nil {
			return Result{}, err
		}
		st.Files[name] = as
	}
	// Without the stamp no mixture of old and new files can pass for up to date.
	if err := os.Remove(filepath.Join(b.cfg.Output, stampFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return Result{}, fmt.Errorf("publish blueprint: %w", err)
	}
	for _, name := range names {
		if err := os.Rename(filepath.Join(tmp, name), filepath.Join(b.cfg.Output, name)); err != nil {
			return Result{}, fmt.Errorf("publish blueprint: %w", err)
		}
	}
	data, err := json.MarshalIndent(st, "", "\t")
	if err != nil {
		return Result{}, fmt.Errorf("publish blueprint: %w", err)
	}
	if err := writeFileAtomic(filepath.Join(b.cfg.Output, stampFile), append(data, '\n'), 0o644); err != nil {
		return Result{}, err
	}
	return b.result(lock, st), nil
}

func digestFile(ctx context.Context, path string) (stampedAs, error) {
	f, err := os.Open(path)
	if err != nil {
		return stampedAs{}, fmt.Errorf("digest %q: %w", path, err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return stampedAs{}, fmt.Errorf("digest %q: %w", path, err)
	}
	h := sha256.New()
	buf := make([]byte, 1<<20)
	for {
		n, err := f.Read(buf)
		h.Write(buf[:n])
		if err == io.EOF {
			break
		}
		if err != nil {
			return stampedAs{}, fmt.Errorf("digest %q: %w", path, err)
		}
		if ctx.Err() != nil {
			return stampedAs{}, ctx.Err()
		}
	}
	return stampedAs{hex.EncodeToString(h.Sum(nil)), st.Size(), st.ModTime().UnixNano()}, nil
}

func (b *build) writeKernel(k *kernelPackage, path string) error {
	kernel, err := ExtractVMLinux(k.image.Reader())
	if err != nil {
		return fmt.Errorf("unpack kernel %s: %w", k.version, err)
	}
	if err := os.WriteFile(path, kernel, 0o644); err != nil {
		return fmt.Errorf("write kernel: %w", err)
	}
	return nil
}

func (b *build) writeInitrd(k *kernelPackage, busybox *deb, path string) error {
	i := slices.IndexFunc(busybox.files, func(f debFile) bool {
		return f.node != nil && f.node.Type == tar.TypeReg && filepath.Base(f.path) == "busybox"
	})
	if i < 0 {
		return fmt.Errorf("package %s holds no busybox", busybox.Package)
	}
	program, err := io.ReadAll(busybox.files[i].node.Content.Reader())
	if err != nil {
		return fmt.Errorf("write initrd: %w", err)
	}
	modules, err := k.closure(initrdModules)
	if err != nil {
		return fmt.Errorf("write initrd: %w", err)
	}
	f, err := os.Create(path)
	if err != nil {
		return fmt.Errorf("write initrd: %w", err)
	}
	return errors.Join(writeInitrd(f, program, modules), f.Close())
}

// installModules puts the kernel's modules into the tree, with the indexes that depmod makes of them.
func (box *toolbox) installModules(ctx context.Context, t *filetree.Tree, k *kernelPackage, tmp string) error {
	base, err := os.MkdirTemp(tmp, "modules-*")
	if err != nil {
		return fmt.Errorf("install modules: %w", err)
	}
	defer os.RemoveAll(base)
	dir := filepath.Join(base, "lib", "modules", k.version)
	for p, c := range k.modules {
		if err := t.Put("/lib/modules/"+k.version+"/"+p, &filetree.Node{Type: tar.TypeReg, Mode: 0o644, Content: c}); err != nil {
			return fmt.Errorf("install modules: %w", err)
		}
		if !filepath.IsLocal(p) {
			return fmt.Errorf("install modules: path %q leads out of the package", p)
		}
		file := filepath.Join(dir, p)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			return fmt.Errorf("install modules: %w", err)
		}
		w, err := os.Create(file)
		if err != nil {
			return fmt.Errorf("install modules: %w", err)
		}
		if err := errors.Join(c.CopyTo(w), w.Close()); err != nil {
			return fmt.Errorf("install modules: %w", err)
		}
	}
	cmd := box.command(ctx, "depmod", "-b", base, k.version)
	if out, err := cmd.CombinedOutput(); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return fmt.Errorf("install modules: depmod: %w: %s", err, out)
	}
	indexes, err := filepath.Glob(filepath.Join(dir, "modules.*"))
	if err != nil {
		return fmt.Errorf("install modules: %w", err)
	}
	for _, index := range indexes {
		data, err := os.ReadFile(index)
		if err != nil {
			return fmt.Errorf("install modules: %w", err)
		}
		if err := t.WriteFile("/lib/modules/"+k.version+"/"+filepath.Base(index), string(data), 0o644); err != nil {
			return fmt.Errorf("install modules: %w", err)
		}
	}
	return nil
}

// spoolHostFile takes a file of the host into the spool.
func (s *system) spoolHostFile(path string) (filetree.Content, error) {
	f, err := os.Open(path)
	if err != nil {
		return filetree.Content{}, fmt.Errorf("read file for the guest: %w", err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return filetree.Content{}, fmt.Errorf("read file for the guest: %w", err)
	}
	c, err := s.Spool.Put(f, st.Size())
	if err != nil {
		return filetree.Content{}, fmt.Errorf("read file for the guest %q: %w", path, err)
	}
	return c, nil
}

// copyFromHost copies a file or folder of the host into the tree, owned by root. A file goes into a guest path that
// ends in "/" or is a folder under its own name.
func (s *system) copyFromHost(host, guest string) error {
	st, err := os.Stat(host)
	if err != nil {
		return fmt.Errorf("read file for the guest: %w", err)
	}
	if n := s.Find(guest, true); !st.IsDir() && (strings.HasSuffix(guest, "/") || n != nil && n.Type == tar.TypeDir) {
		guest = filepath.Join(guest, filepath.Base(host))
	}
	return walkHost(host, func(rel string, st fs.FileInfo) error {
		n := &filetree.Node{Mode: uint32(st.Mode().Perm()), ModTime: st.ModTime().Unix()}
		var err error
		switch {
		case st.IsDir():
			n.Type = tar.TypeDir
		case st.Mode().IsRegular():
			n.Type = tar.TypeReg
			n.Content, err = s.spoolHostFile(filepath.Join(host, rel))
		case st.Mode()&fs.ModeSymlink != 0:
			n.Type, n.Mode = tar.TypeSymlink, 0o777
			n.Link, err = os.Readlink(filepath.Join(host, rel))
		default:
			err = fmt.Errorf("read file for the guest: %q is neither file, folder nor link", filepath.Join(host, rel))
		}
		if err != nil {
			return err
		}
		n.ModTime = 0 // what is copied counts by its content: a fresh checkout gives the same disk
		return s.Put(filepath.Join(guest, rel), n)
	})
}
