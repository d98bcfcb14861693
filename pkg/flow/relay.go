package flow

import "errors"

// joined does what a new connection with a place allows.
func (k *Keeper) joined(t *tunnel) {
	k.step.Lock()
	defer k.step.Unlock()
	k.mu.Lock()
	info, known := k.saved.Places[t.place]
	state, guest, moved, address := k.saved.State, k.saved.Guest, k.moved, k.saved.Address
	over := k.closed || !known || k.tunnels[t.place] != t
	k.mu.Unlock()
	if over {
		return
	}
	err := k.change(func(s *saved) { // it is reached without others
		if info, ok := s.Places[t.place]; ok && info.Relay != 0 {
			info.Relay = 0
			s.Places[t.place] = info
		}
	})
	if err := errors.Join(err, k.backTo(t.place), k.backToRelayed()); err != nil {
		k.log.Warn("cannot change the way to another place", "error", err)
	}
	if moved {
		k.after(t, func() {
			if _, err := t.ask(k.ctx, message{Say: sayHere, Address: address}); err != nil {
				return // it is told again with the next connection
			}
			k.mu.Lock()
			dials := k.saved.Places[t.place].Dial
			k.mu.Unlock()
			if !dials { // it dials again
				k.hangUp(t.place)
			}
		})
	}
	switch {
	case !info.Owner:
	case t.place == guest:
	case state == Leaving || state == Diverted:
		k.pointTo(t, guest)
	case state == Away: // it has missed where the guest went
		k.pointTo(t, guest)
		k.followTo(t, guest)
	}
}

// pointTo has an owner connect with the place that the guest goes to, or is at. Where it cannot, this place relays. It does not wait.
func (k *Keeper) pointTo(o *tunnel, to uint32) {
	k.mu.Lock()
	address := k.saved.Places[to].Address
	k.mu.Unlock()
	k.after(o, func() {
		if _, err := o.ask(k.ctx, message{Say: sayPoint, Place: to, Address: address}); err != nil && k.ctx.Err() == nil {
			o.log.Warn("a place that owns connections does not reach that of the guest: this one relays for it", "error", err)
		}
	})
}

// followTo has an owner send what is for the guest to where that is, and leaves it if it does. Where it does not, this place relays, and says so
// there: the two may have been connected when the guest was on its way, and are not any more. It does not wait.
func (k *Keeper) followTo(o *tunnel, to uint32) {
	k.after(o, func() {
		_, err := o.ask(k.ctx, message{Say: sayFollow, Place: to})
		if err == nil {
			k.leaveIf(o.place, to)
			return
		}
		t := k.tunnel(to)
		if t == nil || !o.up() { // one that is reached by others is relayed for by these, and the guest's place was told by whom
			return
		}
		if _, e := t.ask(k.ctx, message{Say: sayRelay, Place: o.place, Via: k.self()}); e != nil {
			o.log.Debug("an owner does not follow the guest, whose place was not told that this one relays", "error", errors.Join(err, e))
		}
	})
}

// after does something with a tunnel's place after what was to be done with it before.
func (k *Keeper) after(t *tunnel, f func()) {
	k.mu.Lock()
	before, done := t.turn, make(chan struct{})
	t.turn = done
	k.mu.Unlock()
	k.tasks.Go(func() {
		defer close(done)
		if before != nil {
			<-before
		}
		f()
	})
}

// parted does what the end of a connection with a place asks for: owners that were reached by it may be relayed for.
func (k *Keeper) parted() {
	k.step.Lock()
	defer k.step.Unlock()
	if k.ctx.Err() != nil {
		return
	}
	if err := k.backToRelayed(); err != nil {
		k.log.Warn("cannot change the way to another place", "error", err)
	}
}

// hop is the place to which packets for an owner go: itself, while there is a connection with it, or packets go there without, or else the
// nearest that relays and is so. Without any, it is the owner. It is called with mu held.
func (k *Keeper) hop(owner uint32) uint32 {
	p := owner
	for range k.saved.Places {
		if t := k.tunnels[p]; t != nil && (t.up() || k.saved.Places[p].Carried) {
			return p
		}
		if p = k.saved.Places[p].Relay; p == 0 {
			break
		}
	}
	return owner
}

// backTo routes what the guest answers in an owner's connections.
func (k *Keeper) backTo(owner uint32) error {
	k.mu.Lock()
	via := k.hop(owner)
	there := k.tunnels[via] != nil
	k.mu.Unlock()
	if !there {
		return nil
	}
	return k.kernel.back(owner, k.way(via))
}

// backToRelayed is backTo for all owners that are relayed for, or were: what is connected has changed.
func (k *Keeper) backToRelayed() error {
	var errs []error
	for _, p := range k.places() {
		k.mu.Lock()
		relayed := k.saved.Places[p].Relay != 0
		k.mu.Unlock()
		if relayed {
			errs = append(errs, k.backTo(p))
		}
	}
	return errors.Join(errs...)
}
