package flow

// Busy runs f while nobody else changes the state.
func (k *Keeper) Busy(f func()) {
	k.step.Lock()
	defer k.step.Unlock()
	f()
}
