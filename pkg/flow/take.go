package flow

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/drafter-vm/drafter/pkg/nat"
)

// takeTime is how long a process may take to let go of a namespace.
const takeTime = 5 * time.Second

// take makes the namespace ours: from a process that has it, which is asked to let go.
func (k *Keeper) take(ctx context.Context) error {
	cookie, err := nat.Cookie(k.kernel.ns)
	if err != nil {
		return err
	}
	name := fmt.Sprintf("%d-flow", cookie)
	k.file = filepath.Join(nat.StateDir, name+".json")
	socket := filepath.Join(nat.StateDir, name+".sock")
	ctx, cancel := context.WithTimeoutCause(ctx, takeTime, errors.New("the process that has it does not let go"))
	defer cancel()
	for {
		if k.lock, err = nat.Lock(name); err == nil {
			break
		} else if !errors.Is(err, nat.ErrBusy) {
			return err
		}
		if conn, err := (&net.Dialer{}).DialContext(ctx, "unix", socket); err == nil { // that asks
			conn.Close()
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", err, context.Cause(ctx))
		}
	}
	if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if k.yield, err = net.Listen("unix", socket); err != nil { // in a folder of mode 0700
		return err
	}
	k.tasks.Go(func() {
		for {
			conn, err := k.yield.Accept()
			if err != nil {
				return
			}
			conn.Close()
			if k.yields() {
				k.log.Info("another process keeps the connections from now on")
				close(k.taken)
				return
			}
		}
	})
	return nil
}

// yields reports whether another process may have the namespace: when the guest is elsewhere.
func (k *Keeper) yields() bool {
	s := k.State()
	return s == Away || s == Vacant
}

// Close lets go of the namespace. Of a guest that is here, connections of other places end, and of one that is elsewhere, what is kept
// stays in the kernel for the next Open: until then, nothing passes through the tunnels. [Keeper.End] removes it.
func (k *Keeper) Close() error {
	k.mu.Lock()
	if k.closed {
		k.mu.Unlock()
		return nil
	}
	k.closed = true
	k.mu.Unlock()
	return k.release()
}

// End notes that there is no guest any more, and removes all that is kept, here and at the other places.
func (k *Keeper) End() error {
	end, err := k.in("end", Vacant, Home, Leaving, Diverted, Away)
	if err != nil {
		return err
	}
	defer end()
	k.mu.Lock()
	var owners []*tunnel
	for p, info := range k.saved.Places {
		if info.Owner && k.tunnels[p] != nil {
			owners = append(owners, k.tunnels[p])
		}
	}
	k.mu.Unlock()
	ctx, cancel := context.WithTimeout(k.ctx, time.Second)
	defer cancel()
	for _, t := range owners {
		if t.up() {
			_, _ = t.ask(ctx, message{Say: sayEnd}) // one that does not hear it notices by itself that they have ended
		}
	}
	return k.vacate()
}

// release ends what the process has of a keeper.
func (k *Keeper) release() error {
	k.cancel()
	if k.cfg.Listen != nil {
		k.cfg.Listen.Close()
	}
	var err error
	if k.yield != nil {
		k.yield.Close()
	}
	k.mu.Lock()
	all := make([]*tunnel, 0, len(k.tunnels))
	for _, t := range k.tunnels {
		all = append(all, t)
	}
	k.mu.Unlock()
	for _, t := range all {
		t.close()
	}
	k.tasks.Wait()
	if k.lock != nil {
		if e := os.Remove(k.lock.Name()); e != nil && !errors.Is(e, os.ErrNotExist) {
			err = errors.Join(err, e)
		}
		k.lock.Close()
	}
	if k.kernel != nil {
		k.kernel.close()
	}
	return err
}
