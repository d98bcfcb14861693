package blueprint

import (
	"fmt"
	"path"
	"strings"

	"github.com/drafter-vm/drafter/pkg/filetree"
)

// unitDirs are where systemd finds units, most important first.
var unitDirs = []string{"/etc/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system"}

// findUnit returns the path of a unit's file; for an instance, that of its template.
func findUnit(t *filetree.Tree, name string) string {
	names := []string{name}
	if prefix, rest, ok := strings.Cut(name, "@"); ok {
		names = append(names, prefix+"@"+path.Ext(rest))
	}
	for _, n := range names {
		for _, dir := range unitDirs {
			if t.Find(dir+"/"+n, true) != nil {
				return dir + "/" + n
			}
		}
	}
	return ""
}

// enableUnit does what `systemctl enable` does: it makes the links that the unit's [Install] section names.
func enableUnit(t *filetree.Tree, name string) error { return enableUnits(t, map[string]bool{}, name) }

func enableUnits(t *filetree.Tree, seen map[string]bool, name string) error {
	if seen[name] {
		return nil
	}
	seen[name] = true
	file := findUnit(t, name)
	if file == "" {
		return fmt.Errorf("enable unit %q: there is no such unit", name)
	}
	text, err := t.ReadFile(file)
	if err != nil {
		return fmt.Errorf("enable unit %q: %w", name, err)
	}
	install := iniSection(string(text), "Install")
	if i := strings.Index(name, "@."); i >= 0 {
		if len(install["DefaultInstance"]) == 0 {
			return nil
		}
		name = name[:i+1] + install["DefaultInstance"][0] + name[i+1:]
	}
	instance := ""
	if prefix, rest, ok := strings.Cut(name, "@"); ok {
		_ = prefix
		instance = strings.TrimSuffix(rest, path.Ext(rest))
	}
	expand := func(s string) string { return strings.NewReplacer("%i", instance, "%n", name, "%%", "%").Replace(s) }
	for key, suffix := range map[string]string{"WantedBy": ".wants", "RequiredBy": ".requires"} {
		for _, target := range install[key] {
			if err := t.Symlink(file, "/etc/systemd/system/"+expand(target)+suffix+"/"+name); err != nil {
				return err
			}
		}
	}
	for _, alias := range install["Alias"] {
		if err := t.Symlink(file, "/etc/systemd/system/"+expand(alias)); err != nil {
			return err
		}
	}
	for _, also := range install["Also"] {
		if err := enableUnits(t, seen, expand(also)); err != nil {
			return err
		}
	}
	return nil
}

// maskUnit makes sure that a unit never starts.
func maskUnit(t *filetree.Tree, name string) error {
	return t.Symlink("/dev/null", "/etc/systemd/system/"+name)
}

// iniSection returns the settings of one section, their values split at blanks.
func iniSection(text, section string) map[string][]string {
	out := map[string][]string{}
	in := false
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if strings.HasPrefix(line, "[") {
			in = line == "["+section+"]"
			continue
		}
		if key, value, ok := strings.Cut(line, "="); in && ok && !strings.HasPrefix(line, "#") && !strings.HasPrefix(line, ";") {
			key = strings.TrimSpace(key)
			out[key] = append(out[key], strings.Fields(value)...)
		}
	}
	return out
}
