package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// link is a way to a server over which all connections together pass so many bytes a second in each direction, as over a network of that
// speed: a proxy for TCP in this process. It adds no latency but that of the bytes before.
type link struct {
	listener net.Listener
	server   string
	there    meter
	back     meter
	work     sync.WaitGroup
	first    atomic.Int64 // when the first connection came: UnixNano

	mu     sync.Mutex // guards what follows
	conns  map[net.Conn]struct{}
	closed bool
}

// newLink makes a link to a server, of that many bits a second.
func newLink(server string, rate int64) (*link, error) {
	l := &link{server: server, conns: make(map[net.Conn]struct{})}
	l.setRate(rate)
	var err error
	if l.listener, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		return nil, fmt.Errorf("make link to %q: %w", server, err)
	}
	l.work.Go(l.accept)
	return l, nil
}

// address is where clients find the server.
func (l *link) address() string { return l.listener.Addr().String() }

// begun is when the first connection came.
func (l *link) begun() time.Time { return time.Unix(0, l.first.Load()) }

func (l *link) setRate(bits int64) {
	l.there.rate.Store(bits / 8)
	l.back.rate.Store(bits / 8)
}

// passed is how many bytes went either way.
func (l *link) passed() int64 { return l.there.passed.Load() + l.back.passed.Load() }

// close cuts all connections, and returns when nothing of it goes on.
func (l *link) close() error {
	l.mu.Lock()
	l.closed = true
	for c := range l.conns {
		_ = c.Close()
	}
	l.mu.Unlock()
	err := l.listener.Close()
	l.work.Wait()
	return err
}

func (l *link) accept() {
	for {
		client, err := l.listener.Accept()
		if err != nil {
			return // closed
		}
		l.first.CompareAndSwap(0, time.Now().UnixNano())
		server, err := net.Dial("tcp", l.server)
		if err != nil {
			_ = client.Close()
			continue
		}
		if !l.add(client, server) {
			return
		}
		l.work.Go(func() {
			var both sync.WaitGroup
			both.Go(func() { carry(server, client, &l.there) })
			both.Go(func() { carry(client, server, &l.back) })
			both.Wait()
			l.remove(client, server)
		})
	}
}

func (l *link) add(conns ...net.Conn) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range conns {
		if l.closed {
			_ = c.Close()
			continue
		}
		// What waits in a socket is sent already for who wrote it: let that be little.
		_ = c.(*net.TCPConn).SetReadBuffer(64 << 10)
		_ = c.(*net.TCPConn).SetWriteBuffer(64 << 10)
		l.conns[c] = struct{}{}
	}
	return !l.closed
}

func (l *link) remove(conns ...net.Conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range conns {
		_ = c.Close()
		delete(l.conns, c)
	}
}

// carry passes on what one side sends until its end, which it passes on, too.
func carry(to, from net.Conn, m *meter) {
	p := make([]byte, 16<<10)
	for {
		n, err := from.Read(p)
		if n > 0 {
			m.take(n)
			if _, err := to.Write(p[:n]); err != nil {
				_ = from.Close()
				return
			}
		}
		switch {
		case errors.Is(err, io.EOF):
			_ = to.(*net.TCPConn).CloseWrite()
			return
		case err != nil:
			_ = to.Close()
			return
		}
	}
}

// meter is a token bucket: as much as rate allows, and what it would have allowed in the last burstTime.
type meter struct {
	rate, passed atomic.Int64 // rate is in bytes a second

	mu   sync.Mutex
	next time.Time // when what was taken has passed
}

const burstTime = 10 * time.Millisecond

// take waits until n more bytes may pass.
func (m *meter) take(n int) {
	m.mu.Lock()
	now := time.Now()
	if least := now.Add(-burstTime); m.next.Before(least) {
		m.next = least
	}
	m.next = m.next.Add(time.Duration(float64(n) / float64(m.rate.Load()) * float64(time.Second)))
	ahead := m.next.Sub(now)
	m.mu.Unlock()
	time.Sleep(ahead)
	m.passed.Add(int64(n))
}
