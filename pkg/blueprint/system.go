package blueprint

import (
	"archive/tar"
	"cmp"
	"context"
	"crypto/md5"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"net"
	"net/netip"
	"path"
	"slices"
	"strings"

	"github.com/GehirnInc/crypt/sha512_crypt"
	"github.com/drafter-vm/drafter/pkg/filetree"
)

// basePackages complete the essential packages of a release to a small Debian that boots by systemd. baseVersion is
// raised with every change of them, as it makes locks stale.
var basePackages = []string{"systemd-sysv", "udev", "kmod", "iproute2", "iputils-ping", "procps", "apt", "e2fsprogs", "libpam-runtime", "passwd", "mount", "login", "usr-is-merged"}

const baseVersion = "base-2"

// keepPath tells which files of packages go on the disk: no documentation but licences, no translations. dpkg in the
// guest is told the same.
func keepPath(p string) bool {
	for _, dir := range []string{"/usr/share/doc/", "/usr/share/man/", "/usr/share/info/", "/usr/share/locale/", "/usr/share/lintian/", "/usr/share/bug/"} {
		if rest, ok := strings.CutPrefix(p, dir); ok {
			return dir == "/usr/share/doc/" && (path.Base(rest) == "copyright" || !strings.Contains(rest, "/")) || dir == "/usr/share/locale/" && rest == "locale.alias"
		}
	}
	return true
}

const dpkgExcludes = `# Left out of the disk, as the blueprint left it out; remove this file and reinstall a package to have its manuals.
path-exclude=/usr/share/doc/*
path-include=/usr/share/doc/*/copyright
path-exclude=/usr/share/man/*
path-exclude=/usr/share/info/*
path-exclude=/usr/share/locale/*
path-include=/usr/share/locale/locale.alias
path-exclude=/usr/share/lintian/*
path-exclude=/usr/share/bug/*
`

// system puts the root file system together.
type system struct {
	*filetree.Tree
	cfg      *Config
	users    users
	warnings []string
}

// lay builds the whole root file system in the tree: packages, what their scripts do, and what makes it a guest.
func (s *system) lay(ctx context.Context, debs []*deb) error {
	for _, dir := range []string{"bin", "sbin", "lib", "lib64"} {
		if err := s.Mkdir("/usr/"+dir, 0o755, 0, 0); err != nil {
			return err
		}
		if err := s.Symlink("usr/"+dir, "/"+dir); err != nil {
			return err
		}
	}
	// Before the packages: some still ship folders below the old names.
	for _, l := range [][2]string{{"/run", "/var/run"}, {"/run/lock", "/var/lock"}} {
		if err := s.Mkdir(l[0], 0o755, 0, 0); err != nil {
			return err
		}
		if err := s.Symlink(l[0], l[1]); err != nil {
			return err
		}
	}
	for _, d := range debs {
		if err := installDeb(s.Tree, d); err != nil {
			return err
		}
	}
	if err := s.users.seed(); err != nil {
		return err
	}
	if err := s.base(); err != nil {
		return err
	}
	unpacked, err := s.runScripts(ctx, debs)
	if err != nil {
		return err
	}
	if err := s.users.addSystemUsers(); err != nil {
		return err
	}
	for _, step := range []func() error{s.certificates, s.libraries, s.boot, s.network, s.guestServices, s.containers, s.extras, s.desktop} {
		if err := step(); err != nil {
			return err
		}
	}
	if len(unpacked) > 0 {
		if err := s.WriteFile("/lib/systemd/system/drafter-configure.service", configureUnit, 0o644); err != nil {
			return err
		}
		if err := enableUnit(s.Tree, "drafter-configure.service"); err != nil {
			return err
		}
	}
	return s.registerPackages(debs, unpacked)
}

// configureUnit finishes packages whose scripts could not be interpreted. It is over before the guest counts as alive, and
// so before a snapshot is taken.
const configureUnit = `[Unit]
Description=Configure packages that need the running guest
After=network.target local-fs.target
ConditionPathExists=!/var/lib/drafter/configured

[Service]
Type=oneshot
RemainAfterExit=yes
Environment=DEBIAN_FRONTEND=noninteractive HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
ExecStart=/usr/bin/dpkg --configure -a --force-confold
ExecStartPost=/bin/mkdir -p /var/lib/drafter/configured
TimeoutStartSec=infinity

[Install]
WantedBy=multi-user.target
`

