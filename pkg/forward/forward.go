package forward

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/drafter-vm/drafter/pkg/nat"
	"github.com/drafter-vm/drafter/pkg/nat/rule"
	"github.com/drafter-vm/drafter/pkg/nat/sysctl"
)

// Forward is a port of a guest that is to be reached at an address of the host.
type Forward struct {
	Netns        string        // the guest's network namespace
	InternalPort uint16        // the guest's
	Protocol     rule.Protocol // default: TCP
	External     string        // HOST:PORT
}

// String is how a forward is written in messages.
func (f Forward) String() string {
	return fmt.Sprintf("%s %s to %s:%d", protocolName(f.Protocol), f.External, f.Netns, f.InternalPort)
}

func protocolName(p rule.Protocol) string {
	if p == rule.UDP {
		return "udp"
	}
	return "tcp"
}

// UnmarshalJSON reads {"netns","internalPort","protocol","externalAddr"}. The port may be a number or a string.
func (f *Forward) UnmarshalJSON(b []byte) error {
	var v struct {
		Netns        string          `json:"netns"`
		InternalPort json.RawMessage `json:"internalPort"`
		Protocol     string          `json:"protocol"`
		ExternalAddr string          `json:"externalAddr"`
	}
	d := json.NewDecoder(strings.NewReader(string(b)))
	d.DisallowUnknownFields()
	if err := d.Decode(&v); err != nil {
		return err
	}
	text := strings.Trim(string(v.InternalPort), `"`)
	port, err := strconv.ParseUint(text, 10, 16)
	if err != nil || port == 0 {
		return fmt.Errorf("forward of %q: internalPort %q: give a port of the guest, 1 to 65535", v.ExternalAddr, text)
	}
	*f = Forward{Netns: v.Netns, InternalPort: uint16(port), External: v.ExternalAddr}
	switch v.Protocol {
	case "", "tcp":
		f.Protocol = rule.TCP
	case "udp":
		f.Protocol = rule.UDP
	default:
		return fmt.Errorf("forward of %q: protocol %q: use tcp or udp", v.ExternalAddr, v.Protocol)
	}
	return nil
}

// Config is how forwards are made. The zero value of each field is its default.
type Config struct {
	// HostVethCIDR and HostVethCIDR6 are the networks in which the namespaces have their addresses, as those of nat.Config.
	HostVethCIDR, HostVethCIDR6 netip.Prefix

	// Added and Removed are called for each forward when it is there, and when it is not any more. Nil is allowed.
	Added, Removed func(Forward)

	// Logger receives events; nil means slog.Default().
	Logger *slog.Logger
}

// ErrConflict is wrapped by errors which say that somebody else has an address: another program, or another forward.
var ErrConflict = errors.New("the address is taken")

// Forwarder has forwards, which can be changed.
type Forwarder struct {
	cfg    Config
	host   netns.NsHandle
	cookie uint64
	slot   int
	lock   *os.File

	ctx    context.Context // of the relays
	cancel context.CancelFunc
	relays sync.WaitGroup

	mu     sync.Mutex // guards what follows
	active []*active
	holds  map[place]*hold
	closed bool
}

// active is a forward that is there.
type active struct {
	Forward
	to    target
	spots []spot
}

// spot is an address that is forwarded from: unspecified for all of its family.
type spot struct {
	addr netip.Addr
	port uint16
}

func (s spot) String() string { return netip.AddrPortFrom(s.addr, s.port).String() }

// overlaps reports whether some packet goes to both.
func (s spot) overlaps(other spot) bool {
	return s.port == other.port && s.addr.Is4() == other.addr.Is4() && (s.addr == other.addr || s.addr.IsUnspecified() || other.addr.IsUnspecified())
}

// place is what a socket holds.
type place struct {
	protocol rule.Protocol
	spot
}

// target is where the guest of a namespace is reached.
type target struct {
	inside, inside6 netip.Addr // invalid: it has none
	veth            string     // the host's interface to it
}

// slots is how many Forwarders a host can have. Each has a table of rules of its own.
const slots = 256

func table(slot int) string { return fmt.Sprintf("drafter-forward-%d", slot) }

