package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/drafter-vm/drafter/pkg/ram"
)

const pageSize = 4096

// guest is the process that stands for a VM where the engine is measured alone: it maps the memory, and writes to it or
// touches it. Neither of its owner's CPU time and memory is it a part.
type guest struct {
	*child
	handle *ram.Handle
}

// startGuest starts a guest on mem and attaches it, so that its writes can be tracked and its faults served.
func startGuest(ctx context.Context, mem *ram.Memory) (*guest, error) {
	g := &guest{}
	var err error
	g.child, err = startChild(ctx, "guest", struct{}{}, func(cmd *exec.Cmd) (err error) {
		g.handle, err = ram.Spawn(cmd, ram.Options{})
		return err
	}, mem.File())
	if err != nil {
		return nil, err
	}
	if _, err = g.expect("mapped"); err == nil {
		err = mem.Attach(ctx, g.handle)
	}
	if err != nil {
		g.end()
		return nil, fmt.Errorf("attach the guest's memory: %w", err)
	}
	return g, nil
}

// number asks for a number.
func (g *guest) number(format string, args ...any) (int64, error) {
	answer, err := g.ask(format, args...)
	if err != nil {
		return 0, err
	}
	return strconv.ParseInt(answer, 10, 64)
}

// guestMain is the guest's side. Its memory is descriptor 3. It knows these commands:
//
//	write RATE   write whole pages at random from now on, RATE bytes a second
//	stop         stop writing. The number of pages written
//	touch N      read N pages at random that have not arrived. Latencies of those, JSON
func guestMain(a *actor) error {
	// A goroutine in a page fault cannot be preempted, so a collection would stop the whole process.
	debug.SetGCPercent(-1)
	var info unix.Stat_t
	if err := unix.Fstat(3, &info); err != nil {
		return err
	}
	mem, err := unix.Mmap(3, 0, int(info.Size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("map the memory: %w", err)
	}
	a.say("mapped")
	var stop chan struct{}
	var written chan int64
	for command := range a.commands {
		verb, rest, _ := strings.Cut(command, " ")
		switch verb {
		case "write":
			rate, err := strconv.ParseInt(rest, 10, 64)
			if err != nil {
				return err
			}
			stop, written = make(chan struct{}), make(chan int64, 1)
			go func() { written <- writePages(mem, rate, stop) }()
			a.say("writing")
		case "stop":
			var n int64
			if stop != nil {
				close(stop)
				n, stop = <-written, nil
			}
			a.say("%d", n)
		case "touch":
			n, err := strconv.Atoi(rest)
			if err != nil {
				return err
			}
			if err := a.sayJSON(touchMissing(mem, n)); err != nil {
				return err
			}
		default:
			return fmt.Errorf("unknown command %q", command)
		}
	}
	return nil
}

// writePages writes whole pages at random places, rate bytes a second, until it is stopped.
func writePages(mem []byte, rate int64, stop <-chan struct{}) (pages int64) {
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	rnd := rand.New(rand.NewPCG(uint64(os.Getpid()), 1))
	start := time.Now()
	for {
		select {
		case <-stop:
			return pages
		case <-tick.C:
		}
		for due := int64(time.Since(start).Seconds() * float64(rate) / pageSize); pages < due; pages++ {
			page := rnd.IntN(len(mem) / pageSize)
			randomPage(mem[page*pageSize:(page+1)*pageSize], rnd.Uint64())
		}
	}
}

// randomPage fills a page with what does not compress.
func randomPage(page []byte, seed uint64) {
	x := seed | 1
	for i := 0; i+8 <= len(page); i += 8 {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		binary.LittleEndian.PutUint64(page[i:], x)
	}
}

// touched is what touching missing pages took.
type touched struct {
	Missing int       `json:"missing"` // pages that were not there
	Touched int       `json:"touched"`
	Micros  []float64 `json:"us"`  // of each missing one
	Sum     byte      `json:"sum"` // of what was read, which has to be of use
}

// touchMissing reads pages at random places until n of them were missing, or every page was looked at.
func touchMissing(mem []byte, n int) touched {
	var t touched
	rnd := rand.New(rand.NewPCG(uint64(os.Getpid()), 2))
	var resident [1]byte
	for _, page := range rnd.Perm(len(mem) / pageSize) {
		if t.Missing == n {
			break
		}
		t.Touched++
		at := mem[page*pageSize : (page+1)*pageSize]
		// For shared memory: whether the page is in the file, mapped or not (mincore(2)).
		if mincore(at, resident[:]) != nil || resident[0]&1 != 0 {
			continue
		}
		began := time.Now()
		t.Sum += at[0]
		t.Micros = append(t.Micros, float64(time.Since(began).Nanoseconds())/1e3)
		t.Missing++
	}
	return t
}
