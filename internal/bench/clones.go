package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/drafter-vm/drafter/internal/testguest"
	"github.com/drafter-vm/drafter/pkg/snapshot"
	"github.com/drafter-vm/drafter/pkg/vmm"
)

func clonesCase() benchCase {
	const name = "clones"
	return benchCase{
		name: name, about: "50 clones of a package of the tiny guest, in turn and at once, beside QEMU booting 10 of it",
		run: func(ctx context.Context, b *bench) ([]Row, error) {
			// A boot takes so long that 50 would be all there is to wait for.
			count, plain := 50, 10
			if b.quick {
				count, plain = 2, 2
			}
			return benchClones(ctx, b, name, count, plain)
		},
	}
}

const clonesMemory = 128 * mib

// cloneSet is what clones, and machines beside them, are made of, and those that run.
type cloneSet struct {
	b           *bench
	pkg, folder string
	boot        vmm.Boot
	clones      []*clone
	plain       []*plainVM
}

// clone is a drafter peer with a clone.
type clone struct {
	*peerProcess
	console *testguest.Console
	began   time.Time
}

func benchClones(ctx context.Context, b *bench, name string, count, plain int) (_ []Row, err error) {
	if err := needRoot(); err != nil {
		return nil, err
	}
	s := &cloneSet{b: b}
	if s.boot.Kernel, s.boot.Initrd, err = tinyFiles(ctx, b); err != nil {
		return nil, err
	}
	if s.pkg, err = makeTiny(ctx, b, "tiny-agent", clonesMemory, snapshot.DefaultAgentVSockPort); err != nil {
		return nil, err
	}
	if s.folder, err = os.MkdirTemp(b.path("bench"), "clones-"); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, s.end(), os.RemoveAll(s.folder)) }()

	// In turn, each beside all that are there already, idle. The first is not counted: it reads the package from the disk.
	var answers, told, boots []float64
	if _, _, err := s.clone(ctx); err != nil {
		return nil, err
	}
	if err := s.end(); err != nil {
		return nil, err
	}
	for n := range count {
		identity, answer, err := s.clone(ctx)
		if err != nil {
			return nil, fmt.Errorf("clone %d: %w", n, err)
		}
		answers, told = append(answers, milliseconds(answer)), append(told, milliseconds(identity))
		if n%(count/plain) != 0 {
			continue
		}
		boot, err := s.bootOne(ctx)
		if err != nil {
			return nil, fmt.Errorf("machine %d: %w", n, err)
		}
		boots = append(boots, milliseconds(boot))
		b.say("%s: in turn %d/%d: its agent was told after %.0f ms, it answers after %.0f ms; booted by QEMU, it answers after %.0f ms",
			name, n+1, count, told[n], answers[n], milliseconds(boot))
	}
	memory, err := s.memory()
	if err != nil {
		return nil, err
	}
	b.say("%s: memory of a clone %.1f MiB, of which RAM %.1f and its peer %.1f; of a machine of QEMU alone %.1f MiB, of which RAM %.1f", name,
		median(memory.clones), median(memory.ram), median(memory.peers), median(memory.plain), median(memory.plainRAM))
	if err := s.end(); err != nil {
		return nil, err
	}

	// All started together: of different numbers, so that what is compared is the time of all divided by how many they are.
	turns := min(b.samples, 2)
	var together, all, plainAll []float64
	for i := range turns {
		each, err := s.cloneAtOnce(ctx, count)
		if err := errors.Join(err, s.end()); err != nil {
			return nil, err
		}
		together, all = append(together, each...), append(all, quantile(each, 1)/float64(count))
		if each, err = s.bootAtOnce(ctx, plain); err != nil {
			return nil, err
		}
		if err := s.end(); err != nil {
			return nil, err
		}
		plainAll = append(plainAll, quantile(each, 1)/float64(plain))
		b.say("%s: at once %d/%d: %d clones take %.0f ms each until all have answered, %d machines that QEMU boots %.0f ms each", name, i+1, turns, count, all[i], plain, plainAll[i])
	}
	of := fmt.Sprintf("QEMU boots %d", plain)
	return []Row{
		newRow(name, fmt.Sprintf("%d in turn, to an answer", count), "ms", less, answers, boots, of, goal{}),
		newRow(name, fmt.Sprintf("%d in turn, until its agent was told", count), "ms", less, told, nil, "", goal{}),
		newRow(name, fmt.Sprintf("%d at once, until all answer, divided by %d", count, count), "ms", less, all, plainAll, fmt.Sprintf("%s at once, by %d", of, plain), goal{}),
		newRow(name, fmt.Sprintf("%d at once, to an answer", count), "ms", less, together, nil, "", goal{}),
		newRow(name, "memory of one", "MiB", less, memory.clones, memory.plain, "QEMU alone", goal{}),
		newRow(name, "of that, the guest's RAM", "MiB", less, memory.ram, memory.plainRAM, "QEMU alone", goal{}),
		newRow(name, "of that, its peer", "MiB", less, memory.peers, nil, "", goal{}),
	}, nil
}

