package e2e

import (
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/drafter-vm/drafter/pkg/control"
)

// slowLink is a proxy that lets only so many bytes a second through from the source.
type slowLink struct {
	addr  string
	close func()
	rate  atomic.Int64 // bytes per second

	mu    sync.Mutex // guards what follows
	conns []net.Conn
}

func newSlowLink(t *testing.T, source string, bytesPerSecond int) *slowLink {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &slowLink{addr: l.Addr().String()}
	p.rate.Store(int64(bytesPerSecond))
	var wg sync.WaitGroup
	tokens := make(chan struct{}) // each lets 16 KiB pass
	done := make(chan struct{})
	wg.Go(func() {
		tick := time.NewTicker(5 * time.Millisecond)
		defer tick.Stop()
		last, due := time.Now(), 0.0 // bytes
		for {
			now := time.Now()
			for due += now.Sub(last).Seconds() * float64(p.rate.Load()); due >= 16<<10; due -= 16 << 10 {
				select {
				case tokens <- struct{}{}:
				case <-done:
					return
				}
			}
			last = now
			select {
			case <-tick.C:
			case <-done:
				return
			}
		}
	})
	p.close = sync.OnceFunc(func() { l.Close(); close(done); p.cut(); wg.Wait() })
	t.Cleanup(p.close)
	wg.Go(func() {
		for {
			down, err := l.Accept()
			if err != nil {
				return
			}
			up, err := net.Dial("tcp", source)
			if err != nil {
				down.Close() // the source is not there now
				continue
			}
			p.mu.Lock()
			p.conns = append(p.conns, down, up)
			p.mu.Unlock()
			wg.Go(func() {
				io.Copy(up, down)
				up.Close() // with one direction the connection ends
				down.Close()
			})
			wg.Go(func() {
				defer up.Close()
				defer down.Close()
				b := make([]byte, 16<<10)
				for {
					n, err := up.Read(b)
					if n > 1024 { // what is small is no content
						select {
						case <-tokens:
						case <-done:
							return
						}
					}
					if n > 0 {
						if _, err := down.Write(b[:n]); err != nil {
							return
						}
					}
					if err != nil {
						return
					}
				}
			})
		}
	})
	return p
}

// cut ends all connections. New ones may be made.
func (p *slowLink) cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.conns {
		c.Close()
	}
	p.conns = nil
}

// ports are the ports that freePort has looked at.
var ports sync.Map

// freePort is an address nobody listens on, nor will: who asks for any port gets one of others, so that no neighbour takes it while it is not in use.
func freePort(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range")
	if err != nil {
		t.Fatal(err)
	}
	var first int // of those that the kernel chooses from
	if _, err := fmt.Sscan(string(text), &first); err != nil {
		t.Fatal(err)
	}
	for ctx := newContext(t); ctx.Err() == nil; {
		port := 0
		if first > 4096 { // otherwise it has them all
			port = 1024 + rand.IntN(first-1024)
			if _, looked := ports.LoadOrStore(port, true); looked {
				continue
			}
		}
		if l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port)); err == nil {
			l.Close()
			return l.Addr().String()
		}
	}
	t.Fatal("no port is free")
	return ""
}

// loaded makes a package, and a saved instance of it in a folder whose guest writes to memory and disk whenever it runs: all of that
// memory is dirty again after each round of a slow migration.
func (w *workshop) loaded(t *testing.T, folder string) {
	t.Helper()
	w.pack(t)
	c := w.start(t, w.console, w.peer("package", folder)...)
	c.waitFor(t, "Resumed VM")
	w.do(t, "mem start 32 random")
	w.do(t, "disk disk start 4096")
	c.Process.Signal(syscall.SIGTERM)
	c.wait(t, 0)
}

// worksOn checks everything that a loaded guest can know of what became of it, and lets it go on.
func (w *workshop) worksOn(t *testing.T) {
	t.Helper()
	w.do(t, "mem stop")
	w.do(t, "mem verify")
	last := w.do(t, "disk disk verify")
	w.do(t, "mem go")
	w.do(t, "disk disk start 4096 "+last)
	if strings.Contains(w.console.Log(), "I/O error") {
		t.Error("the guest saw an I/O error")
	}
}

