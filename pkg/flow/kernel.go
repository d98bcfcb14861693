package flow

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/drafter-vm/drafter/pkg/nat"
	"github.com/drafter-vm/drafter/pkg/nat/rule"
)

// ruleTable is the table of rules in a namespace.
const ruleTable = "drafter-flow"

// The routing table and the rule of a place are known by these numbers plus its own. The kernel's own tables are below 256.
const (
	routeTable   = 10000
	rulePriority = 100
)

// device is the name of the interface to a place.
func device(place uint32) string { return fmt.Sprintf("dft%d", place) }

// way is how packets go to a place: through the interface of its tunnel, or by VXLAN.
type way struct {
	place uint32
	vxlan bool
}

// route is one for packets of the family of an address, without their destination.
func (k *kernel) route(w way, like netip.Addr) (netlink.Route, error) {
	name := device(w.place)
	if w.vxlan {
		name = vxlanDevice
	}
	link, err := k.h.LinkByName(name)
	if err != nil {
		return netlink.Route{}, fmt.Errorf("find interface %q: %w", name, err)
	}
	r := netlink.Route{LinkIndex: link.Attrs().Index, Family: families(like)}
	if w.vxlan {
		r.Gw, r.Flags = gateway(w.place, like).AsSlice(), int(netlink.FLAG_ONLINK)
	}
	return r, nil
}

// kernel is a namespace's interfaces, routes, rules and connections. Its methods may be called concurrently; what concerns one place
// must not be.
type kernel struct {
	ns     netns.NsHandle
	h      *netlink.Handle
	host   *netlink.Handle // of the host's network namespace, for VXLAN; nil until then
	tap    string
	veth   string
	guests []netip.Addr // of the families that there are
}

func openKernel(c Config) (_ *kernel, err error) {
	k := &kernel{tap: c.Interface, veth: nat.VethInside}
	if k.ns, err = nat.OpenNamespace(c.Netns); err != nil {
		return nil, err
	}
	if k.h, err = netlink.NewHandleAt(k.ns, unix.NETLINK_ROUTE, unix.NETLINK_NETFILTER); err != nil {
		k.ns.Close()
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	tap, err := k.h.LinkByName(c.Interface)
	if err != nil {
		k.close()
		return nil, fmt.Errorf("find tap %q: %w", c.Interface, err)
	}
	for _, g := range []netip.Addr{c.Guest, c.Guest6} {
		// Without a gateway of its family, of which a NAT without IPv6 has none, the guest reaches nobody.
		gateways, err := k.h.AddrList(tap, families(g))
		if g.IsValid() && (g.Is4() || err == nil && len(gateways) > 0) {
			k.guests = append(k.guests, g)
		}
	}
	return k, nil
}

func (k *kernel) close() {
	k.h.Close()
	if k.host != nil {
		k.host.Close()
	}
	k.ns.Close()
}

func families(a netip.Addr) int {
	if a.Is4() {
		return netlink.FAMILY_V4
	}
	return netlink.FAMILY_V6
}

func host(a netip.Addr) *net.IPNet {
	return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
}

// used reports whether a machine has the tap open.
func (k *kernel) used() bool {
	tap, err := k.h.LinkByName(k.tap)
	return err == nil && tap.Attrs().RawFlags&unix.IFF_LOWER_UP != 0
}

// guestMAC is the guest's MAC address, as this place has met it; empty if it has not.
func (k *kernel) guestMAC() net.HardwareAddr {
	tap, err := k.h.LinkByName(k.tap)
	if err != nil {
		return nil
	}
	for _, g := range k.guests {
		all, err := k.h.NeighList(tap.Attrs().Index, families(g))
		if err != nil {
			continue
		}
		for _, n := range all {
			if len(n.HardwareAddr) == 6 && n.IP.Equal(g.AsSlice()) {
				return n.HardwareAddr
			}
		}
	}
	return nil
}

// neighbours puts down the guest's MAC address, so that nobody has to ask for it while the guest is paused and does not answer. Like any
// that was learned, it is asked for again after a while.
func (k *kernel) neighbours(mac net.HardwareAddr) error {
	tap, err := k.h.LinkByName(k.tap)
	if err != nil {
		return fmt.Errorf("find tap %q: %w", k.tap, err)
	}
	for _, g := range k.guests {
		n := &netlink.Neigh{LinkIndex: tap.Attrs().Index, Family: families(g), State: netlink.NUD_REACHABLE, IP: g.AsSlice(), HardwareAddr: mac}
		if err := k.h.NeighSet(n); err != nil {
			return fmt.Errorf("put down the guest's MAC address %s: %w", mac, err)
		}
	}
	return nil
}

// tun opens the interface to a place, and makes it if it is not there. It stays when the file is closed.
func (k *kernel) tun(place uint32) (f *os.File, err error) {
	name := device(place)
	err = nat.Within(k.ns, func() error {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != nil {
			return err
		}
		request, err := unix.NewIfreq(name)
		if err == nil {
			request.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
			err = unix.IoctlIfreq(fd, unix.TUNSETIFF, request)
		}
		if err == nil {
			// Packets of up to 64 KiB pass whole, and are cut where they leave.
			err = unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, unix.TUN_F_CSUM|unix.TUN_F_TSO4|unix.TUN_F_TSO6)
		}
		if err == nil {
			err = unix.IoctlSetInt(fd, unix.TUNSETPERSIST, 1)
		}
		if err != nil {
			unix.Close(fd)
			return err
		}
		f = os.NewFile(uintptr(fd), name)
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("make interface %q: %w", name, err)
	}
	link, err := k.h.LinkByName(name)
	if err == nil {
		err = k.h.LinkSetTxQLen(link, queueLength)
	}
	if err == nil {
		err = k.h.LinkSetUp(link)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("set interface %q up: %w", name, err)
	}
	return f, nil
}

// queueLength is how many packets wait in an interface for the tunnel.
const queueLength = 2000

// removeTun removes the interface to a place, and with it the routes that use it.
func (k *kernel) removeTun(place uint32) error {
	link, err := k.h.LinkByName(device(place))
	if missing := (netlink.LinkNotFoundError{}); errors.As(err, &missing) {
		return nil
	}
	if err == nil {
		err = k.h.LinkDel(link)
	}
	if err != nil {
		return fmt.Errorf("remove interface %q: %w", device(place), err)
	}
	return nil
}

// back routes what the guest answers in connections of an owner to a place: the owner, or one that relays.
func (k *kernel) back(owner uint32, via way) error {
	for _, g := range k.guests {
		r, err := k.route(via, g)
		if err != nil {
			return err
		}
		r.Dst, r.Table = &net.IPNet{IP: make(net.IP, g.BitLen()/8), Mask: net.CIDRMask(0, g.BitLen())}, routeTable+int(owner)
		if err := k.h.RouteReplace(&r); err != nil {
			return fmt.Errorf("route back to place %d: %w", owner, err)
		}
		if err := k.h.RuleAdd(ruleOf(owner, g)); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("add rule of place %d: %w", owner, err)
		}
	}
	return nil
}

