package nat

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/drafter-vm/drafter/pkg/nat/rule"
	"github.com/drafter-vm/drafter/pkg/nat/sysctl"
)

// tablePrefix begins the name of a NAT's table of rules on the host, which ends with the prefix of its namespaces.
const tablePrefix = "drafter-nat-"

// vethSet is the set of the host's ends of all veth pairs.
const vethSet = "guests"

func (c Config) table() string { return tablePrefix + c.Prefix }

// outside are the rules on the host.
func (c Config) outside(veths []string, ipv6 bool) rule.Table {
	loopback := netip.MustParsePrefix("127.0.0.0/8")
	raw := rule.Chain{Name: "raw", Hook: rule.PreRouting, Priority: rule.Raw, Rules: []rule.Rule{
		// Their veth pairs may carry answers to 127.0.0.1, which have another address until they were translated back.
		rule.Of(rule.InSet(vethSet), rule.To(loopback), rule.Drop()),
		rule.Of(rule.InSet(vethSet), rule.From(loopback), rule.Drop()),
	}}
	input := rule.Chain{Name: "input", Hook: rule.Input, Priority: rule.Filter}
	forward := rule.Chain{Name: "forward", Hook: rule.Forward, Priority: rule.Filter}
	for _, p := range c.BlockedSubnets {
		input.Rules = append(input.Rules, rule.Of(rule.InSet(vethSet), rule.To(p), rule.Drop()))
		forward.Rules = append(forward.Rules,
			rule.Of(rule.InSet(vethSet), rule.To(p), rule.Drop()),
			rule.Of(rule.OutSet(vethSet), rule.From(p), rule.Drop()),
		)
	}
	forward.Rules = append(forward.Rules,
		rule.Of(rule.InSet(vethSet), rule.State(rule.Established|rule.Related), rule.Accept()),
		rule.Of(rule.InSet(vethSet), rule.Redirected(), rule.Accept()), // a forward of another guest
		rule.Of(rule.InSet(vethSet), rule.NotOut(c.HostInterface), rule.Drop()),
	)
	// What is translated on its way out: no other host has a route there, or should.
	hidden := []netip.Prefix{c.NamespaceVethCIDR, c.HostVethCIDR}
	for _, p := range []netip.Prefix{c.NamespaceVethCIDR6, c.HostVethCIDR6} {
		if ipv6 && p.Addr().IsPrivate() {
			hidden = append(hidden, p)
		}
	}
	if c.DenyIncoming {
		forward.Rules = append(forward.Rules,
			rule.Of(rule.OutSet(vethSet), rule.State(rule.Established|rule.Related), rule.Accept()),
			rule.Of(rule.OutSet(vethSet), rule.Drop()),
		)
	} else {
		for _, p := range hidden { // this host routes, now, also for neighbours who try
			forward.Rules = append(forward.Rules, rule.Of(rule.OutSet(vethSet), rule.To(p), rule.State(rule.New), rule.NotRedirected(), rule.Drop()))
		}
	}
	post := rule.Chain{Name: "postrouting", Hook: rule.PostRouting, Priority: rule.SourceNAT, NAT: true}
	for _, p := range hidden { // those of the veth pairs are of programs in the namespaces
		post.Rules = append(post.Rules, rule.Of(rule.Out(c.HostInterface), rule.From(p), rule.Masquerade()))
	}
	return rule.Table{Name: c.table(), Sets: []rule.Set{{Name: vethSet, Interfaces: veths}}, Chains: []rule.Chain{raw, input, forward, post}}
}

// stateDir has a folder of state for each start of the host: usually one, as it is on no disk.
const stateDir = "/run/drafter/net"

// StateDir is where it is kept what outlives a process, but not the host: locks, and what settings of the host were. Cookies begin anew when the
// host does, so the folder is of this start only, and those of others are removed, where they have not been.
var StateDir = sync.OnceValue(func() string {
	const file = "/proc/sys/kernel/random/boot_id" // random(4)
	b, _ := os.ReadFile(file)
	boot := strings.TrimSpace(string(b))
	entries, _ := os.ReadDir(stateDir)
	for _, e := range entries {
		if boot != "" && e.Name() != boot && len(e.Name()) == len(boot) { // an id, too
			_ = os.RemoveAll(filepath.Join(stateDir, e.Name()))
		}
	}
	return filepath.Join(stateDir, boot)
})

