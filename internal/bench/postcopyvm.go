package main

import (
	"context"
	"errors"
	"time"

	"github.com/drafter-vm/drafter/pkg/migrate"
	"github.com/drafter-vm/drafter/pkg/peer"
	"github.com/drafter-vm/drafter/pkg/ram"
)

func postcopyVMCase() benchCase {
	return tinyCase("postcopy/vm", "what a real machine waits for a page, when nothing was sent before the switch and everything is streamed", benchPostcopyVM)
}

func benchPostcopyVM(ctx context.Context, b *bench, name, pkg string) ([]Row, error) {
	var p50, p99, worst []float64
	for i := range b.samples {
		stats, err := fetchOnce(ctx, b, pkg)
		if err != nil {
			return nil, err
		}
		p50, p99, worst = append(p50, milliseconds(stats.P50)), append(p99, milliseconds(stats.P99)), append(worst, milliseconds(stats.Max))
		b.say("%s: %d/%d: %d pages were waited for: p50 %v, p99 %v, longest %v", name, i+1, b.samples,
			stats.Faults, stats.P50, stats.P99, stats.Max)
	}
	return []Row{
		newRow(name, "wait for a page, p50", "ms", less, p50, nil, "", goal{}),
		newRow(name, "wait for a page, p99", "ms", less, p99, nil, "", atMost(1, "ms")),
		newRow(name, "wait for a page, longest", "ms", less, worst, nil, "", goal{}),
	}, nil
}

// fetchOnce moves a guest that writes all over its memory, which follows it, and returns what was waited for.
func fetchOnce(ctx context.Context, b *bench, pkg string) (stats ram.FillStats, err error) {
	s, err := newTinySession(b, pkg)
	if err != nil {
		return stats, err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	if err := s.start(ctx, func(cfg *peer.Config) {
		cfg.Goal.PostCopy = true
		for i := range cfg.Devices {
			cfg.Devices[i].Policy = migrate.Policy{} // nothing before the switch
		}
	}); err != nil {
		return stats, err
	}
	to, err := s.move(ctx)
	if err != nil {
		return stats, err
	}
	for {
		var late bool
		if stats, late = to.Instance().FillStats(); !late || stats.Faults == 0 {
			return stats, errors.New("nothing of the guest's memory was missing after the switch")
		}
		if stats.Remaining == 0 {
			return stats, nil
		}
		if err := wait(ctx, 10*time.Millisecond); err != nil {
			return stats, err
		}
	}
}
