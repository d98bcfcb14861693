package flow

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/mdlayher/packet"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/drafter-vm/drafter/pkg/nat"
)

// VXLANPort is the UDP port of VXLAN (RFC 7348, 5) where [Config.VXLAN] gives none.
const VXLANPort = 4789

// vxlanDevice is the name of a namespace's interface to all places that it reaches by VXLAN.
const vxlanDevice = "dftx"

// vxlanEnd is where packets by VXLAN come to a place. Each place chooses the network identifier that it listens for, and sends with that of
// the other: so they cannot collide, whatever else a host has.
type vxlanEnd struct {
	Address netip.AddrPort `json:"address"`
	VNI     uint32         `json:"vni"`
}

func (e vxlanEnd) valid() bool {
	a := e.Address.Addr()
	return a.IsValid() && !a.IsUnspecified() && !a.IsMulticast() && a.Zone() == "" && e.Address.Port() != 0 && e.VNI > 0 && e.VNI < 1<<24
}

// vxlanOwn is this place's end.
type vxlanOwn struct {
	vxlanEnd
	Segment4 uint16 `json:"segment4"` // what fits, of TCP over IPv4, into a packet of the host's network, in bytes
	Segment6 uint16 `json:"segment6"`
}

// What comes before a packet in one of VXLAN, in bytes: Ethernet (without its checksum), VXLAN, UDP, and IPv4 or IPv6.
const (
	vxlanOverhead4 = 14 + 8 + 8 + 20
	vxlanOverhead6 = 14 + 8 + 8 + 40
)

// vxlanMAC is a place's address in VXLAN, one of those for private use.
func vxlanMAC(place uint32) net.HardwareAddr {
	b := binary.BigEndian.AppendUint32(nil, place)
	return net.HardwareAddr{0x02, 'd', 'f', b[1], b[2], b[3]}
}

// gateway is by which address packets are routed to a place, known to this interface only: nobody uses it, and clients may have the same.
func gateway(place uint32, like netip.Addr) netip.Addr {
	b := binary.BigEndian.AppendUint32(nil, place)
	if like.Is4() {
		return netip.AddrFrom4([4]byte{100, 64 | b[1], b[2], b[3]}) // of 100.64.0.0/10 (RFC 6598), which has room for maxPlace
	}
	return netip.AddrFrom16([16]byte{0: 0xfe, 1: 0x80, 8: 'd', 9: 'f', 13: b[1], 14: b[2], 15: b[3]})
}

// openVXLAN makes the interface for VXLAN, anew if there is one. Its packets go by the host's network namespace.
func (k *kernel) openVXLAN(address netip.AddrPort) (vxlanOwn, error) {
	fail := func(err error) (vxlanOwn, error) {
		return vxlanOwn{}, fmt.Errorf("carry packets by VXLAN from %s: %w", address, err)
	}
	if err := k.removeVXLAN(); err != nil {
		return fail(err)
	}
	mtu, err := k.mtuOf(address.Addr())
	if err != nil {
		return fail(err)
	}
	if mtu == 0 {
		return fail(errors.New("this host has no such address"))
	}
	tap, err := k.h.LinkByName(k.tap)
	if err != nil {
		return fail(fmt.Errorf("find tap %q: %w", k.tap, err))
	}
	attrs := netlink.NewLinkAttrs()
	// Whole packets of the guest: the host cuts what is too large for its network. Not so over IPv6, where nobody cuts what he passes on.
	attrs.Name, attrs.MTU, attrs.Namespace = vxlanDevice, tap.Attrs().MTU, netlink.NsFd(int(k.ns))
	if address.Addr().Is6() {
		const least = 1280 // of IPv6 (RFC 8200, 5)
		if attrs.MTU = min(attrs.MTU, mtu-vxlanOverhead6); attrs.MTU < least {
			return fail(fmt.Errorf("packets of %d bytes, the most on that interface, have no room for the guest's: %d are needed", mtu, least+vxlanOverhead6))
		}
	}
	own := vxlanOwn{vxlanEnd: vxlanEnd{Address: address}}
	for range 100 { // until it is one that nothing else on this host has
		own.VNI = 1 + rand.Uint32N(1<<24-1)
		err = k.host.LinkAdd(&netlink.Vxlan{LinkAttrs: attrs, VxlanId: int(own.VNI), SrcAddr: address.Addr().AsSlice(), Port: int(address.Port())})
		if !errors.Is(err, unix.EEXIST) {
			break
		}
	}
	if errors.Is(err, unix.EOPNOTSUPP) {
		err = errors.New("the kernel has none (its module is called vxlan)")
	}
	if err != nil {
		return fail(err)
	}
	overhead := vxlanOverhead4
	if address.Addr().Is6() {
		overhead = vxlanOverhead6
	}
	const headers4, headers6 = 20 + 20, 40 + 20
	own.Segment4, own.Segment6 = uint16(max(mtu-overhead-headers4, 536)), uint16(max(mtu-overhead-headers6, 1220))
	link, err := k.h.LinkByName(vxlanDevice)
	if err == nil {
		err = k.h.LinkSetUp(link)
	}
	if errors.Is(err, unix.EADDRINUSE) {
		err = fmt.Errorf("UDP port %d: %w: another program has it, which ss -ulpn names; give another port, at all hosts", address.Port(), err)
	}
	if err != nil {
		return fail(errors.Join(err, k.removeVXLAN()))
	}
	return own, nil
}

