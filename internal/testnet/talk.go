package testnet

import (
	"bufio"
	"cmp"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"
)

// TalkTick is how often a Talk says a number, unless it is told otherwise.
const TalkTick = 5 * time.Millisecond

// Talk is a connection with an echo on which numbers are sent, tick by tick, and expected back: over TCP each, in order, and none before the
// last is back, so that many talks with a slow guest measure gaps, and not how long its queues are; datagrams are counted.
type Talk struct {
	// Name is for messages.
	Name string

	conn  net.Conn
	udp   bool
	greet bool
	tick  time.Duration
	tasks sync.WaitGroup

	mu          sync.Mutex // guards what follows
	sent, heard uint64
	gap         time.Duration
	err         error
	ended       bool
}

// TalkTo is what a Talk is with.
type TalkTo struct {
	Name    string
	Network string // tcp or udp
	Addr    netip.AddrPort
	Greets  bool          // it begins with a line, as an Echo does over TCP
	Tick    time.Duration // how often a number is said; 0 means TalkTick
}

// NewTalk begins a talk from within a namespace. It ends when the test does.
func NewTalk(t testing.TB, namespace string, to TalkTo) *Talk {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 6*Patience)
	defer cancel()
	conn, err := DialContext(ctx, namespace, to.Network, to.Addr.String())
	if err != nil {
		t.Fatalf("%s: %v", to.Name, err)
	}
	return begin(t, conn, to)
}

func begin(t testing.TB, conn net.Conn, to TalkTo) *Talk {
	k := &Talk{Name: to.Name, conn: conn, udp: to.Network == "udp", greet: to.Greets, tick: cmp.Or(to.Tick, TalkTick)}
	k.tasks.Go(k.say)
	k.tasks.Go(k.listen)
	t.Cleanup(k.Stop)
	return k
}

// AwaitTalk waits in a namespace for somebody who calls, and answers. The result says where, at a free port of to.Addr; the function waits for
// the call, and then the talk begins.
func AwaitTalk(t testing.TB, namespace string, to TalkTo) (netip.AddrPort, func() *Talk) {
	t.Helper()
	var addr net.Addr
	called := make(chan net.Conn, 1)
	err := Do(namespace, func() error {
		if to.Network == "udp" {
			p, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(to.Addr))
			if err != nil {
				return err
			}
			t.Cleanup(func() { p.Close() })
			addr = p.LocalAddr()
			go func() {
				if _, from, err := p.ReadFromUDPAddrPort(make([]byte, 100)); err == nil {
					called <- datagrams{p, from}
				}
			}()
			return nil
		}
		l, err := net.Listen("tcp", to.Addr.String())
		if err != nil {
			return err
		}
		t.Cleanup(func() { l.Close() })
		addr = l.Addr()
		go func() {
			if c, err := l.Accept(); err == nil {
				called <- c
			}
		}()
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return netip.MustParseAddrPort(addr.String()), func() *Talk {
		t.Helper()
		select {
		case conn := <-called:
			return begin(t, conn, to)
		case <-time.After(6 * Patience):
			t.Fatalf("%s: nobody calls", to.Name)
			return nil
		}
	}
}

// datagrams are those to and from one caller.
type datagrams struct {
	*net.UDPConn
	with netip.AddrPort
}

func (d datagrams) Write(b []byte) (int, error) { return d.WriteToUDPAddrPort(b, d.with) }

// Stop ends a talk. It may be called twice.
func (k *Talk) Stop() {
	k.mu.Lock()
	k.ended = true
	k.mu.Unlock()
	k.conn.Close()
	k.tasks.Wait()
}

func (k *Talk) fail(err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if !k.ended && k.err == nil {
		k.err = err
	}
}

func (k *Talk) say() {
	tick := time.NewTicker(k.tick)
	defer tick.Stop()
	for range tick.C {
		k.mu.Lock()
		over, wait := k.ended || k.err != nil, !k.udp && k.sent > k.heard
		if !wait {
			k.sent++
		}
		n := k.sent
		k.mu.Unlock()
		if over {
			return
		}
		if wait {
			continue
		}
		if _, err := k.conn.Write(binary.BigEndian.AppendUint64(nil, n)); err != nil {
			k.fail(err)
			return
		}
	}
}

func (k *Talk) listen() {
	hear := func(b []byte) error { _, err := k.conn.Read(b); return err } // an Echo of UDP says no more than who asks
	if !k.udp {
		r := bufio.NewReader(k.conn)
		hear = func(b []byte) error { _, err := io.ReadFull(r, b[:8]); return err }
		if k.greet {
			if _, err := r.ReadString('\n'); err != nil {
				k.fail(err)
				return
			}
		}
	}
	for last, b := time.Now(), make([]byte, 100); ; {
		if err := hear(b); err != nil {
			k.fail(err)
			return
		}
		now := time.Now()
		k.mu.Lock()
		k.heard++
		k.gap = max(k.gap, now.Sub(last))
		if n := binary.BigEndian.Uint64(b); !k.udp && n != k.heard && k.err == nil {
			k.err = fmt.Errorf("number %d came where %d was due", n, k.heard)
		}
		k.mu.Unlock()
		last = now
	}
}

// GoesOn waits until a talk has heard more than before, and fails the test if it does not.
func (k *Talk) GoesOn(t testing.TB, when string) {
	t.Helper()
	k.mu.Lock()
	target := k.heard + uint64(max(2, 15*TalkTick/k.tick))
	k.mu.Unlock()
	for end := time.Now().Add(6 * Patience); ; time.Sleep(TalkTick) {
		k.mu.Lock()
		heard, err := k.heard, k.err
		k.mu.Unlock()
		switch {
		case err != nil:
			t.Errorf("%s: %s: %v", when, k.Name, err)
			return
		case heard >= target:
			return
		case time.Now().After(end):
			t.Errorf("%s: %s is mute", when, k.Name)
			return
		}
	}
}

// Gap is the longest time between two answers since it was asked for before.
func (k *Talk) Gap() time.Duration {
	k.mu.Lock()
	defer k.mu.Unlock()
	gap := k.gap
	k.gap = 0
	return gap
}

// Datagrams are how many were sent, and how many of these were not answered, or not yet; none over TCP, where none is lost.
func (k *Talk) Datagrams() (sent, unanswered uint64) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if !k.udp {
		return 0, 0
	}
	return k.sent, k.sent - k.heard
}
