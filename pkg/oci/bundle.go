package oci

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	ispec "github.com/opencontainers/image-spec/specs-go/v1"
	rspec "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/opencontainers/umoci/oci/config/convert"

	"github.com/drafter-vm/drafter/pkg/filetree"
	"github.com/drafter-vm/drafter/pkg/oci/bundle"
)

// Settings change what an image says of itself. The zero value changes nothing.
type Settings struct {
	Env        []string // NAME=VALUE; the last of a name counts
	Entrypoint []string // instead of the image's, whose command is dropped, too; nil: as it is
	Command    []string // instead of the image's; nil: as it is
	User       string   // NAME or UID, perhaps with :GROUP
	WorkDir    string   // absolute
	Hostname   string   // of the container alone; empty: it has that of its machine, also when a clone gets another
	ReadOnly   bool     // the root file system cannot be written to
	Mounts     []Mount

	Name    string // of the container in the guest; empty: that of its device
	Restart string // see [bundle.ParseRestart]
	Ready   string // see [bundle.ParseReady]; empty: the first of the image's ports by number, if it says any
}

// Mount is a mount of a container.
type Mount struct {
	Type     string // "volume", the default; "tmpfs"; "bind", of a file or folder of the guest
	Source   string // of a volume, the label of its disk; of a bind, the guest's path
	Target   string // in the container
	ReadOnly bool
	Size     int64 // of a volume that is to be made, or of a tmpfs, in bytes; 0: as usual
}

// Types of mounts.
const (
	VolumeMount = "volume"
	TmpfsMount  = "tmpfs"
	BindMount   = "bind"
)

var labelPattern = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,15}$`)

func (m Mount) check() error {
	switch {
	case !path.IsAbs(m.Target) || path.Clean(m.Target) == "/":
		return fmt.Errorf("mount at %q: the target is an absolute path in the container", m.Target)
	case m.Type == VolumeMount && !labelPattern.MatchString(m.Source):
		return fmt.Errorf("mount at %q: volume %q: its name is the label of its file system, at most 16 letters, digits, dots, hyphens and underscores", m.Target, m.Source)
	case m.Type == VolumeMount && m.Source == bundle.Label:
		return fmt.Errorf("mount at %q: volume %q: that is the label of bundle disks: give it another name", m.Target, m.Source)
	case m.Type == BindMount && !path.IsAbs(m.Source):
		return fmt.Errorf("mount at %q: bind %q: its source is an absolute path of the guest", m.Target, m.Source)
	case m.Type == TmpfsMount && m.Source != "":
		return fmt.Errorf("mount at %q: a tmpfs has no source, not %q", m.Target, m.Source)
	case m.Type != VolumeMount && m.Type != BindMount && m.Type != TmpfsMount:
		return fmt.Errorf("mount at %q: type %q: use volume, tmpfs or bind", m.Target, m.Type)
	case m.Size < 0 || m.Size > 0 && m.Type == BindMount:
		return fmt.Errorf("mount at %q: a size of %d bytes: a bind has none, and none is negative", m.Target, m.Size)
	}
	return nil
}

// Check reports what of the settings cannot be.
func (s Settings) Check() error {
	for _, env := range s.Env {
		if name, _, ok := strings.Cut(env, "="); !ok || name == "" || strings.ContainsAny(env, "\x00") {
			return fmt.Errorf("environment %q: give NAME=VALUE", env)
		}
	}
	if s.WorkDir != "" && !path.IsAbs(s.WorkDir) {
		return fmt.Errorf("work directory %q is not absolute", s.WorkDir)
	}
	if s.Hostname != "" && !hostnamePattern.MatchString(s.Hostname) {
		return fmt.Errorf("host name %q: use at most 64 letters, digits, hyphens and dots, with a letter or digit at both ends", s.Hostname)
	}
	if s.Name != "" && !namePattern.MatchString(s.Name) {
		return fmt.Errorf("name %q of the container: use at most 63 lower-case letters, digits, dots, hyphens and underscores", s.Name)
	}
	if _, err := bundle.ParseRestart(s.Restart); err != nil {
		return err
	}
	if _, err := bundle.ParseReady(s.Ready); err != nil {
		return err
	}
	seen := map[string]bool{}
	for _, m := range s.Mounts {
		if err := m.check(); err != nil {
			return err
		}
		if target := path.Clean(m.Target); seen[target] {
			return fmt.Errorf("mount at %q: there are two", m.Target)
		} else {
			seen[target] = true
		}
	}
	return nil
}

var hostnamePattern = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9.-]{0,62}[A-Za-z0-9])?$`)

