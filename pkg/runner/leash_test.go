package runner

import (
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"
)

// TestLeash closes what the end of this process would close.
func TestLeash(t *testing.T) {
	for _, tc := range []struct {
		name     string
		stopped  bool
		released bool
	}{
		{name: "on the leash"},
		{name: "on the leash, stopped", stopped: true},
		{name: "released", released: true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			l, err := newLeash()
			if err != nil {
				t.Fatal(err)
			}
			machine, hand := l.machine, l.hand
			defer closeFiles(machine, hand)
			cmd := exec.Command("sleep", "600")
			cmd.ExtraFiles = []*os.File{machine}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			ended := make(chan syscall.WaitStatus, 1)
			go func() {
				cmd.Wait()
				ended <- cmd.ProcessState.Sys().(syscall.WaitStatus)
			}()
			defer cmd.Process.Kill()
			if err := l.fasten(cmd.Process.Pid); err != nil {
				t.Fatal(err)
			}
			if tc.stopped {
				cmd.Process.Signal(syscall.SIGSTOP)
			}
			if tc.released {
				for range 2 {
					if err := l.release(); err != nil {
						t.Fatal(err)
					}
				}
				cmd.Process.Signal(syscall.SIGTERM) // the only signal that it gets
			} else {
				hand.Close()
			}
			want := syscall.SIGKILL
			if tc.released {
				want = syscall.SIGTERM
			}
			select {
			case status := <-ended:
				if status.Signal() != want {
					t.Errorf("it ended by %v, want %v", status.Signal(), want)
				}
			case <-time.After(30 * time.Second):
				t.Error("it lives on")
			}
		})
	}
	var none *leash
	if err := none.fasten(1); err != nil {
		t.Error(err)
	}
	if err := none.release(); err != nil {
		t.Error(err)
	}
}
