package peer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"

	"golang.org/x/sys/unix"

	"github.com/drafter-vm/drafter/pkg/migrate"
	"github.com/drafter-vm/drafter/pkg/vmpackage"
	"github.com/drafter-vm/drafter/pkg/wire"
)

// ErrPaused is wrapped by errors of what needs a guest that runs, while Pause has stopped it.
var ErrPaused = errors.New("the VM is paused")

// ErrNotMigratable is wrapped by the error of Send while SetMigratable forbids it.
var ErrNotMigratable = errors.New("the VM is not migratable now")

// Pause tells the guest's agent and stops the vCPUs, until Unpause. A paused guest does not migrate, and Close saves it. It is not on
// record: a peer that is started again, after this process died, lets the guest run. It fails with ErrBusy during a migration.
func (p *Peer) Pause(ctx context.Context) error {
	ctx, done, err := p.begin(ctx)
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

// Unpause undoes Pause. Without one it does nothing.
func (p *Peer) Unpause(ctx context.Context) error {
	p.mu.Lock()
	paused := p.paused
	p.mu.Unlock()
	if !paused {
		return nil
	}
	p.setPaused(false) // so that begin lets it pass; nothing else can begin before done
	ctx, done, err := p.begin(ctx)
	if err == nil {
		defer done()
		err = p.instance.Continue(ctx)
	}
	if err != nil {
		p.setPaused(true)
		return fmt.Errorf("unpause VM: %w", err)
	}
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

// Busy reports whether a Send, a Snapshot, or a Pause is under way.
func (p *Peer) Busy() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.sending
}

// Cancel cancels the Send or the Snapshot under way, and reports whether there was one. It does not wait for its end; one that has
// handed the guest over already goes on.
func (p *Peer) Cancel() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.sending {
		p.cancel()
	}
	return p.sending
}

// Snapshot writes the VM, which runs on, down as a package in a new folder. The guest is paused for as long as a migration would:
// for its device state, and what it wrote last. Config.Goal applies, and all of the memory and the disks is written meanwhile. When it
// fails nothing is left. The report is that of the writing side.
func (p *Peer) Snapshot(ctx context.Context, dir string) (*vmpackage.Manifest, *migrate.Report, error) {
	t := Terminator{Dir: dir, Copy: true, Concurrency: p.cfg.Concurrency, RescueTimeout: p.cfg.RescueTimeout, Logger: p.cfg.Logger}
	if err := t.Check(); err != nil {
		return nil, nil, fmt.Errorf("snapshot VM: %w", err)
	}
	here, there, err := socketPair()
	if err != nil {
		return nil, nil, fmt.Errorf("snapshot VM: %w", err)
	}
	type result struct {
		report *migrate.Report
		err    error
	}
	sent := make(chan result, 1)
	go func() {
		report, err := p.send(ctx, []io.ReadWriter{here}, false)
		closeAll([]io.ReadWriter{here}) // also of what could not begin
		sent <- result{report, err}
	}()
	manifest, report, err := t.Receive(ctx, []io.ReadWriter{there})
	s := <-sent
	if err == nil {
		report.Downtime, report.Parts = s.report.Downtime, s.report.Parts // which this side alone sees whole
		return manifest, report, s.err
	}
	if s.err != nil {
		err = s.err // why the other could not go on
	}
	return nil, report, fmt.Errorf("snapshot VM: %w", err)
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

// busy is what the other side of streams is told when nothing can be begun for this reason.
func busy(err error) (wire.Code, string) {
	if errors.Is(err, ErrPaused) {
		return wire.CodeCanceled, "this VM is paused: try again when it is not"
	}
	return wire.CodeCanceled, "another migration of this VM is under way here: try again when it is over"
}
