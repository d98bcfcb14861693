package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"
)

// RunHooks runs the programs of a folder one after the other, in the order of their names, as [RunHook] runs a command; the
// first that fails is the last that ran. A folder that does not exist is an empty one. It leaves out what run-parts(8)
// leaves out: folders, what is not executable, and names with others than letters, digits, "_" and "-".
func RunHooks(ctx context.Context, dir string, env ...string) error {
	programs, err := hooksIn(dir)
	if err != nil {
		return err
	}
	for _, program := range programs {
		if err := runHook(ctx, exec.CommandContext(ctx, program), env); err != nil {
			return fmt.Errorf("hook %q: %w", program, err)
		}
	}
	return nil
}

// HasHooks reports whether [RunHooks] would run anything, or fail.
func HasHooks(dir string) bool {
	programs, err := hooksIn(dir)
	return err != nil || len(programs) > 0
}

var hookName = regexp.MustCompile(`^[a-zA-Z0-9_-]+$`)

func hooksIn(dir string) (programs []string, err error) {
	entries, err := os.ReadDir(dir) // sorted
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("look for hooks: %w", err)
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		if !hookName.MatchString(e.Name()) {
			continue
		}
		info, err := os.Stat(path) // of what a link leads to
		if err != nil {
			return nil, fmt.Errorf("look for hooks: %w", err)
		}
		if info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
			programs = append(programs, path)
		}
	}
	return programs, nil
}

// maxOutput is how much of the end of a hook's output its error carries, in bytes.
const maxOutput = 2 << 10

// RunHook runs a command line in a shell (shell -c command) with env added to this process's environment. When ctx is
// done, the command and all processes of its group are killed. The error of a command that failed has its exit status and
// the end of its output. What the command leaves running in the background is not waited for.
func RunHook(ctx context.Context, shell, command string, env ...string) error {
	if err := runHook(ctx, exec.CommandContext(ctx, shell, "-c", command), env); err != nil {
		return fmt.Errorf("command %q: %w", command, err)
	}
	return nil
}

func runHook(ctx context.Context, cmd *exec.Cmd, env []string) error {
	var out tail
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
		return fmt.Errorf("%w: %s", err, text)
	}
	return err
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
