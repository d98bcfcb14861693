package ram

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"testing"
)

// qemu is a machine that waits, and is spoken to by its human monitor.
type qemu struct {
	t   testing.TB
	cmd *exec.Cmd
	h   *Handle
	in  io.Writer
	out *bufio.Reader
}

func startQEMU(t *testing.T, mem *Memory, change func(*exec.Cmd)) *qemu {
	t.Helper()
	path, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Skipf("needs QEMU: %v", err)
	}
	size := fmt.Sprintf("%dM", mem.Size()>>20)
	cmd := exec.Command(path, "-nodefaults", "-no-user-config", "-display", "none", "-S", "-accel", "tcg", "-m", size,
		"-machine", "q35,memory-backend=mem,sata=off,smbus=off,usb=off",
		"-object", "memory-backend-file,id=mem,share=on,mem-path=/proc/self/fd/3,size="+size,
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		"-chardev", "stdio,id=monitor,signal=off", "-mon", "chardev=monitor,mode=readline")
	cmd.ExtraFiles = append(cmd.ExtraFiles, mem.File())
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if change != nil {
		change(cmd)
	}
	q := &qemu{t: t, cmd: cmd}
	if q.in, err = cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	q.out = bufio.NewReader(out)
	if q.h, err = Spawn(cmd, Options{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("QEMU said: %s", stderr.Bytes())
		}
	})
	return q
}

// bytesAt reads the guest's physical memory.
func (q *qemu) bytesAt(addr int64, n int) (out []byte) {
	q.t.Helper()
	q.do("xp /%dxb 0x%x", n, addr)
	for len(out) < n {
		line := q.line()
		if !strings.Contains(line, ": 0x") || strings.Contains(line, "xp /") {
			continue // the echo of the command
		}
		for _, field := range strings.Fields(line)[1:] {
			var b byte
			if _, err := fmt.Sscanf(field, "0x%x", &b); err != nil {
				q.t.Fatalf("monitor said %q", line)
			}
			out = append(out, b)
		}
	}
	return out
}

func (q *qemu) do(format string, args ...any) {
	q.t.Helper()
	if _, err := fmt.Fprintf(q.in, format+"\n", args...); err != nil {
		q.t.Fatal(err)
	}
}

func (q *qemu) line() string {
	q.t.Helper()
	line, err := q.out.ReadString('\n')
	if err != nil {
		q.t.Fatalf("read from the monitor: %v", err)
	}
	return strings.TrimSpace(line)
}

// pause stops the guest, and returns when it has.
func (q *qemu) pause() {
	q.t.Helper()
	q.do("stop")
	q.do("info status")
	for !strings.Contains(q.line(), "paused") {
	}
}

// TestQEMU fills, reads and tracks the memory of a real, sandboxed VMM, in which firmware runs.
func TestQEMU(t *testing.T) {
	needFull(t)
	for name, change := range map[string]func(*exec.Cmd){"root": nil, "unprivileged": asNobody} {
		t.Run(name, func(t *testing.T) {
			checkLeaks(t)
			const size = 64 << 20
			mem := create(t, size)
			q := startQEMU(t, mem, change)
			if c := q.h.Capabilities(); c.Rung != Full {
				t.Fatalf("got %s", c)
			}
			if err := mem.Attach(testContext(t), q.h); err != nil {
				t.Fatal(err)
			}
			data := contents(size, 1)
			f := startFill(t, mem, newSource(data), FillOptions{OnDemand: true})
			for _, addr := range []int64{48 << 20, 3 * pageSize, 4*pageSize - 8, 63<<20 + 100} {
				if got := q.bytesAt(addr, 16); !bytes.Equal(got, data[addr:addr+16]) {
					t.Errorf("guest has %x at %#x, want %x", got, addr, data[addr:addr+16])
				}
			}
			t.Logf("%+v", f.Stats())
			f.abort(nil)
			f = startFill(t, mem, newSource(data), FillOptions{Resume: true})
			wait(t, f)

			tr := mem.Tracker()
			if err := tr.Start(testContext(t)); err != nil {
				t.Fatal(err)
			}
			m := newMirror(t, mem)
			m.copyAll()
			q.do("cont")
			rounds, pages := 0, 0
			eventually(t, "firmware writes memory", func() bool {
				ranges := collect(t, tr)
				m.copy(ranges)
				rounds, pages = rounds+1, pages+len(pagesOf(ranges))
				return pages > 50
			})
			q.pause()
			m.copy(collect(t, tr))
			if diff := m.differing(mem); len(diff) > 0 {
				t.Errorf("%d pages were missed", len(diff))
			}
			t.Logf("%d pages reported in %d rounds", pages, rounds)
			if err := tr.Stop(); err != nil {
				t.Error(err)
			}
		})
	}
}
