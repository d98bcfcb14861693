// Command demo shows the whole of Drafter with its own commands: it builds a blueprint with a Valkey server, snapshots and
// packages it, starts a peer, and moves the VM A → B → A → B while a client writes numbered keys. At the end it reads every
// acknowledged write back.
//
// A and B are hosts of their own, as far as networks go: each has an address, NAT (drafter nat) and a forward of port 3333 to the guest (drafter
// forwarder), and the client is on a third one. It connects to A, and its connections stay, wherever the VM is.
//
//	demo-client ──┐           ┌── demo-a: drafter nat, drafter forwarder ── demoa0: drafter peer, the VM
//	              ├── wire ───┤
//	              ┘           └── demo-b: drafter nat, drafter forwarder ── demob0
//
// Progress goes to stderr; the last line on stdout is one JSON object. The exit status is 1 if anything was lost or failed.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/drafter-vm/drafter/internal/democlient"
	"github.com/drafter-vm/drafter/internal/testnet"
	"github.com/drafter-vm/drafter/pkg/migrate"
	"github.com/drafter-vm/drafter/pkg/vmpackage"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

// result is the last line on stdout.
type result struct {
	ResumeMS    float64     `json:"resume_ms"`
	Migrations  []migration `json:"migrations"`
	AckedWrites int         `json:"acked_writes"`
	LostWrites  int         `json:"lost_writes"`
	Reconnects  int64       `json:"client_reconnects"`
	Verified    bool        `json:"verified"`
}

type migration struct {
	DowntimeMS  float64 `json:"downtime_ms"`
	ClientGapMS float64 `json:"client_gap_ms"`
	TotalMS     float64 `json:"total_ms"`
	Rounds      int     `json:"rounds"`
	BytesSent   int64   `json:"bytes_sent"`
}

type demo struct {
	bin, out, blueprint, hypervisor string

	verbose bool

	stderr io.Writer
	began  time.Time
	hosts  *testnet.Hosts
	client *democlient.Client

	services   []*process          // of the hosts
	forwarders map[string]*process // of these, by host
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) (err error) {
	flags := flag.NewFlagSet("demo", flag.ContinueOnError)
	flags.SetOutput(stderr)
	out := flags.String("out", "out", "folder for the blueprint, the package and the instances")
	bin := flags.String("bin", "bin", "folder with the drafter command")
	moves := flags.Int("moves", 3, "how often the VM moves")
	pause := flags.Duration("pause", 2*time.Second, "how long the client works between moves")
	blueprint := flags.String("blueprint", "", "folder with a blueprint that has a Valkey server (default: one is built)")
	verbose := flags.Bool("v", false, "show what the commands say, too, in detail")
	hypervisor := flags.String("hypervisor", "auto", "of drafter snapshotter")
	if err := flags.Parse(args); err != nil {
		return err
	}
	d := &demo{bin: *bin, out: *out, blueprint: *blueprint, hypervisor: *hypervisor, verbose: *verbose, stderr: stderr, began: time.Now(), forwarders: make(map[string]*process)}

	if os.Getuid() != 0 {
		return errors.New("must run as root: it makes network namespaces, and drafter looks into the hypervisor's memory")
	}
	if d.hosts, err = testnet.NewHosts("demo", "a", "b", "client"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.hosts.Close()) }()
	if err := os.MkdirAll(d.path("demo"), 0o755); err != nil {
		return err
	}
	defer func() {
		for _, p := range slices.Backward(d.services) {
			err = errors.Join(err, p.stop())
		}
	}()
	for _, host := range []string{"a", "b"} {
		if err := d.startHost(ctx, host); err != nil {
			return err
		}
	}
	if err := d.makePackage(ctx); err != nil {
		return err
	}
	r, err := d.moveAround(ctx, *moves, *pause)
	if err != nil {
		return err
	}
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	fmt.Fprintf(stdout, "%s\n", b)
	if r.LostWrites > 0 || !r.Verified {
		return fmt.Errorf("%d acknowledged writes were lost", r.LostWrites)
	}
	return nil
}

// say tells the person who watches what happens now.
func (d *demo) say(format string, args ...any) {
	fmt.Fprintf(d.stderr, "[%5.1fs] %s\n", time.Since(d.began).Seconds(), fmt.Sprintf(format, args...))
}

func (d *demo) path(elem ...string) string {
	return filepath.Join(append([]string{d.out}, elem...)...)
}

