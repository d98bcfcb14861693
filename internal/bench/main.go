package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	if role := os.Getenv(roleEnv); role != "" {
		playRole(role)
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	switch {
	case errors.Is(err, flag.ErrHelp):
	case errors.Is(err, errUsage):
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(2)
	case err != nil:
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

var errUsage = errors.New("the command line cannot be used")

// bench is a run.
type bench struct {
	quick    bool
	samples  int // of each side; at least this many
	out, bin string
	profiles string // folder; empty: no profiles
	stderr   io.Writer
	began    time.Time
}

// benchCase is one thing to measure. Its rows are all of this case.
type benchCase struct {
	name  string
	about string
	cheap bool // needs no machine: a test runs it with -quick
	run   func(ctx context.Context, b *bench) ([]Row, error)
}

// file is what out/bench.json holds.
type file struct {
	Date     time.Time `json:"date"` // of the latest run
	Machine  machine   `json:"machine"`
	Quick    bool      `json:"quick,omitempty"`
	Rows     []Row     `json:"rows"`
	Failures []string  `json:"failures,omitempty"` // of the latest run
}

// machine is what the numbers were measured on.
type machine struct {
	CPU       string `json:"cpu"`
	Cores     int    `json:"cores"`
	MemoryGiB int64  `json:"memory_gib"`
	Kernel    string `json:"kernel"`
	QEMU      string `json:"qemu,omitempty"`
	Go        string `json:"go"`
	Commit    string `json:"commit,omitempty"`
}

func allCases() []benchCase {
	var all []benchCase
	all = append(all, engineCases()...)
	all = append(all, vmCase(), postcopyEngineCase(), postcopyVMCase(), handoverCase(), resumeCase(), workingSetCase(), clonesCase(), storeCase(), registryCase(), imageCase(), slowdownCase())
	all = append(all, overlayCases()...)
	all = append(all, exposeCases()...)
	return append(all, natCase(), forwardCase(), tunnelCase())
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	b := &bench{stderr: stderr, began: time.Now()}
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.BoolVar(&b.quick, "quick", false, "tiny sizes and one sample each: shows that the harness works, the numbers mean nothing")
	flags.IntVar(&b.samples, "samples", 5, "samples of each side, at least")
	flags.StringVar(&b.out, "out", "out", "folder for blueprint, packages and bench.json")
	flags.StringVar(&b.bin, "bin", "bin", "folder with the drafter command")
	flags.StringVar(&b.profiles, "profiles", "", "folder for CPU profiles of the engine's two sides, which slow them down a little")
	pattern := flags.String("run", "", "run only the cases whose names match this regular expression")
	svg := flags.String("svg", "docs/bench.svg", "picture to write; with -quick only if given")
	list := flags.Bool("list", false, "list the cases")
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return err
		}
		return fmt.Errorf("%w: %w", errUsage, err)
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("%w: unexpected argument %q", errUsage, flags.Arg(0))
	}
	match, err := regexp.Compile(*pattern)
	if err != nil {
		return fmt.Errorf("%w: -run: %w", errUsage, err)
	}
	if b.samples < 1 {
		return fmt.Errorf("%w: -samples %d: give at least 1", errUsage, b.samples)
	}
	if *list {
		for _, c := range allCases() {
			fmt.Fprintf(stdout, "%-26s %s\n", c.name, c.about)
		}
		return nil
	}
	jsonPath := filepath.Join(b.out, "bench.json")
	if b.quick {
		b.samples = 1
		jsonPath = filepath.Join(b.out, "bench-quick.json")
		given := false
		flags.Visit(func(f *flag.Flag) { given = given || f.Name == "svg" })
		if !given {
			*svg = filepath.Join(b.out, "bench-quick.svg")
		}
	}

	// Before anything is measured for minutes.
	for _, path := range []string{jsonPath, *svg} {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
	}
	f := file{Date: b.began.UTC().Truncate(time.Second), Machine: describeMachine(), Quick: b.quick}
	var order []string
	var errs []error
	ran := 0
	for _, c := range allCases() {
		order = append(order, c.name)
		if !match.MatchString(c.name) || ctx.Err() != nil {
			continue
		}
		ran++
		load := loadAverage()
		b.say("%s: %s", c.name, c.about)
		rows, err := c.run(ctx, b)
		for i := range rows {
			rows[i].Load = load
		}
		f.Rows = append(f.Rows, rows...)
		if err != nil {
			err = fmt.Errorf("%s: %w", c.name, err)
			b.say("failed: %v", err)
			f.Failures = append(f.Failures, err.Error())
			errs = append(errs, err)
		}
	}
	if ran == 0 {
		return fmt.Errorf("%w: -run %q matches no case; -list lists them", errUsage, *pattern)
	}
	writeTable(stdout, f.Rows)
	if !b.quick {
		old, err := readFile(jsonPath)
		if err != nil {
			return errors.Join(append(errs, err)...)
		}
		f.Rows = merge(old.Rows, f.Rows, order)
	}
	encoded, err := json.MarshalIndent(f, "", "\t")
	if err != nil {
		return err
	}
	errs = append(errs, os.WriteFile(jsonPath, append(encoded, '\n'), 0o644), os.WriteFile(*svg, drawChart(f), 0o644))
	b.say("wrote %s and %s", jsonPath, *svg)
	return errors.Join(errs...)
}

// readFile reads an earlier run's results; there may be none.
func readFile(path string) (file, error) {
	var f file
	content, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return f, nil
	}
	if err != nil {
		return f, err
	}
	if err := json.Unmarshal(content, &f); err != nil {
		return f, fmt.Errorf("read %s: %w: remove it", path, err)
	}
	return f, nil
}

// say tells the person who watches what happens now.
func (b *bench) say(format string, args ...any) {
	fmt.Fprintf(b.stderr, "[%6.1fs] %s\n", time.Since(b.began).Seconds(), fmt.Sprintf(format, args...))
}

// path is a path below the folder for output.
func (b *bench) path(elem ...string) string {
	return filepath.Join(append([]string{b.out}, elem...)...)
}

// loadAverage is how many tasks ran or waited to run in the last minute, on average; 0 if that cannot be found.
func loadAverage() (load float64) {
	if content, err := os.ReadFile("/proc/loadavg"); err == nil {
		_, _ = fmt.Sscan(string(content), &load)
	}
	return load
}

// describeMachine leaves out what it cannot find.
func describeMachine() machine {
	m := machine{CPU: "unknown", Cores: runtime.NumCPU(), Go: runtime.Version()}
	if info, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(info)) {
			if key, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(key) == "model name" {
				m.CPU = strings.TrimSpace(value)
				break
			}
		}
	}
	var memory unix.Sysinfo_t
	if unix.Sysinfo(&memory) == nil {
		m.MemoryGiB = int64(memory.Totalram) * int64(memory.Unit) >> 30
	}
	var name unix.Utsname
	if unix.Uname(&name) == nil {
		m.Kernel = unix.ByteSliceToString(name.Release[:])
	}
	if out, err := exec.Command("qemu-system-x86_64", "--version").Output(); err == nil {
		line, _, _ := strings.Cut(string(out), "\n")
		m.QEMU = strings.TrimPrefix(line, "QEMU emulator version ")
	}
	if out, err := exec.Command("git", "describe", "--always", "--dirty").Output(); err == nil {
		m.Commit = strings.TrimSpace(string(out))
	}
	return m
}
