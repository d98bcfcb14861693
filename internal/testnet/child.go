package testnet

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
)

// KillChild runs this test binary once more, in a namespace and with a variable in its environment by which its TestMain knows what it
// is to do, and kills it when it has said "open".
func KillChild(t testing.TB, namespace, variable string) {
	t.Helper()
	err := Do(namespace, func() error {
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), variable)
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		out, err := cmd.StdoutPipe()
		if err != nil {
			return err
		}
		if err := cmd.Start(); err != nil {
			return err
		}
		said := make([]byte, 1000)
		n, _ := out.Read(said)
		err = cmd.Process.Kill()
		_ = cmd.Wait()
		if !strings.HasPrefix(string(said[:n]), "open") {
			return fmt.Errorf("the child said %q", said[:n])
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}
