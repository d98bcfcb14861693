package blueprint

import (
	"debug/elf"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestConfigErrors(t *testing.T) {
	dir := t.TempDir()
	agent := filepath.Join(dir, "agent")
	must(t, os.WriteFile(agent, tinyELF(t, elf.EM_X86_64, 10), 0o755))
	arm := filepath.Join(dir, "arm")
	must(t, os.WriteFile(arm, tinyELF(t, elf.EM_AARCH64, 10), 0o755))
	text := filepath.Join(dir, "text")
	must(t, os.WriteFile(text, []byte("#!/bin/sh\n"), 0o755))
	for _, test := range []struct {
		name string
		cfg  Config
		want []string
	}{
		{"no agent", Config{}, []string{"no agent", "make build"}},
		{"missing agent", Config{Agent: dir + "/none"}, []string{dir + "/none", "does not exist", "make build"}},
		{"agent no ELF", Config{Agent: text}, []string{text, "not an ELF executable", "make build"}},
		{"agent of another machine", Config{Agent: arm}, []string{"EM_AARCH64", "x86-64"}},
		{"dynamic agent", Config{Agent: "/bin/ls"}, []string{"/bin/ls", "not a static executable"}},
		{"architecture", Config{Agent: agent, Arch: "riscv64"}, []string{"riscv64", "amd64"}},
		{"suite", Config{Agent: agent, Suite: "../x"}, []string{`suite "../x"`}},
		{"hostname", Config{Agent: agent, Hostname: "a b"}, []string{`host name "a b"`}},
		{"size", Config{Agent: agent, Size: 1000}, []string{"size 1000"}},
		{"package", Config{Agent: agent, Packages: []string{"Bad Name"}}, []string{`package "Bad Name"`}},
		{"blank desktop", Config{Agent: agent, Desktop: " "}, []string{"blank", "no desktop"}},
		{"desktop of two lines", Config{Agent: agent, Desktop: "foot\nreboot"}, []string{"line break", "file"}},
		{"locked and update", Config{Agent: agent, Locked: true, UpdateLock: true}, []string{"--locked", "--update-lock"}},
		{"unit suffix", Config{Agent: agent, Units: []string{text}}, []string{text, ".service"}},
		{"missing script", Config{Agent: agent, Scripts: []string{dir + "/none"}}, []string{dir + "/none"}},
		{"copy to nowhere", Config{Agent: agent, Copies: []Copy{{text, "relative"}}}, []string{"relative", "begin with /"}},
		{"fstab", Config{Agent: agent, Fstab: []string{"LABEL=x"}}, []string{`fstab line "LABEL=x"`}},
	} {
		t.Run(test.name, func(t *testing.T) {
			test.cfg.Output = filepath.Join(dir, "out")
			_, err := Build(t.Context(), test.cfg)
			for _, want := range test.want {
				if err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("got error %v, want one with %q", err, want)
				}
			}
			if _, err := os.Stat(test.cfg.Output); !os.IsNotExist(err) {
				t.Error("an output folder is left behind")
			}
		})
	}
}

func TestLockFolder(t *testing.T) {
	dir := t.TempDir()
	unlock, err := lockFolder(dir)
	must(t, err)
	if _, err := lockFolder(dir); err == nil || !strings.Contains(err.Error(), "another build") {
		t.Errorf("a second build got error %v", err)
	}
	unlock()
	unlock, err = lockFolder(dir)
	must(t, err)
	unlock()
}
