package e2e

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"image"
	"image/color"
	"image/png"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/drafter-vm/drafter/internal/testnet"
	"github.com/drafter-vm/drafter/internal/testvnc"
	"github.com/drafter-vm/drafter/pkg/forward"
	"github.com/drafter-vm/drafter/pkg/nat/rule"
	"github.com/drafter-vm/drafter/pkg/vmpackage"
)

// screenshots is where TestDesktopMoves writes what it saw.
var screenshots = flag.String("screenshots", "", "write the screenshots of the desktop to this `folder` (default: the test's artifacts)")

// TestDesktopMoves: one looks at a guest's screen and types on its keyboard, by VNC, before and after a live move between hosts, over the
// connection that was there before and over a new one. Nothing of the screen is lost, and what is typed looks the same at both places. The
// guest has no GPU: its programs paint by OpenGL all the same, also while it moves back. It is not parallel: it waits for pictures, by the clock.
func TestDesktopMoves(t *testing.T) {
	if !*long {
		t.Skip("LEFT OUT: A DESKTOP THAT MOVES takes minutes and downloads 180 MB once: `make test-desktop`, or -args -long")
	}
	began := time.Now()
	w := newWorkshop(t)
	h := testnet.NewTestHosts(t, "a", "b", "world")
	netns, forwards := networks(t, h, "a", "b")
	start := func(host string, args ...string) (c *command) {
		t.Helper()
		if err := testnet.Do(h.Host(host), func() error { c = w.start(t, w.console, args...); return nil }); err != nil {
			t.Fatal(err)
		}
		return c
	}
	took := func(what string) {
		t.Helper()
		t.Logf("%s after %.1f s", what, time.Since(began).Seconds())
	}

	// A blueprint, a package, an instance of it. Of a server that ends the console tells, which is shown when the test fails.
	tells := "[Service]\nExecStopPost=+/bin/sh -c 'echo VNC has ended: $SERVICE_RESULT, $EXIT_CODE $EXIT_STATUS >/dev/console; journalctl -n 20 -o cat -u %n >/dev/console'\n"
	if err := os.WriteFile(w.path("tells.conf"), []byte(tells), 0o644); err != nil {
		t.Fatal(err)
	}
	args := []string{"blueprint", "--desktop=foot --font=monospace:size=14", "--packages", "mesa-utils", "--copy",
		w.path("tells.conf") + ":/etc/systemd/system/drafter-vnc.service.d/tells.conf", "--output", w.path("blueprint"), "--agent", build(t, "../../cmd/drafter-agent")}
	if cache := os.Getenv("DRAFTER_TEST_CACHE"); cache != "" {
		args = append(args, "--cache", cache)
	}
	patiently := func(c *command) { // a download, and a boot of more than other guests have, may take longer than all else
		t.Helper()
		select {
		case <-c.done:
		case <-time.After(10 * time.Minute):
		}
		c.wait(t, 0)
	}
	patiently(w.start(t, nil, args...))
	took("blueprint built")
	var devices []string
	for _, name := range []string{"state", "memory", "config", "kernel", "initrd", "disk"} {
		input := ""
		switch name {
		case "kernel", "initrd", "disk":
			input = w.path(filepath.Join("blueprint", vmpackage.DefaultFile(name)))
		}
		devices = append(devices, fmt.Sprintf(`{"name":%q,"input":%q,"output":%q}`, name, input, w.path(filepath.Join("package", vmpackage.DefaultFile(name)))))
	}
	patiently(start("a", "snapshotter", "--devices", "["+strings.Join(devices, ",")+"]", "--netns", netns["a"], "--memory-size", "512",
		"--chroot-base-dir", w.vms(), "--resume-timeout", "10m"))
	took("snapshot taken: VNC answers")
	peerOn := func(host, instance string, more ...string) *command {
		t.Helper()
		return start(host, w.peer("package", instance, append([]string{"--netns", netns[host], "--laddr", h.Addr4(host).String() + ":0"}, more...)...)...)
	}
	// lookAt has the host that has the VM forward to it, and no other, and connects to an address of it.
	lookAt := func(host string, addr netip.Addr, patient bool) *testvnc.Client {
		t.Helper()
		for name, f := range forwards {
			var list []forward.Forward
			if name == host {
				list = []forward.Forward{{Netns: netns[host], InternalPort: 5900, Protocol: rule.TCP, External: ":5900"}}
			}
			if err := f.Set(t.Context(), list); err != nil {
				t.Fatal(err)
			}
		}
		ctx := newContext(t)
		var c *testvnc.Client
		for {
			var conn net.Conn
			err := testnet.Do(h.Host("world"), func() (err error) {
				conn, err = (&net.Dialer{}).DialContext(ctx, "tcp", netip.AddrPortFrom(addr, 5900).String())
				return err
			})
			if err == nil {
				c, err = testvnc.New(ctx, conn)
			}
			if err == nil {
				break
			}
			if !patient || ctx.Err() != nil {
				t.Fatal(err)
			}
			time.Sleep(200 * time.Millisecond)
		}
		t.Cleanup(func() {
			if t.Failed() {
				now, cancel := context.WithCancel(t.Context())
				cancel()
				_, err := c.Settled(now, 0)
				t.Logf("the connection to %s, at the end: %v", addr, err)
			}
			c.Close()
		})
		// Out of the way: its shape is not the same after another has connected.
		if corner := c.Screen().Rect.Max; c.Point(corner.X-1, corner.Y-1) != nil {
			t.Fatal("cannot move the pointer")
		}
		return c
	}

	a := peerOn("a", "at-a")
	a.waitFor(t, "Resumed VM")
	// What dies is started again: the compositor, and with it its program and the server; then the server alone, of which the terminal notices
	// nothing.
	at := &terminal{Client: lookAt("a", h.Addr4("a"), false)}
	kill := func(program string) {
		t.Helper()
		if err := at.Type("pkill " + program + "\n"); err != nil {
			t.Fatal(err)
		}
		ended := newContext(t)
		if _, err := at.Wait(ended, func(*image.RGBA) bool { return false }); ended.Err() != nil {
			t.Fatalf("the server does not end: %v", err)
		}
		at.Close()
		at = at.through(lookAt("a", h.Addr4("a"), true))
		took(program + " was killed, and is there again")
	}
	at.appear(t)
	kill("cage")
	at.appear(t)
	at.calibrate(t)
	kill("wayvnc")
	at.next++
	at.idle(t)
	at.clear(t)

	const sentence = "The same words, pixel by pixel: 0123456789"
	first := at.run(t, "echo "+sentence, 1)
	renderer := at.run(t, "eglinfo -B 2>/dev/null | grep -om1 llvmpipe", 1)
	name := at.run(t, "echo llvmpipe", 1)
	at.run(t, "echo This was typed before the move.", 1)
	if !same(renderer, name) {
		t.Error("eglinfo does not say that OpenGL is rendered by llvmpipe")
	}
	if same(first, name) || same(first, at.line(at.Screen(), at.next+5)) {
		t.Fatal("two lines of other words, or an empty one, look the same: nothing can be compared")
	}
	before := at.idle(t)
	keep(t, "desktop-before", at.Screen())

	// While it moves nothing is typed.
	moved := time.Now()
	b := peerOn("b", "at-b", "--raddr", a.waitFor(t, "Serving on "))
	b.waitFor(t, "Received VM")
	took(fmt.Sprintf("moved from a to b in %.1f s, %s", time.Since(moved).Seconds(), downtimeOf(a.waitFor(t, "Sent VM to "))))
	a.waitFor(t, " connections that began here until they end")
	if kept := at.idle(t); !same(kept, before) {
		keep(t, "desktop-differs", kept)
		t.Errorf("the connection of before shows another screen after the move, at %v", difference(kept, before))
	}
	anew := lookAt("b", h.Addr6("b"), false)
	if seen := at.through(anew).idle(t); !same(seen, before) {
		keep(t, "desktop-differs", seen)
		t.Errorf("a new connection shows another screen than was there before the move, at %v", difference(seen, before))
	}

	// Each connection types, and both show it.
	typed := time.Now()
	again := at.run(t, "echo "+sentence, 1)
	t.Logf("typed, run and seen over the connection of before within %.1f s", time.Since(typed).Seconds())
	if !same(again, first) {
		t.Errorf("the same words look different after the move, at %v", difference(again, first))
	}
	onNew := at.through(anew)
	onNew.run(t, "echo This was typed after the move.", 1)
	after := onNew.idle(t)
	keep(t, "desktop-after", anew.Screen())
	changed := difference(after, before)
	if below := at.cell(onNew.next, 0).Min.Y; changed.Empty() || changed.Min.Y < at.cell(at.next-2, 0).Min.Y || changed.Max.Y > below+at.size.Y {
		t.Errorf("typing changed the screen at %v, want below %v and above %d", changed, at.cell(at.next-2, 0), below)
	}
	at.next = onNew.next
	if both := at.idle(t); !same(both, after) {
		t.Errorf("the connection of before shows another screen than the new one, at %v", difference(both, after))
	}

	// Gears that turn are painted by OpenGL, and go on turning when it moves back.
	if err := at.Type("timeout 90 es2gears_wayland >/dev/null 2>&1\n"); err != nil {
		t.Fatal(err)
	}
	gears, err := at.Wait(newContext(t), turning)
	if err != nil {
		t.Fatalf("no gears: %v", err)
	}
	keep(t, "desktop-gears", gears)
	took("gears turn")
	home := peerOn("a", "at-a-again", "--raddr", b.waitFor(t, "Serving on "))
	home.waitFor(t, "Received VM")
	t.Logf("moved back to a while gears turn: %s", downtimeOf(b.waitFor(t, "Sent VM to ")))
	frames := 0
	for range 2 {
		seen := at.Screen()
		if _, err := at.Wait(newContext(t), func(now *image.RGBA) bool { return turning(now) && !same(now, seen) }); err != nil {
			t.Errorf("the gears do not turn after the move back: %v", err)
			break
		}
		frames++
	}
	took(fmt.Sprintf("saw %d pictures of gears after the move back", frames))

	for _, c := range []*testvnc.Client{at.Client, anew} {
		c.Close()
	}
	a.wait(t, 0)
	b.wait(t, 0)
	home.Process.Signal(os.Interrupt)
	home.wait(t, 0)
	w.checkClean(t)
	took("done")
}

