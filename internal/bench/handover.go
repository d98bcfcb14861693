package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/drafter-vm/drafter/pkg/migrate"
	"github.com/drafter-vm/drafter/pkg/peer"
)

func handoverCase() benchCase {
	return tinyCase("handover", "a VM that writes all over its memory moves between two peers of one host: memory handed over, beside TCP", benchHandover)
}

func benchHandover(ctx context.Context, b *bench, name, pkg string) ([]Row, error) {
	const local, tcp = "unix", "tcp"
	downtime, total, sent := map[string][]float64{}, map[string][]float64{}, map[string][]float64{}
	for i := range b.samples {
		for _, network := range []string{local, tcp} { // in turns
			r, err := handOnce(ctx, b, pkg, network)
			if err != nil {
				return nil, err
			}
			if handed := len(r.Shared) > 0; handed != (network == local) {
				return nil, fmt.Errorf("over %s, memory was handed over: %t", network, handed)
			}
			downtime[network] = append(downtime[network], float64(r.Downtime)/1e6)
			total[network] = append(total[network], float64(r.Total)/1e6)
			sent[network] = append(sent[network], float64(r.WireBytes)/mib)
		}
		b.say("%s: %d/%d: over unix downtime %.1f ms, total %.0f ms; over TCP %.1f ms, %.0f ms", name, i+1, b.samples,
			downtime[local][i], total[local][i], downtime[tcp][i], total[tcp][i])
	}
	return []Row{
		newRow(name, "downtime", "ms", less, downtime[local], downtime[tcp], "TCP", goal{}),
		newRow(name, "total time", "ms", less, total[local], total[tcp], "TCP", ratioAtMost(1)),
		newRow(name, "sent", "MiB", less, sent[local], sent[tcp], "TCP", goal{}),
	}, nil
}

// handOnce moves a guest over a network, and returns the source's report.
func handOnce(ctx context.Context, b *bench, pkg, network string) (_ *migrate.Report, err error) {
	s, err := newTinySession(b, pkg)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	if err := s.start(ctx, func(cfg *peer.Config) { cfg.Goal.PostCopy = true }); err != nil {
		return nil, err
	}
	_, r, err := s.moveOver(ctx, network)
	return r, err
}
