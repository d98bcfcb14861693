package blueprint

import (
	"archive/tar"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/drafter-vm/drafter/pkg/filetree"
	"mvdan.cc/sh/v3/expand"
	"mvdan.cc/sh/v3/interp"
	"mvdan.cc/sh/v3/syntax"
	"pault.ag/go/debian/version"
)

// The maintainer scripts of packages make accounts, own folders, choose alternatives and enable units. They expect to
// be root inside the system they set up. Here a shell interpreter runs them over the tree instead: every file they
// test, read, write or list is one of the tree, and every program they call is a Go function of the table below, or is
// missing. Nothing of the host is seen or changed, no privilege is needed, and the outcome is always the same.
//
// A script that needs a program we have not (a Perl script, openssl to make keys) fails; its package is then left
// "unpacked" in dpkg's eyes, and `dpkg --configure -a` finishes it when the guest boots for the first time.

// scriptRunner runs maintainer scripts over a tree.
type scriptRunner struct {
	t       *filetree.Tree
	users   users
	arch    string
	debs    []*deb // all that is installed
	alts    map[string]*alternative
	missing map[string]bool // programs a script called in vain; reset for each script
}

// ownLayout are packages whose scripts we do not run: what they do needs their own programs, and system.go does it.
var ownLayout = []string{"base-passwd", "libpam-runtime", "libc6", "libc-bin", "systemd", "udev", "debconf", "tzdata", "dpkg", "dbus"}

// run runs one script of a package, such as "postinst" with "configure". A package that has not got it needs nothing.
func (s *scriptRunner) run(ctx context.Context, d *deb, script string, args ...string) error {
	text := d.scripts[script]
	if text == nil || slices.Contains(ownLayout, d.Name) {
		return nil
	}
	s.missing = map[string]bool{}
	firstLine, _, _ := bytes.Cut(text, []byte("\n"))
	if !bytes.HasPrefix(firstLine, []byte("#!")) || !bytes.Contains(firstLine, []byte("sh")) {
		return fmt.Errorf("it is not a shell script (%s)", firstLine)
	}
	// Bash's grammar holds all that Debian's shells have; POSIX alone would lack "local".
	prog, err := syntax.NewParser(syntax.Variant(syntax.LangBash)).Parse(bytes.NewReader(text), script)
	if err != nil {
		return err
	}
	var output bytes.Buffer
	runner, err := interp.New(
		interp.Dir("/"),
		interp.Params(append([]string{"--"}, args...)...),
		interp.Env(expand.ListEnviron(
			"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LC_ALL=C.UTF-8", "DEBIAN_FRONTEND=noninteractive", "DPKG_ROOT=",
			"DPKG_MAINTSCRIPT_PACKAGE="+d.Name, "DPKG_MAINTSCRIPT_ARCH="+s.arch, "DPKG_MAINTSCRIPT_NAME="+script, "DPKG_ADMINDIR=/var/lib/dpkg",
		)),
		interp.StdIO(nil, &output, &output),
		// umask is no program, and the interpreter lacks it; modes are what commands say, as the mask is always 022.
		interp.CallHandler(func(_ context.Context, args []string) ([]string, error) {
			if args[0] == "umask" {
				return []string{"true"}, nil
			}
			return args, nil
		}),
		interp.ExecHandlers(func(interp.ExecHandlerFunc) interp.ExecHandlerFunc { return s.exec }),
		interp.OpenHandler(s.open),
		interp.ReadDirHandler2(s.readDir),
		interp.StatHandler(s.stat),
		interp.AccessHandler(func(_ context.Context, p string, mode interp.AccessMode) error {
			n := s.t.Find(p, true)
			if n == nil {
				return fs.ErrNotExist
			}
			if mode&interp.AccessExec != 0 && n.Type == tar.TypeReg && n.Mode&0o111 == 0 {
				return fs.ErrPermission
			}
			return nil
		}),
	)
	if err != nil {
		return err
	}
	if err := runner.Run(ctx, prog); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if len(s.missing) > 0 {
			return fmt.Errorf("%w, it calls %s", err, strings.Join(slices.Sorted(maps.Keys(s.missing)), ", "))
		}
		return fmt.Errorf("%w: %s", err, strings.TrimSpace(output.String()))
	}
	return nil
}

// abs makes a path of a script absolute.
func abs(hc interp.HandlerContext, p string) string {
	if path.IsAbs(p) {
		return p
	}
	return path.Join(hc.Dir, p)
}

func (s *scriptRunner) stat(ctx context.Context, p string, follow bool) (fs.FileInfo, error) {
	p = abs(interp.HandlerCtx(ctx), p)
	if n := s.t.Find(p, follow); n != nil {
		return filetree.Stat(path.Base(p), n), nil
	}
	return nil, &fs.PathError{Op: "stat", Path: p, Err: fs.ErrNotExist}
}