// makePackage goes from Debian packages to a package folder that was shipped as one file. What is up to date is kept.
func (d *demo) makePackage(ctx context.Context) error {
	if d.blueprint == "" {
		d.say("blueprint: a Valkey server from Debian packages")
		d.blueprint = d.path("blueprint")
		if err := d.drafter(ctx, "blueprint", "--packages", "valkey-server", "--output", d.blueprint); err != nil {
			return err
		}
	}
	inputs := []string{filepath.Join(d.bin, "drafter")}
	for _, name := range []string{"kernel", "initrd", "disk"} {
		inputs = append(inputs, filepath.Join(d.blueprint, vmpackage.DefaultFile(name)))
	}
	folder, archive, shipped := d.path("package"), d.path("valkey.tar.zst"), d.path("demo", "package")
	if fresh(filepath.Join(shipped, vmpackage.ManifestFile), inputs) {
		d.say("snapshot and package: up to date")
		return nil
	}

	d.say("snapshot: boot the blueprint, suspend it, write it down")
	var made, packed, extracted []map[string]string
	for _, name := range []string{"state", "memory", "config", "kernel", "initrd", "disk"} {
		file := vmpackage.DefaultFile(name)
		device := map[string]string{"name": name, "output": filepath.Join(folder, file)}
		if name == "kernel" || name == "initrd" || name == "disk" {
			device["input"] = filepath.Join(d.blueprint, file)
		}
		made = append(made, device)
		packed = append(packed, map[string]string{"name": name, "path": filepath.Join(folder, file)})
		extracted = append(extracted, map[string]string{"name": name, "path": filepath.Join(shipped, file)})
	}
	if err := d.drafter(ctx, "snapshotter", "--hypervisor", d.hypervisor, "--netns", netnsOf("a"), "--memory-size", "512", "--devices", asJSON(made),
		"--resume-timeout", "3m", "--enable-output=false", "--chroot-base-dir", d.path("vms")); err != nil {
		return err
	}
	d.say("package: into one file, and out of it")
	if err := os.RemoveAll(shipped); err != nil {
		return err
	}
	if err := os.MkdirAll(shipped, 0o755); err != nil {
		return err
	}
	if err := d.drafter(ctx, "packager", "--package-path", archive, "--devices", asJSON(packed)); err != nil {
		return err
	}
	return d.drafter(ctx, "packager", "--package-path", archive, "--devices", asJSON(extracted), "--extract")
}

// fresh reports whether a file is newer than all it was made of.
func fresh(path string, inputs []string) bool {
	made, err := os.Stat(path)
	if err != nil {
		return false
	}
	for _, input := range inputs {
		info, err := os.Stat(input)
		if err != nil || info.ModTime().After(made.ModTime()) {
			return false
		}
	}
	return true
}

// asJSON is v as the value of a --devices flag.
func asJSON(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err) // maps of strings
	}
	return string(b)
}

// drafter runs a tool to its end.
func (d *demo) drafter(ctx context.Context, args ...string) error {
	cmd := exec.CommandContext(ctx, filepath.Join(d.bin, "drafter"), args...)
	cmd.Stdout, cmd.Stderr = d.stderr, d.stderr
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("drafter %s: %w", args[0], err)
	}
	return nil
}