// runScripts carries out the scripts of all packages, dependencies first, and returns the packages whose scripts failed.
func (s *system) runScripts(ctx context.Context, debs []*deb) (unpacked map[string]bool, err error) {
	runner := &scriptRunner{t: s.Tree, users: s.users, arch: s.cfg.Arch, debs: debs}
	unpacked = map[string]bool{}
	for _, script := range []struct{ name, arg string }{{"preinst", "install"}, {"postinst", "configure"}} {
		for _, d := range debs {
			if script.name == "preinst" && d.control.get("Essential") == "yes" {
				continue // they check the kernel and the transition from older releases
			}
			if err := runner.run(ctx, d, script.name, script.arg, ""); err != nil {
				if ctx.Err() != nil {
					return nil, ctx.Err()
				}
				unpacked[d.Name] = true
				s.warn("package %s will be configured when the guest boots for the first time: its %s needs the running guest (%v)", d.Name, script.name, err)
			}
		}
	}
	// Scripts leave these behind in /tmp and /run, which are empty at boot.
	for _, dir := range []string{"/tmp", "/run", "/var/tmp"} {
		if n := s.Find(dir, true); n != nil {
			clear(n.Children)
		}
	}
	return unpacked, nil
}

func (s *system) warn(format string, args ...any) {
	s.warnings = append(s.warnings, fmt.Sprintf(format, args...))
}

// file is a text file to write; lines of a table read better than calls.
type file struct {
	path, text string
	mode       uint32 // 0 means 0644
}

func (s *system) writeFiles(files []file) error {
	for _, f := range files {
		if err := s.WriteFile(f.path, f.text, cmp.Or(f.mode, 0o644)); err != nil {
			return err
		}
	}
	return nil
}

// base does what the scripts of the base packages would do with programs of their own.
func (s *system) base() error {
	for _, d := range []struct {
		path string
		mode uint32
		gid  int
	}{
		{"/dev", 0o755, 0}, {"/proc", 0o555, 0}, {"/sys", 0o555, 0}, {"/run", 0o755, 0}, {"/tmp", 0o1777, 0}, {"/var/tmp", 0o1777, 0}, {"/root", 0o700, 0},
		{"/home", 0o755, 0}, {"/mnt", 0o755, 0}, {"/media", 0o755, 0}, {"/srv", 0o755, 0}, {"/opt", 0o755, 0}, {"/usr/local/bin", 0o755, 0}, {"/usr/local/sbin", 0o755, 0},
		{"/usr/local/lib", 0o755, 0}, {"/usr/local/share", 0o755, 0}, {"/var/mail", 0o2775, 8}, {"/var/local", 0o2775, 50}, {"/var/opt", 0o755, 0}, {"/var/lib/misc", 0o755, 0},
		{"/var/log", 0o755, 0}, {"/var/cache/ldconfig", 0o700, 0}, {"/etc/opt", 0o755, 0},
	} {
		if err := s.Mkdir(d.path, d.mode, 0, d.gid); err != nil {
			return err
		}
	}
	for _, template := range [][2]string{
		{"/usr/share/base-files/profile", "/etc/profile"}, {"/usr/share/base-files/motd", "/etc/motd"},
		{"/usr/share/base-files/dot.profile", "/root/.profile"}, {"/usr/share/base-files/dot.bashrc", "/root/.bashrc"},
		{"/usr/share/libc-bin/nsswitch.conf", "/etc/nsswitch.conf"}, {"/usr/share/base-files/nsswitch.conf", "/etc/nsswitch.conf"}, // the first: trixie
	} {
		from, to := template[0], template[1]
		if text, err := s.ReadFile(from); err == nil && s.Find(to, false) == nil {
			if err := s.WriteFile(to, string(text), 0o644); err != nil {
				return err
			}
		}
	}
	pam := func(header, line string) string {
		return "# Static: pam-auth-update replaces it when libpam-runtime is reconfigured.\n" + header + line
	}
	const deny = "%[1]s\trequisite\tpam_deny.so\n%[1]s\trequired\tpam_permit.so\n"
	return s.writeFiles([]file{
		{path: "/etc/pam.d/common-auth", text: pam("auth\t[success=1 default=ignore]\tpam_unix.so nullok\n", fmt.Sprintf(deny, "auth"))},
		{path: "/etc/pam.d/common-account", text: pam("account\t[success=1 new_authtok_reqd=done default=ignore]\tpam_unix.so\n", fmt.Sprintf(deny, "account"))},
		{path: "/etc/pam.d/common-password", text: pam("password\t[success=1 default=ignore]\tpam_unix.so obscure yescrypt\n", fmt.Sprintf(deny, "password"))},
		{path: "/etc/pam.d/common-session", text: pam("session\trequired\tpam_unix.so\n", "")},
		{path: "/etc/pam.d/common-session-noninteractive", text: pam("session\trequired\tpam_unix.so\n", "")},
		{path: "/etc/environment"},
		{path: "/etc/default/locale", text: "LANG=C.UTF-8\n"},
		{path: "/etc/machine-id"}, // empty: made at boot, never the same in two guests that were booted
		{path: "/etc/dpkg/dpkg.cfg.d/drafter", text: dpkgExcludes},
		{path: "/etc/ld.so.conf", text: "include /etc/ld.so.conf.d/*.conf\n"},
		{path: "/etc/shells", text: "# /etc/shells: valid login shells\n/bin/sh\n/usr/bin/sh\n/bin/bash\n/usr/bin/bash\n/bin/rbash\n/usr/bin/rbash\n/bin/dash\n/usr/bin/dash\n"},
		{path: "/var/lib/dpkg/available"}, {path: "/var/lib/dpkg/diversions"},
		{path: "/var/lib/dpkg/info/format", text: "1\n"},
		{path: "/etc/apt/sources.list", text: s.aptSources()},
	})
}

