package ram

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// keeperMain is a process that starts a VMM, has begun to fill its memory, or to track it, or neither, when it dies. The
// VMM's standard input and output are descriptors 3 and 4; its pid is told on standard output.
func keeperMain() {
	fail := func(err error) {
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
	}
	ctx := context.Background()
	mem, err := Create("kept", testSize)
	fail(err)
	cmd := vmmCommand(mem)
	cmd.Stdin, cmd.Stdout = os.NewFile(3, "in"), os.NewFile(4, "out")
	h, err := Spawn(cmd, Options{})
	fail(err)
	fmt.Println(cmd.Process.Pid)
	fail(mem.Attach(ctx, h)) // the test has it map the memory
	switch os.Getenv(roleEnv) {
	case "keeper filling":
		src := newSource(contents(testSize, 1))
		reached := make(chan struct{})
		src.before = func(off, n int64) error {
			if off < testSize/2 {
				return nil
			}
			if off < testSize/2+1<<20 {
				close(reached)
			}
			select {}
		}
		_, err := mem.Fill(ctx, src, FillOptions{Chunk: 1 << 20})
		fail(err)
		<-reached
	case "keeper tracking":
		fail(mem.Tracker().Start(ctx))
	}
	fmt.Println("ready")
	_, _ = bufio.NewReader(os.Stdin).ReadString('\n') // the test says when to die
	_ = unix.Kill(os.Getpid(), unix.SIGKILL)
}

// starterMain is a process that starts a VMM and never comes to having started it.
func starterMain(wrapped bool) {
	cmd := exec.Command("/bin/sleep", "600")
	if wrapped {
		cmd = exec.Command("/bin/sh", "-c", "exec sleep 600")
	}
	fmt.Println("starting")
	_, err := Spawn(cmd, Options{Wrapped: wrapped, Started: func(int) error {
		fmt.Println("started")
		time.Sleep(time.Hour)
		return nil
	}})
	fmt.Println(err)
}

// TestSpawnDies kills the owner of a VMM that is being started, from before there is a process until Options.Started is called.
func TestSpawnDies(t *testing.T) {
	needFull(t)
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0) })
	for _, role := range []string{"starter", "starter wrapped"} {
		t.Run(role, func(t *testing.T) {
			const tries = 100
			orphans := 0
			for n := range tries {
				starter := exec.Command("/proc/self/exe")
				starter.Env = append(os.Environ(), roleEnv+"="+role)
				starter.Stderr = os.Stderr
				starter.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
				told, err := starter.StdoutPipe()
				if err != nil {
					t.Fatal(err)
				}
				if err := starter.Start(); err != nil {
					t.Fatal(err)
				}
				lines := bufio.NewScanner(told)
				lines.Scan()
				if n >= tries*9/10 {
					lines.Scan()
				}
				if want := []string{"starting", "started"}; !slices.Contains(want, lines.Text()) {
					t.Fatalf("starter said %q", lines.Text())
				}
				time.Sleep(time.Duration(n) * 20 * time.Microsecond)
				_ = starter.Process.Kill()
				_ = starter.Wait()
				// What it has left is our child now, and of nobody else.
				for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
					var status unix.WaitStatus
					pid, err := unix.Wait4(-1, &status, unix.WNOHANG, nil)
					if errors.Is(err, unix.ECHILD) {
						break
					}
					if pid > 0 {
						orphans++
					} else if time.Now().After(deadline) {
						t.Errorf("try %d: it has left a process", n)
						_ = unix.Kill(-starter.Process.Pid, unix.SIGKILL) // its group
						deadline = time.Now().Add(time.Minute)
					}
				}
			}
			if orphans < tries/10 {
				t.Errorf("only %d of %d had begun", orphans, tries)
			}
		})
	}
}

// keptVMM has a keeper start a VMM and die, calling while in between.
func keptVMM(t *testing.T, role string, while func(v *vmm)) *vmm {
	t.Helper()
	// The orphan becomes our child, so that it can be reaped.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0) })
	inR, inW, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	outR, outW, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { inW.Close(); outR.Close() })
	keeper := exec.Command("/proc/self/exe")
	keeper.Env = append(os.Environ(), roleEnv+"="+role)
	keeper.ExtraFiles = []*os.File{inR, outW}
	keeper.Stderr = os.Stderr
	die, err := keeper.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	told, err := keeper.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := keeper.Start(); err != nil {
		t.Fatal(err)
	}
	inR.Close()
	outW.Close()
	lines := bufio.NewScanner(told)
	var pid int
	lines.Scan()
	if _, err := fmt.Sscan(lines.Text(), &pid); err != nil {
		t.Fatalf("keeper said %q", lines.Text())
	}
	t.Cleanup(func() {
		_ = unix.Kill(pid, unix.SIGKILL)
		_, _ = unix.Wait4(pid, nil, 0, nil)
	})
	v := &vmm{t: t, in: inW, out: bufio.NewReader(outR)}
	v.do("map")
	if lines.Scan(); lines.Text() != "ready" {
		t.Fatalf("keeper said %q", lines.Text())
	}
	while(v)
	fmt.Fprintln(die, "die")
	_ = keeper.Wait() // killed by itself

	v.h, err = Adopt(pid, Options{})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// adoptMemory opens what the VMM has.
