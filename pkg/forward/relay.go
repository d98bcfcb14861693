package forward

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/drafter-vm/drafter/pkg/nat/rule"
)

// hold is a socket that holds an address, and relays what reaches it.
type hold struct {
	to     atomic.Pointer[guest] // where to; nil until the forward is there
	closer io.Closer
	ended  chan struct{}
}

// guest is a port of the guest of a namespace.
type guest struct {
	target
	port uint16
}

// close frees the address. TCP connections that are relayed already go on.
func (h *hold) close() {
	h.closer.Close()
	<-h.ended
}

// addr is where the guest is reached: in IPv6 if it has that.
func (h *hold) addr() (string, error) {
	to := h.to.Load()
	switch {
	case to == nil:
		return "", errors.New("the forward is not there yet")
	case to.inside6.IsValid():
		return netip.AddrPortFrom(to.inside6, to.port).String(), nil
	}
	return netip.AddrPortFrom(to.inside, to.port).String(), nil
}

// hold takes an address of the host.
func (f *Forwarder) hold(at place) (*hold, error) {
	h := &hold{ended: make(chan struct{})}
	s, network := at.spot, protocolName(at.protocol)+"4"
	if s.addr.Is6() {
		network = protocolName(at.protocol) + "6" // and not IPv4 with it
	}
	err := f.within(func() error {
		lc := net.ListenConfig{}
		lc.SetMultipathTCP(false)
		if at.protocol == rule.UDP {
			p, err := lc.ListenPacket(f.ctx, network, s.String())
			if err != nil {
				return err
			}
			h.closer = p
			f.relays.Go(func() { f.relayPackets(h, p.(*net.UDPConn)) })
			return nil
		}
		l, err := lc.Listen(f.ctx, network, s.String())
		if err != nil {
			return err
		}
		h.closer = l
		f.relays.Go(func() { f.relayConnections(h, l) })
		return nil
	})
	switch {
	case errors.Is(err, unix.EADDRINUSE):
		return nil, fmt.Errorf("%w: %s has it: end that, or give another port", ErrConflict, f.holder(network, s))
	case errors.Is(err, unix.EADDRNOTAVAIL):
		return nil, fmt.Errorf("this host has no address %s: give one of its own, 0.0.0.0 or [::]", s.addr)
	case err != nil:
		return nil, err
	}
	return h, nil
}

// dial connects to the guest, from the host's network namespace.
func (f *Forwarder) dial(network string, h *hold) (conn net.Conn, err error) {
	address, err := h.addr()
	if err != nil {
		return nil, err
	}
	err = f.within(func() error {
		ctx, cancel := context.WithTimeout(f.ctx, dialTime)
		defer cancel()
		conn, err = (&net.Dialer{}).DialContext(ctx, network, address)
		return err
	})
	return conn, err
}

// dialTime is how long a guest may take to accept a connection.
const dialTime = 10 * time.Second

func (f *Forwarder) relayConnections(h *hold, l net.Listener) {
	defer close(h.ended)
	for pause := time.Millisecond; ; {
		c, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		} else if err != nil { // out of descriptors, most likely
			f.cfg.Logger.Error("cannot accept a connection to forward", "error", err)
			time.Sleep(pause)
			pause = min(2*pause, time.Second)
			continue
		}
		pause = time.Millisecond
		f.relays.Go(func() { f.relay(h, c) })
	}
}

// relay connects a client with the guest until both have ended.
func (f *Forwarder) relay(h *hold, client net.Conn) {
	defer client.Close()
	guest, err := f.dial("tcp", h)
	if err != nil {
		f.cfg.Logger.Warn("a connection cannot be forwarded", "from", client.RemoteAddr(), "error", err)
		return
	}
	defer guest.Close()
	stop := context.AfterFunc(f.ctx, func() { client.Close(); guest.Close() })
	defer stop()
	var both sync.WaitGroup
	pass := func(to, from net.Conn) {
		_, _ = io.Copy(to, from) // an end of either is no error of ours
		_ = to.(*net.TCPConn).CloseWrite()
	}
	both.Go(func() { pass(guest, client) })
	pass(client, guest)
	both.Wait()
}

// udpIdle is how long the way back is kept for a client of UDP that says nothing, as netfilter does for streams.
const udpIdle = 2 * time.Minute

// maxClients bounds how many clients of UDP a relay has at a time; more are not heard.
const maxClients = 1024

// relayPackets relays datagrams, with a socket towards the guest for each client.
func (f *Forwarder) relayPackets(h *hold, p *net.UDPConn) {
	var answers sync.WaitGroup
	defer func() {
		answers.Wait()
		close(h.ended)
	}()
	var mu sync.Mutex // guards guests
	guests := make(map[netip.AddrPort]net.Conn)
	defer func() {
		mu.Lock()
		defer mu.Unlock()
		for _, g := range guests {
			g.Close()
		}
	}()
	b := make([]byte, 1<<16)
	for {
		n, client, err := p.ReadFromUDPAddrPort(b)
		if errors.Is(err, net.ErrClosed) {
			return
		} else if err != nil {
			continue // of an earlier answer, which nobody took
		}
		mu.Lock()
		guest, known := guests[client]
		full := len(guests) >= maxClients
		mu.Unlock()
		if !known {
			if full {
				continue
			}
			if guest, err = f.dial("udp", h); err != nil {
				f.cfg.Logger.Warn("a datagram cannot be forwarded", "from", client, "error", err)
				continue
			}
			mu.Lock()
			guests[client] = guest
			mu.Unlock()
			answers.Go(func() {
				defer func() {
					mu.Lock()
					defer mu.Unlock()
					delete(guests, client)
					guest.Close()
				}()
				answer := make([]byte, 1<<16)
				for {
					_ = guest.SetReadDeadline(time.Now().Add(udpIdle))
					n, err := guest.Read(answer)
					if errors.Is(err, unix.ECONNREFUSED) {
						continue // nobody listens in the guest yet
					} else if err != nil {
						return
					}
					if _, err := p.WriteToUDPAddrPort(answer[:n], client); errors.Is(err, net.ErrClosed) {
						return
					}
				}
			})
		}
		_, _ = guest.Write(b[:n]) // what is lost is lost
	}
}
