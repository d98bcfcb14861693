package nat

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"sync"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/drafter-vm/drafter/pkg/nat/rule"
)

// NAT is the namespaces of one prefix on a host, and what translates for them.
type NAT struct {
	cfg    Config
	host   netns.NsHandle
	cookie uint64
	lock   *os.File
	ipv6   bool

	mu      sync.Mutex // guards what follows, and the making and removing of single namespaces
	made    map[int]bool
	claimed map[int]bool
	closed  bool
}

// Open makes Config.Count namespaces, and what they need on the host of the calling thread: the network namespace that it is in. What
// an earlier process has left of the same prefix is taken over: namespaces that fit stay as they are, even with machines in
// them, and the others are removed. When it fails, or ctx ends, what it has made is removed again.
func Open(ctx context.Context, cfg Config) (_ *NAT, err error) {
	cfg = cfg.WithDefaults()
	defer func() {
		if err != nil {
			err = fmt.Errorf("open NAT %q: %w", cfg.Prefix, err)
		}
	}()
	if err := cfg.Check(); err != nil {
		return nil, err
	}
	if err := CheckPrivileges(); err != nil {
		return nil, err
	}
	n := &NAT{cfg: cfg, made: make(map[int]bool), claimed: make(map[int]bool)}
	if n.host, err = netns.Get(); err != nil {
		return nil, fmt.Errorf("find network namespace: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, n.host.Close())
		}
	}()
	if n.cookie, err = Cookie(n.host); err != nil {
		return nil, err
	}
	if err := n.lookAtHost(); err != nil {
		return nil, err
	}
	if n.lock, err = Lock("nat-" + cfg.Prefix); err != nil {
		return nil, fmt.Errorf("%w: stop it, or give another prefix (--namespace-prefix)", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, n.unlock())
			n.lock.Close()
		}
	}()
	t, err := n.survey()
	if err != nil {
		return nil, err
	}
	n.warn()

	// From here on the host is changed.
	if err := n.open(ctx, t); err != nil {
		if len(t.mend) > 0 { // what was there before stays, with the machines in it, for the next try
			return nil, errors.Join(err, n.removeNamespaces(context.WithoutCancel(ctx), t.build))
		}
		return nil, errors.Join(err, n.remove(context.WithoutCancel(ctx)))
	}
	return n, nil
}

// within runs f on a thread in the host's network namespace.
func (n *NAT) within(f func() error) error { return Within(n.host, f) }

// lookAtHost completes the configuration with what the host has, and checks that it fits.
func (n *NAT) lookAtHost() error {
	h, err := netlink.NewHandleAt(n.host, unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	defer h.Close()
	if n.cfg.HostInterface == "" {
		if n.cfg.HostInterface, err = defaultInterface(h); err != nil {
			return err
		}
	}
	if err := n.cfg.checkHost(h); err != nil {
		return err
	}
	if n.cfg.IPv6 == Off {
		return nil
	}
	if err := n.within(func() error { n.ipv6 = HasIPv6(); return nil }); err != nil {
		return err
	}
	if n.cfg.IPv6 == On && !n.ipv6 {
		return errors.New("this host has no IPv6 (net.ipv6.conf.all.disable_ipv6): enable it, or do without (--ipv6 off)")
	}
	return nil
}

// todo is what an Open has to do.
type todo struct {
	build, mend []int
	remove      []string
}

// survey finds out what is there of the namespaces. It changes nothing.
func (n *NAT) survey() (todo, error) {
	var t todo
	var foreigners, used []string
	entries, err := os.ReadDir(Folder)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return t, err
	}
	there := make(map[int]bool)
	for _, e := range entries {
		if i, ok := n.cfg.index(e.Name()); ok {
			there[i] = true
		}
	}
	for i := range n.cfg.Count {
		if _, ok := there[i]; !ok {
			there[i] = false
		}
	}
	indexes := make([]int, 0, len(there))
	for i := range there {
		indexes = append(indexes, i)
	}
	sort.Ints(indexes)
	for _, i := range indexes {
		name := n.cfg.name(i)
		found, inUse := absent, false
		if there[i] {
			if found, inUse, err = n.inspect(n.cfg.namespace(i, n.ipv6)); err != nil {
				return t, err
			}
		}
		wanted := i < n.cfg.Count
		switch {
		case found == foreign && wanted:
			foreigners = append(foreigners, name)
		case found == foreign, found == absent && !wanted, found == leftover && !wanted:
		case found == absent:
			t.build = append(t.build, i)
		case found == leftover:
			t.remove, t.build = append(t.remove, name), append(t.build, i)
		case found == ours && (wanted || inUse):
			t.mend = append(t.mend, i)
		case inUse:
			used = append(used, name)
		case wanted:
			t.remove, t.build = append(t.remove, name), append(t.build, i)
		default:
			t.remove = append(t.remove, name)
		}
	}
	if len(foreigners) > 0 {
		return t, fmt.Errorf("network namespaces %s exist, and are not ours: give another prefix, or remove them (ip netns delete)", few(foreigners))
	}
	if len(used) > 0 {
		return t, fmt.Errorf("network namespaces %s were made with other settings, and machines run in them: end these first, or give the settings that they were made with", few(used))
	}
	return t, nil
}