func (s *scriptRunner) readDir(ctx context.Context, p string) ([]fs.DirEntry, error) {
	d := s.t.Find(abs(interp.HandlerCtx(ctx), p), true)
	if d == nil || d.Type != tar.TypeDir {
		return nil, &fs.PathError{Op: "readdir", Path: p, Err: fs.ErrNotExist}
	}
	var out []fs.DirEntry
	for _, name := range slices.Sorted(maps.Keys(d.Children)) {
		out = append(out, fs.FileInfoToDirEntry(filetree.Stat(name, d.Children[name])))
	}
	return out, nil
}

// debconfStub stands in for debconf's shell library: every question has its package's silence for an answer.
const debconfStub = `
for _c in get set input go fset fget title text block endblock stop purge register unregister subst metaget reset capb version settitle info x_loadtemplatefile beginblock progress previous_module exist; do
	eval "db_$_c() { RET=; return 0; }"
done
db_get() { RET=; return 0; }
db_fget() { RET=false; return 0; }
db_input() { return 30; }
`

// scriptFile is a file of the tree opened by a redirection; it takes effect when it is closed.
type scriptFile struct {
	io.Reader
	buf   bytes.Buffer
	close func([]byte) error
}

func (f *scriptFile) Write(p []byte) (int, error) { return f.buf.Write(p) }
func (f *scriptFile) Close() error {
	if f.close == nil {
		return nil
	}
	return f.close(f.buf.Bytes())
}

func (s *scriptRunner) open(ctx context.Context, p string, flag int, perm os.FileMode) (io.ReadWriteCloser, error) {
	p = abs(interp.HandlerCtx(ctx), p)
	switch p {
	case "/dev/null", "/dev/stderr", "/dev/stdout", "/dev/tty":
		return &scriptFile{Reader: strings.NewReader("")}, nil
	case "/usr/share/debconf/confmodule":
		return &scriptFile{Reader: strings.NewReader(debconfStub)}, nil
	}
	f := &scriptFile{Reader: strings.NewReader("")}
	n := s.t.Find(p, true)
	if flag&(os.O_WRONLY|os.O_RDWR) == 0 {
		if n == nil || n.Type != tar.TypeReg {
			return nil, &fs.PathError{Op: "open", Path: p, Err: fs.ErrNotExist}
		}
		f.Reader = n.Content.Reader()
		return f, nil
	}
	if n == nil {
		if err := s.t.WriteFile(p, "", uint32(perm.Perm())&^0o022); err != nil {
			return nil, &fs.PathError{Op: "open", Path: p, Err: err}
		}
		n = s.t.Find(p, true)
	} else if n.Type != tar.TypeReg {
		return nil, &fs.PathError{Op: "open", Path: p, Err: errors.New("is a directory")}
	}
	if flag&os.O_APPEND != 0 {
		old, err := io.ReadAll(n.Content.Reader())
		if err != nil {
			return nil, err
		}
		f.buf.Write(old)
	}
	f.close = func(b []byte) error { n.Content = filetree.Bytes(slices.Clone(b)); return nil }
	return f, nil
}

// call is one program that a script calls.
type call struct {
	*scriptRunner
	ctx  context.Context
	hc   interp.HandlerContext
	args []string // without the name
}

// path returns a path argument in absolute form.
func (c *call) path(p string) string { return abs(c.hc, p) }

// failed is the status of a program that says no.
var failed = interp.ExitStatus(1)

// exec is called for every program.
func (s *scriptRunner) exec(ctx context.Context, args []string) error {
	hc := interp.HandlerCtx(ctx)
	name := path.Base(args[0])
	if f := programs[name]; f != nil {
		err := f(&call{s, ctx, hc, args[1:]})
		var status interp.ExitStatus
		if err != nil && !errors.As(err, &status) {
			fmt.Fprintf(hc.Stderr, "%s: %v\n", name, err)
			return failed
		}
		return err
	}
	s.missing[name] = true
	fmt.Fprintf(hc.Stderr, "%s: not found\n", name)
	return interp.ExitStatus(127)
}

// nothing is a program that has nothing to do while a system is not running.
func nothing(*call) error { return nil }

// programs is all that scripts can call.
var programs map[string]func(*call) error

