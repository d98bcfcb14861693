package ram

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

func TestProbe(t *testing.T) {
	c := Probe()
	t.Log(c)
	if (c.Rung == Full) != (c.Reason == "") {
		t.Errorf("rung %s with reason %q", c.Rung, c.Reason)
	}
}

func TestSpawnRungs(t *testing.T) {
	needFull(t)
	for _, test := range []struct {
		limit    Rung
		tracking string
		lazy     bool
		change   func(*exec.Cmd)
		wrapped  bool
	}{
		{Full, TrackingUserfaultfd, true, nil, false},
		{Lazy, TrackingHashing, true, nil, false},
		{Eager, TrackingHashing, false, nil, false},
		{Full, TrackingUserfaultfd, true, asNobody, false},
		{Lazy, TrackingHashing, true, asNobody, false},
		{Eager, TrackingHashing, false, asNobody, false},
		{Full, TrackingUserfaultfd, true, wrap, true},
		{Lazy, TrackingHashing, true, wrap, true},
		{Eager, TrackingHashing, false, wrap, true},
	} {
		t.Run("", func(t *testing.T) {
			checkLeaks(t)
			mem := create(t, 1<<20)
			v := startVMM(t, mem, Options{Limit: test.limit, Wrapped: test.wrapped}, func(cmd *exec.Cmd) {
				if test.change != nil {
					test.change(cmd)
				}
			})
			c := v.h.Capabilities()
			if c.Rung != test.limit || c.Tracking != test.tracking || c.Lazy != test.lazy || (c.Reason == "") != (test.limit == Full) {
				t.Errorf("got %s", c)
			}
			v.attach(mem)
			if got := mem.Capabilities(); got != c {
				t.Errorf("memory has %s, its VMM %s", got, c)
			}
			v.do("poke 5000 7")
			if got := v.ask("peek 5000"); got != "7" {
				t.Errorf("peek = %s", got)
			}
		})
	}
	if _, err := Spawn(exec.Command("/bin/true"), Options{Limit: 9}); err == nil {
		t.Error("rung 9 was accepted")
	}
}

// status is a field of /proc/PID/status.
func status(t *testing.T, pid int, name string) string {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, name+":"); ok {
			return strings.TrimSpace(value)
		}
	}
	t.Fatalf("no field %q in status of %d", name, pid)
	return ""
}

// TestSpawnDisturbsNothing compares a spawned process with one started the ordinary way.
func TestSpawnDisturbsNothing(t *testing.T) {
	needFull(t)
	for _, user := range []string{"root", "nobody"} {
		t.Run(user, func(t *testing.T) {
			checkLeaks(t)
			mem := create(t, 1<<20)
			describe := func(start func(*exec.Cmd) error) string {
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				cmd := vmmCommand(mem)
				attr := &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
				if user == "nobody" {
					attr.Credential = &syscall.Credential{Uid: 65534, Gid: 65534}
				}
				cmd.SysProcAttr = attr
				cmd.Stdin = strings.NewReader("map\npoke 1 2\npeek 1\n") // copied by a goroutine of cmd's
				cmd.Stdin = io.MultiReader(cmd.Stdin, neverEnds{ctx})
				out, err := cmd.StdoutPipe()
				if err != nil {
					t.Fatal(err)
				}
				if err := start(cmd); err != nil {
					t.Fatal(err)
				}
				pid := cmd.Process.Pid
				answers := make([]byte, len("ok\nok\n2\n"))
				if _, err := io.ReadFull(out, answers); err != nil {
					t.Fatal(err)
				}
				pgid, err := unix.Getpgid(pid)
				if err != nil {
					t.Fatal(err)
				}
				what := fmt.Sprintf("%q, pgid own %t", answers, pgid == pid)
				for _, name := range []string{"TracerPid", "SigBlk", "SigIgn", "SigCgt", "Uid", "NoNewPrivs"} {
					what += fmt.Sprintf(", %s %s", name, status(t, pid, name))
				}
				for _, fd := range openFiles(t, pid) {
					if fd != "anon_inode:[userfaultfd]" {
						what += ", " + fd
					}
				}
				if cmd.SysProcAttr != attr || attr.Ptrace || len(cmd.ExtraFiles) != 1 {
					t.Errorf("command was changed: %+v, %d extra files", cmd.SysProcAttr, len(cmd.ExtraFiles))
				}
				if err := cmd.Process.Signal(syscall.SIGKILL); err != nil {
					t.Fatal(err)
				}
				cancel()
				return fmt.Sprintf("%s, then %v", what, cmd.Wait())
			}
			plain := describe((*exec.Cmd).Start)
			spawned := describe(func(cmd *exec.Cmd) error {
				h, err := Spawn(cmd, Options{})
				if err != nil {
					return err
				}
				if c := h.Capabilities(); c.Rung != Full {
					t.Errorf("got %s", c)
				}
				return h.Close()
			})
			if spawned != plain {
				t.Errorf("started the ordinary way:\n%s\nspawned:\n%s", plain, spawned)
			}
		})
	}
}

