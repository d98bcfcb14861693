package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/drafter-vm/drafter/internal/testguest"
	"github.com/drafter-vm/drafter/pkg/migrate"
	"github.com/drafter-vm/drafter/pkg/peer"
	"github.com/drafter-vm/drafter/pkg/ram"
	"github.com/drafter-vm/drafter/pkg/vmm"
	"github.com/drafter-vm/drafter/pkg/vmm/qemu"
)

func slowdownCase() benchCase {
	return tinyCase("slowdown", "a guest's loop over its memory, at a peer that does not migrate beside plain QEMU, and while it migrates",
		func(ctx context.Context, b *bench, name, pkg string) ([]Row, error) {
			resting, err := benchResting(ctx, b, name, pkg)
			if err != nil {
				return resting, err
			}
			moving, err := benchMoving(ctx, b, name, pkg)
			return append(resting, moving...), err
		})
}

const (
	slowdownMemory = 512 * mib
	// The loops: one that a CPU's caches and QEMU's table of translations do not hold, and one over most of the memory.
	restingLoop = 128 // MiB
	movingLoop  = 320 // MiB
)

// benchResting runs the same loop in turns: in a guest of ours that was resumed and whose memory has all arrived, in one that
// QEMU booted on memory of its own, and in one that it booted on a memfd, as ours has it. New machines after a few turns:
// where a machine's memory happens to lie makes a difference too.
func benchResting(ctx context.Context, b *bench, name, pkg string) ([]Row, error) {
	machines, turns, slice := 4, max(3, 2*b.samples), 500*time.Millisecond
	if b.quick {
		machines, turns, slice = 1, 1, 200*time.Millisecond
	}
	const sides = 3
	var speeds, perCPU [sides][]float64
	for m := range machines {
		err := func() (err error) {
			ours, err := startTiny(ctx, b, pkg)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, ours.close()) }()
			consoles, pids := []*testguest.Console{ours.console}, []int{ours.instance.Machine().PID()}
			for _, memfd := range []bool{false, true} {
				plain, err := bootPlain(ctx, b, memfd)
				if err != nil {
					return err
				}
				defer func() { err = errors.Join(err, plain.close()) }()
				consoles, pids = append(consoles, plain.console), append(pids, plain.machine.PID())
			}
			for i, console := range consoles {
				// Once over all of it, and translated.
				if err := startLoop(ctx, console, restingLoop); err != nil {
					return err
				}
				if _, _, err := loopSpeed(ctx, console, pids[i], slice/2); err != nil {
					return err
				}
			}
			for turn := range turns {
				for i := range consoles {
					side := (i + turn + m) % sides // who is first changes
					speed, efficiency, err := loopSpeed(ctx, consoles[side], pids[side], slice)
					if err != nil {
						return err
					}
					speeds[side] = append(speeds[side], speed)
					perCPU[side] = append(perCPU[side], efficiency)
				}
				last := len(speeds[0]) - 1
				b.say("%s: at rest %d/%d: ours %.0f, plain QEMU %.0f, on a memfd %.0f thousand pages/s; ratios %.3f and %.3f, by CPU time %.3f and %.3f",
					name, last+1, machines*turns, speeds[0][last], speeds[1][last], speeds[2][last], speeds[0][last]/speeds[1][last],
					speeds[0][last]/speeds[2][last], perCPU[0][last]/perCPU[1][last], perCPU[0][last]/perCPU[2][last])
			}
			return nil
		}()
		if err != nil {
			return nil, err
		}
	}
	const work, byCPU = "work, not migrating", "work by CPU time, not migrating" // what other programs take of the cores is not in this one
	return []Row{
		newRow(name, work, "k pages/s", more, speeds[0], speeds[1], "plain QEMU", ratioWithin(2)),
		newRow(name, byCPU, "k pages/s", more, perCPU[0], perCPU[1], "plain QEMU", goal{}),
		newRow(name, work+", memfd", "k pages/s", more, speeds[0], speeds[2], "QEMU on a memfd", ratioWithin(2)),
		newRow(name, byCPU+", memfd", "k pages/s", more, perCPU[0], perCPU[2], "QEMU on a memfd", goal{}),
	}, nil
}