// terminal is a terminal that fills a screen, with a shell whose prompt is "$ ". What it shows is looked at in lines of cells.
type terminal struct {
	*testvnc.Client
	origin, size image.Point // of the cell at line 0 and column 0
	prompt       *image.RGBA // as it is at the beginning of a line, with a cursor behind
	next         int         // the line that has the prompt
}

// foreground is what text and cursor are painted in.
var foreground = color.RGBA{255, 255, 255, 255}

// painted is how many pixels have the colour of text.
func painted(i *image.RGBA) (n int) {
	for p := i.Pix; len(p) > 0; p = p[4:] {
		if p[0] == 255 && p[1] == 255 && p[2] == 255 {
			n++
		}
	}
	return n
}

// appear waits for the first prompt of a terminal.
func (s *terminal) appear(t *testing.T) {
	t.Helper()
	_, err := s.Wait(newContext(t), func(i *image.RGBA) bool { return firstBar(i).Dy() > 8 && painted(i) > 200 }) // cursor and text
	if err == nil {
		_, err = s.Settled(newContext(t), 2*time.Second)
	}
	if err != nil {
		keep(t, "desktop-empty", s.Screen())
		t.Fatalf("no prompt: %v", err)
	}
}

// calibrate measures the cells of the terminal: by a bar that is twenty of them wide.
func (s *terminal) calibrate(t *testing.T) {
	t.Helper()
	const wide = 20
	if err := s.Type(fmt.Sprintf("PS1='$ '; clear; printf '\\033[7m%%%ds\\033[m\\n'\n", wide)); err != nil {
		t.Fatal(err)
	}
	var bar image.Rectangle
	screen, err := s.Wait(newContext(t), func(i *image.RGBA) bool {
		bar = firstBar(i)
		return bar.Dx() >= wide*4 && bar.Dx()%wide == 0 && bar.Min.Y < 8 && painted(i) < bar.Dx()*bar.Dy()*5/4 // nothing else but a prompt
	})
	if err != nil {
		keep(t, "desktop-uncalibrated", screen)
		t.Fatalf("measure cells: %v", err)
	}
	s.origin, s.size, s.next = bar.Min, image.Pt(bar.Dx()/wide, bar.Dy()), 1
	if screen, err = s.Settled(newContext(t), 3*time.Second); err != nil {
		t.Fatal(err)
	}
	s.prompt = s.begin(screen, s.next)
	if at := firstBar(s.prompt); at.Min.X != s.cell(s.next, 2).Min.X || at.Dx() != s.size.X {
		t.Fatalf("there is no prompt with a cursor below the bar: cells of %v at %v, cursor at %v", s.size, s.origin, at)
	}
	t.Logf("a screen of %v with cells of %v", screen.Rect.Max, s.size)
}

