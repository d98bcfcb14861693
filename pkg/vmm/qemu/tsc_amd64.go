package qemu

import (
	"sync"
	"time"
)

// rdtsc reads this processor's time stamp counter, which is also that of a guest whose CPU is emulated.
func rdtsc() uint64

// tscRate is how fast the time stamp counter runs, in kHz. Tests replace it.
var tscRate = sync.OnceValue(measureTSC)

// measureTSC takes 50 ms. Each end is read again until nothing came between the two clocks, so the result is off by less
// than a hundredth of a percent: a guest refines it, but only if it is near.
func measureTSC() int {
	read := func() (at time.Time, tsc uint64) {
		best := time.Hour
		for range 1000 {
			before := time.Now()
			t := rdtsc()
			if d := time.Since(before); d < best {
				best, at, tsc = d, before, t
			}
			if best < time.Microsecond {
				break
			}
		}
		return at, tsc
	}
	t0, c0 := read()
	time.Sleep(50 * time.Millisecond)
	t1, c1 := read()
	return int(float64(c1-c0) / float64(t1.Sub(t0).Nanoseconds()) * 1e6)
}