// TestCommandPostCopy moves a guest that writes faster than the link carries. It runs at its destination while most of it is
// still at the source, and nothing that then happens to the link or to either peer process costs it anything.
func TestCommandPostCopy(t *testing.T) {
	t.Parallel()
	w := newWorkshop(t)
	w.loaded(t, "first")
	holder := "first"

	// The source does not read the console: what is said there is for the destination, where the guest is by then.
	addr := freePort(t)
	source := func(t *testing.T) *command {
		return w.start(t, w.console, w.peer("package", holder, "--enable-input=false", "--laddr", addr, "--max-total-time", "8s")...)
	}
	destination := func(t *testing.T, folder string, link *slowLink, more ...string) *command {
		return w.start(t, w.console, w.peer("package", folder, append([]string{"--raddr", link.addr}, more...)...)...)
	}
	for _, tt := range []struct {
		name      string
		contained bool     // what it tests is also part of another
		more      []string // arguments of the destination
		during    func(t *testing.T, link *slowLink, src, dst **command)
	}{
		{"undisturbed", true, nil, func(*testing.T, *slowLink, **command, **command) {}},
		{"link cut", false, []string{"--control", w.path("late.sock")}, func(t *testing.T, link *slowLink, src, dst **command) {
			// Who asks hears how it is already, and what cannot be done yet.
			out, _ := w.ctl(t, 0, "--control", w.path("late.sock"), "status")
			var s control.Status
			if err := json.Unmarshal([]byte(out), &s); err != nil || s.State != "running" || s.Missing == 0 || s.PID != machinePID(t, *dst) || s.UnderWay != "reception" {
				t.Errorf("%v: it is %s", err, out)
			}
			if _, said := w.ctl(t, 1, "--control", w.path("late.sock"), "pause"); !strings.Contains(said, "still to come") {
				t.Errorf("it says %s", said)
			}
			for range 3 {
				link.cut()
				w.pass(*dst, 500)
			}
		}},
		{"source killed", true, nil, func(t *testing.T, link *slowLink, src, dst **command) {
			(*src).Process.Kill()
			(*src).wait(t, -1)
			*src = source(t)
			(*src).waitFor(t, "Adopted VM on ")
		}},
		{"destination killed", true, nil, func(t *testing.T, link *slowLink, src, dst **command) {
			folder := holder + "'"
			(*dst).Process.Kill()
			(*dst).wait(t, -1)
			*dst = destination(t, folder, link)
			(*dst).waitFor(t, "Adopted VM on ")
		}},
		{"both killed", false, nil, func(t *testing.T, link *slowLink, src, dst **command) {
			folder := holder + "'"
			(*src).Process.Kill()
			(*dst).Process.Kill()
			(*src).wait(t, -1)
			(*dst).wait(t, -1)
			// The destination may find its machine waiting for a page, and then waits with it.
			*dst = destination(t, folder, link, "--rescue-timeout", "2s")
			w.pass(*dst, 3000)
			*src = source(t)
			(*src).waitFor(t, "Adopted VM on ")
			(*dst).waitFor(t, "Adopted VM on ")
		}},
		// The agent, which waits for what does not come, is waited for.
		{"source gone for long", false, []string{"--rescue-timeout", "2s", "--resume-timeout", "10s"}, func(t *testing.T, link *slowLink, src, dst **command) {
			(*src).Process.Kill()
			(*src).wait(t, -1)
			(*dst).waitFor(t, "The VM is frozen")
			*src = source(t)
			(*src).waitFor(t, "Adopted VM on ")
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.contained && !*long {
				t.Skip("a case here contains it: run with -long")
			}
			src := source(t)
			src.waitFor(t, "Serving on ")
			link := newSlowLink(t, addr, 8<<20)
			there := holder + "'"
			dst := destination(t, there, link, tt.more...)
			dst.waitFor(t, "VM runs here")
			if strings.Contains(dst.said(), "Received VM") {
				t.Error("everything was there when the guest ran: nothing is tested")
			}
			tt.during(t, link, &src, &dst)
			dst.waitFor(t, "Received VM")
			src.wait(t, 0)
			if !strings.Contains(src.said(), "Sent VM") {
				t.Errorf("the source does not say that it sent the VM:\n%s", src.said())
			}
			w.worksOn(t)
			// The agent is told beside everything else, and may have had to wait for its pages.
			const pair = "[before][after]"
			told, ctx := "", newContext(t)
			for balanced := false; !balanced && ctx.Err() == nil; {
				told = strings.Trim(w.do(t, "cat /hooks"), `"`)
				balanced = strings.Count(told, pair)*len(pair) == len(told)
			}
			if ctx.Err() != nil {
				t.Errorf("the guest was told %s", told)
			}
			dst.Process.Signal(syscall.SIGTERM)
			dst.wait(t, 0)
			w.checkClean(t)
			if err := os.RemoveAll(w.path(holder)); err != nil {
				t.Fatal(err)
			}
			holder = there
		})
		if t.Failed() {
			return
		}
	}
}

// TestCommandThrottle moves such a guest without that. It is not parallel: a neighbour, too, would slow the guest down.
func TestCommandThrottle(t *testing.T) {
	w := newWorkshop(t)
	w.loaded(t, "here")
	src := w.start(t, w.console, w.peer("package", "here", "--enable-input=false", "--laddr", "127.0.0.1:0", "--disable-postcopy-migration")...)
	link := newSlowLink(t, src.waitFor(t, "Serving on "), 24<<20)
	dst := w.start(t, w.console, w.peer("package", "there", "--raddr", link.addr)...)
	dst.waitFor(t, "Received VM")
	src.wait(t, 0)
	if !strings.Contains(src.said(), "action=throttle") {
		t.Errorf("the guest was not slowed down:\n%s", src.said())
	}
	w.worksOn(t)
	dst.Process.Signal(syscall.SIGTERM)
	dst.wait(t, 0)
	w.checkClean(t)
}
