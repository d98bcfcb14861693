package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/drafter-vm/drafter/internal/democlient"
	"github.com/drafter-vm/drafter/internal/testnet"
	"github.com/drafter-vm/drafter/pkg/migrate"
	"github.com/drafter-vm/drafter/pkg/vmpackage"
)

func vmCase() benchCase {
	const name = "vm"
	return benchCase{
		name: name, about: "a VM of 512 MiB with a loaded Valkey server is moved, by ours, by QEMU's pre-copy and by its post-copy",
		run: func(ctx context.Context, b *bench) ([]Row, error) { return benchVM(ctx, b, name) },
	}
}

// The load: one write after the other, and a ping every millisecond beside them.
const (
	valkeyAddress = "172.16.0.2:6379"
	payloadSize   = 1024
)

// vmMove is what one move was like.
type vmMove struct {
	downtime, total time.Duration // as who moved it says
	bytes           int64
	gap, quietGap   time.Duration   // the client's longest, in the span of the move and in the same span before
	report          *migrate.Report // of our source
}

// mover is one way to move a VM.
type mover struct {
	name string
	move func(ctx context.Context, s *vmSession) (vmMove, error)
}

func benchVM(ctx context.Context, b *bench, name string) (rows []Row, err error) {
	pkg, network, err := valkeyPackage(ctx, b)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, network.Close()) }()
	movers := []mover{
		{"ours", moveByPeers},
		{"QEMU pre-copy", func(ctx context.Context, s *vmSession) (vmMove, error) { return moveByQEMU(ctx, s, false) }},
		{"QEMU post-copy", func(ctx context.Context, s *vmSession) (vmMove, error) { return moveByQEMU(ctx, s, true) }},
	}
	moves := make([][]vmMove, len(movers))
	for i := range b.samples {
		for n, m := range movers {
			s := &vmSession{b: b, pkg: pkg, network: network, settle: 3 * time.Second, span: 4 * time.Second}
			if b.quick {
				s.settle, s.span = 500*time.Millisecond, time.Second
			}
			move, err := s.run(ctx, m)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", m.name, err)
			}
			moves[n] = append(moves[n], move)
			b.say("%s: %d/%d %s: downtime %.1f ms, client's longest gap %.1f ms (without a migration %.1f ms), %.2f s in all, %d MiB sent",
				name, i+1, b.samples, m.name, milliseconds(move.downtime), milliseconds(move.gap), milliseconds(move.quietGap), move.total.Seconds(), move.bytes/mib)
		}
	}
	of := func(n int, value func(vmMove) float64) (values []float64) {
		for _, m := range moves[n] {
			values = append(values, value(m))
		}
		return values
	}
	gap := func(m vmMove) float64 { return milliseconds(m.gap) }
	quietGap := func(m vmMove) float64 { return milliseconds(m.quietGap) }
	downtime := func(m vmMove) float64 { return milliseconds(m.downtime) }
	total := func(m vmMove) float64 { return milliseconds(m.total) }
	bytes := func(m vmMove) float64 { return float64(m.bytes) / mib }
	rows = append(rows, newRow(name, "client's longest gap", "ms", less, of(0, gap), of(0, quietGap), "no migration", atMost(20, "ms")))
	for n, m := range movers {
		if n == 0 {
			continue
		}
		totalGoal := goal{}
		if n == 1 {
			totalGoal = ratioAtMost(1)
		}
		rows = append(rows,
			newRow(name, "client's longest gap, "+m.name, "ms", less, of(0, gap), of(n, gap), m.name, ratioAtMost(1)),
			newRow(name, "downtime as reported, "+m.name, "ms", less, of(0, downtime), of(n, downtime), m.name, goal{}),
			newRow(name, "total time, "+m.name, "ms", less, of(0, total), of(n, total), m.name, totalGoal),
			newRow(name, "sent, "+m.name, "MiB", less, of(0, bytes), of(n, bytes), m.name, goal{}),
		)
	}
	return append(rows, timesOf(name, moves[0])...), nil
}

// timesOf says where our time goes: the parts of the downtime, and the states of the source.
func timesOf(name string, moves []vmMove) (rows []Row) {
	times := map[string][]float64{}
	var names []string
	add := func(what string, took migrate.Millis) {
		if times[what] == nil {
			names = append(names, what)
		}
		times[what] = append(times[what], milliseconds(time.Duration(took)))
	}
	for _, m := range moves {
		for _, part := range m.report.Parts {
			add("of our downtime: "+part.Name, part.Duration)
		}
		for _, phase := range m.report.Phases {
			add("of our time: "+phase.Name, phase.Duration)
		}
	}
	for _, what := range names {
		rows = append(rows, newRow(name, what, "ms", less, times[what], nil, "", goal{}))
	}
	return rows
}

