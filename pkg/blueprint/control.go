package blueprint

import (
	"bytes"
	"iter"
	"strings"
)

// stanza is one paragraph of a Debian control file (deb822), kept as text: a package index has 60,000 of them of which
// a build looks at a hundred, so fields are found when asked for.
type stanza []byte

// stanzas yields the paragraphs of a control file. Lines of comment (#) are dropped.
func stanzas(data []byte) iter.Seq[stanza] {
	return func(yield func(stanza) bool) {
		for len(data) > 0 {
			var one []byte
			if i := bytes.Index(data, []byte("\n\n")); i >= 0 {
				one, data = data[:i+1], data[i+2:]
			} else {
				one, data = data, nil
			}
			if bytes.HasPrefix(one, []byte("#")) || bytes.Contains(one, []byte("\n#")) {
				var kept []byte
				for line := range bytes.Lines(one) {
					if line[0] != '#' {
						kept = append(kept, line...)
					}
				}
				one = kept
			}
			if len(bytes.TrimSpace(one)) == 0 {
				continue
			}
			if !yield(stanza(bytes.TrimLeft(one, "\n"))) {
				return
			}
		}
	}
}

// get returns the value of a field, "" where it is missing. The lines of a folded value are joined by "\n" and keep
// their leading space. Names compare without case.
func (s stanza) get(name string) string {
	for rest := []byte(s); len(rest) > 0; {
		line, after, _ := bytes.Cut(rest, []byte("\n"))
		rest = after
		if len(line) <= len(name) || line[len(name)] != ':' || !strings.EqualFold(string(line[:len(name)]), name) {
			continue
		}
		value := strings.TrimSpace(string(line[len(name)+1:]))
		for len(rest) > 0 && (rest[0] == ' ' || rest[0] == '\t') {
			line, after, _ = bytes.Cut(rest, []byte("\n"))
			rest = after
			value += "\n" + strings.TrimRight(string(line), " \t\r")
		}
		return value
	}
	return ""
}