// certificates bundles the authorities that package ca-certificates brings, for programs that read the bundle; its
// script, which also makes openssl's links, runs at the first boot.
func (s *system) certificates() error {
	var bundle strings.Builder
	if err := s.Each("/usr/share/ca-certificates", func(p string, n *filetree.Node) error {
		if n.Type == tar.TypeReg && path.Ext(p) == ".crt" {
			return n.Content.CopyTo(&bundle)
		}
		return nil
	}); err != nil || bundle.Len() == 0 {
		return err
	}
	return s.WriteFile("/etc/ssl/certs/ca-certificates.crt", bundle.String(), 0o644)
}

// libraries sees to libraries outside the loader's own folders, which it finds only by a cache that ldconfig makes.
// That is made at the first boot, if a package needs it.
func (s *system) libraries() error {
	needed := false
	if err := s.Each("/etc/ld.so.conf.d", func(p string, _ *filetree.Node) error {
		if name := path.Base(p); name != "libc.conf" && name != "x86_64-linux-gnu.conf" {
			needed = true
		}
		return nil
	}); err != nil || !needed {
		return err
	}
	if err := s.WriteFile("/lib/systemd/system/drafter-ldconfig.service", ldconfigUnit, 0o644); err != nil {
		return err
	}
	return enableUnit(s.Tree, "drafter-ldconfig.service")
}

const ldconfigUnit = `[Unit]
Description=Index shared libraries
DefaultDependencies=no
Conflicts=shutdown.target
Before=shutdown.target sysinit.target
ConditionPathExists=!/etc/ld.so.cache

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/sbin/ldconfig

[Install]
WantedBy=sysinit.target
`

// aptSources lets apt in the guest go on from where the blueprint was taken.
func (s *system) aptSources() string {
	var b strings.Builder
	for _, src := range completeSources(mirrorSources(s.cfg.Mirror, s.cfg.Suite), s.cfg.Suite) {
		fmt.Fprintf(&b, "deb %s %s main\n", src.URI, src.Suite)
	}
	return b.String()
}

// password returns the shadow field for a root password: empty for none, as it is for a hash, else hashed (SHA-512).
func password(p string) (string, error) {
	if p == "" || strings.HasPrefix(p, "$") {
		return p, nil
	}
	// The salt comes from the password, for the build to be reproducible.
	sum := sha256.Sum256([]byte("drafter root password salt\x00" + p))
	salt := strings.NewReplacer("+", ".", "=", "").Replace(base64.StdEncoding.EncodeToString(sum[:12]))
	return sha512_crypt.New().Generate([]byte(p), []byte("$6$"+salt))
}