// Open makes forwards in the network namespace of the calling thread, after removing what processes that were killed have left there. It
// makes all or none.
func Open(ctx context.Context, cfg Config, forwards []Forward) (_ *Forwarder, err error) {
	defaults := nat.Config{HostVethCIDR: cfg.HostVethCIDR, HostVethCIDR6: cfg.HostVethCIDR6}.WithDefaults()
	cfg.HostVethCIDR, cfg.HostVethCIDR6 = defaults.HostVethCIDR, defaults.HostVethCIDR6
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	if err := nat.CheckPrivileges(); err != nil {
		return nil, fmt.Errorf("forward: %w", err)
	}
	f := &Forwarder{cfg: cfg}
	f.ctx, f.cancel = context.WithCancel(context.WithoutCancel(ctx))
	if f.host, err = netns.Get(); err != nil {
		return nil, fmt.Errorf("find network namespace: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Close(ctx))
		}
	}()
	if f.cookie, err = nat.Cookie(f.host); err != nil {
		return nil, err
	}
	if err := f.takeSlot(); err != nil {
		return nil, err
	}
	if err := f.Set(ctx, forwards); err != nil {
		return nil, err
	}
	return f, nil
}

// takeSlot finds a slot for our rules, and removes what is left in those that nobody has.
func (f *Forwarder) takeSlot() error {
	tables, err := rule.Tables(f.host)
	if err != nil {
		return err
	}
	settings, err := nat.Settings(f.within, f.cookie)
	if err != nil {
		return err
	}
	for slot := range slots {
		there := slices.Contains(tables, table(slot))
		if f.lock != nil && !there {
			continue
		}
		lock, err := nat.Lock(fmt.Sprintf("%d-forward-%d", f.cookie, slot))
		if errors.Is(err, nat.ErrBusy) {
			continue
		} else if err != nil {
			return err
		}
		if there {
			err = errors.Join(rule.Remove(f.host, table(slot)), settings.Return(table(slot)))
		}
		if f.lock == nil {
			f.lock, f.slot = lock, slot
		} else {
			err = errors.Join(err, os.Remove(lock.Name()))
			lock.Close()
		}
		if err != nil {
			return err
		}
	}
	if f.lock == nil {
		return fmt.Errorf("%d processes forward ports of this host: that is as many as can", slots)
	}
	return nil
}

func (f *Forwarder) within(g func() error) error { return nat.Within(f.host, g) }

// Forwards are those that are there.
func (f *Forwarder) Forwards() []Forward {
	f.mu.Lock()
	defer f.mu.Unlock()
	return forwardsOf(f.active)
}

func forwardsOf(all []*active) []Forward {
	var out []Forward
	for _, a := range all {
		out = append(out, a.Forward)
	}
	return out
}

// ErrClosed is returned by Set of a Forwarder that is closed.
var ErrClosed = errors.New("the forwarder is closed")

// Set makes the forwards those of the list. It changes all of them or, with an error, none; what is in both lists goes on
// undisturbed, unless its namespace was made anew.
func (f *Forwarder) Set(ctx context.Context, forwards []Forward) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return ErrClosed
	}
	next, err := f.resolve(ctx, forwards)
	if err != nil {
		return err
	}
	holds := make(map[place]*hold)
	var made []*hold
	undo := func(err error) error {
		for _, h := range made {
			h.close()
		}
		return err
	}
	for _, a := range next {
		for _, s := range a.spots {
			at := place{a.Protocol, s}
			if holds[at] = f.holds[at]; holds[at] != nil {
				continue
			}
			h, err := f.hold(at)
			if err != nil {
				return undo(fmt.Errorf("forward %s: %w", a.Forward, err))
			}
			made, holds[at] = append(made, h), h
		}
	}
	if err := f.loopback(next); err != nil {
		return undo(err)
	}
	if err := rules(f.slot, next).Replace(f.host); err != nil {
		return undo(err)
	}
	for _, a := range next {
		for _, s := range a.spots {
			holds[place{a.Protocol, s}].to.Store(&guest{a.to, a.InternalPort})
		}
	}
	for at, h := range f.holds {
		if holds[at] == nil {
			h.close()
		}
	}
	before, after := forwardsOf(f.active), forwardsOf(next)
	f.active, f.holds = next, holds
	for _, fw := range before {
		if !slices.Contains(after, fw) {
			f.tell(f.cfg.Removed, fw)
		}
	}
	for _, fw := range after {
		if !slices.Contains(before, fw) {
			f.tell(f.cfg.Added, fw)
		}
	}
	return nil
}

func (f *Forwarder) tell(hook func(Forward), about Forward) {
	if hook != nil {
		hook(about)
	}
}

