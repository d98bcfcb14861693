package flow

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"
)

// hear answers what another place says.
func (k *Keeper) hear(t *tunnel, m message) message {
	if m.Say == sayVXLAN {
		return k.answerVXLAN(t, m)
	}
	if err := k.heed(t, m); err != nil {
		k.log.Warn("another place asked for what cannot be", "place", t.place, "say", m.Say, "error", err)
		return message{Error: err.Error()}
	}
	return message{}
}

func (k *Keeper) heed(t *tunnel, m message) error {
	if m.Say != sayGone { // which may be asked of places that ask us, and changes nothing at once
		k.step.Lock()
		defer k.step.Unlock()
	}
	k.mu.Lock()
	state, guest, self, source := k.saved.State, k.saved.Guest, k.saved.Self, k.saved.Source
	info, over := k.saved.Places[t.place], k.closed || k.tunnels[t.place] != t
	k.mu.Unlock()
	if over {
		return ErrClosed
	}
	// Only the place that has the guest says where it goes.
	fromGuest := state == Away && t.place == guest
	switch m.Say {
	case sayPoint:
		if !fromGuest || m.Place == 0 || m.Place > maxPlace || m.Place == self || m.Place == t.place {
			return fmt.Errorf("%w: %s", ErrState, state)
		}
		return k.point(m.Place, m.Address)
	case sayFollow:
		if state == Away && m.Place == guest { // it has, and its answer was not heard
			return nil
		}
		if !fromGuest {
			return fmt.Errorf("%w: %s", ErrState, state)
		}
		return k.follow(t.place, m.Place)
	case sayForget:
		back := state == Expecting && t.place == source // it has said so before it has come to send the guest here
		if !fromGuest && !back || m.Place == guest {
			return fmt.Errorf("%w: %s", ErrState, state)
		}
		return k.notComing(m.Place)
	case sayRelay:
		late := (state == Home || state == Leaving) && info.Owner && m.Via == t.place // it relays for one that has not followed
		if !late && (state != Expecting || t.place != source) {
			return fmt.Errorf("%w: %s", ErrState, state)
		}
		return k.relayedBy(m.Place, m.Via, t.place)
	case sayHere:
		return k.change(func(s *saved) {
			info := s.Places[t.place]
			info.Address = m.Address
			s.Places[t.place] = info
			if s.Before == nil {
				return
			}
			if info, ok := s.Before.Places[t.place]; ok {
				info.Address = m.Address
				s.Before.Places[t.place] = info
			}
		})
	case sayFlows:
		if state != Expecting || t.place != source {
			return fmt.Errorf("%w: %s", ErrState, state)
		}
		return k.learn(m.Flows)
	case sayGone:
		place := t.place
		k.mu.Lock()
		if m.Place != 0 { // one that it relays for, whose own word was not heard here
			place, info = m.Place, k.saved.Places[m.Place]
		}
		k.mu.Unlock()
		if !info.Owner || state != Home && state != Away {
			return fmt.Errorf("%w: %s", ErrState, state)
		}
		if state == Away { // one that this place relays for
			if _, err := k.askGuest(message{Say: sayGone, Place: place}); err != nil {
				return err
			}
		}
		k.tasks.Go(func() { k.gone(place, state) }) // which closes the tunnel that is answered by
		return nil
	case sayVXLAN:
		if !fromGuest || m.VXLAN == nil || !m.VXLAN.valid() {
			return fmt.Errorf("%w: %s", ErrState, state)
		}
		return k.meetByVXLAN(t.place, *m.VXLAN)
	case sayCarry:
		if !fromGuest || m.Carry && info.VXLAN == nil {
			return fmt.Errorf("%w: %s", ErrState, state)
		}
		return k.carriedTo(t.place, m.Carry)
	case sayEnd:
		if !fromGuest {
			return fmt.Errorf("%w: %s", ErrState, state)
		}
		k.tasks.Go(k.end)
		return nil
	}
	return fmt.Errorf("%w: it says %q", errMalformed, m.Say)
}

