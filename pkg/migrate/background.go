package migrate

import (
	"os"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"
)

// While somebody may wait for pages, the goroutines that carry what nobody waits for must not be in the way of those that do.
// What is in the way is not the link but the processors: Go's scheduler looks at the network when a processor (a P of
// GOMAXPROCS) has nothing else to do, which with as many busy goroutines as there are processors is every ten milliseconds;
// and the kernel lets a running thread go on for some milliseconds before one that woke. So the stream's goroutines get threads
// of their own, of a slightly lower priority, and beside them there are processors to spare.

// behind is by how much the priority of the stream's threads is lower (nice(2)): they get half of what others get where all
// processors are busy. With much more a busy host would starve them, and the garbage collector with them, which waits for each
// goroutine.
const behind = 3

// background is a goroutine that steps back once.
type background struct{ stepped bool }

// stepBack makes the calling goroutine one of the stream. There is no way back: a thread may not raise its priority again
// without privileges. It ends with the goroutine.
func (b *background) stepBack() {
	if b.stepped {
		return
	}
	b.stepped = true
	runtime.LockOSThread()
	if v, err := unix.Getpriority(unix.PRIO_PROCESS, 0); err == nil { // of the thread; 20 − nice
		_ = unix.Setpriority(unix.PRIO_PROCESS, 0, min(19, 20-v+behind)) // without it all is as before
	}
}

// spare is how GOMAXPROCS was raised.
var spare struct {
	sync.Mutex // guards what follows
	users      int
	before     int // GOMAXPROCS without users
	raised     int // and now
}

// spareProcessors lets n goroutines run at a time, at least, until release is called: the kernel is better at choosing among
// their threads than Go's scheduler, which knows no priorities.
func spareProcessors(n int) (release func()) {
	spare.Lock()
	defer spare.Unlock()
	now := runtime.GOMAXPROCS(0)
	if spare.users == 0 {
		spare.before, spare.raised = now, now
	}
	spare.users++
	if now == spare.raised && n > now { // else somebody else has set it
		runtime.GOMAXPROCS(n)
		spare.raised = n
	}
	return sync.OnceFunc(func() {
		spare.Lock()
		defer spare.Unlock()
		if spare.users--; spare.users > 0 || spare.raised == spare.before || runtime.GOMAXPROCS(0) != spare.raised {
			return
		}
		if os.Getenv("GOMAXPROCS") == "" {
			runtime.SetDefaultGOMAXPROCS() // which goes on to follow the limits of the cgroup, unlike a number
		}
		if runtime.GOMAXPROCS(0) != spare.before {
			runtime.GOMAXPROCS(spare.before)
		}
	})
}
