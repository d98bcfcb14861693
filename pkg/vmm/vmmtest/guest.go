package vmmtest

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/drafter-vm/drafter/internal/testguest"
	"github.com/drafter-vm/drafter/internal/testguest/journal"
	"github.com/drafter-vm/drafter/internal/tinyguest"
)

// guest is what runs in the machines of the suite.
type guest interface {
	// build is what to boot.
	build(t testing.TB) (kernel, initrd string)
	// begin waits until the guest that was booted at a time is up, and has it write all over its RAM and disk.
	begin(t testing.TB, i *instance, booted time.Time)
	// flush waits until the guest has flushed its disk n times more.
	flush(t testing.TB, i *instance, n int)
	// alive fails unless the guest goes on.
	alive(t testing.TB, i *instance)
	// verify checks that the guest has lost nothing of its RAM and disk, and works.
	verify(t testing.TB, i *instance)
	// reboot asks the guest to reboot.
	reboot(t testing.TB, i *instance)
}

// linux is package testguest.
type linux struct{}

func (linux) build(t testing.TB) (kernel, initrd string) { return testguest.Build(t) }

func (g linux) begin(t testing.TB, i *instance, booted time.Time) {
	t.Helper()
	if err := i.console.Ready(testContext(t)); err != nil {
		t.Fatal(err)
	}
	t.Logf("booted in %v", time.Since(booted).Round(time.Millisecond))
	if got, want := i.do(t, "cpus"), strconv.Itoa(i.cfg.Spec.CPUCount); got != want {
		t.Errorf("the guest has %s CPUs, not %s", got, want)
	}
	if got, want := i.do(t, "disk "+diskName+" info"), strconv.Itoa(diskSize); got != want {
		t.Errorf("the guest's disk has %s bytes, not %s", got, want)
	}
	i.do(t, memoryLoad)
	i.do(t, fmt.Sprintf("disk %s start %d", diskName, journalSlots))
	g.flush(t, i, 5)
}

// needLinux skips a test of what only a Linux does.
func (s *suite) needLinux(t *testing.T) {
	t.Helper()
	if s.Tiny {
		t.Skip("not tested: no Linux boots here, and the tiny guest does nothing of this")
	}
}

// do has the guest obey a command on its console.
func (i *instance) do(t testing.TB, command string) string {
	t.Helper()
	answer, err := i.console.Do(testContext(t), command)
	if err != nil {
		t.Fatalf("%v\nThe machine's end: %v", err, i.Err())
	}
	return answer
}

// send sends a command that the guest does not live to answer.
func (i *instance) send(t testing.TB, command string) {
	t.Helper()
	ctx, cancel := context.WithCancel(testContext(t))
	go func() {
		<-i.Done()
		cancel()
	}()
	if _, err := i.console.Do(ctx, command); err != nil && !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
}

func (linux) alive(t testing.TB, i *instance) {
	t.Helper()
	if got := i.do(t, "echo alive"); got != "alive" {
		t.Fatalf("echo: %q", got)
	}
}

func (linux) reboot(t testing.TB, i *instance) { t.Helper(); i.send(t, "reboot") }

func (linux) flush(t testing.TB, i *instance, n int) {
	t.Helper()
	at := func() int {
		seq, err := strconv.Atoi(i.do(t, "disk "+diskName+" status"))
		if err != nil {
			t.Fatal(err)
		}
		return seq
	}
	ctx := testContext(t)
	for first := at(); at() < first+n; {
		if ctx.Err() != nil {
			t.Fatalf("the guest's disk writer stands still at record %d", at())
		}
	}
}

func (g linux) verify(t testing.TB, i *instance) {
	t.Helper()
	before := i.do(t, "mem verify")
	g.flush(t, i, 3)
	newest := i.do(t, "disk "+diskName+" verify")
	for ctx := testContext(t); i.do(t, "mem verify") == before; { // the writer shares one CPU with us
		if ctx.Err() != nil {
			t.Fatalf("the guest's memory writer stands still at %s", before)
		}
	}
	f, err := os.Open(i.disk)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	last, err := journal.Verify(f, journalSlots)
	if err != nil {
		t.Errorf("the journal seen from the host: %v", err)
	}
	if strconv.FormatUint(last, 10) != newest {
		t.Errorf("the newest record on the host is %d, the guest says %s", last, newest)
	}
}

