package blueprint

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"strings"

	"pault.ag/go/debian/dependency"
	"pault.ag/go/debian/version"
)

// Package is one version of a binary package, exactly: what a lock file holds a line of.
type Package struct {
	Name    string // as Debian has it
	Version string // the same
	Arch    string // "amd64" or "all"
	SHA256  string // of the .deb, lower-case hex
	Size    int64  // of the .deb, bytes
	Suite   string // that serves it, "bookworm-security"
	Path    string // of the .deb below the base of the suite's archive
}

func (p Package) String() string { return p.Name + " " + p.Version }

// candidate is a package that an index offers.
type candidate struct {
	Package
	version  version.Version
	priority int
	control  stanza
}

// index is everything the sources offer, by name.
type index struct {
	packages map[string][]*candidate // best first: priority, then version
	provides map[string][]provider   // virtual package → who provides it
}

type provider struct {
	*candidate
	version string // of the virtual package; empty: unversioned
}

// fetchIndex downloads and reads the package indexes of all sources.
func (c *cache) fetchIndex(ctx context.Context, sources []Source, arch string, log *slog.Logger, progress func(done, total int64)) (*index, error) {
	ix := &index{packages: map[string][]*candidate{}, provides: map[string][]provider{}}
	var done int64
	for _, s := range sources {
		r, err := c.fetchRelease(ctx, s)
		if s.optional && errors.Is(err, errNotServed) {
			log.Info("source is not served, going on without it", "source", s.String())
			continue
		}
		if err != nil {
			return nil, err
		}
		for _, component := range s.Components {
			text, err := c.fetchPackages(ctx, r, component, arch, func(n int64) { done += n; progress(done, -1) })
			if err != nil {
				return nil, err
			}
			if err := ix.add(text, s); err != nil {
				return nil, fmt.Errorf("read package index of %s %s: %w", s, component, err)
			}
		}
	}
	ix.sort()
	return ix, nil
}

// add takes in the text of one Packages file.
func (ix *index) add(text []byte, s Source) error {
	for st := range stanzas(text) {
		v, err := version.Parse(st.get("Version"))
		if err != nil {
			return fmt.Errorf("package %q: %w", st.get("Package"), err)
		}
		size, err := strconv.ParseInt(st.get("Size"), 10, 64)
		if err != nil {
			return fmt.Errorf("package %q has size %q", st.get("Package"), st.get("Size"))
		}
		c := &candidate{
			Package: Package{
				Name: st.get("Package"), Version: st.get("Version"), Arch: st.get("Architecture"), SHA256: st.get("SHA256"),
				Size: size, Suite: s.Suite, Path: st.get("Filename"),
			},
			version: v, priority: s.priority(), control: st,
		}
		ix.packages[c.Name] = append(ix.packages[c.Name], c)
		if p := st.get("Provides"); p != "" {
			for r := range relations(p) {
				for _, name := range r.Possibilities {
					v := ""
					if name.Version != nil {
						v = name.Version.Number
					}
					ix.provides[name.Name] = append(ix.provides[name.Name], provider{c, v})
				}
			}
		}
	}
	return nil
}

func (ix *index) sort() {
	better := func(a, b *candidate) int {
		return cmp.Or(cmp.Compare(b.priority, a.priority), version.Compare(b.version, a.version), strings.Compare(a.Suite, b.Suite))
	}
	for _, list := range ix.packages {
		slices.SortStableFunc(list, better)
	}
	for _, list := range ix.provides {
		slices.SortStableFunc(list, func(a, b provider) int {
			// mawk, which every Debian system has, before gawk
			return cmp.Or(cmp.Compare(importance(a.control), importance(b.control)), strings.Compare(a.Name, b.Name), better(a.candidate, b.candidate))
		})
	}
}

// importance orders packages by their Priority field: required first.
func importance(control stanza) int {
	order := []string{"required", "important", "standard", "optional"}
	if i := slices.Index(order, control.get("Priority")); i >= 0 {
		return i
	}
	return len(order)
}