// mtuOf is how large packets may be on the interface of an address of this host, in bytes; 0: it is none.
func (k *kernel) mtuOf(a netip.Addr) (int, error) {
	all, err := k.host.AddrList(nil, families(a))
	if err != nil {
		return 0, err
	}
	for _, has := range all {
		if has.IP.Equal(a.AsSlice()) {
			link, err := k.host.LinkByIndex(has.LinkIndex)
			if err != nil {
				return 0, err
			}
			return min(link.Attrs().MTU, 1<<16-1), nil
		}
	}
	return 0, nil
}

func (k *kernel) hasVXLAN() bool {
	_, err := k.h.LinkByName(vxlanDevice)
	return err == nil
}

// removeVXLAN removes the interface, and with it all that goes by it.
func (k *kernel) removeVXLAN() error {
	link, err := k.h.LinkByName(vxlanDevice)
	if missing := (netlink.LinkNotFoundError{}); errors.As(err, &missing) {
		return nil
	}
	if err == nil {
		err = k.h.LinkDel(link)
	}
	if err != nil {
		return fmt.Errorf("remove interface %q: %w", vxlanDevice, err)
	}
	return nil
}

// nameVXLAN gives the interface the address of a place.
func (k *kernel) nameVXLAN(self uint32) error {
	link, err := k.h.LinkByName(vxlanDevice)
	if err == nil && !bytes.Equal(link.Attrs().HardwareAddr, vxlanMAC(self)) { // or its neighbours would be forgotten for nothing
		err = k.h.LinkSetHardwareAddr(link, vxlanMAC(self))
	}
	if err != nil {
		return fmt.Errorf("name interface %q: %w", vxlanDevice, err)
	}
	return nil
}

// vxlanNeighbours are what the interface has to know of a place: it asks nobody, and learns nothing.
func (k *kernel) vxlanNeighbours(place uint32, end vxlanEnd) ([]*netlink.Neigh, error) {
	link, err := k.h.LinkByName(vxlanDevice)
	if err != nil {
		return nil, fmt.Errorf("find interface %q: %w", vxlanDevice, err)
	}
	index, mac := link.Attrs().Index, vxlanMAC(place)
	all := []*netlink.Neigh{{
		LinkIndex: index, Family: unix.AF_BRIDGE, Flags: netlink.NTF_SELF, State: netlink.NUD_PERMANENT | netlink.NUD_NOARP,
		HardwareAddr: mac, IP: end.Address.Addr().AsSlice(), VNI: int(end.VNI),
	}}
	for _, g := range k.guests {
		all = append(all, &netlink.Neigh{LinkIndex: index, Family: families(g), State: netlink.NUD_PERMANENT, HardwareAddr: mac, IP: gateway(place, g).AsSlice()})
	}
	return all, nil
}

// meetByVXLAN says where a place is reached by VXLAN, and partByVXLAN forgets it.
func (k *kernel) meetByVXLAN(place uint32, end vxlanEnd) error {
	all, err := k.vxlanNeighbours(place, end)
	for _, n := range all {
		if err == nil {
			err = k.h.NeighSet(n)
		}
	}
	if err != nil {
		return fmt.Errorf("reach place %d by VXLAN at %s: %w", place, end.Address, err)
	}
	return nil
}

func (k *kernel) partByVXLAN(place uint32, end vxlanEnd) error {
	all, err := k.vxlanNeighbours(place, end)
	for _, n := range all {
		if e := k.h.NeighDel(n); e != nil && !errors.Is(e, unix.ENOENT) {
			err = errors.Join(err, e)
		}
	}
	if err != nil {
		return fmt.Errorf("forget place %d at %s: %w", place, end.Address, err)
	}
	return nil
}

