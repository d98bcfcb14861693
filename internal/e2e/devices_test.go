package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/drafter-vm/drafter/internal/testguest"
	"github.com/drafter-vm/drafter/pkg/agent"
	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/peer"
	"github.com/drafter-vm/drafter/pkg/runner"
	"github.com/drafter-vm/drafter/pkg/vmpackage"
)

// goesOn is the configuration of an instance in a folder that goes on from others.
func (g *guest) goesOn(t *testing.T, folder string, parents ...string) peer.Config {
	t.Helper()
	cfg := g.config(t, folder)
	for _, p := range parents {
		for i, d := range g.config(t, p).Devices {
			cfg.Devices[i].Beneath = append(cfg.Devices[i].Beneath, runner.Layer{Overlay: d.Overlay, State: d.State})
		}
	}
	return cfg
}

// TestForks has two instances go on from one that was closed, at the same time, and one more from one of these; moves one of them to a host that
// has nothing but the package; and folds one into its parent.
func TestForks(t *testing.T) {
	t.Parallel()
	g := newGuest(t)
	before := digests(t, g.pkg)
	parent, fork := shortDir(t), shortDir(t)
	first := g.console
	closed := func(cfg peer.Config, work func()) {
		t.Helper()
		p, err := peer.Resume(newContext(t), cfg)
		if err != nil {
			t.Fatal(err)
		}
		work()
		if err := p.Close(context.WithoutCancel(t.Context())); err != nil {
			t.Fatal(err)
		}
	}
	var written string
	closed(g.config(t, parent), func() {
		g.do(t, "put /name parent")
		written = g.do(t, "disk disk write 0 65536 1")
	})

	type running struct {
		peer    *peer.Peer
		console *testguest.Console
	}
	var forks []running
	for _, folder := range []string{fork, shortDir(t)} {
		g.console = newConsole(t)
		p, err := peer.Resume(newContext(t), g.goesOn(t, folder, parent))
		if err != nil {
			t.Fatal(err)
		}
		defer func() { p.Close(context.WithoutCancel(t.Context())) }()
		forks = append(forks, running{p, g.console})
	}
	names := []string{"fork", "sibling"}
	for n, f := range forks {
		g.console = f.console
		if got := g.do(t, "cat /name"); !strings.Contains(got, "parent") {
			t.Errorf("%s finds %s where its parent wrote its name", names[n], got)
		}
		if got := g.do(t, "disk disk sum 0 65536"); got != written {
			t.Errorf("%s finds %s on the disk, its parent wrote %s", names[n], got, written)
		}
		g.do(t, "put /name "+names[n])
		g.do(t, "disk disk write 4096 4096 "+string(rune('2'+n)))
	}
	if _, err := peer.Resume(newContext(t), g.config(t, parent)); err == nil || !strings.Contains(err.Error(), "another process holds it") {
		t.Errorf("resuming the parent of those that run: %v", err)
	}

	// The sibling goes to a host that knows the package alone.
	g.console = forks[1].console
	want := g.do(t, "disk disk sum 0 65536")
	there, report := move(t, forks[1].peer, g.config(t, shortDir(t)))
	defer there.Close(context.WithoutCancel(t.Context()))
	if got := g.do(t, "cat /name"); !strings.Contains(got, "sibling") {
		t.Errorf("after the move the sibling's name is %s", got)
	}
	if got := g.do(t, "disk disk sum 0 65536"); got != want {
		t.Errorf("after the move its disk has %s, want %s", got, want)
	}
	if report.SameBytes == 0 {
		t.Error("all of the sibling travelled, though both hosts have the package")
	}

	// A third generation, over both.
	g.console = forks[0].console
	if err := forks[0].peer.Close(context.WithoutCancel(t.Context())); err != nil {
		t.Fatal(err)
	}
	g.console = newConsole(t)
	grandchild := g.goesOn(t, shortDir(t), parent, fork)
	closed(grandchild, func() {
		if got := g.do(t, "cat /name"); !strings.Contains(got, "fork") {
			t.Errorf("the grandchild finds %s where its parent wrote its name", got)
		}
	})

	// What the fork holds becomes its parent's. It goes on from there; a sibling's files do not.
	for _, d := range g.goesOn(t, fork, parent).Devices {
		commit(t, d.DeviceConfig)
	}
	g.console = first
	closed(g.config(t, parent), func() {
		if got := g.do(t, "cat /name"); !strings.Contains(got, "fork") {
			t.Errorf("the parent finds %s where the fork that was committed to it wrote its name", got)
		}
	})
	if _, err := peer.Resume(newContext(t), grandchild); err == nil || !strings.Contains(err.Error(), "changed since the overlay was made") {
		t.Errorf("resuming over what has changed: %v", err)
	}
	if after := digests(t, g.pkg); after != before {
		t.Errorf("the package has changed:\n%s\nwas\n%s", after, before)
	}
}