// masked are units that a virtual machine with one console and a fixed clock source has no use for. Each costs a process or a
// device scan at boot; the list was made by measuring (docs/decisions/0002-guest-init.md).
var masked = []string{
	"systemd-pcrphase.service", "systemd-pcrphase-sysinit.service", "systemd-journal-flush.service", "systemd-journal-catalog-update.service",
	"systemd-update-utmp.service", "systemd-update-utmp-runlevel.service", "systemd-hwdb-update.service", "systemd-update-done.service",
	"systemd-machine-id-commit.service", "systemd-pstore.service", "systemd-random-seed.service", "systemd-binfmt.service", "proc-sys-fs-binfmt_misc.automount",
	"systemd-firstboot.service", "systemd-sysusers.service", "systemd-repart.service", "systemd-boot-system-token.service", "systemd-logind.service",
	"dev-hugepages.mount", "dev-mqueue.mount", "sys-kernel-debug.mount", "sys-kernel-tracing.mount", "sys-kernel-config.mount", "sys-fs-fuse-connections.mount",
	"modprobe@configfs.service", "modprobe@drm.service", "modprobe@efi_pstore.service", "modprobe@fuse.service", "modprobe@loop.service", "modprobe@dm_mod.service",
	"getty-static.service", "getty@tty1.service", "systemd-remount-fs.service", "systemd-fsck-root.service", "e2scrub_reap.service",
	"systemd-tmpfiles-setup-dev.service", "systemd-ask-password-wall.path", "systemd-ask-password-console.path", "systemd-modules-load.service", "kmod-static-nodes.service",
	"apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer", "fstrim.timer", "systemd-rfkill.socket", "systemd-initctl.socket",
}

// unwanted are units that may start where something asks for them, but are not part of every boot.
var unwanted = []string{"cryptsetup.target", "integritysetup.target", "veritysetup.target", "remote-cryptsetup.target", "remote-veritysetup.target", "systemd-journald-audit.socket"}

// unwant takes a unit out of the targets that want it. (A unit that is only masked is looked up and loaded all the same.)
func (s *system) unwant(unit string) {
	for _, dir := range unitDirs {
		d := s.Find(dir, true)
		if d == nil {
			continue
		}
		for name, n := range d.Children {
			if n.Type == tar.TypeDir && (strings.HasSuffix(name, ".wants") || strings.HasSuffix(name, ".requires")) {
				delete(n.Children, unit)
			}
		}
	}
}

// maskedRules are udev's rules for what a guest has not (sound, cameras, tapes, mice): udevd reads all rules when it starts.
var maskedRules = []string{
	"60-autosuspend", "60-cdrom_id", "60-drm", "60-evdev", "60-fido-id", "60-infiniband", "60-input-id", "60-persistent-alsa", "60-persistent-input",
	"60-persistent-storage-tape", "60-persistent-v4l", "60-sensor", "64-btrfs", "70-camera", "70-joystick", "70-memory", "70-mouse", "70-power-switch",
	"70-touchpad", "75-probe_mtd", "78-sound-card", "81-net-dhcp", "90-iocost",
}

// maskedGenerators are programs that systemd runs before anything else, to make units of what a guest has not:
// encrypted disks, hibernation, partitions found by type, a console named on the kernel's command line.
var maskedGenerators = []string{
	"systemd-cryptsetup-generator", "systemd-debug-generator", "systemd-gpt-auto-generator", "systemd-hibernate-resume-generator",
	"systemd-integritysetup-generator", "systemd-run-generator", "systemd-system-update-generator", "systemd-veritysetup-generator",
	"systemd-bless-boot-generator", "systemd-getty-generator",
}

// maskSysV leaves out the generator that makes units of init scripts where every script has a unit already.
func (s *system) maskSysV() error {
	needed := false
	err := s.Each("/etc/init.d", func(p string, n *filetree.Node) error {
		if n.Type == tar.TypeReg && n.Mode&0o111 != 0 && findUnit(s.Tree, path.Base(p)+".service") == "" && !slices.Contains(plainInitScripts, path.Base(p)) {
			needed = true
		}
		return nil
	})
	if err != nil || needed {
		return err
	}
	return s.Symlink("/dev/null", "/etc/systemd/system-generators/systemd-sysv-generator")
}

// plainInitScripts are scripts of base packages that systemd has units of another name for.
var plainInitScripts = []string{"hwclock.sh", "procps", "udev", "kmod"}