// The kernel carries packets between two places by VXLAN while it has been shown that it does: the place of the guest asks the other for its
// end, and then sends probes of full size, which have to come back the same way. Until they do, and when they cease to, packets go by the
// session. A move does so in any case, as packets have to wait for the guest at the destination's end of it.
const (
	probeEvery  = time.Second
	probeTime   = probeEvery / 2
	probesTried = 3 // without an answer, before packets go by the session
)

// probeType is the Ethernet protocol of probes: one that IEEE 802 leaves for local use.
const probeType = 0x88b5

// A probe is the text below, a byte which is 1 in an answer, the places it is from and for, and a number; the rest of the packet is zero.
const probeText = "drafter flow probe 1"

const probeSize = len(probeText) + 1 + 4 + 4 + 8

func appendProbe(b []byte, answer bool, from, to uint32, number uint64) []byte {
	b = append(b, probeText...)
	if answer {
		b = append(b, 1)
	} else {
		b = append(b, 0)
	}
	b = binary.BigEndian.AppendUint32(b, from)
	b = binary.BigEndian.AppendUint32(b, to)
	return binary.BigEndian.AppendUint64(b, number)
}

func parseProbe(b []byte) (answer bool, from, to uint32, number uint64, ok bool) {
	if len(b) < probeSize || string(b[:len(probeText)]) != probeText {
		return false, 0, 0, 0, false
	}
	b = b[len(probeText):]
	return b[0] == 1, binary.BigEndian.Uint32(b[1:]), binary.BigEndian.Uint32(b[5:]), binary.BigEndian.Uint64(b[9:]), b[0] <= 1
}

// prober sends probes, and answers those of others.
type prober struct {
	conn *packet.Conn
	size int // of a packet, in bytes
	log  *slog.Logger

	mu      sync.Mutex // guards what follows
	waiting map[uint64]chan struct{}
}

func (k *kernel) prober(log *slog.Logger) (*prober, error) {
	link, err := k.h.LinkByName(vxlanDevice)
	if err != nil {
		return nil, fmt.Errorf("find interface %q: %w", vxlanDevice, err)
	}
	p := &prober{size: link.Attrs().MTU, log: log, waiting: make(map[uint64]chan struct{})}
	err = nat.Within(k.ns, func() (err error) {
		p.conn, err = packet.Listen(&net.Interface{Index: link.Attrs().Index, Name: vxlanDevice, MTU: p.size}, packet.Datagram, probeType, nil)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("probe by interface %q: %w", vxlanDevice, err)
	}
	return p, nil
}

func (p *prober) send(answer bool, from, to uint32, number uint64) error {
	b := make([]byte, max(p.size, probeSize))
	appendProbe(b[:0], answer, from, to, number)
	_, err := p.conn.WriteTo(b, &packet.Addr{HardwareAddr: vxlanMAC(to)})
	return err
}

// serve takes what comes, until ctx has ended and the prober is closed. self is the number of this place at the moment.
func (p *prober) serve(ctx context.Context, self func() uint32) {
	b := make([]byte, p.size+1)
	for {
		n, _, err := p.conn.ReadFrom(b)
		if err != nil {
			p.log.Debug("cannot receive probes", "error", err)
			select {
			case <-time.After(probeTime): // an interface that is down for a moment
				continue
			case <-ctx.Done():
				return
			}
		}
		answer, from, to, number, ok := parseProbe(b[:n])
		switch {
		case !ok || n < p.size || to != self(): // one that was cut short on its way proves nothing
		case answer:
			p.mu.Lock()
			if c := p.waiting[number]; c != nil {
				close(c)
				delete(p.waiting, number)
			}
			p.mu.Unlock()
		default:
			if err := p.send(true, to, from, number); err != nil { // to a place that is not known it goes nowhere
				p.log.Debug("cannot answer a probe", "place", from, "error", err)
			}
		}
	}
}

// reaches reports whether packets come to a place by VXLAN, and back.
func (p *prober) reaches(ctx context.Context, self, place uint32) bool {
	number, c := rand.Uint64(), make(chan struct{})
	p.mu.Lock()
	p.waiting[number] = c
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		delete(p.waiting, number)
	}()
	if err := p.send(false, self, place, number); err != nil {
		p.log.Debug("cannot probe", "place", place, "error", err)
		return false
	}
	select {
	case <-c:
		return true
	case <-time.After(probeTime):
	case <-ctx.Done():
	}
	return false
}

