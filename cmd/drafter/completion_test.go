package main

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestCompletion has a real bash complete command lines, as it does for a person.
func TestCompletion(t *testing.T) {
	bin := t.TempDir()
	program := filepath.Join(bin, "drafter")
	if out, err := exec.Command("go", "build", "-o", program, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if out, err := exec.Command("go", "build", "-o", program+"-agent", "../drafter-agent").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if err := os.Symlink("drafter-agent", filepath.Join(bin, "drafter-liveness")); err != nil {
		t.Fatal(err)
	}
	for _, name := range names(newRootCommand())[1:] {
		if err := os.Symlink("drafter", filepath.Join(bin, name)); err != nil {
			t.Fatal(err)
		}
	}
	home := t.TempDir()
	for _, name := range []string{"here.txt", "here.too"} {
		if err := os.WriteFile(filepath.Join(home, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, tt := range []struct {
		line string
		want string // the line with all completions put into it
	}{
		{"drafter sna", "drafter snapshotter"},
		{"drafter ctl mig", "drafter ctl migratable migrate"},
		{"drafter ctl migratable ", "drafter ctl migratable off on"},
		{"drafter peer --hypervisor ", "drafter peer --hypervisor auto firecracker qemu"},
		{"drafter peer --hypervisor=q", "drafter peer --hypervisor=qemu"},
		{"drafter peer --hypervisor=", "drafter peer --hypervisor=auto firecracker qemu"},
		{"drafter peer --raddr tls://host:1337 --hypervisor q", "drafter peer --raddr tls://host:1337 --hypervisor qemu"},
		{"drafter peer --raddr=tls://host:1337 --hypervisor=q", "drafter peer --raddr=tls://host:1337 --hypervisor=qemu"},
		{"drafter peer --log-level ", "drafter peer --log-level debug error info warn"},
		{"drafter peer --tls-cert her", "drafter peer --tls-cert here.too here.txt"},
		{"drafter-peer --max-d", "drafter-peer --max-downtime"},
		{"drafter-ctl sna", "drafter-ctl snapshot"},
		{"drafter completion ", "drafter completion bash fish zsh"},
		{"drafter-agent viv", "drafter-agent viv"},
		{"drafter-agent vso", "drafter-agent vsock"},
		{"drafter-agent vsock --mo", "drafter-agent vsock --mode"},
		{"drafter-agent --log-level ", "drafter-agent --log-level debug error info warn"},
		{"drafter-liveness --vsock-t", "drafter-liveness --vsock-timeout"},
		{"echo drafter; drafter sna", "echo drafter; drafter snapshotter"},
	} {
		t.Run(tt.line, func(t *testing.T) {
			got, stderr := typed(t, bin, home, tt.line)
			if got != tt.want {
				t.Errorf("%q becomes %q, want %q\n%s", tt.line, got, tt.want, stderr)
			}
			if strings.Contains(stderr, "not found") {
				t.Errorf("bash says %q", stderr)
			}
		})
	}
	for _, shell := range []string{"zsh", "fish"} {
		for program, want := range map[string]string{program: "drafter-peer", program + "-agent": "drafter-liveness"} {
			out, err := exec.Command(program, "completion", shell).Output()
			if err != nil || !strings.Contains(string(out), want) {
				t.Errorf("the script for %s is not for %s: %v", shell, want, err)
			}
		}
	}
}

// typed is what becomes of a line that is typed into a bash, with the keys that insert all completions. The bash is as it is without the package
// bash-completion, and asks for everything itself: it is interactive, with readline, by a pipe.
func typed(t *testing.T, bin, home, line string) (got, stderr string) {
	t.Helper()
	const rc = `PS1=
unset -f _init_completion _get_comp_words_by_ref
source <(drafter completion bash)
source <(drafter-agent completion bash)
bind '"\C-xi": insert-completions'
bind -x '"\C-xd": echo "<$READLINE_LINE>"'
`
	if err := os.WriteFile(filepath.Join(home, "rc"), []byte(rc), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "bash", "--noprofile", "--rcfile", filepath.Join(home, "rc"), "-i")
	cmd.Dir = home
	cmd.Env = append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH"), "HOME="+home, "INPUTRC=/dev/null", "LC_ALL=C", "HISTFILE=")
	cmd.Stdin = strings.NewReader(line + "\x18i\x18d\x15") // and the line is cleared: none is executed
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v\n%s", err, &errs)
	}
	return strings.TrimRight(strings.Trim(strings.TrimSpace(out.String()), "<>"), " "), errs.String()
}