// FlowState begins the names of the files below [StateDir] in which it is kept what connections a namespace, by its cookie, keeps for a
// guest that has left it. While there is such a file, the namespace is not given to others.
func FlowState(cookie uint64) string { return fmt.Sprintf("%d-flow", cookie) }

// Settings are the kernel's settings of the network namespace that within runs on a thread of, and whose cookie is given, on loan.
func Settings(within func(func() error) error, cookie uint64) (sysctl.Settings, error) {
	if err := os.MkdirAll(StateDir(), 0o700); err != nil {
		return sysctl.Settings{}, err
	}
	return sysctl.Settings{File: filepath.Join(StateDir(), fmt.Sprintf("%d-settings.json", cookie)), Within: within}, nil
}

// Lock takes a lock on a name, which ends with this process. While another process has it, the error wraps [ErrBusy] and names that
// process. The file may be removed while the lock is held.
func Lock(name string) (*os.File, error) {
	for {
		f, err := lock(name)
		if err != nil {
			return nil, err
		}
		// It may have been removed by its last holder before it became ours.
		now, err := os.Stat(f.Name())
		if opened, e := f.Stat(); err == nil && e == nil && os.SameFile(now, opened) {
			return f, nil
		}
		f.Close()
	}
}

func lock(name string) (*os.File, error) {
	if err := os.MkdirAll(StateDir(), 0o700); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(StateDir(), name+".lock"), os.O_CREATE|os.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) {
		b := make([]byte, 16)
		n, _ := f.ReadAt(b, 0)
		f.Close()
		return nil, fmt.Errorf("%w (process %s)", ErrBusy, strings.TrimSpace(string(b[:n])))
	} else if err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %q: %w", f.Name(), err)
	}
	if err := f.Truncate(0); err == nil {
		_, _ = fmt.Fprintln(f, os.Getpid()) // for people
	}
	return f, nil
}

// ErrBusy is wrapped by errors which say that another process has what is asked for.
var ErrBusy = errors.New("another process has it")

// needs are the settings of the host without which it forwards nothing, and those that change with them.
func (n *NAT) needs() []sysctl.Setting {
	s := []sysctl.Setting{
		{Key: "net/ipv4/ip_forward", Value: "1"},
		{Key: "net/ipv4/conf/all/accept_redirects", Aside: true},
	}
	for _, i := range n.settingsOf("net/ipv4/conf", "forwarding") { // each is set by the one of all
		s = append(s, sysctl.Setting{Key: "net/ipv4/conf/" + i.name + "/forwarding", Aside: true})
	}
	if !n.ipv6 {
		return s
	}
	// A host that forwards believes no router any more, unless it is told to (accept_ra 2), and would lose its own default route.
	for _, i := range n.settingsOf("net/ipv6/conf", "accept_ra") {
		if i.value == "1" {
			s = append(s, sysctl.Setting{Key: "net/ipv6/conf/" + i.name + "/accept_ra", Value: "2"})
		}
	}
	s = append(s, sysctl.Setting{Key: "net/ipv6/conf/all/forwarding", Value: "1"})
	for _, i := range n.settingsOf("net/ipv6/conf", "forwarding") {
		s = append(s, sysctl.Setting{Key: "net/ipv6/conf/" + i.name + "/forwarding", Aside: true})
	}
	return s
}

// setting is that of one interface.
type setting struct{ name, value string }

// settingsOf are those of all of the host's interfaces, and of new ones, but for those of this NAT.
func (n *NAT) settingsOf(folder, key string) (all []setting) {
	_ = n.within(func() error {
		dir := filepath.Join("/proc/sys", folder)
		names, err := os.ReadDir(dir)
		for _, name := range names {
			if id, ok := strings.CutSuffix(name.Name(), vethSuffix); ok {
				if _, ours := n.cfg.index(id); ours {
					continue
				}
			}
			if b, err := os.ReadFile(filepath.Join(dir, name.Name(), key)); err == nil && name.Name() != "all" {
				all = append(all, setting{name.Name(), strings.TrimSpace(string(b))})
			}
		}
		return err
	})
	return all
}

