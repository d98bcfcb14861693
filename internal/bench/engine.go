package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/migrate"
	"github.com/drafter-vm/drafter/pkg/ram"
	"github.com/drafter-vm/drafter/pkg/wire"
)

const (
	mib = 1 << 20
	mb  = 1e6

	writerRate = 50e6 // bytes a second
)

// engineStreams is how many connections the copies have, ours and the reference.
const engineStreams = 2

// engineTask is one copy of memory from one process to another.
type engineTask struct {
	Size    int64  `json:"size"`
	Data    string `json:"data"` // what is in it: a key of fillers
	Rate    int64  `json:"rate"` // bytes a second that a guest writes meanwhile
	Streams int    `json:"streams"`
	Plain   bool   `json:"plain"`             // by io.Copy
	Late    bool   `json:"late"`              // nothing before the switch
	Profile string `json:"profile,omitempty"` // folder for CPU profiles of our two sides
}

// engineResult is what one side used.
type engineResult struct {
	Seconds    float64 `json:"seconds"`
	CPUSeconds float64 `json:"cpu_seconds"`
	PeakExtra  int64   `json:"peak_extra"`
	Wire       int64   `json:"wire"`  // bytes
	Dirty      int64   `json:"dirty"` // bytes the guest wrote until it was paused
}

// fillers make the kinds of content.
var fillers = map[string]func(page []byte, rnd *rand.Rand){
	"random": func(page []byte, rnd *rand.Rand) { randomPage(page, rnd.Uint64()) },
	"half-zero": func(page []byte, rnd *rand.Rand) {
		if rnd.Uint32()&1 == 0 {
			clear(page)
			return
		}
		randomPage(page, rnd.Uint64())
	},
	// Each page from another place in a long text: no two are the same.
	"compressible": func(page []byte, rnd *rand.Rand) { copy(page, text()[rnd.IntN(len(text())-len(page)):]) },
}

// text is a mebibyte of words and numbers.
var text = sync.OnceValue(func() (text []byte) {
	rnd := rand.New(rand.NewPCG(3, 4))
	for len(text) < mib {
		text = fmt.Appendf(text, "%s=%d ", vocabulary[rnd.IntN(len(vocabulary))], rnd.IntN(1000))
	}
	return text
})

var vocabulary = strings.Fields("memory device packet buffer window commit source target journal overlay bridge tunnel " +
	"kernel module thread signal socket stream cursor record header length offset digest")

func engineCases() []benchCase {
	var all []benchCase
	for _, data := range []string{"random", "half-zero", "compressible"} {
		for _, load := range []struct {
			name string
			rate int64
		}{{"idle", 0}, {"writer", writerRate}} {
			name := "engine/" + data + "/" + load.name
			about := "1 GiB of " + data + " data from memory to memory over TCP loopback"
			if load.rate > 0 {
				about += ", while a guest writes 50 MB/s to it"
			}
			all = append(all, benchCase{name: name, about: about, cheap: true, run: func(ctx context.Context, b *bench) ([]Row, error) {
				task := engineTask{Size: 1 << 30, Data: data, Rate: load.rate, Streams: engineStreams}
				if b.profiles != "" {
					task.Profile = filepath.Join(b.profiles, strings.ReplaceAll(name, "/", "-"))
					if err := os.MkdirAll(task.Profile, 0o755); err != nil {
						return nil, err
					}
				}
				if b.quick {
					task.Size = 16 * mib
				}
				return benchEngine(ctx, b, name, task)
			}})
		}
	}
	return all
}

func benchEngine(ctx context.Context, b *bench, name string, task engineTask) ([]Row, error) {
	// speed, CPU seconds, peak, bytes and bound of bytes; of ours and of the reference
	var speed, cpu, peak, bytes [2][]float64
	var ideal []float64
	for i := range b.samples {
		for side, plain := range []bool{false, true} {
			task.Plain = plain
			src, dst, err := copyOnce(ctx, task)
			if err != nil {
				return nil, err
			}
			// What was written meanwhile had to be carried too; a plain copy does not know of it.
			carried := task.Size
			if !plain {
				carried += src.Dirty
				ideal = append(ideal, float64(carried)/mib)
			}
			speed[side] = append(speed[side], float64(carried)/mb/src.Seconds)
			cpu[side] = append(cpu[side], src.CPUSeconds+dst.CPUSeconds)
			peak[side] = append(peak[side], float64(max(src.PeakExtra, dst.PeakExtra))/mib)
			bytes[side] = append(bytes[side], float64(src.Wire)/mib)
			who := "ours"
			if plain {
				who = "io.Copy"
			}
			b.say("%s: %d/%d %s: %.2f s, %.0f MB/s, %.2f CPU s, %d MiB sent, %d MiB more memory", name, i+1, b.samples, who,
				src.Seconds, speed[side][i], cpu[side][i], src.Wire/mib, max(src.PeakExtra, dst.PeakExtra)/mib)
		}
	}
	var speedGoal, cpuGoal goal
	if task.Data == "random" {
		speedGoal, cpuGoal = ratioAtLeast(0.8), ratioAtMost(1.5)
	}
	const reference = "io.Copy"
	return []Row{
		newRow(name, "throughput", "MB/s", more, speed[0], speed[1], reference, speedGoal),
		newRow(name, "CPU, both ends", "s", less, cpu[0], cpu[1], reference, cpuGoal),
		newRow(name, "sent", "MiB", less, bytes[0], ideal, "size + written", ratioAtMost(1.25)),
		newRow(name, "most extra memory of an end", "MiB", less, peak[0], peak[1], reference, atMost(64, "MiB")),
	}, nil
}