// valkeyPackage makes the blueprint and the package that make demo has too, and the network that both ends are in.
func valkeyPackage(ctx context.Context, b *bench) (pkg string, _ *testnet.Network, err error) {
	if err := needRoot(); err != nil {
		return "", nil, err
	}
	network, err := testnet.New(testnet.Config{Name: "bench", Peers: []string{"a", "b"}})
	if err != nil {
		return "", nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, network.Close())
		}
	}()
	drafter := filepath.Join(b.bin, "drafter")
	if err := command(ctx, drafter, "blueprint", "--packages", "valkey-server", "--output", b.path("blueprint")); err != nil {
		return "", nil, err
	}
	pkg = b.path("bench", "valkey")
	inputs := []string{drafter}
	var devices []map[string]string
	for _, name := range []string{"state", "memory", "config", "kernel", "initrd", "disk"} {
		file := vmpackage.DefaultFile(name)
		device := map[string]string{"name": name, "output": filepath.Join(pkg, file)}
		if name == "kernel" || name == "initrd" || name == "disk" {
			device["input"] = b.path("blueprint", file)
			inputs = append(inputs, device["input"])
		}
		devices = append(devices, device)
	}
	if fresh(filepath.Join(pkg, vmpackage.ManifestFile), inputs...) {
		return pkg, network, nil
	}
	b.say("boot the blueprint and write it down")
	flag, err := json.Marshal(devices)
	if err != nil {
		return "", nil, err
	}
	return pkg, network, command(ctx, drafter, "snapshotter", "--netns", network.Peer("a"), "--memory-size", "512", "--devices", string(flag),
		"--resume-timeout", "3m", "--enable-output=false", "--chroot-base-dir", b.path("bench", "vms"))
}

// vmSession is one VM under load, from its package to one move.
type vmSession struct {
	b            *bench
	pkg          string
	network      *testnet.Network
	settle, span time.Duration // how long the load runs first, and how long gaps are looked for
	client       *democlient.Client
}

// run is one session of a mover. None takes so long unless something hangs.
func (s *vmSession) run(ctx context.Context, m mover) (vmMove, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	return m.move(ctx, s)
}

// load starts the client once the guest runs at peer a, and returns the longest gap of a span without a migration.
func (s *vmSession) load(ctx context.Context) (quietGap time.Duration, err error) {
	if err := s.network.Moved("a"); err != nil {
		return 0, err
	}
	// It works until ctx ends, or it is stopped.
	if s.client, err = democlient.Start(ctx, democlient.Config{
		Address: valkeyAddress, Namespace: s.network.Client(), PayloadSize: payloadSize, Timeout: 30 * time.Second, Logger: quiet,
	}); err != nil {
		return 0, err
	}
	if err := wait(ctx, s.settle); err != nil {
		s.client.Stop()
		return 0, err
	}
	began := time.Now()
	if err := wait(ctx, s.span); err != nil {
		s.client.Stop()
		return 0, err
	}
	return s.client.GapBetween(began, time.Now()), nil
}

// settleGap waits until the span since began is over and the client has been answered again, and returns its longest gap.
func (s *vmSession) settleGap(ctx context.Context, began time.Time) (time.Duration, error) {
	moved := time.Now()
	if err := wait(ctx, max(0, time.Until(began.Add(s.span)))); err != nil {
		return 0, err
	}
	for s.client.AckedBetween(moved, time.Now()) == 0 {
		if err := wait(ctx, 5*time.Millisecond); err != nil {
			return 0, fmt.Errorf("the guest does not answer after the move: %w", err)
		}
	}
	return s.client.GapBetween(began, time.Now()), nil
}

// finish checks that the move has lost nothing.
func (s *vmSession) finish(ctx context.Context) error {
	s.client.Stop()
	if n := s.client.Stats().Reconnects; n > 0 {
		return fmt.Errorf("the client's connections broke %d times", n)
	}
	lost, err := s.client.Verify(ctx)
	if err != nil {
		return err
	}
	if lost > 0 {
		return fmt.Errorf("%d acknowledged writes were lost", lost)
	}
	return nil
}