func ruleOf(owner uint32, guest netip.Addr) *netlink.Rule {
	r := netlink.NewRule()
	r.Family, r.Mark, r.Table, r.Priority = families(guest), owner, routeTable+int(owner), rulePriority
	return r
}

// noBack undoes back.
func (k *kernel) noBack(owner uint32) error {
	var errs []error
	for _, g := range k.guests {
		if err := k.h.RuleDel(ruleOf(owner, g)); err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EAFNOSUPPORT) {
			errs = append(errs, fmt.Errorf("remove rule of place %d: %w", owner, err))
		}
		routes, err := k.h.RouteListFiltered(families(g), &netlink.Route{Table: routeTable + int(owner)}, netlink.RT_FILTER_TABLE)
		if err != nil {
			errs = append(errs, err)
		}
		for _, r := range routes {
			if err := k.h.RouteDel(&r); err != nil && !errors.Is(err, unix.ESRCH) {
				errs = append(errs, fmt.Errorf("remove route of place %d: %w", owner, err))
			}
		}
	}
	return errors.Join(errs...)
}

// redirect sends what is for the guest to a place.
func (k *kernel) redirect(to way) error {
	for _, g := range k.guests {
		r, err := k.route(to, g)
		if err != nil {
			return err
		}
		r.Dst = host(g)
		if err := k.h.RouteReplace(&r); err != nil {
			return fmt.Errorf("redirect %s to place %d: %w", g, to.place, err)
		}
	}
	return nil
}

// restore sends what is for the guest to the guest.
func (k *kernel) restore() error {
	var errs []error
	for _, g := range k.guests {
		routes, err := k.h.RouteListFiltered(families(g), &netlink.Route{Dst: host(g)}, netlink.RT_FILTER_DST)
		if err != nil {
			errs = append(errs, err)
		}
		for _, r := range routes {
			if r.Table == unix.RT_TABLE_LOCAL {
				continue
			}
			if err := k.h.RouteDel(&r); err != nil && !errors.Is(err, unix.ESRCH) {
				errs = append(errs, fmt.Errorf("restore route to %s: %w", g, err))
			}
		}
	}
	return errors.Join(errs...)
}

