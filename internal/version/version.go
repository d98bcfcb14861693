// Package version says which Drafter this is: in --version, in packages and in what peers tell each other.
package version

import "runtime/debug"

const module = "github.com/drafter-vm/drafter"

// set is given by the linker: go build -ldflags '-X github.com/drafter-vm/drafter/internal/version.set=v1.2.3'.
var set string

// String returns the version: what the linker was told, else what Go knows of our module in this program, else "(devel)".
func String() string {
	if set != "" {
		return set
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "(devel)"
	}
	for _, m := range append(info.Deps, &info.Main) {
		if m.Path == module && m.Version != "" {
			return m.Version
		}
	}
	return "(devel)"
}