func init() {
	programs = map[string]func(*call) error{
		"adduser": (*call).adduser, "addgroup": (*call).addgroup, "useradd": (*call).useradd, "groupadd": (*call).groupadd,
		"usermod": (*call).usermod, "gpasswd": nothing, "chage": nothing,
		"getent": (*call).getent, "id": (*call).id, "systemd-sysusers": func(c *call) error { return c.users.addSystemUsers(c.operands("")...) },

		"chown": (*call).chown, "chgrp": (*call).chgrp, "chmod": (*call).chmod,
		"mkdir": (*call).mkdir, "install": (*call).install, "cp": (*call).cp, "mv": (*call).mv, "rm": (*call).rm, "rmdir": (*call).rmdir,
		"ln": (*call).ln, "touch": (*call).touch, "cat": (*call).cat, "readlink": (*call).readlink, "grep": (*call).grep,
		"basename": func(c *call) error { return c.print(path.Base(c.arg(0))) },
		"dirname":  func(c *call) error { return c.print(path.Dir(c.arg(0))) },
		"mktemp":   func(c *call) error { return c.mktemp() },
		"find":     (*call).find,

		"dpkg": (*call).dpkg, "dpkg-statoverride": (*call).statoverride, "update-alternatives": (*call).alternatives,
		"deb-systemd-helper": (*call).systemdHelper, "systemctl": (*call).systemctl,
		"dpkg-divert": func(c *call) error {
			if slices.Contains(c.args, "--truename") {
				return c.print(c.args[len(c.args)-1])
			}
			return nil
		},
		"dpkg-realpath": (*call).realpath, "realpath": (*call).realpath,
		"dpkg-query": (*call).dpkg,
		"ischroot":   nothing, // we are as good as in one: programs must not be started
		"uname":      func(c *call) error { return c.print("Linux") },
		"setcap":     func(*call) error { return failed }, // scripts fall back to set-uid
	}
	for _, name := range strings.Fields(`update-rc.d invoke-rc.d deb-systemd-invoke service start-stop-daemon ldconfig dpkg-trigger
		dpkg-maintscript-helper update-initramfs py3compile py3clean pycompile pyclean systemd-tmpfiles systemd-hwdb journalctl udevadm
		install-info update-mime-database glib-compile-schemas fc-cache systemd-machine-id-setup update-shells add-shell remove-shell
		sync sleep shadowconfig killall pkill update-menus update-icon-caches gtk-update-icon-cache rpcinfo
		db_version adequate deluser delgroup userdel groupdel chfn ucf ucfr modprobe sysctl`) {
		programs[name] = nothing
	}
}

func (c *call) print(lines ...string) error {
	_, err := fmt.Fprintln(c.hc.Stdout, strings.Join(lines, "\n"))
	return err
}

func (c *call) arg(i int) string {
	if ops := c.operands(""); i < len(ops) {
		return ops[i]
	}
	return ""
}

// operands returns the arguments that are not options; those named in withValue, such as "-o -g", take the next one.
func (c *call) operands(withValue string) []string {
	_, ops := c.options(withValue)
	return ops
}

// options splits the arguments in options with their values and operands. Clustered one-letter options are split.
func (c *call) options(withValue string) (map[string]string, []string) {
	takes := strings.Fields(withValue)
	opts := map[string]string{}
	var ops []string
	for i := 0; i < len(c.args); i++ {
		a := c.args[i]
		switch {
		case a == "--":
			return opts, append(ops, c.args[i+1:]...)
		case len(a) < 2 || a[0] != '-':
			ops = append(ops, a)
		case strings.HasPrefix(a, "--"):
			name, value, ok := strings.Cut(a, "=")
			if !ok && slices.Contains(takes, name) && i+1 < len(c.args) {
				i++
				value = c.args[i]
			}
			opts[name] = value
		default:
			for j := 1; j < len(a); j++ {
				name := "-" + a[j:j+1]
				if !slices.Contains(takes, name) {
					opts[name] = ""
					continue
				}
				if j+1 < len(a) {
					opts[name] = a[j+1:]
				} else if i+1 < len(c.args) {
					i++
					opts[name] = c.args[i]
				}
				break
			}
		}
	}
	return opts, ops
}

func has(opts map[string]string, names ...string) bool {
	for _, n := range names {
		if _, ok := opts[n]; ok {
			return true
		}
	}
	return false
}

func number(s string) int {
	if n, err := strconv.Atoi(s); err == nil {
		return n
	}
	return -1
}

// adduser is Debian's adduser.
func (c *call) adduser() error {
	opts, ops := c.options("--home --shell --uid --gid --ingroup --gecos --comment --firstuid --lastuid --conf")
	if len(ops) == 0 {
		return errors.New("no name given")
	}
	name := ops[0]
	if len(ops) == 2 {
		return c.users.addMember(name, ops[1])
	}
	system := has(opts, "--system")
	if has(opts, "--group") && !system {
		return c.addgroup()
	}
	a := account{name: name, comment: cmp.Or(opts["--gecos"], opts["--comment"]), home: opts["--home"], shell: opts["--shell"], id: number(opts["--uid"]), group: -1, regular: !system}
	switch {
	case has(opts, "--ingroup"):
		if gid, ok := c.users.gid(opts["--ingroup"]); ok {
			a.group = gid
		}
	case has(opts, "--gid"):
		if gid, ok := c.users.gid(opts["--gid"]); ok {
			a.group = gid
		}
	case system && !has(opts, "--group"):
		a.group = 65534 // nogroup
	}
	if !system {
		a.home, a.shell = cmp.Or(a.home, "/home/"+name), cmp.Or(a.shell, "/bin/bash")
	}
	isNew := c.users.entry("/etc/passwd", name) == nil
	if err := c.users.addUser(a); err != nil {
		return err
	}
	if isNew && a.home != "" && a.home != "/nonexistent" && !has(opts, "--no-create-home") && c.t.Find(a.home, true) == nil {
		return c.makeHome(name, a.home)
	}
	return nil
}

