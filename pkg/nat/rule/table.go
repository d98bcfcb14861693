package rule

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/mdlayher/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Hook is where in a packet's way a chain is asked.
type Hook = nftables.ChainHook

// The hooks of the family inet.
var (
	PreRouting  = *nftables.ChainHookPrerouting
	Input       = *nftables.ChainHookInput
	Forward     = *nftables.ChainHookForward
	Output      = *nftables.ChainHookOutput
	PostRouting = *nftables.ChainHookPostrouting
)

// Priority is the order among the chains of a hook: lower goes first.
type Priority = nftables.ChainPriority

// The priorities of netfilter's own stations: Raw is before connections are looked up, Mangle after that and before
// translations.
var (
	Raw            = *nftables.ChainPriorityRaw
	Mangle         = *nftables.ChainPriorityMangle
	DestinationNAT = *nftables.ChainPriorityNATDest
	Filter         = *nftables.ChainPriorityFilter
	SourceNAT      = *nftables.ChainPriorityNATSource
)

// Chain is a list of rules, asked in their order until one accepts or drops. What none decides is accepted.
type Chain struct {
	Name     string   // unique in the table
	Hook     Hook     // where packets meet it
	Priority Priority // among other chains of the hook: the lower, the earlier
	NAT      bool     // the rules translate; asked about the first packet of each connection only
	Rules    []Rule   // in this order
}

// Set is a named set of interfaces, for [InSet] and [OutSet].
type Set struct {
	Name       string   // by which rules name it
	Interfaces []string // names of those in it
}

// FlowSet is a named set of connections of one family, each in the direction of the packets that put it there ([Remember]). It forgets those
// of which nothing came for a minute.
type FlowSet struct {
	Name string // by which rules name it
	IPv6 bool   // its connections are of IPv6, or else of IPv4
}

// flowsRemembered bounds how many connections a FlowSet has: all that there can be to one address and port, a few times over.
const flowsRemembered = 1 << 18

// Table is all the rules of one purpose, under a name that is nobody else's.
type Table struct {
	Name     string    // of the family inet
	Sets     []Set     // of interfaces
	FlowSets []FlowSet // of connections; empty at first
	Chains   []Chain   // in any order
}

// batchSize bounds a batch, which is one message, in bytes: it has room for the 64 KiB flows that there can be to one address, and more.
const batchSize = 16 << 20

// answersSize is room for the answers to a batch, one for each rule, which all come before the first is read.
const answersSize = 16 << 20

// open connects to netfilter in a network namespace.
func open(ns netns.NsHandle) (*nftables.Conn, error) {
	// Lasting: one socket for all of a batch and its answers, rather than one for each call.
	c, err := nftables.New(nftables.WithNetNSFd(int(ns)), nftables.AsLasting(), nftables.WithSockOptions(func(c *netlink.Conn) error {
		return errors.Join(c.SetWriteBuffer(batchSize), c.SetReadBuffer(answersSize))
	}))
	if err != nil {
		return nil, fmt.Errorf("connect to netfilter: %w", err)
	}
	return c, nil
}

func of(table string) *nftables.Table {
	return &nftables.Table{Name: table, Family: nftables.TableFamilyINet}
}

// Replace puts the table into a network namespace, instead of what it has under that name.
func (t Table) Replace(ns netns.NsHandle) error {
	if err := t.replace(ns); err != nil {
		return fmt.Errorf("write rules %q: %w", t.Name, err)
	}
	return nil
}

