package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/drafter-vm/drafter/internal/testimage"
	"github.com/drafter-vm/drafter/internal/testnet"
	"github.com/drafter-vm/drafter/internal/testpackage"
	"github.com/drafter-vm/drafter/internal/testregistry"
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

// TestImageExamples runs the examples that begin with an image, on a host of their own with a registry.
func TestImageExamples(t *testing.T) {
	t.Parallel()
	w := newWorkshop(t)
	h := testnet.NewTestHosts(t, "a")
	var server *testregistry.Server
	err := testnet.Do(h.Host("a"), func() error {
		server = testregistry.Start(t, testregistry.Options{})
		pushByOthers(t, testimage.Valkey(), server.Address+"/valkey:1")
		pushByOthers(t, testimage.Python(), server.Address+"/web:1")
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	w.blueprint(t, "--oci")
	// As installed: the programs find each other by their names.
	bin := w.path("bin")
	if err := os.Mkdir(bin, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"drafter", "drafter-agent"} {
		if err := os.Symlink(build(t, "../../cmd/"+name), filepath.Join(bin, name)); err != nil {
			t.Fatal(err)
		}
	}
	flags := []string{"--blueprint", w.path("blueprint")}
	if cache := os.Getenv("DRAFTER_TEST_CACHE"); cache != "" {
		flags = append(flags, "--cache", cache)
	}
	guests.Add(1)
	for _, tt := range []struct {
		program string
		args    []string
		want    []string
	}{
		{"valkey", nil, []string{"Ready to accept connections", "Resumed VM in ", "Sent VM to ", "and so has the server\n", "the VM is suspended and saved\n"}},
		{"web", []string{"8000"}, []string{"hello 1 drafter\n", "Sent VM to ", ", over connections: 1\n", "the VM is suspended and saved\n"}},
	} {
		t.Run(tt.program, func(t *testing.T) {
			script, err := filepath.Abs("../../examples/image/" + tt.program)
			if err != nil {
				t.Fatal(err)
			}
			image := server.Address + "/" + tt.program + ":1"
			cmd := exec.CommandContext(newContext(t), script, append(append([]string{image}, tt.args...), flags...)...)
			cmd.Dir = w.dir
			cmd.Env = append(os.Environ(), w.mark+"=1", "PATH="+bin+":"+os.Getenv("PATH"), "OUT="+w.path(tt.program), "NETNS=x"+h.Host("")[1:5]+tt.program[:1])
			cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) } // it ends what it has started
			var out []byte
			if err := testnet.Do(h.Host("a"), func() (err error) { out, err = cmd.CombinedOutput(); return err }); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			for _, want := range tt.want {
				if !strings.Contains(string(out), want) {
					t.Errorf("it does not say %q:\n%s", want, out)
				}
			}
		})
	}
	w.checkClean(t)
	if left, err := os.ReadDir(w.path("out/vms")); err == nil && len(left) > 0 {
		t.Errorf("machines have left %v", left)
	}
}