func (c *call) makeHome(name, home string) error {
	uid, _ := c.users.uid(name)
	gid, _ := c.users.gid(name)
	if e := c.users.entry("/etc/passwd", name); e != nil {
		gid = max(0, number(e[3]))
	}
	return c.t.Mkdir(home, 0o755, uid, gid)
}

// useradd is the one of package passwd.
func (c *call) useradd() error {
	opts, ops := c.options("-c -d -g -G -s -u --comment --home-dir --home --gid --groups --shell --uid -k -K")
	if len(ops) != 1 {
		return errors.New("one name is expected")
	}
	system := has(opts, "-r", "--system")
	a := account{
		name: ops[0], comment: cmp.Or(opts["-c"], opts["--comment"]), home: cmp.Or(opts["-d"], opts["--home-dir"], opts["--home"]),
		shell: cmp.Or(opts["-s"], opts["--shell"]), id: number(cmp.Or(opts["-u"], opts["--uid"])), group: -1, regular: !system,
	}
	if g := cmp.Or(opts["-g"], opts["--gid"]); g != "" {
		gid, ok := c.users.gid(g)
		if !ok {
			return fmt.Errorf("group %q does not exist", g)
		}
		a.group = gid
	}
	a.home = cmp.Or(a.home, "/home/"+a.name)
	if err := c.users.addUser(a); err != nil {
		return err
	}
	for g := range strings.SplitSeq(cmp.Or(opts["-G"], opts["--groups"]), ",") {
		if g != "" {
			if err := c.users.addMember(a.name, g); err != nil {
				return err
			}
		}
	}
	if has(opts, "-m", "--create-home") && c.t.Find(a.home, true) == nil {
		return c.makeHome(a.name, a.home)
	}
	return nil
}

func (c *call) groupadd() error {
	opts, ops := c.options("-g --gid -K")
	if len(ops) != 1 {
		return errors.New("one name is expected")
	}
	_, err := c.users.addGroup(ops[0], number(cmp.Or(opts["-g"], opts["--gid"])), !has(opts, "-r", "--system"))
	return err
}

func (c *call) addgroup() error {
	opts, ops := c.options("--gid --firstgid --lastgid --conf")
	switch len(ops) {
	case 1:
		_, err := c.users.addGroup(ops[0], number(opts["--gid"]), !has(opts, "--system"))
		return err
	case 2:
		return c.users.addMember(ops[0], ops[1])
	}
	return errors.New("one name is expected")
}

func (c *call) usermod() error {
	opts, ops := c.options("-c -d -g -G -s -u --comment --home --gid --groups --shell --uid")
	if len(ops) == 1 && has(opts, "-a", "--append") {
		for g := range strings.SplitSeq(cmp.Or(opts["-G"], opts["--groups"]), ",") {
			if err := c.users.addMember(ops[0], g); err != nil {
				return err
			}
		}
	}
	return nil
}

func (c *call) getent() error {
	file := map[string]string{"passwd": "/etc/passwd", "group": "/etc/group"}[c.arg(0)]
	if file == "" {
		return failed
	}
	if c.arg(1) == "" {
		b, err := c.t.ReadFile(file)
		if err != nil {
			return err
		}
		return c.print(strings.TrimSuffix(string(b), "\n"))
	}
	e := c.users.entry(file, c.arg(1))
	if e == nil {
		return interp.ExitStatus(2)
	}
	return c.print(strings.Join(e, ":"))
}

func (c *call) id() error {
	opts, ops := c.options("")
	name := "root"
	if len(ops) > 0 {
		name = ops[0]
	}
	e := c.users.entry("/etc/passwd", name)
	switch {
	case len(e) < 4:
		return failed
	case has(opts, "-n"):
		return c.print(e[0])
	case has(opts, "-g"):
		return c.print(e[3])
	}
	return c.print(e[2])
}

// eachOf calls f for the path and, with recurse, for all below it.
func (c *call) eachOf(p string, recurse bool, follow bool, f func(n *filetree.Node) error) error {
	n := c.t.Find(c.path(p), follow)
	if n == nil {
		return fmt.Errorf("%q does not exist", p)
	}
	if err := f(n); err != nil || !recurse || n.Type != tar.TypeDir {
		return err
	}
	return filetree.EachBelow("", n, func(_ string, n *filetree.Node) error { return f(n) })
}

