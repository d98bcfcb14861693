package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

// maxOutput is how much of the end of a hook's output its error carries, in bytes.
const maxOutput = 2 << 10

// RunHook runs a command line in a shell (shell -c command) with env added to this process's environment. When ctx is
// done, the command and all processes of its group are killed. The error of a command that failed has its exit status and
// the end of its output. What the command leaves running in the background is not waited for.
func RunHook(ctx context.Context, shell, command string, env ...string) error {
	var out tail
	cmd := exec.CommandContext(ctx, shell, "-c", command)
	cmd.Env = append(os.Environ(), env...)
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 100 * time.Millisecond // for output, once the command itself has ended
	err := cmd.Run()
	if err == nil || errors.Is(err, exec.ErrWaitDelay) {
		return nil
	}
	if ctx.Err() != nil {
		err = fmt.Errorf("killed: %w", context.Cause(ctx))
	}
	if text := out.String(); text != "" {
		return fmt.Errorf("command %q: %w: %s", command, err, text)
	}
	return fmt.Errorf("command %q: %w", command, err)
}

// tail keeps the end of what is written to it.
type tail struct {
	kept []byte
	lost bool
}

func (t *tail) Write(p []byte) (int, error) {
	t.kept = append(t.kept, p...)
	if n := len(t.kept) - maxOutput; n > 0 {
		t.kept = append(t.kept[:0], t.kept[n:]...)
		t.lost = true
	}
	return len(p), nil
}

func (t *tail) String() string {
	s := strings.ToValidUTF8(strings.TrimSpace(string(t.kept)), "�")
	if t.lost {
		return "…" + s
	}
	return s
}
