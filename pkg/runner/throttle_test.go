package runner

import (
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/drafter-vm/drafter/pkg/vmm"
)

// process is a machine of which nothing but the process is real.
type process struct {
	vmm.Machine
	cmd  *exec.Cmd
	done chan struct{}
}

func (p *process) PID() int              { return p.cmd.Process.Pid }
func (p *process) Done() <-chan struct{} { return p.done }

// stopped reports whether the kernel has the process stopped: the state in /proc/PID/stat, proc_pid_stat(5).
func (p *process) stopped(t *testing.T) bool {
	t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.PID()))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(stat), ") ")
	return strings.HasPrefix(rest, "T")
}

func TestThrottle(t *testing.T) {
	m := &process{cmd: exec.Command("sleep", "3600"), done: make(chan struct{})}
	if err := m.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	end := func() {
		m.cmd.Process.Kill()
		m.cmd.Wait()
	}
	defer end()
	i := &Instance{machine: m, log: slog.Default()}

	for _, share := range []float64{-0.1, 1} {
		if err := i.Throttle(t.Context(), share); err == nil {
			t.Errorf("a share of %v was accepted", share)
		}
	}
	for _, share := range []float64{0.3, 0.9} {
		if err := i.Throttle(t.Context(), share); err != nil {
			t.Fatal(err)
		}
		for _, want := range []bool{true, false, true} {
			for m.stopped(t) != want { // the test's time limit ends it if that never comes
			}
		}
		if err := i.Throttle(t.Context(), 0); err != nil {
			t.Fatal(err)
		}
		if m.stopped(t) {
			t.Errorf("the machine stands still after a share of %v", share)
		}
	}

	// A machine that ends takes the rhythm with it.
	if err := i.Throttle(t.Context(), 0.5); err != nil {
		t.Fatal(err)
	}
	close(m.done)
	<-i.throttle.done
}