func adoptMemory(t *testing.T, v *vmm) *Memory {
	t.Helper()
	file, err := os.OpenFile(fmt.Sprintf("/proc/%d/fd/3", v.h.PID()), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	mem, err := Open(file)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := mem.Close(); err != nil {
			t.Error(err)
		}
	})
	if err := mem.Attach(testContext(t), v.h); err != nil {
		t.Fatal(err)
	}
	return mem
}

// TestAdoptFilling takes over a VMM whose keeper died while threads waited for pages.
func TestAdoptFilling(t *testing.T) {
	needFull(t)
	checkLeaks(t)
	v := keptVMM(t, "keeper filling", func(v *vmm) {
		v.do("touch %d", testSize-pageSize) // the keeper read of this fault, and does not answer
		v.do("write 5 9")
	})
	v.do("touch %d", testSize-3*pageSize) // nobody has read of this one
	if c := v.h.Capabilities(); c.Rung != Full {
		t.Errorf("got %s", c)
	}
	mem := adoptMemory(t, v)
	if !mem.Unfilled() {
		t.Fatal("it is not known that the memory was being filled")
	}
	if _, err := mem.Device().ReadAt(make([]byte, 1), testSize-pageSize); !errors.Is(err, ErrIncomplete) {
		t.Errorf("device read: %v", err)
	}
	if _, err := mem.Fill(t.Context(), newSource(nil), FillOptions{}); err == nil {
		t.Error("started over on a guest that may have run")
	}
	src := newSource(contents(testSize, 1))
	f := startFill(t, mem, src, FillOptions{Resume: true})
	if mem.Unfilled() {
		t.Error("still unfilled")
	}
	v.do("join")
	wait(t, f)
	settled(t, mem)
	want := contents(testSize, 1)
	pattern(5, 9, want[5*pageSize:6*pageSize])
	got := make([]byte, testSize)
	if _, err := mem.Device().ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("contents are wrong (%v)", err)
	}
	if s := f.Stats(); s.FillBytes+s.DemandBytes > testSize/2 {
		t.Errorf("brought again what was there: %+v", s)
	}
}

// TestAdoptTracking takes over a VMM whose keeper died during a migration, and starts another one.
func TestAdoptTracking(t *testing.T) {
	needFull(t)
	for _, role := range []string{"keeper tracking", "keeper idle"} {
		t.Run(role, func(t *testing.T) {
			checkLeaks(t)
			v := keptVMM(t, role, func(v *vmm) { v.do("poke 4096 1") })
			mem := adoptMemory(t, v)
			settled(t, mem)
			tr := mem.Tracker()
			if err := tr.Start(testContext(t)); err != nil {
				t.Fatal(err)
			}
			v.do("poke 8192 1")
			if got := collect(t, tr); len(got) != 1 || got[0].Offset != 8192 || got[0].Length != pageSize {
				t.Errorf("got %v", got)
			}
			if err := tr.Stop(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestAdoptStranger adopts a process that was never prepared.
func TestAdoptStranger(t *testing.T) {
	checkLeaks(t)
	cmd := exec.Command("/bin/sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	h, err := Adopt(cmd.Process.Pid, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if c := h.Capabilities(); c.Rung != Eager || !strings.Contains(c.Reason, "holds no userfaultfd") {
		t.Errorf("got %s", c)
	}
	_ = cmd.Process.Kill()
	<-h.Done()
	_ = cmd.Wait()
	h.Close()
	if _, err := Adopt(cmd.Process.Pid, Options{}); err == nil {
		t.Error("adopted a process that is gone")
	}
}

// TestHandleClosedWhileWaiting checks that a thread goes on waiting when the last reference but the VMM's own has gone.
func TestHandleClosedWhileWaiting(t *testing.T) {
	needFull(t)
	checkLeaks(t)
	mem := create(t, 1<<20)
	v := startVMM(t, mem, Options{})
	v.attach(mem)
	if _, err := mem.Receive(t.Context(), func(int64) {}, FillOptions{}); err != nil {
		t.Fatal(err)
	}
	pid := v.h.PID()
	v.do("touch 0")
	file, err := os.OpenFile(fmt.Sprintf("/proc/%d/fd/3", pid), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := mem.Close(); !errors.Is(err, ErrIncomplete) {
		t.Errorf("close: %v", err)
	}
	joined := make(chan struct{})
	v.send("join")
	go func() { defer close(joined); _, _ = v.out.ReadString('\n') }()
	select {
	case <-joined:
		t.Fatal("the thread saw a page that has not arrived")
	case <-time.After(50 * time.Millisecond): // as long as the test is willing to wait for a failure
	}
	again, err := Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	h, err := Adopt(pid, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := again.Attach(testContext(t), h); err != nil {
		t.Fatal(err)
	}
	f, err := again.Receive(t.Context(), func(int64) {}, FillOptions{Resume: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Deliver(0, bytes.Repeat([]byte{8}, 1<<20)); err != nil {
		t.Fatal(err)
	}
	<-joined
	wait(t, f)
	if got := v.ask("peek 0"); got != "8" {
		t.Errorf("peek = %s", got)
	}

}