// start starts a clone.
func (s *cloneSet) start(ctx context.Context) (_ *clone, err error) {
	c := &clone{}
	if c.console, err = testguest.NewConsole(); err != nil {
		return nil, err
	}
	name := fmt.Sprint(len(s.clones))
	cmd := exec.CommandContext(ctx, filepath.Join(s.b.bin, "drafter"), "peer", "--package", s.pkg, "--instance", filepath.Join(s.folder, name),
		"--clone", "--host-name", "clone-"+name, "--netns", "", "--chroot-base-dir", s.b.path("bench", "vms"), "--enable-input", "--resume-timeout", guestWait.String())
	cmd.Stdin, cmd.Stdout = c.console.Input(), c.console
	c.began = time.Now()
	if c.peerProcess, err = startPeerProcess(cmd, "clone "+name, ""); err != nil {
		return nil, errors.Join(err, c.console.Close())
	}
	s.clones = append(s.clones, c)
	return c, nil
}

// wait returns how long it took until the guest had an identity of its own, and until it has answered on the console then.
func (c *clone) wait(ctx context.Context) (told, answer time.Duration, err error) {
	ctx, cancel := context.WithTimeout(ctx, guestWait)
	defer cancel()
	if _, err := c.await(ctx, "Resumed VM"); err != nil {
		return 0, 0, err
	}
	told = time.Since(c.began)
	_, err = guestDo(ctx, c.console, "echo hello")
	return told, time.Since(c.began), err
}

func (s *cloneSet) clone(ctx context.Context) (told, answer time.Duration, err error) {
	c, err := s.start(ctx)
	if err != nil {
		return 0, 0, err
	}
	return c.wait(ctx)
}

// cloneAtOnce starts clones together, and returns how long it took each to answer, in milliseconds.
func (s *cloneSet) cloneAtOnce(ctx context.Context, count int) ([]float64, error) {
	answers := make([]float64, count)
	group, ctx := errgroup.WithContext(ctx)
	began := time.Now()
	for n := range count {
		c, err := s.start(ctx)
		if err != nil {
			return nil, errors.Join(err, group.Wait())
		}
		c.began = began
		group.Go(func() error {
			_, answer, err := c.wait(ctx)
			answers[n] = milliseconds(answer)
			return err
		})
	}
	return answers, group.Wait()
}

// startPlain starts the guest in a QEMU of its own. Its RAM is a memory file, so that one sees how much there is of it.
func (s *cloneSet) startPlain(ctx context.Context) (*plainVM, error) {
	vm, err := startPlain(ctx, s.b, s.boot, clonesMemory, true)
	if err == nil {
		s.plain = append(s.plain, vm)
	}
	return vm, err
}

// answer returns how long it took until the booted guest answered.
func (vm *plainVM) answer(ctx context.Context, began time.Time) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, guestWait)
	defer cancel()
	if err := vm.console.Ready(ctx); err != nil {
		return 0, err
	}
	_, err := guestDo(ctx, vm.console, "echo hello")
	return time.Since(began), err
}

// bootOne boots a guest, which then runs what a clone's runs.
func (s *cloneSet) bootOne(ctx context.Context) (time.Duration, error) {
	vm, err := s.startPlain(ctx)
	if err != nil {
		return 0, err
	}
	answer, err := vm.answer(ctx, vm.began)
	if err != nil {
		return 0, err
	}
	return answer, spawnServices(ctx, vm.console, agentServices)
}

// bootAtOnce is cloneAtOnce of machines that QEMU boots.
func (s *cloneSet) bootAtOnce(ctx context.Context, count int) ([]float64, error) {
	answers := make([]float64, count)
	group, ctx := errgroup.WithContext(ctx)
	began := time.Now()
	for n := range count {
		vm, err := s.startPlain(ctx)
		if err != nil {
			return nil, errors.Join(err, group.Wait())
		}
		group.Go(func() error {
			answer, err := vm.answer(ctx, began)
			answers[n] = milliseconds(answer)
			return err
		})
	}
	return answers, group.Wait()
}

