package faults

// Event is something that happened to the guest.
type Event struct {
	Host string
	What string // "start", "stop", "boot"
}

// History is what happened, in order.
type History struct{ events []Event }

func (h *History) add(at int64, e Event) { h.events = append(h.events, e) }