// firstBar is the uppermost area in the colour of text that is as wide in all of its lines, and at least as high as a capital letter.
func firstBar(i *image.RGBA) image.Rectangle {
	run := func(x, y int) int {
		n := 0
		for ; x+n < i.Rect.Max.X && i.RGBAAt(x+n, y) == foreground; n++ {
		}
		return n
	}
	for y := i.Rect.Min.Y; y < i.Rect.Max.Y; y++ {
		for x := i.Rect.Min.X; x < i.Rect.Max.X; x++ {
			n := run(x, y)
			if n < 4 {
				continue
			}
			high := 1
			for y+high < i.Rect.Max.Y && run(x, y+high) == n {
				high++
			}
			if high >= 8 {
				return image.Rect(x, y, x+n, y+high)
			}
		}
	}
	return image.Rectangle{}
}

// through is the same terminal, seen over another connection.
func (s *terminal) through(c *testvnc.Client) *terminal {
	other := *s
	other.Client = c
	return &other
}

func (s *terminal) cell(line, column int) image.Rectangle {
	return image.Rectangle{Max: s.size}.Add(s.origin).Add(image.Pt(column*s.size.X, line*s.size.Y))
}

// line is a line of the terminal, of its first 60 columns.
func (s *terminal) line(screen *image.RGBA, n int) *image.RGBA {
	return screen.SubImage(s.cell(n, 0).Union(s.cell(n, 59))).(*image.RGBA)
}

