package supervise

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/drafter-vm/drafter/pkg/oci/bundle"
	"golang.org/x/sys/unix"
)

// maxConfig bounds a config.json. Those of podman, with a profile of seccomp, have some 100 KiB.
const maxConfig = 4 << 20

// stopSignalAnnotation is where the image specification has the signal by which an image wants to be ended, when its configuration is made a runtime's.
const stopSignalAnnotation = "org.opencontainers.image.stopSignal"

// config is what this package reads of config.json. What it writes is made from all of it, so that nothing is lost that is not here.
type config struct {
	Version     string `json:"ociVersion"`
	Hostname    string
	Annotations map[string]string
	Process     *struct {
		Args            []string
		Cwd             string
		Env             []string
		OOMScoreAdj     *int
		ApparmorProfile string
		SelinuxLabel    string
	}
	Mounts []mount
	Hooks  map[string][]struct{ Path string }
	Linux  struct {
		Namespaces               []struct{ Type, Path string }
		UIDMappings, GIDMappings []struct{ ContainerID, HostID, Size uint32 }
		Sysctl                   map[string]string
	}
}

type mount struct {
	Destination, Type, Source string
	Options                   []string
}

// readConfig reads a config.json and checks of it what this package needs. The object is all of it.
func readConfig(path string) (*config, map[string]any, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0) // what is no file is refused, and does not block
	if err != nil {
		return nil, nil, fmt.Errorf("open config.json: %w", err)
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxConfig+1))
	if err != nil {
		return nil, nil, fmt.Errorf("read config.json: %w", err)
	}
	if len(text) > maxConfig {
		return nil, nil, fmt.Errorf("read config.json: it has more than %d MiB", maxConfig>>20)
	}
	c, all := &config{}, map[string]any{}
	numbers := json.NewDecoder(bytes.NewReader(text))
	numbers.UseNumber() // a capability or a limit may be more than a float64 holds exactly
	if err := errors.Join(json.Unmarshal(text, c), numbers.Decode(&all)); err != nil {
		return nil, nil, fmt.Errorf("read config.json: %w", err)
	}
	return c, all, c.check()
}

func (c *config) check() error {
	switch {
	case !strings.HasPrefix(c.Version, "1."):
		return fmt.Errorf("read config.json: ociVersion is %.20q, and must be 1.x", c.Version)
	case c.Process == nil || len(c.Process.Args) == 0 || c.Process.Args[0] == "":
		return errors.New("read config.json: process.args names no program")
	}
	for _, m := range c.Mounts {
		if m.Destination == "" {
			return fmt.Errorf("read config.json: the mount of %.100q has no destination", m.Source)
		}
	}
	return nil
}

// part is an object in an object, made if it is not there. What is no object, readConfig has refused.
func part(all map[string]any, name string) map[string]any {
	if o, ok := all[name].(map[string]any); ok {
		return o
	}
	o := map[string]any{}
	all[name] = o
	return o
}

// place is what of the guest a container meets.
type place struct {
	run     string // the folder of this container, below /run: what it is shown is there
	etc     string // that of the guest
	cgroup  string // its control group
	root    string // its rootfs
	dir     string // where config.json is: relative sources are from there
	notify  bool   // it is to say that it is ready
	env     []string
	volumes *volumes
	log     *slog.Logger
	sysctl  func(name, value string) error
}

// shown are the files of the guest that a container sees. They are copies, each written in place: who replaces a file by another of its name, as the agent does with the host name of a clone,
// leaves a bind mount behind.
var shown = []string{"resolv.conf", "hosts", "hostname"}

// refresh writes the copies anew, where they differ. A container with a host name of its own keeps that.
func (p place) refresh(hostname string) error {
	dir := filepath.Join(p.run, "etc")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("copy files of /etc: %w", err)
	}
	for _, name := range shown {
		text, err := os.ReadFile(filepath.Join(p.etc, name))
		if name == "hostname" && hostname != "" {
			text, err = []byte(hostname+"\n"), nil
		}
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		to := filepath.Join(dir, name)
		if old, failed := os.ReadFile(to); err == nil && (failed != nil || !bytes.Equal(old, text)) {
			err = os.WriteFile(to, text, 0o644)
		}
		if err != nil {
			return fmt.Errorf("copy files of /etc: %w", err)
		}
	}
	return nil
}

// Where a container finds the socket of NOTIFY_SOCKET. It is a folder that is mounted, for a socket may be made anew.
const notifyFolder, notifyName = "/run/drafter", "notify"