// relations yields the comma-separated parts of a relationship field. A part that cannot be parsed ends it: indexes are
// signed, so this is for robustness, not for safety.
func relations(field string) func(yield func(dependency.Relation) bool) {
	return func(yield func(dependency.Relation) bool) {
		dep, err := dependency.Parse(strings.ReplaceAll(field, "\n", " "))
		if err != nil {
			return
		}
		for _, r := range dep.Relations {
			if !yield(r) {
				return
			}
		}
	}
}

// want is one thing that must be installed: a package by name, possibly from one suite or in one version.
type want struct {
	name, suite, version string
	by                   string // who wants it, for errors
}

// parseWant parses NAME, NAME/SUITE or NAME=VERSION, the ways apt names a package.
func parseWant(s string) (want, error) {
	w := want{by: "the blueprint"}
	w.name, w.version, _ = strings.Cut(s, "=")
	if w.version == "" {
		w.name, w.suite, _ = strings.Cut(s, "/")
	}
	if !validName(w.name) || strings.HasSuffix(s, "=") || strings.HasSuffix(s, "/") {
		return want{}, fmt.Errorf("package %q is not a package name; give NAME, NAME/SUITE or NAME=VERSION", s)
	}
	return w, nil
}

func validName(s string) bool {
	if len(s) < 2 {
		return false
	}
	for i := range len(s) {
		c := s[i]
		if !(c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || i > 0 && (c == '+' || c == '-' || c == '.')) {
			return false
		}
	}
	return true
}

// resolver chooses a version of everything that is wanted. It is greedy: the best candidate that fits every demand seen
// so far; a demand that a choice already made does not meet is remembered and the whole begins anew, which ends, because
// demands only grow. It never goes back on an alternative, which the archive's "default first" rule makes unnecessary.
type resolver struct {
	ix      *index
	prefer  map[string]string // name → sha256 of the .deb that a lock file holds
	demands map[string][]demand
	chosen  map[string]*candidate
	order   []*candidate // dependencies before dependents, as far as there are no cycles
}

type demand struct {
	dependency.VersionRelation
	by string
}

var errRestart = errors.New("a demand was added")

// resolve returns what to install for the wants, dependencies first. Recommendations are not followed.
func (ix *index) resolve(wants []want, prefer map[string]string, demands map[string][]demand) ([]*candidate, error) {
	r := &resolver{ix: ix, prefer: prefer, demands: map[string][]demand{}}
	for name, d := range demands {
		r.demands[name] = slices.Clone(d)
	}
	for range 100 {
		r.chosen, r.order = map[string]*candidate{}, nil
		err := r.run(wants)
		if err == nil {
			return r.order, r.checkConflicts()
		}
		if !errors.Is(err, errRestart) {
			return nil, err
		}
	}
	return nil, errors.New("the packages' demands on versions do not settle: please report the list of packages")
}

func (r *resolver) run(wants []want) error {
	// The roots first: what is asked for by name decides between alternatives.
	for _, w := range wants {
		c, err := r.root(w)
		if err != nil {
			return err
		}
		r.chosen[c.Name] = c
	}
	visited := map[string]bool{}
	for _, w := range wants {
		name := w.name
		if r.chosen[name] == nil {
			name = r.ix.provides[name][0].Name
		}
		if err := r.visit(r.chosen[name], visited); err != nil {
			return err
		}
	}
	return nil
}

// root finds the candidate for something asked for by name.
func (r *resolver) root(w want) (*candidate, error) {
	list := r.ix.packages[w.name]
	if len(list) == 0 {
		if p := r.ix.provides[w.name]; len(p) > 0 {
			return r.root(want{name: p[0].Name, by: w.by})
		}
		return nil, fmt.Errorf("package %q is unknown%s", w.name, r.ix.suggest(w.name))
	}
	if w.suite == "" && w.version == "" {
		if c := r.pick(w.name); c != nil {
			return c, nil
		}
		return nil, r.unmet(w.name)
	}
	var have []string
	for _, c := range list {
		if w.suite == c.Suite || w.version != "" && w.version == c.Version {
			return c, nil
		}
		have = append(have, c.Version+" ("+c.Suite+")")
	}
	return nil, fmt.Errorf("package %q is not served as %q; there are %s", w.name, w.name+cmp.Or(prefixed("/", w.suite), prefixed("=", w.version)), strings.Join(have, ", "))
}