func (c *call) owner(spec string) (uid, gid int, err error) {
	uid, gid = -1, -1
	user, group, both := strings.Cut(spec, ":")
	if !both && c.users.entry("/etc/passwd", spec) == nil {
		if u, g, ok := strings.Cut(spec, "."); ok {
			user, group, both = u, g, true
		}
	}
	var ok bool
	if user != "" {
		if uid, ok = c.users.uid(user); !ok {
			return 0, 0, fmt.Errorf("user %q does not exist", user)
		}
		if e := c.users.entry("/etc/passwd", user); both && group == "" && e != nil {
			group = e[3]
		}
	}
	if group != "" {
		if gid, ok = c.users.gid(group); !ok {
			return 0, 0, fmt.Errorf("group %q does not exist", group)
		}
	}
	return uid, gid, nil
}

func (c *call) chownTo(spec string, paths []string, opts map[string]string) error {
	uid, gid, err := c.owner(spec)
	if err != nil {
		return err
	}
	for _, p := range paths {
		if err := c.eachOf(p, has(opts, "-R", "--recursive"), !has(opts, "-h", "--no-dereference"), func(n *filetree.Node) error {
			if uid >= 0 {
				n.UID = uid
			}
			if gid >= 0 {
				n.GID = gid
			}
			return nil
		}); err != nil {
			return err
		}
	}
	return nil
}

func (c *call) chown() error {
	opts, ops := c.options("")
	if r, ok := opts["--reference"]; ok {
		n := c.t.Find(c.path(r), true)
		if n == nil {
			return fmt.Errorf("%q does not exist", r)
		}
		return c.chownTo(fmt.Sprintf("%d:%d", n.UID, n.GID), ops, opts)
	}
	if len(ops) < 2 {
		return errors.New("an owner and a path are expected")
	}
	return c.chownTo(ops[0], ops[1:], opts)
}

func (c *call) chgrp() error {
	opts, ops := c.options("")
	if len(ops) < 2 {
		return errors.New("a group and a path are expected")
	}
	return c.chownTo(":"+ops[0], ops[1:], opts)
}

// parseMode applies a mode of chmod(1), octal or symbolic, to old.
func parseMode(spec string, old uint32, dir bool) (uint32, error) {
	if n, err := strconv.ParseUint(spec, 8, 32); err == nil {
		return uint32(n) & 0o7777, nil
	}
	for clause := range strings.SplitSeq(spec, ",") {
		i := strings.IndexAny(clause, "+-=")
		if i < 0 {
			return 0, fmt.Errorf("mode %q is not valid", spec)
		}
		who := clause[:i]
		if who == "" {
			who = "a"
		}
		var shift []int
		for _, w := range who {
			switch w {
			case 'u':
				shift = append(shift, 6)
			case 'g':
				shift = append(shift, 3)
			case 'o':
				shift = append(shift, 0)
			case 'a':
				shift = append(shift, 6, 3, 0)
			}
		}
		for _, at := range shift {
			var bits uint32
			for _, b := range clause[i+1:] {
				switch b {
				case 'r':
					bits |= 4 << at
				case 'w':
					bits |= 2 << at
				case 'x':
					bits |= 1 << at
				case 'X':
					if dir || old&0o111 != 0 {
						bits |= 1 << at
					}
				case 's':
					bits |= map[int]uint32{6: 0o4000, 3: 0o2000}[at]
				case 't':
					bits |= 0o1000
				default:
					return 0, fmt.Errorf("mode %q is not valid", spec)
				}
			}
			switch clause[i] {
			case '+':
				old |= bits
			case '-':
				old &^= bits
			case '=':
				old = old&^(7<<at) | bits
			}
		}
	}
	return old, nil
}

func (c *call) chmod() error {
	// "-x" is a mode, not an option: options are only -R, -f, -v, -c and long ones.
	recurse, args := false, []string{}
	for _, a := range c.args {
		switch {
		case a == "-R" || a == "--recursive":
			recurse = true
		case a == "-f" || a == "-v" || a == "-c" || strings.HasPrefix(a, "--"):
		default:
			args = append(args, a)
		}
	}
	if len(args) < 2 {
		return errors.New("a mode and a path are expected")
	}
	for _, p := range args[1:] {
		if err := c.eachOf(p, recurse, true, func(n *filetree.Node) error {
			if n.Type == tar.TypeSymlink {
				return nil
			}
			mode, err := parseMode(args[0], n.Mode, n.Type == tar.TypeDir)
			n.Mode = mode
			return err
		}); err != nil {
			return err
		}
	}
	return nil
}

func (c *call) mkdir() error {
	opts, ops := c.options("-m --mode")
	for _, p := range ops {
		if c.t.Find(c.path(p), true) != nil {
			if has(opts, "-p", "--parents") {
				continue
			}
			return fmt.Errorf("%q exists", p)
		}
		if _, err := c.t.MkdirAll(c.path(p)); err != nil {
			return err
		}
		if m := cmp.Or(opts["-m"], opts["--mode"]); m != "" {
			mode, err := parseMode(m, 0o755, true)
			if err != nil {
				return err
			}
			c.t.Find(c.path(p), true).Mode = mode
		}
	}
	return nil
}

