package flow

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"time"

	"github.com/drafter-vm/drafter/pkg/nat"
)

// takeTime is how long a process may take to let go of a namespace.
const takeTime = 5 * time.Second

// Kept is what is kept in a namespace, as it is written down.
type Kept struct {
	State   State     `json:"state"`             // what goes on there
	VM      string    `json:"vm,omitempty"`      // the machine's id, the same on all hosts
	Place   uint32    `json:"place,omitempty"`   // the namespace's own number
	Address string    `json:"address,omitempty"` // at which other places have been told to find it
	Guest   uint32    `json:"guest,omitempty"`   // the place where the guest is
	Since   time.Time `json:"since,omitzero"`    // when it left
	Other   []Place   `json:"others,omitempty"`  // number of the place that the guest goes to, or came from
}

// Read reads what is kept in a namespace, whoever keeps it. It says nothing of who is connected.
func Read(name string) (Kept, error) {
	handle, err := nat.OpenNamespace(name)
	if err != nil {
		return Kept{}, err
	}
	defer handle.Close()
	cookie, err := nat.Cookie(handle)
	if err != nil {
		return Kept{}, err
	}
	s := saved{State: Vacant}
	file := filepath.Join(nat.StateDir(), nat.FlowState(cookie)+".json")
	if b, err := os.ReadFile(file); err == nil {
		if err := json.Unmarshal(b, &s); err != nil {
			return Kept{}, fmt.Errorf("decode %q: %w", file, err)
		}
	} else if !errors.Is(err, os.ErrNotExist) {
		return Kept{}, err
	}
	k := Kept{State: s.State, VM: s.ID, Place: s.Self, Address: s.Address, Guest: s.Guest, Since: s.Since}
	for p, info := range s.Places {
		k.Other = append(k.Other, Place{Number: p, Address: info.Address, Relay: info.Relay, Guest: s.Guest == p, HasOwn: info.Owner, VXLAN: info.Carried})
	}
	sort.Slice(k.Other, func(i, j int) bool { return k.Other[i].Number < k.Other[j].Number })
	return k, nil
}

// take makes the namespace ours: from a process that has it, which is asked to let go.
func (k *Keeper) take(ctx context.Context) error {
	cookie, err := nat.Cookie(k.kernel.ns)
	if err != nil {
		return err
	}
	name := nat.FlowState(cookie)
	k.file = filepath.Join(nat.StateDir(), name+".json")
	socket := filepath.Join(nat.StateDir(), name+".sock")
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
			if k.yields() { // it asks again and again, until somebody here has heard it
				k.mu.Lock()
				close(k.taken)
				k.taken = make(chan struct{})
				k.mu.Unlock()
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
	if k.State() != Diverted { // then it may be where it went to
		k.tellEnd()
	}
	return k.vacate()
}

// tellEnd tells the places that own connections that there is no guest any more.
func (k *Keeper) tellEnd() {
	k.mu.Lock()
	owners := k.owners(0) // there is no place 0
	k.mu.Unlock()
	ctx, cancel := context.WithTimeout(k.ctx, time.Second)
	defer cancel()
	for _, t := range owners {
		if t.up() {
			_, _ = t.ask(ctx, message{Say: sayEnd}) // one that does not hear it notices by itself that they have ended
		}
	}
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
	k.step.Lock() // whoever makes tunnels has to see that they are closed
	k.mu.Lock()
	k.closed = true
	all := slices.Collect(maps.Values(k.tunnels))
	k.mu.Unlock()
	k.step.Unlock()
	for _, t := range all {
		t.close()
		t.wait()
	}
	if k.prober != nil {
		k.prober.conn.Close()
	}
	k.tasks.Wait()
	if k.vxlan != nil && k.State() == Vacant {
		err = errors.Join(err, k.kernel.removeVXLAN())
	}
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
