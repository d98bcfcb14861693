package faults

import (
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"time"
)

// World is some hosts and the one guest that they have together. It sees what nobody in it can: who runs the guest when.
type World struct {
	Hosts []*Host
	Plant Plant

	dir string
	wg  sync.WaitGroup // everything that lives in it

	mu       sync.Mutex // guards what follows
	rand     *rand.Rand
	clock    int64 // of the history
	runs     map[string]bool
	since    map[string]time.Time // when the guest last began to run there, or went on
	faults   []string             // what must never be
	acked    uint64               // newest record of the journal that the guest knows to be flushed
	position uint64               // furthest that the guest has come
	booted   uint64               // how often the guest was booted
	history  History
	closers  []io.Closer
}

// Plant is an error put in on purpose, to show that it is found.
type Plant struct {
	LosePage  int  // the tracker of memory forgets the n-th page that was written; 0: none
	LoseWrite int  // the destination's disk forgets the n-th write; 0: none
	LoseFlush bool // the destination's disk does not make durable what it is told to
}

// NewWorld returns hosts with these names, which keep files in a folder. The guest runs on the first.
func NewWorld(seed uint64, dir string, names ...string) *World {
	w := &World{dir: dir, rand: rand.New(rand.NewPCG(seed, 1)), runs: map[string]bool{}, since: map[string]time.Time{}}
	for _, name := range names {
		h := &Host{name: name, world: w, disk: NewDisk(diskSize)}
		newProcess(h)
		w.Hosts = append(w.Hosts, h)
	}
	h := w.Hosts[0]
	h.record = Record{Status: Running}
	h.vm = newVM(h, Program{Pass: 1, Next: 1, Seed: seed}, newMemory(), h.disk)
	h.process.serve(h.vm)
	_ = h.vm.run() // it is alive
	for range 40 {
		h.vm.step()
	}
	return w
}

// Close ends everything. Whoever uses the world has ended.
func (w *World) Close() {
	for _, h := range w.Hosts {
		h.mu.Lock()
		vm := h.vm
		h.mu.Unlock()
		if vm != nil {
			vm.kill()
		}
	}
	w.mu.Lock()
	closers := w.closers
	w.mu.Unlock()
	for _, c := range closers {
		_ = c.Close() // devices whose owners died: there is nothing to be told
	}
	w.wg.Wait()
}

// atEnd closes something when the world ends.
func (w *World) atEnd(c io.Closer) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.closers = append(w.closers, c)
}

// intN is rand.IntN for goroutines.
func (w *World) intN(n int) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.rand.IntN(n)
}

// wrong notes something that must never be.
func (w *World) wrong(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.wrongLocked(format, args...)
}

func (w *World) wrongLocked(format string, args ...any) {
	if len(w.faults) < 20 {
		w.faults = append(w.faults, fmt.Sprintf(format, args...))
	}
}

// Wrong returns what was seen that must never be.
func (w *World) Wrong() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]string(nil), w.faults...)
}

// now returns the next instant of the history. It is called with mu held.
func (w *World) now() int64 {
	w.clock++
	return w.clock
}

// note adds what happens now to the history. It is called with mu held.
func (w *World) note(e Event) {
	t := w.now()
	w.history.add(0, t, t, e)
}

// instant is now for who does not hold mu.
func (w *World) instant() int64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.now()
}

// History returns what has happened so far.
func (w *World) History() History {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append(History(nil), w.history...)
}

func (w *World) started(host string, p Program) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for other, runs := range w.runs {
		if runs && other != host {
			w.wrongLocked("the guest runs on %s and on %s", other, host)
		}
	}
	w.runs[host], w.since[host] = true, time.Now()
	w.note(Event{Do: starts, Host: host})
	w.checkPosition(host, p)
	if p.Seq < w.acked {
		w.wrongLocked("the guest starts on %s with journal record %d, and %d was flushed", host, p.Seq, w.acked)
	}
}

func (w *World) stopped(host string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.runs[host] = false
	w.note(Event{Do: stops, Host: host})
}

func (w *World) progress(host string, p Program) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.checkPosition(host, p)
	w.position = max(w.position, p.position())
}

// checkPosition is called with mu held.
func (w *World) checkPosition(host string, p Program) {
	if p.position() < w.position {
		w.wrongLocked("the guest on %s is at pass %d, page %d of boot %d, where it has been before", host, p.Pass, p.Next, p.Boot)
	}
}

func (w *World) flushed(seq uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.acked = max(w.acked, seq)
}

// boots counts a boot of the guest.
func (w *World) boots(host string) uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.booted++
	w.note(Event{Do: boots, Host: host})
	return w.booted
}

// Since returns when the guest last began to run on a host, or went on to.
func (w *World) Since(h *Host) time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.since[h.name]
}

// Runs returns the hosts on which the guest runs.
func (w *World) Runs() (hosts []*Host) {
	for _, h := range w.Hosts {
		if h.runs() {
			hosts = append(hosts, h)
		}
	}
	return hosts
}