// copyOnce moves content between two new processes.
func copyOnce(ctx context.Context, task engineTask) (src, dst engineResult, err error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	to, err := startChild(ctx, "destination", task, nil)
	if err != nil {
		return src, dst, err
	}
	defer to.end()
	from, err := startChild(ctx, "source", task, nil)
	if err != nil {
		return src, dst, err
	}
	defer from.end()
	if err := connect(from, to); err != nil {
		return src, dst, err
	}
	// Whatever one side says, the other's words may be the better explanation.
	err = errors.Join(from.receiveJSON(&src), to.receiveJSON(&dst))
	return src, dst, err
}

// connect brings two sides together and tells them to go.
func connect(from, to *child) error {
	address, err := to.expect("listening")
	if err != nil {
		return err
	}
	if _, err := from.expect("filled"); err != nil {
		return err
	}
	if err := from.send("dial %s", address); err != nil {
		return err
	}
	for _, c := range []*child{from, to} {
		if _, err := c.expect("ready"); err != nil {
			return err
		}
	}
	return errors.Join(to.send("go"), from.send("go"))
}

// engineSource is the source's process.
func engineSource(a *actor) (err error) {
	var task engineTask
	if err := a.decode(&task); err != nil {
		return err
	}
	ctx := context.Background()
	mem, err := ram.Create("bench", task.Size)
	if err != nil {
		return err
	}
	if err := fillMemory(mem.Device(), task.Data); err != nil {
		return err
	}
	guest, err := startGuest(ctx, mem)
	if err != nil {
		return err
	}
	defer guest.end()
	a.say("filled")
	address, err := a.await("dial")
	if err != nil {
		return err
	}
	streams, err := dialStreams(ctx, address, task.Streams)
	if err != nil {
		return err
	}
	a.say("ready")
	if _, err := a.await("go"); err != nil {
		return err
	}
	used, err := startUsage()
	if err != nil {
		return err
	}
	if task.Rate > 0 {
		if _, err := guest.ask("write %d", task.Rate); err != nil {
			return err
		}
	}
	profiled, err := startProfile(task, "source")
	if err != nil {
		return err
	}
	began := time.Now()
	r := engineResult{Wire: task.Size}
	if task.Plain {
		err = sendPlain(mem.File(), task.Size, streams)
	} else {
		r.Wire, r.Dirty, err = sendMemory(ctx, mem, guest, streams, task.Late)
	}
	if err != nil {
		return err
	}
	r.Seconds = time.Since(began).Seconds()
	if err := profiled(); err != nil {
		return err
	}
	spent, peak, err := used.since()
	if err != nil {
		return err
	}
	r.CPUSeconds, r.PeakExtra = spent.Seconds(), peak
	return a.sayJSON(r)
}

// engineDestination is the destination's process.
func engineDestination(a *actor) error {
	var task engineTask
	if err := a.decode(&task); err != nil {
		return err
	}
	ctx := context.Background()
	mem, err := ram.Create("bench", task.Size)
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	defer l.Close()
	a.say("listening %s", l.Addr())
	streams, err := acceptStreams(l, task.Streams)
	if err != nil {
		return err
	}
	a.say("ready")
	if _, err := a.await("go"); err != nil {
		return err
	}
	used, err := startUsage()
	if err != nil {
		return err
	}
	profiled, err := startProfile(task, "destination")
	if err != nil {
		return err
	}
	if task.Plain {
		err = receivePlain(mem.File(), task.Size, streams)
	} else {
		err = receiveMemory(ctx, mem, streams)
	}
	if err := errors.Join(err, profiled()); err != nil {
		return err
	}
	spent, peak, err := used.since()
	if err != nil {
		return err
	}
	return a.sayJSON(engineResult{CPUSeconds: spent.Seconds(), PeakExtra: peak})
}

