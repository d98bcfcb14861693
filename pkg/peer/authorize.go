package peer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/drafter-vm/drafter/pkg/migrate"
	"github.com/drafter-vm/drafter/pkg/runner"
	"github.com/drafter-vm/drafter/pkg/transport"
	"github.com/drafter-vm/drafter/pkg/wire"
)

// Request is what is about to be done with the peer at the other end of streams.
type Request struct {
	// Peer is who has proven to be there. The zero value: nobody has, as the transport has no way to.
	Peer transport.Identity

	// Give is set where the VM here, or a copy of it, is to be given to that peer. Otherwise one is to be taken from it, and the
	// rest says which.
	Give bool

	// Migration is the public part of its id, by which both sides log it; empty where a VM is to be given that was not before.
	Migration   string
	Description runner.Description // of the machine
	Devices     []string           // that travel

	// Rejoin is set where a link was cut, and that peer wants to go on with Migration: it has not proven yet to be the one that this peer
	// had to do with, which it must before anything comes of it. Description and Devices are empty.
	Rejoin bool
}

// Authorize decides about requests, before the other side has learned anything of the VM, and before anything was made here for one
// that comes. An error refuses; its text is for the log here and is not told to the other side. Nil lets everybody do what the
// transport lets in. It may be called concurrently.
type Authorize func(context.Context, Request) error

// ErrUnauthorized is wrapped by errors which say that Authorize has refused.
var ErrUnauthorized = errors.New("the other side is not authorized")

// decide is f, of nil too.
func (f Authorize) decide(ctx context.Context, r Request) error {
	if f == nil {
		return nil
	}
	if err := f(ctx, r); err != nil {
		return fmt.Errorf("%w (%s): %w", ErrUnauthorized, r.Peer, err)
	}
	return nil
}

// give decides whether the VM here may be given to who is at the other end of streams. Who is refused is told so, and its streams
// are closed.
func (f Authorize) give(ctx context.Context, streams []io.ReadWriter) error {
	return f.meet(ctx, streams, Request{Give: true})
}

// meet decides about who is at the other end of streams, before anything was said there.
func (f Authorize) meet(ctx context.Context, streams []io.ReadWriter, r Request) (err error) {
	role, reason := wire.RoleDestination, "this peer takes no VM from there"
	if r.Give {
		role, reason = wire.RoleSource, "this peer is not allowed to have the VM"
	}
	if r.Peer, err = whoIs(streams); err == nil {
		err = f.decide(ctx, r)
	}
	if err != nil {
		refuse(streams, role, wire.CodeRefused, reason)
	}
	return err
}

// again decides about who comes to go on with a migration whose link was cut: it is what migrate's Admit asks for.
func (f Authorize) again(give bool, migration func() string) func(context.Context, []io.ReadWriter) error {
	if f == nil {
		return nil
	}
	return func(ctx context.Context, streams []io.ReadWriter) error {
		return f.meet(ctx, streams, Request{Give: give, Migration: wire.PublicID(migration()), Rejoin: true})
	}
}

// take decides whether a VM may be taken from whoever is at the other end of streams.
func (f Authorize) take(ctx context.Context, streams []io.ReadWriter, m *wire.Manifest) error {
	who, err := whoIs(streams)
	if f != nil && err == nil {
		r := Request{Peer: who, Migration: wire.PublicID(m.ID)}
		if r.Description, err = runner.ParseDescription(m.Spec); err != nil {
			return migrate.Refuse("machine description: %v", err)
		}
		for _, d := range m.Devices {
			r.Devices = append(r.Devices, d.Name)
		}
		err = f.decide(ctx, r)
	}
	if err != nil {
		return errors.Join(migrate.Refuse("this peer takes no such VM from there"), err)
	}
	return nil
}

// whoIs is who is at the other end of all streams.
func whoIs(streams []io.ReadWriter) (transport.Identity, error) {
	var who transport.Identity
	for n, s := range streams {
		is := transport.IdentityOf(s)
		if n > 0 && !is.Equal(who) {
			return who, fmt.Errorf("%w: stream 0 is from %s, and stream %d from %s", ErrUnauthorized, who, n, is)
		}
		who = is
	}
	return who, nil
}

// refuse tells the other side, in the role that is ours, why nothing comes of it, and closes the streams.
func refuse(streams []io.ReadWriter, role wire.Role, code wire.Code, reason string) {
	for n, s := range streams {
		if conn, ok := s.(net.Conn); ok {
			_ = conn.SetWriteDeadline(time.Now().Add(time.Second))
		} else if _, ok := s.(io.Closer); !ok {
			continue // what cannot be interrupted is not waited for
		}
		ours := wire.Preface{Newest: wire.Version, Oldest: wire.OldestVersion, Role: role, Streams: uint8(len(streams)), Stream: uint8(n)}
		_, _ = s.Write(wire.Append(ours.Append(nil), wire.Header{Type: wire.TypeAbort}, wire.Abort{Code: code, Reason: reason}.Encode()))
	}
	closeAll(streams)
}
