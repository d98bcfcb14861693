package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/drafter-vm/drafter/pkg/block"
	"github.com/drafter-vm/drafter/pkg/migrate"
	"github.com/drafter-vm/drafter/pkg/ram"
)

func postcopyEngineCase() benchCase {
	const name = "postcopy/engine"
	return benchCase{
		name: name, cheap: true,
		about: "what a thread waits for a page of 1 GiB of which nothing was sent before the switch and everything is streamed",
		run: func(ctx context.Context, b *bench) ([]Row, error) {
			task := lateTask{engineTask: engineTask{Size: 1 << 30, Data: "random", Streams: engineStreams, Late: true}, Touch: 5000}
			if b.quick {
				task.Size, task.Touch = 32*mib, 200
			}
			return benchLate(ctx, b, name, task)
		},
	}
}

// lateTask is an engineTask whose content is sent after the switch.
type lateTask struct {
	engineTask
	Touch int `json:"touch"` // pages to be waited for, at most
}

// lateResult is what the destination has seen.
type lateResult struct {
	Seconds float64       `json:"seconds"` // from when the guest ran until everything was there
	Touched touched       `json:"touched"`
	Served  ram.FillStats `json:"served"`
}

func benchLate(ctx context.Context, b *bench, name string, task lateTask) ([]Row, error) {
	if c := ram.Probe(); !c.Lazy {
		return nil, fmt.Errorf("memory cannot arrive late here: %s", c.Reason)
	}
	var p50, p99, served, speed []float64
	for i := range b.samples {
		var result lateResult
		if err := playLate(ctx, task, &result); err != nil {
			return nil, err
		}
		if result.Touched.Missing == 0 {
			return nil, errors.New("no page was missing when it was touched")
		}
		p50 = append(p50, quantile(result.Touched.Micros, 0.5)/1e3)
		p99 = append(p99, quantile(result.Touched.Micros, 0.99)/1e3)
		served = append(served, milliseconds(result.Served.P99))
		speed = append(speed, float64(task.Size)/mb/result.Seconds)
		b.say("%s: %d/%d: %d of %d touched pages were missing: p50 %.3f ms, p99 %.3f ms; everything was there after %.2f s", name, i+1, b.samples,
			result.Touched.Missing, result.Touched.Touched, p50[i], p99[i], result.Seconds)
	}
	return []Row{
		newRow(name, "wait for a page, p50", "ms", less, p50, nil, "", goal{}),
		newRow(name, "wait for a page, p99", "ms", less, p99, nil, "", atMost(1, "ms")),
		newRow(name, "of that in our process, p99", "ms", less, served, nil, "", goal{}),
		newRow(name, "stream meanwhile", "MB/s", more, speed, nil, "", goal{}),
	}, nil
}

// playLate runs both sides once.
func playLate(ctx context.Context, task lateTask, result *lateResult) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	to, err := startChild(ctx, "late destination", task, nil)
	if err != nil {
		return err
	}
	defer to.end()
	from, err := startChild(ctx, "source", task.engineTask, nil)
	if err != nil {
		return err
	}
	defer from.end()
	if err := connect(from, to); err != nil {
		return err
	}
	var sent engineResult
	return errors.Join(to.receiveJSON(result), from.receiveJSON(&sent))
}

// lateDestination is the destination's process.
func lateDestination(a *actor) error {
	var task lateTask
	if err := a.decode(&task); err != nil {
		return err
	}
	ctx := context.Background()
	mem, err := ram.Create("bench", task.Size)
	if err != nil {
		return err
	}
	guest, err := startGuest(ctx, mem)
	if err != nil {
		return err
	}
	defer guest.end()
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
	t := &lateTarget{target: target{device: mem.Device()}, mem: mem, guest: guest, touch: task.Touch}
	if _, err := migrate.Receive(ctx, streams, migrate.DestinationConfig{Target: t, OwnThreads: true, Logger: quiet}); err != nil {
		return err
	}
	if t.filler == nil {
		return errors.New("nothing was missing after the switch")
	}
	r := lateResult{Seconds: time.Since(t.ran).Seconds()}
	if err := guest.receiveJSON(&r.Touched); err != nil {
		return err
	}
	r.Served = t.filler.Stats()
	return a.sayJSON(r)
}

// lateTarget receives a memory that arrives while its guest runs: it touches pages at random, one after the other.
type lateTarget struct {
	target
	mem    *ram.Memory
	guest  *guest
	touch  int
	filler *ram.Filler // nil until Postpone
	ran    time.Time
}

var _ migrate.Postponer = (*lateTarget)(nil)

func (t *lateTarget) CanPostpone() []bool { return []bool{true} }

func (t *lateTarget) Postpone(ctx context.Context, missing [][]block.Range, ask func(int, block.Range)) (_ []migrate.Late, err error) {
	t.filler, err = t.mem.Receive(context.WithoutCancel(ctx), func(off int64) {
		ask(0, block.Range{Offset: off, Length: pageSize})
	}, ram.FillOptions{Ranges: missing[0]})
	return []migrate.Late{lateMemory{t.filler}}, err
}

func (t *lateTarget) Run(context.Context) error {
	t.ran = time.Now()
	return t.guest.send("touch %d", t.touch)
}

func (t *lateTarget) Complete(ctx context.Context) error { return t.filler.Wait(ctx) }

// lateMemory is a filler as the engine wants to see it.
type lateMemory struct{ *ram.Filler }

func (m lateMemory) Fill(off int64, data []byte) error { return m.Deliver(off, data) }
func (m lateMemory) FillZero(off, n int64) error       { return m.DeliverZeros(off, n) }

func (m lateMemory) Wanted() (ranges []block.Range) {
	for _, off := range m.Filler.Wanted() {
		ranges = append(ranges, block.Range{Offset: off, Length: pageSize})
	}
	return ranges
}