var namePattern = regexp.MustCompile(`^[a-z0-9][a-z0-9_.-]{0,62}$`)

// Bundle is an OCI runtime bundle that is being made: config.json and the root file system, in memory but for large files. One goroutine at a time
// uses it.
type Bundle struct {
	Spec *rspec.Spec

	tree *filetree.Tree // with the bundle's files at its root
	tmp  string
}

// Close lets go of the bundle.
func (b *Bundle) Close() error {
	return errors.Join(b.tree.Spool.Close(), os.RemoveAll(b.tmp))
}

func newBundle() (*Bundle, error) {
	tmp, err := os.MkdirTemp("", "drafter-oci-*")
	if err != nil {
		return nil, err
	}
	spool, err := filetree.NewSpool(tmp)
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(tmp))
	}
	b := &Bundle{tree: filetree.New(spool), tmp: tmp}
	return b, b.tree.Mkdir(rootPath, 0o755, 0, 0)
}

const rootPath = "/" + bundle.RootFolder

// BundleOptions say how a bundle is made of an image.
type BundleOptions struct {
	Settings Settings
	Limits   Limits
	Progress func(Progress) // nil is allowed; it is called by several goroutines
}

// Bundle makes a bundle of the image: it fetches the layers.
func (i *Image) Bundle(ctx context.Context, opts BundleOptions) (_ *Bundle, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("unpack image %q: %w", i.Reference, err)
		}
	}()
	if opts.Progress == nil {
		opts.Progress = func(Progress) {}
	}
	if err := opts.Settings.Check(); err != nil {
		return nil, err
	}
	b, err := newBundle()
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, b.Close())
		}
	}()
	if err := i.lay(ctx, b.rootfs(), b.tmp, opts.Limits, opts.Progress); err != nil {
		return nil, err
	}
	if err := b.configure(i.config, opts.Settings); err != nil {
		return nil, err
	}
	return b, nil
}

// accountFiles say who an image's users are, in at most maxAccounts bytes each.
const maxAccounts = 16 << 20

var accountFiles = []string{"etc/passwd", "etc/group"}

// configure makes config.json of an image's configuration.
func (b *Bundle) configure(config []byte, s Settings) error {
	var image ispec.Image
	if err := json.Unmarshal(config, &image); err != nil {
		return fmt.Errorf("read configuration: %w", err)
	}
	image.OS = cmp.Or(image.OS, "linux")
	c := &image.Config
	if s.Entrypoint != nil {
		c.Entrypoint, c.Cmd = s.Entrypoint, nil
	}
	if s.Command != nil {
		c.Cmd = s.Command
	}
	c.User = cmp.Or(s.User, c.User)
	c.WorkingDir = cmp.Or(s.WorkDir, c.WorkingDir)
	if len(c.Entrypoint)+len(c.Cmd) == 0 {
		return errors.New("it has neither an entrypoint nor a command: say what is to run")
	}
	volumes := slices.Sorted(maps.Keys(c.Volumes))
	c.Volumes = nil // the converter makes them empty file systems in memory, which hide what the image has there

	// The converter looks for users in files.
	accounts, err := os.MkdirTemp(b.tmp, "accounts-*")
	if err != nil {
		return err
	}
	defer os.RemoveAll(accounts)
	for _, name := range accountFiles {
		if n := b.rootfs().Find("/"+name, true); n != nil && n.Content.Size() > maxAccounts {
			return fmt.Errorf("%q has %d bytes, of which no more than %d are possible", name, n.Content.Size(), int64(maxAccounts))
		}
		text, err := b.rootfs().ReadFile("/" + name)
		if err != nil {
			continue // such an image has numbers alone
		}
		if err := errors.Join(os.MkdirAll(filepath.Join(accounts, "etc"), 0o700), os.WriteFile(filepath.Join(accounts, name), text, 0o600)); err != nil {
			return err
		}
	}
	spec := convert.Example()
	if err := convert.MutateRuntimeSpec(&spec, accounts, image); err != nil {
		return fmt.Errorf("configuration: %w", err)
	}
	spec.Hostname = ""          // the converter has one of its own
	for _, env := range c.Env { // an image that says where its home is knows better than its /etc/passwd
		if strings.HasPrefix(env, "HOME=") {
			spec.Process.Env = setEnv(spec.Process.Env, env)
		}
	}
	// As docker and podman have it: programs of an image may become another user's, and open many files.
	spec.Process.NoNewPrivileges = false
	spec.Process.Rlimits = []rspec.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 65_536, Hard: 524_288}}
	spec.Process.Capabilities = capabilities(spec.Process.User.UID == 0)
	b.Spec = &spec
	b.normalise()
	for _, dir := range append(volumes, spec.Process.Cwd) {
		if _, err := b.rootfs().MkdirAll(dir); err != nil {
			return err
		}
	}
	if s.Ready == "" {
		s.Ready = readyOf(c.ExposedPorts)
	}
	b.set(s)
	return nil
}

