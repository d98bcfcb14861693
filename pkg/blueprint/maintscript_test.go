package blueprint

import (
	"archive/tar"
	"fmt"
	"strings"
	"testing"

	"github.com/drafter-vm/drafter/pkg/filetree"
)

// testSystem is a tree with the accounts of a fresh Debian.
func testSystem(t testing.TB) (*filetree.Tree, users) {
	t.Helper()
	tr := newTestTree(t)
	must(t, tr.WriteFile("/usr/share/base-passwd/passwd.master", "root:*:0:0:root:/root:/bin/bash\ndaemon:*:1:1:daemon:/usr/sbin:/usr/sbin/nologin\nnobody:*:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n", 0o644))
	must(t, tr.WriteFile("/usr/share/base-passwd/group.master", "root:*:0:\nadm:*:4:\nshadow:*:42:\nnogroup:*:65534:\n", 0o644))
	u := users{tr}
	must(t, u.seed())
	return tr, u
}

func describe(tr *filetree.Tree, p string) string {
	n := tr.Find(p, false)
	if n == nil {
		return "missing"
	}
	if n.Type == tar.TypeSymlink {
		return "-> " + n.Link
	}
	return fmt.Sprintf("%o %d:%d", n.Mode, n.UID, n.GID)
}

func TestMaintainerScripts(t *testing.T) {
	for _, test := range []struct {
		name, script string
		files        map[string]string
		want         map[string]string // path → describe
		text         map[string]string // path → content
		err          string
	}{
		{
			name: "a system user and its folders",
			script: `#!/bin/sh
set -eu
USER="srv"
Setup_dir () {
	DIR="${1}"; MODE="${2}"; GROUP="${3}"
	mkdir -p ${DIR}
	if ! dpkg-statoverride --list ${DIR} >/dev/null 2>&1; then
		chown ${USER}:${GROUP} ${DIR}
		chmod ${MODE} ${DIR}
	fi
}
if [ "$1" = "configure" ]; then
	adduser --system --home /var/lib/srv --quiet --group ${USER} || true
	Setup_dir /var/log/srv 2750 adm
	dpkg-statoverride --update --add ${USER} ${USER} 640 /etc/srv.conf
fi
exit 0
`,
			files: map[string]string{"etc/srv.conf": "x"},
			want:  map[string]string{"/var/lib/srv": "755 100:100", "/var/log/srv": "2750 100:4", "/etc/srv.conf": "640 100:100"},
			text:  map[string]string{"/var/lib/dpkg/statoverride": "srv srv 640 /etc/srv.conf\n"},
		},
		{
			name: "units, links, files",
			script: `#!/bin/bash
if deb-systemd-helper --quiet was-enabled 'x.service'; then deb-systemd-helper enable 'x.service' >/dev/null || true; fi
[ -d /run/systemd/system ] && systemctl daemon-reload
for f in /usr/share/x/*.conf; do cp -p "$f" /etc/; done
cat > /etc/made <<EOF
made by $DPKG_MAINTSCRIPT_PACKAGE
EOF
echo more >> /etc/made
ln -sf made /etc/alias
local_test() { local a=1; echo $a; }
[ "$(local_test)" = 1 ] && touch /etc/local
install -d -m 1777 -o nobody -g nogroup /var/spool/x
test "$(readlink -f /etc/alias)" = /etc/made || exit 3
grep -q "^made by" /etc/made || exit 4
getent passwd nobody >/dev/null || exit 5
[ "$(id -u nobody)" = 65534 ] || exit 6
chmod -R u=rwX,go= /usr/share/x
`,
			files: map[string]string{"usr/lib/systemd/system/x.service": "[Unit]\n[Install]\nWantedBy=multi-user.target\nAlias=y.service\n", "usr/share/x/a.conf": "A", "usr/share/x/b.conf": "B"},
			want: map[string]string{"/etc/systemd/system/multi-user.target.wants/x.service": "-> /usr/lib/systemd/system/x.service", "/etc/systemd/system/y.service": "-> /usr/lib/systemd/system/x.service",
				"/etc/alias": "-> made", "/etc/local": "644 0:0", "/var/spool/x": "1777 65534:65534", "/usr/share/x": "700 0:0", "/usr/share/x/a.conf": "600 0:0"},
			text: map[string]string{"/etc/made": "made by pkg\nmore\n", "/etc/b.conf": "B"},
		},
		{
			name: "alternatives",
			script: `#!/bin/sh
update-alternatives --install /usr/bin/awk awk /usr/bin/mawk 5 \
	--slave /usr/share/man/man1/awk.1.gz awk.1.gz /usr/share/man/man1/mawk.1.gz --slave /usr/bin/nawk nawk /usr/bin/mawk
update-alternatives --install /usr/bin/awk awk /usr/bin/worse 1
`,
			files: map[string]string{"usr/bin/mawk": ""},
			want:  map[string]string{"/usr/bin/awk": "-> /etc/alternatives/awk", "/etc/alternatives/awk": "-> /usr/bin/mawk", "/usr/bin/nawk": "-> /etc/alternatives/nawk", "/etc/alternatives/awk.1.gz": "missing"},
			text:  map[string]string{"/var/lib/dpkg/alternatives/awk": "auto\n/usr/bin/awk\nnawk\n/usr/bin/nawk\n\n/usr/bin/mawk\n5\n/usr/bin/mawk\n/usr/bin/worse\n1\n\n\n"},
		},
		{
			name:   "debconf answers nothing",
			script: "#!/bin/sh\nset -e\n. /usr/share/debconf/confmodule\ndb_input high x || true\ndb_go\ndb_get x\necho \"[$RET]\" > /answer\ndb_stop\n",
			text:   map[string]string{"/answer": "[]\n"},
		},
		{name: "the host is out of sight", script: "#!/bin/sh\ntest ! -e /proc/self/status && test ! -d /work || exit 9\ncat /etc/hostname && exit 8\nexit 0\n"},
		{name: "an unknown program", script: "#!/bin/sh\nset -e\nopenssl req -new\n", err: "it calls openssl"},
		{name: "not a shell script", script: "#!/usr/bin/perl\n", err: "not a shell script"},
		{name: "a failure", script: "#!/bin/sh\necho reason >&2\nexit 3\n", err: "reason"},
		{name: "a syntax error", script: "#!/bin/sh\nif then\n", err: "postinst:2"},
	} {
		t.Run(test.name, func(t *testing.T) {
			tr, u := testSystem(t)
			d := openTestDeb(t, tr, "pkg", "", test.files, map[string]string{"postinst": test.script})
			r := &scriptRunner{t: tr, users: u, arch: "amd64", debs: []*deb{d}}
			err := r.run(t.Context(), d, "postinst", "configure", "")
			if test.err != "" {
				if err == nil || !strings.Contains(err.Error(), test.err) {
					t.Fatalf("got error %v, want one with %q", err, test.err)
				}
				return
			}
			must(t, err)
			for p, want := range test.want {
				if got := describe(tr, p); got != want {
					t.Errorf("%s is %q, want %q", p, got, want)
				}
			}
			for p, want := range test.text {
				if got, err := tr.ReadFile(p); err != nil || string(got) != want {
					t.Errorf("%s holds %q (%v), want %q", p, got, err, want)
				}
			}
		})
	}
}

