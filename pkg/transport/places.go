package transport

import (
	"container/list"
	"sync"
)

// maxOpening is how many clients may be on their way to a WebSocket or a QUIC stream at a time.
const maxOpening = 1024

// places are of connections that have not got anywhere yet, at most maxOpening. Who has been at it for longest makes room for the next: those
// who only hold places keep nobody out.
type places struct {
	mu sync.Mutex // guards what follows
	in list.List  // of *opener, the oldest first
	at map[any]*list.Element
}

type opener struct {
	of    any
	evict func() // returns at once
}

// enter gives a connection a place, from which it may be evicted until it leaves.
func (p *places) enter(of any, evict func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.at == nil {
		p.at = make(map[any]*list.Element)
	}
	if p.in.Len() == maxOpening {
		oldest := p.in.Remove(p.in.Front()).(*opener)
		delete(p.at, oldest.of)
		oldest.evict()
	}
	p.at[of] = p.in.PushBack(&opener{of, evict})
}

// leave may be called by one that was evicted, too.
func (p *places) leave(of any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if e, ok := p.at[of]; ok {
		p.in.Remove(e)
		delete(p.at, of)
	}
}