// few names some of many.
func few(names []string) string {
	const most = 5
	if len(names) > most {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:most], ", "), len(names)-most)
	}
	return strings.Join(names, ", ")
}

func exists(name string) bool {
	_, err := os.Lstat(filepath.Join(Folder, name))
	return err == nil
}

// warn says what else on this host may keep guests from being heard.
func (n *NAT) warn() {
	chains, err := rule.Dropping(n.host, rule.Forward)
	if err != nil {
		n.cfg.Logger.Debug("cannot look at the rules of others", "error", err)
	} else if len(chains) > 0 {
		n.cfg.Logger.Warn("rules of others drop what they do not know when it is forwarded: have them accept what comes from and goes to "+n.cfg.Prefix+"*"+vethSuffix,
			"chains", strings.Join(chains, ", "))
	}
}

// workers is how many namespaces are made at a time. The kernel makes most of one under a lock.
const workers = 8

func (n *NAT) open(ctx context.Context, t todo) error {
	settings, err := Settings(n.within, n.cookie)
	if err != nil {
		return err
	}
	if err := each(ctx, t.remove, removeNamespace); err != nil {
		return err
	}
	// The rules come before the guests.
	if err := n.cfg.outside(n.veths(slices.Concat(t.build, t.mend)), n.ipv6).Replace(n.host); err != nil {
		return err
	}
	if err := settings.Borrow(n.user(), n.needs()...); err != nil {
		return err
	}
	err = each(ctx, t.mend, func(i int) error {
		if err := n.mend(n.cfg.namespace(i, n.ipv6)); err != nil {
			return fmt.Errorf("mend network namespace %q: %w", n.cfg.name(i), err)
		}
		n.set(i)
		return nil
	})
	if err != nil {
		return err
	}
	return each(ctx, t.build, func(i int) error {
		if n.cfg.Making != nil {
			n.cfg.Making(n.cfg.name(i))
		}
		if err := n.build(n.cfg.namespace(i, n.ipv6)); err != nil {
			return fmt.Errorf("make network namespace %q: %w", n.cfg.name(i), err)
		}
		n.set(i)
		return nil
	})
}

// set puts down that a namespace is there.
func (n *NAT) set(i int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.made[i] = true
}

// each calls f for all, some at a time, until one fails or ctx ends.
func each[T any](ctx context.Context, all []T, f func(T) error) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(workers)
	for _, v := range all {
		g.Go(func() error {
			if err := context.Cause(ctx); err != nil {
				return err
			}
			return f(v)
		})
	}
	return g.Wait()
}

func (n *NAT) veths(indexes []int) []string {
	var names []string
	for _, i := range indexes {
		names = append(names, n.cfg.name(i)+vethSuffix)
	}
	return names
}

// user is who borrows the host's settings.
func (n *NAT) user() string { return "nat " + n.cfg.Prefix }

// ErrClosed is returned by methods of a NAT that is closed.
var ErrClosed = errors.New("the NAT is closed")

// Namespaces are those that are there, in their order.
func (n *NAT) Namespaces() []Namespace {
	n.mu.Lock()
	defer n.mu.Unlock()
	var all []Namespace
	for _, i := range sorted(n.made) {
		all = append(all, n.cfg.namespace(i, n.ipv6))
	}
	return all
}

func sorted(m map[int]bool) []int {
	var keys []int
	for k := range m {
		keys = append(keys, k)
	}
	sort.Ints(keys)
	return keys
}

// Config is the configuration with what Open has found out: HostInterface, and IPv6 as [On] or [Off].
func (n *NAT) Config() Config {
	c := n.cfg
	c.IPv6 = Off
	if n.ipv6 {
		c.IPv6 = On
	}
	return c
}

// Claim gives a namespace that nobody has claimed, in which no guest is and of which no connections are kept, and makes one if there is
// none. When the addresses are used up, the error wraps
// [ErrExhausted].
func (n *NAT) Claim(ctx context.Context) (Namespace, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return Namespace{}, ErrClosed
	}
	for _, i := range sorted(n.made) {
		if n.claimed[i] {
			continue
		}
		ns := n.cfg.namespace(i, n.ipv6)
		free, err := n.free(ns)
		if err != nil {
			return Namespace{}, fmt.Errorf("claim network namespace %q: %w", ns.Name, err)
		}
		if free {
			n.claimed[i] = true
			return ns, nil
		}
	}
	for i := range n.Config().Capacity() {
		name := n.cfg.name(i)
		if n.made[i] || exists(name) { // the latter is somebody else's
			continue
		}
		ns := n.cfg.namespace(i, n.ipv6)
		if len(ns.Veth) > maxInterface {
			break
		}
		if n.cfg.Making != nil {
			n.cfg.Making(name)
		}
		err := context.Cause(ctx)
		if err == nil {
			err = rule.AddInterface(n.host, n.cfg.table(), vethSet, ns.Veth)
		}
		if err == nil {
			err = n.build(ns)
		}
		if err != nil {
			return Namespace{}, fmt.Errorf("claim network namespace %q: %w", name, err)
		}
		n.made[i], n.claimed[i] = true, true
		return ns, nil
	}
	return Namespace{}, fmt.Errorf("claim a network namespace of NAT %q: %w: release one, or give larger CIDRs", n.cfg.Prefix, ErrExhausted)
}

