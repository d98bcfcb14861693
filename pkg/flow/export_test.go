package flow

import "time"

// Busy runs f while nobody else changes the state.
func (k *Keeper) Busy(f func()) {
	k.step.Lock()
	defer k.step.Unlock()
	f()
}

// Address is at which other places find this one.
func (k *Keeper) Address() string { return k.cfg.Address }

// Cut ends the connection with the place of an address, as a network may.
func (k *Keeper) Cut(address string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for p, info := range k.saved.Places {
		if t := k.tunnels[p]; t != nil && t.up() && info.Address == address {
			t.present().close()
		}
	}
}

// SetSilentFor has silent places be taken for gone sooner, and returns how to undo that.
func SetSilentFor(d time.Duration) (undo func()) {
	was := silentFor
	silentFor = d
	return func() { silentFor = was }
}
