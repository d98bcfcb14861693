package blueprint

import (
	"bufio"
	"bytes"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Source is one place packages come from: one suite of one archive.
type Source struct {
	URI        string   // base of the archive, "http://deb.debian.org/debian", without a trailing slash
	Suite      string   // "bookworm", "bookworm-security"
	Components []string // "main"

	// SignedBy is the path of the keyring that must have signed the suite, or, where it holds a line break, an armored
	// key itself. Empty means the distribution's archive keyring.
	SignedBy string

	// optional sources were guessed from another one: an archive that lacks them is no error.
	optional bool
}

// String names the source as errors and progress show it.
func (s Source) String() string { return s.URI + " " + s.Suite }

// priority is what apt gives a package of this source: backports are used only where nothing else serves.
func (s Source) priority() int {
	if strings.HasSuffix(s.Suite, "-backports") {
		return 100
	}
	return 500
}

// defaultArchive serves hosts without a Debian apt configuration.
const defaultArchive = "http://deb.debian.org/debian"

// releases are the suites that tell a Debian source from one of another distribution or a third party.
var releases = []string{"bullseye", "bookworm", "trixie", "forky", "sid", "unstable", "testing", "stable", "oldstable"}

// pockets are the suffixes of the suites that complete a release, in the order they are asked.
var pockets = []string{"", "-updates", "-security", "-backports"}

// splitSuite splits "bookworm-security" (or the old "buster/updates" form) into release and pocket.
func splitSuite(suite string) (release, pocket string) {
	suite = strings.TrimSuffix(suite, "/updates")
	release, rest, ok := strings.Cut(suite, "-")
	if !ok {
		return release, ""
	}
	return release, "-" + rest
}

// findSources returns the sources of a release (its updates, security updates and backports among them) from the apt
// configuration in aptDir, or from mirror when it is set. What the configuration lacks is derived from what it has.
func findSources(aptDir, release, mirror string) ([]Source, error) {
	var configured []Source
	if mirror != "" {
		u, err := url.Parse(mirror)
		if err != nil || u.Host == "" && u.Scheme != "file" {
			return nil, fmt.Errorf("mirror %q is not a URL; give one such as %s", mirror, defaultArchive)
		}
		configured = []Source{{URI: strings.TrimSuffix(mirror, "/"), Suite: release, Components: []string{"main"}}}
	} else {
		var err error
		if configured, err = readSources(aptDir); err != nil {
			return nil, err
		}
	}
	return completeSources(configured, release), nil
}

// completeSources picks, for each pocket of the release, the configured source, or derives one.
func completeSources(configured []Source, release string) []Source {
	byPocket := map[string]Source{} // of any Debian release, the wanted one preferred
	for _, s := range configured {
		r, pocket := splitSuite(s.Suite)
		if !slices.Contains(releases, r) || !slices.Contains(pockets, pocket) || !strings.HasPrefix(s.URI, "http") && !strings.HasPrefix(s.URI, "file:") {
			continue
		}
		if have, ok := byPocket[pocket]; ok && (have.Suite == release+pocket || r != release) {
			continue
		}
		s.optional = r != release
		s.Suite = release + pocket
		byPocket[pocket] = s
	}
	base, ok := byPocket[""]
	if !ok {
		base = Source{URI: defaultArchive, Suite: release, Components: []string{"main"}}
	}
	base.optional = false
	byPocket[""] = base
	var out []Source
	for _, pocket := range pockets {
		s, ok := byPocket[pocket]
		if !ok {
			s = base
			s.Suite, s.optional = release+pocket, true
			if pocket == "-security" {
				s.URI += "-security" // as on deb.debian.org and its mirrors: …/debian, …/debian-security
			}
		}
		out = append(out, s)
	}
	return out
}

// readSources parses sources.list and sources.list.d of an apt configuration folder. A folder that is missing has none.
func readSources(aptDir string) ([]Source, error) {
	files := []string{filepath.Join(aptDir, "sources.list")}
	for _, pattern := range []string{"*.list", "*.sources"} {
		found, err := filepath.Glob(filepath.Join(aptDir, "sources.list.d", pattern))
		if err != nil {
			return nil, fmt.Errorf("list apt sources in %q: %w", aptDir, err)
		}
		files = append(files, found...)
	}
	var out []Source
	for _, name := range files {
		data, err := os.ReadFile(name)
		if os.IsNotExist(err) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read apt sources: %w", err)
		}
		if strings.HasSuffix(name, ".sources") {
			out = append(out, parseDeb822Sources(data)...)
		} else {
			out = append(out, parseSourcesList(data)...)
		}
	}
	return out, nil
}

// parseSourcesList parses the one-line format: "deb [options] uri suite component…". Lines it does not understand are
// skipped, as they are not ours to judge.
func parseSourcesList(data []byte) []Source {
	var out []Source
	lines := bufio.NewScanner(bytes.NewReader(data))
	for lines.Scan() {
		line, _, _ := strings.Cut(lines.Text(), "#")
		line, ok := strings.CutPrefix(strings.TrimSpace(line), "deb")
		if !ok || line == "" || line[0] != ' ' && line[0] != '\t' {
			continue
		}
		line = strings.TrimSpace(line)
		var signedBy string
		if strings.HasPrefix(line, "[") {
			options, rest, ok := strings.Cut(line[1:], "]")
			if !ok {
				continue
			}
			for _, option := range strings.Fields(options) {
				if v, ok := strings.CutPrefix(option, "signed-by="); ok {
					signedBy = v
				}
			}
			line = rest
		}
		fields := strings.Fields(line)
		if len(fields) < 3 {
			continue
		}
		out = append(out, Source{URI: strings.TrimSuffix(fields[0], "/"), Suite: fields[1], Components: fields[2:], SignedBy: signedBy})
	}
	return out
}

// parseDeb822Sources parses the stanza format of *.sources files.
func parseDeb822Sources(data []byte) []Source {
	var out []Source
	for st := range stanzas(data) {
		if !slices.Contains(strings.Fields(st.get("Types")), "deb") || strings.EqualFold(st.get("Enabled"), "no") {
			continue
		}
		signedBy := st.get("Signed-By")
		if strings.Contains(signedBy, "\n") { // an inline key: folded lines, " ." for empty ones
			lines := strings.Split(strings.TrimSpace(signedBy), "\n")
			for i, l := range lines {
				if lines[i] = strings.TrimSpace(l); lines[i] == "." {
					lines[i] = ""
				}
			}
			signedBy = strings.Join(lines, "\n") + "\n"
		}
		for _, uri := range strings.Fields(st.get("URIs")) {
			for _, suite := range strings.Fields(st.get("Suites")) {
				components := strings.Fields(st.get("Components"))
				if len(components) == 0 {
					continue // a flat repository
				}
				out = append(out, Source{URI: strings.TrimSuffix(uri, "/"), Suite: suite, Components: components, SignedBy: signedBy})
			}
		}
	}
	return out
}