// furnishVXLAN makes the interface for VXLAN, or takes up the one that was in use. It is called by Open, in the host's network namespace.
func (k *Keeper) furnishVXLAN() (err error) {
	if k.kernel.host, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return err
	}
	was := k.saved.VXLAN
	if peer := k.cfg.Listen != nil; was != nil && peer && k.cfg.VXLAN != was.Address { // it is not wanted any more, or elsewhere
		if err := errors.Join(k.forgetVXLAN(), k.kernel.removeVXLAN()); err != nil {
			return err
		}
		was = nil
	}
	switch {
	case was != nil && k.kernel.hasVXLAN():
		k.vxlan = was
	case was != nil || k.cfg.VXLAN.IsValid():
		address := k.cfg.VXLAN
		if was != nil {
			address = was.Address
		}
		own, err := k.kernel.openVXLAN(address)
		if err != nil && !k.cfg.VXLAN.IsValid() {
			k.log.Warn("packets go by the connections with other places: VXLAN was in use, and cannot be any more", "error", err)
			return k.forgetVXLAN()
		} else if err != nil {
			return err
		}
		k.vxlan = &own
	case k.saved.State == Vacant: // of a process that was killed
		return k.kernel.removeVXLAN()
	default:
		return nil
	}
	if k.prober, err = k.kernel.prober(k.log); err != nil {
		return err
	}
	if k.saved.State == Vacant {
		return nil
	}
	return errors.Join(k.change(func(s *saved) { s.VXLAN = k.vxlan }), k.kernel.nameVXLAN(k.saved.Self))
}

// forgetVXLAN has packets go by the sessions.
func (k *Keeper) forgetVXLAN() error {
	return k.change(func(s *saved) {
		s.VXLAN = nil
		for p, info := range s.Places {
			info.VXLAN, info.Carried = nil, false
			s.Places[p] = info
		}
	})
}

// answerVXLAN says where this place is reached by VXLAN. An answer with neither that nor an error says that it is not.
func (k *Keeper) answerVXLAN(t *tunnel, m message) message {
	if k.vxlan == nil {
		return message{}
	}
	if m.VXLAN != nil && k.vxlan.fits(*m.VXLAN) {
		if err := k.heed(t, m); err != nil { // as when it is not known here yet that the guest is there
			k.log.Debug("cannot use VXLAN yet", "place", t.place, "error", err)
			return message{Error: err.Error()}
		}
	}
	return message{VXLAN: &k.vxlan.vxlanEnd}
}

// fits reports whether packets can go between two ends.
func (e vxlanEnd) fits(other vxlanEnd) bool {
	return e.Address.Port() == other.Address.Port() && e.Address.Addr().Is4() == other.Address.Addr().Is4()
}

// tried is what is known of VXLAN to a place. It belongs to the goroutine of carry.
type tried struct {
	session *session // in which its end was asked for
	asked   int      // how often
	answer  answered
	missed  int  // probes in a row that were not answered
	told    bool // that it does not work
}

// answered is what came of asking for an end.
type answered int

const (
	later answered = iota
	none
	met
)

// maxVXLANAsked is how often a place is asked in a session that gives errors for answers.
const maxVXLANAsked = 30

// carry sees to it that packets go by VXLAN between the guest's place, while that is this one, and the others.
func (k *Keeper) carry() {
	tick := time.NewTicker(probeEvery)
	defer tick.Stop()
	var known map[uint32]*tried
	for {
		select {
		case <-tick.C:
		case <-k.ctx.Done():
			return
		}
		k.mu.Lock()
		home := k.saved.State == Home || k.saved.State == Leaving
		all := make(map[uint32]*tunnel)
		for p, t := range k.tunnels {
			all[p] = t
		}
		k.mu.Unlock()
		if !home {
			known = nil
			continue
		}
		if known == nil { // not at once: rules that are written anew have forgotten what may still be on its way back to here
			known = make(map[uint32]*tried)
			continue
		}
		var tasks sync.WaitGroup
		for p, t := range all {
			if known[p] == nil {
				known[p] = new(tried)
			}
			so := known[p]
			tasks.Go(func() { k.carryTo(t, so) })
		}
		tasks.Wait()
	}
}

