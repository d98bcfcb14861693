package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/drafter-vm/drafter/internal/testguest"
	"github.com/drafter-vm/drafter/pkg/runner"
	"github.com/drafter-vm/drafter/pkg/vmm/qemu"
	"github.com/drafter-vm/drafter/pkg/vmpackage"
)

func resumeCase() benchCase {
	const name = "resume"
	return benchCase{
		name: name, about: "from a package of the tiny guest to its first instruction, for several sizes of memory",
		run: func(ctx context.Context, b *bench) ([]Row, error) {
			sizes := []int64{128 * mib, 512 * mib, 1 << 30, 2 << 30, 4 << 30}
			if b.quick {
				sizes = sizes[:2]
			}
			return benchResume(ctx, b, name, sizes)
		},
	}
}

func benchResume(ctx context.Context, b *bench, name string, sizes []int64) ([]Row, error) {
	if err := needRoot(); err != nil {
		return nil, err
	}
	packages := make([]string, len(sizes))
	for i, size := range sizes {
		var err error
		if packages[i], err = tinyPackage(ctx, b, size); err != nil {
			return nil, err
		}
	}
	first, answer, alone := make([][]float64, len(sizes)), make([][]float64, len(sizes)), make([][]float64, len(sizes))
	// A few more than elsewhere: they are cheap. The first of each is not counted, it reads the package from the disk.
	for n := range b.samples + 1 {
		for i := range sizes {
			runs, answers, err := resumeOnce(ctx, b, packages[i])
			if err != nil {
				return nil, fmt.Errorf("%d MiB: %w", sizes[i]/mib, err)
			}
			start, err := startAlone(ctx, b, packages[i])
			if err != nil {
				return nil, fmt.Errorf("%d MiB: %w", sizes[i]/mib, err)
			}
			b.say("%s: %d/%d %d MiB: runs after %.1f ms, answers after %.1f ms; QEMU's start alone takes %.1f ms", name, n, b.samples, sizes[i]/mib,
				milliseconds(runs), milliseconds(answers), milliseconds(start))
			if n > 0 {
				alone[i] = append(alone[i], milliseconds(start))
				first[i] = append(first[i], milliseconds(runs))
				answer[i] = append(answer[i], milliseconds(answers))
			}
		}
	}
	var rows []Row
	for i, size := range sizes {
		rows = append(rows, newRow(name, fmt.Sprintf("%d MiB, to the first instruction", size/mib), "ms", less, first[i], alone[i], "QEMU's start", atMost(50, "ms")))
	}
	last := len(sizes) - 1
	rows = append(rows, newRow(name, fmt.Sprintf("%d MiB beside %d", sizes[last]/mib, sizes[0]/mib), "ms", less, first[last], first[0],
		fmt.Sprintf("%d MiB", sizes[0]/mib), ratioAtMost(1.1)))
	return append(rows, newRow(name, fmt.Sprintf("%d MiB, to an answer on the console", sizes[last]/mib), "ms", less, answer[last], answer[0],
		fmt.Sprintf("%d MiB", sizes[0]/mib), goal{})), nil
}

// resumeOnce resumes a package into a new instance, and ends it. It returns how long it took until the guest ran, and until
// it had answered.
func resumeOnce(ctx context.Context, b *bench, pkg string) (runs, answers time.Duration, err error) {
	vm, err := startTiny(ctx, b, pkg)
	if err != nil {
		return 0, 0, err
	}
	defer func() { err = errors.Join(err, vm.close()) }()
	if _, err := guestDo(ctx, vm.console, "echo hello"); err != nil {
		return 0, 0, err
	}
	return vm.instance.ResumeDuration(), time.Since(vm.began), nil
}

// startAlone returns how long QEMU takes to start with the package's machine and to answer: nothing is resumed.
func startAlone(ctx context.Context, b *bench, folder string) (time.Duration, error) {
	pkg, err := vmpackage.Open(folder)
	if err != nil {
		return 0, err
	}
	disk, err := filepath.Abs(b.path("bench", "alone"))
	if err != nil {
		return 0, err
	}
	if err := makeBlank(disk, tinyDisk); err != nil {
		return 0, err
	}
	defer os.Remove(disk)
	began := time.Now()
	vm, err := startStock(ctx, pkg, disk, "")
	took := time.Since(began)
	if err != nil {
		return 0, err
	}
	return took, vm.close()
}

// tinyVM is an instance of the tiny guest that runs.
type tinyVM struct {
	instance *runner.Instance
	console  *testguest.Console
	folder   string
	began    time.Time // of resuming it
}

func startTiny(ctx context.Context, b *bench, pkg string) (*tinyVM, error) {
	return startTinyAs(ctx, b, pkg, func(*runner.Config) {})
}

func startTinyAs(ctx context.Context, b *bench, pkg string, change func(*runner.Config)) (_ *tinyVM, err error) {
	vm := &tinyVM{}
	if vm.console, err = testguest.NewConsole(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, vm.close())
		}
	}()
	if vm.folder, err = os.MkdirTemp(b.path("bench"), "instance-"); err != nil {
		return nil, err
	}
	devices, err := overlays(pkg, vm.folder)
	if err != nil {
		return nil, err
	}
	vm.began = time.Now()
	cfg := runner.Config{
		Devices: devices, Backend: qemu.New(qemu.Options{}), Host: b.tinyHost(vm.console), ResumeTimeout: guestWait, Logger: quiet,
	}
	change(&cfg)
	vm.instance, err = runner.Resume(ctx, cfg)
	return vm, err
}

// close ends the instance and forgets it.
func (vm *tinyVM) close() error {
	var errs []error
	if vm.instance != nil {
		errs = append(errs, vm.instance.Kill())
	}
	errs = append(errs, vm.console.Close())
	if vm.folder != "" {
		errs = append(errs, os.RemoveAll(vm.folder))
	}
	return errors.Join(errs...)
}