// neverEnds is a reader that delivers nothing until its context ends.
type neverEnds struct{ context.Context }

func (r neverEnds) Read([]byte) (int, error) { <-r.Done(); return 0, io.EOF }

// openFiles lists what the descriptors of a process are, but for those of a runtime's poller.
func openFiles(t *testing.T, pid int) (targets []string) {
	t.Helper()
	dir := fmt.Sprintf("/proc/%d/fd/", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		target, err := os.Readlink(dir + e.Name())
		if err != nil {
			t.Fatal(err)
		}
		if strings.HasPrefix(target, "pipe:") {
			target = "pipe"
		}
		if !strings.HasPrefix(target, "anon_inode:[event") {
			targets = append(targets, target)
		}
	}
	slices.Sort(targets)
	return targets
}

func TestSpawnSignals(t *testing.T) {
	needFull(t)
	// One that is ignored here, as SIGHUP by what nohup starts, would be ignored by the program, too.
	heard := make(chan os.Signal, 1)
	signal.Notify(heard, syscall.SIGHUP, syscall.SIGINT)
	defer signal.Stop(heard)
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL, syscall.SIGINT, syscall.SIGHUP, syscall.Signal(40)} {
		t.Run(sig.String(), func(t *testing.T) {
			checkLeaks(t)
			cmd := exec.Command("/bin/sleep", "1000")
			h, err := spawnTraced(cmd, Options{Started: func(pid int) error { return unix.Kill(pid, sig) }})
			if err != nil {
				t.Fatal(err)
			}
			defer h.Close()
			err = cmd.Wait()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != sig {
				t.Errorf("process ended with %v, want %v", err, sig)
			}
			<-h.Done()
		})
	}
}