func prefixed(prefix, s string) string {
	if s == "" {
		return ""
	}
	return prefix + s
}

// pick returns the best candidate that meets all demands on the name; the locked one is best of all.
func (r *resolver) pick(name string) *candidate {
	var best *candidate
	for _, c := range r.ix.packages[name] {
		if !r.meets(c) {
			continue
		}
		if c.SHA256 == r.prefer[name] {
			return c
		}
		if best == nil {
			best = c
		}
	}
	return best
}

func (r *resolver) meets(c *candidate) bool {
	for _, d := range r.demands[c.Name] {
		if !d.SatisfiedBy(c.version) {
			return false
		}
	}
	return true
}

func (r *resolver) unmet(name string) error {
	var demands, have []string
	for _, d := range r.demands[name] {
		demands = append(demands, fmt.Sprintf("%s %s (by %s)", d.Operator, d.Number, d.by))
	}
	for _, c := range r.ix.packages[name] {
		have = append(have, c.Version+" ("+c.Suite+")")
	}
	return fmt.Errorf("no version of package %q is %s; there are %s", name, strings.Join(demands, " and "), strings.Join(have, ", "))
}

func (r *resolver) visit(c *candidate, visited map[string]bool) error {
	if visited[c.Name] {
		return nil
	}
	visited[c.Name] = true
	for _, field := range []string{"Pre-Depends", "Depends"} {
		for rel := range relations(c.control.get(field)) {
			dep, err := r.satisfy(rel, c)
			if err != nil {
				return err
			}
			if err := r.visit(dep, visited); err != nil {
				return err
			}
		}
	}
	r.order = append(r.order, c)
	return nil
}

// satisfy makes sure that one of the alternatives of a dependency is chosen, and returns it.
func (r *resolver) satisfy(rel dependency.Relation, by *candidate) (*candidate, error) {
	// An alternative that is chosen already, by its name or by what it provides.
	for _, p := range rel.Possibilities {
		if c := r.chosen[p.Name]; c != nil && satisfiedBy(p.Version, c.Version) {
			return c, nil
		}
		for _, v := range r.ix.provides[p.Name] {
			if r.chosen[v.Name] == v.candidate && providesVersion(p.Version, v.version) {
				return v.candidate, nil
			}
		}
	}
	var firstErr error
	for _, p := range rel.Possibilities {
		if len(r.ix.packages[p.Name]) > 0 {
			if p.Version != nil && !slices.ContainsFunc(r.demands[p.Name], func(d demand) bool { return d.VersionRelation == *p.Version }) {
				// Demands outlive the attempt only if some candidate can meet them.
				r.demands[p.Name] = append(r.demands[p.Name], demand{*p.Version, by.String()})
				if r.pick(p.Name) == nil {
					firstErr = cmp.Or(firstErr, r.unmet(p.Name))
					r.demands[p.Name] = r.demands[p.Name][:len(r.demands[p.Name])-1]
					continue
				}
				if r.chosen[p.Name] != nil {
					return nil, errRestart
				}
			}
			c := r.pick(p.Name)
			if c == nil {
				firstErr = cmp.Or(firstErr, r.unmet(p.Name))
				continue
			}
			r.chosen[p.Name] = c
			return c, nil
		}
		for _, v := range r.ix.provides[p.Name] {
			if r.chosen[v.Name] == nil && providesVersion(p.Version, v.version) && r.meets(v.candidate) {
				r.chosen[v.Name] = v.candidate
				return v.candidate, nil
			}
		}
	}
	if firstErr != nil {
		return nil, fmt.Errorf("package %s: %w", by, firstErr)
	}
	return nil, fmt.Errorf("package %s depends on %q, which no source has", by, rel.String())
}

