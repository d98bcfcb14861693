package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/drafter-vm/drafter/pkg/expose"
)

// Ways to expose a device.
const (
	byNBD  = "NBD"
	byFUSE = "FUSE"
)

func exposeCases() []benchCase {
	_, missing := exec.LookPath("qemu-img")
	way := func(name, about, way string, cheap bool) benchCase {
		return benchCase{name: name, about: about, cheap: cheap && missing == nil, run: func(ctx context.Context, b *bench) ([]Row, error) {
			size := int64(256 * mib)
			if b.quick {
				size = 4 * mib
			}
			return benchExpose(ctx, b, name, way, size)
		}}
	}
	return []benchCase{
		way("expose/nbd", "qemu-img bench at an NBD socket, beside the file behind it, and beside qemu-nbd", byNBD, true),
		way("expose/fuse", "qemu-img bench at a file that is served by FUSE, beside the file behind it", byFUSE, os.Geteuid() == 0), // it mounts
	}
}

// clientOp is one kind of requests of qemu-img bench, which knows no stride, and no flush at the end.
type clientOp struct {
	deviceOp
	depth int // requests in flight
	count int
}

func benchExpose(ctx context.Context, b *bench, name, way string, size int64) (_ []Row, err error) {
	// Memory, so that no disk is measured; and nothing is left of it, however this program ends.
	fd, err := unix.MemfdCreate("bench", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	memory := os.NewFile(uintptr(fd), "bench")
	defer memory.Close()
	file := fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), fd)
	if err := makeFull(file, size); err != nil {
		return nil, err
	}
	server, err := startServer(ctx, serverTask{Way: way, File: file, Folder: b.path("exposed")})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, server.close()) }()
	targets, names := []string{server.target, file}, []string{"ours", "file"}
	if way == byNBD {
		target, end, err := startQEMUNBD(ctx, file, server.task.Folder)
		if err != nil {
			return nil, err
		}
		defer end()
		targets, names = append(targets, target), append(names, "qemu-nbd")
	}

	ops := []clientOp{
		{deviceOp{Name: "4 KiB random read", Request: randomRequest, Random: true}, 16, 100_000},
		{deviceOp{Name: "4 KiB random read, 1 at a time", Request: randomRequest, Random: true}, 1, 20_000},
		{deviceOp{Name: "4 KiB random write", Request: randomRequest, Random: true, Write: true}, 16, 100_000},
		{deviceOp{Name: "4 KiB random write, 1 at a time", Request: randomRequest, Random: true, Write: true}, 1, 20_000},
		{deviceOp{Name: "64 KiB sequential read", Request: sequentialRequest}, 16, 20_000},
		{deviceOp{Name: "64 KiB sequential write", Request: sequentialRequest, Write: true}, 16, 20_000},
	}
	var rows []Row
	for _, op := range ops {
		if b.quick {
			op.count /= 100
		}
		speed, cpu := make([][]float64, len(targets)), make([][]float64, len(targets))
		for i := range b.samples {
			said := ""
			for n := range targets {
				side := (n + i) % len(targets) // who is first changes
				before, err := server.cpu()
				if err != nil {
					return nil, err
				}
				took, spent, err := runClient(ctx, targets[side], op, size)
				if err != nil {
					return nil, fmt.Errorf("%s: %w", op.Name, err)
				}
				after, err := server.cpu()
				if err != nil {
					return nil, err
				}
				speed[side] = append(speed[side], op.speed(int64(op.count), took.Seconds()))
				cpu[side] = append(cpu[side], float64((spent+after-before).Nanoseconds())/1e3/float64(op.count))
				said += fmt.Sprintf(", %s %.1f", names[side], speed[side][i])
			}
			b.say("%s: %s %d/%d, %s%s; CPU time of a request %.1f µs, file %.1f µs", name, op.Name, i+1, b.samples, op.unit(), said, cpu[0][i], cpu[1][i])
		}
		rows = append(rows, newRow(name, op.Name, op.unit(), more, speed[0], speed[1], names[1], goal{}))
		if way == byNBD {
			rows = append(rows, newRow(name, op.Name+", qemu-nbd", op.unit(), more, speed[0], speed[2], names[2], ratioAtLeast(1)))
		}
		rows = append(rows, newRow(name, op.Name+", CPU of both ends", "µs", less, cpu[0], cpu[1], names[1], goal{}))
	}
	return rows, nil
}

var benchSays = regexp.MustCompile(`completed in ([0-9.]+) seconds`)