func (c *call) install() error {
	opts, ops := c.options("-m -o -g --mode --owner --group -t --target-directory")
	mode, err := parseMode(cmp.Or(opts["-m"], opts["--mode"], "755"), 0o755, true)
	if err != nil {
		return err
	}
	uid, gid, err := c.owner(cmp.Or(opts["-o"], opts["--owner"]) + ":" + cmp.Or(opts["-g"], opts["--group"]))
	if err != nil {
		return err
	}
	if has(opts, "-d", "--directory") {
		for _, p := range ops {
			if err := c.t.Mkdir(c.path(p), mode, max(uid, 0), max(gid, 0)); err != nil {
				return err
			}
		}
		return nil
	}
	if len(ops) != 2 {
		return errors.New("a source and a destination are expected")
	}
	return c.copy(ops[0], ops[1], func(n *filetree.Node) { n.Mode, n.UID, n.GID = mode, max(uid, 0), max(gid, 0) })
}

// copy copies one file or tree to a path or into a folder.
func (c *call) copy(from, to string, edit func(*filetree.Node)) error {
	src := c.t.Find(c.path(from), true)
	if src == nil {
		return fmt.Errorf("%q does not exist", from)
	}
	dst := c.path(to)
	if d := c.t.Find(dst, true); d != nil && d.Type == tar.TypeDir {
		dst = path.Join(dst, path.Base(from))
	}
	return c.t.Put(dst, clone(src, edit))
}

func clone(n *filetree.Node, edit func(*filetree.Node)) *filetree.Node {
	m := *n
	if n.Children != nil {
		m.Children = map[string]*filetree.Node{}
		for name, child := range n.Children {
			m.Children[name] = clone(child, edit)
		}
	}
	edit(&m)
	return &m
}

func (c *call) cp() error {
	opts, ops := c.options("-t --target-directory")
	if len(ops) < 2 {
		return errors.New("a source and a destination are expected")
	}
	for _, from := range ops[:len(ops)-1] {
		if err := c.copy(from, ops[len(ops)-1], func(n *filetree.Node) {
			if !has(opts, "-a", "-p", "--preserve", "--archive") {
				n.UID, n.GID, n.ModTime = 0, 0, 0
			}
		}); err != nil {
			return err
		}
	}
	return nil
}

func (c *call) mv() error {
	ops := c.operands("-t --target-directory -S --suffix")
	if len(ops) != 2 {
		return errors.New("a source and a destination are expected")
	}
	src := c.t.Find(c.path(ops[0]), false)
	if src == nil {
		return fmt.Errorf("%q does not exist", ops[0])
	}
	dst := c.path(ops[1])
	if d := c.t.Find(dst, true); d != nil && d.Type == tar.TypeDir {
		dst = path.Join(dst, path.Base(ops[0]))
	}
	c.t.Remove(c.path(ops[0]))
	return c.t.Put(dst, src)
}

func (c *call) rm() error {
	opts, ops := c.options("")
	for _, p := range ops {
		n := c.t.Find(c.path(p), false)
		if n == nil && !has(opts, "-f", "--force") {
			return fmt.Errorf("%q does not exist", p)
		}
		if n != nil && n.Type == tar.TypeDir && !has(opts, "-r", "-R", "--recursive") {
			return fmt.Errorf("%q is a directory", p)
		}
		c.t.Remove(c.path(p))
	}
	return nil
}

func (c *call) rmdir() error {
	opts, ops := c.options("")
	for _, p := range ops {
		n := c.t.Find(c.path(p), false)
		if n == nil || n.Type != tar.TypeDir || len(n.Children) > 0 {
			if has(opts, "--ignore-fail-on-non-empty") && n != nil {
				continue
			}
			return fmt.Errorf("cannot remove %q", p)
		}
		c.t.Remove(c.path(p))
	}
	return nil
}

func (c *call) ln() error {
	opts, ops := c.options("-t -S")
	if len(ops) != 2 {
		return errors.New("a target and a name are expected")
	}
	dst := c.path(ops[1])
	if d := c.t.Find(dst, !has(opts, "-n", "-T")); d != nil && d.Type == tar.TypeDir {
		dst = path.Join(dst, path.Base(ops[0]))
	}
	if c.t.Find(dst, false) != nil && !has(opts, "-f", "--force") {
		return fmt.Errorf("%q exists", dst)
	}
	if has(opts, "-s", "--symbolic") {
		return c.t.Symlink(ops[0], dst)
	}
	n := c.t.Find(c.path(ops[0]), false)
	if n == nil {
		return fmt.Errorf("%q does not exist", ops[0])
	}
	return c.t.Put(dst, n)
}

func (c *call) touch() error {
	for _, p := range c.operands("-d -t -r --date --reference") {
		if c.t.Find(c.path(p), true) == nil {
			if err := c.t.WriteFile(c.path(p), "", 0o644); err != nil {
				return err
			}
		}
	}
	return nil
}

