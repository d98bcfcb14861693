package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/drafter-vm/drafter/pkg/runner"
	"github.com/drafter-vm/drafter/pkg/vmm/qemu"
	"github.com/drafter-vm/drafter/pkg/vmpackage"
)

func workingSetCase() benchCase {
	const name = "working-set"
	return benchCase{
		name: name, about: "from a package to the guest's answer with a recorded working set, beside without, the package in the page cache and not",
		run: func(ctx context.Context, b *bench) (rows []Row, err error) {
			if err := needRoot(); err != nil {
				return nil, err
			}
			pkg, err := tinyPackage(ctx, b, 384*mib)
			if err != nil {
				return nil, err
			}
			if rows, err = benchWorkingSet(ctx, b, name, "tiny guest", pkg, answerTiny); err != nil || b.quick {
				return rows, err
			}
			pkg, network, err := valkeyPackage(ctx, b)
			if err != nil {
				return rows, err
			}
			defer func() { err = errors.Join(err, network.Close()) }()
			more, err := benchWorkingSet(ctx, b, name, "Valkey server", pkg, func(ctx context.Context, b *bench, pkg string, change func(*runner.Config), then func() error) (start, error) {
				return answerAgent(ctx, b, network.Peer("a"), pkg, change, then)
			})
			return append(rows, more...), err
		},
	}
}

// answerer resumes a package until the guest answers, and ends it when then has returned, if there is one.
type answerer func(ctx context.Context, b *bench, pkg string, change func(*runner.Config), then func() error) (start, error)

func benchWorkingSet(ctx context.Context, b *bench, name, guest, pkg string, answer answerer) ([]Row, error) {
	set := filepath.Join(pkg, "."+vmpackage.DefaultFile(runner.MemoryDevice)+".workingset")
	aside := set + ".aside"
	defer os.Remove(set) // other cases are to find none
	defer os.Remove(aside)
	onDemand := func(c *runner.Config) { c.MemoryOnDemand = true }
	record := func(c *runner.Config) { onDemand(c); c.RecordWorkingSet = time.Second }
	recorded, err := answer(ctx, b, pkg, record, func() error { return awaitFile(ctx, set) })
	if err != nil {
		return nil, err
	}
	b.say("%s: %s: recorded, with %.0f faults and an answer after %.1f ms", name, guest, recorded.faults, recorded.answers)
	unix.Sync() // what is not on the disk yet cannot be dropped from the page cache
	var rows []Row
	for _, cache := range []struct {
		name string
		cold bool
	}{{"in the page cache", false}, {"on the disk", true}} {
		var with, without starts
		for n := range b.samples + 1 { // the first of each is not counted
			for _, side := range []struct {
				from, to string
				starts   *starts
			}{{aside, set, &with}, {set, aside, &without}} {
				if err := os.Rename(side.from, side.to); err != nil && !errors.Is(err, os.ErrNotExist) {
					return nil, err
				}
				if cache.cold {
					if err := dropCache(pkg); err != nil {
						return nil, err
					}
				}
				s, err := answer(ctx, b, pkg, onDemand, nil)
				if err != nil {
					return nil, err
				}
				if n > 0 {
					side.starts.add(s)
				}
			}
			if n > 0 {
				b.say("%s: %s %s, %d/%d: answers after %.1f ms with %.0f faults, without a working set %.1f ms with %.0f", name, guest, cache.name, n, b.samples,
					with.answers[n-1], with.faults[n-1], without.answers[n-1], without.faults[n-1])
			}
		}
		what := guest + ", package " + cache.name
		rows = append(rows,
			newRow(name, what+": to an answer", "ms", less, with.answers, without.answers, "without", goal{}),
			newRow(name, what+": faults until then", "faults", less, with.faults, without.faults, "without", ratioAtMost(0.2)),
			newRow(name, what+": memory brought until then", "MiB", less, with.brought, without.brought, "without", goal{}))
	}
	return rows, nil
}

// start is one start of a guest, starts are several: after how many milliseconds it answers, and what it took until then.
type start struct{ answers, faults, brought float64 }
type starts struct{ answers, faults, brought []float64 }

func (s *starts) add(one start) {
	s.answers, s.faults, s.brought = append(s.answers, one.answers), append(s.faults, one.faults), append(s.brought, one.brought)
}

// startOf is the start of an instance that has just answered.
func startOf(i *runner.Instance, began time.Time) start {
	stats, _ := i.FillStats()
	return start{milliseconds(time.Since(began)), float64(stats.Faults), float64(stats.DemandBytes+stats.FillBytes) / mib}
}

// answerTiny has the tiny guest answer on its console.
func answerTiny(ctx context.Context, b *bench, pkg string, change func(*runner.Config), then func() error) (s start, err error) {
	vm, err := startTinyAs(ctx, b, pkg, change)
	if err != nil {
		return s, err
	}
	defer func() { err = errors.Join(err, vm.close()) }()
	if _, err := guestDo(ctx, vm.console, "echo hello"); err != nil {
		return s, err
	}
	s = startOf(vm.instance, vm.began)
	if then != nil {
		err = then()
	}
	return s, err
}

// answerAgent has the agent of a guest with a network interface answer, after its work of a resume.
func answerAgent(ctx context.Context, b *bench, netns, pkg string, change func(*runner.Config), then func() error) (s start, err error) {
	folder, err := os.MkdirTemp(b.path("bench"), "instance-")
	if err != nil {
		return s, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(folder)) }()
	devices, err := overlays(pkg, folder)
	if err != nil {
		return s, err
	}
	cfg := runner.Config{
		Devices: devices, Backend: qemu.New(qemu.Options{}), Host: runner.Host{Dir: b.path("bench", "vms"), Netns: netns}, ResumeTimeout: guestWait, Logger: quiet,
	}
	change(&cfg)
	began := time.Now()
	i, err := runner.Resume(ctx, cfg)
	if err != nil {
		return s, err
	}
	defer func() { err = errors.Join(err, i.Kill()) }()
	s = startOf(i, began)
	if then != nil {
		err = then()
	}
	return s, err
}

// awaitFile waits until there is a file.
func awaitFile(ctx context.Context, path string) error {
	ctx, cancel := context.WithTimeout(ctx, guestWait)
	defer cancel()
	for {
		if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
			return err
		}
		if err := wait(ctx, 10*time.Millisecond); err != nil {
			return fmt.Errorf("wait for %q: %w", path, err)
		}
	}
}

// dropCache takes the files of a folder out of the page cache.
func dropCache(folder string) error {
	entries, err := os.ReadDir(folder)
	if err != nil {
		return err
	}
	for _, e := range entries {
		f, err := os.Open(filepath.Join(folder, e.Name()))
		if err != nil {
			return err
		}
		err = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
		if err := errors.Join(err, f.Close()); err != nil {
			return fmt.Errorf("drop %q from the page cache: %w", e.Name(), err)
		}
	}
	return nil
}
