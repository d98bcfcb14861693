package blueprint

import (
	"slices"
	"strings"
	"testing"
)

func TestDesktop(t *testing.T) {
	tr, u := testSystem(t)
	must(t, tr.WriteFile("/etc/skel/.bashrc", "# theirs\n", 0o644))
	must(t, tr.WriteFile("/etc/skel/.profile", "# theirs\n", 0o644))
	must(t, tr.WriteFile("/home/desktop/.profile", "# copied\n", 0o600))
	s := &system{Tree: tr, users: u, cfg: &Config{Desktop: `foot sh -c "echo 100%"`}}
	must(t, s.desktop())
	for path, want := range map[string]string{
		"/home/desktop":                               "755 1000:1000",
		"/home/desktop/.bashrc":                       "644 1000:1000",
		"/home/desktop/.profile":                      "600 0:0",
		"/usr/lib/drafter/desktop":                    "755 0:0",
		"/usr/lib/drafter/vnc":                        "755 0:0",
		"/lib/systemd/system/drafter-desktop.service": "644 0:0",
		// The guest counts as alive after multi-user.target, which comes after what it wants: so when VNC answers.
		"/etc/systemd/system/multi-user.target.wants/drafter-desktop.service": "-> /lib/systemd/system/drafter-desktop.service",
		"/etc/systemd/system/multi-user.target.wants/drafter-vnc.service":     "-> /lib/systemd/system/drafter-vnc.service",
	} {
		if got := describe(tr, path); got != want {
			t.Errorf("%s is %s, want %s", path, got, want)
		}
	}
	script, err := tr.ReadFile("/usr/lib/drafter/desktop")
	must(t, err)
	if !strings.Contains(string(script), "\n"+s.cfg.Desktop+"\n") {
		t.Errorf("the program is run by\n%s\nwhich has no line %q", script, s.cfg.Desktop)
	}

	if len(s.warnings) != 1 || !strings.Contains(s.warnings[0], `"foot"`) || !strings.Contains(s.warnings[0], "--packages") {
		t.Errorf("a program that is not there: got warnings %q", s.warnings)
	}
	for _, program := range []string{"/usr/bin/foot", "/usr/local/bin/foot", "/opt/foot"} {
		tr, u := testSystem(t)
		must(t, tr.WriteFile(program, "", 0o755))
		s := &system{Tree: tr, users: u, cfg: &Config{Desktop: strings.TrimPrefix(strings.TrimPrefix(program, "/usr/bin/"), "/usr/local/bin/") + " --maximized"}}
		must(t, s.desktop())
		if len(s.warnings) > 0 {
			t.Errorf("%s with %s: got warnings %q", s.cfg.Desktop, program, s.warnings)
		}
	}

	bare, u := testSystem(t)
	s = &system{Tree: bare, users: u, cfg: &Config{}}
	must(t, s.desktop())
	if got := describe(bare, "/lib/systemd/system/drafter-vnc.service"); got != "missing" {
		t.Errorf("a guest without a desktop has a VNC server: %s", got)
	}
}

func TestDesktopRequest(t *testing.T) {
	requests := map[string]string{}
	for _, test := range []struct {
		name, suite, desktop string
		packages             []string
		want                 string
	}{
		{"none", "", "", []string{"htop"}, "bookworm amd64 base-2 linux-image-cloud-amd64 htop"},
		{"default", "", DefaultDesktop, nil, "trixie amd64 base-2 linux-image-cloud-amd64 desktop-1 cage foot libgl1-mesa-dri wayvnc"},
		{"default with arguments", "", "foot --font=monospace:size=14", []string{"foot", "mesa-utils"}, "trixie amd64 base-2 linux-image-cloud-amd64 desktop-1 cage foot libgl1-mesa-dri mesa-utils wayvnc"},
		{"another program", "", "footage", nil, "trixie amd64 base-2 linux-image-cloud-amd64 desktop-1 cage libgl1-mesa-dri wayvnc"},
		{"suite by name", "forky", "htop", nil, "forky amd64 base-2 linux-image-cloud-amd64 desktop-1 cage libgl1-mesa-dri wayvnc"},
		// What somebody lists by name is not bound to what a desktop needs of it, so this is another request.
		{"the same packages, no desktop", "trixie", "", []string{"cage", "foot", "libgl1-mesa-dri", "wayvnc"}, "trixie amd64 base-2 linux-image-cloud-amd64 cage foot libgl1-mesa-dri wayvnc"},
	} {
		t.Run(test.name, func(t *testing.T) {
			cfg, _ := Config{Suite: test.suite, Desktop: test.desktop, Packages: test.packages}.complete() // it lacks an agent
			if got := cfg.request(); got != test.want {
				t.Errorf("the request is %q, want %q", got, test.want)
			}
			if other, ok := requests[cfg.request()]; ok {
				t.Errorf("the request is that of %q, too", other)
			}
			requests[cfg.request()] = test.name
		})
	}

	// The command line is no matter of packages, but of the outcome.
	digest := func(desktop string) string {
		b := &build{cfg: Config{Agent: "/proc/self/exe", Desktop: desktop}}
		digest, err := b.inputs(&lockFile{})
		must(t, err)
		return digest
	}
	if digest("foot") == digest("foot --maximized") {
		t.Error("a blueprint with another command line passes for up to date")
	}
}

// TestDesktopOfBookworm: its cage is too old to type to.
func TestDesktopOfBookworm(t *testing.T) {
	wants := []want{{name: "cage", by: "the blueprint"}}
	ix := testIndex(t, map[string]string{"bookworm": "Package: cage\nVersion: 0.1.4-4\n"})
	_, err := ix.resolve(wants, nil, desktopDemands)
	for _, want := range []string{`"cage"`, "0.1.4-4 (bookworm)", ">= 0.1.5", "suite trixie"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got error %v, want one with %q", err, want)
		}
	}
	ix = testIndex(t, map[string]string{"trixie": "Package: cage\nVersion: 0.2.0-2\n"})
	got, err := ix.resolve(wants, nil, desktopDemands)
	must(t, err)
	if !slices.ContainsFunc(got, func(c *candidate) bool { return c.Name == "cage" }) {
		t.Errorf("got %v, want cage", got)
	}
}