func (c *call) cat() error {
	ops := c.operands("")
	if len(ops) == 0 {
		ops = []string{"-"}
	}
	for _, p := range ops {
		if p == "-" {
			if c.hc.Stdin == nil {
				continue
			}
			if _, err := io.Copy(c.hc.Stdout, c.hc.Stdin); err != nil {
				return err
			}
			continue
		}
		b, err := c.t.ReadFile(c.path(p))
		if err != nil {
			return err
		}
		if _, err := c.hc.Stdout.Write(b); err != nil {
			return err
		}
	}
	return nil
}

func (c *call) readlink() error {
	opts, ops := c.options("")
	if len(ops) != 1 {
		return failed
	}
	if has(opts, "-f", "-e", "-m") {
		n, real := c.t.Walk(c.path(ops[0]), true)
		if n == nil && has(opts, "-e") {
			return failed
		}
		return c.print(real)
	}
	n := c.t.Find(c.path(ops[0]), false)
	if n == nil || n.Type != tar.TypeSymlink {
		return failed
	}
	return c.print(n.Link)
}

func (c *call) realpath() error {
	_, real := c.t.Walk(c.path(c.arg(0)), true)
	return c.print(real)
}

// grep knows basic use: options -q -s -E -F -i -v -x -o are read, the pattern is taken as an extended one.
func (c *call) grep() error {
	opts, ops := c.options("-e -m")
	pattern, ok := opts["-e"]
	if !ok {
		if len(ops) == 0 {
			return interp.ExitStatus(2)
		}
		pattern, ops = ops[0], ops[1:]
	}
	if has(opts, "-F") {
		pattern = regexp.QuoteMeta(pattern)
	}
	if has(opts, "-x") {
		pattern = "^(?:" + pattern + ")$"
	}
	if has(opts, "-i") {
		pattern = "(?i)" + pattern
	}
	re, err := regexp.Compile(pattern)
	if err != nil {
		return interp.ExitStatus(2)
	}
	var text []byte
	if len(ops) == 0 && c.hc.Stdin != nil {
		if text, err = io.ReadAll(c.hc.Stdin); err != nil {
			return err
		}
	}
	for _, p := range ops {
		b, err := c.t.ReadFile(c.path(p))
		if err != nil {
			return interp.ExitStatus(2)
		}
		text = append(text, b...)
	}
	found := false
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSuffix(line, "\n")
		if re.MatchString(line) == has(opts, "-v") {
			continue
		}
		found = true
		if has(opts, "-o") {
			line = re.FindString(line)
		}
		if !has(opts, "-q") {
			if err := c.print(line); err != nil {
				return err
			}
		}
	}
	if !found {
		return failed
	}
	return nil
}

// find is used by scripts to tidy up what an older version left, of which a new system has nothing.
func (c *call) find() error { return nil }

func (c *call) mktemp() error {
	for i := 0; ; i++ {
		p := fmt.Sprintf("/tmp/tmp.%d", i)
		if c.t.Find(p, false) != nil {
			continue
		}
		if has(first(c.options("-t -p")), "-d") {
			if err := c.t.Mkdir(p, 0o700, 0, 0); err != nil {
				return err
			}
		} else if err := c.t.WriteFile(p, "", 0o600); err != nil {
			return err
		}
		return c.print(p)
	}
}

func first[A, B any](a A, _ B) A { return a }

// dpkg answers what scripts ask of the package database: who owns a file, whether a package is there.
func (c *call) dpkg() error {
	opts, ops := c.options("-f --showformat")
	switch {
	case len(ops) == 1 && has(opts, "-S", "--search"):
		for _, d := range c.debs {
			if slices.ContainsFunc(d.files, func(f debFile) bool { return f.path == ops[0] }) {
				return c.print(d.Name + ": " + ops[0])
			}
		}
	case len(ops) == 1 && has(opts, "-s", "-W", "--status", "--show"):
		for _, d := range c.debs {
			if d.Name == ops[0] {
				return c.print(d.Version)
			}
		}
	case len(c.args) > 0 && c.args[0] == "--print-architecture":
		return c.print(c.arch)
	case len(c.args) == 4 && c.args[0] == "--compare-versions":
		if compareVersions(c.args[1], c.args[2], c.args[3]) {
			return nil
		}
	}
	return failed
}

// compareVersions is dpkg --compare-versions: an empty version is older than any, but for the operators ending in -nl,
// for which it is newer.
func compareVersions(a, op, b string) bool {
	op, newer := strings.CutSuffix(op, "-nl")
	var d int
	switch {
	case a == "" && b == "":
	case a == "" && newer, b == "" && !newer:
		d = 1
	case a == "" || b == "":
		d = -1
	default:
		va, errA := version.Parse(a)
		vb, errB := version.Parse(b)
		if errA != nil || errB != nil {
			return false
		}
		d = version.Compare(va, vb)
	}
	switch op {
	case "lt", "<<":
		return d < 0
	case "le", "<=", "<":
		return d <= 0
	case "eq", "=":
		return d == 0
	case "ne":
		return d != 0
	case "ge", ">=", ">":
		return d >= 0
	case "gt", ">>":
		return d > 0
	}
	return false
}