// fillMemory writes every page, so that none is a hole.
func fillMemory(dev io.WriterAt, kind string) error {
	fill := fillers[kind]
	if fill == nil {
		return fmt.Errorf("unknown kind of content %q", kind)
	}
	size := dev.(block.Device).Size()
	rnd := rand.New(rand.NewPCG(1, 2))
	buf := make([]byte, mib)
	for off := int64(0); off < size; off += int64(len(buf)) {
		part := buf[:min(int64(len(buf)), size-off)]
		for at := 0; at < len(part); at += pageSize {
			fill(part[at:at+pageSize], rnd)
		}
		if _, err := dev.WriteAt(part, off); err != nil {
			return err
		}
	}
	return nil
}

func dialStreams(ctx context.Context, address string, n int) ([]io.ReadWriter, error) {
	var streams []io.ReadWriter
	for range n {
		conn, err := new(net.Dialer).DialContext(ctx, "tcp", address)
		if err != nil {
			return nil, err
		}
		streams = append(streams, conn)
	}
	return streams, nil
}

func acceptStreams(l net.Listener, n int) ([]io.ReadWriter, error) {
	var streams []io.ReadWriter
	for range n {
		conn, err := l.Accept()
		if err != nil {
			return nil, err
		}
		streams = append(streams, conn)
	}
	return streams, nil
}

// sendPlain is the reference: each stream carries its part by io.Copy. It returns when the other end has all.
func sendPlain(f *os.File, size int64, streams []io.ReadWriter) error {
	var parts errgroup.Group
	for i, stream := range streams {
		from, to := size*int64(i)/int64(len(streams)), size*int64(i+1)/int64(len(streams))
		conn := stream.(*net.TCPConn)
		parts.Go(func() error {
			if _, err := io.Copy(conn, io.NewSectionReader(f, from, to-from)); err != nil {
				return err
			}
			if err := conn.CloseWrite(); err != nil {
				return err
			}
			_, err := io.Copy(io.Discard, conn)
			return err
		})
	}
	return parts.Wait()
}

func receivePlain(f *os.File, size int64, streams []io.ReadWriter) error {
	var parts errgroup.Group
	for i, stream := range streams {
		from, to := size*int64(i)/int64(len(streams)), size*int64(i+1)/int64(len(streams))
		conn := stream.(*net.TCPConn)
		parts.Go(func() error {
			n, err := io.Copy(io.NewOffsetWriter(f, from), conn)
			if err == nil && n != to-from {
				err = fmt.Errorf("%d bytes arrived instead of %d", n, to-from)
			}
			return errors.Join(err, conn.Close())
		})
	}
	return parts.Wait()
}

// quiet keeps what the engine logs off the progress.
var quiet = slog.New(slog.DiscardHandler)

// sendMemory is the source of the engine. It returns what went over the streams and what the guest wrote meanwhile.
func sendMemory(ctx context.Context, mem *ram.Memory, guest *guest, streams []io.ReadWriter, late bool) (wire, dirty int64, err error) {
	vm := &sentGuest{guest: guest}
	policy, goal := migrate.Policy{ByGoal: true}, migrate.Goal{}
	if late {
		policy, goal = migrate.Policy{}, migrate.Goal{PostCopy: true}
	}
	report, err := migrate.Send(ctx, streams, migrate.SourceConfig{
		Devices: []migrate.SourceDevice{{Name: "memory", Device: mem.Device(), Tracker: mem.Tracker(), Policy: policy}},
		Goal:    goal, OwnThreads: true, Guest: vm, Logger: quiet,
	})
	if err != nil {
		return 0, 0, err
	}
	return report.WireBytes, vm.written * pageSize, nil
}

// receiveMemory is the destination of the engine.
func receiveMemory(ctx context.Context, mem *ram.Memory, streams []io.ReadWriter) error {
	_, err := migrate.Receive(ctx, streams, migrate.DestinationConfig{Target: &target{device: mem.Device()}, Logger: quiet})
	return err
}

// stateSize is about the device state of a small machine, in bytes.
const stateSize = 100 << 10

// sentGuest is a guest that is moved away.
type sentGuest struct {
	guest   *guest
	written int64 // pages, once paused
}

func (g *sentGuest) BeforeSuspend(context.Context) error { return nil }

func (g *sentGuest) Pause(context.Context) (err error) {
	g.written, err = g.guest.number("stop")
	return err
}

func (g *sentGuest) State(_ context.Context, w io.Writer) error {
	_, err := w.Write(make([]byte, stateSize))
	return err
}

func (g *sentGuest) Resume(context.Context) error { return nil }

// target receives one device.
type target struct{ device block.Device }

func (t *target) Prepare(_ context.Context, m *wire.Manifest) ([]block.Device, error) {
	if len(m.Devices) != 1 {
		return nil, fmt.Errorf("%d devices are announced, expected one", len(m.Devices))
	}
	return []block.Device{t.device}, nil
}

func (t *target) Load(_ context.Context, state io.Reader) error {
	_, err := io.Copy(io.Discard, state)
	return err
}

func (t *target) Run(context.Context) error     { return nil }
func (t *target) Discard(context.Context) error { return nil }
