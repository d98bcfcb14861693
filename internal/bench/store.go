package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/drafter-vm/drafter/internal/testguest"
	"github.com/drafter-vm/drafter/internal/tests3"
	"github.com/drafter-vm/drafter/pkg/vmpackage"
)

func storeCase() benchCase {
	return benchCase{
		name: "store", about: "a VM that has changed since its package moves over 100 Mbit/s: with sharedbase, with an object store, with both, and with stores that fail, beside neither",
		run: func(ctx context.Context, b *bench) ([]Row, error) {
			if err := needRoot(); err != nil {
				return nil, err
			}
			pkg, err := tinyPackage(ctx, b, 128*mib)
			if err != nil {
				return nil, err
			}
			return benchStore(ctx, b, "store", pkg)
		},
	}
}

const (
	peersRate     = 100e6 // bits per second between the two hosts
	storeRate     = 1e9   // and between each of them and the store
	slowStoreRate = 10e6
	storeQuiet    = time.Second
	troubleTime   = 3 // seconds that docs/store.md lets a slow store cost
)

// storeWay is one way to move the VM.
type storeWay struct {
	name    string
	base    bool               // both hosts have the package, and have promised it
	store   bool               // what is quiet is in the store
	trouble func(*storeServer) // what becomes of the store just before the move; nil: nothing
	moves   []storeMove
}

// storeMove is what one move was like.
type storeMove struct {
	sent, stored    float64 // MiB, from the source and from the store
	total, downtime float64 // ms
}

func (w *storeWay) of(value func(storeMove) float64) (values []float64) {
	for _, m := range w.moves {
		values = append(values, value(m))
	}
	return values
}

// storeWays are the ways, the first of which is the reference. The store's troubles begin with a move, once the source has put what is quiet.
func storeWays() []*storeWay {
	fault := func(f tests3.Fault) func(*storeServer) { return func(s *storeServer) { s.proxy.Set(&f) } }
	return []*storeWay{
		{name: "neither"},
		{name: "sharedbase", base: true},
		{name: "store", store: true},
		{name: "store and sharedbase", store: true, base: true},
		{name: "store of 10 Mbit/s", store: true, trouble: func(s *storeServer) { s.link.setRate(slowStoreRate) }},
		{name: "store that returns no chunk", store: true, trouble: fault(tests3.Fault{Hang: true, Match: tests3.Of(http.MethodGet, "chunks")})},
		{name: "store that does not answer", store: true, trouble: fault(tests3.Fault{Hang: true})},
	}
}

func benchStore(ctx context.Context, b *bench, name, pkg string) (rows []Row, err error) {
	server, err := startStoreServer(b)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, server.close()) }()
	ways := storeWays()
	turns := min(b.samples, 3) // each takes two minutes
	for i := range turns {
		for _, w := range ways {
			m, err := moveWithStore(ctx, b, pkg, server, w)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", w.name, err)
			}
			w.moves = append(w.moves, m)
			b.say("%s: %d/%d %s: %.1f MiB from the source, %.1f MiB from the store, %.2f s in all, downtime %.0f ms", name, i+1, turns, w.name, m.sent, m.stored, m.total/1e3, m.downtime)
		}
	}
	sent := func(m storeMove) float64 { return m.sent }
	stored := func(m storeMove) float64 { return m.stored }
	total := func(m storeMove) float64 { return m.total }
	downtime := func(m storeMove) float64 { return m.downtime }
	neither := ways[0]
	for _, w := range ways[1:] {
		rows = append(rows, newRow(name, w.name+": from the source", "MiB", less, w.of(sent), neither.of(sent), neither.name, goal{}))
		if w.store {
			rows = append(rows, newRow(name, w.name+": from the store", "MiB", less, w.of(stored), nil, "", goal{}))
		}
		rows = append(rows, newRow(name, w.name+": total time", "ms", less, w.of(total), neither.of(total), neither.name, goal{}))
		if w.trouble != nil {
			var longer []float64
			for i, m := range w.moves {
				longer = append(longer, (m.total-neither.moves[i].total)/1e3)
			}
			rows = append(rows, newRow(name, w.name+": longer than with neither", "s", less, longer, nil, "", atMost(troubleTime, "s")))
		}
		rows = append(rows, newRow(name, w.name+": downtime", "ms", less, w.of(downtime), neither.of(downtime), neither.name, goal{}))
	}
	return rows, nil
}