// moveByPeers moves it with drafter peer.
func moveByPeers(ctx context.Context, s *vmSession) (m vmMove, err error) {
	folder, err := os.MkdirTemp(s.b.path("bench"), "peers-")
	if err != nil {
		return m, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(folder)) }()
	from, err := s.startPeer(ctx, folder, "a")
	if err != nil {
		return m, err
	}
	defer func() { err = errors.Join(err, from.stop()) }()
	if _, err := from.await(ctx, "Resumed VM"); err != nil {
		return m, err
	}
	line, err := from.await(ctx, "Serving on ")
	if err != nil {
		return m, err
	}
	address := strings.Fields(line)[2]
	if m.quietGap, err = s.load(ctx); err != nil {
		return m, err
	}
	defer s.client.Stop()
	began := time.Now()
	to, err := s.startPeer(ctx, folder, "b", "--raddr", address)
	if err != nil {
		return m, err
	}
	defer func() { err = errors.Join(err, to.stop()) }()
	if _, err := to.await(ctx, "VM runs here"); err != nil {
		return m, errors.Join(err, from.stop())
	}
	if err := s.network.Moved("b"); err != nil {
		return m, err
	}
	if _, err := from.await(ctx, "Sent VM"); err != nil {
		return m, err
	}
	if m.gap, err = s.settleGap(ctx, began); err != nil {
		return m, err
	}
	report, err := from.report(ctx)
	if err != nil {
		return m, err
	}
	m.report, m.downtime, m.total, m.bytes = report, time.Duration(report.Downtime), time.Duration(report.Total), report.WireBytes
	return m, s.finish(ctx)
}

// startPeer starts a drafter peer in its network namespace, with an instance in folder.
func (s *vmSession) startPeer(ctx context.Context, folder, name string, more ...string) (*peerProcess, error) {
	report := filepath.Join(folder, "report-"+name)
	args := append([]string{"peer", "--package", s.pkg, "--instance", filepath.Join(folder, name), "--netns", s.network.Peer(name),
		"--laddr", "127.0.0.1:0", "--chroot-base-dir", s.b.path("bench", "vms"), "--enable-output=false", "--resume-timeout", "3m",
		"--report", report}, more...)
	return startPeerProcess(exec.CommandContext(ctx, filepath.Join(s.b.bin, "drafter"), args...), "peer "+name, report)
}

// moveByQEMU moves it with QEMU's own migration. The disk is a file that both ends have.
func moveByQEMU(ctx context.Context, s *vmSession, postcopy bool) (m vmMove, err error) {
	pkg, err := vmpackage.Open(s.pkg)
	if err != nil {
		return m, err
	}
	folder, err := os.MkdirTemp(s.b.path("bench"), "stock-")
	if err != nil {
		return m, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(folder)) }()
	disk, err := filepath.Abs(filepath.Join(folder, "disk"))
	if err != nil {
		return m, err
	}
	if err := copyDisk(pkg, disk); err != nil {
		return m, err
	}
	from, err := resumeStock(ctx, pkg, disk, s.network.Peer("a"))
	if err != nil {
		return m, err
	}
	defer func() { err = errors.Join(err, from.close()) }()
	if m.quietGap, err = s.load(ctx); err != nil {
		return m, err
	}
	defer s.client.Stop()
	began := time.Now()
	to, err := startStock(ctx, pkg, disk, s.network.Peer("b"))
	if err != nil {
		return m, err
	}
	defer func() { err = errors.Join(err, to.close()) }()
	move, err := moveStock(ctx, from, to, postcopy, func() error { return s.network.Moved("b") })
	if err != nil {
		return m, err
	}
	if m.gap, err = s.settleGap(ctx, began); err != nil {
		return m, err
	}
	m.downtime, m.total, m.bytes = move.Downtime, move.Total, move.Bytes
	return m, s.finish(ctx)
}

// copyDisk copies a package's disk, holes as holes.
func copyDisk(pkg *vmpackage.Package, path string) error {
	from, err := openDevice(pkg, "disk")
	if err != nil {
		return err
	}
	defer from.Close()
	if err := makeBlank(path, from.Size()); err != nil {
		return err
	}
	to, err := openWritable(path)
	if err != nil {
		return err
	}
	return errors.Join(copyData(to, from), to.Close())
}

// lastReport is what a peer said of its last migration.
func lastReport(content []byte) (*migrate.Report, error) {
	lines := strings.Split(strings.TrimSpace(string(content)), "\n")
	report := new(migrate.Report)
	if err := json.Unmarshal([]byte(lines[len(lines)-1]), report); err != nil {
		return nil, fmt.Errorf("decode a peer's report: %w", err)
	}
	return report, nil
}