// startLoop makes the guest write all over so much memory, once, and leaves the loop stopped.
func startLoop(ctx context.Context, console *testguest.Console, mebibytes int) error {
	if _, err := guestDo(ctx, console, "mem start %d", mebibytes); err != nil {
		return err
	}
	for {
		if err := wait(ctx, 50*time.Millisecond); err != nil {
			return err
		}
		pages, err := loopPages(ctx, console, "mem status", mebibytes)
		if err != nil {
			return err
		}
		if pages > int64(mebibytes)*mib/pageSize {
			_, err := guestDo(ctx, console, "mem stop")
			return err
		}
	}
}

// loopPages is how many pages a loop has written since it was started.
func loopPages(ctx context.Context, console *testguest.Console, command string, mebibytes int) (int64, error) {
	answer, err := guestDo(ctx, console, "%s", command)
	if err != nil {
		return 0, err
	}
	var pass, page int64
	if _, err := fmt.Sscan(answer, &pass, &page); err != nil {
		return 0, fmt.Errorf("guest answered %q to %q: %w", answer, command, err)
	}
	return (pass-1)*int64(mebibytes)*mib/pageSize + page, nil
}

// loopSpeed lets the loop run for a while and returns thousands of pages a second, and a second of the machine's CPU time.
func loopSpeed(ctx context.Context, console *testguest.Console, pid int, d time.Duration) (speed, perCPU float64, err error) {
	before, err := loopPages(ctx, console, "mem status", restingLoop)
	if err != nil {
		return 0, 0, err
	}
	spent, err := cpuOf(pid)
	if err != nil {
		return 0, 0, err
	}
	if _, err := guestDo(ctx, console, "mem go"); err != nil {
		return 0, 0, err
	}
	began := time.Now()
	if err := wait(ctx, d); err != nil {
		return 0, 0, err
	}
	after, err := loopPages(ctx, console, "mem stop", restingLoop)
	if err != nil {
		return 0, 0, err
	}
	took := time.Since(began)
	spentAfter, err := cpuOf(pid)
	if err != nil {
		return 0, 0, err
	}
	pages := float64(after-before) / 1e3
	return pages / took.Seconds(), pages / (spentAfter - spent).Seconds(), nil
}

// plainVM is the tiny guest in a QEMU that nobody looks into.
type plainVM struct {
	machine vmm.Machine
	console *testguest.Console
	memory  *ram.Memory // what the backend wants to have; perhaps not used
	folder  string
	began   time.Time // of starting QEMU
}

// bootPlain boots the same machine as the package's, but with a disk that is a file, and with memory that QEMU allocates
// itself or with a memfd.
func bootPlain(ctx context.Context, b *bench, memfd bool) (_ *plainVM, err error) {
	vmlinux, initrd, err := tinyFiles(ctx, b)
	if err != nil {
		return nil, err
	}
	vm, err := startPlain(ctx, b, vmm.Boot{Kernel: vmlinux, Initrd: initrd}, slowdownMemory, memfd)
	if err != nil {
		return nil, err
	}
	ready, cancel := context.WithTimeout(ctx, guestWait)
	defer cancel()
	if err := startServices(ready, vm.console, tinyServices); err != nil {
		return nil, errors.Join(err, vm.close())
	}
	return vm, nil
}

