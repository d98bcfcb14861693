package flow_test

import (
	"context"
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

	"github.com/vishvananda/netlink"

	"github.com/drafter-vm/drafter/internal/testnet"
	"github.com/drafter-vm/drafter/pkg/flow"
	"github.com/drafter-vm/drafter/pkg/forward"
	"github.com/drafter-vm/drafter/pkg/nat"
	"github.com/drafter-vm/drafter/pkg/nat/rule"
)

// site is a host with a NAT, a namespace for a guest, and a keeper for its connections.
type site struct {
	t      *testing.T
	h      *testnet.Hosts
	host   string
	ns     nat.Namespace
	bare   string // picture of the namespace before anything is kept there
	k      *flow.Keeper
	f      *forward.Forwarder
	way    sync.Mutex // guards what follows, where it changes meanwhile
	deaf   []string   // hosts that this one does not reach
	vxlan  bool       // it has VXLAN, as all of its kind
	vxlan6 bool       // over IPv6
}

// sites are hosts, a guest that runs at the first of them, and a world around.
type sites struct {
	*testnet.Hosts
	guest *testnet.Guest
	all   map[string]*site
	at    *site

	during func(when string) // a move, before the guest is paused; nil: nothing happens then
}

func newSites(t *testing.T, hosts ...string) *sites {
	t.Helper()
	return newSitesWith(t, nil, hosts...)
}