// point connects with the place that the guest is about to go to.
func (k *Keeper) point(place uint32, address string) error {
	if err := k.onlyComing(place); err != nil {
		return err
	}
	if err := k.change(func(s *saved) {
		info := s.Places[place]
		info.Address, info.Dial, info.Carried, info.Coming = address, true, false, true
		s.Places[place] = info
	}); err != nil {
		return err
	}
	if err := k.connect(place, false); err != nil {
		return err
	}
	if err := k.rules(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(k.ctx, answerTime/2)
	defer cancel()
	t := k.tunnel(place)
	if t == nil {
		return errDown
	}
	if err := t.await(ctx); err != nil {
		return errors.Join(err, k.notComing(place))
	}
	return nil
}

// onlyComing notes that the guest goes nowhere but to a place: what was said before, and not heard, was that it does not.
func (k *Keeper) onlyComing(place uint32) error {
	var errs []error
	for _, p := range k.places() {
		k.mu.Lock()
		other := p != place && k.saved.Places[p].Coming
		k.mu.Unlock()
		if other {
			errs = append(errs, k.notComing(p))
		}
	}
	return errors.Join(errs...)
}

// notComing notes that the guest does not go to a place, or that it is not reached: it is left, unless it is needed for other reasons.
func (k *Keeper) notComing(place uint32) error {
	again := false // it is needed if the guest does not come
	if err := k.change(func(s *saved) {
		forget := func(places map[uint32]known) {
			if info, ok := places[place]; ok {
				info.Coming = false
				places[place] = info
			}
		}
		forget(s.Places)
		if b := s.Before; b != nil {
			if forget(b.Places); !b.needs(place) {
				delete(b.Places, place)
			}
			_, again = b.Places[place]
		}
	}); err != nil || again || k.needs(place) {
		return err
	}
	return k.leave(place)
}

// follow sends what is for the guest to the place where it is now, if it can be reached; the one before relays otherwise.
func (k *Keeper) follow(from, to uint32) error {
	t := k.tunnel(to)
	if t == nil || !t.up() {
		return fmt.Errorf("place %d: %w", to, errDown)
	}
	if err := k.kernel.redirect(k.way(to)); err != nil {
		return err
	}
	if err := k.change(func(s *saved) {
		s.Guest = to
		info := s.Places[to]
		info.Coming = false
		s.Places[to] = info
	}); err != nil {
		return err
	}
	if err := k.onlyComing(to); err != nil {
		k.log.Warn("something of a tunnel is left", "error", err)
	}
	k.hangUp(from)
	k.tasks.Go(func() { // its word is answered by its tunnel
		select {
		case <-time.After(time.Second):
		case <-k.ctx.Done():
			return
		}
		k.leaveIf(from, to)
	})
	return nil
}

// relayedBy notes through which place an owner is reached while it is not connected with this one: by that which the source names, or the source.
func (k *Keeper) relayedBy(owner, via, source uint32) error {
	k.mu.Lock()
	if via == k.saved.Self { // this one knows better
		k.mu.Unlock()
		return nil
	}
	info, ok := k.saved.Places[owner]
	if _, known := k.saved.Places[via]; !known || via == owner {
		via = source
	}
	k.mu.Unlock()
	if !ok || owner == via {
		return fmt.Errorf("%w: place %d", errMalformed, owner)
	}
	info.Relay = via
	if err := k.change(func(s *saved) { s.Places[owner] = info }); err != nil {
		return err
	}
	return k.backToRelayed() // others may be reached through it
}

// learn puts connections of other places into conntrack.
func (k *Keeper) learn(flows []flow) error {
	k.mu.Lock()
	self := k.saved.Self
	k.mu.Unlock()
	var theirs []flow
	skipped := 0
	for _, f := range flows {
		from, to := slices.Contains(k.kernel.guests, f.From.Addr()), slices.Contains(k.kernel.guests, f.To.Addr())
		if f.Owner == 0 || f.From.Addr().Is4() != f.To.Addr().Is4() {
			return fmt.Errorf("%w: a connection from %s to %s of place %d", errMalformed, f.From, f.To, f.Owner)
		}
		switch {
		case !slices.ContainsFunc(k.kernel.guests, func(g netip.Addr) bool { return g.Is4() == f.From.Addr().Is4() }):
			skipped++
		case !from && !to:
			return fmt.Errorf("%w: a connection from %s to %s, neither of which is the guest", errMalformed, f.From, f.To)
		case f.Owner != self:
			theirs = append(theirs, f)
		}
	}
	if skipped > 0 {
		k.log.Warn("connections of the guest end: they are of IPv6, or IPv4, which its network namespace here is without", "connections", skipped)
	}
	return k.kernel.pin(theirs)
}

// askGuest asks the place that has the guest.
func (k *Keeper) askGuest(m message) (message, error) {
	place := k.guestPlace()
	t := k.tunnel(place)
	if t == nil {
		return message{}, fmt.Errorf("%s: place %d: %w", m.Say, place, errDown)
	}
	return t.ask(k.ctx, m)
}

// gone forgets a place that owns no connection any more, unless the state has changed.
func (k *Keeper) gone(place uint32, state State) {
	select {
	case <-time.After(100 * time.Millisecond): // the answer goes first
	case <-k.ctx.Done():
		return
	}
	k.step.Lock()
	defer k.step.Unlock()
	if k.State() != state {
		return // it says so again at the next place
	}
	if err := k.leave(place); err != nil {
		k.log.Warn("something of a tunnel is left", "place", place, "error", err)
	}
}

// end gives up what is kept: there is no guest any more.
func (k *Keeper) end() {
	k.step.Lock()
	defer k.step.Unlock()
	if k.State() != Away {
		return
	}
	k.log.Info("the guest is no more, and so are its connections")
	if err := k.vacate(); err != nil {
		k.log.Warn("something of what was kept is left", "error", err)
	}
}

// watchEvery is how often it is looked for connections that are alive.
const watchEvery = time.Second

// watch ends the keeping when the last connection has.
func (k *Keeper) watch() {
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	idle, silent := 0, make(map[uint32]time.Time)
	for {
		select {
		case <-tick.C:
		case <-k.ctx.Done():
			return
		}
		state := k.State()
		if state == Home {
			k.leaveSilent(silent)
		} else {
			clear(silent)
		}
		if state != Away {
			idle = 0
			continue
		}
		k.mu.Lock()
		late := k.cfg.Limit > 0 && time.Since(k.saved.Since) > k.cfg.Limit
		k.mu.Unlock()
		own, relayed, err := k.Alive()
		if err != nil {
			k.log.Warn("cannot look for connections", "error", err)
			continue
		}
		if own+relayed > 0 && !late {
			idle = 0
			continue
		}
		// Twice, as a packet may be on its way that begins one; longer where nobody would hear of it.
		idle++
		t := k.tunnel(k.guestPlace())
		unheard := t == nil || !t.up()
		if late || idle >= 2 && !unheard || idle > int(silentFor/watchEvery) {
			k.finish()
		}
	}
}

// silentFor is how long a place that has nothing to keep waits for one that is to hear of it, and how long that one waits for a place of which it has
// not heard, and knows no living connection, before it takes that for gone.
var silentFor = 10 * time.Second

// leaveSilent leaves owners that are gone, and have not said so. The times are since when each is silent.
func (k *Keeper) leaveSilent(since map[uint32]time.Time) {
	var gone []uint32
	k.mu.Lock()
	relays := make(map[uint32]bool)
	for _, info := range k.saved.Places {
		relays[info.Relay] = true
	}
	for p := range since { // and known again, perhaps
		if _, ok := k.saved.Places[p]; !ok {
			delete(since, p)
		}
	}
	for p, info := range k.saved.Places {
		switch t := k.tunnels[p]; {
		case !info.Owner || t == nil || t.up() || relays[p] || k.hop(p) != p:
			delete(since, p)
		case since[p].IsZero():
			since[p] = time.Now()
		case time.Since(since[p]) > silentFor:
			since[p] = time.Now()
			gone = append(gone, p)
		}
	}
	k.mu.Unlock()
	if len(gone) == 0 {
		return
	}
	flows, err := k.kernel.flows()
	if err != nil {
		k.log.Warn("cannot look for connections", "error", err)
		return
	}
	end, err := k.in("leave places that are gone", Home)
	if err != nil {
		return
	}
	defer end()
	for _, p := range gone {
		if t := k.tunnel(p); t == nil || t.up() || slices.ContainsFunc(flows, func(f flow) bool { return f.Owner == p && !f.over() }) {
			continue
		}
		k.log.Info("a place that owned connections is gone", "place", p)
		if err := k.leave(p); err != nil {
			k.log.Warn("something of a tunnel is left", "place", p, "error", err)
		}
	}
}

// Alive is how many connections are kept here for a guest that is elsewhere: those that began here, and those of other places that are relayed,
// as they are for a moment after each move.
func (k *Keeper) Alive() (own, relayed int, err error) {
	flows, err := k.kernel.flows()
	if err != nil {
		return 0, 0, err
	}
	k.mu.Lock()
	guest := k.saved.Guest
	k.mu.Unlock()
	for _, f := range flows {
		switch {
		case f.over() || f.Owner != 0 && f.Owner == guest:
		case f.Owner == 0:
			own++
		default:
			relayed++
		}
	}
	return own, relayed, nil
}

// Drop ends what is kept for a guest that is elsewhere, though connections are alive: their ends hear nothing any more. Of a guest that is here,
// or on its way, it is given up only if its machine is not there any more.
func (k *Keeper) Drop() error {
	end, err := k.in("drop connections", Away, Vacant, Home, Leaving, Diverted, Expecting)
	if err != nil {
		return err
	}
	defer end()
	switch state := k.State(); {
	case state == Vacant:
		return nil
	case state != Away && k.kernel.used():
		return fmt.Errorf("drop connections: a machine runs in network namespace %q: end it first: %w", k.cfg.Netns, ErrState)
	case state == Diverted: // the guest is where it went to
		if err := k.left(); err != nil {
			return err
		}
	case state != Away:
		k.tellEnd()
		return k.vacate()
	}
	if _, err := k.askGuest(message{Say: sayGone}); err != nil {
		k.log.Warn("the place that has the guest was not told that its connections from here end", "error", err)
	}
	return k.vacate()
}

// finish ends what is kept, and says so to the place that has the guest.
func (k *Keeper) finish() {
	k.step.Lock()
	defer k.step.Unlock()
	if k.State() != Away {
		return
	}
	if t := k.tunnel(k.guestPlace()); t != nil && t.up() {
		if _, err := t.ask(k.ctx, message{Say: sayGone}); err != nil {
			k.log.Debug("the place that has the guest was not told that no connection is left", "error", err)
			return // the guest may be moving: again later
		}
	}
	k.log.Info("the last connection has ended")
	if err := k.vacate(); err != nil {
		k.log.Warn("something of what was kept is left", "error", err)
	}
}

// Place is another place of a VM, for people.
type Place struct {
	Number    uint32 `json:"number"`              // in the order in which the guest came to the places
	Address   string `json:"address"`             // at which its tunnels are accepted
	Connected bool   `json:"connected,omitempty"` // there is a tunnel
	Relay     uint32 `json:"relay,omitempty"`     // it is reached through this place only
	Guest     bool   `json:"guest,omitempty"`     // the guest is there
	Pinned    int    `json:"pinned,omitempty"`    // connections here that it owns
	HasOwn    bool   `json:"has_own,omitempty"`   // it owns connections, as far as is known
	VXLAN     bool   `json:"vxlan,omitempty"`     // the kernel carries packets to it
}

// Places are the other places that this one has to do with.
func (k *Keeper) Places() ([]Place, error) {
	flows, err := k.kernel.flows()
	if err != nil {
		return nil, err
	}
	pinned := make(map[uint32]int)
	for _, f := range flows {
		pinned[f.Owner]++
	}
	var all []Place
	for _, p := range k.places() {
		k.mu.Lock()
		info, t := k.saved.Places[p], k.tunnels[p]
		guest, relay := k.saved.Guest == p, k.hop(p)
		k.mu.Unlock()
		if relay == p {
			relay = 0
		}
		all = append(all, Place{Number: p, Address: info.Address, Connected: t != nil && t.up(), Relay: relay, Guest: guest, Pinned: pinned[p], HasOwn: info.Owner, VXLAN: info.Carried})
	}
	return all, nil
}