func satisfiedBy(rel *dependency.VersionRelation, v string) bool {
	if rel == nil {
		return true
	}
	parsed, err := version.Parse(v)
	return err == nil && rel.SatisfiedBy(parsed)
}

// providesVersion tells whether a provided name meets a demand: an unversioned one meets only an unversioned demand.
func providesVersion(rel *dependency.VersionRelation, v string) bool {
	return rel == nil || v != "" && satisfiedBy(rel, v)
}

// checkConflicts refuses a choice that dpkg would refuse.
func (r *resolver) checkConflicts() error {
	for _, c := range r.order {
		for _, field := range []string{"Conflicts", "Breaks"} {
			for rel := range relations(c.control.get(field)) {
				for _, p := range rel.Possibilities {
					other := r.chosen[p.Name]
					if other == nil || other == c || !satisfiedBy(p.Version, other.Version) {
						continue
					}
					return fmt.Errorf("packages %s and %s cannot be installed together: the first declares %s: %s", c, other, field, p.String())
				}
			}
		}
	}
	return nil
}

// essential returns the names of the packages that every Debian system has, sorted.
func (ix *index) essential() []string {
	var out []string
	for name, list := range ix.packages {
		if list[0].control.get("Essential") == "yes" {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return out
}

// kernel returns the package of the kernel that name, a kernel's package or a meta package, stands for. Its dependencies
// (a program to make an initrd, a boot loader's hooks) are not wanted: the kernel is not part of the disk.
func (ix *index) kernel(name string, prefer map[string]string) (*candidate, error) {
	w, err := parseWant(name)
	if err != nil {
		return nil, err
	}
	r := &resolver{ix: ix, prefer: prefer}
	for locked := range prefer { // the kernel that the meta package named when the lock was made
		if c := r.pick(locked); c != nil && c.SHA256 == prefer[locked] && w.version == "" {
			if meta, err := r.root(w); err == nil && strings.Contains(meta.control.get("Depends"), locked) {
				return c, nil
			}
		}
	}
	for range 4 {
		c, err := r.root(w)
		if err != nil {
			return nil, err
		}
		next := ""
		for rel := range relations(c.control.get("Depends")) {
			if p := rel.Possibilities[0]; strings.HasPrefix(p.Name, "linux-image-") {
				next = p.Name
			}
		}
		if next == "" {
			return c, nil
		}
		w = want{name: next, by: c.String()}
	}
	return nil, fmt.Errorf("package %q leads to no kernel; choose another with --kernel-package", name)
}

// suggest returns a hint with the known names nearest to one that is not.
func (ix *index) suggest(name string) string {
	type near struct {
		name string
		d    int
	}
	var found []near
	for other := range ix.packages {
		d := editDistance(name, other)
		if strings.HasPrefix(other, name) || strings.Contains(name, other) && len(other) > 3 {
			d = min(d, 2)
		}
		if d <= max(2, len(name)/4) {
			found = append(found, near{other, d})
		}
	}
	if len(found) == 0 {
		return " to every source; check its name, and --suite and --mirror"
	}
	slices.SortFunc(found, func(a, b near) int {
		return cmp.Or(cmp.Compare(a.d, b.d), cmp.Compare(len(a.name), len(b.name)), strings.Compare(a.name, b.name))
	})
	names := make([]string, 0, 3)
	for _, n := range found[:min(3, len(found))] {
		names = append(names, strconv.Quote(n.name))
	}
	return "; did you mean " + strings.Join(names, " or ") + "?"
}

// editDistance is Levenshtein's, over bytes, given up at 6.
func editDistance(a, b string) int {
	const far = 6
	if len(a)-len(b) > far || len(b)-len(a) > far {
		return far
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			next := min(row[j+1]+1, row[j]+1, diagonal+cost)
			diagonal, row[j+1] = row[j+1], next
		}
	}
	return row[len(b)]
}