const consoleUnit = `[Unit]
Description=Login on the serial console
After=systemd-user-sessions.service
Before=getty.target
ConditionPathExists=/dev/%I

[Service]
ExecStart=-/sbin/agetty -o '-p -- \\u' --noclear --keep-baud 115200,57600,38400,9600 %I vt220
Type=idle
Restart=always
RestartSec=0
UtmpIdentifier=%I
TTYPath=/dev/%I
TTYReset=yes
TTYVHangup=yes
IgnoreSIGPIPE=no
SendSIGHUP=yes

[Install]
WantedBy=getty.target
`

// boot makes the system start fast and log in on the serial console.
func (s *system) boot() error {
	for _, unit := range slices.Concat(masked, unwanted) {
		s.unwant(unit)
	}
	for _, unit := range masked {
		if err := maskUnit(s.Tree, unit); err != nil {
			return err
		}
	}
	for _, generator := range maskedGenerators {
		if err := s.Symlink("/dev/null", "/etc/systemd/system-generators/"+generator); err != nil {
			return err
		}
	}
	for _, rule := range maskedRules {
		if err := s.Symlink("/dev/null", "/etc/udev/rules.d/"+rule+".rules"); err != nil {
			return err
		}
	}
	if err := s.maskSysV(); err != nil {
		return err
	}
	for _, group := range []string{"input", "sgx", "kvm", "render"} { // of udev's rules
		if _, err := s.users.addGroup(group, -1, false); err != nil {
			return err
		}
	}
	hash, err := password(s.cfg.RootPassword)
	if err != nil {
		return fmt.Errorf("hash root password: %w", err)
	}
	if err := s.users.setPassword("root", hash); err != nil {
		return err
	}
	if err := s.Symlink("/lib/systemd/system/multi-user.target", "/etc/systemd/system/default.target"); err != nil {
		return err
	}
	// Without a .link policy interfaces keep the kernel's names: eth0.
	if err := s.Symlink("/dev/null", "/etc/systemd/network/99-default.link"); err != nil {
		return err
	}
	if err := s.writeFiles([]file{
		{path: "/etc/hostname", text: s.cfg.Hostname + "\n"},
		{path: "/etc/hosts", text: fmt.Sprintf("127.0.0.1\tlocalhost\n127.0.1.1\t%s\n::1\tlocalhost ip6-localhost ip6-loopback\n", s.cfg.Hostname)},
		{path: "/etc/systemd/journald.conf.d/drafter.conf", text: "# In memory: no writes to the disk that a migration would have to move.\n[Journal]\nStorage=volatile\nRuntimeMaxUse=16M\n"},
		{path: "/etc/systemd/system.conf.d/drafter.conf", text: "[Manager]\nDefaultTimeoutStopSec=10s\nShowStatus=no\n"},
		// As systemd's own, but it does not wait for udev to tell of the port.
		{path: "/etc/systemd/system/serial-getty@ttyS0.service", text: consoleUnit},
		// Only what can be of use to a guest is announced to udev at boot; devices that come later are as ever.
		{path: "/etc/systemd/system/systemd-udev-trigger.service.d/drafter.conf", text: "[Service]\nExecStart=\n" +
			"ExecStart=-udevadm trigger --type=devices --action=add --subsystem-match=block --subsystem-match=virtio-ports --subsystem-match=net\n"},
	}); err != nil {
		return err
	}
	return enableUnit(s.Tree, "serial-getty@ttyS0.service")
}

// network gives the guest the fixed address that its place in the network is built around.
func (s *system) network() error {
	n := s.cfg.Network
	var conf strings.Builder
	conf.WriteString("# The address inside is the same wherever the guest runs. Read by /usr/lib/drafter/network.\n")
	// Values of type netip cannot hold what a shell would take amiss.
	fmt.Fprintf(&conf, "MAC=%s\n", strings.ToLower(n.MAC.String()))
	for _, v := range []struct {
		key   string
		value interface {
			String() string
			IsValid() bool
		}
	}{{"ADDRESS4", n.Address4}, {"GATEWAY4", n.Gateway4}, {"ADDRESS6", n.Address6}, {"GATEWAY6", n.Gateway6}} {
		value := ""
		if v.value.IsValid() {
			value = v.value.String()
		}
		fmt.Fprintf(&conf, "%s=%s\n", v.key, value)
	}
	var resolv strings.Builder
	for _, a := range n.Nameservers {
		fmt.Fprintf(&resolv, "nameserver %s\n", a)
	}
	if err := s.writeFiles([]file{
		{path: "/etc/drafter/network.conf", text: conf.String()},
		{path: "/etc/resolv.conf", text: resolv.String()},
		{path: "/usr/lib/drafter/network", text: networkScript, mode: 0o755},
		{path: "/lib/systemd/system/drafter-network.service", text: networkUnit},
	}); err != nil {
		return err
	}
	return enableUnit(s.Tree, "drafter-network.service")
}

