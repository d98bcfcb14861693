package blueprint

import (
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/drafter-vm/drafter/pkg/filetree"
)

// users edits the account files of a tree: passwd, group, shadow and gshadow in /etc.
type users struct{ t *filetree.Tree }

// seed makes the account files of a fresh system from what package base-passwd holds.
func (u users) seed() error {
	passwd, err := u.t.ReadFile("/usr/share/base-passwd/passwd.master")
	if err != nil {
		return fmt.Errorf("make accounts: %w", err)
	}
	group, err := u.t.ReadFile("/usr/share/base-passwd/group.master")
	if err != nil {
		return fmt.Errorf("make accounts: %w", err)
	}
	// In the masters "*" stands for the password, which lives in the shadow files.
	var shadow, gshadow strings.Builder
	for line := range strings.Lines(string(passwd)) {
		if name, _, ok := strings.Cut(line, ":"); ok {
			fmt.Fprintf(&shadow, "%s:*:%d:0:99999:7:::\n", name, shadowDay)
		}
	}
	for line := range strings.Lines(string(group)) {
		if name, _, ok := strings.Cut(line, ":"); ok {
			fmt.Fprintf(&gshadow, "%s:*::\n", name)
		}
	}
	for _, f := range []struct {
		path, text string
		mode       uint32
	}{
		{"/etc/passwd", strings.ReplaceAll(string(passwd), ":*:", ":x:"), 0o644},
		{"/etc/group", strings.ReplaceAll(string(group), ":*:", ":x:"), 0o644},
		{"/etc/shadow", shadow.String(), 0o640},
		{"/etc/gshadow", gshadow.String(), 0o640},
	} {
		if err := u.t.WriteFile(f.path, f.text, f.mode); err != nil {
			return err
		}
		if f.mode == 0o640 {
			u.t.Find(f.path, true).GID = 42 // shadow, fixed by base-passwd
		}
	}
	return nil
}

// shadowDay is the "last changed" day of passwords, in days since 1970: fixed, as builds are reproducible.
const shadowDay = 19700

// entry returns the fields of an account by its name or number, nil if there is none.
func (u users) entry(file, key string) []string {
	data, _ := u.t.ReadFile(file) // none: no accounts
	for line := range strings.Lines(string(data)) {
		f := strings.Split(strings.TrimRight(line, "\n"), ":")
		if len(f) > 2 && (f[0] == key || f[2] == key) {
			return f
		}
	}
	return nil
}

// uid and gid return the number of a user or group given by name or number.
func (u users) uid(name string) (int, bool) { return u.id("/etc/passwd", name) }
func (u users) gid(name string) (int, bool) { return u.id("/etc/group", name) }

func (u users) id(file, name string) (int, bool) {
	if e := u.entry(file, name); e != nil {
		n, err := strconv.Atoi(e[2])
		return n, err == nil
	}
	n, err := strconv.Atoi(name)
	return n, err == nil && n >= 0
}

// freeID returns the number asked for or, if want < 0, the first free one in [low, high], used neither by a user nor by
// a group, so that both can have the same.
func (u users) freeID(want, low, high int) (int, error) {
	if want >= 0 {
		return want, nil
	}
	for id := low; id <= high; id++ {
		if s := strconv.Itoa(id); u.entry("/etc/passwd", s) == nil && u.entry("/etc/group", s) == nil {
			return id, nil
		}
	}
	return 0, fmt.Errorf("no account number between %d and %d is free", low, high)
}

// account describes a user or group to add.
type account struct {
	name, comment, home, shell string
	id                         int // -1: the next free one
	group                      int // primary group; -1: one of the same name is made
	regular                    bool
}

func (a account) idRange() (low, high int) {
	if a.regular {
		return 1000, 59999
	}
	return 100, 999
}

func (u users) addGroup(name string, id int, regular bool) (int, error) {
	if gid, ok := u.gid(name); ok && u.entry("/etc/group", name) != nil {
		return gid, nil
	}
	if !validAccount(name) {
		return 0, fmt.Errorf("group name %q is not valid", name)
	}
	low, high := account{regular: regular}.idRange()
	id, err := u.freeID(id, low, high)
	if err != nil {
		return 0, err
	}
	if err := u.t.AppendFile("/etc/group", fmt.Sprintf("%s:x:%d:\n", name, id), 0o644); err != nil {
		return 0, err
	}
	return id, u.t.AppendFile("/etc/gshadow", name+":!::\n", 0o640)
}