// readyOf is the default of an image that says on which ports it listens.
func readyOf(ports map[string]struct{}) string {
	var least int
	for port := range ports {
		var n int
		if _, err := fmt.Sscanf(port, "%d", &n); err == nil && !strings.HasSuffix(port, "/udp") && !strings.HasSuffix(port, "/sctp") && n > 0 && (least == 0 || n < least) {
			least = n
		}
	}
	if least == 0 {
		return ""
	}
	return fmt.Sprintf("port:%d", least)
}

// capabilities are what a container may: what docker and podman grant, which entrypoints of images count on.
func capabilities(root bool) *rspec.LinuxCapabilities {
	all := []string{
		"CAP_AUDIT_WRITE", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_MKNOD", "CAP_NET_BIND_SERVICE", "CAP_NET_RAW",
		"CAP_SETFCAP", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID", "CAP_SYS_CHROOT",
	}
	c := &rspec.LinuxCapabilities{Bounding: all}
	if root {
		c.Effective, c.Permitted = all, all
	}
	return c
}

// Set changes the bundle. What is to run, as whom and where, can only be said when a bundle is made of an image: it is refused here.
func (b *Bundle) Set(s Settings) error {
	if err := s.Check(); err != nil {
		return err
	}
	if s.Entrypoint != nil || s.Command != nil || s.User != "" || s.WorkDir != "" {
		return fmt.Errorf("a bundle is as its image was: edit process of its %s", bundle.ConfigFile)
	}
	b.set(s)
	return nil
}

func (b *Bundle) set(s Settings) {
	p := b.Spec.Process
	for _, env := range s.Env {
		p.Env = setEnv(p.Env, env)
	}
	if s.Hostname != "" {
		b.Spec.Hostname = s.Hostname
	}
	if s.ReadOnly {
		b.Spec.Root.Readonly = true
	}
	for _, m := range s.Mounts {
		mount := rspec.Mount{Destination: path.Clean(m.Target), Options: []string{"nosuid", "nodev"}}
		switch m.Type {
		case VolumeMount:
			mount.Type, mount.Source = "ext4", "LABEL="+m.Source
		case TmpfsMount:
			mount.Type, mount.Source = "tmpfs", "tmpfs"
			if m.Size > 0 {
				mount.Options = append(mount.Options, fmt.Sprintf("size=%d", m.Size))
			}
		case BindMount:
			mount.Type, mount.Source, mount.Options = "bind", m.Source, []string{"rbind", "rprivate"}
		}
		if m.ReadOnly {
			mount.Options = append(mount.Options, "ro")
		}
		b.Spec.Mounts = slices.DeleteFunc(b.Spec.Mounts, func(o rspec.Mount) bool { return path.Clean(o.Destination) == mount.Destination })
		b.Spec.Mounts = append(b.Spec.Mounts, mount)
	}
	for name, value := range map[string]string{bundle.NameAnnotation: s.Name, bundle.RestartAnnotation: s.Restart, bundle.ReadyAnnotation: s.Ready} {
		if value != "" {
			if b.Spec.Annotations == nil {
				b.Spec.Annotations = make(map[string]string)
			}
			b.Spec.Annotations[name] = value
		}
	}
}