// startPlain starts it, and waits for nothing.
func startPlain(ctx context.Context, b *bench, boot vmm.Boot, memory int64, memfd bool) (_ *plainVM, err error) {
	vm := &plainVM{}
	if vm.console, err = testguest.NewConsole(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, vm.close())
		}
	}()
	if vm.folder, err = os.MkdirTemp(b.path("bench"), "plain-"); err != nil {
		return nil, err
	}
	disk := filepath.Join(vm.folder, "disk")
	if err := makeBlank(disk, tinyDisk); err != nil {
		return nil, err
	}
	if disk, err = filepath.Abs(disk); err != nil {
		return nil, err
	}
	root := filepath.Join(vm.folder, "root")
	if err := os.Mkdir(root, 0o700); err != nil {
		return nil, err
	}
	if vm.memory, err = ram.Create("plain", memory); err != nil {
		return nil, err
	}
	backend := qemu.New(qemu.Options{})
	spec, err := backend.Describe(ctx, vmm.Spec{
		Accel: "auto", CPUCount: 1, MemorySize: memory, Sockets: true, BootArgs: tinyBootArgs, Disks: []vmm.Disk{{Name: "disk", Size: tinyDisk}},
	})
	if err != nil {
		return nil, err
	}
	vm.began = time.Now()
	vm.machine, err = backend.Start(ctx, vmm.Config{
		Spec: spec, Dir: root, Memory: vm.memory.File(), NUMANode: -1, Boot: &boot,
		Disks: []vmm.Attachment{{Name: "disk", Path: disk}}, SerialOutput: vm.console, SerialInput: vm.console.Input(), Logger: quiet,
		Spawn: func(cmd *exec.Cmd) error {
			for i, arg := range cmd.Args {
				if !memfd && strings.Contains(arg, `"memory-backend-file"`) {
					cmd.Args[i] = fmt.Sprintf(`{"qom-type":"memory-backend-ram","id":"mem","size":%d}`, memory)
				}
			}
			return cmd.Start()
		},
	})
	return vm, err
}

func (vm *plainVM) close() error {
	var errs []error
	if vm.machine != nil {
		errs = append(errs, vm.machine.Close())
	}
	errs = append(errs, vm.console.Close())
	if vm.memory != nil {
		errs = append(errs, vm.memory.Close())
	}
	if vm.folder != "" {
		errs = append(errs, os.RemoveAll(vm.folder))
	}
	return errors.Join(errs...)
}

// benchMoving compares a guest that is being copied with itself, just before.
func benchMoving(ctx context.Context, b *bench, name, pkg string) ([]Row, error) {
	var moving, before []float64
	for i := range b.samples {
		speed, was, err := moveOnce(ctx, b, pkg)
		if err != nil {
			return nil, err
		}
		moving, before = append(moving, speed), append(before, was)
		b.say("%s: migrating %d/%d: %.0f thousand pages/s, before %.0f, ratio %.2f", name, i+1, b.samples, speed, was, speed/was)
	}
	return []Row{newRow(name, "work while copied", "k pages/s", more, moving, before, "just before", goal{})}, nil
}

// moveOnce moves a guest that writes all over its memory, and returns how fast it wrote while it was copied, and before.
func moveOnce(ctx context.Context, b *bench, pkg string) (during, before float64, err error) {
	s, err := newTinySession(b, pkg)
	if err != nil {
		return 0, 0, err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	mark := func() (pages int64, at time.Time, err error) {
		pages, err = loopPages(ctx, s.console, "mem status", movingLoop)
		return pages, time.Now(), err
	}
	speed := func(pages int64, d time.Duration) float64 { return float64(pages) / d.Seconds() / 1e3 }
	var firstPages, lastPages int64
	var first, last time.Time
	var markErr error
	if err := s.start(ctx, func(cfg *peer.Config) {
		cfg.OnState = func(state migrate.SourceState) {
			var err error
			switch state {
			case migrate.SourceCopying:
				firstPages, first, err = mark()
			case migrate.SourceSuspending:
				lastPages, last, err = mark()
			}
			markErr = errors.Join(markErr, err)
		}
	}); err != nil {
		return 0, 0, err
	}
	restPages, rest, err := mark()
	if err != nil {
		return 0, 0, err
	}
	if err := wait(ctx, time.Second); err != nil {
		return 0, 0, err
	}
	nowPages, now, err := mark()
	if err != nil {
		return 0, 0, err
	}
	if _, err := s.move(ctx); err != nil {
		return 0, 0, err
	}
	if markErr != nil {
		return 0, 0, markErr
	}
	return speed(lastPages-firstPages, last.Sub(first)), speed(nowPages-restPages, now.Sub(rest)), nil
}