// carryTo asks a place for its end, probes, and changes what carries the packets where that has shown it. Without a session nothing changes:
// the place's process may have died, and the kernel needs none.
func (k *Keeper) carryTo(t *tunnel, so *tried) {
	s := t.present()
	if s == nil {
		return
	}
	if so.session != s {
		*so = tried{session: s, told: so.told}
	}
	if so.answer == later && so.asked < maxVXLANAsked {
		so.asked++
		so.answer = k.askVXLAN(t)
	}
	k.mu.Lock()
	self, carried := k.saved.Self, k.saved.Places[t.place].Carried
	k.mu.Unlock()
	if so.answer == none && carried { // not any more
		if err := k.atHome(t, func() error { return k.carriedTo(t.place, false) }); err != nil {
			t.log.Debug("cannot change what carries packets to another place", "error", err)
		}
	}
	if so.answer != met {
		return
	}
	if k.prober.reaches(k.ctx, self, t.place) {
		so.missed = 0
	} else if so.missed++; so.missed < probesTried {
		return
	}
	works := so.missed == 0
	if !works && !so.told && k.ctx.Err() == nil {
		so.told = true
		t.log.Warn("VXLAN does not reach another place: packets go by the connection with it; does a firewall drop its UDP port?", "address", k.vxlan.Address)
	}
	if works == carried {
		return
	}
	_, err := t.ask(k.ctx, message{Say: sayCarry, Carry: works})
	if err == nil {
		err = k.atHome(t, func() error { return k.carriedTo(t.place, works) })
	}
	if err != nil {
		t.log.Debug("cannot change what carries packets to another place", "error", err)
		return
	}
	if works {
		so.told = false
		t.log.Info("packets go to another place by VXLAN", "address", k.vxlan.Address)
	}
}

// askVXLAN asks a place for its end.
func (k *Keeper) askVXLAN(t *tunnel) answered {
	answer, err := t.ask(k.ctx, message{Say: sayVXLAN, VXLAN: &k.vxlan.vxlanEnd})
	if err != nil {
		t.log.Debug("cannot use VXLAN yet", "error", err)
		return later
	}
	switch end := answer.VXLAN; {
	case end == nil:
		t.log.Info("packets go to another place by the connection with it: it has no VXLAN")
		return none
	case !end.valid():
		t.log.Warn("packets go to another place by the connection with it: what it says of its VXLAN cannot be", "address", end.Address)
		return none
	case !k.vxlan.fits(*end):
		t.log.Warn("packets go to another place by the connection with it: VXLAN needs the same port and family at both", "address", end.Address)
		return none
	}
	// The kernel takes a short cut between two of its interfaces, on which packets keep what conntrack knows of them in one namespace.
	if mtu, err := k.kernel.mtuOf(answer.VXLAN.Address.Addr()); err != nil {
		t.log.Warn("cannot use VXLAN to another place", "error", err)
		return later
	} else if mtu > 0 {
		t.log.Info("packets go to another place by the connection with it: it is on this host", "address", answer.VXLAN.Address)
		return none
	}
	if err := k.atHome(t, func() error { return k.meetByVXLAN(t.place, *answer.VXLAN) }); err != nil {
		t.log.Warn("cannot use VXLAN to another place", "error", err)
		return later
	}
	return met
}

// atHome does something while the guest is here and a tunnel in use.
func (k *Keeper) atHome(t *tunnel, f func() error) error {
	end, err := k.in("use VXLAN", Home, Leaving)
	if err != nil {
		return err
	}
	defer end()
	if k.tunnel(t.place) != t {
		return errDown
	}
	return f()
}

// meetByVXLAN prepares for packets from and to a place by VXLAN.
func (k *Keeper) meetByVXLAN(place uint32, end vxlanEnd) error {
	if err := k.kernel.meetByVXLAN(place, end); err != nil {
		return err
	}
	if err := k.change(func(s *saved) {
		info := s.Places[place]
		info.VXLAN = &end
		s.Places[place] = info
	}); err != nil {
		return err
	}
	return k.rules()
}

// carriedTo has packets go to a place by VXLAN, or by the session.
func (k *Keeper) carriedTo(place uint32, vxlan bool) error {
	var owners []uint32 // those that are reached by it
	if err := k.change(func(s *saved) {
		info := s.Places[place]
		info.Carried = vxlan
		s.Places[place] = info
		for p, i := range s.Places {
			if p == place || i.Relay != 0 && k.hop(p) == place { // mu is held by change
				owners = append(owners, p)
			}
		}
	}); err != nil {
		return err
	}
	for _, o := range owners {
		if err := k.kernel.back(o, k.way(place)); err != nil {
			return err
		}
	}
	if k.State() == Away && k.guestPlace() == place {
		return k.kernel.redirect(k.way(place))
	}
	return nil
}
