package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// runPackagerLine runs the packager with arguments and returns what it wrote to stderr.
func runPackagerLine(ctx context.Context, args ...string) (string, error) {
	cmd := newPackagerCommand()
	var stderr bytes.Buffer
	cmd.SetErr(&stderr)
	cmd.SetOut(&stderr)
	cmd.SetArgs(append([]string{}, args...)) // nil would mean those of the test
	cmd.SilenceErrors, cmd.SilenceUsage = true, true
	err := cmd.ExecuteContext(ctx)
	return stderr.String(), err
}

func TestPackagerRoundTrip(t *testing.T) {
	dir := t.TempDir()
	disk, kernel := filepath.Join(dir, "any name.ext4"), filepath.Join(dir, "vmlinux")
	want := append(bytes.Repeat([]byte("data"), 5000), make([]byte, 1<<20)...)
	for _, path := range []string{disk, kernel} {
		if err := os.WriteFile(path, want, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	archive := filepath.Join(dir, "not", "there", "app.tar.zst")
	stderr, err := runPackagerLine(t.Context(), "--package-path", archive, "--devices",
		fmt.Sprintf(`[{"name":"disk","path":%q},{"name":"kernel","path":%q}]`, disk, kernel))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(stderr, "packed kernel, disk into") {
		t.Errorf("stderr is %q", stderr)
	}

	out := filepath.Join(dir, "new", "disk")
	stderr, err = runPackagerLine(t.Context(), "--package-path", archive, "--extract", "--devices", fmt.Sprintf(`[{"name":"disk","path":%q}]`, out))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(stderr, "not named in --devices: kernel") {
		t.Errorf("stderr does not say what was left: %q", stderr)
	}
	if got, err := os.ReadFile(out); err != nil || !bytes.Equal(got, want) {
		t.Errorf("extracted disk differs (%v)", err)
	}
	if entries, _ := os.ReadDir(filepath.Dir(out)); len(entries) != 1 {
		t.Errorf("the folder has %v, want only the disk", entries)
	}
}

func TestPackagerErrors(t *testing.T) {
	dir := t.TempDir()
	missing := filepath.Join(dir, "missing")
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("some text, not a package"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name   string
		ctx    context.Context
		args   []string
		status int
		want   string
	}{
		{"no devices", t.Context(), nil, 2, "--devices is missing"},
		{"no path", t.Context(), []string{"--devices", `[{"name":"disk"}]`}, 2, `device "disk" has no "path"`},
		{"unknown key", t.Context(), []string{"--devices", `[{"name":"disk","file":"x"}]`}, 2, `unknown key "file"; known keys are name, path`},
		{"level", t.Context(), []string{"--devices", `[{"name":"disk","path":"x"}]`, "--compression-level", "11"}, 2, "use fastest"},
		{"argument", t.Context(), []string{"pack"}, 2, `"pack"`},
		{"missing device", t.Context(), []string{"--devices", fmt.Sprintf(`[{"name":"disk","path":%q}]`, missing)}, 1, `device "disk"`},
		{"foreign package", t.Context(), []string{"--extract", "--package-path", file, "--devices", fmt.Sprintf(`[{"name":"disk","path":%q}]`, missing)}, 1, "not a Drafter package"},
		{"missing device, new folder", t.Context(), []string{"--package-path", filepath.Join(missing, "x", "app.tar.zst"), "--devices", fmt.Sprintf(`[{"name":"disk","path":%q}]`, missing)}, 1, `device "disk"`},
		{"a file as folder", t.Context(), []string{"--package-path", filepath.Join(file, "app.tar.zst"), "--devices", fmt.Sprintf(`[{"name":"disk","path":%q}]`, file)}, 1, "--package-path"},
		{"interrupted, new folder", cancelled, []string{"--package-path", filepath.Join(missing, "x"), "--devices", fmt.Sprintf(`[{"name":"disk","path":%q}]`, file)}, 130, "interrupted"},
		{"interrupted", cancelled, []string{"--package-path", missing, "--devices", fmt.Sprintf(`[{"name":"disk","path":%q}]`, file)}, 130, "interrupted"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := runPackagerLine(tt.ctx, tt.args...)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Fatalf("error is %v, want %q", err, tt.want)
			}
			var usage *usageError
			status := 1
			if errors.As(err, &usage) {
				status = 2
			} else if errors.Is(err, errInterrupted) {
				status = 130
			}
			if status != tt.status {
				t.Errorf("exit status %d, want %d", status, tt.status)
			}
		})
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 1 {
		t.Errorf("the folder has %v, want only the input", entries)
	}
}
