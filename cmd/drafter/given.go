package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/drafter-vm/drafter/pkg/control"
	"github.com/drafter-vm/drafter/pkg/migrate"
	"github.com/drafter-vm/drafter/pkg/peer"
	"github.com/drafter-vm/drafter/pkg/transport"
)

// givenEnd is what became of a VM that was given away.
type givenEnd int

const (
	givenAway  givenEnd = iota // it is gone from here
	givenLost                  // it belongs here again, without its memory
	givenSaved                 // it belongs here again, and can be resumed
	givenLeft                  // somebody has asked for the end, and the files are as they were
)

// serveGiven waits for the peer that the VM was given to, and serves it what only the files here have. Nothing of the VM is open when
// it returns.
func serveGiven(ctx context.Context, g *peer.Given, reports *reports, out io.Writer) (end givenEnd, err error) {
	defer func() { err = errors.Join(err, g.Close()) }()
	what := "has not confirmed that it runs it"
	if g.Confirmed() {
		what = "runs it, and may need content that only the files here have"
	}
	saved := g.Saved()
	if !saved {
		what += "; its memory here is lost with its machine"
	}
	fmt.Fprintf(out, "The VM was given to another peer, which %s (migration %s). Waiting for that one; Ctrl-C leaves the files as they are\n", what, g.Migration())
	for {
		report, err := g.Rejoin(ctx)
		switch {
		case errors.Is(err, migrate.ErrInDoubt) || errors.Is(err, migrate.ErrUnsettled):
			if ctx.Err() != nil {
				fmt.Fprintf(out, "Closing: the files are as they were, and may be needed; start this peer again\n")
				return givenLeft, nil
			}
			logger(ctx).Warn("the peer that the VM was given to has not got what it needs yet", "migration", g.Migration(), "error", err)
			continue
		case err == nil:
			fmt.Fprintf(out, "Sent VM: %s\n", summary(report))
		default:
			fmt.Fprintf(out, "The VM never ran there, and belongs here again: %v\n", err)
			if end = givenLost; saved {
				end = givenSaved
			}
		}
		if err := reports.write(report); err != nil {
			logger(ctx).Error("could not write the report of a migration", "error", err)
		}
		return end, nil
	}
}

// leave is the error of a command whose VM stays given away at its end: that of a signal, if there was one.
func leave(cmd *cobra.Command) error {
	if cmd.Context().Err() != nil {
		return errInterrupted
	}
	return nil
}

// givenOperator is what the control socket of a peer controls while its VM is given away, and has no machine here.
type givenOperator struct {
	given *peer.Given
	links links
	way   *way
	stop  context.CancelFunc
}

var _ control.Controlled = givenOperator{}

func (o givenOperator) Status(context.Context) (control.Status, error) {
	return control.Status{State: "in_doubt", InDoubt: o.given.Migration()}, nil
}

func (o givenOperator) refuse() error {
	return fmt.Errorf("%w: the VM was given away, and has no machine here (migration %s)", control.ErrConflict, o.given.Migration())
}

func (o givenOperator) Pause(context.Context) error               { return o.refuse() }
func (o givenOperator) Resume(context.Context) error              { return o.refuse() }
func (o givenOperator) SetMigratable(context.Context, bool) error { return o.refuse() }
func (o givenOperator) Cancel(context.Context) error              { return o.refuse() }

func (o givenOperator) Snapshot(context.Context, string) (*migrate.Report, error) {
	return nil, o.refuse()
}

func (o givenOperator) Balloon(context.Context, int64) (control.Balloon, error) {
	return control.Balloon{}, o.refuse()
}

func (o givenOperator) Migrate(_ context.Context, address string) (*migrate.Report, error) {
	return nil, lookAt(o.links, o.way, o.given.Migration(), address)
}

func (o givenOperator) Stop(context.Context) error {
	o.stop()
	return nil
}

// lookAt has whoever a VM was given to looked for at an address, and says so in its error.
func lookAt(l links, w *way, id, address string) error {
	l, err := l.to(address)
	if err != nil {
		return err
	}
	w.dial(l.dial)
	return fmt.Errorf("%w: the VM was given away already (migration %s): whoever has it is looked for at %s from now on", control.ErrConflict, id, transport.Redacted(address))
}