func (t Table) replace(ns netns.NsHandle) error {
	c, err := open(ns)
	if err != nil {
		return err
	}
	defer c.CloseLasting()
	table := of(t.Name)
	c.AddTable(table) // so that there is one to remove, in any case
	c.DelTable(table)
	c.AddTable(table)
	id := uint32(0) // of a set in this transaction; the library's own are counted without a lock
	for _, s := range t.Sets {
		id++
		set := interfaces(table, s.Name)
		set.ID = id
		if err := c.AddSet(set, elements(s.Interfaces)); err != nil {
			return err
		}
	}
	for _, s := range t.FlowSets {
		address := nftables.TypeIPAddr
		if s.IPv6 {
			address = nftables.TypeIP6Addr
		}
		key, err := nftables.ConcatSetType(nftables.TypeInetProto, address, nftables.TypeInetService, nftables.TypeInetService)
		if err != nil {
			return err
		}
		id++
		set := &nftables.Set{Table: table, ID: id, Name: s.Name, KeyType: key, Dynamic: true, HasTimeout: true, Timeout: time.Minute, Size: flowsRemembered}
		if err := c.AddSet(set, nil); err != nil {
			return err
		}
	}
	for _, ch := range t.Chains {
		kind := nftables.ChainTypeFilter
		if ch.NAT {
			kind = nftables.ChainTypeNAT
		}
		chain := c.AddChain(&nftables.Chain{Name: ch.Name, Table: table, Hooknum: &ch.Hook, Priority: &ch.Priority, Type: kind})
		for _, r := range ch.Rules {
			c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: slices.Clone(r)})
		}
	}
	return c.Flush()
}

func interfaces(table *nftables.Table, name string) *nftables.Set {
	return &nftables.Set{Table: table, Name: name, KeyType: nftables.TypeIFName, KeyByteOrder: binaryutil.NativeEndian}
}

func elements(names []string) []nftables.SetElement {
	var out []nftables.SetElement
	for _, n := range names {
		out = append(out, nftables.SetElement{Key: name(n)})
	}
	return out
}

// AddInterface adds an interface to a set of a table that is there; one that has it is left as it is.
func AddInterface(ns netns.NsHandle, table, set, iface string) error {
	return change(ns, table, set, iface, (*nftables.Conn).SetAddElements)
}

// RemoveInterface removes an interface from a set of a table that is there.
func RemoveInterface(ns netns.NsHandle, table, set, iface string) error {
	err := change(ns, table, set, iface, (*nftables.Conn).SetDeleteElements)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}

func change(ns netns.NsHandle, table, set, iface string, how func(*nftables.Conn, *nftables.Set, []nftables.SetElement) error) error {
	c, err := open(ns)
	if err == nil {
		defer c.CloseLasting()
		if err = how(c, interfaces(of(table), set), elements([]string{iface})); err == nil {
			err = c.Flush()
		}
	}
	if err != nil {
		return fmt.Errorf("change set %q of rules %q: %w", set, table, err)
	}
	return nil
}

// Remove removes the table of that name, if there is one.
func Remove(ns netns.NsHandle, table string) error {
	c, err := open(ns)
	if err == nil {
		defer c.CloseLasting()
		c.AddTable(of(table))
		c.DelTable(of(table))
		err = c.Flush()
	}
	if err != nil {
		return fmt.Errorf("remove rules %q: %w", table, err)
	}
	return nil
}

// Tables are the names of all tables of the family inet in a network namespace.
func Tables(ns netns.NsHandle) ([]string, error) {
	c, err := open(ns)
	if err != nil {
		return nil, err
	}
	defer c.CloseLasting()
	tables, err := c.ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		return nil, fmt.Errorf("list rules: %w", err)
	}
	var names []string
	for _, t := range tables {
		names = append(names, t.Name)
	}
	return names, nil
}

// Dropping names the chains of others that drop what they do not know of, at a hook, as "TABLE CHAIN": an Accept here does not keep a
// packet from being dropped there.
func Dropping(ns netns.NsHandle, hook Hook) ([]string, error) {
	c, err := open(ns)
	if err != nil {
		return nil, err
	}
	defer c.CloseLasting()
	var names []string
	for _, f := range []nftables.TableFamily{nftables.TableFamilyINet, nftables.TableFamilyIPv4, nftables.TableFamilyIPv6} {
		chains, err := c.ListChainsOfTableFamily(f)
		if err != nil {
			return nil, fmt.Errorf("list chains: %w", err)
		}
		for _, ch := range chains {
			if ch.Hooknum != nil && *ch.Hooknum == hook && ch.Policy != nil && *ch.Policy == nftables.ChainPolicyDrop {
				names = append(names, ch.Table.Name+" "+ch.Name)
			}
		}
	}
	return names, nil
}
