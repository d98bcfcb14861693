package flow_test

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/drafter-vm/drafter/internal/testnet"
	"github.com/drafter-vm/drafter/pkg/flow"
	"github.com/drafter-vm/drafter/pkg/forward"
	"github.com/drafter-vm/drafter/pkg/nat"
	"github.com/drafter-vm/drafter/pkg/nat/rule"
)

// site is a host with a NAT, a namespace for a guest, and a keeper for its connections.
type site struct {
	t    *testing.T
	h    *testnet.Hosts
	host string
	ns   nat.Namespace
	k    *flow.Keeper
	f    *forward.Forwarder
	deaf []string // hosts that this one does not reach
}

// sites are hosts, a guest that runs at the first of them, and a world around.
type sites struct {
	*testnet.Hosts
	guest *testnet.Guest
	all   map[string]*site
	at    *site
}

func newSites(t *testing.T, hosts ...string) *sites {
	t.Helper()
	s := &sites{Hosts: testnet.NewTestHosts(t, append(hosts, "world")...), all: make(map[string]*site)}
	prefix := "w" + s.Host("")[1:5]
	for _, host := range hosts {
		x := &site{t: t, h: s.Hosts, host: host}
		err := testnet.Do(s.Host(host), func() error {
			n, err := nat.Open(context.Background(), nat.Config{Prefix: prefix + host, Count: 1})
			if err != nil {
				return err
			}
			t.Cleanup(func() {
				if err := n.Close(context.Background()); err != nil {
					t.Error(err)
				}
			})
			x.ns = n.Namespaces()[0]
			x.f, err = forward.Open(context.Background(), forward.Config{}, nil)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { x.f.Close(context.Background()) })
		x.open()
		s.all[host] = x
	}
	s.at = s.all[hosts[0]]
	s.guest = testnet.NewGuestIn(t, prefix, s.at.ns.Name)
	if err := s.at.k.Start(); err != nil {
		t.Fatal(err)
	}
	testnet.Echo(t, s.guest.Namespace(), 8)
	testnet.Echo(t, s.Host("world"), 7)
	return s
}

// open opens the site's keeper.
func (x *site) open() {
	x.t.Helper()
	cfg := flow.Config{Netns: x.ns.Name, Dial: func(ctx context.Context, address string) (net.Conn, error) {
		for _, d := range x.deaf {
			if strings.HasPrefix(address, x.h.Addr4(d).String()+":") {
				return nil, errors.New("no way there")
			}
		}
		return testnet.DialContext(ctx, x.h.Host(x.host), "tcp", address)
	}}
	err := testnet.Do(x.h.Host(x.host), func() (err error) {
		if cfg.Listen, err = net.Listen("tcp4", x.h.Addr4(x.host).String()+":0"); err != nil {
			return err
		}
		cfg.Address = cfg.Listen.Addr().String()
		x.k, err = flow.Open(context.Background(), cfg)
		return err
	})
	if err != nil {
		x.t.Fatal(err)
	}
	k := x.k
	x.t.Cleanup(func() { k.Close() })
}

// forward has the world reach the guest at port 3333 of a host, and of no other.
func (s *sites) forward(host string) {
	s.at.t.Helper()
	for name, x := range s.all {
		var list []forward.Forward
		if name == host {
			for _, p := range []rule.Protocol{rule.TCP, rule.UDP} {
				list = append(list, forward.Forward{Netns: x.ns.Name, InternalPort: 8, Protocol: p, External: ":3333"})
			}
		}
		if err := x.f.Set(context.Background(), list); err != nil {
			s.at.t.Fatal(err)
		}
	}
}

// move moves the guest to another host, with its connections, and returns how long it was paused.
func (s *sites) move(to string) time.Duration {
	t := s.at.t
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("move %s to %s: %v", s.at.host, to, err)
		}
	}
	from, there := s.at, s.all[to]
	answer, err := there.k.Accept(from.k.Offer())
	must(err)
	must(from.k.Connect(context.Background(), answer))
	c, err := s.guest.Open(there.ns.Name)
	must(err)
	must(from.k.Divert())
	began := time.Now()
	s.guest.Pause()
	time.Sleep(10 * time.Millisecond) // the rest of its memory
	_, err = from.k.Hand(context.Background())
	must(err)
	must(there.k.Arrive())
	s.guest.Resume(c)
	paused := time.Since(began)
	must(from.k.Left())
	s.at = there
	return paused
}

// talk is a connection on which numbers are echoed.
type talk struct {
	name string
	conn net.Conn
	udp  bool

	mu     sync.Mutex // guards what follows
	sent   uint64
	heard  uint64
	gap    time.Duration // the longest between two echoes
	err    error
	ended  chan struct{}
	closed bool
}

// tick is how often a number is sent.
const tick = 2 * time.Millisecond

func startTalk(t *testing.T, name, from, network string, to netip.Addr, port int) *talk {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), testnet.Patience)
	defer cancel()
	conn, err := testnet.DialContext(ctx, from, network, netip.AddrPortFrom(to, uint16(port)).String())
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	k := &talk{name: name, conn: conn, udp: network == "udp", ended: make(chan struct{})}
	go k.run()
	t.Cleanup(func() { k.stop(); <-k.ended })
	return k
}