// cloneMemory is what each of those that run takes, in MiB.
type cloneMemory struct {
	clones, ram, peers []float64 // of a clone, of that its RAM, and its peer without the machine
	plain, plainRAM    []float64
}

func (s *cloneSet) memory() (m cloneMemory, err error) {
	for _, c := range s.clones {
		f, err := footprintOf(c.cmd.Process.Pid)
		if err != nil {
			return m, err
		}
		m.clones, m.ram, m.peers = append(m.clones, f.all()), append(m.ram, float64(f.files)/mib), append(m.peers, float64(f.own)/mib)
	}
	for _, vm := range s.plain {
		f, err := footprintOf(vm.machine.PID())
		if err != nil {
			return m, err
		}
		m.plain, m.plainRAM = append(m.plain, f.all()), append(m.plainRAM, float64(f.files)/mib)
	}
	return m, nil
}

// end ends all that run, and forgets what they were.
func (s *cloneSet) end() error {
	errs := make([]error, len(s.clones))
	var group errgroup.Group
	for n, c := range s.clones {
		group.Go(func() error {
			errs[n] = errors.Join(c.stop(), c.console.Close())
			return nil
		})
	}
	_ = group.Wait()
	for n := range s.clones {
		errs = append(errs, os.RemoveAll(filepath.Join(s.folder, fmt.Sprint(n))))
	}
	for _, vm := range s.plain {
		errs = append(errs, vm.close())
	}
	s.clones, s.plain = nil, nil
	return errors.Join(errs...)
}

// footprint is the memory, in bytes, of a process and all below it. Page cache of files on disks counts as far as it is mapped.
type footprint struct {
	own   int64 // the process's alone, and its share of what it has in common with others; without memory files
	below int64 // the same of those below it
	files int64 // what there is of their memory files, mapped or not
}

// all is in MiB.
func (f footprint) all() float64 { return float64(f.own+f.below+f.files) / mib }

func footprintOf(pid int) (f footprint, err error) {
	files := make(map[uint64]int64) // inodes and bytes
	pids := []int{pid}
	for n := 0; n < len(pids); n++ {
		mapped, err := mappedMemory(pids[n])
		if err != nil {
			return f, err
		}
		if n == 0 {
			f.own = mapped
		} else {
			f.below += mapped
		}
		if err := memoryFiles(pids[n], files); err != nil {
			return f, err
		}
		children, err := childrenOf(pids[n])
		if err != nil {
			return f, err
		}
		pids = append(pids, children...)
	}
	for _, size := range files {
		f.files += size
	}
	return f, nil
}

// mappedMemory is the proportional set size of a process, without that of memory files.
func mappedMemory(pid int) (total int64, err error) {
	path := fmt.Sprintf("/proc/%d/smaps_rollup", pid)
	content, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	for _, field := range []string{"Pss_Anon:", "Pss_File:"} {
		_, rest, found := strings.Cut(string(content), field)
		var kib int64
		if _, err := fmt.Sscan(rest, &kib); !found || err != nil {
			return 0, fmt.Errorf("read %s in %s: %.100q", field, path, rest)
		}
		total += kib << 10
	}
	return total, nil
}

// memoryFiles adds to files what the memory files that a process has open take.
func memoryFiles(pid int, files map[uint64]int64) error {
	descriptors, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil {
		return err
	}
	for _, path := range descriptors {
		if to, err := os.Readlink(path); err != nil || !strings.HasPrefix(to, "/memfd:") {
			continue // closed meanwhile, or something else
		}
		var stat syscall.Stat_t
		if err := syscall.Stat(path, &stat); err != nil {
			return fmt.Errorf("find the size of %q: %w", path, err)
		}
		files[stat.Ino] = stat.Blocks * 512
	}
	return nil
}

// childrenOf are the processes that a process has started.
func childrenOf(pid int) (pids []int, err error) {
	lists, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	if err != nil {
		return nil, err
	}
	for _, path := range lists {
		content, err := os.ReadFile(path)
		if err != nil {
			continue // a thread that has ended
		}
		for _, word := range strings.Fields(string(content)) {
			child, err := strconv.Atoi(word)
			if err != nil {
				return nil, fmt.Errorf("read %s: %w", path, err)
			}
			pids = append(pids, child)
		}
	}
	return pids, nil
}
