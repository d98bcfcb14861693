package main

import (
	"bytes"
	"context"
	"path/filepath"
	"strings"
	"testing"

	"github.com/drafter-vm/drafter/internal/testregistry"
)

// TestRegistryRefuses: what cannot be used of a command line of push, pull and run is said, with the remedy.
func TestRegistryRefuses(t *testing.T) {
	f := newForeign(t)
	server := testregistry.Start(t, testregistry.Options{})
	t.Setenv("DOCKER_CONFIG", t.TempDir())
	ref, out := "oci://"+server.Address+"/vms/web:1", filepath.Join(f.dir, "out")
	for _, tt := range []struct {
		name   string
		line   []string
		status int
		want   []string
	}{
		{"push: nothing", []string{"push"}, 2, []string{"two arguments", "oci://HOST/NAME:TAG"}},
		{"push: no scheme", []string{"push", f.pkg, "registry.example/web:1"}, 2, []string{`"registry.example/web:1"`, "oci://"}},
		{"push: digest", []string{"push", f.pkg, ref + "@sha256:" + strings.Repeat("0", 64)}, 2, []string{"leave the digest out"}},
		{"push: archive", []string{"push", f.file("config"), ref}, 2, []string{f.file("config"), "a folder is needed", "tar -xf"}},
		{"push: no package", []string{"push", out, ref}, 1, []string{out, "manifest.json is missing"}},
		{"push: platform", []string{"push", f.pkg, ref, "--platform", "amd64"}, 2, []string{"--platform", `"amd64"`, "linux/amd64"}},
		{"push: base", []string{"push", f.pkg, ref, "--base", "x"}, 2, []string{"--base", `"x"`}},
		{"push: base elsewhere", []string{"push", f.pkg, ref, "--base", "oci://other.example/x"}, 1, []string{"other.example", "another registry"}},
		{"push: base that is not", []string{"push", f.pkg, ref, "--base", "oci://" + server.Address + "/none:1"}, 1, []string{"/none:1", "no such package"}},
		{"push: concurrency", []string{"push", f.pkg, ref, "--concurrency", "0"}, 2, []string{"--concurrency 0", "1 to 256"}},
		{"push: no authority", []string{"push", f.pkg, ref, "--registry-ca", out}, 1, []string{out, "no such file"}},
		{"push: no certificate", []string{"push", f.pkg, ref, "--registry-ca", f.file("config")}, 1, []string{f.file("config"), "PEM"}},
		{"push: nobody there", []string{"push", f.pkg, "oci://127.0.0.1:1/web"}, 1, []string{"127.0.0.1:1", "refused"}},
		{"pull: nothing", []string{"pull", ref}, 2, []string{"two arguments"}},
		{"pull: no such", []string{"pull", ref, out}, 1, []string{ref, out, "no such package", `"1"`}},
		{"pull: there is one", []string{"pull", ref, f.pkg}, 1, []string{f.pkg, "nothing is overwritten"}},
		{"run: nothing", []string{"run"}, 2, []string{"one argument", "oci://"}},
		{"run: no scheme", []string{"run", "web"}, 2, []string{`"web"`, "oci://"}},
		{"run: elsewhere", []string{"run", ref, "--raddr", "localhost:1"}, 2, []string{"--raddr", "leave it out"}},
		{"run: working set", []string{"run", ref, "--instance", out, "--record-working-set"}, 2, []string{"--record-working-set"}},
		{"oci run: certificates", []string{"oci", "run", "--registry-ca", "x", "localhost:1/app"}, 2, []string{"--registry-ca", "SSL_CERT_FILE"}},
		{"oci run: package", []string{"oci", "run", "--package", "x", "localhost:1/app"}, 2, []string{"--package"}},
		{"oci run: volume", []string{"oci", "run", "--mount", "data:/data", "localhost:1/app"}, 2, []string{"data", "oci build"}},
		{"oci build: memory", []string{"oci", "build", "--memory", "x", "localhost:1/app", out}, 2, []string{"--memory", "512M"}},
		{"oci build: disk", []string{"oci", "build", "--netns", "", "--interface", "", "--disk", "x", "localhost:1/app", out}, 2, []string{"--disk", "NAME=FILE"}},
		{"oci unpack: mount", []string{"oci", "unpack", "--mount", "type=nfs,target=/x", "localhost:1/app"}, 2, []string{"nfs", "volume, tmpfs or bind"}},
		{"oci unpack: image", []string{"oci", "unpack"}, 2, []string{"IMAGE"}},
		{"oci pack: bundle", []string{"oci", "pack", filepath.Join(out, "none")}, 1, []string{"config.json", "drafter oci unpack"}},
		{"run: no such", []string{"run", ref, "--instance", out, "--netns", ""}, 1, []string{ref, "no such package"}},
		{"run: a package from nowhere", []string{"run", ref, "--instance", f.pkg, "--netns", ""}, 2, []string{f.pkg, "nowhere", "--instance"}},
		{"peer: flags of a registry", []string{"peer", "--package", f.pkg, "--plain-http"}, 2, []string{"--plain-http", "--restore oci://"}},
	} {
		t.Run(tt.name, func(t *testing.T) { checkRefused(t, f.dir, tt.line, tt.status, tt.want...) })
	}
}

// TestPushPullCommands: what is pushed is said, with the digest that pulls it again.
func TestPushPullCommands(t *testing.T) {
	f := newForeign(t)
	server := testregistry.Start(t, testregistry.Options{})
	t.Setenv("DOCKER_CONFIG", t.TempDir())
	ref, out := "oci://"+server.Address+"/vms/web:1", filepath.Join(t.TempDir(), "out")
	drafter := func(args ...string) (string, string) {
		t.Helper()
		var stdout, stderr bytes.Buffer
		if err := run(context.WithoutCancel(t.Context()), append([]string{"drafter"}, args...), nil, &stdout, &stderr); err != nil {
			t.Fatalf("%q: %v", args, err)
		}
		return strings.TrimSpace(stdout.String()), stderr.String()
	}
	pinned, said := drafter("push", f.pkg, ref)
	if !strings.HasPrefix(pinned, ref+"@sha256:") || !strings.Contains(said, "Sending…") || !strings.Contains(said, "sent ") {
		t.Errorf("push prints %q, and says %q", pinned, said)
	}
	if again, said := drafter("push", f.pkg, ref); again != pinned || !strings.Contains(said, "sent 0 B") || !strings.Contains(said, "(100.0%) were there") {
		t.Errorf("push again prints %q, and says %q", again, said)
	}
	if pulled, said := drafter("pull", pinned, out); !strings.HasPrefix(pulled, ref+"@sha256:") || !strings.Contains(said, "Pulled to "+out) {
		t.Errorf("pull prints %q, and says %q", pulled, said)
	}
}
