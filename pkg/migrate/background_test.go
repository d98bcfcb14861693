package migrate

import (
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

func TestSpareProcessors(t *testing.T) {
	before := runtime.GOMAXPROCS(0)
	one := spareProcessors(before + 3)
	two := spareProcessors(before + 5)
	three := spareProcessors(1)
	if got := runtime.GOMAXPROCS(0); got != before+5 {
		t.Errorf("%d processors, want %d", got, before+5)
	}
	two()
	two()
	one()
	if got := runtime.GOMAXPROCS(0); got != before+5 {
		t.Errorf("%d processors while one needs them, want %d", got, before+5)
	}
	three()
	if got := runtime.GOMAXPROCS(0); got != before {
		t.Errorf("%d processors at the end, want %d", got, before)
	}

	// What somebody else sets meanwhile stays.
	defer runtime.GOMAXPROCS(before)
	one = spareProcessors(before + 3)
	runtime.GOMAXPROCS(before + 1)
	two = spareProcessors(before + 5)
	one()
	two()
	if got := runtime.GOMAXPROCS(0); got != before+1 {
		t.Errorf("%d processors, want the %d that were set", got, before+1)
	}
}

func TestStepBack(t *testing.T) {
	nice := func() int {
		v, err := unix.Getpriority(unix.PRIO_PROCESS, 0)
		if err != nil {
			t.Fatal(err)
		}
		return 20 - v
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	before := nice()
	got := make(chan int)
	go func() {
		var b background
		b.stepBack()
		b.stepBack()
		got <- nice()
	}()
	if got := <-got; got != min(19, before+behind) {
		t.Errorf("the thread has nice %d, want %d more than %d", got, behind, before)
	}
	if got := nice(); got != before {
		t.Errorf("another thread has nice %d, had %d", got, before)
	}
}