// begin is the begin of a line: a prompt and what is behind it.
func (s *terminal) begin(screen *image.RGBA, n int) *image.RGBA {
	return screen.SubImage(s.cell(n, 0).Union(s.cell(n, 3))).(*image.RGBA)
}

// pointer is how much of the screen's lower end a pointer in its corner may cover.
const pointer = 16

// idle waits for the prompt, and until the screen stands still, and returns it, without where the pointer is.
func (s *terminal) idle(t *testing.T) *image.RGBA {
	t.Helper()
	screen, err := s.Wait(newContext(t), func(i *image.RGBA) bool { return same(s.begin(i, s.next), s.prompt) })
	if err != nil {
		keep(t, "desktop-busy", screen)
		t.Fatalf("no prompt at line %d: %v", s.next, err)
	}
	if screen, err = s.Settled(newContext(t), time.Second); err != nil {
		t.Fatal(err)
	}
	return screen.SubImage(image.Rectangle{Max: screen.Rect.Max.Sub(image.Pt(0, pointer))}).(*image.RGBA)
}

// clear empties the screen.
func (s *terminal) clear(t *testing.T) {
	t.Helper()
	if err := s.Type("clear\n"); err != nil {
		t.Fatal(err)
	}
	s.next = 0
	s.idle(t)
}

// run types a command that prints some lines, waits for the next prompt and returns the last line before it.
func (s *terminal) run(t *testing.T, command string, prints int) *image.RGBA {
	t.Helper()
	if err := s.Type(command + "\n"); err != nil {
		t.Fatal(err)
	}
	s.next += 1 + prints
	return s.line(s.idle(t), s.next-1)
}

// same reports whether two pictures of the same size have the same pixels, wherever they are.
func same(a, b *image.RGBA) bool {
	return a.Rect.Size() == b.Rect.Size() && difference(a, b).Empty()
}

// difference is the area, in a, of the pixels that two pictures of one size do not have in common.
func difference(a, b *image.RGBA) image.Rectangle {
	var area image.Rectangle
	for y := range a.Rect.Dy() {
		rowA, rowB := a.Pix[y*a.Stride:][:4*a.Rect.Dx()], b.Pix[y*b.Stride:][:4*b.Rect.Dx()]
		if bytes.Equal(rowA, rowB) {
			continue
		}
		for x := range a.Rect.Dx() {
			if !bytes.Equal(rowA[4*x:4*x+4], rowB[4*x:4*x+4]) {
				area = area.Union(image.Rect(x, y, x+1, y+1))
			}
		}
	}
	return area.Add(a.Rect.Min)
}

// turning reports whether a picture is that of the gears: much of it is red, green and blue.
func turning(i *image.RGBA) bool {
	var most [3]int
	for p := i.Pix; len(p) > 0; p = p[4:] {
		for n := range most {
			if c := p[n]; c > 150 && c/2 > p[(n+1)%3] && c/2 > p[(n+2)%3] {
				most[n]++
			}
		}
	}
	return min(most[0], most[1], most[2]) > 5000
}

// keep writes a picture down.
func keep(t *testing.T, name string, i *image.RGBA) {
	t.Helper()
	dir := *screenshots
	if dir == "" {
		dir = t.ArtifactDir()
	}
	var b bytes.Buffer
	encoder := png.Encoder{CompressionLevel: png.BestCompression}
	err := encoder.Encode(&b, i)
	if err == nil {
		err = os.MkdirAll(dir, 0o755)
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, name+".png"), b.Bytes(), 0o644)
	}
	if err != nil {
		t.Error(err)
	}
	t.Logf("screenshot %s, %d bytes", filepath.Join(dir, name+".png"), b.Len())
}