// adapt makes of a config.json what the runtime is to run.
func (p place) adapt(ctx context.Context, c *config, all map[string]any) ([]byte, error) {
	all["ociVersion"] = bundle.SpecVersion
	process := part(all, "process")
	process["terminal"] = false
	delete(process, "consoleSize")
	if c.Process.Cwd == "" {
		process["cwd"] = "/"
	}
	if c.Process.OOMScoreAdj == nil {
		process["oomScoreAdj"] = 0 // not that of the supervisor, which is to be the last
	}
	env := p.env
	if p.notify {
		env = setEnvironment(env, "NOTIFY_SOCKET", filepath.Join(notifyFolder, notifyName))
	}
	if len(env) > 0 {
		process["env"] = env
	}
	if c.Process.ApparmorProfile != "" && !loaded("/sys/kernel/security/apparmor/profiles", c.Process.ApparmorProfile) {
		delete(process, "apparmorProfile")
	}
	if _, err := os.Stat("/sys/fs/selinux/enforce"); err != nil {
		delete(process, "selinuxLabel")
		delete(part(all, "linux"), "mountLabel")
	}
	part(all, "root")["path"] = p.root
	if err := p.namespaces(c, all); err != nil {
		return nil, err
	}
	p.hooks(c, all)
	mounts, err := p.mounts(ctx, c, all)
	if err != nil {
		return nil, err
	}
	all["mounts"] = mounts
	text, err := json.Marshal(all)
	if err != nil {
		return nil, fmt.Errorf("write config.json: %w", err)
	}
	return text, nil
}

// loaded reports whether a list of profiles, "name (mode)" each, has one.
func loaded(path, profile string) bool {
	for line := range lines(path) {
		if name, _, _ := strings.Cut(line, " ("); name == profile {
			return true
		}
	}
	return false
}

// namespaces leaves a container those that part it from others in the same guest, and no network but that of the guest.
func (p place) namespaces(c *config, all map[string]any) error {
	linux := part(all, "linux")
	linux["cgroupsPath"] = p.cgroup
	has := map[string]bool{}
	list := []any{}
	add := func(kind string) {
		if !has[kind] {
			has[kind] = true
			list = append(list, map[string]any{"type": kind})
		}
	}
	for _, n := range c.Linux.Namespaces { // without its path: no process of another machine is here
		switch n.Type {
		case "network":
		case "uts":
			if c.Hostname != "" {
				add(n.Type)
			}
		case "user":
			if p.holdsIDs(c) {
				add(n.Type)
			} else {
				p.log.Info("the files of a container do not have the ids of its user namespace, which is left out")
			}
		default:
			add(n.Type)
		}
	}
	if len(c.Linux.Namespaces) == 0 {
		add("pid")
		add("ipc")
	}
	add("mount")
	if c.Hostname != "" {
		add("uts")
	}
	linux["namespaces"] = list
	if !has["user"] {
		delete(linux, "uidMappings")
		delete(linux, "gidMappings")
	}
	sysctl := part(linux, "sysctl")
	for name, value := range c.Linux.Sysctl {
		switch {
		case strings.HasPrefix(name, "net."): // the container's network is the guest's
			if err := p.sysctl(name, value); err != nil {
				p.log.Warn("a setting of the network that a container asks for cannot be made", "setting", name, "error", err)
			}
			delete(sysctl, name)
		case !has["uts"] && (name == "kernel.hostname" || name == "kernel.domainname"):
			delete(sysctl, name)
		}
	}
	if len(sysctl) == 0 {
		delete(linux, "sysctl")
	}
	return nil
}

// holdsIDs reports whether the container's files have the ids that its user namespace maps its root to.
func (p place) holdsIDs(c *config) bool {
	info, err := os.Stat(p.root)
	if err != nil {
		return false
	}
	for _, m := range c.Linux.UIDMappings {
		if m.ContainerID == 0 && m.Size > 0 && m.HostID != 0 {
			return info.Sys().(*syscall.Stat_t).Uid == m.HostID
		}
	}
	return false
}

// hooks leaves out those whose program is not here: they are of the machine that the bundle was made on.
func (p place) hooks(c *config, all map[string]any) {
	for kind, hooks := range c.Hooks {
		list, _ := part(all, "hooks")[kind].([]any)
		kept := []any{}
		for n, h := range hooks {
			path := h.Path
			if kind == "startContainer" { // it is of the container's files
				path = filepath.Join(p.root, path)
			}
			if _, err := os.Stat(path); err == nil && n < len(list) {
				kept = append(kept, list[n])
			} else {
				p.log.Warn("a hook of a container is left out, as its program is not here", "hook", kind, "path", h.Path)
			}
		}
		part(all, "hooks")[kind] = kept
	}
}

