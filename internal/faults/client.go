package faults

import (
	"context"
	"math/rand/v2"
	"time"
)

// forever is longer than anything takes in a world, in fake time.
const forever = 10 * time.Minute

// client reads and writes the guest's registers until ctx ends, wherever it finds somebody who answers as the guest. What it was
// answered is in the world's history.
func (w *World) client(ctx context.Context, id int, seed uint64) {
	r := rand.New(rand.NewPCG(seed, uint64(id)))
	begun := time.Now()
	for n := uint64(1); ctx.Err() == nil; n++ {
		if time.Since(begun) > forever {
			panic("somebody waits for ever, and the clients keep the clock going: look for who does, with GOTRACEBACK=all")
		}
		e := Event{Register: inMemory, Do: reads}
		if r.IntN(2) == 0 {
			e.Register = onDisk
		}
		if r.IntN(2) == 0 {
			e.Do, e.Value = writes, uint64(id)<<32|n
		}
		for {
			if w.ask(r, id, e) {
				break
			}
			select {
			case <-time.After(tick):
				continue
			case <-ctx.Done():
				return
			}
		}
		time.Sleep(time.Duration(r.IntN(4)) * tick)
	}
}

// ask tries the hosts in any order. It reports whether one of them answered.
func (w *World) ask(r *rand.Rand, id int, e Event) bool {
	for _, i := range r.Perm(len(w.Hosts)) {
		vm := w.Hosts[i].machine()
		if vm == nil {
			continue
		}
		call := w.instant()
		value, err := vm.access(e.Register, e.Do == writes, e.Value)
		if err != nil {
			continue // nothing was done
		}
		e.Value = value
		w.mu.Lock()
		w.history.add(id, call, w.now(), e)
		w.mu.Unlock()
		return true
	}
	return false
}