// moveAround starts the VM at peer a and moves it from one peer to the other under load.
func (d *demo) moveAround(ctx context.Context, moves int, pause time.Duration) (_ *result, err error) {
	for _, name := range []string{"a", "b"} {
		if err := os.RemoveAll(d.path("demo", "instance-"+name)); err != nil {
			return nil, err
		}
	}
	d.say("peer a: resume the package")
	at, err := d.startPeer(ctx, "a")
	if err != nil {
		return nil, err
	}
	peers := []*process{at}
	defer func() {
		for _, p := range slices.Backward(peers) {
			err = errors.Join(err, p.stop())
		}
	}()
	r := &result{}
	resumed, err := at.await(ctx, `Resumed VM in (\S+) on`)
	if err != nil {
		return nil, err
	}
	took, err := time.ParseDuration(resumed)
	if err != nil {
		return nil, fmt.Errorf("peer a: %w", err)
	}
	r.ResumeMS = democlient.Milliseconds(took)
	d.say("peer a: resumed in %v", took.Round(100*time.Microsecond))
	address, err := at.await(ctx, `Serving on (\S+)`)
	if err != nil {
		return nil, err
	}

	if err := d.forwardAt(ctx, "a"); err != nil {
		return nil, err
	}
	if d.client, err = democlient.Start(ctx, democlient.Config{
		Address: d.external("a"), Namespace: d.hosts.Host("client"), Timeout: 20 * time.Second,
		Logger: slog.New(slog.NewTextHandler(d.stderr, nil)),
	}); err != nil {
		return nil, err
	}
	defer d.client.Stop()
	d.say("client: has connected to %s, and writes numbered keys, one after the other", d.external("a"))

	for n := range moves {
		if err := wait(ctx, pause); err != nil {
			return nil, err
		}
		name := string('a' + rune((n+1)%2))
		before := time.Now()
		to, err := d.startPeer(ctx, name, "--raddr", address)
		if err != nil {
			return nil, err
		}
		peers = append(peers, to)
		from := at
		at = to
		m, err := d.awaitMove(ctx, from, to, before)
		if err != nil {
			return nil, err
		}
		// Connections that are there stay where they began; those that others make from now on begin where the VM is.
		if err := d.forwardAt(ctx, name); err != nil {
			return nil, err
		}
		d.client.At(d.external(name))
		d.say("move %d of %d, %s → %s: downtime %.1f ms, client's longest gap %.1f ms, %.2f s in all, %d rounds, %d MiB sent",
			n+1, moves, from.name, to.name, m.DowntimeMS, m.ClientGapMS, m.TotalMS/1000, m.Rounds, m.BytesSent>>20)
		r.Migrations = append(r.Migrations, *m)
		if address, err = to.await(ctx, `Serving on (\S+)`); err != nil {
			return nil, err
		}
	}

	if err := wait(ctx, pause); err != nil {
		return nil, err
	}
	d.client.Stop()
	stats := d.client.Stats()
	r.AckedWrites, r.Reconnects = stats.AckedWrites, stats.Reconnects
	d.say("client: %d acknowledged writes, %d reconnects; reading them all back", stats.AckedWrites, stats.Reconnects)
	if r.LostWrites, err = d.client.Verify(ctx); err != nil {
		return nil, fmt.Errorf("read the writes back: %w", err)
	}
	r.Verified = r.LostWrites == 0 && r.AckedWrites > 0
	d.say("%s: suspend and save", at.name)
	return r, nil
}

// awaitMove follows one migration from its start to what its source reports.
func (d *demo) awaitMove(ctx context.Context, from, to *process, before time.Time) (*migration, error) {
	if _, err := to.await(ctx, `(Received VM) on`); err != nil {
		return nil, err
	}
	if _, err := from.await(ctx, `(Sent VM) to`); err != nil {
		return nil, err
	}
	// The client has seen the end of the gap once it has acknowledged something again.
	after := time.Now()
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for d.client.AckedBetween(after, time.Now()) == 0 {
		if err := wait(ctx, 5*time.Millisecond); err != nil {
			return nil, fmt.Errorf("the client was not served after the move: %w", err)
		}
	}
	report, err := from.lastReport()
	if err != nil {
		return nil, err
	}
	m := &migration{
		DowntimeMS: ms(report.Downtime), TotalMS: ms(report.Total), BytesSent: report.WireBytes,
		ClientGapMS: democlient.Milliseconds(d.client.GapBetween(before, time.Now())),
	}
	for _, round := range report.Rounds {
		m.Rounds = max(m.Rounds, round.Index+1)
	}
	return m, nil
}

func ms(d migrate.Millis) float64 { return democlient.Milliseconds(time.Duration(d)) }

// wait sleeps, or ends with ctx.
func wait(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// startPeer starts a peer on a host, with that host's instance.
func (d *demo) startPeer(ctx context.Context, host string, more ...string) (*process, error) {
	reports := d.path("demo", "report-"+host+".jsonl")
	if err := os.RemoveAll(reports); err != nil {
		return nil, err
	}
	p, err := d.start(host, "peer "+host, append([]string{"peer", "--package", d.path("demo", "package"), "--instance", d.path("demo", "instance-"+host),
		"--netns", netnsOf(host), "--laddr", "psk://" + d.hosts.Addr4(host).String() + ":0", "--psk-file", d.path("demo", "key"), "--chroot-base-dir", d.path("vms"),
		"--enable-output=false", "--resume-timeout", "3m", "--report", reports}, more...)...)
	if err == nil {
		p.reports = reports
	}
	return p, err
}