func TestSysusers(t *testing.T) {
	tr, u := testSystem(t)
	must(t, u.sysusers("# comment\nu srv - \"A server, running\" /var/lib/srv /bin/sh\ng render -\nu fixed 777 -\nm srv render\nu! locked - -\n"))
	for file, want := range map[string]string{
		"/etc/passwd": "srv:x:100:100:A server, running:/var/lib/srv:/bin/sh\nfixed:x:777:777::/:/usr/sbin/nologin\nlocked:x:102:102::/:/usr/sbin/nologin\n",
		"/etc/group":  "srv:x:100:\nrender:x:101:srv\nfixed:x:777:\nlocked:x:102:\n",
	} {
		got, err := tr.ReadFile(file)
		must(t, err)
		if !strings.HasSuffix(string(got), want) {
			t.Errorf("%s ends in\n%s\nwant\n%s", file, got, want)
		}
	}
}

func TestEnableUnit(t *testing.T) {
	tr := newTestTree(t)
	must(t, tr.WriteFile("/usr/lib/systemd/system/t@.service", "[Install]\nWantedBy=multi-user.target\nDefaultInstance=one\nAlso=t.socket\n", 0o644))
	must(t, tr.WriteFile("/usr/lib/systemd/system/t.socket", "[Install]\nRequiredBy=sockets.target\nWantedBy=%n.extra\n", 0o644))
	must(t, enableUnit(tr, "t@.service"))
	must(t, enableUnit(tr, "t@two.service"))
	for p, want := range map[string]string{
		"/etc/systemd/system/multi-user.target.wants/t@one.service": "-> /usr/lib/systemd/system/t@.service",
		"/etc/systemd/system/multi-user.target.wants/t@two.service": "-> /usr/lib/systemd/system/t@.service",
		"/etc/systemd/system/sockets.target.requires/t.socket":      "-> /usr/lib/systemd/system/t.socket",
		"/etc/systemd/system/t.socket.extra.wants/t.socket":         "-> /usr/lib/systemd/system/t.socket",
	} {
		if got := describe(tr, p); got != want {
			t.Errorf("%s is %q, want %q", p, got, want)
		}
	}
	if err := enableUnit(tr, "none.service"); err == nil {
		t.Error("a unit that is not there was enabled")
	}
}

func TestMountUnit(t *testing.T) {
	for p, want := range map[string]string{"/": "-.mount", "/data": "data.mount", "/srv/my-data/": `srv-my\x2ddata.mount`, "/.x": `\x2ex.mount`} {
		if got := mountUnit(p); got != want {
			t.Errorf("%s: got %s, want %s", p, got, want)
		}
	}
}

func TestPassword(t *testing.T) {
	a, err := password("secret")
	must(t, err)
	b, err := password("secret")
	must(t, err)
	if a != b || !strings.HasPrefix(a, "$6$") {
		t.Errorf("got %q and %q", a, b)
	}
	if got, err := password("$y$x"); got != "$y$x" || err != nil {
		t.Errorf("a hash became %q, %v", got, err)
	}
	if got, err := password(""); got != "" || err != nil {
		t.Errorf("none became %q, %v", got, err)
	}
}
