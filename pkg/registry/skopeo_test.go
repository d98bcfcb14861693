package registry

import (
	"encoding/json"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/drafter-vm/drafter/internal/testregistry"
)

// What is pushed can be inspected and copied by a tool that knows nothing of it, and the copy is the same.
func TestSkopeo(t *testing.T) {
	skopeo, err := exec.LookPath("skopeo")
	if err != nil {
		t.Skip("there is no skopeo: make depend")
	}
	alone(t)
	server, other := testregistry.Start(t, testregistry.Options{}), testregistry.Start(t, testregistry.Options{})
	ref := reference(t, server.Address+"/vms/web:1")
	dir := makePackage(t, sample())
	pushed := mustPush(t, dir, ref)
	run := func(args ...string) string {
		t.Helper()
		out, err := exec.CommandContext(t.Context(), skopeo, args...).CombinedOutput()
		if err != nil {
			t.Fatalf("skopeo %s: %v: %s", strings.Join(args, " "), err, out)
		}
		return string(out)
	}
	docker := func(r Reference) string { return "docker://" + strings.TrimPrefix(r.String(), Scheme) }
	var said struct {
		Digest, Architecture, Os string
		Labels                   map[string]string
		Layers                   []string
	}
	if err := json.Unmarshal([]byte(run("inspect", "--tls-verify=false", docker(ref))), &said); err != nil {
		t.Fatal(err)
	}
	if said.Digest != pushed.Reference.Digest || said.Architecture != "amd64" || said.Os != "linux" || len(said.Layers) < 10 || !strings.Contains(said.Labels["org.opencontainers.image.description"], "memory") {
		t.Errorf("inspect says %+v", said)
	}
	layout := "oci:" + filepath.Join(t.TempDir(), "layout") + ":web"
	for n, steps := range [][]string{
		{"docker://" + other.Address + "/copies/web:1"},                   // from registry to registry
		{layout, "docker://" + other.Address + "/copies/web:2"},           // by way of a folder
		{"--all", layout + "2", "docker://" + other.Address + "/web:all"}, // for all platforms
	} {
		args := []string{"copy", "--src-tls-verify=false", "--dest-tls-verify=false"}
		if steps[0] == "--all" {
			args, steps = append(args, "--all"), steps[1:]
		}
		from := docker(ref)
		for _, to := range steps {
			run(append(args, from, to)...)
			from = to
		}
		copied := reference(t, strings.TrimPrefix(from, "docker://"))
		mustPull(t, copied, dir)
		p, err := Open(t.Context(), copied, onAMD64.OpenOptions)
		if err != nil {
			t.Fatal(err)
		}
		if p.Reference.Digest != pushed.Manifest.Digest {
			t.Errorf("copy %d has the digest %s, and not %s: it is something else", n, p.Reference.Digest, pushed.Manifest.Digest)
		}
	}
	// What a copy of one platform leaves is kept beside another that is pushed there.
	copied := reference(t, other.Address+"/copies/web:1")
	if _, err := Push(t.Context(), dir, copied, PushOptions{Transport: quiet, Platform: "linux/arm64"}); err != nil {
		t.Fatal(err)
	}
	mustPull(t, copied, dir)
}