// commit folds the overlay of a device into the one below it.
func commit(t *testing.T, c runner.DeviceConfig) {
	t.Helper()
	below := c
	last := c.Beneath[len(c.Beneath)-1]
	below.Overlay, below.State, below.Beneath = last.Overlay, last.State, c.Beneath[:len(c.Beneath)-1]
	open := func(c runner.DeviceConfig, base block.Device) *block.Overlay {
		t.Helper()
		o, err := block.OpenOverlay(block.OverlayOptions{Base: base, BasePath: c.Base, Overlay: c.Overlay, State: c.State})
		if err != nil {
			t.Fatal(err)
		}
		return o
	}
	base, err := below.OpenBase()
	if err != nil {
		t.Fatal(err)
	}
	o := open(c, open(below, base))
	if err := o.Commit(t.Context(), nil); err != nil {
		t.Error(err)
	}
	if err := o.Close(); err != nil {
		t.Error(err)
	}
}

// share makes a device of a configuration the file at path, which is shared.
func share(cfg *peer.Config, name, path string) {
	for i := range cfg.Devices {
		if d := &cfg.Devices[i]; d.Name == name {
			d.DeviceConfig = runner.DeviceConfig{Name: name, Base: path, Shared: true}
		}
	}
}

// TestSharedDisk: VMs have one file as a disk, none writes it, and it does not travel. Nor does a base that is to be on both hosts. Hosts that have
// something else are found out before the guest notices anything.
func TestSharedDisk(t *testing.T) {
	t.Parallel()
	g := newGuest(t, "shared:media")
	ctx := newContext(t)
	dir := shortDir(t)
	media := filepath.Join(dir, "media")
	content := make([]byte, diskSize)
	for i := range content {
		content[i] = byte(i*i>>11 ^ i)
	}
	copyOf := func(name string, change int) string {
		t.Helper()
		path := filepath.Join(dir, name)
		changed := bytes.Clone(content)
		changed[diskSize/2] += byte(change)
		if err := os.WriteFile(path, changed, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	copyOf("media", 0)

	var peers []*peer.Peer
	var consoles []*testguest.Console
	for range 2 {
		g.console = newConsole(t)
		cfg := g.config(t, shortDir(t))
		share(&cfg, "media", media)
		p, err := peer.Resume(ctx, cfg)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { p.Close(context.WithoutCancel(t.Context())) }()
		peers, consoles = append(peers, p), append(consoles, g.console)
	}
	sums := make([]string, 2)
	for n, c := range consoles {
		g.console = c
		sums[n] = g.do(t, fmt.Sprintf("disk media sum %d 1048576", diskSize/2))
		if answer, err := c.Do(ctx, "disk media write 0 4096 1"); err == nil {
			t.Errorf("a guest has written a shared disk: %s", answer)
		}
	}
	if sums[0] != sums[1] {
		t.Errorf("the guests see %s and %s", sums[0], sums[1])
	}
	if got, err := os.ReadFile(media); err != nil || !bytes.Equal(got, content) {
		t.Errorf("the shared file has changed (%v)", err)
	}
	if lock, err := runner.LockFile(media, true); err == nil {
		lock.Close()
		t.Error("somebody who would write the shared file may have it")
	}

	// To hosts on which it is another, or the base of the root disk is.
	g.console = consoles[0]
	p := peers[0]
	g.do(t, "put /name first")
	attempt := func(to peer.Config) error {
		t.Helper()
		a, b := net.Pipe()
		defer a.Close()
		defer b.Close()
		received := make(chan error, 1)
		go func() {
			other, _, err := peer.Receive(ctx, to, []io.ReadWriter{b})
			if err == nil {
				other.Close(context.WithoutCancel(t.Context()))
			}
			received <- err
		}()
		_, err := p.Send(ctx, []io.ReadWriter{a})
		return errors.Join(err, <-received)
	}
	other := g.config(t, shortDir(t))
	share(&other, "media", copyOf("other", 1))
	if err := attempt(other); err == nil || !strings.Contains(err.Error(), `device "media": its base is to be on both hosts, and they differ`) {
		t.Errorf("to a host with another file: %v", err)
	}
	elsewhere := g.config(t, shortDir(t))
	share(&elsewhere, "media", copyOf("copy", 0))
	for i := range elsewhere.Devices {
		if d := &elsewhere.Devices[i]; d.Name == "disk" {
			d.Base, d.SharedBase = copyOf("disk", 0), true
		}
	}
	if err := attempt(elsewhere); err == nil || !strings.Contains(err.Error(), `device "disk": its base is to be on both hosts, and they differ`) {
		t.Errorf("to a host with another base: %v", err)
	}
	if got := g.do(t, "cat /name"); !strings.Contains(got, "first") {
		t.Errorf("after moves that were refused its name is %s", got)
	}

	// To one that has a copy.
	to := g.config(t, shortDir(t))
	share(&to, "media", copyOf("copy", 0))
	for i := range to.Devices {
		to.Devices[i].SharedBase = to.Devices[i].Name == "disk"
	}
	moved, report := move(t, p, to)
	defer moved.Close(context.WithoutCancel(t.Context()))
	if report.SameBytes < diskSize || report.DataBytes > diskSize/2 {
		t.Errorf("%d bytes were the same, and %d were sent, of disks of %d bytes", report.SameBytes, report.DataBytes, diskSize)
	}
	if got := g.do(t, fmt.Sprintf("disk media sum %d 1048576", diskSize/2)); got != sums[0] {
		t.Errorf("after the move the shared disk is %s, want %s", got, sums[0])
	}
	if left, err := filepath.Glob(media + ".*"); err != nil || len(left) > 0 {
		t.Errorf("beside the shared file there is %q (%v)", left, err)
	}

	// What can be written cannot be shared.
	wrong := g.config(t, shortDir(t))
	share(&wrong, "disk", media)
	if _, err := peer.Resume(ctx, wrong); err == nil || !strings.Contains(err.Error(), `disk "disk" is shared, and this machine can write it`) {
		t.Errorf("sharing a disk that can be written: %v", err)
	}
}

// TestCommandDevice: an instance is looked at while it runs and after, goes on in another, which becomes independent of it, and then the package.
func TestCommandDevice(t *testing.T) {
	t.Parallel()
	w := newWorkshop(t)
	w.pack(t)
	w.checkClean(t)
	device := func(status int, command, instance string, more ...string) (stdout, stderr string) {
		t.Helper()
		var out bytes.Buffer
		args := append([]string{"device", command, "--package", w.path("package"), "--instance", w.path(instance)}, more...)
		c := w.startWith(t, nil, &out, args...)
		c.wait(t, status)
		return out.String(), c.said()
	}
	says := func(text string, want ...string) {
		t.Helper()
		for _, s := range want {
			if !strings.Contains(text, s) {
				t.Errorf("it does not say %q:\n%s", s, text)
			}
		}
	}
	// lives starts a peer, has its guest do something, and closes it.
	lives := func(instance string, work func(), more ...string) {
		t.Helper()
		c := w.start(t, w.console, w.peer("package", instance, more...)...)
		c.waitFor(t, "Resumed VM")
		work()
		c.Process.Signal(syscall.SIGTERM)
		c.wait(t, 0)
		w.checkClean(t)
	}

	var written string
	lives("work", func() {
		w.do(t, "put /name work")
		written = w.do(t, "disk disk write 0 65536 7")
		text, _ := device(0, "inspect", "work", "disk")
		says(text, "64 MiB", "64 KiB blocks", "in use")
		_, errs := device(1, "commit", "work", "--all")
		says(errs, "its peer, or the machine that a killed peer has left, runs it")
	})
	text, _ := device(0, "inspect", "work")
	says(text, "memory ", "disk ", "64 KiB blocks: 1 held, 0 zero, of 1024")
	text, _ = device(0, "map", "work", "disk")
	says(text, "disk: 64 MiB", "0 B │▅·····")
	text, _ = device(0, "verify", "work")
	says(text, "state: ok", "memory: ok", "disk: ok")

	parent := []string{"--parent", w.path("work")}
	name := func(want string) {
		t.Helper()
		if got := w.do(t, "cat /name"); !strings.Contains(got, want) {
			t.Errorf("the guest's name is %s, want %s", got, want)
		}
		if got := w.do(t, "disk disk sum 0 65536"); got != written {
			t.Errorf("its disk has %s, want %s", got, written)
		}
	}
	lives("fork", func() {
		name("work")
		w.do(t, "put /name fork")
	}, parent...)
	whole, _ := device(0, "verify", "fork", parent...)
	device(0, "rebase", "fork", append([]string{"--all", "--to-package", w.path("package")}, parent...)...)
	if alone, _ := device(0, "verify", "fork"); alone != whole {
		t.Errorf("without its parent it is\n%swith it it was\n%s", alone, whole)
	}
	lives("fork", func() { name("fork") })
	device(0, "commit", "fork", "--all")
	lives("", func() { name("fork") })
	if c := w.start(t, nil, w.peer("package", "work")...); true {
		says(c.wait(t, 1), "changed since the overlay was made", "drafter device rebase --same-contents")
	}
	w.checkClean(t)
}

// TestClones: instances of one package have identities of their own, take the memory that they touch, and keep what they have become. The second records
// what it touches, and those after it hardly wait for that any more.
func TestClones(t *testing.T) {
	t.Parallel()
	count := 3
	if *long {
		count = 50
	}
	g := newGuest(t)
	type clone struct {
		peer     *peer.Peer
		console  *testguest.Console
		dir      string
		identity string
		faults   uint64 // until its agent had answered
	}
	var clones []clone
	workingSet := filepath.Join(g.pkg, "."+vmpackage.DefaultFile(runner.MemoryDevice)+".workingset")
	address := func(n int) string { return fmt.Sprintf("10.9.%d.%d/32", n/250, 1+n%250) }
	config := func(n int, dir string) peer.Config {
		cfg := g.config(t, dir)
		cfg.Clone, cfg.MemoryOnDemand, cfg.HostName = true, true, fmt.Sprintf("clone-%d", n)
		cfg.GuestNetwork = agent.Network{Interface: "lo", Addresses: []string{address(n)}} // it has no other
		if n == 1 {
			cfg.RecordWorkingSet = time.Second
		}
		return cfg
	}
	identity := func() string {
		return g.do(t, "cat /etc/machine-id") + g.do(t, "cat /etc/hostname") + g.do(t, "cat /proc/sys/kernel/hostname")
	}
	seen := make(map[string]string) // what must be one's own, and whose it is
	var resumed []time.Duration
	for n := range count {
		c := clone{console: newConsole(t), dir: shortDir(t)}
		g.console = c.console
		began := time.Now()
		var err error
		if c.peer, err = peer.Resume(newContext(t), config(n, c.dir)); err != nil {
			t.Fatalf("clone %d: %v", n, err)
		}
		defer func() { c.peer.Close(context.WithoutCancel(t.Context())) }()
		resumed = append(resumed, time.Since(began))
		stats, _ := c.peer.Instance().FillStats()
		c.faults = stats.Faults
		c.identity = identity()
		if strings.Contains(c.identity, machineID) || strings.Contains(c.identity, "packaged") || strings.Count(c.identity, fmt.Sprintf("clone-%d\\n", n)) != 2 {
			t.Errorf("clone %d is %s", n, c.identity)
		}
		if has, own := g.do(t, "cat /proc/net/fib_trie"), strings.TrimSuffix(address(n), "/32"); strings.Count(has, "10.9.") != strings.Count(has, own) || !strings.Contains(has, own) {
			t.Errorf("clone %d is to have the address %s, and has %s", n, own, has)
		}
		for _, own := range []string{g.do(t, "cat /etc/machine-id"), g.do(t, "cat /proc/sys/kernel/random/uuid")} {
			if other, ok := seen[own]; ok {
				t.Errorf("clones %d and %s both have %s", n, other, own)
			}
			seen[own] = fmt.Sprint(n)
		}
		clones = append(clones, c)
		for recorded := time.Now(); n == 1; time.Sleep(10 * time.Millisecond) {
			if _, err := os.Stat(workingSet); err == nil {
				break
			} else if time.Since(recorded) > guestWait {
				t.Fatalf("its working set is not recorded: %v", err)
			}
		}
	}
	t.Logf("until their agents had answered, clones waited for %d pages, and for %d with a recorded working set", clones[0].faults, clones[2].faults)
	if 2*clones[2].faults > clones[0].faults {
		t.Errorf("a clone has waited for %d pages, in spite of a recorded working set; without one, for %d", clones[2].faults, clones[0].faults)
	}
	slices.Sort(resumed)
	var most uint64
	for n, c := range clones {
		stats, ok := c.peer.Instance().FillStats()
		if !ok {
			t.Fatalf("clone %d has all of its memory", n)
		}
		t.Logf("clone %d: %d faults, %d KiB demanded, %d KiB brought otherwise", n, stats.Faults, stats.DemandBytes>>10, stats.FillBytes>>10)
		most = max(most, stats.DemandBytes+stats.FillBytes)
	}
	data := int64(0) // of the memory that they have in common
	memory, err := block.OpenFile(filepath.Join(g.pkg, vmpackage.DefaultFile(runner.MemoryDevice)), block.FileOptions{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer memory.Close()
	for off := int64(0); ; {
		r, err := memory.NextData(off)
		if err == io.EOF {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		data, off = data+r.Length, r.End()
	}
	t.Logf("%d clones, resumed with their agents told in %v, %v and %v (least, median, most); at most %d KiB of %d of memory were brought", count, resumed[0], resumed[len(resumed)/2], resumed[len(resumed)-1], most>>10, data>>10)
	if most > uint64(data)/2 {
		t.Errorf("a clone has brought %d bytes of %d of memory", most, data)
	}

	// Closed, it keeps what it is; sent, all of it goes.
	c := clones[0]
	g.console = c.console
	if err := c.peer.Close(context.WithoutCancel(t.Context())); err != nil {
		t.Fatal(err)
	}
	if stats, _ := c.peer.Instance().FillStats(); stats.DemandBytes+stats.FillBytes > uint64(data)/2 {
		t.Errorf("to be closed, a clone has brought %d bytes of %d of memory", stats.DemandBytes+stats.FillBytes, data)
	}
	again := g.config(t, c.dir)
	again.MemoryOnDemand = true
	p, err := peer.Resume(newContext(t), again)
	if err != nil {
		t.Fatal(err)
	}
	p, _ = move(t, p, g.config(t, shortDir(t)))
	defer func() { p.Close(context.WithoutCancel(t.Context())) }()
	if got := identity(); got != c.identity {
		t.Errorf("closed, resumed and moved, it is %s, and was %s", got, c.identity)
	}
}