// from matches what comes in from a place, by each way that there is.
func from(w way) []rule.Part {
	in := []rule.Part{rule.In(device(w.place))}
	if w.vxlan {
		in = append(in, append(rule.In(vxlanDevice), rule.FromMAC(vxlanMAC(w.place))...))
	}
	return in
}

// ownFlows is the set of this place's connections of which packets may come back through a tunnel, as the guest returns here: they have been
// translated on their way out, and are known to conntrack under the addresses that they had before, so it must not take them for others.
func ownFlows(guest netip.Addr) rule.FlowSet {
	if guest.Is4() {
		return rule.FlowSet{Name: "own4"}
	}
	return rule.FlowSet{Name: "own6", IPv6: true}
}

// rules writes what marks connections and packets. Places are those that there are tunnels to, and by VXLAN, too, or not. Where the guest is
// expected back, what is sent to it from here meanwhile is remembered. With an end of VXLAN, connections use packets that have room in those of
// the host's network, from their first on.
func (k *kernel) rules(places []way, back bool, vxlan *vxlanOwn) error {
	raw := rule.Chain{Name: "raw", Hook: rule.PreRouting, Priority: rule.Raw}
	pre := rule.Chain{Name: "prerouting", Hook: rule.PreRouting, Priority: rule.Mangle}
	forward := rule.Chain{Name: "forward", Hook: rule.Forward, Priority: rule.Filter}
	// What the guest says in a connection of another place goes there.
	pre.Rules = append(pre.Rules, rule.Of(rule.In(k.tap), rule.Marked(), rule.CopyMark()))
	var sets []rule.FlowSet
	for _, g := range k.guests {
		set := ownFlows(g)
		sets = append(sets, set)
		if back {
			forward.Rules = append(forward.Rules, rule.Of(rule.In(k.veth), rule.To(rule.Host(g)), rule.Unmarked(), rule.Remember(set)))
		}
	}
	for _, p := range places {
		for _, in := range from(p) {
			for _, g := range k.guests {
				guest := rule.Host(g)
				raw.Rules = append(raw.Rules, rule.Of(in, rule.To(guest), rule.InFlows(ownFlows(g)), rule.Untracked()))
				pre.Rules = append(pre.Rules,
					// Who begins a connection through another place belongs to that. One that was pinned counts as new, too, until it was answered.
					rule.Of(in, rule.To(guest), rule.State(rule.New), rule.Unmarked(), rule.Mark(p.place)),
					// What is relayed on its way back.
					rule.Of(in, rule.From(guest), rule.Marked(), rule.CopyMark()),
					// What was on its way back to be relayed when this place had ceased to relay: it would pass for a connection that begins
					// here, be translated, and count as one.
					rule.Of(in, rule.From(guest), rule.Unmarked(), rule.Unknown(), rule.Drop()),
				)
				forward.Rules = append(forward.Rules, rule.Of(in, rule.To(guest), rule.Accept()), rule.Of(in, rule.From(guest), rule.Accept()))
			}
		}
		forward.Rules = append(forward.Rules, rule.Of(rule.In(device(p.place)), rule.Drop())) // nothing else is a tunnel's to bring
	}
	chains := []rule.Chain{raw, pre, forward}
	if vxlan != nil {
		forward.Rules = append(forward.Rules, rule.Of(rule.In(vxlanDevice), rule.Drop()))
		chains = []rule.Chain{raw, pre, forward, {Name: "segments", Hook: rule.Forward, Priority: rule.Mangle, Rules: []rule.Rule{
			rule.Of(rule.IPv4(), rule.ClampSegments(vxlan.Segment4)), rule.Of(rule.IPv6(), rule.ClampSegments(vxlan.Segment6)),
		}}}
	}
	return rule.Table{Name: ruleTable, FlowSets: sets, Chains: chains}.Replace(k.ns)
}

func (k *kernel) noRules() error { return rule.Remove(k.ns, ruleTable) }

// anyFamily has conntrack list entries of both: it walks its whole table each time, which is what takes time.
const anyFamily = netlink.InetFamily(netlink.FAMILY_ALL)

// flows are the guest's connections: those of this place have the owner 0.
func (k *kernel) flows() ([]flow, error) {
	entries, err := k.h.ConntrackTableList(netlink.ConntrackTable, anyFamily)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return nil, fmt.Errorf("list connections: %w", err)
	}
	var all []flow
	for _, e := range entries {
		if f, ok := k.guestSide(e); ok {
			all = append(all, f)
		}
	}
	return all, nil
}