func (u users) addUser(a account) error {
	if u.entry("/etc/passwd", a.name) != nil {
		return nil
	}
	if !validAccount(a.name) || strings.ContainsAny(a.comment+a.home+a.shell, ":\n") {
		return fmt.Errorf("account %q is not valid", a.name)
	}
	low, high := a.idRange()
	id, err := u.freeID(a.id, low, high)
	if err != nil {
		return err
	}
	if a.group < 0 {
		if a.group, err = u.addGroup(a.name, id, a.regular); err != nil {
			return err
		}
	}
	if a.home == "" {
		a.home = "/nonexistent"
	}
	if a.shell == "" {
		a.shell = "/usr/sbin/nologin"
	}
	if err := u.t.AppendFile("/etc/passwd", fmt.Sprintf("%s:x:%d:%d:%s:%s:%s\n", a.name, id, a.group, a.comment, a.home, a.shell), 0o644); err != nil {
		return err
	}
	return u.t.AppendFile("/etc/shadow", fmt.Sprintf("%s:!:%d::::::\n", a.name, shadowDay), 0o640)
}

// addMember puts a user into a group.
func (u users) addMember(user, group string) error {
	data, err := u.t.ReadFile("/etc/group")
	if err != nil {
		return err
	}
	lines := strings.Split(string(data), "\n")
	for i, line := range lines {
		f := strings.Split(line, ":")
		if len(f) != 4 || f[0] != group {
			continue
		}
		members := strings.FieldsFunc(f[3], func(r rune) bool { return r == ',' })
		if !slices.Contains(members, user) {
			f[3] = strings.Join(append(members, user), ",")
			lines[i] = strings.Join(f, ":")
		}
		return u.t.WriteFile("/etc/group", strings.Join(lines, "\n"), 0o644)
	}
	return fmt.Errorf("group %q does not exist", group)
}

// setPassword sets the password field of a user; empty asks for none.
func (u users) setPassword(user, hash string) error {
	data, err := u.t.ReadFile("/etc/shadow")
	if err != nil {
		return err
	}
	lines := strings.Split(string(data), "\n")
	for i, line := range lines {
		if f := strings.Split(line, ":"); len(f) > 2 && f[0] == user {
			f[1] = hash
			lines[i] = strings.Join(f, ":")
		}
	}
	u.t.Find("/etc/shadow", true).Content = filetree.Bytes([]byte(strings.Join(lines, "\n")))
	return nil
}

func validAccount(name string) bool {
	if name == "" || len(name) > 32 || name[0] == '-' {
		return false
	}
	for i := range len(name) {
		c := name[i]
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte("_-.", c) >= 0) {
			return false
		}
	}
	return true
}

// sysusers carries out a sysusers.d file (man sysusers.d): lines of type u, g and m.
func (u users) sysusers(text string) error {
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		f := shellFields(line)
		for len(f) < 6 {
			f = append(f, "-")
		}
		opt := func(i int) string {
			if f[i] == "-" {
				return ""
			}
			return f[i]
		}
		number := func(s string) int {
			if n, err := strconv.Atoi(s); err == nil {
				return n
			}
			return -1
		}
		var err error
		switch strings.TrimRight(f[0], "!") {
		case "g":
			_, err = u.addGroup(f[1], number(f[2]), false)
		case "u":
			a := account{name: f[1], comment: opt(3), home: opt(4), shell: opt(5), id: -1, group: -1}
			id, group, both := strings.Cut(opt(2), ":")
			a.id = number(id)
			if both {
				if gid, ok := u.gid(group); ok {
					a.group = gid
				}
			}
			if a.home == "" {
				a.home = "/"
			}
			err = u.addUser(a)
		case "m":
			if _, err = u.addGroup(f[2], -1, false); err == nil {
				if err = u.addUser(account{name: f[1], id: -1, group: -1}); err == nil {
					err = u.addMember(f[1], f[2])
				}
			}
		}
		if err != nil {
			return fmt.Errorf("sysusers line %q: %w", line, err)
		}
	}
	return nil
}

// shellFields splits a line at blanks outside double or single quotes.
func shellFields(line string) []string {
	var out []string
	var b strings.Builder
	var quote byte
	in := false
	for i := range len(line) {
		c := line[i]
		switch {
		case quote != 0 && c == quote:
			quote = 0
		case quote == 0 && (c == '"' || c == '\''):
			quote, in = c, true
		case quote == 0 && (c == ' ' || c == '\t'):
			if in {
				out, in = append(out, b.String()), false
				b.Reset()
			}
		default:
			b.WriteByte(c)
			in = true
		}
	}
	if in {
		out = append(out, b.String())
	}
	return out
}

// addSystemUsers carries out all sysusers.d files of the tree.
func (u users) addSystemUsers(names ...string) error {
	return u.t.Each("/usr/lib/sysusers.d", func(p string, n *filetree.Node) error {
		if path.Ext(p) != ".conf" || len(names) > 0 && !slices.Contains(names, path.Base(p)) {
			return nil
		}
		text, err := u.t.ReadFile(p)
		if err != nil {
			return err
		}
		return u.sysusers(string(text))
	})
}