func (c *call) statoverride() error {
	opts, ops := c.options("")
	const file = "/var/lib/dpkg/statoverride"
	if has(opts, "--list") {
		text, _ := c.t.ReadFile(file) // none: nothing is overridden
		for line := range strings.Lines(string(text)) {
			if len(ops) == 0 || strings.HasSuffix(line, " "+ops[0]+"\n") {
				return c.print(strings.TrimSuffix(line, "\n"))
			}
		}
		return failed
	}
	if !has(opts, "--add") || len(ops) != 4 {
		return nil
	}
	if err := c.t.AppendFile(file, strings.Join(ops, " ")+"\n", 0o644); err != nil {
		return err
	}
	if c.t.Find(c.path(ops[3]), true) == nil {
		return nil
	}
	if err := c.chownTo(ops[0]+":"+ops[1], ops[3:], nil); err != nil {
		return err
	}
	mode, err := parseMode(ops[2], 0, false)
	c.t.Find(c.path(ops[3]), true).Mode = mode
	return err
}

// alternative is a name with several programs that can go by it, and names that follow its choice.
type alternative struct {
	links   [][2]string // name and link: the name itself, then its followers
	choices []alternativeChoice
}

type alternativeChoice struct {
	priority int
	paths    map[string]string // name → path
}

// alternatives is update-alternatives --install LINK NAME PATH PRIORITY [--slave LINK NAME PATH]…; the alternative of
// the highest priority wins. Other actions of the program have nothing to do on a new system.
func (c *call) alternatives() error {
	i := slices.Index(c.args, "--install")
	if i < 0 || i+4 >= len(c.args) {
		if slices.ContainsFunc(c.args, func(a string) bool { return slices.Contains([]string{"--query", "--list", "--display"}, a) }) {
			return failed
		}
		return nil
	}
	link, name, target := c.args[i+1], c.args[i+2], c.args[i+3]
	if c.alts == nil {
		c.alts = map[string]*alternative{}
	}
	alt := c.alts[name]
	if alt == nil {
		alt = &alternative{links: [][2]string{{name, link}}}
		c.alts[name] = alt
	}
	choice := alternativeChoice{number(c.args[i+4]), map[string]string{name: target}}
	for rest := c.args[i+5:]; len(rest) >= 4 && rest[0] == "--slave"; rest = rest[4:] {
		if c.t.Find(rest[3], true) == nil {
			continue // a manual page left out of the disk
		}
		if l := [2]string{rest[2], rest[1]}; !slices.Contains(alt.links, l) {
			alt.links = append(alt.links, l)
		}
		choice.paths[rest[2]] = rest[3]
	}
	alt.choices = append(alt.choices, choice)
	best := slices.MaxFunc(alt.choices, func(a, b alternativeChoice) int { return cmp.Compare(a.priority, b.priority) })

	// dpkg's own record: status, link, the followers' names and links; then path, priority and followers' paths of each.
	record := "auto\n" + link + "\n"
	for _, l := range alt.links[1:] {
		record += l[0] + "\n" + l[1] + "\n"
	}
	record += "\n"
	for _, ch := range alt.choices {
		record += fmt.Sprintf("%s\n%d\n", ch.paths[name], ch.priority)
		for _, l := range alt.links[1:] {
			record += ch.paths[l[0]] + "\n"
		}
	}
	for _, l := range alt.links {
		if best.paths[l[0]] == "" {
			c.t.Remove("/etc/alternatives/" + l[0])
			c.t.Remove(l[1])
			continue
		}
		if err := c.t.Symlink(best.paths[l[0]], "/etc/alternatives/"+l[0]); err != nil {
			return err
		}
		if err := c.t.Symlink("/etc/alternatives/"+l[0], l[1]); err != nil {
			return err
		}
	}
	return c.t.WriteFile("/var/lib/dpkg/alternatives/"+name, record+"\n", 0o644)
}

func (c *call) systemdHelper() error {
	opts, ops := c.options("")
	if len(ops) < 2 || has(opts, "--user") {
		return nil
	}
	switch ops[0] {
	case "enable":
		for _, unit := range ops[1:] {
			if err := enableUnit(c.t, unit); err != nil {
				return err
			}
		}
	case "debian-installed":
		return failed
	}
	return nil
}

func (c *call) systemctl() error {
	opts, ops := c.options("")
	if len(ops) < 2 || has(opts, "--user", "--global") {
		return nil
	}
	switch ops[0] {
	case "enable", "preset":
		for _, unit := range ops[1:] {
			if err := enableUnit(c.t, unit); err != nil {
				return err
			}
		}
	case "is-active", "is-enabled":
		return failed
	}
	return nil
}
