package blueprint

import (
	"strings"
	"testing"
)

func TestOCI(t *testing.T) {
	tr, u := testSystem(t)
	s := &system{Tree: tr, users: u, cfg: &Config{OCI: true}}
	must(t, s.containers())
	for path, want := range map[string]string{
		"/lib/systemd/system/drafter-containers.service": "644 0:0",
		// The guest counts as alive after multi-user.target, which comes after what it wants: so when containers are ready.
		"/etc/systemd/system/multi-user.target.wants/drafter-containers.service": "-> /lib/systemd/system/drafter-containers.service",
	} {
		if got := describe(tr, path); got != want {
			t.Errorf("%s is %s, want %s", path, got, want)
		}
	}
	bare, u := testSystem(t)
	must(t, (&system{Tree: bare, users: u, cfg: &Config{}}).containers())
	if got := describe(bare, "/lib/systemd/system/drafter-containers.service"); got != "missing" {
		t.Errorf("a guest without containers has a supervisor: %s", got)
	}

	cfg, _ := Config{OCI: true, Packages: []string{"htop"}}.complete() // it lacks an agent
	if got, want := cfg.request(), "bookworm amd64 base-2 linux-image-cloud-amd64 oci-1 crun htop"; got != want {
		t.Errorf("the request is %q, want %q", got, want)
	}
	cfg, _ = Config{Packages: []string{"htop"}}.complete()
	if got := cfg.request(); strings.Contains(got, "oci") || strings.Contains(got, "crun") {
		t.Errorf("the request of a guest without is %q", got)
	}
}
