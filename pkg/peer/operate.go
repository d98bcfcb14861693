package peer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"

	"golang.org/x/sys/unix"

	"github.com/drafter-vm/drafter/pkg/wire"
)

// ErrPaused is wrapped by errors of what needs a guest that runs, while Pause has stopped it.
var ErrPaused = errors.New("the VM is paused")

// ErrNotSavable is wrapped by errors of what would have to save an instance that cannot be: see [Config.CheckSavable].
var ErrNotSavable = errors.New("the VM cannot be saved")

// ErrNotMigratable is wrapped by the error of Send while SetMigratable forbids it, and of an instance that could not be sent at all:
// see [Config.CheckMigratable].
var ErrNotMigratable = errors.New("the VM is not migratable")

// task is a kind of what a peer does one at a time. Its text is what people are told.
type task string

const (
	migrating task = "migration"
	copying   task = "snapshot"
	pausing   task = "pause"
	resuming  task = "resume"
	rejoining task = "search for the other peer"
)

// operation is what is under way.
type operation struct {
	task
	cancel context.CancelFunc
	done   chan struct{} // closed at its end
}

// begin registers a task. The returned function ends it; its context ends with that, when ctx does, and with Close.
func (p *Peer) begin(ctx context.Context, t task) (context.Context, func(), error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.op != nil {
		return nil, nil, fmt.Errorf("%w: a %s is under way", ErrBusy, p.op.task)
	}
	if p.paused && t != resuming {
		return nil, nil, ErrPaused
	}
	ctx, cancel := context.WithCancel(ctx)
	op := &operation{t, cancel, make(chan struct{})}
	p.op = op
	return ctx, func() {
		cancel()
		p.mu.Lock()
		defer p.mu.Unlock()
		p.op = nil
		close(op.done)
	}, nil
}

// Pause tells the guest's agent and stops the vCPUs, until Unpause. A paused guest does not migrate, and Close saves it. It is not on
// record: a peer that is started again, after this process died, lets the guest run. It fails with ErrBusy during a migration.
func (p *Peer) Pause(ctx context.Context) error {
	ctx, done, err := p.begin(ctx, pausing)
	if err != nil {
		return fmt.Errorf("pause VM: %w", err)
	}
	defer done()
	if err := p.instance.Suspend(ctx); err != nil {
		return fmt.Errorf("pause VM: %w", err)
	}
	p.setPaused(true)
	return nil
}

// Unpause undoes Pause: the guest runs when it returns nil. Without a Pause it does nothing. One that comes while another Pause or
// Unpause is under way waits for its end first.
func (p *Peer) Unpause(ctx context.Context) error {
	for {
		p.mu.Lock()
		op, paused := p.op, p.paused
		p.mu.Unlock()
		switch {
		case op != nil && (op.task == pausing || op.task == resuming):
			select {
			case <-op.done:
				continue
			case <-ctx.Done():
				return fmt.Errorf("unpause VM: %w", context.Cause(ctx))
			}
		case !paused:
			return nil
		}
		resume, done, err := p.begin(ctx, resuming)
		if err != nil { // another was faster
			continue
		}
		err = p.resume(resume)
		done()
		if err != nil {
			return fmt.Errorf("unpause VM: %w", err)
		}
		return nil
	}
}

// resume lets the guest run, of a peer that Pause has stopped unless another Unpause was faster.
func (p *Peer) resume(ctx context.Context) error {
	if !p.Paused() {
		return nil
	}
	if err := p.instance.Continue(ctx); err != nil {
		return err
	}
	p.setPaused(false) // only now, so that nothing could begin before
	return nil
}

func (p *Peer) setPaused(paused bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.paused = paused
}

// Paused reports whether Pause has stopped the guest.
func (p *Peer) Paused() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.paused
}

// SetMigratable lets the VM be sent, as it can be from the start, or forbids that. A migration under way goes on.
func (p *Peer) SetMigratable(may bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.stays = !may
}

// Migratable reports whether Send may be called: SetMigratable does not forbid it, and no device that changes stays behind.
func (p *Peer) Migratable() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return !p.stays && p.cfg.CheckMigratable() == nil
}

// Busy reports whether there is something under way: see [Peer.UnderWay].
func (p *Peer) Busy() bool { return p.UnderWay() != "" }

// UnderWay is what the peer does now, of which it does one at a time: "migration" (a Send), "snapshot", "pause", "resume" (an Unpause) or
// "search for the other peer" (a Rejoin); empty: nothing.
func (p *Peer) UnderWay() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.op == nil {
		return ""
	}
	return string(p.op.task)
}

// Cancel cancels the Send, Snapshot or Pause under way, and reports whether there was one. It does not wait for its end: a Send that has
// handed the guest over already goes on, and so does a Pause that has stopped it. A Pause of which the guest's agent was told tells it that
// the guest runs on. An Unpause and a Rejoin are not cancelled: only their contexts, or Close, end them.
func (p *Peer) Cancel() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.op == nil || p.op.task == resuming || p.op.task == rejoining {
		return false
	}
	p.op.cancel()
	return true
}

// StreamPair makes n streams within this process, for a peer and something else here.
func StreamPair(n int) (here, there []io.ReadWriter, err error) {
	for range n {
		a, b, err := socketPair()
		if err != nil {
			closeAll(append(here, there...))
			return nil, nil, err
		}
		here, there = append(here, a), append(there, b)
	}
	return here, there, nil
}

// socketPair makes a stream within this process.
func socketPair() (a, b net.Conn, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, nil, err
	}
	for i, end := range []*net.Conn{&a, &b} {
		f := os.NewFile(uintptr(fds[i]), "socketpair")
		conn, e := net.FileConn(f)
		f.Close()
		if *end = conn; e != nil {
			err = errors.Join(err, e)
		}
	}
	if err != nil {
		for _, end := range []net.Conn{a, b} {
			if end != nil {
				end.Close()
			}
		}
		return nil, nil, err
	}
	return a, b, nil
}

// refusal is what the other side of streams is told when nothing can be begun for this reason.
func refusal(err error) (wire.Code, string) {
	switch {
	case errors.Is(err, ErrPaused):
		return wire.CodeCanceled, "this VM is paused: try again when it is not"
	case errors.Is(err, ErrNotMigratable):
		return wire.CodeRefused, "this VM is not migratable now"
	}
	return wire.CodeCanceled, "another migration of this VM is under way here: try again when it is over"
}