// loopback lets answers to 127.0.0.1 come from the namespaces, where it is forwarded from; namespaces of package nat do already.
func (f *Forwarder) loopback(all []*active) error {
	var need []sysctl.Setting
	for _, a := range all {
		for _, s := range a.spots {
			if s.addr.Is4() && (s.addr.IsLoopback() || s.addr.IsUnspecified()) {
				need = append(need, sysctl.Setting{Key: "net/ipv4/conf/" + a.to.veth + "/route_localnet", Value: "1"})
			}
		}
	}
	settings, err := nat.Settings(f.within, f.cookie)
	if err != nil || len(need) == 0 {
		return err
	}
	return settings.Borrow(table(f.slot), need...)
}

// resolve finds what the forwards are from and to, and what contradicts itself among them.
func (f *Forwarder) resolve(ctx context.Context, forwards []Forward) ([]*active, error) {
	var all []*active
	targets := make(map[string]target)
	for _, fw := range forwards {
		if fw.Protocol == 0 {
			fw.Protocol = rule.TCP
		}
		a := &active{Forward: fw}
		var err error
		switch {
		case fw.Protocol != rule.TCP && fw.Protocol != rule.UDP:
			err = fmt.Errorf("protocol %d: use TCP or UDP", fw.Protocol)
		case fw.InternalPort == 0:
			err = errors.New("internal port 0: give a port of the guest, 1 to 65535")
		default:
			a.spots, err = f.spots(ctx, fw.External)
		}
		if err == nil {
			t, known := targets[fw.Netns]
			if !known {
				t, err = f.find(fw.Netns)
			}
			targets[fw.Netns], a.to = t, t
		}
		if err != nil {
			return nil, fmt.Errorf("forward %s: %w", fw, err)
		}
		for _, other := range all {
			for _, s := range a.spots {
				if other.Protocol == fw.Protocol && slices.ContainsFunc(other.spots, s.overlaps) {
					return nil, fmt.Errorf("forward %s: %w: %s has it", fw, ErrConflict, other.Forward)
				}
			}
		}
		all = append(all, a)
	}
	return all, nil
}

// spots are the addresses that an external address stands for.
func (f *Forwarder) spots(ctx context.Context, external string) ([]spot, error) {
	host, service, err := net.SplitHostPort(external)
	if err != nil {
		return nil, fmt.Errorf("external address %q: give HOST:PORT, or :PORT for every address: %w", external, err)
	}
	port, err := strconv.ParseUint(service, 10, 16)
	if err != nil || port == 0 {
		return nil, fmt.Errorf("external address %q: port %q: give 1 to 65535", external, service)
	}
	if host == "" || host == "*" {
		all := []spot{{netip.IPv4Unspecified(), uint16(port)}}
		if f.hasIPv6() {
			all = append(all, spot{netip.IPv6Unspecified(), uint16(port)})
		}
		return all, nil
	}
	if a, err := netip.ParseAddr(host); err == nil {
		if a.IsMulticast() || a == netip.AddrFrom4([4]byte{255, 255, 255, 255}) {
			return nil, fmt.Errorf("external address %q: it is many hosts' address: give one of this host", external)
		}
		return []spot{{a.Unmap(), uint16(port)}}, nil
	}
	found, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return nil, fmt.Errorf("external address %q: %w: give an address of this host", external, err)
	}
	var all []spot
	for _, a := range found {
		s := spot{a.Unmap(), uint16(port)}
		if !slices.Contains(all, s) && (s.addr.Is4() || f.hasIPv6()) {
			all = append(all, s)
		}
	}
	if host == "localhost" && f.hasIPv6() { // also where /etc/hosts says otherwise
		if s := (spot{netip.IPv6Loopback(), uint16(port)}); !slices.Contains(all, s) {
			all = append(all, s)
		}
	}
	return all, nil
}

func (f *Forwarder) hasIPv6() (has bool) {
	_ = f.within(func() error { has = nat.HasIPv6(); return nil })
	return has
}