func TestSpawnFailures(t *testing.T) {
	checkLeaks(t)
	if _, err := Spawn(exec.Command("/nonexistent/vmm"), Options{}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing program: %v", err)
	}
	if _, err := Spawn(exec.Command("/etc/passwd"), Options{}); !errors.Is(err, os.ErrPermission) {
		t.Errorf("not a program: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := Spawn(exec.CommandContext(ctx, "/bin/true"), Options{}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	// One that ends at once.
	cmd := exec.Command("/bin/sh", "-c", "exit 3")
	h, err := Spawn(cmd, Options{})
	if err != nil {
		t.Fatal(err)
	}
	<-h.Done()
	if err := cmd.Wait(); err == nil || cmd.ProcessState.ExitCode() != 3 {
		t.Errorf("exit status: %v", err)
	}
	h.Close()
	h.Close()

	// One that was to execute another, and does not.
	cmd = exec.Command("/bin/sh", "-c", "exit 4")
	if _, err := Spawn(cmd, Options{Wrapped: true}); !errors.Is(err, ErrProcessEnded) || cmd.ProcessState == nil || cmd.ProcessState.ExitCode() != 4 {
		t.Errorf("one that executes nothing: error %v, state %v", err, cmd.ProcessState)
	}
}

// wrap has a program execute the command that has closed what it inherited.
func wrap(cmd *exec.Cmd) {
	program, _ := os.Readlink(cmd.Path) // which is /proc/self/exe
	cmd.Args = append([]string{"sh", "-c", `exec 3>&- 4>&- 5>&-; exec "$@"`, "sh", program}, cmd.Args[1:]...)
	cmd.Path = "/bin/sh"
}

// TestSpawnAmongOthers starts many at once, among ordinary children that are waited for as usual.
func TestSpawnAmongOthers(t *testing.T) {
	checkLeaks(t)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 10 {
				cmd := exec.Command("/bin/true")
				h, err := Spawn(cmd, Options{})
				if err != nil {
					t.Error(err)
					return
				}
				if err := cmd.Wait(); err != nil {
					t.Error(err)
				}
				if c := h.Capabilities(); c.Rung != Probe().Rung {
					t.Errorf("got %s", c)
				}
				h.Close()
			}
		})
		wg.Go(func() {
			for range 10 {
				if err := exec.Command("/bin/true").Run(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
}

// TestSpawnWhereRefused runs in a process, and starts children, for which a seccomp filter refuses what is needed.
func TestSpawnWhereRefused(t *testing.T) {
	needFull(t)
	for name, nr := range map[string]int{"ptrace": unix.SYS_PTRACE, "userfaultfd": unix.SYS_USERFAULTFD, "pidfd_getfd": unix.SYS_PIDFD_GETFD} {
		t.Run(name, func(t *testing.T) {
			cmd := exec.Command("/proc/self/exe")
			cmd.Env = append(os.Environ(), roleEnv+"=deny:"+strconv.Itoa(nr))
			out, err := cmd.CombinedOutput()
			if err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			t.Logf("%s", out)
			if !strings.Contains(string(out), "eager") || !strings.Contains(string(out), "operation not permitted") || !strings.Contains(string(out), "ran: <nil>") {
				t.Errorf("got %q", out)
			}
		})
	}
}

// denyMain refuses itself a system call and then spawns.
func denyMain(nr string) {
	n, _ := strconv.Atoi(nr)
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0}, // seccomp_data.nr
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: uint32(n), Jt: 0, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&prog)))
	if errno != 0 {
		fmt.Println("seccomp:", errno)
		os.Exit(1)
	}
	cmd := exec.Command("/bin/true")
	h, err := Spawn(cmd, Options{})
	if err != nil {
		fmt.Println("spawn:", err)
		os.Exit(1)
	}
	fmt.Println(h.Capabilities())
	fmt.Println("ran:", cmd.Wait())
}

func TestAttach(t *testing.T) {
	needFull(t)
	t.Run("nothing mapped", func(t *testing.T) {
		checkLeaks(t)
		mem := create(t, 1<<20)
		v := startVMM(t, mem, Options{})
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
		defer cancel()
		err := mem.Attach(ctx, v.h)
		if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "did not map") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("mapped in part", func(t *testing.T) {
		checkLeaks(t)
		mem := create(t, 1<<20)
		v := startVMM(t, mem, Options{})
		v.do("map 0 4096")
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
		defer cancel()
		err := mem.Attach(ctx, v.h)
		if err == nil || !strings.Contains(err.Error(), "up to byte 4096 of 1048576") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("mapped late", func(t *testing.T) {
		checkLeaks(t)
		mem := create(t, 1<<20)
		v := startVMM(t, mem, Options{})
		v.do("map 0 4096")
		go v.send("map 4096 %d", 1<<20-4096)
		if err := mem.Attach(testContext(t), v.h); err != nil {
			t.Error(err)
		}
		v.receive()
	})
	t.Run("process ended", func(t *testing.T) {
		checkLeaks(t)
		mem := create(t, 1<<20)
		v := startVMM(t, mem, Options{})
		v.send("exit 0")
		_ = v.cmd.Wait()
		err := mem.Attach(testContext(t), v.h)
		if err == nil {
			t.Error("attached a process that has ended")
		}
	})
	t.Run("twice", func(t *testing.T) {
		checkLeaks(t)
		mem := create(t, 1<<20)
		v, w := startVMM(t, mem, Options{}), startVMM(t, mem, Options{})
		v.attach(mem)
		w.do("map")
		if err := mem.Attach(testContext(t), w.h); err == nil || !strings.Contains(err.Error(), "belongs to process") {
			t.Errorf("got %v", err)
		}
	})
}