func (k *talk) run() {
	defer close(k.ended)
	var both sync.WaitGroup
	defer both.Wait()
	both.Go(func() {
		t := time.NewTicker(tick)
		defer t.Stop()
		for range t.C {
			k.mu.Lock()
			if k.closed || k.err != nil {
				k.mu.Unlock()
				return
			}
			k.sent++
			n := k.sent
			k.mu.Unlock()
			if _, err := k.conn.Write(binary.BigEndian.AppendUint64(nil, n)); err != nil {
				k.fail(err)
				return
			}
		}
	})
	if k.udp {
		k.listenUDP()
		return
	}
	r := bufio.NewReader(k.conn)
	if _, err := r.ReadString('\n'); err != nil {
		k.fail(err)
		return
	}
	for last, b := time.Now(), make([]byte, 8); ; {
		if _, err := io.ReadFull(r, b); err != nil {
			k.fail(err)
			return
		}
		now := time.Now()
		k.mu.Lock()
		k.heard++
		if n := binary.BigEndian.Uint64(b); n != k.heard && k.err == nil {
			k.err = fmt.Errorf("number %d came where %d was due", n, k.heard)
		}
		k.gap = max(k.gap, now.Sub(last))
		k.mu.Unlock()
		last = now
	}
}

// listenUDP counts answers: an echo of UDP says no more than who asks.
func (k *talk) listenUDP() {
	for last, b := time.Now(), make([]byte, 100); ; {
		if _, err := k.conn.Read(b); err != nil {
			k.fail(err)
			return
		}
		now := time.Now()
		k.mu.Lock()
		k.heard++
		k.gap = max(k.gap, now.Sub(last))
		k.mu.Unlock()
		last = now
	}
}

func (k *talk) fail(err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if !k.closed && k.err == nil {
		k.err = err
	}
}

func (k *talk) stop() {
	k.mu.Lock()
	k.closed = true
	k.mu.Unlock()
	k.conn.Close()
}

// goesOn waits until a talk has heard more than before.
func (k *talk) goesOn(t *testing.T, when string) {
	t.Helper()
	k.mu.Lock()
	target := k.heard + 20
	k.mu.Unlock()
	for end := time.Now().Add(testnet.Patience); ; time.Sleep(tick) {
		k.mu.Lock()
		heard, err := k.heard, k.err
		k.mu.Unlock()
		if err != nil {
			t.Errorf("%s: %s: %v", when, k.name, err)
			return
		}
		if heard >= target {
			return
		}
		if time.Now().After(end) {
			t.Errorf("%s: %s is mute", when, k.name)
			return
		}
	}
}

// talks begins connections of all kinds with the guest, which is at a host that forwards to it.
func (s *sites) talks(t *testing.T, n int) []*talk {
	t.Helper()
	host := s.at.host
	var all []*talk
	for i := range n {
		for _, network := range []string{"tcp", "udp"} {
			for _, v6 := range []bool{false, true} {
				at, world := s.Addr4(host), s.Addr4("world")
				if v6 {
					at, world = s.Addr6(host), s.Addr6("world")
				}
				all = append(all,
					startTalk(t, fmt.Sprintf("%s %d in through %s, %s", network, i, host, at), s.Host("world"), network, at, 3333),
					startTalk(t, fmt.Sprintf("%s %d out through %s, %s", network, i, host, world), s.guest.Namespace(), network, world, 7))
			}
		}
	}
	return all
}

func gaps(talks []*talk) string {
	var all []time.Duration
	lost := 0
	for _, k := range talks {
		k.mu.Lock()
		all = append(all, k.gap)
		if k.udp {
			lost += int(k.sent - k.heard)
		}
		k.gap = 0
		k.mu.Unlock()
	}
	slices.Sort(all)
	return fmt.Sprintf("%d connections, longest gap: median %v, most %v; %d datagrams not answered yet", len(all), all[len(all)/2].Round(time.Millisecond), all[len(all)-1].Round(time.Millisecond), lost)
}

// TestMoves: connections of all kinds go on while the guest moves, is forwarded to from elsewhere, and comes home.
func TestMoves(t *testing.T) {
	s := newSites(t, "a", "b", "c")
	s.forward("a")
	all := s.talks(t, 2)
	for _, k := range all {
		k.goesOn(t, "at the begin")
	}
	gaps(all)
	for i, to := range []string{"b", "a", "b", "c", "b", "c", "a"} {
		paused := s.move(to)
		for _, k := range all {
			k.goesOn(t, fmt.Sprintf("after move %d, to %s", i, to))
		}
		t.Logf("move %d, to %s: paused for %v; %s", i, to, paused.Round(time.Millisecond), gaps(all))
		if i == 2 || i == 3 { // others own connections, too
			s.forward(to)
			all = append(all, s.talks(t, 1)...)
			for _, k := range all {
				k.goesOn(t, "with more")
			}
		}
	}
}
