package blueprint

import (
	"errors"
	"path"
	"slices"
	"strings"

	"pault.ag/go/debian/dependency"
)

// A desktop is a Wayland compositor without a screen (cage, on wlroots' headless backend), which gives all of its space to
// one program, and a server that shows it by VNC (wayvnc). No device is needed: the cloud kernel has neither DRM nor input
// devices. So the compositor paints with the processor (pixman; wlroots' OpenGL renderer needs a DRM node), and programs
// that want OpenGL have Mesa's llvmpipe, and hand what they painted over in shared memory.

// DefaultDesktop is the program of a desktop that needs no choice: a terminal.
const DefaultDesktop = "foot"

// desktopSuite is the default release of a guest with a desktop.
const desktopSuite = "trixie"

// desktopPackages are what a desktop is made of, beside its program. Fonts come with fontconfig, as do those programs that draw
// text. desktopVersion is raised with every change of what is chosen for a desktop, as it makes locks stale.
var desktopPackages = []string{"cage", "wayvnc", "libgl1-mesa-dri"}

const desktopVersion = "desktop-1"

// desktopDemands are what a desktop asks of them: an older cage shows a picture, but lets nobody type.
var desktopDemands = map[string][]demand{
	"cage": {{dependency.VersionRelation{Operator: ">=", Number: "0.1.5"}, "the desktop, whose keyboard is VNC; suite " + desktopSuite + " has it"}},
}

// desktopUser is whom the desktop's programs run as.
const desktopUser = "desktop"

// packages are those that are installed besides the minimal system, sorted, each once.
func (cfg Config) packages() []string {
	packages := slices.Clone(cfg.Packages)
	if cfg.Desktop != "" {
		packages = append(packages, desktopPackages...)
		if cfg.desktopProgram() == DefaultDesktop {
			packages = append(packages, DefaultDesktop)
		}
	}
	if cfg.OCI {
		packages = append(packages, ociPackages...)
	}
	return slices.Compact(slices.Sorted(slices.Values(packages)))
}

// desktopProgram is the program that the desktop's command line begins with.
func (cfg Config) desktopProgram() string {
	if f := strings.Fields(cfg.Desktop); len(f) > 0 {
		return f[0]
	}
	return ""
}

// checkDesktop refuses a command line that cannot be a line of a script.
func checkDesktop(command string) error {
	if command != "" && strings.TrimSpace(command) == "" {
		return errors.New("the desktop's command line is blank; leave it out for no desktop")
	}
	if strings.ContainsAny(command, "\n\r\x00") {
		return errors.New("the desktop's command line holds a line break; put the commands into a file, and name that")
	}
	return nil
}

// desktop installs the desktop, if one is wanted, around what there is already: files for its user's home may be among the copies.
func (s *system) desktop() error {
	if s.cfg.Desktop == "" {
		return nil
	}
	const home = "/home/" + desktopUser
	if err := s.users.addUser(account{name: desktopUser, comment: "Desktop", home: home, shell: "/bin/bash", id: -1, group: -1, regular: true}); err != nil {
		return err
	}
	uid, _ := s.users.uid(desktopUser)
	gid, _ := s.users.gid(desktopUser)
	if err := s.Mkdir(home, 0o755, uid, gid); err != nil {
		return err
	}
	for _, name := range []string{".bashrc", ".profile"} {
		text, err := s.ReadFile("/etc/skel/" + name)
		if err != nil || s.Find(home+"/"+name, false) != nil {
			continue // a shell does without, or has its own
		}
		if err := s.WriteFile(home+"/"+name, string(text), 0o644); err != nil {
			return err
		}
		n := s.Find(home+"/"+name, false)
		n.UID, n.GID = uid, gid
	}
	if err := s.writeFiles([]file{
		{path: "/usr/lib/drafter/desktop", text: desktopScript + s.cfg.Desktop + "\n", mode: 0o755},
		{path: "/usr/lib/drafter/vnc", text: vncScript, mode: 0o755},
		{path: "/usr/lib/drafter/vnc-answers", text: vncAnswers, mode: 0o755},
		{path: "/lib/systemd/system/drafter-desktop.service", text: desktopUnit},
		{path: "/lib/systemd/system/drafter-vnc.service", text: vncUnit},
	}); err != nil {
		return err
	}
	program := s.cfg.desktopProgram()
	if !slices.ContainsFunc([]string{"", "/usr/local/bin/", "/usr/bin/", "/usr/games/"}, func(dir string) bool {
		return (dir != "" || path.IsAbs(program)) && s.Find(dir+program, true) != nil
	}) {
		s.warn("the desktop's program %q is none of the guest's, so its screen may stay black: name its package with --packages", program)
	}
	for _, unit := range []string{"drafter-desktop.service", "drafter-vnc.service"} {
		if err := enableUnit(s.Tree, unit); err != nil {
			return err
		}
	}
	return nil
}

const desktopUnit = `[Unit]
Description=Desktop without a screen, which shows one program
After=local-fs.target network.target
StartLimitIntervalSec=0

[Service]
User=` + desktopUser + `
WorkingDirectory=~
RuntimeDirectory=drafter-desktop
RuntimeDirectoryMode=0700
Environment=XDG_RUNTIME_DIR=/run/drafter-desktop LANG=C.UTF-8
Environment=WLR_BACKENDS=headless WLR_LIBINPUT_NO_DEVICES=1 WLR_RENDERER=pixman LIBGL_ALWAYS_SOFTWARE=1
ExecStart=/usr/bin/cage -d -- /usr/lib/drafter/desktop
Restart=always
RestartSec=500ms

[Install]
WantedBy=multi-user.target
`

// desktopScript is what the compositor ends with, and its service with that. (Were the program started again below it, a
// compositor that was told to end would wait for that for ever.)
const desktopScript = "#!/bin/sh\n# The program of the desktop.\n"

// vncUnit has started once VNC answers, and targets wait for what they want: so does the guest's liveness.
const vncUnit = `[Unit]
Description=The desktop by VNC, at port 5900
Wants=drafter-desktop.service
After=drafter-desktop.service drafter-network.service
StartLimitIntervalSec=0

[Service]
User=` + desktopUser + `
Environment=XDG_RUNTIME_DIR=/run/drafter-desktop WAYLAND_DISPLAY=wayland-0
ExecStart=/usr/lib/drafter/vnc
ExecStartPost=/usr/lib/drafter/vnc-answers
TimeoutStartSec=5min
Restart=always
RestartSec=500ms

[Install]
WantedBy=multi-user.target
`

const vncScript = `#!/bin/sh
# VNC on all addresses, of both families, as soon as the desktop is there.
until [ -S "$XDG_RUNTIME_DIR/$WAYLAND_DISPLAY" ]; do
	sleep 0.1
done
exec /usr/bin/wayvnc :: 5900
`

const vncAnswers = `#!/bin/bash
# Wait until VNC greets: a guest that counts as alive can be looked at.
until read -r -t 10 greeting 2>/dev/null </dev/tcp/127.0.0.1/5900 && [[ $greeting == RFB* ]]; do
	sleep 0.2
done
`