const networkScript = `#!/bin/sh
# Set the address of the guest's interface: the one with the MAC of network.conf, or the only one.
set -eu
. /etc/drafter/network.conf
nic=
count=0
for dir in /sys/class/net/*; do
	name=${dir##*/}
	[ "$name" != lo ] && [ -e "$dir/device" ] || continue
	count=$((count + 1))
	read -r mac < "$dir/address"
	if [ "$mac" = "$MAC" ]; then
		nic=$name
		break
	fi
	first=${first:-$name}
done
if [ -z "$nic" ] && [ "$count" = 1 ]; then
	nic=$first
fi
if [ -z "$nic" ]; then
	echo "no interface with the address $MAC, $count others" >&2
	exit 0
fi
# No duplicate address detection: the address is ours, and after a move it must work at once.
if [ -d "/proc/sys/net/ipv6/conf/$nic" ]; then
	for setting in accept_dad=0 dad_transmits=0 accept_ra=0; do
		echo "${setting#*=}" > "/proc/sys/net/ipv6/conf/$nic/${setting%=*}"
	done
else
	ADDRESS6= GATEWAY6=
fi
{
	echo "link set dev lo up"
	echo "link set dev $nic up"
	[ -z "$ADDRESS4" ] || echo "address replace $ADDRESS4 dev $nic"
	[ -z "$ADDRESS6" ] || echo "address replace $ADDRESS6 dev $nic nodad"
	[ -z "$GATEWAY4" ] || echo "route replace default via $GATEWAY4 dev $nic"
	[ -z "$GATEWAY6" ] || echo "route replace default via $GATEWAY6 dev $nic"
} | ip -force -batch -
`

const networkUnit = `[Unit]
Description=Fixed network address of a Drafter guest
DefaultDependencies=no
Conflicts=shutdown.target
Before=shutdown.target network.target network-online.target
Wants=network.target
ConditionPathExists=/etc/drafter/network.conf

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/lib/drafter/network

[Install]
WantedBy=sysinit.target network-online.target
`

