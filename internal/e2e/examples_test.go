package e2e

import (
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/drafter-vm/drafter/internal/testpackage"
)

// TestExamples builds the examples, which are a module of their own, and runs them.
func TestExamples(t *testing.T) {
	t.Parallel()
	if why := testpackage.WhyNot(); why != "" {
		t.Skip(why)
	}
	if testing.Short() {
		t.Skip("boots real machines: left out with -short")
	}
	const module = "../../examples"
	dir := shortDir(t)
	for _, name := range []string{"clones", "relay", "counter/guest", "counter/host"} {
		if err := testpackage.Build(t.Context(), module, "./"+name, filepath.Join(dir, filepath.Base(name))); err != nil {
			t.Fatal(err)
		}
	}
	vet := exec.Command("go", "vet", "./...")
	vet.Dir = module
	if out, err := vet.CombinedOutput(); err != nil {
		t.Errorf("go vet: %v\n%s", err, out)
	}
	pkg := filepath.Join(dir, "package")
	err := testpackage.Make(newContext(t), pkg, testpackage.Config{
		Files: map[string]string{"/bin/counter": filepath.Join(dir, "guest")}, Spawn: []string{"/bin/counter"},
	})
	if err != nil {
		t.Fatal(err)
	}
	guests.Add(1)
	for _, tt := range []struct {
		program string
		args    []string
		want    []string
	}{
		{"clones", []string{"-count", "4"}, []string{"instance 3 resumed in ", "5 VMs run"}},
		{"relay", []string{"-moves", "3"}, []string{"progress at http://127.0.0.1:", "move 3: downtime "}},
		{"host", nil, []string{"on the first host the guest counts 2\n", "on the second host the guest counts 4\n"}},
	} {
		t.Run(tt.program, func(t *testing.T) {
			cmd := exec.CommandContext(newContext(t), filepath.Join(dir, tt.program), append([]string{"-package", pkg}, tt.args...)...)
			cmd.Dir = dir
			out, err := cmd.CombinedOutput()
			if err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			for _, want := range tt.want {
				if !strings.Contains(string(out), want) {
					t.Errorf("it does not say %q:\n%s", want, out)
				}
			}
		})
	}
}