// find finds where the guest of a namespace is reached.
func (f *Forwarder) find(namespace string) (target, error) {
	var t target
	if in, _, err := nat.Lookup(namespace); err != nil {
		return t, err
	} else if in.Closed {
		return t, fmt.Errorf("network namespace %q denies what comes in: start its drafter nat without --allow-incoming-traffic=false", namespace)
	}
	handle, err := nat.OpenNamespace(namespace)
	if err != nil {
		return t, err
	}
	defer handle.Close()
	inside, err := netlink.NewHandleAt(handle, unix.NETLINK_ROUTE)
	if err != nil {
		return t, fmt.Errorf("open netlink: %w", err)
	}
	defer inside.Close()
	addrs, err := inside.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return t, fmt.Errorf("list addresses of network namespace %q: %w", namespace, err)
	}
	for _, a := range addrs {
		ip, _ := netip.AddrFromSlice(a.IP)
		switch ip = ip.Unmap(); {
		case f.cfg.HostVethCIDR.Contains(ip):
			t.inside = ip
		case f.cfg.HostVethCIDR6.Contains(ip):
			t.inside6 = ip
		}
	}
	reached := t.inside
	if !reached.IsValid() {
		reached = t.inside6
	}
	if !reached.IsValid() {
		return t, fmt.Errorf("network namespace %q has no address of %s or %s: make it by drafter nat, or give the host veth CIDR that it was made with", namespace, f.cfg.HostVethCIDR, f.cfg.HostVethCIDR6)
	}
	outside, err := netlink.NewHandleAt(f.host, unix.NETLINK_ROUTE)
	if err != nil {
		return t, fmt.Errorf("open netlink: %w", err)
	}
	defer outside.Close()
	routes, err := outside.RouteGet(reached.AsSlice())
	if err != nil || len(routes) == 0 {
		return t, fmt.Errorf("network namespace %q has the address %s, to which this host has no route: %w", namespace, reached, err)
	}
	link, err := outside.LinkByIndex(routes[0].LinkIndex)
	if err != nil {
		return t, fmt.Errorf("find interface to %s: %w", reached, err)
	}
	t.veth = link.Attrs().Name
	return t, nil
}

// rules are those of all forwards.
func rules(slot int, all []*active) rule.Table {
	pre := rule.Chain{Name: "prerouting", Hook: rule.PreRouting, Priority: rule.DestinationNAT, NAT: true}
	out := rule.Chain{Name: "output", Hook: rule.Output, Priority: rule.DestinationNAT, NAT: true}
	post := rule.Chain{Name: "postrouting", Hook: rule.PostRouting, Priority: rule.SourceNAT, NAT: true}
	masked := make(map[string]bool)
	for _, a := range all {
		for _, s := range a.spots {
			inside := a.to.inside
			if s.addr.Is6() {
				inside = a.to.inside6
			}
			if !inside.IsValid() || s.addr == netip.IPv6Loopback() {
				continue // what is not translated is relayed
			}
			where := rule.To(rule.Host(s.addr))
			if s.addr.IsUnspecified() {
				if where = append(rule.IPv4(), rule.ToLocal()...); s.addr.Is6() {
					where = append(rule.NotTo(rule.Host(netip.IPv6Loopback())), rule.ToLocal()...)
				}
			}
			r := rule.Of(where, rule.Is(a.Protocol), rule.ToPort(s.port), rule.ToAddress(inside, a.InternalPort))
			out.Rules = append(out.Rules, r)
			if !s.addr.IsLoopback() { // which is for programs of this host, whatever a neighbour sends here
				pre.Rules = append(pre.Rules, r)
			}
			if s.addr.Is4() && (s.addr.IsLoopback() || s.addr.IsUnspecified()) && !masked[a.to.veth] {
				masked[a.to.veth] = true
				post.Rules = append(post.Rules, rule.Of(rule.Out(a.to.veth), rule.From(netip.MustParsePrefix("127.0.0.0/8")), rule.Masquerade()))
			}
		}
	}
	return rule.Table{Name: table(slot), Chains: []rule.Chain{pre, out, post}}
}

// Close ends all forwards. Connections that the kernel forwards go on; those that are relayed end.
func (f *Forwarder) Close(ctx context.Context) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return nil
	}
	f.closed = true
	var err error
	if f.lock != nil {
		err = rule.Remove(f.host, table(f.slot))
		settings, e := nat.Settings(f.within, f.cookie)
		if e == nil {
			e = settings.Return(table(f.slot))
		}
		err = errors.Join(err, e, os.Remove(f.lock.Name()))
		f.lock.Close()
	}
	for _, h := range f.holds {
		h.close()
	}
	for _, a := range f.active {
		f.tell(f.cfg.Removed, a.Forward)
	}
	f.active, f.holds = nil, nil
	f.cancel()
	f.relays.Wait()
	err = errors.Join(err, f.host.Close())
	if err != nil {
		return fmt.Errorf("close forwards: %w", err)
	}
	return nil
}