// moveWithStore resumes the VM, has it change, and moves it one way.
func moveWithStore(ctx context.Context, b *bench, pkg string, server *storeServer, w *storeWay) (m storeMove, err error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute) // none takes so long unless something hangs
	defer cancel()
	folder, err := os.MkdirTemp(b.path("bench"), "peers-")
	if err != nil {
		return m, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(folder)) }()
	console, err := testguest.NewConsole()
	if err != nil {
		return m, err
	}
	defer func() { err = errors.Join(err, console.Close()) }()
	server.heal()
	defer server.heal()

	start := func(name string, based bool, more ...string) (*peerProcess, error) {
		devices, err := storeDevices(pkg, filepath.Join(folder, name), based, w.base)
		if err != nil {
			return nil, err
		}
		report := filepath.Join(folder, "report-"+name)
		args := append([]string{"peer", "--devices", devices, "--netns", "", "--laddr", "127.0.0.1:0", "--chroot-base-dir", b.path("bench", "vms"),
			"--enable-input", "--resume-timeout", "3m", "--report", report}, more...)
		if w.store {
			args = append(args, "--store", "s3://"+tests3.Bucket+"/bench", "--store-sync", "--store-quiet", storeQuiet.String())
		}
		cmd := exec.CommandContext(ctx, filepath.Join(b.bin, "drafter"), args...)
		cmd.Env = append(append(os.Environ(), tests3.Environment()...), "AWS_ENDPOINT_URL=http://"+server.link.address())
		cmd.Stdin, cmd.Stdout = console.Input(), console
		return startPeerProcess(cmd, "peer "+name, report)
	}
	from, err := start("a", true)
	if err != nil {
		return m, err
	}
	defer func() { err = errors.Join(err, from.stop()) }()
	line, err := from.await(ctx, "Serving on ")
	if err != nil {
		return m, err
	}
	memory, disk := 24, 8*mib
	if b.quick {
		memory, disk = 4, mib
	}
	if err := change(ctx, console, memory, disk); err != nil {
		return m, err
	}
	if w.store {
		if err := server.settle(ctx); err != nil {
			return m, err
		}
	}
	hosts, err := newLink(strings.Fields(line)[2], peersRate)
	if err != nil {
		return m, err
	}
	defer func() { err = errors.Join(err, hosts.close()) }()
	if w.trouble != nil {
		w.trouble(server)
	}
	to, err := start("b", w.base, "--raddr", hosts.address())
	if err != nil {
		return m, err
	}
	defer func() { err = errors.Join(err, to.stop()) }()
	if _, err := to.await(ctx, "Received VM"); err != nil {
		return m, err
	}
	if _, err := from.await(ctx, "Sent VM"); err != nil {
		return m, err
	}
	took := time.Since(hosts.begun()) // the source's report begins later, when the store has been asked
	server.heal()
	sent, err := from.report(ctx)
	if err != nil {
		return m, err
	}
	received, err := to.latest()
	if err != nil {
		return m, err
	}
	for _, command := range []string{"mem verify", "disk disk verify"} {
		if _, err := guestDo(ctx, console, "%s", command); err != nil {
			return m, fmt.Errorf("the guest after the move: %w", err)
		}
	}
	return storeMove{
		sent: float64(sent.WireBytes) / mib, stored: float64(received.StoredBytes) / mib, total: milliseconds(took), downtime: milliseconds(time.Duration(sent.Downtime)),
	}, nil
}

// change writes what nothing makes smaller to so many MiB of the guest's memory, and to so many bytes of its disk, once, and then records to the
// disk's end, again and again.
func change(ctx context.Context, console *testguest.Console, memory, disk int) error {
	for _, command := range []string{fmt.Sprintf("mem start %d random", memory), "mem stop", fmt.Sprintf("disk disk write %d %d 7", tinyDisk-disk, disk), "disk disk start 64"} {
		if _, err := guestDo(ctx, console, "%s", command); err != nil {
			return err
		}
	}
	return nil
}

// storeDevices is --devices of an instance: of the package, with overlays in folder, or in plain files there.
func storeDevices(pkg, folder string, based, shared bool) (string, error) {
	p, err := vmpackage.Open(pkg)
	if err != nil {
		return "", err
	}
	var devices []map[string]any
	for _, d := range p.Devices {
		device := map[string]any{"name": d.Name, "base": filepath.Join(folder, d.Name)}
		if based {
			device["base"], device["sharedbase"] = d.Path, shared
			device["overlay"], device["state"] = filepath.Join(folder, "overlay", d.Name), filepath.Join(folder, "state", d.Name)
		}
		devices = append(devices, device)
	}
	encoded, err := json.Marshal(devices)
	return string(encoded), err
}

// storeServer is an object store, and the way to it.
type storeServer struct {
	proxy  *tests3.Proxy
	link   *link
	folder string
	ends   []func() // what ends the server
}

// startStoreServer starts a store. What fails there comes as a panic, as it would end a test.
func startStoreServer(b *bench) (s *storeServer, err error) {
	s = &storeServer{}
	defer func() {
		if failed, ok := recover().(serverFailure); ok {
			err = errors.New(string(failed))
		}
		if err != nil {
			err = errors.Join(fmt.Errorf("start an object store: %w", err), s.close())
		}
	}()
	if s.folder, err = os.MkdirTemp(b.path("bench"), "store-"); err != nil {
		return nil, err
	}
	s.proxy = tests3.Start(s).Front(s)
	s.link, err = newLink(strings.TrimPrefix(s.proxy.Endpoint, "http://"), storeRate)
	return s, err
}

type serverFailure string

// Helper, Fatal, TempDir and Cleanup are what tests3 asks of a test.
func (s *storeServer) Helper()            {}
func (s *storeServer) Fatal(words ...any) { panic(serverFailure(fmt.Sprint(words...))) }
func (s *storeServer) TempDir() string    { return s.folder }
func (s *storeServer) Cleanup(end func()) { s.ends = append(s.ends, end) }

func (s *storeServer) close() (err error) {
	if s.link != nil {
		err = s.link.close()
	}
	for _, end := range slices.Backward(s.ends) {
		end()
	}
	return errors.Join(err, os.RemoveAll(s.folder))
}

// heal ends all trouble.
func (s *storeServer) heal() {
	s.proxy.Set(nil)
	s.link.setRate(storeRate)
}

// settle waits until a source has put what is quiet, and only what its guest goes on writing is put.
func (s *storeServer) settle(ctx context.Context) error {
	const calm = 4 * storeQuiet // memory is read once each storeQuiet and however long that takes, and put the second time
	since, passed := time.Now(), s.link.passed()
	for time.Since(since) < calm {
		if err := wait(ctx, storeQuiet/4); err != nil {
			return err
		}
		if now := s.link.passed(); now-passed > 2*mib {
			since, passed = time.Now(), now
		}
	}
	return nil
}