// newSitesWith has some of the hosts, by their names, have VXLAN. A host "a'" is another namespace of the host "a", without forwards.
func newSitesWith(t *testing.T, vxlan []string, hosts ...string) *sites {
	t.Helper()
	one := func(host string) bool { return !strings.HasSuffix(host, "'") }
	s := &sites{Hosts: testnet.NewTestHosts(t, append(slices.DeleteFunc(slices.Clone(hosts), func(h string) bool { return !one(h) }), "world")...), all: make(map[string]*site)}
	prefix := "w" + s.Host("")[1:5]
	nats := make(map[string]*nat.NAT)
	for _, host := range hosts {
		x := &site{t: t, h: s.Hosts, host: strings.TrimSuffix(host, "'"), vxlan: slices.Contains(vxlan, host)}
		err := testnet.Do(s.Host(x.host), func() error {
			if !one(host) {
				x.ns = nats[x.host].Namespaces()[1]
				return nil
			}
			n, err := nat.Open(context.Background(), nat.Config{Prefix: prefix + host, Count: 2})
			if err != nil {
				return err
			}
			t.Cleanup(func() {
				if err := n.Close(context.Background()); err != nil {
					t.Error(err)
				}
			})
			nats[host], x.ns = n, n.Namespaces()[0]
			x.f, err = forward.Open(context.Background(), forward.Config{}, nil)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		if x.f != nil {
			t.Cleanup(func() { x.f.Close(context.Background()) })
		}
		x.bare = testnet.Picture(t, x.ns.Name, "none")
		x.open()
		s.all[host] = x
	}
	s.at = s.all[hosts[0]]
	s.guest = testnet.NewGuestIn(t, prefix, s.at.ns.Name)
	if _, err := s.at.k.Start(); err != nil {
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
		x.way.Lock()
		deaf := x.deaf
		x.way.Unlock()
		for _, d := range deaf {
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
		if x.vxlan {
			cfg.VXLAN = netip.AddrPortFrom(x.h.Addr4(x.host), flow.VXLANPort)
			if x.vxlan6 {
				cfg.VXLAN = netip.AddrPortFrom(x.h.Addr6(x.host), flow.VXLANPort)
			}
		}
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
		if x.f == nil {
			continue
		}
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
	during := s.during
	if during == nil {
		during = func(string) {}
	}
	answer, err := there.k.Accept(from.k.Offer())
	must(err)
	during(to + " expects the guest")
	must(from.k.Connect(context.Background(), answer))
	during(from.host + " is about to send it to " + to)
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

// talks begins connections of all kinds with the guest, which is at a host that forwards to it.
func (s *sites) talks(t *testing.T, n int) []*testnet.Talk {
	t.Helper()
	host := s.at.host
	var all []*testnet.Talk
	talk := func(name, from, network string, to netip.Addr, port uint16) {
		t.Helper()
		all = append(all, testnet.NewTalk(t, from, testnet.TalkTo{Name: name, Network: network, Addr: netip.AddrPortFrom(to, port), Greets: true}))
	}
	for i := range n {
		for _, network := range []string{"tcp", "udp"} {
			for _, v6 := range []bool{false, true} {
				at, world := s.Addr4(host), s.Addr4("world")
				if v6 {
					at, world = s.Addr6(host), s.Addr6("world")
				}
				talk(fmt.Sprintf("%s %d in through %s, %s", network, i, host, at), s.Host("world"), network, at, 3333)
				talk(fmt.Sprintf("%s %d out through %s, %s", network, i, host, world), s.guest.Namespace(), network, world, 7)
			}
		}
	}
	return all
}

// owners begins connections through a, where the guest is, and moves it to b, and begins others there.
func (s *sites) owners(t *testing.T) (old, recent []*testnet.Talk) {
	t.Helper()
	s.forward("a")
	old = s.talks(t, 1)
	s.move("b")
	s.forward("b")
	return old, s.talks(t, 1)
}

// goOn waits until all have heard more.
func goOn(t *testing.T, when string, talks []*testnet.Talk) {
	t.Helper()
	var all sync.WaitGroup
	for _, k := range talks {
		all.Go(func() { k.GoesOn(t, when) })
	}
	all.Wait()
}

func gaps(talks []*testnet.Talk) string {
	var all []time.Duration
	lost := uint64(0)
	for _, k := range talks {
		all = append(all, k.Gap())
		_, unanswered := k.Datagrams()
		lost += unanswered
	}
	slices.Sort(all)
	return fmt.Sprintf("%d connections, longest gap: median %v, most %v; %d datagrams are unanswered", len(all), all[len(all)/2].Round(time.Millisecond), all[len(all)-1].Round(time.Millisecond), lost)
}

// TestMoves: connections of all kinds go on while the guest moves, is forwarded to from elsewhere, and comes home. When they have ended,
// nothing is left of them.
func TestMoves(t *testing.T) {
	s := newSites(t, "a", "b", "c")
	before := s.pictures(t)
	s.forward("a")
	all := s.talks(t, 2)
	goOn(t, "at the begin", all)
	gaps(all)
	for i, to := range []string{"b", "a", "b", "c", "b", "c", "a"} {
		paused := s.move(to)
		goOn(t, fmt.Sprintf("after move %d, to %s", i, to), all)
		t.Logf("move %d, to %s: paused for %v; %s", i, to, paused.Round(time.Millisecond), gaps(all))
		if i == 2 || i == 3 { // others own connections, too
			s.forward(to)
			all = append(all, s.talks(t, 1)...)
			goOn(t, "with more", all)
		}
	}
	for _, k := range all {
		if sent, unanswered := k.Datagrams(); unanswered > sent/10 {
			t.Errorf("%s: %d of %d datagrams are unanswered", k.Name, unanswered, sent)
		}
		k.Stop()
	}
	s.forward("")
	s.forgetUDP()
	for _, host := range []string{"b", "c"} {
		s.done(t, host)
	}
	s.waitFor(t, "the place of the guest has to do with others", func() bool { p, err := s.at.k.Places(); return err == nil && len(p) == 0 })
	if err := s.at.k.End(); err != nil {
		t.Error(err)
	}
	for host, picture := range s.pictures(t) {
		testnet.Diff(t, host, before[host], picture)
	}
}

// pictures are of all namespaces.
func (s *sites) pictures(t *testing.T) map[string]string {
	t.Helper()
	all := make(map[string]string)
	for host, x := range s.all {
		all[host] = testnet.Picture(t, x.ns.Name, "none")
	}
	return all
}

// forgetUDP ends connections of UDP, which end by themselves only after two minutes.
func (s *sites) forgetUDP() {
	for _, x := range s.all {
		_ = testnet.Do(x.ns.Name, func() error {
			udp := onlyUDP{}
			for _, f := range []netlink.InetFamily{netlink.FAMILY_V4, netlink.FAMILY_V6} {
				if _, err := netlink.ConntrackDeleteFilters(netlink.ConntrackTable, f, udp); err != nil {
					s.at.t.Error(err)
				}
			}
			return nil
		})
	}
}

// forgetUDPOf is forgetUDP of one host, for the connections of an owner as that host knows it.
func (s *sites) forgetUDPOf(host string, owner uint32) {
	s.at.t.Helper()
	if err := testnet.Do(s.all[host].ns.Name, func() error {
		for _, f := range []netlink.InetFamily{netlink.FAMILY_V4, netlink.FAMILY_V6} {
			if _, err := netlink.ConntrackDeleteFilters(netlink.ConntrackTable, f, udpOf(owner)); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		s.at.t.Error(err)
	}
}

type onlyUDP struct{}

func (onlyUDP) MatchConntrackFlow(f *netlink.ConntrackFlow) bool { return f.Forward.Protocol == 17 }

type udpOf uint32

func (o udpOf) MatchConntrackFlow(f *netlink.ConntrackFlow) bool {
	return f.Forward.Protocol == 17 && f.Mark == uint32(o)
}

func (s *sites) waitFor(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !is(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s after 20 s", what)
		}
	}
}

// done waits until a place has nothing to keep any more.
func (s *sites) done(t *testing.T, host string) {
	t.Helper()
	k := s.all[host].k
	select {
	case <-k.Done():
	case <-time.After(20 * time.Second):
		own, relayed, err := k.Alive()
		t.Fatalf("%s keeps %d connections, and relays %d, after 20 s (%v)", host, own, relayed, err)
	}
	if got := k.State(); got != flow.Vacant {
		t.Errorf("%s is %s", host, got)
	}
}

// TestExpected: while a guest is on its way, which takes as long as its memory, nothing stands still: neither its connections through the place
// that expects it back, nor those which that relays.
func TestExpected(t *testing.T) {
	s := newSites(t, "a", "b", "c")
	s.all["a"].deaf, s.all["c"].deaf = []string{"c"}, []string{"a"}
	s.forward("a")
	all := s.talks(t, 1)
	s.during = func(when string) {
		goOn(t, "while "+when, all)
		t.Logf("while %s: %s", when, gaps(all))
	}
	for _, to := range []string{"b", "c", "b", "a"} {
		s.move(to)
		goOn(t, "at "+to, all)
		if to == "b" {
			s.forward("b")
			all = append(all, s.talks(t, 1)...)
		}
	}
}

// TestUndo: a guest that goes on where it was keeps its connections, and nothing is left at the other place.
func TestUndo(t *testing.T) {
	for _, diverted := range []bool{false, true} {
		t.Run(fmt.Sprintf("diverted=%t", diverted), func(t *testing.T) {
			s := newSites(t, "a", "b")
			s.forward("a")
			before := s.pictures(t)
			all := s.talks(t, 1)
			a, b := s.all["a"].k, s.all["b"].k
			answer, err := b.Accept(a.Offer())
			if err != nil {
				t.Fatal(err)
			}
			if err := a.Connect(t.Context(), answer); err != nil {
				t.Fatal(err)
			}
			if diverted {
				if err := a.Divert(); err != nil {
					t.Fatal(err)
				}
				if _, err := a.Hand(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			if err := a.Undo(); err != nil {
				t.Fatal(err)
			}
			if err := b.Discard(); err != nil {
				t.Fatal(err)
			}
			for _, k := range all {
				k.GoesOn(t, "after it")
				k.Stop()
			}
			if a.State() != flow.Home || b.State() != flow.Vacant {
				t.Errorf("they are %s and %s", a.State(), b.State())
			}
			if places, err := a.Places(); err != nil || len(places) != 0 {
				t.Errorf("it has to do with %v, %v", places, err)
			}
			testnet.Diff(t, "b", before["b"], s.pictures(t)["b"])
			if paused := s.move("b"); paused > time.Minute {
				t.Error("it does not move after all")
			}
		})
	}
}

// TestRelay: an owner that does not reach the guest's place is relayed for, and that is told.
func TestRelay(t *testing.T) {
	s := newSites(t, "a", "b", "c")
	s.all["a"].deaf = []string{"c"}
	old, recent := s.owners(t)
	all := append(old, recent...)
	s.move("c")
	goOn(t, "relayed", all)
	places, err := s.at.k.Places()
	if err != nil || len(places) != 2 || places[0].Relay != 2 || places[1].Relay != 0 {
		t.Errorf("it is said to be reached by %+v, %v", places, err)
	}
	for _, k := range all {
		k.Stop()
	}
	s.forgetUDP()
	s.done(t, "a")
	s.done(t, "b")
}

// TestLateRelay: what comes from the guest through a tunnel, and belongs to no connection that is known, is a late part of what was relayed: it must not become
// a connection of this place.
func TestLateRelay(t *testing.T) {
	s := newSites(t, "a", "b")
	s.forward("a")
	talks := s.talks(t, 1)
	s.move("b")
	goOn(t, "after the move", talks)
	owner := s.all["a"]
	before, _, err := owner.k.Alive()
	if err != nil {
		t.Fatal(err)
	}
	ns, to := s.all["b"].ns.Name, s.Addr4("world").String()+"/32"
	testnet.Run(t, ns, "ip", "route", "add", to, "dev", "dft1")
	if seen := testnet.SeenWithin(s.guest.Namespace(), "udp", s.Addr4("world"), 7, testnet.Unseen); seen != "" {
		t.Errorf("what came late went out of the owner as a connection of its own: the world has seen %s", seen)
	}
	if now, _, err := owner.k.Alive(); err != nil || now != before {
		t.Errorf("the owner has %d connections, and had %d (%v)", now, before, err)
	}
	testnet.Run(t, ns, "ip", "route", "delete", to)
	goOn(t, "after what came late", talks)
}

// TestOwnerDies: a dead owner costs its own connections only; one that is started again goes on.
func TestOwnerDies(t *testing.T) {
	s := newSites(t, "a", "b")
	old, recent := s.owners(t)
	goOn(t, "before", old)
	a := s.all["a"]
	if err := a.k.Close(); err != nil {
		t.Fatal(err)
	}
	goOn(t, "with a dead owner of others", recent)
	a.open()
	if a.k.State() != flow.Away {
		t.Fatalf("after a restart it is %s", a.k.State())
	}
	goOn(t, "after a restart", append(old, recent...))
	// The next process has it from a living one, also to receive the guest.
	first := a.k
	go func() { <-first.Taken(); first.Close() }()
	a.open()
	s.move("a")
	goOn(t, "at home again", append(old, recent...))
}

// TestOccupied: a namespace keeps connections of one VM.
func TestOccupied(t *testing.T) {
	s := newSites(t, "a", "b", "c")
	s.forward("a")
	talks := s.talks(t, 1)
	s.move("b")
	a := s.all["a"].k
	if _, err := a.Start(); !errors.Is(err, flow.ErrOccupied) {
		t.Errorf("another guest starts: got error %v, want ErrOccupied", err)
	}
	other := s.all["c"].k
	if _, err := other.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Accept(other.Offer()); !errors.Is(err, flow.ErrOccupied) {
		t.Errorf("another guest comes: got error %v, want ErrOccupied", err)
	}
	goOn(t, "after what was refused", talks)
	// The guest ends: nobody keeps anything for it.
	if err := s.at.k.End(); err != nil {
		t.Fatal(err)
	}
	s.done(t, "a")
	if _, err := a.Start(); err != nil {
		t.Error(err)
	}
}

// begin begins a move as far as the pause of the guest.
func (s *sites) begin(t *testing.T, from, to string) {
	t.Helper()
	a, b := s.all[from].k, s.all[to].k
	answer, err := b.Accept(a.Offer())
	if err != nil {
		t.Fatal(err)
	}
	if err := a.Connect(t.Context(), answer); err != nil {
		t.Fatal(err)
	}
	if err := a.Divert(); err != nil {
		t.Fatal(err)
	}
}

// TestDiscardWhileAsked: a destination that gives up while it is told of connections ends, and so does who tells it.
func TestDiscardWhileAsked(t *testing.T) {
	s := newSites(t, "a", "b")
	s.forward("a")
	talks := s.talks(t, 1)
	s.begin(t, "a", "b")
	a, b := s.all["a"].k, s.all["b"].k
	discarded, handed := make(chan error, 1), make(chan error, 1)
	b.Busy(func() { // so that it gives up first, and is asked before it has
		go func() { discarded <- b.Discard() }()
		time.Sleep(50 * time.Millisecond)
		go func() { _, err := a.Hand(context.Background()); handed <- err }()
		time.Sleep(50 * time.Millisecond)
	})
	for what, end := range map[string]chan error{"discard": discarded, "hand over": handed} {
		select {
		case err := <-end:
			if (err != nil) != (what == "hand over") {
				t.Errorf("%s: got error %v", what, err)
			}
		case <-time.After(testnet.Patience):
			t.Fatalf("%s does not end", what)
		}
	}
	if err := a.Undo(); err != nil {
		t.Fatal(err)
	}
	goOn(t, "after it", talks)
}

// TestOwnerDiesExpecting: a place that dies while the guest is on its way back to it keeps its connections as before.
func TestOwnerDiesExpecting(t *testing.T) {
	s := newSites(t, "a", "b")
	s.forward("a")
	talks := s.talks(t, 1)
	s.move("b")
	a, b := s.all["a"].k, s.all["b"].k
	answer, err := a.Accept(b.Offer())
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Connect(t.Context(), answer); err != nil {
		t.Fatal(err)
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	if err := b.Undo(); err != nil {
		t.Fatal(err)
	}
	s.all["a"].open()
	if a = s.all["a"].k; a.State() != flow.Away {
		t.Errorf("it is %s, want away", a.State())
	}
	goOn(t, "after it", talks)
	s.move("a")
	goOn(t, "at home", talks)
}

// TestTaken: who asked before anybody could hear it is heard, and not forgotten nor remembered for ever.
func TestTaken(t *testing.T) {
	s := newSites(t, "a", "b")
	s.forward("a")
	s.talks(t, 1)
	s.move("b")
	a := s.all["a"]
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if k, err := flow.Open(ctx, flow.Config{Netns: a.ns.Name}); err == nil {
		k.Close()
		t.Fatal("two keep the same")
	}
	select {
	case <-a.k.Taken():
		t.Error("nobody wants it any more, and it is given up")
	case <-time.After(100 * time.Millisecond):
	}
	old, gone := a.k, make(chan error, 1)
	go func() { <-old.Taken(); gone <- old.Close() }()
	a.open()
	if err := <-gone; err != nil {
		t.Error(err)
	}
	if a.k.State() != flow.Away {
		t.Errorf("it is %s, want away", a.k.State())
	}
}

// TestStates: what is asked for in the wrong order is refused, and changes nothing.
func TestStates(t *testing.T) {
	s := newSites(t, "a", "b")
	a, b := s.all["a"].k, s.all["b"].k
	for what, err := range map[string]error{
		"divert": a.Divert(), "left": a.Left(), "arrive": a.Arrive(), "discard": a.Discard(), "connect": b.Connect(t.Context(), []byte(`{"place":1}`)), "undo": b.Undo(),
	} {
		if !errors.Is(err, flow.ErrState) {
			t.Errorf("%s: got error %v, want ErrState", what, err)
		}
	}
	if _, err := a.Accept(a.Offer()); !errors.Is(err, flow.ErrState) {
		t.Errorf("accept at home: got error %v, want ErrState", err)
	}
	for _, o := range []string{"", "{}", `{"vm":"x"}`, `{"vm":"x","key":"01234567890123456789012345","next":2,"from":{"place":7}}`, `[]`,
		`{"vm":"x","key":"01234567890123456789012345","next":9,"from":{"place":1},"owners":[{"place":1}]}`} {
		if _, err := b.Accept([]byte(o)); err == nil {
			t.Errorf("offer %s is accepted", o)
		}
	}
	if err := a.Connect(t.Context(), []byte(`{"place":1,"address":"x"}`)); err == nil {
		t.Error("a destination that calls itself the source is connected with")
	}
	if a.State() != flow.Home || b.State() != flow.Vacant {
		t.Errorf("they are %s and %s", a.State(), b.State())
	}
}

// TestStrangers: who has not the VM's key is not let in, and learns nothing.
func TestStrangers(t *testing.T) {
	s := newSites(t, "a", "b")
	s.forward("a")
	talks := s.talks(t, 1)
	s.move("b")
	places, err := s.all["a"].k.Places()
	if err != nil || len(places) != 1 {
		t.Fatalf("%v, %v", places, err)
	}
	for _, say := range []string{
		"", "GET / HTTP/1.1\r\n\r\n", "\x02\x00\x00\x02{}", "\x02\xff\xff\xff", "\x01\x00\x00\x00",
		"\x02\x00\x00\x4d" + `{"hello":"drafter flow 1","vm":"guess","from":1,"to":2,"nonce":"0123456789"}   `,
	} {
		conn, err := testnet.DialContext(t.Context(), s.Host("world"), "tcp", places[0].Address)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = conn.Write([]byte(say))
		_ = conn.(*net.TCPConn).CloseWrite()
		_ = conn.SetDeadline(time.Now().Add(testnet.Patience))
		heard, _ := io.ReadAll(conn)
		if strings.Contains(string(heard), "proof") {
			t.Errorf("to %q it answers %q", say, heard)
		}
		conn.Close()
	}
	goOn(t, "after strangers", talks)
	// Many who say nothing keep no other place out: the owner, which was started again, comes in among them.
	for range 3 * 64 {
		conn, err := testnet.DialContext(t.Context(), s.Host("world"), "tcp", places[0].Address)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
	}
	owner := s.all["a"]
	if err := owner.k.Close(); err != nil {
		t.Fatal(err)
	}
	owner.open()
	began := time.Now()
	goOn(t, "among strangers", talks)
	t.Logf("back among strangers after %s", time.Since(began).Round(time.Millisecond))
}