// guestServices installs the guest's side of Drafter, and opens the known servers to the network.
func (s *system) guestServices() error {
	agent, err := s.spoolHostFile(s.cfg.Agent)
	if err != nil {
		return err
	}
	if err := s.Put("/usr/bin/drafter-agent", &filetree.Node{Type: tar.TypeReg, Mode: 0o755, Content: agent}); err != nil {
		return err
	}
	if err := s.Symlink("drafter-agent", "/usr/bin/drafter-liveness"); err != nil {
		return err
	}
	for _, dir := range []string{"before-suspend.d", "after-resume.d"} {
		if err := s.Mkdir("/etc/drafter/"+dir, 0o755, 0, 0); err != nil {
			return err
		}
	}
	var mounts []string
	for _, line := range s.cfg.Fstab {
		mounts = append(mounts, mountUnit(strings.Fields(line)[1]))
	}
	if err := s.writeFiles([]file{
		// The channel is the device's, so its service is, too: a guest with vsock proper never starts it. The initrd makes
		// the link that the unit looks for; udev is for a device that comes later.
		{path: "/lib/udev/rules.d/90-drafter.rules", text: `SUBSYSTEM=="virtio-ports", ATTR{name}=="org.drafter.vsock", TAG+="systemd", ENV{SYSTEMD_WANTS}+="drafter-vsock.service"` + "\n"},
		{path: "/lib/systemd/system/drafter-vsock.service", text: vsockUnit},
		{path: "/lib/systemd/system/drafter-agent.service", text: agentUnit},
		{path: "/lib/systemd/system/drafter-liveness.service", text: strings.Replace(livenessUnit, "@MOUNTS@", strings.Join(mounts, " "), 1)},
	}); err != nil {
		return err
	}
	for _, unit := range []string{"drafter-vsock.service", "drafter-agent.service", "drafter-liveness.service"} {
		if err := enableUnit(s.Tree, unit); err != nil {
			return err
		}
	}
	for _, o := range openServers {
		if findUnit(s.Tree, o.unit) == "" {
			continue
		}
		if err := s.WriteFile("/etc/systemd/system/"+o.unit+".d/drafter.conf", "# The guest's network is its own: listen on all of its addresses.\n"+o.dropIn, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// openServers are servers that listen on loopback alone, or ask for a password, unless told otherwise.
var openServers = []struct{ unit, dropIn string }{
	{"valkey-server.service", "[Service]\nExecStart=\nExecStart=/usr/bin/valkey-server /etc/valkey/valkey.conf --supervised systemd --daemonize no --bind * -::* --protected-mode no\n"},
	{"redis-server.service", "[Service]\nExecStart=\nExecStart=/usr/bin/redis-server /etc/redis/redis.conf --supervised systemd --daemonize no --bind * -::* --protected-mode no\n"},
}

const vsockUnit = `[Unit]
Description=Guest sockets of Drafter over virtio-serial
DefaultDependencies=no
Conflicts=shutdown.target
Before=shutdown.target drafter-agent.service drafter-liveness.service
ConditionPathExists=/dev/virtio-ports/org.drafter.vsock
StartLimitIntervalSec=0

[Service]
ExecStart=/usr/bin/drafter-agent vsock
Restart=always
RestartSec=200ms
OOMScoreAdjust=-900

[Install]
WantedBy=sysinit.target
`

const agentUnit = `[Unit]
Description=Drafter agent: hears of suspend and resume
DefaultDependencies=no
Conflicts=shutdown.target
Before=shutdown.target
After=sysinit.target drafter-vsock.service
StartLimitIntervalSec=0

[Service]
ExecStart=/usr/bin/drafter-agent agent --before-suspend-dir /etc/drafter/before-suspend.d --after-resume-dir /etc/drafter/after-resume.d
Restart=always
RestartSec=200ms
OOMScoreAdjust=-900

[Install]
WantedBy=multi-user.target
`

const livenessUnit = `[Unit]
Description=Drafter liveness: says that the guest's services are up
After=multi-user.target drafter-agent.service drafter-vsock.service @MOUNTS@

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/bin/drafter-liveness
Restart=on-failure
RestartSec=1s

[Install]
WantedBy=multi-user.target
`

// mountUnit is the name systemd gives the mount of a path (systemd-escape --path).
func mountUnit(p string) string {
	var b strings.Builder
	for i, c := range []byte(strings.Trim(path.Clean(p), "/")) {
		switch {
		case c == '/':
			b.WriteByte('-')
		case c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '_' || c == ':' || c == '.' && i > 0:
			b.WriteByte(c)
		default:
			fmt.Fprintf(&b, `\x%02x`, c)
		}
	}
	if b.Len() == 0 {
		return "-.mount"
	}
	return b.String() + ".mount"
}

// extras are the caller's own units, scripts, files and mounts.
func (s *system) extras() error {
	for _, c := range s.cfg.Copies {
		if err := s.copyFromHost(c.Host, c.Guest); err != nil {
			return err
		}
	}
	for _, u := range s.cfg.Units {
		if err := s.copyFromHost(u, "/etc/systemd/system/"+path.Base(u)); err != nil {
			return err
		}
		s.Find("/etc/systemd/system/"+path.Base(u), true).Mode = 0o644
	}
	for _, u := range s.cfg.Units {
		if err := enableUnit(s.Tree, path.Base(u)); err != nil {
			return err
		}
	}
	for _, script := range s.cfg.Scripts {
		name := path.Base(script)
		inside := "/usr/lib/drafter/scripts/" + name
		if err := s.copyFromHost(script, inside); err != nil {
			return err
		}
		s.Find(inside, true).Mode = 0o755
		unit := "drafter-script-" + strings.TrimSuffix(mountUnit(name), ".mount") + ".service"
		if err := s.WriteFile("/etc/systemd/system/"+unit, fmt.Sprintf("[Unit]\nDescription=Script %s of the blueprint\nAfter=network.target local-fs.target\n\n[Service]\nType=oneshot\n"+
			"RemainAfterExit=yes\nExecStart=%s\nStandardOutput=journal+console\nStandardError=journal+console\n\n[Install]\nWantedBy=multi-user.target\n", strings.ReplaceAll(name, "%", "%%"), strings.ReplaceAll(inside, "%", "%%")), 0o644); err != nil {
			return err
		}
		if err := enableUnit(s.Tree, unit); err != nil {
			return err
		}
	}
	fstab := "# The root file system is mounted by the initrd.\n"
	for _, line := range s.cfg.Fstab {
		f := strings.Fields(line)
		// A disk that is not there must not stop the boot, nor hold it up for long. But one that is there must be mounted
		// when the guest counts as alive, as what a snapshot finds unmounted stays so, and an emulated guest may need many
		// seconds until udev runs.
		for _, option := range []string{"nofail", "x-systemd.device-timeout=20s"} {
			if name, _, _ := strings.Cut(option, "="); !slices.ContainsFunc(strings.Split(f[3], ","), func(o string) bool { return o == option || strings.HasPrefix(o, name+"=") }) {
				f[3] += "," + option
			}
		}
		fstab += strings.Join(f, "\t") + "\n"
		if _, err := s.MkdirAll(f[1]); err != nil {
			return fmt.Errorf("make mount point: %w", err)
		}
	}
	return s.WriteFile("/etc/fstab", fstab, 0o644)
}

// registerPackages writes dpkg's database, so that dpkg and apt work in the guest.
func (s *system) registerPackages(debs []*deb, unpacked map[string]bool) error {
	var status strings.Builder
	for _, d := range slices.SortedFunc(slices.Values(debs), func(a, b *deb) int { return strings.Compare(a.Name, b.Name) }) {
		state := "installed"
		if unpacked[d.Name] {
			state = "unpacked"
		}
		name, rest, _ := strings.Cut(strings.TrimRight(string(d.control), "\n"), "\n")
		fmt.Fprintf(&status, "%s\nStatus: install ok %s\n%s\n", name, state, rest)
		if conffiles := d.scripts["conffiles"]; len(conffiles) > 0 {
			status.WriteString("Conffiles:\n")
			for line := range strings.Lines(string(conffiles)) {
				p := strings.TrimSpace(line)
				if !strings.HasPrefix(p, "/") { // "remove-on-upgrade /path"
					continue
				}
				i := slices.IndexFunc(d.files, func(f debFile) bool { return f.path == p })
				if i < 0 || d.files[i].node == nil || d.files[i].node.Type != tar.TypeReg {
					continue
				}
				h := md5.New() // what dpkg knows configuration files by
				if err := d.files[i].node.Content.CopyTo(h); err != nil {
					return err
				}
				fmt.Fprintf(&status, " %s %s\n", p, hex.EncodeToString(h.Sum(nil)))
			}
		}
		status.WriteString("\n")

		prefix := "/var/lib/dpkg/info/" + d.Name
		if d.control.get("Multi-Arch") == "same" {
			prefix += ":" + d.Arch
		}
		list := "/.\n"
		for _, f := range d.files {
			list += f.path + "\n"
		}
		if err := s.WriteFile(prefix+".list", list, 0o644); err != nil {
			return err
		}
		for name, text := range d.scripts {
			if name == "control" || strings.Contains(name, "/") {
				continue
			}
			mode := uint32(0o644)
			if slices.Contains([]string{"preinst", "postinst", "prerm", "postrm", "config"}, name) {
				mode = 0o755
			}
			if err := s.WriteFile(prefix+"."+name, string(text), mode); err != nil {
				return err
			}
		}
	}
	return s.WriteFile("/var/lib/dpkg/status", status.String(), 0o644)
}

// NetworkConfig is the address the guest has on its interface, wherever it runs.
type NetworkConfig struct {
	MAC                net.HardwareAddr // default 02:0e:d9:fd:68:3d; a guest with one interface uses it whatever its address
	Address4, Address6 netip.Prefix     // default 172.16.0.2/30 and fd00:172:16::2/64
	Gateway4, Gateway6 netip.Addr       // default 172.16.0.1 and fd00:172:16::1
	Nameservers        []netip.Addr     // default 1.1.1.1 and 8.8.8.8
}