// runClient has qemu-img make requests, and returns how long they took, and qemu-img's CPU time. Its random requests go to each place of the
// device once before they begin again.
func runClient(ctx context.Context, target string, op clientOp, size int64) (took, cpu time.Duration, err error) {
	step := op.Request
	if op.Random {
		const prime = 7919
		step *= prime % (size / op.Request) // of a power of two
	}
	args := []string{"bench", "-f", "raw", "-c", strconv.Itoa(op.count), "-d", strconv.Itoa(op.depth), "-s", fmt.Sprint(op.Request), "-S", fmt.Sprint(step)}
	if op.Write {
		args = append(args, "-w")
	}
	cmd := exec.CommandContext(ctx, "qemu-img", append(args, target)...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return 0, 0, fmt.Errorf("qemu-img bench: %w: %s", err, out)
	}
	said := benchSays.FindSubmatch(out)
	if said == nil {
		return 0, 0, fmt.Errorf("qemu-img bench does not say how long it took: %q", out)
	}
	seconds, err := strconv.ParseFloat(string(said[1]), 64)
	if err != nil {
		return 0, 0, err
	}
	return max(time.Millisecond, time.Duration(seconds*1e9)), cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime(), nil
}

// startQEMUNBD has qemu-nbd serve a file, until end is called. Its socket is in a folder.
func startQEMUNBD(ctx context.Context, file, folder string) (target string, end func(), err error) {
	socket, err := filepath.Abs(filepath.Join(folder, "qemu-nbd"))
	if err != nil {
		return "", nil, err
	}
	cmd := exec.CommandContext(ctx, "qemu-nbd", "--persistent", "--shared=0", "--format=raw", "--cache=writeback", "--socket="+socket, file)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL} // as startChild has it
	if err := cmd.Start(); err != nil {
		return "", nil, err
	}
	end = func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
	for range 500 {
		if conn, err := net.Dial("unix", socket); err == nil {
			return "nbd+unix:///?socket=" + socket, end, conn.Close()
		}
		if err := wait(ctx, 10*time.Millisecond); err != nil {
			end()
			return "", nil, err
		}
	}
	end()
	return "", nil, errors.New("qemu-nbd does not serve after 5 s")
}

// serverTask is a file to expose.
type serverTask struct {
	Way    string `json:"way"`
	File   string `json:"file"`
	Folder string `json:"folder"` // for the socket, or to mount
}

// server is the process that exposes it.
type server struct {
	child  *child
	task   serverTask
	target string // for qemu-img
}

// startServer starts a server. It does not end with ctx: it has to unmount.
func startServer(ctx context.Context, task serverTask) (_ *server, err error) {
	// What a run that was killed has left there would be in the way.
	if err := errors.Join(expose.DetachFUSE(task.Folder), os.RemoveAll(task.Folder), os.Mkdir(task.Folder, 0o700)); err != nil {
		return nil, err
	}
	s := &server{task: task}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.close())
		}
	}()
	if s.child, err = startChild(context.WithoutCancel(ctx), "server", task, nil); err != nil {
		return nil, err
	}
	s.target, err = s.child.expect("serving")
	return s, err
}

// cpu is the CPU time that it has used.
func (s *server) cpu() (time.Duration, error) {
	answer, err := s.child.ask("cpu")
	if err != nil {
		return 0, err
	}
	return time.ParseDuration(answer)
}

func (s *server) close() error {
	var errs []error
	if s.child != nil {
		_, err := s.child.ask("close")
		s.child.end()
		errs = append(errs, err)
	}
	return errors.Join(append(errs, expose.DetachFUSE(s.task.Folder), os.RemoveAll(s.task.Folder))...)
}

// serverMain is the process. Its commands are cpu and close.
func serverMain(a *actor) (err error) {
	var task serverTask
	if err := a.decode(&task); err != nil {
		return err
	}
	dev, err := openWritable(task.File)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dev.Close()) }()
	exported := []expose.Export{{Name: "disk", Device: dev}}
	var end func() error
	var target string
	switch task.Way {
	case byNBD:
		s, err := expose.ListenNBD(filepath.Join(task.Folder, "socket"), exported, expose.NBDOptions{Logger: quiet})
		if err != nil {
			return err
		}
		end, target = s.Close, "nbd+unix:///disk?socket="+s.Path()
	case byFUSE:
		m, err := expose.MountFUSE(task.Folder, exported, expose.FUSEOptions{UID: os.Getuid(), GID: os.Getgid(), Logger: quiet})
		if err != nil {
			return err
		}
		end, target = m.Close, m.Path("disk")
	default:
		return fmt.Errorf("way %q to expose a device: not known", task.Way)
	}
	a.say("serving %s", target)
	for command := range a.commands {
		if command == "close" {
			break
		}
		a.say("%v", processCPU())
	}
	if err := end(); err != nil {
		return err
	}
	a.say("closed")
	return nil
}