// tiny is package tinyguest.
type tiny struct{}

func (tiny) build(t testing.TB) (kernel, initrd string) {
	kernel = filepath.Join(t.TempDir(), "tinyguest")
	if err := os.WriteFile(kernel, tinyguest.Kernel(), 0o600); err != nil {
		t.Fatal(err)
	}
	return kernel, ""
}

func (g tiny) begin(t testing.TB, i *instance, booted time.Time) {
	t.Helper()
	g.flush(t, i, tinyguest.Blocks+2) // it has begun to read what it has written
	t.Logf("runs since %v", time.Since(booted).Round(time.Millisecond))
}

// word is a number in the guest's memory.
func (i *instance) word(t testing.TB, at int64) uint64 {
	t.Helper()
	b := make([]byte, 8)
	if _, err := i.cfg.Memory.ReadAt(b, at); err != nil {
		t.Fatal(err)
	}
	return binary.LittleEndian.Uint64(b)
}

// flush takes a pass of the guest through its memory for a flush, as there is one in each.
func (g tiny) flush(t testing.TB, i *instance, n int) {
	t.Helper()
	ctx := testContext(t)
	at := func() uint64 { return i.word(t, tinyguest.Counters) }
	for range n {
		for first := at(); at() == first; time.Sleep(time.Millisecond) {
			if ctx.Err() != nil || ended(i) {
				t.Fatalf("the guest stands still at %d (%v); its console says %.200s", first, i.Err(), i.console.Log())
			}
		}
	}
	g.heard(t, i)
}

// ended reports whether a machine has ended.
func ended(i *instance) bool {
	select {
	case <-i.Done():
		return true
	default:
		return false
	}
}

// heard fails if the guest has said that something is wrong.
func (tiny) heard(t testing.TB, i *instance) {
	t.Helper()
	if strings.ContainsRune(i.console.Log(), tinyguest.Broken) {
		t.Fatal("the guest says that it has read what it did not write, or that its disk has failed")
	}
}

func (g tiny) alive(t testing.TB, i *instance) { t.Helper(); g.flush(t, i, 1) }

func (g tiny) verify(t testing.TB, i *instance) {
	t.Helper()
	g.flush(t, i, 3)
	ctx := testContext(t)
	if err := i.Pause(ctx); err != nil {
		t.Fatal(err)
	}
	disk, err := os.ReadFile(i.disk)
	if err != nil {
		t.Fatal(err)
	}
	behind := 0 // a block that is about to be written
	for n := range int64(tinyguest.Blocks) {
		want, got := i.word(t, tinyguest.Written+8*n), binary.LittleEndian.Uint64(disk[n*tinyguest.BlockSize:])
		if got == want {
			continue
		}
		if behind++; got > want || behind > 1 {
			t.Errorf("block %d of the disk has %d, and the guest has written %d", n, got, want)
		}
	}
	// It has counted on from page to page: what lies behind it is one pass newer.
	first, edge := i.word(t, tinyguest.Counters), 0
	for at := int64(tinyguest.Counters); at < tinyguest.CountersEnd; at += 4096 {
		n := uint64(at-tinyguest.Counters) / 4096
		const pages = (tinyguest.CountersEnd - tinyguest.Counters) / 4096
		switch got := i.word(t, at); {
		case got == first+n && edge == 0:
		case got+pages == first+n:
			edge++
		default:
			t.Fatalf("page %d has %d, and the first one %d", n, got, first)
		}
	}
	if err := i.Resume(ctx); err != nil {
		t.Fatal(err)
	}
	g.flush(t, i, 1)
}

func (tiny) reboot(t testing.TB, i *instance) {
	t.Helper()
	if err := i.console.Send(string(tinyguest.Reset)); err != nil {
		t.Fatal(err)
	}
}
