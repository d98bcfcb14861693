package transport

import "strings"

const (
	commandPrefix = "exec:"
	stdioAddress  = "stdio:"
)

// Scheme is the scheme of an address, in lower case: "tcp" where none is written. It need not be one that there is.
func Scheme(address string) string {
	name, _ := cut(address)
	return name
}

// cut takes an address apart at its scheme.
func cut(address string) (name, rest string) {
	if n := len(commandPrefix); len(address) >= n && strings.EqualFold(address[:n], commandPrefix) {
		return "exec", address[n:]
	}
	if strings.EqualFold(address, stdioAddress) {
		return "stdio", ""
	}
	if name, rest, ok := strings.Cut(address, "://"); ok && isScheme(name) {
		return strings.ToLower(name), rest
	}
	return "tcp", address
}

// isScheme reports whether a name is written as that of a scheme (RFC 3986, 3.1). What is not may be a part of a password.
func isScheme(name string) bool {
	for i, c := range []byte(strings.ToLower(name)) {
		if letter := 'a' <= c && c <= 'z'; !letter && (i == 0 || !('0' <= c && c <= '9') && c != '+' && c != '-' && c != '.') {
			return false
		}
	}
	return name != ""
}

// Redacted is an address for people and logs: without the password that somebody may have written into it, although none is taken
// there. It needs no address that is right, and hides too much of a wrong one rather than too little. What exec: starts is shown as it
// is, as whoever lists processes sees it too.
func Redacted(address string) string {
	name, rest := cut(address)
	if name == "unix" || name == "exec" {
		return address
	}
	authority, path := rest, ""
	if i := strings.IndexAny(rest, "/?#"); i >= 0 {
		authority, path = rest[:i], rest[i:]
	}
	user, host := "", authority
	if at := strings.LastIndex(authority, "@"); at >= 0 {
		user, host = authority[:at], authority[at+1:]
	}
	target, _, _ := strings.Cut(path, "?")
	if !strings.Contains(user, ":") && isHostPort(host) && (name != "ssh" || !strings.Contains(target, "@")) {
		return address // an @ may be further on, in the path
	}
	at, colon := strings.LastIndex(rest, "@"), strings.Index(rest, ":")
	if at < 0 || colon < 0 || colon > at {
		return address
	}
	return address[:len(address)-len(rest)] + rest[:colon+1] + "***" + rest[at:]
}

// isHostPort reports whether s looks like a host, with the number of a port or without.
func isHostPort(s string) bool {
	if end := strings.Index(s, "]"); strings.HasPrefix(s, "[") && end > 0 {
		s = s[end+1:]
	} else if end := strings.Index(s, ":"); end >= 0 {
		s = s[end:]
	} else {
		return true
	}
	return s == "" || s[0] == ':' && strings.Trim(s[1:], "0123456789") == ""
}