// free reports whether nobody needs a namespace that is not claimed: one that was taken over from a process that died may have a guest, or
// keep the connections of one.
func (n *NAT) free(ns Namespace) (bool, error) {
	_, used, err := n.inspect(ns)
	if err != nil || used {
		return false, err
	}
	kept, err := n.keepsConnections(ns.Name)
	return !kept, err
}

// ErrKept is wrapped by the error of Release for a namespace that keeps connections of a guest which has moved.
var ErrKept = errors.New("it keeps connections of a VM")

// keepsConnections reports whether a namespace keeps connections of a guest that is, or was, in it. What a peer has left that was killed with its
// machine is nobody's.
func (n *NAT) keepsConnections(name string) (bool, error) {
	handle, err := OpenNamespace(name)
	if err != nil {
		return false, err
	}
	defer handle.Close()
	cookie, err := Cookie(handle)
	if err != nil {
		return false, err
	}
	b, err := os.ReadFile(filepath.Join(StateDir(), FlowState(cookie)+".json"))
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	} else if err != nil {
		return false, err
	}
	var kept struct {
		State  string          `json:"state"`
		Before json.RawMessage `json:"before"` // of a guest that was expected back
	}
	if err := json.Unmarshal(b, &kept); err != nil || kept.State == "away" || kept.State == "diverted" || len(kept.Before) > 0 {
		return true, nil
	}
	lock, err := Lock(FlowState(cookie)) // which its peer holds
	if err != nil {
		return true, nil
	}
	defer func() {
		_ = os.Remove(lock.Name())
		lock.Close()
	}()
	i, ok := n.cfg.index(name)
	if !ok {
		return true, nil
	}
	ns := n.cfg.namespace(i, n.ipv6)
	if _, used, err := n.inspect(ns); err != nil || used {
		return used, err
	}
	// Nothing of it may come to the next guest: its interfaces, rules and connections, and what it was known by.
	return false, errors.Join(removeNamespace(name), n.build(ns))
}

// Release takes a namespace back that was claimed. Its next guest is not reached by connections of the last one.
func (n *NAT) Release(name string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	i, ok := n.cfg.index(name)
	switch {
	case n.closed:
		return ErrClosed
	case !ok || !n.claimed[i]:
		return fmt.Errorf("release network namespace %q: it was not claimed", name)
	}
	if kept, err := n.keepsConnections(name); err != nil {
		return fmt.Errorf("release network namespace: %w", err)
	} else if kept {
		return fmt.Errorf("release network namespace %q: %w: wait until they have ended, or give them up (drafter connections --netns %s --drop)", name, ErrKept, name)
	}
	if err := forget(name); err != nil {
		return fmt.Errorf("release network namespace: %w", err)
	}
	delete(n.claimed, i)
	return nil
}

// Close removes all namespaces, the rules, and gives the host's settings back. A machine that runs in one of them has no network any
// more. It may be called twice, and does not end when ctx does: that would leave half of it.
func (n *NAT) Close(ctx context.Context) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return nil
	}
	n.closed = true
	err := n.remove(context.WithoutCancel(ctx))
	n.lock.Close()
	n.host.Close()
	if err != nil {
		return fmt.Errorf("close NAT %q: %w", n.cfg.Prefix, err)
	}
	return nil
}

// remove undoes Open.
func (n *NAT) remove(ctx context.Context) error {
	err := n.removeNamespaces(ctx, sorted(n.made))
	settings, e := Settings(n.within, n.cookie)
	if e == nil {
		e = settings.Return(n.user())
	}
	return errors.Join(err, rule.Remove(n.host, n.cfg.table()), e, n.unlock())
}

// removeNamespaces removes some, as far as they are there.
func (n *NAT) removeNamespaces(ctx context.Context, indexes []int) error {
	errs := make([]error, len(indexes))
	positions := make([]int, len(indexes))
	for p := range positions {
		positions[p] = p
	}
	_ = each(ctx, positions, func(p int) error {
		name := n.cfg.name(indexes[p])
		if n.cfg.Removing != nil {
			n.cfg.Removing(name)
		}
		if err := removeNamespace(name); err != nil {
			errs[p] = fmt.Errorf("remove network namespace %q: %w", name, err)
		}
		return nil // the others, in any case
	})
	return errors.Join(errs...)
}

// unlock removes the file of the lock, while it is held.
func (n *NAT) unlock() error {
	if err := os.Remove(n.lock.Name()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}