// HasIPv6 reports whether the network namespace of the calling thread has IPv6.
func HasIPv6() bool {
	b, err := os.ReadFile("/proc/sys/net/ipv6/conf/all/disable_ipv6")
	return err == nil && strings.TrimSpace(string(b)) == "0"
}

// defaultInterface is the interface of the host's default route: that of IPv4, or else of IPv6.
func defaultInterface(h *netlink.Handle) (string, error) {
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		routes, err := h.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
		if err != nil {
			return "", fmt.Errorf("list routes: %w", err)
		}
		best := -1
		for i, r := range routes {
			if r.LinkIndex != 0 && (r.Dst == nil || r.Dst.IP.IsUnspecified() && ones(r) == 0) && r.Type == unix.RTN_UNICAST && (best < 0 || r.Priority < routes[best].Priority) {
				best = i
			}
		}
		if best >= 0 {
			link, err := h.LinkByIndex(routes[best].LinkIndex)
			if err != nil {
				return "", fmt.Errorf("find interface of the default route: %w", err)
			}
			return link.Attrs().Name, nil
		}
	}
	return "", errors.New("this host has no default route, so its interface to others is not known: name it (--host-interface)")
}

func ones(r netlink.Route) int {
	n, _ := r.Dst.Mask.Size()
	return n
}

// checkHost reports why the addresses cannot be used on this host: somebody else has some of them.
func (c Config) checkHost(h *netlink.Handle) error {
	link, err := h.LinkByName(c.HostInterface)
	if notFound(err) {
		return fmt.Errorf("host interface %q: this host has no such interface, but %s", c.HostInterface, interfaces(h))
	} else if err != nil {
		return fmt.Errorf("find host interface %q: %w", c.HostInterface, err)
	}
	if link.Attrs().Flags&1 == 0 {
		c.Logger.Warn("the host interface is down: guests reach nobody until it is up", "interface", c.HostInterface)
	}
	links, err := h.LinkList()
	if err != nil {
		return fmt.Errorf("list interfaces: %w", err)
	}
	for _, l := range links {
		name := l.Attrs().Name
		if id, ok := strings.CutSuffix(name, vethSuffix); ok {
			if _, ok := c.index(id); ok {
				continue // of ours, from a start before this
			}
		}
		addrs, err := h.AddrList(l, netlink.FAMILY_ALL)
		if err != nil {
			return fmt.Errorf("list addresses of %q: %w", name, err)
		}
		for _, a := range addrs {
			ip, ok := netip.AddrFromSlice(a.IP)
			if !ok {
				continue
			}
			ip = ip.Unmap()
			length, _ := a.Mask.Size()
			for _, p := range []struct {
				what string
				p    netip.Prefix
			}{{"host veth CIDR", c.HostVethCIDR}, {"namespace veth CIDR", c.NamespaceVethCIDR}, {"host veth IPv6 CIDR", c.HostVethCIDR6}, {"namespace veth IPv6 CIDR", c.NamespaceVethCIDR6}} {
				// A prefix that is routed to this host may be on its interface, too.
				routed := p.p.Addr().Is6() && !p.p.Addr().IsPrivate() && name == c.HostInterface
				unused := p.p.Addr().Is6() && c.IPv6 == Off
				if p.p.Overlaps(netip.PrefixFrom(ip, length)) && !routed && !unused {
					return fmt.Errorf("%s %s overlaps with what %q has on this host, %s: give another one", p.what, p.p, name, netip.PrefixFrom(ip, length))
				}
			}
		}
	}
	return nil
}

// interfaces names those of a host.
func interfaces(h *netlink.Handle) string {
	links, err := h.LinkList()
	if err != nil {
		return "none that can be listed"
	}
	var names []string
	for _, l := range links {
		if len(names) == 8 {
			names = append(names, "…")
			break
		}
		names = append(names, l.Attrs().Name)
	}
	return strings.Join(names, ", ")
}