// setEnv sets one variable.
func setEnv(list []string, env string) []string {
	name, _, _ := strings.Cut(env, "=")
	for i, e := range list {
		if strings.HasPrefix(e, name+"=") {
			list[i] = env
			return list
		}
	}
	return append(list, env)
}

// podmanFolders hold what podman makes for a container of its own host, and mounts there.
var podmanFolders = regexp.MustCompile(`^(/run/containers/|/var/lib/containers/|/run/user/[0-9]+/|/home/[^/]+/\.local/share/containers/|/root/\.local/share/containers/)`)

// normalise takes from config.json what belongs to the host that it was made for: a machine of its own is no place for it.
func (b *Bundle) normalise() {
	s := b.Spec
	s.Version = bundle.SpecVersion
	s.Root.Path = bundle.RootFolder
	s.Hooks = nil
	if s.Process != nil {
		s.Process.Terminal, s.Process.ConsoleSize, s.Process.ApparmorProfile, s.Process.SelinuxLabel, s.Process.OOMScoreAdj = false, nil, "", "", nil
	}
	if s.Linux != nil {
		// The guest's network is the container's, its users are the guest's.
		s.Linux.Namespaces = slices.DeleteFunc(s.Linux.Namespaces, func(n rspec.LinuxNamespace) bool {
			return n.Type == rspec.NetworkNamespace || n.Type == rspec.UserNamespace
		})
		for i := range s.Linux.Namespaces {
			s.Linux.Namespaces[i].Path = ""
		}
		s.Linux.UIDMappings, s.Linux.GIDMappings, s.Linux.CgroupsPath, s.Linux.MountLabel = nil, nil, "", ""
	}
	var mounts []rspec.Mount
	for _, m := range s.Mounts {
		switch {
		case m.Destination == "/dev/shm" && podmanFolders.MatchString(m.Source):
			m = rspec.Mount{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"nosuid", "noexec", "nodev", "mode=1777", "size=67108864"}}
		case podmanFolders.MatchString(m.Source) && slices.Contains([]string{"/etc/hosts", "/etc/resolv.conf", "/etc/hostname", "/run/.containerenv", "/run/secrets", "/dev/pts", "/dev/mqueue"}, m.Destination):
			continue // the guest has its own
		case m.Type == "bind" && m.Destination == "/sys" || m.Type == "bind" && m.Destination == "/proc":
			m.Type, m.Source, m.Options = strings.TrimPrefix(m.Destination, "/"), strings.TrimPrefix(m.Destination, "/"), []string{"nosuid", "noexec", "nodev"}
			if m.Type == "sys" {
				m.Type, m.Source = "sysfs", "sysfs"
			}
		}
		mounts = append(mounts, m)
	}
	s.Mounts = mounts
	for name := range s.Annotations {
		if strings.HasPrefix(name, "io.podman.") || strings.HasPrefix(name, "io.container.manager") || strings.HasPrefix(name, "run.oci.") {
			delete(s.Annotations, name)
		}
	}
}

// checkMounts refuses what the guest cannot have: folders of the host that made the bundle.
func (b *Bundle) checkMounts() error {
	for _, m := range b.Spec.Mounts {
		if podmanFolders.MatchString(m.Source) {
			return fmt.Errorf("mount at %q is of %q of the host, which the guest has not: put its content into %s, or mount a volume there", m.Destination, m.Source, bundle.RootFolder)
		}
	}
	return nil
}

// rootfs is the root file system, as a tree of its own.
func (b *Bundle) rootfs() *filetree.Tree {
	return &filetree.Tree{Root: b.tree.Find(rootPath, false), Spool: b.tree.Spool}
}

// SpecText is config.json.
func (b *Bundle) SpecText() ([]byte, error) {
	text, err := json.MarshalIndent(b.Spec, "", "\t")
	if err != nil {
		return nil, fmt.Errorf("encode %s: %w", bundle.ConfigFile, err)
	}
	return append(text, '\n'), nil
}
