package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// TestCompletion has a real bash complete command lines, as it does for a person.
func TestCompletion(t *testing.T) {
	bin := t.TempDir()
	program := filepath.Join(bin, "drafter")
	if out, err := exec.Command("go", "build", "-o", program, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, name := range names(newRootCommand())[1:] {
		if err := os.Symlink("drafter", filepath.Join(bin, name)); err != nil {
			t.Fatal(err)
		}
	}
	for _, tt := range []struct {
		line string
		want []string
	}{
		{"drafter sna", []string{"snapshotter"}},
		{"drafter ctl mig", []string{"migratable", "migrate"}},
		{"drafter ctl migratable ", []string{"on", "off"}},
		{"drafter peer --hypervisor ", []string{"auto", "qemu"}},
		{"drafter peer --log-level ", []string{"debug", "info", "warn", "error"}},
		{"drafter-peer --max-d", []string{"--max-downtime"}},
		{"drafter-ctl sna", []string{"snapshot"}},
		{"drafter completion ", []string{"bash", "zsh", "fish"}},
	} {
		t.Run(tt.line, func(t *testing.T) {
			// What the bash-completion package does before the script is asked; with one word it is left to readline.
			cmd := exec.Command("bash", "-c", `
				_get_comp_words_by_ref() { words=("${COMP_WORDS[@]}"); cword=$COMP_CWORD; cur="${COMP_WORDS[COMP_CWORD]}"; prev="${COMP_WORDS[COMP_CWORD-1]}"; }
				__ltrim_colon_completions() { :; }
				compopt() { :; }
				source <(drafter completion bash)
				complete -p "${LINE%% *}" | grep -q __start_drafter || { echo "no completion for ${LINE%% *}" >&2; exit 1; }
				COMP_WORDS=($LINE); [[ $LINE == *" " ]] && COMP_WORDS+=("")
				COMP_CWORD=$((${#COMP_WORDS[@]}-1)) COMP_LINE=$LINE COMP_POINT=${#LINE} COMP_TYPE=9
				__start_drafter; for r in "${COMPREPLY[@]}"; do echo "${r%% *}"; done`)
			cmd.Env = append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH"), "LINE="+tt.line)
			out, err := cmd.CombinedOutput()
			if err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			if got := strings.Fields(string(out)); !slices.Equal(slices.Sorted(slices.Values(got)), slices.Sorted(slices.Values(tt.want))) {
				t.Errorf("%q is completed by %q, want %q", tt.line, got, tt.want)
			}
		})
	}
	for _, shell := range []string{"zsh", "fish"} {
		out, err := exec.Command(program, "completion", shell).Output()
		if err != nil || !strings.Contains(string(out), "drafter-peer") {
			t.Errorf("the script for %s is not for drafter-peer: %v", shell, err)
		}
	}
}