// mounts are those of the configuration as they can be made here, and those of the guest.
func (p place) mounts(ctx context.Context, c *config, all map[string]any) ([]any, error) {
	given, _ := all["mounts"].([]any)
	list := []any{}
	has := map[string]bool{}
	bind := func(source, destination string, options ...any) map[string]any {
		return map[string]any{"destination": destination, "type": "bind", "source": source, "options": append([]any{"rbind"}, options...)}
	}
	if len(given) != len(c.Mounts) {
		return nil, errors.New("read config.json: it has mounts twice, in different letters")
	}
	for n, m := range c.Mounts {
		one, ok := given[n].(map[string]any)
		if !ok {
			return nil, fmt.Errorf("read config.json: mount %d is no object", n)
		}
		to := filepath.Clean(m.Destination)
		if strings.HasPrefix(m.Source, "LABEL=") || strings.HasPrefix(m.Source, "UUID=") {
			volume, err := p.volume(ctx, m)
			if err != nil {
				return nil, err
			}
			list, has[to] = append(list, volume), true
			continue
		}
		if m.Type == "bind" || slices.Contains(m.Options, "bind") || slices.Contains(m.Options, "rbind") {
			source := m.Source
			if !filepath.IsAbs(source) {
				source = filepath.Join(p.dir, source)
				one["source"] = source
			}
			_, err := os.Stat(source)
			switch {
			case slices.ContainsFunc(shown, func(name string) bool { return to == "/etc/"+name && (err != nil || source == to) }):
				continue // those of the guest, below
			case err != nil && to == "/dev/shm":
				one = map[string]any{"destination": to, "type": "tmpfs", "source": "shm", "options": []any{"nosuid", "noexec", "nodev", "mode=1777", "size=65536k"}}
			case err != nil:
				p.log.Warn("a mount of a container is left out, as its source is not here", "path", m.Source, "destination", m.Destination)
				continue
			}
		}
		list, has[to] = append(list, one), true
	}
	for _, name := range shown {
		source, to := filepath.Join(p.run, "etc", name), "/etc/"+name
		if _, err := os.Stat(source); err == nil && !has[to] && !has["/etc"] {
			list = append(list, bind(source, to, "rw"))
		}
	}
	if p.notify {
		list = append(list, bind(filepath.Join(p.run, "notify"), notifyFolder, "ro"))
	}
	return list, nil
}

// ofMounts are options that a bind mount can have, too. Others are the file system's.
var ofMounts = []string{"ro", "rw", "suid", "nosuid", "dev", "nodev", "exec", "noexec", "atime", "noatime", "relatime", "diratime", "nodiratime", "private", "rprivate", "slave", "rslave", "shared", "rshared"}

// volume is the mount of a file system of another disk.
func (p place) volume(ctx context.Context, m mount) (map[string]any, error) {
	options, data := []any{"rbind"}, []string(nil)
	for _, o := range m.Options {
		switch {
		case o == "bind" || o == "rbind" || o == "defaults":
		case slices.Contains(ofMounts, o):
			options = append(options, o)
		default:
			data = append(data, o)
		}
	}
	dir, err := p.volumes.open(ctx, m.Source, 0, strings.Join(data, ","))
	if err != nil {
		return nil, err
	}
	return map[string]any{"destination": m.Destination, "type": "bind", "source": dir, "options": options}, nil
}

// makeDev makes the folder of devices, which an image of one program may not have. The runtime makes what else is missing for a mount.
func (p place) makeDev() error {
	err := os.Mkdir(filepath.Join(p.root, "dev"), 0o755) // a link stays one
	if err != nil && !errors.Is(err, os.ErrExist) {
		return fmt.Errorf("make /dev in the container: %w", err)
	}
	return nil
}

// setSysctl makes a setting of this kernel.
func setSysctl(name, value string) error {
	if strings.Contains(name, "/") || strings.Contains(name, "..") {
		return fmt.Errorf("setting %q is none", name)
	}
	return os.WriteFile(filepath.Join("/proc/sys", strings.ReplaceAll(name, ".", "/")), []byte(value), 0o644)
}