// guestSide is an entry as the guest sees its connection, if it has one.
func (k *kernel) guestSide(e *netlink.ConntrackFlow) (flow, bool) {
	f := flow{Protocol: e.Forward.Protocol, Owner: e.Mark, Timeout: e.TimeOut}
	if f.Protocol != unix.IPPROTO_TCP && f.Protocol != unix.IPPROTO_UDP {
		return flow{}, false
	}
	if tcp, ok := e.ProtoInfo.(*netlink.ProtoInfoTCP); ok {
		f.State = tcp.State
	}
	end := func(ip net.IP, port uint16) netip.AddrPort {
		a, _ := netip.AddrFromSlice(ip)
		return netip.AddrPortFrom(a.Unmap(), port)
	}
	switch from, answers := end(e.Forward.SrcIP, e.Forward.SrcPort), end(e.Reverse.SrcIP, e.Reverse.SrcPort); {
	case slices.Contains(k.guests, from.Addr()): // it has begun it
		f.From, f.To = from, end(e.Forward.DstIP, e.Forward.DstPort)
	case slices.Contains(k.guests, answers.Addr()):
		f.From, f.To = end(e.Reverse.DstIP, e.Reverse.DstPort), answers
	default:
		return flow{}, false
	}
	return f, true
}

// States of TCP as conntrack has them (enum tcp_conntrack): in these a connection is over, or as good as that.
const (
	tcpTimeWait = 7
	tcpClose    = 8
)

// over reports whether a connection needs nobody any more.
func (f flow) over() bool {
	return f.Protocol == unix.IPPROTO_TCP && (f.State == tcpTimeWait || f.State == tcpClose || f.State == 0)
}

// pin puts connections of other places into conntrack, as they are: nothing of them is translated here.
func (k *kernel) pin(flows []flow) error {
	var there []flow // from when the guest was here before, or which took an answer for the begin
	var errs []error
	for _, f := range flows {
		if err := k.create(f); errors.Is(err, unix.EEXIST) {
			there = append(there, f)
		} else if err != nil {
			errs = append(errs, err)
		}
	}
	if len(there) == 0 {
		return first(errs)
	}
	stale := make(map[[2]netip.AddrPort]bool)
	for _, f := range there {
		stale[[2]netip.AddrPort{f.From, f.To}], stale[[2]netip.AddrPort{f.To, f.From}] = true, true
	}
	errs = append(errs, k.forget(func(f flow) bool { return stale[[2]netip.AddrPort{f.From, f.To}] }))
	for _, f := range there {
		errs = append(errs, k.create(f))
	}
	return first(errs)
}

// first is the first of some errors: one says what many would.
func first(errs []error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

func (k *kernel) create(f flow) error {
	e := &netlink.ConntrackFlow{
		FamilyType: uint8(families(f.From.Addr())), Mark: f.Owner, TimeOut: max(f.Timeout, 1),
		Forward: tuple(f.Protocol, f.From, f.To), Reverse: tuple(f.Protocol, f.To, f.From),
	}
	if f.Protocol == unix.IPPROTO_TCP {
		e.ProtoInfo = &netlink.ProtoInfoTCP{State: f.State}
	}
	if err := k.h.ConntrackCreate(netlink.ConntrackTable, netlink.InetFamily(e.FamilyType), e); err != nil {
		return fmt.Errorf("pin connection from %s to %s: %w", f.From, f.To, err)
	}
	return nil
}

func tuple(protocol uint8, from, to netip.AddrPort) netlink.IPTuple {
	return netlink.IPTuple{Protocol: protocol, SrcIP: from.Addr().AsSlice(), SrcPort: from.Port(), DstIP: to.Addr().AsSlice(), DstPort: to.Port()}
}

// filter chooses entries of conntrack.
type filter func(*netlink.ConntrackFlow) bool

// MatchConntrackFlow implements netlink's filter.
func (f filter) MatchConntrackFlow(e *netlink.ConntrackFlow) bool { return f(e) }

// forget has conntrack forget some of the guest's connections.
func (k *kernel) forget(which func(flow) bool) error {
	for _, g := range k.guests {
		_, err := k.h.ConntrackDeleteFilters(netlink.ConntrackTable, netlink.InetFamily(families(g)), filter(func(e *netlink.ConntrackFlow) bool {
			f, ok := k.guestSide(e)
			return ok && which(f)
		}))
		if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
			return fmt.Errorf("forget connections: %w", err)
		}
	}
	return nil
}

// unpin forgets the connections of an owner, or those of all others.
func (k *kernel) unpin(owner uint32) error {
	return k.forget(func(f flow) bool { return f.Owner == owner })
}
func (k *kernel) unpinAll() error { return k.forget(func(f flow) bool { return f.Owner != 0 }) }
