// Package deptest holds the table of which room may import which. A room is a folder of pkg with its subfolders.
package deptest

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/drafter-vm/drafter/"

// mayImport says which rooms each room may import. Tests are held to it too, but may import their own room's suites.
var mayImport = map[string][]string{
	"block":     {},
	"wire":      {},
	"vmm":       {}, // and so vmm/qemu: vmm
	"agent":     {},
	"transport": {},
	"filetree":  {},
	"blueprint": {"filetree"},
	"oci":       {"block", "filetree"},
	"nat":       {},
	"forward":   {"nat"},
	"flow":      {"nat"},
	"ram":       {"block"},
	"expose":    {"block"},
	"vmpackage": {"block"},
	"objstore":  {"block"},
	"migrate":   {"block", "wire"},
	"control":   {"migrate"},
	"runner":    {"block", "ram", "expose", "vmm", "agent"},
	"snapshot":  {"block", "blueprint", "runner", "vmm", "vmpackage"},
	"depot":     {"block", "migrate", "objstore", "peer", "runner", "vmpackage", "wire"},
	"registry":  {"block", "peer", "runner", "vmpackage"},
	"peer":      {"agent", "block", "expose", "migrate", "runner", "transport", "vmm", "vmpackage", "wire"},
}

// onlyIn says which outside libraries enter only in one room, or a few (or in cmd and internal, which may use anything).
var onlyIn = map[string]string{
	"github.com/hanwen/go-fuse":              "expose",
	"github.com/vishvananda/netlink":         "nat forward flow agent",
	"github.com/google/nftables":             "nat",
	"github.com/containerd/ttrpc":            "agent",
	"github.com/quic-go/":                    "transport",
	"github.com/coder/websocket":             "transport",
	"github.com/flynn/noise":                 "transport",
	"github.com/prometheus/":                 "control",
	"github.com/minio/minio-go":              "objstore",
	"oras.land/oras-go":                      "registry",
	"github.com/opencontainers/":             "registry oci",
	"github.com/google/go-containerregistry": "oci",
	"github.com/spf13/cobra":                 "",
	"github.com/schollz/progressbar/":        "",
}

// chooser is the part of a backend that only cmd may name.
const backends = "pkg/vmm/"

type pkg struct {
	ImportPath                         string
	Imports, TestImports, XTestImports []string
}

func list(t *testing.T) []pkg {
	t.Helper()
	out, err := exec.Command("go", "list", "-json=ImportPath,Imports,TestImports,XTestImports", module+"...").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var all []pkg
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pkg
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
}

// room is the room of an import path, or "" when it is in none.
func room(path string) string {
	rest, ok := strings.CutPrefix(path, module+"pkg/")
	if !ok {
		return ""
	}
	name, _, _ := strings.Cut(rest, "/")
	return name
}

func TestRooms(t *testing.T) {
	seen := 0
	for _, p := range list(t) {
		r := room(p.ImportPath)
		if r == "" {
			continue
		}
		seen++
		allowed, known := mayImport[r]
		if !known {
			t.Errorf("room %q is not in the table: say what it may import", r)
			continue
		}
		for _, imported := range p.Imports {
			if other := room(imported); other != "" && other != r && !slices.Contains(allowed, other) {
				t.Errorf("%s imports %s, but room %q may import only %q", p.ImportPath, imported, r, allowed)
			}
			if strings.HasPrefix(imported, module+backends) && !strings.HasPrefix(p.ImportPath, module+backends) && !strings.HasSuffix(imported, "test") {
				t.Errorf("%s imports the backend %s: only commands choose one", p.ImportPath, imported)
			}
			if strings.HasPrefix(imported, module+"internal/") && imported != module+"internal/version" && !strings.HasSuffix(p.ImportPath, "test") {
				t.Errorf("%s imports %s: internal packages are for commands, tests and test suites", p.ImportPath, imported)
			}
			for library, home := range onlyIn {
				if strings.HasPrefix(imported, library) && !slices.Contains(strings.Fields(home), r) {
					t.Errorf("%s imports %s, which enters only in room %q", p.ImportPath, imported, home)
				}
			}
		}
	}
	if seen < len(mayImport) {
		t.Errorf("looked at %d packages, there are %d rooms", seen, len(mayImport))
	}
}
